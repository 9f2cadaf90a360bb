"""How many images an update has, and what follows from it."""

import pytest
import torch
from mmengine.registry import DATA_SAMPLERS
from mmengine.runner import Runner
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler
from toy import MODULES
from toy_runner import ToyDataset, log_of, run, toy_cfg, train_lines

from mmagvm.engine.batch_size import count_images

# with both package sets
pytestmark = pytest.mark.host


def test_noise_scale_is_logged_in_images(tmp_path):
    cfg = toy_cfg(tmp_path / 'run', max_epochs=1, estimator='pairs')
    runner = run(cfg)
    lines = train_lines(runner)
    assert lines[0]['agvm_noise_scale/neck'] == 1.0
    samples = runner.optim_wrapper.modulator.noise_scale
    for module in MODULES:
        # a sample is a micro-batch of 4 images
        assert lines[-1][f'agvm_noise_scale/{module}'] == pytest.approx(
            4 * samples[module]
        )


@pytest.mark.parametrize('counts', [1, 2])
def test_learning_rate_that_forgets_accumulation_is_reported(tmp_path, counts):
    cfg = toy_cfg(tmp_path / 'run', max_epochs=1, accumulative_counts=counts)
    cfg.auto_scale_lr = dict(enable=True, base_batch_size=16)
    if counts == 1:
        cfg.optim_wrapper = dict(optimizer=cfg.optim_wrapper.optimizer)
        cfg.custom_hooks = []
        assert 'ignores accumulative_counts' not in log_of(run(cfg))
        return
    assert (
        'base_batch_size=16 has multiplied the learning rate by 0.25, for 4 '
        'images, but ignores accumulative_counts=2. An update has 8 '
        'images, and the factor would be 0.5: set '
        'auto_scale_lr.base_batch_size=8, or'
    ) in log_of(run(cfg))
    cfg = toy_cfg(tmp_path / 'sampled', max_epochs=1)
    cfg.auto_scale_lr = dict(enable=True, base_batch_size=16)
    # as mmdet's configs, whose loaders do not know their batch size
    cfg.train_dataloader.batch_sampler = dict(type='PlainBatches')
    assert 'by 0.25, for 4 images, but ignores' in log_of(run(cfg))
    cfg = toy_cfg(tmp_path / 'off', max_epochs=1)
    cfg.auto_scale_lr = dict(enable=False, base_batch_size=16)
    assert 'ignores accumulative_counts' not in log_of(run(cfg))


@DATA_SAMPLERS.register_module()
class PlainBatches(BatchSampler):
    """torch's data loader, built from a config."""

    def __init__(self, sampler, batch_size):
        super().__init__(sampler, batch_size, drop_last=False)


class Batches(torch.utils.data.Sampler):
    """Batches of three, which it does not state."""

    def __init__(self, sampler):
        self.count = len(sampler) // 3

    def __iter__(self):
        return iter(torch.arange(3 * self.count).view(-1, 3).tolist())

    def __len__(self):
        return self.count


class Stream(torch.utils.data.IterableDataset):
    """Makes its own batches."""

    def __iter__(self):
        return (dict(inputs=torch.randn(5, 6)) for _ in range(8))

    def __len__(self):
        return 8


def small_loader(batches):
    """Of the toy's images, as ``batches`` puts them together."""
    if batches == 'stream':
        return DataLoader(Stream(), batch_size=None)
    sampler = SequentialSampler(ToyDataset())
    if batches == 'unknown':
        sampler = Batches(sampler)
    else:
        sampler = MultiSize([range(4), range(4, 6)] * 4)
    return DataLoader(ToyDataset(), batch_sampler=sampler)


class MultiSize(list):
    """Like a sampler that alternates between data sets."""

    batch_size = [4, 2]


@pytest.mark.parametrize(
    'batches, images, message',
    [
        ('unknown', 3, 'batch size 6 = 1 ranks x 3 images x 2 accumulated'),
        ('stream', 5, 'batch size 10 = 1 ranks x 5 images x 2 accumulated'),
        ('several', None, 'batch size unknown = 1 ranks x 4 or 2 images x 2'),
    ],
)
def test_images_are_counted_where_the_loader_does_not_tell(
    tmp_path, batches, images, message
):
    cfg = toy_cfg(tmp_path / 'run', max_epochs=1, estimator='pairs')
    cfg.default_hooks.sampler_seed = None  # it expects MMEngine's samplers
    runner = Runner(
        model=dict(type='ToyModel'),
        train_dataloader=small_loader(batches),
        **{
            key: value
            for key, value in cfg.items()
            if key not in ('model', 'train_dataloader')
        },
    )
    runner.train()
    assert message in log_of(runner)
    agvm = runner.optim_wrapper.agvm
    assert agvm.batch['images_per_rank'] == images
    last = train_lines(runner)[-1]
    if images is None:
        assert 'so no noise scale is logged' in log_of(runner)
        assert not [key for key in last if 'noise_scale' in key]
    else:
        assert last['agvm_noise_scale/neck'] == pytest.approx(
            images * agvm.modulator.noise_scale['neck']
        )


class Sample:
    """Like a data sample of mmdet."""

    def __init__(self, img_path):
        self.img_path = img_path


@pytest.mark.parametrize(
    'batch, images',
    [
        (dict(inputs=torch.zeros(7, 3, 4, 4)), 7),
        (dict(inputs=[torch.zeros(3, 4, 4)] * 2, data_samples=[1, 2]), 2),
        (dict(inputs=torch.zeros(3, 4, 4)), None),  # one image, or three?
        ([dict(inputs=0), dict(inputs=0), dict(inputs=0)], 3),
        ([torch.zeros(6, 3, 4, 4), torch.zeros(6)], 6),
        (dict(inputs=dict(img=[0, 0], points=[0, 0])), 2),
        (dict(inputs=dict(img=[0, 0], points=[0])), None),
        (
            # as MultiBranch of mmdet fills branches
            dict(
                inputs=dict(sup=[0, None, None], student=[None, 0, 0]),
                data_samples=dict(
                    sup=[Sample('a'), None, None],
                    student=[None, Sample('b'), Sample('c')],
                ),
            ),
            3,
        ),
        (
            dict(
                inputs=dict(sup=[0], teacher=[0, 0], student=[0, 0]),
                data_samples=dict(
                    sup=[Sample('a')],
                    teacher=[Sample('b'), Sample('c')],
                    student=[Sample('c'), Sample('b')],
                ),
            ),
            3,
        ),
        (dict(data_samples=dict(sup=[Sample(None)])), None),
        ({}, None),
        (None, None),
    ],
)
def test_images_of_a_batch(batch, images):
    assert count_images(batch) == images


def test_another_batch_on_resume_is_reported(tmp_path):
    cfg = toy_cfg(tmp_path / 'run')
    cfg.train_cfg.max_epochs = 1
    run(cfg)
    cfg = toy_cfg(tmp_path / 'run')
    cfg.train_dataloader.batch_size = 2
    cfg.resume = True
    cfg.experiment_name += '_resumed'
    log = log_of(run(cfg))
    assert "'images_per_rank': 4" in log
    assert 'lr_scale keeps its values' in log
