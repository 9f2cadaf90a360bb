"""Runs a function on several gloo ranks, which meet over a file."""

import datetime
import gc
import tempfile
from pathlib import Path
from typing import Any, Callable, List, Tuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any
) -> List[Any]:
    """The results of ``function(rank, world_size, *args)`` on each rank.

    An exception on any rank is raised here, with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(
            _run_rank, (world_size, folder, function, args), nprocs=world_size
        )
        return [
            torch.load(Path(folder) / f'{rank}.pth', weights_only=False)
            for rank in range(world_size)
        ]


def _run_rank(
    rank: int,
    world_size: int,
    folder: str,
    function: Callable[..., Any],
    args: Tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo',
        init_method=f'file://{folder}/store',
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        result = function(rank, world_size, *args)
        torch.save(result, Path(folder) / f'{rank}.pth')
    finally:
        # models refer to themselves, and one that is left with its group
        # until Python ends may abort it
        gc.collect()
        dist.destroy_process_group()
