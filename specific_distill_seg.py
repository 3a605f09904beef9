"""Stage 2, specific distillation for segmentation: UPerNet on a ViT, taught by a larger one.

Paper:   G2SD (Huang, Peng et al., CVPR 2023, arXiv 2302.14771), supplement on segmentation
Network: BEiT's for ADE20K (Bao et al., ICLR 2022), UPerNet (Xiao et al., ECCV 2018)
Reads:   --data_path   ADE20K, or its layout: images/SPLIT/*.jpg, annotations/SPLIT/*.png
         --finetune    backbone's start weights: stage 1's checkpoint, MAE, DeiT, DINO, iBOT, timm
         --teacher_path   a checkpoint of this script; without it labels alone teach
8 GPUs:  torchrun --nproc_per_node=8 specific_distill_seg.py --data_path ADE20K \
         --finetune runs/generic/checkpoint.pth --teacher_path runs/teacher_seg/checkpoint.pth
CPU:     python tools/toy_data.py --out toy --only ade
         python specific_distill_seg.py --data_path toy/ade --model vit_pico_patch8 \
         --input_size 64 --lr 2e-3 --batch_size 8 --iterations 200 --eval_every 100 \
         --warmup_iterations 20
Writes:  output_dir/checkpoint.pth, log.txt (JSON per round of --eval_every iterations), args.json
"""
import argparse
import contextlib
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from datetime import timedelta
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from unicodedata import normalize

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from timm.models.beit import Beit
from timm.optim import create_optimizer_v2
from timm.scheduler import PolyLRScheduler
from torch import nn
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2

import models

PAPER_BATCH = 32
IMAGE_ENDINGS = ('.jpg', '.jpeg', '.png')
IGNORE = 255  # label of pixels that do not count
# --eval reads these from the checkpoint
SHAPE_FLAGS = ('model', 'input_size', 'reduce_zero_label', 'nb_classes')


def get_args_parser():
    """All flags; defaults are the paper's."""
    parser = argparse.ArgumentParser(
        description='G2SD stage 2: semantic segmentation (also plain UPerNet, and its teacher)',
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group('distillation')
    group.add_argument('--teacher_model', help='by default the one that its checkpoint names, else '
                                               'vit_base_patch16')
    group.add_argument('--teacher_path', help='its file or https URL; without it, labels alone')
    group.add_argument('--cwd_weight', type=float, default=3.0, help='weight alpha of distillation')
    group.add_argument('--cwd_tau', type=float, default=1.0, help='temperature, softer above 1')

    group = parser.add_argument_group('model')
    group.add_argument('--model', default='vit_small_patch16', help='network to train')
    group.add_argument('--finetune', help='start weights of the backbone, path or https URL')
    group.add_argument('--input_size', type=int, nargs='+', default=[512],
                       help='side of crops and windows in pixels; images have this short side')
    group.add_argument('--drop_path', type=float, default=0.1, help='stochastic depth, last block')
    group.add_argument('--grad_checkpointing', action='store_true',
                       help='save memory by computing the blocks again in the backward pass')

    group = parser.add_argument_group('optimisation')
    group.add_argument('--batch_size', type=int, default=4, help='images per process and step')
    group.add_argument('--accum_iter', type=int, default=1, help='steps that make one update')
    group.add_argument('--iterations', type=int, default=160000, help='updates')
    group.add_argument('--warmup_iterations', type=int, default=1500,
                       help='updates of linear warm-up from a millionth of the learning rate')
    group.add_argument('--lr', type=float,
                       help='learning rate, falling to 0: 5e-4 for vit_tiny and below, else 2e-4')
    group.add_argument('--layer_decay', type=float, default=0.75, help='lr factor per block')
    group.add_argument('--weight_decay', type=float, default=0.05,
                       help='none on 1-D parameters, tokens and positions')
    group.add_argument('--clip_grad', type=float, help='largest gradient norm; by default no limit')
    group.add_argument('--aux_weight', type=float, default=0.4, help='weight of the auxiliary loss')

    group = parser.add_argument_group('augmentation')
    group.add_argument('--ratio_range', type=float, nargs=2, default=[0.5, 2.0],
                       help='range of the short side in training, as a factor of --input_size')
    group.add_argument('--cat_max_ratio', type=float, default=0.75,
                       help='largest share of one class in a crop, if ten draws find such a crop')

    group = parser.add_argument_group('data')
    group.add_argument('--data_path', help='folder with images/SPLIT/ and annotations/SPLIT/')
    group.add_argument('--train_split', default='training', help='split to train on')
    group.add_argument('--val_split', default='validation', help='split to evaluate on')
    group.add_argument('--nb_classes', type=int,
                       help='by default from objectInfo150.txt or classes.txt (lines of value and '
                            'name) in --data_path, else from the labels')
    group.add_argument('--reduce_zero_label', action=argparse.BooleanOptionalAction, default=True,
                       help='label 0 means ignore, classes count from 1 as in ADE20K; else from 0')

    group = parser.add_argument_group('run')
    group.add_argument('--config', help='args.json of another run: its values become the defaults')
    group.add_argument('--output_dir', default='output_dir', help='for checkpoint, log, args.json')
    group.add_argument('--resume', help='checkpoint to resume; auto: that in --output_dir, if any')
    group.add_argument('--eval', action='store_true', help='only evaluate the --resume checkpoint')
    group.add_argument('--eval_every', type=int, default=16000,
                       help='updates per round, then a checkpoint, an evaluation and a log line')
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


def list_pairs(data_path, split):
    """([(image file, label file)] of a split, by name; number of labels without an image)."""
    images, annotations = (Path(data_path or '', kind, split) for kind in ('images', 'annotations'))
    found = sorted(path for path in images.glob('*') if path.suffix.lower() in IMAGE_ENDINGS)
    labels = {normalize('NFC', path.stem): path for path in annotations.glob('*')
              if path.suffix.lower() == '.png'}
    if not data_path or not found or not labels:
        raise SystemExit(f'--data_path {data_path}: give a folder with images in images/{split}/ '
                         f'and labels in annotations/{split}/')
    pairs = [(path, labels.pop(normalize('NFC', path.stem), None)) for path in found]
    unlabelled = [image for image, label in pairs if label is None]
    if unlabelled:
        raise SystemExit(f'{unlabelled[0]} has no label in {annotations}: add it or drop the image')
    return pairs, len(labels)


def read_label(path, reduce_zero_label):
    """Label file -> (H, W) uint8: classes from 0, 255 = ignore. A palette's indices count.

    reduce_zero_label: in the file, 0 means ignore and classes count from 1.
    """
    image = models.open_image(path)
    if image.format != 'PNG' or image.mode not in ('1', 'L', 'P'):
        raise models.DataError(f'cannot read {path} ({image.format}, mode {image.mode}): labels are '
                               'PNGs of single bytes')
    label = torch.from_numpy(np.array(image, np.uint8))
    if image.mode == 'L':  # Pillow has scaled values of 1, 2 and 4 bits to 0..255
        bits = path.read_bytes()[24]  # in a PNG's header
        label = label // (255 // (2 ** bits - 1))
    if reduce_zero_label:
        label = torch.where(label == IGNORE, label, label - 1)  # in bytes 0 - 1 is 255
    return label


def count_labels(pairs, args):
    """Pixels of each value 0 to 255 in the labels of all pairs, (256,) int64, as `read_label` has."""
    def count(pair):
        return torch.bincount(read_label(pair[1], args.reduce_zero_label).flatten(), minlength=256)

    counts = torch.zeros(256, dtype=torch.int64)
    with ThreadPool(max(1, args.num_workers)) as pool:  # Pillow decodes outside Python's lock
        for part in pool.imap_unordered(count, pairs[args.rank::args.world_size], chunksize=16):
            counts += part
    if args.distributed:
        dist.all_reduce(counts)
    return counts


def read_classes(args, counts):
    """Names of the classes in the order of their labels; `class 7` for a label without a name.

    Their number is --nb_classes, else that of the names in --data_path, else with --eval the
    checkpoint's, else the largest label of `counts` tells.
    """
    names, number, first = {}, args.nb_classes, int(args.reduce_zero_label)
    for file in ('objectInfo150.txt', 'classes.txt'):
        path = Path(args.data_path, file)
        if path.is_file() and not names:
            for line in path.read_text(encoding='utf-8-sig', errors='replace').splitlines():
                # the value, then the name: in ADE20K's table behind the last tab
                match = re.match(r'\s*(\d+)\s(?:.*\t)?\s*(\S.*?)\s*$', line)
                if match and int(match[1]) < IGNORE:
                    names[int(match[1])] = match[2]
            if not names:
                raise SystemExit(f'{path} has no line with a value and a name, such as `1 wall`')
            # a name such as `0 unlabelled` says itself that it is ignored
            if first and 0 in names and not re.match('ignore|void|unlabel', names[0], re.I):
                raise SystemExit(f'{path} names label 0, {names[0]}, which --reduce_zero_label '
                                 'ignores: give --no-reduce_zero_label, or take the line out')
    if number is None and names:
        number = max(names) + 1 - first
    if args.eval and not names:
        _, checkpoint = models.find_checkpoint(args)
        return checkpoint.get('classes') or []  # none: load_segmenter says what is wrong
    if number is None:
        number = int(counts[:IGNORE].nonzero().max()) + 1 if counts[:IGNORE].any() else 0
    classes = [names.get(value, f'class {value}') for value in range(first, first + number)]
    if not 2 <= number <= 254 or len(set(classes)) < number:
        raise SystemExit(f'{number} classes of {len(set(classes))} names: 2 to 254 are possible, '
                         'none twice, and 255 is ignored; see --nb_classes and --reduce_zero_label')
    return classes


class SegmentationDataset(torch.utils.data.Dataset):
    """Images with labels, prepared for the network.

    Training: index -> (image (3, S, S) normalised float, label (S, S) uint8), scaled, cropped,
    flipped, distorted, padded right and below with zeros and 255. Evaluation: the image's short
    side becomes S, its long one at most 4 S; the label keeps its size.
    """

    def __init__(self, pairs, num_classes, args, is_train):
        self.pairs, self.num_classes, self.args, self.is_train = pairs, num_classes, args, is_train
        self.size = args.input_size[0]

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        image_path, label_path = self.pairs[index]
        label = read_label(label_path, self.args.reduce_zero_label)
        image = v2.functional.pil_to_tensor(models.read_rgb(image_path, label.shape))
        if image.shape[1:] != label.shape:
            raise models.DataError(f'{label_path} is {tuple(label.shape)} pixels high and wide, '
                                   f'its image {tuple(image.shape[1:])}: mend or remove both')
        beyond = label[(label >= self.num_classes) & (label != IGNORE)]
        if len(beyond):
            value = int(beyond[0]) + int(self.args.reduce_zero_label)
            raise models.DataError(f'{label_path} has label {value}, beyond the {self.num_classes} '
                                   'classes: see --nb_classes and --reduce_zero_label')
        if not self.is_train:
            image = v2.functional.resize(image, scaled_size(label.shape, self.size))
            return models.normalise(image), label
        size = scaled_size(label.shape, self.size * np.random.uniform(*self.args.ratio_range))
        image = v2.functional.resize(image, size)
        label = v2.functional.resize(label[None], size, v2.InterpolationMode.NEAREST_EXACT)[0]
        box = draw_crop(label, self.size, self.args.cat_max_ratio)
        image, label = v2.functional.crop(image, *box), v2.functional.crop(label, *box)
        if np.random.rand() < 0.5:
            image, label = image.flip(-1), label.flip(-1)
        image = models.normalise(distort_colours(image))
        padding = (0, self.size - box[3], 0, self.size - box[2])
        return F.pad(image, padding), F.pad(label, padding, value=IGNORE)


def distort_colours(image):
    """mmsegmentation's photometric distortion of an image (3, H, W) uint8; a coin decides each step.

    Brightness: + U(-32, 32); contrast, before or after what follows: * U(0.5, 1.5); saturation in
    HSV: * U(0.5, 1.5); hue: + U(-18, 18) of 180. Rounded once, at the end.
    """
    def toss():
        return np.random.rand() < 0.5

    image = image / 255
    contrast = np.random.uniform(0.5, 1.5) if toss() else 1.0
    contrast_first = toss()
    if toss():
        image = (image + np.random.uniform(-32, 32) / 255).clamp(0, 1)
    if contrast_first:
        image = (image * contrast).clamp(max=1)
    if toss():
        value = image.amax(dim=0)
        chroma = value - image.amin(dim=0)  # saturation is chroma / value, 1 at most
        factor = (value / chroma).clamp(max=np.random.uniform(0.5, 1.5)).nan_to_num(1.0)
        image = value - (value - image) * factor
    if toss():
        image = v2.functional.adjust_hue(image, np.random.uniform(-18, 18) / 180)
    if not contrast_first:
        image = (image * contrast).clamp(max=1)
    return (255 * image).round().byte()


def scaled_size(size, short):
    """(height, width) -> [height, width] with short side `short`, the long one at most 4 short."""
    scale = min(short / min(size), 4 * short / max(size))  # the recipe's (2048, 512)
    return [max(1, int(side * scale + 0.5)) for side in size]


def draw_crop(label, size, cat_max_ratio):
    """(top, left, height, width) of a random crop of at most size x size from a label (H, W).

    Up to ten draws, until it has labelled pixels and one class fills at most cat_max_ratio of them.
    """
    height, width = min(size, label.shape[0]), min(size, label.shape[1])
    for _ in range(10):
        top = np.random.randint(label.shape[0] - height + 1)
        left = np.random.randint(label.shape[1] - width + 1)
        crop = label[top:top + height, left:left + width]
        counts = torch.bincount(crop.flatten(), minlength=256)[:IGNORE]
        if 0 < counts.max() <= cat_max_ratio * counts.sum():
            break
    return top, left, height, width


def build_data(args):
    """(training loader, None with --eval; validation loader; class names).

    Training batches: images (N, 3, S, S) float, labels (N, S, S) uint8. Evaluation: one image at a
    time; each belongs to exactly one process.
    """
    val_pairs, unused = list_pairs(args.data_path, args.val_split)
    train_pairs = []
    counts, val_counts = torch.zeros(2, 256, dtype=torch.int64)
    if not args.eval:
        train_pairs, more = list_pairs(args.data_path, args.train_split)
        unused += more
        print(f'reading {len(train_pairs) + len(val_pairs)} labels')
        counts, val_counts = count_labels(train_pairs, args), count_labels(val_pairs, args)
    classes = read_classes(args, counts + val_counts)
    if not args.eval and not (counts[:IGNORE].any() and val_counts[:IGNORE].any()):
        raise SystemExit(f'{args.data_path}: all pixels of a split are ignored; 255 always is, see '
                         'also --reduce_zero_label')
    left_out = f'; left out: {unused} labels without an image' if unused else ''
    print(f'data: {len(train_pairs)} training images, {len(val_pairs)} to evaluate on, in '
          f'{args.data_path}; {models.count_classes(classes)}{left_out}')
    if not args.eval:
        lacking = [name for name, count in zip(classes, counts.tolist()) if not count]
        print(f'labels: {counts[IGNORE] / counts.sum():.1%} of the training pixels are ignored; '
              f'classes without a pixel: {", ".join(lacking) or "none"}')
    options = {'num_workers': args.num_workers, 'worker_init_fn': models.start_worker,
               'pin_memory': args.device.startswith('cuda')}
    val = SegmentationDataset(val_pairs, len(classes), args, is_train=False)
    own_share = range(args.rank, len(val), args.world_size)
    val_loader = torch.utils.data.DataLoader(val, sampler=own_share, **options)
    if args.eval:
        return None, val_loader, classes
    train = SegmentationDataset(train_pairs, len(classes), args, is_train=True)
    sampler = models.SeededSampler(len(train), args, args.eval_every, args.iterations)
    loader = torch.utils.data.DataLoader(
        models.SeededDataset(train, args.seed), args.batch_size, sampler=sampler,
        persistent_workers=args.num_workers > 0, **options)
    return loader, val_loader, classes


# ---- network -------------------------------------------------------------------------------------


class Backbone(Beit):
    """BEiT's ViT: absolute positions, a relative position bias in each block, LayerScale from 1.

    (N, 3, S, S) -> four maps (N, D, S/patch, S/patch), without a norm, after blocks 3, 5, 7 and 11
    (0-based) of 12, in proportion for other depths. S is fixed.
    """

    def __init__(self, name, img_size, drop_path_rate=0.0):
        size = models.parse_name(name)
        super().__init__(
            img_size=img_size, patch_size=size.patch, embed_dim=size.dim, depth=size.depth,
            num_heads=size.heads, num_classes=0, use_abs_pos_emb=True, use_rel_pos_bias=True,
            init_values=1.0, drop_path_rate=drop_path_rate)
        self.norm, self.fc_norm = nn.Identity(), nn.Identity()  # the maps do not pass through them
        shares = (4 / 12, 6 / 12, 8 / 12, 1)
        self.out_indices = [max(1, round(size.depth * share)) - 1 for share in shares]

    def forward(self, x):
        indices = sorted(set(self.out_indices))  # very shallow networks give a map twice
        maps = self.forward_intermediates(x, indices=indices, intermediates_only=True)
        return [maps[indices.index(index)] for index in self.out_indices]


def resize(x, size):
    """(N, C, h, w) -> (N, C, *size), bilinear between pixel centres."""
    return F.interpolate(x, size=size, mode='bilinear', align_corners=False)


class UPerNet(nn.Module):
    """UPerNet's head: pyramid pooling of the coarsest map, a feature pyramid, all levels fused.

    Four maps (N, D, h_k, w_k), fine to coarse -> logits (N, C, h_0, w_0). Width, dropout: BEiT.
    """

    def __init__(self, dim, num_classes, pool_scales=(1, 2, 3, 6)):
        super().__init__()
        conv = Conv2dNormActivation  # convolution without bias, batch norm, ReLU
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), conv(dim, dim, 1)) for scale in pool_scales)
        self.bottleneck = conv(dim * (1 + len(pool_scales)), dim, 3)
        self.lateral_convs = nn.ModuleList(conv(dim, dim, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(conv(dim, dim, 3) for _ in range(3))
        self.fpn_bottleneck = conv(4 * dim, dim, 3)
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(dim, num_classes, 1)

    def forward(self, maps):
        coarse = maps[-1]
        pooled = [resize(module(coarse), coarse.shape[2:]) for module in self.psp_modules]
        levels = [self.bottleneck(torch.cat([coarse, *pooled], dim=1))]  # from coarse to fine
        for lateral, x in zip(reversed(self.lateral_convs), reversed(maps[:-1])):
            levels.append(lateral(x) + resize(levels[-1], x.shape[2:]))
        for k, smooth in enumerate(reversed(self.fpn_convs), 1):
            levels[k] = smooth(levels[k])
        fused = torch.cat([resize(x, maps[0].shape[2:]) for x in reversed(levels)], dim=1)
        return self.conv_seg(self.dropout(self.fpn_bottleneck(fused)))


class FCN(nn.Sequential):
    """The auxiliary head, used in training only: map (N, D, h, w) -> logits (N, C, h, w)."""

    def __init__(self, dim, num_classes, width=256):
        super().__init__(OrderedDict(
            conv=Conv2dNormActivation(dim, width, 3), dropout=nn.Dropout2d(0.1),
            conv_seg=nn.Conv2d(width, num_classes, 1)))


class Segmenter(nn.Module):
    """UPerNet on a ViT, whose four maps are brought to strides of 1/4, 1/2, 1 and 2 patches.

    Normalised images (N, 3, S, S) -> logits (N, C, 4S/patch, 4S/patch), in training mode with those
    of the auxiliary head, (N, C, S/patch, S/patch), from the third map.
    """

    def __init__(self, name, num_classes, img_size, drop_path_rate=0.0):
        super().__init__()
        self.backbone = Backbone(name, img_size, drop_path_rate)
        dim = self.backbone.embed_dim
        double = partial(nn.ConvTranspose2d, dim, dim, 2, stride=2)
        self.neck = nn.ModuleList([
            nn.Sequential(double(), nn.BatchNorm2d(dim), nn.GELU(), double()),
            double(), nn.Identity(), nn.MaxPool2d(2)])
        self.decode_head = UPerNet(dim, num_classes)
        self.auxiliary_head = FCN(dim, num_classes)
        for head in (self.decode_head, self.auxiliary_head):  # start values: mmsegmentation
            for module in head.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            nn.init.normal_(head.conv_seg.weight, std=0.01)
            nn.init.zeros_(head.conv_seg.bias)

    def forward(self, images):
        maps = [x.contiguous(memory_format=torch.channels_last) for x in self.backbone(images)]
        maps = [scale(x) for scale, x in zip(self.neck, maps)]
        logits = self.decode_head(maps)
        return (logits, self.auxiliary_head(maps[2])) if self.training else logits

    def group_matcher(self, coarse=False):
        """Layer decay as in BEiT: stem, blocks, everything behind the backbone at the full rate."""
        return {'stem': r'^backbone\.(?:cls_token|pos_embed|patch_embed)',
                'blocks': r'^backbone\.blocks\.(\d+)'}

    def no_weight_decay(self):
        """Class token, absolute and relative positions; timm adds all that is one-dimensional."""
        undecayed = 'cls_token|pos_embed|relative_position'
        return {name for name, _ in self.named_parameters() if re.search(undecayed, name)}


def load_segmenter(path, classes, args, name=None):
    """The network in a checkpoint of this script, frozen and in eval mode.

    name: by default the model that the checkpoint names, else vit_base_patch16. Its patch and input
    size must be those of args.
    """
    checkpoint = models.read_checkpoint(path)
    state, trained = checkpoint.get('model', {}), models.own_args(checkpoint)
    if 'decode_head.conv_seg.weight' not in state:
        raise SystemExit(f'{path} holds no segmentation network: give a checkpoint of '
                         'specific_distill_seg.py')
    models.check_classes(checkpoint.get('classes'), classes, path)
    name = name or trained.get('model', 'vit_base_patch16')
    patch, side = models.parse_name(name).patch, trained.get('input_size', args.input_size)[0]
    if (patch, side) != (models.parse_name(args.model).patch, args.input_size[0]):
        raise SystemExit(f'{path} holds {name} for {side} pixels, where {args.model} has '
                         f'{args.input_size[0]}: patch and --input_size must be the same')
    model = Segmenter(name, len(classes), side)
    models.load_strictly(model, state, path)
    print(f'loaded {len(state)} tensors of {path}: {name}')
    return model.requires_grad_(False).eval()


# ---- losses --------------------------------------------------------------------------------------


def cwd_loss(student_logits, teacher_logits, tau=1.0):
    """Channel-wise distillation: tau^2 KL(teacher || student), softmax(logits/tau) over positions.

    Both (N, C, h, w), any float dtype, computed in float32. Returns a scalar, the mean over N, C.
    Raises ValueError if the shapes differ.
    Source: G2SD supplement; Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction"
    (ICCV 2021). The authors' code has the cross-entropy: the same gradient, another value.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f'logits differ in shape: {student_logits.shape}, {teacher_logits.shape}')
    student = (student_logits.float().flatten(2) / tau).log_softmax(dim=2)  # (N, C, h*w)
    teacher = (teacher_logits.float().flatten(2) / tau).log_softmax(dim=2)
    divergence = F.kl_div(student, teacher, reduction='none', log_target=True).sum(dim=2)
    return tau ** 2 * divergence.mean()


def label_loss(logits, labels):
    """Cross-entropy of logits (N, C, h, w), enlarged to the labels (N, H, W), in float32.

    Returns a scalar, the mean over all pixels, where ignored ones count as 0 (mmsegmentation).
    """
    logits = resize(logits.float(), labels.shape[1:])
    return F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction='none').mean()


# ---- training ------------------------------------------------------------------------------------


def train_one_epoch(model, teacher, loader, optimizer, scheduler, scaler, meter, device, epoch,
                    start, args):
    """Trains from step `start` on; returns the steps done, fewer than all after a signal."""
    model.train()
    for step, (images, labels) in meter.log_every(loader, epoch, start):
        if step % args.accum_iter == 0:
            scheduler.step(epoch * args.eval_every + step // args.accum_iter)
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        models.seed_everything(args.seed, epoch, step, args.rank, models.STEP)
        with gradient_sync(model, step, args):
            with torch.autocast(device.type, AMP_DTYPES[args.amp], enabled=args.amp != 'off'):
                logits, aux_logits = model(images)
                # supplement: CE + 0.4 CE_aux + alpha CWD, alpha = 3, tau = 1
                losses = {'loss_seg': label_loss(logits, labels),
                          'loss_aux': args.aux_weight * label_loss(aux_logits, labels)}
                if teacher is not None:
                    with torch.no_grad():
                        teacher_logits = teacher(images)
                    loss_cwd = cwd_loss(logits, teacher_logits, args.cwd_tau)
                    losses['loss_cwd'] = args.cwd_weight * loss_cwd
                loss = sum(losses.values())
        grad_norm = backward(loss, model, optimizer, scaler, step, args)
        meter.update(grad_norm, loss=loss, **losses)
        if grad_norm is not None and stop_requested(args):
            return step + 1
    return len(loader)


# ---- evaluation ----------------------------------------------------------------------------------


def slide(model, images, size):
    """Normalised images (N, 3, H, W) -> logits (N, C, H, W): means over size x size windows.

    They are 2/3 of size apart, the last ends at the border. Smaller images are padded with zeros.
    """
    height, width = images.shape[2:]
    images = F.pad(images, (0, max(0, size - width), 0, max(0, size - height)))
    stride = size * 2 // 3  # 341 of 512
    last_top, last_left = images.shape[2] - size, images.shape[3] - size
    tops, lefts = range(0, last_top + stride, stride), range(0, last_left + stride, stride)
    logits, count = None, torch.zeros(images.shape[2:], device=images.device)
    for top, left in itertools.product(tops, lefts):
        top, left = min(top, last_top), min(left, last_left)
        window = (..., slice(top, top + size), slice(left, left + size))
        window_logits = resize(model(images[window]).float(), (size, size))
        if logits is None:
            logits = window_logits.new_zeros(*window_logits.shape[:2], *images.shape[2:])
        logits[window] += window_logits
        count[window] += 1
    return (logits / count)[:, :, :height, :width]


def segmentation_scores(confusion, classes):
    """Confusion matrix (C, C), rows: labels, columns: predictions -> IoU and accuracy in percent.

    Under their names in log.txt. Classes without a label count in no mean, and their IoU is None.
    """
    confusion = confusion.double()
    right, labelled, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    present = labelled > 0
    iou = 100 * right / (labelled + predicted - right)
    by_class = zip(classes, iou.tolist(), present)
    return {'test_mIoU': iou[present].mean().item(),
            'test_mAcc': (100 * right / labelled)[present].mean().item(),
            'test_aAcc': (100 * right.sum() / labelled.sum()).item(),
            'test_IoU': {name: value if known else None for name, value, known in by_class}}


@torch.no_grad()
@torch.compiler.set_stance('force_eager')  # --compile is for training alone
def evaluate(model, loader, classes, device, args):
    """Scores over the images of all processes, at their original sizes, in float32."""
    model.eval()
    # the last cell counts the pixels that are ignored
    confusion = torch.zeros(len(classes) ** 2 + 1, dtype=torch.int64, device=device)
    for images, labels in loader:
        logits = slide(model, images.to(device, non_blocking=True), args.input_size[0])
        prediction = resize(logits, labels.shape[1:]).argmax(dim=1)
        labels = labels.to(device, non_blocking=True).long()
        cells = labels * len(classes) + prediction
        cells[labels == IGNORE] = len(classes) ** 2
        confusion += torch.bincount(cells.flatten(), minlength=len(confusion))
    if args.distributed:
        dist.all_reduce(confusion)
    ignored = (confusion[-1] / confusion.sum()).item()
    stats = segmentation_scores(confusion[:-1].view(len(classes), -1).cpu(), classes)
    stats['test_images'] = len(loader.dataset)
    print(f'test: mIoU {stats["test_mIoU"]:.2f} mean accuracy {stats["test_mAcc"]:.2f} '
          f'pixel accuracy {stats["test_aAcc"]:.2f} of {stats["test_images"]} images, '
          f'{ignored:.1%} of the pixels ignored')
    if args.eval:
        for name, value in stats['test_IoU'].items():
            print(f'IoU {"absent" if value is None else f"{value:6.2f}"}  {name}')
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
    size = models.parse_name(args.model)
    args.input_size = models.check_img_size(args.input_size, size.patch)
    if args.input_size[0] != args.input_size[1] or args.input_size[0] < 2 * size.patch:
        raise SystemExit(f'--input_size {args.input_size[0]} {args.input_size[1]}: give one side '
                         f'of at least 2 patches, {2 * size.patch} pixels')
    if args.warmup_iterations >= args.iterations:
        raise SystemExit(f'--warmup_iterations {args.warmup_iterations} must be below --iterations '
                         f'{args.iterations}')
    synced = args.distributed and device.type == 'cuda'  # batch norm, over all processes
    if args.batch_size < 2 and not synced and not args.eval:
        raise SystemExit('--batch_size 1: batch norm behind 1x1 pooling needs at least 2 images')
    if args.lr is None:  # supplement: 2e-4 for small, 5e-4 for tiny
        args.lr = 5e-4 if size.dim <= models.SIZES['tiny'].dim else 2e-4
    # 2. data
    loader, val_loader, classes = build_data(args)
    # 3. teacher: strict load, eval mode, no gradients
    teacher = None
    if args.teacher_path and not args.eval:
        teacher = load_segmenter(args.teacher_path, classes, args, args.teacher_model).to(device)
    # 4. student
    if args.eval:
        path, _ = models.find_checkpoint(args)
        model = load_segmenter(path, classes, args, args.model).to(device)
        evaluate(model, val_loader, classes, device, args)
        return
    model_without_ddp = Segmenter(args.model, len(classes), args.input_size, args.drop_path)
    model_without_ddp.backbone.set_grad_checkpointing(args.grad_checkpointing)
    if args.finetune:
        models.load_pretrained(model_without_ddp.backbone, args.finetune)
    if synced:
        model_without_ddp = nn.SyncBatchNorm.convert_sync_batchnorm(model_without_ddp)
    model = model_without_ddp.to(device)
    if args.compile:
        (model.backbone if synced else model).compile()  # synchronised BatchNorm breaks graphs
        if teacher is not None:
            teacher.compile()
    if args.distributed:
        device_ids = [device] if device.type == 'cuda' else None
        model = torch.nn.parallel.DistributedDataParallel(model, device_ids=device_ids)
        # position indices are 100 MB; newer torch renames the argument, the attribute works in all
        model.broadcast_buffers = False
    # 5. optimizer, schedule, loss scaler
    batch = args.batch_size * args.accum_iter * args.world_size
    recipe = 'labels alone' if teacher is None else 'distillation'
    print(f'arguments: {vars(args)}\nrecipe: {recipe}, effective batch {batch} (the paper has '
          f'{PAPER_BATCH}), lr {args.lr:.3g}')
    optimizer = create_optimizer_v2(
        model_without_ddp, opt='adamw', lr=args.lr, weight_decay=args.weight_decay,
        layer_decay=args.layer_decay, fused=True)
    scheduler = PolyLRScheduler(
        optimizer, t_initial=args.iterations, power=1.0, lr_min=0.0, warmup_prefix=False,
        warmup_t=args.warmup_iterations, warmup_lr_init=1e-6 * args.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
    # 6. resume
    rounds = math.ceil(args.iterations / args.eval_every)
    meter = models.Meter(args, optimizer, rounds, 'round')
    # timm's schedulers depend on the step alone; a scheduler with a state belongs here, too
    parts = {'model': model_without_ddp, 'optimizer': optimizer, 'scaler': scaler, 'meter': meter}
    first_epoch, samples = models.resume(args, classes, fixed=('eval_every', 'iterations'), **parts)
    if args.rank == 0:  # a run whose resume is refused leaves the file alone
        Path(args.output_dir, 'args.json').write_text(json.dumps(given, indent=2) + '\n')
    # 7. rounds: train, save, evaluate, log
    for epoch in range(first_epoch, rounds):
        start = loader.sampler.set_epoch(epoch, samples)
        step = train_one_epoch(model, teacher, loader, optimizer, scheduler, scaler, meter, device,
                               epoch, start, args)
        if args.distributed:  # batch norm's statistics, of the first process
            for name, buffer in model_without_ddp.named_buffers():
                if 'running_' in name:
                    dist.broadcast(buffer, 0)
        models.save_checkpoint(args, epoch, step, loader, classes, **parts)
        if step < len(loader):
            print('stopped by a signal: --resume auto goes on from here')
            return
        stats = evaluate(model_without_ddp, val_loader, classes, device, args)
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
