"""Prints the constraints file of the environment it runs in:

    .venv/bin/python requirements/freeze.py > requirements/constraints-openmmlab.txt
    .venv-onedl/bin/python requirements/freeze.py > requirements/constraints-onedl.txt

torch and what comes with it are left out, so that its CPU and CUDA builds, and
an existing torch of another version, all fit.
"""
import re
import sys
from importlib.metadata import distributions

LEFT_OUT = re.compile(r'torch|torchvision|triton|(nvidia|cuda)-.*|pip|mmlocalmamba.*')


def minimum_python(requires):
    """(3, 11) for '>=3.11,<4'; (3,) when nothing is said."""
    found = re.search(r'>=\s*([\d.]+)', requires or '')
    return tuple(int(part) for part in found[1].split('.')[:2]) if found else (3,)


def main():
    lines = set()
    for package in distributions():
        name = package.metadata['Name'].lower().replace('_', '-')
        if LEFT_OUT.fullmatch(name):
            continue
        line = f'{name}=={package.version}'
        minimum = minimum_python(package.metadata['Requires-Python'])
        if minimum > (3, 10):
            line += '; python_version >= "{}.{}"'.format(*minimum)
        lines.add(line)
        if name in ('mmcv', 'mmcv-lite'):  # MMCV=compiled or not: the same version
            lines.update({f'mmcv=={package.version}', f'mmcv-lite=={package.version}'})
    print('# Written by requirements/freeze.py, with Python '
          f'{sys.version_info.major}.{sys.version_info.minor}.')
    print('\n'.join(sorted(lines)))


if __name__ == '__main__':
    main()
