"""How fast a stage trains on this machine: images/s of loader, step and both, FLOP/s, memory.

The stage's own train_one_epoch is timed on a batch that lies ready (step) and on the real loader
(both). Without --teacher_path the teacher has random weights; without --data_path images are drawn,
and the loader's rate means little. Flags that --help does not list are the stage's own.
Run:  python tools/benchmark.py --stage cls --data_path IMAGENET --num_workers 16 --compile
      python tools/benchmark.py --stage det --input_size 512 --batch_size 2 --steps 1 --json b.json
      torchrun --nproc_per_node=8 tools/benchmark.py
      python tools/benchmark.py --table b.json
"""
import argparse
import contextlib
import importlib
import inspect
import itertools
import json
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import models
import toy_data

SCRIPTS = {'generic': 'generic_distill', 'cls': 'specific_distill_cls',
           'det': 'specific_distill_det', 'seg': 'specific_distill_seg'}


def draw_data(stage, args, folder):
    """Draws images in place of ImageNet, COCO or ADE20K, and sets --data_path."""
    kind = {'det': 'coco', 'seg': 'ade'}.get(stage, 'imagenet')
    update = args.batch_size * args.accum_iter * int(os.environ.get('WORLD_SIZE', 1))
    words = (f'--out {folder} --only {kind} --size 256 --train {max(12, update)} --val 12 '
             '--scene_size 448 --scenes 16 --val_scenes 3')
    toy_data.main(toy_data.get_args_parser().parse_args(words.split()))
    args.data_path = f'{folder}/{kind}'
    if stage == 'seg':
        args.nb_classes = args.nb_classes or 150  # ADE20K's: they make the logits large


def give_random_teacher(stage, script, args, folder):
    """Makes --teacher_path a file of names alone; what is built for it keeps its random weights."""
    names = ('decoder_embed.weight', 'head.weight', 'rpn.head.cls_logits.weight',
             'decode_head.conv_seg.weight')  # by which the stages know their teachers
    classes = len(script.open_dataset(args, 'train').classes) if stage == 'cls' else 1
    args.teacher_path = f'{folder}/random.pth'
    if (args.teacher_model or '').startswith('timm/'):
        network = timm.create_model(args.teacher_model[5:], num_classes=classes)
        torch.save(network.state_dict(), args.teacher_path)
        return
    torch.save({'model': {name: torch.zeros(classes, 1) for name in names}}, args.teacher_path)
    args.teacher_model = args.teacher_model or ('mae_' * (stage == 'generic') + 'vit_base_patch16')
    models.load_strictly = lambda model, state_dict, path: None


class NextBatches:
    """The next `steps` batches of an iterator, as a loader."""

    def __init__(self, iterator, steps):
        self.iterator, self.steps = iterator, steps

    def __len__(self):
        return self.steps

    def __iter__(self):
        return itertools.islice(self.iterator, self.steps)


def seconds(device, work, *inputs):
    """Time of work(*inputs) until the device has done it."""
    start = time.perf_counter()
    work(*inputs)
    if device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(train, given, dtype, options):
    """given: the arguments of train_one_epoch by name. Returns numbers of all processes."""
    loader, device, args, row = given['loader'], given['device'], given['args'], {}
    steps, warmup = options.steps * args.accum_iter, options.warmup * args.accum_iter
    batch = next(iter(loader))

    def run(batches):
        train(**{**given, 'loader': batches})

    def rate(work, first, timed):
        seconds(device, work, first)
        return len(timed) * args.batch_size * args.world_size / seconds(device, work, timed)

    row['step'] = rate(run, [batch] * warmup, [batch] * steps)
    row['memory_gb'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    if device.type == 'cuda':
        row['memory_gb'] = torch.cuda.max_memory_allocated() / 2 ** 30
    batches = itertools.chain.from_iterable(itertools.repeat(loader))  # pass after pass
    ahead = max(1, 2 * args.num_workers)  # batches that workers read in advance: no speed
    row['loader'] = rate(list, NextBatches(batches, ahead), NextBatches(batches, max(steps, ahead)))
    row['both'] = rate(run, NextBatches(batches, warmup), NextBatches(batches, steps))
    # attention as the products that it is needs memory: two images
    two_images = loader.collate_fn([loader.dataset[0, index] for index in (0, 1)])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), \
            torch.compiler.set_stance('force_eager'):
        run([two_images] * args.accum_iter)
    row['gflop_per_image'] = counter.get_total_flops() / (2 * args.accum_iter) / 1e9
    row['tflops'] = row['gflop_per_image'] * row['step'] / 1e3
    side = 8192 if device.type == 'cuda' else 2048
    matrix = torch.randn(side, side, device=device).to(dtype)
    best = min(seconds(device, torch.mm, matrix, matrix) for _ in range(5))
    row['peak_tflops'] = 2 * side ** 3 / best * args.world_size / 1e12
    row['share_of_peak'] = row['tflops'] / row['peak_tflops']
    return row


class Measured(Exception):
    """Ends the stage's main() in its first epoch."""


def get_args_parser():
    parser = argparse.ArgumentParser(
        description='images/s, FLOP/s and memory of a stage', allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--stage', choices=SCRIPTS, default='generic', help='the script to measure')
    parser.add_argument('--steps', type=int, default=20, help='updates that are timed')
    parser.add_argument('--warmup', type=int, default=3, help='updates before them')
    parser.add_argument('--json', help='file to which the result is appended as a line')
    parser.add_argument('--table', help='such a file: prints it as a table, and measures nothing')
    return parser


def print_table(path):
    """Markdown, a row per line of --json."""
    print('| stage | batch | pixels | amp | compiled | images/s: step | with loader | loader | '
          'TFLOP/s | of a matrix product | memory, GB |\n' + '|---' * 11 + '|')
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    for row in rows:
        print('| {stage} | {batch_size} | {input_size} | {amp} | {compile} | {step:.0f} | {both:.0f} | '
              '{loader:.0f} | {tflops:.3g} | {share_of_peak:.0%} | {memory_gb:.1f} |'.format(**row))
    print('\n{hardware}, {versions}, commit {commit}, {num_workers} workers'.format(**rows[-1]))


def main(options, words):
    if options.table:
        print_table(options.table)
        return
    script, row = importlib.import_module(SCRIPTS[options.stage]), {'stage': options.stage}
    train, sys.argv[1:] = script.train_one_epoch, words
    args = script.parse_args(script.get_args_parser())

    def measure_instead(*values):
        given = inspect.signature(train).bind(*values).arguments
        args.print_freq = 10 ** 9
        row.update(measure(train, given, script.AMP_DTYPES[args.amp] or torch.float32, options))
        raise Measured

    script.train_one_epoch = measure_instead
    script.request_stop = signal.default_int_handler  # a signal ends the benchmark at once
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, 'w') as silence:
        args.output_dir = f'{folder}/output'
        with contextlib.redirect_stdout(silence), contextlib.suppress(Measured):
            if not args.data_path:
                draw_data(options.stage, args, f'{folder}/data')
            if not args.teacher_path:
                give_random_teacher(options.stage, script, args, folder)
            script.main(args)
        if args.rank:
            return
        origin = json.loads(Path(args.output_dir, 'args.json').read_text())
    row |= {**origin, **vars(args)}
    print('{stage}: {model}, teacher {teacher_model}, {input_size} pixels, batch {batch_size}, '
          'amp {amp}, {num_workers} workers, {hardware}'.format(**row))
    for name in ('loader', 'step', 'both'):
        print(f'{name:6} {row[name]:9.1f} images/s')
    print('FLOP   {gflop_per_image:9.2f} G per image; the step does {tflops:.3g} T/s, '
          '{share_of_peak:.0%} of the {peak_tflops:.3g} of a matrix product'.format(**row))
    print(f'memory {row["memory_gb"]:9.1f} GB')
    if options.json:
        with open(options.json, 'a') as file:
            print(json.dumps(row), file=file)


if __name__ == '__main__':
    main(*get_args_parser().parse_known_args())
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
