"""Block sizes of the Triton scan kernels: built in, or saved by ``python -m mmlocalmamba tune`` for this GPU.

The choice depends on the GPU, the kernel, the number of states and the dtype, but not on the image size, the batch or
the channels. Nothing is timed while a model runs. Different block sizes sum in different orders, so the last bits of
results depend on the choice.
"""
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch

from mmlocalmamba.files import write_whole

CACHE_VARIABLE = 'MMLOCALMAMBA_CACHE'
# The format of the file. Increase it when the kernels change so much that older timings are useless.
_FORMAT = 2


class Choice(NamedTuple):
    """Block sizes of a kernel.

    Attributes:
        channels: Channels of a program.
        warps: Warps of a program.
        group: Steps that are loaded together; a divisor of library.CHUNK.
        programs: Programs that keep a multiprocessor busy. If there are fewer, sequences are cut into segments.
    """
    channels: int
    warps: int
    group: int
    programs: int

    def __str__(self) -> str:
        return (f'{self.channels} channels, {self.warps} warp{"s" * (self.warps > 1)}, '
                f'{self.group} step{"s" * (self.group > 1)}, {self.programs} programs')


class Key(NamedTuple):
    """The circumstances that a choice is made for. ``d_state`` is a power of two; ``dtype`` is that of u."""
    gpu: str
    kernel: str
    d_state: int
    dtype: str

    def __str__(self) -> str:
        return f'{self.kernel}, d_state {self.d_state}, {self.dtype}'


# The first candidate of each kernel is built in. The comments give registers per thread and instructions per element at
# compute capability 9.0 with 16 states, from `tools/benchmark_scan.py --compile sm_90` (research/benchmarks.md).
# ``programs`` follows from the registers, or limits them: see _registers in host.py.
CANDIDATES = {
    'forward': (
        Choice(32, 1, 4, 16),  # 128, 9.9: held to 128
        Choice(128, 1, 4, 8),  # 255, 9.4: two channels per thread (four with one state), B and C are read less often
        Choice(32, 1, 8, 12),  # 139, 9.5: fewer programs at once, more loads in flight
        Choice(32, 1, 4, 12),  # 134, 9.7: not held to 128
        Choice(32, 1, 4, 8),  # 134, 9.7: half as many segments, so fewer exponentials are computed twice
        Choice(64, 2, 4, 8),  # 128, 9.9: warps share B and C in the cache
        Choice(32, 1, 2, 16),  # 128, 10.7: fewer loads in flight
    ),
    'backward': (
        Choice(32, 1, 2, 8),  # 255, 38, and 48 bytes spilled
        Choice(32, 1, 4, 8),  # 255, 39, and 584 bytes spilled: more loads in flight
        Choice(32, 1, 1, 8),  # 251, 42: fewer loads in flight
        Choice(64, 2, 1, 4),  # 248, 45: sums of B and C in half as many parts
    ),
}


def path() -> str:
    """Return the path of the file with the choices. The file need not exist."""
    home = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
    return os.environ.get(CACHE_VARIABLE) or os.path.join(home, 'mmlocalmamba', 'tuning.json')


def gpu(device: torch.device) -> str:
    """Return the name and the compute capability of a GPU, by default of the current one; 'interpreter' for a CPU."""
    if device.type != 'cuda':
        return 'interpreter'
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _gpu(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f'{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}'


def _read(name: str) -> dict[Key, Choice]:
    with open(name, encoding='utf-8') as file:
        content = json.load(file)
    if content['format'] != _FORMAT:
        raise ValueError(f'its format is {content["format"]!r}, not {_FORMAT}')
    choices = {}
    for entry in content['choices']:
        key, given = Key(*(entry[field] for field in Key._fields)), Choice(*(entry[field] for field in Choice._fields))
        # The candidate replaces the given choice: 32.0 equals 32, but a kernel needs an int.
        candidate = next((choice for choice in CANDIDATES[key.kernel] if choice == given), None)
        if candidate is None:
            raise ValueError(f'{given} is not a candidate of the {key.kernel} kernel')
        choices[key] = candidate
    return choices


@cache
def saved() -> dict[Key, Choice]:
    """Return the choices of the file, which is read once per process. A file that cannot be used causes a warning."""
    try:
        return _read(path())
    except FileNotFoundError:
        pass
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        warnings.warn(f'{path()} is ignored, and Triton kernels run with built-in block sizes '
                      f'({type(error).__name__}: {error}). Run `python -m mmlocalmamba tune`, or remove the file.',
                      stacklevel=2)
    return {}


def save(choices: dict[Key, Choice]) -> None:
    """Add choices to the file. A file that cannot be used is replaced."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        saved.cache_clear()
        choices = {**saved(), **choices}
    entries = [{**key._asdict(), **choice._asdict()} for key, choice in sorted(choices.items(), key=repr)]
    lines = ',\n'.join(f'  {json.dumps(entry)}' for entry in entries)
    write_whole(path(), f'{{"format": {_FORMAT}, "choices": [\n{lines}\n]}}\n')
    saved.cache_clear()


_forced: dict[str, Choice] = {}


@contextmanager
def forced(kernel: str, choice: Choice) -> Iterator[None]:
    """Return a context in which a kernel has these block sizes in all threads, for timing and tests."""
    _forced[kernel] = choice
    try:
        yield
    finally:
        del _forced[kernel]


def choose(kernel: str, device: torch.device, d_state: int, dtype: torch.dtype) -> Choice:
    """Return the block sizes of a kernel. It runs when a kernel is launched, where torch.compile does not trace.

    Args:
        kernel: 'forward' or 'backward'.
        device: Device of u.
        d_state: Number of states, rounded up to a power of two as in the kernels.
        dtype: Dtype of u.
    """
    if kernel in _forced:
        return _forced[kernel]
    return saved().get(Key(gpu(device), kernel, d_state, str(dtype).removeprefix('torch.')), CANDIDATES[kernel][0])


def in_force(device: torch.device) -> list[str]:
    """Return a line for each choice on this device, with its source."""
    tuned = {key: choice for key, choice in saved().items() if key.gpu == gpu(device)}
    return [*(f'{key}: {choice} ({path()})' for key, choice in tuned.items()),
            *(f'{kernel}{", otherwise" * bool(tuned)}: {choices[0]} (built in)'
              for kernel, choices in CANDIDATES.items())]
