"""tools/visualize.py: pictures against masks and work by hand; all tools on what the scripts write."""
import export_timm
import knn
import numpy as np
import predict
import pytest
import torch
import visualize
from PIL import Image

import generic_distill
import models
import specific_distill_cls

TEACHER, STUDENT = 'mae_vit_nano_patch8_dec64d2b', 'mae_vit_pico_patch8'


@pytest.fixture
def run_tool(capsys):
    """run_tool(tool, word, ...) -> what it prints."""
    def run(tool, *words):
        capsys.readouterr()
        tool.main(tool.get_args_parser().parse_args([str(word) for word in words]))
        return capsys.readouterr().out
    return run


def save(path, network, classes=None, **args):
    """A checkpoint as far as it is read: weights, class names, flags."""
    torch.save({'model': network.state_dict(), 'epoch': 0, 'args': args, 'classes': classes}, path)
    return path


def draw_image(path, seed=0, size=(70, 60)):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


# ---- visualize -----------------------------------------------------------------------------------


@pytest.fixture
def stage1(tmp_path):
    """(folder, student, images): a teacher's file, a function that saves a student of it, two images."""
    torch.manual_seed(0)
    teacher = models.create_mae(TEACHER, 32)
    path = save(tmp_path / 'teacher.pth', teacher, model=TEACHER, input_size=[32, 32], target='pixel',
                mask_ratio=0.5, norm_pix_loss=True)

    def student(target):
        target_dim = teacher.decoder_dim if target == 'feature' else teacher.pixel_dim
        return save(tmp_path / f'{target}.pth', models.create_mae(STUDENT, 32, target_dim), model=STUDENT,
                    input_size=[32, 32], target=target, mask_ratio=0.75, norm_pix_loss=False,
                    teacher_model=TEACHER, teacher_path=str(path), target_layer=1)

    return tmp_path, student, [draw_image(tmp_path / f'{k}.png', k) for k in range(2)]


def test_cosine_is_that_to_the_normalised_features_of_the_block(monkeypatch):
    """For every token, worked out by hand; 1 for a perfect student, whatever its scale."""
    teacher, student = models.create_mae(TEACHER, 32).eval(), models.create_mae(STUDENT, 32, 64).eval()
    images, masking = torch.randn(2, 3, 32, 32), models.random_masking(torch.rand(2, 16), 0.75)
    with torch.no_grad():
        target = teacher.decoder_features(images, masking, 1)
        variance = target.var(-1, unbiased=False, keepdim=True)
        target = (target - target.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt()
        pred = student.predict_features(images, masking)
        by_hand = (pred * target).sum(-1) / pred.norm(dim=-1) / target.norm(dim=-1)
        cosines = visualize.cosine_map(student, teacher, images, masking, 1)
        assert torch.allclose(cosines, by_hand, atol=1e-5) and by_hand.abs().max() < 0.9
        monkeypatch.setattr(student, 'predict_features', lambda images, masking: 3 * target)
        cosines = visualize.cosine_map(student, teacher, images, masking, 1)
        assert torch.allclose(cosines, torch.ones(2, 17), atol=1e-5)


def test_true_normalised_patches_restore_the_true_image():
    """Predictions under norm_pix_loss are shown with the true patches' mean and variance."""
    pixels, mask = torch.randn(2, 16, 192), models.random_masking(torch.rand(2, 16), 0.75).mask
    pred = (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + 1e-6).sqrt()
    assert generic_distill.pixel_loss(pred, pixels, mask, norm_pix_loss=True) == 0  # as in training
    assert torch.allclose(visualize.paste(pred, pixels, mask, norm_pix_loss=True), pixels, atol=1e-5)
    shown = visualize.paste(pred, pixels, mask, norm_pix_loss=False)
    assert torch.equal(shown[mask == 1], pred[mask == 1])
    assert torch.equal(shown[mask == 0], pixels[mask == 0])


def test_the_picture_hides_the_patches_of_the_mask(run_tool, stage1, monkeypatch):
    """The second column shows what the encoder saw; --seed and --mask_ratio choose it."""
    folder, student, files = stage1
    seen, cosine_map = [], visualize.cosine_map
    monkeypatch.setattr(visualize, 'save_panels', lambda *parts: seen.append(parts))
    cosines = torch.stack([torch.arange(17.), torch.arange(17., 34)]) / 33  # the class token's comes first
    monkeypatch.setattr(visualize, 'cosine_map', lambda *parts: 0 * cosine_map(*parts) + cosines)
    words = '--checkpoint', student('feature'), '--images', *files, '--out', folder / 'f.png'
    text = run_tool(visualize, *words, '--seed', 3, '--mask_ratio', 0.5)
    _, columns, names, lines, note = seen[0]
    assert names == ['0.png', '1.png'] and 'true patch mean' in note  # the teacher's pixel space
    generator = torch.Generator().manual_seed(3)
    hidden = models.random_masking(torch.rand(2, 16, generator=generator), 0.5).mask.bool()
    patches = [pictures.reshape(2, 4, 8, 4, 8, 3).swapaxes(2, 3).reshape(2, 16, -1)
               for _, pictures in columns[:3]]
    grey = np.tile([124, 116, 104], 64)  # ImageNet's mean
    assert np.array_equal((patches[1] == grey).all(2), hidden.numpy())
    for shown in patches[1:3]:  # masked, and the teacher's reconstruction
        assert np.array_equal((shown == patches[0]).all(2), ~hidden.numpy())
    cosines = cosines[:, 1:]
    assert np.array_equal(columns[3][1], cosines.reshape(2, 4, 4).numpy())
    assert f'mean cosine {cosines.mean():.4f}' in text
    assert lines == [f'hidden {row[gone].mean():.3f}, visible {row[~gone].mean():.3f}'
                     for row, gone in zip(cosines, hidden)]


@pytest.mark.parametrize('target, captions', [
    ('feature', ['input', 'masked 75%', 'teacher\'s reconstruction', 'student-teacher cosine']),
    ('pixel', ['input', 'masked 50%', 'reconstruction']),
    ('recon_gt', ['input', 'masked 75%', 'teacher\'s reconstruction', 'student\'s reconstruction'])])
def test_every_target_has_its_columns(run_tool, stage1, monkeypatch, target, captions):
    """Table 4's other targets and the teacher itself can be looked at; the picture shows all images."""
    folder, student, files = stage1
    checkpoint = folder / 'teacher.pth' if target == 'pixel' else student(target)
    seen, save_panels = [], visualize.save_panels
    monkeypatch.setattr(visualize, 'save_panels', lambda *parts: seen.append(parts) or save_panels(*parts))
    run_tool(visualize, '--checkpoint', checkpoint, '--images', *files, '--out', folder / 'new/r.png')
    assert [caption for caption, _ in seen[0][1]] == captions
    picture = Image.open(folder / 'new/r.png').convert('RGB')
    assert picture.width > 224 * len(captions) and picture.height > 2 * 224
    colours = {tuple(colour) for colour in np.array(picture).reshape(-1, 3)}
    for image in seen[0][1][0][1]:  # input
        assert {tuple(colour) for colour in image.reshape(-1, 3)} <= colours
    # viridis, of cosines below 0 and at 1
    assert ({(68, 1, 84), (253, 231, 37)} <= colours) == (target == 'feature')


@pytest.mark.parametrize('words, message', [
    (['--checkpoint', 'c.pth', '--out', 'new.png'], 'names no --target'),
    (['--checkpoint', 'feature.pth', '--teacher_path', 'gone.pth', '--out', 'new.png'], 'no checkpoint file'),
    (['--checkpoint', 'feature.pth', '--out', '0.png'], 'is one of the images')])
def test_mistakes_end_in_one_line_and_change_no_file(run_tool, stage1, monkeypatch, words, message):
    """A classifier, a teacher that moved, a photograph in the place of the picture."""
    folder, student, files = stage1
    student('feature')
    network = models.create_vit('vit_pico_patch8', 2, 16)
    save(folder / 'c.pth', network, model='vit_pico_patch8', input_size=[16, 16])
    before = {path: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as error:
        run_tool(visualize, *words, '--images', '0.png')
    assert message in error.value.code and '\n' not in error.value.code
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


# ---- the real thing ------------------------------------------------------------------------------


def test_tools_read_what_the_scripts_write(run_tool, tmp_path):
    """The stages' own checkpoints are all that the tools need."""
    for split in ('train', 'val'):
        for number, label in enumerate(('ant', 'bee')):
            folder = tmp_path / 'data' / split / label
            folder.mkdir(parents=True)
            for index in range(12):
                draw_image(folder / f'{index}.png', 2 * index + number, (32, 32))
    common = (f'--data_path {tmp_path}/data --input_size 16 --batch_size 12 --accum_iter 1 --num_workers 0 '
              '--epochs 1 --warmup_epochs 0 --device cpu').split()
    mae, generic, g2sd = (tmp_path / name for name in ('mae', 'generic', 'g2sd'))
    run_tool(generic_distill, '--target', 'pixel', '--model', TEACHER, *common, '--output_dir', mae)
    run_tool(generic_distill, '--teacher_path', mae / 'checkpoint.pth', '--model', STUDENT, *common,
             '--output_dir', generic)
    run_tool(specific_distill_cls, '--finetune', generic / 'checkpoint.pth', '--model', 'vit_pico_patch8',
             *common, '--output_dir', g2sd)
    image = tmp_path / 'data/val/ant/0.png'
    text = run_tool(visualize, '--checkpoint', generic / 'checkpoint.pth', '--images', image,
                    '--out', tmp_path / 'v.png')
    assert 'v.png: 1 images, mean cosine' in text
    text = run_tool(knn, '--checkpoint', generic / 'checkpoint.pth', mae / 'checkpoint.pth', '--data_path',
                    tmp_path / 'data', '--device', 'cpu')
    assert text.count('epoch 0: k-NN top-1') == 2
    text = run_tool(predict, '--checkpoint', g2sd / 'checkpoint.pth', '--images', image)
    assert sorted(line.split()[-1] for line in text.splitlines()[1:]) == ['ant', 'bee']
    text = run_tool(export_timm, '--checkpoint', g2sd / 'checkpoint.pth', '--out', tmp_path / 'timm.pth')
    assert 'global_pool=\'avg\'' in text
