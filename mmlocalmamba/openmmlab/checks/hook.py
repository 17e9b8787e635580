"""Hook that checks data and model before a training or test."""
import logging
import traceback
from typing import Any

from mmengine import dist
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import BaseLoop, IterBasedTrainLoop

from mmlocalmamba.backbones.base import find_backbone
from mmlocalmamba.openmmlab.checks.audit import Audit, audit_data, truths
from mmlocalmamba.openmmlab.checks.checkpoint import (
    resumption_problems,
    saved_classes,
    schedule_remarks,
    tested_classes,
)
from mmlocalmamba.openmmlab.checks.findings import Note
from mmlocalmamba.openmmlab.checks.model import (
    FROM_SCRATCH,
    batch_problems,
    class_problems,
    configuration_problems,
    problems,
    segmentation_head,
)
from mmlocalmamba.openmmlab.checks.resumption import resumption_remarks
from mmlocalmamba.openmmlab.compat import point_at_errors_under_mim
from mmlocalmamba.openmmlab.engine.broken_files import BrokenFilesHook
from mmlocalmamba.registry import HOOKS
from mmlocalmamba.weights.loading import unwrap_model

_AUDITED = 'the data were read'


@HOOKS.register_module()
class TrainingChecksHook(Hook):
    """Stop a training or test before it starts if data, classes, heads and checkpoint do not agree.

    The hook reads the data's files (docs/data.md, "The audit"), logs what they hold, and stops if they hold what nobody
    means. It also warns, before the first iteration and at the end of the log, if the backbone starts from scratch or
    the resumed training is already finished. Under mim, it adds a line to an error that stops the process, because mim
    prints a traceback of its own after it.

    Args:
        strict: False only warns of problems.
        audit: False does not read the data's files.

    Raises:
        ValueError: before the first iteration, if there are problems. The message lists each with its remedy.
    """

    priority = 'LOWEST'

    def __init__(self, strict: bool = True, audit: bool = True) -> None:
        self.strict, self.audit = strict, audit
        self.remarks: list[str] = []
        self.saved: tuple[str, ...] | None = None
        self.seen: list[Any] = []  # loops whose data were checked
        point_at_errors_under_mim()

    def before_run(self, runner: Any) -> None:
        self.saved = None
        loops = {name: loop for name, loop in (('training', runner._train_loop), ('validation', runner._val_loop),
                                               ('test', runner._test_loop))
                 if isinstance(loop, BaseLoop) and loop not in self.seen}
        self.seen += loops.values()
        model = unwrap_model(runner.model)
        found = audit_run(runner.cfg, loops, model) if self.audit else Audit()
        for tally in found.tallies:
            print_log(f'{_AUDITED} in {found.seconds:.1f} s:\n{tally}', logger='current')
        for note in found.notes:
            self._warn(f'note: {note}')
        wrong = [*configuration_problems(runner.cfg), *map(str, found.problems)]
        if 'training' in loops:
            loader = loops['training'].dataloader
            val = loops.get('validation')
            wrong += batch_problems(model, loader, dist.get_world_size())
            wrong += problems(model, loader.dataset, val and val.dataloader.dataset, val and val.evaluator,
                              [name for name in ('training', 'validation') if found.doubts_classes(name)])
        self._stop('training' if 'training' in loops else 'test', wrong)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        self.saved = saved_classes(checkpoint)
        if not isinstance(runner._train_loop, BaseLoop) or not runner._resume:
            return
        self._stop('training', resumption_problems(runner, checkpoint))
        for remark in (*resumption_remarks(runner, checkpoint), *schedule_remarks(runner, checkpoint)):
            self._warn(remark)

    def before_test(self, runner: Any) -> None:
        self._compare(runner, runner.test_loop.dataloader.dataset)

    def before_val(self, runner: Any) -> None:
        if not isinstance(runner._train_loop, BaseLoop):  # no training
            self._compare(runner, runner.val_loop.dataloader.dataset)

    def _compare(self, runner: Any, dataset: Any) -> None:
        """Compare the classes of a test with those of its checkpoint and model."""
        differs, moved = tested_classes(self.saved, dataset)
        if differs and not moved:
            self._warn(differs)
        wrong = [differs] if moved else []
        self._stop('test', wrong or class_problems(unwrap_model(runner.model), dataset, trained=True))

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
            self._warn(opening + remark)

    @staticmethod
    def _warn(text: str) -> None:
        print_log(text, logger='current', level=logging.WARNING)

    def _stop(self, what: str, wrong: list[str]) -> None:
        if not wrong:
            return
        message = '\n  '.join([f'this {what} is misconfigured:', *wrong])
        if self.strict:
            raise ValueError(f'{message}\nIf this is intended, TrainingChecksHook(strict=False) only warns. '
                             "mim's traceback, if one follows, only says that the process has ended.")
        self._warn(message)


def audit_run(cfg: Any, loops: dict[str, Any], model: Any) -> Audit:
    """Audit the data of loops in the first process; all processes get the result.

    Args:
        cfg: configuration of the run.
        loops: {'training', 'validation' or 'test': loop}.
        model: the model, for its segmentation head.
    """
    result = [_audit_run(cfg, loops, model) if dist.is_main_process() else None]
    dist.broadcast_object_list(result)
    assert result[0] is not None
    return result[0]


def _audit_run(cfg: Any, loops: dict[str, Any], model: Any) -> Audit:
    evaluated = {name: truths(loops[name].evaluator, cfg.get(key)) for name, key in (
        ('validation', 'val_evaluator'), ('test', 'test_evaluator')) if name in loops}
    skip = 0
    for hook in [*(cfg.get('default_hooks') or {}).values(), *(cfg.get('custom_hooks') or ())]:
        if isinstance(hook, dict) and str(hook.get('type')).endswith(BrokenFilesHook.__name__):
            skip = max(skip, hook.get('skip', 0))
    try:
        return audit_data({name: loop.dataloader.dataset for name, loop in loops.items()}, evaluated,
                          segmentation_head(model), skip, _annotation_files(cfg))
    except Exception as error:  # data of any kind; what the audit does not understand stops nothing
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Audit([Note('', f'the data were not read: {type(error).__name__}: {error} [{place.name}, '
                               f'{place.filename}:{place.lineno}]')])


def _annotation_files(cfg: Any) -> list[str]:
    """Return the annotation files of the test data."""
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    file, root = dataset.get('ann_file'), dataset.get('data_root')
    return [f'{root.rstrip("/")}/{file}' if root and not file.startswith('/') else file] if isinstance(
        file, str) and file.endswith('.json') else []
