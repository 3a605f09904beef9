"""Nonsense of all kinds, drawn by hypothesis: arguments, checkpoints, images and annotations.

The promise is one for all: it works, or one line says why not (models.InputError; FloatingPointError for a loss that is not
finite; argparse's own). Any other exception is a finding, and so is the end of the process. Left out, because they are no
nonsense but only large: numbers that ask for more memory or time than there is. LARGE names their flags, drawn small here.
FUZZ=20 in the environment draws 20 times as many; `make test-fuzz FUZZ=20` prints how many of each kind there were.
"""
import argparse
import collections
import copy
import functools
import io
import json
import math
import os
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from conftest import contents
from test_det_data import in_child, read_all, small_set

import generic_distill
import models
import specific_distill_cls
import specific_distill_det
import specific_distill_seg
import toy_data

GENERIC, CLS, DET, SEG = generic_distill, specific_distill_cls, specific_distill_det, specific_distill_seg
SCRIPTS = {'stage 1': GENERIC, 'classification': CLS, 'detection': DET, 'segmentation': SEG}
EVERY = pytest.mark.parametrize('script', SCRIPTS.values(), ids=SCRIPTS)
NAME = {script: name for name, script in SCRIPTS.items()}
TIMES = int(os.environ.get('FUZZ', 1))
TRIED = collections.Counter()  # (target, how it ended) -> inputs
VIT = ('--model', 'vit_pico_patch8', '--teacher_model', 'vit_pico_patch8')
MAE = ('--model', 'mae_vit_pico_patch8', '--teacher_model', 'mae_vit_pico_patch8', '--target_layer', '2')
COMMON = ('--num_workers', '0', '--device', 'cpu', '--lr', '1e-3')
EPOCHS = ('--input_size', '16', '--batch_size', '4', '--accum_iter', '1', '--epochs', '1', '--warmup_epochs', '0', *COMMON)
ROUNDS = ('--batch_size', '2', '--iterations', '1', '--eval_every', '1', '--warmup_iterations', '0', *COMMON)
TINY = {GENERIC: (*MAE, *EPOCHS), CLS: (*VIT, *EPOCHS),
        DET: (*VIT, '--input_size', '64', '--window_size', '4', '--fpn_dim', '16', '--head_dim', '32', '--anchor_size', '8',
              '--proposals', '20', '--roi_batch', '16', *ROUNDS),
        SEG: (*VIT, '--input_size', '32', *ROUNDS)}
FOLDER = {GENERIC: 'imagenet', CLS: 'imagenet', DET: 'coco', SEG: 'ade'}
TEACHERLESS = {GENERIC: ('--target', 'pixel'), CLS: (), DET: (), SEG: ()}


def fuzz(examples):
    return settings(max_examples=examples * TIMES, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


def outcome(target, call, *args):
    """Calls; keeps count of how it ended. What is neither success nor a refusal in one line goes through, and fails."""
    try:
        call(*args)
        result = 'done'
    except models.InputError as error:
        assert len(str(error).splitlines()) == 1, str(error)
        result = 'refused'
    except FloatingPointError:
        result = 'not finite'
    except SystemExit as stop:  # argparse has printed its line
        assert stop.code == 2
        result = 'refused by argparse'
    TRIED[target, result] += 1
    return result


@pytest.fixture(scope='module', autouse=True)
def figures():
    """Prints what was tried, where pytest -s shows it."""
    yield
    for target in sorted({target for target, _ in TRIED}):
        ends = {end: count for (name, end), count in sorted(TRIED.items()) if name == target}
        parts = ', '.join(f'{count} {end}' for end, count in ends.items())
        print(f'\n{target}: {sum(ends.values())} inputs: {parts}', end='')


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """Toy data, a checkpoint of each script, and what may be given in the place of a file or a folder."""
    folder = tmp_path_factory.mktemp('fuzz')
    toy_data.main(toy_data.get_args_parser().parse_args(
        ['--out', str(folder), '--size', '16', '--train', '12', '--val', '12', '--scenes', '2', '--val_scenes', '2',
         '--scene_size', '64']))
    for script in SCRIPTS.values():
        run(script, folder, folder / NAME[script], *TEACHERLESS[script])
    (folder / 'empty').mkdir()
    (folder / 'text').write_text('no picture, no weights\n')
    (folder / 'list.json').write_text('[1, {"script": 3}]')
    (folder / 'deep.json').write_text('[' * 50000)
    return folder


def run(script, folder, out, *words):
    """The script as from the command line, in this process."""
    argv, sys.argv = sys.argv, [script.__file__, '--data_path', str(folder / FOLDER[script]), '--output_dir', str(out),
                                *TINY[script], *words]
    try:
        script.main(models.parse_args(script.get_args_parser()))
    finally:
        sys.argv = argv


# ----------------------------------------------------------------------------------------------------------- arguments


ODD = 'nan inf -inf -1 0 -0.0 1 2 0.5 1e-45 1e300 -1e300 1e-300 0x10 1_0'.split() + ['', ' ']
# flags whose large values ask for memory or time
LARGE = {'input_size', 'batch_size', 'accum_iter', 'epochs', 'iterations', 'num_workers', 'window_size', 'fpn_dim',
         'head_dim', 'proposals', 'roi_batch', 'nb_classes', 'ratio_range'}
HUGE = ['2147483647', '2147483648', '4294967296', '9223372036854775808', '1' + '0' * 30, '9' * 5000]
NAMES = ['vit_pico_patch8', 'vit_pico_patch16', 'vit_pico_patch4', 'vit_nano_patch8', 'vit_pico_patch3', 'vit_pico_patch0',
         'mae_vit_pico_patch8', 'mae_vit_pico_patch16', 'mae_vit_pico_patch8_dec64d1b', 'mae_vit_pico_patch8_dec32d0b',
         'mae_vit_pico_patch8_dec33d1b', 'vit_pico_patch8_dec32d2b', 'vit_pico_patch', 'vit_pico_patch' + '9' * 5000,
         'mae_vit_pico_patch8_dec0d' + '9' * 5000 + 'b', 'vit_pico_patch\u0668', 'resnet50', '', '../x',
         'vit_pico_patch8\n']
POLICIES = [
    'none', 'rand-m9-mstd0.5-inc1', 'rand-m10', 'rand-m99', 'rand-m-5', 'rand-mx', 'rand-n0', 'rand-n100', 'rand', 'rand-',
    '-', '', 'v0', 'v0r', 'original', 'originalr', '3a', 'augmix-m5-w4-d2', 'augmix-d0', 'augmix-w0', 'augmix', 'rand-m9-p2',
    'rand-m9-mstdx', 'rand-mnan', 'rand-minf', 'rand-m9-mmax-1', 'rand-m9-tfoo', 'rand-m9-w0', 'rand-w7']


@pytest.fixture(autouse=True)
def traced_only(monkeypatch):
    """--compile without the C++ compiler's half a minute."""
    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend='eager'))


def places(world, out):
    """What may stand where a path belongs."""
    files = [str(world / NAME[script] / 'checkpoint.pth') for script in SCRIPTS.values()]
    return st.sampled_from([*files, *(str(Path(name).parent) for name in files), *(str(world / name) for name in (
        'empty', 'text', 'absent', 'text/below', 'list.json', 'deep.json', 'imagenet', 'coco', 'ade',
        'coco/annotations/instances_val2017.json', 'coco/train2017', 'x' * 300, 'x/' * 3000)),
        str(out), 'auto', '', '.', '/dev/null', '/proc/self/mem', 'https://', '~', '\u00e4 "b" -c', 'a\nb'])


def targets(world, out):
    """What may stand where something is written."""
    paths = out, out / 'a/b', world / 'text', world / 'text/below', world / NAME[CLS], world / ('x/' * 3000), 'x' * 300
    return st.sampled_from([*map(str, paths), '', '.', 'a\nb', '/dev/null', '/dev/null/x', '/proc/x'])


def values(action, world, out):
    """Strategy for the words behind a flag."""
    if action.dest == 'help':
        return st.just([])
    if isinstance(action, argparse.BooleanOptionalAction):
        return st.sampled_from([[f'--{action.dest}'], [f'--no-{action.dest}']])
    if action.nargs == 0:
        return st.just([f'--{action.dest}'])
    if action.choices:
        one = st.sampled_from([*action.choices, '', 'x'])
    elif action.type in (int, float):
        small = [str(number) for number in (-3, 3, 4, 5, 7, 8, 12, 16, 24, 32, 48, 64)]
        odd = ODD if action.type is float else ['-1', '0', '1', '2', '1.5', 'nan', '', '1_0']
        one = st.sampled_from(odd + small + ([] if action.dest in LARGE else HUGE))
        if action.type is float:
            one |= st.floats().map(str) | st.floats(0, 2).map(str) if action.dest not in LARGE else st.floats(0, 4).map(str)
    elif action.dest in ('model', 'teacher_model'):
        one = st.sampled_from(NAMES)
    elif action.dest == 'aa':
        one = st.sampled_from(POLICIES) | st.text('rand-mstdincpx0159.', max_size=14)
    elif action.dest == 'device':
        one = st.sampled_from(['cpu', 'cpu:0', 'cpu:7', 'cpu:-1', 'cuda', 'cuda:99', 'meta', 'mps', 'xla', '', ' ', '0'])
    elif action.dest in ('output_dir', 'results_json'):
        one = targets(world, out)
    elif action.dest in ('train_split', 'val_split'):
        one = st.sampled_from(['training', 'validation', '', '..', '../..', 'absent', 'x' * 300, '/'])
    else:
        one = places(world, out)
    count = {None: (1, 1), 2: (1, 3), '+': (0, 3)}[action.nargs]
    lists = st.lists(one, min_size=count[0], max_size=count[1])
    return lists.map(lambda found: [f'--{action.dest}={found[0]}'] if action.nargs is None else [f'--{action.dest}', *found])


@st.composite
def command_lines(draw, script, world, out):
    actions = [action for action in script.get_args_parser()._actions if action.dest not in ('help', 'output_dir')]
    chosen = draw(st.lists(st.sampled_from(actions), min_size=1, max_size=draw(st.sampled_from([1, 1, 2, 3, 6])),
                           unique_by=lambda action: action.dest))
    words = [word for action in chosen for word in draw(values(action, world, out))]
    if draw(st.booleans()):
        teacher = '--teacher_path', str(world / NAME[script] / 'checkpoint.pth')
        words += draw(st.sampled_from([teacher, TEACHERLESS[script]]))
    if draw(st.integers(0, 9)) == 0:
        words += ['--output_dir', draw(targets(world, out))]
    return words


def fill(folder, config):
    """An args.json with values of any type in it."""
    folder.mkdir(exist_ok=True)
    (folder / 'args.json').write_text(json.dumps(config))
    return folder / 'args.json'


@EVERY
def test_any_command_line_runs_or_is_refused_in_one_line(script, world, tmp_path, monkeypatch):
    """README, bad data: whatever is given to any flag, a run works or ends in one line, and never in a traceback."""
    monkeypatch.chdir(tmp_path)
    out, before = tmp_path / 'out', contents(world)

    @fuzz(70 if script in (GENERIC, CLS) else 50)
    @given(st.data())
    def check(data):
        words = data.draw(command_lines(script, world, out))
        monkeypatch.setattr(sys, 'argv', ['x'])
        outcome(f'arguments of {NAME[script]}', run, script, world, out, *words)
        for folder in tmp_path.iterdir():
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()

    check()
    changed = {name for name, content in contents(world).items() if before.get(name) != content}
    assert not {name for name in changed if name.startswith(('imagenet/', 'coco/', 'ade/'))}  # no run touches its data


def test_any_augmentation_policy_works_or_is_refused_in_one_line():
    """README, bad data: --aa is timm's string of a policy; what timm cannot apply is refused before the run."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20, 3)).astype(np.uint8))
    args = CLS.get_args_parser().parse_args(['--input_size', '40'])
    args.input_size = [40, 40]

    def work(policy):
        args.aa = policy
        transform = CLS.build_transform(args, True)
        for seed in range(5):
            models.seed_everything(seed)
            transform(image)

    part = st.sampled_from([*('m9 m10 m0 m-1 m99 mx m mstd0.5 mstd-1 mstd101 mmax0 mmax99 n0 n9 p0.5 p2 inc1 inc0 w0 w3 d0 '
                              'd2 b1 a-1 tnone t3a foo 9').split(), ''])

    @fuzz(150)
    @given(st.sampled_from(POLICIES) | st.text('rand-mstdincpx0159.', max_size=14) | st.builds(
        lambda first, parts: '-'.join([first, *parts]), st.sampled_from(['rand', 'augmix', 'v0', 'original', '3a', 'x']),
        st.lists(part, max_size=4)))
    def check(policy):
        outcome('augmentation policies', work, policy)

    check()


PLAIN = st.none() | st.booleans() | st.integers(-9, 9) | st.integers() | st.floats() | st.text(max_size=5)
NESTED = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.text(max_size=4), inner, max_size=3))


@EVERY
def test_any_args_json_is_used_or_refused_in_one_line(script, world, tmp_path, monkeypatch):
    """README, bad data: so does a --config file that was changed by hand."""
    stored = json.loads((world / NAME[script] / 'args.json').read_text())

    @fuzz(20)
    @given(st.data())
    def check(data):
        config = copy.deepcopy(stored)
        for name in data.draw(st.lists(st.sampled_from([*stored, 'new']), min_size=1, max_size=3)):
            value = data.draw(NESTED)
            large = name in LARGE and isinstance(value, (int, float)) and value > 64
            # None is left out of the command line: the paper's value, and days of training
            assume(not large and not (name in LARGE and (value is None or isinstance(value, list))))
            config[name] = value
        file = fill(tmp_path / 'config', config if data.draw(st.integers(0, 9)) else data.draw(NESTED))
        words = ['--config', str(file), '--output_dir', str(tmp_path / 'out')]
        monkeypatch.setattr(sys, 'argv', [script.__file__, *words])
        outcome(f'args.json of {NAME[script]}', lambda: script.main(models.parse_args(script.get_args_parser())))
        shutil.rmtree(tmp_path / 'out', ignore_errors=True)

    check()


# --------------------------------------------------------------------------------------------------------- checkpoints


def odd_tensors():
    """Tensors that no weight is, or not this one."""
    def build(kind, shape):
        plain = torch.ones(shape)
        return {'float': plain, 'nan': plain * math.nan, 'inf': plain / 0, 'double': plain.double() * 1e300,
                'half': plain.half(), 'bfloat16': plain.bfloat16(), 'float8': plain.to(torch.float8_e4m3fn),
                'complex': plain.to(torch.complex64), 'int': plain.int(), 'bool': plain.bool(), 'uint8': plain.byte(),
                'meta': plain.to('meta'), 'sparse': plain.to_sparse() if plain.ndim else plain,
                'expanded': torch.ones(()).expand(shape), 'no numbers': torch.ones(*shape, 0),
                'many rows of nothing': torch.ones(10 ** 12, 0), 'parameter': torch.nn.Parameter(plain),
                'quantized': torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8), 'view': torch.ones(9, *shape)[3]}[kind]

    kinds = st.sampled_from([
        'float', 'nan', 'inf', 'double', 'half', 'bfloat16', 'float8', 'complex', 'int', 'bool', 'uint8', 'meta', 'sparse',
        'expanded', 'no numbers', 'many rows of nothing', 'parameter', 'quantized', 'view'])
    shapes = st.sampled_from([(), (0,), (1,), (2,), (3,), (32,), (96,), (5, 32), (12, 32), (1, 1, 32), (1, 5, 32),
                              (1, 0, 32), (1, 1, 0), (1, 26, 32), (2, 5, 32), (32, 3, 8, 8), (1, 2, 2, 32), (7, 7)])
    return st.builds(build, kinds, shapes)


KEYS = st.text(max_size=6) | st.integers(-2, 9) | st.none() | st.booleans() | st.tuples(st.integers(0, 2)) | st.sampled_from(
    ['model', 'state_dict', 'teacher', 'student', 'optimizer', 'args', 'epoch', 'classes', 'scaler', 'head.weight',
     'pos_embed', 'decoder_pos_embed', 'cls_token', 'dist_token', 'head_dist.weight', 'fc_norm.weight', 'line\nbreak',
     'decoderfeature_pred.fc1.weight', 'vit.embeddings.patch_embeddings.projection.weight', 'rpn.head.cls_logits.weight',
     'vit.encoder.layer.0.attention.attention.query.weight', 'vit.encoder.layer.0.attention.attention.key.weight',
     'vit.encoder.layer.0.attention.attention.value.weight', 'module.backbone.cls_token', 'decode_head.conv_seg.weight'])
LEAVES = st.deferred(lambda: PLAIN | odd_tensors() | st.just(argparse.Namespace(lr=1)) | st.binary(max_size=3))
ANYTHING = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
                        max_leaves=9)


def mutate(draw, content):
    """Drops, renames, doubles or replaces a random entry of nested dicts and lists, mostly near the top or a weight."""
    node, path = content, []
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = draw(st.sampled_from(keys))
        if isinstance(node[key], (dict, list)) and node[key] and draw(st.integers(0, 4)):
            node, path = node[key], [*path, key]
            continue
        how = draw(st.sampled_from(['drop', 'rename', 'replace', 'tensor', 'reshape', 'retype', 'spoil']))
        value = node[key]
        if how == 'drop':
            del node[key]
        elif how == 'rename' and isinstance(node, dict):
            node[draw(KEYS)] = node.pop(key)
        elif how == 'tensor' or (how == 'rename' and isinstance(node, list)):
            node[key] = draw(odd_tensors())
        elif how == 'reshape' and isinstance(value, torch.Tensor):
            node[key] = draw(st.sampled_from([value[None], value.flatten(), torch.cat([value.flatten()] * 2), value.mT
                                              if value.ndim > 1 else value[None], value[:0] if value.ndim else value[None]]))
        elif how == 'retype' and isinstance(value, torch.Tensor):
            types_ = torch.half, torch.int64, torch.bool, torch.complex64, torch.float64
            node[key] = value.to(draw(st.sampled_from(types_)))
        elif how == 'spoil' and isinstance(value, torch.Tensor) and value.is_floating_point():
            node[key] = value * draw(st.sampled_from([math.nan, math.inf, 1e30, -1, 0]))
        else:
            node[key] = draw(ANYTHING)
        break


def routes(script, world, out):
    """name -> function(path) of each way on which a script reads a checkpoint."""
    ways = {'load_checkpoint': models.load_checkpoint,
            'load_teacher': lambda path: models.load_teacher(models.create_mae('mae_vit_pico_patch8', 16), path),
            'load_pretrained': lambda path: models.load_pretrained(models.create_vit('vit_pico_patch8', 3, 16), path)}
    flags = {'--resume': TEACHERLESS[script] + (('--epochs', '2') if script in (GENERIC, CLS) else ())}
    if script is not GENERIC:
        flags.update({'--finetune': (), '--eval --resume': ()})
    flags['--teacher_path'] = ()
    for flag, more in flags.items():
        ways[flag] = lambda path, flag=flag, more=more: run(script, world, out, *more, *flag.split(), str(path))
    return ways


@EVERY
def test_any_checkpoint_is_read_or_refused_in_one_line(script, world, tmp_path):
    """README, bad data: entries of real checkpoints dropped, renamed, retyped, reshaped, spoilt, on every way into a run."""
    file, out = tmp_path / 'file.pth', tmp_path / 'out'
    sound = {name: torch.load(world / NAME[name] / 'checkpoint.pth', weights_only=True) for name in (script, GENERIC)}
    ways = routes(script, world, out)

    @fuzz(120 if script in (GENERIC, CLS) else 80)
    @given(st.data())
    def check(data):
        way = data.draw(st.sampled_from([*ways, *[name for name in ways if name.startswith('--')] * 2]))
        own = way.startswith('--') and (way != '--finetune' or script is GENERIC)
        content = copy.deepcopy(sound[script if own else GENERIC])
        if not data.draw(st.integers(0, 9)):
            content = data.draw(ANYTHING)
        elif not data.draw(st.integers(0, 5)):
            content = content['model']
        for _ in range(data.draw(st.integers(1, 3))):
            if isinstance(content, (dict, list)):
                mutate(data.draw, content)
        torch.save(content, file)
        outcome(f'checkpoints, {way} of {NAME[script]}' if way.startswith('--') else f'checkpoints, {way}', ways[way], file)
        shutil.rmtree(out, ignore_errors=True)

    check()


@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
def test_any_damage_to_the_bytes_of_a_checkpoint_is_read_or_refused_in_one_line(legacy, world, tmp_path):
    """README, bad data: bytes changed, cut out, doubled, anywhere in the file; in a child, as a reader in C may crash."""
    file = tmp_path / 'file.pth'
    state = torch.load(world / NAME[CLS] / 'checkpoint.pth', weights_only=True)
    torch.save(state, file, _use_new_zipfile_serialization=not legacy)
    whole = file.read_bytes()

    def work(note):
        @fuzz(60)
        @given(st.data())
        def check(data):
            file.write_bytes(damaged(data.draw, whole))
            outcome('bytes of checkpoints', models.load_checkpoint, file)

        check()
        return TRIED

    TRIED.update(returned(work) - TRIED)


def damaged(draw, content):
    """The bytes with up to four places changed, cut out or doubled: mostly at the two ends, where the structure is."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        length = len(content)
        start = draw(st.integers(0, min(length, 400)) | st.integers(max(0, length - 4000), length) | st.integers(0, length))
        size = draw(st.sampled_from([1, 1, 1, 2, 4, 8, 100, length]))
        how = draw(st.sampled_from(['set', 'set', 'flip', 'cut', 'double']))
        part = content[start:start + size]
        if how == 'set':
            part = draw(st.binary(min_size=1, max_size=4) | st.sampled_from([b'\xff' * 4, b'\0' * 4, b'\x7f\xff\xff\xff']))
            content[start:start + len(part)] = part
        elif how == 'flip':
            content[start:start + size] = bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in part[:4]) + part[4:]
        else:
            content[start:start + size] = b'' if how == 'cut' else part * 2
    return bytes(content)


def returned(work):
    """What the function returns in a child process, which must not end otherwise."""
    ended, *what = in_child(work, timeout=60 + 60 * TIMES)
    assert ended == 'returned', (ended, what)
    return what[0]


# -------------------------------------------------------------------------------------------------------------- images


def pictures():
    """Files of a drawn picture in the formats and modes that loaders meet."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (24, 17, 3)).astype(np.uint8))
    found = []
    for kind, modes in (('PNG', ('RGB', 'RGBA', 'L', 'LA', 'P', '1', 'I;16')), ('JPEG', ('RGB', 'L', 'CMYK')),
                        ('GIF', ('P',)), ('WEBP', ('RGB', 'RGBA')), ('TIFF', ('RGB', 'CMYK', 'I;16')),
                        ('BMP', ('RGB', 'P')), ('PPM', ('RGB',))):
        for mode in modes:
            file = io.BytesIO()
            (colours.convert('L').convert('I;16') if mode == 'I;16' else colours.convert(mode)).save(file, kind)
            found.append(file.getvalue())
    return found


def test_any_damage_to_an_image_is_read_or_named_in_one_line(tmp_path):
    """README, bad data: the same for the bytes of images; what is read has pixels from 0 to 255 in three channels."""
    (tmp_path / 'a').mkdir()
    file, sound = tmp_path / 'a/0.png', pictures()
    Image.new('RGB', (8, 8)).save(tmp_path / 'a/1.png')
    file.write_bytes(sound[0])
    args = CLS.get_args_parser().parse_args(['--input_size', '16'])
    args.input_size = [16, 16]
    data = models.SeededDataset(CLS.torchvision.datasets.ImageFolder(tmp_path, loader=models.read_rgb),
                                CLS.build_transform(args, False), 0)
    coco = ([{'id': 1, 'file_name': '0.png', 'height': 24, 'width': 17}], {1: []}, [{'id': 1, 'name': 'a'}])
    dense = types.SimpleNamespace(input_size=[32, 32], seed=0, scale_jitter=[1, 1])
    detection = DET.CocoDataset(coco, tmp_path / 'a', dense, False)

    def work(note):
        @fuzz(200)
        @given(st.data())
        def check(draw):
            file.write_bytes(damaged(draw.draw, draw.draw(st.sampled_from(sound))))
            image, label, named = data[0, 0]
            assert image.shape == (3, 16, 16) and image.isfinite().all() and len(named.splitlines()) <= 1
            assert (named == '') or named.startswith(str(file))
            TRIED['bytes of images, classification', 'named' if named else 'done'] += 1
            outcome('bytes of images, detection', detection.__getitem__, (0, 0))
            outcome('bytes of images, segmentation', SEG.read_image, file)

        check()
        return TRIED

    TRIED.update(returned(work) - TRIED)


# --------------------------------------------------------------------------------------------------------- annotations


RUNS = st.text('0123456789:;<=>?@ABCOPQ_`lmno', max_size=12) | st.lists(st.integers(-1, 700), max_size=6)
NUMBERS = st.integers(-5, 50) | st.floats() | st.integers() | st.floats(-9, 99) | st.sampled_from(
    [1e5, -1e5, 99999.5, 1e300, 2 ** 31, -2 ** 31, 2 ** 63, 10 ** 400, 1e-320])
SHAPES = st.lists(st.lists(NUMBERS, max_size=10), max_size=3) | st.fixed_dictionaries(
    {'counts': RUNS, 'size': st.lists(NUMBERS, max_size=3) | st.sampled_from(
        [[20, 30], [24, 16], [30, 20], [0, 0], [10 ** 6, 10 ** 6], [20.0, 30]])}) | NESTED


def test_any_annotations_are_used_or_refused_in_one_line(tmp_path):
    """README, bad data: COCO files with types, numbers, ids, run lengths and polygons changed: read, trained, evaluated."""
    path, images, content = small_set(tmp_path)

    def work(note):
        @fuzz(120)
        @given(st.data())
        def check(data):
            broken = copy.deepcopy(content)
            for _ in range(data.draw(st.integers(1, 3))):
                entry = data.draw(st.sampled_from(broken['annotations'])) if broken.get('annotations') else broken
                kind = data.draw(st.sampled_from(['segmentation', 'bbox', 'number', 'entry', 'double', 'image', 'top']))
                if kind == 'segmentation':
                    entry['segmentation'] = data.draw(SHAPES)
                elif kind == 'bbox':
                    entry['bbox'] = data.draw(st.lists(NUMBERS, min_size=4, max_size=4))
                elif kind == 'number':
                    key = data.draw(st.sampled_from(['id', 'image_id', 'category_id', 'iscrowd', 'area']))
                    entry[key] = data.draw(NUMBERS)
                elif kind == 'entry':
                    entry[data.draw(st.sampled_from([*entry, 'new']))] = data.draw(NESTED)
                elif kind == 'double' and isinstance(broken.get('annotations'), list):
                    broken['annotations'] += broken['annotations'][:data.draw(st.integers(0, 5))]
                elif kind == 'image' and broken.get('images'):
                    image = data.draw(st.sampled_from(broken['images']))
                    image[data.draw(st.sampled_from(['id', 'file_name', 'height', 'width']))] = data.draw(NUMBERS | NESTED)
                else:
                    broken[data.draw(st.sampled_from(['images', 'annotations', 'categories', 'info']))] = data.draw(NESTED)
                    break
            path.write_text(json.dumps(broken))
            note(json.dumps(broken))
            outcome('annotations', read_all, path, images)

        check()
        return TRIED

    TRIED.update(returned(work) - TRIED)
