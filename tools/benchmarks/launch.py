"""Runs a benchmark's function on several ranks of this machine."""

import datetime
import gc
import tempfile
from pathlib import Path
from typing import Any, Callable, List, Tuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def launch(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    device: str = 'cpu',
    threads: int = 1,
) -> List[Any]:
    """The results of ``function(rank, device, *args)`` on each rank.

    An exception on any rank is raised here, with its traceback.

    Args:
        function: Of a module, to be found by other processes.
        world_size: Number of ranks.
        args: As ``function`` takes them.
        device: 'cpu', or 'cuda' for a GPU for each rank.
        threads: CPU threads of a rank.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(
            _run_rank,
            (world_size, folder, device, threads, function, args),
            nprocs=world_size,
        )
        return [
            torch.load(Path(folder) / f'{rank}.pth', weights_only=False)
            for rank in range(world_size)
        ]


def _run_rank(
    rank: int,
    world_size: int,
    folder: str,
    kind: str,
    threads: int,
    function: Callable[..., Any],
    args: Tuple[Any, ...],
) -> None:
    cuda = kind == 'cuda'
    device = torch.device('cuda', rank) if cuda else torch.device('cpu')
    torch.set_num_threads(threads)
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group(
        'nccl' if cuda else 'gloo',
        init_method=f'file://{folder}/store',
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(minutes=30),
    )
    try:
        result = function(rank, device, *args)
        torch.save(result, Path(folder) / f'{rank}.pth')
    finally:
        gc.collect()  # models refer to themselves and to the group
        dist.destroy_process_group()
