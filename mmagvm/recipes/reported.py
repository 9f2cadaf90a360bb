"""What the sources report, as printed there.

Nothing here is a result of this project.
"""

from typing import Dict, NamedTuple, Tuple

#: Baseline and AGVM, by recipe and batch size; '-' where there is none.
REPORTED: Dict[str, Dict[int, Tuple[str, str]]] = {
    # the authors' project page: box AP
    'faster_rcnn': {
        32: ('36.8', '36.8'),
        256: ('36.1', '36.7'),
        512: ('35.3', '36.7'),
        1024: ('34.2', '35.4'),
    },
    # a third party's reading note of the conference version
    'faster_rcnn/adamw': {
        32: ('-', '37.1'),
        256: ('-', '37.2'),
        512: ('-', '36.8'),
        1024: ('-', '37.0'),
        1536: ('35.9', '36.6'),
    },
    # that note; LAMB as the baseline
    'faster_rcnn/lamb': {1536: ('33.2', '-')},
    # the official code, on MMDetection 2
    'faster_rcnn/align': {
        32: ('37.1', '-'),
        256: ('36.7', '37.1'),
        512: ('36.2', '36.8'),
    },
    # the project page: mask AP
    'mask_rcnn': {
        32: ('33.9', '33.9'),
        256: ('33.7', '34.1'),
        512: ('33.1', '33.9'),
        1024: ('NaN', '32.6'),
    },
    # the project page; LARS as the baseline
    'mask_rcnn/lars': {
        32: ('34.0', '-'),
        256: ('32.0', '-'),
        512: ('30.4', '-'),
        1024: ('25.1', '-'),
    },
    # the official code, on MMDetection 2
    'mask_rcnn/align': {
        32: ('34.8', '-'),
        256: ('34.4', '35.0'),
        512: ('33.9', '34.6'),
    },
    # the project page: box AP; PMD-LAMB as the baseline
    'retinanet/r18': {
        32: ('31.4', '32.8'),
        4096: ('23.5', '28.7'),
        10240: ('NaN', '26.7'),
    },
    # the project page: PQ
    'panoptic_fpn': {
        32: ('38.9', '38.9'),
        256: ('39.2', '39.3'),
        512: ('38.7', '39.5'),
        1024: ('NaN', '38.8'),
    },
    # the project page: mIoU
    'sem_fpn': {
        32: ('37.5', '37.5'),
        512: ('36.7', '37.3'),
        1024: ('36.4', '37.3'),
        2048: ('36.2', '37.0'),
    },
}


class MegDetRow(NamedTuple):
    """A training in MegDet's table 3."""

    batch_size: int
    #: Images that share batch-norm statistics; 0 with batch norm fixed.
    bn_size: int
    gpus: int
    #: Box AP on COCO.
    reported: str


#: Table 3 of MegDet in its order, by recipe; batches of 16 and more.
MEGDET: Dict[str, Tuple[MegDetRow, ...]] = {
    'megdet': (
        MegDetRow(16, 0, 8, '36.2'),
        MegDetRow(16, 2, 8, '31.0'),
        MegDetRow(16, 16, 8, '37.0'),
        MegDetRow(32, 32, 8, '37.3'),
        MegDetRow(64, 64, 8, '35.3'),
        MegDetRow(64, 32, 16, '37.1'),
        MegDetRow(64, 16, 32, '37.1'),
        MegDetRow(128, 32, 32, '37.1'),
        MegDetRow(128, 16, 64, '37.0'),
        MegDetRow(256, 32, 64, '37.1'),
        MegDetRow(256, 16, 128, '37.1'),
    ),
    'megdet/long': (
        MegDetRow(16, 16, 8, '37.7'),
        MegDetRow(32, 32, 8, '37.8'),
        MegDetRow(64, 32, 16, '37.6'),
        MegDetRow(128, 32, 32, '37.6'),
        MegDetRow(256, 32, 64, '37.7'),
        MegDetRow(256, 16, 128, '37.7'),
    ),
}
