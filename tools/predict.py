"""What a trained network says about one image: its classes, its objects or the class of each pixel.

Reads:  --checkpoint   of a specific_distill_*.py, or a public classifier (with --model)
        --image        any file that Pillow reads; it is prepared exactly as in evaluation
Writes: --out          of a detector: the image with masks, boxes, names and scores; of a
                       segmentation network: the image in grey under its classes' colours, beside it
                       NAME_labels.png, labels as in annotations/ of the training data
Run:    python tools/predict.py --checkpoint runs/g2sd/checkpoint.pth --image horse.jpg
        python tools/predict.py --checkpoint runs/det_g2sd/checkpoint.pth --image a.jpg --out b.png
Prints a class per line with its probability; an object per line with score, class and box (x0 y0 x1
y1 in pixels of the image), best first; or a class per line with its share of the pixels.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import pil_to_tensor, resize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import models
import specific_distill_cls
import specific_distill_det
import specific_distill_seg


def read_image(path):
    """Image file -> RGB image, as it is stored."""
    try:
        return models.read_rgb(path)
    except models.DataError as error:
        raise SystemExit(str(error)) from error


def check_out(out, images):
    """Ends the program rather than overwrite one of the images."""
    if out.exists() and any(out.samefile(path) for path in images):
        raise SystemExit(f'{out} is one of the images: choose another --out')


# ---- classification ------------------------------------------------------------------------------


def load_classifier(path, name=None, input_size=None):
    """Checkpoint -> (classifier in eval mode on the CPU, its name, (height, width), class names).

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
    return specific_distill_cls.load_classifier(path, name, size, classes), name, size, classes


def classifier_input(image, input_size):
    """RGB image -> (3, H, W), by the transform of a classifier's evaluation."""
    args = argparse.Namespace(input_size=input_size)
    return models.normalise(specific_distill_cls.build_transform(args, is_train=False)(image))


@torch.no_grad()
def show_classes(args):
    """Prints the --topk classes of the image."""
    model, _, size, classes = load_classifier(args.checkpoint, args.model, args.input_size)
    probabilities = model(classifier_input(read_image(args.image), size)[None])[0].softmax(dim=0)
    for value, index in zip(*probabilities.topk(min(args.topk, len(classes)))):
        print(f'{100 * value:6.2f} %  {classes[index]}')


# ---- detection -----------------------------------------------------------------------------------


def read_own(checkpoint, path):
    """(flags, class names) of a checkpoint of our own; other projects' files hold neither."""
    trained, classes = models.own_args(checkpoint), checkpoint.get('classes')
    if not trained or not classes:
        raise SystemExit(f'{path} holds no flags and classes: give a checkpoint of '
                         'specific_distill_det.py or specific_distill_seg.py')
    return argparse.Namespace(**{**trained, 'eval': True}), classes


@torch.no_grad()
def detect(model, image, args, classes, score=0.0):
    """RGB image -> (its objects with at least this score, best first; the best score of all).

    The objects are in COCO's results format, category ids count from 1.
    """
    pixels = specific_distill_det.resize_longest_side(pil_to_tensor(image), args.input_size[0])
    [found] = model([pixels])
    best = max(found['scores'].tolist(), default=0.0)
    found = {key: value[found['scores'] >= score] for key, value in found.items()}
    objects = specific_distill_det.to_results(
        found, 0, pixels.shape[1:], image.size[::-1], range(1, len(classes) + 1))
    return sorted(objects, key=lambda entry: -entry['score']), best


def draw_objects(image, objects, classes):
    """The image with masks, boxes and labels, a colour per object; the best on top."""
    from pycocotools import mask as coco_mask  # classifiers do without it
    picture, long_side = image.copy(), max(image.size)
    line, font = max(1, long_side // 400), ImageFont.load_default(max(11, long_side // 50))
    # the golden ratio keeps the hues of neighbours in the list apart; black is readable on all
    colours = [f'hsv({360 * 0.618 * k % 360:.0f}, 60%, 100%)' for k in range(len(objects))]
    for entry, colour in reversed(list(zip(objects, colours))):
        opacity = coco_mask.decode(entry['segmentation']) * 128  # of 255
        picture.paste(colour, mask=Image.fromarray(opacity))
    draw = ImageDraw.Draw(picture)
    for entry, colour in reversed(list(zip(objects, colours))):
        x, y, width, height = entry['bbox']
        corners = x - line, y - line, x + width + line, y + height + line
        draw.rectangle(corners, outline=colour, width=line)
        text = f'{classes[entry["category_id"] - 1]} {entry["score"]:.2f}'
        # above the box, inside the picture
        place = max(0, min(x, image.width - draw.textlength(text, font))), max(font.size, y - line)
        draw.rectangle(draw.textbbox(place, text, font, anchor='lb'), colour)
        draw.text(place, text, 'black', font, anchor='lb')
    return picture


def show_objects(args, checkpoint):
    """Prints the objects of the image with at least --score, and draws them into --out."""
    trained, classes = read_own(checkpoint, args.checkpoint)
    check_out(args.out, [args.image])
    image = read_image(args.image)
    model = specific_distill_det.load_detector(args.checkpoint, classes, trained)
    objects, best = detect(model, image, trained, classes, args.score)
    for entry in objects:
        x, y, width, height = entry['bbox']
        print(f'{entry["score"]:.3f}  {classes[entry["category_id"] - 1]}  '
              f'{x:.1f} {y:.1f} {x + width:.1f} {y + height:.1f}')
    draw_objects(image, objects, classes).save(args.out)
    print(f'{args.out}: {len(objects)} objects of score {args.score:g} or more, the best has '
          f'{best:.3f}')


# ---- segmentation --------------------------------------------------------------------------------


@torch.no_grad()
def segment(model, image, args):
    """RGB image -> (H, W) uint8, the class of each of its pixels from 0."""
    size, short = image.size[::-1], args.input_size[0]
    pixels = resize(pil_to_tensor(image), specific_distill_seg.scaled_size(size, short))
    logits = specific_distill_seg.slide(model, models.normalise(pixels)[None], short)
    return specific_distill_seg.resize(logits, size).argmax(dim=1)[0].byte().numpy()


def class_colour(index):
    """RGB of a class, the same in all pictures; neighbours in the list have other hues."""
    saturation, value = ((95, 100), (95, 70), (45, 100), (60, 75), (100, 85))[index // 7 % 5]
    return ImageColor.getrgb(f'hsv({360 * 0.618034 * index % 360}, {saturation}%, {value}%)')


def draw_segments(image, prediction, present, classes):
    """The image in grey under its classes' colours; a legend of the classes `present` beside it."""
    regions = Image.fromarray(prediction)
    palette = [class_colour(k) for k in range(len(classes))]
    regions.putpalette(np.array(palette, np.uint8).tobytes())
    blended = Image.blend(image.convert('L').convert('RGB'), regions.convert('RGB'), 0.5)
    font = ImageFont.load_default(max(11, max(image.size) // 50))
    line = round(1.4 * font.size)
    width = 2 * line + max(round(font.getlength(classes[k])) for k in present)
    size = image.width + width, max(image.height, line * len(present))
    picture = Image.new('RGB', size, 'white')
    picture.paste(blended)
    draw = ImageDraw.Draw(picture)
    for row, k in enumerate(present):
        x, y = image.width + line // 4, row * line
        draw.rectangle((x, y + line // 8, x + line, y + line - line // 8), palette[k])
        draw.text((x + line + line // 4, y + line // 2), classes[k], 'black', font, anchor='lm')
    return picture


def show_segments(args, checkpoint):
    """Prints the shares of the classes, draws them into --out, and writes their labels."""
    trained, classes = read_own(checkpoint, args.checkpoint)
    labels = args.out.with_name(f'{args.out.stem}_labels.png')
    check_out(args.out, [args.image])
    check_out(labels, [args.image])
    image = read_image(args.image)
    model = specific_distill_seg.load_segmenter(args.checkpoint, classes, trained)
    prediction = segment(model, image, trained)
    counts = np.bincount(prediction.ravel(), minlength=len(classes))
    present = [k for k in np.argsort(-counts, kind='stable') if counts[k]]
    for k in present:
        print(f'{100 * counts[k] / counts.sum():6.2f} %  {classes[k]}')
    draw_segments(image, prediction, present, classes).save(args.out)
    Image.fromarray(prediction + np.uint8(trained.reduce_zero_label)).save(labels)
    print(f'{args.out}: {len(present)} classes; labels in {labels}')


def get_args_parser():
    parser = argparse.ArgumentParser(
        description='top classes, objects or labelled pixels of an image', allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--checkpoint', required=True,
                        help='classifier, detector or segmentation network, path or https URL')
    parser.add_argument('--image', required=True, help='image file')
    parser.add_argument('--out', type=Path, help='picture to write (not of a classifier); by default '
                                                 'NAME_pred.png in the current folder')
    parser.add_argument('--score', type=float, default=0.5,
                        help='detectors: smallest score to show; they keep none under 0.05')
    parser.add_argument('--topk', type=int, default=5, help='classifiers: classes to print')
    parser.add_argument('--model', help='classifiers: name, for files that do not hold it')
    parser.add_argument('--input_size', type=int, nargs='+',
                        help='classifiers: pixels, one side or two; as the checkpoint says, else 224')
    return parser


def main(args):
    args.out = args.out or Path(f'{Path(args.image).stem}_pred.png')
    checkpoint = models.read_checkpoint(args.checkpoint)
    state = models.flat_state_dict(checkpoint, args.checkpoint)
    if 'rpn.head.cls_logits.weight' in state:
        show_objects(args, checkpoint)
    elif 'decode_head.conv_seg.weight' in state:
        show_segments(args, checkpoint)
    else:
        show_classes(args)


if __name__ == '__main__':
    main(get_args_parser().parse_args())
