"""tools/results.py: numbers against hand-worked ones, from logs of runs."""
import json
import re

import numpy as np
import pytest
import results
from PIL import Image, ImageColor


def run_tool(tool, *words):
    tool.main(tool.get_args_parser().parse_args([str(word) for word in words]))


def draw_image(path):
    Image.new('RGB', (70, 60)).save(path)
    return path


def write_run(folder, acc1=(), epochs=None, seconds=100.0, **args):
    """A run with one epoch per accuracy (None: stage 1), which takes `seconds` in all; `epochs` if it is not finished."""
    folder.mkdir(parents=True)
    args = {'model': 'vit_pico_patch8', 'input_size': [32, 32], 'epochs': epochs or len(acc1), 'finetune': None,
            'teacher_path': None, **args}
    (folder / 'args.json').write_text(json.dumps(args))
    lines = [{'epoch': epoch, 'train_loss': 1 / (epoch + 1), 'train_seconds': seconds * (epoch + 1) / len(acc1),
              **({} if value is None else {'test_acc1': value, 'test_images': 50})} for epoch, value in enumerate(acc1)]
    (folder / 'log.txt').write_text(''.join(json.dumps(line) + '\n' for line in lines))


def write_g2sd(home, acc1, seconds=(100.0, 100.0), epochs=None):
    write_run(home / 'generic', [None] * 6, seconds=seconds[0], target='feature')
    write_run(home / 'g2sd', acc1, epochs, seconds[1], finetune='generic', teacher_path='teacher')


def write_rounds(folder, scores, iterations=None, seconds=100.0, size=64, **args):
    """A run with a round of 40 iterations per dict of scores; iterations: the total, if not all rounds or not whole ones."""
    folder.mkdir(parents=True)
    total = iterations or 40 * len(scores)
    args = {'model': 'vit_nano_patch8', 'input_size': [size, size], 'iterations': total, 'eval_every': 40, 'batch_size': 4,
            'accum_iter': 1, 'world_size': 1, 'finetune': None, 'teacher_path': None, 'commit': 'abc1234',
            'hardware': '1 x cpu', **args}
    (folder / 'args.json').write_text(json.dumps(args))
    lines = []
    for number, values in enumerate(scores, 1):
        done = min(40 * number, total)
        lines.append({'iteration': done, 'train_loss': 1 / done, 'train_seconds': seconds * done / total, 'test_images': 30,
                      **values})
    (folder / 'log.txt').write_text(''.join(json.dumps(line) + '\n' for line in lines))


def write_detection(folder, box, *args, **kwargs):
    """A detection run with a round per box AP; mask AP is 2 lower, AP50 of each 20 higher."""
    write_rounds(folder, [{
        'test_bbox_AP': value, 'test_bbox_AP50': value + 20, 'test_bbox_AP75': value - 5, 'test_mask_AP': value - 2,
        'test_mask_AP50': value + 18, 'test_mask_AP75': value - 7} for value in box], *args, **kwargs)


def write_segmentation(folder, miou, *args, **kwargs):
    """A segmentation run with a round per mIoU; mean accuracy is 10 higher, pixel accuracy 30."""
    write_rounds(folder, [{'test_mIoU': value, 'test_mAcc': value + 10, 'test_aAcc': value + 30,
                           'test_IoU': {'sky': value, 'sea': None}} for value in miou], *args, **kwargs)


def cells_of(text):
    """{method: [cells]} of a table in Markdown."""
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines() if line.startswith('| ')]
    return {row[0]: row[1:] for row in rows}


def table_of(folder, capsys):
    """`cells_of` what the tool prints, and the whole text."""
    run_tool(results, folder)
    text = capsys.readouterr().out
    assert text == (folder / 'results.md').read_text(encoding='utf-8')
    return cells_of(text), text


def test_results_report_the_last_epoch_of_each_seed(tmp_path, capsys):
    """Claim: our accuracies are those of the last epoch, never the best, as mean and sample deviation over the seeds."""
    for seed, last in enumerate((80.0, 82.0, 84.0)):
        write_g2sd(tmp_path / f'seed{seed}', [70.0, 99.0, last])
    table, text = table_of(tmp_path, capsys)
    assert table['G2SD-S'][-1] == '82.00 ± 2.00 (n = 3)'  # deviations -2, 0, 2: variance 8 / 2
    assert table['G2SD-S'][:3] == ['generic 6', 'specific 3', '71 h'] and table['G2SD-S'][6] == '82.5'
    assert '`seed0/g2sd/log.txt`, `seed1/g2sd/log.txt`, `seed2/g2sd/log.txt`' in text and 'Test images: 50' in text


def test_results_time_adds_both_stages_and_leaves_the_teacher_out(tmp_path, capsys):
    """Claim: Table 2's time of G2SD is generic plus specific, and its ratio to DeiT with distillation is worked out."""
    write_run(tmp_path / 'teacher_mae', [None], seconds=90 * 3600, target='pixel')
    write_run(tmp_path / 'teacher_cls', [90.0], seconds=9 * 3600, finetune='mae')
    write_g2sd(tmp_path / 'seed0', [80.0], (3 * 3600, 1 * 3600))
    write_g2sd(tmp_path / 'seed1', [80.0], (4 * 3600, 2 * 3600))
    write_run(tmp_path / 'seed0/deit_distilled', [70.0] * 4, seconds=8 * 3600, teacher_path='teacher')
    table, text = table_of(tmp_path, capsys)
    assert 'time (ours, hours)' in text
    assert table['G2SD-S'][3:6] == ['3.50 ± 0.71 (n = 2)', '1.50 ± 0.71 (n = 2)', '5.00 ± 1.41 (n = 2)']  # 3 + 1, 4 + 2
    assert table['teacher: MAE ViT-B, fine-tuned'][:6] == [
        'MAE 1', 'fine-tuning 1', '', '90.00 (n = 1)', '9.00 (n = 1)', '99.00 (n = 1)']
    assert table['DeiT-S with distillation (DeiT⚗)'][3:6] == ['8.00 (n = 1)', '', '8.00 (n = 1)']
    assert '0.63 in the paper (71 / 112); ours: 0.62' in text  # 5 / 8
    assert table['DeiT-S with distillation (DeiT⚗)'][0] == 'supervised + distillation 4'


def test_results_do_not_count_unfinished_runs(tmp_path, capsys):
    """Claim: a run counts when its last epoch is logged; a half-written line of a running one is no epoch."""
    write_g2sd(tmp_path / 'seed0', [80.0, 81.0])
    write_g2sd(tmp_path / 'seed1', [60.0, 99.0], epochs=3)
    with open(tmp_path / 'seed1/g2sd/log.txt', 'a') as file:
        file.write('{"epoch": 2, "train_loss": 0.3, "test_ac')
    write_run(tmp_path / 'seed10/generic', epochs=6, target='feature')
    table, text = table_of(tmp_path, capsys)
    assert table['G2SD-S'][-1] == '81.00 (n = 1); seed1/g2sd: epoch 2/3; seed10/generic: epoch 0/6'
    assert table['G2SD-S'][5] == '3.33 (n = 1)' and 'time (ours, minutes)' in text
    assert '`seed1/' not in text


def test_results_leave_cells_of_missing_runs_empty(tmp_path, capsys):
    """Claim: what was not run stays an empty cell; a missing first stage gives no time."""
    write_g2sd(tmp_path / 'seed0', [80.0])
    for name in ('log.txt', 'args.json'):
        (tmp_path / 'seed0/generic' / name).unlink()
    table, text = table_of(tmp_path, capsys)
    assert table['DeiT-S'] == ['', '', '53 h', '', '', '', '81.4', '']
    assert table['G2SD-S'] == ['', 'specific 1', '71 h', '', '', '', '82.5', '80.00 (n = 1)']
    assert 'ours: not known yet' in text and 'Chance' not in text


def test_curves_count_the_epochs_of_both_stages(tmp_path, monkeypatch):
    """Claim: in curves.png the specific stage begins where the generic one ended, so that budgets can be compared."""
    write_g2sd(tmp_path / 'seed0', [50.0, 60.0])
    write_run(tmp_path / 'seed0/deit', [30.0] * 8)
    write_run(tmp_path / 'teacher_cls', [10.0, 90.0], finetune='mae')
    panels = []
    monkeypatch.setattr(results, 'draw_panel', lambda draw, box, title, xlabel, curves, font: panels.append(curves))
    results.draw_curves({'Table 2': {row: results.read_row(tmp_path, row) for row in results.TABLE_2}}, {}, {})
    accuracy = {curve.colour: curve for curve in panels[0]}
    assert accuracy[results.G2SD.colour].points == [(7, 50.0), (8, 60.0)]
    teacher = accuracy[results.TABLE_2[0].colour]
    assert teacher.dashed and teacher.points == [(0, 90.0)]
    assert [x for x, _ in panels[1][0].points] == [1, 2, 3, 4, 5, 6]


def test_results_put_detection_beside_table_3(tmp_path, capsys):
    """Claim: Table 3 shows the paper's values and the last round of our finished runs, over seeds; nothing is guessed."""
    write_detection(tmp_path / 'teacher_det', [40.0, 50.0, 48.0], iterations=100, seconds=7200, size=128)
    write_detection(tmp_path / 'seed0/det_g2sd', [30.0, 60.0, 44.0], seconds=3600)
    write_detection(tmp_path / 'seed1/det_g2sd', [30.0, 31.0, 46.0], seconds=3 * 3600)
    write_detection(tmp_path / 'seed2/det_g2sd', [30.0, 99.0], iterations=120)
    write_detection(tmp_path / 'seed0/det_finetuned', [20.0], iterations=80)
    write_detection(tmp_path / 'seed1/det_finetuned', [], iterations=60)
    table, text = table_of(tmp_path, capsys)
    assert text.startswith('### Table 3') and 'Table 2' not in text and 'time (ours, hours)' in text
    assert table['G2SD-S'] == [
        '82.5', '50.6', '45.00 ± 1.41 (n = 2); seed2/det_g2sd: iteration 80/120', '44.8', '43.00 ± 1.41 (n = 2)',
        '65.00 ± 1.41 (n = 2) / 63.00 ± 1.41 (n = 2)', '120', '2.00 ± 1.41 (n = 2)']  # deviations -1, 1: variance 2 / 1
    assert table['teacher: ViTDet-B from MAE'] == [
        '', '51.6', '48.00 (n = 1)', '45.9', '46.00 (n = 1)', '68.00 (n = 1) / 66.00 (n = 1)', '100', '2.00 (n = 1)']
    assert table['G2SD-S w/o S.D'] == [
        '82.0', '49.9', 'seed0/det_finetuned: iteration 40/80; seed1/det_finetuned: iteration 0/60', '44.5', '', '',
        '60 / 80', '']
    paper = {'DeiT-S 300e': (79.9, 45.7, 40.7), 'DeiT-S with distillation 300e (DeiT-S⚗)': (81.2, 47.2, 41.9),
             'DeiT-S 500e': (81.4, 46.9, 41.6), 'DINO-S 3200e': (82.0, 49.1, 43.3), 'iBOT-S 3200e': (82.3, 49.7, 44.0)}
    for method, (top1, box, mask) in paper.items():
        assert table.pop(method) == [f'{top1}', f'{box}', '', f'{mask}', '', '', '', '']
    assert set(table) == {'method', 'teacher: ViTDet-B from MAE', 'G2SD-S w/o S.D', 'G2SD-S'}
    assert '- Test images: 30\n' in text
    assert ('- G2SD-S: vit_nano_patch8 at 64x64. AP: `seed0/det_g2sd/log.txt`, `seed1/det_g2sd/log.txt`. '
            'Time: `seed0/det_g2sd/log.txt`, `seed1/det_g2sd/log.txt`. Commit: abc1234. Processes: 1 x cpu.\n') in text
    assert '- teacher: ViTDet-B from MAE: vit_nano_patch8 at 128x128. AP: `teacher_det/log.txt`' in text
    assert '`seed2/' not in text and 'det_finetuned/log.txt' not in text


def test_results_list_random_weights_only_where_they_were_trained(tmp_path, capsys):
    """Claim: the row that the paper does not have shows no value of the paper."""
    write_detection(tmp_path / 'seed0/det_scratch', [1.0, 3.0], seconds=30.0)
    table, text = table_of(tmp_path, capsys)
    assert table['random weights (not in the paper)'] == [
        '', '', '3.00 (n = 1)', '', '1.00 (n = 1)', '23.00 (n = 1) / 21.00 (n = 1)', '80', '30.00 (n = 1)']
    assert len(table) == 1 + 9 and table['G2SD-S'] == ['82.5', '50.6', '', '44.8', '', '', '', '']
    assert 'time (ours, seconds)' in text


def test_results_of_both_tables_do_not_mix(tmp_path, capsys):
    """Claim: one folder may hold both tables; each has its own numbers, time and test images."""
    write_g2sd(tmp_path / 'seed0', [80.0, 81.0])
    _, alone = table_of(tmp_path, capsys)
    assert 'Table 3:' not in alone
    write_detection(tmp_path / 'seed0/det_g2sd', [20.0, 40.0], seconds=7200.0)
    _, text = table_of(tmp_path, capsys)
    table_2, table_3 = re.split('\n### Table 3|\n### Is a run', text)[:2]
    assert table_2 == alone.split('\n### Is a run')[0] and '(ours, minutes)' in table_2 and 'Test images: 50\n' in table_2
    assert cells_of(table_3)['G2SD-S'][2] == '40.00 (n = 1)' and cells_of(table_3)['G2SD-S'][-1] == '2.00 (n = 1)'
    assert 'Test images: 30\n' in table_3 and 'Top-1:' not in table_3
    assert Image.open(tmp_path / 'curves.png').size == (1200, 2 * (430 + 26))  # a row of panels and one line of legend each


def test_results_of_segmentation_are_set_against_the_teacher(tmp_path, capsys):
    """Claim: ADE20K's rows are those of the last round, with their part of the teacher's mIoU beside the paper's 99.3 %."""
    write_segmentation(tmp_path / 'teacher_seg', [30.0, 50.0], seconds=7200.0)
    for seed, last in enumerate((44.0, 46.0)):
        write_segmentation(tmp_path / f'seed{seed}/seg_g2sd', [60.0, last], seconds=3600.0)
    write_segmentation(tmp_path / 'seed2/seg_g2sd', [60.0], iterations=80)
    table, text = table_of(tmp_path, capsys)
    assert 'Table 2' not in text and 'Table 3' not in text and '99.3 %' in text and 'time (ours, hours)' in text
    assert table['teacher: UPerNet on ViT-B from MAE'] == [
        '50.00 (n = 1)', '', '60.00 (n = 1)', '80.00 (n = 1)', '80', '2.00 (n = 1)']
    assert table['G2SD-S'] == ['45.00 ± 1.41 (n = 2); seed2/seg_g2sd: iteration 40/80', '90.0 %', '55.00 ± 1.41 (n = 2)',
                               '75.00 ± 1.41 (n = 2)', '80', '1.00 ± 0.00 (n = 2)']
    assert table['G2SD-S w/o S.D'] == [''] * 6
    assert 'mIoU: `seed0/seg_g2sd/log.txt`, `seed1/seg_g2sd/log.txt`. ' in text and 'Test images: 30\n' in text
    (tmp_path / 'teacher_seg').rename(tmp_path / 'other')
    assert table_of(tmp_path, capsys)[0]['G2SD-S'][1] == ''  # never guessed


def test_curves_show_miou_against_iterations(tmp_path, monkeypatch):
    """Claim: mIoU and pixel accuracy of every round of every seed are drawn, the teacher's last level as a dashed line."""
    write_segmentation(tmp_path / 'teacher_seg', [30.0, 50.0])
    write_segmentation(tmp_path / 'seed0/seg_finetuned', [10.0, 20.0])
    write_segmentation(tmp_path / 'seed0/seg_g2sd', [15.0], iterations=60)
    panels = {}
    monkeypatch.setattr(results, 'draw_panel', lambda draw, box, title, xlabel, curves, font: panels.update(
        {(title, xlabel): curves}))
    results.draw_curves({}, {}, {row: results.read_row(tmp_path, row) for row in results.TABLE_ADE})
    assert list(panels) == [('mIoU, percent', 'iterations'), ('Pixel accuracy, percent', 'iterations')]
    for curves, higher in zip(panels.values(), (0, 30)):
        assert [curve.points for curve in curves] == [
            [(0, 50.0 + higher)], [(40, 10.0 + higher), (80, 20.0 + higher)], [(40, 15.0 + higher)]]
        assert [curve.dashed for curve in curves] == [True, False, False]


def test_stage_1_of_another_table_begins_no_table_2(tmp_path, capsys):
    """Claim: a folder that holds stage 1 and segmentation shows segmentation alone; stage 1 by itself is shown as such."""
    write_run(tmp_path / 'teacher_mae', [None], target='pixel')
    write_run(tmp_path / 'seed0/generic', [None] * 6, target='feature')
    assert '### Table 2' in table_of(tmp_path, capsys)[1]
    write_segmentation(tmp_path / 'seed0/seg_g2sd', [44.0])
    assert table_of(tmp_path, capsys)[1].startswith('### ADE20K')
    assert Image.open(tmp_path / 'curves.png').size == (1200, 430 + 26)  # one row of panels
    write_run(tmp_path / 'seed0/g2sd', [80.0], finetune='generic', teacher_path='teacher')
    assert '### Table 2' in table_of(tmp_path, capsys)[1]


def test_results_refuse_a_damaged_detection_log(tmp_path, capsys):
    """Claim: what cannot be read is named; the half line of a run that was killed is no round."""
    home = tmp_path / 'seed0/det_g2sd'
    write_detection(home, [20.0, 40.0])
    first, second = (home / 'log.txt').read_text().splitlines()
    (home / 'log.txt').write_text(f'{first}\n{second[:50]}')
    assert table_of(tmp_path, capsys)[0]['G2SD-S'][2] == 'seed0/det_g2sd: iteration 40/80'
    for damaged in ('{"iteration": 40, "train', '{"epoch": 0, "train_loss": 1}', '{"iteration": null, "train_loss": 1}'):
        (home / 'log.txt').write_text(f'{first}\n{damaged}\n{second}\n')
        with pytest.raises(SystemExit, match=r"det_g2sd/log.txt, line 2 is no JSON object with 'iteration'"):
            run_tool(results, tmp_path)
    (home / 'log.txt').write_text(second.replace('test_mask_AP50', 'other') + '\n')
    with pytest.raises(SystemExit, match="seed0/det_g2sd/log.txt: the last line has no 'test_mask_AP50'"):
        run_tool(results, tmp_path)
    (home / 'args.json').write_text('{"eval_every": 40}')
    with pytest.raises(SystemExit, match='does not tell the epochs or iterations'):
        run_tool(results, tmp_path)


def test_curves_show_ap_against_iterations(tmp_path, monkeypatch):
    """Claim: how fast detection converges can be seen: every round of every seed, unfinished runs as well."""
    write_detection(tmp_path / 'teacher_det', [40.0, 50.0], size=128)
    write_detection(tmp_path / 'seed0/det_g2sd', [30.0, 44.0, 45.0], iterations=100)
    write_detection(tmp_path / 'seed1/det_g2sd', [32.0], iterations=100)
    write_detection(tmp_path / 'seed0/det_deit', [10.0, 20.0])
    panels = {}
    monkeypatch.setattr(results, 'draw_panel', lambda draw, box, title, xlabel, curves, font: panels.update(
        {(title, xlabel): curves}))
    results.draw_curves({}, {row: results.read_row(tmp_path, row) for row in results.TABLE_3}, {})
    assert list(panels) == [('Box AP, percent', 'iterations'), ('Mask AP, percent', 'iterations')]
    for curves, lower in zip(panels.values(), (0, 2)):
        teacher, deit, *g2sd = curves
        assert teacher.dashed and teacher.points == [(0, 50.0 - lower)]
        assert deit.points == [(40, 10.0 - lower), (80, 20.0 - lower)]
        assert [curve.points for curve in g2sd] == [[(40, 30.0 - lower), (80, 44.0 - lower), (100, 45.0 - lower)],
                                                    [(40, 32.0 - lower)]]
        assert len({curve.colour for curve in curves}) == 3


def test_every_row_with_runs_is_drawn_in_its_colour(tmp_path):
    """Claim: curves.png shows the rows that have runs, in both panels and the legend, and no other row."""
    write_detection(tmp_path / 'seed0/det_g2sd', [30.0, 44.0])
    write_detection(tmp_path / 'seed0/det_dino', [20.0, 35.0])
    run_tool(results, tmp_path)
    picture = np.array(Image.open(tmp_path / 'curves.png'))
    assert picture.shape == (430 + 2 * 26, 1200, 3)
    parts = picture[:420, :580], picture[:420, 580:], picture[420:]
    for row in results.TABLE_3:
        drawn = [(part == ImageColor.getrgb(row.colour)).all(-1).sum() for part in parts]
        if row.folders[0] in ('det_g2sd', 'det_dino'):
            assert drawn[0] > 300 and drawn[1] > 300 and drawn[2] >= 45  # a line of 3 x 15 pixels in the legend
        else:
            assert sum(drawn) < 10  # the edges of letters are of many greys
    for table in (results.TABLE_2, results.TABLE_3, results.TABLE_4, results.TABLE_ADE):
        assert len({row.colour for row in table}) == len(table)


def write_variant(home, name, acc1, specific=None, seconds=(60.0, 60.0), **args):
    """Stage 1 of another kind, its fine-tuning to `acc1`, and specific distillation to `specific`."""
    write_run(home / f'generic{name}', [None] * 4, seconds=seconds[0], **{'target': 'feature', 'mask_ratio': 0.75,
                                                                          'target_layer': 4, **args})
    write_run(home / f'finetuned{name}', acc1, seconds=seconds[1], finetune='generic')
    if specific:
        write_run(home / f'g2sd{name}', specific, seconds=seconds[1], finetune='generic', teacher_path='teacher')


def part_of(text, title):
    """The part of results.md under a heading."""
    return next(part for part in text.split('### ') if part.startswith(title))


def test_results_put_the_targets_beside_table_4(tmp_path, capsys):
    """Claim: Table 4 has each target without and with S.D beside the paper's values, mean over seeds, time per stage."""
    write_variant(tmp_path / 'seed0', '', [10.0, 70.0], [20.0, 80.0])
    assert 'Table 4:' not in table_of(tmp_path, capsys)[1]  # its first row is Table 2's
    for seed, last in enumerate((60.0, 64.0)):
        write_variant(tmp_path / f'seed{seed}', '_recon', [90.0, last], None, (7200.0, 3600.0 * (1 + seed)), target='recon')
    write_variant(tmp_path / 'seed0', '_recon_gt', [50.0], [55.0, 57.0], target='recon_gt')
    _, text = table_of(tmp_path, capsys)
    table = cells_of(part_of(text, 'Table 4'))
    assert table['reconstructions, w/o S.D'] == [
        'generic (recon) 4', 'fine-tuning 2', '2.00 ± 0.00 (n = 2)', '1.50 ± 0.71 (n = 2)', '81.4', '62.00 ± 2.83 (n = 2)']
    assert table['reconstructions, with S.D'] == ['generic (recon) 4', '', '', '', '81.8', '']
    assert {method: (cells[-2], cells[-1]) for method, cells in table.items()} == {
        'stage 1, stage 2': ('paper top-1', 'top-1 (ours)'),
        'features, w/o S.D': ('82.0', '70.00 (n = 1)'), 'features, with S.D': ('82.5', '80.00 (n = 1)'),
        'reconstructions, w/o S.D': ('81.4', '62.00 ± 2.83 (n = 2)'), 'reconstructions, with S.D': ('81.8', ''),
        'reconstructions + ground truth, w/o S.D': ('81.5', '50.00 (n = 1)'),
        'reconstructions + ground truth, with S.D': ('81.7', '57.00 (n = 1)')}
    assert '`seed0/finetuned_recon/log.txt`, `seed1/finetuned_recon/log.txt`' in part_of(text, 'Table 4')
    assert 'Table 5:' not in text


def test_results_put_mask_ratios_and_blocks_beside_table_5(tmp_path, capsys):
    """Claim: Table 5 has the paper's mask ratios in order, others that were run, and decoder blocks of no paper value."""
    write_variant(tmp_path / 'seed0', '', [70.0])
    for ratio, last in ((0.05, 61.0), (0.9, 63.0), (0.5, 64.0)):
        write_variant(tmp_path / 'seed0', f'_mask{ratio}', [last], mask_ratio=ratio)
    for layer, last in ((2, 65.0), (8, 66.0)):
        write_variant(tmp_path / 'seed1', f'_layer{layer}', [last], target_layer=layer)
    _, text = table_of(tmp_path, capsys)
    rows = list(cells_of(part_of(text, 'Table 5')).items())[1:]
    assert [(method, *cells[-2:]) for method, cells in rows] == [
        ('mask ratio 0.05', '81.7', '61.00 (n = 1)'), ('mask ratio 0.25', '81.7', ''),
        ('mask ratio 0.5', '', '64.00 (n = 1)'), ('mask ratio 0.55', '81.6', ''),
        ('mask ratio 0.75', '82.0', '70.00 (n = 1)'), ('mask ratio 0.9', '81.8', '63.00 (n = 1)'),
        ('decoder block 2', '', '65.00 (n = 1)'), ('decoder block 4', '', '70.00 (n = 1)'),
        ('decoder block 8', '', '66.00 (n = 1)')]
    assert 'Table 4:' not in text


def test_a_folder_that_was_trained_otherwise_is_no_row(tmp_path):
    """Claim: a number is never taken from a run that its folder's name does not describe."""
    write_variant(tmp_path / 'seed0', '_mask0.25', [60.0], mask_ratio=0.5)
    with pytest.raises(SystemExit, match='generic_mask0.25 was trained with mask_ratio 0.5, but stands for 0.25'):
        run_tool(results, tmp_path)


def test_results_show_the_signs_of_a_healthy_run(tmp_path, capsys):
    """Claim: the loss from epoch to epoch beside the best constant's, and the accuracy of stage 2's first epoch."""
    for seed, last in enumerate((80.0, 84.0)):
        write_run(tmp_path / f'seed{seed}/generic', [None] * 8, target='feature', warmup_epochs=2)
        write_run(tmp_path / f'seed{seed}/g2sd', [30.0 + 2 * seed, 50.0, last], finetune='generic', teacher_path='teacher')
    write_run(tmp_path / 'seed2/g2sd', [34.0], epochs=3, finetune='generic', teacher_path='teacher')
    log = tmp_path / 'seed0/generic/log.txt'
    log.write_text(log.read_text().replace('"train_loss": 1.0,', '"train_loss": 1.0, "constant_loss": 0.25,'))
    _, text = table_of(tmp_path, capsys)
    table = cells_of(part_of(text, 'Is a run healthy?'))
    assert table['generic: generic 8'] == ['0.2500 (n = 1)', *(  # the loss of epoch k is 1 / k
        f'{value:.4f} ± 0.0000 (n = 2)' for value in (1, 1 / 3, 1 / 2, 1 / 4, 1 / 8))]
    assert table['g2sd: specific 3'] == ['32.00 ± 2.00 (n = 3)', '82.00 ± 2.83 (n = 2)']
    assert 'about 0.02' in text and '36 %' in text


def test_results_are_one_page_with_the_pictures_that_are_there(tmp_path, capsys):
    """Claim: results.md links curves.png, and what `make results` has drawn; nothing that is missing."""
    write_g2sd(tmp_path / 'seed0', [80.0])
    draw_image(tmp_path / 'stage1.png')
    draw_image(tmp_path / 'other.png')
    _, text = table_of(tmp_path, capsys)
    assert re.findall(r'!\[[^]]*\]\(([^)]*)\)', text) == ['curves.png', 'stage1.png']
    assert all((tmp_path / name).is_file() for name in ('curves.png', 'stage1.png'))


def test_curves_show_each_first_stage_of_tables_4_and_5_once(tmp_path, monkeypatch):
    """Claim: a strip per table; rows with and without S.D share one curve of stage 1."""
    write_variant(tmp_path / 'seed0', '', [70.0, 71.0], [80.0, 81.0])
    write_variant(tmp_path / 'seed0', '_recon', [60.0, 61.0], [62.0, 63.0], target='recon')
    write_variant(tmp_path / 'seed0', '_mask0.25', [64.0, 65.0], mask_ratio=0.25)
    panels = []
    monkeypatch.setattr(results, 'draw_panel', lambda draw, box, title, xlabel, curves, font: panels.append((title, curves)))
    run_tool(results, tmp_path)
    titles = [title for title, _ in panels]
    assert titles[::2] == [f'Table {number}: test top-1, percent' for number in (2, 4, 5)]
    assert [len(curves) for _, curves in panels] == [2, 1, 4, 2, 2, 2]
    assert panels[2][1][2].points == [(5, 60.0), (6, 61.0)]


@pytest.mark.parametrize('low, high, expected', [
    (0, 60, [0, 10, 20, 30, 40, 50, 60]), (0.13, 0.25, [0.12, 0.14, 0.16, 0.18, 0.2, 0.22, 0.24, 0.26]),
    (17.5, 25.1, [16, 18, 20, 22, 24, 26])])
def test_axis_ticks_are_round_and_span_the_curve(low, high, expected):
    """Claim: curves.png can be read off: no value lies outside its axes, and ticks are round numbers."""
    assert results.round_steps(low, high) == pytest.approx(expected)
    assert len(results.round_steps(low, low)) > 1
    assert results.round_steps(0, 3, least=1) == [0, 1, 2, 3]


@pytest.mark.parametrize('folder, message', [
    ('none', 'there is no folder'), ('', 'holds no run'),
    ('', 'teacher_mae, teacher_cls, teacher_det, teacher_seg, or seed<N>/ with deit,'),
    ('', 'det_scratch, det_finetuned, det_g2sd, seg_finetuned, seg_g2sd'), ('broken', 'line 1 is no JSON object')])
def test_mistakes_end_in_one_line(tmp_path, folder, message):
    """Claim: what is wrong is said in one line, and nothing is written."""
    write_run(tmp_path / 'broken/seed0/deit', [1.0, 2.0])
    log = tmp_path / 'broken/seed0/deit/log.txt'
    log.write_text('noise\n' + log.read_text())
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(SystemExit, match=message):
        run_tool(results, tmp_path / folder)
    assert sorted(tmp_path.rglob('*')) == before
