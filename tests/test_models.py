"""The networks against transformers, timm and plain loops. Sec. and Table: the paper's and its supplement's."""
import copy
import math
from argparse import Namespace

import generic_distill
import numpy as np
import pytest
import specific_distill_cls
import timm
import torch
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


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize('name, expected', [
    # dim, depth, heads, patch, decoder width, decoder blocks, decoder heads
    ('mae_vit_base_patch16', (768, 12, 12, 16, 512, 8, 16)),
    ('mae_vit_base_patch16_dec512d8b', (768, 12, 12, 16, 512, 8, 16)),
    ('mae_vit_large_patch16', (1024, 24, 16, 16, 512, 8, 16)),
    ('mae_vit_huge_patch14', (1280, 32, 16, 14, 512, 8, 16)),
    ('mae_vit_small_patch16', (384, 12, 6, 16, 256, 4, 8)),
    ('mae_vit_small_patch16_dec256d4b', (384, 12, 6, 16, 256, 4, 8)),
    ('mae_vit_tiny_patch16', (192, 12, 3, 16, 128, 4, 4)),
    ('mae_vit_tiny_patch16_dec192d4b', (192, 12, 3, 16, 192, 4, 8)),
    ('mae_vit_tiny_patch16_dec64d2b', (192, 12, 3, 16, 64, 2, 4)),
    ('mae_vit_small_patch28_dec512d1b', (384, 12, 6, 28, 512, 1, 16)),
])
def test_name_gives_the_architecture(name, expected):
    """README: names follow MAE and are parsed; decoder heads are width / 32 but for the authors' 192 -> 8 and 64 -> 4."""
    with torch.device('meta'):
        model = models.create_mae(name)
    dim, depth, heads, patch, decoder_dim, decoder_depth, decoder_heads = expected
    assert (model.cls_token.shape[-1], len(model.blocks), model.blocks[0].attn.num_heads) == (dim, depth, heads)
    assert model.patch_embed.proj.weight.shape == (dim, 3, patch, patch)
    assert model.decoder_embed.weight.shape == (decoder_dim, dim)
    assert (len(model.decoder_blocks), model.decoder_blocks[0].attn.num_heads) == (decoder_depth, decoder_heads)
    assert model.decoder_pred.weight.shape == (3 * patch * patch, decoder_dim)
    assert model.decoder_dim == decoder_dim


@pytest.mark.parametrize('short, full', [
    ('mae_vit_base_patch16', 'mae_vit_base_patch16_dec512d8b'),
    ('mae_vit_small_patch16', 'mae_vit_small_patch16_dec256d4b')])
def test_short_name_is_the_long_one(short, full):
    """README: mae_vit_base_patch16 is mae_vit_base_patch16_dec512d8b, mae_vit_small_patch16 the dec256d4b one."""
    with torch.device('meta'):
        shapes = [{k: v.shape for k, v in models.create_mae(name).state_dict().items()} for name in (short, full)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize('name', [
    '', 'vit', 'resnet50', 'mae_vit_giant_patch16', 'mae_vit_base', 'mae_vit_base_patch', 'mae_vit_base_patch0',
    'mae_vit_base_patch16_dec512', 'mae_vit_base_patch16_dec512d8', 'mae_vit_base_patch16_dec100d8b',
    'mae_vit_base_patch16_dec0d8b', 'mae_vit_base_patch16_dec512d0b', 'mae_vit_base_patch16_dec512d8b_x',
    'mae_vit_base_patch-16', 'vit_base_patch16_dec512d8b', 'MAE_vit_base_patch16', 'mae_vit_base_patch16\n'])
def test_unknown_name_is_refused_in_one_line(name):
    """README: what the user gave and cannot work is one line, not a traceback."""
    with pytest.raises(models.InputError) as info:
        models.create_mae(name)
    assert '\n' not in str(info.value)
    assert repr(name) in str(info.value)


def test_each_builder_refuses_the_other_kind_of_name():
    """README: --model names of the stages are not mixed up silently."""
    with pytest.raises(models.InputError, match='mae_vit_pico_patch8'):
        models.create_mae('vit_pico_patch8', 32)
    with pytest.raises(models.InputError):
        models.create_vit('mae_vit_pico_patch8', 10, 32)


@pytest.mark.parametrize('size', [30, (32, 20), (20, 32), 4, 0])
@pytest.mark.parametrize('build', [lambda size: models.create_mae('mae_vit_pico_patch8', size),
                                   lambda size: models.create_vit('vit_pico_patch8', 10, size)])
def test_size_that_the_patch_does_not_divide_is_refused(build, size):
    """Stage 1: any size that the patch divides works, others are refused with their numbers."""
    with pytest.raises(models.InputError, match='patch size 8'):
        build(size)


@pytest.mark.parametrize('name, reference, millions', [
    ('base', 'vit_base_patch16_224', 85.80), ('small', 'vit_small_patch16_224', 21.67),
    ('tiny', 'vit_tiny_patch16_224', 5.52)])
def test_encoder_has_timms_parameters(name, reference, millions):
    """README: encoders are timm's ViT-B/S/Ti without a head, by name and shape."""
    with torch.device('meta'):
        ours = models.create_mae(f'mae_vit_{name}_patch16').state_dict()
        theirs = timm.create_model(reference, num_classes=0).state_dict()
    encoder = {k: v.shape for k, v in ours.items() if not k.startswith(('decoder_', 'mask_token'))}
    assert encoder == {k: v.shape for k, v in theirs.items()}
    assert round(sum(v.numel() for k, v in ours.items() if k in encoder) / 1e6, 2) == millions


def test_full_mae_base_has_the_published_number_of_parameters():
    """README: MAE's ViT-B with its decoder has 111.9 million numbers, both position tables included."""
    with torch.device('meta'):
        model = models.create_mae('mae_vit_base_patch16')
    d, e = 768, 512
    block_d, block_e = (2 * 2 * w + (w + 1) * 3 * w + (w + 1) * w + (w + 1) * 4 * w + (4 * w + 1) * w for w in (d, e))
    by_hand = (768 * d + d) + d + 197 * d + 12 * block_d + 2 * d
    by_hand += (d + 1) * e + e + 197 * e + 8 * block_e + 2 * e + (e + 1) * 768
    assert sum(p.numel() for p in model.parameters()) == by_hand == 111_907_840


@pytest.mark.parametrize('name, reference, kwargs, options', [
    ('vit_small_patch16', 'vit_small_patch16_224', {}, {}),
    ('vit_small_patch16', 'vit_small_patch16_224', {'global_pool': 'avg'}, {'global_pool': 'avg'}),
    ('vit_base_patch16', 'vit_base_patch16_224', {}, {}),
    ('vit_tiny_patch16', 'deit_tiny_distilled_patch16_224', {}, {'distilled': True}),
    ('vit_small_patch16', 'deit_small_distilled_patch16_224', {}, {'distilled': True})])
def test_classifier_has_timms_parameters(name, reference, kwargs, options):
    """README: classification checkpoints load in timm with strict=True, for lack of any difference in names and shapes."""
    with torch.device('meta'):
        ours = models.create_vit(name, 1000, **options).state_dict()
        theirs = timm.create_model(reference, **kwargs).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


# ---------------------------------------------------------------------------------------------------------------- mask


@pytest.mark.parametrize('ratio, kept', [(0.05, 186), (0.25, 147), (0.55, 88), (0.75, 49), (0.9, 19)])
def test_mask_hides_what_a_plain_loop_hides(ratio, kept):
    """Table 5: mask ratios on 196 patches; the smallest noise is kept, 1 = hidden, ids_restore inverts the shuffle."""
    noise = noise_for(3, 196)
    masking = models.random_masking(noise, ratio)
    assert masking.ids_keep.shape == (3, kept)
    for n in range(3):
        row = noise[n].tolist()
        order = sorted(range(196), key=row.__getitem__)
        assert masking.ids_keep[n].tolist() == order[:kept]
        assert masking.mask[n].tolist() == [0.0 if i in order[:kept] else 1.0 for i in range(196)]
        assert [order[place] for place in masking.ids_restore[n].tolist()] == list(range(196))


@pytest.mark.parametrize('ratio', [0.0, 1.0, 0.99, -0.5, 1.5])
def test_mask_ratio_that_hides_nothing_or_everything_is_refused(ratio):
    """README: a --mask_ratio that leaves nothing to learn stops the run in one line."""
    with pytest.raises(models.InputError, match='--mask_ratio'):
        models.random_masking(noise_for(2, 16), ratio)


# ----------------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize('dim, grid', [(64, (14, 14)), (32, (4, 6)), (192, (7, 3))])
def test_position_table_is_timms_with_quarters_permuted(dim, grid):
    """Stage 1: MAE's fixed table, column first: timm's after permuting the channel quarters [1, 3, 0, 2]."""
    quarters = build_sincos2d_pos_embed(list(grid), dim).reshape(-1, 4, dim // 4)
    expected = quarters[:, [1, 3, 0, 2]].reshape(-1, dim)
    table = models.sincos_position_table(dim, grid)
    assert table.shape == (1, 1 + grid[0] * grid[1], dim)
    assert table.dtype == torch.float32
    torch.testing.assert_close(table[0, 1:], expected, atol=2e-6, rtol=0)
    assert table[0, 0].abs().max() == 0


def test_position_table_by_hand_on_a_non_square_grid():
    """Stage 1: channels are sin x, cos x, sin y, cos y with 10000^(-k/(dim/4)); patches in rows; class row zero."""
    dim, rows, columns = 16, 3, 5
    table = models.sincos_position_table(dim, (rows, columns))[0].double()
    for row in range(rows):
        for column in range(columns):
            for k in range(4):
                omega = 1 / 10000 ** (k / 4)
                got = table[1 + row * columns + column, [k, 4 + k, 8 + k, 12 + k]].tolist()
                expected = [math.sin(column * omega), math.cos(column * omega), math.sin(row * omega), math.cos(row * omega)]
                assert got == pytest.approx(expected, abs=1e-7)
    assert table[0].tolist() == [0.0] * dim


def test_model_holds_the_fixed_tables_for_its_own_grid():
    """Stage 1: both position tables are fixed sine-cosine ones of the model's grid and are not trained in stage 1."""
    model = models.create_mae('mae_vit_nano_patch8', (32, 48))
    for table, dim in ((model.pos_embed, 64), (model.decoder_pos_embed, 64)):
        assert not table.requires_grad
        quarters = build_sincos2d_pos_embed([4, 6], dim).reshape(-1, 4, dim // 4)
        torch.testing.assert_close(table[0, 1:], quarters[:, [1, 3, 0, 2]].reshape(-1, dim), atol=2e-6, rtol=0)


# ----------------------------------------------------------------------------------- MAE's forward against transformers


V4_LAYER = [f'{module}.{kind}' for module in (
    'attention.attention.query', 'attention.attention.key', 'attention.attention.value', 'attention.output.dense',
    'intermediate.dense', 'output.dense', 'layernorm_before', 'layernorm_after') for kind in ('weight', 'bias')]
V4_NAMES = [
    'vit.embeddings.cls_token', 'vit.embeddings.position_embeddings', 'vit.embeddings.patch_embeddings.projection.weight',
    'vit.embeddings.patch_embeddings.projection.bias', 'vit.layernorm.weight', 'vit.layernorm.bias',
    *(f'vit.encoder.layer.{i}.{name}' for i in range(4) for name in V4_LAYER),
    'decoder.mask_token', 'decoder.decoder_pos_embed', 'decoder.decoder_embed.weight', 'decoder.decoder_embed.bias',
    *(f'decoder.decoder_layers.{i}.{name}' for i in range(2) for name in V4_LAYER),
    'decoder.decoder_norm.weight', 'decoder.decoder_norm.bias', 'decoder.decoder_pred.weight', 'decoder.decoder_pred.bias']


def hf_config(**options):
    """The nano MAE (patch 8, 32 px) in transformers' words."""
    transformers = pytest.importorskip('transformers')
    return transformers.ViTMAEConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=256, decoder_hidden_size=64,
        decoder_num_hidden_layers=2, decoder_num_attention_heads=4, decoder_intermediate_size=256, image_size=32,
        patch_size=8, layer_norm_eps=1e-6, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options)


@pytest.fixture(scope='module')
def hugging_face(tmp_path_factory):
    """A ViTMAE of transformers with random weights, and its two files: as saved today, and under the names of version 4."""
    transformers = pytest.importorskip('transformers')
    safetensors = pytest.importorskip('safetensors.torch')
    folder = tmp_path_factory.mktemp('hugging_face')
    oracle = fill(transformers.ViTMAEForPreTraining(hf_config())).eval()
    oracle.save_pretrained(folder)
    today = safetensors.load_file(folder / 'model.safetensors')
    old = {key.replace('decoder_encoder.layer.', 'decoder_layers.'): value for key, value in today.items()}
    assert sorted(old) == sorted(V4_NAMES)
    torch.save(old, folder / 'pytorch_model.bin')
    return oracle, folder


@pytest.mark.parametrize('file', ['model.safetensors', 'pytorch_model.bin'])
def test_mae_equals_transformers(hugging_face, file):
    """Stage 1: masking, encoder, decoder states and reconstruction are MAE's; HF files load in both namings."""
    oracle, folder = hugging_face
    model = models.create_mae('mae_vit_nano_patch8', 32)
    models.load_exactly(model, models.load_checkpoint(folder / file), file)
    oracle, model = copy.deepcopy(oracle).double(), model.double()  # the random weights amplify float32's rounding
    images, noise = images_for(2, 32, 32).double(), noise_for(2, 16)
    states = {}
    layers = [*((('layer', i), layer) for i, layer in enumerate(oracle.decoder.decoder_layers, start=1)),
              ('latent', oracle.vit)]
    hooks = [layer.register_forward_hook(lambda module, inputs, output, key=key: states.update({key: output}))
             for key, layer in layers]
    with torch.no_grad():
        output = oracle(images, noise=noise)
    for hook in hooks:
        hook.remove()

    masking = models.random_masking(noise, 0.75)
    assert torch.equal(masking.mask, output.mask)
    assert torch.equal(masking.ids_restore, output.ids_restore)
    with torch.no_grad():
        close = {'atol': 1e-9, 'rtol': 0}
        torch.testing.assert_close(model.encode(images, masking), states['latent'].last_hidden_state, **close)
        for i in (1, 2):
            state = states['layer', i]
            state = state[0] if isinstance(state, tuple) else state
            torch.testing.assert_close(model.decoder_features(images, masking, i), state, **close)
        pred = model(images, masking)
        torch.testing.assert_close(pred, output.logits, **close)
        assert output.logits.abs().max() > 0.1  # not zeros against zeros


@pytest.mark.parametrize('norm_pix_loss', [True, False])
def test_pixel_loss_equals_transformers(hugging_face, norm_pix_loss):
    """README: --target pixel is MAE itself, in both of its pixel spaces."""
    oracle, folder = hugging_face
    model = models.create_mae('mae_vit_nano_patch8', 32)
    models.load_exactly(model, models.load_checkpoint(folder / 'model.safetensors'), 'file')
    images, noise = images_for(3, 32, 32), noise_for(3, 16)
    oracle.config.norm_pix_loss = norm_pix_loss
    with torch.no_grad():
        expected = oracle(images, noise=noise).loss.item()
        masking = models.random_masking(noise, 0.75)
        args = Namespace(target='pixel', norm_pix_loss=norm_pix_loss, distributed=False)
        losses = generic_distill.stage_losses(model, None, images, masking, args)
    assert list(losses) == ['loss_pixel']
    assert losses['loss_pixel'].item() == pytest.approx(expected, abs=1e-5)


def test_headless_hugging_face_encoder_starts_stage_two(tmp_path):
    """README: --finetune also reads a ViTMAEModel file, whose names lack the leading vit."""
    transformers = pytest.importorskip('transformers')
    safetensors = pytest.importorskip('safetensors.torch')
    oracle = fill(transformers.ViTMAEModel(hf_config(mask_ratio=0.0))).eval()
    oracle.save_pretrained(tmp_path)
    assert not any(k.startswith('vit.') for k in safetensors.load_file(tmp_path / 'model.safetensors'))
    model = models.create_vit('vit_nano_patch8', 10, 32).eval()
    loaded = models.load_pretrained(model, tmp_path / 'model.safetensors')
    assert (loaded.new, loaded.left_out, loaded.resized) == (['head.weight', 'head.bias'], [], [])
    images = images_for(2, 32, 32)
    with torch.no_grad():
        expected = oracle(images, noise=torch.arange(16.0).expand(2, -1)).last_hidden_state  # nothing hidden, in order
        torch.testing.assert_close(model.forward_features(images), expected, atol=1e-5, rtol=0)


def test_patchify_has_transformers_order_and_unpatchify_inverts_it(hugging_face):
    """Stage 1: pixels of a patch in MAE's order, which released decoders predict."""
    oracle, _ = hugging_face
    model = models.create_mae('mae_vit_nano_patch8', 32)
    images = images_for(2, 32, 32)
    assert torch.equal(model.patchify(images), oracle.patchify(images))
    assert torch.equal(model.unpatchify(oracle.patchify(images)), images)


def test_patchify_by_hand_on_a_non_square_image():
    """Stage 1: rows of patches; in each patch rows, columns, colours; any size that the patch divides."""
    model = models.create_mae('mae_vit_pico_patch8', (16, 24))
    images = images_for(2, 16, 24)
    patches = model.patchify(images)
    assert patches.shape == (2, 6, 192)
    for row in range(16):
        for column in range(24):
            for colour in range(3):
                patch, inside = row // 8 * 3 + column // 8, ((row % 8) * 8 + column % 8) * 3 + colour
                assert torch.equal(patches[:, patch, inside], images[:, colour, row, column])
    assert torch.equal(model.unpatchify(patches), images)


def plain_layer_norm(x, state, name):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-6)
    return x * state[f'{name}.weight'] + state[f'{name}.bias']


def plain_linear(x, state, name):
    return x @ state[f'{name}.weight'].T + state[f'{name}.bias']


def plain_block(x, state, name, heads):
    """One pre-norm transformer block on a single image: x (T, D) float64."""
    qkv = plain_linear(plain_layer_norm(x, state, f'{name}.norm1'), state, f'{name}.attn.qkv')
    width = x.shape[1]
    mixed = np.empty_like(x)
    for head in range(heads):
        a, b = head * width // heads, (head + 1) * width // heads
        q, k, v = qkv[:, a:b], qkv[:, width + a:width + b], qkv[:, 2 * width + a:2 * width + b]
        scores = np.exp(q @ k.T / math.sqrt(b - a))
        mixed[:, a:b] = scores / scores.sum(1, keepdims=True) @ v
    x = x + plain_linear(mixed, state, f'{name}.attn.proj')
    hidden = plain_linear(plain_layer_norm(x, state, f'{name}.norm2'), state, f'{name}.mlp.fc1')
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    return x + plain_linear(hidden, state, f'{name}.mlp.fc2')


def plain_mae(state, image, noise, keep, grid, patch, heads, decoder_heads):
    """MAE of one image in float64, token by token: (hidden states after the decoder blocks, predicted pixels)."""
    state = {k: v.double().numpy() for k, v in state.items()}
    image, order = image.double().numpy(), np.argsort(noise.numpy())
    tokens = []
    for index in range(grid[0] * grid[1]):
        row, column = index // grid[1] * patch, index % grid[1] * patch
        window = image[:, row:row + patch, column:column + patch]
        tokens.append((state['patch_embed.proj.weight'] * window).sum((1, 2, 3)) + state['patch_embed.proj.bias']
                      + state['pos_embed'][0, 1 + index])
    x = np.stack([state['cls_token'][0, 0] + state['pos_embed'][0, 0]] + [tokens[i] for i in order[:keep]])
    for i in range(sum(k.startswith('blocks.') and k.endswith('norm1.weight') for k in state)):
        x = plain_block(x, state, f'blocks.{i}', heads)
    x = plain_linear(plain_layer_norm(x, state, 'norm'), state, 'decoder_embed')
    full = np.tile(state['mask_token'][0], (1 + len(tokens), 1))
    full[0] = x[0]
    for place, index in enumerate(order[:keep]):
        full[1 + index] = x[1 + place]
    full = full + state['decoder_pos_embed'][0]
    features = []
    for i in range(sum(k.startswith('decoder_blocks.') and k.endswith('norm1.weight') for k in state)):
        full = plain_block(full, state, f'decoder_blocks.{i}', decoder_heads)
        features.append(full)
    return features, plain_linear(plain_layer_norm(full, state, 'decoder_norm'), state, 'decoder_pred')[1:]


@pytest.mark.parametrize('height, width', [(32, 48), (48, 32), (16, 16)])
def test_mae_equals_a_plain_float64_loop_at_any_size(height, width):
    """Stage 1: non-square input and any size divisible by the patch; nothing is typed in as 196."""
    model = fill(models.create_mae('mae_vit_pico_patch8', (height, width))).double().eval()
    grid = (height // 8, width // 8)
    length = grid[0] * grid[1]
    images, noise = images_for(2, height, width).double(), noise_for(2, length)
    masking = models.random_masking(noise, 0.5)
    with torch.no_grad():
        features = [model.decoder_features(images, masking, layer).numpy() for layer in (1, 2)]
        pixels = model(images, masking).numpy()
    for n in range(2):
        expected, expected_pixels = plain_mae(
            model.state_dict(), images[n], noise[n], length // 2, grid, patch=8, heads=2, decoder_heads=1)
        for got, wanted in zip(features, expected):
            np.testing.assert_allclose(got[n], wanted, atol=1e-10, rtol=0)
        np.testing.assert_allclose(pixels[n], expected_pixels, atol=1e-10, rtol=0)


def test_student_predicts_from_the_last_decoder_block_without_a_norm():
    """Stage 1: the student's head is fc1, GELU, fc2 on the bare state after its last decoder block, for every token."""
    student = fill(models.create_mae('mae_vit_pico_patch8', 32, target_dim=48)).double().eval()
    names = [k for k in student.state_dict() if k.startswith(('feature_head', 'decoder_norm', 'decoder_pred'))]
    assert names == [f'feature_head.{layer}.{kind}' for layer in ('fc1', 'fc2') for kind in ('weight', 'bias')]
    assert student.feature_head.fc1.weight.shape == (48, 32)
    assert student.feature_head.fc2.weight.shape == (48, 48)
    images, masking = images_for(2, 32, 32).double(), models.random_masking(noise_for(2, 16), 0.75)
    with torch.no_grad():
        got = student(images, masking).numpy()
        state = student.decoder_features(images, masking, 2).numpy()
    weights = {k: v.numpy() for k, v in student.state_dict().items()}
    hidden = plain_linear(state, weights, 'feature_head.fc1')
    hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    assert got.shape == (2, 17, 48)
    np.testing.assert_allclose(got, plain_linear(hidden, weights, 'feature_head.fc2'), atol=1e-10, rtol=0)


@pytest.mark.parametrize('layer', [1, 2, 3, 4])
def test_blocks_behind_the_target_layer_are_not_run(layer):
    """Stage 1: the teacher stops at --target_layer; later blocks, decoder_norm and decoder_pred cost nothing."""
    teacher = models.create_mae('mae_vit_pico_patch8_dec32d4b', 32)
    calls = []
    for name, module in [*enumerate(teacher.decoder_blocks, start=1), ('norm', teacher.decoder_norm),
                         ('pred', teacher.decoder_pred)]:
        module.register_forward_hook(lambda module, inputs, output, name=name: calls.append(name))
    teacher.decoder_features(images_for(1, 32, 32), models.random_masking(noise_for(1, 16), 0.75), layer)
    assert calls == list(range(1, layer + 1))


@pytest.mark.parametrize('layer', [0, -1, 3])
def test_target_layer_out_of_range_is_refused(layer):
    """README: --target_layer is 1-based and must exist; -1 does not count from the end."""
    teacher = models.create_mae('mae_vit_pico_patch8', 32)
    with pytest.raises(models.InputError, match=f'--target_layer {layer}.* 1 to 2'):
        teacher.decoder_features(images_for(1, 32, 32), models.random_masking(noise_for(1, 16), 0.75), layer)


# ----------------------------------------------------------------------------------------------- gradients and teachers


def stage1_args(target, **options):
    args = generic_distill.get_args_parser().parse_args(['--target', target, '--target_layer', '1', '--print_freq', '1'])
    generic_distill.resolve_recipe(args)
    for name, value in {'rank': 0, 'world_size': 1, 'distributed': False, 'device': 'cpu', 'amp': 'off', 'batch_size': 2,
                        'accum_iter': 1, **options}.items():
        setattr(args, name, value)
    return args


def saved_teacher(folder, name='mae_vit_nano_patch8_dec96d2b'):
    """A teacher that came through the loader, as in the scripts."""
    torch.save(fill(models.create_mae(name, 32), seed=5).state_dict(), folder / 'teacher.pth')
    return models.load_teacher(models.create_mae(name, 32), folder / 'teacher.pth')


@pytest.mark.parametrize('supervise', ['all', 'masked'])
@pytest.mark.parametrize('target', ['feature', 'recon', 'recon_gt', 'pixel'])
def test_every_student_parameter_gets_a_gradient_and_no_teacher_parameter(tmp_path, target, supervise):
    """README: heads that a target does not use are not built, so DDP needs no search for unused parameters."""
    teacher = None if target == 'pixel' else saved_teacher(tmp_path)
    target_dim = {'feature': 96, 'recon': 192, 'recon_gt': 192, 'pixel': None}[target]
    student = fill(models.create_mae('mae_vit_pico_patch8', 32, target_dim), std=0.05).train()
    losses = generic_distill.stage_losses(student, teacher, images_for(2, 32, 32), models.random_masking(
        noise_for(2, 16), 0.75), stage1_args(target, supervise=supervise))
    assert sorted(losses) == {'feature': ['loss_feature'], 'recon': ['loss_recon'], 'pixel': ['loss_pixel'],
                              'recon_gt': ['loss_pixel', 'loss_recon']}[target]
    sum(losses.values()).backward()
    fixed = [name for name, p in student.named_parameters() if not p.requires_grad]
    assert fixed == ['pos_embed', 'decoder_pos_embed']
    without = [name for name, p in student.named_parameters()
               if p.requires_grad and (p.grad is None or not p.grad.abs().max() > 0)]
    assert without == []
    if teacher is not None:
        assert all(p.grad is None for p in teacher.parameters())


def test_target_gives_no_gradient_even_to_a_teacher_that_is_not_frozen():
    """Stage 1: the gradient reaches the student only; the target is computed without one."""
    teacher = models.create_mae('mae_vit_pico_patch8', 32)
    student = models.create_mae('mae_vit_pico_patch8', 32, 32)
    masking = models.random_masking(noise_for(2, 16), 0.75)
    losses = generic_distill.stage_losses(student, teacher, images_for(2, 32, 32), masking, stage1_args('feature'))
    sum(losses.values()).backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_teacher_stays_in_eval_mode_and_unchanged_through_an_epoch(tmp_path):
    """Stage 1: the teacher is frozen and in eval mode, also while the student trains."""
    teacher = saved_teacher(tmp_path)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student = models.create_mae('mae_vit_pico_patch8', 32, 96)
    args = stage1_args('feature')
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    images = [(images_for(2, 32, 32, seed) * 50 + 100).clamp(0, 255).byte()[:, None] for seed in (3, 4)]
    loader = [((images[seed - 3], noise_for(2, 16, seed)[:, None]), None, ['', '']) for seed in (3, 4)]
    old = student.feature_head.fc2.weight.detach().clone()
    generic_distill.train_one_epoch(
        student, teacher, loader, optimizer, Namespace(step=lambda t: None), torch.amp.GradScaler('cpu', enabled=False),
        generic_distill.Progress(args, args.epochs), torch.device('cpu'), 0, args)
    assert student.training and not torch.equal(old, student.feature_head.fc2.weight)
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize('options', [{}, {'global_pool': 'avg'}, {'distilled': True}])
def test_every_classifier_parameter_gets_a_gradient(options):
    """README: the networks of stage 2 hold nothing that is not trained, positions included."""
    model = models.create_vit('vit_pico_patch8', 5, 32, **options).train()
    logits = model(images_for(4, 32, 32))
    class_logits, dist_logits = logits if options.get('distilled') else (logits, None)
    loss = specific_distill_cls.distillation_loss(
        class_logits, dist_logits, torch.tensor([0, 1, 2, 3]), torch.randn(4, 5, generator=torch.Generator().manual_seed(0)),
        'hard' if options.get('distilled') else 'none')
    loss.backward()
    assert all(p.requires_grad for p in model.parameters())
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


def test_distilled_classifier_gives_two_logits_in_training_and_their_mean_in_eval():
    """Stage 2: inference is the mean of the two heads' logits; no second head without a teacher."""
    model = fill(models.create_vit('vit_pico_patch8', 5, 32, distilled=True))
    images = images_for(2, 32, 32)
    with torch.no_grad():
        class_logits, dist_logits = model.train()(images)
        tokens = model.forward_features(images)
        torch.testing.assert_close(class_logits, model.head(tokens[:, 0]))
        torch.testing.assert_close(dist_logits, model.head_dist(tokens[:, 1]))
        assert (class_logits - dist_logits).abs().max() > 0.01
        torch.testing.assert_close(model.eval()(images), (class_logits + dist_logits) / 2)
        assert models.create_vit('vit_pico_patch8', 5, 32).train()(images).shape == (2, 5)


def test_distilled_network_refuses_average_pooling():
    """README: --global_pool and a teacher exclude each other."""
    with pytest.raises(models.InputError, match='global_pool'):
        models.create_vit('vit_pico_patch8', 5, 32, distilled=True, global_pool='avg')


def test_average_pooling_reads_the_patch_tokens_and_not_the_class_token():
    """Stage 2: --global_pool is the mean of patch tokens, then fc_norm, then the head, with no norm before."""
    model = fill(models.create_vit('vit_pico_patch8', 5, 32, global_pool='avg')).double().eval()
    assert 'fc_norm.weight' in model.state_dict() and 'norm.weight' not in model.state_dict()
    images = images_for(2, 32, 32).double()
    with torch.no_grad():
        tokens = model.forward_features(images)
        pooled = torch.stack([sum(tokens[n, i] for i in range(1, 17)) / 16 for n in range(2)]).numpy()
        weights = {k: v.numpy() for k, v in model.state_dict().items()}
        expected = plain_linear(plain_layer_norm(pooled, weights, 'fc_norm'), weights, 'head')
        np.testing.assert_allclose(model(images).numpy(), expected, atol=1e-10, rtol=0)


# ------------------------------------------------------------------------------------------------ optimizer and schedule


def expected_scale(name, depth, decay):
    if name.startswith(('patch_embed.', 'cls_token', 'pos_embed')):
        return decay ** (depth + 1)
    if name.startswith('blocks.'):
        return decay ** (depth - int(name.split('.')[1]))
    assert name.split('.')[0] in ('norm', 'fc_norm', 'head', 'head_dist', 'dist_token')
    return 1.0


def group_of(optimizer, model):
    """Parameter name -> its optimizer group; every trained parameter is in exactly one."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = [(names[id(p)], group) for group in optimizer.param_groups for p in group['params']]
    assert sorted(name for name, _ in found) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    return dict(found)


@pytest.mark.parametrize('size, depth, options', [
    ('pico', 2, {}), ('pico', 2, {'distilled': True}), ('nano', 4, {'global_pool': 'avg'}), ('nano', 4, {'distilled': True}),
    ('small', 12, {'distilled': True})])
def test_layer_decay_scales_are_the_authors(size, depth, options):
    """Stage 2: scale d^(n+1-i): stem lowest; final norm, heads and the distillation token at 1; no decay on 1-D."""
    with torch.device('meta'):
        model = models.create_vit(f'vit_{size}_patch16', 10, **options)
    groups = group_of(create_optimizer_v2(model, opt='adamw', lr=1, weight_decay=0.05, layer_decay=0.75), model)
    for name, group in groups.items():
        assert group['lr_scale'] == pytest.approx(expected_scale(name, depth, 0.75), rel=1e-12), name
        undecayed = name.endswith('.bias') or 'norm' in name or name in ('cls_token', 'dist_token', 'pos_embed')
        assert group['weight_decay'] == (0.0 if undecayed else 0.05), name
    if options.get('distilled'):
        assert groups['dist_token']['lr_scale'] == groups['norm.weight']['lr_scale'] == 1.0


class Stop(Exception):
    pass


def built_by_main(script, argv, monkeypatch):
    """What main() hands to its first epoch: (model, optimizer, scheduler, args)."""
    caught = {}

    def train_one_epoch(model, teacher, loader, optimizer, scheduler, *rest):
        caught.update(model=model, optimizer=optimizer, scheduler=scheduler, args=rest[-1])
        raise Stop

    monkeypatch.setattr(script, 'train_one_epoch', train_one_epoch)
    with pytest.raises(Stop):
        script.main(script.get_args_parser().parse_args(argv))
    return caught['model'], caught['optimizer'], caught['scheduler'], caught['args']


@pytest.fixture(scope='module')
def few_images(tmp_path_factory):
    root = tmp_path_factory.mktemp('few')
    for split in ('train', 'val'):
        for label in ('a', 'b'):
            (root / split / label).mkdir(parents=True)
            for i in range(4):
                Image.new('RGB', (32, 32), (40 * i, 9, 70)).save(root / split / label / f'{i}.png')
    return root


TINY = ['--input_size', '32', '--num_workers', '0', '--device', 'cpu']


def mae_lr(t, lr, min_lr, warmup, epochs):
    """MAE's schedule, written from its description: linear warm-up, then half a cosine, at fractional epochs."""
    if t < warmup:
        return lr * t / warmup
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * (t - warmup) / (epochs - warmup)))


@pytest.mark.parametrize('target, epochs, warmup, min_lr', [('feature', 300, 10, 2.5e-6), ('pixel', 800, 40, 0.0)])
def test_stage_one_schedule_and_optimizer_are_maes(tmp_path, few_images, monkeypatch, target, epochs, warmup, min_lr):
    """Stage 1: blr 1.5e-4 * batch / 256, warm-up, cosine to 2.5e-6 (MAE: 0), betas 0.9, 0.95, decay 0.05."""
    saved_teacher(tmp_path)
    argv = ['--target', target, '--model', 'mae_vit_pico_patch8', '--data_path', str(few_images), '--batch_size', '2',
            '--target_layer', '1', '--output_dir', str(tmp_path / 'out'), *TINY]
    if target != 'pixel':
        argv += ['--teacher_model', 'mae_vit_nano_patch8_dec96d2b', '--teacher_path', str(tmp_path / 'teacher.pth')]
    model, optimizer, scheduler, args = built_by_main(generic_distill, argv, monkeypatch)
    assert (args.epochs, args.warmup_epochs, args.min_lr) == (epochs, warmup, min_lr)
    lr = 1.5e-4 * (2 * 2) / 256  # batch 2, two steps an update
    for t in (0, 0.37, 1, 5.5, warmup - 0.01, warmup, warmup + 0.25, epochs / 2, epochs - 1.5, epochs - 0.01):
        scheduler.step(t)
        for group in optimizer.param_groups:
            assert abs(group['lr'] - mae_lr(t, lr, min_lr, warmup, epochs)) < 1e-12
    assert isinstance(optimizer, torch.optim.AdamW)
    for name, group in group_of(optimizer, model).items():
        assert tuple(group['betas']) == (0.9, 0.95)
        assert group['weight_decay'] == (0.0 if dict(model.named_parameters())[name].ndim <= 1 else 0.05), name


@pytest.mark.parametrize('finetune, epochs, blr, decay', [(True, 200, 1e-3, 0.75), (False, 500, 2.5e-4, 1.0)])
def test_classification_schedule_applies_the_layer_scales(tmp_path, few_images, monkeypatch, finetune, epochs, blr, decay):
    """Supplement Table 1: both columns, warm-up 5, cosine to 1e-6, each layer's rate times its scale."""
    torch.save(models.create_mae('mae_vit_nano_patch8', 32).state_dict(), tmp_path / 'mae.pth')
    argv = ['--model', 'vit_nano_patch8', '--data_path', str(few_images), '--batch_size', '4',
            '--output_dir', str(tmp_path / 'out'), *TINY]
    argv += ['--finetune', str(tmp_path / 'mae.pth')] if finetune else []
    model, optimizer, scheduler, _ = built_by_main(specific_distill_cls, argv, monkeypatch)
    groups, lr = group_of(optimizer, model), blr * 4 / 256
    for t in (0, 0.5, 4.99, 5, 5.75, epochs / 3, epochs - 0.125):
        scheduler.step(t)
        for name, group in groups.items():
            expected = mae_lr(t, lr, 1e-6, 5, epochs) * expected_scale(name, 4, decay)
            assert abs(group['lr'] - expected) < 1e-12, name
    assert all(tuple(group['betas']) == (0.9, 0.999) for group in optimizer.param_groups)


# --------------------------------------------------------------------------------------------------------- start values


def test_mae_starts_from_maes_values():
    """Stage 1: xavier-uniform linear layers, the patch projection as a linear layer, zero biases, tokens std 0.02."""
    torch.manual_seed(0)
    model = models.MaskedAutoencoder(32, 8, dim=768, depth=1, heads=12, decoder_dim=512, decoder_depth=1, target_dim=256)
    linear = [(name, module.weight) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(linear) == 4 + 1 + 4 + 2
    for name, weight in [*linear, ('patch_embed.proj', model.patch_embed.proj.weight.flatten(1))]:
        bound = math.sqrt(6 / (weight.shape[0] + weight.shape[1]))
        assert 0.99 * bound < weight.abs().max() <= bound, name
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02), name
    for name, parameter in model.named_parameters():
        if name.endswith('.bias'):
            assert parameter.abs().max() == 0, name
        if 'norm' in name and name.endswith('.weight'):
            assert (parameter == 1).all(), name
    for token in (model.cls_token, model.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.1)
        assert token.mean().abs() < 0.003


def test_heads_start_small_for_fine_tuning_and_the_distillation_token_without_a_position():
    """Stage 2: class head truncated normal 2e-5, distillation head 0.02, position row of the token zero."""
    torch.manual_seed(0)
    model = models.create_vit('vit_micro_patch8', 300, 32, distilled=True)
    assert model.pos_embed.shape == (1, 18, 128)
    assert model.pos_embed[0, 1].abs().max() == 0
    assert (model.pos_embed[0, [0, *range(2, 18)]].abs().amax(dim=1) > 0).all()
    assert model.dist_token.abs().max() > 0
    models.reset_head(model)
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.03)
    assert model.head_dist.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.head.bias.abs().max() == model.head_dist.bias.abs().max() == 0
    assert model.pos_embed.requires_grad
