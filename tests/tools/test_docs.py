"""Files, options, settings and names in README and docs exist, and their Python examples run."""
import ast
import importlib
import importlib.util
import itertools
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from file_server import saved, serving
from mmengine.config import Config

from mmlocalmamba import backbones, create_model, directions, layers, registry, search
from mmlocalmamba.weights import to_official

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', ROOT / 'SECURITY.md', ROOT / 'configs/README.md',
         *sorted((ROOT / 'docs').glob('*.md'))]
CONFIGS = {path.stem for path in (ROOT / 'configs').glob('*.py')}
CONFIG = r'[\w{},*-]+_(?:in1k|coco|ade20k-512x512|digits)\b'
OPTION = r'(?<![\w-])--[a-z][a-z_-]*'
# Options of programs that are not installed here.
DOCKER_AND_SLURM = {'--build-arg', '--build-context', '--cap-drop', '--ipc', '--read-only', '--shm-size', '--signal',
                    '--user'}
# Options of mmpretrain's vis_cam.
OTHERS = {'--vit-like'}
RESEARCH = sorted((ROOT / 'research').glob('*.md'))
# Endings of the files that may name a page.
TEXT = {'.py', '.sh', '.yml', '.toml', '.txt', '.cpp', '.h', '.js', '.html', '.css', '.ipynb', '.in'}
# Folders of scripts. research/ may be missing.
SCRIPTS = [name for name in ('tools', 'research', 'tests/stress', 'tests/systems', 'docs/demo')
           if (ROOT / name).is_dir()]
PACKAGES = {'mmpretrain': 'mmpretrain', 'mmdet': 'mmdet', 'mmdetection': 'mmdet', 'mmsegmentation': 'mmseg'}
each_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def expand(pattern):
    """Return the names of a pattern with braces: a{b,c} -> ab, ac."""
    parts = [part.split(',') if index % 2 else [part] for index, part in enumerate(re.split(r'{(.+?)}', pattern))]
    return [''.join(choice) for choice in itertools.product(*parts)]


def without_examples(text):
    """Remove files of the reader's own project, which begin with a comment that names them."""
    return re.sub(r'```python\n# my_project/.*?```', '', text, flags=re.S)


def anchors(path):
    """Return the anchors that GitHub and MyST make from headings."""
    titles = re.findall(r'^#+ (.+)$', path.read_text(), flags=re.M)
    return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


@pytest.mark.parametrize('page', [*PAGES, *RESEARCH, ROOT / 'CHANGELOG.md', ROOT / 'docs/quickstart.ipynb'],
                         ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page):
    text = without_examples(page.read_text())
    for target, anchor in re.findall(r'\]\((?!https?:)([^)#]*)#?([^)]*)\)', text):
        path = (page.parent / target).resolve() if target else page
        if 'research' in path.relative_to(ROOT).parts[:1] and 'research' not in SCRIPTS:
            continue
        assert path.exists(), f'link to {target}'
        assert not anchor or anchor in anchors(path), f'link to {target}#{anchor}'
    folders = '|'.join([*SCRIPTS, 'requirements', 'tests', 'configs/_base_', 'mmlocalmamba'])
    for name in re.findall(rf'(?<![\w/])(?:{folders})/[\w/{{}},-]+\.(?:py|sh|txt|csv)\b', text):
        for path in expand(name):
            assert (ROOT / path).is_file(), path
    for pattern in re.findall(rf'(?:`|configs/)(?!to_coco\.py)({CONFIG})', text):
        for name in expand(pattern):
            assert name in CONFIGS or '*' in name, f'configuration {name}'


def texts():
    """Yield every text file that is not a page: code, build files, configurations."""
    folders = ('mmlocalmamba', 'tools', 'research', 'configs', 'docker', 'requirements', 'tests', 'docs', '.github')
    built = {'.mim', '_build', 'node_modules', '__pycache__'}
    for path in itertools.chain(ROOT.glob('*'), *((ROOT / name).rglob('*') for name in folders)):
        if path.is_file() and not built & set(path.parts) and (
                path.suffix in TEXT or path.name in ('Dockerfile', 'Makefile')):
            yield path


def test_code_names_pages_that_exist():
    """Messages, docstrings and comments send the reader to pages, with anchors as in links."""
    found = {(path, *name) for path in texts()
             for name in re.findall(r'(?<![\w./-])((?:docs|research)/[\w-]+\.md)(?:#([\w-]+))?', path.read_text())}
    assert len({path.name for path, *_ in found}) > 10
    wrong = [f'{path.relative_to(ROOT)}: {name}#{anchor}' for path, name, anchor in found
             if ('research' in SCRIPTS or not name.startswith('research/'))
             and not ((ROOT / name).is_file() and (not anchor or anchor in anchors(ROOT / name)))]
    assert not wrong


def test_the_design_names_every_module():
    page = (ROOT / 'docs/design.md').read_text()
    modules = [path for path in (ROOT / 'mmlocalmamba').rglob('*.py')
               if not {'.mim', 'stand_ins'} & set(path.parts) and path.stem != '__init__']
    assert not [path.stem for path in modules if not re.search(rf'(?<![\w-]){path.stem}(?![\w-])', page)]
    drawing = page.split('```')[1]
    assert set(re.findall(r'(\w+)\.py\b', drawing)) <= {path.stem for path in (ROOT / 'mmlocalmamba').rglob('*.py')}


def test_pages_with_commands_say_how_to_enter_the_environment():
    pages = [page for page in PAGES if '```bash' in page.read_text()
             and page.name not in ('CONTRIBUTING.md', 'index.md')]
    assert len(pages) > 7
    assert not [page.name for page in pages if 'source .venv/bin/activate' not in page.read_text()]


def test_the_book_is_short():
    """What is only history or a proof for specialists belongs to research/ or to the changelog."""
    pages = sorted((ROOT / 'docs').glob('*.md'))
    assert len(pages) <= 16 and sum(len(page.read_text().split()) for page in pages) <= 20_000
    assert len((ROOT / 'README.md').read_text().splitlines()) <= 100


def test_no_page_has_the_name_of_one_of_sphinx():
    """Sphinx's search page would replace a page of that name."""
    assert not {path.stem for path in PAGES} & {'search', 'genindex', 'py-modindex'}


# ---- commands ----

def commands(page):
    """Return lines of code blocks, without comments, and code in sentences."""
    text = without_examples(page.read_text()).replace('\\\n', ' ')
    blocks = re.findall(r'^```bash\n(.*?)^```|^((?:    \S.*\n)+)', text, flags=re.S | re.M)
    lines = ''.join(itertools.chain(*blocks)).splitlines()
    sentences = re.sub(r'^```.*?^```', '', text, flags=re.S | re.M)
    return [line.split(' #')[0].strip() for line in lines] + [
        ' '.join(code.split()) for code in re.findall(r'`([^`]+)`', sentences)]


@cache
def options_of(script):
    """Return the options in the text of a script, and of modules that it imports from the folders of scripts."""
    text = script.read_text()
    if script.suffix == '.py':
        modules = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
        text += ''.join(path.read_text() for folder in {script.parent, ROOT / 'tools'} for path in folder.glob('*.py')
                        if path.stem in modules)
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
    return own | options_of(script_of(package, command))


def script_of(package, name):
    folder = Path(importlib.util.find_spec(PACKAGES[package]).origin).parent / '.mim' / 'tools'
    return min(folder.rglob(f'{name}.py'), key=lambda path: len(path.parts))


@cache
def every_option():
    known = options_of_torchrun() | options_of(ROOT / 'mmlocalmamba/__main__.py')
    for folder, ending in itertools.product(SCRIPTS, ('py', 'sh')):
        for script in (ROOT / folder).rglob(f'*.{ending}'):
            known |= options_of(script)
    for command, package in itertools.product(('train', 'test'), PACKAGES):
        known |= options_of_mim(command, package)
    return known


@each_page
def test_options_exist(page):
    makefile = (ROOT / 'Makefile').read_text()
    for command in commands(page):
        # The options of a script end at the next script: torchrun OPTIONS tools/train.py OPTIONS.
        scripts = rf'(?:{"|".join(SCRIPTS)})/[\w/]+\.(?:py|sh)'
        program = rf'(?<![\w/])(?:torchrun|{scripts}|mim (?:train|test|run|search|download|install)(?: mm\w+)?)'
        for name, arguments in re.findall(rf'({program})(?=\s|$)(.*?)(?={program}\s|$)', command):
            if name == 'torchrun' or name == 'tools/launch.py':
                known = options_of_torchrun()
            elif name.startswith('mim '):
                _, verb, package, *_ = [*name.split(), 'mmlocalmamba']
                known = options_of_mim(verb, package)
                if verb == 'run' and package in PACKAGES and arguments:  # a script of the package
                    known = known | options_of(script_of(package, arguments.split()[0]))
            else:
                known = options_of(ROOT / name)
            for option in re.findall(OPTION, arguments):
                assert option in known | {'--help'}, f'{name} has no {option}: {command}'
        if command.startswith('--') and 'research' in SCRIPTS:  # pages name options of its scripts
            assert re.match(OPTION, command)[0] in every_option() | DOCKER_AND_SLURM | OTHERS, command
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
    """Keys of --cfg-options exist, because MMEngine would add a misspelt key without an error."""
    examples = ['localvmamba-t_8xb128_in1k', 'mask-rcnn_localvmamba-t_1x_coco', 'localvim-nano_digits',
                'upernet_localvmamba-t_8xb2-160k_ade20k-512x512']
    for command in commands(page):
        named = [name for name in re.findall(CONFIG, command) if name in CONFIGS]
        for key in re.findall(r'(?<![\w.-])([a-z]\w*(?:\.\w+)+)=', command):
            parents = key.split('.')[:-1]
            assert any(has(load(name), parents) for name in named or examples), f'{key} in {command}'


# ---- Python ----

def exists(name):
    """Return True if a dotted name is a module, an attribute of one, or a type in our registries."""
    parts = name.split('.')
    for end in range(len(parts), 0, -1):
        try:
            value = importlib.import_module('.'.join(parts[:end]))
        except ModuleNotFoundError as error:
            if not str(error.name).startswith('mmlocalmamba'):
                return True  # it needs a package that is not installed here
            continue
        for part in parts[end:]:
            value = getattr(value, part, None)
        registries = (registry.MODELS, registry.HOOKS, registry.LOOPS, registry.OPTIM_WRAPPERS,
                      registry.OPTIM_WRAPPER_CONSTRUCTORS, registry.WEIGHT_INITIALIZERS)
        return value is not None or len(parts) == 2 and any(known.get(parts[1]) for known in registries)
    return False


@each_page
def test_tests_exist(page):
    """Tests that a page names exist, as test_x.py::test_y or, later in the row, as ::test_z."""
    files = [path for folder in ('tests', 'research/tests') for path in (ROOT / folder).rglob('test_*.py')]
    names, tests = {path.name for path in files}, '\n'.join(path.read_text() for path in files)
    text = page.read_text()
    if 'research' not in SCRIPTS and 'research/' in text:
        pytest.skip('the page names tests of research/, which is missing')
    assert set(re.findall(r'\btest_\w+\.py', text)) <= names
    assert not [name for name in re.findall(r'::(test_\w+)', text) if f'def {name}(' not in tests]


@each_page
def test_names_of_the_package_exist(page):
    names = set(re.findall(r'\bmmlocalmamba(?:\.[A-Za-z_]\w*)+', without_examples(page.read_text())))
    assert not [name for name in names if not exists(name) and not name.endswith(('.git', '.py'))]


def test_the_reference_is_complete():
    """docs/api.md lists what packages export, and what configurations can name."""
    listed = set(re.findall(r'^.. autoapi\w+:: (\S+)$', (ROOT / 'docs/api.md').read_text(), flags=re.M))
    listed = {name.rsplit('.', 1)[-1] for name in listed}
    for known in (registry.MODELS, registry.HOOKS, registry.LOOPS, registry.OPTIM_WRAPPERS,
                  registry.OPTIM_WRAPPER_CONSTRUCTORS):
        known.import_from_location()
        assert set(known.module_dict) <= listed
    for package in (backbones, layers, search):
        assert set(package.__all__) <= listed


@pytest.mark.parametrize('page', ['README.md', 'docs/scans.md', 'docs/extend.md'])
def test_python_runs(page, monkeypatch, tmp_path):
    """Blocks that inherit are configurations and are read as such.

    tests/ops/test_stand_ins.py runs those of other Mamba code.
    """
    monkeypatch.setattr(directions, '_SCANS', dict(directions._SCANS))  # examples register directions
    text = (ROOT / page).read_text().partition('## Other Mamba code\n')[0]
    names, blocks = {}, re.findall(r'```python\n(.*?)```', text, flags=re.S)
    for block in blocks:
        if re.search('^_base_ = ', block, flags=re.M):
            (tmp_path / 'mine.py').write_text(block)
            Config.fromfile(tmp_path / 'mine.py')
        else:
            exec(block, names)
    assert blocks
    for name in set(directions._SCANS) - {'h', 'v', 'w<K>', 'diag', 'zigzag', 'hilbert'}:
        assert len(directions.scan_index(name.replace('<K>', '3'), 5, 7)) == 35


def test_the_answer_in_the_readme():
    """README's picture is a three, and its last line prints that."""
    block = re.search(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), flags=re.S)[1]
    assert len([line for line in block.splitlines() if not re.match('import |from |$', line)]) <= 5
    names = {}
    exec(block, names)
    assert names['answer'] == 3


# What the examples of CONTRIBUTING.md make possible.
ADDED = """
import os
from mmlocalmamba import create_model, list_models
from mmlocalmamba.directions import scan_index
from mmlocalmamba.ops import available_backends

assert scan_index('upwards', 2, 3).tolist() == [3, 4, 5, 0, 1, 2]
assert scan_index('upwards_flip', 2, 3).tolist() == [2, 1, 0, 5, 4, 3]
torch.manual_seed(0)
model = create_model('localvmamba_pico', features_only=True, directions=['h', 'upwards', 'upwards_flip', 'w2'])
image, maps = torch.rand(1, 3, 64, 96), {}
assert available_backends(image)['mine'] is None
for backend in ('reference', 'mine'):
    os.environ['MMLOCALMAMBA_BACKEND'] = backend
    maps[backend] = model(image)
assert [x.shape[1] for x in maps['mine']] == [16, 32, 64, 128]
assert all(map(torch.equal, maps['mine'], maps['reference']))
sum(x.sum() for x in maps['mine']).backward()
assert 'localvmamba_pico' in list_models() and 'localvim_nano.theirs' in list_models(pretrained=True)
theirs = create_model('localvim_nano.theirs', pretrained=True)
torch.save(theirs.state_dict(), 'theirs.pth')
"""


def test_what_contributing_adds(tmp_path, monkeypatch):
    """The examples of its section "Add" work, in a process of their own: they change tables of the package."""
    section = (ROOT / 'CONTRIBUTING.md').read_text().split('\n## Add\n')[1].split('\n## ')[0]
    blocks = re.findall(r'```python\n(.*?)```', section, flags=re.S)
    assert len(blocks) == section.count('```') / 2 == 4
    weights = create_model('localvim_nano').state_dict()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.delenv('http_proxy', raising=False)
    with serving({'nano.ckpt': saved(dict(model=to_official(weights)[0]))}) as (address, asked):
        code = '\n'.join([*blocks, ADDED]).replace('https://example.org/nano.ckpt', f'{address}/nano.ckpt')
        done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert asked == ['nano.ckpt']
    loaded = torch.load(tmp_path / 'theirs.pth')
    assert all(torch.equal(value, weights[name]) for name, value in loaded.items())


def test_the_notebook_links_pages_and_names_what_it_needs():
    cells = json.loads((ROOT / 'docs/quickstart.ipynb').read_text())['cells']
    text = '\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown')
    targets = re.findall(r'\]\(([^)]+)\)', text)
    assert targets and not [target for target in targets if not (ROOT / 'docs' / target).is_file()]
    assert 'pip install jupyterlab' in text and 'pip install jupyterlab' in (ROOT / 'docs/install.md').read_text()


def test_printed_example():
    line, = (line for line in (ROOT / 'docs/scans.md').read_text().splitlines() if line.startswith('scan_index('))
    code, shown = line.split('#')
    assert eval(code, vars(directions)) == eval(shown)


# ---- quoted messages ----

# Messages of docs/faq.md that no Python file has: of Python, a linker, C++ or other projects.
NOT_IN_PYTHON = {"No module named 'mmcv._ext'", "No module named 'pkg_resources'", 'undefined symbol',
                 'TypeError: NoneType takes no arguments', 'Found no NVIDIA driver', 'size mismatch for pos_embed',
                 'Expected u.is_cuda() to be true', 'selective_scan_cuda is not defined'}
# Beginnings of code in sentences that is no message.
CODE = ('mim ', 'pip ', 'source ', 'python ', 'bash ', 'make ', 'import ', 'export ', 'MMCV=', '--', '_base_ ')


def quoted_messages():
    """Return the messages that docs/faq.md quotes: code of several words in headings and sentences."""
    text = re.sub(r'^```.*?^```', '', (ROOT / 'docs/faq.md').read_text(), flags=re.S | re.M)
    return [code for code in (' '.join(code.split()) for code in re.findall(r'`([^`]+)`', text))
            if ' ' in code and not code.startswith(CODE)]


@cache
def strings(place):
    """Return the text of a Python file or of all below a folder, with literals that follow one another joined."""
    files = sorted(place.rglob('*.py')) if place.is_dir() else [place]
    text = '\n'.join(path.read_text(errors='replace') for path in files)
    return ' '.join(re.sub(r"""(['"])\s*\n\s*[rf]{0,2}['"]""", '', text).split())


def occurs(message, text):
    """Return True if a text has the words of a message in order. The source may fill in fewer than half of them."""
    words = [rf'(?:({re.escape(word)})|\S*{{[^{{}}]+}}\S*|%d\S*)' for word in message.split()]
    return any(sum(map(bool, match.groups())) > len(words) / 2 for match in re.finditer(' '.join(words), text))


def test_the_faq_quotes_messages_that_exist():
    places = [ROOT / 'mmlocalmamba', ROOT / 'tools', ROOT / 'requirements',
              *(Path(importlib.util.find_spec(name).origin) for name in ('mmdet', 'subprocess', 'torch.serialization')),
              Path(importlib.util.find_spec('mmengine').origin).parent]
    messages = set(quoted_messages())
    assert messages > NOT_IN_PYTHON
    assert not occurs('the backend does all scans', strings(places[0]))
    missing = [message for message in messages - NOT_IN_PYTHON if not all(
        any(occurs(part, strings(place)) for place in places) for part in filter(None, message.split('...')))]
    assert not missing
