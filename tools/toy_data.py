"""Draw small data sets of textured shapes, in the three layouts that the scripts read.

A scene is a textured ground with circles, squares, triangles and stars on it, each filled with stripes, bands or checks.
`make demo` and the tests train on such scenes, so neither needs a download:

    OUT/imagenet/{train,val}/<shape>_<texture>/*.png          12 classes, named by the largest object of the picture
    OUT/coco/{train,val}2017/*.jpg                            varied sizes; categories are the shapes
    OUT/coco/annotations/instances_{train,val}2017.json       polygons of the visible parts, crowds as RLE
    OUT/ade/images/{training,validation}/*.jpg                the pictures of OUT/coco, byte for byte
    OUT/ade/annotations/{training,validation}/*.png           8-bit labels: 0 = ignore, 1..8 = ADE_CLASSES
    OUT/ade/classes.txt                                       a label and its name per line
    OUT/toy_data.json                                         the arguments of each finished set; marks the folder as ours

Run:    python tools/toy_data.py --out data/toy
Needs numpy and Pillow. Picture i of a split depends on --seed, its size and i alone: a larger set only adds pictures,
and the same arguments give the same bytes (of one Pillow version).
"""
import argparse
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

SHAPES = ('circle', 'square', 'triangle', 'star')
TEXTURES = ('stripes', 'bands', 'checks')  # upright, level, both; mirroring a picture changes none of them
CLASSES = tuple(f'{shape}_{texture}' for shape in SHAPES for texture in TEXTURES)
MAX_TILT = 0.25  # radians, of shapes and textures; far more, and a small ViT needs thousands of pictures
CATEGORY_IDS = {'circle': 1, 'square': 3, 'triangle': 7, 'star': 8}  # with gaps, as COCO's 80 ids within 1..90
GROUNDS = ('grass', 'sand', 'water')
ADE_CLASSES = GROUNDS + ('pole',) + SHAPES  # label = index + 1
GROUND_COLOURS = {'grass': (0.38, 0.56, 0.34), 'sand': (0.68, 0.60, 0.44), 'water': (0.34, 0.48, 0.64)}
SPLITS = ('train', 'val')
ADE_SPLITS = {'train': 'training', 'val': 'validation'}


class Annotation(NamedTuple):
    """What can be seen of one object, or of one crowd (whose polygons stay empty)."""
    shape: str
    polygons: list        # of (P, 2) arrays, xy in pixels; two of them where a pole stands in front
    mask: np.ndarray      # (H, W) bool
    iscrowd: bool


class Scene(NamedTuple):
    image: np.ndarray     # (H, W, 3) uint8
    labels: np.ndarray    # (H, W) uint8, 0 = ignore, otherwise an index into ADE_CLASSES plus 1
    annotations: list     # of Annotation, disjoint masks


# ---------------------------------------------------------------------------------------------------------- geometry
def draw_outline(rng, shape, centre, radius):
    """Polygon (P, 2) of a shape, xy in pixels, tilted and slightly stretched at random within `radius` of `centre`."""
    corners = {'circle': 24, 'square': 4, 'triangle': 3, 'star': 10}[shape]
    first = -np.pi / 4 if shape == 'square' else -np.pi / 2  # a square stands on a side, the others point upwards
    angle = 2 * np.pi * np.arange(corners) / corners + first + rng.uniform(-MAX_TILT, MAX_TILT)
    reach = np.where(np.arange(corners) % 2, 0.45, 1.0) if shape == 'star' else np.ones(corners)
    stretch = rng.uniform(0.85, 1.0, size=2)
    return centre + radius * stretch * (reach * np.stack([np.cos(angle), np.sin(angle)])).T


def clip(polygon, axis, limit, side):
    """The part of a polygon (P, 2) below (side 1) or above (side -1) a limit on x (axis 0) or y (axis 1).

    Sutherland-Hodgman against one line; (0, 2) if nothing is left. A star's parts may stay joined along that line.
    """
    kept = []
    for (a, b) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
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
    """COCO's uncompressed run lengths of a mask (H, W): down the columns, and the first run counts zeros."""
    flat = np.concatenate([[False], mask.ravel(order='F')])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return {'counts': np.diff(edges, prepend=0, append=mask.size).tolist(), 'size': list(mask.shape)}


# ----------------------------------------------------------------------------------------------------------- drawing
def draw_texture(rng, texture, height, width):
    """Pattern (H, W) bool of random tilt, phase and period (5 to 8 pixels: at most the toy models' patch)."""
    angle, period = rng.uniform(-MAX_TILT, MAX_TILT), rng.uniform(5.0, 8.0)
    y, x = np.mgrid[:height, :width]
    u = (np.cos(angle) * x + np.sin(angle) * y) / period + rng.uniform()
    v = (np.cos(angle) * y - np.sin(angle) * x) / period + rng.uniform()
    stripes, bands = u % 1 < 0.5, v % 1 < 0.5
    return {'stripes': stripes, 'bands': bands, 'checks': stripes ^ bands}[texture]


def draw_clouds(rng, height, width, cells):
    """Smooth noise (H, W) in about -1..1, from a grid of cells x cells random values."""
    grid = Image.fromarray(rng.uniform(-1, 1, size=(cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))


def draw_ground(rng, height, width):
    """A ground of two kinds that meet at a wavy horizon: image (H, W, 3) float in 0..1, labels (H, W) uint8."""
    above, below = rng.choice(len(GROUNDS), size=2, replace=False)
    horizon = height * (rng.uniform(0.2, 0.8) + 0.15 * draw_clouds(rng, 1, width, 4))  # (1, W)
    labels = np.where(np.arange(height)[:, None] < horizon, above + 1, below + 1).astype(np.uint8)
    image = np.array([GROUND_COLOURS[ground] for ground in GROUNDS])[labels - 1]
    ripples = 0.10 * draw_clouds(rng, height, width, 4) + 0.10 * draw_clouds(rng, height, width, 16)
    return image + ripples[:, :, None] + rng.uniform(-0.1, 0.1, size=3), labels


def paint(rng, image, mask, texture):
    """Fill a mask (H, W) of the image (H, W, 3), in place, with a texture in two random colours."""
    colour = rng.uniform(0.15, 0.85, size=3)
    contrast = rng.uniform(0.25, 0.60) * rng.choice([-1, 1])  # between the two colours, equal in the three channels
    pattern = draw_texture(rng, texture, *mask.shape)[mask]
    image[mask] = colour + contrast * (pattern[:, None] - 0.5)


def finish(rng, image):
    """Light from one side and sensor noise: (H, W, 3) float to uint8."""
    height, width = image.shape[:2]
    slope_y, slope_x = rng.uniform(-0.12, 0.12, size=2)
    light = slope_y * np.linspace(-1, 1, height)[:, None] + slope_x * np.linspace(-1, 1, width)
    noise = rng.normal(0, rng.uniform(0.02, 0.06), size=image.shape)
    return (255 * np.clip(image + light[:, :, None] + noise, 0, 1)).astype(np.uint8)


def draw_class(rng, size, name):
    """One ImageFolder picture, (size, size, 3) uint8: a large object of class `name` before smaller ones of any class."""
    image, _ = draw_ground(rng, size, size)
    for _ in range(rng.integers(1, 4)):
        outline = draw_outline(rng, rng.choice(SHAPES), rng.uniform(0, size, size=2), size * rng.uniform(0.10, 0.16))
        paint(rng, image, fill(outline, size, size), rng.choice(TEXTURES))
    shape, texture = name.split('_')
    radius = size * rng.uniform(0.36, 0.46)
    centre = size * rng.uniform(0.38, 0.62, size=2)
    paint(rng, image, fill(draw_outline(rng, shape, centre, radius), size, size), texture)
    return finish(rng, image)


def draw_scene(rng, height, width, objects, crowd=False, pole=False):
    """A Scene with at most `objects` objects (those that find no free place are left out), a crowd and a pole if asked.

    Objects keep clear of each other; the pole stands in front of them, and the picture's border may cut them.
    Up to two patches of ground are unlabelled (0).
    """
    image, labels = draw_ground(rng, height, width)
    short, taken, annotations = min(height, width), [], []
    for index in range(objects + crowd):
        is_crowd = crowd and index == 0  # first, while there is room
        radius = short * (0.28 if is_crowd else rng.uniform(0.08, 0.25))
        for _ in range(20):
            centre = rng.uniform(0, (width, height))
            if all(np.hypot(*(centre - other)) > radius + reach for other, reach in taken):
                break
        else:
            continue
        taken.append((centre, radius))
        shape, texture = rng.choice(SHAPES), rng.choice(TEXTURES)
        if is_crowd:
            members = [centre + rng.uniform(-0.6, 0.6, size=2) * radius for _ in range(rng.integers(6, 12))]
            outlines = [draw_outline(rng, shape, member, 0.3 * radius) for member in members]
        else:
            outlines = [draw_outline(rng, shape, centre, radius)]
        mask = np.zeros((height, width), dtype=bool)
        for outline in outlines:
            part = fill(outline, height, width)
            paint(rng, image, part, texture)
            mask |= part
        annotations.append(Annotation(shape, [] if is_crowd else outlines, mask, is_crowd))
        labels[mask] = ADE_CLASSES.index(shape) + 1

    if pole:
        # through the first object that is not a crowd, so that its visible part has two polygons
        target = next((a.mask for a in annotations if not a.iscrowd and a.mask.any()), np.ones((height, width)))
        left = round(np.nonzero(target)[1].mean() - 0.03 * short)
        right = left + round(0.06 * short)
        image[:, max(left, 0):right] = rng.uniform(0.1, 0.3, size=3)
        labels[:, max(left, 0):right] = ADE_CLASSES.index('pole') + 1
        for a in annotations:
            a.mask[:, max(left, 0):right] = False
            a.polygons[:] = [clip(p, 0, *cut) for p in a.polygons for cut in ((left, 1), (right, -1))]
    for a in annotations:
        for axis, limit in ((0, width), (1, height)):
            a.polygons[:] = [clip(clip(p, axis, 0, -1), axis, limit, 1) for p in a.polygons]
        a.polygons[:] = [p for p in a.polygons if fill(p, height, width).any()]

    for _ in range(rng.integers(0, 3)):
        patch = fill(draw_outline(rng, 'circle', rng.uniform(0, (width, height)), 0.1 * short), height, width)
        labels[patch & (labels <= len(GROUNDS))] = 0
    visible = []
    for a in annotations:
        if a.mask.sum() > 20:
            visible.append(a)
        else:  # a sliver of a few pixels at the border or beside the pole is not an object: nobody's pixels
            labels[a.mask] = 0
    return Scene(finish(rng, image), labels, visible)


# ----------------------------------------------------------------------------------------------------------- writing
def write_imagenet(args, folder):
    """ImageFolder of --train and --val pictures; classes take turns, so their counts differ by at most one."""
    for split_id, (split, count) in enumerate(zip(SPLITS, (args.train, args.val), strict=True)):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
        for index in range(count):
            name = CLASSES[index % len(CLASSES)]
            image = draw_class(np.random.default_rng([args.seed, split_id, index]), args.size, name)
            # noise hardly compresses: level 1 is a third of the time for the same size
            Image.fromarray(image).save(folder / split / name / f'{split}_{index:06d}.png', compress_level=1)


def draw_split(args, split):
    """Yield the Scenes of a split: the first without objects, the second with a crowd, the third with a pole."""
    split_id = SPLITS.index(split)
    for index in range((args.scenes, args.val_scenes)[split_id]):
        rng = np.random.default_rng([args.seed, len(SPLITS) + split_id, index])  # streams that ImageFolder does not use
        height, width = rng.integers(round(0.75 * args.scene_size), round(1.25 * args.scene_size), size=2, endpoint=True)
        objects = 0 if index == 0 else int(rng.integers(1, 7))
        crowd = index == 1 or (objects > 0 and rng.random() < 0.15)
        pole = index == 2 or (objects > 0 and rng.random() < 0.3)
        yield draw_scene(rng, int(height), int(width), objects, crowd, pole)


def save_image(scene, path):
    """The picture of a Scene, so that COCO and ADE get the same bytes; 4:4:4 keeps the colours of thin textures."""
    Image.fromarray(scene.image).save(path, quality=95, subsampling=0)


def write_coco(args, folder):
    """Pictures and instances_*.json; ids count from 1, boxes are xywh in pixels around the mask."""
    (folder / 'annotations').mkdir(parents=True)
    for split in SPLITS:
        (folder / f'{split}2017').mkdir()
        images, annotations = [], []
        for image_id, scene in enumerate(draw_split(args, split), start=1):
            height, width = scene.labels.shape
            images.append({'id': image_id, 'file_name': f'{image_id:012d}.jpg', 'height': height, 'width': width})
            save_image(scene, folder / f'{split}2017' / images[-1]['file_name'])
            for a in scene.annotations:
                y, x = np.nonzero(a.mask)
                x0, y0, x1, y1 = x.min(), y.min(), x.max() + 1, y.max() + 1
                annotations.append({
                    'id': len(annotations) + 1, 'image_id': image_id, 'category_id': CATEGORY_IDS[a.shape],
                    'segmentation': (encode_rle(a.mask) if a.iscrowd
                                     else [p.round(2).ravel().tolist() for p in a.polygons]),
                    'bbox': [float(value) for value in (x0, y0, x1 - x0, y1 - y0)],
                    'area': int(a.mask.sum()), 'iscrowd': int(a.iscrowd)})
        categories = [{'id': number, 'name': shape, 'supercategory': 'shape'} for shape, number in CATEGORY_IDS.items()]
        content = {'info': {'description': f'tools/toy_data.py --seed {args.seed}'}, 'licenses': [],
                   'images': images, 'annotations': annotations, 'categories': categories}
        (folder / 'annotations' / f'instances_{split}2017.json').write_text(json.dumps(content))


def write_ade(args, folder):
    """Pictures and 8-bit label PNGs of one name, as in ADEChallengeData2016, and the names of the labels."""
    for split in SPLITS:
        images, labels = folder / 'images' / ADE_SPLITS[split], folder / 'annotations' / ADE_SPLITS[split]
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for number, scene in enumerate(draw_split(args, split), start=1):
            save_image(scene, images / f'ADE_{split}_{number:08d}.jpg')
            Image.fromarray(scene.labels).save(labels / f'ADE_{split}_{number:08d}.png')
    lines = [f'{label} {name}\n' for label, name in enumerate(ADE_CLASSES, start=1)]
    (folder / 'classes.txt').write_text(''.join(lines))


WRITERS = {  # set -> (function, the arguments that it depends on besides the seed)
    'imagenet': (write_imagenet, ('size', 'train', 'val')),
    'coco': (write_coco, ('scene_size', 'scenes', 'val_scenes')),
    'ade': (write_ade, ('scene_size', 'scenes', 'val_scenes')),
}


def get_args_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--out', type=Path, required=True, help='folder to write: new, empty, or made by this tool')
    parser.add_argument('--only', nargs='+', choices=list(WRITERS), default=list(WRITERS),
                        help='sets to write; a set that is already there is replaced, the others stay')
    parser.add_argument('--seed', type=int, default=0, help='another seed draws other pictures')
    group = parser.add_argument_group('imagenet')
    group.add_argument('--size', type=int, default=48, help='side of a picture in pixels')
    group.add_argument('--train', type=int, default=1200, help='training pictures in total')
    group.add_argument('--val', type=int, default=600, help='validation pictures in total')
    group = parser.add_argument_group('coco and ade (the same scenes)')
    group.add_argument('--scene_size', type=int, default=128, help='mean side of a scene in pixels; sides vary by 25 %%')
    group.add_argument('--scenes', type=int, default=64, help='training scenes')
    group.add_argument('--val_scenes', type=int, default=32, help='validation scenes')
    return parser


def main(args):
    marker = args.out / 'toy_data.json'
    if args.out.exists() and not args.out.is_dir():
        raise SystemExit(f'toy_data.py: {args.out} is not a folder')
    if args.out.is_dir() and any(args.out.iterdir()) and not marker.is_file():
        raise SystemExit(f'toy_data.py: {args.out} is not empty and has no {marker.name} of this tool: nothing written')
    args.out.mkdir(parents=True, exist_ok=True)
    finished = json.loads(marker.read_text()) if marker.is_file() else {}
    for name in (name for name in WRITERS if name in args.only):
        write, depends_on = WRITERS[name]
        finished.pop(name, None)
        marker.write_text(json.dumps(finished, indent=1, sort_keys=True))
        # written aside and renamed at the end: an interrupted run leaves no half set that looks whole
        folder, part = args.out / name, args.out / f'{name}.part'
        for old in (part, folder):
            shutil.rmtree(old, ignore_errors=True)
        write(args, part)
        part.rename(folder)
        finished[name] = {key: getattr(args, key) for key in ('seed', *depends_on)}
        marker.write_text(json.dumps(finished, indent=1, sort_keys=True))
        print(f'{folder}: {sum(path.is_file() for path in folder.rglob("*"))} files')


if __name__ == '__main__':
    parser = get_args_parser()
    args = parser.parse_args()
    if min(args.train, args.val) < len(CLASSES):
        parser.error(f'--train and --val need at least {len(CLASSES)} pictures, one of each class')
    if min(args.scenes, args.val_scenes) < 3:
        parser.error('--scenes and --val_scenes need at least 3: one without objects, one with a crowd, one with a pole')
    if args.size < 16 or args.scene_size < 64:
        parser.error('shapes need a --size of 16 and a --scene_size of 64 at least')
    main(args)
