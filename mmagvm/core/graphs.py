"""Keeps bookkeeping out of the graphs that torch.compile makes."""

from typing import Any, Callable, TypeVar, cast

import torch

Function = TypeVar('Function', bound=Callable[..., Any])


def outside_of_graphs(function: Function) -> Function:
    """Decorate a function to run as plain Python, with all that it calls.

    Without it, torch.compile would compile again for measured updates, which
    take another path through the code. ``torch.compiler.disable`` does the
    same, but loads the compiler at once, also in runs that never use it.
    """
    disable = getattr(torch, '_disable_dynamo', None) or torch.compiler.disable
    return cast(Function, disable(function))
