"""Nodes on one machine: network namespaces that a switch joins.

Nothing leaves the machine: the namespaces have loopback and the link to the
switch, and no route to anywhere else.
"""

import os
import shutil
import subprocess
from typing import List, Optional, Tuple

from commands import start


def ip(*args: str) -> None:
    """Run the command ``ip``; the error contains its message."""
    done = subprocess.run(['ip', *args], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f'ip {" ".join(args)}: {done.stderr.strip()}')


def reason_against() -> Optional[str]:
    """Why no namespaces can be made here, with a way out; or None."""
    if shutil.which('ip') is None:
        return 'needs the command ip: apt-get install iproute2'
    try:
        with Network(1):
            return None
    except OSError as error:
        return (
            'needs the right to make network namespaces, bridges and veth '
            'pairs: run as root, in a container with docker run --privileged '
            f'({error})'
        )


class Network:
    """``nodes`` namespaces, each joined to a switch by a link of its own."""

    #: Name of the nodes' interface to the switch.
    INTERFACE = 'eth0'

    def __init__(self, nodes: int) -> None:
        prefix = f'mmagvm-{os.getpid()}'
        self.switch = f'{prefix}-switch'
        self.nodes = [f'{prefix}-{node}' for node in range(nodes)]

    def __enter__(self) -> 'Network':
        try:
            self._make()
        except OSError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *args: object) -> None:
        for name in (*self.nodes, self.switch):
            subprocess.run(['ip', 'netns', 'del', name], capture_output=True)

    def _make(self) -> None:
        ip('netns', 'add', self.switch)
        ip('-n', self.switch, *'link add bridge type bridge'.split())
        ip('-n', self.switch, *'link set bridge up'.split())
        for node, name in enumerate(self.nodes):
            ip('netns', 'add', name)
            pair = f'link add port{node} type veth peer name {self.INTERFACE}'
            ip('-n', self.switch, *pair.split(), 'netns', name)
            ip(*self.link(node), 'master', 'bridge', 'up')
            address = f'{self.address(node)}/24'
            ip('-n', name, 'addr', 'add', address, 'dev', self.INTERFACE)
            ip('-n', name, 'link', 'set', self.INTERFACE, 'up')
            ip('-n', name, 'link', 'set', 'lo', 'up')

    def address(self, node: int) -> str:
        """Of the range that RFC 2544 keeps for such tests."""
        return f'198.18.0.{node + 1}'

    def link(self, node: int) -> Tuple[str, ...]:
        """Arguments of ``ip``; 'down' or 'up' after them cut or restore it."""
        return ('-n', self.switch, 'link', 'set', f'port{node}')

    def start(
        self, *args: object, **env: str
    ) -> 'List[subprocess.Popen[str]]':
        """Start a command on every node, as a user does on a cluster."""
        common = dict(
            NNODES=str(len(self.nodes)),
            MASTER_ADDR=self.address(0),
            PORT='29500',
            GLOO_SOCKET_IFNAME=self.INTERFACE,
            **env,
        )
        return [
            start('ip', 'netns', 'exec', name, *args, **common, NODE_RANK=node)
            for node, name in enumerate(self.nodes)
        ]
