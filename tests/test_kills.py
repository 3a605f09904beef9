"""Long runs: signals, random kill -9, full disks, damaged files, lost processes and workers cost no step and no bit.

KILLS in the environment sets the number of random kills. The oracle is the same command, not interrupted.
"""
import contextlib
import errno
import json
import mmap
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
from argparse import Namespace

import pytest
import torch
from conftest import assert_same_bits, checkpoint_of, contents, environment, log_of, without_clock
from test_repeat import CLS, DET, GENERIC, PIXEL, ROOT, SEG, command, data  # noqa: F401

import models

KILLS = int(os.environ.get('KILLS', 5))
FLAGS = {GENERIC: (*PIXEL, '--batch_size', 4, '--accum_iter', 2, '--skip_bad_images', '--print_freq', 5),
         CLS: ('--batch_size', 4, '--accum_iter', 2, '--drop_path', 0.1, '--print_freq', 3),
         DET: ('--batch_size', 1, '--accum_iter', 2, '--iterations', 3), SEG: ('--accum_iter', 2, '--iterations', 3)}
EACH = pytest.mark.parametrize('script', FLAGS, ids=['stage 1', 'classification', 'detection', 'segmentation'])


def start(script, folder, out, *more):
    """In this process, with --resume auto: what ended the run early, or None."""
    words = command(script, folder, out, *FLAGS[script], '--resume', 'auto', *more)[1:]
    try:
        script.main(script.get_args_parser().parse_args(words))
    except (models.Stopped, models.InputError, FloatingPointError, RuntimeError) as stop:
        return stop


def after_each_step(script, monkeypatch, action):
    """Calls action(progress) when a step's update is made and before the run looks for signals."""
    add = script.Progress.add

    def acting(self, *args, **terms):
        add(self, *args, **terms)
        action(self)
    monkeypatch.setattr(script.Progress, 'add', acting)


@pytest.fixture(scope='module')
def whole(data, tmp_path_factory):  # noqa: F811
    """Folders of runs that nothing interrupts, made when they are asked for; and the samples that each one read."""
    made = {}

    def make(script, *more):
        key = script, more
        if key not in made:
            out = tmp_path_factory.mktemp('whole')
            with pytest.MonkeyPatch.context() as patch:
                read = note_reads(patch)
                assert start(script, data, out, *more) is None
            made[key] = types.SimpleNamespace(out=out, read=read)
        return made[key]
    return make


def note_reads(patch):
    """The list of samples that are read from now on, by this process, in order."""
    read = []
    for owner in (models.SeededDataset, DET.CocoDataset, SEG.SegmentationDataset):
        def getitem(self, key, original=owner.__getitem__):
            read.append((getattr(self, 'train', None), key))
            return original(self, key)
        patch.setattr(owner, '__getitem__', getitem)
    return read


def assert_same_run(left, right):
    assert_same_bits(checkpoint_of(left), checkpoint_of(right))
    assert without_clock(log_of(left)) == without_clock(log_of(right))


# --------------------------------------------------------------------------------------------------------------- signals


@EACH
def test_a_run_that_is_stopped_at_every_update_ends_with_the_same_bits_and_reads_every_sample_once(
        script, data, whole, tmp_path, monkeypatch, capsys):  # noqa: F811
    """README, interruptions: any number of signals, in accumulation, at the last step, two at a time: no bit, no sample."""
    expected = whole(script)
    read = note_reads(monkeypatch)
    sent = iter([signal.SIGTERM, signal.SIGUSR1] * 100)

    def send(progress):
        for _ in range(2 - progress.step % 2):
            os.kill(os.getpid(), next(sent))

    after_each_step(script, monkeypatch, send)
    stops = []
    while (stop := start(script, data, tmp_path)) is not None:
        stops.append(str(stop))
    updates = {GENERIC: 12, CLS: 12, DET: 3, SEG: 3}[script]
    assert len(stops) == updates
    assert all(re.fullmatch('stopped by SIG(TERM|USR1): --resume auto goes on from there', stop) for stop in stops)
    assert read == expected.read
    assert_same_run(tmp_path, expected.out)
    printed = capsys.readouterr().out
    assert len(re.findall('^saved .* and [0-9]+ steps$', printed, re.M)) >= updates
    assert len(re.findall('^resumed .* and [0-9]+ steps', printed, re.M)) == updates
    before = contents(tmp_path)
    assert start(script, data, tmp_path) is None and contents(tmp_path) == before  # a finished run


def test_a_signal_in_an_evaluation_ends_it_and_the_resume_trains_no_step_again(
        data, whole, tmp_path, monkeypatch):  # noqa: F811
    """README, interruptions: training is saved before an evaluation begins."""
    expected = whole(CLS)
    forward, sent = CLS.distillation_loss, []
    until_stopped = models.until_stopped

    def interrupted(loader):
        for batch in until_stopped(loader):
            if not sent:
                os.kill(os.getpid(), signal.SIGTERM)
                sent.append(len(trained))
            yield batch

    trained = []
    monkeypatch.setattr(CLS, 'distillation_loss', lambda *args, **kwargs: trained.append(1) or forward(*args, **kwargs))
    monkeypatch.setattr(models, 'until_stopped', interrupted)
    assert 'stopped by SIGTERM in an evaluation' in str(start(CLS, data, tmp_path))
    assert checkpoint_of(tmp_path)['epoch'] == -1 and checkpoint_of(tmp_path)['step'] == 12 and not log_of(tmp_path)
    assert start(CLS, data, tmp_path) is None
    assert sent == [12] and len(trained) == 24
    assert_same_run(tmp_path, expected.out)


def test_a_position_within_an_epoch_is_kept_under_other_accumulation_and_refused_under_another_batch(
        data, tmp_path, monkeypatch):  # noqa: F811
    """README, interruptions: no sample is repeated or skipped; what cannot be kept is said in one line."""
    after_each_step(GENERIC, monkeypatch, lambda progress: progress.step == 3 and os.kill(os.getpid(), signal.SIGTERM))
    assert isinstance(start(GENERIC, data, tmp_path), models.Stopped)
    monkeypatch.undo()
    before = contents(tmp_path)
    for flags, message in ((('--batch_size', 8), 'effective batch 16: it was 8'), (('--seed', 1), '--seed 1: it was 0'),
                           (('--repeated_aug', 2), '--repeated_aug 2: it was 1')):
        assert message in str(start(GENERIC, data, tmp_path, *flags))
        assert contents(tmp_path) == before
    read = note_reads(monkeypatch)
    assert start(GENERIC, data, tmp_path, '--accum_iter', 1, '--batch_size', 8) is None
    first = [index for _, (epoch, index) in read if epoch == 0]
    assert len(set(first)) == len(first) == 48 - 16


def test_a_stop_under_repeated_augmentation_repeats_no_image(data, whole, tmp_path, monkeypatch):  # noqa: F811
    """README, interruptions: the place in the data counts images, of which a batch has fewer than views."""
    expected = whole(GENERIC, '--repeated_aug', 2)
    read = note_reads(monkeypatch)
    after_each_step(GENERIC, monkeypatch, lambda progress: progress.step == 5 and os.kill(os.getpid(), signal.SIGTERM))
    for _ in range(2):
        assert isinstance(start(GENERIC, data, tmp_path, '--repeated_aug', 2), models.Stopped)
    assert start(GENERIC, data, tmp_path, '--repeated_aug', 2) is None
    assert read == expected.read and len(read) == 2 * 24
    assert_same_run(tmp_path, expected.out)


@pytest.mark.parametrize('name, value', [
    ('epoch', -2), ('epoch', 2 ** 40), ('step', -1), ('step', 1.0), ('step', 2 ** 40), ('step', 0), ('progress', None),
    ('progress', {}), ('sums', 'x'), ('sums', [float('nan')]), ('sums', []), ('names', None), ('measured', [None]),
    ('lr', 'x'), ('skipped', None), ('steps', 2.0), ('steps', 3), ('batch_size', 0),
    ('accum_iter', None), ('world_size', 'x'), ('seed', [])])
def test_a_damaged_position_within_an_epoch_is_refused_in_one_line(
        name, value, data, tmp_path, monkeypatch):  # noqa: F811
    """README, bad data: counters of another type or range are named."""
    after_each_step(GENERIC, monkeypatch, lambda progress: progress.step == 3 and os.kill(os.getpid(), signal.SIGTERM))
    assert isinstance(start(GENERIC, data, tmp_path), models.Stopped)
    checkpoint = checkpoint_of(tmp_path)
    assert checkpoint['epoch'] == -1 and checkpoint['step'] == 4
    owner = next(part for part in (checkpoint, checkpoint['progress'], checkpoint['args']) if name in part)
    owner[name] = value
    torch.save(checkpoint, tmp_path / 'checkpoint.pth')
    stop = start(GENERIC, data, tmp_path)
    assert isinstance(stop, models.InputError) and 'cannot be resumed: ' in str(stop), stop


def test_constants_measured_by_two_processes_count_alike_when_one_goes_on(data, tmp_path, monkeypatch):  # noqa: F811
    """README, interruptions: the number of processes may change; the comparison with the best constant does not notice."""
    for measured_by, goes_on in ((2, 1), (1, 2), (4, 2)):
        args = Namespace(batch_size=8 // goes_on, accum_iter=1, world_size=goes_on, rank=0, seed=0, device='cpu')
        then = {'batch_size': 8 // measured_by, 'accum_iter': 1, 'world_size': measured_by, 'seed': 0}
        progress = GENERIC.Progress(args, 1)
        # each process measured 1.0 and 3.0 in its first steps; what is kept is the sum over the processes
        progress.restore({'train_seconds': 1.0, 'step': 2, 'args': then, 'progress': {
            'steps': 4, 'sums': [1.0], 'names': ['loss'], 'lr': 0.1, 'skipped': 3,
            'measured': [measured_by * 1.0, measured_by * 3.0]}}, 'x')
        assert torch.stack(progress.measured).mean().item() / goes_on == 2.0  # as train_one_epoch has it
        assert progress.skipped == 3


def test_a_damaged_checkpoint_is_never_kept_in_place_of_a_whole_one(data, tmp_path, monkeypatch):  # noqa: F811
    """README, interruptions: after a damaged newest file the next save leaves two whole generations, not one."""
    assert start(CLS, data, tmp_path, '--epochs', 1, '--warmup_epochs', 0) is None
    (tmp_path / 'checkpoint.pth').write_bytes(b'damaged')
    after_each_step(CLS, monkeypatch, lambda progress: os.kill(os.getpid(), signal.SIGTERM))
    assert isinstance(start(CLS, data, tmp_path, '--warmup_epochs', 0), models.Stopped)
    assert (tmp_path / 'checkpoint.pth.damaged').read_bytes() == b'damaged'
    for name in ('checkpoint.pth', 'previous.pth'):
        models.check_whole(tmp_path / name)


def test_weights_of_an_interrupted_run_are_used_with_a_warning(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    """README, interruptions: a stopped run exits with 0, so a script that goes on with its weights must hear of it."""
    after_each_step(GENERIC, monkeypatch, lambda progress: progress.step == 3 and os.kill(os.getpid(), signal.SIGTERM))
    assert isinstance(start(GENERIC, data, tmp_path), models.Stopped)
    models.load_checkpoint(tmp_path / 'checkpoint.pth')
    assert re.search(r'^warning: \S*checkpoint\.pth is of a run that was interrupted', capsys.readouterr().out, re.M)
    monkeypatch.undo()
    assert start(GENERIC, data, tmp_path) is None
    capsys.readouterr()
    models.load_checkpoint(tmp_path / 'checkpoint.pth')
    assert 'interrupted' not in capsys.readouterr().out


@pytest.mark.parametrize('number, refused', [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_a_disk_that_cannot_sync_folders_is_no_error(number, refused, tmp_path, monkeypatch):
    """README, interruptions: some network disks refuse the request; a real error of the disk is one."""
    fsync = os.fsync

    def failing(handle):
        if os.path.isdir(f'/proc/self/fd/{handle}'):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, 'fsync', failing)
    with pytest.raises(models.InputError) if refused else contextlib.nullcontext():
        models.write_file(tmp_path / 'x', lambda file: file.write(b'new'))
    assert (tmp_path / 'x').read_bytes() == b'new'


# ------------------------------------------------------------------------------------------------------- kills at random


LONG = ('--epochs', 8, '--print_freq', 4)


def attempt(folder, out, state):
    """A child process with the run in it; it notes steps in state[0:2], and in state[2] whether it is in a write."""
    child = os.fork()
    if child:
        return child
    add, write_file = CLS.Progress.add, models.write_file

    def noting_add(self, *args, **terms):
        add(self, *args, **terms)
        state[0:2] = (int.from_bytes(state[0:2], 'big') + 1).to_bytes(2, 'big')

    def noting_write(path, write, previous=None):
        state[2] = previous is not None
        write_file(path, write, previous)
        state[2] = 0

    code = 1
    with contextlib.suppress(BaseException):
        CLS.Progress.add, models.write_file = noting_add, noting_write
        with open(out.with_suffix('.printed'), 'w') as file, contextlib.redirect_stdout(file):
            stop = start(CLS, folder, out, *LONG)
        code = 0 if stop is None else 3 if isinstance(stop, models.Stopped) else 1
    os._exit(code)


def place(text, word):
    """The last (epoch, steps) that a line of what was printed begins with `word`; None without."""
    found = re.findall(rf'^{word} .*? after epoch (\d+)(?: and (\d+) steps)?', text, re.M)
    return (int(found[-1][0]), int(found[-1][1] or 0)) if found else None


def test_random_kills_cost_nothing(data, whole, tmp_path, capsys):  # noqa: F811
    """README, interruptions: SIGKILL at random times, in writes too, some after a SIGTERM: the same bits, nothing lost."""
    expected = whole(CLS, *LONG).out
    draw, state = random.Random(KILLS), mmap.mmap(-1, 3)
    killed, after_a_step, in_a_write, finished, saved = 0, 0, 0, 0, None
    while killed < KILLS or saved is not None:
        out = tmp_path / str(finished)
        state[:] = bytes(3)
        child = attempt(data, out, state)
        aim, steps, delay = draw.choice(['write', 'step', 'step', 'term']), draw.randint(0, 20), draw.random()
        done = 0
        if killed < KILLS:
            while not done and (not state[2] if aim == 'write' else int.from_bytes(state[0:2], 'big') < steps):
                time.sleep(0.0003)
                done, status = os.waitpid(child, os.WNOHANG)
            if not done:
                if aim == 'term':
                    os.kill(child, signal.SIGTERM)
                time.sleep(delay * {'write': 0.004, 'step': 0.05, 'term': 0.02}[aim])
                os.kill(child, signal.SIGKILL)
        if not done:
            _, status = os.waitpid(child, 0)
        printed = out.with_suffix('.printed').read_text()
        resumed = place(printed, 'resumed')
        if saved is not None and (resumed or state[0:2] > bytes(2)):  # not killed before it looked
            assert resumed and resumed >= saved, printed  # what was reported as saved is there
        saved = max(filter(None, (saved, resumed, place(printed, 'saved'))), default=None)
        if os.WIFSIGNALED(status):
            killed += 1
            after_a_step += state[0:2] > bytes(2)
            in_a_write += state[2]
        elif os.WEXITSTATUS(status) == 0:
            assert_same_run(out, expected)
            shutil.rmtree(out)
            finished, saved = finished + 1, None
        else:
            assert os.WEXITSTATUS(status) == 3, printed
        if killed < KILLS:
            continue
        if saved is None:
            break
    with capsys.disabled():
        print(f'\n{killed} kills: {after_a_step} after a first step, {in_a_write} in a write of a checkpoint; '
              f'{finished} runs came to their end with the bits of one that was not killed')
    assert killed == KILLS and finished
    assert after_a_step >= KILLS / 2 and in_a_write >= KILLS // 10


# ----------------------------------------------------------------------------------------------------- disks and damages


def test_a_full_disk_ends_the_run_in_one_line_and_costs_only_what_was_not_saved(
        data, whole, tmp_path, monkeypatch):  # noqa: F811
    """README, interruptions: a write that fails leaves the older files as they are, and nothing half-written."""
    expected = whole(CLS).out
    after_each_step(CLS, monkeypatch, lambda progress: progress.step == 5 and os.kill(os.getpid(), signal.SIGTERM))
    assert isinstance(start(CLS, data, tmp_path), models.Stopped)
    monkeypatch.undo()
    before = contents(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # Python ignores the signal of this limit: the write fails
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before['checkpoint.pth']) // 2, limits[1]))
        stop = start(CLS, data, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(stop, models.InputError)
    assert re.fullmatch(r'cannot write \S+checkpoint.pth \(File too large\): .*--resume auto goes on', str(stop))
    after = contents(tmp_path)
    assert set(after) == set(before) and after['checkpoint.pth'] == before['checkpoint.pth']
    assert start(CLS, data, tmp_path) is None
    assert_same_run(tmp_path, expected)


def test_a_file_takes_its_name_when_it_is_whole_and_the_old_one_is_kept_without_hard_links_too(tmp_path, monkeypatch):
    """README, interruptions: two generations; a write that fails at any step leaves the newest under a known name."""
    path, previous = tmp_path / 'new', tmp_path / 'previous'
    for content in (b'1', b'2', b'3'):
        models.write_file(path, lambda file, content=content: file.write(content), previous)
    assert contents(tmp_path) == {'new': b'3', 'previous': b'2'}
    for name in ('fsync', 'replace'):
        with monkeypatch.context() as patch:
            def fail(*_):
                raise OSError(errno.ENOSPC, 'No space left on device')
            patch.setattr(os, name, fail)
            with pytest.raises(models.InputError, match='No space left'):
                models.write_file(path, lambda file: file.write(b'4'), previous)
        assert {name: text for name, text in contents(tmp_path).items() if name in ('new', 'previous')} == {
            'new': b'3', 'previous': b'2'}
    monkeypatch.setattr(os, 'link', lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, 'no links')))
    models.write_file(path, lambda file: file.write(b'5'), previous)
    models.write_file(path, lambda file: file.write(b'6'), previous)
    assert contents(tmp_path) == {'new': b'6', 'previous': b'5'}


def test_every_flipped_bit_is_found_or_changes_nothing(tmp_path):
    """README, interruptions: a checkpoint that differs from what was written is not resumed."""
    state = {'model': {'a': torch.arange(50.), 'b': torch.ones(3)}, 'epoch': 3, 'lr': 0.1}
    torch.save(state, tmp_path / 'whole.pth')
    models.check_whole(tmp_path / 'whole.pth')
    content, draw, found = (tmp_path / 'whole.pth').read_bytes(), random.Random(0), 0
    directory = content.rindex(b'PK\x05\x06') - 500
    places = [draw.randrange(len(content)) for _ in range(300)] + list(range(directory, len(content), 1))
    for position in places:
        flipped = bytearray(content)
        flipped[position] ^= 1 << draw.randrange(8)
        (tmp_path / 'flipped.pth').write_bytes(flipped)
        try:
            read = models.read_checkpoint(tmp_path / 'flipped.pth')
            models.check_whole(tmp_path / 'flipped.pth')
        except models.InputError:
            found += 1
            continue
        assert_same_bits(read, state, ('model', 'epoch', 'lr'))
    assert found > len(places) / 3


@pytest.mark.parametrize('damage', ['truncated', 'flipped', 'empty', 'missing'])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before_it(damage, data, whole, tmp_path, capsys):  # noqa: F811
    """README, interruptions: one line says so, and the run ends with the same bits."""
    shutil.copytree(whole(CLS).out, tmp_path, dirs_exist_ok=True)
    content = bytearray((tmp_path / 'checkpoint.pth').read_bytes())
    content[len(content) // 2] ^= 4
    (tmp_path / 'checkpoint.pth').unlink()
    if damage != 'missing':
        (tmp_path / 'checkpoint.pth').write_bytes(
            {'truncated': content[:-3000], 'flipped': content, 'empty': b''}[damage])
    capsys.readouterr()
    assert start(CLS, data, tmp_path) is None
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith('warning: ')]
    assert len(warned) == (damage != 'missing')
    assert all('checkpoint.pth is ' in line and line.endswith('previous.pth') for line in warned)
    assert_same_run(tmp_path, whole(CLS).out)


# ------------------------------------------------------------------------------------------------- workers and processes


def test_a_data_worker_that_is_killed_ends_the_run_in_one_line_and_the_run_can_go_on(
        data, whole, tmp_path, monkeypatch):  # noqa: F811
    """README, interruptions: the line says what died; a stop signal does not kill workers."""
    import multiprocessing
    expected = whole(CLS).out
    numbers = iter([signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])

    def strike(progress):
        number = next(numbers, None) if progress.epoch == 1 else None
        for worker in multiprocessing.active_children() if number else ():
            os.kill(worker.pid, number)
            if number == signal.SIGKILL:
                worker.join()

    after_each_step(CLS, monkeypatch, strike)
    stop = start(CLS, data, tmp_path, '--num_workers', 1)
    with pytest.raises(StopIteration):
        next(numbers)
    line = models.one_line(stop)
    assert line.startswith('error: a data worker has died') and len(line.splitlines()) == 1
    monkeypatch.undo()
    assert start(CLS, data, tmp_path) is None
    assert_same_run(tmp_path, expected)


def test_errors_of_the_scripts_are_one_line_and_any_other_is_raised(monkeypatch):
    """README: what a user can act on is one line; a mistake in the code keeps its traceback."""
    caught = models.InputError('Caught InputError in a worker\nmodels.InputError: the file')
    assert models.one_line(caught) == 'error: the file'
    lost = RuntimeError('[/gloo/pair.cc:1] Connection closed by peer [127.0.0.1]:1\nmore')
    for error in (KeyError('x'), lost):  # no processes: not theirs
        with pytest.raises(type(error)):
            models.one_line(error)
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    assert '0:30:00' in models.one_line(lost) and len(models.one_line(lost).splitlines()) == 1


# every process: a whole run; one where a process is killed, which torchrun restarts; a signal to one of them, and going on;
# a loss that is not finite on one; one that does not answer
LAUNCHER = """import datetime, json, os, pathlib, runpy, signal, sys, time
import torch, torch.distributed as dist
import models, generic_distill as script
folder, rank = pathlib.Path.cwd(), int(os.environ['RANK'])
start, stop = dist.init_process_group, dist.destroy_process_group
dist.init_process_group = lambda **options: dist.is_initialized() or start(**options)
models.TIMEOUT = datetime.timedelta(seconds=20)
def run(name, action=lambda progress: None):
    lost, add = False, script.Progress.add
    def acting(self, *args, **terms):
        add(self, *args, **terms)
        action(self)
    script.Progress.add = acting
    try:
        words = json.loads((folder / 'words.json').read_text())
        script.main(script.get_args_parser().parse_args([*words, '--output_dir', name]))
        line = 'finished'
    except models.Stopped as error:
        line = str(error)
    except Exception as error:
        line = models.one_line(error)
        lost = 'another process has ended' in line
    script.Progress.add = add
    with open(f'{name}.{rank}.txt', 'a') as file:
        file.write(line + '\\n')
    if lost:
        os._exit(name == 'killed')
at = lambda epoch, step, act: lambda progress: (progress.epoch, progress.step, rank) == (epoch, step, 1) and act(progress)
def spoil(progress):
    progress.rows[-1] = progress.rows[-1] * float('nan')
run('whole')
first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'
run('killed', at(1, 1, lambda _: first and os.kill(os.getpid(), signal.SIGKILL)))
run('stopped', at(0, 3, lambda _: os.kill(os.getpid(), signal.SIGUSR1)))
run('stopped')
run('spoilt', at(1, 2, spoil))
models.TIMEOUT = datetime.timedelta(seconds=2)
run('silent', at(0, 1, lambda _: time.sleep(6)))
os._exit(0)
"""


@pytest.fixture(scope='module')
def two(data, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp('two')
    words = command(GENERIC, data, folder, *FLAGS[GENERIC], '--resume', 'auto', '--save_every', 1)[1:]
    (folder / 'words.json').write_text(json.dumps(words))
    (folder / 'launcher.py').write_text(LAUNCHER)
    # README: without it torch's processes may find the addresses of those before a restart (pytorch 135712)
    fresh = {'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1', 'PYTHONPATH': str(ROOT)}
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '--max_restarts=1',
         'launcher.py'], cwd=folder, env={**environment(), **fresh}, capture_output=True, text=True, timeout=200,
        check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return types.SimpleNamespace(folder=folder, printed=done.stdout, lines={
        path.name.removesuffix('.txt'): path.read_text().splitlines() for path in folder.glob('*.txt')})


def test_a_process_that_is_killed_is_restarted_and_both_go_on_from_the_checkpoint(two):
    """README, interruptions: torchrun --max_restarts and --resume auto; the one that is left ends in one line."""
    assert two.lines['killed.1'] == ['finished'] and two.lines['killed.0'][-1] == 'finished'
    assert all('another process has ended' in line for line in two.lines['killed.0'][:-1])
    assert re.search('^resumed killed/checkpoint.pth after epoch 1', two.printed, re.M)
    assert_same_run(two.folder / 'killed', two.folder / 'whole')


def test_a_signal_to_one_process_stops_all_at_the_same_step(two):
    """README, interruptions: all processes agree; a resume on two is exact within an epoch, too."""
    for rank in (0, 1):
        assert two.lines[f'stopped.{rank}'] == ['stopped by SIGUSR1: --resume auto goes on from there', 'finished']
    assert re.search('^resumed stopped/checkpoint.pth after epoch 0 and 4 steps$', two.printed, re.M)
    assert_same_run(two.folder / 'stopped', two.folder / 'whole')


def test_a_loss_that_is_not_finite_on_one_process_stops_all_with_one_message(two):
    """README, interruptions: the message is the same line on every process, and the last checkpoint is sound."""
    (line,) = two.lines['spoilt.0']
    assert two.lines['spoilt.1'] == [line]
    assert re.match('error: not finite at epoch 2 step 3: loss nan, loss_pixel nan, grad_norm', line)
    assert all(value.isfinite().all() for value in checkpoint_of(two.folder / 'spoilt')['model'].values())


def test_a_process_that_does_not_answer_is_not_waited_for_for_ever(two):
    """README, interruptions: the time-out is set and named."""
    assert len(two.lines['silent.0']) == 1
    assert 'gave no answer within 0:00:02' in two.lines['silent.0'][0]


# ------------------------------------------------------------------------------------------------------------------ fp16


def test_the_loss_scale_is_printed_and_logged_with_fp16_alone(capsys):
    """README: with --amp fp16 the log tells the scale, and an overflow is skipped, not an error."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    args = Namespace(batch_size=1, accum_iter=1, world_size=1, distributed=False, print_freq=1, device='cpu', amp='fp16')
    progress = GENERIC.Progress(args, 1)
    for scaler, scales in ((torch.amp.GradScaler('cpu', init_scale=64.0), ['64', '32']),
                           (torch.amp.GradScaler('cpu', enabled=False), [])):
        progress.scaler = scaler
        for step, _ in progress.watch([0, 1], 0):
            scaler.scale(weight * (float('inf') if step and scales else 1.0)).sum().backward()
            scaler.unscale_(optimizer)
            progress.grad_norm = torch.nn.utils.clip_grad_norm_([weight], 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            progress.add(optimizer, loss=torch.tensor(1.0))
        assert re.findall(r'loss_scale (\S+)', capsys.readouterr().out) == scales
        assert progress.means().get('loss_scale') == (32.0 if scales else None)
    assert weight.isfinite().all()


def test_a_stopped_script_exits_with_0(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    """README, interruptions: status 0 and one line, from the script's last lines."""
    monkeypatch.setattr(sys, 'argv', command(GENERIC, data, tmp_path, *FLAGS[GENERIC]))
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, 'step', lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM) or step(*a, **k))
    runpy.run_path(sys.argv[0], run_name='__main__')
    assert capsys.readouterr().out.splitlines()[-1] == 'stopped by SIGTERM: --resume auto goes on from there'
    assert checkpoint_of(tmp_path)['step'] == 2
