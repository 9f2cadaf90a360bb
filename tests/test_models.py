"""Real models of mmdet and mmseg: modules and groups."""

import pytest
from mmdet.datasets.samplers import (
    AspectRatioBatchSampler,
    MultiDataAspectRatioBatchSampler,
)
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch.utils.data import DataLoader, SequentialSampler
from toy import wrapper_cfg

from mmagvm.engine.batch_size import batch_sizes

# with both package sets
pytestmark = pytest.mark.host

DETECTOR = ['backbone', 'neck', 'rpn_head', 'roi_head.bbox_head']
SEGMENTER = ['backbone', 'decode_head', 'auxiliary_head']
TRANSFORMER = ['backbone', 'neck', 'encoder', 'decoder', 'bbox_head']

#: The paper's five pipelines (legends of its figures), then models
#: that no recipe names; base config and expected modules.
MODEL_MODULES = {
    'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py': [
        'backbone',
        'neck',
        'bbox_head',
    ],
    'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py': DETECTOR,
    'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py': [
        *DETECTOR,
        'roi_head.mask_head',
    ],
    'mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py': [
        *DETECTOR,
        'roi_head.mask_head',
        'semantic_head',
    ],
    'mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py': [
        'backbone',
        'neck',
        'decode_head',
    ],
    'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py': [
        *DETECTOR,
        'roi_head.mask_head',
    ],
    'mmdet::htc/htc_r50_fpn_1x_coco.py': [
        *DETECTOR,
        'roi_head.mask_head',
        'roi_head.semantic_head',
    ],
    'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py': [
        'backbone',
        'neck',
        'bbox_head',
    ],
    'mmdet::detr/detr_r50_8xb2-150e_coco.py': [
        *TRANSFORMER,
        'query_embedding',
    ],
    'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py': [
        *TRANSFORMER,
        'memory_trans_fc',
        'memory_trans_norm',
        'query_embedding',
        'dn_query_generator',
        'others',
    ],
    'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py': [
        'backbone',
        'panoptic_head',
    ],
    'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py': [
        *DETECTOR,
        'roi_head.mask_head',
    ],
    'mmseg::pspnet/pspnet_r50-d8_4xb4-80k_ade20k-512x512.py': SEGMENTER,
    'mmseg::upernet/upernet_r50_4xb4-80k_ade20k-512x512.py': SEGMENTER,
    'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py': [
        'backbone',
        'decode_head',
    ],
}


@pytest.fixture(scope='module', params=MODEL_MODULES, ids=lambda n: n[7:30])
def config_and_model(request, tmp_path_factory):
    file = tmp_path_factory.mktemp('config') / 'config.py'
    file.write_text(f'_base_ = {request.param!r}\n')
    cfg = Config.fromfile(file)
    init_default_scope(cfg.default_scope)
    return request.param, cfg, MODELS.build(cfg.model)


@pytest.mark.parametrize(
    'options', ['none', 'own', 'norm_and_bias'], ids=lambda o: f'{o}-options'
)
def test_every_trainable_parameter_is_in_one_of_few_groups(
    config_and_model, options
):
    name, cfg, model = config_and_model
    paramwise_cfg = {
        'none': None,
        'own': cfg.optim_wrapper.get('paramwise_cfg'),
        'norm_and_bias': dict(norm_decay_mult=0.0, bias_lr_mult=2.0),
    }[options]
    wrapper = build_optim_wrapper(
        model, wrapper_cfg('AdamW', paramwise_cfg=paramwise_cfg)
    )
    assert sorted(wrapper.modulator.modules) == sorted(MODEL_MODULES[name])
    groups = wrapper.optimizer.param_groups
    trainable = {
        name: p for name, p in model.named_parameters() if p.requires_grad
    }
    assert sorted(n for g in groups for n in g['param_names']) == sorted(
        trainable
    )
    assert {id(p) for g in groups for p in g['params']} == {
        id(p) for p in trainable.values()
    }
    distinct = {
        (
            g['module'],
            *((k, str(v)) for k, v in g.items() if 'param' not in k),
        )
        for g in groups
    }
    assert len(groups) == len(distinct)
    if options == 'none':
        assert len(groups) == len(wrapper.modulator.modules)
    else:
        assert len(groups) <= 12 * len(wrapper.modulator.modules)


def test_samplers_of_mmdet_tell_their_batch_sizes():
    sampler = MultiDataAspectRatioBatchSampler(
        SequentialSampler(range(8)), batch_size=[4, 2], num_datasets=2
    )
    loader = DataLoader(range(8), batch_sampler=sampler)
    assert batch_sizes(loader) == [4, 2]
    sampler = AspectRatioBatchSampler(SequentialSampler(range(8)), 3)
    assert batch_sizes(DataLoader(range(8), batch_sampler=sampler)) == [3]
    # as semi-supervised configs have it
    assert batch_sizes(DataLoader(range(8), batch_size=5)) == [5]
    assert batch_sizes(DataLoader(range(8), batch_size=None)) == []
