"""Whether ranks reach each other, sum correctly, and how fast."""

import time
from typing import List, Optional

import torch
import torch.distributed as dist

from mmagvm.checks.ranks import Ranks
from mmagvm.checks.result import NotApplicableError, fail_if
from mmagvm.checks.running import Found

#: Types in which gradients and AGVM's norms travel.
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
#: Elements of the timed all-reduce, of float32.
TIMED = {'cpu': 2**20, 'cuda': 2**26}
TIMES = 3


def within_node(ranks: Ranks) -> Found:
    """An all-reduce among the ranks of each node."""
    if ranks.per_node == 1:
        raise NotApplicableError('one rank on each node')
    own: Optional[dist.ProcessGroup] = None
    for node in range(ranks.nodes):
        first = node * ranks.per_node
        members = list(range(first, first + ranks.per_node))
        group = dist.new_group(members)  # by all ranks
        if ranks.rank in members:
            own = group
    return _all_reduce(ranks, ranks.of_node, own)


def between_nodes(ranks: Ranks) -> Found:
    """An all-reduce among all ranks, as training does it."""
    if ranks.nodes == 1:
        raise NotApplicableError('one node')
    return _all_reduce(ranks, list(range(ranks.world_size)), None)


def _all_reduce(
    ranks: Ranks, members: List[int], group: Optional[dist.ProcessGroup]
) -> Found:
    expected = sum(member % 8 + 1.0 for member in members)
    lacking: List[str] = []
    faults: List[str] = []
    for dtype in DTYPES:
        # values that each type sums exactly, in any order
        values = torch.full(
            (8,), ranks.rank % 8 + 1.0, dtype=dtype, device=ranks.device
        )
        try:
            dist.all_reduce(values, group=group)
        except RuntimeError as error:
            if 'scalar type' not in str(error):
                raise
            lacking.append(str(dtype).partition('.')[2])
            continue
        # bfloat16 rounds above 256
        if abs(values[0].item() - expected) > 0.02 * expected:
            faults.append(
                f'the sum of {dtype} is {values[0].item():g} and should be '
                f'{expected:g}: the communication library is wrong; try '
                'another version of NCCL, or NCCL_P2P_DISABLE=1'
            )
    count = TIMED.get(ranks.device.type, 2**20)
    payload = torch.zeros(count, device=ranks.device)
    dist.all_reduce(payload, group=group)  # the first one connects
    _finish(payload)
    begin = time.perf_counter()
    for _ in range(TIMES):
        dist.all_reduce(payload, group=group)
    _finish(payload)
    seconds = (time.perf_counter() - begin) / TIMES
    fail_if(faults)
    sent = 2 * (len(members) - 1) / len(members) * 4 * count
    return (
        f'{len(members)} ranks sum {4 * count / 2**20:g} MiB in '
        f'{1000 * seconds:.3g} ms, {sent / seconds / 1e9:.3g} GB/s per rank '
        f'({dist.get_backend()})'
        + ''.join(f'; it cannot sum {dtype}' for dtype in lacking),
        dict(milliseconds=1000 * seconds, gb_per_second=sent / seconds / 1e9),
    )


def _finish(tensor: torch.Tensor) -> None:
    """Wait for the device."""
    tensor[:1].item()
