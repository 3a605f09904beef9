"""How fast a stage is, where its time goes, and what its formulation gains over a plain one, measured in one run.

The script's own main() builds everything; in place of its first epoch this measures, on random weights:
loader    the real loader alone, and the work of one sample on one core
step      the script's own train_one_epoch on one batch that lies ready
both      the script's own train_one_epoch on the real loader, and the share of time that it waits for data
plain     in turns with these, the same maths, batch, autocast and optimiser done the plain way: patch embedding of whole
          images and the authors' encoder-feature head times zero (stage 1), softmax attention as a matrix in memory,
          foreach AdamW and a host sync with .item() at each step, and in the loader Pillow's resize and normalised floats
          (stage 1, classification). It is never compiled. Its loss must agree to 1e-5
Examples: python tools/benchmark.py --data_path IMAGENET --batch_size 256 --accum_iter 1 --compile
          python tools/benchmark.py --stage cls --steps 3 --batch_size 16 --amp bf16 --json bench.json
          torchrun --nproc_per_node=2 tools/benchmark.py --stage generic --no-plain --batch_size 8
          python tools/benchmark.py --table bench.json
Every flag that is not listed here is the script's own. Without --data_path pictures of an ImageNet photograph's size, or
scenes of 512 pixels, are drawn. Predictions, results and what was not kept: tools/benchmark.md.
"""
import argparse
import contextlib
import copy
import importlib
import inspect
import itertools
import json
import resource
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer_sam import Attention
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]
import models  # noqa: E402
import toy_data  # noqa: E402

SCRIPTS = {'generic': 'generic_distill', 'cls': 'specific_distill_cls', 'det': 'specific_distill_det',
           'seg': 'specific_distill_seg'}


class Done(Exception):
    """Ends main() where its first epoch would have begun."""


def get_args_parser():
    parser = argparse.ArgumentParser(description='images/s of a stage, and its gain over a plain formulation',
                                     allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--stage', choices=SCRIPTS, default='generic', help='the script whose step is measured')
    parser.add_argument('--steps', type=int, default=4, help='steps of one turn')
    parser.add_argument('--turns', type=int, default=5, help='turns of every measurement; medians are printed')
    parser.add_argument('--plain', action=argparse.BooleanOptionalAction, default=True,
                        help='measure the plain formulation, too')
    parser.add_argument('--teacher', action=argparse.BooleanOptionalAction, default=True,
                        help='without one: stage 1 as MAE, stage 2 by labels alone')
    parser.add_argument('--json', help='file to which the result is appended as a line')
    parser.add_argument('--table', help='measure nothing, print such a file as a table')
    return parser


# ------------------------------------------------------------------------------------------------------------------ data


def draw_photographs(folder, count=48, size=(500, 375)):
    """JPEGs of an ImageNet photograph's size, and about its bytes (110 kB): blurred noise with a fine grain."""
    rng = np.random.default_rng(0)
    for split, index in itertools.product(('train', 'val'), range(count)):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        pixels = np.clip(np.asarray(coarse) + rng.normal(0, 12, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
        path = folder / split / f'class{index % 2}' / f'{index}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=93)


def draw_data(stage, folder):
    """Draws what a stage reads; returns the --data_path."""
    if stage in ('generic', 'cls'):
        draw_photographs(folder)
        return folder
    kind = {'det': 'coco', 'seg': 'ade'}[stage]
    toy_data.main(toy_data.get_args_parser().parse_args(
        ['--out', str(folder), '--only', kind, '--scenes', '16', '--val_scenes', '2', '--scene_size', '512']))
    return folder / kind


class Repeat:
    """A loader of one batch, `steps` times."""

    def __init__(self, batch, steps):
        self.batch, self.steps = batch, steps

    def __len__(self):
        return self.steps

    def __iter__(self):
        return itertools.repeat(self.batch, self.steps)


class Endless:
    """The next `steps` batches of a loader, pass after pass: its workers go on reading between two turns."""

    def __init__(self, loader, steps):
        self.loader, self.steps, self.batches = loader, steps, self.passes(loader)

    @staticmethod
    def passes(loader):
        for epoch in itertools.count():
            loader.sampler.epoch = epoch
            yield from loader

    def __len__(self):
        return self.steps

    def __iter__(self):
        return itertools.islice(self.batches, self.steps)


# ---------------------------------------------------------------------------------------------------- the plain formulation


def whole_image_encode(self, images, masking):
    """`MaskedAutoencoder.encode` with the patch projection of all patches, of which most are then thrown away."""
    x = models.take(self.patch_embed(images) + self.pos_embed[:, 1:], masking.ids_keep)
    x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], dim=1)
    for block in self.blocks:
        x = block(x)
    return self.norm(x)


def make_plain(network):
    """A copy whose attention is a softmax over a matrix in memory, and whose patch embedding is of whole images."""
    network = copy.deepcopy(network)
    for name in ('decoder_features', 'reconstruct'):  # compiled ones
        network.__dict__.pop(name, None)
    for module in network.modules():
        if hasattr(module, 'fused_attn'):
            module.fused_attn = False
        if type(module).__name__ == 'FoldedAttention':  # detection: back to timm's, with its bias
            module.__class__ = Attention
            module.fused_attn = False
        if isinstance(module, models.MaskedAutoencoder):
            module.encode = types.MethodType(whole_image_encode, module)
    return network


def plain_dataset(stage, dataset, args):
    """The same samples by Pillow's resize, as normalised floats."""
    dataset = copy.copy(dataset)
    floats = [transforms.ToTensor(), transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
    if stage == 'generic':
        augment, length = transforms.Compose([
            transforms.RandomResizedCrop(args.input_size, (0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(), *floats]), dataset.transform.num_patches
        dataset.transform = lambda image: (augment(image)[None], torch.rand(1, length))
    elif stage == 'cls':
        dataset.transform = create_transform(
            args.input_size, is_training=True, color_jitter=None, interpolation='bicubic', re_prob=args.reprob,
            auto_augment=None if args.aa == 'none' else args.aa, re_mode='pixel')
    return dataset


class Step:
    """A stage's step, spelled out: of the networks as they are, to count and compare, or the plain way on copies."""

    def __init__(self, stage, script, given, plain):
        self.stage, self.script, self.args, self.device = stage, script, given['args'], given['device']
        self.teacher, self.mixup, self.head = given['teacher'], given.get('mixup'), None
        self.model = given['model'].module if self.args.distributed else given['model']
        if not plain:
            return
        self.model = make_plain(self.model).train()
        self.teacher = make_plain(self.teacher) if self.teacher is not None else None
        if stage == 'generic' and self.teacher is not None:  # the authors' `encoderfeature_pred`, whose loss has weight 0
            width = self.model.norm.weight.numel()
            self.head = nn.Sequential(nn.Linear(width, 768), nn.GELU(), nn.Linear(768, 768)).to(self.device)
            self.model.norm.register_forward_hook(lambda module, inputs, output: setattr(self, 'latent', output))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.args.lr, foreach=True,
                                           weight_decay=self.args.weight_decay)
        if self.args.distributed:
            self.model = nn.parallel.DistributedDataParallel(self.model)
            self.model.broadcast_buffers = False

    def loss(self, batch):
        """A batch of the stage's loader, of bytes or of normalised floats -> its loss, as train_one_epoch computes it."""
        args, script, teacher = self.args, self.script, self.teacher

        def place(x):
            return x.to(self.device, non_blocking=True)

        def normalised(images):
            return images if images.is_floating_point() else models.normalise(images)

        if self.stage == 'generic':
            (images, noise), _, _ = batch
            images, masking = place(images).flatten(0, 1), models.random_masking(place(noise).flatten(0, 1), args.mask_ratio)
            loss = sum(script.stage_losses(self.model, teacher, normalised(images), masking, args).values())
            return loss if self.head is None else loss + 0.0 * self.head(self.latent).square().mean()
        if self.stage == 'cls':
            images, labels = normalised(place(batch[0])), place(batch[1])
            if self.mixup is not None:
                images, labels = self.mixup(images, labels)
            if teacher is None:
                return script.distillation_loss(self.model(images), None, labels, None, 'none', smoothing=args.smoothing)
            with torch.no_grad():
                logits = teacher(images)
            return script.distillation_loss(*self.model(images), labels, logits, args.distillation_type,
                                            args.distillation_alpha, args.distillation_tau, args.smoothing)
        if self.stage == 'det':
            images = [place(image) for image in batch[0]]
            losses, features, logits = self.model(images, [{k: place(v) for k, v in row.items()} for row in batch[1]])
            loss = sum(losses.values())
            if teacher is not None:
                with torch.no_grad():
                    seen = teacher.look(images)
                loss_fpn, loss_head = script.frs_loss(features, seen[0], logits, seen[1])
                loss = loss + args.fpn_weight * loss_fpn + args.head_weight * loss_head
            return loss
        images, labels = place(batch[0]), place(batch[1])
        logits, aux_logits = self.model(images)
        loss = script.pixel_loss(logits, labels) + args.aux_weight * script.pixel_loss(aux_logits, labels)
        if teacher is not None:
            with torch.no_grad():
                seen = teacher(images)
            loss = loss + args.cwd_weight * script.cwd_loss(logits, seen, args.cwd_tau)
        return loss

    def train(self, loader):
        """The plain loop."""
        dtype = self.script.AMP_DTYPES[self.args.amp]
        for batch in loader:
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
                loss = self.loss(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_grad or float('inf'))
            self.optimizer.step()
            self.optimizer.zero_grad()
            if not np.isfinite(loss.item()):  # the host sync of MAE's and DeiT's loops
                raise FloatingPointError('the plain formulation is not finite')


# ------------------------------------------------------------------------------------------------------------- measuring


def clock(device):
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter()


def matmul_peak(device, dtype):
    """FLOP/s of a large square matrix product of this type, best of five."""
    size = 8192 if device.type == 'cuda' else 2048
    a = torch.randn(size, size, device=device).to(dtype)
    times = []
    for _ in range(5):
        begin = clock(device)
        a @ a
        times.append(clock(device) - begin)
    return 2 * size ** 3 / min(times)


def first_two(stage, batch):
    """A batch of two images; stage 1 nests images and noise."""
    return [[part[:2] for part in batch[0]], *batch[1:]] if stage == 'generic' else [part[:2] for part in batch]


def count_flop(step, batch):
    """FLOP per image of forward and backward: matrix products and convolutions, attention as the products that it is."""
    step.model = copy.deepcopy(step.model).train()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance('force_eager'):
        step.loss(batch).backward()
    images = batch[0][0].shape[:2].numel() if step.stage == 'generic' else len(batch[0])  # stage 1: images x views
    return counter.get_total_flops() / images


def loss_difference(one, other, batch, seed):
    """|difference of the losses| of two formulations in float32, without stochastic depth. Raises above 1e-5."""
    layers = [module for step in (one, other) for module in step.model.modules() if 'Drop' in type(module).__name__]
    losses, modes = [], [layer.training for layer in layers]
    with torch.no_grad():
        for step in (one, other):
            step.model.train()
            for layer in layers:
                layer.eval()
            models.seed_everything(seed)
            losses.append(step.loss(batch).item())
    for layer, mode in zip(layers, modes):
        layer.train(mode)
    if not abs(losses[0] - losses[1]) <= 1e-5 * max(1, abs(losses[0])):
        raise models.InputError(f'the plain formulation computes another loss: {losses[1]}, not {losses[0]}')
    return abs(losses[0] - losses[1])


def measure(stage, script, options, given):
    """What the docstring of this file lists, as a dict. given: the arguments of train_one_epoch by name."""
    args, device, loader, progress = (given[name] for name in ('args', 'device', 'loader', 'progress'))
    train = given.pop('train')
    # behind warm-up, where stage 1 compares with no constant and detection distils with full weight
    given['epoch'] = getattr(args, 'warmup_epochs', 0) + 1
    progress.args = argparse.Namespace(**{**vars(args), 'print_freq': 10 ** 9})

    def ours(batches):
        train(**{**given, 'loader': batches})

    def seconds(work, batches):
        if args.distributed:
            dist.barrier()
        begin = clock(device)
        work(batches)
        return clock(device) - begin

    def per_core(dataset):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a data worker
        begin = time.perf_counter()
        for key in keys:
            dataset[key]
        torch.set_num_threads(threads)
        return len(keys) * views / (time.perf_counter() - begin)

    views = getattr(args, 'repeated_aug', 1)
    ready, keys = next(iter(loader)), list(itertools.islice(loader.sampler, 64))
    row = {'stage': stage, 'teacher': given['teacher'] is not None, 'model': args.model, 'batch_size': args.batch_size,
           'input_size': args.input_size[0], 'num_workers': args.num_workers, 'processes': args.world_size, 'amp': args.amp,
           'compile': args.compile, 'views': views, 'device': args.hardware, 'threads': torch.get_num_threads(),
           'commit': args.commit, 'versions': args.versions, 'steps': options.steps, 'turns': options.turns}
    ours(Repeat(ready, 2))  # compiles, allocates; nothing but the script's own work so far, so its memory is the peak
    row['peak_memory_gb'] = torch.cuda.max_memory_allocated() / 1e9 if device.type == 'cuda' else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    row['gflop_per_image'] = count_flop(Step(stage, script, given, plain=False), first_two(stage, ready)) / 1e9
    row['loader_per_core'] = per_core(loader.dataset)
    batches = Endless(loader, options.steps)
    some = copy.copy(batches)  # of the same workers, each of which gives at least two batches
    some.steps = max(options.steps, 2 * args.num_workers)
    work = {'loader': (list, some), 'step': (ours, Repeat(ready, options.steps)), 'both': (ours, batches)}
    if options.plain:
        plain = Step(stage, script, given, plain=True)
        row['loss_difference'] = loss_difference(Step(stage, script, given, plain=False), plain, ready, args.seed)
        dataset = plain_dataset(stage, loader.dataset, args)
        row['plain_loader_per_core'] = per_core(dataset)
        plain_loader = torch.utils.data.DataLoader(
            dataset, batch_size=loader.batch_size, sampler=copy.copy(loader.sampler), num_workers=args.num_workers,
            pin_memory=loader.pin_memory, persistent_workers=loader.persistent_workers, collate_fn=loader.collate_fn)
        work.update(plain_step=(plain.train, Repeat(ready, options.steps)),
                    plain_both=(plain.train, Endless(plain_loader, options.steps)))
    for name in work:  # once before it counts
        seconds(*work[name])
    times, waited = {name: [] for name in work}, []
    for _ in range(options.turns):
        for name, (task, source) in work.items():
            if args.num_workers and isinstance(source, Endless):
                # what was read ahead while others were measured is no speed
                for _ in range(args.num_workers * loader.prefetch_factor):
                    next(source.batches)
                task(source)
            times[name].append(seconds(task, source))
            if name == 'both':
                waited.append(progress.waited / times[name][-1])
    slowest = torch.tensor(list(times.values()))
    if args.distributed:
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    times = dict(zip(times, slowest.tolist()))
    images = {name: args.batch_size * len(source) * args.world_size for name, (_, source) in work.items()}
    row.update({f'{name}_images_per_second': images[name] / statistics.median(values) for name, values in times.items()})
    for part in ('step', 'both') if options.plain else ():
        ratios = [slow / fast for slow, fast in zip(times[f'plain_{part}'], times[part])]
        row[f'{part}_ratio'] = [statistics.median(ratios), min(ratios), max(ratios)]
    row['data_waiting'] = statistics.median(waited)
    row['cores_to_feed'] = row['step_images_per_second'] / row['loader_per_core']
    row['peak_tflops'] = matmul_peak(device, script.AMP_DTYPES[args.amp] or torch.float32) / 1e12 * args.world_size
    row['tflops'] = row['gflop_per_image'] * row['step_images_per_second'] / 1e3
    row['share_of_peak'] = row['tflops'] / row['peak_tflops']
    return row


# ------------------------------------------------------------------------------------------------------------------ main


def give_random_teacher(stage, script, args):
    """Lets main() find a teacher of random weights where it would read a file."""
    def frozen(network, *_):
        return network.requires_grad_(False).eval()

    args.teacher_path = 'random'
    if stage == 'generic':
        models.load_teacher = frozen
    elif stage == 'cls':
        count = len(script.open_dataset(args, 'train').classes)
        network = models.create_vit(args.teacher_model, count, (args.input_size * 2)[:2])
        models.read_checkpoint = lambda path: {'model': network.state_dict()}
    elif stage == 'det':
        script.load_detector = lambda name, path, classes, args: frozen(script.Detector(name, len(classes), args))
    else:
        script.load_segmenter = lambda name, path, classes, args: frozen(
            script.Segmenter(name, len(classes), args.input_size[0]))


def report(row):
    """The result in a few lines."""
    def rate(name):
        return f'{row[f"{name}_images_per_second"]:.4g} images/s'

    print(f'{row["stage"]}, {row["model"]}, batch {row["batch_size"]} x {row["processes"]}, {row["input_size"]} px, '
          f'{row["num_workers"]} workers, amp {row["amp"]}{", compiled" if row["compile"] else ""}, {row["device"]}')
    print(f'loader {rate("loader")} ({row["loader_per_core"]:.4g} a core), step {rate("step")}, both {rate("both")}, '
          f'{row["data_waiting"]:.0%} of it waiting for data; {row["cores_to_feed"]:.2g} cores feed the step')
    print(f'{row["gflop_per_image"]:.4g} GFLOP an image, {row["tflops"]:.4g} TFLOP/s, {row["share_of_peak"]:.0%} of the '
          f'{row["peak_tflops"]:.4g} of a matrix product; peak memory {row["peak_memory_gb"]:.3g} GB')
    if 'step_ratio' in row:
        print(f'the plain way: loader {row["plain_loader_per_core"]:.4g} a core, step {rate("plain_step")}, both '
              f'{rate("plain_both")}; losses differ by {row["loss_difference"]:.1e}')
        for part in ('step', 'both'):
            median, low, high = row[f'{part}_ratio']
            print(f'{part}: {median:.3f} times as fast as the plain way ({low:.3f} to {high:.3f} in {row["turns"]} turns)')


def print_table(path):
    """The file's results as a table in Markdown."""
    names = ('stage', 'batch_size', 'input_size', 'num_workers', 'processes', 'threads', 'amp', 'compile', 'views',
             'loader_images_per_second', 'step_images_per_second', 'both_images_per_second', 'data_waiting', 'share_of_peak',
             'peak_memory_gb')
    print('| ' + ' | '.join(name.replace('_', ' ').replace(' per second', '/s') for name in names) + ' |')
    print('|---' * len(names) + '|')
    for line in Path(path).read_text().splitlines():
        cells = [json.loads(line)[name] for name in names]
        print('| ' + ' | '.join(f'{cell:.3g}' if isinstance(cell, float) else str(cell) for cell in cells) + ' |')


def main(options, words):
    script, rows = importlib.import_module(SCRIPTS[options.stage]), []
    args = script.get_args_parser().parse_args(words)
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = f'{folder}/output'
        args.data_path = args.data_path or str(draw_data(options.stage, Path(folder)))
        if options.plain and (args.amp == 'fp16' or args.accum_iter > 1 or getattr(args, 'repeated_aug', 1) > 1):
            raise models.InputError('fp16, --repeated_aug and --accum_iter above 1 have no plain counterpart: '
                                    'add --no-plain')
        if options.teacher:
            give_random_teacher(options.stage, script, args)
        elif options.stage == 'generic':
            args.target = 'pixel'
        train, say = script.train_one_epoch, models.say

        def instead(*values):
            models.say = lambda *words: None
            rows.append(measure(options.stage, script, options,
                                {**dict(zip(inspect.signature(train).parameters, values)), 'train': train}))
            raise Done

        script.train_one_epoch = instead
        with contextlib.suppress(Done):
            script.main(args)
    models.say, script.train_one_epoch = say, train
    if args.rank == 0:
        report(rows[0])
        if options.json:
            with open(options.json, 'a') as file:
                file.write(json.dumps(rows[0]) + '\n')


if __name__ == '__main__':
    try:
        options, words = get_args_parser().parse_known_args()
        print_table(options.table) if options.table else main(options, words)
    except (models.InputError, FloatingPointError) as error:
        sys.exit(f'error: {error}')
    if dist.is_initialized():
        dist.destroy_process_group()
