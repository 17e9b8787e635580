"""Try a training without keeping anything: prepare it as a training does, make two steps (``check CONFIG``)."""
import argparse
import io
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.hooks import EarlyStoppingHook
from mmengine.logging import MMLogger
from mmengine.runner import Runner

from mmlocalmamba.backbones.base import find_backbone
from mmlocalmamba.openmmlab import checks
from mmlocalmamba.openmmlab.checks.findings import counted
from mmlocalmamba.openmmlab.checks.model import DATALOADERS
from mmlocalmamba.openmmlab.checks.reader import is_local, read_headers
from mmlocalmamba.openmmlab.engine.broken_files import Loader
from mmlocalmamba.openmmlab.engine.data import naming_annotation_files

# Number of samples that are loaded.
_LOADED = 3


class _Report:
    """Print lines at once, and count the problems."""

    def __init__(self) -> None:
        self.problems = 0
        self.failures: set[str] = set()

    def line(self, word: str, text: str) -> None:
        self.problems += word == 'problem'
        print(f'{word:8}{text}', flush=True)

    def attempt(self, what: str, function: Callable[[], Any], silent: bool = False) -> Any:
        """Return the function's result; report a problem and return None if it fails. ``silent`` drops its output."""
        try:
            with naming_annotation_files(), redirect_stdout(io.StringIO()) if silent else nullcontext():
                return function()
        except Exception as error:  # configuration and data may raise any exception
            said = f'{type(error).__name__}: {error or "(no message)"}'
            if said in self.failures:  # as of the loop of the validation, which a hook asks for again
                return None
            self.failures.add(said)
            place = traceback.extract_tb(error.__traceback__)[-1]
            explained = place.name == naming_annotation_files.__name__
            self.line('problem', f'{what}: {said}' + (
                '' if explained else f' [{place.name}, {place.filename}:{place.lineno}]'))
            return None


def isolated(cfg: Config, folder: str) -> Config:
    """Return a copy of a configuration that runs in this process only, without logging, and writes into ``folder``."""
    cfg = Config(cfg.to_dict())
    cfg.merge_from_dict(dict(work_dir=folder, launcher='none', log_level='CRITICAL', resume=False,
                             experiment_name=f'check_{Path(folder).name}',
                             vis_backends=[dict(type='LocalVisBackend')]))
    if 'visualizer' in cfg:
        cfg.visualizer.update(vis_backends=cfg.vis_backends, name=cfg.experiment_name)
    for key in DATALOADERS:
        if cfg.get(key):
            cfg[key].update(num_workers=0, persistent_workers=False)
            for option in ('prefetch_factor', 'timeout', 'multiprocessing_context'):
                cfg[key].pop(option, None)
            if cfg.get('default_scope') == 'mmpretrain':  # as its train.py and test.py, and no other package's
                cfg[key].setdefault('collate_fn', dict(type='default_collate'))
    for hook in cfg.get('custom_hooks') or ():
        if isinstance(hook, dict) and hook.get('held_out'):  # of a direction search
            hook['held_out'].update(num_workers=0, persistent_workers=False)
    for hook in (cfg.get('default_hooks') or {}).values():
        if str((hook or {}).get('type')).endswith('TrainingChecksHook'):
            hook.audit = False  # it is made, and printed, by itself
    return cfg


def _load_samples(report: _Report, name: str, dataset: Any) -> None:
    """Load the first sample and random ones."""
    count = len(dataset)
    for index in dict.fromkeys([0, *(random.randrange(count) for _ in range(_LOADED - 1))]):
        info = dataset.get_data_info(index) if hasattr(dataset, 'get_data_info') else {}
        path = info.get('img_path')
        if report.problems and path and is_local(path) and not os.path.exists(path):
            continue  # the audit has named it
        what = f'{name}: sample {index}, {path}'
        # The data set itself loads another sample where the pipeline gives none.
        sample = report.attempt(what, partial(getattr(dataset, 'prepare_data', dataset.__getitem__), index))
        if sample is None:
            if not report.problems:
                report.line('note', f'{what}: the pipeline gives nothing, and another sample replaces it')
            continue
        size = 'x'.join(map(str, sample['inputs'].shape)) if torch.is_tensor(sample.get('inputs')) else 'no tensor'
        report.line('', f'{what}: {size}')


def _extremes(dataset: Any) -> list[int]:
    """Return the samples whose pictures are the narrowest, widest, lowest and highest, without those of equal size."""
    if not hasattr(dataset, 'get_data_info'):
        return []
    places = {dataset.get_data_info(index).get('img_path'): index for index in range(len(dataset))}
    headers = read_headers(filter(is_local, places), Loader())
    sizes = {(header.width, header.height): places[path] for path, header in headers.items() if header.width}
    return [sizes[size] for size in dict.fromkeys(choose(sizes, key=lambda size: size[side]) for side in (0, 1)
                                                  for choose in (min, max))] if sizes else []


def _batch_of_extremes(report: _Report, name: str, loop: Any, model: torch.nn.Module) -> None:
    """Collate samples of the most different sizes, as a batch of any order may hold them."""
    loader, dataset = loop.dataloader, loop.dataloader.dataset
    size = loader.batch_size or getattr(loader.batch_sampler, 'batch_size', 1)
    places = _extremes(dataset) if size > 1 else []
    samples = {place: dataset[place] for place in places}
    shapes = {place: sample['inputs'].shape for place, sample in samples.items()
              if isinstance(sample, dict) and torch.is_tensor(sample.get('inputs'))}
    pairs = [pair for pair in zip(shapes, list(shapes)[1:]) if shapes[pair[0]] != shapes[pair[1]]]
    for pair in pairs[:1]:
        try:
            model.data_preprocessor(loader.collate_fn([samples[place] for place in pair]), name == 'training')
        except Exception as error:  # of any collate function and preprocessor
            key = dict(training='train', validation='val', test='test')[name]
            shown = ' and '.join(f'{shapes[place][-1]}x{shapes[place][-2]} ({dataset.get_data_info(place)["img_path"]})'
                                 for place in pair)
            pipeline = 'train_pipeline' if key == 'train' else 'test_pipeline'
            report.line('problem', f'{name} data: the pipeline gives pictures of different sizes (width x height), '
                                   f'{shown}, which make no batch of {key}_dataloader.batch_size={size} '
                                   f"({type(error).__name__}): add dict(type='Resize', scale=(WIDTH, HEIGHT)) to "
                                   f'{pipeline} after the loading' + (
                                       '' if key == 'train' else f', or set {key}_dataloader.batch_size=1'))


def _audit(report: _Report, cfg: Config, loops: dict[str, Any], model: torch.nn.Module) -> list[str]:
    """Read the data of the loops and print what is found. Return the names of those whose classes are in doubt."""
    found = report.attempt('the data', lambda: checks.audit_run(cfg, loops, model)) or checks.Audit()
    for tally in found.tallies:
        report.line('', f'\n{tally}\n')
    for finding in sorted(found.findings, key=lambda finding: not finding.stops):
        report.line('problem' if finding.stops else 'note', str(finding))
    return [name for name in loops if found.doubts_classes(name)]


def _other_test(report: _Report, runner: Runner, cfg: Config) -> dict[str, Any]:
    """Return {'test': loop} if the data of the test are others than those of the validation."""
    datasets = [{**loader.dataset.to_dict(), 'pipeline': None} for key in ('val_dataloader', 'test_dataloader')
                if (loader := cfg.get(key)) and isinstance(loader.get('dataset'), dict)]
    if not cfg.get('test_dataloader') or len(datasets) == 2 and datasets[0] == datasets[1]:
        return {}
    try:
        with redirect_stdout(io.StringIO()):
            return dict(test=runner.test_loop)
    except Exception as error:  # as in a training, which does not need it
        report.line('note', f'the test data cannot be read: {type(error).__name__}: {error}')
        return {}


def _peak(device: torch.device) -> str:
    if device.type == 'cuda':
        return f'{torch.cuda.max_memory_allocated(device) / 2 ** 30:.1f} GiB of GPU memory'
    try:
        import resource
    except ImportError:  # Windows
        return 'an unknown amount of memory in this process'
    unit = 2 ** 30 if sys.platform == 'darwin' else 2 ** 20  # macOS reports bytes, Linux KiB
    return f'{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.1f} GiB of memory in this process'


def _synchronize(device: torch.device) -> float:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _prepare(report: _Report, runner: Runner) -> None:
    """Do what Runner.train does before its first iteration, hooks included."""
    loop = runner.train_loop

    def optimizer() -> None:
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)

    def schedulers() -> None:
        if runner.param_schedulers is not None:
            runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)

    for what, function in (('the optimizer', optimizer), ('param_scheduler', schedulers)):
        report.attempt(what, function)
    for hook in runner.hooks:
        if isinstance(hook, checks.TrainingChecksHook):  # its problems are reported already
            hook.strict = False
    if isinstance(runner.optim_wrapper, dict):
        return  # hooks need the optimizer
    if not _call_hooks(report, runner, 'before_run'):
        return
    report.attempt('load_from', runner.load_or_resume)
    runner.optim_wrapper.initialize_count_status(runner.model, 0, loop.max_iters)
    loop.optim_wrapper = runner.optim_wrapper
    if _call_hooks(report, runner, 'before_train'):
        runner.model.train()
        _call_hooks(report, runner, 'before_train_epoch')


def _call_hooks(report: _Report, runner: Runner, point: str, **kwargs: Any) -> bool:
    """Call all hooks at a point of the training. Return True if none fails."""
    before = report.problems
    for hook in runner.hooks:
        if hasattr(hook, point):
            report.attempt(type(hook).__name__, partial(getattr(hook, point), runner, **kwargs))
    return report.problems == before


def _step(report: _Report, runner: Runner, cfg: Config) -> None:
    """Make two training steps and time the second."""
    loop, device = runner.train_loop, next(runner.model.parameters()).device
    runner.model.train()
    batch = next(iter(loop.dataloader))
    if not _call_hooks(report, runner, 'before_train_iter', batch_idx=0, data_batch=batch):
        return
    for _ in range(2):
        start = _synchronize(device)
        losses = runner.model.train_step(batch, optim_wrapper=runner.optim_wrapper)
    seconds = _synchronize(device) - start
    broken = [name for name, value in losses.items() if not torch.as_tensor(value).isfinite().all()]
    if broken:
        report.line('problem', f'NaN or Inf in {", ".join(broken)} of the first steps')
    size = loop.dataloader.batch_size or getattr(loop.dataloader.batch_sampler, 'batch_size', len(batch['inputs']))
    report.line('', f'step of {size} images on {device}: {seconds:.2f} s, at most {_peak(device)}; losses '
                + ', '.join(f'{name} {float(torch.as_tensor(value).sum()):.3g}' for name, value in losses.items()))
    steps = loop.max_iters
    hours, minutes = divmod(round(steps * seconds / 60), 60)
    report.line('', f'training: {steps} steps, about {hours} h {minutes} min on this {device.type} at this speed, '
                    'without data loading and validation')
    base = cfg.get('auto_scale_lr', {}).get('base_batch_size')
    accumulated = cfg.optim_wrapper.get('accumulative_counts', 1)
    if base and size * accumulated != base:
        rate, count = cfg.optim_wrapper.optimizer.lr, size * accumulated
        report.line('note', f'the learning rate {rate:g} is for {base} images a step, one process has {count}: set '
                            f'optim_wrapper.optimizer.lr={rate * count / base:.3g} and '
                            f'auto_scale_lr.base_batch_size={count}, or --auto-scale-lr'
                            + ' (mim train mmlocalmamba)' * (runner.default_scope.scope_name == 'mmseg')
                            + (f', or train on {base // count} GPUs' if base % count == 0 else ''))


def _evaluate(runner: Runner, loop: Any, step: str) -> dict[str, Any]:
    """Return the metrics of the loop's first batch."""
    batch = next(iter(loop.dataloader))
    runner.model.eval()
    with torch.no_grad():
        outputs = getattr(runner.model, step)(batch)
    loop.evaluator.process(data_samples=outputs, data_batch=batch)
    return loop.evaluator.evaluate(len(outputs))


def _monitored(runner: Runner) -> Iterator[tuple[str, str]]:
    """Yield (setting, metric) for each metric that the configuration names."""
    for hook in runner.hooks:
        for key in getattr(hook, 'save_best', None) or ():
            yield f'{type(hook).__name__}.save_best', key
        if isinstance(hook, EarlyStoppingHook):
            yield 'EarlyStoppingHook.monitor', hook.monitor
    schedulers = runner.param_schedulers or ()
    for group in schedulers.values() if isinstance(schedulers, dict) else [schedulers]:
        for scheduler in group:
            if getattr(scheduler, 'need_val_args', False):
                yield f'{type(scheduler).__name__}.monitor', scheduler.monitor


def _validate(report: _Report, runner: Runner) -> None:
    metrics = report.attempt('a step of validation', partial(_evaluate, runner, runner.val_loop, 'val_step'),
                             silent=True)
    for setting, key in _monitored(runner):
        if metrics and key != 'auto' and key not in metrics:
            report.line('problem', f'{setting}={key!r} is not a metric of val_evaluator, which has '
                                   f'{", ".join(metrics)}')
        elif metrics is not None and not metrics:
            report.line('note', f'{setting}={key!r} is not checked: the evaluation of one batch has no metrics')


def check(cfg: Config) -> bool:
    """Prepare a training, check its data, make two training steps and one validation step, and print the findings.

    Hooks are called as in a training up to its first iteration, and ``load_from`` is loaded. Of a configuration that
    only tests, one step is made.

    Nothing is kept; ``cfg`` is not changed.

    Args:
        cfg: complete configuration of a training.

    Returns:
        True if no problems were found.
    """
    report = _Report()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for problem in checks.configuration_problems(cfg):
            report.line('problem', problem)
        _check(report, isolated(cfg, folder))
        MMLogger.get_current_instance().handlers.clear()  # its log file is in the removed folder
    print(f'\n{counted(report.problems, "problem")} found, see above.' if report.problems else '\nNo problems found.')
    return not report.problems


def check_file(path: str, options: list[str] | None = None) -> bool:
    """Read a configuration file and :func:`check` it.

    Args:
        path: of the file.
        options: KEY=VALUE overrides, as of ``--cfg-options``.
    """
    cfg = Config.fromfile(path)
    if options:
        parser = argparse.ArgumentParser()
        parser.add_argument('--cfg-options', nargs='+', action=DictAction)
        cfg.merge_from_dict(parser.parse_args(['--cfg-options', *options]).cfg_options)
    return check(cfg)


def _check(report: _Report, cfg: Config) -> None:
    runner = report.attempt('building the model', lambda: Runner.from_cfg(cfg))
    if runner is None:
        return
    model = runner.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    report.line('', f'model: {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters, '
                    f'{trained:,} of them trained, on {next(model.parameters()).device}')
    backbone = find_backbone(model)[1]

    report.attempt('weights to start from', model.init_weights)
    if backbone is None:
        report.line('note', 'the model has no backbone of mmlocalmamba')
    elif not backbone.pretrained_checkpoints() and not cfg.get('load_from'):
        report.line('note', f'{type(backbone).__name__} {checks.FROM_SCRATCH}')
    else:
        report.line('', f'weights: {", ".join(backbone.pretrained_checkpoints()) or cfg.load_from}')
    loop = report.attempt('training data', lambda: runner.train_loop, silent=True)
    val_loop = report.attempt('validation data', lambda: runner.val_loop, silent=True)
    if runner._train_loop is None:
        test_loop = report.attempt('test data', lambda: runner.test_loop, silent=True)
        if test_loop is not None:
            _audit(report, cfg, {'test': test_loop}, model)
            report.attempt('a batch of the test', partial(_batch_of_extremes, report, 'test', test_loop, model))
            report.attempt('a step of the test', lambda: _evaluate(runner, test_loop, 'test_step'), silent=True)
    if loop is None:
        return
    train = loop.dataloader.dataset
    val, evaluator = (None, None) if val_loop is None else (val_loop.dataloader.dataset, val_loop.evaluator)
    loops = {name: part for name, part in (('training', loop), ('validation', val_loop)) if part is not None}
    loops.update(_other_test(report, runner, cfg))
    doubted = _audit(report, cfg, loops, model)
    for problem in report.attempt('classes', lambda: [*checks.problems(model, train, val, evaluator, doubted),
                                                      *checks.batch_problems(model, loop.dataloader)]) or ():
        report.line('problem', problem)
    for name, dataset in (('training', train), ('validation', val)):
        if dataset is not None and len(dataset):
            _load_samples(report, name, dataset)
    for name, part in loops.items() if not report.problems else ():
        report.attempt(f'a batch of the {name}', partial(_batch_of_extremes, report, name, part, model))
    _prepare(report, runner)
    if not report.problems:
        report.attempt('a step of training', lambda: _step(report, runner, cfg))
    if not report.problems and val_loop is not None:
        _validate(report, runner)
    getattr(loop, 'at_end', ExitStack()).close()
