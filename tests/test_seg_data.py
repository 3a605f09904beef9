"""The segmentation script's data, evaluation and runs: what is read and refused, how image and label move, mIoU, resume.

Oracles are Pillow, numpy, exact fractions and plain loops over pixels, or values worked out by hand. Two processes are
started once, for all their tests.
"""
import hashlib
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy_data
from PIL import Image
from conftest import CLOCK, assert_same_bits, checkpoint_of, contents, environment, leaves, log_of, without_clock
from torch import nn

import models
import specific_distill_seg as seg

ROOT = Path(__file__).resolve().parents[1]
TINY = ('--model', 'vit_pico_patch8', '--teacher_model', 'vit_pico_patch8', '--input_size', '32', '--batch_size', '2',
        '--iterations', '4', '--eval_every', '2', '--warmup_iterations', '1', '--lr', '1e-3', '--num_workers', '0',
        '--device', 'cpu')
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # of ImageNet
SCORES = ['test_mIoU', 'test_mAcc', 'test_aAcc', 'test_IoU']


# ------------------------------------------------------------------------------------------------------------- helpers


def command(out, *flags):
    return [str(flag) for flag in ('--output_dir', out, *TINY, *flags)]


def parse(out, *flags):
    return seg.get_args_parser().parse_args(command(out, *flags))


def run(out, *flags):
    return seg.main(parse(out, *flags))


def run_as_script(monkeypatch, out, *flags):
    """The script's last lines, too: what it prints as an error and ends with."""
    monkeypatch.setattr(sys, 'argv', [seg.__file__, *command(out, *flags)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(seg.__file__, run_name='__main__')
    return stop.value.code


def ready(*flags, rank=0, world_size=1):
    """Arguments as `main` has them before `build_data`."""
    args = parse('none', *flags)
    args.rank, args.world_size, args.distributed, args.input_size = rank, world_size, False, args.input_size * 2
    return args


def dataset(pairs, *flags, is_train=True, num_classes=8):
    return seg.SegmentationDataset(pairs, num_classes, ready(*flags), is_train)


def steady(pairs, *flags):
    """Training data without the photometric distortion."""
    made = dataset(pairs, *flags)
    made.distort = lambda image: image
    return made


def write_pair(folder, split, name, image, label):
    """An image and a label of a split, each an array or a Pillow image; the two files."""
    files = []
    for kind, pixels in (('images', image), ('annotations', label)):
        path = folder / kind / split / f'{name}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path)
        files.append(path)
    return tuple(files)


def write_set(folder, **splits):
    """A set of small pairs with these labels in their upper left corners, `a`, `b`, ... in each split."""
    for split, labels in splits.items():
        for name, value in zip('abcdefgh', labels):
            label = np.zeros((20, 24), np.uint8)
            label[:5, :7] = value
            write_pair(folder, split, name, np.full((20, 24, 3), 90, np.uint8), label)
    return folder


def pixels_of(image):
    """Normalised (3, H, W) -> (H, W, 3) in 0..255, by numpy."""
    return 255 * (image.double().numpy().transpose(1, 2, 0) * STD + MEAN)


def refused(function, *given):
    """The one line with which a call is refused."""
    with pytest.raises(models.InputError) as error:
        function(*given)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def is_uniform(draws, low, high):
    """Kolmogorov-Smirnov: a true uniform is refused once in 1,000 times."""
    draws, count = np.sort((np.array(draws) - low) / (high - low)), len(draws)
    steps = np.arange(count + 1) / count
    return max((steps[1:] - draws).max(), (draws - steps[:-1]).max()) < 1.95 / math.sqrt(count)


# ------------------------------------------------------------------------------------------------------------ fixtures


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    """Drawn scenes: 12 to train, 5 (an odd number) to validate."""
    folder = tmp_path_factory.mktemp('toy')
    toy_data.main(toy_data.get_args_parser().parse_args(
        ['--out', str(folder), '--only', 'ade', '--scenes', '12', '--val_scenes', '5', '--scene_size', '64']))
    return folder / 'ade'


@pytest.fixture(scope='module')
def chain(toy, tmp_path_factory):
    """A run without a teacher, one that it teaches, and one of two steps an update; all keep the first round, too."""
    folder = tmp_path_factory.mktemp('chain')
    for kind in ('plain', 'taught', 'summed'):
        run(folder / kind, *kind_flags(kind, toy, folder))
    return folder


def kind_flags(kind, toy, chain):
    more = {'plain': (), 'taught': ('--teacher_path', chain / 'plain/checkpoint.pth'), 'summed': ('--accum_iter', 2)}
    return '--data_path', toy, '--save_every', 1, *more[kind]


# -------------------------------------------------------------------------------------------------------------- labels


def test_label_0_is_ignored_and_the_classes_count_from_1(tmp_path):
    """ADE20K's labels: 0 becomes 255, v becomes v - 1, 255 stays; --no-reduce_zero_label keeps all of them."""
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(8, 32)).save(tmp_path / 'a.png')
    reduced, kept = (seg.read_label(tmp_path / 'a.png', reduce) for reduce in (True, False))
    assert reduced.dtype == kept.dtype == torch.uint8 and reduced.shape == kept.shape == (8, 32)
    assert reduced.flatten().tolist() == [255, *range(254), 255]
    assert kept.flatten().tolist() == list(range(256))


@pytest.mark.parametrize('reduce', [True, False])
def test_the_indices_of_a_palette_are_the_labels(reduce, tmp_path):
    """Labels: coloured PNGs as VOC's count by their indices, whatever the colours."""
    values = np.random.default_rng(0).integers(0, 20, (30, 40)).astype(np.uint8)
    image = Image.fromarray(values)
    image.putpalette([(37 * k + 11) % 256 for k in range(768)])
    image.save(tmp_path / 'a.png')
    assert Image.open(tmp_path / 'a.png').mode == 'P'
    expected = np.where(values == 0, 255, values - 1) if reduce else values
    assert np.array_equal(seg.read_label(tmp_path / 'a.png', reduce).numpy(), expected)


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'LA', '1', 'I;16'])
def test_a_label_that_is_not_of_single_bytes_is_refused_by_name(mode, tmp_path):
    """Labels: colours, transparency, bits and 16-bit numbers are no classes."""
    image = Image.fromarray(np.ones((4, 5), np.uint16)) if mode == 'I;16' else Image.new(mode, (5, 4))
    image.save(tmp_path / 'label.png')
    assert re.search(rf'label\.png is no label.* {mode}\b', refused(seg.read_label, tmp_path / 'label.png', True))


def test_an_image_of_any_mode_becomes_rgb(tmp_path):
    """Images: grey, palette, transparent and CMYK files are read as red, green, blue."""
    colours = np.random.default_rng(0).integers(0, 256, (6, 7, 3)).astype(np.uint8)
    Image.fromarray(colours).save(tmp_path / 'rgb.png')
    assert np.array_equal(seg.read_image(tmp_path / 'rgb.png').numpy(), colours.transpose(2, 0, 1))
    Image.fromarray(colours[..., 0]).save(tmp_path / 'grey.png')
    assert np.array_equal(seg.read_image(tmp_path / 'grey.png').numpy(), np.stack([colours[..., 0]] * 3))
    Image.fromarray(np.dstack([colours, colours[..., :1]])).save(tmp_path / 'rgba.png')
    assert np.array_equal(seg.read_image(tmp_path / 'rgba.png').numpy(), colours.transpose(2, 0, 1))
    palette = Image.new('P', (7, 6), 3)
    palette.putpalette([0] * 9 + [200, 100, 50])
    palette.save(tmp_path / 'palette.png')
    assert seg.read_image(tmp_path / 'palette.png')[:, 2, 2].tolist() == [200, 100, 50]
    Image.new('CMYK', (7, 6), (0, 255, 255, 0)).save(tmp_path / 'cmyk.jpg')
    red, green, blue = seg.read_image(tmp_path / 'cmyk.jpg')[:, 2, 2].tolist()
    assert red > 200 and green < 60 and blue < 60


# ------------------------------------------------------------------------------------------------------------- classes


OBJECT_INFO = 'Idx\tRatio\tTrain\tVal\tName\n1\t0.16\t11664\t1172\twall\n2\t0.1\t6046\t612\tbuilding, edifice  \n' \
              '3\t0.09\t8265\t796\tdoor; double door\n'
STUFF = 'Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.16\t11664\t1172\t1\twall\n2\t0.1\t6046\t612\t0\t2 wheels\t\n'
CLASSES = {
    # where the names come from: (files, flags, labels of the training split, of the validation split, classes)
    '--nb_classes': ({}, ('--nb_classes', 3), [1], [1], ['class 1', 'class 2', 'class 3']),
    '--nb_classes from 0': ({}, ('--nb_classes', 3, '--no-reduce_zero_label'), [1], [1], ['class 0', 'class 1', 'class 2']),
    'objectInfo150.txt': ({'objectInfo150.txt': OBJECT_INFO}, (), [1], [1],
                          ['wall', 'building, edifice', 'door; double door']),
    'objectInfo150.txt with Stuff': ({'objectInfo150.txt': STUFF}, (), [1], [1], ['wall', '2 wheels']),
    'objectInfo150.txt of Windows': ({'objectInfo150.txt': STUFF.replace('\n', '\r\n')}, (), [1], [1],
                                     ['wall', '2 wheels']),
    'classes.txt': ({'classes.txt': '1 sky\n2 wet road\n\n'}, (), [1], [1], ['sky', 'wet road']),
    'classes.txt with 0': ({'classes.txt': '0 ignore\n1 sky\n2 road\n'}, (), [1], [1], ['sky', 'road']),
    'classes.txt from 0': ({'classes.txt': '0 sky\n1 road\n'}, ('--no-reduce_zero_label',), [1], [1], ['sky', 'road']),
    'classes.txt in disorder': ({'classes.txt': '# ours\n3\troad\n 1  sky\n'}, (), [1], [1], ['sky', 'class 2', 'road']),
    'both files': ({'classes.txt': '1 sky\n2 road\n', 'objectInfo150.txt': STUFF}, (), [1], [1], ['wall', '2 wheels']),
    'a file and fewer': ({'objectInfo150.txt': OBJECT_INFO}, ('--nb_classes', 2), [1], [1], ['wall', 'building, edifice']),
    'a file and more': ({'classes.txt': '1 sky\n2 road\n'}, ('--nb_classes', 3), [1], [1], ['sky', 'road', 'class 3']),
    'largest label in training': ({}, (), [1, 4, 2], [3], ['class 1', 'class 2', 'class 3', 'class 4']),
    'largest label in validation': ({}, (), [1, 2], [2, 3, 1], ['class 1', 'class 2', 'class 3']),
    'largest label from 0': ({}, ('--no-reduce_zero_label',), [1, 2], [1], ['class 0', 'class 1', 'class 2']),
    'largest label beside 255': ({}, (), [255, 2], [255], ['class 1', 'class 2']),
}


def classes_of(folder, *flags, **shares):
    args = ready('--data_path', folder, *flags, **shares)
    splits = [seg.list_pairs(folder, split) for split in (args.train_split, args.val_split)]
    return seg.read_classes(args, splits)


@pytest.mark.parametrize('case', CLASSES)
def test_the_classes_come_from_the_flag_the_files_or_the_labels(case, tmp_path):
    """--nb_classes: the flag wins, then objectInfo150.txt, classes.txt, then the largest label of both splits."""
    files, flags, training, validation, expected = CLASSES[case]
    write_set(tmp_path, training=training, validation=validation)
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode())
    assert classes_of(tmp_path, *flags) == expected


def test_a_file_of_classes_in_another_encoding_does_no_harm(tmp_path):
    """classes.txt: a byte that is no UTF-8 spoils its name alone."""
    write_set(tmp_path, training=[1], validation=[1])
    (tmp_path / 'classes.txt').write_bytes(b'1 caf\xe9\n2 road\n')
    assert classes_of(tmp_path)[1] == 'road' and len(classes_of(tmp_path)) == 2


@pytest.mark.parametrize('name', ['classes.txt', 'objectInfo150.txt'])
def test_a_file_of_classes_without_a_class_is_refused(name, tmp_path):
    """classes.txt: a file without values is a mistake, and not taken for none."""
    write_set(tmp_path, training=[1, 2], validation=[1])
    (tmp_path / name).write_text('wall\nroad\n')
    assert f'{name} has no line with a value and a name' in refused(classes_of, tmp_path)


@pytest.mark.parametrize(('files', 'labels', 'flags', 'said'), [
    ({}, [1, 1], (), 'has 1 classes'), ({}, [0, 0], (), 'has 0 classes'), ({}, [254], (), None),
    ({}, [254], ('--no-reduce_zero_label',), 'has 255 classes'),
    ({'classes.txt': '1 sky\n'}, [1], (), 'has 1 classes'), ({'classes.txt': '0 sky\n'}, [1], (), 'has 0 classes'),
    ({'classes.txt': '1 sky\n2 road\n3 sky\n'}, [1], (), 'has 3 classes with 2 different names'),
    ({'classes.txt': '0 sky\n254 road\n'}, [1], ('--no-reduce_zero_label',), 'has 255 classes')])
def test_a_number_of_classes_that_cannot_be_is_refused(files, labels, flags, said, tmp_path):
    """--nb_classes: from 2 to 254, and no name twice."""
    write_set(tmp_path, training=labels, validation=[0])
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    if said:
        assert said in refused(classes_of, tmp_path, *flags)
    else:
        assert len(classes_of(tmp_path, *flags)) == 254


# --------------------------------------------------------------------------------------------------------------- pairs


def test_pairs_are_sorted_by_name_and_images_have_three_endings(tmp_path):
    """Layout: .jpg, .jpeg and .png images, labels of the same name, other files left alone."""
    images, labels = (tmp_path / kind / 'training' for kind in ('images', 'annotations'))
    for name in ('c.jpg', 'a.jpeg', 'b.png', 'E.JPG', 'd.v2.jpg', 'readme.txt', 'Thumbs.db'):
        images.mkdir(parents=True, exist_ok=True)
        (images / name).touch()
    for name in ('a.png', 'b.png', 'd.v2.png', 'E.PNG', 'c.png', 'c.txt', 'a.jpg'):
        labels.mkdir(parents=True, exist_ok=True)
        (labels / name).touch()
    assert seg.list_pairs(tmp_path, 'training') == [
        (images / image, labels / label) for image, label in (
            ('E.JPG', 'E.PNG'), ('a.jpeg', 'a.png'), ('b.png', 'b.png'), ('c.jpg', 'c.png'), ('d.v2.jpg', 'd.v2.png'))]


@pytest.mark.parametrize(('images', 'labels', 'said'), [
    (['a.jpg', 'b.jpg'], ['a.png'], r'images/training/b\.jpg has no label in annotations/training/$'),
    (['a.jpg'], ['a.png', 'c.png'], r'annotations/training/c\.png has no image in images/training/$'),
    (['a.jpg', 'b.jpg', 'c.jpg', 'd.jpg'], ['b.png'], r'/a\.jpg has no label in .*, nor have 2 more files'),
    (['a.jpg'], [], r'/a\.jpg has no label'), ([], ['a.png'], r'/a\.png has no image'),
    (['a.jpg', 'a.png'], ['a.png'], 'images/training has two files of one name'),
    (['a.jpg'], ['a.png', 'a.PNG'], 'annotations/training has two files of one name'),
    ([], [], r'images/training holds no \.jpg'),
    (['a.txt'], ['a.txt'], r'images/training holds no \.jpg'),
    (None, ['a.png'], 'there is no folder .*images/training: '),
    (['a.jpg'], None, 'there is no folder .*annotations/training: ')])
def test_files_without_a_partner_and_absent_folders_are_named(images, labels, said, tmp_path):
    """Layout: a half pair, two images for one label, no folder or nothing in it: refused by name."""
    for kind, names in (('images', images), ('annotations', labels)):
        for name in names or ():
            (tmp_path / kind / 'training').mkdir(parents=True, exist_ok=True)
            (tmp_path / kind / 'training' / name).touch()
        if names == []:
            (tmp_path / kind / 'training').mkdir(parents=True)
    if labels == ['a.png', 'a.PNG'] and len(list((tmp_path / 'annotations/training').iterdir())) < 2:
        pytest.skip('a file system that takes the two names for one')
    assert re.search(said, refused(seg.list_pairs, tmp_path, 'training'))


# ------------------------------------------------------------------------------------------------------------- scaling


@pytest.mark.parametrize('ratio', [0.5, 0.75, 1.0, 1.3125, 2.0])
def test_images_are_scaled_to_the_recipes_size_rounded_half_up(ratio):
    """Recipe: s = min(2048 r / long side, 512 r / short side), in exact fractions."""
    rng = np.random.default_rng(0)
    sizes = [tuple(2 ** rng.uniform(0, 12, 2)) for _ in range(1500)]
    sizes += [(512, 683), (683, 512), (512, 2048), (512, 2049), (2048, 100), (1, 3000), (3000, 1), (1, 1), (7, 7)]
    wide = 0
    for size in sizes:
        height, width = (int(side) for side in size)
        scale = min(Fraction(2048) * Fraction(ratio) / max(height, width),
                    Fraction(512) * Fraction(ratio) / min(height, width))
        exact = [side * scale for side in (height, width)]
        if any(abs(side % 1 - Fraction(1, 2)) < Fraction(1, 10 ** 9) for side in exact):
            continue  # a half up to the rounding of floats: see below
        expected = [max(1, math.floor(side + Fraction(1, 2))) for side in exact]
        assert list(seg.scaled_size((height, width), 512 * ratio)) == expected
        wide += max(height, width) > 4 * min(height, width)
    assert wide > 300
    for size, expected in (((64, 65), [32, 33]), ((67, 64), [34, 32]), ((128, 64), [64, 32]), ((256, 63), [128, 32])):
        assert list(seg.scaled_size(size, 32)) == expected


def test_the_factor_of_training_images_is_uniform_over_the_ratio_range(tmp_path, monkeypatch):
    """Recipe: each training image is scaled by a factor from 0.5 to 2.0 of the input size."""
    pairs = [write_pair(tmp_path, 'training', 'a', np.zeros((32, 40, 3), np.uint8), np.ones((32, 40), np.uint8))]
    shorts, scale = [], seg.scaled_size
    monkeypatch.setattr(seg, 'scaled_size', lambda size, short: shorts.append((tuple(size), short)) or scale(size, short))
    for flags, low, high in (((), 0.5, 2.0), (('--ratio_range', 0.9, 1.2), 0.9, 1.2)):
        data = steady(pairs, *flags)
        shorts.clear()
        for number in range(400):
            data[number, 0]
        assert {size for size, _ in shorts} == {(32, 40)}
        factors = np.array([short / 32 for _, short in shorts])
        assert low <= factors.min() < low + 0.03 and high - 0.03 < factors.max() <= high
        assert is_uniform(factors, low, high)


# ----------------------------------------------------------------------------------------------------------- alignment


def coded(rng, height, width, block):
    """(image, label): blocks of labels 0 to 5, in the red channel times 45; green and blue grow downwards and rightwards."""
    small = rng.integers(0, 6, (-(-height // block), -(-width // block))).astype(np.uint8)
    label = small.repeat(block, 0).repeat(block, 1)[:height, :width]
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([45 * label, 5 + 240 * rows // height, 5 + 240 * columns // width], axis=2).astype(np.uint8)
    return image, label


def interior(label, reach):
    """Where all labels within `reach` pixels are equal and inside, by numpy."""
    height, width = label.shape
    same = np.zeros(label.shape, bool)
    same[reach:height - reach, reach:width - reach] = True
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            same &= np.roll(label, (dy, dx), (0, 1)) == label
    return same


@pytest.fixture(scope='module')
def moved(tmp_path_factory):
    """Many draws of three coded images, small, tall and wide: (real height, real width, pixels, label) of each."""
    folder, rng, samples = tmp_path_factory.mktemp('moved'), np.random.default_rng(3), []
    pairs = [write_pair(folder, 'training', f'{k}', *coded(rng, *size, block))
             for k, (size, block) in enumerate((((40, 50), 10), ((170, 90), 30), ((70, 150), 20)))]
    data = steady(pairs, '--input_size', 48)
    for number in range(120):
        for index in range(3):
            image, label = data[number, index]
            inside = (image != 0).any(0)
            real = int(inside.any(1).sum()), int(inside.any(0).sum())
            samples.append((*real, image, label.numpy()))
    return samples


def test_labels_stay_on_their_pixels_through_scaling_crop_flip_and_padding(moved):
    """Training data: an image that spells its own label still does so, everywhere but on the borders of blocks."""
    compared, turned = 0, set()
    for height, width, image, label in moved:
        assert image.shape == (3, 48, 48) and image.dtype == torch.float32
        assert label.shape == (48, 48) and label.dtype == np.uint8
        pixels = pixels_of(image)[:height, :width]
        red, green, blue = pixels.transpose(2, 0, 1)
        spelt, cut = np.round(red / 45).astype(int), label[:height, :width]
        there = interior(spelt, 2) & interior(cut, 1)
        expected = np.where(spelt == 0, 255, spelt - 1)
        assert np.array_equal(cut[there], expected[there])
        assert np.abs(red - 45 * spelt)[there].max(initial=0) < 8
        compared += there.sum()
        turned.add((green[-1].mean() > green[0].mean(), bool(blue[:, -1].mean() > blue[:, 0].mean())))
    assert compared > 100000 and turned == {(True, True), (True, False)}  # never upside down


@pytest.mark.parametrize(('height', 'width', 'ratios'), [(20, 23, (0.5, 0.85)), (72, 88, (0.9, 1.3))])
def test_labels_are_not_shifted_by_a_part_of_a_pixel(height, width, ratios, tmp_path):
    """Training data, whole and cropped: the label of a scaled pixel is that under its centre, not up to a half beside."""
    image, label = np.zeros((height, width, 3), np.uint8), np.ones((height, width), np.uint8)
    top, left = height // 2 - 4, width // 2 - 5  # of an object in the middle, 7 high and 8 wide
    image[top:top + 7, left:left + 8, 0], label[top:top + 7, left:left + 8] = 255, 2
    image[:, width // 2:, 2] = 255
    data = steady([write_pair(tmp_path, 'training', 'a', image, label)], '--input_size', 48, '--ratio_range', *ratios)
    shifts, sizes = [], set()
    for number in range(200):
        made, marks = data[number, 0]
        red, _, blue = pixels_of(made).transpose(2, 0, 1)
        real, mask = marks.numpy() != 255, marks.numpy() == 1
        seen = (red > 127.5) & real
        if min(mask.sum(), seen.sum()) < 25 or (mask | seen)[[0, -1]].any() or (mask | seen)[:, [0, -1]].any():
            continue  # cut by the border
        sizes.add(int(real.sum()))
        # the side on which the blue half is; a crop without its border would not hold the object
        left_is_blue = np.argwhere((blue > 127.5) & real)[:, 1].mean() < np.argwhere(real)[:, 1].mean()
        shift = np.argwhere(mask).mean(0) - np.argwhere(seen).mean(0)
        shifts.append(shift * (1, -1 if left_is_blue else 1))
    assert len(shifts) > 60 and (len(sizes) > 10) == (height < 48)
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.06  # downwards, and to the file's right


def test_training_labels_hold_the_files_classes_and_255_alone(moved, toy):
    """Training data: labels are never mixed; 0 of the file is 255."""
    assert {int(value) for *_, label in moved for value in np.unique(label)} == {0, 1, 2, 3, 4, 255}
    pairs = seg.list_pairs(toy, 'training')
    data = dataset(pairs)
    for index, (_, path) in enumerate(pairs):
        own = set((np.unique(np.asarray(Image.open(path))).astype(int) - 1) % 256) | {255}
        for number in range(3):
            assert set(np.unique(data[number, index][1].numpy()).tolist()) <= own


def test_what_is_too_small_is_padded_right_and_below_with_zeros_and_255(tmp_path):
    """Recipe: padding after normalisation, image 0 and label 255; the pixels are ImageNet-normalised, by numpy."""
    rng, found = np.random.default_rng(0), set()
    image, label = rng.integers(0, 256, (16, 24, 3)).astype(np.uint8), rng.integers(1, 9, (16, 24)).astype(np.uint8)
    tall = image.transpose(1, 0, 2).copy(), label.T.copy()
    pairs = [write_pair(tmp_path, 'training', 'a', image, label), write_pair(tmp_path, 'training', 'b', *tall)]
    data = steady(pairs, '--ratio_range', 0.5, 0.5)  # the short side becomes 16: nothing is resized
    for index, (pixels, classes) in enumerate(((image, label), tall)):
        expected = (pixels / 255 - MEAN) / STD
        for number in range(12):
            made, marks = data[number, index]
            height, width = classes.shape
            flipped = not np.array_equal(marks[:height, :width].numpy(), classes - 1)
            found.add((index, flipped))
            turn = slice(None, None, -1 if flipped else 1)
            assert np.array_equal(marks[:height, :width].numpy(), classes[:, turn] - 1)
            assert np.abs(made[:, :height, :width].numpy().transpose(1, 2, 0) - expected[:, turn]).max() < 1e-5
            assert (made[:, height:] == 0).all() and (made[:, :, width:] == 0).all()
            assert (marks[height:] == 255).all() and (marks[:, width:] == 255).all()
    assert len(found) == 4


def test_half_of_the_images_are_flipped(tmp_path):
    """Recipe: horizontal flip with probability 1/2, and none on crops alone."""
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, :16] = 200
    data = steady([write_pair(tmp_path, 'training', 'a', image, np.ones((32, 32), np.uint8))], '--ratio_range', 1, 1)
    left = np.array([float(data[number, 0][0][0, 5, 3]) > 0 for number in range(1000)])
    assert abs(left.mean() - 0.5) < 0.05


# --------------------------------------------------------------------------------------------------------------- crops


def strip(*parts):
    """A label 8 high of (value, columns) parts: crops of 8 pixels differ by their first column alone."""
    return torch.tensor(np.concatenate([np.full((8, columns), value, np.uint8) for value, columns in parts], axis=1))


def draw_many(label, size=8, limit=0.75, count=3000):
    """(count, 4) crops."""
    np.random.seed(1)
    drawn = np.array([[float(value) for value in seg.draw_crop(label, size, limit)] for _ in range(count)])
    assert (drawn == drawn.astype(int)).all()
    return drawn.astype(int)


def share(label, box):
    """Share of the largest class in a crop's labelled pixels, by numpy; None where there are none."""
    top, left, height, width = box
    part = label.numpy()[top:top + height, left:left + width]
    part = part[part != 255]
    return np.unique(part, return_counts=True)[1].max() / part.size if part.size else None


def test_crops_lie_anywhere_in_the_image_borders_included():
    """Recipe: random crop; every place is as likely, on both sides by themselves."""
    label = torch.tensor(np.random.default_rng(0).integers(0, 9, (50, 90)).astype(np.uint8))
    drawn = draw_many(label, 20)
    assert (drawn[:, 2:] == 20).all()
    jitter = np.random.default_rng(0).uniform(-0.5, 0.5, (len(drawn), 2))  # undoes the rounding
    for axis, span in ((0, 30), (1, 70)):
        assert drawn[:, axis].min() == 0 and drawn[:, axis].max() == span
        assert is_uniform(drawn[:, axis] + jitter[:, axis], -0.5, span + 0.5)
    assert abs(np.corrcoef(drawn[:, :2].T)[0, 1]) < 0.06


def test_a_side_that_fits_stays_whole():
    """Recipe: an image that is smaller than the crop on a side keeps that side."""
    labels = np.random.default_rng(0).integers(0, 9, (12, 40)).astype(np.uint8)
    for label, size, sides in ((labels, 16, (12, 16)), (labels.T.copy(), 16, (16, 12)), (labels, 40, (12, 40)),
                               (labels, 64, (12, 40)), (labels[:1, :1].copy(), 16, (1, 1))):
        drawn = draw_many(torch.tensor(label), size, count=100)
        assert (drawn[:, 2:] == sides).all()
        assert (drawn[:, :2] >= 0).all() and (drawn[:, :2].max(0) <= np.array(label.shape) - sides).all()
        assert all(span == 0 or len(set(starts)) > 5 for span, starts in zip(np.array(label.shape) - sides, drawn.T))


def test_a_crop_is_drawn_again_up_to_ten_times_while_a_class_fills_over_three_quarters():
    """Recipe: no class over 75 %, ten tries; a tenth of the places is good, so 0.9^10 of the crops are not."""
    label = strip((0, 50), (1, 5), (0, 52))  # of 100 places ten have 2 to 5 of the 8 columns of the other class
    good = [share(label, (0, left, 8, 8)) <= 0.75 for left in range(100)]
    assert good == [44 <= left <= 53 for left in range(100)]
    lefts = draw_many(label, count=4000)[:, 1]
    assert abs(np.mean((lefts < 44) | (lefts > 53)) - 0.9 ** 10) < 0.024  # nine tries give 0.39, eleven 0.31
    # exactly three quarters, at either end, is not over them
    counts = np.bincount(lefts, minlength=100)[44:54]
    assert counts.min() > 0.7 * counts.mean()


def test_the_limit_is_the_one_of_the_flag():
    """--cat_max_ratio: crops obey it wherever they can."""
    label = strip((0, 20), (1, 6), (2, 2), (3, 9), (4, 20))
    for limit in (0.5, 0.625, 0.9):
        places = [share(label, (0, left, 8, 8)) <= limit for left in range(50)]
        obeyed = np.mean([places[left] for left in draw_many(label, limit=limit, count=1000)[:, 1]])
        assert obeyed == pytest.approx(1 - (1 - np.mean(places)) ** 10, abs=0.05)


def test_where_no_crop_will_do_the_last_try_stays():
    """Recipe: an image of one class is cropped anyway, anywhere."""
    lefts = draw_many(strip((3, 107)))[:, 1]
    assert lefts.min() == 0 and lefts.max() == 99
    assert is_uniform(lefts + np.random.default_rng(0).uniform(-0.5, 0.5, len(lefts)), -0.5, 99.5)


def test_ignored_pixels_do_not_count_in_a_crop():
    """Recipe: 75 % of the labelled pixels; a crop without any is drawn again."""
    # rows of a class and as many of 255: half of the pixels, but all of the labelled ones
    label = strip((0, 57), (255, 50))
    label[::2, :57] = 255
    label[1::4, 20:27] = 1
    places = np.array([share(label, (0, left, 8, 8)) for left in range(100)], dtype=object)
    good = [value is not None and value <= 0.75 for value in places]
    assert sum(value is None for value in places) == 43 and sum(good) == 8
    lefts = draw_many(label, count=2000)[:, 1]
    assert np.mean([good[left] for left in lefts]) == pytest.approx(1 - (1 - np.mean(good)) ** 10, abs=0.04)
    # mostly ignored, but balanced in what is left: accepted at once
    sparse = strip((255, 107))
    sparse[0], sparse[1] = 0, 1
    assert len(set(draw_many(sparse, count=200)[:, 1])) > 60
    # a limit of 1 lets anything pass that is labelled
    half = strip((255, 53), (2, 54))
    labelled = np.mean([share(half, (0, left, 8, 8)) is not None for left in draw_many(half, limit=1, count=500)[:, 1]])
    assert labelled > 0.99


def test_training_samples_are_drawn_by_the_limit(tmp_path):
    """--cat_max_ratio, --input_size: the dataset hands on both; the crop is what comes out."""
    label = np.ones((32, 200), np.uint8)
    label[:, 90:110] = 2
    pairs = [write_pair(tmp_path, 'training', 'a', np.zeros((32, 200, 3), np.uint8), label)]
    obeyed = {}
    for limit in (0.7, 1.0):
        # the long side becomes 128 at most, so 20 high; of 97 places about 26 have enough of the other class
        data = steady(pairs, '--ratio_range', 1, 1, '--cat_max_ratio', limit)
        marks = [data[number, 0][1][:20] for number in range(150)]
        obeyed[limit] = np.mean([float((part == 0).float().mean()) <= 0.7 for part in marks])
    assert obeyed[0.7] > 0.85 and obeyed[1.0] < 0.5


# ---------------------------------------------------------------------------------------------- photometric distortion


def test_brightness_contrast_saturation_and_hue_are_each_changed_half_of_the_time():
    """Recipe: mmsegmentation's ranges, as factors; each with probability 1/2, independently; colours never permuted."""
    torch.manual_seed(0)
    distort = dataset([]).distort
    drawn = [distort.make_params([torch.zeros(3, 4, 4, dtype=torch.uint8)]) for _ in range(3000)]
    ranges = {'brightness_factor': (0.875, 1.125), 'contrast_factor': (0.5, 1.5), 'saturation_factor': (0.5, 1.5),
              'hue_factor': (-0.1, 0.1)}
    for name, (low, high) in ranges.items():
        values = [params[name] for params in drawn if params[name] is not None]
        assert abs(len(values) / len(drawn) - 0.5) < 0.03
        assert is_uniform([float(value) for value in values], low, high)
    present = np.array([[params[name] is not None for name in ranges] for params in drawn])
    assert np.abs(np.corrcoef(present.T)[np.triu_indices(4, 1)]).max() < 0.06
    assert abs(np.mean([params['contrast_before'] for params in drawn]) - 0.5) < 0.03
    assert all(params['channel_permutation'] is None for params in drawn)


def test_colours_keep_their_order_through_the_distortion():
    """Recipe: no permutation of the channels; without the change of hue, red stays the most and blue the least."""
    torch.manual_seed(0)
    distort = dataset([]).distort
    distort.hue = (0.0, 0.0)
    image = torch.tensor([180, 120, 60], dtype=torch.uint8)[:, None, None].expand(3, 8, 8).contiguous()
    kept, changed = image.clone(), 0
    for _ in range(200):
        made = distort(image)
        assert made.dtype == torch.uint8 and made.shape == image.shape
        red, green, blue = (int(value) for value in made[:, 3, 4])
        assert red > green > blue
        changed += not torch.equal(made, image)
    assert torch.equal(image, kept) and 140 < changed < 195  # 1 - 1/8 of them


def test_the_distortion_moves_neither_pixels_nor_labels(toy):
    """Training data: with the same draws, label and geometry are those without distortion; most images change."""
    pairs = seg.list_pairs(toy, 'training')
    changed = 0
    for index in range(len(pairs)):
        for number in range(3):
            (image, label), (still, same) = dataset(pairs)[number, index], steady(pairs)[number, index]
            assert torch.equal(label, same) and torch.equal((image == 0).all(0), (still == 0).all(0))
            changed += not torch.equal(image, still)
            brightness, other = (pixels_of(part).mean(2).ravel() for part in (image, still))
            if brightness.std() > 5 and other.std() > 5:
                assert np.corrcoef(brightness, other)[0, 1] > 0.7
    assert changed > 0.8 * 3 * len(pairs)


# ---------------------------------------------------------------------------------------------------------- randomness


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right))


def test_a_sample_depends_on_seed_pass_and_index_alone(toy, tmp_path):
    """Randomness: no state is carried from sample to sample; each pass, index and seed draws anew."""
    pairs = seg.list_pairs(toy, 'training')
    data = dataset(pairs)
    before = data[1, 2]
    torch.manual_seed(5)
    np.random.seed(5)
    others = [data[2, 2], data[0, 2], data[1, 3]]
    assert same(data[1, 2], before) and same(dataset(pairs)[1, 2], before)
    assert not same(others[0], before) and not same(others[1], before)
    assert not same(dataset(pairs, '--seed', 1)[1, 2], before)
    twins = dataset([pairs[2]] * 4)
    assert same(twins[1, 2], before) and not same(twins[1, 3], before)


def batches(toy, workers, *flags):
    args = ready('--data_path', toy, '--num_workers', workers, '--seed', 3, *flags)
    loader, val_loader, _ = seg.build_data(args)
    rounds = []
    for epoch in range(2):
        loader.sampler.epoch = epoch
        rounds.append(list(loader))
    return rounds, list(val_loader)


def test_the_number_of_data_loading_processes_changes_no_batch(toy):
    """Randomness: 0 and 2 workers give the same bits, round for round, in training and evaluation."""
    (rounds, val), (others, other_val) = (batches(toy, workers) for workers in (0, 2))
    assert [len(part) for part in rounds] == [len(part) for part in others] == [2, 2] and len(val) == 5
    for ours, theirs in zip([*rounds[0], *rounds[1], *val], [*others[0], *others[1], *other_val]):
        assert same(ours, theirs)
    assert [tuple(part.shape) for part in rounds[0][0]] == [(2, 3, 32, 32), (2, 32, 32)]
    assert not same(rounds[0][0], rounds[1][0])


def test_each_pass_over_the_data_takes_each_image_once(tmp_path):
    """Data: rounds of iterations run through pass after pass, in a new order each, over all processes together."""
    for split in ('training', 'validation'):
        for k in range(6):
            write_pair(tmp_path, split, str(k), np.zeros((32, 32, 3), np.uint8), np.full((32, 32), k + 1, np.uint8))
    flags = '--data_path', tmp_path, '--ratio_range', 1, 1, '--iterations', 6
    alone = []
    for epoch in range(3):
        loader = seg.build_data(ready(*flags))[0]
        loader.sampler.epoch = epoch
        alone += [label.flatten(1)[:, 0].tolist() for _, label in loader]
    passes = [sum(alone[k:k + 3], []) for k in (0, 3)]
    assert [sorted(part) for part in passes] == [list(range(6))] * 2 and passes[0] != passes[1]
    shares = []
    for rank in range(2):
        loader = seg.build_data(ready(*flags, '--batch_size', 1, rank=rank, world_size=2))[0]
        loader.sampler.epoch = 1
        shares.append([int(label[0, 0, 0]) for _, label in loader])
    assert sorted(sum(alone[2:4], [])) == sorted(shares[0] + shares[1]) and len(shares[0]) == 2


# ---------------------------------------------------------------------------------------------------------- evaluation


VAL_SIZES = {'a': (40, 90), 'b': (100, 41), 'c': (10, 12), 'd': (9, 120), 'e': (32, 32)}  # height, width


@pytest.fixture(scope='module')
def exam(tmp_path_factory):
    """Five validation pairs, wide, tall, small, very wide and of the input size; labels 0 to 5 and 255, class 6 nowhere."""
    folder, rng = tmp_path_factory.mktemp('exam'), np.random.default_rng(7)
    for name, (height, width) in VAL_SIZES.items():
        image, label = coded(rng, height, width, 8)
        image = np.asarray(Image.fromarray(rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC))
        label = np.where(label == 3, 255, label).astype(np.uint8)
        write_pair(folder, 'validation', name, image, label)
    return folder


def exam_args(folder, **shares):
    return ready('--data_path', folder, '--eval', '--resume', 'none.pth', '--nb_classes', 6, **shares)


def test_evaluation_scales_the_image_and_leaves_the_label_as_it_is(exam):
    """Evaluation: short side S, long side at most 4 S, the label in original pixels; Pillow and numpy agree."""
    _, loader, classes = seg.build_data(exam_args(exam))
    sizes = {'a': (32, 72), 'b': (78, 32), 'c': (32, 38), 'd': (10, 128), 'e': (32, 32)}
    assert len(classes) == 6 and len(loader) == 5
    for (image, label), (name, size) in zip(loader, sizes.items(), strict=True):
        expected = np.asarray(Image.open(exam / f'annotations/validation/{name}.png'))
        expected = np.where(expected == 255, 255, (expected.astype(int) - 1) % 256)
        assert np.array_equal(label[0].numpy(), expected) and label.dtype == torch.uint8
        assert image.shape == (1, 3, *size) and image.dtype == torch.float32
        picture = Image.open(exam / f'images/validation/{name}.png').resize(size[::-1], Image.Resampling.BILINEAR)
        assert np.abs(pixels_of(image[0]) - np.asarray(picture)).max() < 1.6  # both round to whole levels
        assert np.abs(pixels_of(image[0]) - np.asarray(picture)).mean() < 0.4


def plain_scores(labels, predictions, classes):
    """The scores as sets of pixels have them."""
    truth, found = {}, {}
    for k, (label, prediction) in enumerate(zip(labels, predictions)):
        for place in np.argwhere(label != 255).tolist():
            truth.setdefault(int(label[tuple(place)]), set()).add((k, *place))
            found.setdefault(int(prediction[tuple(place)]), set()).add((k, *place))
    iou, accuracy = {}, []
    for number, name in enumerate(classes):
        own, said = truth.get(number, set()), found.get(number, set())
        iou[name] = 100 * len(own & said) / len(own | said) if own else None
        accuracy += [100 * len(own & said) / len(own)] if own else []
    right = sum(len(own & found.get(number, set())) for number, own in truth.items())
    there = [value for value in iou.values() if value is not None]
    return {'test_mIoU': sum(there) / len(there), 'test_mAcc': sum(accuracy) / len(accuracy),
            'test_aAcc': 100 * right / sum(map(len, truth.values())), 'test_IoU': iou}


def assert_scores(found, expected, tolerance=1e-9):
    assert list(found)[:4] == SCORES
    for name in SCORES[:3]:
        assert type(found[name]) is float and found[name] == pytest.approx(expected[name], abs=tolerance)
    assert list(found['test_IoU']) == list(expected['test_IoU'])
    for name, value in expected['test_IoU'].items():
        assert found['test_IoU'][name] == (None if value is None else pytest.approx(value, abs=tolerance)), name


@pytest.mark.parametrize('seed', range(4))
def test_scores_are_those_of_sets_of_pixels(seed):
    """mIoU: classes that no label has, predicted or not, count in no mean; those never predicted count as 0."""
    rng, classes = np.random.default_rng(seed), ['ant', 'bee', 'cat', 'dog', 'elk', 'fox']
    label = rng.choice([0, 1, 2, 4, 255], (30, 40), p=[0.5, 0.2, 0.15, 0.1, 0.05])  # no dog, no fox
    prediction = np.where(rng.random((30, 40)) < 0.5, label, rng.choice([0, 1, 3, 4], (30, 40)))
    prediction = np.where((prediction == 255) | (prediction == 2), 3, prediction)  # dogs are seen, cats never
    valid = label != 255
    confusion = np.zeros((6, 6), np.int64)
    np.add.at(confusion, (label[valid], prediction[valid]), 1)
    scores = seg.segmentation_scores(torch.tensor(confusion), classes)
    assert_scores(scores, plain_scores([label], [prediction], classes))
    assert scores['test_IoU']['dog'] is None and scores['test_IoU']['fox'] is None and scores['test_IoU']['cat'] == 0
    assert json.loads(json.dumps(scores)) == scores


def test_scores_of_a_small_case_by_hand():
    """mIoU: IoU 2/4, 3/6 and 0/1 of three classes, the fourth in no label; accuracy 2/3, 3/4, 0."""
    confusion = torch.tensor([[2, 1, 0, 0], [1, 3, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    scores = seg.segmentation_scores(confusion, list('abcd'))
    assert scores['test_IoU'] == {'a': pytest.approx(50), 'b': pytest.approx(50), 'c': 0, 'd': None}
    assert scores['test_mIoU'] == pytest.approx(100 / 3)
    assert scores['test_mAcc'] == pytest.approx(100 * (2 / 3 + 3 / 4) / 3)
    assert scores['test_aAcc'] == pytest.approx(100 * 5 / 8)
    perfect = seg.segmentation_scores(torch.diag(torch.tensor([5, 0, 2])), list('abc'))
    assert [perfect[name] for name in SCORES[:3]] == [100, 100, 100]
    assert perfect['test_IoU'] == {'a': 100, 'b': None, 'c': 100}


class Reader(nn.Module):
    """In the network's place: reads the classes off a coded image's red channel, at a quarter of the size."""

    def __init__(self):
        super().__init__()
        self.shapes, self.modes = [], set()

    def forward(self, images):
        self.shapes.append(tuple(images.shape))
        self.modes.add((self.training, torch.is_grad_enabled()))
        red = 255 * (images[:, 0, 2::4, 2::4] * STD[0] + MEAN[0])
        return torch.stack([-(red - 45 * value).abs() for value in range(1, 6)], dim=1).float()


def test_a_network_that_reads_the_label_off_the_image_scores_100_percent(tmp_path):
    """Evaluation, the whole path: what is seen at each place is compared with the label of that place."""
    rng, reader = np.random.default_rng(0), Reader()
    for name, size in (('a', (32, 96)), ('b', (80, 32)), ('c', (32, 128)), ('d', (64, 128)), ('e', (16, 16))):
        write_pair(tmp_path, 'validation', name, *coded(rng, *size, 16))
    args = ready('--data_path', tmp_path, '--eval', '--resume', 'none.pth', '--nb_classes', 5)
    _, loader, classes = seg.build_data(args)
    stats = seg.evaluate(reader.train(), loader, classes, torch.device('cpu'), args)
    assert stats['test_images'] == 5 and set(stats) == {*SCORES, 'test_images'}
    assert stats['test_aAcc'] > 96 and stats['test_mIoU'] > 92 and reader.modes == {(False, False)}
    assert set(reader.shapes) == {(1, 3, 32, 32)}
    # windows 21 apart, the last one at the border: 5 + 4 + 6 + 3 + 1 of them
    assert len(reader.shapes) == 5 + 4 + 6 + 3 + 1


class Noise(nn.Module):
    """A network of two random convolutions that sees where in the window a pixel lies: 7 logits at a quarter of the size."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second = (torch.randn(shape, generator=generator) for shape in ((16, 3, 8, 8), (6, 16, 1, 1)))
        self.place = torch.randn(1, 16, 8, 8, generator=generator)

    def forward(self, images):
        x = nn.functional.conv2d(images, self.first, stride=4, padding=2) / 6 + self.place
        return nn.functional.conv2d(x.tanh(), self.second)


def plain_slide(network, image, size):
    """Means over windows, one pixel grid at a time, as mmsegmentation counts the windows."""
    _, height, width = image.shape
    padded = torch.zeros(3, max(height, size), max(width, size))
    padded[:, :height, :width] = image
    stride, total, count = size * 341 // 512, 0, 0
    for row in range(max(padded.shape[1] - size + stride - 1, 0) // stride + 1):
        for column in range(max(padded.shape[2] - size + stride - 1, 0) // stride + 1):
            bottom, right = min(row * stride + size, padded.shape[1]), min(column * stride + size, padded.shape[2])
            window = padded[None, :, bottom - size:bottom, right - size:right]
            logits = nn.functional.interpolate(network(window), size=(size, size), mode='bilinear', align_corners=False)
            room = (right - size, padded.shape[2] - right, bottom - size, padded.shape[1] - bottom)
            total = total + nn.functional.pad(logits[0].double(), room)
            count = count + nn.functional.pad(torch.ones(size, size), room)
    return (total / count)[:, :height, :width]


def plain_evaluation(network, folder, size):
    """labels and predictions in original pixels, from the files."""
    labels, predictions = [], []
    for name, (height, width) in VAL_SIZES.items():
        image, _ = dataset(seg.list_pairs(folder, 'validation'), is_train=False)[0, list(VAL_SIZES).index(name)]
        logits = plain_slide(network, image, size)[None]
        large = nn.functional.interpolate(logits, size=(height, width), mode='bilinear', align_corners=False)
        predictions.append(large[0].argmax(0).numpy())
        label = np.asarray(Image.open(folder / f'annotations/validation/{name}.png')).astype(int)
        labels.append(np.where((label == 0) | (label == 255), 255, label - 1))
    return labels, predictions


def test_evaluation_is_a_plain_loop_over_images_windows_and_pixels(exam):
    """mIoU: windows of S every 2/3 S, their means, resized to the original size, ignored pixels left out."""
    args = exam_args(exam)
    _, loader, classes = seg.build_data(args)
    stats = seg.evaluate(Noise(), loader, classes, torch.device('cpu'), args)
    expected = plain_scores(*plain_evaluation(Noise(), exam, 32), classes)
    assert_scores(stats, expected, tolerance=0.05)  # a pixel in 7,000 may be a tie
    assert stats['test_IoU']['class 3'] is None and stats['test_IoU']['class 6'] is None
    assert sum(value is not None and value > 0 for value in stats['test_IoU'].values()) >= 3


@pytest.mark.parametrize('world_size', [1, 2, 3, 7])
def test_the_shares_of_all_processes_are_the_whole_evaluation(world_size, exam, monkeypatch):
    """mIoU of one confusion matrix over all processes: every image belongs to exactly one; more processes than images."""
    summed, seen, compute = [], [], seg.segmentation_scores
    monkeypatch.setattr(seg, 'segmentation_scores', lambda matrix, names: summed.append(matrix) or compute(matrix, names))
    for rank in range(world_size):
        args = exam_args(exam, rank=rank, world_size=world_size)
        with monkeypatch.context() as patch:  # the others have labelled pixels
            patch.setattr(seg, 'sum_over_processes', lambda counts, _: counts + 1)
            _, loader, classes = seg.build_data(args)
        seen.append([tuple(label.shape[1:]) for _, label in loader])
        stats = seg.evaluate(Noise(), loader, classes, torch.device('cpu'), args)
        assert stats['test_images'] == 5
    assert sorted(sum(seen, [])) == sorted(VAL_SIZES.values())
    assert max(map(len, seen)) - min(map(len, seen)) <= 1
    args = exam_args(exam)
    alone = seg.evaluate(Noise(), seg.build_data(args)[1], classes, torch.device('cpu'), args)
    assert_scores(compute(sum(summed[:world_size]), classes), alone)
    assert int(sum(summed[:world_size]).sum()) == int(summed[-1].sum()) > 5000


# ---------------------------------------------------------------------------------------------------------------- runs


KINDS = pytest.mark.parametrize('kind', ['plain', 'taught', 'summed'])


@KINDS
def test_a_run_writes_its_log_its_arguments_and_its_checkpoints(kind, chain):
    """Names that tools rely on: one line per round with `iteration`, every loss term, mIoU in percent; args.json."""
    out = chain / kind
    assert sorted(path.name for path in out.iterdir()) == [
        'args.json', 'checkpoint-0.pth', 'checkpoint-1.pth', 'checkpoint.pth', 'log.txt', 'previous.pth']
    lines = log_of(out)
    assert [line['iteration'] for line in lines] == [2, 4]
    terms = ['seg', 'aux', 'cwd'] if kind == 'taught' else ['seg', 'aux']
    for line, share_of_lr in zip(lines, (3 / 4, 1 / 4)):
        assert set(line) == {'iteration', 'train_loss', *(f'train_loss_{term}' for term in terms), 'train_lr', *CLOCK,
                             *SCORES, 'test_images'}
        assert all(np.isfinite(value) for name, value in line.items() if name != 'test_IoU')
        assert all(0 <= line[name] <= 100 for name in SCORES[:3]) and line['test_images'] == 5
        assert list(line['test_IoU']) == list(toy_data.ADE_CLASSES)
        # 1 and 3 iterations of 4 are over at the last steps of the rounds, after a warm-up of one
        assert line['train_lr'] == pytest.approx(1e-3 * share_of_lr)
    assert 0 < lines[0]['train_seconds'] < lines[1]['train_seconds']
    written = json.loads((out / 'args.json').read_text())
    assert written == checkpoint_of(out)['args'] and written['iterations'] == 4


@KINDS
def test_the_logged_loss_is_the_sum_of_its_terms_at_their_weights(kind, chain):
    """Supplement: L = CE + 0.4 CE_aux + 3 CWD; what is in the log is what was summed."""
    for line in log_of(chain / kind):
        labels = line['train_loss_seg'] + 0.4 * line['train_loss_aux']
        distilled = 3 * line['train_loss_cwd'] if kind == 'taught' else 0
        assert line['train_loss'] == pytest.approx(labels + distilled, rel=1e-5)
        assert kind != 'taught' or line['train_loss_cwd'] > 1e-6


@KINDS
def test_a_checkpoint_holds_the_bare_network_and_plain_types(kind, chain):
    """Checkpoints: readable weights-only, strict for a new Segmenter, no teacher in it."""
    path = chain / kind / 'checkpoint.pth'
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []
    checkpoint = checkpoint_of(chain / kind)
    assert set(checkpoint) == {
        'model', 'optimizer', 'scaler', 'epoch', 'step', 'progress', 'args', 'classes', 'train_seconds'}
    assert {type(value) for _, value in leaves(checkpoint)} <= {torch.Tensor, str, int, float, bool, type(None)}
    assert checkpoint['classes'] == list(toy_data.ADE_CLASSES) and checkpoint['epoch'] == 1
    assert type(checkpoint['args']) is dict and checkpoint['args']['input_size'] == [32, 32]
    assert checkpoint_of(chain / kind, 'checkpoint-0.pth')['epoch'] == 0
    assert {name.split('.')[0] for name in checkpoint['model']} == {'backbone', 'neck', 'decode_head', 'auxiliary_head'}
    seg.Segmenter('vit_pico_patch8', 8, 32).load_state_dict(checkpoint['model'], strict=True)


@KINDS
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(kind, toy, chain, tmp_path, capsys):
    """Randomness: a resume is exact, with worker processes too, and the log has each round once."""
    shutil.copytree(chain / kind, tmp_path, dirs_exist_ok=True)
    (tmp_path / 'checkpoint.pth').write_bytes((tmp_path / 'checkpoint-0.pth').read_bytes())
    with open(tmp_path / 'log.txt', 'a') as file:
        file.write('{"iteration": 6, "train_l')
    run(tmp_path, *kind_flags(kind, toy, chain), '--resume', 'auto', '--num_workers', int(kind == 'plain'))
    assert re.search('^resumed .* after epoch 1', capsys.readouterr().out, re.M)
    whole, first = checkpoint_of(chain / kind), checkpoint_of(chain / kind, 'checkpoint-0.pth')
    assert not torch.equal(whole['model']['decode_head.conv_seg.weight'], first['model']['decode_head.conv_seg.weight'])
    assert_same_bits(checkpoint_of(tmp_path), whole)
    assert without_clock(log_of(tmp_path)) == without_clock(log_of(chain / kind))
    assert log_of(tmp_path)[1]['train_seconds'] > log_of(chain / kind)[0]['train_seconds']


def test_the_kinds_of_runs_and_other_seeds_end_with_other_weights(toy, chain, tmp_path):
    """Randomness: the comparisons of bits would see a difference; the teacher and summed steps have an effect."""
    run(tmp_path, '--data_path', toy, '--iterations', 2, '--seed', 1)
    ends = [checkpoint_of(chain / kind)['model'] for kind in ('plain', 'taught', 'summed')]
    ends.append(checkpoint_of(tmp_path)['model'])
    for name in ('backbone.pos_embed', 'decode_head.conv_seg.weight'):
        assert len({hashlib.sha256(state[name].numpy().tobytes()).hexdigest() for state in ends}) == 4


def test_the_script_itself_with_workers_ends_with_the_same_bits(toy, chain, tmp_path):
    """Randomness: another process, two workers, started as a user does; status 0, nothing on stderr."""
    process = subprocess.run(
        [sys.executable, seg.__file__, *command(tmp_path / 'out', *kind_flags('taught', toy, chain), '--num_workers', 2)],
        check=False, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert process.returncode == 0 and process.stderr == '', process.stderr[-4000:]
    assert process.stdout.splitlines()[-1].startswith('done: 4 iterations')
    assert_same_bits(checkpoint_of(tmp_path / 'out'), checkpoint_of(chain / 'taught'))
    assert without_clock(log_of(tmp_path / 'out')) == without_clock(log_of(chain / 'taught'))


def test_evaluation_alone_finds_what_the_last_round_logged(toy, chain, tmp_path, capsys):
    """--eval --resume: the numbers of the log's last line, from the validation split alone; writes nothing."""
    shutil.copytree(chain / 'taught', tmp_path / 'run')
    for kind in ('images', 'annotations'):  # without names of classes, training images and a teacher
        shutil.copytree(toy / kind / 'validation', tmp_path / 'data' / kind / 'held_out')
    flags = '--data_path', tmp_path / 'data', '--val_split', 'held_out', '--eval', '--resume'
    before = contents(tmp_path / 'run')
    stats = run(tmp_path / 'run', *flags, 'auto')
    last = log_of(chain / 'taught')[-1]
    assert stats == {name: last[name] for name in (*SCORES, 'test_images')}
    printed = capsys.readouterr().out
    assert f'test: mIoU {last["test_mIoU"]:.2f} mean accuracy {last["test_mAcc"]:.2f} pixel accuracy ' \
           f'{last["test_aAcc"]:.2f} of 5 images' in printed
    for name, value in last['test_IoU'].items():
        assert re.search(rf'^\s*IoU +{"absent" if value is None else f"{value:.2f}"}  {name} ?$', printed, re.M)
    assert contents(tmp_path / 'run') == before
    # from another folder, under bf16: evaluation is in float32 whatever --amp says
    again = run(tmp_path / 'none', *flags, chain / 'taught/checkpoint.pth', '--amp', 'bf16', '--batch_size', 1)
    assert again == stats and not (tmp_path / 'none').exists()
    assert run(tmp_path / 'none', *flags, chain / 'taught/checkpoint-0.pth') != stats


def test_bf16_trains_and_takes_another_way(toy, chain, tmp_path):
    """--amp bf16: finite losses near those of float32, evaluation and checkpoint in float32."""
    run(tmp_path, *kind_flags('taught', toy, chain), '--amp', 'bf16')
    for line, other in zip(log_of(tmp_path), log_of(chain / 'taught')):
        for name in ('train_loss', 'train_loss_seg', 'train_loss_aux', 'train_loss_cwd'):
            assert line[name] != other[name] and line[name] == pytest.approx(other[name], rel=0.1)
    state = checkpoint_of(tmp_path)['model']
    assert {value.dtype for value in state.values()} <= {torch.float32, torch.int64}


def test_the_last_round_may_be_shorter(toy, tmp_path):
    """--iterations: 3 in rounds of 2 are 2 and 1, and the log says so."""
    run(tmp_path, '--data_path', toy, '--iterations', 3)
    assert [line['iteration'] for line in log_of(tmp_path)] == [2, 3]


def test_the_backbone_starts_from_a_stage_1_checkpoint(toy, tmp_path, capsys):
    """--finetune: stage 1's student; at a learning rate of 0 its blocks are still there at the end."""
    torch.manual_seed(3)
    student = models.create_mae('mae_vit_pico_patch8', 32, target_dim=24)
    torch.save({'model': student.state_dict()}, tmp_path / 'stage1.pth')
    run(tmp_path / 'out', '--data_path', toy, '--finetune', tmp_path / 'stage1.pth', '--lr', 0, '--iterations', 2)
    assert 'start weights: ' in capsys.readouterr().out
    ours, theirs = checkpoint_of(tmp_path / 'out')['model'], student.state_dict()
    names = [name for name in theirs if name.startswith(('blocks.', 'patch_embed.')) and 'qkv.bias' not in name]
    assert len(names) > 20
    for name in names:
        assert torch.equal(ours[f'backbone.{name}'], theirs[name]), name


def test_rounds_go_on_in_the_stream_of_images(toy, tmp_path, monkeypatch):
    """Data: no image comes twice before all have come, over rounds, summed steps and a resume."""
    keys, read = [], seg.SegmentationDataset.__getitem__
    monkeypatch.setattr(seg.SegmentationDataset, '__getitem__',
                        lambda self, key: (self.is_train and keys.append(key)) or read(self, key))
    flags = '--data_path', toy, '--iterations', 4, '--eval_every', 1, '--accum_iter', 2, '--save_every', 1
    run(tmp_path / 'whole', *flags)
    whole = keys.copy()
    assert [number for number, _ in whole] == [0] * 12 + [1] * 4  # 12 images
    assert sorted(index for _, index in whole[:12]) == list(range(12))
    keys.clear()
    run(tmp_path / 'rest', *flags, '--resume', tmp_path / 'whole/checkpoint-1.pth')
    assert keys == whole[8:]


class Linear(nn.Module):
    """A network without batch norm or dropout: both heads' logits from one patch each."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.main, self.aux = (nn.Parameter(torch.randn(3, 3, 8, 8, generator=generator) / 8) for _ in range(2))

    def forward(self, images):
        logits, aux = (nn.functional.conv2d(images, weight, stride=8) for weight in (self.main, self.aux))
        return (logits, aux) if self.training else logits


def one_round(batches, *flags, lr=0.5):
    """(network, what the scheduler was told, stats) after a round of train_one_epoch with plain gradient descent."""
    args, told, network = ready(*flags), [], Linear(0)
    args.amp = 'off'
    optimizer = torch.optim.SGD(network.parameters(), lr=lr)
    stats = seg.train_one_epoch(
        network, Linear(1).eval(), batches, optimizer, SimpleNamespace(step=told.append),
        torch.amp.GradScaler('cpu', enabled=False), seg.Progress(args, 4, 'round'), torch.device('cpu'), 3, args)
    return network, told, stats


def random_images():
    """Eight images and labels of three classes, one of them partly ignored."""
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    labels = torch.randint(0, 3, (8, 32, 32), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    labels[1, :9] = 255
    return images, labels


def test_both_heads_learn_from_the_labels_of_their_pixels():
    """Supplement: cross-entropy of both heads' logits at the size of the labels, mean over all pixels; and the teacher's."""
    images, labels = random_images()
    _, _, stats = one_round([(images[k:k + 2], labels[k:k + 2]) for k in range(0, 8, 2)], lr=0)
    heads, taught = Linear(0)(images), Linear(1).eval()(images)
    for name, logits in zip(('seg', 'aux'), heads):
        large = nn.functional.interpolate(logits, scale_factor=8, mode='bilinear').log_softmax(1)
        right = large.gather(1, labels.long().clamp(max=2)[:, None])[:, 0]
        expected = -(right * (labels != 255)).sum() / labels.numel()
        assert stats[f'train_loss_{name}'] == pytest.approx(expected.item(), rel=1e-5)
    student, teacher = (logits.flatten(2).softmax(2) for logits in (heads[0], taught))
    assert stats['train_loss_cwd'] == pytest.approx((teacher * (teacher / student).log()).sum(2).mean().item(), rel=1e-5)


def test_an_update_of_summed_steps_is_that_of_their_images_together():
    """--accum_iter: the gradient is the mean over the steps; --clip_grad bounds the whole; the schedule counts updates."""
    (images, labels), start = random_images(), Linear(0)
    (large, told, stats), (small, also_told, other) = (
        one_round([(images[k:k + size], labels[k:k + size]) for k in range(0, 8, size)], '--accum_iter', 4 // size)
        for size in (4, 2))
    assert told == also_told == [6, 7]  # of round 3, counted from 0, of two iterations each
    assert other['train_loss'] == pytest.approx(stats['train_loss'], rel=1e-5)
    for name, value in large.named_parameters():
        assert torch.allclose(value, small.get_parameter(name), atol=1e-6)
        assert (value - start.get_parameter(name)).abs().max() > 0.01
    clipped, _, _ = one_round([(images[k:k + 2], labels[k:k + 2]) for k in (0, 2)], '--accum_iter', 2, '--clip_grad', 1e-3)
    step = torch.cat([(value - start.get_parameter(name)).flatten() for name, value in clipped.named_parameters()])
    assert step.norm().item() == pytest.approx(0.5 * 1e-3, rel=1e-2)


def test_a_short_run_learns(tmp_path):
    """The script trains: mIoU and pixel accuracy far above those of the most frequent class everywhere."""
    toy_data.main(toy_data.get_args_parser().parse_args(
        ['--out', str(tmp_path), '--only', 'ade', '--scenes', '16', '--val_scenes', '8', '--scene_size', '64']))
    run(tmp_path / 'out', '--data_path', tmp_path / 'ade', '--batch_size', 8, '--iterations', 40, '--eval_every', 40,
        '--warmup_iterations', 4, '--lr', 3e-3)
    labels = np.concatenate([np.asarray(Image.open(path)).ravel()
                             for path in (tmp_path / 'ade/annotations/validation').iterdir()])
    shares = np.bincount(labels[labels > 0])[1:] / (labels > 0).sum()
    (line,) = log_of(tmp_path / 'out')
    assert line['test_mIoU'] > 2 * 100 * shares.max() / (shares > 0).sum()
    assert line['test_aAcc'] > 100 * shares.max() + 12


def test_a_short_run_tells_what_is_where(tmp_path):
    """The script trains: coloured blocks are named at their places; a mirrored label would leave it at chance."""
    rng, colours = np.random.default_rng(0), np.array([[0] * 3, [220, 40, 40], [40, 200, 40], [40, 40, 220], [230] * 3])
    for split, count in (('training', 12), ('validation', 3)):
        for k in range(count):
            label = rng.integers(1, 5, (3, 4)).astype(np.uint8).repeat(20, 0).repeat(20, 1)
            write_pair(tmp_path, split, str(k), colours.astype(np.uint8)[label], label)
    run(tmp_path / 'out', '--data_path', tmp_path, '--batch_size', 8, '--iterations', 30, '--eval_every', 30,
        '--warmup_iterations', 3, '--lr', 3e-3)
    assert log_of(tmp_path / 'out')[0]['test_mIoU'] > 55


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.fixture(scope='module')
def inputs(toy, chain, tmp_path_factory):
    """What users mix up: a set of other classes, a classifier's checkpoint, a teacher of another size."""
    folder = tmp_path_factory.mktemp('inputs')
    (folder / 'renamed').mkdir()
    for kind in ('images', 'annotations'):
        (folder / 'renamed' / kind).symlink_to(toy / kind)
    (folder / 'renamed/classes.txt').write_text((toy / 'classes.txt').read_text().replace('star', 'moon'))
    write_set(folder / 'unlabelled', training=[1, 2], validation=[0, 255])
    net = models.create_vit('vit_pico_patch8', 8, 32)
    torch.save({'model': net.state_dict(), 'classes': list(toy_data.ADE_CLASSES)}, folder / 'cls.pth')
    torch.save({'model': net.state_dict()}, folder / 'nameless.pth')
    (folder / 'broken.pth').write_bytes((chain / 'plain/checkpoint.pth').read_bytes()[:-4000])
    run(folder / 'larger', '--data_path', toy, '--input_size', 48, '--iterations', 2)
    return SimpleNamespace(folder=folder, toy=toy, plain=chain / 'plain/checkpoint.pth',
                           first=chain / 'plain/checkpoint-0.pth', larger=folder / 'larger/checkpoint.pth')


ERRORS = {
    # what a user gets wrong: (flags, what the line must say)
    'teacher of other classes': (
        lambda i: ('--teacher_path', i.plain, '--data_path', i.folder / 'renamed'), "other classes.*'star' is 'moon'"),
    'teacher of fewer classes': (
        lambda i: ('--teacher_path', i.plain, '--nb_classes', 9), r'other classes \(8 there, 9 in'),
    'teacher that is a classifier': (
        lambda i: ('--teacher_path', i.folder / 'cls.pth'), r'cls\.pth holds no segmentation network'),
    'teacher of another input size': (
        lambda i: ('--teacher_path', i.larger), r'trained with --input_size \[?48\b.*, not with \[?32\b'),
    'teacher of another name': (
        lambda i: ('--teacher_path', i.plain, '--teacher_model', 'vit_nano_patch8'), 'not made by this architecture'),
    'teacher of another patch': (
        lambda i: ('--teacher_path', i.plain, '--teacher_model', 'vit_pico_patch16'), 'patch16 differ in patch size'),
    'teacher absent': (lambda i: ('--teacher_path', i.folder / 'absent.pth'), r'no checkpoint file at .*absent\.pth'),
    'teacher truncated': (lambda i: ('--teacher_path', i.folder / 'broken.pth'), r'broken\.pth is no whole checkpoint'),
    'crops that are not square': (lambda i: ('--input_size', 32, 48), '--input_size 32 48: crops are square'),
    'three sizes': (lambda i: ('--input_size', 32, 32, 32), '--input_size'),
    'size that patches do not divide': (lambda i: ('--input_size', 36), 'input size 36x36 is not divisible'),
    'size of one patch': (lambda i: ('--input_size', 8), '--input_size 8 .*at least 2x2 patches'),
    'size of nothing': (lambda i: ('--input_size', 0), '--input_size'),
    'batches of one image': (lambda i: ('--batch_size', 1), '--batch_size 1: .*at least 2'),
    'batches of one image, summed': (lambda i: ('--batch_size', 1, '--accum_iter', 2), '--batch_size 1: .*at least 2'),
    'no data path': (lambda i: ('--data_path', ''), '--data_path is missing'),
    'absent data path': (lambda i: ('--data_path', i.folder / 'absent'), r'there is no folder .*absent/images/validation'),
    'absent split': (lambda i: ('--train_split', 'train'), 'there is no folder .*images/train: '),
    'nothing to evaluate': (
        lambda i: ('--data_path', i.folder / 'unlabelled'), 'no pixel of annotations/validation has a class'),
    'too few classes': (
        lambda i: ('--nb_classes', 4), r'ADE_val_0+\d\.png has the label [5-8]; the 4 classes are 1 to 4'),
    'too few classes from 0': (
        lambda i: ('--nb_classes', 5, '--no-reduce_zero_label'), r'has the label [5-8]; the 5 classes are 0 to 4'),
    'one class': (lambda i: ('--nb_classes', 1), '--nb_classes must be at least 2, and at most 254'),
    'more classes than bytes': (lambda i: ('--nb_classes', 255), '--nb_classes must be at least 2, and at most 254'),
    'evaluation of nothing': (lambda i: ('--eval',), '--eval needs --resume'),
    'evaluation without data': (lambda i: ('--eval', '--resume', i.plain, '--data_path', ''), '--data_path is missing'),
    'evaluation of an absent file': (lambda i: ('--eval', '--resume', 'auto'), 'no checkpoint file'),
    'evaluation of a classifier': (
        lambda i: ('--eval', '--resume', i.folder / 'cls.pth'), 'holds no segmentation network'),
    'evaluation of a file without classes': (
        lambda i: ('--eval', '--resume', i.folder / 'nameless.pth', '--data_path', i.folder / 'unlabelled'),
        r'nameless\.pth names no classes'),
    'evaluation on other classes': (
        lambda i: ('--eval', '--resume', i.plain, '--data_path', i.folder / 'renamed'), "'star' is 'moon'"),
    'evaluation at another size': (
        lambda i: ('--eval', '--resume', i.larger), r'trained with --input_size \[?48\b.*, not with \[?32\b'),
    'resume of a classifier': (lambda i: ('--resume', i.folder / 'cls.pth'), 'cannot be resumed'),
    'resume on other classes': (lambda i: ('--resume', i.first, '--data_path', i.folder / 'renamed'), 'other classes'),
    'resume of other rounds': (lambda i: ('--resume', i.first, '--eval_every', 1), '--eval_every was 2'),
    'resume with more iterations': (lambda i: ('--resume', i.first, '--iterations', 6), '--iterations was 4'),
    'resume at another size': (lambda i: ('--resume', i.larger), 'not made by this architecture'),
    'warm-up of all iterations': (lambda i: ('--warmup_iterations', 4), '--warmup_iterations 4 must be .*below'),
    'negative warm-up': (lambda i: ('--warmup_iterations', -1), '--warmup_iterations must not be negative'),
    'no iterations': (lambda i: ('--iterations', 0), '--iterations must be at least 1'),
    'rounds of nothing': (lambda i: ('--eval_every', 0), '--eval_every must be at least 1'),
    'negative learning rate': (lambda i: ('--lr', -1), '--lr must not be negative'),
    'negative weight decay': (lambda i: ('--weight_decay', -1), '--weight_decay must not be negative'),
    'drop path of everything': (lambda i: ('--drop_path', 1), '--drop_path must be'),
    'temperature of nothing': (lambda i: ('--cwd_tau', 0), '--cwd_tau must be above 0'),
    'negative temperature': (lambda i: ('--cwd_tau', -1), '--cwd_tau must be above 0'),
    'temperature of no number': (lambda i: ('--cwd_tau', 'nan'), '--cwd_tau must be above 0'),
    'factors of nothing': (lambda i: ('--ratio_range', 0, 2), '--ratio_range'),
    'factors upside down': (lambda i: ('--ratio_range', 2, 1), '--ratio_range'),
    'factors without end': (lambda i: ('--ratio_range', 0.5, 'inf'), '--ratio_range'),
    'factors of no number': (lambda i: ('--ratio_range', 'nan', 2), '--ratio_range'),
    'no class may appear': (lambda i: ('--cat_max_ratio', 0), '--cat_max_ratio must be above 0'),
    'more than everything': (lambda i: ('--cat_max_ratio', 1.5), '--cat_max_ratio must be at most 1'),
    'share of no number': (lambda i: ('--cat_max_ratio', 'nan'), '--cat_max_ratio'),
    'unknown model': (lambda i: ('--model', 'resnet50'), "unknown model name 'resnet50'"),
    'autoencoder as backbone': (lambda i: ('--model', 'mae_vit_pico_patch8'), 'vit_'),
    'start weights of another width': (
        lambda i: ('--finetune', i.folder / 'cls.pth', '--model', 'vit_nano_patch8'), 'another architecture'),
}


@pytest.mark.parametrize('case', ERRORS)
def test_a_wrong_command_is_refused_in_one_line_and_writes_nothing(case, inputs, tmp_path, monkeypatch):
    """README: what cannot work is said in one line before any training, and nothing is written."""
    flags, message = ERRORS[case]
    code = run_as_script(monkeypatch, tmp_path / 'out', '--data_path', inputs.toy, *flags(inputs))
    # sys.exit with a text: Python prints it on stderr and ends with status 1
    assert isinstance(code, str) and code.startswith('error: ') and re.search(message, code), code
    assert len(code.splitlines()) == 1
    assert not (tmp_path / 'out').exists()


def test_a_folder_of_another_run_is_left_alone(toy, chain, tmp_path, monkeypatch):
    """--output_dir: another run's files are neither overwritten nor continued unless --resume says so."""
    shutil.copytree(chain / 'plain', tmp_path / 'out')
    before = contents(tmp_path / 'out')
    for flags in ((), ('--resume', chain / 'taught/checkpoint.pth')):
        code = run_as_script(monkeypatch, tmp_path / 'out', '--data_path', toy, *flags)
        assert re.search('^error: --output_dir .* holds another run', code)
        assert contents(tmp_path / 'out') == before


def test_a_run_whose_loss_is_not_finite_stops_with_a_reason_and_keeps_its_checkpoint(toy, chain, tmp_path, monkeypatch):
    """README: NaN stops the run; the checkpoint and the log of the rounds before stay."""
    shutil.copytree(chain / 'plain', tmp_path / 'out')
    (tmp_path / 'out/checkpoint.pth').write_bytes((chain / 'plain/checkpoint-0.pth').read_bytes())
    code = run_as_script(monkeypatch, tmp_path / 'out', '--data_path', toy, '--resume', 'auto', '--lr', 1e20)
    assert re.fullmatch(r'error: not finite at round 2 step 2: loss nan, .*lower the learning rate', code)
    assert (tmp_path / 'out/checkpoint.pth').read_bytes() == (chain / 'plain/checkpoint-0.pth').read_bytes()
    assert without_clock(log_of(tmp_path / 'out')) == without_clock(log_of(chain / 'plain'))[:1]


def bad_copy(toy, folder, split, damage):
    """A copy of the toy set with one bad pair, the second of a split; (set, the file that is to be named)."""
    shutil.copytree(toy, folder / 'data')
    image, label = (sorted((folder / 'data' / kind / split).iterdir())[1] for kind in ('images', 'annotations'))
    what, _, how = damage.partition(' ')
    path = {'image': image, 'label': label}[what]
    if how == 'value':
        values = np.array(Image.open(label))
        values[-1, -1] = 9  # the first that there is not
        Image.fromarray(values).save(label)
    elif how == 'turned':
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(path)
        path = image
    elif how == 'alone':
        path.rename(path.with_suffix('.txt'))
        path = {'image': label, 'label': image}[what]
    elif how == 'in colours':
        Image.open(label).convert('RGB').save(label)
    else:
        whole = path.read_bytes()
        path.write_bytes({'truncated': whole[:len(whole) // 2], 'empty': b'', 'text': b'<html>404</html>\n'}[how])
    return folder / 'data', path


DAMAGE = ['label value', 'label turned', 'label alone', 'label in colours', 'label truncated', 'label empty', 'label text',
          'image turned', 'image alone', 'image empty', 'image text', 'image truncated']
SAID = {'value': 'has the label 9; the 8 classes are 1 to 8', 'turned': r'is \d+ high and \d+ wide, its label \d+ and \d+',
        'alone': 'has no (label|image) in', 'in colours': 'is no label: its pixels are of mode RGB'}


@pytest.mark.parametrize('damage', DAMAGE)
@pytest.mark.parametrize('split', ['training', 'validation'])
def test_a_bad_file_is_named_in_one_line(split, damage, toy, tmp_path, monkeypatch):
    """Data: a wrong label value, sizes that differ, half pairs and damaged files; in validation before any training."""
    data, path = bad_copy(toy, tmp_path, split, damage)
    # a round takes all 12 training images
    code = run_as_script(monkeypatch, tmp_path / 'out', '--data_path', data, '--iterations', 8, '--eval_every', 8)
    assert isinstance(code, str) and len(code.splitlines()) == 1, code
    said = next((text for how, text in SAID.items() if damage.endswith(how)), 'mend the file, or remove it')
    assert code.startswith('error: ') and str(path) in code and re.search(said, code), code
    if damage.endswith('alone') or split == 'validation':
        assert not (tmp_path / 'out').exists()
    else:
        assert not (tmp_path / 'out/checkpoint.pth').exists() and not (tmp_path / 'out/log.txt').read_text()


def test_labels_are_counted_with_the_name_of_a_bad_one(toy, tmp_path, monkeypatch):
    """--nb_classes by counting: a damaged label is named, too, before any training."""
    data, path = bad_copy(toy, tmp_path, 'training', 'label truncated')
    (data / 'classes.txt').unlink()
    code = run_as_script(monkeypatch, tmp_path / 'out', '--data_path', data)
    assert code.startswith(f'error: cannot read {path} ') and not (tmp_path / 'out').exists()


def test_a_bad_label_in_a_worker_ends_the_script_in_one_line(toy, tmp_path):
    """Data: found by a data-loading process, it still is one line on stderr and a status that is not 0."""
    data, path = bad_copy(toy, tmp_path, 'training', 'label value')
    flags = '--data_path', data, '--num_workers', 1, '--iterations', 8, '--eval_every', 8
    process = subprocess.run([sys.executable, seg.__file__, *command(tmp_path / 'out', *flags)], check=False,
                             cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert process.returncode == 1
    assert len(process.stderr.splitlines()) == 1 and process.stderr.startswith(f'error: {path} has the label 9; ')
    assert not (tmp_path / 'out/checkpoint.pth').exists() and not (tmp_path / 'out/log.txt').read_text()


# ------------------------------------------------------------------------------------------------------- two processes

# one start of torchrun for all: classes by counting, then runs, in the same process group
LAUNCHER = """import json, pathlib, sys
import torch
import torch.distributed as dist
start, stop = dist.init_process_group, dist.destroy_process_group
dist.init_process_group = lambda **options: dist.is_initialized() or start(**options)
import specific_distill_seg as seg
import test_seg_data as tests
folder = pathlib.Path(sys.argv[1])
job = json.loads((folder / 'job.json').read_text())
seen, evaluate = [], seg.evaluate
def note(model, *rest):
    stats = evaluate(model, *rest)
    seen.append([tests.digest(model.state_dict()), stats])
    return stats
seg.evaluate = note
args = seg.get_args_parser().parse_args(job['counted'])
seg.start_run(args)
splits = [seg.list_pairs(args.data_path, split) for split in (args.train_split, args.val_split)]
classes = seg.read_classes(args, splits)
returned = [seg.main(seg.get_args_parser().parse_args(words)) for words in job['commands']]
(folder / f'rank {args.rank}').write_text(json.dumps([args.rank, classes, seen, returned]))
stop()
"""


def digest(state):
    """A hash for each entry of a state dict."""
    return {name: hashlib.sha256(value.cpu().numpy().tobytes()).hexdigest() for name, value in state.items()}


@pytest.fixture(scope='module')
def two_processes(toy, chain, tmp_path_factory):
    """What two processes did: counted classes, ran with a teacher and summed steps, resumed that, evaluated one's run."""
    folder = tmp_path_factory.mktemp('two')
    flags = (*kind_flags('taught', toy, chain), '--accum_iter', 2)
    commands = [command(folder / 'run', *flags),
                command(folder / 'resumed', *flags, '--resume', folder / 'run/checkpoint-0.pth'),
                command(folder / 'none', '--data_path', toy, '--eval', '--resume', chain / 'plain/checkpoint.pth')]
    job = {'commands': commands, 'counted': command('none', '--data_path', folder / 'counted')}
    write_set(folder / 'counted', training=[3, 4, 1], validation=[2, 3])  # the second process alone reads 4, both 3
    (folder / 'job.json').write_text(json.dumps(job))
    (folder / 'launcher.py').write_text(LAUNCHER)
    process = subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
         str(folder / 'launcher.py'), str(folder)],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**environment(), 'PYTHONPATH': os.pathsep.join(map(str, (ROOT, ROOT / 'tests', ROOT / 'tools')))})
    try:
        printed, errors = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers, too
        pytest.fail(f'two processes wait for each other: {process.communicate()[1][-4000:]}')
    assert process.returncode == 0, errors[-4000:]
    ranks = [json.loads((folder / f'rank {rank}').read_text()) for rank in (0, 1)]
    assert [rank for rank, *_ in ranks] == [0, 1]
    return SimpleNamespace(folder=folder, printed=printed, toy=toy, chain=chain, classes=[entry[1] for entry in ranks],
                           seen=[entry[2] for entry in ranks], returned=[entry[3] for entry in ranks])


def test_two_processes_count_the_classes_of_one(two_processes):
    """--nb_classes by counting: each process reads its share, and all know the largest label."""
    expected = [f'class {number}' for number in range(1, 5)]
    assert two_processes.classes == [expected, expected]
    assert classes_of(two_processes.folder / 'counted') == expected


def test_two_processes_evaluate_like_one(two_processes):
    """mIoU over all processes: the log's last line of a run of one, on both, and nothing written."""
    last = log_of(two_processes.chain / 'plain')[-1]
    expected = {name: last[name] for name in (*SCORES, 'test_images')}
    assert [returned[-1] for returned in two_processes.returned] == [expected, expected]
    assert not (two_processes.folder / 'none').exists()


def test_two_processes_hold_the_same_network_after_each_round(two_processes):
    """torchrun on CPUs: weights and batch norm's statistics are equal everywhere when a round is evaluated."""
    first, second = two_processes.seen
    assert len(first) == len(second) == 2 + 1 + 1  # two rounds, one that is resumed, and --eval
    for (state, stats), (other, others) in zip(first, second):
        assert len(state) > 100 and any('running_var' in name for name in state)
        assert [name for name in state if state[name] != other[name]] == []
        assert stats == others
    saved = checkpoint_of(two_processes.folder / 'run')
    assert digest(saved['model']) == first[1][0]


def test_two_processes_log_what_one_finds_in_their_checkpoint(two_processes, tmp_path):
    """torchrun: rank 0 alone writes and prints, and its checkpoint evaluates to its log's numbers."""
    folder = two_processes.folder
    lines = log_of(folder / 'run')
    assert [line['iteration'] for line in lines] == [2, 4] and lines[0]['test_images'] == 5
    checkpoint = checkpoint_of(folder / 'run')
    assert checkpoint['args']['world_size'] == 2 and checkpoint['args']['rank'] == 0
    assert not any(name.startswith('module.') for name in checkpoint['model'])
    assert two_processes.printed.count('done: 4 iterations') == 2
    assert len(re.findall(r'^test: mIoU', two_processes.printed, re.M)) == 2 + 1 + 1
    flags = '--data_path', two_processes.toy, '--eval', '--resume'
    for line, name in zip(lines, ('checkpoint-0.pth', 'checkpoint-1.pth')):
        alone = run(tmp_path / 'none', *flags, folder / 'run' / name)
        assert alone == {name: line[name] for name in (*SCORES, 'test_images')}


def test_a_resume_on_two_processes_is_exact(two_processes):
    """Randomness: a resume is exact on several processes, too, batch norm's statistics included."""
    whole, resumed = (two_processes.folder / name for name in ('run', 'resumed'))
    assert_same_bits(checkpoint_of(resumed), checkpoint_of(whole))
    assert without_clock(log_of(resumed)) == without_clock(log_of(whole))[1:]
