"""What differs between torch versions and between the OpenMMLab and OneDL packages: functions, called where needed."""
import os
from argparse import Namespace
from collections import OrderedDict
from contextlib import AbstractContextManager
from http.client import HTTPException
from typing import Any
from urllib.error import URLError

import torch

from mmlocalmamba import zoo

# A scheme of MMEngine's checkpoint loader: what follows is loaded by load_checkpoint.
WEIGHTS_ONLY = 'weights_only:'


def _restricted_getattr(owner: Any, name: str) -> Any:
    """Stands in for getattr in pickles: MMEngine's HistoryBuffer stores its statistics methods through it."""
    from mmengine.logging import HistoryBuffer
    HistoryBuffer()  # the first one made in a process fills the table
    if owner is HistoryBuffer and name in HistoryBuffer._statistics_methods:
        return getattr(HistoryBuffer, name)
    raise RuntimeError(f'a checkpoint asks for attribute {name!r} of {owner!r}: refused')


class _PlainDict:
    """Stands in for yacs' configuration in pickles: a dictionary without methods of its own."""

    def __new__(cls) -> Any:
        return OrderedDict()


def _harmless_globals() -> list:
    import numpy as np
    core = np._core if hasattr(np, '_core') else np.core
    # numpy pickles a scalar with the class of its dtype; the module was renamed in numpy 2.
    harmless = [core.multiarray._reconstruct, core.multiarray.scalar, np.ndarray, np.dtype, Namespace,
                (_PlainDict, 'yacs.config.CfgNode'),
                (core.multiarray._reconstruct, 'numpy.core.multiarray._reconstruct'),
                (core.multiarray.scalar, 'numpy.core.multiarray.scalar'),
                *(type(np.dtype(kind)) for kind in ('float64', 'float32', 'float16', 'int64', 'int32', 'bool'))]
    try:
        from mmengine.logging import HistoryBuffer
    except ModuleNotFoundError:
        return harmless
    return [*harmless, HistoryBuffer, (_restricted_getattr, 'builtins.getattr')]


def allow_checkpoints() -> AbstractContextManager:
    """A scope in which torch.load(weights_only=True), the default since torch 2.6, reads what MMEngine, Vim and VMamba
    write.

    MMEngine's message hub holds HistoryBuffers of numpy scalars, Vim's files hold an argparse.Namespace, VMamba's a
    configuration of yacs. Only these are allowed, and a getattr that serves HistoryBuffer alone. What the process had
    allowed before stays so afterwards.
    """
    known = torch.serialization.get_safe_globals()
    return torch.serialization.safe_globals([item for item in _harmless_globals() if item not in known])


def load_checkpoint(path: str, map_location: Any = 'cpu') -> Any:
    """Load a checkpoint from a file, a URL or ``mmlocalmamba://NAME``, with weights_only=True.

    Raises:
        RuntimeError: the file needs code to be executed, which is refused, or is no checkpoint; it was not fetched.
        FileNotFoundError: there is no such file.
    """
    path = str(path)
    if path.startswith(zoo.SCHEME) or '://' not in path and path.endswith(zoo.SUFFIX):
        return zoo.load(os.path.expanduser(path), map_location)
    try:
        with allow_checkpoints():
            if '://' in path:
                return torch.hub.load_state_dict_from_url(path, map_location=map_location, weights_only=True)
            return torch.load(os.path.expanduser(path), map_location=map_location, weights_only=True)
    except Exception as error:  # a damaged file raises whatever the unpickler stumbles over
        if isinstance(error, (URLError, HTTPException, ConnectionError, TimeoutError)):
            raise RuntimeError(f'{path} was not fetched ({type(error).__name__}: {error}). Look at the address and the '
                               'network, or fetch it by other means and name the file') from error
        if isinstance(error, OSError) and error.filename is not None:
            raise  # no such file, no permission: it names the file
        raise RuntimeError(f'{path} was not loaded: it is not a plain checkpoint of tensors and numbers, or is '
                           f'damaged. Files that execute code are refused. ({error})') from error


def load_from_weights_only(name: str, map_location: Any = None) -> Any:
    """What MMEngine calls, see :func:`register_loader`; it tells users the end of this function's name."""
    return load_checkpoint(name.removeprefix(WEIGHTS_ONLY), map_location)


def register_loader() -> None:
    """Let MMEngine load by :func:`load_checkpoint` what :func:`weights_only` names, our own weights and safetensors.

    What it takes for the beginning of a path is a regular expression.
    """
    from mmengine.runner import CheckpointLoader
    CheckpointLoader.register_scheme([WEIGHTS_ONLY, zoo.SCHEME, rf'.*\{zoo.SUFFIX}$'], load_from_weights_only,
                                     force=True)


def weights_only(path: str) -> str:
    """The name under which MMEngine's functions load a file or http(s) URL by :func:`load_checkpoint`. Of other
    schemes, the path itself.

    By themselves, both stacks load URLs without weights_only, and OneDL's tries again without it when a file was
    refused. An error of theirs does not name the file.
    """
    path = str(path)
    if path.startswith(WEIGHTS_ONLY) or '://' in path and not path.startswith(('http://', 'https://', zoo.SCHEME)):
        return path
    register_loader()
    return f'{WEIGHTS_ONLY}{path}'
