"""AGVM without MMEngine: importing it, and a loop of plain PyTorch."""

import contextlib
import dataclasses
import io
import re
from unittest import mock

import pytest
import torch
from commands import ROOT, assert_equal, run
from mmengine.optim import build_optim_wrapper
from oracle import Oracle
from ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from toy import MODULES, make_batch, make_model, train, wrapper_cfg

from mmagvm.core import AGVM, Settings, find_modules, functional, module_groups
from mmagvm.core.grad_variance import pairs

MEASURED = dict(interval=2, ema_decay=0.5)
ALONE = """
import sys
for name in ('mmengine', 'mmcv', 'mmdet', 'mmseg'):
    sys.modules[name] = None  # importing it is an ImportError
import torch
before = {name.partition('.')[0] for name in sys.modules}
import mmagvm.core
after = {name.partition('.')[0] for name in sys.modules}
print('imported', *after - before - sys.stdlib_module_names)
try:
    mmagvm.AGVMHook
except ImportError as error:
    print(error)
print(hasattr(mmagvm, 'nonsense'), mmagvm.__version__)
"""


class Loop:
    """The loop that a user writes, on the toy's stream of batches."""

    def __init__(
        self, optimizer='SGD', accumulation=2, model=None, scale=None, **kwargs
    ):
        options = dict(wrapper_cfg(optimizer)['optimizer'])
        self.model = make_model() if model is None else model
        bare = getattr(self.model, 'module', self.model)
        self.optimizer = getattr(torch.optim, options.pop('type'))(
            module_groups(bare), **options
        )
        self.accumulation = accumulation
        self.max_norm = kwargs.pop('max_norm', None)
        self.agvm = AGVM(
            self.optimizer,
            self.model,
            Settings(**{**MEASURED, **kwargs}),
            accumulation,
        )
        self.scaler = torch.amp.GradScaler(
            'cpu', init_scale=scale or 1.0, enabled=scale is not None
        )

    def train(self, updates, start=0, rank=0, factor=1.0):
        for update in range(start, updates):
            for micro_batch in range(self.accumulation):
                with self.agvm.micro_batch(self.scaler):
                    loss = self.model(make_batch(update, rank, micro_batch))
                    loss = loss * factor / self.accumulation
                    self.scaler.scale(loss).backward()
                done = self.agvm.step(self.scaler, max_norm=self.max_norm)
                assert done == (micro_batch == self.accumulation - 1)
            self.scaler.update()
            self.optimizer.zero_grad()

    def lrs(self):
        return [group['lr'] for group in self.optimizer.param_groups]

    def state(self):
        return dict(
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            agvm=self.agvm.state_dict(),
            scaler=self.scaler.state_dict(),
        )

    def load(self, state):
        self.model.load_state_dict(state['model'])
        self.optimizer.load_state_dict(state['optimizer'])
        self.agvm.load_state_dict(state['agvm'])
        self.scaler.load_state_dict(state['scaler'])


def test_needs_nothing_but_torch():
    imported, error, rest = run('python', '-c', ALONE).splitlines()
    assert imported == 'imported mmagvm'
    assert 'mmagvm.AGVMHook needs MMEngine' in error
    assert "'mmagvm[openmmlab]'" in error and "'mmagvm[onedl]'" in error
    assert rest.startswith('False ')


# -- settings


@pytest.mark.parametrize(
    'wrong, message',
    [
        (dict(interval=0), 'interval=0 .*write 1 or more'),
        (dict(ema_decay=1), 'ema_decay=1 .*from 0 to below 1'),
        (dict(begin=5, end=5), 'end=5 .*after begin=5'),
        (dict(estimator='guess'), "estimator='guess' .*'split' or 'pairs'"),
        (dict(ratio_range=(2, 3)), 'ratio_range=.*around 1'),
        (dict(modulate=1), 'modulate=1 .*True or False'),
    ],
)
def test_wrong_setting_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)


def test_settings_cannot_be_misspelt_or_changed():
    with pytest.raises(TypeError, match='intervall'):
        Settings(intervall=5)
    settings = Settings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.interval = 0
    assert dataclasses.replace(settings, interval=5).interval == 5
    with pytest.raises(ValueError, match='interval=0'):
        dataclasses.replace(settings, interval=0)


# -- what cannot work is refused at once


def test_groups_of_another_kind_are_refused():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r'module_groups\(model\)'):
        AGVM(optimizer, model, accumulation=2)


def test_a_single_sample_is_refused():
    with pytest.raises(ValueError, match='only one part'):
        Loop(accumulation=1)


def test_modules_are_found_and_may_be_named():
    model = make_model()
    assert [*find_modules(model), 'others'] == list(MODULES)
    groups = module_groups(model, ['roi_head', 'backbone.2', 'backbone'])
    assert [(g['module'], len(g['params'])) for g in groups] == [
        ('roi_head', 4),
        ('backbone.2', 2),
        ('backbone', 2),
        ('others', 5),
    ]
    with pytest.raises(ValueError, match=r"\['head'\] have no trainable"):
        module_groups(model, ['backbone', 'head'])


# -- training


def check_against_oracle(loop, ranks=1, updates=6, **kwargs):
    """The multipliers and weights by brute force."""
    settings = dict(MEASURED, estimator=loop.agvm.settings.estimator)
    bare = getattr(loop.model, 'module', loop.model)
    oracle = Oracle(
        make_model(),
        make_batch,
        ranks,
        loop.accumulation,
        **settings,
        **kwargs,
    )
    for _ in range(updates):
        oracle.update()
    assert loop.agvm.update == updates
    assert loop.agvm.modulator.lr_scale == pytest.approx(oracle.mu, rel=1e-6)
    assert max(abs(mu - 1) for mu in oracle.mu.values()) > 0.05
    for name, weight in oracle.model.state_dict().items():
        torch.testing.assert_close(
            bare.state_dict()[name], weight, rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
@pytest.mark.parametrize('estimator', ['split', 'pairs'])
@pytest.mark.parametrize('accumulation, scale', [(2, None), (3, 2.0**14)])
def test_plain_loop_equals_the_oracle(
    optimizer, estimator, accumulation, scale
):
    loop = Loop(optimizer, accumulation, scale=scale, estimator=estimator)
    before = loop.lrs()
    loop.train(6)
    assert loop.lrs() == before
    check_against_oracle(loop, optimizer=optimizer)


def train_ranks(rank, world_size):
    run_documented_lines(rank)
    for optimizer in ('SGD', 'AdamW'):
        for estimator in ('split', 'pairs'):
            model = DistributedDataParallel(make_model(), bucket_cap_mb=2e-4)
            loop = Loop(optimizer, model=model, estimator=estimator)
            loop.train(6, rank=rank)
            check_against_oracle(loop, world_size, optimizer=optimizer)


def run_documented_lines(rank):
    """The loop of docs/pytorch.md, with its changes."""
    text = (ROOT / 'docs/pytorch.md').read_text()
    diff = re.search(r'```diff\n(.*?)```', text, re.S)[1].splitlines(True)
    names = dict(
        model=make_model(),
        SGD=torch.optim.SGD,
        DistributedDataParallel=DistributedDataParallel,
        loader=[make_batch(update, rank, 0) for update in range(3)],
        scheduler=mock.Mock(),
    )
    exec(''.join(line[1:] for line in diff if line[0] != '-'), names)
    assert names['agvm'].update == names['scheduler'].step.call_count == 3


def test_plain_loop_on_two_ranks_equals_the_oracle():
    run_ranks(2, train_ranks)


@pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
@pytest.mark.parametrize('estimator', ['split', 'pairs'])
@pytest.mark.parametrize('scale', [None, 2.0**14])
def test_clipping_is_that_of_the_wrapper(optimizer, estimator, scale):
    """A loss scale that is a power of two changes no digit."""
    loop = Loop(optimizer, max_norm=0.05, scale=scale, estimator=estimator)
    loop.train(6)
    model = make_model()
    cfg = wrapper_cfg(
        optimizer,
        accumulative_counts=2,
        estimator=estimator,
        clip_grad=dict(max_norm=0.05),
        **MEASURED,
    )
    wrapper = build_optim_wrapper(model, cfg)
    train(model, wrapper, 6, accumulation=2)
    assert loop.agvm.state_dict() == wrapper.agvm.state_dict()
    assert_equal(loop.model.state_dict(), model.state_dict())
    unclipped = Loop(optimizer, estimator=estimator)
    unclipped.train(6)
    assert not torch.equal(loop.model.neck.bias, unclipped.model.neck.bias)


@pytest.mark.parametrize('max_norm', [None, 0.05])
def test_update_that_the_scaler_skips_does_not_count(max_norm):
    loop = Loop(scale=2.0**14, max_norm=max_norm)
    loop.train(2)
    weights = {k: v.clone() for k, v in loop.model.state_dict().items()}
    mu, lrs = dict(loop.agvm.modulator.lr_scale), loop.lrs()
    loop.train(3, start=2, factor=float('inf'))
    assert loop.agvm.update == 2
    assert loop.agvm.scalars()['agvm/skipped'] == 1
    assert loop.scaler.get_scale() == 2.0**13
    assert (loop.agvm.modulator.lr_scale, loop.lrs()) == (mu, lrs)
    assert_equal(dict(loop.model.state_dict()), weights)
    # the measurement that was due comes with the next update
    loop.train(6, start=2)
    assert [update for update, _ in loop.agvm.modulator.history] == [0, 2, 4]
    assert loop.agvm.update == 6
    assert loop.lrs() == lrs


@pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
@pytest.mark.parametrize('estimator', ['split', 'pairs'])
def test_saved_run_goes_on_bit_for_bit(optimizer, estimator):
    def build():
        return Loop(
            optimizer,
            estimator=estimator,
            max_norm=0.5,
            scale=2.0**14,
        )

    straight, first, second = build(), build(), build()
    straight.train(7)
    first.train(3)
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second.load(torch.load(file, weights_only=True))
    assert second.agvm.update == 3
    second.train(7, start=3)
    assert_equal(second.state(), straight.state())


# -- how often gradients are added up


def toy_wrapper(model, **kwargs):
    cfg = wrapper_cfg(**{**MEASURED, 'accumulative_counts': 2, **kwargs})
    return build_optim_wrapper(model, cfg)


def test_two_backward_passes_of_a_forward_pass_are_refused():
    model = make_model()
    wrapper = toy_wrapper(model, begin=5)
    with wrapper.optim_context(model):
        losses = [model(make_batch(0, 0, k)) for k in range(2)]
    wrapper.update_params(losses[0])
    with pytest.raises(
        ValueError, match='2 backward passes and 1 .*add up the losses'
    ):
        wrapper.update_params(losses[1])


@pytest.mark.parametrize('counts, done', [(2, 3), (3, 2), (2, 1)])
def test_another_number_of_backward_passes_is_refused(counts, done):
    model = make_model()
    wrapper = toy_wrapper(model, accumulative_counts=counts)
    for micro_batch in range(done):
        with wrapper.optim_context(model):
            loss = model(make_batch(0, 0, micro_batch))
        wrapper.backward(loss)
    with pytest.raises(
        ValueError,
        match=f'{done} backward .*counts={counts}: .*counts={done} in',
    ):
        wrapper.step()


def test_gradients_that_were_thrown_away_do_not_count():
    model = make_model()
    wrapper = toy_wrapper(model)
    for update in range(4):
        for set_to_none in (True, False, None):
            for micro_batch in range(2):
                with wrapper.optim_context(model):
                    loss = model(make_batch(update, 0, micro_batch))
                wrapper.backward(loss)
            if set_to_none is not None:  # a batch that was not wanted
                wrapper.zero_grad(set_to_none=set_to_none)
        wrapper.step()
        wrapper.zero_grad()
    assert [update for update, _ in wrapper.modulator.history] == [0, 2]
    assert wrapper.agvm.why_missed() == ''


def test_update_of_an_interrupted_accumulation_is_no_error():
    model = make_model()
    wrapper = toy_wrapper(model)
    wrapper.initialize_count_status(model, 1, 8)  # resumed inside of it
    for iteration in range(1, 8):
        with wrapper.optim_context(model):
            loss = model(make_batch(iteration, 0, 0))
        wrapper.update_params(loss)
    assert wrapper.agvm.update == 4
    assert [update for update, _ in wrapper.modulator.history] == [2]


def test_another_number_of_backward_passes_is_reported_later(caplog):
    model = make_model()
    wrapper = toy_wrapper(model, interval=1)
    train(model, wrapper, 10, accumulation=2)
    for micro_batch in range(3):
        with wrapper.optim_context(model):
            loss = model(make_batch(10, 0, micro_batch))
        wrapper.backward(loss)
    with mock.patch('mmagvm.core.missed.logger') as logger:
        wrapper.step()
    assert 'due and is not measured' in logger.warning.call_args[0][0]
    assert 'more or fewer backward passes' in wrapper.agvm.why_missed()
    assert wrapper.modulator.measured == 10


# -- a device without float64


class NoDouble(TorchDispatchMode):
    """No tensor is made in float64, except on the CPU."""

    transferred, transfers = False, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.transferred:
            for leaf in tree_flatten(out)[0]:
                if isinstance(leaf, torch.Tensor):
                    assert leaf.dtype != torch.float64, func
        return out


@pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
@pytest.mark.parametrize('estimator', ['split', 'pairs'])
def test_device_without_float64_is_measured(optimizer, estimator):
    batches = [make_batch(i, 0, 0).float() for i in range(12)]

    def history():
        model = make_model().float()
        loop = Loop(optimizer, model=model, estimator=estimator)
        mode.transferred = False
        with mode:
            for batch in batches:
                with loop.agvm.micro_batch():
                    model(batch).backward()
                if loop.agvm.step(max_norm=0.5):
                    loop.optimizer.zero_grad()
        return loop.agvm.modulator.history

    mode = contextlib.nullcontext()
    expected = history()
    mode = NoDouble()
    to_cpu = torch.Tensor.cpu

    def transfer(tensor):
        mode.transferred, mode.transfers = True, mode.transfers + 1
        return to_cpu(tensor)

    begin = AGVM.begin_update

    def begin_update(agvm, *args):
        mode.transferred = False
        return begin(agvm, *args)

    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (functional, 'sum_type', lambda device: torch.float32),
            (torch.Tensor, 'cpu', transfer),
            (AGVM, 'begin_update', begin_update),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        found = history()
    assert len(found) == len(expected) > 1
    assert mode.transfers == len(found)
    for (_, phis), (_, exact) in zip(found, expected):
        assert phis == pytest.approx(exact, rel=1e-3, abs=1e-5)


def test_all_that_is_logged():
    loop = Loop()
    loop.train(3)
    scalars = loop.agvm.scalars()
    assert set(scalars) == {
        *(
            f'agvm_{quantity}/{module}'
            for quantity in ('variance', 'lr_scale', 'noise_scale')
            for module in MODULES
        ),
        'agvm/measured',
        'agvm/skipped',
    }
    assert scalars['agvm/measured'] == 2
    noise = scalars['agvm_noise_scale/neck']
    loop.agvm.set_batch(
        dict(ranks=1, images_per_rank=4, accumulative_counts=2)
    )
    assert loop.agvm.scalars()['agvm_noise_scale/neck'] == 4 * noise
    loop.agvm.modulator._signal['neck'] = -1.0  # as noise may have it
    assert loop.agvm.noise_scale['neck'] == float('inf')
    assert set(scalars) - set(loop.agvm.scalars()) == {'agvm_noise_scale/neck'}
    loop.agvm.set_batch(
        dict(ranks=1, images_per_rank=None, accumulative_counts=2)
    )
    assert loop.agvm.noise_scale == {}


def test_steps_that_are_not_measured_are_reported(log):
    loop = Loop(begin=1)
    loop.train(2)
    assert loop.agvm.why_missed() == ''
    for _ in range(2):  # forgets agvm.micro_batch
        loop.model(make_batch(0, 0, 0)).backward()
        with loop.agvm.scaled_step():
            loop.optimizer.step()
    loop.optimizer.step()
    lines = [line for line in log if 'inside of agvm.micro_batch()' in line]
    assert len(lines) == 1 and 'update 3 was due and is not' in lines[0]
    assert 'a step is neither measured nor modulated' in log[-1]
    reasons = loop.agvm.why_missed().split('; ')
    assert [reason[-9:] for reason in reasons] == ['(1 times)'] * 2
    assert loop.agvm.modulator.measured == 1


def test_due_updates_are_those_that_are_due():
    for begin, end, interval in ((0, None, 1), (3, 20, 4), (5, 6, 9)):
        settings = Settings(begin=begin, end=end, interval=interval)
        for first, last in ((0, 30), (4, 9), (7, 7), (25, 30), (9, 3)):
            assert list(settings.due_between(first, last)) == [
                update
                for update in range(first, last)
                if settings.is_due(update)
            ]


def test_what_hooks_compute_is_marked_as_read(tmp_path, monkeypatch):
    """On CUDA a hook allocates on another stream than the measuring one."""
    marked = []
    monkeypatch.setattr(
        pairs, 'read_here', lambda tensors: marked.extend(tensors)
    )
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1
    )
    try:
        model = torch.nn.parallel.DistributedDataParallel(
            torch.nn.Linear(3, 2)
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        estimator = pairs.PairsRanks(optimizer, [0], model)
        estimator.start()
        estimator.before_last_backward()
        model(torch.ones(1, 3)).sum().backward()
        estimator.measure()
    finally:
        torch.distributed.destroy_process_group()
    # the squared norms of the weight, and of the bias
    assert sorted(map(float, marked)) == pytest.approx([2, 6])


def test_options_are_for_all_parameters_of_the_model(caplog):
    model = make_model()
    bias = model.neck.bias
    (group,) = module_groups(model, ['neck'], [dict(params=bias, lr=1.0)])
    assert group['params'] == [bias]
    assert 'are in no parameter group' in caplog.text
    with pytest.raises(ValueError, match='not in the model'):
        module_groups(
            model, groups=[dict(params=torch.nn.Linear(2, 2).weight)]
        )


def test_step_without_micro_batch_or_with_another_scaler_is_refused():
    loop = Loop(accumulation=2, scale=2.0)
    with pytest.raises(RuntimeError, match='without a micro-batch'):
        loop.agvm.step(loop.scaler)
    with loop.agvm.micro_batch(loop.scaler):
        loss = loop.model(make_batch(0, 0, 0))
        loop.scaler.scale(loss).backward()
    with pytest.raises(RuntimeError, match='different scalers'):
        loop.agvm.step()


@pytest.mark.parametrize('estimator', ['split', 'pairs'])
def test_update_that_fails_is_abandoned(estimator):
    """As if memory runs out in an update and the loop continues."""
    loop, plain = (
        Loop(accumulation=2, estimator=estimator, interval=1) for _ in range(2)
    )
    for _ in range(2):
        with (
            pytest.raises(MemoryError),
            loop.agvm.micro_batch(loop.scaler),
        ):
            loop.model(make_batch(7, 0, 0)).backward()
            raise MemoryError
        with loop.agvm.micro_batch(loop.scaler):
            loop.model(make_batch(8, 0, 0)).backward()
        with (
            pytest.raises(MemoryError),
            loop.agvm.micro_batch(loop.scaler),
        ):
            raise MemoryError
        loop.optimizer.zero_grad()
    loop.train(3)
    plain.train(3)
    assert_equal(loop.state(), plain.state())


def test_parameters_that_are_added_later_are_refused():
    loop = Loop()
    loop.train(1)
    extra = torch.nn.Parameter(torch.zeros(2))
    loop.optimizer.add_param_group(dict(params=[extra], param_names=['extra']))
    with pytest.raises(RuntimeError, match='add all parameters before'):
        loop.train(1)


def test_batch_that_is_set_before_loading_counts():
    loop = Loop(estimator='pairs', interval=1)
    loop.agvm.set_batch(
        dict(ranks=1, images_per_rank=2, accumulative_counts=2)
    )
    loop.train(3)
    before = loop.agvm.noise_scale
    other = Loop(estimator='pairs', interval=1)
    other.agvm.set_batch(
        dict(ranks=1, images_per_rank=4, accumulative_counts=2)
    )
    other.agvm.load_state_dict(loop.agvm.state_dict())
    assert other.agvm.batch['images_per_rank'] == 4
    assert other.agvm.noise_scale == pytest.approx(before)
