"""Makes a COCO-format detection data set out of handwritten digits.

The digits are scikit-learn's scans of real handwriting (UCI Optical
Recognition of Handwritten Digits). Training images use its first 1347 scans,
validation images the last 450, so that no scan is in both. Each image shows
some digits, of several sizes, on a textured background.

Besides boxes it has masks and COCO's panoptic format (``panoptic_*``), with
the background as the one class of stuff. It also has semantic maps like
ADE20K's (``semantic_*``): 1 is the background, 2 to 11 are the digits.
"""

import argparse
from pathlib import Path

from mmagvm.datasets.digits import SCANS, make_split


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('out_dir', type=Path, help='where the data set goes')
    parser.add_argument('--train', type=int, default=4000, help='images')
    parser.add_argument('--val', type=int, default=500, help='images')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    for number, (split, num_images) in enumerate(
        (('train', args.train), ('val', args.val))
    ):
        make_split(
            args.out_dir, split, num_images, [args.seed, number], SCANS[split]
        )
    print(
        f'{args.train} training and {args.val} validation images of '
        f'handwritten digits in {args.out_dir}'
    )


if __name__ == '__main__':
    main()
