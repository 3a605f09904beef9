"""README's example of a fork, run as it stands: a copy of stage 1 with another loss."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, checkpoint_of, environment, log_of

import generic_distill
import models
import specific_distill_cls
import toy_data


@pytest.fixture(scope='module')
def fork(tmp_path_factory):
    """A folder with the project's programs, a small stand-in for `make demo`, and what README's lines made of it."""
    home = tmp_path_factory.mktemp('fork')
    for path in [*ROOT.glob('*.py'), ROOT / 'tools']:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, home / path.name)
    toy_data.main(toy_data.get_args_parser().parse_args(
        ['--out', str(home / 'runs/toy/data'), '--only', 'imagenet', '--size', '16', '--train', '48', '--val', '24']))

    def run(script, out, *flags):
        words = ['--data_path', home / 'runs/toy/data/imagenet', '--input_size', 16, '--batch_size', 16, '--epochs', 3,
                 '--warmup_epochs', 1, '--lr', 1e-3, '--num_workers', 0, '--device', 'cpu', '--output_dir', toy / out,
                 *flags]
        script.main(script.get_args_parser().parse_args([str(word) for word in words]))
        return toy / out / 'checkpoint.pth'

    toy, mae, student = home / 'runs/toy', 'mae_vit_nano_patch8_dec64d2b', 'mae_vit_pico_patch8_dec32d2b'
    teacher = run(generic_distill, 'teacher_mae', '--accum_iter', 1, '--target', 'pixel', '--model', mae)
    generic = run(generic_distill, 'seed0/generic', '--accum_iter', 1, '--model', student, '--teacher_path', teacher)
    classifier = run(specific_distill_cls, 'teacher_cls', '--model', 'vit_nano_patch8', '--finetune', teacher)
    run(specific_distill_cls, 'seed0/g2sd', '--model', 'vit_pico_patch8', '--finetune', generic,
        '--teacher_path', classifier)
    section = (ROOT / 'README.md').read_text().split('\n## Fork\n')[1]
    lines = re.search(r'^```bash\n(.*?)^```', section, re.S | re.M)[1]
    # diff ends with 1 where files differ
    script = 'set -e\n' + re.sub(r'^(diff .*)$', r'\1 > fork.diff || true', lines, flags=re.M)
    environ = {**environment(), 'PATH': f'{Path(sys.executable).parent}:{environment()["PATH"]}'}
    done = subprocess.run(['bash', '-c', script], cwd=home, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return home


def test_the_copy_differs_in_one_line(fork):
    """README, Fork: the loss can be changed where it is used, by one line."""
    changes = [line for line in (fork / 'fork.diff').read_text().splitlines() if line[:1] in '<>']
    assert len(changes) == 2 and changes[0].startswith('<     return F.smooth_l1_loss') and 'cosine' in changes[1]
    subprocess.run(['git', 'apply', ROOT / 'docs/forks/cosine.diff'], cwd=fork, check=True)  # the same example
    assert (fork / 'generic_distill.py').read_bytes() == (fork / 'cosine_distill.py').read_bytes()


def test_the_copy_minimises_its_own_loss_in_a_folder_of_its_own(fork):
    """README, Fork: it trains, on the cosine, from the demo's arguments; the demo's run stays as it was."""
    cosine, plain = log_of(fork / 'runs/toy/cosine'), log_of(fork / 'runs/toy/seed0/generic')
    assert len(cosine) == len(plain) == 3 and cosine[-1]['train_loss'] < cosine[0]['train_loss']
    stored = [json.loads((fork / f'runs/toy/{name}/args.json').read_text()) for name in ('cosine', 'seed0/generic')]
    assert {name for name in stored[0] if stored[0][name] != stored[1][name]} <= {
        'output_dir', 'config', 'commit', 'script'}
    assert stored[0]['script'].endswith('cosine_distill.py')
    teacher = models.load_teacher(models.create_mae('mae_vit_nano_patch8_dec64d2b', 16),
                                  fork / 'runs/toy/teacher_mae/checkpoint.pth')
    student = models.create_mae('mae_vit_pico_patch8_dec32d2b', 16, 64).eval()
    torch.manual_seed(0)
    images, masking = torch.randn(64, 3, 16, 16), models.random_masking(torch.rand(64, 4), 0.75)
    with torch.no_grad():
        target = F.layer_norm(teacher.decoder_features(images, masking, 1), (64,), eps=1e-6)
        untrained = student.predict_features(images, masking)
        student.load_state_dict(checkpoint_of(fork / 'runs/toy/cosine')['model'])
        trained = student.predict_features(images, masking)
    distances = [1 - F.cosine_similarity(pred.double(), target.double(), dim=-1).mean() for pred in (untrained, trained)]
    assert distances[1] < distances[0]


def test_stage_2_starts_from_the_copys_student(fork):
    """README, Fork: what the copy writes is a stage-1 checkpoint like any other."""
    args = json.loads((fork / 'runs/toy/cosine_g2sd/args.json').read_text())
    assert args['finetune'] == 'runs/toy/cosine/checkpoint.pth'
    assert args['teacher_path'] == str(fork / 'runs/toy/teacher_cls/checkpoint.pth')
    assert 'test_acc1' in log_of(fork / 'runs/toy/cosine_g2sd')[-1]
