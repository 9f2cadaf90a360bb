"""Common parts of train.py and test.py."""

import argparse
import datetime
import gc
import os
import os.path as osp
from typing import Any, Dict, Optional

import mmengine
import torch
import torch.distributed as dist
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.dist import get_comm_device, init_dist
from mmengine.utils.dl_utils import set_multi_processing

import mmagvm  # noqa: F401  registers AGVM, lets torch >= 2.6 load checkpoints
from mmagvm.engine.config_types import type_name
from mmagvm.errors import UsageError
from mmagvm.launch.rendezvous import (
    deadline,
    launcher_store,
    restarts,
    timeout_seconds,
    wait_for_ranks,
)


def common_parser(description: str) -> argparse.ArgumentParser:
    """OpenMMLab's arguments that every tool takes, after the config."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file of mmdet, mmseg or mmagvm')
    parser.add_argument('--work-dir', help='where logs and checkpoints go')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override settings of the config: key=value pairs such as '
        'optim_wrapper.interval=5; lists as key="[a,b]" or key=a,b, without '
        'spaces',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher',
    )
    # torch.distributed.launch passes --local_rank, newer ones --local-rank
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    return parser


def load_config(args: argparse.Namespace) -> Config:
    """The config with --cfg-options, --launcher and --work-dir applied."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = osp.join(
            'work_dirs', osp.splitext(osp.basename(args.config))[0]
        )
    return cfg


def join_ranks(cfg: Config) -> None:
    """Make the process group, and check that its ranks reach each other.

    MMEngine would make it later, and a missing rank would not be explained.
    Here every rank ends within TIMEOUT seconds, with a list of what to check.
    When several nodes restart, the time to notice the loss comes on top.
    """
    if cfg.launcher == 'none':
        return
    if cfg.launcher != 'pytorch' and get_device() == 'cpu':
        raise UsageError(
            f'--launcher {cfg.launcher} needs a GPU for each '
            'rank, but this machine has none: use --launcher pytorch'
        )
    seconds: float = timeout_seconds()
    within = f'TIMEOUT={seconds:g} seconds'
    if restarts() and int(os.environ.get('GROUP_WORLD_SIZE', 1)) > 1:
        # each node restarts, with its own timeout, once it notices the loss
        within = f'{patience(cfg):g} seconds to notice a loss and {within}'
        seconds += patience(cfg)
    with deadline(
        seconds, f'The ranks did not reach each other within {within}'
    ):
        store = launcher_store(seconds)
        if store is not None:
            # leaves some time to find out which ranks are missing
            wait_for_ranks(store, 0.9 * seconds, within)
        init_process_group(cfg, store)
        met = torch.ones(1, device=get_comm_device())
        dist.all_reduce(met)
        met.item()  # waits for the GPU


def leave_ranks() -> None:
    """Destroy the process group, with its threads, after a successful run.

    MMEngine never does, and NCCL warns of it. A thread of gloo that holds a
    tensor a moment too long aborts Python at its exit, and a complete run is
    reported as failed. Delete all references to the runner before, as its
    model keeps the group.
    """
    gc.collect()  # runner and hooks refer to each other
    if dist.is_initialized():
        dist.destroy_process_group()


def patience(cfg: Config) -> float:
    """Seconds that ranks wait for each other in a collective."""
    dist_cfg = cfg.get('env_cfg', {}).get('dist_cfg', {})
    # torch's own for gloo, and for NCCL
    usual = 1800 if get_device() == 'cpu' else 600
    seconds: float = dist_cfg.get('timeout', usual)
    return seconds


def init_process_group(cfg: Config, store: Optional[dist.Store]) -> None:
    """MMEngine's process group, or one over gloo where there is no GPU.

    ``mmengine.dist.init_dist`` and the default model wrapper both select a
    CUDA device. Without one the process group is made here, with the timeout
    of ``env_cfg.dist_cfg``, and the model is wrapped without device.
    """
    env_cfg = cfg.get('env_cfg', {})
    dist_cfg = env_cfg.get('dist_cfg', {})
    timeout = datetime.timedelta(seconds=patience(cfg))
    group: Dict[str, Any] = {}
    if store is not None and get_device() in ('cpu', 'cuda'):
        # with a prefix, as torchrun's store still has the addresses of ranks
        # that died before a restart
        store = dist.PrefixStore(f'group {restarts()}', store)
        store.set_timeout(timeout)
        group = dict(
            store=store,
            rank=int(os.environ['RANK']),
            world_size=int(os.environ['WORLD_SIZE']),
        )
    if get_device() != 'cpu':
        # what the Runner would do later; it skips what is done
        set_multi_processing(**env_cfg.get('mp_cfg', {}), distributed=True)
        init_dist(cfg.launcher, **dist_cfg, **group)
        return
    dist.init_process_group('gloo', timeout=timeout, **group)
    wrapper = dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    wrapper.update(cfg.get('model_wrapper_cfg') or {})
    cfg.model_wrapper_cfg = dict(wrapper, device_ids=None)


def use_omp_threads() -> None:
    """Give torch OMP_NUM_THREADS threads, on a CPU.

    gloo's threads and data workers compete with torch's own.
    """
    if not torch.cuda.is_available() and 'OMP_NUM_THREADS' in os.environ:
        torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))


def refuse_ignored_settings(cfg: Config) -> None:
    """Raise a UsageError for settings that MMEngine would ignore silently."""
    if type_name(cfg.get('runner_type')) != 'FlexibleRunner':
        if cfg.get('strategy'):
            raise UsageError(
                f'strategy={dict(cfg.strategy)} is only read by a '
                "FlexibleRunner: also set runner_type='FlexibleRunner'"
            )
        return
    for name in ('activation_checkpointing', 'find_unused_parameters'):
        if cfg.get(name):
            raise UsageError(
                f'{name}={cfg[name]!r} is not read by a FlexibleRunner: write '
                f"strategy=dict(type='FullyShardStrategy', {name}="
                f'{cfg[name]!r}) instead'
            )


def build_runner(cfg: Config) -> mmengine.runner.Runner:
    """The runner that the config describes."""
    use_omp_threads()
    refuse_ignored_settings(cfg)
    if 'runner_type' in cfg:
        return mmengine.registry.RUNNERS.build(cfg)
    return mmengine.runner.Runner.from_cfg(cfg)
