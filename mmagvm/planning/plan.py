"""What a large-batch version of a config changes, and why."""

from dataclasses import dataclass, field
from typing import Any, Dict, List


@dataclass
class Plan:
    """The difference to the original, and why."""

    diff: Dict[str, Any] = field(default_factory=dict)
    reasons: List[str] = field(default_factory=list)

    def because(self, reason: str) -> None:
        self.reasons.append(reason)


def rounded(value: float) -> float:
    """To the four digits that a config gets."""
    return float(f'{value:.4g}')
