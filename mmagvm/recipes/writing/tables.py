"""The tables of the folders' READMEs."""

from typing import Dict, Iterable, List, Sequence

from mmagvm.recipes.lr_scaling import RECIPES, at
from mmagvm.recipes.reported import MEGDET, REPORTED
from mmagvm.recipes.writing.config_file import ConfigFile, number

SCHEDULE = ('batch', 'LR', 'epochs', 'warm-up')
#: The models of the ablations, by recipe.
ABLATED = {'faster_rcnn': 'Faster R-CNN', 'retinanet': 'RetinaNet'}
#: In place of results until there is a log of them.
OURS = 'not run'


def tables(folder: str, configs: Iterable[ConfigFile]) -> Dict[str, str]:
    """The tables of a folder's README, by the recipe that each shows.

    Args:
        folder: Of ``configs/``.
        configs: The config files in it.
    """
    sizes: Dict[str, List[int]] = {}
    for config in configs:
        sizes.setdefault(config.recipe_name, []).append(config.batch_size)
    if folder == 'ablations':
        return {folder: _ablations(sizes)}
    if folder == 'megdet':
        return {recipe: _megdet(recipe) for recipe in sizes}
    return {
        recipe: _reported(recipe, sorted({*batches}))
        for recipe, batches in sizes.items()
    }


def _reported(recipe: str, sizes: Sequence[int]) -> str:
    reported = REPORTED.get(recipe, {})
    return _table(
        (*SCHEDULE, 'reported baseline', 'reported AGVM', 'ours'),
        [
            (*_schedule(recipe, size), *reported.get(size, '--'), OURS)
            for size in sizes
        ],
    )


def _megdet(recipe: str) -> str:
    return _table(
        (*SCHEDULE, 'BN size', 'GPUs', 'reported', 'ours'),
        [
            (
                *_schedule(recipe, row.batch_size),
                *(str(row.bn_size), str(row.gpus), row.reported, OURS),
            )
            for row in MEGDET[recipe]
        ],
    )


def _ablations(sizes: Dict[str, List[int]]) -> str:
    return _table(
        ('model', *SCHEDULE, 'ours'),
        [
            (ABLATED[recipe], *_schedule(recipe, size), OURS)
            for recipe, batches in sizes.items()
            for size in sorted({*batches})
        ],
    )


def _schedule(name: str, batch_size: int) -> Sequence[str]:
    """Batch, rate, length and warm-up."""
    recipe = RECIPES[name]
    warmup = f'{recipe.warmup_end(batch_size)} iterations'
    if recipe.warmup_by_epoch:
        epochs = at(recipe.warmup, batch_size)
        warmup = f'{epochs} epoch{"s" if epochs > 1 else ""} ({warmup})'
    length = recipe.epochs or f'{recipe.iterations(batch_size)} iterations'
    lr = number(recipe.lr(batch_size))
    return str(batch_size), lr, str(length), warmup


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = (header, ['---'] * len(header), *rows)
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
