"""Pictures of a masked autoencoder: what it saw, what it reconstructs, and how near a student's features are.

Reads:  --checkpoint   checkpoint.pth of generic_distill.py: a stage-1 student, or an MAE made by --target pixel
        --teacher_path --teacher_model   of a student; by default those that it was trained with
        --images       image files; resized and cropped to the input size as in evaluation
        --check        is this MAE, or the student's teacher, sound? --checkpoint may then be a public MAE (give --model)
Writes: --out, a PNG with one row per image:
        --target feature        input, masked, the teacher's reconstruction, student-teacher cosine of every patch
        --target recon, recon_gt   input, masked, the teacher's reconstruction, the student's reconstruction
        --target pixel          input, masked, its reconstruction
        --check                 input, masked, its reconstruction, that of an untrained decoder; up to 4 images
Run:    python tools/visualize.py --checkpoint runs/cifar10/seed0/generic/checkpoint.pth --images a.jpg b.jpg --out ab.png
        python tools/visualize.py --check --checkpoint mae_pretrain_vit_base_full.pth --model mae_vit_base_patch16 \
        --images IMAGENET/val/*/*00.JPEG --out check.png
--check prints the loss over all images beside that of an untrained decoder on the same encoder and of the best constant
prediction, names the pixel space that the MAE was trained in, and ends with an error if it has not learnt to reconstruct.
Visible patches of a reconstruction are pasted from the input: training asks for the hidden ones alone.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import generic_distill
import models
from predict import read_image

# the cosine's colours, from 0 (dark blue) to 1 (yellow), readable in grey as well
COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=float)
MARK = 'G2SD tools/visualize.py'  # in the PNG: a picture of ours may be drawn again
CELL = 224  # pixels: smaller images are enlarged to about that
BATCH = 32  # images at a time under --check; the best constant prediction is that of each batch, as in training
LEARNT = 0.95  # of the best constant's loss: an untrained decoder is above 1, a sound one of small pictures may be at 0.9


def read_file(path):
    """(state dict, arguments that our scripts stored beside it, else {}). Raises InputError."""
    checkpoint = models.read_checkpoint(path)
    return models.flat_state_dict(checkpoint, path), models.stored_args(checkpoint)


def find_teacher(path):
    """The path if there can be a teacher, else InputError."""
    if not str(path).startswith('https://') and not Path(path).is_file():
        raise models.InputError(f'the teacher is not at {path}: give --teacher_path')
    return path


def load_stage1(path, teacher_path=None, teacher_model=None):
    """(student or MAE, its teacher or None, arguments of the run): in eval mode, on the CPU.

    args.norm_pix_loss comes back as the network was trained that makes the reconstructions. Raises InputError.
    """
    state, stored = read_file(path)
    if 'target' not in stored:
        raise models.InputError(f'{path} is no checkpoint of generic_distill.py: its arguments name no --target')
    args, teacher, target_dim = argparse.Namespace(**stored), None, None
    if args.target != 'pixel':
        teacher_path = find_teacher(teacher_path or args.teacher_path)
        teacher_state, theirs = read_file(teacher_path)
        teacher = models.create_mae(teacher_model or args.teacher_model, args.input_size)
        models.load_teacher(teacher, teacher_path, teacher_state)
        # a teacher of ours knows its pixel space; of another the student's argument tells it
        args.norm_pix_loss = theirs.get('norm_pix_loss', args.norm_pix_loss)
        target_dim = teacher.decoder_dim if args.target == 'feature' else teacher.pixel_dim
    model = models.create_mae(args.model, args.input_size, target_dim)
    models.load_exactly(model, state, path)
    return model.eval(), teacher, args


def load_mae(args):
    """(the MAE to check, the same with an untrained decoder, {file: its arguments}): of a student, its teacher.

    The first file is the MAE's, the last is --checkpoint. Raises InputError.
    """
    path, (state, stored) = args.checkpoint, read_file(args.checkpoint)
    files, name = {path: stored}, args.model or stored.get('model')
    if stored.get('target', 'pixel') != 'pixel':
        path = find_teacher(args.teacher_path or stored['teacher_path'])
        state, theirs = read_file(path)
        files, name = {path: theirs, **files}, args.model or args.teacher_model or stored['teacher_model']
    if name is None:
        raise models.InputError(f'{path} does not name its network: give --model, for example mae_vit_base_patch16')
    size = ((args.input_size or stored.get('input_size', [224])) * 2)[:2]
    models.seed_everything(args.seed, models.START)
    name = f'mae_{name.removeprefix("mae_")}'  # a lone encoder is then refused for what it lacks
    model, fresh = models.create_mae(name, size), models.create_mae(name, size).eval()
    models.load_teacher(model, path, state)
    encoder = {key: value for key, value in model.state_dict().items() if not key.startswith(('decoder_', 'mask_token'))}
    fresh.load_state_dict(encoder, strict=False)
    return model, fresh, files


def measure(networks, images, masking):
    """Loss of each network and, last, of the best constant prediction: (2, networks + 1), norm_pix_loss first."""
    pixels = networks[0].patchify(images)
    with torch.no_grad():
        preds = [network.reconstruct(images, masking) for network in networks]
    return torch.stack([torch.stack([
        *(generic_distill.pixel_loss(pred, pixels, masking.mask, norm) for pred in preds),
        generic_distill.best_constant_loss({'pixel': pixels}, masking, argparse.Namespace(norm_pix_loss=norm))])
        for norm in (True, False)])


def cosine_map(student, teacher, images, masking, layer):
    """Cosine of the student's prediction and the layer-normalised teacher features: (N, 1+L), class token first."""
    target = teacher.decoder_features(images, masking, layer)
    target = F.layer_norm(target, target.shape[-1:], eps=1e-6)  # as generic_distill.feature_loss
    return F.cosine_similarity(student.predict_features(images, masking), target, dim=-1)


def paste(pred, pixels, mask, norm_pix_loss):
    """Predicted patches where hidden, true ones elsewhere: all (N, L, p*p*3); mask (N, L), 1 = hidden.

    With norm_pix_loss the prediction has mean 0 and variance 1: it gets the mean and variance of the true patch.
    """
    if norm_pix_loss:
        pred = pred * (pixels.var(-1, keepdim=True) + 1e-6).sqrt() + pixels.mean(-1, keepdim=True)
    return torch.where(mask[:, :, None].bool(), pred, pixels)


def pasting_note(norm_pix_loss):
    return 'Reconstructions: visible patches are pasted from the input' + \
        ('; true patch mean and variance used.' if norm_pix_loss else '.')


def to_pixels(images):
    """Normalised (N, 3, H, W) -> (N, H, W, 3) uint8."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return ((images * std + mean).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def colour(cosine):
    """Array of cosines -> the same with a last axis of 3, uint8; below 0 counts as 0."""
    places = np.linspace(0, 1, len(COLOURS))
    return np.stack([np.interp(cosine, places, channel) for channel in COLOURS.T], axis=-1).round().astype(np.uint8)


@torch.no_grad()
def make_columns(model, teacher, args, images, masking):
    """[(caption, (N, H, W, 3) uint8)], and the cosines (N, 1+L) or None where the target is no feature."""
    pixels = model.patchify(images)
    hidden = to_pixels(model.unpatchify(pixels * (1 - masking.mask[:, :, None])))  # mid grey: ImageNet's mean

    def rebuilt(pred):
        return to_pixels(model.unpatchify(paste(pred, pixels, masking.mask, args.norm_pix_loss)))

    columns = [('input', to_pixels(images)), (f'masked {args.mask_ratio:.0%}', hidden)]
    if args.target == 'pixel':
        return columns + [('reconstruction', rebuilt(model(images, masking)))], None
    columns.append(('teacher\'s reconstruction', rebuilt(teacher.reconstruct(images, masking))))
    if args.target != 'feature':
        return columns + [('student\'s reconstruction', rebuilt(model(images, masking)[:, 1:]))], None
    cosines = cosine_map(model, teacher, images, masking, args.target_layer)
    (h, w), (p, q) = model.patch_embed.grid_size, model.patch_embed.patch_size
    heat = colour(cosines[:, 1:].numpy()).reshape(-1, h, w, 3).repeat(p, axis=1).repeat(q, axis=2)
    return columns + [('student-teacher cosine', heat)], cosines


def compose(columns, cosines, names, mask, grid, notes):
    """The picture: a row per image, captions above, names and mean cosines below, notes under all.

    columns: [(caption, (N, H, W, 3) uint8)]; cosines: (N, 1+L) or None; mask: (N, L), 1 = hidden; grid: patches (h, w).
    """
    gap, line = 12, 20
    count, height, width, _ = columns[0][1].shape
    zoom = -(-CELL // width)  # whole, so that pixels and patches stay sharp
    height, width = height * zoom, width * zoom
    font = ImageFont.load_default(14)
    row = height + gap + (1 if cosines is None else 2) * line
    sheet = Image.new('RGB', (gap + len(columns) * (width + gap) + (0 if cosines is None else 64),
                              line + gap + count * row + len(notes) * line + gap), 'white')
    draw = ImageDraw.Draw(sheet)
    for number, (caption, pictures) in enumerate(columns):
        x = gap + number * (width + gap)
        draw.text((x + width / 2, gap / 2), caption, 'black', font, anchor='ma')
        for index, picture in enumerate(pictures):
            y = line + gap + index * row
            sheet.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST), (x, y))
            if number == 0:
                name = names[index]
                while draw.textlength(name, font) > width:
                    name = name.removesuffix('...')[:-1] + '...'
                draw.text((x, y + height + 2), name, 'black', font)
    if cosines is not None:  # x is the heat map's column
        radius = max(2, min(height // grid[0], width // grid[1]) // 8)
        for index, (values, hidden) in enumerate(zip(cosines, mask.bool())):
            top = line + gap + index * row
            for patch in (~hidden).nonzero().flatten().tolist():
                cx, cy = x + (patch % grid[1] + 0.5) * width / grid[1], top + (patch // grid[1] + 0.5) * height / grid[0]
                draw.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), 'white', 'black')
            patches = values[1:]
            draw.text((x, top + height + 2), f'mean of the patches {patches.mean():.3f}', 'black', font)
            draw.text((x, top + height + 2 + line), f'hidden {patches[hidden].mean():.3f}, visible '
                      f'{patches[~hidden].mean():.3f}, class token {values[0]:.3f}', 'black', font)
        bar = colour(np.linspace(1, 0, height)[:, None].repeat(16, axis=1))
        sheet.paste(Image.fromarray(bar), (x + width + gap, line + gap))
        for value, y in ((1, 0), (0.5, height / 2), (0, height)):
            draw.text((x + width + gap + 22, line + gap + y), f'{value:g}', 'black', font,
                      anchor={1: 'lt', 0.5: 'lm', 0: 'lb'}[value])
    for number, note in enumerate(notes):
        draw.text((gap, line + gap + count * row + number * line), note, 'black', font)
    return sheet


def write_picture(path, *parts):
    """`compose` of the parts, with our mark."""
    mark = PngInfo()
    mark.add_text('Software', MARK)
    compose(*parts).save(path, pnginfo=mark)


def check_out(path):
    """Raises InputError unless a picture may be written there: in a new file, or over one that this tool has drawn."""
    if path.suffix != '.png' or not path.parent.is_dir():
        raise models.InputError(f'--out {path} must end in .png, in an existing folder')
    try:
        drawn_here = not path.exists() or Image.open(path).info.get('Software') == MARK
    except OSError:
        drawn_here = False
    if not drawn_here:
        raise models.InputError(f'--out {path} exists, and this tool did not draw it: choose another name')


def get_args_parser():
    parser = argparse.ArgumentParser(description='pictures of a masked autoencoder or of a stage-1 student',
                                     allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--checkpoint', required=True, help='checkpoint of generic_distill.py, path or https URL')
    parser.add_argument('--check', action='store_true',
                        help='measure whether the MAE, or the student\'s teacher, is sound; best with a few hundred images')
    parser.add_argument('--model', help='with --check: name of the MAE, for files that do not hold it')
    parser.add_argument('--input_size', type=int, nargs='+',
                        help='with --check, pixels: one side, or height and width; as the checkpoint says, else 224')
    parser.add_argument('--teacher_path', help='checkpoint of the teacher; as the student was trained unless given')
    parser.add_argument('--teacher_model', help='name of the teacher; as the student was trained unless given')
    parser.add_argument('--images', nargs='+', required=True, help='image files')
    parser.add_argument('--out', required=True, type=Path, help='picture to write, ending in .png')
    parser.add_argument('--mask_ratio', type=float, help='share of hidden patches; as in training unless given')
    parser.add_argument('--seed', type=int, default=0, help='seed of the masks')
    return parser


def check(args):
    """Prints the losses of --check and the verdict; draws the picture first. Raises InputError if nothing was learnt."""
    model, fresh, files = load_mae(args)
    ratio = files[args.checkpoint].get('mask_ratio', 0.75) if args.mask_ratio is None else args.mask_ratio
    shown = argparse.Namespace(target='pixel', mask_ratio=ratio, input_size=list(model.patch_embed.img_size))
    noise = torch.rand(len(args.images), model.patch_embed.num_patches, generator=torch.Generator().manual_seed(args.seed))
    masking, losses = models.random_masking(noise, ratio), 0
    for start in range(0, len(noise), BATCH):
        part = slice(start, start + BATCH)
        images = torch.stack([read_image(path, shown) for path in args.images[part]])
        batch = models.Masking(*(x[part] for x in masking))
        losses = losses + measure((model, fresh), images, batch).double() * len(images) / len(noise)
    shares = losses[:, 0] / losses[:, 2]
    shown.norm_pix_loss = bool(shares[0] <= shares[1])
    row, spaces = 0 if shown.norm_pix_loss else 1, ('normalised per patch', 'plain pixels')
    print(f'loss at the hidden {ratio:.0%}, {len(noise)} images, best constant of each batch of up to {BATCH}:')
    print(f'{"":22}this decoder  untrained decoder  best constant  this / constant')
    for space, values, share in zip(spaces, losses, shares):
        print(f'{space:22}{values[0]:12.4f}{values[1]:19.4f}{values[2]:15.4f}{share:17.2f}')

    images = torch.stack([read_image(path, shown) for path in args.images[:4]])
    masking = models.Masking(*(x[:4] for x in masking))
    columns, others = (make_columns(network, None, shown, images, masking)[0] for network in (model, fresh))
    columns.append(('by an untrained decoder', others[-1][1]))
    text = 'loss {:.4f}, of an untrained decoder {:.4f}, of the best constant {:.4f}'.format(*losses[row])
    notes = [f'{spaces[row]}, {len(noise)} images: {text}', pasting_note(shown.norm_pix_loss)]
    write_picture(args.out, columns, None, [Path(path).name for path in args.images[:4]], masking.mask,
                  model.patch_embed.grid_size, notes)
    print(f'{args.out}: {len(images)} images')

    path, flags = next(iter(files)), ('--no-norm_pix_loss', '--norm_pix_loss')
    if not shares[row] < LEARNT:
        raise models.InputError(f'{path}: the decoder predicts no better than {LEARNT} x the best constant in either pixel '
                                f'space ({spaces[row]}: {text}): not a trained MAE for such images')
    print(f'verdict: {path} was trained on {"normalised" if shown.norm_pix_loss else "plain"} pixels: stage 1 needs '
          f'{flags[shown.norm_pix_loss]}' + (', the default' if shown.norm_pix_loss else ''))
    for file, stored in files.items():
        if stored.get('norm_pix_loss', shown.norm_pix_loss) != shown.norm_pix_loss:
            print(f'note: the verdict differs from {file}, whose arguments say {flags[stored["norm_pix_loss"]]}')


def main(args):
    check_out(args.out)
    if args.check:
        return check(args)
    if args.model or args.input_size:
        raise models.InputError('--model and --input_size are for --check')
    model, teacher, trained = load_stage1(args.checkpoint, args.teacher_path, args.teacher_model)
    trained.mask_ratio = trained.mask_ratio if args.mask_ratio is None else args.mask_ratio
    images = torch.stack([read_image(path, trained) for path in args.images])
    noise = torch.rand(len(images), model.patch_embed.num_patches, generator=torch.Generator().manual_seed(args.seed))
    masking = models.random_masking(noise, trained.mask_ratio)
    columns, cosines = make_columns(model, teacher, trained, images, masking)
    notes = [pasting_note(trained.norm_pix_loss)]
    if cosines is not None:
        notes.append(f'Cosine: student against teacher decoder block {trained.target_layer}, layer-normalised; '
                     'dots mark visible patches.')
    write_picture(args.out, columns, cosines, [Path(path).name for path in args.images], masking.mask,
                  model.patch_embed.grid_size, notes)
    print(f'{args.out}: {len(images)} images' + ('' if cosines is None else f', mean cosine {cosines[:, 1:].mean():.4f}'))


if __name__ == '__main__':
    try:
        main(get_args_parser().parse_args())
    except models.InputError as error:
        sys.exit(f'error: {error}')
