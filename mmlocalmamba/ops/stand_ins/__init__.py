"""The functions of the packages ``mamba_ssm`` (2.3) and ``causal_conv1d`` (1.7), on any device, with all derivatives.

Names, arguments and results are those of the packages, so other Mamba models run without them. The packages need CUDA.
Some cases that their CUDA kernels do not support are computed here: gradients of the last state, constant B and C,
complex state spaces, sequences that start within a batch. Wrong shapes raise ValueError instead of AssertionError.
"""
import importlib.machinery
import importlib.util
import sys

from mmlocalmamba.ops.stand_ins.causal_conv1d import (
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
)
from mmlocalmamba.ops.stand_ins.mamba_ssm import (
    mamba_inner_fn,
    mamba_inner_ref,
    selective_scan_fn,
    selective_scan_ref,
    selective_state_update,
    selective_state_update_ref,
)

__all__ = ['causal_conv1d_fn', 'causal_conv1d_ref', 'causal_conv1d_update', 'causal_conv1d_update_ref',
           'mamba_inner_fn', 'mamba_inner_ref', 'selective_scan_fn', 'selective_scan_ref', 'selective_state_update',
           'selective_state_update_ref', 'stand_in_for']

# The modules in which the packages have these functions. Each stand-in module gets all functions of its package.
_MODULES = {
    'mamba_ssm': ('mamba_ssm', 'mamba_ssm.ops', 'mamba_ssm.ops.selective_scan_interface', 'mamba_ssm.ops.triton',
                  'mamba_ssm.ops.triton.selective_state_update'),
    'causal_conv1d': ('causal_conv1d', 'causal_conv1d.causal_conv1d_interface'),
}


def stand_in_for(*packages: str) -> None:
    """Replace the packages ``mamba_ssm`` and ``causal_conv1d`` by the functions of this module, in this process.

    Call it before anything imports the packages. Their modules without these functions cannot be imported afterwards.

    Args:
        packages: 'mamba_ssm', 'causal_conv1d' or both, installed or not.

    Raises:
        ValueError: The package has another name.
        RuntimeError: The package is imported already, so other modules may hold its functions.
    """
    for package in packages:
        if package not in _MODULES:
            raise ValueError(f'no stand-in for {package!r}: known are {", ".join(_MODULES)}')
        if package in sys.modules:
            raise RuntimeError(f'{package} is imported already: call stand_in_for before anything imports it')
    for package in packages:
        functions = [name for name in __all__ if name != 'stand_in_for'
                     and name.startswith('causal') == (package == 'causal_conv1d')]
        for name in _MODULES[package]:
            module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, None, is_package=True))
            module.__doc__ = f'{__name__} in place of {name}.'
            vars(module).update((function, globals()[function]) for function in functions)
            parent, _, child = name.rpartition('.')
            if parent:
                setattr(sys.modules[parent], child, module)
            sys.modules[name] = module
