"""Hook that checks data and model before a training."""
import logging
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import BaseLoop, IterBasedTrainLoop

from mmlocalmamba.backbones.base import find_backbone
from mmlocalmamba.openmmlab.checks.model import FROM_SCRATCH, configuration_problems, problems
from mmlocalmamba.openmmlab.checks.resumption import resumption_remarks
from mmlocalmamba.registry import HOOKS


@HOOKS.register_module()
class TrainingChecksHook(Hook):
    """Stop a training before it starts if data, classes and heads do not agree.

    The hook also warns, before the first iteration and at the end of the log, if the backbone starts from scratch or
    the resumed training is already finished. It changes nothing.

    Args:
        strict: False only warns of problems.

    Raises:
        ValueError: before training, if there are problems. The message lists each with its remedy.
    """

    priority = 'LOWEST'

    def __init__(self, strict: bool = True) -> None:
        self.strict = strict
        self.remarks: list[str] = []

    def before_run(self, runner: Any) -> None:
        loop, val_loop = runner._train_loop, runner._val_loop
        if not isinstance(loop, BaseLoop):  # only a test
            return
        val, evaluator = (val_loop.dataloader.dataset, val_loop.evaluator) if isinstance(val_loop, BaseLoop) else (
            None, None)
        wrong = [*configuration_problems(runner.cfg), *problems(runner.model, loop.dataloader.dataset, val, evaluator)]
        if not wrong:
            return
        message = '\n  '.join(['this training is misconfigured:', *wrong])
        if self.strict:
            raise ValueError(f'{message}\nIf this is intended, TrainingChecksHook(strict=False) only warns.')
        print_log(message, logger='current', level=logging.WARNING)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        if isinstance(runner._train_loop, BaseLoop) and runner._resume:
            for remark in resumption_remarks(runner, checkpoint):
                print_log(remark, logger='current', level=logging.WARNING)

    def before_train(self, runner: Any) -> None:
        self.remarks = []
        backbone = find_backbone(runner.model)[1]
        if backbone is not None and not runner._has_loaded and not backbone.pretrained_checkpoints():
            self.remarks.append(f'{type(backbone).__name__} {FROM_SCRATCH}. docs/weights.md lists weights')
        # Iteration-based loops report max_epochs=1.
        key = 'max_iters' if isinstance(runner.train_loop, IterBasedTrainLoop) else 'max_epochs'
        done, of = (runner.iter, runner.max_iters) if key == 'max_iters' else (runner.epoch, runner.max_epochs)
        if runner._resume and runner._has_loaded and done >= of:
            self.remarks.append(f'nothing is trained: the training is already finished, {done} of {key}={of}. To '
                                f'continue, raise train_cfg.{key} and the ends of param_scheduler')
        self._log_remarks()

    def after_run(self, runner: Any) -> None:
        if isinstance(runner._train_loop, BaseLoop):
            self._log_remarks('as said before the training: ')

    def _log_remarks(self, opening: str = '') -> None:
        for remark in self.remarks:  # MMEngine's log drops a warning that repeats
            print_log(opening + remark, logger='current', level=logging.WARNING)
