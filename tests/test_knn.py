"""tools/knn.py: votes against a plain loop, features against timm's own network."""
import math

import knn
import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch.nn.functional import normalize

import models

MEAN, STD = torch.tensor([[[0.485]], [[0.456]], [[0.406]]]), torch.tensor([[[0.229]], [[0.224]], [[0.225]]])


def vote_by_loop(train, train_labels, x, k, tau):
    """The label with the largest sum of exp(cosine / tau) over the k nearest, in plain Python."""
    cosines = [sum(a * b for a, b in zip(x, y)) for y in train.tolist()]
    votes = {}
    for cosine, label in sorted(zip(cosines, train_labels.tolist()), reverse=True)[:k]:
        votes[label] = votes.get(label, 0) + math.exp(cosine / tau)
    return max(votes, key=votes.get)


@pytest.mark.parametrize('k, tau', [(1, 0.07), (5, 1.0), (200, 0.2)])
def test_accuracy_is_that_of_a_plain_loop(k, tau):
    """The neighbours' votes are weighted; more neighbours than images are all images."""
    generator = torch.Generator().manual_seed(k)
    train = normalize(torch.randn(60, 6, generator=generator, dtype=torch.float64), dim=1)
    test = normalize(torch.randn(37, 6, generator=generator, dtype=torch.float64), dim=1)
    train_labels, test_labels = (torch.randint(4, (n,), generator=generator) for n in (60, 37))
    answers = [vote_by_loop(train, train_labels, x, k, tau) for x in test.tolist()]
    right = sum(answer == label for answer, label in zip(answers, test_labels.tolist()))
    assert 0 < right < 37
    assert knn.knn_accuracy(train, train_labels, test, test_labels, k, tau) == pytest.approx(100 * right / 37)


def test_many_test_images_are_counted_once_each():
    """Test images come in parts of 1,000; none is lost or counted twice."""
    test = normalize(torch.randn(2345, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = torch.arange(2345) % 5
    shifted = torch.where(torch.arange(2345) < 469, (labels + 1) % 5, labels)
    assert knn.knn_accuracy(test, labels, test, labels, k=1) == 100
    assert knn.knn_accuracy(test, labels, test, shifted, k=1) == pytest.approx(80)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Two classes, dark and light, in train/ and val/, and three checkpoints of a stage-1 student."""
    home, rng = tmp_path_factory.mktemp('knn'), np.random.default_rng(0)
    for split, count in (('train', 6), ('val', 3)):
        for label, level in (('dark', 40), ('light', 200)):
            (home / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = (level + rng.integers(-30, 30, (20, 20, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(home / split / label / f'{index}.png')
    for epoch in (9, 0, 4):
        torch.manual_seed(epoch)
        model = models.create_mae('mae_vit_pico_patch8_dec32d2b', 16, target_dim=64)
        args = {'model': 'mae_vit_pico_patch8_dec32d2b', 'input_size': [16, 16]}
        torch.save({'model': model.state_dict(), 'epoch': epoch, 'args': args}, home / f'c{epoch}.pth')
    torch.save(model.state_dict(), home / 'bare.pth')
    return home


def run(*words):
    knn.main(knn.get_args_parser().parse_args([str(word) for word in words]))


def test_lines_come_in_the_order_of_epochs(folder, capsys):
    """A line per checkpoint, so that the trend can be seen; what is compared is said, and chance."""
    paths = [folder / f'c{epoch}.pth' for epoch in (9, 0, 4)]
    run('--data_path', folder, '--k', 3, '--per_class', 4, '--checkpoint', *paths)
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith('start weights')]
    # dark and light are easy even for random weights
    assert lines[:3] == [f'epoch {n}: k-NN top-1 100.00 %  {folder}/c{n}.pth' for n in (0, 4, 9)]
    assert lines[3] == ('3 neighbours among 8 training images, 6 test images, 2 classes: chance is 50.00 %')


def test_a_file_without_flags_needs_the_name_of_its_network(folder, capsys):
    """Other encoders work with --model; their epoch is not known."""
    words = '--data_path', folder, '--checkpoint', folder / 'bare.pth'
    with pytest.raises(SystemExit, match='give --model'):
        run(*words)
    run(*words, '--model', 'vit_pico_patch8', '--input_size', 16)
    assert 'epoch unknown: k-NN top-1 100.00 %' in capsys.readouterr().out


def test_features_are_the_mean_patch_tokens_of_the_encoder(folder):
    """After the final norm, without the class token; timm's network on the same weights is the judge."""
    model, epoch = knn.load_encoder(folder / 'c4.pth')
    theirs = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    state = torch.load(folder / 'c4.pth', weights_only=True)['model']
    theirs.load_state_dict({name: state[name] for name in theirs.state_dict()})
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    words = '--checkpoint x --data_path x --batch_size 2 --device cpu'
    args = knn.get_args_parser().parse_args(words.split())
    features, labels = knn.encode(model, list(zip(images, [3, 1, 4, 1, 5])), args)
    with torch.no_grad():
        expected = theirs.eval().forward_features((images / 255 - MEAN) / STD)[:, 1:].mean(1)
    torch.testing.assert_close(features, normalize(expected, dim=1))
    assert labels.tolist() == [3, 1, 4, 1, 5] and epoch == 4
