"""A direction search of seconds, for the tests: also as a program, so that it can be killed or run on two processes.

    python tests/helpers/search_task.py WORK_DIR '{"mode": "bilevel", "kill_at": 7}'
"""
import json
import os
import signal
import sys

import numpy as np
import scaled  # noqa: F401  registers ScaledOptimWrapper
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from mmlocalmamba.backbones import LocalVMamba

ARCH = dict(embed_dims=[8, 16], depths=[1, 1], d_state=1)
CANDIDATES = ['h', 'v', 'w2', 'w2_flip', 'diag']


class Images(torch.utils.data.Dataset):
    """Twelve images; noise is added anew each time."""

    def __init__(self, noise=0.1):
        self.noise = noise

    def __len__(self):
        return 12

    def __getitem__(self, index):
        image = torch.from_numpy(np.random.RandomState(index).standard_normal((3, 16, 16)))
        noise = torch.from_numpy(self.noise * np.random.standard_normal((3, 16, 16)))
        return dict(inputs=(image + noise).float(), labels=index % 3)


class Classifier(BaseModel):

    def __init__(self, **backbone):
        super().__init__()
        self.backbone = LocalVMamba(ARCH, **backbone)
        self.fc = nn.Linear(16, 3)

    def forward(self, inputs, labels, mode='loss'):
        logits = self.fc(self.backbone(inputs)[-1].mean((2, 3)))
        return dict(loss=nn.functional.cross_entropy(logits, labels))


class Interrupt(Hook):
    priority = 'LOWEST'

    def __init__(self, iteration, action):
        self.iteration, self.action = iteration, action

    def after_train_iter(self, runner, **kwargs):
        if runner.iter + 1 == self.iteration:
            self.action()


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def loader(workers=0, noise=0.1):
    return dict(batch_size=4, num_workers=workers, dataset=Images(noise), collate_fn=dict(type='default_collate'),
                sampler=dict(type='DefaultSampler', shuffle=True))


def alphas(runner):
    model = getattr(runner.model, 'module', runner.model)
    return torch.stack([value for name, value in model.state_dict().items() if name.endswith('alphas')])


def build(work_dir, mode='joint', directions=None, hook=None, epochs=3, workers=0, noise=0.1, iterations=None,
          resume=False, ema=False, interrupt=None, kill_at=None, optim_wrapper=None, paramwise=True, launcher='none',
          seed=7):
    torch.manual_seed(0)
    directions = dict(candidates=CANDIDATES) if directions is None else directions
    hook = dict(type='mmlocalmamba.ScanSearchHook', mode=mode, k=2, **(hook or {}))
    if mode == 'bilevel':
        hook.setdefault('held_out', loader(workers, noise))
        hook.setdefault('optimizer', dict(type='Adam', lr=0.05))
    hooks = [dict(type='mmlocalmamba.LoadCheckpointHook'), hook]
    if ema:
        hooks.append(dict(type='EMAHook', momentum=0.3))
    if kill_at:
        interrupt = (kill_at, kill)
    if interrupt:
        hooks.append(Interrupt(*interrupt))
    wrapper = {**dict(optimizer=dict(type='AdamW', lr=0.02, weight_decay=0.5), clip_grad=dict(max_norm=5.)),
               **(optim_wrapper or {})}
    if paramwise:
        wrapper['paramwise_cfg'] = dict(custom_keys={'alphas': dict(decay_mult=0.)})
    by_epoch = iterations is None
    train_cfg = (dict(type='mmlocalmamba.EpochBasedTrainLoop', max_epochs=epochs) if by_epoch else
                 dict(type='mmlocalmamba.IterBasedTrainLoop', max_iters=iterations))
    return Runner(
        model=Classifier(directions=directions, drop_path_rate=0.2), work_dir=str(work_dir),
        experiment_name=f'{os.path.basename(work_dir)}{resume}', default_scope='mmengine',
        train_dataloader=loader(workers, noise), train_cfg=train_cfg, optim_wrapper=wrapper,
        param_scheduler=dict(type='CosineAnnealingLR', by_epoch=False, T_max=30),
        default_hooks=dict(checkpoint=dict(type='mmlocalmamba.CheckpointHook', interval=1 if by_epoch else 4,
                                           by_epoch=by_epoch, max_keep_ckpts=2)),
        custom_hooks=hooks, resume=resume, randomness=dict(seed=seed), launcher=launcher, log_level='WARNING',
        # On CPUs, which MMEngine does not expect.
        cfg=dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=None)))


if __name__ == '__main__':
    if 'WORLD_SIZE' in os.environ:
        torch.distributed.init_process_group('gloo')
    for work_dir, options in zip(sys.argv[1::2], sys.argv[2::2]):
        runner = build(work_dir, **json.loads(options))
        runner.train()
        torch.save(alphas(runner), os.path.join(work_dir, f'alphas{os.environ.get("RANK", 0)}.pt'))
