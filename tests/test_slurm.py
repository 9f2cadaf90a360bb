"""The Slurm launchers, against stand-ins of srun, scontrol and python."""

import json
import os
import stat

import pytest
from commands import finish, start, write_config

from mmagvm.launch.rendezvous import free_port

#: Runs its command once per task, as on nodes, which all are this machine.
SRUN = """#!/usr/bin/env python3
import json, os, subprocess, sys

options = [arg for arg in sys.argv[1:] if arg != '-p']
command = sys.argv[sys.argv.index('bash'):]
print(json.dumps(sys.argv[1:sys.argv.index('bash')]), flush=True)
tasks = next(o for o in options if o.startswith('--ntasks=')).split('=')[1]
env = dict(
    os.environ, SLURM_NTASKS=tasks, SLURM_JOB_ID='4030201',
    SLURM_JOB_NODELIST='other,node[1-2]', SLURM_STEP_NODELIST='node[1-2]')
nodes = [
    subprocess.Popen(command, env=dict(env, SLURM_PROCID=str(task)))
    for task in range(int(tasks))
]
sys.exit(max(node.wait() for node in nodes))
"""

#: Only knows the nodes of the stand-in's step.
SCONTROL = """#!/bin/sh
[ "$*" = 'show hostnames node[1-2]' ] || exit 1
echo "${FIRST_NODE:-node1}"
echo node2
"""

#: Tells what a node would run.
PYTHON = """#!/bin/sh
exec python3 -c '
import json, os, sys
names = "NNODES NODE_RANK MASTER_ADDR PORT MAX_RESTARTS TIMEOUT".split()
env = {name: os.environ.get(name) for name in names}
os.write(1, (json.dumps([env, sys.argv[1:]]) + chr(10)).encode())' "$@"
"""


def launch(folder, script, *args, programs=None, code=0, **env):
    """Run a launcher with these programs first in PATH."""
    programs = programs or dict(srun=SRUN, scontrol=SCONTROL, python=PYTHON)
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(stat.S_IRWXU)
    env = dict(dict(PORT='', MASTER_ADDR=''), **env)
    path = f'{folder}:{os.environ["PATH"]}'
    process = start('bash', f'tools/{script}', *args, PATH=path, **env)
    return finish(process, code)


def recorded(output):
    """srun's options; then, by node, its environment and command."""
    options, *nodes = (json.loads(line) for line in output.splitlines())
    return options, sorted(nodes, key=lambda node: node[0]['NODE_RANK'])


def torchrun(node, ranks, *command, restarts=(), port='20201'):
    return [
        *('tools/dist_run.py', '--nnodes=2', f'--node_rank={node}'),
        *('--master_addr=node1', f'--master_port={port}'),
        *(f'--nproc_per_node={ranks}', *restarts, *command),
    ]


def test_train_starts_one_torchrun_per_node(tmp_path):
    output = launch(
        tmp_path,
        *('slurm_train.sh', 'gpu part', 'my job', 'my config.py', 'my dir'),
        *('--amp', '--cfg-options', "a='b c'"),
        **dict(GPUS='16', GPUS_PER_NODE='8', CPUS_PER_TASK='3'),
        **dict(SRUN_ARGS='--qos=high -t 60', MAX_RESTARTS='2', TIMEOUT='30'),
    )
    options, nodes = recorded(output)
    assert options == [
        *('-p', 'gpu part', '--job-name=my job', '--gres=gpu:8'),
        *('--nodes=2', '--ntasks=2', '--ntasks-per-node=1'),
        *('--cpus-per-task=24', '--kill-on-bad-exit=1'),
        *('--qos=high', '-t', '60'),
    ]
    assert len(nodes) == 2
    for rank, (env, command) in enumerate(nodes):
        assert env == dict(
            **dict(NNODES='2', NODE_RANK=str(rank), MASTER_ADDR='node1'),
            **dict(PORT='20201', MAX_RESTARTS='2', TIMEOUT='30'),
        )
        assert command == torchrun(
            *(rank, 8, 'tools/train.py', 'my config.py'),
            *('--launcher', 'pytorch', '--work-dir', 'my dir'),
            *('--amp', '--cfg-options', "a='b c'"),
            restarts=('--max_restarts=2', '--rdzv_conf=timeout=30'),
        )


def test_test_starts_one_torchrun_per_node(tmp_path):
    output = launch(
        tmp_path,
        *('slurm_test.sh', 'part', 'job', 'config.py', 'epoch_1.pth'),
        *('--out', 'out.pkl'),
        **dict(GPUS='4', GPUS_PER_NODE='2', PORT='1234'),
    )
    options, nodes = recorded(output)
    assert '--cpus-per-task=10' in options
    for rank, (_, command) in enumerate(nodes):
        assert command == torchrun(
            *(rank, 2, 'tools/test.py', 'config.py', 'epoch_1.pth'),
            *('--launcher', 'pytorch', '--out', 'out.pkl'),
            restarts=('--rdzv_conf=timeout=600',),
            port='1234',
        )


def test_check_starts_one_torchrun_per_node(tmp_path):
    output = launch(
        *(tmp_path, 'slurm_check.sh', 'part', 'job', '--timeout', '60'),
        **dict(GPUS='4', GPUS_PER_NODE='2', PORT='1234'),
    )
    options, nodes = recorded(output)
    assert '--nodes=2' in options
    for rank, (_, command) in enumerate(nodes):
        assert command == torchrun(
            *(rank, 2, 'tools/check_setup.py', '--launcher', 'pytorch'),
            *('--timeout', '60'),
            restarts=('--rdzv_conf=timeout=600',),
            port='1234',
        )


@pytest.mark.parametrize(
    'args, passed',
    [
        ([], []),
        (['dir'], ['--work-dir', 'dir']),
        (['--resume'], ['--resume']),
        (['--work-dir', 'dir', '--amp'], ['--work-dir', 'dir', '--amp']),
    ],
)
def test_work_dir_as_for_mmdet_or_mmseg(tmp_path, args, passed):
    output = launch(tmp_path, 'slurm_train.sh', 'p', 'j', 'c.py', *args)
    options, [(env, command)] = recorded(output)
    assert '--nodes=1' in options and '--gres=gpu:8' in options
    assert command[command.index('pytorch') + 1 :] == passed


def test_fewer_gpus_than_a_node_has(tmp_path):
    output = launch(tmp_path, 'slurm_train.sh', 'p', 'j', 'c.py', GPUS='4')
    options, [(env, command)] = recorded(output)
    assert '--gres=gpu:4' in options and '--nproc_per_node=4' in command


@pytest.mark.parametrize('gpus', ['12', '0'])
def test_gpus_that_fill_no_nodes_are_refused(tmp_path, gpus):
    output = launch(
        tmp_path, 'slurm_train.sh', 'p', 'j', 'c.py', GPUS=gpus, code=2
    )
    assert f'GPUS={gpus} cannot be divided' in output


@pytest.mark.parametrize('script', ['train', 'test', 'check'])
def test_launcher_tells_its_usage(tmp_path, script):
    output = launch(tmp_path, f'slurm_{script}.sh', 'partition', code=2)
    assert f'Usage: tools/slurm_{script}.sh PARTITION JOB_NAME' in output


def test_unknown_first_node_is_an_error(tmp_path):
    programs = dict(srun=SRUN, scontrol='#!/bin/sh\nexit 1\n', python=PYTHON)
    launch(
        *(tmp_path, 'slurm_train.sh', 'p', 'j', 'c.py'),
        programs=programs,
        code=1,
    )


def test_two_tasks_train_together(tmp_path):
    """Only Slurm is a stand-in: two tasks of one rank, on this machine."""
    launch(
        *(
            tmp_path,
            'slurm_train.sh',
            'p',
            'j',
            write_config(tmp_path / 'run'),
        ),
        programs=dict(srun=SRUN, scontrol=SCONTROL),
        **dict(GPUS='2', GPUS_PER_NODE='1', FIRST_NODE='localhost'),
        PORT=free_port(),
    )
    assert (tmp_path / 'run' / 'epoch_2.pth').exists()
