"""The one cache of what models derive from image sizes: scan tables, rotary tables.

Entries are shared between models and threads, bounded in bytes, and go in the order of their last use. Under
torch.compile, torch.export and any other tracing nothing is cached: the operations become part of the graph, so that
no traced tensor outlives its trace and no graph holds the address of a tensor that may go. Who exports a graph for one
size may ask for :func:`constants` instead.
"""
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar('T')
# Of LocalVMamba-T at 800x1333 there are 7 MB: enough for the sizes of a multi-scale training that come again.
MAX_BYTES = 128 << 20


class _Entry(NamedTuple):
    value: Any
    tensors: list[Tensor]
    stream: Any  # of a CUDA device, on which the tensors were allocated

    @property
    def bytes(self) -> int:
        return sum(x.untyped_storage().nbytes() for x in self.tensors)


_entries: OrderedDict[Hashable, _Entry] = OrderedDict()
_captured: dict[Hashable, _Entry] = {}  # addresses of these are in CUDA graphs, so they stay
_lock = threading.Lock()
_as_constants: ContextVar[bool] = ContextVar('_as_constants', default=False)


@contextmanager
def constants() -> Iterator[None]:
    """Within it, a trace gets what the cache holds, as constants of its graph. The model must have run before, at the
    size of the trace."""
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
    # A mode that replaces tensors, FakeTensorMode say, shows in what it makes of a new one.
    return torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor


def _indexed(device: str | torch.device) -> torch.device:
    device = torch.device(device)
    if device.type == 'cuda' and device.index is None:
        return torch.device('cuda', torch.cuda.current_device())
    return device


def of_size(make: Callable[[torch.device, bool], T], device: str | torch.device, *key: Hashable) -> T:
    """``make(device, traced)``, or what an earlier call with this key and device has made.

    Args:
        make: returns tensors in any nesting of dictionaries and tuples. If ``traced``, it must not look at values.
        device: where the tensors shall live.
        key: all that the result depends on besides the device.

    Returns:
        Shared tensors, not to be written to. Autograd takes them, also if they were made in inference mode.

    Raises:
        RuntimeError: a CUDA graph is being captured and there is no entry, which would have to be made on the CPU.
    """
    traced = _traced()
    if traced and (torch.compiler.is_dynamo_compiling() or not _as_constants.get()):  # dynamo reads no ContextVar
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
        with torch.inference_mode(False):  # autograd would refuse a table made in it, later on
            value = make(device, False)
        entry = _Entry(value, list(_tensors(value)),
                       torch.cuda.current_stream(device) if device.type == 'cuda' else None)
        _keep(key, entry)
    if capturing:
        with _lock:
            _captured[key] = entry
    elif entry.stream is not None and entry.stream != (stream := torch.cuda.current_stream(device)):
        for x in entry.tensors:  # its memory must not be given away before that stream is done
            x.record_stream(stream)
    return entry.value


def _keep(key: Hashable, entry: _Entry) -> None:
    with _lock:
        _entries[key] = entry
        used = cached_bytes()
        while used > MAX_BYTES and len(_entries) > 1:
            used -= _entries.popitem(last=False)[1].bytes


def cached_bytes() -> int:
    """Bytes that all entries hold, but for those of captured CUDA graphs."""
    return sum(entry.bytes for entry in _entries.values())


def clear() -> None:
    """Forget all entries but those of captured CUDA graphs."""
    with _lock:
        _entries.clear()
