"""What a trained network says about one image: its classes, its objects or the class of each pixel, printed and drawn.

Reads:  --checkpoint   checkpoint.pth of a specific_distill_*.py, or a public classifier (give its --model then)
        --image        any file that Pillow reads; it is prepared exactly as in evaluation
Writes: --out, of a detector: the image in its own size with masks, boxes, names and scores
        --out, of a segmentation network: the image in its own size, in grey under the classes' colours, a legend beside
        it; and NAME_labels.png with the label of each pixel, as in annotations/ of the training data
Run:    python tools/predict.py --checkpoint runs/cifar10/seed0/g2sd/checkpoint.pth --image horse.jpg
        python tools/predict.py --checkpoint runs/imagenet/seed0/det_g2sd/checkpoint.pth --image street.jpg --out found.png
        python tools/predict.py --checkpoint runs/imagenet/seed0/seg_g2sd/checkpoint.pth --image street.jpg
Prints a class per line with its probability; or an object per line with score, class and box (x0 y0 x1 y1 in pixels of
the image), best first; or a class per line with its share of the pixels, largest first.
"""
import argparse
import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageColor, ImageDraw, ImageFilter, ImageFont
from torchvision.transforms.v2.functional import pil_to_tensor, resize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import models
import specific_distill_cls
import specific_distill_det
import specific_distill_seg

MARK = 'G2SD tools/predict.py'  # in a picture's EXIF, as its software: a picture of ours may be drawn again


def open_image(path):
    """Image file -> RGB image, as it is stored; raises InputError if Pillow cannot read it."""
    try:
        file = models.open_image(path)
        turn, image = file.getexif().get(ExifTags.Base.Orientation, 1), models.to_rgb(file)
    except Exception as error:  # decoders raise nearly anything on a damaged file
        raise models.InputError(f'cannot read the image {path}: {str(error) or type(error).__name__}') from error
    if turn != 1:
        models.say(f'note: {path} is stored turned (EXIF orientation {turn}) and stays so, as in evaluation')
    return image


def read_image(path, args):
    """Image file -> normalised (3, H, W), by the transform of a classifier's evaluation. Raises InputError."""
    return models.normalise(specific_distill_cls.build_transform(args, is_train=False)(open_image(path)))


def load_classifier(path, model_name=None, input_size=None, checkpoint=None):
    """Checkpoint file or https URL -> (classifier in eval mode on the CPU, its arguments as a Namespace, class names).

    model_name and input_size (one side, or height and width) override the checkpoint's own and stand in where it has
    none, as in public files; their class names are None. checkpoint: the file's content, if it is read already. Raises
    InputError.
    """
    checkpoint = models.read_checkpoint(path) if checkpoint is None else checkpoint
    state = dict(models.flat_state_dict(checkpoint, path))
    # arguments stored by other projects (MAE, DeiT) name their networks and sizes differently: not read
    args = argparse.Namespace(**models.stored_args(checkpoint))
    args.model = model_name or getattr(args, 'model', None)
    args.input_size = ((input_size or getattr(args, 'input_size', [224])) * 2)[:2]
    if args.model is None:
        raise models.InputError(f'{path} does not name its network: give --model, for example vit_base_patch16')
    model = models.create_vit_like(state, args.model, args.input_size)
    for what in models.fit_positions(model, state, path):
        models.say(f'{path}: {what}')
    models.load_exactly(model, state, path)
    return model.eval(), args, checkpoint.get('classes')


@torch.no_grad()
def classify(model, images):
    """Normalised (N, 3, H, W) -> probabilities of all classes, (N, C)."""
    return model(images).softmax(dim=1)


def show_classes(args, checkpoint):
    """A classifier: prints the --topk classes of --image. Raises InputError."""
    if args.topk < 1:
        raise models.InputError('--topk must be at least 1')
    model, trained, classes = load_classifier(args.checkpoint, args.model, args.input_size, checkpoint)
    probabilities = classify(model, read_image(args.image, trained)[None])[0]
    for value, index in zip(*probabilities.topk(min(args.topk, len(probabilities)))):
        print(f'{100 * value:6.2f} %  {classes[index] if classes else f"class {index}"}')


def read_own(checkpoint, path, what, script, flag):
    """The content of a script's checkpoint -> (its arguments as a Namespace, class names); `flag` is one of its own.

    Raises InputError, also for networks of torchvision and mmsegmentation, which have the same names.
    """
    stored, classes = models.stored_args(checkpoint), checkpoint.get('classes')
    if flag not in stored or not classes:
        raise models.InputError(f'{path} holds a {what}, but no arguments and classes of {script}')
    return argparse.Namespace(**stored), classes


def load_detector(path, checkpoint):
    """The file's content -> (detector in eval mode on the CPU, its arguments as a Namespace, class names)."""
    args, classes = read_own(checkpoint, path, 'detector', 'specific_distill_det.py', 'anchor_size')
    model = specific_distill_det.Detector(args.model, len(classes), args)
    models.load_exactly(model, models.flat_state_dict(checkpoint, path), path)
    return model.eval(), args, classes


@torch.no_grad()
def detect(model, image, args, num_classes, least=0.0):
    """RGB image -> (its objects with at least that score, best first; the best score, or None without any object).

    Exactly what evaluation counts, in COCO's results format: boxes xywh in pixels of the image, masks as run lengths;
    category ids count from 1.
    """
    pixels = specific_distill_det.fit(pil_to_tensor(image), args.input_size[0])
    found = model([pixels])[0]
    kept = {key: value[found['scores'] >= least] for key, value in found.items()}  # first: masks in full size take time
    objects = specific_distill_det.to_results(kept, 0, pixels.shape[1:], image.size[::-1], range(1, num_classes + 1))
    return sorted(objects, key=lambda entry: -entry['score']), max(found['scores'].tolist(), default=None)


def place_label(box, size, limits, taken):
    """Place of a label, xyxy: inside the picture, above its box unless it covers less of other labels elsewhere.

    box: xyxy of the object; size, limits: (width, height) of label and picture; taken: other labels, xyxy. In pixels.
    """
    def covered(label):
        return sum(max(0, min(label[2], x1) - max(label[0], x0)) * max(0, min(label[3], y1) - max(label[1], y0))
                   for x0, y0, x1, y1 in taken)

    places = []
    # above, under the upper edge, below, over the lower edge; then a line higher, a line lower
    for y in (box[1] - size[1], box[1], box[3], box[3] - size[1], box[1] - 2 * size[1], box[3] + size[1]):
        for x in (box[0], box[2] - size[0]):
            x0, y0 = (max(0, min(at, limit - side)) for at, limit, side in zip((x, y), limits, size))
            places.append((x0, y0, x0 + size[0], y0 + size[1]))
    return min(places, key=covered)  # the first of equals


def draw_objects(image, objects, classes):
    """RGB image, objects as `detect` gives them -> a copy with masks, boxes and labels, a colour per object.

    Small masks lie over large ones, labels over all, the best on top. Drawn with Pillow: torchvision's functions paint
    black where masks overlap, and write letters of 10 pixels unless they are given a font file.
    """
    from pycocotools import mask as coco_mask  # imported lazily: classifiers do without it
    picture, long_side, labels = image.copy(), max(image.size), []
    line, font = max(1, round(long_side / 400)), ImageFont.load_default(max(11, round(long_side / 50)))
    # the golden ratio keeps the hues of neighbours in the list apart; black can be read on all of them (contrast > 4.5)
    colours = [f'hsv({360 * 0.618 * k % 360:.0f}, 60%, 100%)' for k in range(len(objects))]
    by_area = sorted(range(len(objects)), key=lambda k: coco_mask.area(objects[k]['segmentation']), reverse=True)
    for k in by_area:
        opacity = coco_mask.decode(objects[k]['segmentation']) * 128  # of 255
        picture.paste(colours[k], mask=Image.fromarray(opacity))
    corners = torch.tensor([entry['bbox'] for entry in objects]).reshape(-1, 2, 2).cumsum(1).round().int()
    around = corners + torch.tensor([[-line], [line]])  # outside of the object: its own pixels stay visible
    boxes = torch.minimum(around.clamp(min=0), torch.tensor(image.size)).flatten(1).tolist()  # xyxy
    draw = ImageDraw.Draw(picture)
    for k in by_area:
        x0, y0, x1, y1 = boxes[k]
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=colours[k], width=line)
    _, top, _, bottom = font.getbbox('by')
    for entry, box in zip(objects, boxes):
        name, score = classes[entry['category_id'] - 1], f'{entry["score"]:.2f}'
        while name and draw.textlength(f'{name} {score}', font) + 4 * line > image.width:
            name = name[:-1]
        size = round(draw.textlength(f'{name} {score}', font)) + 4 * line, bottom - top + 2 * line
        labels.append((*place_label(box, size, image.size, [label[:4] for label in labels]), f'{name} {score}'))
    for (x0, y0, x1, y1, text), colour in reversed(list(zip(labels, colours))):
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), fill=colour)
        draw.text((x0 + 2 * line, y0 + line - top), text, 'black', font)
    return picture


def check_out(out, image):
    """Raises InputError unless a picture may be written: into a new file, or over one that this tool has drawn."""
    if out.suffix.lower() not in ('.png', '.jpg', '.jpeg') or not out.parent.is_dir():
        raise models.InputError(f'--out {out} must end in .png or .jpg, in an existing folder')
    if out.exists() and out.samefile(image):
        raise models.InputError(f'{out} is the image itself: choose another --out')
    try:
        drawn_here = not out.exists() or Image.open(out).getexif().get(ExifTags.Base.Software) == MARK
    except Exception:  # as in open_image
        drawn_here = False
    if not drawn_here:
        raise models.InputError(f'{out} exists, and this tool did not draw it: choose another --out')


def save_marked(picture, path):
    """Writes a picture that `check_out` will recognise."""
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = MARK
    picture.save(path, exif=exif, quality=95, subsampling=0)  # the last two: sharp in JPEG


def show_objects(args, checkpoint):
    """A detector: prints the objects of --image with at least --score, and draws them into --out. Raises InputError."""
    if not importlib.util.find_spec('pycocotools'):
        raise models.InputError('detection needs pycocotools: pip install pycocotools')
    if not 0 <= args.score <= 1:
        raise models.InputError(f'--score {args.score:g} must be between 0 and 1')
    image, out = open_image(args.image), args.out or Path(f'{Path(args.image).stem}_pred.png')
    check_out(out, args.image)
    model, trained, classes = load_detector(args.checkpoint, checkpoint)
    objects, best = detect(model, image, trained, len(classes), args.score)
    for entry in objects:
        x, y, width, height = entry['bbox']
        print(f'{entry["score"]:.3f}  {classes[entry["category_id"] - 1]:{max(map(len, classes))}}  '
              f'{x:7.1f} {y:7.1f} {x + width:7.1f} {y + height:7.1f}')
    save_marked(draw_objects(image, objects, classes), out)
    hint = '' if objects or best is None else f' (the best has {best:.3f})'
    print(f'{out}: {len(objects) or "no"} object{"s" * (len(objects) != 1)} of score {args.score:g} or more{hint}')


@torch.no_grad()
def segment(model, image, args):
    """RGB image -> (H, W) uint8, the class of each of its pixels from 0, exactly as evaluation predicts it."""
    size, short = image.size[::-1], args.input_size[0]
    pixels = resize(pil_to_tensor(image), specific_distill_seg.scaled_size(size, short))
    logits = specific_distill_seg.slide(model, specific_distill_seg.normalise(pixels)[None], short)
    return specific_distill_seg.resize(logits, size).argmax(dim=1)[0].byte().numpy()


def class_colour(index):
    """RGB of a class, the same in all pictures.

    The golden ratio keeps the hues of neighbours in the list apart; every 7 classes the hues come nearer to old ones, so
    that saturation and brightness change.
    """
    saturation, value = ((95, 100), (95, 70), (45, 100), (60, 75), (100, 85))[index // 7 % 5]
    return ImageColor.getrgb(f'hsv({360 * 0.618034 * index % 360}, {saturation}%, {value}%)')


def draw_segments(image, prediction, present, classes):
    """RGB image, class of each pixel (H, W) uint8 -> picture: the image under the classes' colours, a legend to its right.

    present: the classes of the legend, in its order. The image turns grey, so that its own colours change none of a class;
    white lines part the regions.
    """
    colours, long_side = [class_colour(k) for k in range(len(classes))], max(image.size)
    regions = Image.fromarray(prediction)
    regions.putpalette(np.array(colours, np.uint8).tobytes())
    border = np.zeros(prediction.shape, np.uint8)
    border[:, 1:] |= prediction[:, 1:] != prediction[:, :-1]
    border[1:] |= prediction[1:] != prediction[:-1]
    border = Image.fromarray(255 * border).filter(ImageFilter.MaxFilter(2 * round(long_side / 2000) + 1))
    image = Image.blend(image.convert('L').convert('RGB'), regions.convert('RGB'), 0.5)
    image.paste('white', mask=border)
    font = ImageFont.load_default(max(11, round(long_side / 50)))
    names, line = [classes[k][:32] for k in present], round(1.4 * font.size)
    width = 2 * line + max(round(font.getlength(name)) for name in names)
    picture = Image.new('RGB', (image.width + width, max(image.height, line * len(names))), 'white')
    picture.paste(image)
    draw = ImageDraw.Draw(picture)
    for row, (k, name) in enumerate(zip(present, names)):
        x, y = image.width + line // 4, row * line
        draw.rectangle((x, y + line // 8, x + line, y + line - line // 8), fill=colours[k])
        draw.text((x + line + line // 4, y + line // 2), name, 'black', font, anchor='lm')
    return picture


def show_segments(args, checkpoint):
    """A segmentation network: prints the shares of the classes in --image, draws them into --out, and writes their labels.

    Raises InputError.
    """
    trained, classes = read_own(checkpoint, args.checkpoint, 'segmentation network', 'specific_distill_seg.py',
                                'reduce_zero_label')
    image, out = open_image(args.image), args.out or Path(f'{Path(args.image).stem}_pred.png')
    labels = out.with_name(f'{out.stem}_labels.png')
    check_out(out, args.image)
    check_out(labels, args.image)
    model = specific_distill_seg.load_segmenter(trained.model, args.checkpoint, classes, trained)
    prediction = segment(model, image, trained)
    counts = np.bincount(prediction.ravel(), minlength=len(classes))
    present = [k for k in np.argsort(-counts, kind='stable') if counts[k]]
    for k in present:
        print(f'{100 * counts[k] / counts.sum():6.2f} %  {classes[k]}')
    save_marked(draw_segments(image, prediction, present, classes), out)
    save_marked(Image.fromarray(prediction + np.uint8(trained.reduce_zero_label)), labels)
    print(f'{out}: {len(present)} class{"es" * (len(present) != 1)}; labels in {labels}')


KINDS = {  # by a name that only this kind has: what shows it, what it is, and the flags for it
    'rpn.head.cls_logits.weight': (show_objects, 'detector', ('score', 'out')),
    'decode_head.conv_seg.weight': (show_segments, 'segmentation network', ('out',)),
    'head.weight': (show_classes, 'classifier', ('topk', 'model', 'input_size')),
}


def get_args_parser():
    parser = argparse.ArgumentParser(description='top classes, objects or labelled pixels of an image', allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--checkpoint', required=True, help='classifier, detector or segmentation network, path or '
                                                                'https URL')
    parser.add_argument('--image', required=True, help='image file')
    parser.add_argument('--topk', type=int, default=5, help='only for classifiers: number of classes to print')
    parser.add_argument('--score', type=float, default=0.5,
                        help='only for detectors: smallest score of an object to show; they keep none under 0.05')
    parser.add_argument('--out', type=Path,
                        help='not for classifiers: picture to write, .png or .jpg; by default it is called after the '
                             'image, NAME_pred.png, in the current folder; of a segmentation network the labels lie '
                             'beside it, NAME_pred_labels.png')
    parser.add_argument('--model', help='only for classifiers: name of the network, for files that do not hold it')
    parser.add_argument('--input_size', type=int, nargs='+',
                        help='only for classifiers: pixels, one side, or height and width; by default as the '
                             'checkpoint says, else 224')
    return parser


def main(args):
    checkpoint = models.read_checkpoint(args.checkpoint)
    state = models.flat_state_dict(checkpoint, args.checkpoint)
    show, what, flags = next((KINDS[name] for name in KINDS if name in state), (None, '', ()))
    if show is None:
        raise models.InputError(f'{args.checkpoint} holds neither a classifier (of specific_distill_cls.py, MAE, DeiT, '
                                'timm) nor a network of specific_distill_det.py or specific_distill_seg.py')
    parser = get_args_parser()
    for flag in ('topk', 'score', 'out', 'model', 'input_size'):
        if flag not in flags and getattr(args, flag) != parser.get_default(flag):
            raise models.InputError(f'--{flag}: {args.checkpoint} is a {what}, which does not take it')
    show(args, checkpoint)


if __name__ == '__main__':
    try:
        main(get_args_parser().parse_args())
    except models.InputError as error:
        sys.exit(f'error: {error}')
