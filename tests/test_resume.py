"""Interruptions cost no sample and no bit: signals, kills, damaged files, other numbers of processes; and repeats.

The oracle is the same command that nothing interrupts.
"""
import json
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import (CLS, DET, EVERY_SCRIPT, GENERIC, NAMES, SEG, assert_same_bits, assert_same_run,
                      checkpoint_of, command, contents, environment, log_of, run, run_two_processes,
                      start_two_processes, train, without_clock)

import models

KILLS = int(os.environ.get('KILLS', 5))
# all that is random is on: crops, masks, mixup, erasing, stochastic depth, dropout
FLAGS = {
    GENERIC: '--target pixel --batch_size 4 --accum_iter 2 --print_freq 3',
    CLS: '--batch_size 4 --accum_iter 2 --drop_path 0.1 --print_freq 3',
    DET: '--batch_size 1 --accum_iter 2 --iterations 4',
    SEG: '--accum_iter 2 --iterations 4',
}
UPDATES = {GENERIC: 12, CLS: 12, DET: 4, SEG: 4}
STOPPED = 'stopped by a signal: --resume auto goes on from here'


def start(script, data, out, *more):
    """In this process, with --resume auto."""
    train(script, data, out, FLAGS[script], '--resume auto', *more)


@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):
    """script -> folder of its run that nothing interrupts, with a checkpoint of the first epoch (or round), too."""
    folder = tmp_path_factory.mktemp('whole')
    for script in NAMES:
        start(script, data, folder / NAMES[script], '--save_every 1')
    return {script: folder / name for script, name in NAMES.items()}


@pytest.fixture
def after_updates(monkeypatch):
    """A function that lets an action follow each update of a script, before the run looks for signals."""
    def patch(script, action):
        backward = script.backward

        def acting(loss, model, optimizer, scaler, step, args):
            norm = backward(loss, model, optimizer, scaler, step, args)
            if norm is not None:
                action(step)
            return norm

        monkeypatch.setattr(script, 'backward', acting)
    return patch


@pytest.fixture
def reads(monkeypatch):
    """The (pass, index) of all samples that this process reads, in order."""
    read, getitem = [], models.SeededDataset.__getitem__
    monkeypatch.setattr(models.SeededDataset, '__getitem__', lambda self, key: (read.append(key), getitem(self, key))[1])
    return read


# ---- within an epoch -----------------------------------------------------------------------------


@EVERY_SCRIPT
def test_a_run_that_is_stopped_at_every_update_ends_with_the_same_bits(
        script, data, whole, tmp_path, after_updates, capsys):
    """In accumulation and at the last update of an epoch, too; the log is that of the whole run."""
    after_updates(script, lambda step: script.stop_signal.set())
    stops = 0
    while True:
        start(script, data, tmp_path)
        if STOPPED not in capsys.readouterr().out:
            break
        stops += 1
    assert stops == UPDATES[script] - 2  # at the end of an epoch, one more update is made
    assert_same_run(tmp_path, whole[script])


@EVERY_SCRIPT
def test_a_run_goes_on_from_the_end_of_an_epoch_with_the_same_bits(script, data, whole, tmp_path):
    """--resume of a checkpoint that --save_every kept, into a folder of its own, with data workers."""
    train(script, data, tmp_path, FLAGS[script], '--num_workers 1 --resume', whole[script] / 'checkpoint-0.pth')
    assert_same_bits(checkpoint_of(tmp_path), checkpoint_of(whole[script]))
    # the evaluation of the finished epoch and its line are made again
    assert without_clock(log_of(tmp_path)) == without_clock(log_of(whole[script]))


def test_ctrl_c_stops_like_sigterm_and_a_second_one_quits_at_once(data, whole, tmp_path, after_updates, capsys):
    after_updates(GENERIC, lambda step: step == 3 and signal.raise_signal(signal.SIGINT))
    start(GENERIC, data, tmp_path)
    assert capsys.readouterr().out.splitlines()[-1] == STOPPED
    stopped = checkpoint_of(tmp_path)
    assert (stopped['epoch'], stopped['samples']) == (-1, 16)
    after_updates(GENERIC, lambda step: step == 7 and signal.raise_signal(signal.SIGINT))
    after_updates(GENERIC, lambda step: step == 7 and signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        start(GENERIC, data, tmp_path)
    assert checkpoint_of(tmp_path)['samples'] == 16


@pytest.mark.parametrize('flags', ['--batch_size 8', '--accum_iter 1', '--batch_size 2 --accum_iter 8'])
def test_a_stop_within_an_epoch_goes_on_under_another_batch_with_every_sample_read_once(
        flags, data, tmp_path, after_updates, monkeypatch, reads):
    after_updates(GENERIC, lambda step: step == 3 and GENERIC.stop_signal.set())
    start(GENERIC, data, tmp_path)
    monkeypatch.undo()
    assert len(reads) == checkpoint_of(tmp_path)['samples'] == 16


def sampler(rank=0, world_size=1, length=48, batch_size=4, accum_iter=2, **rounds):
    args = SimpleNamespace(seed=0, rank=rank, world_size=world_size, batch_size=batch_size, accum_iter=accum_iter)
    return models.SeededSampler(length, args, **rounds)


@pytest.mark.parametrize('rounds', [{}, {'round_updates': 7, 'total_updates': 12}])
@pytest.mark.parametrize('world_size, batch_size, accum_iter', [(2, 4, 1), (4, 1, 2), (1, 16, 1), (2, 2, 4)])
def test_the_rest_of_an_epoch_is_read_once_by_any_number_of_processes(rounds, world_size, batch_size, accum_iter):
    """After 16 samples on one process: the others in any split, at each step the next ones, in the same order."""
    whole = sampler(**rounds)
    whole.set_epoch(0)
    expected = list(whole)
    rest = []
    for rank in range(world_size):
        share = sampler(rank, world_size, batch_size=batch_size, accum_iter=accum_iter, **rounds)
        begin = share.set_epoch(0, done=16)
        rest.append(list(share))
        assert (len(share) // batch_size - begin) * batch_size == len(rest[-1])
    together = [key for keys in zip(*rest, strict=True) for key in keys]
    if not rounds:
        assert len(set(expected)) == len(expected) == 48
    left = len(expected) - 16
    used = left - left % (world_size * batch_size * accum_iter)
    assert together[:used] == expected[16:16 + used]


# ---- ends of epochs, files -----------------------------------------------------------------------


@pytest.mark.parametrize('script', [CLS, DET, SEG], ids=['cls', 'det', 'seg'])
def test_an_evaluation_that_was_interrupted_is_made_again(script, data, whole, tmp_path, monkeypatch):
    """The checkpoint is written before it, so no step is trained again."""
    evaluate, calls = script.evaluate, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(script, 'evaluate', interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(script, data, tmp_path)
    assert checkpoint_of(tmp_path)['epoch'] == 1 and len(log_of(tmp_path)) == 1
    monkeypatch.setattr(script, 'backward', lambda *_: pytest.fail('trained again'))
    start(script, data, tmp_path)
    assert len(calls) == 3
    assert_same_run(tmp_path, whole[script])


@EVERY_SCRIPT
def test_a_finished_run_is_evaluated_again_and_stays_as_it_is(script, data, whole, tmp_path, monkeypatch, capsys):
    start(script, data, tmp_path)
    log = (tmp_path / 'log.txt').read_text()
    monkeypatch.setattr(script, 'backward', lambda *_: pytest.fail('trained again'))
    capsys.readouterr()
    start(script, data, tmp_path)
    assert (tmp_path / 'log.txt').read_text() == log
    assert_same_run(tmp_path, whole[script])
    assert capsys.readouterr().out.count('\ntest: ') == (script is not GENERIC)


@pytest.mark.parametrize('damage', ['truncated', 'empty', 'missing'])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before_it(damage, data, whole, tmp_path, capsys):
    """--resume auto says so in one line, and ends with the same bits."""
    start(CLS, data, tmp_path)
    content = (tmp_path / 'checkpoint.pth').read_bytes()
    (tmp_path / 'checkpoint.pth').unlink()
    if damage != 'missing':
        (tmp_path / 'checkpoint.pth').write_bytes(content[:-3000] if damage == 'truncated' else b'')
    capsys.readouterr()
    start(CLS, data, tmp_path)
    printed = capsys.readouterr().out.splitlines()
    warned = [line for line in printed if line.startswith('warning: ')]
    assert len(warned) == (damage != 'missing') and all('checkpoint.pth is no readable' in line for line in warned)
    assert f'resumed {tmp_path}/previous.pth: 1 epochs or rounds and 0 samples are done' in printed
    assert_same_run(tmp_path, whole[CLS])
    for name in ('checkpoint.pth', 'previous.pth'):
        (tmp_path / name).write_bytes(b'damaged')
    with pytest.raises(SystemExit, match='previous.pth is no readable'):
        start(CLS, data, tmp_path)


def test_a_flag_changed_on_resume_is_used(data, whole, tmp_path):
    """Learning rate, weight decay and epochs by hand win over what the checkpoint holds."""
    train(GENERIC, data, tmp_path, FLAGS[GENERIC], '--resume', whole[GENERIC] / 'checkpoint.pth',
          '--epochs 3 --lr 2e-3 --weight_decay 0.3')
    groups = checkpoint_of(tmp_path)['optimizer']['param_groups']
    assert {group['weight_decay'] for group in groups} == {0.0, 0.3}
    assert [line['epoch'] for line in log_of(tmp_path)] == [1, 2]
    last = 2e-3 * (1 + torch.tensor(torch.pi * (2 + 10 / 12 - 1) / 2).cos().item()) / 2
    assert log_of(tmp_path)[-1]['train_lr'] == pytest.approx(last, rel=1e-5)


# ---- real signals and kills ----------------------------------------------------------------------

LONG = f'--epochs {4 + 2 * KILLS} --warmup_epochs 1 --num_workers 1'


@pytest.fixture(scope='module')
def long_run(data, tmp_path_factory):
    """Folder of a run of 14 epochs with data workers that nothing interrupts."""
    out = tmp_path_factory.mktemp('long')
    start(CLS, data, out, LONG)
    return out


def wait_for(condition, process=None):
    end = time.time() + 100
    while not condition():
        assert time.time() < end and (process is None or process.poll() is None)
        time.sleep(0.001)


def test_a_real_signal_stops_a_process_with_status_0_and_its_workers_go_with_it(data, long_run, tmp_path):
    """As a cluster sends it: to the process and its data workers."""
    words = [sys.executable, *command(CLS, data, tmp_path, FLAGS[CLS], LONG, '--resume auto')]
    process = subprocess.Popen(words, env=environment(), start_new_session=True, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in process.stdout:
        if ' epoch 1/14 step 3/' in line:
            break
    os.killpg(process.pid, signal.SIGTERM)
    printed, errors = process.communicate(timeout=100)
    assert process.returncode == 0 and errors == '' and printed.splitlines()[-1] == STOPPED
    with pytest.raises(ProcessLookupError):  # nothing is left of the group
        os.killpg(process.pid, 0)
    assert len(log_of(tmp_path)) < 14
    start(CLS, data, tmp_path, LONG)
    assert_same_run(tmp_path, long_run)


def test_kills_at_random_times_cost_nothing(data, long_run, tmp_path):
    """SIGKILL at any time, in a write of the checkpoint, too: the same command goes on to the same bits.

    KILLS in the environment sets the number. Each process is a fork of this one with data workers.
    """
    draw, newest = random.Random(KILLS), tmp_path / 'checkpoint.pth'

    def changed():
        return newest.stat().st_mtime_ns if newest.exists() else 0

    for kill in [*range(KILLS), None]:
        before, child = changed(), os.fork()
        if child == 0:
            code = 1
            try:
                start(CLS, data, tmp_path, LONG)
                code = 0
            finally:
                os._exit(code)
        if kill is not None:
            wait_for(lambda: changed() != before)
            time.sleep(draw.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) == (kill is not None)
    assert status == 0
    assert_same_run(tmp_path, long_run)


# ---- two processes -------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def two_processes(data, whole, tmp_path_factory):
    """Runs of torchrun with two processes: one that a signal stops, then that and others on to their ends."""
    folder = tmp_path_factory.mktemp('two')

    def job(script, name, *flags):
        return command(script, data, folder / name, FLAGS[script], *flags)

    long = (*LONG.split(), '--resume', 'auto')
    process = start_two_processes(folder, {'stopped': job(GENERIC, 'stopped', *long)})
    printed = folder / 'stopped.0.txt'
    wait_for(lambda: printed.exists() and 'epoch 1/14 step 3/' in printed.read_text(), process)
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    stopped = {'output': output, 'checkpoint': checkpoint_of(folder / 'stopped'), 'epochs': len(log_of(folder / 'stopped')),
               'printed': [(folder / f'stopped.{rank}.txt').read_text() for rank in (0, 1)]}
    jobs = {'resumed': job(GENERIC, 'stopped', *long), 'whole': job(GENERIC, 'whole', *long),
            'more': job(GENERIC, 'more', '--resume auto')}
    for script in (DET, SEG):
        name = NAMES[script]
        jobs[name] = job(script, name, '--save_every 1')
        jobs[f'{name}_resumed'] = job(script, f'{name}_resumed', '--resume', folder / name / 'checkpoint-0.pth')
    run_two_processes(folder, jobs)
    return SimpleNamespace(folder=folder, **stopped)


def test_a_signal_to_the_group_of_two_processes_stops_both_at_the_same_update(two_processes):
    """torchrun passes it on to both, and to their data workers; each comes to its end by itself."""
    assert two_processes.printed[0].endswith(f'{STOPPED}\ncame to its end')
    assert two_processes.printed[1] == 'came to its end'
    assert two_processes.checkpoint['samples'] % 16 == 0 and two_processes.epochs < 14
    assert_same_run(two_processes.folder / 'stopped', two_processes.folder / 'whole')


@pytest.mark.parametrize('name', ['det', 'seg'])
def test_two_processes_go_on_from_the_end_of_a_round_with_the_same_bits(name, two_processes):
    whole, resumed = two_processes.folder / name, two_processes.folder / f'{name}_resumed'
    assert checkpoint_of(whole)['args']['world_size'] == 2
    assert_same_run(resumed, whole)


# ---- repeats -------------------------------------------------------------------------------------


@EVERY_SCRIPT
def test_args_json_holds_the_flags_as_given_and_the_origin_of_the_run(script, whole):
    stored = json.loads((whole[script] / 'args.json').read_text())
    origin = [stored.pop(name) for name in ('commit', 'versions', 'hardware')]
    words = command(script, whole[script], whole[script], FLAGS[script], '--resume auto --save_every 1')[1:]
    given = vars(script.get_args_parser().parse_args(words))
    assert stored == {**given, 'data_path': stored['data_path']}
    assert len(origin[0]) >= 7 and f'torch {torch.__version__}, ' in origin[1] and origin[2] == '1 x cpu'


@EVERY_SCRIPT
def test_args_json_repeats_a_run_and_flags_by_hand_win(script, whole, tmp_path):
    """--config: the values of another run, but for its folder and its --resume; another seed is another run."""
    config = ('--config', whole[script] / 'args.json', '--output_dir')
    run(script, script.__file__, *config, tmp_path / 'same')
    assert_same_run(tmp_path / 'same', whole[script])
    run(script, script.__file__, *config, tmp_path / 'seed', '--seed', 1)
    first, other = checkpoint_of(whole[script])['model'], checkpoint_of(tmp_path / 'seed')['model']
    assert max((first[name] - other[name]).abs().max() for name in first) > 1e-3
    assert checkpoint_of(tmp_path / 'seed')['args']['seed'] == 1


def test_args_json_repeats_a_run_in_another_process(whole, tmp_path):
    words = [sys.executable, CLS.__file__, '--config', whole[CLS] / 'args.json', '--output_dir', tmp_path]
    subprocess.run(words, env={**environment(), 'PYTHONHASHSEED': '7'}, check=True, timeout=100, capture_output=True)
    assert_same_run(tmp_path, whole[CLS])
