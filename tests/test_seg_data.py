"""Segmentation data: labels, classes, pairs, scaling, distortion, crops, padding, and what is refused.

Oracles are Pillow, numpy, colorsys, exact fractions and values worked out by hand.
"""
import colorsys
import itertools
import math
import re
import struct
import zlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import SEG as seg
from PIL import Image

import models

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # of ImageNet


def run_args(*flags, rank=0, world_size=1):
    """Flags as main() leaves them, of one process on a CPU, for 32 pixels."""
    words = '--input_size 32 --batch_size 2 --num_workers 0 --device cpu'.split()
    args = seg.get_args_parser().parse_args([*words, *(str(flag) for flag in flags)])
    args.rank, args.world_size, args.distributed = rank, world_size, False
    return args


@pytest.fixture
def negatives(monkeypatch):
    """In place of random colours, distortion gives the negative."""
    monkeypatch.setattr(seg, 'distort_colours', lambda image: 255 - image)


def training_data(pairs, *flags, num_classes=8):
    """As the loader reads it, by (pass, index)."""
    dataset = seg.SegmentationDataset(pairs, num_classes, run_args(*flags), is_train=True)
    return models.SeededDataset(dataset, seed=0)


def write_pair(folder, image, label, name='a', split='training'):
    """Writes two arrays as an image and its label; returns the two files."""
    files = []
    for kind, pixels in (('images', image), ('annotations', label)):
        path = folder / kind / split / f'{name}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        files.append(path)
    return tuple(files)


def write_set(folder, **splits):
    """Small pairs a, b, ... in each split, with these labels in their upper left corners."""
    for split, labels in splits.items():
        for name, value in zip('abcdefgh', labels):
            label = np.zeros((20, 24), np.uint8)
            label[:5, :7] = value
            write_pair(folder, np.full((20, 24, 3), 90, np.uint8), label, name, split)
    return folder


def random_bytes(*shape, low=0, high=256):
    return np.random.default_rng(0).integers(low, high, shape).astype(np.uint8)


def pixels_of(image):
    """Normalised (3, H, W) -> (H, W, 3) in 0 to 255."""
    return 255 * (image.double().numpy().transpose(1, 2, 0) * STD + MEAN)


# ---- labels --------------------------------------------------------------------------------------


def test_label_0_is_ignored_and_classes_count_from_1(tmp_path):
    """ADE20K: 0 becomes 255, v becomes v - 1, 255 stays; --no-reduce_zero_label keeps all of them."""
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(8, 32)).save(tmp_path / 'a.png')
    reduced, kept = (seg.read_label(tmp_path / 'a.png', reduce) for reduce in (True, False))
    assert reduced.dtype == kept.dtype == torch.uint8 and reduced.shape == kept.shape == (8, 32)
    assert reduced.flatten().tolist() == [255, *range(254), 255]
    assert kept.flatten().tolist() == list(range(256))


@pytest.mark.parametrize('bits', [1, 2, 4, 8])
def test_the_indices_of_a_palette_and_the_values_of_a_grey_file_are_the_labels(bits, tmp_path):
    """Whatever the colours, as in VOC's files, and whatever the depth: viewers stretch 1, 2 and 4 bits."""
    values = random_bytes(30, 43, high=2 ** bits)
    image = Image.fromarray(values)
    image.putpalette([(37 * k + 11) % 256 for k in range(3 * 2 ** bits)])
    image.save(tmp_path / 'palette.png', bits=bits)
    content = bytearray((tmp_path / 'palette.png').read_bytes())
    assert list(content[24:26]) == [bits, 3]
    content[25] = 0  # the kind of colour, from a palette's to grey; Pillow writes no such file
    content[29:33] = struct.pack('>I', zlib.crc32(content[12:29]))
    (tmp_path / 'grey.png').write_bytes(content)
    for name in ('palette.png', 'grey.png'):
        assert np.array_equal(seg.read_label(tmp_path / name, False).numpy(), values)


@pytest.mark.parametrize('mode', ['RGB', 'LA', 'I;16', 'L'])
def test_a_label_that_is_no_png_of_single_bytes_is_refused_by_name(mode, tmp_path):
    """The last one is a JPEG under the name of a PNG."""
    image = Image.fromarray(np.ones((4, 5), np.uint16)) if mode == 'I;16' else Image.new(mode, (5, 4))
    image.save(tmp_path / 'label.png', 'JPEG' if mode == 'L' else 'PNG')
    with pytest.raises(models.DataError, match=rf'label\.png .*mode {mode}\)'):
        seg.read_label(tmp_path / 'label.png', True)


# ---- classes -------------------------------------------------------------------------------------

OBJECT_INFO = ('Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.16\t11664\t1172\t1\twall\n'
               '2\t0.1\t6046\t612\t0\tdoor; double door\t\n')
FROM_0 = '--no-reduce_zero_label'
CLASSES = {
    # where the names come from: files, flags, labels in training and in validation, classes
    '--nb_classes': ({}, ['--nb_classes', 3], [1], [1], ['class 1', 'class 2', 'class 3']),
    'objectInfo150.txt': ({'objectInfo150.txt': OBJECT_INFO}, [], [1], [1], ['wall', 'door; double door']),
    'both files': ({'classes.txt': '1 sky\n', 'objectInfo150.txt': OBJECT_INFO}, [], [1], [1],
                   ['wall', 'door; double door']),
    'classes.txt': ({'classes.txt': '3\troad\n\n 1  wet sky\n'}, [], [1], [1],
                    ['wet sky', 'class 2', 'road']),
    'from Windows': ({'classes.txt': '\ufeff0 trottoir mouillé\r\n1 road\r\n'}, [FROM_0], [1], [1],
                     ['trottoir mouillé', 'road']),  # with a byte order mark
    'a file and the flag': ({'classes.txt': '1 sky\n2 road\n3 sea\n'}, ['--nb_classes', 2], [1], [1],
                            ['sky', 'road']),
    'labels': ({}, [], [1, 255, 2], [3, 1], ['class 1', 'class 2', 'class 3']),
    'labels from 0': ({}, [FROM_0], [255, 2], [1], ['class 0', 'class 1', 'class 2']),
    'ignored by name': ({'classes.txt': '0 ignore\n1 sky\n2 road\n'}, [], [1], [2], ['sky', 'road']),
}


def classes_of(folder, *flags):
    return seg.build_data(run_args('--data_path', folder, *flags))[2]


@pytest.mark.parametrize('case', CLASSES)
def test_classes_come_from_the_flag_the_files_or_the_largest_label(case, tmp_path):
    files, flags, training, validation, expected = CLASSES[case]
    write_set(tmp_path, training=training, validation=validation)
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding='utf-8')
    assert classes_of(tmp_path, *flags) == expected


@pytest.mark.parametrize('names, labels, flags, message', [
    (None, [0], [], '^0 classes'), (None, [0, 1], [], '^1 classes'), (None, [254], [FROM_0], '^255 classes'),
    ('1 sky\n2 road\n3 sky\n', [1], [], '^3 classes of 2 names'),
    ('0 rest\n1 sky\n2 road\n', [1], [], r'classes\.txt names label 0, rest.*--no-reduce_zero_label'),
    ('sky\nroad\n', [1], [], r'classes\.txt has no line with a value and a name'),
    ('1 sky\n2 road\n', [1], [], 'all pixels of a split are ignored')])
def test_classes_that_cannot_be_are_refused(names, labels, flags, message, tmp_path):
    """No class, one, more than 254, a name twice, a name for label 0, which is ignored, no values."""
    write_set(tmp_path, training=labels, validation=[0])
    if names:
        (tmp_path / 'classes.txt').write_text(names)
    with pytest.raises(SystemExit, match=message) as error:
        classes_of(tmp_path, *flags)
    assert '\n' not in error.value.code


@pytest.mark.parametrize('workers', [0, 3])
def test_processes_and_their_workers_count_each_pixel_once(workers, tmp_path, monkeypatch):
    """Two processes together see what a plain loop over the labels counts."""
    labels, shares = [random_bytes(5, high, high=high) for high in range(2, 257, 6)], []
    pairs = [write_pair(tmp_path, label, label, str(k)) for k, label in enumerate(labels)]

    def all_reduce(counts):
        shares.append(counts.clone())
        counts.fill_(7)

    monkeypatch.setattr(torch.distributed, 'all_reduce', all_reduce)
    for rank in range(2):
        args = run_args('--num_workers', workers, rank=rank, world_size=2)
        args.distributed = True
        assert seg.count_labels(pairs, args).tolist() == [7] * 256
    expected = np.zeros(256, int)
    for value in np.concatenate(labels, axis=1).ravel().tolist():
        expected[255 if value in (0, 255) else value - 1] += 1
    assert all(part.sum() for part in shares) and sum(shares).tolist() == expected.tolist()


def test_evaluation_takes_the_classes_of_the_checkpoint(tmp_path):
    """Where the data names none, so that the validation split alone is enough."""
    write_set(tmp_path, validation=[1])
    torch.save({'model': {}, 'classes': ['sky', 'sea', 'sand']}, tmp_path / 'checkpoint.pth')
    args = run_args('--data_path', tmp_path, '--eval', '--resume', tmp_path / 'checkpoint.pth')
    loader, val_loader, classes = seg.build_data(args)
    assert loader is None and len(val_loader) == 1 and classes == ['sky', 'sea', 'sand']


# ---- pairs ---------------------------------------------------------------------------------------


def touch(folder, *names):
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()


def test_pairs_are_sorted_by_name_and_labels_alone_are_counted(tmp_path):
    """.jpg, .jpeg and .png images, labels of the same name; other files are left alone.

    An accent is part of a letter on one disk and a character of its own on another.
    """
    images, labels = tmp_path / 'images/training', tmp_path / 'annotations/training'
    touch(images, 'c.jpg', 'a.jpeg', 'b.png', 'E.JPG', 'd.v2.jpg', 'Thumbs.db', 'e\u0301.jpg', '\xfc.jpg')
    touch(labels, 'a.png', 'b.png', 'd.v2.png', 'E.PNG', 'c.png', 'c.txt', 'x.png', 'y.png',
          '\xe9.png', 'u\u0308.png')
    names = [('E.JPG', 'E.PNG'), ('a.jpeg', 'a.png'), ('b.png', 'b.png'), ('c.jpg', 'c.png'),
             ('d.v2.jpg', 'd.v2.png'), ('e\u0301.jpg', '\xe9.png'), ('\xfc.jpg', 'u\u0308.png')]
    expected = [(images / image, labels / label) for image, label in names]
    assert seg.list_pairs(tmp_path, 'training') == (expected, 2)


def test_an_image_without_a_label_and_an_absent_folder_are_named(tmp_path):
    touch(tmp_path / 'images/training', 'a.jpg', 'b.jpg')
    with pytest.raises(SystemExit, match=r'images/training/ and labels in annotations/training/$'):
        seg.list_pairs(tmp_path, 'training')
    touch(tmp_path / 'annotations/training', 'a.png')
    with pytest.raises(SystemExit, match=r'images/training/b\.jpg has no label in .*annotations/training'):
        seg.list_pairs(tmp_path, 'training')
    with pytest.raises(SystemExit, match='images/validation/'):
        seg.list_pairs(tmp_path, 'validation')
    with pytest.raises(SystemExit, match='--data_path None'):
        seg.list_pairs(None, 'training')


def test_the_data_line_tells_what_is_used_and_what_is_left_out(tmp_path, capsys):
    write_set(tmp_path, training=[1, 2, 3], validation=[1, 2])
    for path in ('images/training/b.png', 'images/validation/a.png'):
        (tmp_path / path).unlink()
    seg.build_data(run_args('--data_path', tmp_path))
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines == [  # 445 of 480 pixels are 0
        f'data: 2 training images, 1 to evaluate on, in {tmp_path}; 3 classes: class 1, class 2, class 3; '
        'left out: 2 labels without an image',
        'labels: 92.7% of the training pixels are ignored; classes without a pixel: class 2']
    seg.build_data(run_args('--data_path', tmp_path, FROM_0, '--nb_classes', 4))
    assert re.search('labels: 0.0% .* without a pixel: class 2$', capsys.readouterr().out)


@pytest.mark.parametrize('shape, turns', [((24, 20), -1), ((20, 24), 0)])
def test_an_image_is_turned_as_exif_tells_unless_its_label_has_the_stored_frame(shape, turns, tmp_path):
    stored = random_bytes(20, 24, 3)
    pair = write_pair(tmp_path, stored, np.ones(shape, np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # viewers turn it clockwise by 90 degrees
    Image.fromarray(stored).save(pair[0], exif=exif)
    data = seg.SegmentationDataset([pair], 8, run_args('--input_size', 20), is_train=False)
    assert np.abs(pixels_of(data[0][0]) - np.rot90(stored, turns)).max() < 1e-3


# ---- scaling, flip, padding ----------------------------------------------------------------------


def test_images_are_scaled_as_in_the_recipe_rounded_half_up():
    """mmsegmentation's (2048, 512) x ratio bounds the long and the short side, in exact fractions."""
    sides = [int(side) for side in 2 ** np.random.default_rng(0).uniform(3, 12, 400)]
    for height, width, ratio in zip(sides[::2], sides[1::2], itertools.cycle([0.5, 1.3125, 2.0])):
        scale = Fraction(ratio) * min(Fraction(2048, max(height, width)), Fraction(512, min(height, width)))
        expected = [math.floor(side * scale + Fraction(1, 2)) for side in (height, width)]
        assert seg.scaled_size((height, width), 512 * ratio) == expected
    by_hand = {(64, 65): [32, 33], (67, 64): [34, 32], (256, 63): [128, 32], (3000, 1): [128, 1]}
    assert {size: seg.scaled_size(size, 32) for size in by_hand} == by_hand


def test_the_factor_of_training_images_is_uniform_over_the_ratio_range(tmp_path, monkeypatch):
    pair = write_pair(tmp_path, random_bytes(8, 9, 3), random_bytes(8, 9, high=8))
    data, shorts, scaled_size = training_data([pair]), [], seg.scaled_size

    def keep_short_side(size, short):
        shorts.append(short)
        return scaled_size(size, short)

    monkeypatch.setattr(seg, 'scaled_size', keep_short_side)
    for number in range(300):
        data[number, 0]
    draws = (np.sort(shorts) / 32 - 0.5) / 1.5  # 0.5 to 2.0
    assert np.abs(draws - (np.arange(300) + 0.5) / 300).max() < 0.1
    assert 0 <= draws[0] and draws[-1] <= 1


@pytest.mark.parametrize('side', [20, 50])
def test_a_label_is_that_under_the_centre_of_each_scaled_pixel(side, tmp_path, negatives):
    """Nearest by pixel centres; rounding down the corner instead would shift labels by half a pixel."""
    columns = np.arange(side)
    image = np.tile(5 * columns[None, :, None], (side, 1, 3)).astype(np.uint8)
    label = np.tile(columns + 1, (side, 1)).astype(np.uint8)
    pair, turned = write_pair(tmp_path, image, label), set()
    data = training_data([pair], '--ratio_range', 1, 1, num_classes=side)
    centres = (np.arange(32) + 0.5) * side / 32
    for number in range(10):
        made, marks = data[number, 0]
        turn = slice(None, None, 1 if marks[0, 0] < marks[0, -1] else -1)
        assert np.array_equal(marks.numpy()[:, turn], np.tile(np.floor(centres), (32, 1)))
        difference = 255 - pixels_of(made)[:, turn] - 5 * (centres - 0.5)[None, :, None]
        assert np.abs(difference[:, 2:-2]).max() < 1  # of 5 a pixel
        turned.add(turn.step)
    assert turned == {1, -1}


def test_image_and_label_are_cropped_flipped_and_padded_together(tmp_path, negatives):
    """No pixel is resized here. Padding is right and below, after distortion, of 0; half are flipped."""
    rows, columns = np.mgrid[:50, :50]
    image = np.dstack([5 * rows, 5 * columns, random_bytes(50, 50)]).astype(np.uint8)  # tells where it is
    label, pairs, flips, starts = random_bytes(50, 50, low=1, high=9), [], 0, set()
    sizes = ((16, 24), (24, 16), (16, 50), (50, 16))
    for height, width in sizes:
        parts = image[:height, :width].copy(), label[:height, :width].copy()
        pairs.append(write_pair(tmp_path, *parts, name=f'{height}x{width}'))
    data = training_data(pairs, '--ratio_range', 0.5, 0.5)  # short sides of 16
    for number, index in np.ndindex(80, 4):
        made, marks = data[number, index]
        assert made.shape == (3, 32, 32) and made.dtype == torch.float32
        assert marks.shape == (32, 32) and marks.dtype == torch.uint8
        height, width = (min(side, 32) for side in sizes[index])
        pixels = 255 - pixels_of(made[:, :height, :width])
        rows, columns, _ = np.round(pixels / 5).astype(int).transpose(2, 0, 1)
        assert np.abs(pixels - image[rows, columns]).max() < 1e-3
        assert np.array_equal(marks[:height, :width].numpy(), label[rows, columns] - 1)
        flipped = columns[0, 0] > columns[0, -1]
        assert (np.diff(rows, axis=0) == 1).all() and (np.diff(columns) == (-1 if flipped else 1)).all()
        assert (made[:, height:] == 0).all() and (made[:, :, width:] == 0).all()
        assert (marks[height:] == 255).all() and (marks[:, width:] == 255).all()
        flips += flipped
        starts.add((index, rows.min(), columns.min()))
    assert 0.4 < flips / 320 < 0.6 and len(starts) > 2 + 2 * 15


# ---- photometric distortion ----------------------------------------------------------------------


def plain_distortion(image):
    """mmsegmentation's steps in float64, pixel by pixel: (H, W, 3) uint8 -> floats in 0 to 255, draws."""
    def draw(low, high, neutral):
        return np.random.uniform(low, high) if np.random.rand() < 0.5 else neutral

    contrast = draw(0.5, 1.5, 1)
    first, last = (contrast, 1) if np.random.rand() < 0.5 else (1, contrast)
    brightness, saturation, hue = draw(-32, 32, 0), draw(0.5, 1.5, 1), draw(-18, 18, 0)
    made = np.zeros(image.shape)
    for i, j in np.ndindex(*image.shape[:2]):
        pixel = [min(max((value + brightness) / 255, 0), 1) for value in image[i, j].tolist()]
        h, s, v = colorsys.rgb_to_hsv(*[min(first * value, 1) for value in pixel])
        pixel = colorsys.hsv_to_rgb((h + hue / 180) % 1, min(saturation * s, 1), v)
        made[i, j] = [255 * min(last * value, 1) for value in pixel]
    return made, (brightness, first, saturation, hue, last)


def test_distortion_equals_a_float64_loop_over_the_pixels():
    """Brightness, contrast, saturation and hue as in mmsegmentation, on the same draws; also of greys."""
    image, ways = random_bytes(6, 7, 3), set()
    image[0], image[1, :3], image[1, 3:] = image[0, :, :1], (0, 255, 255), 0
    for seed in range(200):
        np.random.seed(seed)
        made = seg.distort_colours(torch.from_numpy(image).permute(2, 0, 1))
        following = np.random.rand()
        np.random.seed(seed)
        expected, draws = plain_distortion(image)
        assert made.dtype == torch.uint8 and np.random.rand() == following  # as many draws
        assert np.abs(made.permute(1, 2, 0).numpy() - expected).max() < 0.502  # half a level is rounding
        ways.add(tuple(value in (0, 1) for value in draws))
    assert len(ways) == 2 * 3 * 2 * 2  # contrast first, last or not at all


def test_distortion_spreads_the_mean_brightness_as_far_as_mmsegmentations():
    """A grey of 74 of 255 is (74 + b) c, each changed by a coin; var b = 64^2 / 12, var c = 1 / 12."""
    grey, means = torch.full((3, 2, 2), 74, dtype=torch.uint8), []
    np.random.seed(0)
    for _ in range(3000):
        means.append(seg.distort_colours(grey).double().mean().item())
    expected = math.sqrt((1 + 1 / 24) * (74 ** 2 + 64 ** 2 / 24) - 74 ** 2)
    assert expected / 255 == pytest.approx(0.079, abs=5e-4)
    assert np.std(means) == pytest.approx(expected, rel=0.05)


# ---- crops ---------------------------------------------------------------------------------------


def strip(*parts):
    """A label 8 high of (value, columns) parts: crops of 8 pixels differ by their first column alone."""
    rows = [np.full((8, columns), value, np.uint8) for value, columns in parts]
    return torch.from_numpy(np.concatenate(rows, axis=1))


def draw_many(label, size=8, limit=0.75, count=2000):
    """(count, 4): top, left, height, width of crops."""
    np.random.seed(1)
    return np.array([seg.draw_crop(label, size, limit) for _ in range(count)])


def share(label, left):
    """Share of the largest class in the labelled pixels of a strip's crop; None where there are none."""
    part = label[:, left:left + 8].numpy()
    part = part[part != 255]
    return np.bincount(part).max() / part.size if part.size else None


def test_crops_lie_anywhere_in_the_image_also_where_no_crop_will_do():
    """An image of one class is cropped all the same."""
    drawn = draw_many(torch.full((12, 27), 3, dtype=torch.uint8))
    assert (drawn[:, 2:] == 8).all()
    counts = np.zeros((5, 20))
    np.add.at(counts, (drawn[:, 0], drawn[:, 1]), 1)
    assert counts.min() > 4 and counts.max() < 45  # 20 each


def test_a_crop_is_drawn_again_up_to_ten_times_while_a_class_fills_over_three_quarters():
    """A tenth of the places is good, those with 2 to 6 of 8 columns of a class."""
    label = strip((0, 50), (1, 5), (0, 52))
    good = [left for left in range(100) if share(label, left) <= 0.75]
    assert good == list(range(44, 54))
    lefts = draw_many(label, count=4000)[:, 1]
    # nine tries give 0.39, eleven 0.31
    assert np.mean(~np.isin(lefts, good)) == pytest.approx(0.9 ** 10, abs=0.024)
    counts = np.bincount(lefts, minlength=100)[good]
    assert counts.min() > 0.7 * counts.mean()  # exactly three quarters, at both ends, is not over them


def test_ignored_pixels_do_not_count_in_a_crop():
    """75 % of the labelled pixels; a crop without any is drawn again."""
    label = strip((0, 57), (255, 50))
    label[::2, :57] = 255
    label[1::4, 20:27] = 1
    shares = [share(label, left) for left in range(100)]
    good = [left for left in range(100) if shares[left] is not None and shares[left] <= 0.75]
    assert shares.count(None) == 43 and len(good) == 8
    lefts = draw_many(label)[:, 1]
    assert np.mean(np.isin(lefts, good)) == pytest.approx(1 - 0.92 ** 10, abs=0.04)
    sparse = strip((255, 107))  # mostly ignored, but balanced in what is left: accepted at once
    sparse[0], sparse[1] = 0, 1
    assert len(set(draw_many(sparse, count=200)[:, 1])) > 60


def test_training_crops_obey_cat_max_ratio(tmp_path):
    label = np.ones((32, 200), np.uint8)
    label[:, 90:110] = 2
    pair, obeyed = write_pair(tmp_path, np.zeros((32, 200, 3), np.uint8), label), {}
    for limit in (0.7, 1.0):
        # scaled to 20 x 128; of 97 places about 26 have enough of the other class
        data = training_data([pair], '--ratio_range', 1, 1, '--cat_max_ratio', limit)
        shares = [(data[number, 0][1][:20] == 0).float().mean() for number in range(100)]
        obeyed[limit] = np.mean([float(value) <= 0.7 for value in shares])
    assert obeyed[0.7] > 0.85 and obeyed[1.0] < 0.5


# ---- loaders -------------------------------------------------------------------------------------


def test_the_number_of_data_workers_changes_no_batch(tmp_path):
    """Draws depend on (seed, pass, index) alone; rounds of --eval_every updates go on in the stream."""
    write_set(tmp_path, training=[1, 2, 3, 4, 5, 1], validation=[1, 2, 3])
    found = []
    for workers in (0, 2):
        flags = ('--data_path', tmp_path, '--eval_every', 2, '--iterations', 4, '--num_workers', workers)
        loader, val_loader, classes = seg.build_data(run_args(*flags))
        assert len(loader) == 2 and len(val_loader) == 3 and len(classes) == 5
        rounds = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            rounds += list(loader)
        found.append([*rounds, *val_loader])
    assert [tuple(part.shape) for part in found[0][0]] == [(2, 3, 32, 32), (2, 32, 32)]
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert not torch.equal(found[0][0][0], found[0][2][0])


def test_evaluation_scales_the_image_and_leaves_the_label_as_it_is(tmp_path):
    """Short side S, long side at most 4 S, as Pillow does it; the label stays in original pixels."""
    sizes = {'a': ((40, 90), (32, 72)), 'b': ((100, 41), (78, 32)), 'c': ((9, 120), (10, 128))}
    for name, ((height, width), _) in sizes.items():
        small = Image.fromarray(random_bytes(6, 6, 3)).resize((width, height), Image.Resampling.BICUBIC)
        write_pair(tmp_path, np.asarray(small), random_bytes(height, width, high=7), name, 'validation')
    (tmp_path / 'classes.txt').write_text('6 the last class\n')
    flags = ('--data_path', tmp_path, '--eval', '--resume', 'none')
    _, loader, _ = seg.build_data(run_args(*flags))
    for (image, label), (name, (_, (height, width))) in zip(loader, sizes.items(), strict=True):
        values = np.asarray(Image.open(tmp_path / f'annotations/validation/{name}.png')).astype(int)
        assert np.array_equal(label[0].numpy(), np.where(values == 0, 255, values - 1))
        assert image.shape == (1, 3, height, width)
        picture = Image.open(tmp_path / f'images/validation/{name}.png')
        expected = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR))
        difference = np.abs(pixels_of(image[0]) - expected)
        assert difference.max() < 2.1 and difference.mean() < 0.4  # both round to whole levels, twice


# ---- bad pairs -----------------------------------------------------------------------------------


@pytest.mark.parametrize('is_train', [True, False])
def test_a_label_beyond_the_classes_and_one_of_another_size_are_named(is_train, tmp_path):
    image, label = random_bytes(20, 24, 3), np.full((20, 24), 8, np.uint8)
    turned = write_pair(tmp_path, image, label.T.copy(), 'turned')
    label[-1, -1] = 9
    beyond = write_pair(tmp_path, image, label, 'beyond')
    data = seg.SegmentationDataset([turned, beyond], 8, run_args(), is_train)
    from_0 = seg.SegmentationDataset([beyond], 9, run_args(FROM_0), is_train)
    with pytest.raises(models.DataError, match=r'turned\.png is \(24, 20\) .* image \(20, 24\)'):
        data[0]
    with pytest.raises(models.DataError, match=r'beyond\.png has.* label 9, beyond the 8 classes'):
        data[1]
    with pytest.raises(models.DataError, match='label 9, beyond the 9 classes'):
        from_0[0]
