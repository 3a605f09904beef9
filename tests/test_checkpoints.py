"""Checkpoint files that others wrote, damaged ones, and ones that want to run code. Sec.: the paper's."""
import argparse
import ast
import builtins
import collections
import functools
import importlib
import io
import math
import operator
import os
import pathlib
import pickle
import re
import struct
import subprocess
import types
import zipfile

import pytest
import timm
import torch
import torch.nn.functional as F

import models

GENERATOR = torch.Generator().manual_seed(0)


def random(*shape):
    return 0.2 * torch.randn(*shape, generator=GENERATOR)


def blocks(name, width, depth):
    """The twelve entries of each block, written out."""
    state = {}
    for i in range(depth):
        state.update({
            f'{name}.{i}.norm1.weight': 1 + random(width), f'{name}.{i}.norm1.bias': random(width),
            f'{name}.{i}.attn.qkv.weight': random(3 * width, width), f'{name}.{i}.attn.qkv.bias': random(3 * width),
            f'{name}.{i}.attn.proj.weight': random(width, width), f'{name}.{i}.attn.proj.bias': random(width),
            f'{name}.{i}.norm2.weight': 1 + random(width), f'{name}.{i}.norm2.bias': random(width),
            f'{name}.{i}.mlp.fc1.weight': random(4 * width, width), f'{name}.{i}.mlp.fc1.bias': random(4 * width),
            f'{name}.{i}.mlp.fc2.weight': random(width, 4 * width), f'{name}.{i}.mlp.fc2.bias': random(width)})
    return state


def encoder(rows=17, width=32, depth=2, patch=8):
    """A pico ViT as MAE, DINO and timm store it, without heads; rows of the position table include the class token's."""
    return {'cls_token': random(1, 1, width), 'pos_embed': random(1, rows, width),
            'patch_embed.proj.weight': random(width, 3, patch, patch), 'patch_embed.proj.bias': random(width),
            **blocks('blocks', width, depth), 'norm.weight': 1 + random(width), 'norm.bias': random(width)}


def decoder(rows=17, width=32, encoder_width=32, depth=2):
    """MAE's decoder without what follows its blocks."""
    return {'mask_token': random(1, 1, width), 'decoder_pos_embed': random(1, rows, width),
            'decoder_embed.weight': random(width, encoder_width), 'decoder_embed.bias': random(width),
            **blocks('decoder_blocks', width, depth)}


def pixel_head(width=32, pixels=192):
    return {'decoder_norm.weight': 1 + random(width), 'decoder_norm.bias': random(width),
            'decoder_pred.weight': random(pixels, width), 'decoder_pred.bias': random(pixels)}


def linear(name, classes=3, width=32):
    return {f'{name}.weight': random(classes, width), f'{name}.bias': random(classes)}


def full_mae(**options):
    return {**encoder(**options), **decoder(rows=options.get('rows', 17)), **pixel_head()}


def same(state, expected):
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], value) for key, value in expected.items())


def save(folder, state, **options):
    torch.save(state, folder / 'file.pth', **options)
    return folder / 'file.pth'


def refusal(function, *args):
    """The message of the InputError that a call raises, which must be one line."""
    with pytest.raises(models.InputError) as info:
        function(*args)
    assert '\n' not in str(info.value)
    return str(info.value)


# ------------------------------------------------------------------------------------------------------------- layouts


LAYOUTS = {
    'bare': lambda state: state,
    'ordered': lambda state: collections.OrderedDict(state),
    'mae': lambda state: {'model': state, 'optimizer': {'state': {}, 'param_groups': [{'lr': 1e-3}]}, 'epoch': 799,
                          'scaler': {'scale': 65536.0}, 'args': argparse.Namespace(lr=1e-3, betas=(0.9, 0.95))},
    'deit': lambda state: {'model': state, 'args': argparse.Namespace(distillation_type='none', cooldown_epochs=10)},
    'ibot': lambda state: {'state_dict': {**state, 'masked_embed': random(1, 32)}, 'epoch': 3},
    'ibot, wrapped': lambda state: {'state_dict': {
        **{f'module.backbone.{k}': v for k, v in state.items()}, 'module.backbone.masked_embed': random(1, 32)}},
    'dino': lambda state: {
        'student': {**{f'module.backbone.{k}': random(*v.shape) for k, v in state.items()},
                    'module.head.mlp.0.weight': random(8, 32), 'module.head.last_layer.weight_g': random(8, 1)},
        'teacher': {**{f'backbone.{k}': v for k, v in state.items()},
                    'head.mlp.0.weight': random(8, 32), 'head.mlp.0.bias': random(8),
                    'head.last_layer.weight_v': random(8, 8)},
        'optimizer': {'state': {}, 'param_groups': []}, 'epoch': 300, 'args': argparse.Namespace(arch='vit_small'),
        'dino_loss': {'center': random(1, 8)}, 'fp16_scaler': None},
    'dino, student alone': lambda state: {
        'student': {f'module.backbone.{k}': v for k, v in state.items()}, 'epoch': 300}}


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_published_layouts_start_stage_two(tmp_path, layout, legacy):
    """README: --finetune reads MAE, DeiT, DINO (a full checkpoint's teacher), iBOT and bare files, old torch ones too."""
    state = encoder()
    path = save(tmp_path, LAYOUTS[layout](dict(state)), _use_new_zipfile_serialization=not legacy)
    model = models.create_vit('vit_pico_patch8', 5, 32)
    loaded = models.load_pretrained(model, path)
    assert sorted(loaded.used) == sorted(state)
    assert loaded.resized == []
    assert sorted(loaded.new) == ['head.bias', 'head.weight']
    extra = {'ibot': ['masked_embed'], 'ibot, wrapped': ['masked_embed'],
             'dino': ['head.last_layer.weight_v', 'head.mlp.0.bias', 'head.mlp.0.weight']}
    assert sorted(loaded.left_out) == extra.get(layout, [])
    for key, value in state.items():
        assert torch.equal(model.state_dict()[key], value), key


def test_flat_state_dict_of_an_mae_file_is_the_file(tmp_path):
    """README: state-dict names are MAE's, so that a complete MAE needs no table."""
    state = full_mae()
    same(models.load_checkpoint(save(tmp_path, {'model': state, 'args': argparse.Namespace(norm_pix_loss=True)})), state)


def test_authors_student_gives_its_decoder_head_and_drops_the_unused_ones(tmp_path):
    """README: the authors' decoderfeature_pred is feature_head; their other heads are unused and dropped."""
    common = {**encoder(), **decoder()}
    head = {'fc1.weight': random(48, 32), 'fc1.bias': random(48), 'fc2.weight': random(48, 48), 'fc2.bias': random(48)}
    file = {**common, **pixel_head(), **{f'decoderfeature_pred.{k}': v for k, v in head.items()},
            **{f'encoderfeature_pred.{k}': random(*v.shape) for k, v in head.items()}}
    path = save(tmp_path, {'model': file, 'args': argparse.Namespace(), 'epoch': 299})
    expected = {**common, **{f'feature_head.{k}': v for k, v in head.items()}}
    same(models.load_checkpoint(path), expected)
    student = models.create_mae('mae_vit_pico_patch8', 32, target_dim=48)
    models.load_exactly(student, models.load_checkpoint(path), path)

    model = models.create_vit('vit_pico_patch8', 5, 32, global_pool='avg')
    loaded = models.load_pretrained(model, path)
    assert sorted(loaded.used) == sorted(k for k in encoder() if not k.startswith('norm.'))
    assert sorted(loaded.new) == ['fc_norm.bias', 'fc_norm.weight', 'head.bias', 'head.weight']
    assert sorted(loaded.left_out) == sorted([*decoder(), *(f'feature_head.{k}' for k in head), 'norm.weight', 'norm.bias'])


@pytest.mark.parametrize('reference', ['deit_tiny_patch16_224', 'vit_tiny_patch16_224'])
def test_bare_timm_file_gives_timms_logits(tmp_path, reference):
    """README: timm's files work as teachers and as start weights, without renaming."""
    torch.manual_seed(0)
    oracle = timm.create_model(reference, img_size=64, num_classes=7).eval()
    path = save(tmp_path, oracle.state_dict())
    state = models.load_checkpoint(path)
    model = models.load_teacher(models.create_vit_like(state, 'vit_tiny_patch16', 64), path)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), oracle(images), atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------- what load_pretrained says


def test_report_names_what_is_used_new_and_left_out(tmp_path, capsys):
    """README: --finetune says what it used, resized, started anew and left out; each name of both sides is in one list."""
    state = {**full_mae(rows=197, patch=16), **linear('head')}
    path = save(tmp_path, {'model': state})
    model = models.create_vit('vit_pico_patch16', 5, 64, distilled=True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loaded = models.load_pretrained(model, path)
    assert sorted(loaded.used) == sorted(encoder())
    assert sorted(loaded.new) == ['dist_token', 'head.bias', 'head.weight', 'head_dist.bias', 'head_dist.weight']
    assert sorted(loaded.left_out) == sorted([*decoder(), *pixel_head(), *linear('head')])
    assert loaded.resized == ['pos_embed 14x14 -> 4x4', 'zero row for the distillation token']
    for key in loaded.new:
        assert torch.equal(model.state_dict()[key], before[key]), key
    line = capsys.readouterr().out.strip()
    assert '\n' not in line
    for word in (str(path), f'{len(encoder())} used', 'pos_embed 14x14 -> 4x4', 'new: dist_token, head, head_dist',
                 'left out: decoder_blocks, decoder_embed, decoder_norm, decoder_pos_embed, decoder_pred, head, mask_token'):
        assert word in line


def test_global_pool_checkpoint_gives_its_fc_norm_and_never_its_head(tmp_path):
    """Stage 2: with --finetune the class head starts anew, even if the file has one of the same shape."""
    state = {k: v for k, v in encoder().items() if not k.startswith('norm.')}
    state.update({'fc_norm.weight': random(32), 'fc_norm.bias': random(32), **linear('head', 5)})
    model = models.create_vit('vit_pico_patch8', 5, 32, global_pool='avg')
    head = model.head.weight.detach().clone()
    loaded = models.load_pretrained(model, save(tmp_path, {'model': state}))
    assert torch.equal(model.fc_norm.weight, state['fc_norm.weight'])
    assert torch.equal(model.head.weight, head)
    assert sorted(loaded.new) == sorted(loaded.left_out) == ['head.bias', 'head.weight']


@pytest.mark.parametrize('change, word', [
    (lambda s: s.pop('blocks.1.mlp.fc2.bias'), 'blocks.1.mlp.fc2.bias'),
    (lambda s: s.pop('cls_token'), 'cls_token'),
    (lambda s: s.update(gamma=random(3)), 'gamma'),
    (lambda s: s.update({'blocks.2.norm1.weight': random(32)}), 'blocks.2.norm1.weight'),
    (lambda s: s.update({'blocks.0.attn.qkv.weight': random(96, 16)}), 'blocks.0.attn.qkv.weight is (96, 16)'),
    (lambda s: s.update({'patch_embed.proj.weight': random(32, 3, 16, 16)}), 'patch_embed.proj.weight is (32, 3, 16, 16)'),
    (lambda s: s.update({'pos_embed': random(1, 12, 32)}), 'pos_embed has 12 rows')])
def test_start_weights_of_another_network_are_refused(tmp_path, change, word):
    """README: --finetune is strict about what it needs and names the first entry that does not fit."""
    state = encoder()
    change(state)
    path = save(tmp_path, state)
    message = refusal(models.load_pretrained, models.create_vit('vit_pico_patch8', 5, 32), path)
    assert word in message
    assert str(path) in message


# ----------------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize('size', [(160, 160), (256, 256), (96, 320), (224, 256)])
def test_positions_are_resized_as_plain_bicubic(tmp_path, size):
    """Stage 2: positions come from 224 to any size, by bicubic without antialiasing as MAE and DeiT do it."""
    state = encoder(rows=197, patch=16)
    model = models.create_vit('vit_pico_patch16', 5, size)
    loaded = models.load_pretrained(model, save(tmp_path, state))
    grid = (size[0] // 16, size[1] // 16)
    table = state['pos_embed'][0, 1:].reshape(14, 14, 32).permute(2, 0, 1)[None]
    table = F.interpolate(table, size=grid, mode='bicubic', align_corners=False)[0].permute(1, 2, 0)
    assert torch.equal(model.pos_embed[0, 0], state['pos_embed'][0, 0])
    for row in range(grid[0]):
        for column in range(grid[1]):
            got = model.pos_embed[0, 1 + row * grid[1] + column]
            torch.testing.assert_close(got, table[row, column], atol=1e-6, rtol=0)
    assert loaded.resized == [f'pos_embed 14x14 -> {grid[0]}x{grid[1]}']


def test_both_tables_of_a_teacher_are_resized(tmp_path):
    """Stage 1: stage 1 runs at another size than the teacher's; encoder and decoder positions follow."""
    state = full_mae(rows=17)
    teacher = models.load_teacher(models.create_mae('mae_vit_pico_patch8', (24, 48)), save(tmp_path, state))
    for key in ('pos_embed', 'decoder_pos_embed'):
        table = state[key][0, 1:].reshape(4, 4, 32).permute(2, 0, 1)[None]
        table = F.interpolate(table, size=(3, 6), mode='bicubic', align_corners=False)[0].permute(1, 2, 0).reshape(18, 32)
        torch.testing.assert_close(teacher.state_dict()[key][0], torch.cat([state[key][0, :1], table]), atol=1e-6, rtol=0)


def test_distilled_deit_file_gives_a_plain_network_without_its_token(tmp_path):
    """README: DeiT's distilled file has 198 positions and a dist_token; a plain network takes 197 of them."""
    state = {**encoder(rows=198, patch=16), 'dist_token': random(1, 1, 32), **linear('head'), **linear('head_dist')}
    model = models.create_vit('vit_pico_patch16', 5, 224)
    loaded = models.load_pretrained(model, save(tmp_path, {'model': state}))
    assert torch.equal(model.pos_embed, torch.cat([state['pos_embed'][:, :1], state['pos_embed'][:, 2:]], dim=1))
    assert sorted(loaded.left_out) == ['dist_token', 'head.bias', 'head.weight', 'head_dist.bias', 'head_dist.weight']
    assert loaded.resized == ['row of the distillation token dropped']


def test_plain_file_gives_a_distilled_network_its_positions(tmp_path):
    """Stage 2: a distilled network that starts from 197 positions has a zero row for its token, the others in place."""
    state = encoder(rows=197, patch=16)
    model = models.create_vit('vit_pico_patch16', 5, 224, distilled=True)
    models.load_pretrained(model, save(tmp_path, state))
    assert model.pos_embed.shape == (1, 198, 32)
    assert torch.equal(model.pos_embed[:, 0], state['pos_embed'][:, 0])
    assert model.pos_embed[:, 1].abs().max() == 0
    assert torch.equal(model.pos_embed[:, 2:], state['pos_embed'][:, 1:])


def test_distilled_file_keeps_both_rows_through_a_resize(tmp_path):
    """Stage 2: the rows of class and distillation token are no patches and are not interpolated."""
    state = {**encoder(rows=198, patch=16), 'dist_token': random(1, 1, 32)}
    model = models.create_vit('vit_pico_patch16', 5, 64, distilled=True)
    models.load_pretrained(model, save(tmp_path, state))
    table = state['pos_embed'][0, 2:].reshape(14, 14, 32).permute(2, 0, 1)[None]
    table = F.interpolate(table, size=(4, 4), mode='bicubic', align_corners=False)[0].permute(1, 2, 0).reshape(16, 32)
    torch.testing.assert_close(model.pos_embed[0], torch.cat([state['pos_embed'][0, :2], table]), atol=1e-6, rtol=0)
    assert torch.equal(model.dist_token, state['dist_token'])


def authors_forward(state, images, patch, heads):
    """The authors' distilled network: positions for [class, patches], then the token at the end without one.

    Returns (class logits, distillation logits), computed with plain matrix products.
    """
    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f'{name}.weight'], state[f'{name}.bias'], 1e-6)

    def project(x, name):
        return x @ state[f'{name}.weight'].T + state[f'{name}.bias']

    windows = images.unfold(2, patch, patch).unfold(3, patch, patch)  # (N, 3, H/p, W/p, p, p)
    x = torch.einsum('nchwpq,dcpq->nhwd', windows, state['patch_embed.proj.weight']) + state['patch_embed.proj.bias']
    x = torch.cat([state['cls_token'].expand(len(x), -1, -1), x.flatten(1, 2)], dim=1) + state['pos_embed']
    x = torch.cat([x, state['dist_token'].expand(len(x), -1, -1)], dim=1)
    for i in range(2):
        name = f'blocks.{i}'
        q, k, v = (part.unflatten(2, (heads, -1)).transpose(1, 2)
                   for part in project(norm(x, f'{name}.norm1'), f'{name}.attn.qkv').chunk(3, dim=2))
        mixed = ((q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5).softmax(-1) @ v
        x = x + project(mixed.transpose(1, 2).flatten(2), f'{name}.attn.proj')
        hidden = project(norm(x, f'{name}.norm2'), f'{name}.mlp.fc1')
        x = x + project(hidden * 0.5 * (1 + torch.erf(hidden / 2 ** 0.5)), f'{name}.mlp.fc2')
    x = norm(x, 'norm')
    return project(x[:, 0], 'head'), project(x[:, -1], 'head_dist')


def test_authors_distilled_checkpoint_gives_the_same_outputs(tmp_path):
    """Stage 2: 197 positions with the token appended last and no position of its own equal our zero row."""
    state = {**encoder(rows=197, patch=16), 'dist_token': random(1, 1, 32), **linear('head'), **linear('head_dist')}
    path = save(tmp_path, {'model': state, 'args': argparse.Namespace()})
    model = models.create_vit_like(models.load_checkpoint(path), 'vit_pico_patch16', 224)
    model = models.load_teacher(model, path).double()
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1)).double()
    expected = authors_forward({k: v.double() for k, v in state.items()}, images, patch=16, heads=2)
    with torch.no_grad():
        for got, wanted in zip(model.train()(images), expected):
            torch.testing.assert_close(got, wanted, atol=1e-6, rtol=0)
        torch.testing.assert_close(model.eval()(images), (expected[0] + expected[1]) / 2, atol=1e-6, rtol=0)
    assert (expected[0] - expected[1]).abs().max() > 0.01


# ---------------------------------------------------------------------------------------------------------- strictness


@pytest.mark.parametrize('wrap', [lambda s: {'model': s}, lambda s: s, lambda s: {
    'model': {**s, **linear('head')}, 'args': argparse.Namespace()}])
def test_teacher_without_a_decoder_is_refused_with_the_file_that_has_one(tmp_path, wrap):
    """README: MAE's encoder-only file, the one failure that users report, stops the run and names the complete file."""
    path = save(tmp_path, wrap(encoder()))
    message = refusal(models.load_teacher, models.create_mae('mae_vit_pico_patch8', 32), path)
    for word in (str(path), 'no decoder', 'mae_pretrain_vit_base_full.pth', 'mae_visualize_vit_base.pth',
                 'facebook/vit-mae-base'):
        assert word in message


@pytest.mark.parametrize('change, words', [
    (lambda s: s.pop('norm.bias'), ['1 missing', 'norm.bias']),
    (lambda s: [s.pop(k) for k in ('decoder_norm.weight', 'decoder_norm.bias')], ['2 missing', 'decoder_norm.weight']),
    (lambda s: s.update({'norm_extra.weight': random(3)}), ['1 unexpected', 'norm_extra.weight']),
    (lambda s: s.update({'mask_token': random(1, 1, 16)}), ['mask_token is (1, 1, 16)', '(1, 1, 32)']),
    (lambda s: s.update({'patch_embed.proj.weight': random(32, 3, 16, 16)}), ['patch_embed.proj.weight', '(32, 3, 8, 8)']),
    (lambda s: s.update({'decoder_pos_embed': random(1, 20, 32)}), ['decoder_pos_embed has 20 rows'])])
def test_teacher_that_differs_in_one_entry_is_refused_by_its_name(tmp_path, change, words):
    """README: a teacher is loaded strictly; what is missing, unexpected or of another shape is named."""
    state = full_mae()
    change(state)
    path = save(tmp_path, {'model': state})
    message = refusal(models.load_teacher, models.create_mae('mae_vit_pico_patch8', 32), path)
    for word in (str(path), *words):
        assert word in message


def test_teacher_of_another_size_is_refused(tmp_path):
    """README: --teacher_model must name what the file holds."""
    path = save(tmp_path, {'model': full_mae()})
    names = 'mae_vit_nano_patch8', 'mae_vit_pico_patch8_dec64d2b', 'mae_vit_pico_patch8_dec32d1b', 'mae_vit_pico_patch4'
    for name in names:
        assert str(path) in refusal(models.load_teacher, models.create_mae(name, 32), path)


def test_failed_load_changes_no_weight(tmp_path):
    """README: a load is all or nothing."""
    state = full_mae()
    state.pop('norm.bias')
    model = models.create_mae('mae_vit_pico_patch8', 32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    refusal(models.load_teacher, model, save(tmp_path, state))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_teacher_comes_back_with_the_files_weights_frozen_and_in_eval_mode(tmp_path, capsys):
    """Stage 1: the teacher is frozen and in eval mode; the load says how many entries it took."""
    state = full_mae()
    path = save(tmp_path, {'model': state})
    model = models.create_mae('mae_vit_pico_patch8', 32).train()
    teacher = models.load_teacher(model, path)
    assert teacher is model
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(teacher.state_dict()[k], v) for k, v in state.items())
    assert f'{len(state)} entries of {path}' in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- damaged files


def zip_bytes(folder, legacy=False):
    return save(folder, {'model': full_mae()}, _use_new_zipfile_serialization=not legacy).read_bytes()


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('length', [1, 10, 100, 0.25, 0.5, 0.9, -30, -1])
def test_truncated_torch_file_is_refused(tmp_path, length, legacy):
    """README: a broken download is one line, at whatever byte it broke off."""
    whole = zip_bytes(tmp_path, legacy)
    path = tmp_path / 'cut.pth'
    path.write_bytes(whole[:int(len(whole) * length) if isinstance(length, float) else length])
    message = refusal(models.load_checkpoint, path)
    assert str(path) in message and 'truncated' in message


@pytest.mark.parametrize('length', [0, 4, 8, 200, 0.5, -1])
def test_truncated_safetensors_file_is_refused(tmp_path, length):
    """README: the same holds for .safetensors."""
    safetensors = pytest.importorskip('safetensors.torch')
    whole = safetensors.save(full_mae())
    path = tmp_path / 'cut.safetensors'
    path.write_bytes(whole[:int(len(whole) * length) if isinstance(length, float) else length])
    assert str(path) in refusal(models.load_checkpoint, path)


@pytest.mark.parametrize('content', [
    b'', b'<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head>\n</html>\n',
    b'version https://git-lfs.github.com/spec/v1\noid sha256:' + b'4d7a214614ab2935' * 4 + b'\nsize 343249461\n',
    b'{"message": "Not Found"}', b'\x00' * 2048, b'\x80', b'PK\x03\x04'],
    ids=['empty', 'html', 'git-lfs pointer', 'json', 'zeros', 'one byte', 'zip head'])
@pytest.mark.parametrize('name', ['file.pth', 'file.bin', 'file.safetensors'])
def test_file_of_another_kind_is_refused(tmp_path, content, name):
    """README: an error page or a git-lfs pointer in place of the weights is one line that says so of the file."""
    path = tmp_path / name
    path.write_bytes(content)
    assert str(path) in refusal(models.load_checkpoint, path)


@pytest.mark.parametrize('content', [
    b'<!DOCTYPE html>\n<html>\n', b'version https://git-lfs.github.com/spec/v1\n', b'\x00' * 2048],
    ids=['html', 'git-lfs pointer', 'zeros'])
def test_message_on_a_file_of_another_kind_is_about_the_file(tmp_path, content):
    """README: the line says what is wrong with the file; torch's advice to turn weights_only off would be wrong."""
    path = tmp_path / 'file.pth'
    path.write_bytes(content)
    assert 'weights_only' not in refusal(models.load_checkpoint, path)


@pytest.mark.parametrize('function', [
    models.load_checkpoint, lambda path: models.load_teacher(models.create_mae('mae_vit_pico_patch8', 32), path),
    lambda path: models.load_pretrained(models.create_vit('vit_pico_patch8', 5, 32), path)])
def test_folder_and_missing_file_are_refused(tmp_path, function):
    """README: a wrong path is one line."""
    assert str(tmp_path) in refusal(function, tmp_path)
    assert 'absent.pth' in refusal(function, tmp_path / 'absent.pth')
    assert 'absent.pth' in refusal(function, str(tmp_path / 'absent.pth'))


@pytest.mark.parametrize('content', [
    {}, {'model': {}}, [], [torch.zeros(2)], torch.zeros(2), 3, None, 'text', {'model': [torch.zeros(2)]}, {'epoch': 3}])
def test_file_without_weights_is_refused(tmp_path, content):
    """README: a file that torch reads but that holds no state dict is one line."""
    path = save(tmp_path, content)
    assert str(path) in refusal(models.load_checkpoint, path)


@pytest.mark.filterwarnings('ignore:Validating sparse')
@pytest.mark.parametrize('key, value', [
    ('epoch', 3), ('name', 'x'), ('nothing', None), ('parts', [torch.zeros(2)]), ('inner', {'a': torch.zeros(2)}),
    (7, torch.zeros(2)), (None, torch.zeros(2)), (('a', 1), torch.zeros(2)),
    ('sparse', torch.eye(3).to_sparse()), ('meta', torch.zeros(3, device='meta')),
    ('huge', torch.zeros(1).expand(10 ** 6, 10 ** 6)), ('broadcast', torch.zeros(3, 1).expand(3, 2))],
    ids=lambda x: type(x).__name__ if isinstance(x, torch.Tensor) else repr(x))
def test_entry_that_is_no_weight_is_named(tmp_path, key, value):
    """README: only plain tensors are weights; a few bytes that claim a tensor of 4 TB are refused before it is made."""
    path = save(tmp_path, {'model': {'norm.weight': torch.zeros(3), key: value}})
    assert path.stat().st_size < 10_000
    message = refusal(models.load_checkpoint, path)
    assert repr(key) in message
    assert str(path) in message


@pytest.mark.filterwarnings('ignore:.*CSR', 'ignore:Validating sparse')
def test_compressed_sparse_entry_is_named(tmp_path):
    """README: only plain tensors are weights; torch's other sparse layouts are none either."""
    path = save(tmp_path, {'model': {'norm.weight': torch.zeros(3), 'csr': torch.eye(3).to_sparse_csr()}})
    assert "'csr'" in refusal(models.load_checkpoint, path)


def test_download_that_fails_is_refused_and_one_that_works_is_kept(tmp_path, monkeypatch):
    """README: paths and https URLs both work; without a network the line says to fetch the file by hand."""
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    calls = []

    def download(url, target, progress):
        calls.append(url)
        if len(calls) == 1:
            raise OSError('no route to host')
        torch.save({'model': state}, target)

    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    state, url = encoder(), 'https://example.org/weights/mae.pth?download=1'
    message = refusal(models.load_checkpoint, url)
    assert url in message and 'no route to host' in message
    same(models.load_checkpoint(url), state)
    same(models.load_checkpoint(url), state)
    assert calls == [url, url]
    state = encoder()  # another model under the same file name
    same(models.load_checkpoint('https://example.org/other/mae.pth'), state)
    assert len(list((tmp_path / 'checkpoints').glob('*mae.pth'))) == 2


# -------------------------------------------------------------------------------------------------------------- safety


class Payload:
    """Unpickled without care, calls a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def payloads(marker):
    return {
        'system': Payload(os.system, f'touch {marker}'),
        'exec': Payload(builtins.exec, f'open({str(marker)!r}, "w").close()'),
        'eval': Payload(builtins.eval, f'open({str(marker)!r}, "w").close()'),
        'check_call': Payload(subprocess.check_call, ['touch', str(marker)]),
        'Popen': Payload(subprocess.Popen, ['touch', str(marker)]),
        'open': Payload(builtins.open, str(marker), 'w'),
        'mkdir': Payload(os.mkdir, str(marker))}


PLACES = {
    'bare': lambda x: x,
    'entry': lambda x: {'model': {**encoder(), 'cls_token': x}},
    'args': lambda x: {'model': encoder(), 'args': argparse.Namespace(lr=1e-3, output_dir=x)},
    'beside': lambda x: {'model': encoder(), 'optimizer': [x]}}
WRITERS = {
    'torch': lambda x, path: torch.save(x, path),
    'legacy torch': lambda x, path: torch.save(x, path, _use_new_zipfile_serialization=False),
    'pickle': lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2))}


def read_carelessly(writer, path):
    """What the file does to a reader that trusts it: the check that the payload is a real one."""
    if writer == 'pickle':
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)


def wait_for(marker):
    """Popen's child needs a moment: its parent reaps it here."""
    if not marker.exists():
        os.waitpid(-1, 0)
    return marker.exists()


@pytest.mark.parametrize('writer', WRITERS)
@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('name', ['system', 'exec', 'eval', 'check_call', 'Popen', 'open', 'mkdir'])
def test_pickle_that_wants_to_run_code_is_refused_by_name(tmp_path, writer, place, name):
    """README: checkpoints are read weights-only: a file that wants to run code is refused, and nothing has run."""
    marker, path = tmp_path / 'marker', tmp_path / 'file.pth'
    payload = PLACES[place](payloads(marker)[name])
    if writer == 'pickle' and place != 'bare':
        payload = {'x': [payloads(marker)[name]]}
    WRITERS[writer](payload, path)
    message = refusal(models.load_checkpoint, path)
    assert not marker.exists()
    assert 'wants to use' in message and name in message.replace(str(path), '')
    if place == 'bare':
        read_carelessly(writer, path)
        assert wait_for(marker)


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('protocol', [0, 1, 3, 4, 5])
def test_no_pickle_protocol_runs_code(tmp_path, protocol):
    """README: the same for every pickle protocol, also those that torch does not write."""
    marker, path = tmp_path / 'marker', tmp_path / 'file.pth'
    path.write_bytes(pickle.dumps({'model': {'x': payloads(marker)['mkdir']}}, protocol=protocol))
    assert 'mkdir' in refusal(models.load_checkpoint, path)
    torch.save({'model': {'x': payloads(marker)['mkdir']}}, path, pickle_protocol=max(2, protocol))
    refusal(models.load_checkpoint, path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_name_with_a_line_break_does_not_break_the_line(tmp_path):
    """README: a refusal is one line, also where the file's own names, of a function or of a weight, hold line breaks."""
    path = tmp_path / 'file.pth'
    path.write_bytes(b'\x80\x04\x8c\x05posix\x8c\x07sys\ntem\x93.')
    refusal(models.load_checkpoint, path)
    save(tmp_path, {'model': {**full_mae(), 'extra\nname': random(3)}})
    refusal(models.load_teacher, models.create_mae('mae_vit_pico_patch8', 32), path)


class Trainer:
    """A class of somebody's training code."""


@pytest.mark.parametrize('value, name', [
    (Trainer(), 'Trainer'), (types.SimpleNamespace(lr=1), 'SimpleNamespace'), (pathlib.PurePosixPath('x'), 'PurePosixPath'),
    (torch.nn.Linear(2, 2), 'Linear'), (argparse.ArgumentError(None, 'x'), 'ArgumentError'),
    (argparse.Namespace(inner=Trainer()), 'Trainer')], ids=lambda value: value if isinstance(value, str) else '')
@pytest.mark.parametrize('place', PLACES)
def test_instance_of_any_other_class_is_refused_by_name(tmp_path, value, name, place):
    """README: argparse.Namespace is the one class allowed beyond tensors; anything else is refused by name."""
    assert name in refusal(models.load_checkpoint, save(tmp_path, PLACES[place](value)))


def test_allowing_namespace_ends_with_the_read(tmp_path):
    """README: reading a checkpoint leaves torch's own list of allowed classes as it was."""
    path = save(tmp_path, {'model': encoder(), 'args': argparse.Namespace(lr=1)})
    before = set(torch.serialization.get_safe_globals())
    models.load_checkpoint(path)
    assert set(torch.serialization.get_safe_globals()) == before
    assert argparse.Namespace not in before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


ROOT = pathlib.Path(__file__).resolve().parents[1]
UNSAFE = {'pickle.load', 'pickle.loads', 'pickle.Unpickler', 'torch.serialization.load', 'joblib.load', 'np.load',
          'numpy.load', 'torch.jit.load', 'marshal.loads', 'shelve.open', 'torch.package.PackageImporter', 'torch.hub.load',
          'torch.hub.load_state_dict_from_url'}


@pytest.mark.parametrize('path', sorted([*ROOT.glob('*.py'), *ROOT.glob('tools/*.py')]), ids=lambda path: path.name)
def test_nothing_is_unpickled_except_weights_only(path):
    """README, bad data: the one reader of checkpoints says weights_only=True; nothing else unpickles."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    loads = [node for node in calls if ast.unparse(node.func) == 'torch.load']
    assert not UNSAFE & {ast.unparse(node.func) for node in calls}
    assert len(loads) == (path.name == 'models.py')
    for node in loads:
        assert {word.arg: ast.unparse(word.value) for word in node.keywords}['weights_only'] == 'True'
    for line in re.findall(r'torch\.load\(.*', path.read_text()):  # also where one is only printed
        assert 'weights_only=True' in line


def indirect(marker):
    """Ways to a call that name no dangerous function at first."""
    touch = f'touch {marker}'
    system = Payload(getattr, Payload(getattr, Payload(importlib.import_module, 'pathlib'), 'os'), 'system')
    return {
        'getattr': Payload(list, Payload(map, system, [touch])),
        'import_module': Payload(operator.methodcaller('system', touch), Payload(importlib.import_module, 'os')),
        'methodcaller': Payload(operator.methodcaller('mkdir'), pathlib.PosixPath(str(marker))),
        'partial': Payload(functools.partial(os.system, touch)),
        'map': Payload(list, Payload(map, os.system, [touch]))}


@pytest.mark.parametrize('suffix', ['pth', 'bin', 'safetensors'])
@pytest.mark.parametrize('writer', WRITERS)
@pytest.mark.parametrize('name', ['getattr', 'import_module', 'methodcaller', 'partial', 'map', 'system'])
def test_a_detour_to_a_call_is_refused_whatever_the_file_is_called(tmp_path, writer, name, suffix):
    """README, bad data: chains of getattr, imports and partial calls run nothing; nor does a pickle named .safetensors."""
    marker, path = tmp_path / 'marker', tmp_path / f'file.{suffix}'
    payload = {**indirect(marker), **payloads(marker)}[name]
    if writer != 'pickle':
        payload = {'model': encoder(), 'optimizer': {'state': {0: {'exp_avg': payload}}, 'param_groups': [{'lr': payload}]}}
    WRITERS[writer](payload, path)
    message = refusal(models.read_checkpoint, path)
    assert str(path) in message and not marker.exists()
    if writer == 'pickle':
        read_carelessly(writer, path)
        assert marker.exists()


def peak():
    """Largest resident memory since it was set back, MB."""
    return int(re.search(r'VmHWM:\s+(\d+)', pathlib.Path('/proc/self/status').read_text())[1]) / 1024


def rewritten(folder, change, compression=zipfile.ZIP_STORED, numbers=1000):
    """torch's zip of one tensor, with its pickle changed."""
    whole = io.BytesIO(save(folder, {'model': {'a': torch.zeros(numbers)}}).read_bytes())
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(folder / 'new.pth', 'w', compression) as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name)) if name.endswith('data.pkl') else old.read(name))
    return folder / 'new.pth'


def claims(folder):
    """Files of a few kB that ask for gigabytes, by functions that torch allows."""
    def rebuild(size, stride):
        return Payload(torch._utils._rebuild_tensor_v2, torch.zeros(2).storage(), 0, size, stride, False, {})

    thousand, billion = b'M' + struct.pack('<H', 1000), b'J' + struct.pack('<i', 10 ** 9)
    return {
        'a storage of 4 GB': lambda: rewritten(folder, lambda content: content.replace(thousand, billion)),
        'compressed zeros': lambda: rewritten(folder, bytes, zipfile.ZIP_DEFLATED, 10 ** 8),
        'more than the storage': lambda: save(folder, {'model': {'a': rebuild((10 ** 5, 10 ** 5), (10 ** 5, 1))}}),
        'one number expanded': lambda: save(folder, {'model': {'a': rebuild((10 ** 5, 10 ** 5), (0, 0))}}),
        'a negative size': lambda: save(folder, {'model': {'a': rebuild((-1, 10 ** 9), (1, 1))}}),
        'a stride beyond': lambda: save(folder, {'model': {'a': rebuild((2, 2), (2 ** 62, 1))}}),
        'the same in the legacy format': lambda: save(folder, {'model': {'a': rebuild((10 ** 4, 10 ** 5), (10 ** 5, 1))}},
                                                      _use_new_zipfile_serialization=False),
        'a bytearray': lambda: save(folder, {'model': {'a': Payload(bytearray, 10 ** 13)}}),
        'a tensor of a size': lambda: save(folder, {'model': {'a': Payload(torch.Tensor, 10 ** 7, 10 ** 7)}})}


@pytest.mark.skipif(not pathlib.Path('/proc/self/clear_refs').exists(), reason='the peak of memory is read from /proc')
@pytest.mark.parametrize('name', claims(None))
def test_a_file_that_claims_more_than_it_holds_takes_no_memory(tmp_path, name):
    """README, bad data: sizes are checked before anything is allocated, also those of functions that torch allows."""
    path = claims(tmp_path)[name]()
    assert path.stat().st_size < 500_000
    pathlib.Path('/proc/self/clear_refs').write_text('5')
    before = peak()
    refusal(models.load_checkpoint, path)
    assert peak() - before < 100


@pytest.mark.parametrize('shape', [(10 ** 12, 0), (3,), (), (3, 31), (0, 3, 32), (3, 32, 1)])
def test_a_head_of_an_absurd_shape_is_refused_before_it_is_built(shape):
    """README, bad data: the number of classes is read from a shape, which costs a file nothing."""
    state = {**encoder(), 'head.weight': torch.zeros(shape)}
    assert str(shape) in refusal(models.create_vit_like, state, 'vit_pico_patch8', 32)


SPOILT = {
    'complex': (lambda value: value.to(torch.complex64), 'not a plain tensor'),
    '8-bit floats': (lambda value: value.to(torch.float8_e4m3fn), 'not a plain tensor'),
    'integers': (lambda value: value.long(), 'torch.int64'),
    'booleans': (lambda value: value > 0, 'torch.bool'),
    'NaN': (lambda value: value * math.nan, 'not finite'),
    'an infinite number': (lambda value: torch.cat([value[:1] / 0, value[1:]]), 'not finite'),
    'beyond float32': (lambda value: value.double() * 1e300, 'not finite'),
    'another shape': (lambda value: value[:-1], 'is (31,)')}


@pytest.mark.parametrize('case', SPOILT)
def test_a_weight_of_another_type_or_without_a_value_is_named(tmp_path, case):
    """README, bad data: nothing is cast from complex, whole or true numbers, and NaN is found before the first step."""
    change, word = SPOILT[case]
    state = full_mae()
    state['blocks.1.norm2.weight'] = change(state['blocks.1.norm2.weight'])
    path = save(tmp_path, {'model': state})
    for message in (refusal(models.load_teacher, models.create_mae('mae_vit_pico_patch8', 32), path),
                    refusal(models.load_pretrained, models.create_vit('vit_pico_patch8', 5, 32), path)):
        assert word in message and 'blocks.1.norm2.weight' in message


def at(*where, to):
    """A change of one place in nested dicts and lists; Ellipsis deletes it."""
    def apply(content):
        for key in where[:-1]:
            content = content[key]
        content[where[-1]] = to
        if to is ...:
            del content[where[-1]]
    return apply


UNFIT = {
    'epoch of another type': (at('epoch', to='3'), 'epoch'), 'negative epoch': (at('epoch', to=-1), 'epoch'),
    'true epoch': (at('epoch', to=True), 'epoch'), 'huge epoch': (at('epoch', to=10 ** 30), 'epoch'),
    'time of another type': (at('train_seconds', to='x'), 'train_seconds'),
    'time of no number': (at('train_seconds', to=math.nan), 'train_seconds'),
    'endless time': (at('train_seconds', to=1e300), 'train_seconds'),
    'scaler of another type': (at('scaler', to=[1]), 'scaler'), 'scaler of words': (at('scaler', 'scale', to='x'), 'scaler'),
    'no optimizer': (at('optimizer', to=None), 'groups'),
    'optimizer without groups': (at('optimizer', 'param_groups', to=...), 'groups'),
    'group of another type': (at('optimizer', 'param_groups', 0, to=3), 'groups'),
    'group without parameters': (at('optimizer', 'param_groups', 0, 'params', to=...), 'groups'),
    'other number of parameters': (at('optimizer', 'param_groups', 0, 'params', to=[0]), 'groups'),
    'state of another type': (at('optimizer', 'state', to=[1]), 'groups'),
    'unknown parameter': (at('optimizer', 'state', 7, to={}), 'parameters'),
    'name for a parameter': (at('optimizer', 'state', 'a', to={}), 'parameters'),
    'moments of another type': (at('optimizer', 'state', 0, to=[1]), 'parameters'),
    'no moment': (at('optimizer', 'state', 0, 'exp_avg', to=...), 'exp_avg of parameter 0'),
    'moment of another shape': (at('optimizer', 'state', 0, 'exp_avg', to=torch.zeros(2)), 'exp_avg of the optimizer'),
    'moment that is a number': (at('optimizer', 'state', 1, 'exp_avg_sq', to=3.0), "'exp_avg_sq'"),
    'moment of NaN': (at('optimizer', 'state', 1, 'exp_avg_sq', to=torch.full((3,), math.nan)), 'not finite'),
    'moment that is no memory': (at('optimizer', 'state', 0, 'exp_avg', to=torch.zeros(1).expand(3, 2)), "'exp_avg'"),
    'step of another shape': (at('optimizer', 'state', 0, 'step', to=torch.zeros(2)), 'step of the optimizer')}


@pytest.mark.parametrize('case', ['nothing', *UNFIT])
def test_what_does_not_fit_the_run_that_goes_on_is_named(case):
    """README, bad data: counters, optimizer and scaler of --resume are checked before anything of them is used."""
    layer = torch.nn.Linear(2, 3)
    optimizer, scaler = torch.optim.AdamW(layer.parameters()), torch.amp.GradScaler('cpu', enabled=True)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    checkpoint = {'epoch': 3, 'train_seconds': 1.5, 'scaler': scaler.state_dict(), 'optimizer': optimizer.state_dict()}
    if case == 'nothing':
        return models.check_run(checkpoint, optimizer, scaler, 'file.pth')
    change, word = UNFIT[case]
    change(checkpoint)
    message = refusal(models.check_run, checkpoint, optimizer, scaler, 'file.pth')
    assert word in message and 'file.pth' in message


def test_only_plain_arguments_of_a_checkpoint_are_looked_at():
    """README, bad data: what else lies in `args` is never compared or printed."""
    plain = {'lr': 1e-3, 'input_size': [16, 16], 'model': 'x', 'eval': False, 'resume': None}
    hostile = {3: 1, ('a',): 2, 'tensor': torch.zeros(3), 'nested': [[1]], 'inner': {'a': 1}, 'names': [torch.zeros(2)]}
    assert models.stored_args({'args': {**plain, **hostile}}) == plain
    for nothing in ({}, {'args': None}, {'args': [1]}, {'args': argparse.Namespace(lr=1)}):
        assert models.stored_args(nothing) == {}


@pytest.mark.parametrize('classes', [3, 'names', {'a': 1}, [1, 2], [['a']], [None], [torch.zeros(2)]])
def test_classes_that_are_no_names_are_refused(classes):
    """README, bad data: class names of a checkpoint are text in a list."""
    assert 'no list of names' in refusal(models.check_classes, classes, ['a', 'b'], 'file')


# --------------------------------------------------------------------------------------------------------- classifiers


@pytest.mark.parametrize('kind, classes', [('token', 4), ('avg', 9), ('distilled', 6)])
def test_kind_of_classifier_is_read_from_the_checkpoint(tmp_path, kind, classes):
    """Stage 2: --teacher_path and --eval need no flags: distilled, pooled and the classes are in the file."""
    state = {**encoder(rows=18 if kind == 'distilled' else 17), **linear('head', classes)}
    if kind == 'avg':
        state = {k.replace('norm.', 'fc_norm.') if k.startswith('norm.') else k: v for k, v in state.items()}
    if kind == 'distilled':
        state.update({'dist_token': random(1, 1, 32), **linear('head_dist', classes)})
    path = save(tmp_path, {'model': state})
    model = models.create_vit_like(models.load_checkpoint(path), 'vit_pico_patch8', 32)
    assert model.num_classes == classes
    assert hasattr(model, 'head_dist') == (kind == 'distilled')
    assert model.global_pool == ('avg' if kind == 'avg' else 'token')
    models.load_teacher(model, path)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, classes)


def test_checkpoint_without_a_head_is_no_classifier(tmp_path):
    """README: an encoder as --teacher_path of stage 2 is refused with what to give in its place."""
    message = refusal(models.create_vit_like, models.load_checkpoint(save(tmp_path, encoder())), 'vit_pico_patch8', 32)
    assert 'head.weight' in message


@pytest.mark.parametrize('ours, theirs, kwargs', [
    ({'distilled': True}, 'deit_small_distilled_patch16_224', {}), ({}, 'deit_small_patch16_224', {}),
    ({'global_pool': 'avg'}, 'vit_small_patch16_224', {'global_pool': 'avg'})])
def test_our_checkpoint_loads_strictly_into_timm(ours, theirs, kwargs):
    """Stage 2: timm's naming means that our checkpoints load there with strict=True."""
    with torch.device('meta'):
        state = models.create_vit('vit_small_patch16', 1000, **ours).state_dict()
        model = timm.create_model(theirs, **kwargs)
    model.load_state_dict(state, strict=True)


@pytest.mark.parametrize('ours, theirs, kwargs', [
    ({'distilled': True}, 'deit_tiny_distilled_patch16_224', {}), ({}, 'deit_tiny_patch16_224', {}),
    ({'global_pool': 'avg'}, 'vit_tiny_patch16_224', {'global_pool': 'avg'})])
def test_timm_gives_our_checkpoints_logits(tmp_path, ours, theirs, kwargs):
    """Stage 2: and there it gives the same outputs."""
    torch.manual_seed(0)
    model = models.create_vit('vit_tiny_patch16', 7, 64, **ours).eval()
    path = save(tmp_path, {'model': model.state_dict()})
    oracle = timm.create_model(theirs, img_size=64, num_classes=7, **kwargs).eval()
    oracle.load_state_dict(torch.load(path, weights_only=True)['model'], strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), oracle(images), atol=1e-6, rtol=0)


def test_teacher_of_other_classes_is_refused_with_the_first_that_differs():
    """README: class names are stored in the checkpoint and compared, in order."""
    models.check_classes(None, ['a', 'b'], 'file')
    models.check_classes(['a', 'b'], ['a', 'b'], 'file')
    message = refusal(models.check_classes, ['a', 'c'], ['a', 'b'], 'file')
    assert "'c' is 'b' here" in message
    refusal(models.check_classes, ['b', 'a'], ['a', 'b'], 'file')
    assert '3 there, 2 in' in refusal(models.check_classes, ['a', 'b', 'c'], ['a', 'b'], 'file')
