"""Checkpoints of others and of older versions, damaged ones, ones that want to run code; saving, resuming."""
import argparse
import collections
import os
import pickle
from argparse import Namespace

import pytest
import safetensors.torch
import specific_distill_cls
import timm
import torch
import torch.nn.functional as F
from conftest import assert_same_bits, checkpoint_of
from timm.optim import create_optimizer_v2

import models

@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random(*shape):
    return 0.2 * torch.randn(*shape)


def linear(name, classes=3, width=32):
    return {f'{name}.weight': random(classes, width), f'{name}.bias': random(classes)}


def blocks(name, width=32, depth=2):
    """The twelve entries of each block, written out."""
    state = {}
    for i in range(depth):
        state.update({
            f'{name}.{i}.norm1.weight': 1 + random(width), f'{name}.{i}.norm1.bias': random(width),
            **linear(f'{name}.{i}.attn.qkv', 3 * width), **linear(f'{name}.{i}.attn.proj', width),
            f'{name}.{i}.norm2.weight': 1 + random(width), f'{name}.{i}.norm2.bias': random(width),
            **linear(f'{name}.{i}.mlp.fc1', 4 * width), **linear(f'{name}.{i}.mlp.fc2', width, 4 * width)})
    return state


def encoder(rows=17, patch=8):
    """A pico ViT as MAE, DINO and timm store it, without heads; rows: of its position table."""
    return {'cls_token': random(1, 1, 32), 'pos_embed': random(1, rows, 32),
            'patch_embed.proj.weight': random(32, 3, patch, patch), 'patch_embed.proj.bias': random(32),
            **blocks('blocks'), 'norm.weight': 1 + random(32), 'norm.bias': random(32)}


def decoder(rows=17):
    """MAE's decoder without what follows its blocks."""
    return {'mask_token': random(1, 1, 32), 'decoder_pos_embed': random(1, rows, 32),
            **linear('decoder_embed', 32), **blocks('decoder_blocks')}


def full_mae(rows=17, patch=8):
    return {**encoder(rows, patch), **decoder(rows), 'decoder_norm.weight': 1 + random(32),
            'decoder_norm.bias': random(32), **linear('decoder_pred', 3 * patch * patch)}


def save(folder, state, **options):
    torch.save(state, folder / 'file.pth', **options)
    return folder / 'file.pth'


def assert_holds(model, state):
    own = model.state_dict()
    for key, value in state.items():
        assert torch.equal(own[key], value), key


# ---- layouts of others ---------------------------------------------------------------------------


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


LAYOUTS = {
    'bare': collections.OrderedDict,
    'mae': lambda state: {'model': state, 'optimizer': {'state': {}}, 'epoch': 799, 'scaler': {'scale': 2.0},
                          'args': Namespace(lr=1e-3, input_size=224)},
    'deit': lambda state: {'model': state, 'args': Namespace(distillation_type='none')},
    'ibot': lambda state: {'state_dict': {**state, 'masked_embed': random(1, 32)}, 'epoch': 3},
    'dino': lambda state: {
        'student': {**prefixed(encoder(), 'module.backbone.'), 'module.head.mlp.0.weight': random(8, 32)},
        'teacher': {**prefixed(state, 'backbone.'), 'head.mlp.0.weight': random(8, 32)},
        'args': Namespace(arch='vit_small'), 'dino_loss': {'center': random(1, 8)}, 'fp16_scaler': None},
    'dino, student alone': lambda state: {
        'student': {**prefixed(state, 'module.backbone.'), 'module.head.mlp.0.weight': random(8, 32)}},
    'distributed': lambda state: {'model': prefixed(state, 'module.')},
    'compiled': lambda state: {'model': prefixed(state, '_orig_mod.')},
    'in a model': lambda state: {'state_dict': prefixed(state, 'model.')},
    'in an encoder': lambda state: {'state_dict': {
        **prefixed(state, 'encoder.'), 'decoder_pred.bias': random(3)}},
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_published_layouts_start_stage_two(tmp_path, layout):
    state = encoder()
    path = save(tmp_path, LAYOUTS[layout](dict(state)), _use_new_zipfile_serialization=layout != 'mae')
    model = models.create_vit('vit_pico_patch8', 5, 32)
    models.load_pretrained(model, path)
    assert_holds(model, state)


def test_a_safetensors_file_is_read(tmp_path):
    state, path = full_mae(), tmp_path / 'file.safetensors'
    safetensors.torch.save_file(state, path)
    assert_holds(models.load_teacher(models.create_mae('mae_vit_pico_patch8', 32), path), state)


def test_the_authors_student_keeps_its_decoder_head_and_drops_the_unused_ones(tmp_path):
    head = {**linear('fc1', 48), **linear('fc2', 48, 48)}
    common = {**encoder(), **decoder()}
    file = {**common, **prefixed(head, 'decoderfeature_pred.'), **prefixed(head, 'encoderfeature_pred.'),
            'decoder_norm.weight': random(32), **linear('decoder_pred', 192)}
    path = save(tmp_path, {'model': file, 'args': Namespace(), 'epoch': 299})
    student = models.load_teacher(models.create_mae('mae_vit_pico_patch8', 32, target_dim=48), path)
    assert_holds(student, {**common, **prefixed(head, 'feature_head.')})
    models.load_pretrained(models.create_vit('vit_pico_patch8', 5, 32), path)


NAMES = ['a', 'b', 'c', 'd', 'e', 'f', 'g']


@pytest.mark.parametrize('reference, options', [
    ('vit_tiny_patch16_224', {}), ('vit_tiny_patch16_224', {'global_pool': 'avg'}),
    ('deit_tiny_distilled_patch16_224', {'distilled': True})])
def test_timm_and_these_scripts_read_each_others_classifiers(tmp_path, reference, options):
    """The kind of classifier is read from the file; names and logits are the same."""
    torch.manual_seed(0)
    pooling = {} if 'distilled' in options else options
    oracle = timm.create_model(reference, img_size=64, num_classes=7, **pooling).eval()
    model = specific_distill_cls.load_classifier(
        save(tmp_path, oracle.state_dict()), 'vit_tiny_patch16', 64, NAMES)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = oracle(images)
        torch.testing.assert_close(model(images), expected, atol=1e-6, rtol=0)
        fresh = models.create_vit('vit_tiny_patch16', 7, 64, **options).eval()
        oracle.load_state_dict(fresh.state_dict())
        torch.testing.assert_close(fresh(images), oracle(images), atol=1e-6, rtol=0)
    assert expected.abs().max() > 0.01 and not model.training


def test_a_classifier_without_a_head_or_of_other_classes_is_refused(tmp_path):
    def load(checkpoint, names):
        specific_distill_cls.load_classifier(save(tmp_path, checkpoint), 'vit_pico_patch8', 32, names)

    with pytest.raises(SystemExit, match='head.weight'):
        load(encoder(), NAMES)
    state = {**encoder(), **linear('head', 7)}
    load({'model': state, 'classes': NAMES}, NAMES)
    with pytest.raises(SystemExit, match='7 classes, the data has 6'):
        load(state, NAMES[:6])
    with pytest.raises(SystemExit, match='trained on 7 classes'):
        load({'model': state, 'classes': NAMES[::-1]}, NAMES)


# ---- start weights of stage 2 --------------------------------------------------------------------


def test_start_weights_say_what_is_used_resized_new_and_left_out(tmp_path, capsys):
    """The class head starts anew, even if the file has one of the same shape."""
    state = {**full_mae(rows=197, patch=16), **linear('head', 5)}
    model = models.create_vit('vit_pico_patch16', 5, 64, distilled=True)
    head = model.head.weight.detach().clone()
    path = save(tmp_path, {'model': state})
    models.load_pretrained(model, path)
    line = capsys.readouterr().out
    for words in (f'{len(encoder())} tensors of {path}', 'pos_embed 14x14 -> 4x4', 'distillation token',
                  'new: dist_token, head, head_dist;',
                  'left out: decoder_blocks, decoder_embed, decoder_norm, decoder_pos_embed, decoder_pred, '
                  'head, mask_token'):
        assert words in line
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.norm.bias, state['norm.bias'])


def test_global_pooling_takes_fc_norm_and_leaves_the_final_norm_out(tmp_path):
    model = models.create_vit('vit_pico_patch8', 5, 32, global_pool='avg')
    models.load_pretrained(model, save(tmp_path, encoder()))
    pooled = {key.replace('norm.', 'fc_norm.') if key.startswith('norm.') else key: value
              for key, value in encoder().items()}
    models.load_pretrained(model, save(tmp_path, pooled))
    assert_holds(model, pooled)
    with pytest.raises(SystemExit, match='norm.weight.*--global_pool'):
        models.load_pretrained(models.create_vit('vit_pico_patch8', 5, 32), save(tmp_path, pooled))


@pytest.mark.parametrize('entry, value', [
    ('blocks.1.mlp.fc2.bias', None), ('cls_token', None), ('pos_embed', None), ('gamma', random(3)),
    ('blocks.2.norm1.weight', random(32)), ('blocks.0.attn.qkv.weight', random(96, 16)),
    ('pos_embed', random(1, 12, 32))])
def test_start_weights_of_another_network_are_refused_by_the_entry(tmp_path, entry, value):
    state = {**encoder(), entry: value}
    if value is None:
        del state[entry]
    path = save(tmp_path, state)
    with pytest.raises(SystemExit, match=entry) as info:
        models.load_pretrained(models.create_vit('vit_pico_patch8', 5, 32), path)
    assert str(path) in str(info.value) and '\n' not in str(info.value)


# ---- positions -----------------------------------------------------------------------------------


def resized(table, old, new):
    """Bicubic without antialiasing, (old rows * columns, D) -> (new rows * columns, D)."""
    maps = table.reshape(1, *old, -1).permute(0, 3, 1, 2)
    maps = F.interpolate(maps, size=new, mode='bicubic', align_corners=False)
    return maps[0].flatten(1).T


@pytest.mark.parametrize('old, args, new', [
    ((14, 14), None, (16, 16)), ((14, 14), None, (6, 20)), ((4, 4), None, (2, 8)),
    ((2, 8), {'input_size': [16, 64]}, (4, 4)), ((4, 4), {'input_size': [32]}, (2, 8))])
def test_positions_are_resized_as_plain_bicubic(tmp_path, old, args, new):
    """Files of others are square; those of these scripts know their grid from `args`."""
    state = encoder(rows=1 + old[0] * old[1])
    model = models.create_vit('vit_pico_patch8', 5, (8 * new[0], 8 * new[1]))
    models.load_pretrained(model, save(tmp_path, {'model': state, **({'args': args} if args else {})}))
    assert torch.equal(model.pos_embed[0, 0], state['pos_embed'][0, 0])
    expected = resized(state['pos_embed'][0, 1:], old, new)
    torch.testing.assert_close(model.pos_embed[0, 1:], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize('side', [64, 96])
def test_a_table_without_a_class_row_gets_a_row_of_zeros(side, tmp_path, capsys):
    """DeiT III adds positions to the patches alone and scales its layers: features of timm's network."""
    sizes = {'img_size': 64, 'embed_dim': 32, 'depth': 2, 'num_heads': 2, 'init_values': 1}
    oracle = timm.create_model('deit3_small_patch16_224', **sizes).eval()
    assert oracle.pos_embed.shape == (1, 16, 32)
    for block in oracle.blocks:
        torch.nn.init.uniform_(block.ls1.gamma)
        torch.nn.init.uniform_(block.ls2.gamma)
    path, table = save(tmp_path, {'model': oracle.state_dict()}), oracle.pos_embed.detach()[0]
    model = models.create_vit('vit_pico_patch16', 5, side).eval()
    models.load_pretrained(model, path)
    assert 'zero position for the class token' in capsys.readouterr().out
    if side > 64:
        oracle.set_input_size((side, side))
        oracle.pos_embed.data = resized(table, (4, 4), (side // 16, side // 16))[None]
    images = torch.randn(2, 3, side, side).double()
    with torch.no_grad():
        features = model.double().forward_features(images)
        expected = oracle.double().forward_features(images)
    torch.testing.assert_close(features, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize('name', ['reg_token', 'embeddings.register_tokens'])
def test_register_tokens_are_refused_by_name(name, tmp_path):
    """timm's and transformers' names."""
    path = save(tmp_path, {**encoder(), name: random(1, 4, 32)})
    for load in (models.load_pretrained, models.load_teacher):
        with pytest.raises(SystemExit, match='file.pth has register tokens'):
            load(models.create_vit('vit_pico_patch8', 5, 32), path)


def test_both_tables_of_a_teacher_are_resized(tmp_path):
    state = full_mae()
    teacher = models.create_mae('mae_vit_pico_patch8', (24, 48))
    models.load_teacher(teacher, save(tmp_path, state))
    for key in ('pos_embed', 'decoder_pos_embed'):
        expected = torch.cat([state[key][0, :1], resized(state[key][0, 1:], (4, 4), (3, 6))])
        torch.testing.assert_close(teacher.state_dict()[key][0], expected, atol=1e-6, rtol=0)


def test_the_row_of_the_distillation_token_is_kept_dropped_or_zero(tmp_path):
    """It is no patch, and is not interpolated."""
    state = {**encoder(rows=18), 'dist_token': random(1, 1, 32), **linear('head_dist')}
    table = state['pos_embed']
    path = save(tmp_path, {'model': state})
    plain = models.create_vit('vit_pico_patch8', 5, 32)
    models.load_pretrained(plain, path)
    assert torch.equal(plain.pos_embed, torch.cat([table[:, :1], table[:, 2:]], dim=1))
    larger = models.create_vit('vit_pico_patch8', 5, 64, distilled=True)
    models.load_pretrained(larger, path)
    expected = torch.cat([table[0, :2], resized(table[0, 2:], (4, 4), (8, 8))])
    torch.testing.assert_close(larger.pos_embed[0], expected, atol=1e-6, rtol=0)
    assert torch.equal(larger.dist_token, state['dist_token'])
    distilled = models.create_vit('vit_pico_patch8', 5, 32, distilled=True)
    models.load_pretrained(distilled, save(tmp_path, encoder()))
    assert distilled.pos_embed[0, 1].abs().max() == 0 < distilled.pos_embed[0, 2].abs().max()


def test_the_authors_distilled_checkpoint_gives_the_same_outputs(tmp_path):
    """197 positions, and a token that is appended last and has none, equal our zero row."""
    state = {**encoder(), 'dist_token': random(1, 1, 32), **linear('head', 7), **linear('head_dist', 7)}
    path = save(tmp_path, {'model': state, 'args': Namespace()})
    model = specific_distill_cls.load_classifier(path, 'vit_pico_patch8', 32, NAMES).double()
    images = torch.randn(2, 3, 32, 32).double()
    x = torch.cat([state['cls_token'].expand(2, -1, -1), model.patch_embed(images)], dim=1)
    x = torch.cat([x + state['pos_embed'], state['dist_token'].expand(2, -1, -1)], dim=1)
    x = model.norm(model.blocks(x))
    expected = (model.head(x[:, 0]) + model.head_dist(x[:, -1])) / 2
    torch.testing.assert_close(model(images), expected, atol=1e-9, rtol=0)


# ---- teachers ------------------------------------------------------------------------------------


def test_a_teacher_without_a_decoder_is_refused_with_the_file_that_has_one(tmp_path):
    """The one failure that users of the authors' code report."""
    path = save(tmp_path, {'model': encoder(), 'args': Namespace()})
    with pytest.raises(SystemExit, match='no decoder.*mae_pretrain_vit_base_full.pth'):
        models.load_teacher(models.create_mae('mae_vit_pico_patch8', 32), path)


def test_weights_of_an_unfinished_run_are_named(tmp_path, capsys):
    for epoch, words in (1, '; after 2 of 4 epochs'), (3, ''):
        path = save(tmp_path, {'model': full_mae(), 'epoch': epoch, 'args': {'input_size': [32], 'epochs': 4}})
        models.load_teacher(models.create_mae('mae_vit_pico_patch8', 32), path)
        models.load_pretrained(models.create_vit('vit_pico_patch8', 5, 32), path)
        teacher, student = capsys.readouterr().out.splitlines()
        assert teacher.endswith(f'file.pth{words}') and f'file.pth{words}; new: ' in student


@pytest.mark.parametrize('entry, value', [
    ('norm.bias', None), ('decoder_norm.weight', None), ('norm_extra.weight', random(3)),
    ('mask_token', random(1, 1, 16)), ('decoder_pos_embed', random(1, 20, 32))])
def test_a_teacher_that_differs_in_one_entry_is_refused_by_its_name(tmp_path, entry, value):
    state = {**full_mae(), entry: value}
    if value is None:
        del state[entry]
    path = save(tmp_path, {'model': state})
    with pytest.raises(SystemExit, match=entry) as info:
        models.load_teacher(models.create_mae('mae_vit_pico_patch8', 32), path)
    assert str(path) in str(info.value) and '\n' not in str(info.value)


def test_a_teacher_comes_back_with_the_files_weights_frozen_and_in_eval_mode(tmp_path):
    state = full_mae()
    teacher = models.load_teacher(models.create_mae('mae_vit_pico_patch8', 32).train(), save(tmp_path, state))
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert_holds(teacher, state)


# ---- damaged files, files of another kind, code --------------------------------------------------


def refused(path):
    with pytest.raises(SystemExit) as info:
        models.load_checkpoint(path)
    assert str(path) in str(info.value) and '\n' not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize('kind', ['zip', 'legacy', 'safetensors'])
@pytest.mark.parametrize('share', [0.0, 0.5, 0.999])
def test_a_truncated_file_is_refused_in_one_line(tmp_path, kind, share):
    path = tmp_path / ('file.safetensors' if kind == 'safetensors' else 'file.pth')
    if kind == 'safetensors':
        safetensors.torch.save_file(full_mae(), path)
    else:
        save(tmp_path, {'model': full_mae()}, _use_new_zipfile_serialization=kind == 'zip')
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    assert 'truncated' in refused(path)


@pytest.mark.parametrize('content', [
    b'<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head>\n</html>\n',
    b'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 343249461\n'])
@pytest.mark.parametrize('name', ['file.pth', 'file.safetensors'])
def test_a_file_of_another_kind_is_refused_without_advice_to_trust_it(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    assert 'weights_only' not in refused(tmp_path / name)


def test_a_wrong_path_and_a_file_without_weights_are_refused(tmp_path):
    refused(tmp_path)
    refused(tmp_path / 'absent.pth')
    refused(save(tmp_path, {'model': {}, 'epoch': 3}))
    assert 'holds a list' in refused(save(tmp_path, [encoder()]))


class Payload:
    """Unpickled without care, runs a shell command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize('place', ['bare', 'entry', 'args', 'pickle'])
def test_a_file_that_wants_to_run_code_is_refused_by_name(tmp_path, place):
    marker, path = tmp_path / 'marker', tmp_path / 'file.pth'
    payload = Payload(f'touch {marker}')
    content = {'bare': payload, 'entry': {'model': {**encoder(), 'cls_token': payload}},
               'args': {'model': encoder(), 'args': Namespace(output_dir=payload)}, 'pickle': payload}[place]
    if place == 'pickle':
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    assert 'system' in refused(path)
    assert not marker.exists()
    if place == 'args':
        torch.load(path, weights_only=False)
        assert marker.exists()  # the payload is a real one
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # allowed for the one read alone


def test_a_download_is_kept_and_files_of_one_name_do_not_mix(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    files, calls = {'https://a.org/mae.pth': encoder(), 'https://b.org/mae.pth': encoder()}, []
    monkeypatch.setattr(torch.hub, 'download_url_to_file',
                        lambda url, path: calls.append(url) or torch.save(files[url], path))
    for url in [*files, *files]:
        assert_same_bits({'model': models.load_checkpoint(url)}, {'model': files[url]}, parts=('model',))
    assert calls == list(files)


# ---- saving and resuming -------------------------------------------------------------------------


def make_run(folder, seed=0, width=3, weight_decay=0.05, **changed):
    """(args, loader of 4 steps, parts) of a tiny run."""
    args = Namespace(output_dir=str(folder), resume='auto', save_every=0, distributed=False, rank=0,
                     world_size=1, batch_size=2, accum_iter=1, seed=0, amp='off', eval_every=5, print_freq=3)
    vars(args).update(changed)
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    model = torch.nn.Linear(width, 2)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=0.1, weight_decay=weight_decay)
    loader = torch.utils.data.DataLoader(
        models.SeededDataset(range(8), 0), 2, sampler=models.SeededSampler(8, args))
    meter = models.Meter(args, optimizer, 3)
    scaler = torch.amp.GradScaler('cpu', enabled=False)
    return args, loader, {'model': model, 'optimizer': optimizer, 'scaler': scaler, 'meter': meter}


def train(args, loader, parts, epoch, start, end):
    """The steps from start to end of an epoch, and what the scripts save behind them."""
    loader.sampler.set_epoch(epoch, 2 * start)
    for step, numbers in parts['meter'].log_every(loader, epoch, start):
        loss = parts['model'](numbers[:, None].expand(-1, 3).float()).square().sum()
        loss.backward()
        parts['optimizer'].step()
        parts['optimizer'].zero_grad()
        parts['meter'].update(None, loss=loss)
        if step + 1 == end:
            break
    models.save_checkpoint(args, epoch, end, loader, ['a', 'b'], **parts)


def finish_epochs(args, loader, parts, count):
    for epoch in range(count):
        train(args, loader, parts, epoch, 0, 4)


def states(parts):
    return {name: part.state_dict() for name, part in parts.items()}


def test_a_resume_within_an_epoch_and_after_one_brings_back_every_part(tmp_path):
    whole = make_run(tmp_path / 'whole')
    finish_epochs(*whole, 2)
    args, loader, parts = make_run(tmp_path / 'cut')
    finish_epochs(args, loader, parts, 1)
    train(args, loader, parts, 1, 0, 2)
    _, _, fresh = make_run(tmp_path / 'cut', seed=1)
    assert models.resume(args, ['a', 'b'], **fresh) == (1, 4)  # 4 samples of epoch 1 are done
    assert_same_bits(states(fresh), states(parts), parts=list(parts))
    train(args, loader, fresh, 1, 2, 4)
    assert_same_bits(states(fresh), states(whole[2]), parts=['model', 'optimizer'])
    expected = whole[2]['meter'].stats()['train_loss']
    assert fresh['meter'].stats()['train_loss'] == pytest.approx(expected, rel=1e-12)
    epoch, samples = models.resume(args, ['a', 'b'], **fresh)
    assert (epoch, loader.sampler.set_epoch(epoch, samples)) == (1, 4)  # for its evaluation and log line


def test_the_checkpoint_before_is_kept_and_that_of_every_nth_epoch_too(tmp_path):
    args, loader, parts = make_run(tmp_path, save_every=2)
    finish_epochs(args, loader, parts, 3)
    assert checkpoint_of(tmp_path)['epoch'] == 2 and checkpoint_of(tmp_path, 'previous.pth')['epoch'] == 1
    train(args, loader, parts, 3, 0, 2)  # stopped within an epoch
    assert checkpoint_of(tmp_path)['epoch'] == 2 and checkpoint_of(tmp_path)['samples'] == 4
    names = ['checkpoint-1.pth', 'checkpoint.pth', 'previous.pth']
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert checkpoint_of(tmp_path, 'checkpoint-1.pth')['epoch'] == 1


def test_resume_auto_takes_the_newest_file_that_can_be_read(tmp_path, capsys):
    args, loader, parts = make_run(tmp_path)
    assert models.resume(args, **parts) == (0, 0)  # nothing there: a new run
    finish_epochs(args, loader, parts, 2)
    newest, previous = tmp_path / 'checkpoint.pth', tmp_path / 'previous.pth'
    whole = newest.read_bytes()
    newest.write_bytes(whole[:len(whole) // 2])
    assert models.resume(args, ['a', 'b'], **parts)[0] == 0
    assert 'warning' in capsys.readouterr().out
    newest.unlink()  # a kill between the two renames
    assert models.resume(args, ['a', 'b'], **parts)[0] == 0
    previous.write_bytes(whole[:100])
    with pytest.raises(SystemExit, match='previous.pth'):
        models.resume(args, ['a', 'b'], **parts)
    args.resume = str(newest)
    with pytest.raises(SystemExit, match='no checkpoint file'):
        models.resume(args, ['a', 'b'], **parts)


def test_a_run_of_another_kind_is_not_resumed(tmp_path):
    args, loader, parts = make_run(tmp_path)
    finish_epochs(args, loader, parts, 1)
    with pytest.raises(SystemExit, match='another architecture.*weight'):
        models.resume(args, ['a', 'b'], **make_run(tmp_path, width=4)[2])
    with pytest.raises(SystemExit, match='trained on 2 classes.*: b and c'):
        models.resume(args, ['a', 'c'], **parts)
    args.eval_every = 7
    with pytest.raises(SystemExit, match='--eval_every was 5'):
        models.resume(args, ['a', 'b'], fixed=('eval_every',), **parts)


def test_a_weight_decay_that_was_changed_by_hand_wins(tmp_path):
    args, loader, parts = make_run(tmp_path)
    finish_epochs(args, loader, parts, 1)
    _, _, fresh = make_run(tmp_path, weight_decay=0.2)
    models.resume(args, ['a', 'b'], **fresh)
    assert [group['weight_decay'] for group in fresh['optimizer'].param_groups] == [0.0, 0.2]


def test_an_optimizer_whose_parameters_are_grouped_otherwise_is_not_resumed(tmp_path):
    """timm makes one group without weight decay, two with it: moments would go to other parameters."""
    args, loader, parts = make_run(tmp_path)
    finish_epochs(args, loader, parts, 1)
    with pytest.raises(SystemExit, match='weight_decay'):
        models.resume(args, ['a', 'b'], **make_run(tmp_path, weight_decay=0.0)[2])


def test_processes_that_see_different_files_end_the_run(tmp_path, monkeypatch):
    args, loader, parts = make_run(tmp_path)
    finish_epochs(args, loader, parts, 1)

    def another_machine_has_none(paths, path):
        paths[:] = [path, 'None']

    monkeypatch.setattr(models.dist, 'all_gather_object', another_machine_has_none)
    args.distributed, args.world_size = True, 2
    with pytest.raises(SystemExit, match='must share the disk of --output_dir'):
        models.resume(args, ['a', 'b'], **parts)


def test_a_checkpoint_of_the_older_version_gives_its_weights_and_is_not_resumed(tmp_path):
    """Its keys: no meter, and counters of its own; flags as now."""
    state = {**encoder(rows=17), **linear('head', 7)}
    old = {'model': state, 'optimizer': {'state': {}, 'param_groups': []}, 'scaler': {}, 'epoch': 4,
           'step': 0, 'train_seconds': 31.5, 'progress': {}, 'classes': NAMES,
           'args': {'model': 'vit_pico_patch8', 'input_size': [16, 64], 'lr': 1e-3, 'commit': 'abc'}}
    torch.save(old, tmp_path / 'checkpoint.pth')
    own = models.own_args(models.read_checkpoint(tmp_path / 'checkpoint.pth'))
    assert own['model'] == 'vit_pico_patch8'
    model = specific_distill_cls.load_classifier(
        tmp_path / 'checkpoint.pth', own['model'], own['input_size'], NAMES)
    assert_holds(model, state)
    models.load_pretrained(models.create_vit('vit_pico_patch8', 7, (16, 64)), tmp_path / 'checkpoint.pth')
    args, _, parts = make_run(tmp_path)
    with pytest.raises(SystemExit, match='older version'):
        models.resume(args, NAMES, **parts)
    assert models.own_args({'model': state, 'args': Namespace(input_size=224)}) == {}  # a file of others
