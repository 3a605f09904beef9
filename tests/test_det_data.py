"""The detection script's data, evaluation and runs: what is read and refused, how images and masks move, AP, resume.

Oracles are Pillow, numpy, pycocotools and torchvision used directly, or values worked out by hand. What may kill the
process (pycocotools on damaged annotations) runs in a forked one. Two processes are started once, for all their tests.
"""
import contextlib
import copy
import io
import json
import math
import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy_data
from PIL import Image, ImageDraw
from conftest import CLOCK, assert_same_bits, checkpoint_of, contents, environment, leaves, log_of, without_clock
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torchvision.ops import masks_to_boxes as inclusive_boxes

import models
import specific_distill_det as det

ROOT = Path(__file__).resolve().parents[1]
TINY = ('--model', 'vit_pico_patch8', '--teacher_model', 'vit_pico_patch8', '--input_size', '64', '--window_size', '4',
        '--fpn_dim', '16', '--head_dim', '32', '--anchor_size', '8', '--proposals', '20', '--roi_batch', '16',
        '--batch_size', '2', '--iterations', '4', '--eval_every', '2', '--warmup_iterations', '1', '--lr', '1e-3',
        '--num_workers', '0', '--device', 'cpu')
SCORES = [f'test_{kind}_{name}' for kind in ('bbox', 'mask') for name in ('AP', 'AP50', 'AP75')]


# ------------------------------------------------------------------------------------------------------------- helpers


def command(out, *flags):
    return [str(flag) for flag in ('--output_dir', out, *TINY, *flags)]


def parse(out, *flags):
    return det.get_args_parser().parse_args(command(out, *flags))


def run(out, *flags):
    return det.main(parse(out, *flags))


def run_as_script(monkeypatch, out, *flags):
    """The script's last lines, too: what it prints as an error and ends with."""
    monkeypatch.setattr(sys, 'argv', [det.__file__, *command(out, *flags)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(det.__file__, run_name='__main__')
    return stop.value.code


def in_child(function, *given, timeout=60):
    """('returned', value), ('refused', message), ('raised', text) or ('died', code, last note) from a forked process.

    function: called with `note`, which keeps a word on how far it came, and with what is given.
    """
    if 'fork' not in multiprocessing.get_all_start_methods():
        pytest.skip('needs fork')
    context = multiprocessing.get_context('fork')
    receiver, sender = context.Pipe(duplex=False)

    def work():
        with contextlib.suppress(ImportError, OSError, ValueError):  # damaged annotations may ask for all the memory
            import resource
            pages = int(Path('/proc/self/statm').read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (2 << 30),) * 2)
        try:
            answer = ('returned', function(lambda *words: sender.send(('note', *words)), *given))
        except models.InputError as error:
            answer = ('refused', str(error))
        except BaseException as error:
            answer = ('raised', repr(error))
        sender.send(answer)

    process, last = context.Process(target=work), None
    process.start()
    sender.close()
    try:
        while receiver.poll(timeout):
            answer = receiver.recv()
            if answer[0] != 'note':
                return answer
            last = answer[1:]
        return 'hangs', last
    except EOFError:
        process.join()
        return 'died', process.exitcode, last
    finally:
        if process.is_alive():
            process.join(1)
            process.kill()
        process.join()


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
    """pycocotools' own mask of the whole image, as COCO.annToMask makes it."""
    truth = COCO()
    truth.imgs = {0: {'height': height, 'width': width}}
    return truth.annToMask({'image_id': 0, 'segmentation': segmentation})


def pillow_mask(polygons, height, width, fine=8):
    """Polygons filled by Pillow on a grid eight times as fine: pixels at least half inside."""
    image = Image.new('L', (width * fine, height * fine))
    for corners in polygons:
        ImageDraw.Draw(image).polygon([(x * fine - 0.5, y * fine - 0.5) for x, y in corners], fill=255)
    return np.asarray(image.reduce(fine)) >= 128


def thing(image_id, category_id, segmentation, bbox, **more):
    return {'image_id': image_id, 'category_id': category_id, 'segmentation': segmentation, 'bbox': bbox, 'iscrowd': 0,
            'area': 50.0, **more}


def box_thing(image_id, category_id, x0, y0, x1, y1, **more):
    return thing(image_id, category_id, [rectangle(x0, y0, x1, y1)], [x0, y0, x1 - x0, y1 - y0], **more)


def write_set(folder, pictures, annotations, categories=((1, 'ant'),), split='train'):
    """A COCO-format split: pictures as {image id: (file name, (H, W, 3) array)}; returns (JSON, image folder)."""
    images, place = [], folder / f'{split}2017'
    for number, (name, pixels) in pictures.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / name)
        images.append({'id': number, 'file_name': name, 'height': pixels.shape[0], 'width': pixels.shape[1]})
    content = {'images': images, 'annotations': [{'id': k, **entry} for k, entry in enumerate(annotations, 1)],
               'categories': [{'id': number, 'name': name} for number, name in categories]}
    path = folder / f'annotations/instances_{split}2017.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path, place


def grey(height, width, level=100):
    return np.full((height, width, 3), level, np.uint8)


def dataset(path, images, is_train=True, size=64, jitter=(0.1, 2.0), seed=0):
    args = SimpleNamespace(input_size=[size, size], seed=seed, scale_jitter=list(jitter))
    return det.CocoDataset(det.read_coco(path, images), images, args, is_train)


def fixed_jitter(monkeypatch, part, new_size, flip):
    monkeypatch.setattr(det, 'draw_jitter', lambda *_: (part, new_size, flip))


def ready(args):
    """Arguments as `main` has them before `build_data`, for one process."""
    args.rank, args.world_size, args.distributed, args.input_size = 0, 1, False, args.input_size * 2
    det.resolve_recipe(args)
    return args


# ------------------------------------------------------------------------------------------------------------ fixtures


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    """Drawn scenes: 8 to train, 5 (an odd number) to validate; image 1 has no object, image 2 a crowd."""
    folder = tmp_path_factory.mktemp('toy')
    toy_data.main(toy_data.get_args_parser().parse_args(
        ['--out', str(folder), '--only', 'coco', '--scenes', '8', '--val_scenes', '5', '--scene_size', '96']))
    return folder / 'coco'


def truth_of(toy, split):
    return json.loads((toy / f'annotations/instances_{split}2017.json').read_text())


# -------------------------------------------------------------------------------------------------------------- jitter


def is_uniform(draws, low, high):
    """Kolmogorov-Smirnov: a true uniform is refused once in 1,000 times."""
    draws, count = np.sort((np.array(draws) - low) / (high - low)), len(draws)
    steps = np.arange(count + 1) / count
    return max((steps[1:] - draws).max(), (draws - steps[:-1]).max()) < 1.95 / math.sqrt(count)


def draw_many(height, width, size, scale_range, count=3000):
    np.random.seed(1)
    return [det.draw_jitter(height, width, size, scale_range) for _ in range(count)]


SHAPES = pytest.mark.parametrize(('height', 'width'), [(480, 640), (640, 480), (1500, 200), (200, 1500), (600, 600)])


@SHAPES
def test_the_long_side_is_scaled_to_the_input_size_times_a_uniform_factor(height, width):
    """Recipe: large-scale jitter 0.1 to 2.0 of the input size, one factor for both sides."""
    long, factors = max(height, width), []
    for (_, _, *part), new, _ in draw_many(height, width, 1024, (0.1, 2.0)):
        axis = int(width > height)
        factor = new[axis] / part[axis] * long / 1024
        factors.append(factor)
        scale = factor * 1024 / long
        for old, made in zip(part, new):  # both sides, to the rounding of the new one and of the part
            assert abs(made - scale * old) <= 0.51 + 0.51 * scale + 0.006 * made
    assert 0.098 < min(factors) < 0.105 and 1.99 < max(factors) < 2.01
    assert is_uniform(factors, 0.1, 2.0)


@SHAPES
def test_the_part_lies_in_the_image_and_no_side_exceeds_the_input_size(height, width):
    """Recipe: crop to the input size; what fits stays whole, on each side by itself."""
    cut = np.zeros((2, 2), int)
    for (top, left, part_height, part_width), new, flip in draw_many(height, width, 1024, (0.1, 2.0)):
        assert all(type(value) is int for value in (top, left, part_height, part_width, *new)) and type(flip) is bool
        for axis, (start, length, side) in enumerate(((top, part_height, height), (left, part_width, width))):
            assert start >= 0 and length >= 1 and start + length <= side
            assert 1 <= new[axis] <= 1024
            if new[axis] < 1024:
                assert (start, length) == (0, side)
            cut[axis, int(length < side)] += 1
    assert cut[int(width > height)].min() > 1000  # the long side is cut by about half of the factors
    if min(height, width) == 200:
        assert cut[int(height > width), 1] == 0  # 2 x 1024 x 200 / 1500 fits


@pytest.mark.parametrize(('height', 'width'), [(480, 640), (640, 480)])
def test_crops_start_anywhere_and_half_of_the_images_are_flipped(height, width):
    """Recipe: random crop, uniform and independent on both sides; flip."""
    drawn = draw_many(height, width, 1024, (2.0, 2.0))
    # scaled to 2048 x 1536, so 1024 pixels are a half and two thirds of the sides
    spans = [side - round(1024 * max(height, width) / 2048) for side in (height, width)]
    starts = np.array([part[:2] for part, _, _ in drawn])
    assert starts.min(0).tolist() == [0, 0] and starts.max(0).tolist() == spans
    jitter = np.random.default_rng(0).uniform(-0.5, 0.5, starts.shape)  # undoes the rounding
    for axis in (0, 1):
        assert is_uniform((starts + jitter)[:, axis].clip(0, spans[axis]), 0, spans[axis])
    flips = np.array([flip for _, _, flip in drawn])
    assert abs(flips.mean() - 0.5) < 0.03
    assert np.abs(np.corrcoef(np.column_stack([starts, flips]).T)[np.triu_indices(3, 1)]).max() < 0.06


def test_a_thin_or_tiny_image_keeps_at_least_a_pixel():
    """Recipe: jitter down to a tenth leaves no empty image."""
    for height, width in ((1, 900), (900, 1), (1, 1), (3, 700)):
        for (top, left, *part), new, _ in draw_many(height, width, 64, (0.1, 2.0), 300):
            assert min(part) >= 1 and min(new) >= 1 and max(new) <= 64
            assert top + part[0] <= height and left + part[1] <= width


# ----------------------------------------------------------------------------------------------------- boxes and masks


@pytest.fixture
def rectangles(tmp_path):
    """One image 40 high, 60 wide; the part (10, 20, 20, 30) of it, enlarged twice, is worked out below."""
    pixels = grey(40, 60, 0)
    pixels[5:15, 25:35, 0] = 255
    objects = [box_thing(5, 7, 25, 5, 35, 15), box_thing(5, 90, 22, 12, 28, 20), box_thing(5, 7, 0, 0, 20, 40),
               box_thing(5, 2, 50, 10, 60, 30), box_thing(5, 2, 30, 30, 40, 40), box_thing(5, 2, 0, 0, 60, 40),
               box_thing(5, 90, 45, 25, 59, 39)]
    return write_set(tmp_path, {5: ('a.png', pixels)}, objects, ((90, 'last'), (2, 'first'), (7, 'middle')))


# in pixels of the new image, 40 high and 60 wide: (box, label); three objects only touch the part and are gone
EXPECTED = [((10, 0, 30, 10), 2), ((4, 4, 16, 20), 3), ((0, 0, 60, 40), 1), ((50, 30, 60, 40), 3)]


@pytest.mark.parametrize('flip', [False, True])
def test_boxes_masks_and_labels_follow_the_crop_and_the_flip(flip, rectangles, monkeypatch):
    """Training targets: rectangles with whole corners, cut, doubled and mirrored by hand; file ids become 1 to C."""
    fixed_jitter(monkeypatch, (10, 20, 20, 30), (40, 60), flip)
    image, target = dataset(*rectangles)[0, 0]
    boxes = [(60 - x1, y0, 60 - x0, y1) if flip else (x0, y0, x1, y1) for (x0, y0, x1, y1), _ in EXPECTED]
    masks = np.zeros((4, 40, 60), np.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes):
        mask[y0:y1, x0:x1] = 1
    assert target['boxes'].tolist() == [list(box) for box in boxes]
    assert target['labels'].tolist() == [label for _, label in EXPECTED]
    assert np.array_equal(target['masks'].numpy(), masks)
    dtypes = {key: value.dtype for key, value in target.items()}
    assert dtypes == {'boxes': torch.float32, 'labels': torch.int64, 'masks': torch.uint8}
    assert image.dtype == torch.uint8 and image.shape == (3, 40, 60)
    # the red rectangle, away from its blurred border
    x0, y0, x1, y1 = boxes[0]
    assert (image[0, y0:y1 - 2, x0 + 2:x1 - 2] == 255).all() and (image[0, y1 + 2:] == 0).all()
    assert (image[0, :, :x0 - 2] == 0).all() and (image[0, :, x1 + 2:] == 0).all() and (image[1:] == 0).all()


def test_only_the_masks_that_the_crop_can_hold_are_decoded_and_only_at_its_size(rectangles, monkeypatch):
    """Training targets: objects cut off entirely cost nothing, and polygons are filled on the crop alone."""
    decoded, sizes = [], []
    decode, fill = det.decode_mask, coco_mask.frPyObjects
    monkeypatch.setattr(det, 'decode_mask', lambda shape, *rest: decoded.append(shape) or decode(shape, *rest))
    monkeypatch.setattr(coco_mask, 'frPyObjects', lambda shape, *size: sizes.append(size) or fill(shape, *size))
    fixed_jitter(monkeypatch, (10, 20, 20, 30), (40, 60), False)
    dataset(*rectangles)[0, 0]
    expected = [(25, 5, 35, 15), (22, 12, 28, 20), (0, 0, 60, 40), (45, 25, 59, 39)]
    assert decoded == [[rectangle(*corners)] for corners in expected]
    assert sizes == [(20, 30)] * 4


def test_a_crop_without_objects_gives_empty_targets(tmp_path, monkeypatch):
    """Training targets: all cut off is (0, 4), (0,), (0, h, w); so is a shape whose box alone reaches the crop."""
    corner = [polygon((0, 0), (40, 0), (0, 40))]  # its box covers the image, its pixels do not
    objects = [box_thing(1, 1, 0, 0, 5, 5), thing(1, 1, corner, [0, 0, 40, 40])]
    files = write_set(tmp_path, {1: ('a.png', grey(40, 40))}, objects)
    for flip in (False, True):
        fixed_jitter(monkeypatch, (25, 30, 15, 10), (30, 20), flip)
        image, target = dataset(*files)[0, 0]
        assert image.shape == (3, 30, 20)
        assert {key: (tuple(value.shape), value.dtype) for key, value in target.items()} == {
            'boxes': ((0, 4), torch.float32), 'labels': ((0,), torch.int64), 'masks': ((0, 30, 20), torch.uint8)}


# a star, a slanted box and a pair of triangles, disjoint, with corners between pixels
STAR = [(40 + reach * math.cos(0.3 + 0.628318 * k), 38 + reach * math.sin(0.3 + 0.628318 * k))
        for k, reach in enumerate((30.3, 14.2) * 5)]
BOX = [(80.4, 12.7), (120.2, 20.1), (115.9, 44.3), (76.1, 36.9)]
PAIR = [[(78.3, 55.2), (98.7, 57.1), (84.9, 80.6)], [(104.2, 84.3), (125.7, 50.9), (126.3, 83.8)]]
OUTLINES = {1: [STAR], 2: [BOX], 3: PAIR}  # by label; label k is painted into colour channel k


@pytest.fixture(scope='module')
def jittered(tmp_path_factory):
    """Many draws of one image whose colours tell the objects: (what was drawn, image, target) of each."""
    folder, colours, objects = tmp_path_factory.mktemp('jittered'), np.zeros((90, 130, 3), np.uint8), []
    for label, outlines in OUTLINES.items():
        shape = [polygon(*outline) for outline in outlines]
        mask = whole_mask(shape, 90, 130)
        colours[..., label - 1] = 255 * mask
        rows, columns = np.nonzero(mask)
        bbox = [int(v) for v in (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)]
        objects.append(thing(3, {1: 11, 2: 44, 3: 90}[label], shape, bbox))
    files = write_set(folder, {3: ('a.png', colours)}, objects, ((90, 'pair'), (11, 'star'), (44, 'box')))
    drawn, draw = [], det.draw_jitter
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(det, 'draw_jitter', lambda *given: drawn.append(draw(*given)) or drawn[-1])
        samples = [dataset(*files, size=96, jitter=(0.4, 2.6))[epoch, 0] for epoch in range(150)]
    return [(*words, *sample) for words, sample in zip(drawn, samples, strict=True)]


def grow(mask, reach):
    return nn.functional.max_pool2d(mask[None, None].float(), 2 * reach + 1, stride=1, padding=reach)[0, 0] > 0


def test_image_and_masks_stay_aligned_through_many_draws(jittered):
    """Training targets: the pixels that carry an object's colour are those of its mask, within a pixel."""
    shifts, seen = [], 0
    for _, new, flip, image, target in jittered:
        assert image.shape[1:] == new
        labels = target['labels'].tolist()
        assert labels == sorted(set(labels))
        for label in OUTLINES:
            colour = image[label - 1] >= 128
            if label not in labels:
                assert colour.sum() <= 8  # no more than a sliver at the border
                continue
            mask = target['masks'][labels.index(label)] > 0
            seen += 1
            beyond = [((mask & ~grow(colour, reach)) | (colour & ~grow(mask, reach))).sum() for reach in (1, 2)]
            # a pixel of the file is up to two of the image, whose colours are blurred at the tips of the star
            assert beyond[0] <= 6 and beyond[1] == 0
            if mask.sum() > 100:
                assert (mask & colour).sum() / (mask | colour).sum() > 0.88
                centres = [points.nonzero().float().mean(0) for points in (mask, colour)]
                shifts.append(((centres[0] - centres[1]) * torch.tensor([1, -1 if flip else 1])).tolist())
    assert seen > 300 and len(shifts) > 300
    # (y, x) in the file's direction: no systematic shift, not by a part of a pixel either
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.04


def test_masks_are_what_pillow_fills_at_the_new_size(jittered):
    """Training targets: polygons, moved, scaled and mirrored by hand, rasterised by another library."""
    compared = 0
    for (top, left, height, width), (new_height, new_width), flip, _, target in jittered:
        for label, mask in zip(target['labels'].tolist(), target['masks'].numpy()):
            moved = [[((x - left) * new_width / width, (y - top) * new_height / height) for x, y in outline]
                     for outline in OUTLINES[label]]
            moved = [[(new_width - x if flip else x, y) for x, y in outline] for outline in moved]
            expected = pillow_mask(moved, new_height, new_width, fine=4)
            if expected.sum() > 250:
                compared += 1
                assert (expected & (mask > 0)).sum() / (expected | (mask > 0)).sum() > 0.82
    assert compared > 100


def test_boxes_are_tight_around_their_masks(jittered):
    """Training targets: after the jitter a box is its mask's, the last pixel inside (torchvision's exclude it)."""
    for *_, target in jittered:
        if len(target['masks']):
            expected = inclusive_boxes(target['masks']) + torch.tensor([0, 0, 1, 1])
            assert torch.equal(target['boxes'], expected)
        assert set(target['masks'].unique().tolist()) <= {0, 1}
        assert target['masks'].flatten(1).any(1).all()
    masks = torch.zeros(4, 5, 7, dtype=torch.uint8)
    masks[0, 4, 6] = masks[1, 0, 0] = masks[2, 1, 2] = masks[2, 3, 5] = 1
    masks[3] = 1
    assert det.masks_to_boxes(masks).tolist() == [[6, 4, 7, 5], [0, 0, 1, 1], [2, 1, 6, 4], [0, 0, 7, 5]]


SHAPE = np.zeros((37, 53), np.uint8)
SHAPE[5:20, 10:40] = SHAPE[15:33, 30:50] = 1
SHAPE[8:12, 14:20] = 0
SEGMENTATIONS = {
    'polygon': [rectangle(12, 6, 40, 30)],
    'overlapping polygons': [rectangle(2, 6, 30, 20), rectangle(20, 10, 50, 35), rectangle(0, 30, 9, 37)],
    'polygons beyond the image': [rectangle(-5, -4, 12, 9), rectangle(45, 30, 60, 44)],
    'uncompressed': runs(SHAPE), 'compressed': compressed(SHAPE),
    'full': runs(np.ones((37, 53), np.uint8)), 'empty': compressed(np.zeros((37, 53))),
}


@pytest.mark.parametrize('name', SEGMENTATIONS)
def test_a_decoded_crop_is_that_part_of_the_whole_mask(name):
    """decode_mask: polygons and both kinds of run lengths, as pycocotools decodes them for the whole image."""
    shape = SEGMENTATIONS[name]
    whole = whole_mask(shape, 37, 53)
    if name in ('uncompressed', 'compressed'):
        assert np.array_equal(whole, SHAPE)
    assert np.array_equal(det.decode_mask(shape, 37, 53), whole)
    for top, left, height, width in (
            (0, 0, 37, 53), (5, 9, 20, 31), (30, 45, 7, 8), (0, 20, 1, 1), (12, 0, 25, 53), (3, 3, 4, 50)):
        crop = det.decode_mask(shape, 37, 53, top, left, height, width)
        assert crop.dtype == np.uint8 and crop.shape == (height, width)
        assert np.array_equal(crop, whole[top:top + height, left:left + width])


def test_slanted_polygons_are_cropped_to_the_pixel():
    """decode_mask: moving a polygon instead of cutting its mask differs in pixels of its border alone, and rarely."""
    rng, differing, total = np.random.default_rng(0), 0, 0
    for _ in range(300):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 7))
        corners = rng.uniform(10, 45, 2) + rng.uniform(5, 30) * np.stack([np.cos(angles), np.sin(angles)], 1)
        shape = [corners.ravel().tolist()]
        top, left = (int(value) for value in rng.integers(0, 20, 2))
        crop = det.decode_mask(shape, 50, 60, top, left, 30, 40)
        whole = whole_mask(shape, 50, 60)
        border = (grow(torch.tensor(whole), 1) & grow(torch.tensor(1 - whole), 1)).numpy()
        part, border = (mask[top:top + 30, left:left + 40] for mask in (whole, border))
        assert not ((crop != part) & ~border).any()
        differing, total = differing + (crop != part).sum(), total + part.sum()
    assert total > 10000 and differing < 0.002 * total


def test_polygons_of_fewer_than_three_corners_are_ignored(tmp_path, monkeypatch):
    """read_coco: a point or a line has no area, and pycocotools would raise; what has nothing else is left out."""
    fixed_jitter(monkeypatch, (0, 0, 20, 30), (20, 30), False)
    good = rectangle(3, 2, 9, 8)
    shapes = ([good], [[1.0, 2.0], good], [[1.0, 2.0, 5.0, 6.0], [], good], [good, [1, 2, 3, 4]])
    nothing = ([[]], [[1, 2]], [[1.0, 2.0, 3.0, 4.0]])
    objects = [thing(1, 1, shape, [3, 2, 6, 6]) for shape in (*nothing, *shapes, *nothing)]
    files = write_set(tmp_path, {1: ('a.png', grey(20, 30))}, objects)
    expected = np.zeros((20, 30), np.uint8)
    expected[2:8, 3:9] = 1
    assert np.array_equal(dataset(*files)[0, 0][1]['masks'].numpy(), np.stack([expected] * 4))
    assert len(det.read_coco(*files)[1][1]) == 4


# ------------------------------------------------------------------------------------------------------------- dataset


def test_crowds_and_images_without_other_objects_are_left_out_of_training_only(toy):
    """Recipe: crowd objects and images without others dropped in training; evaluation sees every image."""
    for split in ('train', 'val'):
        truth = truth_of(toy, split)
        with_objects = [image['id'] for image in truth['images'] if any(
            entry['image_id'] == image['id'] and not entry['iscrowd'] for entry in truth['annotations'])]
        assert 1 not in with_objects and any(entry['iscrowd'] for entry in truth['annotations'])
        files = toy / f'annotations/instances_{split}2017.json', toy / f'{split}2017'
        train, val = dataset(*files), dataset(*files, is_train=False)
        assert [train.read(index)[0]['id'] for index in range(len(train))] == with_objects
        assert [val[0, index][1]['image_id'] for index in range(len(val))] == [image['id'] for image in truth['images']]


def test_neither_crowds_nor_degenerate_boxes_are_trained_on(tmp_path):
    """Recipe: crowds, and boxes without width or height, are no targets; an image that has nothing else is left out."""
    crowd = {'segmentation': runs(np.ones((20, 20), np.uint8)), 'bbox': [0, 0, 20, 20], 'iscrowd': 1}
    flat = {'bbox': [3, 3, 0, 9]}
    objects = [box_thing(1, 1, 2, 3, 9, 11), *({**box_thing(number, 2, 0, 0, 9, 9), **what} for number, what in (
        (1, crowd), (1, flat), (2, crowd), (3, flat), (4, {'bbox': [3, 3, 4, -1]})))]
    pictures = {number: (f'{number}.png', grey(20, 20)) for number in (1, 2, 3, 4, 5)}
    files = write_set(tmp_path, pictures, objects, ((1, 'ant'), (2, 'bee')))
    train = dataset(*files, size=20, jitter=(1, 1))
    assert len(train) == 1 and len(dataset(*files, is_train=False)) == 5
    image, target = train[0, 0]
    assert target['labels'].tolist() == [1] and target['masks'].sum() == 7 * 8
    assert target['boxes'][:, 1::2].tolist() == [[3, 11]]
    assert image.shape == (3, 20, 20)


@pytest.mark.parametrize(('shape', 'expected'), [((90, 130), (44, 64)), ((130, 90), (64, 44)), ((30, 20), (64, 43)),
                                                 ((64, 64), (64, 64)), ((300, 2), (64, 1))])
def test_evaluation_scales_the_long_side_to_the_input_size_without_jitter(shape, expected, tmp_path):
    """Recipe: test with the long side at the input size; Pillow's antialiased bilinear is the oracle."""
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    files = write_set(tmp_path, {8: ('a.png', noise)}, [box_thing(8, 1, 0, 0, 2, 2)])
    data = dataset(*files, is_train=False)
    image, target = data[0, 0]
    assert tuple(image.shape) == (3, *expected) and image.dtype == torch.uint8
    assert target == {'image_id': 8, 'size': shape}
    oracle = np.asarray(Image.fromarray(noise).resize(expected[::-1], Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(image.numpy().transpose(1, 2, 0) - oracle).max() <= 1
    assert torch.equal(data[7, 0][0], image)


def test_a_sample_depends_on_seed_pass_and_index_alone(toy):
    """Randomness: what a sample gets is a function of (seed, pass, index), whatever was drawn before."""
    files = toy / 'annotations/instances_train2017.json', toy / 'train2017'
    data = dataset(*files)
    first = dict(leaves(data[3, 2]))
    torch.manual_seed(9)
    np.random.seed(9)
    data[0, 4]
    again, others = dict(leaves(data[3, 2])), [dict(leaves(sample)) for sample in (
        data[4, 2], dataset(*files, seed=1)[3, 2])]
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    for other in others:
        assert first['/0'].shape != other['/0'].shape or not torch.equal(first['/0'], other['/0'])
    # two samples of one pass do not share their draws either: the factor of the scale is another
    assert len({data[5, index][0].shape for index in range(len(data))}) > 3


def test_worker_processes_change_nothing(toy):
    """Randomness: the number of workers changes nothing, over several rounds of one loader either."""
    streams = []
    for workers in (0, 2):
        args = ready(parse('none', '--data_path', toy, '--num_workers', workers))
        loader, val_loader, _, _ = det.build_data(args)
        stream = []
        for loader.sampler.epoch in (0, 1):
            stream += list(loader)
        assert len(stream) == 4 and all(len(images) == len(targets) == 2 for images, targets in stream)
        streams.append(dict(leaves([stream, list(val_loader)])))
    assert list(streams[0]) == list(streams[1])
    for name, value in streams[0].items():
        assert torch.equal(value, streams[1][name]) if isinstance(value, torch.Tensor) else value == streams[1][name]


def damage(folder, how, split='train'):
    """Spoils the third image of a copy of the toy set; returns its path."""
    path = folder / f'{split}2017/000000000003.jpg'
    if how == 'truncated':
        path.write_bytes(path.read_bytes()[:600])
    elif how == 'text':
        path.write_text('<html>404</html>')
    elif how == 'empty':
        path.write_bytes(b'')
    else:
        path.unlink()
        path.mkdir()
    return path


@pytest.mark.parametrize('how', ['truncated', 'text', 'empty', 'folder'])
def test_an_unreadable_image_is_named_in_one_line(how, toy, tmp_path):
    """One bad file: it stops the run and is named."""
    shutil.copytree(toy, tmp_path, dirs_exist_ok=True)
    path = damage(tmp_path, how)
    for is_train in (True, False):
        data = dataset(tmp_path / 'annotations/instances_train2017.json', tmp_path / 'train2017', is_train)
        with pytest.raises(models.InputError, match=f'^cannot read {re.escape(str(path))} ') as error:
            for index in range(len(data)):
                data[0, index]
        assert len(str(error.value).splitlines()) == 1


def test_an_image_of_another_size_than_its_annotations_say_is_named(tmp_path):
    """One bad file: masks of another image would be taught silently."""
    path, images = write_set(tmp_path, {1: ('a.png', grey(20, 30))}, [box_thing(1, 1, 2, 2, 9, 9)])
    Image.fromarray(grey(30, 20)).save(images / 'a.png')
    for is_train in (True, False):
        named = rf'{re.escape(str(images / "a.png"))} is 30 high and 20 wide.* 20 and 30$'
        with pytest.raises(models.InputError, match=named):
            dataset(path, images, is_train)[0, 0]


def test_images_of_any_colour_mode_become_rgb(tmp_path):
    """Evaluation and training read grey, palette, CMYK and transparent images as three channels."""
    path, images = write_set(tmp_path, {1: ('a.png', grey(64, 64))}, [box_thing(1, 1, 2, 2, 9, 9)])
    levels = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)
    palette = Image.frombytes('P', (64, 64), (levels % 3).tobytes())
    palette.putpalette([255, 0, 0, 0, 255, 0, 7, 8, 9])
    cases = [('L', Image.fromarray(levels), np.stack([levels] * 3)),
             ('P', palette, np.array([[255, 0, 0], [0, 255, 0], [7, 8, 9]])[levels % 3].transpose(2, 0, 1)),
             ('1', Image.fromarray(levels > 99), np.stack([255 * (levels > 99)] * 3)),
             ('RGBA', Image.fromarray(np.dstack([levels, levels, levels, levels * 0 + 128])), np.stack([levels] * 3))]
    for mode, image, expected in cases:
        assert image.mode == mode
        image.save(images / 'a.png')
        assert np.array_equal(dataset(path, images, False)[0, 0][0].numpy(), expected), mode
        assert dataset(path, images)[0, 0][0].shape[0] == 3
    cmyk = np.dstack([levels * 0, levels * 0 + 255, levels * 0 + 255, levels * 0])  # no cyan, no black: red
    Image.frombytes('CMYK', (64, 64), cmyk.tobytes()).save(images / 'a.png', format='JPEG', quality=100)
    pixels = dataset(path, images, False)[0, 0][0].float().mean((1, 2))
    assert pixels[0] > 240 and pixels[1:].max() < 15


# -------------------------------------------------------------------------------------------------------------- rounds


def sampler(length, batch_size=2, accum_iter=1, eval_every=3, iterations=12, rank=0, world_size=1, seed=0):
    return models.RoundSampler(length, SimpleNamespace(
        batch_size=batch_size, accum_iter=accum_iter, eval_every=eval_every, iterations=iterations, rank=rank,
        world_size=world_size, seed=seed))


def walk(rounds, of):
    stream = []
    for of.epoch in rounds:
        part = list(of)
        assert len(part) == len(of)
        stream += part
    return stream


@pytest.mark.parametrize('length', [1, 5, 7, 24, 100])
def test_rounds_continue_one_stream_that_visits_everything_once_a_pass(length):
    """Rounds take the epoch's place: one pass after the other, each in a new order, whatever a round holds."""
    stream = walk(range(4), sampler(length))  # 4 rounds of 3 updates of 2 images
    assert len(stream) == 24
    assert [number for number, _ in stream] == [position // length for position in range(24)]
    passes = [[index for number, index in stream if number == k] for k in range(-(-24 // length))]
    for order in passes[:24 // length]:
        assert sorted(order) == list(range(length))
    assert len(set(passes[-1])) == len(passes[-1]) and all(0 <= index < length for index in passes[-1])
    if length == 7:
        assert passes[0] != passes[1] != passes[2]
    if length > 20:
        assert passes[0] != sorted(passes[0])
        assert passes[0] != [index for _, index in walk(range(4), sampler(length, seed=1))][:length]
    # one long round is the same walk, and the last rounds are reached without the first
    assert walk([0], sampler(length, eval_every=12)) == stream
    assert walk([2, 3], sampler(length)) == stream[12:]


def test_every_step_sees_the_same_samples_on_any_number_of_processes():
    """Randomness: of every update all processes together see the same samples, accumulated or not."""
    alone = walk(range(3), sampler(7, batch_size=4, iterations=8))
    assert len(alone) == 8 * 4
    updates = [sorted(alone[4 * k:4 * k + 4]) for k in range(8)]
    for world_size, batch_size, accum_iter in ((2, 2, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2), (1, 1, 4)):
        samplers = [sampler(7, batch_size, accum_iter, 3, 8, rank, world_size) for rank in range(world_size)]
        parts = [walk(range(3), own) for own in samplers]
        share = 4 // world_size
        assert {len(part) for part in parts} == {8 * share}
        for k in range(8):
            assert sorted(sum((part[share * k:share * (k + 1)] for part in parts), [])) == updates[k]


def test_the_last_round_is_as_long_as_what_is_left():
    """--iterations need not be a multiple of --eval_every."""
    rounds = sampler(5, batch_size=2, accum_iter=3, eval_every=3, iterations=8)
    lengths = []
    for rounds.epoch in range(3):
        lengths.append((len(rounds), len(list(rounds))))
    assert lengths == [(18, 18), (18, 18), (12, 12)]


# ----------------------------------------------------------------------------------------------------------- read_coco


def small_set(folder):
    """Two images, one of them in a folder of its own, and annotations of every kind: (path, images, content)."""
    mask = np.zeros((20, 30), np.uint8)
    mask[3:9, 5:20] = 1
    objects = [box_thing(4, 9, 2, 3, 12, 10), thing(4, 2, runs(mask), [5, 3, 15, 6]),
               thing(4, 9, compressed(mask), [5.0, 3.0, 15.0, 6.0], keypoints=[1, 2, 2]),
               thing(6, 2, [rectangle(0, 0, 5, 5), polygon((8, 8), (14, 9), (9.5, 20.25))], [0, 0, 14, 20.25]),
               thing(6, 2, runs(np.ones((24, 16), np.uint8)), [0, 0, 16, 24], iscrowd=1)]
    pictures = {4: ('a.png', grey(20, 30, 60)), 6: ('b/c.png', grey(24, 16, 90))}
    path, images = write_set(folder, pictures, objects, ((9, 'ant'), (2, 'bee')))
    return path, images, {'info': {'year': 2017}, 'licenses': [], **json.loads(path.read_text())}


def read_all(path, images, note=lambda *_: None):
    """Everything that is done with a file: reading, every sample twice, and an evaluation without detections."""
    coco = det.read_coco(path, images)
    args = SimpleNamespace(input_size=[32, 32], seed=0, scale_jitter=[0.5, 2.0])
    for is_train in (True, False):
        data = det.CocoDataset(coco, images, args, is_train)
        for index in range(len(data)):
            _, target = data[0, index]
            if is_train:
                assert not (target['masks'] > 1).any(), 'a mask that is no mask'
                assert (target['labels'] >= 1).all() and len(target['boxes']) == len(target['masks'])
    note('evaluation')
    return det.average_precision(coco, [])


def test_a_file_with_everything_that_coco_has_is_read(tmp_path):
    """read_coco: unknown keys and folders below the image folder are fine; ids are new, categories are sorted."""
    path, folder, content = small_set(tmp_path)
    content['annotations'][0].pop('area')
    content['annotations'][1].pop('iscrowd')
    content['annotations'][2]['id'] = content['annotations'][3]['id'] = 0
    content['annotations'][3].pop('id')
    path.write_text(json.dumps(content))
    images, objects, categories = det.read_coco(path, folder)
    assert [entry['file_name'] for entry in images] == ['a.png', 'b/c.png']
    assert [(entry['id'], entry['name']) for entry in categories] == [(2, 'bee'), (9, 'ant')]
    assert {key: len(value) for key, value in objects.items()} == {4: 3, 6: 2}
    flat = objects[4] + objects[6]
    assert len({entry['id'] for entry in flat}) == 5 and min(entry['id'] for entry in flat) >= 1
    assert [entry['area'] for entry in flat] == [70, 50, 50, 50, 50]
    assert [entry['iscrowd'] for entry in flat] == [0, 0, 0, 0, 1]
    assert [entry['category_id'] for entry in flat] == [9, 2, 9, 2, 2]
    assert [entry['bbox'] for entry in flat] == [entry['bbox'] for entry in content['annotations']]
    read_all(path, folder)


def change(*where, to):
    """A change of one place in the file; `to` is a value, or Ellipsis to delete it."""
    def apply(content):
        place = content
        for key in where[:-1]:
            place = place[key]
        if to is ...:
            del place[where[-1]]
        else:
            place[where[-1]] = to
        return content
    return apply


def keypoints(content):
    for entry in content['annotations']:
        entry['keypoints'] = entry.pop('segmentation')
    return content


WRONG = {
    # what is wrong: (the file's new text or a change, what the line must name)
    'no JSON': ('{"images": [', 'no readable JSON'),
    'an empty file': ('', 'no readable JSON'),
    'no text': (b'\x89PNG\r\n\x1a\n\xff\xfe', 'no readable JSON'),
    'too deep': ('[' * 100000, 'no readable JSON'),
    'a list': ('[]', "'images'"),
    'a number': ('3', "'images'"),
    'no images': (change('images', to=...), "'images'"),
    'no annotations': (change('annotations', to=...), "'annotations'"),
    'no categories': (change('categories', to=...), "'categories'"),
    'annotations null': (change('annotations', to=None), "'annotations'"),
    'annotations a dict': (change('annotations', to={}), "'annotations'"),
    'an image that is a number': (change('images', 0, to=3), "'images'"),
    'an image without id': (change('images', 1, 'id', to=...), 'image None'),
    'an image without name': (change('images', 1, 'file_name', to=...), 'image 6'),
    'an image without height': (change('images', 1, 'height', to=...), 'image 6'),
    'an image without width': (change('images', 0, 'width', to=...), 'image 4'),
    'an image of height 0': (change('images', 1, 'height', to=0), 'image 6'),
    'an image of width "16"': (change('images', 1, 'width', to='16'), 'image 6'),
    'an image of width 1.5': (change('images', 1, 'width', to=1.5), 'image 6'),
    'two images of one id': (change('images', 1, 'id', to=4), 'same id'),
    'two categories of one id': (change('categories', 1, 'id', to=9), 'same id'),
    'a category without name': (change('categories', 0, 'name', to=...), 'category 9'),
    'a category without id': (change('categories', 0, 'id', to=...), 'category None'),
    'a missing image file': (change('images', 0, 'file_name', to='absent.png'), 'absent.png'),
    'a missing image file in a folder': (change('images', 0, 'file_name', to='b/d.png'), 'b/d.png'),
    'an image file with a line break': (change('images', 0, 'file_name', to='first\nsecond.png'), 'second.png'),
    'an image file of a long name': (change('images', 0, 'file_name', to='long' * 100), 'longlong'),
    'an image file with a zero': (change('images', 0, 'file_name', to='zero\0.png'), 'zero'),
    'an unknown image': (change('annotations', 2, 'image_id', to=5), 'annotation 3 .*5'),
    'no image of an annotation': (change('annotations', 2, 'image_id', to=...), 'annotation 3 .*None'),
    'a list as image': (change('annotations', 2, 'image_id', to=[4]), r'annotation 3 .*\[4\]'),
    'an unknown category': (change('annotations', 2, 'category_id', to=1), 'annotation 3 .*1'),
    'no category of an annotation': (change('annotations', 2, 'category_id', to=...), 'annotation 3 .*None'),
    'a list as category': (change('annotations', 2, 'category_id', to=[9]), r'annotation 3 .*\[9\]'),
    'a box of 3 numbers': (change('annotations', 3, 'bbox', to=[1, 2, 3]), 'annotation 4 .*bbox'),
    'a box of words': (change('annotations', 3, 'bbox', to=['1', '2', '3', '4']), 'annotation 4 .*bbox'),
    'a box of NaN': (change('annotations', 3, 'bbox', 2, to=math.nan), 'annotation 4 .*bbox'),
    'an infinite box': (change('annotations', 3, 'bbox', 2, to=math.inf), 'annotation 4 .*bbox'),
    'a box with a number of 400 digits': (change('annotations', 3, 'bbox', 2, to=10 ** 400), 'annotation 4 .*bbox'),
    'no box': (change('annotations', 3, 'bbox', to=...), 'annotation 4 .*bbox'),
    'keypoints only': (keypoints, 'annotation 1 .*segmentation'),
    'no segmentation': (change('annotations', 3, 'segmentation', to=None), 'annotation 4 .*segmentation'),
    'an empty segmentation': (change('annotations', 3, 'segmentation', to=[]), 'annotation 4 .*segmentation'),
    'a flat polygon': (change('annotations', 3, 'segmentation', to=[1, 2, 3, 4, 5, 6]), 'annotation 4 .*segmentation'),
    'half a corner': (change('annotations', 3, 'segmentation', 0, to=[1, 2, 3, 4, 5, 6, 7]), 'annotation 4 .*segm'),
    'a corner of NaN': (change('annotations', 3, 'segmentation', 0, 3, to=math.nan), 'annotation 4 .*segmentation'),
    'a corner of text': (change('annotations', 3, 'segmentation', 0, 3, to='4'), 'annotation 4 .*segmentation'),
    'a corner with a number of 400 digits': (
        change('annotations', 3, 'segmentation', 0, 3, to=10 ** 400), 'annotation 4 .*segmentation'),
    'run lengths of another size': (
        change('annotations', 1, 'segmentation', 'size', to=[30, 20]), 'annotation 2.* size'),
    'compressed run lengths of another size': (
        change('annotations', 2, 'segmentation', 'size', to=[30, 20]), 'annotation 3.* size'),
    'run lengths without size': (change('annotations', 1, 'segmentation', 'size', to=...), 'annotation 2.* size'),
    'run lengths of too few pixels': (change('annotations', 1, 'segmentation', 'counts', to=[20, 30]), 'annotation 2'),
    'negative run lengths': (change('annotations', 1, 'segmentation', 'counts', to=[-5, 605]), 'annotation 2'),
    'run lengths without counts': (change('annotations', 1, 'segmentation', 'counts', to=...), 'annotation 2'),
}


@pytest.mark.parametrize('case', WRONG)
def test_a_wrong_file_is_refused_in_one_line_that_names_it(case, tmp_path):
    """read_coco: what cannot work is said before training, with the file and the culprit."""
    path, images, content = small_set(tmp_path)
    how, message = WRONG[case]
    text = json.dumps(how(content)) if callable(how) else how
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(models.InputError, match=message) as error:
        det.read_coco(path, images)
    assert len(str(error.value).splitlines()) == 1 and str(path) in str(error.value)


def test_an_absent_file_and_an_absent_image_folder_are_named(tmp_path):
    """read_coco: the two paths that a user gets wrong."""
    path, images, _ = small_set(tmp_path)
    for wrong in ((tmp_path / 'absent.json', images), (tmp_path, images), (path, tmp_path / 'absent'), (path, path)):
        with pytest.raises(models.InputError) as error:
            det.read_coco(*wrong)
        assert len(str(error.value).splitlines()) == 1
        assert all(str(value) in str(error.value) for value in wrong if value not in (path, images))


RUN_LENGTHS = {'too few': '55', 'none': '', 'letters': 'abc', 'overflow': 'zzzzzzzzzzzz', 'accents': '\u00e9\u4e00',
               'zero': '\0\0', 'too many': 'PPPPPPP0P7'}


@pytest.mark.parametrize('case', RUN_LENGTHS)
def test_compressed_run_lengths_that_do_not_fit_the_image_are_refused(case, tmp_path):
    """read_coco: pycocotools fills only what they cover, and the rest of the mask is whatever lay in memory."""
    path, images, content = small_set(tmp_path)
    content['annotations'][2]['segmentation']['counts'] = RUN_LENGTHS[case]
    path.write_text(json.dumps(content))
    outcome, *what = in_child(lambda note: read_all(path, images, note))
    assert outcome == 'refused', (outcome, what)
    assert 'annotation 3' in what[0] and len(what[0].splitlines()) == 1


@pytest.mark.parametrize('corner', [1e300, -1e300, 1e12, -1e12, 1e9])
def test_a_polygon_far_outside_its_image_does_not_kill_the_process(corner, tmp_path):
    """read_coco: pycocotools turns corners into 32-bit numbers and ends the process on what does not fit."""
    path, images, content = small_set(tmp_path)
    content['annotations'][0]['segmentation'][0][2] = corner
    path.write_text(json.dumps(content))
    outcome, *what = in_child(lambda note: read_all(path, images, note))
    assert outcome in ('refused', 'returned'), (outcome, what)


@pytest.mark.parametrize('shape', [[], [[]], [[1.0, 2.0]], [[1.0, 2.0, 3.0, 4.0]], [[], [1.0, 2.0, 9.0, 2.0, 9.0, 9]]])
@pytest.mark.parametrize('iscrowd', [0, 1])
def test_a_validation_object_without_a_whole_polygon_does_not_end_the_evaluation(shape, iscrowd, tmp_path):
    """read_coco: fewer than three corners are no area; refused before training, or left out."""
    path, images, content = small_set(tmp_path)
    content['annotations'][0].update(segmentation=shape, iscrowd=iscrowd)
    path.write_text(json.dumps(content))
    outcome, *what = in_child(lambda note: read_all(path, images, note))
    assert outcome in ('refused', 'returned'), (outcome, what)


JUNK = [None, True, False, -1, 0, 1, 2, 4, 20, 3.5, -7.25, 1e12, 1e300, 10 ** 400, math.nan, math.inf, '', 'x', 'a.png',
        'b/c.png', 'b', 'long' * 100, '55', '\0', [], {}, [[]], [[[]]], [1], [1, 2, 3, 4], [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5, 6]], ['a', 'b'], {'counts': [], 'size': [0, 0]}, {'counts': 'abc', 'size': [20, 30]},
        {'counts': [600], 'size': [20, 30]}, {'counts': [600], 'size': [20.0, 30]}, {'size': [20, 30]}, {'id': 1}]


def mutate(content, rng):
    """Deletes or replaces a random node of nested lists and dicts."""
    places = []

    def visit(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                visit(node[key])

    visit(content)
    node, key = places[rng.integers(len(places))]
    if rng.random() < 0.25:
        del node[key]
    else:
        node[key] = copy.deepcopy(JUNK[rng.integers(len(JUNK))])


def test_random_damage_is_refused_in_one_line_or_does_no_harm(tmp_path):
    """read_coco: 300 damaged files; each is refused with its name or reads, trains and evaluates to the end."""
    path, images, content = small_set(tmp_path)
    for entry in content['annotations'][:2]:  # as many nodes elsewhere as in run lengths
        entry['segmentation'] = [rectangle(2, 3, 12, 10)]
    content['annotations'][4]['segmentation'] = [rectangle(2, 3, 12, 10), rectangle(9, 9, 16, 20)]

    def damaged(note, first, last):
        refused = 0
        for seed in range(first, last):
            rng, broken = np.random.default_rng(seed), copy.deepcopy(content)
            for _ in range(rng.integers(1, 4)):
                if any(broken.values()):
                    mutate(broken, rng)
            path.write_text(json.dumps(broken))
            note(seed)
            try:
                read_all(path, images)
            except models.InputError as error:
                refused += 1
                assert len(str(error).splitlines()) == 1 and str(tmp_path) in str(error), error
            except Exception as error:
                raise AssertionError(f'file {seed}: {error!r}') from error
        return refused

    outcome, *what = in_child(damaged, 0, 300)
    assert outcome == 'returned', (outcome, what)
    assert 150 < what[0] < 290  # neither is everything refused


def refused_by_build_data(folder, train, val):
    """Splits as [(file name, category, crowd)] lists and categories; the message of build_data."""
    for split, (objects, categories) in (('train', train), ('val', val)):
        pictures = {number: (f'{number}.png', grey(20, 20)) for number in (1, 2)}
        write_set(folder, pictures, [box_thing(1, category, 2, 2, 9, 9, iscrowd=crowd) for category, crowd in objects],
                  categories, split)
    with pytest.raises(models.InputError) as error:
        det.build_data(ready(parse('none', '--data_path', folder)))
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_splits_that_cannot_train_or_evaluate_are_refused(tmp_path):
    """build_data: other categories in the two splits, nothing to train on, nothing to evaluate."""
    ant, bee = (1, 'ant'), (2, 'bee')
    good = [(1, 0)], [ant, bee]
    for number, (train, val, named) in enumerate((
            (good, ([(1, 0)], [ant]), r'instances_train2017.json and .*instances_val2017.json .*different .*bee'),
            (good, ([(1, 0)], [ant, (2, 'wasp')]), r'different .*(bee|wasp)'),
            (good, ([(1, 0)], [ant, (3, 'bee')]), r'different .*bee'),
            (([], [ant]), ([(1, 0)], [ant]), r'instances_train2017.json has no training annotations'),
            (([(1, 1), (1, 1)], [ant]), ([(1, 0)], [ant]), r'instances_train2017.json has no training annotations'),
            (good, ([], [ant, bee]), r'instances_val2017.json has no object'),
            (good, ([(1, 1)], [ant, bee]), r'instances_val2017.json has no object'))):
        assert re.search(named, refused_by_build_data(tmp_path / str(number), train, val))


# ---------------------------------------------------------------------------------------------------------- evaluation

EXAM_CATEGORIES = ((8, 'star'), (1, 'disc'), (3, 'box'), (7, 'none'))  # label 4 is id 8; nothing is of id 7
EXAM_LABELS = {1: 1, 3: 2, 7: 3, 8: 4}  # by hand: ascending ids count from 1


def disc(x, y, reach_x, reach_y):
    angles = [k * math.pi / 20 for k in range(40)]
    return polygon(*((x + reach_x * math.cos(angle), y + reach_y * math.sin(angle)) for angle in angles))


def write_exam(folder):
    """Five images, tall, wide and square, with large objects, a crowd in one and nothing in another."""
    rng = np.random.default_rng(0)
    pictures = {number: (f'{number}.png', np.asarray(Image.fromarray(
        rng.integers(0, 256, (5, 5, 3)).astype(np.uint8)).resize(size[::-1], Image.Resampling.BICUBIC)))
        for number, size in ((70, (240, 320)), (3, (320, 240)), (100, (300, 300)), (42, (200, 400)), (5, (330, 170)))}
    shapes = [(70, 1, [disc(80, 100, 70, 60)]), (70, 3, [rectangle(170, 20, 300, 220)]),
              (70, 1, [disc(160, 190, 60, 45)]), (3, 8, [rectangle(10, 10, 110, 150)]),
              (3, 3, [disc(120, 230, 100, 70)]), (42, 1, [disc(300, 100, 80, 80)]),
              (5, 8, [disc(85, 200, 70, 110)]), (5, 8, [rectangle(20, 5, 150, 85)])]
    objects = []
    for number, category, shape in shapes:
        mask = whole_mask(shape, *pictures[number][1].shape[:2])
        rows, columns = np.nonzero(mask)
        bbox = [int(v) for v in (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)]
        objects.append(thing(number, category, shape, bbox, area=float(mask.sum())))
    crowd = np.zeros((200, 400), np.uint8)
    crowd[:, :200] = 1
    objects.insert(3, thing(42, 1, runs(crowd), [0, 0, 200, 200], iscrowd=1, area=40000.0))
    write_set(folder, pictures, objects, EXAM_CATEGORIES, 'val')
    return folder


@pytest.fixture(scope='module')
def exam(tmp_path_factory):
    return write_exam(tmp_path_factory.mktemp('exam'))


class Oracle(nn.Module):
    """In the detector's place: finds out by the pixels which image it is given, and gives the file's own objects.

    The object of highest score lies inside the crowd and is none: only where crowds are ignored does it do no harm.
    """

    def __init__(self, folder, wrong=None):
        super().__init__()
        self.wrong, self.seen, self.modes, self.pictures = wrong, [], set(), {}
        self.truth = json.loads((folder / 'annotations/instances_val2017.json').read_text())
        for image in self.truth['images']:
            self.pictures[image['id']] = Image.open(folder / 'val2017' / image['file_name']).convert('RGB')

    def recognise(self, image):
        """The id of the image that, made as small by Pillow, is equal up to rounding."""
        found = [number for number, picture in self.pictures.items() if np.abs(np.asarray(picture.resize(
            image.shape[:0:-1], Image.Resampling.BILINEAR)).astype(int).transpose(2, 0, 1) - image.numpy()).max() <= 2]
        assert len(found) == 1
        return found[0]

    def forward(self, images):
        self.modes.add((self.training, torch.is_grad_enabled()))
        return [self.answer(image, self.recognise(image)) for image in images]

    def answer(self, image, number):
        self.seen.append(number)
        picture = self.pictures[number]
        scale = [image.shape[2] / picture.width, image.shape[1] / picture.height] * 2
        answer = {'boxes': [], 'labels': [], 'scores': [], 'masks': []}

        def add(box, category, score, mask):
            x0, y0, x1, y1 = box
            small = Image.fromarray(255 * mask[y0:y1, x0:x1]).resize((112, 112), Image.Resampling.BILINEAR)
            if self.wrong == 'shifted':
                x0, x1 = x0 + 0.4 * (x1 - x0), x1 + 0.4 * (x1 - x0)
            answer['boxes'].append([value * factor for value, factor in zip((x0, y0, x1, y1), scale)])
            answer['labels'].append(EXAM_LABELS[category] % 4 + 1 if self.wrong == 'class' else EXAM_LABELS[category])
            answer['scores'].append(score)
            answer['masks'].append(torch.tensor(np.asarray(small))[None] / 255)

        for k, entry in enumerate(self.truth['annotations']):
            if entry['image_id'] != number or entry['iscrowd']:
                continue
            x, y, w, h = entry['bbox']
            add((x, y, x + w, y + h), entry['category_id'], 0.9 - 0.01 * k,
                whole_mask(entry['segmentation'], picture.height, picture.width))
        if number == 42:
            add((20, 30, 120, 150), 1, 0.99, np.ones((200, 400), np.uint8))
        if self.wrong == 'nothing' or (self.wrong == 'missing' and number in (70, 42)):
            answer = {key: [] for key in answer}
        return {'boxes': torch.tensor(answer['boxes']).reshape(-1, 4), 'scores': torch.tensor(answer['scores']),
                'labels': torch.tensor(answer['labels'], dtype=torch.int64),
                'masks': torch.stack(answer['masks']) if answer['masks'] else torch.zeros(0, 1, 112, 112)}


def exam_args(folder, results):
    return parse('none', '--data_path', folder, '--eval', '--resume', 'none.pth', '--results_json', results)


def sit(folder, results, wrong=None):
    """The whole evaluation of an Oracle in this process; (stats, Oracle)."""
    args = ready(exam_args(folder, results))
    _, loader, coco, classes = det.build_data(args)
    assert classes == ['disc', 'box', 'none', 'star']
    oracle = Oracle(folder, wrong).train()
    return det.evaluate(oracle, loader, coco, torch.device('cpu'), args), oracle


def coco_scores(path, results):
    """pycocotools on the two files, straight."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth, scores = COCO(str(path)), []
        found = truth.loadRes(str(results))
        for kind in ('bbox', 'segm'):
            evaluation = COCOeval(truth, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            scores += [100 * value for value in evaluation.stats[:3].tolist()]
    return dict(zip(SCORES, scores))


def test_the_files_own_objects_score_100_percent(exam, tmp_path, capsys):
    """AP over the whole path: boxes and masks, tall, wide and empty images; a crowd is ignored, not missed."""
    stats, oracle = sit(exam, tmp_path / 'results.json')
    assert stats == {**{name: pytest.approx(100) for name in SCORES}, 'test_images': 5}
    assert oracle.seen == [70, 3, 100, 42, 5] and oracle.modes == {(False, False)}  # evaluation mode, no gradients
    whole = 'AP 100.00 (AP50 100.00, AP75 100.00)'
    assert capsys.readouterr().out.endswith(f'test: box {whole} mask {whole} of 5 images\n')


def test_the_results_file_is_cocos_format_in_original_pixels(exam, tmp_path):
    """--results_json: pycocotools reads it and finds the same AP; ids, boxes and mask sizes are the file's."""
    stats, _ = sit(exam, tmp_path / 'results.json', 'shifted')
    path = exam / 'annotations/instances_val2017.json'
    assert 0 < stats['test_mask_AP50'] < 100
    expected = {name: pytest.approx(stats[name], abs=1e-9) for name in SCORES}
    assert coco_scores(path, tmp_path / 'results.json') == expected
    sit(exam, tmp_path / 'results.json')
    truth, results = json.loads(path.read_text()), json.loads((tmp_path / 'results.json').read_text())
    sizes = {image['id']: [image['height'], image['width']] for image in truth['images']}
    assert len(results) == 9 and results[0]['score'] <= 1
    for entry in results:
        assert set(entry) == {'image_id', 'category_id', 'bbox', 'score', 'segmentation'}
        assert entry['segmentation']['size'] == sizes[entry['image_id']]
        assert type(entry['segmentation']['counts']) is str
    found, expected = (
        np.array(sorted((entry['image_id'], entry['category_id'], *entry['bbox']) for entry in part)) for part in (
        [entry for entry in results if entry['score'] < 0.95],
        [entry for entry in truth['annotations'] if not entry['iscrowd']]))
    assert found == pytest.approx(expected, abs=1e-3)


def test_wrong_answers_score_less(exam, tmp_path):
    """AP: what is shifted, of another class, or not found counts; nothing found is 0, no error."""
    scores = {wrong: sit(exam, tmp_path / f'{wrong}.json', wrong)[0]
              for wrong in ('shifted', 'class', 'missing', 'nothing')}
    assert all(0 <= scores['shifted'][name] < 20 for name in ('test_bbox_AP', 'test_mask_AP'))
    assert all(scores['class'][name] < 1 for name in SCORES)
    # discs are on the missing images alone; one of two boxes is found: recall 0.5 at precision 1; both stars are
    for name in SCORES:
        assert scores['missing'][name] == pytest.approx(100 * (0 + 51 / 101 + 1) / 3, rel=1e-6)
    assert scores['nothing'] == {**dict.fromkeys(SCORES, 0.0), 'test_images': 5}
    assert json.loads((tmp_path / 'nothing.json').read_text()) == []


def test_ap_of_a_small_case_by_hand(tmp_path):
    """AP: two objects, found, false, found in order of score: precision 1 up to recall 1/2, then 2/3, at 101 points."""
    objects = [box_thing(1, 1, 4, 4, 24, 24), box_thing(1, 1, 34, 34, 60, 60)]
    path, images = write_set(tmp_path, {1: ('a.png', grey(64, 64))}, objects)

    class Three(nn.Module):
        def forward(self, images):
            boxes = torch.tensor([[4.0, 4, 24, 24], [40, 4, 60, 24], [34, 34, 60, 60]])
            return [{'boxes': boxes, 'labels': torch.ones(3, dtype=torch.int64),
                     'scores': torch.tensor([0.9, 0.8, 0.7]), 'masks': torch.ones(3, 1, 28, 28)}]

    args = ready(parse('none', '--eval', '--resume', 'x', '--val_annotations', path, '--val_images', images))
    _, loader, coco, _ = det.build_data(args)
    stats = det.evaluate(Three(), loader, coco, torch.device('cpu'), args)
    expected = 100 * (51 + 50 * 2 / 3) / 101
    assert stats['test_bbox_AP50'] == pytest.approx(expected) and stats['test_mask_AP50'] == pytest.approx(expected)
    assert stats['test_bbox_AP'] == pytest.approx(expected)


@pytest.mark.parametrize('ids', ['from 0', 'repeated', 'absent', 'words'])
def test_annotation_ids_do_not_change_the_ap(ids, exam, tmp_path):
    """AP: pycocotools takes a match with id 0 for none and one of two equal ids away; the file's ids are not used."""
    shutil.copytree(exam, tmp_path, dirs_exist_ok=True)
    path = tmp_path / 'annotations/instances_val2017.json'
    content = json.loads(path.read_text())
    for k, entry in enumerate(content['annotations']):
        entry['id'] = {'from 0': k, 'repeated': k // 3, 'absent': None, 'words': 'x'}[ids]
        if ids == 'absent':
            del entry['id']
    path.write_text(json.dumps(content))
    stats, _ = sit(tmp_path, tmp_path / 'results.json')
    assert stats == {**{name: pytest.approx(100) for name in SCORES}, 'test_images': 5}


def test_drawn_scenes_score_100_percent_up_to_the_pixel_of_pasted_masks(toy):
    """AP: the boxes of tools/toy_data.py come back exactly; a mask of 10 pixels may lose its border in pasting."""
    truth = truth_of(toy, 'val')
    coco, results = det.read_coco(toy / 'annotations/instances_val2017.json', toy / 'val2017'), []
    category_ids = [1, 3, 7, 8]
    for image in truth['images']:
        own = [entry for entry in truth['annotations'] if entry['image_id'] == image['id'] and not entry['iscrowd']]
        size = image['height'], image['width']
        seen = [round(64 * side / max(size)) for side in size]
        corners = [(x, y, x + w, y + h) for x, y, w, h in (entry['bbox'] for entry in own)]
        masks = [Image.fromarray(255 * whole_mask(entry['segmentation'], *size)).crop(box).resize(
            (112, 112), Image.Resampling.BILINEAR) for entry, box in zip(own, corners)]
        detection = {
            'boxes': torch.tensor(corners).reshape(-1, 4) * torch.tensor([seen[1] / size[1], seen[0] / size[0]] * 2),
            'labels': torch.tensor([category_ids.index(entry['category_id']) + 1 for entry in own]),
            'scores': torch.linspace(0.9, 0.5, len(own)),
            'masks': torch.tensor(np.array([np.asarray(mask) for mask in masks])).reshape(-1, 1, 112, 112) / 255}
        results += det.to_results(detection, image['id'], seen, size, category_ids)
    assert len(results) > 5
    stats = det.average_precision(coco, results)
    for name in SCORES[:3]:
        assert stats[name] == pytest.approx(100)
    assert stats['test_mask_AP50'] == pytest.approx(100) and stats['test_mask_AP'] > 40


@pytest.mark.parametrize(('seen', 'size', 'box', 'expected'), [
    ((64, 32), (128, 96), (4, 8, 20, 40), (12, 16, 48, 64)),  # tall: x times 3, y times 2
    ((32, 64), (80, 256), (4, 8, 20, 28), (16, 20, 64, 50)),  # wide: x times 4, y times 2.5
    ((64, 64), (16, 16), (8, 16, 40, 64), (2, 4, 8, 12)),
])
def test_detections_return_to_original_pixels(seen, size, box, expected):
    """to_results: xywh boxes and full-size masks in the original image, worked out by hand."""
    soft = torch.zeros(2, 1, 28, 28)
    soft[0], soft[1, :, :14] = 0.9, 0.9  # the second has only its upper half
    detection = {'boxes': torch.tensor([box, box]).float(), 'labels': torch.tensor([2, 3]),
                 'scores': torch.tensor([0.5, 0.25]), 'masks': soft}
    results = det.to_results(detection, 77, seen, size, [11, 22, 90])
    assert json.loads(json.dumps(results)) == results
    found = [(entry['image_id'], entry['category_id'], entry['score']) for entry in results]
    assert found == [(77, 22, 0.5), (77, 90, 0.25)]
    x, y, w, h = expected
    for entry, height in zip(results, (h, h / 2)):
        assert entry['bbox'] == pytest.approx(expected)
        mask = coco_mask.decode(entry['segmentation'])
        assert mask.shape == size
        rows, columns = np.nonzero(mask)
        found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        assert np.abs(np.array(found) - (x, y, x + w, y + height)).max() <= 1.5  # torchvision pastes at whole pixels
        assert mask.sum() >= 0.99 * (found[2] - found[0]) * (found[3] - found[1])  # a corner may be rounded off
    assert det.to_results({key: value[:0] for key, value in detection.items()}, 77, seen, size, [11, 22, 90]) == []


@pytest.mark.parametrize('world_size', [1, 2, 3, 4, 7])
def test_every_validation_image_belongs_to_exactly_one_process(world_size, exam):
    """build_data: five images on any number of processes, each once; more processes than images are fine."""
    shares = []
    for rank in range(world_size):
        args = ready(exam_args(exam, 'none'))
        args.rank, args.world_size = rank, world_size
        loader = det.build_data(args)[1]
        shares.append([target['image_id'] for _, targets in loader for target in targets])
    assert sorted(sum(shares, [])) == [3, 5, 42, 70, 100]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope='module')
def chain(toy, tmp_path_factory):
    """A run without a teacher, and one that it teaches; both keep the checkpoint of their first round."""
    folder = tmp_path_factory.mktemp('chain')
    run(folder / 'plain', '--data_path', toy, '--save_every', 1, '--results_json', folder / 'plain.json')
    run(folder / 'taught', '--data_path', toy, '--save_every', 1, '--teacher_path', folder / 'plain/checkpoint.pth')
    return folder


def kind_flags(kind, toy, chain):
    teacher = ('--teacher_path', chain / 'plain/checkpoint.pth') if kind == 'taught' else ()
    return '--data_path', toy, '--save_every', 1, *teacher


KINDS = pytest.mark.parametrize('kind', ['plain', 'taught'])
TERMS = {'objectness', 'rpn_box_reg', 'classifier', 'box_reg', 'mask'}


@KINDS
def test_a_run_writes_its_log_its_arguments_and_its_checkpoint(kind, chain):
    """Names that tools rely on: one line per round with `iteration`, every loss term, AP in percent; args.json."""
    out = chain / kind
    assert sorted(path.name for path in out.iterdir()) == [
        'args.json', 'checkpoint-0.pth', 'checkpoint-1.pth', 'checkpoint.pth', 'log.txt', 'previous.pth']
    lines = log_of(out)
    assert [line['iteration'] for line in lines] == [2, 4]
    terms = TERMS | ({'fpn', 'head'} if kind == 'taught' else set())
    for line in lines:
        assert set(line) == {'iteration', 'train_loss', *(f'train_loss_{term}' for term in terms), 'train_lr', *CLOCK,
                             *SCORES, 'test_images'}
        assert all(np.isfinite(value) for value in line.values())
        assert all(0 <= line[name] <= 100 for name in SCORES) and line['test_images'] == 5
        labels = sum(line[f'train_loss_{term}'] for term in TERMS)
        assert line['train_loss'] >= labels - 1e-4
        if kind == 'plain':
            assert line['train_loss'] == pytest.approx(labels, rel=1e-5)
    assert 0 < lines[0]['train_seconds'] < lines[1]['train_seconds']
    written = json.loads((out / 'args.json').read_text())
    assert written == checkpoint_of(out)['args'] and written['iterations'] == 4


@KINDS
def test_a_checkpoint_holds_the_detector_alone_and_plain_types(kind, chain):
    """Checkpoints: readable weights-only, strict for a new Detector, adapters beside it and only with a teacher."""
    path = chain / kind / 'checkpoint.pth'
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []
    checkpoint = checkpoint_of(chain / kind)
    own = {'model', 'optimizer', 'scaler', 'epoch', 'step', 'progress', 'args', 'classes', 'train_seconds'}
    assert set(checkpoint) == own | ({'adapters'} if kind == 'taught' else set())
    assert {type(value) for _, value in leaves(checkpoint)} <= {torch.Tensor, str, int, float, bool, type(None)}
    assert checkpoint['classes'] == ['circle', 'square', 'triangle', 'star'] and checkpoint['epoch'] == 1
    assert checkpoint_of(chain / kind, 'checkpoint-0.pth')['epoch'] == 0
    args = SimpleNamespace(**{**vars(parse('none')), 'input_size': [64, 64]})
    det.Detector('vit_pico_patch8', 4, args).load_state_dict(checkpoint['model'], strict=True)
    assert not any('adapt' in name or name.startswith(('detector.', 'module.')) for name in checkpoint['model'])
    if kind == 'taught':
        shapes = [tuple(value.shape) for name, value in checkpoint['adapters'].items() if name.endswith('weight')]
        assert shapes == [(16, 16, 3, 3)] * 5


def test_a_taught_run_adds_both_terms_at_their_weights_and_trains_the_adapters(toy, chain, tmp_path):
    """Supplement: L = L_GT + 0.001 L_FPN + 0.1 L_head, here without a ramp; what is in the log is what was summed."""
    run(tmp_path, *kind_flags('taught', toy, chain), '--distill_warmup', 0, '--iterations', 2)
    (line,) = log_of(tmp_path)
    labels = sum(line[f'train_loss_{term}'] for term in TERMS)
    distilled = 0.001 * line['train_loss_fpn'] + 0.1 * line['train_loss_head']
    assert distilled > 0.1 and line['train_loss'] == pytest.approx(labels + distilled, rel=1e-5)
    first, last = (checkpoint_of(chain / 'taught', name)['adapters'] for name in ('checkpoint-0.pth', 'checkpoint.pth'))
    assert not any(torch.equal(first[name], last[name]) for name in first)


@KINDS
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(kind, toy, chain, tmp_path, capsys):
    """Randomness: a resume is exact, with worker processes too, and the log has each round once."""
    shutil.copytree(chain / kind, tmp_path, dirs_exist_ok=True)
    (tmp_path / 'checkpoint.pth').write_bytes((tmp_path / 'checkpoint-0.pth').read_bytes())
    with open(tmp_path / 'log.txt', 'a') as file:
        file.write('{"iteration": 6, "train_l')
    run(tmp_path, *kind_flags(kind, toy, chain), '--resume', 'auto', '--num_workers', 1)
    assert re.search('^resumed .*num_workers is 1, was 0', capsys.readouterr().out, re.M)
    whole, first = checkpoint_of(chain / kind), checkpoint_of(chain / kind, 'checkpoint-0.pth')
    assert not torch.equal(whole['model']['rpn.head.cls_logits.weight'], first['model']['rpn.head.cls_logits.weight'])
    assert_same_bits(checkpoint_of(tmp_path), whole,
                     ('model', 'optimizer', 'scaler', 'epoch', 'classes', *(['adapters'] if kind == 'taught' else [])))
    assert without_clock(log_of(tmp_path)) == without_clock(log_of(chain / kind))
    assert log_of(tmp_path)[1]['train_seconds'] > log_of(chain / kind)[0]['train_seconds']


def test_another_seed_gives_another_run(toy, chain, tmp_path):
    """Randomness: the comparison of bits above would see a difference in the draws."""
    run(tmp_path, '--data_path', toy, '--iterations', 2, '--seed', 1)
    other = checkpoint_of(chain / 'plain', 'checkpoint-0.pth')['model']['backbone.net.pos_embed']
    assert not torch.equal(checkpoint_of(tmp_path)['model']['backbone.net.pos_embed'], other)


def test_evaluation_alone_finds_what_the_last_round_logged(toy, chain, tmp_path, capsys):
    """--eval --resume: the same detections and AP as the log's last line, from val2017/ alone; writes nothing else."""
    shutil.copytree(chain / 'plain', tmp_path / 'run')
    for part in ('val2017', 'annotations/instances_val2017.json'):
        (tmp_path / 'data' / part).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (toy / part).is_dir() else shutil.copy)(toy / part, tmp_path / 'data' / part)
    before = contents(tmp_path / 'run')
    stats = run(tmp_path / 'run', '--data_path', tmp_path / 'data', '--eval', '--resume', 'auto', '--results_json',
                tmp_path / 'results.json')
    last = log_of(chain / 'plain')[-1]
    assert stats == {name: last[name] for name in (*SCORES, 'test_images')}
    assert f'test: box AP {last["test_bbox_AP"]:.2f} (AP50 {last["test_bbox_AP50"]:.2f}' in capsys.readouterr().out
    assert (tmp_path / 'results.json').read_bytes() == (chain / 'plain.json').read_bytes() and len(stats) == 7
    assert len(json.loads((tmp_path / 'results.json').read_text())) > 5
    assert contents(tmp_path / 'run') == before
    # with paths instead of the layout, from another folder, under bf16: evaluation is in float32 whatever --amp says
    again = run(tmp_path / 'none', '--eval', '--resume', chain / 'plain/checkpoint.pth', '--amp', 'bf16',
                '--val_images', tmp_path / 'data/val2017',
                '--val_annotations', tmp_path / 'data/annotations/instances_val2017.json',
                '--results_json', tmp_path / 'again.json')
    assert again == stats and (tmp_path / 'again.json').read_bytes() == (tmp_path / 'results.json').read_bytes()
    assert not (tmp_path / 'none').exists()


@pytest.mark.parametrize('where', ['absent/results.json', 'folder'])
def test_a_results_file_that_cannot_be_written_costs_no_evaluation(where, toy, chain, tmp_path):
    """--results_json: written, or refused in one line before any work is done."""
    (tmp_path / 'folder').mkdir()
    flags = ('--data_path', toy, '--eval', '--resume', chain / 'plain/checkpoint.pth')
    outcome, *what = in_child(lambda _: run(tmp_path / 'none', *flags, '--results_json', tmp_path / where))
    assert outcome in ('refused', 'returned'), what


def test_the_backbone_starts_from_a_stage_1_checkpoint(toy, tmp_path, capsys):
    """--finetune: stage 1's student; at a learning rate of 0 its blocks are still there at the end."""
    torch.manual_seed(3)
    student = models.create_mae('mae_vit_pico_patch8', 32, target_dim=24)
    torch.save({'model': student.state_dict()}, tmp_path / 'stage1.pth')
    run(tmp_path / 'out', '--data_path', toy, '--finetune', tmp_path / 'stage1.pth', '--lr', 0, '--iterations', 2)
    assert 'start weights: ' in capsys.readouterr().out
    ours, theirs = checkpoint_of(tmp_path / 'out')['model'], student.state_dict()
    names = [name for name in theirs if name.startswith(('blocks.', 'patch_embed.'))]
    assert len(names) > 20
    for name in names:
        assert torch.equal(ours[f'backbone.net.{name}'], theirs[name]), name


def test_gradient_checkpointing_changes_nothing(toy, chain, tmp_path):
    """--grad_checkpointing: the result is the same."""
    calls, compute = [], torch.utils.checkpoint.checkpoint
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith(('timm', 'torch.utils.checkpoint')) and getattr(module, 'checkpoint', None) is compute:
                patch.setattr(module, 'checkpoint', lambda *given, **named: calls.append(1) or compute(*given, **named))
        run(tmp_path, '--data_path', toy, '--grad_checkpointing')
    assert calls
    assert without_clock(log_of(tmp_path)) == without_clock(log_of(chain / 'plain'))


def test_the_last_round_may_be_shorter(toy, tmp_path):
    """--iterations: 3 in rounds of 2 are 2 and 1, and the log says so."""
    run(tmp_path, '--data_path', toy, '--iterations', 3)
    assert [line['iteration'] for line in log_of(tmp_path)] == [2, 3]


@pytest.fixture(scope='module')
def inputs(toy, chain, tmp_path_factory):
    """What users mix up: a set of other classes, a classifier's checkpoint, half a data set."""
    folder = tmp_path_factory.mktemp('inputs')
    for split in ('train', 'val'):
        truth = truth_of(toy, split)
        for entry in truth['categories']:
            entry['name'] = {'star': 'moon'}.get(entry['name'], entry['name'])
        (folder / 'renamed/annotations').mkdir(parents=True, exist_ok=True)
        (folder / f'renamed/annotations/instances_{split}2017.json').write_text(json.dumps(truth))
        (folder / f'renamed/{split}2017').symlink_to(toy / f'{split}2017')
    net = models.create_vit('vit_pico_patch8', 4, 64)
    torch.save({'model': net.state_dict(), 'classes': ['circle', 'square', 'triangle', 'star']}, folder / 'cls.pth')
    (folder / 'broken.pth').write_bytes((chain / 'plain/checkpoint.pth').read_bytes()[:-4000])
    return SimpleNamespace(folder=folder, toy=toy, plain=chain / 'plain/checkpoint.pth',
                           taught=chain / 'taught/checkpoint.pth', first=chain / 'plain/checkpoint-0.pth')


ERRORS = {
    # what a user gets wrong: (flags, what the line must say)
    'teacher of other classes': (
        lambda i: ('--teacher_path', i.plain, '--data_path', i.folder / 'renamed'), "other classes.*'star' is 'moon'"),
    'teacher that is a classifier': (lambda i: ('--teacher_path', i.folder / 'cls.pth'), r'cls\.pth holds no detector'),
    'teacher of another pyramid': (lambda i: ('--teacher_path', i.plain, '--fpn_dim', 8), 'trained with --fpn_dim 16'),
    'teacher of other anchors': (
        lambda i: ('--teacher_path', i.plain, '--anchor_size', 16), 'trained with --anchor_size 8'),
    'teacher of another name': (
        lambda i: ('--teacher_path', i.plain, '--teacher_model', 'vit_nano_patch8'), 'not made by this architecture'),
    'teacher of another patch': (
        lambda i: ('--teacher_path', i.plain, '--teacher_model', 'vit_pico_patch16'), 'patch16 differ in patch size'),
    'teacher absent': (lambda i: ('--teacher_path', i.folder / 'absent.pth'), r'no checkpoint file at .*absent\.pth'),
    'teacher truncated': (lambda i: ('--teacher_path', i.folder / 'broken.pth'), r'broken\.pth is no whole checkpoint'),
    'size that the pyramid cannot halve': (lambda i: ('--input_size', 100), '--input_size 100.*multiple of'),
    'size of a patch and a half': (lambda i: ('--input_size', 48), '--input_size 48.*multiple of'),
    'patch that the pyramid cannot enlarge': (
        lambda i: ('--model', 'vit_pico_patch6', '--input_size', 96), 'patch6.*patch that 4 divides'),
    'two sizes': (lambda i: ('--input_size', 64, 96), '--input_size 64 96'),
    'three sizes': (lambda i: ('--input_size', 64, 64, 64), '--input_size'),
    'no data path': (lambda i: ('--data_path', ''), '--data_path is missing'),
    'absent data path': (lambda i: ('--data_path', i.folder / 'absent'), r'absent.*instances_val2017\.json'),
    'evaluation of nothing': (lambda i: ('--eval',), '--eval needs --resume'),
    'evaluation without data': (lambda i: ('--eval', '--resume', i.plain, '--data_path', ''), '--data_path is missing'),
    'evaluation of an absent file': (lambda i: ('--eval', '--resume', 'auto'), 'no checkpoint file'),
    'evaluation of a classifier': (lambda i: ('--eval', '--resume', i.folder / 'cls.pth'), 'holds no detector'),
    'evaluation on other classes': (
        lambda i: ('--eval', '--resume', i.plain, '--data_path', i.folder / 'renamed'), "'star' is 'moon'"),
    'resume without adapters': (
        lambda i: ('--resume', i.first, '--teacher_path', i.plain), r'checkpoint-0\.pth .*cannot be resumed'),
    'resume without the teacher': (lambda i: ('--resume', i.taught), 'cannot be resumed'),
    'resume of a classifier': (lambda i: ('--resume', i.folder / 'cls.pth'), 'cannot be resumed'),
    'resume on other classes': (lambda i: ('--resume', i.first, '--data_path', i.folder / 'renamed'), 'other classes'),
    'resume of other rounds': (lambda i: ('--resume', i.first, '--eval_every', 1), '--eval_every was 2'),
    'warm-up of all iterations': (lambda i: ('--warmup_iterations', 4), '--warmup_iterations 4 must be below'),
    'negative warm-up': (lambda i: ('--warmup_iterations', -1), '--warmup_iterations must not be negative'),
    'negative ramp': (lambda i: ('--distill_warmup', -1), '--distill_warmup must not be negative'),
    'no iterations': (lambda i: ('--iterations', 0), '--iterations must be at least 1'),
    'resume with more iterations': (lambda i: ('--resume', i.first, '--iterations', 6), '--iterations was 4'),
    'drop path of everything': (lambda i: ('--drop_path', 1), '--drop_path must be'),
    'rounds of nothing': (lambda i: ('--eval_every', 0), '--eval_every must be at least 1'),
    'windows of nothing': (lambda i: ('--window_size', 0), '--window_size must be at least 1'),
    'jitter of nothing': (lambda i: ('--scale_jitter', 0, 2), '--scale_jitter'),
    'jitter upside down': (lambda i: ('--scale_jitter', 2, 1), '--scale_jitter'),
    'jitter without end': (lambda i: ('--scale_jitter', 0.1, 'inf'), '--scale_jitter'),
    'jitter of no number': (lambda i: ('--scale_jitter', 'nan', 2), '--scale_jitter'),
    'unknown model': (lambda i: ('--model', 'resnet50'), "unknown model name 'resnet50'"),
    'autoencoder as detector': (lambda i: ('--model', 'mae_vit_pico_patch8'), 'vit_'),
    'start weights of another width': (
        lambda i: ('--finetune', i.folder / 'cls.pth', '--model', 'vit_nano_patch8'), 'another architecture'),
    'pycocotools absent': (lambda i: (), 'pip install pycocotools'),
}


@pytest.mark.parametrize('case', ERRORS)
def test_a_wrong_command_is_refused_in_one_line_and_writes_nothing(case, inputs, tmp_path, monkeypatch):
    """README: what cannot work is said in one line before any training, and nothing is written."""
    flags, message = ERRORS[case]
    if case == 'pycocotools absent':
        find = det.importlib.util.find_spec
        monkeypatch.setattr(
            det.importlib.util, 'find_spec', lambda name, *_: None if name == 'pycocotools' else find(name))
    code = run_as_script(monkeypatch, tmp_path / 'out', '--data_path', inputs.toy, *flags(inputs))
    # sys.exit with a text: Python prints it on stderr and ends with status 1
    assert isinstance(code, str) and code.startswith('error: ') and re.search(message, code), code
    assert len(code.splitlines()) == 1
    assert not (tmp_path / 'out').exists()


def test_a_bad_image_in_a_worker_ends_the_script_in_one_line(toy, tmp_path):
    """One bad file: found by a data-loading process, it still is one line on stderr and a status that is not 0."""
    shutil.copytree(toy, tmp_path / 'data')
    path = damage(tmp_path / 'data', 'truncated')
    flags = ('--data_path', tmp_path / 'data', '--num_workers', 1, '--iterations', 20, '--eval_every', 20)
    process = subprocess.run([sys.executable, det.__file__, *command(tmp_path / 'out', *flags)], check=False,
                             cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert process.returncode == 1
    assert len(process.stderr.splitlines()) == 1 and process.stderr.startswith(f'error: cannot read {path} ')
    assert not (tmp_path / 'out/checkpoint.pth').exists() and not (tmp_path / 'out/log.txt').read_text()


# ------------------------------------------------------------------------------------------------------- two processes

# one start of torchrun for all: an evaluation of the Oracle, then the script itself, in the same process group
LAUNCHER = """import json, pathlib, runpy, sys
import torch
import torch.distributed as dist
start, stop = dist.init_process_group, dist.destroy_process_group
dist.init_process_group = lambda **options: dist.is_initialized() or start(**options)
dist.destroy_process_group = lambda: None
import specific_distill_det as det
import test_det_data as tests
folder = pathlib.Path(sys.argv[1])
job = json.loads((folder / 'job.json').read_text())
for wrong in ('right', 'shifted', 'nothing'):
    args = tests.exam_args(pathlib.Path(job['exam']), folder / f'{wrong}.json')
    det.start_run(args)
    det.resolve_recipe(args)
    _, loader, coco, _ = det.build_data(args)
    oracle = tests.Oracle(pathlib.Path(job['exam']), wrong)
    stats = det.evaluate(oracle, loader, coco, torch.device('cpu'), args)
    (folder / f'{wrong} {args.rank}').write_text(json.dumps([stats, oracle.seen]))
for sys.argv in job['commands']:
    runpy.run_path(sys.argv[0], run_name='__main__')
(folder / f'finished {args.rank}').touch()
stop()
"""


@pytest.fixture(scope='module')
def two_processes(exam, toy, chain, tmp_path_factory):
    """The output of two processes: evaluations of the Oracle, a run with a teacher, and its resume."""
    folder = tmp_path_factory.mktemp('two')
    flags = ('--data_path', toy, '--teacher_path', chain / 'plain/checkpoint.pth', '--batch_size', 1, '--save_every', 1)
    commands = [command(folder / 'run', *flags, '--results_json', folder / 'run.json'),
                command(folder / 'resumed', *flags, '--resume', folder / 'run/checkpoint-0.pth')]
    job = {'exam': str(exam), 'commands': [[det.__file__, *words] for words in commands]}
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
    return SimpleNamespace(folder=folder, printed=printed)


@pytest.mark.parametrize('wrong', ['right', 'shifted', 'nothing'])
def test_two_processes_evaluate_like_one(wrong, exam, two_processes, tmp_path):
    """AP from predictions gathered of all processes: each image once, the same numbers and file as of one process."""
    folder = two_processes.folder
    (stats, seen), (other, others) = (json.loads((folder / f'{wrong} {rank}').read_text()) for rank in (0, 1))
    alone, _ = sit(exam, tmp_path / 'alone.json', wrong)
    assert stats == other == alone
    assert sorted(seen + others) == [3, 5, 42, 70, 100] and len(seen) == 3
    together, results = (json.loads(path.read_text()) for path in (folder / f'{wrong}.json', tmp_path / 'alone.json'))
    assert together == results and len(results) == (0 if wrong == 'nothing' else 9)
    assert (stats['test_bbox_AP'] == pytest.approx(100)) is (wrong == 'right')


def test_two_processes_train_with_a_teacher_to_the_end(toy, two_processes, tmp_path):
    """torchrun: all processes finish, rank 0 alone writes and prints, and its checkpoint evaluates to its log's AP."""
    folder = two_processes.folder
    assert all((folder / f'finished {rank}').exists() for rank in (0, 1))
    lines = log_of(folder / 'run')
    assert [line['iteration'] for line in lines] == [2, 4]
    assert {'train_loss_fpn', 'train_loss_head'} <= set(lines[0]) and lines[0]['test_images'] == 5
    checkpoint = checkpoint_of(folder / 'run')
    assert checkpoint['args']['world_size'] == 2 and len(checkpoint['adapters']) == 10
    assert not any(name.startswith('module.') for name in (*checkpoint['model'], *checkpoint['adapters']))
    assert two_processes.printed.count('done: 4 iterations') == 2
    # three times the Oracle, two rounds, and one that is resumed
    assert len(re.findall(r'^test: box AP', two_processes.printed, re.M)) == 3 + 2 + 1
    stats = run(tmp_path / 'none', '--data_path', toy, '--eval', '--resume', folder / 'run/checkpoint.pth',
                '--results_json', tmp_path / 'alone.json')
    alone, together = (json.loads(path.read_text()) for path in (tmp_path / 'alone.json', folder / 'run.json'))
    assert len(alone) == len(together) > 5
    assert stats['test_bbox_AP'] == pytest.approx(lines[-1]['test_bbox_AP'], abs=0.5)


def test_a_resume_on_two_processes_is_exact(two_processes):
    """Randomness: a resume is exact on several processes, too."""
    whole, resumed = (two_processes.folder / name for name in ('run', 'resumed'))
    assert_same_bits(checkpoint_of(resumed), checkpoint_of(whole), ('model', 'optimizer', 'adapters', 'epoch'))
    assert without_clock(log_of(resumed)) == without_clock(log_of(whole))[1:]
