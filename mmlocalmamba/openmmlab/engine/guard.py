"""Stop a training before NaN or Inf reaches the weights."""
import json
import logging
import os
from collections.abc import Iterable
from typing import Any

import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from mmlocalmamba.files import write_whole
from mmlocalmamba.openmmlab.engine.loops import require_resumable_loop
from mmlocalmamba.registry import HOOKS
from mmlocalmamba.weights.loading import unwrap_model

# Steps in a row that a loss scaler may skip. They reduce the usual first scale, 65536, to 6e-5.
SCALER_SKIPS = 30
# Key in a checkpoint.
_GUARD = 'numerical_guard'
# The smallest positive number of float16. A loss scaler below it cannot help.
_LEAST_SCALE = 2.**-24


def loss_scaler(wrapper: Any) -> Any:
    """Return the enabled loss scaler (float16) of an optimizer wrapper, or None."""
    scaler = getattr(wrapper, 'loss_scaler', None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def on_any_process(*flags: bool | Tensor, device: torch.device) -> list[bool]:
    """Return for each flag whether it is set on any process. All processes must call it.

    Args:
        flags: bools or boolean tensors without dimensions.
        device: device of the exchange.
    """
    shared = torch.stack([torch.as_tensor(flag, dtype=torch.float32, device=device) for flag in flags])
    dist.all_reduce(shared, op='max')
    return [bool(flag) for flag in shared.tolist()]


def first_names(names: list[str]) -> str:
    """Join the first four names for a message."""
    return ', '.join(names[:4]) + (', ...' if len(names) > 4 else '')


def sample_names(batch: Any) -> list[dict]:
    """Return img_path, img_id and sample_idx of each sample of an OpenMMLab batch, as far as they are known."""
    samples = batch.get('data_samples', ()) if isinstance(batch, dict) else ()
    names = []
    for sample in samples or ():
        meta = getattr(sample, 'metainfo', {})
        names.append({key: meta[key] for key in ('img_path', 'img_id', 'sample_idx') if key in meta})
    return names


def write_record(runner: Any, kind: str, losses: Iterable[Tensor], batches: Iterable[Any], **more: list[str]) -> str:
    """Record in the work directory where NaN or Inf came from.

    Args:
        runner: its iteration and epoch are recorded.
        kind: beginning of the file's name.
        losses: scalar tensors.
        batches: batches whose samples are named.
        **more: further entries, such as names of parameters.

    Returns:
        The path of the JSON file, ``{kind}_iter{N}_rank{R}.json``.
    """
    rank = dist.get_rank()
    record = dict(iteration=runner.iter + 1, epoch=runner.epoch + 1, rank=rank,
                  losses=[str(loss.item()) for loss in losses], **more,
                  samples=[name for batch in batches for name in sample_names(batch)])
    path = os.path.join(runner.work_dir, f'{kind}_iter{runner.iter + 1}_rank{rank}.json')
    write_whole(path, json.dumps(record, indent=1, default=str))
    return path


class _GuardedWrapper:
    """Optimizer wrapper that asks the hook before each step. MMEngine has no hook between gradients and step."""

    def __init__(self, wrapper: OptimWrapper, hook: 'NumericalGuardHook', runner: Any) -> None:
        self.wrapper, self.hook, self.runner = wrapper, hook, runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapper, name)

    def update_params(self, *args: Any, **kwargs: Any) -> None:
        OptimWrapper.update_params(self, *args, **kwargs)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        self.hook.losses.append(loss.detach().float())
        self.wrapper.backward(loss, **kwargs)

    def step(self, **kwargs: Any) -> None:
        if self.hook.allows_step(self.runner):
            self.wrapper.step(**kwargs)


@HOOKS.register_module()
class NumericalGuardHook(Hook):
    """Stop a training before a loss or gradient that is NaN or infinite reaches the weights.

    ``nonfinite_iter{N}_rank{R}.json`` in the work directory names the iteration, the losses, the parameters and buffers
    with NaN or Inf, and the samples (img_path, img_id) of the batches since the last step. All processes make the same
    decision.

    A loss scaler (float16) handles infinite scaled gradients itself: it skips the step and reduces the scale. The
    training stops only if a smaller scale does not help, because the gradients of the model are infinite or NaN.

    Args:
        skip: number of optimizer steps that may be skipped in the whole training. The training stops anyway if a buffer
            (such as BatchNorm statistics) holds NaN or Inf, because skipping the step does not repair it.
        scaler_skips: number of steps in a row that a loss scaler may skip.

    Raises:
        FloatingPointError: in training, if the loss or a gradient is NaN or infinite and the step may not be skipped;
            before training, if the loss scale is too small for any step.
        ValueError: if an argument is negative; before training, if the training loop is not one of mmlocalmamba, which
            call the guard before each step.
        TypeError: before training, if there is more than one optimizer, or if its wrapper overrides
            ``update_params``.
    """

    priority = 'LOWEST'

    def __init__(self, skip: int = 0, scaler_skips: int = SCALER_SKIPS) -> None:
        for name, value in (('skip', skip), ('scaler_skips', scaler_skips)):
            if value < 0:
                raise ValueError(f'{name} must be at least 0, got {value}')
        self.skip, self.scaler_skips = skip, scaler_skips
        self.skipped = 0  # steps that the guard skipped in the whole training
        self.overflows = 0  # steps in a row that the loss scaler skipped
        self.batches: list[Any] = []
        self.losses: list[Tensor] = []

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        if runner._resume and _GUARD in checkpoint:
            self.skipped, self.overflows = (checkpoint[_GUARD][name] for name in ('skipped', 'overflows'))

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        checkpoint[_GUARD] = dict(skipped=self.skipped, overflows=self.overflows)

    def before_train(self, runner: Any) -> None:
        loop = require_resumable_loop(runner, self, 'which calls the hook between gradients and step')
        wrapper = runner.optim_wrapper
        if not isinstance(wrapper, OptimWrapper) or type(wrapper).update_params is not OptimWrapper.update_params:
            raise TypeError("NumericalGuardHook needs one OptimWrapper with MMEngine's update_params, got "
                            f'{type(wrapper).__name__}: remove the hook, or set optim_wrapper.type')
        scaler = loss_scaler(wrapper)
        if scaler is not None and scaler.get_scale() < _LEAST_SCALE:
            raise FloatingPointError(f'the loss scale starts at {scaler.get_scale():g}, which skips every step: '
                                     'the last gradients of the training that wrote the checkpoint were all NaN or '
                                     'Inf. Resume from an earlier checkpoint')
        loop.optim_wrapper = _GuardedWrapper(wrapper, self, runner)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.batches.append(data_batch)

    def allows_step(self, runner: Any) -> bool:
        """Return True if the optimizer, or its loss scaler, may step with the present gradients.

        All processes must call it.

        Raises:
            FloatingPointError: if the training must stop.
        """
        model = unwrap_model(runner.model)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients, norm_type=float('inf'))
        losses, self.losses, batches, self.batches = self.losses, [], self.batches, []
        bad_loss, bad_gradient = on_any_process(~torch.stack(losses).isfinite().all(), ~norm.isfinite(),
                                                device=losses[0].device)
        if not bad_loss and not bad_gradient:
            self.overflows = 0
            return True
        scaler = None if bad_loss else loss_scaler(runner.optim_wrapper)
        self.overflows += scaler is not None
        buffers = [name for name, buffer in model.named_buffers()
                   if buffer.is_floating_point() and not buffer.isfinite().all()]
        end = None
        if on_any_process(bool(buffers), device=losses[0].device)[0]:
            end = f'Buffers have NaN or Inf, too: {first_names(buffers) or "on another process"}'
        elif scaler is None and self.skipped >= self.skip:
            end = f'{self.skipped} such steps were skipped before; NumericalGuardHook(skip=...) sets the limit'
        elif scaler is not None and (self.overflows > self.scaler_skips or scaler.get_scale() < _LEAST_SCALE):
            end = (f'This is overflow {self.overflows} in a row, and the loss scale is down to {scaler.get_scale():g}: '
                   'a smaller scale does not help; NumericalGuardHook(scaler_skips=...) sets the limit')
        elif scaler is not None:
            return True  # the loss scaler skips the step
        message = self._report(runner, model, losses, batches, buffers)
        if end is not None:
            raise FloatingPointError(f'{message}. {end}')
        self.skipped += 1
        print_log(f'{message}. The step is skipped, {self.skipped} of {self.skip}', logger='current',
                  level=logging.WARNING)
        return False

    @staticmethod
    def _report(runner: Any, model: nn.Module, losses: list[Tensor], batches: list[Any], buffers: list[str]) -> str:
        parameters = [name for name, parameter in model.named_parameters()
                      if parameter.grad is not None and not parameter.grad.isfinite().all()]
        path = write_record(runner, 'nonfinite', losses, batches, parameters=parameters, buffers=buffers)
        return (f'iteration {runner.iter + 1}: NaN or Inf in the loss ({", ".join(str(x.item()) for x in losses)}) or '
                f'in the gradients of {len(parameters)} parameters ({first_names(parameters)}). Samples of the batch: '
                f'{path}')
