"""Stage 2, specific distillation for classification: the student's encoder learns from labels and a fine-tuned teacher.

Paper:   G2SD (Huang, Peng et al., CVPR 2023, arXiv 2302.14771), supplement Table 1; DeiT's distillation token
Reads:   --data_path   ImageNet layout, train/CLASS/ and val/CLASS/
         --finetune    start weights, e.g. stage 1's checkpoint.pth, or MAE's; without it the network starts from scratch
         --teacher_path   a classifier, e.g. mae_finetuned_vit_base.pth from MAE's repository; without it, labels alone
8 GPUs:  torchrun --nproc_per_node=8 specific_distill_cls.py --data_path IMAGENET --finetune runs/stage1/checkpoint.pth \
         --teacher_path mae_finetuned_vit_base.pth
CPU:     python tools/toy_data.py --out toy --only imagenet
         python specific_distill_cls.py --data_path toy/imagenet --model vit_nano_patch8 --input_size 48 \
         --batch_size 64 --epochs 4 --warmup_epochs 1
Writes:  output_dir/checkpoint.pth, log.txt (one JSON object per epoch), args.json
Both paths: G2SD. --finetune alone: "G2SD w/o S.D", or an MAE fine-tuned into a teacher. --teacher_path alone: DeiT with
distillation. Neither: DeiT. Evaluation alone: --eval --resume CHECKPOINT.
"""
import argparse
import contextlib
import json
import math
import os
import shlex
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from timm.data.auto_augment import NAME_TO_OP
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torchvision import transforms

import models

# supplement Table 1: the column is chosen by whether --finetune is given
RECIPES = {
    'fine-tuning': {'epochs': 200, 'blr': 1e-3, 'layer_decay': 0.75},
    'from scratch': {'epochs': 500, 'blr': 2.5e-4, 'layer_decay': 1.0},
}
AMP_DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'off': None}
PAPER_BATCH = 1024


def get_args_parser():
    """All flags with the paper's values as defaults; building it touches neither network nor GPU."""
    parser = argparse.ArgumentParser(
        description='G2SD stage 2: classification (also MAE fine-tuning, DeiT, and DeiT with distillation)',
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group('distillation')
    group.add_argument('--teacher_model', default='vit_base_patch16', help='name of the teacher')
    group.add_argument('--teacher_path', help='checkpoint of the teacher, path or https URL; without it labels alone teach')
    group.add_argument('--distillation_type', default='hard', choices=['hard', 'soft', 'none'],
                       help='the teacher gives its top class, or its distribution; none leaves it out')
    group.add_argument('--distillation_alpha', type=float, default=0.5, help='weight of the teacher, against 1 - alpha')
    group.add_argument('--distillation_tau', type=float, default=1.0, help='temperature of the soft type')

    group = parser.add_argument_group('model')
    group.add_argument('--model', default='vit_small_patch16', help='the network that learns')
    group.add_argument('--finetune', help='checkpoint to start from, path or https URL; it also chooses the recipe')
    group.add_argument('--input_size', type=int, nargs='+', default=[224], help='pixels: one side, or height and width')
    group.add_argument('--global_pool', action=argparse.BooleanOptionalAction,
                       help='classify the mean of the patch tokens (default with --finetune and no teacher), not the class '
                            'token')
    group.add_argument('--drop_path', type=float, default=0.0, help='stochastic depth rate of the last block')

    group = parser.add_argument_group('optimisation')
    group.add_argument('--batch_size', type=int, default=128, help='images per process and step')
    group.add_argument('--accum_iter', type=int, default=1, help='steps whose gradients are summed into one update')
    group.add_argument('--epochs', type=int, help='200 with --finetune, else 500')
    group.add_argument('--warmup_epochs', type=int, default=5, help='epochs of linear warm-up')
    group.add_argument('--blr', type=float,
                       help='learning rate per 256 images of the effective batch: 1e-3 with --finetune, else 2.5e-4')
    group.add_argument('--lr', type=float, help='absolute learning rate; overrides --blr')
    group.add_argument('--min_lr', type=float, default=1e-6, help='end of the cosine (the authors\' code)')
    group.add_argument('--layer_decay', type=float, help='learning-rate factor per block: 0.75 with --finetune, else 1')
    group.add_argument('--weight_decay', type=float, default=0.05,
                       help='AdamW weight decay, none on 1-D parameters, tokens and positions')
    group.add_argument('--clip_grad', type=float, help='largest gradient norm; not clipped unless given')

    group = parser.add_argument_group('augmentation')
    group.add_argument('--aa', default='rand-m9-mstd0.5-inc1', help='timm AutoAugment policy (the authors\' code), or none')
    group.add_argument('--reprob', type=float, default=0.25, help='random erasing probability (the authors\' code)')
    group.add_argument('--mixup', type=float, default=0.8, help='mixup alpha, 0: off')
    group.add_argument('--cutmix', type=float, default=1.0, help='cutmix alpha, 0: off')
    group.add_argument('--smoothing', type=float, default=0.1, help='label smoothing')

    group = parser.add_argument_group('data')
    group.add_argument('--data_path', help='folder with train/CLASS/ and val/CLASS/ (or of the CIFAR files)')
    group.add_argument('--data_set', default='folder', choices=['folder', 'CIFAR10', 'CIFAR100'], help='format of the data')
    group.add_argument('--skip_bad_images', action='store_true', help='go on past unreadable images, named and counted')

    group = parser.add_argument_group('run')
    group.add_argument('--config', help='args.json of another run: its values, where no flag gives another')
    group.add_argument('--output_dir', default='output_dir', help='where checkpoint.pth, log.txt and args.json go')
    group.add_argument('--resume', help='checkpoint to go on from, or auto: the one in --output_dir if there is one')
    group.add_argument('--eval', action='store_true', help='evaluate the checkpoint given by --resume, and stop')
    group.add_argument('--eval_every', type=int, default=1,
                       help='epochs between evaluations; the first and the last epoch always have one')
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
    """Fills in what depends on --finetune and --teacher_path; a flag given by hand wins. Raises InputError."""
    if args.eval and not args.resume:
        raise models.InputError('--eval needs --resume CHECKPOINT, the classifier to evaluate')
    if args.distillation_type == 'none':
        args.teacher_path = None
    if args.global_pool and args.teacher_path:
        raise models.InputError('--global_pool and --teacher_path exclude each other: a distilled network reads its class '
                                'and distillation tokens')
    if args.global_pool is None:
        args.global_pool = bool(args.finetune and not args.teacher_path)
    recipe = 'fine-tuning' if args.finetune else 'from scratch'
    for flag, value in RECIPES[recipe].items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if not 0 <= args.warmup_epochs < args.epochs:
        raise models.InputError(f'--warmup_epochs {args.warmup_epochs} must be at least 0 and below --epochs {args.epochs}')
    if not all(alpha == 0 or 1e-3 <= alpha <= 1e3 for alpha in (args.mixup, args.cutmix)):
        raise models.InputError('--mixup and --cutmix take 0, or 0.001 to 1000: beyond, their shares are not finite')
    if (args.mixup > 0 or args.cutmix > 0) and args.batch_size % 2 and not args.eval:
        raise models.InputError(f'--batch_size {args.batch_size}: mixup and cutmix pair images and need an even number; '
                                'change it, or pass --mixup 0 --cutmix 0')
    if not args.eval:
        models.say(f'recipe: Table 1, {recipe}, {args.distillation_type if args.teacher_path else "no"} distillation')


def posterize(image, bits_to_keep, **_):
    """timm's op, made safe: at magnitude 10 it asks for 0 bits, which Pillow 13 refuses; older ones answered black."""
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)


def build_transform(args, is_train):
    """PIL image -> (3, H, W) uint8. Training: DeiT's augmentation; else resize 256/224 bicubic and centre crop."""
    NAME_TO_OP.update(Posterize=posterize, PosterizeIncreasing=posterize)
    tiny = max(args.input_size) <= 32
    if not is_train:
        # MAE: no enlargement above 224; images of 32 pixels are whole
        crop = 1.0 if tiny or max(args.input_size) > 224 else 224 / 256
        return create_transform(args.input_size, interpolation='bicubic', crop_pct=crop, use_prefetcher=True)
    policy = None if args.aa == 'none' else args.aa
    try:
        transform = create_transform(args.input_size, is_training=True, color_jitter=None, interpolation='bicubic',
                                     auto_augment=policy, use_prefetcher=True)  # to bytes, erasing follows on the device
    except (AssertionError, KeyError) as error:
        raise models.InputError(f'--aa {args.aa}: timm knows no such policy; the recipe has rand-m9-mstd0.5-inc1') from error
    crop = [models.ResizedCrop(args.input_size), transforms.ToPILImage()]
    if tiny:  # DeiT, for CIFAR: a random crop with 4 pixels of padding in place of RandomResizedCrop
        crop = [transforms.Resize(args.input_size), transforms.RandomCrop(args.input_size, padding=4)]
    transform.transforms[:1] = crop
    return transform


def open_dataset(args, split):
    """The images of train/ or val/ without transform; raises InputError if they are not there."""
    if not args.data_path:
        raise models.InputError('--data_path is missing: the folder that holds train/ and val/ with a folder per class')
    if args.data_set != 'folder':
        return models.load_cifar(args, train=split == 'train')
    root = Path(args.data_path) / split
    if not os.path.isdir(root):
        raise models.InputError(f'--data_path: there is no folder {root} (expected {split}/CLASS/*.jpg)')
    try:
        return torchvision.datasets.ImageFolder(root, loader=models.read_rgb)
    except OSError as error:
        raise models.InputError(f'--data_path {root}: {str(error).splitlines()[0]}') from error


def build_data(args):
    """(training loader, validation loader, class names); no training loader with --eval.

    Batches are (images, labels, unreadable files). Every validation image belongs to exactly one process, once.
    """
    val = open_dataset(args, 'val')
    options = {'batch_size': args.batch_size, 'num_workers': args.num_workers, 'pin_memory': args.device.startswith('cuda'),
               'worker_init_fn': models.ignore_stop}
    own_share = [(0, index) for index in range(args.rank, len(val), args.world_size)]
    val_loader = torch.utils.data.DataLoader(models.SeededDataset(val, build_transform(args, False), args.seed),
                                             sampler=own_share, **options)
    if args.eval:
        return None, val_loader, val.classes
    train = open_dataset(args, 'train')
    if train.classes != val.classes:
        odd = min(set(train.classes) ^ set(val.classes))
        raise models.InputError(f'--data_path: train/ and val/ hold different classes, for example {odd!r}')
    train_loader = torch.utils.data.DataLoader(
        models.SeededDataset(train, build_transform(args, True), args.seed), sampler=models.EpochSampler(len(train), args),
        persistent_workers=args.num_workers > 0, **options)
    return train_loader, val_loader, train.classes


def distillation_loss(class_logits, dist_logits, labels, teacher_logits, distillation_type='hard', alpha=0.5, tau=1.0,
                      smoothing=0.0):
    """DeiT's loss: (1 - alpha) * CE(class head, labels) + alpha * (distillation head against the teacher).

    class_logits, dist_logits, teacher_logits: (N, C), any float dtype, computed in float32. labels: (N,) class indices,
    to which `smoothing` applies, or (N, C) probabilities from mixup. The teacher saw the same, mixed images. 'hard': CE to
    its top class; 'soft': tau^2 * KL(teacher || student) summed over classes, mean over N; 'none': CE to the labels alone,
    where dist_logits and teacher_logits may be None. Returns a scalar.
    Source: Touvron et al., ICML 2021; G2SD supplement, classification.
    """
    loss_class = F.cross_entropy(class_logits.float(), labels, label_smoothing=smoothing if labels.ndim == 1 else 0.0)
    if distillation_type == 'none':
        return loss_class
    dist_logits, teacher_logits = dist_logits.float(), teacher_logits.float()
    if distillation_type == 'hard':
        loss_distill = F.cross_entropy(dist_logits, teacher_logits.argmax(dim=1))
    else:
        loss_distill = tau ** 2 * F.kl_div((dist_logits / tau).log_softmax(1), (teacher_logits / tau).log_softmax(1),
                                           log_target=True, reduction='batchmean')
    return (1 - alpha) * loss_class + alpha * loss_distill


def train_one_epoch(model, teacher, loader, optimizer, scheduler, scaler, mixup, progress, device, epoch, args):
    """One pass over this process's share of the data; `progress` keeps the means and stops at a non-finite loss."""
    model.train()
    erase = RandomErasing(args.reprob, mode='pixel', device=device)  # normal noise, on normalised images
    for step, (images, labels, bad_files) in progress.watch(loader, epoch):
        progress.check_files(bad_files)
        if step % args.accum_iter == 0:
            scheduler.step(epoch + step / len(loader))
        images, labels = (x.to(device, non_blocking=True) for x in (images, labels))
        models.seed_everything(args.seed, epoch, step, args.rank, models.STEP)
        images = erase(models.normalise(images))
        if mixup is not None:
            images, labels = mixup(images, labels)  # labels become (N, C), smoothed
        update = (step + 1) % args.accum_iter == 0
        with model.no_sync() if args.distributed and not update else contextlib.nullcontext():
            with torch.autocast(device.type, dtype=AMP_DTYPES[args.amp], enabled=args.amp != 'off'):
                if teacher is None:
                    loss = distillation_loss(model(images), None, labels, None, 'none', smoothing=args.smoothing)
                    losses = {}
                else:
                    with torch.no_grad():
                        teacher_logits = teacher(images)
                    logits = (*model(images), labels, teacher_logits)
                    loss = distillation_loss(*logits, args.distillation_type, args.distillation_alpha,
                                             args.distillation_tau, args.smoothing)
                    with torch.no_grad():  # the two parts by themselves, for the log
                        losses = {'loss_class': distillation_loss(*logits, 'none', smoothing=args.smoothing),
                                  'loss_distill': distillation_loss(*logits, args.distillation_type, 1.0,
                                                                    args.distillation_tau)}
            scaler.scale(loss / args.accum_iter).backward()
        if update:
            scaler.unscale_(optimizer)
            progress.grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        progress.add(optimizer, loss=loss, **losses)
    return progress.means()


@torch.no_grad()
def evaluate(model, loader, progress, device, args):
    """Top-1 and top-5 accuracy in percent over all processes, each image counted once (an unreadable one not at all)."""
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, images
    for images, labels, bad_files in models.until_stopped(loader):
        progress.check_files(bad_files)
        if any(bad_files):
            readable = [not name for name in bad_files]
            images, labels = images[readable], labels[readable]
        if not len(labels):
            continue
        images, labels = models.normalise(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)
        logits = model(images)  # in float32 whatever --amp says: bf16 logits tie, and a tie is settled by chance
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # (N, 5)
        sums += torch.stack([F.cross_entropy(logits, labels, reduction='sum'), hits[:, 0].sum(), hits.any(dim=1).sum(),
                             torch.tensor(len(labels), device=device)])
    if args.distributed:
        dist.all_reduce(sums)
    loss, top1, top5, count = sums.tolist()
    if not count:
        raise models.InputError('no validation image could be read')
    models.say(f'test: top-1 {100 * top1 / count:.2f} % top-5 {100 * top5 / count:.2f} % of {count:.0f} images')
    return {'test_loss': loss / count, 'test_acc1': 100 * top1 / count, 'test_acc5': 100 * top5 / count,
            'test_images': int(count)}


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
    progress = Progress(args, args.epochs)
    # 3. teacher: strict load, eval mode, no gradients
    teacher = None
    if args.teacher_path and not args.eval:
        checkpoint = models.read_checkpoint(args.teacher_path)
        state = models.flat_state_dict(checkpoint, args.teacher_path)
        teacher = models.create_vit_like(state, args.teacher_model, args.input_size, args.teacher_path)
        models.check_classes(checkpoint.get('classes'), classes, args.teacher_path)
        if teacher.num_classes != len(classes):
            raise models.InputError(f'{args.teacher_path} tells {teacher.num_classes} classes apart, --data_path has '
                                    f'{len(classes)}: give a teacher that was fine-tuned on this data')
        teacher = models.load_teacher(teacher, args.teacher_path, state).to(device)
    # 4. student
    if args.eval:
        path = Path(args.output_dir) / 'checkpoint.pth' if args.resume == 'auto' else args.resume
        checkpoint = models.read_checkpoint(path)
        state = models.flat_state_dict(checkpoint, path)
        models.check_classes(checkpoint.get('classes'), classes, path)
        model = models.create_vit_like(state, args.model, args.input_size, path)
        if model.num_classes != len(classes):
            raise models.InputError(f'{path} tells {model.num_classes} classes apart, --data_path has {len(classes)}')
        models.say('classifier:', path, *models.fit_positions(model, state, path))
        models.load_exactly(model, state, path)
        return evaluate(model.to(device), val_loader, progress, device, args)
    model_without_ddp = models.create_vit(args.model, len(classes), args.input_size, distilled=teacher is not None,
                                          global_pool=args.global_pool, drop_path_rate=args.drop_path)
    if args.finetune:
        models.load_pretrained(model_without_ddp, args.finetune)
        models.reset_head(model_without_ddp)
    model = model_without_ddp.to(device)
    for network in filter(None, (model, teacher)) if args.compile else ():
        network.compile()
    if args.distributed:
        model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == 'cuda' else None)
    # 5. optimizer, schedule, loss scaler
    scale_lr(args, PAPER_BATCH, args.blr)
    optimizer = create_optimizer_v2(model_without_ddp, opt='adamw', lr=args.lr, weight_decay=args.weight_decay,
                                    layer_decay=args.layer_decay, fused=True)
    scheduler = CosineLRScheduler(optimizer, t_initial=args.epochs - args.warmup_epochs, lr_min=args.min_lr,
                                  warmup_t=args.warmup_epochs, warmup_lr_init=0.0, warmup_prefix=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
    mixup = None
    if args.mixup > 0 or args.cutmix > 0:
        mixup = Mixup(mixup_alpha=args.mixup, cutmix_alpha=args.cutmix, label_smoothing=args.smoothing,
                      num_classes=len(classes))
    # 6. resume
    start_epoch = resume_checkpoint(args, progress, model_without_ddp, optimizer, scaler, classes)
    save = progress.save = partial(save_checkpoint, args, progress, model_without_ddp, optimizer, scaler, classes)
    progress.scaler = scaler
    if start_epoch < args.epochs:
        open_log(args, 'epoch', start_epoch - 1)
    # 7. epochs: train, evaluate, save, log
    for epoch in range(start_epoch, args.epochs):
        loader.sampler.epoch = epoch
        stats = train_one_epoch(
            model, teacher, loader, optimizer, scheduler, scaler, mixup, progress, device, epoch, args)
        if epoch == 0 or (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            save(epoch - 1)  # and the steps of this one
            stats.update(evaluate(model_without_ddp, val_loader, progress, device, args))
        write_log(args, {'epoch': epoch, **stats, 'train_seconds': round(progress.seconds, 2)})
        save(epoch)
    models.say(f'done: {args.epochs} epochs, {timedelta(seconds=int(progress.seconds))} of training, see {args.output_dir}')


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
