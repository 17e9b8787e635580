"""VMamba's ``csm_triton.py`` without a GPU: its cross scan and cross merge ask CUDA for the device of their tensor.

The file itself stays as it is. When a module of that name is imported, its functions are replaced by functions that
call the file's own PyTorch version for tensors that are not on a GPU.
"""
import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# function -> the autograd function that computes it in PyTorch
_FUNCTIONS = {'cross_scan_fn': 'CrossScanF', 'cross_merge_fn': 'CrossMergeF'}


def _on_any_device(function: Callable[..., Any], operator: Any) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        tensor, *options = (value for name, value in bound.arguments.items() if name != 'force_torch')
        return function(*args, **kwargs) if tensor.is_cuda else operator.apply(tensor, *options)

    return run


def without_cuda(module: ModuleType) -> None:
    """Replace the functions of a ``csm_triton`` module."""
    for name, operator in _FUNCTIONS.items():
        if hasattr(module, name) and hasattr(module, operator):
            setattr(module, name, _on_any_device(getattr(module, name), getattr(module, operator)))


class _Finder(MetaPathFinder):

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name.rpartition('.')[2] != 'csm_triton':
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            loader, execute = spec.loader, spec.loader.exec_module

            def run(module: ModuleType) -> None:
                execute(module)
                without_cuda(module)

            loader.exec_module = run  # type: ignore[method-assign]
        return spec


def installed() -> bool:
    """Return True if the finder is there."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def install() -> None:
    """Add the finder in front of all others, once."""
    if not installed():
        sys.meta_path.insert(0, _Finder())
