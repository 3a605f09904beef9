"""tools/export_timm.py: what timm loads gives the numbers of the scripts' own networks."""
import argparse
import re
import shlex

import export_timm
import numpy as np
import pytest
import timm
import torch
from conftest import CLS, DET, GENERIC, NAMES, ROOT, SEG, checkpoint_of, contents, train
from PIL import Image

import models

FORMATS = ('pth', 'hf')


@pytest.fixture
def export(tmp_path, capsys):
    """export(checkpoint, format, word, ...) -> what the printed lines make: timm's network and weights."""
    def run(checkpoint, kind, *words):
        capsys.readouterr()
        out = tmp_path / f'exports/{kind}'
        words = ['--checkpoint', checkpoint, '--format', kind, '--out', out, *words]
        export_timm.main(export_timm.get_args_parser().parse_args([str(word) for word in words]))
        scope = {}
        exec(capsys.readouterr().out, scope)
        assert type(scope['model']).__module__.startswith('timm.') and out.exists()
        return scope['model'].eval()
    return run


def save(path, network, classes=None, **args):
    """A checkpoint as far as it is read: weights, class names, flags."""
    torch.save({'model': network.state_dict(), 'epoch': 0, 'args': args, 'classes': classes}, path)
    return path


def train_and_shake(script, data, out, *flags):
    """A checkpoint of a script in which no weight has a value that could hide its absence, such as 0."""
    limits = {GENERIC: '--epochs 1 --warmup_epochs 0'}
    train(script, data, out, limits.get(script, '--iterations 1 --warmup_iterations 0'), *flags)
    checkpoint = checkpoint_of(out)
    for tensor in checkpoint['model'].values():
        if tensor.is_floating_point():
            tensor.add_(0.1 * torch.rand_like(tensor))
    torch.save(checkpoint, out / 'shaken.pth')
    return out / 'shaken.pth', checkpoint


@pytest.mark.parametrize('name, distilled, pool, size, architecture', [
    ('vit_tiny_patch16', True, 'token', (32, 32), 'deit_tiny_distilled_patch16_224'),
    ('vit_tiny_patch16', False, 'avg', (32, 32), 'vit_tiny_patch16_224'),
    ('vit_pico_patch8', True, 'token', (32, 48), 'deit_base_distilled_patch16_224'),
    ('vit_pico_patch8', False, 'token', (16, 16), 'vit_base_patch16_224'),
    ('vit_pico_patch8', False, 'avg', (32, 48), 'vit_base_patch16_224')])
def test_classifiers_give_the_same_logits(export, tmp_path, name, distilled, pool, size, architecture):
    """With and without distillation token, by class token or mean, of named and other sizes, not square."""
    model = models.create_vit(name, 3, size, distilled=distilled, global_pool=pool).eval()
    torch.nn.init.normal_(model.head.weight)  # logits far enough apart for the comparison to mean something
    path = save(tmp_path / 'c.pth', model, ['a', 'b', 'c'], model=name, input_size=list(size))
    images = torch.randn(2, 3, *size)
    for kind in FORMATS:
        theirs = export(path, kind)
        assert theirs.pretrained_cfg['architecture'] == architecture
        with torch.no_grad():
            assert torch.equal(theirs(images), model(images))
    assert theirs.pretrained_cfg['label_names'] == ['a', 'b', 'c']


@pytest.mark.parametrize('target', ['pixel', 'feature'])
def test_stage_1_gives_the_features_of_its_encoder(export, data, tmp_path, target):
    """Of a teacher and of a student: `forward_features` is the encoder that sees all patches."""
    flags = '--target pixel'
    if target == 'feature':
        teacher, _ = train_and_shake(GENERIC, data, tmp_path / 'teacher', flags)
        flags = f'--teacher_path {teacher} --teacher_model mae_vit_pico_patch8 --target_layer 1'
    path, checkpoint = train_and_shake(GENERIC, data, tmp_path / 'run', flags)
    mae = models.create_mae('mae_vit_pico_patch8', 16, None if target == 'pixel' else 32)
    mae.load_state_dict(checkpoint['model'])
    images, ids = torch.randn(2, 3, 16, 16), torch.arange(4).expand(2, 4)
    with torch.no_grad():
        expected = mae.encode(images, models.Masking(ids, ids, torch.zeros(2, 4)))
        for kind in FORMATS:
            torch.testing.assert_close(export(path, kind).forward_features(images), expected)


@pytest.mark.parametrize('script, flags', [
    (DET, '--model vit_mini_patch8 --window_size 3'), (SEG, '--model vit_nano_patch8')], ids=['det', 'seg'])
def test_backbones_give_the_maps_that_the_heads_get(export, data, tmp_path, script, flags):
    """With windows, padded ones, relative positions, LayerScale: timm's samvit and beit have them all."""
    path, checkpoint = train_and_shake(script, data, tmp_path / NAMES[script], flags)
    args = argparse.Namespace(**{**checkpoint['args'], 'eval': True})
    images = torch.randn(2, 3, *args.input_size, dtype=torch.float64)
    if script is DET:
        backbone, indices = script.load_detector(path, checkpoint['classes'], args).backbone.net, [5]
        expected = [backbone.double()(images)]
    else:
        backbone = script.load_segmenter(path, checkpoint['classes'], args).backbone
        expected, indices = backbone.double()(images), backbone.out_indices
    for kind in FORMATS:
        theirs = export(path, kind).double()
        with torch.no_grad():
            maps = theirs.forward_intermediates(images, indices=indices, intermediates_only=True)
        # a table of positions that was rounded to float32 is all that differs
        torch.testing.assert_close(maps, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('size', [(32, 32), (64, 96), (256, 256)])
def test_timm_prepares_images_as_the_evaluation_does(export, tmp_path, size):
    """The exported mean, deviation, crop and interpolation give the same pixels."""
    path = save(tmp_path / 'c.pth', models.create_vit('vit_pico_patch8', 2, size), model='vit_pico_patch8',
                input_size=list(size))
    config = timm.data.resolve_data_config({}, model=export(path, 'hf'))
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((400, 300), Image.Resampling.BICUBIC)
    ours = CLS.build_transform(argparse.Namespace(input_size=size), is_train=False)(image)
    theirs = timm.data.create_transform(**config)(image)
    torch.testing.assert_close(theirs, models.normalise(torch.as_tensor(ours)))


def test_other_numbers_are_not_written(export, tmp_path, monkeypatch):
    """A network that timm builds in another way, here with another activation, is refused."""
    recipe = export_timm.timm_recipe
    monkeypatch.setattr(export_timm, 'timm_recipe', lambda network: (
        recipe(network)[0], {**recipe(network)[1], 'act_layer': 'relu'}))
    path = save(tmp_path / 'c.pth', models.create_vit('vit_pico_patch8', 2, 16), model='vit_pico_patch8',
                input_size=[16, 16])
    for kind in FORMATS:
        with pytest.raises(SystemExit, match='differs by .* nothing was written'):
            export(path, kind)
    assert not contents(tmp_path / 'exports')


def test_nothing_is_overwritten(export, tmp_path):
    """Neither a file nor a folder."""
    path = save(tmp_path / 'c.pth', models.create_vit('vit_pico_patch8', 2, 16))
    (tmp_path / 'exports/hf').mkdir(parents=True)
    (tmp_path / 'exports/pth').touch()
    before = contents(tmp_path)
    for kind in FORMATS:
        with pytest.raises(SystemExit, match='exists'):
            export(path, kind)
    assert contents(tmp_path) == before


def test_a_public_file_needs_the_name_of_its_network(export, tmp_path):
    """It has no flags and no class names."""
    model = models.create_vit('vit_pico_patch8', 2, 16).eval()
    torch.save(model.state_dict(), tmp_path / 'bare.pth')
    with pytest.raises(SystemExit, match='give --model'):
        export(tmp_path / 'bare.pth', 'hf')
    theirs = export(tmp_path / 'bare.pth', 'hf', '--model', 'vit_pico_patch8', '--input_size', 16)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(theirs(images), model(images)) and 'label_names' not in theirs.pretrained_cfg


def test_the_lines_of_the_readme_give_features_of_a_stage_1_checkpoint(tmp_path, monkeypatch, capsys):
    """Export, then timm's `forward_features`, as shown: with the weights, which timm loads if asked."""
    readme = (ROOT / 'README.md').read_text()
    words = re.search(r'^python tools/export_timm\.py (.*--format hf[^#\n]*)', readme, re.M)[1]
    code = re.search(r'^python -c "(.*forward_features.*)"', readme, re.M)[1]
    args = export_timm.get_args_parser().parse_args(shlex.split(words))
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath(args.checkpoint).parent.mkdir(parents=True)
    student = models.create_mae('mae_vit_small_patch16', 224, 512)
    torch.nn.init.normal_(student.patch_embed.proj.bias)  # otherwise the features of zeros say little
    save(args.checkpoint, student, model='mae_vit_small_patch16', input_size=[224, 224])
    export_timm.main(args)
    made, create = [], timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda *a, **b: made.append(create(*a, **b)) or made[0])
    capsys.readouterr()
    exec(code, {})
    assert 'torch.Size([1, 197, 384])' in capsys.readouterr().out
    images, ids = torch.randn(1, 3, 224, 224), torch.arange(196)[None]
    with torch.no_grad():
        expected = student.encode(images, models.Masking(ids, ids, torch.zeros(1, 196)))
        torch.testing.assert_close(made[0].forward_features(images), expected)
