"""Shares work that every rank would repeat: each rank does a part of it."""

from typing import Callable, List, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import Tensor

#: The results of a job, as shapes and as tensors.
Shapes = Sequence[Tuple[int, ...]]
Results = Sequence[Tensor]


def share(
    costs: Sequence[float],
    shapes: Sequence[Shapes],
    like: Tensor,
    do: Callable[[Sequence[int]], Sequence[Results]],
    alone: bool = False,
) -> List[Results]:
    """The results of all jobs, bitwise equal on every rank.

    All ranks call this at once, with the same jobs. Each does a part of them,
    such that the parts cost about the same. One all-reduce distributes the
    results, and only adds zeros to them. A single process does all jobs.

    Args:
        costs: Of every job, in any unit.
        shapes: Of every job's results.
        like: A tensor of the results' device and type.
        do: Does jobs, given their indices, and returns their results.
        alone: Whether this rank does all jobs. Defaults to False.
    """
    if alone or world_size() == 1 or not costs:
        return list(do(range(len(costs))))
    sizes = [
        torch.Size(shape).numel() for of_job in shapes for shape in of_job
    ]
    flat = like.new_zeros(sum(sizes))
    pieces = iter(flat.split(sizes))
    results: List[Results] = [
        [next(pieces).view(shape) for shape in of_job] for of_job in shapes
    ]
    part = balance(costs, dist.get_world_size())[dist.get_rank()]
    for job, own in zip(part, do(part)):
        for result, value in zip(results[job], own):
            result.copy_(value)
    # of floats only, which every backend sends; this stream waits for it
    dist.all_reduce(flat)
    return results


def require_alike(tensors: Sequence[Tensor], remedy: str) -> None:
    """Raise unless all ranks have the same tensors, by shapes and norms.

    All ranks call this at once. It takes one small all-gather and a transfer
    to the host.

    Args:
        tensors: The inputs of the jobs.
        remedy: What to do otherwise, for the message.

    Raises:
        ValueError: On every rank, if one differs.
    """
    if world_size() == 1 or not tensors:
        return
    shapes = hash(tuple(tuple(tensor.shape) for tensor in tensors)) % 2**52
    norm = torch.stack(torch._foreach_norm(list(tensors))).double().norm()
    own = torch.stack([norm.new_tensor(float(shapes)), norm])
    gathered = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(gathered, own)
    every = torch.stack(gathered).cpu()
    # GPUs of different kinds round a norm differently
    same = torch.allclose(
        every[:, 1], every[:1, 1], rtol=1e-5, atol=0, equal_nan=True
    )
    if not same or len(every[:, 0].unique()) > 1:
        raise ValueError(
            'ranks have different gradients or parameters, so they cannot '
            f'share the matrix work: {remedy}'
        )


def world_size() -> int:
    """Number of ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return int(dist.get_world_size())


def balance(costs: Sequence[float], parts: int) -> List[List[int]]:
    """Cut jobs into parts of about the same cost: the costliest first.

    Args:
        costs: Of every job.
        parts: Number of parts.

    Returns:
        Indices of jobs, in ascending order, by part.
    """
    load = [0.0] * parts
    jobs: List[List[int]] = [[] for _ in range(parts)]
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        least = load.index(min(load))
        load[least] += costs[job]
        jobs[least].append(job)
    return [sorted(part) for part in jobs]
