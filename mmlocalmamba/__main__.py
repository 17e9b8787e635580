"""``python -m mmlocalmamba``: ``doctor`` lists versions and backends, and tests that the backends compute correctly;
``check`` builds a training from a configuration, checks its data and makes a step, to find problems beforehand;
``predict`` draws what a model finds in pictures and writes it as JSON;
``tune`` times the Triton scan kernels on this GPU and stores the fastest block sizes."""
import argparse
import platform
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import torch

from mmlocalmamba import __version__, ops
from mmlocalmamba.ops import stand_ins
from mmlocalmamba.ops.backends.triton import tuning
from mmlocalmamba.ops.backends.triton.tune import AGREE, tune
from mmlocalmamba.ops.self_test import LIMIT, LIMIT_BFLOAT16, convolution_error, self_test

# Module -> distributions that may provide it.
_STACK = {
    'torch': ('torch', ),
    'triton': ('triton', ),
    'mmengine': ('mmengine', 'onedl-mmengine'),
    'mmcv': ('mmcv', 'onedl-mmcv', 'mmcv-lite'),
    'mmpretrain': ('mmpretrain', 'onedl-mmpretrain'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
    'mmseg': ('mmsegmentation', 'onedl-mmsegmentation'),
    'mamba_ssm': ('mamba-ssm', ),
    'transformers': ('transformers', ),
}
_CHECKPOINTS = ('.pth', '.pt', '.ckpt', '.safetensors', '.bin', '.tar')
_ALL_OPS = 'MMCV=compiled tools/install.sh installs all ops'


def _installed(distributions: tuple[str, ...]) -> str:
    found = []
    for name in distributions:
        try:
            found.append(f'{version(name)} ({name})')
        except PackageNotFoundError:
            pass
    return ', '.join(found) or 'not installed'


def _mmcv_ops() -> str | None:
    """Say where the ops of mmcv come from; None without mmcv. mmcv itself, which takes seconds, is not imported."""
    mmcv = find_spec('mmcv')
    if mmcv is None:
        return None
    for folder in map(Path, mmcv.submodule_search_locations or ()):
        if any((folder / f'_ext{suffix}').is_file() for suffix in EXTENSION_SUFFIXES):
            return 'compiled'
        if (folder / '_ext.py').is_file():
            spec = spec_from_file_location('_ext', folder / '_ext.py')
            assert spec is not None and spec.loader is not None
            stand_in = module_from_spec(spec)
            try:
                spec.loader.exec_module(stand_in)
            except Exception as error:  # torchvision is missing, or does not fit torch
                return f'FAIL: torchvision stands in for them, but {type(error).__name__}: {error}'
            return (f'not compiled. torchvision stands in for {", ".join(stand_in.STANDS_IN)}; the others refuse.\n'
                    f'{"":14}{_ALL_OPS}')
    return f"none: mmdet's detectors do not run. {_ALL_OPS}; MMCV=torchvision, those that torchvision has"


def _multimodal_problem() -> str | None:
    from mmlocalmamba.openmmlab import multimodal  # it may import mmpretrain
    return multimodal.problem()


def doctor() -> bool:
    """Print the report. Return False if a backend fails or computes wrong results."""
    print(f'mmlocalmamba {__version__}, Python {platform.python_version()}, {platform.platform()}')
    for name, distributions in _STACK.items():
        print(f'  {name:11} {_installed(distributions)}')
        if name == 'mmcv' and (found := _mmcv_ops()):
            print(f'  {"mmcv ops":12}{found}')
    if find_spec('transformers') and (found := _multimodal_problem()):
        print(f'  {"":12}{found}.')
    devices = ['cpu']
    if torch.cuda.is_available():
        devices.append('cuda')
        print(f'  {"GPU":12}{torch.cuda.get_device_name()}, CUDA {torch.version.cuda or torch.version.hip}')
    well = True
    for device in devices:
        print(f'\nBackends for {device} tensors, in the order of preference:')
        for name, reason in ops.available_backends(torch.empty(0, device=device)).items():
            if reason is not None:
                print(f'  {name:12}no: {reason}')
                continue
            try:
                error, seconds = self_test(name, device)
            except Exception as problem:  # report any failure
                print(f'  {name:12}FAILS: {type(problem).__name__}: {problem}')
                well = False
                continue
            right = error <= LIMIT  # False for NaN
            well &= right
            print(f'  {name:12}{"yes" if right else "WRONG"}: relative error {error:.1e}, '
                  f'{1e3 * seconds:.1f} ms for a small scan and its gradients')
        if ops.available_backends(torch.empty(0, device=device))['triton'] is None:
            print('\nBlock sizes of the Triton scan kernels:')
            for line in tuning.in_force(torch.device(device)):
                print(f'  {line}')
    if ops.cpu.instruction_sets():
        print(f'\nInstruction sets of the CPU kernels: {", ".join(ops.cpu.instruction_sets())}')
    print("\nOther people's Mamba code: `python -m mmlocalmamba.ops.stand_ins SCRIPT` stands in for packages "
          'that are not installed (docs/extend.md):')
    for name, state in stand_ins.status().items():
        print(f'  {name:26}{state}')
    error = convolution_error()
    if not error <= LIMIT_BFLOAT16:
        print(f"\nWARNING: torch's convolutions in bfloat16 are wrong on this processor for some shapes (relative "
              f'error {error:.1e}).\n  Backbones of this package do not use them. For necks, heads and other '
              'models in 16 bits on this CPU:\n  export ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 (docs/training.md)')
    return well


def predict(model: str, paths: list[str], out: str, device: str | None, score: float) -> bool:
    """Predict pictures by a name of :func:`mmlocalmamba.list_models` or a configuration.

    Args:
        model: name, or configuration file.
        paths: pictures and folders, after the checkpoint, if there is one.
        out: folder of the results.
        device: torch device; None for a GPU if there is one.
        score: least score of an object.

    Returns:
        False if a picture could not be read.
    """
    from mmlocalmamba.files import SCHEME, meant, packaged_names
    from mmlocalmamba.models import list_models
    from mmlocalmamba.weights import released
    if find_spec('PIL') is None:
        raise RuntimeError('pictures need Pillow: pip install pillow')
    from mmlocalmamba.predict import classifier, predict_files

    checkpoint = paths.pop(0) if '://' in paths[0] or paths[0].endswith(_CHECKPOINTS) else None
    if not paths:
        raise ValueError('no picture is named')
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    if model in list_models() or model in list_models(pretrained=True) and released.NAMED[model].model:
        predictor = classifier(model, checkpoint, device)
    else:
        from mmlocalmamba.openmmlab.configs import config_path
        from mmlocalmamba.openmmlab.inference import inferencer
        stem = Path(model).stem
        if checkpoint is None and released.find(SCHEME + stem) is None and stem not in packaged_names():
            known = sorted({*list_models(pretrained=True), *packaged_names()})
            hint = '' if Path(model).exists() else meant(Path(model.removesuffix('.py')).name, {*known, *list_models()})
            raise ValueError(f'no weights come with {model}: {hint}Name a checkpoint '
                             f'after it. Names with weights are {", ".join(known)}')
        try:
            config = model if model.endswith('.py') else config_path(model)
        except ValueError as error:
            raise ValueError(f'{meant(model, list_models())}{error}') from None
        predictor = inferencer(config, checkpoint or SCHEME + stem, device, score)
    return predict_files(predictor, paths, Path(out))


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


_positive.__name__ = 'positive integer'  # argparse prints it in its error message


def main() -> None:
    parser = argparse.ArgumentParser(prog='python -m mmlocalmamba', description=__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    commands.add_parser('doctor', help='versions, backends, and a self-test of each')
    command = commands.add_parser('check', help='find problems of a training with a configuration')
    command.add_argument('config', help='configuration file')
    command.add_argument('--cfg-options', nargs='+', metavar='KEY=VALUE', help='override settings')
    command = commands.add_parser('predict', help='draw what a model finds in pictures, and write it as JSON',
                                  description='Classes, boxes or masks. The weights of a NAME are downloaded once.')
    command.add_argument('model', metavar='NAME|CONFIG', help='name of weights, of a model, or a configuration file')
    command.add_argument('paths', nargs='+', metavar='[CHECKPOINT] IMAGE',
                         help=f'checkpoint (a URL, or a file that ends in {", ".join(_CHECKPOINTS)}; default: the '
                              "name's own), then pictures and folders")
    command.add_argument('--out', default='predictions', help='folder of the results (default: %(default)s)')
    command.add_argument('--device', help='such as cpu or cuda:0 (default: a GPU if there is one)')
    command.add_argument('--score', type=float, default=0.3, help='least score of an object (default: %(default)s)')
    command = commands.add_parser('tune', help='choose block sizes of the Triton scan kernels for this GPU',
                                  description='Stores the choice in ~/.cache/mmlocalmamba/tuning.json (or under '
                                              f'$XDG_CACHE_HOME), or in the file ${tuning.CACHE_VARIABLE}.')
    command.add_argument('--dtypes', nargs='+', choices=[str(dtype).removeprefix('torch.') for dtype in AGREE],
                         default=['bfloat16', 'float32'], help='dtypes of the activations (default: %(default)s)')
    command.add_argument('--states', nargs='+', type=_positive, default=[16, 1],
                         help='d_state of the models (default: %(default)s)')
    command.add_argument('--quick', action='store_true', help='time two shapes once instead of eight three times')
    args = parser.parse_args()
    if args.command == 'doctor':
        raise SystemExit(0 if doctor() else 1)
    if args.command == 'check':
        from mmlocalmamba.openmmlab.checks import trial  # doctor and tune need torch alone
        raise SystemExit(0 if trial.check_file(args.config, args.cfg_options) else 1)
    if args.command == 'predict':
        try:
            raise SystemExit(0 if predict(args.model, args.paths, args.out, args.device, args.score) else 1)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            raise SystemExit(f'{type(error).__name__}: {error}') from None
    if not torch.cuda.is_available():
        raise SystemExit('There is no GPU to tune for.')
    reason = ops.available_backends(torch.empty(0, device='cuda'))['triton']
    if reason is not None:
        raise SystemExit(f'The Triton kernels cannot run here: {reason}.')
    raise SystemExit(0 if tune(args.dtypes, args.states, args.quick) else 1)


if __name__ == '__main__':
    main()
