"""Whole commands, as a user types them, on a few images."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from commands import load_checkpoint, run

ROOT = Path(__file__).parent.parent
QUICKSTART = 'configs/quickstart/faster-rcnn_r18_fpn_2xb8-agvm-4e_digits.py'
RECIPE = 'configs/faster_rcnn/faster-rcnn_r50_fpn_32xb16-agvm-16e_coco.py'


def command(*args, check=True, **env):
    """Run a command in the project's root; its stdout and stderr, merged."""
    done = subprocess.run(
        [str(arg) for arg in args],
        cwd=ROOT,
        env={**os.environ, 'PORT': free_port(), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    if check:
        assert done.returncode == 0, done.stdout[-5000:]
    return done


def free_port():
    import socket

    with socket.socket() as sock:
        sock.bind(('', 0))
        return str(sock.getsockname()[1])


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    out_dir = tmp_path_factory.mktemp('data') / 'digits'
    command(
        sys.executable,
        'tools/dataset_converters/digits2coco.py',
        out_dir,
        *('--train', '48', '--val', '8'),
    )
    return out_dir


@pytest.fixture(scope='module')
def work_dir(digits, tmp_path_factory):
    """The quickstart's training, on a few images."""
    work_dir = tmp_path_factory.mktemp('work') / 'quickstart'
    command(
        *('bash', 'tools/dist_train.sh', QUICKSTART, '2'),
        *('--work-dir', work_dir, '--cfg-options'),
        *digits_options(digits),
        *('train_cfg.max_epochs=2', 'optim_wrapper.interval=2'),
        *('optim_wrapper.begin=1', 'default_hooks.logger.interval=1'),
    )
    return work_dir


def digits_options(digits):
    loaders = ('train_dataloader', 'val_dataloader', 'test_dataloader')
    return [
        *(f'{loader}.dataset.data_root={digits}/' for loader in loaders),
        f'val_evaluator.ann_file={digits}/annotations/val.json',
        f'test_evaluator.ann_file={digits}/annotations/val.json',
    ]


# -- the data set


def test_digits_are_deterministic_by_seed(digits, tmp_path):
    for seed, same in ((0, True), (1, False)):
        command(
            sys.executable,
            'tools/dataset_converters/digits2coco.py',
            tmp_path / str(seed),
            *('--train', '3', '--val', '1', '--seed', seed),
        )
        ours, other = (
            (folder / 'train/000002.png').read_bytes()
            for folder in (digits, tmp_path / str(seed))
        )
        assert (ours == other) == same


def test_digits_lie_inside_their_boxes_and_images(digits):
    data = json.loads((digits / 'annotations/train.json').read_text())
    assert len(data['images']) == 48
    assert {a['category_id'] for a in data['annotations']} == set(range(10))
    heights = [a['bbox'][3] for a in data['annotations']]
    assert min(heights) < 20 and max(heights) > 35
    for annotation in data['annotations']:
        x, y, width, height = annotation['bbox']
        assert 0 <= x and x + width <= 96 and 0 <= y and y + height <= 96
        file = digits / f'train/{annotation["image_id"]:06d}.png'
        patch = cv2.imread(str(file))[y : y + height, x : x + width]
        assert patch.std() > 15  # there is something to see


def test_no_scan_is_in_both_splits():
    from mmagvm.datasets.digits import SCANS

    train, val = (set(range(1797)[SCANS[split]]) for split in SCANS)
    assert len(train) + len(val) == 1797
    assert not train & val


# -- training, testing, drawing


@pytest.mark.host
def test_training_measures_and_modulates(work_dir):
    scalars = next(work_dir.glob('*/vis_data/scalars.json'))
    lines = [json.loads(text) for text in scalars.read_text().splitlines()]
    train = [line for line in lines if 'loss' in line]
    assert [line['agvm/measured'] for line in train] == [0, 1, 1, 2, 2, 3]
    assert train[-1]['agvm_lr_scale/neck'] != 1
    assert train[-1]['agvm_lr_scale/backbone'] == 1
    log = next(work_dir.glob('*/*.log')).read_text()
    assert 'batch size 16 = 2 ranks x 8 images x 1 accumulated' in log


@pytest.mark.host
def test_checkpoint_is_resumed(work_dir, digits):
    done = command(
        *('bash', 'tools/dist_train.sh', QUICKSTART, '2'),
        *('--work-dir', work_dir, '--resume', '--cfg-options'),
        *digits_options(digits),
        *('train_cfg.max_epochs=3', 'optim_wrapper.interval=2'),
        *('optim_wrapper.begin=1', 'default_hooks.logger.interval=1'),
    )
    assert 'resumed epoch: 2, iter: 6' in done.stdout
    assert 'the checkpoint has no AGVM state' not in done.stdout
    state = load_checkpoint(work_dir / 'epoch_3.pth')['optimizer']['agvm']
    assert state['update'] == 9
    assert [update for update, _ in state['history']] == [1, 3, 5, 7]


@pytest.mark.host
def test_checkpoint_is_evaluated(work_dir, digits, tmp_path):
    checkpoint = (work_dir / 'last_checkpoint').read_text()
    for launch in (
        ['bash', 'tools/dist_test.sh', QUICKSTART, checkpoint, '2'],
        [sys.executable, 'tools/test.py', QUICKSTART, checkpoint],
    ):
        done = command(
            *launch,
            *('--work-dir', tmp_path, '--out', tmp_path / 'out.pkl'),
            *('--cfg-options', *digits_options(digits)),
        )
        assert 'coco/bbox_mAP: ' in done.stdout
        assert (tmp_path / 'out.pkl').exists()


def test_mmdets_own_script_trains_and_resumes(digits, tmp_path):
    """In one process: its launcher needs a GPU for each rank."""
    import mmdet

    script = Path(mmdet.__file__).parent / '.mim/tools/train.py'
    for epochs in (1, 2):
        done = command(
            *(sys.executable, script, QUICKSTART, '--work-dir', tmp_path),
            *('--resume', '--cfg-options', *digits_options(digits)),
            *('optim_wrapper.accumulative_counts=2', 'optim_wrapper.begin=1'),
            *('optim_wrapper.interval=1', f'train_cfg.max_epochs={epochs}'),
        )
    assert 'resumed epoch: 1' in done.stdout
    state = load_checkpoint(tmp_path / 'epoch_2.pth')['optimizer']['agvm']
    assert state['measured'] > 0


def test_picture_is_drawn(work_dir, tmp_path):
    command(
        sys.executable,
        'tools/analysis_tools/plot_variance.py',
        work_dir,
        *('--out-dir', tmp_path, '--formats', 'png'),
    )
    assert cv2.imread(str(tmp_path / 'overview.png')).std() > 10


@pytest.mark.parametrize(
    'tool, message',
    [
        (['analysis_tools/report.py', '--out', 'OUT'], 'lr_scale'),
        (
            ['analysis_tools/collect_results.py', '--json', 'OUT'],
            'coco/bbox_mAP',
        ),
        (
            ['misc/advise_batch_size.py', '--begin', '0'],
            'the run is too short',
        ),
        (
            [
                *('misc/plan_run.py', '--gpus', '2', '--images-per-gpu', '8'),
                *('--ms-per-iter', '200', '--bandwidth-gbps', '10'),
                *('--images', '4000', '--base-batch-size', '16'),
            ],
            'all-reduce',
        ),
    ],
    ids=lambda value: Path(value[0]).stem if isinstance(value, list) else '',
)
def test_runs_are_reported(work_dir, tmp_path, tool, message):
    """Every tool, on the quickstart's training or its config."""
    out = tmp_path / 'out'
    script, *options = [str(out) if item == 'OUT' else item for item in tool]
    read = QUICKSTART if script.endswith('plan_run.py') else work_dir
    # too few measurements are not an error of the tool
    enough = 'advise' not in script
    done = command(
        sys.executable, f'tools/{script}', read, *options, check=enough
    )
    assert 'Traceback' not in done.stdout
    text = done.stdout + (out.read_text() if out.exists() else '')
    assert message in text


@pytest.mark.parametrize(
    'content, message',
    [(None, 'no such work dir'), ('{"loss": 1}', 'no training was logged')],
)
def test_picture_of_nothing_is_refused(tmp_path, content, message):
    work_dir = tmp_path / 'work'
    if content is not None:
        (work_dir / 'run/vis_data').mkdir(parents=True)
        (work_dir / 'run/vis_data/scalars.json').write_text(content)
    done = command(
        sys.executable,
        'tools/analysis_tools/plot_variance.py',
        work_dir,
        check=False,
    )
    assert done.returncode == 1
    assert message in done.stdout and 'Traceback' not in done.stdout


@pytest.mark.host
def test_segmenter_is_trained(tmp_path):
    """A small Semantic FPN of mmseg, by the same command."""
    rng = np.random.default_rng(0)
    for folder in ('images', 'labels'):
        (tmp_path / folder).mkdir()
    for i in range(8):
        label = np.zeros((64, 64), np.uint8)
        label[16:48, 8 * (i % 4) : 8 * (i % 4) + 24] = 1
        image = label[..., None] * 120 + rng.integers(0, 80, (64, 64, 3))
        cv2.imwrite(str(tmp_path / f'images/{i}.png'), image)
        cv2.imwrite(str(tmp_path / f'labels/{i}.png'), label)
    config = tmp_path / 'config.py'
    config.write_text(f"""
_base_ = [
    'mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py',
    {str(ROOT / 'configs/_base_/agvm.py')!r},
]
model = dict(
    data_preprocessor=dict(size=(64, 64)),
    pretrained=None,
    backbone=dict(depth=18, base_channels=8, norm_cfg=dict(type='BN')),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    decode_head=dict(
        in_channels=[16] * 4, channels=8, num_classes=2,
        norm_cfg=dict(type='BN')))
data = dict(
    _delete_=True,
    type='BaseSegDataset',
    data_root={str(tmp_path)!r},
    data_prefix=dict(img_path='images', seg_map_path='labels'),
    img_suffix='.png',
    metainfo=dict(classes=('ground', 'thing'), palette=[[0] * 3, [255] * 3]),
    pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations'),
        dict(type='PackSegInputs'),
    ])
loader = dict(num_workers=0, persistent_workers=False, dataset=data)
train_dataloader = dict(batch_size=2, **loader)
val_dataloader = loader
test_dataloader = loader
optim_wrapper = dict(**_base_.agvm, begin=1)
train_cfg = dict(max_iters=12, val_interval=12)
default_hooks = dict(
    logger=dict(interval=1), checkpoint=dict(interval=12, by_epoch=False))
""")
    done = command(
        *('bash', 'tools/dist_train.sh', config, '2'),
        *('--work-dir', tmp_path / 'work'),
        *('--cfg-options', 'optim_wrapper.interval=5'),
    )
    assert 'module decode_head' in done.stdout
    assert "the paper's rule for COCO gives" in done.stdout
    assert 'mIoU: ' in done.stdout
    assert '[12/12]' in done.stdout
    state = load_checkpoint(tmp_path / 'work/iter_12.pth')['optimizer']['agvm']
    assert [update for update, _ in state['history']] == [1, 6, 11]


# -- pure Python configs

PURE_PYTHON = """
from mmengine.hooks import CheckpointHook, LoggerHook
from mmengine.dataset import DefaultSampler, default_collate
from mmengine.optim import LinearLR
from torch.optim import SGD

from mmagvm import AGVMHook, AGVMOptimWrapper, AGVMOptimWrapperConstructor
from toy_runner import ToyDataset, ToyModel

default_scope = None
model = dict(type=ToyModel)
train_dataloader = dict(
    batch_size=4, num_workers=0, dataset=dict(type=ToyDataset),
    sampler=dict(type=DefaultSampler, shuffle=True),
    collate_fn=dict(type=default_collate))
train_cfg = dict(by_epoch=True, max_epochs=2)
optim_wrapper = dict(
    type=AGVMOptimWrapper, constructor=AGVMOptimWrapperConstructor,
    optimizer=dict(type=SGD, lr=0.05), accumulative_counts=2, interval=1)
auto_scale_lr = dict(base_batch_size=4)
param_scheduler = [
    dict(type=LinearLR, start_factor=0.1, by_epoch=False, end=5)]
custom_hooks = [dict(type=AGVMHook)]
default_hooks = dict(
    logger=dict(type=LoggerHook, interval=1),
    checkpoint=dict(type=CheckpointHook, interval=1))
randomness = dict(seed=0)
"""


def test_pure_python_config_trains_and_resumes(tmp_path):
    config = tmp_path / 'pure.py'
    config.write_text(PURE_PYTHON)
    work = tmp_path / 'work'
    options = '--auto-scale-lr --cfg-options optim_wrapper.estimator=split'
    first = run(
        *(sys.executable, 'tools/train.py', config, '--work-dir', work),
        *(*options.split(), 'train_cfg.max_epochs=1'),
    )
    assert 'module backbone' in first
    # as dumped, and on by itself
    run(
        *(sys.executable, 'tools/train.py', work / 'pure.py'),
        *('--work-dir', work, '--resume', *options.split()),
        'train_cfg.max_epochs=2',
    )
    state = load_checkpoint(work / 'epoch_2.pth')['optimizer']['agvm']
    assert state['history']


# -- bad input: one sentence, before any training


@pytest.mark.parametrize(
    'args, message',
    [
        (
            [RECIPE, '--amp', '--cfg-options']
            + ['optim_wrapper.type=ApexOptimWrapper'],
            "'ApexOptimWrapper' has no mixed-precision",
        ),
        (
            [QUICKSTART, '--auto-scale-lr', '--cfg-options']
            + ['auto_scale_lr={}'],
            'no auto_scale_lr.base_batch_size',
        ),
        ([RECIPE, '--launcher', 'slurm'], 'needs a GPU for each rank'),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason='one needs no GPU')
def test_bad_arguments_are_refused(args, message, tmp_path):
    done = command(
        *(sys.executable, 'tools/train.py', *args),
        *([] if '--cfg-options' in args else ['--work-dir', tmp_path]),
        check=False,
    )
    assert done.returncode == 1
    assert message in done.stdout and 'Traceback' not in done.stdout


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh'])
def test_launcher_tells_its_usage(script):
    done = command('bash', f'tools/{script}', QUICKSTART, check=False)
    assert done.returncode == 2
    assert f'Usage: tools/{script} CONFIG' in done.stdout


def test_launcher_passes_the_conventions_on(tmp_path):
    """The environment and the arguments reach torchrun."""
    python = tmp_path / 'python'
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    done = command(
        *('bash', 'tools/dist_train.sh', 'config.py', '8', '--amp'),
        PATH=f'{tmp_path}:{os.environ["PATH"]}',
        **dict(NNODES='4', NODE_RANK='3', MASTER_ADDR='node0', PORT='1234'),
        **dict(MAX_RESTARTS='2', TIMEOUT='30'),
    )
    assert done.stdout.split() == [
        'tools/dist_run.py',
        '--nnodes=4',
        '--node_rank=3',
        '--master_addr=node0',
        '--master_port=1234',
        '--nproc_per_node=8',
        '--max_restarts=2',
        '--rdzv_conf=timeout=30',
        'tools/train.py',
        'config.py',
        *('--launcher', 'pytorch', '--amp'),
    ]
