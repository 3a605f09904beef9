"""What the tests share: drawn data, tiny runs of the scripts in this process or two, how to look at a run."""
import json
import multiprocessing
import operator
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]

import generic_distill as GENERIC  # noqa: E402
import models  # noqa: E402
import specific_distill_cls as CLS  # noqa: E402
import specific_distill_det as DET  # noqa: E402
import specific_distill_seg as SEG  # noqa: E402
import toy_data  # noqa: E402

torch.set_num_threads(1)
CLOCK = ('train_seconds',)
HANDLERS = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
NAMES = {GENERIC: 'generic', CLS: 'cls', DET: 'det', SEG: 'seg'}
EVERY_SCRIPT = pytest.mark.parametrize('script', NAMES, ids=NAMES.values())
FOLDER = {GENERIC: 'imagenet', CLS: 'imagenet', DET: 'coco', SEG: 'ade'}
COMMON = '--lr 1e-3 --num_workers 0 --device cpu'
EPOCHS = f'--input_size 16 --batch_size 8 --accum_iter 1 --epochs 2 --warmup_epochs 1 {COMMON}'
ROUNDS = f'--batch_size 2 --iterations 4 --eval_every 2 --warmup_iterations 1 {COMMON}'
TINY = {
    GENERIC: f'--model mae_vit_pico_patch8 {EPOCHS}',
    CLS: f'--model vit_pico_patch8 {EPOCHS}',
    DET: '--model vit_pico_patch8 --input_size 64 --window_size 4 --fpn_dim 16 --head_dim 32 --anchor_size 8 '
         f'--proposals 20 --roi_batch 16 {ROUNDS}',
    SEG: f'--model vit_pico_patch8 --input_size 32 {ROUNDS}',
}


@pytest.fixture(autouse=True)
def signals():
    """A run in this process takes over three signals, and leaves data workers behind if it fails."""
    yield
    if multiprocessing.active_children():
        models.kill_workers()
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """Drawn: 48 pictures of 12 classes to train on and 12 to evaluate on; 4 and 3 scenes."""
    folder = tmp_path_factory.mktemp('data')
    words = f'--out {folder} --size 24 --train 48 --val 12 --scenes 4 --val_scenes 3 --scene_size 64'
    toy_data.main(toy_data.get_args_parser().parse_args(words.split()))
    return folder


def command(script, data, out, *flags):
    """Words of a command line with tiny settings. flags: words, or several in one string."""
    words = ['--output_dir', str(out), '--data_path', str(data / FOLDER[script]), *TINY[script].split()]
    for flag in flags:
        words += str(flag).split()
    return [script.__file__, *words]


def parse(script, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [str(word) for word in words])
        return script.parse_args(script.get_args_parser())


def run(script, *words):
    """A command line in this process."""
    script.stop_signal.clear()
    script.main(parse(script, *words))


def train(script, data, out, *flags):
    run(script, *command(script, data, out, *flags))


def evaluate_alone(script, data, checkpoint, *flags):
    """Statistics of --eval --resume in this process, without any flag about sizes."""
    seen, evaluate = [], script.evaluate
    words = f'--eval --data_path {data / FOLDER[script]} --batch_size 3 --num_workers 0 --device cpu'.split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, 'evaluate', lambda *args: seen.append(evaluate(*args)))
        run(script, script.__file__, *words, '--resume', checkpoint, *flags)
    return seen[0]


def scores_of(results):
    """The scores in a file of detections."""
    return [entry['score'] for entry in json.loads(results.read_text())]


def environment():
    """Of a process whose bits may be compared with this one's: as many threads, whatever the shell says."""
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'passive',
            'PYTHONPATH': str(ROOT)}


# the jobs share one process group; what a process prints goes to NAME.RANK.txt. Where there is a GPU both
# use it, over gloo: NCCL has no group of two on one
LAUNCHER = """import contextlib, json, os, pathlib, runpy, sys
import torch.distributed as dist
start, stop, os.environ['LOCAL_RANK'] = dist.init_process_group, dist.destroy_process_group, '0'
dist.init_process_group = lambda *args, **options: dist.is_initialized() or start('gloo', **options)
dist.destroy_process_group = lambda: None
for name, sys.argv in json.loads(pathlib.Path('jobs.json').read_text()):
    with open(f'{name}.{os.environ["RANK"]}.txt', 'w') as file:
        with contextlib.redirect_stdout(file):
            runpy.run_path(sys.argv[0], run_name='__main__')
        file.write('came to its end')
stop()
"""


def start_two_processes(folder, jobs):
    """torchrun with two processes, which run {name: command line} one after the other."""
    (folder / 'launcher.py').write_text(LAUNCHER)
    (folder / 'jobs.json').write_text(json.dumps(list(jobs.items())))
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    return subprocess.Popen([*torchrun, 'launcher.py'], cwd=folder, env=environment(), start_new_session=True,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def run_two_processes(folder, jobs):
    process = start_two_processes(folder, jobs)
    try:
        printed, _ = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail('the processes wait for each other')
    assert process.returncode == 0, printed[-4000:]


def log_of(out):
    return [json.loads(line) for line in (out / 'log.txt').read_text().splitlines()]


def without_clock(lines):
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def checkpoint_of(out, name='checkpoint.pth'):
    return torch.load(out / name, weights_only=True)


def contents(folder):
    """{name: bytes} of all files in and below a folder."""
    files = [path for path in folder.rglob('*') if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def leaves(value, name=''):
    """(name, tensor or plain value) of everything in nested dicts, lists and tuples."""
    if isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f'{name}/{key}')
    else:
        yield name, value


def assert_same_bits(left, right, parts=('model', 'optimizer', 'scaler', 'epoch', 'classes')):
    """Two checkpoints hold the same model, optimizer and scaler, bit by bit."""
    for part in parts:
        ours, theirs = dict(leaves(left[part])), dict(leaves(right[part]))
        assert list(ours) == list(theirs) and (ours or part == 'scaler')
        for name, value in ours.items():
            equal = torch.equal if isinstance(value, torch.Tensor) else operator.eq
            assert equal(value, theirs[name]), f'{part}{name} differs'


def largest_difference(left, right):
    """Of two state dicts."""
    return max((left[name] - right[name]).abs().max().item() for name in left)


def assert_same_run(left, right):
    """Two output folders hold the same bits and the same log."""
    assert_same_bits(checkpoint_of(left), checkpoint_of(right))
    assert without_clock(log_of(left)) == without_clock(log_of(right))
