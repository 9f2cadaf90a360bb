"""What the hosting MMEngine and torch must have, checked and mended."""

from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pickle import UnpicklingError
from typing import Any, Callable

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


def mend() -> None:
    """Apply every repair of this file; none changes a run without AGVM."""
    allow_checkpoints()
    find_mmseg_bases()
    keep_gradients_of_checkpointed_modules()


def check_versions() -> None:
    """Raise ImportError if the host is older than what was developed for."""
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

    MMEngine looks up where the package mmsegmentation lies, and the fork's
    has another name. That of the module serves as well.
    """
    try:
        version('mmsegmentation')
    except PackageNotFoundError:
        if find_spec('mmseg') is not None:
            MODULE2PACKAGE['mmseg'] = 'mmseg'


def keep_gradients_of_checkpointed_modules() -> None:
    """Let MMEngine's ``activation_checkpointing`` train the first module too.

    It takes torch's reentrant checkpointing, which gives no gradient to a
    module whose inputs need none: a backbone, fed with images, silently
    stays as it was initialized.
    """
    activation_checkpointing.checkpoint = partial(
        checkpoint, use_reentrant=False
    )


def allow_checkpoints() -> None:
    """Let torch >= 2.6 load what MMEngine saves, and nothing more.

    Since 2.6 ``torch.load`` refuses every type that it does not know, and
    MMEngine 0.10.7 stores its logged scalars as :class:`HistoryBuffer`, over
    numpy arrays, and best scores as numpy numbers. These are declared safe;
    the check stays on.
    """
    if digit_version(torch.__version__) < digit_version('2.6.0'):
        return
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
            # where numpy 1 and where numpy 2 has them, whichever wrote
            (array, 'numpy.core.multiarray._reconstruct'),
            (scalar, 'numpy.core.multiarray.scalar'),
            (array, 'numpy._core.multiarray._reconstruct'),
            (scalar, 'numpy._core.multiarray.scalar'),
            # getattr itself would open every door
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
