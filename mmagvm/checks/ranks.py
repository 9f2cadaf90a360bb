"""The ranks that are checked, and how they exchange results."""

import json
import os
import time
from dataclasses import dataclass
from typing import Any, List, Optional

import torch
import torch.distributed as dist
from mmengine.device import get_device

#: Seconds between two polls for the result of another rank.
PAUSE = 0.02


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those that are checked.

    Args:
        rank: Of this process, from 0.
        world_size: Processes in all.
        per_node: Processes on each node.
        store: Where they exchange results; it works even where collectives
            hang.
        model_wrapper_cfg: How MMEngine wraps models. None for its default.
    """

    rank: int
    world_size: int
    per_node: int
    store: dist.Store
    model_wrapper_cfg: Optional[Any] = None

    @classmethod
    def here(
        cls,
        store: Optional[dist.Store] = None,
        model_wrapper_cfg: Optional[Any] = None,
    ) -> 'Ranks':
        """Of the default process group, or of this process alone.

        Args:
            store: Of torchrun; needed if there is a group.
            model_wrapper_cfg: As above.
        """
        if not dist.is_initialized():
            return cls(0, 1, 1, store or dist.HashStore())
        assert store is not None
        world_size = dist.get_world_size()
        return cls(
            dist.get_rank(),
            world_size,
            int(os.environ.get('LOCAL_WORLD_SIZE', world_size)),
            store,
            model_wrapper_cfg,
        )

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        name = get_device()
        if name == 'cuda':
            return torch.device(name, torch.cuda.current_device())
        return torch.device(name)

    @property
    def nodes(self) -> int:
        """Machines, as the launcher counts them."""
        return self.world_size // self.per_node

    @property
    def of_node(self) -> List[int]:
        """The ranks of this one's node."""
        first = self.rank // self.per_node * self.per_node
        return list(range(first, first + self.per_node))

    def report(self, key: str, value: Any) -> None:
        """Send a value that JSON can hold to the others."""
        self.store.set(f'{key}/{self.rank}', json.dumps(value))

    def reported(self, key: str) -> List[Any]:
        """What each rank has sent so far, None for nothing."""
        return [
            json.loads(self.store.get(f'{key}/{rank}'))
            if self.store.check([f'{key}/{rank}'])
            else None
            for rank in range(self.world_size)
        ]

    def gather(self, key: str, value: Any) -> List[Any]:
        """What all ranks sent, once all have.

        Args:
            key: Used once only.
            value: One that JSON can hold, but not None.
        """
        self.report(key, value)
        keys = [f'{key}/{rank}' for rank in range(self.world_size)]
        # not store.wait, which would block the store for other threads
        while not self.store.check(keys):
            time.sleep(PAUSE)
        return self.reported(key)
