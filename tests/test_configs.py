"""Every config: written from the recipes, equal to the sources, and built.

What the sources print is stated here once more, apart from mmagvm.recipes.
"""

import json
import math
import re
import shutil
from copy import deepcopy
from functools import lru_cache
from importlib.util import find_spec

import pytest
import torch
from commands import ROOT, load_command
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.optim import build_optim_wrapper
from mmengine.registry import (
    HOOKS,
    MODELS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    TRANSFORMS,
    VISUALIZERS,
    init_default_scope,
)

from mmagvm.recipes.lr_scaling import RECIPES, at
from mmagvm.recipes.writing import left_over, texts

CONFIGS = ROOT / 'configs'
#: The folders of recipes; configs/quickstart is run by test_tools.py.
FOLDERS = [
    *('ablations', 'faster_rcnn', 'mask_rcnn', 'megdet', 'panoptic_fpn'),
    *('retinanet', 'sem_fpn'),
]
FILES = sorted(
    file.relative_to(CONFIGS).as_posix()
    for folder in FOLDERS
    for file in (CONFIGS / folder).glob('*.py')
)
NAME = re.compile(
    r'(?P<folder>\w+)/(?P<model>[a-z-]+?)(?P<align>-align)?'
    r'_(?P<backbone>r50|r18|swin-t)(?P<fpn>_fpn)?'
    r'_(?P<gpus>\d+)xb(?P<images>\d+)(?P<tags>(-[a-z0-9]+)*?)'
    r'-(?P<length>\d+(e|k|it))'
    r'_(coco|ade20k-512x512)\.py'
)
DETECTOR = ['backbone', 'neck', 'rpn_head', 'roi_head.bbox_head']
MODULES = {
    'retinanet': ['backbone', 'neck', 'bbox_head'],
    'faster-rcnn': DETECTOR,
    'mask-rcnn': [*DETECTOR, 'roi_head.mask_head'],
    'panoptic-fpn': [*DETECTOR, 'roi_head.mask_head', 'semantic_head'],
    'fpn': ['backbone', 'neck', 'decode_head'],
}
#: By the tag of a name; what does not depend on the batch size.
OPTIMIZER = {
    '': dict(type='SGD', momentum=0.9, weight_decay=1e-4),
    'lars': dict(
        type='LARS', momentum=0.9, weight_decay=1e-4, trust_coefficient=0.02
    ),
    'adamw': dict(type='AdamW', betas=(0.9, 0.999), weight_decay=0.05),
    'pmd': dict(
        type='PMDLAMB', weight_decay=0.05, period=100, moment_decay=0.5
    ),
    'lamb': dict(type='LAMB', weight_decay=0.05),
    'soap': dict(
        type='SOAP',
        betas=(0.8, 0.95),
        weight_decay=0.05,
        precondition_frequency=5,
    ),
}
#: The iterations that the sources print: project page, appendix, note.
ITERATIONS = {
    'faster_rcnn': {32: 58640, 256: 7344, 512: 3680, 1024: 1840},
    'mask_rcnn': {32: 51310, 256: 6426, 512: 3220, 1024: 1610},
    'panoptic_fpn': {32: 51310, 256: 6426, 512: 3220, 1024: 1610},
    'sem_fpn': {32: 160000, 512: 10000, 1024: 5000, 2048: 2500},
    'faster_rcnn/adamw': {32: 43980, 1536: 924},
}
#: What the READMEs report, by recipe: batch size, baseline, AGVM; tables of
#: the project page, the reading note and the official code. Of MegDet's table
#: 3: batch size, BN size, GPUs, AP.
REPORTED = {
    'faster_rcnn': '32 36.8 36.8, 256 36.1 36.7, 512 35.3 36.7, '
    '1024 34.2 35.4',
    'faster_rcnn/adamw': '32 - 37.1, 256 - 37.2, 512 - 36.8, 1024 - 37.0, '
    '1536 35.9 36.6',
    'faster_rcnn/align': '32 37.1 -, 256 36.7 37.1, 512 36.2 36.8',
    'faster_rcnn/lamb': '32 - -, 256 - -, 512 - -, 1024 - -, 1536 33.2 -',
    'faster_rcnn/soap': '256 - -, 512 - -, 1024 - -',
    'faster_rcnn/swin': '32 - -, 256 - -, 512 - -, 1024 - -',
    'mask_rcnn': '32 33.9 33.9, 256 33.7 34.1, 512 33.1 33.9, 1024 NaN 32.6',
    'mask_rcnn/align': '32 34.8 -, 256 34.4 35.0, 512 33.9 34.6',
    'mask_rcnn/lars': '32 34.0 -, 256 32.0 -, 512 30.4 -, 1024 25.1 -',
    'megdet': '16 0 8 36.2, 16 2 8 31.0, 16 16 8 37.0, 32 32 8 37.3, '
    '64 64 8 35.3, 64 32 16 37.1, 64 16 32 37.1, 128 32 32 37.1, '
    '128 16 64 37.0, 256 32 64 37.1, 256 16 128 37.1',
    'megdet/long': '16 16 8 37.7, 32 32 8 37.8, 64 32 16 37.6, '
    '128 32 32 37.6, 256 32 64 37.7, 256 16 128 37.7',
    'panoptic_fpn': '32 38.9 38.9, 256 39.2 39.3, 512 38.7 39.5, '
    '1024 NaN 38.8',
    'retinanet': '32 - -, 256 - -, 512 - -, 1024 - -',
    'retinanet/r18': '32 31.4 32.8, 4096 23.5 28.7, 10240 NaN 26.7',
    'mask_rcnn/soap': '256 - -, 512 - -, 1024 - -',
    'panoptic_fpn/soap': '256 - -, 512 - -, 1024 - -',
    'retinanet/soap': '256 - -, 512 - -, 1024 - -',
    'sem_fpn/soap': '256 - -, 512 - -, 1024 - -',
    'sem_fpn': '32 37.5 37.5, 256 - -, 512 36.7 37.3, 1024 36.4 37.3, '
    '2048 36.2 37.0',
}


class Case:
    """The settings in a config's name, and the config."""

    def __init__(self, file):
        match = NAME.fullmatch(file)
        assert match, f'{file} is not named by the rule'
        self.file = file
        self.folder = match['folder']
        self.model = match['model']
        self.backbone = match['backbone']
        self.fpn = bool(match['fpn']) or self.model == 'fpn'
        self.align = bool(match['align'])
        self.images = int(match['images'])
        self.batch_size = int(match['gpus']) * self.images
        self.tags = match['tags'].split('-')[1:]
        self.length = match['length']
        self.agvm = 'agvm' in self.tags or 'measure' in self.tags
        tags = (tag for tag in OPTIMIZER if tag in self.tags)
        self.optimizer = OPTIMIZER[next(tags, '')]
        self.recipe = RECIPES[self._recipe_name()]
        self.cfg = Config.fromfile(CONFIGS / file)

    def _recipe_name(self):
        folder = self.folder
        if folder == 'ablations':
            folder = self.model.replace('-', '_')
        for special, applies in (
            ('align', self.align),
            ('swin', self.backbone == 'swin-t'),
            ('r18', self.backbone == 'r18'),
            ('long', folder == 'megdet' and self.length == '18e'),
            *((tag, True) for tag in self.tags if tag in OPTIMIZER),
        ):
            if applies and special != 'pmd':
                return f'{folder}/{special}'
        return folder


make_case = lru_cache(None)(Case)


@pytest.fixture(scope='module', autouse=True)
def _bases_are_looked_up_once():
    """MMEngine reads all of mmdet's metafiles to find one of its configs."""
    find = lru_cache(None)(Config._get_cfg_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, '_get_cfg_path', staticmethod(find))
        yield


@pytest.fixture(params=FILES, ids=lambda file: file[:-3])
def case(request):
    case = make_case(request.param)
    init_default_scope(case.cfg.default_scope)
    return case


# -- the set of configs


def grid(model, length, batch_sizes, methods, folder=None):
    """Names over 16 images per GPU; ``length`` may depend on the batch."""
    folder = folder or model.split('_')[0].replace('-', '_')
    data = 'ade20k-512x512' if folder == 'sem_fpn' else 'coco'
    for batch_size in batch_sizes:
        for method in methods:
            epochs = length if isinstance(length, str) else length[batch_size]
            yield (
                f'{folder}/{model}_{batch_size // 16}xb16'
                f'{method and "-" + method}-{epochs}_{data}.py'
            )


def megdet(recipe, length):
    """Names of the rows of MegDet's table."""
    for row in REPORTED[recipe].split(', '):
        batch_size, bn_size, gpus = map(int, row.split()[:3])
        norm = f'-cgbn{bn_size}' if bn_size else ''
        yield (
            f'megdet/faster-rcnn_r50_fpn_{gpus}xb{batch_size // gpus}{norm}'
            f'-{length}_coco.py'
        )


def test_every_recipe_has_its_config_and_no_other():
    coco, ablated, r18 = (32, 256, 512, 1024), (32, 512), (32, 4096, 10240)
    note = (*coco, 1536)
    sgd, adamw = ('', 'agvm'), ('adamw', 'agvm-adamw')
    soap = ('soap', 'agvm-soap')
    ade = {32: '160k', 256: '20k', 512: '10k', 1024: '5k', 2048: '2500it'}
    faster = 'faster-rcnn_r50_fpn'
    expected = [
        *grid(faster, '16e', coco, sgd),
        *grid(faster, '12e', note, (*adamw, 'lamb', 'pmd-lamb')),
        *grid(faster, '12e', coco[1:], soap),
        *grid('mask-rcnn_r50_fpn', '14e', coco[1:], soap),
        *grid('retinanet_r50_fpn', '14e', coco[1:], soap),
        *grid('panoptic-fpn_r50_fpn', '14e', coco[1:], soap),
        *grid('fpn_r50', ade, coco[1:], soap, 'sem_fpn'),
        *grid('faster-rcnn_swin-t_fpn', '12e', coco, adamw),
        *grid('mask-rcnn_r50_fpn', '14e', coco, (*sgd, 'lars')),
        *grid('retinanet_r50_fpn', '14e', coco, sgd),
        *grid('retinanet_r18_fpn', '14e', r18, sgd),
        *grid('panoptic-fpn_r50_fpn', '14e', coco, sgd),
        *grid('fpn_r50', ade, ade, sgd, 'sem_fpn'),
        *megdet('megdet', '11e'),
        *megdet('megdet/long', '18e'),
    ]
    for folder in ('faster_rcnn', 'mask_rcnn'):
        align = f'{folder.replace("_", "-")}-align_r50_fpn'
        expected += grid(align, '16e', (32, 256, 512), ('',), folder)
        expected += grid(align, '16e', (256, 512), ('agvm',), folder)
    for model, length, steps in (
        (faster, '16e', ('measure',)),
        (
            *('faster-rcnn_r50', '16e'),
            ('measure', '10rois-measure', '10rois-fixed-head-measure'),
        ),
        ('retinanet_r50_fpn', '14e', ('measure',)),
        ('retinanet_r50', '14e', ('measure', 'fixed-head-measure')),
    ):
        expected += grid(model, length, ablated, steps, 'ablations')
    assert sorted(expected) == FILES


def test_writing_changes_nothing():
    changed = [
        path.relative_to(ROOT).as_posix()
        for path, text in texts(ROOT).items()
        if not path.exists() or path.read_text() != text
    ]
    assert not changed, 'run python tools/misc/write_configs.py'
    assert not left_over(ROOT), 'no recipe has these: remove them'


def test_command_writes_what_differs(tmp_path, monkeypatch, capsys):
    shutil.copytree(CONFIGS, tmp_path / 'configs')
    shutil.copy(ROOT / 'model-index.yml', tmp_path)
    command = load_command('misc/write_configs.py')
    monkeypatch.setattr(command, 'ROOT', tmp_path)

    def run(*args):
        monkeypatch.setattr('sys.argv', ['write_configs.py', *args])
        command.main()
        return capsys.readouterr().out.splitlines()

    assert run('--check') == []
    spoilt = [
        'configs/sem_fpn/README.md',
        'configs/sem_fpn/fpn_r50_2xb16-160k_ade20k-512x512.py',
        'configs/sem_fpn/metafile.yml',
    ]
    for file in spoilt[::2]:
        path = tmp_path / file
        path.write_text(path.read_text().replace('160000', '160001'))
    (tmp_path / spoilt[1]).unlink()
    with pytest.raises(SystemExit, match='3 files differ.*write_configs'):
        run('--check')
    assert sorted(capsys.readouterr().out.split()) == spoilt
    assert not (tmp_path / spoilt[1]).exists()
    assert sorted(run()) == spoilt
    assert run('--check') == []
    for file in spoilt:
        assert (tmp_path / file).read_text() == (ROOT / file).read_text()
    (tmp_path / 'configs/megdet/mine.py').touch()
    with pytest.raises(SystemExit, match='configs/megdet/mine.py'):
        run()


# -- the recipes' numbers


@pytest.mark.parametrize('name', ITERATIONS)
def test_recipes_are_as_long_as_the_sources_say(name):
    assert {
        batch_size: RECIPES[name].iterations(batch_size)
        for batch_size in ITERATIONS[name]
    } == ITERATIONS[name]


def test_recipes_hold_between_and_beyond_the_papers_batch_sizes():
    recipe = RECIPES['faster_rcnn/swin']
    assert [recipe.warmup_end(n) for n in (64, 511, 768, 4096)] == [
        *(1833, 2 * 230, 2 * 153, 3 * 29),
    ]
    assert [recipe.lr(n) for n in (64, 128)] == [4e-4, 8e-4]
    assert [at(recipe.clip_norm, n) for n in (128, 300)] == [None, 1.0]
    assert recipe.begin(512) == 460 + 100
    assert recipe.begin(4096) == 87 + 29
    assert RECIPES['sem_fpn'].begin(2048) == 125 + 100
    assert RECIPES['sem_fpn'].iterations(256) == 20000


# -- the loaded configs


def test_batch_size_and_length_are_those_of_the_name(case):
    cfg = case.cfg
    assert cfg.train_dataloader.batch_size == case.images
    assert cfg.auto_scale_lr.base_batch_size == case.batch_size
    number, unit = re.fullmatch(r'(\d+)(\w+)', case.length).groups()
    if unit == 'e':
        assert cfg.train_cfg.max_epochs == case.recipe.epochs == int(number)
    else:
        iterations = int(number) * dict(k=1000, it=1)[unit]
        assert cfg.train_cfg.max_iters == iterations
        assert case.recipe.iterations(case.batch_size) == iterations


def test_optimizer_and_agvm_follow_from_the_recipe(case):
    recipe, batch_size = case.recipe, case.batch_size
    # the best rate of batch 512; 1.47e-3, which is printed as 1.5e-3
    rel = 0.2 if case.align else 0.021
    lr = recipe.lr(batch_size)
    assert lr == pytest.approx(recipe.rule(batch_size), rel=rel)
    optimizer = dict(case.optimizer, lr=lr)
    if case.folder == 'sem_fpn' and 'soap' not in case.tags:
        optimizer['weight_decay'] = 5e-4
    clip_norm = 1.0 if case.align else at(recipe.clip_norm, batch_size)
    expected = dict(
        type='OptimWrapper',
        optimizer=optimizer,
        clip_grad=clip_norm and dict(max_norm=clip_norm),
    )
    hooks = []
    if case.folder == 'megdet':
        hooks.append(dict(type='SyncBuffersHook'))
    if case.align:
        begin, end = recipe.clip_window(batch_size)
        hooks.append(dict(type='ClipGradWindowHook', begin=begin, end=end))
    cfg = case.cfg
    settings = {'clip_grad': None, **cfg.optim_wrapper}
    for key in ('paramwise_cfg', '_scope_'):
        settings.pop(key, None)
    if case.agvm:
        measure = case.folder == 'ablations'
        settings = {
            **dict(modulate=True, eps=1e-6, ratio_range=(0.1, 10.0)),
            **settings,
        }
        expected.update(
            type='AGVMOptimWrapper',
            constructor='AGVMOptimWrapperConstructor',
            interval=at(recipe.interval, batch_size),
            begin=0 if measure else recipe.begin(batch_size),
            ema_decay=0.97,
            estimator='split',
            modulate=not measure,
            eps=1e-6,
            ratio_range=(0.5**0.5, 10**0.5) if case.align else (0.1, 10.0),
        )
        hooks.append(dict(type='AGVMHook'))
        # every measurement is in the log, with every update an iteration
        assert cfg.default_hooks.logger.interval == settings['interval']
    assert settings == expected
    assert (cfg.get('custom_hooks') or []) == hooks


def expected_lr(case, iteration):
    """The learning rate by the recipe, computed without MMEngine."""
    recipe, batch_size = case.recipe, case.batch_size
    lr = recipe.lr(batch_size)
    grown = iteration / (recipe.warmup_end(batch_size) - 1)
    if grown < 1:
        lr *= 0.001 ** (1 - grown) if case.align else 0.001 + 0.999 * grown
    if recipe.epochs is None:
        # MMEngine counts from 0 to the last iteration
        return (
            lr * (1 - iteration / (recipe.iterations(batch_size) - 1)) ** 0.9
        )
    epoch = iteration // recipe.epoch(batch_size)
    lr *= 0.1 ** sum(epoch >= decay for decay in recipe.decay_epochs)
    if case.folder == 'megdet' and epoch >= 17:
        lr *= 0.5
    return lr


@lru_cache(None)
def lr_factors(schedulers, epoch, points):
    """The rate at some iterations, over the first, by MMEngine's schedulers.

    All steps of the training are taken, as the Runner takes them, but those
    after a scheduler's end, which do nothing; configs that share a schedule
    share the work.
    """
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedulers = [
        PARAM_SCHEDULERS.build(
            scheduler, default_args=dict(optimizer=optimizer)
        )
        for scheduler in json.loads(schedulers)
    ]
    factors = []
    for iteration in range(points[-1] + 1):
        if iteration in points:
            factors.append(optimizer.param_groups[0]['lr'])
        for scheduler in schedulers:
            if scheduler.by_epoch:
                if (iteration + 1) % epoch == 0:
                    scheduler.step()
            elif iteration < scheduler.end:
                scheduler.step()
    return factors


def test_learning_rate_along_the_schedule(case):
    recipe, batch_size = case.recipe, case.batch_size
    end = recipe.warmup_end(batch_size)
    total = recipe.iterations(batch_size)
    points = {0, 1, end // 2, end - 2, end - 1, end, end + 1, total - 1}
    points |= {total // 3, 2 * total // 3}
    for decay in recipe.decay_epochs:
        boundary = decay * recipe.epoch(batch_size)
        points |= {boundary - 1, boundary}
    if case.folder == 'megdet':
        points.add(min(17 * recipe.epoch(batch_size), total - 1))
    points = tuple(sorted(points))
    lr = case.cfg.optim_wrapper.optimizer.lr
    factors = lr_factors(
        json.dumps(case.cfg.param_scheduler), recipe.epoch(batch_size), points
    )
    assert [lr * factor for factor in factors] == pytest.approx(
        [expected_lr(case, iteration) for iteration in points],
        rel=1e-6,
        abs=1e-12,
    )


# -- built for real

BUILT = {}


def build_once(registry, cfg):
    """The object built from a config's part; equal parts share it.

    A model is at full width; its weights are not loaded.
    """
    key = json.dumps([registry.name, cfg], sort_keys=True)
    if key not in BUILT:
        BUILT[key] = registry.build(deepcopy(cfg))
    return BUILT[key]


def test_config_is_built(case):
    if OPTIMIZERS.get(case.optimizer['type']) is None:
        pytest.skip(f'{case.optimizer["type"]} is not registered')
    cfg = case.cfg
    # which the Runner would read, on several ranks only
    assert 'sync_bn' not in cfg
    model = build_once(MODELS, cfg.model)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    modules = [m for m in MODULES[case.model] if case.fpn or m != 'neck']
    assert {
        next(m for m in modules if name.startswith(f'{m}.'))
        for name in trainable
    } == set(modules)

    wrapper = build_optim_wrapper(model, deepcopy(cfg.optim_wrapper))
    groups = wrapper.optimizer.param_groups
    assert sum(len(group['params']) for group in groups) >= len(trainable)
    if case.agvm:
        assert wrapper.modulator.modules == modules
        grouped = {n for g in groups for n in g['param_names']}
        # frozen ones too, but with paramwise_cfg, as in MMEngine
        assert trainable <= grouped <= {n for n, _ in model.named_parameters()}
    if 'fixed' in case.tags:
        assert {g['module'] for g in groups if g['lr'] == 0} == {modules[-1]}
    for scheduler in cfg.param_scheduler:
        PARAM_SCHEDULERS.build(
            deepcopy(scheduler), default_args=dict(optimizer=wrapper)
        )
    VISUALIZERS.build(dict(cfg.visualizer, name=case.file))  # a hook asks
    custom_hooks = cfg.get('custom_hooks') or []
    for hook in [*cfg.default_hooks.values(), *custom_hooks]:
        build_once(HOOKS, hook)
    for transform in cfg.train_dataloader.dataset.pipeline:
        build_once(TRANSFORMS, transform)
    check_norm_layers(case, model)


def check_norm_layers(case, model):
    """SyncBN in the backbone and training, CGBN in MegDet's."""
    if case.backbone == 'swin-t':
        return
    layer = model.backbone.layer2[0].bn1
    if case.folder == 'megdet':
        size = re.search(r'cgbn(\d+)', case.file)
        if size is None:
            assert model.backbone.norm_eval
            return
        assert type(layer).__name__ == 'CGBN'
        assert case.cfg.model.backbone.norm_cfg.bn_size == int(size[1])
        # the BN size is that of the machine's 8 GPUs, or of one
        assert int(size[1]) in (case.images, 8 * case.images)
        assert model.backbone.with_cp == (int(size[1]) >= 32)
    else:
        assert isinstance(layer, torch.nn.SyncBatchNorm)
    assert not model.backbone.norm_eval
    assert layer.weight.requires_grad


def test_evaluation_is_set(case):
    cfg = case.cfg
    for transform in cfg.test_dataloader.dataset.pipeline:
        if (
            transform.type == 'LoadPanopticAnnotations'
            and find_spec('panopticapi') is None
        ):
            with pytest.raises(ImportError, match='pip install .*panopticapi'):
                TRANSFORMS.build(deepcopy(transform))
        else:
            build_once(TRANSFORMS, transform)
    if case.model == 'panoptic-fpn':
        assert cfg.val_cfg is cfg.val_dataloader is cfg.val_evaluator is None
        assert cfg.test_evaluator.type == 'CocoPanopticMetric'
    else:
        assert cfg.val_evaluator == cfg.test_evaluator


@pytest.mark.parametrize('gpus', [2, 32])
def test_ablations_change_what_they_say(gpus):
    proposals = [
        make_case(
            f'ablations/faster-rcnn_r50{tag}-16e_coco.py'
        ).cfg.model.train_cfg.rcnn.sampler.num
        for tag in (
            f'_fpn_{gpus}xb16-measure',
            f'_{gpus}xb16-measure',
            f'_{gpus}xb16-10rois-measure',
            f'_{gpus}xb16-10rois-fixed-head-measure',
        )
    ]
    assert proposals == [512, 512, 10, 10]


@pytest.mark.parametrize('folder', ['faster_rcnn', 'mask_rcnn'])
def test_align_models_differ_from_mmdets(folder):
    init_default_scope('mmdet')
    stem = folder.replace('_', '-')
    cfg = make_case(f'{folder}/{stem}-align_r50_fpn_2xb16-16e_coco.py').cfg
    model = build_once(MODELS, cfg.model)
    assert model.rpn_head.rpn_cls.out_channels == 2 * 3  # softmax
    assert math.isclose(model.rpn_head.loss_bbox.beta, 1 / 9)
    assert model.roi_head.bbox_head.loss_bbox.beta == 1
    extractor = model.roi_head.bbox_roi_extractor
    assert extractor.roi_layers[0].sampling_ratio == 2
    assert cfg.model.train_cfg.rpn_proposal.max_per_img == 2000
    assert cfg.model.test_cfg.rcnn.score_thr == 0


# -- what is written about them


TABLE = re.compile(
    r'<!-- recipes (\S+): begin -->\n.*\n\|[ -|]+\n((?:\|.*\n)+)'
    r'<!-- recipes \1: end -->'
)


def readme_tables(folder):
    """Rows of every table of a README, by the name in its comments."""
    text = (CONFIGS / folder / 'README.md').read_text()
    return {
        name: [line.strip('| ').split(' | ') for line in rows.splitlines()]
        for name, rows in TABLE.findall(text)
    }


def assert_row_follows(recipe, batch_size, lr, length, warmup):
    batch_size = int(batch_size)
    assert float(lr) == recipe.lr(batch_size)
    iterations = recipe.iterations(batch_size)
    assert length == str(recipe.epochs or f'{iterations} iterations')
    end = f'{recipe.warmup_end(batch_size)} iterations'
    if recipe.warmup_by_epoch:
        epochs = at(recipe.warmup, batch_size)
        end = f'{epochs} epoch{"s" * (epochs > 1)} ({end})'
    assert warmup == end


def test_readmes_show_the_recipes_and_what_the_sources_report():
    reported = {}
    for folder in FOLDERS[1:]:
        for name, rows in readme_tables(folder).items():
            assert name.partition('/')[0] == folder
            cells = [' '.join([row[0], *row[4:-1]]) for row in rows]
            reported[name] = ', '.join(cells)
            for row in rows:
                assert_row_follows(RECIPES[name], *row[:4])
                assert row[-1] == 'not run'
    assert reported == REPORTED
    rows = readme_tables('ablations')['ablations']
    models = {'Faster R-CNN': 'faster_rcnn', 'RetinaNet': 'retinanet'}
    assert [row[:2] for row in rows] == [
        [model, size] for model in models for size in ('32', '512')
    ]
    for model, *schedule, ours in rows:
        assert_row_follows(RECIPES[models[model]], *schedule)
        assert ours == 'not run'


def test_readme_of_ablations_names_all_configs():
    text = (CONFIGS / 'ablations/README.md').read_text()
    found = {
        f'ablations/{file.name}'
        for pattern in re.findall(r'`(\S+\*\S+\.py)`', text)
        for file in (CONFIGS / 'ablations').glob(pattern)
    }
    assert found == {file for file in FILES if file.startswith('ablations/')}


def test_model_index_lists_every_config():
    index = load(ROOT / 'model-index.yml')['Import']
    assert index == [f'configs/{folder}/metafile.yml' for folder in FOLDERS]
    listed = []
    for file in index:
        content = load(ROOT / file)
        (collection,) = content['Collections']
        assert (ROOT / collection['README']).exists()
        for model in content['Models']:
            assert model['In Collection'] == collection['Name']
            listed.append(model['Config'][len('configs/') :])
            case = make_case(listed[-1])
            assert case.file.endswith(f'/{model["Name"]}.py')
            length = model['Metadata']
            assert length.pop('Batch Size') == case.batch_size
            assert length == (
                dict(Epochs=case.recipe.epochs)
                if case.recipe.epochs
                else dict(Iterations=case.recipe.iterations(case.batch_size))
            )
            # results are listed when a log backs them
            assert 'Results' not in model
    assert listed == FILES
