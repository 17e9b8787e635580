"""``mamba_ssm``, ``causal_conv1d`` and the extensions of VMamba by their names, on any device, with all derivatives.

Names, arguments, results and state-dict keys are those of mamba_ssm (1.x, 2.3) and of its forks (Vim, VideoMamba,
SegMamba), of causal_conv1d (1.0 to 1.7) and of VMamba's kernels, so code that is written for them runs without CUDA:
:func:`stand_in_for`. Some cases that the CUDA kernels do not support are computed here: gradients of the last state,
constant B and C, complex state spaces, sequences that start within a batch. Wrong shapes raise ValueError instead of
AssertionError.
"""
import importlib.machinery
import importlib.util
import sys
import warnings
from types import ModuleType
from typing import Any

from mmlocalmamba.ops.stand_ins import csm_triton, extensions, mamba_modules
from mmlocalmamba.ops.stand_ins.causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
)
from mmlocalmamba.ops.stand_ins.extensions import (
    causal_conv1d_bwd_function,
    causal_conv1d_fwd_function,
    causal_conv1d_update_function,
)
from mmlocalmamba.ops.stand_ins.layer_norm import (
    RMSNorm,
    layer_norm_fn,
    layer_norm_ref,
    rms_norm_fn,
    rms_norm_ref,
)
from mmlocalmamba.ops.stand_ins.mamba_modules import Block, InferenceParams, Mamba
from mmlocalmamba.ops.stand_ins.mamba_ssm import (
    bimamba_inner_fn,
    bimamba_inner_ref,
    mamba_inner_fn,
    mamba_inner_fn_no_out_proj,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
    selective_state_update,
    selective_state_update_ref,
)

__all__ = ['Block', 'InferenceParams', 'Mamba', 'RMSNorm', 'bimamba_inner_fn', 'bimamba_inner_ref',
           'causal_conv1d_bwd_function', 'causal_conv1d_fn', 'causal_conv1d_fwd_function', 'causal_conv1d_ref',
           'causal_conv1d_update', 'causal_conv1d_update_function', 'causal_conv1d_update_ref', 'layer_norm_fn',
           'layer_norm_ref', 'mamba_inner_fn', 'mamba_inner_fn_no_out_proj', 'mamba_inner_ref', 'rms_norm_fn',
           'rms_norm_ref', 'selective_scan_fn', 'selective_scan_ref', 'selective_state_update',
           'selective_state_update_ref', 'stand_in_for', 'status']

_VERSIONS = {'mamba_ssm': '2.3.2', 'causal_conv1d': '1.7.0'}


def _named(*names: str) -> dict[str, Any]:
    return {name: globals()[name] for name in names}


def _packages() -> dict[str, dict[str, dict[str, Any]]]:
    """Return the packages: each module's names, by the module."""
    scans = _named('selective_scan_fn', 'selective_scan_ref', 'mamba_inner_fn', 'mamba_inner_ref',
                   'mamba_inner_fn_no_out_proj', 'bimamba_inner_fn', 'bimamba_inner_ref')
    updates = _named('selective_state_update', 'selective_state_update_ref')
    norms = _named('RMSNorm', 'layer_norm_fn', 'layer_norm_ref', 'rms_norm_fn', 'rms_norm_ref')
    convolutions = _named(*(name for name in __all__ if name.startswith('causal_conv1d')))
    packages = {
        'mamba_ssm': {
            'mamba_ssm': {**_named('Mamba'), **scans, **updates},
            'mamba_ssm.ops': {**scans, **updates},
            'mamba_ssm.ops.selective_scan_interface': {**scans, **updates},
            'mamba_ssm.ops.triton': {**scans, **updates},
            'mamba_ssm.ops.triton.selective_state_update': {**scans, **updates},
            'mamba_ssm.ops.triton.layer_norm': norms,
            'mamba_ssm.ops.triton.layernorm': norms,
            'mamba_ssm.modules': {},
            'mamba_ssm.modules.mamba_simple': {**_named('Mamba'), 'Block': mamba_modules.BlockV1},
            'mamba_ssm.modules.block': _named('Block'),
            'mamba_ssm.utils': {},
            'mamba_ssm.utils.generation': {**_named('InferenceParams'),
                                           'GenerationMixin': mamba_modules.GenerationMixin},
            'mamba_ssm.utils.hf': {'load_config_hf': mamba_modules.load_config_hf,
                                   'load_state_dict_hf': mamba_modules.load_state_dict_hf},
        },
        'causal_conv1d': {
            'causal_conv1d': convolutions,
            'causal_conv1d.causal_conv1d_interface': convolutions,
            'causal_conv1d.cpp_functions': convolutions,
        },
    }
    for name in ('selective_scan_cuda', 'selective_scan_cuda_core', 'selective_scan_cuda_oflex', 'causal_conv1d_cuda'):
        packages[name] = {name: vars(getattr(extensions, name))}
    return packages


_PACKAGES = _packages()
# No package, but a file of VMamba: what is done for it replaces nothing.
_CROSS_SCAN = 'csm_triton'


def _make(name: str, contents: dict[str, Any]) -> None:
    spec = importlib.machinery.ModuleSpec(name, None, origin=__file__, is_package=True)
    module = importlib.util.module_from_spec(spec)
    vars(module).update(contents, __doc__=f'{__name__} in place of {name}.', __file__=__file__,
                        __version__=_VERSIONS.get(name.partition('.')[0], ''))
    parent, _, child = name.rpartition('.')
    if parent:
        setattr(sys.modules[parent], child, module)
    sys.modules[name] = module


def _is_stand_in(module: ModuleType | None) -> bool:
    return getattr(module, '__file__', None) == __file__


def _installed(package: str) -> bool:
    return sys.modules.get(package) is not None or importlib.util.find_spec(package) is not None


def status() -> dict[str, str]:
    """Return for each name of :func:`stand_in_for` 'stood in for', 'installed' or 'not installed'; for 'csm_triton',
    which is a file of VMamba, 'stood in for' or 'as it is'."""
    found = {package: 'stood in for' if _is_stand_in(sys.modules.get(package))
             else 'installed' if _installed(package) else 'not installed' for package in _PACKAGES}
    return {**found, _CROSS_SCAN: 'stood in for' if csm_triton.installed() else 'as it is'}


def stand_in_for(*packages: str, replace: bool = False) -> list[str]:
    """Make packages that are not installed importable in this process, with the functions and modules of this package.

    Call it before anything imports them. It is ``python -m mmlocalmamba.ops.stand_ins`` from within Python.

    Args:
        packages: 'mamba_ssm', 'causal_conv1d', 'selective_scan_cuda', 'selective_scan_cuda_core',
            'selective_scan_cuda_oflex', 'causal_conv1d_cuda', and 'csm_triton', VMamba's file, whose functions then
            take tensors of any device. None: all of them.
        replace: Replace packages that are installed, too. Otherwise they stay, with a warning if they are named.

    Returns:
        The names that are stood in for after this call.

    Raises:
        ValueError: The package has another name.
        RuntimeError: The package is imported already and has to be replaced: other modules may hold its functions.
    """
    for package in packages:
        if package not in (*_PACKAGES, _CROSS_SCAN):
            raise ValueError(f'no stand-in for {package!r}: known are {", ".join((*_PACKAGES, _CROSS_SCAN))}')
    before = status()
    wanted = packages or (*_PACKAGES, _CROSS_SCAN)
    for package in wanted:
        if before[package] == 'installed' and not replace and packages:
            warnings.warn(f'{package} is installed and is not replaced: stand_in_for({package!r}, replace=True) '
                          'replaces it', stacklevel=2)
        if before[package] == 'installed' and replace and package in sys.modules:
            raise RuntimeError(f'{package} is imported already: call stand_in_for before anything imports it')
    for package in wanted:
        if package == _CROSS_SCAN:
            csm_triton.install()
        elif before[package] == 'not installed' or before[package] == 'installed' and replace:
            for name, contents in _PACKAGES[package].items():
                _make(name, contents)
    return [package for package, state in status().items() if state == 'stood in for']
