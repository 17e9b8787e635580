"""Block sizes of the Triton scan kernels: built in, or as ``python -m mmlocalmamba tune`` found them on this GPU.

The choice depends on the GPU, the kernel, the number of states and the dtype, never on the image size, the batch or the
channels; and nothing is timed while a model runs. Another choice sums in another order, so the last bits of results
depend on it.
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
# Of the file. Raise it whenever the kernels change so much that older timings say nothing.
_FORMAT = 1


class Choice(NamedTuple):
    """Channels and warps of a program, steps whose loads go out together (a divisor of library.CHUNK), and how many
    programs keep a multiprocessor busy: fewer sequences than that are cut into segments."""
    channels: int
    warps: int
    group: int
    programs: int

    def __str__(self) -> str:
        return (f'{self.channels} channels, {self.warps} warp{"s" * (self.warps > 1)}, '
                f'{self.group} step{"s" * (self.group > 1)}, {self.programs} programs')


class Key(NamedTuple):
    gpu: str
    kernel: str
    d_state: int
    dtype: str

    def __str__(self) -> str:
        return f'{self.kernel}, d_state {self.d_state}, {self.dtype}'


# The first is built in. Registers are those of compute capability 9.0 with 16 states (docs/benchmarks.md); ``programs``
# follows from them.
CANDIDATES = {
    'forward': (
        Choice(32, 1, 4, 16),  # 130 registers, 173 if it multiplies step sizes
        Choice(32, 1, 2, 16),  # 128 in both cases: more programs at once, fewer loads in flight
        Choice(32, 1, 8, 10),  # 192: the opposite
        Choice(32, 1, 4, 8),  # half the segments: fewer exponentials twice, fewer programs
        Choice(64, 1, 2, 8),  # 246, two channels a thread: wider loads, B and C are read half as often
        Choice(64, 2, 4, 8),  # 173: warps that share B and C in the cache
    ),
    'backward': (
        Choice(32, 1, 2, 8),  # 255, and 56 bytes spilled
        Choice(32, 1, 1, 8),  # 252, nothing spilled, fewer loads in flight
        Choice(16, 1, 2, 8),  # 247, half the states a thread; sums of B and C in twice as many parts
        Choice(32, 2, 2, 4),  # 255, half the states a thread; sums across warps
        Choice(64, 2, 1, 4),  # 255, half as many parts
        Choice(64, 4, 2, 2),  # 255, half as many parts, half the states a thread
    ),
}


def path() -> str:
    """The file with the choices, whether it exists or not."""
    home = os.environ.get('XDG_CACHE_HOME') or os.path.join(os.path.expanduser('~'), '.cache')
    return os.environ.get(CACHE_VARIABLE) or os.path.join(home, 'mmlocalmamba', 'tuning.json')


def gpu(device: torch.device) -> str:
    """Its name and capability; without an index it is the current one, which changes."""
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
        # Taken from the list: 32.0 equals 32, but is not as good.
        candidate = next((choice for choice in CANDIDATES[key.kernel] if choice == given), None)
        if candidate is None:
            raise ValueError(f'{given} is no candidate of the {key.kernel} kernel')
        choices[key] = candidate
    return choices


@cache
def saved() -> dict[Key, Choice]:
    """What the file holds, read once per process. A file that cannot be used is ignored, with a warning."""
    try:
        return _read(path())
    except FileNotFoundError:
        pass
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        warnings.warn(f'{path()} is ignored, Triton kernels run with built-in block sizes ({type(error).__name__}: '
                      f'{error}). Remedy: `python -m mmlocalmamba tune`, or remove the file.', stacklevel=2)
    return {}


def save(choices: dict[Key, Choice]) -> None:
    """Add to the file, or replace it if it cannot be used."""
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
    """Whatever else is chosen, in all threads: for timing and tests."""
    _forced[kernel] = choice
    try:
        yield
    finally:
        del _forced[kernel]


def choose(kernel: str, device: torch.device, d_state: int, dtype: torch.dtype) -> Choice:
    """Called when a kernel is launched, which torch.compile does not trace.

    Args:
        kernel: 'forward' or 'backward'.
        d_state: rounded up to a power of two, as the kernels do.
        dtype: that of u.
    """
    if kernel in _forced:
        return _forced[kernel]
    return saved().get(Key(gpu(device), kernel, d_state, str(dtype).removeprefix('torch.')), CANDIDATES[kernel][0])


def in_force(device: torch.device) -> list[str]:
    """A line for each choice on this device, and where it comes from."""
    tuned = {key: choice for key, choice in saved().items() if key.gpu == gpu(device)}
    return [*(f'{key}: {choice} ({path()})' for key, choice in tuned.items()),
            *(f'{kernel}{", otherwise" * bool(tuned)}: {choices[0]} (built in)'
              for kernel, choices in CANDIDATES.items())]
