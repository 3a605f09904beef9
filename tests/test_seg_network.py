"""The segmentation network: backbone, heads, losses, optimisation, windows, scores, teacher.

Oracles are transformers' UPerNet, timm's ViT, plain loops in float64 and values worked out by hand.
"""
import json
import math
import re
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import SEG as seg
from conftest import checkpoint_of, log_of, train
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import models

CLASSES = ['sky', 'sea', 'sand']


def run_args(*flags, **values):
    """Flags as main() leaves them, of one process on a CPU, for 16 pixels."""
    words = '--model vit_pico_patch8 --batch_size 2 --num_workers 0 --device cpu'.split()
    args = seg.get_args_parser().parse_args([*words, *flags])
    own = {'rank': 0, 'world_size': 1, 'distributed': False, 'amp': 'off', 'input_size': [16, 16]}
    vars(args).update({**own, **values})
    return args


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(module, seed=0, std=0.1):
    """The module with noise on all parameters and statistics: none is zero, no two are the same."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            noise = std * torch.randn(value.shape, generator=generator).to(value.dtype)
            value.add_(noise.abs() if name.endswith('running_var') else noise)
    return module


def tiny_segmenter(seed=0, drop_path=0.0, name='vit_pico_patch8'):
    torch.manual_seed(seed)
    return seg.Segmenter(name, len(CLASSES), 16, drop_path)


def tiny_batch():
    """Images (2, 3, 16, 16) and labels (2, 16, 16) of three classes, a fifth of them ignored."""
    labels = torch.randint(0, 3, (2, 16, 16), generator=torch.Generator().manual_seed(0))
    return randn(2, 3, 16, 16), labels.where(randn(2, 16, 16) < 0.85, 255).to(torch.uint8)


def without_dropout(module):
    """Training mode but for the dropout."""
    for part in module.train().modules():
        if isinstance(part, nn.Dropout2d):
            part.eval()
    return module


# ---- label loss ----------------------------------------------------------------------------------


def plain_weights(length, wanted):
    """(wanted, length): bilinear weights between pixel centres; beyond them the border's pixel."""
    weights = np.zeros((wanted, length))
    for i in range(wanted):
        position = max((i + 0.5) * length / wanted - 0.5, 0.0)
        low = min(int(position), length - 1)
        weights[i, low] += 1 - (position - low)
        weights[i, min(low + 1, length - 1)] += position - low
    return weights


def plain_resize(x, size):
    """(N, C, h, w) -> numpy (N, C, *size), float64."""
    rows, columns = plain_weights(x.shape[2], size[0]), plain_weights(x.shape[3], size[1])
    return np.einsum('ih,nchw,jw->ncij', rows, np.asarray(x.detach().double()), columns)


def plain_label_loss(logits, labels):
    """-log softmax at the label of each pixel that has one, over the number of all pixels."""
    enlarged, total = plain_resize(logits, labels.shape[1:]), 0.0
    for n, i, j in np.ndindex(*labels.shape):
        if labels[n, i, j] != 255:
            values = enlarged[n, :, i, j]
            total += math.log(np.exp(values).sum()) - values[labels[n, i, j]]
    return total / labels.numel()


@pytest.mark.parametrize('size', [(7, 11), (3, 2)])
def test_label_loss_equals_a_float64_loop_under_autocast_too(size):
    """Bilinear between pixel centres; a mean over all pixels, in which ignored ones count as 0."""
    labels = torch.randint(0, 5, (2, *size), generator=torch.Generator().manual_seed(1))
    labels = labels.where(randn(2, *size) < 0.3, 255).to(torch.uint8)
    logits = 3 * randn(2, 5, 4, 3)
    assert 0.2 < (labels == 255).float().mean() < 0.8
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=dtype != torch.float32):
            loss = seg.label_loss(logits.to(dtype), labels)
        assert loss.shape == () and loss.dtype == torch.float32
        assert loss.item() == pytest.approx(plain_label_loss(logits.to(dtype), labels), rel=1e-5)


def test_ignored_pixels_teach_nothing_and_a_batch_of_them_costs_nothing():
    logits, labels = randn(1, 3, 4, 4).requires_grad_(), torch.full((1, 4, 4), 2, dtype=torch.uint8)
    labels[:, :, 2:] = 255
    loss = seg.label_loss(logits, labels)
    half = seg.label_loss(logits[..., :2], labels[..., :2])
    assert loss.item() == pytest.approx(half.item() / 2, rel=1e-6)
    gradient, = torch.autograd.grad(loss, logits)
    assert (gradient[..., 2:] == 0).all() and (gradient[..., :2] != 0).all()
    loss = seg.label_loss(logits, torch.full_like(labels, 255))
    gradient, = torch.autograd.grad(loss, logits)
    assert loss.item() == 0 and (gradient == 0).all()


# ---- backbone ------------------------------------------------------------------------------------


def test_the_parameters_of_the_backbone_are_beits():
    """Without what no map depends on: a final norm, a head, a bias of the keys."""
    names = {'cls_token', 'pos_embed', 'patch_embed.proj.weight', 'patch_embed.proj.bias'}
    inside = ('gamma_1 gamma_2 norm1.weight norm1.bias norm2.weight norm2.bias attn.q_bias attn.v_bias '
              'attn.qkv.weight attn.relative_position_bias_table attn.proj.weight attn.proj.bias '
              'mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias').split()
    for i in range(2):
        names |= {f'blocks.{i}.{name}' for name in inside}
    net = seg.Backbone('vit_pico_patch8', 24)
    assert {name for name, _ in net.named_parameters()} == set(net.state_dict()) == names
    assert net.blocks[0].attn.relative_position_bias_table.shape == (5 * 5 + 3, 2)


def mae_file(encoder, target_dim=None):
    full = models.create_mae('mae_vit_thin_patch8', 24, target_dim).state_dict()
    return {'model': {**full, **encoder}, 'epoch': 799}


def deit_file(encoder):
    rows = encoder['pos_embed']
    rows = torch.cat([rows[:, :1], torch.full((1, 1, 32), 7.0), rows[:, 1:]], dim=1)
    heads = {'head.weight': torch.ones(9, 32), 'head_dist.weight': torch.ones(9, 32)}
    return {'model': {**encoder, **heads, 'dist_token': torch.ones(1, 1, 32), 'pos_embed': rows}}


@pytest.mark.parametrize('wrap, left_out, taps', [
    (mae_file, 'decoder_pred', [3, 5, 7, 11]), (deit_file, 'dist_token', [0, 0, 0, 1]),
    (partial(mae_file, target_dim=48), 'feature_head', [7, 11, 15, 23])], ids=['MAE', 'DeiT', 'stage 1'])
def test_at_the_start_the_maps_are_those_of_the_plain_vit_in_the_file(
        wrap, left_out, taps, tmp_path, capsys, monkeypatch):
    """Blocks 3, 5, 7 and 11 of 12, in proportion of 24 and 2, without a norm behind them.

    Relative positions start at 0, LayerScale at 1; the bias of the keys cancels in the softmax.
    """
    depth = taps[-1] + 1
    monkeypatch.setitem(models.SIZES, 'thin', models.Size(32, depth, 2, 32, 2))
    sizes = {'img_size': 24, 'patch_size': 8, 'embed_dim': 32, 'depth': depth, 'num_heads': 2}
    vit = filled(VisionTransformer(num_classes=0, **sizes), std=0.3)
    assert vit.blocks[0].attn.qkv.bias[32:64].abs().min() > 1e-5
    torch.save(wrap(vit.state_dict()), tmp_path / 'file.pth')
    net, images = seg.Backbone('vit_thin_patch8', 24), randn(2, 3, 24, 24).double()
    models.load_pretrained(net, tmp_path / 'file.pth')
    states = vit.double().eval().forward_intermediates(images, intermediates_only=True)
    for found, tap in zip(net.double().eval()(images), taps, strict=True):
        torch.testing.assert_close(found, states[tap], atol=1e-9, rtol=1e-9)
    assert all((a - b).abs().max() > 0.1 for a, b in zip(states, states[1:]))
    line = capsys.readouterr().out
    assert 'new: gamma_1, gamma_2, relative_position_bias_table; left out: ' in line
    assert left_out in line and 'k_bias' in line


# ---- neck and heads ------------------------------------------------------------------------------

SIDES = {'odd': [(13, 10), (7, 5), (3, 2), (2, 1)], 'small': [(4, 4), (2, 2), (1, 1), (1, 1)]}


def transformers_head(kind):
    """The head of the library transformers, and a function from its names to ours."""
    pytest.importorskip('transformers')
    from transformers import UperNetConfig
    from transformers.models.upernet import modeling_upernet
    config = UperNetConfig(
        hidden_size=8, num_labels=5, pool_scales=[1, 2, 3, 6], auxiliary_channels=256,
        auxiliary_in_channels=8, auxiliary_num_convs=1, auxiliary_concat_input=False)
    if kind is seg.UPerNet:
        theirs = modeling_upernet.UperNetHead(config, in_channels=[8] * 4)
    else:
        theirs = modeling_upernet.UperNetFCNHead(config, in_channels=[8] * 4, in_index=2)

    def rename(name):
        name = name.replace('convs.0.', 'conv.', 1) if kind is seg.FCN else name
        name = re.sub(r'\.conv\.(?=weight)', '.0.', name)
        return name.replace('.batch_norm.', '.1.').replace('classifier.', 'conv_seg.')

    return theirs, rename


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('sides', SIDES)
@pytest.mark.parametrize('kind', [seg.UPerNet, seg.FCN])
def test_a_head_equals_that_of_transformers(kind, sides, training):
    """Outputs, gradients and batch norm's statistics on the same weights."""
    theirs, rename = transformers_head(kind)
    theirs, ours = filled(theirs, 1, 0.3).double().train(training), kind(8, 5).double()
    ours.load_state_dict({rename(name): value for name, value in theirs.state_dict().items()})
    ours = without_dropout(ours) if training else ours.eval()
    maps = [randn(3, 8, *side, seed=k).double().requires_grad_() for k, side in enumerate(SIDES[sides])]
    copies = [part.detach().requires_grad_() for part in maps]
    found, expected = ours(maps if kind is seg.UPerNet else maps[2]), theirs(copies)
    assert found.shape == (3, 5, *SIDES[sides][0 if kind is seg.UPerNet else 2])
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    found.sin().sum().backward()
    expected.sin().sum().backward()
    pairs = [(part.grad, copy.grad) for part, copy in zip(maps, copies) if copy.grad is not None]
    for name, value in theirs.named_parameters():
        pairs.append((ours.get_parameter(rename(name)).grad, value.grad))
    for name, value in theirs.named_buffers():
        pairs.append((ours.get_buffer(rename(name)), value))
    for left, right in pairs:
        torch.testing.assert_close(left, right, atol=1e-9, rtol=1e-7)


def test_the_neck_equals_plain_operations():
    """Twice a transposed convolution with batch norm and GELU between, once, as it is, a maximum of 2x2."""
    neck, x = filled(tiny_segmenter().neck, std=0.5).double().eval(), randn(2, 32, 3, 3).double()
    own = neck.state_dict()

    def double(x, name):
        return F.conv_transpose2d(x, own[f'{name}.weight'], own[f'{name}.bias'], stride=2)

    mean, var, weight, bias = (own[f'0.1.{name}'][:, None, None] for name in (
        'running_mean', 'running_var', 'weight', 'bias'))
    y = (double(x, '0.0') - mean) / torch.sqrt(var + 1e-5) * weight + bias
    y = double(y * 0.5 * (1 + torch.erf(y / math.sqrt(2))), '0.3')
    expected = [y, double(x, '1'), x, x[:, :, :2, :2].amax(dim=(2, 3), keepdim=True)]
    for part, wanted in zip(neck, expected, strict=True):
        torch.testing.assert_close(part(x), wanted, atol=1e-10, rtol=1e-10)


def test_the_network_is_backbone_neck_and_heads():
    """Maps at 1/4, 1/2, 1 and 2 patches; all four to UPerNet, the third to the auxiliary head in training."""
    model = without_dropout(filled(tiny_segmenter(), std=0.2)).double()
    maps = [randn(2, 32, 2, 2, seed=k).double() for k in range(4)]
    model.backbone.forward = lambda images: maps
    levels = [part(x) for part, x in zip(model.neck, maps)]
    assert [level.shape[2] for level in levels] == [8, 4, 2, 1]
    logits, aux_logits = model(None)
    assert logits.shape == (2, 3, 8, 8) and aux_logits.shape == (2, 3, 2, 2)
    torch.testing.assert_close(logits, model.decode_head(levels))
    torch.testing.assert_close(aux_logits, model.auxiliary_head(maps[2]))
    model.eval()
    levels = [part(x) for part, x in zip(model.neck, maps)]
    torch.testing.assert_close(model(None), model.decode_head(levels))


def test_heads_start_from_mmsegmentations_values():
    """Kaiming normal over what a convolution feeds, classifiers 0.01; dropout 0.1 of whole channels."""
    model = tiny_segmenter(name='vit_nano_patch8')
    for head, count in ((model.decode_head, 12), (model.auxiliary_head, 1)):
        parts = list(head.modules())
        convolutions = [module for module in parts if isinstance(module, nn.Conv2d)]
        assert convolutions.pop() is head.conv_seg and len(convolutions) == count
        for module in convolutions:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.bias is None
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.06)
        assert head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.3)
        assert (head.conv_seg.bias == 0).all()
        assert [module.p for module in parts if isinstance(module, nn.Dropout2d)] == [0.1]


# ---- gradients -----------------------------------------------------------------------------------


def backward(model, images, labels):
    logits, aux_logits = model(images)
    (seg.label_loss(logits, labels) + 0.4 * seg.label_loss(aux_logits, labels)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_every_parameter_gets_a_gradient():
    """DDP needs one for every parameter in every step, also where no pixel has a label."""
    model, (images, labels) = without_dropout(filled(tiny_segmenter(), std=0.02)), tiny_batch()
    gradients = backward(model, images, labels)
    # an offset of a whole map is taken off again by the batch norm that follows
    offsets = {'neck.0.0.bias', 'neck.0.3.bias', 'neck.1.bias'}
    assert {name for name, value in gradients.items() if not value.abs().max() > 1e-9} <= offsets
    model.zero_grad()
    gradients = backward(model, images, torch.full_like(labels, 255))
    assert all((value == 0).all() for value in gradients.values())


def test_checkpointing_computes_blocks_again_and_gives_the_same_gradients():
    """--grad_checkpointing, with the random draws of stochastic depth."""
    found, calls = [], []
    for enabled in (False, True):
        model = filled(tiny_segmenter(drop_path=0.5), std=0.05).train()
        model.backbone.set_grad_checkpointing(enabled)
        model.backbone.blocks[1].attn.register_forward_hook(lambda *_: calls.append(1))
        torch.manual_seed(3)
        found.append(backward(model, *tiny_batch()))
    assert len(calls) == 1 + 2
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-7, rtol=1e-5)


# ---- the training loop ---------------------------------------------------------------------------


class OneWeight(nn.Module):
    """A student of one weight, whose logits are parts of the images, or its teacher; keeps what it sees."""

    def __init__(self, is_teacher=False):
        super().__init__()
        self.w, self.is_teacher, self.seen = nn.Parameter(torch.tensor(1.0)), is_teacher, []

    def forward(self, images):
        assert self.training != self.is_teacher
        self.seen.append(images)
        if self.is_teacher:
            return 2 * self.w * images[:, [2, 0]]
        return self.w * images[:, :2], self.w ** 2 * images[:, 1:, ::2, ::2]


class Meter(models.Meter):
    """Keeps the terms of each step."""

    def update(self, grad_norm, **terms):
        super().update(grad_norm, **terms)
        self.seen = [*getattr(self, 'seen', []), {name: value.item() for name, value in terms.items()}]


def plain_terms(w, images, labels):
    """What a step costs at --aux_weight 0.3, --cwd_weight 2.5, --cwd_tau 2."""
    student, teacher = w * images[:, :2].double().flatten(2), 2 * images[:, [2, 0]].double().flatten(2)
    student, teacher = (student / 2).log_softmax(dim=2), (teacher / 2).log_softmax(dim=2)
    terms = {'loss_seg': plain_label_loss(w * images[:, :2], labels),
             'loss_aux': 0.3 * plain_label_loss(w ** 2 * images[:, 1:, ::2, ::2], labels),
             'loss_cwd': 2.5 * 4 * (teacher.exp() * (teacher - student)).sum(dim=2).mean().item()}
    return {'loss': sum(terms.values()), **terms}


@pytest.mark.parametrize('accum_iter', [1, 2])
def test_losses_and_updates_are_those_of_a_plain_loop(accum_iter):
    """CE, CE_aux, CWD at their weights; steps of an update are averaged, the schedule counts updates."""
    flags = '--cwd_weight 2.5 --cwd_tau 2 --aux_weight 0.3 --eval_every 3'
    args = run_args(*flags.split(), accum_iter=accum_iter)
    batches, told = [], []
    for k in range(3 * accum_iter):
        labels = (torch.arange(72).reshape(2, 6, 6) % 2).where(randn(2, 6, 6, seed=k) < 1, 255)
        batches.append((2 * randn(2, 3, 4, 4, seed=k), labels.to(torch.uint8)))
    student, teacher = OneWeight().eval(), OneWeight(is_teacher=True).eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    meter = Meter(args, optimizer, 99, 'round')
    steps = seg.train_one_epoch(
        student, teacher, batches, optimizer, Namespace(step=told.append),
        torch.amp.GradScaler('cpu', enabled=False), meter, torch.device('cpu'), 2, 0, args)
    assert steps == len(batches) and told == [6, 7, 8]  # the third round of three updates
    w, slope, h = 1.0, 0.0, 1e-4
    for step, (images, labels) in enumerate(batches, 1):
        assert meter.seen[step - 1] == pytest.approx(plain_terms(w, images, labels), rel=1e-4)
        high, low = (plain_terms(w + move, images.double(), labels)['loss'] for move in (h, -h))
        slope += (high - low) / (2 * h) / accum_iter
        if step % accum_iter == 0:
            w, slope = w - 0.01 * slope, 0.0
    assert abs(w - 1) > 1e-3 and student.w.item() == pytest.approx(w, rel=1e-5)
    assert teacher.w.item() == 1 and teacher.w.grad is None
    assert torch.equal(torch.stack(student.seen), torch.stack(teacher.seen))
    for name in ('loss', 'loss_cwd'):
        assert meter.stats()[f'train_{name}'] == pytest.approx(np.mean([row[name] for row in meter.seen]))


# ---- optimizer and schedule ----------------------------------------------------------------------


class Stop(Exception):
    pass


def built_by_main(monkeypatch, data, out, *flags):
    """What main() hands to its first round: (model, teacher, loader, optimizer, scheduler, ...)."""
    caught = []

    def train_one_epoch(*arguments):
        caught.extend(arguments)
        raise Stop

    monkeypatch.setattr(seg, 'train_one_epoch', train_one_epoch)
    words = ['--data_path', data / 'ade', '--output_dir', out, '--num_workers', 0, '--device', 'cpu', *flags]
    with pytest.raises(Stop):
        seg.main(seg.get_args_parser().parse_args([str(word) for word in words]))
    return caught


def expected_scale(name):
    """Layer decay 0.75 of twelve blocks; everything behind the backbone has the full rate."""
    block = re.match(r'backbone\.blocks\.(\d+)\.', name)
    if block:
        return 0.75 ** (12 - int(block[1]))
    return 0.75 ** 13 if name.startswith('backbone.') else 1.0


@pytest.mark.parametrize('name, lr', [('vit_tiny_patch16', 5e-4), ('vit_small_patch16', 2e-4)])
def test_optimizer_and_schedule_are_the_papers(name, lr, data, tmp_path, monkeypatch):
    """AdamW, weight and layer decay by parameter; warm-up of 1,500 iterations from 1e-6, then poly to 0."""
    model, teacher, _, optimizer, scheduler, *_ = built_by_main(
        monkeypatch, data, tmp_path, '--model', name, '--input_size', 32)
    assert isinstance(optimizer, torch.optim.AdamW) and teacher is None
    names, groups = {id(parameter): name for name, parameter in model.named_parameters()}, {}
    for group in optimizer.param_groups:
        assert tuple(group['betas']) == (0.9, 0.999)
        groups.update({names[id(parameter)]: group for parameter in group['params']})
    assert len(groups) == len(names) and all(parameter.requires_grad for parameter in model.parameters())
    factors = {0: 1e-6, 750: 0.5000005, 1500: 0.990625, 80_000: 0.5, 159_999: 1 / 160_000, 160_000: 0}
    for iteration, factor in factors.items():
        scheduler.step(iteration)
        for name, group in groups.items():
            expected = lr * factor * expected_scale(name)
            assert group['lr'] == pytest.approx(expected, rel=1e-7, abs=1e-20), name
    for name, parameter in model.named_parameters():
        undecayed = parameter.ndim == 1 or re.search('cls_token|pos_embed|relative_position', name)
        assert groups[name]['weight_decay'] == (0 if undecayed else 0.05), name
    rates = [getattr(block.drop_path1, 'drop_prob', 0.0) for block in model.backbone.blocks]
    assert rates == pytest.approx([0.1 * i / 11 for i in range(12)], abs=1e-7)


def test_main_starts_the_student_and_reads_the_teacher_by_its_own_name(data, tmp_path, monkeypatch):
    train(seg, data, tmp_path / 'teacher', '--model vit_nano_patch8 --iterations 2')
    encoder = models.create_vit('vit_pico_patch8', 0, 32).state_dict()
    torch.save(encoder, tmp_path / 'mae.pth')
    path = tmp_path / 'teacher/checkpoint.pth'
    model, teacher, *_ = built_by_main(
        monkeypatch, data, tmp_path / 'out', '--model', 'vit_pico_patch8', '--input_size', 32,
        '--batch_size', 2, '--finetune', tmp_path / 'mae.pth', '--teacher_path', path, '--grad_checkpointing')
    assert model.backbone.grad_checkpointing and not teacher.backbone.grad_checkpointing
    assert torch.equal(model.backbone.blocks[1].mlp.fc2.weight, encoder['blocks.1.mlp.fc2.weight'])
    saved = checkpoint_of(tmp_path / 'teacher')['model']
    assert len(teacher.backbone.blocks) == 4 and list(teacher.state_dict()) == list(saved)
    assert all(torch.equal(value, saved[name]) for name, value in teacher.state_dict().items())
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize('flags, message', [
    ('--input_size 32 48', '--input_size 32 48: give one side'),
    ('--input_size 8', 'at least 2 patches, 16')])
def test_crops_that_are_not_square_or_too_small_are_refused(flags, message, data, tmp_path):
    with pytest.raises(SystemExit, match=message):
        train(seg, data, tmp_path, flags)


# ---- batch norm under several processes ----------------------------------------------------------


def test_all_processes_save_and_evaluate_with_the_statistics_of_the_first(data, tmp_path, monkeypatch):
    """Batch norm's, on CPUs: here the first process, played by `broadcast`, has 0.5 everywhere."""
    seen, setup, evaluate = [], seg.setup, seg.evaluate

    def setup_distributed(args):
        returned = setup(args)
        args.distributed = True
        return returned

    def broadcast(buffer, source):
        buffer.fill_(0.5 if source == 0 else 7.0)

    def evaluate_and_look(model, *rest):
        seen.append(model.state_dict())
        return evaluate(model, *rest)

    monkeypatch.setattr(seg, 'setup', setup_distributed)
    monkeypatch.setattr(seg, 'evaluate', evaluate_and_look)
    monkeypatch.setattr(dist, 'broadcast', broadcast)
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        train(seg, data, tmp_path, '--iterations 2')
    finally:
        dist.destroy_process_group()
    for state in (*seen, checkpoint_of(tmp_path)['model']):
        statistics = [value for name, value in state.items() if 'running_' in name]
        assert len(statistics) == 2 * 14 and all((value == 0.5).all() for value in statistics)
        assert not any(name.startswith('module.') for name in state)
    assert len(seen) == 1


def test_all_batch_norms_can_be_synced_under_the_same_names():
    model = tiny_segmenter()
    names = list(model.state_dict())
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert list(model.state_dict()) == names
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in model.modules()) == 14


# ---- sliding window ------------------------------------------------------------------------------


class Windows(nn.Module):
    """Logits that depend on what a window shows and on where in it; keeps the windows."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        assert not torch.is_grad_enabled() and not self.training
        self.seen.append(images)
        coarse = F.avg_pool2d(images, 4)
        ramp = torch.arange(coarse[0, 0].numel(), dtype=coarse.dtype).reshape(coarse.shape[2:])
        maps = [coarse[:, 0] * (1 + ramp), 3 * coarse[:, 1] + 1 - ramp.T / 3, coarse[:, 2] ** 2]
        return torch.stack(maps, dim=1)


def plain_starts(side, size):
    """mmsegmentation: windows two thirds apart, the last one moved back to the border."""
    stride = int(size * 2 / 3)
    number = max(side - size + stride - 1, 0) // stride + 1
    return [min(k * stride, side - size) for k in range(number)]


def plain_slide(images, size):
    """In float64: the sum over windows, and the number of windows that show each pixel."""
    n, _, height, width = images.shape
    padded = np.zeros((n, 3, max(size, height), max(size, width)))
    padded[:, :, :height, :width] = images.double().numpy()
    total, count = np.zeros(padded.shape), np.zeros(padded.shape[2:])
    for top in plain_starts(padded.shape[2], size):
        for left in plain_starts(padded.shape[3], size):
            window = torch.from_numpy(padded[:, :, top:top + size, left:left + size].copy())
            enlarged = plain_resize(Windows().eval()(window), (size, size))
            total[:, :, top:top + size, left:left + size] += enlarged
            count[top:top + size, left:left + size] += 1
    assert count.min() >= 1
    return torch.from_numpy(total / count)[:, :, :height, :width]


@pytest.mark.parametrize('height, width', [(12, 12), (31, 12), (21, 28), (7, 12), (3, 4), (5, 30)])
@torch.no_grad()
def test_windows_are_averaged_as_in_a_plain_loop(height, width):
    """Smaller images are padded right and below, and cut back."""
    images = randn(2, 3, height, width)
    logits = seg.slide(Windows().eval(), images, 12)
    assert logits.shape == (2, 3, height, width) and logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), plain_slide(images, 12), atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_windows_of_the_recipe_are_341_pixels_apart():
    model, place = Windows().eval(), torch.arange(1100).float()
    rows, columns = place[:600, None].expand(600, 1100), place.expand(600, 1100)
    seg.slide(model, torch.stack([rows, columns, torch.zeros(600, 1100)])[None], 512)
    starts = [tuple(window[0, :2, 0, 0].int().tolist()) for window in model.seen]
    assert starts == [(0, 0), (0, 341), (0, 588), (88, 0), (88, 341), (88, 588)]


# ---- scores --------------------------------------------------------------------------------------


def test_scores_by_hand():
    """IoU 2/4, 3/5 and 0/1, accuracy 2/3, 3/4 and 0; no label is of the fourth class, which is seen once."""
    confusion = torch.tensor([[2, 1, 0, 0], [1, 3, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]])
    scores = seg.segmentation_scores(confusion, list('abcd'))
    assert scores['test_IoU'] == {'a': pytest.approx(50), 'b': pytest.approx(60), 'c': 0, 'd': None}
    assert scores['test_mIoU'] == pytest.approx((50 + 60 + 0) / 3)
    assert scores['test_mAcc'] == pytest.approx(100 * (2 / 3 + 3 / 4) / 3)
    assert scores['test_aAcc'] == pytest.approx(100 * 5 / 8)
    assert json.loads(json.dumps(scores)) == scores


@pytest.mark.parametrize('world_size', [1, 7])
def test_evaluation_is_a_plain_loop_over_the_images_of_all_processes(
        world_size, tmp_path, monkeypatch, capsys):
    """Each image once, its logits enlarged to the original size, one confusion matrix.

    Of 900, 1050, 30, 360 and 144 pixels every fourth is 0 or 255, which are ignored: 622 of 2484.
    """
    rng, parts = np.random.default_rng(7), []
    for name, size in zip('abcde', ((20, 45), (50, 21), (5, 6), (6, 60), (12, 12))):
        image, label = rng.integers(0, 256, (*size, 3)), rng.integers(1, 4, size)
        label.flat[::8], label.flat[4::8] = 0, 255
        for kind, pixels in (('images', image), ('annotations', label)):
            (tmp_path / kind / 'validation').mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / kind / f'validation/{name}.png')
    monkeypatch.setattr(dist, 'all_reduce', lambda confusion: parts.append(confusion.clone()))
    (tmp_path / 'classes.txt').write_text('4 the last class\n')
    flags = f'--data_path {tmp_path} --eval --resume none'.split()
    for rank in range(world_size):
        args = run_args(*flags, rank=rank, world_size=world_size, input_size=[12, 12], distributed=True)
        _, loader, classes = seg.build_data(args)
        stats = seg.evaluate(Windows().train(), loader, classes, torch.device('cpu'), args)
        assert stats['test_images'] == 5
    confusion = torch.zeros(4, 4)
    pairs, _ = seg.list_pairs(tmp_path, 'validation')
    for image, label in seg.SegmentationDataset(pairs, 4, args, is_train=False):
        with torch.no_grad():
            prediction = plain_resize(plain_slide(image[None], 12), label.shape)[0].argmax(axis=0)
        for truth, answer in zip(label.flatten().tolist(), prediction.flatten().tolist()):
            if truth != 255:
                confusion[truth, answer] += 1
    *found, ignored = sum(parts).tolist()
    found = torch.tensor(found).view(4, 4)
    assert ignored == 622 and found.sum() == 2484 - 622
    assert (found - confusion).abs().sum() <= 4  # two pixels may be ties
    assert (confusion[:3, :3] > 20).all() and confusion[3].sum() == confusion[:, 3].sum() == 0
    if world_size == 1:
        assert stats['test_aAcc'] == pytest.approx(100 * found.diag().sum() / found.sum())
        assert ' of 5 images, 25.0% of the pixels ignored\n' in capsys.readouterr().out


# ---- checkpoints ---------------------------------------------------------------------------------


def saved_segmenter(folder, **changes):
    """A checkpoint of the script; None leaves an entry out."""
    file = {'model': filled(tiny_segmenter(1)).state_dict(), 'classes': CLASSES,
            'args': {'input_size': [16, 16], 'model': 'vit_pico_patch8'}, **changes}
    path = folder / 'checkpoint.pth'
    torch.save({name: value for name, value in file.items() if value is not None}, path)
    return path, file['model']


def test_a_file_without_args_is_read_by_the_name_of_the_flag(tmp_path):
    path, state = saved_segmenter(tmp_path, args=None, classes=None)
    model = seg.load_segmenter(path, CLASSES, run_args(), 'vit_pico_patch8')
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(SystemExit, match='vit_base_patch16'):
        seg.load_segmenter(path, CLASSES, run_args())


@pytest.mark.parametrize('changes, message', [
    ({'classes': CLASSES[::-1]}, 'trained on 3 classes.*: sand and sky'),
    ({'args': {'input_size': [32, 32], 'model': 'vit_pico_patch8'}}, 'for 32 pixels'),
    ({'args': {'input_size': [16, 16], 'model': 'vit_nano_patch8'}}, 'another architecture'),
    ({'model': {'head.weight': torch.ones(3, 32)}}, 'no segmentation network')])
def test_a_teacher_that_does_not_fit_is_refused(changes, message, tmp_path):
    path, _ = saved_segmenter(tmp_path, **changes)
    with pytest.raises(SystemExit, match=message) as error:
        seg.load_segmenter(path, CLASSES, run_args())
    assert str(path) in error.value.code and '\n' not in error.value.code


# ---- learning ------------------------------------------------------------------------------------


def test_a_network_learns_a_few_drawn_scenes(data, tmp_path):
    """mIoU and pixel accuracy are far above those of the most frequent class everywhere."""
    train(seg, data, tmp_path, '--val_split training --batch_size 4 --iterations 60 --eval_every 60 '
                               '--warmup_iterations 4 --lr 3e-3')
    paths = sorted((data / 'ade/annotations/training').iterdir())
    labels = np.concatenate([np.asarray(Image.open(path)).ravel() for path in paths])
    shares = np.bincount(labels[labels > 0])[1:] / (labels > 0).sum()
    line, = log_of(tmp_path)
    assert line['test_mIoU'] > 2 * 100 * shares.max() / (shares > 0).sum()
    assert line['test_aAcc'] > 100 * shares.max() + 12
