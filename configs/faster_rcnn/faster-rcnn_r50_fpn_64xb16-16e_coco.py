# batch 1024: appendix A.5, table 1; an epoch is 115 iterations
_base_ = './_base_/faster-rcnn_r50_fpn_16e_coco.py'
optim_wrapper = dict(optimizer=dict(lr=0.452))
param_scheduler = [dict(_base_.warmup, end=230), _base_.decay]
auto_scale_lr = dict(base_batch_size=1024)
