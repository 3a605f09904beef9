"""The networks, the mask and the seeded data against transformers, timm, torchvision and plain loops."""
import math
import random
from argparse import Namespace

import generic_distill
import numpy as np
import pytest
import safetensors.torch
import specific_distill_cls
import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from timm.layers import build_sincos2d_pos_embed
from timm.optim import create_optimizer_v2
from torch import nn

import models


def fill(module, seed=0, std=0.2):
    """Random values everywhere, so that no bias is zero and no norm is the identity by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return module


def noise_for(n, length, seed=1):
    return torch.rand(n, length, generator=torch.Generator().manual_seed(seed))


def images_for(n, height, width, seed=2):
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def shapes(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def without_gradient(module):
    """Names of the trained parameters whose gradient is missing or zero."""
    return [name for name, p in module.named_parameters()
            if p.requires_grad and (p.grad is None or not p.grad.abs().max() > 0)]


# ---- names and sizes -----------------------------------------------------------------------------


@pytest.mark.parametrize('name, expected', [
    # dim, depth, heads, patch, decoder width, decoder blocks, decoder heads
    ('mae_vit_base_patch16', (768, 12, 12, 16, 512, 8, 16)),
    ('mae_vit_huge_patch14', (1280, 32, 16, 14, 512, 8, 16)),
    ('mae_vit_small_patch16', (384, 12, 6, 16, 256, 4, 8)),
    ('mae_vit_tiny_patch16_dec192d4b', (192, 12, 3, 16, 192, 4, 8)),
    ('mae_vit_tiny_patch28_dec64d2b', (192, 12, 3, 28, 64, 2, 4)),
])
def test_a_name_gives_the_architecture(name, expected):
    with torch.device('meta'):
        model = models.create_mae(name)
    dim, depth, heads, patch, decoder_dim, decoder_depth, decoder_heads = expected
    assert model.patch_embed.proj.weight.shape == (dim, 3, patch, patch)
    assert (len(model.blocks), model.blocks[0].attn.num_heads) == (depth, heads)
    assert model.decoder_embed.weight.shape == (decoder_dim, dim)
    assert len(model.decoder_blocks) == decoder_depth
    assert model.decoder_blocks[0].attn.num_heads == decoder_heads
    assert model.decoder_pred.weight.shape == (3 * patch * patch, decoder_dim)


@pytest.mark.parametrize('name', [
    'vit_base_patch16', 'mae_vit_giant_patch16', 'mae_vit_base_patch16_dec512', 'mae_vit_pico_patch0'])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(SystemExit, match=f'unknown model name .{name}'):
        models.create_mae(name)
    with pytest.raises(SystemExit, match='unknown model name .mae_'):
        models.create_vit('mae_vit_base_patch16', 10)
    with pytest.raises(SystemExit, match='width 100: .*multiple of 32'):
        models.create_mae('mae_vit_pico_patch8_dec100d2b')


@pytest.mark.parametrize('size', [30, (32, 20), 4])
def test_a_size_that_the_patch_does_not_divide_is_refused(size):
    with pytest.raises(SystemExit, match='patch size 8'):
        models.create_mae('mae_vit_pico_patch8', size)
    with pytest.raises(SystemExit, match='patch size 8'):
        models.create_vit('vit_pico_patch8', 10, size)


def test_mae_base_has_the_published_number_of_parameters_and_timms_encoder():
    with torch.device('meta'):
        model = models.create_mae('mae_vit_base_patch16')
        encoder = timm.create_model('vit_base_patch16_224', num_classes=0)
    assert sum(p.numel() for p in model.parameters()) == 111_907_840
    assert shapes(encoder).items() <= shapes(model).items()


# ---- mask and positions --------------------------------------------------------------------------


@pytest.mark.parametrize('ratio, kept', [(0.05, 186), (0.75, 49), (0.9, 19)])
def test_the_mask_hides_what_a_plain_loop_hides(ratio, kept):
    """The smallest noise is kept, 1 = hidden, ids_restore inverts the shuffle."""
    noise = noise_for(3, 196)
    masking = models.random_masking(noise, ratio)
    for n in range(3):
        order = sorted(range(196), key=noise[n].tolist().__getitem__)
        assert masking.ids_keep[n].tolist() == order[:kept]
        assert masking.mask[n].tolist() == [float(i not in order[:kept]) for i in range(196)]
        assert [order[place] for place in masking.ids_restore[n].tolist()] == list(range(196))


@pytest.mark.parametrize('ratio', [0.0, 0.99])
def test_a_mask_ratio_that_hides_nothing_or_everything_is_refused(ratio):
    with pytest.raises(SystemExit, match='--mask_ratio'):
        models.random_masking(noise_for(2, 16), ratio)


def test_position_tables_are_timms_with_quarters_permuted_and_fixed():
    """MAE lets the column go first: timm's table after permuting the channel quarters [1, 3, 0, 2]."""
    model = models.create_mae('mae_vit_mini_patch8', (32, 48))
    for table, dim in ((model.pos_embed, 192), (model.decoder_pos_embed, 128)):
        quarters = build_sincos2d_pos_embed([4, 6], dim).reshape(-1, 4, dim // 4)
        expected = quarters[:, [1, 3, 0, 2]].reshape(-1, dim)
        torch.testing.assert_close(table[0, 1:], expected, atol=2e-6, rtol=0)
        assert table[0, 0].abs().max() == 0 and not table.requires_grad


# ---- MAE against transformers --------------------------------------------------------------------


def hugging_face(folder, kind='ViTMAEForPreTraining', size=(32, 32), **options):
    """mae_vit_nano_patch8 of transformers, or its encoder, with random weights; its file in `folder`."""
    transformers = pytest.importorskip('transformers')
    config = (transformers.ViTMAEConfig if 'MAE' in kind else transformers.ViTConfig)(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=256,
        decoder_hidden_size=64, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
        decoder_intermediate_size=256, image_size=size, patch_size=8, layer_norm_eps=1e-6, **options)
    oracle = fill(getattr(transformers, kind)(config)).eval().double()
    oracle.save_pretrained(folder)
    return oracle, folder / 'model.safetensors'


@pytest.mark.parametrize('naming', ['today', 'version 4', 'in memory'])
@pytest.mark.parametrize('size', [(32, 32), (16, 64)])
def test_mae_equals_transformers(tmp_path, size, naming):
    """Mask, encoder, decoder states and pixels; all its namings load; non-square images, too."""
    oracle, path = hugging_face(tmp_path, size=size)
    if naming == 'version 4':
        state = safetensors.torch.load_file(path)
        assert 'decoder.decoder_encoder.layer.0.output.dense.weight' in state
        path = tmp_path / 'pytorch_model.bin'
        old = {key.replace('decoder_encoder.layer.', 'decoder_layers.'): state[key] for key in state}
        torch.save(old, path)
    if naming == 'in memory':  # version 5 renames them when it saves
        path = tmp_path / 'state_dict.pth'
        torch.save(oracle.state_dict(), path)
    model = models.create_mae('mae_vit_nano_patch8', size).double()
    model.load_state_dict(models.load_checkpoint(path))
    images, noise, states = images_for(2, *size).double(), noise_for(2, 16), []
    for layer in oracle.decoder.decoder_layers:
        layer.register_forward_hook(lambda module, inputs, output: states.append(output))
    masking = models.random_masking(noise, 0.75)
    with torch.no_grad():
        encoded = oracle.vit(images, noise=noise)
        logits = oracle.decoder(encoded.last_hidden_state, encoded.ids_restore).logits
        ours = [model.encode(images, masking), model.decoder_features(images, masking, 1),
                model.decoder_features(images, masking, 2), model(images, masking)]
    assert torch.equal(masking.mask, encoded.mask)
    assert torch.equal(masking.ids_restore, encoded.ids_restore)
    assert logits.abs().max() > 0.1
    for left, right in zip(ours, [encoded.last_hidden_state, *states, logits], strict=True):
        torch.testing.assert_close(left, right, atol=1e-9, rtol=0)


@pytest.mark.parametrize('norm_pix_loss', [True, False])
def test_the_loss_of_target_pixel_is_transformers(tmp_path, norm_pix_loss):
    oracle, path = hugging_face(tmp_path, norm_pix_loss=norm_pix_loss)
    model = models.create_mae('mae_vit_nano_patch8', 32).double()
    model.load_state_dict(models.load_checkpoint(path))
    images, noise = images_for(3, 32, 32).double(), noise_for(3, 16)
    masking = models.random_masking(noise, 0.75)
    args = Namespace(target='pixel', norm_pix_loss=norm_pix_loss, distributed=False)
    with torch.no_grad():
        expected = oracle(images, noise=noise).loss.item()
        losses = generic_distill.compute_losses(model, None, images, masking, args)
    assert losses['loss_pixel'].item() == pytest.approx(expected, rel=1e-5) and len(losses) == 1
    assert torch.equal(model.patchify(images), oracle.patchify(images))
    assert torch.equal(model.unpatchify(oracle.patchify(images)), images)


def test_a_hugging_face_encoder_without_decoder_starts_stage_two(tmp_path):
    oracle, path = hugging_face(tmp_path, 'ViTMAEModel', mask_ratio=0.0)  # names without `vit.`
    model = models.create_vit('vit_nano_patch8', 10, 32).eval()
    models.load_pretrained(model, path)
    images, rising = images_for(2, 32, 32).double(), torch.arange(16.0).expand(2, -1)
    with torch.no_grad():  # rising noise: nothing is hidden and the order is kept
        expected = oracle(images, noise=rising).last_hidden_state
        torch.testing.assert_close(model.double().forward_features(images), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize('in_memory', [False, True])
def test_a_hugging_face_classifier_is_a_teacher_and_starts_stage_two(in_memory, tmp_path):
    oracle, path = hugging_face(tmp_path, 'ViTForImageClassification', num_labels=3)
    if in_memory:
        path = tmp_path / 'state_dict.pth'
        torch.save(oracle.state_dict(), path)
    teacher = specific_distill_cls.load_classifier(path, 'vit_nano_patch8', 32, ['a', 'b', 'c']).double()
    model = models.create_vit('vit_nano_patch8', 10, 32).eval()
    models.load_pretrained(model, path)
    images = images_for(2, 32, 32).double()
    with torch.no_grad():
        expected = oracle(images, output_hidden_states=True)
        torch.testing.assert_close(teacher(images), expected.logits, atol=1e-6, rtol=0)
        states = oracle.vit.layernorm(expected.hidden_states[-1])
        torch.testing.assert_close(model.double().forward_features(images), states, atol=1e-6, rtol=0)


def test_the_students_head_reads_the_last_decoder_block_without_a_norm():
    student = fill(models.create_mae('mae_vit_pico_patch8', (24, 48), target_dim=48))
    images, masking = images_for(2, 24, 48), models.random_masking(noise_for(2, 18), 0.75)
    state = student.decoder_features(images, masking, 2)
    expected = student.feature_head.fc2(F.gelu(student.feature_head.fc1(state)))
    assert expected.shape == (2, 19, 48)
    torch.testing.assert_close(student(images, masking), expected)
    assert not any(name.startswith(('decoder_norm', 'decoder_pred')) for name in student.state_dict())


def test_blocks_behind_the_target_layer_are_not_run():
    teacher = models.create_mae('mae_vit_pico_patch8_dec32d4b', 32)
    calls = []
    for number, module in enumerate([*teacher.decoder_blocks, teacher.decoder_norm], start=1):
        module.register_forward_hook(lambda module, inputs, output, number=number: calls.append(number))
    teacher(images_for(1, 32, 32), models.random_masking(noise_for(1, 16), 0.75), 3)
    assert calls == [1, 2, 3]


@pytest.mark.parametrize('target, names', [
    ('feature', ['loss_feature']), ('recon', ['loss_recon']), ('recon_gt', ['loss_recon', 'loss_pixel']),
    ('pixel', ['loss_pixel'])])
def test_every_parameter_of_the_student_gets_a_gradient_and_none_of_the_teacher(target, names):
    teacher = fill(models.create_mae('mae_vit_pico_patch8_dec96d2b', 32), seed=5)
    target_dim = {'feature': 96, 'recon': 192, 'recon_gt': 192, 'pixel': None}[target]
    student = fill(models.create_mae('mae_vit_pico_patch8', 32, target_dim), std=0.05).train()
    args = Namespace(target=target, target_layer=1, supervise='masked', norm_pix_loss=True, distributed=False)
    masking = models.random_masking(noise_for(2, 16), 0.75)
    losses = generic_distill.compute_losses(student, teacher, images_for(2, 32, 32), masking, args)
    sum(losses.values()).backward()
    assert list(losses) == names
    assert without_gradient(student) == []
    assert all(p.grad is None for p in teacher.parameters())


# ---- classifiers ---------------------------------------------------------------------------------


def test_a_distilled_classifier_gives_two_logits_in_training_and_their_mean_in_eval():
    model = fill(models.create_vit('vit_pico_patch8', 5, 32, distilled=True)).train()
    images = images_for(4, 32, 32)
    class_logits, dist_logits = model(images)
    tokens = model.forward_features(images)
    torch.testing.assert_close(class_logits, model.head(tokens[:, 0]))
    torch.testing.assert_close(dist_logits, model.head_dist(tokens[:, 1]))
    (class_logits.logsumexp(1) + 2 * dist_logits.logsumexp(1)).sum().backward()
    assert without_gradient(model) == [] and model.pos_embed.requires_grad
    torch.testing.assert_close(model.eval()(images), (class_logits + dist_logits) / 2)


def test_average_pooling_reads_the_patch_tokens_and_not_the_class_token():
    model = fill(models.create_vit('vit_pico_patch8', 5, 32, global_pool=True)).train()
    images = images_for(2, 32, 32)
    logits = model(images)
    pooled = model.forward_features(images)[:, 1:].mean(dim=1)
    torch.testing.assert_close(logits, model.head(model.fc_norm(pooled)))
    assert isinstance(model.norm, nn.Identity)
    logits.logsumexp(1).sum().backward()
    assert without_gradient(model) == []


def expected_scale(name, depth, decay):
    if name.startswith(('patch_embed.', 'cls_token', 'pos_embed')):
        return decay ** (depth + 1)
    if name.startswith('blocks.'):
        return decay ** (depth - int(name.split('.')[1]))
    return 1.0  # final norm, heads and the distillation token


def group_of(optimizer, model):
    """Parameter name -> its optimizer group; every trained parameter is in exactly one."""
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {}
    for group in optimizer.param_groups:
        for parameter in group['params']:
            found[names.pop(id(parameter))] = group
    assert not names
    return found


@pytest.mark.parametrize('size, depth, options', [
    ('small', 12, {'distilled': True}), ('nano', 4, {'global_pool': 'avg'})])
def test_layer_decay_scales_are_the_authors(size, depth, options):
    with torch.device('meta'):
        model = models.create_vit(f'vit_{size}_patch16', 10, **options)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1, weight_decay=0.05, layer_decay=0.75)
    for name, group in group_of(optimizer, model).items():
        assert group['lr_scale'] == pytest.approx(expected_scale(name, depth, 0.75), rel=1e-12), name
        free = name.endswith('.bias') or 'norm' in name or name in ('cls_token', 'dist_token', 'pos_embed')
        assert group['weight_decay'] == (0.0 if free else 0.05), name


# ---- optimizer and schedule that main() builds ---------------------------------------------------


class Stop(Exception):
    pass


def built_by_main(script, argv, monkeypatch):
    """What main() hands to its first epoch: (model, optimizer, scheduler)."""
    caught = []

    def train_one_epoch(model, teacher, loader, optimizer, scheduler, *rest):
        caught.extend([model, optimizer, scheduler])
        raise Stop

    monkeypatch.setattr(script, 'train_one_epoch', train_one_epoch)
    with pytest.raises(Stop):
        script.main(script.get_args_parser().parse_args([*argv, '--num_workers', '0', '--device', 'cpu']))
    return caught


@pytest.fixture(scope='module')
def few_images(tmp_path_factory):
    root = tmp_path_factory.mktemp('few')
    for split in ('train', 'val'):
        for label in ('a', 'b'):
            (root / split / label).mkdir(parents=True)
            for i in range(2):
                Image.new('RGB', (32, 32), (40 * i, 9, 70)).save(root / split / label / f'{i}.png')
    return root


def mae_lr(t, lr, min_lr, warmup, epochs):
    """MAE's schedule by its description: linear warm-up, then half a cosine, at fractional epochs."""
    if t < warmup:
        return lr * t / warmup
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * (t - warmup) / (epochs - warmup)))


@pytest.mark.parametrize('target, epochs, warmup, min_lr', [
    ('feature', 300, 10, 2.5e-6), ('pixel', 800, 40, 0.0)])
def test_schedule_and_groups_of_stage_one_are_maes(
        tmp_path, few_images, monkeypatch, target, epochs, warmup, min_lr):
    argv = ['--target', target, '--model', 'mae_vit_pico_patch8', '--data_path', str(few_images),
            '--input_size', '32', '--batch_size', '2', '--output_dir', str(tmp_path / 'out')]
    if target == 'feature':
        torch.save(models.create_mae('mae_vit_pico_patch8', 32).state_dict(), tmp_path / 'teacher.pth')
        argv += ['--teacher_model', 'mae_vit_pico_patch8', '--teacher_path', str(tmp_path / 'teacher.pth')]
    model, optimizer, scheduler = built_by_main(generic_distill, argv, monkeypatch)
    lr = 1.5e-4 * (2 * 2) / 256  # batch 2, two steps an update
    for t in (0, 0.37, 5.5, warmup, epochs / 2, epochs - 0.01):
        scheduler.step(t)
        for group in optimizer.param_groups:
            assert abs(group['lr'] - mae_lr(t, lr, min_lr, warmup, epochs)) < 1e-12
    for name, group in group_of(optimizer, model).items():
        assert tuple(group['betas']) == (0.9, 0.95)
        assert group['weight_decay'] == (0.0 if model.get_parameter(name).ndim <= 1 else 0.05), name


@pytest.mark.parametrize('finetune, epochs, blr, decay', [(True, 200, 1e-3, 0.75), (False, 500, 2.5e-4, 1.0)])
def test_schedule_and_scales_of_classification_are_table_1s(
        tmp_path, few_images, monkeypatch, finetune, epochs, blr, decay):
    torch.save(models.create_mae('mae_vit_pico_patch8', 32).state_dict(), tmp_path / 'mae.pth')
    argv = ['--model', 'vit_pico_patch8', '--data_path', str(few_images), '--input_size', '32',
            '--batch_size', '4', '--output_dir', str(tmp_path / 'out')]
    argv += ['--finetune', str(tmp_path / 'mae.pth')] if finetune else []
    model, optimizer, scheduler = built_by_main(specific_distill_cls, argv, monkeypatch)
    groups = group_of(optimizer, model)
    for t in (0, 2.5, 5, epochs / 3, epochs - 0.125):
        scheduler.step(t)
        for name, group in groups.items():
            expected = mae_lr(t, blr * 4 / 256, 1e-6, 5, epochs) * expected_scale(name, 2, decay)
            assert abs(group['lr'] - expected) < 1e-12, name
    assert all(tuple(group['betas']) == (0.9, 0.999) for group in optimizer.param_groups)


# ---- start values --------------------------------------------------------------------------------


def test_mae_starts_from_maes_values():
    """Xavier-uniform linear layers, the patch projection as one, zero biases, tokens of std 0.02."""
    torch.manual_seed(0)
    size = models.Size(dim=768, depth=1, heads=12, decoder_dim=512, decoder_depth=1)
    model = models.MaskedAutoencoder((32, 32), size, target_dim=256)
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(weights) == 4 + 1 + 4 + 2
    for weight in [*weights, model.patch_embed.proj.weight.flatten(1)]:
        bound = math.sqrt(6 / (weight.shape[0] + weight.shape[1]))
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert all(p.abs().max() == 0 for name, p in model.named_parameters() if name.endswith('.bias'))
    for token in (model.cls_token, model.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.1)


def test_heads_start_small_for_fine_tuning_and_the_distillation_token_without_a_position():
    torch.manual_seed(0)
    model = models.create_vit('vit_micro_patch8', 300, 32, distilled=True)
    assert model.pos_embed.shape == (1, 18, 128)  # class, distillation, patches
    assert (model.pos_embed[0].abs().amax(dim=1) == 0).nonzero().flatten().tolist() == [1]
    models.reset_head(model)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.03)
    assert model.head_dist.weight.std().item() == pytest.approx(0.02, rel=0.03)


# ---- images --------------------------------------------------------------------------------------


def photograph(height=90, width=120, seed=0):
    """Smooth colours with a grain, as a Pillow image."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8))


@pytest.mark.parametrize('orientation', range(1, 9))
def test_exif_turns_an_image_with_an_annotation_but_never_a_classifiers(orientation, tmp_path):
    """Published accuracies come from the stored pixels, as torchvision and timm read them."""
    seen = np.asarray(photograph(8, 12))
    # EXIF: where the 0th row and column of the stored pixels are seen
    stored = {1: seen, 2: seen[:, ::-1], 3: seen[::-1, ::-1], 4: seen[::-1], 5: seen.transpose(1, 0, 2),
              6: np.rot90(seen), 7: seen[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(seen, -1)}[orientation]
    path, exif = tmp_path / 'train/cat/0.png', Image.Exif()
    path.parent.mkdir(parents=True)
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    assert np.array_equal(models.read_rgb(path, (8, 12)), seen)
    if stored.shape != seen.shape:  # an annotation of the stored frame keeps it
        assert np.array_equal(models.read_rgb(path, (12, 8)), stored)
    args = Namespace(data_set='folder', data_path=tmp_path)
    image, _ = specific_distill_cls.open_dataset(args, 'train')[0]
    assert np.array_equal(image, torchvision.datasets.folder.default_loader(path))
    assert np.array_equal(image, stored)


def test_bytes_are_normalised_as_torchvision_does_it():
    transform = torchvision.transforms.Compose([
        torchvision.transforms.ToTensor(),
        torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    pixels = torch.from_numpy(np.array(photograph())).permute(2, 0, 1)
    assert torch.equal(models.normalise(torch.stack([pixels, pixels]))[1], transform(photograph()))


@pytest.mark.parametrize('size, scale', [((48, 48), (0.2, 1.0)), ((160, 80), (0.08, 1.0))])
def test_crops_are_torchvisions_and_pixels_pillows_up_to_rounding(size, scale):
    bicubic = torchvision.transforms.InterpolationMode.BICUBIC
    theirs = torchvision.transforms.RandomResizedCrop(size, scale, interpolation=bicubic)
    differences = []
    for seed in range(20):
        torch.manual_seed(seed)
        expected = np.asarray(theirs(photograph(seed=seed))).astype(int)
        torch.manual_seed(seed)
        crop = models.ResizedCrop(size, scale)(photograph(seed=seed))
        assert crop.dtype == torch.uint8 and crop.shape == (3, *size)
        differences.append(np.abs(crop.permute(1, 2, 0).numpy() - expected))
    differences = np.stack(differences)
    assert (differences > 1).mean() < 0.001 and differences.mean() < 0.1


# ---- seeded data ---------------------------------------------------------------------------------


class Draws(torch.utils.data.Dataset):
    """A data set whose items draw from all three generators."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return index, torch.rand(1).item(), random.random(), np.random.rand()


def test_a_sample_depends_on_seed_epoch_and_index_alone():
    keys = [(epoch, index) for epoch in (0, 1) for index in range(4)]
    first = {key: models.SeededDataset(Draws(), 0)[key] for key in keys}
    again = models.SeededDataset(Draws(), 0)
    assert {key: again[key] for key in reversed(keys)} == first
    others = [*first.values(), models.SeededDataset(Draws(), 1)[0, 0]]
    for draws in list(zip(*others))[1:]:
        assert len(set(draws)) == len(draws) == 9
    assert [index for index, *_ in others] == [0, 1, 2, 3, 0, 1, 2, 3, 0]


def sampler(length, batch_size, world_size=1, rank=0, accum_iter=1, seed=0, rounds=()):
    args = Namespace(batch_size=batch_size, accum_iter=accum_iter, world_size=world_size, rank=rank,
                     seed=seed)
    return models.SeededSampler(length, args, *rounds)


def batches(one, batch_size, epoch, done=0):
    """The keys of an epoch's remaining batches, as a loader makes them."""
    start = one.set_epoch(epoch, done)
    keys = list(one)
    made = [keys[i:i + batch_size] for i in range(0, len(keys), batch_size)]
    assert len(one) == (start + len(made)) * batch_size  # of the whole epoch
    return made


def joined(shares):
    """Batches of several processes -> what all of them see at each step, sorted."""
    return [sorted(sum(parts, [])) for parts in zip(*shares, strict=True)]


@pytest.mark.parametrize('length', [64, 71])
def test_every_step_sees_the_same_samples_however_many_processes_split_them(length):
    """No sample comes twice in an epoch, which ends at a whole update; each epoch and seed has its order."""
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        whole = batches(sampler(length, 16, seed=seed), 16, epoch)
        for processes in (2, 4):
            size = 16 // processes
            ranks = [sampler(length, size, processes, rank, seed=seed) for rank in range(processes)]
            assert joined([batches(one, size, epoch) for one in ranks]) == joined([whole])
        passes, indices = zip(*sum(whole, []))
        assert set(passes) == {epoch}
        assert len(set(indices)) == len(indices) == 64 and set(indices) <= set(range(length))
        orders.append(indices)
    assert len({*orders, tuple(range(64))}) == 4
    assert len(sum(batches(sampler(50, 4, 2, 1, accum_iter=3), 4, 0), [])) == 24  # 2 updates of 3 steps


def test_an_epoch_goes_on_in_the_middle():
    one = sampler(71, 8, accum_iter=2)
    whole = batches(one, 8, 3)
    assert [one.samples(step) for step in (0, 1, 8)] == [0, 8, 64]
    assert batches(one, 8, 3, done=32) == whole[4:] and one.start == 4
    assert [one.samples(step) for step in (4, 6)] == [32, 48]
    assert batches(one, 8, 3, done=math.inf) == [] and one.start == 8


@pytest.mark.parametrize('batch_size, steps_left', [(8, 4), (12, 2), (16, 2)])
def test_an_epoch_goes_on_in_the_middle_with_another_batch(batch_size, steps_left):
    """After 32 of 64 samples none comes again; steps are counted as if the batch had always been this."""
    done = sum(batches(sampler(64, 16), 16, 0)[:2], [])
    one = sampler(64, batch_size)
    rest = sum(batches(one, batch_size, 0, done=32), [])
    assert len(rest) == steps_left * batch_size and len(set(done + rest)) == len(done + rest)
    assert one.start == 64 // batch_size - steps_left and one.samples(one.start) == 32


@pytest.mark.parametrize('processes', [1, 2])
def test_rounds_are_pieces_of_one_endless_stream_of_passes(processes):
    """10 samples, 4 an update, 7 updates in rounds of 3: two passes and 8 samples of a third."""
    size = 4 // processes
    ranks = [sampler(10, size, processes, rank, rounds=(3, 7)) for rank in range(processes)]
    rounds = [joined([batches(one, size, number) for one in ranks]) for number in range(3)]
    assert [len(steps) for steps in rounds] == [3, 3, 1]
    stream = sum(sum(rounds, []), [])
    for number, count in enumerate([10, 10, 8]):
        own = {index for key, index in stream if key == number}
        assert len(own) == count
    assert len(stream) == 28
    assert joined([batches(one, size, 1, done=4) for one in ranks]) == rounds[1][1:]


def test_fewer_images_than_a_batch_are_refused_but_not_where_iterations_count():
    with pytest.raises(SystemExit, match='8 images.* 12'):
        sampler(8, 2, world_size=3, accum_iter=2)
    assert len(sum(batches(sampler(3, 8, rounds=(2, 2)), 8, 0), [])) == 16
