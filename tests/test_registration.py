"""What the import of mmagvm registers, and which hosts it takes."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE

from mmagvm.engine import host as compat
from mmagvm.engine.hook import innermost

# with both package sets
pytestmark = pytest.mark.host


def test_import_registers_and_needs_no_host():
    code = (
        'import sys, mmagvm\n'
        'from mmengine.registry import HOOKS, OPTIM_WRAPPERS\n'
        "assert HOOKS.get('AGVMHook') is mmagvm.AGVMHook\n"
        "assert OPTIM_WRAPPERS.get('AGVMOptimWrapper')\n"
        "assert not {'mmdet', 'mmseg', 'mmcv'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, '-c', code], check=True)


def test_taken_names_are_left_alone_and_reported():
    """In a project that has its own classes of these names."""
    code = (
        'import importlib, sys\n'
        'from mmengine.registry import *\n'
        'import mmengine.optim\n'
        'TAKEN = {\n'
        "    OPTIMIZERS: ['LARS', 'LAMB', 'PMDLAMB', 'SOAP', 'Muon'],\n"
        "    HOOKS: ['AGVMHook', 'ClipGradWindowHook'],\n"
        "    OPTIM_WRAPPERS: ['AGVMOptimWrapper', 'AGVMAmpOptimWrapper'],\n"
        "    OPTIM_WRAPPER_CONSTRUCTORS: ['AGVMOptimWrapperConstructor'],\n"
        "    PARAM_SCHEDULERS: ['ExponentialWarmupLR'],\n"
        "    TRANSFORMS: ['LoadPanopticSegments'],\n"
        "    MODELS: ['CGBN'],\n"
        '}\n'
        'theirs = {}\n'
        'for registry, names in TAKEN.items():\n'
        '    for name in names:\n'
        '        theirs[name] = type(name, (), {})\n'
        '        registry.register_module(module=theirs[name], force=True)\n'
        'import mmagvm\n'
        'for registry, names in TAKEN.items():\n'
        '    for name in names:\n'
        '        assert registry.get(name) is theirs[name], name\n'
        "        ours = registry.get(f'mmagvm_{name}')\n"
        "        assert ours.__module__.startswith('mmagvm.'), ours\n"
        "print('once', file=sys.stderr)\n"
        "for name in [n for n in sys.modules if n.startswith('mmagvm')]:\n"
        '    del sys.modules[name]\n'
        'import mmagvm\n'
        "assert HOOKS.get('mmagvm_AGVMHook') is mmagvm.AGVMHook\n"
    )
    done = subprocess.run(
        [sys.executable, '-c', code], text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    errors = done.stderr.split('once')[0]
    assert (
        "type='LARS' of the optimizers stands for __main__.LARS here: to use "
        "mmagvm.recipes.optimizers.LARS, write type='mmagvm_LARS'"
    ) in errors
    assert errors.count(' here: to use mmagvm.') == 13


def test_names_that_are_taken_later_are_reported():
    """As if this project's tools import another project."""
    code = (
        'import mmagvm\n'
        'from mmengine.registry import OPTIMIZERS\n'
        'OPTIMIZERS.register_module()(type("LARS", (), {}))\n'
        "theirs = OPTIMIZERS.get('LARS')\n"
        "assert theirs.__module__ == '__main__'\n"
        "assert OPTIMIZERS.get('mmagvm_LARS').__module__[:6] == 'mmagvm'\n"
        'try:\n'
        '    OPTIMIZERS.register_module()(type("LARS", (), {}))\n'
        'except KeyError: print("KeyError")\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], text=True, capture_output=True
    )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, 'KeyError')
    message = "type='LARS' of the optimizers stands for __main__.LARS here"
    assert message in done.stdout + done.stderr


def test_joined_data_sets_are_known_by_what_they_join():
    class Inner:
        pass

    def joined(*datasets):
        return SimpleNamespace(datasets=datasets)

    one = Inner()
    repeated = SimpleNamespace(dataset=joined(one, Inner()))
    assert innermost(repeated) is innermost(joined(repeated, one)) is one
    different = joined(one, 'another')
    assert innermost(different) is different


def test_second_import_is_silent():
    code = (
        'import sys, mmagvm\n'
        'from mmengine.registry import HOOKS, OPTIMIZERS\n'
        "for name in [n for n in sys.modules if n.startswith('mmagvm')]:\n"
        '    del sys.modules[name]\n'
        'import mmagvm\n'
        "assert HOOKS.get('AGVMHook') is mmagvm.AGVMHook\n"
        'from mmagvm.recipes.registry import taken\n'
        'assert not taken\n'
        'assert not [n for n in OPTIMIZERS.module_dict if "mmagvm" in n]\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', code], text=True, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, '')


@pytest.mark.parametrize('version', ['mmengine', 'torch'])
def test_old_host_is_refused(version, monkeypatch):
    import mmengine

    from mmagvm.engine.host import check_versions

    package = dict(mmengine=mmengine, torch=torch)[version]
    monkeypatch.setattr(package, '__version__', '0.1')
    with pytest.raises(ImportError, match=f'needs {version} >= .*0.1 is'):
        check_versions()


def test_mmseg_bases_are_found_without_mmsegmentation(monkeypatch):
    """The fork has the module, but its package has another name."""

    def version(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(compat, 'version', version)
    monkeypatch.setitem(MODULE2PACKAGE, 'mmseg', 'no-such-package')
    compat.find_mmseg_bases()
    base = 'mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py'
    assert 'model' in Config.fromfile(Config._get_cfg_path(base, '')[0])
