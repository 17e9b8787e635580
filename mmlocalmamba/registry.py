"""Child registries of MMEngine's roots.

``locations`` lets MMEngine import this package by itself when it meets ``type='mmlocalmamba.X'`` in a configuration of
any repository, so that users need no ``custom_imports``.
"""
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import WEIGHT_INITIALIZERS as MMENGINE_WEIGHT_INITIALIZERS
from mmengine.registry import Registry

SCOPE = 'mmlocalmamba'
_DOOR = f'{SCOPE}.openmmlab'
_ENGINE = f'{_DOOR}.engine'


def _child(name: str, parent: Registry, *locations: str) -> Registry:
    return Registry(name, parent=parent, scope=SCOPE, locations=list(locations))


MODELS = _child('model', MMENGINE_MODELS, f'{_DOOR}.models', f'{_DOOR}.necks')
HOOKS = _child('hook', MMENGINE_HOOKS, _ENGINE, f'{_DOOR}.checkpoint_hook', f'{_DOOR}.search_hook', f'{_DOOR}.checks')
LOOPS = _child('loop', MMENGINE_LOOPS, _ENGINE)
OPTIM_WRAPPERS = _child('optimizer wrapper', MMENGINE_OPTIM_WRAPPERS, _ENGINE)
OPTIM_WRAPPER_CONSTRUCTORS = _child('optimizer wrapper constructor', MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS, _ENGINE)
WEIGHT_INITIALIZERS = _child('weight initializer', MMENGINE_WEIGHT_INITIALIZERS, f'{_DOOR}.models')
