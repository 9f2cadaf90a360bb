"""Random models, modules, optimizers and settings: all must train."""

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mmengine.optim import build_optim_wrapper
from torch import nn

OPTIMIZERS = [
    dict(type='SGD', lr=0.1),
    dict(type='SGD', lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    dict(type='SGD', lr=0.1, foreach=False),
    dict(type='AdamW', lr=0.01, weight_decay=0.1),
    dict(type='AdamW', lr=0.01, amsgrad=True, foreach=True),
    dict(type='AdamW', lr=0.01, fused=True),
    dict(type='Adam', lr=0.01, weight_decay=0.1),
    dict(type='NAdam', lr=0.01),
    dict(type='RAdam', lr=0.01),
    dict(type='Adamax', lr=0.01),
    dict(type='RMSprop', lr=0.01, momentum=0.5),
    dict(type='Adagrad', lr=0.01),
    dict(type='Adadelta', lr=0.1),
    dict(type='ASGD', lr=0.01),
]


class RandomModel(nn.Module):
    """Children of random depths, widths, sharing, freezing and idleness."""

    def __init__(self, children, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.idle = set()
        for i, child in enumerate(children):
            layers = [nn.Linear(3, 3, bias=child['bias'])]
            layers += [nn.BatchNorm1d(3)] * child['norm']
            if child['shared']:
                layers.append(layers[0])
            module = nn.Sequential(*layers).requires_grad_(not child['frozen'])
            self.add_module(f'child{i}', module)
            if child['idle']:
                self.idle.add(f'child{i}')
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, update):
        y = x * self.scale
        for name, child in self.named_children():
            if not (name in self.idle and update % 2):
                y = y + child(y).tanh()
        return y.square().mean()


CHILD = st.fixed_dictionaries(
    {
        name: st.booleans()
        for name in ('bias', 'norm', 'shared', 'frozen', 'idle')
    }
)


@st.composite
def runs(draw):
    children = draw(st.lists(CHILD, min_size=1, max_size=5))
    model = RandomModel(children, draw(st.integers(0, 99)))
    names = [f'child{i}' for i, c in enumerate(children) if not c['frozen']]
    assume(names)  # a single module is refused
    listed = draw(st.none() | st.permutations(names).map(lambda n: n[:2]))
    low = draw(st.floats(0.01, 1))
    begin = draw(st.integers(0, 3))
    estimator = draw(st.sampled_from(['split', 'pairs']))
    ema_decay = draw(st.sampled_from([0.0, 0.5, 0.97]))
    pairs = estimator == 'pairs'
    cfg = dict(
        type='AGVMOptimWrapper',
        constructor='AGVMOptimWrapperConstructor',
        optimizer=dict(draw(st.sampled_from(OPTIMIZERS))),
        modules=listed,
        anchor=draw(st.sampled_from([*(listed or names), 'others'])),
        interval=draw(st.integers(1, 3)),
        ema_decay=ema_decay,
        begin=begin,
        end=draw(st.none() | st.integers(begin + 1, begin + 4)),
        estimator=estimator,
        restart_at_lr_drop=ema_decay > 0 and draw(st.booleans()),
        bound_by_grad_norm=ema_decay > 0 and pairs and draw(st.booleans()),
        eps=draw(st.sampled_from([0.0, 1e-6, 1.0])),
        ratio_range=(low, draw(st.floats(1, 100))),
        accumulative_counts=draw(st.integers(2, 4)),
        clip_grad=draw(st.none() | st.just(dict(max_norm=1.0))),
        paramwise_cfg=draw(
            st.none()
            | st.just(dict(norm_decay_mult=0.0, bias_lr_mult=2.0))
            | st.just(dict(custom_keys=dict(child0=dict(lr_mult=0.1))))
        ),
    )
    if 'weight_decay' not in cfg['optimizer'] and cfg['paramwise_cfg']:
        cfg['paramwise_cfg'] = None  # as the host demands
    return model, cfg


@settings(max_examples=200, deadline=None, derandomize=True)
@given(runs())
def test_no_configuration_does_harm(run):
    model, cfg = run
    wrapper = build_optim_wrapper(model, cfg)
    groups = wrapper.optimizer.param_groups
    grouped = [p for group in groups for p in group['params']]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(grouped) == len({id(p) for p in grouped})
    # frozen ones too, but with paramwise_cfg, as in MMEngine
    expected = trainable if cfg['paramwise_cfg'] else model.parameters()
    assert {id(p) for p in grouped} == {id(p) for p in expected}

    lrs = [group['lr'] for group in groups]
    low, high = cfg['ratio_range']
    for update in range(5):
        for _ in range(cfg['accumulative_counts']):
            with wrapper.optim_context(model):
                loss = model(torch.randn(4, 3), update)
            wrapper.update_params(loss)
        assert [group['lr'] for group in groups] == lrs
        scale = wrapper.modulator.lr_scale
        assert scale[cfg['anchor']] == 1
        assert all(low * 0.999 <= mu <= high * 1.001 for mu in scale.values())
        assert all(0 <= v <= 2 for v in wrapper.modulator.variance.values())
    assert wrapper.agvm.update == 5
    assert wrapper.modulator.skipped == 0
    for param in trainable:
        assert param.isfinite().all()

    again = build_optim_wrapper(model, cfg)
    again.load_state_dict(wrapper.state_dict())
    # as text, since NaN, of a module that was idle, equals nothing
    assert str(again.state_dict()['agvm']) == str(wrapper.state_dict()['agvm'])
