"""A cache of tensors that models derive from image sizes: scan tables and rotary tables.

All models and threads share its entries. Their bytes are bounded, and the least recently used entry is dropped first.
Under torch.compile, torch.export and any other tracing, nothing is cached: the operations become part of the graph.
So no traced tensor outlives its trace, and no graph holds the address of a tensor that may be freed. Inside
:func:`constants`, a graph that is exported for one size holds the cached tensors instead. So does a graph of
torch.jit.trace, which is always for one size: it would otherwise depend on what the cache holds.
"""
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar('T')
# The tables of LocalVMamba-T at 800x1333 have 7 MB, so this holds the common sizes of a multi-scale training.
MAX_BYTES = 128 << 20


class _Entry(NamedTuple):
    value: Any
    tensors: list[Tensor]
    stream: Any  # the CUDA stream on which the tensors were allocated, or None

    @property
    def bytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self.tensors)


_entries: OrderedDict[Hashable, _Entry] = OrderedDict()
_captured: dict[Hashable, _Entry] = {}  # never dropped: CUDA graphs hold their addresses
_lock = threading.Lock()
_as_constants: ContextVar[bool] = ContextVar('_as_constants', default=False)


@contextmanager
def constants() -> Iterator[None]:
    """Return a context in which a traced graph holds cached tensors as constants.

    Run the model once at the size of the trace before: tensors that are not cached are computed in the graph.
    """
    token = _as_constants.set(True)
    try:
        yield
    finally:
        _as_constants.reset(token)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _traced() -> bool:
    # A mode that replaces tensors, such as FakeTensorMode, changes the type of a new tensor.
    return torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor


def _indexed(device: str | torch.device) -> torch.device:
    device = torch.device(device)
    if device.type == 'cuda' and device.index is None:
        return torch.device('cuda', torch.cuda.current_device())
    return device


def as_ints(H: int, W: int) -> tuple[int, int]:
    """Return a size as it is, but as numbers under torch.jit.trace, which makes tensors of it."""
    return (int(H), int(W)) if torch.jit.is_tracing() else (H, W)


def cached(make: Callable[[torch.device, bool], T], device: str | torch.device, *key: Hashable) -> T:
    """Return ``make(device, traced)``, or the result of an earlier call with this key and device.

    Args:
        make: Returns tensors in any nesting of dictionaries and tuples. If ``traced``, it must not read their values.
        device: Device of the tensors.
        key: All that the result depends on, except for the device.

    Returns:
        Shared tensors: do not write to them. Autograd accepts them, even if they were first made in inference mode.

    Raises:
        RuntimeError: A CUDA graph is being captured and there is no entry, which would have to be made on the CPU.
    """
    traced = _traced()
    # The order matters: torch.compile (2.11) cannot trace ContextVar.get.
    if traced and (torch.compiler.is_dynamo_compiling() or not _as_constants.get()):
        return make(torch.device(device), True)
    device = _indexed(device)
    key = (device, *key)
    with _lock:
        entry = _captured.get(key) or _entries.get(key)
        if entry is not None and key in _entries:
            _entries.move_to_end(key)
    if traced:
        return make(device, True) if entry is None else entry.value
    capturing = device.type == 'cuda' and torch.cuda.is_current_stream_capturing()
    if entry is None:
        if capturing:
            raise RuntimeError(f'a CUDA graph is captured before its first run: no tables for {key[1:]} yet. Run the '
                               'model once at this size, then capture.')
        value = _made_apart(make, device)
        entry = _Entry(value, list(_tensors(value)),
                       torch.cuda.current_stream(device) if device.type == 'cuda' else None)
        _keep(key, entry)
    if capturing:
        with _lock:
            _captured[key] = entry
    elif entry.stream is not None and entry.stream != (stream := torch.cuda.current_stream(device)):
        for x in entry.tensors:  # their memory must not be reused before that stream has finished
            x.record_stream(stream)
    return entry.value


def _made_apart(make: Callable[[torch.device, bool], T], device: torch.device) -> T:
    """Return ``make(device, False)``, called in a thread of its own.

    torch's modes belong to threads: transforms of ``torch.func``, whose tensors must not outlive them, inference mode,
    whose tensors autograd refuses, torch.jit.trace, which would record them, and the default device.
    """
    stream = torch.cuda.current_stream(device) if device.type == 'cuda' else None

    def run() -> T:
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            return make(device, False)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def _keep(key: Hashable, entry: _Entry) -> None:
    with _lock:
        _entries[key] = entry
        used = cached_bytes()
        while used > MAX_BYTES and len(_entries) > 1:
            used -= _entries.popitem(last=False)[1].bytes


def cached_bytes() -> int:
    """Return the bytes of all entries, except for those of captured CUDA graphs."""
    return sum(entry.bytes for entry in _entries.values())


def clear() -> None:
    """Drop all entries, except for those of captured CUDA graphs."""
    with _lock:
        _entries.clear()
