"""Any timm classifier teaches stage 2; oracle: timm itself, with its own transform."""
import argparse
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import CLS, checkpoint_of, log_of, train
from timm.data import resolve_model_data_config

import models

CLASSES = [str(number) for number in range(12)]


def save(folder, name, **wrapper):
    """A timm network with random weights, its statistics too, and its file."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=12).eval()
    for key, value in network.state_dict().items():
        if key.endswith('running_mean'):
            value.normal_()
    state = {f'{wrapper.get("prefix", "")}{key}': value for key, value in network.state_dict().items()}
    path = folder / f'{name}.pth'
    torch.save({wrapper['key']: state} if 'key' in wrapper else state, path)
    return network, path


# CNNs, windows, rotary positions, two heads; mean 0.5, ImageNet's and CLIP's; 160, 224 and 336 pixels
@pytest.mark.parametrize('name, wrapper', [
    ('regnety_002', {'key': 'model'}), ('convnext_atto', {}), ('swin_tiny_patch4_window7_224', {'key': 'state_dict'}),
    ('eva02_tiny_patch14_336', {'prefix': 'module.'}), ('test_resnet', {'prefix': '_orig_mod.'}),
    ('deit_tiny_distilled_patch16_224', {})])
def test_the_teacher_sees_what_timm_would_give_it(name, wrapper, tmp_path, capsys):
    """Logits of the network on images that are resized and normalised as its timm config says."""
    network, path = save(tmp_path, name, **wrapper)
    config = resolve_model_data_config(network)
    side = config['input_size'][-1]
    teacher = CLS.TimmTeacher(name, path, CLASSES)
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    for size in {32, side}:
        images = F.interpolate(torch.randint(256, (2, 3, 2, 2)).float(), size).byte()
        pixels = images / 255
        if size != side:
            pixels = F.interpolate(pixels, (side, side), mode='bicubic', antialias=True)
        mean, std = (torch.tensor(config[key])[:, None, None] for key in ('mean', 'std'))
        with torch.no_grad():
            expected, logits = network((pixels - mean) / std), teacher(models.normalise(images))
        assert (expected[0] - expected[1]).abs().max() > 1e-3 * expected.abs().max()
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    printed = capsys.readouterr().out
    assert f'timm/{name}' in printed and str(config['mean']) in printed and str(side) in printed


def test_a_file_of_timms_training_brings_its_own_size_and_statistics(tmp_path):
    """train.py's flags are in the file, averaged weights come first; DeiT's flags have another form."""
    network, path = save(tmp_path, 'test_vit')
    small = timm.create_model('test_vit', num_classes=12, img_size=32).eval()
    flags = argparse.Namespace(img_size=32, input_size=None, mean=[0.1, 0.2, 0.3], std=None)
    torch.save({'state_dict': network.state_dict(), 'state_dict_ema': small.state_dict(), 'args': flags}, path)
    teacher, images = CLS.TimmTeacher('test_vit', path, CLASSES), torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    pixels = (images / 255 - torch.tensor(flags.mean)[:, None, None]) / 0.5  # the std of its config
    torch.testing.assert_close(teacher(models.normalise(images)), small(pixels).detach(), rtol=1e-4, atol=1e-6)
    torch.save({'model': network.state_dict(), 'args': argparse.Namespace(input_size=224)}, path)
    assert CLS.TimmTeacher('test_vit', path, CLASSES).input_size == (160, 160)


def test_the_authors_files_of_other_networks_are_converted(tmp_path):
    """ConvNeXt under the names of its own repository; a wrong number of classes is refused there, too."""
    network = timm.create_model('convnext_atto', num_classes=12).eval()
    original = {}
    for key, value in network.state_dict().items():
        key = re.sub(r'^stem\.', 'downsample_layers.0.', key)
        key = re.sub(r'^stages\.(\d)\.downsample\.', r'downsample_layers.\1.', key)
        key = re.sub(r'^stages\.(\d)\.blocks\.', r'stages.\1.', key)
        key = key.replace('conv_dw', 'dwconv').replace('mlp.fc1', 'pwconv1').replace('mlp.fc2', 'pwconv2')
        original[key.replace('head.fc', 'head').replace('head.norm', 'norm')] = value
    assert original.keys() != network.state_dict().keys()
    torch.save({'model': original}, tmp_path / 'x.pth')
    teacher, images = CLS.TimmTeacher('convnext_atto', tmp_path / 'x.pth', CLASSES), torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(teacher(images), network(images).detach(), rtol=1e-4, atol=1e-6)
    with pytest.raises(SystemExit, match='convnext_atto and .*x.pth: .*size mismatch.*head.fc'):
        CLS.TimmTeacher('convnext_atto', tmp_path / 'x.pth', CLASSES[1:])


@pytest.mark.parametrize('name', ['deit_tiny_distilled_patch16_224', 'regnety_002', 'test_efficientnet'])
def test_another_number_of_classes_is_named(name, tmp_path):
    _, path = save(tmp_path, name)
    with pytest.raises(SystemExit, match='has 12 classes, the data has 11'):
        CLS.TimmTeacher(name, path, CLASSES[1:])


def test_a_student_learns_from_a_cnn_of_timm(data, tmp_path):
    """A run: the teacher's top class is the target of the distillation head; its config gives 160 pixels."""
    network, path = save(tmp_path, 'test_resnet')
    flags = f'--teacher_model timm/test_resnet --teacher_path {path} --epochs 4 --mixup 0 --cutmix 0 --reprob 0'
    train(CLS, data, tmp_path / 'run', flags, '--distillation_alpha 1')
    log = log_of(tmp_path / 'run')
    assert log[-1]['train_loss_distill'] < log[0]['train_loss_distill'] and log[0]['train_loss_class'] == 0
    assert checkpoint_of(tmp_path / 'run')['args']['teacher_model'] == 'timm/test_resnet'
