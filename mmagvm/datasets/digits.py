"""Makes a COCO-format detection data set out of handwritten digits.

The digits are scikit-learn's scans of real handwriting (UCI Optical
Recognition of Handwritten Digits). Training images use its first 1347 scans,
validation images the last 450, so that no scan is in both. Each image shows
some digits, of several sizes, on a textured background.

Besides boxes it has masks and COCO's panoptic format (``panoptic_*``), with
the background as the one class of stuff. It also has semantic maps like
ADE20K's (``semantic_*``): 1 is the background, 2 to 11 are the digits.
"""

import json
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple, Union

import cv2
import numpy as np
from sklearn.datasets import load_digits

#: Scans of each split: disjoint slices of the 1797.
SCANS = dict(train=slice(0, 1347), val=slice(1347, 1797))
#: Digits' heights in pixels, in an image of IMAGE_SIZE squared.
HEIGHTS = (14, 48)
IMAGE_SIZE = 96
MAX_DIGITS = 5
#: Least ink of a pixel in a digit's mask.
MASK_INK = 0.3
#: The background's category, after the digits'.
GROUND = 10


def draw_background(rng: np.random.Generator) -> np.ndarray:
    """A (IMAGE_SIZE, IMAGE_SIZE, 3) texture: coloured noise of two scales."""
    texture = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3))
    for cells, strength in ((4, 30), (24, 18)):
        noise = rng.normal(0, strength, (cells, cells, 3))
        texture += cv2.resize(
            noise, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_CUBIC
        )
    return texture + rng.uniform(90, 160, 3)


def draw_digit(scan: np.ndarray, height: int) -> np.ndarray:
    """The ink of an 8 x 8 scan, cropped to it, ``height`` pixels high.

    Returns:
        (height, width), from 0 to 1.
    """
    rows, columns = np.any(scan > 0, axis=1), np.any(scan > 0, axis=0)
    scan = scan[rows][:, columns]
    width = max(2, round(height * scan.shape[1] / scan.shape[0]))
    ink = cv2.resize(
        scan / 16.0, (width, height), interpolation=cv2.INTER_CUBIC
    )
    return np.clip(ink, 0, 1)


def overlaps(box: Tuple[int, ...], boxes: List[Tuple[int, ...]]) -> bool:
    """Whether a box (x, y, width, height) covers part of another."""
    x, y, w, h = box
    return any(
        x < x2 + w2 and x2 < x + w and y < y2 + h2 and y2 < y + h
        for x2, y2, w2, h2 in boxes
    )


def draw_image(
    scans: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> Tuple[np.ndarray, List[Tuple[int, ...]], List[int], np.ndarray]:
    """An image with one to MAX_DIGITS digits that do not overlap.

    Returns:
        The (IMAGE_SIZE, IMAGE_SIZE, 3) uint8 image, boxes (x, y, width,
        height) in pixels, the digits' labels, and the number of the digit at
        each pixel, from 1 on, 0 for the background.
    """
    image = draw_background(rng)
    owner = np.zeros(image.shape[:2], np.uint8)
    boxes: List[Tuple[int, ...]] = []
    found: List[int] = []
    for _ in range(rng.integers(1, MAX_DIGITS + 1)):
        index = rng.integers(len(scans))
        # uniform in the logarithm: as many small ones as large ones
        height = int(np.exp(rng.uniform(*np.log(HEIGHTS))))
        ink = draw_digit(scans[index], height)
        h, w = ink.shape
        x, y = rng.integers(IMAGE_SIZE - w), rng.integers(IMAGE_SIZE - h)
        box = (int(x), int(y), w, h)
        if overlaps(box, boxes):
            continue
        dark = rng.random() < 0.5
        colour = rng.uniform(0, 40, 3) if dark else rng.uniform(215, 255, 3)
        patch = image[y : y + h, x : x + w]
        patch += ink[..., None] * (colour - patch)
        boxes.append(box)
        found.append(int(labels[index]))
        owner[y : y + h, x : x + w][ink > MASK_INK] = len(found)
    image += rng.normal(0, 6, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8), boxes, found, owner


def run_lengths(mask: np.ndarray) -> Dict[str, List[int]]:
    """A boolean mask as COCO's uncompressed run-length encoding."""
    flat = np.concatenate([[False], mask.flatten(order='F')])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], changes, [mask.size]]))
    return dict(size=list(mask.shape), counts=counts.tolist())


def panoptic_map(owner: np.ndarray) -> np.ndarray:
    """Each pixel's segment as COCO colours it, blue first for OpenCV."""
    ids = segment_id(owner.astype(np.int64))
    return np.stack([ids >> 16, ids >> 8 & 255, ids & 255], axis=-1)


def segment_id(owner: Union[int, np.ndarray]) -> Union[int, np.ndarray]:
    """A segment's number in the panoptic map, of more than one byte."""
    return 300 * (owner + 1)


def describe_segments(
    boxes: List[Tuple[int, ...]], found: List[int], owner: np.ndarray
) -> List[Dict[str, Any]]:
    """``segments_info`` of the background and the digits."""
    whole = (0, 0, IMAGE_SIZE, IMAGE_SIZE)
    return [
        dict(
            id=segment_id(number),
            category_id=category,
            bbox=list(box),
            area=int((owner == number).sum()),
            iscrowd=0,
        )
        for number, (category, box) in enumerate(
            zip([GROUND, *found], [whole, *boxes])
        )
    ]


def make_split(
    out_dir: Path,
    split: str,
    num_images: int,
    seed: Union[int, Sequence[int]],
    scans: slice,
) -> None:
    """Write images, maps and ``annotations/*.json`` of a split.

    Args:
        out_dir: Folder of the data set.
        split: Its name.
        num_images: How many to draw.
        seed: Of the random numbers; two splits should not share one.
        scans: Those of the 1797 that the images show.
    """
    digits = load_digits()
    shown, labels = digits.images[scans], digits.target[scans]
    rng = np.random.default_rng(seed)
    for folder in (
        split,
        f'panoptic_{split}',
        f'semantic_{split}',
        'annotations',
    ):
        (out_dir / folder).mkdir(parents=True, exist_ok=True)
    images: List[Dict[str, Any]] = []
    panoptic: List[Dict[str, Any]] = []
    annotations: List[Dict[str, Any]] = []
    for image_id in range(num_images):
        image, boxes, found, owner = draw_image(shown, labels, rng)
        name = f'{image_id:06d}.png'
        semantic = np.array([1, *(label + 2 for label in found)], np.uint8)
        for folder, pixels in (
            (split, image),
            (f'panoptic_{split}', panoptic_map(owner).astype(np.uint8)),
            (f'semantic_{split}', semantic[owner]),
        ):
            cv2.imwrite(str(out_dir / folder / name), pixels)
        images.append(
            dict(
                id=image_id,
                file_name=name,
                width=IMAGE_SIZE,
                height=IMAGE_SIZE,
            )
        )
        panoptic.append(
            dict(
                image_id=image_id,
                file_name=name,
                segments_info=describe_segments(boxes, found, owner),
            )
        )
        for number, (box, label) in enumerate(zip(boxes, found), 1):
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image_id,
                    category_id=label,
                    bbox=list(box),
                    area=box[2] * box[3],
                    segmentation=run_lengths(owner == number),
                    iscrowd=0,
                )
            )
    categories = [dict(id=i, name=str(i), isthing=1) for i in range(10)]
    ground = dict(id=GROUND, name='ground', isthing=0)
    for name, content in (
        (split, dict(annotations=annotations, categories=categories)),
        (
            f'panoptic_{split}',
            dict(annotations=panoptic, categories=[*categories, ground]),
        ),
    ):
        (out_dir / 'annotations' / f'{name}.json').write_text(
            json.dumps(dict(images=images, **content))
        )
