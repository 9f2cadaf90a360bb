"""A data set that is read once."""

from typing import Any, Dict, Union

from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS


@DATASETS.register_module()
class InMemoryDataset:
    """Keeps each sample as it left the pipeline, which must not be random.

    Args:
        dataset: What is read, or its config.
    """

    def __init__(self, dataset: Union[BaseDataset, Dict[str, Any]]) -> None:
        if isinstance(dataset, dict):
            dataset = DATASETS.build(dataset)
        self.dataset = dataset
        self.samples: Dict[int, Any] = {}

    @property
    def metainfo(self) -> Dict[str, Any]:
        """Of the data set that is read."""
        metainfo: Dict[str, Any] = self.dataset.metainfo
        return metainfo

    def full_init(self) -> None:
        """For MMEngine's loader."""
        self.dataset.full_init()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if index not in self.samples:
            self.samples[index] = self.dataset[index]
        return self.samples[index]
