"""What README.md, the Makefile and the scripts' own headers say can be done, can be done."""
import argparse
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import benchmark

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / 'README.md'
PROGRAMS = [ROOT / 'generic_distill.py', *sorted(ROOT.glob('specific_distill_*.py')), *sorted((ROOT / 'tools').glob('*.py'))]
# flags of programs that are not ours, by the word that starts them
FOREIGN = {'torchrun': {'--nproc_per_node', '--nnodes', '--standalone', '--rdzv_backend', '--rdzv_id', '--rdzv_endpoint',
                         '--max_restarts', '--signals_to_handle', '--shutdown_timeout'},
           'sbatch': {'--nodes', '--ntasks-per-node', '--gpus-per-node', '--cpus-per-task', '--time', '--requeue',
                       '--signal'},
           'pip': {'--quiet', '--disable-pip-version-check'},
           'ruff': {'--isolated', '--line-length', '--select', '--ignore'}, 'pytest': {'--durations'}}
FLAG = r'(?<![\w-])--[A-Za-z][\w-]*'


def load_parser(path):
    """The program's parser; programs of tools/ are no modules of a package."""
    spec = importlib.util.spec_from_file_location(f'docs_{path.stem}', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_args_parser()


@pytest.fixture(scope='module')
def parsers():
    return {path.relative_to(ROOT).as_posix(): load_parser(path) for path in PROGRAMS}


@pytest.fixture(scope='module')
def readme():
    return README.read_text()


@pytest.fixture(scope='module')
def makefile():
    return (ROOT / 'Makefile').read_text()


def code_of(text):
    """Fenced blocks and inline code of a Markdown text, as a list of strings with continued lines joined."""
    fenced = re.findall(r'^```\w*\n(.*?)^```', text, re.S | re.M)
    inline = re.findall(r'`([^`]+)`', re.sub(r'^```\w*\n.*?^```', '', text, flags=re.S | re.M))
    return [re.sub(r'\s*\\\n\s*', ' ', code) for code in fenced] + [code.replace('\n', ' ') for code in inline]


def commands_of(code):
    """Command lines in a piece of code, without their comments, split at && and ;."""
    for line in code.splitlines():
        for command in re.split(r'&&|;', re.sub(r'(^|\s)#.*', '', line)):
            yield command.strip()


def program_calls(texts):
    """(program, words behind it) for every command that names one of our programs and gives it words."""
    for text in texts:
        for command in commands_of(text):
            match = re.search(r'(?:^|\s)((?:tools/)?\w+\.py)\s+(\S.*)', command)
            if match and (ROOT / match[1]).is_file() and command.split()[0] not in ('cp', 'diff'):
                yield match[1], match[2]


class Refused(Exception):
    pass


def refuse(message):
    raise Refused(message)


def parse(parser, words):
    """argparse's verdict on a documented command line, as an exception in place of an exit.

    The benchmark hands what it does not know to the script of its --stage.
    """
    parser.error = refuse
    known, others = parser.parse_known_args(shlex.split(words))
    if others and hasattr(known, 'stage'):
        parse(load_parser(ROOT / f'{benchmark.SCRIPTS[known.stage]}.py'), shlex.join(others))
    elif others:
        refuse(f'unrecognized arguments: {others}')
    return known


def targets_of(makefile):
    return set(re.findall(r'^([a-z][\w-]*):(?!=)', makefile, re.M))


def variables_of(makefile):
    return set(re.findall(r'^\s*(?:export )?([A-Z][A-Z0-9_]*)\s*[?:+]?=', makefile, re.M))


def made_of(texts):
    """(target or variable words) of every `make ...` in code."""
    for text in texts:
        for command in commands_of(text):
            match = re.match(r'(?:\$ )?make((?:\s+\S+)*)$', command)
            if match:
                yield from (word for word in shlex.split(match[1]) if word != '...' and not word.startswith('-'))


# ------------------------------------------------------------------------------------------------------------------ flags


def test_every_flag_that_the_readme_names_exists(readme, parsers):
    """README: a flag that is named can be given to one of the programs (or is torchrun's)."""
    known = {option for parser in parsers.values() for option in parser._option_string_actions}
    known |= {flag for flags in FOREIGN.values() for flag in flags}
    named = set(re.findall(FLAG, readme))
    assert len(named) >= 8
    assert not named - known


def test_every_flag_that_the_makefile_gives_exists(makefile, parsers):
    """Makefile: an experiment would otherwise stop at its first command, on the machine that was paid for."""
    known = {option for parser in parsers.values() for option in parser._option_string_actions}
    known |= {flag for flags in FOREIGN.values() for flag in flags}
    assert not set(re.findall(FLAG, makefile)) - known


def test_every_flag_that_a_help_text_or_header_names_exists(parsers):
    """Scripts: help texts and headers name flags of this or another program."""
    known = {option for parser in parsers.values() for option in parser._option_string_actions}
    known |= FOREIGN['torchrun']
    for name, parser in parsers.items():
        header = re.match(r'"""(.*?)"""', (ROOT / name).read_text(), re.S)[1]
        text = ' '.join([header, parser.description or '', *(action.help or '' for action in parser._actions)])
        assert not set(re.findall(FLAG, text)) - known, name


def test_every_command_of_the_readme_is_accepted(readme):
    """README: each command that it shows parses, with its values."""
    calls = list(program_calls(code_of(readme)))
    assert {'generic_distill.py', 'specific_distill_cls.py'} <= {name for name, _ in calls}
    for name, words in calls:
        parse(load_parser(ROOT / name), words)


def test_every_command_of_a_header_is_accepted():
    """Scripts: the commands in their first lines can be copied."""
    count = 0
    for path in PROGRAMS:
        header = re.match(r'"""(.*?)"""', path.read_text(), re.S)[1]
        for name, words in program_calls(re.sub(r'\s*\\\n\s*', ' ', header).splitlines()):
            parse(load_parser(ROOT / name), words.rstrip('.`'))
            count += 1
    assert count >= 6


def test_a_command_that_a_parser_refuses_is_noticed():
    """The checks above can fail: an unknown flag, a value of the wrong kind, an abbreviation."""
    text = ('```bash\ntorchrun --nproc_per_node=8 generic_distill.py --data_path X \\\n    --no_such_flag 3  # why\n'
            'make x && python specific_distill_cls.py --epochs two\n```\nand `generic_distill.py --data X`')
    calls = list(program_calls(code_of(text)))
    assert calls == [('generic_distill.py', '--data_path X --no_such_flag 3'),
                     ('specific_distill_cls.py', '--epochs two'), ('generic_distill.py', '--data X')]
    for name, words in calls:
        with pytest.raises((Refused, argparse.ArgumentError)):
            parse(load_parser(ROOT / name), words)


# --------------------------------------------------------------------------------------------------------------- Makefile


def test_every_make_target_that_the_readme_names_exists(readme, makefile):
    """README: make targets and the variables given to them."""
    words = list(made_of(code_of(readme)))
    assert {'demo', 'test'} <= set(words)
    assert {word for word in words if '=' not in word} <= targets_of(makefile)
    assert {word.split('=')[0] for word in words if '=' in word} <= variables_of(makefile)


def test_every_make_target_that_the_makefile_names_exists(makefile):
    """Makefile: its header, .PHONY, `$(MAKE)` and the variables of `make help`."""
    header = re.findall(r'^#\s+(make .*?)(?:\s{2,}.*)?$', makefile, re.M)
    named = [*made_of(header), *re.search(r'^\.PHONY:(.*)', makefile.replace('\\\n', ' '), re.M)[1].split(),
             *re.findall(r'\$\(MAKE\) ([a-z][\w-]*)', makefile)]
    assert len(named) > 5
    assert {word for word in named if '=' not in word} <= targets_of(makefile)
    assert {word.split('=')[0] for word in named if '=' in word} <= variables_of(makefile)


def test_make_help_lists_every_public_target(makefile):
    """Makefile: `help` shows the targets that have a text; all but the data checks have one."""
    documented = set(re.findall(r'^([a-z][\w-]*):.*## \S', makefile, re.M))
    assert targets_of(makefile) - documented <= {'data', 'coco', 'ade'}
    tables = {f'reproduce-{table}' for table in ('table2', 'table3', 'table4', 'table5', 'ade20k', 'all')}
    assert {'help', 'demo', 'test', 'lint', 'diff', 'results', 'clean', *tables} <= documented


def test_every_program_that_the_makefile_starts_exists(makefile):
    """Makefile: paths of scripts and tools."""
    started = set(re.findall(r'(?<![\w/])(?:tools/)?\w+\.py\b', makefile))
    assert {'generic_distill.py', 'specific_distill_cls.py', 'tools/results.py'} <= started
    assert all((ROOT / path).is_file() for path in started)


# ------------------------------------------------------------------------------------------------------- files and links


def test_every_file_that_the_file_map_names_exists(readme):
    """README, file map: each file is there, and each program is in the map."""
    section = re.search(r'^## Files.*?\n(.*?)^## ', readme, re.S | re.M)[1]
    cells = re.findall(r'^\|([^|]*)\|', section, re.M)
    named = [path for cell in cells for path in re.findall(r'`([^`]+)`', cell)]
    assert len(named) >= 5
    assert not [path for path in named if not (ROOT / path).exists()]
    programs = {path.relative_to(ROOT).as_posix() for path in [*PROGRAMS, ROOT / 'models.py']}
    assert not programs - set(named)


def test_every_function_that_the_file_map_names_exists(readme):
    """README, how to fork: the functions to change are where it says."""
    section = re.search(r'^## Files.*?\n(.*?)^## ', readme, re.S | re.M)[1]
    rows = [re.findall(r'`(\w+\.py)`', cell) + re.findall(r'`([a-z_]+_[a-z_]+)`', text)
            for cell, text in re.findall(r'^\|([^|]*)\|([^|]*)\|', section, re.M)]
    rows = [row for row in rows if len(row) > 1 and row[0].endswith('.py')]
    assert rows
    for name, *functions in rows:
        module = importlib.import_module(Path(name).stem)
        assert not [function for function in functions if not hasattr(module, function)]


def test_every_python_file_that_the_readme_names_exists(readme):
    """README: scripts and tools keep their names."""
    named = {path for code in code_of(readme) for path in re.findall(r'(?<![\w/.-])(?:tools/|tests/)?\w+\.py\b', code)}
    copies = {copy for code in code_of(readme) for copy in re.findall(r'^cp \S+ (\w+\.py)$', code, re.M)}
    assert len(copies) == 1 and not [path for path in named - copies if not (ROOT / path).is_file()]


def anchor(heading):
    """GitHub's anchor of a heading."""
    return re.sub(r'[^\w -]', '', heading.strip().lower()).replace(' ', '-')


def test_every_relative_link_resolves(readme):
    """README: links to files and to its own sections."""
    text = re.sub(r'^```.*?^```', '', readme, flags=re.S | re.M)
    anchors = {anchor(heading) for heading in re.findall(r'^#+ (.*)', text, re.M)}
    targets = re.findall(r'\]\(([^)\s]+)', text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    assert targets
    for target in targets:
        if re.match(r'https?://', target):
            continue
        path, _, fragment = target.partition('#')
        assert not path or (ROOT / path).exists(), target
        assert path or fragment in anchors, target


def test_every_requirement_that_the_readme_names_is_installed_by_its_file(readme):
    """README, install: the packages in its comments are those of the requirement files."""
    def packages(name):
        lines = (ROOT / name).read_text().splitlines()
        return {re.match(r'[\w-]+', line)[0].lower() for line in lines if line and line[0].isalpha()}

    runtime = re.search(r'-r requirements\.txt\s+#\s*(.*)', readme)[1]
    assert set(re.findall(r'[\w-]+', runtime.lower())) == packages('requirements.txt')
    tests = re.search(r'`requirements-dev\.txt` adds [^(]*\(([^)]*)\)', readme)[1]
    assert set(re.findall(r'[\w-]+', tests.lower())) == packages('requirements-dev.txt')


def test_no_placeholder_is_left(readme):
    """README: numbers enter with their command; a marker waiting for one is not a number."""
    assert not re.findall(r'@[A-Z]+@', readme)
