"""What README.md, docs/, the Makefile and the scripts' own headers say can be done, can be done."""
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

import benchmark

ROOT = Path(__file__).resolve().parents[1]
FORKS = ROOT / 'docs/forks/README.md'
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')), FORKS]
STAGES = [ROOT / 'generic_distill.py', *sorted(ROOT.glob('specific_distill_*.py'))]
PROGRAMS = [*STAGES, *sorted((ROOT / 'tools').glob('*.py'))]
# flags of programs that are not ours
FOREIGN = {
    '--nproc_per_node', '--nnodes', '--standalone', '--rdzv_backend', '--rdzv_id', '--rdzv_endpoint',
    '--max_restarts', '--signals_to_handle', '--shutdown_timeout', '--nodes', '--ntasks-per-node',
    '--gpus-per-node', '--cpus-per-task', '--time', '--requeue', '--signal', '--quiet',
    '--disable-pip-version-check', '--isolated', '--line-length', '--select', '--ignore', '--durations'}
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
def known(parsers):
    """Every flag that can be given to one of our programs, to their forks, or to those that start them."""
    forks = {flag for diff in FORKS.parent.glob('*.diff')
             for flag in re.findall(r"^\+.*add_argument\('(--\w+)'", diff.read_text(), re.M)}
    return FOREIGN | forks | {flag for parser in parsers.values() for flag in parser._option_string_actions}


@pytest.fixture(scope='module', params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request):
    return request.param


@pytest.fixture(scope='module')
def readme():
    return (ROOT / 'README.md').read_text()


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


# ---- flags and commands --------------------------------------------------------------------------


def test_every_flag_that_a_page_names_exists(page, known):
    """A flag that is named can be given to one of the programs."""
    assert not set(re.findall(FLAG, page.read_text())) - known


def test_every_flag_that_the_makefile_gives_exists(makefile, known):
    """An experiment would otherwise stop at its first command, on the machine that was paid for."""
    assert not set(re.findall(FLAG, makefile)) - known


def test_every_flag_that_a_help_text_or_header_names_exists(parsers, known):
    for name, parser in parsers.items():
        header = re.match(r'"""(.*?)"""', (ROOT / name).read_text(), re.S)[1]
        helps = [action.help or '' for action in parser._actions]
        text = ' '.join([header, parser.description or '', *helps])
        assert not set(re.findall(FLAG, text)) - known, name


def test_every_command_of_a_page_is_accepted(page):
    """Each command that is shown parses, with its values. Those of forks: tests/test_forks.py."""
    if page == FORKS:
        return
    for name, words in program_calls(code_of(page.read_text())):
        parse(load_parser(ROOT / name), words)


def test_the_readme_shows_a_command_of_each_stage(readme):
    shown = {name for name, _ in program_calls(code_of(readme))}
    assert {path.name for path in STAGES} <= shown


def test_every_command_of_a_header_is_accepted():
    """The commands in the first lines of scripts and tools can be copied."""
    count = 0
    for path in PROGRAMS:
        header = re.match(r'"""(.*?)"""', path.read_text(), re.S)[1]
        for name, words in program_calls(re.sub(r'\s*\\\n\s*', ' ', header).splitlines()):
            parse(load_parser(ROOT / name), words.rstrip('.`'))
            count += 1
    assert count >= 6


# ---- Makefile ------------------------------------------------------------------------------------


def test_every_make_target_that_a_page_names_exists(page, makefile):
    words = list(made_of(code_of(page.read_text())))
    assert {word for word in words if '=' not in word} <= targets_of(makefile)
    assert {word.split('=')[0] for word in words if '=' in word} <= variables_of(makefile)


def test_every_make_target_that_the_makefile_names_exists(makefile):
    """Its header, .PHONY, `$(MAKE)` and the variables given to them."""
    header = re.findall(r'^#\s+(make .*?)(?:\s{2,}.*)?$', makefile, re.M)
    phony = re.search(r'^\.PHONY:(.*)', makefile.replace('\\\n', ' '), re.M)[1].split()
    named = [*made_of(header), *phony, *re.findall(r'\$\(MAKE\) ([a-z][\w-]*)', makefile)]
    assert len(named) > 5
    assert {word for word in named if '=' not in word} <= targets_of(makefile)
    assert {word.split('=')[0] for word in named if '=' in word} <= variables_of(makefile)


def test_make_help_lists_every_public_target(makefile):
    documented = set(re.findall(r'^([a-z][\w-]*):.*## \S', makefile, re.M))
    assert targets_of(makefile) - documented <= {'data', 'coco', 'ade'}


def test_every_program_that_the_makefile_starts_exists(makefile):
    started = set(re.findall(r'(?<![\w/])(?:tools/)?\w+\.py\b', makefile))
    assert {path.name for path in STAGES} <= started
    assert all((ROOT / path).is_file() for path in started)


# ---- files and links -----------------------------------------------------------------------------


def test_every_python_file_that_a_page_names_exists(page, readme):
    """But for the copy that the README makes as an example of a fork."""
    copies = re.findall(r'^cp \S+ (\w+\.py)$', readme, re.M)
    assert len(copies) == 1
    code = ' '.join(code_of(page.read_text()))
    named = set(re.findall(r'(?<![\w/.-])(?:tools/|tests/)?\w+\.py\b', code))
    assert not [path for path in named - set(copies) if not (ROOT / path).is_file()]


def test_every_relative_link_and_picture_exists(page):
    text = re.sub(r'^```.*?^```', '', page.read_text(), flags=re.S | re.M)
    headings = [heading.strip().lower() for heading in re.findall(r'^#+ (.*)', text, re.M)]
    anchors = {re.sub(r'[^\w -]', '', heading).replace(' ', '-') for heading in headings}
    targets = re.findall(r'\]\(([^)\s]+)', text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for target in targets:
        if not re.match(r'https?://', target):
            path, _, fragment = target.partition('#')
            assert not path or (page.parent / path).exists(), target
            assert path or fragment in anchors, target


def test_the_readme_links_every_page_of_docs(readme):
    assert all(str(path.relative_to(ROOT)) in readme for path in PAGES[1:])


def test_the_packages_that_the_readme_names_are_the_required_ones(readme):
    required = re.findall(r'^([a-z]+)', (ROOT / 'requirements.txt').read_text(), re.M)
    section = readme.split('## Install')[1].split('\n## ')[0]
    assert required and all(name in section for name in required)
