"""Writes configs, metafiles and README tables from the recipes' numbers.

To change a number, edit RECIPES of mmagvm/recipes/lr_scaling.py: this command
then writes all files that show it. It leaves the READMEs' text outside of
tables, and the folders `_base_`. Those are written by hand, and state when a
recipe ends and decays.
"""

import argparse
from pathlib import Path

from mmagvm.errors import command, refuse
from mmagvm.recipes.writing import left_over, texts

ROOT = Path(__file__).resolve().parents[2]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--check',
        action='store_true',
        help='write nothing, and fail if a file would change',
    )
    return parser.parse_args()


@command
def main() -> None:
    args = parse_args()
    changed = [
        (path, text)
        for path, text in texts(ROOT).items()
        if not path.exists() or path.read_text() != text
    ]
    for path, text in changed:
        if not args.check:
            path.write_text(text)
        print(path.relative_to(ROOT))
    unknown = [str(path.relative_to(ROOT)) for path in left_over(ROOT)]
    if unknown:
        refuse(f'no recipe has these files, remove them: {", ".join(unknown)}')
    if args.check and changed:
        refuse(
            f'{len(changed)} files differ from the recipes: run '
            'python tools/misc/write_configs.py'
        )


if __name__ == '__main__':
    main()
