"""What makes a step fast changes nothing in what is computed; and the benchmark measures what it says.

Oracles are the plain formulations: Pillow and torchvision transforms, whole-image convolution in float64, attention as a
softmax, FLOP counts worked out by hand, and torch's own record of which operations wait for the device.
"""
import argparse
import json
import math
import sys

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms

import benchmark
import generic_distill
import models
import specific_distill_cls
import specific_distill_det
import specific_distill_seg
import toy_data

GENERIC, CLS, DET, SEG = generic_distill, specific_distill_cls, specific_distill_det, specific_distill_seg
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device('cpu')
COMMON = ('--num_workers', '0', '--device', 'cpu', '--print_freq', '1000000')
EPOCHS = ('--input_size', '16', '--batch_size', '8', '--accum_iter', '1', '--epochs', '2', '--warmup_epochs', '0', *COMMON)
ROUNDS = ('--batch_size', '2', '--iterations', '2', '--eval_every', '2', '--warmup_iterations', '0', *COMMON)
TINY = {GENERIC: ('--target', 'pixel', '--model', 'mae_vit_pico_patch8', *EPOCHS),
        CLS: ('--model', 'vit_pico_patch8', *EPOCHS),
        DET: ('--model', 'vit_pico_patch8', '--input_size', '64', '--window_size', '4', '--fpn_dim', '16', '--head_dim',
              '32', '--anchor_size', '8', '--proposals', '20', '--roi_batch', '16', *ROUNDS),
        SEG: ('--model', 'vit_pico_patch8', '--input_size', '32', *ROUNDS)}
FOLDER = {GENERIC: 'imagenet', CLS: 'imagenet', DET: 'coco', SEG: 'ade'}
NAMES = {'stage 1': GENERIC, 'classification': CLS, 'detection': DET, 'segmentation': SEG}
EVERY = pytest.mark.parametrize('script', NAMES.values(), ids=NAMES)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Drawn: 48 pictures of 12 classes to train and 12 to validate; 4 and 2 scenes."""
    folder = tmp_path_factory.mktemp('toy')
    toy_data.main(toy_data.get_args_parser().parse_args(
        ['--out', str(folder), '--size', '24', '--train', '48', '--val', '12', '--scenes', '4', '--val_scenes', '2',
         '--scene_size', '64']))
    return folder


class Stop(Exception):
    """Ends main() where training would begin."""


def stop(*_):
    raise Stop


def parsed(script, folder, *flags):
    args = script.get_args_parser().parse_args(
        [*TINY[script], '--data_path', str(folder / FOLDER[script]), '--seed', '0', *map(str, flags)])
    args.rank, args.world_size, args.distributed = 0, 1, False
    args.input_size = (args.input_size * 2)[:2]
    script.resolve_recipe(args)
    return args


def photograph(height=90, width=120, seed=0):
    """Smooth colours with a grain, as a Pillow image."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    coarse = coarse.resize((width, height), Image.Resampling.BICUBIC)
    return Image.fromarray(np.clip(np.asarray(coarse) + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8))


# ------------------------------------------------------------------------------------------------------------------ input


def test_bytes_are_normalised_as_torchvision_does_it():
    """tools/benchmark.md: bytes travel to the device and become there what ToTensor and Normalize make of an image."""
    image = photograph()
    expected = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])(image)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(models.normalise(pixels), expected)
    assert torch.equal(models.normalise(torch.stack([pixels, pixels]))[1], expected)


@pytest.mark.parametrize('size, scale', [([48, 48], (0.2, 1.0)), ([100, 80], (0.08, 1.0)), ([160, 160], (0.2, 1.0))])
def test_crops_are_torchvisions_and_pixels_pillows_up_to_rounding(size, scale):
    """tools/benchmark.md: the distribution of crops stays as it was; few pixels differ from Pillow's by over a level."""
    theirs = transforms.RandomResizedCrop(size, scale, interpolation=transforms.InterpolationMode.BICUBIC)
    differences = []
    for seed in range(20):
        image = photograph(seed=seed)
        torch.manual_seed(seed)
        expected = np.asarray(theirs(image)).astype(int)
        torch.manual_seed(seed)
        crop = models.ResizedCrop(size, scale)(image)
        assert crop.dtype == torch.uint8 and crop.shape == (3, *size)
        differences.append(np.abs(crop.permute(1, 2, 0).numpy().astype(int) - expected))
    share = np.mean([difference > 1 for difference in differences])
    assert share < 0.001 and np.mean(differences) < 0.1, (share, np.mean(differences))


@pytest.mark.parametrize('script', [GENERIC, CLS], ids=['stage 1', 'classification'])
def test_loaders_give_bytes(script, data):
    """tools/benchmark.md: a batch is a quarter of the floats' memory."""
    args = parsed(script, data)
    if script is GENERIC:
        (images, noise), _, _ = next(iter(GENERIC.build_data(args, 4)))
        assert images.shape == (8, 1, 3, 16, 16) and noise.shape == (8, 1, 4)
    else:
        train, val, _ = CLS.build_data(args)
        assert next(iter(val))[0].dtype == torch.uint8
        images = next(iter(train))[0]
        assert images.shape == (8, 3, 16, 16)
    assert images.dtype == torch.uint8


def test_repeated_augmentation_reads_each_image_once_for_all_its_views(data, monkeypatch):
    """--repeated_aug K: K crops and masks of one decoded image; as many steps, K times fewer files."""
    read = []
    fetch = GENERIC.FlatFolder.__getitem__
    monkeypatch.setattr(GENERIC.FlatFolder, '__getitem__', lambda self, index: read.append(index) or fetch(self, index))
    batches = {}
    for views in (1, 4):
        loader = GENERIC.build_data(parsed(GENERIC, data, '--repeated_aug', views), 4)
        read.clear()
        loader.sampler.epoch = 3
        batches[views] = [batch[0] for batch in loader]
        assert len(loader) == len(batches[views]) == 6
        assert len(read) == len(set(read)) == 48 // views
    images, noise = batches[4][0]
    assert images.shape == (2, 4, 3, 16, 16) and noise.shape == (2, 4, 4)
    for one, other in ((0, 1), (1, 2), (2, 3)):
        assert not torch.equal(images[:, one], images[:, other]) and not torch.equal(noise[:, one], noise[:, other])
    # the first view is the one that the sample has alone
    assert torch.equal(images[:, 0], batches[1][0][0][:2, 0]) and torch.equal(noise[:, 0], batches[1][0][1][:2, 0])


def test_repeated_augmentation_sees_every_image_alike_over_the_epochs(data):
    """--repeated_aug: an epoch's images are a new random part of the data, so none is left out for ever."""
    sampler = GENERIC.build_data(parsed(GENERIC, data, '--repeated_aug', 4), 4).sampler
    seen = set()
    for sampler.epoch in range(30):
        seen |= {index for _, index in sampler}
    assert seen == set(range(48))


@pytest.mark.parametrize('views', [0, -1, 3, 16])
def test_repeated_augmentation_must_divide_the_batch(views, data):
    """--repeated_aug: a batch has --batch_size views, whatever the number of images."""
    with pytest.raises(models.InputError, match='--repeated_aug'):
        parsed(GENERIC, data, '--repeated_aug', views)


def test_a_run_with_repeated_augmentation_trains_on_all_views(data, tmp_path, monkeypatch):
    """--repeated_aug: the network is shown --batch_size normalised views with a mask each."""
    shown = []
    forward = models.MaskedAutoencoder.forward
    monkeypatch.setattr(models.MaskedAutoencoder, 'forward', lambda self, images, masking: (
        shown.append((images.shape, masking.mask.shape, images.dtype)), forward(self, images, masking))[1])
    GENERIC.main(parsed(GENERIC, data, '--repeated_aug', 2, '--epochs', 1, '--output_dir', tmp_path / 'run'))
    assert shown and set(shown) == {((8, 3, 16, 16), (8, 4), torch.float32)}


# ------------------------------------------------------------------------------------------------------------------ erasing


class Look(nn.Module):
    """A classifier that keeps what it is shown."""

    def __init__(self):
        super().__init__()
        self.bias, self.seen = nn.Parameter(torch.zeros(12)), []

    def forward(self, images):
        self.seen.append(images.clone())
        return self.bias.expand(len(images), -1)


def shown_images(data, reprob, epoch=0):
    args = parsed(CLS, data, '--reprob', reprob, '--mixup', 0, '--cutmix', 0, '--amp', 'off')
    model, batch = Look(), torch.full((8, 3, 16, 16), 7, dtype=torch.uint8)
    CLS.train_one_epoch(model, None, [(batch, torch.arange(8), [''] * 8)] * 2, torch.optim.SGD(model.parameters(), lr=0.1),
                        argparse.Namespace(step=lambda t: None), torch.amp.GradScaler('cpu', enabled=False), None,
                        CLS.Progress(args, args.epochs), CPU, epoch, args)
    return torch.stack(model.seen) != models.normalise(batch)


def test_random_erasing_is_of_single_images_and_repeats_by_step(data):
    """Table 1: random erasing with probability 0.25, of 2 to a third of an image; drawn from (seed, epoch, step, rank)."""
    assert not shown_images(data, 0).any()
    erased = shown_images(data, 1)  # (steps, N, 3, H, W)
    share = erased.float().mean(dim=(2, 3, 4))
    assert (share > 0.01).all() and (share < 0.4).all()
    assert not torch.equal(erased[0], erased[1])  # another step
    assert torch.equal(erased, shown_images(data, 1)) and not torch.equal(erased, shown_images(data, 1, epoch=1))
    some = torch.stack([shown_images(data, 0.25, epoch=epoch).flatten(2).any(2) for epoch in range(40)])
    assert abs(some.float().mean().item() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 640)


# --------------------------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize('size', [(32, 32), (16, 48)])
def test_visible_patches_are_embedded_as_in_the_whole_image(size):
    """Stage 1: only kept patches are projected; the numbers are those of the convolution of whole images."""
    model = models.create_mae('mae_vit_pico_patch8', size).double()
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    length = model.patch_embed.num_patches
    masking = models.random_masking(torch.rand(3, length, generator=torch.Generator().manual_seed(1)), 0.5)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.encode(images, masking)
    whole = nn.functional.conv2d(images, model.patch_embed.proj.weight, model.patch_embed.proj.bias, stride=8)
    whole = whole.flatten(2).transpose(1, 2) + model.pos_embed[:, 1:]
    for n in range(3):
        torch.testing.assert_close(seen[0][n, 1:], whole[n, masking.ids_keep[n]], atol=1e-12, rtol=0)


class Waits(TorchDispatchMode):
    """Counts the operations for which the host waits for the device's numbers."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten, packet = torch.ops.aten, func.overloadpacket
        masked = packet is aten.index and any(index is not None and index.dtype == torch.bool for index in args[1])
        self.count += masked or packet in (aten._local_scalar_dense, aten.nonzero, aten.is_nonzero, aten.equal)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('script', [GENERIC, CLS, SEG], ids=['stage 1', 'classification', 'segmentation'])
def test_no_step_waits_for_the_device_between_printed_lines(script, data, tmp_path, monkeypatch):
    """README, speed: sums stay on the device; a host sync per printed line, so none more for more steps."""
    train, counts = script.train_one_epoch, []

    def counted(model, teacher, loader, *rest):
        batch = next(iter(loader))
        for steps in (2, 5):
            with Waits() as waits:
                train(model, teacher, [batch] * steps, *rest)
            counts.append(waits.count)
        raise Stop

    monkeypatch.setattr(script, 'train_one_epoch', counted)
    # behind warm-up, where stage 1 compares itself with a constant no more
    monkeypatch.setattr(GENERIC, 'CONSTANT_STEPS', 0)
    with pytest.raises(Stop):
        script.main(parsed(script, data, '--output_dir', tmp_path))
    assert counts[0] == counts[1] > 0  # those of the last line


def test_the_count_of_waits_sees_one():
    """The check above can fail: .item() in a step is counted."""
    with Waits() as waits:
        torch.ones(()).item()
        torch.ones(3)[torch.tensor([True, False, True])]
    assert waits.count == 2


def test_attention_by_a_matrix_is_that_of_the_fused_kernel():
    """On a CPU softmax attention is written out, as it is faster there: the same numbers."""
    before = timm.layers.use_fused_attn()
    try:
        outputs = []
        for fused in (True, False):
            timm.layers.set_fused_attn(fused)
            torch.manual_seed(0)
            model = models.create_vit('vit_nano_patch8', 5, 32).eval()
            assert {block.attn.fused_attn for block in model.blocks} == {fused}
            nn.init.normal_(model.head.weight)
            outputs.append(model(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))))
    finally:
        timm.layers.set_fused_attn(bool(before))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)


@EVERY
def test_updates_are_those_of_plain_adamw(script, data, tmp_path, monkeypatch):
    """tools/benchmark.md: fused AdamW is AdamW; the plain one on the same gradients ends at the same weights."""
    built = []
    create = script.create_optimizer_v2
    monkeypatch.setattr(script, 'create_optimizer_v2', lambda *a, **k: built.append(create(*a, **k)) or built[-1])
    monkeypatch.setattr(script, 'train_one_epoch', stop)
    with pytest.raises(Stop):
        script.main(parsed(script, data, '--output_dir', tmp_path))
    [optimizer] = built
    assert optimizer.defaults['fused'] and isinstance(optimizer, torch.optim.AdamW)
    groups = [{**group, 'params': [p.detach().clone().requires_grad_() for p in group['params']], 'fused': None,
               'foreach': False} for group in optimizer.param_groups]
    plain = torch.optim.AdamW(groups)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for ours, theirs in zip(optimizer.param_groups, plain.param_groups):
            for left, right in zip(ours['params'], theirs['params']):
                left.grad = torch.randn(left.shape, generator=generator)
                right.grad = left.grad.clone()
        optimizer.step()
        plain.step()
    for ours, theirs in zip(optimizer.param_groups, plain.param_groups):
        for left, right in zip(ours['params'], theirs['params']):
            torch.testing.assert_close(left, right, atol=1e-6, rtol=0)


@pytest.mark.parametrize('script, target', [(GENERIC, 'pixel'), (GENERIC, 'feature'), (GENERIC, 'recon_gt'), (CLS, None),
                                            (DET, None), (SEG, None)])
@pytest.mark.parametrize('teacher', [True, False])
def test_compiled_networks_learn_the_same_and_keep_their_names(script, target, teacher, data, tmp_path, monkeypatch):
    """--compile: equal up to rounding; the checkpoint has the same names, so it can be used without the flag."""
    if teacher == (target == 'pixel'):
        pytest.skip('MAE itself has no teacher, and the other targets of stage 1 have one')
    if script is GENERIC:
        torch.save(models.create_mae('mae_vit_pico_patch8', 16).state_dict(), tmp_path / 'teacher.pth')
        more = '--target', target, '--teacher_model', 'mae_vit_pico_patch8', '--target_layer', 1
    else:
        more = '--teacher_model', 'vit_pico_patch8'
        if teacher:
            script.main(parsed(script, data, '--output_dir', tmp_path / 'teacher'))
            (tmp_path / 'teacher/checkpoint.pth').rename(tmp_path / 'teacher.pth')
    more += ('--teacher_path', tmp_path / 'teacher.pth') if teacher else ()
    graphs, compile_ = [], torch.compile

    def backend(graph, inputs):
        graphs.append(torch.is_grad_enabled())
        return graph.forward

    monkeypatch.setattr(torch, 'compile', lambda *a, **k: compile_(*a, **{**k, 'backend': backend}))
    logs, states = [], []
    for flags in ((), ('--compile',)):
        torch._dynamo.reset()
        out = tmp_path / '-'.join(('run', *flags))
        train, during = script.train_one_epoch, []
        monkeypatch.setattr(script, 'train_one_epoch',
                            lambda *a: (train(*a), during.extend(graphs))[0])  # noqa: B023
        script.main(parsed(script, data, '--output_dir', out, *more, *flags))
        monkeypatch.setattr(script, 'train_one_epoch', train)
        # the student's graphs have gradients, the teacher's have none
        assert set(during) == ({True, False} if teacher else {True}) if flags else not graphs
        logs.append([json.loads(line)['train_loss'] for line in (out / 'log.txt').read_text().splitlines()])
        states.append(torch.load(out / 'checkpoint.pth', weights_only=True)['model'])
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)
    assert list(states[0]) == list(states[1])


def test_segmentation_with_checkpointing_has_the_same_gradients():
    """--grad_checkpointing in segmentation: blocks are computed twice, stochastic depth included; the result is the same."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = SEG.Segmenter('vit_nano_patch8', 5, 32, 0.3).train()
        model.backbone.set_grad_checkpointing(checkpointing)
        calls = [0]
        model.backbone.blocks[1].register_forward_pre_hook(lambda *_, calls=calls: calls.__setitem__(0, calls[0] + 1))
        torch.manual_seed(1)
        logits, aux_logits = model(torch.randn(3, 3, 32, 32))
        (logits.square().mean() + aux_logits.square().mean()).backward()
        assert calls == [2 if checkpointing else 1]
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


# --------------------------------------------------------------------------------------------------------------- benchmark


def bench(tmp_path, monkeypatch, stage, *words):
    """The benchmark's result for a tiny network; what it sets in other modules is undone by monkeypatch."""
    script = __import__(benchmark.SCRIPTS[stage])
    for module, names in ((models, ('load_teacher', 'read_checkpoint', 'say')),
                          (script, ('train_one_epoch', 'load_detector', 'load_segmenter'))):
        for name in names:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(module, name))
    words = ['--stage', stage, '--steps', '1', '--turns', '1', '--json', str(tmp_path / 'rows.json'), *map(str, words)]
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', *words])
    benchmark.main(*benchmark.get_args_parser().parse_known_args(words))
    return json.loads((tmp_path / 'rows.json').read_text().splitlines()[-1])


TEACHER = {'generic': ('--teacher_model', 'mae_vit_pico_patch8', '--target', 'feature', '--target_layer', 1),
           **dict.fromkeys(('cls', 'det', 'seg'), ('--teacher_model', 'vit_pico_patch8'))}
LONG = {'generic': (), 'cls': (), **dict.fromkeys(('det', 'seg'), ('--iterations', 1000, '--eval_every', 100))}


@pytest.mark.parametrize('teacher', [True, False])
@pytest.mark.parametrize('stage', benchmark.SCRIPTS)
def test_benchmark_measures_every_stage_beside_a_plain_step_of_the_same_loss(stage, teacher, data, tmp_path, monkeypatch):
    """tools/benchmark.md: loader, step and both, memory, FLOP, share of the peak and the ratio to the plain way."""
    script = __import__(benchmark.SCRIPTS[stage])
    flags = TEACHER[stage] if teacher else ('--no-teacher',)
    row = bench(tmp_path, monkeypatch, stage, *TINY[script], *LONG[stage], '--data_path', data / FOLDER[script], *flags)
    assert row['teacher'] is teacher and row['loss_difference'] <= 1e-5
    for name in ('loader', 'step', 'both', 'plain_step', 'plain_both'):
        assert 0 < row[f'{name}_images_per_second'] < math.inf
    for part in ('step', 'both'):
        median, low, high = row[f'{part}_ratio']
        assert 0 < low <= median <= high
        assert median == pytest.approx(row[f'{part}_images_per_second'] / row[f'plain_{part}_images_per_second'], rel=1e-3)
    assert 0 <= row['data_waiting'] <= 1 and row['peak_memory_gb'] > 0.1
    assert row['cores_to_feed'] == pytest.approx(row['step_images_per_second'] / row['loader_per_core'])
    assert row['share_of_peak'] == pytest.approx(
        row['gflop_per_image'] * row['step_images_per_second'] / row['peak_tflops'] / 1e3)
    assert not (tmp_path / 'output').exists()


def block_flop(tokens, dim):
    """Forward of a ViT block: qkv, the two products of attention, projection, MLP of ratio 4."""
    return 2 * tokens * dim * dim * (3 + 1 + 8) + 2 * 2 * tokens * tokens * dim


def test_flop_are_those_worked_out_by_hand(data, tmp_path, monkeypatch):
    """tools/benchmark.md, the arithmetic floor: teacher forward up to the target, student forward and backward."""
    words = ('--input_size', 32, '--data_path', data / 'imagenet', '--no-plain',
             '--teacher_model', 'mae_vit_nano_patch8', '--target', 'feature', '--target_layer', 1)
    rows = [bench(tmp_path, monkeypatch, 'generic', *TINY[GENERIC], *words, *flags)
            for flags in ((), ('--batch_size', 1), ('--repeated_aug', 4), ('--repeated_aug', 8))]
    length, kept, pixels = 16, 4, 3 * 8 * 8
    teacher = 2 * kept * pixels * 64 + 4 * block_flop(1 + kept, 64) + 2 * (1 + kept) * 64 * 64 + block_flop(1 + length, 64)
    embed = 2 * kept * pixels * 32
    rest = 2 * block_flop(1 + kept, 32) + 2 * (1 + kept) * 32 * 32 + 2 * block_flop(1 + length, 32) + \
        2 * (1 + length) * (32 * 64 + 64 * 64)
    for row in rows:  # backward: twice the forward, and no gradient of the pixels
        assert row['gflop_per_image'] == pytest.approx((teacher + 2 * embed + 3 * rest) / 1e9, rel=1e-6)


def test_plain_networks_are_plain_and_ours_are_not_touched():
    """tools/benchmark.md: whole-image embedding, attention as a matrix, detection's bias as timm has it; on copies."""
    timm.layers.set_fused_attn(True)
    mae = models.create_mae('mae_vit_pico_patch8', 32)
    plain = benchmark.make_plain(mae)
    assert {block.attn.fused_attn for block in plain.blocks} == {False}
    assert {block.attn.fused_attn for block in mae.blocks} == {True}
    calls = []
    plain.patch_embed.register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    masking = models.random_masking(torch.rand(2, 16), 0.75)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(plain.encode(images, masking), mae.encode(images, masking), atol=1e-5, rtol=0)
    assert calls == [(2, 16, 32)]

    args = DET.get_args_parser().parse_args([*TINY[DET]])
    args.input_size = [64, 64]
    detector = DET.Detector('vit_pico_patch8', 4, args).eval()
    for name, parameter in detector.named_parameters():
        if 'rel_pos' in name:
            nn.init.normal_(parameter)
    plain = benchmark.make_plain(detector)
    kinds = [{type(block.attn) for block in network.backbone.net.blocks} for network in (plain, detector)]
    assert kinds == [{benchmark.Attention}, {DET.FoldedAttention}]
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(plain.backbone.net(images), detector.backbone.net(images), atol=1e-4, rtol=0)


def test_another_loss_is_refused(data, tmp_path, monkeypatch):
    """tools/benchmark.md: a ratio counts only where both compute the same loss to 1e-5."""
    encode = benchmark.whole_image_encode
    monkeypatch.setattr(benchmark, 'whole_image_encode', lambda self, *inputs: encode(self, *inputs) * 1.01)
    with pytest.raises(models.InputError, match='another loss'):
        bench(tmp_path, monkeypatch, 'generic', *TINY[GENERIC], '--data_path', data / 'imagenet', '--no-teacher')


def test_benchmark_prints_its_results_as_a_table(data, tmp_path, monkeypatch, capsys):
    """--table: one row of Markdown per result."""
    for size in (8, 4):
        bench(tmp_path, monkeypatch, 'cls', *TINY[CLS], '--data_path', data / 'imagenet', '--no-teacher', '--no-plain',
              '--batch_size', size)
    capsys.readouterr()
    benchmark.print_table(tmp_path / 'rows.json')
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.count('|') == lines[0].count('|') for line in lines)
    assert [line.split(' | ')[1] for line in lines[2:]] == ['8', '4']


def test_drawn_photographs_have_an_imagenet_photographs_size(tmp_path):
    """tools/benchmark.py: 500 x 375 pixels, about 110 kB, readable as an image folder."""
    benchmark.draw_photographs(tmp_path, count=2)
    folder = torchvision.datasets.ImageFolder(tmp_path / 'train')
    assert len(folder) == 2 and folder[0][0].size == (500, 375)
    assert 60_000 < (tmp_path / 'train/class0/0.jpg').stat().st_size < 180_000
