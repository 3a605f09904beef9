"""The segmentation network: losses, backbone, heads, optimisation, windows, files; against timm, transformers, plain loops.

Supplement: the paper's. BEiT: Bao et al., ICLR 2022, whose ADE20K recipe runs in mmsegmentation.
"""
import itertools
import json
import math
import re

import numpy as np
import pytest
import specific_distill_seg as seg
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from torch import nn

import models

CPU = torch.device('cpu')
NO_SCALER = torch.amp.GradScaler('cpu', enabled=False)
CLASSES = ['sky', 'sea', 'sand']
TINY = ['--model', 'vit_pico_patch8', '--teacher_model', 'vit_pico_patch8', '--input_size', '16', '--batch_size', '2',
        '--device', 'cpu', '--print_freq', '1000', '--num_workers', '0']


def seg_args(*argv, **options):
    args = seg.get_args_parser().parse_args([*TINY, *argv])
    options = {'rank': 0, 'world_size': 1, 'distributed': False, 'amp': 'off', 'input_size': [16, 16], **options}
    for name, value in options.items():
        setattr(args, name, value)
    return args


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(module, seed=0, std=0.1):
    """The module with noise on all its parameters and statistics: none is zero, no two are the same."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                noise = std * torch.randn(value.shape, generator=generator).to(value.dtype)
                value.add_(noise.abs() if name.endswith('running_var') else noise)
    return module


def build(function, *args, seed=0):
    torch.manual_seed(seed)
    return function(*args)


def tiny_segmenter(seed=0, drop_path=0.0):
    return build(seg.Segmenter, 'vit_pico_patch8', len(CLASSES), 16, drop_path, seed=seed)


def tiny_batch(images=2, seed=0):
    """Images (N, 3, 16, 16) and labels (N, 16, 16) of three classes, a fifth of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (images, 16, 16), generator=generator, dtype=torch.uint8)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    return randn(images, 3, 16, 16, seed=seed), labels


def without_dropout(module):
    """Training mode but for the dropout."""
    for part in module.train().modules():
        if isinstance(part, (nn.Dropout, nn.Dropout2d)):
            part.eval()
    return module


def kept_outputs(module):
    """A list that fills with what the module returns."""
    kept = []
    module.register_forward_hook(lambda module, inputs, output: kept.append(output))
    return kept


def size_of(monkeypatch, depth):
    """Registers `vit_thin_patchN`, `depth` blocks of width 32, and returns that name without N."""
    monkeypatch.setitem(models.SIZES, 'thin', models.Size(32, depth, 2, 32, 2))
    return 'vit_thin_patch'


def refusal(function, *args):
    """The message of the InputError that a call raises, which must be one line."""
    with pytest.raises(models.InputError) as info:
        function(*args)
    assert '\n' not in str(info.value)
    return str(info.value)


# ------------------------------------------------------------------------------------------------- channel-wise distillation


def softmax(values):
    """Of a list of numbers."""
    largest = max(values)
    powers = [math.exp(value - largest) for value in values]
    return [power / sum(powers) for power in powers]


def plain_cwd(student, teacher, tau=1.0):
    """Per image and class tau^2 sum p_t log(p_t / p_s) over the positions; their mean, in float64."""
    total, (images, classes) = 0.0, student.shape[:2]
    for n in range(images):
        for c in range(classes):
            ours, theirs = (softmax((part[n, c].detach().double().flatten() / tau).tolist()) for part in (student, teacher))
            total += tau ** 2 * sum(p * (math.log(p) - math.log(q)) for p, q in zip(theirs, ours))
    return total / (images * classes)


@pytest.mark.parametrize('tau', [0.5, 1.0, 4.0])
@pytest.mark.parametrize('shape', [(2, 3, 4, 5), (1, 2, 6, 1), (3, 1, 2, 2), (2, 5, 1, 1)])
def test_cwd_equals_a_float64_loop(shape, tau):
    """Supplement: softmax of each map over its positions, tau^2 KL(teacher || student), mean over images and classes."""
    student, teacher = 2 * randn(*shape), 3 * randn(*shape, seed=1)
    loss = seg.cwd_loss(student, teacher, tau)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(plain_cwd(student, teacher, tau), rel=1e-5, abs=1e-6)
    assert (loss.item() > 0.01) == (shape[2:] != (1, 1))  # one position leaves nothing to distribute


def test_cwd_by_hand():
    """Supplement: teacher (3/4, 1/4) against a student of (1/2, 1/2): 3/4 log 3/2 + 1/4 log 1/2; tau is 1 by default."""
    teacher = torch.tensor([[[[math.log(3), 0.0]]]])
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert seg.cwd_loss(torch.zeros(1, 1, 1, 2), teacher).item() == pytest.approx(expected, rel=1e-6)
    # the other direction, 1/2 log(2/3) + 1/2 log 2, is another number
    assert abs(expected - 0.5 * math.log(4 / 3)) > 0.01


def test_cwd_is_zero_where_the_maps_agree():
    """Supplement: at equality the loss and its gradient vanish; elsewhere the loss is positive."""
    student, teacher = (3 * randn(2, 3, 4, 4).requires_grad_() for _ in range(2))
    leaf = student.detach().requires_grad_()
    loss = seg.cwd_loss(leaf, teacher.detach(), 2.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert leaf.grad.abs().max() < 1e-7
    assert seg.cwd_loss(leaf, teacher.detach() + 0.1 * randn(2, 3, 4, 4, seed=1)).item() > 1e-4


@pytest.mark.parametrize('side', [0, 1])
def test_a_constant_on_a_map_changes_nothing(side):
    """Supplement: only the distribution over positions counts: each map may have its own offset, in either network."""
    pair = [randn(2, 3, 4, 5, seed=k) for k in range(2)]
    expected = seg.cwd_loss(*pair).item()
    pair[side] = pair[side] + 5 * randn(2, 3, 1, 1, seed=2)
    assert seg.cwd_loss(*pair).item() == pytest.approx(expected, rel=1e-5)
    pair[side] = pair[side] + randn(1, 1, 4, 5, seed=3)  # the same for all classes, so none over these
    assert abs(seg.cwd_loss(*pair).item() - expected) > 0.1


@pytest.mark.parametrize('tau', [0.5, 4.0])
def test_temperature_divides_the_logits_and_its_square_multiplies_the_loss(tau):
    """Supplement: cwd(s, t, tau) = tau^2 cwd(s / tau, t / tau, 1)."""
    student, teacher = 2 * randn(2, 3, 4, 5), 2 * randn(2, 3, 4, 5, seed=1)
    expected = tau ** 2 * seg.cwd_loss(student / tau, teacher / tau, 1.0).item()
    assert seg.cwd_loss(student, teacher, tau).item() == pytest.approx(expected, rel=1e-5)


def test_at_a_high_temperature_the_gradient_is_that_of_a_distance():
    """Supplement: tau^2 keeps the gradient's size: it tends to the centred difference over positions, images, classes."""
    student, teacher = randn(2, 3, 4, 5).requires_grad_(), randn(2, 3, 4, 5, seed=1)
    seg.cwd_loss(student, teacher, 300.0).backward()
    difference = (student.detach() - teacher).double()
    expected = (difference - difference.mean(dim=(2, 3), keepdim=True)) / (4 * 5) / (2 * 3)
    torch.testing.assert_close(student.grad.double(), expected, rtol=0.02, atol=1e-4)
    assert expected.abs().max() > 0.01


@pytest.mark.parametrize('tau', [0.5, 1.0, 4.0])
def test_gradient_is_that_of_the_authors_cross_entropy(tau):
    """Authors' code: sum of -p_t log p_s, tau^2 / (C N): the same gradient; the value differs by the teacher's entropy."""
    student, teacher = (2 * randn(2, 3, 4, 5)).requires_grad_(), 2 * randn(2, 3, 4, 5, seed=1)
    loss = seg.cwd_loss(student, teacher, tau)
    loss.backward()
    theirs = student.detach().double().reshape(-1, 20).requires_grad_()
    target = torch.softmax(teacher.double().reshape(-1, 20) / tau, dim=1)
    entropy = -(target * target.log()).sum() * tau ** 2 / 6
    cross_entropy = torch.sum(-target * torch.log_softmax(theirs / tau, dim=1)) * tau ** 2 / 6
    cross_entropy.backward()
    torch.testing.assert_close(student.grad.double().reshape(-1, 20), theirs.grad, rtol=1e-4, atol=1e-7)
    assert loss.item() == pytest.approx((cross_entropy - entropy).item(), rel=1e-4)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('autocast', [False, True])
def test_losses_are_computed_in_float32(dtype, autocast):
    """Supplement's losses are taken in float32 whatever autocast made of the logits."""
    student, teacher = ((4 * randn(2, 3, 4, 5, seed=k)).to(dtype) for k in range(2))
    labels = torch.randint(0, 3, (2, 8, 10), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
        losses = seg.cwd_loss(student, teacher, 2.0), seg.pixel_loss(student, labels)
    assert {loss.dtype for loss in losses} == {torch.float32}
    assert losses[0].item() == pytest.approx(plain_cwd(student, teacher, 2.0), rel=1e-5)
    assert losses[1].item() == pytest.approx(plain_pixel_loss(student, labels), rel=1e-5)


@pytest.mark.parametrize('other', [(2, 3, 4, 6), (2, 4, 4, 5), (1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 5, 4), (2, 3, 20)])
def test_maps_of_another_shape_are_an_error(other):
    """Supplement: map for map; shapes that would broadcast or have as many numbers are refused, too."""
    for shapes in ((other, (2, 3, 4, 5)), ((2, 3, 4, 5), other)):
        with pytest.raises(ValueError, match='differ in shape'):
            seg.cwd_loss(*(torch.zeros(shape) for shape in shapes))


def test_cwd_is_a_mean_over_images_and_classes():
    """Supplement: a batch or a set of classes twice as large, of the same maps, costs the same."""
    pair = [randn(2, 3, 4, 5, seed=k) for k in range(2)]
    expected = seg.cwd_loss(*pair).item()
    for dim in (0, 1):
        twice = [torch.cat([logits, logits], dim=dim) for logits in pair]
        assert seg.cwd_loss(*twice).item() == pytest.approx(expected, rel=1e-6)
    parts = [seg.cwd_loss(*(logits[n:n + 1, c:c + 1] for logits in pair)).item() for n in range(2) for c in range(3)]
    assert expected == pytest.approx(sum(parts) / 6, rel=1e-5)


# --------------------------------------------------------------------------------------------------------- pixel loss


def plain_weights(length, wanted):
    """(wanted, length): rows of bilinear weights between pixel centres, the border pixels repeated beyond theirs."""
    weights = np.zeros((wanted, length))
    for i in range(wanted):
        position = max((i + 0.5) * length / wanted - 0.5, 0.0)
        low = min(int(position), length - 1)
        weights[i, low] += 1 - (position - low)
        weights[i, min(low + 1, length - 1)] += position - low
    return weights


def plain_resize(x, size):
    """(N, C, h, w) -> numpy (N, C, *size), float64."""
    rows, columns = (plain_weights(length, wanted) for length, wanted in zip(x.shape[2:], size))
    return np.einsum('ih,nchw,jw->ncij', rows, np.asarray(x.detach().double()), columns)


def plain_pixel_loss(logits, labels):
    """-log softmax at the label of each pixel that has one, over the number of all pixels."""
    enlarged, total = plain_resize(logits, labels.shape[1:]), 0.0
    for n, i, j in np.ndindex(*labels.shape):
        if labels[n, i, j] != 255:
            total -= math.log(softmax(enlarged[n, :, i, j].tolist())[int(labels[n, i, j])])
    return total / labels.numel()


@pytest.mark.parametrize('size', [(8, 8), (7, 11), (3, 2), (16, 5)])
@pytest.mark.parametrize('ignored', [0.0, 0.4])
def test_pixel_loss_equals_a_float64_loop(size, ignored):
    """Segmentation: logits are enlarged to the labels, bilinear; mean over all pixels, also the ignored ones."""
    logits = 3 * randn(2, 5, 4, 3)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 5, (2, *size), generator=generator, dtype=torch.uint8)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = 255
    loss = seg.pixel_loss(logits, labels)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(plain_pixel_loss(logits, labels), rel=1e-5)


def test_ignored_pixels_count_in_the_mean_and_teach_nothing():
    """Segmentation: as in mmsegmentation, a batch whose labels are half ignored weighs half."""
    logits, labels = randn(1, 3, 4, 4).requires_grad_(), torch.full((1, 4, 4), 2, dtype=torch.uint8)
    labels[:, :, 2:] = 255
    loss = seg.pixel_loss(logits, labels)
    half = seg.pixel_loss(logits[..., :2], labels[..., :2])
    assert loss.item() == pytest.approx(half.item() / 2, rel=1e-6)
    loss.backward()
    assert (logits.grad[..., 2:] == 0).all() and (logits.grad[..., :2] != 0).all()


def test_batch_without_a_labelled_pixel_costs_nothing():
    """Segmentation: a batch of nothing but ignored pixels gives 0 with zero gradients, no NaN."""
    logits = randn(2, 3, 4, 4).requires_grad_()
    loss = seg.pixel_loss(logits, torch.full((2, 8, 8), 255, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


# --------------------------------------------------------------------------------------------------- the training loop


class OneWeight(nn.Module):
    """A student of one weight w; maps of logits are parts of the image, at another resolution than the labels."""

    def __init__(self):
        super().__init__()
        self.w, self.seen, self.draws, self.autocast = nn.Parameter(torch.tensor(1.0)), [], [], []

    def forward(self, images):
        assert self.training
        self.seen.append(images)
        self.draws.append(torch.rand(()).item())
        self.autocast.append(torch.is_autocast_enabled('cpu'))
        return self.w * images[:, :2], self.w ** 2 * images[:, 1:, ::2, ::2]


class OneLook(nn.Module):
    """A teacher that nobody has frozen."""

    def __init__(self):
        super().__init__()
        self.v, self.seen, self.autocast = nn.Parameter(torch.tensor(2.0)), [], []

    def forward(self, images):
        self.seen.append(images)
        self.autocast.append(torch.is_autocast_enabled('cpu'))
        return self.v * images[:, [2, 0]]


class Recording(seg.Progress):
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


def small_steps(count):
    """Batches of images (2, 3, 4, 4) with labels (2, 6, 6) of two classes, some ignored."""
    labels = torch.arange(72).reshape(2, 6, 6) % 2
    return [(2 * randn(2, 3, 4, 4, seed=k), torch.where(randn(2, 6, 6, seed=k) < 1, labels, 255).to(torch.uint8))
            for k in range(count)]


def run_loop(steps, epoch=0, teacher=True, argv=(), **options):
    args = seg_args('--cwd_weight', '2.5', '--cwd_tau', '2', '--aux_weight', '0.3', '--eval_every', '3', *argv, **options)
    student, teacher = OneWeight().eval(), OneLook() if teacher else None
    progress, iterations = Recording(args), Iterations()
    stats = seg.train_one_epoch(student, teacher, steps, torch.optim.SGD(student.parameters(), lr=0.01), iterations,
                                NO_SCALER, progress, CPU, epoch, args)
    return student, teacher, progress, iterations, stats


def plain_terms(w, images, labels, teacher=True):
    """What a step of OneWeight against OneLook costs."""
    terms = {'loss_seg': plain_pixel_loss(w * images[:, :2], labels),
             'loss_aux': plain_pixel_loss(w ** 2 * images[:, 1:, ::2, ::2], labels)}
    loss = terms['loss_seg'] + 0.3 * terms['loss_aux']
    if teacher:
        terms['loss_cwd'] = plain_cwd(w * images[:, :2], 2 * images[:, [2, 0]], 2.0)
        loss += 2.5 * terms['loss_cwd']
    return {'loss': loss, **terms}


@pytest.mark.parametrize('accum_iter, teacher', [(1, True), (2, True), (1, False)])
def test_loss_and_updates_are_a_plain_loops(accum_iter, teacher):
    """Supplement: L = CE + 0.4 CE_aux + alpha CWD, of logits before they are enlarged; steps of an update are averaged."""
    steps = small_steps(3 * accum_iter)
    student, look, progress, iterations, stats = run_loop(steps, 2, teacher, accum_iter=accum_iter)
    assert iterations == [6, 7, 8]  # the third round of 3
    w, slope, h = 1.0, 0.0, 1e-4
    for step, ((images, labels), seen) in enumerate(zip(steps, progress.steps_seen, strict=True)):
        terms = plain_terms(w, images, labels, teacher)
        assert list(seen) == list(terms)
        assert seen == pytest.approx(terms, rel=1e-4)
        high, low = (plain_terms(w + move, images.double(), labels, teacher)['loss'] for move in (h, -h))
        slope += (high - low) / (2 * h) / accum_iter
        if step % accum_iter == accum_iter - 1:
            w, last, slope = w - 0.01 * slope, slope, 0.0
    assert abs(w - 1) > 1e-3
    assert student.w.item() == pytest.approx(w, rel=1e-5)
    assert progress.grad_norm.item() == pytest.approx(abs(last), rel=1e-3)
    assert student.w.grad is None
    for name in progress.steps_seen[0]:
        assert stats[f'train_{name}'] == pytest.approx(sum(row[name] for row in progress.steps_seen) / len(steps), rel=1e-6)
    if teacher:
        assert look.v.grad is None


def test_teacher_sees_the_student_s_images():
    """Segmentation: both see the same crops, under the same autocast."""
    student, teacher, *_ = run_loop(small_steps(2), amp='bf16')
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(student.seen, teacher.seen, strict=True))
    assert student.autocast == teacher.autocast == [True] * 2
    student, teacher, *_ = run_loop(small_steps(1))
    assert student.autocast == teacher.autocast == [False]


def test_gradient_is_clipped_to_the_given_norm():
    """README: --clip_grad is the largest gradient norm; the log shows the norm before."""
    free, clipped = (run_loop(small_steps(1), argv=argv) for argv in ((), ('--clip_grad', '0.01')))
    assert clipped[0].w.item() == pytest.approx(1 - 0.01 * math.copysign(0.01, 1 - free[0].w.item()), abs=1e-7)
    assert clipped[2].grad_norm.item() == pytest.approx(free[2].grad_norm.item(), rel=1e-6)
    assert free[2].grad_norm.item() > 0.02


def test_noise_of_a_step_depends_on_seed_round_step_and_process_alone():
    """Randomness: what a step draws is a function of (seed, epoch, step, rank), whatever was drawn before."""
    torch.manual_seed(1)
    first = run_loop(small_steps(3), epoch=1)[0].draws
    torch.manual_seed(2)
    assert run_loop(small_steps(3)[::-1], epoch=1)[0].draws == first
    others = [run_loop(small_steps(3), **{'epoch': 1, **option})[0].draws for option in (
        {'epoch': 2}, {'rank': 1}, {'seed': 1})]
    assert len({*first, *itertools.chain(*others)}) == 12


# --------------------------------------------------------------------------------------------------------- the backbone


def plain_attention_bias(table, side):
    """BEiT's tables (rows, heads) -> (heads, 1 + L, 1 + L): one number per displacement, three more with the class token."""
    length = side * side
    bias = torch.zeros(table.shape[1], length + 1, length + 1, dtype=table.dtype)
    bias[:, 0, 1:], bias[:, 1:, 0], bias[:, 0, 0] = table[-3, :, None], table[-2, :, None], table[-1]
    for query, key in itertools.product(range(length), repeat=2):
        down, right = query // side - key // side, query % side - key % side
        bias[:, query + 1, key + 1] = table[(down + side - 1) * (2 * side - 1) + right + side - 1]
    return bias


def plain_beit(state, images, patch, heads):
    """BEiT from a state dict, one operation after the other -> the patch tokens (N, D, side, side) after each block."""
    x = F.conv2d(images, state['patch_embed.proj.weight'], state['patch_embed.proj.bias'], stride=patch)
    n, dim, side, _ = x.shape
    x = torch.cat([state['cls_token'].expand(n, 1, dim), x.flatten(2).transpose(1, 2)], dim=1) + state['pos_embed']
    found = []
    for i in range(1 + max(int(name.split('.')[1]) for name in state if name.startswith('blocks.'))):
        own = {name.removeprefix(f'blocks.{i}.'): value for name, value in state.items() if name.startswith(f'blocks.{i}.')}
        y = F.layer_norm(x, (dim,), own['norm1.weight'], own['norm1.bias'], 1e-6)
        q, k, v = (y @ own['attn.qkv.weight'].T).chunk(3, dim=2)
        q, v = q + own['attn.q_bias'], v + own['attn.v_bias']
        q, k, v = (part.unflatten(2, (heads, dim // heads)).transpose(1, 2) for part in (q, k, v))
        bias = plain_attention_bias(own['attn.relative_position_bias_table'], side)
        y = ((q @ k.transpose(2, 3) / math.sqrt(dim // heads) + bias).softmax(dim=3) @ v).transpose(1, 2).flatten(2)
        x = x + own['gamma_1'] * (y @ own['attn.proj.weight'].T + own['attn.proj.bias'])
        y = F.layer_norm(x, (dim,), own['norm2.weight'], own['norm2.bias'], 1e-6)
        y = F.gelu(y @ own['mlp.fc1.weight'].T + own['mlp.fc1.bias'])
        x = x + own['gamma_2'] * (y @ own['mlp.fc2.weight'].T + own['mlp.fc2.bias'])
        found.append(x[:, 1:].transpose(1, 2).unflatten(2, (side, side)))
    return found


@pytest.mark.parametrize('depth, taps', [
    (12, [3, 5, 7, 11]), (24, [7, 11, 15, 23]), (32, [10, 15, 20, 31]), (6, [1, 2, 3, 5]), (4, [0, 1, 2, 3]),
    (2, [0, 0, 0, 1]), (1, [0, 0, 0, 0])])
def test_four_maps_are_the_states_after_these_blocks(monkeypatch, depth, taps):
    """Segmentation: blocks 3, 5, 7, 11 of 12, in proportion elsewhere; both kinds of positions, LayerScale, no norm."""
    net = filled(build(seg.Backbone, size_of(monkeypatch, depth) + '8', 24), std=0.2).double().eval()
    images = randn(2, 3, 24, 24).double()
    with torch.no_grad():
        maps, states = net(images), plain_beit(net.state_dict(), images, 8, 2)
    assert len(states) == depth
    assert [tuple(found.shape) for found in maps] == [(2, 32, 3, 3)] * 4
    for found, tap in zip(maps, taps, strict=True):
        torch.testing.assert_close(found, states[tap], atol=1e-9, rtol=1e-9)
    assert all((a - b).abs().max() > 0.1 for a, b in zip(states, states[1:]))


def test_relative_positions_are_each_block_s_own():
    """Segmentation: every block has a table of one number per head and displacement, and each of its numbers counts."""
    net = filled(build(seg.Backbone, 'vit_nano_patch8', 24)).double().train()
    tables = [block.attn.relative_position_bias_table for block in net.blocks]
    assert [tuple(table.shape) for table in tables] == [(25 + 3, 2)] * 4
    sum(found.square().sum() for found in net(randn(2, 3, 24, 24).double())).backward()
    for table in tables[:-1]:
        assert (table.grad != 0).all()
    # the class token's state after the last block is not used: what it looks at there is no one's concern
    used = tables[-1].grad != 0
    assert used[:25].all() and used[26].all() and not used[25].any() and not used[27].any()


def test_backbone_s_parameters_are_beits():
    """Segmentation: no parameter that the maps do not depend on: no final norm, fc_norm, head or bias of the keys."""
    net = build(seg.Backbone, 'vit_pico_patch8', 24)
    expected = {'cls_token': (1, 1, 32), 'pos_embed': (1, 10, 32), 'patch_embed.proj.weight': (32, 3, 8, 8),
                'patch_embed.proj.bias': (32,)}
    for i in range(2):
        inside = {'gamma_1': (32,), 'gamma_2': (32,), 'norm1.weight': (32,), 'norm1.bias': (32,), 'norm2.weight': (32,),
                  'norm2.bias': (32,), 'attn.q_bias': (32,), 'attn.v_bias': (32,), 'attn.qkv.weight': (96, 32),
                  'attn.relative_position_bias_table': (28, 2), 'attn.proj.weight': (32, 32), 'attn.proj.bias': (32,),
                  'mlp.fc1.weight': (128, 32), 'mlp.fc1.bias': (128,), 'mlp.fc2.weight': (32, 128), 'mlp.fc2.bias': (32,)}
        expected.update({f'blocks.{i}.{name}': shape for name, shape in inside.items()})
    assert {name: tuple(parameter.shape) for name, parameter in net.named_parameters()} == expected
    assert set(net.state_dict()) == set(expected)
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_backbone_starts_from_beits_values():
    """Segmentation: LayerScale 1, relative positions and biases 0, weights and positions 0.02 (BEiT)."""
    net = build(seg.Backbone, 'vit_micro_patch16', 64)
    for i, block in enumerate(net.blocks):
        assert (block.gamma_1 == 1).all() and (block.gamma_2 == 1).all()
        for zero in (block.attn.relative_position_bias_table, block.attn.q_bias, block.attn.v_bias, block.attn.k_bias,
                     block.attn.proj.bias, block.mlp.fc1.bias, block.mlp.fc2.bias):
            assert (zero == 0).all()
        depth_scale = math.sqrt(2 * (i + 1))  # of the layers that end a branch
        for layer, std in ((block.attn.qkv, 0.02), (block.mlp.fc1, 0.02), (block.attn.proj, 0.02 / depth_scale),
                           (block.mlp.fc2, 0.02 / depth_scale)):
            assert layer.weight.std().item() == pytest.approx(std, rel=0.03)
    assert net.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert net.cls_token.std().item() == pytest.approx(0.02, rel=0.3)


def test_drop_path_grows_linearly_to_the_given_rate(monkeypatch):
    """Supplement: drop path 0.1: stochastic depth that is zero in the first block and the given rate in the last."""
    name = size_of(monkeypatch, 12) + '16'
    for model in (build(seg.Backbone, name, 32, 0.1), build(seg.Segmenter, name, 3, 32, 0.1).backbone):
        for branch in ('drop_path1', 'drop_path2'):
            rates = [getattr(getattr(block, branch), 'drop_prob', 0.0) for block in model.blocks]
            assert rates == pytest.approx([0.1 * i / 11 for i in range(12)], abs=1e-7)
    for model in (build(seg.Backbone, name, 32), build(seg.Segmenter, name, 3, 32).backbone):
        assert not any(getattr(module, 'drop_prob', 0.0) for module in model.modules())
    assert not any(module.p for module in model.modules() if isinstance(module, nn.Dropout))


def test_names_and_sizes_that_cannot_work_are_refused():
    """README: the backbone is named vit_...; the input is a multiple of the patch, 2x2 of them or more, and stays that."""
    assert 'autoencoder' in refusal(seg.Backbone, 'mae_vit_pico_patch8', 24)
    assert 'divisible' in refusal(seg.Backbone, 'vit_pico_patch8', 20)
    assert '2x2 patches' in refusal(seg.Segmenter, 'vit_pico_patch16', 3, 16)
    net = build(seg.Backbone, 'vit_pico_patch8', 16).eval()
    with pytest.raises(AssertionError):
        net(torch.zeros(1, 3, 24, 24))


# -------------------------------------------------------------------------------------------------------- start weights


def noise_like(model, seed=0):
    """The model's state dict with every entry random: no two entries are the same."""
    entries = enumerate(model.state_dict().items())
    return {name: 0.3 * randn(*value.shape, seed=1000 * seed + k) for k, (name, value) in entries}


def plain_vit(size=64, **options):
    """timm's own ViT of the size of vit_nano_patch16."""
    return VisionTransformer(img_size=size, patch_size=16, embed_dim=64, depth=4, num_heads=2,
                             **{'num_classes': 0, 'global_pool': 'token', **options})


def prefixed(prefix, state, seed=0):
    """Keys with a prefix; another seed gives other numbers, which must not be taken."""
    return {prefix + name: value if not seed else randn(*value.shape, seed=seed) for name, value in state.items()}


def head(*names):
    return {f'{name}.{part}': torch.ones(*shape) for name in names for part, shape in (('weight', (9, 64)), ('bias', (9,)))}


def decoder(target_dim=None):
    """What an MAE, or with `target_dim` a G2SD student, has besides its encoder."""
    state = noise_like(models.create_mae('mae_vit_nano_patch16', 64, target_dim), 3)
    return {name: value for name, value in state.items() if name.startswith(('decoder', 'mask_token', 'feature_head'))}


def authors_student():
    """Both heads of the G2SD authors' student, and MAE's own, which they keep."""
    heads = {f'{name}.fc{k}.{part}': torch.ones(64) for name in ('decoderfeature_pred', 'encoderfeature_pred')
             for k in (1, 2) for part in ('weight', 'bias')}
    return {**heads, **decoder()}


def with_distillation_token(state):
    """DeiT's distilled network: a second token, and its position as the second row."""
    rows = state['pos_embed']
    return {**state, 'dist_token': torch.ones(1, 1, 64), **head('head', 'head_dist'),
            'pos_embed': torch.cat([rows[:, :1], torch.full((1, 1, 64), 7.0), rows[:, 1:]], dim=1)}


def pooled(state):
    """MAE's fine-tuned classifier: fc_norm in the place of norm."""
    return {**{name.replace('norm.', 'fc_norm.') if name.startswith('norm.') else name: value
               for name, value in state.items()}, **head('head')}


HUGGING_FACE = {
    'patch_embed.proj.': 'embeddings.patch_embeddings.projection.', 'pos_embed': 'embeddings.position_embeddings',
    'cls_token': 'embeddings.cls_token', 'blocks.': 'encoder.layer.', 'norm1.': 'layernorm_before.',
    'norm2.': 'layernorm_after.', 'attn.proj.': 'attention.output.dense.', 'mlp.fc1.': 'intermediate.dense.',
    'mlp.fc2.': 'output.dense.', 'attn.qkv.': 'attention.attention.{}.'}


def hugging_face(state):
    """ViTMAE's names on the hub: query, key and value apart."""
    renamed = {}
    for name, value in state.items():
        name = name.replace('norm.', 'layernorm.') if name.startswith('norm.') else name
        for ours, theirs in HUGGING_FACE.items():
            name = name.replace(ours, theirs)
        for part, piece in zip(('query', 'key', 'value'), value.split(64) if '{}' in name else [value]):
            renamed['vit.' + name.format(part)] = piece
    return renamed


MAE_PARTS = ['decoder_blocks', 'decoder_embed', 'decoder_norm', 'decoder_pos_embed', 'decoder_pred', 'mask_token']
G2SD_PARTS = ['decoder_blocks', 'decoder_embed', 'decoder_pos_embed', 'feature_head', 'mask_token']
DINO_HEAD = {'head.mlp.0.weight': torch.ones(8, 64), 'head.last_layer.weight_g': torch.ones(8, 1)}
# name -> (what the encoder becomes in the file, parts of it that are left out besides norm and the bias of the keys)
FILES = {
    'DeiT': (lambda e: {'model': {**e, **head('head')}}, ['head']),
    'DeiT distilled': (lambda e: {'model': with_distillation_token(e)}, ['dist_token', 'head', 'head_dist']),
    'classifier with global pooling': (lambda e: {'model': pooled(e), 'epoch': 99}, ['fc_norm', 'head']),
    'DINO, bare': (lambda e: e, []),
    'DINO, teacher': (lambda e: {'student': prefixed('module.backbone.', {**e, **DINO_HEAD}, 9), 'epoch': 300,
                                 'teacher': {**prefixed('backbone.', e), **DINO_HEAD}}, ['head']),
    'DINO, teacher in DDP': (lambda e: {'teacher': prefixed('module.backbone.', e)}, []),
    'DINO, student': (lambda e: {
        'student': {**prefixed('module.backbone.', e), **prefixed('module.', DINO_HEAD)}}, ['head']),
    'iBOT': (lambda e: {'state_dict': {**e, 'masked_embed': torch.ones(1, 64)}}, ['masked_embed']),
    'MAE, encoder': (lambda e: {'model': e}, []),
    'MAE, full': (lambda e: {'model': {**e, **decoder()}}, MAE_PARTS),
    'Hugging Face': (hugging_face, []),
    'timm': (lambda e: {**e, **head('head')}, ['head']),
    'G2SD': (lambda e: {'model': {**e, **decoder(48)}, 'epoch': 299, 'args': {}}, G2SD_PARTS),
    "G2SD, the authors'": (lambda e: {'model': {**e, **authors_student()}}, G2SD_PARTS),
}
NEW = [f'blocks.{i}.{name}' for i in range(4) for name in ('gamma_1', 'gamma_2', 'attn.relative_position_bias_table')]


def states_of(vit, images):
    """The patch tokens (N, D, side, side) that timm's own forward pass makes, after each block."""
    kept, side = [kept_outputs(block) for block in vit.blocks], vit.patch_embed.grid_size[0]
    with torch.no_grad():
        vit.forward_features(images)
    return [output[:, 1:].transpose(1, 2).unflatten(2, (side, side)) for [output] in kept]


def assert_maps_of(net, vit, images):
    expected = states_of(vit.double().eval(), images.double())
    with torch.no_grad():
        maps = net.double().eval()(images.double())
    for found, tap in zip(maps, net.taps, strict=True):
        torch.testing.assert_close(found, expected[tap], atol=1e-10, rtol=1e-10)
    assert expected[0].std() > 0.1


@pytest.mark.parametrize('layout', FILES)
def test_each_kind_of_file_starts_the_backbone(tmp_path, capsys, layout):
    """README: --finetune reads each of these files; relative positions 0 and LayerScale 1 make the maps the plain ViT's."""
    encoder = noise_like(plain_vit())
    wrap, extra = FILES[layout]
    torch.save(wrap(encoder), tmp_path / 'file.pth')
    net = build(seg.Backbone, 'vit_nano_patch16', 64)
    loaded = models.load_pretrained(net, tmp_path / 'file.pth')
    reference = plain_vit()
    reference.load_state_dict(encoder, strict=True)
    assert reference.blocks[0].attn.qkv.bias[64:128].abs().min() > 1e-5  # the keys have a bias there
    assert_maps_of(net, reference, randn(2, 3, 64, 64))
    assert sorted(loaded.new) == sorted(NEW)
    assert sorted([*loaded.new, *loaded.used]) == sorted(net.state_dict())
    left_out = {re.sub(r'^blocks\.\d+\.attn\.|\..*', '', name) for name in loaded.left_out}
    norm = [] if 'fc_norm' in extra else ['norm']
    assert left_out == {*norm, 'k_bias', *extra}
    assert sum(name.endswith('attn.k_bias') for name in loaded.left_out) == 4
    line = capsys.readouterr().out
    assert line.count('\n') == 1
    new, left = re.search(r'new: (.*?); left out: (.*)\n', line).groups()
    assert sorted(new.split(', ')) == ['gamma_1', 'gamma_2', 'relative_position_bias_table']
    assert set(left.split(', ')) == left_out


@pytest.mark.parametrize('target_dim', [None, 48])
def test_mae_and_stage_1_s_student_give_the_maps_of_their_encoder(monkeypatch, tmp_path, target_dim):
    """Segmentation: at twelve blocks, maps are states 3, 5, 7, 11 of the encoder of an MAE or a G2SD student."""
    size_of(monkeypatch, 12)
    mae = filled(build(models.create_mae, 'mae_vit_thin_patch8', 24, target_dim))
    torch.save({'model': mae.state_dict(), 'epoch': 1}, tmp_path / 'mae.pth')
    net = filled(build(seg.Backbone, 'vit_thin_patch8', 24)).eval()
    with torch.no_grad():
        for block in net.blocks:
            for value, start in ((block.attn.relative_position_bias_table, 0.0), (block.gamma_1, 1.0), (block.gamma_2, 1.0)):
                value.fill_(start)
    models.load_pretrained(net, tmp_path / 'mae.pth')
    vit = models.create_vit('vit_thin_patch8', 0, 24)
    own = set(vit.state_dict())
    vit.load_state_dict({name: value for name, value in mae.state_dict().items() if name in own}, strict=True)
    assert net.taps == [3, 5, 7, 11]
    assert_maps_of(net, vit, randn(2, 3, 24, 24))


def test_bias_of_the_keys_changes_no_state():
    """Segmentation: a number that the softmax removes; that of queries and of values does change the states."""
    state = noise_like(plain_vit())
    images, results = randn(1, 3, 64, 64).double(), []
    for part in (None, 1, 0, 2):
        vit, changed = plain_vit().double().eval(), dict(state)
        for i in range(4) if part is not None else ():
            changed[f'blocks.{i}.attn.qkv.bias'] = state[f'blocks.{i}.attn.qkv.bias'].clone()
            changed[f'blocks.{i}.attn.qkv.bias'][64 * part:64 * part + 64] = 0
        vit.load_state_dict(changed)
        results.append(states_of(vit, images)[-1])
    torch.testing.assert_close(results[1], results[0], atol=1e-10, rtol=1e-10)
    assert all((result - results[0]).abs().max() > 1e-3 for result in results[2:])


@pytest.mark.parametrize('layout', ['MAE, encoder', 'DeiT distilled'])
@pytest.mark.parametrize('size, side', [(32, 2), (224, 14)])
def test_positions_of_another_input_size_are_resized(tmp_path, capsys, layout, size, side):
    """README: positions of another input size are resized, bicubic, and that is said; the class token's stays."""
    encoder = noise_like(plain_vit(size))
    torch.save(FILES[layout][0](encoder), tmp_path / 'file.pth')
    net = build(seg.Backbone, 'vit_nano_patch16', 96)
    loaded = models.load_pretrained(net, tmp_path / 'file.pth')
    table = encoder['pos_embed'][0, 1:].reshape(side, side, 64).permute(2, 0, 1)[None]
    table = F.interpolate(table, size=(6, 6), mode='bicubic', align_corners=False)[0].permute(1, 2, 0)
    torch.testing.assert_close(net.pos_embed[0, 1:].detach(), table.reshape(36, 64), atol=1e-6, rtol=0)
    assert torch.equal(net.pos_embed[0, 0], encoder['pos_embed'][0, 0])
    assert f'pos_embed {side}x{side} -> 6x6' in loaded.resized
    assert f'pos_embed {side}x{side} -> 6x6' in capsys.readouterr().out


@pytest.mark.parametrize('change, word', [
    (lambda e: e.update(extra=torch.zeros(3)), 'extra'),
    (lambda e: e.update({'blocks.4.norm1.weight': torch.zeros(64)}), 'blocks.4.norm1.weight'),
    (lambda e: e.update({'decode_head.weight': torch.zeros(64)}), 'decode_head.weight'),
    (lambda e: e.update({'blocks.4.attn.qkv.bias': torch.zeros(192)}), 'blocks.4.attn.qkv.bias'),
    (lambda e: [e.pop(name) for name in list(e) if name.startswith('blocks.3.')], 'blocks.3.norm1.weight'),
    (lambda e: e.pop('blocks.0.attn.qkv.bias'), 'blocks.0.attn.q_bias'),
    (lambda e: e.pop('pos_embed'), 'pos_embed'),
    (lambda e: e.pop('cls_token'), 'cls_token'),
    (lambda e: e.update(pos_embed=torch.zeros(1, 16, 64)), '16 rows'),
    (lambda e: e.update({'patch_embed.proj.weight': torch.zeros(64, 3, 8, 8)}), 'proj.weight is (64, 3, 8, 8)'),
    (lambda e: e.update({'blocks.0.gamma_1': torch.zeros(32)}), 'gamma_1 is (32,)'),
    (lambda e: e.update({name: torch.zeros(*(2 * n if n in (64, 192, 256) else n for n in value.shape))
                         for name, value in list(e.items())}), '128)')])
def test_start_weights_of_another_network_are_refused(tmp_path, change, word):
    """README: --finetune is strict: an unknown entry, a missing block or another width is one line."""
    encoder = noise_like(plain_vit())
    change(encoder)
    torch.save({'model': encoder}, tmp_path / 'file.pth')
    message = refusal(models.load_pretrained, build(seg.Backbone, 'vit_nano_patch16', 64), tmp_path / 'file.pth')
    assert word in message and str(tmp_path / 'file.pth') in message


@pytest.mark.parametrize('shape', [(), (0,), (1,), (2,), (4,), (64,), (191,), (190,), (193,), (384,), (1, 192), (192, 1)])
def test_bias_of_another_shape_is_refused(tmp_path, shape):
    """README: a damaged file is one line, not a traceback: a bias that is not three times the width."""
    encoder = noise_like(plain_vit())
    encoder['blocks.1.attn.qkv.bias'] = torch.ones(shape)
    torch.save({'model': encoder}, tmp_path / 'file.pth')
    message = refusal(models.load_pretrained, build(seg.Backbone, 'vit_nano_patch16', 64), tmp_path / 'file.pth')
    assert re.search(r'blocks\.1\.attn\.(qkv\.bias|[qv]_bias)', message)


@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('head', ['rpn.head.conv.0.0.weight', 'decode_head.conv_seg.weight'])
def test_whole_networks_are_no_start_weights(tmp_path, head, prefix):
    """README: --finetune takes encoders; a network for detection or segmentation is named as what it is."""
    state = {f'{prefix}backbone.{name}': value for name, value in plain_vit().state_dict().items()}
    torch.save({'model': {**state, prefix + head: torch.zeros(1)}}, tmp_path / 'file.pth')
    message = refusal(models.load_pretrained, build(seg.Backbone, 'vit_nano_patch16', 64), tmp_path / 'file.pth')
    assert message.startswith(f'{tmp_path / "file.pth"} is a network for detection or segmentation')


def test_a_failed_start_changes_no_weight(tmp_path):
    """README: --finetune is strict: what is refused has not been loaded in part."""
    net = build(seg.Backbone, 'vit_nano_patch16', 64)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    torch.save({**noise_like(plain_vit()), 'extra': torch.zeros(1)}, tmp_path / 'file.pth')
    refusal(models.load_pretrained, net, tmp_path / 'file.pth')
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# ------------------------------------------------------------------------------------------------------- neck and heads


SIDES = {'even': [(16, 16), (8, 8), (4, 4), (2, 2)], 'odd': [(13, 10), (7, 5), (3, 2), (2, 1)],
         'wide': [(9, 28), (9, 14), (5, 7), (4, 3)], 'small': [(4, 4), (2, 2), (1, 1), (1, 1)]}


def four_maps(kind, dim, images=3):
    return [randn(images, dim, *side, seed=k).double() for k, side in enumerate(SIDES[kind])]


def transformers_head(kind, dim, classes):
    """UPerNet's or FCN's head of the library transformers, and how our head calls its parts."""
    pytest.importorskip('transformers')
    from transformers import UperNetConfig
    from transformers.models.upernet import modeling_upernet
    config = UperNetConfig(hidden_size=dim, num_labels=classes, pool_scales=[1, 2, 3, 6], auxiliary_channels=256,
                           auxiliary_in_channels=dim, auxiliary_num_convs=1, auxiliary_concat_input=False)
    if kind is seg.UPerNet:
        theirs = modeling_upernet.UperNetHead(config, in_channels=[dim] * 4)
    else:
        theirs = modeling_upernet.UperNetFCNHead(config, in_channels=[dim] * 4, in_index=2)

    def rename(name):
        name = name.replace('convs.0.', 'conv.', 1) if kind is seg.FCN else name
        return re.sub(r'\.conv\.(?=weight)', '.0.', name).replace('.batch_norm.', '.1.').replace('classifier.', 'conv_seg.')

    return theirs, rename


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('sides', SIDES)
@pytest.mark.parametrize('kind', [seg.UPerNet, seg.FCN])
def test_head_equals_that_of_transformers(kind, sides, training):
    """BEiT: UPerNet (pool scales 1, 2, 3, 6) and the auxiliary FCN: outputs, gradients and statistics on equal weights."""
    theirs, rename = transformers_head(kind, 8, 5)
    theirs, ours = filled(theirs, 1, 0.3).double().train(training), kind(8, 5).double()
    expected_names = {rename(name): value.clone() for name, value in theirs.state_dict().items()}
    ours.load_state_dict(expected_names, strict=True)
    (without_dropout if training else nn.Module.eval)(ours)
    maps = [part.requires_grad_() for part in four_maps(sides, 8)]
    copies = [part.detach().requires_grad_() for part in maps]
    found, expected = ours(maps), theirs(copies)
    assert found.shape == (3, 5, *SIDES[sides][0 if kind is seg.UPerNet else 2])
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    found.sin().sum().backward()
    expected.sin().sum().backward()
    for ours_part, theirs_part in zip(maps, copies):
        if theirs_part.grad is None:
            assert ours_part.grad is None
        else:
            torch.testing.assert_close(ours_part.grad, theirs_part.grad, atol=1e-9, rtol=1e-7)
    after = ours.state_dict()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(after[rename(name)], value, atol=1e-12, rtol=1e-10)
        assert not (training and 'running_' in name and torch.equal(value, expected_names[rename(name)]))


def test_heads_of_the_paper_s_size_have_as_many_parameters_as_those_of_transformers():
    """BEiT: both heads as wide as the backbone or 256, at 384, 768 and 150 classes."""
    for dim, kind in itertools.product((384, 768), (seg.UPerNet, seg.FCN)):
        with torch.device('meta'):
            (theirs, rename), ours = transformers_head(kind, dim, 150), kind(dim, 150)
        assert {rename(name): tuple(value.shape) for name, value in theirs.named_parameters()} == {
            name: tuple(value.shape) for name, value in ours.named_parameters()}


@pytest.mark.parametrize('training', [False, True])
def test_neck_equals_plain_operations(training):
    """BEiT: twice a transposed convolution with batch norm and GELU between, once, as it is, a maximum of 2x2."""
    neck = filled(tiny_segmenter().neck, std=0.5).double().train(training)
    x = randn(2, 32, 3, 3).double()
    weights = {name: value.clone() for name, value in neck.state_dict().items()}
    found = [part(x) for part in neck]

    def double(x, name):
        return F.conv_transpose2d(x, weights[f'{name}.weight'], weights[f'{name}.bias'], stride=2)

    y = double(x, '0.0')
    mean, var = (y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)) if training else (
        weights['0.1.running_mean'], weights['0.1.running_var'])
    mean, var, weight, bias = (part[:, None, None] for part in (mean, var, weights['0.1.weight'], weights['0.1.bias']))
    y = (y - mean) / torch.sqrt(var + 1e-5) * weight + bias
    y = double(y * 0.5 * (1 + torch.erf(y / math.sqrt(2))), '0.3')
    expected = [y, double(x, '1'), x, x[:, :, :2, :2].amax(dim=(2, 3), keepdim=True)]
    assert [tuple(part.shape[2:]) for part in found] == [(12, 12), (6, 6), (3, 3), (1, 1)]
    for part, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(part, wanted, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize('name, size, side', [
    ('vit_pico_patch8', 16, 2), ('vit_nano_patch16', 96, 6), ('vit_pico_patch4', 20, 5)])
def test_strides_and_shapes(name, size, side):
    """Segmentation: maps at 1/4, 1/2, 1 and 2 patches; logits at a quarter patch, the auxiliary ones at a patch."""
    model = build(seg.Segmenter, name, 7, size)
    seen = []
    model.decode_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images, dim = randn(2, 3, size, size), model.backbone.embed_dim
    logits, aux_logits = model.train()(images)
    assert [tuple(part.shape) for part in seen[0]] == [
        (2, dim, 4 * side, 4 * side), (2, dim, 2 * side, 2 * side), (2, dim, side, side), (2, dim, side // 2, side // 2)]
    assert logits.shape == (2, 7, 4 * side, 4 * side)
    assert aux_logits.shape == (2, 7, side, side)
    with torch.no_grad():
        answer = model.eval()(images)
    assert isinstance(answer, torch.Tensor) and answer.shape == logits.shape


def test_forward_is_backbone_neck_and_heads():
    """Segmentation: each map through its own part of the neck, all four to UPerNet, the third to the auxiliary head."""
    model = filled(tiny_segmenter(), std=0.2).double()
    # blocks 0, 0, 0 and 1 of two: as different maps, these tell which goes where
    images, maps = randn(2, 3, 16, 16).double(), [randn(2, 32, 2, 2, seed=k).double() for k in range(4)]
    model.backbone.forward = lambda images: list(maps)
    without_dropout(model)
    logits, aux_logits = model(images)
    levels = [part(x) for part, x in zip(model.neck, maps)]
    torch.testing.assert_close(logits, model.decode_head(levels), atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(aux_logits, model.auxiliary_head([None, None, maps[2], None]), atol=1e-10, rtol=1e-10)
    model.eval()
    calls = kept_outputs(model.auxiliary_head)
    logits = model(images)
    torch.testing.assert_close(logits, model.decode_head([part(x) for part, x in zip(model.neck, maps)]))
    assert not calls  # for training only


@pytest.mark.parametrize('kind', [seg.UPerNet, seg.FCN])
def test_heads_drop_a_tenth_of_the_channels_before_the_classifier(kind):
    """BEiT: dropout 0.1 in both heads, of whole channels, in training alone."""
    module, seen = filled(kind(16, 3)), []
    assert [part.p for part in module.modules() if isinstance(part, nn.modules.dropout._DropoutNd)] == [0.1]
    before = kept_outputs(module.fpn_bottleneck if kind is seg.UPerNet else module.conv)
    module.conv_seg.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    maps = [part.float() for part in four_maps('even', 16, 40)]
    torch.manual_seed(0)
    module.train()(maps)
    ratio = (seen[0] / before[0])[before[0] > 0]
    assert ((ratio == 0) | ((ratio - 1 / 0.9).abs() < 1e-4)).all()
    alive = (before[0] > 0).flatten(2).any(dim=2)
    dropped = (seen[0] == 0).flatten(2).all(dim=2) & alive
    assert dropped.sum().item() / alive.sum().item() == pytest.approx(0.1, abs=0.05)
    module.eval()(maps)
    assert torch.equal(seen[1], before[1])


def test_heads_start_from_mmsegmentations_values():
    """BEiT: convolutions kaiming normal over what they feed, batch norm 1 and 0, the classifiers 0.01 and 0."""
    model = build(seg.Segmenter, 'vit_nano_patch8', 150, 16)
    for head_module in (model.decode_head, model.auxiliary_head):
        assert head_module.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert (head_module.conv_seg.bias == 0).all()
        convolutions = [module for module in head_module.modules()
                        if isinstance(module, nn.Conv2d) and module is not head_module.conv_seg]
        assert len(convolutions) == (12 if head_module is model.decode_head else 1)
        for module in convolutions:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.bias is None
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.06)
            # a normal one: 68.3 % within one deviation (a uniform one has 57.7 %)
            inside = (module.weight.abs() < math.sqrt(2 / fan_out)).float().mean().item()
            assert inside == pytest.approx(0.683, abs=0.03)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 1 + 12 + 1
    for module in norms:
        assert (module.weight == 1).all() and (module.bias == 0).all() and (module.eps, module.momentum) == (1e-5, 0.1)


# what they add to a whole map, the batch norm behind them, or behind a lateral 1x1 convolution, takes off again
BEFORE_BATCH_NORM = {'neck.0.0.bias', 'neck.0.3.bias', 'neck.1.bias'}


def test_every_parameter_gets_a_gradient():
    """README: under DDP every parameter needs a gradient in every step, also where no pixel has a label."""
    model = filled(tiny_segmenter(), std=0.02)
    images, labels = tiny_batch()
    for ignored in (False, True):
        without_dropout(model).zero_grad(set_to_none=True)
        logits, aux_logits = model(images)
        labels = torch.full_like(labels, 255) if ignored else labels
        (seg.pixel_loss(logits, labels) + 0.4 * seg.pixel_loss(aux_logits, labels)).backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
        if not ignored:
            zero = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 1e-9]
            assert set(zero) <= BEFORE_BATCH_NORM
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_gradient_of_the_distillation_reaches_the_student_alone():
    """Segmentation: CWD teaches main head, neck and backbone; neither the auxiliary head nor the teacher."""
    teacher = filled(tiny_segmenter(1), 1, 0.2).eval().requires_grad_(False)
    student = without_dropout(filled(tiny_segmenter(2), 2, 0.2))
    images, _ = tiny_batch()
    seg.cwd_loss(student(images)[0], teacher(images)).backward()
    # an offset of a whole map changes nothing
    assert student.decode_head.conv_seg.bias.grad.abs().max() < 1e-6
    for name, parameter in student.named_parameters():
        assert (parameter.grad is None) == name.startswith('auxiliary_head.'), name
    assert student.backbone.blocks[0].attn.qkv.weight.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_bf16_agrees_with_float32():
    """README: --amp bf16: the network runs under autocast, forwards and backwards, and gives about the same logits."""
    model = filled(tiny_segmenter(), std=0.05).eval()
    seen = kept_outputs(model.decode_head.fpn_bottleneck)
    images, labels = tiny_batch()
    with torch.no_grad():
        exact = model(images)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            rough = model(images)
    assert [part.dtype for part in seen] == [torch.float32, torch.bfloat16]
    assert F.cosine_similarity(rough.float().flatten(), exact.flatten(), dim=0).item() > 0.999
    assert (rough.float() - exact).abs().max() < 0.05 * exact.abs().max()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        logits, aux_logits = model.train()(images)
        loss = seg.pixel_loss(logits, labels) + seg.pixel_loss(aux_logits, labels)
    loss.backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.dtype == torch.float32 for parameter in model.parameters())


# --------------------------------------------------------------------------------------------------------- optimisation


def expected_scale(name, depth=12, decay=0.75):
    if name in ('backbone.cls_token', 'backbone.pos_embed') or name.startswith('backbone.patch_embed.'):
        return decay ** (depth + 1)
    if name.startswith('backbone.blocks.'):
        return decay ** (depth - int(name.split('.')[2]))
    assert name.split('.')[0] in ('neck', 'decode_head', 'auxiliary_head')
    return 1.0


def group_of(optimizer, model):
    """Parameter name -> its optimizer group; every parameter is in exactly one."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [(names[id(parameter)], group) for group in optimizer.param_groups for parameter in group['params']]
    assert sorted(name for name, _ in found) == sorted(names.values())
    return dict(found)


def is_undecayed(name, parameter):
    return parameter.ndim == 1 or name.endswith(('cls_token', 'pos_embed', 'relative_position_bias_table'))


def test_layer_decay_and_weight_decay_of_each_parameter():
    """Supplement: 0.75^(12 - i) per block, 0.75^13 for the stem, 1 behind it; no decay on 1-D, tokens and positions."""
    with torch.device('meta'):
        model = seg.Segmenter('vit_small_patch16', 150, 512, 0.1)
    groups = group_of(create_optimizer_v2(model, opt='adamw', lr=2e-4, weight_decay=0.05, layer_decay=0.75), model)
    for name, parameter in model.named_parameters():
        assert groups[name]['lr_scale'] == pytest.approx(expected_scale(name), rel=1e-9), name
        assert groups[name]['weight_decay'] == (0.0 if is_undecayed(name, parameter) else 0.05), name
    assert groups['backbone.blocks.11.mlp.fc1.weight']['lr_scale'] == pytest.approx(0.75)
    assert groups['backbone.blocks.0.attn.relative_position_bias_table']['lr_scale'] == pytest.approx(0.75 ** 12)
    assert min(group['lr_scale'] for group in groups.values()) == groups['backbone.cls_token']['lr_scale']
    assert sum(name.endswith('relative_position_bias_table') for name in groups) == 12


class FewImages(torch.utils.data.Dataset):
    """What SegmentationDataset gives in training: sampled as (pass, index)."""

    def __len__(self):
        return 2

    def __getitem__(self, key):
        images, labels = tiny_batch()
        return images[key[1]], labels[key[1]]


class Stop(Exception):
    pass


def main_with(monkeypatch, folder, *argv):
    """Runs main on two images, without reading or evaluating data. Returns a dict that holds what it built."""
    caught = {}

    def build_data(args):
        caught['args'] = args
        sampler = models.RoundSampler(2, args)
        return torch.utils.data.DataLoader(FewImages(), args.batch_size, sampler=sampler), None, CLASSES

    def create_optimizer(model, **options):
        caught.update(model=model, optimizer=create_optimizer_v2(model, **options))
        return caught['optimizer']

    monkeypatch.setattr(seg, 'build_data', build_data)
    monkeypatch.setattr(seg, 'create_optimizer_v2', create_optimizer)
    monkeypatch.setattr(seg, 'evaluate', lambda *args: caught.setdefault('evaluated', []).append(args[0]) or {})
    args = [*TINY, '--data_path', 'nowhere', '--output_dir', str(folder / 'out'), *argv]
    caught['run'] = lambda: seg.main(seg.get_args_parser().parse_args(args))
    return caught


def stop_before_training(monkeypatch, caught):
    """Runs main up to its first round; adds the teacher and the scheduler to what was caught."""
    def train_one_epoch(model, teacher, loader, optimizer, scheduler, *rest):
        caught.update(teacher=teacher, scheduler=scheduler)
        raise Stop

    monkeypatch.setattr(seg, 'train_one_epoch', train_one_epoch)
    with pytest.raises(Stop):
        caught['run']()
    return caught


def rate(t, total, warmup, lr):
    """t from 0; linear from a millionth of lr to lr over the warm-up, then on the line from lr at 0 to 0 at the end."""
    return lr * (1e-6 + (1 - 1e-6) * t / warmup) if t < warmup else lr * (total - t) / total


@pytest.mark.parametrize('total, warmup, eval_every, accum', [(25, 4, 25, 1), (20, 7, 8, 2), (11, 0, 4, 1), (6, 5, 9, 1)])
def test_learning_rate_of_every_iteration(monkeypatch, tmp_path, total, warmup, eval_every, accum):
    """BEiT: linear warm-up from a millionth, then poly of power 1 to 0, times each layer's scale."""
    rates = []

    def forward(self, images):
        nothing = 0 * sum(parameter.sum() for parameter in self.parameters())
        return nothing + torch.zeros(2, 3, 8, 8), nothing + torch.zeros(2, 3, 2, 2)

    def add(self, optimizer, **terms):
        original(self, optimizer, **terms)
        rates.append([group['lr'] / group['lr_scale'] for group in optimizer.param_groups])

    original = seg.Progress.add
    monkeypatch.setattr(seg.Segmenter, 'forward', forward)
    monkeypatch.setattr(seg.Progress, 'add', add)
    caught = main_with(monkeypatch, tmp_path, '--iterations', str(total), '--warmup_iterations', str(warmup),
                       '--lr', '0.002', '--eval_every', str(eval_every), '--accum_iter', str(accum))
    caught['run']()
    assert len(rates) == total * accum
    for step, groups in enumerate(rates):
        assert groups == pytest.approx([rate(step // accum, total, warmup, 0.002)] * len(groups), rel=1e-6), step
    scales = {group['lr_scale'] for group in caught['optimizer'].param_groups}
    assert sorted(scales) == pytest.approx([0.75 ** k for k in (3, 2, 1, 0)])
    done = [json.loads(line)['iteration'] for line in (tmp_path / 'out' / 'log.txt').read_text().splitlines()]
    assert done == [min(total, k) for k in range(eval_every, total + eval_every, eval_every)]


def test_recipe_of_the_paper_is_what_main_builds(monkeypatch, tmp_path):
    """Supplement: AdamW, 160,000 iterations, warm-up 1,500, decay 0.05, layer decay 0.75, drop path 0.1, alpha 3, tau 1."""
    caught = stop_before_training(monkeypatch, main_with(monkeypatch, tmp_path, '--model', 'vit_nano_patch8'))
    args, optimizer, model = caught['args'], caught['optimizer'], caught['model']
    assert (args.iterations, args.warmup_iterations, args.eval_every) == (160000, 1500, 16000)
    assert (args.cwd_weight, args.cwd_tau, args.aux_weight, args.clip_grad) == (3.0, 1.0, 0.4, None)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {tuple(group['betas']) for group in optimizer.param_groups} == {(0.9, 0.999)}
    groups = group_of(optimizer, model)
    for name, parameter in model.named_parameters():
        assert groups[name]['weight_decay'] == (0.0 if is_undecayed(name, parameter) else 0.05), name
        assert groups[name]['lr_scale'] == pytest.approx(expected_scale(name, depth=4)), name
    assert [getattr(block.drop_path1, 'drop_prob', 0.0) for block in model.backbone.blocks] == pytest.approx(
        [0, 0.1 / 3, 0.2 / 3, 0.1])
    assert args.lr == 5e-4
    for t, factor in ((0, 1e-6), (750, 0.5000005), (1499, 0.999333334), (1500, 0.990625), (80000, 0.5),
                      (159999, 1 / 160000), (160000, 0)):
        caught['scheduler'].step(t)
        for group in optimizer.param_groups:
            assert group['lr'] == pytest.approx(5e-4 * factor * group['lr_scale'], rel=1e-7, abs=1e-20)
    assert caught['teacher'] is None


# --------------------------------------------------------------------------------------------------------- sliding window


class Windows(nn.Module):
    """Logits that depend on what a window shows and on where in it; keeps the windows."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        self.seen.append(images)
        coarse = F.avg_pool2d(images, 4)
        ramp = torch.arange(coarse[0, 0].numel(), dtype=coarse.dtype).reshape(coarse.shape[2:])
        return torch.stack([coarse[:, 0] * (1 + ramp), coarse[:, 1] - ramp.T, coarse.sum(1) ** 2], dim=1)


def plain_starts(side, size):
    """mmsegmentation: windows two thirds apart, the last one moved back to the border."""
    stride = int(size * 2 / 3)
    number = max(side - size + stride - 1, 0) // stride + 1
    return [min(k * stride, side - size) for k in range(number)]


def plain_slide(images, size):
    """Pixel by pixel in float64: the sum over windows and the number of windows that show it."""
    n, _, height, width = images.shape
    padded = np.zeros((n, 3, max(size, height), max(size, width)))
    padded[:, :, :height, :width] = images.double().numpy()
    total, count = np.zeros((n, 3, *padded.shape[2:])), np.zeros(padded.shape[2:])
    for top in plain_starts(padded.shape[2], size):
        for left in plain_starts(padded.shape[3], size):
            window = Windows()(torch.from_numpy(padded[:, :, top:top + size, left:left + size].copy()))
            enlarged = plain_resize(window, (size, size))
            for i, j in np.ndindex(size, size):
                total[:, :, top + i, left + j] += enlarged[:, :, i, j]
                count[top + i, left + j] += 1
    assert count.min() >= 1
    return torch.from_numpy(total / count)[:, :, :height, :width]


@pytest.mark.parametrize('height, width', [
    (12, 12), (12, 13), (31, 12), (20, 20), (21, 28), (7, 12), (12, 5), (3, 4), (1, 1), (5, 30), (29, 11)])
def test_windows_are_averaged_as_in_a_plain_loop(height, width):
    """Segmentation: windows two thirds apart, overlaps averaged; smaller images padded right and below and cut back."""
    images = randn(2, 3, height, width)
    logits = seg.slide(Windows(), images, 12)
    assert logits.shape == (2, 3, height, width) and logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), plain_slide(images, 12), atol=1e-4, rtol=1e-5)


def test_image_of_the_window_s_size_is_seen_once():
    """Segmentation: an image that fits exactly gives the network's own logits, enlarged."""
    model = filled(tiny_segmenter(), std=0.1).eval()
    images = randn(2, 3, 16, 16)
    with torch.no_grad():
        logits, expected = seg.slide(model, images, 16), plain_resize(model(images), (16, 16))
    torch.testing.assert_close(logits.double(), torch.from_numpy(expected), atol=1e-5, rtol=1e-4)


def test_number_and_places_of_the_windows():
    """Segmentation: mmsegmentation's count, max(side - crop + stride - 1, 0) // stride + 1; the last at the border."""
    for size, sides in ((12, range(1, 62)), (16, (16, 17, 26, 27, 36, 37))):
        for side in sides:
            model = Windows()
            # a pixel's number tells where the window is
            numbers = torch.arange(1, size * side + 1).reshape(1, 1, size, side).expand(1, 3, -1, -1).float()
            seg.slide(model, numbers, size)
            starts = [int(window[0, 0, 0, 0]) - 1 for window in model.seen]
            assert starts == (plain_starts(side, size) if side > size else [0])
            assert all(window.shape == (1, 3, size, size) for window in model.seen)
            assert side <= size or starts[-1] == side - size
            padding = torch.cat([window[..., max(0, side - start):] for start, window in zip(starts, model.seen)], dim=-1)
            assert (padding == 0).all()


def test_windows_of_the_recipe_are_341_pixels_apart():
    """Segmentation: 512 x 512 at stride 341, over both sides."""
    model = Windows()
    place = torch.arange(1100).float()
    image = torch.stack([place[:600, None].expand(600, 1100), place.expand(600, 1100), torch.zeros(600, 1100)])[None]
    seg.slide(model, image, 512)
    assert [tuple(window[0, :2, 0, 0].int().tolist()) for window in model.seen] == [
        (top, left) for top in (0, 88) for left in (0, 341, 588)]


def test_logits_of_windows_are_summed_in_float32():
    """Segmentation: evaluation is in float32: what a window gives in half precision is enlarged and averaged in full."""
    class Half(Windows):
        def forward(self, images):
            return super().forward(images).half()

    images = randn(1, 3, 20, 25).half().float()
    logits = seg.slide(Half(), images, 12)
    assert logits.dtype == torch.float32
    total, count = torch.zeros(3, 20, 25, dtype=torch.float64), torch.zeros(20, 25)
    for top, left in itertools.product(plain_starts(20, 12), plain_starts(25, 12)):
        window = Half()(images[:, :, top:top + 12, left:left + 12])
        total[:, top:top + 12, left:left + 12] += torch.from_numpy(plain_resize(window, (12, 12))[0])
        count[top:top + 12, left:left + 12] += 1
    torch.testing.assert_close(logits[0].double(), total / count, atol=1e-4, rtol=1e-5)


# ------------------------------------------------------------------------------------------------- checkpoints, teacher


def saved_segmenter(folder, seed=1, **changes):
    """A teacher's checkpoint on disk, as the script stores it; None leaves an entry out."""
    path = folder / 'teacher.pth'
    file = {'model': filled(tiny_segmenter(seed), seed).state_dict(), 'classes': CLASSES,
            'args': {'input_size': [16, 16]}, **changes}
    torch.save({name: value for name, value in file.items() if value is not None}, path)
    return path


@pytest.mark.parametrize('changes', [{}, {'args': None}, {'classes': None}, {'args': {}}])
def test_segmenter_comes_back_with_the_file_s_weights_frozen_and_in_eval_mode(tmp_path, capsys, changes):
    """Segmentation: a teacher (or the network to evaluate) is what was saved, statistics included, in eval mode."""
    path = saved_segmenter(tmp_path, **changes)
    model = seg.load_segmenter('vit_pico_patch8', path, CLASSES, seg_args())
    saved = torch.load(path, weights_only=True)['model']
    state = model.state_dict()
    assert list(state) == list(saved) and all(torch.equal(value, saved[name]) for name, value in state.items())
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model(randn(1, 3, 16, 16)).shape == (1, 3, 8, 8)
    assert f'{len(saved)} entries of {path}' in capsys.readouterr().out


def detector_state():
    return {'backbone.body.blocks.0.norm1.weight': torch.ones(32), 'rpn.head.cls_logits.weight': torch.ones(3, 16, 1, 1)}


@pytest.mark.parametrize('change, word', [
    (lambda file: file.update(classes=['sky', 'sea', 'rock']), 'other classes'),
    (lambda file: file.update(classes=CLASSES[:2]), 'other classes'),
    (lambda file: file.update(classes=CLASSES[::-1]), 'other classes'),
    (lambda file: file.update(args={'input_size': [32, 32]}), '--input_size 32'),
    (lambda file: file.update(model=detector_state()), 'no segmentation network'),
    (lambda file: file.update(model=models.create_vit('vit_pico_patch8', 3, 16).state_dict()), 'no segmentation network'),
    (lambda file: file.update(model=models.create_mae('mae_vit_pico_patch8', 16).state_dict()), 'no segmentation network'),
    (lambda file: file.update(model=prefixed('backbone.', models.create_vit('vit_pico_patch8', 3, 16).state_dict())),
     'no segmentation network'),
    (lambda file: file['model'].pop('decode_head.conv_seg.weight'), 'no segmentation network'),
    (lambda file: file['model'].pop('auxiliary_head.conv_seg.bias'), 'auxiliary_head.conv_seg.bias'),
    (lambda file: file['model'].pop('decode_head.bottleneck.1.running_var'), 'decode_head.bottleneck.1.running_var'),
    (lambda file: file['model'].pop('backbone.blocks.1.gamma_1'), 'backbone.blocks.1.gamma_1'),
    (lambda file: file['model'].update(extra=torch.zeros(1)), 'extra'),
    (lambda file: file.update(model=seg.Segmenter('vit_nano_patch8', 3, 16).state_dict()), 'made by this architecture'),
    (lambda file: file.update(model=seg.Segmenter('vit_pico_patch8', 4, 16).state_dict()), 'conv_seg.weight is (4,'),
    (lambda file: file.update(model=seg.Segmenter('vit_pico_patch8', 3, 24).state_dict(), args={}), 'pos_embed is (1, 10')])
def test_segmenter_that_does_not_fit_is_refused(tmp_path, change, word):
    """README: a teacher is loaded strictly; another network, other classes or another input size is one line."""
    path = saved_segmenter(tmp_path)
    file = torch.load(path, weights_only=True)
    change(file)
    torch.save(file, path)
    message = refusal(seg.load_segmenter, 'vit_pico_patch8', path, CLASSES, seg_args())
    assert word in message and str(path) in message


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_names_of_a_segmentation_checkpoint_are_kept(tmp_path, prefix):
    """README: such a file keeps `backbone.`; DINO's wrapper of that name is removed, DDP's `module.` always."""
    state = filled(tiny_segmenter()).state_dict()
    path = saved_segmenter(tmp_path, model=prefixed(prefix, state))
    flat = models.load_checkpoint(path)
    assert list(flat) == list(state) and all(torch.equal(flat[name], value) for name, value in state.items())
    assert list(models.flat_state_dict(prefixed(prefix, state), 'file')) == list(state)
    teacher = seg.load_segmenter('vit_pico_patch8', path, CLASSES, seg_args())
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
    dino = models.flat_state_dict({'teacher': prefixed(prefix + 'backbone.', {'norm.weight': torch.ones(2)})}, 'file')
    assert list(dino) == ['norm.weight']


def test_main_starts_the_student_and_loads_the_teacher(monkeypatch, tmp_path):
    """README: --finetune starts the backbone alone, --teacher_path gives the frozen teacher; each its own weights."""
    state = noise_like(models.create_vit('vit_pico_patch8', 0, 16))
    torch.save(state, tmp_path / 'mae.pth')
    path = saved_segmenter(tmp_path)
    caught = stop_before_training(monkeypatch, main_with(
        monkeypatch, tmp_path, '--finetune', str(tmp_path / 'mae.pth'), '--teacher_path', str(path)))
    model, teacher = caught['model'], caught['teacher']
    assert torch.equal(model.backbone.blocks[1].mlp.fc2.weight, state['blocks.1.mlp.fc2.weight'])
    assert torch.equal(model.backbone.pos_embed, state['pos_embed'])
    assert model.decode_head.conv_seg.weight.std() < 0.05  # the file's is noise of 0.1
    saved = torch.load(path, weights_only=True)['model']
    assert all(torch.equal(value, saved[name]) for name, value in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_teacher_stays_frozen_and_in_eval_mode_through_a_round(tmp_path):
    """Segmentation: the teacher runs in eval mode, without gradients, and does not change while the student trains."""
    teacher = seg.load_segmenter('vit_pico_patch8', saved_segmenter(tmp_path), CLASSES, seg_args())
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    looks, args = kept_outputs(teacher), seg_args('--drop_path', '0.5')
    student = tiny_segmenter(2, drop_path=0.5).eval()
    start = {name: value.clone() for name, value in student.state_dict().items()}
    progress, steps = Recording(args), [tiny_batch(seed=k) for k in range(2)]
    seg.train_one_epoch(student, teacher, [*steps, steps[0]], torch.optim.SGD(student.parameters(), lr=0.05), Iterations(),
                        NO_SCALER, progress, CPU, 0, args)
    assert all(module.training for module in student.modules())
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(look.requires_grad for look in looks)
    assert torch.equal(looks[0], looks[2]) and not torch.equal(looks[0], looks[1])
    for name, value in student.state_dict().items():
        assert name in BEFORE_BATCH_NORM or not torch.equal(value, start[name]), name
    with torch.no_grad():
        answers = [teacher(images) for images, _ in steps]
    assert torch.equal(looks[0], answers[0])
    assert all(set(row) == {'loss', 'loss_seg', 'loss_aux', 'loss_cwd'} for row in progress.steps_seen)
    row = progress.steps_seen[0]
    assert row['loss'] == pytest.approx(row['loss_seg'] + 0.4 * row['loss_aux'] + 3 * row['loss_cwd'], rel=1e-5)
