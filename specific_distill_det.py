"""Stage 2, specific distillation for detection and instance segmentation: a ViTDet learns from labels and a teacher.

Paper:   G2SD (Huang, Peng et al., CVPR 2023, arXiv 2302.14771), Table 3; feature-richness distillation of pyramid and RPN
Network: ViTDet (Li et al., ECCV 2022) on timm's VisionTransformerSAM and torchvision's Mask R-CNN parts
Reads:   --data_path   COCO layout, annotations/instances_{train,val}2017.json, train2017/ and val2017/; any such set
         --finetune    start weights of the backbone: stage 1's checkpoint.pth, MAE, DeiT, DINO, iBOT, timm
         --teacher_path   a checkpoint of this script, trained without a teacher; without it labels alone teach
8 GPUs:  torchrun --nproc_per_node=8 specific_distill_det.py --data_path COCO --finetune runs/generic/checkpoint.pth \
         --teacher_path runs/teacher_det/checkpoint.pth
CPU:     python tools/toy_data.py --out toy --only coco
         python specific_distill_det.py --data_path toy/coco --model vit_pico_patch8 --input_size 64 --window_size 4 \
         --fpn_dim 16 --head_dim 64 --anchor_size 8 --proposals 100 --roi_batch 32 --lr 2e-3 --batch_size 4 \
         --iterations 200 --eval_every 100 --warmup_iterations 20
Writes:  output_dir/checkpoint.pth, log.txt (one JSON object per round of --eval_every iterations), args.json
Needs pycocotools besides the packages of the other stages. Evaluation alone: --eval --resume CHECKPOINT.
"""
import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections import OrderedDict
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from timm.layers import LayerNorm2d, trunc_normal_
from timm.models import checkpoint_seq
from timm.models.vision_transformer_sam import (
    Attention, Block, VisionTransformerSAM, get_rel_pos, window_partition, window_unpartition)
from timm.optim import create_optimizer_v2
from timm.scheduler import MultiStepLRScheduler
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.transforms import v2

import models

AMP_DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'off': None}
PAPER_BATCH = 64


def get_args_parser():
    """All flags with the paper's values as defaults; building it touches neither network nor GPU."""
    parser = argparse.ArgumentParser(
        description='G2SD stage 2: detection and instance segmentation (also plain ViTDet, and its teacher)',
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group('distillation')
    group.add_argument('--teacher_model', default='vit_base_patch16', help='name of the teacher')
    group.add_argument('--teacher_path', help='checkpoint of this script, path or https URL; without it labels alone teach')
    group.add_argument('--fpn_weight', type=float, default=0.001, help='weight alpha of the loss on pyramid features')
    group.add_argument('--head_weight', type=float, default=0.1, help='weight beta of the loss on RPN logits')
    group.add_argument('--distill_warmup', type=int, default=500, help='iterations until both weights are reached, linearly')

    group = parser.add_argument_group('model')
    group.add_argument('--model', default='vit_small_patch16', help='the network that learns')
    group.add_argument('--finetune', help='checkpoint to start the backbone from, path or https URL')
    group.add_argument('--input_size', type=int, nargs='+', default=[1024],
                       help='side of the square input in pixels, a multiple of 4 patches')
    group.add_argument('--window_size', type=int, default=14, help='side of the attention windows in patches')
    group.add_argument('--fpn_dim', type=int, default=256, help='channels of the pyramid and of the convolutional heads')
    group.add_argument('--head_dim', type=int, default=1024, help='width of the box head\'s linear layer')
    group.add_argument('--anchor_size', type=int, default=32,
                       help='side of the anchors on the finest level in pixels; each level doubles it. Lower it with the '
                            'input size: it also says which level a region is read from')
    group.add_argument('--proposals', type=int, default=1000, help='regions per image that the RPN hands on')
    group.add_argument('--roi_batch', type=int, default=512, help='regions per image that train the heads')
    group.add_argument('--drop_path', type=float, default=0.1, help='stochastic depth rate of the last block')
    group.add_argument('--grad_checkpointing', action='store_true',
                       help='compute the blocks twice to save memory; the result is the same')

    group = parser.add_argument_group('optimisation')
    group.add_argument('--batch_size', type=int, default=8, help='images per process and step')
    group.add_argument('--accum_iter', type=int, default=1, help='steps whose gradients are summed into one update')
    group.add_argument('--iterations', type=int, default=184375, help='updates; 184375 of 64 images are 100 epochs of COCO')
    group.add_argument('--warmup_iterations', type=int, default=250,
                       help='iterations of linear warm-up from 0.001 of the learning rate (ViTDet)')
    group.add_argument('--lr', type=float, default=1e-4,
                       help='learning rate; a tenth of it after 8/9 and a hundredth after 26/27 of the iterations (ViTDet)')
    group.add_argument('--layer_decay', type=float, default=0.7, help='learning-rate factor per block (the authors\' code)')
    group.add_argument('--weight_decay', type=float, default=0.05,
                       help='AdamW weight decay, none on 1-D parameters and positions; ViTDet-B, the teacher, has 0.1')
    group.add_argument('--clip_grad', type=float, help='largest gradient norm; not clipped unless given')

    group = parser.add_argument_group('augmentation')
    group.add_argument('--scale_jitter', type=float, nargs=2, default=[0.1, 2.0],
                       help='large-scale jitter: range of the long side, as a factor of --input_size')

    group = parser.add_argument_group('data')
    group.add_argument('--data_path', help='folder with annotations/, train2017/ and val2017/')
    group.add_argument('--train_annotations', help='COCO JSON in place of annotations/instances_train2017.json')
    group.add_argument('--train_images', help='folder in place of train2017/')
    group.add_argument('--val_annotations', help='COCO JSON in place of annotations/instances_val2017.json')
    group.add_argument('--val_images', help='folder in place of val2017/')

    group = parser.add_argument_group('run')
    group.add_argument('--config', help='args.json of another run: its values, where no flag gives another')
    group.add_argument('--output_dir', default='output_dir', help='where checkpoint.pth, log.txt and args.json go')
    group.add_argument('--resume', help='checkpoint to go on from, or auto: the one in --output_dir if there is one')
    group.add_argument('--eval', action='store_true', help='evaluate the checkpoint given by --resume, and stop')
    group.add_argument('--eval_every', type=int, default=5000,
                       help='iterations of a round, which ends with evaluation, a line of log.txt and a checkpoint')
    group.add_argument('--results_json', help='file for the detections of the last evaluation, in COCO\'s format')
    group.add_argument('--save_every', type=int, default=0,
                       help='also keep checkpoint-N.pth every so many epochs (or rounds); 0: never')
    group.add_argument('--print_freq', type=int, default=50, help='steps between printed lines')
    group.add_argument('--num_workers', type=int, default=10, help='data-loading processes per training process')
    group.add_argument('--seed', type=int, default=0, help='seed of everything random')
    group.add_argument('--device', help='cuda or cpu; cuda where there is one unless given')
    group.add_argument('--compile', action='store_true',
                       help='torch.compile the networks: a minute at the start, then faster steps, equal up to rounding')
    group.add_argument('--amp', choices=['bf16', 'fp16', 'off'],
                       help='autocast type; by default bf16 where the GPU has it, else fp16, and off on a CPU')
    return parser


def resolve_recipe(args):
    """Checks what belongs to this stage alone; fills in the four paths of the data. Raises InputError."""
    if args.eval and not args.resume:
        raise models.InputError('--eval needs --resume CHECKPOINT, the detector to evaluate')
    patch = models.parse_name(args.model).patch
    if patch % 4 or args.input_size[0] != args.input_size[-1] or args.input_size[0] % (4 * patch):
        raise models.InputError(f'--input_size {" ".join(map(str, args.input_size))} and {args.model}: detection needs a '
                                'patch that 4 divides, and one side, a multiple of 4 patches')
    if args.teacher_path and models.parse_name(args.teacher_model).patch != patch:
        raise models.InputError(f'{args.model} and {args.teacher_model} differ in patch size: their pyramids do not match')
    if args.warmup_iterations >= args.iterations and not args.eval:
        raise models.InputError(f'--warmup_iterations {args.warmup_iterations} must be below --iterations {args.iterations}')
    if args.results_json and (os.path.isdir(args.results_json) or not Path(args.results_json).absolute().parent.is_dir()):
        raise models.InputError(f'--results_json {args.results_json}: give a file in a folder that exists')
    if args.results_json and not args.eval and Path(os.path.realpath(args.output_dir)).is_relative_to(
            os.path.realpath(args.results_json)):
        raise models.InputError(f'--results_json {args.results_json} will be the output folder: give a file')
    if not 0 < args.scale_jitter[0] <= args.scale_jitter[1] <= 100:
        raise models.InputError('--scale_jitter takes two positive factors up to 100, the smaller one first')
    for split in ('train', 'val'):
        for what, default in (('annotations', f'annotations/instances_{split}2017.json'), ('images', f'{split}2017')):
            flag = f'{split}_{what}'
            if getattr(args, flag) is None and not (args.eval and split == 'train'):
                if not args.data_path:
                    raise models.InputError(f'--data_path is missing (or --{flag}): the folder with annotations/, '
                                            'train2017/ and val2017/')
                setattr(args, flag, str(Path(args.data_path) / default))
    if not args.eval:
        models.say(f'recipe: Table 3, {"with" if args.teacher_path else "no"} distillation')


# ------------------------------------------------------------------------------------------------------------------ data


def read_coco(path, image_folder):
    """COCO JSON -> (images, annotations of each image id, categories by ascending id), checked; raises InputError.

    Every annotation gets the keys that evaluation needs: its own new `id` from 1 (pycocotools takes a match with id 0 for
    none), `iscrowd` and `area`. Boxes are xywh in pixels of the original image. What has no polygon of three corners is
    left out.
    """
    def fail(what):
        raise models.InputError(f'{path}: {what}')

    def number(value, least=-1e5, most=1e5):  # beyond, pycocotools' 32-bit corners overflow and end the process
        return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most

    def pixels(counts):
        """Sum of COCO's compressed run lengths; -1 if they are none."""
        lengths, value, bits = [], 0, 0
        for char in counts:
            code = ord(char) - 48
            if not 0 <= code < 64 or bits > 30:
                return -1
            value, bits = value | (code & 31) << bits, bits + 5
            if not code & 32:  # last part: sign, then the difference from the run before the last
                value += (-1 << bits if code & 16 else 0) + (lengths[-2] if len(lengths) > 2 else 0)
                if value < 0:
                    return -1
                lengths, value, bits = [*lengths, value], 0, 0
        return -1 if bits else sum(lengths)

    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise models.InputError(f'{path} is no readable JSON file ({str(error)[:100]})') from error
    parts = [content.get(key) if isinstance(content, dict) else None for key in ('images', 'annotations', 'categories')]
    for key, part in zip(('images', 'annotations', 'categories'), parts):
        if not isinstance(part, list) or not all(isinstance(entry, dict) for entry in part):
            fail(f'{key!r} is no list of objects: is it a COCO instances file?')
    images, annotations, categories = parts
    for entry in images:
        if type(entry.get('id')) is not int or not isinstance(entry.get('file_name'), str) or \
                any(type(entry.get(side)) is not int or entry[side] < 1 for side in ('height', 'width')):
            fail(f'image {entry.get("id")!r} needs an integer id, a file_name, and height and width in pixels')
    for entry in categories:
        if type(entry.get('id')) is not int or not isinstance(entry.get('name'), str):
            fail(f'category {entry.get("id")!r} needs an integer id and a name')
    objects, known = {entry['id']: [] for entry in images}, {entry['id'] for entry in categories}
    if len(objects) < len(images) or len(known) < len(categories):
        fail('two images, or two categories, have the same id')
    if not os.path.isdir(image_folder):
        fail(f'its images should be in {image_folder}, which is no folder')
    present = {file.name for file in os.scandir(image_folder)}  # one listing is faster than a query per file
    for entry in images:
        if entry['file_name'] not in present and not os.path.isfile(Path(image_folder) / entry['file_name']):
            fail(f'it names {entry["file_name"]!r}, which is not in {image_folder}')
    sizes = {entry['id']: [entry['height'], entry['width']] for entry in images}
    for count, entry in enumerate(annotations, 1):
        name, box, shape = f'annotation {entry.get("id")!r}', entry.get('bbox'), entry.get('segmentation')
        if not isinstance(entry.get('image_id'), int) or entry['image_id'] not in objects:
            fail(f'{name} belongs to image {entry.get("image_id")!r}, which is not in the file')
        if not isinstance(entry.get('category_id'), int) or entry['category_id'] not in known:
            fail(f'{name} has the unknown category {entry.get("category_id")!r}')
        if not isinstance(box, list) or len(box) != 4 or not all(map(number, box)):
            fail(f'{name} has no bbox [x, y, width, height]')
        if isinstance(shape, dict):
            counts = shape.get('counts')
            if shape.get('size') != sizes[entry['image_id']] or not (
                    isinstance(counts, str) and pixels(counts) == math.prod(shape['size']) or (
                    isinstance(counts, list) and all(type(run) is int and run >= 0 for run in counts)
                    and sum(counts) == math.prod(shape['size']))):
                fail(f'{name}: its run lengths are not those of an image of its size')
        elif not isinstance(shape, list) or not shape or not all(
                isinstance(polygon, list) and len(polygon) % 2 == 0 and all(map(number, polygon)) for polygon in shape):
            fail(f'{name} has no segmentation: polygons, or run lengths')
        else:  # fewer than three corners are nothing to fill, and pycocotools takes two for a box
            shape = [polygon for polygon in shape if len(polygon) >= 6]
            if not shape:
                continue
        objects[entry['image_id']].append({
            'id': count, 'image_id': entry['image_id'], 'category_id': entry['category_id'], 'bbox': box,
            'segmentation': shape, 'iscrowd': int(bool(entry.get('iscrowd'))),
            'area': entry['area'] if number(entry.get('area'), 0, math.inf) else box[2] * box[3]})
    return images, objects, sorted(categories, key=lambda entry: entry['id'])


def decode_mask(segmentation, height, width, top=0, left=0, crop_height=None, crop_width=None):
    """COCO polygons or run lengths of an image (height, width) -> mask (crop_height, crop_width) uint8, only that crop.

    top, left: whole pixels. Polygons are moved, so nothing larger than the crop is made; run lengths are cut.
    """
    from pycocotools import mask as coco_mask  # imported lazily: the other stages do without it
    crop = crop_height or height, crop_width or width
    if isinstance(segmentation, dict):
        compressed = isinstance(segmentation['counts'], str)
        whole = coco_mask.decode(segmentation if compressed else coco_mask.frPyObjects(segmentation, height, width))
        return np.ascontiguousarray(whole[top:top + crop[0], left:left + crop[1]])
    polygons = [(np.array(polygon).reshape(-1, 2) - (left, top)).ravel().tolist() for polygon in segmentation]
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *crop)))


def masks_to_boxes(masks):
    """Masks (K, H, W), none of them empty -> boxes (K, 4) float, xyxy in pixels; the last pixel lies inside the box.

    torchvision.ops.masks_to_boxes leaves the last pixel out, and is much slower.
    """
    boxes = []
    for axis in (1, 2):  # columns give x, rows give y
        hit = masks.amax(axis)  # (K, W), then (K, H)
        boxes.append((hit.int().argmax(1), hit.shape[1] - hit.flip(1).int().argmax(1)))
    (x0, x1), (y0, y1) = boxes
    return torch.stack([x0, y0, x1, y1], dim=1).float()


def draw_jitter(height, width, size, scale_range):
    """Large-scale jitter (Ghiasi et al., CVPR 2021), drawn from numpy's generator: which part of an image, how large, flip.

    The image is scaled so that its long side is size * U(scale_range), then cut to at most size x size. Returns the part,
    (top, left, height, width) in whole pixels of the original, so that it can be cut before it is enlarged; its new
    (height, width); and whether it is flipped.
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


def fit(pixels, size):
    """Image (3, H, W) uint8 -> the same with its long side `size`, as the network sees it in evaluation."""
    scaled = [max(1, round(side * size / max(pixels.shape[1:]))) for side in pixels.shape[1:]]
    return v2.functional.resize(pixels, scaled, antialias=True)


class CocoDataset(torch.utils.data.Dataset):
    """Images of a COCO-format set, read and prepared for the network; random only in (seed, pass, index).

    Training: (pass, index) -> (image (3, h, w) uint8, target), jittered, with `boxes` (K, 4) xyxy in its pixels, `labels`
    (K,) from 1 and `masks` (K, h, w) uint8; K may be 0 after the crop. Crowds and degenerate boxes are left out, and so
    are images without any other object. Evaluation: the long side becomes the input size; the target holds `image_id` and
    the original `size` (height, width). An unreadable image raises InputError with its name.
    """

    def __init__(self, coco, image_folder, args, is_train):
        images, objects, categories = coco
        self.folder, self.size, self.seed, self.is_train = Path(image_folder), args.input_size[0], args.seed, is_train
        self.scale_range, self.labels = args.scale_jitter, {entry['id']: k for k, entry in enumerate(categories, 1)}
        records = []
        for image in images:
            kept = [entry for entry in objects[image['id']] if not entry['iscrowd'] and min(entry['bbox'][2:]) > 0]
            if kept or not is_train:
                records.append(json.dumps([image, kept if is_train else []]).encode())
        # one buffer: worker processes share its memory, and would copy a list of objects by counting references to them
        self.buffer, self.ends = np.frombuffer(b''.join(records), np.uint8), np.cumsum([len(entry) for entry in records])

    def __len__(self):
        return len(self.ends)

    def read(self, index, header_only=False):
        """(entry of `images`, kept annotations, image (3, H, W) uint8, or None if only its header is to be read)."""
        start = self.ends[index - 1] if index else 0
        image, kept = json.loads(self.buffer[start:self.ends[index]].tobytes())
        path = self.folder / image['file_name']
        try:
            with models.open_image(path) as file:
                width, height = file.size
                pixels = None if header_only else v2.functional.pil_to_tensor(models.to_rgb(file))
        except Exception as error:  # decoders raise nearly anything on a damaged file
            raise models.InputError(f'cannot read {path} ({(str(error) or type(error).__name__).splitlines()[0]}): mend '
                                    'the file, or remove it from the annotations') from error
        if (height, width) != (image['height'], image['width']):
            raise models.InputError(f'{path} is {height} high and {width} wide, its annotations say {image["height"]} and '
                                    f'{image["width"]}')
        return image, kept, pixels

    def __getitem__(self, key):
        epoch, index = key
        models.seed_everything(self.seed, epoch, index, models.SAMPLE)
        image, kept, pixels = self.read(index)
        height, width = pixels.shape[1:]
        if not self.is_train:
            return fit(pixels, self.size), {'image_id': image['id'], 'size': (height, width)}
        part, new_size, flip = draw_jitter(height, width, self.size, self.scale_range)
        top, left, part_height, part_width = part
        pixels = v2.functional.resized_crop(pixels, *part, new_size, antialias=True)
        boxes = [entry['bbox'] for entry in kept]
        kept = [entry for entry, (x, y, w, h) in zip(kept, boxes)  # masks of what was cut off are not decoded
                if left < x + w and x < left + part_width and top < y + h and y < top + part_height]
        masks = [torch.from_numpy(decode_mask(entry['segmentation'], height, width, *part)) for entry in kept]
        masks = torch.stack(masks) if masks else torch.zeros(0, part_height, part_width, dtype=torch.uint8)
        masks = v2.functional.resize(masks, new_size, interpolation=v2.InterpolationMode.NEAREST_EXACT)
        if flip:
            pixels, masks = v2.functional.horizontal_flip(pixels), v2.functional.horizontal_flip(masks)
        seen = masks.flatten(1).any(1).bool()
        labels = torch.tensor([self.labels[entry['category_id']] for entry in kept], dtype=torch.int64)[seen]
        masks = masks[seen].contiguous()
        boxes = masks_to_boxes(masks) if len(masks) else torch.zeros(0, 4)
        return pixels.contiguous(), {'boxes': boxes, 'labels': labels, 'masks': masks}


def collate(batch):
    """[(image, target)] -> (images, targets), two lists: sizes differ until the network pads them."""
    return tuple(map(list, zip(*batch)))


def build_data(args):
    """(training loader, validation loader, validation annotations, class names); no training loader with --eval.

    Every validation image belongs to exactly one process, once. Raises InputError.
    """
    if not importlib.util.find_spec('pycocotools'):
        raise models.InputError('detection needs pycocotools: pip install pycocotools')
    options = {'batch_size': args.batch_size, 'num_workers': args.num_workers, 'collate_fn': collate,
               'pin_memory': args.device.startswith('cuda'), 'worker_init_fn': models.ignore_stop}
    val = read_coco(args.val_annotations, args.val_images)
    classes = [entry['name'] for entry in val[2]]
    if not any(not entry['iscrowd'] for objects in val[1].values() for entry in objects):
        raise models.InputError(f'{args.val_annotations} has no object to evaluate')
    own_share = [(0, index) for index in range(args.rank, len(val[0]), args.world_size)]
    val_data = CocoDataset(val, args.val_images, args, False)
    for _, index in own_share:  # now, not after hours of training
        val_data.read(index, header_only=True)
    val_loader = torch.utils.data.DataLoader(val_data, sampler=own_share, **options)
    if args.eval:
        return None, val_loader, val, classes
    coco = read_coco(args.train_annotations, args.train_images)
    ours, theirs = ([(entry['id'], entry['name']) for entry in part[2]] for part in (coco, val))
    if ours != theirs:
        raise models.InputError(f'{args.train_annotations} and {args.val_annotations} have different categories, for '
                                f'example {min(set(ours) ^ set(theirs))}')
    train = CocoDataset(coco, args.train_images, args, True)
    if not len(train):
        raise models.InputError(f'{args.train_annotations} has no training annotations (crowds do not count)')
    models.say(f'data: {len(train)} of {len(coco[0])} training images have objects; {len(val[0])} validation images; '
               f'{len(classes)} classes')
    train_loader = torch.utils.data.DataLoader(train, sampler=models.RoundSampler(len(train), args),
                                               persistent_workers=args.num_workers > 0, **options)
    return train_loader, val_loader, val, classes


# --------------------------------------------------------------------------------------------------------------- network


class FoldedAttention(Attention):
    """timm's attention with decomposed relative positions, without its (L, L) bias: the same numbers.

    q.k/sqrt(d) + q.R_h[row of k] + q.R_w[column of k] is one inner product of longer vectors: q' = [q, q.R_h*sqrt(d),
    q.R_w*sqrt(d)] and k' = [k, one-hot row, one-hot column]. So the fused kernels apply.
    """

    def forward(self, x):
        n, height, width, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, height * width, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # (N, heads, L, d)
        grid = q.unflatten(2, (height, width))
        by_row = torch.einsum('nhijd,ikd->nhijk', grid, get_rel_pos(height, height, self.rel_pos_h).to(q.dtype))
        by_column = torch.einsum('nhijd,jkd->nhijk', grid, get_rel_pos(width, width, self.rel_pos_w).to(q.dtype))
        q = torch.cat([q, by_row.flatten(2, 3) / self.scale, by_column.flatten(2, 3) / self.scale], dim=-1)
        rows, columns = (torch.eye(side, dtype=k.dtype, device=k.device) for side in (height, width))
        place = torch.cat([rows.repeat_interleave(width, 0), columns.repeat(height, 1)], dim=1)  # (L, height + width)
        k = torch.cat([k, place.expand(n, self.num_heads, -1, -1)], dim=-1)
        x = F.scaled_dot_product_attention(q, k, F.pad(v, (0, height + width)), scale=self.scale)[..., :v.shape[-1]]
        return self.proj(x.transpose(1, 2).reshape(n, height, width, -1))


class ImageWiseBlock(Block):
    """timm's block, but stochastic depth drops a branch of whole images (ViTDet); timm's drops single windows."""

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

    Four blocks attend globally, each the last of a quarter (2, 5, 8 and 11 of 12), the others in windows. The position
    table stays that of 224 pixels and is resized in each forward, with gradients, bicubic as in ViTDet (timm antialiases).
    """

    def __init__(self, name, img_size, window_size=14, drop_path_rate=0.0):
        parsed = models.parse_name(name)
        if parsed.is_mae:
            raise models.InputError(f'{name!r} names an autoencoder; its encoder alone is called vit_...')
        size, side = parsed.size, max(1, 224 // parsed.patch)
        super().__init__(
            img_size=img_size, patch_size=parsed.patch, embed_dim=size.dim, depth=size.depth, num_heads=size.heads,
            num_classes=0, neck_chans=0, global_pool='', use_rel_pos=True, window_size=window_size,
            global_attn_indexes=[size.depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)], block_fn=ImageWiseBlock,
            drop_path_rate=drop_path_rate, norm_layer=partial(nn.LayerNorm, eps=1e-6))
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
        positions = F.interpolate(self.pos_embed.permute(0, 3, 1, 2), size=x.shape[1:3], mode='bicubic')
        x = x + positions.permute(0, 2, 3, 1)
        return (checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)).permute(0, 3, 1, 2)


class SimpleFeaturePyramid(nn.Module):
    """ViTDet's pyramid: every level is made from the last feature map alone, at 4x, 2x, 1x, 1/2x and 1/4x its resolution."""

    def __init__(self, net, dim, out_channels):
        super().__init__()
        self.net, self.out_channels = net, out_channels

        def level(width, *scale):
            return nn.Sequential(*scale, nn.Conv2d(width, out_channels, 1, bias=False), LayerNorm2d(out_channels),
                                 nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), LayerNorm2d(out_channels))

        def double(width):
            return nn.ConvTranspose2d(width, width // 2, 2, stride=2)

        self.levels = nn.ModuleList([level(dim // 4, double(dim), LayerNorm2d(dim // 2), nn.GELU(), double(dim // 2)),
                                     level(dim // 2, double(dim)), level(dim), level(dim, nn.MaxPool2d(2))])

    def forward(self, images):
        x = self.net(images)
        features = [level(x) for level in self.levels]
        features.append(F.max_pool2d(features[-1], 1, stride=2))
        return OrderedDict((str(k), feature) for k, feature in enumerate(features))


class AnchorsAsTheyAre(AnchorGenerator):
    """torchvision's anchors, neither rounded to whole pixels nor cast to the features' half precision (4 pixels at 1024)."""

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device='cpu'):
        height = torch.tensor(scales, dtype=dtype, device=device) * torch.tensor(aspect_ratios, device=device).sqrt()
        width = torch.tensor(scales, dtype=dtype, device=device) ** 2 / height
        return torch.stack([-width, -height, width, height], dim=1) / 2

    def set_cell_anchors(self, dtype, device):
        super().set_cell_anchors(torch.float32, device)


class Float32RPNHead(RPNHead):
    """torchvision's head with float32 outputs under any autocast; keeps the logits, which the distillation loss needs."""

    def forward(self, features):
        self.logits, deltas = ([level.float() for level in part] for part in super().forward(features))
        return self.logits, deltas


class Float32Predictor(FastRCNNPredictor):
    """torchvision's predictor with float32 outputs under any autocast: boxes of 1024 pixels do not fit 8 bits."""

    def forward(self, x):
        return tuple(part.float() for part in super().forward(x))


class AlignedRoIPooler(MultiScaleRoIAlign):
    """RoIAlign, pixel-aligned, from the level that fits a region's size; levels and strides are given, not guessed.

    torchvision's own infers its scales from the unpadded sizes of the first batch, and is off by half a feature pixel.
    """

    def __init__(self, output_size, strides, canonical):
        super().__init__([str(k) for k in range(len(strides))], output_size, sampling_ratio=0)
        self.strides, self.canonical = strides, canonical

    def forward(self, x, boxes, image_shapes):
        """Features by level, boxes per image (K_i, 4) xyxy in pixels of the input -> (sum K_i, C, size, size) float32."""
        rois = torch.cat([F.pad(part, (1, 0), value=index) for index, part in enumerate(boxes)])  # (K, 5)
        side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp(min=1e-6).sqrt()
        # FPN, equation 1: a region of the canonical size is read from the third level
        levels = (2 + (side / self.canonical).log2()).floor().clamp(0, len(self.strides) - 1)
        parts = [roi_align(x[name].float(), rois[levels == k], self.output_size, 1 / stride, sampling_ratio=0, aligned=True)
                 for k, (name, stride) in enumerate(zip(self.featmap_names, self.strides))]
        return torch.cat(parts)[levels.argsort(stable=True).argsort()]  # from the order of levels back to that of boxes


class KeepScale(GeneralizedRCNNTransform):
    """Normalises, and pads bottom right with zeros to the input size. torchvision's would rescale and undo the jitter."""

    def normalize(self, image):
        return super().normalize(image.float() / 255)

    def resize(self, image, target=None):
        return image, target


class Detector(MaskRCNN):
    """ViTDet's Mask R-CNN: plain ViT, simple feature pyramid, RPN with 2 convolutions, heads with 4 and channel norms."""

    def __init__(self, name, num_classes, args):
        patch, dim, width = models.parse_name(name).patch, models.parse_name(name).size.dim, args.fpn_dim
        # 7 x 32 is FPN's 224, the side of a region that is read at 1x
        strides = [patch // 4, patch // 2, patch, 2 * patch]
        pooler = partial(AlignedRoIPooler, strides=strides, canonical=7 * args.anchor_size)
        net = PlainBackbone(name, args.input_size[0], args.window_size, args.drop_path)
        super().__init__(
            SimpleFeaturePyramid(net, dim, width),
            rpn_anchor_generator=AnchorsAsTheyAre(tuple((args.anchor_size * 2 ** k,) for k in range(5)), ((0.5, 1, 2),) * 5),
            rpn_head=Float32RPNHead(width, 3, conv_depth=2),
            # twice as many before suppression in training, as many in test (ViTDet); torchvision would hand on 2,000
            rpn_pre_nms_top_n_train=2 * args.proposals, rpn_pre_nms_top_n_test=args.proposals,
            rpn_post_nms_top_n_train=args.proposals, rpn_post_nms_top_n_test=args.proposals,
            box_batch_size_per_image=args.roi_batch, box_roi_pool=pooler(7),
            box_head=FastRCNNConvFCHead((width, 7, 7), [width] * 4, [args.head_dim], norm_layer=LayerNorm2d),
            box_predictor=Float32Predictor(args.head_dim, num_classes + 1),
            mask_roi_pool=pooler(14), mask_head=MaskRCNNHeads(width, [width] * 4, 1, norm_layer=LayerNorm2d),
            mask_predictor=MaskRCNNPredictor(width, width, num_classes + 1))
        self.transform = KeepScale(0, 0, self.transform.image_mean, self.transform.image_std,
                                   size_divisible=args.input_size[0])
        heads, linear = self.roi_heads, self.roi_heads.box_head[-2]  # behind it a ReLU
        # detectron2's start values
        nn.init.kaiming_uniform_(linear.weight, a=1)
        nn.init.normal_(heads.box_predictor.cls_score.weight, std=0.01)
        for layer in (heads.box_predictor.bbox_pred, heads.mask_predictor.mask_fcn_logits):
            nn.init.normal_(layer.weight, std=0.001)
        for layer in (linear, *heads.box_predictor.children(), heads.mask_predictor.conv5_mask,
                      heads.mask_predictor.mask_fcn_logits):
            nn.init.zeros_(layer.bias)

    def look(self, images):
        """What a teacher gives: images, a list of (3, h, w) uint8 -> (five pyramid levels, RPN logits of each)."""
        features = list(self.backbone(self.transform(images)[0].tensors).values())
        return features, self.rpn.head(features)[0]

    def forward(self, images, targets=None):
        """images: a list of (3, h, w) uint8, no side above the input size.

        Training: (losses by name, five pyramid levels, RPN logits of each). Evaluation: for each image `boxes` (K, 4)
        xyxy in its pixels, `labels` (K,) from 1, `scores` (K,) and `masks` (K, 1, 28, 28), probabilities inside the box.
        """
        images, targets = self.transform(images, targets)
        features = self.backbone(images.tensors)
        proposals, losses = self.rpn(images, features, targets)
        detections, roi_losses = self.roi_heads(features, proposals, images.image_sizes, targets)
        logits, self.rpn.head.logits = self.rpn.head.logits, None
        return ({**losses, **roi_losses}, list(features.values()), logits) if self.training else detections


class Student(nn.Module):
    """What is trained: a detector, and with a teacher the adapters phi, a 3x3 convolution per level, for training only."""

    def __init__(self, detector, adapters):
        super().__init__()
        self.detector, self.adapters = detector, adapters

    def forward(self, images, targets):
        """-> (losses by name, adapted pyramid levels, empty without adapters; RPN logits of each level)."""
        losses, features, logits = self.detector(images, targets)
        return losses, [adapt(level) for adapt, level in zip(self.adapters, features)], logits

    def group_matcher(self, coarse=False):
        """Layer decay as ViTDet has it: stem, blocks, and everything behind the backbone at the full rate."""
        net = r'^detector\.backbone\.net\.'
        return {'stem': net + '(?:pos_embed|patch_embed)', 'blocks': [(net + r'blocks\.(\d+)', None)]}

    def no_weight_decay(self):
        """Names of absolute and relative positions; timm adds everything one-dimensional."""
        return {name for name, _ in self.named_parameters() if 'pos_embed' in name or 'rel_pos' in name}


def load_detector(name, path, classes, args):
    """The detector in a checkpoint of this script, frozen and in eval mode. Raises InputError, also for other classes."""
    checkpoint = models.read_checkpoint(path)
    state = models.flat_state_dict(checkpoint, path)
    if 'rpn.head.cls_logits.weight' not in state:
        raise models.InputError(f'{path} holds no detector: give a checkpoint of specific_distill_det.py')
    models.check_classes(checkpoint.get('classes'), classes, path)
    # anchors and windows change what a network does, and no shape tells
    trained = models.stored_args(checkpoint)
    for flag in ('input_size', 'window_size', 'fpn_dim', 'head_dim', 'anchor_size'):
        theirs = trained.get(flag, getattr(args, flag))
        if theirs != getattr(args, flag):
            raise models.InputError(f'{path} was trained with --{flag} {theirs}, not with {getattr(args, flag)}')
    detector = Detector(name, len(classes), args)
    models.load_exactly(detector, state, path)
    models.say(f'detector: {len(state)} entries of {path}')
    return detector.requires_grad_(False).eval()


# -------------------------------------------------------------------------------------------------------------- training


def frs_loss(student_features, teacher_features, student_logits, teacher_logits):
    """Feature-richness distillation: (L_FPN, L_head), both weighted by the teacher's objectness.

    Lists over pyramid levels k: features (N, C, H, W), the student's adapted by phi already; RPN logits (N, A, H, W).
    With p the largest sigmoid of the teacher's logits over the anchors of a position,
    L_FPN = sum_k sum p * (f_teacher - f_student)^2 / sum p, summed over images, positions and channels;
    L_head = sum_k sum p * BCE(sigmoid(student logit), sigmoid(teacher logit)) / sum p, over images, positions and anchors;
    sum p is over the images and positions of a level in this process. Computed in float32. Returns two scalars.
    Source: G2SD supplement, detection; Du et al., "Distilling Object Detectors with Feature Richness" (NeurIPS 2021).
    """
    loss_fpn = loss_head = 0.0
    for feature, target, logits, target_logits in zip(
            student_features, teacher_features, student_logits, teacher_logits, strict=True):
        quality = target_logits.float().sigmoid()
        richness = quality.amax(dim=1)  # (N, H, W)
        total = richness.sum().clamp(min=torch.finfo(torch.float32).tiny)
        distance = (target.float() - feature.float()).square().sum(dim=1)
        entropy = F.binary_cross_entropy_with_logits(logits.float(), quality, reduction='none').sum(dim=1)
        loss_fpn, loss_head = loss_fpn + (richness * distance).sum() / total, loss_head + (richness * entropy).sum() / total
    return loss_fpn, loss_head


def distillation_ramp(iteration, warmup):
    """Factor of both distillation terms: min(1, iteration / warmup), 1 without warm-up (supplement: 500 iterations)."""
    return min(1.0, iteration / warmup) if warmup else 1.0


def train_one_epoch(model, teacher, loader, optimizer, scheduler, scaler, progress, device, epoch, args):
    """One round of --eval_every iterations; `progress` keeps the means and stops at a non-finite loss."""
    model.train()
    for step, (images, targets) in progress.watch(loader, epoch):
        iteration = epoch * args.eval_every + step // args.accum_iter
        if step % args.accum_iter == 0:
            scheduler.step(iteration)
        images = [image.to(device, non_blocking=True) for image in images]
        targets = [{key: value.to(device, non_blocking=True) for key, value in target.items()} for target in targets]
        models.seed_everything(args.seed, epoch, step, args.rank, models.STEP)
        update = (step + 1) % args.accum_iter == 0
        with model.no_sync() if args.distributed and not update else contextlib.nullcontext():
            with torch.autocast(device.type, dtype=AMP_DTYPES[args.amp], enabled=args.amp != 'off'):
                losses, features, logits = model(images, targets)
                loss = sum(losses.values())
                if teacher is not None:
                    with torch.no_grad():
                        teacher_features, teacher_logits = teacher.look(images)
                    losses['loss_fpn'], losses['loss_head'] = frs_loss(features, teacher_features, logits, teacher_logits)
                    # supplement: L = L_GT + alpha L_FPN + beta L_head, alpha = 0.001, beta = 0.1
                    distilled = args.fpn_weight * losses['loss_fpn'] + args.head_weight * losses['loss_head']
                    loss = loss + distillation_ramp(iteration, args.distill_warmup) * distilled
            scaler.scale(loss / args.accum_iter).backward()
        if update:
            scaler.unscale_(optimizer)
            progress.grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        progress.add(optimizer, loss=loss, **losses)
    return progress.means()


def to_results(detection, image_id, seen_size, size, category_ids):
    """One image's detections in COCO's results format, in original pixels: xywh boxes and run-length masks.

    detection: see `Detector.forward`, in pixels of an image (height, width) = seen_size; size: the original's.
    """
    from pycocotools import mask as coco_mask
    ratio = torch.tensor([size[1] / seen_size[1], size[0] / seen_size[0]] * 2)
    detection = {key: value.cpu() for key, value in detection.items()}
    boxes, results = detection['boxes'] * ratio, []
    for k, (box, label, score) in enumerate(zip(boxes, detection['labels'].tolist(), detection['scores'].tolist())):
        # one at a time: a hundred masks of a large photograph take gigabytes
        mask = paste_masks_in_image(detection['masks'][k:k + 1], box[None], size)[0, 0] >= 0.5
        segmentation = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
        x0, y0, x1, y1 = box.tolist()
        results.append({'image_id': image_id, 'category_id': category_ids[label - 1], 'score': score,
                        'bbox': [x0, y0, x1 - x0, y1 - y0],
                        'segmentation': {**segmentation, 'counts': segmentation['counts'].decode()}})
    return results


def average_precision(coco, results):
    """pycocotools' AP, AP50 and AP75 of boxes and masks in percent, as a dict; coco: what `read_coco` gave."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    images, objects, categories = coco
    stats = {}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints much
        truth = COCO()
        truth.dataset = {'info': {}, 'images': images, 'categories': categories,
                         'annotations': [dict(entry) for part in objects.values() for entry in part]}
        truth.createIndex()
        for name, kind in (('bbox', 'bbox'), ('mask', 'segm')):
            found = truth.loadRes([dict(entry) for entry in results]) if results else COCO()
            evaluation = COCOeval(truth, found, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            for key, value in zip(('AP', 'AP50', 'AP75'), evaluation.stats[:3].tolist()):
                stats[f'test_{name}_{key}'] = 100 * value
    return stats


@torch.no_grad()
def evaluate(model, loader, coco, device, args):
    """AP of boxes and masks in percent over all processes, each image once, in original pixels; the same on each process.

    In float32 whatever --amp says. coco: what `read_coco` gave. Writes --results_json from rank 0.
    """
    model.eval()
    category_ids, results = [entry['id'] for entry in coco[2]], []
    for images, targets in models.until_stopped(loader):
        detections = model([image.to(device, non_blocking=True) for image in images])
        for image, target, detection in zip(images, targets, detections, strict=True):
            results += to_results(detection, target['image_id'], image.shape[1:], target['size'], category_ids)
    stats = [None]
    if args.distributed:
        parts = [None] * args.world_size if args.rank == 0 else None
        dist.gather_object(results, parts)
        results = sum(parts, []) if args.rank == 0 else None
    if args.rank == 0:
        results.sort(key=lambda entry: (entry['image_id'], -entry['score']))  # in one order on any number of processes
        if args.results_json:
            try:
                Path(args.results_json).write_text(json.dumps(results))
            except OSError as error:
                raise models.InputError(f'--results_json {args.results_json}: {error.strerror}') from error
        stats = [average_precision(coco, results)]
    if args.distributed:
        dist.broadcast_object_list(stats)
    models.say(*(f'{what} AP {stats[0][f"test_{name}_AP"]:.2f} (AP50 {stats[0][f"test_{name}_AP50"]:.2f}, AP75 '
                 f'{stats[0][f"test_{name}_AP75"]:.2f})' for what, name in (('test: box', 'bbox'), ('mask', 'mask'))),
               f'of {len(coco[0])} images')
    return {**stats[0], 'test_images': len(coco[0])}


# ---- shared by all scripts, byte-equal: tests/test_shared.py ---------------------------------------------------------


class Progress:
    """Means of an epoch (or round), kept on the device: a host sync per printed line, where a failed run is stopped.

    Also where the run stands in it: `resume_checkpoint` sets that, `watch` goes on from there, and saves by `save(last
    finished epoch)` when a signal has asked the run to end.
    """

    def __init__(self, args, total, unit='epoch'):
        self.args, self.total, self.unit, self.named, self.skipped = args, total, unit, set(), 0
        self.first, self.seconds, self.save, self.scaler = 0, 0.0, None, None  # the last two: see `main`, paragraph 6

    def watch(self, loader, epoch):
        """Yields (step, batch), measures how long the loop waits for data, and prints every --print_freq steps.

        Raises models.Stopped after the update at which any process had got a stop signal, when that is saved.
        """
        if self.first and len(loader) != self.steps:
            raise models.InputError(f'{self.unit} {epoch + 1} has {len(loader)} steps, and had {self.steps} when it was '
                                    'interrupted: give the same data, or resume a checkpoint of an end')
        if not self.first:
            self.sums, self.skipped, self.measured = 0.0, 0, []
        self.epoch, self.steps, self.begun, self.step = epoch, len(loader), self.first, self.first - 1
        self.rows, self.waited, self.grad_norm, self.first = [], 0.0, torch.zeros(()), 0
        self.start = self.clock = ready = time.time()
        if self.begun:  # what was done is passed over by number: nothing of it is read
            loader.sampler.start = self.begun * loader.batch_size
        batches = enumerate(loader if self.begun < self.steps else (), self.begun)  # no worker is started for nothing
        for self.step, batch in batches:
            self.waited += time.time() - ready
            yield self.step, batch
            if (self.step + 1) % self.args.print_freq == 0 or self.step + 1 == self.steps:
                self.flush()
            name = (self.step + 1) % self.args.accum_iter == 0 and models.stop_asked()
            if name:
                if self.rows:
                    self.flush()  # what is saved is finite
                self.count_time()
                self.save(epoch - 1)
                raise models.Stopped(f'stopped by {name}: --resume auto goes on from there')
            ready = time.time()
        if self.begun:
            loader.sampler.start = 0
        self.count_time()

    def count_time(self):
        now = time.time()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    def position(self, epoch):
        """What a checkpoint holds of the epoch behind `epoch`, as plain values: nothing before its first step.

        All processes call it: counts are summed, so that a resume can give all to one of them.
        """
        if epoch == self.epoch:
            return {'step': 0, 'train_seconds': self.seconds, 'progress': {}}
        counts = torch.stack([torch.tensor(self.skipped, device=self.args.device).double(),
                              *(value.double() for value in self.measured)])
        if self.args.distributed:
            dist.all_reduce(counts)
        skipped, *measured = counts.tolist()
        return {'step': self.step + 1, 'train_seconds': self.seconds,
                'progress': {'steps': self.steps, 'sums': self.sums.tolist(), 'names': self.names, 'lr': self.lr,
                             'skipped': skipped, 'measured': measured}}

    def restore(self, checkpoint, path):
        """Goes on from what `position` gave, or from a checkpoint of an epoch's end that has none. Raises InputError."""
        self.seconds, step, then = checkpoint['train_seconds'], checkpoint.get('step', 0), checkpoint['args']
        if not step:
            return
        batch, batch_then = (math.prod(a[name] for name in models.PLACE) for a in (vars(self.args), then))
        for what, now, before in (('effective batch', batch, batch_then), ('--seed', self.args.seed, then['seed']), (
                '--repeated_aug', getattr(self.args, 'repeated_aug', 1), then.get('repeated_aug', 1))):
            if now != before:
                raise models.InputError(f'{path} was made within an {self.unit}, which cannot go on with {what} {now}: it '
                                        f'was {before}')
        kept, ratio = checkpoint['progress'], self.args.accum_iter / then['accum_iter']  # the same updates in other steps
        self.first, self.steps = round(step * ratio), round(kept['steps'] * ratio)
        self.sums, self.names, self.lr = torch.tensor(kept['sums'], dtype=torch.float64) * ratio, kept['names'], kept['lr']
        own = float(self.args.rank == 0)
        self.skipped = kept['skipped'] * own
        own *= self.args.world_size / then['world_size']  # what is divided by the number of processes in the end
        self.measured = list(own * torch.tensor(kept['measured'], dtype=torch.float64, device=self.args.device))

    def check_files(self, bad_files):
        """Stops at an unreadable image, or names it once and counts it with --skip_bad_images."""
        for name in '\n'.join(filter(None, bad_files)).splitlines():
            if not getattr(self.args, 'skip_bad_images', False):
                raise models.InputError(f'cannot read {name}: mend or remove the file, or pass --skip_bad_images')
            self.skipped += 1
            if name not in self.named:
                print(f'skipped: {name}', flush=True)
                self.named.add(name)

    def add(self, optimizer, **terms):
        """Keeps one step's scalars, `loss` and its parts, without a host sync."""
        self.names, self.lr = list(terms), max(group['lr'] for group in optimizer.param_groups)
        self.rows.append(torch.stack([term.detach().float() for term in terms.values()]))

    def flush(self):
        # (steps since the last line, terms); in float64 the sums are the same in any order, wherever the run was interrupted
        rows = torch.stack(self.rows).double()
        if self.args.distributed:
            dist.all_reduce(rows)
        rows, norm = rows.cpu() / self.args.world_size, self.grad_norm.item()
        failed = (~rows.isfinite()).any(1).nonzero()
        # fp16 skips an update whose gradient overflowed; otherwise it has just ruined the weights
        if len(failed) or (self.args.amp != 'fp16' and not math.isfinite(norm)):
            bad = int(failed[0]) if len(failed) else len(rows) - 1
            parts = ', '.join(f'{name} {value:.4g}' for name, value in zip(self.names, rows[bad].tolist()))
            step = self.step + 2 - len(rows) + bad  # counted from 1, as in the printed lines
            raise FloatingPointError(f'not finite at {self.unit} {self.epoch + 1} step {step}: {parts}, grad_norm '
                                     f'{norm:.4g}. The last checkpoint is kept; lower the learning rate')
        self.rows, self.sums = [], sum(rows, self.sums)  # row by row
        done, here, spent = self.step + 1, self.step + 1 - self.begun, time.time() - self.start
        left = (self.total - self.epoch) * self.steps - done
        models.say(f'{self.unit} {self.epoch + 1}/{self.total} step {done}/{self.steps}',
                   *(f'{name} {value:.4f}' for name, value in zip(self.names, rows.mean(0).tolist())),
                   f'lr {self.lr:.3g} grad_norm {norm:.3g}',
                   *(f'{name} {value:g}' for name, value in self.loss_scale().items()),
                   f'{here * self.args.batch_size * self.args.world_size / spent:.0f} images/s',
                   f'data {self.waited / spent:.0%} eta {timedelta(seconds=int(left * spent / here))}')

    def loss_scale(self):
        """Of fp16: a scale that falls for ever shows a run that diverges behind its skipped updates."""
        return {'loss_scale': self.scaler.get_scale()} if self.scaler is not None and self.scaler.is_enabled() else {}

    def means(self):
        """The epoch's means under the names of log.txt."""
        skipped = torch.tensor(float(self.skipped), device=self.args.device)
        if self.args.distributed:
            dist.all_reduce(skipped)
        return {**{f'train_{name}': value for name, value in zip(self.names, (self.sums / self.steps).tolist())},
                'train_lr': self.lr, **self.loss_scale(), 'train_images_per_second': round(
                    (self.steps - self.begun) * self.args.batch_size * self.args.world_size / (time.time() - self.start), 1),
                **({'train_skipped_images': int(skipped)} if getattr(self.args, 'skip_bad_images', False) else {})}


def start_run(args):
    """Checks the common flags and the output folder, joins the other processes, prints where the run comes from.

    Returns the device. Sets args.rank, .world_size, .distributed, .device, .amp, and for args.json models.PROVENANCE.
    Raises InputError; writes nothing.
    """
    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    models.check_values(args)
    kind, _, index = args.device.partition(':')
    if kind not in ('cpu', 'cuda') or not (index or '0').isdecimal():
        raise models.InputError(f'--device {args.device}: give cpu, cuda or cuda:N')
    if kind == 'cuda' and not int(index or 0) < torch.cuda.device_count():
        raise models.InputError(f'--device {args.device}: this machine has no usable GPU of that number')
    if len(args.input_size) > 2:
        raise models.InputError('--input_size takes one positive number, or height and width')
    args.input_size = (args.input_size * 2)[:2]
    # os.path: pathlib raises on a folder that may not be read
    if os.path.isfile(args.output_dir):
        raise models.InputError(f'--output_dir {args.output_dir} is a file: give a folder')
    used = [name for name in ('checkpoint.pth', 'previous.pth', 'log.txt', 'args.json')
            if os.path.exists(Path(args.output_dir) / name)]
    own = args.resume == 'auto' or (
        args.resume and os.path.dirname(os.path.realpath(args.resume)) == os.path.realpath(args.output_dir))
    if used and not own and not getattr(args, 'eval', False):
        raise models.InputError(f'--output_dir {args.output_dir} holds another run ({", ".join(used)}): choose another '
                                'folder, or go on with it by --resume auto')
    if not getattr(args, 'eval', False):
        models.listen_to_signals()
    models.join_processes(args)
    device = torch.device(args.device)
    args.amp = args.amp or ('off' if device.type != 'cuda' else 'bf16' if torch.cuda.is_bf16_supported(False) else 'fp16')
    if args.amp == 'fp16' and device.type != 'cuda':
        raise models.InputError('--amp fp16 needs a GPU; take bf16 or off')
    # on a CPU the fused kernels are the slower ones for a few hundred tokens, by a fifth in bf16 (tools/benchmark.md)
    timm.layers.set_fused_attn(device.type != 'cpu')
    git, commit, changes = ['git', '-C', str(Path(__file__).resolve().parent)], '', ''
    with contextlib.suppress(FileNotFoundError):  # no git on this machine
        commit, changes = (subprocess.run(git + words, check=False, capture_output=True, text=True).stdout.strip()
                           for words in (['rev-parse', '--short', 'HEAD'], ['status', '--porcelain', '-uno']))
    args.script = Path(__file__).name
    args.commit = f'{commit or "unknown"}{" with changes" if changes else ""}'
    args.versions = f'torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}'
    args.hardware = f'{args.world_size} x {torch.cuda.get_device_name() if device.type == "cuda" else "cpu"}'
    models.say(f'command: {shlex.join(sys.argv)}\ncommit {args.commit}, {args.versions}, {args.hardware}, amp {args.amp}')
    return device


def scale_lr(args, paper_batch, blr=None):
    """Sets args.lr = blr * effective batch / 256 (MAE's rule) where there is no --lr, and prints the resolved recipe."""
    batch = args.batch_size * args.accum_iter * args.world_size
    args.lr = blr * batch / 256 if args.lr is None else args.lr
    models.say('arguments:', *(f'{name}={value}' for name, value in vars(args).items() if name not in models.PROVENANCE))
    models.say(f'effective batch {batch} = {args.batch_size} x {args.accum_iter} steps x {args.world_size} processes, '
               f'lr {args.lr:.3g}')
    if batch != paper_batch:
        models.say(f'note: the effective batch is not the paper\'s {paper_batch}' +
                   ('; --lr does not follow it' if blr is None else ''))


def save_checkpoint(args, progress, model, optimizer, scaler, classes, epoch, **training_only):
    """Writes output_dir/checkpoint.pth from rank 0, and keeps the one before it as previous.pth.

    epoch: the last one that is finished; within the one behind it the position is kept, too. Every --save_every epochs also
    checkpoint-N.pth. training_only: further modules, kept beside the model under their own names. All processes call it.
    """
    position = progress.position(epoch)
    if args.rank:
        return
    state = {'model': model.state_dict(), 'optimizer': optimizer.state_dict(), 'scaler': scaler.state_dict(),
             'epoch': epoch, **position, 'args': vars(args), 'classes': classes,
             **{name: module.state_dict() for name, module in training_only.items()}}
    path = Path(args.output_dir) / 'checkpoint.pth'
    models.write_file(path, partial(torch.save, state), previous=path.with_name('previous.pth'))
    step = position['step']
    if not step and args.save_every and (epoch + 1) % args.save_every == 0:
        models.write_file(path.with_name(f'checkpoint-{epoch}.pth'), partial(torch.save, state))
    models.say(f'saved {path} after {progress.unit} {epoch + 1}' + (f' and {step} steps' if step else ''))


def resume_checkpoint(args, progress, model, optimizer, scaler, classes, fixed=(), **training_only):
    """Loads --resume (a path, or auto) exactly; returns the first epoch to run, of which `progress` knows what is done.

    auto takes previous.pth where checkpoint.pth is damaged. fixed: arguments that must be as they were;
    training_only: as in `save_checkpoint`. Raises InputError if the file is no checkpoint of such a run, or of other
    classes. Says which arguments differ.
    """
    names = ('checkpoint.pth', 'previous.pth') if args.resume == 'auto' else ()
    path, checkpoint, damaged = models.newest_whole([Path(args.output_dir) / name for name in names])
    if args.resume and args.resume != 'auto':
        path, checkpoint = args.resume, models.read_checkpoint(args.resume)
        models.check_whole(path)
    if args.distributed:
        everywhere = [None] * args.world_size
        dist.all_gather_object(everywhere, str(path or 'no checkpoint'))
        if len(set(everywhere)) > 1:
            raise models.InputError(f'some processes see {min(everywhere)}, others {max(everywhere)}: all machines must '
                                    'share the disk of --output_dir')
    if path is None:
        return 0
    for file in damaged if args.rank == 0 else ():  # out of the way: the next save would keep it in place of a whole one
        file.replace(f'{file}.damaged')
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get('args'), dict) or any(
            key not in checkpoint for key in ('model', 'optimizer', 'scaler', 'epoch', 'train_seconds', *training_only)):
        raise models.InputError(f'{path} is no checkpoint of these scripts and cannot be resumed; --finetune starts from '
                                'the weights of others')
    models.load_exactly(model, checkpoint['model'], path)
    models.check_classes(checkpoint.get('classes'), classes, path)
    for name, module in training_only.items():
        models.load_exactly(module, checkpoint[name], path)
    models.check_run(checkpoint, optimizer, scaler, path)
    # the file's moments and rates, the other settings of this run: a value that was changed by hand wins over the file's
    groups = [{**own, 'lr': group['lr']} for own, group in
              zip(optimizer.state_dict()['param_groups'], checkpoint['optimizer']['param_groups'])]
    optimizer.load_state_dict({'state': checkpoint['optimizer']['state'], 'param_groups': groups})
    if checkpoint['scaler']:  # empty where the run was not in fp16
        scaler.load_state_dict(checkpoint['scaler'])
    stored = models.stored_args(checkpoint)
    changed = [name for name, value in stored.items() if getattr(args, name, value) != value]
    changed = [name for name in changed if name not in ('config', 'resume', 'output_dir', 'rank', 'local_rank')]
    for name in set(fixed) & set(changed):
        raise models.InputError(f'{path} cannot be resumed: --{name} was {stored[name]}')
    progress.restore(checkpoint, path)
    step = checkpoint.get('step', 0)
    models.say(f'resumed {path} after epoch {checkpoint["epoch"] + 1}' + (f' and {step} steps' if step else '') +
               ''.join(f'; {name} is {getattr(args, name)}, was {stored[name]}' for name in changed))
    return checkpoint['epoch'] + 1


def open_log(args, key, last):
    """Writes args.json, and drops lines of log.txt whose `key` is above `last`, as they will be run again; rank 0."""
    if args.rank:
        return
    output = Path(args.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise models.InputError(f'--output_dir {args.output_dir} cannot be made: {error.strerror}') from error
    models.write_file(output / 'args.json', lambda file: file.write((json.dumps(vars(args), indent=2) + '\n').encode()))
    lines = (output / 'log.txt').read_text().splitlines() if (output / 'log.txt').exists() else []
    kept = [line for line in lines if line.endswith('}') and json.loads(line)[key] <= last]
    models.write_file(output / 'log.txt', lambda file: file.write(''.join(line + '\n' for line in kept).encode()))


def write_log(args, stats):
    """Appends one JSON object to log.txt; rank 0. It is on the disk before a checkpoint counts it as written."""
    if not args.rank:
        path = Path(args.output_dir) / 'log.txt'
        before = path.read_bytes() if path.exists() else b''
        models.write_file(path, lambda file: file.write(before + (json.dumps(stats) + '\n').encode()))


# ---- end of the shared helpers ---------------------------------------------------------------------------------------


def main(args):
    # 1. process group, device, seed
    device = start_run(args)
    resolve_recipe(args)
    models.seed_everything(args.seed, models.START)
    # 2. data
    loader, val_loader, coco, classes = build_data(args)
    rounds = math.ceil(args.iterations / args.eval_every)
    progress = Progress(args, rounds, 'round')
    # 3. teacher: strict load, eval mode, no gradients
    teacher, adapters = None, nn.ModuleList()
    if args.teacher_path and not args.eval:
        teacher = load_detector(args.teacher_model, args.teacher_path, classes, args).to(device)
        adapters.extend(nn.Conv2d(args.fpn_dim, args.fpn_dim, 3, padding=1) for _ in range(5))
    # 4. student
    if args.eval:
        path = Path(args.output_dir) / 'checkpoint.pth' if args.resume == 'auto' else args.resume
        return evaluate(load_detector(args.model, path, classes, args).to(device), val_loader, coco, device, args)
    detector = Detector(args.model, len(classes), args)
    detector.backbone.net.set_grad_checkpointing(args.grad_checkpointing)
    if args.finetune:
        models.load_pretrained(detector.backbone.net, args.finetune)
    model_without_ddp = Student(detector, adapters).to(device)
    model = model_without_ddp
    for network in filter(None, (detector, teacher)) if args.compile else ():
        network.backbone.compile()  # behind it the shapes depend on what is found
    if args.distributed:
        model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == 'cuda' else None)
    # 5. optimizer, schedule, loss scaler
    scale_lr(args, PAPER_BATCH)
    optimizer = create_optimizer_v2(model_without_ddp, opt='adamw', lr=args.lr, weight_decay=args.weight_decay,
                                    layer_decay=args.layer_decay, fused=True)
    scheduler = MultiStepLRScheduler(
        # timm lowers the rate one step before its milestone
        optimizer, decay_t=[round(args.iterations * share) + 1 for share in (8 / 9, 26 / 27)], decay_rate=0.1,
        warmup_t=args.warmup_iterations, warmup_lr_init=0.001 * args.lr, warmup_prefix=False)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
    # 6. resume
    extra = {'adapters': adapters} if teacher is not None else {}
    start_round = resume_checkpoint(args, progress, detector, optimizer, scaler, classes,
                                    fixed=('eval_every', 'iterations'), **extra)
    save = progress.save = partial(save_checkpoint, args, progress, detector, optimizer, scaler, classes, **extra)
    progress.scaler = scaler
    if start_round < rounds:
        open_log(args, 'iteration', start_round * args.eval_every)
    # 7. epochs: train, evaluate, save, log
    for epoch in range(start_round, rounds):
        loader.sampler.epoch = epoch
        stats = train_one_epoch(model, teacher, loader, optimizer, scheduler, scaler, progress, device, epoch, args)
        save(epoch - 1)  # and the steps of this one
        stats.update(evaluate(detector, val_loader, coco, device, args))
        done = min(args.iterations, (epoch + 1) * args.eval_every)
        write_log(args, {'iteration': done, **stats, 'train_seconds': round(progress.seconds, 2)})
        save(epoch)
    models.say(f'done: {args.iterations} iterations, {timedelta(seconds=int(progress.seconds))} of training, see '
               f'{args.output_dir}')


if __name__ == '__main__':
    try:
        main(models.parse_args(get_args_parser()))
    except models.Stopped as stop:
        models.say(stop)
    except Exception as error:
        sys.exit(models.one_line(error))
    # only after success: a process that fails must not wait here for the others, torchrun ends them when it has gone
    if dist.is_initialized():
        dist.destroy_process_group()
