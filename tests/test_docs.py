"""README and docs: what they name exists, what they show in Python runs."""
import ast
import importlib
import importlib.util
import itertools
import re
from functools import cache
from pathlib import Path

import pytest
from mmengine.config import Config

from mmlocalmamba import backbones, layers, registry, scans, search

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', ROOT / 'SECURITY.md', *sorted((ROOT / 'docs').glob('*.md'))]
CONFIGS = {path.stem for path in (ROOT / 'configs').glob('*.py')}
CONFIG = r'[\w{},*-]+_(?:in1k|coco|ade20k-512x512|digits)\b'
OPTION = r'(?<![\w-])--[a-z][a-z_-]*'
# Their programs are not installed here.
DOCKER_AND_SLURM = {'--build-arg', '--build-context', '--cap-drop', '--ipc', '--read-only', '--shm-size', '--signal',
                    '--user'}
# Of globox, whose commands tests/test_pages.py runs.
GLOBOX = {'--img_ext'}
PACKAGES = {'mmpretrain': 'mmpretrain', 'mmdet': 'mmdet', 'mmdetection': 'mmdet', 'mmsegmentation': 'mmseg'}
each_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)


def expand(pattern):
    """Names of a pattern with braces: a{b,c} -> ab, ac."""
    parts = [part.split(',') if index % 2 else [part] for index, part in enumerate(re.split(r'{(.+?)}', pattern))]
    return [''.join(choice) for choice in itertools.product(*parts)]


def without_examples(text):
    """Files of the reader's own project begin with a comment that names them."""
    return re.sub(r'```python\n# my_project/.*?```', '', text, flags=re.S)


def anchors(path):
    """As GitHub and MyST make them from headings."""
    titles = re.findall(r'^#+ (.+)$', path.read_text(), flags=re.M)
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


@each_page
def test_named_files_exist(page):
    text = without_examples(page.read_text())
    for target, anchor in re.findall(r'\]\((?!https?:)([^)#]*)#?([^)]*)\)', text):
        path = page.parent / target if target else page
        assert path.exists(), f'link to {target}'
        assert not anchor or anchor in anchors(path), f'link to {target}#{anchor}'
    folders = 'tools|requirements|tests|configs/_base_|mmlocalmamba'
    for name in re.findall(rf'\b(?:{folders})/[\w/{{}},-]+\.(?:py|sh|txt)\b', text):
        for path in expand(name):
            assert (ROOT / path).is_file(), path
    for pattern in re.findall(rf'(?:`|configs/)({CONFIG})', text):
        for name in expand(pattern):
            assert name in CONFIGS or '*' in name, f'configuration {name}'


def test_no_page_has_the_name_of_one_of_sphinx():
    """Its search would take the place of docs/search.md."""
    assert not {path.stem for path in PAGES} & {'search', 'genindex', 'py-modindex'}


# ---- commands ----

def commands(page):
    """Lines of code blocks, without comments, and code in sentences."""
    text = without_examples(page.read_text()).replace('\\\n', ' ')
    blocks = re.findall(r'^```bash\n(.*?)^```|^((?:    \S.*\n)+)', text, flags=re.S | re.M)
    lines = ''.join(itertools.chain(*blocks)).splitlines()
    sentences = re.sub(r'^```.*?^```', '', text, flags=re.S | re.M)
    return [line.split(' #')[0].strip() for line in lines] + [
        ' '.join(code.split()) for code in re.findall(r'`([^`]+)`', sentences)]


@cache
def options_of(script):
    """What a script, and what it imports from its folder, spells like an option."""
    text = script.read_text()
    if script.suffix == '.py':
        modules = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
        text += ''.join(path.read_text() for path in script.parent.glob('*.py') if path.stem in modules)
    return set(re.findall(OPTION, text))


def options_of_torchrun():
    from torch.distributed.run import get_args_parser
    return {name for action in get_args_parser()._actions for name in action.option_strings}


def options_of_mim(command, package):
    pytest.importorskip('mim')
    own = {name for option in importlib.import_module(f'mim.commands.{command}').cli.params for name in option.opts}
    if command not in ('train', 'test'):
        return own
    if package == 'mmlocalmamba':
        return own | options_of(ROOT / f'tools/{command}.py')
    folder = Path(importlib.util.find_spec(PACKAGES[package]).origin).parent
    return own | options_of(folder / '.mim' / 'tools' / f'{command}.py')


@cache
def every_option():
    known = options_of_torchrun() | options_of(ROOT / 'mmlocalmamba/__main__.py')
    for script in itertools.chain((ROOT / 'tools').rglob('*.py'), (ROOT / 'tools').rglob('*.sh')):
        known |= options_of(script)
    for command, package in itertools.product(('train', 'test'), PACKAGES):
        known |= options_of_mim(command, package)
    return known


@each_page
def test_options_exist(page):
    makefile = (ROOT / 'Makefile').read_text()
    for command in commands(page):
        # Each script has the options up to the next one: torchrun OPTIONS tools/train.py OPTIONS.
        program = r'\b(?:torchrun|tools/[\w/]+\.(?:py|sh)|mim (?:train|test|run|search|download|install)(?: mm\w+)?)'
        for name, arguments in re.findall(rf'({program})(?=\s|$)(.*?)(?={program}\s|$)', command):
            if name == 'torchrun' or name == 'tools/launch.py':
                known = options_of_torchrun()
            elif name.startswith('mim '):
                _, verb, package, *_ = [*name.split(), 'mmlocalmamba']
                known = options_of_mim(verb, package)
            else:
                known = options_of(ROOT / name)
            for option in re.findall(OPTION, arguments):
                assert option in known | {'--help'}, f'{name} has no {option}: {command}'
        if command.startswith('--'):
            assert re.match(OPTION, command)[0] in every_option() | DOCKER_AND_SLURM | GLOBOX, command
        for target in re.findall(r'^(?:\w+=\S+ )*make (?:\w+=\S+ )*([a-z-]+)', command):
            assert re.search(rf'^{target}:', makefile, flags=re.M), command


def has(cfg, keys):
    for key in keys:
        try:
            cfg = cfg[int(key) if isinstance(cfg, list) else key]
        except (KeyError, IndexError, ValueError, TypeError):
            return False
    return True


@cache
def load(name):
    return Config.fromfile(ROOT / 'configs' / f'{name}.py')


@each_page
def test_settings_have_a_place(page):
    """KEY=VALUE of --cfg-options: MMEngine would make a new key of one that is misspelt."""
    examples = ['localvmamba-t_8xb128_in1k', 'mask-rcnn_localvmamba-t_1x_coco', 'localvim-nano_digits',
                'upernet_localvmamba-t_8xb2-160k_ade20k-512x512']
    for command in commands(page):
        named = [name for name in re.findall(CONFIG, command) if name in CONFIGS]
        for key in re.findall(r'(?<![\w.-])([a-z]\w*(?:\.\w+)+)=', command):
            parents = key.split('.')[:-1]
            assert any(has(load(name), parents) for name in named or examples), f'{key} in {command}'


# ---- Python ----

def exists(name):
    """Whether a dotted name is a module, something in one, or a type of our registries."""
    parts = name.split('.')
    for end in range(len(parts), 0, -1):
        try:
            value = importlib.import_module('.'.join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            value = getattr(value, part, None)
        registries = (registry.MODELS, registry.HOOKS, registry.LOOPS, registry.OPTIM_WRAPPERS,
                      registry.OPTIM_WRAPPER_CONSTRUCTORS, registry.WEIGHT_INITIALIZERS)
        return value is not None or len(parts) == 2 and any(known.get(parts[1]) for known in registries)
    return False


@each_page
def test_tests_exist(page):
    """Those that a page names, as test_x.py::test_y or, further on in the row, as ::test_z."""
    tests = '\n'.join(path.read_text() for path in (ROOT / 'tests').glob('test_*.py'))
    text = page.read_text()
    assert all((ROOT / 'tests' / name).exists() for name in re.findall(r'\btest_\w+\.py', text))
    assert not [name for name in re.findall(r'::(test_\w+)', text) if f'def {name}(' not in tests]


@each_page
def test_names_of_the_package_exist(page):
    names = set(re.findall(r'\bmmlocalmamba(?:\.[A-Za-z_]\w*)+', without_examples(page.read_text())))
    assert not [name for name in names if not exists(name) and not name.endswith(('.git', '.py'))]


def test_the_reference_is_complete():
    """What packages export, and what configurations can name."""
    listed = set(re.findall(r'^.. autoapi\w+:: (\S+)$', (ROOT / 'docs/api.md').read_text(), flags=re.M))
    listed = {name.rsplit('.', 1)[-1] for name in listed}
    for known in (registry.MODELS, registry.HOOKS, registry.LOOPS, registry.OPTIM_WRAPPERS,
                  registry.OPTIM_WRAPPER_CONSTRUCTORS):
        known.import_from_location()
        assert set(known.module_dict) <= listed
    for package in (backbones, layers, search):
        assert set(package.__all__) <= listed


@pytest.mark.parametrize('page', ['README.md', 'docs/scans.md', 'docs/own_project.md'])
def test_python_runs(page, monkeypatch, tmp_path):
    """Blocks that inherit are configurations, and read as such."""
    monkeypatch.setattr(scans, '_SCANS', dict(scans._SCANS))  # examples register directions
    names, blocks = {}, re.findall(r'```python\n(.*?)```', (ROOT / page).read_text(), flags=re.S)
    for block in blocks:
        if re.search('^_base_ = ', block, flags=re.M):
            (tmp_path / 'mine.py').write_text(block)
            Config.fromfile(tmp_path / 'mine.py')
        else:
            exec(block, names)
    assert blocks
    for name in set(scans._SCANS) - {'h', 'v', 'w<K>', 'diag', 'zigzag', 'hilbert'}:
        assert len(scans.scan_index(name.replace('<K>', '3'), 5, 7)) == 35


def test_printed_example():
    line, = (line for line in (ROOT / 'docs/scans.md').read_text().splitlines() if line.startswith('scan_index('))
    code, shown = line.split('#')
    assert eval(code, vars(scans)) == eval(shown)
