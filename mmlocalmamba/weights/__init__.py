"""Weights: the authors' names <-> ours, and loading with a report."""
from mmlocalmamba.weights.loading import (
    STATE_DICT_KEYS,
    architecture,
    backbone_state_dict,
    find_state_dict,
    load_checkpoint,
    load_pretrained,
)
from mmlocalmamba.weights.official import from_official, to_official

__all__ = ['STATE_DICT_KEYS', 'architecture', 'backbone_state_dict', 'find_state_dict', 'from_official',
           'load_checkpoint', 'load_pretrained', 'to_official']
