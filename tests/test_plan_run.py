"""Plans of a run: the time by hand, the rest against the converter of configs.

No time is measured but by --profile, and none is asserted.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks import plan_accuracy
from commands import load_command
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmagvm.errors import UsageError
from mmagvm.planning import (
    iteration_profile,
    run_plan,
    time_model,
)
from mmagvm.planning.batch import Batch
from mmagvm.planning.config_reader import build_model

ROOT = Path(__file__).parent.parent


QUICKSTART = str(
    ROOT / 'configs/quickstart/faster-rcnn_r18_fpn_2xb8-agvm-4e_digits.py'
)
ADAMW = str(
    ROOT / 'configs/faster_rcnn/'
    'faster-rcnn_r50_fpn_2xb16-agvm-adamw-12e_coco.py'
)
SEM_FPN = str(
    ROOT / 'configs/sem_fpn/fpn_r50_2xb16-agvm-160k_ade20k-512x512.py'
)
CLUSTER = time_model.Cluster(0.1, 1e9, 1e-5)
GRADIENTS = time_model.Gradients(100e6, 4)

# -- the model of time


def test_ring_by_hand():
    # 6 steps: each sends a quarter of 100 MB at 1 GB/s, and waits 10 us twice
    assert time_model.all_reduce_seconds(
        4, 100e6, 2, CLUSTER
    ) == pytest.approx(6 * (0.025 + 2e-5))
    assert time_model.all_reduce_seconds(1, 100e6, 2, CLUSTER) == 0


def test_buckets_are_those_of_ddp():
    mib = 2**20
    assert [
        time_model.Gradients(size * mib, 1).buckets
        for size in (0.5, 1, 2, 26, 27)
    ] == [1, 1, 2, 2, 3]


def test_parts_of_an_update():
    def parts(estimator, measured=0.1, cluster=CLUSTER):
        return time_model.update_seconds(
            4, 2, GRADIENTS, cluster, estimator, measured
        )

    whole = time_model.all_reduce_seconds(4, 100e6, GRADIENTS.buckets, CLUSTER)
    split, pairs = parts('split'), parts('pairs')
    assert split.compute == pairs.compute == 0.2
    assert split.all_reduce == pairs.all_reduce == pytest.approx(whole)
    # once more on one update in ten; or 2 numbers of each of 4 modules in one
    assert split.agvm == pytest.approx(whole / 10)
    assert pairs.agvm == pytest.approx((6 * 64 / 4 / 1e9 + 6e-5) / 10)
    assert parts('split', measured=0).agvm == 0
    assert split.total == pytest.approx(0.2 + 1.1 * whole)
    hidden = replace(CLUSTER, overlap=0.75)
    half = parts('split', cluster=hidden)
    assert half.all_reduce == pytest.approx(whole / 4)
    assert half.agvm == split.agvm  # after backward: nothing hides it
    compressed = replace(GRADIENTS, sent=0.5)
    assert compressed.buckets == GRADIENTS.buckets
    parts_sent = time_model.update_seconds(
        4, 2, compressed, replace(CLUSTER, latency=0), 'split', 0.1
    )
    assert parts_sent.all_reduce == pytest.approx(6 * 0.0125)
    assert parts_sent.agvm == pytest.approx(0.1 * 6 * 0.025)
    assert parts('pairs', cluster=hidden).agvm == pairs.agvm


# -- what is trained


@pytest.fixture(scope='module')
def adamw():
    return Config.fromfile(ADAMW)


def batch_of(gpus, images=2, accumulation=1, base=32):
    return Batch(
        gpus * images * accumulation, gpus, images, accumulation, base
    )


def train_on(cfg, gpus, **kwargs):
    return run_plan.plan_training(
        cfg, batch_of(gpus, **kwargs), 117266, 'CocoDataset'
    )


def test_plan_is_that_of_the_paper(adamw):
    small, large = train_on(adamw, 16), train_on(adamw, 768)
    assert (small.updates, large.updates) == (43980, 924)
    assert small.lr == pytest.approx(2e-4)
    assert large.lr == pytest.approx(2e-4 * 4 * 1.5 ** (3.585 / 2), rel=1e-3)
    assert large.warmup == 3 * 77 and large.interval == 5
    assert large.begin == 3 * 77 + 77  # not 100, as that is over an epoch
    measured = range(308, 924, 5)
    assert large.measured == pytest.approx(len(measured) / 924)


def test_plan_counts_updates_not_iterations(adamw):
    once, twice = train_on(adamw, 64), train_on(adamw, 32, accumulation=2)
    assert twice.batch.size == once.batch.size
    # epochs end with incomplete batches
    assert twice.updates == pytest.approx(once.updates, rel=1e-3)
    assert twice.lr == once.lr and twice.warmup == once.warmup


def test_calibration_meets_both_times(adamw):
    times = [
        (train_on(adamw, gpus), 60 * minutes)
        for gpus, minutes in ((16, 148), (768, 4.2))
    ]
    for estimator in ('split', 'pairs'):
        found = run_plan.calibrate(
            times,
            GRADIENTS,
            time_model.Cluster(0, 25e9, 0, overlap=0.5),
            estimator,
        )
        assert found.compute > 0 and found.latency > 0
        assert (found.bandwidth, found.overlap) == (25e9, 0.5)
        for training, seconds in times:
            update = time_model.update_seconds(
                training.batch.gpus,
                1,
                GRADIENTS,
                found,
                estimator,
                training.measured,
            )
            assert update.total * training.updates == pytest.approx(seconds)


def test_impossible_calibration_is_refused(adamw):
    def calibrate(*times):
        run_plan.calibrate(
            [(train_on(adamw, gpus), seconds) for gpus, seconds in times],
            GRADIENTS,
            CLUSTER,
            'pairs',
        )

    with pytest.raises(UsageError, match='ms of computing'):
        calibrate((16, 1), (768, 1e5))
    with pytest.raises(UsageError, match='give two different numbers'):
        calibrate((16, 100), (16, 200))


def test_gradients_are_those_of_trained_parameters():
    cfg = Config.fromfile(QUICKSTART)
    init_default_scope('mmdet')
    model = build_model(cfg)
    for param in model.neck.parameters():
        param.requires_grad = False
    trained = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.requires_grad and not name.startswith('neck')
    )
    assert run_plan.count_gradients(model, cfg).size == 4 * trained
    cfg.optim_wrapper.comm_hook = 'fp16'
    found = run_plan.count_gradients(model, cfg)
    assert (found.size, found.sent) == (4 * trained, 0.5)
    assert found.modules == 3  # what is frozen is none
    cfg.optim_wrapper.modules = ['backbone', 'rpn_head']
    assert run_plan.count_gradients(model, cfg).modules == 3  # and others
    for param in model.backbone.parameters():
        param.requires_grad = False
    with pytest.raises(UsageError, match="'backbone'.* no trainable"):
        run_plan.count_gradients(model, cfg)


def test_measuring_ends_where_it_is_set_to(adamw):
    plain = train_on(adamw, 8)
    cfg = Config(adamw.to_dict())
    cfg.optim_wrapper.end = plain.begin + 100
    assert train_on(cfg, 8).measured == pytest.approx(10 / plain.updates)
    assert plain.measured > 0.05


@pytest.mark.parametrize(
    'settings, message',
    [
        (dict(estimator='splt'), "estimator='splt' is not an estimator"),
        (dict(comm_hook='fp8'), "comm_hook='fp8' is not a way to send"),
        (None, "strategy.type='FullyShardStrategy': the plan is for data-"),
    ],
)
def test_what_cannot_be_planned_is_refused(adamw, settings, message):
    cfg = Config(adamw.to_dict())
    run_plan.check_settings(cfg)
    if settings is None:
        cfg.strategy = dict(type='FullyShardStrategy')
    else:
        cfg.optim_wrapper.update(settings)
    with pytest.raises(UsageError, match=message):
        run_plan.check_settings(cfg)


@pytest.mark.parametrize(
    'config, size', [(QUICKSTART, (96, 96)), (SEM_FPN, (512, 512))]
)
def test_images_are_as_large_as_the_pipelines(config, size):
    assert iteration_profile.image_size(Config.fromfile(config)) == size


def test_images_of_many_scales_and_nested_pipelines():
    scales = [(1333, 640), (1333, 800)]
    steps = [
        dict(
            type='RandomChoice',
            transforms=[[dict(type='RandomChoiceResize', scales=scales)]],
        )
    ]
    inner = dict(type='CocoDataset', pipeline=steps)
    cfg = Config(
        dict(
            train_dataloader=dict(
                dataset=dict(type='MultiImageMixDataset', dataset=inner)
            )
        )
    )
    assert iteration_profile.image_size(cfg) == (800, 1333)
    inner['pipeline'] = []
    cfg.train_dataloader.dataset.dataset = inner
    with pytest.raises(UsageError, match='--image-size'):
        iteration_profile.image_size(cfg)


# -- the command


def plan(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['plan_run', *map(str, args)])
    load_command('misc/plan_run.py').main()


BASIC = ('--gpus', 32, '--images-per-gpu', 2, '--images', 4000)


def test_command_tells_parts_and_tables(monkeypatch, capsys):
    plan(
        monkeypatch,
        QUICKSTART,
        *BASIC,
        *('--ms-per-iter', 100, '--interval', 3, '--estimator', 'split'),
    )
    out = capsys.readouterr().out
    assert 'batch 64 = 32 GPUs x 2 images x 1 micro-batches' in out
    assert 'AGVM with split measures every 3 updates' in out
    rows = [
        [cell.strip() for cell in line.split('|')[1:-1]]
        for line in out.splitlines()
        if line.startswith('|')
    ]
    parts = {row[0]: row for row in rows}
    assert parts['compute'][1] == '100.00'
    shares = [
        float(parts[name][3].rstrip(' %'))
        for name in ('compute', 'all-reduce', 'AGVM')
    ]
    assert sum(shares) == pytest.approx(100, abs=0.02)
    # 4 epochs of 4000 images
    assert parts['32'][1:3] == ['64', '252']
    assert [int(row[0]) for row in rows if row[0].isdigit()] == list(
        run_plan.GPUS
    )


def test_profile_trains_the_model(monkeypatch, capsys):
    plan(
        monkeypatch,
        QUICKSTART,
        *('--gpus', 8, '--images-per-gpu', 1, '--images', 4000),
        *('--profile', '--repetitions', 1, '--image-size', 64, 64),
    )
    out = capsys.readouterr().out
    assert 'profile on c' in out and '3/3:' in out
    assert 'measured here' in out


@pytest.mark.parametrize(
    'args, message',
    [
        (['nix.py', *BASIC, '--ms-per-iter', 1], 'no such config file'),
        (
            [QUICKSTART, *BASIC, '--ms-per-iter', 1, '--batch-size', 100],
            'write 64 or 128',
        ),
        (
            [QUICKSTART, *BASIC, '--ms-per-iter', 1, '--batch-size', 63],
            'images: write 64$',
        ),
        ([QUICKSTART, *BASIC, '--ms-per-iter', -1], '--ms-per-iter -1.0'),
        (
            [QUICKSTART, *BASIC, '--ms-per-iter', 1, '--overlap', 2],
            '--overlap 2.0',
        ),
        (
            [QUICKSTART, *BASIC, '--calibrate', '16', '8:4'],
            '--calibrate 16: write GPUS:MINUTES',
        ),
        (
            [QUICKSTART, *BASIC, '--calibrate', '16:nan', '8:4'],
            '--calibrate 16:nan: write GPUS:MINUTES',
        ),
        (
            [QUICKSTART, *BASIC, '--calibrate', '8:9', '16:5']
            + ['--latency-us', 5],
            '--latency-us 5 is what --calibrate computes',
        ),
        (
            [QUICKSTART, *BASIC, '--ms-per-iter', 1, '--repetitions', 3],
            '--repetitions is for --profile alone',
        ),
        (
            [SEM_FPN, *BASIC, '--ms-per-iter', 1],
            '--images 4000 has no effect, since the run counts iterations',
        ),
        (
            [QUICKSTART, *BASIC, '--calibrate', '8:8', '8:4'],
            'both times are for the same number of GPUs',
        ),
        (
            [
                QUICKSTART,
                *('--gpus', 1, '--images-per-gpu', 2, '--ms-per-iter', 1),
            ],
            '--batch-size 4',
        ),
    ],
)
def test_bad_input_is_named(monkeypatch, args, message):
    with pytest.raises(SystemExit, match=message) as error:
        plan(monkeypatch, *args)
    assert '\n' not in str(error.value)


def test_unknown_data_set_needs_a_rule():
    cfg = Config(
        dict(train_dataloader=dict(dataset=dict(type='CityscapesDataset')))
    )
    with pytest.raises(UsageError, match="'CityscapesDataset'.*--rule COCO"):
        run_plan.find_dataset(cfg, None)
    assert run_plan.find_dataset(cfg, 'ADE20K') == 'ADE20KDataset'
    cfg.train_dataloader.dataset.type = 'CocoPanopticDataset'
    assert run_plan.find_dataset(cfg, None) == 'CocoDataset'


# -- the comparison with measured times


def test_cluster_is_fitted_to_its_own_times():
    truth = time_model.Cluster(0.5, 2e9, 1e-4)
    times = {
        size: [time_model.all_reduce_seconds(2, size, 1, truth), 1.0]
        for size in plan_accuracy.SIZES
    }
    found = plan_accuracy.fit_cluster([0.6, 0.5, 9.0], times)
    assert found.compute == 0.5
    assert found.bandwidth == pytest.approx(2e9, rel=1e-3)
    assert found.latency == pytest.approx(1e-4, rel=0.02)


def test_ranks_beyond_the_cores_share_them():
    two, four = (
        plan_accuracy.predict(4, GRADIENTS, CLUSTER, cores) for cores in (2, 4)
    )
    for name, seconds in four.items():
        assert two[name] == pytest.approx(2 * seconds)
    assert four['split measured'] > four['pairs measured'] > four['plain']
    assert four['split'] == four['plain']
