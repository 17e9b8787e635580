"""Check that everything starts on the installed stack, OpenMMLab or OneDL.

1. Every configuration in configs/ builds: model, optimizer, data pipelines.
2. Each task trains briefly on tiny data, evaluates, writes a checkpoint, resumes it and tests it, all through mim's
   command line.

The script prints one line per check, and the end of the output of a failed one.
"""
import argparse
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# {task: (configuration, mim's name of the repository in OpenMMLab (None if it has none) and in OneDL, a metric that the
# evaluation must print)}
TASKS = {
    'detection': (
        'mask-rcnn_localvmamba-nano_digits', 'mmdet', 'mmdetection', 'coco/segm_mAP'),
    'segmentation': ('upernet_localvim-nano_digits', 'mmsegmentation', 'mmsegmentation', 'mIoU'),
    'classification': ('localvmamba-nano_digits', 'mmpretrain', 'mmpretrain', 'accuracy/top1'),
    'oriented boxes': (
        'rotated/oriented-rcnn_localvmamba-nano_digits', None, 'onedl-mmrotate', 'dota/mAP'),
    'our own tools': ('localvmamba-nano_digits', 'mmlocalmamba', 'mmlocalmamba', 'accuracy/top1'),
}


def is_onedl():
    try:
        version('onedl-mmengine')
    except PackageNotFoundError:
        return False
    return True


def has_mmrotate():
    return is_onedl() and find_spec('mmrotate') is not None


def without_rotated_boxes():
    """Return what is missing for a training with rotated boxes, or None."""
    if not has_mmrotate():
        return 'onedl-mmrotate is not installed (requirements/rotated-onedl.txt)'
    from mmcv import _ext
    stood_in = hasattr(_ext, 'STANDS_IN')  # by torchvision, which has no rotated boxes
    return "they need mmcv's own ops: MMCV=compiled make install STACK=onedl" if stood_in else None


class Checks:

    def __init__(self):
        self.passed = self.failed = 0

    def run(self, name, function, *args):
        """Call a function and count an exception as a failure. Return True on success."""
        start = time.time()
        try:
            function(*args)
        except Exception as error:
            known = isinstance(error, CheckFailed)
            print(str(error) if known else traceback.format_exc(), flush=True)
            self.failed += 1
        else:
            self.passed += 1
            print(f'pass  {name} ({time.time() - start:.0f} s)', flush=True)
            return True
        print(f'FAIL  {name}', flush=True)
        return False


class CheckFailed(Exception):
    pass


def build(path):
    """Build the model, the optimizer and the data pipelines of a configuration."""
    from mmengine.config import Config
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import MODELS, TRANSFORMS, DefaultScope

    cfg = Config.fromfile(path)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        # Mixed precision needs a GPU. Its optimizer is built in the same way.
        cfg.optim_wrapper.update(type='OptimWrapper')
        for key in ('loss_scale', 'dtype'):
            cfg.optim_wrapper.pop(key, None)
        build_optim_wrapper(model, cfg.optim_wrapper)
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            dataset = loader.dataset
            while 'dataset' in dataset:
                dataset = dataset.dataset
            for transform in dataset.pipeline:
                TRANSFORMS.build(transform)


def command(arguments, folder, must_print=''):
    """Run a command in a folder. Its output must match the pattern must_print."""
    done = subprocess.run(
        [str(argument) for argument in arguments], cwd=folder, text=True, timeout=900,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0 or not re.search(must_print, done.stdout):
        reason = (f'exit status {done.returncode}' if done.returncode else
                  f'its output does not match {must_print!r}')
        # mim's own traceback only says that its command failed, so cut it off.
        output = re.split(r'Traceback [^\n]*\n  File "[^"\n]*/bin/mim"', done.stdout)[0]
        tail = '\n'.join(output.splitlines()[-40:])
        raise CheckFailed(f'{tail}\n{" ".join(map(str, arguments))}\n{reason}')


def length_options(cfg, length):
    """Return settings for a training of ``length`` epochs or iterations with an evaluation after each."""
    unit = 'iters' if 'max_iters' in cfg.train_cfg else 'epochs'
    return [f'train_cfg.max_{unit}={length}', 'train_cfg.val_interval=1',
            'default_hooks.checkpoint.interval=1', 'default_hooks.checkpoint.save_best=None',
            'default_hooks.logger.interval=1']


def latest_checkpoint(work_dir):
    return Path((work_dir / 'last_checkpoint').read_text().strip())


def train(repository, config, cfg, work_dir, length, metric):
    command(
        ['mim', 'train', repository, config, '--work-dir', work_dir,
         '--cfg-options', *length_options(cfg, length)],
        work_dir.parent, must_print=metric)
    if not latest_checkpoint(work_dir).is_file():
        raise CheckFailed(f'no checkpoint in {work_dir}')


def resume(repository, config, cfg, work_dir, length, metric):
    before = latest_checkpoint(work_dir)
    command(
        ['mim', 'train', repository, config, '--work-dir', work_dir, '--resume',
         '--cfg-options', *length_options(cfg, length)],
        work_dir.parent, must_print=f'(?s)resumed epoch.*{metric}')
    if latest_checkpoint(work_dir) == before:
        raise CheckFailed(f'resumed from {before}, but wrote no newer checkpoint')


def test(repository, config, work_dir, metric):
    command(
        ['mim', 'test', repository, config, '--checkpoint', latest_checkpoint(work_dir),
         '--work-dir', work_dir / 'test'],
        work_dir.parent, must_print=metric)


def run_task(checks, folder, task):
    from mmengine.config import Config

    name, openmmlab, onedl, metric = TASKS[task]
    repository = onedl if is_onedl() else openmmlab
    config = ROOT / 'configs' / f'{name}.py'
    work_dir = folder / task.replace(' ', '_')
    try:
        cfg = Config.fromfile(config)
    except Exception:
        cfg = None  # an earlier check has reported the error
    # The learning-rate schedule of epochs needs at least two.
    length = 1 if cfg is not None and 'max_iters' in cfg.train_cfg else 2
    # Each step needs the previous one, so a failure counts for all later steps.
    ready = cfg is not None
    for text, function, args in (
            (f'mim train {repository}', train, (config, cfg, work_dir, length, metric)),
            (f'mim train {repository} --resume', resume,
             (config, cfg, work_dir, length + 1, metric)),
            (f'mim test {repository}', test, (config, work_dir, metric))):
        label = f'{task}: {text} {name}'
        if ready:
            ready = checks.run(label, function, repository, *args)
        else:
            checks.failed += 1
            print(f'FAIL  {label} (not tried)', flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', choices=['build', *TASKS], help='run only this')
    args = parser.parse_args()
    # Run this environment's mim, even if the environment is not activated.
    os.environ['PATH'] = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])

    checks = Checks()
    print(f'Smoke run on the {"OneDL" if is_onedl() else "OpenMMLab"} stack', flush=True)
    if args.only in (None, 'build'):
        # Optimizers would log each parameter.
        logging.disable(logging.WARNING)
        warnings.simplefilter('ignore')
        folders = ['configs'] + ['configs/rotated'] * has_mmrotate()
        for path in sorted(path for folder in folders for path in (ROOT / folder).glob('*.py')):
            checks.run(f'build {path.stem}', build, path)
    tasks = [task for task in TASKS if args.only in (None, task)]
    if 'oriented boxes' in tasks and (missing := without_rotated_boxes()):
        print(f'oriented boxes are not trained: {missing}')
        tasks.remove('oriented boxes')
    if tasks:
        with tempfile.TemporaryDirectory(prefix='mmlocalmamba-smoke-') as name:
            folder = Path(name)
            converter = ROOT / 'tools/dataset_converters/digits.py'
            if checks.run('tiny data', command, [
                    sys.executable, converter, 'data/digits', '--scale', 'tiny', '--rotated'], folder):
                for task in tasks:
                    run_task(checks, folder, task)
    print(f'{checks.passed} passed, {checks.failed} failed')
    return 1 if checks.failed or not checks.passed else 0


if __name__ == '__main__':
    sys.exit(main())
