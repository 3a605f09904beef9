"""A trained classifier as a plain state dict for timm, which is checked to give the same logits.

Reads:  --checkpoint   of specific_distill_cls.py, or a public classifier (with --model)
Writes: --out FILE.pth, and prints the Python that loads it with strict=True
Run:    python tools/export_timm.py --checkpoint runs/g2sd/checkpoint.pth --out g2sd_timm.pth
"""
import argparse
import contextlib
import sys
from pathlib import Path

import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import models
from predict import load_classifier

# timm knows each with a class token, pooled, and distilled
NAMED = ('vit_tiny_patch16', 'vit_small_patch16', 'vit_base_patch16')
DISTILLED = 'timm.models.deit.VisionTransformerDistilled'
PLAIN = 'timm.models.vision_transformer.VisionTransformer'
FUNCTIONS = {'timm.create_model': timm.create_model, PLAIN: timm.models.VisionTransformer,
             DISTILLED: timm.models.deit.VisionTransformerDistilled}


def timm_recipe(name, model, input_size):
    """(what to call, its arguments, its keywords) for a classifier of `models.create_vit`."""
    size, distilled = models.parse_name(name), hasattr(model, 'head_dist')
    options = {'img_size': tuple(input_size), 'num_classes': model.num_classes}
    pooled = not distilled and model.global_pool == 'avg'
    if pooled:
        options['global_pool'] = 'avg'
    if name in NAMED:
        theirs = name if pooled else name.replace('vit_', 'deit_')
        theirs = theirs.replace('_patch', '_distilled_patch') if distilled else theirs
        return 'timm.create_model', (f'{theirs}_224',), options
    options |= {'patch_size': size.patch, 'embed_dim': size.dim, 'depth': size.depth,
                'num_heads': size.heads}
    return DISTILLED if distilled else PLAIN, (), options


def get_args_parser():
    parser = argparse.ArgumentParser(
        description='classifier -> state dict for timm', allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--checkpoint', required=True, help='classifier, path or https URL')
    parser.add_argument('--out', required=True, type=Path, help='new file, ending in .pth')
    parser.add_argument('--model', help='name of the network, for files that do not hold it')
    parser.add_argument('--input_size', type=int, nargs='+',
                        help='pixels, one side or two; as the checkpoint says, else 224')
    return parser


def main(args):
    if args.out.exists():
        raise SystemExit(f'--out {args.out} exists: choose a new file')
    with contextlib.redirect_stdout(sys.stderr):  # stdout is Python
        model, name, input_size, _ = load_classifier(args.checkpoint, args.model, args.input_size)
    function, names, options = timm_recipe(name, model, input_size)
    theirs = FUNCTIONS[function](*names, **options).eval()
    theirs.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, *input_size)
    with torch.no_grad():
        difference = (theirs(images) - model(images)).abs().max().item()
    if not difference < 1e-5:  # the same operations in the same order; NaN fails, too
        raise SystemExit(f'timm\'s logits differ by {difference:.3g}: nothing was written')
    torch.save(theirs.state_dict(), args.out)
    call = ', '.join([*map(repr, names), *(f'{key}={value!r}' for key, value in options.items())])
    print(f'# {len(theirs.state_dict())} tensors; largest difference of logits {difference:.1g}\n'
          f'import timm, torch\nmodel = {function}({call})\n'
          f'model.load_state_dict(torch.load({str(args.out)!r}, weights_only=True))')


if __name__ == '__main__':
    main(get_args_parser().parse_args())
