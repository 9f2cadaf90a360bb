"""Finds the modules that a sharded model gathers one at a time."""

import re
from collections import Counter
from typing import Dict, List, Optional, Sequence

from torch import nn

#: Parts in which repeated blocks run one after the other, each once.
DEEP = ('backbone', 'encoder', 'decoder')


def find_units(
    model: nn.Module, patterns: Optional[Sequence[str]] = None
) -> List[str]:
    """Names of the units, inner ones first.

    Args:
        model: Not sharded yet.
        patterns: Regular expressions that match a whole name. None for the
            repeated blocks of backbones, encoders and decoders: children of
            a list or a sequence that have several layers each, at least two
            of them of one class.

    Raises:
        ValueError: A pattern matches no module with parameters, or there are
            no such blocks.
    """
    modules = {
        name: module
        for name, module in model.named_modules()
        if name and any(True for _ in module.parameters())
    }
    if patterns is None:
        found = repeated_blocks(modules)
        if not found:
            raise ValueError(
                'strategy.units=None finds no repeated blocks in a backbone, '
                'encoder or decoder: write regular expressions for names such '
                f'as {list(modules)[:4]}'
            )
        return found
    found = []
    for pattern in patterns:
        matching = [name for name in modules if re.fullmatch(pattern, name)]
        if not matching:
            raise ValueError(
                f'strategy.units has {pattern!r}, which matches no module '
                'with parameters: write regular expressions for names such as '
                f'{list(modules)[:4]}'
            )
        found += matching
    # fully_shard gives a parameter to the first unit that it is called on
    distinct = sorted(set(found), key=list(modules).index)
    return sorted(distinct, key=lambda name: -name.count('.'))


def repeated_blocks(modules: Dict[str, nn.Module]) -> List[str]:
    """The innermost repeated blocks among named modules."""
    found: List[str] = []
    for name, module in modules.items():
        if not any(part in DEEP for part in name.split('.')) or not isinstance(
            module, (nn.Sequential, nn.ModuleList)
        ):
            continue
        blocks = [
            f'{name}.{key}'
            for key, child in module.named_children()
            if f'{name}.{key}' in modules and _is_block(child)
        ]
        # the first block may have another class, as it changes channels
        kinds = Counter(type(modules[block]) for block in blocks)
        if any(count > 1 for count in kinds.values()):
            found += blocks
    return [
        name
        for name in found
        if not any(other.startswith(f'{name}.') for other in found)
    ]


def _is_block(module: nn.Module) -> bool:
    """Whether a module has parameters in several layers of its own."""
    layers = [
        child
        for child in module.modules()
        if next(child.parameters(recurse=False), None) is not None
    ]
    return len(layers) > 2
