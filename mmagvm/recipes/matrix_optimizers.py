"""SOAP and Muon, which precondition whole matrices, over pytorch_optimizer.

Both take learning rates on AdamW's scale, and weights of any model. Ranks
share the costly work for each matrix, SOAP's bases and Muon's orthogonal
factors: see :mod:`mmagvm.recipes.shared_work`.
"""

from collections import defaultdict
from typing import Any, Dict, List, Optional, Sequence, Tuple

import pytorch_optimizer
import torch
from pytorch_optimizer.optimizer.muon import get_adjusted_lr
from pytorch_optimizer.optimizer.utils.matrix import (
    zero_power_via_newton_schulz_5,
)
from torch import Tensor

from mmagvm.recipes.shared_work import Results, require_alike, share

Group = Dict[str, Any]

REMEDY = (
    'train the same weights on all ranks, or set share_work=False in '
    'optim_wrapper.optimizer'
)


class SOAP(pytorch_optimizer.SOAP):
    """Adam in the eigenbasis of Shampoo's statistics (Vyas et al., 2024).

    For each weight of shape (n_1, ..., n_k) with gradient g, and for each of
    its k dimensions::

        S_i <- beta2 S_i + (1 - beta2) g_(i) g_(i)^T
        Q_i <- the eigenvectors of S_i, every ``precondition_frequency``
               updates, by a step of power iteration and a QR decomposition

    where g_(i) is (n_i, product of the others). Adam's moments are those of g
    rotated by Q_1, ..., Q_k, and its step is rotated back. Scalars and
    vectors, so biases and norm layers, step as with AdamW, unrotated, without
    a setting. The first update only makes the bases.

    Ranks share the renewal of bases: see :func:`share`. The state has S_i,
    Q_i and two moments: 2 (n_1^2 + ... + n_k^2) numbers more than AdamW's for
    each weight. AGVM measures gradients as Adam divides them, in the rotated
    basis.

    Args:
        params: Parameters or their groups.
        lr: Learning rate, on AdamW's scale. Defaults to 0.003.
        betas: Decay of the moments; the second one also that of S. Defaults
            to (0.95, 0.95).
        weight_decay: Decoupled, as AdamW's. Defaults to 0.01.
        precondition_frequency: Updates between two renewals of the bases.
            Defaults to 10.
        max_precondition_dim: Dimensions above it are left unrotated. Defaults
            to 10000.
        eps: Adam's. Defaults to 1e-8.
        foreach: True or None, which mean the same: elementwise operations
            run for all weights at once.
        share_work: Whether ranks share the renewals, each doing a part.
            False if they train different weights. Defaults to True.

    Raises:
        ValueError: ``foreach=False``; sharded parameters; or, in the first
            update, different gradients on ranks that share the work.
    """

    #: Shapes of the weights that ranks have been found to have alike.
    _alike: Tuple[Any, ...] = ()
    _share_work = True

    def __init__(
        self,
        params: Any,
        lr: float = 3e-3,
        betas: Tuple[float, float] = (0.95, 0.95),
        weight_decay: float = 0.01,
        precondition_frequency: int = 10,
        max_precondition_dim: int = 10000,
        eps: float = 1e-8,
        foreach: Optional[bool] = None,
        share_work: bool = True,
    ) -> None:
        _check_foreach('SOAP', foreach)
        self._share_work = share_work
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            weight_decay=weight_decay,
            precondition_frequency=precondition_frequency,
            max_precondition_dim=max_precondition_dim,
            eps=eps,
        )

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters."""
        _refuse_shards(param_group)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all weights, then renew the bases if it is time."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        due = [
            self.state[param]
            for group in self.param_groups
            if group['step'] > 1
            and (group['step'] - 1) % group['precondition_frequency'] == 0
            for param in group['params']
            if param.grad is not None
        ]
        self._renew_bases(due)
        return loss

    def _step_group(self, group: Group) -> None:
        """The library's step, for many weights at once."""
        self.init_group(group)
        group['step'] += 1
        params, grads = with_gradient(group)
        if group['step'] == 1 or not params:
            return
        beta1, beta2 = group['betas']
        update = group['step'] - 1
        step_size = group['lr'] * (
            self.debias(beta2, update) ** 0.5 / self.debias(beta1, update)
        )
        states = [self.state[param] for param in params]
        exp_avgs = [state['exp_avg'] for state in states]
        exp_avg_sqs = [state['exp_avg_sq'] for state in states]

        rotated = self._rotate(group, grads, states)
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        torch._foreach_lerp_(
            exp_avg_sqs, torch._foreach_mul(rotated, rotated), 1 - beta2
        )
        divisor = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_add_(divisor, group['eps'])
        # not in place: _rotate returns an unrotated average itself
        steps = list(
            torch._foreach_div(self._rotate(group, exp_avgs, states), divisor)
        )
        steps = self._rotate(group, steps, states, 'backward')
        torch._foreach_add_(params, steps, alpha=-step_size)
        self.apply_weight_decay_foreach(
            params, grads, group['lr'], group['weight_decay'], True, False
        )
        for grad, state in zip(grads, states):
            self.update_pre_conditioner(
                grad,
                state,
                step=update,
                max_precondition_dim=group['max_precondition_dim'],
                precondition_1d=group['precondition_1d'],
            )

    def _rotate(
        self,
        group: Group,
        tensors: Sequence[Tensor],
        states: Sequence[Dict[str, Any]],
        direction: str = 'forward',
    ) -> List[Tensor]:
        return [
            self.project(
                tensor,
                state,
                max_precondition_dim=group['max_precondition_dim'],
                project_type=direction,
            )
            for tensor, state in zip(tensors, states)
        ]

    # -- bases: the library's statistics, and the work that ranks share

    def init_group(self, group: Group, **kwargs: Any) -> None:
        """Make the state of weights that have their first gradient."""
        super().init_group(group, **kwargs)
        fresh = [
            state
            for state in map(self.state.get, group['params'])
            if state and state['Q'] is None
        ]
        for state in fresh:
            state['Q'] = [[] for _ in state['GG']]
        self._renew_bases(fresh)

    def update_pre_conditioner(  # type: ignore[override]
        self, grad: Tensor, state: Dict[str, Any], step: int, **options: Any
    ) -> None:
        """Update the statistics only; bases are renewed all at once."""
        basis = state['Q']
        state['Q'] = ()  # so that the library makes none, even at step 0
        super().update_pre_conditioner(grad, state, step=0, **options)
        state['Q'] = basis

    def _renew_bases(self, due: List[Dict[str, Any]]) -> None:
        """Renew the bases of some states, with all ranks together.

        Args:
            due: States; of the same weights on every rank.
        """
        jobs = [
            (statistics, state['Q'][dim])
            for state in due
            for dim, statistics in enumerate(state['GG'])
            if len(statistics)
        ]
        if not jobs:
            return
        sizes = [len(statistics) for statistics, _ in jobs]
        if self._share_work and self._alike != tuple(sizes):
            require_alike([statistics for statistics, _ in jobs], REMEDY)
            self._alike = tuple(sizes)
        renewed = iter(
            share(
                [float(size) ** 3 for size in sizes],
                [[(size, size), (size,)] for size in sizes],
                _at_least_float32(jobs[0][0]),  # can hold indices
                lambda chosen: [self._renewed(*jobs[job]) for job in chosen],
                alone=not self._share_work,
            )
        )
        for state in due:
            for dim, statistics in enumerate(state['GG']):
                if len(statistics):
                    basis, order = next(renewed)
                    # by columns, as QR returns them, whether shared or not,
                    # so that products round alike
                    columns = basis.mT.to(statistics.dtype).clone(
                        memory_format=torch.contiguous_format
                    )
                    state['Q'][dim] = columns.mT
                    # the second moment follows its basis
                    state['exp_avg_sq'] = state['exp_avg_sq'].index_select(
                        dim, order.long()
                    )

    def _renewed(self, statistics: Tensor, basis: Any) -> Results:
        """A basis, and the position of each of its vectors in the old one.

        Args:
            statistics: S, (n, n).
            basis: Q, (n, n), its vectors in columns; empty at first.
        """
        if not len(basis):
            # NaN has no eigenvectors, and an error here would leave the other
            # ranks waiting
            finite = statistics.nan_to_num(0, 0, 0)
            (first,) = self.get_orthogonal_matrix(finite[None])
            return first, torch.arange(len(first), device=first.device)
        product = statistics @ basis
        order = (basis * product).sum(0).argsort(descending=True)
        # torch has no QR of 16 bits
        new, _ = torch.linalg.qr(_at_least_float32(product[:, order]))
        return new, order


class Muon(pytorch_optimizer.Muon):
    """Orthogonalized momentum for matrices, AdamW for the rest (Jordan, 2024).

    For each weight of two or more dimensions with gradient g, seen as a
    matrix of its first dimension by all others::

        m <- momentum m + (1 - momentum) g;  u = momentum m + (1 - momentum) g
        w <- (1 - lr weight_decay) w - 0.2 sqrt(max(rows, columns)) lr O(u)

    where O(u) has the singular vectors of u and singular values near 1, by
    Newton-Schulz iterations, in bfloat16 on CUDA and in float32 elsewhere.
    The factor gives a step the size of AdamW's (Liu et al., "Muon is
    scalable for LLM training", 2025), so that all weights share one rate.

    Everything else steps as with AdamW, without a setting: scalars, vectors
    (so biases and norm layers), and weights with a single row or column. So
    do matrices with the option ``use_muon=False``, for instance embeddings::

        paramwise_cfg=dict(custom_keys={
            'query_embed': dict(use_muon=False)})

    Each rank orthogonalizes a part of the matrices: see :func:`share`. AGVM
    measures raw gradients, since the step is not linear in them.

    Args:
        params: Parameters or their groups.
        lr: Learning rate, on AdamW's scale. Defaults to 0.001.
        momentum: Defaults to 0.95.
        weight_decay: Decoupled, as AdamW's. Defaults to 0.01.
        nesterov: Whether u looks ahead, or is m. Defaults to True.
        ns_steps: Newton-Schulz iterations. Defaults to 5.
        betas: AdamW's. Defaults to (0.9, 0.95).
        eps: AdamW's. Defaults to 1e-8.
        foreach: True or None, which mean the same: weights step together.
        share_work: Whether ranks share the orthogonalization, each doing a
            part. False if they train different weights. Defaults to True.

    Raises:
        ValueError: ``foreach=False``; ``use_muon=True`` for a weight that is
            no matrix; sharded parameters; or, in the first update, different
            gradients on ranks that share the work.
    """

    #: Shapes of the weights that ranks have been found to have alike.
    _alike: Tuple[Any, ...] = ()
    _share_work = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        nesterov: bool = True,
        ns_steps: int = 5,
        betas: Tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        foreach: Optional[bool] = None,
        share_work: bool = True,
    ) -> None:
        _check_foreach('Muon', foreach)
        self._share_work = share_work
        super().__init__(
            split_matrices(params),
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
            ns_steps=ns_steps,
            use_adjusted_lr=True,
            adamw_lr=lr,
            adamw_betas=betas,
            adamw_wd=weight_decay,
            adamw_eps=eps,
            foreach=foreach,
        )
        # the library leaves these out, but MMEngine logs the rate from them,
        # and groups that are added later take them
        self.defaults.update(
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            weight_decouple=True,
            nesterov=nesterov,
            ns_steps=ns_steps,
            betas=betas,
            eps=eps,
        )

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, their matrices in a group of their own."""
        _refuse_shards(param_group)
        for group in split_matrices([param_group]):
            super().add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all weights; matrices with all ranks together."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params: List[Tensor] = []
        momenta: List[Tensor] = []
        iterations: List[int] = []
        rates: List[float] = []
        for group in self.param_groups:
            self.init_group(group)
            group['step'] += 1
            own, grads = with_gradient(group)
            if not own:
                continue
            if not group['use_muon']:
                self._step_foreach_group(group)  # AdamW
                continue
            params += own
            momenta += self._momenta(group, own, grads)
            iterations += [group['ns_steps']] * len(own)
            rates += [
                float(get_adjusted_lr(group['lr'], param.shape, True))
                for param in own
            ]
        if params:
            shapes = tuple(param.shape for param in params)
            if self._share_work and self._alike != shapes:
                require_alike(momenta, REMEDY)
                self._alike = shapes
            steps = [
                step.view(param.shape).to(param.dtype, copy=True)
                for param, step in zip(
                    params,
                    orthogonalize(
                        momenta, iterations, alone=not self._share_work
                    ),
                )
            ]
            torch._foreach_mul_(steps, [-rate for rate in rates])
            torch._foreach_add_(params, steps)
        return loss

    def _momenta(
        self, group: Group, params: List[Tensor], grads: List[Tensor]
    ) -> List[Tensor]:
        """Decay the weights; u of each of them."""
        averages = [self.state[param]['momentum_buffer'] for param in params]
        self.apply_weight_decay_foreach(
            params, grads, group['lr'], group['weight_decay'], True, False
        )
        torch._foreach_lerp_(averages, grads, 1 - group['momentum'])
        if not group['nesterov']:
            return averages
        return list(torch._foreach_lerp(grads, averages, group['momentum']))


def with_gradient(group: Group) -> Tuple[List[Tensor], List[Tensor]]:
    """A group's parameters with a gradient, and their gradients."""
    params = [p for p in group['params'] if p.grad is not None]
    return params, [p.grad for p in params]


def is_matrix(param: Tensor) -> bool:
    """Whether a weight has several rows of several columns."""
    return param.dim() > 1 and 1 < len(param) < param.numel()


def split_matrices(params: Any) -> List[Group]:
    """Split parameter groups into matrices and the rest, by ``use_muon``.

    Args:
        params: Parameters, or groups of them, maybe with ``param_names``.

    Raises:
        ValueError: See :class:`Muon`.
    """
    params = list(params)
    if params and isinstance(params[0], Tensor):
        params = [dict(params=params)]
    groups: List[Group] = []
    for group in params:
        own = group['params']
        own = [own] if isinstance(own, Tensor) else list(own)
        matrices = [is_matrix(param) for param in own]
        if group.get('use_muon') and not all(matrices):
            raise ValueError(
                'use_muon=True of Muon is set for a weight of shape '
                f'{tuple(own[matrices.index(False)].shape)}, which is not a '
                'matrix: leave use_muon out, as Muon finds matrices by itself'
            )
        if group.get('use_muon') is False:
            matrices = [False] * len(own)
        for chosen in (True, False):
            indices = [i for i, m in enumerate(matrices) if m is chosen]
            if not indices:
                continue
            lists = {
                key: [value[i] for i in indices]
                for key, value in dict(group, params=own).items()
                if key in ('params', 'param_names')
            }
            groups.append({**group, **lists, 'use_muon': chosen})
    return groups


def orthogonalize(
    matrices: Sequence[Tensor], iterations: Sequence[int], alone: bool = False
) -> List[Tensor]:
    """The orthogonal factor of every matrix, by all ranks together.

    Args:
        matrices: Of two dimensions or more; all but the first are columns.
        iterations: Newton-Schulz iterations for each of them.
        alone: Whether this rank does all of them. Defaults to False.

    Returns:
        A matrix for each, of two dimensions, in float32, or bfloat16 on CUDA.
    """
    flat = [matrix.flatten(1) for matrix in matrices]
    # without its units bfloat16 is slower than float32
    dtype = torch.bfloat16 if flat[0].is_cuda else torch.float32

    def do(chosen: Sequence[int]) -> List[Results]:
        alike = defaultdict(list)
        for job in chosen:
            alike[flat[job].shape, iterations[job]].append(job)
        done: Dict[int, Tensor] = {}
        for (_, count), jobs in alike.items():
            factors = zero_power_via_newton_schulz_5(
                torch.stack([flat[job] for job in jobs]),
                num_steps=count,
                dtype=dtype,
            )
            done.update(zip(jobs, factors))
        return [[done[job]] for job in chosen]

    def cost(matrix: Tensor) -> float:
        short, long = sorted(matrix.shape)
        return float(short**2 * (2 * long + short))

    like = flat[0].new_empty(0, dtype=dtype)
    shapes = [[tuple(matrix.shape)] for matrix in flat]
    costs = [cost(matrix) for matrix in flat]
    results = share(costs, shapes, like, do, alone)
    return [factor for (factor,) in results]


def _check_foreach(name: str, foreach: Optional[bool]) -> None:
    if foreach is False:
        raise ValueError(
            f'foreach=False of {name} is not supported, as weights step '
            'together: leave it out'
        )


def _refuse_shards(group: Group) -> None:
    params = group['params']
    params = [params] if isinstance(params, Tensor) else params
    if any(type(param).__name__ == 'DTensor' for param in params):
        raise ValueError(
            'SOAP and Muon need whole weights, but these are sharded: train '
            "with MMDistributedDataParallel, or with optimizer type='AdamW'"
        )


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.itemsize < 4 else tensor
