"""How many images a rank gets at once: as the loader tells, or as they come.

What is not certain is None, never a guess.
"""

from typing import Any, Dict, List, Optional, Sequence

from torch import Tensor


def batch_sizes(dataloader: Any) -> List[int]:
    """Sizes that a data loader tells its batches have, each once.

    Returns:
        Several if it takes turns between data sets, as mmdet's
        MultiDataAspectRatioBatchSampler; none if it does not tell.
    """
    sampler = getattr(dataloader, 'batch_sampler', None)
    sizes = getattr(sampler, 'batch_size', None)
    if sizes is None and sampler is None:
        sizes = getattr(dataloader, 'batch_size', None)
    if not isinstance(sizes, Sequence):
        sizes = [sizes]
    return [int(n) for n in dict.fromkeys(sizes) if isinstance(n, int)]


def count_images(batch: Any) -> Optional[int]:
    """Images of a batch that has arrived; None where that cannot be told.

    Args:
        batch: With ``inputs`` and maybe ``data_samples``, as OpenMMLab's
            models take it; or a list of such samples.
    """
    if isinstance(batch, (list, tuple)):
        if batch and all(isinstance(item, dict) for item in batch):
            return len(batch)  # samples that were not collated
        return _length(batch[0]) if batch else None
    if not isinstance(batch, dict):
        return _length(batch)
    samples, inputs = batch.get('data_samples'), batch.get('inputs')
    if isinstance(samples, dict):
        return _of_branches(samples)
    if isinstance(samples, (list, tuple)):
        return len(samples)
    if isinstance(inputs, dict):  # of several sensors
        lengths = {_length(part) for part in inputs.values()}
        return lengths.pop() if len(lengths) == 1 else None
    return _length(inputs)


def _length(images: Any) -> Optional[int]:
    """Of a list of images, or a tensor of a batch; not of one image."""
    if isinstance(images, Tensor):
        return None if images.dim() in (0, 3) else len(images)
    return len(images) if isinstance(images, (list, tuple)) else None


def _of_branches(branches: Dict[str, Any]) -> Optional[int]:
    """Images in the branches of a semi-supervised model's batch.

    A branch has None for those that it has no part in; without these, the
    same image is in several branches, once for each augmentation.
    """
    parts = [list(branch or ()) for branch in branches.values()]
    lengths = {len(part) for part in parts}
    if len(lengths) == 1 and any(
        sample is None for part in parts for sample in part
    ):
        return lengths.pop()
    names = {
        getattr(sample, 'img_path', None) or getattr(sample, 'img_id', None)
        for part in parts
        for sample in part
        if sample is not None
    }
    return len(names) if names and None not in names else None
