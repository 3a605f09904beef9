"""Damaged, odd and hostile image files, through the loaders of all four scripts.

Oracle: the numbers that were drawn before the file was written; PNG and PGM of 16 bits are written here, byte by byte.
"""
import io
import json
import re
import struct
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import checkpoint_of, log_of

import generic_distill
import models
import specific_distill_cls
import specific_distill_det
import specific_distill_seg

GENERIC, CLS, DET, SEG = generic_distill, specific_distill_cls, specific_distill_det, specific_distill_seg
RNG = np.random.default_rng(0)
H, W = 6, 9
COLOURS = RNG.integers(0, 256, (H, W, 3)).astype(np.uint8)
GREY = RNG.integers(0, 256, (H, W)).astype(np.uint8)
DEEP = np.linspace(0, 65535, H * W).round().astype(np.uint16).reshape(H, W)  # of 16 bits: all but a few are above 255
DEEP_COLOURS = RNG.integers(0, 65536, (H, W, 3)).astype(np.uint16)


# --------------------------------------------------------------------------------------------------------------- files


def png(width, height, depth, colour, rows):
    """A PNG by its specification: rows of big-endian samples, each behind filter 0."""
    def chunk(name, body):
        return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))

    header = struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')


def png_16(colour, samples):
    return png(W, H, 16, colour, b''.join(b'\0' + row.astype('>u2').tobytes() for row in samples))


def saved(image, kind='PNG', **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def animation(kind, **options):
    """Three frames, the first of them a palette image of three colours."""
    frames = [Image.fromarray(PALETTE[(INDICES + shift) % 3]) for shift in range(3)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def palette():
    image = Image.fromarray(INDICES)
    image.putpalette(PALETTE.ravel().tolist())
    return saved(image)


def jpeg_of(width, height):
    """A JPEG whose header claims this size; the pixels behind it are those of a small one."""
    content = saved(Image.fromarray(COLOURS), 'JPEG')
    start = content.index(b'\xff\xc0') + 5  # start of frame: length, precision, then height and width
    return content[:start] + struct.pack('>HH', height, width) + content[start + 4:]


def grey(levels):
    return np.repeat(levels[..., None], 3, axis=2)


INDICES = RNG.integers(0, 3, (H, W)).astype(np.uint8)
PALETTE = np.array([[255, 0, 0], [0, 255, 0], [7, 8, 9]], np.uint8)
ALPHA = RNG.integers(0, 256, (H, W)).astype(np.uint8)
INKS = np.dstack([COLOURS, np.zeros_like(GREY)])  # CMYK without black: red, green and blue are what is left of white
FLAT = np.full((H, W, 4), (200, 30, 90, 0), np.uint8)

# name -> (content, what it must become (H, W, 3), largest difference of a value)
SOUND = {
    'RGB': (saved(Image.fromarray(COLOURS)), COLOURS, 0),
    'BMP': (saved(Image.fromarray(COLOURS), 'BMP'), COLOURS, 0),
    'grey': (saved(Image.fromarray(GREY)), grey(GREY), 0),
    'bits': (saved(Image.fromarray(GREY > 99)), grey(255 * (GREY > 99)), 0),
    'grey and alpha': (saved(Image.fromarray(np.dstack([GREY, ALPHA]))), grey(GREY), 0),
    'RGB and alpha': (saved(Image.fromarray(np.dstack([COLOURS, ALPHA]))), COLOURS, 0),
    'palette': (palette(), PALETTE[INDICES], 0),
    'CMYK': (saved(Image.fromarray(INKS, 'CMYK'), 'TIFF'), 255 - COLOURS, 0),
    'CMYK JPEG': (saved(Image.fromarray(FLAT, 'CMYK'), 'JPEG', quality=95), 255 - FLAT[..., :3], 8),
    '16-bit grey': (png_16(0, DEEP), grey(DEEP / 257), 1),
    '16-bit grey and alpha': (png_16(4, np.dstack([DEEP, DEEP[::-1]])), grey(DEEP / 257), 1),
    '16-bit RGB': (png_16(2, DEEP_COLOURS), DEEP_COLOURS / 257, 1),
    '16-bit RGB and alpha': (png_16(6, np.dstack([DEEP_COLOURS, DEEP])), DEEP_COLOURS / 257, 1),
    '16-bit PGM': (b'P5 %d %d 65535\n' % (W, H) + DEEP.astype('>u2').tobytes(), grey(DEEP / 257), 1),
    '16-bit TIFF': (saved(Image.fromarray(DEEP), 'TIFF'), grey(DEEP / 257), 1),
    'GIF': (animation('GIF'), PALETTE[INDICES], 0),
    'animated WebP': (animation('WEBP', lossless=True), PALETTE[INDICES], 0),
    'animated PNG': (animation('PNG'), PALETTE[INDICES], 0),
    'one pixel': (saved(Image.fromarray(COLOURS[:1, :1])), COLOURS[:1, :1], 0),
    'one grey pixel of 16 bits': (png(1, 1, 16, 0, b'\0\x80\xff'), np.full((1, 1, 3), 0x80ff / 257), 1),
}
NOISE = Image.fromarray(RNG.integers(0, 256, (40, 40, 3)).astype(np.uint8))
# claims of 100 million pixels, where Pillow only warns, and of more
BOMBS = {
    'PNG of 10000 x 10000': png(10000, 10000, 8, 2, b'\0' * 100),
    'PNG of 10000 x 10000 bits': png(10000, 10000, 1, 0, b'\0' * 1251 * 10000),
    'PNG of 100000 x 100000': png(100000, 100000, 8, 2, b'\0' * 100),
    'PNG of 2 billion x 2 billion': png(2 ** 31 - 1, 2 ** 31 - 1, 16, 6, b''),
    'JPEG of 65500 x 65500': jpeg_of(65500, 65500),
    'GIF of 65535 x 65535': b'GIF89a' + struct.pack('<HH', 65535, 65535) + saved(NOISE, 'GIF')[10:],
}
BAD = {
    'empty': b'', 'text': b'<html>404</html>', 'zeros': bytes(2000), 'PNG signature': b'\x89PNG\r\n\x1a\n',
    'truncated PNG': saved(NOISE)[:2000], 'truncated JPEG': saved(NOISE, 'JPEG')[:900],
    'truncated GIF': saved(NOISE, 'GIF')[:400], 'truncated WebP': saved(NOISE, 'WEBP')[:200],
    'truncated TIFF': saved(NOISE, 'TIFF')[:3000],
    'PNG with a wrong checksum': saved(NOISE)[:60] + b'\xff' + saved(NOISE)[61:],
    '32-bit integers': saved(Image.fromarray(DEEP.astype(np.int32)), 'TIFF'),
    'floats': saved(Image.fromarray(np.linspace(0, 1, H * W, dtype=np.float32).reshape(H, W)), 'TIFF'),
    'strip': saved(Image.fromarray(np.zeros((1, 5000, 3), np.uint8))),
    'upright strip': saved(Image.fromarray(np.zeros((5000, 1), np.uint8))),
    **BOMBS,
}


# ------------------------------------------------------------------------------------------------------------- loaders


def arguments(script, folder, *flags):
    args = script.get_args_parser().parse_args([
        '--data_path', str(folder), '--output_dir', str(folder / 'out'), '--input_size', '16', '--batch_size', '1',
        '--num_workers', '0', '--device', 'cpu', *map(str, flags)])
    args.input_size, args.rank, args.world_size, args.distributed = args.input_size * 2, 0, 1, False
    return args


def size_of(content):
    """(height, width) as the header says it; of what has none, any."""
    try:
        with Image.open(io.BytesIO(content)) as file:
            return file.height, file.width
    except Exception:
        return H, W


def labelled_folder(folder, content):
    """One class: the file, then a red picture, which may take its place."""
    for split in ('train', 'val'):
        (folder / split / 'a').mkdir(parents=True)
        (folder / split / 'a/0.png').write_bytes(content)
        Image.new('RGB', (W, H), 'red').save(folder / split / 'a/1.png')
    return folder / 'train/a/0.png'


def stage_1(folder, content):
    """(file, function that reads its pixels (H, W, 3), data set of prepared samples)."""
    path = labelled_folder(folder, content)
    data = GENERIC.build_data(arguments(GENERIC, folder, '--accum_iter', 1), 4).dataset
    return path, lambda: np.asarray(data.dataset[0][0]), data


def classification(folder, content):
    labelled_folder(folder, content)
    args = arguments(CLS, folder)
    data = CLS.build_data(args)[1].dataset
    return folder / 'val/a/0.png', lambda: np.asarray(CLS.open_dataset(args, 'train')[0][0]), data


def detection(folder, content):
    (folder / 'annotations').mkdir(parents=True)
    (folder / 'train2017').mkdir()
    path = folder / 'train2017/0.png'
    path.write_bytes(content)
    height, width = size_of(content)
    thing = {'id': 1, 'image_id': 1, 'category_id': 1, 'iscrowd': 0, 'bbox': [0, 0, width, height],
             'segmentation': [[0, 0, width, 0, width, height, 0, height]]}
    (folder / 'annotations/instances.json').write_text(json.dumps({
        'images': [{'id': 1, 'file_name': '0.png', 'height': min(height, 99999), 'width': min(width, 99999)}],
        'annotations': [] if height > 99999 else [thing], 'categories': [{'id': 1, 'name': 'a'}]}))
    coco = DET.read_coco(folder / 'annotations/instances.json', folder / 'train2017')
    data = DET.CocoDataset(coco, folder / 'train2017', arguments(DET, folder), not coco[1][1] == [])
    return path, lambda: data.read(0)[2].permute(1, 2, 0).numpy(), data


def segmentation(folder, content):
    for kind in ('images', 'annotations'):
        (folder / kind / 'training').mkdir(parents=True)
    path = folder / 'images/training/0.png'
    path.write_bytes(content)
    height, width = size_of(content) if content not in BAD.values() else (H, W)
    Image.fromarray(np.ones((height, width), np.uint8)).save(folder / 'annotations/training/0.png')
    args = arguments(SEG, folder)
    data = SEG.SegmentationDataset(SEG.list_pairs(folder, 'training'), 2, args, True)
    return path, lambda: data.read(0)[0].permute(1, 2, 0).numpy(), data


LOADERS = {'stage 1': stage_1, 'classification': classification, 'detection': detection, 'segmentation': segmentation}
EVERY = pytest.mark.parametrize('loader', LOADERS.values(), ids=LOADERS)
SKIPPING = pytest.mark.parametrize('loader', [stage_1, classification])
STOPPING = pytest.mark.parametrize('loader', [detection, segmentation])


# ------------------------------------------------------------------------------------------------------- sound files


@EVERY
@pytest.mark.parametrize('kind', SOUND)
def test_every_kind_of_image_becomes_the_colours_that_were_drawn(kind, loader, tmp_path):
    """README, bad data: any mode and depth becomes RGB, 16 bits by scaling and not by clipping; of an animation frame 1."""
    content, expected, tolerance = SOUND[kind]
    _, read, _ = loader(tmp_path / 'data', content)
    assert read().shape == expected.shape
    assert np.abs(read().astype(float) - expected).max() <= tolerance


def test_the_16_bit_files_would_be_white_if_they_were_clipped():
    """The check of the test above: nearly all of its 16-bit greys are above 255, as in a real file."""
    for kind in ('16-bit grey', '16-bit PGM', '16-bit TIFF'):
        with Image.open(io.BytesIO(SOUND[kind][0])) as file:
            assert (np.asarray(file).astype(int) > 255).mean() > 0.95


@EVERY
@pytest.mark.parametrize('kind', ['one pixel', 'GIF', '16-bit grey'])
def test_odd_images_are_prepared_like_any_other(kind, loader, tmp_path):
    """README, bad data: what is decoded also passes through augmentation, whatever its size, and is finite."""
    _, _, data = loader(tmp_path / 'data', SOUND[kind][0])
    for epoch in range(5):
        sample = data[epoch, 0]
        image = sample[0][0][0] if loader is stage_1 else sample[0]  # the only view
        assert image.shape[0] == 3 and image.float().isfinite().all()
        assert loader in (detection, segmentation) or sample[2] == ''


# --------------------------------------------------------------------------------------------------------- bad files


@SKIPPING
@pytest.mark.parametrize('kind', BAD)
def test_a_bad_file_is_named_in_one_line_and_the_next_takes_its_place(kind, loader, tmp_path):
    """README, bad data: classification and stage 1 name it in one line, and go on with the next sample."""
    path, _, data = loader(tmp_path / 'data', BAD[kind])
    sample, _, named = data[0, 0]
    assert len(named.splitlines()) == 1 and Path(named.split(' (')[0]) == path
    models.seed_everything(0, 0, 0, models.SAMPLE)
    instead = data.transform(Image.new('RGB', (W, H), 'red'))
    for ours, theirs in zip(sample, instead) if loader is stage_1 else ((sample, instead),):
        assert torch.equal(ours, theirs)
    progress = GENERIC.Progress(types.SimpleNamespace(skip_bad_images=False), 1)
    with pytest.raises(models.InputError, match='^cannot read .*--skip_bad_images$'):
        progress.check_files([named])


@STOPPING
@pytest.mark.parametrize('kind', BAD)
def test_a_bad_file_stops_the_dense_stages_in_one_line(kind, loader, tmp_path):
    """README, bad data: detection and segmentation stop and name it."""
    path, _, data = loader(tmp_path / 'data', BAD[kind])
    with pytest.raises(models.InputError, match=re.escape(str(path))) as error:
        data[0, 0]
    assert len(str(error.value).splitlines()) == 1


def peak():
    """Largest resident memory since it was set back, MB."""
    return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1]) / 1024


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='the peak of memory is read from /proc')
@EVERY
@pytest.mark.parametrize('kind', BOMBS)
def test_a_file_that_claims_a_huge_image_takes_no_memory(kind, loader, tmp_path):
    """README, bad data: a header's claim is refused before anything is allocated."""
    assert len(BOMBS[kind]) < 20_000
    _, _, data = loader(tmp_path / 'data', BOMBS[kind])
    Path('/proc/self/clear_refs').write_text('5')
    before = peak()
    if loader in (detection, segmentation):
        with pytest.raises(models.InputError):
            data[0, 0]
    else:
        assert data[0, 0][2]
    assert peak() - before < 50
    if kind == 'PNG of 10000 x 10000 bits':  # the measure sees what a careless reader does
        monstrous = Image.open(io.BytesIO(png(8000, 8000, 1, 0, b'\0' * 1001 * 8000)))
        monstrous.convert('RGB')
        assert peak() - before > 150


@pytest.mark.parametrize('script', [GENERIC, CLS])
@pytest.mark.parametrize('skip', [False, True])
def test_a_file_that_vanishes_during_the_run_is_a_bad_file(script, skip, tmp_path, monkeypatch, capsys):
    """README, bad data: files are opened when they are needed; one that has gone is named, or skipped and counted."""
    for split in ('train', 'val'):
        (tmp_path / split / 'a').mkdir(parents=True)
        for index in range(8):
            Image.new('RGB', (16, 16), (30 * index, 0, 0)).save(tmp_path / split / f'a/{index}.png')
    write_log = script.write_log

    def write_and_remove(args, stats):
        write_log(args, stats)
        (tmp_path / 'train/a/3.png').unlink(missing_ok=True)

    monkeypatch.setattr(script, 'write_log', write_and_remove)
    name = 'mae_vit_pico_patch8' if script is GENERIC else 'vit_pico_patch8'
    args = script.get_args_parser().parse_args([
        '--data_path', str(tmp_path), '--output_dir', str(tmp_path / 'out'), '--input_size', '16', '--batch_size', '4',
        '--accum_iter', '1', '--epochs', '3', '--warmup_epochs', '0', '--num_workers', '0', '--device', 'cpu',
        '--model', name, *(('--target', 'pixel') if script is GENERIC else ()), *(('--skip_bad_images',) if skip else ())])
    if skip:
        script.main(args)
        assert [line['train_skipped_images'] for line in log_of(tmp_path / 'out')] == [0, 1, 1]
        assert capsys.readouterr().out.count('skipped: ') == 1
    else:
        with pytest.raises(models.InputError, match=r'^cannot read .*3\.png .*--skip_bad_images$'):
            script.main(args)
        assert checkpoint_of(tmp_path / 'out')['epoch'] == 0  # what was reached is kept


@STOPPING
def test_a_file_that_vanishes_stops_the_dense_stages(loader, tmp_path):
    """README, bad data: the same in detection and segmentation, which stop."""
    path, _, data = loader(tmp_path / 'data', SOUND['RGB'][0])
    data[0, 0]
    path.unlink()
    with pytest.raises(models.InputError, match=f'^cannot read {re.escape(str(path))} '):
        data[0, 0]
