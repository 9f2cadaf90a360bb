"""The content of wrappers: of models, optimizers, communication hooks."""

from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, Iterable, Iterator, List, Mapping

import torch
from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without data-parallel wrappers and compilers.

    Args:
        model: In any number of wrappers, such as torch.compile's inside
            DistributedDataParallel or around it.
    """
    inner = getattr(model, 'module', model)
    while isinstance(inner, nn.Module):
        model = inner
        # torch.compile's; other wrappers hold nothing but the model
        children = dict(model.named_children())
        inner = children.get('_orig_mod')
        if inner is None and len(children) == 1:
            inner = children.get('module')
    return model


def uncompiled(model: nn.Module) -> nn.Module:
    """The model as it was given to torch.compile, if it was."""
    inner: Any = model
    while isinstance(inner, nn.Module):
        model = inner
        inner = getattr(model, '_orig_mod', None)
    return model


def modules_in(model: Any) -> Iterator[Any]:
    """A model and all modules in it.

    Args:
        model: May be a wrapper that is not a module; MMEngine has some.
    """
    if isinstance(model, nn.Module):
        yield from model.modules()
        return
    yield model
    for part in _held_by(model):
        if isinstance(part, nn.Module):
            yield from part.modules()


def optimizers_in(
    optimizer: torch.optim.Optimizer,
) -> List[torch.optim.Optimizer]:
    """An optimizer, and those that it wraps, as Lookahead does."""
    found = [optimizer]
    for outer in found:
        for inner in _held_by(outer):
            if isinstance(inner, torch.optim.Optimizer) and not any(
                inner is known for known in found
            ):
                found.append(inner)
    return found


def called_by(hook: Any) -> Iterator[Any]:
    """A function, and those that it may call, as far as can be seen.

    Args:
        hook: A function, or an object that holds functions. Those it calls
            may be in its closure, be bound to it, or have a global name.
    """
    seen: List[Any] = []
    open_ = [hook]
    while open_:
        part = open_.pop()
        if any(part is known for known in seen) or not callable(part):
            continue
        seen.append(part)
        yield part
        if isinstance(part, partial):
            open_ += [part.func, *part.args, *part.keywords.values()]
        elif isinstance(part, MethodType):
            open_ += [part.__func__, part.__self__]
        elif isinstance(part, FunctionType):
            open_ += [_content(cell) for cell in part.__closure__ or ()]
            names = [part.__globals__.get(n) for n in part.__code__.co_names]
            open_ += [n for n in names if isinstance(n, FunctionType)]
        elif not isinstance(part, (type, nn.Module, torch.optim.Optimizer)):
            open_ += [type(part).__call__, *_held_by(part)]


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the cell is still empty
        return None


def _held_by(owner: Any) -> Iterable[Any]:
    """The values of an object's attributes, and those in its containers."""
    for value in list(getattr(owner, '__dict__', {}).values()):
        if isinstance(value, Mapping):
            yield from value.values()
        elif isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value
