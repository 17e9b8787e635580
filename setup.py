"""What pyproject.toml cannot say: the `.mim` folder, and where the build happens.

mim and MMEngine look for a package's configurations and tools in
`<package>/.mim`. Wheels get copies there, an editable install gets links.
"""
import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
PACKAGE = 'mmlocalmamba'
MIM_FILES = ('configs', 'tools', 'model-index.yml')


def cpu_kernel():
    """The CPU kernel and the command that builds it; nothing where torch is not at hand.

    It is optional: without it everything runs, with slower scans, and
    mmlocalmamba.ops says why.
    """
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        say_without_kernel(f'{error}; install torch first, and this with --no-build-isolation')
        return [], {}

    class BuildKernel(BuildExtension):

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                say_without_kernel(error)
                self.extensions.clear()

    # OpenMP is what torch's own threads are on Linux; without it the kernel runs on one.
    openmp = ['-fopenmp'] if sys.platform == 'linux' else []
    # One file for each instruction set, chosen at run time: nothing here may depend
    # on the machine that builds. operators.cpp includes all others.
    sources = [f'{PACKAGE}/ops/csrc/{name}.cpp' for name in ('avx512', 'operators', 'avx2', 'portable')]
    files = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(f'{PACKAGE}/ops/csrc/*'))
    kernel = CppExtension(
        f'{PACKAGE}.ops._cpu', sources, depends=[name for name in files if name not in sources],
        extra_compile_args=['-O3', '-g0', *openmp], extra_link_args=openmp, optional=True)
    return [kernel], {'build_ext': BuildKernel}


def say_without_kernel(reason):
    print(f'{PACKAGE} is installed without its CPU kernel: {reason}', file=sys.stderr)


def link_mim(package_dir):
    mim = package_dir / '.mim'
    mim.mkdir(exist_ok=True)
    for name in MIM_FILES:
        link = mim / name
        if link.is_symlink():
            link.unlink()
        link.symlink_to(os.path.relpath(ROOT / name, mim))


def copy_mim(package_dir):
    mim = package_dir / '.mim'
    shutil.rmtree(mim, ignore_errors=True)
    mim.mkdir(parents=True)
    for name in MIM_FILES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, mim / name, ignore=shutil.ignore_patterns('__pycache__'))
        else:
            shutil.copy2(source, mim)


def remove_at_exit(folder):
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


class Build(build):
    """Builds outside the source tree: nothing stays behind in it, and no file of
    an earlier build slips into a new wheel."""

    def initialize_options(self):
        super().initialize_options()
        self.build_base = tempfile.mkdtemp(prefix=f'{PACKAGE}-build-')
        remove_at_exit(self.build_base)


class BuildPy(build_py):

    def run(self):
        super().run()
        if self.editable_mode:
            link_mim(ROOT / PACKAGE)
        else:
            copy_mim(Path(self.build_lib) / PACKAGE)


class EditableWheel(editable_wheel):
    """Says in top_level.txt where the package is: by its path, not its name.

    OpenMMLab's mim and MMEngine look for a package's folder beside its metadata,
    that is in site-packages, where an editable install has none. The name they
    look for there is read from top_level.txt, and a path will do as well.
    """

    def _create_wheel_file(self, bdist_wheel):
        Path(self.dist_info_dir, 'top_level.txt').write_text(f'{ROOT / PACKAGE}\n')
        return super()._create_wheel_file(bdist_wheel)


# setuptools writes this beside the package, and a Python started there takes it
# for an installed distribution.
egg_info = ROOT / f'{PACKAGE}.egg-info'
if not egg_info.exists():
    remove_at_exit(egg_info)

ext_modules, build_ext = cpu_kernel()
setup(
    packages=find_packages(include=[PACKAGE, f'{PACKAGE}.*']),
    include_package_data=True,
    ext_modules=ext_modules,
    cmdclass={'build': Build, 'build_py': BuildPy, 'editable_wheel': EditableWheel, **build_ext},
)
