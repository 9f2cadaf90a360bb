"""Advice on batch sizes: cases by hand, simulations, then the command."""

import json
import sys

import numpy as np
import pytest
import torch
from commands import load_command

from mmagvm.core.functional import pairs_noise, pairs_variance
from mmagvm.planning import (
    batch_means,
    noise_scales,
)

MODULES = ('backbone', 'neck')
BATCH, RANKS, IMAGES = 32, 4, 8

# -- what follows from a cosine


def test_noise_scale_by_hand():
    # halves of 16 images: noise and signal are equal in each at cosine 1/2
    found = noise_scales.noise_scale(
        np.array([0.5, 0.8, 1.0, 0.0, -0.3]), BATCH
    )
    assert found == pytest.approx([16, 4, 0, np.inf, np.inf])


def test_noise_scale_is_that_of_the_estimator():
    local, mean = torch.tensor([3.0]).double(), torch.tensor([1.4]).double()
    signal, noise = pairs_noise(local, mean, RANKS)
    phi = pairs_variance(local, mean, RANKS).numpy()
    assert noise_scales.noise_scale(1 - phi, BATCH) == pytest.approx(
        IMAGES * (noise / signal).numpy()
    )


def test_variance_at_other_batches():
    cosine = np.array([0.2, -0.1])
    assert noise_scales.variance_at(cosine, BATCH, BATCH) == pytest.approx(
        [0.8, 1]
    )
    # rho is 64, which leaves half of phi's terms equal at 128
    assert noise_scales.variance_at(cosine, BATCH, 128) == pytest.approx(
        [0.5, 1]
    )


def test_multipliers_grow_to_the_root_of_noise_scales():
    cosine = np.array([0.2, 0.5])  # rho 64 and 16

    def scale(batch, **kwargs):
        kwargs = dict(dict(anchor=0, eps=0, ratio_range=(0.1, 10)), **kwargs)
        return noise_scales.lr_scale_at(cosine, BATCH, batch, **kwargs)

    assert scale(BATCH) == pytest.approx([1, np.sqrt(0.8 / 0.5)])
    assert scale(10**9) == pytest.approx([1, 2])
    assert scale(10**9, anchor=1) == pytest.approx([0.5, 1])
    assert scale(10**9, ratio_range=(0.1, 1.5)) == pytest.approx([1, 1.5])
    assert scale(10**9, eps=1.0) == pytest.approx([1, 1])


def test_more_measurements_for_an_upper_bound():
    # half of the width of the interval takes four times as many
    assert noise_scales.measurements_needed(0.1, -0.1, 50) == 200
    assert noise_scales.measurements_needed(-0.1, -0.3, 50) is None


# -- statistics


def simulate(rng, rho, count, dimensions=200):
    """phi of ``count`` updates whose gradients have noise scale ``rho``."""
    noise = np.sqrt(rho / IMAGES / dimensions)
    grads = noise * rng.standard_normal(
        (count, RANKS, dimensions), dtype=np.float32
    )
    grads[..., 0] += 1  # the true gradient
    local = torch.from_numpy((grads**2).sum(-1).mean(-1))
    mean = torch.from_numpy((grads.mean(1) ** 2).sum(-1))
    return pairs_variance(local, mean, RANKS).numpy()


def covered(make, truth, runs):
    """Share of runs whose 95 % interval holds the truth."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(runs):
        low, high = batch_means.interval(
            noise_scales.noise_scale(
                batch_means.draw_means(make(rng), draws=1000), BATCH
            )
        )
        hits += low[0] <= truth <= high[0]
    return hits / runs


@pytest.mark.parametrize('rho', [16, 64, 400])
def test_interval_holds_the_known_noise_scale(rho):
    share = covered(
        lambda rng: 1 - simulate(rng, rho, 80)[:, None], rho, runs=200
    )
    assert 0.90 <= share <= 0.99


def test_interval_allows_for_correlation():
    def make(rng):
        noise = rng.standard_normal(300)
        for i in range(1, len(noise)):
            noise[i] += 0.6 * noise[i - 1]
        return 0.5 + 0.1 * noise[:, None]

    # as independent values, a fifth of the runs would be covered less
    assert 0.90 <= covered(make, BATCH / 2, runs=300) <= 0.99


def test_draws_keep_the_correlation_between_modules():
    one = np.random.default_rng(0).standard_normal((200, 1))
    draws = batch_means.draw_means(np.concatenate([one, one, -one], 1))
    assert draws[:, 0] == pytest.approx(draws[:, 1])
    assert draws[:, 0] == pytest.approx(-draws[:, 2])


def test_drift_is_seen_and_independence_is_none():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((200, 300))
    assert (batch_means.drift(values) > batch_means.DRIFT).mean() <= 0.02
    trend = values + np.linspace(0, 2, 200)[:, None]
    assert (batch_means.drift(trend) > batch_means.DRIFT).mean() > 0.5
    assert batch_means.drift(np.ones((20, 1))) == 0


# -- the command


def write_run(folder, rhos, count=200, noise_scale=True, batch_line=True):
    """A work dir with measurements whose noise scales are known."""
    rng = np.random.default_rng(0)
    phis = [simulate(rng, rho, count) for rho in rhos]
    start = folder / '20260101_000000'
    (start / 'vis_data').mkdir(parents=True)
    lines = []
    for i, values in enumerate(zip(*phis)):
        line = {'loss': 1.0, 'iter': i + 1, 'step': i + 1}
        for module, rho, phi in zip(MODULES, rhos, values):
            line[f'agvm_variance/{module}'] = float(phi)
            line[f'agvm_lr_scale/{module}'] = 1.0
            if noise_scale:
                line[f'agvm_noise_scale/{module}'] = float(rho)
        line['agvm/measured'] = i + 1
        lines.append(json.dumps(line))
    (start / 'vis_data' / 'scalars.json').write_text('\n'.join(lines))
    (start / 'vis_data' / 'config.py').write_text(
        "optim_wrapper = dict(type='AGVMOptimWrapper')\n"
    )
    if batch_line:
        (start / 'run.log').write_text(f'AGVM: batch size {BATCH} = 4 ranks\n')
    return folder


def advise(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['advise', *map(str, args)])
    load_command('misc/advise_batch_size.py').main()


def test_command_finds_noise_scales_and_multipliers(
    tmp_path, monkeypatch, capsys
):
    advise(monkeypatch, write_run(tmp_path, (400, 40)), '--at', 4096)
    out = capsys.readouterr().out
    assert '100 of 200 logged measurements, iterations 101 to 200' in out
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
        for cells in (line.split('|') for line in out.splitlines())
        if len(cells) > 2
    }
    for module, rho in zip(MODULES, (400, 40)):
        low, high = map(float, rows[module][2].split(' to '))
        assert low <= rho <= high
        assert high <= 4 * low
    assert rows['neck'][-1] == 'known'
    mu = float(rows['4,096'][1].split()[0])
    truth = np.sqrt(2 * 400 / (4096 + 800) / (2 * 40 / (4096 + 80)))
    assert mu == pytest.approx(truth, rel=0.2)
    assert 'neck has more than half (best estimate ' in out
    assert 'the run did not apply them' not in out
    assert 'estimator=' not in out and 'undefined' not in out


def test_whole_blocks_are_used_and_named(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, (400, 40), count=97)
    advise(monkeypatch, tmp_path)
    out = capsys.readouterr().out
    # 49 in the second half, of which 40 make 10 blocks of 4
    assert '40 of 97 logged measurements, iterations 58 to 97' in out


@pytest.mark.parametrize(
    'setting, told',
    [
        ('modulate=False', 'the run did not apply them'),
        ('bound_by_grad_norm=True', 'which the expected ones leave out'),
    ],
)
def test_settings_that_part_a_run_from_the_advice(
    tmp_path, monkeypatch, capsys, setting, told
):
    write_run(tmp_path, (400, 40))
    (config,) = tmp_path.glob('*/vis_data/config.py')
    config.write_text(
        f"optim_wrapper = dict(type='AGVMOptimWrapper', {setting})\n"
    )
    advise(monkeypatch, tmp_path)
    assert f'{setting}' in (out := capsys.readouterr().out) and told in out


def test_no_signal_is_undefined_and_unbounded(tmp_path, monkeypatch, capsys):
    advise(monkeypatch, write_run(tmp_path, (1e7, 40)))
    out = capsys.readouterr().out
    assert 'no bound' in out and 'run too short for more' in out
    assert 'backbone: |G|^2 is estimated as negative' in out or (
        'backbone: an upper bound would take' in out
    )


def test_split_is_reported(tmp_path, monkeypatch, capsys):
    advise(monkeypatch, write_run(tmp_path, (400, 40), noise_scale=False))
    assert "estimator='split' logs no noise scale" in capsys.readouterr().out


@pytest.mark.parametrize(
    'start, end, used',
    [('agvm_noise_scale/', '', '140 of 200'), ('agvm_', 'neck', '120 of 120')],
    ids=['pairs', 'modules'],
)
def test_run_resumed_with_another_setting(
    tmp_path, monkeypatch, capsys, start, end, used
):
    """With ``estimator='pairs'``; with a module more."""
    write_run(tmp_path, (400, 40))
    (log,) = tmp_path.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines[:80]:
        for name in list(line):
            if name.startswith(start) and name.endswith(end):
                del line[name]
    log.write_text('\n'.join(map(json.dumps, lines)))
    advise(monkeypatch, tmp_path, '--begin', 61)
    out = capsys.readouterr().out
    assert f'{used} logged measurements' in out
    assert '| neck' in out


@pytest.mark.parametrize(
    'options, args, message',
    [
        (dict(count=78), [], 'the run is too short'),
        ({}, ['--begin', 190], 'from --begin 190 has 11 logged'),
        (dict(batch_line=False), [], '--batch-size'),
        ({}, ['--batch-size', 0], '--batch-size 0'),
        ({}, ['--at', -1], '--at -1'),
    ],
)
def test_what_cannot_be_used_is_named(
    tmp_path, monkeypatch, options, args, message
):
    work_dir = write_run(tmp_path, (400, 40), **options)
    with pytest.raises(SystemExit, match=message):
        advise(monkeypatch, work_dir, *args)


def test_other_folders_are_refused(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match='no such work dir'):
        advise(monkeypatch, tmp_path / 'missing')
    with pytest.raises(SystemExit, match='no training was logged'):
        advise(monkeypatch, tmp_path)
