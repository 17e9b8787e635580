"""Synthetic weights and images of the parity cases: pure functions of a name, a shape and a seed.

The outputs and gradient norms in ``data/parity.npz`` were computed with the authors' implementation on exactly these.
"""
import math
import zlib

import numpy as np
import torch


def weight(name, shape, salt=0):
    """float32 value of the authors' tensor ``name``."""
    rng = np.random.RandomState((zlib.crc32(name.encode()) + salt) & 0xFFFFFFFF)
    noise = rng.standard_normal(size=tuple(shape))
    leaf = name.split('.')[-1]
    if leaf.startswith('A_log'):
        value = np.log(np.arange(1., shape[-1] + 1)) + 0.1 * noise
    elif leaf == 'Ds' or leaf.startswith('D_'):
        value = 1 + 0.1 * noise
    elif leaf == 'dt_projs_bias' or ('dt_proj_' in name and leaf == 'bias'):
        dt = np.exp(rng.uniform(size=tuple(shape)) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
        value = dt + np.log(-np.expm1(-dt))
    elif 'dt_proj' in name:
        value = noise * shape[-1] ** -0.5
    elif leaf == 'weight' and len(shape) == 1:
        value = 1 + 0.1 * noise
    elif leaf in ('bias', 'pos_embed', 'cls_token'):
        value = 0.1 * noise
    elif leaf == 'weights':
        value = 0.5 * noise
    else:
        fan_in = shape[-1] if leaf == 'x_proj_weight' else int(np.prod(shape[1:])) if len(shape) > 1 else shape[0]
        value = noise * fan_in ** -0.5
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def state_dict(shapes, salt=0):
    """The authors' state dict for {name: shape}; rotary tables are computed by the model, not made here."""
    return {name: weight(name, shape, salt) for name, shape in shapes.items() if not name.startswith('rope.')}


def image(seed, shape):
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(size=tuple(shape)).astype(np.float32))
