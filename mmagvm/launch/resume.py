"""Which checkpoint a run resumes from: the newest readable one."""

import pickle
import re
import sys
import zipfile
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

import torch
from mmengine.config import Config
from mmengine.dist import broadcast_object_list, get_rank

from mmagvm.errors import UsageError
from mmagvm.launch.rendezvous import launcher_store, restarts, timeout_seconds


class Choice(NamedTuple):
    """What to resume from, and what to report about it."""

    #: None: start from the beginning.
    path: Optional[str] = None
    #: For the log.
    note: str = ''
    #: Why the run cannot continue.
    error: str = ''


def choose_checkpoint(cfg: Config, resume: Optional[str]) -> str:
    """Set the config's ``resume`` and ``load_from``.

    Rank 0 chooses for all ranks. So all resume from one file, even while a
    shared folder looks different from node to node.

    Args:
        cfg: The config, with its work dir.
        resume: The argument --resume: None where it was not given, 'auto'
            where no file was named.

    Returns:
        A note for the log, or ''.

    Raises:
        UsageError: There is a checkpoint to resume from, but it is damaged.
    """
    if resume is None and cfg.get('resume'):
        resume = cfg.get('load_from') or 'auto'
    choices: List[Choice] = [Choice()]
    if get_rank() == 0:
        choices = [_choose_at_start(cfg.work_dir, resume)]
        if choices[0].error:
            # now, since the launcher ends rank 0 once the others exit
            print(choices[0].error, file=sys.stderr, flush=True)
    broadcast_object_list(choices)
    path, note, error = choices[0]
    if error:
        raise UsageError('')  # reported above
    if path is not None:
        cfg.resume, cfg.load_from = True, path
    elif resume is not None:
        cfg.resume = False
    return note


def _choose_at_start(work_dir: str, resume: Optional[str]) -> Choice:
    """See :func:`choose`; a restart resumes from checkpoints since launch."""
    if restarts() == 0:
        has_saved_since_launch(work_dir)
        return choose(work_dir, resume)
    if has_saved_since_launch(work_dir):
        chosen = choose(work_dir, 'auto')
        note = chosen.note or f'resume: from {chosen.path}'
    else:
        chosen = choose(work_dir, resume)
        note = chosen.note or (
            'resume: nothing was saved since launch, so the run starts again '
            f'from {chosen.path or "the beginning"}'
        )
    return chosen._replace(note=f'{note} (restart {restarts()})')


def choose(work_dir: str, resume: Optional[str]) -> Choice:
    """The checkpoint for an argument --resume; depends on files alone."""
    if resume is None:
        return Choice()
    if '://' in resume:  # MMEngine fetches it
        return Choice(resume)
    if resume != 'auto':
        return _choose_named(Path(resume))
    newest = last_checkpoint(work_dir)
    if newest is None:
        return Choice(
            note=f'resume: there is no checkpoint in {work_dir}, so the run '
            'starts from the beginning'
        )
    if '://' in newest:
        return Choice(newest)
    why = damage(Path(newest))
    if not why:
        return Choice(newest)
    before = newest_readable(earlier(Path(newest)))
    damaged = f'resume: the newest checkpoint {newest} is damaged ({why})'
    if before is None:
        return Choice(
            error=f'{damaged}, and there is no earlier readable one: name '
            'another with --resume PATH, or train from the beginning in '
            'another --work-dir'
        )
    return Choice(
        str(before), f'{damaged}: resuming from the one before it, {before}'
    )


def _choose_named(path: Path) -> Choice:
    if not path.is_file():
        return Choice(error=f'--resume {path}: there is no such file')
    why = damage(path)
    if not why:
        return Choice(str(path))
    before = newest_readable(earlier(path))
    way_out = (
        'and there is no earlier readable one'
        if before is None
        else f'the newest readable one before it is {before}'
    )
    return Choice(
        error=f'--resume {path}: the file is damaged ({why}), {way_out}'
    )


def damage(path: Path) -> str:
    """The damage of a checkpoint file, or '' if there is none.

    torch writes an uncompressed zip archive with a checksum of every tensor.
    So reading it once finds a truncated file as well as a flipped bit. Then
    torch's own reader maps it, as it is stricter about the archive's headers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken:
            return f'wrong checksum of {broken}'
        torch.load(path, map_location='cpu', mmap=True)
    except zipfile.BadZipFile:
        return 'it is incomplete, or not a checkpoint'
    except pickle.UnpicklingError:
        return ''  # complete, but with a type that torch will refuse
    except Exception as error:  # a flipped bit in a header can cause any
        return str(error).partition('. ')[0] or type(error).__name__
    return ''


def last_checkpoint(work_dir: str) -> Optional[str]:
    """The newest checkpoint of a work dir, which may be damaged.

    MMEngine's file ``last_checkpoint`` names it. If the work dir was moved, a
    file of that name in the work dir counts. If that file is missing or
    truncated, it is the checkpoint that was written last.
    """
    named = ''
    if Path(work_dir, 'last_checkpoint').is_file():
        named = _text(Path(work_dir, 'last_checkpoint')).strip()
    if '://' in named:
        return named
    for path in (Path(named), Path(work_dir, Path(named).name)):
        if path.is_file():
            return str(path)
    saved = [path for path in Path(work_dir).glob('*.pth') if _number(path)]
    if not saved:
        return None
    return str(max(saved, key=lambda path: path.stat().st_mtime_ns))


def earlier(path: Path) -> List[Path]:
    """Checkpoints of the same series with lower numbers, newest first."""
    number = _number(path)
    if number is None:
        return []
    series = path.name[: -len(f'{number}.pth')]
    older: Dict[int, Path] = {}
    for other in path.parent.glob('*.pth'):
        its = _number(other)
        if its is None or other.name != f'{series}{its}.pth':
            continue
        if its < number:
            older[its] = other
    return [older[its] for its in sorted(older, reverse=True)]


def newest_readable(paths: List[Path]) -> Optional[Path]:
    """The first checkpoint that is not damaged."""
    return next((path for path in paths if not damage(path)), None)


def _number(path: Path) -> Optional[int]:
    """12 of epoch_12.pth, None of best_coco_bbox_mAP_epoch_12.pth."""
    match = re.fullmatch(r'(?:epoch|iter)_([1-9]\d*)\.pth', path.name)
    return int(match[1]) if match else None


def has_saved_since_launch(work_dir: str) -> bool:
    """Whether this is a restart by torchrun that has something to resume.

    A work dir may have checkpoints of earlier runs. If a run started from the
    beginning, its restart must not use them. So the first attempt records the
    newest one at launch in torchrun's store, which outlives it. Call this on
    rank 0 only.
    """
    store = launcher_store(timeout_seconds())
    if store is None:
        return False
    now = _state_of(Path(work_dir, 'last_checkpoint'))
    key = 'last_checkpoint at launch'
    # also absent on a restart of ranks that died before this point
    if not store.check([key]):
        store.set(key, now)
    return store.get(key).decode() != now


def _state_of(path: Path) -> str:
    if not path.is_file():
        return 'none'
    return f'{path.stat().st_mtime_ns} {_text(path)}'


def _text(path: Path) -> str:
    return path.read_text(errors='replace')
