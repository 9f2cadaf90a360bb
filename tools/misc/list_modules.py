"""Prints the modules that AGVM finds in the models of configs.

Prints for each module its trainable parameters, and which module the others
follow. If a model cannot be trained with AGVM, prints why.
"""

import argparse
import json
import os
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Dict, List, Tuple

from mmengine.logging import MMLogger

from mmagvm.arguments import output_file
from mmagvm.errors import command, refuse
from mmagvm.planning.model_modules import (
    ModelModules,
    ModuleReader,
    package_configs,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'configs',
        nargs='*',
        metavar='CONFIG',
        help="files, or names such as 'mmdet::retinanet/...'",
    )
    parser.add_argument(
        '--all',
        choices=['mmdet', 'mmseg'],
        help='take all configs of an installed package',
    )
    parser.add_argument(
        '--out',
        type=output_file,
        help='file of JSON lines, one for each config, written as soon as it '
        'is known; configs that are already in it are not built again',
    )
    args = parser.parse_args()
    if bool(args.configs) == bool(args.all):
        parser.error('name configs, or a package with --all')
    return args


def files_of(args: argparse.Namespace) -> List[Tuple[str, str]]:
    """Each config's name, and its name in the output."""
    if not args.all:
        return [(name, name) for name in args.configs]
    folder = package_configs(args.all)
    # configs name teachers of distillation relative to this folder
    os.chdir(folder.parent)
    return [
        (str(path), str(path.relative_to(folder)))
        for path in sorted(folder.rglob('*.py'))
        if '_base_' not in path.parts
    ]


def read_known(out: Path) -> Dict[str, ModelModules]:
    """The content of a file of an earlier start."""
    known = {}
    for line in out.read_text().splitlines():
        try:
            values = json.loads(line)
            name = values.pop('config')
            known[name] = ModelModules(**values)
        except (KeyError, TypeError, ValueError):
            refuse(
                f'--out {out}: the file was not written by this tool: name '
                'another'
            )
    return known


@command
def main() -> None:
    args = parse_args()
    warnings.filterwarnings('ignore')  # of OpenMMLab's packages
    MMLogger.get_instance('mmengine', log_level='ERROR')
    out = args.out and args.out.resolve()
    known = read_known(out) if out and out.exists() else {}
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    reader = ModuleReader()
    found: List[ModelModules] = []
    for name, shown in files_of(args):
        result = known.get(shown) or reader.read(name, args.all or 'mmengine')
        found.append(result)
        print(f'{shown}: {result}', flush=True)
        if out and shown not in known:
            with open(out, 'a') as file:
                file.write(json.dumps({'config': shown, **asdict(result)}))
                file.write('\n')
    good = sum(not result.problem for result in found)
    unbuilt = sum(not result.built for result in found)
    print(
        f'{len(found)} configs: {good} can be trained with AGVM, '
        f'{len(found) - good - unbuilt} cannot, {unbuilt} have no model that '
        'can be built here'
    )
    if unbuilt == len(found):
        raise SystemExit(1)


if __name__ == '__main__':
    main()
