"""Trainings that stop before NaN reaches the weights."""
import json
import logging
import os
from collections.abc import Iterable
from typing import Any

import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from mmlocalmamba.engine.loops import need_own_loop
from mmlocalmamba.files import write_whole
from mmlocalmamba.registry import HOOKS

# Steps in a row that a loss scaler may skip. From the usual 65536, they lead to 6e-5.
SCALER_SKIPS = 30
# Entry of a checkpoint.
_GUARD = 'numerical_guard'
# A loss scaler below this has nothing left to scale down: float16 has no smaller number.
_LEAST_SCALE = 2.**-24


def loss_scaler(wrapper: Any) -> Any:
    """The scaler of an optimizer wrapper that scales losses (float16), or None."""
    scaler = getattr(wrapper, 'loss_scaler', None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def on_any_process(*flags: bool | Tensor, device: torch.device) -> list[bool]:
    """Which of the flags are set on any process."""
    shared = torch.stack([torch.as_tensor(flag, dtype=torch.float32, device=device) for flag in flags])
    dist.all_reduce(shared, op='max')
    return [bool(flag) for flag in shared.tolist()]


def first_of(names: list[str]) -> str:
    """The first four, for a message."""
    return ', '.join(names[:4]) + (', ...' if len(names) > 4 else '')


def sample_names(batch: Any) -> list[dict]:
    """What a batch of the mm* repositories says of its samples, as far as it says something."""
    samples = batch.get('data_samples', ()) if isinstance(batch, dict) else ()
    names = []
    for sample in samples or ():
        meta = getattr(sample, 'metainfo', {})
        names.append({key: meta[key] for key in ('img_path', 'img_id', 'sample_idx') if key in meta})
    return names


def write_record(runner: Any, kind: str, losses: Iterable[Tensor], batches: Iterable[Any], **more: list[str]) -> str:
    """Write down in the work directory where numbers that are none came from; the file's path."""
    rank = dist.get_rank()
    record = dict(iteration=runner.iter + 1, epoch=runner.epoch + 1, rank=rank,
                  losses=[str(loss.item()) for loss in losses], **more,
                  samples=[name for batch in batches for name in sample_names(batch)])
    path = os.path.join(runner.work_dir, f'{kind}_iter{runner.iter + 1}_rank{rank}.json')
    write_whole(path, json.dumps(record, indent=1, default=str))
    return path


class _GuardedWrapper:
    """The optimizer wrapper that a model's train_step gets: between gradients and step, MMEngine has no hook."""

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
    """Stops a training before a loss or gradient that is NaN or infinite reaches the weights.

    ``nonfinite_iter{N}_rank{R}.json`` in the work directory names the iteration, the loss, the parameters with such
    gradients and the samples (img_path, img_id) of the batches since the last step. All processes decide alike.

    Infinite gradients that a loss scaler (float16) has scaled are its business: it skips the step and scales down. Only
    if that does not help, the training stops: gradients of the model itself are infinite or NaN.

    Args:
        skip: leave out the optimizer's step up to so many times before stopping. It is of no use, and the training
            stops, if a buffer (a BatchNorm's statistics) has taken up the numbers.
        scaler_skips: steps in a row that a loss scaler may skip.

    Raises:
        FloatingPointError: in training, with the above.
        ValueError: before training, if its loop is none of mmlocalmamba, which give the guard its place.
        TypeError: before training, if there is more than one optimizer, or its wrapper has a way of its own to update.
    """

    priority = 'LOWEST'

    def __init__(self, skip: int = 0, scaler_skips: int = SCALER_SKIPS) -> None:
        for name, value in (('skip', skip), ('scaler_skips', scaler_skips)):
            if value < 0:
                raise ValueError(f'{name} must be at least 0, got {value}')
        self.skip, self.scaler_skips = skip, scaler_skips
        self.skipped = 0  # steps, in the whole training
        self.overflows = 0  # steps that the scaler has skipped, in a row
        self.batches: list[Any] = []
        self.losses: list[Tensor] = []

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        if runner._resume and _GUARD in checkpoint:
            self.skipped, self.overflows = (checkpoint[_GUARD][name] for name in ('skipped', 'overflows'))

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        checkpoint[_GUARD] = dict(skipped=self.skipped, overflows=self.overflows)

    def before_train(self, runner: Any) -> None:
        loop = need_own_loop(runner, self, 'which give it a place between gradients and step')
        wrapper = runner.optim_wrapper
        if not isinstance(wrapper, OptimWrapper) or type(wrapper).update_params is not OptimWrapper.update_params:
            raise TypeError("NumericalGuardHook guards one OptimWrapper that updates as MMEngine's do, got "
                            f'{type(wrapper).__name__}')
        scaler = loss_scaler(wrapper)
        if scaler is not None and scaler.get_scale() < _LEAST_SCALE:
            raise FloatingPointError(f'the loss scaler begins at {scaler.get_scale():g}, so no step would be made: the '
                                     'training that wrote the checkpoint had NaN or Inf in all of its last gradients')
        loop.optim_wrapper = _GuardedWrapper(wrapper, self, runner)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.batches.append(data_batch)

    def allows_step(self, runner: Any) -> bool:
        """Whether the optimizer, or its scaler, may take its step with the gradients at hand. All processes must ask.

        Raises:
            FloatingPointError: the training is to stop.
        """
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
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
            end = f'Buffers have it, too: {first_of(buffers) or "those of another process"}'
        elif scaler is None and self.skipped >= self.skip:
            end = (f'{self.skipped} such steps were skipped before; NumericalGuardHook(skip=...) says how many may be')
        elif scaler is not None and (self.overflows > self.scaler_skips or scaler.get_scale() < _LEAST_SCALE):
            end = (f'It is the {self.overflows}. step in a row, and the loss scaler is down to {scaler.get_scale():g}: '
                   'the gradients are so whatever the scale; NumericalGuardHook(scaler_skips=...) says how many may be')
        elif scaler is not None:
            return True  # the scaler skips it
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
                f'in the gradients of {len(parameters)} parameters ({first_of(parameters)}). The samples of the batch: '
                f'{path}')
