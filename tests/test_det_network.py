"""The detector: network, training step, optimisation, start weights; against timm, torchvision, plain loops.

ViTDet: Li et al., ECCV 2022, and detectron2, which holds its code.
"""
import importlib.util
import math
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import timm.models
import torch
import torch.nn.functional as F
import torchvision
from conftest import run
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import Attention, VisionTransformerSAM
from timm.optim import create_optimizer_v2
from torch import nn
from torchvision.models.detection import roi_heads

import models
import specific_distill_det as det

CPU = torch.device('cpu')
NO_SCALER = torch.amp.GradScaler('cpu', enabled=False)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = ['cat', 'dog', 'owl']
SIZES = ('--model vit_pico_patch8 --input_size 64 64 --window_size 4 --fpn_dim 16 --head_dim 32 '
         '--anchor_size 8 --proposals 20 --roi_batch 16 --drop_path 0')


def det_args(flags=''):
    args = det.get_args_parser().parse_args(f'{SIZES} --batch_size 2 --device cpu {flags}'.split())
    vars(args).update(rank=0, world_size=1, distributed=False, amp='off')
    return args


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(module, seed=0, std=0.1):
    """The module with noise on every parameter: none is zero, no two are the same."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


def build(function, *args, seed=0):
    torch.manual_seed(seed)
    return function(*args)


def tiny_detector(seed=0):
    return build(det.Detector, 'vit_pico_patch8', len(CLASSES), det_args(), seed=seed)


def tiny_student(seed=2, adapters=5):
    detector = tiny_detector(seed=seed)
    return det.Student(detector, nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(adapters)))


def image_list(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]


def target_for(height, width, *boxes):
    """Boxes filled by their masks; labels 1, 2, 3, 1 ..."""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes):
        mask[y0:y1, x0:x1] = 255
    labels = torch.arange(len(boxes)) % len(CLASSES) + 1
    return {'boxes': torch.tensor(boxes).reshape(-1, 4).float(), 'labels': labels, 'masks': masks}


def objects():
    """A batch of two images of different sizes."""
    return image_list((64, 56), (40, 64)), [
        target_for(64, 56, (4, 6, 30, 40), (20, 30, 50, 60)), target_for(40, 64, (5, 5, 21, 25))]


def kept_outputs(module):
    """A list that fills with what the module returns."""
    kept = []
    module.register_forward_hook(lambda module, inputs, output: kept.append(output))
    return kept


# ---- the training step ---------------------------------------------------------------------------


class OneWeight(nn.Module):
    """A student of one weight w: losses 2w and w^2, one feature w * (mean of its images), one logit w."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))

    def forward(self, images, targets):
        assert self.training
        logit = self.w.view(1, 1, 1, 1)
        losses = {'loss_a': 2 * self.w, 'loss_b': self.w ** 2}
        return losses, [logit * images[0].float().mean()], [logit]


class OneLook:
    """A teacher: feature 3, logit 0, so that its objectness is 1/2."""

    def extract_features(self, images):
        return [torch.full((1, 1, 1, 1), 3.0)], [torch.zeros(1, 1, 1, 1)]


class Recorder(models.Meter):
    """Keeps each step's terms and gradient norms."""

    def __init__(self, args, optimizer):
        super().__init__(args, optimizer, 99, 'round')
        self.steps_seen, self.norms = [], []

    def update(self, grad_norm, **terms):
        super().update(grad_norm, **terms)
        self.steps_seen.append({name: value.item() for name, value in terms.items()})
        self.norms += [] if grad_norm is None else [grad_norm.item()]


def train(student, teacher, batches, args, epoch=0, lr=0.01):
    """One round of plain SGD -> (meter, iterations at which the scheduler was asked)."""
    optimizer, iterations = torch.optim.SGD(student.parameters(), lr=lr), []
    meter = Recorder(args, optimizer)
    scheduler = Namespace(step=iterations.append)
    done = det.train_one_epoch(
        student, teacher, batches, optimizer, scheduler, NO_SCALER, meter, CPU, epoch, 0, args)
    assert done == len(batches)
    return meter, iterations


def expected_step(w, mean, ramp):
    """Terms and slope of OneWeight by hand; BCE(sigmoid(w), 1/2) = log(1 + e^w) - w/2."""
    terms = {'loss_a': 2 * w, 'loss_b': w ** 2, 'loss_fpn': ramp * 0.5 * (3 - w * mean) ** 2,
             'loss_head': ramp * 0.25 * (math.log(1 + math.exp(w)) - w / 2)}
    slope = 2 + 2 * w - ramp * mean * (3 - w * mean) + ramp * 0.25 * (1 / (1 + math.exp(-w)) - 0.5)
    return {'loss': sum(terms.values()), **terms}, slope


@pytest.mark.parametrize('accum_iter, clip_grad', [(1, None), (2, None), (2, 0.5)])
def test_loss_and_updates_by_hand(accum_iter, clip_grad):
    """L = L_GT + ramp (alpha L_FPN + beta L_head), where the ramp counts updates, also over rounds."""
    args = det_args('--fpn_weight 0.5 --head_weight 0.25 --distill_warmup 8 --eval_every 3')
    args.accum_iter, args.clip_grad = accum_iter, clip_grad
    means = [1, 2, 3, 4, 2, 1][:3 * accum_iter]
    batches = [([torch.full((3, 2, 2), mean, dtype=torch.uint8)], [target_for(2, 2)]) for mean in means]
    student = OneWeight()
    meter, iterations = train(student, OneLook(), batches, args, epoch=2)
    assert iterations == [6, 7, 8]  # the third round of 3
    w, slope, norms = 1.0, 0.0, []
    for step, (mean, seen) in enumerate(zip(means, meter.steps_seen, strict=True)):
        terms, part = expected_step(w, mean, min(1, (6 + step // accum_iter) / 8))
        assert seen == pytest.approx(terms, rel=1e-5, abs=1e-7)
        slope += part / accum_iter
        if step % accum_iter == accum_iter - 1:
            norms.append(abs(slope))
            w -= 0.01 * slope * min(1, (clip_grad or math.inf) / abs(slope))
            slope = 0.0
    assert student.w.item() == pytest.approx(w, rel=1e-5)
    assert meter.norms == pytest.approx(norms, rel=1e-5)  # before the clipping


def test_without_a_teacher_labels_alone_teach():
    student = OneWeight()
    meter, _ = train(student, None, [(image_list((2, 2)), [target_for(2, 2)])], det_args())
    assert meter.steps_seen == [{'loss': 3.0, 'loss_a': 2.0, 'loss_b': 1.0}]
    assert student.w.item() == pytest.approx(1 - 0.01 * 4)


def test_a_real_step_distils_all_levels_through_the_adapters_from_a_frozen_teacher(tmp_path):
    """phi on the student's features, not on the teacher's, of which backbone and RPN head alone run."""
    teacher = filled(tiny_detector(seed=1), 1, 0.2)
    torch.save({'model': teacher.state_dict(), 'classes': CLASSES}, tmp_path / 'a.pth')
    teacher = det.load_detector(tmp_path / 'a.pth', CLASSES, det_args('--drop_path 0.5'), 'vit_pico_patch8')
    teacher.rpn.anchor_generator = teacher.roi_heads = None
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student, seen = filled(tiny_student(), 2, 0.2), []
    for network in (student.detector, teacher):
        seen += [kept_outputs(network.backbone), kept_outputs(network.rpn.head)]
    adapters = [(phi.weight.detach().clone(), phi.bias.detach().clone()) for phi in student.adapters]
    meter, _ = train(student, teacher, [objects()], det_args('--distill_warmup 4 --eval_every 1'), epoch=3)
    [features], [(logits, _)], [targets], [(teacher_logits, _)] = seen
    adapted = [F.conv2d(level, *phi, padding=1) for level, phi in zip(features.values(), adapters)]
    loss_fpn, loss_head = det.frs_loss(adapted, list(targets.values()), logits, teacher_logits)
    [terms] = meter.steps_seen
    assert len(adapted) == 5
    assert terms['loss_fpn'] == pytest.approx(0.75 * 0.001 * loss_fpn.item(), rel=1e-4)
    assert terms['loss_head'] == pytest.approx(0.75 * 0.1 * loss_head.item(), rel=1e-4)
    assert terms.pop('loss') == pytest.approx(sum(terms.values()), rel=1e-5)
    assert len(terms) == 7
    assert student.detector.rpn.head.logits is None  # nothing of a step stays behind
    assert all(module.training for module in student.modules())
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize('kind, adapters', [('objects', 5), ('objects', 0), ('none', 5), ('specks', 5)])
def test_every_parameter_gets_a_gradient(kind, adapters):
    """As DDP needs it in every step, also where a batch shows no object at all, or images of one pixel."""
    images, targets = objects()
    if kind == 'none':
        targets = [target_for(64, 56), target_for(40, 64)]
    if kind == 'specks':
        images, targets = image_list((1, 1), (1, 3)), [target_for(1, 1), target_for(1, 3)]
    student, teacher = tiny_student(adapters=adapters).train(), tiny_detector(seed=1).eval()
    losses, features, logits = student(images, targets)
    loss = sum(losses.values())
    if adapters:
        with torch.no_grad():
            teacher_features, teacher_logits = teacher.extract_features(images)
        loss = loss + sum(det.frs_loss(features, teacher_features, logits, teacher_logits))
    loss.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert kind != 'objects' or parameter.grad.abs().max() > 0, name


def untouched_losses():
    """torchvision's roi_heads once more: into the other the script has put its own losses."""
    spec = importlib.util.spec_from_file_location('torchvision.models.detection.again', roi_heads.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cell_weights(low, high, length, side):
    """(length, side): of pixels in a box's cells, means over points at most a pixel apart, linear."""
    count = math.ceil((high - low) / side)
    points = low + (np.arange(side * count) + 0.5) * (high - low) / (side * count)
    weights = [np.interp(points, np.arange(length) + 0.5, row) for row in np.eye(length)]
    return np.reshape(weights, (length, side, count)).mean(axis=2)


def plain_mask_targets(masks, boxes, matches, side):
    """Detectron2's, in float64: 1 where the cell of a box is at least half covered."""
    targets, (height, width) = torch.zeros(len(boxes), side, side), masks.shape[1:]
    for target, (x0, y0, x1, y1), match in zip(targets, boxes.double().tolist(), matches.tolist()):
        rows, columns = cell_weights(y0, y1, height, side), cell_weights(x0, x1, width, side)
        cells = rows.T @ masks[match].numpy() @ columns
        target[:] = torch.from_numpy(cells >= 127.5)
    return targets


def test_losses_are_torchvisions_with_l1_and_detectron2s_mask_targets(monkeypatch):
    """In the whole detector, of the same regions: values and every gradient. ViTDet has no smooth L1."""
    images, targets = objects()
    for target in targets:  # of any share of a pixel
        noise = torch.randint(0, 256, target['masks'].shape, generator=torch.Generator().manual_seed(1))
        target['masks'] = torch.where(target['masks'] > 0, noise, 0).byte()
    detector, results = filled(tiny_detector(), 3).train(), []
    for ours in (True, False):
        if not ours:
            theirs = untouched_losses()
            monkeypatch.setattr(theirs, 'project_masks_on_boxes', plain_mask_targets)
            monkeypatch.setattr(roi_heads, 'fastrcnn_loss', theirs.fastrcnn_loss)
            monkeypatch.setattr(roi_heads, 'maskrcnn_loss', theirs.maskrcnn_loss)
            del detector.rpn.compute_loss  # back to its class's
            monkeypatch.setattr(F, 'smooth_l1_loss', lambda *args, beta, **more: F.l1_loss(*args, **more))
        torch.manual_seed(5)
        detector.zero_grad()
        losses, *_ = detector(images, targets)
        sum(losses.values()).backward()
        assert all(loss.item() > 1e-3 for loss in losses.values())
        results.append([*losses.values(), *(parameter.grad for parameter in detector.parameters())])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)


def test_a_proposal_of_a_fraction_of_a_pixel_stays_and_an_empty_one_goes():
    boxes = [[8, 9, 8, 30], [8, 9, 8.0001, 9.0001], [20, 20, 40, 40], [50, 5, 60, 5]]
    [kept], _ = tiny_detector().eval().rpn.filter_proposals(
        torch.tensor([boxes]), torch.tensor([[4.0], [3.0], [2.0], [1.0]]), [(64, 64)], [4])
    assert torch.equal(kept, torch.tensor(boxes[1:3]))


# ---- the backbone --------------------------------------------------------------------------------


@pytest.fixture
def deep(monkeypatch):
    """`vit_deep_patchN`: twelve blocks as in ViT-B, each of them thin."""
    monkeypatch.setitem(models.SIZES, 'deep', models.Size(32, 12, 2, 32, 2))
    return 'vit_deep_patch'


@pytest.mark.parametrize('depth, expected', [(12, [2, 5, 8, 11]), (24, [5, 11, 17, 23]), (6, [0, 2, 3, 5])])
def test_four_blocks_attend_globally_where_vitdet_has_them(monkeypatch, depth, expected):
    """The last of each quarter, at any depth; the others in windows of 14."""
    monkeypatch.setitem(models.SIZES, 'thin', models.Size(32, depth, 2, 32, 2))
    net = filled(build(det.PlainBackbone, 'vit_thin_patch16', 256)).eval()
    found = []
    for i, block in enumerate(net.blocks):
        tokens = randn(1, 16, 16, 32).requires_grad_()
        block(tokens)[0, 0, 0].square().sum().backward()
        reached = tokens.grad[0].abs().amax(dim=-1) > 0  # from the corner
        if reached.all():
            found.append(i)
        else:
            assert reached[:14, :14].all() and reached.sum() == 14 * 14
    assert found == expected


@pytest.mark.parametrize('grid, table', [((5, 5), (5, 5)), ((3, 6), (3, 6)), ((4, 7), (6, 5))])
def test_folded_attention_is_timms_attention_with_relative_positions(grid, table):
    """Outputs and gradients, in float64, also from tables of another size."""
    ours, theirs = (filled(kind(32, 2, use_rel_pos=True, input_size=table).double(), 1, 0.3)
                    for kind in (det.FoldedAttention, Attention))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    results = []
    for attention in (ours, theirs):
        tokens = randn(3, *grid, 32, seed=4).double().requires_grad_()
        output = attention(tokens)
        output.backward(randn(3, *grid, 32, seed=5).double())
        results.append([output.detach(), tokens.grad, *(value.grad for value in attention.parameters())])
    for got, expected in zip(*results, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize('height, width', [(64, 64), (72, 40), (8, 24)])
def test_backbone_is_timms_vision_transformer_sam_at_any_size(deep, height, width):
    """No square and no multiple of the window: windows are padded inside."""
    net = filled(build(det.PlainBackbone, deep + '8', 64, 3)).double().eval()
    oracle = VisionTransformerSAM(
        img_size=64, patch_size=8, embed_dim=32, depth=12, num_heads=2, num_classes=0, neck_chans=0,
        global_pool='', use_abs_pos=True, use_rel_pos=True, window_size=3, global_attn_indexes=(2, 5, 8, 11),
        norm_layer=partial(nn.LayerNorm, eps=1e-6))
    oracle.neck, oracle.pos_embed = nn.Identity(), nn.Parameter(torch.zeros(1, 28, 28, 32))
    oracle.double().eval().load_state_dict(net.state_dict(), strict=True)
    images = randn(2, 3, height, width).double()
    with torch.no_grad():
        for network in (net, oracle):
            network.pos_embed.zero_()  # how it is resized is tested by itself
        features = net(images)
        assert features.shape == (2, 32, height // 8, width // 8)
        torch.testing.assert_close(features, oracle(images), atol=1e-11, rtol=0)


@pytest.mark.parametrize('height, width', [(224, 224), (512, 288)])
def test_the_position_table_is_that_of_224_pixels_resized_as_plain_bicubic(height, width):
    """As in detectron2, without antialiasing, in each forward pass; all of the table is trained."""
    net = filled(build(det.PlainBackbone, 'vit_pico_patch16', 64)).eval()
    assert net.pos_embed.shape == (1, 14, 14, 32)
    net.blocks = nn.Sequential()
    images = randn(1, 3, height, width)
    added = net(images) - F.conv2d(images, net.patch_embed.proj.weight, net.patch_embed.proj.bias, stride=16)
    table = net.pos_embed.detach().permute(0, 3, 1, 2)
    expected = F.interpolate(table, size=(height // 16, width // 16), mode='bicubic', align_corners=False)
    torch.testing.assert_close(added, expected, atol=1e-5, rtol=0)
    added.square().sum().backward()
    assert (net.pos_embed.grad.abs() > 0).all()


@pytest.mark.parametrize('index', [10, 11])
def test_drop_path_drops_images_and_not_windows(deep, index):
    """The rate grows linearly to the last block's; of an image the whole branch goes, also with windows."""
    net = filled(build(det.PlainBackbone, deep + '8', 64, 4, 0.5)).train()
    rates = [getattr(block.drop_path1, 'drop_prob', 0.0) for block in net.blocks]
    assert rates == pytest.approx([0.5 * i / 11 for i in range(12)], abs=1e-7)
    block, tokens = net.blocks[index], randn(32, 8, 8, 32)
    nn.init.zeros_(block.mlp.fc2.weight)
    nn.init.zeros_(block.mlp.fc2.bias)
    with torch.no_grad():
        added = block(tokens) - tokens  # the attention branch alone
        whole = block.eval()(tokens) - tokens
    dropped = (added == 0).all(dim=-1).flatten(1)  # (image, token)
    kept = ~dropped.any(dim=1)
    assert 4 < kept.sum() < 28 and torch.equal(dropped.all(dim=1), ~kept)
    torch.testing.assert_close(added[kept], whole[kept] / (1 - 0.5 * index / 11), atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_changes_no_bit():
    """The blocks run twice; with drop path, too, outputs and gradients are the same."""
    results, calls = [], []
    for checkpointing in (False, True):
        net = filled(build(det.PlainBackbone, 'vit_micro_patch8', 32, 2, 0.5)).train()
        net.set_grad_checkpointing(checkpointing)
        calls.append(kept_outputs(net.blocks[3].attn))
        torch.manual_seed(7)
        output = net(randn(4, 3, 32, 32))
        output.square().mean().backward()
        results.append([output.detach(), *(parameter.grad for parameter in net.parameters())])
    assert [len(part) for part in calls] == [1, 2]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- parameters and start values -----------------------------------------------------------------


def with_bias(name, *shape, out=0):
    return {f'{name}.weight': shape, f'{name}.bias': (shape[out],)}


def block_parameters(name, dim, reach):
    """A block with heads of 64 and relative positions over `reach` x `reach` tokens."""
    return {
        **with_bias(f'{name}.norm1', dim), **with_bias(f'{name}.norm2', dim),
        **with_bias(f'{name}.attn.qkv', 3 * dim, dim), **with_bias(f'{name}.attn.proj', dim, dim),
        f'{name}.attn.rel_pos_h': (2 * reach - 1, 64), f'{name}.attn.rel_pos_w': (2 * reach - 1, 64),
        **with_bias(f'{name}.mlp.fc1', 4 * dim, dim), **with_bias(f'{name}.mlp.fc2', dim, 4 * dim)}


def vitdet_parameters(dim):
    """ViTDet's Mask R-CNN on COCO, as detectron2 configures it; the heads count the background too."""
    net, pyramid, heads, half, quarter = 'backbone.net', 'backbone.levels', 'roi_heads', dim // 2, dim // 4
    found = {f'{net}.pos_embed': (1, 14, 14, dim), **with_bias(f'{net}.patch_embed.proj', dim, 3, 16, 16)}
    for i in range(12):
        found |= block_parameters(f'{net}.blocks.{i}', dim, 64 if i % 3 == 2 else 14)
    # strides 4 and 8 by transposed convolutions, in -> out, with biases; a norm between them
    found |= with_bias(f'{pyramid}.0.0', dim, half, 2, 2, out=1) | with_bias(f'{pyramid}.0.1', half)
    found |= with_bias(f'{pyramid}.0.3', half, quarter, 2, 2, out=1)
    found |= with_bias(f'{pyramid}.1.0', dim, half, 2, 2, out=1)
    for level, first, channels in ((0, 4, quarter), (1, 1, half), (2, 0, dim), (3, 1, dim)):
        found[f'{pyramid}.{level}.{first}.weight'] = (256, channels, 1, 1)
        found[f'{pyramid}.{level}.{first + 2}.weight'] = (256, 256, 3, 3)
        for norm in (first + 1, first + 3):
            found |= with_bias(f'{pyramid}.{level}.{norm}', 256)
    for i in range(2):
        found |= with_bias(f'rpn.head.conv.{i}.0', 256, 256, 3, 3)
    found |= with_bias('rpn.head.cls_logits', 3, 256, 1, 1) | with_bias('rpn.head.bbox_pred', 12, 256, 1, 1)
    for name in (f'{heads}.box_head', f'{heads}.mask_head'):
        for i in range(4):
            found |= {f'{name}.{i}.0.weight': (256, 256, 3, 3), **with_bias(f'{name}.{i}.1', 256)}
    found |= with_bias(f'{heads}.box_head.5', 1024, 7 * 7 * 256)
    found |= with_bias(f'{heads}.box_predictor.cls_score', 81, 1024)
    found |= with_bias(f'{heads}.box_predictor.bbox_pred', 4 * 81, 1024)
    found |= with_bias(f'{heads}.mask_predictor.conv5_mask', 256, 256, 2, 2, out=1)
    return found | with_bias(f'{heads}.mask_predictor.mask_fcn_logits', 81, 256, 1, 1)


def paper_detector(name):
    """The detector at its full size, without memory."""
    args = det.get_args_parser().parse_args([])
    with torch.device('meta'):
        return det.Detector(name, 80, args)


@pytest.mark.parametrize('name, dim', [('vit_small_patch16', 384), ('vit_base_patch16', 768)])
def test_the_detector_has_vitdets_parameters(name, dim):
    """Name by name, and nothing else in its state; ViT-B has the 111 M that ViTDet reports."""
    detector = paper_detector(name)
    found = {name: tuple(value.shape) for name, value in detector.state_dict().items()}
    assert found == vitdet_parameters(dim)
    assert dim == 384 or round(sum(map(math.prod, found.values())) / 1e6) == 111
    assert {module.eps for module in detector.modules() if isinstance(module, nn.LayerNorm)} == {1e-6}


def test_regions_and_thresholds_are_vitdets():
    """Twice as many proposals before suppression in training; 512 regions train, a quarter objects."""
    detector = paper_detector('vit_small_patch16')
    rpn, heads = detector.rpn, detector.roi_heads
    assert rpn._pre_nms_top_n == {'training': 2000, 'testing': 1000}
    assert rpn._post_nms_top_n == {'training': 1000, 'testing': 1000}
    thresholds = rpn.nms_thresh, heads.nms_thresh, heads.score_thresh, heads.detections_per_img
    assert thresholds == (0.7, 0.5, 0.05, 100)
    sampler = heads.fg_bg_sampler
    assert (sampler.batch_size_per_image, sampler.positive_fraction) == (512, 0.25)
    for pooler, side in ((heads.box_roi_pool, 7), (heads.mask_roi_pool, 14)):
        assert (pooler.output_size, pooler.strides, pooler.canonical) == ((side, side), [4, 8, 16, 32], 224)
    assert tiny_detector().roi_heads.box_roi_pool.canonical == 56  # of --anchor_size 8


def test_weights_start_from_vitdets_and_detectron2s_values():
    """Backbone: normal 0.02, relative positions zero. Heads: normal; hidden layers by their fans."""
    args = det_args('--head_dim 256 --fpn_dim 64')
    args.model = 'vit_micro_patch16'
    detector = build(det.Detector, args.model, 40, args)
    net, rpn, heads = detector.backbone.net, detector.rpn.head, detector.roi_heads
    box, mask = heads.box_predictor, heads.mask_predictor
    expected = [
        (net.blocks[0].mlp.fc1, 0.02), (net.blocks[5].attn.qkv, 0.02), (rpn.conv[0][0], 0.01),
        (rpn.bbox_pred, 0.01), (box.cls_score, 0.01), (box.bbox_pred, 0.001), (mask.mask_fcn_logits, 0.001),
        (heads.box_head[5], 1 / math.sqrt(64 * 49)), (mask.conv5_mask, math.sqrt(2 / (64 * 4)))]
    for layer, std in expected:
        assert layer.weight.std().item() == pytest.approx(std, rel=0.07), layer
        assert layer.bias.abs().max() == 0
    for head in (heads.box_head, heads.mask_head):
        assert head[3][0].weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.03)
    assert net.pos_embed.std().item() == pytest.approx(0.02, rel=0.03)
    for block in net.blocks:
        assert block.attn.rel_pos_h.abs().max() == block.attn.rel_pos_w.abs().max() == 0


# ---- pyramid, regions, anchors, precision --------------------------------------------------------


def test_pyramid_levels_are_made_from_the_last_map_alone():
    """x4, x2, x1, x1/2 and a fifth level by subsampling: each written out with torch's own functions."""
    pyramid = filled(tiny_detector().backbone, 3).eval()
    state, images = pyramid.state_dict(), randn(2, 3, 64, 64)

    def norm(x, name):
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, x.shape[3:], state[f'{name}.weight'], state[f'{name}.bias'], 1e-6)
        return x.permute(0, 3, 1, 2)

    def double(x, name):
        return F.conv_transpose2d(x, state[f'{name}.weight'], state[f'{name}.bias'], stride=2)

    def smooth(x, level, first):
        name = f'levels.{level}'
        x = norm(F.conv2d(x, state[f'{name}.{first}.weight']), f'{name}.{first + 1}')
        return norm(F.conv2d(x, state[f'{name}.{first + 2}.weight'], padding=1), f'{name}.{first + 3}')

    with torch.no_grad():
        got, x = pyramid(images), pyramid.net(images)
        fine = double(F.gelu(norm(double(x, 'levels.0.0'), 'levels.0.1')), 'levels.0.3')
        half = torch.stack([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]).amax(dim=0)
        expected = [smooth(fine, 0, 4), smooth(double(x, 'levels.1.0'), 1, 1), smooth(x, 2, 0)]
        expected.append(smooth(half, 3, 1))
        expected.append(expected[3][:, :, ::2, ::2])
    assert list(got) == ['0', '1', '2', '3', '4']
    for ours, theirs, side in zip(got.values(), expected, (32, 16, 8, 4, 2), strict=True):
        assert ours.shape == (2, 16, side, side)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def pyramid_of(size, function):
    """Feature maps by name: function(level, side) -> (images, C, side, side)."""
    return {str(k): function(k, size // (4 * 2 ** k)) for k in range(5)}


@pytest.mark.parametrize('side, level', [
    (1, 0), (111.9, 0), (112, 1), (223.9, 1), (224, 2), (447.9, 2), (448, 3), (500, 3)])
def test_a_region_is_read_from_the_level_that_fits_its_size(side, level):
    """FPN, equation 1: floor(4 + log2(side / 224)) between levels 2 and 5, whose strides are 4 to 32."""
    pooler = det.AlignedRoIPooler(2, [4, 8, 16, 32], 224)
    features = pyramid_of(1024, lambda k, n: torch.full((1, 1, n, n), float(k)))
    boxes = torch.tensor([[30, 20, 30 + side, 20 + side], [30, 20, 30 + side / 2, 20 + 2 * side]])
    pooled = pooler(features, [boxes], None)
    torch.testing.assert_close(pooled, torch.full_like(pooled, level))


BOXES = [[101.0, 77.0, 133.5, 119.25], [64.0, 90.0, 204.0, 250.0], [50.5, 40.25, 400.0, 330.0],
         [10.0, 70.0, 480.0, 500.0]]  # the box of a number belongs to that level


def test_pooling_is_torchvisions_aligned_roi_align_of_the_right_image():
    """On level and image of each region, in the order given, in float32; sizes of images do not matter."""
    features = pyramid_of(512, lambda k, n: randn(3, 5, n, n, seed=k))
    boxes = [torch.tensor(BOXES)[[2, 0]], torch.zeros(0, 4), torch.tensor(BOXES)[[3, 1, 0]]]
    pooler = det.AlignedRoIPooler(7, [4, 8, 16, 32], 224)
    pooled = pooler(features, boxes, [(100, 90), (30, 30), (512, 512)])
    expected = []
    for image, level in ((0, 2), (0, 0), (2, 3), (2, 1), (2, 0)):
        feature, box = features[str(level)][image:image + 1], torch.tensor([BOXES[level]])
        expected.append(torchvision.ops.roi_align(feature, [box], 7, 1 / (4 * 2 ** level), 0, aligned=True))
    torch.testing.assert_close(pooled, torch.cat(expected), atol=1e-6, rtol=0)
    half = pooler({name: level.bfloat16() for name, level in features.items()}, boxes, None)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, pooled, atol=0.02, rtol=0)
    assert pooler(features, [torch.zeros(0, 4)] * 3, None).shape == (0, 5, 7, 7)


def plain_anchors(grid, stride, size):
    """Three boxes of area size^2 and height/width 1/2, 1, 2, at the corner of each cell."""
    found = []
    for i in range(grid):
        for j in range(grid):
            for ratio in (0.5, 1, 2):
                height, width = size * math.sqrt(ratio), size / math.sqrt(ratio)
                x, y = j * stride, i * stride
                found.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    return torch.tensor(found)


@pytest.mark.parametrize('autocast', [False, True])
def test_anchors_are_not_rounded(autocast):
    """One size per level from --anchor_size, three shapes; float32 under autocast, too."""
    detector = tiny_detector()
    anchors = kept_outputs(detector.rpn.anchor_generator)
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
        detector(*objects())
    expected = [plain_anchors(grid, 64 // grid, 8 * 2 ** k) for k, grid in enumerate((32, 16, 8, 4, 2))]
    [[first, second]] = anchors
    assert first.dtype == torch.float32 and torch.equal(first, second)
    torch.testing.assert_close(first, torch.cat(expected), atol=1e-4, rtol=0)


def confident(detector):
    """Weights large enough that evaluation finds something."""
    filled(detector, 9, 0.05)
    with torch.no_grad():
        detector.roi_heads.box_predictor.cls_score.bias[1:] += 3
    return detector


def test_boxes_stay_float32_under_autocast():
    """Outputs of RPN head and box predictor, and so proposals, losses and detections."""
    detector = confident(tiny_detector())
    seen = {name: kept_outputs(module) for name, module in (
        ('box head', detector.roi_heads.box_head), ('rpn', detector.rpn), ('rpn head', detector.rpn.head),
        ('predictor', detector.roi_heads.box_predictor), ('conv', detector.rpn.head.conv))}
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses, _, logits = detector(*objects())
        detections = detector.eval()(objects()[0])
        _, teacher_logits = detector.extract_features(objects()[0])
    assert seen['conv'][0].dtype == seen['box head'][0].dtype == torch.bfloat16  # autocast was at work
    outputs = [*losses.values(), *logits, *teacher_logits, *(found['boxes'] for found in detections)]
    for objectness, deltas in seen['rpn head']:
        outputs += [*objectness, *deltas]
    for scores, deltas in seen['predictor']:
        outputs += [scores, deltas]
    for proposals, _ in seen['rpn']:
        outputs += proposals
    assert {output.dtype for output in outputs} == {torch.float32}


# ---- what goes in and comes out ------------------------------------------------------------------


@pytest.mark.parametrize('training', [True, False])
def test_images_are_normalised_and_then_padded_and_keep_their_scale(training):
    """Top left in S x S, zeros elsewhere, boxes unmoved, however small all images of a batch are."""
    detector, shown, regions = tiny_detector().train(training), [], []
    detector.backbone.register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0]))
    detector.rpn.register_forward_pre_hook(lambda module, inputs: regions.append(inputs))
    images, targets = image_list((7, 30), (29, 12)), [target_for(7, 30), target_for(29, 12, (3, 4, 9, 20))]
    detector(images, targets if training else None)
    assert shown[0].shape == (2, 3, 64, 64)
    for image, seen in zip(images, shown[0]):
        expected = torchvision.transforms.functional.normalize(image / 255, IMAGENET_MEAN, IMAGENET_STD)
        expected = F.pad(expected, (0, 64 - image.shape[2], 0, 64 - image.shape[1]))
        torch.testing.assert_close(seen, expected, atol=1e-6, rtol=0)
    assert [tuple(size) for size in regions[0][0].image_sizes] == [(7, 30), (29, 12)]
    if training:
        assert regions[0][2][1]['boxes'].tolist() == [[3, 4, 9, 20]]


def test_detections_are_in_the_pixels_of_the_unpadded_image():
    """Labels from 1, scores falling, masks as probabilities; nothing found is empty tensors, no error."""
    detector, images = confident(tiny_detector()).eval(), image_list((64, 30), (17, 64))
    with torch.no_grad():
        detections = detector(images)
        detector.roi_heads.box_predictor.cls_score.bias[0] += 50
        empty = detector(images[:1])[0]
    for image, found in zip(images, detections, strict=True):
        count = len(found['boxes'])
        assert 0 < count <= 100 and found['masks'].shape == (count, 1, 28, 28)
        assert found['boxes'].min() >= 0
        right, bottom = found['boxes'][:, 2:].amax(0)
        assert right <= image.shape[2] and bottom <= image.shape[1]
        assert set(found['labels'].tolist()) <= {1, 2, 3} and (found['scores'].diff() <= 0).all()
        assert 0 < found['masks'].min() and found['masks'].max() < 1
    shapes = {name: tuple(value.shape) for name, value in empty.items()}
    assert shapes == {'boxes': (0, 4), 'labels': (0,), 'scores': (0,), 'masks': (0, 1, 28, 28)}


# ---- optimisation --------------------------------------------------------------------------------


def test_layer_decay_and_weight_decay_of_each_parameter():
    """0.7^(12 - i) per block, 0.7^13 for the stem, 1 behind it; no decay on 1-D parameters and positions."""
    with torch.device('meta'):
        adapters = nn.ModuleList(nn.Conv2d(256, 256, 3) for _ in range(5))
    student = det.Student(paper_detector('vit_small_patch16'), adapters)
    optimizer = create_optimizer_v2(student, opt='adamw', lr=1e-4, weight_decay=0.05, layer_decay=0.7)
    names, found = {id(parameter): name for name, parameter in student.named_parameters()}, 0
    for group in optimizer.param_groups:
        for parameter in group['params']:
            name, power = names.pop(id(parameter)), 0
            if name.startswith(('detector.backbone.net.pos_embed', 'detector.backbone.net.patch_embed.')):
                power = 13
            elif name.startswith('detector.backbone.net.blocks.'):
                power = 12 - int(name.split('.')[4])
            assert group['lr_scale'] == pytest.approx(0.7 ** power, rel=1e-9), name
            positions = name.endswith(('.pos_embed', '.rel_pos_h', '.rel_pos_w'))
            assert group['weight_decay'] == (0.0 if parameter.ndim == 1 or positions else 0.05), name
            found += positions
    assert not names and found == 25


def rate(t, total, warmup, lr):
    """ViTDet's schedule as detectron2 counts it: linear from 0.001 lr; 0.1 and 0.01 from the milestones."""
    if t < warmup:
        return lr * (0.001 + 0.999 * t / warmup)
    return lr * 0.1 ** ((t >= round(total * 8 / 9)) + (t >= round(total * 26 / 27)))


@pytest.mark.parametrize('flags, total, warmup, decay', [
    ('', 184375, 250, 0.1), ('--iterations 40 --warmup_iterations 9 --teacher_path a.pth', 40, 9, 0.05),
    ('--iterations 20 --warmup_iterations 0 --teacher_path a.pth --weight_decay 0.2', 20, 0, 0.2)])
def test_optimizer_and_schedule_that_main_builds_are_the_papers(
        flags, total, warmup, decay, data, tmp_path, monkeypatch, capsys):
    """AdamW, lr 1e-4; a tenth from 8/9, a hundredth from 26/27; decay 0.1, with a teacher 0.05."""
    caught = []
    monkeypatch.setattr(det, 'load_detector', lambda *args: tiny_detector())
    monkeypatch.setattr(det, 'train_one_epoch', lambda *args: caught.extend(args) or pytest.exit('caught'))
    with pytest.raises(pytest.exit.Exception):
        run(det, 'script', *f'{SIZES} --device cpu --num_workers 0 {flags}'.split(), '--output_dir', tmp_path,
            '--data_path', data / 'coco')
    _, teacher, _, optimizer, scheduler, *_, args = caught
    assert (teacher is None) == ('teacher' not in flags) and type(optimizer) is torch.optim.AdamW
    assert (args.distill_warmup, args.fpn_weight, args.head_weight) == (500, 0.001, 0.1)
    assert {group['weight_decay'] for group in optimizer.param_groups} == {0.0, decay}
    assert f'weight decay {decay}\n' in capsys.readouterr().out
    scales = {group['lr_scale'] for group in optimizer.param_groups}
    assert sorted(scales) == pytest.approx([0.7 ** k for k in (3, 2, 1, 0)])
    steps = {0, 1, 124, 249, 250, total // 2, total - 1}
    for milestone in (round(total * 8 / 9), round(total * 26 / 27)):
        steps |= {milestone - 1, milestone}
    for t in sorted(steps | set(range(min(total, 50)))):
        scheduler.step(t)
        for group in optimizer.param_groups:
            expected = rate(t, total, warmup, 1e-4) * group['lr_scale']
            assert group['lr'] == pytest.approx(expected, rel=1e-6), t


# ---- start weights and teachers ------------------------------------------------------------------


def noise_like(model):
    """The model's state dict with every entry random: no two entries are the same."""
    entries = enumerate(model.state_dict().items())
    return {name: randn(*value.shape, seed=k) for k, (name, value) in entries}


def plain_vit(size=224, kind=VisionTransformer):
    """timm's own ViT of the size of vit_pico_patch16."""
    return noise_like(kind(img_size=size, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=5))


def mae_file(encoder):
    decoder = noise_like(models.create_mae('mae_vit_pico_patch16'))
    return {'model': {**{name: value for name, value in decoder.items() if 'decoder' in name}, **encoder}}


def dino_file(encoder):
    teacher = {f'backbone.{name}': value for name, value in encoder.items()}
    student = {f'module.backbone.{name}': 0 * value for name, value in encoder.items()}
    return {'student': student, 'teacher': {**teacher, 'head.mlp.0.bias': torch.ones(8)}, 'epoch': 300}


def deit_file(encoder):
    return {'model': encoder}


DEIT = timm.models.deit.VisionTransformerDistilled  # with a second token, whose position is no patch's


@pytest.mark.parametrize('kind, file, tokens', [
    (VisionTransformer, mae_file, 1), (VisionTransformer, dino_file, 1), (DEIT, deit_file, 2)])
def test_published_encoders_start_the_backbone(kind, file, tokens, tmp_path, capsys):
    """Weights arrive, positions lose the token rows, relative positions are new, the rest is named."""
    encoder = plain_vit(kind=kind)
    torch.save(file(encoder), tmp_path / 'file.pth')
    net = build(det.PlainBackbone, 'vit_pico_patch16', 64, 4)
    models.load_pretrained(net, tmp_path / 'file.pth')
    state = net.state_dict()
    taken = [name for name in encoder if name.startswith(('blocks.', 'patch_embed.'))]
    assert len(taken) == 2 * 12 + 2 and all(torch.equal(state[name], encoder[name]) for name in taken)
    assert torch.equal(state['pos_embed'].flatten(1, 2), encoder['pos_embed'][:, tokens:])
    assert all(state[name].abs().max() == 0 for name in state if 'rel_pos' in name)
    line = capsys.readouterr().out
    assert 'new: rel_pos_h, rel_pos_w' in line and 'cls_token' in line.split('left out: ')[1]


def test_positions_of_another_input_size_are_resized_to_the_table_of_224(tmp_path):
    encoder = plain_vit(size=64)
    torch.save(encoder, tmp_path / 'file.pth')
    net = build(det.PlainBackbone, 'vit_pico_patch16', 128, 4)
    models.load_pretrained(net, tmp_path / 'file.pth')
    table = encoder['pos_embed'][:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=(14, 14), mode='bicubic', align_corners=False).permute(0, 2, 3, 1)
    torch.testing.assert_close(net.pos_embed.detach(), table, atol=1e-6, rtol=0)


def saved(path, flags='', **changes):
    """A teacher's file, of the sizes in flags -> (path, its state dict)."""
    args = det_args(flags)
    state = build(det.Detector, args.model, len(CLASSES), args).state_dict()
    torch.save({'model': state, 'classes': CLASSES, 'args': vars(args), **changes}, path)
    return path, state


def test_a_teacher_has_its_own_size_flags_and_comes_back_frozen(tmp_path):
    sizes = '--model vit_micro_patch8 --window_size 2 --fpn_dim 24 --head_dim 40 --proposals 7'
    path, state = saved(tmp_path / 'a.pth', sizes)
    teacher = det.load_detector(path, CLASSES, det_args())
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
    assert teacher.rpn.post_nms_top_n() == 7 and teacher.backbone.out_channels == 24
    assert teacher.backbone.net.blocks[1].window_size == 2 and not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_teacher_that_does_not_fit_is_refused(tmp_path):
    path, state = saved(tmp_path / 'a.pth')
    more, _ = saved(tmp_path / 'b.pth', model={**state, 'extra': torch.zeros(1)})
    coarse, _ = saved(tmp_path / 'c.pth', '--anchor_size 16')
    cases = [(more, None, 'another architecture.*extra'), (path, 'vit_nano_patch8', 'another architecture'),
             (coarse, None, r'\(8, 64, 16\).*pyramids differ')]
    for file, name, message in cases:
        with pytest.raises(SystemExit, match=message) as error:
            det.load_detector(file, CLASSES, det_args(), name)
        assert len(str(error.value).splitlines()) == 1
