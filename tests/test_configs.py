"""Every config against the recipes' numbers, and built for real."""

import json
import math
import re
from copy import deepcopy
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
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

CONFIGS = Path(__file__).parent.parent / 'configs'
#: The folders of recipes; configs/quickstart is run by test_tools.py.
FOLDERS = (
    'ablations',
    'faster_rcnn',
    'mask_rcnn',
    'megdet',
    'panoptic_fpn',
    'retinanet',
    'sem_fpn',
)
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
#: The iterations that the sources print: project page, appendix, note.
ITERATIONS = {
    'faster_rcnn': {32: 58640, 256: 7344, 512: 3680, 1024: 1840},
    'mask_rcnn': {32: 51310, 256: 6426, 512: 3220, 1024: 1610},
    'panoptic_fpn': {32: 51310, 256: 6426, 512: 3220, 1024: 1610},
    'sem_fpn': {32: 160000, 512: 10000, 1024: 5000, 2048: 2500},
    'faster_rcnn/adamw': {32: 43980, 1536: 924},
}


class Case:
    """What a config's name says, and the config."""

    def __init__(self, file):
        match = NAME.fullmatch(file)
        assert match, f'{file} is not named by the rule'
        self.file = file
        self.model = match['model']
        self.backbone = match['backbone']
        self.fpn = bool(match['fpn']) or self.model == 'fpn'
        self.align = bool(match['align'])
        self.images = int(match['images'])
        self.batch_size = int(match['gpus']) * self.images
        self.tags = match['tags'].split('-')[1:]
        self.length = match['length']
        self.folder = match['folder']
        self.agvm = 'agvm' in self.tags or 'measure' in self.tags
        self.recipe = RECIPES[self._recipe_name()]
        self.cfg = Config.fromfile(CONFIGS / file)

    def _recipe_name(self):
        folder = self.folder
        if folder == 'ablations':
            folder = self.model.replace('-', '_')
        for special, applies in (
            ('align', self.align),
            ('swin', self.backbone == 'swin-t'),
            ('lamb', 'lamb' in self.tags),
            ('soap', 'soap' in self.tags),
            ('adamw', 'adamw' in self.tags),
            ('lars', 'lars' in self.tags),
            ('long', folder == 'megdet' and self.length == '18e'),
        ):
            if applies:
                return f'{folder}/{special}'
        return folder

    @property
    def optimizer(self):
        if 'lamb' in self.tags:
            return 'PMDLAMB' if 'pmd' in self.tags else 'LAMB'
        return next(
            (
                optimizer
                for tag, optimizer in (
                    ('adamw', 'AdamW'),
                    ('lars', 'LARS'),
                    ('soap', 'SOAP'),
                )
                if tag in self.tags
            ),
            'SGD',
        )


make_case = lru_cache(None)(Case)


@pytest.fixture(params=FILES, ids=lambda file: file[:-3])
def case(request):
    case = make_case(request.param)
    init_default_scope(case.cfg.default_scope)
    return case


# -- the set of configs


def grid(folder, model, backbone, length, batch_sizes, methods):
    """Names over 16 images per GPU; ``length`` may depend on the batch."""
    for batch_size in batch_sizes:
        for method in methods:
            epochs = length if isinstance(length, str) else length[batch_size]
            data = 'ade20k-512x512' if folder == 'sem_fpn' else 'coco'
            yield (
                f'{folder}/{model}_{backbone}_{batch_size // 16}xb16'
                f'{method and "-" + method}-{epochs}_{data}.py'
            )


def megdet():
    """Table 3 of MegDet: batch size, BN size, GPUs."""
    normal = [(16, 0, 8), (16, 2, 8), (64, 64, 8), (64, 16, 32)]
    normal += [(128, 16, 64)]
    both = [(16, 16, 8), (32, 32, 8), (64, 32, 16), (128, 32, 32)]
    both += [(256, 32, 64), (256, 16, 128)]
    for epochs, rows in ((11, normal + both), (18, both)):
        for batch_size, bn_size, gpus in rows:
            norm = f'-cgbn{bn_size}' if bn_size else ''
            yield (
                f'megdet/faster-rcnn_r50_fpn_{gpus}xb{batch_size // gpus}'
                f'{norm}-{epochs}e_coco.py'
            )


def test_every_recipe_has_its_config_and_no_other():
    coco = (32, 256, 512, 1024)
    sgd = ('', 'agvm')
    align = 'faster_rcnn', 'faster-rcnn-align', 'r50_fpn', '16e'
    ade_length = {32: '160k', 512: '10k', 1024: '5k', 2048: '2500it'}
    adam = ('adamw', 'agvm-adamw')
    mask_align = 'mask_rcnn', 'mask-rcnn-align', 'r50_fpn', '16e'
    variants = ['measure', '10rois-measure', '10rois-fixed-head-measure']
    expected = [
        *grid('faster_rcnn', 'faster-rcnn', 'r50_fpn', '16e', coco, sgd),
        *grid(
            *('faster_rcnn', 'faster-rcnn', 'r50_fpn', '12e', (*coco, 1536)),
            (*adam, 'lamb', 'pmd-lamb'),
        ),
        *grid(
            *('faster_rcnn', 'faster-rcnn', 'r50_fpn', '12e', coco[1:]),
            ('soap', 'agvm-soap'),
        ),
        *grid('faster_rcnn', 'faster-rcnn', 'swin-t_fpn', '12e', coco, adam),
        *grid(*align, (32, 256, 512), ('',)),
        *grid(*align, (256, 512), ('agvm',)),
        *grid(
            *('mask_rcnn', 'mask-rcnn', 'r50_fpn', '14e', coco),
            (*sgd, 'lars'),
        ),
        *grid(*mask_align, (32, 256, 512), ('',)),
        *grid(*mask_align, (256, 512), ('agvm',)),
        *grid('retinanet', 'retinanet', 'r50_fpn', '14e', coco, sgd),
        *grid(
            *('retinanet', 'retinanet', 'r18_fpn', '14e'),
            *((32, 4096, 10240), sgd),
        ),
        *grid('panoptic_fpn', 'panoptic-fpn', 'r50_fpn', '14e', coco, sgd),
        *grid('sem_fpn', 'fpn', 'r50', ade_length, ade_length, sgd),
        *megdet(),
        *grid(
            *('ablations', 'faster-rcnn', 'r50_fpn', '16e', (32, 512)),
            variants[:1],
        ),
        *grid(
            *('ablations', 'faster-rcnn', 'r50', '16e', (32, 512)), variants
        ),
        *grid(
            *('ablations', 'retinanet', 'r50_fpn', '14e', (32, 512)),
            variants[:1],
        ),
        *grid(
            *('ablations', 'retinanet', 'r50', '14e', (32, 512)),
            ('measure', 'fixed-head-measure'),
        ),
    ]
    assert sorted(expected) == FILES


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


# -- numbers


def test_batch_size_and_length_are_those_of_the_name(case):
    cfg = case.cfg
    assert cfg.train_dataloader.batch_size == case.images
    assert cfg.auto_scale_lr.base_batch_size == case.batch_size
    iterations = case.recipe.iterations(case.batch_size)
    number, unit = re.fullmatch(r'(\d+)(\w+)', case.length).groups()
    if unit == 'e':
        assert cfg.train_cfg.max_epochs == case.recipe.epochs == int(number)
    else:
        assert cfg.train_cfg.max_iters == iterations
        assert iterations == int(number) * dict(k=1000, it=1)[unit]


def test_optimizer_follows_from_the_recipe(case):
    optimizer = case.cfg.optim_wrapper.optimizer
    assert optimizer.type == case.optimizer
    assert optimizer.lr == case.recipe.lr(case.batch_size)
    assert optimizer.lr == pytest.approx(
        case.recipe.rule(case.batch_size),
        # the best rate of batch 512; 1.47e-3, which is printed as 1.5e-3
        rel=0.2 if case.align else 0.021,
    )
    decay = 5e-4 if case.folder == 'sem_fpn' else 1e-4
    if case.optimizer in ('AdamW', 'LAMB', 'PMDLAMB', 'SOAP'):
        decay = 0.05
    assert optimizer.weight_decay == decay
    if case.optimizer in ('SGD', 'LARS'):
        assert optimizer.momentum == 0.9
    clip_norm = at(case.recipe.clip_norm, case.batch_size)
    if case.align:
        clip_norm = 1.0
    assert case.cfg.optim_wrapper.get('clip_grad') == (
        None if clip_norm is None else dict(max_norm=clip_norm)
    )


def test_agvm_follows_from_the_recipe(case):
    settings = case.cfg.optim_wrapper
    hooks = [hook.type for hook in case.cfg.get('custom_hooks') or []]
    assert ('AGVMHook' in hooks) == case.agvm
    if not case.agvm:
        assert settings.type == 'OptimWrapper'
        assert 'constructor' not in settings
        return
    assert settings.type == 'AGVMOptimWrapper'
    assert settings.interval == at(case.recipe.interval, case.batch_size)
    assert settings.ema_decay == 0.97
    assert settings.estimator == 'split'
    measure = case.folder == 'ablations'
    assert settings.get('modulate', True) != measure
    assert settings.begin == (
        0 if measure else case.recipe.begin(case.batch_size)
    )
    low, high = settings.get('ratio_range', (0.1, 10.0))
    if case.align:
        assert (low**2, high**2) == pytest.approx((0.5, 10))
    else:
        assert (low, high) == (0.1, 10.0)
    assert settings.get('eps', 1e-6) == 1e-6
    # every measurement is in the log, with every update an iteration
    assert case.cfg.default_hooks.logger.interval == settings.interval


def test_official_clipping_is_around_the_end_of_warmup(case):
    windows = [
        (hook.begin, hook.end)
        for hook in case.cfg.get('custom_hooks') or []
        if hook.type == 'ClipGradWindowHook'
    ]
    assert windows == (
        [case.recipe.clip_window(case.batch_size)] if case.align else []
    )


def expected_lr(case, iteration):
    """The learning rate by the recipe, written apart from MMEngine's."""
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


LR_FACTORS = {}


def lr_factors(cfg, epoch, points):
    """The rate at some iterations, over the first, by MMEngine's schedulers.

    All steps of the training are taken, as the Runner takes them; configs
    that share a schedule share the work.
    """
    key = json.dumps([cfg.param_scheduler, epoch, points])
    if key in LR_FACTORS:
        return LR_FACTORS[key]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedulers = [
        PARAM_SCHEDULERS.build(
            deepcopy(scheduler), default_args=dict(optimizer=optimizer)
        )
        for scheduler in cfg.param_scheduler
    ]
    by_iteration = [s for s in schedulers if not s.by_epoch]
    by_epoch = [s for s in schedulers if s.by_epoch]
    factors = []
    for iteration in range(points[-1] + 1):
        if iteration in points:
            factors.append(optimizer.param_groups[0]['lr'])
        for scheduler in by_iteration:
            scheduler.step()
        if (iteration + 1) % epoch == 0:
            for scheduler in by_epoch:
                scheduler.step()
    LR_FACTORS[key] = factors
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
    points = sorted(points)
    lr = case.cfg.optim_wrapper.optimizer.lr
    factors = lr_factors(case.cfg, recipe.epoch(batch_size), points)
    assert [lr * factor for factor in factors] == pytest.approx(
        [expected_lr(case, iteration) for iteration in points],
        rel=1e-6,
        abs=1e-12,
    )


# -- built for real

BUILT = {}


def missing(case):
    """What other parts of the project are to register; None if it is there."""
    norm = case.cfg.model.backbone.get('norm_cfg', {}).get('type', 'BN')
    if norm == 'CGBN' and MODELS.get(norm) is None:
        return norm
    if OPTIMIZERS.get(case.optimizer) is None:
        return case.optimizer
    return None


def build_model(cfg):
    """The model of a config at full width; its weights are not loaded."""
    key = json.dumps(cfg.model, sort_keys=True)
    if key not in BUILT:
        BUILT[key] = MODELS.build(deepcopy(cfg.model))
    return BUILT[key]


def test_config_is_built(case):
    if missing(case):
        pytest.skip(f'{missing(case)} is not registered')
    cfg = case.cfg
    model = build_model(cfg)
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
        assert {n for g in groups for n in g['param_names']} == trainable
    if 'fixed' in case.tags:
        assert {g['module'] for g in groups if g['lr'] == 0} == {modules[-1]}
    for scheduler in cfg.param_scheduler:
        PARAM_SCHEDULERS.build(
            deepcopy(scheduler), default_args=dict(optimizer=wrapper)
        )
    VISUALIZERS.build(dict(cfg.visualizer, name=case.file))  # a hook asks
    custom_hooks = cfg.get('custom_hooks') or []
    for hook in [*cfg.default_hooks.values(), *custom_hooks]:
        HOOKS.build(deepcopy(hook))
    for transform in cfg.train_dataloader.dataset.pipeline:
        TRANSFORMS.build(deepcopy(transform))
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
            TRANSFORMS.build(deepcopy(transform))
    if case.model == 'panoptic-fpn':
        assert cfg.val_cfg is cfg.val_dataloader is cfg.val_evaluator is None
        assert cfg.test_evaluator.type == 'CocoPanopticMetric'
    else:
        assert cfg.val_evaluator == cfg.test_evaluator


@pytest.mark.parametrize('batch_size', [32, 512])
def test_ablations_change_what_they_say(batch_size):
    def ablation(tag):
        return Config.fromfile(
            CONFIGS / f'ablations/faster-rcnn_{tag}-16e_coco.py'
        )

    gpus = batch_size // 16
    proposals = [
        ablation(f'r50{tag}').model.train_cfg.rcnn.sampler.num
        for tag in (
            f'_fpn_{gpus}xb16-measure',
            f'_{gpus}xb16-measure',
            f'_{gpus}xb16-10rois-measure',
            f'_{gpus}xb16-10rois-fixed-head-measure',
        )
    ]
    assert proposals == [512, 512, 10, 10]


def test_align_models_differ_from_mmdets():
    init_default_scope('mmdet')
    for folder in ('faster_rcnn', 'mask_rcnn'):
        stem = folder.replace('_', '-')
        cfg = Config.fromfile(
            CONFIGS / f'{folder}/{stem}-align_r50_fpn_2xb16-16e_coco.py'
        )
        model = build_model(cfg)
        assert model.rpn_head.rpn_cls.out_channels == 2 * 3  # softmax
        assert math.isclose(model.rpn_head.loss_bbox.beta, 1 / 9)
        assert model.roi_head.bbox_head.loss_bbox.beta == 1
        extractor = model.roi_head.bbox_roi_extractor
        assert extractor.roi_layers[0].sampling_ratio == 2
        assert cfg.model.train_cfg.rpn_proposal.max_per_img == 2000
        assert cfg.model.test_cfg.rcnn.score_thr == 0


# -- what is written about them

#: The recipe behind each section of a README, and what it reports as
#: baseline and with AGVM, by batch size; tables of the project page, the
#: reading note and the official code.
SECTIONS = {
    ('faster_rcnn', 'SGD'): (
        'faster_rcnn',
        {
            32: '36.8 36.8',
            256: '36.1 36.7',
            512: '35.3 36.7',
            1024: '34.2 35.4',
        },
    ),
    ('faster_rcnn', 'AdamW'): (
        'faster_rcnn/adamw',
        {
            32: '- 37.1',
            256: '- 37.2',
            512: '- 36.8',
            1024: '- 37.0',
            1536: '35.9 36.6',
        },
    ),
    ('faster_rcnn', 'LAMB'): (
        'faster_rcnn/lamb',
        {**dict.fromkeys((32, 256, 512, 1024), '- -'), 1536: '33.2 -'},
    ),
    ('faster_rcnn', 'SOAP'): (
        'faster_rcnn/soap',
        dict.fromkeys((256, 512, 1024), '- -'),
    ),
    ('faster_rcnn', 'Swin-T'): (
        'faster_rcnn/swin',
        dict.fromkeys((32, 256, 512, 1024), '- -'),
    ),
    ('faster_rcnn', 'Official code'): (
        'faster_rcnn/align',
        {32: '37.1 -', 256: '36.7 37.1', 512: '36.2 36.8'},
    ),
    ('mask_rcnn', 'SGD'): (
        'mask_rcnn',
        {
            32: '33.9 33.9',
            256: '33.7 34.1',
            512: '33.1 33.9',
            1024: 'NaN 32.6',
        },
    ),
    ('mask_rcnn', 'LARS'): (
        'mask_rcnn/lars',
        {32: '34.0 -', 256: '32.0 -', 512: '30.4 -', 1024: '25.1 -'},
    ),
    ('mask_rcnn', 'Official code'): (
        'mask_rcnn/align',
        {32: '34.8 -', 256: '34.4 35.0', 512: '33.9 34.6'},
    ),
    ('retinanet', 'R50'): (
        'retinanet',
        dict.fromkeys((32, 256, 512, 1024), '- -'),
    ),
    ('retinanet', 'R18'): (
        'retinanet',
        {32: '31.4 32.8', 4096: '23.5 28.7', 10240: 'NaN 26.7'},
    ),
    ('panoptic_fpn', 'SGD'): (
        'panoptic_fpn',
        {
            32: '38.9 38.9',
            256: '39.2 39.3',
            512: '38.7 39.5',
            1024: 'NaN 38.8',
        },
    ),
    ('sem_fpn', 'SGD'): (
        'sem_fpn',
        {
            32: '37.5 37.5',
            512: '36.7 37.3',
            1024: '36.4 37.3',
            2048: '36.2 37.0',
        },
    ),
    # MegDet's table 3, in its order: BN size, GPUs, AP
    ('megdet', 'Normal'): (
        'megdet',
        '0 8 36.2, 2 8 31.0, 16 8 37.0, 32 8 37.3, 64 8 35.3, 32 16 37.1, '
        '16 32 37.1, 32 32 37.1, 16 64 37.0, 32 64 37.1, 16 128 37.1',
    ),
    ('megdet', 'Long'): (
        'megdet/long',
        '16 8 37.7, 32 8 37.8, 32 16 37.6, 32 32 37.6, 32 64 37.7, '
        '16 128 37.7',
    ),
}


def readme_tables(folder):
    """Rows of every table of recipes in a README, by its heading."""
    tables = {}
    heading = None
    for line in (CONFIGS / folder / 'README.md').read_text().splitlines():
        if line.startswith('#'):
            heading = line.lstrip('# ')
        elif re.match(r'\| \d', line):
            cells = [cell.strip() for cell in line.strip('|').split('|')]
            tables.setdefault(heading, []).append(cells)
    return tables


def assert_row_follows(recipe, batch_size, lr, length, warmup):
    assert float(lr) == recipe.lr(batch_size)
    iterations = recipe.iterations(batch_size)
    assert length == str(recipe.epochs or f'{iterations} iterations')
    end = recipe.warmup_end(batch_size)
    if recipe.warmup_by_epoch:
        epochs = at(recipe.warmup, batch_size)
        unit = 'epoch' if epochs == 1 else 'epochs'
        assert warmup == f'{epochs} {unit} ({end} iterations)'
    else:
        assert warmup == f'{end} iterations'


@pytest.mark.parametrize('folder', [f for f in FOLDERS if f != 'ablations'])
def test_readme_agrees_with_the_recipes(folder):
    tables = readme_tables(folder)
    assert set(tables) == {h for f, h in SECTIONS if f == folder}
    for heading, rows in tables.items():
        recipe_name, reported = SECTIONS[folder, heading]
        for batch_size, *schedule in (row[:4] for row in rows):
            assert_row_follows(
                RECIPES[recipe_name], int(batch_size), *schedule
            )
        assert {row[-1] for row in rows} == {'not run'}
        if isinstance(reported, str):
            assert ', '.join(' '.join(row[4:7]) for row in rows) == reported
        else:
            assert {
                int(row[0]): ' '.join(row[4:6]) for row in rows
            } == reported


def test_readme_of_ablations_agrees_with_the_recipes():
    text = (CONFIGS / 'ablations/README.md').read_text()
    rows = re.findall(
        r'^\| (\S* ?R-CNN|RetinaNet) \| (\d+) \| (.*) \| (.*) \| (.*) \| '
        r'not run \|$',
        text,
        re.MULTILINE,
    )
    assert len(rows) == 4
    for model, batch_size, *schedule in rows:
        folder = model.lower().replace('r-cnn', 'rcnn').replace(' ', '_')
        assert_row_follows(RECIPES[folder], int(batch_size), *schedule)
    # every pattern names configs, and together they name all
    patterns = re.findall(r'`(\S+\*\S+\.py)`', text)
    found = {
        file.name
        for pattern in patterns
        for file in (CONFIGS / 'ablations').glob(pattern)
    }
    assert {f'ablations/{name}' for name in found} == {
        file for file in FILES if file.startswith('ablations/')
    }


def test_model_index_lists_every_config():
    root = CONFIGS.parent
    index = load(root / 'model-index.yml')['Import']
    assert index == [f'configs/{folder}/metafile.yml' for folder in FOLDERS]
    listed = []
    for file in index:
        content = load(root / file)
        (collection,) = content['Collections']
        assert (root / collection['README']).exists()
        for model in content['Models']:
            assert model['In Collection'] == collection['Name']
            config = Path(model['Config'])
            assert model['Name'] == config.stem
            listed.append(config.relative_to('configs').as_posix())
            case = make_case(listed[-1])
            metadata = model['Metadata']
            assert metadata['Batch Size'] == case.batch_size
            assert metadata.get('Epochs') == case.recipe.epochs
            if case.recipe.epochs is None:
                assert metadata['Iterations'] == case.recipe.iterations(
                    case.batch_size
                )
            # results are listed when a log backs them
            assert 'Results' not in model
    assert sorted(listed) == FILES
