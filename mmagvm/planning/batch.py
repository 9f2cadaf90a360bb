"""How a batch is made of GPUs, images and micro-batches."""

from dataclasses import dataclass

from mmagvm.errors import refuse


@dataclass(frozen=True)
class Batch:
    """How a batch is made, and how much larger it is than the original's."""

    size: int
    gpus: int
    images_per_gpu: int
    accumulation: int
    base: int
    base_accumulation: int = 1

    @property
    def updates(self) -> float:
        """Updates that see as many images as an old iteration."""
        return self.base / self.base_accumulation / self.size

    @property
    def times(self) -> float:
        """Images of an iteration, over those of an old one."""
        return 1 / (self.accumulation * self.updates)

    def iterations(self, old: float) -> int:
        """As many images as ``old`` iterations of the original saw."""
        updates = round(old * self.updates)
        return int(self.accumulation * max(updates, min(old, 1)))


def split_batch(
    size: int, gpus: int, max_images: int, base: int = 0, agvm: bool = True
) -> Batch:
    """Images per GPU and micro-batches, as few of the latter as possible."""
    for name, value in (
        ('--batch-size', size),
        ('--gpus', gpus),
        ('--max-images-per-gpu', max_images),
    ):
        if value < 1:
            refuse(f'{name} {value} is too small: write 1 or more')
    if size % gpus:
        refuse(
            f'--batch-size {size} cannot be divided among {gpus} GPUs: write '
            f'{size // gpus * gpus or gpus} or {(size // gpus + 1) * gpus}'
        )
    share = size // gpus
    # AGVM compares ranks or micro-batches
    least = 2 if agvm and gpus == 1 else 1
    if share < least:
        refuse(
            f'--batch-size {size} on one GPU leaves AGVM nothing to compare: '
            'write 2 or more'
        )
    accumulation = next(
        count
        for count in range(least, share + 1)
        if share % count == 0 and share // count <= max_images
    )
    return Batch(size, gpus, share // accumulation, accumulation, base)
