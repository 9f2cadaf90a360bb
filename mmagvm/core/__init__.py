"""AGVM for any training loop: needs nothing but torch."""

from mmagvm.core.agvm import AGVM
from mmagvm.core.modules import find_anchor, find_modules, module_groups
from mmagvm.core.settings import Settings

__all__ = ['AGVM', 'Settings', 'find_anchor', 'find_modules', 'module_groups']
