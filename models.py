"""What the stages share: networks, the mask, checkpoints, and data with repeatable random draws.

`MaskedAutoencoder` is an MAE (the stage-1 teacher) or, with `target_dim`, a G2SD student; timm's
vision transformers are the stage-2 networks. Parameters are named as in MAE and timm.
Sources: He et al., "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022); Huang, Peng
et al., "Generic-to-Specific Distillation of Masked Autoencoders" (CVPR 2023); Touvron et al.,
"Training data-efficient image transformers" (ICML 2021).
"""
import argparse
import atexit
import hashlib
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import time
import traceback
from datetime import timedelta
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Mlp, PatchEmbed, resample_abs_pos_embed, trunc_normal_
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torchvision.transforms import InterpolationMode, RandomResizedCrop, v2

# ---- names and sizes -----------------------------------------------------------------------------


class Size(NamedTuple):
    dim: int
    depth: int
    heads: int
    decoder_dim: int      # of `mae_vit_<size>_patchN` without a `_decXdYb` ending
    decoder_depth: int
    patch: int = 16


SIZES = {
    'huge': Size(1280, 32, 16, 512, 8),
    'large': Size(1024, 24, 16, 512, 8),
    'base': Size(768, 12, 12, 512, 8),       # the paper's teacher
    'small': Size(384, 12, 6, 256, 4),       # the paper's students: small and tiny
    'tiny': Size(192, 12, 3, 128, 4),
    # below the paper's sizes, for 32-pixel images, CPUs and tests
    'mini': Size(192, 6, 6, 128, 4),
    'micro': Size(128, 6, 4, 96, 4),
    'nano': Size(64, 4, 2, 64, 2),
    'pico': Size(32, 2, 2, 32, 2),
}


def parse_name(name, mae=False):
    """`vit_small_patch16`, or with `mae` `mae_vit_small_patch16_dec256d4b` -> Size."""
    pattern = r'vit_([a-z]+)_patch([1-9]\d*)'
    if mae:
        pattern = 'mae_' + pattern + r'(?:_dec([1-9]\d*)d([1-9]\d*)b)?'
    match = re.fullmatch(pattern, name)
    if not match or match[1] not in SIZES:
        form = 'mae_vit_SIZE_patchP[_decWIDTHdBLOCKSb]' if mae else 'vit_SIZE_patchP'
        raise SystemExit(f'unknown model name {name!r}: give {form}, SIZE: {", ".join(SIZES)}')
    size = SIZES[match[1]]._replace(patch=int(match[2]))
    if mae and match[3]:
        size = size._replace(decoder_dim=int(match[3]), decoder_depth=int(match[4]))
    return size


def check_img_size(img_size, patch):
    """int, [side] or (height, width) in pixels -> (height, width), both multiples of the patch."""
    sides = list(img_size) if isinstance(img_size, (list, tuple)) else [img_size]
    if len(sides) > 2 or any(side < patch or side % patch for side in sides):
        raise SystemExit(f'input size {sides} is not divisible by the patch size {patch}: give one '
                         f'or two multiples of {patch}')
    return sides[0], sides[-1]


# ---- masked autoencoder --------------------------------------------------------------------------


class Masking(NamedTuple):
    ids_keep: torch.Tensor      # (N, K) patch indices that the encoder sees
    ids_restore: torch.Tensor   # (N, L) where each patch went in the shuffled order
    mask: torch.Tensor          # (N, L) float, 0 = kept, 1 = hidden


def random_masking(noise, mask_ratio):
    """Keeps the int(L * (1 - mask_ratio)) patches with the smallest noise, as MAE does.

    noise: (N, L) in [0, 1). Returns a `Masking`.
    """
    length = noise.shape[1]
    keep = int(length * (1 - mask_ratio))
    if not 0 < keep < length:
        raise SystemExit(f'--mask_ratio {mask_ratio} keeps {keep} of {length} patches: some must '
                         'be kept and some hidden')
    ids_shuffle = torch.argsort(noise, dim=1)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    mask = torch.ones_like(noise)
    mask[:, :keep] = 0
    return Masking(ids_shuffle[:, :keep], ids_restore, mask.gather(1, ids_restore))


def sincos_position_table(dim, grid_size):
    """Fixed 2-D sine-cosine table, (1, 1 + H*W, dim) float32, with a zero row for the class token.

    Channels are [sin x, cos x, sin y, cos y]: MAE puts columns first, and its weights rely on it.
    """
    omega = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows = torch.arange(grid_size[0], dtype=torch.float64)
    columns = torch.arange(grid_size[1], dtype=torch.float64)
    y, x = torch.meshgrid(rows, columns, indexing='ij')
    x, y = torch.outer(x.flatten(), omega), torch.outer(y.flatten(), omega)
    table = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)  # (H*W, dim)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), table])[None].float()


def take(x, ids):
    """Rows `ids` (N, K) of x (N, L, D): (N, K, D)."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[2]))


class MaskedAutoencoder(nn.Module):
    """MAE with a ViT encoder and a light ViT decoder; names of parameters as in MAE.

    Without `target_dim` it predicts pixels (`decoder_norm`, `decoder_pred`): MAE, the teacher.
    With `target_dim` it is a G2SD student: after its decoder blocks a 2-layer MLP, `feature_head`,
    predicts `target_dim` numbers per token, with no norm in between (the authors' code).
    """

    def __init__(self, img_size, size, target_dim=None):
        super().__init__()
        dim, decoder_dim = size.dim, size.decoder_dim
        # the authors' code: 192 -> 8 and 64 -> 4 heads; MAE and every other width: width / 32
        decoder_heads = {192: 8, 64: 4}.get(decoder_dim, max(1, decoder_dim // 32))
        if decoder_dim % 4 or decoder_dim % decoder_heads:
            raise SystemExit(f'decoder width {decoder_dim}: give a multiple of 32')
        block = partial(
            Block, mlp_ratio=4.0, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
        self.patch_embed = PatchEmbed(img_size, size.patch, 3, dim)
        grid = self.patch_embed.grid_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_position_table(dim, grid), requires_grad=False)
        self.blocks = nn.ModuleList(block(dim, size.heads) for _ in range(size.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

        self.decoder_dim = decoder_dim
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(
            sincos_position_table(decoder_dim, grid), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            block(decoder_dim, decoder_heads) for _ in range(size.decoder_depth))
        self.target_dim = target_dim
        if target_dim is None:
            self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
            self.decoder_pred = nn.Linear(decoder_dim, self.pixel_dim)
        else:
            self.feature_head = Mlp(decoder_dim, target_dim, target_dim)
        self.apply(self._init_weights)
        # a view of the kernel: MAE treats the patch projection as the linear layer that it is
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    @staticmethod
    def _init_weights(module):
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.zeros_(module.bias)

    @property
    def pixel_dim(self):
        """Numbers per patch: patch * patch * 3."""
        return 3 * self.patch_embed.patch_size[0] * self.patch_embed.patch_size[1]

    def patchify(self, images):
        """(N, 3, H, W) -> (N, L, p*p*3): rows of patches, in each patch rows, columns, colours."""
        n, c, _, _ = images.shape
        (h, w), (p, q) = self.patch_embed.grid_size, self.patch_embed.patch_size
        return images.reshape(n, c, h, p, w, q).permute(0, 2, 4, 3, 5, 1).reshape(n, h * w, p * q * c)

    def unpatchify(self, patches):
        """(N, L, p*p*3) -> (N, 3, H, W), the inverse of `patchify`."""
        (h, w), (p, q) = self.patch_embed.grid_size, self.patch_embed.patch_size
        images = patches.reshape(-1, h, w, p, q, 3).permute(0, 5, 1, 3, 2, 4)
        return images.reshape(-1, 3, h * p, w * q)

    def encode(self, images, masking):
        """(N, 3, H, W) -> (N, 1+K, D): class token and the kept patches, after the final norm."""
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        x = take(x, masking.ids_keep)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls_token, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, latent, masking, blocks):
        """(N, 1+K, D) -> (N, 1+L, decoder_dim); mask tokens stand for the hidden patches."""
        x = self.decoder_embed(latent)
        hidden = masking.ids_restore.shape[1] - masking.ids_keep.shape[1]
        mask_tokens = self.mask_token.to(x.dtype).expand(len(x), hidden, -1)
        patches = take(torch.cat([x[:, 1:], mask_tokens], dim=1), masking.ids_restore)
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in blocks:
            x = block(x)
        return x

    def decoder_features(self, images, masking, layer):
        """Hidden state after decoder block `layer` (1-based), before `decoder_norm`: (N, 1+L, D).

        The distillation target of stage 1. Blocks behind `layer` are not run.
        """
        return self.decode(self.encode(images, masking), masking, self.decoder_blocks[:layer])

    def predict_features(self, images, masking):
        """The student's prediction for every token, class token first: (N, 1+L, target_dim)."""
        latent = self.encode(images, masking)
        return self.feature_head(self.decode(latent, masking, self.decoder_blocks))

    def reconstruct(self, images, masking):
        """Predicted pixels of every patch, in `patchify`'s order: (N, L, p*p*3)."""
        x = self.decode(self.encode(images, masking), masking, self.decoder_blocks)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]  # class token dropped

    def forward(self, images, masking, layer=None):
        """`decoder_features` with a layer; else `predict_features` or, as MAE, `reconstruct`."""
        if layer is not None:
            return self.decoder_features(images, masking, layer)
        if self.target_dim is not None:
            return self.predict_features(images, masking)
        return self.reconstruct(images, masking)


def create_mae(name, img_size=224, target_dim=None):
    """A `MaskedAutoencoder` by name (`mae_vit_base_patch16`); img_size: int or (height, width)."""
    size = parse_name(name, mae=True)
    return MaskedAutoencoder(check_img_size(img_size, size.patch), size, target_dim)


# ---- vision transformers -------------------------------------------------------------------------


class LayerDecayGroups:
    """Layer decay as in MAE and the authors' code: stem, blocks, all else at the full rate.

    timm gives the final norm the last block's rate and the distillation token the stem's.
    """

    def group_matcher(self, coarse=False):
        return {'stem': r'^(?:cls_token|pos_embed|patch_embed)', 'blocks': r'^blocks\.(\d+)'}


class PlainViT(LayerDecayGroups, VisionTransformer):
    """timm's VisionTransformer; only the layer-decay groups differ."""


class DistilledViT(LayerDecayGroups, VisionTransformerDistilled):
    """timm's DeiT with distillation token and second head, with other layer-decay groups."""

    def init_weights(self, *args, **kwargs):
        super().init_weights(*args, **kwargs)
        # ours: the token starts without position, so 197-position checkpoints give the same outputs
        nn.init.zeros_(self.pos_embed[:, 1].detach())


def create_vit(name, num_classes, img_size=224, distilled=False, global_pool='token',
               drop_path_rate=0.0):
    """Classifier by name (`vit_small_patch16`): timm's VisionTransformer, or DeiT if `distilled`.

    global_pool: 'token' (class token, as DeiT) or 'avg' (mean of patch tokens, then `fc_norm`, as
    MAE); False and True mean the same. In training mode a distilled network returns (class logits,
    distillation logits), else the mean of the two.
    """
    size = parse_name(name)
    options = {'img_size': check_img_size(img_size, size.patch), 'patch_size': size.patch,
               'embed_dim': size.dim, 'depth': size.depth, 'num_heads': size.heads,
               'num_classes': num_classes, 'drop_path_rate': drop_path_rate}
    if not distilled:
        global_pool = {False: 'token', True: 'avg'}.get(global_pool, global_pool)
        return PlainViT(global_pool=global_pool, **options)
    model = DistilledViT(**options)
    model.set_distilled_training(True)
    return model


def reset_head(model):
    """Starts the class head for fine-tuning, std 2e-5 (MAE); a distillation head keeps 0.02."""
    trunc_normal_(model.head.weight, std=2e-5)
    nn.init.zeros_(model.head.bias)


# ---- weights: reading ----------------------------------------------------------------------------

DECODER_HELP = (
    'stage 1 needs the complete MAE: mae_pretrain_vit_base_full.pth (norm-pix loss) or '
    "mae_visualize_vit_base.pth (pixel loss) from MAE's repository, or Hugging Face's "
    "facebook/vit-mae-base; mae_pretrain_vit_base.pth and timm's vit_*.mae hold the encoder alone")

# Hugging Face ViTMAE -> MAE/timm names, in this order; query, key and value are joined afterwards
HUGGING_FACE = (
    (r'^(vit\.)?embeddings\.cls_token', 'cls_token'),
    (r'^(vit\.)?embeddings\.position_embeddings', 'pos_embed'),
    (r'^(vit\.)?embeddings\.patch_embeddings\.projection\.', 'patch_embed.proj.'),
    (r'^(vit\.)?(encoder\.layer|layers)\.', 'blocks.'),
    (r'^(vit\.)?layernorm\.', 'norm.'),
    (r'^classifier\.', 'head.'),
    (r'^decoder\.decoder_(layers|encoder\.layer)\.', 'decoder_blocks.'),
    (r'^decoder\.', ''),
    # query, key, value in files; q_proj, k_proj, v_proj in memory
    (r'\.attention\.(attention\.)?(q|k|v)(uery|ey|alue|_proj)\.', r'.attn.\2.'),
    (r'\.attention\.(output\.dense|o_proj)\.', '.attn.proj.'),
    (r'\.intermediate\.dense\.', '.mlp.fc1.'),
    (r'\.output\.dense\.', '.mlp.fc2.'),
    (r'\.layernorm_before\.', '.norm1.'),
    (r'\.layernorm_after\.', '.norm2.'),
)


def from_hugging_face(state_dict):
    """ViTMAE's names, with or without `vit.`, of files and in memory -> MAE's names."""
    renamed = {}
    for key, value in state_dict.items():
        for pattern, name in HUGGING_FACE:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    for key in [key for key in renamed if '.attn.q.' in key]:
        parts = [renamed.pop(key.replace('.q.', f'.{part}.')) for part in 'qkv']
        renamed[key.replace('.q.', '.qkv.')] = torch.cat(parts)
    return renamed


def read_checkpoint(path):
    """Path or https URL -> the dict in the file, read weights-only: code in a pickle is refused.

    `argparse.Namespace` is allowed beyond torch's list: MAE's, DeiT's and DINO's files hold one.
    """
    if str(path).startswith('https://'):  # into torch hub's cache; many models share a file name
        url, name = path, hashlib.sha256(path.encode()).hexdigest()[:8] + '-' + Path(path).name
        path = Path(torch.hub.get_dir(), 'checkpoints', name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path))
    path = Path(path)
    if not path.is_file():
        raise SystemExit(f'no checkpoint file at {path}')
    try:
        if path.suffix == '.safetensors':
            from safetensors.torch import load_file
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    # a damaged file makes the unpickler raise nearly anything; torch's text advises the unsafe way
    except Exception as error:
        refused = re.search(r'GLOBAL (\S+)', str(error))
        reason = f'it wants to use {refused[1]}' if refused else type(error).__name__
        raise SystemExit(f'{path} is no readable checkpoint ({reason}): a truncated download, '
                         'another kind of file, or more than tensors and plain types') from error
    if not isinstance(checkpoint, dict):
        raise SystemExit(f'{path} holds a {type(checkpoint).__name__} in place of a state dict')
    return checkpoint


def own_args(checkpoint):
    """The flags of the run that wrote a checkpoint of these scripts; {} for the files of others."""
    stored = checkpoint.get('args')
    ours = isinstance(stored, dict) and isinstance(stored.get('input_size'), (list, tuple))
    return stored if ours else {}


def find_state_dict(checkpoint, path, first=()):
    """What `read_checkpoint` gave -> the dict of tensors in it, under the names of the file.

    first: keys that are looked for before those of MAE, DeiT, timm, DINO and iBOT.
    """
    state = checkpoint
    for key in (*first, 'model', 'state_dict', 'teacher', 'student'):
        if isinstance(checkpoint.get(key), dict):
            state = checkpoint[key]
            break
    if not state or not all(torch.is_tensor(value) for value in state.values()):
        raise SystemExit(f'{path} holds no state dict, a dict of tensors by name')
    return state


def flat_state_dict(checkpoint, path):
    """What `read_checkpoint` gave -> flat state dict in timm/MAE names; see `load_checkpoint`."""
    state = find_state_dict(checkpoint, path)
    if any('patch_embeddings.projection' in key for key in state):
        state = from_hugging_face(state)
    # module., backbone., _orig_mod., encoder. ...: whatever stands before the patch projection
    projections = [key for key in state if key.endswith('patch_embed.proj.weight')]
    prefix = re.escape(projections[0].removesuffix('patch_embed.proj.weight')) if projections else ''
    state = {re.sub(rf'^{prefix}|^module\.', '', key): value for key, value in state.items()}
    if 'decoderfeature_pred.fc1.weight' in state:  # the authors' student; these heads go unused
        unused = ('encoderfeature_pred.', 'decoder_norm.', 'decoder_pred.')
        state = {key.replace('decoderfeature_pred.', 'feature_head.'): value
                 for key, value in state.items() if not key.startswith(unused)}
    # LayerScale of DeiT III, DINOv2 in timm: a factor of what attention and MLP add, folded into them
    for key in [key for key in state if re.search(r'\.ls[12]\.gamma$', key)]:
        gamma, layer = state.pop(key), 'attn.proj' if '.ls1.' in key else 'mlp.fc2'
        name = re.sub(r'ls[12]\.gamma$', layer, key)
        state[f'{name}.weight'] = gamma[:, None] * state[f'{name}.weight']
        state[f'{name}.bias'] = gamma * state[f'{name}.bias']
    return state


def load_checkpoint(path):
    """Local path or https URL -> flat state dict on the CPU, in timm/MAE names.

    Reads a bare state dict, `model`, `state_dict`, DINO's and iBOT's `teacher`/`student`, wrappers'
    prefixes, Hugging Face's ViTMAE (.bin, .safetensors), and the G2SD authors' student.
    """
    return flat_state_dict(read_checkpoint(path), path)


def fit_positions(model, state_dict, path, flags):
    """Brings `pos_embed` and `decoder_pos_embed` to the model's tokens and grid, in place.

    The rows before the patches are [class] or [class, distillation]; missing ones become zero (DeiT
    III has none). A detector's table, (1, H, W, D), has no such rows. Grids are resized bicubically
    without antialiasing, as in MAE and DeiT. flags: `own_args` of the checkpoint, which tell its
    grid; other files' grids are square. Returns what it did, in words.
    """
    done, own_parameters = [], dict(model.named_parameters())
    if any('reg_token' in key or 'register_token' in key for key in state_dict):
        raise SystemExit(f'{path} has register tokens, which the networks here do not have')
    for key in ('pos_embed', 'decoder_pos_embed'):
        table, own = state_dict.get(key), own_parameters.get(key)
        if table is None or own is None or table.ndim != 3:
            continue
        rows, patch = table.shape[1], model.patch_embed.patch_size
        grid = tuple(own.shape[1:3]) if own.ndim == 4 else model.patch_embed.grid_size
        if flags:
            old_grid = flags['input_size'][0] // patch[0], flags['input_size'][-1] // patch[1]
        else:
            side = math.isqrt(rows)
            old_grid = side, side
            if rows - 1 != side ** 2 and rows - 1 == grid[0] * grid[1]:
                old_grid = grid
        prefix = rows - old_grid[0] * old_grid[1]
        if not 0 <= prefix <= 1 + ('dist_token' in state_dict):
            raise SystemExit(f'{path}: {key} has {rows} rows, which are not a class token and the '
                             f'patches of {patch[0]} pixels: give the right --model or --input_size')
        if old_grid != grid:
            table = resample_abs_pos_embed(table, grid, old_grid, prefix, antialias=False)
            done.append(f'{key} {old_grid[0]}x{old_grid[1]} -> {grid[0]}x{grid[1]}')
        if own.ndim == 4:  # a detector's
            state_dict[key] = table[:, prefix:].unflatten(1, grid)
            continue
        if prefix == 0:
            table = F.pad(table, (0, 0, 1, 0))
            done.append(f'{key}: zero position for the class token')
        if own.shape[1] > table.shape[1]:
            table = torch.cat([table[:, :1], torch.zeros_like(table[:, :1]), table[:, 1:]], dim=1)
            done.append('zero position for the distillation token')
        elif own.shape[1] < table.shape[1]:
            table = torch.cat([table[:, :1], table[:, 2:]], dim=1)
        state_dict[key] = table
    return done


def unfinished(checkpoint):
    """['after 2 of 4 epochs'] if stage 1 or classification saved it before its end, else []."""
    epochs = own_args(checkpoint).get('epochs', 0)
    if epochs and checkpoint.get('epoch', epochs) + 1 < epochs:
        return [f'after {checkpoint["epoch"] + 1} of {epochs} epochs']
    return []


def load_strictly(model, state_dict, path):
    """`load_state_dict`, but a mismatch ends in one line, with the start of torch's message."""
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        reasons = '; '.join(line.strip()[:200] for line in str(error).splitlines()[1:4])
        raise SystemExit(f'{path} was made by another architecture: {reasons}') from error


def load_weights(model, path):
    """Loads all weights of a model strictly, positions resized if need be; prints what it loaded.

    An MAE without its decoder has a message of its own: users of the authors' code met this.
    """
    checkpoint = read_checkpoint(path)
    state_dict = flat_state_dict(checkpoint, path)
    if hasattr(model, 'decoder_blocks') and not any(key.startswith('decoder') for key in state_dict):
        raise SystemExit(f'{path} has no decoder: {DECODER_HELP}')
    resized = fit_positions(model, state_dict, path, own_args(checkpoint))
    load_strictly(model, state_dict, path)
    print(f'loaded {len(state_dict)} tensors of {path}', *unfinished(checkpoint), *resized, sep='; ')


def load_teacher(model, path):
    """`load_weights`; returns the model frozen and in eval mode."""
    load_weights(model, path)
    return model.requires_grad_(False).eval()


def check_classes(theirs, ours, path):
    """Ends the run if a checkpoint's class names are not those of the data, in the same order."""
    if theirs is not None and list(theirs) != list(ours):
        differ = [f'{a} and {b}' for a, b in zip_longest(theirs, ours, fillvalue='none') if a != b]
        raise SystemExit(f'{path}: trained on {len(theirs)} classes, the data has {len(ours)}; first '
                         f'difference: {differ[0]}')


# what a stage-2 network may have that the file lacks, and the reverse
NEW = r'(head|head_dist|fc_norm)\.|dist_token$|blocks\.\d+\.(gamma_[12]|attn\.rel(ative)?_pos\w*)$'
LEFT_OUT = (r'(decoder_\w+|feature_head|head|head_dist|fc_norm|norm|pooler)\.|(decoder_pos_embed|'
            r'mask_token|masked_embed|dist_token|cls_token|blocks\.\d+\.attn\.k_bias)$')


def load_pretrained(model, path):
    """Starts a stage-2 network from any encoder: stage 1, MAE, DeiT, DINO, iBOT, timm, HF.

    Heads, distillation token, `fc_norm`, relative positions and LayerScale keep their start values;
    decoders, heads and what the network has no place for are left out. Anything else missing,
    unexpected or of another shape ends the run. Prints what was used.
    """
    checkpoint = read_checkpoint(path)
    state = flat_state_dict(checkpoint, path)
    done = fit_positions(model, state, path, own_args(checkpoint))
    own = model.state_dict()
    # timm's Beit splits this bias, and has none for the keys: it cancels in the softmax
    for key in [key for key in state if key not in own and key.replace('qkv.bias', 'q_bias') in own]:
        for part, bias in zip('qkv', state.pop(key).chunk(3)):
            state[key.replace('qkv.bias', f'{part}_bias')] = bias
    # the final norm gives way to fc_norm under global pooling, as in MAE's fine-tuning
    new = [key for key in own if key not in state or re.match(r'head(_dist)?\.', key)]
    left_out = [key for key in state if key not in own or key in new]
    wrong = [key for key in new if not re.match(NEW, key)]
    wrong += [key for key in left_out if not re.match(LEFT_OUT, key)]
    if wrong:
        raise SystemExit(f'{path} does not fit the network: {", ".join(wrong[:3])} ... are missing '
                         'or left over; give the right --model (or --global_pool)')
    used = {key: state[key] for key in own if key not in new}
    load_strictly(model, {**own, **used}, path)
    for what, keys in (('new', new), ('left out', left_out)):
        groups = {re.sub(r'^blocks\.\d+\.(.*\.)?|\..*', '', key) for key in keys}
        done.append(f'{what}: {", ".join(sorted(groups)) or "nothing"}')
    print(f'start weights: {len(used)} tensors of {path}', *unfinished(checkpoint), *done, sep='; ')


# ---- weights: saving and resuming ----------------------------------------------------------------


def save_checkpoint(args, epoch, step, loader, classes=None, **parts):
    """Writes output_dir/checkpoint.pth after `step` steps; the one before stays as previous.pth.

    parts: what has a state_dict, by name. A kill leaves the old file or the new one. All processes
    call it (for the meter's sums), rank 0 writes. Every --save_every epochs also checkpoint-N.pth.
    """
    finished = step == len(loader)
    checkpoint = {name: part.state_dict() for name, part in parts.items()}
    if args.rank:
        return
    checkpoint |= {'epoch': epoch if finished else epoch - 1, 'classes': classes,
                   'args': vars(args), 'samples': 0 if finished else loader.sampler.samples(step)}
    path = Path(args.output_dir, 'checkpoint.pth')
    temporary = path.with_suffix('.tmp')
    with open(temporary, 'wb') as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        path.replace(path.with_name('previous.pth'))
    temporary.replace(path)
    if finished and args.save_every and (epoch + 1) % args.save_every == 0:
        torch.save(checkpoint, path.with_name(f'checkpoint-{epoch}.pth'))


def find_checkpoint(args):
    """(path, contents) of --resume; auto: newest readable in --output_dir; else (None, None)."""
    paths = [args.resume] if args.resume else []
    if args.resume == 'auto':
        paths = [Path(args.output_dir, name) for name in ('checkpoint.pth', 'previous.pth')]
        paths = [path for path in paths if path.exists()]
    for path in paths:
        try:
            return path, read_checkpoint(path)
        except SystemExit as error:
            if path == paths[-1]:
                raise
            print(f'warning: {error}; going on from {paths[-1]}')
    return None, None


# args that are no recipe: `resume` does not report their changes
RUN_ARGS = ('rank', 'world_size', 'distributed', 'resume', 'config', 'output_dir')


def resume(args, classes=None, fixed=(), **parts):
    """Loads --resume strictly into the parts; returns (epoch to go on with, samples of it done).

    Prints which flags have changed. fixed: flags that must be as they were. parts: as in
    `save_checkpoint`.
    """
    path, checkpoint = find_checkpoint(args)
    if args.distributed:
        paths = [None] * args.world_size
        dist.all_gather_object(paths, str(path))
        if len(set(paths)) > 1:
            raise SystemExit(f'processes see different checkpoints, {min(paths)} and {max(paths)}: '
                             'all machines must share the disk of --output_dir')
    if path is None:
        return 0, 0
    if 'meter' not in checkpoint:
        raise SystemExit(f'{path} is of an older version of these scripts, or another program, and '
                         'cannot be resumed; --finetune and --teacher_path can use its weights')
    for name in fixed:
        if checkpoint['args'].get(name) != getattr(args, name):
            raise SystemExit(f'{path} cannot be resumed: --{name} was {checkpoint["args"].get(name)}')
    check_classes(checkpoint['classes'], classes or [], path)
    load_strictly(parts.pop('model'), checkpoint['model'], path)
    # the file's moments and rates; weight decay, layer decay and so on are those of this run
    groups = parts['optimizer'].state_dict()['param_groups']
    old = checkpoint['optimizer']['param_groups']
    if [group['params'] for group in groups] != [group['params'] for group in old]:
        raise SystemExit(f'{path} cannot be resumed: its parameters are grouped in another way, '
                         'give the --weight_decay, --layer_decay and --teacher_path that it had')
    for group, stored in zip(groups, old):
        group['lr'] = stored['lr']
    checkpoint['optimizer']['param_groups'] = groups
    for name, part in parts.items():
        # a scaler that was off has no state
        part.load_state_dict(checkpoint[name] or part.state_dict())
    epoch, samples, changed = checkpoint['epoch'], checkpoint['samples'], []
    for name, value in checkpoint['args'].items():
        if getattr(args, name, value) != value and name not in RUN_ARGS:
            changed.append(f'--{name} was {value}')
    print(f'resumed {path}: {epoch + 1} {parts["meter"].unit}s and {samples} samples are done',
          *changed, sep='; ')
    # of a finished epoch nothing is left to train: it is evaluated and logged again
    return (epoch + 1, samples) if samples else (epoch, math.inf)


# ---- printed lines -------------------------------------------------------------------------------


def record_event():
    """Records and returns a CUDA event that knows its time."""
    return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))


class Meter:
    """Means of the loss terms over an epoch (or round), and the printed lines."""

    def __init__(self, args, optimizer, epochs, unit='epoch'):
        self.args, self.optimizer, self.epochs, self.unit = args, optimizer, epochs, unit
        self.names, self.rows, self.sums, self.steps = [], [], 0.0, 0
        self.grad_norm, self.seconds, self.step_done = torch.zeros(()), 0.0, None

    def log_every(self, loader, epoch, start):
        """Yields (step, batch) from `start` on; prints after the first update and --print_freq steps."""
        if start == 0:
            self.sums, self.steps = 0.0, 0
        steps, waited, gaps = len(loader), 0.0, []
        self.step_done = None
        line_clock = self.clock = time.time()
        for step, batch in enumerate(loader if start < steps else (), start):
            if self.step_done is None:
                waited += time.time() - self.clock
            else:  # the host runs ahead of a GPU: what counts is the GPU's own idle time
                gaps.append((self.step_done, record_event()))
            yield step, batch
            done = step + 1
            if done in (start + self.args.accum_iter, steps) or done % self.args.print_freq == 0:
                count, means = len(self.rows), self.flush()  # waits for the device
                spent = (self.clock - line_clock) / count  # per step
                rate = self.args.batch_size * self.args.world_size / spent
                eta = timedelta(seconds=int(spent * ((self.epochs - epoch) * steps - done)))
                waited += sum(end.elapsed_time(ready) for end, ready in gaps) / 1000
                wait = waited / (spent * count)
                means = ' '.join(f'{k} {v:.4f}' for k, v in zip(self.names, means))
                line = (f'{time.strftime("%X")} {self.unit} {epoch}/{self.epochs} step {done}/{steps} '
                        f'{means} lr {self.lr():.3g} grad_norm {self.grad_norm.item():.3g} '
                        f'{rate:.{int(rate < 10)}f} images/s data {wait:.0%} eta {eta}')
                if torch.cuda.is_initialized():
                    line += f' memory {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GB'
                print(line)
                waited, gaps, line_clock = 0.0, [], self.clock

    def update(self, grad_norm, **terms):
        """Adds a step's scalars, tensors of the same names in each step, without a host sync."""
        self.names = list(terms)
        self.rows.append(torch.stack([term.detach().float() for term in terms.values()]))
        self.grad_norm = self.grad_norm if grad_norm is None else grad_norm
        if self.rows[-1].is_cuda:
            self.step_done = record_event()
        self.tick()

    def tick(self):
        """Adds the time since the last tick to the seconds of training."""
        now = time.time()
        self.seconds, self.clock = self.seconds + now - self.clock, now

    def flush(self):
        """Means (terms,) of steps since the last line, over all processes; adds them to the sums.

        Ends the run if one is not finite.
        """
        count, sums = len(self.rows), torch.stack(self.rows).double().sum(dim=0).cpu()
        if self.args.distributed:
            dist.all_reduce(sums)
        sums /= self.args.world_size
        values = dict(zip(self.names, sums.tolist()))
        if self.args.amp != 'fp16':  # which skips an update whose gradient overflows
            values['grad_norm'] = self.grad_norm.item()
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise SystemExit(f'not finite: {", ".join(bad)}. Nothing is saved, any older '
                             'checkpoint stays; lower the learning rate')
        self.rows, self.sums, self.steps = [], self.sums + sums, self.steps + count
        self.tick()
        return sums / count

    def lr(self):
        return max(group['lr'] for group in self.optimizer.param_groups)

    def stats(self):
        """The epoch's means under the names of log.txt."""
        means = zip(self.names, (self.sums / self.steps).tolist())
        return {**{f'train_{name}': mean for name, mean in means},
                'train_lr': self.lr(), 'train_seconds': round(self.seconds, 2)}

    def state_dict(self):
        if self.rows:
            self.flush()
        return {name: getattr(self, name) for name in ('names', 'sums', 'steps', 'seconds')}

    def load_state_dict(self, state):
        vars(self).update(state)


# ---- seeded data ---------------------------------------------------------------------------------

SAMPLE, STEP, START = 1, 2, 3  # last entry of a seed's key: no two kinds of draws share a stream


def seed_everything(*key):
    """Seeds torch, numpy and random from integers, e.g. (seed, epoch, index, SAMPLE)."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 100 times as long
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


class DataError(Exception):
    """A bad file of the data, by name. Scripts print the message alone, even out of a worker."""


def open_image(path):
    """Image file -> loaded Pillow image; raises `DataError`."""
    try:
        with Image.open(path) as file:
            file.load()
            return file
    except Exception as error:  # decoders raise nearly anything on a damaged file
        reason = str(error) or type(error).__name__
        raise DataError(f'cannot read {path} ({reason}): repair or remove the file') from error


def read_rgb(path, size=None):
    """Image file -> Pillow RGB image. 16-bit grey is scaled; convert() would clip it to white.

    size: (height, width) of the image's annotation. With it the orientation that EXIF tells is
    applied, unless only the stored pixels have this size.
    """
    image = open_image(path)
    if size is not None:
        turned = ImageOps.exif_transpose(image)
        if tuple(size) != image.size[::-1] or turned.size == image.size:
            image = turned
    if image.mode.startswith('I'):
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    return image.convert('RGB')


@cache
def image_statistics(device):
    """ImageNet's mean and standard deviation, (3, 1, 1) each, made once per device."""
    return [torch.tensor(values, device=device)[:, None, None]
            for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]


def normalise(images):
    """(..., 3, H, W) uint8 on any device -> float32 with ImageNet's mean and standard deviation."""
    if images.dtype != torch.uint8:
        raise TypeError(f'images must be uint8, not {images.dtype}: they are normalised here')
    mean, std = image_statistics(images.device)
    return (images.float() / 255 - mean) / std


class ResizedCrop(RandomResizedCrop):
    """torchvision's RandomResizedCrop, bicubic: PIL image -> (3, height, width) uint8.

    The same crops; torch's kernel takes a third of Pillow's time.
    """

    def forward(self, image):
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        pixels = v2.functional.pil_to_tensor(image.crop((left, top, left + width, top + height)))
        return v2.functional.resize(pixels, self.size, InterpolationMode.BICUBIC, antialias=True)


def count_classes(classes):
    """Words for the data line: the number of classes, and their names if they are few or hidden."""
    shown = [name for name in classes if len(classes) <= 10 or name.startswith('.')]
    return f'{len(classes)} classes' + (f': {", ".join(shown)}' if shown else '')


def load_cifar(args, train, transform=None):
    """torchvision's CIFAR10 or CIFAR100, as DeiT reads it."""
    try:
        return getattr(torchvision.datasets, args.data_set)(args.data_path or '', train, transform)
    except RuntimeError as error:
        raise SystemExit(f'--data_path {args.data_path} holds no {args.data_set} of torchvision: '
                         f'torchvision.datasets.{args.data_set}(path, download=True)') from error


class SeededDataset(torch.utils.data.Dataset):
    """(epoch, index) -> dataset[index], random only in (seed, epoch, index).

    So a resume is exact, and the numbers of workers and of processes change nothing.
    """

    def __init__(self, dataset, seed):
        self.dataset, self.seed = dataset, seed

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        epoch, index = key
        seed_everything(self.seed, epoch, index, SAMPLE)
        return self.dataset[index]


class SeededSampler(torch.utils.data.Sampler):
    """Yields (pass, index) from an endless stream of passes over the data, each in its own order.

    Epoch e is pass e up to its last whole update. Where training counts iterations, an epoch is a
    round: the next `round_updates` updates of the stream, `total_updates` in all. At every step all
    processes together see the same samples, however split. `set_epoch` comes before each pass.
    """

    def __init__(self, length, args, round_updates=None, total_updates=None):
        self.length, self.seed, self.accum_iter = length, args.seed, args.accum_iter
        self.rank, self.world_size = args.rank, args.world_size
        self.per_step = args.batch_size * args.world_size
        self.round_updates, self.total_updates = round_updates, total_updates
        if round_updates is None and length < self.per_step * args.accum_iter:
            raise SystemExit(f'the data set has {length} images, fewer than one batch of '
                             f'{self.per_step * args.accum_iter} (--batch_size x --accum_iter '
                             'x processes): lower --batch_size or --accum_iter')
        self.set_epoch(0)

    def set_epoch(self, epoch, done=0):
        """done: samples already trained on, inf: all. Returns the step to start from."""
        per_update = self.per_step * self.accum_iter
        if self.round_updates is None:
            first, updates = epoch * self.length, self.length // per_update
        else:
            first = epoch * self.round_updates * per_update
            updates = min(self.round_updates, self.total_updates - epoch * self.round_updates)
        # in whole updates: a resume may change the batch size
        left = int(max(0, updates * per_update - done) // per_update)
        self.steps = updates * self.accum_iter
        self.done = done if left else updates * per_update
        self.first = first + self.done
        self.last = self.first + left * per_update
        self.start = self.steps - left * self.accum_iter
        return self.start

    def samples(self, step):
        """Samples of the epoch that all processes together have seen after `step` of its steps."""
        return self.done + (step - self.start) * self.per_step

    def __len__(self):
        return self.steps * self.per_step // self.world_size  # of the whole epoch, resumed or not

    def __iter__(self):
        number = None
        for position in range(self.first + self.rank, self.last, self.world_size):
            if position // self.length != number:
                number = position // self.length
                order = np.random.default_rng((self.seed, number)).permutation(self.length)
            yield number, int(order[position % self.length])


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
if sys.platform == 'linux' and multiprocessing.get_start_method(allow_none=True) is None:
    multiprocessing.set_start_method('fork')  # Python 3.14 has another; start_worker needs this one


def start_worker(_):
    """A data worker's start: torchrun signals the whole group, and the parent needs its workers."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if os.getppid() != multiprocessing.parent_process().pid:  # it died; torch would not notice
        os._exit(1)


@atexit.register
def kill_workers():
    """At exit Python would send data workers a signal that they ignore, and wait for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes their end for an error
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


# ---- the end of a run that failed ----------------------------------------------------------------


def end_run(error):
    """Ends a script after an error: one line where its user can help it, else the traceback.

    One of several processes ends at once; torchrun then stops the others, which wait for it.
    """
    line, text = str(error), f'{error} {error.__cause__}'  # the cause tells why a worker ended
    if isinstance(error, DataError):  # out of a data worker it is the last line of a traceback
        line = line.splitlines()[-1].removeprefix('models.DataError: ')
    elif isinstance(error, torch.OutOfMemoryError) or 'CUDA error: out of memory' in text:
        line = (f'{line.splitlines()[0]} Lower --batch_size, in training raise --accum_iter by as much; '
                'nvidia-smi shows what other processes hold')
    elif re.search('out of shared memory|</torch_.*No space left', text):
        line = ('/dev/shm is full, over which data workers send images: lower --num_workers, or give '
                'more (docker: --ipc=host)')
    elif not dist.is_initialized():
        raise error
    elif re.search('gloo.*(closed|reset) by peer', text):
        line = 'another process has ended: its message says why'
    elif not isinstance(error, SystemExit):
        line = ''.join(traceback.format_exception(error))
    if dist.is_initialized():
        print(line, file=sys.stderr, flush=True)
        kill_workers()
        os._exit(1)
    sys.exit(line)
