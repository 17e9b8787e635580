"""The wheel, the metadata for mim, and the install script's lists."""
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_models import USE

from mmlocalmamba import files
from mmlocalmamba.weights.released import NAMED

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / 'configs').glob('*.py'))
STACKS = ('openmmlab', 'onedl')
NO_WEIGHTS = 'no weights of it were released'


def requirements(name):
    """{package: version} of the pinned lines of a requirements file."""
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return dict(re.findall(r'^([\w.-]+)==([^\s;]+)', '\n'.join(lines), flags=re.M))


@pytest.fixture(scope='module')
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sdist')
    before = set(ROOT.iterdir())
    subprocess.run([sys.executable, '-c', 'import sys; from setuptools import build_meta\n'
                    'build_meta.build_sdist(sys.argv[1])', folder], cwd=ROOT, check=True, timeout=120,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert set(ROOT.iterdir()) == before, 'the build left files in the source tree'
    path, = folder.glob('mmlocalmamba-*.tar.gz')
    return path


@pytest.fixture(scope='module')
def wheel(sdist, tmp_path_factory):
    """As `pip install` of the sdist, or in a clone, builds it."""
    folder = tmp_path_factory.mktemp('wheel')
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter='data')
    tree, = folder.iterdir()
    before = set(tree.rglob('*'))
    subprocess.run(
        [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--disable-pip-version-check',
         '--no-deps', '--no-build-isolation', '--wheel-dir', folder, tree],
        check=True, timeout=600)
    assert set(tree.rglob('*')) == before, 'the build left files in the source tree'
    path, = folder.glob('mmlocalmamba-*.whl')
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.mark.slow
def test_wheel_holds_what_mim_looks_for(wheel):
    names = set(wheel.namelist())
    for file in ['tools/train.py', 'tools/test.py', 'tools/runner.py', 'model-index.yml',
                 'configs/metafile.yml', *CONFIGS]:
        assert f'mmlocalmamba/.mim/{file}' in names
    for file in (ROOT / 'configs' / '_base_').rglob('*.py'):
        assert f'mmlocalmamba/.mim/{file.relative_to(ROOT).as_posix()}' in names
    weights = [name for name in names if name.endswith('.safetensors')]
    packaged = files.packaged_names()
    assert sorted(weights) == [f'mmlocalmamba/weights/packaged/{name}.safetensors' for name in packaged] != []


@pytest.mark.slow
def test_wheel_holds_the_whole_package_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if '.dist-info/' not in name}
    assert {name.split('/')[0] for name in names} == {'mmlocalmamba'}
    assert not [name for name in names if name.endswith('.pyc')]
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'mmlocalmamba').rglob('*.py')
               if '.mim' not in path.parts}
    assert modules <= names
    # Users compile these.
    assert {'mmlocalmamba/deployment/csrc/openvino.cpp', 'mmlocalmamba/ops/csrc/interface.h',
            'mmlocalmamba/.mim/tools/deployment/classify.cpp'} <= names


@pytest.mark.slow
def test_wheel_metadata(wheel):
    name, = (name for name in wheel.namelist() if name.endswith('.dist-info/METADATA'))
    metadata = wheel.read(name).decode()
    version = re.search(r"^__version__ = '(.+)'$", (ROOT / 'mmlocalmamba/__init__.py').read_text(),
                        flags=re.M)[1]
    assert f'\nVersion: {version}\n' in metadata
    required = re.findall(r'^Requires-Dist: ([\w-]+)(?![^\n]*extra ==)', metadata, flags=re.M)
    assert sorted(required) == ['numpy', 'safetensors', 'torch']


def test_model_index():
    modelindex = pytest.importorskip('modelindex')
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    assert index.check(silent=True) == []
    assert sorted(model.config for model in index.models) == CONFIGS
    assert all(model.name == Path(model.config).stem for model in index.models)
    collections = {collection.name for collection in index.collections}
    for model in index.models:
        assert model.in_collection in collections
        assert {'Training Data', 'Task', 'Parameters'} <= set(model.metadata.data)
        # Figures of accuracy stand beside the file that they were reported for, and nowhere else.
        assert model.weights.startswith(('https://', 'mmlocalmamba://')) or model.weights == NO_WEIGHTS
        assert (model.weights == NO_WEIGHTS) == (not model.results)
    # The same addresses and figures as by name.
    metrics = {'Top 1 Accuracy': 'top-1'}
    listed = {model.name: (model.weights, {metrics.get(key, key): value for result in model.results
                                           for key, value in result.metrics.items()})
              for model in index.models if model.weights.startswith('https://')}
    assert listed == {weights.config: (weights.file, dict(weights.reported)) for weights in NAMED.values()
                      if not weights.packaged and weights.config in {model.name for model in index.models}}


def test_mim_search_and_download_read_the_metadata():
    """`mim search` filters and prints the metadata, and `mim download` looks up weights and configuration in it."""
    search = pytest.importorskip('mim.commands.search')
    table = search.convert2df(search.load(str(ROOT / 'model-index.yml')))
    assert sorted(table['config']) == CONFIGS
    found = search.filter_by_training_datasets(table, ['ImageNet-1k'])
    found = search.filter_by_conditions(found, 'parameters<8000000')
    assert {'localvim-t_8xb128_in1k', 'vim-t_8xb128_in1k'} <= set(found.index) and len(found) < len(table)
    row = search.select_by(table, shown_fields=['weight', 'config']).loc['localvmamba-s_8xb128_in1k']
    assert row['weight'].endswith('local_vssm_small.ckpt') and (ROOT / row['config']).is_file()


@pytest.mark.parametrize('config, there, output', [
    ('localvim-s_8xb128_in1k', None, NO_WEIGHTS),
    ('localvim-t_8xb128_in1k', 'local_vim_tiny.ckpt', 'Successfully dumped localvim-t_8xb128_in1k.py'),
])
@pytest.mark.slow
def test_mim_download(config, there, output, tmp_path):
    """One without weights says so; one with weights, here downloaded before, gets its configuration beside them."""
    pytest.importorskip('mim')
    if there:
        (tmp_path / there).touch()
    done = subprocess.run(
        [Path(sys.executable).with_name('mim'), 'download', 'mmlocalmamba', '--config', config, '--dest', tmp_path],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert output in done.stdout
    assert (done.returncode == 0) == bool(there) == (tmp_path / f'{config}.py').is_file()


def test_mim_finds_the_package():
    """In a clone (editable install) and in an installed wheel alike."""
    mim = pytest.importorskip('mim.utils')
    folder = Path(mim.get_installed_path('mmlocalmamba'))
    assert any((folder / tools / 'train.py').is_file() for tools in ('.mim/tools', 'tools'))


@pytest.mark.parametrize('stack', STACKS)
def test_pins_and_constraints_agree(stack):
    constraints = requirements(f'constraints-{stack}')
    for name in (stack, f'mim-{stack}', f'mmcv-{stack}', 'build', 'dev', 'deploy'):
        for package, version in requirements(name).items():
            assert constraints[package] == version, f'{package} in {name}.txt'
    assert constraints.get('mmcv-lite') == constraints.get('mmcv')  # two builds of one version
    # Both of these are bound to the build of torch.
    assert not [name for name in constraints if re.match(r'torch|triton|nvidia|cuda', name)]


@pytest.mark.parametrize('arguments, message', [
    (['PYTHON=/no/such/python'], 'is not a Python >= 3.10'),
    (['STACK=mmdet'], 'It is openmmlab or onedl'),
    (['MMCV=lite'], 'It is torchvision or compiled'),
    (['MMCV=torchvision', 'FORCE_CUDA=1'], 'Leave one of the two out'),
])
def test_install_script_says_what_is_wrong(arguments, message):
    done = subprocess.run(
        ['env', *arguments, 'bash', ROOT / 'tools/install.sh'], capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr


# ---- pip install, from each kind of file ----

# In an environment with the OpenMMLab packages, outside of the source tree.
_USE = '''
import sys, torch, mmlocalmamba
from mmengine.config import Config
from mmlocalmamba import config_path, ops
from mmlocalmamba.registry import MODELS
assert mmlocalmamba.__file__.startswith(sys.argv[1]), mmlocalmamba.__file__
cfg = Config.fromfile(config_path('localvmamba-nano_digits'))
out, = MODELS.build(cfg.model.backbone)(torch.rand(1, 3, 32, 32))
print(tuple(out.shape), ops.available_backends(torch.zeros(1, 8, 16))['cpu'])
'''


def pip_install(file, folder, **environment):
    subprocess.run([sys.executable, '-m', 'pip', 'install', '--quiet', '--disable-pip-version-check', '--no-deps',
                    '--no-build-isolation', '--target', folder, file],
                   check=True, timeout=600, env=dict(os.environ, **environment))


def use(folder):
    done = subprocess.run([sys.executable, '-c', _USE, str(folder)], cwd=folder, text=True, capture_output=True,
                          env=dict(os.environ, PYTHONPATH=str(folder)))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_sdist_holds_what_it_takes_to_build_test_and_join(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split('/', 1)[-1] for name in archive.getnames()}
    tracked = subprocess.run(['git', 'ls-files'], cwd=ROOT, text=True, capture_output=True)
    if tracked.returncode:
        pytest.skip('no git here')
    left_out = {name for name in tracked.stdout.splitlines() if (ROOT / name).exists()} - names
    # Of the repository, not of the package.
    assert {name.split('/')[0] for name in left_out} <= {'.ci', '.github', '.gitignore', '.pre-commit-config.yaml'}


@pytest.mark.slow
def test_pip_installs_the_sdist_and_its_wheel(wheel, tmp_path):
    """Where torch and a compiler are: with the CPU kernel, in an environment with OpenMMLab's packages."""
    pip_install(wheel.filename, tmp_path)
    assert use(tmp_path) == '(1, 256, 1, 1) None'


@pytest.mark.slow
def test_pip_installs_the_sdist_where_no_torch_is(sdist, tmp_path):
    """As in pip's isolated builds: without the CPU kernel, which says so when it is asked for."""
    (tmp_path / 'without' / 'torch').mkdir(parents=True)
    (tmp_path / 'without' / 'torch' / '__init__.py').write_text("raise ImportError('no torch')\n")
    pip_install(sdist, tmp_path / 'there', PYTHONPATH=str(tmp_path / 'without'))
    assert not list((tmp_path / 'there').rglob('*.so'))
    assert use(tmp_path / 'there').startswith('(1, 256, 1, 1) the extension is not built')


def declared(names):
    """Return names of the distributions that these need, themselves included."""
    found, left = set(), list(names)
    while left:
        name = canonicalize_name(left.pop())
        if name in found:
            continue
        found.add(name)
        left += [requirement.name for requirement in map(Requirement, metadata.requires(name) or ())
                 if requirement.marker is None or requirement.marker.evaluate(dict(extra=''))]
    return found


@pytest.mark.slow
def test_the_wheel_with_its_declared_dependencies_alone(wheel, tmp_path):
    """A virtual environment that holds nothing else builds, trains, loads by name and searches."""
    links, env = tmp_path / 'links', tmp_path / 'env'
    links.mkdir()
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', env], check=True)
    for name in declared(['torch', 'numpy', 'safetensors']):
        for file in metadata.files(name) or ():
            top = file.parts[0]
            source = Path(metadata.distribution(name).locate_file(top))
            if top not in ('..', '__pycache__') and source.exists() and not (links / top).exists():
                (links / top).symlink_to(source)
    packages, = env.glob('lib/python*/site-packages')
    (packages / 'links.pth').write_text(f'{links}\n')
    pip_install(wheel.filename, packages)
    code = ('import importlib.util\n'
            "assert not any(map(importlib.util.find_spec, ('mmengine', 'mmcv', 'timm', 'matplotlib', 'pytest')))\n")
    variables = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    done = subprocess.run([env / 'bin/python', '-W', 'ignore', '-c', code + USE, str(tmp_path)], cwd=tmp_path,
                          env=variables, text=True, capture_output=True)
    assert done.returncode == 0 and done.stdout == '(2, 10) 16\n', done.stderr[-3000:]
