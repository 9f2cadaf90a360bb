"""The config lines that README and docs show to users.

1. The first screen's: what is left of an mmdet config is the paper's recipe.
2. A config next to the paper's settings, in docs/settings.md.
"""

import re
from pathlib import Path

from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

from mmagvm import AGVMOptimWrapper

BASE = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
ROOT = Path(__file__).parent.parent
RECIPE = (
    ROOT / 'configs/faster_rcnn/faster-rcnn_r50_fpn_32xb16-agvm-16e_coco.py'
)


def snippet(page, language, *, containing):
    """A page's only code block of a language that contains a text."""
    blocks = re.findall(
        rf'```{language}\n(.*?)```', (ROOT / page).read_text(), re.S
    )
    (found,) = (block for block in blocks if containing in block)
    return found


def build(cfg):
    """The wrapper as MMEngine's Runner builds it."""
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    return build_optim_wrapper(model, cfg.optim_wrapper)


def test_lines_to_change_are_those_of_the_recipe(tmp_path):
    diff = snippet('README.md', 'diff', containing='AGVMOptimWrapper')
    diff = diff.splitlines(True)
    old = ''.join(line[1:] for line in diff if line[0] in ' -')
    new = ''.join(line[1:] for line in diff if line[0] in ' +')

    file = tmp_path / 'config.py'
    file.write_text(f'_base_ = {BASE!r}')
    before = Config.fromfile(file).optim_wrapper
    exec(old + ')', shown := {})
    assert shown['optim_wrapper']['type'] == before.type
    assert {**before.optimizer, 'lr': 0.32} == shown['optim_wrapper'][
        'optimizer'
    ]

    file.write_text(f'_base_ = {BASE!r}\n{new}')
    cfg, recipe = Config.fromfile(file), Config.fromfile(RECIPE)
    ours, theirs = cfg.optim_wrapper, recipe.optim_wrapper
    assert ours.optimizer == theirs.optimizer
    for setting in ('type', 'constructor', 'interval', 'ema_decay', 'begin'):
        assert ours[setting] == theirs[setting]
    assert cfg.custom_hooks == recipe.custom_hooks
    assert cfg.default_hooks.logger == recipe.default_hooks.logger
    assert isinstance(build(cfg), AGVMOptimWrapper)


def test_config_next_to_the_papers_settings(tmp_path):
    (tmp_path / '_base_').symlink_to(ROOT / 'configs/_base_')
    file = tmp_path / 'own/config.py'
    file.parent.mkdir()
    file.write_text(
        snippet('docs/settings.md', 'python', containing='_base_.agvm')
    )
    cfg = Config.fromfile(file)
    wrapper = build(cfg)
    assert wrapper.optimizer.param_groups[0]['lr'] == 0.16
    assert wrapper.settings.begin == 500
    assert 'AGVMHook' in [hook['type'] for hook in cfg.custom_hooks]


def test_config_of_the_settings_page(tmp_path):
    lines = snippet('docs/settings.md', 'python', containing='begin=560')
    file = tmp_path / 'config.py'
    file.write_text(f'_base_ = {BASE!r}\n{lines}')
    wrapper = build(Config.fromfile(file))
    assert isinstance(wrapper, AGVMOptimWrapper)
    assert wrapper.settings.begin == 560
