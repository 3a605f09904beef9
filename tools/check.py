"""Is my data, is my teacher right? Reads everything once, before training, and says what is wrong.

Flags are those of the training command. Prints what training has of each class, how well a stage-1
teacher reconstructs, and findings with their number and an example: an error ends training or makes
it learn something else than meant (exit status 1), a warning may, a note is unusual but dealt with.
Writes --out: training samples as they are read and, below, as they are augmented; nothing else.
Run:  python tools/check.py --stage generic --data_path IMAGENET --teacher_path mae.pth
"""
import argparse
import contextlib
import copy
import hashlib
import importlib
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest.mock import Mock, patch

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms.v2.functional import InterpolationMode, pil_to_tensor, resize
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import models
import predict
from benchmark import SCRIPTS, Measured
from visualize import to_pixels

LEVELS = ('error', 'warning', 'note')


class Findings(dict):
    """(level, text) -> [number, example]; (split, class) -> [images, objects or pixels, file]."""

    def add(self, key, text, example='', count=1):
        self.setdefault((key, text), [0, example])[0] += count


def list_items(script, args, split, findings):
    """[(image file, split, its label file, or its COCO entry and those of its objects)]."""
    if args.stage == 'seg':
        pairs, unused = script.list_pairs(args.data_path, split)
        findings.add('warning', 'labels without an image: not read', f'of {split}', unused)
        return [(image, split, label) for image, label in pairs]
    if args.stage == 'det':
        path, folder = script.coco_paths(args, split)
        coco, left_out = script.read_coco(path, split == 'train')
        script.CocoDataset(coco, folder, args, is_train=False)  # finds names with accents
        for reason, count in left_out.items():
            level = 'note' if reason == 'crowds' else 'warning'
            findings.add(level, f'objects left out: {reason}', path, count)
        for kind in ('images', 'categories'):
            count = len(coco[kind]) - len({entry['id'] for entry in coco[kind]})
            findings.add('error', f'ids of {kind} that stand twice', path, count)
        names = {entry['id']: entry['name'] for entry in coco['categories']}
        objects = {image['id']: [] for image in coco['images']}
        for entry in coco['annotations']:
            objects[entry['image_id']].append(entry)
            findings.add(split, names[entry['category_id']], path)
        return [(Path(folder, image['file_name']), split, (image, objects[image['id']]))
                for image in coco['images']]
    folder = Path(args.data_path or 'none')
    folder /= split if args.stage == 'cls' or (folder / split).is_dir() else ''
    found = make_dataset(folder, {'': 0}, IMG_EXTENSIONS, allow_empty=True)
    for path, _ in found:
        parts = Path(path).relative_to(folder).parts
        findings.add(split, parts[0], path)
        if any(part.startswith('.') for part in parts):
            findings.add('error', 'hidden images, or of a hidden class: remove them', path)
    return [(Path(path), split, None) for path, _ in found]


def inspect(script, args, path, split, truth):
    """Yields (level, text) of what is unusual, (split, class, pixels) of a label, a hash."""
    image = models.open_image(path)
    size, turned = image.size[::-1], image.getexif().get(0x0112, 1)  # orientation
    sizes = size, (image.size if turned > 4 else size)
    if image.mode != 'RGB':
        yield 'note', f'images of mode {image.mode}: made RGB; of 16 bits the upper 8 are kept'
    if turned > 1:
        level = 'note' if args.stage in ('det', 'seg') else 'warning'
        yield level, 'images with an EXIF orientation: detection and segmentation alone apply it'
    if args.stage == 'det':
        size = truth[0]['height'], truth[0]['width']
        for entry in truth[1]:
            x, y, w, h = entry['bbox']
            around = script.segmentation_box(entry['segmentation'])
            if min(x, y) < -1 or x + w > size[1] + 1 or y + h > size[0] + 1:
                yield 'warning', 'boxes that leave the image'
            if around[2] * around[3] < 10:
                yield 'warning', 'empty or tiny segmentations, of less than 10 pixels'
            elif script.box_iou(entry['bbox'], around) < 0.5:
                yield 'warning', 'boxes unlike their segmentations: x, y, width, height?'
    if args.stage == 'seg':
        label = script.read_label(truth, args.reduce_zero_label)
        size, values = tuple(label.shape), label.flatten().bincount().tolist()
        yield from ((split, value, count) for value, count in enumerate(values) if count)
    if size not in sizes:
        yield 'error', 'images of another size than their annotations: mend one or remove both'
    yield f'file of {split}', hashlib.blake2b(path.read_bytes(), digest_size=8).digest()


def read_item(args, item):
    """Arguments of `Findings.add` about an image file and what belongs to it."""
    script, path = importlib.import_module(SCRIPTS[args.stage]), item[0]
    try:
        return [(key, text, path, *count) for key, text, *count in inspect(script, args, *item)]
    except Exception as error:  # decoders raise nearly anything
        return [('error', f'unreadable files ({type(error.__cause__ or error).__name__})', error)]


def rehearse(script, args, findings):
    """The stage's main() up to its first epoch -> training loader, class names, teacher, if any."""
    def count_labels(pairs, _):  # they have been read
        split = pairs[0][0].parent.name
        return torch.tensor([findings.get((split, value), [0])[0] for value in range(256)])

    seen, build, stop = [], script.build_data, Mock(side_effect=Measured)
    replaced = {'build_data': lambda *inputs: seen.append(build(*inputs)) or seen[0],
                'count_labels': count_labels, 'train_one_epoch': stop, 'evaluate': stop,
                'request_stop': script.signal.SIG_DFL}
    with tempfile.TemporaryDirectory() as args.output_dir, \
            contextlib.redirect_stdout(Mock()), patch.multiple(script, create=True, **replaced):
        try:
            script.main(args)
        except (Measured, models.DataError):
            pass  # bad files have been found
        except (SystemExit, Exception) as error:
            findings.add('error', str(error) if isinstance(error, SystemExit) else repr(error))
    loader, *_, classes = seen[0] if seen and args.stage != 'generic' else (*seen, None, [])
    return loader, classes, stop.called and stop.call_args.args[1]


def report(args, splits, classes, findings):
    """Prints what training has of each class; adds what is known only when all files are read."""
    keys = [*range(len(classes)), 255] if args.stage == 'seg' else classes
    counts = {name: findings.get((splits[0], key), [0])[0]
              for key, name in zip(keys, [*classes, 'ignored'])}
    total = max(1, sum(counts.values()))
    words = [f'{name} {count} ({count / total:.1%})' for name, count in counts.items()]
    print(f'{splits[0]}:', ', '.join(words)[:4000])
    for name in [name for name in classes if not counts[name]]:
        findings.add('warning', 'classes that training has nothing of', name)
    if counts.get('ignored', 0) > 0.3 * total:
        findings.add('warning', 'training pixels that are ignored', count=counts['ignored'])
    for (key, text), (count, path) in list(findings.items()):
        twin = f'file of {splits[0]}', text
        if key == f'file of {splits[-1]}' != twin[0] and twin in findings:
            findings.add('warning', 'validation images that stand in training, too',
                         f'{path} is {findings[twin][1]}', count)
        if args.stage == 'seg' and key in splits and text not in keys:
            findings.add('error', f'pixels beyond the {len(classes)} classes: --nb_classes, '
                         '--reduce_zero_label?', f'{text + args.reduce_zero_label} in {path}', count)


def take_samples(dataset, count=16):
    """Samples spread over a data set, without unreadable ones."""
    for index in torch.linspace(0, len(dataset) - 1, count).int().unique().tolist():
        with contextlib.suppress(models.DataError):
            yield dataset[0, index]


@torch.no_grad()
def check_mae(script, args, teacher, dataset, findings):
    """Prints the loss of a stage-1 teacher; a finding if its decoder has not learnt such images."""
    images, noise = map(torch.stack, zip(*(image for image, _ in take_samples(dataset, 32))))
    images, masking = models.normalise(images), models.random_masking(noise, args.mask_ratio)
    pixels, shares = teacher.patchify(images), []
    untrained = models.create_mae(args.teacher_model, args.input_size)
    for name in ('patch_embed', 'cls_token', 'blocks', 'norm'):  # the same encoder
        setattr(untrained, name, getattr(teacher, name))
    preds = [network(images, masking) for network in (teacher, untrained)]
    for norm, space in ((True, 'normalised'), (False, 'plain')):
        constant = torch.zeros_like(pixels) if norm else pixels.mean((0, 1)).expand_as(pixels)
        losses = [script.pixel_loss(x, pixels, masking.mask, norm) for x in (*preds, constant)]
        print('teacher, {} pixels of hidden patches: loss {:.3f}, of an untrained decoder {:.3f}, '
              'of the best constant {:.3f}'.format(space, *losses))
        shares.append(losses[0] / losses[2])
    if not min(shares) < 0.95:  # a sound decoder of small images may be at 0.9
        findings.add('error', 'teacher no better than a constant prediction', args.teacher_path)


def draw(stage, image, truth, classes, legend):
    """A sample of the stage's data set -> its picture; adds its classes to the legend."""
    palette = [predict.class_colour(k) for k in range(len(classes))]
    if stage == 'generic':
        return predict.fit(image[0] if isinstance(image, tuple) else image)
    if stage == 'seg':
        image = torch.from_numpy(to_pixels(image[None])[0]).permute(2, 0, 1)
        truth = resize(truth[None], image.shape[1:], InterpolationMode.NEAREST_EXACT)[0]
        legend |= {classes[k]: palette[k] for k in truth.unique().tolist() if k < len(classes)}
        return predict.draw_labels(image, truth, palette)
    if stage == 'cls':  # a frame with the name
        frame = torch.tensor([[0, 0, *image.shape[:0:-1]]])
        truth = {'boxes': frame, 'labels': frame[:, 0] + truth + 1, 'masks': image[:0]}
    names = [classes[k - 1] for k in truth['labels']]
    colours = [palette[k - 1] for k in truth['labels']]
    legend |= zip(names, colours)
    return predict.draw_objects(image, truth['boxes'], truth['masks'] > 127, names, colours)


def draw_sheet(script, args, augmented, classes, out, columns=8):
    """Rows of training samples, each above them augmented."""
    plain, legend, panels = copy.copy(augmented), {}, []
    plain.dataset = copy.copy(plain.dataset)
    plain.dataset.transform, plain.dataset.is_train = pil_to_tensor, args.stage == 'det'
    whole = Mock(side_effect=lambda *size: ((0, 0, *size[:2]), size[:2], False))
    with patch.object(script, 'draw_jitter', whole, create=True):  # of detection
        rows = [[draw(args.stage, *sample, classes, legend) for sample in take_samples(plain)]]
    rows.append([draw(args.stage, *sample, classes, legend) for sample in take_samples(augmented)])
    for start in range(0, len(rows[0]), columns):
        for pictures, caption in zip(rows, ('as read', 'augmented')):
            for number, picture in enumerate(pictures[start:start + columns], start + 1):
                panels.append((picture, f'{number}, {caption}'))
    predict.save_grid(out, panels, min(columns, len(rows[0])), legend.items())


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument('--stage', choices=SCRIPTS, required=True, help='whose data it is')
    parser.add_argument('--out', type=Path, default='check.png', help='picture, default: check.png')
    return parser


def main(options, words):
    predict.check_out(options.out, [])
    script, findings, items = importlib.import_module(SCRIPTS[options.stage]), Findings(), []
    sys.argv[1:] = words
    args = script.parse_args(script.get_args_parser())
    args.stage, args.device, args.batch_size, args.accum_iter = options.stage, 'cpu', 2, 1
    splits = [getattr(args, f'{split}_split', split) for split in ('train', 'val')]
    if args.stage == 'generic':
        splits, args.target = splits[:1], args.target if args.teacher_path else 'pixel'
    for split in splits:
        with contextlib.suppress(SystemExit, Exception):  # `rehearse` meets it, too
            items += list_items(script, args, split, findings)
    with ProcessPoolExecutor(max(1, args.num_workers)) as pool:
        results = pool.map(read_item, [args] * len(items), items, chunksize=32)
        for found in tqdm(results, total=len(items)):
            for finding in found:
                findings.add(*finding)
    loader, classes, teacher = rehearse(script, args, findings)
    if items and loader and classes:
        report(args, splits, classes, findings)
    if args.stage == 'generic' and teacher:
        check_mae(script, args, teacher, loader.dataset, findings)
    rows = [(LEVELS.index(key), -count, text, example)
            for (key, text), (count, example) in findings.items() if key in LEVELS and count]
    lines = [f'{LEVELS[level]:8}{-count:8}  {text}' + f'\n{"":18}e.g. {example}' * bool(example)
             for level, count, text, example in sorted(rows, key=lambda row: row[:2])]
    print('\n'.join(lines) or 'nothing found')
    if loader:
        draw_sheet(script, args, loader.dataset, classes, options.out)
    return int(any(level == 0 for level, *_ in rows))


if __name__ == '__main__':
    sys.exit(main(*get_args_parser().parse_known_args()))
