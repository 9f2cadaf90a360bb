"""torchrun that ends within a timeout, with checks, if nodes do not meet.

Takes torchrun's arguments; dist_train.sh and dist_test.sh run it.
"""

import os
import sys

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import (
    SimpleElasticAgent,
    WorkerGroup,
)
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

from mmagvm.errors import command
from mmagvm.launch.rendezvous import deadline, timeout_seconds, what_to_check


def bound_rendezvous(seconds: int) -> None:
    """Limit the time in which torchrun's nodes must meet.

    Its own timeout (``--rdzv-conf``) does not cover a server that accepts a
    connection and never answers, such as another program at MASTER_ADDR:PORT.
    """
    rendezvous = SimpleElasticAgent._rendezvous

    def bounded(agent: SimpleElasticAgent, worker_group: WorkerGroup) -> None:
        here = f'Seen from node {os.environ.get("NODE_RANK", 0)}, the nodes '
        with deadline(seconds, f'{here}did not meet within {seconds} seconds'):
            try:
                rendezvous(agent, worker_group)
            except dist.DistError as error:
                raise SystemExit(
                    what_to_check(f'{here}cannot meet: {error}')
                ) from None

    SimpleElasticAgent._rendezvous = bounded  # type: ignore[method-assign]


@command
def main() -> None:
    bound_rendezvous(timeout_seconds())
    try:
        torchrun(sys.argv[1:])
    except ChildFailedError as error:
        # the ranks have reported the error; this names the first of them
        raise SystemExit(str(error)) from None


if __name__ == '__main__':
    main()
