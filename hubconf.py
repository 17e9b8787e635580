"""Entry points of torch.hub: ``torch.hub.load('PATH_OF_A_CLONE', 'localvim_tiny', source='local')``."""
from functools import partial

from mmlocalmamba import create_model, list_models

dependencies = ['torch', 'numpy', 'safetensors']


def _entry(name):
    entry = partial(create_model, name)
    entry.__doc__ = f'{name}; arguments are those of mmlocalmamba.create_model.'
    return entry


globals().update({name: _entry(name) for name in {*list_models(), *list_models(pretrained=True)}})
