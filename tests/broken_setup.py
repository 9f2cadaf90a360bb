"""tools/check_setup.py where rank 1 cannot join in a check's collective."""

import os

import torch.distributed as dist
from commands import load_command

all_gather = dist.all_gather


def fail(*args: object, **kwargs: object) -> None:
    """In place of a collective that the others wait in."""
    raise RuntimeError('out of memory')


if __name__ == '__main__':
    if os.environ['RANK'] == '1':
        dist.all_gather = fail
    load_command('check_setup.py').main()
