# In shards (docs/memory.md).
_base_ = './htc-x_uninet-g_32xb2-adamw-20e_objects365v1.py'
runner_type = 'FlexibleRunner'
strategy = dict(type='FullyShardStrategy')
