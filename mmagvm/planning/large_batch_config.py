"""Turns a config of mmdet or mmseg into its large-batch version.

Writes a config that inherits from the original and states the difference.
Then loads and builds it as a check, and reports what changed and why.
"""

import argparse
import os
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmagvm import AGVMOptimWrapper
from mmagvm.core.modules import find_modules
from mmagvm.engine.config_types import (
    is_pure_python,
    type_name,
    with_strings,
)
from mmagvm.engine.hook import useless_sync_bn
from mmagvm.errors import refuse
from mmagvm.planning.batch import Batch, split_batch
from mmagvm.planning.config_reader import (
    find_base_batch_size,
    innermost,
    one_line,
    training_images,
)
from mmagvm.planning.large_batch import plan_training
from mmagvm.planning.plan import Plan
from mmagvm.recipes.lr_scaling import STUDY_RULES

#: The optimizer that the study finds best, and from which batch size on it
#: is suggested.
BEST, LARGE = 'SOAP', 256
HEADER = '# Made by tools/misc/make_large_batch_config.py:\n'


def plan(cfg: Config, args: argparse.Namespace) -> Tuple[Plan, Batch]:
    """Everything that changes."""
    for name in ('base_batch_size', 'images'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            option = f'--{name.replace("_", "-")}'
            refuse(
                f'{option} {getattr(args, name)} is too small: write 1 or more'
            )
    kind = type_name(cfg.optim_wrapper.get('type', 'OptimWrapper'))
    if not args.agvm and kind.startswith('AGVM'):
        refuse(
            f'--no-agvm: the original has optim_wrapper.type={kind!r}: leave '
            "the option out, or write 'OptimWrapper' there"
        )
    batch = split_batch(
        args.batch_size, args.gpus, args.max_images_per_gpu, agvm=args.agvm
    )
    base, source = (
        (args.base_batch_size, '--base-batch-size')
        if args.base_batch_size
        else find_base_batch_size(args.config, cfg)
    )
    batch = replace(
        batch,
        base=base,
        base_accumulation=cfg.optim_wrapper.get('accumulative_counts', 1),
    )
    result = Plan()
    result.because(f'the original is for a batch of {base}: {source}')
    result.diff['train_dataloader'] = plan_loader(result, cfg, batch)
    result.because(
        f'batch {batch.size} = {batch.gpus} GPUs x {batch.images_per_gpu} '
        f'images x {batch.accumulation} accumulated micro-batches'
    )
    dataset = type_name(innermost(cfg.train_dataloader.dataset).get('type'))
    images = training_images(cfg, args.images)
    plan_training(
        result, cfg, batch, args.optimizer, dataset, images, args.agvm
    )
    return result, batch


def plan_loader(result: Plan, cfg: Config, batch: Batch) -> Dict[str, Any]:
    """Images per GPU, also in samplers that need the number."""
    old = cfg.train_dataloader
    loader: Dict[str, Any] = dict(batch_size=batch.images_per_gpu)
    for name in ('sampler', 'batch_sampler'):
        sampler = old.get(name) or {}
        if 'batch_size' not in sampler:
            continue
        if sampler['batch_size'] != old.batch_size:
            continue  # report_unchanged names it
        loader[name] = dict(batch_size=batch.images_per_gpu)
        ratio = sampler.get('source_ratio')
        if ratio and batch.images_per_gpu % sum(ratio):
            refuse(
                f'--batch-size {batch.size} gives {batch.images_per_gpu} '
                f'images per GPU, which source_ratio={list(ratio)} of '
                f'train_dataloader.{name} cannot divide: choose --batch-size '
                f'and --max-images-per-gpu for a multiple of {sum(ratio)}'
            )
        result.because(
            f'{type_name(sampler["type"])} makes batches of the same size'
        )
    return loader


def default_out(
    name: str, batch: Batch, optimizer: Optional[str], agvm: bool, shard: bool
) -> Path:
    """The original's name with GPUs and images, in the current folder."""
    stem = Path(name.split('::')[-1]).stem
    accumulated = f'x{batch.accumulation}' if batch.accumulation > 1 else ''
    suffix = '-agvm' * agvm + (f'-{optimizer.lower()}' if optimizer else '')
    suffix += '-shard' * shard
    return Path(
        f'{stem}_{batch.gpus}xb{batch.images_per_gpu}{accumulated}{suffix}.py'
    )


def write(out: Path, name: str, cfg: Config, result: Plan) -> None:
    """Write the config that inherits from ``name``, with the reasons.

    A file in any folder cannot inherit from a pure Python config. So such a
    config is written in full, as MMEngine dumps it.
    """
    if out.exists() and not out.read_text().startswith(HEADER):
        refuse(
            f'{out} exists and was not made by this tool: name another file '
            'with --out'
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    base = name
    if '::' not in name:
        base = Path(os.path.relpath(name, out.parent)).as_posix()
    reasons = ''.join(f'# - {reason}\n' for reason in result.reasons)
    diff = with_strings(result.diff)
    if is_pure_python(cfg):
        whole = Config(cfg.to_dict())
        whole.merge_from_dict(diff)
        origin = f'# {base}, a pure Python config, in full with the changes.\n'
        text = whole.pretty_text
    else:
        origin = f'_base_ = [{base!r}]\n'
        text = Config(diff).pretty_text
    out.write_text(f'{HEADER}{reasons}{origin}{text}')


def verify(out: Path, result: Plan, model: nn.Module) -> List[str]:
    """Load the written config and build its optimizer.

    Returns:
        The modules found; none without AGVM.
    """
    try:
        cfg = Config.fromfile(out)
        compare(cfg.to_dict(), with_strings(result.diff), '')
    except Exception as error:  # whatever executing a file may raise
        out.unlink()
        return refuse(f'the written config cannot be read: {one_line(error)}')
    settings = cfg.optim_wrapper
    kind = type_name(settings.get('type', 'OptimWrapper'))
    if 'AmpOptimWrapper' in kind:  # it needs a GPU
        settings.type = kind.replace('Amp', '')
        for key in ('loss_scale', 'dtype', 'use_fsdp'):
            settings.pop(key, None)
    try:
        with redirect_stdout(StringIO()):  # some list all parameters
            wrapper = build_optim_wrapper(model, settings)
    except (ImportError, TypeError, ValueError) as error:
        out.unlink()
        return refuse(f'the config cannot be trained: {one_line(error)}')
    if not isinstance(wrapper, AGVMOptimWrapper):
        return []
    return list(wrapper.modulator.modules)


def compare(loaded: Any, wanted: Any, where: str) -> None:
    """Raise if a value of ``wanted`` did not survive writing."""
    if isinstance(wanted, dict):
        for key, value in wanted.items():
            if key != '_delete_':
                compare(loaded[key], value, f'{where}.{key}')
    elif isinstance(wanted, (list, tuple)):
        assert len(loaded) == len(wanted), where
        for index, (ours, theirs) in enumerate(zip(loaded, wanted)):
            compare(ours, theirs, f'{where}[{index}]')
    else:
        assert loaded == wanted, f'{where}: {loaded!r} instead of {wanted!r}'


def advise_batch(
    cfg: Config, batch: Batch, max_images: int, agvm: bool
) -> List[str]:
    """Advice for micro-batches that are less than half full."""
    share = batch.size // batch.gpus
    if share <= max_images or 2 * batch.images_per_gpu >= max_images:
        return []
    near = max(1, round(share / max_images)) * max_images * batch.gpus
    fuller = split_batch(near, batch.gpus, max_images, agvm=agvm)
    sampler = cfg.train_dataloader.get('sampler') or {}
    unit = sum(sampler.get('source_ratio') or [1])
    if fuller.images_per_gpu < max_images or max_images % unit:
        return []
    return [
        f'micro-batches of {batch.images_per_gpu} leave much of a GPU idle: '
        f'--batch-size {near} has {max_images} in each'
    ]


def advise_optimizer(
    cfg: Config, batch: Batch, wanted: Optional[str], agvm: bool, shard: bool
) -> List[str]:
    """Which optimizer the study supports for a large batch."""
    name = wanted or type_name(cfg.optim_wrapper.optimizer['type'])
    kind = type_name(cfg.optim_wrapper.get('type'))
    without = '--no-agvm' + (
        ", and write optim_wrapper.type='OptimWrapper' in the original"
        if kind.startswith('AGVM')
        else ''
    )
    if name in STUDY_RULES:
        return [
            f"AGVM adds nothing to {name} in this project's study (docs/"
            f'evidence.md). To train without it, add {without}'
        ] * agvm
    if shard or batch.size < LARGE:
        return []
    return [
        f"a batch of {batch.size} is large. In this project's study of small "
        f'detectors, {BEST} loses the least AP from batch {LARGE} on (docs/'
        f'evidence.md; not run on COCO). To use it, add --optimizer {BEST}'
        + (f' {without}' if agvm else '')
    ]


def advise_clipping(cfg: Config, result: Plan) -> List[str]:
    """Advice to clip gradients, with a norm that only the log shows."""
    changed = result.diff['optim_wrapper']
    if changed.get('clip_grad') or cfg.optim_wrapper.get('clip_grad'):
        return []
    return [
        'gradients are not clipped: add optim_wrapper.clip_grad='
        'dict(max_norm=...), with about twice the grad_norm that the log then '
        'shows, since AGVM takes a module that begins to diverge for one with '
        'little noise'
    ]


def advise_norm(model: nn.Module, batch: Batch) -> List[str]:
    """Advice on batch norm, which the user has to decide on."""
    advice = []
    for name in useless_sync_bn(model):
        advice.append(
            f'{name} has synchronized norm layers, but norm_eval=True '
            'switches them off: set norm_eval=False in it'
        )
    for name in find_modules(model):
        module = model.get_submodule(name)
        layers = [m for m in module.modules() if isinstance(m, _BatchNorm)]
        kinds = {type(layer).__name__ for layer in layers}
        if not layers or any('Sync' in k or k == 'CGBN' for k in kinds):
            continue
        snippet = "norm_cfg=dict(type='SyncBN', requires_grad=True)"
        if hasattr(module, 'norm_eval'):
            snippet += ', norm_eval=False'
        advice.append(
            f'{name} has {len(layers)} batch norm layers, '
            + (
                'fixed by norm_eval=True; the paper trains them, with'
                if getattr(module, 'norm_eval', False)
                else f'with statistics over the {batch.images_per_gpu} '
                'images of one GPU; the paper synchronizes them, with'
            )
            + f" {snippet} (or type='CGBN', bn_size=16 or 32, for groups of "
            'GPUs)'
        )
    return advice
