"""Evaluates a checkpoint of mmdet or mmseg on its test set."""

import argparse

from mmengine.config import Config

from mmagvm.engine.config_types import package_of, type_name
from mmagvm.errors import UsageError, command
from mmagvm.launch.rendezvous import lost_ranks_reported
from mmagvm.launch.runner import (
    build_runner,
    common_parser,
    join_ranks,
    leave_ranks,
    load_config,
    patience,
)


def parse_args() -> argparse.Namespace:
    parser = common_parser(__doc__)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out', help='dump predictions to this pickle file (.pkl)'
    )
    parser.add_argument(
        '--show', action='store_true', help='show prediction results'
    )
    parser.add_argument(
        '--show-dir', help='save painted images in this folder of the work dir'
    )
    parser.add_argument(
        '--wait-time', type=float, default=2, help='seconds between images'
    )
    args = parser.parse_args()
    if args.out is not None and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'--out {args.out}: must end in .pkl or .pickle')
    return args


def enable_visualization(cfg: Config, args: argparse.Namespace) -> None:
    """Let the config's visualization hook draw."""
    if 'visualization' not in cfg.get('default_hooks', {}):
        raise UsageError(
            '--show, --show-dir: the config has no hook to draw with: add '
            'default_hooks.visualization'
        )
    hook = cfg.default_hooks.visualization
    hook.draw = True
    hook.show = args.show
    hook.wait_time = args.wait_time
    if args.show_dir is not None:
        # mmdet's hook has its own folder; mmseg's uses its visualizer's
        if type_name(hook.type) == 'DetVisualizationHook':
            hook.test_out_dir = args.show_dir
        else:
            cfg.visualizer.save_dir = args.show_dir


def dump_predictions(cfg: Config, out: str) -> None:
    """Add an evaluator that keeps the predictions."""
    # with the package's name, since pure Python configs have no scope
    dump = (
        'mmdet.DumpDetResults' if package_of(cfg) == 'mmdet' else 'DumpResults'
    )
    evaluators = cfg.test_evaluator
    if not isinstance(evaluators, (list, tuple)):
        evaluators = [evaluators]
    cfg.test_evaluator = [*evaluators, dict(type=dump, out_file_path=out)]


@command
def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    cfg.load_from = args.checkpoint
    if args.show or args.show_dir:
        enable_visualization(cfg, args)
    if args.out is not None:
        dump_predictions(cfg, args.out)
    join_ranks(cfg)
    runner = build_runner(cfg)
    with lost_ranks_reported(patience(cfg)):
        runner.test()
    del runner
    leave_ranks()


if __name__ == '__main__':
    main()
