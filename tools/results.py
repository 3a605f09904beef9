"""The paper's tables beside our own numbers, and training curves, from a folder of runs.

Reads:  Table 2: FOLDER/teacher_mae, teacher_cls (one teacher for all seeds), seed<N>/{generic, finetuned, g2sd,
        deit_distilled, deit}. Table 3: FOLDER/teacher_det, seed<N>/{det_deit, det_deit_distilled, det_deit_500, det_dino,
        det_ibot, det_scratch, det_finetuned, det_g2sd}. ADE20K: FOLDER/teacher_seg, seed<N>/{seg_finetuned, seg_g2sd}.
        Each is the --output_dir of a script, of which log.txt and args.json count; any may be missing
Writes: FOLDER/results.md (also printed) and FOLDER/curves.png, both anew from the logs each time
Run:    python tools/results.py runs/cifar10
A number counts when its run is finished, and it is the last epoch's (or round's), never the best: so do the paper's
tables.
"""
import argparse
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
TABLE_ADE = (  # the paper has no table of it
    Row('teacher: UPerNet on ViT-B from MAE', ('teacher_seg',), True, None, None, '#555555'),
    Row('G2SD-S w/o S.D', ('seg_finetuned',), False, None, None, '#ef8f00'),
    Row('G2SD-S', ('seg_g2sd',), False, None, None, '#c62828'),
)
TABLES = TABLE_2 + TABLE_3 + TABLE_ADE


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
    """Runs of a row, one list per seed that has any: [[stage, ...], ...], with None for a stage that is missing."""
    homes = sorted((path.name for path in root.glob('seed*') if re.fullmatch(r'seed\d+', path.name)),
                   key=lambda name: int(name[4:]))
    seeds = [[read_run(root, '/'.join(filter(None, (home, folder)))) for folder in row.folders]
             for home in ([''] if row.shared else homes)]
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


def spread(values):
    """'81.73 ± 0.21 (n = 3)' with the sample's standard deviation; one value stands alone, and none is empty."""
    if not values:
        return ''
    return f'{statistics.mean(values):.2f}' + (f' ± {statistics.stdev(values):.2f}' if values[1:] else '') + \
        f' (n = {len(values)})'


def paper_value(value):
    return '' if value is None else f'{value:.1f}'


def training_times(split):
    """({Row: [time of each seed]}, unit): of training, all stages, in the largest unit that the longest row fills.

    split: {Row: what `split_seeds` gave}. A seed whose first stage is missing has a result but no time.
    """
    seconds = {row: [sum(run.last('train_seconds') for run in stages) for stages in counted if all(stages)]
               for row, (counted, _) in split.items()}
    longest = max(sum(seconds.values(), [0]))
    unit, size = next(((unit, size) for unit, size in (('hours', 3600), ('minutes', 60)) if longest >= size), ('seconds', 1))
    return {row: [value / size for value in values] for row, values in seconds.items()}, unit


def name_sources(split, number):
    """Lines: the test images, and the networks and log files behind each row's `number` ('Top-1' or 'AP') and time."""
    images, lines = set(), []
    for row, (counted, _) in split.items():
        runs = [run for stages in counted for run in stages if run]
        networks = dict.fromkeys(f'{run.args["model"]} at {"x".join(map(str, run.args["input_size"]))}' for run in runs)
        results = [f'`{stages[-1].name}/log.txt`' for stages in counted]
        time = [f'`{run.name}/log.txt`' for stages in counted if all(stages) for run in stages]
        images |= {stages[-1].last('test_images') for stages in counted}
        lines += [f'- {row.method}: {", then ".join(networks)}. {number}: {", ".join(results)}. '
                  f'Time: {", ".join(time) or "a stage is missing"}.'] if counted else []
    return [f'- Test images: {", ".join(map(str, sorted(images)))}', '', 'Networks and logs of each row:', '',
            *lines] if lines else []


NOTE_2 = """Ours: top-1 in percent after the last epoch of finished runs, never of the best epoch; mean ± sample standard
deviation over n seeds. Time: {unit} of training, all stages of the row, without evaluation; G2SD and distillation do not
count that of the teacher, which has a row of its own. The paper's values: ViT-S (teacher ViT-B) on ImageNet-1k."""


def table_2(root, rows):
    """Markdown of the paper's Table 2, and what its numbers rest on. rows: {Row: what `read_row` gave}."""
    split = {row: split_seeds(seeds) for row, seeds in rows.items()}
    times, unit = training_times(split)
    lines = ['### Table 2: ImageNet classification in the paper, and our runs', '',
             f'| method | our 1st stage | our 2nd stage | paper time | time (ours, {unit}) | paper top-1 | top-1 (ours) |',
             '|---|---|---|---|---|---|---|']
    for row, (counted, running) in split.items():
        stages = [' / '.join(sorted({describe_stage(run) for run in stage if run})) for stage in zip(*rows[row])]
        top1 = spread([stages[-1].last('test_acc1') for stages in counted])
        lines.append(f'| {row.method} | ' + ' | '.join((stages + ['', ''])[:2] + [
            f'{row.paper_hours} h' if row.paper_hours else '', spread(times[row]), paper_value(row.paper_top1),
            '; '.join(filter(None, [top1, *running]))]) + ' |')
    lines += ['', NOTE_2.format(unit=unit), '']
    ours = [statistics.mean(times[row]) if times[row] else None for row in (G2SD, DEIT_DISTILLED)]
    paper = G2SD.paper_hours, DEIT_DISTILLED.paper_hours
    lines.append(f'- Time of {G2SD.method} / {DEIT_DISTILLED.method}: {paper[0] / paper[1]:.2f} in the paper ({paper[0]} / '
                 f'{paper[1]}); ours: ' + (f'{ours[0] / ours[1]:.2f}' if all(ours) else 'not known yet'))
    classes = count_classes(root, rows)
    lines += [f'- Chance level: {100 / classes:.2f} % ({classes} classes)'] if classes else []
    return '\n'.join(lines + name_sources(split, 'Top-1')) + '\n'


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
            ' / '.join(map(str, iterations)), spread(times[row])]) + ' |')
    sources = name_sources(split, 'AP')
    return '\n'.join([*lines, '', NOTE_3.format(unit=unit)] + (['', *sources] if sources else [])) + '\n'


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
            ' / '.join(map(str, iterations)), spread(times[row])]) + ' |')
    sources = name_sources(split, 'mIoU')
    return '\n'.join([*lines, '', NOTE_ADE.format(unit=unit)] + (['', *sources] if sources else [])) + '\n'


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


def draw_curves(rows):
    """Picture: for each table that has runs two panels side by side, and their legend; a colour per row.

    Table 2: test top-1 against all epochs of the student, and the first stage's training loss. Table 3: AP of boxes and of
    masks against iterations; ADE20K: mIoU and pixel accuracy. rows: {Row: what `read_row` gave}, of all tables.
    """
    cls, det, seg = ({row: rows[row] for row in table if rows.get(row)} for table in (TABLE_2, TABLE_3, TABLE_ADE))
    generic = {G2SD: [stages[:1] for stages in cls.get(G2SD, [])]}
    strips = []  # of two panels: (left, right, title, xlabel, curves)
    if cls:
        strips.append([(0, 730, 'Test top-1, percent', 'epochs, all stages', curves_of(cls, 'test_acc1')),
                       (750, 1175, 'Generic stage: training loss', 'epochs', curves_of(generic, 'train_loss'))])
    if det:
        strips.append([(0, 560, 'Box AP, percent', 'iterations', curves_of(det, 'test_bbox_AP')),
                       (600, 1160, 'Mask AP, percent', 'iterations', curves_of(det, 'test_mask_AP'))])
    if seg:
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


def main(args):
    if not args.folder.is_dir():
        raise models.InputError(f'there is no folder {args.folder}')
    cls, det, seg = ({row: read_row(args.folder, row) for row in table} for table in (TABLE_2, TABLE_3, TABLE_ADE))
    if any(det.values()) or any(seg.values()):  # their stage 1 alone begins no Table 2
        cls = cls if any(stages[-1] for seeds in cls.values() for stages in seeds) else {}
    tables = [table_2(args.folder, cls)] if any(cls.values()) else []
    tables += [table_3(det)] if any(det.values()) else []
    tables += [table_ade(seg)] if any(seg.values()) else []
    if not tables:
        teachers, students = (', '.join(dict.fromkeys(name for row in TABLES if row.shared == shared
                                                      for name in row.folders)) for shared in (True, False))
        raise models.InputError(f'{args.folder} holds no run: expected {teachers}, or seed<N>/ with {students}')
    text = '\n'.join(tables)
    print(text, end='')
    (args.folder / 'results.md').write_text(text, encoding='utf-8')
    draw_curves({**cls, **det, **seg}).save(args.folder / 'curves.png')


if __name__ == '__main__':
    try:
        main(get_args_parser().parse_args())
    except models.InputError as error:
        sys.exit(f'error: {error}')
