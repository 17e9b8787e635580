"""Train a model. `mim train mmlocalmamba CONFIG` runs this script.

The configuration may belong to mmpretrain, mmdet or mmsegmentation. Its `default_scope` names the package.
"""
import os
import signal

# A signal may arrive before the training can handle it. Nothing is lost then, so exit with 75, which asks to start
# again. That is mmlocalmamba.openmmlab.engine.EXIT_PREEMPTED, whose import takes seconds. StartUpHook ends it.
if __name__ == '__main__':
    PREVIOUS_HANDLERS = {number: signal.signal(number, lambda *_: os._exit(75))
                         for number in {signal.SIGTERM, getattr(signal, 'SIGUSR1', signal.SIGTERM)}}

from mmengine.device import get_device
from runner import add_common_arguments, build_runner, load_config, parse_args

from mmlocalmamba.openmmlab.engine.data import naming_annotation_files
from mmlocalmamba.openmmlab.engine.preemption import StartUpHook


def main(previous_handlers=None):
    parser = add_common_arguments(__doc__)
    parser.add_argument('--amp', action='store_true', help='train with automatic mixed precision')
    parser.add_argument(
        '--auto-scale-lr', action='store_true',
        help='scale the learning rate from the total batch size that the configuration is made for')
    parser.add_argument(
        '--resume', nargs='?', const='auto', metavar='CHECKPOINT',
        help='resume from CHECKPOINT, or from the latest checkpoint in the work directory')
    args = parse_args(parser)
    cfg = load_config(args)

    if args.amp and get_device() == 'cpu':  # MMEngine's AmpOptimWrapper refuses CPUs
        cfg.optim_wrapper.type = 'mmlocalmamba.BFloat16OptimWrapper'
        for name in ('dtype', 'loss_scale', 'use_fsdp'):  # AmpOptimWrapper's
            cfg.optim_wrapper.pop(name, None)
    elif args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            parser.error('--auto-scale-lr: the configuration has no auto_scale_lr.base_batch_size')
        cfg.auto_scale_lr.enable = True
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume

    with naming_annotation_files():
        runner = build_runner(cfg)
        runner.register_hook(StartUpHook(previous_handlers or {}))
        runner.train()


if __name__ == '__main__':
    main(PREVIOUS_HANDLERS)
