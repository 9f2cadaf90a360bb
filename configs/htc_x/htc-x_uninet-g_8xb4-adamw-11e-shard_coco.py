# In shards (docs/memory.md).
_base_ = './htc-x_uninet-g_8xb4-adamw-11e_coco.py'
runner_type = 'FlexibleRunner'
strategy = dict(type='FullyShardStrategy')
