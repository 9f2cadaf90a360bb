"""What a rank holds of a tensor that may be sharded."""

from typing import Any

from torch import Tensor


def is_sharded(param: Tensor) -> bool:
    """Whether a parameter is a DTensor, of which this rank holds a part."""
    return 'DTensor' in {cls.__name__ for cls in type(param).__mro__}


def local_part(tensor: Any) -> Tensor:
    """What this rank holds of a tensor: all, unless it is sharded."""
    part: Tensor = tensor.to_local() if hasattr(tensor, 'to_local') else tensor
    return part
