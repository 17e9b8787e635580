"""Layer-wise decay of learning rates: its parameters, and its combination with other options."""
import itertools

import job_task
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import build_optim_wrapper
from torch import nn

from mmlocalmamba.backbones import LocalVMamba

CONSTRUCTOR = 'mmlocalmamba.LayerDecayOptimWrapperConstructor'
ARCH = dict(embed_dims=[8, 16], depths=[1, 1], d_state=1)


class Model(nn.Module):
    """A backbone, and heads beside it."""

    def __init__(self):
        super().__init__()
        self.backbone = LocalVMamba(ARCH, directions=['h', 'w2'])
        self.decode_head = nn.Linear(16, 3)
        self.auxiliary_head = nn.Sequential(nn.Linear(8, 3), nn.BatchNorm1d(3))
        self.auxiliary_head.backbone_proj = nn.Linear(8, 8)  # its name does not make it part of the backbone


def groups(model, **paramwise):
    wrapper = build_optim_wrapper(model, dict(
        constructor=CONSTRUCTOR, optimizer=dict(type='AdamW', lr=1., weight_decay=0.1), paramwise_cfg=paramwise))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(group['params'][0])]: group for group in wrapper.optimizer.param_groups}


def test_it_asks_the_backbone():
    found = groups(Model(), decay_rate=0.5, custom_keys={'A_log': dict(decay_mult=0.)})
    lr = {name: group['lr'] for name, group in found.items()}
    assert lr['backbone.norm1.weight'] == 1
    assert lr['backbone.stages.1.blocks.0.mixer.in_proj.weight'] == 0.5
    assert lr['backbone.stages.0.downsample.reduction.weight'] == lr['backbone.stages.0.blocks.0.norm.bias'] == 0.25
    assert lr['backbone.patch_embed.projection.weight'] == 0.125
    a_log = found['backbone.stages.0.blocks.0.mixer.ssm.A_log']
    assert a_log['lr'] == 0.25 and a_log['weight_decay'] == 0 and a_log['lr_scale'] == 0.25
    assert found['backbone.norm1.weight']['weight_decay'] == 0.1


def test_heads_keep_their_rates():
    """Parameters outside the backbone keep their rate: with any name, and with rates of their own."""
    found = groups(Model(), decay_rate=0.5,
                   custom_keys={'auxiliary_head': dict(lr_mult=3.), 'stages.0': dict(lr_mult=2.)})
    heads = {name: group['lr'] for name, group in found.items() if not name.startswith('backbone.')}
    assert len(heads) == 8
    assert all(lr == (3. if name.startswith('auxiliary_head') else 1.) for name, lr in heads.items())
    assert found['backbone.stages.0.blocks.0.norm.bias']['lr'] == 2 * 0.25
    assert not any('lr_scale' in found[name] for name in heads)


@pytest.mark.parametrize('rate', [None, 0, 1.5])
def test_it_needs_a_rate(rate):
    with pytest.raises(ValueError, match=f'decay_rate in \\(0, 1\\], got {rate}'):
        groups(Model(), decay_rate=rate)
    assert {group['lr'] for group in groups(Model(), decay_rate=1).values()} == {1.}


def test_it_needs_a_backbone():
    with pytest.raises(TypeError, match='get_layer_depth; Linear has the backbone NoneType'):
        groups(nn.Linear(2, 2), decay_rate=0.5)


class Plain(job_task.PlainClassifier):
    """Nothing random in it, so that three batches may be one."""

    def __init__(self):
        super().__init__(directions=['h', 'w2'])


class Record(Hook):
    """Weights before and after."""

    def __init__(self, start):
        self.start = start

    def before_train(self, runner):
        runner.model.load_state_dict(self.start)

    def after_train(self, runner):
        self.change = {name: value.detach() - self.start[name] for name, value in runner.model.named_parameters()}


@pytest.mark.parametrize('accumulate,scaled,ema', [*itertools.product([1, 3], [False, True], [False, True])])
def test_rates_are_kept_in_every_training(tmp_path, accumulate, scaled, ema):
    """One step of gradient descent from the same start is shorter by the ratio of the learning rates."""
    start = {name: value.clone() for name, value in Plain().state_dict().items()}
    changes = []
    for rate in (1., 0.5):
        record = Record(start)
        job_task.build(
            tmp_path / str(rate), iterations=accumulate, accumulate=accumulate, ema=ema, model=Plain(), hooks=[record],
            wrapper=dict(type='ScaledOptimWrapper' if scaled else 'OptimWrapper', clip_grad=None,
                         constructor=CONSTRUCTOR, paramwise_cfg=dict(decay_rate=rate),
                         optimizer=dict(type='SGD', lr=1.))).train()
        changes.append(record.change)
    even, decayed = changes
    backbone = Plain().backbone
    for name, change in even.items():
        depth, count = backbone.get_layer_depth(name.removeprefix('backbone.')) if 'backbone' in name else (0, 1)
        torch.testing.assert_close(decayed[name], change * 0.5**(count - 1 - depth), rtol=1e-3, atol=1e-6)
    assert all(even[f'backbone.{name}.weight'].abs().max() > 0 for name in (
        'patch_embed.projection', 'stages.0.blocks.0.mixer.in_proj', 'stages.1.blocks.0.mixer.in_proj'))
