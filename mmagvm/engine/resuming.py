"""What a resumed run is told, and what it is spared."""

from typing import Any, Dict, Optional

from mmengine.runner import Runner

from mmagvm.engine.optim_wrapper import AGVMOptimWrapper

#: How the keys begin that are logged and never saved.
OWN_KEYS = 'train/agvm'


def forget_own_keys(checkpoint: Dict[str, Any]) -> None:
    """Let a checkpoint not name log keys that it has no values of.

    MMEngine would warn of each one when it resumes from it.
    """
    hub = checkpoint.get('message_hub')
    if isinstance(hub, dict) and 'resumed_keys' in hub:
        hub['resumed_keys'] = {
            key: value
            for key, value in hub['resumed_keys'].items()
            if not key.startswith(OWN_KEYS)
        }


def started_without_state(
    wrapper: AGVMOptimWrapper, runner: Runner
) -> Optional[str]:
    """What begins anew, though training goes on from a checkpoint."""
    optimizer = wrapper.optimizer
    if (
        runner.iter == 0
        or wrapper.has_loaded
        or any(optimizer.state.values())  # goes on in the same process
    ):
        return None
    return (
        f'training goes on at iteration {runner.iter}, but no state of the '
        'optimizer was loaded: every lr_scale starts at 1, and '
        f'{type(optimizer).__name__} as at the start of a training; if that '
        'is not wanted, resume from a checkpoint that has one, which '
        'CheckpointHook saves with save_optimizer=True'
    )
