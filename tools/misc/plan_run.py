"""Plans a training with AGVM: length, learning rate, warm-up and time."""

import argparse
import math
import warnings
from dataclasses import replace
from typing import List, Sequence, Tuple

from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

from mmagvm.errors import command, refuse
from mmagvm.planning.batch import Batch
from mmagvm.planning.config_reader import (
    build_model,
    find_base_batch_size,
    load,
    scope_of,
    training_images,
)
from mmagvm.planning.iteration_profile import image_size, profile
from mmagvm.planning.large_batch import check
from mmagvm.planning.run_plan import (
    GPUS,
    Training,
    calibrate,
    check_settings,
    count_gradients,
    find_dataset,
    plan_training,
    report,
)
from mmagvm.planning.time_model import Cluster, Update, update_seconds

#: Microseconds of a step of the ring, and timed iterations, by default.
LATENCY, REPETITIONS = 5.0, 5


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        'config', help="file, or name such as 'mmdet::retinanet/...'"
    )
    parser.add_argument(
        '--gpus', type=int, required=True, help='GPUs of the training'
    )
    parser.add_argument(
        '--images-per-gpu',
        type=int,
        required=True,
        help='images of a GPU in an iteration',
    )
    parser.add_argument(
        '--batch-size',
        type=int,
        help='images per update (default: GPUs x images per GPU); larger '
        'ones are accumulated',
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        '--ms-per-iter',
        type=float,
        help='forward, backward and step, measured on one GPU',
    )
    source.add_argument(
        '--profile',
        action='store_true',
        help='measure the time per iteration here, on noise',
    )
    source.add_argument(
        '--calibrate',
        nargs=2,
        metavar='GPUS:MINUTES',
        help='times of two trainings with the same images per GPU, to '
        'compute --ms-per-iter and --latency-us from',
    )
    parser.add_argument(
        '--bandwidth-gbps',
        type=float,
        default=200,
        help="Gbit/s of a GPU's slowest link (default: 200)",
    )
    parser.add_argument(
        '--latency-us',
        type=float,
        help='latency of one step of the ring (default: 5, or what '
        '--calibrate finds)',
    )
    parser.add_argument(
        '--overlap',
        type=float,
        default=0,
        help='part of the all-reduce that backward hides, 0 to 1 (default: 0)',
    )
    parser.add_argument(
        '--estimator',
        choices=['pairs', 'split'],
        help="AGVM's estimator (default: the config's, else pairs)",
    )
    parser.add_argument(
        '--interval',
        type=int,
        help="updates between two measurements (default: the paper's)",
    )
    parser.add_argument(
        '--base-batch-size',
        type=int,
        help="batch size of the config's learning rate (default: as "
        'make_large_batch_config finds it)',
    )
    parser.add_argument(
        '--images',
        type=int,
        help='images in the training set, without repetitions',
    )
    parser.add_argument(
        '--rule',
        choices=['COCO', 'ADE20K'],
        help='data set with the learning-rate rule to follow (default: the '
        "config's)",
    )
    parser.add_argument(
        '--image-size',
        type=int,
        nargs=2,
        metavar=('HEIGHT', 'WIDTH'),
        help="image size of --profile (default: the pipeline's largest)",
    )
    parser.add_argument(
        '--repetitions',
        type=int,
        help='timed iterations of --profile (default: 5)',
    )
    return parser.parse_args()


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse numbers out of range."""
    for name in (
        'gpus',
        'images_per_gpu',
        'batch_size',
        'ms_per_iter',
        'bandwidth_gbps',
        'interval',
        'base_batch_size',
        'images',
        'repetitions',
    ):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            refuse(f'--{name.replace("_", "-")} {value}: write more than 0')
    for name in ('image_size', 'repetitions'):
        if getattr(args, name) is not None and not args.profile:
            refuse(
                f'--{name.replace("_", "-")} is for --profile alone: leave it '
                'out'
            )
    if args.latency_us is not None and args.calibrate:
        refuse(
            f'--latency-us {args.latency_us:g} is what --calibrate computes: '
            'leave it out'
        )
    if not 0 <= (args.latency_us or 0) < math.inf:
        refuse(f'--latency-us {args.latency_us}: write 0 or more')
    if not 0 <= args.overlap <= 1:
        refuse(f'--overlap {args.overlap}: write a number from 0 to 1')
    if args.image_size and min(args.image_size) < 32:
        refuse(f'--image-size {min(args.image_size)}: write 32 or more')


def find_accumulation(args: argparse.Namespace) -> int:
    """Micro-batches of an update."""
    once = args.gpus * args.images_per_gpu
    size = args.batch_size or once
    if size % once:
        below = size // once * once
        refuse(
            f'--batch-size {size} is not a multiple of {args.gpus} GPUs x '
            f'{args.images_per_gpu} images: write '
            + (f'{below} or ' if below else '')
            + f'{below + once}'
        )
    if args.gpus == 1 and size == once:
        refuse(
            '--gpus 1: on one GPU AGVM compares accumulated micro-batches: '
            f'write --batch-size {2 * once} or more'
        )
    return int(size // once)


def read_times(texts: Sequence[str]) -> List[Tuple[int, float]]:
    """GPUs and seconds of ``GPUS:MINUTES``."""
    times = []
    for text in texts:
        try:
            gpus, minutes = text.split(':')
            times.append((int(gpus), 60 * float(minutes)))
            if not all(0 < value < math.inf for value in times[-1]):
                raise ValueError
        except ValueError:
            refuse(f'--calibrate {text}: write GPUS:MINUTES, such as 8:93.5')
    return times


@command
def main() -> None:
    args = parse_args()
    check_numbers(args)
    accumulation = find_accumulation(args)
    times = read_times(args.calibrate or [])
    warnings.filterwarnings('ignore')  # of OpenMMLab's packages
    MMLogger.get_instance('mmengine', log_level='ERROR')
    cfg = load(args.config)
    check(cfg)
    check_settings(cfg)
    init_default_scope(scope_of(cfg))
    dataset = find_dataset(cfg, args.rule)
    base = args.base_batch_size or find_base_batch_size(args.config, cfg)[0]
    images = training_images(cfg, args.images)
    model = build_model(cfg)
    gradients = count_gradients(model, cfg)
    estimator = args.estimator or cfg.optim_wrapper.get('estimator', 'pairs')

    def train_on(gpus: int) -> Training:
        size = gpus * args.images_per_gpu * accumulation
        batch = Batch(
            *(size, gpus, args.images_per_gpu, accumulation, base),
            cfg.optim_wrapper.get('accumulative_counts', 1),
        )
        training = plan_training(cfg, batch, images, dataset)
        if args.interval:
            training = replace(training, interval=args.interval)
        return training

    def update_on(training: Training) -> Update:
        return update_seconds(
            training.batch.gpus,
            accumulation,
            gradients,
            cluster,
            estimator,
            training.measured,
        )

    cluster = Cluster(
        (args.ms_per_iter or 0) / 1e3,
        args.bandwidth_gbps * 1e9 / 8,
        (LATENCY if args.latency_us is None else args.latency_us) / 1e6,
        args.overlap,
    )
    source = 'as given'
    if args.profile:
        size = tuple(args.image_size or image_size(cfg))
        repetitions = args.repetitions or REPETITIONS
        seconds = profile(cfg, model, args.images_per_gpu, size, repetitions)
        cluster = replace(cluster, compute=seconds)
        source = 'measured here, on noise, without data loading'
    elif times:
        cluster = calibrate(
            [(train_on(gpus), seconds) for gpus, seconds in times],
            gradients,
            cluster,
            estimator,
        )
        source = (
            'calibrated, like the latency: two times determine these two '
            'numbers, so the fit does not validate the model'
        )
    print(
        report(
            args.config,
            train_on(args.gpus),
            [train_on(gpus) for gpus in sorted({*GPUS, args.gpus})],
            update_on,
            gradients,
            cluster,
            estimator,
            source,
        )
    )


if __name__ == '__main__':
    main()
