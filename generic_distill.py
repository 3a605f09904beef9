"""Stage 1, generic distillation: a small MAE learns the hidden features of a large MAE's decoder.

Paper:   G2SD (Huang, Peng et al., CVPR 2023, arXiv 2302.14771), generic distillation, Tables 4, 5
Reads:   --data_path   folder of images, or one with `train` in it; no labels are used
         --teacher_path   a complete MAE with its decoder, e.g. mae_pretrain_vit_base_full.pth
8 GPUs:  torchrun --nproc_per_node=8 generic_distill.py --data_path IMAGENET \
         --teacher_path mae_pretrain_vit_base_full.pth
CPU:     python tools/toy_data.py --out toy --only imagenet
         python generic_distill.py --data_path toy/imagenet --target pixel --input_size 48 \
         --model mae_vit_nano_patch8 --batch_size 64 --accum_iter 1 --epochs 4 --warmup_epochs 1
Writes:  output_dir/checkpoint.pth (for --finetune of stage 2), log.txt (JSON per epoch), args.json
`--target pixel` is MAE itself and makes a teacher for your own data. Distil that one with the same
command, `--teacher_path output_dir/checkpoint.pth --output_dir student` in place of `--target pixel`.
With `--model mae_vit_base_patch16 --init mae_pretrain_vit_base_full.pth` it goes on from MAE's weights.
"""
import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from datetime import timedelta
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

PAPER_BATCH = 4096
# the authors' code, but for the 300 epochs of the supplement; `pixel`: MAE's recipe
RECIPES = {
    'distillation': {'epochs': 300, 'warmup_epochs': 10, 'min_lr': 2.5e-6},
    'pixel': {'epochs': 800, 'warmup_epochs': 40, 'min_lr': 0.0},
}
SHAPE_FLAGS = ()  # what --eval reads from the checkpoint; this stage has no --eval


def get_args_parser():
    """All flags; defaults are the paper's."""
    parser = argparse.ArgumentParser(
        description='G2SD stage 1: generic distillation (MAE pre-training with --target pixel)',
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group('distillation')
    group.add_argument('--target', default='feature',
                       choices=['feature', 'recon', 'recon_gt', 'pixel'],
                       help='predicted (Table 4): decoder features, the teacher\'s reconstruction, '
                            'that and true pixels, or true pixels alone (MAE, no teacher)')
    group.add_argument('--teacher_model', help='by default the one that its checkpoint names, else '
                                               'mae_vit_base_patch16')
    group.add_argument('--teacher_path', help='its checkpoint with the decoder, path or https URL')
    group.add_argument('--target_layer', type=int, help='teacher decoder block to imitate, '
                                                        '1-based; by default the middle, 4 of 8')
    group.add_argument('--supervise', default='all', choices=['all', 'masked'],
                       help='tokens in the feature loss: all, or the hidden patches alone')
    group.add_argument('--mask_ratio', type=float, default=0.75,
                       help='share of hidden patches (Table 5)')
    group.add_argument('--norm_pix_loss', action=argparse.BooleanOptionalAction, default=True,
                       help='normalise true patches; a teacher trained by this script overrides it')

    group = parser.add_argument_group('model')
    group.add_argument('--model', default='mae_vit_small_patch16_dec256d4b', help='network to train')
    group.add_argument('--init', help='checkpoint to start from, path or https URL: a complete MAE '
                                      'with --target pixel, else a student of stage 1')
    group.add_argument('--input_size', type=int, nargs='+', default=[224],
                       help='pixels: one side, or height and width')

    group = parser.add_argument_group('optimisation')
    group.add_argument('--batch_size', type=int, default=256, help='images per process and step')
    group.add_argument('--accum_iter', type=int, default=2, help='steps that make one update')
    group.add_argument('--epochs', type=int, help='300, or 800 with --target pixel')
    group.add_argument('--warmup_epochs', type=int, help='10, or 40 with --target pixel')
    group.add_argument('--blr', type=float, default=1.5e-4,
                       help='learning rate per 256 images of the effective batch')
    group.add_argument('--lr', type=float, help='absolute learning rate; overrides --blr')
    group.add_argument('--min_lr', type=float, help='cosine end: 2.5e-6, or 0 with --target pixel')
    group.add_argument('--weight_decay', type=float, default=0.05, help='none on 1-D parameters')
    group.add_argument('--clip_grad', type=float, help='largest gradient norm; by default no limit')

    group = parser.add_argument_group('data')
    group.add_argument('--data_path', help='folder of images (or of the CIFAR files)')
    group.add_argument('--data_set', default='folder', choices=['folder', 'CIFAR10', 'CIFAR100'],
                       help='format of the data')

    group = parser.add_argument_group('run')
    group.add_argument('--config', help='args.json of another run: its values become the defaults')
    group.add_argument('--output_dir', default='output_dir', help='for checkpoint, log, args.json')
    group.add_argument('--resume', help='checkpoint to resume; auto: that in --output_dir, if any')
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


class CropAndNoise:
    """PIL image -> (augmented image (3, H, W) uint8, noise (L,) of its mask).

    The noise is drawn here, so that a sample's mask does not depend on the number of processes.
    """

    def __init__(self, input_size, num_patches):
        self.num_patches = num_patches
        self.augment = transforms.Compose([
            models.ResizedCrop(input_size, scale=(0.2, 1.0)), transforms.RandomHorizontalFlip()])

    def __call__(self, image):
        return self.augment(image), torch.rand(self.num_patches)


class FlatFolder(torchvision.datasets.ImageFolder):
    """All images in and below a folder, as one class: stage 1 uses no labels."""

    def find_classes(self, directory):
        return [''], {'': 0}


def build_data(args, num_patches):
    """Loader of ((images (N, 3, H, W) uint8, noise (N, L)), label)."""
    transform = CropAndNoise(args.input_size, num_patches)
    if args.data_set == 'folder':
        root = Path(args.data_path or '')
        if not args.data_path or not root.is_dir():
            raise SystemExit(f'--data_path {args.data_path}: give a folder of images')
        if (root / 'train').is_dir():
            root = root / 'train'
        try:
            dataset = FlatFolder(root, transform, loader=models.read_rgb)
        except FileNotFoundError as error:
            raise SystemExit(f'--data_path {root} holds no image') from error
        other = 'annotations'  # label images; unless the folder is called train, also held-out images
        if not re.fullmatch(r'train(ing)?([\d_-]*\d)?', root.name, re.I):
            other += r'|(val(id(ation)?)?|test(ing)?)([\d_-].*)?'
        for folder in sorted({os.path.dirname(path) for path, _ in dataset.samples}):
            inside = Path(folder).relative_to(root)
            if any(re.fullmatch(other, part, re.I) for part in inside.parts):
                raise SystemExit(f'--data_path {root} holds {inside}/, too: give the folder of the '
                                 'training images, or call it train')
    else:
        dataset = models.load_cifar(args, train=True, transform=transform)
        root = f'{args.data_set} in {args.data_path}'
    sampler = models.SeededSampler(len(dataset), args)
    print(f'data: {len(dataset)} images of {root}, {len(sampler) * args.world_size} an epoch')
    return torch.utils.data.DataLoader(
        models.SeededDataset(dataset, args.seed), args.batch_size, sampler=sampler,
        num_workers=args.num_workers, worker_init_fn=models.start_worker,
        pin_memory=args.device.startswith('cuda'), persistent_workers=args.num_workers > 0)


# ---- losses --------------------------------------------------------------------------------------


def feature_loss(pred, target, beta=2.0):
    """Smooth-L1 distance between student predictions and layer-normalised teacher features.

    pred, target: (N, T, D), any float dtype, computed in float32; T counts the supervised tokens.
    Differences d below beta count d^2 / (2 beta), others |d| - beta / 2.
    Returns a scalar, the mean over N, T, D. Raises ValueError if the shapes differ.
    Source: G2SD, generic distillation; LayerNorm without affine and beta from the authors' code.
    """
    if pred.shape != target.shape:
        raise ValueError(f'shapes differ: pred {tuple(pred.shape)}, target {tuple(target.shape)}')
    target = F.layer_norm(target.float(), target.shape[-1:], eps=1e-6)
    return F.smooth_l1_loss(pred.float(), target, beta=beta)


def recon_loss(pred, target, mask, beta=2.0):
    """Smooth-L1 distance to the teacher's reconstruction at hidden patches (Table 4, row 2).

    pred, target: (N, L, p*p*3); mask: (N, L), 1 = hidden. Returns a scalar; no LayerNorm (ours).
    """
    per_patch = F.smooth_l1_loss(
        pred.float(), target.float(), beta=beta, reduction='none').mean(dim=-1)
    return (per_patch * mask).sum() / mask.sum()


def pixel_loss(pred, pixels, mask, norm_pix_loss=True):
    """MAE's loss: mean squared error at hidden patches.

    pred, pixels: (N, L, p*p*3); mask: (N, L), 1 = hidden. With norm_pix_loss each true patch first
    gets mean 0 and variance 1 (unbiased, + 1e-6, as in MAE). Returns a scalar.
    """
    pixels = pixels.float()
    if norm_pix_loss:
        variance = pixels.var(-1, keepdim=True)
        pixels = (pixels - pixels.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt()
    per_patch = (pred.float() - pixels).square().mean(dim=-1)  # (N, L)
    return (per_patch * mask).sum() / mask.sum()


def compute_losses(model, teacher, images, masking, args):
    """The terms of --target by name, to be summed. Student and teacher see the same mask."""
    pred = model(images, masking)  # (N, 1+L, target_dim), or (N, L, p*p*3) with --target pixel
    if args.target == 'feature':
        with torch.no_grad():
            target = teacher(images, masking, args.target_layer)
        if args.supervise == 'masked':
            hidden = masking.mask.shape[1] - masking.ids_keep.shape[1]
            ids_hidden = masking.mask.argsort(dim=1, descending=True)[:, :hidden]
            pred, target = models.take(pred[:, 1:], ids_hidden), models.take(target[:, 1:], ids_hidden)
        return {'loss_feature': feature_loss(pred, target)}
    losses = {}
    if args.target != 'pixel':
        pred = pred[:, 1:]  # class token dropped
        with torch.no_grad():
            target = teacher(images, masking)
        losses['loss_recon'] = recon_loss(pred, target, masking.mask)
    if args.target != 'recon':  # equal weights: ours, the paper does not state them
        pixels = (model.module if args.distributed else model).patchify(images)
        losses['loss_pixel'] = pixel_loss(pred, pixels, masking.mask, args.norm_pix_loss)
    return losses


# ---- training ------------------------------------------------------------------------------------


def train_one_epoch(model, teacher, loader, optimizer, scheduler, scaler, meter, device, epoch,
                    start, args):
    """Trains from step `start` on; returns the steps done, fewer than all after a signal."""
    model.train()
    for step, ((images, noise), _) in meter.log_every(loader, epoch, start):
        if step % args.accum_iter == 0:
            scheduler.step(epoch + step / len(loader))
        images = models.normalise(images.to(device, non_blocking=True))
        masking = models.random_masking(noise.to(device, non_blocking=True), args.mask_ratio)
        models.seed_everything(args.seed, epoch, step, args.rank, models.STEP)
        with gradient_sync(model, step, args):
            with torch.autocast(device.type, AMP_DTYPES[args.amp], enabled=args.amp != 'off'):
                losses = compute_losses(model, teacher, images, masking, args)
                loss = sum(losses.values())
        grad_norm = backward(loss, model, optimizer, scaler, step, args)
        meter.update(grad_norm, loss=loss, **losses)
        if grad_norm is not None and stop_requested(args):
            return step + 1
    return len(loader)


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
    recipe = 'pixel' if args.target == 'pixel' else 'distillation'
    for flag, value in RECIPES[recipe].items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if args.warmup_epochs >= args.epochs:
        raise SystemExit(f'--warmup_epochs {args.warmup_epochs} must be below --epochs {args.epochs}')
    if args.target == 'pixel' and args.teacher_path:
        raise SystemExit('--target pixel is MAE without a teacher: leave out --teacher_path, or '
                         'give --target feature')
    patch = models.parse_name(args.model, mae=True).patch
    args.input_size = models.check_img_size(args.input_size, patch)
    # 2. data
    num_patches = args.input_size[0] // patch * (args.input_size[1] // patch)
    loader = build_data(args, num_patches)
    # 3. teacher: strict load, eval mode, no gradients
    teacher, target_dim = None, None
    if args.target != 'pixel':
        if not args.teacher_path:
            raise SystemExit(f'--teacher_path is missing: {models.DECODER_HELP}; MAE pre-training '
                             'without a teacher is --target pixel')
        flags = models.own_args(models.read_checkpoint(args.teacher_path))
        if flags.get('target') == 'feature':
            raise SystemExit(f'{args.teacher_path} is a student of stage 1, which predicts features: '
                             'its teacher is an MAE (--target pixel)')
        # true pixels in the form that the teacher was trained to predict
        args.norm_pix_loss = flags.get('norm_pix_loss', args.norm_pix_loss)
        args.teacher_model = args.teacher_model or flags.get('model', 'mae_vit_base_patch16')
        if args.teacher_model.startswith('vit_'):
            raise SystemExit(f'{args.teacher_path} has no decoder: {models.DECODER_HELP}')
        teacher = models.create_mae(args.teacher_model, args.input_size)
        if teacher.patch_embed.num_patches != num_patches:
            raise SystemExit(f'{args.model} and {args.teacher_model} differ in patch size: '
                             'they share one mask')
        depth = len(teacher.decoder_blocks)
        if args.target_layer is None:
            args.target_layer = max(1, depth // 2)
        if not 1 <= args.target_layer <= depth:
            raise SystemExit(f'--target_layer {args.target_layer}: the teacher\'s decoder has '
                             f'blocks 1 to {depth}')
        teacher = models.load_teacher(teacher, args.teacher_path).to(device)
        target_dim = teacher.decoder_dim if args.target == 'feature' else teacher.pixel_dim
    # 4. student
    model_without_ddp = models.create_mae(args.model, args.input_size, target_dim)
    if args.init:
        if target_dim and 'feature_head.fc1.weight' not in models.load_checkpoint(args.init):
            raise SystemExit(f'--init {args.init} is no student of stage 1, as distillation needs it: '
                             'MAE goes on with --target pixel')
        models.load_weights(model_without_ddp, args.init)
    model = model_without_ddp.to(device)
    if args.compile:
        model.compile()
        if teacher is not None:
            teacher.compile()
    if args.distributed:
        device_ids = [device] if device.type == 'cuda' else None
        model = torch.nn.parallel.DistributedDataParallel(model, device_ids=device_ids)
    # 5. optimizer, schedule, loss scaler
    batch = args.batch_size * args.accum_iter * args.world_size
    if args.lr is None:
        args.lr = args.blr * batch / 256
    print(f'arguments: {vars(args)}\nrecipe: {recipe}, lr {args.lr:.3g}, effective batch {batch} '
          f'(the paper has {PAPER_BATCH}), {len(loader) // args.accum_iter} updates an epoch')
    optimizer = create_optimizer_v2(  # betas: MAE
        model_without_ddp, opt='adamw', lr=args.lr, weight_decay=args.weight_decay,
        betas=(0.9, 0.95), fused=True)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=args.epochs - args.warmup_epochs, lr_min=args.min_lr,
        warmup_t=args.warmup_epochs, warmup_lr_init=0.0, warmup_prefix=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
    # 6. resume
    meter = models.Meter(args, optimizer, args.epochs)
    # timm's schedulers depend on the step alone; a scheduler with a state belongs here, too
    parts = {'model': model_without_ddp, 'optimizer': optimizer, 'scaler': scaler, 'meter': meter}
    first_epoch, samples = models.resume(args, **parts)
    if args.rank == 0:  # a run whose resume is refused leaves the file alone
        Path(args.output_dir, 'args.json').write_text(json.dumps(given, indent=2) + '\n')
    # 7. epochs: train, save, evaluate, log
    for epoch in range(first_epoch, args.epochs):
        start = loader.sampler.set_epoch(epoch, samples)
        step = train_one_epoch(model, teacher, loader, optimizer, scheduler, scaler, meter, device,
                               epoch, start, args)
        models.save_checkpoint(args, epoch, step, loader, **parts)
        if step < len(loader):
            print('stopped by a signal: --resume auto goes on from here')
            return
        write_log(args, {'epoch': epoch, **meter.stats()})
        samples = 0
    print(f'done: {args.epochs} epochs in {timedelta(seconds=int(meter.seconds))} of training, see '
          f'{args.output_dir}')


if __name__ == '__main__':
    try:
        main(parse_args(get_args_parser()))
    except (Exception, SystemExit) as error:
        models.end_run(error)
    if dist.is_initialized():
        dist.destroy_process_group()
