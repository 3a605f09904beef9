"""The graph of experiments, run with a stand-in for Python that makes empty checkpoints: what is built, when, how often."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not shutil.which('make'), reason='needs make')
# notes each command once all the files that it names are there, and writes what the real program would
STAND_IN = r'''#!/bin/bash
[[ " $* " == *" --finished "* ]] && exec REAL "$@"
words=" $* "
value() { [[ $words =~ \ $1\ ([^ ]+) ]] && echo "${BASH_REMATCH[1]}"; }
for flag in --finetune --teacher_path --data_path --checkpoint; do
    file=$(value $flag); [ -z "$file" ] || [ -e "$file" ] || { echo "missing: $file in $words" >> LOG; exit 1; }
done
echo "$words" >> LOG
out=$(value --output_dir)
[ -z "$FAIL" ] || [[ $out != *$FAIL ]] || exit 1
[ -z "$out" ] || { mkdir -p "$out"; echo run > "$out/checkpoint.pth"; }
[[ $words == *_det.py*  || $words == *_seg.py* ]] && kind=iteration || kind=epoch
[ $kind = epoch ] && total=2 || total=1
[ -z "$out" ] || echo "{\"$kind\": 1, \"${kind}s\": $total}" | tee "$out/args.json" > "$out/log.txt"
[ -z "$STOP" ] || [[ $out != *$STOP ]] || echo '{"epoch": 0}' > "$out/log.txt"
[[ $words == *toy_data.py* && $words == *"only imagenet"* ]] && mkdir -p "$(value --out)/imagenet/val"
# two programs must not draw into one folder at a time
[[ $words == *"only coco ade"* && ! -d $(value --out)/imagenet ]] && { echo "missing: imagenet" >> LOG; exit 1; }
[[ $words == *"only coco ade"* ]] && mkdir -p "$(value --out)/coco/val2017" "$(value --out)/ade/images/validation"
true
'''
TABLE_2 = {'finetuned', 'g2sd', 'deit_distilled', 'deit'}
TARGETS = {f'{stage}_{target}' for target in ('recon', 'recon_gt') for stage in ('finetuned', 'g2sd')}
RATIOS = {f'finetuned_mask{ratio}' for ratio in (0.05, 0.25, 0.55, 0.9)}


@pytest.fixture
def home(tmp_path):
    (tmp_path / 'python').write_text(STAND_IN.replace('LOG', str(tmp_path / 'log')).replace('REAL', sys.executable))
    (tmp_path / 'python').chmod(0o755)
    return tmp_path


def make(home, *words, code=0, **environment):
    """Runs make on the project's Makefile with the stand-in; returns the commands that it noted, and make's output."""
    (home / 'log').write_text('')
    clean = {name: value for name, value in os.environ.items() if name not in ('MAKEFLAGS', 'MAKELEVEL', 'MFLAGS')}
    words = ['-C', str(ROOT), f'PYTHON={home / "python"}', f'OUT={home / "runs"}', 'DEVICE=cpu', *words]
    done = subprocess.run(['make', *words], capture_output=True, text=True, env={**clean, **environment}, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return (home / 'log').read_text().splitlines(), done.stdout + done.stderr


def trained(commands, scale='toy'):
    """Output folders of the training commands, below the scale's, in order."""
    found = [re.search(rf'--output_dir \S*/{scale}/(\S+)', command) for command in commands]
    return [match[1] for match in found if match]


def rows(seeds, names):
    return {f'seed{seed}/{name}' for seed in seeds for name in names}


@pytest.mark.parametrize('jobs', ['-j1', '-j4'])
def test_reproduce_all_builds_every_checkpoint_once_and_prints_the_tables_once(jobs, home):
    """README: one graph, shared teachers, safe under -j; what a command reads is there before it starts."""
    commands, _ = make(home, jobs, 'reproduce-all', 'SCALE=toy', 'SEEDS=0 1')
    students = TABLE_2 | TARGETS | RATIOS | {'finetuned_layer2', 'det_finetuned', 'det_g2sd', 'seg_finetuned', 'seg_g2sd'}
    generic = {'generic', *(name.replace('finetuned', 'generic') for name in students if name.startswith('finetuned_'))}
    assert sorted(trained(commands)) == sorted(
        {'teacher_mae', 'teacher_cls', 'teacher_det', 'teacher_seg'} | rows((0, 1), students | generic))
    assert [command for command in commands if 'results.py' in command] == [commands[-1]]
    assert sum('toy_data.py' in command for command in commands) == 2
    assert all((home / f'runs/toy/seed1/{name}/final.pth').exists() for name in students | generic)
    assert not [command for command in commands if command.startswith('missing')]


@pytest.mark.parametrize(('table', 'expected', 'teachers'), [
    ('table2', TABLE_2 | {'generic'}, {'teacher_mae', 'teacher_cls'}),
    ('table3', {'generic', 'det_finetuned', 'det_g2sd'}, {'teacher_mae', 'teacher_det'}),
    ('table4', {'finetuned', 'g2sd', 'generic', 'generic_recon', 'generic_recon_gt'} | TARGETS,
     {'teacher_mae', 'teacher_cls'}),
    ('table5', {'finetuned', 'generic', 'finetuned_layer2', 'generic_layer2'} | RATIOS |
     {name.replace('finetuned', 'generic') for name in RATIOS}, {'teacher_mae'}),
    ('ade20k', {'generic', 'seg_finetuned', 'seg_g2sd'}, {'teacher_mae', 'teacher_seg'})])
def test_a_table_trains_its_own_rows_and_what_they_start_from(table, expected, teachers, home):
    """README: each table is one target; nothing of another table is trained for it."""
    commands, _ = make(home, f'reproduce-{table}', 'SCALE=toy')
    assert set(trained(commands)) == rows([0], expected) | teachers


def test_a_finished_run_is_not_repeated_and_a_failed_one_goes_on(home):
    """README: interrupted, it goes on: what was finished stays, what failed is started again with --resume auto."""
    before, _ = make(home, '-k', 'reproduce-table2', 'SCALE=toy', code=2, FAIL='seed0/generic')
    assert set(trained(before)) == {'teacher_mae', 'teacher_cls', 'seed0/generic', 'seed0/deit', 'seed0/deit_distilled'}
    assert 'results.py' not in ''.join(before)  # no table of half the rows
    after, _ = make(home, 'reproduce-table2', 'SCALE=toy')
    assert trained(after) == ['seed0/generic', 'seed0/finetuned', 'seed0/g2sd']
    assert all('--resume auto' in command for command in after if '--output_dir' in command)
    again, _ = make(home, 'reproduce-table2', 'SCALE=toy')
    assert trained(again) == [] and 'results.py' in again[-1]
    more, _ = make(home, 'reproduce-table4', 'SCALE=toy')
    assert set(trained(more)) == rows([0], TARGETS | {'generic_recon', 'generic_recon_gt'})


def test_a_run_that_a_signal_stopped_is_not_taken_for_a_finished_one(home):
    """README, interruptions: it ends with status 0, but only the end of its log makes a final.pth."""
    before, output = make(home, '-k', 'reproduce-table2', 'SCALE=toy', code=2, STOP='seed0/generic')
    assert 'seed0/generic' in trained(before) and 'seed0/g2sd' not in trained(before)
    assert 'seed0/generic was interrupted: start make again' in output
    after, _ = make(home, 'reproduce-table2', 'SCALE=toy')
    assert trained(after) == ['seed0/generic', 'seed0/finetuned', 'seed0/g2sd']


def test_drawn_data_is_written_by_one_program_at_a_time(home):
    """toy_data.py keeps one file for all of its sets: the scenes wait for the pictures, also under -j."""
    commands, _ = make(home, '-j2', 'coco', 'ade', 'data', 'SCALE=toy')
    assert [re.search(r'--only ([a-z ]+[a-z])', command)[1] for command in commands] == ['imagenet', 'coco ade']


def test_every_seed_reaches_its_rows_and_the_teachers_keep_theirs(home):
    """README: SEEDS are the seeds of the rows, one teacher serves all of them."""
    commands, _ = make(home, 'reproduce-table2', 'reproduce-table5', 'SCALE=toy', 'SEEDS=3 11')
    seeds = {folder: re.search(r'--seed (\d+)', command)[1] for command in commands for folder in trained([command])}
    assert all(seed == (re.match(r'seed(\d+)/', folder) or ['', '0'])[1] for folder, seed in seeds.items())
    assert {folder.split('/')[0] for folder in seeds} == {'teacher_mae', 'teacher_cls', 'seed3', 'seed11'}


def test_each_variant_differs_from_the_default_row_by_its_flag(home):
    """Tables 4 and 5: stage 1 with another target, ratio or block, and nothing else; stage 2 starts from that stage 1."""
    commands, _ = make(home, 'reproduce-table4', 'reproduce-table5', 'SCALE=toy')
    calls = {folder: command.split() for command in commands for folder in trained([command])}
    plain = calls['seed0/generic']
    for name, flag in {'recon': '--target recon', 'recon_gt': '--target recon_gt', 'mask0.05': '--mask_ratio 0.05',
                       'mask0.9': '--mask_ratio 0.9', 'layer2': '--target_layer 2'}.items():
        variant = calls[f'seed0/generic_{name}']
        assert variant[:len(plain)] == [word.replace('seed0/generic', f'seed0/generic_{name}') for word in plain]
        assert ' '.join(variant[len(plain):]) == flag
        tuned = ' '.join(calls[f'seed0/finetuned_{name}'])
        assert f'--finetune {home}/runs/toy/seed0/generic_{name}/final.pth' in tuned and '--teacher_path' not in tuned
    assert f'--teacher_path {home}/runs/toy/teacher_cls/final.pth' in ' '.join(calls['seed0/g2sd_recon'])


def test_own_checkpoints_take_the_place_of_what_would_be_trained(home):
    """README: TEACHER_MAE, TEACHER_CLS and GENERIC name your own files."""
    for name in ('mae', 'cls', 'generic'):
        (home / f'{name}.pth').write_text('')
    own = [f'TEACHER_MAE={home}/mae.pth', f'TEACHER_CLS={home}/cls.pth']
    commands, _ = make(home, 'reproduce-table2', 'SCALE=toy', *own)
    assert set(trained(commands)) == rows([0], TABLE_2 | {'generic'})
    assert f'--teacher_path {home}/mae.pth' in next(command for command in commands if '/generic ' in command)
    shutil.rmtree(home / 'runs')
    commands, _ = make(home, 'reproduce-table2', 'SCALE=toy', *own, f'GENERIC={home}/generic.pth')
    assert set(trained(commands)) == rows([0], TABLE_2)
    assert f'--finetune {home}/generic.pth' in next(command for command in commands if '/g2sd ' in command)


@pytest.mark.parametrize(('words', 'message'), [
    (('reproduce-table3', 'SCALE=cifar10'), 'SCALE=cifar10 has no detection'),
    (('reproduce-ade20k', 'SCALE=cifar10'), 'SCALE=cifar10 has no detection and no segmentation'),
    (('reproduce-table2', 'SCALE=cifar10'), 'set CIFAR10=folder'),
    (('reproduce-table2', 'SCALE=other'), 'choose imagenet, cifar10 or toy'),
    (('reproduce-table4',), 'set IMAGENET=folder'),
    (('reproduce-all',), 'set COCO=folder'),
    (('reproduce-table2', 'TEACHER_MAE=nowhere.pth', 'SCALE=toy'), 'TEACHER_MAE=nowhere.pth: there is no such file'),
    (('reproduce-table3', 'DINO=nowhere.pth', 'SCALE=toy'), 'DINO=nowhere.pth: there is no such file')])
def test_what_is_missing_is_said_before_anything_is_trained(words, message, home):
    """README: one line says what to give."""
    commands, output = make(home, *words, code=2)
    assert message in output and not commands


def test_cifar10_has_all_tables_of_classification(home):
    """README: SCALE=cifar10 runs Tables 2, 4 and 5, on 400 images of each class on a CPU."""
    for split in ('train', 'val'):
        for name in ('cat', 'dog'):
            (home / 'cifar' / split / name).mkdir(parents=True)
            for number in range(3):
                (home / 'cifar' / split / name / f'{number}.png').write_text('')
    commands, _ = make(home, '-j3', 'reproduce-all', 'SCALE=cifar10', f'CIFAR10={home}/cifar', 'IMAGES=2')
    assert rows([0], TABLE_2 | TARGETS | RATIOS) < set(trained(commands, 'cifar10'))
    assert not [folder for folder in trained(commands, 'cifar10') if 'det_' in folder or 'seg_' in folder]
    assert sorted(path.name for path in (home / 'runs/cifar10/data/train/cat').iterdir()) == ['0.png', '1.png']
    assert len(list((home / 'runs/cifar10/data/val').glob('*/*.png'))) == 6


def test_the_papers_schedule_is_the_scripts_own(home):
    """README: at SCALE=imagenet the students' commands name data, teachers and models, and no hyper-parameter."""
    (home / 'imagenet/train').mkdir(parents=True)
    tables = [f'reproduce-table{number}' for number in (2, 4, 5)]
    commands, output = make(home, '-n', *tables, f'IMAGENET={home}/imagenet')
    assert not commands
    students = [line for line in output.replace('\\\n', ' ').splitlines() if '/seed0/' in line and '--output_dir' in line]
    flags = {flag for line in students for flag in re.findall(r'--\w+', line)}
    assert len(students) == 4 + 1 + 6 + 2 * 4 + 2 * 3  # Table 2 and generic; two targets; four ratios; three blocks
    assert flags == {'--standalone', '--nproc_per_node', '--data_path', '--output_dir', '--resume', '--device', '--seed',
                     '--model', '--teacher_path', '--finetune', '--target', '--mask_ratio', '--target_layer'}


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_bench_measures_every_stage(home, device):
    """README, speed: make bench adds a line for each stage; on a CPU its batches are small."""
    commands, _ = make(home, 'bench', f'DEVICE={device}', 'BENCH_ARGS=--compile')
    assert [re.search(r'--stage (\w+)', command)[1] for command in commands] == ['generic', 'cls', 'det', 'seg']
    assert all(f'--device {device}' in command and '--compile' in command for command in commands)
    assert all(f'--json {home}/runs/bench.json' in command for command in commands)
    assert all(('--batch_size' in command) == (device == 'cpu') for command in commands)


def test_paths_of_data_may_hold_spaces(home):
    """README: IMAGENET=, COCO=, ADE20K= and CIFAR10= may, OUT= may not, which one line says."""
    python = home / 'python'  # notes the data's path, in brackets
    python.write_text(python.read_text().replace('words=" $* "', 'for ((i = 1; i < $#; i++)); do '
                      f'[ "${{!i}}" != --data_path ] || {{ j=$((i + 1)); echo "[${{!j}}]" >> {home}/paths; }}; done\n'
                      'set -- "${@// /_}"; words=" $* "'))
    for folder in ('imagenet/train', 'coco/annotations', 'ade/annotations', 'cifar/train/a cat', 'cifar/val/a cat'):
        (home / 'a b' / folder).mkdir(parents=True)
    (home / 'a b/cifar/train/a cat/1 2.png').write_text('')
    for name in ('imagenet', 'coco', 'ade'):
        (home / f'a_b/{name}').mkdir(parents=True)  # what the stand-in looks for
    data = [f'{name}={home}/a b/{folder}' for name, folder in (
        ('IMAGENET', 'imagenet'), ('COCO', 'coco'), ('ADE20K', 'ade'))]
    make(home, 'reproduce-all', *data)
    paths = (home / 'paths').read_text().splitlines()
    assert set(paths) == {f'[{home}/a b/{name}]' for name in ('imagenet', 'coco', 'ade')} and len(paths) == 33
    make(home, 'reproduce-table2', 'SCALE=cifar10', f'CIFAR10={home}/a b/cifar')
    link = home / 'runs/cifar10/data/train/a cat/1 2.png'
    assert link.is_symlink() and link.exists() and (home / 'runs/cifar10/data/val/a cat').is_dir()
    (home / 'a b/cifar/cifar-10-batches-py').mkdir()
    _, output = make(home, '-n', 'reproduce-table2', 'SCALE=cifar10', f'CIFAR10={home}/a b/cifar', 'DEVICE=cuda',
                     'OUT=elsewhere')
    assert '--data_set CIFAR10' in output
    commands, output = make(home, 'reproduce-table2', 'SCALE=toy', f'OUT={home}/a b', code=2)
    assert not commands and 'a path with spaces does not work here' in output
