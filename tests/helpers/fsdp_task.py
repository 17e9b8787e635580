"""Two steps through MMEngine's FlexibleRunner, with sharded parameters (FSDP) on several processes, for the tests.

    python tests/helpers/fsdp_task.py WORK_DIR
"""
import os
import sys
from functools import partial
from pathlib import Path

import torch
from mmengine.runner import FlexibleRunner
from search_task import Classifier, loader
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

BATCH = 8
# On CPUs, which MMEngine does not expect: it takes the GPU of the process, and its state_dict_cfg='full' has torch move
# what is saved to the CPU and free the original, which on a CPU is the same memory.
STRATEGY = dict(
    type='FSDPStrategy',
    model_wrapper=dict(type='MMFullyShardedDataParallel', device_id=torch.device('cpu'),
                       auto_wrap_policy=partial(size_based_auto_wrap_policy, min_num_params=500)),
    state_dict_cfg=dict(state_dict_type='FULL_STATE_DICT',
                        state_dict_config=dict(type='FullStateDictConfig', rank0_only=True),
                        optim_state_dict_config=dict(type='FullOptimStateDictConfig', rank0_only=True)))


def main(work_dir, iterations=2):
    """Without drop path, which each process draws for itself."""
    torch.manual_seed(0)
    processes = int(os.environ.get('WORLD_SIZE', 1))
    if processes > 1:
        torch.distributed.init_process_group('gloo')
    runner = FlexibleRunner(
        model=Classifier(directions=['h', 'w2'], drop_path_rate=0.), work_dir=work_dir,
        strategy=STRATEGY if processes > 1 else None, default_scope='mmengine',
        train_dataloader=dict(loader(noise=0.), batch_size=BATCH // processes),
        train_cfg=dict(type='mmlocalmamba.IterBasedTrainLoop', max_iters=iterations),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.02)),
        custom_hooks=[dict(type='mmlocalmamba.NumericalGuardHook')],
        launcher='pytorch' if processes > 1 else 'none', randomness=dict(seed=7), log_level='ERROR',
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=iterations)))
    runner.train()
    own = sum(parameter.numel() for parameter in runner.model.parameters())
    Path(work_dir, f'parameters{os.environ.get("RANK", 0)}').write_text(str(own))


if __name__ == '__main__':
    torch.set_num_threads(1)
    main(*sys.argv[1:])
