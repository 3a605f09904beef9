"""The drawn data sets: what `make demo` and the other tests assume about their files."""
import numpy as np
import pytest
import toy_data
import torchvision
from conftest import contents
from PIL import Image

import specific_distill_seg

SMALL = ['--size', '32', '--train', '26', '--val', '12', '--scenes', '12', '--val_scenes', '6']
EACH_SPLIT = pytest.mark.parametrize('split, ade_split', [('train', 'training'), ('val', 'validation')])


def draw(out, *flags):
    toy_data.main(toy_data.get_args_parser().parse_args(['--out', str(out), *SMALL, *flags]))
    return out


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    return draw(tmp_path_factory.mktemp('toy') / 'data')


def load_coco(toy, split):
    from pycocotools.coco import COCO
    return COCO(str(toy / f'coco/annotations/instances_{split}2017.json'))


def test_pictures_depend_on_the_seed_and_not_on_the_size_of_the_set(toy, tmp_path):
    """The same flags draw the same bytes, a larger set keeps the pictures, another seed draws others."""
    first = contents(toy / 'imagenet')
    more = contents(draw(tmp_path / 'more', '--train', '40', '--only', 'imagenet') / 'imagenet')
    other = contents(draw(tmp_path / 'other', '--seed', '1', '--only', 'imagenet') / 'imagenet')
    assert first.items() < more.items()
    assert first.keys() == other.keys() and not any(first[name] == other[name] for name in first)


def test_image_folders_hold_the_classes_in_equal_numbers(toy):
    """The same classes in train/ and val/; their counts differ by at most one."""
    for split, count in (('train', 26), ('val', 12)):
        dataset = torchvision.datasets.ImageFolder(toy / 'imagenet' / split)
        assert dataset.classes == sorted(toy_data.CLASSES) and len(dataset) == count
        assert np.ptp(np.bincount(dataset.targets)) <= 1
        assert dataset[0][0].size == (32, 32)


def test_train_and_val_share_no_picture(toy):
    """Accuracy is measured on pictures that training never saw."""
    files = contents(toy)
    pictures = [files[name] for name in files if name.startswith(('imagenet/', 'ade/images/'))]
    assert len(set(pictures)) == len(pictures)


@EACH_SPLIT
def test_coco_and_ade_describe_the_same_scenes(toy, split, ade_split):
    """The same pictures; polygons, run lengths, boxes and areas agree with the labels of each pixel."""
    coco = load_coco(toy, split)
    label_of = {key: toy_data.ADE_CLASSES.index(entry['name']) + 1 for key, entry in coco.cats.items()}
    for image_id, info in coco.imgs.items():
        name = f'{ade_split}/ADE_{split}_{image_id:08d}'
        picture = (toy / f'coco/{split}2017' / info['file_name']).read_bytes()
        assert picture == (toy / f'ade/images/{name}.jpg').read_bytes()
        labels = np.array(Image.open(toy / f'ade/annotations/{name}.png'))
        assert labels.shape == (info['height'], info['width'])
        unions = {category: np.zeros(labels.shape, bool) for category in coco.cats}
        for entry in coco.imgToAnns[image_id]:
            mask = coco.annToMask(entry).astype(bool)
            unions[entry['category_id']] |= mask
            if entry['iscrowd']:  # run lengths are exact
                assert mask.sum() == entry['area'] and (labels[mask] == label_of[entry['category_id']]).all()
            # pycocotools rounds outlines its own way: half a pixel along the edge of small shapes
            assert abs(mask.sum() - entry['area']) <= 0.15 * entry['area'] + 8
            rows, columns = np.nonzero(mask)
            box = columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1
            np.testing.assert_allclose(entry['bbox'], box, atol=2)
        for category, union in unions.items():
            own = labels == label_of[category]
            assert (union != own).sum() <= 0.15 * own.sum() + 8 * len(coco.imgToAnns[image_id])


@EACH_SPLIT
def test_each_split_has_the_cases_that_readers_get_wrong(toy, split, ade_split):
    """Gaps in the ids, pictures without objects, crowds, objects in two parts and varied sizes."""
    coco = load_coco(toy, split)
    entries = list(coco.anns.values())
    assert sorted(coco.cats) != list(range(1, 1 + len(coco.cats)))
    assert any(not coco.imgToAnns[image_id] for image_id in coco.imgs)
    crowds = [entry for entry in entries if entry['iscrowd']]
    assert crowds and all(isinstance(entry['segmentation']['counts'], list) for entry in crowds)
    assert any(len(entry['segmentation']) > 1 for entry in entries if not entry['iscrowd'])
    assert len({(info['height'], info['width']) for info in coco.imgs.values()}) > 1


def test_labels_are_zero_for_ignore_and_classes_from_one(toy):
    """ADE20K's convention; classes.txt has a line for every label but 0, and the script reads it."""
    labels = [np.unique(np.array(Image.open(path))) for path in toy.glob('ade/annotations/*/*.png')]
    assert set(np.concatenate(labels).tolist()) == set(range(9))
    lines = (toy / 'ade/classes.txt').read_text().splitlines()
    assert lines == ['1 grass', '2 sand', '3 water', '4 pole', '5 circle', '6 square', '7 triangle', '8 star']
    args = specific_distill_seg.get_args_parser().parse_args(['--data_path', str(toy / 'ade')])
    assert specific_distill_seg.read_classes(args, ()) == list(toy_data.ADE_CLASSES)


def test_a_set_that_is_there_stays(toy, tmp_path):
    """Nothing is replaced; what an interrupted run has left is."""
    before = contents(toy)
    with pytest.raises(SystemExit, match='exists'):
        draw(toy, '--only', 'ade', '--seed', '5')
    assert contents(toy) == before
    (tmp_path / 'ade.part').mkdir()
    (tmp_path / 'ade.part/half.png').touch()
    assert contents(draw(tmp_path, '--only', 'ade') / 'ade') == contents(toy / 'ade')
