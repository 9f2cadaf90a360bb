"""Runs whole commands of the tools on the toy, and reads their files."""

import importlib.util
import os
import signal
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Optional, Union

import torch
from mmengine.runner import CheckpointLoader
from toy_runner import toy_cfg

from mmagvm.launch.rendezvous import free_port

ROOT = Path(__file__).parent.parent


def load_command(path: str) -> ModuleType:
    """The module of a command in tools/, to call its ``main`` in process."""
    file = ROOT / 'tools' / path
    spec = importlib.util.spec_from_file_location(f'tools_{file.stem}', file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_checkpoint(path: Union[str, Path]) -> Dict[str, Any]:
    """As MMEngine does; its fork withdraws its safe types after each load."""
    checkpoint: Dict[str, Any] = CheckpointLoader.load_checkpoint(
        str(path), map_location='cpu'
    )
    return checkpoint


def start(*args: object, **env: object) -> 'subprocess.Popen[str]':
    """Start a command in the project's root, on the CPU."""
    paths = [str(ROOT), str(ROOT / 'tests')]
    return subprocess.Popen(
        [str(arg) for arg in args],
        cwd=ROOT,
        env={
            **os.environ,
            'PORT': str(free_port()),
            'CUDA_VISIBLE_DEVICES': '-1',
            'OMP_NUM_THREADS': '1',
            'PYTHONPATH': ':'.join(paths),
            **{name: str(value) for name, value in env.items()},
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # so that a hang can be ended with all its ranks
        start_new_session=True,
    )


def finish(process: 'subprocess.Popen[str]', code: int = 0) -> str:
    """The output of a command, which must end with this exit status."""
    try:
        output, _ = process.communicate(timeout=500)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == code, output[-5000:]
    return output


def run(*args: object, code: int = 0, **env: object) -> str:
    """The output of a command, which must end with this exit status."""
    return finish(start(*args, **env), code)


def write_config(
    work_dir: Union[str, Path], hook: Optional[str] = None, **settings: Any
) -> Path:
    """A config file of the toy, for two ranks and so without accumulation."""
    cfg = toy_cfg(work_dir, accumulative_counts=1, **settings)
    if hook is not None:
        cfg.custom_hooks.append(dict(type=hook))
    cfg.custom_imports = dict(imports=['mmagvm', 'toy_runner'])
    cfg.pop('experiment_name')
    path = Path(f'{work_dir}.py')
    cfg.dump(path)
    return path


def assert_equal(ours: Any, other: Any, path: str = '') -> None:
    """Two checkpoints' parts, down to the bits of their tensors."""
    assert type(ours) is type(other), path
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, other), path
    elif isinstance(ours, dict):
        assert ours.keys() == other.keys(), path
        for key, value in ours.items():
            assert_equal(value, other[key], f'{path}.{key}')
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(other), path
        for i, (value, its) in enumerate(zip(ours, other)):
            assert_equal(value, its, f'{path}[{i}]')
    else:
        assert ours == other, path
