"""Where a benchmark writes its figures."""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.provenance import machine, versions
from mmagvm.analysis.markdown import fill
from mmagvm.strict_json import to_json


def add_outputs(parser: argparse.ArgumentParser) -> None:
    """The arguments that :func:`write` takes."""
    parser.add_argument('--out', type=Path, help='file of JSON to write')
    parser.add_argument(
        '--markdown', type=Path, help='page to write the table into'
    )


def write(
    args: argparse.Namespace, name: str, text: str, **results: Any
) -> None:
    """Print the table, and write all figures where the arguments say.

    Args:
        args: With those of :func:`add_outputs`.
        name: Of the comments around the table in a page.
        text: The table.
        results: For the file of JSON, beside the machine and the versions.
    """
    print(text)
    if args.out:
        report = dict(machine=machine(), versions=versions(), **results)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(to_json(report, indent=1))
    if args.markdown:
        fill(args.markdown, name, text)
