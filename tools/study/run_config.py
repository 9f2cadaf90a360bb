"""The config of one run of the study."""

from pathlib import Path
from typing import Any, Dict, List, Mapping

from mmengine.config import Config

from mmagvm.planning.config_reader import load
from study import in_memory  # noqa: F401  registers what it has
from study.plan import Run
from study.rules import RULE_SETTINGS

DIGITS = tuple('0123456789')
#: A digit upside down is another one.
LEFT_OUT = ('RandomFlip', 'PhotoMetricDistortion', 'RandomCrop')
WARMUP_START = 0.001
EVALUATED_AT_ONCE = 50


def make_config(study: Mapping[str, Any], run: Run, work_dir: Path) -> Config:
    """What MMEngine's Runner takes for a run."""
    model = study['models'][run.cell.model]
    cfg = load(model['base'])
    for part in model['model']:
        cfg.merge_from_dict(dict(model=part))
    pretrained = f'{study["data"]["root"]}backbone.pth'
    cfg.model.backbone.init_cfg = dict(
        type='Pretrained', checkpoint=pretrained
    )
    cfg.model.data_preprocessor.update(mean=[127.0] * 3, std=[64.0] * 3)
    set_data(cfg, study, run)
    set_training(cfg, study, run)
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = run.name
    cfg.randomness = dict(seed=run.seed)
    cfg.log_level = 'WARNING'
    cfg.merge_from_dict(variant(study, run))
    set_log(cfg)
    return cfg


def variant(study: Mapping[str, Any], run: Run) -> Dict[str, Any]:
    """What the run's variant changes."""
    if not run.cell.variant:
        return {}
    changes: Dict[str, Any] = study['variants'][run.cell.variant]
    return changes


def micro_batches(study: Mapping[str, Any], run: Run) -> int:
    """Forward passes of an update."""
    micro_batch: int = study['training']['micro_batch']
    return run.cell.batch_size // micro_batch


def epoch_iterations(study: Mapping[str, Any]) -> int:
    """Forward passes of an epoch, the same for every batch size."""
    images: int = study['data']['train']['images']
    micro_batch: int = study['training']['micro_batch']
    return images // micro_batch


def interval(study: Mapping[str, Any], run: Run) -> int:
    """tau, such that a training has as many measurements as declared."""
    training = study['training']
    iterations: int = training['epochs'] * epoch_iterations(study)
    measurements: int = training['measurements']
    return max(1, iterations // micro_batches(study, run) // measurements)


def set_data(cfg: Config, study: Mapping[str, Any], run: Run) -> None:
    """Digits, in the format of the config's own data set."""
    segments = cfg.default_scope == 'mmseg'
    for part, split in (('train', 'train'), ('val', 'tune'), ('test', 'test')):
        loader = cfg[f'{part}_dataloader']
        dataset = segment_dataset if segments else coco_dataset
        pipeline = small_pipeline(
            loader.dataset.pipeline, study['data']['image_size']
        )
        loader.update(
            batch_size=EVALUATED_AT_ONCE,
            num_workers=0,
            persistent_workers=False,
        )
        # not by update, which would keep what it does not name
        loader.dataset = dict(
            dataset(study['data']['root'], split), pipeline=pipeline
        )
        if part == 'train':
            loader.dataset = dict(
                type='mmengine.InMemoryDataset', dataset=loader.dataset
            )
        if part != 'train' and not segments:
            cfg[f'{part}_evaluator'].ann_file = annotations(
                study['data']['root'], split
            )
    cfg.train_dataloader.update(
        batch_size=study['training']['micro_batch'],
        # in epochs, and in the same order for every method
        sampler=dict(type='DefaultSampler', shuffle=True),
        batch_sampler=None,
    )


def annotations(root: str, split: str) -> str:
    """COCO's file of a split."""
    return f'{root}annotations/{split}.json'


def coco_dataset(root: str, split: str) -> Dict[str, Any]:
    """Boxes and masks."""
    return dict(
        type='CocoDataset',
        metainfo=dict(classes=DIGITS),
        ann_file=annotations(root, split),
        data_prefix=dict(img=f'{root}{split}/'),
        filter_cfg=dict(filter_empty_gt=True, min_size=0),
        test_mode=split != 'train',
    )


def segment_dataset(root: str, split: str) -> Dict[str, Any]:
    """Semantic maps; the background is a class."""
    classes = ('ground', *DIGITS)
    return dict(
        type='BaseSegDataset',
        metainfo=dict(
            classes=classes,
            palette=[[20 * i] * 3 for i in range(len(classes))],
        ),
        img_suffix='.png',
        seg_map_suffix='.png',
        reduce_zero_label=True,
        data_prefix=dict(
            img_path=f'{root}{split}', seg_map_path=f'{root}semantic_{split}'
        ),
    )


def small_pipeline(pipeline: Any, size: int) -> List[Dict[str, Any]]:
    """Without augmentation, at the study's image size."""
    small = []
    for transform in map(dict, pipeline):
        if transform['type'] in LEFT_OUT:
            continue
        if transform['type'] == 'RandomResize':
            transform = dict(type='Resize', keep_ratio=True)
        if transform['type'] == 'Resize':
            transform['scale'] = (size, size)
        small.append(transform)
    return small


def set_training(cfg: Config, study: Mapping[str, Any], run: Run) -> None:
    """Optimizer, schedule, AGVM and what is logged."""
    training = study['training']
    method = study['methods'][run.cell.method]
    epoch = epoch_iterations(study)
    count = micro_batches(study, run)
    warmup = training['warmup_epochs'] * epoch
    cfg.optim_wrapper = dict(
        type='AGVMOptimWrapper',
        constructor='AGVMOptimWrapperConstructor',
        optimizer=dict(method['optimizer'], lr=run.lr),
        accumulative_counts=count,
        interval=interval(study, run),
        ema_decay=training['ema_decay'],
        estimator=training['estimator'],
        begin=warmup // count,
        modulate=method['modulate'],
        clip_grad=training['clip_grad'],
    )
    if 'paramwise_cfg' in method:
        cfg.optim_wrapper.paramwise_cfg = method['paramwise_cfg']
    cfg.param_scheduler = [
        dict(
            type='LinearLR',
            start_factor=WARMUP_START,
            by_epoch=False,
            begin=0,
            end=warmup,
        ),
        dict(
            type='MultiStepLR',
            by_epoch=True,
            milestones=list(training['decay_epochs']),
            gamma=0.1,
        ),
    ]
    cfg.train_cfg = dict(
        type='EpochBasedTrainLoop',
        max_epochs=training['epochs'],
        val_interval=training['epochs'],
    )
    cfg.custom_hooks = [
        dict(type='AGVMHook'),
        dict(type='mmdet.CheckInvalidLossHook', interval=1),
    ]
    rule = method.get('rule')
    if rule is not None:
        cfg.optim_wrapper.update(RULE_SETTINGS[rule])
    if rule == 'mean_one':
        cfg.custom_hooks.append(dict(type='MeanOneHook'))
    cfg.pop('auto_scale_lr', None)


def set_log(cfg: Config) -> None:
    """A line for each measurement."""
    wrapper = cfg.optim_wrapper
    iterations = wrapper.interval * wrapper.accumulative_counts
    cfg.default_hooks = dict(
        logger=dict(type='LoggerHook', interval=iterations), checkpoint=None
    )
    cfg.log_processor = dict(window_size=iterations, by_epoch=True)
    cfg.visualizer = dict(
        type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]
    )
