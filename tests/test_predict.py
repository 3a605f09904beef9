"""tools/predict.py against answers set by hand, and against what the scripts' own evaluation counts."""
import json

import numpy as np
import predict
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torchvision import transforms
from torchvision.transforms import v2

import models
import specific_distill_det
import specific_distill_seg

NAME, CLASSES = 'vit_pico_patch8', ['cat', 'traffic light']
SEG_CLASSES = ['wall', 'sky, cloudy', 'grass', 'cat', 'pole']
GEOMETRY = ['--model', NAME, '--input_size', '64', '--window_size', '4', '--fpn_dim', '16', '--head_dim',
            '32', '--anchor_size', '8', '--proposals', '20']


def run(*words):
    predict.main(predict.get_args_parser().parse_args([str(word) for word in words]))


def printed(capsys):
    """The printed lines, without that of the loaded weights."""
    return capsys.readouterr().out.splitlines()[1:]


def pixels_of(path):
    return np.array(Image.open(path).convert('RGB')).astype(int)


def save(path, network, classes, **args):
    """A checkpoint as far as it is read: weights, class names, flags."""
    torch.save({'model': network.state_dict(), 'classes': classes, 'args': args}, path)
    return path


@pytest.fixture
def detector(tmp_path):
    """A detector's file of random weights and two classes."""
    args = specific_distill_det.get_args_parser().parse_args(GEOMETRY)
    args.input_size = [64, 64]
    torch.manual_seed(0)
    model = specific_distill_det.Detector(NAME, len(CLASSES), args)
    return save(tmp_path / 'd.pth', model, CLASSES, **vars(args))


@pytest.fixture
def image(tmp_path):
    """A noisy image, 120 wide and 60 high: a detector sees it 64 x 32, at 8/15 of its size."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    return tmp_path / 'a.png'


def save_segmenter(path, *flags):
    """A segmentation network's file; its answers vary over the image."""
    args = specific_distill_seg.get_args_parser().parse_args(['--model', NAME, *flags])
    args.input_size = [16, 16]
    torch.manual_seed(0)
    model = specific_distill_seg.Segmenter(NAME, len(SEG_CLASSES), 16)
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    return save(path, model, SEG_CLASSES, **vars(args))


@pytest.fixture
def answer(monkeypatch):
    """answer((score, label, xyxy in pixels that the network sees), ...) is what every detector says.

    Masks fill the upper half of their boxes. Returns the list of the images that it is shown.
    """
    def replace(*found):
        masks = torch.zeros(len(found), 1, 28, 28)
        masks[:, :, :14] = 1
        scores, labels, boxes = zip(*found) if found else ([], [], [])
        seen = []

        def forward(self, images, targets=None):
            assert not self.training and not torch.is_grad_enabled() and targets is None
            seen.extend(images)
            return [{'boxes': torch.tensor(boxes).float().reshape(-1, 4), 'masks': masks,
                     'labels': torch.tensor(labels, dtype=torch.int64), 'scores': torch.tensor(scores)}]

        monkeypatch.setattr(specific_distill_det.Detector, 'forward', forward)
        return seen
    return replace


# ---- classification ------------------------------------------------------------------------------


def test_probabilities_equal_a_computation_by_hand(image, tmp_path, capsys):
    """An image is seen exactly as in evaluation: resized by 256/224, bicubic, centre crop."""
    model = models.create_vit(NAME, 3, 56).eval()
    torch.nn.init.normal_(model.head.weight)
    path = save(tmp_path / 'c.pth', model, ['cat', 'dog', 'owl'], model=NAME, input_size=[56, 56])
    by_hand = VisionTransformer(img_size=56, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3)
    by_hand.load_state_dict(model.state_dict())
    prepare = transforms.Compose([
        transforms.Resize(64, interpolation=transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(56),
        transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])])
    with torch.no_grad():
        expected = by_hand.eval()(prepare(Image.open(image))[None]).softmax(1)[0]
    run('--checkpoint', path, '--image', image, '--topk', 2)
    top = expected.argsort(descending=True)[:2].tolist()
    lines = [line.split(' %  ') for line in printed(capsys)]
    assert [name for _, name in lines] == [('cat', 'dog', 'owl')[k] for k in top]
    assert [float(share) for share, _ in lines] == pytest.approx((100 * expected[top]).tolist(), abs=0.006)


def test_a_public_file_needs_the_name_of_its_network(image, tmp_path, capsys):
    """Public classifiers can be tried by --model; class numbers stand for names."""
    torch.save(models.create_vit(NAME, 4, 16).state_dict(), tmp_path / 'public.pth')
    words = '--checkpoint', tmp_path / 'public.pth', '--image', image
    with pytest.raises(SystemExit, match='give --model'):
        run(*words)
    run(*words, '--model', NAME, '--input_size', 16)
    lines = printed(capsys)
    assert sorted(line.split('%')[1].strip() for line in lines) == [f'class {k}' for k in range(4)]
    assert sum(float(line.split('%')[0]) for line in lines) == pytest.approx(100, abs=0.03)


# ---- detection -----------------------------------------------------------------------------------


def test_a_detection_is_in_the_pixels_of_the_image(detector, image, answer, tmp_path, capsys):
    """Boxes and masks go back to the original size; what is seen is the long side at the input size."""
    seen = answer((0.875, 2, (8, 8, 24, 24)))  # in the image: 15 to 45, times 15/8
    run('--checkpoint', detector, '--image', image, '--out', tmp_path / 'o.png')
    line, last = printed(capsys)
    assert line.split() == ['0.875', 'traffic', 'light', '15.0', '15.0', '45.0', '45.0'] and '1 object' in last
    expected = v2.functional.pil_to_tensor(Image.open(image))
    expected = v2.functional.resize(expected, [32, 64], antialias=True)
    assert len(seen) == 1 and torch.equal(seen[0], expected)
    before, after = pixels_of(image), pixels_of(tmp_path / 'o.png')
    changed = (before != after).any(-1)
    assert changed[17:29, 17:43].mean() > 0.98  # the upper half of the box is in the mask
    assert not changed[31:43, 17:43].any()  # the lower half is not
    assert not changed[48:].any() and not changed[20:, 48:].any()  # nothing beside the object and its label


def test_what_is_printed_is_what_evaluation_counts(detector, image, tmp_path, monkeypatch, capsys):
    """Of a real network, scores, classes and boxes are those that --eval writes with --results_json."""
    content = {'images': [{'id': 5, 'file_name': 'a.png', 'width': 120, 'height': 60}],
               'categories': [{'id': 9, 'name': 'traffic light'}, {'id': 4, 'name': 'cat'}],
               'annotations': [{'id': 1, 'image_id': 5, 'category_id': 9, 'bbox': [1, 1, 9, 9],
                                'segmentation': [[1, 1, 10, 1, 10, 10]]}]}
    (tmp_path / 'val.json').write_text(json.dumps(content))
    words = ['--eval', '--resume', detector, '--val_annotations', tmp_path / 'val.json', '--val_images',
             tmp_path, '--results_json', tmp_path / 'results.json', '--device', 'cpu', '--num_workers', 0]
    monkeypatch.setattr('sys.argv', ['specific_distill_det.py', *map(str, words)])
    specific_distill_det.main(specific_distill_det.parse_args(specific_distill_det.get_args_parser()))
    expected = []
    for entry in json.loads((tmp_path / 'results.json').read_text()):
        x, y, width, height = entry['bbox']
        name = {9: 'traffic light', 4: 'cat'}[entry['category_id']]
        expected.append(f'{entry["score"]:.3f}  {name}  {x:.1f} {y:.1f} {x + width:.1f} {y + height:.1f}')
    capsys.readouterr()
    run('--checkpoint', detector, '--image', image, '--out', tmp_path / 'o.png', '--score', 0)
    assert printed(capsys)[:-1] == expected and len(expected) > 2


def test_objects_come_best_first_and_only_from_the_score_on(detector, image, answer, tmp_path, capsys):
    """--score is the smallest score that is printed and drawn; the best is named where none is left."""
    answer((0.4, 1, (40, 8, 60, 24)), (0.9, 2, (4, 8, 20, 24)), (0.3, 1, (4, 8, 20, 24)))
    for score, shown in ((0.5, ['0.900']), (0.35, ['0.900', '0.400']), (0.95, [])):
        run('--checkpoint', detector, '--image', image, '--out', tmp_path / 'o.png', '--score', score)
        *lines, last = printed(capsys)
        assert [line.split()[0] for line in lines] == shown and last.endswith('the best has 0.900')
        drawn = (pixels_of(tmp_path / 'o.png') != pixels_of(image)).any(-1)
        assert drawn[20:24, 80:110].all() == (len(shown) == 2)  # in the mask of the object of score 0.4
        assert drawn.any() == bool(shown)


# ---- segmentation --------------------------------------------------------------------------------


@pytest.mark.parametrize('flag, first, size', [
    ('--reduce_zero_label', 1, (120, 60)), ('--no-reduce_zero_label', 0, (31, 50)),
    ('--reduce_zero_label', 1, (200, 20))])  # the last: more than 4 to 1, and then padded
def test_the_labels_are_what_evaluation_predicts(tmp_path, monkeypatch, capsys, flag, first, size):
    """Put into annotations/, --eval reads them as classes, and finds each pixel as it predicts it."""
    checkpoint = save_segmenter(tmp_path / 's.pth', flag)
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    for kind in ('images', 'annotations'):
        (tmp_path / kind / 'validation').mkdir(parents=True)
    path = tmp_path / 'images/validation/a.png'
    Image.fromarray(pixels).save(path)
    monkeypatch.chdir(tmp_path)
    run('--checkpoint', checkpoint, '--image', path)
    labels = Image.open(tmp_path / 'a_pred_labels.png')
    assert (labels.mode, labels.size) == ('L', size) and Image.open(tmp_path / 'a_pred.png').width > size[0]
    counts = np.bincount(np.array(labels).ravel(), minlength=6)[first:]
    lines = [line.split(' %  ') for line in printed(capsys)[:-1]]
    shares = {name: float(share) for share, name in lines}
    assert list(shares.values()) == sorted(shares.values(), reverse=True) and len(shares) > 1
    for name, count in zip(SEG_CLASSES, counts):
        assert shares.get(name, 0) == pytest.approx(100 * count / counts.sum(), abs=0.0051)

    words = ['--data_path', tmp_path, '--eval', '--resume', checkpoint, '--device', 'cpu', '--num_workers', 0]
    monkeypatch.setattr('sys.argv', ['specific_distill_seg.py', *map(str, words)])
    args = specific_distill_seg.parse_args(specific_distill_seg.get_args_parser())
    evaluate, stats = specific_distill_seg.evaluate, []
    monkeypatch.setattr(specific_distill_seg, 'evaluate', lambda *given: stats.append(evaluate(*given)))
    for wrong in (False, True):  # a single pixel is noticed
        if wrong:
            labels.putpixel((0, 0), first if labels.getpixel((0, 0)) != first else first + 1)
        labels.save(tmp_path / 'annotations/validation/a.png')
        specific_distill_seg.main(args)
        assert (stats[-1]['test_aAcc'] == 100) is not wrong


def test_the_image_is_drawn_under_the_colours_of_its_classes(image, tmp_path, monkeypatch):
    """A pixel is half its grey value and half the colour of its class, in grey as in colour images."""
    checkpoint = save_segmenter(tmp_path / 's.pth')
    prediction = np.repeat(np.array([3, 0], np.uint8), 60)[None].repeat(60, axis=0)
    monkeypatch.setattr(predict, 'segment', lambda *_: prediction)
    grey = np.array(Image.open(image).convert('L')).astype(int)
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / 'grey.png')
    for path in (image, tmp_path / 'grey.png'):
        run('--checkpoint', checkpoint, '--image', path, '--out', tmp_path / 'o.png')
        colours = np.array([predict.class_colour(k) for k in range(5)])[prediction]
        drawn = pixels_of(tmp_path / 'o.png')[:60, :120]
        assert np.abs(drawn - (grey[:, :, None] + colours) / 2).max() <= 1
        assert np.abs(np.subtract(predict.class_colour(3), predict.class_colour(0))).max() > 50


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize('words, message', [
    (['--checkpoint', 'd.pth', '--image', 'd.pth'], 'cannot read d.pth'),
    (['--checkpoint', 'gone.pth', '--image', 'a.png'], 'no checkpoint file'),
    (['--checkpoint', 'mae.pth', '--image', 'a.png'], 'holds no classifier'),
    (['--checkpoint', 'theirs.pth', '--image', 'a.png'], 'no flags and classes'),
    (['--checkpoint', 'd.pth', '--image', 'a.png', '--out', 'a.png'], 'is one of the images')])
def test_mistakes_end_in_one_line_and_change_no_file(detector, image, tmp_path, monkeypatch, words, message):
    """What is wrong is said in one line; detectors of torchvision have the same names and are refused."""
    mae = models.create_mae('mae_vit_pico_patch8', 16)
    save(tmp_path / 'mae.pth', mae, None, model='mae_vit_pico_patch8', input_size=[16, 16])
    torch.save(torch.load(detector)['model'], tmp_path / 'theirs.pth')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        run(*words)
    assert message in error.value.code and '\n' not in error.value.code
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
