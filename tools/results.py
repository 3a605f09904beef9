"""The paper's tables beside our own numbers, how each run went, curves and pictures, on one page.

Reads:  FOLDER/teacher_{mae,cls,det,seg}   one of each for all seeds and tables
        FOLDER/seed<N>/   Table 2: generic, finetuned, g2sd, deit_distilled, deit. Table 3:
        det_finetuned, det_g2sd, det_{deit, deit_distilled, deit_500, dino, ibot, scratch}. Tables 4
        and 5: generic_X, finetuned_X, g2sd_X with X = recon, recon_gt, mask<ratio>, layer<block>.
        ADE20K: seg_finetuned, seg_g2sd. Each is the --output_dir of a script; any may be missing
Writes: FOLDER/results.md (also printed), curves.png; and pictures, if the networks' data are there
Run:    python tools/results.py runs/cifar10
A number counts when its run is finished, and it is the last epoch's (or round's), never the best:
so do the paper's tables.
"""
import argparse
import json
import math
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont


class Row(NamedTuple):
    """One method of a table: the folders of its stages, in order, inside each seed's folder."""
    method: str          # what is in parentheses stays out of the picture
    folders: tuple
    colour: str
    top1: float = None   # the paper's, ImageNet, percent; None where it gives none, here and below
    hours: float = None
    box: float = None    # AP on COCO, percent
    mask: float = None
    trained_with: tuple = ()   # (flag, value) of stage 1, so that no folder is taken for another

    @property
    def is_teacher(self):
        """One run for all seeds, in FOLDER itself."""
        return self.folders[0].startswith('teacher_')


class Table(NamedTuple):
    title: str
    ours: dict       # heading: key in log.txt, the main one first; the first two are drawn as curves
    rows: tuple


def variant(method, name, stage, colour, top1, **trained_with):
    """A row of Table 4 or 5: stage 1 with other flags."""
    trained_with = {'target': 'feature', **trained_with}
    return Row(method, (f'generic{name}', f'{stage}{name}'), colour, top1,
               trained_with=tuple(trained_with.items()))


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
        Row('random weights (not in the paper)', ('det_scratch',), '#795548'),
        Row('G2SD-S w/o S.D', ('det_finetuned',), '#ef8f00', 82.0, box=49.9, mask=44.5),
        Row('G2SD-S', ('det_g2sd',), '#c62828', 82.5, box=50.6, mask=44.8))),
    Table('Table 4: targets of stage 1', {'top-1': 'test_acc1'}, (
        variant('features, w/o S.D', '', 'finetuned', '#ef8f00', 82.0),
        variant('features, with S.D', '', 'g2sd', '#c62828', 82.5),
        variant('reconstructions, w/o S.D', '_recon', 'finetuned', '#64b5f6', 81.4, target='recon'),
        variant('reconstructions, with S.D', '_recon', 'g2sd', '#0d47a1', 81.8, target='recon'),
        variant('and pixels, w/o S.D', '_recon_gt', 'finetuned', '#81c784', 81.5, target='recon_gt'),
        variant('and pixels, with S.D', '_recon_gt', 'g2sd', '#1b5e20', 81.7, target='recon_gt'))),
    Table('Table 5: mask ratio, and block of the teacher\'s decoder, w/o S.D', {'top-1': 'test_acc1'}, (
        variant('mask ratio 0.05', '_mask0.05', 'finetuned', '#5e35b1', 81.7, mask_ratio=0.05),
        variant('mask ratio 0.25', '_mask0.25', 'finetuned', '#1e88e5', 81.7, mask_ratio=0.25),
        variant('mask ratio 0.55', '_mask0.55', 'finetuned', '#00897b', 81.6, mask_ratio=0.55),
        variant('mask ratio 0.75, middle block', '', 'finetuned', '#c62828', 82.0, mask_ratio=0.75),
        variant('mask ratio 0.9', '_mask0.9', 'finetuned', '#fb8c00', 81.8, mask_ratio=0.9),
        *(variant(f'decoder block {n}', f'_layer{n}', 'finetuned', colour, None, target_layer=n)
          for n, colour in LAYER_COLOURS.items()))),
    Table('ADE20K: semantic segmentation', {
        'mIoU': 'test_mIoU', 'pixel accuracy': 'test_aAcc', 'mean accuracy': 'test_mAcc'}, (
        Row('teacher: UPerNet on ViT-B from MAE', ('teacher_seg',), '#555555'),
        Row('G2SD-S w/o S.D', ('seg_finetuned',), '#ef8f00'),
        Row('G2SD-S', ('seg_g2sd',), '#c62828'))),
)
PAPER = {'paper hours': 'hours', 'paper top-1': 'top1', 'paper AP^bbox': 'box', 'paper AP^mask': 'mask'}
NOTE = """Ours: percent, of finished runs, after the last epoch or round, never the best; mean ± sample
standard deviation over n seeds. Time is that of training without evaluation: of both stages in Tables
2, 4 and 5, elsewhere of that stage alone; a teacher's has a row of its own. The paper's values: ViT-S
(teacher ViT-B). It has no table of ADE20K; its abstract gives G2SD-S 99.3 % of the teacher's
performance there.
"""
NOTE_RUNS = """All seeds, finished or not, and their loss (stage 1), top-1, box AP or mIoU in the course
of training. In the paper's setting on ImageNet the loss is about 0.02 late in stage 1, and stage 2
begins with about 56 % after its first epoch; stuck at 0.2, then 36 %, means that the teacher's decoder
was never loaded.
"""

# ---- reading -------------------------------------------------------------------------------------


class Run(NamedTuple):
    name: str     # folder of the run, relative to FOLDER
    unit: str     # what the run counts: 'epoch', or 'iteration' in detection and segmentation
    total: int    # of these units; None before the first checkpoint, if a recipe decides it
    args: dict    # args.json: the flags as given
    log: list     # of log.txt's objects

    def points(self, key):
        """[(units done, value)]: epochs are numbered from 0, iterations are counted."""
        first = 1 if self.unit == 'epoch' else 0
        return [(entry[self.unit] + first, entry[key]) for entry in self.log if key in entry]

    @property
    def done(self):
        return self.points(self.unit)[-1][0] if self.log else 0

    @property
    def finished(self):
        return self.done == self.total


def read_run(root, name):
    """The run in root/name, or None if there is none."""
    folder = root / name
    if not (folder / 'args.json').exists():
        return None
    args = json.loads((folder / 'args.json').read_text())
    unit = 'epoch' if 'epochs' in args else 'iteration'
    total = args[f'{unit}s']
    if total is None and (folder / 'checkpoint.pth').exists():  # a recipe decided it
        import torch  # takes a second, and many runs do without
        checkpoint = torch.load(folder / 'checkpoint.pth', 'cpu', weights_only=True, mmap=True)
        total = checkpoint['args'][f'{unit}s']
    lines = (folder / 'log.txt').read_text().splitlines() if (folder / 'log.txt').exists() else []
    # a run of older scripts that was killed may end in part of a line
    log = [json.loads(line) for line in lines if line.endswith('}')]
    return Run(name, unit, total, args, log)


def read_row(root, row):
    """The row's runs, a list of its stages for each seed that has any; None for a missing stage."""
    seeds = sorted(int(path.name[4:]) for path in root.glob('seed*') if path.name[4:].isdigit())
    homes = [''] if row.is_teacher else [f'seed{seed}/' for seed in seeds]
    found = []
    for home in homes:
        stages = [read_run(root, home + folder) for folder in row.folders]
        if any(stages):
            found.append(stages)
    return found


def check_rows(rows):
    """Ends if a stage 1 was trained with other flags than its folder stands for."""
    for row, seeds in rows.items():
        for run in (stages[0] for stages in seeds if stages[0]):
            for flag, value in row.trained_with:
                used = run.args.get(flag, value)
                if used != value:
                    raise SystemExit(f'{run.name} was trained with {flag} {used}, but stands for {value}: '
                                     'rename or remove it')


# ---- tables: `seeds` is what read_row gave, `rows` is {Row: seeds} -------------------------------


def finished(seeds):
    """Seeds whose last stage is there, and of which no stage is unfinished."""
    return [stages for stages in seeds if stages[-1] and all(run.finished for run in stages if run)]


def last_values(seeds, key):
    """A value of the last epoch or round, one per finished seed."""
    return [stages[-1].log[-1][key] for stages in finished(seeds)]


def training_seconds(seeds):
    """A tuple of the stages' seconds for each finished seed that has all stages."""
    complete = [stages for stages in finished(seeds) if all(stages)]
    return [tuple(run.log[-1]['train_seconds'] for run in stages) for stages in complete]


def spread(values):
    """'81.73 ± 0.21 (n = 3)', with the sample's standard deviation; '' without a value."""
    if not values:
        return ''
    deviation = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.2f}{deviation} (n = {len(values)})'


def describe(run):
    """What a run did, as in the paper's Table 2: 'generic 300', 'supervised + distillation 500'."""
    if 'target' in run.args:
        names = {'feature': 'generic', 'pixel': 'MAE'}
        what = names.get(run.args['target'], f'generic ({run.args["target"]})')
    elif run.args['finetune']:
        what = 'specific' if run.args['teacher_path'] else 'fine-tuning'
    else:
        what = 'supervised + distillation' if run.args['teacher_path'] else 'supervised'
    return f'{what} {run.total}'


def write_table(title, headings, lines, kept):
    """Markdown; lines: lists of cells. Columns without any value are left out, but for those kept."""
    columns = [column for column in zip(headings, *lines) if column[0] in kept or any(column[1:])]
    lines = [f'| {" | ".join(line)} |' for line in zip(*columns)]
    return '\n'.join([f'### {title}', '', lines[0], '|---' * len(columns) + '|', *lines[1:]]) + '\n'


def write_results(table, rows):
    """A table of the paper with our numbers."""
    times = {row: training_seconds(seeds) for row, seeds in rows.items()}
    longest = max((sum(stages) for seeds in times.values() for stages in seeds), default=0)
    unit, size = 'seconds', 1
    if longest >= 60:
        unit, size = ('hours', 3600) if longest >= 3600 else ('minutes', 60)
    headings = ['method', '1st stage', '2nd stage', f'1st stage, {unit}', f'2nd stage, {unit}',
                f'time, {unit}', *table.ours, 'part of the teacher', *PAPER]
    lines, teacher = [], []
    for row, seeds in rows.items():
        kinds, stage_times = ['', ''], ['', '']
        for place, stage in enumerate(zip(*seeds)):
            kinds[place] = ' / '.join(sorted({describe(run) for run in stage if run}))
        if len(row.folders) > 1:
            for place, stage in enumerate(zip(*times[row])):
                stage_times[place] = spread([seconds / size for seconds in stage])
        time = spread([sum(stages) / size for stages in times[row]])
        ours = [last_values(seeds, key) for key in table.ours.values()]
        if row.is_teacher:
            teacher = ours[0]
        part = ''
        if ours[0] and teacher:
            part = f'{100 * statistics.mean(ours[0]) / teacher[0]:.1f} %'
        values = (getattr(row, name) for name in PAPER.values())
        paper = ['' if value is None else str(value) for value in values]
        lines.append([row.method, *kinds, *stage_times, time, *map(spread, ours), part, *paper])
    text = write_table(table.title, headings, lines, kept=table.ours)
    if times.get(G2SD) and times.get(DEIT_DISTILLED):
        ours, theirs = (statistics.mean(map(sum, times[row])) for row in (G2SD, DEIT_DISTILLED))
        text += (f'\nTime of G2SD-S / DeiT-S with distillation: {ours / theirs:.2f}; in the paper '
                 f'{G2SD.hours / DEIT_DISTILLED.hours:.2f} ({G2SD.hours} / {DEIT_DISTILLED.hours})\n')
    return text


def write_runs(runs):
    """How each run went, and what its numbers rest on."""
    headings = ['log.txt of', 'state', 'first', 'at a quarter', 'at half', 'last', 'test images',
                'network', 'commit', 'processes']
    lines = []
    for run in runs:
        places = [''] * 4
        keys = ('test_acc1', 'test_bbox_AP', 'test_mIoU', 'train_loss')
        points = next(filter(None, map(run.points, keys)), [])
        for done, value in points if run.total else ():
            for place, start in enumerate((0, run.total / 4, run.total / 2, run.total)):
                if done >= start and not places[place]:
                    places[place] = f'{value:.4g}'
        images = str(run.log[-1].get('test_images', '')) if run.log else ''
        size = 'x'.join(map(str, run.args['input_size']))
        lines.append([run.name, f'{run.unit} {run.done}/{run.total or "?"}', *places, images,
                      f'{run.args["model"]} at {size}', run.args.get('commit', ''),
                      run.args.get('hardware', '')])
    return write_table('Is a run healthy?', headings, lines, kept=headings) + '\n' + NOTE_RUNS


# ---- curves --------------------------------------------------------------------------------------


class Curve(NamedTuple):
    points: list     # of (x, y)
    colour: str
    dashed: bool


def round_steps(low, high, least=0.0, count=6):
    """About `count` round numbers, `least` or more apart; the first is <= low, the last >= high."""
    high = high if high > low else low + (abs(low) or 1) * 0.1
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    factors = (factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    step = max(least, power * next(factors))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * k for k in range(first, last + 1)]


def draw_panel(draw, box, title, xlabel, curves, font):
    """Axes with ticks, and the curves, inside box (left, top, right, bottom), pixels; x starts at 0."""
    left, top, right, bottom = box
    left, top, bottom = left + 4 * font.size, top + 3 * font.size, bottom - 4 * font.size
    draw.text((left, top - 2 * font.size), title, 'black', font)
    draw.rectangle((left, top, right, bottom), outline='#888888', width=2)
    points = [point for curve in curves for point in curve.points]
    if not points:
        return
    xs = round_steps(0, max(x for x, _ in points), least=1)
    ys = round_steps(min(y for _, y in points), max(y for _, y in points))

    def place(x, y):
        return (left + (right - left) * (x - xs[0]) / (xs[-1] - xs[0]),
                bottom - (bottom - top) * (y - ys[0]) / (ys[-1] - ys[0]))

    for x in xs:
        draw.line([place(x, ys[0]), place(x, ys[-1])], '#dddddd', 2)
        draw.text((place(x, 0)[0], bottom + font.size / 2), f'{x:g}', 'black', font, anchor='ma')
    for y in ys:
        draw.line([place(xs[0], y), place(xs[-1], y)], '#dddddd', 2)
        draw.text((left - font.size / 2, place(0, y)[1]), f'{y:.6g}', 'black', font, anchor='rm')
    draw.text(((left + right) / 2, bottom + 2 * font.size), xlabel, 'black', font, anchor='ma')
    for curve in curves:
        pixels = [place(*point) for point in curve.points]
        if curve.dashed:
            y = pixels[-1][1]
            for x in range(int(left), int(right), font.size):
                draw.line([(x, y), (min(x + font.size / 2, right), y)], curve.colour, 4)
            continue
        draw.line(pixels, curve.colour, 5, joint='curve')
        for x, y in pixels if len(pixels) < 10 else pixels[-1:]:
            draw.ellipse((x - 7, y - 7, x + 7, y + 7), curve.colour)


def curves_of(rows, key, stage=-1):
    """{Row: [Curve of a seed, ...]} of a value in the log, against all training of the student."""
    curves = {}
    for row, seeds in rows.items():
        for stages in seeds:
            points = stages[stage].points(key) if stages[stage] else []
            before = sum(run.total or 0 for run in stages[:stage] if run)
            points = [(before + x, y) for x, y in points]
            if row.is_teacher:  # its training is another one: the last level alone can be compared
                points = [(0, y) for _, y in points[-1:]]
            if points:
                curves.setdefault(row, []).append(Curve(points, row.colour, row.is_teacher))
    return curves


def draw_curves(tables):
    """Picture: for each table two panels side by side, and a legend. tables: [(Table, rows)]."""
    strips = []  # of two panels: (title, label of the x axis, curves)
    for table, rows in tables:
        name = table.title.split(':')[0]
        xlabel = 'epochs, all stages' if 'top-1' in table.ours else 'iterations'
        panels = [(f'{name}: {heading}, percent', xlabel, curves_of(rows, key))
                  for heading, key in table.ours.items()]
        # rows that share a first stage show it once; the teacher's is another network's
        first = {row.folders[0]: row for row in rows if row.folders[1:] and not row.is_teacher}
        losses = curves_of({row: rows[row] for row in first.values()}, 'train_loss', stage=0)
        strips.append([*panels, ('Generic stage: training loss', 'epochs', losses)][:2])
    k = 2  # drawn twice as large, then reduced: smooth lines
    font = ImageFont.load_default(15 * k)
    heights = [430 + 26 * len(panels[0][-1]) for panels in strips]
    image = Image.new('RGB', (1200 * k, sum(heights) * k), 'white')
    draw, top = ImageDraw.Draw(image), 0
    for panels, height in zip(strips, heights):
        for left, (title, xlabel, curves) in zip((0, 600), panels):
            box = (left * k, top * k, (left + 560) * k, (top + 420) * k)
            draw_panel(draw, box, title, xlabel, sum(curves.values(), []), font)
        for line, row in enumerate(panels[0][-1]):
            y = (top + 430 + 26 * line) * k
            for x in (60, 85) if row.is_teacher else (60, 70, 80):
                draw.line([(x * k, y), ((x + 15) * k, y)], row.colour, 5)
            name = re.sub(r' \(.*', '', row.method)
            draw.text((112 * k, y), name, 'black', font, anchor='lm')
        top += height
    return image.reduce(k)


# ---- pictures ------------------------------------------------------------------------------------

PICTURES = {  # file: (caption, the run's folder, images below its --data_path, tool, its flag, images)
    'stage1.png': ('Stage 1: input, mask, the teacher\'s reconstruction, cosine', 'generic', 'val',
                   'visualize.py', '--images', 4),
    'detection.png': ('Detection', 'det_g2sd', 'val2017', 'predict.py', '--image', 1),
    'segmentation.png': ('Segmentation', 'seg_g2sd', 'images/validation', 'predict.py', '--image', 1),
}


def draw_picture(root, file):
    """Lets a tool draw what the first seed's network makes of some images, if they are there."""
    _, folder, images, tool, flag, count = PICTURES[file]
    seeds = finished(read_row(root, Row('', (folder,), '')))
    data = seeds[0][0].args.get('data_path') if seeds else None
    paths = sorted(Path(data, images).rglob('*.*')) if data else []
    if len(paths) >= count:
        checkpoint = root / seeds[0][0].name / 'checkpoint.pth'
        command = [sys.executable, Path(__file__).with_name(tool), '--checkpoint', checkpoint, '--out',
                   root / file, flag, *random.Random(0).sample(paths, count)]
        subprocess.run(command, stdout=subprocess.DEVNULL)


def get_args_parser():
    parser = argparse.ArgumentParser(
        description='logs of a folder of runs -> results.md, curves.png and pictures',
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('folder', type=Path, help='folder with the teachers\' runs and seed<N>/')
    parser.add_argument('--finished', action='store_true',
                        help='write nothing; end in an error unless the folder is a finished run')
    return parser


def main(args):
    root = args.folder
    if args.finished:
        run = read_run(root, '')
        if not run or not run.finished:
            raise SystemExit(f'{root} was interrupted: start make again, it goes on')
        return
    tables, runs = [], {}
    for table in TABLES:
        rows = {row: read_row(root, row) for row in table.rows}
        rows = {row: seeds for row, seeds in rows.items() if seeds or row.top1 or row.box}
        last = {stages[-1].name for seeds in rows.values() for stages in seeds if stages[-1]}
        if last - runs.keys():  # stage 1 alone, and rows that another table has, begin no table
            check_rows(rows)
            tables.append((table, rows))
        for seeds in rows.values():
            runs |= {run.name: run for stages in seeds for run in stages if run}
    if not runs:
        raise SystemExit(f'{root} holds no run: give a folder with teacher_mae/ ... or seed<N>/')
    if not tables:
        tables = [(TABLES[0], {row: read_row(root, row) for row in TABLES[0].rows})]
    parts = [write_results(table, rows) for table, rows in tables]
    parts += [NOTE, write_runs(runs.values()), '### Pictures\n']
    captions = {'curves.png': 'Training curves'}
    draw_curves(tables).save(root / 'curves.png')
    for file, (caption, *_) in PICTURES.items():
        draw_picture(root, file)
        captions[file] = caption
    for file, caption in captions.items():
        if (root / file).exists():
            parts.append(f'{caption}:\n\n![{caption}]({file})\n')
    text = '\n'.join(parts)
    print(text, end='')
    (root / 'results.md').write_text(text, encoding='utf-8')


if __name__ == '__main__':
    main(get_args_parser().parse_args())
