"""Checks and repairs of the installed MMEngine and torch.

Each repair is made only where the installed version needs it. It is reported
once in the log of a run with AGVM, and changes no training without AGVM.
"""

from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pickle import UnpicklingError
from typing import Any, Callable, List

import mmengine
import numpy as np
import torch
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import HistoryBuffer
from mmengine.runner import activation_checkpointing
from mmengine.utils import digit_version
from torch.utils.checkpoint import checkpoint

MMENGINE_MINIMUM = '0.10.0'
TORCH_MINIMUM = '2.1.0'
#: Methods that a HistoryBuffer names in its pickle.
STATISTICS = ('min', 'max', 'current', 'mean')


#: What was repaired, for the log, with the report of the fault if any.
repairs: List[str] = []


def repair_at_import() -> None:
    """Make the repairs needed before a config or checkpoint is read."""
    allow_checkpoints()
    find_mmseg_bases()


def check_versions() -> None:
    """Raise ImportError if MMEngine or torch is older than supported."""
    for name, installed, minimum in (
        ('mmengine', mmengine.__version__, MMENGINE_MINIMUM),
        ('torch', torch.__version__, TORCH_MINIMUM),
    ):
        if digit_version(installed) < digit_version(minimum):
            raise ImportError(
                f'mmagvm needs {name} >= {minimum}, but '
                f'{installed} is installed: upgrade {name}'
            )


def find_mmseg_bases() -> None:
    """Let ``mmseg::`` bases be found in the onedl fork, as upstream's are.

    MMEngine looks up the location of the package mmsegmentation, which has
    another name in the fork. The module's name serves as well.
    """
    try:
        version('mmsegmentation')
    except PackageNotFoundError:
        if find_spec('mmseg') is not None:
            MODULE2PACKAGE['mmseg'] = 'mmseg'
            _note("'mmseg::' bases are found in the onedl fork")


def keep_gradients_of_checkpointed_modules() -> None:
    """Let MMEngine's ``activation_checkpointing`` train the first module too.

    MMEngine uses torch's reentrant checkpointing, which gives no gradient to a
    module whose inputs need none. A backbone, which gets images, silently
    stays as it was initialized. The repair is made when AGVM's optimizer
    wrapper is built.
    """
    if activation_checkpointing.checkpoint is checkpoint:  # torch's, unchanged
        activation_checkpointing.checkpoint = partial(
            checkpoint, use_reentrant=False
        )
        _note(
            'activation_checkpointing trains the first module, '
            'https://github.com/open-mmlab/mmengine/issues/1425'
        )


def allow_checkpoints() -> None:
    """Let torch >= 2.6 load what MMEngine saves, and nothing more.

    Since 2.6 ``torch.load`` refuses every type that it does not know. MMEngine
    0.10.7 stores its logged scalars as :class:`HistoryBuffer`, over numpy
    arrays, and best scores as numpy numbers. These are declared safe; the
    check stays on.
    """
    if digit_version(torch.__version__) < digit_version('2.6.0'):
        return
    _note(
        'checkpoints can be loaded on torch 2.6 and later, '
        'https://github.com/open-mmlab/mmengine/issues/1655'
    )
    array: Any = np.zeros(1).__reduce__()[0]
    scalar: Any = np.float64(0).__reduce__()[0]
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            np.ndarray,
            np.dtype,
            array,
            scalar,
            *(type(np.dtype(kind)) for kind in ('f4', 'f8', 'i4', 'i8', 'b1')),
            # their paths in numpy 1 and numpy 2, whichever wrote the file
            (array, 'numpy.core.multiarray._reconstruct'),
            (scalar, 'numpy.core.multiarray.scalar'),
            (array, 'numpy._core.multiarray._reconstruct'),
            (scalar, 'numpy._core.multiarray.scalar'),
            # getattr itself would give access to everything
            (_statistics_method, 'builtins.getattr'),
        ]
    )


def _statistics_method(owner: Any, name: str) -> Callable[..., Any]:
    """The one use that a HistoryBuffer's pickle makes of getattr."""
    if owner is not HistoryBuffer or name not in STATISTICS:
        raise UnpicklingError(
            f'the checkpoint asks for {name!r} of {owner!r}, which no '
            'MMEngine checkpoint contains: it may be malicious'
        )
    return getattr(HistoryBuffer, name)  # type: ignore[no-any-return]


def _note(repair: str) -> None:
    if repair not in repairs:
        repairs.append(repair)
