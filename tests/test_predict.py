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
from conftest import contents

NAME, CLASSES = 'vit_pico_patch8', ['cat', 'traffic light']
SEG_CLASSES = ['wall', 'sky, cloudy', 'grass', 'cat', 'pole']
GEOMETRY = ['--model', NAME, '--input_size', '64', '--window_size', '4', '--fpn_dim', '16', '--head_dim',
            '32', '--anchor_size', '8', '--proposals', '20']


def run(*words):
    predict.main(predict.get_args_parser().parse_args([str(word) for word in words]))


def printed(capsys):
    """The printed lines, without that of the loaded weights."""
    return capsys.readouterr().out.splitlines()[1:]


def save_noise(path, size, seed=0):
    """A noisy image file of size (width, height)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def drawn(monkeypatch):
    """The pictures in the last file that was written, (height, width, 3), and their captions."""
    panels, save_grid = [], predict.save_grid

    def note(out, shown, columns, legend):
        panels[:] = [(picture.permute(1, 2, 0).numpy().astype(int), caption) for picture, caption in shown]
        save_grid(out, shown, columns, legend)

    monkeypatch.setattr(predict, 'save_grid', note)
    return panels


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
    return save_noise(tmp_path / 'a.png', (120, 60))


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
    run('--checkpoint', path, '--images', image, '--topk', 2)
    top = expected.argsort(descending=True)[:2].tolist()
    lines = [line.split(' %  ') for line in printed(capsys)]
    assert [name for _, name in lines] == [('cat', 'dog', 'owl')[k] for k in top]
    assert [float(share) for share, _ in lines] == pytest.approx((100 * expected[top]).tolist(), abs=0.006)


def test_a_public_file_needs_the_name_of_its_network(image, tmp_path, capsys):
    """Public classifiers can be tried by --model; class numbers stand for names."""
    torch.save(models.create_vit(NAME, 4, 16).state_dict(), tmp_path / 'public.pth')
    words = '--checkpoint', tmp_path / 'public.pth', '--images', image
    with pytest.raises(SystemExit, match='give --model'):
        run(*words)
    run(*words, '--model', NAME, '--input_size', 16)
    lines = printed(capsys)
    assert sorted(line.split('%')[1].strip() for line in lines) == [f'class {k}' for k in range(4)]
    assert sum(float(line.split('%')[0]) for line in lines) == pytest.approx(100, abs=0.03)


# ---- detection -----------------------------------------------------------------------------------


@pytest.mark.parametrize('size, zoom', [((120, 60), 5), ((1280, 640), 0.5)])
def test_a_detection_is_in_the_pixels_of_the_image(detector, answer, drawn, tmp_path, capsys, size, zoom):
    """Boxes and masks go back to the original size; pictures show it larger or smaller, names beside."""
    image = save_noise(tmp_path / 'a.png', size)
    seen = answer((0.875, 2, (8, 8, 24, 24)))  # of 64 x 32 pixels
    run('--checkpoint', detector, '--images', image, '--out', tmp_path / 'o.png')
    line, last, _ = printed(capsys)
    box = [f'{value * size[0] / 64:.1f}' for value in (8, 8, 24, 24)]
    assert line.split() == ['0.875', 'traffic', 'light', *box] and '1 object' in last
    pixels = v2.functional.pil_to_tensor(Image.open(image))
    assert len(seen) == 1
    assert torch.equal(seen[0], v2.functional.resize(pixels, [32, 64], antialias=True))
    (before, name), (after, _) = drawn
    assert before.shape == after.shape == (size[1] * zoom, size[0] * zoom, 3) and name == 'a.png'
    if zoom == 5:
        assert np.array_equal(before, np.array(Image.open(image)).repeat(5, axis=0).repeat(5, axis=1))
    changed, unit = (before != after).any(-1), size[0] * zoom / 64
    part = [round(unit * place) for place in (8.5, 15.5, 16.5, 23.5)]
    assert changed[part[0]:part[1], part[0]:part[3]].mean() > 0.98  # the upper half of the box is in the mask
    assert not changed[part[2]:part[3], part[0]:part[3]].any()  # the lower half is not
    # nothing beside the object and its name
    assert not changed[round(24.5 * unit):].any() and not changed[part[0]:, round(24.5 * unit):].any()
    file = np.array(Image.open(tmp_path / 'o.png').convert('RGB')).astype(int)
    places = np.argwhere((file[:60, :40] == before[0, 0]).all(-1))  # the pictures are in the file as they are
    parts = [file[y:y + len(before), x:x + before.shape[1]] for y, x in places]
    assert any(np.array_equal(part, before) for part in parts)


def test_the_ground_truth_is_drawn_beside(detector, answer, drawn, tmp_path, capsys):
    """Polygons and run lengths of the image with that name, in the colours of their classes; no crowds."""
    (tmp_path / 'val').mkdir()
    save_noise(tmp_path / 'val/a.png', (128, 64), 1)
    # down the columns, lengths of runs outside and inside: 60 columns, then 20 with rows 20 to 29 inside
    runs = {'size': [64, 128], 'counts': [60 * 64 + 20, *[10, 54] * 19, 10, 34 + 48 * 64]}
    shapes = [(5, 4, 0, [20, 20, 20, 20], [[20, 20, 40, 20, 40, 30, 20, 30]]),
              (5, 9, 0, [60, 20, 20, 20], runs),
              (5, 9, 1, [90, 40, 30, 20], [[90, 40, 120, 40, 120, 60]]),
              (6, 9, 0, [90, 5, 20, 20], [[90, 5, 110, 5, 110, 25]])]
    names = 'image_id', 'category_id', 'iscrowd', 'bbox', 'segmentation'
    images = [{'id': 5, 'file_name': 'val/a.png', 'width': 128, 'height': 64},
              {'id': 6, 'file_name': 'val/b.png', 'width': 128, 'height': 64}]
    content = {'images': images, 'annotations': [dict(zip(names, shape)) for shape in shapes],
               'categories': [{'id': 9, 'name': 'traffic light'}, {'id': 4, 'name': 'cat'}]}
    (tmp_path / 'val.json').write_text(json.dumps(content))
    answer((0.9, 1, (10, 10, 20, 20)), (0.8, 2, (30, 10, 40, 20)))  # of 64 x 32 pixels
    run('--checkpoint', detector, '--images', tmp_path / 'val/a.png', '--out', tmp_path / 'o.png',
        '--annotations', tmp_path / 'val.json')
    (truth, name), (found, _) = drawn
    assert name == 'a.png, ground truth'
    image = np.array(Image.open(tmp_path / 'val/a.png')).repeat(5, axis=0).repeat(5, axis=1)
    changed = (truth != image).any(-1)
    cat, light = np.s_[105:145, 105:195], np.s_[105:145, 305:395]
    assert changed[cat].mean() > 0.98 and changed[light].mean() > 0.98
    assert not changed[155:195, 105:195].any() and not changed[155:195, 305:395].any()  # below the masks
    assert not changed[:, 450:].any() and not changed[210:].any()  # neither a crowd nor the other image's
    # where masks are the same, so are the pictures: a class has one colour
    assert np.array_equal(truth[cat], found[cat]) and np.array_equal(truth[light], found[light])
    with pytest.raises(SystemExit, match='lists 0 images'):
        run('--checkpoint', detector, '--images', save_noise(tmp_path / 'a.png', (128, 64)), '--annotations',
            tmp_path / 'val.json', '--out', tmp_path / 'o.png')


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
    run('--checkpoint', detector, '--images', image, '--out', tmp_path / 'o.png', '--score', 0)
    assert printed(capsys)[:-2] == expected and len(expected) > 2


def test_objects_come_best_first_and_only_from_the_score_on(detector, image, answer, drawn, tmp_path, capsys):
    """--score is the smallest score that is printed and drawn; the best is named where none is left."""
    answer((0.4, 1, (40, 8, 60, 24)), (0.9, 2, (4, 8, 20, 24)), (0.3, 1, (4, 8, 20, 24)))
    for score, shown in ((0.5, ['0.900']), (0.35, ['0.900', '0.400']), (0.95, [])):
        run('--checkpoint', detector, '--images', image, '--out', tmp_path / 'o.png', '--score', score)
        *lines, last, _ = printed(capsys)
        assert [line.split()[0] for line in lines] == shown and last.endswith('the best has 0.900')
        changed = (drawn[0][0] != drawn[1][0]).any(-1)
        assert changed[100:120, 400:550].all() == (len(shown) == 2)  # in the mask of the object of score 0.4
        assert changed.any() == bool(shown)


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
    run('--checkpoint', checkpoint, '--images', path)
    labels = Image.open(tmp_path / 'a_pred_labels/a.png')
    assert (labels.mode, labels.size) == ('L', size) and Image.open(tmp_path / 'a_pred.png').width > 640
    counts = np.bincount(np.array(labels).ravel(), minlength=6)[first:]
    lines = [line.split(' %  ') for line in printed(capsys)[:-2]]
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


def test_the_image_is_drawn_under_the_colours_of_its_classes(image):
    """A pixel is half its grey value and half the colour of its class; where that is ignored it is grey."""
    pixels = Image.open(image)
    labels = np.repeat(np.array([3, 0, 255], np.uint8), 40)[None].repeat(60, axis=0)
    palette = [predict.class_colour(k) for k in range(5)]
    assert np.abs(np.subtract(palette[3], palette[0])).max() > 50
    picture = predict.draw_labels(v2.functional.pil_to_tensor(pixels), torch.from_numpy(labels), palette)
    grey = np.array(pixels.convert('L')).astype(int)[:, :, None].repeat(3, axis=2)
    expected = grey.copy()
    for k in (3, 0):
        expected[labels == k] = (grey[labels == k] + palette[k]) // 2
    expected = expected.repeat(5, axis=0).repeat(5, axis=1)
    assert np.abs(picture.permute(1, 2, 0).numpy() - expected).max() <= 1


@pytest.mark.parametrize('flag', ['--reduce_zero_label', '--no-reduce_zero_label'])
def test_labels_that_are_given_back_as_ground_truth_give_the_same_picture(tmp_path, drawn, capsys, flag):
    """Of a folder of images as of one; a legend names the classes of both sides."""
    checkpoint = save_segmenter(tmp_path / 's.pth', flag)
    for name in ('b.png', 'a.jpg'):
        (tmp_path / 'images').mkdir(exist_ok=True)
        save_noise(tmp_path / 'images' / name, (40, 30))
    words = '--checkpoint', checkpoint, '--images'
    run(*words, tmp_path / 'images', '--out', tmp_path / 'new/o.png')
    names = [file.name for file in sorted((tmp_path / 'new/o_labels').iterdir())]
    assert names == ['a.png', 'b.png'] and [caption for _, caption in drawn[::2]] == ['a.jpg', 'b.png']
    for given, labels in (('images', 'new/o_labels'), ('images/b.png', 'new/o_labels')):
        run(*words, tmp_path / given, '--annotations', tmp_path / labels, '--out', tmp_path / 'p.png')
        for (truth, caption), (found, _) in zip(drawn[::2], drawn[1::2]):
            assert np.array_equal(truth, found) and caption.endswith('ground truth')
    width = Image.open(tmp_path / 'p.png').width
    Image.new('L', (40, 30), 1).save(tmp_path / 'b.png')
    run(*words, tmp_path / 'images/b.png', '--annotations', tmp_path, '--out', tmp_path / 'p.png')
    assert not np.array_equal(drawn[0][0], drawn[1][0])
    # from 0 it is the sky, which is not predicted and widens the legend
    assert (Image.open(tmp_path / 'p.png').width > width) == (flag == '--no-reduce_zero_label')


# ---- files ---------------------------------------------------------------------------------------


def test_an_image_is_turned_as_viewers_do(detector, tmp_path, drawn, monkeypatch, capsys):
    """EXIF orientation 6 and 3: what is printed and drawn is that of the upright image, by every network."""
    upright = Image.open(save_noise(tmp_path / 'upright.png', (60, 40)))
    for tag, turn in ((6, Image.Transpose.ROTATE_90), (3, Image.Transpose.ROTATE_180)):
        exif = Image.Exif()
        exif[0x0112] = tag
        upright.transpose(turn).save(tmp_path / f'{tag}.png', exif=exif)
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / 'no.png')
    torch.manual_seed(0)
    classifier = models.create_vit(NAME, 3, 16)
    torch.nn.init.normal_(classifier.head.weight)
    save(tmp_path / 'c.pth', classifier, ['cat', 'dog', 'owl'], model=NAME, input_size=[16, 16])
    save_segmenter(tmp_path / 's.pth')
    monkeypatch.setattr(predict, 'SIDE', 64)  # sooner drawn
    for network in ('c.pth', 'd.pth', 's.pth'):
        answers = []
        for name in ('upright', '6', '3', 'no'):
            drawn.clear()
            out = ['--out', tmp_path / 'o.png'] * (network != 'c.pth')
            run('--checkpoint', tmp_path / network, '--images', tmp_path / f'{name}.png', *out, '--score', 0)
            pictures = [picture.tobytes() for picture, _ in drawn]
            lines = [line for line in printed(capsys) if not line.startswith('labels: ')]
            answers.append((lines, pictures))
        assert answers[0] == answers[1] == answers[2] != answers[3]


def test_ground_truth_of_the_stored_pixels_keeps_the_image_as_stored(detector, tmp_path, drawn, capsys):
    """The size in the annotations tells whether they were made before or after the image was turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.open(save_noise(tmp_path / 'n.png', (60, 40)))
    stored.save(tmp_path / 'a.png', exif=exif)
    categories = [{'id': k, 'name': name} for k, name in enumerate(CLASSES)]
    shapes = []
    for width, height in ((60, 40), (40, 60), (50, 50)):
        content = {'images': [{'id': 1, 'file_name': 'a.png', 'width': width, 'height': height}],
                   'categories': categories, 'annotations': []}
        (tmp_path / 'a.json').write_text(json.dumps(content))
        words = ['--checkpoint', detector, '--images', tmp_path / 'a.png', '--annotations',
                 tmp_path / 'a.json', '--out', tmp_path / 'o.png']
        if width == height:
            with pytest.raises(models.DataError, match='annotations say 50 and 50'):
                run(*words)
        else:
            run(*words)
            shapes.append(drawn[0][0].shape[:2])
    assert shapes == [(400, 600), (600, 400)]


def test_images_of_a_folder_are_seen_one_by_one(detector, answer, tmp_path, drawn, monkeypatch, capsys):
    """By name, each line with the file before it; what is no image is left out, a picture has 16 rows."""
    (tmp_path / 'images').mkdir()
    for k in range(17):
        save_noise(tmp_path / f'images/{k:02}.png', (16, 16), k)
    (tmp_path / 'images/notes.txt').write_text('no image')
    answer((0.8, 1, (10, 10, 50, 50)))
    monkeypatch.setattr(predict, 'SIDE', 64)  # sooner drawn
    run('--checkpoint', detector, '--images', tmp_path / 'images', '--out', tmp_path / 'o.png')
    *lines, last = printed(capsys)
    assert lines[::2] == [f'{tmp_path}/images/{k:02}.png: 0.800  cat  2.5 2.5 12.5 12.5' for k in range(17)]
    captions = [caption for _, caption in drawn]
    assert captions[::2] == [f'{k:02}.png' for k in range(16)] and '16 of 17 images' in last
    assert len({picture.tobytes() for picture, _ in drawn[::2]}) == 16


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize('words, error, message', [
    ('d.pth --images d.pth', models.DataError, 'cannot read d.pth'),
    ('gone.pth --images a.png', SystemExit, 'no checkpoint file'),
    ('mae.pth --images a.png', SystemExit, 'holds no classifier'),
    ('theirs.pth --images a.png', SystemExit, 'no flags and classes'),
    ('c.pth --images a.png --out o.png', SystemExit, 'draws no picture'),
    ('d.pth --images a.png --out a.png', SystemExit, 'is one of the images'),
    ('d.pth --images a.png --out folder', SystemExit, 'ends in .png'),
    ('d.pth --images folder', SystemExit, 'holds no images'),
    ('d.pth --images a.png --annotations other.json', SystemExit, 'trained on 2 classes'),
    ('s.pth --images a.png --annotations gone', models.DataError, 'cannot read gone/a.png'),
    ('s.pth --images b.jpg --annotations c_labels --out c.png', SystemExit, 'images or annotations'),
    ('s.pth --images b.jpg b.jpg', SystemExit, 'the same name')])
def test_mistakes_end_in_one_line_and_change_no_file(
        detector, image, tmp_path, monkeypatch, words, error, message):
    """What is wrong is said in one line; detectors of torchvision have the same names and are refused."""
    mae = models.create_mae('mae_vit_pico_patch8', 16)
    save(tmp_path / 'mae.pth', mae, None, model='mae_vit_pico_patch8', input_size=[16, 16])
    save(tmp_path / 'c.pth', models.create_vit(NAME, 3, 16), ['a', 'b', 'c'], model=NAME, input_size=[16, 16])
    save_segmenter(tmp_path / 's.pth')
    torch.save(torch.load(detector)['model'], tmp_path / 'theirs.pth')
    (tmp_path / 'other.json').write_text('{"images": [], "annotations": [], "categories": []}')
    (tmp_path / 'folder').mkdir()
    save_noise(tmp_path / 'b.jpg', (120, 60))
    (tmp_path / 'c_labels').mkdir()
    Image.new('L', (120, 60)).save(tmp_path / 'c_labels/b.png')
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        run('--checkpoint', *words.split())
    assert message in str(caught.value) and '\n' not in str(caught.value)
    assert contents(tmp_path) == before
