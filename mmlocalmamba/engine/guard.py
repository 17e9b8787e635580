"""Trainings that stop before NaN reaches the weights."""
import json
import logging
import os
from functools import partial
from typing import Any

import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from torch import nn

from mmlocalmamba.files import write_whole
from mmlocalmamba.registry import HOOKS

# Entry of a checkpoint.
_GUARD = 'numerical_guard'


def _sample_names(batch: Any) -> list[dict]:
    """What a batch of the mm* repositories says of its samples, as far as it says something."""
    samples = batch.get('data_samples', ()) if isinstance(batch, dict) else ()
    names = []
    for sample in samples or ():
        meta = getattr(sample, 'metainfo', {})
        names.append({key: meta[key] for key in ('img_path', 'img_id', 'sample_idx') if key in meta})
    return names


@HOOKS.register_module()
class NumericalGuardHook(Hook):
    """Stops a training before a loss or gradient that is NaN or infinite reaches the weights.

    ``nonfinite_iter{N}_rank{R}.json`` in the work directory names the iteration, the loss, the parameters with such
    gradients and the samples (img_path, img_id) of the batches since the last step. All processes decide alike. Inf in
    gradients that a loss scaler (float16) has scaled is left to the scaler, which skips the step and scales down.

    Args:
        skip: leave out the optimizer's step up to so many times before stopping. It is of no use, and the training
            stops, if a buffer (a BatchNorm's statistics) has taken up the numbers.

    Raises:
        FloatingPointError: in training, with the above.
    """

    priority = 'LOWEST'

    def __init__(self, skip: int = 0) -> None:
        if skip < 0:
            raise ValueError(f'skip must be at least 0, got {skip}')
        self.skip, self.skipped = skip, 0
        self.batches: list[Any] = []
        self.losses: list[torch.Tensor] = []

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        if runner._resume:
            self.skipped = checkpoint.get(_GUARD, 0)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        checkpoint[_GUARD] = self.skipped

    def before_train(self, runner: Any) -> None:
        wrapper = runner.optim_wrapper
        if not isinstance(wrapper, OptimWrapper):
            raise TypeError(f'NumericalGuardHook guards one OptimWrapper, got {type(wrapper).__name__}')
        # MMEngine has no hook between the gradients and the step.
        self.backward, self.step = wrapper.backward, wrapper.step
        wrapper.backward, wrapper.step = self._backward, partial(self._step, runner)
        wrapper.step._with_counter = True  # MMEngine's schedulers count steps, and miss their own wrapper otherwise

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self.batches.append(data_batch)

    def _backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        self.losses.append(loss.detach().float())
        self.backward(loss, **kwargs)

    def _step(self, runner: Any, **kwargs: Any) -> None:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        values = list(self.losses)
        scaler = getattr(runner.optim_wrapper, 'loss_scaler', None)
        if scaler is None or not scaler.is_enabled():
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            values.append(nn.utils.get_total_norm(gradients, norm_type=float('inf')).float())
        if not self._any(runner, not torch.stack(values).isfinite().all()):
            self.step(**kwargs)
        else:
            self._report(runner, model)
        self.batches.clear()
        self.losses.clear()

    @staticmethod
    def _any(runner: Any, mine: bool) -> bool:
        """Whether it is so on any process."""
        flag = torch.tensor(float(mine), device=next(runner.model.parameters()).device)
        dist.all_reduce(flag, op='max')
        return bool(flag)

    def _report(self, runner: Any, model: nn.Module) -> None:
        parameters = [name for name, parameter in model.named_parameters()
                      if parameter.grad is not None and not parameter.grad.isfinite().all()]
        buffers = [name for name, buffer in model.named_buffers()
                   if buffer.is_floating_point() and not buffer.isfinite().all()]
        losses = [loss.item() for loss in self.losses]
        samples = [name for batch in self.batches for name in _sample_names(batch)]
        rank = dist.get_rank()
        record = dict(iteration=runner.iter + 1, epoch=runner.epoch + 1, rank=rank, losses=[str(x) for x in losses],
                      parameters=parameters, buffers=buffers, samples=samples)
        path = os.path.join(runner.work_dir, f'nonfinite_iter{runner.iter + 1}_rank{rank}.json')
        write_whole(path, json.dumps(record, indent=1, default=str))
        message = (f'iteration {runner.iter + 1}: NaN or Inf in the loss ({", ".join(map(str, losses))}) or in the '
                   f'gradients of {len(parameters)} parameters ({", ".join(parameters[:4])}'
                   f'{", ..." if len(parameters) > 4 else ""}). The samples of the batch: {path}')
        if self._any(runner, bool(buffers)):
            raise FloatingPointError(f'{message}. Buffers have it, too: {", ".join(buffers[:4])}')
        if self.skipped >= self.skip:
            raise FloatingPointError(f'{message}. {self.skipped} such steps were skipped before; '
                                     'NumericalGuardHook(skip=...) says how many may be')
        self.skipped += 1
        print_log(f'{message}. The step is skipped, {self.skipped} of {self.skip}', logger='current',
                  level=logging.WARNING)

    def after_train(self, runner: Any) -> None:
        runner.optim_wrapper.backward, runner.optim_wrapper.step = self.backward, self.step
