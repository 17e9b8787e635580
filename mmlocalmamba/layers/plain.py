"""Whether a fused kernel may read the parameters of a module instead of calling the module."""
from torch import nn
from torch.nn.modules import module as torch_module


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return True if a fused kernel may stand in for ``module(...)``.

    It may not if somebody has hooked, parametrised, pruned, quantised, wrapped or replaced the module, has given it
    another ``forward``, or hooks all modules (as counters of FLOPs do). The caller then calls the module.

    Args:
        module: a part of a model.
        kind: the class whose computation the kernel does.
    """
    return (type(module) is kind and 'forward' not in module.__dict__
            and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                     or module._backward_pre_hooks)
            and not (torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
                     or torch_module._global_backward_hooks or torch_module._global_backward_pre_hooks))
