"""Gives and avoids warnings when a run is resumed."""

from typing import Any, Dict, Optional

from mmengine.runner import Runner

from mmagvm.engine.optim_wrapper import AGVMOptimWrapper

#: Prefix of the keys that are logged and never saved.
OWN_KEYS = 'train/agvm'


def forget_own_keys(checkpoint: Dict[str, Any]) -> None:
    """Remove log keys of AGVM, which have no values in a checkpoint.

    MMEngine would warn of each one when it resumes from the checkpoint.
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
    """What starts from scratch although training continues."""
    optimizer = wrapper.optimizer
    if (
        runner.iter == 0
        or wrapper.has_loaded
        or any(optimizer.state.values())  # continues in the same process
    ):
        return None
    return (
        f'training continues at iteration {runner.iter}, but no state of the '
        'optimizer was loaded: every lr_scale starts at 1, and '
        f'{type(optimizer).__name__} starts without state. To avoid this, '
        'resume from a checkpoint with one, which CheckpointHook saves with '
        'save_optimizer=True'
    )
