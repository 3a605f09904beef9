"""Stage 2, specific distillation for detection: a ViTDet learns from labels and a larger ViTDet.

Paper:   G2SD (Huang, Peng et al., CVPR 2023, arXiv 2302.14771), Table 3; loss: the supplement
Reads:   --data_path   COCO: annotations/instances_{train,val}2017.json, train2017/, val2017/
         --finetune    start weights of the backbone: stage 1's checkpoint.pth, MAE, DeiT, DINO ...
         --teacher_path   a checkpoint of this script; without it, labels alone
8 GPUs:  torchrun --nproc_per_node=8 specific_distill_det.py --data_path COCO \
         --finetune runs/generic/checkpoint.pth --teacher_path runs/teacher_det/checkpoint.pth
CPU:     python tools/toy_data.py --out toy --only coco
         python specific_distill_det.py --data_path toy/coco --model vit_pico_patch8 --lr 2e-3 \
         --input_size 64 --window_size 4 --fpn_dim 16 --head_dim 64 --anchor_size 8 --roi_batch 32 \
         --proposals 100 --batch_size 4 --iterations 200 --eval_every 100 --warmup_iterations 20
Writes:  output_dir/checkpoint.pth, log.txt (JSON per --eval_every iterations), args.json
Without a teacher it is plain ViTDet. Evaluation: --eval --resume CHECKPOINT.
"""
import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from unicodedata import normalize

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from timm.layers import LayerNorm2d, trunc_normal_
from timm.models import checkpoint_seq
from timm.models.vision_transformer_sam import (
    Attention, Block, VisionTransformerSAM, window_partition, window_unpartition)
from timm.optim import create_optimizer_v2
from timm.scheduler import MultiStepLRScheduler
from torch import nn
from torchvision.models.detection import MaskRCNN, roi_heads
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.transforms import v2

import models

PAPER_BATCH = 64
# --eval and --teacher_path read them from the checkpoint
SHAPE_FLAGS = ('model', 'input_size', 'window_size', 'fpn_dim', 'head_dim', 'anchor_size', 'proposals')


def get_args_parser():
    """All flags; defaults are the paper's."""
    parser = argparse.ArgumentParser(
        description='G2SD stage 2: detection and instance segmentation (also plain ViTDet)',
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group('distillation')
    group.add_argument('--teacher_model', help='by default the one that its checkpoint names, else '
                                               'vit_base_patch16')
    group.add_argument('--teacher_path', help='its file or https URL; without it, labels alone')
    group.add_argument('--fpn_weight', type=float, default=0.001, help='weight of the feature loss')
    group.add_argument('--head_weight', type=float, default=0.1, help='weight of the logit loss')
    group.add_argument('--distill_warmup', type=int, default=500, help='updates until both are full')

    group = parser.add_argument_group('model')
    group.add_argument('--model', default='vit_small_patch16', help='network to train')
    group.add_argument('--finetune', help='start weights of the backbone, path or https URL')
    group.add_argument('--input_size', type=int, nargs='+', default=[1024],
                       help='pixels: side of the square input, a multiple of 4 patches')
    group.add_argument('--window_size', type=int, default=14, help='of attention, in patches')
    group.add_argument('--fpn_dim', type=int, default=256, help='channels of pyramid and heads')
    group.add_argument('--head_dim', type=int, default=1024, help='width of the last box layer')
    group.add_argument('--anchor_size', type=int, default=32,
                       help='pixels: side of the smallest anchors, in proportion to the input size')
    group.add_argument('--proposals', type=int, default=1000, help='regions per image from the RPN')
    group.add_argument('--roi_batch', type=int, default=512, help='regions per image to train on')
    group.add_argument('--drop_path', type=float, default=0.1, help='stochastic depth, last block')
    group.add_argument('--grad_checkpointing', action='store_true',
                       help='save memory by computing the blocks again in the backward pass')

    group = parser.add_argument_group('optimisation')
    group.add_argument('--batch_size', type=int, default=8, help='images per process and step')
    group.add_argument('--accum_iter', type=int, default=1, help='steps that make one update')
    group.add_argument('--iterations', type=int, default=184375,
                       help='updates; 184375 of 64 images are 100 epochs of COCO')
    group.add_argument('--warmup_iterations', type=int, default=250,
                       help='updates of linear warm-up from 0.001 of the learning rate')
    group.add_argument('--lr', type=float, default=1e-4,
                       help='learning rate; a tenth after 8/9 of the updates, a hundredth after 26/27')
    group.add_argument('--layer_decay', type=float, default=0.7, help='lr factor per block')
    group.add_argument('--weight_decay', type=float,
                       help='none on 1-D parameters and positions; by default 0.05 with a teacher '
                            '(the authors), 0.1 without one (ViTDet)')
    group.add_argument('--clip_grad', type=float, help='largest gradient norm; by default no limit')

    group = parser.add_argument_group('augmentation')
    group.add_argument('--scale_jitter', type=float, nargs=2, default=[0.1, 2.0],
                       help='range of the long side, as a factor of --input_size')

    group = parser.add_argument_group('data')
    group.add_argument('--data_path', help='folder with annotations/, train2017/ and val2017/')
    group.add_argument('--train_annotations', help='replaces annotations/instances_train2017.json')
    group.add_argument('--train_images', help='folder in place of train2017/')
    group.add_argument('--val_annotations', help='replaces annotations/instances_val2017.json')
    group.add_argument('--val_images', help='folder in place of val2017/')

    group = parser.add_argument_group('run')
    group.add_argument('--config', help='args.json of another run: its values become the defaults')
    group.add_argument('--output_dir', default='output_dir', help='for checkpoint, log, args.json')
    group.add_argument('--resume', help='checkpoint to resume; auto: that in --output_dir, if any')
    group.add_argument('--eval', action='store_true', help='only evaluate the --resume checkpoint')
    group.add_argument('--eval_every', type=int, default=5000,
                       help='updates per round, then a checkpoint, an evaluation and a log line')
    group.add_argument('--results_json', help='file for the last detections, in COCO\'s format')
    group.add_argument('--save_every', type=int, default=0,
                       help='also keep checkpoint-N.pth every so many epochs (or rounds); 0: never')
    group.add_argument('--print_freq', type=int, default=50, help='steps between printed lines')
    group.add_argument('--num_workers', type=int, default=10, help='data workers per process')
    group.add_argument('--seed', type=int, default=0, help='seed of everything random')
    group.add_argument('--device', help='cuda or cpu; by default cuda where there is one')
    group.add_argument('--compile', action='store_true', help='torch.compile the networks')
    group.add_argument('--amp', choices=['bf16', 'fp16', 'off'],
                       help='autocast; by default bf16 if the GPU has it, else fp16; off on a CPU')
    return parser


# ---- data ----------------------------------------------------------------------------------------


def segmentation_box(segmentation):
    """COCO polygons or run lengths -> the box around them, xywh in pixels."""
    from pycocotools import mask as coco_mask  # optional: only this stage needs it
    if isinstance(segmentation, dict):
        if isinstance(segmentation['counts'], list):
            segmentation = coco_mask.frPyObjects(segmentation, *segmentation['size'])
        return coco_mask.toBbox(segmentation).tolist()
    x = [value for polygon in segmentation for value in polygon[::2]]
    y = [value for polygon in segmentation for value in polygon[1::2]]
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]


def box_iou(box, other):
    """Intersection over union of two boxes, xywh."""
    shared = 1.0
    for low, other_low, side, other_side in zip(box[:2], other[:2], box[2:], other[2:]):
        shared *= max(0.0, min(low + side, other_low + other_side) - max(low, other_low))
    return shared / (box[2] * box[3] + other[2] * other[3] - shared)


def read_coco(path, is_train):
    """COCO JSON -> (dict as pycocotools takes it, categories by ascending id; what was left out).

    Annotations get what evaluation needs: an `id` from 1 (pycocotools takes a match with id 0 for
    none), `iscrowd` and `area`. Boxes are xywh in pixels of the original image. Left out are those
    without a polygon of three corners and, in training, crowds and empty boxes; counted by reason.
    Ends the run if boxes are of another form: negative, or unlike their segmentations.
    """
    try:
        content = json.loads(Path(path).read_text(encoding='utf-8-sig'))
        coco = {key: content[key] for key in ('images', 'categories')}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f'cannot read {path} as COCO annotations: {error!r}') from error
    annotations, left_out, unlike = [], Counter(), []
    images = {image['id'] for image in coco['images']}
    categories = {category['id'] for category in coco['categories']}
    for number, entry in enumerate(content.get('annotations') or (), 1):
        name = f'{path}: annotation {entry.get("id")}'
        if entry['category_id'] not in categories:
            raise SystemExit(f'{name} has the unknown category {entry["category_id"]}')
        width, height = entry['bbox'][2:]
        if min(width, height) < 0:
            raise SystemExit(f'{name} has the box {entry["bbox"]}: boxes are x, y, width, height')
        crowd, shape = int(entry.get('iscrowd') or 0), entry.get('segmentation') or []
        if isinstance(shape, list):  # not run lengths
            if not any(isinstance(part, list) and len(part) > 2 for part in shape):
                shape = [shape]  # one polygon, written as [x, y] pairs or as numbers
            if any(isinstance(polygon[0], list) for polygon in shape if polygon):  # pairs, too
                shape = [np.ravel(polygon).tolist() for polygon in shape]
            if any(len(polygon) % 2 for polygon in shape):
                raise SystemExit(f'{name} has a polygon of an odd number of values')
            # pycocotools takes two corners for a box
            shape = [polygon for polygon in shape if len(polygon) >= 6]
        if entry['image_id'] not in images:
            left_out['of no listed image'] += 1
        elif not shape:
            left_out['without a polygon'] += 1
        elif is_train and crowd:
            left_out['crowds'] += 1
        elif is_train and min(width, height) == 0:
            if not left_out['with an empty box']:
                print(f'{name} has an empty box, {entry["bbox"]}')
            left_out['with an empty box'] += 1
        else:
            if min(width, height) > 0:
                around = segmentation_box(shape)
                if box_iou(entry['bbox'], around) < 0.5:
                    unlike.append(f'{name} has the box {entry["bbox"]}, its segmentation {around}')
            annotations.append({
                'id': number, 'image_id': entry['image_id'], 'category_id': entry['category_id'],
                'bbox': entry['bbox'], 'area': entry.get('area', width * height), 'iscrowd': crowd,
                'segmentation': shape})
    if len(unlike) > 0.01 * len(annotations):
        raise SystemExit(f'{unlike[0]}, and {len(unlike)} of {len(annotations)} objects are like it: '
                         'boxes are x, y, width, height in pixels')
    coco['annotations'] = annotations
    coco['categories'].sort(key=lambda entry: entry['id'])
    return coco, left_out


def clip_polygon(polygon, width, height):
    """The part of a polygon (P, 2), xy, inside the image (Sutherland-Hodgman); (0, 2) if none."""
    for axis, limit, sign in ((0, 0, 1), (1, 0, 1), (0, width, -1), (1, height, -1)):
        inside = sign * (polygon[:, axis] - limit)
        following = np.roll(inside, -1)
        crossed = (inside < 0) != (following < 0)
        share = inside / np.where(crossed, inside - following, 1)
        crossings = polygon + share[:, None] * (np.roll(polygon, -1, axis=0) - polygon)
        crossings[:, axis] = limit
        points = np.stack([polygon, crossings], axis=1)
        polygon = points[np.stack([inside >= 0, crossed], axis=1)]
    return polygon.clip(0, (width, height))  # cuts are rounded


def crop_object(segmentation, size, part, new_size):
    """COCO polygons or run lengths of an image of size (height, width), cropped and resized.

    part: the crop (top, left, height, width) in pixels; new_size: what becomes of it, (height,
    width). Returns what is seen of the object: its mask (height, width) uint8, 255 times the share
    of each pixel that it covers, and the box (4,) around it, xyxy; (None, None) if nothing is seen.
    Polygons are scaled and cut in floats; run lengths have the pixels of the original image.
    """
    from pycocotools import mask as coco_mask
    top, left, height, width = part
    scale = np.array([new_size[1] / width, new_size[0] / height])
    if isinstance(segmentation, dict):
        if isinstance(segmentation['counts'], list):
            segmentation = coco_mask.frPyObjects(segmentation, *size)
        seen = coco_mask.decode(segmentation)[top:top + height, left:left + width]
        x, y, w, h = coco_mask.toBbox(coco_mask.encode(np.asfortranarray(seen)))
        corners = np.array([(x, y), (x + w, y + h)]) * scale
        seen = torch.from_numpy(255 * seen)[None]
        mask = v2.functional.resize(seen, new_size, antialias=True)[0].numpy()
    else:
        polygons = [(np.reshape(polygon, (-1, 2)) - (left, top)) * scale for polygon in segmentation]
        parts = [clip_polygon(polygon, *new_size[::-1]) for polygon in polygons]
        # a part that only touches the border is clipped to a line
        parts = [part for part in parts if len(part) and min(np.ptp(part, axis=0)) > 0]
        if not parts:
            return None, None
        corners = np.concatenate(parts)
        # inside the box at twice the size, then the mean of four pixels
        x0, y0 = np.floor(corners.min(axis=0)).astype(int)
        x1, y1 = np.ceil(corners.max(axis=0)).astype(int)
        polygons = [(2 * (polygon - (x0, y0))).ravel().tolist() for polygon in polygons]
        fine = coco_mask.decode(coco_mask.merge(
            coco_mask.frPyObjects(polygons, 2 * (y1 - y0), 2 * (x1 - x0)))).astype(np.uint16)
        quarters = fine[::2, ::2] + fine[1::2, ::2] + fine[::2, 1::2] + fine[1::2, 1::2]
        mask = np.zeros(new_size, np.uint8)
        mask[y0:y1, x0:x1] = (255 * quarters + 2) // 4
        # clipping a concave outline may add corners of the image that lie outside the object
        limits = np.array(new_size[::-1])
        at_corner = ((corners == 0) | (corners == limits)).all(axis=1)
        columns, rows = np.minimum(corners, limits - 1).astype(int).T
        corners = corners[~at_corner | (mask[rows, columns] > 0)]
    if not mask.any() or not len(corners) or min(np.ptp(corners, axis=0)) <= 0:
        return None, None
    return mask, np.concatenate([corners.min(axis=0), corners.max(axis=0)])


def draw_jitter(height, width, size, scale_range):
    """Large-scale jitter (Ghiasi et al., CVPR 2021): which part of an image, how large, and a flip.

    The image is scaled so that its long side is size * U(scale_range), then cut to at most
    size x size. Returns the part, (top, left, height, width) in whole pixels of the original, to be
    cut before it is enlarged; its new (height, width); and whether it is flipped.
    """
    ratio = size / max(height, width) * np.random.uniform(*scale_range)
    crop, part = [], []
    for side in (height, width):
        scaled = max(1, round(side * ratio))
        crop.append(min(size, scaled))
        length = max(1, round(crop[-1] * side / scaled))
        start = np.random.uniform(0, scaled - crop[-1]) * side / scaled
        part.append((min(round(start), side - length), length))
    (top, part_height), (left, part_width) = part
    return (top, left, part_height, part_width), tuple(crop), bool(np.random.rand() < 0.5)


def resize_longest_side(pixels, size):
    """Image (3, H, W) uint8 -> the same with its long side `size`, for evaluation."""
    scaled = [max(1, round(side * size / max(pixels.shape[1:]))) for side in pixels.shape[1:]]
    return v2.functional.resize(pixels, scaled, antialias=True)


class CocoDataset(torch.utils.data.Dataset):
    """Images of `read_coco`, as the network takes them.

    Training: index -> (image (3, h, w) uint8, target), jittered, with `boxes` (K, 4) xyxy in its
    pixels, `labels` (K,) from 1 and `masks` (K, h, w) uint8, see `crop_object`; K may be 0 after
    the crop. Images without objects are left out. Evaluation: the long side becomes the input size;
    the target holds `image_id` and the original `size` (height, width).
    """

    def __init__(self, coco, image_folder, args, is_train):
        self.folder, self.size, self.is_train = Path(image_folder), args.input_size[0], is_train
        self.scale_range = args.scale_jitter
        self.labels = {entry['id']: k for k, entry in enumerate(coco['categories'], 1)}
        if not all(image['file_name'].isascii() for image in coco['images']):
            # an accent may be a character of its own in one place and not in the other
            names = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob('*')]
            on_disk = {normalize('NFC', name): name for name in names}
            for image in coco['images']:
                name = image['file_name']
                image['file_name'] = on_disk.get(normalize('NFC', name), name)
        objects, records = defaultdict(list), []
        for entry in coco['annotations'] if is_train else ():
            objects[entry['image_id']].append(entry)
        for image in coco['images']:
            if objects[image['id']] or not is_train:
                records.append(json.dumps([image, objects[image['id']]]).encode())
        # one buffer that workers share; reference counts would make them copy a list of objects
        self.buffer = np.frombuffer(b''.join(records), np.uint8)
        self.ends = np.cumsum([len(record) for record in records])

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, index):
        start = self.ends[index - 1] if index else 0
        image, objects = json.loads(self.buffer[start:self.ends[index]].tobytes())
        path = self.folder / image['file_name']
        size = image['height'], image['width']
        pixels = v2.functional.pil_to_tensor(models.read_rgb(path, size))
        height, width = pixels.shape[1:]
        if (height, width) != size:
            raise models.DataError(
                f'cannot read {path} ({height} high and {width} wide, its annotations say '
                f'{image["height"]} and {image["width"]}): mend the annotations')
        if self.is_train:
            return self.augment(pixels, objects)
        target = {'image_id': image['id'], 'size': (height, width)}
        return resize_longest_side(pixels, self.size), target

    def augment(self, pixels, objects):
        """Image (3, H, W) uint8 and its annotations -> (image, target) of training."""
        size = pixels.shape[1:]
        part, new_size, flip = draw_jitter(*size, self.size, self.scale_range)
        top, left, height, width = part
        pixels = v2.functional.resized_crop(pixels, *part, new_size, antialias=True)
        boxes, labels, masks = [], [], []
        for entry in objects:
            x, y, w, h = entry['bbox']
            if left < x + w and x < left + width and top < y + h and y < top + height:
                mask, box = crop_object(entry['segmentation'], size, part, new_size)
                if mask is not None:
                    boxes.append(box)
                    labels.append(self.labels[entry['category_id']])
                    masks.append(mask)
        boxes = torch.from_numpy(np.array(boxes, np.float32).reshape(-1, 4))
        masks = torch.from_numpy(np.array(masks, np.uint8).reshape(-1, *new_size))
        if flip:
            pixels, masks = pixels.flip(-1), masks.flip(-1)
            boxes[:, [0, 2]] = new_size[1] - boxes[:, [2, 0]]
        target = {'boxes': boxes, 'labels': torch.tensor(labels, dtype=torch.int64), 'masks': masks}
        return pixels.contiguous(), target


def collate_fn(batch):
    """[(image, target)] -> (images, targets), two tuples: the network pads images to one size."""
    return tuple(zip(*batch))


def coco_paths(args, split):
    """(annotations, image folder) of `train` or `val`."""
    annotations = getattr(args, f'{split}_annotations')
    images = getattr(args, f'{split}_images')
    if not args.data_path and not (annotations and images):
        raise SystemExit('--data_path is missing: the folder with annotations/, train2017/, '
                         f'val2017/, or give --{split}_annotations and --{split}_images')
    annotations = annotations or f'{args.data_path}/annotations/instances_{split}2017.json'
    images = images or f'{args.data_path}/{split}2017'
    if not Path(images).is_dir():
        raise SystemExit(f'no folder {images}: give the one with the images of {annotations}')
    return annotations, images


def reasons(left_out):
    """What `read_coco` counted, in words."""
    return ', '.join(f'{count} {reason}' for reason, count in left_out.items() if count) or 'none'


def build_data(args):
    """(training loader or, with --eval, None; validation loader, its `read_coco`, class names).

    Every validation image belongs to exactly one process.
    """
    if not importlib.util.find_spec('pycocotools'):
        raise SystemExit('detection needs pycocotools: pip install pycocotools')
    options = {'batch_size': args.batch_size, 'collate_fn': collate_fn,
               'num_workers': args.num_workers, 'worker_init_fn': models.start_worker,
               'pin_memory': args.device.startswith('cuda')}
    val_path, val_images = coco_paths(args, 'val')
    val_coco, val_left_out = read_coco(val_path, is_train=False)
    classes = [entry['name'] for entry in val_coco['categories']]
    crowds = sum(entry['iscrowd'] for entry in val_coco['annotations'])
    val_left_out['crowds'] = crowds
    objects = len(val_coco['annotations']) - crowds
    if not objects and not (args.eval and args.results_json):
        raise SystemExit(f'{val_path} has no object to evaluate; left out: {reasons(val_left_out)}')
    val = CocoDataset(val_coco, val_images, args, is_train=False)
    _ = val[0]  # finds a wrong folder now, not after the first round
    own_share = range(args.rank, len(val), args.world_size)
    val_loader = torch.utils.data.DataLoader(val, sampler=own_share, **options)
    evaluated = (f'{len(val)} images with {objects} objects to evaluate on, left out: '
                 f'{reasons(val_left_out)}')
    if args.eval:
        print(f'data: {evaluated}; {models.count_classes(classes)}')
        return None, val_loader, val_coco, classes
    path, images = coco_paths(args, 'train')
    coco, left_out = read_coco(path, is_train=True)
    if [entry['name'] for entry in coco['categories']] != classes:
        raise SystemExit(f'{path} and {val_path} have different categories')
    used = len(coco['annotations'])
    if not used:
        raise SystemExit(f'{path} has no object with a mask to learn from; left out: '
                         f'{reasons(left_out)}')
    train = CocoDataset(coco, images, args, is_train=True)
    sampler = models.SeededSampler(len(train), args, args.eval_every, args.iterations)
    train_loader = torch.utils.data.DataLoader(
        models.SeededDataset(train, args.seed), sampler=sampler,
        persistent_workers=args.num_workers > 0, **options)
    print(f'data: {len(train)} of {len(coco["images"])} images in {images} have objects; {used} of '
          f'{used + left_out.total()} objects used, left out: {reasons(left_out)}; {evaluated}; '
          f'{models.count_classes(classes)}')
    return train_loader, val_loader, val_coco, classes


# ---- network -------------------------------------------------------------------------------------


def relative_positions(table, size):
    """Table (2 * size - 1, d) of distances -> (size, size, d): at (i, j) that of i - j.

    Another length is resized. timm's `get_rel_pos` indexes from the CPU, which waits for a GPU.
    """
    if len(table) != 2 * size - 1:
        table = F.interpolate(table.T[None], 2 * size - 1, mode='linear')[0].T
    places = torch.arange(size, device=table.device)
    return table[places[:, None] - places + size - 1]


class FoldedAttention(Attention):
    """timm's attention with decomposed relative positions, without its (L, L) bias.

    q.k/sqrt(d) + q.R_h[row of k] + q.R_w[column of k] is one inner product of longer vectors:
    q' = [q, q.R_h*sqrt(d), q.R_w*sqrt(d)] and k' = [k, one-hot row, one-hot column]: the fused
    kernels apply.
    """

    def forward(self, x):
        n, height, width, _ = x.shape
        qkv = self.qkv(x).reshape(n, height * width, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N, heads, L, d)
        grid = q.unflatten(2, (height, width))
        rel_h = relative_positions(self.rel_pos_h, height).to(q.dtype)
        rel_w = relative_positions(self.rel_pos_w, width).to(q.dtype)
        by_row = torch.einsum('nhijd,ikd->nhijk', grid, rel_h).flatten(2, 3)
        by_column = torch.einsum('nhijd,jkd->nhijk', grid, rel_w).flatten(2, 3)
        more = -(q.shape[-1] + height + width) % 8  # kernels want a multiple of 8
        by_column = F.pad(by_column / self.scale, (0, more))
        q = torch.cat([q, by_row / self.scale, by_column], dim=-1)
        rows = torch.eye(height, dtype=k.dtype, device=k.device).repeat_interleave(width, 0)
        columns = torch.eye(width, dtype=k.dtype, device=k.device).repeat(height, 1)
        place = F.pad(torch.cat([rows, columns], dim=1), (0, more))  # (L, height + width + more)
        k = torch.cat([k, place.expand(n, self.num_heads, -1, -1)], dim=-1)
        x = F.scaled_dot_product_attention(
            q, k, F.pad(v, (0, height + width + more)), scale=self.scale)
        x = x[..., :v.shape[-1]].transpose(1, 2).reshape(n, height, width, -1)
        return self.proj(x)


class ImageWiseBlock(Block):
    """timm's block with stochastic depth over images, as in ViTDet; timm's drops single windows."""

    def forward(self, x):
        shortcut, size, x = x, x.shape[1:3], self.norm1(x)
        if self.window_size:
            x, padded = window_partition(x, self.window_size)
            x = window_unpartition(self.attn(x), self.window_size, size, padded)
        else:
            x = self.attn(x)
        x = shortcut + self.drop_path1(x)
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class PlainBackbone(VisionTransformerSAM):
    """ViTDet's plain ViT, (N, 3, H, W) -> (N, D, H/patch, W/patch): no class token, no final norm.

    Four blocks attend globally, each the last of a quarter (2, 5, 8 and 11 of 12), the others in
    windows. The position table stays that of 224 pixels and is resized in each forward, with
    gradients, bicubic as in ViTDet (timm antialiases).
    """

    def __init__(self, name, img_size, window_size=14, drop_path_rate=0.0):
        size = models.parse_name(name)
        side = max(1, 224 // size.patch)
        super().__init__(
            img_size=img_size, patch_size=size.patch, embed_dim=size.dim, depth=size.depth,
            num_heads=size.heads, num_classes=0, neck_chans=0, global_pool='', use_rel_pos=True,
            window_size=window_size, drop_path_rate=drop_path_rate, block_fn=ImageWiseBlock,
            global_attn_indexes=[size.depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)],
            norm_layer=partial(nn.LayerNorm, eps=1e-6))
        self.neck = nn.Identity()  # otherwise a norm
        self.pos_embed = nn.Parameter(torch.zeros(1, side, side, size.dim))
        for block in self.blocks:
            grid = (window_size, window_size) if block.window_size else self.patch_embed.grid_size
            block.attn = FoldedAttention(size.dim, size.heads, use_rel_pos=True, input_size=grid)
        trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x):
        x = self.patch_embed(x)
        table = self.pos_embed.permute(0, 3, 1, 2)
        x = x + F.interpolate(table, size=x.shape[1:3], mode='bicubic').permute(0, 2, 3, 1)
        x = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        return x.permute(0, 3, 1, 2)


class SimpleFeaturePyramid(nn.Module):
    """ViTDet's pyramid: the last feature map at 4x, 2x, 1x, 1/2x and 1/4x its resolution."""

    def __init__(self, net, dim, out_channels):
        super().__init__()
        self.net, self.out_channels = net, out_channels

        def level(width, *scale):
            return nn.Sequential(
                *scale, nn.Conv2d(width, out_channels, 1, bias=False), LayerNorm2d(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                LayerNorm2d(out_channels))

        def double(width):
            return nn.ConvTranspose2d(width, width // 2, 2, stride=2)

        self.levels = nn.ModuleList([
            level(dim // 4, double(dim), LayerNorm2d(dim // 2), nn.GELU(), double(dim // 2)),
            level(dim // 2, double(dim)), level(dim), level(dim, nn.MaxPool2d(2))])

    def forward(self, images):
        x = self.net(images)
        features = [level(x) for level in self.levels]
        features.append(F.max_pool2d(features[-1], 1, stride=2))
        return {str(k): feature for k, feature in enumerate(features)}


class UnroundedAnchorGenerator(AnchorGenerator):
    """torchvision's anchors, not rounded to whole pixels nor cast to the features' type."""

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device='cpu'):
        scales = torch.tensor(scales, dtype=dtype, device=device)
        height = scales * torch.tensor(aspect_ratios, device=device).sqrt()
        width = scales ** 2 / height
        return torch.stack([-width, -height, width, height], dim=1) / 2

    def set_cell_anchors(self, dtype, device):
        super().set_cell_anchors(torch.float32, device)


class Float32RPNHead(RPNHead):
    """torchvision's head with float32 outputs under any autocast; keeps its logits."""

    def forward(self, features):
        logits, deltas = super().forward(features)
        self.logits = [level.float() for level in logits]
        return self.logits, [level.float() for level in deltas]


class Float32Predictor(FastRCNNPredictor):
    """torchvision's predictor with float32 outputs: bf16's 8 bits do not hold 1024 pixels."""

    def forward(self, x):
        scores, deltas = super().forward(x)
        return scores.float(), deltas.float()


class AlignedRoIPooler(MultiScaleRoIAlign):
    """RoIAlign, pixel-aligned, from the level that fits a region's size.

    Strides are given: torchvision's pooler infers them from the unpadded sizes of the first batch,
    and is off by half a feature pixel.
    """

    def __init__(self, output_size, strides, canonical):
        super().__init__([str(k) for k in range(len(strides))], output_size, sampling_ratio=0)
        self.strides, self.canonical = strides, canonical

    def forward(self, x, boxes, image_shapes):
        """Features by level, boxes per image (K_i, 4) xyxy -> (sum K_i, C, size, size) float32."""
        rois = [F.pad(part, (1, 0), value=index) for index, part in enumerate(boxes)]
        rois = torch.cat(rois)  # (K, 5), the image's index first
        side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp(min=1e-6).sqrt()
        # FPN, equation 1: a region of the canonical size is read from the third level
        levels = (2 + (side / self.canonical).log2()).floor().clamp(0, len(self.strides) - 1)
        parts = []
        for k, (name, stride) in enumerate(zip(self.featmap_names, self.strides)):
            parts.append(roi_align(x[name].float(), rois[levels == k], self.output_size, 1 / stride,
                                   sampling_ratio=0, aligned=True))
        return torch.cat(parts)[levels.argsort(stable=True).argsort()]  # in the order of the boxes


class NormaliseAndPad(GeneralizedRCNNTransform):
    """Normalises and pads bottom right with zeros.

    torchvision's `resize` would undo the scale jitter; its `normalize` makes tensors of lists, and
    so waits for a GPU, image by image.
    """

    def normalize(self, image):
        return models.normalise(image)

    def resize(self, image, target=None):
        return image, target


class Detector(MaskRCNN):
    """ViTDet's Mask R-CNN: plain ViT, simple feature pyramid, RPN of 2 convolutions, heads of 4."""

    def __init__(self, name, num_classes, args):
        size, width, proposals = models.parse_name(name), args.fpn_dim, args.proposals
        # a region of 7 anchor sizes, FPN's 224 with anchors of 32, is read at 1x
        strides = [size.patch // 4, size.patch // 2, size.patch, 2 * size.patch]
        pooler = partial(AlignedRoIPooler, strides=strides, canonical=7 * args.anchor_size)
        anchor_sizes = tuple((args.anchor_size * 2 ** k,) for k in range(5))
        net = PlainBackbone(name, args.input_size[0], args.window_size, args.drop_path)
        super().__init__(
            SimpleFeaturePyramid(net, size.dim, width),
            rpn_anchor_generator=UnroundedAnchorGenerator(anchor_sizes, ((0.5, 1, 2),) * 5),
            rpn_head=Float32RPNHead(width, 3, conv_depth=2),
            # ViTDet: before suppression twice as many in training, as many in test
            rpn_pre_nms_top_n_train=2 * proposals, rpn_pre_nms_top_n_test=proposals,
            rpn_post_nms_top_n_train=proposals, rpn_post_nms_top_n_test=proposals,
            box_batch_size_per_image=args.roi_batch, box_roi_pool=pooler(7),
            box_head=FastRCNNConvFCHead(
                (width, 7, 7), [width] * 4, [args.head_dim], norm_layer=LayerNorm2d),
            box_predictor=Float32Predictor(args.head_dim, num_classes + 1),
            mask_roi_pool=pooler(14),
            mask_head=MaskRCNNHeads(width, [width] * 4, 1, norm_layer=LayerNorm2d),
            mask_predictor=MaskRCNNPredictor(width, width, num_classes + 1))
        self.transform = NormaliseAndPad(0, 0, None, None, size_divisible=args.input_size[0])
        self.rpn.compute_loss = partial(rpn_loss, self.rpn.fg_bg_sampler)
        self.rpn.min_size = torch.finfo(torch.float32).tiny  # any box that is not empty
        # detectron2's start values
        linear = self.roi_heads.box_head[-2]  # before the last ReLU
        box, mask = self.roi_heads.box_predictor, self.roi_heads.mask_predictor
        nn.init.kaiming_uniform_(linear.weight, a=1)
        nn.init.normal_(box.cls_score.weight, std=0.01)
        nn.init.normal_(box.bbox_pred.weight, std=0.001)
        nn.init.normal_(mask.mask_fcn_logits.weight, std=0.001)
        for layer in (linear, box.cls_score, box.bbox_pred, mask.conv5_mask, mask.mask_fcn_logits):
            nn.init.zeros_(layer.bias)

    def extract_features(self, images):
        """Of a teacher: list of (3, h, w) uint8 -> (five pyramid levels, RPN logits of each)."""
        images, _ = self.transform(images)
        features = list(self.backbone(images.tensors).values())
        logits, _ = self.rpn.head(features)
        return features, logits

    def forward(self, images, targets=None):
        """images: a list of (3, h, w) uint8, no side above the input size.

        Training: (losses by name, five pyramid levels, RPN logits of each). Evaluation: for each
        image `boxes` (K, 4) xyxy in its pixels, `labels` (K,) from 1, `scores` (K,) and `masks`
        (K, 1, 28, 28), probabilities inside the box.
        """
        images, targets = self.transform(images, targets)
        features = self.backbone(images.tensors)
        proposals, losses = self.rpn(images, features, targets)
        detections, roi_losses = self.roi_heads(features, proposals, images.image_sizes, targets)
        logits, self.rpn.head.logits = self.rpn.head.logits, None
        if self.training:
            return {**losses, **roi_losses}, list(features.values()), logits
        return detections


class Student(nn.Module):
    """A detector and, with a teacher, its adapters phi: a 3x3 convolution per pyramid level."""

    def __init__(self, detector, adapters):
        super().__init__()
        self.detector, self.adapters = detector, adapters

    def forward(self, images, targets):
        """-> (losses by name, adapted pyramid levels or none, RPN logits of each level)."""
        losses, features, logits = self.detector(images, targets)
        return losses, [adapt(level) for adapt, level in zip(self.adapters, features)], logits

    def group_matcher(self, coarse=False):
        """Layer decay as in ViTDet: stem, blocks, and all behind the backbone at the full rate."""
        net = r'^detector\.backbone\.net\.'
        return {'stem': net + '(?:pos_embed|patch_embed)', 'blocks': net + r'blocks\.(\d+)'}

    def no_weight_decay(self):
        """Absolute and relative positions; timm adds everything one-dimensional."""
        names = [name for name, _ in self.named_parameters()]
        return {name for name in names if 'pos_embed' in name or 'rel_pos' in name}


def load_detector(path, classes, args, name=None):
    """The detector in a checkpoint of this script, frozen and in eval mode.

    A teacher has the checkpoint's own SHAPE_FLAGS, and the model `name` if it is given. With --eval
    `parse_args` has put them into args.
    """
    checkpoint = models.read_checkpoint(path)
    trained, state = models.own_args(checkpoint), checkpoint.get('model', {})
    if 'rpn.head.cls_logits.weight' not in state:
        raise SystemExit(f'{path} holds no detector: give a checkpoint of specific_distill_det.py')
    models.check_classes(checkpoint.get('classes'), classes, path)
    shape = argparse.Namespace(**vars(args))
    if not args.eval:
        vars(shape).update({flag: trained[flag] for flag in SHAPE_FLAGS if flag in trained})
        shape.model = name or trained.get('model', 'vit_base_patch16')
    theirs = models.parse_name(shape.model).patch, shape.input_size[0], shape.anchor_size
    ours = models.parse_name(args.model).patch, args.input_size[0], args.anchor_size
    if theirs != ours:
        raise SystemExit(f'{path} has patch, --input_size and --anchor_size {theirs}, the student '
                         f'{ours}: their pyramids differ')
    detector = Detector(shape.model, len(classes), shape)
    models.load_strictly(detector, state, path)
    print(f'loaded {len(state)} tensors of {path}')
    return detector.requires_grad_(False).eval()


# ---- losses --------------------------------------------------------------------------------------


def box_loss(class_logits, deltas, labels, targets):
    """Losses of the box head: cross-entropy, and L1 over the number of regions, as in ViTDet.

    class_logits: (K, 1+C); deltas: (K, 4*(1+C)); labels, from 0 = background, and targets, (K_i,)
    and (K_i, 4), by image.
    """
    labels, targets = torch.cat(labels), torch.cat(targets)
    objects = labels.nonzero()[:, 0]
    deltas = deltas.unflatten(1, (-1, 4))[objects, labels[objects]]
    distance = F.l1_loss(deltas, targets[objects], reduction='sum')
    return F.cross_entropy(class_logits, labels), distance / labels.numel()


def rpn_loss(sampler, logits, deltas, labels, targets):
    """Losses of the RPN: cross-entropy, and L1 over the number of sampled anchors, as in ViTDet.

    sampler: chooses anchors; logits (K, 1), deltas (K, 4); by image labels (K_i,), 1 = object,
    0 = background, -1 = neither, and targets (K_i, 4).
    """
    objects, backgrounds = (torch.cat(chosen).nonzero()[:, 0] for chosen in sampler(labels))
    labels, targets = torch.cat(labels), torch.cat(targets)
    sampled = torch.cat([objects, backgrounds])
    entropy = F.binary_cross_entropy_with_logits(logits.flatten()[sampled], labels[sampled])
    distance = F.l1_loss(deltas[objects], targets[objects], reduction='sum')
    return entropy, distance / sampled.numel()


def mask_loss(logits, boxes, masks, labels, matches):
    """Loss of the mask head: binary cross-entropy of the class's map (K, 1+C, M, M) in each box.

    By image: boxes (K_i, 4), true masks (G_i, H, W) of 0 to 255 and labels (G_i,), and each box's
    object (K_i,). The target is the mask's pixel-aligned RoIAlign at the box, at least one half, as
    in detectron2.
    """
    labels = torch.cat([part[match] for part, match in zip(labels, matches)])
    targets = []
    for box, mask, match in zip(boxes, masks, matches):
        rois = torch.cat([match[:, None].to(box), box], dim=1)
        targets.append(roi_align(mask[:, None].to(box), rois, logits.shape[-1], aligned=True))
    targets = torch.cat(targets)[:, 0] >= 127.5
    if not len(targets):
        return 0 * logits.sum()
    logits = logits[torch.arange(len(labels), device=labels.device), labels]
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits))


# torchvision's RoIHeads looks its losses up in its module, by these names
roi_heads.fastrcnn_loss, roi_heads.maskrcnn_loss = box_loss, mask_loss


def frs_loss(student_features, teacher_features, student_logits, teacher_logits):
    """Feature-richness distillation: (L_FPN, L_head), both weighted by the teacher's objectness.

    Lists over pyramid levels k: features (N, C, H, W), the student's adapted by phi already; RPN
    logits (N, A, H, W). With p the largest sigmoid of the teacher's logits at a position,
    L_FPN = sum_k sum p * (f_teacher - f_student)^2 / sum p, over images, positions and channels;
    L_head = sum_k sum p * BCE(sigmoid(student logit), sigmoid(teacher logit)) / sum p, over images,
    positions and anchors; sum p is over a level's images and positions in this process. Computed in
    float32. Returns two scalars. Source: G2SD supplement, detection; Du et al., "Distilling Object
    Detectors with Feature Richness" (NeurIPS 2021).
    """
    loss_fpn = loss_head = 0.0
    for feature, target, logits, target_logits in zip(
            student_features, teacher_features, student_logits, teacher_logits, strict=True):
        quality = target_logits.float().sigmoid()
        richness = quality.amax(dim=1)  # (N, H, W)
        total = richness.sum().clamp(min=torch.finfo(torch.float32).tiny)
        distance = (target.float() - feature.float()).square().sum(dim=1)
        entropy = F.binary_cross_entropy_with_logits(logits.float(), quality, reduction='none')
        loss_fpn = loss_fpn + (richness * distance).sum() / total
        loss_head = loss_head + (richness * entropy.sum(dim=1)).sum() / total
    return loss_fpn, loss_head


# ---- training ------------------------------------------------------------------------------------


def train_one_epoch(model, teacher, loader, optimizer, scheduler, scaler, meter, device, epoch,
                    start, args):
    """Trains a round of --eval_every iterations from step `start` on.

    Returns the number of steps done, fewer than all after a signal.
    """
    model.train()
    for step, (images, targets) in meter.log_every(loader, epoch, start):
        iteration = epoch * args.eval_every + step // args.accum_iter
        # supplement: alpha = 0.001 and beta = 0.1 are reached after 500 iterations
        ramp = iteration / args.distill_warmup if iteration < args.distill_warmup else 1.0
        if step % args.accum_iter == 0:
            scheduler.step(iteration)
        images = [image.to(device, non_blocking=True) for image in images]
        for target in targets:
            for key, value in target.items():
                target[key] = value.to(device, non_blocking=True)
        models.seed_everything(args.seed, epoch, step, args.rank, models.STEP)
        with gradient_sync(model, step, args):
            with torch.autocast(device.type, AMP_DTYPES[args.amp], enabled=args.amp != 'off'):
                losses, features, logits = model(images, targets)
                if teacher is not None:
                    with torch.no_grad():
                        teacher_features, teacher_logits = teacher.extract_features(images)
                    loss_fpn, loss_head = frs_loss(
                        features, teacher_features, logits, teacher_logits)
                    losses['loss_fpn'] = ramp * (args.fpn_weight * loss_fpn)
                    losses['loss_head'] = ramp * (args.head_weight * loss_head)
                loss = sum(losses.values())
        grad_norm = backward(loss, model, optimizer, scaler, step, args)
        meter.update(grad_norm, loss=loss, **losses)
        if grad_norm is not None and stop_requested(args):
            return step + 1
    return len(loader)


# ---- evaluation ----------------------------------------------------------------------------------


def mask_counts(mask, box, size):
    """Probabilities (M, M) of a box (4,), xyxy -> COCO's run lengths in an image (height, width).

    The map is read bilinearly at the centres of the box's pixels, as in detectron2, and cut at 0.5.
    Run lengths go down the columns; the first counts zeros.
    """
    pixels, places = [], []  # of columns, then of rows
    x0, y0, x1, y1 = box.tolist()
    for low, high, side in (x0, x1, size[1]), (y0, y1, size[0]):
        pixels.append(np.arange(max(0, math.floor(low)), min(side, math.ceil(high)), dtype=np.float32))
        places.append(2 * (pixels[-1] + 0.5 - low) / (high - low) - 1)  # -1 to 1 inside the box
    grid = torch.empty(len(places[0]), len(places[1]), 2)  # (columns, rows, xy)
    grid[..., 0], grid[..., 1] = torch.from_numpy(places[0])[:, None], torch.from_numpy(places[1])
    values = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
    left, top = (int(line[0]) if len(line) else 0 for line in pixels)
    flat = np.zeros(values.shape[0] * size[0] + 2, bool)  # the box's columns, a zero at either end
    columns = flat[1:-1].reshape(-1, size[0])
    columns[:, top:top + values.shape[1]] = values.numpy() >= 0.5
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + left * size[0]
    counts = np.diff(np.concatenate([[0], changes, [size[0] * size[1]]]))
    return counts[:len(counts) - (counts[-1] == 0)].tolist()


def to_results(detection, image_id, seen_size, size, category_ids):
    """One image's detections in COCO's results format, in original pixels: xywh boxes, run lengths.

    detection: see `Detector.forward`, of an image (height, width) = seen_size; size: original.
    """
    from pycocotools import mask as coco_mask
    ratio = torch.tensor([size[1] / seen_size[1], size[0] / seen_size[0]] * 2)
    detection = {key: value.cpu() for key, value in detection.items()}
    boxes, labels, results = detection['boxes'] * ratio, detection['labels'].tolist(), []
    for k, (box, label, score) in enumerate(zip(boxes, labels, detection['scores'].tolist())):
        counts = mask_counts(detection['masks'][k, 0], box, size)
        segmentation = coco_mask.frPyObjects({'size': list(size), 'counts': counts}, *size)
        segmentation['counts'] = segmentation['counts'].decode()
        x0, y0, x1, y1 = box.tolist()
        results.append({
            'image_id': image_id, 'category_id': category_ids[label - 1], 'score': score,
            'bbox': [x0, y0, x1 - x0, y1 - y0], 'segmentation': segmentation})
    return results


def average_precision(coco, results):
    """pycocotools' AP, AP50 and AP75 of boxes and masks in percent; coco: from `read_coco`."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    stats = {}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints much
        truth = COCO()
        annotations = [dict(entry) for entry in coco['annotations']]  # pycocotools adds keys
        truth.dataset = {'info': {}, **coco, 'annotations': annotations}
        truth.createIndex()
        found = truth.loadRes([dict(entry) for entry in results]) if results else COCO()
        for name, kind in (('bbox', 'bbox'), ('mask', 'segm')):
            evaluation = COCOeval(truth, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            for key, value in zip(('AP', 'AP50', 'AP75'), evaluation.stats[:3].tolist()):
                stats[f'test_{name}_{key}'] = 100 * value
    return stats


@torch.no_grad()
@torch.compiler.set_stance('force_eager')  # --compile is for training alone
def evaluate(model, loader, coco, device, args):
    """AP of boxes and masks in percent, in original pixels, over all processes; in float32.

    coco: from `read_coco`. Returns the same on each process; the first one writes --results_json.
    """
    model.eval()
    category_ids, results = [entry['id'] for entry in coco['categories']], []
    for images, targets in loader:
        detections = model([image.to(device, non_blocking=True) for image in images])
        for image, target, detection in zip(images, targets, detections):
            results += to_results(detection, target['image_id'], image.shape[1:], target['size'],
                                  category_ids)
    if args.distributed:
        parts = [None] * args.world_size if args.rank == 0 else None
        dist.gather_object(results, parts)
        results = sum(parts or [], [])
    stats = [None]
    if args.rank == 0:
        # the same order on any number of processes
        results.sort(key=lambda entry: (entry['image_id'], -entry['score']))
        if args.results_json:
            Path(args.results_json).write_text(json.dumps(results))
        objects = [entry for entry in coco['annotations'] if not entry['iscrowd']]
        stats = [average_precision(coco, results) if objects else None]
    if args.distributed:
        dist.broadcast_object_list(stats)
    if stats[0] is None:
        print(f'{args.results_json}: detections; there is no annotation to compare them with')
        return {}
    stats = {**stats[0], 'test_images': len(coco['images'])}
    print('test: box AP {test_bbox_AP:.2f} (AP50 {test_bbox_AP50:.2f}, AP75 {test_bbox_AP75:.2f}) '
          'mask AP {test_mask_AP:.2f} (AP50 {test_mask_AP50:.2f}, AP75 {test_mask_AP75:.2f}) '
          'of {test_images} images'.format(**stats))
    return stats


# ---- run plumbing: the same lines in all four scripts (tests/test_shared.py) ---------------------

AMP_DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'off': None}
stop_signal = threading.Event()


def parse_args(parser):
    """The command line's flags; --config and, with --eval, the checkpoint's args give defaults."""
    args, stored = parser.parse_args(), {}
    if args.config:
        if not Path(args.config).is_file():
            raise SystemExit(f'--config {args.config}: no such file, give the args.json of a run')
        stored = json.loads(Path(args.config).read_text())
        for name in ('config', 'output_dir', 'resume', 'script', 'commit', 'versions', 'hardware'):
            stored.pop(name, None)
        unknown = stored.keys() - vars(args).keys()
        if unknown:
            raise SystemExit(f'--config {args.config} is of another script: no flag --{min(unknown)}')
    if getattr(args, 'eval', False):
        path, checkpoint = models.find_checkpoint(args)
        if path is None:
            raise SystemExit('--eval needs --resume CHECKPOINT, the network to evaluate')
        trained = models.own_args(checkpoint)
        stored |= {name: trained[name] for name in SHAPE_FLAGS if name in trained}
    parser.set_defaults(**stored)
    return parser.parse_args()


def setup(args):
    """Joins the other processes, listens to signals, checks the output folder.

    Adds rank, world_size and distributed to args. Returns the device and what args.json will hold:
    the flags as they were given, and the commit, versions and hardware.
    """
    given = dict(vars(args))
    args.rank, args.world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    args.distributed = args.world_size > 1
    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    if args.device == 'cuda' and args.distributed:
        args.device = f'cuda:{os.environ["LOCAL_RANK"]}'
    device, cuda = torch.device(args.device), args.device.startswith('cuda')
    if cuda and not torch.cuda.is_available():
        raise SystemExit(f'--device {args.device}: no usable GPU, or its driver is too old for torch')
    if cuda and (device.index or 0) >= torch.cuda.device_count():
        raise SystemExit(f'{args.device}: this machine has {torch.cuda.device_count()} GPUs, as many '
                         'as --nproc_per_node may be')
    if cuda:
        torch.cuda.set_device(device.index or 0)
        torch.set_float32_matmul_precision('high')  # float32 products in TF32, as convolutions
    if args.distributed:  # tensors on the CPU go over gloo, and wait for no GPU
        dist.init_process_group(
            'cpu:gloo,cuda:nccl' if cuda else 'gloo', timeout=timedelta(minutes=30))
    if args.rank:
        sys.stdout = open(os.devnull, 'w')
    sys.stdout.reconfigure(line_buffering=True)
    if args.amp is None and cuda:
        args.amp = 'bf16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'fp16'
    args.amp = args.amp or 'off'
    timm.layers.set_fused_attn(cuda)  # on a CPU the fused kernel is slower, by a fifth in bf16
    models.seed_everything(args.seed, models.START)
    git = ['git', '-C', str(Path(__file__).resolve().parent), 'describe', '--always', '--dirty']
    commit = 'unknown'
    with contextlib.suppress(FileNotFoundError):  # no git on this machine
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or commit
    versions = (f'torch {torch.__version__}, torchvision {torchvision.__version__}, '
                f'timm {timm.__version__}')
    hardware = f'{args.world_size} x {torch.cuda.get_device_name() if cuda else "cpu"}'
    print(f'command: {shlex.join(sys.argv)}\n'
          f'commit {commit}, {versions}, {hardware}, amp {args.amp}')
    given |= {'script': sys.argv[0], 'commit': commit, 'versions': versions, 'hardware': hardware}
    if getattr(args, 'eval', False):
        return device, given
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    own = args.resume and (
        args.resume == 'auto' or Path(args.resume).parent.resolve() == folder.resolve())
    if not own and ((folder / 'checkpoint.pth').exists() or (folder / 'previous.pth').exists()):
        raise SystemExit(f'--output_dir {folder} holds another run: choose another folder, or '
                         'go on with it by --resume auto')
    for number in models.STOP_SIGNALS:
        signal.signal(number, request_stop)
    return device, given


def request_stop(number, frame):
    """Signal handler: training ends after its next update; a second Ctrl-C ends it at once."""
    if number == signal.SIGINT and stop_signal.is_set():
        raise KeyboardInterrupt
    stop_signal.set()


def stop_requested(args):
    """Whether any process got a signal: the same answer on all of them, which must all ask."""
    flag = torch.tensor(float(stop_signal.is_set()))
    if args.distributed:
        dist.all_reduce(flag)
    return flag.item() > 0


def gradient_sync(model, step, args):
    """Context of the forward pass: DDP averages gradients only in the last of --accum_iter steps."""
    if args.distributed and (step + 1) % args.accum_iter:
        return model.no_sync()
    return contextlib.nullcontext()


def backward(loss, model, optimizer, scaler, step, args):
    """Backward pass; the last of --accum_iter steps also updates, and returns the gradient norm."""
    scaler.scale(loss / args.accum_iter).backward()
    if (step + 1) % args.accum_iter:
        return None
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or float('inf'))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return grad_norm


def write_log(args, line):
    """Adds a line to log.txt; drops those of the same and later epochs, which have been run again."""
    path, key = Path(args.output_dir, 'log.txt'), next(iter(line))  # epoch or iteration
    if args.rank == 0:
        lines = path.read_text().splitlines() if path.exists() else []
        lines = [old for old in lines if json.loads(old)[key] < line[key]]
        path.with_suffix('.tmp').write_text('\n'.join([*lines, json.dumps(line)]) + '\n')
        path.with_suffix('.tmp').replace(path)


# ---- end of the plumbing -------------------------------------------------------------------------


def main(args):
    # 1. processes, device, seed, recipe
    device, given = setup(args)
    patch = models.parse_name(args.model).patch
    args.input_size = models.check_img_size(args.input_size, patch)
    side, other_side = args.input_size
    if patch % 4 or side != other_side or side % (4 * patch):
        raise SystemExit(f'--input_size {side} {other_side} and {args.model}: detection needs a '
                         'patch that 4 divides, and a square of a multiple of 4 patches')
    if args.warmup_iterations >= args.iterations:
        raise SystemExit(f'--warmup_iterations {args.warmup_iterations} must be below --iterations '
                         f'{args.iterations}')
    if args.weight_decay is None:
        args.weight_decay = 0.05 if args.teacher_path else 0.1
    # 2. data
    loader, val_loader, val_coco, classes = build_data(args)
    # 3. teacher: strict load, eval mode, no gradients
    teacher, adapters = None, nn.ModuleList()
    if args.teacher_path and not args.eval:
        teacher = load_detector(args.teacher_path, classes, args, args.teacher_model).to(device)
        channels = teacher.backbone.out_channels
        adapters.extend(nn.Conv2d(args.fpn_dim, channels, 3, padding=1) for _ in range(5))
    # 4. student
    if args.eval:
        path, _ = models.find_checkpoint(args)
        detector = load_detector(path, classes, args).to(device)
        evaluate(detector, val_loader, val_coco, device, args)
        return
    detector = Detector(args.model, len(classes), args)
    detector.backbone.net.set_grad_checkpointing(args.grad_checkpointing)
    if args.finetune:
        models.load_pretrained(detector.backbone.net, args.finetune)
    model_without_ddp = Student(detector, adapters).to(device)
    model = model_without_ddp
    if args.compile:  # the backbones alone: behind them, shapes depend on what is found
        detector.backbone.compile()
        if teacher is not None:
            teacher.backbone.compile()
    if args.distributed:
        device_ids = [device] if device.type == 'cuda' else None
        model = torch.nn.parallel.DistributedDataParallel(model, device_ids=device_ids)
    # 5. optimizer, schedule, loss scaler
    batch = args.batch_size * args.accum_iter * args.world_size
    print(f'arguments: {vars(args)}\nrecipe: Table 3, {"FRS" if teacher else "no"} distillation, '
          f'effective batch {batch} (the paper has {PAPER_BATCH}), lr {args.lr:.3g}, '
          f'weight decay {args.weight_decay}')
    optimizer = create_optimizer_v2(
        model_without_ddp, opt='adamw', lr=args.lr, weight_decay=args.weight_decay,
        layer_decay=args.layer_decay, fused=True)
    scheduler = MultiStepLRScheduler(  # ViTDet; timm lowers the rate one step before its milestone
        optimizer, decay_t=[round(args.iterations * share) + 1 for share in (8 / 9, 26 / 27)],
        decay_rate=0.1, warmup_t=args.warmup_iterations, warmup_lr_init=0.001 * args.lr,
        warmup_prefix=False)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
    # 6. resume
    rounds = math.ceil(args.iterations / args.eval_every)
    meter = models.Meter(args, optimizer, rounds, 'round')
    # timm's schedulers depend on the step alone; a scheduler with a state belongs here, too
    parts = {'model': detector, 'optimizer': optimizer, 'scaler': scaler, 'meter': meter}
    if teacher is not None:
        parts['adapters'] = adapters
    first_epoch, samples = models.resume(args, classes, fixed=('eval_every', 'iterations'), **parts)
    if args.rank == 0:  # a run whose resume is refused leaves the file alone
        Path(args.output_dir, 'args.json').write_text(json.dumps(given, indent=2) + '\n')
    # 7. rounds: train, save, evaluate, log
    for epoch in range(first_epoch, rounds):
        start = loader.sampler.set_epoch(epoch, samples)
        step = train_one_epoch(model, teacher, loader, optimizer, scheduler, scaler, meter, device,
                               epoch, start, args)
        models.save_checkpoint(args, epoch, step, loader, classes, **parts)
        if step < len(loader):
            print('stopped by a signal: --resume auto goes on from here')
            return
        stats = evaluate(detector, val_loader, val_coco, device, args)
        iteration = min(args.iterations, (epoch + 1) * args.eval_every)
        write_log(args, {'iteration': iteration, **meter.stats(), **stats})
        samples = 0
    print(f'done: {args.iterations} iterations in {timedelta(seconds=int(meter.seconds))} '
          f'of training, see {args.output_dir}')


if __name__ == '__main__':
    try:
        main(parse_args(get_args_parser()))
    except (Exception, SystemExit) as error:
        models.end_run(error)
    if dist.is_initialized():
        dist.destroy_process_group()
