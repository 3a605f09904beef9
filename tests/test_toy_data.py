"""The drawn data sets: what `make demo` and the other tests assume about their files."""
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import toy_data
from PIL import Image

import specific_distill_seg

TOOLS = Path(__file__).resolve().parents[1] / 'tools'

SMALL = ('--size', '32', '--train', '26', '--val', '12', '--scenes', '16', '--val_scenes', '6')
ADE_SPLITS = {'train': 'training', 'val': 'validation'}


def draw(out, *flags):
    toy_data.main(toy_data.get_args_parser().parse_args(['--out', str(out), *SMALL, *flags]))
    return out


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def load_coco(toy, split):
    coco_module = pytest.importorskip('pycocotools.coco')
    return coco_module.COCO(str(toy / f'coco/annotations/instances_{split}2017.json'))


def ade_labels(toy, split, image_id):
    name = f'ade/annotations/{ADE_SPLITS[split]}/ADE_{split}_{image_id:08d}.png'
    with Image.open(toy / name) as image:
        assert image.mode == 'L'
        return np.array(image)


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    return draw(tmp_path_factory.mktemp('toy') / 'data')


def test_same_arguments_give_the_same_bytes(toy, tmp_path):
    """Claim: the demo's pictures are a function of the arguments, in a new folder and when drawn again over the old."""
    first = contents(toy)
    out = draw(tmp_path / 'other')
    assert contents(out) == first
    draw(out, '--only', 'coco')
    draw(out)
    assert contents(out) == first


def test_another_seed_draws_other_pictures(toy, tmp_path):
    """Claim: --seed names the drawn data set, so runs on several seeds are several data sets."""
    first = contents(toy / 'imagenet')
    other = contents(draw(tmp_path / 'x', '--seed', '1', '--only', 'imagenet') / 'imagenet')
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)


def test_a_larger_set_keeps_the_pictures_of_a_smaller_one(toy, tmp_path):
    """Claim: --train N is the first N pictures of any larger set, so results on fewer pictures compare."""
    more = contents(draw(tmp_path / 'x', '--train', '40', '--only', 'imagenet') / 'imagenet')
    assert contents(toy / 'imagenet').items() < more.items()


def test_image_folder_reads_the_classes_in_equal_numbers(toy):
    """Claim: data/toy/imagenet is an ImageFolder with balanced classes, the same ones in train and val."""
    datasets = pytest.importorskip('torchvision.datasets')
    for split, count in (('train', 26), ('val', 12)):
        dataset = datasets.ImageFolder(toy / 'imagenet' / split)
        assert dataset.classes == sorted(toy_data.CLASSES)
        assert len(dataset) == count
        per_class = Counter(dataset.targets)
        assert len(per_class) == len(toy_data.CLASSES) and max(per_class.values()) - min(per_class.values()) <= 1
        assert all(image.size == (32, 32) and image.mode == 'RGB' for image, _ in dataset)


def test_train_and_val_share_no_picture(toy):
    """Claim: the demo's accuracy is measured on pictures that training never saw."""
    # coco's pictures are ade's, and nothing else repeats
    pictures = [data for name, data in contents(toy).items() if name.startswith(('imagenet/', 'ade/images/'))]
    assert len(set(pictures)) == len(pictures)


@pytest.mark.parametrize('split', toy_data.SPLITS)
def test_coco_masks_agree_with_boxes_and_areas(toy, split):
    """Claim: polygons, RLE, bbox and area of an annotation describe the same pixels, with COCO's conventions."""
    coco = load_coco(toy, split)
    assert coco.anns
    for a in coco.anns.values():
        height, width = (coco.imgs[a['image_id']][side] for side in ('height', 'width'))
        mask = coco.annToMask(a)
        assert mask.shape == (height, width)
        # pycocotools rounds outlines its own way: half a pixel along the edge of small shapes
        assert abs(int(mask.sum()) - a['area']) <= (0 if a['iscrowd'] else 0.15 * a['area'] + 8)
        x, y, w, h = a['bbox']
        assert x >= 0 and y >= 0 and w > 0 and h > 0 and x + w <= width + 0.01 and y + h <= height + 0.01
        rows, columns = np.nonzero(mask)
        tight = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        np.testing.assert_allclose((x, y, x + w, y + h), tight, atol=1.0)
        assert a['iscrowd'] or all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in a['segmentation'])


@pytest.mark.parametrize('split', toy_data.SPLITS)
def test_coco_and_ade_describe_the_same_scenes(toy, split):
    """Claim: the COCO and ADE sets are one set of scenes: same pictures, and masks that agree with the label maps."""
    coco = load_coco(toy, split)
    for image_id, info in coco.imgs.items():
        picture = (toy / f'coco/{split}2017' / info['file_name']).read_bytes()
        assert picture == (toy / f'ade/images/{ADE_SPLITS[split]}/ADE_{split}_{image_id:08d}.jpg').read_bytes()
        labels = ade_labels(toy, split, image_id)
        assert labels.shape == (info['height'], info['width'])
        for category in coco.cats.values():
            label = toy_data.ADE_CLASSES.index(category['name']) + 1
            ids = coco.getAnnIds(imgIds=image_id, catIds=category['id'])
            masks = [coco.annToMask(coco.anns[i]).astype(bool) for i in ids]
            union = np.any(masks, axis=0) if masks else np.zeros(labels.shape, bool)
            differing = (union != (labels == label)).sum()
            # at most a thin edge differs between the two rasterisers
            assert differing <= 0.15 * (labels == label).sum() + 8 * len(ids)


@pytest.mark.parametrize('split', toy_data.SPLITS)
def test_each_split_has_the_cases_that_readers_get_wrong(toy, split):
    """Claim: gaps in the ids, pictures without objects, crowds, split masks and varied sizes are all exercised."""
    coco = load_coco(toy, split)
    ids = sorted(coco.cats)
    assert ids != list(range(ids[0], ids[0] + len(ids)))
    assert {a['category_id'] for a in coco.anns.values()} <= set(ids)
    assert any(not coco.getAnnIds(imgIds=i) for i in coco.imgs)
    crowds = [a for a in coco.anns.values() if a['iscrowd']]
    assert crowds and all(isinstance(a['segmentation']['counts'], list) for a in crowds)
    assert any(len(a['segmentation']) > 1 for a in coco.anns.values() if not a['iscrowd'])
    assert any(info['height'] != info['width'] for info in coco.imgs.values())
    assert len({(info['height'], info['width']) for info in coco.imgs.values()}) > 1


def test_labels_are_zero_for_ignore_and_classes_from_one(toy):
    """Claim: ADE20K's convention (0 = ignore, 1..K = classes) with ignored pixels present and every class drawn."""
    seen = set()
    for split in toy_data.SPLITS:
        for image_id in range(1, 7):
            seen |= set(np.unique(ade_labels(toy, split, image_id)).tolist())
    assert seen == set(range(len(toy_data.ADE_CLASSES) + 1))


def test_the_names_of_the_labels_lie_beside_them(toy):
    """Claim: OUT/ade/classes.txt has a line for every label but 0, and the segmentation script reads it."""
    lines = (toy / 'ade/classes.txt').read_text().splitlines()
    assert lines == ['1 grass', '2 sand', '3 water', '4 pole', '5 circle', '6 square', '7 triangle', '8 star']
    words = ['--data_path', str(toy / 'ade'), '--reduce_zero_label']
    args = specific_distill_seg.get_args_parser().parse_args(words)
    assert specific_distill_seg.read_classes(args, ()) == list(toy_data.ADE_CLASSES)


def test_rle_counts_down_the_columns_and_starts_with_zeros():
    """Claim: crowds are encoded as COCO does (hand-worked 2x3 masks)."""
    assert toy_data.encode_rle(np.array([[0, 1, 1], [0, 0, 1]], bool)) == {'counts': [2, 1, 1, 2], 'size': [2, 3]}
    assert toy_data.encode_rle(np.array([[1, 0, 0], [0, 0, 0]], bool)) == {'counts': [0, 1, 5], 'size': [2, 3]}


def test_mirroring_a_texture_gives_the_same_texture():
    """Claim: the scripts' horizontal flips keep the class; upright stripes stay upright, level bands stay level."""
    for seed in range(20):
        stripes = toy_data.draw_texture(np.random.default_rng(seed), 'stripes', 48, 48)
        bands = toy_data.draw_texture(np.random.default_rng(seed), 'bands', 48, 48)
        for flipped in (lambda image: image, np.fliplr):
            across, down = (np.mean(np.diff(flipped(stripes).astype(int), axis=axis) != 0) for axis in (1, 0))
            assert across > down
            across, down = (np.mean(np.diff(flipped(bands).astype(int), axis=axis) != 0) for axis in (1, 0))
            assert down > across


def test_a_foreign_folder_is_left_alone(tmp_path):
    """Claim: the tool never writes into (or empties) a folder that it did not make; one line, non-zero exit."""
    (tmp_path / 'imagenet').mkdir()
    (tmp_path / 'imagenet' / 'precious.txt').write_text('mine')
    command = [sys.executable, str(TOOLS / 'toy_data.py'), '--out', str(tmp_path), *SMALL]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode != 0
    assert len(result.stderr.strip().splitlines()) == 1 and 'not empty' in result.stderr
    assert contents(tmp_path) == {'imagenet/precious.txt': b'mine'}


def test_other_sets_stay_when_one_is_drawn_again(toy, tmp_path):
    """Claim: --only replaces the sets it names; toy_data.json says with which arguments each one was drawn."""
    out = draw(tmp_path / 'data')
    draw(out, '--only', 'ade', '--seed', '5')
    before, after = contents(toy), contents(out)
    assert all(after[name] == data for name, data in before.items() if name.startswith(('imagenet/', 'coco/')))
    assert any(after.get(name) != data for name, data in before.items() if name.startswith('ade/'))
    assert b'"seed": 5' in after['toy_data.json']
