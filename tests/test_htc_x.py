"""HTC-X: its configs at full size, without memory, and a small one trains."""

from importlib.util import find_spec

import pytest
import torch
from commands import ROOT
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmagvm.core import find_modules
from mmagvm.launch.runner import refuse_ignored_settings

FOLDER = ROOT / 'configs/htc_x'
FILES = sorted(file.name for file in FOLDER.glob('*.py'))
DETECTORS = [file for file in FILES if file.startswith('htc-x')]
#: Of UniNet-G's detector, by the facts of the paper and of public code.
MODULES = {
    'backbone',
    'neck',
    'rpn_head',
    'roi_head.bbox_head',
    'roi_head.glbctx_head',
}


@pytest.fixture(scope='module')
def models():
    """By number of classes and masks, so that none is built twice."""
    return {}


def on_meta(cfg):
    import mmdet.models  # noqa: F401
    from mmdet.registry import MODELS

    import mmagvm.models  # noqa: F401

    init_default_scope('mmdet')
    with torch.device('meta'):
        return MODELS.build(cfg.model)


@pytest.mark.parametrize('file', DETECTORS)
def test_config_is_built_at_full_size(file):
    cfg = Config.fromfile(FOLDER / file)
    refuse_ignored_settings(cfg)
    model = on_meta(cfg)
    classes = 365 if 'objects365' in file else 80
    assert model.roi_head.bbox_head[0].fc_cls.out_features == classes + 1
    modules = set(find_modules(model))
    masks = {'roi_head.mask_head'} if 'mask' in file else set()
    assert modules == MODULES | masks
    assert ('shard' in file) == (cfg.get('runner_type') == 'FlexibleRunner')
    assert ('agvm' in file) == (cfg.optim_wrapper.type == 'AGVMOptimWrapper')
    count = sum(p.numel() for p in model.parameters())
    assert 1.19e9 < count < 1.23e9


@pytest.mark.parametrize(
    'file, batch, updates',
    [
        ('htc-x_uninet-g_480xb2-agvm-adamw-11e_coco.py', 960, 1353),
        ('htc-x_uninet-g_32xb2-adamw-20e_objects365v1.py', 64, 199380),
    ],
)
def test_length_is_the_papers(file, batch, updates):
    cfg = Config.fromfile(FOLDER / file)
    images = 638000 if 'objects365' in file else 117266
    gpus = int(file.split('_')[2].split('xb')[0])
    assert gpus * cfg.train_dataloader.batch_size == batch
    epochs = cfg.train_cfg.max_epochs
    assert -(-images // batch) * epochs == pytest.approx(updates, abs=20)


def test_scales_are_the_papers():
    cfg = Config.fromfile(
        FOLDER / 'htc-x_uninet-g_480xb2-agvm-adamw-11e_coco.py'
    )
    (resize,) = [
        step
        for step in cfg.train_dataloader.dataset.pipeline
        if 'Resize' in step['type']
    ]
    assert {long for long, _ in resize['scales']} == {1600}
    sides = [short for _, short in resize['scales']]
    assert (min(sides), max(sides)) == (400, 1200)
    ious = [stage.assigner.pos_iou_thr for stage in cfg.model.train_cfg.rcnn]
    assert ious == [0.6, 0.7, 0.8]
    assert cfg.optim_wrapper.optimizer.lr == 1.5e-4
    assert cfg.optim_wrapper.begin == cfg.param_scheduler[0].end + 100


@pytest.mark.skipif(
    find_spec('mmpretrain') is None, reason='mmpretrain is not installed'
)
def test_pre_training_is_built():
    from mmpretrain.registry import MODELS

    cfg = Config.fromfile(FOLDER / 'uninet-g_640xb8-150e_in22k.py')
    with torch.device('meta'):
        MODELS.build(cfg.model)
