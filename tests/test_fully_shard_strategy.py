"""FSDP2 as a strategy: the same training, checkpoints and logs as DDP's."""

import json
import os

import pytest
import torch
import torch.distributed as dist
from mmengine.registry import MODELS
from ranks import run_ranks
from sharded_configs import sharded_cfg
from torch import nn
from toy_runner import ToyModel

from mmagvm.engine.fully_shard_strategy import (
    FullyShardStrategy,
    refuse_scalars,
    whole,
)
from mmagvm.engine.shard_units import find_units
from mmagvm.launch.runner import build_runner

CLIP = dict(clip_grad=dict(max_norm=0.5))
PLAIN = dict(
    type='OptimWrapper', optimizer=dict(type='SGD', lr=0.05, momentum=0.9)
)
CHECKPOINTED = dict(strategy=dict(activation_checkpointing='backbone'))
#: Settings of a run, and of the one that it must equal.
PAIRS = {
    'SGD': (dict(), dict(sharded=False)),
    'AdamW': (
        dict(optimizer='AdamW'),
        dict(optimizer='AdamW', sharded=False),
    ),
    'clipped': (CLIP, dict(CLIP, sharded=False)),
    'accumulated': (
        dict(accumulative_counts=2),
        dict(accumulative_counts=2, sharded=False, modulate=False),
    ),
    'plain': (dict(wrapper=PLAIN), dict(wrapper=PLAIN, sharded=False)),
    'checkpointed': (CHECKPOINTED, dict()),
    'one unit less': (dict(units=['neck']), dict()),
}


def load(path):
    return torch.load(path, weights_only=True)  # as what is in it is safe


def run(rank, folder, name, **settings):
    """A training of all ranks, from a checkpoint if one is named."""
    os.environ['LOCAL_RANK'] = str(rank)
    resume = settings.pop('resume', None)
    wrapper = settings.pop('wrapper', None)
    hooks = settings.pop('hooks', [])
    load_from = settings.pop('load_from', None)
    lr = settings.pop('lr', None)
    cfg = sharded_cfg(folder / name, **{'accumulative_counts': 1, **settings})
    cfg.custom_hooks += hooks
    if wrapper is not None:
        cfg.optim_wrapper, cfg.custom_hooks = wrapper, []
    if load_from is not None:
        cfg.load_from = str(load_from)
    if lr is not None:
        cfg.optim_wrapper.optimizer.lr = lr
    if resume is not None:
        cfg.resume, cfg.load_from = True, str(folder / resume)
    runner = build_runner(cfg)
    runner.train()
    return runner


def on_ranks(rank, world_size, folder):
    if world_size == 4:
        first = folder / 'SGD/epoch_1.pth'
        run(rank, folder, 'of four', resume=first)
        run(rank, folder, 'of four, ddp', resume=first, sharded=False)
        run(
            *(rank, folder, 'replicas'),
            resume=first,
            strategy=dict(replicas=2),
        )
        return None
    for name, (ours, other) in PAIRS.items():
        run(rank, folder, name, **ours)
        run(rank, folder, f'{name}, other', **other)
    for name in ('SGD', 'AdamW'):
        ours, other = PAIRS[name]
        first = f'{name}/epoch_1.pth'
        run(rank, folder, f'{name} resumed', resume=first, **ours)
        run(rank, folder, f'{name} as ddp', resume=first, **other)
        first = f'{name}, other/epoch_1.pth'
        run(rank, folder, f'{name} of ddp', resume=first, **ours)
    with pytest.raises(ValueError, match='remove EMAHook'):
        run(rank, folder, 'ema', hooks=[dict(type='EMAHook')])
    with pytest.raises(ValueError, match='replicas=2: 2 ranks'):
        run(rank, folder, 'alone', strategy=dict(replicas=2))
    with pytest.raises(ValueError, match="has 'bone', which matches no"):
        run(rank, folder, 'unit', units='bone')
    if rank == 0:
        other = load(folder / 'SGD/epoch_1.pth')
        other['state_dict']['rpn_head.weight'] = torch.ones(4, 5)
        torch.save(other, folder / 'other.pth')
    dist.barrier()
    runner = run(
        *(rank, folder, 'finetuned'),
        **dict(max_epochs=1, load_from=folder / 'other.pth', lr=0.0),
    )
    state = runner.strategy.model_state_dict()
    return [value is None for value in state.values()]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sharded')
    first, second = run_ranks(2, on_ranks, folder)
    assert not any(first) and all(second)  # only rank 0 keeps whole tensors
    run_ranks(4, on_ranks, folder)
    return folder


def scalars(folder):
    text = next(folder.glob('*/vis_data/scalars.json')).read_text()
    return [json.loads(line) for line in text.splitlines()]


def assert_close(ours, other, exact=False):
    """The model, the optimizer and AGVM of two checkpoints."""
    tolerance = dict(rtol=0, atol=0 if exact else 5e-5)
    assert ours['state_dict'].keys() == other['state_dict'].keys()
    for name, value in ours['state_dict'].items():
        torch.testing.assert_close(
            value, other['state_dict'][name], **tolerance
        )
    mine, its = ours['optimizer'], other['optimizer']
    assert mine.keys() == its.keys()
    assert mine['state'].keys() == its['state'].keys()
    for key, values in mine['state'].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(
                    value, its['state'][key][name], **tolerance
                )
    if 'agvm' in mine:
        assert mine['agvm']['lr_scale'] == pytest.approx(
            its['agvm']['lr_scale'], rel=0 if exact else 1e-4
        )
        assert mine['agvm']['measured'] == its['agvm']['measured'] > 0


@pytest.mark.parametrize('name', [n for n in PAIRS if n != 'accumulated'])
def test_training_and_checkpoint_equal_data_parallel_ones(runs, name):
    ours, other = runs / name, runs / f'{name}, other'
    assert_close(load(ours / 'epoch_2.pth'), load(other / 'epoch_2.pth'))
    for mine, its in zip(scalars(ours), scalars(other)):
        assert mine.keys() - {'memory'} == its.keys() - {'memory'}
        for key in ('loss', 'grad_norm', 'lr'):
            if key in mine:
                assert mine[key] == pytest.approx(its[key], rel=1e-4)


def test_accumulation_measures_every_micro_batch(runs):
    state = load(runs / 'accumulated/epoch_2.pth')['optimizer']['agvm']
    assert state['batch'] == dict(
        ranks=2, images_per_rank=4, accumulative_counts=2, samples=4
    )
    assert state['measured'] == 3  # 4 updates, from the second one


@pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
def test_resuming_is_exact(runs, optimizer):
    resumed = load(runs / f'{optimizer} resumed/epoch_2.pth')
    assert_close(load(runs / optimizer / 'epoch_2.pth'), resumed, exact=True)


@pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
@pytest.mark.parametrize('way', ['as ddp', 'of ddp'])
def test_data_parallel_runs_resume_sharded_ones_and_the_reverse(
    runs, optimizer, way
):
    resumed = load(runs / f'{optimizer} {way}/epoch_2.pth')
    assert_close(load(runs / optimizer / 'epoch_2.pth'), resumed)


@pytest.mark.parametrize('name', ['of four', 'replicas'])
def test_any_number_of_ranks_resumes(runs, name):
    """As data-parallel training on four ranks does, from the same state."""
    assert_close(
        load(runs / name / 'epoch_2.pth'),
        load(runs / 'of four, ddp/epoch_2.pth'),
    )


def test_weights_of_another_shape_stay_as_they_were(runs):
    """And all others are loaded, as for another number of classes."""
    before, after = (
        load(runs / name / 'epoch_1.pth')['state_dict']
        for name in ('SGD', 'finetuned')
    )
    for name, value in after.items():
        if name != 'rpn_head.weight':
            torch.testing.assert_close(value, before[name], msg=name)
    assert after['rpn_head.weight'].shape == (3, 5)
    assert not torch.equal(after['rpn_head.weight'], before['rpn_head.weight'])


def strategy(tmp_path, **settings):
    return FullyShardStrategy(work_dir=str(tmp_path), **settings)


@pytest.mark.parametrize(
    'settings, message',
    [
        (
            dict(mixed_precision=dict(params='bfloat16')),
            r"mixed_precision has \['params'\]: it takes",
        ),
        (
            dict(mixed_precision=dict(param_dtype='bf17')),
            "param_dtype='bf17' is not a type: write one",
        ),
        (
            dict(mixed_precision=dict(reduce_dtype='float16')),
            "write 'float32' or 'bfloat16'",
        ),
        (dict(model_wrapper=dict(type='X')), 'shards the model in place'),
    ],
)
def test_wrong_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        strategy(tmp_path, **settings)


def test_training_on_one_rank_is_refused(tmp_path):
    with pytest.raises(ValueError, match='launch with tools/dist_train.sh'):
        strategy(tmp_path).prepare(
            nn.Linear(2, 2), optim_wrapper=dict(optimizer=dict(type='SGD'))
        )


def test_a_number_as_parameter_is_refused():
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r'scale is a single number'):
        refuse_scalars(model)


def test_states_without_shards_are_kept_whole_or_dropped():
    state = dict(a=torch.ones(2), b=[torch.zeros(1), 3], c=dict(d='text'))
    assert whole(state, True)['b'][1] == 3
    assert whole(state, False) == dict(a=None, b=[None, 3], c=dict(d='text'))


def test_units_are_the_repeated_blocks_of_the_backbone():
    import mmdet.models  # noqa: F401

    model = nn.Module()
    model.backbone = MODELS.build(dict(type='mmdet.ResNet', depth=50))
    model.bbox_head = MODELS.build(
        dict(type='mmdet.RetinaHead', num_classes=3, in_channels=8)
    )
    units = find_units(model)
    assert len(units) == 3 + 4 + 6 + 3
    assert units[0] == 'backbone.layer1.0'
    assert all(unit.startswith('backbone.layer') for unit in units)


def test_units_of_a_transformer():
    import mmdet.models  # noqa: F401

    model = nn.Module()
    model.backbone = MODELS.build(
        dict(type='mmdet.SwinTransformer', depths=(2, 2, 2, 2))
    )
    assert find_units(model) == [
        f'backbone.stages.{stage}.blocks.{block}'
        for stage in range(4)
        for block in range(2)
    ]


def test_units_can_be_listed_inner_ones_first():
    units = find_units(ToyModel(), ['backbone', r'backbone\.\d', 'neck'])
    assert units == ['backbone.0', 'backbone.2', 'backbone', 'neck']


def test_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match='strategy.units=None finds no'):
        find_units(ToyModel())
