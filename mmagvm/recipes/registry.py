"""Registers this project's classes beside those of others."""

import logging
from typing import Any, Callable, List, TypeVar

from mmengine.registry import Registry

logger = logging.getLogger('mmagvm')
Registered = TypeVar('Registered', bound=Callable[..., Any])

#: What found its name taken, in a sentence each, for the log of a run.
taken: List[str] = []


def register(
    registry: Registry, name: str = '', instead_of: str = ''
) -> Callable[[Registered], Registered]:
    """A decorator that registers a class, unless its name is taken.

    What somebody else registered stays, with a warning, and this project's
    is found as ``mmagvm_<name>``. Importing this project twice is silent.

    Args:
        registry: Where.
        name: Defaults to that of the class.
        instead_of: A package whose class of that name is replaced, and found
            as ``Torch<name>`` from then on.
    """

    def decorate(ours: Registered) -> Registered:
        key = name or ours.__name__
        theirs = registry.module_dict.get(key)
        if theirs is not None and instead_of and _is_of(theirs, instead_of):
            if f'Torch{key}' not in registry.module_dict:
                registry.register_module(name=f'Torch{key}', module=theirs)
        elif theirs is not None and _full_name(theirs) != _full_name(ours):
            _tell_taken(registry, key, theirs, ours)
            key = f'mmagvm_{key}'
        registry.register_module(name=key, module=ours, force=True)
        return ours

    return decorate


def _tell_taken(registry: Registry, key: str, theirs: Any, ours: Any) -> None:
    sentence = (
        f'type={key!r} of the {registry.name}s is {_full_name(theirs)} in '
        f'this project and stays so: to have {_full_name(ours)}, write '
        f"type='mmagvm_{key}'"
    )
    if sentence not in taken:
        taken.append(sentence)
        logger.warning(sentence)


def _full_name(registered: Any) -> str:
    return f'{registered.__module__}.{registered.__qualname__}'


def _is_of(registered: Any, package: str) -> bool:
    return f'{registered.__module__}.'.startswith(f'{package}.')
