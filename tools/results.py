"""The paper's tables beside our own numbers, how each run went, curves and pictures, on one page.

Reads:  FOLDER...   runs (--output_dir of a script), or folders with runs, up to three levels deep
        The Makefile's names in one FOLDER make the paper's tables, or any part of them:
        teacher_{mae,cls,det,seg}   one of each for all seeds and tables
        seed<N>/   Table 2: generic, finetuned, g2sd, deit_distilled, deit. Table 3: det_finetuned,
        det_g2sd, det_{deit, deit_distilled, deit_500, dino, ibot}. Tables 4 and 5:
        generic_X, finetuned_X, g2sd_X with X = recon, recon_gt, mask<ratio>, layer<block>.
        ADE20K: seg_finetuned, seg_g2sd
Writes: results.md (also printed), curves.png; of one FOLDER pictures, too, if its data are there
Run:    python tools/results.py runs/cifar10
        python tools/results.py my_run another_run --out comparison
"""
import argparse
import itertools
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """One method of a table: the folders of its stages, in order, inside each seed's folder."""
    method: str
    folders: tuple
    colour: str
    top1: float = None   # the paper's, ImageNet, percent; None where it gives none, here and below
    hours: float = None
    box: float = None    # AP on COCO, percent
    mask: float = None

    @property
    def is_teacher(self):  # one run for all seeds, in FOLDER itself
        return self.folders[0].startswith('teacher_')


class Table(NamedTuple):
    title: str
    ours: dict       # heading: key in log.txt, the main one first; the first two are drawn
    rows: tuple


G2SD = Row('G2SD-S', ('generic', 'g2sd'), '#c62828', 82.5, hours=71)
DEIT_DISTILLED = Row('DeiT-S with distillation', ('deit_distilled',), '#1565c0', 81.7, hours=112)
LAYER_COLOURS = {1: '#6d4c41', 2: '#ec407a', 3: '#9e9d24', 4: '#546e7a', 6: '#43a047', 8: '#8e24aa'}
TABLES = (
    Table('Table 2: ImageNet classification', {'top-1': 'test_acc1'}, (
        Row('teacher: MAE ViT-B, fine-tuned', ('teacher_mae', 'teacher_cls'), '#555555', 83.6),
        Row('DeiT-S', ('deit',), '#2e7d32', 81.4, hours=53),
        DEIT_DISTILLED,
        Row('G2SD-S w/o S.D (Tables 3, 4)', ('generic', 'finetuned'), '#ef8f00', 82.0),
        G2SD)),
    Table('Table 3: detection and instance segmentation on COCO', {
        'AP^bbox': 'test_bbox_AP', 'AP^mask': 'test_mask_AP', 'AP50^bbox': 'test_bbox_AP50',
        'AP50^mask': 'test_mask_AP50'}, (
        Row('teacher: ViTDet-B from MAE', ('teacher_det',), '#555555', box=51.6, mask=45.9),
        Row('DeiT-S 300e', ('det_deit',), '#7cb342', 79.9, box=45.7, mask=40.7),
        Row('DeiT-S with distillation 300e', ('det_deit_distilled',), '#1565c0', 81.2, box=47.2, mask=41.9),
        Row('DeiT-S 500e', ('det_deit_500',), '#2e7d32', 81.4, box=46.9, mask=41.6),
        Row('DINO-S 3200e', ('det_dino',), '#8e24aa', 82.0, box=49.1, mask=43.3),
        Row('iBOT-S 3200e', ('det_ibot',), '#00acc1', 82.3, box=49.7, mask=44.0),
        Row('G2SD-S w/o S.D', ('det_finetuned',), '#ef8f00', 82.0, box=49.9, mask=44.5),
        Row('G2SD-S', ('det_g2sd',), '#c62828', 82.5, box=50.6, mask=44.8))),
    Table('Table 4: targets of stage 1', {'top-1': 'test_acc1'}, (
        Row('features, w/o S.D', ('generic', 'finetuned'), '#ef8f00', 82.0),
        Row('features, with S.D', ('generic', 'g2sd'), '#c62828', 82.5),
        Row('reconstructions, w/o S.D', ('generic_recon', 'finetuned_recon'), '#64b5f6', 81.4),
        Row('reconstructions, with S.D', ('generic_recon', 'g2sd_recon'), '#0d47a1', 81.8),
        Row('and pixels, w/o S.D', ('generic_recon_gt', 'finetuned_recon_gt'), '#81c784', 81.5),
        Row('and pixels, with S.D', ('generic_recon_gt', 'g2sd_recon_gt'), '#1b5e20', 81.7))),
    Table('Table 5: mask ratio, and teacher\'s decoder block, w/o S.D', {'top-1': 'test_acc1'}, (
        Row('mask ratio 0.05', ('generic_mask0.05', 'finetuned_mask0.05'), '#5e35b1', 81.7),
        Row('mask ratio 0.25', ('generic_mask0.25', 'finetuned_mask0.25'), '#1e88e5', 81.7),
        Row('mask ratio 0.55', ('generic_mask0.55', 'finetuned_mask0.55'), '#00897b', 81.6),
        Row('mask ratio 0.75, middle block', ('generic', 'finetuned'), '#c62828', 82.0),
        Row('mask ratio 0.9', ('generic_mask0.9', 'finetuned_mask0.9'), '#fb8c00', 81.8),
        *(Row(f'decoder block {n}', (f'generic_layer{n}', f'finetuned_layer{n}'), colour)
          for n, colour in LAYER_COLOURS.items()))),
    Table('ADE20K: semantic segmentation', {
        'mIoU': 'test_mIoU', 'pixel accuracy': 'test_aAcc', 'mean accuracy': 'test_mAcc'}, (
        Row('teacher: UPerNet on ViT-B from MAE', ('teacher_seg',), '#555555'),
        Row('G2SD-S w/o S.D', ('seg_finetuned',), '#ef8f00'),
        Row('G2SD-S', ('seg_g2sd',), '#c62828'))),
)
PAPER = {'paper hours': 'hours', 'paper top-1': 'top1', 'paper AP^bbox': 'box', 'paper AP^mask': 'mask'}
TASKS = {'stage 1': 'mask_ratio', 'classification': 'distillation_type', 'detection': 'anchor_size',
         'segmentation': 'cwd_weight'}  # and a flag that this script alone has
COURSE = ('test_acc1', 'test_bbox_AP', 'test_mIoU', 'train_loss')  # the first one in a log is shown
STAGE1 = {'target': 'feature', 'mask_ratio': 0.75, 'target_layer': None, 'supervise': 'all'}  # others are shown
NOTE = """Ours: percent, of finished runs, after the last epoch or round, never the best; mean ± sample
standard deviation over n seeds. Time is of training without evaluation: of both stages in Tables 2,
4 and 5, elsewhere of that stage; a teacher's has its own row. The paper's values: ViT-S from ViT-B.
It has no table of ADE20K; its abstract gives G2SD-S 99.3 % of the teacher's performance there.
"""
HEALTH = """### Is a run healthy?

Top-1, box AP, mIoU or, in stage 1, the loss of each run, and the last of all values. In the paper's
setting on ImageNet the loss is about 0.02 late in stage 1, and stage 2 begins with about 56 % after
its first epoch; stuck at 0.2, then 36 %, means that the teacher's decoder was never loaded.
"""
CURVES = """Curves. Several seeds: the mean of the finished ones (of all, while none is) at places
that all have, in a band from the lowest to the highest. Dashed: a teacher's last value"""


class Run(NamedTuple):
    path: Path
    name: str     # as the page shows it
    task: str     # of TASKS
    unit: str     # what the run counts: 'epoch', or 'iteration' in detection and segmentation
    total: int    # of these units; None before the first checkpoint, if a recipe decides it
    args: dict    # args.json: the flags as given
    log: list     # of log.txt's objects, and how many units are 'done'
    last: dict    # the last value of each of their keys; a test does not follow every epoch

    @property
    def finished(self):
        return self.last['done'] == self.total

    def points(self, key):
        """[(units done, value), ...]"""
        return [(entry['done'], entry[key]) for entry in self.log if key in entry]


def read_run(folder, name=''):
    """The run in the folder, or None if there is none."""
    path = folder / 'args.json'
    args = json.loads(path.read_text()) if path.exists() else {}
    unit = 'epoch' if 'epochs' in args else 'iteration'
    if f'{unit}s' not in args:  # none, or another program's
        return None
    total = args[f'{unit}s']
    if total is None and (folder / 'checkpoint.pth').exists():  # a recipe decided it
        import torch  # takes a second, and many runs do without
        checkpoint = torch.load(folder / 'checkpoint.pth', 'cpu', weights_only=True, mmap=True)
        total = checkpoint['args'][f'{unit}s']
    first = 1 if unit == 'epoch' else 0  # epochs are numbered from 0, iterations are counted
    path, log, last = folder / 'log.txt', [], {'done': 0}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # half a line: it is being written, or the run was killed
            continue
        log.append({'done': entry[unit] + first, **entry})
        last |= log[-1]
    task = next((task for task, flag in TASKS.items() if flag in args), 'other')
    return Run(folder, name, task, unit, total, args, log, last)


def read_runs(folder, base):
    """{name: Run} of all runs in the folder; names are paths from `base`."""
    runs = {}
    for depth in range(4):
        for path in sorted(folder.glob('*/' * depth + 'args.json')):
            name = os.path.relpath(path.parent, base)
            runs[name] = read_run(path.parent, folder.resolve().name if name == '.' else name)
    return {name: run for name, run in runs.items() if run}


def read_row(runs, row):
    """The row's seeds: of each that has any the runs of its stages, None for a missing one."""
    seeds, found = {name.split('/')[0] for name in runs if re.match(r'seed\d+/', name)}, []
    for home in [''] if row.is_teacher else [f'{seed}/' for seed in sorted(seeds)]:
        stages = [runs.get(home + folder) for folder in row.folders]
        if any(stages):
            found.append(stages)
    return found


def read_tables(runs):
    """[(Table, {Row: what read_row gave})] of the tables that the runs begin, and the runs in none."""
    tables, others, seen = [], dict(runs), set()
    for table in TABLES:
        rows = {row: read_row(runs, row) for row in table.rows}
        rows = {row: seeds for row, seeds in rows.items() if seeds or row.top1 or row.box}
        students = [seeds for row, seeds in rows.items() if not row.is_teacher]
        last = {stages[-1].name for seeds in students for stages in seeds if stages[-1]}
        if last - seen:  # teachers or stage 1 alone, and rows of another table, begin no table
            tables.append((table, rows))
            for stages in itertools.chain(*rows.values()):
                others = {name: run for name, run in others.items() if run not in stages}
        seen |= last
    return tables, list(others.values())


def spread(values):
    """'81.73 ± 0.21 (n = 3)', with the sample's standard deviation; '' without a value."""
    if not values:
        return ''
    deviation = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.2f}{deviation} (n = {len(values)})'


def describe(run):
    """What a run did, as in the paper's Table 2: 'generic 300', 'supervised + distillation 500'."""
    args, flags = run.args, ''
    if args.get('target') == 'pixel':
        what = 'MAE'
    elif 'target' in args:
        what = 'generic'
        for flag, value in STAGE1.items():
            flags += f', {flag} {args[flag]}' if args.get(flag, value) != value else ''
    elif args['finetune']:
        what = 'specific' if args['teacher_path'] else 'fine-tuning'
    else:
        what = 'supervised + distillation' if args['teacher_path'] else 'supervised'
    return f'{what} {run.total or "?"}{flags}'


def write_table(headings, lines):
    """Markdown; lines: lists of cells. Columns without any value are left out."""
    columns = [column for column in zip(headings, *lines) if any(column[1:])]
    lines = [f'| {" | ".join(line)} |' for line in zip(*columns)]
    return '\n'.join([lines[0], '|---' * len(columns) + '|', *lines[1:]]) + '\n'


def write_results(table, rows):
    """A table of the paper with our numbers; rows: {Row: what read_row gave}."""
    ended, times = {}, {}
    for row, seeds in rows.items():
        ended[row] = [stages for stages in seeds if stages[-1] and all(run.finished for run in stages if run)]
        complete = [stages for stages in ended[row] if all(stages)]  # stage 1 may have been given
        times[row] = [sum(run.last['train_seconds'] for run in stages) for stages in complete]
    longest = max(map(max, filter(None, times.values())), default=0)
    unit, size = ('hours', 3600) if longest >= 3600 else ('minutes', 60)
    lines, teacher = [], None
    for row, seeds in rows.items():
        kinds, part = ['', ''], ''
        for place, stage in enumerate(zip(*seeds)):
            kinds[place] = ' / '.join(sorted({describe(run) for run in stage if run}))
        ours = [[stages[-1].last[key] for stages in ended[row]] for key in table.ours.values()]
        if row.is_teacher:
            teacher = ours[0]
        elif teacher and ours[0]:
            part = f'{100 * statistics.mean(ours[0]) / teacher[0]:.1f} %'
        paper = [getattr(row, name) for name in PAPER.values()]
        lines.append([row.method, *kinds, spread([seconds / size for seconds in times[row]]),
                      *map(spread, ours), part, *(str(value or '') for value in paper)])
    headings = ['method', '1st stage', '2nd stage', f'time, {unit}', *table.ours,
                'part of the teacher', *PAPER]
    text = f'### {table.title}\n\n{write_table(headings, lines)}'
    if times.get(G2SD) and times.get(DEIT_DISTILLED):
        ours, theirs = statistics.mean(times[G2SD]), statistics.mean(times[DEIT_DISTILLED])
        text += (f'\nTime of G2SD-S / DeiT-S with distillation: {ours / theirs:.2f}; in the paper '
                 f'{G2SD.hours / DEIT_DISTILLED.hours:.2f} ({G2SD.hours} / {DEIT_DISTILLED.hours} '
                 'hours). They compare only if each of our runs had the machine to itself.\n')
    return text


def score_keys(runs):
    """The keys of all numbers that the runs' tests gave."""
    keys = [key for run in runs for key, value in run.last.items() if isinstance(value, (int, float))]
    return [key for key in dict.fromkeys(keys) if key.startswith('test_') and key != 'test_images']


def write_runs(task, runs):
    """A row for each run of a task: how it went, its last numbers, and what they rest on."""
    keys, lines = ['train_loss', *score_keys(runs)], []
    for run in runs:
        course, points = [], next(filter(None, map(run.points, COURSE)), [])
        for share in (0, 0.25, 0.5):
            values = [value for done, value in points if run.total and done >= share * run.total]
            course.append(f'{values[0]:.4g}' if values else '')
        numbers = [f'{run.last[key]:.4g}' if key in run.last else '' for key in keys]
        time = str(timedelta(seconds=round(run.last['train_seconds']))) if run.log else ''
        size = 'x'.join(map(str, run.args['input_size']))
        lines.append([run.name, describe(run), f'{run.unit} {run.last["done"]}/{run.total or "?"}',
                      *course, *numbers, str(run.last.get('test_images', '')), time,
                      f'{run.args["model"]} at {size}', run.args.get('commit', ''),
                      run.args.get('hardware', '')])
    return write_table([task, 'kind', 'state', 'first', 'at a quarter', 'at half', *keys,
                        'test images', 'time', 'network', 'commit', 'processes'], lines)


def curves_of(rows, key, stage=-1):
    """{Row: [points of each seed]} of a value in the logs, against all training of the student."""
    curves = {}
    for row, seeds in rows.items():
        ended, running = [], []
        for stages in seeds:
            run, before = stages[stage], sum(run.total or 0 for run in stages[:stage] if run)
            points = [(before + x, y) for x, y in run.points(key)] if run else []
            if points:
                (ended if run.finished else running).append(points)
        if ended or running:
            curves[row] = ended or running
    return curves


def panels_of_table(table, rows):
    """Two scores, or one and the loss of stage 1: [(title, label of the x axis, curves), ...]."""
    name = table.title.split(':')[0]
    xlabel = 'epochs, all stages' if 'top-1' in table.ours else 'iterations'
    panels = [(f'{name}: {heading}, percent', xlabel, curves_of(rows, key))
              for heading, key in table.ours.items()]
    # rows that share a first stage show it once; the teacher's is another network's
    first = {row.folders[0]: row for row in rows if row.folders[1:] and not row.is_teacher}
    losses = curves_of({row: rows[row] for row in first.values()}, 'train_loss', stage=0)
    return [*panels, ('Generic stage: training loss', 'epochs', losses)][:2]


def panels_of_runs(runs):
    """The loss and the scores of at most ten runs of a task, in matplotlib's colours."""
    rows = {Row(run.name, ('',), f'C{number}'): [[run]] for number, run in enumerate(runs)}
    return [(f'{runs[0].task}: {key}', f'{runs[0].unit}s', curves_of(rows, key))
            for key in ('train_loss', *score_keys(runs))]


def draw_curve(axes, row, seeds):
    """A line through the seeds' means, and a band from the lowest to the highest."""
    look = {'color': row.colour, 'label': row.method, 'linewidth': 2}
    if row.is_teacher:  # its training is another one: its last value alone can be compared
        axes.axhline(seeds[0][-1][1], linestyle='--', **look)
        return
    seeds = [dict(points) for points in seeds]
    places = sorted(set.intersection(*map(set, seeds)))
    values = [[seed[x] for seed in seeds] for x in places]
    marker = 'o' if len(places) < 10 else ''
    axes.plot(places, list(map(statistics.mean, values)), marker=marker, **look)
    if len(seeds) > 1:
        axes.fill_between(places, list(map(min, values)), list(map(max, values)), color=row.colour,
                          alpha=0.2, linewidth=0)


def draw_curves(strips, path):
    """Picture of strips of two panels side by side, each with its legend below."""
    import matplotlib  # takes a second, and --finished does without
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    heights = [3.8 + 0.3 * math.ceil(len(panels[0][-1]) / 2) for panels in strips]  # inches
    with matplotlib.rc_context({'font.size': 13}):
        figure = Figure((12, sum(heights)), dpi=100, layout='constrained')
        parts = figure.subfigures(len(strips), height_ratios=heights, squeeze=False)[:, 0]
        for panels, part in zip(strips, parts):
            legend = {}
            for place, (title, xlabel, curves) in enumerate(panels, 1):
                axes = part.add_subplot(1, 2, place)
                for row, seeds in curves.items():
                    draw_curve(axes, row, seeds)
                lines, labels = axes.get_legend_handles_labels()
                legend |= dict(zip(labels, lines))
                axes.set(title=title, xlabel=xlabel)
                axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
                axes.grid(alpha=0.4)
            part.legend(legend.values(), legend, loc='outside lower center', ncols=2)
        figure.savefig(path)



PICTURES = {  # file: caption, the run's folder, images and annotations below its --data_path, command
    'stage1.png': ('Stage 1: input, mask, the teacher\'s reconstruction, cosine', 'generic', 'val', None,
                   'visualize.py'),
    'detection.png': ('Detection beside the ground truth, scores from 0.3', 'det_g2sd', 'val2017',
                      'annotations/instances_val2017.json', 'predict.py', '--score', '0.3'),
    'segmentation.png': ('Segmentation beside the ground truth', 'seg_g2sd', 'images/validation',
                         'annotations/validation', 'predict.py'),
}


def draw_picture(runs, file, out):
    """Lets a tool draw what the first finished network makes of three images, if they are there."""
    _, folder, images, annotations, tool, *flags = PICTURES[file]
    runs = [run for run in runs if run.path.name == folder and run.finished]
    data = runs[0].args.get('data_path') if runs else None
    paths = sorted(Path(data, images).rglob('*.*')) if data else []
    if len(paths) >= 3:
        flags += ['--annotations', Path(data, annotations)] if annotations else []
        flags += ['--checkpoint', runs[0].path / 'checkpoint.pth', '--out', out / file]
        paths = random.Random(0).sample(paths, 3)
        subprocess.run([sys.executable, Path(__file__).with_name(tool), *flags, '--images', *paths],
                       stdout=subprocess.DEVNULL)


def get_args_parser():
    parser = argparse.ArgumentParser(
        description='logs of runs -> results.md, curves.png and pictures', allow_abbrev=False)
    parser.add_argument('folder', type=Path, nargs='+', help='a run, or a folder with runs')
    parser.add_argument('--out', type=Path,
                        help='folder to write to; by default FOLDER, of several the current folder')
    parser.add_argument('--finished', action='store_true',
                        help='write nothing; end in an error unless the folder is a finished run')
    return parser


def main(args):
    if args.finished:
        for folder in args.folder:
            run = read_run(folder)
            if not run or not run.finished:
                raise SystemExit(f'{folder} was interrupted: start make again, it goes on')
        return
    base = args.folder[0] if len(args.folder) == 1 else Path()
    out = args.out or base
    runs = {}
    for folder in args.folder:
        found = read_runs(folder, base)
        if not found:
            raise SystemExit(f'{folder} holds no run: give a folder with args.json and log.txt, or '
                             'one with such folders')
        runs |= found
    tables, others = read_tables(runs)
    parts = [write_results(*table) for table in tables]
    parts += [NOTE] * bool(tables) + [HEALTH]
    strips = [panels_of_table(*table) for table in tables]
    for task in dict.fromkeys(run.task for run in runs.values()):
        parts.append(write_runs(task, [run for run in runs.values() if run.task == task]))
        shown = [run for run in others if run.task == task]
        for first in range(0, len(shown), 10):  # there are ten colours
            panels = panels_of_runs(shown[first:first + 10])
            strips += [panels[k:k + 2] for k in range(0, len(panels), 2)]
    out.mkdir(parents=True, exist_ok=True)
    draw_curves(strips, out / 'curves.png')
    parts.append(f'### Pictures\n\n{CURVES}:\n\n![Curves](curves.png)\n')
    for file, (caption, *_) in PICTURES.items() if len(args.folder) == 1 else ():
        draw_picture(runs.values(), file, out)
        if (out / file).exists():
            parts.append(f'{caption}:\n\n![{caption}]({file})\n')
    text = '\n'.join(parts)
    print(text, end='')
    (out / 'results.md').write_text(text, encoding='utf-8')


if __name__ == '__main__':
    main(get_args_parser().parse_args())
