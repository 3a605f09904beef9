"""A run can be repeated: by its command, by its args.json, in another process; and stage 1's comparison with a constant.

What is repeated runs in fresh interpreters with other hash seeds. Oracles are closed forms and bisection in float64, git
and torch used directly, or the values that went in.
"""
import argparse
import itertools
import json
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from conftest import assert_same_bits, checkpoint_of, contents, environment, log_of, without_clock

import generic_distill
import models
import specific_distill_cls
import specific_distill_det
import specific_distill_seg
import toy_data

ROOT = Path(__file__).resolve().parents[1]
GENERIC, CLS, DET, SEG = generic_distill, specific_distill_cls, specific_distill_det, specific_distill_seg
SCRIPTS = {'stage 1': GENERIC, 'classification': CLS, 'detection': DET, 'segmentation': SEG}
COMMON = ('--lr', '1e-3', '--num_workers', '0', '--device', 'cpu')
EPOCHS = ('--input_size', '16', '--batch_size', '8', '--accum_iter', '1', '--epochs', '2', '--warmup_epochs', '1', *COMMON)
ROUNDS = ('--batch_size', '2', '--iterations', '2', '--eval_every', '2', '--warmup_iterations', '1', *COMMON)
VIT = ('--model', 'vit_pico_patch8', '--teacher_model', 'vit_pico_patch8')
MAE = ('--model', 'mae_vit_pico_patch8', '--teacher_model', 'mae_vit_pico_patch8', '--target_layer', '2')
TINY = {GENERIC: (*MAE, *EPOCHS),
        CLS: (*VIT, *EPOCHS),
        DET: (*VIT, '--input_size', '64', '--window_size', '4', '--fpn_dim', '16', '--head_dim', '32', '--anchor_size', '8',
              '--proposals', '20', '--roi_batch', '16', *ROUNDS),
        SEG: (*VIT, '--input_size', '32', *ROUNDS)}
FOLDER = {GENERIC: 'imagenet', CLS: 'imagenet', DET: 'coco', SEG: 'ade'}
PIXEL = ('--target', 'pixel')
PROVENANCE = {'script', 'commit', 'versions', 'hardware'}
PROCESS = {'rank', 'local_rank', 'world_size', 'distributed'}
WARNING = 'warning: after warm-up the loss'


# ------------------------------------------------------------------------------------------------------------- helpers


def command(script, data, out, *flags):
    words = '--output_dir', out, '--data_path', data / FOLDER[script], *TINY[script], *flags
    return [script.__file__, *map(str, words)]


def run(script, data, out, *flags):
    """In this process; the arguments as the run left them."""
    args = script.get_args_parser().parse_args(command(script, data, out, *flags)[1:])
    script.main(args)
    return args


def as_script(monkeypatch, *words):
    """The script's last lines, too: what it ends with as an error, or None."""
    monkeypatch.setattr(sys, 'argv', [*map(str, words)])
    try:
        runpy.run_path(sys.argv[0], run_name='__main__')
    except SystemExit as stop:
        return stop.code


def largest_difference(left, right):
    return max((left[name].double() - right[name].double()).abs().max().item() for name in left)


def write_config(folder, script, **changes):
    """An args.json as the script writes it."""
    args = script.get_args_parser().parse_args([])
    values = {'script': Path(script.__file__).name, 'commit': 'abc1234 with changes', 'versions': 'torch 0, timm 0',
              'hardware': '1 x cpu', 'rank': 0, 'local_rank': 0, 'world_size': 1, 'distributed': False, **changes}
    script.open_log(argparse.Namespace(**{**vars(args), 'output_dir': str(folder), **values}), 'epoch', -1)
    return folder / 'args.json'


def parsed(monkeypatch, script, *words):
    monkeypatch.setattr(sys, 'argv', [script.__file__, *map(str, words)])
    return vars(models.parse_args(script.get_args_parser()))


# ------------------------------------------------------------------------------------------------------------ fixtures


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Drawn: 48 pictures of 12 classes to train and 12 to validate; 4 and 2 scenes."""
    folder = tmp_path_factory.mktemp('toy')
    toy_data.main(toy_data.get_args_parser().parse_args(
        ['--out', str(folder), '--size', '24', '--train', '48', '--val', '12', '--scenes', '4', '--val_scenes', '2',
         '--scene_size', '64']))
    return folder


# torchrun starts it: first the commands of both processes together, then those of each alone; what one prints, by process
LAUNCHER = """import contextlib, json, os, pathlib, runpy, sys
import torch.distributed as dist
folder, rank = pathlib.Path.cwd(), os.environ['RANK']
jobs = json.loads((folder / 'jobs.json').read_text())
start, stop = dist.init_process_group, dist.destroy_process_group
dist.init_process_group = lambda **options: dist.is_initialized() or start(**options)
dist.destroy_process_group = lambda: None
def work(jobs):
    for name, sys.argv in jobs:
        with open(folder / f'{name}.{rank}.txt', 'w') as file, contextlib.redirect_stdout(file):
            runpy.run_path(sys.argv[0], run_name='__main__')
work(jobs['together'])
stop()
for name in ('WORLD_SIZE', 'RANK', 'LOCAL_RANK'):
    del os.environ[name]
work(jobs[rank])
"""


def start_two(folder, hash_seed, **jobs):
    """jobs: for the two processes together, and for '0' and '1' alone: (name, command)."""
    (folder / 'launcher.py').write_text(LAUNCHER)
    (folder / 'jobs.json').write_text(json.dumps(jobs))
    process = subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', 'launcher.py'], cwd=folder,
        env={**environment(), 'PYTHONPATH': str(ROOT), 'PYTHONHASHSEED': str(hash_seed)}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True)
    try:
        printed, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers, too
        pytest.fail(f'the processes do not come to an end: {process.communicate()[0][-4000:]}')
    assert process.returncode == 0, printed[-4000:]


@pytest.fixture(scope='module')
def runs(data, tmp_path_factory):
    """Every run of `first` again in `again`, in other interpreters and another order: by its command, by its args.json
    (` config`), with another seed by each of the two (` seed`, ` config seed`)."""
    folder = tmp_path_factory.mktemp('runs')
    first, again = folder / 'first', folder / 'again'
    weights = {name: first / name / 'checkpoint.pth' for name in ('two', 'feature', 'teacher')}
    made = {
        'two': (GENERIC, *PIXEL, '--batch_size', 4),
        'pixel': (GENERIC, *PIXEL, '--no-norm_pix_loss', '--skip_bad_images', '--input_size', 16, 24, '--clip_grad', 0.3,
                  '--weight_decay', 0, '--min_lr', 1e-5, '--seed', 3, '--save_every', 1, '--amp', 'bf16'),
        'feature': (GENERIC, '--teacher_path', weights['two'], '--supervise', 'masked', '--mask_ratio', 0.5),
        'teacher': (CLS, '--finetune', weights['two'], '--layer_decay', 0.65, '--drop_path', 0.1),
        'student': (CLS, '--finetune', weights['feature'], '--teacher_path', weights['teacher'], '--no-global_pool',
                    '--skip_bad_images', '--input_size', 16, 24, '--distillation_type', 'soft', '--distillation_tau', 2.5,
                    '--aa', 'v0', '--mixup', 0, '--batch_size', 4, '--accum_iter', 2, '--eval_every', 2, '--print_freq', 1),
        'detection': (DET, '--grad_checkpointing', '--scale_jitter', 0.5, 1.5),
        'segmentation': (SEG, '--ratio_range', 0.75, 1.5, '--clip_grad', 1),
    }
    alone = {'0': ('pixel', 'feature', 'teacher', 'student'), '1': ('detection', 'segmentation')}

    def job(out, name, *more):
        script, *flags = made[name.split()[0]]
        if 'config' in name:
            words = script.__file__, '--config', first / name.split()[0] / 'args.json', '--output_dir', out / name, *more
        else:
            words = command(script, data, out / name, *flags, *more)
        return name, [str(word) for word in words]

    for out in (first, again):
        out.mkdir()
    start_two(first, 1, together=[job(first, 'two')],
              **{rank: [job(first, name) for name in names] for rank, names in alone.items()})
    before = contents(first)
    kinds = (' config seed', ' seed', ' config', '')
    repeats = {rank: [job(again, name + kind, *(('--seed', 5) if 'seed' in kind else ()))
                      for name in reversed(names) for kind in kinds]
               for rank, names in {'together': ['two'], **alone}.items()}
    repeats['together'].append(['both', [GENERIC.__file__, '--config', str(first / 'feature/args.json'), '--batch_size', '4',
                                         '--output_dir', str(again / 'both')]])
    repeats['0'].append(['alone', [GENERIC.__file__, '--config', str(first / 'two/args.json')]])  # into ./output_dir
    start_two(again, 2, **repeats)
    return types.SimpleNamespace(first=first, again=again, before=before, made=made)


NAMES = pytest.mark.parametrize('name', ['two', 'pixel', 'feature', 'teacher', 'student', 'detection', 'segmentation'])


# ---------------------------------------------------------------------------------------------------------- same bits


@NAMES
def test_a_command_gives_the_same_bits_in_another_process(name, runs):
    """README, randomness: seed, machine and number of processes determine a run; `two` is one of two processes."""
    first, again = checkpoint_of(runs.first / name), checkpoint_of(runs.again / name)
    assert first['args']['world_size'] == again['args']['world_size'] == (2 if name == 'two' else 1)
    assert_same_bits(first, again)
    assert without_clock(log_of(runs.first / name)) == without_clock(log_of(runs.again / name))


@NAMES
def test_args_json_alone_gives_the_same_bits_in_another_process(name, runs):
    """The help of --config: another run's values; with them alone, and another folder, a run is repeated."""
    first, again = checkpoint_of(runs.first / name), checkpoint_of(runs.again / f'{name} config')
    assert again['args']['config'] == str(runs.first / name / 'args.json')
    for key in first['args'].keys() - {'config', 'output_dir', 'train_seconds', 'commit'}:
        assert first['args'][key] == again['args'][key], key
    assert_same_bits(first, again)
    assert without_clock(log_of(runs.first / name)) == without_clock(log_of(runs.again / f'{name} config'))


@NAMES
def test_another_seed_gives_other_weights_and_wins_over_the_files(name, runs):
    """Both comparisons above would see a difference in the draws; the help of --config: a flag by hand wins."""
    first, seed = checkpoint_of(runs.first / name), checkpoint_of(runs.again / f'{name} seed')
    assert largest_difference(first['model'], seed['model']) > 1e-3
    assert_same_bits(seed, checkpoint_of(runs.again / f'{name} config seed'))


def test_repeating_a_finished_run_leaves_its_folder_as_it_is(runs):
    """--config carries neither the folder nor the resume of the other run: nothing is resumed, nothing overwritten."""
    assert contents(runs.first) == runs.before
    for name in runs.made:
        lines = log_of(runs.again / f'{name} config')
        assert len(lines) == len(log_of(runs.first / name)) > 0
        assert 'resumed' not in (runs.again / f'{name} config.{int(name in ("detection", "segmentation"))}.txt').read_text()


def test_another_number_of_processes_is_noted(runs):
    """A run on other than the file's number of processes is another run: one line says so, and none where it is the same."""
    noted = {path.name: re.findall('^note: (.*) is of a run on (.*) processes$', path.read_text(), re.M)
             for path in runs.again.glob('*.txt')}
    assert noted.pop('alone.0.txt') == [(str(runs.first / 'two/args.json'), '2')]
    assert noted.pop('both.0.txt') == [(str(runs.first / 'feature/args.json'), '1')]
    assert 'both.1.txt' in noted and len(noted) > 20 and not any(noted.values())
    assert checkpoint_of(runs.again / 'output_dir')['args']['world_size'] == 1
    assert checkpoint_of(runs.again / 'both')['args']['world_size'] == 2


# ------------------------------------------------------------------------------------------------------ carried values


def legal_values(action):
    """Values that a flag may have, odd ones among them: (words, value)."""
    flag, many = f'--{action.dest}', {'+': (1, 3), 2: (2,), None: ()}
    if isinstance(action, argparse.BooleanOptionalAction):
        return [([flag], True), ([f'--no-{action.dest}'], False)]
    if action.nargs == 0:
        return [([flag], True)]
    if action.choices:
        return [([flag, choice], choice) for choice in action.choices]
    values = {int: [0, 1, 7, -3], float: [0.0, 1.0, 2.5e-06, 0.1 + 0.2, 1e22, -0.5, float('inf')],
              None: ['', 'a b', ' x', '-x', '--eval', 'x=y', '0', 'None', 'true', 'ä\'"\\\n']}[action.type]
    if action.nargs is None:
        return [([f'{flag}={value}'], value) for value in [*values, *([action.default] if action.default else [])]]
    return [([flag, *map(str, row)], list(row)) for n in many[action.nargs] for row in itertools.combinations(values, n)]


def table(script):
    return {action.dest: legal_values(action) for action in script.get_args_parser()._actions
            if action.dest not in ('help', 'config', 'output_dir', 'resume', 'results_json')}


EVERY = pytest.mark.parametrize('script', SCRIPTS.values(), ids=SCRIPTS)


def assert_equal_values(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {'config'}:
        assert ours[name] == theirs[name] and type(ours[name]) is type(theirs[name]), name


@EVERY
def test_every_flag_and_value_comes_back_from_args_json(script, monkeypatch, tmp_path):
    """The help of --config: what one run was given, the next one gets, whatever it is: each value, then 25 mixtures."""
    rng, flags = random.Random(0), table(script)
    parser = script.get_args_parser()
    for dest, rows in flags.items():
        assert any(value != parser.get_default(dest) for _, value in rows), dest
    choices = [{dest: row} for dest, rows in flags.items() for row in rows]
    choices += [{dest: rng.choice(rows) for dest, rows in flags.items() if rng.random() < 0.7} for _ in range(25)]
    for choice in choices:
        given = vars(parser.parse_args([word for words, _ in choice.values() for word in words]))
        for dest, (_, value) in choice.items():
            assert given[dest] == value
        config = write_config(tmp_path, script, **{key: given[key] for key in given if key != 'output_dir'})
        back = parsed(monkeypatch, script, '--config', config)
        assert_equal_values(back, given)
        assert back['config'] == str(config)


@EVERY
def test_a_flag_by_hand_wins_over_the_file_whatever_both_say(script, monkeypatch, tmp_path):
    """The help of --config: the file's value, where no flag gives another; one that is the default's counts as given."""
    tried = 0
    for dest, rows in table(script).items():
        rows = rows if len(rows) < 4 else [*random.Random(0).sample(rows[:-1], 2), rows[-1]]  # the last is the default
        for place, (_, stored) in enumerate(rows):
            config = write_config(tmp_path, script, **{dest: stored})
            for words, value in rows[:place] + rows[place + 1:]:
                for order in (['--config', config, *words], [*words, f'--config={config}']):
                    assert parsed(monkeypatch, script, *order)[dest] == value, dest
                    tried += 1
    assert tried > 200


@EVERY
def test_neither_place_nor_origin_of_the_other_run_is_carried(script, monkeypatch, tmp_path):
    """--config: the other run's folder, checkpoint and files stay its own."""
    parser = script.get_args_parser()
    own = {name: 'theirs' for name in ('output_dir', 'resume', 'config', 'results_json')
           if name in {action.dest for action in parser._actions}}
    config = write_config(tmp_path, script)
    config.write_text(json.dumps({**json.loads(config.read_text()), **own, 'rank': 1, 'local_rank': 1, 'distributed': True}))
    back = parsed(monkeypatch, script, '--config', config)
    assert_equal_values(back, vars(parser.parse_args([])))
    assert not (PROVENANCE | PROCESS) & back.keys()
    assert parsed(monkeypatch, script, '--config', config, '--output_dir', 'mine')['output_dir'] == 'mine'


@EVERY
def test_without_a_config_the_command_line_is_all(script, monkeypatch):
    """No file of a folder is read unless --config names it."""
    words = ('--data_path', 'x', '--seed', '4')
    assert parsed(monkeypatch, script, *words) == vars(script.get_args_parser().parse_args(words))


@pytest.mark.parametrize('script', [GENERIC, CLS], ids=['stage 1', 'classification'])
def test_a_rate_per_256_images_by_hand_wins_over_the_rate_that_followed_from_the_files(script, tmp_path, monkeypatch):
    """The help of --blr and --config: the file's --lr, which overrides --blr, was worked out from the file's --blr."""
    config = write_config(tmp_path, script, blr=1e-3, lr=1e-3 * 8 / 256, batch_size=8)
    for words, lr in (((), 1e-3 * 8 / 256), (('--blr', '2e-3'), None), (('--blr=2e-3',), None),
                      (('--blr', '2e-3', '--lr', '3e-4'), 3e-4)):
        back = parsed(monkeypatch, script, '--config', config, *words)
        assert (back['lr'], back['blr']) == (lr, 2e-3 if words else 1e-3)


def test_a_data_path_by_hand_wins_over_the_files_paths_below_it(monkeypatch, tmp_path):
    """The help of --train_images and the like: in place of the folders of --data_path; a run stores both."""
    args = DET.get_args_parser().parse_args(['--data_path', 'old', '--val_images', 'elsewhere'])
    args.eval, args.input_size = False, [64, 64]
    DET.resolve_recipe(args)
    assert args.train_images == 'old/train2017'
    config = write_config(tmp_path, DET, **{key: value for key, value in vars(args).items() if key != 'output_dir'})
    kept = parsed(monkeypatch, DET, '--config', config)
    assert [kept[name] for name in ('data_path', 'train_images', 'val_images')] == ['old', 'old/train2017', 'elsewhere']
    for words in (['--data_path', 'new'], ['--data_path=new']):
        args = argparse.Namespace(**parsed(monkeypatch, DET, '--config', config, *words))
        DET.resolve_recipe(args)
        assert [args.train_annotations, args.train_images, args.val_annotations, args.val_images] == [
            'new/annotations/instances_train2017.json', 'new/train2017', 'new/annotations/instances_val2017.json',
            'elsewhere']
    config = write_config(tmp_path, DET, data_path=None, train_images='x')
    assert parsed(monkeypatch, DET, '--config', config, '--data_path', 'new')['train_images'] == 'x'


BAD_CONFIGS = {
    'absent': (None, 'No such file'),
    'a folder': ('folder', 'directory'),
    'no JSON': (b'{"script": "generic_distill.py"', 'Expecting'),
    'a checkpoint': (b'PK\x03\x04' + bytes(range(256)) * 400, "can't decode"),
    'a list': (b'["generic_distill.py", 1]', 'is no args.json'),
    'a number': (b'3', 'is no args.json'),
    'nothing': (b'null', 'is no args.json'),
    'without a script': (b'{"world_size": 1, "target": "pixel"}', 'script'),
    'without a number of processes': (b'{"script": "generic_distill.py", "target": "pixel"}', 'world_size'),
    'another script': (b'{"script": "specific_distill_cls.py", "world_size": 1, "seed": 1, "mixup": 0.8}',
                       'is of specific_distill_cls.py: generic_distill.py has no --mixup'),
}


@pytest.mark.parametrize('name', BAD_CONFIGS)
def test_a_config_that_is_not_this_scripts_is_one_line_and_nothing_is_written(name, data, tmp_path, monkeypatch, capsys):
    """Style: what a user gets wrong is one line and an error status; --config takes the args.json of the same script."""
    content, said = BAD_CONFIGS[name]
    config = tmp_path / 'args.json'
    if content == 'folder':
        config.mkdir()
    elif content is not None:
        config.write_bytes(content)
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    code = as_script(monkeypatch, *command(GENERIC, data, 'out', *PIXEL, '--config', config))
    assert isinstance(code, str)  # which Python prints, to end with status 1
    assert len(code.splitlines()) == 1 and len(code) < 400
    assert code.startswith(f'error: --config {config} ') and said in code
    assert capsys.readouterr().out == ''
    assert contents(tmp_path) == before and not (tmp_path / 'out').exists() and not (tmp_path / 'output_dir').exists()


# --------------------------------------------------------------------------------------------------------------- origin


def test_args_json_says_where_a_run_comes_from(runs):
    """Style: script, commit, versions and hardware, in args.json and in the checkpoint; all flags beside them."""
    versions = f'torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}'
    for name, (script, *_) in runs.made.items():
        stored = json.loads((runs.first / name / 'args.json').read_text())
        assert stored == checkpoint_of(runs.first / name)['args']
        assert (stored['script'], stored['versions']) == (Path(script.__file__).name, versions)
        assert stored['hardware'] == ('2 x cpu' if name == 'two' else '1 x cpu')
        flags = {action.dest for action in script.get_args_parser()._actions} - {'help'}
        assert stored.keys() == flags | PROVENANCE | PROCESS
        printed = (runs.first / f'{name}.{int(script in (DET, SEG))}.txt').read_text()
        assert f'\ncommit {stored["commit"]}, {versions}, {stored["hardware"]}, amp ' in printed


def test_the_commit_is_that_of_the_scripts_and_a_resume_says_where_it_changed(data, tmp_path, monkeypatch, capsys):
    """Style: sha and whether the tree is dirty; a resume prints what differs, another commit, too."""
    if not shutil.which('git'):
        pytest.skip('there is no git')
    for name in [name for name in os.environ if name.startswith('GIT_')]:
        monkeypatch.delenv(name)
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path))
    folder = tmp_path / 'forked'
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    script = Path(shutil.copy(GENERIC.__file__, folder))

    def git(*words):
        settings = itertools.chain(*(('-c', setting) for setting in (
            'user.name=x', 'user.email=x@x', 'commit.gpgsign=false', f'core.hooksPath={tmp_path}')))
        done = subprocess.run(['git', *settings, *words], cwd=folder, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def commit_of(out, *more):
        words = command(GENERIC, data, tmp_path / out, *PIXEL, *more)[1:]
        assert as_script(monkeypatch, script, *words) is None
        return json.loads((tmp_path / out / 'args.json').read_text())['commit']

    assert commit_of('none') == 'unknown'
    git('init', '-q')
    git('add', script.name)
    git('commit', '-q', '-m', '1')
    one = git('rev-parse', '--short', 'HEAD')
    assert re.fullmatch('[0-9a-f]{4,}', one)
    assert commit_of('run', '--save_every', 1) == one
    script.write_text(script.read_text() + '# changed\n')
    assert commit_of('changed') == f'{one} with changes'
    git('commit', '-q', '-a', '-m', '2')
    two = git('rev-parse', '--short', 'HEAD')
    capsys.readouterr()
    resumed = tmp_path / 'run/checkpoint-0.pth'
    assert commit_of('resumed', '--resume', resumed, '--save_every', 1) == two
    assert f'\nresumed {resumed} after epoch 1; commit is {two}, was {one}\n' in capsys.readouterr().out
    resumed = tmp_path / 'resumed/checkpoint.pth'  # of this commit, of which there is nothing to say
    assert checkpoint_of(tmp_path / 'resumed')['args']['commit'] == two
    words = command(GENERIC, data, tmp_path / 'again', *PIXEL, '--resume', resumed, '--save_every', 1)[1:]
    assert as_script(monkeypatch, script, *words) is None and not (tmp_path / 'again').exists()  # nothing was left to do
    assert f'\nresumed {resumed} after epoch 2\n' in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- best constant


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def normalised(rows, unbiased):
    """Rows (T, D) in float64 brought to mean 0 and variance 1."""
    rows = rows.double()
    return (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, keepdim=True, unbiased=unbiased) + 1e-6).sqrt()


def by_bisection(smooth, square=None):
    """The least mean of smooth-L1 (beta 2) to rows (T, D), plus mean squares to others: each channel has its own root."""
    both = smooth if square is None else torch.cat([smooth, square])
    low, high = both.min(0).values, both.max(0).values
    for _ in range(100):
        middle = (low + high) / 2
        slope = ((middle - smooth) / 2).clamp(-1, 1).mean(0)
        slope += 0 if square is None else 2 * (middle - square).mean(0)
        low, high = torch.where(slope < 0, middle, low), torch.where(slope < 0, high, middle)
    distance = (middle - smooth).abs()
    loss = torch.where(distance < 2, distance ** 2 / 4, distance - 1).mean()
    return (loss + (0 if square is None else (middle - square).square().mean())).item()


def by_variance(rows):
    """The least mean square to rows (T, D): their variance."""
    return rows.var(0, unbiased=False).mean().item()


def constant_args(target, supervise='all', norm_pix_loss=True):
    return argparse.Namespace(target=target, supervise=supervise, norm_pix_loss=norm_pix_loss)


def case(kind, scale, norm_pix_loss, seed):
    """(targets, masking, args, the rows that count, the least loss); heavy tails reach both branches of smooth-L1."""
    masking = models.random_masking(torch.rand(3, 16, generator=torch.Generator().manual_seed(seed)), 0.6)
    hidden = masking.mask == 1
    args = constant_args(kind.split()[0], 'masked' if 'masked' in kind else 'all', norm_pix_loss)
    wide = scale * (randn(3, 17, 12, seed=seed + 1) ** 3 + randn(12, seed=seed + 2))
    pixels = scale * randn(3, 16, 12, seed=seed + 3) + 2 * randn(12, seed=seed + 4)
    true = normalised(pixels[hidden], True) if norm_pix_loss else pixels[hidden].double()
    if args.target == 'feature':
        rows = normalised((wide[:, 1:][hidden] if 'masked' in kind else wide.flatten(0, 1)), False)
        return {'feature': wide}, masking, args, rows, by_bisection(rows)
    if args.target == 'pixel':
        return {'pixel': pixels}, masking, args, true, by_variance(true)
    wide = wide[:, 1:]
    rows = wide[hidden].double()
    if args.target == 'recon':
        return {'recon': wide}, masking, args, rows, by_bisection(rows)
    return {'recon': wide, 'pixel': pixels}, masking, args, torch.cat([rows, true]), by_bisection(rows, true)


KINDS = ('feature', 'feature masked', 'recon', 'recon_gt', 'pixel')


@pytest.mark.parametrize('norm_pix_loss', [True, False])
@pytest.mark.parametrize('scale', [0.3, 1, 4])
@pytest.mark.parametrize('kind', KINDS)
def test_best_constant_loss_is_the_least_that_one_vector_reaches(kind, scale, norm_pix_loss):
    """README, warning of stage 1: the constant is the best one: variance of hidden pixels, or the root of the slope."""
    for seed in (10, 20):
        targets, masking, args, _, least = case(kind, scale, norm_pix_loss, seed)
        loss = generic_distill.best_constant_loss(targets, masking, args)
        assert loss.shape == () and not loss.requires_grad
        assert loss.item() == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_no_constant_prediction_has_a_lower_loss(kind):
    """The same, by the losses that train: zeros, mean, median and what lies around the best do no better."""
    targets, masking, args, rows, least = case(kind, 1, True, 30)
    loss = generic_distill.best_constant_loss(targets, masking, args).item()
    shape = next(iter(targets.values())).shape
    tried = [torch.zeros(12), torch.ones(12), rows.mean(0), rows.median(0).values, *rows[:20],
             *(rows.mean(0) + 0.1 * randn(12, seed=seed) for seed in range(20))]
    losses = [sum(generic_distill.compare(vector.float().expand(shape), targets, masking, args).values()).item()
              for vector in tried]
    assert loss <= min(losses) * (1 + 1e-6) and max(losses) > 1.1 * loss
    assert least == pytest.approx(loss, rel=1e-5)


def hidden_rows(images, masking):
    """The patches of 8 x 8 pixels behind the mask, cut out one by one: (T, 3 * 64)."""
    height, width = (side // 8 for side in images.shape[2:])
    return torch.stack([images[n, :, 8 * y:8 * y + 8, 8 * x:8 * x + 8].flatten() for n in range(len(images))
                        for y in range(height) for x in range(width) if masking.mask[n, y * width + x] == 1])


def first_batches(args, rank, world_size, epoch, count=4):
    """The images and masks that a process trains on in the first steps of an epoch."""
    args = argparse.Namespace(**{**vars(args), 'rank': rank, 'world_size': world_size})
    loader = GENERIC.build_data(args, args.input_size[0] * args.input_size[1] // 64)
    loader.sampler.epoch = epoch
    for (images, noise), _, _ in itertools.islice(loader, count):
        yield models.normalise(images.flatten(0, 1)), models.random_masking(noise.flatten(0, 1), args.mask_ratio)


@pytest.mark.parametrize('name', ['two', 'pixel', 'feature'])
def test_logged_constant_is_the_mean_over_four_steps_of_every_process(name, runs):
    """README, log: constant_loss, measured on the first 4 steps of an epoch by all processes."""
    args = argparse.Namespace(**json.loads((runs.first / name / 'args.json').read_text()))
    lines = log_of(runs.first / name)
    assert len(lines) == 2
    if name == 'feature':
        teacher = models.create_mae(args.teacher_model, args.input_size).eval()
        teacher.load_state_dict(checkpoint_of(runs.first / 'two')['model'])
    for line in lines:
        expected = []
        for rank in range(args.world_size):
            for images, masking in first_batches(args, rank, args.world_size, line['epoch']):
                if name == 'feature':
                    with torch.no_grad():
                        features = teacher.decoder_features(images, masking, 2)[:, 1:][masking.mask == 1]
                    expected.append(by_bisection(normalised(features, False)))
                else:
                    rows = hidden_rows(images, masking)
                    expected.append(by_variance(normalised(rows, True) if args.norm_pix_loss else rows.double()))
        assert len(expected) == 4 * args.world_size
        assert line['constant_loss'] == pytest.approx(np.mean(expected), rel=1e-5)
        assert np.std(expected) > 1e-3 * np.mean(expected)  # other steps or processes have another mean


# ------------------------------------------------------------------------------------------------------------- warning


@pytest.fixture(scope='module')
def plain_colours(tmp_path_factory):
    """Pictures of one colour each: a visible patch tells the hidden ones."""
    folder = tmp_path_factory.mktemp('plain') / 'imagenet'
    folder.mkdir()
    for i, colour in enumerate(np.random.default_rng(0).integers(0, 256, (48, 3), dtype=np.uint8)):
        Image.fromarray(np.tile(colour, (16, 16, 1))).save(folder / f'{i:02}.png')
    return folder.parent


def warnings_of(printed):
    """The warnings of a run, each with the epochs whose lines stand before it."""
    found, epochs = [], []
    for line in printed.splitlines():
        epochs += re.findall('^epoch ([0-9]+)/', line)
        if line.startswith(WARNING):
            found.append((line, max(map(int, epochs), default=0)))
    return found


@pytest.mark.parametrize(('warmup', 'epochs'), [(0, 2), (1, 3), (2, 3)])
def test_a_student_that_does_not_learn_is_warned_of_once_after_the_epoch_that_follows_warm_up(
        warmup, epochs, runs, data, tmp_path, capsys):
    """README, warning of stage 1: once, with both losses; constant_loss is in the log up to there and no further."""
    run(GENERIC, data, tmp_path, '--teacher_path', runs.first / 'two/checkpoint.pth', '--lr', 0, '--epochs', epochs,
        '--warmup_epochs', warmup)
    lines = log_of(tmp_path)
    assert ['constant_loss' in line for line in lines] == [epoch <= warmup for epoch in range(epochs)]
    [(warning, after)] = warnings_of(capsys.readouterr().out)
    assert after == warmup + 1
    last = lines[warmup]
    assert last['train_loss'] > 0.8 * last['constant_loss']
    assert f'{WARNING}, {last["train_loss"]:.4f}, ' in warning and f' 0.8 x {last["constant_loss"]:.4f}, ' in warning


def test_two_processes_warn_once(runs):
    """README, warning of stage 1: it is printed by the first process."""
    last = log_of(runs.again / 'both')[1]
    assert last['train_loss'] > 0.8 * last['constant_loss']
    assert [len(warnings_of((runs.again / f'both.{rank}.txt').read_text())) for rank in (0, 1)] == [1, 0]


@pytest.mark.parametrize('target', ['pixel', 'recon_gt'])
def test_a_run_on_true_pixels_is_not_warned_of(target, runs, data, tmp_path, capsys):
    """README, warning of stage 1: a sound run on small images may stay near the constant; its log tells both losses."""
    teacher = ('--teacher_path', runs.first / 'two/checkpoint.pth') if target == 'recon_gt' else ()
    run(GENERIC, data, tmp_path, '--target', target, *teacher, '--lr', 0, '--epochs', 2, '--warmup_epochs', 0)
    last = log_of(tmp_path)[0]
    assert last['train_loss'] > 0.8 * last['constant_loss']
    assert not warnings_of(capsys.readouterr().out)


@pytest.mark.parametrize('target', ['feature', 'recon'])
def test_a_student_that_learns_is_not_warned_of(target, runs, plain_colours, tmp_path, capsys):
    """README, warning of stage 1: a run that learns, even if it begins above the constant, is left in peace."""
    run(GENERIC, plain_colours, tmp_path, '--target', target, '--teacher_path', runs.first / 'two/checkpoint.pth',
        '--mask_ratio', 0.5, '--lr', 1e-2, '--epochs', 9, '--warmup_epochs', 7)
    lines = log_of(tmp_path)
    assert lines[0]['train_loss'] > lines[0]['constant_loss'] > 0
    assert lines[7]['train_loss'] < 0.8 * lines[7]['constant_loss']
    assert warnings_of(capsys.readouterr().out) == []


@pytest.mark.parametrize('share', [0.799, 0.801])
def test_the_warning_begins_above_four_fifths_of_the_constant(share, runs, data, tmp_path, monkeypatch, capsys):
    """README, warning of stage 1: the mean loss of the epoch against 0.8 x the constant, measured in that epoch."""
    script, *flags = runs.made['feature']
    loss = log_of(runs.first / 'feature')[1]['train_loss']
    monkeypatch.setattr(GENERIC, 'best_constant_loss', lambda *_: torch.tensor(loss / share))
    run(script, data, tmp_path, *flags)
    lines = log_of(tmp_path)
    assert lines[1]['train_loss'] == loss and lines[1]['constant_loss'] == pytest.approx(loss / share, rel=1e-6)
    assert len(warnings_of(capsys.readouterr().out)) == (share > 0.8)


def test_a_resumed_run_measures_the_same_constants(runs, data, tmp_path, capsys):
    """README, randomness: a resume within warm-up is exact in this, too, and warns where the whole run does."""
    flags = ('--teacher_path', runs.first / 'two/checkpoint.pth', '--epochs', 4, '--warmup_epochs', 2, '--lr', 1e-4)
    run(GENERIC, data, tmp_path / 'whole', *flags, '--save_every', 1)
    whole = warnings_of(capsys.readouterr().out)
    run(GENERIC, data, tmp_path / 'resumed', *flags, '--resume', tmp_path / 'whole/checkpoint-0.pth')
    resumed = warnings_of(capsys.readouterr().out)
    assert len(whole) == 1 and resumed == whole
    lines = log_of(tmp_path / 'whole')
    assert len({line['constant_loss'] for line in lines[:3]}) == 3
    assert without_clock(log_of(tmp_path / 'resumed')) == without_clock(lines[1:])


@pytest.mark.parametrize('target', ['feature', 'recon_gt'])
def test_measuring_the_constant_changes_no_weight(target, runs, data, tmp_path, monkeypatch):
    """README: the measurement looks on: whether it is made, and on how many steps, the run ends with the same bits."""
    flags = ('--target', target, '--teacher_path', runs.first / 'two/checkpoint.pth', '--accum_iter', 3, '--batch_size', 4,
             '--epochs', 3, '--clip_grad', 0.5)
    run(GENERIC, data, tmp_path / 'measured', *flags)
    calls = []
    monkeypatch.setattr(GENERIC, 'best_constant_loss', lambda *_: calls.append(1) or torch.tensor(1.5))
    monkeypatch.setattr(GENERIC, 'CONSTANT_STEPS', 1)
    run(GENERIC, data, tmp_path / 'looked away', *flags)
    assert len(calls) == 2
    lines = [log_of(tmp_path / name) for name in ('measured', 'looked away')]
    assert [line.pop('constant_loss') for line in lines[1][:2]] == [1.5, 1.5]
    assert all(line.pop('constant_loss') != 1.5 for line in lines[0][:2])
    assert without_clock(lines[0]) == without_clock(lines[1])
    assert_same_bits(checkpoint_of(tmp_path / 'measured'), checkpoint_of(tmp_path / 'looked away'))
