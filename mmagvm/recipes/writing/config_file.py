"""A config file: how its name and its numbers follow from a recipe."""

from dataclasses import dataclass, replace
from typing import Callable

from mmagvm.recipes.lr_scaling import RECIPES, Recipe, at


@dataclass(frozen=True)
class ConfigFile:
    """A config of one batch size.

    Args:
        folder: Of ``configs/``.
        recipe_name: Of ``RECIPES``.
        model: Beginning of the file's name.
        tag: Part of the name between images and length.
        batch_size: Images of an update.
        write: Returns the file's text.
        note: Source of its numbers, for its comment.
        images: Per GPU.
        bn_size: Images that share batch-norm statistics in MegDet.
    """

    folder: str
    recipe_name: str
    model: str
    tag: str
    batch_size: int
    write: Callable[['ConfigFile'], str]
    note: str = ''
    images: int = 16
    bn_size: int = 0

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        hardware = f'{self.batch_size // self.images}xb{self.images}'
        return f'{self.model}_{hardware}-{tagged(self.tag, self.ending)}'

    @property
    def path(self) -> str:
        """The file, from the root of the project."""
        return f'configs/{self.folder}/{self.name}.py'

    @property
    def ending(self) -> str:
        """Length and data set, as names end with them."""
        if self.recipe.epochs is not None:
            return f'{self.recipe.epochs}e_coco'
        thousands, rest = divmod(self.iterations, 1000)
        length = f'{self.iterations}it' if rest else f'{thousands}k'
        return f'{length}_ade20k-512x512'

    @property
    def data(self) -> str:
        """The data set's name."""
        return 'ADE20K' if self.recipe.epochs is None else 'COCO'

    def beside(self, tag: str) -> str:
        """The name of the config that differs in its tag only."""
        return replace(self, tag=tag).name

    @property
    def recipe(self) -> Recipe:
        """The source of the numbers below."""
        return RECIPES[self.recipe_name]

    @property
    def lr(self) -> str:
        """The learning rate, as configs and tables show it."""
        return number(self.recipe.lr(self.batch_size))

    @property
    def iterations(self) -> int:
        """Iterations of the whole training."""
        return self.recipe.iterations(self.batch_size)

    @property
    def epoch(self) -> int:
        """Iterations of an epoch."""
        return self.recipe.epoch(self.batch_size)

    @property
    def warmup_end(self) -> int:
        """Iterations of warm-up."""
        return self.recipe.warmup_end(self.batch_size)

    @property
    def interval(self) -> int:
        """tau."""
        return at(self.recipe.interval, self.batch_size)

    @property
    def begin(self) -> int:
        """The first measured iteration."""
        return self.recipe.begin(self.batch_size)


def tagged(tag: str, ending: str) -> str:
    """The end of a file's name, after a tag if there is one."""
    return f'{tag}-{ending}' if tag else ending


def number(value: float) -> str:
    """A learning rate as configs and tables show it: 9.8e-4, 0.226."""
    if value >= 0.005:
        return f'{value:g}'
    mantissa, exponent = f'{value:e}'.split('e')
    return f'{float(mantissa):g}e{int(exponent)}'
