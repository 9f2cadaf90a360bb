"""Turns a config of mmdet or mmseg into its large-batch version.

Writes a config that inherits from the original and states the difference.
Then loads and builds it as a check, and reports what changed and why.
"""

import argparse
import warnings

from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

from mmagvm.arguments import output_file
from mmagvm.errors import command
from mmagvm.planning.config_reader import build_model, load, scope_of
from mmagvm.planning.large_batch import check
from mmagvm.planning.large_batch_config import (
    advise_batch,
    advise_clipping,
    advise_norm,
    advise_optimizer,
    default_out,
    plan,
    verify,
    write,
)
from mmagvm.planning.optimizer_change import OPTIONS
from mmagvm.planning.sharding import plan_sharding


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'config', help="file, or name such as 'mmdet::retinanet/...'"
    )
    parser.add_argument(
        '--batch-size',
        type=int,
        required=True,
        help='images per update, over all GPUs and micro-batches',
    )
    parser.add_argument(
        '--gpus', type=int, required=True, help='GPUs of the training'
    )
    parser.add_argument(
        '--optimizer',
        help=f"change to one of {', '.join(OPTIONS)} (default: the config's)",
    )
    parser.add_argument(
        '--no-agvm',
        dest='agvm',
        action='store_false',
        help='leave AGVM out, such as for SOAP alone',
    )
    parser.add_argument(
        '--shard',
        action='store_true',
        help='split the model over all GPUs (FullyShardStrategy)',
    )
    parser.add_argument(
        '--max-images-per-gpu',
        type=int,
        default=16,
        help='images per micro-batch; more are accumulated (default: 16)',
    )
    parser.add_argument(
        '--base-batch-size',
        type=int,
        help="batch size of the original's learning rate and schedule "
        '(default: its auto_scale_lr.base_batch_size, else from its name, '
        'else that of 8 GPUs)',
    )
    parser.add_argument(
        '--images',
        type=int,
        help='images in the training set, without repetitions (default: '
        'known for COCO and ADE20K, else counted)',
    )
    parser.add_argument(
        '--out',
        type=output_file,
        help="file to write (default: the original's name with GPUs, images "
        'and options, in the current folder)',
    )
    return parser.parse_args()


@command
def main() -> None:
    args = parse_args()
    warnings.filterwarnings('ignore')  # of OpenMMLab's packages
    MMLogger.get_instance('mmengine', log_level='ERROR')
    cfg = load(args.config)
    check(cfg)
    init_default_scope(scope_of(cfg))
    result, batch = plan(cfg, args)
    model = build_model(cfg)
    if args.shard:
        plan_sharding(result, cfg, batch, model)
    out = args.out or default_out(
        args.config, batch, args.optimizer, args.agvm, args.shard
    )
    write(out, args.config, cfg, result)
    modules = verify(out, result, model)
    print(f'{out}, with {args.config} as its base:')
    for line in (
        *result.reasons,
        *([f'modules: {", ".join(modules)}'] if modules else []),
        *advise_batch(cfg, batch, args.max_images_per_gpu, args.agvm),
        *advise_optimizer(cfg, batch, args.optimizer, args.agvm, args.shard),
        *(advise_clipping(cfg, result) if args.agvm else []),
        *advise_norm(model, batch),
    ):
        print(f'- {line}')


if __name__ == '__main__':
    main()
