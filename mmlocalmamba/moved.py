"""Modules that have moved: imports by their former names work for one version, with a FutureWarning."""
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PACKAGE = 'mmlocalmamba'
# former name -> present name; folders stand for everything in them
MOVED = {
    'scans': 'directions',
    'sizes': 'table_cache',
    'compat': 'files',
    'methods': 'openmmlab.replace_backbone',
    'recipes': 'openmmlab.configs',
    'checks': 'openmmlab.checks',
    'trial': 'openmmlab.checks.trial',
    'necks': 'openmmlab.necks',
    'engine': 'openmmlab.engine',
    'weights.hook': 'openmmlab.checkpoint_hook',
    'weights.contents': 'weights.loading',
    'weights.families': 'weights.official',
    'weights.names': 'weights.official',
    'search.hook': 'openmmlab.search_hook',
    'search.directions': 'search.results',
    'ops.mamba': 'ops.stand_ins',
    'ops.causal_conv': 'ops.stand_ins',
    'ops.plain': 'ops.unfused',
    'ops.reference': 'ops.backends.reference',
    'ops.chunked': 'ops.backends.chunked',
    'ops.cpu': 'ops.backends.cpu',
    'ops.cuda': 'ops.backends.mamba_ssm',
    'ops.onnx': 'ops.backends.onnx',
    'ops.triton': 'ops.backends.triton',
}


def present_name(name: str) -> str | None:
    """Return the present name of a module of this package that has moved, or None."""
    for former, present in MOVED.items():
        former = f'{_PACKAGE}.{former}'
        if name == former or name.startswith(f'{former}.'):
            return f'{_PACKAGE}.{present}{name[len(former):]}'
    return None


class _Finder(MetaPathFinder, Loader):
    """Import the present module under the former name."""

    def __init__(self) -> None:
        self.specs: dict[str, ModuleSpec | None] = {}

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        return None if present_name(name) is None else ModuleSpec(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        present = present_name(spec.name)
        assert present is not None
        warnings.warn(f'{spec.name} is called {present} now: change the import', FutureWarning, stacklevel=2)
        module = import_module(present)
        self.specs[present] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own specification back, which the import system has replaced; it has run already."""
        module.__spec__ = self.specs.pop(module.__name__)


def install() -> None:
    """Add the finder behind all others, once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
