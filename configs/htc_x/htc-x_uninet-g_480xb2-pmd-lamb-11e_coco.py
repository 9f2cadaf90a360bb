# COCO fine-tuning at batch 960 with PMD-LAMB, which the paper compares with.
_base_ = './htc-x_uninet-g_480xb2-adamw-11e_coco.py'
optim_wrapper = dict(optimizer=dict(type='PMDLAMB'))
