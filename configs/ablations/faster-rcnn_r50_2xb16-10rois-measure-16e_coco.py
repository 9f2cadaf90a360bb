# like its base, but with 10 proposals in the detection head instead of 512
_base_ = './faster-rcnn_r50_2xb16-measure-16e_coco.py'
model = dict(train_cfg=dict(rcnn=dict(sampler=dict(num=10))))
