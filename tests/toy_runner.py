"""The toy as MMEngine's Runner trains it; configs can import this module."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any, Dict, List, Union

import torch
from mmengine.config import Config
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, MODELS
from mmengine.runner import Runner
from torch import nn
from toy import ToyDetector, wrapper_cfg

ITERATIONS = 8


@MODELS.register_module()
class ToyModel(BaseModel):
    """ToyDetector for the Runner."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, child in ToyDetector().named_children():
            self.add_module(name, child)
        self.scale = nn.Parameter(torch.ones(1))
        self.idle_head = False

    def forward(
        self, inputs: torch.Tensor, mode: str = 'loss'
    ) -> Dict[str, torch.Tensor]:
        return dict(loss=ToyDetector.forward(self, inputs))


@DATASETS.register_module()
class ToyDataset(torch.utils.data.Dataset[Dict[str, torch.Tensor]]):
    """Inputs that depend on their index alone."""

    def __len__(self) -> int:
        return 4 * ITERATIONS

    def __getitem__(self, index: int) -> Dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return dict(inputs=torch.randn(6, generator=generator))


@HOOKS.register_module()
class KillRank(Hook):
    """SIGKILLs the last rank in the backward of an update, but only once."""

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        if (runner.epoch, batch_idx, get_rank()) == (1, 3, 1) and os.environ[
            'TORCHELASTIC_RESTART_COUNT'
        ] == '0':
            weight = next(runner.model.parameters())
            # which shards know, too
            weight.register_post_accumulate_grad_hook(
                lambda param: os.kill(os.getpid(), signal.SIGKILL)
            )


@HOOKS.register_module()
class CutLink(Hook):
    """Has the last rank run the command CUT_LINK in the second epoch."""

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        last = get_world_size() - 1
        if (runner.epoch, batch_idx, get_rank()) == (1, 1, last):
            subprocess.run(os.environ.get('CUT_LINK', 'true').split())


def toy_cfg(
    work_dir: Union[str, Path],
    optimizer: str = 'SGD',
    max_epochs: int = 2,
    **settings: Any,
) -> Config:
    settings = {
        **dict(accumulative_counts=2, interval=1, ema_decay=0.5, begin=1),
        **settings,
    }
    return Config(
        dict(
            model=dict(type='ToyModel'),
            work_dir=str(work_dir),
            train_dataloader=dict(
                batch_size=4,
                num_workers=0,
                sampler=dict(type='DefaultSampler', shuffle=True),
                collate_fn=dict(type='default_collate'),
                dataset=dict(type='ToyDataset'),
            ),
            train_cfg=dict(by_epoch=True, max_epochs=max_epochs),
            optim_wrapper=wrapper_cfg(optimizer, **settings),
            param_scheduler=[
                dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=5),
                dict(type='MultiStepLR', by_epoch=True, milestones=[1]),
            ],
            custom_hooks=[dict(type='AGVMHook')],
            default_hooks=dict(
                logger=dict(type='LoggerHook', interval=1),
                checkpoint=dict(type='CheckpointHook', interval=1),
            ),
            visualizer=dict(
                type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]
            ),
            randomness=dict(seed=0),
            # MMEngine keeps one visualizer per name for the whole process
            experiment_name=str(work_dir).replace('/', '_'),
        )
    )


@HOOKS.register_module()
class PowerCut(Hook):
    """Ends a run in its second epoch, after the first one's checkpoint."""

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        if runner.epoch == 1 and batch_idx == 3:
            raise RuntimeError('power cut')


def run(cfg: Config) -> Runner:
    """Train as a config says."""
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def train_lines(runner: Runner) -> List[Dict[str, Any]]:
    """What a run logged, line by line."""
    scalars = Path(runner.log_dir) / 'vis_data' / 'scalars.json'
    return [json.loads(text) for text in scalars.read_text().splitlines()]


def log_of(runner: Runner) -> str:
    """The text log of a run."""
    return next(Path(runner.log_dir).glob('*.log')).read_text()
