"""What a trained network says about one image: for a classifier, its top classes.

Reads:  --checkpoint   checkpoint.pth of specific_distill_cls.py, or a public classifier (give its --model then)
        --image        any file that Pillow reads; it is prepared exactly as in evaluation
Run:    python tools/predict.py --checkpoint runs/cifar10/seed0/g2sd/checkpoint.pth --image horse.jpg
"""
import argparse
import sys
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import models
import specific_distill_cls


def load_classifier(path, model_name=None, input_size=None):
    """Checkpoint file or https URL -> (classifier in eval mode on the CPU, its arguments as a Namespace, class names).

    model_name and input_size (one side, or height and width) override the checkpoint's own and stand in where it has none,
    as in public files; their class names are None. Raises InputError.
    """
    checkpoint = models.read_checkpoint(path)
    state = dict(models.flat_state_dict(checkpoint, path))
    # arguments stored by other projects (MAE, DeiT) name their networks and sizes differently: not read
    args = argparse.Namespace(**(checkpoint['args'] if isinstance(checkpoint.get('args'), dict) else {}))
    args.model = model_name or getattr(args, 'model', None)
    args.input_size = ((input_size or getattr(args, 'input_size', [224])) * 2)[:2]
    if args.model is None:
        raise models.InputError(f'{path} does not name its network: give --model, for example vit_base_patch16')
    model = models.create_vit_like(state, args.model, args.input_size)
    for what in models.fit_positions(model, state, path):
        models.say(f'{path}: {what}')
    models.load_exactly(model, state, path)
    return model.eval(), args, checkpoint.get('classes')


def read_image(path, args):
    """Image file -> normalised (3, H, W), by the transform of evaluation; raises InputError if Pillow cannot read it."""
    try:
        image = Image.open(path).convert('RGB')
    except Exception as error:  # decoders raise nearly anything on a damaged file
        raise models.InputError(f'cannot read the image {path}: {str(error) or type(error).__name__}') from error
    return specific_distill_cls.build_transform(args, is_train=False)(image)


@torch.no_grad()
def classify(model, images):
    """Normalised (N, 3, H, W) -> probabilities of all classes, (N, C)."""
    return model(images).softmax(dim=1)


def get_args_parser():
    parser = argparse.ArgumentParser(description='top classes of an image', allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--checkpoint', required=True, help='classifier, path or https URL')
    parser.add_argument('--image', required=True, help='image file')
    parser.add_argument('--topk', type=int, default=5, help='number of classes to print')
    parser.add_argument('--model', help='name of the network, for files that do not hold it')
    parser.add_argument('--input_size', type=int, nargs='+',
                        help='pixels: one side, or height and width; as the checkpoint says, else 224')
    return parser


def main(args):
    if args.topk < 1:
        raise models.InputError('--topk must be at least 1')
    model, trained, classes = load_classifier(args.checkpoint, args.model, args.input_size)
    probabilities = classify(model, read_image(args.image, trained)[None])[0]
    for value, index in zip(*probabilities.topk(min(args.topk, len(probabilities)))):
        print(f'{100 * value:6.2f} %  {classes[index] if classes else f"class {index}"}')


if __name__ == '__main__':
    try:
        main(get_args_parser().parse_args())
    except models.InputError as error:
        sys.exit(f'error: {error}')
