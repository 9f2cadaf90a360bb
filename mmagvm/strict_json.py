"""JSON that every reader accepts, without the NaN that Python writes."""

import json
from typing import Any


def to_json(value: Any, **options: Any) -> str:
    """A value as JSON, with null for NaN and infinity.

    Args:
        value: Made of dicts, lists, strings, numbers and None.
        options: Options of ``json.dumps``.
    """
    return json.dumps(without_nan(value), allow_nan=False, **options)


def without_nan(value: Any) -> Any:
    """A value with None in place of NaN and infinity."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not abs(value) < float('inf'):
        return None
    return value
