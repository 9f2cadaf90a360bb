"""Time of the optimizer step: merged groups, or one for each parameter."""

import time
from typing import Any, Dict, List

import torch
from mmengine.optim import OptimWrapper, build_optim_wrapper
from torch import nn

import mmagvm  # noqa: F401  registers everything
from benchmarks.benchmark_models import build_model
from mmagvm.analysis.statistics import ratio_summary, summary

#: Models whose own config has a paramwise_cfg, with AdamW.
MODELS = {
    'Mask R-CNN Swin-T': 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    'Mask2Former R50': 'mmdet::mask2former/'
    'mask2former_r50_8xb2-lsj-50e_coco.py',
}
AGVM = dict(type='AGVMOptimWrapper', constructor='AGVMOptimWrapperConstructor')


def wrappers_of(
    model: nn.Module, cfg: Dict[str, Any], foreach: Any
) -> Dict[str, OptimWrapper]:
    """Plain and AGVM wrappers of the same parameters, without clipping."""
    optimizer = dict(cfg['optimizer'], foreach=foreach)
    cfg = dict(cfg, clip_grad=None, optimizer=optimizer)
    return dict(
        plain=build_optim_wrapper(model, dict(cfg)),
        agvm=build_optim_wrapper(model, dict(cfg, **AGVM)),
    )


def time_steps(
    wrappers: Dict[str, OptimWrapper], repetitions: int
) -> Dict[str, List[float]]:
    """Seconds of each ``optimizer.step()``, the wrappers taking turns."""
    seconds: Dict[str, List[float]] = {name: [] for name in wrappers}
    for repetition in range(-2, repetitions):  # two to create the state
        order = list(wrappers)
        if repetition % 2:
            order.reverse()
        for name in order:
            _synchronize()
            start = time.perf_counter()
            wrappers[name].optimizer.step()
            _synchronize()
            if repetition >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_groups(
    repetitions: int, device: str = 'cpu'
) -> List[Dict[str, Any]]:
    """A row for each model and implementation of the step."""
    rows = []
    for name, config in MODELS.items():
        model, cfg = build_model(config)
        model = model.to(device)
        for param in model.parameters():
            param.grad = torch.randn_like(param) * 1e-3
        for foreach in (None, True):
            print(f'optimizer step: {name}, foreach={foreach}', flush=True)
            wrappers = wrappers_of(model, cfg.optim_wrapper, foreach)
            seconds = time_steps(wrappers, repetitions)
            rows.append(
                dict(
                    model=name,
                    foreach=foreach,
                    groups={
                        key: len(wrapper.optimizer.param_groups)
                        for key, wrapper in wrappers.items()
                    },
                    seconds={k: summary(v) for k, v in seconds.items()},
                    speedup=ratio_summary(seconds['plain'], seconds['agvm']),
                )
            )
    return rows
