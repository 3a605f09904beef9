"""What keeps the scripts alike: the same plumbing, one order, one meaning of a flag, the paper's values, no dead code."""
import ast
import difflib
import importlib
import itertools
import re
import shlex
from pathlib import Path

import pytest

import models

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [ROOT / 'generic_distill.py', *sorted(ROOT.glob('specific_distill_*.py'))]
SOURCES = [*SCRIPTS, ROOT / 'models.py', *sorted((ROOT / 'tools').glob('*.py'))]
TESTS = sorted((ROOT / 'tests').glob('*.py'))
MODULES = {path.name: importlib.import_module(path.stem) for path in SCRIPTS}

SHARED_BEGIN, SHARED_END = '# ---- shared by all scripts', '# ---- end of the shared helpers'
SHARED = ('Progress', 'start_run', 'scale_lr', 'save_checkpoint', 'resume_checkpoint', 'open_log', 'write_log')
LOSSES = {'generic_distill.py': 'feature_loss', 'specific_distill_cls.py': 'distillation_loss',
          'specific_distill_det.py': 'frs_loss', 'specific_distill_seg.py': 'cwd_loss'}
MAIN = ['# 1. process group, device, seed', '# 2. data', '# 3. teacher: strict load, eval mode, no gradients',
        '# 4. student', '# 5. optimizer, schedule, loss scaler', '# 6. resume',
        '# 7. epochs: train, evaluate, save, log']
GROUPS = ['distillation', 'model', 'optimisation', 'augmentation', 'data', 'run']

# The paper's hyper-parameters: the supplement (Table 1), and the authors' code where these are silent.
# A key is a command line; its value is what training gets, so that what a recipe fills in counts, too.
G, PIXEL = 'generic_distill.py', 'generic_distill.py --target pixel'
CLS, FINETUNE = 'specific_distill_cls.py', 'specific_distill_cls.py --finetune X'
DET = 'specific_distill_det.py'
SEG, SEG_TINY = 'specific_distill_seg.py', 'specific_distill_seg.py --model vit_tiny_patch16'
PAPER_DEFAULTS = {
    # these differ between the scripts
    'model': {G: 'mae_vit_small_patch16_dec256d4b', CLS: 'vit_small_patch16', DET: 'vit_small_patch16',
              SEG: 'vit_small_patch16'},
    'teacher_model': {G: 'mae_vit_base_patch16', CLS: 'vit_base_patch16', DET: 'vit_base_patch16',
                      SEG: 'vit_base_patch16'},
    'batch_size': {G: 256, PIXEL: 256, CLS: 128, FINETUNE: 128, DET: 8, SEG: 4},  # on 8 GPUs; in total: PAPER_BATCH
    'accum_iter': {G: 2, PIXEL: 2, CLS: 1, FINETUNE: 1, DET: 1, SEG: 1},
    'epochs': {G: 300, PIXEL: 800, CLS: 500, FINETUNE: 200},
    'warmup_epochs': {G: 10, PIXEL: 40, CLS: 5, FINETUNE: 5},
    'blr': {G: 1.5e-4, PIXEL: 1.5e-4, CLS: 2.5e-4, FINETUNE: 1e-3},
    'min_lr': {G: 2.5e-6, PIXEL: 0.0, CLS: 1e-6, FINETUNE: 1e-6},
    # these are the same, or belong to one script
    'layer_decay': {CLS: 1.0, FINETUNE: 0.75, DET: 0.7, SEG: 0.75},
    'weight_decay': {G: 0.05, PIXEL: 0.05, CLS: 0.05, FINETUNE: 0.05, DET: 0.05, SEG: 0.05},
    'clip_grad': {G: None, CLS: None, DET: None, SEG: None},
    'lr': {G: None, CLS: None, DET: 1e-4, SEG: 2e-4, SEG_TINY: 5e-4},
    'input_size': {G: [224], CLS: [224], DET: [1024], SEG: [512]},
    'target': {G: 'feature'},
    'target_layer': {G: 4},
    'supervise': {G: 'all'},
    'mask_ratio': {G: 0.75},
    'norm_pix_loss': {G: True},
    'distillation_type': {CLS: 'hard'},
    'distillation_alpha': {CLS: 0.5},
    'drop_path': {CLS: 0.0, FINETUNE: 0.0, DET: 0.1, SEG: 0.1},
    'mixup': {CLS: 0.8, FINETUNE: 0.8},
    'cutmix': {CLS: 1.0, FINETUNE: 1.0},
    'smoothing': {CLS: 0.1, FINETUNE: 0.1},
    'aa': {CLS: 'rand-m9-mstd0.5-inc1', FINETUNE: 'rand-m9-mstd0.5-inc1'},
    'reprob': {CLS: 0.25, FINETUNE: 0.25},
    'repeated_aug': {G: 1, PIXEL: 1},
    'eval_every': {CLS: 1, DET: 5000, SEG: 16000},  # epochs, iterations
    'iterations': {DET: 184375, SEG: 160000},
    'warmup_iterations': {DET: 250, SEG: 1500},
    'scale_jitter': {DET: [0.1, 2.0]},
    'fpn_weight': {DET: 0.001},
    'head_weight': {DET: 0.1},
    'distill_warmup': {DET: 500},
    'window_size': {DET: 14},
    'fpn_dim': {DET: 256},
    'head_dim': {DET: 1024},
    'anchor_size': {DET: 32},
    'proposals': {DET: 1000},
    'roi_batch': {DET: 512},
    'cwd_weight': {SEG: 3.0},
    'cwd_tau': {SEG: 1.0},
    'aux_weight': {SEG: 0.4},
    'ratio_range': {SEG: [0.5, 2.0]},
    'cat_max_ratio': {SEG: 0.75},
    'reduce_zero_label': {SEG: True},
    'global_pool': {CLS: False, FINETUNE: True, f'{FINETUNE} --teacher_path Y': False},
}
PAPER_BATCH = {'generic_distill.py': 4096, 'specific_distill_cls.py': 1024, 'specific_distill_det.py': 64,
               'specific_distill_seg.py': 32}
# flags whose help says another thing in each script; every other shared flag has one help text
OWN_HELP = {'teacher_path', 'epochs', 'warmup_epochs', 'blr', 'min_lr', 'weight_decay', 'data_path', 'lr', 'layer_decay',
            'finetune', 'input_size', 'eval_every', 'iterations', 'warmup_iterations'}

each_script = pytest.mark.parametrize('path', SCRIPTS, ids=lambda path: path.name)
each_source = pytest.mark.parametrize('path', SOURCES, ids=lambda path: path.name)


def flags_of(path):
    return {action.dest: action for action in MODULES[path.name].get_args_parser()._actions if action.dest != 'help'}


def top_level(source):
    return [node.name for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]


def resolved(command):
    """The arguments of a command line after the script has filled in its recipe."""
    name, *words = shlex.split(command)
    args = MODULES[name].get_args_parser().parse_args(['--data_path', 'X', *words])
    MODULES[name].resolve_recipe(args)
    return args


# ----------------------------------------------------------------------------------------------------- the same plumbing


def shared_block(path):
    text = path.read_text()
    assert text.count(SHARED_BEGIN) == text.count(SHARED_END) == 1, f'{path.name} has no single shared block'
    return text[text.index(SHARED_BEGIN):text.index(SHARED_END)]


@pytest.mark.parametrize('path', SCRIPTS[1:], ids=lambda path: path.name)
def test_shared_helpers_are_the_same_bytes_in_every_script(path):
    """README, how to fork: the block between the ruled comments is the same in every script."""
    first, other = shared_block(SCRIPTS[0]), shared_block(path)
    diff = '\n'.join(difflib.unified_diff(first.splitlines(), other.splitlines(), SCRIPTS[0].name, path.name, lineterm=''))
    assert first == other, f'\n{diff}'


@each_script
def test_the_shared_block_holds_the_helpers_and_uses_no_name_of_one_script(path):
    """Style: the plumbing is in the block, and what it uses is imported or a constant everywhere."""
    block = shared_block(path)
    assert tuple(top_level(block)) == SHARED
    outside = set(top_level(path.read_text())) - set(SHARED)
    used = {node.id for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Name)}
    assert not used & outside


# --------------------------------------------------------------------------------------------------------------- skeleton


@each_script
def test_definitions_stand_in_the_order_of_the_skeleton(path):
    """Skeleton: parser, data, loss, one epoch, evaluation, shared helpers, main."""
    names = top_level(path.read_text())
    evaluate = [] if path.name == 'generic_distill.py' else ['evaluate']
    skeleton = ['get_args_parser', 'build_data', LOSSES[path.name], 'train_one_epoch', *evaluate, *SHARED, 'main']
    assert [name for name in names if name in skeleton] == skeleton
    assert ('evaluate' in names) == bool(evaluate)
    assert names[0] == 'get_args_parser'
    first = names.index(SHARED[0])
    assert names[first:] == [*SHARED, 'main']  # nothing between the helpers, nothing behind main


@each_script
def test_main_reads_in_the_same_seven_paragraphs(path):
    """Style: seven short paragraphs, each under the same comment in every script."""
    text = path.read_text()
    main = text[text.index('\ndef main(args):'):text.index("\nif __name__ == '__main__':")]
    assert [line.strip() for line in main.splitlines() if re.match(r'    # \d', line)] == MAIN


@each_script
def test_nothing_happens_at_import(path):
    """Skeleton: the top level holds a docstring, imports, constants and definitions, then the guarded call of main."""
    body = ast.parse(path.read_text()).body
    assert isinstance(body[0], ast.Expr) and isinstance(body[0].value.value, str)
    assert ast.unparse(body[-1].test) == "__name__ == '__main__'"
    for node in body[1:-1]:
        assert isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign, ast.FunctionDef, ast.ClassDef)), ast.unparse(node)
    for node in body:
        if isinstance(node, ast.Assign):
            assert not [call for call in ast.walk(node.value) if isinstance(call, ast.Call)], ast.unparse(node)


# ------------------------------------------------------------------------------------------------------------------ flags


def test_a_flag_has_one_type_in_all_scripts():
    """Style: flags with one name share type, choices and number of values."""
    for left, right in itertools.combinations(SCRIPTS, 2):
        ours, theirs = flags_of(left), flags_of(right)
        for flag in ours.keys() & theirs.keys():
            for what in ('type', 'choices', 'nargs', 'const', 'option_strings'):
                assert getattr(ours[flag], what) == getattr(theirs[flag], what), f'--{flag}: {what} of {right.name}'
            assert type(ours[flag]) is type(theirs[flag]), f'--{flag}: {right.name}'


def test_a_flag_has_one_help_text_in_all_scripts():
    """Style: flags with one name share their help; those that cannot are listed, and no others."""
    differing = {flag for left, right in itertools.combinations(SCRIPTS, 2)
                 for flag in flags_of(left).keys() & flags_of(right).keys()
                 if flags_of(left)[flag].help != flags_of(right)[flag].help}
    assert differing == OWN_HELP


def test_defaults_that_differ_between_scripts_are_in_the_papers_table():
    """Style: a default differs between scripts only where the paper's table says so."""
    for left, right in itertools.combinations(SCRIPTS, 2):
        ours, theirs = flags_of(left), flags_of(right)
        for flag in ours.keys() & theirs.keys():
            if ours[flag].default != theirs[flag].default:
                assert {left.name, right.name} <= PAPER_DEFAULTS.get(flag, {}).keys(), f'--{flag}: {left.name}, {right.name}'


@pytest.mark.parametrize(('flag', 'command'), [(flag, command) for flag, row in PAPER_DEFAULTS.items() for command in row])
def test_defaults_are_the_papers(flag, command):
    """Supplement 1.1 and Table 1: without flags, training gets the paper's value."""
    value, expected = getattr(resolved(command), flag), PAPER_DEFAULTS[flag][command]
    assert value == expected and type(value) is type(expected)


@each_script
def test_every_flag_of_optimisation_and_augmentation_is_in_the_papers_table(path):
    """Style: the table is complete; a new hyper-parameter comes with the paper's value."""
    for group in MODULES[path.name].get_args_parser()._action_groups:
        if group.title in ('optimisation', 'augmentation'):
            for action in group._group_actions:
                assert path.name in PAPER_DEFAULTS.get(action.dest, {}), f'--{action.dest}'


@each_script
def test_eight_processes_make_the_papers_batch(path):
    """All recipes: 8 x 256 x 2 = 4096, 8 x 128 = 1024, 8 x 8 = 64 and 8 x 4 = 32."""
    args = MODULES[path.name].get_args_parser().parse_args([])
    assert 8 * args.batch_size * args.accum_iter == MODULES[path.name].PAPER_BATCH == PAPER_BATCH[path.name]


@each_script
def test_flags_are_snake_case_with_help_and_without_abbreviation(path):
    """Style: MAE's names, no string booleans, no abbreviations, help for every flag, real defaults printed."""
    parser = MODULES[path.name].get_args_parser()
    assert parser.allow_abbrev is False
    assert parser.formatter_class.__name__ == 'ArgumentDefaultsHelpFormatter'
    for flag, action in flags_of(path).items():
        assert re.fullmatch(r'[a-z][a-z0-9_]*', flag)
        assert set(action.option_strings) <= {f'--{flag}', f'--no-{flag}'}
        assert (action.help or '').strip(), f'--{flag} has no help'
        assert action.type is not bool and set(action.choices or ()).isdisjoint({'true', 'false', 'True', 'False'})


@each_script
def test_argument_groups_stand_in_one_order(path):
    """Style: distillation first, it is the paper; then model, optimisation, augmentation, data, run."""
    groups = MODULES[path.name].get_args_parser()._action_groups
    titles = [group.title for group in groups if group._group_actions][1:]  # without argparse's own --help
    assert titles == [title for title in GROUPS if title in titles]
    assert titles[0] == 'distillation'
    assert [action.dest for action in groups[0]._group_actions + groups[1]._group_actions] == ['help']


def reads_of_args(*sources):
    """(names read as `args.<name>` or `self.args.<name>`, names read by `getattr(args, ...)`), outside the parser.

    Writing one does not count.
    """
    found, optional = set(), set()
    for source in sources:
        tree = ast.parse(source)
        tree.body = [node for node in tree.body if getattr(node, 'name', '') != 'get_args_parser']
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and \
                    ast.unparse(node.value) in ('args', 'self.args'):
                found.add(node.attr)
            by_name = re.fullmatch(r"getattr\((?:self\.)?args, '(\w+)'.*\)", ast.unparse(node))
            optional |= {by_name[1]} if by_name else set()
    return found, optional


def dead_flags(flags, *sources):
    return sorted(set(flags).difference(*reads_of_args(*sources)))


@each_script
def test_every_flag_is_read(path):
    """Style: a flag that nobody reads is deleted (the authors' code carries ten)."""
    assert not dead_flags(flags_of(path), path.read_text(), (ROOT / 'models.py').read_text())


def test_the_search_for_dead_flags_finds_them():
    """The check above can fail: written, declared or mentioned is not read."""
    source = '''
def get_args_parser():
    args.declared = args.declared or 1
def main(args):
    args.written = 3
    print('args.mentioned', other.args.foreign)  # args.commented
    return args.alive, self.args.kept, getattr(args, 'optional', 0)
'''
    flags = ['declared', 'written', 'mentioned', 'foreign', 'commented', 'alive', 'kept', 'optional']
    assert dead_flags(flags, source) == ['commented', 'declared', 'foreign', 'mentioned', 'written']


@each_script
def test_every_argument_that_is_read_exists(path):
    """A name read from args is a flag, or set by start_run: a misspelt one would fail hours into a run."""
    known = {*flags_of(path), 'rank', 'world_size', 'distributed', *models.PROVENANCE}
    assert reads_of_args(path.read_text())[0] <= known


# -------------------------------------------------------------------------------------------------------------- no litter


def unused_imports(source):
    tree = ast.parse(source)
    imported = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imported |= {(alias.asname or alias.name).split('.')[0]: node.lineno for alias in node.names}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return sorted(set(imported) - used)


@pytest.mark.parametrize('path', SOURCES + TESTS, ids=lambda path: path.name)
def test_every_import_is_used(path):
    """Style: no unused import."""
    assert not unused_imports(path.read_text())


def test_the_search_for_unused_imports_finds_them():
    """The check above can fail, for each form of an import."""
    source = 'import os.path\nimport numpy as np\nfrom dis import dis\nfrom a import b as c, d\nprint(os.sep, d, x.dis)'
    assert unused_imports(source) == ['c', 'dis', 'np']


def litter(source):
    """Debugger calls, notes to oneself, and what looks like a key or token."""
    found = [ast.unparse(node) for node in ast.walk(ast.parse(source))
             if isinstance(node, ast.Call) and re.search(r'\b(breakpoint|set_trace|post_mortem)$', ast.unparse(node.func))]
    found += re.findall(r'^\s*(?:import|from)\s+(?:i?pdb|pudb|wandb|tensorboard)\b.*', source, re.M)
    found += re.findall('|'.join(('TO' + 'DO', 'FIX' + 'ME', r'\bX{3}\b')), source)
    found += re.findall(r'AKIA[0-9A-Z]{16}|gh[oprsu]_[A-Za-z0-9]{30,}|github_pat_\w{20,}|hf_[A-Za-z]{30,}|sk-[\w-]{20,}|'
                        r'xox[a-z]-[\w-]{10,}|AIza[\w-]{30,}|eyJ[\w-]{20,}\.[\w-]{20,}|-{5}BEGIN [A-Z ]*PRIVATE KEY', source)
    found += re.findall(r'(?i)(?:api_?key|secret|passw(?:or)?d|access_token)\s*[=:]\s*["\'][^"\'\s]{8,}["\']', source)
    return found


@pytest.mark.parametrize('path', SOURCES + TESTS, ids=lambda path: path.name)
def test_sources_hold_no_debugger_no_note_to_oneself_and_no_key(path):
    """Style: no debugger, nothing that looks like a key or token, no logging service."""
    assert not litter(path.read_text())


@pytest.mark.parametrize('line', [
    'break' + 'point()', 'import ' + 'pdb', 'x.set_' + 'trace()', 'from ' + 'wandb import init', '# TO' + 'DO: later',
    'print("FIX' + 'ME")', 'k = "AKIA' + 16 * 'A' + '"', 'k = "ghp' + '_' + 36 * 'a' + '"', 'k = "hf' + '_' + 34 * 'a' + '"',
    'api_' + 'key = "0123456789"', 'k = """-----BEGIN ' + 'RSA PRIVATE KEY"""'])
def test_the_search_for_litter_finds_it(line):
    """The check above can fail."""
    assert litter(line)


@each_source
def test_no_code_is_commented_out(path):
    """Style: comments give reasons; code that is not run is deleted."""
    for line in path.read_text().splitlines():
        comment = re.match(r'\s*#\s?(.*)', line)
        code = r'(import |from \S+ import|def \w+\(|print\(|if .*:$|for .* in .*:$|[\w.]+ = \w+\(.*\)$)'
        assert not (comment and re.match(code, comment[1])), line
