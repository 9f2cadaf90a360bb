"""Names of the types in configs: strings, classes or lazy objects.

Old configs name classes by strings. Pure Python ones (``read_base``) hold the
classes themselves, and files that MMEngine dumps of them have full paths.
"""

from typing import Any

from mmengine.config import Config
from mmengine.config.lazy import LazyAttr, LazyObject


def type_path(kind: Any) -> str:
    """The string by which MMEngine's registries find the same class.

    Args:
        kind: A name, which stays as it is; a class, a function or a lazy
            object.
    """
    if kind is None or isinstance(kind, str):
        return kind or ''
    if isinstance(kind, (LazyAttr, LazyObject)):
        return f'{kind.module}.{kind}'
    if hasattr(kind, '__qualname__'):
        return f'{kind.__module__}.{kind.__qualname__}'
    return str(kind)


def type_name(kind: Any) -> str:
    """A type's name without package and module, ``''`` for None."""
    return type_path(kind).rpartition('.')[2]


def package_of(cfg: Config) -> str:
    """The package that a config is for, such as 'mmdet'; '' if unknown.

    It is the default scope. Pure Python configs have none: for them it is the
    package of the model's class.
    """
    scope = cfg.get('default_scope')
    if scope:
        return str(scope)
    kind = (cfg.get('model') or {}).get('type')
    return type_path(kind).rpartition('.')[0].partition('.')[0]


def with_strings(value: Any) -> Any:
    """A copy of a part of a config that names types by strings only."""
    if isinstance(value, dict):
        parts = dict.items(value)  # ConfigDict's would build lazy objects
        return {key: with_strings(item) for key, item in parts}
    if isinstance(value, (list, tuple)):
        return type(value)(with_strings(item) for item in value)
    if isinstance(value, (LazyAttr, LazyObject)) or (
        hasattr(value, '__qualname__') and hasattr(value, '__module__')
    ):
        return type_path(value)
    return value


def is_pure_python(cfg: Config) -> bool:
    """Whether a config holds types that are not strings.

    Such a config cannot be the ``_base_`` of one with strings.
    """
    names = cfg.to_dict()  # without what is merely imported
    return any(_has_types(dict.get(cfg._cfg_dict, key)) for key in names)


def _has_types(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_types(item) for item in dict.values(value))
    if isinstance(value, (list, tuple)):
        return any(_has_types(item) for item in value)
    return isinstance(value, (LazyAttr, LazyObject, type))


def import_types(value: Any) -> None:
    """Import all that a part of a config names lazily.

    Raises:
        ImportError: One of them does not exist.
    """
    if isinstance(value, dict):
        for item in dict.values(value):
            import_types(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            import_types(item)
    elif isinstance(value, (LazyAttr, LazyObject)):
        value.build()
