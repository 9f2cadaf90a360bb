"""The time of a training iteration on this machine, without its data."""

import os
import statistics
import time
from typing import Any, Dict, Iterator, List, Tuple

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper

from mmagvm.engine.config_types import package_of, type_name
from mmagvm.errors import refuse
from mmagvm.planning.config_reader import one_line

#: Objects in an image of COCO, on average: 860001 boxes, 117266 images.
OBJECTS = 7
#: Iterations that are not timed.
WARM_UP = 2


def image_size(cfg: Config) -> Tuple[int, int]:
    """Height and width of the largest images that the pipeline gives."""
    found = None
    for step in pipeline(cfg):
        kind = type_name(step.get('type'))
        sizes: Any = step.get('scale') or step.get('scales')
        if 'Resize' in kind and sizes:
            sizes = (sizes, sizes) if isinstance(sizes, int) else sizes
            sizes = [sizes] if isinstance(sizes[0], int) else sizes
            # mmdet and mmseg write the width first
            width, height = max(sizes, key=lambda size: size[0] * size[1])
            found = int(height), int(width)
        elif kind == 'RandomCrop' and 'crop_size' in step:
            size = step['crop_size']
            height, width = (size, size) if isinstance(size, int) else size
            if height > 1:  # otherwise a fraction of the image
                found = int(height), int(width)
    if found is None:
        refuse(
            'the pipeline of train_dataloader has no image size: write '
            '--image-size HEIGHT WIDTH'
        )
    return found


def pipeline(cfg: Config) -> Iterator[Dict[str, Any]]:
    """Every step that an image goes through, inner data sets first."""

    def datasets(dataset: Dict[str, Any]) -> List[Dict[str, Any]]:
        inner = dataset.get('dataset') or (dataset.get('datasets') or [{}])[0]
        return [*(datasets(inner) if inner else []), dataset]

    for dataset in datasets(cfg.train_dataloader.dataset):
        steps = list(dataset.get('pipeline') or [])
        while steps:
            step = steps.pop(0)
            yield step
            inner = step.get('transforms') or []
            # RandomChoice has a list of pipelines
            inner = inner[0] if inner and isinstance(inner[0], list) else inner
            steps = [*inner, *steps]


def make_data(
    cfg: Config, images: int, size: Tuple[int, int]
) -> Dict[str, Any]:
    """Noise with random annotations, as a data loader gives images."""
    height, width = size
    if package_of(cfg) == 'mmseg':
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        samples = []
        for _ in range(images):
            sample = SegDataSample(
                metainfo=dict(img_shape=size, ori_shape=size)
            )
            sample.gt_sem_seg = PixelData(
                data=torch.randint(0, 2, (1, height, width))
            )
            samples.append(sample)
        inputs = [
            torch.randint(0, 256, (3, height, width)).to(torch.uint8)
            for _ in range(images)
        ]
        return dict(inputs=inputs, data_samples=samples)
    from mmdet.testing import demo_mm_inputs

    steps = list(pipeline(cfg))
    strides = [
        round(1 / step['scale_factor'])
        for step in steps
        if type_name(step.get('type')) == 'SegRescale'
    ]
    # panoptic pipelines load masks and a map by default
    panoptic = any('Panoptic' in type_name(step.get('type')) for step in steps)
    data: Dict[str, Any] = demo_mm_inputs(
        images,
        [(3, height, width)] * images,
        num_items=[OBJECTS] * images,
        with_mask=panoptic or any(s.get('with_mask') for s in steps),
        with_semantic=panoptic or any(s.get('with_seg') for s in steps),
        sem_seg_output_strides=strides[0] if strides else 1,
    )
    return data


def profile(
    cfg: Config,
    model: BaseModel,
    images: int,
    size: Tuple[int, int],
    repetitions: int,
) -> float:
    """Seconds of a training iteration on this device, the median.

    Args:
        cfg: Of the model and its optimizer.
        model: The model, which is trained on noise.
        images: Of an iteration.
        size: Height and width.
        repetitions: Iterations that count, after two that do not.
    """
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    print(
        f'profile on {device}: {images} images of {size[0]} x {size[1]}',
        flush=True,
    )
    if device == 'cpu':
        print(
            f'  {torch.get_num_threads()} threads (OMP_NUM_THREADS), load '
            f'average {os.getloadavg()[0]:.1f}: on a busy machine, or with '
            'ranks that share its cores, the time is another',
            flush=True,
        )
    kind = type_name(cfg.optim_wrapper.get('type'))
    amp = 'Amp' in kind and device == 'cuda'
    optimizer = dict(cfg.optim_wrapper.optimizer, lr=1e-9)
    seconds = []
    try:
        model.init_weights()
        # CPUs have no SyncBN, and one process does not need it
        model = revert_sync_batchnorm(model).to(device).train()
        wrapper = build_optim_wrapper(
            model,
            dict(
                type='AmpOptimWrapper' if amp else 'OptimWrapper',
                optimizer=optimizer,
            ),
        )
        data = make_data(cfg, images, size)
        hub = MessageHub.get_current_instance()
        for number in range(WARM_UP + repetitions):
            hub.update_info('iter', number)  # some models read it
            start = time.perf_counter()
            model.train_step(data, optim_wrapper=wrapper)
            if device == 'cuda':
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            kind = 'warm-up' if number < WARM_UP else 'counts'
            print(
                f'  {number + 1}/{WARM_UP + repetitions}: '
                f'{seconds[-1] * 1e3:.0f} ms ({kind})',
                flush=True,
            )
    except Exception as error:  # whatever models raise
        refuse(
            f'--profile: the model cannot be trained here '
            f'({one_line(error)}): measure it and write --ms-per-iter'
        )
    return statistics.median(seconds[WARM_UP:])
