"""The scripts as a user meets them: the chain of stages, what runs print, log and hold, what is refused.

Runs are tiny and in this process, on drawn data; processes are started where a process is the claim.
"""
import collections
import json
import math
import pickle
import re
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from conftest import (CLS, DET, EVERY_SCRIPT, FOLDER, GENERIC, SEG, checkpoint_of, command,
                      contents, environment, evaluate_alone, largest_difference, leaves, log_of, scores_of,
                      train)
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch.utils._python_dispatch import TorchDispatchMode

import models

EPOCH_SCRIPTS = pytest.mark.parametrize('script', [GENERIC, CLS], ids=['generic', 'cls'])
STAGE_2 = pytest.mark.parametrize('script', [CLS, DET, SEG], ids=['cls', 'det', 'seg'])
PLAIN = {GENERIC: '--target pixel', CLS: '', DET: '', SEG: ''}  # a run that needs no other


class Reached(Exception):
    """Ends a run where a test has seen enough."""


def reach(*_):
    raise Reached


# ---- the chain of stages -------------------------------------------------------------------------

BOXES = 'objectness rpn_box_reg classifier box_reg mask'
RUNS = {
    # name: script, flags, terms of the loss
    'mae': (GENERIC, '--target pixel --model mae_vit_nano_patch8', 'pixel'),
    'feature': (GENERIC, '--teacher_path {mae}', 'feature'),
    'masked': (GENERIC, '--teacher_path {mae} --supervise masked', 'feature'),
    'recon': (GENERIC, '--teacher_path {mae} --target recon', 'recon'),
    'recon_gt': (GENERIC, '--teacher_path {mae} --target recon_gt', 'recon pixel'),
    'teacher': (CLS, '--model vit_nano_patch8 --finetune {mae}', ''),
    'g2sd': (CLS, '--finetune {feature} --teacher_path {teacher}', 'class distill'),
    'soft': (CLS, '--finetune {feature} --teacher_path {teacher} --distillation_type soft '
                  '--distillation_alpha 0.9', 'class distill'),
    'labels': (CLS, '--finetune {feature}', ''),
    'deit_distilled': (CLS, '--teacher_path {teacher}', 'class distill'),
    'deit': (CLS, '', ''),
    'det_teacher': (DET, '--fpn_dim 24 --results_json {results}', BOXES),
    'det': (DET, '--finetune {feature} --teacher_path {det_teacher} --distill_warmup 1', f'{BOXES} fpn head'),
    'seg_teacher': (SEG, '--model vit_nano_patch8 --finetune {mae}', 'seg aux'),
    'seg': (SEG, '--finetune {feature} --teacher_path {seg_teacher}', 'seg aux cwd'),
}
HOLDS = {
    # name: parameters that its network has, and has not
    'mae': ('decoder_pred.weight', 'feature_head.fc2.weight'),
    'feature': ('feature_head.fc2.weight', 'decoder_pred.weight'),
    'recon_gt': ('feature_head.fc2.weight', 'decoder_pred.weight'),
    'labels': ('fc_norm.weight', 'head_dist.weight'),
    'g2sd': ('head_dist.weight', 'fc_norm.weight'),
    'deit_distilled': ('head_dist.weight', 'fc_norm.weight'),
    'deit': ('norm.weight', 'fc_norm.weight'),
    'det': ('rpn.head.cls_logits.weight', 'adapters.0.weight'),
    'seg': ('decode_head.conv_seg.weight', 'mask_token'),
}
EVERY_RUN = pytest.mark.parametrize('name', RUNS)


@pytest.fixture(scope='session')
def chain(data, tmp_path_factory):
    """All RUNS, each made from the checkpoints of those before it: their folder, and {name: checkpoint}."""
    folder = tmp_path_factory.mktemp('chain')
    paths = {name: folder / name / 'checkpoint.pth' for name in RUNS}
    paths['results'] = folder / 'results.json'
    for name, (script, flags, _) in RUNS.items():
        train(script, data, folder / name, flags.format(**paths))
    return SimpleNamespace(folder=folder, paths=paths)


@EVERY_RUN
def test_a_run_logs_terms_that_add_up_to_its_loss(name, chain):
    script, _, terms = RUNS[name]
    lines = log_of(chain.folder / name)
    key = 'epoch' if script in (GENERIC, CLS) else 'iteration'
    assert [line[key] for line in lines] == ([0, 1] if key == 'epoch' else [2, 4])
    names = {f'train_loss_{term}' for term in terms.split()}
    for line in lines:
        assert {entry for entry in line if entry.startswith('train_loss_')} == names
        if names:
            assert line['train_loss'] == pytest.approx(sum(line[entry] for entry in names), rel=1e-5)
        assert line['train_lr'] > 0 and line['train_seconds'] > 0
    if name == 'soft':  # 12 classes; weighted as they are summed
        assert lines[0]['train_loss_class'] == pytest.approx(0.1 * math.log(12), rel=0.1)
    measures = {GENERIC: [], CLS: ['acc1', 'acc5'], DET: ['bbox_AP', 'mask_AP'], SEG: ['mIoU']}[script]
    assert all(0 <= lines[-1][f'test_{measure}'] <= 100 for measure in measures)


@EVERY_RUN
def test_a_checkpoint_holds_its_network_in_tensors_and_plain_types_alone(name, chain):
    """It opens with torch's weights-only default; no class of ours is needed to read it."""
    checkpoint = checkpoint_of(chain.folder / name)
    if name in HOLDS:
        has, has_not = HOLDS[name]
        assert has in checkpoint['model'] and has_not not in checkpoint['model']
    parts = {'model', 'optimizer', 'scaler', 'meter', 'epoch', 'samples', 'args', 'classes'}
    assert set(checkpoint) == parts | ({'adapters'} if name == 'det' else set())
    assert checkpoint['epoch'] == 1 and checkpoint['samples'] == 0
    assert type(checkpoint['args']) is dict and type(checkpoint['model']) in (dict, collections.OrderedDict)
    plain = {torch.Tensor, str, int, float, bool, type(None)}
    assert {type(value) for _, value in leaves(checkpoint)} <= plain


def test_classifiers_load_strictly_into_timm(chain):
    """Stage 2 keeps timm's names."""
    size = {'img_size': 16, 'patch_size': 8, 'embed_dim': 32, 'depth': 2, 'num_heads': 2, 'num_classes': 12}
    networks = {'deit': VisionTransformer(**size), 'labels': VisionTransformer(**size, global_pool='avg'),
                'g2sd': VisionTransformerDistilled(**size)}
    for name, network in networks.items():
        network.load_state_dict(checkpoint_of(chain.folder / name)['model'], strict=True)


@STAGE_2
def test_stage_2_starts_from_the_encoder_of_stage_1(script, data, chain, tmp_path):
    """The decoder is thrown away; the encoder starts the task model unchanged."""
    train(script, data, tmp_path, '--finetune', chain.paths['feature'], '--lr 0',
          '--min_lr 0' if script is CLS else '')
    student = checkpoint_of(chain.folder / 'feature')['model']
    started = checkpoint_of(tmp_path)['model']
    for key in ('patch_embed.proj.weight', 'blocks.1.mlp.fc2.weight', 'blocks.0.attn.qkv.weight'):
        match = [value for name, value in started.items() if name.endswith(key)]
        assert len(match) == 1 and torch.equal(match[0], student[key])


@pytest.mark.parametrize('name, flags', [('mae', '--target pixel --model mae_vit_nano_patch8'),
                                         ('feature', '--teacher_path {mae}')])
def test_stage_1_goes_on_from_a_file_with_a_new_optimizer(name, flags, data, chain, tmp_path, capsys):
    """--init: at a learning rate of 0 all weights, decoder and feature head too, end as the file's."""
    flags = f'{flags} --init {{{name}}} --lr 0 --min_lr 0'.format(**chain.paths)
    train(GENERIC, data, tmp_path, flags)
    stored, ended = checkpoint_of(chain.folder / name), checkpoint_of(tmp_path)
    assert largest_difference(ended['model'], stored['model']) == 0
    updates = {int(state['step']) for state in ended['optimizer']['state'].values()}
    assert updates == {12} and ended['epoch'] == 1  # of this run alone
    assert f'loaded {len(stored["model"])} tensors of {chain.paths[name]}' in capsys.readouterr().out


def test_stage_1_goes_on_at_another_input_size(data, chain, tmp_path, capsys):
    """--init: both tables of positions are resized."""
    train(GENERIC, data, tmp_path, '--target pixel --model mae_vit_nano_patch8 --input_size 32 48',
          '--lr 0 --min_lr 0 --init', chain.paths['mae'])
    ended, stored = checkpoint_of(tmp_path)['model'], checkpoint_of(chain.folder / 'mae')['model']
    for name in ('pos_embed', 'decoder_pos_embed'):
        maps = stored[name][0, 1:].reshape(1, 2, 2, -1).permute(0, 3, 1, 2)
        expected = torch.nn.functional.interpolate(maps, (4, 6), mode='bicubic')[0].flatten(1).T
        torch.testing.assert_close(ended[name][0, 1:], expected, atol=1e-6, rtol=0)
    assert 'pos_embed 2x2 -> 4x6' in capsys.readouterr().out


def test_teacher_mask_and_supervision_decide_the_loss_of_stage_1(data, chain, tmp_path):
    """Stage 1: the target comes from the given teacher and block; the middle block is the default."""
    changed = checkpoint_of(chain.folder / 'mae')
    changed['model']['blocks.0.mlp.fc1.weight'] *= -1
    torch.save(changed, tmp_path / 'changed.pth')
    losses = {}
    for flags in ('', '--target_layer 1', '--target_layer 2', '--mask_ratio 0.5', '--supervise masked',
                  f'--teacher_path {tmp_path}/changed.pth'):
        train(GENERIC, data, tmp_path / flags, '--lr 0 --min_lr 0 --teacher_path', chain.paths['mae'], flags)
        losses[flags] = log_of(tmp_path / flags)[0]['train_loss']
    assert losses.pop('') == losses['--target_layer 1']  # of two blocks
    assert len(set(losses.values())) == len(losses)


# ---- evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['teacher', 'g2sd', 'deit', 'det_teacher', 'seg'])
def test_evaluation_alone_repeats_the_last_line_of_the_log(name, data, chain, tmp_path):
    """--eval takes the model and its sizes from the checkpoint, and makes no output folder."""
    script, results = RUNS[name][0], tmp_path / 'results.json'
    flags = ('--results_json', results) if script is DET else ()
    stats = evaluate_alone(script, data, chain.paths[name], '--output_dir', tmp_path / 'out', *flags)
    last = log_of(chain.folder / name)[-1]
    for key, value in stats.items():
        assert last[key] == (pytest.approx(value, rel=1e-6) if key == 'test_loss' else value)
    assert 'test_images' in stats and not (tmp_path / 'out').exists()
    if script is DET:  # scores at the last bit may depend on the batch
        ours, theirs = (scores_of(path) for path in (results, chain.paths['results']))
        assert len(ours) > 20 and ours == pytest.approx(theirs, rel=1e-4)


def test_a_flag_by_hand_wins_over_the_evaluated_checkpoint(data, chain):
    """--eval at another image size: position tables are resized."""
    stats = evaluate_alone(CLS, data, chain.paths['g2sd'])
    larger = evaluate_alone(CLS, data, chain.paths['g2sd'], '--input_size', 32)
    assert larger['test_loss'] != stats['test_loss'] and larger['test_images'] == 12


def test_eval_every_leaves_out_evaluations_but_never_the_first_or_the_last(data, tmp_path):
    train(CLS, data, tmp_path, '--epochs 5 --eval_every 3')
    assert ['test_acc1' in line for line in log_of(tmp_path)] == [True, False, True, False, True]


# ---- help, printed lines -------------------------------------------------------------------------


@EVERY_SCRIPT
def test_help_shows_the_real_defaults(script, monkeypatch, capsys):
    monkeypatch.setenv('COLUMNS', '10000')
    parser = script.get_args_parser()
    with pytest.raises(SystemExit):
        parser.parse_args(['--help'])
    printed = ' '.join(capsys.readouterr().out.split())
    for action in parser._actions[1:]:
        assert f'{action.help.split(" (default: ")[0]} (default: {action.default})' in printed


DATA_LINES = {
    GENERIC: r'48 images of .*/imagenet/train, 48 an epoch',
    CLS: r'48 training images, 48 an epoch, 12 to evaluate on, 12 classes$',
    DET: r'\d of 4 images .* (\d+) of (\d+) objects used, left out: .*; 3 .*4 classes: circle, square',
    SEG: r'4 training images, 3 to evaluate on.*8 classes: grass, sand, water, pole, circle',
}


@EVERY_SCRIPT
def test_a_line_tells_what_was_found_in_the_data(script, data, tmp_path, capsys, monkeypatch):
    """Before training: images used and found, classes by name if they are few, what was left out and why."""
    monkeypatch.setattr(script, 'train_one_epoch', reach)
    content = json.loads((data / 'coco/annotations/instances_train2017.json').read_text())
    content['annotations'][0]['iscrowd'] = 1
    content['annotations'][-1]['segmentation'] = []
    (tmp_path / 'coco.json').write_text(json.dumps(content))
    flags = ['--train_annotations', tmp_path / 'coco.json'] if script is DET else []
    with pytest.raises(Reached):
        train(script, data, tmp_path, PLAIN[script], *flags)
    line = re.search('^data: .*', capsys.readouterr().out, re.M)[0]
    found = re.search(DATA_LINES[script], line)
    assert found, line
    if script is DET:
        crowds = sum(entry['iscrowd'] for entry in content['annotations'][:-1])
        assert '1 without a polygon' in line and f'{crowds} crowds' in line
        assert int(found[1]) + crowds + 1 == int(found[2]) == len(content['annotations'])


def test_printed_lines_come_after_the_first_update_and_agree_with_the_log(data, tmp_path, capsys):
    """Then every --print_freq steps, and at the end; epochs count from 0, as in log.txt."""
    train(GENERIC, data, tmp_path, '--target pixel --print_freq 5 --accum_iter 2')
    pattern = (r'^\d\d:\d\d:\d\d epoch (\d)/2 step (\d)/6 loss (\S+) loss_pixel \S+ lr (\S+) '
               r'grad_norm ([\d.]+) [\d.]+ images/s data \d+% eta \d:\d\d:\d\d$')
    rows = re.findall(pattern, capsys.readouterr().out, re.M)
    assert [row[0] + row[1] for row in rows] == ['02', '05', '06', '12', '15', '16']
    assert all(float(row[4]) for row in rows)
    for line, first in zip(log_of(tmp_path), (0, 3)):
        losses = [float(row[2]) for row in rows[first:first + 3]]
        assert np.dot(losses, [2, 3, 1]) / 6 == pytest.approx(line['train_loss'], abs=1e-4)
        assert float(rows[first + 2][3]) == pytest.approx(line['train_lr'], rel=0.01)


def test_rate_share_of_data_and_time_left_count_the_device_as_work(monkeypatch, capsys):
    """A printed line waits for the device, here 10 s: the steps take that time, the data does not."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(models, 'time', SimpleNamespace(time=lambda: clock.now, strftime=lambda _: 'now'))
    args = SimpleNamespace(batch_size=8, world_size=1, accum_iter=1, print_freq=2, distributed=False, amp='off')
    optimizer = SimpleNamespace(param_groups=[{'lr': 0.5}, {'lr': 0.1}])
    meter = models.Meter(args, optimizer, epochs=3)
    flush = meter.flush

    def wait_for_device():
        clock.now += 10
        return flush()

    class Loader(list):
        def __iter__(self):
            for number in super().__iter__():
                clock.now += 3
                yield number

    monkeypatch.setattr(meter, 'flush', wait_for_device)
    for _ in meter.log_every(Loader(range(4)), 1, 0):
        clock.now += 1
        meter.update(torch.tensor(2.0), loss=torch.tensor(1.0))
    lines = [line.split(' lr ')[1] for line in capsys.readouterr().out.splitlines()]
    expected = [(14, 3, 7), (14, 3, 6), (9, 3, 4)]  # seconds per step, of them for data, steps that are left
    for line, (seconds, loading, left) in zip(lines, expected, strict=True):
        eta = timedelta(seconds=seconds * left)
        assert line == f'0.5 grad_norm 2 {8 / seconds:.1f} images/s data {loading / seconds:.0%} eta {eta}'
    assert meter.stats()['train_seconds'] == 4 * 4 + 3 * 10


def test_a_gpus_wait_for_data_is_the_gap_in_its_own_work(monkeypatch, capsys):
    """The host runs ahead of a GPU whose steps take 5 s: of loader waits of 3, 3, 9, 3 s it feels less."""
    clock, gpu = SimpleNamespace(now=0.0), SimpleNamespace(busy_until=0.0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def elapsed_time(self, later):
            return 1000 * (later.at - self.at)

    def record_event(event):
        event.at = max(clock.now, gpu.busy_until)
        return event

    class Loader(list):
        def __iter__(self):
            for seconds in super().__iter__():
                clock.now += seconds
                yield seconds

    def flush():
        clock.now = max(clock.now, gpu.busy_until)
        return flush_rows()

    monkeypatch.setattr(models, 'time', SimpleNamespace(time=lambda: clock.now, strftime=lambda _: 'now'))
    monkeypatch.setattr(torch.Tensor, 'is_cuda', True)
    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda: SimpleNamespace(record_event=record_event))
    args = SimpleNamespace(batch_size=8, world_size=1, accum_iter=1, print_freq=10, distributed=False, amp='off')
    meter = models.Meter(args, SimpleNamespace(param_groups=[{'lr': 0.5}]), epochs=1)
    flush_rows = meter.flush
    monkeypatch.setattr(meter, 'flush', flush)
    for _ in meter.log_every(Loader([3, 3, 9, 3]), 0, 0):
        gpu.busy_until = max(clock.now, gpu.busy_until) + 5
        meter.update(torch.tensor(2.0), loss=torch.tensor(1.0))
    first, last = capsys.readouterr().out.splitlines()
    assert 'data 38%' in first  # 3 of 8 s: nothing is done before the first step
    # 3 s after the printed line, which waited for the GPU; 9 s less 5 s of work; none: 7 of 22 s
    assert 'data 32%' in last


def test_true_pixels_beside_reconstructions_are_in_the_teachers_space(data, tmp_path):
    train(GENERIC, data, tmp_path / 'mae', '--target pixel --no-norm_pix_loss')
    train(GENERIC, data, tmp_path / 'student', f'--target recon_gt --teacher_path {tmp_path}/mae/checkpoint.pth')
    assert checkpoint_of(tmp_path / 'student')['args']['norm_pix_loss'] is False


# ---- errors --------------------------------------------------------------------------------------


def draw_images(folder, places):
    """Two small images in each of the places."""
    for place in places.split():
        (folder / place).mkdir(parents=True)
        for name in '01':
            Image.new('RGB', (16, 16)).save(folder / place / f'{name}.png')


@pytest.fixture(scope='session')
def files(data, chain, tmp_path_factory):
    """What goes wrong for users, {name: path}: broken files, wrong ones, and the checkpoints of the chain."""
    folder = tmp_path_factory.mktemp('files')
    whole = checkpoint_of(chain.folder / 'mae')['model']
    encoder = {key: value for key, value in whole.items() if not key.startswith(('decoder', 'mask_token'))}
    torch.save({'model': encoder}, folder / 'mae_pretrain_vit_base.pth')
    torch.save({'model': whole, 'code': pytest.fail}, folder / 'code.pth')
    torch.save(checkpoint_of(chain.folder / 'teacher')['model'], folder / 'bare.pth')
    torch.save(timm.create_model('test_vit', num_classes=7).state_dict(), folder / 'timm.pth')
    (folder / 'truncated.pth').write_bytes(chain.paths['mae'].read_bytes()[:-5000])
    for split, name in ('train', 'bee'), ('val', 'cat'):
        draw_images(folder, f'two/{split}/ant two/{split}/bee unequal/{split}/ant unequal/{split}/{name} '
                            f'one/{split}/ant')
    draw_images(folder, 'no_val/train/ant empty/val/ant')
    for place in ('no_val/val/ant', 'empty/train/ant'):
        (folder / place).mkdir(parents=True)
    for split in ('train', 'val'):
        content = json.loads((data / f'coco/annotations/instances_{split}2017.json').read_text())
        content['categories'][0]['name'] = 'disc'
        (folder / f'{split}.json').write_text(json.dumps(content))
    return {**chain.paths, 'files': folder, 'encoder': folder / 'mae_pretrain_vit_base.pth'}


NANO = '--teacher_model mae_vit_nano_patch8'
TWO = '--data_path {files}/two --batch_size 2'
DISCS = '--train_annotations {files}/train.json --val_annotations {files}/val.json'
ERRORS = {
    # what a user gets wrong: script, flags, what the line must say
    'no teacher': (GENERIC, '', r'--teacher_path is missing.*mae_pretrain_vit_base_full\.pth'),
    'an encoder as teacher': (GENERIC, f'--teacher_path {{encoder}} {NANO}',
                              r'mae_pretrain_vit_base\.pth has no decoder.*mae_pretrain_vit_base_full\.pth'),
    'no such teacher': (GENERIC, '--teacher_path {files}/absent.pth', r'no checkpoint file at .*absent\.pth'),
    'a truncated teacher': (GENERIC, '--teacher_path {files}/truncated.pth', 'truncated.pth is no readable'),
    'code in a checkpoint': (GENERIC, '--teacher_path {files}/code.pth', 'code.pth is no readable.*_pytest'),
    'a teacher of another size': (GENERIC, '--teacher_path {mae} --teacher_model mae_vit_pico_patch8',
                                  'another architecture.*(Missing key|size mismatch|Unexpected key)'),
    'a teacher of another patch': (GENERIC, '--teacher_path {mae} --model mae_vit_pico_patch4', 'patch size'),
    'a student as teacher': (GENERIC, '--teacher_path {feature}', 'student of stage 1.*--target pixel'),
    'a block behind the last': (GENERIC, '--teacher_path {mae} --target_layer 3', 'blocks 1 to 2'),
    'a teacher for pixels': (GENERIC, '--target pixel --teacher_path {mae}', 'leave out --teacher_path'),
    'a start without a decoder': (GENERIC, '--target pixel --model mae_vit_nano_patch8 --init {encoder}',
                                  r'mae_pretrain_vit_base\.pth has no decoder.*mae_pretrain_vit_base_full\.pth'),
    'a start of another size': (GENERIC, '--target pixel --init {mae}', 'another architecture'),
    'a student that starts from MAE': (
        GENERIC, '--teacher_path {mae} --model mae_vit_nano_patch8 --init {mae}', 'mae/.*is no student.*--target pixel'),
    'a classifier in stage 1': (GENERIC, '--target pixel --model vit_pico_patch8', 'mae_vit_SIZE_patchP'),
    'a teacher without a head': (CLS, '--teacher_path {mae}', 'no classification head'),
    'a teacher of other classes': (CLS, f'--teacher_path {{teacher}} {TWO}', 'on 12 .*has 2; .* and ant'),
    'a foreign teacher of other classes': (
        CLS, f'--teacher_path {{files}}/bare.pth --teacher_model vit_nano_patch8 {TWO}', '12 .* data has 2'),
    'no such network in timm': (CLS, '--teacher_path {teacher} --teacher_model timm/resnet', 'timm/resnet:.*list_models'),
    'a network of timm without its file': (CLS, '--teacher_model timm/test_vit', 'needs --teacher_path'),
    'a network of timm of other classes': (
        CLS, '--teacher_path {files}/timm.pth --teacher_model timm/test_vit', '7 classes, the data has 12'),
    'a network of timm of another kind': (
        CLS, '--teacher_path {files}/timm.pth --teacher_model timm/test_resnet', 'resnet.*(Missing key|7 classes)'),
    'a checkpoint of these scripts through timm': (
        CLS, '--teacher_path {teacher} --teacher_model timm/test_vit', 'of these scripts: leave out'),
    'no such tag in timm': (
        CLS, '--teacher_path {files}/timm.pth --teacher_model timm/test_vit.nosuch', 'test_vit.nosuch.*tag'),
    'a teacher and pooling': (CLS, '--teacher_path {teacher} --global_pool', 'exclude each other'),
    'start weights of another size': (CLS, '--finetune {mae}', 'another architecture|does not fit'),
    'train and val differ': (CLS, '--data_path {files}/unequal', "different classes.*'bee'"),
    'an odd batch with mixup': (CLS, '--batch_size 7', '--mixup 0 --cutmix 0'),
    'classes without images': (CLS, '--data_path {files}/empty', 'no valid file.*ant'),
    'nothing to evaluate on': (CLS, '--data_path {files}/no_val', 'val/ holds no image'),
    'one class': (CLS, '--data_path {files}/one', 'one folder, ant'),
    'no CIFAR': (CLS, '--data_set CIFAR10', 'holds no CIFAR10.*download=True'),
    'fewer images than a batch': (CLS, '--accum_iter 8', '48 images, fewer than one batch of 64'),
    'evaluation of nothing': (CLS, '--eval', '--eval needs --resume'),
    'evaluation of an autoencoder': (CLS, '--eval --resume {mae}', 'no classification head|unknown model'),
    'evaluation on other classes': (CLS, f'--eval --resume {{teacher}} {TWO}', 'trained on 12 classes'),
    'a resume of another stage': (CLS, '--resume {mae}', 'trained on|another architecture'),
    'a side of 5 patches': (DET, '--input_size 40', '--input_size.*multiple of 4 patches'),
    'a classifier as detector': (DET, '--eval --resume {teacher}', 'no detector'),
    'a detector of other classes': (DET, f'--teacher_path {{det_teacher}} {DISCS}', 'trained on 4 .* and disc'),
    'a detector for another size': (DET, '--teacher_path {det_teacher} --input_size 32', '--input_size'),
    'other rounds': (DET, '--resume {det_teacher} --fpn_dim 24 --eval_every 1', '--eval_every was 2'),
    'a batch of one': (SEG, '--batch_size 1', '--batch_size 1.*at least 2'),
    'a detector as teacher': (SEG, '--teacher_path {det}', 'no segmentation network'),
    'a teacher for another size': (SEG, '--teacher_path {seg_teacher} --input_size 64', '--input_size'),
}


def error_of(script, data, out, *flags):
    """The line with which a run ends before it trains."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(script, 'train_one_epoch', lambda *_: pytest.fail('training began'))
        train(script, data, out, *flags)
    assert isinstance(stop.value.code, str)  # Python prints it, and ends with status 1
    assert len(stop.value.code.splitlines()) == 1
    assert not (out / 'checkpoint.pth').exists()
    return stop.value.code


@pytest.mark.parametrize('case', ERRORS)
def test_a_wrong_input_is_refused_in_one_line(case, data, files, tmp_path):
    script, flags, message = ERRORS[case]
    assert re.search(message, error_of(script, data, tmp_path, flags.format(**files)))


@EVERY_SCRIPT
def test_what_every_script_refuses_in_one_line(script, data, files, chain, tmp_path):
    unit = 'epochs' if script in (GENERIC, CLS) else 'iterations'
    other = chain.folder / ('seg' if script is DET else 'det') / 'args.json'
    cases = {
        '--data_path {files}/absent': 'absent',
        '--input_size 20': r'\b20\b.*patch',
        '--model resnet50': "unknown model name 'resnet50'.*pico",
        f'--warmup_{unit} 2 --{unit} 2': f'--warmup_{unit} 2 must be below --{unit} 2',
        '--resume {files}/absent.pth': 'no checkpoint file at .*absent',
        '--resume {files}/bare.pth': 'older version.*--finetune',
        '--config {files}/absent.json': '--config .*absent.json',
        f'--config {other}': '--config .*args.json .*of another script',
    }
    if not torch.cuda.is_available():
        cases['--device cuda'] = '--device cuda.*no usable GPU'
    for flags, message in cases.items():
        line = error_of(script, data, tmp_path, PLAIN[script], flags.format(**files))
        assert re.search(message, line), flags


def test_an_error_of_a_process_is_one_line_and_a_status(data, files, tmp_path):
    """The failure that users report most, and a damaged image that a data worker meets."""
    (tmp_path / 'images').mkdir()
    for index in range(8):
        Image.new('RGB', (16, 16)).save(tmp_path / f'images/{index}.png')
    (tmp_path / 'images/5.png').write_bytes(b'no image')
    expected = {
        r'.*mae_pretrain_vit_base\.pth has no decoder.*mae_pretrain_vit_base_full\.pth.*':
            f'--teacher_path {files["encoder"]} {NANO}',
        r'cannot read \S+/images/5\.png \(.*\): .* the file':
            f'--target pixel --data_path {tmp_path}/images --num_workers 2 --epochs 3',
    }
    for message, flags in expected.items():
        words = [sys.executable, *command(GENERIC, data, tmp_path / 'out', flags)]
        done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=100)
        lines = done.stderr.splitlines()
        assert done.returncode == 1 and len(lines) == 1 and re.fullmatch(message, lines[0]), done.stderr


def wrapped(text):
    """As a loader reports the end of a worker: the reason is in the cause."""
    error = RuntimeError('DataLoader worker (pid(s) 7) exited unexpectedly')
    error.__cause__ = RuntimeError(text)
    return error


BUS = ('DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader\'s workers are out of '
       'shared memory. Please try to raise your shared memory limit.')
HELP = [
    (torch.OutOfMemoryError('CUDA out of memory. Tried 2 GiB.\nSee'), 'out of memory. Tried 2 GiB. Lower --batch_size'),
    (RuntimeError('CUDA error: out of memory\nCUDA kernel errors'), 'out of memory Lower --batch_size.*nvidia-smi'),
    (RuntimeError(BUS), '/dev/shm is full.*--num_workers.*--ipc=host'), (wrapped(BUS), '/dev/shm is full'),
    (models.DataError('Traceback ...\nmodels.DataError: cannot read a.png'), '^cannot read a.png'),
]


@pytest.mark.parametrize('error, message', HELP)
def test_what_users_of_gpus_meet_ends_in_one_line(error, message):
    with pytest.raises(SystemExit, match=message) as stop:
        models.end_run(error)
    assert len(stop.value.code.splitlines()) == 1


def test_another_error_keeps_its_traceback_and_one_of_several_processes_ends_at_once(monkeypatch, capfd):
    """Alone it is raised again, for a debugger; among others it is printed, without waiting for them."""
    ended, refused = [], SystemExit('--output_dir /torch_runs/a: out')
    for error in (KeyError('fork'), FileNotFoundError('/torch_env/x'), refused, SystemExit(2), wrapped('killed'),
                  RuntimeError('out of resource: shared memory, Required'), ConnectionResetError('reset by peer')):
        with pytest.raises(type(error)) as raised:
            models.end_run(error)
        assert raised.value is error
    monkeypatch.setattr(models.dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(models.os, '_exit', lambda status: ended.append(status) or reach())
    gone = RuntimeError('[third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [10.0.0.1]')
    for error, printed in ((KeyError('fork'), 'KeyError: \'fork\''), (refused, '--output_dir /torch_runs/a: out'),
                           (gone, 'another process has ended')):
        with pytest.raises(Reached):
            models.end_run(error)
        assert printed in capfd.readouterr().err
    assert ended == [1, 1, 1]


@EVERY_SCRIPT
def test_the_gpu_of_a_process_is_chosen_and_must_exist(script, data, tmp_path, monkeypatch):
    """Without torchrun the first one; a process without one is told how many there are."""
    chosen = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch._C, '_cuda_setDevice', lambda index: chosen.append(index) or reach(), raising=False)
    for flags, index in (('--device cuda', 0), ('--device cuda:1', 1)):
        with pytest.raises(Reached):
            train(script, data, tmp_path, PLAIN[script], flags)
        assert chosen.pop() == index
    with pytest.raises(SystemExit, match='cuda:2: this machine has 2 GPUs'):
        train(script, data, tmp_path, PLAIN[script], '--device cuda:2')


@EVERY_SCRIPT
@pytest.mark.parametrize('workers', [0, 1])
def test_a_damaged_image_ends_the_run_and_is_named(script, workers, data, tmp_path):
    folder = tmp_path / 'data' / FOLDER[script]
    for name, content in contents(data / FOLDER[script]).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        is_picture = 'train' in name and name.endswith(('.jpg', '.png')) and 'annotations' not in name
        (folder / name).write_bytes(content[:100] if is_picture else content)
    with pytest.raises(models.DataError) as error:
        train(script, tmp_path / 'data', tmp_path / 'out', PLAIN[script], '--num_workers', workers)
    line = str(error.value).splitlines()[-1]
    assert re.search(rf'cannot read {re.escape(str(folder))}/\S+\.(jpg|png) \(', line)
    assert not (tmp_path / 'out/checkpoint.pth').exists()


def test_an_exception_of_a_fork_in_a_data_worker_shows_its_own_traceback(data, tmp_path, monkeypatch):
    def augment(self, image):
        raise ValueError('a mistake of my own')

    monkeypatch.setattr(GENERIC.CropAndNoise, '__call__', augment)
    with pytest.raises(ValueError, match='(?s)Original Traceback.*in augment.*a mistake of my own'):
        train(GENERIC, data, tmp_path, '--target pixel --num_workers 1')


@EVERY_SCRIPT
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(script, data, tmp_path):
    train(script, data, tmp_path, PLAIN[script], '--save_every 1')
    (tmp_path / 'checkpoint-0.pth').replace(tmp_path / 'checkpoint.pth')
    with pytest.raises(SystemExit, match='^not finite: .*(loss|grad_norm).*any older checkpoint stays'):
        train(script, data, tmp_path, PLAIN[script], '--lr 1e30 --resume auto')
    checkpoint = checkpoint_of(tmp_path)
    assert checkpoint['epoch'] == 0 and len(log_of(tmp_path)) == 1
    assert all(value.isfinite().all() for value in checkpoint['model'].values())


@EVERY_SCRIPT
def test_a_run_is_never_overwritten_but_a_failed_start_can_be_repeated(script, data, chain, tmp_path):
    """An output folder without a checkpoint holds no run; that of a run is refused and left as it is."""
    error_of(script, data, tmp_path, PLAIN[script], '--model resnet50')
    train(script, data, tmp_path, PLAIN[script])
    (tmp_path / 'previous.pth').unlink()
    before = contents(tmp_path)
    other = 'mae_vit_nano_patch8' if script is GENERIC else 'vit_nano_patch8'
    with pytest.raises(SystemExit, match='architecture'):
        train(script, data, tmp_path, PLAIN[script], '--resume', 'auto', '--model', other)
    assert contents(tmp_path) == before
    for flags in ((), ('--resume', chain.paths['mae'])):
        with pytest.raises(SystemExit, match='holds another run.*--resume auto'):
            train(script, data, tmp_path, PLAIN[script], *flags)
    (tmp_path / 'checkpoint.pth').rename(tmp_path / 'previous.pth')
    with pytest.raises(SystemExit, match='holds another run'):
        train(script, data, tmp_path, PLAIN[script])
    before['previous.pth'] = before.pop('checkpoint.pth')
    assert contents(tmp_path) == before


# ---- recipes and schedules -----------------------------------------------------------------------


@pytest.mark.parametrize('script, flags, expected', [
    (GENERIC, '', (300, 10, 1.5e-4, 2.5e-6)),
    (GENERIC, '--target recon_gt', (300, 10, 1.5e-4, 2.5e-6)),
    (GENERIC, '--target pixel', (800, 40, 1.5e-4, 0.0)),
    (GENERIC, '--target pixel --epochs 400 --warmup_epochs 0 --min_lr 1e-6', (400, 0, 1.5e-4, 1e-6)),
    (CLS, '', (500, 5, 2.5e-4, 1e-6, 1.0, False)),
    (CLS, '--finetune x', (200, 5, 1e-3, 1e-6, 0.75, True)),
    (CLS, '--teacher_path y', (500, 5, 2.5e-4, 1e-6, 1.0, False)),
    (CLS, '--finetune x --teacher_path y', (200, 5, 1e-3, 1e-6, 0.75, False)),
    (CLS, '--finetune x --teacher_path y --distillation_type none', (200, 5, 1e-3, 1e-6, 0.75, True)),
    (CLS, '--finetune x --no-global_pool --epochs 100 --blr 5e-4 --layer_decay 0.65',
     (100, 5, 5e-4, 1e-6, 0.65, False)),
])
def test_finetune_and_target_choose_the_recipe_and_flags_win(script, flags, expected, tmp_path, monkeypatch):
    """Supplement 1.1 and Table 1; MAE for pixels; pooling is the default of fine-tuning without a teacher."""
    words = ['--output_dir', str(tmp_path), '--device', 'cpu', *flags.split()]
    args = script.get_args_parser().parse_args(words)
    monkeypatch.setattr(script, 'build_data', reach)
    with pytest.raises(Reached):
        script.main(args)
    names = ('epochs', 'warmup_epochs', 'blr', 'min_lr', 'layer_decay', 'global_pool')
    assert tuple(getattr(args, name) for name in names[:len(expected)]) == expected


@EPOCH_SCRIPTS
def test_the_learning_rate_follows_the_effective_batch_and_the_schedule(script, data, tmp_path, capsys):
    """lr = blr * batch_size * accum_iter / 256; linear warm-up, then a cosine to min_lr, by update."""
    flags = '--blr 3e-2 --min_lr 1e-4 --accum_iter 2 --epochs 4'
    words = command(script, data, tmp_path, PLAIN[script], flags)
    args = script.get_args_parser().parse_args(words[1:])
    args.lr = None  # as if it was not given
    script.main(args)
    peak = 3e-2 * 8 * 2 / 256
    assert 'effective batch 16' in capsys.readouterr().out and args.lr == pytest.approx(peak, rel=1e-12)
    last_update = np.arange(4) + 4 / 6
    cosine = 1e-4 + (peak - 1e-4) * (1 + np.cos(np.pi * (last_update - 1) / 3)) / 2
    expected = np.where(last_update < 1, peak * last_update, cosine)
    assert [line['train_lr'] for line in log_of(tmp_path)] == pytest.approx(expected.tolist(), rel=1e-9)


def test_accumulation_trains_like_one_large_batch(data, tmp_path):
    """Stage 1 gives the same training on 16 samples and twice 8, up to rounding; another seed does not."""
    runs = {'large': '--batch_size 16', 'accumulated': '--accum_iter 2', 'seed': '--batch_size 16 --seed 1'}
    for name, flags in runs.items():
        train(GENERIC, data, tmp_path / name, '--target pixel --lr 1e-4', flags)
    large, accumulated, seed = (checkpoint_of(tmp_path / name)['model'] for name in runs)
    assert largest_difference(large, accumulated) < 1e-5
    assert largest_difference(large, seed) > 1e-2
    losses = [[line['train_loss'] for line in log_of(tmp_path / name)] for name in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# ---- data ----------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 9, 3)).astype(np.uint8)
GREY = COLOURS[..., :1].repeat(3, axis=2)
DEEP = np.linspace(0, 65535, 54).round().astype(np.uint16).reshape(6, 9)  # nearly all above 255
PALETTE = Image.fromarray(COLOURS[..., 0] % 3)
PALETTE.putpalette([255, 0, 0, 0, 255, 0, 7, 8, 9])
PALETTE.info['transparency'] = 1
INKS = np.dstack([COLOURS, np.zeros((6, 9), np.uint8)])  # without black: what is left of white
IMAGES = {
    # kind: image, format, the colours that were drawn
    'colours': (Image.fromarray(COLOURS), 'PNG', COLOURS),
    'grey': (Image.fromarray(COLOURS[..., 0]), 'PNG', GREY),
    'transparent': (Image.fromarray(np.dstack([COLOURS, COLOURS[..., 0]])), 'PNG', COLOURS),
    'palette': (PALETTE, 'PNG', np.array([[255, 0, 0], [0, 255, 0], [7, 8, 9]])[COLOURS[..., 0] % 3]),
    'CMYK': (Image.fromarray(INKS, 'CMYK'), 'TIFF', 255 - COLOURS),
    '16-bit grey': (Image.fromarray(DEEP), 'PNG', np.repeat(DEEP[..., None] / 257, 3, axis=2)),
    '16-bit TIFF': (Image.fromarray(DEEP), 'TIFF', np.repeat(DEEP[..., None] / 257, 3, axis=2)),
}


@pytest.mark.parametrize('kind', IMAGES)
def test_any_kind_of_image_becomes_the_colours_that_were_drawn(kind, tmp_path):
    """Any mode becomes RGB, without transparency; 16 bits are scaled, where Pillow would clip to white."""
    image, suffix, expected = IMAGES[kind]
    image.save(tmp_path / 'image', suffix)
    assert np.abs(np.asarray(models.read_rgb(tmp_path / 'image')).astype(float) - expected).max() <= 1


ADE20K = 'images/training images/validation annotations/training annotations/validation'
FOLDERS = {
    # what --data_path is: folders of two images each, the one that is given, what is read or said
    'train next to val': ('train/ant train/bee/black val/ant', '', '4 images of {}/train,'),
    'nested': ('a/b c d/e/f', '', '6 images of {},'),
    'names that begin like val and test': ('valley testament', '', '4 images of {},'),
    'a split': (ADE20K, 'images/training', '2 images of {}/images/training,'),
    'a class of training': ('train/test_tube train/b', 'train', '4 images of {}/train,'),
    'COCO': ('train2017 val2017 annotations', '', 'holds annotations/, too: give'),
    'COCO without annotations': ('train2017 val2017', '', 'holds val2017/, too: give'),
    'ADE20K': (ADE20K, '', 'holds annotations/training/, too: give'),
    'images of ADE20K': (ADE20K, 'images', 'holds validation/, too: give'),
    'splits below others': ('a/train/ant a/val/ant', '', 'holds a/val/ant/, too: give'),
    'a set whose name begins like train': ('train_set/train2017 train_set/val2017', 'train_set', 'holds val2017/, too'),
    'labels in train': ('train/images train/annotations', '', 'holds annotations/, too: give'),
    'other names': ('Training/ant Testing/ant', '', 'holds Testing/ant/, too: give'),
    'splits below images': ('images/train images/val', '', 'holds images/val/, too: give'),
    'test alone': ('birds test', '', 'holds test/, too: give the folder of the training images'),
    'images and labels': ('images Annotations', '', 'holds Annotations/, too: give .*, or call it train$'),
}


@pytest.mark.parametrize('case', FOLDERS)
def test_stage_1_reads_a_folder_whole_but_no_validation_images_and_no_labels(case, tmp_path, capsys):
    """One that holds more than training images is refused in one line."""
    places, given, message = FOLDERS[case]
    draw_images(tmp_path, places)
    try:
        words = command(GENERIC, tmp_path, tmp_path / 'out', f'--data_path {tmp_path / given} --batch_size 2')
        args = GENERIC.get_args_parser().parse_args(words[1:])
        vars(args).update(rank=0, world_size=1, distributed=False)
        GENERIC.build_data(args, 4)
        line = capsys.readouterr().out
    except SystemExit as error:
        line = error.code
    assert re.search(message.format(tmp_path), line) and len(line.splitlines()) == 1


def test_a_class_may_lack_images_in_val_and_a_hidden_folder_is_named(tmp_path, capsys):
    """A file browser's folder beside eleven classes, too many to be named."""
    names = '.ipynb_checkpoints a b c d e f g h i j k'.split()
    for split in ('train', 'val'):
        draw_images(tmp_path / 'imagenet' / split, ' '.join(names))
    for path in (tmp_path / 'imagenet/val/k').iterdir():
        path.unlink()
    train(CLS, tmp_path, tmp_path / 'out')
    assert re.search(r'22 to evaluate on, 12 classes: \.ipynb_checkpoints$', capsys.readouterr().out, re.M)
    assert log_of(tmp_path / 'out')[-1]['test_images'] == 22
    stats = evaluate_alone(CLS, tmp_path, tmp_path / 'out/checkpoint.pth')
    assert stats['test_images'] == 22 and 'k' in checkpoint_of(tmp_path / 'out')['classes']


@EPOCH_SCRIPTS
def test_an_image_that_is_not_square_trains(script, data, chain, tmp_path):
    """Position tables of the teacher are resized; the next stage reads the grid from the checkpoint."""
    teacher = chain.paths['mae' if script is GENERIC else 'teacher']
    train(script, data, tmp_path / 'a', '--teacher_path', teacher, '--input_size 16 24')
    checkpoint = checkpoint_of(tmp_path / 'a')
    assert checkpoint['model']['pos_embed'].shape == (1, (1 if script is GENERIC else 2) + 2 * 3, 32)
    train(CLS, data, tmp_path / 'b', '--finetune', tmp_path / 'a/checkpoint.pth', '--input_size 24 16')
    assert math.isfinite(log_of(tmp_path / 'b')[-1]['train_loss'])


@EPOCH_SCRIPTS
def test_cifar_trains_as_torchvision_stores_it(script, data, tmp_path, monkeypatch):
    cifar = torchvision.datasets.CIFAR10
    folder = tmp_path / cifar.base_folder
    folder.mkdir()
    for name, _ in cifar.train_list + cifar.test_list:
        pixels = RNG.integers(0, 256, (10, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({'data': pixels, 'labels': list(range(10))}))
    names = [f'class {number}' for number in range(10)]
    (folder / cifar.meta['filename']).write_bytes(pickle.dumps({cifar.meta['key']: names}))
    monkeypatch.setattr(torchvision.datasets.cifar, 'check_integrity', lambda *_: True)  # drawn: other hashes
    flags = ('--data_path', tmp_path, '--data_set CIFAR10 --input_size 32')
    train(script, data, tmp_path / 'out', PLAIN[script], *flags)
    assert len(log_of(tmp_path / 'out')) == 2
    if script is CLS:
        assert checkpoint_of(tmp_path / 'out')['classes'] == names
        assert log_of(tmp_path / 'out')[-1]['test_images'] == 10


# ---- speed ---------------------------------------------------------------------------------------


@EVERY_SCRIPT
def test_bf16_trains_on_a_cpu(script, data, tmp_path):
    """--amp bf16: the loss is that of full precision to bf16's accuracy."""
    losses = []
    for amp in ('bf16', 'off'):
        train(script, data, tmp_path / amp, PLAIN[script], '--lr 1e-6 --amp', amp)
        losses.append(log_of(tmp_path / amp)[0]['train_loss'])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.03)


class Waits(TorchDispatchMode):
    """Counts the operations for which the host waits for the device's numbers."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten, packet = torch.ops.aten, func.overloadpacket
        indices = args[1] if packet is aten.index else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        waits = packet in (aten._local_scalar_dense, aten.nonzero, aten.is_nonzero, aten.equal)
        self.count += by_mask or waits
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('name', ['masked', 'recon_gt', 'g2sd', 'seg'])
def test_no_step_waits_for_the_device_between_printed_lines(name, data, chain, tmp_path, monkeypatch):
    """Sums stay on the device: more steps between two lines, no more waits."""
    script, flags, _ = RUNS[name]
    train_one_epoch, counts = script.train_one_epoch, []

    def counted(model, teacher, loader, *rest):
        batch = next(iter(loader))
        for steps in (2, 5):  # both print after the first and the last
            with Waits() as waits:
                train_one_epoch(model, teacher, [batch] * steps, *rest)
            counts.append(waits.count)
        raise Reached

    monkeypatch.setattr(script, 'train_one_epoch', counted)
    monkeypatch.setattr(script, 'stop_requested', lambda args: False)  # reads a flag on the CPU
    with pytest.raises(Reached):
        train(script, data, tmp_path, flags.format(**chain.paths))
    assert counts[0] == counts[1] > 0


def test_compiled_networks_learn_the_same_and_keep_their_names(data, chain, tmp_path, monkeypatch):
    """--compile: equal up to rounding, both networks; the checkpoint can be used without the flag."""
    graphs, compile_ = [], torch.compile

    def backend(graph, inputs):
        graphs.append(torch.is_grad_enabled())
        return graph.forward

    def compile_without_kernels(*args, **options):
        return compile_(*args, **{**options, 'backend': backend})

    monkeypatch.setattr(torch, 'compile', compile_without_kernels)
    for flags in ('', '--compile'):
        train(GENERIC, data, tmp_path / flags, '--teacher_path', chain.paths['mae'], flags)
    assert set(graphs) == {True, False}  # the student's with gradients, the teacher's without
    plain, compiled = (checkpoint_of(tmp_path / flags)['model'] for flags in ('', '--compile'))
    assert list(plain) == list(compiled) and largest_difference(plain, compiled) < 1e-4
    graphs.clear()
    train(CLS, data, tmp_path / 'cls', '--compile')
    assert set(graphs) == {True}  # the evaluation in float32 is not compiled again


def test_a_machine_without_git_trains(data, tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    train(GENERIC, data, tmp_path / 'out', PLAIN[GENERIC])
    assert json.loads((tmp_path / 'out/args.json').read_text())['commit'] == 'unknown'
