"""Interruptions cost no sample and no bit: signals, kills, damaged files, other processes; and repeats.

The oracle is the same command that nothing interrupts.
"""
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import (CLS, DET, EVERY_SCRIPT, GENERIC, NAMES, SEG, assert_same_bits, assert_same_run,
                      checkpoint_of, command, environment, evaluate_alone, largest_difference, log_of, parse,
                      run, run_two_processes, scores_of, start_two_processes, train, without_clock)

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
    """script -> folder of its run that nothing interrupts, with a checkpoint of its first epoch, too."""
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

    def noting(self, key):
        read.append(key)
        return getitem(self, key)

    monkeypatch.setattr(models.SeededDataset, '__getitem__', noting)
    return read


# ---- within an epoch -----------------------------------------------------------------------------


@EVERY_SCRIPT
def test_a_run_that_is_stopped_at_every_update_ends_with_the_same_bits(
        script, data, whole, tmp_path, after_updates, capsys):
    """In accumulation and at the last update of an epoch, too; the log is that of the whole run."""
    after_updates(script, lambda step: script.stop_signal.set())
    stops = 0
    while stops < UPDATES[script]:
        start(script, data, tmp_path)
        if STOPPED not in capsys.readouterr().out:
            break
        stops += 1
    assert stops == UPDATES[script] - 2  # at the end of an epoch, one more update is made
    assert_same_run(tmp_path, whole[script])


@EVERY_SCRIPT
def test_a_run_goes_on_from_the_end_of_an_epoch_with_the_same_bits(script, data, whole, tmp_path):
    """--resume of a checkpoint that --save_every kept, into a folder of its own, with data workers."""
    first = whole[script] / 'checkpoint-0.pth'
    train(script, data, tmp_path, FLAGS[script], '--num_workers 1 --resume', first)
    assert_same_bits(checkpoint_of(tmp_path), checkpoint_of(whole[script]))
    # the evaluation of the finished epoch and its line are made again
    assert without_clock(log_of(tmp_path)) == without_clock(log_of(whole[script]))


def test_ctrl_c_stops_like_sigterm_and_a_second_one_quits_at_once(data, tmp_path, after_updates, capsys):
    def interrupt(step):
        for _ in range({3: 1, 7: 2}.get(step, 0)):
            signal.raise_signal(signal.SIGINT)

    after_updates(GENERIC, interrupt)
    start(GENERIC, data, tmp_path)
    assert capsys.readouterr().out.splitlines()[-1] == STOPPED
    with pytest.raises(KeyboardInterrupt):
        start(GENERIC, data, tmp_path)
    checkpoint = checkpoint_of(tmp_path)
    assert (checkpoint['epoch'], checkpoint['samples']) == (-1, 16)


@pytest.mark.parametrize('flags', ['--batch_size 8', '--accum_iter 1', '--batch_size 2 --accum_iter 8'])
def test_a_stop_within_an_epoch_goes_on_under_another_batch(flags, data, tmp_path, after_updates, reads):
    """Every sample of the epoch is read once."""
    after_updates(GENERIC, lambda step: len(reads) == 16 and GENERIC.stop_signal.set())
    start(GENERIC, data, tmp_path)
    assert len(reads) == checkpoint_of(tmp_path)['samples'] == 16
    start(GENERIC, data, tmp_path, flags)
    for epoch in (0, 1):
        assert sorted(index for number, index in reads if number == epoch) == list(range(48))


def samples_of(done, rank, world_size, batch_size, accum_iter, rounds):
    """What one process reads of the first epoch (or round) when `done` samples of it are done."""
    args = SimpleNamespace(
        seed=0, rank=rank, world_size=world_size, batch_size=batch_size, accum_iter=accum_iter)
    sampler = models.SeededSampler(48, args, **rounds)
    start = sampler.set_epoch(0, done)
    samples = list(sampler)
    assert len(sampler) == (start * batch_size + len(samples))
    return samples


@pytest.mark.parametrize('rounds', [{}, {'round_updates': 7, 'total_updates': 12}], ids=['epoch', 'round'])
@pytest.mark.parametrize('world_size, batch_size, accum_iter', [(2, 4, 1), (4, 1, 2), (2, 4, 2), (4, 4, 1)])
def test_any_number_of_processes_reads_the_rest_of_an_epoch_once(rounds, world_size, batch_size, accum_iter):
    """After 16 samples: at each step all processes together read the next ones, as one process would."""
    expected = samples_of(0, 0, 1, world_size * batch_size, accum_iter, rounds)
    shares = [samples_of(16, rank, world_size, batch_size, accum_iter, rounds) for rank in range(world_size)]
    assert [key for keys in zip(*shares, strict=True) for key in keys] == expected[16:]
    first_pass = [index for number, index in expected if number == 0]
    assert sorted(first_pass) == list(range(48))


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
def test_a_finished_run_is_evaluated_again_and_stays_as_it_is(
        script, data, whole, tmp_path, monkeypatch, capsys):
    shutil.copytree(whole[script], tmp_path, dirs_exist_ok=True)
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
    shutil.copytree(whole[CLS], tmp_path, dirs_exist_ok=True)
    content = (tmp_path / 'checkpoint.pth').read_bytes()
    (tmp_path / 'checkpoint.pth').unlink()
    if damage != 'missing':
        (tmp_path / 'checkpoint.pth').write_bytes(content[:-3000] if damage == 'truncated' else b'')
    capsys.readouterr()
    start(CLS, data, tmp_path)
    printed = capsys.readouterr().out.splitlines()
    warned = [line for line in printed if line.startswith('warning: ')]
    assert len(warned) == (damage != 'missing')
    assert all('checkpoint.pth is no readable' in line for line in warned)
    assert any(re.match('resumed .*/previous.pth: 1 epochs', line) for line in printed)
    assert_same_run(tmp_path, whole[CLS])
    for name in ('checkpoint.pth', 'previous.pth'):
        (tmp_path / name).write_bytes(b'damaged')
    with pytest.raises(SystemExit, match='previous.pth is no readable'):
        start(CLS, data, tmp_path)


def test_a_flag_changed_on_resume_is_used_and_named(data, whole, tmp_path, capsys):
    """Learning rate, weight decay, epochs and precision by hand win over what the checkpoint holds."""
    train(GENERIC, data, tmp_path, FLAGS[GENERIC], '--resume', whole[GENERIC] / 'checkpoint.pth',
          '--epochs 3 --lr 2e-3 --weight_decay 0.3 --amp fp16')
    changed = re.search('^resumed .* samples are done; (.*)', capsys.readouterr().out, re.M)[1]
    before = checkpoint_of(whole[GENERIC])['args']
    assert sorted(changed.split('; ')) == [
        f'--{name} was {before[name]}' for name in ('amp', 'epochs', 'lr', 'save_every', 'weight_decay')]
    assert checkpoint_of(tmp_path)['scaler'] and not checkpoint_of(whole[GENERIC])['scaler']
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
    """As a cluster sends it, to the process and its workers. --config repeats a run in any process."""
    words = [sys.executable, CLS.__file__, '--config', long_run / 'args.json', '--output_dir', tmp_path]
    env = {**environment(), 'PYTHONHASHSEED': '7'}
    process = subprocess.Popen([*words, '--resume', 'auto'], env=env, start_new_session=True, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in process.stdout:
        if ' epoch 1/' in line:
            break
    os.killpg(process.pid, signal.SIGTERM)
    printed, errors = process.communicate(timeout=100)
    assert process.returncode == 0 and errors == '' and printed.splitlines()[-1] == STOPPED
    with pytest.raises(ProcessLookupError):  # nothing is left of the group
        os.killpg(process.pid, 0)
    assert len(log_of(tmp_path)) < len(log_of(long_run))
    start(CLS, data, tmp_path, LONG)
    assert_same_run(tmp_path, long_run)


def test_kills_at_random_times_cost_nothing(data, long_run, tmp_path):
    """SIGKILL at any time, in a write of the checkpoint, too: the same command goes on to the same bits.

    KILLS in the environment sets the number. Each process is a fork of this one, and has a data worker.
    """
    draw, newest = random.Random(KILLS), tmp_path / 'checkpoint.pth'

    def last_save():
        return newest.stat().st_mtime_ns if newest.exists() else 0

    for kill in [True] * KILLS + [False]:
        before, child = last_save(), os.fork()
        if child == 0:
            os.setsid()
            with contextlib.suppress(BaseException):
                start(CLS, data, tmp_path, LONG)
                os._exit(0)
            os._exit(1)
        if kill:
            wait_for(lambda before=before: last_save() != before)
            time.sleep(draw.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # torch's workers may miss the end of their parent
        assert status == (signal.SIGKILL if kill else 0)
    assert_same_run(tmp_path, long_run)


# ---- two processes -------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def two_processes(data, whole, tmp_path_factory):
    """Runs of torchrun with two processes: one that a signal stops; then it and others to the end."""
    folder = tmp_path_factory.mktemp('two')

    def job(script, name, *flags):
        return command(script, data, folder / name, FLAGS[script], *flags)

    process = start_two_processes(folder, {'stopped': job(GENERIC, 'stopped', LONG, '--resume auto')})
    printed = folder / 'stopped.0.txt'
    wait_for(lambda: printed.exists() and ' epoch 1/' in printed.read_text(), process)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=100)
    endings = [(folder / f'stopped.{rank}.txt').read_text().splitlines()[-2:] for rank in (0, 1)]
    epochs = len(log_of(folder / 'stopped'))
    with pytest.MonkeyPatch.context() as patch:  # one process alone, after its first update
        patch.setattr(GENERIC, 'stop_requested', lambda args: True)
        start(GENERIC, data, folder / 'one')
    jobs = {'resumed': job(GENERIC, 'stopped', LONG, '--resume auto'), 'whole': job(GENERIC, 'whole', LONG),
            'one': job(GENERIC, 'one', '--batch_size 2 --resume auto'), 'cls': job(CLS, 'cls')}
    for script, name in ((DET, 'det'), (SEG, 'seg')):
        results = f'--results_json {folder}/results.json' if script is DET else ''
        jobs[f'{name}_eval'] = job(script, 'no', results, '--eval --resume', whole[script] / 'checkpoint.pth')
        jobs[name] = job(script, name, '--save_every 1')
        first = folder / name / 'checkpoint-0.pth'
        jobs[f'{name}_resumed'] = job(script, f'{name}_resumed', '--resume', first)
    run_two_processes(folder, jobs)
    return SimpleNamespace(folder=folder, endings=endings, epochs=epochs)


def test_a_signal_to_the_group_of_two_processes_stops_both_at_the_same_update(two_processes):
    """It reaches torchrun, both processes and their data workers; each process comes to its end by itself."""
    assert two_processes.endings == [[STOPPED, 'came to its end'], ['came to its end']]
    assert two_processes.epochs < len(log_of(two_processes.folder / 'whole'))
    assert_same_run(two_processes.folder / 'stopped', two_processes.folder / 'whole')


def test_two_processes_go_on_where_one_was_stopped(two_processes, whole):
    """Stage 1, with the same effective batch: the same training, up to rounding."""
    ours, theirs = (checkpoint_of(folder) for folder in (two_processes.folder / 'one', whole[GENERIC]))
    assert (ours['args']['world_size'], theirs['args']['world_size']) == (2, 1)
    assert largest_difference(ours['model'], theirs['model']) < 2e-4


def test_two_processes_evaluate_like_one(data, two_processes, whole, tmp_path):
    """Every image is counted once; hits, confusion matrices and detections of all processes are gathered."""
    last = log_of(two_processes.folder / 'cls')[-1]
    alone = evaluate_alone(CLS, data, two_processes.folder / 'cls/checkpoint.pth')
    assert last['test_loss'] == pytest.approx(alone.pop('test_loss'), rel=1e-6)
    assert alone == {key: last[key] for key in alone} and alone['test_images'] == 12
    mean = log_of(whole[SEG])[-1]['test_mIoU']
    assert f'test: mIoU {mean:.2f} ' in (two_processes.folder / 'seg_eval.0.txt').read_text()
    evaluate_alone(DET, data, whole[DET] / 'checkpoint.pth', '--results_json', tmp_path / 'results.json')
    ours, theirs = (scores_of(folder / 'results.json') for folder in (two_processes.folder, tmp_path))
    assert len(ours) > 20 and ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize('name', ['det', 'seg'])
def test_two_processes_go_on_from_the_end_of_a_round_with_the_same_bits(name, two_processes):
    whole, resumed = two_processes.folder / name, two_processes.folder / f'{name}_resumed'
    assert checkpoint_of(whole)['args']['world_size'] == 2
    assert_same_run(resumed, whole)


# ---- repeats -------------------------------------------------------------------------------------


@EVERY_SCRIPT
def test_args_json_holds_the_flags_as_given_and_the_origin_of_the_run(script, whole):
    stored = json.loads((whole[script] / 'args.json').read_text())
    origin = [stored.pop(name) for name in ('commit', 'versions', 'hardware', 'script')]
    words = command(script, whole[script], whole[script], FLAGS[script], '--resume auto --save_every 1')[1:]
    given = vars(script.get_args_parser().parse_args(words))
    assert stored == {**given, 'data_path': stored['data_path']}
    assert len(origin[0]) >= 7 and f'torch {torch.__version__}, ' in origin[1] and origin[2] == '1 x cpu'


@EVERY_SCRIPT
def test_args_json_repeats_a_run_and_flags_by_hand_win(script, whole, tmp_path):
    """--config: the values of another run, but not its folder and --resume; another seed is another run."""
    words = (script.__file__, '--config', whole[script] / 'args.json')
    args = parse(script, *words)
    assert (args.output_dir, args.resume, args.save_every) == ('output_dir', None, 1)
    run(script, *words, '--output_dir', tmp_path / 'same')
    assert_same_run(tmp_path / 'same', whole[script])
    run(script, *words, '--output_dir', tmp_path / 'seed', '--seed', 1)
    first, other = (checkpoint_of(folder) for folder in (whole[script], tmp_path / 'seed'))
    assert largest_difference(first['model'], other['model']) > 1e-2 and other['args']['seed'] == 1
