"""Registers this project's classes next to those of others."""

import logging
from functools import wraps
from typing import Any, Callable, List, TypeVar, Union

from mmengine.registry import Registry

logger = logging.getLogger('mmagvm')
Registered = TypeVar('Registered', bound=Callable[..., Any])

#: A sentence for each name that was taken, for the log of a run.
taken: List[str] = []


def register(
    registry: Registry, name: str = '', instead_of: str = ''
) -> Callable[[Registered], Registered]:
    """A decorator that registers a class, unless its name is taken.

    Another project's class keeps its name, even if it is registered later.
    Then this project's class is registered as ``mmagvm_<name>``, with a
    warning. Importing this project twice gives no warning.

    Args:
        registry: Where to register.
        name: Defaults to that of the class.
        instead_of: A package. Its class of that name is replaced, and
            registered as ``Torch<name>``.
    """

    def decorate(ours: Registered) -> Registered:
        key = name or ours.__name__
        theirs = registry.module_dict.get(key)
        if theirs is not None and instead_of and _is_of(theirs, instead_of):
            if f'Torch{key}' not in registry.module_dict:
                registry.register_module(name=f'Torch{key}', module=theirs)
        elif theirs is not None and _full_name(theirs) != _full_name(ours):
            _report_taken(registry, key, theirs, ours)
            key = f'mmagvm_{key}'
        registry.register_module(name=key, module=ours, force=True)
        _make_way(registry)
        return ours

    return decorate


def _make_way(registry: Registry) -> None:
    """Give up a name once another project registers it."""
    plain = registry._register_module
    if hasattr(plain, 'makes_way'):
        return

    @wraps(plain)
    def register_module(
        module: Any,
        module_name: Union[str, List[str], None] = None,
        force: bool = False,
    ) -> None:
        names = module_name or module.__name__
        for key in [names] if isinstance(names, str) else names:
            ours = registry.module_dict.get(key)
            if (
                ours is not None
                and _is_of(ours, 'mmagvm')
                and _full_name(ours) != _full_name(module)
            ):
                _report_taken(registry, key, module, ours)
                del registry.module_dict[key]
                plain(ours, f'mmagvm_{key}', True)
        plain(module, module_name, force)

    vars(register_module)['makes_way'] = True
    registry._register_module = register_module


def _report_taken(
    registry: Registry, key: str, theirs: Any, ours: Any
) -> None:
    sentence = (
        f'type={key!r} of the {registry.name}s stands for '
        f'{_full_name(theirs)} here: to use {_full_name(ours)}, write '
        f"type='mmagvm_{key}'"
    )
    if sentence not in taken:
        taken.append(sentence)
        logger.warning(sentence)


def _full_name(registered: Any) -> str:
    return f'{registered.__module__}.{registered.__qualname__}'


def _is_of(registered: Any, package: str) -> bool:
    return f'{registered.__module__}.'.startswith(f'{package}.')
