"""Tables and figures of a study's results, for docs/evidence.md."""

import argparse
from pathlib import Path

from mmengine.config import Config

from mmagvm.analysis.markdown import fill
from study.plan import by_run, is_tuned, plan
from study.run_study import read_results
from study.study_figures import (
    draw_alignment,
    draw_batch_sizes,
    draw_rates,
    draw_variance,
)
from study.study_tables import (
    cost_table,
    gain_table,
    lengths_table,
    rates_table,
    results_table,
    rules_at_rates_table,
    rules_table,
    sides_table,
    survival_table,
    time_table,
    tuning_table,
    variance_table,
    variants_table,
)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--study', type=Path, default=HERE / 'declaration.py')
    parser.add_argument('--results', type=Path, default=HERE / 'results.jsonl')
    parser.add_argument(
        '--out', type=Path, default=ROOT / 'docs/evidence_tables.md'
    )
    parser.add_argument(
        '--figure', type=Path, default=ROOT / 'resources/evidence.png'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    study = Config.fromfile(args.study)
    results = read_results(args.results)
    if not results:
        raise SystemExit(
            f'{args.results}: no results: start tools/study/run_study.py'
        )
    done = by_run(study, results)
    tuned = {run.cell.model for run in done if is_tuned(study, run.cell)}
    for model in dict.fromkeys(run.cell.model for run in done):
        fill(args.out, f'results {model}', results_table(study, done, model))
        fill(args.out, f'variance {model}', variance_table(study, done, model))
        if model in tuned:
            fill(args.out, f'tuning {model}', tuning_table(study, done, model))
            fill(args.out, f'rates {model}', rates_table(study, done, model))
    fill(args.out, 'survival', survival_table(study, done))
    fill(args.out, 'gain', gain_table(study, done))
    fill(args.out, 'sides', sides_table(study, done))
    fill(args.out, 'variants', variants_table(study, done))
    fill(args.out, 'cost', cost_table(done))
    fill(args.out, 'rules', rules_table(study, done))
    fill(args.out, 'rules at rates', rules_at_rates_table(study, done))
    fill(args.out, 'lengths', lengths_table(study, done))
    fill(args.out, 'time', time_table(study, done))
    draw_variance(study, done, args.figure)
    rates = args.figure.with_stem(f'{args.figure.stem}_rates')
    draw_rates(study, done, rates)
    aligned = args.figure.with_stem(f'{args.figure.stem}_alignment')
    draw_alignment(study, done, aligned)
    sizes = args.figure.with_stem(f'{args.figure.stem}_batch_sizes')
    draw_batch_sizes(study, done, sizes)
    runs = set(plan(study, done))
    print(
        f'{args.out} and {args.figure}, {rates}, {aligned}, {sizes}: of '
        f'{len(runs & done.keys())} runs of {len(runs)}'
    )


if __name__ == '__main__':
    main()
