"""The detector: network, distillation losses, optimisation, start weights; against timm, torchvision and plain loops.

Sec. and Table: the paper's and its supplement's. ViTDet: Li et al., ECCV 2022, and detectron2, which holds its code.
"""
import copy
import json
import math
from functools import partial

import pytest
import specific_distill_det as det
import timm.models
import torch
import torch.nn.functional as F
import torchvision
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_sam import Attention, VisionTransformerSAM
from timm.optim import create_optimizer_v2
from torch import nn

import models

CPU = torch.device('cpu')
NO_SCALER = torch.amp.GradScaler('cpu', enabled=False)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = ['cat', 'dog', 'owl']
TINY = ['--model', 'vit_pico_patch8', '--teacher_model', 'vit_pico_patch8', '--input_size', '64', '--window_size', '4',
        '--fpn_dim', '16', '--head_dim', '32', '--anchor_size', '8', '--proposals', '20', '--roi_batch', '16',
        '--batch_size', '2', '--device', 'cpu', '--print_freq', '1000', '--num_workers', '0']


def det_args(*argv, **options):
    args = det.get_args_parser().parse_args([*TINY, *argv])
    for name, value in {'rank': 0, 'world_size': 1, 'distributed': False, 'amp': 'off', **options}.items():
        setattr(args, name, value)
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


def tiny_detector(seed=0, **options):
    return build(det.Detector, 'vit_pico_patch8', len(CLASSES), det_args('--drop_path', '0', **options), seed=seed)


def tiny_adapters(seed=5):
    torch.manual_seed(seed)
    return nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(5))


def image_list(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]


def target_for(height, width, *boxes):
    """Boxes filled by their masks; labels 1, 2, 3, 1 ..."""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes):
        mask[y0:y1, x0:x1] = 1
    labels = torch.arange(len(boxes)) % len(CLASSES) + 1
    return {'boxes': torch.tensor(boxes).reshape(-1, 4).float(), 'labels': labels, 'masks': masks}


def objects():
    """A batch of two images of different sizes: ([(3, h, w) uint8], targets)."""
    return image_list((64, 56), (40, 64)), [
        target_for(64, 56, (4, 6, 30, 40), (20, 30, 50, 60)), target_for(40, 64, (5, 5, 21, 25))]


@pytest.fixture
def deep(monkeypatch):
    """`vit_deep_patchN`: twelve blocks as in ViT-B, each of them thin."""
    monkeypatch.setitem(models.SIZES, 'deep', models.Size(32, 12, 2, 32, 2))
    return 'vit_deep_patch'


# ----------------------------------------------------------------------------------------------------------- the losses


def logit(p):
    return math.log(p / (1 - p))


def maps(rows):
    """One 2x2 map per row of four numbers -> (1, rows, 2, 2)."""
    return torch.tensor(rows).reshape(1, len(rows), 2, 2)


def test_frs_loss_by_hand():
    """Supplement: both terms are weighted by the teacher's largest objectness and divided by its sum."""
    # two anchors at four positions; the larger one of each: 0.75, 0.5, 0.25, 0.5, together 2
    teacher = maps([[logit(0.75), logit(0.25), logit(0.25), 0.0], [0.0, 0.0, logit(0.25), 0.0]])
    student = torch.zeros(1, 2, 2, 2)
    # differences 2, 1, 4, -3 in one channel: (0.75 * 4 + 0.5 * 1 + 0.25 * 16 + 0.5 * 9) / 2 = 12 / 2
    feature, target = maps([[1.0, 0.0, -4.0, 5.0]]), maps([[3.0, 1.0, 0.0, 2.0]])
    loss_fpn, loss_head = det.frs_loss([feature], [target], [student], [teacher])
    assert loss_fpn.shape == loss_head.shape == ()
    assert loss_fpn.item() == pytest.approx(6, abs=1e-6)
    # a student that says 0.5 pays log 2 for any target, at two anchors: (0.75 + 0.5 + 0.25 + 0.5) * 2 log 2 / 2
    assert loss_head.item() == pytest.approx(2 * math.log(2), abs=1e-6)
    # one that says 0.75 at the first position's anchors: targets 0.75 and 0.5
    student[0, :, 0, 0] = logit(0.75)
    first = -0.75 * math.log(0.75) - 0.25 * math.log(0.25) - 0.5 * math.log(0.75) - 0.5 * math.log(0.25)
    _, loss_head = det.frs_loss([feature], [target], [student], [teacher])
    assert loss_head.item() == pytest.approx((0.75 * first + 1.25 * 2 * math.log(2)) / 2, abs=1e-6)
    # a second channel with differences 1 adds 1, a second level of the same maps doubles both
    more = torch.cat([feature, torch.zeros(1, 1, 2, 2)], 1), torch.cat([target, torch.ones(1, 1, 2, 2)], 1)
    loss_fpn, twice = det.frs_loss([more[0]] * 2, [more[1]] * 2, [student] * 2, [teacher] * 2)
    assert loss_fpn.item() == pytest.approx(14, abs=1e-6)
    assert twice.item() == pytest.approx(2 * loss_head.item(), abs=1e-6)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def plain_frs_loss(student_features, teacher_features, student_logits, teacher_logits):
    """The supplement's two sums, one number after the other, in float64."""
    loss_fpn = loss_head = 0.0
    for level in zip(student_features, teacher_features, student_logits, teacher_logits):
        (images, channels, height, width), anchors = level[0].shape, level[2].shape[1]
        feature, target, student, teacher = (part.detach().double().tolist() for part in level)
        total = distance = entropy = 0.0
        for n in range(images):
            for i in range(height):
                for j in range(width):
                    quality = [sigmoid(teacher[n][a][i][j]) for a in range(anchors)]
                    p = max(quality)
                    total += p
                    for c in range(channels):
                        distance += p * (target[n][c][i][j] - feature[n][c][i][j]) ** 2
                    for a in range(anchors):
                        s = sigmoid(student[n][a][i][j])
                        entropy -= p * (quality[a] * math.log(s) + (1 - quality[a]) * math.log(1 - s))
        loss_fpn, loss_head = loss_fpn + distance / total, loss_head + entropy / total
    return loss_fpn, loss_head


SHAPES = [(4, 5), (2, 3), (1, 1)]


def levels(channels, seed, scale=1.0, shapes=SHAPES, images=2):
    return [scale * randn(images, channels, *shape, seed=seed + k) for k, shape in enumerate(shapes)]


def frs_inputs(seed=0):
    return levels(6, seed), levels(6, seed + 10, 2.0), levels(3, seed + 20, 2.0), levels(3, seed + 30, 3.0)


def test_frs_loss_equals_a_float64_loop():
    """Supplement: L_FPN and L_head, summed over levels of different sizes, images, positions, channels or anchors."""
    inputs = frs_inputs()
    for got, expected in zip(det.frs_loss(*inputs), plain_frs_loss(*inputs)):
        assert got.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('autocast', [False, True])
def test_frs_loss_is_computed_in_float32(dtype, autocast):
    """Supplement's losses are taken in float32 whatever autocast made of their inputs."""
    inputs = [[level.to(dtype) for level in part] for part in frs_inputs(3)]
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
        losses = det.frs_loss(*inputs)
    for got, expected in zip(losses, plain_frs_loss(*inputs)):
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(expected, rel=1e-6)


def test_equal_features_cost_nothing_and_equal_logits_the_least():
    """Supplement: L_FPN is a distance; L_head's gradient vanishes where the student says what the teacher says."""
    features, _, _, teacher_logits = frs_inputs()
    student_logits = [level.clone().requires_grad_() for level in teacher_logits]
    loss_fpn, loss_head = det.frs_loss(features, [level.clone() for level in features], student_logits, teacher_logits)
    assert loss_fpn.item() == 0.0
    loss_head.backward()
    assert max(level.grad.abs().max() for level in student_logits) < 1e-7


def test_gradient_of_the_distillation_by_hand():
    """Supplement: p weighs the gradients too: 2p(f_student - f_teacher) / sum p, and p(sigma_s - sigma_t) / sum p."""
    features, targets, logits, teacher_logits = frs_inputs(7)
    features, logits = ([level.requires_grad_() for level in part] for part in (features, logits))
    sum(det.frs_loss(features, targets, logits, teacher_logits)).backward()
    for feature, target, student, teacher in zip(features, targets, logits, teacher_logits):
        ours, theirs = (1 / (1 + torch.exp(-part.detach().double())) for part in (student, teacher))
        p = torch.stack([theirs[:, a] for a in range(3)]).max(dim=0).values[:, None]
        expected = 2 * p * (feature.detach().double() - target.double()) / p.sum()
        torch.testing.assert_close(feature.grad.double(), expected, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(student.grad.double(), p * (ours - theirs) / p.sum(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize('low', [-1e4, -200.0, -95.0, -87.5])
def test_level_on_which_the_teacher_sees_nothing_gives_no_nan(low):
    """Supplement: a level whose objectness underflows in float32 has no weight to divide by, and takes no part."""
    features, targets, logits, teacher_logits = frs_inputs()
    features, logits = ([level.requires_grad_() for level in part] for part in (features, logits))
    teacher_logits[1] = torch.full_like(teacher_logits[1], low)
    losses = det.frs_loss(features, targets, logits, teacher_logits)
    sum(losses).backward()
    assert all(math.isfinite(loss.item()) for loss in losses)
    assert all(level.grad.isfinite().all() for level in features + logits)
    if low < -150:
        others = [[part[0], part[2]] for part in (features, targets, logits, teacher_logits)]
        for got, expected in zip(losses, plain_frs_loss(*others)):
            assert got.item() == pytest.approx(expected, rel=1e-6)


def test_frs_loss_refuses_another_number_of_levels():
    """Detection: all five levels teach; a list that is too short is an error, not a smaller loss."""
    inputs = frs_inputs()
    for k in range(4):
        with pytest.raises(ValueError, match='zip'):
            det.frs_loss(*(part[:-1] if i == k else part for i, part in enumerate(inputs)))


@pytest.mark.parametrize('iteration, warmup, factor', [
    (0, 500, 0.0), (1, 500, 0.002), (250, 500, 0.5), (499, 500, 0.998), (500, 500, 1.0), (1000, 500, 1.0),
    (0, 0, 1.0), (7, 0, 1.0), (0, 1, 0.0), (1, 1, 1.0)])
def test_distillation_ramp_by_value(iteration, warmup, factor):
    """Supplement: both terms grow with min(1, iteration / 500)."""
    assert det.distillation_ramp(iteration, warmup) == pytest.approx(factor, abs=1e-12)


# ---------------------------------------------------------------------------------------------------- the training loop


class OneWeight(nn.Module):
    """A student of one weight w: losses 2w and w^2, one feature w * (mean of its images), one logit w."""

    def __init__(self):
        super().__init__()
        self.w, self.seen, self.draws, self.autocast = nn.Parameter(torch.tensor(1.0)), [], [], []

    def forward(self, images, targets):
        assert self.training
        self.seen.append(images)
        self.draws.append(torch.rand(()).item())
        self.autocast.append(torch.is_autocast_enabled('cpu'))
        logit = self.w.view(1, 1, 1, 1)
        return {'loss_a': 2 * self.w, 'loss_b': self.w ** 2}, [logit * images[0].float().mean()], [logit]


class OneLook(nn.Module):
    """A teacher that nobody has frozen: feature 3, logit 0, so that p = q = 1/2."""

    def __init__(self):
        super().__init__()
        self.v, self.seen, self.autocast = nn.Parameter(torch.ones(1, 1, 1, 1)), [], []

    def look(self, images):
        self.seen.append(images)
        self.autocast.append(torch.is_autocast_enabled('cpu'))
        return [3 * self.v], [0 * self.v]


class Recording(det.Progress):
    """Keeps each step's terms, and the gradient norm of the last update."""

    def __init__(self, args):
        super().__init__(args, 99, 'round')
        self.steps_seen = []

    def add(self, optimizer, **terms):
        super().add(optimizer, **terms)
        self.steps_seen.append({name: value.item() for name, value in terms.items()})


class Iterations(list):
    """A scheduler that notes what it was asked."""

    def step(self, iteration):
        self.append(iteration)


def steps_of(*means):
    """A loader of one image per step, filled with a number, and no objects."""
    return [([torch.full((3, 2, 2), mean, dtype=torch.uint8)], [target_for(2, 2)]) for mean in means]


def run_loop(means, epoch=0, teacher=True, student=None, lr=0.01, argv=(), **options):
    args = det_args('--fpn_weight', '0.5', '--head_weight', '0.25', '--distill_warmup', '10', '--eval_every', '3',
                    '--batch_size', '1', *argv, **options)
    student, teacher = student or OneWeight().eval(), OneLook() if teacher else None
    progress, iterations = Recording(args), Iterations()
    stats = det.train_one_epoch(student, teacher, steps_of(*means), torch.optim.SGD(student.parameters(), lr=lr),
                                iterations, NO_SCALER, progress, CPU, epoch, args)
    return student, teacher, progress, iterations, stats


def loss_and_slope(w, mean, ramp):
    """Of OneWeight against OneLook, by hand: d/dw of (3 - w m)^2 and of BCE(sigma(w), 1/2) = log(1 + e^w) - w/2."""
    terms = {'loss_a': 2 * w, 'loss_b': w ** 2, 'loss_fpn': (3 - w * mean) ** 2,
             'loss_head': math.log(1 + math.exp(w)) - w / 2}
    loss = terms['loss_a'] + terms['loss_b'] + ramp * (0.5 * terms['loss_fpn'] + 0.25 * terms['loss_head'])
    slope = 2 + 2 * w + ramp * (0.5 * -2 * mean * (3 - w * mean) + 0.25 * (sigmoid(w) - 0.5))
    return {'loss': loss, **terms}, slope


@pytest.mark.parametrize('accum_iter', [1, 2])
def test_loss_and_updates_by_hand(accum_iter):
    """Supplement: L = L_GT + ramp (alpha L_FPN + beta L_head), where the ramp counts updates, also over rounds."""
    means = [1, 2, 3, 4, 2, 1][:3 * accum_iter]
    student, teacher, progress, iterations, stats = run_loop(means, epoch=2, accum_iter=accum_iter)
    assert iterations == [6, 7, 8]  # the third round of 3
    w, slope = 1.0, 0.0
    for step, (mean, seen) in enumerate(zip(means, progress.steps_seen, strict=True)):
        terms, part = loss_and_slope(w, mean, (6 + step // accum_iter) / 10)
        assert list(seen) == list(terms)
        assert seen == pytest.approx(terms, rel=1e-5)
        slope += part / accum_iter
        if step % accum_iter == accum_iter - 1:
            w, last, slope = w - 0.01 * slope, slope, 0.0
    assert student.w.item() == pytest.approx(w, rel=1e-5)
    assert progress.grad_norm.item() == pytest.approx(abs(last), rel=1e-5)
    assert student.w.grad is None
    for name in progress.steps_seen[0]:
        mean = sum(row[name] for row in progress.steps_seen) / len(means)
        assert stats[f'train_{name}'] == pytest.approx(mean, rel=1e-6)
    assert teacher.v.grad is None
    assert not student.draws[0] == student.draws[1]


def test_without_a_teacher_labels_alone_teach():
    """Table 3, "w/o S.D": the loss is the sum of the detector's own, and nothing else is logged."""
    student, _, progress, _, _ = run_loop([5, 6], teacher=False)
    w = 1.0
    for seen in progress.steps_seen:
        assert seen == pytest.approx({'loss': 2 * w + w * w, 'loss_a': 2 * w, 'loss_b': w * w}, rel=1e-6)
        w -= 0.01 * (2 + 2 * w)
    assert student.w.item() == pytest.approx(w, rel=1e-6)


def test_teacher_looks_at_the_student_s_images():
    """Detection: both see the same images, under the same autocast."""
    student, teacher, *_ = run_loop([1, 2, 3], amp='bf16')
    assert all(torch.equal(ours[0], theirs[0]) for ours, theirs in zip(student.seen, teacher.seen, strict=True))
    assert student.autocast == teacher.autocast == [True] * 3
    student, teacher, *_ = run_loop([1])
    assert student.autocast == teacher.autocast == [False]


def test_gradient_is_clipped_to_the_given_norm():
    """README: --clip_grad is the largest gradient norm; the log shows the norm before."""
    student, _, progress, _, _ = run_loop([1], argv=['--clip_grad', '0.5'])
    assert student.w.item() == pytest.approx(1 - 0.01 * 0.5, rel=1e-5)
    assert progress.grad_norm.item() == pytest.approx(loss_and_slope(1.0, 1, 0.0)[1], rel=1e-5)


def test_noise_of_a_step_depends_on_seed_round_and_step_alone():
    """Randomness: what a step draws is a function of (seed, epoch, step, rank), whatever was drawn before."""
    torch.manual_seed(1)
    first = run_loop([1, 2, 3], epoch=1)[0].draws
    torch.manual_seed(2)
    assert run_loop([4, 4, 4], epoch=1)[0].draws == first
    assert len({*first, *run_loop([1, 2, 3], epoch=2)[0].draws, *run_loop([1, 2, 3], epoch=1, rank=1)[0].draws,
                *run_loop([1, 2, 3], epoch=1, seed=1)[0].draws}) == 12


def kept_outputs(module):
    """A list that fills with what the module returns."""
    kept = []
    module.register_forward_hook(lambda module, inputs, output: kept.append(output))
    return kept


def test_distillation_of_a_real_step_is_the_supplement_s():
    """Supplement: all five levels, phi on the student's features and not on the teacher's, logits of both RPN heads."""
    teacher = filled(tiny_detector(1), 1, 0.2).eval().requires_grad_(False)
    student = det.Student(filled(tiny_detector(2), 2, 0.2), tiny_adapters())
    seen = [kept_outputs(part) for model in (student.detector, teacher) for part in (model.backbone, model.rpn.head)]
    args = det_args('--distill_warmup', '4', '--eval_every', '1')
    progress = Recording(args)
    det.train_one_epoch(student, teacher, [objects()], torch.optim.SGD(student.parameters(), lr=0.0), Iterations(),
                        NO_SCALER, progress, CPU, 3, args)
    (features,), (logits,), (targets,), (teacher_logits,) = ([part] for [part] in seen)
    assert [tuple(level.shape) for level in features.values()] == [(2, 16, side, side) for side in (32, 16, 8, 4, 2)]
    assert all(level.sigmoid().std() > 0.05 for level in teacher_logits[0])  # p is not the same everywhere
    with torch.no_grad():
        adapted = [F.conv2d(feature.double(), phi.weight.double(), phi.bias.double(), padding=1)
                   for feature, phi in zip(features.values(), student.adapters)]
    loss_fpn, loss_head = plain_frs_loss(adapted, list(targets.values()), logits[0], teacher_logits[0])
    [terms] = progress.steps_seen
    assert terms['loss_fpn'] == pytest.approx(loss_fpn, rel=1e-4)
    assert terms['loss_head'] == pytest.approx(loss_head, rel=1e-4)
    labels = ('loss_objectness', 'loss_rpn_box_reg', 'loss_classifier', 'loss_box_reg', 'loss_mask')
    assert list(terms) == ['loss', *sorted(labels, key=list(terms).index), 'loss_fpn', 'loss_head']
    assert terms['loss'] == pytest.approx(
        sum(terms[name] for name in labels) + 0.75 * (0.001 * loss_fpn + 0.1 * loss_head), rel=1e-5)


# --------------------------------------------------------------------------------------------------------- the backbone


def reached_from_the_corner(block, side):
    """(side, side) bool: the tokens on which the block's output at (0, 0) depends."""
    tokens = randn(1, side, side, 32).requires_grad_()
    block(tokens)[0, 0, 0].square().sum().backward()
    return tokens.grad[0].abs().amax(dim=-1) > 0


@pytest.mark.parametrize('depth, expected', [
    (12, [2, 5, 8, 11]), (24, [5, 11, 17, 23]), (32, [7, 15, 23, 31]),
    (2, [0, 1]), (4, [0, 1, 2, 3]), (6, [0, 2, 3, 5])])
def test_four_blocks_attend_globally_where_vitdet_has_them(monkeypatch, depth, expected):
    """Detection: window attention 14, global blocks 2, 5, 8, 11: the last of each quarter, at any depth."""
    monkeypatch.setitem(models.SIZES, 'thin', models.Size(32, depth, 2, 32, 2))
    net = filled(build(det.PlainBackbone, 'vit_thin_patch16', 256)).eval()
    window = torch.zeros(16, 16, dtype=torch.bool)
    window[:14, :14] = True
    reached = [reached_from_the_corner(block, 16) for block in net.blocks]
    assert all(torch.equal(part, window) or part.all() for part in reached)
    assert [i for i, part in enumerate(reached) if part.all()] == expected


@pytest.mark.parametrize('window', [7, 3])
def test_features_are_a_plain_vits(deep, window):
    """Detection: one window over all and relative positions at zero: timm's plain ViT, no class token, no final norm."""
    net = filled(build(det.PlainBackbone, deep + '32', 224, window)).double().eval()
    with torch.no_grad():
        for block in net.blocks:
            block.attn.rel_pos_h.zero_()
            block.attn.rel_pos_w.zero_()
    plain = VisionTransformer(img_size=224, patch_size=32, embed_dim=32, depth=12, num_heads=2, num_classes=0,
                              class_token=False, global_pool='', norm_layer=partial(nn.LayerNorm, eps=1e-6))
    plain.norm = nn.Identity()
    state = {name: value for name, value in net.state_dict().items() if 'rel_pos' not in name}
    state['pos_embed'] = state['pos_embed'].flatten(1, 2)
    plain.double().eval().load_state_dict(state, strict=True)
    images = randn(2, 3, 224, 224).double()
    with torch.no_grad():
        features, expected = net(images), plain.forward_features(images).transpose(1, 2).unflatten(2, (7, 7))
    assert features.shape == (2, 32, 7, 7)
    if window == 7:
        torch.testing.assert_close(features, expected, atol=1e-11, rtol=0)
    else:
        assert (features - expected).abs().max() > 1e-3


@pytest.mark.parametrize('grid, table', [
    ((5, 5), (5, 5)), ((3, 6), (3, 6)), ((7, 2), (7, 2)), ((4, 7), (6, 5)), ((9, 2), (4, 4)), ((2, 3), (5, 2))])
def test_folded_attention_is_timms(grid, table):
    """Detection: decomposed relative positions, also from tables of another size; outputs and gradients are timm's."""
    ours, theirs = (filled(kind(32, 2, use_rel_pos=True, input_size=table).double(), 1, 0.3)
                    for kind in (det.FoldedAttention, Attention))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    results = []
    for attention in (ours, theirs):
        tokens = randn(3, *grid, 32, seed=4).double().requires_grad_()
        output = attention(tokens)
        output.backward(randn(3, *grid, 32, seed=5).double())
        results.append([output.detach(), tokens.grad, *(parameter.grad for parameter in attention.parameters())])
    for got, expected in zip(*results, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize('height, width', [(64, 64), (48, 80), (72, 40), (8, 24)])
def test_backbone_is_timms_at_any_size(deep, height, width):
    """Detection: timm's VisionTransformerSAM; no square and no multiple of the window: windows are padded inside."""
    net = filled(build(det.PlainBackbone, deep + '8', 64, 3)).double().eval()
    oracle = VisionTransformerSAM(
        img_size=64, patch_size=8, embed_dim=32, depth=12, num_heads=2, num_classes=0, neck_chans=0, global_pool='',
        use_abs_pos=True, use_rel_pos=True, window_size=3, global_attn_indexes=(2, 5, 8, 11),
        norm_layer=partial(nn.LayerNorm, eps=1e-6))
    oracle.neck, oracle.pos_embed = nn.Identity(), nn.Parameter(torch.zeros(1, 28, 28, 32))
    oracle.double().eval().load_state_dict(net.state_dict(), strict=True)
    images = randn(2, 3, height, width).double()
    with torch.no_grad():
        for model in (net, oracle):
            model.pos_embed.zero_()  # how it is resized is tested by itself
        features = net(images)
        assert features.shape == (2, 32, height // 8, width // 8)
        torch.testing.assert_close(features, oracle(images), atol=1e-11, rtol=0)


def test_backbone_holds_no_class_token_no_final_norm_and_one_epsilon(deep):
    """Detection: without class token and final norm; LayerNorm eps 1e-6 everywhere, in pyramid and heads too."""
    net = build(det.PlainBackbone, deep + '16', 64)
    assert {name.split('.')[0] for name in net.state_dict()} == {'pos_embed', 'patch_embed', 'blocks'}
    detector = tiny_detector()
    norms = [module for part in (net, detector) for module in part.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 24 + 4 + (4 * 2 + 1) + 4 + 4  # blocks of both; pyramid; box head; mask head
    assert {norm.eps for norm in norms} == {1e-6}


def test_backbone_starts_from_vitdets_values():
    """Detection: linear layers truncated normal 0.02, zero biases, relative positions zero, positions normal 0.02."""
    net = build(det.PlainBackbone, 'vit_micro_patch16', 64)
    linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
    assert len(linear) == 6 * 4
    for module in linear:
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert abs(module.weight.mean().item()) < 1e-3
        assert module.bias.abs().max() == 0
        # a normal one: 68.3 % within one deviation (a uniform one has 57.7 %)
        assert (module.weight.abs() < 0.02).float().mean().item() == pytest.approx(0.683, abs=0.01)
    for block in net.blocks:
        assert block.attn.rel_pos_h.abs().max() == block.attn.rel_pos_w.abs().max() == 0
    assert net.pos_embed.std().item() == pytest.approx(0.02, rel=0.03)


@pytest.mark.parametrize('patch, side', [(16, 14), (8, 28), (32, 7), (14, 16)])
def test_position_table_is_that_of_224_pixels(patch, side):
    """Detection: the table stays the pretrained one, whatever the input size, and carries no class row."""
    with torch.device('meta'):
        net = det.PlainBackbone(f'vit_pico_patch{patch}', 8 * patch)
    assert net.pos_embed.shape == (1, side, side, 32)
    assert net.pos_embed.requires_grad


def positions_alone(height, width):
    """(what a backbone without blocks adds to the patches of random images, its table (1, D, 14, 14), the backbone)."""
    net = filled(build(det.PlainBackbone, 'vit_pico_patch16', 64)).eval()
    net.blocks = nn.Sequential()
    images = randn(1, 3, height, width)
    patches = F.conv2d(images, net.patch_embed.proj.weight, net.patch_embed.proj.bias, stride=16)
    return net(images) - patches, net.pos_embed.detach().permute(0, 3, 1, 2), net


@pytest.mark.parametrize('height, width', [(224, 224), (256, 240), (512, 288)])
def test_positions_are_resized_in_the_forward_pass_with_gradient(height, width):
    """Detection: absolute positions are resized from 224 in each forward, and all of the table is trained."""
    added, table, net = positions_alone(height, width)
    assert added.shape == (1, 32, height // 16, width // 16)
    if (height, width) == (224, 224):
        torch.testing.assert_close(added, table, atol=1e-5, rtol=0)
    # where its pixel centres are, a resized table is near its bilinear neighbour: the axes are not swapped
    near = F.interpolate(table, size=(height // 16, width // 16), mode='bilinear', antialias=True)
    assert F.cosine_similarity(added.flatten(1), near.flatten(1)).item() > 0.9
    added.square().sum().backward()
    assert (net.pos_embed.grad.abs() > 0).all()


@pytest.mark.parametrize('height, width', [(1024, 1024), (512, 288)])
def test_positions_are_resized_as_detectron2_does_it(height, width):
    """ViTDet, positions: so does ViTDet; antialiasing is another cubic kernel."""
    added, table, _ = positions_alone(height, width)
    expected = F.interpolate(table, size=(height // 16, width // 16), mode='bicubic', align_corners=False)
    torch.testing.assert_close(added, expected, atol=1e-5, rtol=0)


def test_drop_path_grows_linearly_to_the_given_rate(deep):
    """Supplement: drop path 0.1: stochastic depth that is zero in the first block and the given rate in the last."""
    net = build(det.PlainBackbone, deep + '16', 64, 14, 0.1)
    for branch in ('drop_path1', 'drop_path2'):
        rates = [getattr(getattr(block, branch), 'drop_prob', 0.0) for block in net.blocks]
        assert rates == pytest.approx([0.1 * i / 11 for i in range(12)], abs=1e-7)
    detector = build(det.Detector, 'vit_pico_patch8', 3, det_args('--drop_path', '0.3'))
    assert detector.backbone.net.blocks[1].drop_path1.drop_prob == pytest.approx(0.3)


@pytest.mark.parametrize('index', [10, 11])
def test_drop_path_drops_images_and_not_windows(deep, index):
    """Supplement: drop path 0.1, as in ViTDet: of an image the whole branch is left out, also in a block of windows."""
    block = filled(build(det.PlainBackbone, deep + '8', 64, 4, 0.5)).train().blocks[index]
    nn.init.zeros_(block.mlp.fc2.weight)
    nn.init.zeros_(block.mlp.fc2.bias)
    tokens = randn(32, 8, 8, 32)
    with torch.no_grad():
        added = block(tokens) - tokens  # the attention branch alone
        whole = block.eval()(tokens) - tokens
    dropped = (added == 0).all(dim=-1).flatten(1)  # (image, token)
    assert 4 < dropped.all(dim=1).sum() < 28
    assert torch.equal(dropped.any(dim=1), dropped.all(dim=1))
    kept = ~dropped.all(dim=1)
    torch.testing.assert_close(added[kept], whole[kept] / (1 - 0.5 * index / 11), atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_changes_no_bit():
    """README: --grad_checkpointing computes the blocks twice; with drop path too, gradients are the same."""
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
    eval_output = net.eval()(randn(4, 3, 32, 32))
    assert not torch.equal(eval_output, results[0][0])  # drop path was at work


def test_name_of_an_autoencoder_is_refused():
    """README: the backbone is named vit_..."""
    with pytest.raises(models.InputError, match='autoencoder'):
        det.PlainBackbone('mae_vit_pico_patch8', 64)


# -------------------------------------------------------------------------------------- parameters of the whole network


def block_parameters(name, dim, heads, reach):
    """One pre-norm block with relative positions over `reach` x `reach` tokens."""
    head = dim // heads
    return {f'{name}.norm1.weight': (dim,), f'{name}.norm1.bias': (dim,),
            f'{name}.attn.qkv.weight': (3 * dim, dim), f'{name}.attn.qkv.bias': (3 * dim,),
            f'{name}.attn.proj.weight': (dim, dim), f'{name}.attn.proj.bias': (dim,),
            f'{name}.attn.rel_pos_h': (2 * reach - 1, head), f'{name}.attn.rel_pos_w': (2 * reach - 1, head),
            f'{name}.norm2.weight': (dim,), f'{name}.norm2.bias': (dim,),
            f'{name}.mlp.fc1.weight': (4 * dim, dim), f'{name}.mlp.fc1.bias': (4 * dim,),
            f'{name}.mlp.fc2.weight': (dim, 4 * dim), f'{name}.mlp.fc2.bias': (dim,)}


def with_bias(name, *shape, out=0):
    return {f'{name}.weight': shape, f'{name}.bias': (shape[out],)}


def vitdet_parameters(dim, depth, heads, patch=16, size=1024, classes=80, window=14, width=256, fc=1024, anchors=3):
    """ViTDet's Mask R-CNN as detectron2 configures it: name -> shape. torchvision's heads count the background too."""
    net, found = 'backbone.net', {}
    found[f'{net}.pos_embed'] = (1, 224 // patch, 224 // patch, dim)
    found.update(with_bias(f'{net}.patch_embed.proj', dim, 3, patch, patch))
    for i in range(depth):
        is_global = (i + 1) % (depth // 4) == 0
        found.update(block_parameters(f'{net}.blocks.{i}', dim, heads, size // patch if is_global else window))
    half, quarter = dim // 2, dim // 4
    pyramid = 'backbone.levels'
    # strides 4 and 8 by transposed convolutions, in -> out, with biases; norms between them
    found.update(with_bias(f'{pyramid}.0.0', dim, half, 2, 2, out=1))
    found.update(with_bias(f'{pyramid}.0.1', half))
    found.update(with_bias(f'{pyramid}.0.3', half, quarter, 2, 2, out=1))
    found.update(with_bias(f'{pyramid}.1.0', dim, half, 2, 2, out=1))
    for level, first, channels in ((0, 4, quarter), (1, 1, half), (2, 0, dim), (3, 1, dim)):
        found[f'{pyramid}.{level}.{first}.weight'] = (width, channels, 1, 1)
        found.update(with_bias(f'{pyramid}.{level}.{first + 1}', width))
        found[f'{pyramid}.{level}.{first + 2}.weight'] = (width, width, 3, 3)
        found.update(with_bias(f'{pyramid}.{level}.{first + 3}', width))
    for i in range(2):
        found.update(with_bias(f'rpn.head.conv.{i}.0', width, width, 3, 3))
    found.update(with_bias('rpn.head.cls_logits', anchors, width, 1, 1))
    found.update(with_bias('rpn.head.bbox_pred', 4 * anchors, width, 1, 1))
    for head in ('box_head', 'mask_head'):
        for i in range(4):
            found[f'roi_heads.{head}.{i}.0.weight'] = (width, width, 3, 3)
            found.update(with_bias(f'roi_heads.{head}.{i}.1', width))
    found.update(with_bias('roi_heads.box_head.5', fc, 7 * 7 * width))
    found.update(with_bias('roi_heads.box_predictor.cls_score', classes + 1, fc))
    found.update(with_bias('roi_heads.box_predictor.bbox_pred', 4 * (classes + 1), fc))
    found.update(with_bias('roi_heads.mask_predictor.conv5_mask', width, width, 2, 2, out=1))
    found.update(with_bias('roi_heads.mask_predictor.mask_fcn_logits', classes + 1, width, 1, 1))
    return found


def paper_detector(name):
    """The detector at its full size, without memory."""
    args = det.get_args_parser().parse_args([])
    with torch.device('meta'):
        return det.Detector(name, 80, args)


@pytest.mark.parametrize('name, dim, heads, millions', [
    ('vit_small_patch16', 384, 6, None), ('vit_base_patch16', 768, 12, 111)])
def test_detector_has_vitdets_parameters(name, dim, heads, millions):
    """Table 3: ViTDet's Mask R-CNN, name by name; the B one has the 111 M that ViTDet reports."""
    expected = vitdet_parameters(dim, 12, heads)
    found = {name: tuple(parameter.shape) for name, parameter in paper_detector(name).named_parameters()}
    assert found == expected
    if millions:
        assert round(sum(map(math.prod, found.values())) / 1e6) == millions


def test_checkpoint_of_a_detector_holds_parameters_alone():
    """Names: `model` in the checkpoint is what is trained, and nothing else."""
    detector = tiny_detector()
    assert list(detector.state_dict()) == [name for name, _ in detector.named_parameters()]


def test_heads_start_from_detectron2s_values():
    """ViTDet's heads: class scores normal 0.01, boxes and masks 0.001, RPN 0.01, zero biases."""
    detector = build(det.Detector, 'vit_pico_patch8', 40, det_args('--head_dim', '256', '--fpn_dim', '64'))
    heads, rpn = detector.roi_heads, detector.rpn.head
    for layer, std in ((heads.box_predictor.cls_score, 0.01), (heads.box_predictor.bbox_pred, 0.001),
                       (heads.mask_predictor.mask_fcn_logits, 0.001), (rpn.conv[0][0], 0.01), (rpn.bbox_pred, 0.01)):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.07)
        assert layer.bias.abs().max() == 0


def test_hidden_layers_of_the_heads_start_from_detectron2s_values():
    """ViTDet's heads: convolutions and deconvolution normal sqrt(2 / fan out); box head's linear 1 / sqrt(fan in)."""
    heads = build(det.Detector, 'vit_pico_patch8', 40, det_args('--head_dim', '256', '--fpn_dim', '64')).roi_heads
    for head in (heads.box_head, heads.mask_head):
        for i in range(4):
            assert head[i][0].weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.03)
    deconv, linear = heads.mask_predictor.conv5_mask, heads.box_head[5]
    assert deconv.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 4)), rel=0.05)
    assert linear.weight.std().item() == pytest.approx(1 / math.sqrt(64 * 49), rel=0.03)
    assert deconv.bias.abs().max() == linear.bias.abs().max() == 0


# ---------------------------------------------------------------------------------------------------------- the pyramid


def test_pyramid_levels_are_made_from_the_last_map_alone():
    """Detection: x4, x2, x1, x1/2 and a fifth level by subsampling: each written out with torch's own functions."""
    pyramid = tiny_detector().backbone
    filled(pyramid, 3, 0.1).eval()
    images = randn(2, 3, 64, 64)

    def norm(x, name):
        state = pyramid.state_dict()
        x = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], state[f'{name}.weight'], state[f'{name}.bias'], 1e-6)
        return x.permute(0, 3, 1, 2)

    def double(x, name):
        state = pyramid.state_dict()
        return F.conv_transpose2d(x, state[f'{name}.weight'], state[f'{name}.bias'], stride=2)

    def smooth(x, level, first):
        state, name = pyramid.state_dict(), f'levels.{level}'
        x = norm(F.conv2d(x, state[f'{name}.{first}.weight']), f'{name}.{first + 1}')
        return norm(F.conv2d(x, state[f'{name}.{first + 2}.weight'], padding=1), f'{name}.{first + 3}')

    with torch.no_grad():
        got, x = pyramid(images), pyramid.net(images)
        fine = double(F.gelu(norm(double(x, 'levels.0.0'), 'levels.0.1')), 'levels.0.3')
        half = torch.stack([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]).amax(dim=0)
        expected = [smooth(fine, 0, 4), smooth(double(x, 'levels.1.0'), 1, 1), smooth(x, 2, 0), smooth(half, 3, 1)]
        expected.append(expected[3][:, :, ::2, ::2])
    assert list(got) == ['0', '1', '2', '3', '4']
    for ours, theirs, side in zip(got.values(), expected, (32, 16, 8, 4, 2), strict=True):
        assert ours.shape == (2, 16, side, side)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------- RoI pooling


def pyramid_of(size, function, images=1, strides=(4, 8, 16, 32)):
    """Feature maps by name; function(level, stride, side) -> (images, C, side, side)."""
    return {str(k): function(k, stride, size // stride) for k, stride in enumerate([*strides, 2 * strides[-1]])}


def square(side, x=30.0, y=20.0):
    return [x, y, x + side, y + side]


@pytest.mark.parametrize('side, level', [
    (1, 0), (55.9, 0), (56, 0), (56.1, 0), (111.9, 0), (112, 1), (112.1, 1), (223.9, 1), (224, 2), (224.1, 2),
    (447.9, 2), (448, 3), (448.1, 3), (900, 3)])
def test_region_is_read_from_the_level_that_fits_its_size(side, level):
    """FPN, equation 1: floor(4 + log2(side / 224)) between levels 2 and 5, whose strides are 4 to 32."""
    pooler = det.AlignedRoIPooler(2, [4, 8, 16, 32], 224)
    features = pyramid_of(1024, lambda k, stride, n: torch.full((1, 1, n, n), float(k)))
    x0, y0, x1, y1 = square(side)
    boxes = torch.tensor([[x0, y0, x1, y1], [x0, y0, x0 + side / 2, y0 + side * 2]])  # the same area in another shape
    pooled = pooler(features, [boxes[:1] if side == 900 else boxes], [(1024, 1024)])
    torch.testing.assert_close(pooled, torch.full_like(pooled, level))


def test_level_follows_the_anchor_size():
    """README: --anchor_size also says which level a region is read from: 7 anchors are FPN's 224."""
    detector = tiny_detector()
    for pooler, side in ((detector.roi_heads.box_roi_pool, 7), (detector.roi_heads.mask_roi_pool, 14)):
        features = pyramid_of(64, lambda k, stride, n: torch.full((1, 1, n, n), float(k)), strides=(2, 4, 8, 16))
        boxes = torch.tensor([square(27.9, 1, 1), square(28, 1, 1), square(55.9, 1, 1), square(56, 1, 1)])
        pooled = pooler(features, [boxes], [(64, 64)])
        assert pooled.shape == (4, 1, side, side)
        torch.testing.assert_close(pooled, torch.tensor([0.0, 1, 1, 2]).view(4, 1, 1, 1).expand_as(pooled))


BOXES = [[101.0, 77.0, 133.5, 119.25], [64.0, 90.0, 204.0, 250.0], [50.5, 40.25, 400.0, 330.0],
         [10.0, 70.0, 480.0, 500.0]]


def test_pooled_ramp_gives_the_pixels_of_the_bins():
    """Detection: pixel-aligned: of a feature that holds its own coordinates in pixels, each bin gives its centre's."""
    def ramp(k, stride, side):
        centres = (torch.arange(side) + 0.5) * stride
        return torch.stack([centres.expand(side, side), centres[:, None].expand(side, side)])[None]

    pooled = det.AlignedRoIPooler(7, [4, 8, 16, 32], 224)(pyramid_of(512, ramp), [torch.tensor(BOXES)], [(512, 512)])
    for (x0, y0, x1, y1), region in zip(BOXES, pooled.tolist(), strict=True):
        for i in range(7):
            for j in range(7):
                assert region[0][i][j] == pytest.approx(x0 + (j + 0.5) * (x1 - x0) / 7, abs=1e-3)
                assert region[1][i][j] == pytest.approx(y0 + (i + 0.5) * (y1 - y0) / 7, abs=1e-3)


def test_pooling_is_torchvisions_aligned_roi_align_of_the_right_image():
    """Detection: roi_align(aligned=True), sampling ratio 0, on level and image of each region, in the order given."""
    def noise(k, stride, side):
        return randn(3, 5, side, side, seed=k)

    features = pyramid_of(512, noise)
    boxes = [torch.tensor([BOXES[2], BOXES[0]]), torch.zeros(0, 4), torch.tensor([BOXES[3], BOXES[1], BOXES[0]])]
    pooled = det.AlignedRoIPooler(7, [4, 8, 16, 32], 224)(features, boxes, [(100, 90), (30, 30), (512, 512)])
    expected = []
    for image, level in ((0, 2), (0, 0), (2, 3), (2, 1), (2, 0)):  # the box of that number belongs to that level
        feature, box = features[str(level)][image:image + 1], torch.tensor([BOXES[level]])
        expected.append(torchvision.ops.roi_align(feature, [box], 7, 1 / (4 * 2 ** level), 0, aligned=True))
    torch.testing.assert_close(pooled, torch.cat(expected), atol=1e-6, rtol=0)
    half = det.AlignedRoIPooler(7, [4, 8, 16, 32], 224)(
        {name: level.bfloat16() for name, level in features.items()}, boxes, None)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, pooled, atol=0.02, rtol=0)


def test_no_regions_give_no_features_and_a_zero_gradient():
    """README: images without a region are no special case; DDP still needs a gradient from them."""
    pooler = det.AlignedRoIPooler(7, [4, 8, 16, 32], 224)
    features = pyramid_of(64, lambda k, stride, n: randn(2, 5, n, n, seed=k).requires_grad_())
    pooled = pooler(features, [torch.zeros(0, 4), torch.zeros(0, 4)], [(64, 64)] * 2)
    assert pooled.shape == (0, 5, 7, 7)
    pooled.sum().backward()
    assert all(features[str(k)].grad.abs().max() == 0 for k in range(4))


def confident(detector):
    """Weights large enough that evaluation finds something."""
    filled(detector, 9, 0.05)
    with torch.no_grad():
        detector.roi_heads.box_predictor.cls_score.bias[1:] += 3
    return detector


def test_small_images_first_change_nothing_later():
    """Detection: scales are given; torchvision would infer them from the first batch's unpadded sizes and keep them."""
    used = confident(tiny_detector()).eval()
    fresh = copy.deepcopy(used)
    with torch.no_grad():
        used(image_list((9, 17), (20, 12)))
        for got, expected in zip(used(image_list((64, 50), (33, 64))), fresh(image_list((64, 50), (33, 64)))):
            assert len(expected['boxes']) > 0
            for name in expected:
                assert torch.equal(got[name], expected[name]), name


# ------------------------------------------------------------------------------------------------ anchors and precision


def plain_anchors(grid, stride, size):
    """Three boxes of area size^2 and height/width 1/2, 1, 2, at the corner of each cell; rows, columns, ratios."""
    found = []
    for i in range(grid):
        for j in range(grid):
            for ratio in (0.5, 1, 2):
                height, width = size * math.sqrt(ratio), size / math.sqrt(ratio)
                x, y = j * stride, i * stride
                found.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    return torch.tensor(found)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_anchors_are_exact(dtype):
    """Detection: one size per level from --anchor_size, three shapes, not rounded, and float32 under autocast."""
    detector = tiny_detector()
    anchors = kept_outputs(detector.rpn.anchor_generator)
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        detector(*objects())
    expected = torch.cat([plain_anchors(grid, 64 // grid, 8 * 2 ** k) for k, grid in enumerate((32, 16, 8, 4, 2))])
    [[first, second]] = anchors
    assert first.dtype == torch.float32
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, atol=1e-4, rtol=0)


def test_anchors_of_the_paper_s_input():
    """Detection: 32 to 512 pixels at 1024, where half precision would be off by 4 pixels."""
    generator = paper_detector('vit_small_patch16').rpn.anchor_generator
    generator.cell_anchors = [generator.generate_anchors(*pair, device='cpu') for pair in zip(
        generator.sizes, generator.aspect_ratios)]
    images = torchvision.models.detection.image_list.ImageList(torch.zeros(1, 3, 1024, 1024), [(1000, 700)])
    features = [torch.zeros(1, 1, side, side, dtype=torch.bfloat16) for side in (256, 128, 64, 32, 16)]
    [anchors] = generator(images, features)
    assert len(anchors) == 3 * (256 ** 2 + 128 ** 2 + 64 ** 2 + 32 ** 2 + 16 ** 2)
    torch.testing.assert_close(anchors[-768:], plain_anchors(16, 64, 512), atol=1e-3, rtol=0)
    start = 3 * 256 ** 2
    torch.testing.assert_close(anchors[start:start + 3 * 128 ** 2], plain_anchors(128, 8, 64), atol=1e-3, rtol=0)


def test_strides_are_exact_for_every_patch_that_is_accepted():
    """Detection: anchors and pooling know each level's true stride: of patch 14, 14/4 pixels are 3.5; else refuse it."""
    args = det_args('--model', 'vit_pico_patch14', '--input_size', '112', '--data_path', 'nowhere')
    try:
        det.resolve_recipe(args)
        detector = det.Detector('vit_pico_patch14', len(CLASSES), args).eval()
    except models.InputError:
        return
    anchors = kept_outputs(detector.rpn.anchor_generator)
    features = kept_outputs(detector.backbone)
    detector(image_list((112, 112)))
    strides = [112 / level.shape[2] for level in features[0].values()]
    assert strides == [3.5, 7, 14, 28, 56]
    for pooler in (detector.roi_heads.box_roi_pool, detector.roi_heads.mask_roi_pool):
        assert list(pooler.strides) == strides[:4]
    expected = torch.cat([plain_anchors(round(112 / stride), stride, 8 * 2 ** k) for k, stride in enumerate(strides)])
    torch.testing.assert_close(anchors[0][0], expected, atol=1e-4, rtol=0)


def test_boxes_stay_float32_under_autocast():
    """Detection: outputs of RPN head and box predictor are float32, and so are proposals, losses and detections."""
    detector = confident(tiny_detector())
    seen = {name: kept_outputs(module) for name, module in (
        ('box head', detector.roi_heads.box_head), ('rpn', detector.rpn), ('rpn head', detector.rpn.head),
        ('predictor', detector.roi_heads.box_predictor), ('conv', detector.rpn.head.conv))}
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses, features, logits = detector(*objects())
        detections = detector.eval()(objects()[0])
        _, look = detector.look(objects()[0])
    assert seen['conv'][0].dtype == seen['box head'][0].dtype == torch.bfloat16  # autocast was at work
    for objectness, deltas in seen['rpn head']:
        assert {level.dtype for level in [*objectness, *deltas, *logits, *look]} == {torch.float32}
    assert {part.dtype for pair in seen['predictor'] for part in pair} == {torch.float32}
    assert {boxes.dtype for proposals, _ in seen['rpn'] for boxes in proposals} == {torch.float32}
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert {detection['boxes'].dtype for detection in detections} == {torch.float32}


def test_a_step_under_autocast_is_finite():
    """README: --amp bf16: detector, adapters, teacher and losses run, and every weight moves to a number."""
    teacher = tiny_detector(1).eval().requires_grad_(False)
    student = det.Student(tiny_detector(2), tiny_adapters())
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    args = det_args(amp='bf16')
    progress = Recording(args)
    det.train_one_epoch(student, teacher, [objects()], torch.optim.SGD(student.parameters(), lr=0.1), Iterations(),
                        NO_SCALER, progress, CPU, 1, args)
    assert all(math.isfinite(value) for value in progress.steps_seen[0].values())
    assert progress.steps_seen[0]['loss_fpn'] > 0 and progress.steps_seen[0]['loss_head'] > 0
    for name, parameter in student.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.isfinite().all(), name
        assert not torch.equal(parameter, before[name]), name


# -------------------------------------------------------------------------------------------- what the network is shown


@pytest.mark.parametrize('training', [True, False])
def test_network_sees_the_images_at_their_own_scale(training):
    """Detection: normalised, unscaled, top left in SxS, zeros elsewhere, in training and in test; boxes unmoved."""
    detector, seen, regions = tiny_detector().train(training), [], []
    detector.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    detector.rpn.register_forward_pre_hook(lambda module, inputs: regions.append(inputs))
    images, targets = objects()
    images.append(image_list((7, 64), seed=4)[0])
    targets.append(target_for(7, 64))
    before = copy.deepcopy((images, targets))
    detector(images, targets if training else None)
    assert seen[0].shape == (3, 3, 64, 64)
    for image, shown in zip(images, seen[0]):
        _, height, width = image.shape
        for channel, mean, std in zip(range(3), IMAGENET_MEAN, IMAGENET_STD):
            expected = torch.zeros(64, 64, dtype=torch.float64)
            expected[:height, :width] = (image[channel].double() / 255 - mean) / std
            torch.testing.assert_close(shown[channel].double(), expected, atol=1e-6, rtol=0)
        assert (shown[:, height:] == 0).all() and (shown[:, :, width:] == 0).all()
    assert [tuple(size) for size in regions[0][0].image_sizes] == [(64, 56), (40, 64), (7, 64)]
    if training:
        for target, original in zip(regions[0][2], before[1]):
            assert all(torch.equal(target[name], original[name]) for name in original)
    assert all(torch.equal(a, b) for a, b in zip(images, before[0]))


def test_small_batch_is_padded_to_the_full_input_too():
    """Detection: S x S in every step, also where every image of the batch is small: the positions stay those of S."""
    detector, seen = tiny_detector().eval(), []
    detector.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    detector(image_list((5, 9)))
    detector.look(image_list((5, 9), (16, 3)))
    assert [tuple(shape) for shape in seen] == [(1, 3, 64, 64), (2, 3, 64, 64)]


@pytest.mark.parametrize('training', [True, False])
def test_number_of_proposals(monkeypatch, training):
    """ViTDet: --proposals regions per image over all levels; before suppression as many a level, twice in training."""
    detector, counts, handed = filled(tiny_detector(), 3, 0.05).train(training), [], []
    nms = torchvision.ops.boxes.batched_nms

    def counting(boxes, scores, groups, threshold):
        counts.append(groups.bincount(minlength=5).tolist())
        assert threshold == 0.7
        return nms(boxes, scores, groups, threshold)

    def roi_inputs(module, inputs):
        handed.extend(len(part) for part in inputs[1])
        monkeypatch.undo()  # the heads have a suppression of their own

    monkeypatch.setattr(torchvision.models.detection.rpn.box_ops, 'batched_nms', counting)
    detector.roi_heads.register_forward_pre_hook(roi_inputs)
    images, targets = [image_list((64, 64), seed=k)[0] for k in range(2)], [target_for(64, 64, (4, 6, 30, 40))] * 2
    detector(images, targets if training else None)
    # the finest levels have anchors enough, the two coarsest 48 and 12; boxes outside the image are dropped
    assert len(counts) == 2
    for found in counts:
        most = [40, 40, 40, 40, 12] if training else [20, 20, 20, 20, 12]
        assert all(a <= b for a, b in zip(found, most))
        assert found[0] == most[0]
    assert len(handed) == 2 and max(handed) == 20


def test_regions_that_train_the_heads():
    """README: --roi_batch regions per image train the heads (ViTDet: 512, a quarter of them objects)."""
    detector = tiny_detector()
    seen = []
    detector.roi_heads.box_roi_pool.register_forward_pre_hook(lambda module, inputs: seen.extend(map(len, inputs[1])))
    detector(*objects())
    assert len(seen) == 2 and max(seen) <= 16
    args = det.get_args_parser().parse_args([])
    assert (args.roi_batch, args.proposals, args.anchor_size, args.window_size) == (512, 1000, 32, 14)
    assert detector.roi_heads.fg_bg_sampler.positive_fraction == 0.25


def test_detections_are_in_the_pixels_of_the_image():
    """Detector.forward: boxes inside the unpadded image, labels from 1, scores falling, masks as probabilities."""
    detector = confident(tiny_detector()).eval()
    images = image_list((64, 30), (17, 64))
    with torch.no_grad():
        detections = detector(images)
    assert len(detections) == 2
    for image, found in zip(images, detections):
        count = len(found['boxes'])
        assert 0 < count <= 100
        assert found['boxes'].shape == (count, 4) and found['boxes'].min() >= 0
        assert (found['boxes'][:, 2] <= image.shape[2]).all() and (found['boxes'][:, 3] <= image.shape[1]).all()
        assert found['labels'].min() >= 1 and found['labels'].max() <= len(CLASSES)
        assert found['scores'].min() > 0.05 and (found['scores'].diff() <= 0).all()
        assert found['masks'].shape == (count, 1, 28, 28)
        assert 0 < found['masks'].min() and found['masks'].max() < 1


def test_nothing_found_is_an_empty_answer():
    """README: an image on which nothing is found gives empty tensors, not an error."""
    detector = tiny_detector().eval()
    with torch.no_grad():
        detector.roi_heads.box_predictor.cls_score.bias[0] += 50
        [found] = detector(image_list((64, 64)))
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        'boxes': (0, 4), 'labels': (0,), 'scores': (0,), 'masks': (0, 1, 28, 28)}


# --------------------------------------------------------------------------------------------------------- optimisation


def expected_scale(name, depth=12, decay=0.7):
    if name.startswith(('detector.backbone.net.pos_embed', 'detector.backbone.net.patch_embed.')):
        return decay ** (depth + 1)
    if name.startswith('detector.backbone.net.blocks.'):
        return decay ** (depth - int(name.split('.')[4]))
    assert name.split('.')[:2] in (['detector', 'rpn'], ['detector', 'roi_heads']) \
        or name.startswith(('adapters.', 'detector.backbone.levels.'))
    return 1.0


def group_of(optimizer, model):
    """Parameter name -> its optimizer group; every parameter is in exactly one."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(parameter)], group) for group in optimizer.param_groups for parameter in group['params']]
    assert sorted(name for name, _ in found) == sorted(names.values())
    return dict(found)


def test_layer_decay_and_weight_decay_of_each_parameter():
    """Detection: 0.7^(12 - i) per block, 0.7^13 for the stem, 1 behind it; no decay on 1-D parameters and positions."""
    with torch.device('meta'):
        adapters = nn.ModuleList(nn.Conv2d(256, 256, 3) for _ in range(5))
    student = det.Student(paper_detector('vit_small_patch16'), adapters)
    groups = group_of(create_optimizer_v2(student, opt='adamw', lr=1e-4, weight_decay=0.05, layer_decay=0.7), student)
    for name, parameter in student.named_parameters():
        assert groups[name]['lr_scale'] == pytest.approx(expected_scale(name), rel=1e-9), name
        undecayed = parameter.ndim == 1 or name.endswith(('.pos_embed', '.rel_pos_h', '.rel_pos_w'))
        assert groups[name]['weight_decay'] == (0.0 if undecayed else 0.05), name
    assert groups['detector.backbone.net.patch_embed.proj.weight']['lr_scale'] == pytest.approx(0.00968890104)
    assert groups['detector.backbone.net.blocks.11.mlp.fc1.weight']['lr_scale'] == pytest.approx(0.7)
    assert sum(name.endswith(('rel_pos_h', 'rel_pos_w')) for name in groups) == 24


class FewImages(torch.utils.data.Dataset):
    """What CocoDataset gives in training: sampled as (pass, index)."""

    def __init__(self, images, targets):
        self.images, self.targets = images, targets

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        return self.images[key[1]], self.targets[key[1]]


class Stop(Exception):
    pass


def main_with(monkeypatch, folder, *argv):
    """Runs main on two images, without reading or evaluating data. Returns a dict that holds what it built."""
    caught = {}

    def build_data(args):
        caught['args'] = args
        data = FewImages(*objects())
        loader = torch.utils.data.DataLoader(data, sampler=models.RoundSampler(2, args), batch_size=args.batch_size,
                                             collate_fn=det.collate)
        return loader, None, None, CLASSES

    def create_optimizer(model, **options):
        caught.update(model=model, optimizer=create_optimizer_v2(model, **options))
        return caught['optimizer']

    monkeypatch.setattr(det, 'build_data', build_data)
    monkeypatch.setattr(det, 'create_optimizer_v2', create_optimizer)
    monkeypatch.setattr(det, 'evaluate', lambda *args: caught.setdefault('evaluated', []).append(args[0]) or {})
    args = [*TINY, '--data_path', 'nowhere', '--output_dir', str(folder / 'out'), *argv]
    caught['run'] = lambda: det.main(det.get_args_parser().parse_args(args))
    return caught


def rate(t, total, warmup, lr):
    """ViTDet's schedule as detectron2 counts it: t from 0; linear from 0.001 lr; 0.1 and 0.01 from the milestones."""
    if t < warmup:
        return lr * (0.001 + 0.999 * t / warmup)
    return lr * 0.1 ** ((t >= round(total * 8 / 9)) + (t >= round(total * 26 / 27)))


@pytest.mark.parametrize('total, warmup, eval_every, accum', [(27, 4, 27, 1), (40, 9, 15, 2), (20, 0, 7, 1)])
def test_learning_rate_of_every_iteration(monkeypatch, tmp_path, total, warmup, eval_every, accum):
    """Detection: warm-up from 0.001, lr x 0.1 at 8/9 and 26/27 of the iterations, times each layer's scale."""
    rates = []

    def forward(self, images, targets):
        return {'loss_x': 0 * sum(parameter.sum() for parameter in self.parameters())}, [], []

    def add(self, optimizer, **terms):
        original(self, optimizer, **terms)
        rates.append([group['lr'] / group['lr_scale'] for group in optimizer.param_groups])

    original = det.Progress.add
    monkeypatch.setattr(det.Detector, 'forward', forward)
    monkeypatch.setattr(det.Progress, 'add', add)
    caught = main_with(monkeypatch, tmp_path, '--iterations', str(total), '--warmup_iterations', str(warmup),
                       '--lr', '0.002', '--eval_every', str(eval_every), '--accum_iter', str(accum))
    caught['run']()
    assert len(rates) == total * accum
    for step, groups in enumerate(rates):
        assert groups == pytest.approx([rate(step // accum, total, warmup, 0.002)] * len(groups), rel=1e-6), step
    scales = {group['lr_scale'] for group in caught['optimizer'].param_groups}
    assert sorted(scales) == pytest.approx([0.7 ** k for k in (3, 2, 1, 0)])
    done = [json.loads(line)['iteration'] for line in (tmp_path / 'out' / 'log.txt').read_text().splitlines()]
    assert done == [min(total, k) for k in range(eval_every, total + eval_every, eval_every)]


def test_recipe_of_the_paper_is_what_main_builds(monkeypatch, tmp_path):
    """Table 3's recipe: AdamW, lr 1e-4, decay 0.05, 184,375 iterations, steps at 163,889 and 177,546, warm-up 250."""
    caught = main_with(monkeypatch, tmp_path, '--grad_checkpointing')

    def train_one_epoch(model, teacher, loader, optimizer, scheduler, *rest):
        caught['scheduler'] = scheduler
        raise Stop

    monkeypatch.setattr(det, 'train_one_epoch', train_one_epoch)
    with pytest.raises(Stop):
        caught['run']()
    args, optimizer = caught['args'], caught['optimizer']
    assert (args.iterations, args.distill_warmup, args.fpn_weight, args.head_weight) == (184375, 500, 0.001, 0.1)
    assert (args.drop_path, args.layer_decay, args.clip_grad, args.scale_jitter) == (0.1, 0.7, None, [0.1, 2.0])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {tuple(group['betas']) for group in optimizer.param_groups} == {(0.9, 0.999)}
    assert {group['weight_decay'] for group in optimizer.param_groups} == {0.0, 0.05}
    for t, factor in ((0, 0.001), (125, 0.5005), (249, 0.996004), (250, 1), (163888, 1), (163889, 0.1), (177545, 0.1),
                      (177546, 0.01), (184374, 0.01)):
        caught['scheduler'].step(t)
        for group in optimizer.param_groups:
            assert group['lr'] == pytest.approx(1e-4 * factor * group['lr_scale'], rel=1e-9)
    assert caught['model'].detector.backbone.net.grad_checkpointing
    assert not caught['model'].adapters


# ------------------------------------------------------------------------------------------- student, teacher, adapters


def saved_teacher(folder, seed=1):
    """A teacher's checkpoint on disk."""
    path = folder / 'teacher.pth'
    torch.save({'model': tiny_detector(seed).state_dict(), 'classes': CLASSES, 'args': {}}, path)
    return path


def test_adapters_are_the_student_s_and_stay_out_of_the_detector(monkeypatch, tmp_path):
    """Detection: phi exists in training only: `model` in the checkpoint is a plain detector, phi lies beside it."""
    caught = main_with(monkeypatch, tmp_path, '--teacher_path', str(saved_teacher(tmp_path)), '--iterations', '2',
                       '--warmup_iterations', '1', '--eval_every', '1')
    caught['run']()
    assert [type(model) for model in caught['evaluated']] == [det.Detector] * 2
    adapters = caught['model'].adapters
    assert [(phi.in_channels, phi.out_channels, phi.kernel_size, phi.padding) for phi in adapters] == [
        (16, 16, (3, 3), (1, 1))] * 5
    assert {name.split('.')[0] for name, _ in caught['model'].named_parameters()} == {'detector', 'adapters'}
    file = torch.load(tmp_path / 'out' / 'checkpoint.pth', weights_only=True)
    detector = tiny_detector(7)
    detector.load_state_dict(file['model'], strict=True)
    assert not any('adapt' in name for name in file['model'])
    assert all(torch.equal(file['adapters'][name], value) for name, value in adapters.state_dict().items())
    trained = dict(caught['model'].detector.named_parameters())
    assert all(torch.equal(value, trained[name]) for name, value in file['model'].items())


def test_evaluation_does_without_the_adapters():
    """Detection: phi exists in training only: a detector in eval mode never runs it."""
    def refuse(module, inputs):
        raise AssertionError('an adapter was called')

    student = det.Student(tiny_detector(), tiny_adapters())
    calls = [kept_outputs(phi) for phi in student.adapters]
    student(*objects())
    assert [len(part) for part in calls] == [1] * 5
    for phi in student.adapters:
        phi.register_forward_pre_hook(refuse)
    assert len(student.eval().detector(objects()[0])) == 2
    assert not any('adapt' in name for name in student.detector.state_dict())


def batch_of(kind):
    images, targets = objects()
    if kind == 'objects':
        return images, targets
    if kind == 'specks':  # jitter and a long shape can leave this
        return image_list((1, 1), (1, 3)), [target_for(1, 1), target_for(1, 3)]
    return images, [target_for(64, 56), targets[1] if kind == 'one' else target_for(40, 64)]


@pytest.mark.parametrize('kind', ['objects', 'one', 'none', 'specks'])
@pytest.mark.parametrize('with_teacher', [True, False])
def test_every_parameter_gets_a_gradient(kind, with_teacher):
    """README: under DDP every parameter needs a gradient in every step, also where a batch shows no object at all."""
    teacher = tiny_detector(1).eval().requires_grad_(False)
    student = det.Student(tiny_detector(2), tiny_adapters() if with_teacher else nn.ModuleList()).train()
    torch.manual_seed(0)
    images, targets = batch_of(kind)
    losses, features, logits = student(images, targets)
    assert len(features) == (5 if with_teacher else 0)
    loss = sum(losses.values())
    assert all(value.isfinite() for value in losses.values())
    if with_teacher:
        teacher_features, teacher_logits = teacher.look(images)
        loss = loss + sum(det.frs_loss(features, teacher_features, logits, teacher_logits))
    loss.backward()
    assert [name for name, parameter in student.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters())
    if kind == 'objects':
        assert [name for name, parameter in student.named_parameters() if not parameter.grad.abs().max() > 0] == []
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_teacher_stays_frozen_and_in_eval_mode_through_a_round(tmp_path):
    """Detection: the teacher runs in eval mode, without gradients, and does not change while the student trains."""
    path = saved_teacher(tmp_path)
    teacher = det.load_detector('vit_pico_patch8', path, CLASSES, det_args('--drop_path', '0.5'))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    saved = torch.load(path, weights_only=True)['model']
    assert all(torch.equal(value, saved[name]) for name, value in before.items())
    student = det.Student(tiny_detector(2).eval(), tiny_adapters())
    args = det_args()
    det.train_one_epoch(student, teacher, [objects(), objects()], torch.optim.SGD(student.parameters(), lr=0.01),
                        Iterations(), NO_SCALER, Recording(args), CPU, 5, args)
    assert all(module.training for module in student.modules())
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    features, logits = teacher.look(objects()[0])
    assert not any(level.requires_grad for level in features + logits)


def test_teacher_s_look_is_backbone_and_rpn_head_alone(monkeypatch):
    """Detection: of the teacher only backbone and RPN head run: neither proposals nor RoI heads."""
    teacher = filled(tiny_detector(), 3, 0.05).eval()
    features, heads = kept_outputs(teacher.backbone), kept_outputs(teacher.rpn.head)
    with torch.no_grad():
        teacher(objects()[0])

        def refuse(*args, **kwargs):
            raise AssertionError('the teacher ran more than it must')

        for module in (teacher.rpn, teacher.roi_heads, teacher.rpn.anchor_generator, teacher.roi_heads.box_head):
            monkeypatch.setattr(module, 'forward', refuse)
        looked, logits = teacher.look(objects()[0])
    assert len(looked) == len(logits) == 5
    for k in range(5):
        assert torch.equal(looked[k], features[0][str(k)])
        assert torch.equal(logits[k], heads[0][0][k])
        assert logits[k].shape == (2, 3, *looked[k].shape[2:])


def test_training_returns_levels_and_logits_that_carry_gradients():
    """Detector.forward: (losses, five pyramid levels, RPN logits of each); nothing of a step stays behind."""
    detector = tiny_detector()
    losses, features, logits = detector(*objects())
    assert [level.shape[2] for level in features] == [level.shape[2] for level in logits] == [32, 16, 8, 4, 2]
    assert {level.shape[1] for level in logits} == {3}
    assert all(part.requires_grad for part in [*losses.values(), *features, *logits])
    assert detector.rpn.head.logits is None


@pytest.mark.parametrize('change, word', [
    (lambda file: file.update(classes=['cat', 'dog', 'emu']), 'other classes'),
    (lambda file: file['model'].pop('rpn.head.cls_logits.weight'), 'no detector'),
    (lambda file: file['model'].pop('roi_heads.box_head.5.bias'), 'roi_heads.box_head.5.bias'),
    (lambda file: file['model'].update(extra=torch.zeros(1)), 'extra'),
    (lambda file: file['model'].update({'backbone.net.blocks.0.attn.rel_pos_h': torch.zeros(7, 16)}), 'rel_pos_h')])
def test_teacher_that_does_not_fit_is_refused(tmp_path, change, word):
    """README: a teacher is loaded strictly; what does not fit is one line."""
    file = {'model': tiny_detector().state_dict(), 'classes': CLASSES}
    change(file)
    torch.save(file, tmp_path / 'file.pth')
    message = refusal(det.load_detector, 'vit_pico_patch8', tmp_path / 'file.pth', CLASSES, det_args())
    assert word in message


# -------------------------------------------------------------------------------------------------------- start weights


def refusal(function, *args):
    """The message of the InputError that a call raises, which must be one line."""
    with pytest.raises(models.InputError) as info:
        function(*args)
    assert '\n' not in str(info.value)
    return str(info.value)


def noise_like(model, seed=0):
    """The model's state dict with every entry random: no two entries are the same."""
    entries = enumerate(model.state_dict().items())
    return {name: randn(*value.shape, seed=1000 * seed + k) for k, (name, value) in entries}


def plain_vit(size=224, kind=VisionTransformer, **options):
    """timm's own ViT of the size of vit_pico_patch16."""
    return noise_like(kind(img_size=size, patch_size=16, embed_dim=32, depth=2, num_heads=2, **options))


def headless(**options):
    return plain_vit(num_classes=0, **options)


def prefixed(prefix, state, seed=0):
    """Keys with a prefix; another seed gives other numbers, which must not be taken."""
    return {prefix + name: value if not seed else randn(*value.shape, seed=seed) for name, value in state.items()}


def mae_decoder(target_dim=None):
    """What an MAE, or with `target_dim` a G2SD student, has besides its encoder."""
    state = noise_like(models.create_mae('mae_vit_pico_patch16', 224, target_dim), 3)
    return {name: value for name, value in state.items() if name.startswith(('decoder', 'mask_token', 'feature_head'))}


def authors_student():
    heads = {name.replace('feature_head', 'decoderfeature_pred'): value for name, value in mae_decoder(48).items()}
    unused = {f'encoderfeature_pred.fc1.{part}': torch.ones(32) for part in ('weight', 'bias')}
    return {**heads, **unused, **{name: value for name, value in mae_decoder().items() if 'decoder_blocks' not in name}}


DINO_HEAD = {'head.mlp.0.weight': torch.ones(8, 32), 'head.last_layer.weight_g': torch.ones(8, 1)}
DISTILLED = plain_vit(kind=timm.models.deit.VisionTransformerDistilled, num_classes=5)
# name -> (encoder in the file, file, names that are left out besides class token and norm)
FILES = {
    'DeiT': lambda e: (e, {'model': {**e, 'head.weight': torch.ones(9, 32), 'head.bias': torch.ones(9)}}, ['head']),
    'DeiT distilled': lambda e: (DISTILLED, {'model': DISTILLED}, ['dist_token', 'head', 'head_dist']),
    'DINO, bare': lambda e: (e, e, []),
    'DINO, teacher': lambda e: (e, {
        'student': prefixed('module.backbone.', {**e, **DINO_HEAD}, 9), 'epoch': 300,
        'teacher': {**prefixed('backbone.', e), **DINO_HEAD}}, ['head']),
    'DINO, student': lambda e: (e, {
        'student': {**prefixed('module.backbone.', e), **prefixed('module.', DINO_HEAD)}, 'epoch': 300}, ['head']),
    'iBOT': lambda e: (e, {'state_dict': {**e, 'masked_embed': torch.ones(1, 32)}}, ['masked_embed']),
    'MAE, encoder': lambda e: (e, {'model': e}, []),
    'MAE, full': lambda e: (e, {'model': {**e, **mae_decoder()}}, [
        'decoder_blocks', 'decoder_embed', 'decoder_norm', 'decoder_pos_embed', 'decoder_pred', 'mask_token']),
    'timm': lambda e: (e, {**e, 'head.weight': torch.ones(9, 32), 'head.bias': torch.ones(9)}, ['head']),
    'G2SD': lambda e: (e, {'model': {**e, **mae_decoder(48)}, 'epoch': 299, 'args': {}}, [
        'decoder_blocks', 'decoder_embed', 'decoder_pos_embed', 'feature_head', 'mask_token']),
    "G2SD, the authors'": lambda e: (e, {'model': {**e, **authors_student()}}, [
        'decoder_blocks', 'decoder_embed', 'decoder_pos_embed', 'feature_head', 'mask_token']),
}


@pytest.mark.parametrize('layout', FILES)
def test_each_row_of_table_3_starts_the_backbone(tmp_path, capsys, layout):
    """Table 3: --finetune reads each row's file: weights arrive, positions lose the token rows, the rest is named."""
    encoder, file, extra = FILES[layout](headless())
    torch.save(file, tmp_path / 'file.pth')
    net = build(det.PlainBackbone, 'vit_pico_patch16', 64, 4)
    loaded = models.load_pretrained(net, tmp_path / 'file.pth')
    state, relative = net.state_dict(), [f'blocks.{i}.attn.rel_pos_{axis}' for i in (0, 1) for axis in 'hw']
    taken = [name for name in encoder if name.startswith(('blocks.', 'patch_embed.'))]
    assert len(taken) == 2 * 12 + 2
    for name in taken:
        assert torch.equal(state[name], encoder[name]), name
    tokens = 2 if layout == 'DeiT distilled' else 1
    assert encoder['pos_embed'].shape[1] == tokens + 196
    assert state['pos_embed'].shape == (1, 14, 14, 32)
    for row in range(14):
        for column in range(14):
            assert torch.equal(state['pos_embed'][0, row, column], encoder['pos_embed'][0, tokens + 14 * row + column])
    assert sorted(loaded.new) == relative
    assert all(state[name].abs().max() == 0 for name in relative)
    assert sorted(loaded.used) == sorted(['pos_embed', *taken])
    assert sorted({name.split('.')[0] for name in loaded.left_out}) == sorted(['cls_token', 'norm', *extra])
    line = capsys.readouterr().out
    assert 'new: rel_pos' in line and line.count('\n') == 1
    for name in ['cls_token', 'norm', *extra]:
        assert name in line.split('left out: ')[1].replace('\n', '').split(', ')


@pytest.mark.parametrize('size, side', [(64, 4), (320, 20)])
def test_positions_of_another_grid_are_resized(tmp_path, capsys, size, side):
    """README: positions of another input size are resized to the table of 224, bicubic, and that is said."""
    encoder = headless(size=size)
    torch.save(encoder, tmp_path / 'file.pth')
    net = build(det.PlainBackbone, 'vit_pico_patch16', 128, 4)
    models.load_pretrained(net, tmp_path / 'file.pth')
    table = encoder['pos_embed'][0, 1:].reshape(side, side, 32).permute(2, 0, 1)[None]
    table = F.interpolate(table, size=(14, 14), mode='bicubic', align_corners=False)[0].permute(1, 2, 0)
    torch.testing.assert_close(net.pos_embed[0].detach(), table, atol=1e-6, rtol=0)
    assert f'pos_embed {side}x{side} -> 14x14' in capsys.readouterr().out


@pytest.mark.parametrize('change, word', [
    (lambda e: e.update(extra=torch.zeros(3)), 'extra'),
    (lambda e: e.update({'blocks.2.norm1.weight': torch.zeros(32)}), 'blocks.2.norm1.weight'),
    (lambda e: e.update({'neck.weight': torch.zeros(32)}), 'neck.weight'),
    (lambda e: [e.pop(name) for name in list(e) if name.startswith('blocks.1.')], 'blocks.1.norm1.weight'),
    (lambda e: e.pop('blocks.0.attn.qkv.bias'), 'blocks.0.attn.qkv.bias'),
    (lambda e: e.pop('pos_embed'), 'pos_embed'),
    (lambda e: e.update({'patch_embed.proj.weight': torch.zeros(32, 3, 8, 8)}), 'proj.weight is (32, 3, 8, 8)'),
    (lambda e: e.update({name: torch.zeros(*(2 * n if n in (32, 96, 128) else n for n in value.shape))
                         for name, value in list(e.items())}), 'pos_embed is (1, 197, 64)')])
def test_start_weights_of_another_network_are_refused(tmp_path, change, word):
    """README: --finetune is strict: an unknown entry, a missing block or another width is one line."""
    encoder = headless()
    change(encoder)
    torch.save({'model': encoder}, tmp_path / 'file.pth')
    net = build(det.PlainBackbone, 'vit_pico_patch16', 64, 4)
    message = refusal(models.load_pretrained, net, tmp_path / 'file.pth')
    assert word in message
    assert str(tmp_path / 'file.pth') in message


def test_main_starts_the_backbone_from_finetune(monkeypatch, tmp_path):
    """README: --finetune gives the student's backbone its start weights, and those alone."""
    state = noise_like(models.create_vit('vit_pico_patch8', 0, 224))
    torch.save(state, tmp_path / 'mae.pth')
    caught = main_with(monkeypatch, tmp_path, '--finetune', str(tmp_path / 'mae.pth'))

    def train_one_epoch(*args):
        raise Stop

    monkeypatch.setattr(det, 'train_one_epoch', train_one_epoch)
    with pytest.raises(Stop):
        caught['run']()
    net = caught['model'].detector.backbone.net
    assert torch.equal(net.blocks[1].mlp.fc2.weight, state['blocks.1.mlp.fc2.weight'])
    assert torch.equal(net.pos_embed.flatten(1, 2), state['pos_embed'][:, 1:])


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_names_of_a_detector_checkpoint_are_kept(tmp_path, prefix):
    """README: a detector's file keeps `backbone.`; DINO's wrapper of that name is removed, DDP's `module.` always."""
    state = tiny_detector().state_dict()
    torch.save({'model': prefixed(prefix, state), 'classes': CLASSES}, tmp_path / 'file.pth')
    flat = models.load_checkpoint(tmp_path / 'file.pth')
    assert list(flat) == list(state)
    assert all(torch.equal(flat[name], value) for name, value in state.items())
    teacher = det.load_detector('vit_pico_patch8', tmp_path / 'file.pth', CLASSES, det_args())
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
    dino = models.flat_state_dict({'teacher': prefixed('backbone.', {'norm.weight': torch.ones(2)})}, 'file')
    assert list(dino) == ['norm.weight']
