"""Weights of others and of ours: names, loading with a report, and the hook for whole checkpoints."""
from mmlocalmamba.compat import register_loader
from mmlocalmamba.weights.contents import STATE_DICT_KEYS, architecture, backbone_state_dict, find_state_dict
from mmlocalmamba.weights.hook import OfficialCheckpointHook
from mmlocalmamba.weights.loading import Pretrained
from mmlocalmamba.weights.names import from_official, to_official

__all__ = ['STATE_DICT_KEYS', 'OfficialCheckpointHook', 'Pretrained', 'architecture', 'backbone_state_dict',
           'find_state_dict', 'from_official', 'to_official']

register_loader()
