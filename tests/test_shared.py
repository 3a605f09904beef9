"""What keeps the scripts alike: the same plumbing, one order, one meaning of a flag, the paper's values."""
import ast
import difflib
import importlib
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    name: (ROOT / f'{name}.py').read_text()
    for name in ('generic_distill', 'specific_distill_cls', 'specific_distill_det', 'specific_distill_seg')}
BEGIN, END = '# ---- run plumbing', '# ---- end of the plumbing'
PLUMBING = ['parse_args', 'setup', 'request_stop', 'stop_requested', 'gradient_sync', 'backward',
            'write_log']
LOSSES = {'generic_distill': 'feature_loss', 'specific_distill_cls': 'distillation_loss',
          'specific_distill_det': 'frs_loss', 'specific_distill_seg': 'cwd_loss'}
MAIN = ['# 1. processes, device, seed, recipe', '# 2. data',
        '# 3. teacher: strict load, eval mode, no gradients', '# 4. student',
        '# 5. optimizer, schedule, loss scaler', '# 6. resume', '# 7. epochs: train, save, evaluate, log']
GROUPS = ['distillation', 'model', 'optimisation', 'augmentation', 'data', 'run']

# The paper's hyper-parameters: the supplement (Table 1), and the authors' code where it is silent.
# A column is a script and its recipe, whose values stand in for flags that are not given.
G, PIXEL = ('generic_distill', 'distillation'), ('generic_distill', 'pixel')
CLS, FINETUNE = ('specific_distill_cls', 'from scratch'), ('specific_distill_cls', 'fine-tuning')
DET, SEG = ('specific_distill_det', None), ('specific_distill_seg', None)
VIT = 'vit_small_patch16'
PAPER_DEFAULTS = {
    'model': {G: 'mae_vit_small_patch16_dec256d4b', CLS: VIT, DET: VIT, SEG: VIT},
    'input_size': {G: [224], CLS: [224], DET: [1024], SEG: [512]},
    'drop_path': {CLS: 0.0, DET: 0.1, SEG: 0.1},
    # optimisation
    'batch_size': {G: 256, CLS: 128, DET: 8, SEG: 4},  # of one of 8 GPUs
    'accum_iter': {G: 2, CLS: 1, DET: 1, SEG: 1},
    'epochs': {G: 300, PIXEL: 800, CLS: 500, FINETUNE: 200},
    'warmup_epochs': {G: 10, PIXEL: 40, CLS: 5, FINETUNE: 5},
    'iterations': {DET: 184375, SEG: 160000},
    'warmup_iterations': {DET: 250, SEG: 1500},
    'blr': {G: 1.5e-4, PIXEL: 1.5e-4, CLS: 2.5e-4, FINETUNE: 1e-3},
    'lr': {G: None, CLS: None, DET: 1e-4, SEG: None},  # SEG: by the network's size
    'min_lr': {G: 2.5e-6, PIXEL: 0.0, CLS: 1e-6, FINETUNE: 1e-6},
    'layer_decay': {CLS: 1.0, FINETUNE: 0.75, DET: 0.7, SEG: 0.75},
    'weight_decay': {G: 0.05, CLS: 0.05, DET: None, SEG: 0.05},  # DET: 0.1, with a teacher 0.05
    'clip_grad': {G: None, CLS: None, DET: None, SEG: None},
    'aux_weight': {SEG: 0.4},
    # augmentation
    'aa': {CLS: 'rand-m9-mstd0.5-inc1'}, 'reprob': {CLS: 0.25},
    'mixup': {CLS: 0.8}, 'cutmix': {CLS: 1.0}, 'smoothing': {CLS: 0.1},
    'scale_jitter': {DET: [0.1, 2.0]},
    'ratio_range': {SEG: [0.5, 2.0]}, 'cat_max_ratio': {SEG: 0.75},
    # distillation
    'target': {G: 'feature'}, 'supervise': {G: 'all'}, 'mask_ratio': {G: 0.75}, 'norm_pix_loss': {G: True},
    'target_layer': {G: None},  # the middle block
    'distillation_type': {CLS: 'hard'}, 'distillation_alpha': {CLS: 0.5}, 'distillation_tau': {CLS: 1.0},
    'fpn_weight': {DET: 0.001}, 'head_weight': {DET: 0.1}, 'distill_warmup': {DET: 500},
    'cwd_weight': {SEG: 3.0}, 'cwd_tau': {SEG: 1.0},
    # networks and rounds of the dense stages
    'window_size': {DET: 14}, 'fpn_dim': {DET: 256}, 'head_dim': {DET: 1024}, 'anchor_size': {DET: 32},
    'proposals': {DET: 1000}, 'roi_batch': {DET: 512}, 'reduce_zero_label': {SEG: True},
    'eval_every': {CLS: 1, DET: 5000, SEG: 16000},
}
PAPER_BATCH = {'generic_distill': 4096, 'specific_distill_cls': 1024, 'specific_distill_det': 64,
               'specific_distill_seg': 32}
# flags whose help says another thing in each script
OWN_HELP = {'teacher_model', 'teacher_path', 'epochs', 'warmup_epochs', 'blr', 'lr', 'min_lr', 'weight_decay',
            'layer_decay', 'data_path', 'finetune', 'input_size', 'eval_every', 'iterations',
            'warmup_iterations'}

each_script = pytest.mark.parametrize('name', SCRIPTS)
each_pair = pytest.mark.parametrize('left, right', list(itertools.combinations(SCRIPTS, 2)))


def parser_of(name):
    return importlib.import_module(name).get_args_parser()


def flags_of(name):
    return {action.dest: action for action in parser_of(name)._actions if action.dest != 'help'}


def definitions(source):
    return [node.name for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


# ---- the same lines ------------------------------------------------------------------------------


def shared_lines(source):
    """The block between the ruled comments, and what follows main."""
    assert source.count(BEGIN) == source.count(END) == 1
    begin, end, bottom = (source.index(text) for text in (BEGIN, END, "\nif __name__ == '__main__':"))
    return source[begin:end] + source[bottom:]


@pytest.mark.parametrize('name', list(SCRIPTS)[1:])
def test_the_plumbing_is_the_same_bytes_in_every_script(name):
    first, other = shared_lines(SCRIPTS['generic_distill']), shared_lines(SCRIPTS[name])
    diff = difflib.unified_diff(first.splitlines(), other.splitlines(), 'generic_distill', name, lineterm='')
    assert first == other, '\n'.join(diff)


@each_script
def test_the_plumbing_uses_no_name_of_one_script(name):
    block = SCRIPTS[name][SCRIPTS[name].index(BEGIN):SCRIPTS[name].index(END)]
    own = set(definitions(SCRIPTS[name])) - set(PLUMBING)
    used = {node.id for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Name)}
    assert definitions(block) == PLUMBING
    assert not used & own


# ---- the order of a script -----------------------------------------------------------------------


@each_script
def test_definitions_stand_in_the_order_of_the_skeleton(name):
    names = definitions(SCRIPTS[name])
    evaluate = [] if name == 'generic_distill' else ['evaluate']
    skeleton = ['get_args_parser', 'build_data', LOSSES[name], 'train_one_epoch', *evaluate, *PLUMBING]
    assert [one for one in names if one in skeleton] == skeleton
    assert names[0] == 'get_args_parser'
    assert names[-len(PLUMBING) - 1:] == [*PLUMBING, 'main']  # nothing between them


@each_script
def test_main_reads_in_the_same_seven_paragraphs(name):
    main = SCRIPTS[name][SCRIPTS[name].index('\ndef main(args):'):]
    comments = re.findall(r'^    (# \d.*)', main, re.M)
    assert [comment.replace('rounds', 'epochs') for comment in comments] == MAIN


@each_script
def test_nothing_happens_at_import(name):
    """A docstring, imports, constants, the event of the signals, and definitions; then the guarded main."""
    first, *body, last = ast.parse(SCRIPTS[name]).body
    assert isinstance(first.value.value, str)
    assert ast.unparse(last.test) == "__name__ == '__main__'"
    calls = []
    for node in body:
        assert isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign, ast.FunctionDef, ast.ClassDef))
        if isinstance(node, ast.Assign):
            calls += [ast.unparse(call) for call in ast.walk(node.value) if isinstance(call, ast.Call)]
    assert calls == ['threading.Event()']


# ---- flags ---------------------------------------------------------------------------------------


@each_pair
def test_a_flag_has_one_type_and_one_help_text_in_all_scripts(left, right):
    ours, theirs = flags_of(left), flags_of(right)
    for flag in ours.keys() & theirs.keys():
        for what in ('type', 'choices', 'nargs', 'const', 'option_strings'):
            assert getattr(ours[flag], what) == getattr(theirs[flag], what), f'--{flag}: {what}'
        assert ours[flag].help == theirs[flag].help or flag in OWN_HELP, f'--{flag}'


@each_pair
def test_defaults_differ_between_scripts_only_where_the_papers_table_says_so(left, right):
    ours, theirs = flags_of(left), flags_of(right)
    for flag in ours.keys() & theirs.keys():
        if ours[flag].default != theirs[flag].default:
            assert {left, right} <= {script for script, _ in PAPER_DEFAULTS.get(flag, {})}, f'--{flag}'


def default_of(flag, script, recipe):
    """What training gets without the flag: the parser's default, or the recipe's."""
    value = parser_of(script).get_default(flag)
    if value is not None or recipe is None:
        return value
    return importlib.import_module(script).RECIPES[recipe].get(flag)


@pytest.mark.parametrize('flag', PAPER_DEFAULTS)
def test_defaults_are_the_papers(flag):
    for (script, recipe), expected in PAPER_DEFAULTS[flag].items():
        value = default_of(flag, script, recipe)
        assert (value, type(value)) == (expected, type(expected)), f'{script}, {recipe}'


@each_script
def test_the_papers_table_is_complete_and_the_groups_stand_in_one_order(name):
    """A new hyper-parameter comes with the paper's value."""
    groups = [group for group in parser_of(name)._action_groups if group.title in GROUPS]
    assert [group.title for group in groups] == sorted((group.title for group in groups), key=GROUPS.index)
    for group in groups:
        if group.title in ('optimisation', 'augmentation'):
            for action in group._group_actions:
                scripts = {script for script, _ in PAPER_DEFAULTS.get(action.dest, {})}
                assert name in scripts, f'--{action.dest}'


@each_script
def test_eight_processes_make_the_papers_batch(name):
    args = parser_of(name).parse_args([])
    batch = 8 * args.batch_size * args.accum_iter
    assert batch == PAPER_BATCH[name] == importlib.import_module(name).PAPER_BATCH


@each_script
def test_flags_have_full_names_and_help(name):
    """snake_case, no abbreviations, no string booleans; --help shows the defaults."""
    parser = parser_of(name)
    assert not parser.allow_abbrev
    assert parser.formatter_class.__name__ == 'ArgumentDefaultsHelpFormatter'
    for flag, action in flags_of(name).items():
        assert re.fullmatch(r'[a-z][a-z0-9_]*', flag) and action.help
        assert action.type is not bool


def names_read(source):
    """What is read as `args.name` or by `getattr(args, ...)`, as patterns; writing a name does not count."""
    names, patterns = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            if ast.unparse(node.value) in ('args', 'self.args'):
                names.add(node.attr)
        if isinstance(node, ast.Call) and ast.unparse(node).startswith('getattr(args, '):
            parts = getattr(node.args[1], 'values', [node.args[1]])  # those of an f-string
            texts = [part.value if isinstance(part, ast.Constant) else r'\w+' for part in parts]
            patterns.add(''.join(texts))
    return names, patterns - {r'\w+'}


@each_script
def test_every_flag_is_read_and_every_name_that_is_read_exists(name):
    """A flag that nobody reads is deleted; a misspelt one would fail hours into a run."""
    flags = set(flags_of(name))
    names, patterns = names_read(SCRIPTS[name])
    read = '|'.join([*names, *patterns, *names_read((ROOT / 'models.py').read_text())[0]])
    assert [flag for flag in flags if not re.fullmatch(read, flag)] == []
    assert names <= {*flags, 'rank', 'world_size', 'distributed'}
    assert set(importlib.import_module(name).SHAPE_FLAGS) <= flags
