"""Trains a model of mmdet or mmseg, with AGVM if its config has it."""

import argparse

from mmengine.config import Config

from mmagvm.engine.config_types import type_name
from mmagvm.errors import UsageError, command
from mmagvm.launch.rendezvous import lost_ranks_reported
from mmagvm.launch.resume import choose_checkpoint
from mmagvm.launch.runner import (
    build_runner,
    common_parser,
    join_ranks,
    leave_ranks,
    load_config,
    patience,
)
from mmagvm.version import full_version


def parse_args() -> argparse.Namespace:
    parser = common_parser(__doc__)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='resume from this checkpoint, or from the newest readable one in '
        'the work dir if none is named',
    )
    parser.add_argument(
        '--amp', action='store_true', help='train in mixed precision'
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate by MMEngine's linear rule, from the "
        "config's auto_scale_lr.base_batch_size; ignores accumulation",
    )
    return parser.parse_args()


def enable_amp(cfg: Config) -> None:
    """Replace the optimizer wrapper by its mixed-precision counterpart."""
    amp_of = dict(
        OptimWrapper='AmpOptimWrapper',
        AmpOptimWrapper='AmpOptimWrapper',
        AGVMOptimWrapper='AGVMAmpOptimWrapper',
        AGVMAmpOptimWrapper='AGVMAmpOptimWrapper',
    )
    if not cfg.get('optim_wrapper'):
        raise UsageError(
            '--amp: the config has no optim_wrapper to train with: add one'
        )
    if 'optimizer' not in cfg.optim_wrapper:
        raise UsageError(
            f'--amp: optim_wrapper has several, {[*cfg.optim_wrapper]}: '
            "write type='AmpOptimWrapper' in each, and train without --amp"
        )
    plain = type_name(cfg.optim_wrapper.get('type', 'OptimWrapper'))
    if plain not in amp_of:
        raise UsageError(
            f'--amp: optim_wrapper.type={plain!r} has no mixed-precision '
            'counterpart: train without --amp'
        )
    cfg.optim_wrapper.type = amp_of[plain]
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def enable_auto_scale_lr(cfg: Config) -> None:
    """Switch on the linear rule, if the config has the base batch size."""
    auto = cfg.get('auto_scale_lr')
    if not isinstance(auto, dict) or not auto.get('base_batch_size'):
        raise UsageError(
            '--auto-scale-lr: the config has no auto_scale_lr.base_batch_size,'
            ' the batch size of its learning rate: add '
            'auto_scale_lr=dict(base_batch_size=16) with your number'
        )
    cfg.auto_scale_lr.enable = True


@command
def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    if args.amp:
        enable_amp(cfg)
    if args.auto_scale_lr:
        enable_auto_scale_lr(cfg)
    cfg.mmagvm_version = full_version()  # for readers of the logs
    join_ranks(cfg)
    note = choose_checkpoint(cfg, args.resume)
    runner = build_runner(cfg)
    if note:
        runner.logger.warning(note)
    with lost_ranks_reported(patience(cfg)):
        runner.train()
    del runner
    leave_ranks()


if __name__ == '__main__':
    main()
