"""Stage 2, specific distillation for semantic segmentation: UPerNet on a ViT learns from labels and a teacher.

Paper:   G2SD (Huang, Peng et al., CVPR 2023, arXiv 2302.14771): channel-wise distillation of the logit maps
Network: BEiT's for ADE20K (Bao et al., ICLR 2022): timm's Beit, UPerNet (Xiao et al., ECCV 2018), FCN auxiliary head
Reads:   --data_path   ADE20K layout, images/{training,validation}/*.jpg, annotations/{training,validation}/*.png
         --finetune    start weights of the backbone: stage 1's checkpoint.pth, MAE, DeiT, DINO, iBOT, timm
         --teacher_path   a checkpoint of this script, trained without a teacher; without it labels alone teach
8 GPUs:  torchrun --nproc_per_node=8 specific_distill_seg.py --data_path ADE20K --finetune runs/generic/checkpoint.pth \
         --teacher_path runs/teacher_seg/checkpoint.pth
CPU:     python tools/toy_data.py --out toy --only ade
         python specific_distill_seg.py --data_path toy/ade --model vit_pico_patch8 --input_size 64 --lr 2e-3 \
         --batch_size 8 --iterations 200 --eval_every 100 --warmup_iterations 20
Writes:  output_dir/checkpoint.pth, log.txt (one JSON object per round of --eval_every iterations), args.json
Evaluation alone: --eval --resume CHECKPOINT, on the split that --val_split names.
"""
import argparse
import contextlib
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.beit import Beit
from timm.optim import create_optimizer_v2
from timm.scheduler import PolyLRScheduler
from torch import nn
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2

import models

AMP_DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'off': None}
PAPER_BATCH = 32
IGNORE = 255  # label of pixels that do not count


def get_args_parser():
    """All flags with the paper's values as defaults; building it touches neither network nor GPU."""
    parser = argparse.ArgumentParser(
        description='G2SD stage 2: semantic segmentation (also plain UPerNet on a ViT, and its teacher)',
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group('distillation')
    group.add_argument('--teacher_model', default='vit_base_patch16', help='name of the teacher')
    group.add_argument('--teacher_path', help='checkpoint of this script, path or https URL; without it labels alone teach')
    group.add_argument('--cwd_weight', type=float, default=3.0, help='weight alpha of channel-wise distillation')
    group.add_argument('--cwd_tau', type=float, default=1.0, help='its temperature tau: above 1, softer maps')

    group = parser.add_argument_group('model')
    group.add_argument('--model', default='vit_small_patch16', help='the network that learns')
    group.add_argument('--finetune', help='checkpoint to start the backbone from, path or https URL')
    group.add_argument('--input_size', type=int, nargs='+', default=[512],
                       help='side of the square crops and windows in pixels; images are scaled to this short side')
    group.add_argument('--drop_path', type=float, default=0.1, help='stochastic depth rate of the last block')
    group.add_argument('--grad_checkpointing', action='store_true',
                       help='compute the blocks twice to save memory; the result is the same')

    group = parser.add_argument_group('optimisation')
    group.add_argument('--batch_size', type=int, default=4, help='images per process and step')
    group.add_argument('--accum_iter', type=int, default=1, help='steps whose gradients are summed into one update')
    group.add_argument('--iterations', type=int, default=160000, help='updates')
    group.add_argument('--warmup_iterations', type=int, default=1500,
                       help='iterations of linear warm-up from a millionth of the learning rate')
    group.add_argument('--lr', type=float,
                       help='learning rate, falling linearly to 0; 5e-4 for vit_tiny and below, else 2e-4')
    group.add_argument('--layer_decay', type=float, default=0.75, help='learning-rate factor per block')
    group.add_argument('--weight_decay', type=float, default=0.05,
                       help='AdamW weight decay, none on 1-D parameters, tokens and positions')
    group.add_argument('--clip_grad', type=float, help='largest gradient norm; not clipped unless given')
    group.add_argument('--aux_weight', type=float, default=0.4, help='weight of the auxiliary head\'s loss')

    group = parser.add_argument_group('augmentation')
    group.add_argument('--ratio_range', type=float, nargs=2, default=[0.5, 2.0],
                       help='range of the factor that scales a training image, once its short side is --input_size')
    group.add_argument('--cat_max_ratio', type=float, default=0.75,
                       help='a crop is drawn again, up to ten times, while one class fills more of its labelled pixels')

    group = parser.add_argument_group('data')
    group.add_argument('--data_path', help='folder with images/SPLIT/ and annotations/SPLIT/')
    group.add_argument('--train_split', default='training', help='folder of the training images and labels')
    group.add_argument('--val_split', default='validation', help='folder of the images and labels to evaluate on')
    group.add_argument('--nb_classes', type=int,
                       help='by default from objectInfo150.txt or classes.txt (a value and a name per line) in --data_path, '
                            'else, with --eval, from the checkpoint, else the largest label')
    group.add_argument('--reduce_zero_label', action=argparse.BooleanOptionalAction, default=True,
                       help='label 0 means ignore and the classes count from 1, as in ADE20K; without it they count from 0')

    group = parser.add_argument_group('run')
    group.add_argument('--config', help='args.json of another run: its values, where no flag gives another')
    group.add_argument('--output_dir', default='output_dir', help='where checkpoint.pth, log.txt and args.json go')
    group.add_argument('--resume', help='checkpoint to go on from, or auto: the one in --output_dir if there is one')
    group.add_argument('--eval', action='store_true', help='evaluate the checkpoint given by --resume, and stop')
    group.add_argument('--eval_every', type=int, default=16000,
                       help='iterations of a round, which ends with evaluation, a line of log.txt and a checkpoint')
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
    """Checks what belongs to this stage alone, and fills in --lr. Raises InputError."""
    if not args.data_path:
        raise models.InputError('--data_path is missing: the folder with images/ and annotations/')
    if args.eval and not args.resume:
        raise models.InputError('--eval needs --resume CHECKPOINT, the network to evaluate')
    if args.eval and args.resume == 'auto':
        args.resume = str(Path(args.output_dir) / 'checkpoint.pth')
    name = models.parse_name(args.model)
    if args.input_size[0] != args.input_size[-1]:
        raise models.InputError(f'--input_size {" ".join(map(str, args.input_size))}: crops are square, give one side')
    if args.teacher_path and models.parse_name(args.teacher_model).patch != name.patch:
        raise models.InputError(f'{args.model} and {args.teacher_model} differ in patch size: their logit maps do not match')
    if args.nb_classes is not None and not 2 <= args.nb_classes <= 254:
        raise models.InputError('--nb_classes must be at least 2, and at most 254: labels are bytes and 255 means ignore')
    if not 0 <= args.warmup_iterations < args.iterations and not args.eval:
        raise models.InputError(f'--warmup_iterations {args.warmup_iterations} must be at least 0 and below --iterations '
                                f'{args.iterations}')
    if not 0 < args.ratio_range[0] <= args.ratio_range[1] <= 100:
        raise models.InputError('--ratio_range takes two positive factors up to 100, the smaller one first')
    # pooled to one pixel, a single image leaves batch norm nothing to compare; on GPUs it sees all processes
    if args.batch_size < 2 and not args.eval and not (args.device.startswith('cuda') and args.world_size > 1):
        raise models.InputError('--batch_size 1: batch norm behind the head\'s 1x1 pooling needs at least 2 images')
    if args.lr is None:  # supplement: 2e-4 for small, 5e-4 for tiny
        args.lr = 5e-4 if name.size.dim <= models.SIZES['tiny'].dim else 2e-4
    if not args.eval:
        models.say(f'recipe: ADE20K, {"with" if args.teacher_path else "no"} distillation')


# ------------------------------------------------------------------------------------------------------------------ data


def read_file(path, decode):
    """decode(opened Pillow image); decoders raise nearly anything on a damaged file: an InputError that names it."""
    try:
        with models.open_image(path) as file:
            return decode(file)
    except Exception as error:
        raise models.InputError(f'cannot read {path} ({(str(error) or type(error).__name__).splitlines()[0]}): mend the '
                                'file, or remove it and its partner') from error


def read_image(path):
    """Image file -> (3, H, W) uint8 in RGB. Raises InputError."""
    return read_file(path, lambda file: v2.functional.pil_to_tensor(models.to_rgb(file)))


def read_label(path, reduce_zero_label):
    """Label file -> (H, W) uint8, classes from 0, 255 = ignore; a palette's indices count. Raises InputError.

    reduce_zero_label: 0 in the file means ignore and classes count from 1.
    """
    mode, label = read_file(path, lambda file: (file.mode, torch.from_numpy(np.array(file))))
    if mode not in ('L', 'P'):
        raise models.InputError(f'{path} is no label: its pixels are of mode {mode}, not single bytes')
    return torch.where(label == IGNORE, label, label - 1) if reduce_zero_label else label  # in bytes 0 - 1 is 255


def list_pairs(data_path, split):
    """[(image file, label file)] of a split, by name. Raises InputError where one has no partner, or there is none."""
    files = {}
    for kind, endings in (('images', ('.jpg', '.jpeg', '.png')), ('annotations', ('.png',))):
        folder = Path(data_path) / kind / split
        if not os.path.isdir(folder):
            raise models.InputError(f'there is no folder {folder}: the layout is images/{split}/ and annotations/{split}/')
        found = sorted(file for file in folder.iterdir() if file.suffix.lower() in endings)
        files[kind] = {file.stem: file for file in found}
        if len(files[kind]) < len(found):
            raise models.InputError(f'{folder} has two files of one name with different endings')
    images, labels = files.values()
    for one, other, what in ((images, labels, 'label in annotations'), (labels, images, 'image in images')):
        alone = [file for name, file in one.items() if name not in other]
        if alone:
            raise models.InputError(f'{alone[0]} has no {what}/{split}/' +
                                    (f', nor have {len(alone) - 1} more files' if alone[1:] else ''))
    if not images:
        raise models.InputError(f'{Path(data_path) / "images" / split} holds no .jpg, .jpeg or .png file')
    return [(images[name], labels[name]) for name in images]


class SegmentationDataset(torch.utils.data.Dataset):
    """Images with labels, read and prepared for the network; random only in (seed, pass, index).

    Training: (pass, index) -> (image (3, S, S) normalised float, label (S, S) uint8): scaled, cropped, flipped, distorted,
    padded right and below with zeros and 255. Evaluation: the short side becomes S, at most 4 S the long one; the label
    keeps the original size. Raises InputError, naming the file, for an unreadable one and a label that does not belong.
    """

    def __init__(self, pairs, num_classes, args, is_train):
        self.pairs, self.num_classes, self.args, self.is_train = pairs, num_classes, args, is_train
        self.size = args.input_size[0]
        self.distort = PhotometricDistortion(hue=(-0.1, 0.1))  # mmsegmentation: 18 of 180; the others are torchvision's

    def __len__(self):
        return len(self.pairs)

    def read(self, index):
        """(image (3, H, W) uint8, label (H, W) uint8) of a pair, checked."""
        image_path, label_path = self.pairs[index]
        label, first = read_label(label_path, self.args.reduce_zero_label), int(self.args.reduce_zero_label)
        wrong = label[(label >= self.num_classes) & (label != IGNORE)]
        if len(wrong):
            raise models.InputError(f'{label_path} has the label {int(wrong[0]) + first}; the {self.num_classes} classes '
                                    f'are {first} to {self.num_classes + first - 1}: see --nb_classes, --reduce_zero_label')
        image = read_image(image_path)
        if image.shape[1:] != label.shape:
            raise models.InputError(f'{image_path} is {image.shape[1]} high and {image.shape[2]} wide, its label '
                                    f'{label.shape[0]} and {label.shape[1]}')
        return image, label

    def __getitem__(self, key):
        epoch, index = key
        models.seed_everything(self.args.seed, epoch, index, models.SAMPLE)
        image, label = self.read(index)
        if not self.is_train:
            return normalise(v2.functional.resize(image, scaled_size(label.shape, self.size))), label
        size = scaled_size(label.shape, self.size * np.random.uniform(*self.args.ratio_range))
        image = v2.functional.resize(image, size)
        label = v2.functional.resize(label[None], size, interpolation=v2.InterpolationMode.NEAREST_EXACT)[0]
        box = draw_crop(label, self.size, self.args.cat_max_ratio)
        image, label = v2.functional.crop(image, *box), v2.functional.crop(label, *box)
        if np.random.rand() < 0.5:
            image, label = image.flip(-1), label.flip(-1)
        image, missing = normalise(self.distort(image)), (0, self.size - box[3], 0, self.size - box[2])
        return F.pad(image, missing), F.pad(label, missing, value=IGNORE)


class PhotometricDistortion(v2.RandomPhotometricDistort):
    """torchvision's brightness, contrast, saturation and hue, each with probability 1/2, without its permuted colours."""

    def make_params(self, flat_inputs):
        return {**super().make_params(flat_inputs), 'channel_permutation': None}


def normalise(image):
    """(3, H, W) uint8 -> float with ImageNet's mean and deviation."""
    image = v2.functional.to_dtype(image, torch.float32, scale=True)
    return v2.functional.normalize(image, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def scaled_size(size, short):
    """(height, width) with the short side `short`, or the long one 4 times that if it would be longer; in pixels."""
    scale = min(short / min(size), 4 * short / max(size))  # the recipe's (2048, 512)
    return [max(1, int(side * scale + 0.5)) for side in size]


def draw_crop(label, size, cat_max_ratio):
    """(top, left, height, width) of a crop of at most size x size, drawn from numpy's generator, of a label (H, W).

    Up to ten tries, until no class fills more than cat_max_ratio of the labelled pixels, and there is one.
    """
    height, width = (min(size, side) for side in label.shape)
    for _ in range(10):
        top, left = (np.random.randint(side - length + 1) for side, length in zip(label.shape, (height, width)))
        counts = torch.bincount(label[top:top + height, left:left + width].flatten(), minlength=256)[:IGNORE]
        if 0 < counts.max() <= cat_max_ratio * counts.sum():
            break
    return top, left, height, width


def read_classes(args, splits):
    """Names of the classes in the order of their labels; `class 7` for a label without a name. Raises InputError.

    Their number is --nb_classes, else that of ADE20K's objectInfo150.txt or a classes.txt, else (with --eval) that of
    the checkpoint, else the largest label in all pairs of `splits` decides.
    """
    first, names, number = int(args.reduce_zero_label), {}, args.nb_classes
    for file in (Path(args.data_path) / name for name in ('objectInfo150.txt', 'classes.txt')):
        lines = file.read_text(errors='replace').splitlines() if file.is_file() else []
        # the value, then the name: the last of the columns if there are tabs
        found = [re.match(r'\s*(\d+)\s(?:.*\t)?\s*(\S.*?)\s*$', line) for line in lines]
        names = names or {int(match[1]): match[2] for match in found if match and int(match[1]) < IGNORE}
        if file.is_file() and not names:
            raise models.InputError(f'{file} has no line with a value and a name, such as `1 wall`: mend or remove it')
    if number is None and names:
        number = max(names) + 1 - first
    if number is None and args.eval:
        checkpoint = models.read_checkpoint(args.resume)
        if not isinstance(checkpoint, dict) or not checkpoint.get('classes'):
            raise models.InputError(f'{args.resume} names no classes: is it a checkpoint of specific_distill_seg.py?')
        models.check_classes(checkpoint['classes'], checkpoint['classes'], args.resume)
        return checkpoint['classes']
    if number is None:
        models.say('reading all labels to count the classes; --nb_classes spares this')
        present = torch.zeros(256, dtype=torch.int64)
        for _, label in itertools.chain(*(pairs[args.rank::args.world_size] for pairs in splits)):
            present[read_label(label, args.reduce_zero_label).unique().long()] = 1
        seen = sum_over_processes(present, args)[:IGNORE] > 0
        number = int((seen * torch.arange(1, IGNORE + 1)).max())
    classes = [names.get(value, f'class {value}') for value in range(first, number + first)]
    if not 2 <= number < IGNORE or len(set(classes)) < number:
        raise models.InputError(f'{args.data_path} has {number} classes with {len(set(classes))} different names: there '
                                'must be 2 to 254 and no name twice, see --nb_classes, --reduce_zero_label')
    return classes


def sum_over_processes(counts, args):
    """Sum of an integer tensor over all processes, on the CPU."""
    counts = counts.to(args.device)
    if args.distributed:
        dist.all_reduce(counts)
    return counts.cpu()


def build_data(args):
    """(training loader, validation loader, class names); no training loader with --eval.

    Every validation image belongs to exactly one process, once, and is checked here. Raises InputError.
    """
    val_pairs = list_pairs(args.data_path, args.val_split)
    train_pairs = [] if args.eval else list_pairs(args.data_path, args.train_split)
    classes = read_classes(args, (train_pairs, val_pairs))
    val = SegmentationDataset(val_pairs, len(classes), args, False)
    own_share, labelled = range(args.rank, len(val), args.world_size), 0
    for index in own_share:  # now, not after hours of training
        labelled += int((val.read(index)[1] != IGNORE).sum())
    if not sum_over_processes(torch.tensor(labelled), args):
        raise models.InputError(f'no pixel of annotations/{args.val_split} has a class: see --reduce_zero_label')
    options = {'num_workers': args.num_workers, 'pin_memory': args.device.startswith('cuda'),
               'worker_init_fn': models.ignore_stop}
    val_loader = torch.utils.data.DataLoader(val, sampler=[(0, index) for index in own_share], **options)
    models.say(f'data: {len(train_pairs)} training images, {len(val)} to evaluate on; {len(classes)} classes')
    if args.eval:
        return None, val_loader, classes
    train = SegmentationDataset(train_pairs, len(classes), args, True)
    train_loader = torch.utils.data.DataLoader(train, args.batch_size, sampler=models.RoundSampler(len(train), args),
                                               persistent_workers=args.num_workers > 0, **options)
    return train_loader, val_loader, classes


# --------------------------------------------------------------------------------------------------------------- network


class Backbone(Beit):
    """BEiT's ViT: absolute positions, a relative position bias in each block, LayerScale from 1; any stage's weights fit.

    (N, 3, S, S) -> four maps (N, D, S/patch, S/patch), without a norm: after blocks 3, 5, 7 and 11 (0-based) of 12, in
    proportion for other depths. Only its own input size S is accepted.
    """

    def __init__(self, name, img_size, drop_path_rate=0.0):
        parsed = models.parse_name(name)
        if parsed.is_mae:
            raise models.InputError(f'{name!r} names an autoencoder; its encoder alone is called vit_...')
        size = parsed.size
        super().__init__(
            img_size=models.check_img_size(img_size, parsed.patch), patch_size=parsed.patch, embed_dim=size.dim,
            depth=size.depth, num_heads=size.heads, num_classes=0, use_abs_pos_emb=True, use_rel_pos_bias=True,
            init_values=1.0, drop_path_rate=drop_path_rate)
        self.norm, self.fc_norm = nn.Identity(), nn.Identity()  # behind the features: they would get no gradient
        self.taps = [max(1, round(size.depth * share)) - 1 for share in (4 / 12, 6 / 12, 8 / 12, 1)]

    def forward(self, x):
        indices = sorted(set(self.taps))  # very shallow networks give a map twice
        maps = self.forward_intermediates(x, indices=indices, intermediates_only=True)
        return [maps[indices.index(tap)] for tap in self.taps]


def resize(x, size):
    """(N, C, h, w) -> (N, C, *size), bilinear between pixel centres."""
    return F.interpolate(x, size=size, mode='bilinear', align_corners=False)


class UPerNet(nn.Module):
    """UPerNet's head: pyramid pooling on the coarsest map, a feature pyramid downwards, all levels fused at the finest.

    Four maps (N, D, h_k, w_k), fine to coarse -> logits (N, C, h_0, w_0). Width D and dropout 0.1 as in BEiT.
    """

    def __init__(self, dim, num_classes, pool_scales=(1, 2, 3, 6)):
        super().__init__()
        conv = Conv2dNormActivation  # convolution without bias, batch norm, ReLU
        self.psp_modules = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(s), conv(dim, dim, 1)) for s in pool_scales)
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
        levels = [levels[0], *(smooth(x) for smooth, x in zip(reversed(self.fpn_convs), levels[1:]))]
        fused = torch.cat([resize(x, maps[0].shape[2:]) for x in reversed(levels)], dim=1)
        return self.conv_seg(self.dropout(self.fpn_bottleneck(fused)))


class FCN(nn.Module):
    """The auxiliary head, for training only: one 3x3 convolution, 256 wide, on the third map -> logits at its size."""

    def __init__(self, dim, num_classes, width=256):
        super().__init__()
        self.conv = Conv2dNormActivation(dim, width, 3)
        self.dropout = nn.Dropout2d(0.1)
        self.conv_seg = nn.Conv2d(width, num_classes, 1)

    def forward(self, maps):
        return self.conv_seg(self.dropout(self.conv(maps[2])))


class Segmenter(nn.Module):
    """UPerNet on a ViT; the four maps of the backbone are brought to strides of 1/4, 1/2, 1 and 2 patches.

    Normalised images (N, 3, S, S) -> training: logits (N, C, 4S/patch, 4S/patch) of the main head and (N, C, S/patch,
    S/patch) of the auxiliary one. Evaluation: the former alone.
    """

    def __init__(self, name, num_classes, img_size, drop_path_rate=0.0):
        super().__init__()
        self.backbone = Backbone(name, img_size, drop_path_rate)
        dim = self.backbone.embed_dim
        if min(self.backbone.patch_embed.grid_size) < 2:
            raise models.InputError(f'--input_size {img_size} and {name}: at least 2x2 patches are needed')

        def double():
            return nn.ConvTranspose2d(dim, dim, 2, stride=2)

        self.neck = nn.ModuleList([nn.Sequential(double(), nn.BatchNorm2d(dim), nn.GELU(), double()), double(),
                                   nn.Identity(), nn.MaxPool2d(2)])
        self.decode_head, self.auxiliary_head = UPerNet(dim, num_classes), FCN(dim, num_classes)
        for head in (self.decode_head, self.auxiliary_head):  # mmsegmentation's start values
            for module in head.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            nn.init.normal_(head.conv_seg.weight, std=0.01)
            nn.init.zeros_(head.conv_seg.bias)

    def forward(self, images):
        maps = [scale(x) for scale, x in zip(self.neck, self.backbone(images))]
        logits = self.decode_head(maps)
        return (logits, self.auxiliary_head(maps)) if self.training else logits

    def group_matcher(self, coarse=False):
        """Layer decay as BEiT has it: stem, blocks, and everything behind the backbone at the full rate."""
        return {'stem': r'^backbone\.(?:cls_token|pos_embed|patch_embed)', 'blocks': [(r'^backbone\.blocks\.(\d+)', None)]}

    def no_weight_decay(self):
        """Names of the class token and of absolute and relative positions; timm adds everything one-dimensional."""
        return {name for name, _ in self.named_parameters() if re.search('cls_token|pos_embed|relative_position', name)}


def load_segmenter(name, path, classes, args):
    """The network in a checkpoint of this script, frozen and in eval mode. Raises InputError, also for other classes."""
    checkpoint = models.read_checkpoint(path)
    state = models.flat_state_dict(checkpoint, path)
    if 'decode_head.conv_seg.weight' not in state:
        raise models.InputError(f'{path} holds no segmentation network: give a checkpoint of specific_distill_seg.py')
    models.check_classes(checkpoint.get('classes'), classes, path)
    trained = models.stored_args(checkpoint)
    theirs = trained.get('input_size', args.input_size)
    if theirs != args.input_size:
        theirs = ' '.join(map(str, theirs)) if isinstance(theirs, list) else theirs
        raise models.InputError(f'{path} was trained with --input_size {theirs}, not with {args.input_size[0]}')
    model = Segmenter(name, len(classes), args.input_size[0])
    models.load_exactly(model, state, path)
    models.say(f'segmentation network: {len(state)} entries of {path}')
    return model.requires_grad_(False).eval()


# -------------------------------------------------------------------------------------------------------------- training


def cwd_loss(student_logits, teacher_logits, tau=1.0):
    """Channel-wise distillation: each map of logits, as a distribution over its positions, follows the teacher's.

    Both (N, C, h, w), any float dtype, computed in float32. tau^2 * KL(teacher || student) of softmax(map / tau) over the
    h*w positions, mean over N and C. Returns a scalar. Raises ValueError if the shapes differ.
    Source: G2SD supplement, segmentation; Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction" (ICCV
    2021). The authors of G2SD use the cross-entropy: the same gradient, and the value differs by the teacher's entropy.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(f'logits differ in shape: {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}')
    student, teacher = ((logits.float().flatten(2) / tau).log_softmax(dim=2) for logits in (student_logits, teacher_logits))
    return tau ** 2 * F.kl_div(student, teacher, reduction='none', log_target=True).sum(dim=2).mean()


def pixel_loss(logits, labels):
    """Cross-entropy of logits (N, C, h, w), enlarged to the labels (N, H, W), in float32; 255 is ignored.

    Mean over all pixels, ignored ones included, as mmsegmentation has it: images with few labels weigh less.
    """
    return F.cross_entropy(resize(logits.float(), labels.shape[1:]), labels.long(), ignore_index=IGNORE,
                           reduction='none').mean()


def train_one_epoch(model, teacher, loader, optimizer, scheduler, scaler, progress, device, epoch, args):
    """One round of --eval_every iterations; `progress` keeps the means and stops at a non-finite loss."""
    model.train()
    for step, (images, labels) in progress.watch(loader, epoch):
        if step % args.accum_iter == 0:
            scheduler.step(epoch * args.eval_every + step // args.accum_iter)
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        models.seed_everything(args.seed, epoch, step, args.rank, models.STEP)
        update = (step + 1) % args.accum_iter == 0
        with model.no_sync() if args.distributed and not update else contextlib.nullcontext():
            with torch.autocast(device.type, dtype=AMP_DTYPES[args.amp], enabled=args.amp != 'off'):
                logits, aux_logits = model(images)
                losses = {'loss_seg': pixel_loss(logits, labels), 'loss_aux': pixel_loss(aux_logits, labels)}
                loss = losses['loss_seg'] + args.aux_weight * losses['loss_aux']
                if teacher is not None:
                    with torch.no_grad():
                        teacher_logits = teacher(images)
                    # supplement: L = CE + 0.4 CE_aux + alpha CWD, alpha = 3, tau = 1
                    losses['loss_cwd'] = cwd_loss(logits, teacher_logits, args.cwd_tau)
                    loss = loss + args.cwd_weight * losses['loss_cwd']
            scaler.scale(loss / args.accum_iter).backward()
        if update:
            scaler.unscale_(optimizer)
            progress.grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        progress.add(optimizer, loss=loss, **losses)
    return progress.means()


def slide(model, images, size):
    """Normalised images (N, 3, H, W) -> logits (N, C, H, W): means over windows of size x size, two thirds apart.

    The last window of a row or column ends at the border. What is smaller than a window is padded as in training.
    """
    height, width = images.shape[2:]
    images = F.pad(images, (0, max(0, size - width), 0, max(0, size - height)))
    stride = size * 2 // 3  # 341 of 512
    places = [[min(start, side - size) for start in range(0, side - size + stride, stride)] for side in images.shape[2:]]
    logits, count = None, torch.zeros(images.shape[2:], device=images.device)
    for top, left in itertools.product(*places):
        window = resize(model(images[:, :, top:top + size, left:left + size]).float(), (size, size))
        logits = window.new_zeros(*window.shape[:2], *images.shape[2:]) if logits is None else logits
        logits[:, :, top:top + size, left:left + size] += window
        count[top:top + size, left:left + size] += 1
    return (logits / count)[:, :, :height, :width]


def segmentation_scores(confusion, classes):
    """Confusion matrix (C, C), rows: labels, columns: predictions -> mIoU, mean and pixel accuracy, IoU of each class.

    In percent, under their names in log.txt. Classes that no label has count in no mean, and their IoU is None.
    """
    confusion = confusion.double()
    right, labelled, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    present = labelled > 0
    iou = 100 * right / (labelled + predicted - right)
    return {'test_mIoU': iou[present].mean().item(), 'test_mAcc': (100 * right / labelled)[present].mean().item(),
            'test_aAcc': (100 * right.sum() / labelled.sum()).item(),
            'test_IoU': {name: value if there else None for name, value, there in zip(classes, iou.tolist(), present)}}


@torch.no_grad()
def evaluate(model, loader, classes, device, args):
    """Scores over all processes, each image once, in its original pixels; the same on each process. In float32."""
    model.eval()
    confusion = torch.zeros(len(classes) ** 2, dtype=torch.int64, device=device)
    for images, labels in models.until_stopped(loader):  # one at a time: sizes differ
        logits = slide(model, images.to(device, non_blocking=True), args.input_size[0])
        prediction = resize(logits, labels.shape[1:]).argmax(dim=1)
        labels = labels.to(device, non_blocking=True).long()
        valid = labels != IGNORE
        confusion += torch.bincount(labels[valid] * len(classes) + prediction[valid], minlength=len(confusion))
    stats = segmentation_scores(sum_over_processes(confusion, args).view(len(classes), -1), classes)
    images = len(loader.dataset)
    models.say(f'test: mIoU {stats["test_mIoU"]:.2f} mean accuracy {stats["test_mAcc"]:.2f} pixel accuracy '
               f'{stats["test_aAcc"]:.2f} of {images} images')
    if args.eval:
        models.say('\n'.join(f'IoU {"absent" if value is None else f"{value:6.2f}"}  {name}'
                             for name, value in stats['test_IoU'].items()))
    return {**stats, 'test_images': images}


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
    loader, val_loader, classes = build_data(args)
    rounds = math.ceil(args.iterations / args.eval_every)
    progress = Progress(args, rounds, 'round')
    # 3. teacher: strict load, eval mode, no gradients
    teacher = None
    if args.teacher_path and not args.eval:
        teacher = load_segmenter(args.teacher_model, args.teacher_path, classes, args).to(device)
    # 4. student
    if args.eval:
        model = load_segmenter(args.model, args.resume, classes, args).to(device)
        return evaluate(model, val_loader, classes, device, args)
    model_without_ddp = Segmenter(args.model, len(classes), args.input_size[0], args.drop_path)
    model_without_ddp.backbone.set_grad_checkpointing(args.grad_checkpointing)
    if args.finetune:
        models.load_pretrained(model_without_ddp.backbone, args.finetune)
    if args.distributed and device.type == 'cuda':
        model_without_ddp = nn.SyncBatchNorm.convert_sync_batchnorm(model_without_ddp)
    model = model_without_ddp.to(device)
    for network in filter(None, (model, teacher)) if args.compile else ():
        network.compile()
    if args.distributed:
        model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == 'cuda' else None)
        # not at each step: the blocks' tables of position indices are 100 MB. As an argument it has two names by version
        model.broadcast_buffers = False
    # 5. optimizer, schedule, loss scaler
    scale_lr(args, PAPER_BATCH)
    optimizer = create_optimizer_v2(model_without_ddp, opt='adamw', lr=args.lr, weight_decay=args.weight_decay,
                                    layer_decay=args.layer_decay, fused=True)
    scheduler = PolyLRScheduler(optimizer, t_initial=args.iterations, power=1.0, lr_min=0.0, warmup_prefix=False,
                                warmup_t=args.warmup_iterations, warmup_lr_init=1e-6 * args.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
    # 6. resume
    start_round = resume_checkpoint(args, progress, model_without_ddp, optimizer, scaler, classes,
                                    fixed=('eval_every', 'iterations'))
    save = progress.save = partial(save_checkpoint, args, progress, model_without_ddp, optimizer, scaler, classes)
    progress.scaler = scaler
    if start_round < rounds:
        open_log(args, 'iteration', start_round * args.eval_every)
    # 7. epochs: train, evaluate, save, log
    for epoch in range(start_round, rounds):
        loader.sampler.epoch = epoch
        stats = train_one_epoch(model, teacher, loader, optimizer, scheduler, scaler, progress, device, epoch, args)
        for name, buffer in model_without_ddp.named_buffers() if args.distributed else ():
            if 'running_' in name:  # batch norm's statistics: of the first process, where SyncBatchNorm does not share them
                dist.broadcast(buffer, 0)
        save(epoch - 1)  # and the steps of this one
        stats.update(evaluate(model_without_ddp, val_loader, classes, device, args))
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
