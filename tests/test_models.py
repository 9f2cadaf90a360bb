"""Real models of mmdet and mmseg: modules and groups."""

import json

import pytest
from commands import load_command
from mmdet.datasets.samplers import (
    AspectRatioBatchSampler,
    MultiDataAspectRatioBatchSampler,
)
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from torch import nn
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
    # frozen ones too, but with paramwise_cfg, as in MMEngine
    expected = {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad or not paramwise_cfg
    }
    assert sorted(n for g in groups for n in g['param_names']) == sorted(
        expected
    )
    assert {id(p) for g in groups for p in g['params']} == {
        id(p) for p in expected.values()
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


# -- the tool that lists modules

LIST = 'misc/list_modules.py'


@pytest.fixture
def list_modules(monkeypatch, capsys, tmp_path):
    """Call the tool; its lines of output."""
    tool = load_command(LIST)
    monkeypatch.chdir(tmp_path)

    def call(*args, folder=None):
        if folder is not None:
            monkeypatch.setattr(tool, 'package_configs', lambda _: folder)
        monkeypatch.setattr('sys.argv', [LIST, *map(str, args)])
        tool.main()
        return capsys.readouterr().out.splitlines()

    yield call
    DefaultScope._instance_dict.clear()


def test_config_that_is_not_there_is_named_once(list_modules, capsys):
    with pytest.raises(SystemExit) as error:
        list_modules('nowhere.py')
    assert error.value.code == 1
    line, _ = capsys.readouterr().out.splitlines()
    assert line == 'nowhere.py: no such config file'


def test_modules_inside_of_real_models_are_listed(list_modules, tmp_path):
    """A student with its teacher, a detector of a tracker, two encoders."""
    names = [
        'mmdet::soft_teacher/'
        'soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py',
        'mmdet::qdtrack/qdtrack_faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_'
        'test-mot17halfval.py',
        'mmseg::san/san-vit-b16_coco-stuff164k-640x640.py',
        'mmdet::common/ms_3x_coco.py',
    ]
    out = tmp_path / 'modules.jsonl'
    lines = list_modules(*names, '--out', out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    student, tracker, encoders, none = rows
    assert list(student['modules']) == [f'student.{m}' for m in DETECTOR]
    assert student['anchor'] == 'student.backbone'
    assert list(tracker['modules']) == [
        *(f'detector.{m}' for m in DETECTOR),
        'track_head',
    ]
    assert tracker['anchor'] == 'detector.backbone'
    assert encoders['anchor'] == 'image_encoder'
    assert none['problem'] == 'it has no model'
    assert lines[0].endswith('; all follow student.backbone')
    assert lines[-1] == (
        '4 configs: 3 can be trained with AGVM, 0 cannot, 1 have no model '
        'that can be built here'
    )
    # known models are not built again
    assert list_modules(*names, '--out', out) == lines
    assert len(out.read_text().splitlines()) == 4


def test_all_configs_of_a_package_are_listed(list_modules, tmp_path):
    """On four stand-in configs, as all of mmdet's take minutes."""
    folder = tmp_path / 'configs'
    (folder / '_base_').mkdir(parents=True)
    one = "model = dict(type='OneModule')\n"
    (folder / '_base_' / 'model.py').write_text(one)
    (folder / 'one.py').write_text(one)
    (folder / 'same.py').write_text(one + 'max_epochs = 3\n')
    (folder / 'apart.py').write_text(
        one + "optim_wrapper = dict(modules=['backbone.0', 'backbone.1'], "
        "anchor='backbone.0')\n"
    )
    (folder / 'broken.py').write_text(
        f"custom_imports = dict(imports=['not_installed_anywhere'])\n{one}"
    )
    lines = list_modules('--all', 'mmdet', folder=folder)
    assert [line.partition(':')[0] for line in lines[:-1]] == [
        *('apart.py', 'broken.py', 'one.py', 'same.py')
    ]
    assert lines[0] == (
        'apart.py: backbone.0 6, backbone.1 6; all follow backbone.0'
    )
    assert 'not_installed_anywhere' in lines[1]
    assert "'backbone' is the only module" in lines[2]
    assert lines[-1] == (
        '4 configs: 1 can be trained with AGVM, 2 cannot, 1 have no model '
        'that can be built here'
    )
    assert OneModule.built == 2


@MODELS.register_module()
class OneModule(BaseModel):
    built = 0

    def __init__(self):
        super().__init__()
        OneModule.built += 1
        self.backbone = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def forward(self, inputs):
        return self.backbone(inputs)


@pytest.mark.sweep
@pytest.mark.parametrize('package', ['mmdet', 'mmseg'])
def test_every_config_finds_its_modules_or_says_why_not(
    list_modules, package, tmp_path
):
    """All configs that the package was installed with; takes minutes."""
    out = tmp_path / 'modules.jsonl'
    list_modules('--all', package, '--out', out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) > 500
    for row in rows:
        if row['problem']:
            assert not row['built'], row
        else:
            assert len(row['modules']) >= 2, row
            last = row['anchor'].rpartition('.')[2]
            assert last in ('backbone', 'image_encoder'), row
