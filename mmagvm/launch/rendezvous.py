"""How nodes and ranks meet: within a timeout, or with a list of checks."""

import os
import socket
import sys
import threading
from contextlib import contextmanager
from datetime import timedelta
from typing import Iterator, List, Optional

import torch.distributed as dist

from mmagvm.errors import LostRanksError, UsageError

#: Seconds that nodes and ranks wait for each other.
DEFAULT_TIMEOUT = 600


def timeout_seconds() -> int:
    """The environment's TIMEOUT."""
    text = os.environ.get('TIMEOUT') or str(DEFAULT_TIMEOUT)
    if not text.isdecimal() or int(text) == 0:
        raise UsageError(
            f'TIMEOUT={text}: write the seconds that nodes and ranks wait for '
            'each other, a whole number from 1'
        )
    return int(text)


def what_to_check(happened: str) -> str:
    """A message that names what happened and its possible causes."""
    env = os.environ
    addr = env.get('MASTER_ADDR', '127.0.0.1')
    port = env.get('MASTER_PORT') or env.get('PORT', '29500')
    return f"""
{happened}
Check that
- the same command runs on every node, with the same NNODES, MASTER_ADDR, PORT
  and number of GPUs, and each with its own NODE_RANK, counted from 0: here
  NNODES={env.get('NNODES', 1)} and NODE_RANK={env.get('NODE_RANK', 0)};
- MASTER_ADDR={addr} is node 0, under a name that every node resolves;
- nothing else uses PORT={port} on node 0, and no firewall blocks it or the
  other ports between the nodes;
- NCCL_SOCKET_IFNAME, or GLOO_SOCKET_IFNAME without GPUs, names the network
  interface that joins the nodes, where they have several;
- no rank has stopped or hangs: its own output shows why;
- TIMEOUT={timeout_seconds()} seconds is longer than the delay between the
  starts of the nodes.
"""


@contextmanager
def deadline(seconds: float, happened: str) -> Iterator[None]:
    """End the process with a list of checks if the block takes longer.

    A thread ends it, since neither an exception nor a Python signal handler
    reaches a call that hangs in C++.
    """

    def give_up() -> None:
        sys.stderr.write(what_to_check(happened))
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


#: gloo's messages when a peer is gone or does not answer. It raises plain
#: RuntimeErrors, where NCCL's are dist.DistError.
LOST = (
    'Timed out waiting',
    'timeout caused pair closure',
    'Connection closed by peer',
    'Connection reset by peer',
    'Broken pipe',
)


@contextmanager
def lost_ranks_reported(seconds: float) -> Iterator[None]:
    """Report what to do if other ranks are lost in the block.

    Args:
        seconds: How long a collective waits for them.
    """
    try:
        yield
    except RuntimeError as error:  # dist.DistError is one
        text = str(error)
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            raise
        if not isinstance(error, dist.DistError) and not any(
            phrase in text for phrase in LOST
        ):
            raise
        env = os.environ
        raise LostRanksError(f"""
{text}
Rank {env.get('RANK', 0)} on node {env.get('NODE_RANK', 0)} lost the others.
- One rank that fails causes this on all others: read what each node printed,
  and fix the first error that is not this one.
- If there is none, the network between nodes was cut, or a rank took more than
  env_cfg.dist_cfg.timeout={seconds} seconds for one step or evaluation.
Then start the same command on every node again, with --resume.
""") from None


def launcher_store(seconds: float) -> Optional[dist.Store]:
    """The store of torchrun, which outlives a restart of the ranks.

    None under any other launcher.
    """
    if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') != 'True':
        return None
    store = dist.TCPStore(
        os.environ['MASTER_ADDR'],
        int(os.environ['MASTER_PORT']),
        is_master=False,
        timeout=timedelta(seconds=seconds),
    )
    return dist.PrefixStore('mmagvm', store)


def free_port() -> int:
    """A port of this machine that is free now."""
    with socket.socket() as sock:
        sock.bind(('', 0))
        port: int = sock.getsockname()[1]
        return port


def restarts() -> int:
    """How often torchrun has restarted the ranks of this run."""
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))


def wait_for_ranks(store: dist.Store, seconds: float, within: str) -> None:
    """Return once every rank has come here, or exit and name the missing ones.

    Args:
        store: Shared by all ranks.
        seconds: To wait.
        within: That time, as the message names it.
    """
    ranks = [
        f'{restarts()}/rank {rank}'
        for rank in range(int(os.environ['WORLD_SIZE']))
    ]
    store.set(ranks[int(os.environ['RANK'])], 'here')
    try:
        store.wait(ranks, timedelta(seconds=seconds))
    except dist.DistError:
        missing = [key for key in ranks if not store.check([key])]
        raise LostRanksError(
            what_to_check(
                f'{len(missing)} of {len(ranks)} ranks did not come within '
                f'{within}: {_names(missing)}'
            )
        ) from None


def _names(keys: List[str]) -> str:
    names = [key.partition('/')[2] for key in keys]
    return ', '.join(names[:8]) + (', ...' if len(names) > 8 else '')
