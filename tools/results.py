"""The paper's tables beside our own numbers, early signs of health, and training curves, from a folder of runs.

Reads:  FOLDER/teacher_{mae,cls,det,seg}   one of each for all seeds and tables
        FOLDER/seed<N>/   Table 2: generic, finetuned, g2sd, deit_distilled, deit. Table 3: det_{deit, deit_distilled,
        deit_500, dino, ibot, scratch, finetuned, g2sd}. Tables 4 and 5: generic_X, finetuned_X, g2sd_X with X = recon,
        recon_gt, mask<ratio>, layer<block>. ADE20K: seg_{finetuned, g2sd}
        Each is the --output_dir of a script, of which log.txt and args.json count; any may be missing
Writes: FOLDER/results.md (also printed) and FOLDER/curves.png, both anew from the logs each time; results.md shows the
        pictures that `make results` puts beside it
Run:    python tools/results.py runs/cifar10
A number counts when its run is finished, and it is the last epoch's (or round's), never the best: so do the paper's
tables.
"""
import argparse
import itertools
import json
import math
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import models


class Row(NamedTuple):
    """One method of a table: the folders of its stages, in order, inside each seed's folder (or FOLDER, if shared)."""
    method: str          # what is in parentheses stays out of the picture
    folders: tuple
    shared: bool
    paper_hours: float   # None where the paper gives none, here and below
    paper_top1: float    # ImageNet, percent
    colour: str
    paper_box: float = None    # AP on COCO, percent
    paper_mask: float = None
    trained_with: tuple = ()   # (argument, value) that the first stage must have had, so that no folder is taken for another


G2SD = Row('G2SD-S', ('generic', 'g2sd'), False, 71, 82.5, '#c62828')
DEIT_DISTILLED = Row('DeiT-S with distillation (DeiT⚗)', ('deit_distilled',), False, 112, 81.7, '#1565c0')
TABLE_2 = (
    Row('teacher: MAE ViT-B, fine-tuned', ('teacher_mae', 'teacher_cls'), True, None, 83.6, '#555555'),
    Row('DeiT-S', ('deit',), False, 53, 81.4, '#2e7d32'),
    DEIT_DISTILLED,
    Row('G2SD-S w/o S.D (Tables 3, 4)', ('generic', 'finetuned'), False, None, 82.0, '#ef8f00'),
    G2SD,
)
TABLE_3 = (
    Row('teacher: ViTDet-B from MAE', ('teacher_det',), True, None, None, '#555555', 51.6, 45.9),
    Row('DeiT-S 300e', ('det_deit',), False, None, 79.9, '#7cb342', 45.7, 40.7),
    Row('DeiT-S with distillation 300e (DeiT-S⚗)', ('det_deit_distilled',), False, None, 81.2, '#1565c0', 47.2, 41.9),
    Row('DeiT-S 500e', ('det_deit_500',), False, None, 81.4, '#2e7d32', 46.9, 41.6),
    Row('DINO-S 3200e', ('det_dino',), False, None, 82.0, '#8e24aa', 49.1, 43.3),
    Row('iBOT-S 3200e', ('det_ibot',), False, None, 82.3, '#00acc1', 49.7, 44.0),
    Row('random weights (not in the paper)', ('det_scratch',), False, None, None, '#795548'),
    Row('G2SD-S w/o S.D', ('det_finetuned',), False, None, 82.0, '#ef8f00', 49.9, 44.5),
    Row('G2SD-S', ('det_g2sd',), False, None, 82.5, '#c62828', 50.6, 44.8),
)
TABLE_4 = tuple(
    Row(f'{target}, {how} S.D', (f'generic{name}', f'{folder}{name}'), False, None, top1, colour,
        trained_with=(('target', f'{name[1:] or "feature"}'),))
    for target, name, paper in (('features', '', (82.0, 82.5)), ('reconstructions', '_recon', (81.4, 81.8)),
                                ('reconstructions + ground truth', '_recon_gt', (81.5, 81.7)))
    for how, folder, top1, colour in zip(('w/o', 'with'), ('finetuned', 'g2sd'), paper, {
        '': ('#ef8f00', '#c62828'), '_recon': ('#64b5f6', '#0d47a1'), '_recon_gt': ('#81c784', '#1b5e20')}[name]))
MASK_RATIOS = {0.05: 81.7, 0.25: 81.7, 0.55: 81.6, 0.75: 82.0, 0.9: 81.8}  # the paper's Table 5
COLOURS = ('#5e35b1', '#1e88e5', '#00897b', '#c62828', '#fb8c00', '#6d4c41', '#ec407a', '#9e9d24', '#546e7a')
TABLE_ADE = (  # the paper has no table of it
    Row('teacher: UPerNet on ViT-B from MAE', ('teacher_seg',), True, None, None, '#555555'),
    Row('G2SD-S w/o S.D', ('seg_finetuned',), False, None, None, '#ef8f00'),
    Row('G2SD-S', ('seg_g2sd',), False, None, None, '#c62828'),
)
TABLES = TABLE_2 + TABLE_3 + TABLE_ADE


def table_5(root):
    """Rows of the paper's Table 5, without S.D: its mask ratios and others that were run; then the decoder blocks."""
    def found(what, number):
        return {number(path.name.split(what)[1]) for path in root.glob(f'seed*/finetuned_{what}*')
                if re.fullmatch(r'\d*\.?\d+', path.name.split(what)[1])}

    colours = itertools.cycle(COLOURS)
    rows = [Row(f'mask ratio {ratio:g}', tuple(f'{stage}_mask{ratio:g}' if ratio != 0.75 else stage
                                               for stage in ('generic', 'finetuned')), False, None, MASK_RATIOS.get(ratio),
                next(colours), trained_with=(('mask_ratio', ratio), ('target', 'feature')))
            for ratio in sorted({*MASK_RATIOS, *found('mask', float)})]
    layers = {layer: (f'generic_layer{layer}', f'finetuned_layer{layer}') for layer in found('layer', int)}
    first = next(iter(read_row(root, rows[0]._replace(folders=('generic',), trained_with=()))), None)
    if layers and first:  # the block of the other rows, which the scale chooses
        layers[first[0].args['target_layer']] = ('generic', 'finetuned')
    return rows + [Row(f'decoder block {layer}', layers[layer], False, None, None, next(colours),
                       trained_with=(('target_layer', layer), ('target', 'feature'))) for layer in sorted(layers)]


# -------------------------------------------------------------------------------------------------------------- reading


class Run(NamedTuple):
    name: str     # folder of the run, relative to FOLDER
    unit: str     # what the run counts: 'epoch', or 'iteration' in detection
    total: int    # of these units
    args: dict    # args.json
    log: list     # of log.txt's objects, complete lines only

    def done(self, entry):
        """Units finished at an object of the log: epochs are numbered from 0, iterations are counted."""
        return entry[self.unit] + (self.unit == 'epoch')

    @property
    def finished(self):
        return bool(self.log) and self.done(self.log[-1]) == self.total

    def last(self, key):
        """The value on the last line; raises InputError if the log lacks it."""
        if key not in self.log[-1]:
            raise models.InputError(f'{self.name}/log.txt: the last line has no {key!r}')
        return self.log[-1][key]


def read_run(root, name):
    """The run in root/name, or None if there is none. Raises InputError for damaged files.

    A run that is training, or was killed, may end in part of a line, which does not count.
    """
    folder = root / name
    if not (folder / 'log.txt').exists() and not (folder / 'args.json').exists():
        return None
    try:
        args = json.loads((folder / 'args.json').read_text())
        unit = 'epoch' if 'epochs' in args else 'iteration'
        total = args[f'{unit}s'] + 0  # a number, or TypeError; so below
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise models.InputError(f'{folder}/args.json does not tell the epochs or iterations ({error})') from error
    lines = (folder / 'log.txt').read_text(errors='replace').splitlines() if (folder / 'log.txt').exists() else []
    log = []
    for number, line in enumerate(lines, 1):
        try:
            log.append(json.loads(line))
            log[-1][unit] + 0, log[-1]['train_loss']
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise models.InputError(f'{folder}/log.txt, line {number} is no JSON object with {unit!r} and '
                                        "'train_loss'") from error
            log = log[:number - 1]
    return Run(name, unit, total, args, log)


def read_row(root, row):
    """Runs of a row, one list per seed that has any: [[stage, ...], ...], with None for a stage that is missing.

    Raises InputError for a first stage that was not trained as the row says.
    """
    homes = sorted((path.name for path in root.glob('seed*') if re.fullmatch(r'seed\d+', path.name)),
                   key=lambda name: int(name[4:]))
    seeds = [[read_run(root, '/'.join(filter(None, (home, folder)))) for folder in row.folders]
             for home in ([''] if row.shared else homes)]
    for run in (stages[0] for stages in seeds if stages[0]):
        for name, value in row.trained_with:
            if run.args.get(name, value) != value:
                raise models.InputError(f'{run.name} was trained with {name} {run.args[name]}, but stands for {value}: '
                                        'rename or remove it')
    return [stages for stages in seeds if any(stages)]


def count_classes(root, rows):
    """Classes that the runs tell apart, or None; from a checkpoint, as neither log nor arguments know them."""
    files = [root / stages[-1].name / 'checkpoint.pth' for seeds in rows.values() for stages in seeds if stages[-1]]
    files = sorted((path for path in files if path.exists()), key=lambda path: path.stat().st_size)
    return len(models.read_checkpoint(files[0]).get('classes') or ()) or None if files else None


# ------------------------------------------------------------------------------------------------------------ the tables


def describe_stage(run):
    """What a run did, by its arguments, as in the paper's Table 2: 'generic 300', 'supervised + distillation 500' ..."""
    if 'target' in run.args:
        what = {'feature': 'generic', 'pixel': 'MAE'}.get(run.args['target'], f'generic ({run.args["target"]})')
    else:
        what = {(True, True): 'specific', (True, False): 'fine-tuning', (False, True): 'supervised + distillation',
                (False, False): 'supervised'}[bool(run.args['finetune']), bool(run.args['teacher_path'])]
    return f'{what} {run.total}'


def split_seeds(seeds):
    """([stages] of the seeds that count: last stage there, none unfinished; what the others are doing, as text)."""
    counted, running = [], []
    for stages in seeds:
        unfinished = [run for run in stages if run and not run.finished]
        if unfinished:
            run = unfinished[0]
            running.append(f'{run.name}: {run.unit} {run.done(run.log[-1]) if run.log else 0}/{run.total}')
        elif stages[-1]:
            counted.append(stages)
    return counted, running


def spread(values, digits=2):
    """'81.73 ± 0.21 (n = 3)' with the sample's standard deviation; one value stands alone, and none is empty."""
    if not values:
        return ''
    return f'{statistics.mean(values):.{digits}f}' + (f' ± {statistics.stdev(values):.{digits}f}' if values[1:] else '') + \
        f' (n = {len(values)})'


def paper_value(value):
    return '' if value is None else f'{value:.1f}'


def training_times(split):
    """({Row: [[time of each stage] of each seed]}, unit): of training, in the largest unit that the longest row fills.

    split: {Row: what `split_seeds` gave}. A seed whose first stage is missing has a result but no time.
    """
    seconds = {row: [[run.last('train_seconds') for run in stages] for stages in counted if all(stages)]
               for row, (counted, _) in split.items()}
    longest = max((sum(stages) for seeds in seconds.values() for stages in seeds), default=0)
    unit, size = next(((unit, size) for unit, size in (('hours', 3600), ('minutes', 60)) if longest >= size), ('seconds', 1))
    return {row: [[value / size for value in stages] for stages in seeds] for row, seeds in seconds.items()}, unit


def describe_stages(seeds):
    """What each stage of a row did, as in `describe_stage`, '' for none: always two."""
    return ([' / '.join(sorted({describe_stage(run) for run in stage if run})) for stage in zip(*seeds)] + ['', ''])[:2]


def stage_times(times):
    """Time of each stage over the seeds, and of all together: always three cells."""
    stages = [spread(values) for values in zip(*times)]
    return (stages + ['', ''])[:2] + [spread([sum(values) for values in times])]


def name_sources(split, number):
    """Lines: the test images, and the networks, log files, commits and machines behind each row's `number` and time."""
    images, lines = set(), []
    for row, (counted, _) in split.items():
        runs = [run for stages in counted for run in stages if run]
        networks = dict.fromkeys(f'{run.args["model"]} at {"x".join(map(str, run.args["input_size"]))}' for run in runs)
        results = [f'`{stages[-1].name}/log.txt`' for stages in counted]
        time = [f'`{run.name}/log.txt`' for stages in counted if all(stages) for run in stages]
        commits, machines = (', '.join(dict.fromkeys(run.args.get(key, 'not recorded') for run in runs))
                             for key in ('commit', 'hardware'))
        images |= {stages[-1].last('test_images') for stages in counted}
        lines += [f'- {row.method}: {", then ".join(networks)}. {number}: {", ".join(results)}. '
                  f'Time: {", ".join(time) or "a stage is missing"}. Commit: {commits}. '
                  f'Processes: {machines}.'] if counted else []
    return ['', f'- Test images: {", ".join(map(str, sorted(images)))}', '', 'Networks and logs of each row:', '',
            *lines] if lines else []


NOTE_2 = """Ours: top-1 in percent after the last epoch of finished runs, never of the best epoch; mean ± sample standard
deviation over n seeds. Time: {unit} of training, all stages of the row, without evaluation; G2SD and distillation do not
count that of the teacher, which has a row of its own. The paper's values: ViT-S (teacher ViT-B) on ImageNet-1k."""


def table_2(root, rows):
    """Markdown of the paper's Table 2, and what its numbers rest on. rows: {Row: what `read_row` gave}."""
    split = {row: split_seeds(seeds) for row, seeds in rows.items()}
    times, unit = training_times(split)
    lines = ['### Table 2: ImageNet classification in the paper, and our runs', '',
             f'| method | our 1st stage | our 2nd stage | paper time | 1st stage, {unit} | 2nd stage, {unit} | '
             f'time (ours, {unit}) | paper top-1 | top-1 (ours) |', '|---|---|---|---|---|---|---|---|---|']
    for row, (counted, running) in split.items():
        top1 = spread([stages[-1].last('test_acc1') for stages in counted])
        lines.append(f'| {row.method} | ' + ' | '.join([
            *describe_stages(rows[row]), f'{row.paper_hours} h' if row.paper_hours else '', *stage_times(times[row]),
            paper_value(row.paper_top1), '; '.join(filter(None, [top1, *running]))]) + ' |')
    lines += ['', NOTE_2.format(unit=unit), '']
    ours = [statistics.mean(map(sum, times[row])) if times[row] else None for row in (G2SD, DEIT_DISTILLED)]
    paper = G2SD.paper_hours, DEIT_DISTILLED.paper_hours
    lines.append(f'- Time of {G2SD.method} / {DEIT_DISTILLED.method}: {paper[0] / paper[1]:.2f} in the paper ({paper[0]} / '
                 f'{paper[1]}); ours: ' + (f'{ours[0] / ours[1]:.2f}' if all(ours) else 'not known yet'))
    classes = count_classes(root, rows)
    lines += [f'- Chance level: {100 / classes:.2f} % ({classes} classes)'] if classes else []
    return '\n'.join(lines + name_sources(split, 'Top-1')) + '\n'


NOTE_4_5 = """Ours: as in Table 2. The paper's values: ViT-S, decoder features of ViT-B, ImageNet-1k; where it gives none the
cell is empty."""


def table_4_or_5(title, rows):
    """Markdown of the paper's Table 4 or 5, a line per row. rows: {Row: what `read_row` gave}."""
    split = {row: split_seeds(seeds) for row, seeds in rows.items()}
    times, unit = training_times(split)
    lines = [f'### {title}', '', f'| stage 1, stage 2 | our 1st stage | our 2nd stage | 1st stage, {unit} | '
             f'2nd stage, {unit} | paper top-1 | top-1 (ours) |', '|---|---|---|---|---|---|---|']
    for row, (counted, running) in split.items():
        top1 = spread([stages[-1].last('test_acc1') for stages in counted])
        lines.append(f'| {row.method} | ' + ' | '.join([
            *describe_stages(rows[row]), *stage_times(times[row])[:2], paper_value(row.paper_top1),
            '; '.join(filter(None, [top1, *running]))]) + ' |')
    return '\n'.join([*lines, '', NOTE_4_5, *name_sources(split, 'Top-1')]) + '\n'


NOTE_3 = """Ours: AP in percent (COCO's, mean over IoU 0.50 to 0.95; AP50: at 0.50) after the last round of finished runs,
never of the best round; mean ± sample standard deviation over n seeds. Time: {unit} of detection training alone, without
evaluation; earlier stages and pre-training do not count, nor does the teacher, which has a row of its own. The paper's
values: ViTDet with ViT-S (teacher ViT-B) on COCO, 100 epochs, 1024x1024; ImageNet: top-1 in percent; 300e: pre-trained
for 300 epochs in the paper."""


def table_3(rows):
    """Markdown of the paper's Table 3, and what its numbers rest on. rows: {Row: what `read_row` gave}."""
    split = {row: split_seeds(seeds) for row, seeds in rows.items() if seeds or row.paper_box}
    times, unit = training_times(split)
    lines = ['### Table 3: detection and instance segmentation on COCO in the paper, and our runs', '',
             '| method | paper ImageNet | paper AP^bbox | AP^bbox (ours) | paper AP^mask | AP^mask (ours) | '
             f'our AP50 bbox / mask | our iterations | time (ours, {unit}) |', '|---|---|---|---|---|---|---|---|---|']
    for row, (counted, running) in split.items():
        box, mask, box50, mask50 = (spread([run.last(f'test_{key}') for (run,) in counted])
                                    for key in ('bbox_AP', 'mask_AP', 'bbox_AP50', 'mask_AP50'))
        iterations = sorted({run.total for (run,) in rows[row]})
        lines.append(f'| {row.method} | ' + ' | '.join([
            paper_value(row.paper_top1), paper_value(row.paper_box), '; '.join(filter(None, [box, *running])),
            paper_value(row.paper_mask), mask, f'{box50} / {mask50}' if counted else '',
            ' / '.join(map(str, iterations)), stage_times(times[row])[-1]]) + ' |')
    return '\n'.join([*lines, '', NOTE_3.format(unit=unit), *name_sources(split, 'AP')]) + '\n'


NOTE_ADE = """Ours: in percent, after the last round of finished runs, never of the best round; mean ± sample standard
deviation over n seeds. Part of the teacher: its mIoU is 100 %. Time: {unit} of segmentation training alone, without
evaluation; earlier stages and pre-training do not count, nor does the teacher, which has a row of its own. The paper has
no table of this task; its abstract gives G2SD-S 99.3 % of the teacher's performance."""


def table_ade(rows):
    """Markdown of our runs in semantic segmentation, and what its numbers rest on. rows: {Row: what `read_row` gave}."""
    split = {row: split_seeds(seeds) for row, seeds in rows.items()}
    times, unit = training_times(split)
    lines = ['### ADE20K: semantic segmentation, our runs', '',
             '| method | mIoU | part of the teacher | mean accuracy | pixel accuracy | our iterations | '
             f'time (ours, {unit}) |', '|---|---|---|---|---|---|---|']
    teacher = next((run.last('test_mIoU') for row in rows if row.shared for (run,) in split[row][0]), None)
    for row, (counted, running) in split.items():
        values, accuracy, pixels = ([run.last(f'test_{key}') for (run,) in counted] for key in ('mIoU', 'mAcc', 'aAcc'))
        part = f'{100 * statistics.mean(values) / teacher:.1f} %' if values and teacher and not row.shared else ''
        iterations = sorted({run.total for (run,) in rows[row]})
        lines.append(f'| {row.method} | ' + ' | '.join([
            '; '.join(filter(None, [spread(values), *running])), part, spread(accuracy), spread(pixels),
            ' / '.join(map(str, iterations)), stage_times(times[row])[-1]]) + ' |')
    return '\n'.join([*lines, '', NOTE_ADE.format(unit=unit), *name_sources(split, 'mIoU')]) + '\n'


NOTE_HEALTH = """Of all seeds, finished or not: what a healthy run of this scale looks like early on. Best constant: the loss
of a prediction that is one vector for all images and tokens, on the first batches. In the paper's setting on ImageNet the
loss is about 0.02 late in stage 1, and stage 2 begins with about 56 % after its first epoch; stuck at 0.2, then 36 %, means
that the teacher's decoder was never loaded."""


def table_of_health(rows):
    """Markdown: stage 1's loss from epoch to epoch, and stage 2's accuracy after its first. rows: {Row: of `read_row`}."""
    groups = {}  # {folder: {run's name: run}}
    for run in (run for seeds in rows.values() for stages in seeds for run in stages if run):
        groups.setdefault(run.name.split('/')[-1], {})[run.name] = run
    places = {'in epoch 1': lambda run: 0, 'after warm-up': lambda run: run.args.get('warmup_epochs'),
              'at a quarter': lambda run: run.total // 4 - 1, 'at half': lambda run: run.total // 2 - 1,
              'in the last epoch': lambda run: run.total - 1}

    def cells(runs, key, names, digits):
        return [spread([entry[key] for run in runs.values() for entry in run.log
                        if entry['epoch'] == places[name](run) and key in entry], digits) for name in names]

    stage1 = [f'| stage 1 | best constant | loss {" | ".join(places)} |', '|---' * 7 + '|']
    stage2 = ['| stage 2 | top-1 in epoch 1 | in the last epoch |', '|---' * 3 + '|']
    for name, runs in groups.items():
        run = next(iter(runs.values()))
        if 'target' in run.args:
            values = cells(runs, 'constant_loss', ['in epoch 1'], 4) + cells(runs, 'train_loss', places, 4)
        else:
            values = cells(runs, 'test_acc1', ['in epoch 1', 'in the last epoch'], 2)
        lines = stage1 if 'target' in run.args else stage2
        lines.append(f'| {name}: {describe_stage(run)} | ' + ' | '.join(values) + ' |')
    lines = [line for table in (stage1, stage2) if table[2:] for line in (*table, '')]
    return '\n'.join(['### Is a run healthy?', '', *lines, NOTE_HEALTH]) + '\n'


# ------------------------------------------------------------------------------------------------------------ the curves


class Curve(NamedTuple):
    points: list     # of (x, y)
    colour: str
    dashed: bool = False


def round_steps(low, high, least=0.0, count=6):
    """About `count` round numbers, `least` or more apart, ascending; the first is <= low and the last >= high."""
    high = high if high > low else low + (abs(low) or 1) * 0.1
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = max(least, power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9)))
    return [step * k for k in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def draw_panel(draw, box, title, xlabel, curves, font):
    """Axes with ticks, and the curves, inside box (left, top, right, bottom), pixels; the x axis starts at 0."""
    left, top, right, bottom = box[0] + 4 * font.size, box[1] + 3 * font.size, box[2], box[3] - 4 * font.size
    draw.text((left, box[1] + font.size), title, 'black', font)
    draw.rectangle((left, top, right, bottom), outline='#888888', width=2)
    points = [point for curve in curves for point in curve.points]
    if not points:
        draw.text(((left + right) / 2, (top + bottom) / 2), 'no value yet', '#555555', font, anchor='mm')
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
        if curve.dashed:
            y = place(0, curve.points[-1][1])[1]
            for x in range(int(left), int(right), font.size):
                draw.line([(x, y), (min(x + font.size / 2, right), y)], curve.colour, 4)
            continue
        pixels = [place(*point) for point in curve.points]
        draw.line(pixels, curve.colour, 5, joint='curve')
        for x, y in pixels if len(pixels) < 10 else pixels[-1:]:
            draw.ellipse((x - 7, y - 7, x + 7, y + 7), curve.colour)


def curves_of(rows, key):
    """{Row: [Curve of a seed, ...]} of a value in the log, against all training of the student; no row without a point."""
    curves = {}
    for row, seeds in rows.items():
        for stages in seeds:
            before, run = sum(run.total for run in stages[:-1] if run), stages[-1]
            points = [(before + run.done(entry), entry[key]) for entry in run.log if key in entry] if run else []
            if row.shared:  # the teacher's training is another one: its level alone can be compared
                points = [(0, points[-1][1])] if points else []
            if points:
                curves.setdefault(row, []).append(Curve(points, row.colour, row.shared))
    return curves


def draw_curves(cls, det, seg):
    """Picture: for each table that has runs two panels side by side, and their legend; a colour per row.

    Tables 2, 4, 5: test top-1 against all epochs of the student, and the first stage's training loss. Table 3: AP of boxes
    and of masks against iterations; ADE20K: mIoU and pixel accuracy. cls: {title: {Row: what `read_row` gave}} of the tables
    of classification; det, seg: {Row: what `read_row` gave}.
    """
    strips = []  # of two panels: (left, right, title, xlabel, curves)
    for title, rows in cls.items():
        rows = {row: seeds for row, seeds in rows.items() if seeds}
        # rows that share a first stage show it once, in the colour of one with a curve; the teacher's is another network's
        ordered = sorted(rows.items(), key=lambda item: any(stages[-1] for stages in item[1]))
        first = {row.folders[0]: (row, [stages[:1] for stages in seeds]) for row, seeds in ordered
                 if row.folders[1:] and not row.shared}
        if rows:
            strips.append([(0, 730, f'{title}: test top-1, percent', 'epochs, all stages', curves_of(rows, 'test_acc1')),
                           (750, 1175, 'Generic stage: training loss', 'epochs',
                            curves_of(dict(first.values()), 'train_loss'))])
    if any(det.values()):
        strips.append([(0, 560, 'Box AP, percent', 'iterations', curves_of(det, 'test_bbox_AP')),
                       (600, 1160, 'Mask AP, percent', 'iterations', curves_of(det, 'test_mask_AP'))])
    if any(seg.values()):
        strips.append([(0, 560, 'mIoU, percent', 'iterations', curves_of(seg, 'test_mIoU')),
                       (600, 1160, 'Pixel accuracy, percent', 'iterations', curves_of(seg, 'test_aAcc'))])
    k = 2  # drawn twice as large, then reduced: smooth lines
    font = ImageFont.load_default(15 * k)
    heights = [430 + 26 * len(panels[0][-1]) for panels in strips]
    image = Image.new('RGB', (1200 * k, sum(heights) * k), 'white')
    draw = ImageDraw.Draw(image)
    for number, panels in enumerate(strips):
        top = sum(heights[:number])
        for left, right, title, xlabel, curves in panels:
            draw_panel(draw, (left * k, top * k, right * k, (top + 420) * k), title, xlabel, sum(curves.values(), []), font)
        for line, row in enumerate(panels[0][-1]):
            y = (top + 430 + 26 * line) * k
            for x in (60, 85) if row.shared else (60, 70, 80):
                draw.line([(x * k, y), ((x + 15) * k, y)], row.colour, 5)
            text = re.sub(r' \(.*', '', row.method) + (', level of its last evaluation' if row.shared else '')
            draw.text((112 * k, y), text, 'black', font, anchor='lm')
    return image.reduce(k)


def get_args_parser():
    parser = argparse.ArgumentParser(description='logs of a folder of runs -> results.md and curves.png', allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('folder', type=Path, help='folder with the teachers\' runs and seed<N>/: see above')
    return parser


PICTURES = {'curves.png': 'Training curves', 'stage1.png': 'Stage 1: input, mask, the teacher\'s reconstruction, cosine',
            'detection.png': 'Detection: a validation image', 'segmentation.png': 'Segmentation: a validation image'}


def main(args):
    root = args.folder
    if not root.is_dir():
        raise models.InputError(f'there is no folder {root}')

    def read(table):
        return {row: read_row(root, row) for row in table}

    def begun(rows):  # stage 1 alone belongs to any table
        return any(stages[-1] for seeds in rows.values() for stages in seeds)

    cls, det, seg = map(read, (TABLE_2, TABLE_3, TABLE_ADE))
    tables = {'Table 2': cls} if begun(cls) or not (begun(det) or begun(seg)) and any(cls.values()) else {}
    # their first rows are Table 2's
    if any(root.glob('seed*/*_recon*')):
        tables['Table 4'] = read(TABLE_4)
    if any(root.glob('seed*/*_mask*')) or any(root.glob('seed*/*_layer*')):
        tables['Table 5'] = read(table_5(root))
    parts = [table_2(root, cls)] if 'Table 2' in tables else []
    parts += [table_3(det)] if any(det.values()) else []
    parts += [table_4_or_5(title, tables[title.split(':')[0]]) for title in (
        'Table 4: targets of stage 1', 'Table 5: mask ratio, and block of the teacher\'s decoder, without S.D')
        if title.split(':')[0] in tables]
    parts += [table_ade(seg)] if any(seg.values()) else []
    if not parts:
        teachers, students = (', '.join(dict.fromkeys(name for row in TABLES if row.shared == shared
                                                      for name in row.folders)) for shared in (True, False))
        raise models.InputError(f'{root} holds no run: expected {teachers}, or seed<N>/ with {students}')
    if any(cls.values()):
        parts.append(table_of_health({row: seeds for rows in (cls, *tables.values()) for row, seeds in rows.items()}))
    draw_curves(tables, det, seg).save(root / 'curves.png')
    parts.append('### Pictures\n\n' + '\n\n'.join(
        f'{caption}:\n\n![{caption}]({name})' for name, caption in PICTURES.items() if (root / name).exists()) + '\n')
    text = '\n'.join(parts)
    print(text, end='')
    (root / 'results.md').write_text(text, encoding='utf-8')


if __name__ == '__main__':
    try:
        main(get_args_parser().parse_args())
    except models.InputError as error:
        sys.exit(f'error: {error}')
