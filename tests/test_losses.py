"""The losses against values worked out by hand, float64 loops and timm; updates, augmentation, repeatable draws.

Sec. and Table: the paper's and its supplement's.
"""
import math
import random
from argparse import Namespace

import generic_distill
import numpy as np
import pytest
import specific_distill_cls
import timm.loss
import torch
import torchvision
from PIL import Image
from timm.task import TokenDistillationTask

import models


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bytes_like(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def noise_for(n, length, seed=1):
    return torch.rand(n, length, generator=torch.Generator().manual_seed(seed))


def smooth_l1(difference, beta=2.0):
    """Girshick's loss of one number: quadratic below beta, linear above, continuous at beta."""
    difference = abs(difference)
    return difference ** 2 / (2 * beta) if difference < beta else difference - beta / 2


def normalised(row, eps=1e-6, unbiased=False):
    """A list of numbers brought to mean 0 and variance 1."""
    mean = sum(row) / len(row)
    variance = sum((x - mean) ** 2 for x in row) / (len(row) - unbiased)
    return [(x - mean) / math.sqrt(variance + eps) for x in row]


# -------------------------------------------------------------------------------------------------------- stage 1: losses


def test_feature_loss_by_hand():
    """Stage 1: smooth-L1 with beta 2 to the layer-normalised target: both of its branches, then the mean."""
    # target (1, 3) -> (-1, 1); differences 1 and 3: 1 / 4 and 3 - 1
    loss = generic_distill.feature_loss(torch.tensor([[[0.0, 4.0]]]), torch.tensor([[[1.0, 3.0]]]))
    assert loss.shape == ()
    assert loss.item() == pytest.approx((0.25 + 2) / 2, abs=1e-6)
    # a second token: target (10, -10) -> (1, -1); differences 0.5 and 5: 1 / 16 and 4
    loss = generic_distill.feature_loss(
        torch.tensor([[[0.0, 4.0], [1.5, -6.0]]]), torch.tensor([[[1.0, 3.0], [10.0, -10.0]]]))
    assert loss.item() == pytest.approx((0.25 + 2 + 0.0625 + 4) / 4, abs=1e-6)
    # beta 1: differences 1 and 3 are both linear
    loss = generic_distill.feature_loss(torch.tensor([[[0.0, 4.0]]]), torch.tensor([[[1.0, 3.0]]]), beta=1.0)
    assert loss.item() == pytest.approx((0.5 + 2.5) / 2, abs=1e-6)


def plain_feature_loss(pred, target):
    terms = [smooth_l1(p - t) for pred_row, target_row in zip(pred.flatten(0, 1).tolist(), target.flatten(0, 1).tolist())
             for p, t in zip(pred_row, normalised(target_row))]
    return sum(terms) / len(terms)


def test_feature_loss_equals_a_float64_loop():
    """Stage 1: mean over all tokens and channels, every token normalised by itself, without an affine part."""
    pred, target = 3 * randn(2, 5, 8, seed=1), 7 * randn(2, 5, 8, seed=2) + 4
    expected = plain_feature_loss(pred.double(), target.double())
    assert generic_distill.feature_loss(pred, target).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('autocast', [False, True])
def test_feature_loss_is_computed_in_float32(dtype, autocast):
    """Stage 1: the loss is taken in float32 whatever autocast made of its inputs."""
    pred, target = (3 * randn(2, 5, 8, seed=1)).to(dtype), (200 * randn(2, 5, 8, seed=2)).to(dtype)
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
        loss = generic_distill.feature_loss(pred, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain_feature_loss(pred.double(), target.double()), rel=1e-6)


@pytest.mark.parametrize('shape', [(2, 5, 4), (2, 4, 8), (1, 5, 8), (5, 8)])
def test_feature_loss_refuses_to_broadcast(shape):
    """README: features of another layout are an error, not a number."""
    with pytest.raises(ValueError, match='shape'):
        generic_distill.feature_loss(randn(2, 5, 8), randn(*shape))


def test_feature_loss_pulls_the_prediction_towards_the_target():
    """Stage 1: gradient of smooth-L1 by hand: difference / beta below it, sign above, over the number of terms."""
    pred = torch.tensor([[[0.0, 4.0]]], requires_grad=True)
    generic_distill.feature_loss(pred, torch.tensor([[[1.0, 3.0]]])).backward()
    assert pred.grad.flatten().tolist() == pytest.approx([1 / 2 / 2, 1 / 2], abs=1e-6)


def hidden_rows(mask):
    return [(n, i) for n in range(mask.shape[0]) for i in range(mask.shape[1]) if mask[n, i] == 1]


def test_recon_loss_equals_a_float64_loop_over_hidden_patches():
    """Table 4, row 2: smooth-L1 to the teacher's reconstruction, hidden patches only, no layer norm."""
    pred, target = 3 * randn(2, 6, 12, seed=1), 3 * randn(2, 6, 12, seed=2)
    mask = models.random_masking(noise_for(2, 6), 0.5).mask
    terms = [smooth_l1(p - t) for n, i in hidden_rows(mask) for p, t in zip(pred[n, i].tolist(), target[n, i].tolist())]
    assert len(terms) == 2 * 3 * 12
    assert generic_distill.recon_loss(pred, target, mask).item() == pytest.approx(sum(terms) / len(terms), rel=1e-6)
    half = generic_distill.recon_loss(pred.bfloat16(), target.bfloat16(), mask)
    assert half.dtype == torch.float32


@pytest.mark.parametrize('norm_pix_loss', [True, False])
def test_pixel_loss_equals_a_float64_loop_over_hidden_patches(norm_pix_loss):
    """Stage 1: MAE's loss: mean squared error at hidden patches, to pixels normalised with the unbiased variance."""
    pred, pixels = randn(2, 6, 12, seed=1), 2 * randn(2, 6, 12, seed=2) + 3
    mask = models.random_masking(noise_for(2, 6), 0.5).mask
    terms = []
    for n, i in hidden_rows(mask):
        row = pixels[n, i].double().tolist()
        row = normalised(row, unbiased=True) if norm_pix_loss else row
        terms += [(p - t) ** 2 for p, t in zip(pred[n, i].tolist(), row)]
    loss = generic_distill.pixel_loss(pred, pixels, mask, norm_pix_loss)
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-6)


def test_visible_patches_do_not_enter_the_pixel_losses():
    """README: 1 = hidden; what the student says about visible patches changes neither loss."""
    pred, target = randn(2, 6, 12, seed=1), randn(2, 6, 12, seed=2)
    mask = models.random_masking(noise_for(2, 6), 0.5).mask
    for place, changes in ((mask == 0, False), (mask == 1, True)):
        other = pred.clone()
        other[place] += 100
        for loss in (generic_distill.recon_loss, generic_distill.pixel_loss):
            assert (loss(other, target, mask) != loss(pred, target, mask)).item() == changes


def stage1_args(target='feature', **options):
    """Arguments as main() leaves them, of one process on a CPU."""
    args = generic_distill.get_args_parser().parse_args(['--target', target, '--target_layer', '1'])
    generic_distill.resolve_recipe(args)
    for name, value in {'rank': 0, 'world_size': 1, 'distributed': False, 'device': 'cpu', 'amp': 'off', **options}.items():
        setattr(args, name, value)
    return args


def filled(seed, build, *args, **options):
    """A network with random values everywhere, the same for the same seed: no bias is zero and no norm the identity."""
    torch.manual_seed(seed)
    module = build(*args, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return module


@pytest.mark.parametrize('supervise', ['all', 'masked'])
def test_supervised_tokens_are_the_chosen_ones(supervise):
    """Stage 1: all = class token, visible and hidden patches; masked = exactly the hidden patches."""
    teacher = filled(0, models.create_mae, 'mae_vit_pico_patch8', 32).eval()
    student = filled(1, models.create_mae, 'mae_vit_pico_patch8', 32, 32).eval()
    images, masking = randn(3, 3, 32, 32), models.random_masking(noise_for(3, 16), 0.75)
    args = stage1_args(supervise=supervise)
    with torch.no_grad():
        got = generic_distill.stage_losses(student, teacher, images, masking, args)
        pred = student.predict_features(images, masking)
        target = teacher.decoder_features(images, masking, 1)
    tokens = [(n, t) for n in range(3) for t in range(17)] if supervise == 'all' else [
        (n, 1 + i) for n, i in hidden_rows(masking.mask)]
    assert len(tokens) == (51 if supervise == 'all' else 36)
    expected = plain_feature_loss(*(torch.stack([x[n, t].double() for n, t in tokens])[None] for x in (pred, target)))
    assert got['loss_feature'].item() == pytest.approx(expected, rel=1e-6)


def test_reconstruction_targets_are_the_full_teachers_pixels():
    """Table 4, rows 2 and 3: the teacher's whole decoder predicts the target; row 3 adds the true pixels, weight 1."""
    teacher = filled(0, models.create_mae, 'mae_vit_pico_patch8', 32).eval()
    student = filled(1, models.create_mae, 'mae_vit_pico_patch8', 32, 192).eval()
    images, masking = randn(2, 3, 32, 32), models.random_masking(noise_for(2, 16), 0.75)
    with torch.no_grad():
        losses = generic_distill.stage_losses(student, teacher, images, masking, stage1_args('recon_gt'))
        alone = generic_distill.stage_losses(student, teacher, images, masking, stage1_args('recon'))
        pred = student.predict_features(images, masking)[:, 1:]
        target = teacher.decoder_pred(teacher.decoder_norm(teacher.decoder_features(images, masking, 2)))[:, 1:]
    recon, pixel = [], []
    for n, i in hidden_rows(masking.mask):
        recon += [smooth_l1(p - t) for p, t in zip(pred[n, i].tolist(), target[n, i].tolist())]
        window = images[n, :, i // 4 * 8:i // 4 * 8 + 8, i % 4 * 8:i % 4 * 8 + 8].permute(1, 2, 0).flatten().tolist()
        pixel += [(p - t) ** 2 for p, t in zip(pred[n, i].tolist(), normalised(window, unbiased=True))]
    assert losses['loss_recon'].item() == pytest.approx(sum(recon) / len(recon), rel=1e-5)
    assert losses['loss_pixel'].item() == pytest.approx(sum(pixel) / len(pixel), rel=1e-5)
    assert alone.keys() == {'loss_recon'} and alone['loss_recon'] == losses['loss_recon']


def test_teacher_sees_the_students_images_and_mask():
    """README: teacher and student see the same image under the same random mask."""
    class Teacher:
        def decoder_features(self, images, masking, layer):
            self.seen = images, masking, layer
            return randn(2, 17, 32)

    class Student(torch.nn.Module):
        def forward(self, images, masking):
            self.seen = images, masking
            return randn(2, 17, 32, seed=3)

    teacher, student, args = Teacher(), Student(), stage1_args(target_layer=3)
    images, masking = randn(2, 3, 32, 32), models.random_masking(noise_for(2, 16), 0.75)
    generic_distill.stage_losses(student, teacher, images, masking, args)
    assert teacher.seen[0] is student.seen[0] is images
    assert teacher.seen[1] is student.seen[1] is masking
    assert teacher.seen[2] == 3


# -------------------------------------------------------------------------------------------------------- stage 2: losses


@pytest.fixture(scope='module')
def networks():
    """(distilled student in training mode, frozen teacher, images, labels) of 5 classes."""
    student = filled(0, models.create_vit, 'vit_pico_patch8', 5, 32, distilled=True).train()
    student.pretrained_cfg = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
    teacher = filled(1, models.create_vit, 'vit_pico_patch8', 5, 32).eval().requires_grad_(False)
    return student, teacher, randn(6, 3, 32, 32), torch.tensor([0, 1, 2, 3, 4, 0])


@pytest.mark.parametrize('kind, alpha, tau', [
    ('hard', 0.5, 1.0), ('hard', 0.2, 1.0), ('soft', 0.5, 1.0), ('soft', 0.7, 3.0)])
def test_distillation_loss_equals_timms_task(networks, kind, alpha, tau):
    """Stage 2: DeiT's loss, with the same value and gradients as timm's on the same weights and batch."""
    student, teacher, images, labels = networks
    task = TokenDistillationTask(
        student, teacher, criterion=torch.nn.CrossEntropyLoss(label_smoothing=0.1), distill_type=kind,
        task_loss_weight=1 - alpha, temperature=tau, verbose=False).train()
    student.zero_grad()
    expected = task(images, labels)['loss']
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    loss = specific_distill_cls.distillation_loss(*student(images), labels, teacher(images), kind, alpha, tau, smoothing=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, p in student.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-6, rtol=1e-5)


def log_softmax(row):
    total = math.log(sum(math.exp(x) for x in row))
    return [x - total for x in row]


@pytest.mark.parametrize('mixed', [False, True])
@pytest.mark.parametrize('kind', ['hard', 'soft', 'none'])
@pytest.mark.parametrize('alpha', [0.0, 0.3, 1.0])
def test_distillation_loss_equals_a_float64_loop(kind, mixed, alpha):
    """Stage 2: (1 - alpha) CE + alpha (CE to the teacher's top class, or tau^2 KL summed over classes); batch mean."""
    tau, smoothing, classes = 2.5, 0.1, 4
    class_logits, dist_logits, teacher_logits = (2 * randn(3, classes, seed=seed) for seed in (1, 2, 3))
    labels = torch.tensor([3, 0, 1])
    soft = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.0, 0.4, 0.6, 0.0], [0.25, 0.25, 0.25, 0.25]])
    total = 0.0
    for n in range(3):
        probabilities = soft[n].tolist() if mixed else [
            smoothing / classes + (1 - smoothing) * (c == labels[n].item()) for c in range(classes)]
        term = -sum(p * lp for p, lp in zip(probabilities, log_softmax(class_logits[n].tolist())))
        teacher = teacher_logits[n].tolist()
        if kind == 'hard':
            distill = -log_softmax(dist_logits[n].tolist())[teacher.index(max(teacher))]
            term = (1 - alpha) * term + alpha * distill
        elif kind == 'soft':
            theirs, ours = (log_softmax([x / tau for x in row]) for row in (teacher, dist_logits[n].tolist()))
            distill = tau ** 2 * sum(math.exp(t) * (t - o) for t, o in zip(theirs, ours))
            term = (1 - alpha) * term + alpha * distill
        total += term / 3
    got = specific_distill_cls.distillation_loss(
        class_logits, dist_logits, soft if mixed else labels, teacher_logits, kind, alpha, tau, smoothing)
    assert got.item() == pytest.approx(total, rel=1e-6)


def test_without_distillation_the_loss_is_timms(networks):
    """Stage 2: without a teacher the labels alone teach: timm's label smoothing, and its soft targets after mixup."""
    logits, labels = randn(6, 5, seed=4), networks[3]
    got = specific_distill_cls.distillation_loss(logits, None, labels, None, 'none', smoothing=0.1)
    assert got.item() == pytest.approx(timm.loss.LabelSmoothingCrossEntropy(0.1)(logits, labels).item(), rel=1e-6)
    soft = randn(6, 5, seed=5).softmax(1)
    got = specific_distill_cls.distillation_loss(logits, None, soft, None, 'none', smoothing=0.1)
    assert got.item() == pytest.approx(timm.loss.SoftTargetCrossEntropy()(logits, soft).item(), rel=1e-6)


@pytest.mark.parametrize('kind', ['hard', 'soft'])
def test_distillation_loss_is_computed_in_float32(kind):
    """Stage 2: the same value from half-precision logits as from the same numbers in float32."""
    logits = [(4 * randn(3, 5, seed=seed)).half() for seed in (1, 2, 3)]
    labels = torch.tensor([0, 1, 2])
    half = specific_distill_cls.distillation_loss(logits[0], logits[1], labels, logits[2], kind)
    full = specific_distill_cls.distillation_loss(
        *(x.double().float() for x in logits[:2]), labels, logits[2].float(), kind)
    assert half.dtype == torch.float32
    assert half.item() == full.item()


@pytest.mark.parametrize('alpha, head, other', [(0.0, 'class', 'dist'), (1.0, 'dist', 'class')])
def test_each_head_learns_from_its_own_target(alpha, head, other):
    """Stage 2: the class head learns from the labels, the distillation head from the teacher."""
    logits = {name: randn(3, 5, seed=seed).requires_grad_() for seed, name in enumerate(('class', 'dist'))}
    loss = specific_distill_cls.distillation_loss(
        logits['class'], logits['dist'], torch.tensor([0, 1, 2]), randn(3, 5, seed=9), 'hard', alpha)
    loss.backward()
    assert logits[head].grad.abs().max() > 0
    assert logits[other].grad.abs().max() == 0


# ---------------------------------------------------------------------------------------------------------------- updates


def cls_args(*argv, **options):
    args = specific_distill_cls.get_args_parser().parse_args(list(argv))
    specific_distill_cls.resolve_recipe(args)
    for name, value in {'rank': 0, 'world_size': 1, 'distributed': False, 'device': 'cpu', 'amp': 'off', **options}.items():
        setattr(args, name, value)
    return args


SILENT = Namespace(step=lambda t: None)
NO_SCALER = torch.amp.GradScaler('cpu', enabled=False)
CPU = torch.device('cpu')


class Recorder(torch.nn.Module):
    """A network that keeps what it was shown."""

    def __init__(self, outputs):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(outputs, 5))
        self.seen = []

    def forward(self, images):
        self.seen.append(images.clone())
        logits = [row + images.mean(dim=(1, 2, 3))[:, None] for row in self.bias]
        return tuple(logits) if len(logits) > 1 else logits[0]


def test_teacher_sees_the_mixed_images_of_the_student():
    """Stage 2: the teacher's top class is that of the same mixed image."""
    args = cls_args('--teacher_path', 'x', '--batch_size', '4', '--print_freq', '1')
    mixup = timm.data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=5)
    student, teacher = Recorder(2), Recorder(1).eval().requires_grad_(False)
    loader = [(bytes_like(4, 3, 8, 8, seed=seed), torch.tensor([0, 1, 2, 3]), [''] * 4) for seed in range(6)]
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    specific_distill_cls.train_one_epoch(
        student, teacher, [(x.clone(), y, names) for x, y, names in loader], optimizer, SILENT, NO_SCALER, mixup,
        specific_distill_cls.Progress(args, args.epochs), CPU, 0, args)
    assert len(teacher.seen) == len(student.seen) == 6
    for theirs, ours, (original, _, _) in zip(teacher.seen, student.seen, loader):
        assert torch.equal(theirs, ours)
        assert not torch.equal(ours, models.normalise(original))


def weights_after_stage_one(target, batches, accum_iter, clip_grad=None):
    """One epoch of plain SGD from the same start: the weights after it."""
    args = stage1_args(target, accum_iter=accum_iter, batch_size=8 // accum_iter, print_freq=1, clip_grad=clip_grad)
    teacher = filled(0, models.create_mae, 'mae_vit_pico_patch8', 32).eval().requires_grad_(False)
    student = filled(1, models.create_mae, 'mae_vit_pico_patch8', 32, {'feature': 32, 'pixel': None}[target])
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    generic_distill.train_one_epoch(
        student, teacher, batches, optimizer, SILENT, NO_SCALER, generic_distill.Progress(args, args.epochs), CPU, 0, args)
    return student.state_dict()


@pytest.mark.parametrize('target, clip_grad', [('feature', None), ('pixel', None), ('feature', 0.1)])
def test_two_accumulated_batches_equal_one_of_twice_the_size(target, clip_grad):
    """README: --batch_size and --accum_iter trade memory for time and change nothing else."""
    images, noise = bytes_like(8, 1, 3, 32, 32), noise_for(8, 16)[:, None]
    whole = [((images, noise), None, [''] * 8)]
    halves = [((images[i:i + 4], noise[i:i + 4]), None, [''] * 4) for i in (0, 4)]
    one, two = weights_after_stage_one(target, whole, 1, clip_grad), weights_after_stage_one(target, halves, 2, clip_grad)
    start = filled(1, models.create_mae, 'mae_vit_pico_patch8', 32, {'feature': 32, 'pixel': None}[target]).state_dict()
    moved = math.sqrt(sum((one[k] - start[k]).double().square().sum().item() for k in one))
    assert moved > 0.03 if clip_grad is None else moved == pytest.approx(0.1 * clip_grad, rel=1e-3)  # lr * norm
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=2e-6, rtol=0)


def test_accumulated_classification_batches_equal_one_of_twice_the_size():
    """README: the same in stage 2, with a teacher."""
    images, labels, weights = bytes_like(8, 3, 32, 32), torch.arange(8) % 5, []
    teacher = filled(0, models.create_vit, 'vit_pico_patch8', 5, 32).eval().requires_grad_(False)
    for size in (8, 4):
        args = cls_args('--teacher_path', 'x', '--mixup', '0', '--cutmix', '0', '--reprob', '0', accum_iter=8 // size,
                        batch_size=size, print_freq=1)
        student = filled(1, models.create_vit, 'vit_pico_patch8', 5, 32, distilled=True)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        loader = [(images[i:i + size], labels[i:i + size], [''] * size) for i in range(0, 8, size)]
        specific_distill_cls.train_one_epoch(student, teacher, loader, optimizer, SILENT, NO_SCALER, None,
                                             specific_distill_cls.Progress(args, args.epochs), CPU, 0, args)
        weights.append(student.state_dict())
    for key in weights[0]:
        torch.testing.assert_close(weights[1][key], weights[0][key], atol=2e-6, rtol=0)


def test_logged_loss_is_the_mean_over_the_steps():
    """README: train_loss and its terms in log.txt are means of the epoch; the parts of stage 2 are unweighted."""
    args = cls_args('--teacher_path', 'x', '--mixup', '0', '--cutmix', '0', batch_size=4, print_freq=2)
    student, teacher = Recorder(2), Recorder(1).eval().requires_grad_(False)
    loader = [(bytes_like(4, 3, 8, 8, seed=seed), torch.tensor([0, 1, 2, 3]), [''] * 4) for seed in range(3)]
    stats = specific_distill_cls.train_one_epoch(
        student, teacher, loader, torch.optim.SGD(student.parameters(), lr=0.0), SILENT, NO_SCALER, None,
        specific_distill_cls.Progress(args, args.epochs), CPU, 0, args)
    # all logits of an image are equal, so that each cross-entropy is log 5
    assert stats['train_loss'] == pytest.approx(math.log(5), rel=1e-6)
    assert stats['train_loss_class'] == pytest.approx(math.log(5), rel=1e-6)
    assert stats['train_loss_distill'] == pytest.approx(math.log(5), rel=1e-6)


# ----------------------------------------------------------------------------------------------------------- augmentation


def random_op(aa):
    """The RandAugment or AutoAugment step of the training transform."""
    args = specific_distill_cls.get_args_parser().parse_args(['--aa', aa])
    args.input_size = [224, 224]
    steps = specific_distill_cls.build_transform(args, True).transforms
    [op] = [step for step in steps if type(step).__name__ in ('RandAugment', 'AutoAugment')]
    return op


@pytest.mark.parametrize('aa, draws', [('rand-m9-mstd0.5-inc1', 20_000), ('rand-m2', 500), ('v0', 500), ('original', 500)])
def test_augmentation_never_fails(monkeypatch, aa, draws):
    """README: --aa takes timm's policies; posterising to 0 bits, which Pillow 13 refuses, happens and works."""
    bits, posterize = [], specific_distill_cls.posterize

    def counting(image, bits_to_keep, **options):
        bits.append(bits_to_keep)
        return posterize(image, bits_to_keep, **options)

    monkeypatch.setattr(specific_distill_cls, 'posterize', counting)
    op = random_op(aa)
    random.seed(0)
    np.random.seed(0)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    for _ in range(draws):
        assert op(image).size == (8, 8)
    if aa == 'rand-m9-mstd0.5-inc1':
        assert 0 in bits


@pytest.mark.parametrize('bits, expected', [(0, (0, 0, 0)), (1, (128, 0, 128)), (4, (192, 96, 240)), (8, (200, 100, 255))])
def test_posterize_keeps_the_highest_bits(bits, expected):
    """README: 0 bits leave black, as older Pillows answered; others are Pillow's own."""
    image = specific_distill_cls.posterize(Image.new('RGB', (3, 2), (200, 100, 255)), bits)
    assert image.size == (3, 2)
    assert [image.getpixel((x, y)) for x in range(3) for y in range(2)] == [expected] * 6


def test_validation_transform_is_resize_and_centre_crop():
    """Stage 2: evaluation resizes the short side to 256/224 of the input, bicubic, and takes the centre."""
    args = specific_distill_cls.get_args_parser().parse_args([])
    args.input_size = [224, 224]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    steps = torchvision.transforms.Compose([
        torchvision.transforms.Resize(256, interpolation=torchvision.transforms.InterpolationMode.BICUBIC),
        torchvision.transforms.CenterCrop(224), torchvision.transforms.ToTensor(),
        torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    pixels = specific_distill_cls.build_transform(args, False)(image)
    assert pixels.dtype == torch.uint8
    torch.testing.assert_close(models.normalise(pixels), steps(image), atol=1e-6, rtol=0)


# ---------------------------------------------------------------------------------------------------- repeatable draws


def pictures(root, sizes=(4, 4)):
    for label, count in enumerate(sizes):
        (root / f'class{label}').mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng((label, i)).integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f'class{label}' / f'{i}.png')
    return torchvision.datasets.ImageFolder(root)


def dataset_of(folder, kind, seed=0):
    if kind == 'stage 1':
        return models.SeededDataset(folder, generic_distill.ViewsAndNoise([16, 16], 4, 1), seed)
    args = specific_distill_cls.get_args_parser().parse_args([])
    args.input_size = [48, 48]
    return models.SeededDataset(folder, specific_distill_cls.build_transform(args, True), seed)


def tensors(sample):
    view = sample[0] if isinstance(sample[0], tuple) else (sample[0],)
    return torch.cat([x.flatten() for x in view])


@pytest.mark.parametrize('kind', ['stage 1', 'stage 2'])
def test_sample_depends_on_seed_epoch_and_index_alone(tmp_path, kind):
    """README: what a sample gets is a function of (seed, epoch, index), so a resume is exact with any number of workers."""
    folder = pictures(tmp_path)
    data = dataset_of(folder, kind)
    keys = [(epoch, index) for epoch in (0, 1) for index in range(len(data))]
    first = {key: tensors(data[key]) for key in keys}
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    torch.rand(7), random.random(), np.random.rand(3)
    again = dataset_of(folder, kind)
    for key in reversed(keys):
        torch.rand(1), random.random(), np.random.rand()
        assert torch.equal(tensors(again[key]), first[key])
    others = [*(first[0, i] for i in range(len(data))), *(first[1, i] for i in range(len(data))),
              *(tensors(dataset_of(folder, kind, seed=1)[0, i]) for i in range(len(data)))]
    assert all(not torch.equal(a, b) for n, a in enumerate(others) for b in others[:n])


def test_seed_everything_fixes_all_three_generators():
    """README: torch, numpy and random all start from (seed, epoch, step, rank), and another key gives other numbers."""
    def draw(*key):
        models.seed_everything(*key)
        return torch.rand(1).item(), np.random.rand(), random.random()

    draws = [draw(*key) for key in ((0, 1, 2), (0, 1, 3), (0, 2, 1), (1, 0, 2), (0, 1), (0, 1, 2))]
    assert draws[0] == draws[5]
    for position in range(3):
        assert len({values[position] for values in draws[:5]}) == 5


def test_unreadable_file_gives_way_to_the_next_and_is_named(tmp_path):
    """README: with --skip_bad_images an unreadable image is named, and the next sample takes its place."""
    folder = pictures(tmp_path, (3, 2))
    broken = [tmp_path / 'class0' / '1.png', tmp_path / 'class0' / '2.png']
    broken[0].write_bytes(b'no picture')
    broken[1].write_bytes(broken[1].read_bytes()[:60])
    data = models.SeededDataset(folder, lambda image: torch.tensor(np.array(image)[0, 0].tolist()), 0)
    image, label, names = data[0, 1]
    assert label == 1
    assert torch.equal(image, data[0, 3][0])
    assert [line.split(' (')[0] for line in names.split('\n')] == [str(path) for path in broken]
    assert data[0, 0][2] == ''
    # the last file of a folder is followed by the first
    (tmp_path / 'class1' / '1.png').write_bytes(b'')
    image, label, names = data[0, 4]
    assert label == 0 and torch.equal(image, data[0, 0][0]) and str(tmp_path / 'class1' / '1.png') in names


def test_folder_without_a_readable_image_stops(tmp_path):
    """README: a lost disk is no bad file: the search for the next image ends, in one line that names one."""
    folder = pictures(tmp_path, (1, 1))
    for path in tmp_path.rglob('*.png'):
        path.write_bytes(b'')
    with pytest.raises(models.InputError, match='unreadable.*png'):
        models.SeededDataset(folder, lambda image: image, 0)[0, 0]


@pytest.mark.parametrize('skip', [False, True])
def test_bad_image_stops_the_run_unless_it_may_be_skipped(capsys, skip):
    """README: an unreadable image stops the run and is named; with --skip_bad_images it is named once and counted."""
    args = cls_args('--mixup', '0', '--cutmix', '0', batch_size=2, print_freq=1, skip_bad_images=skip)
    student = Recorder(1)
    loader = [(randn(2, 3, 8, 8), torch.tensor([0, 1]), ['', 'a.png (broken)']), (randn(2, 3, 8, 8), torch.tensor([0, 1]),
                                                                               ['a.png (broken)\nb.png (cut)', ''])]
    run = (student, None, loader, torch.optim.SGD(student.parameters(), lr=0.1), SILENT, NO_SCALER, None,
           specific_distill_cls.Progress(args, args.epochs), CPU, 0, args)
    if not skip:
        with pytest.raises(models.InputError, match='a.png'):
            specific_distill_cls.train_one_epoch(*run)
        return
    stats = specific_distill_cls.train_one_epoch(*run)
    assert stats['train_skipped_images'] == 3
    assert [line for line in capsys.readouterr().out.splitlines() if 'skipped: ' in line] == [
        'skipped: a.png (broken)', 'skipped: b.png (cut)']


def sampler(length, batch_size, world_size=1, rank=0, accum_iter=1, seed=0):
    return models.EpochSampler(length, Namespace(
        batch_size=batch_size, accum_iter=accum_iter, world_size=world_size, rank=rank, seed=seed))


def batches(one, batch_size, epoch):
    one.epoch = epoch
    keys = list(one)
    assert len(keys) == len(one)
    assert {key[0] for key in keys} == {epoch}
    return [[index for _, index in keys[i:i + batch_size]] for i in range(0, len(keys), batch_size)]


@pytest.mark.parametrize('length', [64, 71])
def test_every_step_sees_the_same_samples_on_one_or_two_processes(length):
    """README: stage 1 trains alike on 1 x 16 and 2 x 8 samples; no sample comes twice in an epoch."""
    for epoch in (0, 1):
        whole = batches(sampler(length, 16), 16, epoch)
        shares = [batches(sampler(length, 8, world_size=2, rank=rank), 8, epoch) for rank in (0, 1)]
        assert len(whole) == len(shares[0]) == len(shares[1]) == 4
        for step in range(4):
            assert sorted(whole[step]) == sorted(shares[0][step] + shares[1][step])
        seen = [index for batch in whole for index in batch]
        assert len(set(seen)) == len(seen) == 64
        assert set(seen) <= set(range(length))


def test_order_differs_between_epochs_and_seeds_and_repeats_for_the_same():
    """README: a new order each epoch, the same one again after a resume."""
    orders = [batches(sampler(64, 16, seed=seed), 16, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert orders[0] == orders[3]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] != [list(range(i, i + 16)) for i in range(0, 64, 16)]


def test_epoch_ends_at_a_whole_update():
    """README: an update always sums --accum_iter batches of every process."""
    one = sampler(50, 4, world_size=2, rank=1, accum_iter=3)
    assert len(list(one)) == len(one) == 24  # two updates of 3 steps of 4 images


@pytest.mark.parametrize('options', [
    {'batch_size': 9}, {'batch_size': 4, 'world_size': 3}, {'batch_size': 4, 'accum_iter': 3}])
def test_data_set_smaller_than_one_update_is_refused(options):
    """README: too few images for one effective batch are one line, with both numbers."""
    with pytest.raises(models.InputError, match=f'8 images.*{9 if options["batch_size"] == 9 else 12}') as info:
        sampler(8, **options)
    assert '\n' not in str(info.value)
