"""Draw small data sets of textured shapes, in the three layouts that the scripts read.

Circles, squares, triangles and stars, filled with stripes, bands or checks, on a textured ground:

    OUT/imagenet/{train,val}/<shape>_<texture>/*.png     12 classes, by a picture's largest object
    OUT/coco/{train,val}2017/*.jpg                       varied sizes; categories are the shapes
    OUT/coco/annotations/instances_{train,val}2017.json  polygons of visible parts, crowds as RLE
    OUT/ade/images/{training,validation}/*.jpg           the pictures of OUT/coco, byte for byte
    OUT/ade/annotations/{training,validation}/*.png      8-bit labels, 0 = ignore, 1 to 8 = ADE_CLASSES
    OUT/ade/classes.txt                                  a label and its name per line

Run:    python tools/toy_data.py --out data/toy
Picture i of a split depends on --seed, its size and i alone: a larger set only adds pictures.
"""
import argparse
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

SHAPES = ('circle', 'square', 'triangle', 'star')
TEXTURES = ('stripes', 'bands', 'checks')  # upright, level, both; mirroring changes none of them
CLASSES = tuple(f'{shape}_{texture}' for shape in SHAPES for texture in TEXTURES)
MAX_TILT = 0.25  # radians, of shapes and textures; with more a small ViT needs many more pictures
CATEGORY_IDS = {'circle': 1, 'square': 3, 'triangle': 7, 'star': 8}  # with gaps, as COCO's
GROUNDS = {'grass': (0.38, 0.56, 0.34), 'sand': (0.68, 0.60, 0.44), 'water': (0.34, 0.48, 0.64)}
ADE_CLASSES = (*GROUNDS, 'pole', *SHAPES)  # label = index + 1
SPLITS = {'train': 'training', 'val': 'validation'}  # ADE20K's names
JPEG = {'quality': 95, 'subsampling': 0}  # without subsampling thin textures keep their colours


def draw_outline(rng, shape, centre, radius):
    """Polygon (P, 2) of a shape, xy in pixels, tilted and stretched at random around `centre`."""
    corners = {'circle': 24, 'square': 4, 'triangle': 3, 'star': 10}[shape]
    # a square stands on a side, the others point upwards
    first = -np.pi / 4 if shape == 'square' else -np.pi / 2
    angle = 2 * np.pi * np.arange(corners) / corners + first + rng.uniform(-MAX_TILT, MAX_TILT)
    reach = np.where(np.arange(corners) % 2, 0.45, 1.0) if shape == 'star' else np.ones(corners)
    stretch = rng.uniform(0.85, 1.0, size=2)
    return centre + radius * stretch * (reach * np.stack([np.cos(angle), np.sin(angle)])).T


def clip(polygon, axis, limit, side):
    """The part of a polygon (P, 2) below (side 1) or above (side -1) a limit on x or y (axis 0, 1)."""
    kept = []  # Sutherland-Hodgman against one line: a star's parts may stay joined
    for a, b in zip(polygon, np.roll(polygon, -1, axis=0)):
        a_in, b_in = side * a[axis] <= side * limit, side * b[axis] <= side * limit
        if a_in:
            kept.append(a)
        if a_in != b_in:
            kept.append(a + (b - a) * (limit - a[axis]) / (b[axis] - a[axis]))
    return np.array(kept).reshape(-1, 2)


def fill(polygon, height, width):
    """Mask (H, W) of the pixels whose centre lies inside a polygon (P, 2), by the even-odd rule."""
    (x0, y0), (x1, y1) = polygon.T, np.roll(polygon, -1, axis=0).T
    rows, columns = np.arange(height)[:, None] + 0.5, np.arange(width) + 0.5
    crossed = (y0 <= rows) != (y1 <= rows)  # (H, P): does this edge cross the row's centre line
    at = x0 + (rows - y0) * (x1 - x0) / np.where(y0 == y1, 1, y1 - y0)
    return ((at[:, :, None] > columns) & crossed[:, :, None]).sum(axis=1) % 2 == 1


def encode_rle(mask):
    """COCO's uncompressed run lengths of a mask (H, W): down the columns, zeros first."""
    flat = np.concatenate([[False], mask.ravel(order='F')])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(edges, prepend=0, append=mask.size).tolist()
    return {'counts': counts, 'size': list(mask.shape)}


def draw_clouds(rng, height, width, cells):
    """Smooth noise (H, W) in about -1..1, from a grid of cells x cells random values."""
    grid = Image.fromarray(rng.uniform(-1, 1, size=(cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))


def draw_ground(rng, height, width):
    """Two grounds that meet at a wavy horizon: image (H, W, 3) float in 0..1, labels (H, W) uint8."""
    above, below = rng.choice(len(GROUNDS), size=2, replace=False)
    horizon = height * (rng.uniform(0.2, 0.8) + 0.15 * draw_clouds(rng, 1, width, 4))  # (1, W)
    labels = np.where(np.arange(height)[:, None] < horizon, above + 1, below + 1).astype(np.uint8)
    image = np.array(list(GROUNDS.values()))[labels - 1]
    ripples = 0.10 * draw_clouds(rng, height, width, 4) + 0.10 * draw_clouds(rng, height, width, 16)
    return image + ripples[:, :, None] + rng.uniform(-0.1, 0.1, size=3), labels


def paint(rng, image, mask, texture):
    """Fills a mask (H, W) of the image (H, W, 3), in place: random colours, tilt, phase, period."""
    colour = rng.uniform(0.15, 0.85, size=3)
    contrast = rng.uniform(0.25, 0.60) * rng.choice([-1, 1])  # the same in the three channels
    angle, period = rng.uniform(-MAX_TILT, MAX_TILT), rng.uniform(5.0, 8.0)  # the toy models' patch
    y, x = np.nonzero(mask)
    stripes = ((np.cos(angle) * x + np.sin(angle) * y) / period + rng.uniform()) % 1 < 0.5
    bands = ((np.cos(angle) * y - np.sin(angle) * x) / period + rng.uniform()) % 1 < 0.5
    pattern = {'stripes': stripes, 'bands': bands, 'checks': stripes ^ bands}[texture]
    image[mask] = colour + contrast * (pattern[:, None] - 0.5)


def finish(rng, image):
    """Light from one side and sensor noise: (H, W, 3) float to uint8."""
    height, width = image.shape[:2]
    slope_y, slope_x = rng.uniform(-0.12, 0.12, size=2)
    light = slope_y * np.linspace(-1, 1, height)[:, None] + slope_x * np.linspace(-1, 1, width)
    noise = rng.normal(0, rng.uniform(0.02, 0.06), size=image.shape)
    return (255 * np.clip(image + light[:, :, None] + noise, 0, 1)).astype(np.uint8)


def draw_class(rng, size, name):
    """A picture of a class, (size, size, 3) uint8: a large object before smaller ones of any class."""
    image, _ = draw_ground(rng, size, size)
    for _ in range(rng.integers(1, 4)):
        shape, centre = rng.choice(SHAPES), rng.uniform(0, size, size=2)
        outline = draw_outline(rng, shape, centre, size * rng.uniform(0.10, 0.16))
        paint(rng, image, fill(outline, size, size), rng.choice(TEXTURES))
    shape, texture = name.split('_')
    radius = size * rng.uniform(0.36, 0.46)
    centre = size * rng.uniform(0.38, 0.62, size=2)
    paint(rng, image, fill(draw_outline(rng, shape, centre, radius), size, size), texture)
    return finish(rng, image)


def draw_scene(rng, height, width, count, crowd, pole):
    """(image (H, W, 3) uint8, labels (H, W) uint8, visible objects).

    At most `count` objects that keep clear of each other, a crowd and a pole in front if asked. Of
    an object its visible mask (H, W) and polygons (P, 2), xy in pixels: two where the pole stands in
    front, none of a crowd. Up to two patches of ground are unlabelled (0).
    """
    image, labels = draw_ground(rng, height, width)
    short, taken, objects = min(height, width), [], []
    for index in range(count + crowd):
        is_crowd = crowd and index == 0  # first, while there is room
        radius = short * (0.28 if is_crowd else rng.uniform(0.08, 0.25))
        for _ in range(20):
            centre = rng.uniform(0, (width, height))
            if all(np.hypot(*(centre - other)) > radius + reach for other, reach in taken):
                break
        else:
            continue
        taken.append((centre, radius))
        shape, texture, members = rng.choice(SHAPES), rng.choice(TEXTURES), [centre]
        if is_crowd:
            members = centre + rng.uniform(-0.6, 0.6, size=(rng.integers(6, 12), 2)) * radius
            radius *= 0.3
        outlines = [draw_outline(rng, shape, member, radius) for member in members]
        mask = np.zeros((height, width), dtype=bool)
        for outline in outlines:
            part = fill(outline, height, width)
            paint(rng, image, part, texture)
            mask |= part
        objects.append(SimpleNamespace(
            shape=shape, mask=mask, polygons=[] if is_crowd else outlines, is_crowd=is_crowd))
        labels[mask] = ADE_CLASSES.index(shape) + 1
    if pole:
        # through the first object that is not a crowd, so that its visible part has two polygons
        targets = [a.mask for a in objects if not a.is_crowd and a.mask.any()]
        columns = np.nonzero(targets[0])[1] if targets else np.arange(width)
        left = round(columns.mean() - 0.03 * short)
        right = left + round(0.06 * short)
        image[:, max(left, 0):right] = rng.uniform(0.1, 0.3, size=3)
        labels[:, max(left, 0):right] = ADE_CLASSES.index('pole') + 1
        for a in objects:
            a.mask[:, max(left, 0):right] = False
            right_parts = [clip(p, 0, right, -1) for p in a.polygons]
            a.polygons = [clip(p, 0, left, 1) for p in a.polygons] + right_parts
    visible = []
    for a in objects:
        for border in ((0, 0, -1), (0, width, 1), (1, 0, -1), (1, height, 1)):
            a.polygons = [clip(p, *border) for p in a.polygons]
        a.polygons = [p for p in a.polygons if fill(p, height, width).any()]
        if a.mask.sum() > 20:
            visible.append(a)
        else:  # a few pixels at the border or beside the pole are no object
            labels[a.mask] = 0
    for _ in range(rng.integers(0, 3)):
        outline = draw_outline(rng, 'circle', rng.uniform(0, (width, height)), 0.1 * short)
        labels[fill(outline, height, width) & (labels <= len(GROUNDS))] = 0
    return finish(rng, image), labels, visible


def draw_split(args, split):
    """Yields (number from 1, picture, labels, objects) of the scenes of a split."""
    split_id = list(SPLITS).index(split)
    for index in range((args.scenes, args.val_scenes)[split_id]):
        # streams that the ImageFolder does not use
        rng = np.random.default_rng([args.seed, len(SPLITS) + split_id, index])
        low, high = round(0.75 * args.scene_size), round(1.25 * args.scene_size)
        height, width = rng.integers(low, high, size=2, endpoint=True).tolist()
        # the first scene has no objects, the second a crowd, the third a pole
        count = 0 if index == 0 else int(rng.integers(1, 7))
        crowd = index == 1 or (count > 0 and rng.random() < 0.15)
        pole = index == 2 or (count > 0 and rng.random() < 0.3)
        image, labels, objects = draw_scene(rng, height, width, count, crowd, pole)
        yield index + 1, Image.fromarray(image), labels, objects


def write_imagenet(args, folder):
    """ImageFolder of --train and --val pictures; classes take turns."""
    for split_id, (split, count) in enumerate(zip(SPLITS, (args.train, args.val))):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
        for index in range(count):
            name = CLASSES[index % len(CLASSES)]
            image = draw_class(np.random.default_rng([args.seed, split_id, index]), args.size, name)
            # noise hardly compresses: level 1 is a third of the time for the same size
            path = folder / split / name / f'{split}_{index:06d}.png'
            Image.fromarray(image).save(path, compress_level=1)


def write_coco(args, folder):
    """Pictures and instances_*.json; ids count from 1, boxes are xywh in pixels around the mask."""
    (folder / 'annotations').mkdir(parents=True)
    categories = [{'id': number, 'name': shape, 'supercategory': 'shape'}
                  for shape, number in CATEGORY_IDS.items()]
    for split in SPLITS:
        (folder / f'{split}2017').mkdir()
        images, annotations = [], []
        for image_id, picture, labels, objects in draw_split(args, split):
            name, (height, width) = f'{image_id:012d}.jpg', labels.shape
            images.append({'id': image_id, 'file_name': name, 'height': height, 'width': width})
            picture.save(folder / f'{split}2017' / name, **JPEG)
            for a in objects:
                y, x = np.nonzero(a.mask)
                box = x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1
                polygons = [p.round(2).ravel().tolist() for p in a.polygons]
                annotations.append({
                    'id': len(annotations) + 1, 'image_id': image_id,
                    'category_id': CATEGORY_IDS[a.shape],
                    'segmentation': encode_rle(a.mask) if a.is_crowd else polygons,
                    'bbox': [float(value) for value in box],
                    'area': int(a.mask.sum()), 'iscrowd': int(a.is_crowd)})
        content = {'info': {'description': f'tools/toy_data.py --seed {args.seed}'}, 'licenses': [],
                   'images': images, 'annotations': annotations, 'categories': categories}
        (folder / 'annotations' / f'instances_{split}2017.json').write_text(json.dumps(content))


def write_ade(args, folder):
    """The same pictures with 8-bit label PNGs, named as in ADE20K, and the names of the labels."""
    for split in SPLITS:
        for kind in ('images', 'annotations'):
            (folder / kind / SPLITS[split]).mkdir(parents=True)
        for number, picture, labels, _ in draw_split(args, split):
            name = f'{SPLITS[split]}/ADE_{split}_{number:08d}'
            picture.save(folder / f'images/{name}.jpg', **JPEG)
            Image.fromarray(labels).save(folder / f'annotations/{name}.png')
    lines = [f'{label} {name}\n' for label, name in enumerate(ADE_CLASSES, start=1)]
    (folder / 'classes.txt').write_text(''.join(lines))


WRITERS = {'imagenet': write_imagenet, 'coco': write_coco, 'ade': write_ade}


def get_args_parser():
    parser = argparse.ArgumentParser(
        description='draws small data sets of textured shapes', allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--out', type=Path, required=True, help='folder to write to')
    parser.add_argument('--only', nargs='+', choices=WRITERS, default=list(WRITERS), help='sets')
    parser.add_argument('--seed', type=int, default=0, help='another seed draws other pictures')
    parser.add_argument('--size', type=int, default=48, help='imagenet: side, 16 pixels at least')
    parser.add_argument('--train', type=int, default=1200, help='imagenet: pictures, 12 at least')
    parser.add_argument('--val', type=int, default=600, help='imagenet: pictures, 12 at least')
    parser.add_argument('--scene_size', type=int, default=128, help='coco, ade: mean side, from 64')
    parser.add_argument('--scenes', type=int, default=64, help='coco, ade: scenes, 3 at least')
    parser.add_argument('--val_scenes', type=int, default=32, help='coco, ade: scenes, 3 at least')
    return parser


def main(args):
    for name in args.only:
        if (args.out / name).exists():
            raise SystemExit(f'{args.out / name} exists: remove it, or choose another --out')
        # renamed at the end: what an interrupted run leaves does not look whole
        shutil.rmtree(args.out / f'{name}.part', ignore_errors=True)
    for name in args.only:
        WRITERS[name](args, args.out / f'{name}.part')
    for name in args.only:
        (args.out / f'{name}.part').rename(args.out / name)
        print(f'drawn: {args.out / name}')


if __name__ == '__main__':
    main(get_args_parser().parse_args())
