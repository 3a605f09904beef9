"""What only a GPU can show; `make gpu` runs it. GPU_TEST_DEVICE=cpu tries these tests themselves."""
import importlib.util
import os
import re

import pytest
import torch
from conftest import CLS, DET, GENERIC, SEG, checkpoint_of, command, log_of, run_two_processes, train

DEVICE = os.environ.get('GPU_TEST_DEVICE', 'cuda')
pytestmark = pytest.mark.skipif(DEVICE == 'cuda' and not torch.cuda.is_available(), reason='no GPU')

# without what draws on the device: random erasing, drop path; dropout is off, see `exact`
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
    """float32 without TF32, here and in other processes; no draw of the device."""
    randperm = torch.randperm
    torch.set_float32_matmul_precision('highest')
    monkeypatch.setenv('NVIDIA_TF32_OVERRIDE', '0')
    monkeypatch.setattr(torch.nn.Dropout2d, 'forward', lambda self, x: x)
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
def test_half_precision_is_close(stage, amp, data, teachers, tmp_path, monkeypatch):
    """The first gradient has the direction of float32's; fp16's is the first that does not overflow."""
    if amp == 'fp16' and DEVICE == 'cpu':
        pytest.skip('the GPU\'s')
    runs = [run_stage(stage, data, teachers, tmp_path / kind, DEVICE, '--lr 0 --amp', kind, monkeypatch=monkeypatch)
            for kind in ('off', amp)]
    vectors = [[torch.cat([part.flatten() for part in update]) for update in gradients] for _, gradients in runs]
    step = next(number for number, vector in enumerate(vectors[1]) if vector.isfinite().all())
    assert torch.cosine_similarity(vectors[0][step], vectors[1][step], dim=0) > 0.97


@EVERY_STAGE
def test_a_run_that_was_stopped_goes_on(stage, data, teachers, tmp_path, monkeypatch):
    """Within an epoch or round, in the GPU's own precision: it ends where a run ends that was not stopped."""
    script, asked = STAGES[stage][0], []
    run_stage(stage, data, teachers, tmp_path / 'whole', DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(script, 'stop_requested', lambda args: asked.append(1) or len(asked) == 3)
        run_stage(stage, data, teachers, tmp_path / 'stopped', DEVICE)
    whole, stopped = checkpoint_of(tmp_path / 'whole'), checkpoint_of(tmp_path / 'stopped')
    assert stopped['epoch'] < whole['epoch']
    run_stage(stage, data, teachers, tmp_path / 'stopped', DEVICE, '--resume auto')
    vectors = [torch.cat([value.float().flatten() for value in checkpoint['model'].values()])
               for checkpoint in (whole, stopped, checkpoint_of(tmp_path / 'stopped'))]
    # sums on a GPU come in any order: far less than the way from the stop to the end
    assert (vectors[0] - vectors[2]).norm() < 0.1 * (vectors[0] - vectors[1]).norm()


@EVERY_STAGE
def test_two_processes_on_one_gpu_train_like_one(stage, data, teachers, tmp_path):
    """Over gloo, half the batch each: the mean loss of the epoch, DDP, synchronised BatchNorm."""
    script, flags = STAGES[stage][0], STAGES[stage][1].format(**teachers)
    if stage == 'det':
        pytest.importorskip('pycocotools')
    batch = {'generic': (2, 4), 'pixel': (4, 8), 'cls': (4, 8), 'det': (1, 2), 'seg': (2, 4)}[stage]
    # mixing is a process's own; at a learning rate of 0 dropout does not reach the statistics
    extra = '--amp off' + {'cls': ' --mixup 0 --cutmix 0', 'seg': ' --lr 0'}.get(stage, '')
    words = command(script, data, tmp_path / 'two', flags, extra, f'--device {DEVICE} --batch_size {batch[0]}')
    run_two_processes(tmp_path, {'two': words})
    train(script, data, tmp_path / 'one', flags, extra, f'--device {DEVICE} --batch_size {batch[1]}')
    first = [log_of(tmp_path / name)[0]['train_loss'] for name in ('two', 'one')]
    # detection's regions and segmentation's dropout are drawn by each process
    assert first[0] == pytest.approx(first[1], rel={'det': 0.1, 'seg': 0.01}.get(stage, 1e-3))
    if stage == 'seg' and DEVICE != 'cpu':  # which synchronises no statistics: those of both halves together
        two, one = (checkpoint_of(tmp_path / name)['model'] for name in ('two', 'one'))
        for name in one:
            if 'running' in name:
                torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)
