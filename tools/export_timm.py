"""A trained classifier as a plain state dict for timm, checked to give the same logits there before it is written.

Reads:  --checkpoint   checkpoint.pth of specific_distill_cls.py, or a public classifier (give its --model then)
Writes: --out FILE.pth, and prints the Python that loads it with strict=True
Run:    python tools/export_timm.py --checkpoint runs/cifar10/seed0/g2sd/checkpoint.pth --out g2sd_timm.pth
"""
import argparse
import sys
from pathlib import Path

import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import models
from predict import load_classifier

NAMED_SIZES = ('tiny', 'small', 'base')  # timm knows each with a class token, pooled, and distilled, at patch 16


def timm_recipe(name, model, input_size):
    """(what to call, its arguments, its keywords) that make timm's own network for a classifier built by `create_vit`.

    What to call is one of 'timm.create_model', 'timm.models.deit.VisionTransformerDistilled' and
    'timm.models.vision_transformer.VisionTransformer'.
    """
    size, distilled = models.parse_name(name).size, hasattr(model, 'head_dist')
    pool = {} if distilled or model.global_pool == 'token' else {'global_pool': model.global_pool}
    options = {'img_size': tuple(input_size), 'num_classes': model.num_classes, **pool}
    if name in [f'vit_{named}_patch16' for named in NAMED_SIZES]:
        theirs = name if pool else name.replace('vit_', 'deit_')
        theirs = theirs.replace('_patch', '_distilled_patch') if distilled else theirs
        return 'timm.create_model', (f'{theirs}_224',), options
    options |= {'patch_size': models.parse_name(name).patch, 'embed_dim': size.dim, 'depth': size.depth,
                'num_heads': size.heads}
    function = 'deit.VisionTransformerDistilled' if distilled else 'vision_transformer.VisionTransformer'
    return f'timm.models.{function}', (), options


def get_args_parser():
    parser = argparse.ArgumentParser(description='classifier -> state dict for timm', allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--checkpoint', required=True, help='classifier, path or https URL')
    parser.add_argument('--out', required=True, type=Path, help='new file, ending in .pth')
    parser.add_argument('--model', help='name of the network, for files that do not hold it')
    parser.add_argument('--input_size', type=int, nargs='+',
                        help='pixels: one side, or height and width; as the checkpoint says, else 224')
    return parser


def main(args):
    if args.out.suffix != '.pth' or args.out.exists() or not args.out.parent.is_dir():
        raise models.InputError(f'--out {args.out} must be a new file in an existing folder, and end in .pth')
    model, trained, _ = load_classifier(args.checkpoint, args.model, args.input_size)
    function, names, options = timm_recipe(trained.model, model, trained.input_size)
    build = {'create_model': timm.create_model, 'VisionTransformer': timm.models.vision_transformer.VisionTransformer,
             'VisionTransformerDistilled': timm.models.deit.VisionTransformerDistilled}[function.rsplit('.', 1)[1]]
    theirs = build(*names, **options).eval()
    theirs.load_state_dict(model.state_dict(), strict=True)
    images = torch.randn(2, 3, *trained.input_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (theirs(images) - model(images)).abs().max().item()
    if not difference < 1e-5:  # the same operations in the same order; NaN fails, too
        raise models.InputError(f'timm\'s network gives other logits (by {difference:.3g}): nothing was written')
    with open(args.out, 'xb') as file:
        torch.save(theirs.state_dict(), file)
    call = ', '.join([*map(repr, names), *(f'{key}={value!r}' for key, value in options.items())])
    print(f'# {len(theirs.state_dict())} entries; largest difference of logits {difference:.1g}\n'
          f'import timm, torch\nmodel = {function}({call})\n'
          f'model.load_state_dict(torch.load({str(args.out)!r}, weights_only=True))')


if __name__ == '__main__':
    try:
        main(get_args_parser().parse_args())
    except models.InputError as error:
        sys.exit(f'error: {error}')
