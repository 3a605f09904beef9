"""The paper's tables beside our own numbers, and training curves, from a folder of runs.

Reads:  FOLDER/teacher_mae, FOLDER/teacher_cls (one teacher for all seeds), FOLDER/seed<N>/{generic, finetuned, g2sd,
        deit_distilled, deit}: each the --output_dir of a script, of which log.txt and args.json count; any may be missing
Writes: FOLDER/results.md (also printed) and FOLDER/curves.png, both anew from the logs each time
Run:    python tools/results.py runs/cifar10
A number counts when its run is finished, and it is the last epoch's, never the best: so do the paper's tables.
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
    paper_top1: float    # percent
    colour: str


G2SD = Row('G2SD-S', ('generic', 'g2sd'), False, 71, 82.5, '#c62828')
DEIT_DISTILLED = Row('DeiT-S with distillation (DeiT⚗)', ('deit_distilled',), False, 112, 81.7, '#1565c0')
TABLE_2 = (
    Row('teacher: MAE ViT-B, fine-tuned', ('teacher_mae', 'teacher_cls'), True, None, 83.6, '#555555'),
    Row('DeiT-S', ('deit',), False, 53, 81.4, '#2e7d32'),
    DEIT_DISTILLED,
    Row('G2SD-S w/o S.D (Tables 3, 4)', ('generic', 'finetuned'), False, None, 82.0, '#ef8f00'),
    G2SD,
)


# -------------------------------------------------------------------------------------------------------------- reading


class Run(NamedTuple):
    name: str     # folder of the run, relative to FOLDER
    args: dict    # args.json
    log: list     # of log.txt's objects, complete lines only

    @property
    def finished(self):
        return bool(self.log) and self.log[-1]['epoch'] == self.args['epochs'] - 1

    def last(self, key):
        """The last epoch's value; raises InputError if the log lacks it."""
        if key not in self.log[-1]:
            raise models.InputError(f'{self.name}/log.txt: the last epoch has no {key!r}')
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
        args['epochs'] + 1
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise models.InputError(f'{folder}/args.json does not tell the epochs of the run ({error})') from error
    lines = (folder / 'log.txt').read_text(errors='replace').splitlines() if (folder / 'log.txt').exists() else []
    log = []
    for number, line in enumerate(lines, 1):
        try:
            log.append(json.loads(line))
            log[-1]['epoch'], log[-1]['train_loss']
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise models.InputError(f'{folder}/log.txt, line {number} is no JSON object of an epoch') from error
            log = log[:number - 1]
    return Run(name, args, log)


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


# ------------------------------------------------------------------------------------------------------------- the table


def describe_stage(args):
    """What a run did, by its arguments, as in the paper's Table 2: 'generic 300', 'supervised + distillation 500' ..."""
    if 'target' in args:
        what = {'feature': 'generic', 'pixel': 'MAE'}.get(args['target'], f'generic ({args["target"]})')
    else:
        what = {(True, True): 'specific', (True, False): 'fine-tuning', (False, True): 'supervised + distillation',
                (False, False): 'supervised'}[bool(args['finetune']), bool(args['teacher_path'])]
    return f'{what} {args["epochs"]}'


def split_seeds(seeds):
    """([stages] of the seeds that count: last stage there, none unfinished; what the others are doing, as text)."""
    counted, running = [], []
    for stages in seeds:
        unfinished = [run for run in stages if run and not run.finished]
        if unfinished:
            done = unfinished[0].log[-1]['epoch'] + 1 if unfinished[0].log else 0
            running.append(f'{unfinished[0].name}: epoch {done}/{unfinished[0].args["epochs"]}')
        elif stages[-1]:
            counted.append(stages)
    return counted, running


def spread(values):
    """'81.73 ± 0.21 (n = 3)' with the sample's standard deviation; one value stands alone, and none is empty."""
    if not values:
        return ''
    return f'{statistics.mean(values):.2f}' + (f' ± {statistics.stdev(values):.2f}' if values[1:] else '') + \
        f' (n = {len(values)})'


def name_sources(counted):
    """Text: the networks and the log files behind the numbers of a row. counted: see `split_seeds`."""
    runs = [run for stages in counted for run in stages if run]
    networks = dict.fromkeys(f'{run.args["model"]} at {"x".join(map(str, run.args["input_size"]))}' for run in runs)
    accuracy = [f'`{stages[-1].name}/log.txt`' for stages in counted]
    time = [f'`{run.name}/log.txt`' for stages in counted if all(stages) for run in stages]
    return f'{", then ".join(networks)}. Top-1: {", ".join(accuracy)}. Time: {", ".join(time) or "a stage is missing"}.'


NOTE = """Ours: top-1 in percent after the last epoch of finished runs, never of the best epoch; mean ± sample standard
deviation over n seeds. Time: {unit} of training, all stages of the row, without evaluation; G2SD and distillation do not
count that of the teacher, which has a row of its own. The paper's values: ViT-S (teacher ViT-B) on ImageNet-1k."""


def table_2(root, rows):
    """Markdown of the paper's Table 2, and what its numbers rest on. rows: {Row: what `read_row` gave}."""
    split = {row: split_seeds(seeds) for row, seeds in rows.items()}
    # a seed whose first stage is missing has an accuracy but no time
    times = {row: [sum(run.last('train_seconds') for run in stages) for stages in counted if all(stages)]
             for row, (counted, _) in split.items()}
    longest = max(sum(times.values(), [0]))
    unit, size = next(((unit, size) for unit, size in (('hours', 3600), ('minutes', 60)) if longest >= size), ('seconds', 1))
    lines = ['### Table 2: ImageNet classification in the paper, and our runs', '',
             f'| method | our 1st stage | our 2nd stage | paper time | time (ours, {unit}) | paper top-1 | top-1 (ours) |',
             '|---|---|---|---|---|---|---|']
    sources, images = [], set()
    for row, (counted, running) in split.items():
        stages = [' / '.join(sorted({describe_stage(run.args) for run in stage if run})) for stage in zip(*rows[row])]
        top1 = spread([stages[-1].last('test_acc1') for stages in counted])
        lines.append(f'| {row.method} | ' + ' | '.join((stages + ['', ''])[:2] + [
            f'{row.paper_hours} h' if row.paper_hours else '', spread([value / size for value in times[row]]),
            f'{row.paper_top1:.1f}', '; '.join(filter(None, [top1, *running]))]) + ' |')
        if counted:
            images |= {stages[-1].last('test_images') for stages in counted}
            sources.append(f'- {row.method}: {name_sources(counted)}')
    lines += ['', NOTE.format(unit=unit), '']
    ours = [statistics.mean(times[row]) if times[row] else None for row in (G2SD, DEIT_DISTILLED)]
    paper = G2SD.paper_hours, DEIT_DISTILLED.paper_hours
    lines.append(f'- Time of {G2SD.method} / {DEIT_DISTILLED.method}: {paper[0] / paper[1]:.2f} in the paper ({paper[0]} / '
                 f'{paper[1]}); ours: ' + (f'{ours[0] / ours[1]:.2f}' if all(ours) else 'not known yet'))
    lines += [f'- Test images: {", ".join(map(str, sorted(images)))}'] if images else []
    classes = count_classes(root, rows)
    lines += [f'- Chance level: {100 / classes:.2f} % ({classes} classes)'] if classes else []
    return '\n'.join(lines + (['', 'Networks and logs of each row:', '', *sources] if sources else [])) + '\n'


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
        draw.text(((left + right) / 2, (top + bottom) / 2), 'no finished epoch yet', '#555555', font, anchor='mm')
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
                draw.line([(x, y), (x + font.size / 2, y)], curve.colour, 4)
            continue
        pixels = [place(*point) for point in curve.points]
        draw.line(pixels, curve.colour, 5, joint='curve')
        for x, y in pixels if len(pixels) < 10 else pixels[-1:]:
            draw.ellipse((x - 7, y - 7, x + 7, y + 7), curve.colour)


def draw_curves(rows):
    """Picture: test top-1 against all epochs of the student, and the first stage's training loss; a colour per row."""
    accuracy, loss, legend = [], [], []
    for row, seeds in rows.items():
        for stages in seeds:
            before = sum(run.args['epochs'] for run in stages[:-1] if run)
            last = stages[-1].log if stages[-1] else []
            points = [(before + entry['epoch'] + 1, entry['test_acc1']) for entry in last if 'test_acc1' in entry]
            if row.shared:  # the teacher's epochs are other epochs: its level alone can be compared
                points = [(0, points[-1][1])] if points else []
            if points:
                accuracy.append(Curve(points, row.colour, row.shared))
                legend += [row] if row not in legend else []
            if row is G2SD and stages[0] and stages[0].log:
                loss.append(Curve([(entry['epoch'] + 1, entry['train_loss']) for entry in stages[0].log], row.colour))
    k = 2  # drawn twice as large, then reduced: smooth lines
    font = ImageFont.load_default(15 * k)
    image = Image.new('RGB', (1200 * k, (430 + 26 * len(legend)) * k), 'white')
    draw = ImageDraw.Draw(image)
    draw_panel(draw, (0, 0, 730 * k, 420 * k), 'Test top-1, percent', 'epochs, all stages', accuracy, font)
    draw_panel(draw, (750 * k, 0, 1175 * k, 420 * k), 'Generic stage: training loss', 'epochs', loss, font)
    for number, row in enumerate(legend):
        y = (430 + 26 * number) * k
        for x in (60, 85) if row.shared else (60, 70, 80):
            draw.line([(x * k, y), ((x + 15) * k, y)], row.colour, 5)
        text = re.sub(r' \(.*', '', row.method) + (', level of its last epoch' if row.shared else '')
        draw.text((112 * k, y), text, 'black', font, anchor='lm')
    return image.reduce(k)


def get_args_parser():
    parser = argparse.ArgumentParser(description='logs of a folder of runs -> results.md and curves.png', allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('folder', type=Path, help='folder with teacher_mae, teacher_cls and seed<N>/')
    return parser


def main(args):
    if not args.folder.is_dir():
        raise models.InputError(f'there is no folder {args.folder}')
    rows = {row: read_row(args.folder, row) for row in TABLE_2}
    if not any(rows.values()):
        raise models.InputError(f'{args.folder} holds no run: expected teacher_mae, teacher_cls, or seed<N>/ with generic, '
                                'finetuned, g2sd, deit_distilled or deit')
    text = table_2(args.folder, rows)
    print(text, end='')
    (args.folder / 'results.md').write_text(text, encoding='utf-8')
    draw_curves(rows).save(args.folder / 'curves.png')


if __name__ == '__main__':
    try:
        main(get_args_parser().parse_args())
    except models.InputError as error:
        sys.exit(f'error: {error}')
