"""Stage 1, generic distillation: a small MAE learns the hidden features of a large MAE's decoder, without labels.

Paper:   G2SD (Huang, Peng et al., CVPR 2023, arXiv 2302.14771), generic distillation; targets as in Table 4
Reads:   --data_path   folder of images; its `train` subfolder if there is one; classes are not used
         --teacher_path   a complete MAE, encoder and decoder: mae_pretrain_vit_base_full.pth from MAE's repository
8 GPUs:  torchrun --nproc_per_node=8 generic_distill.py --data_path IMAGENET --teacher_path mae_pretrain_vit_base_full.pth
CPU:     python tools/toy_data.py --out toy --only imagenet
         python generic_distill.py --data_path toy/imagenet --target pixel --model mae_vit_nano_patch8 --input_size 48 \
         --batch_size 64 --accum_iter 1 --epochs 4 --warmup_epochs 1
Writes:  output_dir/checkpoint.pth (for --finetune of stage 2), log.txt (one JSON object per epoch), args.json
MAE itself is `--target pixel`, without a teacher: that is how a teacher for your own data is made.
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
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torchvision import transforms

import models

# the authors' code, except the 300 epochs, which the supplement states; `pixel` is MAE's own pre-training recipe
RECIPES = {
    'distillation': {'epochs': 300, 'warmup_epochs': 10, 'min_lr': 2.5e-6},
    'pixel': {'epochs': 800, 'warmup_epochs': 40, 'min_lr': 0.0},
}
AMP_DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'off': None}
PAPER_BATCH = 4096
CONSTANT_STEPS = 4  # of an epoch, on which the best constant prediction is measured


def get_args_parser():
    """All flags with the paper's values as defaults; building it touches neither network nor GPU."""
    parser = argparse.ArgumentParser(
        description='G2SD stage 1: generic distillation (and MAE pre-training with --target pixel)', allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group('distillation')
    group.add_argument('--target', default='feature', choices=['feature', 'recon', 'recon_gt', 'pixel'],
                       help='what the student predicts (Table 4): decoder features, the teacher\'s reconstruction, that and '
                            'the true pixels, or the true pixels alone (MAE, no teacher)')
    group.add_argument('--teacher_model', default='mae_vit_base_patch16', help='name of the teacher')
    group.add_argument('--teacher_path', help='checkpoint of the teacher, path or https URL; it must hold the decoder')
    group.add_argument('--target_layer', type=int, default=4, help='teacher decoder block to imitate, 1-based')
    group.add_argument('--supervise', default='all', choices=['all', 'masked'],
                       help='tokens in the feature loss: all (visible, hidden, class) or the hidden patches alone')
    group.add_argument('--mask_ratio', type=float, default=0.75, help='share of hidden patches (Table 5)')
    group.add_argument('--norm_pix_loss', action=argparse.BooleanOptionalAction, default=True,
                       help='true pixels are normalised per patch (recon_gt, pixel): as the teacher was trained')

    group = parser.add_argument_group('model')
    group.add_argument('--model', default='mae_vit_small_patch16_dec256d4b', help='the network that learns')
    group.add_argument('--input_size', type=int, nargs='+', default=[224], help='pixels: one side, or height and width')

    group = parser.add_argument_group('optimisation')
    group.add_argument('--batch_size', type=int, default=256, help='images per process and step')
    group.add_argument('--accum_iter', type=int, default=2, help='steps whose gradients are summed into one update')
    group.add_argument('--epochs', type=int, help='300, or 800 with --target pixel')
    group.add_argument('--warmup_epochs', type=int, help='epochs of linear warm-up: 10, or 40 with --target pixel')
    group.add_argument('--blr', type=float, default=1.5e-4, help='learning rate per 256 images of the effective batch')
    group.add_argument('--lr', type=float, help='absolute learning rate; overrides --blr')
    group.add_argument('--min_lr', type=float, help='end of the cosine: 2.5e-6, or 0 with --target pixel')
    group.add_argument('--weight_decay', type=float, default=0.05, help='AdamW weight decay, none on 1-D parameters')
    group.add_argument('--clip_grad', type=float, help='largest gradient norm; not clipped unless given')

    group = parser.add_argument_group('augmentation')
    group.add_argument('--repeated_aug', type=int, default=1,
                       help='crops and masks of one decoded image in a batch; above 1 where a run waits for decoding')

    group = parser.add_argument_group('data')
    group.add_argument('--data_path', help='folder of images (or of the CIFAR files)')
    group.add_argument('--data_set', default='folder', choices=['folder', 'CIFAR10', 'CIFAR100'], help='format of the data')
    group.add_argument('--skip_bad_images', action='store_true', help='go on past unreadable images, named and counted')

    group = parser.add_argument_group('run')
    group.add_argument('--config', help='args.json of another run: its values, where no flag gives another')
    group.add_argument('--output_dir', default='output_dir', help='where checkpoint.pth, log.txt and args.json go')
    group.add_argument('--resume', help='checkpoint to go on from, or auto: the one in --output_dir if there is one')
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
    """Fills in what depends on --target; a flag given by hand wins. Raises InputError."""
    if args.target == 'pixel' and args.teacher_path:
        raise models.InputError('--target pixel is MAE pre-training and has no teacher: leave --teacher_path out')
    recipe = 'pixel' if args.target == 'pixel' else 'distillation'
    for flag, value in RECIPES[recipe].items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if not 0 <= args.warmup_epochs < args.epochs:
        raise models.InputError(f'--warmup_epochs {args.warmup_epochs} must be at least 0 and below --epochs {args.epochs}')
    if args.repeated_aug < 1 or args.batch_size % args.repeated_aug:
        raise models.InputError(f'--repeated_aug {args.repeated_aug} must divide --batch_size {args.batch_size}')
    models.say(f'recipe: {"MAE pre-training" if recipe == "pixel" else "G2SD stage 1"}')


class ViewsAndNoise:
    """PIL image -> (augmented views (K, 3, H, W) uint8, mask noise of each (K, L)): all draws are the sample's own."""

    def __init__(self, input_size, num_patches, views):
        self.num_patches, self.views = num_patches, views
        self.augment = transforms.Compose([
            models.ResizedCrop(input_size, scale=(0.2, 1.0)), transforms.RandomHorizontalFlip()])

    def __call__(self, image):
        views, noise = zip(*((self.augment(image), torch.rand(self.num_patches)) for _ in range(self.views)))
        return torch.stack(views), torch.stack(noise)


class FlatFolder(torchvision.datasets.ImageFolder):
    """All images below a folder, with or without class folders, as one class: stage 1 uses no labels."""

    def find_classes(self, directory):
        return [''], {'': 0}


def build_data(args, num_patches):
    """Training loader of ((images (N/K, K, 3, H, W), noise (N/K, K, L)), label, unreadable files), K = --repeated_aug.

    Raises InputError if there are too few images.
    """
    if not args.data_path:
        raise models.InputError('--data_path is missing: a folder of images, for ImageNet the one that holds train/')
    if args.data_set == 'folder':
        root = Path(args.data_path)
        root = root / 'train' if os.path.isdir(root / 'train') else root
        if not os.path.isdir(root):
            raise models.InputError(f'--data_path: there is no folder {root}')
        try:
            dataset = FlatFolder(root, loader=models.read_rgb)
        except OSError as error:
            raise models.InputError(f'--data_path: there is no image in {root} or below it') from error
    else:
        dataset = models.load_cifar(args, train=True)
    dataset = models.SeededDataset(dataset, ViewsAndNoise(args.input_size, num_patches, args.repeated_aug), args.seed)
    sampler = models.EpochSampler(len(dataset), args, args.repeated_aug)
    return torch.utils.data.DataLoader(
        dataset, batch_size=args.batch_size // args.repeated_aug, sampler=sampler, num_workers=args.num_workers,
        worker_init_fn=models.ignore_stop, pin_memory=args.device.startswith('cuda'),
        persistent_workers=args.num_workers > 0)


def feature_loss(pred, target, beta=2.0):
    """Smooth-L1 distance between student predictions and layer-normalised teacher features.

    pred, target: (N, T, D), any float dtype, computed in float32; T counts every token that is supervised.
    Returns a scalar, the mean over N, T, D. Raises ValueError if the shapes differ.
    Source: G2SD, generic distillation; LayerNorm without affine and beta = 2.0 from the authors' code.
    """
    if pred.shape != target.shape:
        raise ValueError(f'prediction {tuple(pred.shape)} and target {tuple(target.shape)} differ in shape')
    target = F.layer_norm(target.float(), target.shape[-1:], eps=1e-6)
    return F.smooth_l1_loss(pred.float(), target, beta=beta)


def recon_loss(pred, target, mask, beta=2.0):
    """Smooth-L1 distance to the teacher's reconstruction at hidden patches (Table 4, row 2).

    pred, target: (N, L, p*p*3); mask: (N, L), 1 = hidden. Returns a scalar in float32; no LayerNorm (ours).
    """
    per_patch = F.smooth_l1_loss(pred.float(), target.float(), beta=beta, reduction='none').mean(dim=-1)  # (N, L)
    return (per_patch * mask).sum() / mask.sum()


def pixel_loss(pred, pixels, mask, norm_pix_loss=True):
    """MAE's loss: mean squared error at hidden patches.

    pred, pixels: (N, L, p*p*3); mask: (N, L), 1 = hidden. With norm_pix_loss each true patch is first brought to mean 0
    and variance 1 (unbiased variance, + 1e-6, as in MAE). Returns a scalar in float32.
    """
    pixels = pixels.float()
    if norm_pix_loss:
        pixels = (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + 1e-6).sqrt()
    per_patch = (pred.float() - pixels).square().mean(dim=-1)  # (N, L)
    return (per_patch * mask).sum() / mask.sum()


def make_targets(model, teacher, images, masking, args):
    """What the chosen --target asks for: 'feature' (N, 1+L, D), or 'recon', 'pixel' or both, (N, L, p*p*3)."""
    targets = {}
    with torch.no_grad():
        if args.target == 'feature':  # under the student's own mask
            targets['feature'] = teacher.decoder_features(images, masking, args.target_layer)
        if args.target in ('recon', 'recon_gt'):
            targets['recon'] = teacher.reconstruct(images, masking)
        if args.target in ('recon_gt', 'pixel'):
            targets['pixel'] = (model.module if args.distributed else model).patchify(images)
    return targets


def compare(pred, targets, masking, args):
    """The terms of the loss by name. pred: (N, 1+L, target_dim), or (N, L, p*p*3) with --target pixel."""
    if 'feature' in targets:
        target = targets['feature']
        if args.supervise == 'masked':
            hidden = masking.mask.shape[1] - masking.ids_keep.shape[1]
            ids_hidden = masking.mask.argsort(dim=1, descending=True)[:, :hidden]  # no boolean index: it waits for the GPU
            pred, target = (models.take(x[:, 1:], ids_hidden) for x in (pred, target))
        return {'loss_feature': feature_loss(pred, target)}
    pred, losses = pred[:, -masking.mask.shape[1]:], {}  # without the class token, which --target pixel does not predict
    if 'recon' in targets:
        losses['loss_recon'] = recon_loss(pred, targets['recon'], masking.mask)
    if 'pixel' in targets:  # beside the other with equal weight: ours, the paper does not state it
        losses['loss_pixel'] = pixel_loss(pred, targets['pixel'], masking.mask, args.norm_pix_loss)
    return losses


def stage_losses(model, teacher, images, masking, args):
    """The terms of the chosen --target, by name; their sum is minimised. `model` may be wrapped by DDP."""
    return compare(model(images, masking), make_targets(model, teacher, images, masking, args), masking, args)


def best_constant_loss(targets, masking, args):
    """Loss of the best prediction that is one vector for all images and tokens: that of a network that does not look.

    targets: as `make_targets` gives them. Returns a scalar. The losses are convex in the vector: L-BFGS finds it.
    """
    shape = next(iter(targets.values())).shape
    vector = torch.zeros(shape[-1], device=masking.mask.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([vector], max_iter=10, line_search_fn='strong_wolfe')

    def closure():
        optimizer.zero_grad()
        loss = sum(compare(vector.expand(shape), targets, masking, args).values())
        loss.backward()
        return loss

    optimizer.step(closure)
    return closure().detach()


def train_one_epoch(model, teacher, loader, optimizer, scheduler, scaler, progress, device, epoch, args):
    """One pass over this process's share of the data; `progress` keeps the means and stops at a non-finite loss."""
    model.train()
    for step, ((images, noise), _, bad_files) in progress.watch(loader, epoch):
        progress.check_files(bad_files)
        if step % args.accum_iter == 0:
            scheduler.step(epoch + step / len(loader))
        images, noise = (x.to(device, non_blocking=True).flatten(0, 1) for x in (images, noise))
        images = models.normalise(images)
        masking = models.random_masking(noise, args.mask_ratio)
        models.seed_everything(args.seed, epoch, step, args.rank, models.STEP)
        update = (step + 1) % args.accum_iter == 0
        with model.no_sync() if args.distributed and not update else contextlib.nullcontext():
            with torch.autocast(device.type, dtype=AMP_DTYPES[args.amp], enabled=args.amp != 'off'):
                losses = stage_losses(model, teacher, images, masking, args)
                loss = sum(losses.values())
            scaler.scale(loss / args.accum_iter).backward()
        if update:
            scaler.unscale_(optimizer)
            progress.grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        progress.add(optimizer, loss=loss, **losses)
        # up to the end of warm-up: whether the network is better than one that has not looked
        if epoch <= args.warmup_epochs and step < CONSTANT_STEPS:
            progress.measured.append(
                best_constant_loss(make_targets(model, teacher, images, masking, args), masking, args).double())
    stats = progress.means()
    if progress.measured:
        constant = torch.stack(progress.measured).mean()
        if args.distributed:
            dist.all_reduce(constant)
        stats['constant_loss'] = constant.item() / args.world_size
    return stats


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
    patch = models.parse_name(args.model).patch
    height, width = models.check_img_size(args.input_size, patch)
    loader = build_data(args, height // patch * (width // patch))
    # 3. teacher: strict load, eval mode, no gradients
    teacher, target_dim = None, None
    if args.target != 'pixel':
        if not args.teacher_path:
            raise models.InputError(f'--teacher_path is missing: {models.DECODER_HELP}; for MAE pre-training without a '
                                    'teacher pass --target pixel')
        teacher = models.create_mae(args.teacher_model, args.input_size)
        if teacher.patch_embed.num_patches != loader.dataset.transform.num_patches:
            raise models.InputError(f'{args.model} and {args.teacher_model} differ in patch size: they share one mask')
        if args.target == 'feature' and not 1 <= args.target_layer <= len(teacher.decoder_blocks):
            raise models.InputError(f'--target_layer {args.target_layer}: {args.teacher_model} has decoder blocks 1 to '
                                    f'{len(teacher.decoder_blocks)}')
        teacher = models.load_teacher(teacher, args.teacher_path).to(device)
        target_dim = teacher.decoder_dim if args.target == 'feature' else teacher.pixel_dim
    # 4. student
    model_without_ddp = models.create_mae(args.model, args.input_size, target_dim).to(device)
    models.random_masking(torch.rand(1, loader.dataset.transform.num_patches), args.mask_ratio)  # refuses a bad ratio now
    model = model_without_ddp
    if args.compile:
        model.compile()
        if teacher is not None:
            teacher.decoder_features = torch.compile(teacher.decoder_features)
            teacher.reconstruct = torch.compile(teacher.reconstruct)
    if args.distributed:
        model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == 'cuda' else None)
    # 5. optimizer, schedule, loss scaler
    scale_lr(args, PAPER_BATCH, args.blr)
    optimizer = create_optimizer_v2(model_without_ddp, opt='adamw', lr=args.lr, weight_decay=args.weight_decay,
                                    betas=(0.9, 0.95), fused=True)  # MAE's betas
    scheduler = CosineLRScheduler(optimizer, t_initial=args.epochs - args.warmup_epochs, lr_min=args.min_lr,
                                  warmup_t=args.warmup_epochs, warmup_lr_init=0.0, warmup_prefix=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
    # 6. resume
    progress = Progress(args, args.epochs)
    start_epoch = resume_checkpoint(args, progress, model_without_ddp, optimizer, scaler, None)
    save = progress.save = partial(save_checkpoint, args, progress, model_without_ddp, optimizer, scaler, None)
    progress.scaler = scaler
    if start_epoch < args.epochs:
        open_log(args, 'epoch', start_epoch - 1)
    # 7. epochs: train, evaluate, save, log
    for epoch in range(start_epoch, args.epochs):
        loader.sampler.epoch = epoch
        stats = train_one_epoch(model, teacher, loader, optimizer, scheduler, scaler, progress, device, epoch, args)
        # true pixels are harder than what a teacher says: the demo's sound MAE is at 0.9 x the constant after warm-up
        learnt = 'train_loss_pixel' in stats or stats['train_loss'] <= 0.8 * stats.get('constant_loss', math.inf)
        if epoch == args.warmup_epochs and not learnt:
            models.say(f'warning: after warm-up the loss, {stats["train_loss"]:.4f}, is still above 0.8 x '
                       f'{stats["constant_loss"]:.4f}, the loss of the best constant prediction: the student has hardly '
                       'learnt. Check the teacher (tools/visualize.py --check), the learning rate and the data')
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
