"""tools/analysis_tools: on logs written by hand, and on a run of the toy."""

import json
import re
import sys
import types

import numpy as np
import pytest
from commands import load_command
from mmengine.runner import Runner
from toy import MODULES
from toy_runner import ITERATIONS, toy_cfg

from mmagvm.analysis import figures, run_summary
from mmagvm.analysis import report as page
from mmagvm.analysis.run_log import load_run
from mmagvm.strict_json import to_json

collect_results, plot_variance, report = (
    load_command(f'analysis_tools/{name}.py')
    for name in ('collect_results', 'plot_variance', 'report')
)
NAN, INF = float('nan'), float('inf')
AGVM = "optim_wrapper = dict(type='AGVMOptimWrapper', interval=10)\n"


def train_line(step, phi=1.0, measured=None, **more):
    """A logged line of backbone and neck; the neck's phi is half as large."""
    return {
        **{'lr': 0.1, 'loss': 2.0, 'time': 0.25},
        **{'agvm_variance/backbone': phi, 'agvm_variance/neck': phi / 2},
        **{'agvm_lr_scale/backbone': 1.0, 'agvm_lr_scale/neck': 1.5},
        'agvm/measured': step // 10 if measured is None else measured,
        'agvm/skipped': 0,
        **{'epoch': 1, 'iter': step, 'step': step},
        **more,
    }


def write_run(work_dir, lines, start='20260101_000000', config=AGVM):
    folder = work_dir / start / 'vis_data'
    folder.mkdir(parents=True)
    text = ''.join(json.dumps(line) + '\n' for line in lines)
    (folder / 'scalars.json').write_text(text)
    (folder / 'config.py').write_text(config)
    (work_dir / 'my_config.py').write_text(config)
    log = f'    seed: 7\n    GPU number: 4\nAGVM: mmagvm 0.1.0+g{start[-4:]}\n'
    (work_dir / start / f'{start}.log').write_text(log)
    return work_dir


def lines_to(last, first=10, **more):
    return [train_line(step, **more) for step in range(first, last + 1, 10)]


@pytest.fixture(scope='module')
def toy_run(tmp_path_factory):
    """A work dir that MMEngine wrote."""
    work_dir = tmp_path_factory.mktemp('work') / 'toy'
    cfg = toy_cfg(work_dir, max_epochs=1, estimator='pairs')
    Runner.from_cfg(cfg).train()
    return work_dir


def call(tool, monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['tool', *map(str, args)])
    tool.main()


# -- reading


def test_trained_run_is_read(toy_run):
    run = load_run(toy_run)
    assert run.modules == list(MODULES)
    assert run.anchor == 'backbone'
    assert run.setting('estimator', None) == 'pairs'
    assert run.series['loss'][0].tolist() == list(range(1, ITERATIONS + 1))
    # updates 1 to 3 are measured, each in two iterations
    steps, phis = run.by_module('variance')['neck']
    assert steps.tolist() == [4, 6, 8]
    assert 1.0 not in phis
    assert run_summary.seed(run) == 0
    assert run_summary.batch_size(run) == 8
    assert re.match(r'\d+\.\d+\.\d+', run_summary.commit(run))
    # only update 0 was not measured
    assert run_summary.update_time(run) is None


def test_resumed_run_is_read(tmp_path):
    for epochs in (1, 2):
        cfg = toy_cfg(tmp_path / 'run', max_epochs=epochs)
        cfg.resume = epochs == 2
        cfg.experiment_name += f'_{epochs}'
        Runner.from_cfg(cfg).train()
    run = load_run(tmp_path / 'run')
    assert run.series['loss'][0].tolist() == list(range(1, 2 * ITERATIONS + 1))
    steps, _ = run.by_module('variance')['neck']
    assert steps.tolist() == list(range(4, 2 * ITERATIONS + 1, 2))


def test_pieces_of_a_resumed_run_join(tmp_path):
    write_run(tmp_path, lines_to(50, phi=1.0), '20260101_000001')
    write_run(
        tmp_path, lines_to(80, first=40, phi=0.5), '20260101_000002', AGVM
    )
    run = load_run(tmp_path)
    steps, phis = run.by_module('variance')['backbone']
    assert steps.tolist() == [10, 20, 30, 40, 50, 60, 70, 80]
    assert phis.tolist() == [1.0] * 3 + [0.5] * 5
    assert run.notes == ['resumed; its pieces join at iteration 40']
    assert run_summary.commit(run) == '0.1.0+g0001, then 0.1.0+g0002'


def test_training_started_over_counts_alone(tmp_path):
    write_run(tmp_path, lines_to(50, phi=1.0), '20260101_000001')
    write_run(tmp_path, lines_to(30, phi=0.5), '20260101_000002')
    run = load_run(tmp_path)
    assert run.series['agvm_variance/backbone'][1].tolist() == [0.5] * 3
    assert 'training started over' in run.notes[0]
    assert len(run.logs) == 1


def test_training_started_over_with_a_longer_log_interval(tmp_path):
    """No line of the first start is overtaken, but its config says so."""
    for resume in (True, False):
        work_dir = tmp_path / str(resume)
        write_run(work_dir, lines_to(30), '20260101_000001')
        config = f'{AGVM}resume = {resume}\n'
        lines = lines_to(70, first=50)
        write_run(work_dir, lines, '20260101_000002', config)
        run = load_run(work_dir)
        assert run.series['loss'][0].sum() == 180 + (60 if resume else 0)
        assert ('started over' in run.notes[0]) is not resume


def test_epochs_without_a_line_are_validated_where_the_run_stood(tmp_path):
    """A resumed start validates before it logs."""
    write_run(tmp_path, lines_to(200), '20260101_000001')
    lines = [
        {'mAP': 0.5, 'step': 11},
        train_line(250),
        {'mAP': 0.6, 'step': 13},
    ]
    write_run(tmp_path, lines, '20260101_000002')
    assert load_run(tmp_path).metrics['mAP'][0].tolist() == [200, 250]


def test_validation_stands_at_its_iteration(tmp_path):
    lines = lines_to(20) + [{'mAP': 0.25, 'step': 1}] + lines_to(40, first=30)
    lines += [{'mAP': 0.5, 'step': 2}]
    run = load_run(write_run(tmp_path, lines))
    steps, values = run.metrics['mAP']
    assert steps.tolist() == [20, 40]
    assert values.tolist() == [0.25, 0.5]
    assert run_summary.metrics(run) == {'mAP': 0.5}


def test_hierarchical_tags_are_the_same(tmp_path):
    names = ('lr', 'loss', 'agvm/measured', 'agvm_variance/backbone')
    line = {f'train/{name}': 1.0 for name in names}
    lines = [dict(line, iter=1, step=1), {'val/mAP': 0.5, 'step': 1}]
    run = load_run(write_run(tmp_path, lines))
    assert run.modules == ['backbone']
    assert 'loss' in run.series and 'mAP' in run.metrics


def test_damaged_line_is_reported(tmp_path):
    write_run(tmp_path, lines_to(30))
    file = next(tmp_path.glob('*/vis_data/scalars.json'))
    file.write_text(file.read_text()[:-20])  # as a killed run leaves it
    run = load_run(tmp_path)
    assert run.last_step == 20
    assert 'line 3 of' in run.notes[0]


def test_lines_without_a_new_measurement_do_not_count(tmp_path):
    counts = [0, 0, 1, 1, 2, 0, 1]  # the last two after a restart from nothing
    lines = [
        train_line(10 * (i + 1), phi=0.1 * i, measured=count)
        for i, count in enumerate(counts)
    ]
    run = load_run(write_run(tmp_path, lines))
    assert run.by_module('variance')['backbone'][0].tolist() == [30, 50, 70]


# -- figures


def test_smoothing_leaves_gaps_and_is_not_spoiled_by_them():
    values = np.array([1.0, 3.0, NAN, INF, 5.0, 7.0, 9.0])
    expected = [2.0, 2.0, NAN, NAN, 6.0, 7.0, 8.0]
    np.testing.assert_array_equal(figures.smooth(values, 3), expected)


def test_derived_quantities(tmp_path):
    run = load_run(write_run(tmp_path / 'a', lines_to(40)))
    assert figures.module_series(run, 'ratio')['neck'][1].tolist() == [0.5] * 4
    lr = figures.module_series(run, 'lr')
    np.testing.assert_allclose(lr['neck'][1], 0.15)
    np.testing.assert_allclose(lr['backbone'][1], 0.1)
    # of which paramwise_cfg halves the first group's
    run = load_run(write_run(tmp_path / 'c', lines_to(40, base_lr=0.2)))
    np.testing.assert_allclose(
        figures.module_series(run, 'lr')['neck'][1], 0.3
    )
    config = "optim_wrapper = dict(type='AGVMOptimWrapper', modulate=False)"
    run = load_run(write_run(tmp_path / 'b', lines_to(40), config=config))
    np.testing.assert_allclose(
        figures.module_series(run, 'lr')['neck'][1], 0.1
    )
    assert 'modulate=False' in figures.remarks([run], ['lr'])[0]


def test_no_two_of_twelve_modules_look_the_same():
    styles = [figures.line_style(i) for i in range(12)]
    assert (
        len({(s['linestyle'], s['marker']) for s in styles}) == 12
    )  # in grey
    assert len({(s['color'], s['linestyle']) for s in styles}) == 12


@pytest.mark.parametrize(
    'count, grid', [(1, (1, 1)), (4, (2, 2)), (9, (3, 3))]
)
def test_panels_share_axes_and_colours(tmp_path, count, grid):
    runs = []
    for i in range(count):
        # later runs are longer, noisier, and lack the backbone
        lines = lines_to(40 + 10 * i, phi=0.5 + 0.1 * i)
        if 0 < i == count - 1:
            for line in lines:
                del line['agvm_variance/backbone']
        runs.append(load_run(write_run(tmp_path / str(i), lines)))
    figure = figures.draw(runs, ['variance'])
    axes = figure.axes
    spec = axes[0].get_gridspec()
    assert (spec.nrows, spec.ncols) == grid
    assert [axis.get_title() for axis in axes] == [run.name for run in runs]
    assert len({(axis.get_xlim(), axis.get_ylim()) for axis in axes}) == 1
    assert axes[0].get_xlim()[1] >= runs[-1].last_step
    neck = figures.module_styles(runs)['neck']['color']
    for axis, run in zip(axes, runs):
        strong = [
            line
            for line in axis.lines
            if line.get_color() == neck and line.get_alpha() is None
        ]
        assert len(strong) == 1
        (steps, _), line = run.by_module('variance')['neck'], strong[0]
        assert line.get_xdata().tolist() == steps.tolist()
    figures.plt.close(figure)


def test_what_is_missing_is_reported(tmp_path):
    lines = lines_to(60)
    for line in lines[2:4]:
        line['agvm_variance/neck'] = NAN
    for line in lines:
        del line['agvm/measured']
    short = load_run(write_run(tmp_path / 'short', lines))
    long = load_run(write_run(tmp_path / 'long', lines_to(90)))
    output = '\n'.join(
        figures.remarks([short, long], list(figures.QUANTITIES))
    )
    for text in (
        'short: ends at iteration 60, the longest run at 90',
        'short: agvm/measured was not logged',
        'short: variance of neck has gaps: it is NaN or infinite in 2 of 6',
        "long: no noise_scale: not logged: only estimator='pairs' measures it",
    ):
        assert text in output
    figure = figures.draw([short, long], ['noise_scale'])
    assert 'not logged' in figure.axes[0].texts[0].get_text()
    figures.plt.close(figure)


def test_pictures_of_a_trained_run(toy_run, tmp_path, monkeypatch, capsys):
    call(plot_variance, monkeypatch, toy_run, '--out-dir', tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        f'{name}.{suffix}'
        for name in [*figures.QUANTITIES, 'overview']
        for suffix in ('png', 'svg', 'pdf')
    }
    assert 'toy: ' not in capsys.readouterr().err
    figure = figures.draw([load_run(toy_run)], ['variance'])
    figures.save(figure, tmp_path / 'again.svg', 'svg')
    figures.plt.close(figure)
    first, again = (
        (tmp_path / f'{name}.svg').read_bytes()
        for name in ('variance', 'again')
    )
    assert first == again


# -- results


def test_results_are_collected(tmp_path, monkeypatch, capsys):
    config = AGVM + (
        'train_dataloader = dict(batch_size=3)\n'
        'train_cfg = dict(max_epochs=1)\n'
        "mmagvm_version = '0.1.0+gabc'\n"
    )
    good = lines_to(30) + [{'coco/bbox_mAP': 0.4567, 'step': 1}]
    bad = lines_to(20) + lines_to(40, first=30, loss=NAN)
    bad += [{'coco/bbox_mAP': 0.0, 'step': 1}]
    for name, lines in (('good', good), ('bad', bad)):
        write_run(tmp_path / name, lines, config=config)
    out = tmp_path / 'results.json'
    monkeypatch.chdir(tmp_path)
    call(collect_results, monkeypatch, 'good', 'bad', '--json', out)
    rows = json.loads(out.read_text())
    assert rows[0] == dict(
        run='good',
        config='my_config',
        batch_size=12,
        seed=7,
        trained='iteration 30, in epoch 1 of 1',
        diverged=None,
        metrics={'coco/bbox_mAP': 0.4567},
        commit='0.1.0+gabc',
        log='good/20260101_000000/20260101_000000.log',
        notes=[],
    )
    assert 'from iteration 30' in rows[1]['diverged']
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith('| config | batch size | seed | trained | coco')
    assert '| 12 | 7 |' in table[2] and '| 0.457 |' in table[2]
    assert '| diverged: the loss is NaN' in table[3]


@pytest.mark.parametrize(
    'losses, mean_ap, expected',
    [
        ([2, 2, 2], 0.0, None),
        ([2, NAN, 2], 0.3, None),  # it recovered
        ([2, NAN, 2], 0.0, 'no validation after it found anything'),
        ([2, NAN, 2], None, None),  # unknown
        ([2, 2, INF], 0.3, 'from iteration 30'),
    ],
)
def test_divergence(tmp_path, losses, mean_ap, expected):
    lines = [train_line(10 * i + 10, loss=x) for i, x in enumerate(losses)]
    if mean_ap is not None:
        lines.append({'mIoU': mean_ap, 'step': 1})
    run = load_run(write_run(tmp_path, lines))
    found = run_summary.divergence(run)
    assert found is None if expected is None else expected in found


def test_time_of_measuring(tmp_path):
    lines = lines_to(70)
    for i, line in enumerate(lines):
        line['agvm_update_time/measured'] = 0.5 + 0.01 * i
        line['agvm_update_time/unmeasured'] = 0.1 + 0.01 * i
    lines += [dict(lines[-1], step=80, iter=80)]  # nothing new
    del lines[0]['agvm_update_time/measured']
    found = run_summary.update_time(load_run(write_run(tmp_path, lines)))
    assert found['count'] == 6
    # 0.4 s more in one of ten updates of 0.135 s
    for key in ('low', 'share', 'high'):
        assert found[key] == pytest.approx(0.4 / (10 * 0.135 + 0.4))
    # five hold the median between them in 94 % of all cases
    lines.pop(1)
    few = write_run(tmp_path / 'few', lines)
    assert run_summary.update_time(load_run(few)) is None


# -- the report


def test_report(toy_run, tmp_path, monkeypatch):
    plain = lines_to(30, loss=NAN)
    plain = [
        {k: v for k, v in line.items() if 'agvm' not in k} for line in plain
    ]
    config = (
        "optim_wrapper = dict(type='OptimWrapper')\nrandomness = dict(seed=0)"
    )
    write_run(tmp_path / 'plain', plain, config=config)
    skipping = lines_to(30) + [train_line(40, **{'agvm/skipped': 1})]
    skipping += [{'coco/bbox_mAP': 0.4567, 'step': 1}]
    write_run(tmp_path / 'other', skipping)
    out = tmp_path / 'report.html'
    dirs = (toy_run, tmp_path / 'plain', tmp_path / 'other')
    call(report, monkeypatch, *dirs, '--out', out)
    page = out.read_text()
    # nothing is loaded from anywhere
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    assert '<script' not in page and '@import' not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', page)) <= set(ids)
    for text in (
        '0.4567',
        'diverged: the loss is NaN or infinite from iteration 10',
        'plain: trained without AGVM',
        '1 (logged at iteration 40)',
        'too few logged',
    ):
        assert text in page
    top, fold = page.split('<details>')
    assert '<th>optim_wrapper.type</th>' in top
    assert '<th>randomness.seed</th>' in top  # not set in one
    assert '<th>work_dir</th>' not in top and '<th>work_dir</th>' in fold


def test_only_settings_that_differ_are_on_top(tmp_path):
    configs = [
        "work_dir = 'a'\nx = dict(same=1, y=[dict(z=2)])",
        "work_dir = 'b'\nx = dict(same=1, y=[dict(z=3)], w=[1, 2])",
    ]
    runs = [
        load_run(write_run(tmp_path / str(i), lines_to(10), config=config))
        for i, config in enumerate(configs)
    ]
    different, rows = page.settings(runs)
    assert different == [('x.w', ['-', '[1, 2]']), ('x.y.0.z', ['2', '3'])]
    assert ('x.same', ['1', '1']) in rows


# -- bad input: one sentence that names it


@pytest.mark.parametrize('tool', [report, collect_results])
def test_what_is_no_run_is_left_out(tool, tmp_path, monkeypatch, capsys):
    """As in ``work_dirs/*``; but a path that is not there is an error."""
    write_run(tmp_path / 'run', lines_to(30))
    (tmp_path / 'benchmarks').mkdir()
    (tmp_path / 'run.log').write_text('')
    monkeypatch.chdir(tmp_path)
    call(tool, monkeypatch, 'benchmarks', 'run', 'run.log')
    told = capsys.readouterr().err
    assert 'left out: benchmarks: no training' in told
    assert 'left out: run.log: no such work dir' in told
    with pytest.raises(SystemExit, match='nowhere: no such work dir'):
        call(tool, monkeypatch, 'nowhere', 'run')
    with pytest.raises(SystemExit, match='in any of these folders'):
        call(tool, monkeypatch, 'benchmarks', 'run.log')


@pytest.mark.parametrize(
    'tool, option', [(report, '--out'), (collect_results, '--json')]
)
def test_output_that_is_a_folder_is_refused(
    tool, option, tmp_path, monkeypatch, capsys
):
    for path, message in (
        (tmp_path, 'is a folder: name a file in it'),
        (tmp_path / 'file' / 'page', 'is a file: name a folder for page'),
    ):
        (tmp_path / 'file').write_text('')
        with pytest.raises(SystemExit):
            call(tool, monkeypatch, 'run', option, path)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize('span', [1.3, 3, 8, 60, 1e4])
def test_every_logarithmic_axis_has_ticks(span, tmp_path):
    lines = [train_line(10, phi=0.1), train_line(20, phi=0.1)]
    lines[1]['agvm_variance/neck'] = 0.1 * 1.02
    lines[0]['agvm_variance/neck'] = 0.1 * span
    run = load_run(write_run(tmp_path, lines))
    figure = figures.draw([run], ['ratio'])
    figure.canvas.draw()
    low, high = figure.axes[0].get_ylim()
    labels = [
        label.get_text()
        for label, at in zip(
            figure.axes[0].get_yticklabels(), figure.axes[0].get_yticks()
        )
        if low <= at <= high
    ]
    assert len([label for label in labels if label]) >= 2


@pytest.mark.parametrize('tool', [plot_variance, report, collect_results])
@pytest.mark.parametrize('kind', ['nowhere', 'empty', 'plain', 'no_hook'])
def test_bad_input_is_refused(tool, kind, tmp_path, monkeypatch):
    bare = {'loss': 1.0, 'lr': 0.1, 'iter': 10, 'step': 10}
    (tmp_path / 'empty').mkdir()
    plain = "optim_wrapper = dict(type='AmpOptimWrapper')"
    write_run(tmp_path / 'plain', [bare], config=plain)
    write_run(tmp_path / 'no_hook', [bare])
    if tool is collect_results and kind in ('plain', 'no_hook'):
        return  # results are collected of any run
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        call(tool, monkeypatch, kind)
    message = error.value.code
    assert message.startswith(f'{kind}: ') and '\n' not in message
    if tool is plot_variance:
        expected = dict(
            nowhere='no such work dir',
            empty='no training was logged',
            plain='its config trains with AmpOptimWrapper',
            no_hook='check that AGVMHook is in its custom_hooks',
        )
        assert expected[kind] in message
    assert not list(tmp_path.glob('**/*.html'))


# -- other backends, with no setting but MMEngine's own


def run_with_backend(tmp_path, backend, **settings):
    cfg = toy_cfg(
        tmp_path / 'run', max_epochs=1, estimator='pairs', **settings
    )
    cfg.visualizer.vis_backends.append(dict(type=backend))
    runner = Runner.from_cfg(cfg)
    runner.train()
    return load_run(tmp_path / 'run')


def test_tensorboard_gets_the_series_and_one_chart_for_all(tmp_path):
    accumulator = pytest.importorskip(
        'tensorboard.backend.event_processing.event_accumulator'
    )
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    run = run_with_backend(tmp_path, 'TensorboardVisBackend')
    events = next((tmp_path / 'run').glob('*/vis_data/events.out.tfevents.*'))
    board = accumulator.EventAccumulator(str(events))
    board.Reload()
    for quantity in ('variance', 'lr_scale', 'noise_scale'):
        for module in MODULES:
            tag = f'agvm_{quantity}/{module}'
            found = [(event.step, event.value) for event in board.Scalars(tag)]
            np.testing.assert_allclose(
                found, list(zip(*run.series[tag])), rtol=1e-6
            )
    layout = layout_pb2.Layout()
    (event,) = board.Tensors(metadata.CONFIG_SUMMARY_TAG)
    layout.ParseFromString(event.tensor_proto.string_val[0])
    tags = board.Tags()['scalars']
    for chart in layout.category[0].chart:
        (pattern,) = chart.multiline.tag
        shown = [tag for tag in tags if re.fullmatch(pattern, tag)]
        assert [tag.split('/')[1] for tag in shown] == list(MODULES)


def test_wandb_gets_the_series(tmp_path, monkeypatch):
    """A stand-in for wandb records what MMEngine's backend sends it."""
    sent = []
    wandb = types.SimpleNamespace(
        init=lambda **kwargs: None,
        config=types.SimpleNamespace(update=lambda *args, **kwargs: None),
        run=types.SimpleNamespace(log_code=lambda name: None),
        log=lambda scalars, commit: sent.append(dict(scalars)),
        join=lambda: None,
    )
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    run = run_with_backend(tmp_path, 'WandbVisBackend')
    assert len(sent) == ITERATIONS
    for quantity in ('variance', 'lr_scale', 'noise_scale'):
        section = [
            t for t in sent[-1] if t.split('/')[0] == f'agvm_{quantity}'
        ]
        assert section == [f'agvm_{quantity}/{module}' for module in MODULES]
        for tag in section:
            logged = run.series[tag][1].tolist()
            assert [scalars[tag] for scalars in sent] == logged


def test_results_are_json_for_every_reader():
    value = dict(a=[1, NAN, dict(b=-INF)], c=np.float64('inf'), d=(True, 'x'))
    assert json.loads(to_json(value)) == dict(
        a=[1, None, dict(b=None)], c=None, d=[True, 'x']
    )
