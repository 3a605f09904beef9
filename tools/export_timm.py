"""A network of any stage as timm's own: a classifier, an encoder, or the backbone of a dense task.

Reads:  --checkpoint   of any stage, or a public classifier (with --model), or an encoder that
                       --finetune takes; a detector's backbone becomes samvit, of segmentation beit
Writes: --out          pth: a state dict; hf: a folder with config.json (with class names and the
                       transform of evaluation) and model.safetensors
Run:    python tools/export_timm.py --checkpoint runs/g2sd/checkpoint.pth --out g2sd_timm.pth
        python tools/export_timm.py --checkpoint runs/generic/checkpoint.pth --format hf --out enc
Prints the Python that loads it. Nothing is written unless this gives the same logits, features or
last map to 1e-6 of the largest value, in double precision.
"""
import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import knn
import models
import predict
import specific_distill_det
import specific_distill_seg


def load_network(path, name, input_size):
    """Checkpoint -> (classifier, encoder or backbone in eval mode; class names or None)."""
    checkpoint = models.read_checkpoint(path)
    state, trained = models.flat_state_dict(checkpoint, path), models.own_args(checkpoint)
    classes, flags = checkpoint.get('classes'), argparse.Namespace(**{**trained, 'eval': True})
    if trained and 'rpn.head.cls_logits.weight' in state:
        return specific_distill_det.load_detector(path, classes, flags).backbone.net, None
    if trained and 'decode_head.conv_seg.weight' in state:
        return specific_distill_seg.load_segmenter(path, classes, flags).backbone, None
    if 'head.weight' not in state:
        return knn.load_encoder(path, name, input_size)[0], None
    return predict.load_classifier(path, name, input_size)[0], classes


def timm_recipe(network):
    """(timm's name, keywords) of a network; the keywords make up for sizes without a name."""
    patch, heads = network.patch_embed.patch_size[0], network.blocks[0].attn.num_heads
    dim, depth = network.embed_dim, len(network.blocks)
    options = {'img_size': network.patch_embed.img_size, 'patch_size': patch, 'embed_dim': dim,
               'depth': depth, 'num_heads': heads, 'num_classes': network.num_classes}
    if isinstance(network, specific_distill_det.PlainBackbone):
        form, windows = 'samvit_{}_patch{}', [block.window_size for block in network.blocks]
        # norm_layer: timm's samvit takes eps 1e-5 unless it is given a false one
        options |= {'window_size': max(windows), 'neck_chans': 0, 'norm_layer': False,
                    'global_attn_indexes': [k for k, window in enumerate(windows) if not window]}
    elif isinstance(network, specific_distill_seg.Backbone):
        form = 'beit_{}_patch{}_224'
        options['use_abs_pos_emb'] = True
    elif isinstance(network, models.DistilledViT):
        form = 'deit_{}_distilled_patch{}_224'
    else:
        form = 'vit_{}_patch{}_224'
        options['global_pool'] = network.global_pool
    sizes = {size[:3]: name for name, size in models.SIZES.items()}
    name = form.format(sizes.get((dim, depth, heads)), patch)
    return name if timm.is_model(name) else form.format('base', 16), options


def to_timm(network, name, options):
    """The network as timm's own; a final norm that ours lacks keeps its start values."""
    theirs, state = timm.create_model(name, **options), network.state_dict()
    if isinstance(network, specific_distill_det.PlainBackbone):
        # ours resizes its positions in each forward, timm's antialiases unless they have the size
        table, grid = state['pos_embed'].permute(0, 3, 1, 2), network.patch_embed.grid_size
        state['pos_embed'] = F.interpolate(table, size=grid, mode='bicubic').permute(0, 2, 3, 1)
    theirs.load_state_dict(state, strict=False)
    size, is_dense = options['img_size'], not isinstance(theirs, timm.models.VisionTransformer)
    # the evaluation of specific_distill_cls.py; dense tasks take whole images
    whole = is_dense or max(size) <= 32 or max(size) > 224
    kept = ('architecture', 'classifier', 'first_conv', 'fixed_input_size')
    theirs.pretrained_cfg = {key: theirs.pretrained_cfg[key] for key in kept} | {
        'num_classes': network.num_classes, 'input_size': (3, *size), 'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD, 'crop_pct': 1.0 if whole else 224 / 256,
        'interpolation': 'bilinear' if is_dense else 'bicubic'}
    return theirs


@torch.no_grad()
def difference(network, theirs):
    """The largest of the outputs for a random image, as a share of the largest value."""
    network, theirs = network.double(), theirs.double().eval()
    images = torch.randn(1, 3, *network.patch_embed.img_size, dtype=torch.float64)
    if isinstance(network, specific_distill_det.PlainBackbone):  # there forward_features ends in a norm
        a, b = network(images), theirs.forward_intermediates(images, intermediates_only=True)[-1]
    elif network.num_classes:
        a, b = network(images), theirs(images)
    else:
        a, b = network.forward_features(images), theirs.forward_features(images)
    return ((a - b).abs().max() / a.abs().max()).item()


def get_args_parser():
    parser = argparse.ArgumentParser(
        description='network of any stage -> timm', allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--checkpoint', required=True, help='of any stage, path or https URL')
    parser.add_argument('--format', choices=['pth', 'hf'], default='pth', help='of what is written')
    parser.add_argument('--out', required=True, type=Path, help='new file (pth) or folder (hf)')
    parser.add_argument('--model', help='name of the network, for files that do not hold it')
    parser.add_argument('--input_size', type=int, nargs='+',
                        help='classifiers, encoders: pixels; as the checkpoint says, else 224')
    return parser


def main(args):
    if args.out.exists():
        raise SystemExit(f'--out {args.out} exists: choose a new name')
    with contextlib.redirect_stdout(sys.stderr):  # stdout is Python
        network, classes = load_network(args.checkpoint, args.model, args.input_size)
    name, options = timm_recipe(network)
    theirs = to_timm(network, name, options)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent) as folder:
        part = Path(folder, args.out.name)
        if args.format == 'hf':
            label_names = {'label_names': classes} if classes else {}
            timm.models.save_for_hf(theirs, part, label_names, options, safe_serialization=True)
            again = timm.create_model(f'local-dir:{part}', pretrained=True)
            call = f'{f"local-dir:{args.out}"!r}, pretrained=True'
        else:
            torch.save(theirs.state_dict(), part)
            again = timm.create_model(name, **options)
            again.load_state_dict(torch.load(part, weights_only=True))
            call = ', '.join([repr(name), *(f'{key}={value!r}' for key, value in options.items())])
        share = difference(network, again)
        if not share < 1e-6:  # NaN fails, too
            raise SystemExit(f'timm\'s {name} differs by {share:.3g}: nothing was written')
        part.rename(args.out)
    print(f'# {len(theirs.state_dict())} tensors; outputs differ by {share:.1g} of the largest\n'
          f'import timm, torch\nmodel = timm.create_model({call})')
    if args.format == 'pth':
        print(f'model.load_state_dict(torch.load({str(args.out)!r}, weights_only=True))')


if __name__ == '__main__':
    main(get_args_parser().parse_args())
