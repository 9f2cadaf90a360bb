"""Counts and reports updates that were due and not measured."""

import logging
from typing import Counter

logger = logging.getLogger('mmagvm')

#: Reasons, each a clause that follows "because".
NOT_BEGUN = (
    'train_step does not run the model inside of optim_wrapper.optim_context'
    '(model), without MMEngine inside of agvm.micro_batch()'
)
PARTIAL = 'an update had only some of its micro-batches'
OWN_BACKWARD = (
    "the loss's own backward() is called: in train_step call "
    'optim_wrapper.update_params(loss), or its backward(loss) and step(), '
    'without MMEngine agvm.micro_batch()'
)
NO_STATE = (
    'the optimizer had no state yet, which its first updates create and '
    'measuring needs'
)
OTHER_BACKWARDS = 'it had more or fewer backward passes than micro-batches'
NOT_FINITE = 'gradients were NaN or infinite'
NO_ANCHOR = 'the module that the others follow had no gradient'
OTHER_STEP = (
    "the optimizer's own step() is called: in train_step call "
    'optim_wrapper.update_params(loss), or its backward(loss) and step(), '
    'without MMEngine agvm.step()'
)
#: Reasons that show a wrong training loop, reported as soon as they occur.
OF_LOOP = (NOT_BEGUN, OWN_BACKWARD, OTHER_BACKWARDS)


class Missed:
    """Counts updates that were due and not measured.

    Attributes:
        reason (str): Why the update under way is not measured; empty if it is.
        counts (Counter): Numbers of missed updates, by reason.
    """

    def __init__(self) -> None:
        self.reason = NOT_BEGUN
        self.counts: Counter[str] = Counter()

    def end_update(self, update: int, due: bool) -> None:
        """Count the update that is done, if it was missed.

        Args:
            update: Its index.
            due: Whether it was to be measured.
        """
        if self.reason and due:
            self.counts[self.reason] += 1
            if self.reason in OF_LOOP and self.counts[self.reason] == 1:
                logger.warning(
                    'update %d was due and is not measured, because %s',
                    update,
                    self.reason,
                )
        self.reason = NOT_BEGUN

    def other_step(self) -> None:
        """Count a step of the optimizer that was not announced to AGVM."""
        self.counts[OTHER_STEP] += 1
        if self.counts[OTHER_STEP] == 1:
            logger.warning(
                'a step is neither measured nor modulated, because %s',
                OTHER_STEP,
            )

    def __str__(self) -> str:
        """The reasons, most frequent first; empty if no update was missed."""
        return '; '.join(
            f'{reason} ({count} times)'
            for reason, count in self.counts.most_common()
        )
