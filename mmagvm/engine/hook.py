"""Start-up checks and what is logged; no maths."""

from typing import Any, Dict, Iterable, List, Optional, Sequence

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.visualization import TensorboardVisBackend, Visualizer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from mmagvm.engine import host
from mmagvm.engine.lr_schedule import (
    fit_schedulers,
    warmup_updates,
)
from mmagvm.engine.optim_wrapper import AGVMOptimWrapper
from mmagvm.recipes.cgbn import CGBN
from mmagvm.recipes.lr_scaling import STUDY_RULES, find_rule
from mmagvm.version import full_version


@HOOKS.register_module()
class AGVMHook(Hook):
    """Tells at the start what AGVM will do, and logs what it does.

    Publishes after every iteration, for each module, the last measured
    ``agvm_variance/<module>`` (phi) and the ``agvm_lr_scale/<module>`` (mu)
    in force, with the estimator 'pairs' also the ``agvm_noise_scale/<module>``
    in images, all 1 until the first measurement, and ``agvm/measured`` and
    ``agvm/skipped``, the numbers of measurements that took effect and that
    were dropped. ``agvm_update_time/measured`` and ``.../unmeasured`` are the
    seconds that the last update of each kind took, data loading apart, once
    there was one.

    TensorBoard and W&B group by what is before the first slash: all modules
    of a quantity stand together. In TensorBoard's tab of custom scalars they
    share a chart.

    Raises:
        TypeError: The run's optimizer wrapper is not an AGVM one.
    """

    # before LoggerHook, which is BELOW_NORMAL
    priority = 'NORMAL'

    def __init__(self) -> None:
        self._seconds = 0.0  # of the update that is under way
        self._update_time: Dict[str, float] = {}
        self._attempts = 0

    def before_train(self, runner: Runner) -> None:
        """Check the setting and describe it in the log."""
        wrapper = runner.optim_wrapper
        if not isinstance(wrapper, AGVMOptimWrapper):
            raise TypeError(
                'AGVMHook: the optimizer wrapper of this run is '
                f'{type(wrapper).__name__}, which does not modulate anything '
                '(did --amp or --cfg-options replace optim_wrapper.type, or '
                'DeepSpeed the optimizer?): set '
                "optim_wrapper.type='AGVMOptimWrapper', in mixed precision "
                "'AGVMAmpOptimWrapper', or remove AGVMHook"
            )
        agvm, settings = wrapper.agvm, wrapper.settings
        wrapper.has_hook = True
        if not agvm.attached:  # by a FlexibleRunner without accumulation
            wrapper.initialize_count_status(
                runner.model, runner.iter, runner.max_iters
            )
        batch = dict(
            ranks=agvm.world_size,
            images_per_rank=images_per_rank(runner.train_dataloader),
            accumulative_counts=wrapper.accumulative_counts,
        )
        if agvm.batch and agvm.batch != batch:
            runner.logger.warning(
                f'AGVM: the checkpoint was trained with {agvm.batch}, this '
                f'run has {batch}; lr_scale goes on from where it was'
            )
        agvm.set_batch(batch)
        fit_schedulers(wrapper, runner.param_schedulers or [])
        self._attempts = agvm.attempts
        chart_modules_together(runner.visualizer, agvm.quantities())
        for line in describe(wrapper, runner):
            runner.logger.info(line)
        for repair in host.repairs:
            runner.logger.info(f'AGVM: repaired in the host: {repair}')
        warmup = warmup_updates(
            runner.param_schedulers or [],
            len(runner.train_dataloader),
            runner.max_iters,
            wrapper.accumulative_counts,
        )
        if settings.modulate and settings.begin < warmup:
            runner.logger.warning(
                f'AGVM: begin={settings.begin} measures from within warm-up, '
                f'which lasts {warmup} updates: in the first ones all samples '
                'pull alike, which AGVM takes for quiet modules, and raises '
                f'their learning rates: set optim_wrapper.begin={warmup} or '
                'more'
            )
        for name in useless_sync_bn(runner.model):
            runner.logger.warning(
                f'AGVM: {name} has SyncBN layers (or CGBN), but '
                'norm_eval=True keeps them in evaluation mode, where they '
                f'synchronise nothing: set norm_eval=False in {name}, or use '
                'BN'
            )

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Optional[Dict[str, Any]] = None,
    ) -> None:
        """Publish the scalars of the iteration."""
        wrapper = runner.optim_wrapper
        scalars = wrapper.agvm.scalars()
        self._time_update(runner)
        for kind, seconds in self._update_time.items():
            scalars[f'agvm_update_time/{kind}'] = seconds
        for name, value in scalars.items():
            key = f'train/{name}'
            # a buffer of all values would be copied at every new one
            runner.message_hub.log_scalars.setdefault(
                key, HistoryBuffer(max_length=1)
            )
            # resumed=False: or the series would go into checkpoints
            runner.message_hub.update_scalar(key, value, resumed=False)

    def _time_update(self, runner: Runner) -> None:
        """Add what IterTimerHook, if there is one, measured of an update.

        MMEngine logs means over iterations, which mix measured updates with
        others.
        """
        wrapper = runner.optim_wrapper
        timers = runner.message_hub.log_scalars
        if 'train/time' not in timers:
            return
        # what is waited for data includes the logging of the iteration before
        self._seconds += (
            timers['train/time'].current()
            - timers['train/data_time'].current()
        )
        if wrapper.should_update():
            known = self._attempts
            self._attempts = wrapper.agvm.attempts
            kind = 'unmeasured' if self._attempts == known else 'measured'
            self._update_time[kind] = self._seconds
            self._seconds = 0.0


def chart_modules_together(
    visualizer: Visualizer, names: Iterable[str]
) -> None:
    """Ask TensorBoard for one chart of all modules for each quantity."""
    if not is_main_process():
        return
    charts = {
        f'{quantity} by module': [
            'Multiline',
            [f'(train/)?agvm_{quantity}/.*'],
        ]
        for quantity in names
    }
    for backend in visualizer._vis_backends.values():
        if isinstance(backend, TensorboardVisBackend):
            backend.experiment.add_custom_scalars({'AGVM': charts})


def images_per_rank(dataloader: 'DataLoader[Any]') -> int:
    """Images that a data loader hands to a rank at once."""
    sampler = getattr(dataloader, 'batch_sampler', None)
    images = getattr(sampler, 'batch_size', None) or dataloader.batch_size or 1
    # mmdet's MultiDataAspectRatioBatchSampler has one for each data set
    return max(images) if isinstance(images, Sequence) else int(images)


def describe(wrapper: AGVMOptimWrapper, runner: Runner) -> List[str]:
    """What AGVM will do in this run, in lines for its log."""
    settings, batch = wrapper.settings, wrapper.agvm.batch
    batch_size = (
        batch['ranks']
        * batch['images_per_rank']
        * batch['accumulative_counts']
    )
    optimizer = type(wrapper.optimizer).__name__
    lr = wrapper.param_groups[-1].get(
        'initial_lr', wrapper.param_groups[-1]['lr']
    )
    dataset, rule = find_rule(
        optimizer, type(_innermost(runner.train_dataloader.dataset)).__name__
    )
    own = STUDY_RULES.get(optimizer)
    if rule is not None:
        advice = (
            f"the paper's rule for {dataset} gives {rule(batch_size):.4g} "
            f'({rule})'
        )
    elif own is not None:
        advice = (
            'the paper has no rule for it; this project gives '
            f'{own(batch_size):.4g} ({own}), not tried on COCO'
        )
    else:
        advice = 'the paper has no rule for it'
    effect = '' if settings.modulate else ', modulates nothing'
    until = '' if settings.end is None else f' to {settings.end}'
    lines = [
        f'AGVM: mmagvm {full_version()}',
        f'AGVM: batch size {batch_size} = {batch["ranks"]} ranks x '
        f'{batch["images_per_rank"]} images x {batch["accumulative_counts"]} '
        'accumulated micro-batches',
        f'AGVM: {optimizer} with learning rate {float(lr):.4g}; {advice}',
        f'AGVM: measures every {settings.interval} updates from update '
        f'{settings.begin}{until}; all modules follow '
        f'{wrapper.modulator.anchor}{effect}',
    ]
    for module in wrapper.modulator.modules:
        groups = [
            group
            for group in wrapper.optimizer.param_groups
            if group['module'] == module
        ]
        count = sum(p.numel() for group in groups for p in group['params'])
        lines.append(
            f'AGVM: module {module}: {count:,} parameters in '
            f'{len(groups)} group(s), lr_scale '
            f'{wrapper.modulator.lr_scale[module]:.3f}'
        )
    return lines


def useless_sync_bn(model: nn.Module) -> List[str]:
    """Names of submodules whose ``norm_eval`` disables SyncBN or CGBN."""
    model = getattr(model, 'module', model)
    return [
        name or type(model).__name__
        for name, module in model.named_modules()
        if getattr(module, 'norm_eval', False)
        and any(
            isinstance(layer, _BatchNorm)
            and ('Sync' in type(layer).__name__ or isinstance(layer, CGBN))
            for layer in module.modules()
        )
    ]


def _innermost(dataset: Any) -> Any:
    """The data set inside wrappers such as RepeatDataset."""
    while hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    return dataset
