"""What several stages build: the networks, the mask, strict checkpoint reading, and data whose draws can be repeated.

One class per role: `MaskedAutoencoder` is an MAE (the stage-1 teacher) or, with `target_dim`, a G2SD student; timm's vision
transformers are the stage-2 networks. State-dict names follow MAE and timm, so published checkpoints load without a table.
Sources: He et al., "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022); Huang, Peng et al., "Generic-to-Specific
Distillation of Masked Autoencoders" (CVPR 2023); Touvron et al., "Training data-efficient image transformers" (ICML 2021).
"""
import argparse
import atexit
import contextlib
import errno
import hashlib
import json
import math
import multiprocessing
import os
import pickle
import pickletools
import random
import re
import signal
import sys
import warnings
import zipfile
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torchvision
import torch.nn.functional as F
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Mlp, PatchEmbed, resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from timm.utils import is_distributed_env, world_info_from_env
from torch import nn
from torchvision.transforms import InterpolationMode, RandomResizedCrop, v2


class InputError(ValueError):
    """Something that the user gave cannot work. The scripts print it as one line and exit with an error status."""

    def __init__(self, message):
        # names of files may hold line breaks. Out of a data worker it comes with a traceback, whose last line it is
        super().__init__(message if message.startswith('Caught ') else ' '.join(message.splitlines()))


def say(*words):
    """print() on the first process only, at once."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*words, flush=True)


# -------------------------------------------------------------------------------------------- processes, signals and files


TIMEOUT = timedelta(minutes=30)  # for one answer of the other processes: longer than an evaluation that one does alone
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # SLURM's, torchrun's and spot machines' request to come to an end


class Stopped(Exception):
    """A signal asked the run to end; all processes agreed and the position is on the disk. The scripts exit with 0."""


class Stop:
    """The stop signal that this process got, 0 while there is none, and the group in which all processes compare theirs.

    The group is gloo's: a comparison in each update must not wait for the GPU.
    """
    signal, group = 0, None


def join_processes(args):
    """Joins the processes that torchrun or SLURM started; sets args.rank, .local_rank, .world_size, .distributed, .device.

    timm.utils.init_distributed_device does the same, but cannot be told how long to wait for a process that does not answer.
    """
    args.distributed, cuda = is_distributed_env(), args.device.startswith('cuda')
    args.local_rank, args.rank, args.world_size = world_info_from_env() if args.distributed else (0, 0, 1)
    if args.distributed:
        dist.init_process_group(backend='nccl' if cuda else 'gloo', rank=args.rank, world_size=args.world_size,
                                timeout=TIMEOUT)
        try:
            Stop.group = dist.new_group(backend='gloo', timeout=TIMEOUT)
        except RuntimeError as error:
            raise InputError('the processes cannot reach each other over gloo: set GLOO_SOCKET_IFNAME to the network '
                             f'interface between the machines ({str(error).splitlines()[0][:200]})') from error
        os.environ['LOCAL_RANK'] = str(args.local_rank)  # srun alone does not set it; `fetch` needs it
        args.device = f'cuda:{args.local_rank}' if cuda else args.device
    atexit.register(end_workers)
    if args.device.startswith('cuda:'):
        torch.cuda.set_device(args.device)


def note_stop(number, _):
    """Signal handler: notes the signal and nothing else, as a run is at a point where it can end only between updates."""
    Stop.signal = number


def listen_to_signals():
    """From now on a stop signal ends the run at its next update instead of at once."""
    Stop.signal = 0
    for number in STOP_SIGNALS:
        signal.signal(number, note_stop)


def ignore_stop(_):
    """Start of a data worker: a signal to the whole tree of processes must leave it to its parent, which needs it."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers():
    """At exit: Python would send data workers a signal that they ignore, and wait for them."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes their end for an error
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


def stop_asked():
    """Name of the stop signal that any process got, or None: the same on all processes, which must all ask."""
    number = int(Stop.signal)
    if dist.is_initialized():
        largest = torch.tensor(number)  # on the CPU: no GPU is waited for
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=Stop.group)
        number = int(largest)
    return signal.Signals(number).name if number else None


def until_stopped(loader):
    """The batches of an evaluation, for which training was saved; a stop signal ends it by `Stopped` on all processes."""
    for batch in loader:
        if Stop.signal:
            break
        yield batch
    name = stop_asked()  # once on each process, however many batches it has
    if name:
        raise Stopped(f'stopped by {name} in an evaluation, after its training was saved: --resume auto repeats it')


def one_line(error):
    """What the scripts print of an error that comes from outside of them; any other one is raised again."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, (InputError, FloatingPointError)):  # from a data worker it arrives as the end of a traceback
        return 'error: ' + text.splitlines()[-1].removeprefix('models.InputError: ')
    first = text.splitlines()[0][:200]
    if re.search('DataLoader worker|Pin memory thread', first):
        return (f'error: a data worker has died ({first}): killed, or out of memory (fewer --num_workers need less)? '
                '--resume auto goes on from the last checkpoint')
    if dist.is_initialized() and (isinstance(error, dist.DistError) or re.search(
            'gloo|nccl|socket|connection (closed|reset|refused)|broken pipe|timed? ?out', first, re.I)):
        return (f'error: another process has ended, or gave no answer within {TIMEOUT} (hours:minutes:seconds; {first}). '
                '--resume auto goes on from the last checkpoint')
    raise error


def sync_folder(folder):
    """Puts the folder's names on the disk; some network disks know no such request."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def write_file(path, write, previous=None):
    """`write(file)` makes the new content of `path`, which takes that name when it is on the disk, whole.

    A kill, a full disk or a power cut leaves the old file or the new one. previous: a name under which the old one is kept,
    also in place of an older one; at each moment the newest whole file has one of the two names. Raises InputError.
    """
    temporary, spare = Path(f'{path}.tmp'), Path(f'{previous}.tmp')
    try:
        with open(temporary, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous and Path(path).exists():
            spare.unlink(missing_ok=True)  # of a run that was killed here
            try:
                os.link(path, spare)
            except OSError:  # a disk without hard links: for a moment there is no `path`, but `previous`
                os.replace(path, previous)
        os.replace(temporary, path)
        if previous and spare.exists():
            os.replace(spare, previous)
        sync_folder(Path(path).parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        # torch.save turns what the disk says into a complaint about positions
        reason = next((e for e in (error, error.__context__) if isinstance(e, OSError)), None)
        if reason is None:
            raise
        raise InputError(f'cannot write {path} ({reason.strerror}): what was there is kept. Make room for it, then --resume '
                         'auto goes on') from error


# what the scripts write into args.json besides their flags: where a run comes from, and its place among the processes
PROVENANCE = ('script', 'commit', 'versions', 'hardware')
PROCESS = ('rank', 'local_rank', 'world_size', 'distributed')


def parse_args(parser):
    """The command line's arguments; --config FILE, the args.json of another run, gives those that it leaves out.

    So a run is repeated by its own args.json and another --output_dir. Raises InputError for the file of a script with other
    flags; a copy of the script is no other.
    """
    args = parser.parse_args()
    if not args.config:
        return args
    try:
        stored = json.loads(Path(args.config).read_text())
        script, processes = stored['script'], stored['world_size']
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f'--config {args.config} is no args.json of these scripts '
                         f'({type(error).__name__}: {error})') from error
    # places to write to, and values that a run worked out from a flag that is now given by hand
    left_out = {*PROVENANCE, *PROCESS, 'config', 'output_dir', 'resume', 'results_json'}
    by_hand = {word.split('=')[0] for word in sys.argv[1:]}
    if '--blr' in by_hand:
        left_out.add('lr')
    if '--data_path' in by_hand and stored.get('data_path'):
        left_out |= {name for name in ('train_annotations', 'train_images', 'val_annotations', 'val_images')
                     if Path(str(stored.get(name) or '')).is_relative_to(stored['data_path'])}
    foreign = [name for name in stored if name not in {*vars(args), *left_out}]
    if foreign:
        raise InputError(f'--config {args.config} is of {script}: {Path(sys.argv[0]).name} has no --{foreign[0]}')
    words = []
    for name, value in stored.items():
        if name in left_out or value in (None, parser.get_default(name)):
            continue
        if isinstance(value, bool):
            words.append(f'--{name}' if value else f'--no-{name}')
        elif isinstance(value, list):
            words += [f'--{name}', *map(str, value)]
        else:
            words.append(f'--{name}={value}')
    if processes != int(os.environ.get('WORLD_SIZE', 1)) and os.environ.get('RANK', '0') == '0':
        print(f'note: {args.config} is of a run on {processes} processes', flush=True)
    return parser.parse_args(words + sys.argv[1:])


# ranges of the numbers of all scripts; of every other one from 0 to what 31 bits hold, or to 1e30: beyond, products of two
# are no float32
AT_LEAST_1 = ('input_size', 'batch_size', 'accum_iter', 'epochs', 'iterations', 'eval_every', 'print_freq', 'window_size',
              'fpn_dim', 'head_dim', 'anchor_size', 'proposals', 'roi_batch')
ABOVE_0 = ('distillation_tau', 'cwd_tau', 'cat_max_ratio', 'layer_decay')
AT_MOST = {'mask_ratio': 1, 'distillation_alpha': 1, 'layer_decay': 1, 'smoothing': 1, 'reprob': 1, 'cat_max_ratio': 1,
           'drop_path': 0.99, 'weight_decay': 1000, 'distillation_tau': 1000, 'cwd_tau': 1000, 'seed': 2 ** 63}


def check_values(args):
    """Raises InputError for a number that cannot be meant (negative, not finite, outside of the flag's range), or a name."""
    for name, value in vars(args).items():
        if isinstance(value, str) and not value.startswith('https://') and (
                '\0' in value or len(value) > 3000 or any(len(os.fsencode(part)) > 255 for part in value.split('/'))):
            raise InputError(f'--{name}: no file has such a name, {len(value)} characters long: {value[:40]!r} ...')
        numbers = [part for part in (value if isinstance(value, list) else [value]) if isinstance(part, (int, float))]
        for number in numbers:
            most = AT_MOST.get(name, 1e30 if isinstance(number, float) else 2 ** 31 - 1)
            if name in AT_LEAST_1 and not number >= 1:
                raise InputError(f'--{name} must be at least 1, not {number}')
            if name in ABOVE_0 and not number > 0:
                raise InputError(f'--{name} must be above 0, not {number}')
            if not number >= 0:
                raise InputError(f'--{name} must not be negative, and not {number}')
            if not number <= most:
                raise InputError(f'--{name} must be at most {most}, not {number}')


# ------------------------------------------------------------------------------------------------------------- names


class Size(NamedTuple):
    dim: int
    depth: int
    heads: int
    decoder_dim: int      # of `mae_vit_<size>_patchN` without a `_decXdYb` ending
    decoder_depth: int


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


class Name(NamedTuple):
    size: Size
    patch: int
    decoder_dim: int
    decoder_depth: int
    is_mae: bool


def parse_name(name):
    """`mae_vit_small_patch16_dec256d4b`, `mae_vit_base_patch16` or `vit_small_patch16` -> Name. Raises InputError."""
    match = re.fullmatch(r'(mae_)?vit_([a-z]+)_patch(\d{1,4})(?:_dec(\d{1,5})d(\d{1,3})b)?', name)
    if not match or match[2] not in SIZES or int(match[3]) == 0 or (match[4] and not match[1]):
        raise InputError(f'unknown model name {name!r}: expected vit_SIZE_patchP, mae_vit_SIZE_patchP or '
                         f'mae_vit_SIZE_patchP_decWIDTHdBLOCKSb with SIZE one of {", ".join(SIZES)}')
    size = SIZES[match[2]]
    decoder_dim, decoder_depth = int(match[4] or size.decoder_dim), int(match[5] or size.decoder_depth)
    if decoder_dim % 32 or not decoder_dim or not decoder_depth:
        raise InputError(f'{name!r}: the decoder width must be a positive multiple of 32 and it needs a block')
    return Name(size, int(match[3]), decoder_dim, decoder_depth, bool(match[1]))


def check_img_size(img_size, patch):
    """int or (height, width) -> (height, width), both multiples of the patch; raises InputError otherwise."""
    height, width = to_2tuple(img_size)
    if height < patch or width < patch or height % patch or width % patch:
        raise InputError(f'input size {height}x{width} is not divisible by the patch size {patch}: '
                         f'choose multiples of {patch}, or a model with another patch')
    return height, width


# ------------------------------------------------------------------------------------------------- masked autoencoder


class Masking(NamedTuple):
    ids_keep: torch.Tensor      # (N, K) patch indices that the encoder sees
    ids_restore: torch.Tensor   # (N, L) where each patch went in the shuffled order
    mask: torch.Tensor          # (N, L) float, 0 = kept, 1 = hidden


def random_masking(noise, mask_ratio):
    """The patches with the smallest noise stay visible, as in MAE.

    noise: (N, L) in [0, 1). Keeps int(L * (1 - mask_ratio)) patches of each image; `Masking` says what comes back.
    Raises InputError if that hides nothing or everything.
    """
    length = noise.shape[1]
    keep = int(length * (1 - mask_ratio))
    if not 0 < keep < length:
        raise InputError(f'--mask_ratio {mask_ratio} keeps {keep} of {length} patches: some must be kept and some hidden')
    ids_shuffle = torch.argsort(noise, dim=1)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    mask = torch.ones_like(noise)
    mask[:, :keep] = 0
    return Masking(ids_shuffle[:, :keep], ids_restore, mask.gather(1, ids_restore))


def sincos_position_table(dim, grid_size):
    """Fixed 2-D sine-cosine table, (1, 1 + H*W, dim) float32, with a zero row for the class token.

    Channels are [sin x, cos x, sin y, cos y]: MAE lets the column go first, and released weights rely on it.
    """
    omega = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid_size), indexing='ij')
    x, y = torch.outer(x.flatten(), omega), torch.outer(y.flatten(), omega)
    table = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)  # (H*W, dim)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), table])[None].float()


def take(x, ids):
    """Rows `ids` (N, K) of x (N, L, D): (N, K, D)."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[2]))


class MaskedAutoencoder(nn.Module):
    """MAE with a ViT encoder and a light ViT decoder; names of parameters as in MAE.

    Without `target_dim` it predicts pixels (`decoder_norm`, `decoder_pred`): MAE itself, and the stage-1 teacher.
    With `target_dim` it is a G2SD student: after its decoder blocks a 2-layer MLP, `feature_head`, predicts `target_dim`
    numbers per token, with no norm in between (the authors' code). Every parameter that is held gets a gradient.
    """

    def __init__(self, img_size, patch_size, dim, depth, heads, decoder_dim, decoder_depth, target_dim=None):
        super().__init__()
        # the authors' code: 192 -> 8 and 64 -> 4 heads; MAE and every other width: width / 32
        decoder_heads = {192: 8, 64: 4}.get(decoder_dim, decoder_dim // 32)
        block = partial(Block, mlp_ratio=4.0, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
        self.patch_embed = PatchEmbed(img_size, patch_size, 3, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_position_table(dim, self.patch_embed.grid_size), requires_grad=False)
        self.blocks = nn.ModuleList(block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

        self.decoder_dim = decoder_dim
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(
            sincos_position_table(decoder_dim, self.patch_embed.grid_size), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(block(decoder_dim, decoder_heads) for _ in range(decoder_depth))
        self.target_dim = target_dim
        if target_dim is None:
            self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
            self.decoder_pred = nn.Linear(decoder_dim, self.pixel_dim)
        else:
            self.feature_head = Mlp(decoder_dim, target_dim, target_dim)
        self.apply(self._init_weights)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # a view: treated as the linear layer that it is
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
        """(N, 3, H, W) -> (N, L, p*p*3): rows of patches, in each patch rows, columns, then colours."""
        n, c, _, _ = images.shape
        (h, w), (p, q) = self.patch_embed.grid_size, self.patch_embed.patch_size
        return images.reshape(n, c, h, p, w, q).permute(0, 2, 4, 3, 5, 1).reshape(n, h * w, p * q * c)

    def unpatchify(self, patches):
        """(N, L, p*p*3) -> (N, 3, H, W), the inverse of `patchify`."""
        (h, w), (p, q) = self.patch_embed.grid_size, self.patch_embed.patch_size
        return patches.reshape(-1, h, w, p, q, 3).permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, h * p, w * q)

    def encode(self, images, masking):
        """(N, 3, H, W) -> (N, 1+K, D): class token and the kept patches, after the encoder's final norm."""
        n, c, _, _ = images.shape
        (h, w), (p, q), ids = self.patch_embed.grid_size, self.patch_embed.patch_size, masking.ids_keep
        # the patch projection as the linear layer that it is, on the visible patches alone; (N, K, c, p, q)
        patches, row = images.reshape(n, c, h, p, w, q).permute(0, 2, 4, 1, 3, 5), torch.arange(n, device=ids.device)
        patches, proj = patches[row[:, None], ids // w, ids % w], self.patch_embed.proj
        x = F.linear(patches.flatten(2), proj.weight.flatten(1), proj.bias)
        x = x + take(self.pos_embed[:, 1:].expand(n, -1, -1), ids)
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls_token, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, latent, masking, blocks):
        """(N, 1+K, D) -> (N, 1+L, decoder_dim) after the given decoder blocks; mask tokens stand for hidden patches."""
        x = self.decoder_embed(latent)
        hidden = masking.ids_restore.shape[1] - masking.ids_keep.shape[1]
        patches = torch.cat([x[:, 1:], self.mask_token.to(x.dtype).expand(len(x), hidden, -1)], dim=1)
        x = torch.cat([x[:, :1], take(patches, masking.ids_restore)], dim=1) + self.decoder_pos_embed
        for block in blocks:
            x = block(x)
        return x

    def decoder_features(self, images, masking, layer):
        """Hidden state after decoder block `layer` (1-based), before `decoder_norm`: (N, 1+L, decoder_dim).

        The distillation target of stage 1. Blocks behind `layer` are not run. Raises InputError if there is no such block.
        """
        if not 1 <= layer <= len(self.decoder_blocks):
            raise InputError(f'--target_layer {layer}: the teacher\'s decoder has blocks 1 to {len(self.decoder_blocks)}')
        return self.decode(self.encode(images, masking), masking, self.decoder_blocks[:layer])

    def predict_features(self, images, masking):
        """The student's prediction for every token, class token first: (N, 1+L, target_dim)."""
        return self.feature_head(self.decode(self.encode(images, masking), masking, self.decoder_blocks))

    def reconstruct(self, images, masking):
        """Predicted pixels of every patch, in `patchify`'s order: (N, L, p*p*3)."""
        x = self.decode(self.encode(images, masking), masking, self.decoder_blocks)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]  # class token dropped

    def forward(self, images, masking):
        """`predict_features` where the model has a `target_dim`, else `reconstruct`."""
        return self.reconstruct(images, masking) if self.target_dim is None else self.predict_features(images, masking)


def create_mae(name, img_size=224, target_dim=None):
    """A `MaskedAutoencoder` by name, e.g. `mae_vit_base_patch16`; img_size is an int or (height, width) in pixels.

    Raises InputError for an unknown name or a size that the patch does not divide.
    """
    parsed = parse_name(name)
    if not parsed.is_mae:
        raise InputError(f'{name!r} names an encoder alone; a masked autoencoder is called mae_{name}')
    size = parsed.size
    return MaskedAutoencoder(check_img_size(img_size, parsed.patch), parsed.patch, size.dim, size.depth, size.heads,
                             parsed.decoder_dim, parsed.decoder_depth, target_dim)


# -------------------------------------------------------------------------------------------- vision transformers (timm)


class LayerDecayGroups:
    """Layer-wise learning rates as MAE and the authors' code have them: stem, blocks, and everything else at the full rate.

    timm's own grouping gives the final norm the last block's rate and the distillation token the stem's.
    """

    def group_matcher(self, coarse=False):
        return {'stem': r'^(?:cls_token|pos_embed|patch_embed)', 'blocks': [(r'^blocks\.(\d+)', None)]}


class PlainViT(LayerDecayGroups, VisionTransformer):
    """timm's VisionTransformer; only the layer-decay groups differ."""


class DistilledViT(LayerDecayGroups, VisionTransformerDistilled):
    """timm's DeiT with distillation token and second head; only the layer-decay groups and one start value differ."""

    def init_weights(self, *args, **kwargs):
        super().init_weights(*args, **kwargs)
        # ours: the token starts without a position, which makes 197-position checkpoints give the same outputs
        nn.init.zeros_(self.pos_embed[:, 1].detach())


def create_vit(name, num_classes, img_size=224, distilled=False, global_pool='token', drop_path_rate=0.0):
    """A classifier by name, e.g. `vit_small_patch16`: timm's VisionTransformer, or its DeiT if `distilled`.

    global_pool: timm's 'token' (class token, as DeiT) or 'avg' (mean of the patch tokens, then `fc_norm`, as MAE), or MAE's
    False and True for these two.
    In training mode a distilled network returns (class logits, distillation logits), else the mean of the two.
    Raises InputError for an unknown name, a size that the patch does not divide, or 'avg' with `distilled`.
    """
    parsed = parse_name(name)
    if parsed.is_mae:
        raise InputError(f'{name!r} names an autoencoder; its encoder alone is called '
                         f'{re.sub("^mae_|_dec.*", "", name)}')
    global_pool = {False: 'token', True: 'avg'}.get(global_pool, global_pool)
    if distilled and global_pool != 'token':
        raise InputError('a distilled network reads its class and distillation tokens: leave --global_pool out')
    size, kwargs = parsed.size, {} if distilled else {'global_pool': global_pool}
    model = (DistilledViT if distilled else PlainViT)(
        img_size=check_img_size(img_size, parsed.patch), patch_size=parsed.patch, embed_dim=size.dim, depth=size.depth,
        num_heads=size.heads, num_classes=num_classes, drop_path_rate=drop_path_rate, **kwargs)
    if distilled:
        model.set_distilled_training(True)
    return model


def reset_head(model):
    """Start value of the class head for fine-tuning: truncated normal 2e-5 (MAE); a distillation head keeps timm's 0.02."""
    trunc_normal_(model.head.weight, std=2e-5)
    nn.init.zeros_(model.head.bias)


def create_vit_like(state_dict, name, img_size=224, path='the checkpoint'):
    """The classifier that a checkpoint holds (distilled or not, pooled or not, number of classes): build, do not load.

    Raises InputError if it holds no classifier; `path` is for that message.
    """
    if 'head.weight' not in state_dict:
        raise InputError(f'{path} has no classification head (head.weight): give a checkpoint of specific_distill_cls.py, '
                         'or one fine-tuned by MAE, DeiT or timm')
    head, dim = state_dict['head.weight'], parse_name(name).size.dim
    if head.ndim != 2 or head.shape[1] != dim:
        raise InputError(f'{path} was not made by {name}: head.weight is {tuple(head.shape)}, not (classes, {dim})')
    return create_vit(name, len(head), img_size, distilled='head_dist.weight' in state_dict,
                      global_pool='avg' if 'fc_norm.weight' in state_dict else 'token')


# --------------------------------------------------------------------------------------------------------- checkpoints

DECODER_HELP = (
    'stage 1 needs the complete MAE: mae_pretrain_vit_base_full.pth (norm-pix loss) or mae_visualize_vit_base.pth '
    "(pixel loss) from MAE's repository, or Hugging Face's facebook/vit-mae-base; mae_pretrain_vit_base.pth and timm's "
    'vit_*.mae hold the encoder alone')

# Hugging Face ViTMAE -> MAE/timm names, applied in this order; query, key and value are joined afterwards
HUGGING_FACE = [(re.compile(pattern), name) for pattern, name in (
    (r'^(vit\.)?embeddings\.cls_token', 'cls_token'),
    (r'^(vit\.)?embeddings\.position_embeddings', 'pos_embed'),
    (r'^(vit\.)?embeddings\.patch_embeddings\.projection\.', 'patch_embed.proj.'),
    (r'^(vit\.)?encoder\.layer\.', 'blocks.'),
    (r'^(vit\.)?layernorm\.', 'norm.'),
    (r'^decoder\.decoder_(layers|encoder\.layer)\.', 'decoder_blocks.'),
    (r'^decoder\.', ''),
    (r'\.attention\.attention\.(query|key|value)\.', r'.attn.\1.'),
    (r'\.attention\.output\.dense\.', '.attn.proj.'),
    (r'\.intermediate\.dense\.', '.mlp.fc1.'),
    (r'\.output\.dense\.', '.mlp.fc2.'),
    (r'\.layernorm_before\.', '.norm1.'),
    (r'\.layernorm_after\.', '.norm2.'),
)]


def from_hugging_face(state_dict):
    """ViTMAE's names, with or without `vit.`, in both of its file namings -> MAE's; separate q, k, v -> `qkv`."""
    renamed = {}
    for key, value in state_dict.items():
        for pattern, name in HUGGING_FACE:
            key = pattern.sub(name, key)
        renamed[key] = value
    for key in [k for k in renamed if '.attn.query.' in k]:
        parts = [key.replace('.query.', f'.{part}.') for part in ('query', 'key', 'value')]
        shapes = {renamed[p].shape if p in renamed else None for p in parts}
        if len(shapes) > 1 or renamed[key].ndim not in (1, 2):
            raise InputError(f'{key} has no matching key and value: the file is incomplete')
        renamed[key.replace('.query.', '.qkv.')] = torch.cat([renamed.pop(p) for p in parts])
    return renamed


def fetch(url):
    """https URL -> path of the downloaded file, kept in torch hub's cache; one process per machine downloads."""
    # many models share a file name: the address is part of the key
    name = hashlib.sha256(url.encode()).hexdigest()[:8] + '-' + url.split('?')[0].rsplit('/', 1)[-1]
    path = Path(torch.hub.get_dir()) / 'checkpoints' / name
    if int(os.environ.get('LOCAL_RANK', '0')) == 0 and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), progress=True)
        except OSError as error:
            raise InputError(f'cannot download {url}: {error}; fetch it by hand and give the path') from error
    if dist.is_initialized():
        dist.barrier()
    return path


def first_global(path):
    """Name of the first class or function that a plain pickle asks for, found without running it; None if there is none."""
    strings = []
    try:
        for opcode, argument, _ in pickletools.genops(path.read_bytes()):
            if opcode.name in ('GLOBAL', 'INST'):
                return argument.replace(' ', '.')
            if opcode.name == 'STACK_GLOBAL':
                return '.'.join(strings[-2:])
            if isinstance(argument, str):
                strings.append(argument)
    except ValueError:  # no pickle at all
        pass
    return None


def read_checkpoint(path):
    """Local path or https URL -> what the file holds, read weights-only: a pickle that wants to run code is refused.

    `argparse.Namespace` is the one class allowed beyond torch's own list: MAE's, DeiT's and DINO's files hold one.
    Raises InputError, naming what is wrong with the file.
    """
    path = fetch(path) if str(path).startswith('https://') else Path(path)
    if not os.path.isfile(path):  # pathlib's raises on a folder that may not be read
        raise InputError(f'no checkpoint file at {path}')
    try:
        if path.suffix == '.safetensors':
            from safetensors.torch import load_file
            return load_file(path)
        if zipfile.is_zipfile(path):  # torch does not compress: what unpacks to more than the file was made to fill memory
            with zipfile.ZipFile(path) as file:
                if sum(part.file_size for part in file.infolist()) > path.stat().st_size:
                    raise InputError('it is compressed')
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return torch.load(path, map_location='cpu', weights_only=True)
    # a damaged file makes the unpickler raise nearly anything (RuntimeError, EOFError, KeyError, SafetensorError ...)
    except Exception as error:
        refused = re.search(r'GLOBAL (\S+)', str(error))
        refused = refused[1] if refused else isinstance(error, pickle.UnpicklingError) and first_global(path)
        if refused:
            raise InputError(f'{path} is refused: it wants to use {refused!r}, which weights do not need. '
                             'Do not trust it; if it is yours, save tensors and plain types only') from error
        reason = (str(error) or type(error).__name__).splitlines()[0][:160]
        if 'weights_only' in reason:  # torch's advice to read the file unsafely; all it knows is that this is no pickle
            reason = 'torch did not write it'
        raise InputError(f'{path} is no whole checkpoint (truncated download, or another kind of file?): '
                         f'{reason}') from error


def check_whole(path):
    """Raises InputError if a file of torch.save differs by a single bit from what was written; torch.load does not look."""
    try:
        if not zipfile.is_zipfile(path):  # torch's old format, or another program's, has no checksums
            return
        with zipfile.ZipFile(path) as archive:
            # sums of contents and copies of names cover all but the attributes, which torch leaves 0 and obeys
            damaged = archive.testzip() or next((e.filename for e in archive.infolist() if e.external_attr), None)
    except Exception as error:  # as in `read_checkpoint`
        raise InputError(f'{path} is no whole checkpoint: {(str(error) or type(error).__name__).splitlines()[0]}') from error
    if damaged:
        raise InputError(f'{path} is damaged: the checksum of {damaged} is wrong')


def newest_whole(paths):
    """(path, what it holds, damaged files) of the first of these files that is whole; (None, None, []) if there is none.

    Says in one line what is wrong with a file that it passes over. Raises InputError if no file is whole.
    """
    failed = []
    for path in (path for path in paths if path.exists()):
        try:
            checkpoint = read_checkpoint(path)
            check_whole(path)
        except InputError as error:
            failed.append((path, error))
            continue
        for _, error in failed:
            say(f'warning: {error}; going on from {path}')
        return path, checkpoint, [damaged for damaged, _ in failed]
    if failed:
        raise failed[0][1]
    return None, None, []


def load_checkpoint(path):
    """Local path or https URL -> flat state dict on the CPU, in timm/MAE names.

    Understands a bare state dict, `model`, `state_dict`, DINO's and iBOT's `teacher`/`student` with `module.` and
    `backbone.`, Hugging Face's ViTMAE (.bin, .safetensors), and the G2SD authors' student, whose `decoderfeature_pred` is
    our `feature_head` and whose other heads are not used there. Raises InputError, also for entries that are no weights.
    """
    return flat_state_dict(read_checkpoint(path), path)


# of weights and counters; without complex, packed and 8-bit floating-point numbers, of which torch cannot do everything
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
          torch.uint8, torch.bool)


def check_weights(state, path):
    """Raises InputError unless this is a dict of plain tensors by name, none larger than what the file holds of it."""
    if not isinstance(state, dict) or not state:
        raise InputError(f'{path} holds no state dict')
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided \
                or value.dtype not in DTYPES or value.device.type != 'cpu':
            raise InputError(f'{path}: entry {key!r} is not a plain tensor with a name ({type(value).__name__})')
        # a file of a few kB can claim a tensor of any size by expanding one number
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise InputError(f'{path}: entry {key!r} claims {value.numel()} numbers that the file does not hold')


def misfit(value, own):
    """What keeps a file's plain tensor from taking the place of the model's `own`, as words; None if nothing does."""
    if value.shape != own.shape:
        return f'is {tuple(value.shape)} in the file and {tuple(own.shape)} in the model'
    if value.is_floating_point() != own.is_floating_point():
        return f'is of type {value.dtype} in the file and {own.dtype} in the model'
    return None if value.to(own.dtype).isfinite().all() else 'has numbers that are not finite'


def flat_state_dict(checkpoint, path):
    """What `read_checkpoint` gave -> flat state dict; `path` is for messages. See `load_checkpoint`."""
    state = checkpoint
    if isinstance(checkpoint, dict):
        if isinstance(checkpoint.get('step'), int) and checkpoint['step']:
            say(f'warning: {path} is of a run that was interrupted within an epoch and has not come to its end')
        state = next((checkpoint[key] for key in ('model', 'state_dict', 'teacher', 'student')
                      if isinstance(checkpoint.get(key), dict)), checkpoint)
    check_weights(state, path)
    # DINO's and iBOT's wrapper; a network for detection or segmentation has a backbone among other parts, and keeps the name
    whole = any(re.match(r'(module\.)?(rpn|decode_head)\.', key) for key in state)
    prefix = r'^module\.' if whole else r'^(module\.)?(backbone\.)?'
    state = {re.sub(prefix, '', key): value for key, value in state.items()}
    if any('patch_embeddings.projection' in key for key in state):
        state = from_hugging_face(state)
    if 'decoderfeature_pred.fc1.weight' in state:
        unused = ('encoderfeature_pred.', 'decoder_norm.', 'decoder_pred.')
        state = {key.replace('decoderfeature_pred.', 'feature_head.'): value
                 for key, value in state.items() if not key.startswith(unused)}
    return state


def resize_positions(table, prefix, grid_size):
    """Position table (1, prefix + h*w, D) -> (1, prefix + H*W, D), bicubic; the prefix rows stay. Needs h = w.

    Without antialiasing, as MAE and DeiT do it; timm's default differs when the table shrinks.
    """
    return resample_abs_pos_embed(table, grid_size, num_prefix_tokens=prefix, antialias=False)


def fit_positions(model, state_dict, path):
    """Brings `pos_embed` and `decoder_pos_embed` to the model's token layout and grid, in place; returns what it did.

    The rows in front of the patches are [class] or [class, distillation]. A missing distillation row becomes zero (so
    does that of the G2SD authors, who append the token without a position); one that the model does not have is dropped.
    A detector's table, (1, H, W, D), has none. Raises InputError if the number of rows fits no grid.
    """
    done = []
    for key in ('pos_embed', 'decoder_pos_embed'):
        table, own = state_dict.get(key), dict(model.named_parameters()).get(key)
        if table is None or own is None or table.ndim != 3 or len(table) != 1 or table.shape[2] != own.shape[-1]:
            continue  # what has another shape is named when it is loaded
        grid = tuple(own.shape[1:3]) if own.ndim == 4 else model.patch_embed.grid_size
        length = grid[0] * grid[1]
        candidates = (2, 1) if 'dist_token' in state_dict else (1,)
        prefix = next((k for k in candidates if table.shape[1] - k == length), None)
        if prefix is None:
            prefix = next((k for k in candidates if table.shape[1] > k
                           and math.isqrt(table.shape[1] - k) ** 2 == table.shape[1] - k), None)
            if prefix is None:
                raise InputError(f'{path}: {key} has {table.shape[1]} rows, which is no class token and square grid; '
                                 f'the model has a grid of {grid[0]}x{grid[1]}: give the --input_size it was trained at')
            side = math.isqrt(table.shape[1] - prefix)
            table = resize_positions(table, prefix, grid)
            done.append(f'{key} {side}x{side} -> {grid[0]}x{grid[1]}')
        wanted = own.shape[1] - length
        if own.ndim == 4:
            table = table[:, prefix:].unflatten(1, grid)
            done.append('rows of tokens that are no patches dropped')
        elif wanted > prefix:
            table = torch.cat([table[:, :1], torch.zeros_like(table[:, :1]), table[:, 1:]], dim=1)
            done.append('zero row for the distillation token')
        elif wanted < prefix:
            table = torch.cat([table[:, :1], table[:, 2:]], dim=1)
            done.append('row of the distillation token dropped')
        state_dict[key] = table
    return done


def load_exactly(model, state_dict, path):
    """Loads a state dict that must match name by name and shape by shape. Raises InputError that names what differs."""
    check_weights(state_dict, path)
    own = model.state_dict()
    missing, unexpected = [k for k in own if k not in state_dict], [k for k in state_dict if k not in own]
    if any(k.startswith('decoder') for k in missing) and not any(k.startswith('decoder') for k in state_dict):
        raise InputError(f'{path} has no decoder ({missing[0]} and {len(missing) - 1} more are missing): {DECODER_HELP}')
    wrong = next((f'{k} {misfit(state_dict[k], own[k])}' for k in own
                  if k in state_dict and misfit(state_dict[k], own[k])), None)
    if missing or unexpected or wrong:
        reasons = [f'{len(names)} {what}, first {names[0]!r}' for what, names in
                   (('missing', missing), ('unexpected', unexpected)) if names]
        reasons += [wrong] if wrong else []
        raise InputError(f'{path} was not made by this architecture ({"; ".join(reasons)}): give the model name and '
                         'input size that it was trained with')
    model.load_state_dict(state_dict)


def load_teacher(model, path, state_dict=None):
    """Loads a teacher strictly; it comes back frozen and in eval mode. Position tables may be resized, which is printed.

    path: local or https; pass the state dict too if it is read already. Raises InputError with the missing names; an
    encoder-only MAE is the one failure that users of the authors' code report, and a non-strict load hides it.
    """
    state_dict = dict(load_checkpoint(path) if state_dict is None else state_dict)
    resized = fit_positions(model, state_dict, path)
    load_exactly(model, state_dict, path)
    say(f'teacher: {len(state_dict)} entries of {path}' + ''.join(f'; {what}' for what in resized))
    return model.requires_grad_(False).eval()


def stored_args(checkpoint):
    """The arguments of the run that wrote a checkpoint: those that are plain values, or lists of them; {} if there are none.

    A file can hold anything in their place, which would be compared and printed.
    """
    stored, plain = checkpoint.get('args'), (str, int, float, bool, type(None))
    return {name: value for name, value in (stored.items() if isinstance(stored, dict) else ()) if isinstance(name, str)
            and all(isinstance(part, plain) for part in (value if isinstance(value, (list, tuple)) else [value]))}


PLACE = ('batch_size', 'accum_iter', 'world_size')  # the arguments that tell where in the data a step is


def check_run(checkpoint, optimizer, scaler, path):
    """Raises InputError unless counters, optimizer and loss scaler of a checkpoint are what these scripts write for them."""
    def fail(what):
        raise InputError(f'{path} cannot be resumed: {what}')

    def finite(values):
        return all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)

    epoch, seconds, state = (checkpoint[key] for key in ('epoch', 'train_seconds', 'optimizer'))
    step, kept, then = checkpoint.get('step', 0), checkpoint.get('progress'), stored_args(checkpoint)
    if type(epoch) is not int or type(step) is not int or not (
            0 <= step < 2 ** 31 and (-1 if step else 0) <= epoch < 2 ** 31):
        fail('its epoch and step are no numbers that a run counts to')
    if step and not (
            isinstance(kept, dict) and all(isinstance(kept.get(name), list) for name in ('sums', 'names', 'measured'))
            and finite([*kept['sums'], *kept['measured'], kept.get('lr'), kept.get('skipped')])
            and len(kept['names']) == len(kept['sums']) and type(kept.get('steps')) is int and kept['steps'] >= step
            and all(type(then.get(name)) is int and then[name] > 0 for name in PLACE) and type(then.get('seed')) is int):
        fail('what it holds of the epoch that was interrupted is not whole')
    if not isinstance(seconds, (int, float)) or not 0 <= seconds < 2 ** 31:
        fail('its train_seconds are no time that a run takes')
    numbers, own = checkpoint['scaler'], scaler.state_dict()  # both may be empty: only fp16 has a scale
    if not isinstance(numbers, dict) or not all(isinstance(value, (int, float)) for value in numbers.values()) or (
            numbers and not own.keys() <= numbers.keys()):
        fail('its loss scaler is another one')
    own, parameters = optimizer.state_dict()['param_groups'], [p for own in optimizer.param_groups for p in own['params']]
    groups, moments = (state.get(key) if isinstance(state, dict) else None for key in ('param_groups', 'state'))
    if not isinstance(groups, list) or not isinstance(moments, dict) or any(
            not isinstance(group, dict) or not isinstance(group.get('params'), list) or not finite([group.get('lr')])
            for group in groups) \
            or [len(group['params']) for group in groups] != [len(group['params']) for group in own]:
        fail('the optimizer has other groups')
    for index, entries in moments.items():
        if type(index) is not int or not 0 <= index < len(parameters) or not isinstance(entries, dict):
            fail('the optimizer has other parameters')
        check_weights(entries, f'{path}, optimizer')
        for name in ('step', 'exp_avg', 'exp_avg_sq'):
            if name not in entries:
                fail(f'the optimizer has no {name} of parameter {index}')
            reason = misfit(entries[name], torch.zeros(()) if name == 'step' else parameters[index])
            if reason:
                fail(f'{name} of the optimizer\'s parameter {index} {reason}')


def check_classes(theirs, ours, path):
    """Raises InputError if a checkpoint knows its class names and they are not, in order, those of the data."""
    if theirs is not None and not (isinstance(theirs, (list, tuple)) and all(isinstance(name, str) for name in theirs)):
        raise InputError(f'{path}: its classes are no list of names')
    ours = ours or []  # stage 1 has none
    if theirs is not None and list(theirs) != list(ours):
        differing = next((pair for pair in zip(theirs, ours) if pair[0] != pair[1]), None)
        differing = f'{differing[0]!r} is {differing[1]!r} here' if differing else 'the others are the same'
        raise InputError(f'{path} was trained on other classes ({len(theirs)} there, {len(ours)} in --data_path; '
                         f'{differing}): give the data that it belongs to')


class Loaded(NamedTuple):
    used: list       # names taken over as they are
    resized: list    # what was done to position tables
    new: list        # names that keep their start values, all of them new by design
    left_out: list   # names of the file that the model has no place for, all of them expected


def load_pretrained(model, path):
    """Starts a stage-2 network from any encoder checkpoint: stage 1's student, MAE, DeiT, DINO, iBOT, timm, Hugging Face.

    Heads, the distillation token, `fc_norm`, relative positions and LayerScale may be new; decoders, heads, DINO's extras
    and what a backbone without class token, norm or bias of the keys has no place for may be left out; anything else that
    is missing, unexpected or of another shape raises InputError. Prints and returns `Loaded`.
    """
    state = load_checkpoint(path)
    if any(k.startswith('backbone.') for k in state):
        raise InputError(f'{path} is a network for detection or segmentation: give the file that its backbone started from')
    resized = fit_positions(model, state, path)
    own = model.state_dict()
    # timm's Beit keeps the parts of this bias by themselves, and none for the keys: a number that softmax removes
    for key in [k for k in state if k not in own and k.replace('qkv.bias', 'q_bias') in own and state[k].ndim == 1]:
        for part, bias in zip('qkv', state.pop(key).chunk(3)):
            state[key.replace('qkv.bias', f'{part}_bias')] = bias
    # the final norm gives way to fc_norm under global pooling, as in MAE's fine-tuning; a head is trained anew
    expected = r'^(decoder_|mask_token|masked_embed|feature_head\.|head\.|head_dist\.|dist_token|fc_norm\.|norm\.|' \
               r'cls_token|blocks\.\d+\.attn\.k_bias$)'
    new = [k for k in own if k not in state or re.match(r'^head(_dist)?\.', k)]
    left_out = [k for k in state if k not in own or k in new]
    for k in (k for k in own if k in state and k not in new and misfit(state[k], own[k])):
        raise InputError(f'{path} holds another architecture: {k} {misfit(state[k], own[k])}; give the right --model')
    if 'norm.weight' in new and 'fc_norm.weight' in state:
        raise InputError(f'{path} was trained with global pooling and has no norm for a class token: give --global_pool')
    by_design = r'^(head\.|head_dist\.|dist_token|fc_norm\.|blocks\.\d+\.(gamma_[12]|attn\.rel(ative)?_pos\w*)$)'
    for what, names, pattern in (('lacks', new, by_design),
                                 ('has, without a place in the model,', left_out, expected)):
        wrong = [k for k in names if not re.match(pattern, k)]
        if wrong:
            raise InputError(f'{path} {what} {wrong[0]!r}' + (f' and {len(wrong) - 1} more' if wrong[1:] else '') +
                             ': is it the checkpoint of another architecture? Give the right --model')
    used = [k for k in own if k not in new]
    model.load_state_dict({k: state[k] for k in used}, strict=False)
    summary = [f'{len(used)} used: {", ".join(sorted({k.split(".")[0] for k in used}))}'] + resized
    for what, names in (('new', new), ('left out', left_out)):
        groups = sorted({re.sub(r'^blocks\.\d+\.(.*\.)?|\..*', '', k) for k in names})
        summary += [f'{what}: {", ".join(groups)}'] if groups else []
    say(f'start weights: {path}: {"; ".join(summary)}')
    return Loaded(used, resized, new, left_out)


# ---------------------------------------------------------------------------------------------------- randomness and data


SAMPLE, STEP, START = 1, 2, 3  # last entry of a seed's key, so that no two kinds of draws share a stream


def seed_everything(*key):
    """Seeds torch, numpy and random from integers, e.g. (seed, epoch, index, SAMPLE): reseed, never carry on."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 100 times as long, too slow per sample
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def open_image(path):
    """Image file -> Pillow's image, its header read; raises InputError for a size that no photograph has, or Pillow's error.

    A header of a few bytes can claim any number of pixels, and resizing the short side of a strip makes its long one huge.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('error', Image.DecompressionBombWarning)  # above 89 million pixels, PIL.Image.MAX_IMAGE_PIXELS
        file = Image.open(path)
    if max(file.size) > 200 * min(file.size):
        raise InputError(f'{file.width} x {file.height} pixels are a strip, not an image')
    return file


def to_rgb(file):
    """Opened Pillow image -> RGB; of an animation the first frame. Raises InputError where 0 to white is not known.

    16-bit grey is reduced to its upper byte, as Pillow does with 16-bit colours; its convert() would clip all above 255.
    """
    if file.mode.startswith('I;16') or (file.mode == 'I' and file.format in ('PNG', 'PPM')):
        return Image.fromarray((np.asarray(file) // 256).astype(np.uint8)).convert('RGB')
    if file.mode in ('I', 'F'):
        raise InputError(f'pixels of mode {file.mode}, 32 bits, have no known white: store 8 or 16')
    return file.convert('RGB')


def read_rgb(path):
    """Image file -> Pillow image in RGB; see `open_image` and `to_rgb`."""
    with open_image(path) as file:
        return to_rgb(file)


@cache
def image_statistics(device):
    """ImageNet's mean and deviation, (3, 1, 1) each: made once, as a copy to a GPU lets the host wait."""
    return [torch.tensor(values, device=device)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]


def normalise(images):
    """(..., 3, H, W) uint8, on any device -> float32 with ImageNet's mean and deviation, as the networks expect it.

    Batches travel as bytes: a quarter of the memory and of the way to the device.
    """
    mean, std = image_statistics(images.device)
    return (images.float() / 255 - mean) / std


class ResizedCrop(RandomResizedCrop):
    """torchvision's RandomResizedCrop, bicubic: PIL image -> (3, height, width) uint8.

    The crops are the same; torch's kernel enlarges or shrinks them in a third of Pillow's time. Of real photographs 4 % of
    the values differ from Pillow's, 0.02 % by more than one level of 256 (tools/benchmark.md).
    """

    def forward(self, image):
        top, left, height, width = self.get_params(image, self.scale, self.ratio)
        pixels = v2.functional.pil_to_tensor(image.crop((left, top, left + width, top + height)))
        return v2.functional.resize(pixels, self.size, InterpolationMode.BICUBIC, antialias=True)


class SeededDataset(torch.utils.data.Dataset):
    """(epoch, index) -> (transform(image), label, names of unreadable files), random only in (seed, epoch, index).

    So a resume is exact, and the numbers of workers and of processes change nothing. An unreadable image is replaced by
    the next one; `Progress.check_files` decides whether the run may go on.
    """

    def __init__(self, dataset, transform, seed):
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        epoch, index = key
        seed_everything(self.seed, epoch, index, SAMPLE)
        bad_files = []
        while len(bad_files) < 100:  # more in a row is no bad file but a lost disk
            try:
                image, label = self.dataset[index]
            except Exception as error:  # decoders raise nearly anything on a damaged file
                name = self.dataset.samples[index][0] if hasattr(self.dataset, 'samples') else f'sample {index}'
                bad_files.append(' '.join(f'{name} ({str(error) or type(error).__name__})'.splitlines()))
                index = (index + 1) % len(self.dataset)
                continue
            return self.transform(image), label, '\n'.join(bad_files)
        raise InputError(f'100 unreadable images in a row, the last {bad_files[-1]}')


class EpochSampler(torch.utils.data.Sampler):
    """Yields (epoch, index): a new order each epoch, of which every process takes each world_size-th entry.

    Step k of all processes together sees the same samples however they are split. Ends at whole updates. With `views` of
    each sample an epoch has as many steps, and a different 1/views of the samples. Raises InputError if there is not a
    single update. Set `epoch` before each pass, and `start`, this process's samples to leave out.
    """
    start = 0  # a pass that goes on in the middle has the length of a whole one

    def __init__(self, length, args, views=1):
        per_update = args.batch_size * args.accum_iter * args.world_size
        if length < per_update:
            raise InputError(f'the data set has {length} images, fewer than one batch of {per_update} '
                             '(--batch_size x --accum_iter x processes): lower --batch_size')
        self.length, self.seed, self.rank, self.world_size, self.epoch = length, args.seed, args.rank, args.world_size, 0
        self.used = length // per_update * per_update // views

    def __len__(self):
        return self.used // self.world_size

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        return ((self.epoch, int(index)) for index in order[:self.used][self.rank::self.world_size][self.start:])


class RoundSampler(torch.utils.data.Sampler):
    """Yields (pass, index) for training that counts iterations: round `epoch` is the next --eval_every updates.

    The stream of all rounds is one pass over the data after the other, each in a new order; of every step all processes
    together see the same samples however they are split. Set `epoch` before each round; the last one may be shorter.
    A resume with another effective batch starts elsewhere in the stream. `start`: as in `EpochSampler`.
    """
    start = 0

    def __init__(self, length, args):
        self.length, self.args, self.epoch = length, args, 0
        self.per_update = args.batch_size * args.accum_iter * args.world_size

    def __len__(self):
        start = self.epoch * self.args.eval_every
        updates = min(self.args.eval_every, self.args.iterations - start)
        return updates * self.per_update // self.args.world_size

    def __iter__(self):
        start = self.epoch * self.args.eval_every * self.per_update
        number, order = None, None
        for position in range(start + self.args.rank, start + len(self) * self.args.world_size,
                              self.args.world_size)[self.start:]:
            if position // self.length != number:
                number = position // self.length
                order = np.random.default_rng((self.args.seed, number)).permutation(self.length)
            yield number, int(order[position % self.length])


def load_cifar(args, train):
    """torchvision's CIFAR10 or CIFAR100 as PIL images; raises InputError if the files are not there."""
    try:
        return getattr(torchvision.datasets, args.data_set)(args.data_path, train=train)
    except RuntimeError as error:
        raise InputError(f'--data_path {args.data_path} does not hold {args.data_set} as torchvision stores it: '
                         f'torchvision.datasets.{args.data_set}(path, download=True) fetches it') from error
