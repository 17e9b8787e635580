"""The loss curve of digits configurations on tiny data, for the tests, on one process or on several.

    python tests/helpers/loss_task.py DATA OUT \\
        '[{"config": "localvim-nano_digits", "iterations": 4, "bfloat16": true}, ...]'
"""
import json
import os
import sys
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hooks import Hook

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'tools'))
from runner import build_runner  # noqa: E402

from mmlocalmamba import config_path  # noqa: E402


class Losses(Hook):

    def __init__(self):
        self.values = []

    def after_train_iter(self, runner, outputs=None, **kwargs):
        self.values.append({name: float(value) for name, value in outputs.items() if 'loss' in name})


def configure(data, config, work_dir, iterations, batch=1, workers=0, options=None):
    cfg = Config.fromfile(config_path(config))
    cfg.merge_from_dict(options or {})
    cfg.work_dir = str(work_dir)
    cfg.train_dataloader.update(batch_size=batch, num_workers=workers, persistent_workers=workers > 0)
    dataset = cfg.train_dataloader.dataset
    dataset.data_root = str(Path(data, *Path(dataset.data_root).parts[2:]))  # data/digits/...
    cfg.train_cfg = dict(type='mmlocalmamba.IterBasedTrainLoop', max_iters=iterations)
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    cfg.param_scheduler = None
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.test_cfg = cfg.test_dataloader = cfg.test_evaluator = None
    cfg.default_hooks.checkpoint.update(by_epoch=False, interval=10 ** 9, save_best=None, save_last=False)
    cfg.log_level = 'WARNING'
    return cfg


def losses(data, work_dir, launcher='none', bfloat16=False, **task):
    hook = Losses()
    cfg = configure(data, work_dir=work_dir, **task)
    cfg.launcher = launcher
    if bfloat16:
        cfg.optim_wrapper.type = 'mmlocalmamba.BFloat16OptimWrapper'
    cfg.experiment_name = f'{cfg.work_dir}{os.environ.get("RANK", "")}'.replace('/', '_')
    runner = build_runner(cfg)
    runner.register_hook(hook)
    runner.train()
    return hook.values


if __name__ == '__main__':
    torch.set_num_threads(1)
    data, out, tasks = sys.argv[1:]
    launcher = 'pytorch' if 'WORLD_SIZE' in os.environ else 'none'
    curves = []
    for number, task in enumerate(json.loads(tasks)):
        curves.append(losses(data, os.path.join(out, str(number)), launcher, **task))
    Path(out, f'losses{os.environ.get("RANK", 0)}.json').write_text(json.dumps(curves))
