"""AGVM by brute force: slow, plain, one process, written from the paper.

Every rank's and micro-batch's gradient is computed by itself, both halves are
averaged and flattened explicitly, and the optimizers are spelled out.
"""

from typing import Any, Callable, Dict, List, Optional, Tuple

import torch

Vectors = Dict[str, torch.Tensor]


def module_of(name: str) -> str:
    """The module of one of ToyDetector's parameters."""
    first, second, *_ = name.split('.') + ['']
    if first == 'roi_head':
        return f'roi_head.{second}'
    return first if second else 'others'


class Oracle:
    """Trains ``model`` as ``ranks`` ranks with ``accumulation`` would."""

    def __init__(
        self,
        model: torch.nn.Module,
        make_batch: Callable[[int, int, int], torch.Tensor],
        ranks: int = 1,
        accumulation: int = 1,
        optimizer: str = 'SGD',
        interval: int = 10,
        ema_decay: float = 0.97,
        begin: int = 0,
        eps: float = 1e-6,
        ratio_range: Tuple[float, float] = (0.1, 10.0),
        anchor: str = 'backbone',
        estimator: str = 'split',
        max_norm: float = float('inf'),
        restart_at_lr_drop: bool = False,
        bound_by_grad_norm: bool = False,
    ) -> None:
        self.params = dict(model.named_parameters())
        self.model = model
        self.make_batch = make_batch
        self.ranks = ranks
        self.accumulation = accumulation
        self.optimizer = optimizer
        self.interval, self.begin = interval, begin
        self.ema_decay, self.eps = ema_decay, eps
        self.ratio_range, self.anchor = ratio_range, anchor
        self.estimator = estimator
        self.max_norm = max_norm
        self.restart, self.bound = restart_at_lr_drop, bound_by_grad_norm
        self.lr_factor = 1.0
        self.factors: Dict[str, List[float]] = {}
        self.norms: Dict[str, List[float]] = {}
        self.t = 0
        self.modules = list(dict.fromkeys(map(module_of, self.params)))
        self.mu = dict.fromkeys(self.modules, 1.0)
        self.phi: Dict[str, float] = {}
        self.state: Dict[str, Dict[str, Any]] = {
            name: {} for name in self.params
        }

    def gradient(self, rank: int, micro_batch: int) -> Vectors:
        self.model.zero_grad(set_to_none=True)
        self.model(self.make_batch(self.t, rank, micro_batch)).backward()
        return {
            name: p.grad.clone()
            for name, p in self.params.items()
            if p.grad is not None
        }

    def update(self) -> None:
        samples: List[Vectors] = []  # one per rank, or per micro-batch
        for rank in range(self.ranks):
            parts = [self.gradient(rank, k) for k in range(self.accumulation)]
            samples += parts if self.ranks == 1 else [mean(parts)]
        g = mean(samples)
        if self.t >= self.begin and (self.t - self.begin) % self.interval == 0:
            if self.estimator == 'pairs':
                self.measure_pairs(samples)
            elif self.ranks > 1:
                self.measure(g, mean(samples[::2]), mean(samples[1::2]))
            else:
                half = self.accumulation // 2
                self.measure(g, mean(samples[:half]), mean(samples[half:]))
        for name, grad in g.items():
            self.step(name, grad * self.clip(g))
        self.t += 1

    def clip(self, g: Vectors) -> float:
        norm: float = (
            torch.cat([v.flatten() for v in g.values()]).norm().item()
        )
        return min(1, self.max_norm / (norm + 1e-6))

    def measure(self, g: Vectors, g1: Vectors, g2: Vectors) -> None:
        for module in self.modules:
            flat: List[List[torch.Tensor]] = [[], []]
            for name in g:
                if module_of(name) != module:
                    continue
                divisor = 1.0
                if self.optimizer == 'AdamW':
                    v = self.state[name].get('v', torch.zeros_like(g[name]))
                    v = 0.999 * v + 0.001 * (g[name] * self.clip(g)) ** 2
                    divisor = v.sqrt() + 1e-8
                for half, vector in zip(flat, (g1, g2)):
                    part = vector.get(name, torch.zeros_like(g[name]))
                    half.append((part / divisor).flatten())
            phi: Optional[float] = None
            if flat[0]:
                a, b = torch.cat(flat[0]), torch.cat(flat[1])
                if a.norm() > 0 and b.norm() > 0:
                    phi = (1 - a @ b / (a.norm() * b.norm())).item()
            if phi is None:
                self.phi.pop(module, None)
            else:
                self.phi[module] = phi
        self.modulate()

    def measure_pairs(self, samples: List[Vectors]) -> None:
        """From the inner products of all pairs, not from two norms."""
        if self.optimizer == 'AdamW' and self.t == 0:
            return  # no second moment yet
        count = len(samples)
        for module in self.modules:
            flat = []
            for sample in samples:
                parts = []
                for name in self.params:
                    if module_of(name) != module:
                        continue
                    g = sample.get(name, torch.zeros_like(self.params[name]))
                    if self.optimizer == 'AdamW':
                        v = self.state[name].get('v', torch.zeros_like(g))
                        g = torch.where(v == 0, 0, g / (v.sqrt() + 1e-8))
                    parts.append(g.flatten())
                flat.append(torch.cat(parts))
            pairs = [
                (flat[i] @ flat[j]).item()
                for i in range(count)
                for j in range(i)
            ]
            signal = sum(pairs) / len(pairs)  # unbiased |true gradient|^2
            square = sum((f @ f).item() for f in flat) / count
            noise = square - signal
            if square > 0:
                self.phi[module] = 1 - signal / (signal + 2 * noise / count)
                average = torch.stack(flat).mean(0)
                self.norms.setdefault(module, []).append(average.norm().item())
            else:
                self.phi.pop(module, None)
        self.modulate()

    def modulate(self) -> None:
        if self.anchor not in self.phi:
            return
        for module in self.phi:
            self.factors.setdefault(module, []).append(self.lr_factor)
        for module, phi in self.phi.items():
            alpha = self.alpha(module)
            ratio = (
                (self.phi[self.anchor] + self.eps) / (phi + self.eps)
            ) ** 0.5
            ratio = min(max(ratio, self.ratio_range[0]), self.ratio_range[1])
            if self.bound:
                grown = self.growth(self.norms[module])
                grown /= self.growth(self.norms[self.anchor])
                ratio = max(ratio / max(1.0, grown), self.ratio_range[0])
            self.mu[module] = alpha * self.mu[module] + (1 - alpha) * ratio

    def alpha(self, module: str) -> float:
        """From the learning rates at which it was measured; they only fall."""
        first = self.factors[self.anchor][0]
        since = sum(factor < first for factor in self.factors[module])
        if not self.restart or not since:
            return self.ema_decay
        return min(self.ema_decay, 1 - 1 / since)

    def growth(self, norms: List[float]) -> float:
        """The last norm over the root of the moving mean square."""
        weights = [
            (1 - self.ema_decay if i else 1.0)
            * self.ema_decay ** (len(norms) - 1 - i)
            for i in range(len(norms))
        ]
        square = sum(w * n**2 for w, n in zip(weights, norms))
        return float(norms[-1] / square**0.5)

    @torch.no_grad()
    def step(self, name: str, g: torch.Tensor) -> None:
        p, state, mu = (
            self.params[name],
            self.state[name],
            self.mu[module_of(name)],
        )
        if self.optimizer == 'SGD':
            g = g + 1e-2 * p
            state['m'] = 0.9 * state['m'] + g if 'm' in state else g
            p.sub_(0.05 * self.lr_factor * mu * state['m'])
            return
        n = state['n'] = state.get('n', 0) + 1
        state['m'] = 0.9 * state.get('m', 0) + 0.1 * g
        state['v'] = 0.999 * state.get('v', 0) + 0.001 * g**2
        m = state['m'] / (1 - 0.9**n)
        v = state['v'] / (1 - 0.999**n)
        lr = 0.01 * self.lr_factor
        p.sub_(lr * mu * (m / (v.sqrt() + 1e-8) + 0.05 * p))


def mean(vectors: List[Vectors]) -> Vectors:
    """The mean of gradients; a missing one counts as zero."""
    names = dict.fromkeys(name for vector in vectors for name in vector)
    zero = torch.zeros(())
    return {
        name: sum((v[name] for v in vectors if name in v), zero) / len(vectors)
        for name in names
    }
