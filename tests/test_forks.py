"""docs/forks: each diff applies to today's scripts, trains for an epoch, and computes what it says."""
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import CLS, ROOT, TINY, checkpoint_of, evaluate_alone, log_of, run, train
from timm.data import resolve_model_data_config

import generic_distill
import models

FORKS = sorted(path.stem for path in (ROOT / 'docs/forks').glob('*.diff'))
PAGE = (ROOT / 'docs/forks/README.md').read_text()


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module', params=FORKS)
def every_fork(request, forks):
    return request.param, forks(request.param)


@pytest.fixture(scope='module')
def forks(tmp_path_factory):
    """name -> the stage with that diff applied, a module; `models` in it is the fork's."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            for path in ROOT.glob('*.py'):
                shutil.copy(path, folder)
            subprocess.run(['git', 'apply', ROOT / f'docs/forks/{name}.diff'], cwd=folder, check=True)
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(sys.modules, 'models', models)
                if (folder / 'models.py').read_bytes() != (ROOT / 'models.py').read_bytes():
                    patch.setitem(sys.modules, 'models', load(folder / 'models.py', f'models_{name}'))
                stage = 'specific_distill_cls' if name == 'pooled_readout' else 'generic_distill'
                made[name] = load(folder / f'{stage}.py', f'{stage}_{name}')
        return made[name]

    return make


@pytest.fixture(scope='module')
def teachers(data, tmp_path_factory):
    """MAE, its fine-tuned classifier, a student of stage 1, and a timm ViT: paths by name."""
    folder = tmp_path_factory.mktemp('teachers')
    mae, student, classifier = (folder / name / 'checkpoint.pth' for name in ('mae', 'student', 'classifier'))
    train(generic_distill, data, mae.parent, '--target pixel --model mae_vit_nano_patch4 --epochs 1 --warmup_epochs 0')
    train(generic_distill, data, student.parent, '--model mae_vit_pico_patch4 --epochs 1 --warmup_epochs 0 --teacher_path',
          mae)
    train(CLS, data, classifier.parent, '--model vit_nano_patch4 --epochs 1 --warmup_epochs 0 --finetune', mae)
    torch.save(timm.create_model('test_vit').state_dict(), folder / 'timm.pth')
    return {'mae': mae, 'student': student, 'classifier': classifier, 'timm': folder / 'timm.pth'}


FLAGS = {
    'encoder_teacher': '--teacher_model test_vit --teacher_path {timm} --model mae_vit_pico_patch16 --input_size 48',
    'pooled_readout': '--model vit_pico_patch4 --finetune {student} --teacher_path {classifier}',
}


def test_a_fork_trains_for_an_epoch_and_is_short(every_fork, data, teachers, tmp_path):
    name, script = every_fork
    added = [line for line in (ROOT / f'docs/forks/{name}.diff').read_text().splitlines() if re.match(r'\+(?!\+\+)', line)]
    assert 0 < len(added) <= 45 and max(len(line) for line in added) <= 111
    flags = FLAGS.get(name, '--model mae_vit_pico_patch4 --teacher_path {mae}').format(**teachers)
    tiny = TINY[CLS if name == 'pooled_readout' else generic_distill].split()
    words = [script.__file__, '--data_path', data / 'imagenet', '--output_dir', tmp_path, *tiny, *flags.split()]
    run(script, *words, '--epochs', 3)
    log = log_of(tmp_path)
    assert log[-1]['train_loss'] < log[0]['train_loss']
    terms = {key for key in log[0] if key.startswith('train_loss_')}
    assert terms == {'relations': {'train_loss_feature', 'train_loss_relation'},
                     'pooled_readout': {'train_loss_class', 'train_loss_distill'}}.get(name, {'train_loss_feature'})


def test_the_command_of_a_fork_is_one_that_it_takes(every_fork):
    """docs/forks/README.md: the diff's name, what applies it, and a command of the stage."""
    name, script = every_fork
    section = PAGE.split(f'## {name}\n')[1].split('\n## ')[0]
    block = re.sub(r'\s*\\\n\s*', ' ', re.search(r'```bash\n(.*?)```', section, re.S)[1])
    apply, command = block.strip().splitlines()
    assert apply == f'git apply docs/forks/{name}.diff'
    program, words = re.search(r'(\w+\.py) (.*)', command).groups()
    assert program == script.__file__.rpartition('/')[2]
    script.get_args_parser().parse_args(shlex.split(words))


def test_relations_are_kl_between_rows_of_softmaxed_cosines(forks):
    """A loop in float64: row t says which tokens are like token t."""
    torch.manual_seed(0)
    pred, target = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    expected = 0.0
    for student, teacher in zip(pred.double(), F.layer_norm(target.double(), (8,), eps=1e-6)):
        for t in range(5):
            p, q = ([torch.dot(tokens[t], other) / tokens[t].norm() / other.norm() / 0.1 for other in tokens]
                    for tokens in (teacher, student))
            p, q = torch.stack(p).softmax(0), torch.stack(q).softmax(0)
            expected += (p * (p / q).log()).sum().item() / 10
    script = forks('relations')
    assert script.relation_loss(pred, target, 0.1).item() == pytest.approx(expected, rel=1e-5)
    args = SimpleNamespace(target='feature', target_layer=1, supervise='all', relation_weight=0.3,
                           relation_temperature=0.5)
    losses = script.compute_losses(lambda *_: pred, lambda *_: target, None, None, args)
    plain = generic_distill.feature_loss(pred, target).item()
    assert losses['loss_feature'].item() == pytest.approx(plain)
    assert losses['loss_relation'].item() == pytest.approx(0.3 * script.relation_loss(pred, target, 0.5).item())


@pytest.mark.parametrize('side, blocks', [(224, 12), (64, 1)])
def test_masks_consist_of_whole_blocks(side, blocks, forks):
    """Of 7x7 blocks 12 are kept at the ratio 0.75, those with the smallest draws; ids and mask agree."""
    args = SimpleNamespace(model='mae_vit_small_patch16', input_size=(side, side), mask_ratio=0.75)
    grid = side // 16
    noise = torch.rand(3, grid * grid, generator=torch.Generator().manual_seed(0))
    masking = forks('block_mask').block_masking(noise, args)
    assert masking.ids_keep.shape == (3, 4 * blocks)
    for row, ids, draws in zip(masking.mask, masking.ids_keep, noise.unflatten(1, (grid, grid))[:, ::2, ::2]):
        kept = row.unflatten(0, (grid, grid)) == 0
        assert sorted(ids.tolist()) == kept.flatten().nonzero().flatten().tolist()
        for block in draws.flatten().argsort()[:blocks].tolist():
            y, x = divmod(block, grid // 2)
            assert kept[2 * y:2 * y + 2, 2 * x:2 * x + 2].all()
        assert kept.sum() == 4 * blocks
    args.mask_ratio = 0.99
    with pytest.raises(SystemExit, match=f'0.99 keeps 0 of {(grid // 2) ** 2} blocks'):
        forks('block_mask').block_masking(noise, args)
    args.input_size = (48, 64)
    with pytest.raises(SystemExit, match='3x4 patches'):
        forks('block_mask').block_masking(torch.rand(1, 12), args)


def test_training_hides_whole_blocks(forks, data, tmp_path, monkeypatch):
    """The masks that reach the loss, in each step."""
    script, seen = forks('block_mask'), []
    compute_losses = script.compute_losses

    def spy(model, teacher, images, masking, args):
        seen.append(masking.mask)
        return compute_losses(model, teacher, images, masking, args)

    monkeypatch.setattr(script, 'compute_losses', spy)
    words = ['--data_path', data / 'imagenet', '--output_dir', tmp_path, *TINY[generic_distill].split()]
    run(script, script.__file__, *words, '--target', 'pixel', '--model', 'mae_vit_pico_patch4')
    masks = torch.cat(seen).unflatten(1, (2, 2, 2, 2))  # rows of blocks, in a block; columns
    assert len(seen) == 12 and torch.equal(masks, masks[:, :, :1, :, :1].expand_as(masks))
    assert (masks[:, :, 0, :, 0].sum(dim=(1, 2)) == 3).all()


def test_both_heads_read_the_mean_of_the_patch_tokens(forks, data, teachers, tmp_path):
    """Oracle: timm's ViT with global pooling; evaluation takes the mean of the heads, alone too."""
    script = forks('pooled_readout')
    model = script.models.create_vit('vit_pico_patch4', 12, 16, distilled=True)
    oracle = timm.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=12,
                                           global_pool='avg')
    images, outputs = torch.randn(4, 3, 16, 16), []
    for head in ('head', 'head_dist'):
        state = {key: value for key, value in model.state_dict().items() if not key.startswith('head')}
        state |= {f'head.{part}': getattr(getattr(model, head), part) for part in ('weight', 'bias')}
        oracle.load_state_dict(state, strict=True)
        outputs.append(oracle(images).detach())
    assert outputs[0].std() > 1e-3 and not torch.allclose(*outputs)
    for ours, expected in zip(model(images), outputs):
        torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(model.eval()(images), (outputs[0] + outputs[1]) / 2)
    flags = FLAGS['pooled_readout'].format(**teachers).split()
    run(script, script.__file__, '--data_path', data / 'imagenet', '--output_dir', tmp_path, *TINY[CLS].split(), *flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('conftest.FOLDER', {script: 'imagenet'})
        alone = evaluate_alone(script, data, tmp_path / 'checkpoint.pth')
    assert alone['test_loss'] == pytest.approx(log_of(tmp_path)[-1]['test_loss'], rel=1e-5)


@pytest.mark.parametrize('name, student, side, layer', [
    ('test_vit', 'mae_vit_pico_patch16', 48, 2), ('deit3_small_patch16_224', 'mae_vit_pico_patch16', 32, 12),
    ('vit_small_patch14_dinov2', 'mae_vit_pico_patch14', 28, 7)])
def test_an_encoder_teaches_its_patch_tokens_of_the_whole_image(name, student, side, layer, forks, tmp_path):
    """Oracle: a hook on the timm network's block, at its own mean and std; no token before the patches."""
    torch.manual_seed(0)
    network = timm.create_model(name, img_size=side, num_classes=layer).eval()  # a head of any size, or none
    torch.save({'state_dict': network.state_dict()}, tmp_path / 'vit.pth')
    teacher = forks('encoder_teacher').EncoderTeacher(name, tmp_path / 'vit.pth', (side, side))
    assert not teacher.training and not any(parameter.requires_grad for parameter in teacher.parameters())
    seen, config = [], resolve_model_data_config(network)
    network.blocks[layer - 1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = torch.randint(256, (2, 3, side, side), dtype=torch.uint8)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ('mean', 'std'))
    with torch.no_grad():
        network((images / 255 - mean) / std)
        target = teacher(models.normalise(images), layer)
    patches = (side // models.parse_name(student, mae=True).patch) ** 2
    torch.testing.assert_close(target, seen[0][:, -patches:], rtol=1e-3, atol=1e-4)
    blocks = []
    for block in teacher.vit.blocks:
        block.register_forward_hook(lambda *_: blocks.append(1))
    args = SimpleNamespace(target='feature', target_layer=layer, supervise='all', distributed=False)
    model = models.create_mae(student, side, target.shape[2])
    masking = models.random_masking(torch.rand(2, patches), 0.75)
    losses = forks('encoder_teacher').compute_losses(model, teacher, models.normalise(images), masking, args)
    prediction = model.predict_features(models.normalise(images), masking)[:, 1:]
    expected = F.smooth_l1_loss(prediction, F.layer_norm(target, target.shape[2:], eps=1e-6), beta=2.0)
    assert losses['loss_feature'].item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(blocks) == layer  # those behind it do not run
    args.supervise, hidden = 'masked', masking.mask.bool()
    losses = forks('encoder_teacher').compute_losses(model, teacher, models.normalise(images), masking, args)
    expected = generic_distill.feature_loss(prediction[hidden], target[hidden])
    assert losses['loss_feature'].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize('old, new, message', [
    ('patch16 --input', 'patch8 --input', 'mae_vit_pico_patch8 and test_vit differ in patch size'),
    ('test_vit', 'no_vit', 'no_vit: Unknown model'), ('test_vit', 'vit_tiny_patch16_224', 'vit_tiny.*Missing key'),
    ('{timm}', '{mae}', 'test_vit: .*Missing key'), ('{timm}', 'gone.pth', 'no checkpoint file'),
    ('48', '48 --target_layer 0', 'teacher has 6 blocks')])
def test_what_an_encoder_teacher_refuses_in_one_line(old, new, message, forks, data, teachers, tmp_path):
    flags = FLAGS['encoder_teacher'].replace(old, new).format(**teachers).split()
    words = ['--data_path', data / 'imagenet', '--output_dir', tmp_path, *TINY[generic_distill].split(), *flags]
    with pytest.raises(SystemExit, match=message) as stop:
        run(forks('encoder_teacher'), 'generic_distill.py', *words)
    assert len(stop.value.code.splitlines()) == 1


def test_an_encoder_teaches_its_last_block_unless_told(forks, data, teachers, tmp_path):
    words = ['--data_path', data / 'imagenet', *TINY[generic_distill].split(), '--output_dir']
    flags = FLAGS['encoder_teacher'].format(**teachers).split()
    run(forks('encoder_teacher'), 'generic_distill.py', *words, tmp_path, *flags)
    assert checkpoint_of(tmp_path)['args']['target_layer'] == 6
