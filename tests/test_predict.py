"""tools/predict.py on detectors and segmentation networks: what it prints and draws, against answers set by hand and the
scripts' own evaluation."""
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import environment
from PIL import Image
from torchvision.models.detection import MaskRCNN
from torchvision.transforms import v2

import models
import predict
import specific_distill_det
import specific_distill_seg

NAME, CLASSES = 'vit_pico_patch8', ['cat', 'traffic light']
SEG_CLASSES = ('wall', 'sky, cloudy', 'grass', 'cat', 'pole')
GEOMETRY = ('--model', NAME, '--input_size', 64, '--window_size', 4, '--fpn_dim', 16, '--head_dim', 32,
            '--anchor_size', 8, '--proposals', 20, '--device', 'cpu', '--num_workers', 0)


@pytest.fixture
def checkpoint(tmp_path):
    """A detector's file: random weights, two classes, what specific_distill_det.py stores beside them."""
    args = specific_distill_det.get_args_parser().parse_args([str(word) for word in GEOMETRY])
    args.input_size = [64, 64]
    torch.manual_seed(0)
    model = specific_distill_det.Detector(NAME, len(CLASSES), args)
    torch.save({'model': model.state_dict(), 'classes': CLASSES, 'args': vars(args)}, tmp_path / 'd.pth')
    return tmp_path / 'd.pth'


@pytest.fixture
def segmenter(tmp_path):
    """A segmentation network's file: random weights, five classes."""
    return save_segmenter(tmp_path / 's.pth')


def save_segmenter(path, *flags, classes=SEG_CLASSES):
    """What specific_distill_seg.py stores, of a network whose answers vary over the image."""
    words = ('--model', NAME, '--input_size', 16, '--data_path', 'x', *flags)
    args = specific_distill_seg.get_args_parser().parse_args([str(word) for word in words])
    args.input_size = [16, 16]
    torch.manual_seed(0)
    model = specific_distill_seg.Segmenter(NAME, len(classes), 16)
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    torch.save({'model': model.state_dict(), 'classes': list(classes), 'args': vars(args)}, path)
    return path


@pytest.fixture
def image(tmp_path):
    """A noisy image, 120 wide and 60 high: the network sees it 64 x 32, at 8/15 of its size."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    return tmp_path / 'a.png'


def run(*words):
    predict.main(predict.get_args_parser().parse_args([str(word) for word in words]))


def pixels_of(path):
    return np.array(Image.open(path).convert('RGB')).astype(int)


def detections(*found):
    """(score, label, xyxy in pixels that the network sees) -> a detector's answer; masks fill the upper half."""
    masks = torch.zeros(len(found), 1, 28, 28)
    masks[:, :, :14] = 1
    return {'boxes': torch.tensor([list(box) for _, _, box in found], dtype=torch.float).reshape(-1, 4), 'masks': masks,
            'labels': torch.tensor([label for _, label, _ in found], dtype=torch.int64),
            'scores': torch.tensor([score for score, _, _ in found], dtype=torch.float)}


@pytest.fixture
def stub(monkeypatch):
    """stub(...) makes every detector answer `detections(...)`; returns the list of the images that it is shown."""
    def replace(*found):
        seen = []

        def forward(self, images, targets=None):
            assert not self.training and not torch.is_grad_enabled() and targets is None
            seen.extend(images)
            return [detections(*found)]

        monkeypatch.setattr(specific_distill_det.Detector, 'forward', forward)
        return seen
    return replace


def as_drawn(box, size, category=1, score=0.9):
    """One object as `detect` returns it: box xywh, its mask the whole box; size: (width, height) of the picture."""
    from pycocotools import mask as coco_mask
    mask = np.zeros(size[::-1], np.uint8, order='F')
    x, y, width, height = box
    mask[y:y + height, x:x + width] = 1
    return {'bbox': list(box), 'category_id': category, 'score': score, 'segmentation': coco_mask.encode(mask)}


# -------------------------------------------------------------------------------------------- what is printed and drawn


def test_a_detection_is_printed_and_drawn_in_the_pixels_of_the_image(checkpoint, image, stub, tmp_path, capsys):
    """Claim: boxes and masks go back to the original size; pixels of no object keep every bit."""
    stub((0.875, 2, (8, 8, 24, 24)))  # in the image: 15 to 45, times 15/8
    run('--checkpoint', checkpoint, '--image', image, '--out', tmp_path / 'o.png')
    line, last = capsys.readouterr().out.splitlines()
    assert line.split() == ['0.875', 'traffic', 'light', '15.0', '15.0', '45.0', '45.0']
    assert last == f'{tmp_path}/o.png: 1 object of score 0.5 or more'
    before, after = pixels_of(image), pixels_of(tmp_path / 'o.png')
    assert after.shape == before.shape == (60, 120, 3)
    changed = (before != after).any(-1)
    assert changed[16:29, 16:44].mean() > 0.99  # the upper half of the box: mask (a pixel may have its colour already)
    assert not changed[31:44, 16:44].any()  # the lower half: not in the mask
    assert np.corrcoef(before[16:29, 16:44].ravel(), after[16:29, 16:44].ravel())[0, 1] > 0.5  # masks are translucent
    assert changed[14:46, 14].all() and changed[14:46, 45].all() and changed[45, 14:46].all()  # lines, around the box
    assert not changed[14:, :14].any() and not changed[14:, 46:].any() and not changed[46:].any()
    assert not changed[:, 110:].any()  # beside the label, which stands on the box
    assert np.ptp(after[45, 15:45], axis=0).max() == 0  # a line of one colour


def test_the_network_is_shown_what_evaluation_shows_it(checkpoint, image, stub, tmp_path):
    """Claim: the long side becomes the input size, with antialiasing, in uint8; nothing is padded or normalised yet."""
    seen = stub()
    run('--checkpoint', checkpoint, '--image', image, '--out', tmp_path / 'o.png')
    expected = v2.functional.resize(v2.functional.pil_to_tensor(Image.open(image)), [32, 64], antialias=True)
    assert len(seen) == 1 and seen[0].dtype == torch.uint8 and torch.equal(seen[0], expected)


def test_what_is_printed_is_what_evaluation_counts(checkpoint, image, tmp_path, capsys):
    """Claim: with a real network, scores, classes and boxes are those that --eval writes with --results_json."""
    content = {'images': [{'id': 5, 'file_name': 'a.png', 'width': 120, 'height': 60}],
               'categories': [{'id': 9, 'name': 'traffic light'}, {'id': 4, 'name': 'cat'}],
               'annotations': [{'id': 1, 'image_id': 5, 'category_id': 9, 'bbox': [1, 1, 9, 9], 'area': 81,
                                'iscrowd': 0, 'segmentation': [[1, 1, 10, 1, 10, 10]]}]}
    (tmp_path / 'val.json').write_text(json.dumps(content))
    words = (*GEOMETRY, '--eval', '--resume', checkpoint, '--val_annotations', tmp_path / 'val.json', '--val_images',
             tmp_path, '--results_json', tmp_path / 'results.json', '--output_dir', tmp_path / 'run')
    specific_distill_det.main(specific_distill_det.get_args_parser().parse_args([str(word) for word in words]))
    expected = []
    for entry in json.loads((tmp_path / 'results.json').read_text()):
        x, y, width, height = entry['bbox']
        expected.append([f'{entry["score"]:.3f}', *{9: ['traffic', 'light'], 4: ['cat']}[entry['category_id']],
                         f'{x:.1f}', f'{y:.1f}', f'{x + width:.1f}', f'{y + height:.1f}'])
    capsys.readouterr()
    run('--checkpoint', checkpoint, '--image', image, '--out', tmp_path / 'o.png', '--score', 0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:-1]] == expected
    assert len(expected) > 2 and lines[-1].endswith(f': {len(expected)} objects of score 0 or more')


def test_objects_come_best_first_and_only_from_the_threshold_on(checkpoint, image, stub, tmp_path, capsys):
    """Claim: --score is the smallest score that is shown, printed and drawn, 0.5 unless given."""
    stub((0.4, 1, (40, 8, 60, 24)), (0.9, 2, (4, 8, 20, 24)), (0.3, 1, (4, 8, 20, 24)))
    common = '--checkpoint', checkpoint, '--image', image, '--out', tmp_path / 'o.png'
    right = np.s_[20:24, 80:110]  # in the mask of the object of score 0.4
    for words, scores in (((), ['0.900']), (('--score', 0.4), ['0.900', '0.400'])):
        run(*common, *words)
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:-1]] == scores
        drawn = (pixels_of(tmp_path / 'o.png') != pixels_of(image)).any(-1)[right]
        assert drawn.all() if len(scores) == 2 else not drawn.any()


@pytest.mark.parametrize('found, hint', [((), ''), (((0.25, 1, (8, 8, 24, 24)),), ' (the best has 0.250)')])
def test_no_object_leaves_the_picture_as_it_was_and_is_said(checkpoint, image, stub, tmp_path, capsys, found, hint):
    """Claim: an image without objects is a result, not an error; the line tells whether a lower --score would help."""
    stub(*found)
    run('--checkpoint', checkpoint, '--image', image, '--out', tmp_path / 'o.png')
    assert capsys.readouterr().out.splitlines() == [f'{tmp_path}/o.png: no objects of score 0.5 or more{hint}']
    assert np.array_equal(pixels_of(tmp_path / 'o.png'), pixels_of(image))


def test_classifiers_answer_as_before_and_draw_nothing(image, tmp_path, capsys, monkeypatch):
    """Claim: the kind of network is recognised; a classifier's classes are printed and no file is made."""
    torch.save({'model': models.create_vit(NAME, 2, 16).state_dict(), 'classes': ['ant', 'bee'],
                'args': {'model': NAME, 'input_size': [16, 16]}}, tmp_path / 'c.pth')
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    run('--checkpoint', tmp_path / 'c.pth', '--image', image)
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[-1] for line in lines) == ['ant', 'bee']
    assert sum(float(line.split('%')[0]) for line in lines) == pytest.approx(100, abs=0.02)
    assert sorted(tmp_path.iterdir()) == before


# ---------------------------------------------------------------------------------------------------------------- files


def test_the_picture_is_called_after_the_image_and_may_be_drawn_again(checkpoint, image, stub, tmp_path, monkeypatch):
    """Claim: without --out the picture lies in the current folder, a second run replaces it, and the image stays."""
    stub((0.9, 1, (8, 8, 24, 24)))
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    before = image.read_bytes()
    for _ in range(2):
        run('--checkpoint', checkpoint, '--image', image)
    assert [path.name for path in Path().iterdir()] == ['a_pred.png'] and image.read_bytes() == before


def test_a_jpeg_can_be_read_and_written(checkpoint, image, stub, tmp_path):
    """Claim: --out may be a JPEG, which may be drawn again too; the image may be grey, and stored in any mode."""
    stub((0.9, 1, (8, 8, 24, 24)))
    Image.open(image).convert('L').save(tmp_path / 'grey.jpg')
    for _ in range(2):
        run('--checkpoint', checkpoint, '--image', tmp_path / 'grey.jpg', '--out', tmp_path / 'o.JPG')
    picture = Image.open(tmp_path / 'o.JPG')
    assert (picture.format, picture.mode, picture.size) == ('JPEG', 'RGB', (120, 60))
    assert [layer[1:3] for layer in picture.layer] == [(1, 1)] * 3  # colours at full resolution: sharp lines


def test_an_image_that_is_stored_turned_stays_so(checkpoint, image, stub, tmp_path, capsys):
    """Claim: pixels count as they are stored, as in evaluation, which is said; viewers do not turn the picture."""
    stub((0.9, 1, (8, 8, 24, 24)))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(image).save(tmp_path / 'phone.png', exif=exif)
    run('--checkpoint', checkpoint, '--image', tmp_path / 'phone.png', '--out', tmp_path / 'o.png')
    note, line, _ = capsys.readouterr().out.splitlines()
    assert note.startswith('note: ') and 'orientation 6' in note
    assert line.split()[2:] == ['15.0', '15.0', '45.0', '45.0']
    assert Image.open(tmp_path / 'o.png').size == (120, 60) and 0x0112 not in Image.open(tmp_path / 'o.png').getexif()


@pytest.mark.parametrize('words, message', [
    (['--checkpoint', '{tmp}/d.pth', '--image', '{tmp}/d.pth'], 'cannot read the image'),
    (['--checkpoint', '{tmp}/d.pth', '--image', '{tmp}/gone.png'], 'cannot read the image'),
    (['--checkpoint', '{tmp}/mae.pth', '--image', '{tmp}/a.png'], 'holds neither a classifier'),
    (['--checkpoint', '{tmp}/other.pth', '--image', '{tmp}/a.png'], 'no arguments and classes of specific'),
    (['--checkpoint', '{tmp}/d.pth', '--image', '{tmp}/a.png', '--out', '{tmp}/gone/o.png'], 'in an existing folder'),
    (['--checkpoint', '{tmp}/d.pth', '--image', '{tmp}/a.png', '--out', '{tmp}/o.txt'], 'must end in .png or .jpg'),
    (['--checkpoint', '{tmp}/d.pth', '--image', '{tmp}/a.png', '--out', '{tmp}/a.png'], 'is the image itself'),
    (['--checkpoint', '{tmp}/d.pth', '--image', '{tmp}/a.png', '--out', '{tmp}/link.png'], 'is the image itself'),
    (['--checkpoint', '{tmp}/d.pth', '--image', '{tmp}/a.png', '--out', '{tmp}/b.png'], 'this tool did not draw it'),
    (['--checkpoint', '{tmp}/d.pth', '--image', '{tmp}/a.png', '--score', '50'], '--score 50 must be between 0 and 1'),
    (['--checkpoint', '{tmp}/d.pth', '--image', '{tmp}/a.png', '--input_size', '64'], '--input_size: '),
    (['--checkpoint', '{tmp}/d.pth', '--image', '{tmp}/a.png', '--topk', '2'], 'is a detector, which does not take it'),
    (['--checkpoint', '{tmp}/c.pth', '--image', '{tmp}/a.png', '--out', '{tmp}/o.png'], 'is a classifier, which does not'),
    (['--checkpoint', '{tmp}/c.pth', '--image', '{tmp}/a.png', '--score', '0.6'], '--score: '),
    (['--checkpoint', '{tmp}/s.pth', '--image', '{tmp}/a.png', '--score', '0.6'], 'is a segmentation network, which does'),
    (['--checkpoint', '{tmp}/s.pth', '--image', '{tmp}/a.png', '--topk', '3'], '--topk: '),
    (['--checkpoint', '{tmp}/s.pth', '--image', '{tmp}/a.png', '--model', NAME], '--model: '),
    (['--checkpoint', '{tmp}/s.pth', '--image', '{tmp}/a.png', '--input_size', '32'], '--input_size: '),
    (['--checkpoint', '{tmp}/s.pth', '--image', '{tmp}/s.pth'], 'cannot read the image'),
    (['--checkpoint', '{tmp}/s.pth', '--image', '{tmp}/a.png', '--out', '{tmp}/gone/o.png'], 'in an existing folder'),
    (['--checkpoint', '{tmp}/s.pth', '--image', '{tmp}/a.png', '--out', '{tmp}/a.png'], 'a.png is the image itself'),
    (['--checkpoint', '{tmp}/s.pth', '--image', '{tmp}/a.png', '--out', '{tmp}/b.png'], 'this tool did not draw it'),
    (['--checkpoint', '{tmp}/s.pth', '--image', '{tmp}/a.png', '--out', '{tmp}/o.png'], 'o_labels.png exists, and this'),
    (['--checkpoint', '{tmp}/s.pth', '--image', '{tmp}/o_labels.png', '--out', '{tmp}/o.png'], 'labels.png is the image'),
    (['--checkpoint', '{tmp}/theirs.pth', '--image', '{tmp}/a.png'], 'no arguments and classes of specific_distill_seg'),
    (['no pycocotools', '--checkpoint', '{tmp}/d.pth', '--image', '{tmp}/a.png'], 'pip install pycocotools')])
def test_mistakes_end_in_one_line_and_write_nothing(checkpoint, segmenter, image, tmp_path, monkeypatch, words, message):
    """Claim: what is wrong is said in one line, with an exit status of failure; no file is made or changed."""
    torch.save({'model': models.create_mae('mae_vit_pico_patch8', 16).state_dict(), 'args': {}}, tmp_path / 'mae.pth')
    torch.save({'model': models.create_vit(NAME, 2, 16).state_dict(), 'args': {'model': NAME, 'input_size': [16, 16]}},
               tmp_path / 'c.pth')
    torch.save({'model': torch.load(checkpoint)['model'], 'args': {'model': 'maskrcnn'}}, tmp_path / 'other.pth')
    torch.save(torch.load(segmenter)['model'], tmp_path / 'theirs.pth')
    (tmp_path / 'link.png').symlink_to(image)
    for name in ('b.png', 'o_labels.png'):
        Image.new('RGB', (9, 9)).save(tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    if words[0] == 'no pycocotools':
        monkeypatch.setitem(sys.modules, 'pycocotools', None)
        words = words[1:]
    monkeypatch.setattr(sys, 'argv', ['predict.py', *(word.replace('{tmp}', str(tmp_path)) for word in words)])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(predict.__file__, run_name='__main__')
    assert error.value.code.startswith('error: ') and message in error.value.code and '\n' not in error.value.code
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_detectors_of_torchvision_have_the_name_that_is_looked_for():
    """Claim: such a file reaches the detector's own message (`other.pth` above), although it is none of ours."""
    assert issubclass(specific_distill_det.Detector, MaskRCNN)
    with torch.device('meta'):
        from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_fpn
        theirs = fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None).state_dict()
    assert sum(name.startswith('rpn.head.cls_logits') for name in theirs) == 2


# ----------------------------------------------------------------------------------------------------------- legibility


def luminance(colour):
    """WCAG 2's relative luminance of an RGB colour in 0..255."""
    parts = np.asarray(colour) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)


@pytest.mark.parametrize('width, lowest, highest', [(100, 9, 16), (640, 12, 24), (3000, 45, 90)])
def test_labels_hide_what_is_under_them_and_grow_with_the_image(width, lowest, highest):
    """Claim: names and scores can be read at any size, and as well on dark images as on light ones."""
    size, x, y = (width, width // 3), width // 20, width // 6
    objects = [as_drawn((x, y, width // 4, width // 10), size)]
    images = Image.new('RGB', size, 'black'), Image.new('RGB', size, 'white')
    dark, light = (np.array(predict.draw_objects(image, objects, ['cat'])) for image in images)
    assert [image.getextrema() for image in images] == [((0, 0),) * 3, ((255, 255),) * 3]  # the image itself stays
    opaque = (dark == light).all(-1)
    rows, columns = np.flatnonzero(opaque[:y - width // 300, x + 2]), np.flatnonzero(opaque[y - lowest // 2])
    assert lowest <= len(rows) <= highest and np.ptp(rows) == len(rows) - 1  # from the box upwards, without a gap
    assert 2 * lowest < len(columns) < width // 2


def test_every_colour_is_unlike_the_next_and_unlike_its_letters(monkeypatch):
    """Claim: objects can be told apart by colour, and their labels have the contrast that WCAG 2 asks for (AA, 4.5)."""
    places = [(60 * (k % 10), 100 + 20 * (k // 10)) for k in range(40)]
    free = iter(places)

    def place(box, size, limits, taken):
        x, y = next(free)
        return x, y, x + size[0], y + size[1]

    monkeypatch.setattr(predict, 'place_label', place)
    size = (600, 200)
    objects = [as_drawn((14 * k, 20, 10, 60), size) for k in range(40)]
    picture = np.array(predict.draw_objects(Image.new('RGB', size), objects, ['cat']))
    masks = [picture[50, 14 * k + 5].astype(int) for k in range(40)]
    assert min(np.abs(a - b).max() for a, b in zip(masks, masks[1:])) > 50
    for x, y in places:
        light = luminance(picture[y:y + 12, x:x + 40].reshape(-1, 3))
        assert (light.max() + 0.05) / (light.min() + 0.05) > 4.5


def test_labels_stay_inside_and_apart_where_there_is_room():
    """Claim: no label is cut off by the border, and one moves rather than cover another."""
    taken, generator = [], np.random.default_rng(0)
    for _ in range(200):
        x0, x1 = sorted(generator.integers(0, 640, 2).tolist())
        y0, y1 = sorted(generator.integers(0, 480, 2).tolist())
        place = predict.place_label((x0, y0, x1, y1), (80, 14), (640, 480), taken)
        assert 0 <= place[0] < place[2] <= 640 and 0 <= place[1] < place[3] <= 480
        assert (place[2] - place[0], place[3] - place[1]) == (80, 14)
        taken.append(place)
    assert predict.place_label((100, 100, 200, 200), (80, 14), (640, 480), []) == (100, 86, 180, 100)
    others = []
    for _ in range(6):
        others.append(predict.place_label((100, 100, 200, 200), (80, 14), (640, 480), others))
    for k, (x0, y0, x1, y1) in enumerate(others):
        assert not any(x0 < b[2] and b[0] < x1 and y0 < b[3] and b[1] < y1 for b in others[:k])


def test_a_long_name_is_shortened_to_the_width_of_the_picture(monkeypatch):
    """Claim: the score stays readable beside a name that does not fit."""
    sizes, place = [], predict.place_label
    monkeypatch.setattr(predict, 'place_label', lambda box, size, *rest: sizes.append(size) or place(box, size, *rest))
    for name in ('x' * 100, 'x'):
        predict.draw_objects(Image.new('RGB', (120, 90)), [as_drawn((5, 40, 20, 20), (120, 90))], [name])
    assert 100 < sizes[0][0] <= 120 and 20 < sizes[1][0] < 50 and sizes[0][1] == sizes[1][1]


@pytest.mark.parametrize('size', [(1, 1), (8, 30), (60, 9)])
def test_an_image_smaller_than_a_label_is_drawn_on_as_well(size):
    """Claim: no image is too small; where labels must cover each other the best one, which comes first, is on top."""
    objects = [as_drawn((0, 0, *size), size)] * 3
    all_of_them, best = (predict.draw_objects(Image.new('RGB', size), some, ['traffic light'])
                         for some in (objects, objects[:1]))
    assert all_of_them.size == size and all_of_them.getpixel((0, 0)) == best.getpixel((0, 0))


def test_a_small_mask_lies_over_a_large_one():
    """Claim: an object in front of a better and larger one is seen in its own colour."""
    large, small = as_drawn((10, 40, 180, 100), (200, 150)), as_drawn((100, 80, 30, 30), (200, 150))
    for objects in ([large, small], [small, large]):
        picture = np.array(predict.draw_objects(Image.new('RGB', (200, 150)), objects, ['x']))
        line = picture[110, 115]  # the lower line of the small box has the pure colour
        assert np.abs(picture[105, 115] - line / 2).max() < np.abs(picture[60, 40] - line / 2).max()


# --------------------------------------------------------------------------------------------------------- segmentation


@pytest.fixture
def answer(monkeypatch):
    """answer(array) makes every segmentation network predict these classes (H, W)."""
    return lambda classes: monkeypatch.setattr(predict, 'segment', lambda *_: np.asarray(classes, np.uint8))


def bands(width, height, *classes):
    """Upright bands of equal width, one for each class."""
    return np.repeat(np.array(classes), width // len(classes))[None].repeat(height, axis=0)


@pytest.mark.parametrize('flag, first', [('--reduce_zero_label', 1), ('--no-reduce_zero_label', 0)])
@pytest.mark.parametrize('size', [(120, 60), (31, 50), (200, 20)])  # the last: more than 4 to 1, and then padded
def test_the_labels_are_what_evaluation_predicts(tmp_path, capsys, size, flag, first):
    """Claim: put into annotations/ they are read as classes, and --eval finds each pixel as it predicts it itself."""
    checkpoint = save_segmenter(tmp_path / 's.pth', flag)
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    for kind in ('images', 'annotations'):
        (tmp_path / kind / 'validation').mkdir(parents=True)
    Image.fromarray(pixels).save(tmp_path / 'images/validation/a.png')
    run('--checkpoint', checkpoint, '--image', tmp_path / 'images/validation/a.png', '--out', tmp_path / 'o.png')
    lines = [line.split('%  ') for line in capsys.readouterr().out.splitlines() if '%' in line]
    printed = {name: float(share) for share, name in lines}
    labels = Image.open(tmp_path / 'o_labels.png')
    assert (labels.mode, labels.size) == ('L', size)
    counts = np.bincount(np.array(labels).ravel(), minlength=6)
    assert printed == {name: pytest.approx(100 * counts[k + first] / counts.sum(), abs=0.0051)
                       for k, name in enumerate(SEG_CLASSES) if counts[k + first]}
    assert list(printed.values()) == sorted(printed.values(), reverse=True) and len(printed) > 1
    words = ('--model', NAME, '--input_size', 16, '--data_path', tmp_path, flag, '--eval', '--resume', checkpoint,
             '--device', 'cpu', '--num_workers', 0, '--output_dir', tmp_path / 'run')
    for wrong in (0, 1):  # the comparison notices a single pixel
        if wrong:
            labels.putpixel((0, 0), first if labels.getpixel((0, 0)) != first else first + 1)
        labels.save(tmp_path / 'annotations/validation/a.png')
        args = specific_distill_seg.get_args_parser().parse_args([str(word) for word in words])
        stats = specific_distill_seg.main(args)
        assert (stats['test_aAcc'] == 100) is not bool(wrong)
        if not wrong:
            assert {name for name, value in stats['test_IoU'].items() if value == 100} == set(printed)


def test_the_image_is_drawn_under_the_colours_of_its_classes(segmenter, image, answer, tmp_path, capsys):
    """Claim: a pixel is half its grey value and half the colour of its class; a white line parts the classes."""
    answer(bands(120, 60, 3, 0, 3))
    run('--checkpoint', segmenter, '--image', image, '--out', tmp_path / 'o.png')
    assert capsys.readouterr().out.splitlines()[-3:] == [
        ' 66.67 %  cat', ' 33.33 %  wall', f'{tmp_path}/o.png: 2 classes; labels in {tmp_path}/o_labels.png']
    drawn, grey = pixels_of(tmp_path / 'o.png'), np.array(Image.open(image).convert('L')).astype(int)
    assert len(drawn) == 60 and drawn.shape[1] > 120
    for columns, k in ((np.s_[:39], 3), (np.s_[42:79], 0), (np.s_[82:120], 3)):
        expected = (grey[:, columns, None] + np.array(predict.class_colour(k))) / 2
        assert np.abs(drawn[:, columns] - expected).max() <= 1
    for border in (40, 80):
        white = (drawn[:, border - 1:border + 2] == 255).all((0, 2))
        assert white.any() and np.array_equal(np.array(Image.open(tmp_path / 'o_labels.png'))[0], bands(120, 1, 4, 1, 4)[0])


def test_a_class_has_one_colour_in_all_pictures():
    """Claim: pictures can be compared; the next class in the list has another hue, also where there are 150."""
    grey = Image.new('RGB', (90, 90), (100, 100, 100))
    some, more = (np.array(predict.draw_segments(grey, bands(90, 90, *found).astype(np.uint8), found, ['x'] * 9)).astype(int)
                  for found in ((7, 2), (1, 4, 7)))
    assert np.array_equal(some[50, 5], more[50, 80]) and not np.array_equal(some[50, 5], more[50, 5])
    colours = np.array([predict.class_colour(k) for k in range(150)]).astype(int)
    assert np.abs(np.diff(colours, axis=0)).max(1).min() > 80
    few = colours[:30]
    assert min(np.abs(a - b).max() for k, a in enumerate(few) for b in few[:k]) > 35


@pytest.mark.parametrize('size', [(1, 1), (8, 30), (60, 9), (128, 96), (1000, 2000)])
def test_the_legend_names_the_classes_beside_the_image(size, monkeypatch):
    """Claim: every class that is present has its colour and name, the largest first; nothing is covered or cut off."""
    written, draw = [], predict.ImageDraw.ImageDraw.text

    def text(self, at, words, fill, font, anchor):
        written.append((*at, words, font))
        draw(self, at, words, fill, font, anchor=anchor)

    monkeypatch.setattr(predict.ImageDraw.ImageDraw, 'text', text)
    prediction = np.zeros(size[::-1], np.uint8)
    present = [0, 2, 1, 3, 4] * 2
    picture = predict.draw_segments(Image.new('RGB', size, 'white'), prediction, present, [*SEG_CLASSES[:4], 'n' * 400])
    assert [words for *_, words, _ in written] == ['wall', 'grass', 'sky, cloudy', 'cat', 'n' * 32] * 2
    assert np.array_equal(np.array(picture)[:size[1], :size[0]].reshape(-1, 3).mean(0).round(),
                          (255 + np.array(predict.class_colour(0)) + 1) // 2)  # the image, and nothing over it
    last = 0
    for (x, y, words, font), k in zip(written, present):
        left, top, right, bottom = font.getbbox(words, anchor='lm')
        assert size[0] < x and x + right <= picture.width and last <= y + top and y + bottom <= picture.height
        assert picture.getpixel((size[0] + (x - size[0]) // 2, y)) == predict.class_colour(k)  # left of the name
        assert max(11, max(size) / 55) <= font.size <= max(11, max(size) / 45)
        last = y + bottom


def test_label_and_picture_are_called_after_the_image_and_may_be_drawn_again(segmenter, image, tmp_path, monkeypatch):
    """Claim: without --out both lie in the current folder, a second run replaces them, and the image stays."""
    (tmp_path / 'here').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    before = image.read_bytes()
    for _ in range(2):
        run('--checkpoint', segmenter, '--image', image)
    assert sorted(path.name for path in Path().iterdir()) == ['a_pred.png', 'a_pred_labels.png']
    assert image.read_bytes() == before
    run('--checkpoint', segmenter, '--image', image, '--out', 'o.jpg')  # labels are never a JPEG
    assert Path('o_labels.png').read_bytes() == Path('a_pred_labels.png').read_bytes()
    assert Image.open('o.jpg').format == 'JPEG' and Image.open('o.jpg').size == Image.open('a_pred.png').size


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGBA'])
def test_images_of_any_mode_are_read_as_in_evaluation(segmenter, image, tmp_path, mode):
    """Claim: grey, transparent and palette images give the labels of what specific_distill_seg.py reads from them."""
    source = Image.open(image).convert('RGB')
    source.putalpha(source.convert('L'))
    (source if mode == 'RGBA' else source.convert(mode)).save(tmp_path / 'm.png')
    pixels = specific_distill_seg.read_image(tmp_path / 'm.png')
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / 'rgb.png')
    for name in ('m', 'rgb'):
        run('--checkpoint', segmenter, '--image', tmp_path / f'{name}.png', '--out', tmp_path / f'{name}_o.png')
    assert (tmp_path / 'm_o.png').read_bytes() == (tmp_path / 'rgb_o.png').read_bytes()
    assert (tmp_path / 'm_o_labels.png').read_bytes() == (tmp_path / 'rgb_o_labels.png').read_bytes()


def test_the_program_runs_from_any_folder(segmenter, image, tmp_path):
    """Claim: the documented command works as a program; a mistake gives one line and a failing status."""
    (tmp_path / 'here').mkdir()
    for extra, status in (([], 0), (['--score', '0.1'], 1)):
        result = subprocess.run([sys.executable, predict.__file__, '--checkpoint', segmenter, '--image', image, *extra],
                                check=False, capture_output=True, text=True, cwd=tmp_path / 'here', env=environment())
        assert result.returncode == status, result.stderr
        assert len(result.stderr.splitlines()) == status
    assert sorted(path.name for path in (tmp_path / 'here').iterdir()) == ['a_pred.png', 'a_pred_labels.png']
