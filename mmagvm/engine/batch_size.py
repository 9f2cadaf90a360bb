"""The images per rank, from the data loader or from the first batch.

An uncertain number is None, never a guess.
"""

from typing import Any, Dict, List, Optional, Sequence

from torch import Tensor


def batch_sizes(dataloader: Any) -> List[int]:
    """The batch sizes that a data loader states, each once.

    Returns:
        Several if it alternates between data sets, as mmdet's
        MultiDataAspectRatioBatchSampler does; empty if it states none.
    """
    sampler = getattr(dataloader, 'batch_sampler', None)
    sizes = getattr(sampler, 'batch_size', None)
    if sizes is None and sampler is None:
        sizes = getattr(dataloader, 'batch_size', None)
    if not isinstance(sizes, Sequence):
        sizes = [sizes]
    return [int(n) for n in dict.fromkeys(sizes) if isinstance(n, int)]


def count_images(batch: Any) -> Optional[int]:
    """The number of images of a loaded batch; None if it is not certain.

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
    """The length of a list of images or a batched tensor; None for others."""
    if isinstance(images, Tensor):
        return None if images.dim() in (0, 3) else len(images)
    return len(images) if isinstance(images, (list, tuple)) else None


def _of_branches(branches: Dict[str, Any]) -> Optional[int]:
    """Images in the branches of a semi-supervised model's batch.

    A branch has None for images that it does not use. Without such entries,
    the same image is in several branches, once for each augmentation.
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
