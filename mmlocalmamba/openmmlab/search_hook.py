"""Hook that searches scan directions by DARTS, jointly with the weights or on held-out data."""
import logging
import os
from typing import Any

import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIMIZERS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch import Tensor

from mmlocalmamba import __version__
from mmlocalmamba.openmmlab.engine.data import DataStream, naming_annotation_files
from mmlocalmamba.openmmlab.engine.guard import SCALER_SKIPS, loss_scaler, on_any_process, write_record
from mmlocalmamba.openmmlab.engine.loops import require_resumable_loop
from mmlocalmamba.registry import HOOKS
from mmlocalmamba.search.results import (
    STATE,
    check_k,
    find_alphas,
    relative_entropy,
    top_directions,
    unchanged,
    write_search,
)
from mmlocalmamba.weights.loading import unwrap_model

MODES = ('joint', 'bilevel')
# Relative entropies. A block above _UNDECIDED at the end has not decided. A block below _COLLAPSED within the first
# _EARLY part of the training has decided before its weights are trained.
_UNDECIDED, _COLLAPSED, _EARLY = 0.99, 0.3, 0.1


@HOOKS.register_module()
class ScanSearchHook(Hook):
    """Search scan directions: train the logits of a supernet, report them, and write the chosen directions.

    The backbone of the model needs ``directions='search'``. At every ``interval`` and at the end, the hook writes into
    the work directory: ``directions.json``, which a backbone takes as ``directions``, ``alphas.csv``,
    ``directions.png`` and ``alphas.png``.

    Checkpoints hold the state of the search. With the loops of mmlocalmamba, a resumed search equals an uninterrupted
    one.

    Args:
        mode: 'joint', as the authors do it, trains logits and weights by the same optimizer; the logits have no weight
            decay. 'bilevel' is first-order DARTS (Liu et al., arXiv 1806.09055): before every step of the weights, a
            separate optimizer makes one step of the logits on a batch of held-out data. With gradient accumulation,
            this is one step of the logits for all iterations that accumulate.
        k: number of directions to choose for every block.
        held_out: dataloader configuration of 'bilevel', in the format of train_dataloader.
        optimizer: optimizer configuration of the logits in 'bilevel', with a constant learning rate. Default: Adam with
            the learning rate 3e-4 and betas (0.5, 0.999).
        interval: epochs between reports, or iterations if the training counts iterations. Default: 1 or 1000.
        stop_after: stop the training when the chosen directions have not changed in this number of further reports.
            None: never.

    Raises:
        ValueError: if ``mode`` is unknown, ``held_out`` is missing in 'bilevel', ``held_out`` or ``optimizer`` is given
            in 'joint', or ``interval`` or ``stop_after`` is below 1. Before training: if the model has no supernet,
            ``k`` is larger than the number of candidates, logits are frozen, the optimizer would decay them or does not
            train them, or 'bilevel' runs in a loop of MMEngine, which does not save the position of held-out data.
        TypeError: before training, if there is more than one optimizer or the runner is FlexibleRunner.
        RuntimeError: if the checkpoint to resume from has no search or another one; in training, if the logits differ
            between processes.
        FloatingPointError: in training, if the loss or gradients of held-out data are NaN or infinite. With a loss
            scaler (float16), up to 30 infinite gradients in a row only skip the step of the logits.
    """

    def __init__(self, mode: str = 'joint', k: int = 4, held_out: dict | None = None, optimizer: dict | None = None,
                 interval: int | None = None, stop_after: int | None = None) -> None:
        if mode not in MODES:
            raise ValueError(f'mode must be one of {MODES}, got {mode!r}')
        if mode == 'bilevel' and held_out is None:
            raise ValueError("mode='bilevel' needs held_out=dict(batch_size=..., dataset=..., sampler=...), a "
                             'dataloader of images that do not train the weights')
        for name, value in (('held_out', held_out), ('optimizer', optimizer)):
            if mode == 'joint' and value is not None:
                raise ValueError(f"mode='joint' does not use {name}: the optimizer and the data of the weights also "
                                 "train the logits. Remove it, or set mode='bilevel'")
        for name, number in (('interval', interval), ('stop_after', stop_after)):
            if number is not None and number < 1:
                raise ValueError(f'{name} must be at least 1 or None, got {number}')
        self.mode, self.k = mode, k
        self.held_out_cfg = held_out
        self.optimizer_cfg = optimizer or dict(type='Adam', lr=3e-4, betas=(0.5, 0.999), weight_decay=0.)
        self.interval, self.stop_after = interval, stop_after
        self.optimizer: torch.optim.Optimizer | None = None
        self.held_out: DataStream | None = None
        self.history: list[tuple[int, Tensor]] = []  # (epoch or iteration, logits (blocks, candidates)) of each report
        self.overflows = 0  # steps of the logits in a row skipped for the loss scaler
        self.warned = False

    # Set-up, after the optimizer is built and before a checkpoint is loaded.

    def before_run(self, runner: Any) -> None:
        if not isinstance(runner.optim_wrapper, OptimWrapper):
            if isinstance(runner.optim_wrapper, dict) or runner.optim_wrapper is None:
                return  # only validation or test
            raise TypeError('the direction search needs one OptimWrapper, got '
                            f'{type(runner.optim_wrapper).__name__}: use a single optimizer')
        if not isinstance(runner, Runner):
            raise TypeError(f'the direction search does not support {type(runner).__name__}, which splits the logits '
                            'between processes and loads checkpoints before hooks are ready: remove runner_type')
        self.model = model = unwrap_model(runner.model)
        try:
            names = list(find_alphas(model.state_dict()))
        except ValueError as error:
            raise ValueError(f"ScanSearchHook: {error}; give the backbone directions='search'") from error
        mixers = [model.get_submodule(name) for name in names]
        self.alphas = [mixer.mixed_scan.alphas for mixer in mixers]
        self.candidates = mixers[0].directions
        self.sampling = repr(mixers[0].mixed_scan)
        self.blocks = [name.removesuffix('.mixer') for name in names]
        check_k(self.k, self.candidates)
        frozen = [name for name, alpha in zip(self.blocks, self.alphas) if not alpha.requires_grad]
        if frozen:
            raise ValueError(f'these blocks are frozen, so their directions cannot be searched: {", ".join(frozen)}. '
                             'Set frozen_stages=-1')
        self.rank = dist.get_rank()
        self.by_epoch = not isinstance(runner.train_loop, IterBasedTrainLoop)
        self.every = self.interval or (1 if self.by_epoch else 1000)
        if self.mode == 'joint':
            self._exclude_from_weight_decay(runner.optim_wrapper)
        else:
            self._set_up_bilevel(runner)

    def _exclude_from_weight_decay(self, optim_wrapper: OptimWrapper) -> None:
        mine, seen = {id(alpha) for alpha in self.alphas}, 0
        for group in optim_wrapper.param_groups:
            count = sum(id(parameter) in mine for parameter in group['params'])
            seen += count
            if count and group.get('weight_decay', 0):
                if count < len(group['params']):
                    raise ValueError("the optimizer would decay the logits of the search: add 'alphas': "
                                     'dict(decay_mult=0.) to optim_wrapper.paramwise_cfg.custom_keys')
                group['weight_decay'] = 0.
        if seen < len(self.alphas):
            raise ValueError(f"mode='joint', but the optimizer trains {seen} of {len(self.alphas)} logits: do not "
                             'exclude them in the optim_wrapper')

    def _set_up_bilevel(self, runner: Any) -> None:
        if self.optimizer is not None:  # runner.val() after runner.train() calls before_run again
            return
        mine = {id(alpha) for alpha in self.alphas}
        for group in runner.optim_wrapper.param_groups:
            # Keep a group even if it is empty, because schedulers count groups.
            group['params'] = [parameter for parameter in group['params'] if id(parameter) not in mine]
        self.optimizer = OPTIMIZERS.build(dict(self.optimizer_cfg, params=self.alphas))
        loop = require_resumable_loop(runner, self, 'which saves the position of held-out data')
        with naming_annotation_files():
            loader = runner.build_dataloader(self.held_out_cfg, seed=runner.seed)
        self.held_out = loop.loaders.add('held_out', loader)

    # Checkpoints.

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        checkpoint[STATE] = dict(
            mode=self.mode, k=self.k, candidates=list(self.candidates), blocks=self.blocks,
            alphas=[alpha.detach().cpu().clone() for alpha in self.alphas],  # the trained logits, not their EMA
            history=[dict(step=step, alphas=alphas) for step, alphas in self.history],
            optimizer=None if self.optimizer is None else self.optimizer.state_dict(), overflows=self.overflows)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Restore the search when a training resumes.

        Raises:
            RuntimeError: if the checkpoint has no search, or one with another mode, other candidates or blocks.
        """
        if not runner._resume or not hasattr(self, 'alphas'):
            return
        state = checkpoint.get(STATE)
        if state is None:
            raise RuntimeError('this checkpoint was not written by a direction search, so a search cannot resume from '
                               'it. To start from its weights, set load_from without resume')
        for name, own in (('mode', self.mode), ('candidates', list(self.candidates)), ('blocks', self.blocks)):
            if state[name] != own:
                raise RuntimeError(f'this search cannot resume from the checkpoint: {name} is {own} here, '
                                   f'{state[name]} in the checkpoint')
        self.history = [(record['step'], record['alphas'].cpu()) for record in state['history']]
        self.overflows = state['overflows']
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state['optimizer'])

    # Training.

    def before_train(self, runner: Any) -> None:
        self._maybe_stop(runner)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        # Only in the first of the iterations that accumulate gradients of the weights.
        if self.mode == 'bilevel' and runner.optim_wrapper.should_update():
            self._step_on_held_out(runner)

    def _step_on_held_out(self, runner: Any) -> None:
        assert self.held_out is not None and self.optimizer is not None  # because mode is 'bilevel'
        wrapper, batch = runner.optim_wrapper, next(self.held_out)
        with wrapper.optim_context(self.model):
            data = self.model.data_preprocessor(batch, True)
            loss, _ = self.model.parse_losses(self.model._run_forward(data, mode='loss'))
        scaler = loss_scaler(wrapper)
        # backward() would also compute gradients of the weights and trigger DDP.
        gradient = torch.cat(torch.autograd.grad(loss if scaler is None else scaler.scale(loss), self.alphas)).float()
        if scaler is not None:
            gradient /= scaler.get_scale()
        dist.all_reduce(gradient, op='mean')
        # Discard gradients left by the weight step.
        for alpha, part in zip(self.alphas, gradient.split([len(alpha) for alpha in self.alphas])):
            alpha.grad = part.to(alpha.dtype)
        if self._is_finite(runner, loss.detach(), gradient, batch, scaler):
            self.optimizer.step()
        for alpha in self.alphas:
            alpha.grad = None

    def _is_finite(self, runner: Any, loss: Tensor, gradient: Tensor, batch: Any, scaler: Any) -> bool:
        bad_loss, bad_gradient = on_any_process(~loss.isfinite(), ~gradient.isfinite().all(), device=loss.device)
        if not bad_loss and not bad_gradient:
            self.overflows = 0
            return True
        self.overflows += 1
        if bad_loss or scaler is None or self.overflows > SCALER_SKIPS:
            path = write_record(runner, 'nonfinite_held_out', [loss], [batch])
            raise FloatingPointError(
                f'iteration {runner.iter + 1}: NaN or Inf in the loss of held-out data ({loss.item()}) or in the '
                f'gradients of the logits, {self.overflows} times in a row. Samples of the batch: {path}')
        print_log(f'iteration {runner.iter + 1}: gradients of the logits overflow at a loss scale of '
                  f'{scaler.get_scale():g}; the step of the logits is skipped', logger='current')
        return False

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if not self.by_epoch and (runner.iter + 1) % self.every == 0:
            self._report(runner, runner.iter + 1)

    def after_train_epoch(self, runner: Any) -> None:
        if self.by_epoch and (runner.epoch + 1) % self.every == 0:
            self._report(runner, runner.epoch + 1)

    def after_train(self, runner: Any) -> None:
        step = runner.epoch if self.by_epoch else runner.iter
        if not self.history or self.history[-1][0] != step:
            self._report(runner, step)
        else:
            self._write(runner)
        entropy = relative_entropy(self.history[-1][1].softmax(1))
        undecided = [name for name, value in zip(self.blocks, entropy) if value > _UNDECIDED]
        if undecided:
            print_log(f'scan search: {len(undecided)} of {len(self.blocks)} blocks end nearly uniform (entropy above '
                      f'{_UNDECIDED} of the maximum), so their directions are little better than chance: '
                      f'{", ".join(undecided)}. Train longer, or raise the learning rate of the logits.',
                      logger='current', level=logging.WARNING)
        path = os.path.join(runner.work_dir, 'directions.json')
        print_log(f'scan search: the directions are in {path}; retrain with --cfg-options '
                  f'model.backbone.directions={path}', logger='current')

    # Reports.

    def _report(self, runner: Any, step: int) -> None:
        alphas = torch.stack([alpha.detach().float().cpu() for alpha in self.alphas])
        self._check_ranks()
        self.history.append((step, alphas))
        probabilities = alphas.softmax(1)
        entropy = relative_entropy(probabilities)
        chosen = [top_directions(values, self.candidates, self.k) for _, values in self.history[-2:]]
        same = unchanged(*chosen) if len(chosen) == 2 else None
        print_log(f'scan search, {"epoch" if self.by_epoch else "iteration"} {step}: entropy {entropy.mean():.4f} of '
                  f'the maximum ({" ".join(f"{value:.3f}" for value in entropy)}), top {self.k}: '
                  + ('first report' if same is None else f'{same:.0%} as before'), logger='current')
        scalars = {f'scan_search/entropy/{name}': value for name, value in zip(self.blocks, entropy.tolist())}
        scalars['scan_search/entropy'] = entropy.mean().item()
        if same is not None:
            scalars['scan_search/unchanged'] = same
        if dist.is_main_process():
            runner.visualizer.add_scalars(scalars, step=step)
        last = runner.max_epochs if self.by_epoch else runner.max_iters
        collapsed = [name for name, value in zip(self.blocks, entropy) if value < _COLLAPSED]
        if collapsed and not self.warned and step <= max(1, _EARLY * last):
            self.warned = True
            print_log(f'scan search: {len(collapsed)} blocks have decided within the first {_EARLY:.0%} of the '
                      f'training, before their weights are trained: {", ".join(collapsed)}. Try a lower learning rate '
                      'of the logits.', logger='current', level=logging.WARNING)
        self._write(runner)
        self._maybe_stop(runner)

    def _check_ranks(self) -> None:
        alphas = torch.cat([alpha.detach() for alpha in self.alphas])
        low, high = alphas.clone(), alphas.clone()
        dist.all_reduce(low, op='min')
        dist.all_reduce(high, op='max')
        if not torch.equal(low, high):
            raise RuntimeError('the logits of the direction search differ between processes')

    def _maybe_stop(self, runner: Any) -> None:
        if self.stop_after is None or len(self.history) <= self.stop_after:
            return
        chosen = [top_directions(alphas, self.candidates, self.k) for _, alphas in self.history[-self.stop_after - 1:]]
        if all(other == chosen[-1] for other in chosen):
            print_log(f'scan search: the directions have not changed in {self.stop_after} more reports; the training '
                      'stops', logger='current')
            runner.train_loop.stop_training = True

    @dist.master_only
    def _write(self, runner: Any) -> None:
        provenance = dict(
            config=runner.cfg.filename and os.path.basename(runner.cfg.filename), seed=runner.seed,
            **{'epoch' if self.by_epoch else 'iteration': self.history[-1][0]}, mode=self.mode, supernet=self.sampling,
            world_size=dist.get_world_size(), version=__version__)
        write_search(runner.work_dir, self.candidates, self.blocks, self.k, self.history, provenance)
