"""tools/benchmark.py measures what it says: every stage's own step, FLOP counts worked out by hand."""
import importlib
import json
import sys

import benchmark
import pytest

import models

COMMON = '--num_workers 0 --device cpu'
TINY = {
    'generic': '--model mae_vit_pico_patch8 --teacher_model mae_vit_nano_patch8_dec64d2b --target_layer 1 '
               '--input_size 32 --batch_size 8 --accum_iter 2',
    'cls': '--model vit_pico_patch8 --teacher_model vit_nano_patch8 --input_size 32 --batch_size 8',
    'det': '--model vit_pico_patch8 --teacher_model vit_nano_patch8 --input_size 64 --window_size 4 '
           '--fpn_dim 16 --head_dim 32 --anchor_size 8 --proposals 20 --roi_batch 16 --batch_size 2',
    'seg': '--model vit_pico_patch8 --teacher_model vit_nano_patch8 --input_size 32 --batch_size 2',
}


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """measure(stage, flags) -> the line of JSON; the script is afterwards as it was."""
    def run(stage, words):
        script = importlib.import_module(benchmark.SCRIPTS[stage])
        replaced = (script, 'train_one_epoch'), (script, 'request_stop'), (models, 'load_strictly')
        for module, name in replaced:
            monkeypatch.setattr(module, name, getattr(module, name))
        words = f'--stage {stage} --steps 2 --warmup 1 --json {tmp_path}/b.json {words} {COMMON}'.split()
        monkeypatch.setattr(sys, 'argv', ['benchmark.py', *words])
        benchmark.main(*benchmark.get_args_parser().parse_known_args(words))
        return json.loads((tmp_path / 'b.json').read_text().splitlines()[-1])
    return run


def block_flop(tokens, dim):
    """Forward of a ViT block: qkv, the two products of attention, projection, MLP of ratio 4."""
    return 2 * tokens * dim * dim * (3 + 1 + 8) + 2 * 2 * tokens * tokens * dim


@pytest.mark.parametrize('stage', TINY)
def test_every_stage_is_measured(stage, measure, monkeypatch, capsys):
    """Its own steps: those of the warm-up, the timed ones, on a ready and on real batches; one is counted."""
    script = importlib.import_module(benchmark.SCRIPTS[stage])
    updates, backward = [], script.backward
    monkeypatch.setattr(script, 'backward', lambda *args: updates.append(args) or backward(*args))
    row = measure(stage, TINY[stage])
    assert len(updates) == (2 * (1 + 2) + 1) * row['accum_iter']
    for name in ('loader', 'step', 'both', 'gflop_per_image', 'peak_tflops'):
        assert row[name] > 0
    assert row['memory_gb'] > 0.1
    tflops = row['gflop_per_image'] * row['step'] / 1e3
    assert row['share_of_peak'] == pytest.approx(tflops / row['peak_tflops'])
    text = capsys.readouterr().out
    assert len(text.splitlines()) == 6 and f'step   {row["step"]:9.1f} images/s' in text


def test_flop_are_those_worked_out_by_hand(measure):
    """Stage 1: the teacher forward up to the target, the student forward and backward."""
    row = measure('generic', TINY['generic'])
    length, kept, pixels = 16, 4, 3 * 8 * 8
    embed = 2 * length * pixels  # all patches are projected
    teacher = (embed * 64 + 4 * block_flop(1 + kept, 64) + 2 * (1 + kept) * 64 * 64
               + block_flop(1 + length, 64))
    student = (2 * block_flop(1 + kept, 32) + 2 * (1 + kept) * 32 * 32 + 2 * block_flop(1 + length, 32)
               + 2 * (1 + length) * (32 * 64 + 64 * 64))
    # backward is twice the forward, but the pixels need no gradient
    assert row['gflop_per_image'] == pytest.approx((teacher + 2 * embed * 32 + 3 * student) / 1e9, rel=1e-6)


def test_a_teacher_of_timm_is_measured_with_random_weights(measure):
    row = measure('cls', TINY['cls'].replace('vit_nano_patch8', 'timm/test_resnet'))
    assert row['step'] > 0 and row['teacher_model'] == 'timm/test_resnet'


def test_real_data_and_a_real_teacher_are_used_where_they_are_given(measure, tmp_path):
    """--data_path and --teacher_path are the stage's own: a file that is missing ends the benchmark."""
    for flags, message in ((f'--teacher_path {tmp_path}/gone.pth', 'no checkpoint file'),
                           (f'--data_path {tmp_path}/gone', 'give a folder of images')):
        with pytest.raises(SystemExit, match=message):
            measure('generic', f'{TINY["generic"]} {flags}')
