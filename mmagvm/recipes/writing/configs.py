"""All config files that follow from the recipes."""

from functools import partial
from typing import Callable, Iterator, Sequence

from mmagvm.recipes.reported import MEGDET
from mmagvm.recipes.writing import templates
from mmagvm.recipes.writing.config_file import ConfigFile

#: Batch sizes of the paper's tables.
COCO = (32, 256, 512, 1024)
ADE20K = (32, 512, 1024, 2048)
#: Of the reading note on R50 with AdamW and LAMB.
NOTE = (*COCO, 1536)
#: Of SOAP; the last three of COCO's.
LARGE = (256, 512, 1024)
#: Of the official code, which has AGVM from the second on.
OFFICIAL = (32, 256, 512)
#: Of RetinaNet R18, up to the batch of 10k.
HUGE = (4096, 10240)
#: Of the ablations.
ENDS = (32, 512)

FASTER = 'faster-rcnn_r50_fpn'
MASK = 'mask-rcnn_r50_fpn'
PANOPTIC = 'panoptic-fpn_r50_fpn'
RETINA = 'retinanet_r50_fpn'
R18 = 'retinanet_r18_fpn'
TABLE = ': appendix A.5, table {}'

Write = Callable[[ConfigFile], str]


def _each(
    sizes: Sequence[int],
    recipe: str,
    model: str,
    tag: str,
    write: Write,
    note: str = '',
    folder: str = '',
) -> Iterator[ConfigFile]:
    """A config for each batch size, by default in the recipe's folder."""
    folder = folder or recipe.partition('/')[0]
    for size in sizes:
        yield ConfigFile(folder, recipe, model, tag, size, write, note)


def _pair(
    sizes: Sequence[int],
    recipe: str,
    model: str,
    note: str,
    tag: str = '',
    write: Write = templates.plain,
) -> Iterator[ConfigFile]:
    """Configs without and with AGVM."""
    yield from _each(sizes, recipe, model, tag, write, note)
    agvm = f'agvm-{tag}' if tag else 'agvm'
    yield from _each(sizes, recipe, model, agvm, templates.agvm)


def _paper() -> Iterator[ConfigFile]:
    """Configs of the paper's tables and plots."""
    table = TABLE.format
    yield from _pair(COCO, 'faster_rcnn', FASTER, table(1))
    swin = 'faster-rcnn_swin-t_fpn'
    yield from _pair(COCO, 'faster_rcnn/swin', swin, table(3), 'adamw')
    note = ": all but the epochs as Swin-T's, not in the paper"
    yield from _pair(NOTE, 'faster_rcnn/adamw', FASTER, note, 'adamw')
    yield from _pair(COCO, 'mask_rcnn', MASK, table(1))
    yield from _pair(COCO, 'panoptic_fpn', PANOPTIC, table(1))
    poly = templates.poly
    yield from _pair(ADE20K, 'sem_fpn', 'fpn_r50', table(2), write=poly)
    note = ': not in the paper, the rate is by its rule'
    yield from _pair((256,), 'sem_fpn', 'fpn_r50', note, write=poly)
    note = ": mmdet's base rate, grown by the paper's rule"
    yield from _pair(COCO, 'retinanet', RETINA, note)
    r18, note = 'retinanet/r18', ': not in the paper'
    yield from _pair((32,), r18, R18, note)
    yield from _each(HUGE, r18, R18, '', templates.plain, note)
    note = '; the ratio is held in the range of appendix A.6'
    yield from _each(HUGE, r18, R18, 'agvm', templates.agvm_extreme, note)


def _optimizers() -> Iterator[ConfigFile]:
    """Configs with optimizers of other sources, based on those above."""
    lamb = 'faster_rcnn/lamb'
    yield from _each(NOTE, lamb, FASTER, 'lamb', templates.lamb)
    yield from _each(NOTE, lamb, FASTER, 'pmd-lamb', templates.pmd_lamb)
    yield from _each(COCO, 'mask_rcnn/lars', MASK, 'lars', templates.lars)


def _soap() -> Iterator[ConfigFile]:
    """This project's own configs with SOAP, based on those above."""
    on_sgd = templates.soap_on_sgd
    for folder, model, write, note in (
        ('faster_rcnn', FASTER, templates.soap, ''),
        ('mask_rcnn', MASK, on_sgd, ''),
        ('panoptic_fpn', PANOPTIC, on_sgd, ', which has no such model'),
        ('retinanet', RETINA, on_sgd, ''),
        ('sem_fpn', 'fpn_r50', on_sgd, "; the rate is COCO's"),
    ):
        each = partial(_each, LARGE, f'{folder}/soap', model)
        yield from each('soap', write, note)
        agvm_note = " and SOAP: this project's own"
        yield from each('agvm-soap', templates.agvm, agvm_note)


def _official_code() -> Iterator[ConfigFile]:
    """Configs of the official code's own models."""
    align, source = templates.align, ' as in the official code'
    for recipe, model, best in (
        ('faster_rcnn/align', 'faster-rcnn-align', ', best rate of A.5'),
        ('mask_rcnn/align', 'mask-rcnn-align', ''),
    ):
        each = partial(_each, recipe=recipe, model=f'{model}_r50_fpn')
        yield from each(OFFICIAL[:2], tag='', write=align, note=source)
        yield from each(OFFICIAL[2:], tag='', write=align, note=source + best)
        agvm, note = templates.agvm_align, f',{source}'
        yield from each(OFFICIAL[1:], tag='agvm', write=agvm, note=note)


def _megdet() -> Iterator[ConfigFile]:
    """Configs of MegDet's table."""
    for recipe, rows in MEGDET.items():
        for row in rows:
            note = ", batch norm fixed: the paper's baseline"
            if row.bn_size:
                note = f', BN size {row.bn_size}'
            yield ConfigFile(
                'megdet',
                recipe,
                FASTER,
                f'cgbn{row.bn_size}' if row.bn_size else '',
                row.batch_size,
                templates.megdet,
                note,
                images=row.batch_size // row.gpus,
                bn_size=row.bn_size,
            )


def _ablations() -> Iterator[ConfigFile]:
    """Configs that only measure, each based on the one before."""
    for recipe, model in (
        ('faster_rcnn', 'faster-rcnn_r50'),
        ('retinanet', 'retinanet_r50'),
    ):
        step = partial(_each, ENDS, recipe, folder='ablations')
        yield from step(f'{model}_fpn', 'measure', templates.measured)
        yield from step(model, 'measure', templates.without_fpn)
        head = 'fixed-head-measure'
        if recipe == 'faster_rcnn':
            yield from step(model, '10rois-measure', templates.few_proposals)
            head = f'10rois-{head}'
        yield from step(model, head, templates.fixed_head)


#: All, sorted by path.
CONFIGS = tuple(
    sorted(
        (
            *_paper(),
            *_optimizers(),
            *_soap(),
            *_official_code(),
            *_megdet(),
            *_ablations(),
        ),
        key=lambda config: config.path,
    )
)
