"""What ranks train in tests/test_ranks.py, all in one start of processes."""

import contextlib
import functools
import logging
import math

import pytest
import torch
from mmengine.model import MMSeparateDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from test_matrix_optimizers import share_work
from test_preconditioner import measured_and_expected
from torch.distributed.algorithms.ddp_comm_hooks import (
    debugging_hooks,
    default_hooks,
    powerSGD_hook,
)
from torch.nn.parallel import DistributedDataParallel
from toy import make_batch, make_model, train, wrapper_cfg

import mmagvm  # noqa: F401

UPDATES = 6
SETTINGS = dict(interval=2, ema_decay=0.5, begin=1)
#: estimator, optimizer, accumulation, does a head idle on some ranks
SCENARIOS = [
    (estimator, *rest)
    for estimator in ('split', 'pairs')
    for rest in (
        ('SGD', 1, False),
        ('AdamW', 1, False),
        ('SGD', 2, False),
        ('AdamW', 3, False),
        ('SGD', 1, True),
        ('AdamW', 2, True),
    )
]
#: This project's additions to the rule, while the learning rate drops.
OWN_RULES = dict(
    interval=1,
    ema_decay=0.75,
    restart_at_lr_drop=True,
    bound_by_grad_norm=True,
)
DROP = 3  # the update, and
FACTOR = 0.1
OWN_SCENARIOS = [
    ('pairs', 'SGD', 1, False, True),
    ('pairs', 'AdamW', 2, False, True),
    ('pairs', 'SGD', 2, True, True),
]
#: Measured in the optimizer's own metric.
PRECONDITIONED = [
    (optimizer, estimator)
    for optimizer in ('AdamW', 'SOAP', 'Muon')
    for estimator in ('split', 'pairs')
]


def parallel(model, **kwargs):
    # buckets of a few parameters: several of them, rebuilt after one backward
    return DistributedDataParallel(model, bucket_cap_mb=2e-4, **kwargs)


def settings_of(estimator, optimizer, own_rules=False):
    """AdamW from the first update, when it has no state yet."""
    begin = 0 if optimizer == 'AdamW' else 1
    settings = dict(SETTINGS, begin=begin, estimator=estimator)
    return dict(settings, **OWN_RULES) if own_rules else settings


def train_rank(
    rank,
    world_size,
    estimator,
    optimizer,
    accumulation,
    idle_head,
    own_rules=False,
):
    model = make_model(idle_head=idle_head)
    settings = settings_of(estimator, optimizer, own_rules)
    wrapper = build_optim_wrapper(
        model,
        wrapper_cfg(optimizer, accumulative_counts=accumulation, **settings),
    )
    ddp = parallel(model, find_unused_parameters=idle_head)
    train(ddp, wrapper, DROP, rank, accumulation)
    for group in wrapper.optimizer.param_groups if own_rules else []:
        group['lr'] *= FACTOR
    train(ddp, wrapper, UPDATES, rank, accumulation, start=DROP)
    return dict(
        weights=model.state_dict(),
        variance=wrapper.modulator.variance,
        lr_scale=wrapper.modulator.lr_scale,
        history=wrapper.modulator.history,
        measured=wrapper.modulator.measured,
        world_size=wrapper.agvm.world_size,
    )


USERS_HOOKS = dict(
    all_reduce=default_hooks.allreduce_hook,
    fp16=default_hooks.fp16_compress_hook,
    fp16_wrapper=default_hooks.fp16_compress_wrapper(
        default_hooks.allreduce_hook
    ),
)
#: Ways to wrap a model and to build an optimizer that must not matter.
FLAVOURS = [
    dict(),
    dict(ddp=dict(gradient_as_bucket_view=True)),
    dict(ddp=dict(find_unused_parameters=True)),
    dict(ddp=dict(static_graph=True)),
    dict(hook='all_reduce'),
    dict(hook='fp16'),
    dict(optimizer=dict(foreach=True)),
    dict(optimizer=dict(fused=True)),
]


def train_flavour(rank, estimator, flavour):
    """Weights of float32 training, plain or with modulate=False."""
    model = make_model().float()
    settings = dict(interval=2, modulate=False, estimator=estimator)
    cfg = wrapper_cfg(**(settings if estimator else {}))
    cfg['optimizer'].update(flavour.get('optimizer', {}))
    if not estimator:
        del cfg['estimator']
        cfg['type'] = 'OptimWrapper'
        cfg['constructor'] = 'DefaultOptimWrapperConstructor'
    wrapper = build_optim_wrapper(model, cfg)
    ddp = parallel(model, **flavour.get('ddp', {}))
    if 'hook' in flavour:  # a user's own
        ddp.register_comm_hook(None, USERS_HOOKS[flavour['hook']])
    for update in range(UPDATES):
        with wrapper.optim_context(ddp):
            loss = ddp(make_batch(update, rank, 0).float())
        wrapper.update_params(loss)
    if estimator:
        assert wrapper.modulator.measured == 3
        assert wrapper.modulator.lr_scale['neck'] != 1
        return model.state_dict(), wrapper.modulator.variance
    return model.state_dict(), None


def train_flavours(rank, world_size):
    return [
        [
            train_flavour(rank, estimator, flavour)
            for estimator in (None, 'split', 'pairs')
        ]
        for flavour in FLAVOURS
    ]


def train_compressed(rank, world_size, estimator, comm_hook):
    """First phis, and weights, with gradients sent in a narrow type."""
    model = make_model().float()
    wrapper = build_optim_wrapper(
        model,
        wrapper_cfg(
            interval=2, ema_decay=0.5, estimator=estimator, comm_hook=comm_hook
        ),
    )
    ddp = parallel(model)
    for update in range(UPDATES):
        with wrapper.optim_context(ddp):
            loss = ddp(make_batch(update, rank, 0).float())
        wrapper.update_params(loss)
    return wrapper.modulator.history[0][1], model.state_dict()


def count_collectives(rank, world_size, estimator):
    """Elements that AGVM sends in each update, measured or not."""
    import torch.distributed as dist

    sent = []

    def counting(collective):
        def count(tensor, *args, **kwargs):
            sent[-1] += tensor.numel()
            return collective(tensor, *args, **kwargs)

        return count

    plain = dist.all_reduce, dist.broadcast
    dist.all_reduce, dist.broadcast = map(counting, plain)
    try:
        model = make_model()
        wrapper = build_optim_wrapper(
            model, wrapper_cfg(interval=3, estimator=estimator)
        )
        ddp = parallel(model)
        for update in range(4):
            sent.append(0)
            train(ddp, wrapper, update + 1, rank, start=update)
    finally:
        dist.all_reduce, dist.broadcast = plain
    return sent, sum(p.numel() for p in model.parameters())


def train_disturbed(rank, world_size, estimator, optimizer, factor):
    """Multipliers of each rank; one of them rounds its norms differently."""
    from mmagvm.core import functional
    from mmagvm.core.grad_variance import base

    plain = functional.squared_norms

    def disturbed(tensors):
        return plain(tensors) * (factor if rank == world_size - 1 else 1)

    functional.squared_norms = base.squared_norms = disturbed
    try:
        model = make_model()
        wrapper = build_optim_wrapper(
            model,
            wrapper_cfg(optimizer, **settings_of(estimator, optimizer)),
        )
        train(parallel(model), wrapper, UPDATES, rank)
    finally:
        functional.squared_norms = base.squared_norms = plain
    modulator = wrapper.modulator
    return (
        modulator.lr_scale,
        modulator.history,
        modulator.skipped,
        wrapper.agvm.noise_scale,
    )


#: estimator, optimizer, by what one rank's norms are wrong
DISTURBED = [
    (estimator, optimizer, factor)
    for estimator in ('split', 'pairs')
    for optimizer in ('SGD', 'AdamW')
    for factor in (1 + 1e-9, 1.5, math.inf)
]


def train_tiny(rank, world_size, estimator, optimizer, hook, factor):
    """Warnings of a training whose gradients are ``factor`` times smaller."""
    from unittest import mock

    from mmagvm.core import agvm

    model = make_model().float()
    own = dict(comm_hook='fp16') if hook == 'setting' else {}
    wrapper = build_optim_wrapper(
        model,
        wrapper_cfg(
            optimizer, interval=1, modulate=False, estimator=estimator, **own
        ),
    )
    ddp = parallel(model)
    if hook in USERS_HOOKS:
        ddp.register_comm_hook(None, USERS_HOOKS[hook])
    with mock.patch.object(agvm, 'logger') as logger:
        for update in range(4):
            with wrapper.optim_context(ddp):
                loss = ddp(make_batch(update, rank, 0).float()) * factor
            wrapper.update_params(loss)
    warnings = [c.args[0] % c.args[1:] for c in logger.warning.call_args_list]
    return warnings, wrapper.modulator.history


#: estimator, optimizer, communication hook, scale of the loss, and whether
#: there is a warning
TINY = [
    *(
        (estimator, optimizer, hook, 1e-7, True)
        for estimator in ('split', 'pairs')
        for optimizer, hook in (
            ('SGD', 'setting'),
            ('AdamW', 'setting'),
            ('SGD', 'fp16'),
            ('SGD', 'fp16_wrapper'),
        )
    ),
    ('pairs', 'SGD', 'setting', 1.0, False),
    ('split', 'AdamW', 'setting', 1.0, False),
    ('pairs', 'SGD', 'all_reduce', 1e-7, False),
    ('split', 'SGD', None, 1e-7, False),
]


def refuse_second_hook(rank, world_size):
    model = make_model()
    wrapper = build_optim_wrapper(model, wrapper_cfg(comm_hook='fp16'))
    ddp = parallel(model)
    ddp.register_comm_hook(None, default_hooks.allreduce_hook)
    with pytest.raises(ValueError, match="comm_hook='fp16' .*already"):
        train(ddp, wrapper, 1, rank)
    # torch has it for NCCL only
    wrapper = build_optim_wrapper(model, wrapper_cfg(comm_hook='bf16'))
    with pytest.raises(ValueError, match="comm_hook='bf16' .*leave it out"):
        train(parallel(model), wrapper, 1, rank)
    with pytest.raises(ValueError, match='2 ranks the model is a ToyDetector'):
        train(model, build_optim_wrapper(model, wrapper_cfg()), 1, rank)


def spoil(model, fault, rank):
    """Put a fault into one rank's, or every rank's, local gradients."""
    everywhere = fault.startswith('every')
    value = float('inf') if fault.endswith('inf') else float('nan')
    if everywhere or rank == 1:
        module = model.neck if 'neck' in fault else model
        for param in module.parameters():
            param.register_hook(lambda grad: grad * value)


FAULTS = ('one nan', 'one inf', 'every nan', 'one neck nan', 'every neck inf')


def train_faulty(rank, world_size, estimator, fault):
    """lr_scale and phi before and after a spoilt measured update."""
    model = make_model()
    wrapper = build_optim_wrapper(
        model, wrapper_cfg(interval=1, estimator=estimator)
    )
    ddp = parallel(model)
    train(ddp, wrapper, 2, rank)
    before = dict(wrapper.modulator.lr_scale), dict(wrapper.modulator.variance)
    lrs = [group['lr'] for group in wrapper.optimizer.param_groups]
    spoil(model, fault, rank)
    train(ddp, wrapper, 3, rank, start=2)
    assert lrs == [group['lr'] for group in wrapper.optimizer.param_groups]
    after = dict(wrapper.modulator.lr_scale), dict(wrapper.modulator.variance)
    return before, after, wrapper.modulator.skipped


def train_zero(rank, world_size, estimator):
    """A module whose gradient is zero everywhere keeps its lr_scale."""
    model = make_model()
    wrapper = build_optim_wrapper(
        model, wrapper_cfg(interval=1, estimator=estimator)
    )
    ddp = parallel(model)
    train(ddp, wrapper, 2, rank)
    before = dict(wrapper.modulator.lr_scale)
    for param in model.rpn_head.parameters():
        param.register_hook(torch.zeros_like)
    train(ddp, wrapper, 4, rank, start=2)
    return before, wrapper.modulator.lr_scale, wrapper.modulator.measured


def refuse_inexact_means(rank, world_size):
    """Gradients that are not the mean of all ranks' after the reduction."""
    model = make_model()
    ddp = parallel(model)
    ddp.register_comm_hook(
        powerSGD_hook.PowerSGDState(None), powerSGD_hook.powerSGD_hook
    )
    with pytest.raises(ValueError, match='powerSGD_hook .*leave it out'):
        train(ddp, build_optim_wrapper(model, wrapper_cfg()), 1, rank)
    for state, hook in (
        *(
            (powerSGD_hook.PowerSGDState(None), inside)
            for inside in (
                default_hooks.fp16_compress_wrapper(
                    default_hooks.bf16_compress_wrapper(
                        powerSGD_hook.powerSGD_hook
                    )
                ),
                functools.partial(powerSGD_hook.powerSGD_hook),
                named_hook,
                HookObject(powerSGD_hook.batched_powerSGD_hook),
            )
        ),
        (None, calling_hook),
        (None, debugging_hooks.noop_hook),
    ):
        ddp = parallel(make_model())
        # not registered, as torch asks hooks for names and types
        ddp._comm_hooks.append((hook, state))
        with pytest.raises(ValueError, match='_hook .*leave it out|State .*'):
            train(ddp, build_optim_wrapper(ddp, wrapper_cfg()), 1, rank)
    ddp = parallel(make_model())
    averaging = default_hooks.fp16_compress_wrapper(
        default_hooks.allreduce_hook
    )
    ddp.register_comm_hook(None, averaging)
    train(ddp, build_optim_wrapper(ddp, wrapper_cfg()), 1, rank)
    ddp = parallel(make_model())
    compiled = torch.compile(ddp, backend='eager')
    wrapper = build_optim_wrapper(compiled, wrapper_cfg(interval=1))
    with torch._dynamo.config.patch(optimize_ddp=False):  # for large ones
        train(compiled, wrapper, 1, rank)
    assert wrapper.modulator.measured == 1
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, ['neck.weight']
    )
    with pytest.raises(ValueError, match='ignore neck.weight.*freeze it'):
        train(parallel(model), build_optim_wrapper(model, wrapper_cfg()), 1)
    parts = MMSeparateDistributedDataParallel(
        torch.nn.Sequential(make_model())
    )
    with pytest.raises(ValueError, match='is a MMSeparateDistributed'):
        train(parts, build_optim_wrapper(model, wrapper_cfg()), 1, rank)


def named_hook(state, bucket):
    return default_hooks.allreduce_hook(None, bucket)


def calling_hook(state, bucket):
    return power_hook(state, bucket)


power_hook = powerSGD_hook.powerSGD_hook


class HookObject:
    def __init__(self, hook):
        self.hooks = [hook]

    def __call__(self, state, bucket):
        return self.hooks[0](state, bucket)


def refuse_two_backward_passes(rank, world_size):
    """In one optim_context, or each in its own, before one step."""
    for together in (True, False):
        ddp = parallel(make_model())
        wrapper = build_optim_wrapper(ddp, wrapper_cfg(begin=5))
        losses = []
        for part in range(2):
            with contextlib.ExitStack() as stack:
                if not (together and part):
                    stack.enter_context(wrapper.optim_context(ddp))
                losses.append(ddp(make_batch(0, rank, part)))
            wrapper.backward(losses[-1])
        with pytest.raises(ValueError, match='2 backward passes'):
            wrapper.step()


def train_by_own_backward(rank, world_size, estimator):
    """phi where the loop calls the loss's backward(), or the wrapper's."""
    histories = []
    for own in (True, False):
        ddp = parallel(make_model())
        wrapper = build_optim_wrapper(
            ddp, wrapper_cfg(interval=1, estimator=estimator)
        )
        for update in range(3):
            with wrapper.optim_context(ddp):
                loss = ddp(make_batch(update, rank, 0))
            loss.backward() if own else wrapper.backward(loss)
            wrapper.step()
            wrapper.zero_grad()
        histories.append(wrapper.modulator.history)
    return histories


def refuse_sharded_optimizer(rank, world_size):
    cfg = wrapper_cfg()
    cfg['optimizer'] = dict(
        type='ZeroRedundancyOptimizer', optimizer_type='SGD', lr=0.01
    )
    model = make_model()
    with pytest.raises(ValueError, match='set optimizer.type'):
        train(parallel(model), build_optim_wrapper(model, cfg), 1, rank)


def train_skipped(rank, world_size, estimator):
    """The state of each rank after an overflow on one, with a loss scaler.

    The third of five iterations overflows, so its update must not count and
    the measurement that was due in it must come with the next.
    """
    from test_amp import amp_wrapper

    model = make_model()
    wrapper = amp_wrapper(
        model, accumulative_counts=1, interval=2, estimator=estimator
    )
    ddp = parallel(model)
    for iteration in range(5):
        with wrapper.optim_context(ddp):
            loss = ddp(make_batch(iteration, rank, 0))
        overflows = iteration == 2 and rank == 1
        wrapper.update_params(loss * float('inf') if overflows else loss)
    modulator = wrapper.modulator
    return dict(
        weights=model.state_dict(),
        lr_scale=modulator.lr_scale,
        update=wrapper.agvm.update,
        measured=[update for update, _ in modulator.history],
        skipped=modulator.skipped,
    )


def train_resumed(rank, world_size, optimizer):
    """Weights and lr_scale of an uninterrupted and of a resumed training.

    DDP rebuilds its buckets after the first backward of a process, and from
    3 ranks on gloo sums an element in an order that depends on its place, so
    that even plain training rounds otherwise after a restart. With
    find_unused_parameters DDP never rebuilds.
    """
    kwargs = dict(find_unused_parameters=world_size > 2)
    results = []
    for stops in ([UPDATES], [UPDATES // 2, UPDATES]):
        saved, start = None, 0
        for stop in stops:
            model = make_model()
            wrapper = build_optim_wrapper(
                model, wrapper_cfg(optimizer, interval=1, ema_decay=0.5)
            )
            if saved is not None:
                model.load_state_dict(saved[0])
                wrapper.load_state_dict(saved[1])
            ddp = parallel(model, **kwargs)
            train(ddp, wrapper, stop, rank, start=start)
            saved, start = (model.state_dict(), wrapper.state_dict()), stop
        results.append((model.state_dict(), wrapper.modulator.lr_scale))
    return results


def run_all(rank, world_size):
    """All work of this file in one launch, since launches take longest."""
    results = {
        scenario: train_rank(rank, world_size, *scenario)
        for scenario in SCENARIOS + OWN_SCENARIOS
    }
    results['flavours'] = train_flavours(rank, world_size)
    for estimator in ('split', 'pairs'):
        results['collectives', estimator] = count_collectives(
            rank, world_size, estimator
        )
        for fault in FAULTS:
            results[fault, estimator] = train_faulty(
                rank, world_size, estimator, fault
            )
        results['skipped', estimator] = train_skipped(
            rank, world_size, estimator
        )
        results['zero', estimator] = train_zero(rank, world_size, estimator)
        for comm_hook in (None, 'fp16'):
            results[comm_hook, estimator] = train_compressed(
                rank, world_size, estimator, comm_hook
            )
    if world_size < 4:
        for estimator, optimizer, factor in DISTURBED:
            results['disturbed', estimator, optimizer, factor] = (
                train_disturbed(rank, world_size, estimator, optimizer, factor)
            )
    if world_size == 2:
        for estimator in ('split', 'pairs'):
            results['own', estimator] = train_by_own_backward(
                rank, world_size, estimator
            )
        for *case, _ in TINY:
            results['tiny', tuple(case)] = train_tiny(rank, world_size, *case)
    results['resumed'] = [
        train_resumed(rank, world_size, optimizer)
        for optimizer in ('SGD', 'AdamW')
    ]
    results['shared'] = share_work()
    for scenario in PRECONDITIONED:
        results[scenario] = measured_and_expected(
            make_model, *scenario, rank, world_size, accumulation=2
        )
    if world_size == 2:
        refuse_second_hook(rank, world_size)
        refuse_inexact_means(rank, world_size)
        refuse_two_backward_passes(rank, world_size)
        refuse_sharded_optimizer(rank, world_size)
    return results


def unfreeze_rank(rank, world_size, estimator, wrap_again):
    """Messages and measurements when a layer is unfrozen during training.

    DistributedDataParallel does not average what was frozen when it was
    built; wrapped again it does.
    """
    messages = []
    logger = logging.getLogger('mmagvm')
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    model = make_model()
    model.backbone[0].requires_grad_(False)
    ddp = parallel(model)
    wrapper = build_optim_wrapper(
        model, wrapper_cfg(interval=1, ema_decay=0.5, estimator=estimator)
    )
    train(ddp, wrapper, 3, rank)
    model.backbone[0].requires_grad_(True)
    if wrap_again:
        ddp = parallel(model)
    train(ddp, wrapper, 6, rank, start=3)
    # the first rank to end closes the others' connections
    torch.distributed.barrier()
    hooks = sum(
        len(getattr(param, '_post_accumulate_grad_hooks', None) or ())
        for param in model.parameters()
    )
    return (
        [m for m in messages if 'was frozen' in m],
        wrapper.modulator.measured,
        wrapper.modulator.lr_scale,
        dict(wrapper.agvm.missed),
        {n: p.detach() for n, p in model.named_parameters()},
        hooks,
    )
