"""Weights in safetensors files; those that come with the package are beside this one, by name ``mmlocalmamba://NAME``.

A file holds one state dict and, as JSON in its header, the state dict's own metadata (scan directions and the like) and
the checkpoint's ``meta`` (class names). It is small: matrices are in 16 bits.
"""
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from mmlocalmamba.files import write_whole

SCHEME = 'mmlocalmamba://'
SUFFIX = '.safetensors'
_KEY = 'mmlocalmamba'  # of the header


def names() -> list[str]:
    """What can stand after ``mmlocalmamba://``: names of configurations whose weights come with the package."""
    return sorted(path.stem for path in Path(__file__).parent.glob(f'*{SUFFIX}'))


def locate(path: str) -> str:
    """The file that a path or ``mmlocalmamba://NAME`` means.

    Raises:
        FileNotFoundError: the package has no weights of that name.
    """
    if not path.startswith(SCHEME):
        return path
    name = path.removeprefix(SCHEME)
    if name not in names():
        raise FileNotFoundError(2, f'no weights of this name come with the package; there are {", ".join(names())}',
                                path)
    return str(Path(__file__).parent / f'{name}{SUFFIX}')


def _package() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise RuntimeError('weights in safetensors files need their package: pip install safetensors') from error
    return safetensors


def save(path: str, state_dict: Any, meta: dict[str, Any] | None = None) -> None:
    """Write weights whole or not at all, matrices of 32 bits as float16, everything else as it is.

    Args:
        state_dict: with its ``_metadata``, if it has any.
        meta: what JSON can hold; MMEngine's ``dataset_meta`` for one.

    Raises:
        ValueError: a value is too large for 16 bits, or not finite.
        RuntimeError: safetensors is not installed.
    """
    package = _package()
    tensors = {}
    for name, value in state_dict.items():
        value = value.detach().cpu()
        stored = value.to(torch.float16) if value.dtype == torch.float32 and value.ndim > 1 else value
        if stored.is_floating_point() and not stored.isfinite().all():
            raise ValueError(f'{name}: its largest value, {value.abs().max():.4g}, has no place in {stored.dtype}')
        tensors[name] = stored.clone(memory_format=torch.contiguous_format)  # shared memory is refused
    header = dict(meta=meta or {}, metadata=getattr(state_dict, '_metadata', {}))
    write_whole(path, package.torch.save(tensors, metadata={'format': 'pt', _KEY: json.dumps(header)}))


def load(path: str, map_location: Any = 'cpu') -> dict[str, Any]:
    """``dict(state_dict=..., meta=...)`` of a file or ``mmlocalmamba://NAME``: weights are float32. A file of another
    program will do: its metadata are empty then.

    Raises:
        FileNotFoundError: there is no such file or name.
        RuntimeError: the file is damaged, or safetensors is not installed.
    """
    package = _package()
    try:
        with package.safe_open(locate(path), framework='pt') as file:
            header = json.loads((file.metadata() or {}).get(_KEY, '{}'))
            weights = OrderedDict((name, file.get_tensor(name)) for name in file.keys())
    except (package.SafetensorError, ValueError) as error:
        raise RuntimeError(f'{path} was not loaded: it is damaged, or no safetensors file ({error})') from error
    for name, value in weights.items():
        value = value.float() if value.dtype == torch.float16 else value
        weights[name] = value if map_location is None else value.to(map_location)
    weights._metadata = OrderedDict(header.get('metadata', {}))  # type: ignore[attr-defined]
    meta = header.get('meta', {})
    if 'classes' in meta.get('dataset_meta', {}):
        meta['dataset_meta']['classes'] = tuple(meta['dataset_meta']['classes'])  # as datasets have it
    return dict(state_dict=weights, meta=meta)
