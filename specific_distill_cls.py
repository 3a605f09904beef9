"""Stage 2, specific distillation for classification: the student learns from labels and a teacher.

Paper:   G2SD (Huang, Peng et al., CVPR 2023, arXiv 2302.14771), supplement Table 1; DeiT's token
Reads:   --data_path   train/CLASS/ and val/CLASS/, as ImageNet
         --finetune    start weights: stage 1's checkpoint.pth, MAE's ...; without it, from scratch
         --teacher_path   a classifier, e.g. mae_finetuned_vit_base.pth; without it, labels alone;
                          a CNN with --teacher_model timm/regnety_160.deit_in1k
8 GPUs:  torchrun --nproc_per_node=8 specific_distill_cls.py --data_path IMAGENET \
         --finetune runs/generic/checkpoint.pth --teacher_path mae_finetuned_vit_base.pth
CPU:     python tools/toy_data.py --out toy --only imagenet
         python specific_distill_cls.py --data_path toy/imagenet --model vit_nano_patch8 \
         --input_size 48 --batch_size 64 --epochs 4 --warmup_epochs 1
Writes:  output_dir/checkpoint.pth, log.txt (JSON per epoch), args.json
Both paths: G2SD. --finetune alone: "G2SD w/o S.D", or MAE fine-tuned into a teacher. --teacher_path
alone: DeiT with distillation. Neither: DeiT. Evaluation: --eval --resume CHECKPOINT.
"""
import argparse
import contextlib
import json
import os
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
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from timm.data.auto_augment import NAME_TO_OP
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torchvision import transforms

import models

PAPER_BATCH = 1024
# supplement Table 1: the column is chosen by whether --finetune is given
RECIPES = {
    'fine-tuning': {'epochs': 200, 'blr': 1e-3, 'layer_decay': 0.75},
    'from scratch': {'epochs': 500, 'blr': 2.5e-4, 'layer_decay': 1.0},
}
SHAPE_FLAGS = ('model', 'input_size')  # --eval reads them from the checkpoint


def get_args_parser():
    """All flags; defaults are the paper's."""
    parser = argparse.ArgumentParser(
        description='G2SD stage 2: classification (also MAE fine-tuning, DeiT, distilled DeiT)',
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group('distillation')
    group.add_argument('--teacher_model', help='by default the one that its checkpoint names, else '
                                               'vit_base_patch16; timm/NAME[.TAG]: any of timm')
    group.add_argument('--teacher_path', help='its file or https URL; without it, labels alone')
    group.add_argument('--distillation_type', default='hard', choices=['hard', 'soft', 'none'],
                       help='the teacher gives its top class or distribution; none: no teacher')
    group.add_argument('--distillation_alpha', type=float, default=0.5,
                       help='weight of the teacher, against 1 - alpha for the labels')
    group.add_argument('--distillation_tau', type=float, default=1.0, help='temperature, soft type')

    group = parser.add_argument_group('model')
    group.add_argument('--model', default='vit_small_patch16', help='network to train')
    group.add_argument('--finetune', help='checkpoint to start from; it also chooses the recipe')
    group.add_argument('--input_size', type=int, nargs='+', default=[224],
                       help='pixels: one side, or height and width')
    group.add_argument('--global_pool', action=argparse.BooleanOptionalAction,
                       help='classify the mean of the patch tokens (default with --finetune and no '
                            'teacher), not the class token')
    group.add_argument('--drop_path', type=float, default=0.0, help='stochastic depth, last block')

    group = parser.add_argument_group('optimisation')
    group.add_argument('--batch_size', type=int, default=128, help='images per process and step')
    group.add_argument('--accum_iter', type=int, default=1, help='steps that make one update')
    group.add_argument('--epochs', type=int, help='200 with --finetune, else 500')
    group.add_argument('--warmup_epochs', type=int, default=5, help='epochs of linear warm-up')
    group.add_argument('--blr', type=float, help='learning rate per 256 images of the effective '
                                                 'batch: 1e-3 with --finetune, else 2.5e-4')
    group.add_argument('--lr', type=float, help='absolute learning rate; overrides --blr')
    group.add_argument('--min_lr', type=float, default=1e-6, help='cosine end (the authors\' code)')
    group.add_argument('--layer_decay', type=float, help='lr factor per block: 0.75 with '
                                                         '--finetune, else 1')
    group.add_argument('--weight_decay', type=float, default=0.05,
                       help='none on 1-D parameters, tokens and positions')
    group.add_argument('--clip_grad', type=float, help='largest gradient norm; by default no limit')

    group = parser.add_argument_group('augmentation')
    group.add_argument('--aa', default='rand-m9-mstd0.5-inc1', help='timm AutoAugment, or none')
    group.add_argument('--reprob', type=float, default=0.25, help='random erasing probability')
    group.add_argument('--mixup', type=float, default=0.8, help='mixup alpha, 0: off')
    group.add_argument('--cutmix', type=float, default=1.0, help='cutmix alpha, 0: off')
    group.add_argument('--smoothing', type=float, default=0.1, help='label smoothing')

    group = parser.add_argument_group('data')
    group.add_argument('--data_path', help='folder with train/CLASS/, val/CLASS/ (or CIFAR files)')
    group.add_argument('--data_set', default='folder', choices=['folder', 'CIFAR10', 'CIFAR100'],
                       help='format of the data')

    group = parser.add_argument_group('run')
    group.add_argument('--config', help='args.json of another run: its values become the defaults')
    group.add_argument('--output_dir', default='output_dir', help='for checkpoint, log, args.json')
    group.add_argument('--resume', help='checkpoint to resume; auto: that in --output_dir, if any')
    group.add_argument('--eval', action='store_true', help='only evaluate the --resume checkpoint')
    group.add_argument('--eval_every', type=int, default=1,
                       help='epochs between evaluations; the first and last always have one')
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


def posterize(image, bits_to_keep, **_):
    """timm's op, made safe: at magnitude 10 it asks for 0 bits, which Pillow 13 refuses."""
    if bits_to_keep > 0:
        return ImageOps.posterize(image, bits_to_keep)
    return Image.new(image.mode, image.size)  # black, as in older Pillow


def build_transform(args, is_train):
    """PIL image -> (3, H, W) uint8. Training: as DeiT; else resize 256/224, centre crop."""
    NAME_TO_OP.update(Posterize=posterize, PosterizeIncreasing=posterize)
    tiny = max(args.input_size) <= 32
    if not is_train:
        # MAE: no enlargement above 224; images of 32 pixels are whole
        crop_pct = 1.0 if tiny or max(args.input_size) > 224 else 224 / 256
        return create_transform(args.input_size, interpolation='bicubic', crop_pct=crop_pct,
                                use_prefetcher=True)
    policy = None if args.aa == 'none' else args.aa
    transform = create_transform(  # `use_prefetcher`: to bytes; erasing follows on the device
        args.input_size, is_training=True, color_jitter=None, interpolation='bicubic',
        auto_augment=policy, use_prefetcher=True)
    crop = [models.ResizedCrop(args.input_size), transforms.ToPILImage()]
    if tiny:  # DeiT, for CIFAR: a random crop with 4 pixels of padding
        crop = [transforms.Resize(args.input_size), transforms.RandomCrop(args.input_size, padding=4)]
    transform.transforms[:1] = crop  # in place of timm's RandomResizedCrop
    return transform


def open_dataset(args, split, transform=None):
    """Images and labels of train/ or val/, or of CIFAR."""
    if args.data_set != 'folder':
        return models.load_cifar(args, split == 'train', transform)
    root = Path(args.data_path or '', split)
    if not args.data_path or not root.is_dir():
        raise SystemExit(f'--data_path {args.data_path}: give one with train/CLASS/ and val/CLASS/')
    try:
        return torchvision.datasets.ImageFolder(
            root, transform, loader=models.read_rgb, allow_empty=split == 'val')
    except FileNotFoundError as error:
        raise SystemExit(f'--data_path: {error}'.splitlines()[0]) from error


def build_data(args):
    """(training loader, validation loader, class names) of (images (N, 3, H, W) uint8, labels).

    Every validation image belongs to one process, once. No training loader with --eval.
    """
    options = {'batch_size': args.batch_size, 'num_workers': args.num_workers,
               'pin_memory': args.device.startswith('cuda'), 'worker_init_fn': models.start_worker,
               'persistent_workers': args.num_workers > 0}
    val = open_dataset(args, 'val', build_transform(args, is_train=False))
    if not len(val):
        raise SystemExit(f'--data_path {args.data_path}: val/ holds no image')
    own_share = range(args.rank, len(val), args.world_size)
    val_loader = torch.utils.data.DataLoader(val, sampler=own_share, **options)
    if args.eval:
        print(f'data: {len(val)} images to evaluate on, {models.count_classes(val.classes)}')
        return None, val_loader, val.classes
    train = open_dataset(args, 'train', build_transform(args, is_train=True))
    if train.classes != val.classes:
        odd = min(set(train.classes) ^ set(val.classes))
        raise SystemExit(f'--data_path: train/ and val/ hold different classes, e.g. {odd!r}; an '
                         'empty folder in val/ is fine')
    if len(train.classes) < 2:
        raise SystemExit(f'--data_path: train/ has one folder, {train.classes[0]}: one per class')
    sampler = models.SeededSampler(len(train), args)
    train_loader = torch.utils.data.DataLoader(
        models.SeededDataset(train, args.seed), sampler=sampler, **options)
    print(f'data: {len(train)} training images, {len(sampler) * args.world_size} an epoch, '
          f'{len(val)} to evaluate on, {models.count_classes(train.classes)}')
    return train_loader, val_loader, train.classes


def load_classifier(path, name, img_size, classes):
    """A checkpoint's classifier (distilled or not, pooled or not), frozen and in eval mode."""
    checkpoint = models.read_checkpoint(path)
    state = models.flat_state_dict(checkpoint, path)
    if 'head.weight' not in state:
        raise SystemExit(f'{path} has no classification head (head.weight): give a checkpoint of '
                         'this script, or one fine-tuned by MAE, DeiT or timm')
    models.check_classes(checkpoint.get('classes'), classes, path)
    num_classes = len(state['head.weight'])
    if num_classes != len(classes):
        raise SystemExit(f'{path} has {num_classes} classes, the data has {len(classes)}')
    model = models.create_vit(name, num_classes, img_size, distilled='head_dist.weight' in state,
                              global_pool='fc_norm.weight' in state)
    return models.load_teacher(model, path)


class TimmTeacher(torch.nn.Module):
    """A timm classifier as teacher, frozen: ImageNet-normalised images (N, 3, H, W) -> logits (N, C).

    The images are brought, bicubically, to the input size, mean and std of the model's config in
    timm, or to those with which timm's train.py made the file. timm converts the files of others.
    """

    def __init__(self, name, path, classes):
        super().__init__()
        if not timm.is_model(name.split('.')[0]):
            raise SystemExit(f'--teacher_model timm/{name}: no such model, see timm.list_models()')
        checkpoint = models.read_checkpoint(path)
        averaged = ('state_dict_ema', 'model_ema')  # preferred by timm
        state = models.find_state_dict(checkpoint, path, first=averaged)
        state = timm.models.clean_state_dict(state)
        if models.own_args(checkpoint):
            raise SystemExit(f'{path} is of these scripts: leave out --teacher_model')
        config = {'state_dict': state, 'num_classes': len(classes), 'label_offset': 0}
        given = checkpoint.get('args')
        if isinstance(given, argparse.Namespace) and hasattr(given, 'img_size'):  # timm's train.py
            size = given.input_size or (given.img_size and (3, given.img_size, given.img_size))
            stored = {'input_size': size, 'mean': given.mean, 'std': given.std}
            config |= {key: tuple(value) for key, value in stored.items() if value}
        try:
            heads = timm.get_pretrained_cfg(name).classifier or ()
            for head in [heads] if isinstance(heads, str) else heads:
                found = len(state.get(f'{head}.weight', classes))
                if found != len(classes):
                    raise ValueError(f'the file has {found} classes, the data has {len(classes)}')
            # `num_classes` in the config, too: otherwise timm does not load strictly
            self.model = timm.create_model(
                name, pretrained=True, num_classes=len(classes), pretrained_cfg_overlay=config)
        except Exception as error:  # of many kinds in timm's many models
            reason = ' '.join(str(error).split())[:300]
            raise SystemExit(f'--teacher_model timm/{name} and {path}: {reason}') from error
        config = timm.data.resolve_model_data_config(self.model)
        self.input_size = tuple(config['input_size'][1:])
        mean, std = models.image_statistics(torch.device('cpu'))  # of the images here
        own_mean, own_std = (torch.tensor(config[name])[:, None, None] for name in ('mean', 'std'))
        self.register_buffer('scale', std / own_std)
        self.register_buffer('shift', (mean - own_mean) / own_std)
        self.requires_grad_(False).eval()
        print(f'teacher: timm/{name}, {self.input_size} pixels, mean {config["mean"]}, std '
              f'{config["std"]}, {len(state)} tensors of {path}')

    def forward(self, images):
        if images.shape[-2:] != self.input_size:
            images = F.interpolate(images, self.input_size, mode='bicubic', antialias=True)
        return self.model(images * self.scale + self.shift)


# ---- losses --------------------------------------------------------------------------------------


def label_loss(logits, labels, smoothing=0.0):
    """Cross-entropy in float32. labels: (N,) indices, which are smoothed, or (N, C) from mixup."""
    return F.cross_entropy(
        logits.float(), labels, label_smoothing=smoothing if labels.ndim == 1 else 0.0)


def distillation_loss(class_logits, dist_logits, labels, teacher_logits, distillation_type='hard',
                      alpha=0.5, tau=1.0, smoothing=0.0):
    """DeiT's loss: (1 - alpha) * CE(class head, labels) + alpha * (distillation head vs teacher).

    class_logits, dist_logits, teacher_logits: (N, C), any float; labels as in `label_loss`. The
    teacher saw the same, mixed images. 'hard': CE to its top class; 'soft': tau^2 * KL(teacher ||
    student), summed over classes, mean over N; 'none': the labels alone. Returns a scalar, float32.
    Source: Touvron et al., ICML 2021; G2SD supplement, classification.
    """
    loss_class = label_loss(class_logits, labels, smoothing)
    if distillation_type == 'none':
        return loss_class
    dist_logits, teacher_logits = dist_logits.float(), teacher_logits.float()
    if distillation_type == 'hard':
        loss_distill = F.cross_entropy(dist_logits, teacher_logits.argmax(dim=1))
    else:
        student, teacher = (dist_logits / tau).log_softmax(1), (teacher_logits / tau).log_softmax(1)
        loss_distill = tau ** 2 * F.kl_div(student, teacher, log_target=True, reduction='batchmean')
    return (1 - alpha) * loss_class + alpha * loss_distill


# ---- training ------------------------------------------------------------------------------------


def train_one_epoch(model, teacher, loader, optimizer, scheduler, scaler, mixup, meter, device,
                    epoch, start, args):
    """Trains from step `start` on; returns the steps done, fewer than all after a signal."""
    model.train()
    erase = RandomErasing(args.reprob, mode='pixel', device=device)  # with N(0, 1) noise
    for step, (images, labels) in meter.log_every(loader, epoch, start):
        if step % args.accum_iter == 0:
            scheduler.step(epoch + step / len(loader))
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        models.seed_everything(args.seed, epoch, step, args.rank, models.STEP)
        images = erase(models.normalise(images))
        if mixup is not None:
            images, labels = mixup(images, labels)  # labels become (N, C), smoothed
        with gradient_sync(model, step, args):
            with torch.autocast(device.type, AMP_DTYPES[args.amp], enabled=args.amp != 'off'):
                losses = {}
                if teacher is None:
                    loss = label_loss(model(images), labels, args.smoothing)
                else:
                    with torch.no_grad():
                        teacher_logits = teacher(images)
                    class_logits, dist_logits = model(images)
                    loss = distillation_loss(
                        class_logits, dist_logits, labels, teacher_logits, args.distillation_type,
                        args.distillation_alpha, args.distillation_tau, args.smoothing)
                    # the two parts of the loss, for the log
                    loss_class = label_loss(class_logits.detach(), labels, args.smoothing)
                    losses['loss_class'] = (1 - args.distillation_alpha) * loss_class
                    losses['loss_distill'] = loss - losses['loss_class']
        grad_norm = backward(loss, model, optimizer, scaler, step, args)
        meter.update(grad_norm, loss=loss, **losses)
        if grad_norm is not None and stop_requested(args):
            return step + 1
    return len(loader)


@torch.no_grad()
@torch.compiler.set_stance('force_eager')  # --compile is for training alone
def evaluate(model, loader, device, args):
    """Top-1 and top-5 accuracy in percent over all processes, each image counted once."""
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, images
    for images, labels in loader:
        images = models.normalise(images.to(device, non_blocking=True))
        labels = labels.to(device, non_blocking=True)
        logits = model(images)  # in float32 whatever --amp says: bf16 logits tie
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # (N, 5)
        sums += torch.stack([F.cross_entropy(logits, labels, reduction='sum'), hits[:, 0].sum(),
                             hits.any(dim=1).sum(), torch.tensor(len(labels), device=device)])
    if args.distributed:
        dist.all_reduce(sums)
    loss, top1, top5, count = sums.tolist()
    top1, top5 = 100 * top1 / count, 100 * top5 / count
    print(f'test: top-1 {top1:.2f} % top-5 {top5:.2f} % of {count:.0f} images')
    return {'test_loss': loss / count, 'test_acc1': top1, 'test_acc5': top5,
            'test_images': int(count)}


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
    if args.distillation_type == 'none':
        args.teacher_path = args.teacher_model = None
    if args.teacher_model and not args.teacher_path and not args.eval:
        raise SystemExit(f'--teacher_model {args.teacher_model} needs --teacher_path, its checkpoint')
    if args.global_pool and args.teacher_path:
        raise SystemExit('--global_pool and --teacher_path exclude each other: a distilled network '
                         'reads its class and distillation tokens')
    if args.global_pool is None:
        args.global_pool = bool(args.finetune and not args.teacher_path)
    recipe = 'fine-tuning' if args.finetune else 'from scratch'
    for flag, value in RECIPES[recipe].items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if args.warmup_epochs >= args.epochs:
        raise SystemExit(f'--warmup_epochs {args.warmup_epochs} must be below --epochs {args.epochs}')
    if (args.mixup or args.cutmix) and args.batch_size % 2 and not args.eval:
        raise SystemExit(f'--batch_size {args.batch_size}: mixup and cutmix pair images and need '
                         'an even number, or --mixup 0 --cutmix 0')
    args.input_size = models.check_img_size(args.input_size, models.parse_name(args.model).patch)
    # 2. data
    loader, val_loader, classes = build_data(args)
    # 3. teacher: strict load, eval mode, no gradients
    teacher = None
    if args.teacher_path and not args.eval:
        flags = models.own_args(models.read_checkpoint(args.teacher_path))
        args.teacher_model = args.teacher_model or flags.get('model', 'vit_base_patch16')
        if args.teacher_model.startswith('timm/'):
            teacher = TimmTeacher(args.teacher_model[5:], args.teacher_path, classes)
        else:
            teacher = load_classifier(
                args.teacher_path, args.teacher_model, args.input_size, classes)
        teacher.to(device)
    # 4. student
    if args.eval:
        path, _ = models.find_checkpoint(args)
        model = load_classifier(path, args.model, args.input_size, classes).to(device)
        evaluate(model, val_loader, device, args)
        return
    model_without_ddp = models.create_vit(
        args.model, len(classes), args.input_size, distilled=teacher is not None,
        global_pool=args.global_pool, drop_path_rate=args.drop_path)
    if args.finetune:
        models.load_pretrained(model_without_ddp, args.finetune)
        models.reset_head(model_without_ddp)
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
    distillation = args.distillation_type if teacher else 'no'
    print(f'arguments: {vars(args)}\nrecipe: supplement Table 1, {recipe}, {distillation} distillation, '
          f'lr {args.lr:.3g}, effective batch {batch} (the paper has {PAPER_BATCH}), '
          f'{len(loader) // args.accum_iter} updates an epoch')
    optimizer = create_optimizer_v2(
        model_without_ddp, opt='adamw', lr=args.lr, weight_decay=args.weight_decay,
        layer_decay=args.layer_decay, fused=True)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=args.epochs - args.warmup_epochs, lr_min=args.min_lr,
        warmup_t=args.warmup_epochs, warmup_lr_init=0.0, warmup_prefix=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == 'fp16')
    mixup = None
    if args.mixup or args.cutmix:
        mixup = Mixup(mixup_alpha=args.mixup, cutmix_alpha=args.cutmix,
                      label_smoothing=args.smoothing, num_classes=len(classes))
    # 6. resume
    meter = models.Meter(args, optimizer, args.epochs)
    # timm's schedulers depend on the step alone; a scheduler with a state belongs here, too
    parts = {'model': model_without_ddp, 'optimizer': optimizer, 'scaler': scaler, 'meter': meter}
    first_epoch, samples = models.resume(args, classes, **parts)
    if args.rank == 0:  # a run whose resume is refused leaves the file alone
        Path(args.output_dir, 'args.json').write_text(json.dumps(given, indent=2) + '\n')
    # 7. epochs: train, save, evaluate, log
    for epoch in range(first_epoch, args.epochs):
        start = loader.sampler.set_epoch(epoch, samples)
        step = train_one_epoch(model, teacher, loader, optimizer, scheduler, scaler, mixup, meter,
                               device, epoch, start, args)
        models.save_checkpoint(args, epoch, step, loader, classes, **parts)
        if step < len(loader):
            print('stopped by a signal: --resume auto goes on from here')
            return
        stats = meter.stats()
        if epoch == 0 or (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            stats |= evaluate(model_without_ddp, val_loader, device, args)
        write_log(args, {'epoch': epoch, **stats})
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
