"""The machine and the versions that a benchmark ran with."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Dict

import torch

PACKAGES = ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmagvm', 'numpy')


def machine() -> Dict[str, Any]:
    """The hardware and system."""
    cpu = platform.processor()
    if Path('/proc/cpuinfo').exists():
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith('model name'):
                cpu = line.split(':', 1)[1].strip()
                break
    pages = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
    return dict(
        cpu=cpu,
        cores=os.cpu_count(),
        memory_gib=round(pages / 2**30, 1),
        gpus=[
            torch.cuda.get_device_name(i)
            for i in range(torch.cuda.device_count())
        ],
        system=platform.platform(),
    )


def versions() -> Dict[str, str]:
    """Versions of the packages, and the commit if there is one."""
    found = dict(python=platform.python_version())
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = '-'
    done = subprocess.run(
        ['git', 'describe', '--always', '--dirty'],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    found['commit'] = done.stdout.strip() or '-'
    return found
