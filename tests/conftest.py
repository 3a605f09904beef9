"""What all tests need: the scripts and the tools can be imported, torch stays on one core; how to look at a run."""
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tools')]
import models  # noqa: E402

torch.set_num_threads(1)
CLOCK = ('train_seconds', 'train_images_per_second')


@pytest.fixture(autouse=True)
def signals():
    """A training run in this process takes over two signals, which must go on ending the tests."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)
    models.Stop.signal = 0


def environment():
    """Of a process whose bits may be compared with this one's: as many threads, whatever the caller's shell says."""
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'passive'}


def log_of(out):
    return [json.loads(line) for line in (out / 'log.txt').read_text().splitlines()]


def without_clock(lines):
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def checkpoint_of(out, name='checkpoint.pth'):
    return torch.load(out / name, weights_only=True)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def leaves(value, name=''):
    """(name, tensor or plain value) of everything in nested dicts, lists and tuples."""
    if isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f'{name}/{key}')
    else:
        yield name, value


def assert_same_bits(left, right, parts=('model', 'optimizer', 'scaler', 'epoch', 'classes')):
    """Two runs ended with the same model, optimizer and scaler, bit by bit."""
    for part in parts:
        ours, theirs = dict(leaves(left[part])), dict(leaves(right[part]))
        assert list(ours) == list(theirs) and (ours or part == 'scaler')
        for name, value in ours.items():
            same = torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name]
            assert same, f'{part}{name} differs'
