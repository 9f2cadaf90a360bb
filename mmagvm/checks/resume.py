"""Whether a resumed run ends like one without a break."""

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Dict

import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import Dataset

import mmagvm  # noqa: F401  registers AGVM
from mmagvm.checks.ranks import Ranks
from mmagvm.checks.result import CheckFailedError
from mmagvm.checks.running import Found

IMAGES = 2  # of a rank in an iteration
ITERATIONS = 8  # in each of two epochs
#: Of weights, relative to their norm, and of lr_scale.
TOLERANCE = 1e-5


class Model(BaseModel):
    """Three modules, without kernels that sum in arbitrary order."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(8, 16)
        self.neck = nn.Linear(16, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, inputs: Tensor, mode: str = 'loss') -> Dict[str, Tensor]:
        """The loss of inputs (n, 8)."""
        x = self.neck(self.backbone(inputs).tanh()).tanh()
        return dict(loss=self.head(x).exp().mean())


class Inputs(Dataset[Dict[str, Tensor]]):
    """Inputs that depend on their index alone."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return dict(inputs=torch.randn(8, generator=generator))


def resumed_run(ranks: Ranks, work_dir: Path) -> Found:
    """Two epochs in one go, and with a break after the first.

    Args:
        ranks: All ranks, each of which trains.
        work_dir: Shared by all nodes.
    """
    whole = _train(ranks, work_dir / 'whole')
    # written by rank 0, and read by every rank
    middle = work_dir / 'whole/epoch_1.pth'
    sees = ranks.gather('sees the checkpoint', middle.exists())
    if not all(sees):
        raise CheckFailedError(
            f'rank {sees.index(False)} does not see {middle.resolve()}, which '
            'rank 0 wrote: choose a --work-dir that all nodes share, also for '
            'training'
        )
    resumed = _train(
        ranks, work_dir / 'resumed', resume=True, load_from=str(middle)
    )
    largest = max(
        float((resumed['weights'][name] - weight).abs().max() / weight.norm())
        for name, weight in whole['weights'].items()
    )
    off = max(
        abs(resumed['lr_scale'][module] - scale)
        for module, scale in whole['lr_scale'].items()
    )
    if not (largest <= TOLERANCE and off <= TOLERANCE):
        raise CheckFailedError(
            f'after resuming, weights are off by {largest:.1g} and lr_scale '
            f'by {off:.1g}: do not resume runs here, and report it with the '
            'JSON file'
        )
    same = 'bitwise' if largest == off == 0 else f'within {TOLERANCE:g}'
    return (
        'a run resumed from its checkpoint ends with the weights and lr_scale '
        f'of a run without a break, {same}',
        dict(weights_off=largest, lr_scale_off=off),
    )


def _train(ranks: Ranks, work_dir: Path, **settings: Any) -> Dict[str, Any]:
    torch.manual_seed(0)
    accumulation = 1 if ranks.world_size > 1 else 2
    cfg: Dict[str, Any] = {}
    if ranks.model_wrapper_cfg is not None:
        cfg['model_wrapper_cfg'] = ranks.model_wrapper_cfg
    runner = Runner(
        model=Model(),
        work_dir=str(work_dir),
        train_dataloader=dict(
            batch_size=IMAGES,
            num_workers=0,
            sampler=dict(type='DefaultSampler', shuffle=True),
            collate_fn=dict(type='default_collate'),
            dataset=Inputs(IMAGES * ITERATIONS * ranks.world_size),
        ),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=dict(
            type='AGVMOptimWrapper',
            constructor='AGVMOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=0.01),
            accumulative_counts=accumulation,
            **dict(interval=1, begin=2, ema_decay=0.5),
        ),
        param_scheduler=dict(type='LinearLR', start_factor=0.1, end=4),
        custom_hooks=[dict(type='AGVMHook')],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        launcher='none' if ranks.world_size == 1 else 'pytorch',
        log_level='ERROR',
        randomness=dict(seed=0),
        # MMEngine keeps loggers and visualizers by this name
        experiment_name=f'check_setup_{work_dir.name}',
        cfg=cfg,
        **settings,
    )
    with redirect_stdout(io.StringIO()):  # hides the name of the checkpoint
        model = runner.train()
    state = runner.optim_wrapper.state_dict()['agvm']
    weights = {
        name.removeprefix('module.'): value.detach().cpu().double()
        for name, value in model.state_dict().items()
    }
    return dict(weights=weights, lr_scale=state['lr_scale'])
