"""tools/visualize.py --check: losses against plain float64 arithmetic, verdicts on briefly trained MAEs, the picture."""
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import visualize
from PIL import Image

import models

MODEL, SIZE, PATCHES = 'mae_vit_pico_patch8', 32, 16
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # ImageNet's
TABLE = ('normalised per patch', 'plain pixels')


def draw(path, rng):
    """32 x 32: one of two opposite textures in all 16 patches, on a colour of the image's own."""
    texture = np.random.default_rng(0).choice([-40, 40], (8, 8, 3)) * rng.choice([-1, 1])
    pixels = np.tile(texture, (4, 4, 1)) + rng.integers(50, 206, 3) + rng.integers(-9, 10, (SIZE, SIZE, 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def read_patches(path):
    """(16, 192) float64: the normalised pixels of each patch, row by row, colours last."""
    pixels = (np.array(Image.open(path), dtype=float) / 255 - MEAN) / STD
    return np.stack([pixels[y:y + 8, x:x + 8].reshape(-1) for y in range(0, SIZE, 8) for x in range(0, SIZE, 8)])


def train(paths, norm_pix_loss):
    """An MAE after 60 steps on some of the images: enough to see that all patches of an image are alike."""
    torch.manual_seed(1)
    model = models.create_mae(MODEL, SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pixels = torch.tensor(np.stack([read_patches(path) for path in paths[:24]]), dtype=torch.float32)
    for _ in range(60):
        masking = models.random_masking(torch.rand(len(pixels), PATCHES), 0.75)
        pred = model(model.unpatchify(pixels), masking)
        target = (pixels - pixels.mean(2, keepdim=True)) / pixels.std(2, keepdim=True) if norm_pix_loss else pixels
        loss = (pred - target)[masking.mask == 1].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    """40 images; norm.pth and plain.pth, trained; none.pth, not trained; bare.pth, as MAE's authors publish theirs."""
    folder = tmp_path_factory.mktemp('check')
    rng = np.random.default_rng(1)
    for index in range(40):
        draw(folder / f'{index:02}.png', rng)
    paths = sorted(folder.glob('*.png'))
    networks = {'norm': train(paths, True), 'plain': train(paths, False), 'none': models.create_mae(MODEL, SIZE)}
    for name, model in networks.items():
        save(folder / f'{name}.pth', model, norm_pix_loss=name != 'plain')
    torch.save({'model': torch.load(folder / 'norm.pth')['model']}, folder / 'bare.pth')
    return folder


def save(path, network, **args):
    """A checkpoint of generic_distill.py, as far as it is read; args: what its run was told beside the common."""
    args = {'model': MODEL, 'input_size': [SIZE, SIZE], 'target': 'pixel', 'mask_ratio': 0.75, **args}
    torch.save({'model': network.state_dict(), 'epoch': 0, 'args': args}, path)
    return path


def run(home, out, *words, images=40):
    paths = sorted(home.glob('*.png'))[:images]
    words = ['--check', '--images', *paths, '--out', out, *words]
    visualize.main(visualize.get_args_parser().parse_args([str(word) for word in words]))


def table_of(text):
    """Of the printed table, {space: [this decoder, untrained decoder, best constant, this / constant]}."""
    lines = [line for line in text.splitlines() if line.startswith(TABLE)]
    return {space: [float(word) for word in line.removeprefix(space).split()] for space, line in zip(TABLE, lines)}


def loss_by_loop(pred, pixels, mask, normalised):
    """Mean squared error over hidden patches, one patch after the other, in float64."""
    errors = []
    for image_pred, image, image_mask in zip(pred, pixels, mask):
        for guess, patch, hidden in zip(image_pred, image, image_mask):
            if normalised:
                patch = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
            if hidden:
                errors.append(((guess - patch) ** 2).mean())
    return np.mean(errors)


@pytest.mark.parametrize('name, seed, ratio, kept', [('norm', 0, None, 4), ('plain', 5, 0.5, 8)])
def test_losses_are_those_of_a_plain_loop(home, tmp_path, capsys, monkeypatch, name, seed, ratio, kept):
    """The table: squared errors at hidden patches, all images, both spaces; the best constant of a batch is its mean."""
    seen, measure = [], visualize.measure
    monkeypatch.setattr(visualize, 'measure', lambda networks, *rest: seen.append(networks) or measure(networks, *rest))
    words = ['--seed', seed] + ([] if ratio is None else ['--mask_ratio', ratio])
    run(home, tmp_path / 'c.png', '--checkpoint', home / f'{name}.pth', *words)
    text = capsys.readouterr().out
    assert f'hidden {1 - kept / 16:.0%}, 40 images' in text and len(seen) == 2
    pixels = np.stack([read_patches(path) for path in sorted(home.glob('*.png'))])
    noise = torch.rand(40, PATCHES, generator=torch.Generator().manual_seed(seed))
    mask = np.ones((40, PATCHES))
    for row, order in zip(mask, noise.numpy().argsort(1)):
        row[order[:kept]] = 0
    masking = models.random_masking(noise, 1 - kept / 16)
    images = seen[0][0].unpatchify(torch.tensor(pixels, dtype=torch.float32))
    with torch.no_grad():
        preds = [network(images, masking).double().numpy() for network in seen[0]]
    for space, normalised in zip(TABLE, (True, False)):
        losses = [loss_by_loop(pred, pixels, mask, normalised) for pred in preds]
        targets = pixels
        if normalised:
            targets = (pixels - pixels.mean(2, keepdims=True)) / np.sqrt(pixels.var(2, ddof=1, keepdims=True) + 1e-6)
        constant = [targets[part][mask[part] == 1].var(0).mean() for part in (slice(0, 32), slice(32, 40))]
        losses.append((32 * constant[0] + 8 * constant[1]) / 40)
        assert table_of(text)[space][:3] == pytest.approx(losses, abs=2e-4, rel=0)
        assert table_of(text)[space][3] == pytest.approx(losses[0] / losses[2], abs=6e-3, rel=0)


def test_the_untrained_decoder_stands_on_the_same_encoder(home):
    """What is compared: the encoder keeps its weights, everything behind it is drawn anew, from --seed."""
    words = ['--check', '--checkpoint', str(home / 'norm.pth'), '--images', 'x', '--out', 'x', '--seed']
    (model, fresh, _), (_, again, _), (_, other, _) = (
        visualize.load_mae(visualize.get_args_parser().parse_args([*words, seed])) for seed in '334')
    trained = torch.load(home / 'norm.pth')['model']
    fixed = r'(cls_token|pos_embed|patch_embed|blocks|norm|decoder_pos_embed)\b'
    for key, value in fresh.state_dict().items():
        assert torch.equal(model.state_dict()[key], trained[key])
        assert torch.equal(value, trained[key]) == bool(re.match(fixed, key)), key
        assert torch.equal(value, again.state_dict()[key])
    assert not torch.equal(fresh.mask_token, other.mask_token)
    assert not fresh.training and not model.training


@pytest.mark.parametrize('name, pixels, flag', [
    ('norm', 'normalised', '--norm_pix_loss, the default'), ('plain', 'plain', '--no-norm_pix_loss')])
def test_a_trained_decoder_passes_in_its_own_space(home, tmp_path, capsys, name, pixels, flag):
    """The verdict names the space in which the MAE was trained, and the flag that stage 1 then needs."""
    run(home, tmp_path / 'c.png', '--checkpoint', home / f'{name}.pth')
    text = capsys.readouterr().out
    verdict = next(line for line in text.splitlines() if line.startswith('verdict'))
    assert verdict.endswith(f'was trained on {pixels} pixels: stage 1 needs {flag}') and 'note' not in text
    own, other = table_of(text).values() if name == 'norm' else reversed(table_of(text).values())
    assert own[3] < 0.8 and own[3] < other[3] and own[0] < own[1]


@pytest.mark.parametrize('name, says', [('norm', '--no-norm_pix_loss'), ('plain', '--norm_pix_loss')])
def test_a_checkpoint_that_says_otherwise_is_named(home, tmp_path, capsys, name, says):
    """An argument that the verdict contradicts is a mistake somewhere: it is printed, with its file."""
    model = models.create_mae(MODEL, SIZE)
    model.load_state_dict(torch.load(home / f'{name}.pth')['model'])
    path = save(tmp_path / 'm.pth', model, norm_pix_loss=name == 'plain')
    run(home, tmp_path / 'c.png', '--checkpoint', path)
    assert f'note: the verdict differs from {path}, whose arguments say {says}\n' in capsys.readouterr().out


def test_an_untrained_decoder_fails_after_the_picture(home, tmp_path, monkeypatch, capsys):
    """An MAE that has learnt nothing ends the program with one line and an error; the picture shows why."""
    program = str(Path(visualize.__file__))
    monkeypatch.setattr(sys, 'argv', [program, '--check', '--checkpoint', str(home / 'none.pth'), '--out',
                                      str(tmp_path / 'c.png'), '--images', *map(str, sorted(home.glob('*.png')))])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(program, run_name='__main__')
    message, text = error.value.code, capsys.readouterr().out
    assert re.match(r'error: \S*none\.pth: the decoder predicts no better than', message) and '\n' not in message
    assert 'not a trained MAE for such images' in message and 'verdict' not in text
    assert all(values[3] >= 0.8 for values in table_of(text).values())
    assert Image.open(tmp_path / 'c.png').size == (12 + 4 * 236, 32 + 4 * 256 + 2 * 20 + 12)


def test_weights_that_are_not_finite_fail(home, tmp_path):
    """A broken file is not taken for a good one because nan compares with nothing."""
    model = models.create_mae(MODEL, SIZE)
    torch.nn.init.constant_(model.decoder_pred.bias, float('nan'))
    with pytest.raises(models.InputError, match='decoder_pred.bias has numbers that are not finite'):
        run(home, tmp_path / 'c.png', '--checkpoint', save(tmp_path / 'm.pth', model), images=3)


def to_hugging_face(state):
    """MAE's names -> those of Hugging Face's ViTMAE; query, key and value apart."""
    table = {r'^decoder_blocks\.': 'decoder.decoder_layers.', r'^(decoder_\w+|mask_token)': r'decoder.\1',
             r'^blocks\.': 'vit.encoder.layer.', r'^norm\.': 'vit.layernorm.', r'^cls_token': 'vit.embeddings.cls_token',
             r'^pos_embed': 'vit.embeddings.position_embeddings',
             r'^patch_embed\.proj': 'vit.embeddings.patch_embeddings.projection', r'\.norm1\.': '.layernorm_before.',
             r'\.norm2\.': '.layernorm_after.', r'\.mlp\.fc1': '.intermediate.dense', r'\.mlp\.fc2': '.output.dense',
             r'\.attn\.proj': '.attention.output.dense', r'\.attn\.qkv': '.attention.attention.qkv'}
    renamed = {}
    for key, value in state.items():
        for pattern, name in table.items():
            key = re.sub(pattern, name, key)
        parts = zip(('query', 'key', 'value'), value.chunk(3)) if '.qkv.' in key else [('', value)]
        renamed.update({key.replace('qkv', name): part.clone() for name, part in parts})
    return renamed


@pytest.mark.parametrize('layout', ['as MAE publishes it', 'bare', 'Hugging Face'])
def test_a_public_file_is_checked_under_the_name_that_is_given(home, tmp_path, capsys, layout):
    """README: a complete public MAE, which does not hold its name; masks hide 75 % unless told otherwise."""
    state = torch.load(home / 'bare.pth')['model']
    path = tmp_path / 'public.bin'
    files = {'as MAE publishes it': {'model': state}, 'bare': state, 'Hugging Face': to_hugging_face(state)}
    torch.save(files[layout], path)
    with pytest.raises(models.InputError, match='^[^\n]*does not name its network: give --model[^\n]*$'):
        run(home, tmp_path / 'c.png', '--checkpoint', path)
    assert not (tmp_path / 'c.png').exists()
    run(home, tmp_path / 'c.png', '--checkpoint', path, '--model', MODEL, '--input_size', SIZE)
    public = capsys.readouterr().out
    run(home, tmp_path / 'c.png', '--checkpoint', home / 'norm.pth')
    assert table_of(public) == table_of(capsys.readouterr().out) != {}
    assert f'{path} was trained on normalised pixels' in public


def test_the_input_size_is_224_or_as_stored_unless_given(home):
    """A public file is taken at ImageNet's size; position tables follow the size."""
    words = ['--check', '--images', 'x', '--out', 'x', '--checkpoint']
    for more, side in ((['bare.pth', '--model', MODEL], (224, 224)), (['norm.pth'], (32, 32)),
                       (['norm.pth', '--input_size', '48', '16'], (48, 16)), (['norm.pth', '--input_size', '16'], (16, 16))):
        args = visualize.get_args_parser().parse_args([*words, str(home / more[0]), *more[1:]])
        assert [network.patch_embed.img_size for network in visualize.load_mae(args)[:2]] == [side, side]


@pytest.mark.parametrize('wrapped', [True, False])
def test_a_lone_encoder_is_refused(home, tmp_path, wrapped):
    """The failure that users report: the message says what is missing and which file has it, and nothing is written."""
    encoder = {key: value for key, value in torch.load(home / 'bare.pth')['model'].items()
               if not key.startswith(('decoder', 'mask_token'))}
    args = {'model': 'vit_pico_patch8', 'input_size': [SIZE, SIZE]}  # of stage 2
    torch.save({'model': encoder, 'args': args} if wrapped else {'model': encoder}, tmp_path / 'encoder.pth')
    words = [] if wrapped else ['--model', MODEL, '--input_size', SIZE]
    with pytest.raises(models.InputError) as error:
        run(home, tmp_path / 'c.png', '--checkpoint', tmp_path / 'encoder.pth', *words)
    message = str(error.value)
    assert f'{tmp_path}/encoder.pth has no decoder (mask_token and ' in message and '\n' not in message
    assert 'mae_pretrain_vit_base_full.pth' in message and not (tmp_path / 'c.png').exists()


def test_of_a_student_the_teacher_is_checked(home, tmp_path, capsys):
    """A student has no pixels to show: its teacher has, at the student's size and masks; --teacher_path names another."""
    student = models.create_mae('mae_vit_nano_patch8', SIZE, 32)
    told = {'model': 'mae_vit_nano_patch8', 'target': 'feature', 'mask_ratio': 0.5, 'norm_pix_loss': True}
    path = save(tmp_path / 's.pth', student, **told, teacher_model=MODEL, teacher_path=str(home / 'bare.pth'))
    run(home, tmp_path / 'c.png', '--checkpoint', path)
    text = capsys.readouterr().out
    run(home, tmp_path / 'c.png', '--checkpoint', home / 'norm.pth', '--mask_ratio', 0.5)
    assert table_of(text) == table_of(capsys.readouterr().out) != {}
    assert 'hidden 50%' in text and f'verdict: {home}/bare.pth was trained on normalised' in text and 'note' not in text
    run(home, tmp_path / 'c.png', '--checkpoint', path, '--teacher_path', home / 'plain.pth')
    text = capsys.readouterr().out
    assert f'verdict: {home}/plain.pth was trained on plain' in text
    assert f'note: the verdict differs from {path}, whose arguments say --norm_pix_loss\n' in text
    with pytest.raises(models.InputError, match='the teacher is not at .*none: give --teacher_path'):
        run(home, tmp_path / 'c.png', '--checkpoint', path, '--teacher_path', tmp_path / 'none')


@pytest.mark.parametrize('name, count', [('norm', 6), ('plain', 2)])
def test_the_picture_has_four_columns_and_at_most_four_rows(home, tmp_path, monkeypatch, capsys, name, count):
    """Input, what is left of it, and both decoders' reconstructions in the MAE's own space; the losses stand beneath."""
    seen, compose = [], visualize.compose
    monkeypatch.setattr(visualize, 'compose', lambda *parts: seen.append(parts) or compose(*parts))
    run(home, tmp_path / 'c.png', '--checkpoint', home / f'{name}.pth', '--seed', 7, images=count)
    columns, _, names, _, _, notes = seen[0]
    rows = min(count, 4)
    assert [caption for caption, _ in columns] == ['input', 'masked 75%', 'reconstruction', 'by an untrained decoder']
    assert names == [f'{index:02}.png' for index in range(rows)]
    values = table_of(capsys.readouterr().out)[TABLE[name == 'plain']]
    assert all(f'{value:.4f}' in notes[0] for value in values[:3]) and notes[0].startswith(TABLE[name == 'plain'])
    assert ('true patch mean' in notes[1]) == (name == 'norm')
    noise = torch.rand(count, PATCHES, generator=torch.Generator().manual_seed(7)).numpy()
    sheet = np.array(Image.open(tmp_path / 'c.png').convert('RGB')).astype(float)
    errors = {2: [], 3: []}
    for index in range(rows):
        top = 32 + index * 256
        cells = [sheet[top + 3:top + 224:7, 12 + 236 * number + 3:12 + 236 * number + 224:7] for number in range(4)]
        true = np.array(Image.open(home / f'{index:02}.png'), dtype=float)
        assert np.abs(cells[0] - true).max() <= 1
        visible = np.zeros(PATCHES, dtype=bool)
        visible[noise[index].argsort()[:4]] = True
        for patch in range(PATCHES):
            place = slice(patch // 4 * 8, patch // 4 * 8 + 8), slice(patch % 4 * 8, patch % 4 * 8 + 8)
            for number in (1, 2, 3):
                assert (np.abs(cells[number][place] - true[place]).max() <= 1) == visible[patch]
            for number in (2, 3):
                errors[number].append(((cells[number][place] - true[place]) ** 2).mean())
    assert np.mean(errors[2]) < 0.6 * np.mean(errors[3])


def test_a_file_of_others_is_never_overwritten(home, tmp_path, monkeypatch):
    """A picture of ours may be drawn again; a photograph of that name stays."""
    words = '--checkpoint', home / 'norm.pth'
    draw(tmp_path / 'photo.png', np.random.default_rng(0))
    before = (tmp_path / 'photo.png').read_bytes()
    with pytest.raises(models.InputError, match='this tool did not draw it'):
        run(home, tmp_path / 'photo.png', *words, images=2)
    assert (tmp_path / 'photo.png').read_bytes() == before
    run(home, tmp_path / 'c.png', *words, images=2)
    first = (tmp_path / 'c.png').read_bytes()
    run(home, tmp_path / 'c.png', *words, '--seed', 1, images=2)
    assert (tmp_path / 'c.png').read_bytes() != first


@pytest.mark.parametrize('words', [['--model', MODEL], ['--input_size', '32']])
def test_the_flags_of_a_check_need_it(home, tmp_path, words):
    """A flag that would not be heeded is refused, not passed over."""
    words = ['--checkpoint', home / 'norm.pth', '--images', home / '00.png', '--out', tmp_path / 'c.png', *words]
    with pytest.raises(models.InputError, match='are for --check'):
        visualize.main(visualize.get_args_parser().parse_args([str(word) for word in words]))
    assert list(tmp_path.iterdir()) == []
