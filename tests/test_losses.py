"""The losses against values worked out by hand, float64 loops and timm; updates; augmentation."""
import importlib
import math
import random
from argparse import Namespace

import generic_distill
import numpy as np
import pytest
import specific_distill_cls
import timm.data
import timm.loss
import torch
import torchvision
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.task import TokenDistillationTask

import models


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bytes_like(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def masking_for(n, length, ratio, seed=1):
    noise = torch.rand(n, length, generator=torch.Generator().manual_seed(seed))
    return models.random_masking(noise, ratio)


def filled(seed, build, *args, **options):
    """A network with random values everywhere: no bias is zero and no norm the identity by accident."""
    torch.manual_seed(seed)
    module = build(*args, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return module


def run_args(script, *argv, **values):
    """Flags as main() leaves them, of one process on a CPU."""
    args = script.get_args_parser().parse_args([*argv, '--print_freq', '1'])
    vars(args).update(rank=0, world_size=1, distributed=False, device='cpu', amp='off', **values)
    return args


# ---- plain formulas, one number after the other --------------------------------------------------


def smooth_l1(difference, beta=2.0):
    """Quadratic below beta, linear above, continuous at beta."""
    difference = abs(difference)
    return difference ** 2 / (2 * beta) if difference < beta else difference - beta / 2


def normalised(row, unbiased=False):
    """Numbers brought to mean 0 and variance 1, with an epsilon of 1e-6."""
    mean = sum(row) / len(row)
    variance = sum((x - mean) ** 2 for x in row) / (len(row) - unbiased)
    return [(x - mean) / math.sqrt(variance + 1e-6) for x in row]


def log_softmax(row):
    total = math.log(sum(math.exp(x) for x in row))
    return [x - total for x in row]


def mean_over(pairs, distance, prepare=list):
    """Mean of distance(p, t) over rows (prediction, target), the target prepared by row."""
    terms = []
    for pred, target in pairs:
        terms += [distance(p - t) for p, t in zip(pred.tolist(), prepare(target.tolist()), strict=True)]
    return sum(terms) / len(terms)


def plain_feature_loss(pred, target):
    rows = zip(pred.double().flatten(0, -2), target.double().flatten(0, -2))
    return mean_over(rows, smooth_l1, normalised)


def hidden_rows(mask, *parts):
    """The rows of (N, L, D) tensors at hidden patches, side by side."""
    for n, i in (mask == 1).nonzero().tolist():
        yield [part[n, i].double() for part in parts]


# ---- stage 1 -------------------------------------------------------------------------------------


def test_feature_loss_and_its_gradient_by_hand():
    """Smooth-L1 with beta 2 to the layer-normalised target, both of its branches."""
    # targets (1, 3) -> (-1, 1) and (10, -10) -> (1, -1); differences 1, 3, 0.5, 5
    pred = torch.tensor([[[0.0, 4.0], [1.5, -6.0]]], requires_grad=True)
    loss = generic_distill.feature_loss(pred, torch.tensor([[[1.0, 3.0], [10.0, -10.0]]]))
    assert loss.item() == pytest.approx((0.25 + 2 + 0.0625 + 4) / 4, abs=1e-6)
    loss.backward()  # difference / beta below it, the sign above
    assert pred.grad.flatten().tolist() == pytest.approx([1 / 8, 1 / 4, 0.25 / 4, -1 / 4], abs=1e-6)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_feature_loss_equals_a_float64_loop_under_autocast_too(dtype):
    pred, target = (3 * randn(2, 5, 8, seed=1)).to(dtype), (200 * randn(2, 5, 8, seed=2) + 4).to(dtype)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = generic_distill.feature_loss(pred, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain_feature_loss(pred, target), rel=1e-6)


@pytest.mark.parametrize('shape', [(2, 5, 4), (1, 5, 8), (5, 8)])
def test_feature_loss_refuses_to_broadcast(shape):
    with pytest.raises(ValueError, match='shape'):
        generic_distill.feature_loss(randn(2, 5, 8), randn(*shape))


def test_recon_and_pixel_loss_equal_float64_loops_over_the_hidden_patches():
    """No layer norm in the first; MAE's unbiased variance in the second."""
    pred, target = 3 * randn(2, 6, 12, seed=1), 2 * randn(2, 6, 12, seed=2) + 3
    mask = masking_for(2, 6, 0.5).mask
    rows = list(hidden_rows(mask, pred, target))
    assert len(rows) == 6
    expected = [mean_over(rows, smooth_l1), mean_over(rows, np.square),
                mean_over(rows, np.square, lambda row: normalised(row, unbiased=True))]
    pred[mask == 0] += 100  # what is said of visible patches does not count
    got = [generic_distill.recon_loss(pred, target, mask),
           generic_distill.pixel_loss(pred, target, mask, norm_pix_loss=False),
           generic_distill.pixel_loss(pred, target, mask)]
    assert [loss.item() for loss in got] == pytest.approx(expected, rel=1e-6)
    assert generic_distill.recon_loss(pred.bfloat16(), target.bfloat16(), mask).dtype == torch.float32


@pytest.mark.parametrize('supervise, tokens', [('all', 51), ('masked', 36)])
def test_the_feature_target_is_the_teachers_block_at_the_chosen_tokens(supervise, tokens):
    """all: class token, visible and hidden patches; masked: exactly the hidden patches."""
    teacher = filled(0, models.create_mae, 'mae_vit_pico_patch8', 32)
    student = filled(1, models.create_mae, 'mae_vit_pico_patch8', 32, 32)
    images, masking = randn(3, 3, 32, 32), masking_for(3, 16, 0.75)
    args = run_args(generic_distill, '--supervise', supervise, '--target_layer', '1')
    with torch.no_grad():
        losses = generic_distill.compute_losses(student, teacher, images, masking, args)
        pred = student.predict_features(images, masking)
        target = teacher.decoder_features(images, masking, 1)
    chosen = torch.ones(3, 17)
    if supervise == 'masked':
        chosen = torch.cat([torch.zeros(3, 1), masking.mask], dim=1)
    rows = list(hidden_rows(chosen, pred, target))
    assert len(rows) == tokens and list(losses) == ['loss_feature']
    expected = mean_over(rows, smooth_l1, normalised)
    assert losses['loss_feature'].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('target', ['recon', 'recon_gt', 'pixel'])
def test_other_targets_are_the_full_teachers_pixels_and_the_true_ones(target):
    """Table 4, rows 2 and 3, and MAE itself: each term with weight 1."""
    teacher = filled(0, models.create_mae, 'mae_vit_pico_patch8', 32)
    student = filled(1, models.create_mae, 'mae_vit_pico_patch8', 32, None if target == 'pixel' else 192)
    images, masking = randn(2, 3, 32, 32), masking_for(2, 16, 0.75)
    args = run_args(generic_distill, '--target', target)
    with torch.no_grad():
        losses = generic_distill.compute_losses(student, teacher, images, masking, args)
        pred = student(images, masking)[:, -16:]
        theirs = teacher.decoder_features(images, masking, 2)
        theirs = teacher.decoder_pred(teacher.decoder_norm(theirs))[:, 1:]
    windows = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(2, 16, 192)
    to_teacher, to_pixels = hidden_rows(masking.mask, pred, theirs), hidden_rows(masking.mask, pred, windows)
    expected = {
        'loss_recon': mean_over(to_teacher, smooth_l1),
        'loss_pixel': mean_over(to_pixels, np.square, lambda row: normalised(row, unbiased=True))}
    terms = {'recon': ['loss_recon'], 'recon_gt': ['loss_recon', 'loss_pixel'], 'pixel': ['loss_pixel']}
    assert list(losses) == terms[target]
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(expected[name], rel=1e-5)


# ---- stage 2: classification ---------------------------------------------------------------------


@pytest.mark.parametrize('kind, alpha, tau', [('hard', 0.2, 1.0), ('soft', 0.7, 3.0)])
def test_distillation_loss_and_its_gradients_are_those_of_timms_task(kind, alpha, tau):
    student = filled(0, models.create_vit, 'vit_pico_patch8', 5, 32, distilled=True).train()
    student.pretrained_cfg = {'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD}
    teacher = filled(1, models.create_vit, 'vit_pico_patch8', 5, 32).eval().requires_grad_(False)
    images, labels = randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 4, 0])
    task = TokenDistillationTask(
        student, teacher, criterion=torch.nn.CrossEntropyLoss(label_smoothing=0.1), distill_type=kind,
        task_loss_weight=1 - alpha, temperature=tau, verbose=False).train()
    expected = task(images, labels)['loss']
    theirs = torch.autograd.grad(expected, list(student.parameters()))
    loss = specific_distill_cls.distillation_loss(
        *student(images), labels, teacher(images), kind, alpha, tau, smoothing=0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, other in zip(torch.autograd.grad(loss, list(student.parameters())), theirs, strict=True):
        torch.testing.assert_close(ours, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('mixed', [False, True])
@pytest.mark.parametrize('kind', ['hard', 'soft'])
def test_distillation_loss_equals_a_float64_loop(kind, mixed):
    """(1 - alpha) CE + alpha (CE to the teacher's top class, or tau^2 KL summed over classes); batch mean."""
    alpha, tau, smoothing = 0.3, 2.5, 0.1
    logits = [(2 * randn(3, 4, seed=seed)).half() for seed in (1, 2, 3)]
    labels = torch.tensor([3, 0, 1])
    soft = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.0, 0.4, 0.6, 0.0], [0.25, 0.25, 0.25, 0.25]])
    smoothed = smoothing / 4 + (1 - smoothing) * torch.eye(4)[labels]
    total = 0.0
    for n in range(3):
        ours, dist, teacher = (part[n].double().tolist() for part in logits)
        targets = (soft if mixed else smoothed)[n].tolist()
        loss_class = -sum(p * log for p, log in zip(targets, log_softmax(ours)))
        if kind == 'hard':
            loss_distill = -log_softmax(dist)[teacher.index(max(teacher))]
        else:
            wanted = log_softmax([x / tau for x in teacher])
            pairs = zip(wanted, log_softmax([x / tau for x in dist]))
            loss_distill = tau ** 2 * sum(math.exp(t) * (t - s) for t, s in pairs)
        total += ((1 - alpha) * loss_class + alpha * loss_distill) / 3
    got = specific_distill_cls.distillation_loss(
        logits[0], logits[1], soft if mixed else labels, logits[2], kind, alpha, tau, smoothing)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(total, rel=1e-6)


def test_without_distillation_the_loss_is_timms():
    """Label smoothing, and soft targets after mixup, which are not smoothed again."""
    logits, labels, soft = randn(6, 5, seed=4), torch.arange(6) % 5, randn(6, 5, seed=5).softmax(1)
    hard = specific_distill_cls.distillation_loss(logits, None, labels, None, 'none', smoothing=0.1)
    mixed = specific_distill_cls.label_loss(logits, soft, smoothing=0.1)
    torch.testing.assert_close(hard, timm.loss.LabelSmoothingCrossEntropy(0.1)(logits, labels))
    torch.testing.assert_close(mixed, timm.loss.SoftTargetCrossEntropy()(logits, soft))


# ---- stage 2: detection and segmentation ---------------------------------------------------------


def frs_loss(*inputs):
    return importlib.import_module('specific_distill_det').frs_loss(*inputs)


def cwd_loss(*inputs):
    return importlib.import_module('specific_distill_seg').cwd_loss(*inputs)


def plain_frs_loss(student_features, teacher_features, student_logits, teacher_logits):
    """The supplement's two sums, position by position, in float64."""
    loss_fpn = loss_head = 0.0
    for level in zip(student_features, teacher_features, student_logits, teacher_logits):
        feature, target, logits, target_logits = (part.detach().double().numpy() for part in level)
        weights = distance = entropy = 0.0
        for n, i, j in np.ndindex(feature.shape[0], *feature.shape[2:]):
            wanted = 1 / (1 + np.exp(-target_logits[n, :, i, j]))
            said = 1 / (1 + np.exp(-logits[n, :, i, j]))
            p = max(wanted)
            weights += p
            distance += p * sum((target[n, :, i, j] - feature[n, :, i, j]) ** 2)
            entropy -= p * sum(wanted * np.log(said) + (1 - wanted) * np.log(1 - said))
        loss_fpn, loss_head = loss_fpn + distance / weights, loss_head + entropy / weights
    return loss_fpn, loss_head


def frs_inputs(dtype=torch.float32):
    """Two images, levels of 4x5, 2x3 and 1x1, six channels, three anchors."""
    parts = []
    for number, channels in enumerate([6, 6, 3, 3]):
        sizes = [(4, 5), (2, 3), (1, 1)]
        parts.append([2 * randn(2, channels, *size, seed=10 * number + size[0]).to(dtype) for size in sizes])
    return parts


def test_frs_loss_by_hand():
    """Both terms are weighted by the teacher's largest objectness and divided by its sum."""
    # two anchors at two positions; the larger probability of each: 0.75 and 0.25, together 1
    teacher = torch.tensor([[3.0, 1 / 3], [1 / 3, 1 / 3]]).log().reshape(1, 2, 1, 2)
    feature, target = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[3.0, 4.0]]]])
    loss_fpn, loss_head = frs_loss([feature], [target], [torch.zeros(1, 2, 1, 2)], [teacher])
    assert loss_fpn.item() == pytest.approx(0.75 * 4 + 0.25 * 16, abs=1e-6)
    # a student that says 0.5 pays log 2 for any target, at each of two anchors
    assert loss_head.item() == pytest.approx(2 * math.log(2), abs=1e-6)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_frs_loss_equals_a_float64_loop_under_autocast_too(dtype):
    inputs = frs_inputs(dtype)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = frs_loss(*inputs)
    assert {loss.dtype for loss in losses} == {torch.float32}
    assert [loss.item() for loss in losses] == pytest.approx(plain_frs_loss(*inputs), rel=1e-6)
    with pytest.raises(ValueError):
        frs_loss(*inputs[:3], inputs[3][:2])  # all levels teach


def test_a_level_on_which_the_teacher_sees_nothing_takes_no_part():
    inputs = frs_inputs()
    inputs[3][1] = torch.full_like(inputs[3][1], -200.0)  # its objectness underflows to 0
    leaves = [level.requires_grad_() for part in (inputs[0], inputs[2]) for level in part]
    losses = frs_loss(*inputs)
    others = [[part[0], part[2]] for part in inputs]
    assert [loss.item() for loss in losses] == pytest.approx(plain_frs_loss(*others), rel=1e-6)
    sum(losses).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_cwd_loss_by_hand():
    """Teacher (3/4, 1/4) against (1/2, 1/2), KL(teacher || student) and not the other direction."""
    teacher = torch.tensor([[[[math.log(3), 0.0]]]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert cwd_loss(torch.zeros(1, 1, 1, 2), teacher).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('tau', [1.0, 4.0])
def test_cwd_loss_equals_a_float64_loop_and_the_authors_gradient(tau, dtype):
    """Softmax of each map over its positions; the authors' cross-entropy has the same gradient."""
    student, teacher = (3 * randn(2, 3, 4, 5, seed=seed).to(dtype) for seed in (0, 1))
    student.requires_grad_()
    total = 0.0
    for ours, theirs in zip(student.detach().double().flatten(0, 1), teacher.double().flatten(0, 1)):
        wanted = log_softmax((theirs.flatten() / tau).tolist())
        pairs = zip(wanted, log_softmax((ours.flatten() / tau).tolist()))
        total += tau ** 2 * sum(math.exp(t) * (t - s) for t, s in pairs) / 6
    with torch.autocast('cpu', dtype=torch.bfloat16):
        loss = cwd_loss(student, teacher, tau)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(total, rel=1e-5)
    if dtype == torch.float32:
        maps, wanted = student.flatten(2) / tau, (teacher.flatten(2) / tau).softmax(dim=2)
        authors = -(wanted * maps.log_softmax(dim=2)).sum() * tau ** 2 / 6
        left, right = torch.autograd.grad(loss, student)[0], torch.autograd.grad(authors, student)[0]
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('other', [(2, 3, 4, 6), (1, 3, 4, 5), (2, 3, 5, 4)])
def test_maps_of_another_shape_are_an_error(other):
    with pytest.raises(ValueError, match='shape'):
        cwd_loss(torch.zeros(2, 3, 4, 5), torch.zeros(other))


# ---- updates -------------------------------------------------------------------------------------


def train(script, student, teacher, batches, args, mixup=None):
    """One epoch of plain SGD; returns what the log gets."""
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    meter = models.Meter(args, optimizer, 1)
    mixup = [mixup] if script is specific_distill_cls else []
    script.train_one_epoch(
        student, teacher, batches, optimizer, Namespace(step=lambda t: None),
        torch.amp.GradScaler('cpu', enabled=False), *mixup, meter, torch.device('cpu'), 0, 0, args)
    return meter.stats()


@pytest.mark.parametrize('clip_grad', [None, 0.1])
@pytest.mark.parametrize('script', [generic_distill, specific_distill_cls])
def test_two_accumulated_batches_equal_one_of_twice_the_size(script, clip_grad):
    """The teacher stays as it is, in eval mode; clipping bounds the norm of the whole update."""
    images, extra = bytes_like(8, 3, 32, 32), torch.arange(8) % 5
    build, options = [models.create_vit, 'vit_pico_patch8', 5, 32], {'distilled': True}
    if script is generic_distill:
        extra = torch.rand(8, 16, generator=torch.Generator().manual_seed(0))
        build, options = [models.create_mae, 'mae_vit_pico_patch8', 32], {'target_dim': 32}
    ends = []
    for size in (8, 4):
        teacher = filled(0, *build).eval().requires_grad_(False)
        before = {name: value.clone() for name, value in teacher.state_dict().items()}
        student = filled(1, *build, **options)
        start = torch.nn.utils.parameters_to_vector(student.parameters()).detach().clone()
        batches = [(images[i:i + size], extra[i:i + size]) for i in range(0, 8, size)]
        if script is generic_distill:
            batches = [(batch, None) for batch in batches]
        args = run_args(script, batch_size=size, accum_iter=8 // size, clip_grad=clip_grad, target_layer=1,
                        supervise='all', reprob=0.0)
        train(script, student, teacher, batches, args)
        ends.append(torch.nn.utils.parameters_to_vector(student.parameters()).detach())
        assert not any(module.training for module in teacher.modules())
        assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    torch.testing.assert_close(ends[1], ends[0], atol=2e-6, rtol=0)
    moved = (ends[0] - start).norm().item()
    assert moved > 0.03 if clip_grad is None else moved == pytest.approx(0.1 * clip_grad, rel=1e-3)


class Recorder(torch.nn.Module):
    """A network that keeps what it was shown; its logits are all equal."""

    def __init__(self, heads):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(heads, 5))
        self.seen = []

    def forward(self, images):
        self.seen.append(images.clone())
        logits = [row.expand(len(images), -1) for row in self.bias]
        return logits if len(logits) > 1 else logits[0]


def test_the_teacher_sees_the_mixed_and_erased_images_of_the_student_and_terms_add_up(capsys):
    args = run_args(specific_distill_cls, '--distillation_alpha', '0.25', '--reprob', '1', batch_size=4)
    mixup = timm.data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=5)
    images, shown = bytes_like(4, 3, 8, 8), []
    for mix in (None, mixup):
        student, teacher = Recorder(2), Recorder(1).eval().requires_grad_(False)
        stats = train(specific_distill_cls, student, teacher, [(images, torch.arange(4))], args, mix)
        assert torch.equal(student.seen[0], teacher.seen[0])
        shown.append(student.seen[0])
    erased = (shown[0] != models.normalise(images)).float().mean(dim=(1, 2, 3))  # share of each image
    assert erased.min() > 0 and erased.max() < 0.6
    assert (shown[1] != shown[0]).any()
    # equal logits: each cross-entropy is log 5; terms are weighted as they are summed
    expected = {'loss': math.log(5), 'loss_class': 0.75 * math.log(5), 'loss_distill': 0.25 * math.log(5)}
    for name, value in expected.items():
        assert stats[f'train_{name}'] == pytest.approx(value, rel=1e-5)
    assert 'loss 1.6094 loss_class 1.2071 loss_distill 0.4024' in capsys.readouterr().out


def test_a_loss_that_is_not_finite_ends_the_run_and_is_named():
    args = run_args(specific_distill_cls, batch_size=4)
    student = Recorder(2)
    with torch.no_grad():
        student.bias[1] = math.inf
    with pytest.raises(SystemExit, match='not finite: .*loss_distill'):
        train(specific_distill_cls, student, Recorder(1), [(bytes_like(4, 3, 8, 8), torch.arange(4))], args)


# ---- augmentation --------------------------------------------------------------------------------


@pytest.mark.parametrize('aa, draws', [('rand-m9-mstd0.5-inc1', 20_000), ('original', 500)])
def test_augmentation_never_fails(monkeypatch, aa, draws):
    """Posterising to 0 bits, which Pillow 13 refuses, happens and works."""
    bits, posterize = [], specific_distill_cls.posterize
    monkeypatch.setattr(specific_distill_cls, 'posterize',
                        lambda image, kept, **options: bits.append(kept) or posterize(image, kept))
    args = run_args(specific_distill_cls, '--aa', aa, input_size=(32, 48))
    transform = specific_distill_cls.build_transform(args, is_train=True)
    [policy] = [step for step in transform.transforms if type(step).__name__.endswith('Augment')]
    random.seed(0)
    np.random.seed(0)
    image = Image.fromarray(bytes_like(8, 8, 3).numpy())
    assert all(policy(image).size == (8, 8) for _ in range(draws))
    assert (0 in bits) or aa == 'original'
    assert transform(image).shape == (3, 32, 48) and transform(image).dtype == torch.uint8


@pytest.mark.parametrize('bits, expected', [(0, (0, 0, 0)), (1, (128, 0, 128)), (4, (192, 96, 240))])
def test_posterize_keeps_the_highest_bits(bits, expected):
    image = specific_distill_cls.posterize(Image.new('RGB', (3, 2), (200, 100, 255)), bits)
    assert image.size == (3, 2) and image.getcolors() == [(6, expected)]


def test_the_validation_transform_is_resize_and_centre_crop():
    """256/224 of the input on the short side, bicubic, then the centre."""
    image = Image.fromarray(bytes_like(300, 400, 3).numpy())
    bicubic = torchvision.transforms.InterpolationMode.BICUBIC
    plain = torchvision.transforms.Compose([
        torchvision.transforms.Resize(256, bicubic), torchvision.transforms.CenterCrop(224),
        torchvision.transforms.PILToTensor()])
    args = run_args(specific_distill_cls, input_size=(224, 224))
    transform = specific_distill_cls.build_transform(args, is_train=False)
    assert torch.equal(torch.as_tensor(transform(image)), plain(image))
