"""A training of seconds, for the tests: also as a program, so that it can be signalled, killed or run on processes.

    python tests/helpers/job_task.py '{"work_dir": "DIR", "iterations": 12, "kill_at": 7}'
"""
import json
import os
import signal
import subprocess
import sys
import time

import scaled  # noqa: F401  registers ScaledOptimWrapper
import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.runner import Runner
from search_task import Classifier as PlainClassifier
from search_task import Images, Interrupt
from torch import nn


class Classifier(PlainClassifier):
    """With everything that has a state or draws random numbers: BatchNorm, drop path, dropout."""

    def __init__(self):
        super().__init__(directions=['h', 'w2'], drop_path_rate=0.2)
        self.fc = nn.Sequential(nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 3))


class Poison(Hook):
    """Makes the loss NaN, or a gradient or a buffer infinite, in some iterations and on some processes."""

    priority = 'VERY_HIGH'

    def __init__(self, iterations, where, ranks=(0, 1)):
        self.iterations, self.where, self.ranks = set(iterations), where, ranks

    def bad(self, runner):
        return runner.iter + 1 in self.iterations and dist.get_rank() in self.ranks

    def before_train_iter(self, runner, **kwargs):
        if not self.bad(runner):
            return
        head = getattr(runner.model, 'module', runner.model).fc
        weight, before = head[2].bias, head[2].bias.detach().clone()
        if self.where == 'loss':
            weight.data.fill_(float('nan'))
            self.undo = lambda: weight.data.copy_(before)
        else:
            self.undo = weight.register_hook(lambda gradient: gradient * float('inf')).remove
        if self.where == 'buffer':
            head[0].running_mean.fill_(float('inf'))

    def after_train_iter(self, runner, **kwargs):
        if self.bad(runner):
            self.undo()


class Log(Images):
    """Images that write down which of them were loaded."""

    def __init__(self, folder, slow=0.):
        super().__init__()
        self.folder, self.slow = folder, slow

    def __getitem__(self, index):
        time.sleep(self.slow)
        with open(os.path.join(self.folder, 'loaded'), 'a') as file:
            file.write(f'{index}\n')
        return super().__getitem__(index)


def build(work_dir, epochs=3, iterations=None, workers=0, persistent=False, infinite=True, accumulate=1, ema=False,
          val_interval=1, resume=False, kill_at=None, signal_at=None, signal_group=False, interrupt=None, guard=None,
          data=None, slow=0., launcher='none', batch=2, interval=1, model=None, hooks=(),
          load_from=None, wrapper=None, poison=None, checkpoint=None, **loop):
    os.makedirs(work_dir, exist_ok=True)
    torch.manual_seed(0)
    if kill_at:
        interrupt = (kill_at, lambda: os.kill(os.getpid(), signal.SIGKILL))
    if signal_at:
        # A group is signalled from outside, as workers obey their parent.
        target = -os.getpgid(0) if signal_group else os.getpid()
        interrupt = (signal_at, lambda: subprocess.run(['kill', '-TERM', '--', str(target)], start_new_session=True))
    by_epoch = iterations is None
    train_cfg = (dict(type='mmlocalmamba.EpochBasedTrainLoop', max_epochs=epochs, **loop) if by_epoch else
                 dict(type='mmlocalmamba.IterBasedTrainLoop', max_iters=iterations, **loop))
    loader = dict(batch_size=batch, num_workers=workers, persistent_workers=persistent,
                  dataset=data or Log(work_dir, slow), collate_fn=dict(type='default_collate'),
                  sampler=dict(type='DefaultSampler' if by_epoch or not infinite else 'InfiniteSampler', shuffle=True))
    default_hooks = dict(
        checkpoint=dict(type='mmlocalmamba.CheckpointHook', interval=interval if by_epoch else 5 * interval,
                        by_epoch=by_epoch, max_keep_ckpts=1, **(checkpoint or {})),
        numerical_guard=dict(type='mmlocalmamba.NumericalGuardHook', **(guard or {})))
    custom_hooks = [dict(type='mmlocalmamba.LoadCheckpointHook'), *([Interrupt(*interrupt)] if interrupt else []),
                    *([dict(type='EMAHook', momentum=0.3)] if ema else []), *([Poison(*poison)] if poison else []),
                    *hooks]
    return Runner(
        model=model or Classifier(), work_dir=str(work_dir), experiment_name=f'{os.path.basename(work_dir)}{resume}',
        default_scope='mmengine', train_dataloader=loader, train_cfg=train_cfg,
        optim_wrapper={**dict(optimizer=dict(type='AdamW', lr=0.02), clip_grad=dict(max_norm=5.),
                              accumulative_counts=accumulate), **(wrapper or {})},
        param_scheduler=[dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=5),
                         dict(type='MultiStepLR', by_epoch=by_epoch, milestones=[2])],
        default_hooks=default_hooks, custom_hooks=custom_hooks, resume=resume, load_from=load_from,
        randomness=dict(seed=7), launcher=launcher, log_level='WARNING',
        # On CPUs, which MMEngine does not expect.
        cfg=dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)))


def state(runner):
    """All that a resumed training must have in common with one that was not interrupted."""
    model = getattr(runner.model, 'module', runner.model)
    return dict(model=model.state_dict(), optimizer=runner.optim_wrapper.state_dict(),
                schedulers=[scheduler.state_dict() for scheduler in runner.param_schedulers],
                progress=(runner.epoch, runner.iter), rng=torch.get_rng_state())


if __name__ == '__main__':
    torch.set_num_threads(1)
    if 'WORLD_SIZE' in os.environ:
        if os.environ['RANK'] == '1' and os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') != '0':
            time.sleep(float(os.environ.get('LATE_AFTER_RESTART', 0)))
        torch.distributed.init_process_group('gloo')
    for options in map(json.loads, sys.argv[1:]):
        # In the first life of one of the processes, under torchrun.
        if 'WORLD_SIZE' in os.environ:
            rank, life = options.pop('victim', 1), os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
            if (os.environ['RANK'], life) != (str(rank), '0'):
                options.update(kill_at=None, signal_at=None)
        runner = build(**options)
        runner.train()
        torch.save(state(runner), os.path.join(options['work_dir'], f'state{os.environ.get("RANK", 0)}.pt'))
