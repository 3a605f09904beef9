"""tools/knn.py: votes against a plain loop and by hand, features against timm's own network, the order of its lines."""
import math

import knn
import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import models


def vote_by_loop(train, train_labels, test, k, tau):
    """The label with the largest sum of exp(cosine / tau) over the k nearest, in plain Python."""
    answers = []
    for x in test.tolist():
        near = sorted(((sum(a * b for a, b in zip(x, y)), label) for y, label in zip(train.tolist(), train_labels.tolist())),
                      reverse=True)[:k]
        votes = {}
        for cosine, label in near:
            votes[label] = votes.get(label, 0) + math.exp(cosine / tau)
        answers.append(max(votes, key=votes.get))
    return answers


@pytest.mark.parametrize('k, tau', [(1, 0.07), (5, 0.07), (5, 1.0), (60, 0.07), (200, 0.2)])
def test_accuracy_is_that_of_a_plain_loop(k, tau):
    """README: the neighbours' votes are weighted; more neighbours than images are all images."""
    generator = torch.Generator().manual_seed(k)
    train, test = (torch.nn.functional.normalize(torch.randn(n, 6, generator=generator, dtype=torch.float64), dim=1)
                   for n in (60, 37))
    train_labels, test_labels = (torch.randint(4, (n,), generator=generator) for n in (60, 37))
    answers = vote_by_loop(train, train_labels, test, k, tau)
    right = sum(answer == label for answer, label in zip(answers, test_labels.tolist()))
    assert 0 < right < 37
    assert knn.knn_accuracy(train, train_labels, test, test_labels, k, tau) == pytest.approx(100 * right / 37)


def test_one_near_neighbour_outvotes_two_far_ones():
    """A vote weighs exp(cosine / tau): by hand, exp(1 / 0.07) against 2 exp(0.6 / 0.07)."""
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8]])
    test = torch.tensor([[1.0, 0.0]])
    assert knn.knn_accuracy(train, torch.tensor([0, 1, 1]), test, torch.tensor([0]), k=3) == 100
    assert knn.knn_accuracy(train, torch.tensor([0, 1, 1]), test, torch.tensor([0]), k=3, tau=10.0) == 0


def test_many_test_images_are_counted_once_each():
    """Test images come in parts of 1,000; none is lost or counted twice."""
    test = torch.nn.functional.normalize(torch.randn(2345, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = torch.arange(2345) % 5
    assert knn.knn_accuracy(test, labels, test, labels, k=1) == 100
    labels_of_others = labels.clone()
    labels_of_others[:469] = (labels[:469] + 1) % 5
    assert knn.knn_accuracy(test, labels, test, labels_of_others, k=1) == pytest.approx(80, abs=0.1)


def test_the_first_images_of_each_class_are_compared_with():
    """--per_class: so many of each class, or all that there are, in the order of the folder."""
    targets = [0, 0, 0, 1, 2, 2, 0, 2]
    assert knn.first_of_each(targets, 2) == [0, 1, 3, 4, 5]
    assert knn.first_of_each(targets, None) == list(range(8))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Two classes, dark and light, in train/ and val/, and three checkpoints of a stage-1 student."""
    home = tmp_path_factory.mktemp('knn')
    rng = np.random.default_rng(0)
    for split, count in (('train', 6), ('val', 3)):
        for label, level in (('dark', 40), ('light', 200)):
            (home / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = (level + rng.integers(-30, 30, (20, 20, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(home / split / label / f'{index}.png')
    for epoch in (9, 0, 4):
        torch.manual_seed(epoch)
        model = models.create_mae('mae_vit_pico_patch8_dec32d2b', 16, target_dim=64)
        torch.save({'model': model.state_dict(), 'epoch': epoch,
                    'args': {'model': 'mae_vit_pico_patch8_dec32d2b', 'input_size': [16, 16]}}, home / f'c{epoch}.pth')
    return home


def run(*words):
    knn.main(knn.get_args_parser().parse_args([str(word) for word in words]))


def test_lines_come_in_the_order_of_epochs(folder, capsys):
    """README: a line per checkpoint, so that the trend can be seen; what is compared is said, and chance."""
    run('--data_path', folder, '--k', '3', '--checkpoint', *(folder / f'c{epoch}.pth' for epoch in (9, 0, 4)))
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith('start weights')]
    assert [line.split(':')[0] for line in lines] == ['epoch 1', 'epoch 5', 'epoch 10', '3 neighbours among 12 training '
                                                      'images, 6 test images, 2 classes']
    assert all('k-NN top-1 100.00 %' in line for line in lines[:3])  # dark and light are easy even for random weights
    assert lines[-1].endswith('chance is 50.00 %')


def test_features_are_the_mean_patch_tokens_of_the_encoder(folder):
    """The encoder's final norm is applied, the class token left out; timm's network on the same weights is the judge."""
    model, size, epoch = knn.load_encoder(folder / 'c4.pth')
    theirs = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0).eval()
    state = torch.load(folder / 'c4.pth', weights_only=True)['model']
    theirs.load_state_dict({name: value for name, value in state.items() if name in theirs.state_dict()})
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    words = '--checkpoint x --data_path x --batch_size 2 --device cpu'
    args = knn.get_args_parser().parse_args(words.split())
    features, labels = knn.encode(model, list(zip(images, [3, 1, 4, 1, 5])), args)
    with torch.no_grad():
        mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        expected = theirs.forward_features((images / 255 - mean) / std)[:, 1:].mean(1)
    torch.testing.assert_close(features, expected / expected.norm(dim=1, keepdim=True))
    assert labels.tolist() == [3, 1, 4, 1, 5] and size == [16, 16] and epoch == 5


@pytest.mark.parametrize('words, message', [
    (['--checkpoint', '{0}/none.pth'], 'no checkpoint file'),
    (['--checkpoint', '{0}/bare.pth'], 'does not name its network'),
    (['--checkpoint', '{0}/c0.pth', '--k', '0'], 'must be at least 1'),
    (['--checkpoint', '{0}/c0.pth', '--data_path', '{0}/train'], 'there is no folder')])
def test_mistakes_end_in_one_line(folder, monkeypatch, words, message):
    """README: every tool says what is wrong in one line."""
    torch.save(torch.load(folder / 'c0.pth', weights_only=True)['model'], folder / 'bare.pth')
    with pytest.raises(models.InputError) as error:
        run('--data_path', folder, *(word.format(folder) for word in words))
    assert message in str(error.value) and '\n' not in str(error.value)


def test_a_public_file_is_read_with_the_name_of_its_network(folder, capsys):
    """README: other encoders work with --model; their epoch is not known."""
    torch.save(torch.load(folder / 'c0.pth', weights_only=True)['model'], folder / 'bare.pth')
    run('--data_path', folder, '--checkpoint', folder / 'bare.pth', '--model', 'vit_pico_patch8', '--input_size', 16,
        '--per_class', 2)
    out = capsys.readouterr().out
    assert 'epoch unknown: k-NN top-1 100.00 %' in out and 'among 4 training images' in out
