"""What only a GPU can show; `make gpu` runs it. GPU_TEST_DEVICE=cpu tries these tests themselves."""
import importlib.util
import os
import re

import pytest
import torch
from conftest import CLS, DET, GENERIC, SEG, checkpoint_of, command, largest_difference, log_of, run_two_processes, train

DEVICE = os.environ.get('GPU_TEST_DEVICE', 'cuda')
pytestmark = pytest.mark.skipif(DEVICE == 'cuda' and not torch.cuda.is_available(), reason='no GPU')

# random erasing and drop path draw on the device
STAGES = {
    'generic': (GENERIC, '--teacher_path {mae} --accum_iter 2 --batch_size 4'),
    'pixel': (GENERIC, '--target pixel'),
    'cls': (CLS, '--finetune {feature} --teacher_path {teacher} --reprob 0'),
    'det': (DET, '--finetune {feature} --teacher_path {det_teacher} --drop_path 0 --distill_warmup 1'),
    'seg': (SEG, '--finetune {feature} --teacher_path {seg_teacher} --drop_path 0'),
}
TEACHERS = {
    'mae': (GENERIC, '--target pixel --model mae_vit_nano_patch8'),
    'feature': (GENERIC, '--teacher_path {mae}'),
    'teacher': (CLS, '--model vit_nano_patch8 --finetune {mae}'),
    'seg_teacher': (SEG, '--model vit_nano_patch8 --finetune {mae}'),
    'det_teacher': (DET, ''),
}
EVERY_STAGE = pytest.mark.parametrize('stage', STAGES)


@pytest.fixture(scope='module')
def teachers(data, tmp_path_factory):
    """{name: checkpoint}, made on the CPU; without pycocotools none of detection."""
    folder = tmp_path_factory.mktemp('teachers')
    paths = {name: folder / name / 'checkpoint.pth' for name in TEACHERS}
    for name, (script, flags) in TEACHERS.items():
        if script is not DET or importlib.util.find_spec('pycocotools'):
            train(script, data, folder / name, flags.format(**paths))
    return paths


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """float32 without TF32, and the random choices of detection from the CPU's generator."""
    randperm = torch.randperm
    monkeypatch.setattr(torch, 'set_float32_matmul_precision', lambda _: None)
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    monkeypatch.setattr(torch, 'randperm', lambda n, device=None: randperm(n).to(device))


def run_stage(stage, data, teachers, out, device, *flags, monkeypatch=None):
    """A run's log, if it came to one, and with monkeypatch the gradients of its updates."""
    script, gradients, clip = STAGES[stage][0], [], torch.nn.utils.clip_grad_norm_
    if stage == 'det':
        pytest.importorskip('pycocotools')

    def record(parameters, *options):
        parameters = list(parameters)
        gradients.append([parameter.grad.cpu() for parameter in parameters if parameter.grad is not None])
        return clip(parameters, *options)

    if monkeypatch:
        monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', record)
    train(script, data, out, STAGES[stage][1].format(**teachers), *flags, '--device', device)
    if monkeypatch:
        monkeypatch.setattr(torch.nn.utils, 'clip_grad_norm_', clip)
    return log_of(out) if (out / 'log.txt').exists() else None, gradients


@EVERY_STAGE
def test_float32_is_the_cpus(stage, data, teachers, tmp_path, monkeypatch):
    """Losses and each parameter's gradient of all updates, at a learning rate of 0."""
    runs = [run_stage(stage, data, teachers, tmp_path / str(number), device, '--amp off --lr 0', monkeypatch=monkeypatch)
            for number, device in enumerate(['cpu', DEVICE])]
    (expected, gradients), (log, ours) = runs
    assert len(log) == len(expected) == 2 and len(ours) == len(gradients) > 1
    for key in expected[-1]:
        if re.match('train_loss|test_loss', key):
            assert log[-1][key] == pytest.approx(expected[-1][key], rel=1e-4), key
    for left, right in zip(ours, gradients):
        assert len(left) == len(right)
        for got, wanted in zip(left, right):
            assert (got - wanted).norm() <= 1e-3 * wanted.norm() + 1e-6


@EVERY_STAGE
@pytest.mark.parametrize('amp', ['bf16', 'fp16'])
def test_half_precision_is_close(stage, amp, data, teachers, tmp_path):
    if amp == 'fp16' and DEVICE == 'cpu':
        pytest.skip('the GPU\'s')
    expected, _ = run_stage(stage, data, teachers, tmp_path / 'off', DEVICE, '--amp off')
    log, _ = run_stage(stage, data, teachers, tmp_path / amp, DEVICE, '--amp', amp)
    for left, right in zip(log, expected, strict=True):
        assert left['train_loss'] == pytest.approx(right['train_loss'], rel=0.05)


@EVERY_STAGE
def test_a_run_that_was_stopped_goes_on(stage, data, teachers, tmp_path, monkeypatch):
    """Within an epoch or round, in the GPU's own precision: the weights of a run that was not stopped."""
    script, asked = STAGES[stage][0], []
    run_stage(stage, data, teachers, tmp_path / 'whole', DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(script, 'stop_requested', lambda args: asked.append(1) or len(asked) == 3)
        run_stage(stage, data, teachers, tmp_path / 'stopped', DEVICE)
    stopped = checkpoint_of(tmp_path / 'stopped')
    assert stopped['epoch'] < checkpoint_of(tmp_path / 'whole')['epoch']
    run_stage(stage, data, teachers, tmp_path / 'stopped', DEVICE, '--resume auto')
    whole, resumed = (checkpoint_of(tmp_path / name)['model'] for name in ('whole', 'stopped'))
    assert largest_difference({key: value.float() for key, value in whole.items()}, resumed) < 1e-3


@EVERY_STAGE
def test_two_processes_on_one_gpu_train_like_one(stage, data, teachers, tmp_path):
    """Over gloo, half the batch each: the mean loss of the epoch, DDP, synchronised BatchNorm."""
    script, flags = STAGES[stage][0], STAGES[stage][1].format(**teachers)
    if stage == 'det':
        pytest.importorskip('pycocotools')
    batch = {'generic': (2, 4), 'pixel': (4, 8), 'cls': (4, 8), 'det': (1, 2), 'seg': (2, 4)}[stage]
    extra = '--amp off --mixup 0 --cutmix 0' if stage == 'cls' else '--amp off'  # mixing is a process's own
    words = command(script, data, tmp_path / 'two', flags, extra, f'--device {DEVICE} --batch_size {batch[0]}')
    run_two_processes(tmp_path, {'two': words})
    train(script, data, tmp_path / 'one', flags, extra, f'--device {DEVICE} --batch_size {batch[1]}')
    first = [log_of(tmp_path / name)[0]['train_loss'] for name in ('two', 'one')]
    # the samples of detection's regions are drawn by process
    assert first[0] == pytest.approx(first[1], rel=0.1 if stage == 'det' else 1e-3)
