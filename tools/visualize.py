"""Pictures of stage 1: what the encoder saw, reconstructions, and how near student and teacher are.

Reads:  --checkpoint   checkpoint.pth of generic_distill.py: a student, or an MAE of --target pixel
        --teacher_path   of a student; by default the one that it was trained with
        --images       image files; resized and cropped as in stage 2's evaluation
Writes: --out, one row per image:
        --target feature          input, masked, the teacher's reconstruction, cosine per patch
        --target recon, recon_gt  input, masked, the teacher's and the student's reconstruction
        --target pixel            input, masked, its reconstruction
Run:    python tools/visualize.py --checkpoint runs/generic/checkpoint.pth --images *.jpg --out a.png
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import models
from predict import check_out, classifier_input, list_images, read_image


def load_stage1(path, teacher_path=None):
    """(student or MAE, its teacher or None, flags of the run): in eval mode, on the CPU.

    args.norm_pix_loss becomes that of the network which makes the reconstructions.
    """
    checkpoint = models.read_checkpoint(path)
    args, teacher, target_dim = argparse.Namespace(**models.own_args(checkpoint)), None, None
    if 'target' not in args:
        raise SystemExit(f'{path} is no checkpoint of generic_distill.py: it names no --target')
    if args.target != 'pixel':
        teacher_path = teacher_path or args.teacher_path
        trained = models.own_args(models.read_checkpoint(teacher_path))
        # a teacher of ours knows its pixel space; of another the student's flag tells it
        args.norm_pix_loss = trained.get('norm_pix_loss', args.norm_pix_loss)
        teacher = models.create_mae(args.teacher_model, args.input_size)
        models.load_teacher(teacher, teacher_path)
        target_dim = teacher.decoder_dim if args.target == 'feature' else teacher.pixel_dim
    model = models.create_mae(args.model, args.input_size, target_dim)
    models.load_strictly(model, models.flat_state_dict(checkpoint, path), path)
    return model.eval(), teacher, args


def cosine_map(student, teacher, images, masking, layer):
    """Cosine of prediction and layer-normalised teacher features: (N, 1+L), class token first."""
    target = teacher.decoder_features(images, masking, layer)
    target = F.layer_norm(target, target.shape[-1:], eps=1e-6)  # as generic_distill.feature_loss
    return F.cosine_similarity(student.predict_features(images, masking), target, dim=-1)


def paste(pred, pixels, mask, norm_pix_loss):
    """Predicted patches where hidden, true ones elsewhere: (N, L, p*p*3); mask: (N, L), 1 = hidden.

    With norm_pix_loss the prediction gets the mean and variance of the true patch.
    """
    if norm_pix_loss:
        pred = pred * (pixels.var(-1, keepdim=True) + 1e-6).sqrt() + pixels.mean(-1, keepdim=True)
    return torch.where(mask[:, :, None].bool(), pred, pixels)


def to_pixels(images):
    """Normalised (N, 3, H, W) -> (N, H, W, 3) uint8."""
    mean, std = models.image_statistics(images.device)
    return ((images * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def make_columns(model, teacher, args, images, masking):
    """[(caption, (N, H, W, 3) uint8)]; for features the last is of (N, h, w) cosines, per patch."""
    pixels = model.patchify(images)
    hidden = model.unpatchify(pixels * (1 - masking.mask[:, :, None]))  # grey: ImageNet's mean
    columns = [('input', to_pixels(images)), (f'masked {args.mask_ratio:.0%}', to_pixels(hidden))]
    networks = {'reconstruction': model}
    if args.target != 'pixel':
        networks = {'teacher\'s reconstruction': teacher}
    if args.target in ('recon', 'recon_gt'):
        networks['student\'s reconstruction'] = lambda *inputs: model(*inputs)[:, 1:]
    for caption, network in networks.items():
        pred = paste(network(images, masking), pixels, masking.mask, args.norm_pix_loss)
        columns.append((caption, to_pixels(model.unpatchify(pred))))
    if args.target == 'feature':
        cosines = cosine_map(model, teacher, images, masking, args.target_layer)[:, 1:]
        cosines = cosines.reshape(-1, *model.patch_embed.grid_size)
        columns.append(('student-teacher cosine', cosines.numpy()))
    return columns


def save_panels(out, columns, names, lines, note):
    """Writes columns (see `make_columns`), names below the first, lines below the last, a note."""
    _, height, width, *_ = columns[0][1].shape
    row = 2.4 * height / width + 0.3  # inches
    size = 2.4 * len(columns) + 0.6, row * len(names) + 0.9
    figure = Figure(figsize=size, dpi=100, layout='constrained')
    axes = figure.subplots(len(names), len(columns), squeeze=False)
    for column, (caption, pictures) in zip(axes.T, columns):
        column[0].set_title(caption, fontsize=11)
        for panel, picture in zip(column, pictures):
            drawn = panel.imshow(picture, vmin=0, vmax=1, interpolation='nearest')
            panel.set(xticks=[], yticks=[])
    if picture.ndim == 2:  # a value per patch
        figure.colorbar(drawn, ax=axes[:, -1], aspect=30, extend='min')  # below 0
    for panels, name, line in zip(axes, names, lines):
        panels[0].set_xlabel(name, loc='left', parse_math=False)
        panels[-1].set_xlabel(line)
    figure.supxlabel(note, fontsize=10)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def get_args_parser():
    parser = argparse.ArgumentParser(
        description='pictures of a masked autoencoder or of a stage-1 student', allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--checkpoint', required=True, help='path or https URL')
    parser.add_argument('--teacher_path', help='its checkpoint; by default as in training')
    parser.add_argument('--images', nargs='+', required=True, help='image files and folders')
    parser.add_argument('--out', required=True, type=Path, help='picture to write')
    parser.add_argument('--mask_ratio', type=float,
                        help='share of hidden patches; by default as in training')
    parser.add_argument('--seed', type=int, default=0, help='seed of the masks')
    return parser


def main(args):
    args.images = list_images(args.images)
    check_out(args.out, args.images)
    model, teacher, trained = load_stage1(args.checkpoint, args.teacher_path)
    trained.mask_ratio = trained.mask_ratio if args.mask_ratio is None else args.mask_ratio
    images = [classifier_input(read_image(path), trained.input_size) for path in args.images]
    generator = torch.Generator().manual_seed(args.seed)
    noise = torch.rand(len(images), model.patch_embed.num_patches, generator=generator)
    masking = models.random_masking(noise, trained.mask_ratio)
    columns = make_columns(model, teacher, trained, torch.stack(images), masking)
    note = 'Visible patches of reconstructions are pasted from the input'
    if trained.norm_pix_loss:
        note += '; true patch mean and variance used'
    lines, mean = [''] * len(images), ''
    if trained.target == 'feature':
        note += f'.\nCosine with the features of decoder block {trained.target_layer}'
        cosines = torch.from_numpy(columns[-1][1]).flatten(1)
        lines = [f'hidden {values[gone].mean():.3f}, visible {values[~gone].mean():.3f}'
                 for values, gone in zip(cosines, masking.mask.bool())]
        mean = f', mean cosine {cosines.mean():.4f}'
    save_panels(args.out, columns, [Path(path).name for path in args.images], lines, note)
    print(f'{args.out}: {len(images)} images{mean}')


if __name__ == '__main__':
    try:
        main(get_args_parser().parse_args())
    except models.DataError as error:
        sys.exit(str(error))
