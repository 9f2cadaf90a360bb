"""Start-up checks and logging; the core does the computations."""

from typing import Any, Dict, Iterable, List, Optional

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.visualization import TensorboardVisBackend, Visualizer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmagvm.engine import host
from mmagvm.engine.batch_size import batch_sizes, count_images
from mmagvm.engine.due import never_dropped, nothing_measured, too_few_due
from mmagvm.engine.lr_schedule import (
    fit_schedulers,
    warmup_updates,
)
from mmagvm.engine.optim_wrapper import AGVMOptimWrapper
from mmagvm.engine.resuming import forget_own_keys, started_without_state
from mmagvm.recipes.cgbn import CGBN
from mmagvm.recipes.lr_scaling import STUDY_RULES, find_rule
from mmagvm.recipes.registry import register, taken
from mmagvm.version import full_version


@register(HOOKS)
class AGVMHook(Hook):
    """Logs at the start what AGVM will do, and then its values.

    After every iteration it publishes for each module the last measured
    ``agvm_variance/<module>`` (phi) and the ``agvm_lr_scale/<module>`` (mu)
    in force. With the estimator 'pairs' it also publishes
    ``agvm_noise_scale/<module>`` in images. All are 1 until the first
    measurement. ``agvm/measured`` and ``agvm/skipped`` are the numbers of
    measurements that took effect and that were dropped.
    ``agvm_update_time/measured`` and ``.../unmeasured`` are the seconds that
    the last update of each kind took, without data loading, once there was
    one.

    TensorBoard and W&B group series by the part before the first slash, so
    all modules of a quantity are together. In TensorBoard's tab of custom
    scalars they share a chart.

    Raises:
        TypeError: The run's optimizer wrapper is not an AGVM one.
    """

    # before LoggerHook, which is BELOW_NORMAL
    priority = 'NORMAL'

    def __init__(self) -> None:
        self._seconds = 0.0  # of the current update
        self._update_time: Dict[str, float] = {}
        self._attempts = 0
        self._measured = 0
        self._first = (0, 0)  # update and iteration of this start
        self._count_images = False  # of the first batch that arrives

    def before_train(self, runner: Runner) -> None:
        """Check the setting and describe it in the log."""
        wrapper = runner.optim_wrapper
        if not isinstance(wrapper, AGVMOptimWrapper):
            if hasattr(wrapper, 'optim_wrappers'):
                raise TypeError(
                    'AGVMHook: optim_wrapper has several, '
                    f'{list(wrapper.optim_wrappers)}, but AGVM modulates one '
                    'optimizer of the whole model: write a single '
                    'optim_wrapper, or remove AGVMHook'
                )
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
        fit_schedulers(wrapper, runner.param_schedulers or [])
        self._attempts = agvm.attempts
        self._measured = agvm.modulator.measured
        self._first = agvm.update, runner.iter
        chart_modules_together(runner.visualizer, agvm.quantities())
        runner.logger.info(f'AGVM: mmagvm {full_version()}')
        sizes = batch_sizes(runner.train_dataloader)
        self._count_images = not sizes
        if sizes:
            self._settle_batch(runner, sizes)
        else:
            runner.logger.info(
                'AGVM: batch size: the data loader does not state it; it is '
                'counted in the first batch'
            )
        for line in describe(wrapper):
            runner.logger.info(line)
        to_come = runner.max_iters - runner.iter
        for warning in (
            too_few_due(agvm, to_come // wrapper.accumulative_counts),
            forgotten_accumulation(wrapper, runner),
            started_without_state(wrapper, runner),
            *taken,
        ):
            if warning is not None:
                runner.logger.warning(f'AGVM: {warning}')
        for repair in host.repairs:
            runner.logger.info(f'AGVM: repaired in MMEngine: {repair}')
        warmup = warmup_updates(
            runner.param_schedulers or [],
            len(runner.train_dataloader),
            runner.max_iters,
            wrapper.accumulative_counts,
        )
        if settings.modulate and settings.begin < warmup:
            runner.logger.warning(
                f'AGVM: begin={settings.begin} starts to measure in warm-up, '
                f'which lasts {warmup} updates. In the first ones all samples '
                'have similar gradients, so AGVM finds low-variance modules '
                'and raises their learning rates: set '
                f'optim_wrapper.begin={warmup} or more'
            )
        for name in useless_sync_bn(runner.model):
            runner.logger.warning(
                f'AGVM: {name} has SyncBN layers (or CGBN), but '
                'norm_eval=True keeps them in evaluation mode, where they do '
                f'not synchronize: set norm_eval=False in {name}, or use '
                'BN'
            )

    def before_save_checkpoint(
        self, runner: Runner, checkpoint: Dict[str, Any]
    ) -> None:
        """Leave out the names of AGVM's log keys, as values are not saved."""
        forget_own_keys(checkpoint)

    def after_load_checkpoint(
        self, runner: Runner, checkpoint: Dict[str, Any]
    ) -> None:
        """The same for a checkpoint that has them."""
        forget_own_keys(checkpoint)

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None
    ) -> None:
        """Count the images of the first batch, if the size is unknown."""
        if self._count_images:
            self._count_images = False
            images = count_images(data_batch)
            self._settle_batch(runner, [] if images is None else [images])

    def _settle_batch(self, runner: Runner, images: List[int]) -> None:
        """Set the composition of the batch, and log it.

        Args:
            runner: The runner of this run.
            images: All numbers of images that a rank may get at once; empty
                if unknown.
        """
        wrapper = runner.optim_wrapper
        agvm = wrapper.agvm
        batch = dict(
            ranks=agvm.world_size,
            images_per_rank=images[0] if len(images) == 1 else None,
            accumulative_counts=wrapper.accumulative_counts,
        )
        before = {key: agvm.batch[key] for key in batch if agvm.batch}
        if before and before != batch:
            runner.logger.warning(
                f'AGVM: the checkpoint was trained with {before}, this '
                f'run has {batch}; lr_scale keeps its values'
            )
        agvm.set_batch(batch)
        for line in describe_batch(wrapper, runner, images):
            runner.logger.info(line)

    def after_train(self, runner: Runner) -> None:
        """Log why updates were not measured, and warn if none was.

        Warn of a setting that changed nothing, too.
        """
        wrapper = runner.optim_wrapper
        agvm = wrapper.agvm
        update, iteration = self._first
        nothing = nothing_measured(
            agvm,
            update,
            (runner.iter - iteration) // wrapper.accumulative_counts,
        )
        missed = agvm.why_missed()
        if agvm.modulator.measured == self._measured:
            if nothing is not None:
                runner.logger.warning(f'AGVM: {nothing}')
        elif missed:
            runner.logger.info(
                f'AGVM: updates that were due are not measured: {missed}'
            )
        useless = never_dropped(agvm)
        if useless is not None:
            runner.logger.warning(f'AGVM: {useless}')

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
        # without signal there is no noise scale: remove an older one
        for module in wrapper.modulator.modules:
            name = f'agvm_noise_scale/{module}'
            if name not in scalars:
                runner.message_hub.log_scalars.pop(f'train/{name}', None)
        for name, value in scalars.items():
            key = f'train/{name}'
            # a buffer of all values would be copied at every new one
            runner.message_hub.log_scalars.setdefault(
                key, HistoryBuffer(max_length=1)
            )
            # resumed=False keeps the series out of checkpoints
            runner.message_hub.update_scalar(key, value, resumed=False)

    def _time_update(self, runner: Runner) -> None:
        """Add up the time of an update, if there is an IterTimerHook.

        MMEngine logs means over iterations, which mix measured updates with
        others.
        """
        wrapper = runner.optim_wrapper
        timers = runner.message_hub.log_scalars
        if 'train/time' not in timers:
            return
        # the wait for data includes the logging of the iteration before
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


def forgotten_accumulation(
    wrapper: AGVMOptimWrapper, runner: Runner
) -> Optional[str]:
    """What to set where MMEngine's auto_scale_lr ignores accumulation."""
    auto = getattr(runner, 'auto_scale_lr', None) or {}
    count = wrapper.accumulative_counts
    sizes = batch_sizes(runner.train_dataloader)
    if not auto.get('enable') or count == 1 or not sizes:
        return None
    base, batch = auto['base_batch_size'], runner.world_size * sizes[0]
    return (
        f'auto_scale_lr with base_batch_size={base} has multiplied the '
        f'learning rate by {batch / base:.4g}, for {batch} images, but '
        f'ignores accumulative_counts={count}. An update has {batch * count} '
        f'images, and the factor would be {batch * count / base:.4g}: set '
        f'auto_scale_lr.base_batch_size={base / count:.6g}, or '
        f'optim_wrapper.optimizer.lr to {count} times its value'
    )


def describe_batch(
    wrapper: AGVMOptimWrapper, runner: Runner, images: List[int]
) -> List[str]:
    """The batch and the learning rate for it, as lines for the log.

    Args:
        wrapper: The optimizer wrapper of this run.
        runner: The runner of this run.
        images: As in :meth:`AGVMHook._settle_batch`.
    """
    batch = wrapper.agvm.batch
    known = len(images) == 1
    size = (
        (batch['ranks'] or 1) * images[0] * wrapper.accumulative_counts
        if known
        else 0
    )
    optimizer = type(wrapper.optimizer).__name__
    lr = wrapper.param_groups[-1].get(
        'initial_lr', wrapper.param_groups[-1]['lr']
    )
    dataset, rule = find_rule(
        optimizer, type(innermost(runner.train_dataloader.dataset)).__name__
    )
    own = STUDY_RULES.get(optimizer)
    if not known:
        advice = 'there is no advice for an unknown batch size'
    elif rule is not None:
        advice = (
            f"the paper's rule for {dataset} gives {rule(size):.4g} ({rule})"
        )
    elif own is not None:
        advice = (
            'the paper has no rule for it; this project gives '
            f'{own(size):.4g} ({own}), not tested on COCO'
        )
    else:
        advice = 'the paper has no rule for it'
    each = ' or '.join(map(str, images)) or 'an unknown number of'
    note = '' if known else ', so no noise scale is logged'
    return [
        f'AGVM: batch size {size or "unknown"} = {batch["ranks"]} ranks x '
        f'{each} images x {wrapper.accumulative_counts} accumulated '
        f'micro-batches{note}',
        f'AGVM: {optimizer} with learning rate {float(lr):.4g}; {advice}',
    ]


def describe(wrapper: AGVMOptimWrapper) -> List[str]:
    """What AGVM measures in this run, and when, as lines for the log."""
    settings = wrapper.settings
    effect = '' if settings.modulate else ', modulates nothing'
    until = '' if settings.end is None else f' to {settings.end}'
    lines = [
        f'AGVM: measures every {settings.interval} updates from update '
        f'{settings.begin}{until}; all modules follow '
        f'{wrapper.modulator.anchor}{effect}',
    ]
    if settings.restart_at_lr_drop:
        lines.append(
            'AGVM: the moving averages of lr_scale restart when the learning '
            'rate drops below half of its highest value'
        )
    if settings.bound_by_grad_norm:
        lines.append(
            'AGVM: the ratio of a module is divided by the growth of its '
            "gradient norm, relative to the anchor's"
        )
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
    frozen = sum(
        param.numel()
        for group in wrapper.optimizer.param_groups
        if group['module'] is None
        for param in group['params']
    )
    if frozen:
        lines.append(f'AGVM: in no module: {frozen:,} frozen parameters')
    return lines


def useless_sync_bn(model: nn.Module) -> List[str]:
    """Names of submodules where ``norm_eval`` disables SyncBN or CGBN."""
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


def innermost(dataset: Any) -> Any:
    """The data set inside wrappers such as RepeatDataset.

    If several of one class are joined, it is the first one.
    """
    while True:
        parts = getattr(dataset, 'datasets', None) or []
        if hasattr(dataset, 'dataset'):
            dataset = dataset.dataset
        elif len({type(innermost(part)) for part in parts}) == 1:
            dataset = parts[0]
        else:
            return dataset
