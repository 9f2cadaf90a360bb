"""Types of arguments that several commands take."""

from argparse import ArgumentTypeError
from pathlib import Path


def output_file(text: str) -> Path:
    """A file to write, for ``type`` of an argument.

    Refused before the work is done that it is to hold.
    """
    path = Path(text)
    if path.is_dir():
        raise ArgumentTypeError(f'{text} is a folder: name a file in it')
    for folder in path.parents:
        if folder.exists():
            if not folder.is_dir():
                raise ArgumentTypeError(
                    f'{folder} is a file: name a folder for {path.name}'
                )
            break
    return path
