"""The training scripts as a user meets them: what they refuse, what they write, how they resume, how the stages chain.

Most cases call `main` in this process on drawn 16-pixel images; processes are started where a process is the claim.
"""
import collections
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from conftest import assert_same_bits, checkpoint_of, contents, environment, leaves, log_of, without_clock
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

import generic_distill
import models
import specific_distill_cls

ROOT = Path(__file__).resolve().parents[1]
GENERIC, CLS = generic_distill, specific_distill_cls
CLASSES = ('ant', 'bee', 'cat')
TINY = ('--input_size', '16', '--batch_size', '8', '--accum_iter', '1', '--epochs', '2', '--warmup_epochs', '1',
        '--num_workers', '0', '--device', 'cpu')
MODEL = {GENERIC: ('--model', 'mae_vit_pico_patch8', '--teacher_model', 'mae_vit_pico_patch8', '--target_layer', '2'),
         CLS: ('--model', 'vit_pico_patch8', '--teacher_model', 'vit_pico_patch8')}
BOTH = pytest.mark.parametrize('script', [GENERIC, CLS], ids=['stage 1', 'classification'])


# ------------------------------------------------------------------------------------------------------------- helpers


def draw(path, colour=(90, 120, 150), seed=0):
    pixels = np.random.default_rng(seed).normal(colour, 40, (16, 16, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def draw_classes(folder, classes, counts):
    for label, (name, count) in enumerate(zip(classes, counts, strict=True)):
        for i in range(count):
            draw(folder / name / f'{i:02}.png', (60 + 70 * label, 120, 200 - 60 * label), seed=100 * label + i)


def command(script, out, *flags):
    return [str(flag) for flag in ('--output_dir', out, *TINY, *MODEL[script], *flags)]


def parse(script, out, *flags):
    return script.get_args_parser().parse_args(command(script, out, *flags))


def run(script, out, *flags):
    return script.main(parse(script, out, *flags))


def start(script, out, *flags):
    """The script in a process of its own, from another folder than the repository's."""
    out.parent.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen([sys.executable, script.__file__, *command(script, out, *flags)], cwd=out.parent,
                            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)


def largest_difference(left, right):
    return max((left[name] - right[name]).abs().max().item() for name in left)


# ------------------------------------------------------------------------------------------------------------ fixtures


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """3 classes, 48 images in train/ and 10 in val/."""
    folder = tmp_path_factory.mktemp('data')
    draw_classes(folder / 'train', CLASSES, (16, 16, 16))
    draw_classes(folder / 'val', CLASSES, (4, 3, 3))
    return folder


@pytest.fixture(scope='session')
def chain(data, tmp_path_factory):
    """The output folder of every kind of run, each made from the checkpoints of those before it."""
    folder = tmp_path_factory.mktemp('chain')
    weights = {name: folder / name / 'checkpoint.pth' for name in ('mae', 'teacher', 'feature')}
    runs = {
        'mae': (GENERIC, '--target', 'pixel'),
        'teacher': (CLS, '--finetune', weights['mae']),
        'feature': (GENERIC, '--teacher_path', weights['mae']),
        'masked': (GENERIC, '--teacher_path', weights['mae'], '--supervise', 'masked'),
        'recon': (GENERIC, '--teacher_path', weights['mae'], '--target', 'recon'),
        'recon_gt': (GENERIC, '--teacher_path', weights['mae'], '--target', 'recon_gt'),
        'g2sd': (CLS, '--finetune', weights['feature'], '--teacher_path', weights['teacher']),
        'soft': (CLS, '--finetune', weights['feature'], '--teacher_path', weights['teacher'],
                 '--distillation_type', 'soft', '--distillation_tau', '2'),
        'no teacher': (CLS, '--finetune', weights['feature'], '--teacher_path', weights['teacher'],
                       '--distillation_type', 'none'),
        'deit': (CLS,),
        'deit distilled': (CLS, '--teacher_path', weights['teacher']),
    }
    for name, (script, *flags) in runs.items():
        run(script, folder / name, '--data_path', data, '--lr', '1e-3', *flags)
    return folder


@pytest.fixture(scope='session')
def inputs(data, chain, tmp_path_factory):
    """What goes wrong for users: broken and mismatched data sets and checkpoints."""
    folder = tmp_path_factory.mktemp('inputs')
    whole = checkpoint_of(chain / 'mae')['model']
    torch.save({'model': {k: v for k, v in whole.items() if not k.startswith(('decoder', 'mask_token'))}},
               folder / 'encoder.pth')
    (folder / 'truncated.pth').write_bytes((chain / 'mae/checkpoint.pth').read_bytes()[:-5000])

    class Mischief:
        def __reduce__(self):
            return os.mkdir, (str(folder / 'mischief'),)

    torch.save({'model': {'cls_token': Mischief()}}, folder / 'mischief.pth')
    torch.save(checkpoint_of(chain / 'teacher')['model'], folder / 'bare_teacher.pth')
    for name, classes, val_classes in (('renamed', ('ant', 'bee', 'dog'), ('ant', 'bee', 'dog')),
                                       ('fewer', CLASSES[:2], CLASSES[:2]), ('unequal', CLASSES, ('ant', 'bee', 'dog'))):
        draw_classes(folder / name / 'train', classes, [8] * len(classes))
        draw_classes(folder / name / 'val', val_classes, [1] * len(classes))
    for name in ('empty/train', 'empty/val', 'hollow/train/ant', 'hollow/val/ant'):
        (folder / name).mkdir(parents=True)
    return SimpleNamespace(folder=folder, data=data, chain=chain, mae=chain / 'mae/checkpoint.pth',
                           teacher=chain / 'teacher/checkpoint.pth')


# ---------------------------------------------------------------------------------------------------------------- help


@BOTH
def test_help_shows_the_real_defaults(script, monkeypatch, capsys):
    """Style: help prints the default that the code has."""
    monkeypatch.setenv('COLUMNS', '10000')
    parser = script.get_args_parser()
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(['--help'])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    shown = [action for action in parser._actions if action.dest != 'help']
    assert len(shown) > 20
    for action in shown:
        text = action.help.replace('%%', '%').split(' (default')[0]  # some versions of argparse add it to a switch's help
        line = next(line for line in printed.splitlines() if text in line)
        assert f'(default: {action.default})' in line, action.dest


# -------------------------------------------------------------------------------------------------------------- errors

ERRORS = {
    # what a user gets wrong: (script, flags, what the line must say)
    'teacher without a decoder': (GENERIC, lambda i: ('--teacher_path', i.folder / 'encoder.pth'),
                                  r'encoder\.pth has no decoder .*mae_pretrain_vit_base_full\.pth'),
    'no teacher in stage 1': (GENERIC, lambda i: (), r'--teacher_path is missing.*mae_pretrain_vit_base_full\.pth'),
    'teacher of another width': (
        GENERIC, lambda i: ('--teacher_path', i.mae, '--teacher_model', 'mae_vit_nano_patch8'), 'this architecture'),
    'teacher of another patch size': (
        GENERIC, lambda i: ('--teacher_path', i.mae, '--teacher_model', 'mae_vit_pico_patch4'), 'patch size'),
    'teacher file absent': (GENERIC, lambda i: ('--teacher_path', i.folder / 'absent.pth'), 'no checkpoint file'),
    'truncated teacher': (GENERIC, lambda i: ('--teacher_path', i.folder / 'truncated.pth'), 'no whole checkpoint'),
    'pickle as teacher': (GENERIC, lambda i: ('--teacher_path', i.folder / 'mischief.pth'), r'refused: .*mkdir'),
    'student as teacher': (GENERIC, lambda i: ('--teacher_path', i.chain / 'feature/checkpoint.pth'), 'this architecture'),
    'target layer too deep': (GENERIC, lambda i: ('--teacher_path', i.mae, '--target_layer', 3), 'blocks 1 to 2'),
    'target layer 0': (GENERIC, lambda i: ('--teacher_path', i.mae, '--target_layer', 0), 'blocks 1 to 2'),
    'nothing hidden': (GENERIC, lambda i: ('--target', 'pixel', '--mask_ratio', 0), '--mask_ratio 0'),
    'everything hidden': (GENERIC, lambda i: ('--target', 'pixel', '--mask_ratio', 1), '--mask_ratio 1'),
    'encoder as student': (GENERIC, lambda i: ('--target', 'pixel', '--model', 'vit_pico_patch8'), 'mae_vit_pico_patch8'),
    'pixels and a teacher': (GENERIC, lambda i: ('--target', 'pixel', '--teacher_path', i.mae), 'leave --teacher_path out'),
    'unknown augmentation': (CLS, lambda i: ('--aa', 'strange'), '--aa strange'),
    'class token from a pooled network': (
        CLS, lambda i: ('--finetune', i.teacher, '--no-global_pool'), 'give --global_pool'),
    'unknown model': (GENERIC, lambda i: ('--target', 'pixel', '--model', 'resnet50'), "unknown model name 'resnet50'"),
    'autoencoder as classifier': (CLS, lambda i: ('--model', 'mae_vit_pico_patch8'), 'vit_pico_patch8'),
    'start weights of another width': (
        CLS, lambda i: ('--finetune', i.mae, '--model', 'vit_nano_patch8'), 'another architecture'),
    'truncated start weights': (CLS, lambda i: ('--finetune', i.folder / 'truncated.pth'), 'no whole checkpoint'),
    'pickle as start weights': (CLS, lambda i: ('--finetune', i.folder / 'mischief.pth'), r'refused: .*mkdir'),
    'teacher without a head': (CLS, lambda i: ('--teacher_path', i.mae), r'no classification head'),
    'teacher of other classes': (
        CLS, lambda i: ('--teacher_path', i.teacher, '--data_path', i.folder / 'renamed'), "other classes .*'cat' is 'dog'"),
    'teacher of more classes': (
        CLS, lambda i: ('--teacher_path', i.folder / 'bare_teacher.pth', '--data_path', i.folder / 'fewer'),
        'tells 3 classes apart, --data_path has 2'),
    'teacher and global pooling': (CLS, lambda i: ('--teacher_path', i.teacher, '--global_pool'), 'exclude each other'),
    'train and val of other classes': (CLS, lambda i: ('--data_path', i.folder / 'unequal'), "different classes.*'cat'"),
    'odd batch with mixup': (CLS, lambda i: ('--batch_size', 7), 'mixup and cutmix pair images'),
    'evaluation of nothing': (CLS, lambda i: ('--eval',), '--eval needs --resume'),
    'evaluation of an absent file': (CLS, lambda i: ('--eval', '--resume', 'auto'), 'no checkpoint file'),
    'evaluation of an autoencoder': (CLS, lambda i: ('--eval', '--resume', i.mae), 'no classification head'),
    'evaluation on other classes': (
        CLS, lambda i: ('--eval', '--resume', i.teacher, '--data_path', i.folder / 'renamed'), "other classes .*'cat'"),
    'evaluation on fewer classes': (
        CLS, lambda i: ('--eval', '--resume', i.teacher, '--data_path', i.folder / 'fewer'), 'other classes .3 there, 2'),
    'evaluation every 0 epochs': (CLS, lambda i: ('--eval_every', 0), '--eval_every'),
    'resume of another stage': (CLS, lambda i: ('--resume', i.mae), 'this architecture'),
    'resume on other classes': (
        CLS, lambda i: ('--resume', i.chain / 'deit/checkpoint.pth', '--data_path', i.folder / 'renamed'), 'other classes'),
    'resume with other optimizer groups': (
        GENERIC, lambda i: ('--target', 'pixel', '--resume', i.mae, '--weight_decay', 0), 'optimizer has other groups'),
}
for _script, _name in ((GENERIC, 'stage 1'), (CLS, 'classification')):
    _pixel = ('--target', 'pixel') if _script is GENERIC else ()
    ERRORS |= {f'{_name}: {what}': (_script, lambda i, flags=flags, pixel=_pixel: (*pixel, *flags(i)), message)
               for what, flags, message in (
        ('no data path', lambda i: ('--data_path', ''), '--data_path is missing'),
        ('absent data path', lambda i: ('--data_path', i.folder / 'absent'), r'--data_path: there is no folder .*absent'),
        ('empty data path', lambda i: ('--data_path', i.folder / 'empty'), '--data_path.*empty'),
        ('class folder without images', lambda i: ('--data_path', i.folder / 'hollow'), '--data_path.*hollow'),
        ('CIFAR absent', lambda i: ('--data_set', 'CIFAR10'), 'does not hold CIFAR10.*download=True'),
        ('fewer images than a batch', lambda i: ('--batch_size', 64), r'48 images, fewer than one batch of 64'),
        ('fewer images than an update', lambda i: ('--accum_iter', 8), r'48 images, fewer than one batch of 64'),
        ('size and patch', lambda i: ('--input_size', 20), '20x20 is not divisible by the patch size 8'),
        ('three sizes', lambda i: ('--input_size', 16, 16, 16), '--input_size takes'),
        ('only warm-up', lambda i: ('--warmup_epochs', 2), '--warmup_epochs 2 must be .* below --epochs 2'),
        ('fp16 without a GPU', lambda i: ('--amp', 'fp16'), '--amp fp16 needs a GPU'),
        ('no images in a batch', lambda i: ('--batch_size', 0), '--batch_size must be at least 1'),
        ('negative workers', lambda i: ('--num_workers', -1), '--num_workers must not be negative'),
        ('resume of an absent file', lambda i: ('--resume', i.folder / 'absent.pth'), 'no checkpoint file'),
        ('resume of bare weights', lambda i: ('--resume', i.folder / 'bare_teacher.pth'), 'cannot be resumed'),
        ('resume of a truncated file', lambda i: ('--resume', i.folder / 'truncated.pth'), 'no whole checkpoint'),
        ('resume of a pickle', lambda i: ('--resume', i.folder / 'mischief.pth'), r'refused: .*mkdir'),
    )}


@pytest.mark.parametrize('case', ERRORS)
def test_a_wrong_input_is_refused_in_one_line_before_training(case, inputs, tmp_path, monkeypatch):
    """README: what cannot work is said in one line before any training, and nothing is written."""
    script, flags, message = ERRORS[case]
    monkeypatch.setattr(script, 'train_one_epoch', lambda *_: pytest.fail('training began'))
    with pytest.raises(models.InputError, match=message) as error:
        run(script, tmp_path / 'out', '--data_path', inputs.data, *flags(inputs))
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / 'out').exists()
    assert not (inputs.folder / 'mischief').exists()


@BOTH
@pytest.mark.parametrize('left', ['checkpoint.pth', 'previous.pth', 'log.txt', 'args.json'])
def test_another_runs_folder_is_refused_and_left_as_it_is(script, left, inputs, tmp_path):
    """README: a run is never overwritten by mistake."""
    (tmp_path / left).write_bytes((inputs.chain / 'deit' / left).read_bytes())
    before = contents(tmp_path)
    with pytest.raises(models.InputError, match=f'holds another run .{left}.: .*--resume auto'):
        run(script, tmp_path, '--data_path', inputs.data, '--teacher_path', inputs.mae)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(('script', 'name', 'flags'), [(GENERIC, 'mae', ('--target', 'pixel')), (CLS, 'deit', ())],
                         ids=['stage 1', 'classification'])
def test_a_resume_from_elsewhere_does_not_overwrite_another_run(script, name, flags, inputs, tmp_path):
    """README: --resume PATH may start a new folder or go on in its own, never in that of another run."""
    shutil.copytree(inputs.chain / name, tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path)
    flags = ('--data_path', inputs.data, '--lr', 1e-3, '--epochs', 3, *flags)
    with pytest.raises(models.InputError, match='holds another run'):
        run(script, tmp_path, *flags, '--resume', inputs.chain / name / 'checkpoint.pth')
    assert contents(tmp_path) == before
    run(script, tmp_path, *flags, '--resume', tmp_path / 'checkpoint.pth')
    assert [line['epoch'] for line in log_of(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize('damaged', ['truncated.pth', 'mischief.pth', 'encoder.pth'])
def test_a_resume_that_fails_leaves_the_folder_as_it_is(damaged, inputs, tmp_path):
    """README: a damaged checkpoint costs neither the log nor the other files of its run, where there is no other one."""
    shutil.copytree(inputs.chain / 'mae', tmp_path, dirs_exist_ok=True)
    (tmp_path / 'previous.pth').unlink()
    shutil.copy(inputs.folder / damaged, tmp_path / 'checkpoint.pth')
    before = contents(tmp_path)
    with pytest.raises(models.InputError):
        run(GENERIC, tmp_path, '--data_path', inputs.data, '--target', 'pixel', '--resume', 'auto', '--epochs', 3)
    assert contents(tmp_path) == before


def test_an_error_is_printed_as_one_line_without_a_traceback(inputs, tmp_path):
    """README: the printed form of an error, and its exit status, for the one failure that users report most."""
    process = start(GENERIC, tmp_path / 'out', '--data_path', inputs.data, '--teacher_path', inputs.folder / 'encoder.pth')
    _, printed = process.communicate()
    lines = printed.decode().splitlines()
    assert process.returncode == 1
    assert len(lines) == 1 and lines[0].startswith('error: ') and 'mae_pretrain_vit_base_full.pth' in lines[0]
    assert not (tmp_path / 'out').exists()


# ---------------------------------------------------------------------------------------------------- non-finite losses


@BOTH
@pytest.mark.parametrize('step', [0, 2, 5])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(script, step, data, tmp_path, monkeypatch):
    """Style: a failed run says where it failed; the epoch before it stays whole."""
    name, flags = ('stage_losses', ('--target', 'pixel')) if script is GENERIC else ('distillation_loss', ())
    compute, calls = getattr(script, name), []

    def poisoned(*args, **kwargs):
        losses = compute(*args, **kwargs)
        calls.append(losses)
        if len(calls) != 6 + step + 1:  # 6 steps an epoch
            return losses
        return {key: value * float('nan') for key, value in losses.items()} if script is GENERIC else losses * float('nan')

    monkeypatch.setattr(script, name, poisoned)
    parts = 'loss nan, loss_pixel nan' if script is GENERIC else 'loss nan'
    with pytest.raises(FloatingPointError, match=f'epoch 2 step {step + 1}: {parts}, grad_norm') as error:
        run(script, tmp_path, '--data_path', data, '--epochs', 3, *flags)
    assert len(str(error.value).splitlines()) == 1
    assert [line['epoch'] for line in log_of(tmp_path)] == [0]
    checkpoint = checkpoint_of(tmp_path)
    assert checkpoint['epoch'] == 0
    assert all(value.isfinite().all() for value in checkpoint['model'].values())
    written = {'args.json', 'checkpoint.pth', 'log.txt', *(['previous.pth'] if script is CLS else [])}
    assert {path.name for path in tmp_path.iterdir()} == written  # of the training before an evaluation, one more


def test_a_run_that_diverges_ends_with_an_error_status_and_the_parts_of_its_loss(data, chain, tmp_path, monkeypatch):
    """Style: divergence by a learning rate, from the script's last lines: exit status, one line, checkpoint kept."""
    shutil.copytree(chain / 'g2sd', tmp_path, dirs_exist_ok=True)
    before = (tmp_path / 'checkpoint.pth').read_bytes()
    flags = ('--data_path', data, '--teacher_path', chain / 'teacher/checkpoint.pth', '--finetune',
             chain / 'feature/checkpoint.pth', '--resume', 'auto', '--epochs', 4, '--lr', 1e30)
    monkeypatch.setattr(sys, 'argv', [CLS.__file__, *command(CLS, tmp_path, *flags)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(CLS.__file__, run_name='__main__')
    # sys.exit with a text: Python prints it and ends with status 1
    parts = r'loss \S+, loss_class \S+, loss_distill \S+, grad_norm '
    assert re.match(rf'error: not finite at epoch 3 step \d: {parts}', stop.value.code)
    assert len(stop.value.code.splitlines()) == 1
    assert (tmp_path / 'checkpoint.pth').read_bytes() == before
    assert [line['epoch'] for line in log_of(tmp_path)] == [0, 1]


# -------------------------------------------------------------------------------------------------------------- resume


def stage_flags(script, data, chain):
    """Everything random switched on: mask and crops, or mixup, RandAugment, erasing and stochastic depth."""
    if script is GENERIC:
        return '--data_path', data, '--lr', 1e-3, '--teacher_path', chain / 'mae/checkpoint.pth'
    return ('--data_path', data, '--lr', 1e-3, '--teacher_path', chain / 'teacher/checkpoint.pth', '--drop_path', 0.1)


@BOTH
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(script, data, chain, tmp_path, capsys):
    """README, randomness: a resume is exact, and the number of data-loading workers changes nothing."""
    flags = (*stage_flags(script, data, chain), '--epochs', 4)
    run(script, tmp_path / 'whole', *flags, '--save_every', 1)
    whole, half = checkpoint_of(tmp_path / 'whole'), checkpoint_of(tmp_path / 'whole', 'checkpoint-1.pth')
    assert half['epoch'] == 1 and whole['epoch'] == 3
    assert largest_difference(whole['model'], half['model']) > 1e-4
    capsys.readouterr()
    run(script, tmp_path / 'resumed', *flags, '--resume', tmp_path / 'whole/checkpoint-1.pth', '--num_workers', 2)
    assert re.search('^resumed .*checkpoint-1.pth after epoch 2; .*num_workers is 2, was 0', capsys.readouterr().out, re.M)
    assert_same_bits(checkpoint_of(tmp_path / 'resumed'), whole)
    lines, resumed = log_of(tmp_path / 'whole'), log_of(tmp_path / 'resumed')
    assert [line['epoch'] for line in lines] == [0, 1, 2, 3]
    assert without_clock(resumed) == without_clock(lines[2:])
    assert resumed[0]['train_seconds'] > lines[1]['train_seconds']  # counted on over the resume


@BOTH
def test_another_seed_gives_another_run(script, data, chain, tmp_path):
    """README, randomness: the comparison of bits above would see a difference in the draws."""
    weights = []
    for seed in (0, 1):
        run(script, tmp_path / str(seed), *stage_flags(script, data, chain), '--epochs', 1, '--warmup_epochs', 0,
            '--seed', seed)
        weights.append(checkpoint_of(tmp_path / str(seed))['model'])
    assert largest_difference(*weights) > 1e-4


def test_a_killed_run_resumes_to_the_bits_of_one_that_was_not_stopped(data, chain, tmp_path):
    """README: after a kill, the same command with --resume auto goes on exactly."""
    fcntl = pytest.importorskip('fcntl')
    if not hasattr(fcntl, 'F_SETPIPE_SZ'):
        pytest.skip('needs pipes whose size can be set, to stop the process in time')
    flags = (*stage_flags(CLS, data, chain), '--epochs', 12)
    process = start(CLS, tmp_path / 'killed', *flags, '--print_freq', 1)
    # what 12 epochs print does not fit into the pipe: once we stop reading, the process cannot come to its end
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
    for line in process.stdout:
        if line.startswith(b'epoch 3/12 step 2/'):
            break
    process.kill()
    process.communicate()
    lines = (tmp_path / 'killed/log.txt').read_text().splitlines()
    assert 2 <= len(lines) < 12
    # the log is written first: a kill between the two files leaves a line too many, which is to be dropped
    (tmp_path / 'killed/log.txt').write_text('\n'.join([*lines, '{"epoch": 11, "train_loss": 0.5}', '{"epoch": 1']))
    run(CLS, tmp_path / 'killed', *flags, '--resume', 'auto')
    run(CLS, tmp_path / 'whole', *flags)
    assert_same_bits(checkpoint_of(tmp_path / 'killed'), checkpoint_of(tmp_path / 'whole'))
    assert without_clock(log_of(tmp_path / 'killed')) == without_clock(log_of(tmp_path / 'whole'))


@BOTH
def test_resume_auto_starts_fresh_where_there_is_nothing(script, data, chain, tmp_path):
    """README: --resume auto may stand in the first command, too."""
    flags = (*stage_flags(script, data, chain), '--epochs', 1, '--warmup_epochs', 0)
    run(script, tmp_path / 'auto', *flags, '--resume', 'auto')
    run(script, tmp_path / 'plain', *flags)
    assert_same_bits(checkpoint_of(tmp_path / 'auto'), checkpoint_of(tmp_path / 'plain'))


@pytest.mark.parametrize(('script', 'name', 'flags'), [(GENERIC, 'mae', ('--target', 'pixel')), (CLS, 'deit', ())],
                         ids=['stage 1', 'classification'])
def test_resuming_a_finished_run_changes_nothing(script, name, flags, data, chain, tmp_path, monkeypatch):
    """README: a reproduction that is started again passes over what is finished."""
    shutil.copytree(chain / name, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(script, 'train_one_epoch', lambda *_: pytest.fail('training began'))
    before = contents(tmp_path)
    run(script, tmp_path, '--data_path', data, '--lr', 1e-3, *flags, '--resume', 'auto')
    assert contents(tmp_path) == before


def test_a_flag_changed_on_resume_is_used_as_printed(data, chain, tmp_path, capsys):
    """README: a resume prints which arguments differ; what it prints is what trains."""
    run(GENERIC, tmp_path, '--data_path', data, '--target', 'pixel', '--epochs', 3, '--lr', 2e-3, '--weight_decay', 0.3,
        '--resume', chain / 'mae/checkpoint.pth')
    printed = capsys.readouterr().out
    assert 'lr is 0.002, was 0.001' in printed and 'weight_decay is 0.3, was 0.05' in printed
    decays = {group['weight_decay'] for group in checkpoint_of(tmp_path)['optimizer']['param_groups']}
    assert decays == {0.0, 0.3}
    # the last step of 3 epochs of 6, the first of them warm-up: the cosine from the new rate to 0
    assert log_of(tmp_path)[-1]['train_lr'] == pytest.approx(2e-3 * (1 + np.cos(np.pi * 11 / 12)) / 2, rel=1e-9)


# ----------------------------------------------------------------------------------------------------------- processes


# the commands share one process group: a second one would find the addresses of the first in torchrun's store
LAUNCHER = """import json, pathlib, runpy, sys
import torch.distributed as dist
start, stop = dist.init_process_group, dist.destroy_process_group
dist.init_process_group = lambda **options: dist.is_initialized() or start(**options)
dist.destroy_process_group = lambda: None
*most, last = json.loads(pathlib.Path(sys.argv[1]).read_text())
for sys.argv in most:
    runpy.run_path(sys.argv[0], run_name='__main__')
dist.destroy_process_group = stop
sys.argv = last
runpy.run_path(sys.argv[0], run_name='__main__')
assert not dist.is_initialized()
"""


@pytest.fixture(scope='session')
def two_processes(data, chain, spoilt, tmp_path_factory):
    """Several commands, one after the other, in one start of torchrun with two processes; the output folders."""
    folder = tmp_path_factory.mktemp('two')
    jobs = []
    for script, name in ((GENERIC, 'stage 1'), (CLS, 'classification')):
        flags = (*stage_flags(script, data, chain), '--epochs', 4, '--lr', 1e-4)
        jobs += [(script, folder / name, *flags, '--save_every', 1),
                 (script, folder / f'{name} resumed', *flags, '--resume', folder / name / 'checkpoint-1.pth')]
    jobs += [(CLS, folder / 'none', '--data_path', data, '--eval', '--resume', folder / 'classification/checkpoint.pth'),
             (GENERIC, folder / 'spoilt', '--data_path', spoilt.data, '--target', 'pixel', '--skip_bad_images',
              '--batch_size', 4)]
    (folder / 'launcher.py').write_text(LAUNCHER)
    (folder / 'jobs.json').write_text(json.dumps([[job[0].__file__, *command(*job)] for job in jobs]))
    process = subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--rdzv-backend=c10d',
         '--rdzv-endpoint=localhost:0', str(folder / 'launcher.py'), str(folder / 'jobs.json')],
        cwd=folder, env={**environment(), 'PYTHONPATH': str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True)
    try:
        printed, errors = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers, too
        pytest.fail(f'two processes wait for each other: {process.communicate()[1][-4000:]}')
    assert process.returncode == 0, errors[-4000:]
    return SimpleNamespace(folder=folder, printed=printed)


def test_two_processes_and_accumulation_train_like_one_large_batch(data, chain, two_processes, tmp_path):
    """README, randomness: stage 1 gives the same training on 1 x 16 and 2 x 8 samples, and on 8 accumulated twice."""
    flags = (*stage_flags(GENERIC, data, chain), '--epochs', 4, '--lr', 1e-4)
    run(GENERIC, tmp_path / 'large', *flags, '--batch_size', 16, '--save_every', 1)
    run(GENERIC, tmp_path / 'accumulated', *flags, '--accum_iter', 2)
    run(GENERIC, tmp_path / 'seed', *flags, '--batch_size', 16, '--seed', 1)
    large = checkpoint_of(tmp_path / 'large')['model']
    assert largest_difference(large, checkpoint_of(tmp_path / 'large', 'checkpoint-0.pth')['model']) > 2e-4
    assert largest_difference(large, checkpoint_of(tmp_path / 'seed')['model']) > 2e-4
    assert largest_difference(large, checkpoint_of(tmp_path / 'accumulated')['model']) < 1e-5
    assert largest_difference(large, checkpoint_of(two_processes.folder / 'stage 1')['model']) < 1e-5
    losses = [[line['train_loss'] for line in log_of(out)] for out in (tmp_path / 'large', two_processes.folder / 'stage 1')]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize('stage', ['stage 1', 'classification'])
def test_a_resume_on_two_processes_is_exact(stage, two_processes):
    """README, randomness: a resume is exact on several processes, too."""
    whole, resumed = two_processes.folder / stage, two_processes.folder / f'{stage} resumed'
    assert checkpoint_of(whole)['args']['world_size'] == 2
    assert largest_difference(checkpoint_of(whole)['model'], checkpoint_of(whole, 'checkpoint-1.pth')['model']) > 1e-4
    assert_same_bits(checkpoint_of(resumed), checkpoint_of(whole))
    assert without_clock(log_of(resumed)) == without_clock(log_of(whole)[2:])
    assert not any(key.startswith('module.') for key in checkpoint_of(whole)['model'])


def test_two_processes_evaluate_like_one(data, two_processes):
    """Stage 2: every sample is counted exactly once on any number of processes."""
    last = log_of(two_processes.folder / 'classification')[-1]
    alone = run(CLS, two_processes.folder / 'none', '--data_path', data, '--eval', '--resume',
                two_processes.folder / 'classification/checkpoint.pth')
    assert (last['test_images'], last['test_acc1'], last['test_acc5']) == (10, alone['test_acc1'], alone['test_acc5'])
    assert last['test_loss'] == pytest.approx(alone['test_loss'], rel=1e-6)
    printed = [line for line in two_processes.printed.splitlines() if line.startswith('test: ')]
    assert len(printed) == 4 + 2 + 1  # rank 0 alone prints: two runs and the evaluation
    assert printed[-1] == f'test: top-1 {alone["test_acc1"]:.2f} % top-5 {alone["test_acc5"]:.2f} % of 10 images'


def test_two_processes_sum_their_unreadable_images(two_processes):
    """README: the log counts the skipped images of all processes."""
    assert [line['train_skipped_images'] for line in log_of(two_processes.folder / 'spoilt')] == [1, 1]


@pytest.mark.parametrize('world_size', [1, 2, 4, 10])
def test_every_validation_image_belongs_to_exactly_one_process(world_size, data, chain):
    """Stage 2: 10 images on 4 processes are 10 images, and the processes' sums are those of one."""
    model = models.create_vit('vit_pico_patch8', 3, 16)
    model.load_state_dict(checkpoint_of(chain / 'deit')['model'])
    args = parse(CLS, 'none', '--data_path', data, '--eval')
    args.distributed, args.input_size, args.amp = False, [16, 16], 'off'
    seen, hits, loss = [], 0, 0.0
    for rank in range(world_size):
        args.rank, args.world_size = rank, world_size
        _, loader, classes = CLS.build_data(args)
        seen += [index for _, index in loader.sampler]
        stats = CLS.evaluate(model, loader, CLS.Progress(args, args.epochs), torch.device('cpu'), args)
        hits += stats['test_acc1'] * stats['test_images'] / 100
        loss += stats['test_loss'] * stats['test_images']
    last = log_of(chain / 'deit')[-1]
    assert sorted(seen) == list(range(10)) and classes == list(CLASSES)
    assert hits == pytest.approx(last['test_acc1'] / 10, rel=1e-9)
    assert loss == pytest.approx(10 * last['test_loss'], rel=1e-6)


# --------------------------------------------------------------------------------------------------------------- chain

# run -> (training terms in the log, entries that its network has, entries that it has not)
PRODUCTS = {
    'mae': ({'pixel'}, {'decoder_norm.weight', 'decoder_pred.weight', 'mask_token'}, {'feature_head.fc1.weight'}),
    'feature': ({'feature'}, {'feature_head.fc2.weight', 'mask_token'}, {'decoder_norm.weight', 'decoder_pred.weight'}),
    'masked': ({'feature'}, {'feature_head.fc2.weight'}, {'decoder_norm.weight', 'decoder_pred.weight'}),
    'recon': ({'recon'}, {'feature_head.fc2.weight'}, {'decoder_norm.weight', 'decoder_pred.weight'}),
    'recon_gt': ({'recon', 'pixel'}, {'feature_head.fc2.weight'}, {'decoder_norm.weight', 'decoder_pred.weight'}),
    'teacher': (set(), {'fc_norm.weight', 'head.weight'}, {'norm.weight', 'dist_token', 'mask_token'}),
    'no teacher': (set(), {'fc_norm.weight', 'head.weight'}, {'norm.weight', 'dist_token', 'mask_token'}),
    'deit': (set(), {'norm.weight', 'head.weight'}, {'fc_norm.weight', 'dist_token', 'head_dist.weight'}),
    'g2sd': ({'class', 'distill'}, {'dist_token', 'head_dist.weight', 'norm.weight'}, {'fc_norm.weight', 'mask_token'}),
    'soft': ({'class', 'distill'}, {'dist_token', 'head_dist.weight', 'norm.weight'}, {'fc_norm.weight', 'mask_token'}),
    'deit distilled': ({'class', 'distill'}, {'dist_token', 'head_dist.weight', 'norm.weight'}, {'fc_norm.weight'}),
}
STAGE_1 = ('mae', 'feature', 'masked', 'recon', 'recon_gt')


@pytest.mark.parametrize('name', PRODUCTS)
def test_each_kind_of_run_holds_its_network_and_logs_its_terms(name, chain):
    """The stages and their files: the table of what the scripts make, the log's keys, and what a checkpoint holds."""
    terms, has, has_not = PRODUCTS[name]
    checkpoint = checkpoint_of(chain / name)
    assert has <= set(checkpoint['model']) and not has_not & set(checkpoint['model'])
    assert checkpoint['epoch'] == 1 and checkpoint['train_seconds'] > 0
    assert checkpoint['classes'] == (None if name in STAGE_1 else list(CLASSES))
    lines = log_of(chain / name)
    assert [line['epoch'] for line in lines] == [0, 1]
    for line in lines:
        assert {key for key in line if key.startswith('train_loss')} == {'train_loss'} | {f'train_loss_{t}' for t in terms}
        assert {'train_lr', 'train_seconds'} <= set(line)
        assert {'test_acc1', 'test_acc5'} & set(line) == (set() if name in STAGE_1 else {'test_acc1', 'test_acc5'})
        assert 'train_skipped_images' not in line
    total = {1: lambda line: line[f'train_loss_{min(terms)}'], 2: lambda line: sum(line[f'train_loss_{t}'] for t in terms)}
    if terms:
        weight = 0.5 if 'distill' in terms else 1.0  # DeiT's halves; stage 1 adds its terms
        assert lines[0]['train_loss'] == pytest.approx(weight * total[len(terms)](lines[0]), rel=1e-5)


@pytest.mark.parametrize('name', PRODUCTS)
def test_a_checkpoint_holds_tensors_and_plain_types_alone(name, chain):
    """Checkpoints: a checkpoint opens with torch's weights-only default and nothing allowed besides."""
    path = chain / name / 'checkpoint.pth'
    assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint) == {
        'model', 'optimizer', 'scaler', 'epoch', 'step', 'progress', 'args', 'classes', 'train_seconds'}
    plain = {torch.Tensor, str, int, float, bool, type(None)}
    assert {type(value) for _, value in leaves(checkpoint)} <= plain
    assert type(checkpoint['args']) is dict and type(checkpoint['model']) in (dict, collections.OrderedDict)
    written = json.loads((chain / name / 'args.json').read_text())
    assert written == checkpoint['args']
    assert written['lr'] == 1e-3 and written['epochs'] == 2


def test_the_feature_head_is_as_wide_as_what_it_predicts(chain):
    """Stage 1: decoder width of the teacher, or the numbers of a patch, 8 * 8 * 3."""
    widths = {name: len(checkpoint_of(chain / name)['model']['feature_head.fc2.weight'])
              for name in ('feature', 'masked', 'recon', 'recon_gt')}
    assert widths == {'feature': 32, 'masked': 32, 'recon': 192, 'recon_gt': 192}


def test_classifiers_load_strictly_into_timm(chain):
    """Stage 2: timm's naming, so that timm's own classes take our checkpoints with strict=True."""
    size = {'img_size': 16, 'patch_size': 8, 'embed_dim': 32, 'depth': 2, 'num_heads': 2, 'num_classes': 3}
    for name, network in (('deit', VisionTransformer(**size)), ('teacher', VisionTransformer(**size, global_pool='avg')),
                          ('g2sd', VisionTransformerDistilled(**size))):
        network.load_state_dict(checkpoint_of(chain / name)['model'], strict=True)


@pytest.mark.parametrize('flags', [(), ('--distillation_type', 'none')], ids=['g2sd', 'no teacher'])
def test_stage_2_starts_from_the_encoder_of_stage_1(flags, data, chain, tmp_path):
    """The stages: the student's decoder is thrown away, the encoder starts the task model unchanged."""
    run(CLS, tmp_path, '--data_path', data, '--finetune', chain / 'feature/checkpoint.pth', '--teacher_path',
        chain / 'teacher/checkpoint.pth', '--epochs', 1, '--warmup_epochs', 0, '--lr', 0, '--min_lr', 0, *flags)
    student, start_values = checkpoint_of(chain / 'feature')['model'], checkpoint_of(tmp_path)['model']
    encoder = [key for key in student if key.startswith(('patch_embed.', 'cls_token', 'blocks.'))]
    assert len(encoder) == 2 + 1 + 2 * 12
    assert all(torch.equal(start_values[key], student[key]) for key in encoder)
    patches = start_values['pos_embed'][:, 1 if flags else 2:]
    assert torch.equal(patches, student['pos_embed'][:, 1:])


def test_the_teacher_of_stage_1_decides_what_the_student_learns(data, chain, tmp_path):
    """Stage 1: the target comes from the given teacher and block, and the mask reaches the loss."""
    first = {}
    changed = checkpoint_of(chain / 'mae')['model']
    changed['blocks.0.mlp.fc1.weight'] = -changed['blocks.0.mlp.fc1.weight']
    torch.save({'model': changed}, tmp_path / 'changed.pth')
    for name, path, flags in (('same', chain / 'mae/checkpoint.pth', ()), ('teacher', tmp_path / 'changed.pth', ()),
                              ('block', chain / 'mae/checkpoint.pth', ('--target_layer', 1)),
                              ('ratio', chain / 'mae/checkpoint.pth', ('--mask_ratio', 0.5)),
                              ('masked', chain / 'mae/checkpoint.pth', ('--supervise', 'masked'))):
        run(GENERIC, tmp_path / name, '--data_path', data, '--teacher_path', path, '--epochs', 1, '--warmup_epochs', 0,
            '--lr', 1e-3, *flags)
        first[name] = log_of(tmp_path / name)[0]['train_loss']
    assert len(set(first.values())) == len(first)


@pytest.mark.parametrize('name', ['teacher', 'g2sd', 'deit', 'deit distilled'])
def test_evaluation_alone_repeats_the_last_line_of_the_log(name, data, chain, tmp_path):
    """README: --eval --resume CHECKPOINT gives the accuracy that training wrote, and writes nothing."""
    stats = run(CLS, tmp_path / 'none', '--data_path', data, '--eval', '--resume', chain / name / 'checkpoint.pth')
    last = log_of(chain / name)[-1]
    assert stats == {key: last[key] for key in ('test_loss', 'test_acc1', 'test_acc5', 'test_images')}
    assert last['test_images'] == 10 and last['test_acc5'] == 100.0  # 3 classes
    assert not (tmp_path / 'none').exists()


def test_evaluation_alone_takes_any_batch_size_and_one_split(data, chain, tmp_path):
    """README: --eval reads val/ alone; nothing that only training needs is asked for."""
    shutil.copytree(data / 'val', tmp_path / 'data/val')
    stats = run(CLS, tmp_path / 'none', '--data_path', tmp_path / 'data', '--eval', '--batch_size', 3, '--resume',
                chain / 'deit/checkpoint.pth')
    assert stats['test_acc1'] == log_of(chain / 'deit')[-1]['test_acc1'] and stats['test_images'] == 10


def test_evaluation_alone_takes_another_image_size(data, chain, tmp_path):
    """README: position tables are resized, so a network is evaluated at another size than it was trained at."""
    stats = run(CLS, tmp_path / 'none', '--data_path', data, '--eval', '--input_size', 32, '--resume',
                chain / 'g2sd/checkpoint.pth')
    assert stats['test_images'] == 10 and stats['test_loss'] != log_of(chain / 'g2sd')[-1]['test_loss']


def test_eval_every_leaves_out_evaluations_but_never_the_first_or_the_last(data, tmp_path):
    """The help of --eval_every: epochs between evaluations; the first and the last epoch always have one."""
    run(CLS, tmp_path, '--data_path', data, '--epochs', 5, '--eval_every', 3)
    assert ['test_acc1' in line for line in log_of(tmp_path)] == [True, False, True, False, True]


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize(('flags', 'expected'), [
    (('--finetune', 'x.pth'), (200, 5, 1e-3, 1e-6, 0.75)),
    ((), (500, 5, 2.5e-4, 1e-6, 1.0)),
    (('--finetune', 'x.pth', '--teacher_path', 'y.pth'), (200, 5, 1e-3, 1e-6, 0.75)),
    (('--teacher_path', 'y.pth'), (500, 5, 2.5e-4, 1e-6, 1.0)),
    (('--finetune', 'x.pth', '--epochs', '100', '--blr', '5e-4', '--layer_decay', '0.65'), (100, 5, 5e-4, 1e-6, 0.65)),
    (('--epochs', '300'), (300, 5, 2.5e-4, 1e-6, 1.0)),
])
def test_finetune_chooses_the_column_of_table_1(flags, expected):
    """Supplement Table 1: fine-tuning or from scratch; a flag given by hand wins."""
    args = CLS.get_args_parser().parse_args(flags)
    CLS.resolve_recipe(args)
    assert (args.epochs, args.warmup_epochs, args.blr, args.min_lr, args.layer_decay) == expected


@pytest.mark.parametrize(('flags', 'expected'), [
    ((), (300, 10, 1.5e-4, 2.5e-6)),
    (('--target', 'recon_gt'), (300, 10, 1.5e-4, 2.5e-6)),
    (('--target', 'pixel'), (800, 40, 1.5e-4, 0.0)),
    (('--target', 'pixel', '--epochs', '400', '--min_lr', '1e-6', '--warmup_epochs', '0'), (400, 0, 1.5e-4, 1e-6)),
])
def test_the_target_chooses_the_recipe_of_stage_1(flags, expected):
    """Supplement 1.1 for distillation, MAE's pre-training for pixels; a flag given by hand wins, 0 too."""
    args = GENERIC.get_args_parser().parse_args(flags)
    GENERIC.resolve_recipe(args)
    assert (args.epochs, args.warmup_epochs, args.blr, args.min_lr) == expected


@pytest.mark.parametrize(('flags', 'pooled'), [
    ((), False), (('--finetune', 'x'), True), (('--finetune', 'x', '--teacher_path', 'y'), False),
    (('--teacher_path', 'y'), False), (('--global_pool',), True), (('--finetune', 'x', '--no-global_pool'), False),
    (('--finetune', 'x', '--teacher_path', 'y', '--distillation_type', 'none'), True),
])
def test_global_pooling_is_the_default_of_fine_tuning_without_a_teacher(flags, pooled):
    """Stage 2: mean of the patch tokens with --finetune, class token from scratch and with a teacher."""
    args = CLS.get_args_parser().parse_args(flags)
    CLS.resolve_recipe(args)
    assert args.global_pool is pooled


@BOTH
def test_learning_rate_follows_the_effective_batch(script, capsys):
    """Style: lr = blr * batch_size * accum_iter * world_size / 256, and --lr overrides it."""
    paper = script.PAPER_BATCH
    args = parse(script, 'none', '--batch_size', 64, '--accum_iter', 3, '--blr', 1e-3)
    args.world_size = 4
    script.scale_lr(args, paper, args.blr)
    assert args.lr == pytest.approx(1e-3 * 64 * 3 * 4 / 256, rel=1e-12)
    assert f'not the paper\'s {paper}' in capsys.readouterr().out
    args = parse(script, 'none', '--lr', 0, '--batch_size', paper // 8, '--blr', 1e-3)
    args.world_size = 8
    script.scale_lr(args, paper, args.blr)
    assert args.lr == 0
    assert 'the paper\'s' not in capsys.readouterr().out


@BOTH
def test_learning_rate_warms_up_and_ends_near_the_minimum(script, data, chain, tmp_path):
    """Both recipes: linear warm-up, then a cosine to min_lr, set before each update."""
    run(script, tmp_path, *stage_flags(script, data, chain), '--epochs', 4, '--min_lr', 1e-4)
    step = np.arange(24) / 6
    cosine = 1e-4 + (1e-3 - 1e-4) * (1 + np.cos(np.pi * (step - 1) / 3)) / 2
    expected = np.where(step < 1, 1e-3 * step, cosine)[5::6]  # the log holds each epoch's last one
    assert [line['train_lr'] for line in log_of(tmp_path)] == pytest.approx(list(expected), rel=1e-9)


# ---------------------------------------------------------------------------------------------------------------- data


@pytest.fixture(scope='session')
def spoilt(tmp_path_factory):
    """A data set with one unreadable image in train/ and one in val/."""
    folder = tmp_path_factory.mktemp('spoilt')
    draw_classes(folder / 'train', CLASSES, (8, 8, 8))
    draw_classes(folder / 'val', CLASSES, (4, 3, 3))
    bad = {split: folder / split / 'bee/01.png' for split in ('train', 'val')}
    for path in bad.values():
        path.write_bytes(path.read_bytes()[:100])
    return SimpleNamespace(data=folder, **bad)


def named(text):
    """Stage 1 reads all below a folder as the class '.', which shows in the paths it prints."""
    return text.replace('/./', '/')


@BOTH
def test_an_unreadable_image_stops_the_run_and_is_named(script, spoilt, tmp_path):
    """README, one bad file: the run stops and names it."""
    flags = ('--target', 'pixel') if script is GENERIC else ()
    with pytest.raises(models.InputError) as error:
        run(script, tmp_path, '--data_path', spoilt.data, *flags)
    assert re.match(f'cannot read {re.escape(str(spoilt.train))} .*--skip_bad_images', named(str(error.value)))
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / 'checkpoint.pth').exists()


@BOTH
@pytest.mark.parametrize('workers', [0, 1])
def test_an_unreadable_image_is_skipped_named_once_and_counted(script, workers, spoilt, tmp_path, capsys):
    """README, one bad file: with --skip_bad_images it is named once, counted in the log, and the next takes its place."""
    flags = ('--target', 'pixel') if script is GENERIC else ()
    run(script, tmp_path, '--data_path', spoilt.data, '--skip_bad_images', '--num_workers', workers, *flags)
    lines = log_of(tmp_path)
    assert [line['train_skipped_images'] for line in lines] == [1, 1]
    printed = named(capsys.readouterr().out)
    assert printed.count(str(spoilt.train)) == 1
    if script is CLS:
        assert [line['test_images'] for line in lines] == [9, 9]
        assert printed.count(str(spoilt.val)) == 1


def test_evaluation_alone_skips_an_unreadable_image(spoilt, chain, tmp_path, capsys):
    """README, one bad file: --eval treats it like training does; it is left out of the accuracy."""
    flags = ('--data_path', spoilt.data, '--eval', '--resume', chain / 'deit/checkpoint.pth')
    with pytest.raises(models.InputError, match=re.escape(str(spoilt.val))):
        run(CLS, tmp_path / 'none', *flags)
    assert run(CLS, tmp_path / 'none', *flags, '--skip_bad_images')['test_images'] == 9
    assert capsys.readouterr().out.count(f'skipped: {spoilt.val}') == 1


@pytest.mark.parametrize('workers', [0, 1])
def test_a_lost_disk_ends_the_run_in_one_line(workers, tmp_path, monkeypatch):
    """README, one bad file: --skip_bad_images does not pass over everything, and a data worker's error is one line, too."""
    for i in range(8):
        (tmp_path / f'{i}.png').write_bytes(b'no image')
    flags = ('--data_path', tmp_path, '--target', 'pixel', '--skip_bad_images', '--num_workers', workers)
    monkeypatch.setattr(sys, 'argv', [GENERIC.__file__, *command(GENERIC, tmp_path / 'out', *flags)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(GENERIC.__file__, run_name='__main__')
    assert re.match('error: .*100 unreadable images in a row', stop.value.code)
    assert len(stop.value.code.splitlines()) == 1
    assert not (tmp_path / 'out/checkpoint.pth').exists()


def test_evaluation_of_unreadable_images_gives_no_number(data, chain, tmp_path):
    """Stage 2: an accuracy over no image is an error, not a number."""
    shutil.copytree(data, tmp_path / 'data')
    for path in (tmp_path / 'data/val').rglob('*.png'):
        path.write_bytes(b'no image')
    with pytest.raises(models.InputError, match='unreadable|no validation image'):
        run(CLS, tmp_path / 'none', '--data_path', tmp_path / 'data', '--eval', '--skip_bad_images', '--resume',
            chain / 'deit/checkpoint.pth')


def test_stage_1_reads_labelled_and_flat_folders(data, tmp_path):
    """README, one bad file: stage 1 takes a flat folder, a folder of classes, or one that holds train/."""
    for i in range(16):
        draw(tmp_path / f'flat/{i:02}.png', seed=i)
    shutil.copytree(tmp_path / 'flat', tmp_path / 'split/train')
    draw(tmp_path / 'split/val/0.png')
    args = parse(GENERIC, 'none')
    args.rank, args.world_size, args.input_size = 0, 1, [16, 16]
    for folder, count in ((data, 48), (data / 'train', 48), (tmp_path / 'flat', 16), (tmp_path / 'split', 16)):
        args.data_path = str(folder)
        assert len(GENERIC.build_data(args, 4).dataset) == count
    run(GENERIC, tmp_path / 'out', '--data_path', tmp_path / 'flat', '--target', 'pixel')
    assert len(log_of(tmp_path / 'out')) == 2


@BOTH
def test_an_image_that_is_not_square_trains(script, data, chain, tmp_path):
    """Stage 1: non-square and any size divisible by the patch works; a teacher's positions are resized."""
    flags = ('--epochs', 1, '--warmup_epochs', 0, '--input_size', 16, 24)
    run(script, tmp_path, *stage_flags(script, data, chain), *flags)
    checkpoint = checkpoint_of(tmp_path)
    assert checkpoint['model']['pos_embed'].shape == (1, (1 if script is GENERIC else 2) + 2 * 3, 32)
    assert checkpoint['args']['input_size'] == [16, 24]


@BOTH
def test_grey_palette_and_transparent_images_are_read(script, tmp_path):
    """README: images of any colour mode that Pillow reads."""
    for split in ('train', 'val'):
        draw_classes(tmp_path / split, CLASSES, (8, 8, 8))
        for mode, path in zip(('L', 'P', 'RGBA', 'LA', '1', 'CMYK'), sorted((tmp_path / split).rglob('*.png'))):
            with Image.open(path) as image:
                image.convert(mode).save(path, format='JPEG' if mode == 'CMYK' else 'PNG')
    flags = ('--target', 'pixel') if script is GENERIC else ()
    run(script, tmp_path / 'out', '--data_path', tmp_path, '--epochs', 1, '--warmup_epochs', 0, *flags)
    assert np.isfinite(log_of(tmp_path / 'out')[0]['train_loss'])


@BOTH
def test_cifar_trains_as_torchvision_stores_it(script, tmp_path, monkeypatch):
    """README, one bad file: --data_set CIFAR10 besides the default folder."""
    import pickle

    import torchvision
    folder = tmp_path / torchvision.datasets.CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [name for name, _ in torchvision.datasets.CIFAR10.train_list + torchvision.datasets.CIFAR10.test_list]
    for name in names:
        batch = {'data': rng.integers(0, 256, (10, 3072), dtype=np.uint8), 'labels': list(range(10))}
        (folder / name).write_bytes(pickle.dumps(batch))
    meta = torchvision.datasets.CIFAR10.meta
    (folder / meta['filename']).write_bytes(pickle.dumps({meta['key']: [f'class {i}' for i in range(10)]}))
    monkeypatch.setattr(torchvision.datasets.cifar, 'check_integrity', lambda *_: True)  # drawn, so not the known hashes
    flags = ('--target', 'pixel') if script is GENERIC else ()
    run(script, tmp_path / 'out', '--data_path', tmp_path, '--data_set', 'CIFAR10', '--input_size', 32, *flags)
    assert len(log_of(tmp_path / 'out')) == 2
    if script is CLS:
        assert checkpoint_of(tmp_path / 'out')['classes'] == [f'class {i}' for i in range(10)]
        assert log_of(tmp_path / 'out')[-1]['test_images'] == 10


@BOTH
def test_bf16_trains_on_a_cpu(script, data, chain, tmp_path):
    """README: --amp bf16 works without a GPU; its loss is the full-precision one to bf16's accuracy."""
    losses = {}
    for amp in ('bf16', 'off'):
        run(script, tmp_path / amp, *stage_flags(script, data, chain), '--epochs', 1, '--warmup_epochs', 0, '--amp', amp,
            '--lr', 1e-5)
        losses[amp] = log_of(tmp_path / amp)[0]['train_loss']
        assert checkpoint_of(tmp_path / amp)['args']['amp'] == amp
    assert losses['bf16'] != losses['off']
    assert losses['bf16'] == pytest.approx(losses['off'], rel=0.02)


def test_classification_trains_without_mixup_on_an_odd_batch(data, tmp_path):
    """The error for an odd batch names the way out: --mixup 0 --cutmix 0."""
    run(CLS, tmp_path, '--data_path', data, '--batch_size', 7, '--mixup', 0, '--cutmix', 0, '--aa', 'none', '--reprob', 0)
    assert len(log_of(tmp_path)) == 2


def test_a_machine_without_git_and_an_output_path_that_is_a_file(data, tmp_path, monkeypatch, capsys):
    """`make demo` asks for Python and make only; a file in the place of the output folder is refused in one line."""
    monkeypatch.setenv('PATH', str(tmp_path))
    GENERIC.start_run(parse(GENERIC, tmp_path / 'out', '--data_path', data))
    assert 'commit unknown' in capsys.readouterr().out
    (tmp_path / 'file').write_text('mine')
    with pytest.raises(models.InputError, match='is a file'):
        GENERIC.start_run(parse(GENERIC, tmp_path / 'file', '--data_path', data))


def test_samples_and_steps_draw_from_different_streams():
    """README, randomness: a step's mixup is no copy of a sample's augmentation, although both keys may share numbers."""
    def draw_from(*key):
        models.seed_everything(*key)
        return torch.rand(3).tolist()
    assert draw_from(0, 3, 5, models.SAMPLE) != draw_from(0, 3, 5, 0, models.STEP) != draw_from(0, models.START)
    assert draw_from(0, 3, 5, models.SAMPLE) == draw_from(0, 3, 5, models.SAMPLE)


def test_evaluation_alone_reads_the_authors_layout_of_a_distilled_classifier(chain, data, tmp_path):
    """README, differences: the authors' positions lack a row for the distillation token; their file evaluates like ours."""
    checkpoint = checkpoint_of(chain / 'g2sd')
    positions = checkpoint['model']['pos_embed']
    checkpoint['model']['pos_embed'][:, 1] = 0
    torch.save({'model': checkpoint['model']}, tmp_path / 'ours.pth')
    torch.save({'model': {**checkpoint['model'], 'pos_embed': torch.cat([positions[:, :1], positions[:, 2:]], dim=1)}},
               tmp_path / 'theirs.pth')
    ours, theirs = (run(CLS, tmp_path / 'out', '--data_path', data, '--eval', '--resume', tmp_path / name)
                    for name in ('ours.pth', 'theirs.pth'))
    assert ours == theirs
