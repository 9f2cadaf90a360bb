"""Models of the papers that mmdet and mmseg lack.

A config loads them with
``custom_imports=dict(imports=['mmagvm', 'mmagvm.models'])``. Those that need
mmdet are left out where it is not installed.
"""

from importlib.util import find_spec

from mmagvm.models.rcnet import RCNet
from mmagvm.models.sepc import SEPC
from mmagvm.models.uninet import UniNet

__all__ = ['RCNet', 'SEPC', 'UniNet']

if find_spec('mmdet') is not None:
    from mmagvm.models.htc_lite_roi_head import HTCLiteRoIHead
    from mmagvm.models.transformer_bbox_head import TransformerBBoxHead

    __all__ += ['HTCLiteRoIHead', 'TransformerBBoxHead']
