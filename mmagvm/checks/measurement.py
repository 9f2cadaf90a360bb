"""phi and mu as training measures them, against brute force.

Brute force follows the paper and shares no code with what it checks. A copy
of the model outside of its data-parallel wrapper gives the gradient of each
sample alone, and all of them are gathered.
"""

import hashlib
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ContextManager, Dict, Iterator, List, Optional, Tuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus
from torch.nn.parallel import DistributedDataParallel

from mmagvm.checks.ranks import Ranks
from mmagvm.checks.result import NotApplicableError, fail_if
from mmagvm.checks.running import Found
from mmagvm.core import AGVM, Settings, module_groups

MODULES = ('backbone', 'neck', 'rpn_head', 'bbox_head')
IMAGES = 4  # of a rank in a micro-batch
UPDATES = 3
#: Largest error of phi; in mixed precision kernels may round differently.
TOLERANCE = {None: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
NAMES = {None: 'fp32', torch.bfloat16: 'bf16', torch.float16: 'fp16'}


class Detector(nn.Module):
    """A detector's shape, small: ``forward`` gives the loss of images."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
        )
        self.neck = nn.Conv2d(32, 24, 1)
        self.rpn_head = nn.Conv2d(24, 3, 1)
        self.bbox_head = nn.Linear(24, 5)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Images (n, 3, 16, 16), labels (n,)."""
        features = self.neck(self.backbone(images)).relu()
        logits = self.bbox_head(features.mean((2, 3)))
        loss: Tensor = cross_entropy(logits.float(), labels)
        return loss + softplus(self.rpn_head(features).float()).mean()


@dataclass(frozen=True)
class Case:
    """The settings of one training that is checked."""

    estimator: str
    optimizer: str
    dtype: Optional[torch.dtype]
    micro_batches: int
    sharded: bool = False

    def __str__(self) -> str:
        count = self.micro_batches
        accumulated = f', {count} micro-batches' if count > 1 else ''
        return (
            f'{self.estimator}, {self.optimizer}, {NAMES[self.dtype]}'
            f'{accumulated}{", in shards" if self.sharded else ""}'
        )

    def autocast(self, device: torch.device) -> ContextManager[Any]:
        """The context of its forward passes."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(device.type, self.dtype)


class Training:
    """A few updates of the small detector, with AGVM as users run it.

    Args:
        case: The settings.
        ranks: All ranks, each of which trains.
    """

    def __init__(self, case: Case, ranks: Ranks) -> None:
        self.case, self.ranks, self.device = case, ranks, ranks.device
        torch.manual_seed(0)
        self.model = Detector().to(self.device)
        self.wrapped: nn.Module = self.model
        if case.sharded:
            shard(self.model, ranks)
        elif ranks.world_size > 1:
            self.wrapped = DistributedDataParallel(self.model)
        groups = module_groups(self.model, MODULES)
        self.optimizer: torch.optim.Optimizer
        if case.optimizer == 'SGD':
            self.optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=1e-3)
        self.agvm = AGVM(
            self.optimizer,
            self.wrapped,
            Settings(interval=1, ema_decay=0.5, estimator=case.estimator),
            case.micro_batches,
        )
        self.scaler: Optional[torch.amp.GradScaler] = None
        if case.dtype is torch.float16:
            self.scaler = _scaler(self.device)

    def batches(self, update: int) -> List[Tuple[Tensor, Tensor]]:
        """Of this rank, one for each micro-batch."""
        found = []
        for micro_batch in range(self.case.micro_batches):
            generator = torch.Generator().manual_seed(
                1_000_000 * update + 10 * self.ranks.rank + micro_batch
            )
            images = torch.randn(IMAGES, 3, 16, 16, generator=generator)
            labels = torch.randint(0, 5, (IMAGES,), generator=generator)
            found.append((images.to(self.device), labels.to(self.device)))
        return found

    def update(self, update: int) -> None:
        """One update, with its measurement."""
        for images, labels in self.batches(update):
            with self.agvm.micro_batch(self.scaler):
                with self.case.autocast(self.device):
                    loss = self.wrapped(images, labels)
                loss = loss / self.case.micro_batches
                if self.scaler is not None:
                    loss = self.scaler.scale(loss)
                loss.backward()
        self.agvm.step(self.scaler)
        if self.scaler is not None:
            self.scaler.update()
        self.optimizer.zero_grad()

    def samples(self, update: int) -> Tensor:
        """Every sample's gradient, (samples, parameters), in float64.

        A sample is a rank's whole batch or, on one rank and of shards, a
        micro-batch.
        """
        twin = Detector().to(self.device)
        twin.load_state_dict(
            {k: whole(v) for k, v in self.model.state_dict().items()}
        )
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        gradients = []
        for images, labels in self.batches(update):
            twin.zero_grad()
            with self.case.autocast(self.device):
                loss = twin(images, labels)
            (loss * (scale / self.case.micro_batches)).backward()
            flat = torch.cat([_gradient(p).flatten() for p in ordered(twin)])
            gradients.append(flat * (self.case.micro_batches / scale))
        own = torch.stack(gradients)
        if self.ranks.world_size == 1:
            return own.cpu().double()
        if not self.case.sharded:
            own = own.mean(0, keepdim=True)
        every = [torch.empty_like(own) for _ in range(self.ranks.world_size)]
        dist.all_gather(every, own)
        return torch.cat(every).cpu().double()

    def second_moment(self) -> Optional[Tensor]:
        """AdamW's v of all parameters, in float64; None before there is one.

        For AdamW only.
        """
        states = self.optimizer.state
        if not states:
            return None
        moments = [
            whole(states[param]['exp_avg_sq']).flatten()
            for param in ordered(self.model)
        ]
        return torch.cat(moments).cpu().double()

    def expected(self, update: int) -> Optional[Dict[str, float]]:
        """phi of each module by brute force; None while it is undefined."""
        samples = self.samples(update)
        divisor = torch.ones(samples.shape[1], dtype=torch.float64)
        if self.case.optimizer == 'AdamW':
            v = self.second_moment()
            if self.case.estimator == 'split':  # Alg. 2, with this gradient
                v = torch.zeros_like(divisor) if v is None else v
                v = 0.999 * v + 0.001 * samples.mean(0) ** 2
                divisor = v.sqrt() + 1e-8
            elif v is None:
                return None
            else:  # parameters without a gradient so far do not count
                divisor = torch.where(v == 0, torch.inf, v.sqrt() + 1e-8)
        phi = phi_of_split if self.case.estimator == 'split' else phi_of_pairs
        scaled = samples / divisor
        first = self.first_half(len(samples))
        return {
            module: phi(scaled[:, part], first)
            for module, part in slices(self.model)
        }

    def first_half(self, count: int) -> Tensor:
        """Which samples are in the first half of ``split``, (count,).

        Those of even ranks; on one rank the first micro-batches.
        """
        place = torch.arange(count)
        if self.ranks.world_size == 1:
            return place < count // 2
        return place // (count // self.ranks.world_size) % 2 == 0


def ordered(model: nn.Module) -> Iterator[nn.Parameter]:
    """All parameters, module by module."""
    for module in MODULES:
        yield from model.get_submodule(module).parameters()


def slices(model: nn.Module) -> Iterator[Tuple[str, slice]]:
    """Where each module's parameters lie among all."""
    begin = 0
    for module in MODULES:
        size = sum(p.numel() for p in model.get_submodule(module).parameters())
        yield module, slice(begin, begin + size)
        begin += size


def shard(model: Detector, ranks: Ranks) -> None:
    """Cut a model into shards, one for each rank."""
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard
    except ImportError:
        raise NotApplicableError(
            f'torch {torch.__version__} has no fully_shard'
        ) from None
    if not hasattr(FSDPModule, 'set_custom_reduce_scatter'):
        raise NotApplicableError(
            f'torch {torch.__version__} gives no access to gradients of shards'
        )
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for unit in (model.backbone, model.neck, model):
        fully_shard(unit, mesh=mesh)


def whole(tensor: Any) -> Tensor:
    """The whole of a tensor that may be in shards; called by all ranks."""
    full = getattr(tensor, 'full_tensor', None)
    found: Tensor = tensor if full is None else full()
    return found


def phi_of_split(samples: Tensor, first_half: Tensor) -> float:
    """Of two halves: 1 - cos(G1, G2), Eq. 2 of the paper.

    Args:
        samples: (samples, parameters).
        first_half: (samples,), whether each is in the first one.
    """
    first, second = (
        part.mean(0) for part in (samples[first_half], samples[~first_half])
    )
    return float(1 - first @ second / (first.norm() * second.norm()))


def phi_of_pairs(samples: Tensor, _: Tensor) -> float:
    """Of each pair of samples, from all inner products."""
    count = len(samples)
    products = samples @ samples.T
    square = products.trace() / count
    signal = (products.sum() - products.trace()) / (count * (count - 1))
    noise = square - signal
    return float(1 - signal / (signal + 2 * noise / count))


def check_variance(
    estimator: str,
    dtype: Optional[torch.dtype],
    ranks: Ranks,
    sharded: bool = False,
) -> Found:
    """phi of SGD and AdamW, with and without accumulation."""
    _need(dtype, ranks.device)
    if sharded and ranks.world_size == 1:
        raise NotApplicableError('one rank, which keeps the whole model')
    counts = (1, 2) if ranks.world_size > 1 else (2, 4)
    largest = 0.0
    faults: List[str] = []
    for optimizer in ('SGD', 'AdamW'):
        for count in counts:
            case = Case(estimator, optimizer, dtype, count, sharded)
            largest = max(largest, _error(case, ranks, faults))
    fail_if(faults)
    return (
        f'phi is within {largest:.0e} of brute force, with SGD and AdamW, '
        f'{counts[0]} and {counts[1]} micro-batches',
        dict(largest_error=largest),
    )


def _error(case: Case, ranks: Ranks, faults: List[str]) -> float:
    """The largest error of phi; adds what is wrong to ``faults``."""
    training, largest = Training(case, ranks), 0.0
    for update in range(UPDATES):
        expected = training.expected(update)
        before = training.agvm.modulator.measured
        training.update(update)
        measured = training.agvm.modulator.measured - before
        if measured != (expected is not None):
            faults.append(
                f'update {update} was not measured ({case}): '
                f'{training.agvm.why_missed() or "for no known reason"}; '
                'report it with the JSON file'
            )
        for module, phi in (expected or {}).items():
            found = training.agvm.modulator.variance[module]
            error = abs(found - phi)
            if not error <= TOLERANCE[case.dtype]:
                faults.append(
                    f'phi of {module} is {found:.6g} in update {update} and '
                    f'should be {phi:.6g} ({case}): do not train with AGVM '
                    'here, and report it with the JSON file'
                )
            largest = max(largest, error)
    return largest


def same_multipliers(ranks: Ranks) -> Found:
    """Whether mu and weights are bitwise equal on all ranks."""
    if ranks.world_size == 1:
        raise NotApplicableError('one rank')
    faults: List[str] = []
    for estimator in ('split', 'pairs'):
        training = Training(Case(estimator, 'AdamW', None, 1), ranks)
        for update in range(UPDATES):
            training.update(update)
        scales = training.agvm.modulator.lr_scale
        own = {
            f'lr_scale of {module}': scale.hex()
            for module, scale in scales.items()
        }
        flat = torch.cat(
            [p.detach().flatten() for p in ordered(training.model)]
        )
        own['checksum of weights'] = hashlib.sha256(
            flat.cpu().numpy().tobytes()
        ).hexdigest()
        first = ranks.gather(f'multipliers of {estimator}', own)[0]
        for name, value in own.items():
            if value != first[name]:
                faults.append(
                    f'{name} is {value}, but {first[name]} on rank 0 '
                    f'({estimator}): weights of ranks would diverge; report '
                    'it with the JSON file'
                )
    fail_if(faults)
    return 'lr_scale and weights are bitwise equal on all ranks', {}


def _need(dtype: Optional[torch.dtype], device: torch.device) -> None:
    """Raise if a device cannot train in a type."""
    if dtype is torch.bfloat16 and device.type == 'cuda':
        if not torch.cuda.is_bf16_supported():
            raise NotApplicableError('this GPU has no bfloat16')
    if dtype is not None:
        try:
            with torch.autocast(device.type, dtype):
                torch.ones(2, 2, device=device) @ torch.ones(
                    2, 2, device=device
                )
        except RuntimeError as error:
            raise NotApplicableError(
                f'torch has no {NAMES[dtype]} on {device.type}: {error}'
            ) from None
    if dtype is torch.float16:
        _scaler(device)


def _scaler(device: torch.device) -> torch.amp.GradScaler:
    """A loss scaler for a device."""
    try:
        return torch.amp.GradScaler(device.type, init_scale=1024.0)
    except (AttributeError, TypeError) as error:  # torch before 2.3
        if device.type == 'cuda':
            scaler: Any = torch.cuda.amp.GradScaler(init_scale=1024.0)
            return scaler  # type: ignore[no-any-return]
        raise NotApplicableError(
            f'this torch has no loss scaler for {device.type}'
        ) from error


def _gradient(param: nn.Parameter) -> Tensor:
    return torch.zeros_like(param) if param.grad is None else param.grad
