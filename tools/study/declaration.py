# Every run of the study, the most informative first. Read by
# run_study.py; another file may inherit this one and change it, as smoke.py
# does. Nothing here was chosen by looking at test images.

# -- data: digits, with scans of its own for training, tuning and testing
data = dict(
    root='data/study/',
    seed=7,
    image_size=64,
    # images, and the first and the last + 1 of scikit-learn's 1797 scans
    train=dict(images=4096, scans=(0, 1097)),
    tune=dict(images=400, scans=(1097, 1347)),
    test=dict(images=400, scans=(1347, 1797)),
)
# scans of the training split, shown one by one
pretraining = dict(images=40000, batch_size=128, lr=0.1)

# -- training, fixed in epochs: a batch 8 times as large has an eighth of the
# updates. Epochs and decay are mmdet's 1x.
training = dict(
    epochs=12,
    decay_epochs=(8, 11),
    warmup_epochs=2,
    # images in a forward pass, so in a batch norm, whatever the batch size is;
    # these micro-batches are AGVM's samples
    micro_batch=16,
    # updates / tau, so that tau follows from the batch size; in the paper's
    # Faster R-CNN it is 734, 368 and 368 at 256, 512 and 1024
    measurements=192,
    ema_decay=0.97,
    estimator='pairs',
    # about twice SGD's usual norm at batch 256: it cuts peaks; without it both
    # SGD and AGVM fail with other seeds at the rate that was tuned with one
    clip_grad=dict(max_norm=2),
)

# -- models: mmdet's and mmseg's, made small enough for a CPU core
backbone = dict(
    depth=18,
    num_stages=3,
    out_indices=(1, 2),
    strides=(1, 2, 2),
    dilations=(1, 1, 1),
    base_channels=16,
    frozen_stages=1,
    norm_eval=False,
)
neck = dict(in_channels=[32, 64], out_channels=32, num_outs=2)
faster_rcnn = dict(
    backbone=backbone,
    neck=neck,
    rpn_head=dict(
        in_channels=32,
        feat_channels=32,
        anchor_generator=dict(scales=[2], ratios=[1.3], strides=[8, 16]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=32,
            featmap_strides=[8, 16],
            finest_scale=12,
            roi_layer=dict(output_size=5, sampling_ratio=1),
        ),
        bbox_head=dict(
            in_channels=32,
            roi_feat_size=5,
            fc_out_channels=64,
            num_classes=10,
        ),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=32)),
        rpn_proposal=dict(nms_pre=50, max_per_img=30),
        rcnn=dict(sampler=dict(num=16)),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=50, max_per_img=30), rcnn=dict(max_per_img=20)
    ),
)
masks = dict(
    roi_head=dict(
        mask_roi_extractor=dict(
            out_channels=32,
            featmap_strides=[8, 16],
            finest_scale=12,
            roi_layer=dict(output_size=7, sampling_ratio=1),
        ),
        mask_head=dict(
            num_convs=2, in_channels=32, conv_out_channels=32, num_classes=10
        ),
    ),
    train_cfg=dict(rcnn=dict(mask_size=14)),
)
models = dict(
    faster_rcnn=dict(
        base='mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
        model=[faster_rcnn],
        metric='coco/bbox_mAP',
    ),
    mask_rcnn=dict(
        base='mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
        model=[faster_rcnn, masks],
        metric='coco/segm_mAP',
    ),
    retinanet=dict(
        base='mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
        model=[
            dict(
                backbone=backbone,
                neck=dict(
                    neck, start_level=0, add_extra_convs=False, num_outs=2
                ),
                bbox_head=dict(
                    num_classes=10,
                    in_channels=32,
                    feat_channels=32,
                    stacked_convs=2,
                    anchor_generator=dict(
                        octave_base_scale=2,
                        scales_per_octave=2,
                        ratios=[1.3],
                        strides=[8, 16],
                    ),
                ),
                test_cfg=dict(nms_pre=100, max_per_img=20),
            )
        ],
        metric='coco/bbox_mAP',
    ),
    sem_fpn=dict(
        base='mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512.py',
        model=[
            dict(
                pretrained=None,
                data_preprocessor=dict(size=(64, 64)),
                backbone=dict(
                    backbone,
                    type='ResNet',
                    norm_cfg=dict(type='BN'),
                    contract_dilation=False,
                ),
                neck=neck,
                decode_head=dict(
                    in_channels=[32] * 2,
                    in_index=[0, 1],
                    feature_strides=[8, 16],
                    channels=32,
                    num_classes=11,
                    norm_cfg=dict(type='BN'),
                    # digits cover a tenth of the ground: without weights a
                    # batch of 256 does not find them within the schedule
                    loss_decode=dict(class_weight=[1.0] + [10.0] * 10),
                ),
            )
        ],
        metric='mIoU',
    ),
)

# -- methods: what is the same for each of them is its budget, a grid of three
# rates a factor of two apart, moved on while the best is at its end, at most
# `grid_moves` times, and then two more around the best. Each is measured, only
# AGVM is modulated.
grid_moves = 2
grid_refinement = (0.5**0.5, 2**0.5)
# where the usual grid is out of reach: at 256 all rates from 0.000177 to 0.004
# end with the background everywhere, so none of them is the best
model_rates = dict(sem_fpn=dict(adamw=[0.016, 0.032, 0.064]))
sgd = dict(type='SGD', momentum=0.9, weight_decay=1e-4)
adamw = dict(type='AdamW', weight_decay=0.05)
sgd_rates = [0.04, 0.08, 0.16]
adamw_rates = [1e-3, 2e-3, 4e-3]
lamb_rates = [5e-3, 1e-2, 2e-2]
# biases start at 0, where a trust ratio keeps them: they and norm layers step
# as with Adam, at a rate that suits it
vector = dict(adam=True, lr_mult=0.1, decay_mult=0.0)
lamb_vectors = dict(
    custom_keys={'bias': vector, 'bn': vector, 'downsample.1': vector}
)
methods = dict(
    sgd=dict(optimizer=sgd, modulate=False, rates=sgd_rates),
    agvm_sgd=dict(optimizer=sgd, modulate=True, rates=sgd_rates),
    # twenty times the usual trust coefficient, so that biases and norm layers,
    # which have none, tolerate the same rate
    lars=dict(
        optimizer=dict(sgd, type='LARS', trust_coefficient=0.02),
        modulate=False,
        rates=[0.08, 0.16, 0.32],
    ),
    adamw=dict(optimizer=adamw, modulate=False, rates=adamw_rates),
    agvm_adamw=dict(optimizer=adamw, modulate=True, rates=adamw_rates),
    lamb=dict(
        optimizer=dict(adamw, type='LAMB'),
        paramwise_cfg=lamb_vectors,
        modulate=False,
        rates=lamb_rates,
    ),
    pmd_lamb=dict(
        # twice an epoch at batch 256; neither is known of the original
        optimizer=dict(adamw, type='PMDLAMB', period=8, moment_decay=0.5),
        paramwise_cfg=lamb_vectors,
        modulate=False,
        rates=lamb_rates,
    ),
)

# whole matrices, on AdamW's scale of rates; the same weight decay as AdamW's
soap = dict(
    type='SOAP',
    betas=(0.95, 0.95),
    weight_decay=0.05,
    precondition_frequency=5,
)
muon = dict(type='Muon', momentum=0.95, betas=(0.9, 0.95), weight_decay=0.05)
matrix_rates = [4e-3, 8e-3, 1.6e-2]
methods.update(
    soap=dict(optimizer=soap, modulate=False, rates=matrix_rates),
    # shorter averages of the gradient, for few updates
    soap_8=dict(
        optimizer=dict(soap, betas=(0.8, 0.95)),
        modulate=False,
        rates=matrix_rates,
    ),
    agvm_soap=dict(optimizer=soap, modulate=True, rates=matrix_rates),
    muon=dict(optimizer=muon, modulate=False, rates=matrix_rates),
    agvm_muon=dict(optimizer=muon, modulate=True, rates=matrix_rates),
)

# other rules for the multipliers, of rules.py
rules = ['mean_one', 'forgetting', 'growth']
methods.update(
    {
        f'agvm_{name}_{rule}': dict(
            optimizer=optimizer, modulate=True, rule=rule, rates=rates
        )
        for name, optimizer, rates in (
            ('sgd', sgd, sgd_rates),
            ('adamw', adamw, adamw_rates),
            ('soap', soap, matrix_rates),
            ('muon', muon, matrix_rates),
        )
        for rule in rules
    }
)

# -- changes to a run, by name: what is merged into its config
# as usual until the end of warm-up, then a cosine
cosine = [
    dict(
        type='LinearLR',
        start_factor=0.001,
        by_epoch=False,
        begin=0,
        end=512,
    ),
    dict(
        type='CosineAnnealingLR',
        T_max=10,
        begin=2,
        end=12,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
variants = dict(
    no_fpn=dict(
        model=dict(
            backbone=dict(out_indices=(2,)),
            neck=None,
            rpn_head=dict(
                in_channels=64,
                anchor_generator=dict(scales=[1, 2], strides=[16]),
            ),
            roi_head=dict(
                bbox_roi_extractor=dict(out_channels=64, featmap_strides=[16]),
                bbox_head=dict(in_channels=64),
            ),
        )
    ),
    few_proposals=dict(
        model=dict(train_cfg=dict(rcnn=dict(sampler=dict(num=4))))
    ),
    frozen_head=dict(
        optim_wrapper=dict(
            paramwise_cfg=dict(
                custom_keys={'roi_head.bbox_head': dict(lr_mult=0.0)}
            )
        )
    ),
    # MMEngine's norm counts gradients that lr_mult=0 never applies
    frozen_head_no_clip=dict(
        optim_wrapper=dict(
            clip_grad=None,
            paramwise_cfg=dict(
                custom_keys={'roi_head.bbox_head': dict(lr_mult=0.0)}
            ),
        )
    ),
    tau_4=dict(optim_wrapper=dict(interval=4)),
    tau_16=dict(optim_wrapper=dict(interval=16)),
    alpha_9=dict(optim_wrapper=dict(ema_decay=0.9)),
    alpha_99=dict(optim_wrapper=dict(ema_decay=0.99)),
    anchor_neck=dict(optim_wrapper=dict(anchor='neck')),
    anchor_rpn=dict(optim_wrapper=dict(anchor='rpn_head')),
    anchor_head=dict(optim_wrapper=dict(anchor='roi_head.bbox_head')),
    range_2=dict(optim_wrapper=dict(ratio_range=(0.5, 2.0))),
    range_official=dict(optim_wrapper=dict(ratio_range=(0.707, 3.16))),
    split=dict(optim_wrapper=dict(estimator='split')),
    begin_0=dict(optim_wrapper=dict(begin=0)),
    begin_late=dict(optim_wrapper=dict(begin=96)),
    no_clip=dict(optim_wrapper=dict(clip_grad=None)),
    # decay at the same share of the epochs, and as much warm-up
    epochs_24=dict(
        train_cfg=dict(max_epochs=24, val_interval=24),
        param_scheduler={'1': dict(milestones=[16, 22])},
    ),
    epochs_48=dict(
        train_cfg=dict(max_epochs=48, val_interval=48),
        param_scheduler={'1': dict(milestones=[32, 44])},
    ),
    epochs_96=dict(
        train_cfg=dict(max_epochs=96, val_interval=96),
        param_scheduler={'1': dict(milestones=[64, 88])},
    ),
    refresh_1=dict(
        optim_wrapper=dict(optimizer=dict(precondition_frequency=1))
    ),
    refresh_20=dict(
        optim_wrapper=dict(optimizer=dict(precondition_frequency=20))
    ),
    decay_0=dict(optim_wrapper=dict(optimizer=dict(weight_decay=0.0))),
    decay_2=dict(optim_wrapper=dict(optimizer=dict(weight_decay=0.2))),
    betas_9=dict(optim_wrapper=dict(optimizer=dict(betas=(0.9, 0.9)))),
    betas_99=dict(optim_wrapper=dict(optimizer=dict(betas=(0.95, 0.99)))),
    warmup_1=dict(param_scheduler={'0': dict(end=256)}),  # an epoch, not two
    betas_8=dict(optim_wrapper=dict(optimizer=dict(betas=(0.8, 0.8)))),
    betas_6=dict(optim_wrapper=dict(optimizer=dict(betas=(0.6, 0.6)))),
    betas_8_95=dict(optim_wrapper=dict(optimizer=dict(betas=(0.8, 0.95)))),
    betas_6_95=dict(optim_wrapper=dict(optimizer=dict(betas=(0.6, 0.95)))),
    betas_95_8=dict(optim_wrapper=dict(optimizer=dict(betas=(0.95, 0.8)))),
    betas_8_cosine=dict(
        optim_wrapper=dict(optimizer=dict(betas=(0.8, 0.8))),
        param_scheduler=cosine,
    ),
    betas_9_warmup_1=dict(
        optim_wrapper=dict(optimizer=dict(betas=(0.9, 0.9))),
        param_scheduler={'0': dict(end=256)},
    ),
    betas_9_no_clip=dict(
        optim_wrapper=dict(clip_grad=None, optimizer=dict(betas=(0.9, 0.9))),
    ),
    betas_9_cosine=dict(
        optim_wrapper=dict(optimizer=dict(betas=(0.9, 0.9))),
        param_scheduler=cosine,
    ),
    momentum_8=dict(optim_wrapper=dict(optimizer=dict(momentum=0.8))),
    momentum_9=dict(optim_wrapper=dict(optimizer=dict(momentum=0.9))),
    momentum_98=dict(optim_wrapper=dict(optimizer=dict(momentum=0.98))),
)

# -- stages, done one after the other. A stage's cells are all its models,
# methods, batch sizes and variants. Each is tuned with `tune_seed`, but cells
# with a variant, which take the rate that was best without; then it is trained
# with its best rate and each of `seeds`, where that has not been done. A stage
# with `rates` tunes nothing: it trains its cells with each of them.
tune_seed = 0
# before that day, runs had a machine that was shared with others
timed_from = '2026-11-26'
both = ['sgd', 'agvm_sgd']
layerwise = ['lars', 'lamb', 'pmd_lamb']
adaptive = ['adamw', 'agvm_adamw']
matrix = ['soap', 'muon']
agvm_matrix = ['agvm_soap', 'agvm_muon']
# SGD's tuned rate at 32 and 256: at AGVM's own, seeds differ by more than
# settings
stable_rates = [0.113]
settings = [
    *('tau_4', 'alpha_9', 'range_2', 'anchor_head', 'anchor_rpn', 'begin_0'),
    *('split', 'tau_16', 'alpha_99', 'anchor_neck', 'begin_late'),
    'range_official',
]
soap_settings = [
    *('refresh_1', 'refresh_20', 'decay_0', 'decay_2'),
    *('betas_9', 'betas_99', 'no_clip'),
]
muon_settings = ['decay_0', 'decay_2', 'momentum_9', 'momentum_98', 'no_clip']
stages = [
    dict(
        name='SGD and AGVM at the largest batch',
        models=['faster_rcnn'],
        methods=both,
        batch_sizes=[256],
        seeds=[0, 1, 2],
    ),
    dict(
        name='SGD and AGVM at the reference batch',
        models=['faster_rcnn'],
        methods=both,
        batch_sizes=[32],
        seeds=[0, 1, 2],
    ),
    dict(
        name='learning rates at the edge, without clipping',
        models=['faster_rcnn'],
        methods=both,
        batch_sizes=[256],
        variants=['no_clip'],
        rates=[0.04, 0.0566, 0.08, 0.113, 0.16],
        seeds=[0],
    ),
    dict(
        name='the same at the reference batch',
        models=['faster_rcnn'],
        methods=both,
        batch_sizes=[32],
        variants=['no_clip'],
        rates=[0.04, 0.08, 0.16, 0.32],
        seeds=[0],
    ),
    # tuning with one seed may choose a rate that is too high for other seeds
    dict(
        name='SGD and AGVM at equal rates, with every seed',
        models=['faster_rcnn'],
        methods=both,
        batch_sizes=[256],
        rates=[0.08, 0.113, 0.16],
        seeds=[0, 1, 2],
    ),
    dict(
        name='what misaligns the variances',
        models=['faster_rcnn'],
        methods=['sgd'],
        batch_sizes=[256, 32],
        variants=['no_fpn', 'few_proposals', 'frozen_head'],
        seeds=[0],
    ),
    dict(
        name="AGVM's settings",
        models=['faster_rcnn'],
        methods=['agvm_sgd'],
        batch_sizes=[256],
        variants=settings,
        rates=stable_rates,
        seeds=[0],
    ),
    # whose first seed was furthest from the rest
    dict(
        name='measuring from the first update, with other seeds',
        models=['faster_rcnn'],
        methods=['agvm_sgd'],
        batch_sizes=[256],
        variants=['begin_0'],
        rates=stable_rates,
        seeds=[1, 2],
    ),
    dict(
        name='LARS and LAMB at the largest batch',
        models=['faster_rcnn'],
        methods=layerwise,
        batch_sizes=[256],
        seeds=[0, 1, 2],
    ),
    dict(
        name='at the edge without clipping, with other seeds',
        models=['faster_rcnn'],
        methods=both,
        batch_sizes=[256],
        variants=['no_clip'],
        rates=[0.08, 0.113, 0.16],
        seeds=[1, 2],
    ),
    # where AGVM fails
    dict(
        name='beyond the best rates',
        models=['faster_rcnn'],
        methods=both,
        batch_sizes=[256],
        rates=[0.226, 0.32],
        seeds=[0],
    ),
    dict(
        name='AdamW at the largest batch',
        models=['faster_rcnn'],
        methods=adaptive,
        batch_sizes=[256],
        seeds=[0, 1, 2],
    ),
    dict(
        name='AdamW at equal rates, with every seed',
        models=['faster_rcnn'],
        methods=adaptive,
        batch_sizes=[256],
        rates=[0.004, 0.00566],
        seeds=[0, 1, 2],
    ),
    dict(
        name='RetinaNet',
        models=['retinanet'],
        methods=both,
        batch_sizes=[256, 32],
        seeds=[0, 1, 2],
    ),
    dict(
        name='RetinaNet at equal rates, with every seed',
        models=['retinanet'],
        methods=both,
        batch_sizes=[256],
        rates=[0.0566, 0.08, 0.113],
        seeds=[0, 1, 2],
    ),
    dict(
        name='the other methods at the reference batch',
        models=['faster_rcnn'],
        methods=['adamw', *layerwise],
        batch_sizes=[32],
        seeds=[0, 1, 2],
    ),
    dict(
        name='a frozen head whose gradient does not count in a norm',
        models=['faster_rcnn'],
        methods=['sgd'],
        batch_sizes=[256, 32],
        variants=['frozen_head_no_clip'],
        rates=stable_rates,
        seeds=[0],
    ),
    # at the best rate of 32 and, by three seeds, of 256
    dict(
        name='SGD and AGVM at a batch in between',
        models=['faster_rcnn'],
        methods=both,
        batch_sizes=[128],
        rates=stable_rates,
        seeds=[0],
    ),
    # at the same rate: it is Faster R-CNN's best, theirs is not known
    dict(
        name='Mask R-CNN',
        models=['mask_rcnn'],
        methods=both,
        batch_sizes=[256],
        rates=stable_rates,
        seeds=[0],
    ),
    dict(
        name='Semantic FPN',
        models=['sem_fpn'],
        methods=both,
        batch_sizes=[32, 256],
        rates=stable_rates,
        seeds=[0],
    ),
    dict(
        name='SOAP at a large batch',
        models=['faster_rcnn'],
        methods=['soap'],
        batch_sizes=[256],
        seeds=[0, 1, 2],
    ),
    dict(
        name='Muon at a large batch',
        models=['faster_rcnn'],
        methods=['muon'],
        batch_sizes=[256],
        seeds=[0, 1, 2],
    ),
    dict(
        name='SOAP at the reference batch',
        models=['faster_rcnn'],
        methods=['soap'],
        batch_sizes=[32],
        seeds=[0, 1, 2],
    ),
    dict(
        name='Muon at the reference batch',
        models=['faster_rcnn'],
        methods=['muon'],
        batch_sizes=[32],
        seeds=[0, 1, 2],
    ),
    dict(
        name='SOAP and Muon with AGVM at a large batch',
        models=['faster_rcnn'],
        methods=agvm_matrix,
        batch_sizes=[256],
        seeds=[0, 1, 2],
    ),
    dict(
        name='SOAP and Muon at larger batches',
        models=['faster_rcnn'],
        methods=matrix,
        batch_sizes=[512, 1024],
        seeds=[0, 1, 2],
    ),
    dict(
        name='AdamW and SGD at larger batches',
        models=['faster_rcnn'],
        methods=['adamw', 'sgd'],
        batch_sizes=[512, 1024],
        seeds=[0, 1, 2],
    ),
    dict(
        name='AGVM with what is adaptive, at the reference batch',
        models=['faster_rcnn'],
        methods=[*agvm_matrix, 'agvm_adamw'],
        batch_sizes=[32],
        seeds=[0, 1, 2],
    ),
    # whose updates are few: 48
    dict(
        name="SOAP's settings at the largest batch",
        models=['faster_rcnn'],
        methods=['soap'],
        batch_sizes=[1024],
        variants=['refresh_1', 'betas_9', 'warmup_1'],
        seeds=[0, 1, 2],
    ),
    # betas_9 helps most of them; what helps beside it
    dict(
        name="SOAP's settings at the largest batch, together",
        models=['faster_rcnn'],
        methods=['soap'],
        batch_sizes=[1024],
        variants=[
            *('betas_8', 'betas_9_warmup_1', 'betas_9_no_clip'),
            'betas_9_cosine',
        ],
        seeds=[0],
    ),
    # shorter averages help: which, how short, and at which batch sizes
    dict(
        name='shorter averages at the largest batch',
        models=['faster_rcnn'],
        methods=['soap'],
        batch_sizes=[1024],
        variants=['betas_6', 'betas_8_95', 'betas_95_8', 'betas_8_cosine'],
        seeds=[0],
    ),
    dict(
        name='shorter averages at a large batch',
        models=['faster_rcnn'],
        methods=['soap'],
        batch_sizes=[256],
        variants=['betas_9', 'betas_8', 'betas_6'],
        seeds=[0],
    ),
    # that of the gradient is the one
    dict(
        name='shorter averages of the gradient',
        models=['faster_rcnn'],
        methods=['soap'],
        batch_sizes=[256, 1024],
        variants=['betas_6_95', 'betas_8_95'],
        seeds=[0],
    ),
    dict(
        name='shorter averages at the reference batch',
        models=['faster_rcnn'],
        methods=['soap'],
        batch_sizes=[32],
        variants=['betas_8_95', 'betas_9'],
        seeds=[0],
    ),
    dict(
        name='shorter averages with others',
        models=['faster_rcnn'],
        methods=['adamw'],
        batch_sizes=[256, 1024],
        variants=['betas_8_95'],
        seeds=[0],
    ),
    dict(
        name='shorter averages with Muon',
        models=['faster_rcnn'],
        methods=['muon'],
        batch_sizes=[256, 1024],
        variants=['momentum_8'],
        seeds=[0],
    ),
    dict(
        name='SOAP with shorter averages at large batches',
        models=['faster_rcnn'],
        methods=['soap_8'],
        batch_sizes=[1024, 512, 256],
        seeds=[0, 1, 2],
    ),
    dict(
        name='AGVM and PMD-LAMB at larger batches',
        models=['faster_rcnn'],
        methods=['agvm_soap', 'agvm_sgd', 'pmd_lamb'],
        batch_sizes=[512, 1024],
        seeds=[0, 1, 2],
    ),
    dict(
        name='SOAP with shorter averages at the reference batch',
        models=['faster_rcnn'],
        methods=['soap_8'],
        batch_sizes=[32],
        seeds=[0, 1, 2],
    ),
    dict(
        name='the batch in between, with other seeds',
        models=['faster_rcnn'],
        methods=both,
        batch_sizes=[128],
        rates=stable_rates,
        seeds=[1, 2],
    ),
    # -- second part: what a large batch loses
    *(
        dict(
            name=f'another rule with {name}: {rule}',
            models=['faster_rcnn'],
            methods=[f'agvm_{name}_{rule}'],
            batch_sizes=[256],
            seeds=[0, 1, 2],
        )
        for name in ('sgd', 'adamw')
        for rule in rules
    ),
    dict(
        name="AGVM's settings, with other seeds",
        models=['faster_rcnn'],
        methods=['agvm_sgd'],
        batch_sizes=[256],
        variants=['anchor_rpn', 'alpha_9', 'alpha_99', 'range_2'],
        rates=stable_rates,
        seeds=[1, 2],
    ),
    dict(
        name='more epochs at the largest batch',
        models=['faster_rcnn'],
        methods=['adamw', 'sgd'],
        batch_sizes=[256],
        variants=['epochs_24', 'epochs_48'],
        seeds=[0, 1, 2],
    ),
    dict(
        name='SOAP and Muon on another model: retinanet',
        models=['retinanet'],
        methods=matrix,
        batch_sizes=[256, 32],
        seeds=[0, 1, 2],
    ),
    # do other rules save the runs in which the paper's fails
    dict(
        name='other rules with RetinaNet, at equal rates',
        models=['retinanet'],
        methods=['agvm_sgd_growth', 'agvm_sgd_forgetting'],
        batch_sizes=[256],
        rates=[0.08, 0.113],
        seeds=[0, 1, 2],
    ),
    # those that helped SGD or AdamW first
    *(
        dict(
            name=f'another rule with {name}: {rule}',
            models=['faster_rcnn'],
            methods=[f'agvm_{name}_{rule}'],
            batch_sizes=[256],
            seeds=[0, 1, 2],
        )
        for rule in ('forgetting', 'growth')
        for name in ('soap', 'muon')
    ),
    dict(
        name='SOAP and Muon on another model: mask_rcnn',
        models=['mask_rcnn'],
        methods=matrix,
        batch_sizes=[256, 32],
        seeds=[0, 1, 2],
    ),
    dict(
        name='eight times the epochs',
        models=['faster_rcnn'],
        methods=['adamw', 'sgd'],
        batch_sizes=[256],
        variants=['epochs_96'],
        seeds=[0],
    ),
    dict(
        name='SOAP and Muon on another model: sem_fpn',
        models=['sem_fpn'],
        methods=matrix,
        batch_sizes=[256, 32],
        seeds=[0, 1, 2],
    ),
    dict(
        name="SOAP's settings",
        models=['faster_rcnn'],
        methods=['soap'],
        batch_sizes=[256],
        variants=soap_settings,
        seeds=[0],
    ),
    dict(
        name="Muon's settings",
        models=['faster_rcnn'],
        methods=['muon'],
        batch_sizes=[256],
        variants=muon_settings,
        seeds=[0],
    ),
    dict(
        name='the rule with mean 1 with SOAP and Muon',
        models=['faster_rcnn'],
        methods=['agvm_soap_mean_one', 'agvm_muon_mean_one'],
        batch_sizes=[256],
        seeds=[0, 1, 2],
    ),
    # what to compare with: so far at Faster R-CNN's rate; AdamW's is the one
    # that users' rates are multiples of
    *(
        dict(
            name=f'{name} on another model: {model}',
            models=[model],
            methods=[method],
            batch_sizes=[256, 32],
            seeds=[0, 1, 2],
        )
        for name, method in (
            ('SGD', 'sgd'),
            ('AdamW', 'adamw'),
            ('AGVM', 'agvm_sgd'),
        )
        for model in ('sem_fpn', 'mask_rcnn')
    ),
    dict(
        name='AdamW on RetinaNet',
        models=['retinanet'],
        methods=['adamw'],
        batch_sizes=[256, 32],
        seeds=[0, 1, 2],
    ),
    dict(
        name="SOAP's settings, with other seeds",
        models=['faster_rcnn'],
        methods=['soap'],
        batch_sizes=[256],
        variants=soap_settings,
        seeds=[1, 2],
    ),
    dict(
        name="Muon's settings, with other seeds",
        models=['faster_rcnn'],
        methods=['muon'],
        batch_sizes=[256],
        variants=muon_settings,
        seeds=[1, 2],
    ),
]
