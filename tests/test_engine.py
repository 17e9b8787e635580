import pytest
import torch
from mmengine.model import BaseModel
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from torch import nn

from mmlocalmamba.backbones import LocalVMamba

ARCH = dict(embed_dims=[8, 16], depths=[1, 1], d_state=1)


class Classifier(BaseModel):
    """The least model that MMEngine trains: our backbone and a linear head."""

    def __init__(self):
        super().__init__()
        self.backbone = LocalVMamba(ARCH, directions=['h', 'w2'])
        self.head = nn.Sequential()
        self.head.add_module('fc', nn.Linear(16, 3))

    def forward(self, inputs, labels, mode='loss'):
        logits = self.head.fc(self.backbone(inputs)[-1].mean((2, 3)))
        if mode == 'loss':
            return dict(loss=nn.functional.cross_entropy(logits, labels))
        return logits.argmax(-1).tolist()


def runner(tmp_path, name, epochs=2, **kwargs):
    data = [dict(inputs=torch.randn(3, 8, 8), labels=i % 3) for i in range(6)]
    return Runner(model=Classifier(), work_dir=str(tmp_path), experiment_name=name, default_scope='mmengine',
                  train_dataloader=dict(batch_size=2, num_workers=0, dataset=data,
                                        sampler=dict(type='DefaultSampler', shuffle=True),
                                        collate_fn=dict(type='default_collate')),
                  train_cfg=dict(by_epoch=True, max_epochs=epochs),
                  optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05)),
                  custom_hooks=[dict(type='mmlocalmamba.OfficialCheckpointHook')], **kwargs)


def test_layer_decay_asks_the_backbone():
    model = Classifier()
    wrapper = build_optim_wrapper(model, dict(
        constructor='mmlocalmamba.LayerDecayOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=1., weight_decay=0.1),
        paramwise_cfg=dict(decay_rate=0.5, custom_keys={'A_log': dict(decay_mult=0.)})))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {names[id(group['params'][0])]: group for group in wrapper.optimizer.param_groups}
    lr = {name: group['lr'] for name, group in groups.items()}
    assert lr['backbone.norm1.weight'] == 1 and lr['head.fc.weight'] == 1
    assert lr['backbone.stages.1.blocks.0.mixer.in_proj.weight'] == 0.5
    assert lr['backbone.stages.0.downsample.reduction.weight'] == lr['backbone.stages.0.blocks.0.norm.bias'] == 0.25
    assert lr['backbone.patch_embed.projection.weight'] == 0.125
    a_log = groups['backbone.stages.0.blocks.0.mixer.ssm.A_log']
    assert a_log['lr'] == 0.25 and a_log['weight_decay'] == 0 and groups['head.fc.weight']['weight_decay'] == 0.1


@pytest.mark.parametrize('rate', [None, 0, 1.5])
def test_layer_decay_needs_a_rate(rate):
    with pytest.raises(ValueError, match=r'decay_rate in \(0, 1\], got'):
        build_optim_wrapper(Classifier(), dict(constructor='mmlocalmamba.LayerDecayOptimWrapperConstructor',
                                               optimizer=dict(type='AdamW', lr=1.),
                                               paramwise_cfg=dict(decay_rate=rate)))


def test_layer_decay_needs_a_backbone():
    with pytest.raises(TypeError, match='get_layer_depth; Linear has the backbone NoneType'):
        build_optim_wrapper(nn.Linear(2, 2), dict(constructor='mmlocalmamba.LayerDecayOptimWrapperConstructor',
                                                  optimizer=dict(type='AdamW', lr=1.),
                                                  paramwise_cfg=dict(decay_rate=0.5)))




def test_scope_is_found_without_custom_imports():
    import subprocess
    import sys
    code = ('from mmengine.registry import MODELS, HOOKS\n'
            "model = MODELS.build(dict(type='mmlocalmamba.LocalVMamba', arch='nano'))\n"
            "MODELS.build(dict(type='mmlocalmamba.SCAttn', channels=16))\n"
            "HOOKS.build(dict(type='mmlocalmamba.OfficialCheckpointHook'))\n"
            'print(type(model).__module__)')
    result = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True)
    assert result.stdout.strip().endswith('mmlocalmamba.backbones.local_vmamba')


