"""What AGVM adds to the time of an update."""

import statistics
import time
from typing import Dict, List

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmagvm.checks.ranks import Ranks
from mmagvm.checks.running import Found
from mmagvm.core import AGVM, Settings, module_groups

#: Images and their side, by device.
INPUTS = {'cuda': (16, 224)}
SMALL = (4, 48)
ROUNDS = 10


class Network(nn.Module):
    """A plain convolutional network of 4.7 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Sequential(), nn.Linear(512, 10)
        channels = 3
        for width in (64, 128, 256, 512):
            for stride in (2, 1):
                self.backbone.append(nn.Conv2d(channels, width, 3, stride, 1))
                self.backbone.append(nn.ReLU())
                channels = width

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The loss of images."""
        logits: torch.Tensor = self.head(self.backbone(images).mean((2, 3)))
        return logits.logsumexp(1).mean()


class Trained:
    """A network in training, with AGVM or plain."""

    def __init__(self, ranks: Ranks, with_agvm: bool) -> None:
        torch.manual_seed(0)
        model = Network().to(ranks.device)
        self.model: nn.Module = model
        if ranks.world_size > 1:
            self.model = DistributedDataParallel(model)
        self.optimizer = torch.optim.SGD(
            module_groups(model), lr=0.01, momentum=0.9
        )
        self.agvm = None
        self.micro_batches = 1 if ranks.world_size > 1 else 2
        if with_agvm:
            # every other update is measured
            self.agvm = AGVM(
                self.optimizer,
                self.model,
                Settings(interval=2),
                self.micro_batches,
            )

    def seconds(self, images: torch.Tensor) -> float:
        """Of one update."""
        images[0, 0, 0, 0].item()  # waits for the device
        begin = time.perf_counter()
        for _ in range(self.micro_batches):
            if self.agvm is None:
                (self.model(images) / self.micro_batches).backward()
            else:
                with self.agvm.micro_batch():
                    (self.model(images) / self.micro_batches).backward()
        if self.agvm is None:
            self.optimizer.step()
        else:
            self.agvm.step()
        self.optimizer.zero_grad()
        next(self.model.parameters())[0, 0, 0, 0].item()
        return time.perf_counter() - begin


def time_of_updates(ranks: Ranks) -> Found:
    """Plain updates, measured and unmeasured ones, in turn."""
    count, side = INPUTS.get(ranks.device.type, SMALL)
    images = torch.randn(count, 3, side, side, device=ranks.device)
    plain, trained = Trained(ranks, False), Trained(ranks, True)
    seconds: Dict[str, List[float]] = dict(
        plain=[], measured=[], not_measured=[]
    )
    for _ in range(ROUNDS + 1):
        seconds['plain'].append(plain.seconds(images))
        seconds['measured'].append(trained.seconds(images))
        seconds['plain'].append(plain.seconds(images))
        seconds['not_measured'].append(trained.seconds(images))
    # the first round makes buffers and picks kernels
    usual = {
        name: statistics.median(times[len(times) // (ROUNDS + 1) :])
        for name, times in seconds.items()
    }
    added = {
        name: 100 * (usual[name] / usual['plain'] - 1)
        for name in ('measured', 'not_measured')
    }
    return (
        f'an update of a small network takes {1000 * usual["plain"]:.3g} ms; '
        f'a measured one {added["measured"]:+.1f} %, an unmeasured one '
        f'{added["not_measured"]:+.1f} % (medians of {ROUNDS}, noisy)',
        {
            'milliseconds': 1000 * usual['plain'],
            'measured_percent': added['measured'],
            'not_measured_percent': added['not_measured'],
        },
    )
