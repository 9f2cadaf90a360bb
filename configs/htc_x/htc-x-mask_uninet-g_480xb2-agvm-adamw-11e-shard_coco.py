# In shards (docs/memory.md).
_base_ = './htc-x-mask_uninet-g_480xb2-agvm-adamw-11e_coco.py'
runner_type = 'FlexibleRunner'
strategy = dict(type='FullyShardStrategy')
