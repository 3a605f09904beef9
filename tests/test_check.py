"""tools/check.py finds what was planted, and nothing in clean sets; it draws what training sees."""
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import check
import models
import predict
import toy_data
from conftest import FOLDER, NAMES, TINY, contents

STAGES = {name: (FOLDER[script], TINY[script]) for script, name in NAMES.items()}
SIZE, BOX = (40, 32), [5, 5, 10, 10]  # width and height; x, y, width, height


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp('toy')
    words = f'--out {folder} --size 24 --train 24 --val 12 --scenes 12 --val_scenes 3 --scene_size 64'
    toy_data.main(toy_data.get_args_parser().parse_args(words.split()))
    return folder


@pytest.fixture
def run_check(tmp_path, monkeypatch, capsys):
    """run_check(stage, folder, flags) -> (exit status, {finding: (level, count, example)}, all lines)."""
    def run(stage, folder, flags=''):
        words = f'{STAGES[stage][1]} --stage {stage} --out {tmp_path}/check.png --data_path {folder} {flags}'
        status = check.main(*check.get_args_parser().parse_known_args(words.split()))
        text = capsys.readouterr().out
        rows = re.findall(r'^(error|warning|note) +(\d+)  (.*)(?:\n +e\.g\. (.*))?', text, re.M)
        return status, {what: (level, int(count), example) for level, count, what, example in rows}, text
    monkeypatch.setattr(sys, 'argv', ['check.py'])
    monkeypatch.setattr(predict, 'SIDE', 64)
    return run


def assert_found(findings, planted):
    """These and no others; planted: {start of the text: (level, count, part of the example)}."""
    assert len(findings) == len(planted), findings
    for start, (level, count, example) in planted.items():
        [row] = [row for text, row in findings.items() if text.startswith(start)]
        assert row[:2] == (level, count) and example in row[2], start


def draw(path, seed, size=SIZE, mode='RGB', turn=1):
    """An image of noise; turn: its EXIF orientation. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(values[:, :, 0].astype(np.uint16) * 256 if mode == 'I;16' else values)
    tags = Image.Exif()
    tags[0x0112] = turn
    image.convert(mode).save(path, exif=tags)
    return path


def write_label(path, values, size=SIZE):
    Image.fromarray(np.resize(np.uint8(values), size[::-1])).save(draw(path, 0))


def write_coco(path, images, objects):
    """images: [(id, file name)]; objects: [(image id, box, other entries)], rectangles of the first class."""
    coco = {'categories': [{'id': 4, 'name': 'a'}, {'id': 7, 'name': 'b'}], 'annotations': []}
    coco['images'] = [{'id': k, 'file_name': name, 'width': SIZE[0], 'height': SIZE[1]} for k, name in images]
    for image, (x, y, w, h), others in objects:
        outline = [x, y, x + w, y, x + w, y + h, x, y + h]
        coco['annotations'].append({'image_id': image, 'category_id': 4, 'bbox': [x, y, w, h],
                                    'segmentation': [outline], **others})
    path.write_text(json.dumps(coco))


def plant_bad_images(folder, monkeypatch):
    """Adds an image of each fault; returns what is to be found."""
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 4000)  # Pillow refuses twice as many
    draw(folder / 'grey.png', 101, mode='L')
    draw(folder / 'deep.png', 102, mode='I;16')
    draw(folder / 'turned.jpg', 103, turn=6)
    (folder / 'cut.jpg').write_bytes(draw(folder / 'cut.jpg', 104).read_bytes()[:-900])
    (folder / 'text.png').write_text('not an image')
    draw(folder / 'huge.png', 105, (100, 100))
    return {'images of mode L': ('note', 1, 'grey.png'), 'images of mode I;16': ('note', 1, 'deep.png'),
            'images with an EXIF': ('warning', 1, 'turned'), 'unreadable files (OS': ('error', 1, 'cut.jpg'),
            'unreadable files (Uni': ('error', 1, 'text'), 'unreadable files (Dec': ('error', 1, 'huge')}


@pytest.mark.parametrize('stage, classes', {'generic': 0, 'cls': 12, 'det': 4, 'seg': 8}.items())
def test_nothing_is_wrong_with_a_clean_set(stage, classes, toy, run_check, tmp_path):
    """Its files stay as they are; the sheet has the colours of all classes that are drawn, and no other's."""
    before, coco = contents(toy), toy / 'coco/annotations/instances_train2017.json'
    status, findings, text = run_check(stage, toy / STAGES[stage][0])
    crowds = sum(entry['iscrowd'] for entry in json.loads(coco.read_text())['annotations'])
    noted = {'objects left out: crowds': ('note', crowds, str(coco))} if stage == 'det' else {}
    assert_found(findings, noted)
    assert status == 0 and ('nothing found' in text) == (not noted) and contents(toy) == before
    colours = {colour for _, colour in Image.open(tmp_path / 'check.png').convert('RGB').getcolors(2 ** 24)}
    assert {predict.class_colour(k) for k in range(classes)} <= colours
    assert predict.class_colour(classes) not in colours


def test_faults_of_class_folders_are_found(tmp_path, run_check, monkeypatch):
    data = tmp_path / 'data'
    for number, name in enumerate(('cat', 'cat', 'dog', 'dog', 'eel')):
        draw(data / f'train/{name}/{number}.png', number)
        draw(data / f'val/{name}/{number}.png', 50 + number)
    planted = plant_bad_images(data / 'train/cat', monkeypatch)
    draw(data / 'val/dog/again.png', 2)
    draw(data / 'train/.ipynb_checkpoints/0-checkpoint.png', 0)
    (data / 'val/.ipynb_checkpoints').mkdir()
    status, findings, text = run_check('cls', data)
    assert status == 1 and 'cat 8 (66.7%), dog 2 (16.7%), eel 1 (8.3%)' in text
    planted['validation images that stand in training'] = ('warning', 1, f'{data}/train/dog/2.png')
    assert_found(findings, {**planted, 'hidden images': ('error', 1, '0-checkpoint.png')})


def test_faults_of_coco_files_are_found(tmp_path, run_check, monkeypatch):
    """With 1 % of unlike boxes, which is no reason to stop; then with a file that the stage refuses."""
    train, annotations = tmp_path / 'data/train2017', tmp_path / 'data/annotations'
    annotations.mkdir(parents=True)
    for number in range(6):
        draw(train / f'{number}.png', number, SIZE if number != 3 else (30, 32))
    draw(tmp_path / 'data/val2017/same.png', 5)
    planted = plant_bad_images(train, monkeypatch)
    names = [*(f'{number}.png' for number in range(7)), *sorted(path.name for path in train.glob('*[a-z].*'))]
    write_coco(annotations / 'instances_val2017.json', [(0, 'same.png')], [(0, BOX, {})])
    write_coco(annotations / 'instances_train2017.json', [*enumerate(names), (1, '1.png')], [
        *[(0, BOX, {})] * 120, (0, BOX, {'bbox': [15, 5, 15, 10]}), (2, [20, 20, 25, 10], {}),
        (2, [5, 5, 2, 2], {}), (2, BOX, {'iscrowd': 1}), (2, BOX, {'segmentation': []}),
        (2, [5, 5, 10, 0], {}), (99, BOX, {})])
    status, findings, text = run_check('det', tmp_path / 'data')
    for reason in ('without a polygon', 'with an empty box', 'of no listed image'):
        planted[f'objects left out: {reason}'] = ('warning', 1, str(annotations))
    assert status == 1 and 'train: a 123 (100.0%), b 0 (0.0%)' in text
    assert_found(findings, {
        **planted, 'objects left out: crowds': ('note', 1, str(annotations)),
        'images with an EXIF': ('note', 1, 'turned.jpg'), 'images of another size': ('error', 1, '3.png'),
        'unreadable files (File': ('error', 1, '6.png'), 'ids of images': ('error', 1, str(annotations)),
        'boxes that leave the image': ('warning', 1, '2.png'), 'boxes unlike': ('warning', 1, '0.png'),
        'empty or tiny': ('warning', 1, '2.png'), 'validation images that': ('warning', 1, f'{train}/5.png'),
        'classes that training has nothing of': ('warning', 1, 'b')})
    write_coco(annotations / 'instances_val2017.json', [(0, 'same.png')], [(0, BOX, {'bbox': [5, 5, -1, 9]})])
    assert 'has the box [5, 5, -1, 9]' in ''.join(run_check('det', tmp_path / 'data')[1])


def test_faults_of_labels_are_found(tmp_path, run_check):
    """Labels 1 and 2 of three classes, 0 on half of the pixels; a file each of another size, mode, value."""
    labels, images = tmp_path / 'data/annotations/training', tmp_path / 'data/images/training'
    for number in range(6):
        draw(images / f'{number}.png', number)
        write_label(labels / f'{number}.png', [0, 1, 0, 2])
    draw(tmp_path / 'data/images/validation/v.png', 5)
    write_label(tmp_path / 'data/annotations/validation/v.png', 1)
    draw(images / 'turned.jpg', 60, turn=6)
    write_label(labels / 'turned.png', [0, 1, 0, 2], SIZE[::-1])
    write_label(labels / '1.png', [0, 1], (20, 20))
    write_label(labels / '2.png', [0, 7, *[1] * 1278])
    draw(labels / '3.png', 70)
    write_label(labels / 'odd.png', [1])
    ignored = 4 * 640 + 200 + 1  # that in colours is not counted
    status, findings, text = run_check('seg', tmp_path / 'data', '--nb_classes 3')
    assert status == 1 and f'ignored {ignored} ({ignored / (5 * 1280 + 400 - 1):.1%})' in text
    assert_found(findings, {
        'images of another size': ('error', 1, '1.png'), 'pixels beyond the 3 classes': ('error', 1, '7 in'),
        'unreadable files': ('error', 1, f'{labels}/3.png'), 'images with an EXIF': ('note', 1, 'turned.jpg'),
        'labels without': ('warning', 1, 'training'), 'training pixels that are': ('warning', ignored, ''),
        'classes that training has nothing of': ('warning', 1, 'class 3'),
        'validation images that stand in training': ('warning', 1, f'{images}/5.png')})
    (labels / '4.png').unlink()
    assert '4.png has no label' in ''.join(run_check('seg', tmp_path / 'data', '--nb_classes 3')[1])


@torch.no_grad()
def test_a_teacher_that_has_learnt_is_told_from_one_that_has_not(tmp_path, run_check):
    """On images of one colour: the constant's loss is their variance; least squares fit the last layer."""
    torch.manual_seed(0)
    files = [draw(tmp_path / f'data/{number}.png', number, (1, 1)) for number in range(32)]
    colours = np.stack([Image.open(file) for file in files])[:, 0, 0]
    variance = (colours / 255 / (0.229, 0.224, 0.225)).var(axis=0).mean()
    mae = models.create_mae('mae_vit_pico_patch8', 16)
    torch.save(mae.state_dict(), tmp_path / 'random.pth')
    images = models.normalise((torch.rand(200, 3, 1, 1) * 255).byte().expand(-1, -1, 16, 16))
    masking = models.random_masking(torch.rand(200, 4), 0.75)
    features = mae.decode(mae.encode(images, masking), masking, mae.decoder_blocks)[:, 1:]
    features = torch.cat([mae.decoder_norm(features), torch.ones(200, 4, 1)], dim=2).flatten(0, 1)
    solution = torch.linalg.lstsq(features, mae.patchify(images).flatten(0, 1)).solution
    mae.decoder_pred.weight.copy_(solution[:-1].T)
    mae.decoder_pred.bias.copy_(solution[-1])
    torch.save(mae.state_dict(), tmp_path / 'learnt.pth')
    for name in ('random', 'learnt'):
        flags = f'--teacher_model mae_vit_pico_patch8 --teacher_path {tmp_path}/{name}.pth'
        status, findings, text = run_check('generic', tmp_path / 'data', flags)
        wrong = {'teacher no better than a constant': ('error', 1, 'random.pth')} if name == 'random' else {}
        assert_found(findings, wrong)
        loss, untrained, constant = map(float, re.findall(r'(\d\.\d+)', text.splitlines()[1]))
        assert constant == pytest.approx(variance, abs=1e-3) and untrained > constant
        assert status == len(wrong) and (loss < 0.5 * constant) == (not wrong)
