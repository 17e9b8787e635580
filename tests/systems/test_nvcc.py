"""Compile CUDA code of the image with PyPI's nvcc: `python -m pytest tests/systems/test_nvcc.py`. No GPU is needed.

This package has no CUDA code of its own: Triton compiles its kernels (tests/ops/test_triton_code.py). In the image for
GPUs nvcc compiles mmcv's ops. The base image with the whole CUDA toolkit is not at hand here, so the test takes the
compiler from PyPI, the headers from torch's own packages, and compiles some of mmcv's CUDA files as the Dockerfile's
default architectures have it. FILES=all takes all of them, which is an hour on two cores. Nothing is linked.
"""
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]
CUDA = re.search(r'^ARG CUDA=(\S+)', (ROOT / 'docker/Dockerfile').read_text(), re.M)[1]
ARCHITECTURES = re.search(r'^ARG TORCH_CUDA_ARCH_LIST="(.*)"', (ROOT / 'docker/Dockerfile').read_text(), re.M)[1]
MMCV = re.search(r'^mmcv==(\S+)', (ROOT / 'requirements/mmcv-openmmlab.txt').read_text(), re.M)[1]
FILES = ('nms_cuda.cu', 'roi_align_cuda.cu', 'modulated_deform_conv_cuda.cu')


def pip(*arguments):
    done = subprocess.run([sys.executable, '-m', 'pip', *map(str, arguments)], text=True, capture_output=True)
    if done.returncode:
        pytest.skip(f'pip {arguments[0]} failed: {done.stderr.strip().splitlines()[-1]}')


@pytest.fixture(scope='module')
def nvcc(tmp_path_factory):
    """Return the path of nvcc, of the CUDA version that the Dockerfile names."""
    folder = tmp_path_factory.mktemp('cuda')
    names = ('nvidia-cuda-nvcc', 'nvidia-cuda-crt', 'nvidia-nvvm', 'nvidia-cuda-cccl')
    pip('install', '--quiet', '--no-deps', '--target', folder, *(f'{name}=={CUDA}.*' for name in names))
    path, = folder.glob('nvidia/*/bin/nvcc')
    path.chmod(0o755)
    return path


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    """Return the folder of mmcv's sources."""
    folder = tmp_path_factory.mktemp('mmcv')
    pip('download', '--quiet', '--no-deps', '--no-build-isolation', '--no-binary', ':all:', '--dest', folder,
        f'mmcv=={MMCV}')
    archive, = folder.glob('mmcv-*.tar.gz')
    with tarfile.open(archive) as file:
        file.extractall(folder, filter='data')
    return folder / f'mmcv-{MMCV}/mmcv/ops/csrc'


def architecture_flags():
    """Return nvcc's options for the Dockerfile's TORCH_CUDA_ARCH_LIST."""
    flags = []
    for name in ARCHITECTURES.split():
        number = name.removesuffix('+PTX').replace('.', '')
        flags.append(f'-gencode=arch=compute_{number},code=sm_{number}')
        if name.endswith('+PTX'):
            flags.append(f'-gencode=arch=compute_{number},code=compute_{number}')
    return flags


def test_cuda_files_compile(nvcc, sources, tmp_path):
    if not (torch.version.cuda or '').startswith(CUDA):
        pytest.skip(f'torch is built for CUDA {torch.version.cuda}, the Dockerfile is for {CUDA}')
    folders = [*include_paths('cpu'), *map(str, nvcc.parents[1].glob('include*')),
               *(str(path) for path in Path(torch.__file__).parents[1].glob('nvidia/*/include')),
               sources / 'common', sources / 'common/cuda']
    files = sorted(sources.glob('pytorch/cuda/*.cu'))
    if os.environ.get('FILES') != 'all':
        files = [file for file in files if file.name in FILES]
        assert len(files) == len(FILES)
    for file in files:
        done = subprocess.run(
            [nvcc, '-c', file, '-o', tmp_path / f'{file.stem}.o', '-std=c++17', '-O1', *architecture_flags(),
             '-DMMCV_WITH_CUDA', '-D__CUDA_NO_HALF_OPERATORS__', '-D__CUDA_NO_HALF_CONVERSIONS__',
             '--expt-relaxed-constexpr', '-Xcompiler', '-fPIC', *(f'-I{folder}' for folder in folders)],
            text=True, capture_output=True)
        assert done.returncode == 0, f'{file.name}\n{done.stderr[-3000:]}'
        assert (tmp_path / f'{file.stem}.o').stat().st_size > 10_000
