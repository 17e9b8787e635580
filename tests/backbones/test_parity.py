"""Equality with the authors' implementation: outputs and gradients that were computed with it, on synthetic weights.

``data/parity.npz`` travels with the project. A folder of more such cases (NAME.json, NAME.npz) is taken from
MMLOCALMAMBA_PARITY, or from ../shared/parity beside the checkout, if it is there.
"""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import synthetic
import torch
from torch.nn import functional as F

from mmlocalmamba.backbones import LocalVim, LocalVMamba
from mmlocalmamba.backbones.archs import LOCAL_VMAMBA
from mmlocalmamba.weights import from_official, to_official
from mmlocalmamba.weights.official import VMAMBA_DIRECTIONS

DATA = Path(__file__).parents[1] / 'data'
CASES = Path(os.environ.get('MMLOCALMAMBA_PARITY', Path(__file__).parents[3] / 'shared' / 'parity'))
OWN = ['local_vssm_tiny', 'local_vim_tiny', 'vmamba_v2_tiny']

SUPERNET_VMAMBA = dict(embed_dims=[32, 64, 128, 256], depths=[2, 2, 9, 2])
SUPERNET_VIM = dict(embed_dims=128, num_layers=20)
# The authors' constructor -> ours.
MODELS = {
    'local_vim_tiny': lambda: LocalVim('tiny'),
    'local_vim_small': lambda: LocalVim('small'),
    'local_vim_tiny_middle_cls_token': lambda: LocalVim('tiny', cls_token='middle', rope=False, out_type='cls_token'),
    'local_vim_tiny_wo_search': lambda: LocalVim('tiny', directions=['h', 'h_flip', 'w2', 'w2_flip']),
    'local_vim_tiny_search': lambda: LocalVim(SUPERNET_VIM, directions='search'),
    'local_vssm_tiny': lambda: LocalVMamba('tiny'),
    'local_vssm_small': lambda: LocalVMamba('small'),
    'local_vssm_tiny_search': lambda: LocalVMamba(SUPERNET_VMAMBA, directions='search'),
    'local_vssm_tiny_backbone': lambda: LocalVMamba('tiny', out_indices=(0, 1, 2, 3)),
}


def model_of(case):
    """Our model for the authors' constructor: its name, or VMamba's arguments."""
    theirs = case['model']
    if isinstance(theirs, str):
        return MODELS[theirs]()
    arch = next(arch for arch in ('tiny_v2', 'tiny_v2_s2l5', 'small_v2', 'small_v2_s1l20', 'base_v2', 'base_v2_s1l20')
                if (LOCAL_VMAMBA[arch]['embed_dims'][0], LOCAL_VMAMBA[arch]['depths'], LOCAL_VMAMBA[arch]['expand'])
                == (theirs['dims'], theirs['depths'], theirs['ssm_ratio']))
    return LocalVMamba(arch, directions=list(VMAMBA_DIRECTIONS), scattn=False,
                       out_indices=(0, 1, 2, 3) if theirs['class'] == 'Backbone_VSSM' else -1)


def check(case, outputs, gradients):
    """Run our model on the case's weights and compare.

    Args:
        case: parsed json of the case.
        outputs: the authors' outputs.
        gradients: {authors' parameter: L2 norm of its gradient}, empty if there are none.
    """
    ours, unmatched = from_official(synthetic.state_dict(case['state_dict'], case['salt']))
    assert not unmatched
    head = [ours.pop(name, None) for name in ('head.fc.weight', 'head.fc.bias')]
    model = model_of(case).eval()
    model.load_state_dict({name[len('backbone.'):]: value for name, value in ours.items()}, strict=True)
    image = synthetic.image(case['input_seed'], case['input_shape']).requires_grad_(bool(gradients))
    with torch.set_grad_enabled(bool(gradients)):
        results = model(image)
        if head[0] is not None:
            feature = results[0] if results[0].dim() == 2 else results[0].mean((2, 3))
            results = (F.linear(feature, *head), )
    assert len(results) == len(outputs)
    strides = case.get('out_stride_chw', (1, 1, 1))  # of all outputs, or a list of each one's
    for (c, h, w), result, expected in zip(strides if isinstance(strides[0], list) else [strides] * len(results),
                                           results, outputs, strict=True):
        result = result.detach() if result.dim() == 2 else result.detach()[:, ::c, ::h, ::w]
        assert (result - expected).norm() <= 1e-5 * expected.norm()
    if gradients:
        (results[0] * synthetic.image(case['input_seed'] + 1, results[0].shape)).sum().backward()
        own = {f'backbone.{name}': parameter.grad for name, parameter in model.named_parameters()}
        own = to_official(own)[0]
        own = {name: grad for name, grad in own.items() if not name.startswith('rope.')}
        assert set(own) <= set(gradients)
        for name, grad in own.items():
            assert grad.norm().item() == pytest.approx(gradients[name], rel=1e-3), name


@pytest.mark.parametrize('name', OWN)
def test_own_fixture(name):
    case = json.loads((DATA / f'{name}.json').read_text())
    with np.load(DATA / 'parity.npz') as data:
        norms = dict(zip(sorted(case['state_dict']), data[f'{name}.grad_norms'].tolist()))
        check(case, [torch.from_numpy(data[f'{name}.out0'])],
              {key: value for key, value in norms.items() if np.isfinite(value)})


@pytest.mark.skipif(not CASES.is_dir(), reason='no folder of further parity cases; see the docstring')
@pytest.mark.parametrize('name', sorted(path.stem for path in CASES.glob('*.json')))
def test_further_cases(name):
    case = json.loads((CASES / f'{name}.json').read_text())
    if name in OWN:
        with np.load(DATA / 'parity.npz') as data, np.load(CASES / f'{name}.npz') as source:
            np.testing.assert_array_equal(data[f'{name}.out0'], source['out0'].astype(np.float32))
        return
    with np.load(CASES / f'{name}.npz') as data:
        outputs = [torch.from_numpy(data[key]) for key in sorted(data.files) if key.startswith('out')]
        gradients = {key[len('grad::'):]: float(data[key][0]) for key in data.files
                     if key.startswith('grad::') and key != 'grad::input'}
    check(case, outputs, gradients)
