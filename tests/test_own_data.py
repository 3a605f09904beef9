"""The converters of docs/your-own-data.md, run on drawn sets in the formats that they read."""
import re

import numpy as np
import pytest
from PIL import Image

from conftest import CLS, DET, ROOT, SEG, parse

PAGE = (ROOT / 'docs' / 'your-own-data.md').read_text()
CLASSES, BOXES, COLOURS = re.findall(r'^```python\n(.*?)^```', PAGE, re.S | re.M)


@pytest.fixture
def convert(tmp_path, monkeypatch):
    """Runs a block as a script in an empty folder, behind the drawing of its input."""
    monkeypatch.chdir(tmp_path)
    return lambda block: exec(compile(block, 'docs/your-own-data.md', 'exec'), {})


def draw(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.uint8(pixels)).save(path)


def test_a_csv_becomes_class_folders(tmp_path, convert):
    """Every image is in the folder of its label, of each class a fifth in val; equal names do not collide."""
    shades, rows = {'dark': 40, 'light, blue': 200}, ['file,label']
    for label, shade in shades.items():
        for number in range(10):
            name = f'{number % 2}/{label[0]}{number // 2}.png'
            draw(tmp_path / 'images' / name, np.full((4, 4, 3), shade + number))
            rows.append(f'{name},"{label}"')
    (tmp_path / 'labels.csv').write_text('\n'.join(rows), 'utf-8-sig')
    convert(CLASSES)
    seen = set()
    for split, count in (('train', 16), ('val', 4)):
        dataset = CLS.open_dataset(parse(CLS, 'x', '--data_path', 'DATA'), split)
        assert dataset.classes == ['dark', 'light, blue'] and len(dataset) == count
        for image, label in dataset:
            seen.add(image.getpixel((0, 0))[0])
            assert 0 <= image.getpixel((0, 0))[0] - shades[dataset.classes[label]] < 10
    assert len(seen) == 20


def test_yolo_files_become_coco(tmp_path, convert):
    """A polygon keeps its outline, a box becomes a rectangle; masks and boxes are those drawn."""
    for split in ('train', 'val'):
        draw(tmp_path / f'DATA/images/{split}/a.png', np.zeros((20, 40, 3)))
        draw(tmp_path / f'DATA/images/{split}/b.JPG', np.zeros((20, 40, 3)))  # without objects
        (tmp_path / 'DATA/labels' / split).mkdir(parents=True)
        # an L of 20 x 10 pixels without its upper right quarter, and a box 2 pixels beyond the edge
        (tmp_path / f'DATA/labels/{split}/a.txt').write_text(
            '1 .25 .25 .5 .25 .5 .5 .75 .5 .75 .75 .25 .75\n0 .975 .5 .15 .4\n')
    convert(BOXES)
    args = parse(DET, 'x', *'--data_path DATA --input_size 40 --scale_jitter 1 1'.split())
    path, images = DET.coco_paths(args, 'train')
    coco, left_out = DET.read_coco(path, is_train=True)
    shape, box = coco['annotations']
    assert [entry['name'] for entry in coco['categories']] == ['cat', 'dog'] and not left_out
    assert shape['bbox'] == [10, 5, 20, 10] and shape['area'] == pytest.approx(150)
    assert box['bbox'] == pytest.approx([36, 6, 4, 8]) and box['area'] == pytest.approx(32)
    dataset = DET.CocoDataset(coco, images, args, is_train=True)
    _, target = dataset[0]
    assert len(dataset) == 1 and target['labels'].tolist() == [2, 1]
    assert (target['masks'] > 127).sum(dim=(1, 2)).tolist() == [150, 32]
    assert target['boxes'][0].tolist() == [10, 5, 30, 15]  # in the middle: a flip changes nothing
    assert len(DET.read_coco(DET.coco_paths(args, 'val')[0], is_train=False)[0]['images']) == 2


def test_colours_become_labels(tmp_path, convert):
    """RGB and palettised files; classes have their names, an unknown colour ends the conversion."""
    label = np.array([[0, 1, 2], [2, 2, 1]])
    colours = np.uint8([[0, 0, 0], [128, 128, 128], [128, 0, 0]])
    draw(tmp_path / 'raw/train/a.jpg', np.zeros((2, 3, 3)))
    draw(tmp_path / 'raw/val/a.jpg', np.zeros((2, 3, 3)))
    draw(tmp_path / 'raw/train_labels/a_L.png', colours[label])
    palettised = Image.fromarray(np.uint8(label + 7))
    palettised.putpalette([0] * 21 + colours.ravel().tolist())
    (tmp_path / 'raw/val_labels').mkdir()
    palettised.save(tmp_path / 'raw/val_labels/a_L.png')
    convert(COLOURS)
    args = parse(SEG, 'x', '--data_path', 'DATA')
    for split in ('training', 'validation'):
        pairs, unused = SEG.list_pairs('DATA', split)
        assert len(pairs) == 1 and not unused and SEG.read_classes(args, pairs) == ['sky', 'building']
        assert SEG.read_label(pairs[0][1], reduce_zero_label=True).tolist() == [[255, 0, 1], [1, 1, 0]]
    draw(tmp_path / 'raw/train_labels/a_L.png', colours[label] + np.uint8([0, 0, 9]))
    with pytest.raises(SystemExit, match='train/a.jpg.*#000009'):
        convert(COLOURS.replace("'DATA'", "'AGAIN'"))
