"""What a trained network says about images: their classes, objects or the class of each pixel.

Reads:  --checkpoint   of a specific_distill_*.py, or a public classifier (with --model)
        --images       files or folders; prepared as in evaluation, but first turned by their EXIF
                       orientation, as viewers do (evaluation of a stage does not)
        --annotations  ground truth to draw beside: of a detector a COCO file, of a segmentation
                       network a folder of label PNGs named as the images
Writes: --out          NAME.png, not of a classifier: a row for each of the first 16 images, of the
                       image or its ground truth and the prediction
        NAME_labels/   label PNGs of a segmentation network, as in the training data's annotations/
Run:    python tools/predict.py --checkpoint runs/g2sd/checkpoint.pth --images horse.jpg
        python tools/predict.py --checkpoint runs/det_g2sd/checkpoint.pth --images a.jpg b.jpg \
        --annotations COCO/annotations/instances_val2017.json --out ab.png
Prints a class per line with its probability; an object per line with score, class and box (x0 y0 x1
y1 in pixels of the image), best first; or a class per line with its share of the pixels.
"""
import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image, ImageColor, ImageFont
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.ops import box_convert
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import pil_to_tensor, resize, rgb_to_grayscale
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import models
import specific_distill_cls
import specific_distill_det
import specific_distill_seg

ROWS = 16             # of a picture, at most
SIDE, TEXT = 640, 20  # pixels: about an image's long side in a picture, height of its names
FONT = str(Path(matplotlib.get_data_path(), 'fonts/ttf/DejaVuSans.ttf'))


def list_images(words):
    """Files and folders -> files; of a folder its images, by name."""
    paths = []
    for path in map(Path, words):
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in IMG_EXTENSIONS)
        if not found:
            raise SystemExit(f'{path} holds no images: give another folder')
        paths += found
    return paths


def read_image(path, size=None):
    """Image file -> RGB image, turned by its EXIF orientation; size: see `models.read_rgb`."""
    image = models.read_rgb(path, size or ())
    if size and tuple(size) != image.size[::-1]:
        raise models.DataError(f'{path} is {image.height} high and {image.width} wide, its '
                               f'annotations say {size[0]} and {size[1]}: mend the annotations')
    return image


def check_out(out, inputs):
    """Ends the program rather than overwrite one of the inputs, images or annotations."""
    if out.suffix.lower() != '.png':
        raise SystemExit(f'--out {out}: give a name that ends in .png')
    if out.exists() and any(Path(path).exists() and out.samefile(path) for path in inputs):
        raise SystemExit(f'{out} is one of the images or annotations: choose another --out')


def class_colour(index):
    """RGB of a class, the same in all pictures; neighbours in the list have other hues."""
    saturation, value = ((95, 100), (95, 70), (45, 100), (60, 75), (100, 85))[index // 7 % 5]
    return ImageColor.getrgb(f'hsv({360 * 0.618034 * index % 360}, {saturation}%, {value}%)')


def fit(pixels, mode=InterpolationMode.BILINEAR):
    """(C, H, W) uint8 -> the same with a long side of about SIDE pixels."""
    factor = SIDE / max(pixels.shape[1:])
    if factor >= 2:  # pixels of small images stay sharp
        factor, mode = int(factor), InterpolationMode.NEAREST_EXACT
    return resize(pixels, [max(1, round(side * factor)) for side in pixels.shape[1:]], mode)


def draw_objects(image, boxes, masks, names, colours):
    """Image (3, H, W) uint8 -> `fit` of it under its objects, the last on top.

    boxes: (N, 4) xyxy; masks: N of (H, W) bool, taken one by one; names; colours: RGB.
    """
    picture = fit(image)
    if not names:
        return picture
    for mask, colour in zip(masks, colours):
        picture = draw_segmentation_masks(picture, fit(255 * mask[None].byte()) > 127, 0.5, colour)
    height, width = picture.shape[1:]
    boxes = boxes * torch.tensor([width / image.shape[2], height / image.shape[1]] * 2)
    boxes = boxes.clamp(min=0).minimum(torch.tensor([width - 1, height - 1] * 2))
    picture = draw_bounding_boxes(picture, boxes, colors=colours, width=3)
    # torchvision writes a name into its box, where it hides a small object or is cut off by the
    # border: boxes of no size are the places of the names, above the objects
    lengths = torch.tensor([ImageFont.truetype(FONT, TEXT).getlength(name) for name in names])
    x = boxes[:, 0].minimum(width - lengths - 4).clamp(min=0)
    y = (boxes[:, 1] - 1.3 * TEXT).clamp(min=0)
    light = [np.dot(colour, (0.3, 0.59, 0.11)) > 110 for colour in colours]
    return draw_bounding_boxes(
        picture, torch.stack([x, y, x, y], dim=1), names, colours, font=FONT, font_size=TEXT,
        fill_labels=True, label_colors=['black' if bright else 'white' for bright in light])


def draw_labels(image, labels, palette):
    """Image (3, H, W) uint8 -> `fit` of it in grey under the colours of its classes.

    labels: (H, W) uint8; palette: RGB of each class. Other labels, such as 255, have no colour.
    """
    picture = rgb_to_grayscale(fit(image), 3)
    labels = fit(labels[None], InterpolationMode.NEAREST_EXACT)
    present = [k for k in labels.unique().tolist() if k < len(palette)]
    masks = labels == torch.tensor(present)[:, None, None]
    return draw_segmentation_masks(picture, masks, 0.5, [palette[k] for k in present])


def save_grid(out, panels, columns, legend=()):
    """Writes panels row by row, each (picture (3, H, W) uint8, caption); legend: of (name, RGB)."""
    figure, top = Figure(figsize=(1, 1), dpi=100), 0
    cell = max(picture.shape[2] for picture, _ in panels) + 16
    for start in range(0, len(panels), columns):
        row = panels[start:start + columns]
        for column, (picture, caption) in enumerate(row):
            height, width = picture.shape[1:]
            # in units of the figure, 100 pixels; what is saved grows with the content
            axes = figure.add_axes(np.array([cell * column, top - height, width, height]) / 100)
            axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation='nearest')
            axes.set_title(caption, loc='left', fontsize=14, parse_math=False)
            axes.axis('off')
        top -= max(picture.shape[1] for picture, _ in row) + 36
    figure.legend([Patch(color=np.divide(colour, 255)) for _, colour in legend],
                  [name for name, _ in legend], fontsize=14, frameon=False, loc='upper left',
                  borderaxespad=0, bbox_to_anchor=(cell * columns / 100, 0))
    figure.savefig(out, bbox_inches='tight')


def load_classifier(path, name=None, input_size=None):
    """Checkpoint -> (classifier in eval mode on the CPU, (height, width), class names).

    name and input_size override the checkpoint's own; public files have none.
    """
    checkpoint = models.read_checkpoint(path)
    state, trained = models.flat_state_dict(checkpoint, path), models.own_args(checkpoint)
    if 'head.weight' not in state:
        raise SystemExit(f'{path} holds no classifier: give a checkpoint of stage 2')
    name = name or trained.get('model')
    if name is None:
        raise SystemExit(f'{path} does not name its network: give --model, e.g. vit_base_patch16')
    size = models.check_img_size(input_size or trained.get('input_size', 224),
                                 models.parse_name(name).patch)
    numbers = range(len(state['head.weight']))
    classes = checkpoint.get('classes') or [f'class {number}' for number in numbers]
    return specific_distill_cls.load_classifier(path, name, size, classes), size, classes


def classifier_input(image, input_size):
    """RGB image -> (3, H, W), by the transform of a classifier's evaluation."""
    args = argparse.Namespace(input_size=input_size)
    return models.normalise(specific_distill_cls.build_transform(args, is_train=False)(image))


@torch.no_grad()
def show_classes(args, paths):
    """Yields for each image the lines of its --topk classes, and nothing to draw."""
    model, size, classes = load_classifier(args.checkpoint, args.model, args.input_size)
    for path in paths:
        probabilities = model(classifier_input(read_image(path), size)[None])[0].softmax(dim=0)
        best = zip(*probabilities.topk(min(args.topk, len(classes))))
        yield [f'{100 * value:6.2f} %  {classes[index]}' for value, index in best], [], {}


def find_truth(coco, path):
    """`read_coco`'s annotations -> (height, width) of an image, its objects by class from 0."""
    name = path.absolute().as_posix()
    images = [entry for entry in coco['images'] if name.endswith(f'/{entry["file_name"]}')]
    if len(images) != 1:
        raise SystemExit(f'{path}: --annotations lists {len(images)} images of this name, not one')
    numbers = {entry['id']: k for k, entry in enumerate(coco['categories'])}
    objects = [{**entry, 'category_id': numbers[entry['category_id']]}
               for entry in coco['annotations'] if entry['image_id'] == images[0]['id']]
    return (images[0]['height'], images[0]['width']), objects


def draw_coco(image, objects, classes):
    """`draw_objects` of COCO's format, with classes from 0 as `category_id`."""
    from pycocotools.coco import COCO  # classifiers do without it
    size, names, colours = image.shape[1:], [], []
    for entry in objects:
        score = f' {entry["score"]:.2f}' if 'score' in entry else ''
        names.append(classes[entry['category_id']] + score)
        colours.append(class_colour(entry['category_id']))
    boxes = torch.tensor([entry['bbox'] for entry in objects]).reshape(-1, 4)
    # generators: a hundred masks of a large photograph take gigabytes
    coco = COCO()
    coco.imgs = {entry['image_id']: dict(zip(('height', 'width'), size)) for entry in objects}
    masks = (torch.from_numpy(coco.annToMask(entry)).bool() for entry in objects)
    return draw_objects(image, box_convert(boxes, 'xywh', 'xyxy'), masks, names, colours)


@torch.no_grad()
def show_objects(args, paths, trained, classes):
    """Yields for each image the lines of its objects of at least --score, and two panels."""
    coco = None
    if args.annotations:
        coco, _ = specific_distill_det.read_coco(args.annotations, is_train=True)  # without crowds
        names = [entry['name'] for entry in coco['categories']]
        models.check_classes(classes, names, args.checkpoint)
    model = specific_distill_det.load_detector(args.checkpoint, classes, trained)
    for path in paths:
        size, true_objects = find_truth(coco, path) if coco else (None, [])
        image = pil_to_tensor(read_image(path, size))
        pixels = specific_distill_det.resize_longest_side(image, trained.input_size[0])
        [found] = model([pixels])
        best = max(found['scores'].tolist(), default=0)
        found = {key: value[found['scores'] >= args.score] for key, value in found.items()}
        objects = specific_distill_det.to_results(
            found, 0, pixels.shape[1:], image.shape[1:], range(len(classes)))
        objects.sort(key=lambda entry: -entry['score'])
        lines = []
        for entry in objects:
            x, y, width, height = entry['bbox']
            lines.append(f'{entry["score"]:.3f}  {classes[entry["category_id"]]}  '
                         f'{x:.1f} {y:.1f} {x + width:.1f} {y + height:.1f}')
        lines.append(f'{len(objects)} objects of score {args.score:g} or more, '
                     f'the best has {best:.3f}')
        left = draw_coco(image, true_objects, classes)
        objects.reverse()  # the best on top
        yield lines, [left, draw_coco(image, objects, classes)], {}


def segment(model, image, short):
    """Image (3, H, W) uint8 -> (H, W) uint8, the class of each of its pixels from 0."""
    size = image.shape[1:]
    pixels = resize(image, specific_distill_seg.scaled_size(size, short))
    logits = specific_distill_seg.slide(model, models.normalise(pixels)[None], short)
    return specific_distill_seg.resize(logits, size).argmax(dim=1)[0].byte()


@torch.no_grad()
def show_segments(args, paths, trained, classes):
    """Yields for each image the lines of its classes, two panels, {name: RGB}; writes labels."""
    names = [f'{path.stem}.png' for path in paths]
    if len(set(names)) < len(names):
        raise SystemExit('two images have the same name but for the ending: rename one')
    files = [args.out.with_name(f'{args.out.stem}_labels') / name for name in names]
    true_files = [Path(args.annotations, name) for name in names if args.annotations]
    for file in files:
        check_out(file, [*paths, *true_files])
    model = specific_distill_seg.load_segmenter(args.checkpoint, classes, trained)
    palette = [class_colour(k) for k in range(len(classes))]
    for number, (path, file) in enumerate(zip(paths, files)):
        true, size = None, None
        if true_files:
            true = specific_distill_seg.read_label(true_files[number], trained.reduce_zero_label)
            size = true.shape
        image = pil_to_tensor(read_image(path, size))
        labels = segment(model, image, trained.input_size[0])
        file.parent.mkdir(exist_ok=True)
        Image.fromarray((labels + trained.reduce_zero_label).numpy()).save(file)
        counts = labels.flatten().bincount(minlength=len(classes))
        present = [k for k in counts.argsort(descending=True, stable=True).tolist() if counts[k]]
        lines = [f'{100 * counts[k] / counts.sum():6.2f} %  {classes[k]}' for k in present]
        lines.append(f'labels: {file}')
        left = fit(image)
        if true_files:
            left = draw_labels(image, true, palette)
            present += [k for k in true.unique().tolist() if k < len(classes)]
        legend = {classes[k]: palette[k] for k in present}
        yield lines, [left, draw_labels(image, labels, palette)], legend


def get_args_parser():
    parser = argparse.ArgumentParser(
        description='top classes, objects or labelled pixels of images', allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--checkpoint', required=True,
                        help='classifier, detector or segmentation network, path or https URL')
    parser.add_argument('--images', nargs='+', required=True, help='image files or folders')
    parser.add_argument('--annotations', help='ground truth to draw beside, not of a classifier: COCO '
                                              'file, or folder of label PNGs')
    parser.add_argument('--out', type=Path, help='picture to write, not of a classifier; by default '
                                                 'NAME_pred.png in the current folder')
    parser.add_argument('--score', type=float, default=0.5,
                        help='detectors: smallest score to show; they keep none under 0.05')
    parser.add_argument('--topk', type=int, default=5, help='classifiers: classes to print')
    parser.add_argument('--model', help='classifiers: name, for files that do not hold it')
    parser.add_argument('--input_size', type=int, nargs='+',
                        help='classifiers: pixels, one side or two; as the checkpoint says, else 224')
    return parser


def main(args):
    paths, checkpoint = list_images(args.images), models.read_checkpoint(args.checkpoint)
    state = models.flat_state_dict(checkpoint, args.checkpoint)
    trained, classes = models.own_args(checkpoint), checkpoint.get('classes')
    is_detector = 'rpn.head.cls_logits.weight' in state
    if is_detector or 'decode_head.conv_seg.weight' in state:
        if not trained or not classes:  # torchvision's detectors have the same names
            raise SystemExit(f'{args.checkpoint} holds no flags and classes: give a checkpoint of '
                             'specific_distill_det.py or specific_distill_seg.py')
        args.out = args.out or Path(f'{paths[0].stem}_pred.png')
        check_out(args.out, [*paths, args.annotations or ''])
        args.out.parent.mkdir(parents=True, exist_ok=True)
        show = show_objects if is_detector else show_segments
        results = show(args, paths, argparse.Namespace(**{**trained, 'eval': True}), classes)
    elif args.out or args.annotations:
        raise SystemExit('a classifier draws no picture: leave out --out and --annotations')
    else:
        results = show_classes(args, paths)
    panels, legend = [], {}
    for path, (lines, pictures, colours) in zip(paths, results):
        for line in lines:
            print(f'{path}: {line}' if len(paths) > 1 else line)
        if len(panels) < 2 * ROWS:
            caption = f'{path.name}, ground truth' if args.annotations else path.name
            panels += zip(pictures, (caption, 'prediction'))
            legend |= colours
    if panels:
        save_grid(args.out, panels, columns=2, legend=legend.items())
        print(f'{args.out}: {len(panels) // 2} of {len(paths)} images')


if __name__ == '__main__':
    try:
        main(get_args_parser().parse_args())
    except models.DataError as error:
        sys.exit(str(error))
