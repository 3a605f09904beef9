"""tools/results.py: numbers against hand-worked ones."""
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

import results


def write_run(folder, entries, total, **args):
    """A run folder; entries: of log.txt, as dicts."""
    folder.mkdir(parents=True)
    args = {'model': 'vit_pico_patch8', 'input_size': [64], 'finetune': None, 'teacher_path': None,
            'commit': 'abc1234', 'hardware': '1 x cpu', **args}
    (folder / 'args.json').write_text(json.dumps(args | total))
    (folder / 'log.txt').write_text(''.join(json.dumps(entry) + '\n' for entry in entries))


def write_epochs(folder, acc1, epochs=None, seconds=100.0, **args):
    """An accuracy for each epoch, None without a test; `epochs` if the run is unfinished."""
    entries = []
    for epoch, value in enumerate(acc1):
        entries.append({'epoch': epoch, 'train_loss': 1 / (epoch + 1),
                        'train_seconds': seconds * (epoch + 1) / len(acc1)})
        entries[-1] |= {} if value is None else {'test_acc1': value, 'test_images': 50}
    args = args if 'target' in args else {'distillation_type': 'hard', **args}
    write_run(folder, entries, {'epochs': epochs or len(acc1)}, **args)


def write_generic(folder, epochs, seconds=100.0, **args):
    args = {'target': 'feature', 'mask_ratio': 0.75, 'target_layer': None, **args}
    write_epochs(folder, [None] * epochs, seconds=seconds, **args)


def write_g2sd(home, acc1, seconds=(100.0, 100.0), epochs=None):
    write_generic(home / 'generic', 6, seconds[0])
    write_epochs(home / 'g2sd', acc1, epochs, seconds[1], finetune='generic', teacher_path='teacher')


def write_rounds(folder, scores, iterations=None, seconds=100.0, **args):
    """A round of 40 iterations for each box AP or mIoU."""
    total, entries = iterations or 40 * len(scores), []
    for done, value in zip(range(40, 40 * len(scores) + 1, 40), scores):
        done = min(done, total)
        entries.append({'iteration': done, 'train_loss': 1 / done, 'test_images': 30,
                        'train_seconds': seconds * done / total})
        if 'anchor_size' in args:
            entries[-1] |= {'test_bbox_AP': value, 'test_bbox_AP50': value + 20, 'test_mask_AP': value - 2,
                            'test_mask_AP50': value + 18}
        else:
            entries[-1] |= {'test_mIoU': value, 'test_mAcc': value + 10, 'test_aAcc': value + 30,
                            'test_IoU': {'sky': value, 'sea': None}}
    write_run(folder, entries, {'iterations': total}, **{'finetune': 'generic', **args})


write_det = functools.partial(write_rounds, anchor_size=8)
write_seg = functools.partial(write_rounds, cwd_weight=3)


def run_tool(*words):
    results.main(results.get_args_parser().parse_args([str(word) for word in words]))


def page_of(capsys, *words, out=None):
    """({heading of the first column, or words of the title: {row: {heading: cell}}}, text) of the page."""
    run_tool(*words)
    text = capsys.readouterr().out
    assert text == ((out or words[0]) / 'results.md').read_text(encoding='utf-8')
    tables, title = {}, ''
    for block in text.split('\n\n'):
        title = block[4:].split(':')[0] if block.startswith('### ') else title
        rows = [[cell.strip() for cell in line[1:-1].split('|')] for line in block.splitlines()]
        if block.startswith('| '):
            name = title if rows[0][0] == 'method' else rows[0][0]
            tables[name] = {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows[2:]}
    return tables, text


@pytest.fixture
def panels(monkeypatch):
    """{title: axes} of the picture, after a run of the tool."""
    drawn = {}
    save = Figure.savefig

    def look(figure, path):
        save(figure, path)
        for axes in figure.axes:
            drawn[axes.get_title()] = axes
    monkeypatch.setattr(Figure, 'savefig', look)
    return drawn


def lines_of(axes):
    """{label: [(x, y), ...]} of the lines."""
    return {line.get_label(): [tuple(point) for point in line.get_xydata()] for line in axes.get_lines()}


# ---- the paper's tables --------------------------------------------------------------------------


def test_a_table_reports_the_last_epoch_of_each_seed(tmp_path, capsys):
    for seed, last in enumerate((80.0, 82.0, 84.0)):
        write_g2sd(tmp_path / f'seed{seed}', [70.0, 99.0, last])
    row = page_of(capsys, tmp_path)[0]['Table 2']['G2SD-S']
    assert row == {'1st stage': 'generic 6', '2nd stage': 'specific 3', 'paper hours': '71',
                   'paper top-1': '82.5', 'time, minutes': '3.33 ± 0.00 (n = 3)',
                   'top-1': '82.00 ± 2.00 (n = 3)'}  # deviations -2, 0, 2: variance 8 / 2


def test_time_adds_both_stages_and_leaves_the_teacher_out(tmp_path, capsys):
    write_generic(tmp_path / 'teacher_mae', 1, 90 * 3600, target='pixel')
    write_epochs(tmp_path / 'teacher_cls', [90.0], seconds=9 * 3600, finetune='mae')
    write_g2sd(tmp_path / 'seed0', [80.0], (3 * 3600, 1 * 3600))
    write_g2sd(tmp_path / 'seed1', [80.0], (4 * 3600, 2 * 3600))
    write_epochs(tmp_path / 'seed0/deit_distilled', [70.0] * 4, seconds=8 * 3600, teacher_path='teacher')
    tables, text = page_of(capsys, tmp_path)
    rows = tables['Table 2']
    assert rows['G2SD-S']['time, hours'] == '5.00 ± 1.41 (n = 2)'  # 3 + 1, 4 + 2
    teacher = list(rows['teacher: MAE ViT-B, fine-tuned'].values())
    assert teacher[:3] == ['MAE 1', 'fine-tuning 1', '99.00 (n = 1)']
    assert rows['DeiT-S with distillation']['time, hours'] == '8.00 (n = 1)'
    assert rows['DeiT-S with distillation']['1st stage'] == 'supervised + distillation 4'
    assert rows['G2SD-S']['part of the teacher'] == '88.9 %'
    assert 'with distillation: 0.62; in the paper 0.63 (71 / 112 hours)' in text  # 5 / 8


def test_what_is_unfinished_does_not_count_and_breaks_nothing(tmp_path, capsys):
    write_g2sd(tmp_path / 'seed0', [80.0, 81.0])
    write_g2sd(tmp_path / 'seed1', [60.0, 99.0], epochs=3)
    with open(tmp_path / 'seed1/g2sd/log.txt', 'a') as file:
        file.write('{"epoch": 2, "train_loss": 0.3, "test_IoU": {"sky": 1.0}')
    write_g2sd(tmp_path / 'seed2', [77.0])
    write_epochs(tmp_path / 'seed10/finetuned', [], epochs=6, finetune='generic')
    (tmp_path / 'seed10/finetuned/log.txt').unlink()
    log = tmp_path / 'seed2/generic/log.txt'
    log.write_text(log.read_text().split('{"epoch": 5')[0])
    tables, text = page_of(capsys, tmp_path)
    rows = tables['Table 2']
    assert rows['G2SD-S']['top-1'] == '81.00 (n = 1)' and rows['G2SD-S']['time, minutes'] == '3.33 (n = 1)'
    assert rows['G2SD-S w/o S.D (Tables 3, 4)']['top-1'] == '' and 'Time of' not in text
    assert rows['DeiT-S'] == dict.fromkeys(rows['DeiT-S'], '') | {'paper hours': '53', 'paper top-1': '81.4'}
    states = {name: cells['state'] for name, cells in tables['classification'].items()}
    assert states == {'seed0/g2sd': 'epoch 2/2', 'seed1/g2sd': 'epoch 2/3', 'seed10/finetuned': 'epoch 0/6',
                      'seed2/g2sd': 'epoch 1/1'}


def test_detection_stands_beside_table_3(tmp_path, capsys):
    write_det(tmp_path / 'teacher_det', [40.0, 50.0, 48.0], iterations=100, seconds=7200)
    write_det(tmp_path / 'seed0/det_g2sd', [30.0, 60.0, 44.0], seconds=3600, teacher_path='t')
    write_det(tmp_path / 'seed1/det_g2sd', [30.0, 31.0, 46.0], seconds=3 * 3600, teacher_path='t')
    write_det(tmp_path / 'seed2/det_g2sd', [30.0, 99.0], iterations=120, teacher_path='t')
    write_det(tmp_path / 'seed0/det_finetuned', [20.0], iterations=80)
    write_det(tmp_path / 'seed1/det_finetuned', [], iterations=60)
    tables, _ = page_of(capsys, tmp_path)
    assert list(tables) == ['Table 3', 'detection']
    rows = tables['Table 3']
    assert rows['G2SD-S'] == {
        '1st stage': 'specific 120', 'time, hours': '2.00 ± 1.41 (n = 2)',
        'AP^bbox': '45.00 ± 1.41 (n = 2)', 'AP^mask': '43.00 ± 1.41 (n = 2)',
        'AP50^bbox': '65.00 ± 1.41 (n = 2)', 'AP50^mask': '63.00 ± 1.41 (n = 2)',
        'part of the teacher': '93.8 %', 'paper top-1': '82.5', 'paper AP^bbox': '50.6',
        'paper AP^mask': '44.8'}
    assert rows['teacher: ViTDet-B from MAE']['AP^bbox'] == '48.00 (n = 1)'
    assert rows['G2SD-S w/o S.D']['1st stage'] == 'fine-tuning 60 / fine-tuning 80'
    paper = {'DeiT-S 300e': (79.9, 45.7, 40.7), 'DeiT-S with distillation 300e': (81.2, 47.2, 41.9),
             'DeiT-S 500e': (81.4, 46.9, 41.6), 'DINO-S 3200e': (82.0, 49.1, 43.3),
             'iBOT-S 3200e': (82.3, 49.7, 44.0)}
    for method, values in paper.items():
        assert [float(cell) for cell in rows.pop(method).values() if cell] == list(values)
    assert list(rows) == ['teacher: ViTDet-B from MAE', 'G2SD-S w/o S.D', 'G2SD-S']


def test_segmentation_is_set_against_the_teacher(tmp_path, capsys):
    write_seg(tmp_path / 'teacher_seg', [30.0, 50.0])
    for seed, last in enumerate((44.0, 46.0)):
        write_seg(tmp_path / f'seed{seed}/seg_g2sd', [60.0, last])
    tables, text = page_of(capsys, tmp_path)
    row = tables['ADE20K']['G2SD-S']
    assert row['mIoU'] == '45.00 ± 1.41 (n = 2)' and row['part of the teacher'] == '90.0 %'
    assert row['mean accuracy'] == '55.00 ± 1.41 (n = 2)' and row['pixel accuracy'] == '75.00 ± 1.41 (n = 2)'
    assert set(tables['ADE20K']) == {'teacher: UPerNet on ViT-B from MAE', 'G2SD-S'} and '99.3 %' in text


def write_variant(home, name, acc1, specific=None, **args):
    write_generic(home / f'generic{name}', 4, **args)
    write_epochs(home / f'finetuned{name}', acc1, finetune='generic')
    if specific:
        write_epochs(home / f'g2sd{name}', specific, finetune='generic', teacher_path='teacher')


def test_targets_ratios_and_blocks_stand_beside_tables_4_and_5(tmp_path, capsys):
    write_variant(tmp_path / 'seed0', '', [10.0, 70.0], [20.0, 80.0])
    assert list(page_of(capsys, tmp_path)[0]) == ['Table 2', 'classification', 'stage 1']
    for seed, last in enumerate((60.0, 64.0)):
        write_variant(tmp_path / f'seed{seed}', '_recon', [90.0, last], target='recon')
    write_variant(tmp_path / 'seed0', '_recon_gt', [50.0], [55.0, 57.0], target='recon_gt')
    tables, _ = page_of(capsys, tmp_path)
    assert [(cells['paper top-1'], cells['top-1']) for cells in tables['Table 4'].values()] == [
        ('82.0', '70.00 (n = 1)'), ('82.5', '80.00 (n = 1)'), ('81.4', '62.00 ± 2.83 (n = 2)'), ('81.8', ''),
        ('81.5', '50.00 (n = 1)'), ('81.7', '57.00 (n = 1)')]
    assert 'Table 5' not in tables
    write_variant(tmp_path / 'seed0', '_mask0.05', [61.0], mask_ratio=0.05)
    write_variant(tmp_path / 'seed0', '_mask0.9', [63.0], mask_ratio=0.8)
    write_variant(tmp_path / 'seed1', '_layer2', [65.0], target_layer=2)
    rows = page_of(capsys, tmp_path)[0]['Table 5']
    assert [(method, cells['paper top-1'], cells['top-1']) for method, cells in rows.items()] == [
        ('mask ratio 0.05', '81.7', '61.00 (n = 1)'), ('mask ratio 0.25', '81.7', ''),
        ('mask ratio 0.55', '81.6', ''), ('mask ratio 0.75, middle block', '82.0', '70.00 (n = 1)'),
        ('mask ratio 0.9', '81.8', '63.00 (n = 1)'), ('decoder block 2', '', '65.00 (n = 1)')]
    # a folder that was trained with another ratio than its name stands for shows it
    assert [rows[method]['1st stage'] for method in ('mask ratio 0.9', 'decoder block 2')] == [
        'generic 4, mask_ratio 0.8', 'generic 4, target_layer 2']


def test_teachers_and_stage_1_alone_begin_no_table(tmp_path, capsys, panels):
    write_seg(tmp_path / 'teacher_seg', [50.0])
    write_generic(tmp_path / 'seed0/generic', 6)
    assert list(page_of(capsys, tmp_path)[0]) == ['segmentation', 'stage 1']
    write_seg(tmp_path / 'seed0/seg_g2sd', [44.0])
    panels.clear()
    assert list(page_of(capsys, tmp_path)[0]) == ['ADE20K', 'segmentation', 'stage 1']
    assert list(panels) == ['ADE20K: mIoU, percent', 'ADE20K: pixel accuracy, percent', 'stage 1: train_loss']


# ---- runs of any names ---------------------------------------------------------------------------


def test_each_run_gets_a_row_of_what_it_did_and_its_last_numbers(tmp_path, capsys):
    write_epochs(tmp_path / 'a', [30.0, None, 40.0, None, 80.0, None], epochs=8, seconds=3661.0, finetune='x')
    write_generic(tmp_path / 'sweep/lr 1/b', 8, 60.0, target='recon')
    write_det(tmp_path / 'sweep/c', [20.0, 35.0], teacher_path='t')
    write_seg(tmp_path / 'sweep/d', [], iterations=80)
    write_epochs(tmp_path / 'a/b/c/too_deep', [1.0])
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other/args.json').write_text('{"learning_rate": 1}')
    tables, text = page_of(capsys, tmp_path)
    rest = {'network': 'vit_pico_patch8 at 64', 'commit': 'abc1234', 'processes': '1 x cpu'}
    assert tables == {
        'classification': {'a': {
            'kind': 'fine-tuning 8', 'state': 'epoch 6/8', 'first': '30', 'at a quarter': '40',
            'at half': '80', 'train_loss': '0.1667', 'test_acc1': '80', 'test images': '50',
            'time': '1:01:01', **rest}},
        'segmentation': {'sweep/d': {'kind': 'fine-tuning 80', 'state': 'iteration 0/80', **rest}},
        'detection': {'sweep/c': {
            'kind': 'specific 80', 'state': 'iteration 80/80', 'first': '20', 'at a quarter': '20',
            'at half': '20', 'train_loss': '0.0125', 'test_bbox_AP': '35', 'test_bbox_AP50': '55',
            'test_mask_AP': '33', 'test_mask_AP50': '53', 'test images': '30', 'time': '0:01:40', **rest}},
        'stage 1': {'sweep/lr 1/b': {
            'kind': 'generic 8, target recon', 'state': 'epoch 8/8', 'first': '1', 'at a quarter': '0.5',
            'at half': '0.25', 'train_loss': '0.125', 'time': '0:01:00', **rest}}}
    assert 'Is a run healthy?' in text and 'about 0.02' in text


def test_several_folders_are_set_side_by_side_in_the_current_one(tmp_path, capsys, monkeypatch, panels):
    for name, values in (('one/seed0/g2sd', [50.0, 60.0]), ('two/seed0/g2sd', [70.0])):
        write_epochs(tmp_path / name, values)
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    tables, _ = page_of(capsys, '../one', '../two/seed0/g2sd', out=Path())
    assert list(tables['classification']) == ['../one/seed0/g2sd', '../two/seed0/g2sd']
    assert lines_of(panels['classification: test_acc1']) == {
        '../one/seed0/g2sd': [(1, 50.0), (2, 60.0)], '../two/seed0/g2sd': [(1, 70.0)]}
    assert lines_of(panels['classification: train_loss'])['../one/seed0/g2sd'] == [(1, 1.0), (2, 0.5)]
    tables, _ = page_of(capsys, '../two/seed0/g2sd', '--out', tmp_path / 'x/y', out=tmp_path / 'x/y')
    assert list(tables['classification']) == ['g2sd'] and (tmp_path / 'x/y/curves.png').exists()


def test_a_folder_without_runs_is_said(tmp_path):
    write_epochs(tmp_path / 'run', [1.0])
    for folder in (tmp_path / 'run/none', tmp_path / 'none'):
        with pytest.raises(SystemExit, match='none holds no run'):
            run_tool(tmp_path / 'run', folder)


# ---- curves and pictures -------------------------------------------------------------------------


def test_seeds_are_drawn_as_their_mean_in_a_band(tmp_path, panels):
    for seed, values in enumerate(([50.0, 60.0, 70.0], [52.0, None, 76.0], [57.0, 60.0, 73.0])):
        write_g2sd(tmp_path / f'seed{seed}', values)
    write_g2sd(tmp_path / 'seed3', [9.0], epochs=3)
    for seed, values in ((0, [30.0, 40.0]), (1, [20.0])):
        write_epochs(tmp_path / f'seed{seed}/deit', values, epochs=4)
    write_epochs(tmp_path / 'teacher_cls', [10.0, 90.0], finetune='mae')
    run_tool(tmp_path)
    top1, loss = panels['Table 2: top-1, percent'], panels['Generic stage: training loss']
    # stage 2 follows six epochs of stage 1; a seed has no test of epoch 2; the fourth is not finished
    assert lines_of(top1) == {
        'teacher: MAE ViT-B, fine-tuned': [(0, 90.0), (1, 90.0)], 'G2SD-S': [(7, 53.0), (9, 73.0)],
        'DeiT-S': [(1, 25.0)]}
    bands = {to_hex(band.get_facecolor()[0]): band.get_datalim(top1.transData) for band in top1.collections}
    assert (bands['#c62828'].intervaly == [50.0, 76.0]).all() and (bands['#c62828'].intervalx == [7, 9]).all()
    assert lines_of(loss) == {'G2SD-S': [(k, pytest.approx(1 / k)) for k in range(1, 7)]}
    styles = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in top1.get_lines()}
    assert styles == {'teacher: MAE ViT-B, fine-tuned': ('#555555', '--'), 'G2SD-S': ('#c62828', '-'),
                      'DeiT-S': ('#2e7d32', '-')}
    assert Image.open(tmp_path / 'curves.png').width == 1200


def test_every_table_and_every_run_is_drawn(tmp_path, panels):
    """Rows that share a first stage show its loss once; a colour stands for one row or run of a panel."""
    write_variant(tmp_path / 'seed0', '', [70.0], [80.0])
    write_variant(tmp_path / 'seed0', '_recon', [60.0], [62.0], target='recon')
    write_variant(tmp_path / 'seed0', '_mask0.25', [64.0], mask_ratio=0.25)
    write_det(tmp_path / 'seed0/det_g2sd', [30.0, 45.0], iterations=80)
    for number in range(11):
        write_epochs(tmp_path / f'own/{number:02d}', [float(number)])
    run_tool(tmp_path)
    assert {title: list(lines_of(axes)) for title, axes in panels.items() if title.startswith('Table')} == {
        'Table 2: top-1, percent': ['G2SD-S w/o S.D (Tables 3, 4)', 'G2SD-S'],
        'Table 3: AP^bbox, percent': ['G2SD-S'], 'Table 3: AP^mask, percent': ['G2SD-S'],
        'Table 4: top-1, percent': ['features, w/o S.D', 'features, with S.D', 'reconstructions, w/o S.D',
                                    'reconstructions, with S.D'],
        'Table 5: top-1, percent': ['mask ratio 0.25', 'mask ratio 0.75, middle block']}
    assert lines_of(panels['Table 3: AP^mask, percent'])['G2SD-S'] == [(40, 28.0), (80, 43.0)]
    assert len(lines_of(panels['Generic stage: training loss'])) == 2  # Table 5's, the last one
    assert list(lines_of(panels['classification: test_acc1'])) == ['own/10']  # ten in the panel before
    for table in results.TABLES:
        assert len({row.colour for row in table.rows}) == len(table.rows)


def test_the_tools_draw_the_first_finished_network(tmp_path, capsys, monkeypatch):
    data = tmp_path / 'a b'
    for folder in ('val/cat', 'val2017', 'images/validation'):
        (data / folder).mkdir(parents=True)
        for number in range(9):
            (data / folder / f'{number}.png').write_text('')
    write_epochs(tmp_path / 'runs/seed0/generic', [None], epochs=2, target='feature', data_path=str(data))
    write_generic(tmp_path / 'runs/seed1/generic', 1, data_path=str(data))
    write_det(tmp_path / 'runs/seed0/det_g2sd', [1.0], data_path=str(data))
    write_seg(tmp_path / 'runs/seed0/seg_g2sd', [1.0], data_path=str(data))
    calls = []
    monkeypatch.setattr(results.subprocess, 'run', lambda words, **_: calls.append(list(map(str, words))))
    Image.new('RGB', (8, 8)).save(tmp_path / 'runs/stage1.png')
    _, text = page_of(capsys, tmp_path / 'runs')
    assert re.findall(r'!\[[^]]*\]\(([^)]*)\)', text) == ['curves.png', 'stage1.png']
    expected = (('visualize', 'seed1/generic', 'stage1', None),
                ('predict', 'seed0/det_g2sd', 'detection', 'annotations/instances_val2017.json'),
                ('predict', 'seed0/seg_g2sd', 'segmentation', 'annotations/validation'))
    for words, (tool, run, out, truth) in zip(calls, expected, strict=True):
        flags = dict(zip(words, words[1:]))
        assert words[1].endswith(f'tools/{tool}.py') and flags['--out'] == f'{tmp_path}/runs/{out}.png'
        assert flags['--checkpoint'] == f'{tmp_path}/runs/{run}/checkpoint.pth'
        assert flags.get('--annotations') == (truth and f'{data}/{truth}')
        files = words[words.index('--images') + 1:]
        assert len(set(files)) == 3 and all(Path(file).is_file() for file in files)


# ---- what makes a final.pth ----------------------------------------------------------------------


def test_a_run_is_finished_when_its_log_has_the_last_epoch(tmp_path):
    """A recipe's number of epochs is in the checkpoint alone."""
    def finished():
        try:
            run_tool('--finished', tmp_path / 'run')
        except SystemExit as error:
            assert 'was interrupted: start make again' in str(error)
            return False
        return True
    assert not finished()
    write_generic(tmp_path / 'run', 2)
    assert finished() and len(list((tmp_path / 'run').iterdir())) == 2  # nothing is written
    args = json.loads((tmp_path / 'run/args.json').read_text())
    for epochs, last in ((2, True), (3, False)):
        (tmp_path / 'run/args.json').write_text(json.dumps({**args, 'epochs': None}))
        torch.save({'args': {'epochs': epochs}}, tmp_path / 'run/checkpoint.pth')
        assert finished() == last
    (tmp_path / 'run/checkpoint.pth').unlink()
    assert not finished()
    (tmp_path / 'run/log.txt').unlink()
    assert not finished()
    write_det(tmp_path / 'other', [1.0, 2.0])
    (tmp_path / 'run').rename(tmp_path / 'old')
    (tmp_path / 'other').rename(tmp_path / 'run')
    assert finished()


def test_a_run_can_be_asked_for_quickly(tmp_path):
    """make asks after every run: neither torch nor matplotlib is loaded for it."""
    write_epochs(tmp_path / 'run', [1.0])
    code = ('import sys, results\nresults.main(results.get_args_parser().parse_args())\n'
            'assert not {"torch", "matplotlib", "numpy"} & set(sys.modules)')
    subprocess.run([sys.executable, '-c', code, '--finished', tmp_path / 'run'], check=True,
                   cwd=Path(results.__file__).parent)
