"""LocalMamba (arXiv 2403.09338): LocalVim, LocalVMamba, SCAttn and the search for scan directions, for PyTorch and
OpenMMLab.

Models need torch alone. What a name needs is imported when the name is first used.
"""
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mmlocalmamba import moved

if TYPE_CHECKING:
    from mmlocalmamba.backbones import LocalVim, LocalVMamba
    from mmlocalmamba.directions import register_scan
    from mmlocalmamba.layers import SCAttn
    from mmlocalmamba.models import create_model, list_models
    from mmlocalmamba.openmmlab.configs import config_path, schedule, with_classes, without_masks
    from mmlocalmamba.openmmlab.replace_backbone import with_backbone

__version__ = '0.1.0'
_HOMES = {
    'LocalVMamba': 'backbones', 'LocalVim': 'backbones', 'SCAttn': 'layers', 'register_scan': 'directions',
    'create_model': 'models', 'list_models': 'models',
    'config_path': 'openmmlab.configs', 'schedule': 'openmmlab.configs', 'with_classes': 'openmmlab.configs',
    'without_masks': 'openmmlab.configs', 'with_backbone': 'openmmlab.replace_backbone',
}
__all__ = ['LocalVMamba', 'LocalVim', 'SCAttn', 'config_path', 'create_model', 'list_models', 'register_scan',
           'schedule', 'with_backbone', 'with_classes', 'without_masks']

moved.install()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(import_module(f'{__name__}.{_HOMES[name]}'), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
