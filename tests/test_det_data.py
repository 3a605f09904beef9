"""The detection script's data and evaluation: what is read, how images and masks move, and AP.

Oracles are Pillow, pycocotools and torchvision used directly, or values worked out by hand.
"""
import contextlib
import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from conftest import command, log_of, run
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

import models
import specific_distill_det as det

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
    pixels = grey(40, 60, 0)
    pixels[5:15, 25:35, 0] = 255
    things = [
        shape_thing(5, 2, [polygon((0, 0), (24, 0), (0, 14))], 40, 60),  # its box alone reaches the part
        box_thing(5, 7, 0, 0, 20, 40), box_thing(5, 2, 50, 10, 60, 30),  # they touch it
        box_thing(5, 7, 25, 5, 35, 15), box_thing(5, 90, 22, 12, 28, 20), box_thing(5, 2, 0, 0, 60, 40),
        box_thing(5, 90, 45, 25, 59, 39)]
    files = write_set(tmp_path, {5: pixels}, things, ((90, 'last'), (2, 'first'), (7, 'middle')))
    monkeypatch.setattr(det, 'draw_jitter', lambda *_: ((10, 20, 20, 30), (40, 60), flip))
    image, target = dataset(*files)[0, 0]
    boxes = [[10, 0, 30, 10], [4, 4, 16, 20], [0, 0, 60, 40], [50, 30, 60, 40]]
    if flip:
        boxes = [[60 - x1, y0, 60 - x0, y1] for x0, y0, x1, y1 in boxes]
    masks = torch.zeros(4, 40, 60, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes):
        mask[y0:y1, x0:x1] = 1
    assert target['boxes'].tolist() == boxes
    assert target['labels'].tolist() == [2, 3, 1, 3]
    assert torch.equal(target['masks'], masks)
    assert image.dtype == torch.uint8 and image.shape == (3, 40, 60)
    # the red rectangle, away from its blurred border
    x0, y0, x1, y1 = boxes[0]
    assert (image[0, y0:y1 - 2, x0 + 2:x1 - 2] == 255).all() and (image[0, y1 + 2:] == 0).all()
    assert (image[0, :, :x0 - 2] == 0).all() and (image[0, :, x1 + 2:] == 0).all() and (image[1:] == 0).all()


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


@pytest.fixture(scope='module')
def jittered(tmp_path_factory):
    """(what was drawn, image, target) of many draws of one image, label k painted into colour channel k."""
    pixels, things = np.zeros((90, 130, 3), np.uint8), []
    for label, outlines in OUTLINES.items():
        shape = [polygon(*outline) for outline in outlines]
        pixels[..., label - 1] = 255 * whole_mask(shape, 90, 130)
        things.append(shape_thing(3, 10 * label, shape, 90, 130))
    folder = tmp_path_factory.mktemp('jittered')
    files = write_set(folder, {3: pixels}, things, ((30, 'pair'), (10, 'star'), (20, 'box')))
    drawn, draw = [], det.draw_jitter
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(det, 'draw_jitter', lambda *words: drawn.append(draw(*words)) or drawn[-1])
        data = dataset(*files, size=96, jitter=(0.4, 2.6))
        samples = [data[epoch, 0] for epoch in range(150)]
    return list(zip(drawn, *zip(*samples), strict=True))


def grow(mask):
    """The mask and two pixels around it."""
    return F.max_pool2d(mask[None].float(), 5, stride=1, padding=2)[0] > 0


def test_masks_and_pixels_stay_aligned_through_many_draws(jittered):
    """The pixels of an object's colour are those of its mask; no shift by a part of a pixel either."""
    shifts = []
    for (_, size, flip), image, target in jittered:
        assert image.shape[1:] == size
        for label, mask in zip(target['labels'].tolist(), target['masks'] > 0):
            colour = image[label - 1] >= 128
            assert not (mask & ~grow(colour)).any() and not (colour & ~grow(mask)).any()
            if mask.sum() > 100:
                assert (mask & colour).sum() / (mask | colour).sum() > 0.88
                y, x = mask.nonzero().float().mean(0) - colour.nonzero().float().mean(0)
                shifts.append((y.item(), -x.item() if flip else x.item()))
    assert len(shifts) > 300
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.04


def test_masks_are_what_pillow_fills_at_the_new_size(jittered):
    """Outlines moved, scaled and mirrored by hand, filled by another library on a grid 4 times as fine."""
    compared = 0
    for ((top, left, height, width), (new_height, new_width), flip), _, target in jittered:
        for label, mask in zip(target['labels'].tolist(), target['masks'].numpy() > 0):
            fine = Image.new('L', (4 * new_width, 4 * new_height))
            for outline in OUTLINES[label]:
                moved = (np.array(outline) - (left, top)) * (new_width / width, new_height / height)
                if flip:
                    moved[:, 0] = new_width - moved[:, 0]
                ImageDraw.Draw(fine).polygon((4 * moved - 0.5).ravel().tolist(), fill=255)
            expected = np.asarray(fine.reduce(4)) >= 128
            if expected.sum() > 250:
                compared += 1
                assert (expected & mask).sum() / (expected | mask).sum() > 0.82
    assert compared > 100


def test_boxes_are_tight_around_their_masks_with_the_last_pixel_inside(jittered):
    for _, _, target in jittered:
        if len(target['masks']):
            last_pixel_out = torchvision.ops.masks_to_boxes(target['masks'])
            assert torch.equal(target['boxes'], last_pixel_out + torch.tensor([0, 0, 1, 1]))
    corners = torch.zeros(2, 5, 7, dtype=torch.uint8)
    corners[0, 4, 6] = corners[1, 0, 0] = 1
    assert det.masks_to_boxes(corners).tolist() == [[6, 4, 7, 5], [0, 0, 1, 1]]


SHAPE = np.zeros((37, 53), np.uint8)
SHAPE[5:20, 10:40] = SHAPE[15:33, 30:50] = 1
SEGMENTATIONS = {
    'overlapping polygons': [rectangle(2, 6, 30, 20), rectangle(20, 10, 50, 35), rectangle(0, 30, 9, 37)],
    'polygons beyond the image': [rectangle(-5, -4, 12, 9), rectangle(45, 30, 60, 44)],
    'run lengths': runs(SHAPE), 'compressed run lengths': compressed(SHAPE),
}


@pytest.mark.parametrize('name', SEGMENTATIONS)
def test_a_decoded_crop_is_that_part_of_pycocotools_mask(name):
    whole = whole_mask(SEGMENTATIONS[name], 37, 53)
    assert np.array_equal(whole, SHAPE) or 'polygons' in name
    for top, left, height, width in ((0, 0, 37, 53), (5, 9, 20, 31), (30, 45, 7, 8), (0, 20, 1, 1)):
        crop = det.decode_mask(SEGMENTATIONS[name], (37, 53), top, left, height, width)
        assert crop.dtype == np.uint8
        assert np.array_equal(crop, whole[top:top + height, left:left + width])


# ---- what is read --------------------------------------------------------------------------------


def test_annotations_get_ids_areas_and_crowd_flags_and_categories_are_sorted(tmp_path):
    """A file's own ids do not matter: pycocotools takes a match with id 0 for none."""
    things = [box_thing(4, 9, 2, 3, 12, 10, id=0, keypoints=[1, 2]), box_thing(4, 2, 0, 0, 5, 5, area=20.5),
              {**box_thing(4, 2, 0, 0, 30, 20, iscrowd=1), 'segmentation': runs(np.ones((20, 30)))}]
    path, _ = write_set(tmp_path, {4: grey(20, 30)}, things, ((9, 'ant'), (2, 'bee')))
    coco, left_out = det.read_coco(path, is_train=False)
    assert [entry['id'] for entry in coco['annotations']] == [1, 2, 3] and not left_out
    assert [entry['area'] for entry in coco['annotations']] == [70, 20.5, 600]
    assert [entry['iscrowd'] for entry in coco['annotations']] == [0, 0, 1]
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
    assert target['masks'].sum((1, 2)).tolist() == [7 * 8, 4 * 4]
    assert target['boxes'][:, 1::2].tolist() == [[3, 11], [4, 8]]
    loader, val_loader, coco, classes = det.build_data(build_args('--data_path', tmp_path))
    line = capsys.readouterr().out
    assert '1 of 5 images' in line and '2 of 7 objects used' in line and '5 images to evaluate on' in line
    for words in ('2 crowds', '2 without a polygon', '1 with an empty box'):
        assert words in line
    assert len(coco['annotations']) == 5 and classes == ['ant', 'bee']
    assert [target['image_id'] for _, targets in val_loader for target in targets] == [1, 2, 3, 4, 5]


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
    'nothing to learn from': (([CROWD], [ANT]), ([THING], [ANT]), "train2017.json has no object.*'crowds'"),
    'nothing to evaluate': (([THING], [ANT]), ([CROWD], [ANT]), 'val2017.json has no object to evaluate'),
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
        if self.wrong == 'nothing' or (self.wrong == 'missing' and number in (70, 42)):
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
    assert 0 < stats['test_mask_AP50'] < 100
    results = json.loads((tmp_path / 'results.json').read_text())
    assert len(results) == 9
    for entry in results:
        assert set(entry) == {'image_id', 'category_id', 'bbox', 'score', 'segmentation'}
        assert entry['segmentation']['size'] == list(EXAM_SIZES[entry['image_id']])


def test_objects_that_are_missed_or_shifted_cost_ap(exam, tmp_path):
    """Discs are missed, one of two boxes is found: recall 0.5 at precision 1; both stars are."""
    missing, _ = sit(exam, tmp_path / 'missing.json', 'missing')
    for name in SCORES:
        assert missing[name] == pytest.approx(100 * (0 + 51 / 101 + 1) / 3, rel=1e-6)
    shifted, _ = sit(exam, tmp_path / 'shifted.json', 'shifted')
    assert shifted['test_bbox_AP'] < 20 and shifted['test_mask_AP'] < 20
    nothing, _ = sit(exam, tmp_path / 'nothing.json', 'nothing')
    assert nothing == {**dict.fromkeys(SCORES, 0.0), 'test_images': 5}
    assert json.loads((tmp_path / 'nothing.json').read_text()) == []


def test_ap_of_a_small_case_by_hand():
    """Found, false, found, in order of score: precision 1 up to recall 1/2, then 2/3, at 101 points."""
    things = [box_thing(1, 1, 4, 4, 24, 24), box_thing(1, 1, 34, 34, 60, 60)]
    images = [{'id': 1, 'file_name': 'a.png', 'height': 64, 'width': 64}]
    annotations = [{'id': k, 'iscrowd': 0, 'area': 400, **entry} for k, entry in enumerate(things, 1)]
    coco = {'images': images, 'annotations': annotations, 'categories': [{'id': 1, 'name': 'ant'}]}
    boxes = torch.tensor([[4.0, 2, 24, 12], [40, 2, 60, 12], [34, 17, 60, 30]])  # at half the height
    detection = {'boxes': boxes, 'labels': torch.tensor([1, 1, 1]), 'scores': torch.tensor([0.9, 0.8, 0.7]),
                 'masks': torch.ones(3, 1, 28, 28)}
    stats = det.average_precision(coco, det.to_results(detection, 1, (32, 64), (64, 64), [1]))
    for name in ('test_bbox_AP50', 'test_mask_AP50', 'test_bbox_AP'):
        assert stats[name] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)


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
        '--drop_path 0 --scale_jitter 1 1 --iterations 120 --eval_every 120 --warmup_iterations 10'))
    [line] = log_of(tmp_path / 'out')
    assert line['test_bbox_AP50'] > 50 and line['test_mask_AP50'] > 50
