"""The paper's learning-rate rule: how a recipe's rate grows with the batch."""

import math
from dataclasses import dataclass
from typing import Dict, Optional, Tuple


@dataclass(frozen=True)
class LRRule:
    """Linear in the batch up to a knee, slower beyond (appendix A.5.1).

    Args:
        base_lr: The reference learning rate...
        base_batch_size: ...and its batch size, in images over all ranks and
            accumulated micro-batches.
        knee: Batch size at which linear growth ends.
        growth: Factor for each doubling of the batch beyond the knee.
    """

    base_lr: float
    base_batch_size: int
    knee: int
    growth: float

    def __call__(self, batch_size: int) -> float:
        """The learning rate for a batch of ``batch_size`` images."""
        linear = (
            self.base_lr * min(batch_size, self.knee) / self.base_batch_size
        )
        doublings = max(0.0, math.log2(batch_size / self.knee))
        return linear * math.pow(self.growth, doublings)

    def __str__(self) -> str:
        return (
            f'{self.base_lr:g} at {self.base_batch_size}, linear up to '
            f'{self.knee}, then x {self.growth:.3f} per doubling'
        )


#: By optimizer and data set (appendix A.5.1, tables 1 to 3).
RULES: Dict[Tuple[str, str], LRRule] = {
    ('SGD', 'COCO'): LRRule(0.02, 16, 128, math.sqrt(2)),
    ('SGD', 'ADE20K'): LRRule(0.01, 32, 256, math.sqrt(2)),
    ('AdamW', 'COCO'): LRRule(2e-4, 32, 128, math.sqrt(1.5)),
}


def find_rule(optimizer: str, dataset: str) -> Tuple[str, Optional[LRRule]]:
    """The paper's rule for an optimizer's and a data set's class name.

    Any data set whose name does not tell of ADE20K counts as COCO.

    Returns:
        For which of the two the rule is, and the rule; None where the paper
        has none.
    """
    name = 'ADE20K' if 'ADE20K' in dataset else 'COCO'
    return name, RULES.get((optimizer, name))
