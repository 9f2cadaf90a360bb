"""The RoI head of HTC-X: blocks, the box head, the cascade in detectors."""

import copy
import math

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from torch import nn

from mmagvm.core import find_modules
from mmagvm.models.htc_lite_roi_head import HTCLiteRoIHead
from mmagvm.models.transformer_bbox_head import TransformerBBoxHead
from mmagvm.models.uninet_blocks import TransformerBlock

# with both package sets
pytestmark = pytest.mark.host

register_all_modules()


@pytest.fixture(autouse=True)
def scope():
    """Other files may have set another one in this process."""
    init_default_scope('mmdet')


CHANNELS = 16
CLASSES = 4
STAGES = 2
WEIGHTS = [1, 0.5]


# -- the block


def slow_block(block, roi):
    """The block's equations for one RoI (C, H, W), cell by cell."""
    channels, height, width = roi.shape
    convolved = roi.clone()
    for y in range(height):
        for x in range(width):
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if 0 <= y + dy < height and 0 <= x + dx < width:
                        weight = block.position.weight[:, 0, dy + 1, dx + 1]
                        convolved[:, y, x] += weight * roi[:, y + dy, x + dx]
            convolved[:, y, x] += block.position.bias
    tokens = [convolved[:, y, x] for y in range(height) for x in range(width)]

    def normed(norm, token):
        centred = token - token.mean()
        std = (centred.square().mean() + norm.eps).sqrt()
        return norm.weight * centred / std + norm.bias

    qkv = [
        block.attention.qkv(normed(block.attention_norm, token))
        for token in tokens
    ]
    attended = []
    for own in qkv:
        heads = []
        for first in range(0, channels, block.attention.head_dim):
            query, key, value = (
                slice(part * channels + first, None) for part in range(3)
            )
            size = block.attention.head_dim
            scores = torch.stack(
                [
                    own[query][:size] @ other[key][:size] / math.sqrt(size)
                    for other in qkv
                ]
            )
            shares = scores.exp() / scores.exp().sum()
            heads.append(
                sum(s * other[value][:size] for s, other in zip(shares, qkv))
            )
        attended.append(block.attention.out(torch.cat(heads)))
    results = []
    for token, change in zip(tokens, attended):
        token = token + block.attention_scale * change
        first, _, last = block.mlp
        hidden = first(normed(block.mlp_norm, token))
        # GELU: x times the normal distribution's probability of less
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        results.append(token + block.mlp_scale * last(hidden))
    return torch.stack(results, 1).view(channels, height, width)


def test_block_equals_its_equations():
    torch.manual_seed(0)
    block = TransformerBlock(8, 8, 2, head_dim=4, layer_scale=0.1).double()
    for param in block.parameters():
        nn.init.normal_(param)
    rois = torch.randn(2, 8, 3, 2, dtype=torch.float64)
    expected = torch.stack([slow_block(block, roi) for roi in rois])
    torch.testing.assert_close(block(rois), expected)


# -- the box head


def bbox_head(**changes):
    return dict(
        type='TransformerBBoxHead',
        in_channels=CHANNELS,
        num_blocks=2,
        head_dim=8,
        mlp_ratio=2,
        num_classes=CLASSES,
        **changes,
    )


def test_parameters_of_htc_x():
    with torch.device('meta'):
        stages = [TransformerBBoxHead(in_channels=384) for _ in range(3)]
    blocks = sum(
        param.numel()
        for stage in stages
        for branch in (stage.cls_blocks, stage.reg_blocks)
        for param in branch.parameters()
    )
    assert blocks == 42_697_728
    total = sum(p.numel() for stage in stages for p in stage.parameters())
    # class-wise boxes, of 80 classes
    assert total - blocks == 3 * (384 + 1) * (81 + 4 * 80)
    (heads,) = {
        384 // block.attention.head_dim for block in stages[0].cls_blocks
    }
    assert heads == 6


@pytest.mark.parametrize('size', [(7, 7), (5, 3)])
@pytest.mark.parametrize('rois', [3, 0])
@pytest.mark.parametrize('with_cp', [True, False])
def test_shapes_and_gradients(size, rois, with_cp):
    head = MODELS.build(bbox_head(with_cp=with_cp))
    x = torch.randn(rois, CHANNELS, *size, requires_grad=True)
    scores, deltas = head(x)
    assert scores.shape == (rois, CLASSES + 1)
    assert deltas.shape == (rois, CLASSES * 4)
    (scores.sum() + deltas.sum()).backward()
    assert x.grad.shape == x.shape
    for name, param in head.named_parameters():
        assert param.grad is not None, name
        assert rois or not param.grad.any(), name


def test_checkpointing_changes_nothing():
    torch.manual_seed(0)
    head = MODELS.build(bbox_head())
    x = torch.randn(3, CHANNELS, 7, 7)
    grads, runs = [], []
    head.reg_blocks[1].register_forward_pre_hook(lambda *_: runs.append(0))
    for head.with_cp, expected in ((False, 1), (True, 2)):
        head.zero_grad()
        runs.clear()
        sum(output.square().sum() for output in head(x)).backward()
        assert len(runs) == expected
        grads.append([param.grad.clone() for param in head.parameters()])
    for plain, recomputed in zip(*grads):
        torch.testing.assert_close(plain, recomputed, rtol=0, atol=0)


def test_branches_are_decoupled():
    head = MODELS.build(bbox_head())
    scores, _ = head(torch.randn(3, CHANNELS, 7, 7))
    scores.sum().backward()
    for name, param in head.named_parameters():
        own = name.startswith(('cls_blocks.', 'fc_cls.'))
        assert (param.grad is not None) == own, name


def test_one_branch_alone():
    for with_cls in (True, False):
        head = MODELS.build(
            bbox_head(with_cls=with_cls, with_reg=not with_cls)
        )
        scores, deltas = head(torch.randn(3, CHANNELS, 7, 7))
        assert (scores is not None) == with_cls
        assert (deltas is None) == with_cls
        assert len(list(head.children())) == 5  # avg_pool, 2 losses, branch


def test_initial_values():
    torch.manual_seed(0)
    head = MODELS.build({**bbox_head(), 'in_channels': 128})
    head.init_weights()
    block = head.cls_blocks[0]
    assert 0.018 < block.attention.qkv.weight.std() < 0.022
    assert not block.attention.qkv.bias.any()
    assert (block.attention_scale == 0.1).all() and (
        block.mlp_scale == 0.1
    ).all()
    assert 0.008 < head.fc_cls.weight.std() < 0.012
    assert 0.0008 < head.fc_reg.weight.std() < 0.0012


@pytest.mark.parametrize(
    'changes, words',
    [
        (dict(head_dim=5), ['head_dim=5', 'in_channels=16', 'divisor']),
        (dict(num_blocks=0), ['num_blocks=0', 'above 0', 'write']),
        (dict(head_dim=0), ['head_dim=0', 'above 0', 'write']),
        (dict(in_channels=-8), ['in_channels=-8', 'above 0', 'write']),
        (dict(mlp_ratio=0), ['mlp_ratio=0', 'write']),
    ],
)
def test_box_head_refuses(changes, words):
    with pytest.raises(ValueError) as error:
        TransformerBBoxHead(**{'in_channels': 16, 'head_dim': 8, **changes})
    assert_sentence(error, words)


def assert_sentence(error, words):
    message = str(error.value)
    assert all(word in message for word in words), message
    assert '. ' not in message and not message.endswith('.')


# -- detectors


def roi_extractor(size, scale=8):
    return dict(
        type='SingleRoIExtractor',
        roi_layer=dict(type='RoIAlign', output_size=size, sampling_ratio=0),
        out_channels=CHANNELS,
        featmap_strides=[4, 8, 16, 32],
        finest_scale=scale,
    )


def rcnn_train(iou):
    return dict(
        assigner=dict(
            type='MaxIoUAssigner',
            pos_iou_thr=iou,
            neg_iou_thr=iou,
            min_pos_iou=iou,
            match_low_quality=False,
            ignore_iof_thr=-1,
        ),
        sampler=dict(
            type='RandomSampler',
            num=16,
            pos_fraction=0.25,
            neg_pos_ub=-1,
            add_gt_as_proposals=True,
        ),
        mask_size=28,
        pos_weight=-1,
        debug=False,
    )


def context_head(**changes):
    return dict(
        type='GlobalContextHead',
        num_convs=2,
        in_channels=CHANNELS,
        conv_out_channels=CHANNELS,
        num_classes=CLASSES,
        loss_weight=3.0,
        **changes,
    )


def mask_head():
    return dict(
        type='FCNMaskHead',
        num_convs=1,
        in_channels=CHANNELS,
        conv_out_channels=CHANNELS,
        num_classes=CLASSES,
    )


def htc_lite(mask=False, context=False):
    """A RoI head, without settings for training and testing."""
    head = dict(
        type='HTCLiteRoIHead',
        num_stages=STAGES,
        stage_loss_weights=WEIGHTS,
        bbox_roi_extractor=roi_extractor(7),
        bbox_head=[
            bbox_head(
                reg_class_agnostic=True,
                reg_decoded_bbox=True,
                loss_bbox=dict(type='GIoULoss', loss_weight=10.0),
            )
            for _ in range(STAGES)
        ],
    )
    if context:
        head['glbctx_head'] = context_head()
    if mask:
        head['mask_roi_extractor'] = roi_extractor(14)
        head['mask_head'] = mask_head()
    return head


def detector(roi_head, train, kind='CascadeRCNN'):
    """A small detector with random weights."""
    torch.manual_seed(0)
    nms = dict(type='nms', iou_threshold=0.7)
    rpn_proposal = dict(nms_pre=50, max_per_img=20, nms=nms, min_bbox_size=0)
    model = dict(
        type=kind,
        data_preprocessor=dict(type='DetDataPreprocessor', pad_mask=True),
        backbone=dict(
            type='ResNet',
            depth=18,
            base_channels=8,
            stem_channels=8,
            frozen_stages=-1,
            norm_eval=False,
        ),
        neck=dict(
            type='FPN',
            in_channels=[8, 16, 32, 64],
            out_channels=CHANNELS,
            num_outs=5,
        ),
        rpn_head=dict(
            type='RPNHead',
            in_channels=CHANNELS,
            feat_channels=CHANNELS,
            anchor_generator=dict(
                type='AnchorGenerator',
                scales=[4],
                ratios=[0.5, 1.0, 2.0],
                strides=[4, 8, 16, 32, 64],
            ),
        ),
        roi_head=roi_head,
        train_cfg=dict(
            rpn=dict(
                assigner=dict(
                    type='MaxIoUAssigner',
                    pos_iou_thr=0.7,
                    neg_iou_thr=0.3,
                    min_pos_iou=0.3,
                ),
                sampler=dict(
                    type='RandomSampler',
                    num=64,
                    pos_fraction=0.5,
                    neg_pos_ub=-1,
                    add_gt_as_proposals=False,
                ),
                allowed_border=-1,
                pos_weight=-1,
                debug=False,
            ),
            rpn_proposal=rpn_proposal,
            rcnn=train,
        ),
        test_cfg=dict(
            rpn=rpn_proposal,
            rcnn=dict(
                score_thr=0.0,
                nms=dict(type='nms', iou_threshold=0.5),
                max_per_img=5,
                mask_thr_binary=0.5,
            ),
        ),
    )
    model = MODELS.build(ConfigDict(model))
    model.init_weights()
    return model


def cascade(mask=False, context=False):
    train = [rcnn_train(iou) for iou in (0.6, 0.7)]
    return detector(htc_lite(mask, context), train)


def batch(model, mask, training, objects=(2, 3), sizes=(64, 64)):
    data = demo_mm_inputs(
        len(objects),
        image_shapes=[(3, size, size) for size in sizes],
        num_items=list(objects),
        num_classes=CLASSES,
        with_mask=mask,
    )
    return model.data_preprocessor(data, training)


def losses_of(model, data):
    losses = model(**data, mode='loss')
    total, _ = model.parse_losses(losses)
    assert total.isfinite(), losses
    total.backward()
    return losses


def assert_all_have_gradients(model):
    for name, param in model.named_parameters():
        assert param.grad is not None, name
        assert param.grad.isfinite().all(), name


KINDS = [
    pytest.param(mask, context, id=f'mask={mask}, context={context}')
    for mask in (True, False)
    for context in (True, False)
]


@pytest.mark.parametrize('mask, context', KINDS)
def test_training_and_prediction(mask, context):
    model = cascade(mask, context)
    assert find_modules(model) == [
        'backbone',
        'neck',
        'rpn_head',
        'roi_head.bbox_head',
        *['roi_head.mask_head'] * mask,
        *['roi_head.glbctx_head'] * context,
    ]
    losses = losses_of(model, batch(model, mask, True))
    assert_all_have_gradients(model)
    expected = {
        f's{stage}.{name}'
        for stage in range(STAGES)
        for name in ('loss_cls', 'loss_bbox', 'acc')
    }
    expected |= {'loss_mask'} if mask else set()
    expected |= {'loss_glbctx'} if context else set()
    assert {name for name in losses if 'rpn' not in name} == expected

    model.eval()
    data = batch(model, mask, False, sizes=(64, 48))
    with torch.no_grad():
        samples = model(**data, mode='predict')
        ((scores, deltas, *masks),) = model(**data, mode='tensor')
    for sample in samples:
        found = sample.pred_instances
        assert 0 < len(found) <= 5
        assert found.bboxes.shape == (len(found), 4)
        assert ('masks' in found) == mask
        if mask:
            assert found.masks.shape == (len(found), *sample.ori_shape)
    assert len(scores) == len(deltas) == 2 and len(masks) == mask
    for i in range(2):
        assert scores[i].shape == (len(deltas[i]), CLASSES + 1)
        assert not mask or len(masks[0][i]) == len(scores[i])


@pytest.mark.parametrize('objects', [(0, 2), (0, 0)])
def test_images_without_objects(objects):
    model = cascade(True, True)
    losses_of(model, batch(model, True, True, objects))
    assert_all_have_gradients(model)


def roi_inputs(model, objects, proposals):
    """Features, proposals and samples of a batch, for the RoI head alone."""
    data = batch(model, True, True, objects)
    x = model.extract_feat(data['inputs'])
    corners = torch.tensor([0.0, 0, 16, 16]) + torch.arange(20.0)[:, None]
    boxes = [InstanceData(bboxes=corners[:count]) for count in proposals]
    return x, boxes, data['data_samples']


@pytest.mark.parametrize('proposals', [(0, 0), (0, 5)])
def test_no_rois(proposals):
    model = cascade(True, True)
    inputs = roi_inputs(model, (0, 0), proposals)
    losses = model.roi_head.loss(*inputs)
    assert sum(proposals) or not losses['s1.loss_cls'].item()
    total, _ = model.parse_losses(losses)
    total.backward()
    for module in (model.backbone, model.neck, model.roi_head):
        assert_all_have_gradients(module)
    model.eval()
    with torch.no_grad():
        results = model.roi_head.predict(*inputs)
    for found, count in zip(results, proposals):
        assert (len(found.bboxes) > 0) == (len(found.masks) > 0) == (count > 0)


def test_losses_are_weighted():
    """Against mmdet's cascade, and against each head alone."""
    model = cascade(True, True)
    head = model.roi_head
    # all proposals are sampled, so that nothing is random
    for sampler in head.bbox_sampler:
        sampler.num = 1000
        sampler.pos_fraction = 1
    x, boxes, samples = roi_inputs(model, (2, 3), (20, 10))
    losses = head.loss(x, boxes, samples)
    targets = [sample.gt_instances for sample in samples]
    seen = torch.zeros(2, CLASSES)
    for row, target in zip(seen, targets):
        row[target.labels] = 1
    logits, context = head.glbctx_head(x)
    torch.testing.assert_close(
        losses['loss_glbctx'],
        3 * nn.functional.binary_cross_entropy_with_logits(logits, seen),
    )
    sampled = [
        head._sample(0, i, x, boxes[i], targets[i], None) for i in range(2)
    ]
    first = head.bbox_loss(0, x, sampled, context)['loss_bbox']
    torch.testing.assert_close(losses['s0.loss_cls'], first['loss_cls'])
    with torch.no_grad():
        refined = head.bbox_head[0].refine_bboxes(
            sampled,
            head.bbox_loss(0, x, sampled, context),
            [sample.metainfo for sample in samples],
        )
    sampled = [
        head._sample(1, i, x, refined[i], targets[i], None) for i in range(2)
    ]
    second = head.bbox_loss(1, x, sampled, context)['loss_bbox']
    for name in ('loss_cls', 'loss_bbox'):
        torch.testing.assert_close(losses[f's1.{name}'], second[name] * 0.5)
    masks = head.mask_loss(x, sampled, targets, context)['loss_mask']
    torch.testing.assert_close(losses['loss_mask'], masks['loss_mask'] * 1.5)


def test_equals_mmdets_cascade_where_both_can():
    """Boxes alone, without context."""
    stages = [rcnn_train(iou) for iou in (0.9, 0.05)]
    stages[1]['sampler']['num'] = 8
    stages[1]['pos_weight'] = 2
    model = detector(htc_lite(), stages)
    theirs = MODELS.build(
        ConfigDict(
            {**htc_lite(), 'type': 'CascadeRoIHead'},
            train_cfg=stages,
            test_cfg=model.roi_head.test_cfg,
        )
    )
    theirs.load_state_dict(model.roi_head.state_dict())
    x, boxes, samples = roi_inputs(model, (2, 3), (20, 10))
    results = []
    for head in (model.roi_head, theirs):
        torch.manual_seed(0)
        results.append(head.loss(x, copy.deepcopy(boxes), samples))
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name])


@pytest.mark.parametrize('mask', [True, False])
def test_results_are_in_pixels_of_the_original(mask):
    model = cascade(mask, True).eval()
    x, boxes, samples = roi_inputs(model, (2, 3), (20, 10))
    scale = torch.tensor([2.0, 4.0])
    for sample in samples:
        sample.set_metainfo(dict(scale_factor=scale.tolist()))
        sample.set_metainfo(dict(ori_shape=(16, 32)))
    with torch.no_grad():
        plain, rescaled = (
            model.roi_head.predict(x, copy.deepcopy(boxes), samples, rescale)
            for rescale in (False, True)
        )
    for ours, theirs in zip(plain, rescaled):
        torch.testing.assert_close(
            ours.bboxes / scale.repeat(2), theirs.bboxes
        )
        assert not mask or theirs.masks.shape[1:] == (16, 32)


def test_mixed_precision():
    model = cascade(True, True)
    # without the RPN: mmcv's NMS on a CPU does not know bfloat16
    with torch.autocast('cpu', torch.bfloat16):
        inputs = roi_inputs(model, (2, 3), (20, 10))
        assert inputs[0][0].dtype == torch.bfloat16
        losses = model.roi_head.loss(*inputs)
        model.eval()
        with torch.no_grad():
            results = model.roi_head.predict(*inputs)
    total, _ = model.parse_losses(losses)
    assert total.isfinite(), losses
    total.backward()
    assert_all_have_gradients(model.roi_head)
    assert all(len(found) for found in results)


def test_context_is_that_of_the_rois_image():
    model = cascade(True, True)
    head = model.roi_head
    x = [torch.zeros(2, CHANNELS, size, size) for size in (16, 8, 4, 2)]
    rois = torch.tensor([[1.0, 0, 0, 8, 8], [0, 0, 0, 30, 30]])
    context = torch.randn(2, CHANNELS, 1, 1)
    features = head._bbox_forward(0, x, rois, context)['bbox_feats']
    expected = context[[1, 0]].expand(2, CHANNELS, 7, 7)
    torch.testing.assert_close(features, expected)
    inputs = []
    head.mask_head.register_forward_pre_hook(
        lambda _, args: inputs.append(args[0])
    )
    head._mask_forward(x, rois, context)
    expected = context[[1, 0]].expand(2, CHANNELS, 14, 14)
    torch.testing.assert_close(inputs[0], expected)


def test_context_reaches_all_heads():
    model = cascade(True, True)
    head = model.roi_head
    inputs = roi_inputs(model, (2, 3), (20, 10))
    far = torch.full((2, CHANNELS, 1, 1), 1e4)
    head.glbctx_head.forward = lambda x: (torch.zeros(2, CLASSES), far)
    seen = []
    for name, part in (
        ('0', head.bbox_head[0]),
        ('1', head.bbox_head[1]),
        ('mask', head.mask_head),
    ):
        part.register_forward_pre_hook(
            lambda _, args, name=name: seen.append((name, args[0].min() > 5e3))
        )
    for use in (head.loss, head.predict, head.forward):
        seen.clear()
        x, boxes, samples = inputs
        with torch.no_grad():
            use(x, copy.deepcopy(boxes), samples)
        assert seen == [('0', True), ('1', True), ('mask', True)], use


def test_boxes_keep_their_places_in_16_bits():
    model = cascade()
    maps = [
        torch.arange(512.0).expand(1, CHANNELS, 8, 512).contiguous().bfloat16()
        for _ in range(4)
    ]
    # bfloat16 knows 1600 and 1608, and nothing between them
    rois = torch.tensor([[0, 1604.0, 0, 1608, 4]])
    in_bf16 = model.roi_head._bbox_forward(0, maps, rois)
    in_fp32 = model.roi_head._bbox_forward(0, [m.float() for m in maps], rois)
    torch.testing.assert_close(in_bf16['bbox_feats'], in_fp32['bbox_feats'])


def test_masks_from_the_boxes_extractor():
    cfg = htc_lite(mask=True)
    del cfg['mask_roi_extractor']
    train = [{**rcnn_train(iou), 'mask_size': 14} for iou in (0.6, 0.7)]
    model = detector(cfg, train)
    losses_of(model, batch(model, True, True))
    assert_all_have_gradients(model)


@pytest.mark.parametrize(
    'changes, words',
    [
        (dict(mask_head=[mask_head()] * 2), ['mask_head', 'list of 2']),
        (
            dict(mask_head=mask_head(), mask_roi_extractor=[roi_extractor(7)]),
            ['mask_roi_extractor', 'list of 1', 'write'],
        ),
        (dict(stage_loss_weights=[1]), ['stage_loss_weights', 'num_stages=2']),
        (dict(bbox_head=[bbox_head()] * 3), ['bbox_head', '3 entries']),
        (dict(train_cfg=[{}]), ['train_cfg', '1 entries', 'num_stages=2']),
        (
            dict(glbctx_head={**context_head(), 'num_classes': 80}),
            ['num_classes=80', 'glbctx_head', 'write num_classes=4'],
        ),
        (
            dict(glbctx_head={**context_head(), 'conv_out_channels': 8}),
            ['conv_out_channels=8', 'write conv_out_channels=16'],
        ),
    ],
)
def test_roi_head_refuses(changes, words):
    cfg = {**htc_lite(), **changes}
    cfg.pop('type')
    with pytest.raises(ValueError) as error:
        HTCLiteRoIHead(**cfg)
    assert_sentence(error, words)


def test_box_head_in_faster_rcnn():
    head = dict(
        type='StandardRoIHead',
        bbox_roi_extractor=roi_extractor(7),
        bbox_head=bbox_head(),
    )
    model = detector(head, rcnn_train(0.5), kind='FasterRCNN')
    before = copy.deepcopy(model.roi_head.state_dict())
    losses_of(model, batch(model, False, True))
    assert_all_have_gradients(model)
    torch.optim.AdamW(model.parameters(), 1e-3).step()
    for name, param in model.roi_head.named_parameters():
        assert not torch.equal(param, before[name]), name
    model.eval()
    with torch.no_grad():
        (sample, _) = model(**batch(model, False, False), mode='predict')
    assert len(sample.pred_instances)
