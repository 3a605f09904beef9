"""The detection script's data and evaluation: what is read, how images and masks move, and AP.

Oracles are Pillow, pycocotools and torchvision used directly, or values worked out by hand.
"""
import contextlib
import io
import itertools
import json
import math
import re
from types import SimpleNamespace
from unicodedata import normalize

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from conftest import command, log_of, run
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torchvision.ops import box_iou

import models
import specific_distill_det as det
import toy_data

SCORES = [f'test_{kind}_{name}' for kind in ('bbox', 'mask') for name in ('AP', 'AP50', 'AP75')]


def polygon(*corners):
    return [float(value) for corner in corners for value in corner]


def rectangle(x0, y0, x1, y1):
    return polygon((x0, y0), (x1, y0), (x1, y1), (x0, y1))


def runs(mask):
    """COCO's uncompressed run lengths by hand: down the columns, zeros first."""
    lengths, current = [0], 0
    for value in mask.T.ravel().tolist():
        if value != current:
            lengths.append(0)
            current = value
        lengths[-1] += 1
    return {'counts': lengths, 'size': list(mask.shape)}


def compressed(mask):
    code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {'counts': code['counts'].decode(), 'size': list(mask.shape)}


def whole_mask(segmentation, height, width):
    """pycocotools' own mask of the whole image."""
    truth = COCO()
    truth.imgs = {0: {'height': height, 'width': width}}
    return truth.annToMask({'image_id': 0, 'segmentation': segmentation})


def box_thing(image_id, category_id, x0, y0, x1, y1, **more):
    """An annotation that fills its box."""
    return {'image_id': image_id, 'category_id': category_id, 'segmentation': [rectangle(x0, y0, x1, y1)],
            'bbox': [x0, y0, x1 - x0, y1 - y0], **more}


def shape_thing(image_id, category_id, shape, height, width, **more):
    """An annotation of any shape, whose box is that of its pixels."""
    mask = whole_mask(shape, height, width)
    rows, columns = mask.any(1).nonzero()[0].tolist(), mask.any(0).nonzero()[0].tolist()
    box = box_thing(image_id, category_id, columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    return {**box, 'segmentation': shape, 'area': float(mask.sum()), **more}


def write_set(folder, pictures, annotations, categories=((1, 'ant'),), split='train'):
    """A split in COCO's layout; pictures: {image id: (H, W, 3) array}. Returns (JSON file, image folder)."""
    path, images = folder / f'annotations/instances_{split}2017.json', folder / f'{split}2017'
    path.parent.mkdir(parents=True, exist_ok=True)
    images.mkdir()
    entries = []
    for number, pixels in pictures.items():
        Image.fromarray(pixels).save(images / f'{number}.png')
        height, width = pixels.shape[:2]
        entries.append({'id': number, 'file_name': f'{number}.png', 'height': height, 'width': width})
    path.write_text(json.dumps({
        'images': entries, 'annotations': annotations,
        'categories': [{'id': number, 'name': name} for number, name in categories]}))
    return path, images


def grey(height, width, level=100):
    return np.full((height, width, 3), level, np.uint8)


def dataset(path, images, is_train=True, size=64, jitter=(0.1, 2.0)):
    args = SimpleNamespace(input_size=[size, size], scale_jitter=list(jitter))
    coco, _ = det.read_coco(path, is_train)
    return models.SeededDataset(det.CocoDataset(coco, images, args, is_train), seed=0)


def build_args(*flags, rank=0, world_size=1):
    """Flags as `main` has them before `build_data`."""
    words = ['--num_workers', '0', '--device', 'cpu', '--batch_size', '2', *map(str, flags)]
    args = det.get_args_parser().parse_args(words)
    args.rank, args.world_size, args.distributed, args.input_size = rank, world_size, world_size > 1, [64, 64]
    return args


# ---- jitter --------------------------------------------------------------------------------------


def is_uniform(draws, low, high):
    """Kolmogorov-Smirnov: a true uniform is refused once in 1,000 times."""
    draws, count = np.sort((np.array(draws) - low) / (high - low)), len(draws)
    steps = np.arange(count + 1) / count
    return max((steps[1:] - draws).max(), (draws - steps[:-1]).max()) < 1.95 / math.sqrt(count)


def draw_many(height, width, scale_range, count=2000):
    np.random.seed(1)
    return [det.draw_jitter(height, width, 1024, scale_range) for _ in range(count)]


@pytest.mark.parametrize('height, width', [(480, 640), (1500, 200), (600, 600)])
def test_jitter_scales_by_one_uniform_factor_and_crops_to_the_input_size(height, width):
    """Large-scale jitter, 0.1 to 2.0 of the input size: what fits stays whole, on each side by itself."""
    long, factors = max(height, width), []
    for (top, left, part_height, part_width), new, _ in draw_many(height, width, (0.1, 2.0)):
        factor = new[0] / part_height if height == long else new[1] / part_width
        factors.append(factor * long / 1024)
        sides = (top, part_height, new[0], height), (left, part_width, new[1], width)
        for start, part, made, side in sides:
            assert abs(made - factor * part) <= 1 + factor  # the rounding of both
            assert 0 <= start and 1 <= part and start + part <= side and 1 <= made <= 1024
            assert made == 1024 or (start, part) == (0, side)
    assert is_uniform(factors, 0.1, 2.0)


def test_crops_start_anywhere_and_half_of_the_images_are_flipped():
    parts, sizes, flips = zip(*draw_many(480, 640, (2.0, 2.0)))
    assert set(sizes) == {(1024, 1024)}
    starts = np.array(parts)[:, :2]
    spans = [480 - 320, 640 - 320]  # scaled to 1536 x 2048, 1024 pixels are 320 of the original's
    assert starts.min(0).tolist() == [0, 0] and starts.max(0).tolist() == spans
    fractions = np.random.default_rng(0).uniform(-0.5, 0.5, starts.shape)  # undo the rounding
    for axis in (0, 1):
        assert is_uniform((starts + fractions)[:, axis].clip(0, spans[axis]), 0, spans[axis])
    assert abs(np.mean(flips) - 0.5) < 0.04


# ---- boxes and masks -----------------------------------------------------------------------------


@pytest.mark.parametrize('flip', [False, True])
def test_boxes_masks_and_labels_follow_the_crop_and_the_flip(flip, tmp_path, monkeypatch):
    """The part (10, 20, 20, 30) of 40 x 60 pixels, enlarged twice; labels count the sorted ids from 1."""
    things = [
        shape_thing(5, 2, [polygon((0, 0), (24, 0), (0, 14))], 40, 60),  # its box alone reaches the part
        box_thing(5, 7, 0, 0, 20, 40), box_thing(5, 2, 50, 10, 60, 30),  # they touch it
        box_thing(5, 7, 25, 5, 35, 15), box_thing(5, 90, 22, 12, 28, 20), box_thing(5, 2, 0, 0, 60, 40),
        box_thing(5, 90, 45, 25, 59, 39)]
    files = write_set(tmp_path, {5: grey(40, 60)}, things, ((90, 'last'), (2, 'first'), (7, 'middle')))
    monkeypatch.setattr(det, 'draw_jitter', lambda *_: ((10, 20, 20, 30), (40, 60), flip))
    image, target = dataset(*files)[0, 0]
    boxes = [[10, 0, 30, 10], [4, 4, 16, 20], [0, 0, 60, 40], [50, 30, 60, 40]]
    if flip:
        boxes = [[60 - x1, y0, 60 - x0, y1] for x0, y0, x1, y1 in boxes]
    masks = torch.zeros(4, 40, 60, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes):
        mask[y0:y1, x0:x1] = 255
    assert target['boxes'].tolist() == boxes
    assert target['labels'].tolist() == [2, 3, 1, 3]
    assert torch.equal(target['masks'], masks)
    assert image.dtype == torch.uint8 and image.shape == (3, 40, 60)


def test_a_crop_without_objects_gives_empty_targets(tmp_path, monkeypatch):
    """Objects that are cut off, and one whose box reaches the crop, but not its pixels."""
    corner = shape_thing(1, 1, [polygon((0, 0), (40, 0), (0, 40))], 40, 40)
    files = write_set(tmp_path, {1: grey(40, 40)}, [box_thing(1, 1, 0, 0, 5, 5), corner])
    monkeypatch.setattr(det, 'draw_jitter', lambda *_: ((25, 30, 15, 10), (30, 20), True))
    image, target = dataset(*files)[0, 0]
    assert image.shape == (3, 30, 20)
    assert {key: (tuple(value.shape), value.dtype) for key, value in target.items()} == {
        'boxes': ((0, 4), torch.float32), 'labels': ((0,), torch.int64), 'masks': ((0, 30, 20), torch.uint8)}


# a star, a slanted box and a pair of triangles, disjoint, with corners between pixels
STAR = [(40 + reach * math.cos(0.3 + 0.628318 * k), 38 + reach * math.sin(0.3 + 0.628318 * k))
        for k, reach in enumerate((30.3, 14.2) * 5)]
BOX = [(80.4, 12.7), (120.2, 20.1), (115.9, 44.3), (76.1, 36.9)]
PAIR = [[(78.3, 55.2), (98.7, 57.1), (84.9, 80.6)], [(104.2, 84.3), (125.7, 50.9), (126.3, 83.8)]]
OUTLINES = {1: [STAR], 2: [BOX], 3: PAIR}  # by label


def pillow_fills(outlines, size):
    """255ths of each pixel inside polygons, on a grid 8 times as fine."""
    fine = Image.new('L', (8 * size[1], 8 * size[0]))
    for outline in outlines:
        ImageDraw.Draw(fine).polygon((8 * np.array(outline)).ravel().tolist(), fill=255)
    return np.asarray(fine.reduce(8)).astype(float)


def moved(outline, part, size, flip=False):
    """An outline in the pixels of a crop that was resized, and mirrored."""
    top, left, height, width = part
    points = (np.array(outline) - (left, top)) * (size[1] / width, size[0] / height)
    return points * (-1, 1) + (size[1], 0) if flip else points


def centre(weights):
    y, x = np.indices(weights.shape)
    return np.array([(weights * y).sum(), (weights * x).sum()]) / weights.sum()


def exact_box(outlines, part, size):
    """Around what a crop shows: ends of the edges, cut at its border, and those of its corners inside."""
    limits, found = np.array(size[::-1]), []
    for outline in outlines:
        start = moved(outline, part, size)
        step = np.roll(start, -1, axis=0) - start  # no edge lies along an axis
        shares = np.concatenate([-start / step, (limits - start) / step], axis=1).clip(0, 1)
        points = (start[:, None] + shares[..., None] * step[:, None]).reshape(-1, 2)
        found.append(points[((points > -1e-9) & (points < limits + 1e-9)).all(axis=1)])
        for x, y in itertools.product((0, size[1]), (0, size[0])):
            crossed = (start[:, 1] > y) != (start[:, 1] + step[:, 1] > y)
            places = (start[:, 0] + (y - start[:, 1]) / step[:, 1] * step[:, 0])[crossed]
            found += [[(x, y)]] if (places > x).sum() % 2 else []
    found = np.concatenate(found)
    return np.concatenate([found.min(axis=0), found.max(axis=0)]) if len(found) else np.zeros(4)


def pixel_box(mask, part, size):
    """Around the pixels that a crop shows, at its new size."""
    top, left, height, width = part
    y, x = mask[top:top + height, left:left + width].nonzero()
    box = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) if len(x) else np.zeros(4)
    return box * np.tile((size[1] / width, size[0] / height), 2)


@pytest.mark.parametrize('jitter', [0.1, 0.25, 0.5, 1, 2])
def test_boxes_masks_and_pixels_are_those_of_what_a_crop_shows(jitter, tmp_path, monkeypatch):
    """Boxes to an IoU of 0.99, masks as another library fills them at the new size, pixels without a shift.

    Label k is painted into colour channel k; label 4 are run lengths.
    """
    shapes = {label: [polygon(*outline) for outline in outlines] for label, outlines in OUTLINES.items()}
    blob, drawn, draw = np.zeros((90, 130), np.uint8), [], det.draw_jitter
    blob[50:88, 30:60] = blob[70:76, 10:70] = 1
    things = [shape_thing(3, label, shape, 90, 130) for label, shape in [*shapes.items(), (4, runs(blob))]]
    pixels = np.dstack([pillow_fills(outlines, (90, 130)) for outlines in OUTLINES.values()]).astype(np.uint8)
    files = write_set(tmp_path, {3: pixels}, things, ((3, 'pair'), (1, 'star'), (4, 'blob'), (2, 'box')))
    monkeypatch.setattr(det, 'draw_jitter', lambda *words: drawn.append(draw(*words)) or drawn[-1])
    data, ious, errors, shifts = dataset(*files, size=96, jitter=(jitter, jitter)), [], [], []
    for epoch in range(100 if jitter > 1 else 6):
        image, target = data[epoch, 0]
        part, size, flip = drawn[-1]
        assert image.shape[1:] == target['masks'].shape[1:] == size
        places = {label: k for k, label in enumerate(target['labels'].tolist())}
        for label in range(1, 5):
            box = pixel_box(blob, part, size) if label == 4 else exact_box(OUTLINES[label], part, size)
            if flip:
                box[[0, 2]] = size[1] - box[[2, 0]]
            if label not in places:
                assert min(box[2:] - box[:2]) < 2
                continue
            k = places[label]
            mask = target['masks'][k].numpy().astype(float)
            ious.append(box_iou(target['boxes'][k:k + 1].double(), torch.from_numpy(box)[None]).item())
            if label < 4 and mask.sum() > 50 * 255:
                outlines = [moved(outline, part, size, flip) for outline in OUTLINES[label]]
                expected = pillow_fills(outlines, size)
                errors.append(np.abs(expected - mask).sum() / mask.sum())
                y, x = centre(mask) - centre(image[label - 1].numpy())
                shifts.append((y, -x if flip else x))
    assert len(ious) >= 24 and min(ious) > 0.99
    assert jitter < 0.5 or len(errors) >= 18
    assert max(errors, default=0) < 0.1 and np.abs(np.mean(shifts or [(0, 0)], axis=0)).max() < 0.03


# in a crop from (20, 10) to (50, 30), enlarged twice: polygons and the box of what is seen
AT_THE_BORDER = {
    'around the crop': ([rectangle(0, 0, 60, 40)], [0, 0, 60, 40]),
    'as large as the crop': ([rectangle(20, 10, 50, 30)], [0, 0, 60, 40]),
    'another part touches it': ([rectangle(22, 12, 26, 18), rectangle(9, 20, 20, 25)], [4, 4, 12, 16]),
}


@pytest.mark.parametrize('name', AT_THE_BORDER)
def test_boxes_at_the_border_by_hand(name):
    polygons, expected = AT_THE_BORDER[name]
    mask, box = det.crop_object(polygons, (40, 60), (10, 20, 20, 30), (40, 60))
    assert box.tolist() == pixel_box(mask, (0, 0, 40, 60), (40, 60)).tolist() == expected


def test_boxes_of_any_outlines_are_those_of_what_is_seen():
    """Concave ones around the crop's corners, too; these may be off by less than a pixel, seldom."""
    rng, errors = np.random.default_rng(0), []
    for _ in range(1000):
        outline = rng.uniform(-20, 90, (rng.integers(3, 9), 2))
        part, size = rng.integers(5, 30, 4).tolist(), tuple(rng.integers(5, 100, 2).tolist())
        mask, box = det.crop_object([outline.ravel().tolist()], (70, 70), part, size)
        expected = exact_box([outline], part, size)
        if mask is None:
            assert min(expected[2:] - expected[:2]) < 1
        else:
            errors.append(np.abs(box - expected).max())
            assert (box[:2] >= 0).all() and (box[2:] <= size[::-1]).all()
    assert len(errors) > 500 and max(errors) < 1 and np.mean(np.array(errors) < 1e-6) > 0.99


SHAPE = np.zeros((37, 53), np.uint8)
SHAPE[5:20, 10:40] = SHAPE[15:33, 30:50] = 1
SEGMENTATIONS = {
    'overlapping polygons': [rectangle(2, 6, 30, 20), rectangle(20, 10, 50, 35), rectangle(0, 30, 9, 37)],
    'polygons beyond the image': [rectangle(-5, -4, 12, 9), rectangle(45, 30, 60, 44)],
    'run lengths': runs(SHAPE), 'compressed run lengths': compressed(SHAPE),
}


@pytest.mark.parametrize('name', SEGMENTATIONS)
def test_a_crop_is_that_part_of_pycocotools_mask_and_pillow_resizes_run_lengths_so(name):
    """In 255ths of a pixel; an object that leaves nothing at its new size is dropped."""
    whole, are_runs = whole_mask(SEGMENTATIONS[name], 37, 53), 'lengths' in name
    assert np.array_equal(whole, SHAPE) or not are_runs
    for part in ((0, 0, 37, 53), (5, 9, 20, 31), (30, 45, 7, 8), (0, 20, 1, 1)):
        top, left, height, width = part
        seen = Image.fromarray(255 * whole[top:top + height, left:left + width])
        for size in ((height, width), (height // 3 + 1, 2 * width)) if are_runs else ((height, width),):
            mask, box = det.crop_object(SEGMENTATIONS[name], (37, 53), part, size)
            if seen.getbbox():
                assert box.tolist() == pixel_box(whole, part, size).tolist()
                oracle = np.asarray(seen.resize(size[::-1], Image.Resampling.BILINEAR)).astype(int)
                assert mask.dtype == np.uint8 and np.abs(mask - oracle).max() <= (size != part[2:])
            else:
                assert mask is box is None
    speck = np.zeros((640, 640), np.uint8)
    speck[300, 300] = 1
    shape = runs(speck) if are_runs else [rectangle(300, 300, 301, 301)]
    assert det.crop_object(shape, (640, 640), (0, 0, 640, 640), (20, 20)) == (None, None)


# ---- what is read --------------------------------------------------------------------------------


def test_annotations_get_ids_areas_and_crowd_flags_and_categories_are_sorted(tmp_path):
    """A file's own ids do not matter: pycocotools takes a match with id 0 for none. Points may be pairs."""
    pairs = [[[2, 3], [12, 3], [12.0, 10], [2, 10]]]
    things = [{**box_thing(4, 9, 2, 3, 12, 10, id=0, keypoints=[1, 2]), 'segmentation': pairs},
              box_thing(4, 2, 0, 0, 5, 5, area=20.5),
              {**box_thing(4, 2, 0, 0, 30, 20, iscrowd=1), 'segmentation': runs(np.ones((20, 30)))}]
    things += [box_thing(4, 9, 2, 3, 12, 10, iscrowd=flag) for flag in ('1', True, '0', False, None)]
    things[-1]['segmentation'] = pairs[0]  # without the list of polygons
    path, _ = write_set(tmp_path, {4: grey(20, 30)}, things, ((9, 'ant'), (2, 'bee')))
    path.write_bytes(b'\xef\xbb\xbf' + path.read_bytes())  # Windows marks UTF-8 so
    coco, left_out = det.read_coco(path, is_train=False)
    assert [entry['id'] for entry in coco['annotations']] == list(range(1, 9)) and not left_out
    assert [entry['area'] for entry in coco['annotations']] == [70, 20.5, 600, *[70] * 5]
    assert [entry['iscrowd'] for entry in coco['annotations']] == [0, 0, 1, 1, 1, 0, 0, 0]
    for number in (0, -1):
        assert coco['annotations'][number]['segmentation'] == [rectangle(2, 3, 12, 10)]
    assert [(entry['id'], entry['name']) for entry in coco['categories']] == [(2, 'bee'), (9, 'ant')]


def test_what_cannot_be_trained_on_is_left_out_and_counted(tmp_path, capsys):
    """Crowds, empty boxes and polygons of two corners; images without any other object, in training alone."""
    crowd = {'segmentation': runs(np.ones((20, 20), np.uint8)), 'bbox': [0, 0, 20, 20], 'iscrowd': 1}
    short = {'segmentation': [[3, 3, 9, 9], []]}
    partly = {'segmentation': [[3, 3, 9, 9], rectangle(4, 4, 8, 8)]}
    things = [box_thing(1, 1, 2, 3, 9, 11), {**box_thing(1, 2, 4, 4, 8, 8), **partly}]
    for image_id, change in ((1, crowd), (1, short), (2, crowd), (3, {'bbox': [3, 3, 0, 9]}), (4, short)):
        things.append({**box_thing(image_id, 2, 0, 0, 9, 9), **change})
    pictures = {number: grey(20, 20) for number in range(1, 6)}
    for split in ('train', 'val'):
        files = write_set(tmp_path, pictures, things, ((1, 'ant'), (2, 'bee')), split)
    train = dataset(*files, size=20, jitter=(1, 1))
    _, target = train[0, 0]
    assert len(train) == 1 and target['labels'].tolist() == [1, 2]
    assert (target['masks'] // 255).sum((1, 2)).tolist() == [7 * 8, 4 * 4]
    assert target['boxes'][:, 1::2].tolist() == [[3, 11], [4, 8]]
    loader, val_loader, coco, classes = det.build_data(build_args('--data_path', tmp_path))
    line = capsys.readouterr().out
    train, val = line.split(' used, ')
    assert '1 of 5 images' in train and '2 of 7 objects' in train
    assert 'has an empty box, [3, 3, 0, 9]' in line
    for words in ('2 crowds', '2 without a polygon', '1 with an empty box'):
        assert words in val.split(';')[0]
    assert '5 images with 3 objects to evaluate on, left out: 2 without a polygon, 2 crowds' in val
    assert len(coco['annotations']) == 5 and classes == ['ant', 'bee']
    assert [target['image_id'] for _, targets in val_loader for target in targets] == [1, 2, 3, 4, 5]


FORMS = {'corners': lambda x, y, width, height: [x, y, x + width, y + height],
         'shares of the image': lambda *box: [value / 100 for value in box],
         'negative': lambda x, y, width, height: [x, y, width, -height]}


@pytest.mark.parametrize('form, odd, stops', [
    ('corners', 150, True), ('shares of the image', 150, True), ('corners', 2, True), ('corners', 1, False),
    ('negative', 1, True)])
def test_boxes_in_another_form_stop_the_run_with_an_example(form, odd, stops, tmp_path):
    """Of 150 objects 1 % may disagree with their segmentations; a negative side is named at once."""
    things = [box_thing(1, 1, 40, 30 + k % 9, 60 + k % 7, 50 + k % 5, id=70 + k) for k in range(150)]
    for thing in things[-odd:]:
        thing['bbox'] = FORMS[form](*thing['bbox'])
    path, _ = write_set(tmp_path, {1: grey(100, 100)}, things)
    if not stops:
        assert len(det.read_coco(path, is_train=True)[0]['annotations']) == 150
        return
    example = re.escape(f'annotation {220 - odd} has the box {things[-odd]["bbox"]}')
    with pytest.raises(SystemExit, match=f'{example}.* x, y, width, height') as error:
        det.read_coco(path, is_train=True)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize('orientation, frame', [(3, 'turned'), (6, 'turned'), (6, 'stored')])
def test_an_image_is_turned_as_exif_says_unless_its_stored_size_alone_is_right(orientation, frame, tmp_path):
    """3: by 180 degrees; 6: clockwise. It is read as the same picture without the tag."""
    turned = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)
    stored = np.rot90(turned, {3: 2, 6: 1}[orientation])
    path, images = write_set(tmp_path, {1: turned if frame == 'turned' else stored}, [THING])
    expected = [dataset(path, images, is_train)[0, 0][0] for is_train in (True, False)]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(images / '1.png', exif=exif)
    for is_train, image in zip((True, False), expected):
        assert torch.equal(dataset(path, images, is_train)[0, 0][0], image)


@pytest.mark.parametrize('stored, listed', [('NFC', 'NFD'), ('NFD', 'NFC')])
def test_file_names_with_accents_are_found_in_either_unicode_form(stored, listed, tmp_path, monkeypatch):
    """An accent may be a part of its letter or a character of its own; the folder may be a relative one."""
    monkeypatch.chdir(tmp_path)
    path, images = write_set(tmp_path, {1: grey(48, 64, 77)}, [THING])
    name = 'Löcher/é.png'
    (images / normalize(stored, name)).parent.mkdir()
    (images / '1.png').rename(images / normalize(stored, name))
    path.write_text(path.read_text().replace('1.png', normalize(listed, name)))
    for folder in (images, 'train2017'):
        assert (dataset(path, folder)[0, 0][0] == 77).all()


@pytest.mark.parametrize('shape, expected', [((90, 130), (44, 64)), ((30, 20), (64, 43)), ((99, 1), (64, 1))])
def test_evaluation_scales_the_long_side_to_the_input_size(shape, expected, tmp_path):
    """Without jitter; Pillow's antialiased bilinear resize is the oracle."""
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    image, target = dataset(*write_set(tmp_path, {8: noise}, []), is_train=False)[0, 0]
    assert image.shape == (3, *expected) and image.dtype == torch.uint8
    assert target == {'image_id': 8, 'size': shape}
    oracle = np.asarray(Image.fromarray(noise).resize(expected[::-1], Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(image.numpy().transpose(1, 2, 0) - oracle).max() <= 1


@pytest.mark.parametrize('is_train', [True, False])
def test_an_image_of_another_size_than_its_annotations_say_is_named(is_train, tmp_path):
    path, images = write_set(tmp_path, {1: grey(20, 30)}, [box_thing(1, 1, 2, 2, 9, 9)])
    Image.fromarray(grey(30, 20)).save(images / '1.png')
    with pytest.raises(models.DataError, match=r'1\.png \(30 high and 20 wide, .* 20 and 30\)'):
        dataset(path, images, is_train)[0, 0]


ANT, BEE = (1, 'ant'), (2, 'bee')
THING, CROWD = box_thing(1, 1, 2, 2, 9, 9), box_thing(1, 1, 2, 2, 9, 9, iscrowd=1)
SPLITS = {
    # objects and categories of both splits, what the line must say
    'other categories': (([THING], [ANT, BEE]), ([THING], [ANT]), 'train2017.json and .*val2017.json'),
    'nothing to learn from': (([CROWD], [ANT]), ([THING], [ANT]), 'train2017.json has no object.* 1 crowds'),
    'nothing to evaluate': (([THING], [ANT]), ([CROWD], [ANT]), 'val2017.json has no object.* 1 crowds'),
}


@pytest.mark.parametrize('case', SPLITS)
def test_splits_that_cannot_train_or_evaluate_are_refused(case, tmp_path):
    *splits, message = SPLITS[case]
    for split, (things, categories) in zip(('train', 'val'), splits):
        write_set(tmp_path, {1: grey(20, 20)}, things, categories, split)
    with pytest.raises(SystemExit, match=message):
        det.build_data(build_args('--data_path', tmp_path))


def test_files_and_folders_that_users_get_wrong_are_named_in_one_line(tmp_path):
    """No or another file, no JSON, JSON of another kind, the wrong image folder, no path at all."""
    path, images = write_set(tmp_path / 'good', {1: grey(20, 20)}, [THING])
    (tmp_path / 'half.json').write_text('{"images": [')
    (tmp_path / 'list.json').write_text('[1, 2]')
    (tmp_path / 'other.json').write_text('{"images": [], "annotations": []}')
    cases = [(images, images, 'train2017'), (path, path, 'no folder'), (path, tmp_path / 'absent', 'absent'),
             ('', '', '--data_path is missing.*--val_annotations')]
    for name in ('absent.json', 'half.json', 'list.json', 'other.json'):
        cases.append((tmp_path / name, images, name))
    for annotations, folder, message in cases:
        with pytest.raises(SystemExit, match=message) as error:
            det.build_data(build_args('--val_annotations', annotations, '--val_images', folder))
        assert len(str(error.value).splitlines()) == 1
    path.write_text(json.dumps({**json.loads(path.read_text()), 'images': [
        {'id': 1, 'file_name': 'absent.png', 'height': 20, 'width': 20}]}))
    with pytest.raises(models.DataError, match=r'train2017/absent\.png'):
        dataset(path, images)[0, 0]


# ---- evaluation ----------------------------------------------------------------------------------

EXAM_CATEGORIES = ((8, 'star'), (1, 'disc'), (3, 'box'), (7, 'none'))  # nothing is of id 7
EXAM_LABELS = {1: 1, 3: 2, 7: 3, 8: 4}  # by hand: ascending ids count from 1
EXAM_SIZES = {70: (240, 320), 3: (320, 240), 100: (300, 300), 42: (200, 400), 5: (330, 170)}  # by image id


def disc(x, y, reach_x, reach_y):
    angles = [k * math.pi / 20 for k in range(40)]
    return [polygon(*((x + reach_x * math.cos(angle), y + reach_y * math.sin(angle)) for angle in angles))]


@pytest.fixture(scope='module')
def exam(tmp_path_factory):
    """Five images, tall, wide and square, of one grey level each, their id; a crowd in 42, nothing in 100."""
    triangle = [polygon((20, 160), (220, 190), (60, 300))]
    shapes = [
        (70, 1, disc(80, 100, 70, 60)), (70, 3, [rectangle(170, 20, 300, 220)]),
        (70, 1, disc(160, 190, 60, 45)), (3, 8, [rectangle(10, 10, 110, 150)]), (3, 3, triangle),
        (42, 1, disc(300, 100, 80, 80)), (5, 8, disc(85, 200, 70, 110)), (5, 8, [rectangle(20, 5, 150, 85)])]
    crowd = np.zeros((200, 400), np.uint8)
    crowd[:, :200] = 1
    things = [shape_thing(number, category, shape, *EXAM_SIZES[number]) for number, category, shape in shapes]
    things.insert(3, shape_thing(42, 1, runs(crowd), 200, 400, iscrowd=1))
    things = [{'id': number, 'iscrowd': 0, **entry} for number, entry in enumerate(things, 1)]
    folder = tmp_path_factory.mktemp('exam')
    pictures = {number: grey(*size, number) for number, size in EXAM_SIZES.items()}
    write_set(folder, pictures, things, EXAM_CATEGORIES, 'val')
    return folder


class Oracle(nn.Module):
    """In the detector's place: gives the file's own objects.

    The one of highest score lies inside the crowd and is none: it does harm unless crowds are ignored.
    """

    def __init__(self, folder, wrong):
        super().__init__()
        self.wrong, self.seen = wrong, []
        self.truth = json.loads((folder / 'annotations/instances_val2017.json').read_text())

    def forward(self, images):
        assert not self.training and not torch.is_grad_enabled()
        return [self.answer(image) for image in images]

    def answer(self, image):
        number = int(image[0, 0, 0])
        self.seen.append(number)
        size, found = EXAM_SIZES[number], []
        for k, entry in enumerate(self.truth['annotations']):
            if entry['image_id'] == number and not entry['iscrowd']:
                x, y, w, h = entry['bbox']
                part = whole_mask(entry['segmentation'], *size)[y:y + h, x:x + w]
                found.append(([x, y, x + w, y + h], EXAM_LABELS[entry['category_id']], 0.9 - 0.01 * k, part))
        if number == 42:
            found.append(([20, 30, 120, 150], 1, 0.99, np.ones((120, 100), np.uint8)))
        if self.wrong == 'nothing':
            found = []
        masks = [Image.fromarray(255 * part).resize((112, 112)) for *_, part in found]
        boxes = torch.tensor([box for box, *_ in found]).reshape(-1, 4).float()
        if self.wrong == 'shifted':
            boxes[:, 0::2] += 0.4 * (boxes[:, 2] - boxes[:, 0])[:, None]
        return {'boxes': boxes * torch.tensor([image.shape[2] / size[1], image.shape[1] / size[0]] * 2),
                'labels': torch.tensor([label for _, label, *_ in found], dtype=torch.int64),
                'scores': torch.tensor([score for _, _, score, _ in found]),
                'masks': torch.tensor(np.array(masks)).reshape(-1, 1, 112, 112) / 255}


def sit(exam, results, wrong=None, **processes):
    """The whole evaluation of an Oracle: (stats, the images that it saw)."""
    args = build_args('--data_path', exam, '--eval', '--results_json', results, **processes)
    _, loader, coco, classes = det.build_data(args)
    assert classes == ['disc', 'box', 'none', 'star']
    oracle = Oracle(exam, wrong).train()
    return det.evaluate(oracle, loader, coco, torch.device('cpu'), args), oracle.seen


def test_the_files_own_objects_score_100_percent(exam, tmp_path, capsys):
    """Boxes and masks of tall, wide and empty images; category ids have gaps; a crowd is no miss."""
    stats, seen = sit(exam, tmp_path / 'results.json')
    assert stats == {**dict.fromkeys(SCORES, pytest.approx(100)), 'test_images': 5}
    assert seen == [70, 3, 100, 42, 5]
    whole = 'AP 100.00 (AP50 100.00, AP75 100.00)'
    assert capsys.readouterr().out.endswith(f'test: box {whole} mask {whole} of 5 images\n')


def test_the_results_file_is_cocos_format_in_original_pixels(exam, tmp_path):
    """--results_json: pycocotools reads it and finds the same AP."""
    stats, _ = sit(exam, tmp_path / 'results.json', 'shifted')
    scores = []
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(exam / 'annotations/instances_val2017.json'))
        found = truth.loadRes(str(tmp_path / 'results.json'))
        for kind in ('bbox', 'segm'):
            evaluation = COCOeval(truth, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            scores += (100 * evaluation.stats[:3]).tolist()
    assert [stats[name] for name in SCORES] == pytest.approx(scores, abs=1e-9)
    assert 0 < stats['test_mask_AP50'] < 50
    results = json.loads((tmp_path / 'results.json').read_text())
    assert len(results) == 9
    for entry in results:
        assert set(entry) == {'image_id', 'category_id', 'bbox', 'score', 'segmentation'}
        assert entry['segmentation']['size'] == list(EXAM_SIZES[entry['image_id']])


def test_nothing_found_is_no_ap_and_an_empty_file(exam, tmp_path):
    nothing, _ = sit(exam, tmp_path / 'nothing.json', 'nothing')
    assert nothing == {**dict.fromkeys(SCORES, 0.0), 'test_images': 5}
    assert json.loads((tmp_path / 'nothing.json').read_text()) == []


@pytest.mark.parametrize('kept', ['no list', 'nothing', 'crowds'])
def test_without_objects_detections_are_written_and_compared_with_nothing(kept, exam, tmp_path, capsys):
    """COCO's test-dev; without --results_json nothing would come of it."""
    content = json.loads((exam / 'annotations/instances_val2017.json').read_text())
    crowds = [entry for entry in content.pop('annotations') if entry['iscrowd']]
    content |= {'no list': {}, 'nothing': {'annotations': []}, 'crowds': {'annotations': crowds}}[kept]
    (tmp_path / 'info.json').write_text(json.dumps(content))
    flags = '--data_path', exam, '--val_annotations', tmp_path / 'info.json', '--eval'
    args = build_args(*flags, '--results_json', tmp_path / 'results.json')
    _, loader, coco, _ = det.build_data(args)
    assert '5 images with 0 objects to evaluate on' in capsys.readouterr().out
    assert det.evaluate(Oracle(exam, None), loader, coco, torch.device('cpu'), args) == {}
    [line] = capsys.readouterr().out.splitlines()
    assert str(tmp_path / 'results.json') in line and 'compare' in line and 'AP' not in line
    sit(exam, tmp_path / 'compared.json')
    assert (tmp_path / 'results.json').read_text() == (tmp_path / 'compared.json').read_text()
    with pytest.raises(SystemExit, match='info.json has no object to evaluate'):
        det.build_data(build_args(*flags))


def plain_paste(mask, box, size):
    """At each pixel's centre, in float64: bilinear between the centres of a map's cells, zero around them."""
    (x0, y0, x1, y1), side, values = box, len(mask), np.zeros(size)
    for row, column in np.ndindex(*size):
        u, v = (column + 0.5 - x0) / (x1 - x0) * side - 0.5, (row + 0.5 - y0) / (y1 - y0) * side - 0.5
        for i, j in itertools.product((math.floor(v), math.floor(v) + 1), (math.floor(u), math.floor(u) + 1)):
            if 0 <= i < side and 0 <= j < side:
                values[row, column] += mask[i][j] * (1 - abs(v - i)) * (1 - abs(u - j))
    return values


@pytest.mark.parametrize('box', [
    [3.3, 2.7, 24.1, 19.9], [-7.6, -4.2, 9.4, 30.8], [20.2, 10.5, 40.9, 23.0], [5.3, 6.2, 6.4, 6.9],
    [0, 0, 31, 23], [-3, -2, 60, 40], [12.5, 4.5, 13.5, 20.5], [0.5, 3, 20, 23], [9, 0, 31, 4]])
def test_masks_are_pasted_as_a_plain_loop_does(box):
    """Inside the image and over its border, larger and smaller than a pixel."""
    for mask in (torch.rand(28, 28, generator=torch.Generator().manual_seed(0)), torch.ones(28, 28)):
        values = plain_paste(mask.tolist(), box, (23, 31))
        counts = det.mask_counts(mask, torch.tensor(box), (23, 31))
        pasted = np.repeat(np.arange(len(counts)) % 2, counts).reshape(31, 23).T  # down the columns
        clear = np.abs(values - 0.5) > 1e-4
        assert clear.mean() > 0.9 and np.array_equal(pasted[clear], values[clear] >= 0.5)
        # as pycocotools counts: no run but the first is empty
        encoded = coco_mask.encode(np.asfortranarray(pasted.astype(np.uint8)))
        assert coco_mask.frPyObjects({'size': [23, 31], 'counts': counts}, 23, 31) == encoded


def test_perfect_targets_make_94_percent_of_mask_ap(tmp_path, monkeypatch):
    """Drawn scenes: the mask head's own targets, read from its gradient, as detections."""
    words = f'--out {tmp_path} --only coco --scene_size 160 --scenes 12 --val_scenes 3 --seed 7'
    toy_data.main(toy_data.get_args_parser().parse_args(words.split()))
    path, draw, results = tmp_path / 'coco/annotations/instances_train2017.json', det.draw_jitter, []
    monkeypatch.setattr(det, 'draw_jitter', lambda *words: (*draw(*words)[:2], False))
    data = dataset(path, tmp_path / 'coco/train2017', size=250, jitter=(1, 1))
    coco, _ = det.read_coco(path, is_train=True)
    category_ids, used = [entry['id'] for entry in coco['categories']], set()
    for entry in coco['annotations']:
        used.add(entry['image_id'])
    for number, image in enumerate(image for image in coco['images'] if image['id'] in used):
        pixels, target = data[0, number]
        chosen, labels = torch.arange(len(target['labels'])), target['labels']
        logits = torch.zeros(len(labels), 1 + len(category_ids), 28, 28, requires_grad=True)
        det.mask_loss(logits, [target['boxes']], [target['masks']], [labels], [chosen]).backward()
        masks = logits.grad[chosen, labels] < 0  # where a larger logit is better
        detection = {**target, 'scores': torch.ones(len(labels)), 'masks': masks[:, None].float()}
        results += det.to_results(
            detection, image['id'], pixels.shape[1:], (image['height'], image['width']), category_ids)
    assert len(results) == len(coco['annotations']) > 30
    assert det.average_precision(coco, results)['test_mask_AP'] >= 94


@pytest.mark.parametrize('world_size', [2, 3, 7])
def test_several_processes_evaluate_like_one(world_size, exam, tmp_path, monkeypatch):
    """Each image belongs to exactly one process; the first gathers all detections and writes the file."""
    gathered, seen = [], []

    def gather_object(results, parts):
        gathered.append(results)
        if parts:
            parts[:] = gathered

    def broadcast_object_list(stats):
        stats[0] = stats[0] or dict.fromkeys(SCORES, 0.0)

    monkeypatch.setattr(det.dist, 'gather_object', gather_object)
    monkeypatch.setattr(det.dist, 'broadcast_object_list', broadcast_object_list)
    for rank in reversed(range(world_size)):  # the first comes last here, when all is gathered
        stats, own = sit(exam, tmp_path / 'together.json', 'shifted', rank=rank, world_size=world_size)
        seen += own
    alone, _ = sit(exam, tmp_path / 'alone.json', 'shifted')
    assert sorted(seen) == sorted(EXAM_SIZES)
    assert stats == alone
    assert (tmp_path / 'together.json').read_text() == (tmp_path / 'alone.json').read_text()


def test_a_detector_overfits_a_few_scenes(tmp_path):
    """From files to AP: red and blue rectangles, one above the other, are found where they were drawn."""
    rng, pictures, things = np.random.default_rng(0), {}, []
    for number in range(1, 5):
        pixels = grey(32, 32, 90)
        for category, colour in ((1, (230, 40, 40)), (2, (40, 60, 230))):
            width, height = rng.integers(9, 12, 2).tolist()
            x, y = int(rng.integers(1, 19)), int(rng.integers(0, 5)) + 16 * (category - 1)
            pixels[y:y + height, x:x + width] = colour
            things.append(box_thing(number, category, x, y, x + width, y + height))
        pictures[number] = pixels
    for split in ('train', 'val'):
        write_set(tmp_path, pictures, things, ((1, 'red'), (2, 'blue')), split)
    run(det, *command(
        det, tmp_path, tmp_path / 'out', '--data_path', tmp_path, '--input_size 32 --batch_size 4 --lr 3e-3',
        '--drop_path 0 --scale_jitter 1 1 --iterations 80 --eval_every 80 --warmup_iterations 10'))
    [line] = log_of(tmp_path / 'out')
    assert line['test_bbox_AP50'] > 50 and line['test_mask_AP50'] > 50
