"""Work that every rank would repeat, done once: by each rank its part."""

from typing import Callable, List, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import Tensor

#: What a job gives, in shapes and in tensors.
Shapes = Sequence[Tuple[int, ...]]
Results = Sequence[Tensor]


def share(
    costs: Sequence[float],
    shapes: Sequence[Shapes],
    like: Tensor,
    do: Callable[[Sequence[int]], Sequence[Results]],
) -> List[Results]:
    """The results of all jobs, the same bits on every rank.

    All ranks call this at once, with the same jobs. Each does a part of them,
    such that the parts cost about the same, and one all-gather hands the
    results around. A single process does them all.

    Args:
        costs: Of every job, in any unit.
        shapes: Of every job's results.
        like: A tensor of the results' device and type.
        do: Does jobs, given their indices, and returns their results.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return list(do(range(len(costs))))
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if ranks == 1 or not costs:
        return list(do(range(len(costs))))
    parts = balance(costs, ranks)
    sizes = [
        [torch.Size(shape).numel() for shape in of_job] for of_job in shapes
    ]
    longest = max(
        sum(sum(sizes[job]) for job in part) for part in parts
    )  # all-gather wants the same length of everybody
    own = like.new_zeros(longest)
    flat = [result.flatten() for job in do(parts[rank]) for result in job]
    if flat:
        torch.cat(
            [result.to(own.dtype) for result in flat],
            out=own[: sum(map(len, flat))],
        )
    # of floats alone, which every backend sends; it leaves this stream waiting
    # for the backend's, so that what it reads and fills may be used and freed
    everybodys = like.new_empty(ranks, longest)
    dist.all_gather(list(everybodys.unbind()), own)

    results: List[Results] = [()] * len(costs)
    for part, packed in zip(parts, everybodys):
        order = [size for job in part for size in sizes[job]]
        pieces = iter(packed[: sum(order)].split(order))
        for job in part:
            results[job] = [next(pieces).view(shape) for shape in shapes[job]]
    return results


def balance(costs: Sequence[float], parts: int) -> List[List[int]]:
    """Cut jobs into parts of about the same cost: the dearest first.

    Args:
        costs: Of every job.
        parts: How many.

    Returns:
        Indices of jobs, in rising order, by part.
    """
    load = [0.0] * parts
    jobs: List[List[int]] = [[] for _ in range(parts)]
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        least = load.index(min(load))
        load[least] += costs[job]
        jobs[least].append(job)
    return [sorted(part) for part in jobs]
