"""The only file that knows versions: OpenMMLab and OneDL packages, MMEngine, torch."""
import os
import traceback
from argparse import Namespace
from collections import OrderedDict
from functools import partial
from http.client import HTTPException
from typing import Any
from urllib.error import URLError

import torch


def _restricted_getattr(owner: Any, name: str) -> Any:
    """Stands in for getattr in pickles: MMEngine's HistoryBuffer stores its statistics methods through it."""
    from mmengine.logging import HistoryBuffer
    HistoryBuffer()  # the first one made in a process fills the table
    if owner is HistoryBuffer and name in HistoryBuffer._statistics_methods:
        return getattr(HistoryBuffer, name)
    raise RuntimeError(f'a checkpoint asks for attribute {name!r} of {owner!r}: refused')


class _PlainDict:
    """Stands in for yacs' configuration in pickles: a dictionary without methods of its own."""

    def __new__(cls) -> OrderedDict:
        return OrderedDict()


def allow_checkpoints() -> None:
    """Let torch.load(weights_only=True), the default since torch 2.6, read what MMEngine, Vim and VMamba write.

    MMEngine's message hub holds HistoryBuffers of numpy scalars, Vim's files hold an argparse.Namespace, VMamba's a
    configuration of yacs. Only these are allowed, and a getattr that serves HistoryBuffer alone."""
    import numpy as np
    from mmengine.logging import HistoryBuffer
    core = np._core if hasattr(np, '_core') else np.core
    allowed = [HistoryBuffer, core.multiarray._reconstruct, core.multiarray.scalar, np.ndarray, np.dtype,
               (_restricted_getattr, 'builtins.getattr'), Namespace, (_PlainDict, 'yacs.config.CfgNode')]
    # numpy pickles a scalar with the class of its dtype; the module was renamed in numpy 2.
    allowed += [(core.multiarray._reconstruct, 'numpy.core.multiarray._reconstruct'),
                (core.multiarray.scalar, 'numpy.core.multiarray.scalar')]
    allowed += [type(np.dtype(kind)) for kind in ('float64', 'float32', 'float16', 'int64', 'int32', 'bool')]
    torch.serialization.add_safe_globals(allowed)


def load_checkpoints_safely() -> None:
    """Make MMEngine load every checkpoint with weights_only=True, to resume, to test, as load_from and in init_cfg.

    By themselves, both stacks load URLs without it, and OneDL's tries again without it when a file was refused.
    """
    from mmengine.runner import checkpoint

    def load_from_local(filename: str, map_location: Any = None) -> Any:
        return load_checkpoint(os.path.expanduser(filename), map_location)

    checkpoint.CheckpointLoader.register_scheme('', load_from_local, force=True)
    checkpoint.load_url = partial(checkpoint.load_url, weights_only=True)
    if hasattr(checkpoint, '_safe_torch_load'):
        checkpoint._safe_torch_load = partial(torch.load, weights_only=True)


def name_annotation_files() -> None:
    """Let an error in a dataset's annotation file name the file, which a JSON parser does not know."""
    from mmengine.registry import DATASETS
    build = DATASETS.build_func

    def build_dataset(*args: Any, **kwargs: Any) -> Any:
        try:
            return build(*args, **kwargs)
        except Exception as error:
            for frame, _ in traceback.walk_tb(error.__traceback__):
                if frame.f_code.co_name == 'load_data_list':
                    path = getattr(frame.f_locals.get('self'), 'ann_file', None)
                    if path and path not in str(error):
                        raise RuntimeError(f'{path} was not read as annotations: {type(error).__name__}: '
                                           f'{error}') from error
            raise

    DATASETS.build_func = build_dataset


def register_scope() -> None:
    """Tell MMEngine's config system where ``mmlocalmamba::...`` lives; it knows a fixed list of scopes."""
    from mmengine.config import utils
    utils.MODULE2PACKAGE.setdefault('mmlocalmamba', 'mmlocalmamba')


def load_checkpoint(path: str, map_location: Any = 'cpu') -> Any:
    """Load a checkpoint from a file or URL with weights_only=True.

    Raises:
        RuntimeError: the file needs code to be executed, which is refused, or is no checkpoint; it was not fetched.
        FileNotFoundError: there is no such file.
    """
    try:
        if '://' in str(path):
            return torch.hub.load_state_dict_from_url(path, map_location=map_location, weights_only=True)
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # a damaged file raises whatever the unpickler stumbles over
        if isinstance(error, (URLError, HTTPException, ConnectionError, TimeoutError)):
            raise RuntimeError(f'{path} was not fetched ({type(error).__name__}: {error}). Look at the address and the '
                               'network, or fetch it by other means and name the file') from error
        if isinstance(error, OSError) and error.filename is not None:
            raise  # no such file, no permission: it names the file
        raise RuntimeError(f'{path} was not loaded: it is not a plain checkpoint of tensors and numbers, or is '
                           f'damaged. Files that execute code are refused. ({error})') from error


