"""tools/results.py: numbers against hand-worked ones."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

import results


def run_tool(tool, *words):
    tool.main(tool.get_args_parser().parse_args([str(word) for word in words]))


def write_run(folder, acc1=(), epochs=None, seconds=100.0, **args):
    """A run with one epoch per accuracy (None: stage 1), of `seconds` in all; `epochs` if unfinished."""
    folder.mkdir(parents=True)
    args = {'model': 'vit_pico_patch8', 'input_size': [32], 'epochs': epochs or len(acc1), 'finetune': None,
            'teacher_path': None, **args}
    (folder / 'args.json').write_text(json.dumps(args))
    lines = []
    for epoch, value in enumerate(acc1):
        lines.append({'epoch': epoch, 'train_loss': 1 / (epoch + 1),
                      'train_seconds': seconds * (epoch + 1) / len(acc1)})
        if value is not None:
            lines[-1] |= {'test_acc1': value, 'test_images': 50}
    (folder / 'log.txt').write_text(''.join(json.dumps(line) + '\n' for line in lines))


def write_g2sd(home, acc1, seconds=(100.0, 100.0), epochs=None):
    write_run(home / 'generic', [None] * 6, seconds=seconds[0], target='feature')
    write_run(home / 'g2sd', acc1, epochs, seconds[1], finetune='generic', teacher_path='teacher')


def write_rounds(folder, scores, iterations=None, seconds=100.0, **args):
    """A run with a round of 40 iterations per dict of scores."""
    folder.mkdir(parents=True)
    total = iterations or 40 * len(scores)
    args = {'model': 'vit_nano_patch8', 'input_size': [64], 'iterations': total, 'finetune': 'generic',
            'teacher_path': None, 'commit': 'abc1234', 'hardware': '1 x cpu', **args}
    (folder / 'args.json').write_text(json.dumps(args))
    lines = []
    for number, values in enumerate(scores, 1):
        done = min(40 * number, total)
        lines.append({'iteration': done, 'train_loss': 1 / done, 'train_seconds': seconds * done / total,
                      'test_images': 30, **values})
    (folder / 'log.txt').write_text(''.join(json.dumps(line) + '\n' for line in lines))


def write_detection(folder, box, *args, **kwargs):
    write_rounds(folder, [{
        'test_bbox_AP': value, 'test_bbox_AP50': value + 20, 'test_mask_AP': value - 2,
        'test_mask_AP50': value + 18} for value in box], *args, **kwargs)


def write_segmentation(folder, miou, *args, **kwargs):
    write_rounds(folder, [{'test_mIoU': value, 'test_mAcc': value + 10, 'test_aAcc': value + 30,
                           'test_IoU': {'sky': value, 'sea': None}} for value in miou], *args, **kwargs)


def tables_of(folder, capsys):
    """({first words of the title: {row: {heading: cell}}}, text) of the page."""
    run_tool(results, folder)
    text = capsys.readouterr().out
    assert text == (folder / 'results.md').read_text(encoding='utf-8')
    tables = {}
    for part in text.split('### ')[1:]:
        cells = [[cell.strip() for cell in line[1:-1].split('|')] for line in part.splitlines()
                 if line.startswith('| ')]
        if cells:
            tables[part.splitlines()[0].split(':')[0]] = {
                row[0]: dict(zip(cells[0][1:], row[1:], strict=True)) for row in cells[1:]}
    return tables, text


def test_results_report_the_last_epoch_of_each_seed(tmp_path, capsys):
    for seed, last in enumerate((80.0, 82.0, 84.0)):
        write_g2sd(tmp_path / f'seed{seed}', [70.0, 99.0, last])
    tables, _ = tables_of(tmp_path, capsys)
    row = tables['Table 2']['G2SD-S']
    assert row['top-1'] == '82.00 ± 2.00 (n = 3)'  # deviations -2, 0, 2: variance 8 / 2
    assert (row['1st stage'], row['2nd stage']) == ('generic 6', 'specific 3')
    assert (row['paper hours'], row['paper top-1']) == ('71', '82.5')
    assert tables['Is a run healthy?']['seed2/g2sd']['test images'] == '50'
    assert tables['Is a run healthy?']['seed2/g2sd']['state'] == 'epoch 3/3'


def test_results_time_adds_both_stages_and_leaves_the_teacher_out(tmp_path, capsys):
    write_run(tmp_path / 'teacher_mae', [None], seconds=90 * 3600, target='pixel')
    write_run(tmp_path / 'teacher_cls', [90.0], seconds=9 * 3600, finetune='mae')
    write_g2sd(tmp_path / 'seed0', [80.0], (3 * 3600, 1 * 3600))
    write_g2sd(tmp_path / 'seed1', [80.0], (4 * 3600, 2 * 3600))
    write_run(tmp_path / 'seed0/deit_distilled', [70.0] * 4, seconds=8 * 3600, teacher_path='teacher')
    tables, text = tables_of(tmp_path, capsys)
    rows = tables['Table 2']
    assert list(rows['G2SD-S'].values())[2:5] == [
        '3.50 ± 0.71 (n = 2)', '1.50 ± 0.71 (n = 2)', '5.00 ± 1.41 (n = 2)']  # 3 + 1, 4 + 2
    assert list(rows['teacher: MAE ViT-B, fine-tuned'].values())[:5] == [
        'MAE 1', 'fine-tuning 1', '90.00 (n = 1)', '9.00 (n = 1)', '99.00 (n = 1)']
    assert rows['DeiT-S with distillation']['time, hours'] == '8.00 (n = 1)'
    assert 'Time of G2SD-S / DeiT-S with distillation: 0.62; in the paper 0.63 (71 / 112)' in text  # 5 / 8
    assert rows['DeiT-S with distillation']['1st stage'] == 'supervised + distillation 4'
    assert rows['G2SD-S']['part of the teacher'] == '88.9 %'


def test_results_do_not_count_unfinished_runs(tmp_path, capsys):
    write_g2sd(tmp_path / 'seed0', [80.0, 81.0])
    write_g2sd(tmp_path / 'seed1', [60.0, 99.0], epochs=3)
    with open(tmp_path / 'seed1/g2sd/log.txt', 'a') as file:
        file.write('{"epoch": 2, "train_loss": 0.3, "test_ac')
    write_run(tmp_path / 'seed10/generic', epochs=6, target='feature')
    tables, _ = tables_of(tmp_path, capsys)
    row = tables['Table 2']['G2SD-S']
    assert row['top-1'] == '81.00 (n = 1)' and row['time, minutes'] == '3.33 (n = 1)'
    states = {name: cells['state'] for name, cells in tables['Is a run healthy?'].items()}
    assert states['seed1/g2sd'] == 'epoch 2/3' and states['seed10/generic'] == 'epoch 0/6'


def test_results_leave_cells_of_missing_runs_empty(tmp_path, capsys):
    write_g2sd(tmp_path / 'seed0', [80.0])
    (tmp_path / 'seed0/generic/args.json').unlink()
    tables, text = tables_of(tmp_path, capsys)
    rows = tables['Table 2']
    assert rows['DeiT-S'] == {'2nd stage': '', 'top-1': '', 'paper hours': '53', 'paper top-1': '81.4'}
    assert rows['G2SD-S'] == {'2nd stage': 'specific 1', 'top-1': '80.00 (n = 1)', 'paper hours': '71',
                              'paper top-1': '82.5'}
    assert 'Time of' not in text


def test_results_put_detection_beside_table_3(tmp_path, capsys):
    write_detection(tmp_path / 'teacher_det', [40.0, 50.0, 48.0], iterations=100, seconds=7200, input_size=[128])
    write_detection(tmp_path / 'seed0/det_g2sd', [30.0, 60.0, 44.0], seconds=3600, teacher_path='t')
    write_detection(tmp_path / 'seed1/det_g2sd', [30.0, 31.0, 46.0], seconds=3 * 3600, teacher_path='t')
    write_detection(tmp_path / 'seed2/det_g2sd', [30.0, 99.0], iterations=120, teacher_path='t')
    write_detection(tmp_path / 'seed0/det_finetuned', [20.0], iterations=80)
    write_detection(tmp_path / 'seed1/det_finetuned', [], iterations=60)
    tables, text = tables_of(tmp_path, capsys)
    assert 'Table 2' not in tables
    rows = tables['Table 3']
    assert rows['G2SD-S'] == {
        '1st stage': 'specific 120', 'time, hours': '2.00 ± 1.41 (n = 2)', 'AP^bbox': '45.00 ± 1.41 (n = 2)',
        'AP^mask': '43.00 ± 1.41 (n = 2)', 'AP50^bbox': '65.00 ± 1.41 (n = 2)',
        'AP50^mask': '63.00 ± 1.41 (n = 2)', 'part of the teacher': '93.8 %', 'paper top-1': '82.5',
        'paper AP^bbox': '50.6', 'paper AP^mask': '44.8'}
    assert rows['teacher: ViTDet-B from MAE']['AP^bbox'] == '48.00 (n = 1)'
    assert rows['G2SD-S w/o S.D']['AP^bbox'] == ''
    assert rows['G2SD-S w/o S.D']['1st stage'] == 'fine-tuning 60 / fine-tuning 80'
    paper = {'DeiT-S 300e': (79.9, 45.7, 40.7), 'DeiT-S with distillation 300e': (81.2, 47.2, 41.9),
             'DeiT-S 500e': (81.4, 46.9, 41.6), 'DINO-S 3200e': (82.0, 49.1, 43.3), 'iBOT-S 3200e': (82.3, 49.7, 44.0)}
    for method, values in paper.items():
        row = rows.pop(method)
        assert [row[f'paper {name}'] for name in ('top-1', 'AP^bbox', 'AP^mask')] == [str(value) for value in values]
        assert sum(map(bool, row.values())) == 3
    assert set(rows) == {'teacher: ViTDet-B from MAE', 'G2SD-S w/o S.D', 'G2SD-S'}
    runs = tables['Is a run healthy?']
    assert runs['seed1/det_finetuned']['state'] == 'iteration 0/60'
    assert runs['seed2/det_g2sd']['state'] == 'iteration 80/120'
    assert list(runs['seed0/det_g2sd'].values()) == [
        'iteration 120/120', '30', '30', '60', '44', '30', 'vit_nano_patch8 at 64', 'abc1234', '1 x cpu']


def test_results_list_random_weights_only_where_they_were_trained(tmp_path, capsys):
    write_detection(tmp_path / 'seed0/det_scratch', [1.0, 3.0], seconds=30.0, finetune=None)
    tables, _ = tables_of(tmp_path, capsys)
    row = tables['Table 3']['random weights (not in the paper)']
    assert row['AP^bbox'] == '3.00 (n = 1)' and row['paper AP^bbox'] == '' and row['time, seconds'] == '30.00 (n = 1)'
    assert len(tables['Table 3']) == 9


def test_results_of_both_tables_do_not_mix(tmp_path, capsys):
    write_g2sd(tmp_path / 'seed0', [80.0, 81.0])
    alone, _ = tables_of(tmp_path, capsys)
    write_detection(tmp_path / 'seed0/det_g2sd', [20.0, 40.0], seconds=7200.0)
    tables, _ = tables_of(tmp_path, capsys)
    assert tables['Table 2'] == alone['Table 2'] and 'time, minutes' in alone['Table 2']['G2SD-S']
    assert tables['Table 3']['G2SD-S']['time, hours'] == '2.00 (n = 1)'
    assert Image.open(tmp_path / 'curves.png').size == (1200, 2 * (430 + 26))


def test_results_of_segmentation_are_set_against_the_teacher(tmp_path, capsys):
    write_segmentation(tmp_path / 'teacher_seg', [30.0, 50.0], seconds=7200.0)
    for seed, last in enumerate((44.0, 46.0)):
        write_segmentation(tmp_path / f'seed{seed}/seg_g2sd', [60.0, last], seconds=3600.0)
    write_segmentation(tmp_path / 'seed2/seg_g2sd', [60.0], iterations=80)
    tables, text = tables_of(tmp_path, capsys)
    assert list(tables) == ['ADE20K', 'Is a run healthy?'] and '99.3 %' in text
    row = tables['ADE20K']['G2SD-S']
    assert row['mIoU'] == '45.00 ± 1.41 (n = 2)' and row['part of the teacher'] == '90.0 %'
    assert row['mean accuracy'] == '55.00 ± 1.41 (n = 2)' and row['pixel accuracy'] == '75.00 ± 1.41 (n = 2)'
    assert row['time, hours'] == '1.00 ± 0.00 (n = 2)'
    assert set(tables['ADE20K']) == {'teacher: UPerNet on ViT-B from MAE', 'G2SD-S'}
    (tmp_path / 'teacher_seg').rename(tmp_path / 'other')
    assert 'part of the teacher' not in tables_of(tmp_path, capsys)[0]['ADE20K']['G2SD-S']


def panels_of(tmp_path, monkeypatch):
    panels = []
    monkeypatch.setattr(results, 'draw_panel', lambda draw, box, title, xlabel, curves, font: panels.append(
        (title, xlabel, curves)))
    run_tool(results, tmp_path)
    return panels


def test_curves_count_the_epochs_of_both_stages(tmp_path, monkeypatch):
    write_g2sd(tmp_path / 'seed0', [50.0, 60.0])
    write_run(tmp_path / 'seed0/deit', [30.0] * 8)
    write_run(tmp_path / 'teacher_cls', [10.0, 90.0], finetune='mae')
    accuracy, loss = panels_of(tmp_path, monkeypatch)
    curves = {curve.colour: curve for curve in accuracy[2]}
    assert curves[results.G2SD.colour].points == [(7, 50.0), (8, 60.0)]
    assert curves['#555555'].dashed and curves['#555555'].points == [(0, 90.0)]
    assert [x for x, _ in loss[2][0].points] == [1, 2, 3, 4, 5, 6]


def test_curves_show_ap_and_miou_against_iterations(tmp_path, monkeypatch):
    write_detection(tmp_path / 'teacher_det', [40.0, 50.0])
    write_detection(tmp_path / 'seed0/det_g2sd', [30.0, 44.0, 45.0], iterations=100)
    write_detection(tmp_path / 'seed1/det_g2sd', [32.0], iterations=100)
    write_segmentation(tmp_path / 'seed0/seg_g2sd', [15.0], iterations=60)
    panels = panels_of(tmp_path, monkeypatch)
    assert [panel[:2] for panel in panels] == [
        ('Table 3: AP^bbox, percent', 'iterations'), ('Table 3: AP^mask, percent', 'iterations'),
        ('ADE20K: mIoU, percent', 'iterations'), ('ADE20K: pixel accuracy, percent', 'iterations')]
    for (_, _, curves), lower in zip(panels[:2], (0, 2)):
        assert [curve.points for curve in curves] == [
            [(0, 50.0 - lower)], [(40, 30.0 - lower), (80, 44.0 - lower), (100, 45.0 - lower)], [(40, 32.0 - lower)]]


def test_stage_1_of_another_table_begins_no_table_2(tmp_path, capsys):
    write_run(tmp_path / 'teacher_mae', [None], target='pixel')
    write_run(tmp_path / 'seed0/generic', [None] * 6, target='feature')
    assert 'Table 2' in tables_of(tmp_path, capsys)[0]
    write_segmentation(tmp_path / 'seed0/seg_g2sd', [44.0])
    assert list(tables_of(tmp_path, capsys)[0]) == ['ADE20K', 'Is a run healthy?']
    assert Image.open(tmp_path / 'curves.png').size == (1200, 430 + 26)
    write_run(tmp_path / 'seed0/g2sd', [80.0], finetune='generic', teacher_path='teacher')
    assert 'Table 2' in tables_of(tmp_path, capsys)[0]


def test_every_row_with_runs_is_drawn_in_its_colour(tmp_path):
    write_detection(tmp_path / 'seed0/det_g2sd', [30.0, 44.0])
    write_detection(tmp_path / 'seed0/det_dino', [20.0, 35.0])
    run_tool(results, tmp_path)
    picture = np.array(Image.open(tmp_path / 'curves.png'))
    assert picture.shape == (430 + 2 * 26, 1200, 3)
    parts = picture[:420, :580], picture[:420, 580:], picture[420:]
    for row in results.TABLES[1].rows:
        drawn = [(part == ImageColor.getrgb(row.colour)).all(-1).sum() for part in parts]
        if row.folders[0] in ('det_g2sd', 'det_dino'):
            assert drawn[0] > 300 and drawn[1] > 300 and drawn[2] >= 45
        else:
            assert sum(drawn) < 10
    for table in results.TABLES:
        assert len({row.colour for row in table.rows}) == len(table.rows)


def write_variant(home, name, acc1, specific=None, seconds=(60.0, 60.0), **args):
    write_run(home / f'generic{name}', [None] * 4, seconds=seconds[0],
              **{'target': 'feature', 'mask_ratio': 0.75, 'target_layer': None, **args})
    write_run(home / f'finetuned{name}', acc1, seconds=seconds[1], finetune='generic')
    if specific:
        write_run(home / f'g2sd{name}', specific, seconds=seconds[1], finetune='generic', teacher_path='teacher')


def test_results_put_the_targets_beside_table_4(tmp_path, capsys):
    write_variant(tmp_path / 'seed0', '', [10.0, 70.0], [20.0, 80.0])
    assert 'Table 4' not in tables_of(tmp_path, capsys)[0]
    for seed, last in enumerate((60.0, 64.0)):
        write_variant(tmp_path / f'seed{seed}', '_recon', [90.0, last], None, (7200.0, 3600.0 * (1 + seed)), target='recon')
    write_variant(tmp_path / 'seed0', '_recon_gt', [50.0], [55.0, 57.0], target='recon_gt')
    tables, _ = tables_of(tmp_path, capsys)
    assert tables['Table 4']['reconstructions, w/o S.D'] == {
        '1st stage': 'generic (recon) 4', '2nd stage': 'fine-tuning 2', '1st stage, hours': '2.00 ± 0.00 (n = 2)',
        '2nd stage, hours': '1.50 ± 0.71 (n = 2)', 'time, hours': '3.50 ± 0.71 (n = 2)', 'top-1': '62.00 ± 2.83 (n = 2)',
        'paper top-1': '81.4'}
    assert {method: (cells['paper top-1'], cells['top-1']) for method, cells in tables['Table 4'].items()} == {
        'features, w/o S.D': ('82.0', '70.00 (n = 1)'), 'features, with S.D': ('82.5', '80.00 (n = 1)'),
        'reconstructions, w/o S.D': ('81.4', '62.00 ± 2.83 (n = 2)'), 'reconstructions, with S.D': ('81.8', ''),
        'and pixels, w/o S.D': ('81.5', '50.00 (n = 1)'), 'and pixels, with S.D': ('81.7', '57.00 (n = 1)')}
    assert 'Table 5' not in tables


def test_results_put_mask_ratios_and_blocks_beside_table_5(tmp_path, capsys):
    write_variant(tmp_path / 'seed0', '', [70.0])
    for ratio, last in ((0.05, 61.0), (0.9, 63.0)):
        write_variant(tmp_path / 'seed0', f'_mask{ratio}', [last], mask_ratio=ratio)
    for layer, last in ((2, 65.0), (8, 66.0)):
        write_variant(tmp_path / 'seed1', f'_layer{layer}', [last], target_layer=layer)
    tables, _ = tables_of(tmp_path, capsys)
    assert [(method, cells['paper top-1'], cells['top-1']) for method, cells in tables['Table 5'].items()] == [
        ('mask ratio 0.05', '81.7', '61.00 (n = 1)'), ('mask ratio 0.25', '81.7', ''), ('mask ratio 0.55', '81.6', ''),
        ('mask ratio 0.75, middle block', '82.0', '70.00 (n = 1)'), ('mask ratio 0.9', '81.8', '63.00 (n = 1)'),
        ('decoder block 2', '', '65.00 (n = 1)'), ('decoder block 8', '', '66.00 (n = 1)')]
    assert 'Table 4' not in tables


def test_a_folder_that_was_trained_otherwise_is_no_row(tmp_path):
    write_variant(tmp_path / 'seed0', '_mask0.25', [60.0], mask_ratio=0.5)
    with pytest.raises(SystemExit, match='generic_mask0.25 was trained with mask_ratio 0.5, but stands for 0.25'):
        run_tool(results, tmp_path)


def test_results_show_how_each_run_went(tmp_path, capsys):
    write_run(tmp_path / 'seed0/generic', [None] * 8, target='feature', warmup_epochs=2)
    write_run(tmp_path / 'seed0/g2sd', [30.0, 50.0, 80.0], finetune='generic', teacher_path='teacher')
    write_run(tmp_path / 'seed2/g2sd', [34.0], epochs=3, finetune='generic', teacher_path='teacher')
    log = tmp_path / 'seed0/generic/log.txt'  # as older versions wrote it
    log.write_text(log.read_text().replace('"train_loss": 1.0,', '"train_loss": 1.0, "constant_loss": 0.25, '
                                           '"train_images_per_second": 1.0,'))
    tables, text = tables_of(tmp_path, capsys)
    runs = {name: [cells[key] for key in ('first', 'at a quarter', 'at half', 'last')]
            for name, cells in tables['Is a run healthy?'].items()}
    assert runs == {'seed0/generic': ['1', '0.5', '0.25', '0.125'], 'seed0/g2sd': ['30', '30', '50', '80'],
                    'seed2/g2sd': ['34', '34', '', '']}
    assert 'about 0.02' in text and '36 %' in text


def test_results_are_one_page_with_the_pictures_that_are_there(tmp_path, capsys):
    write_g2sd(tmp_path / 'seed0', [80.0])
    Image.new('RGB', (8, 8)).save(tmp_path / 'stage1.png')
    Image.new('RGB', (8, 8)).save(tmp_path / 'other.png')
    _, text = tables_of(tmp_path, capsys)
    assert re.findall(r'!\[[^]]*\]\(([^)]*)\)', text) == ['curves.png', 'stage1.png']


def test_the_tools_draw_the_first_finished_network(tmp_path, capsys, monkeypatch):
    images = tmp_path / 'a b/val/cat'
    images.mkdir(parents=True)
    for number in range(9):
        (images / f'{number}.png').write_text('')
    write_run(tmp_path / 'runs/seed0/generic', [None], epochs=2, target='feature', data_path=str(tmp_path / 'a b'))
    write_run(tmp_path / 'runs/seed1/generic', [None], target='feature', data_path=str(tmp_path / 'a b'))
    commands = []
    monkeypatch.setattr(results.subprocess, 'run', lambda command, **_: commands.append(list(map(str, command))))
    run_tool(results, tmp_path / 'runs')
    (command,) = commands
    assert command[1].endswith('tools/visualize.py') and f'{tmp_path}/runs/seed1/generic/checkpoint.pth' in command
    files = command[command.index('--images') + 1:]
    assert len(set(files)) == 4 and all(Path(file).is_file() for file in files)


def test_curves_show_each_first_stage_of_tables_4_and_5_once(tmp_path, monkeypatch):
    write_variant(tmp_path / 'seed0', '', [70.0, 71.0], [80.0, 81.0])
    write_variant(tmp_path / 'seed0', '_recon', [60.0, 61.0], [62.0, 63.0], target='recon')
    write_variant(tmp_path / 'seed0', '_mask0.25', [64.0, 65.0], mask_ratio=0.25)
    panels = panels_of(tmp_path, monkeypatch)
    assert [title for title, _, _ in panels][::2] == [f'Table {number}: top-1, percent' for number in (2, 4, 5)]
    assert [len(curves) for _, _, curves in panels] == [2, 1, 4, 2, 2, 2]
    assert panels[2][2][2].points == [(5, 60.0), (6, 61.0)]


@pytest.mark.parametrize('low, high, expected', [
    (0, 60, [0, 10, 20, 30, 40, 50, 60]), (0.13, 0.25, [0.12, 0.14, 0.16, 0.18, 0.2, 0.22, 0.24, 0.26]),
    (17.5, 25.1, [16, 18, 20, 22, 24, 26])])
def test_axis_ticks_are_round_and_span_the_curve(low, high, expected):
    assert results.round_steps(low, high) == pytest.approx(expected)
    assert len(results.round_steps(low, low)) > 1
    assert results.round_steps(0, 3, least=1) == [0, 1, 2, 3]


def test_a_run_is_finished_when_its_log_has_the_last_epoch(tmp_path):
    """What makes a final.pth: a recipe's number of epochs is in the checkpoint alone."""
    def finished():
        try:
            run_tool(results, '--finished', tmp_path / 'run')
        except SystemExit as error:
            assert 'was interrupted: start make again' in str(error)
            return False
        return True
    assert not finished()
    write_run(tmp_path / 'run', [None, None], epochs=3, target='feature')
    assert not finished()
    args = json.loads((tmp_path / 'run/args.json').read_text())
    for epochs, last in ((2, True), (3, False)):
        (tmp_path / 'run/args.json').write_text(json.dumps({**args, 'epochs': None}))
        torch.save({'args': {'epochs': epochs}}, tmp_path / 'run/checkpoint.pth')
        assert finished() == last
    (tmp_path / 'run/checkpoint.pth').unlink()
    assert not finished()
    write_rounds(tmp_path / 'other', [{}, {}])
    (tmp_path / 'run').rename(tmp_path / 'old')
    (tmp_path / 'other').rename(tmp_path / 'run')
    assert finished()


def test_a_folder_without_runs_is_said(tmp_path):
    for folder in (tmp_path, tmp_path / 'none'):
        with pytest.raises(SystemExit, match='holds no run'):
            run_tool(results, folder)
