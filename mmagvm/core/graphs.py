"""Keeps bookkeeping out of the graphs that torch.compile makes."""

from typing import Any, Callable, TypeVar, cast

import torch

Function = TypeVar('Function', bound=Callable[..., Any])


def outside_of_graphs(function: Function) -> Function:
    """Decorates what runs as plain Python, with all that it calls.

    Without it a measured update, being another path through the code than an
    unmeasured one, would be compiled again. ``torch.compiler.disable`` does
    the same, but loads the compiler at once, also for who never compiles.
    """
    disable = getattr(torch, '_disable_dynamo', None) or torch.compiler.disable
    return cast(Function, disable(function))
