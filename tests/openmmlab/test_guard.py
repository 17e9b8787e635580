"""The numerical guard: it stops trainings, leaves overflows to a loss scaler, and stops if that does not help."""
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import job_task
import pytest
import torch
from loss_task import losses
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import EpochBasedTrainLoop
from mmengine.structures import BaseDataElement
from processes import PYTHON, ROOT, run_on_two
from search_task import Images

from mmlocalmamba.openmmlab.engine import NumericalGuardHook, guard

SCALED = dict(type='ScaledOptimWrapper')


def train(*args, **kwargs):
    runner = job_task.build(*args, **kwargs)
    runner.train()
    return runner


def steps(runner):
    """Steps that the optimizer has made."""
    return {int(entry['step']) for entry in runner.optim_wrapper.optimizer.state.values()}


def hook_of(runner, kind='NumericalGuardHook'):
    hook, = [hook for hook in runner.hooks if type(hook).__name__ == kind]
    return hook


def finite(module):
    return all(value.isfinite().all() for value in module.state_dict().values())


def test_it_changes_nothing_by_itself(tmp_path):
    """Bit for bit the training without it, and the runner's wrapper is as it was."""
    for name, wrapper in dict(plain={}, scaled=SCALED).items():
        guarded, runner = (job_task.build(tmp_path / f'{name}{i}', wrapper=wrapper, epochs=1) for i in range(2))
        runner._hooks.remove(hook_of(runner))
        before = guarded.optim_wrapper
        for each in (guarded, runner):
            torch.manual_seed(0)  # weights are drawn when a training begins
            each.train()
        first, second = (each.model.state_dict() for each in (guarded, runner))
        assert all(torch.equal(first[key], second[key]) for key in first)
        assert 'backward' not in vars(guarded.optim_wrapper) and not isinstance(before, guard._GuardedWrapper)
        assert isinstance(guarded.train_loop.optim_wrapper, guard._GuardedWrapper)


CROSSINGS = list(itertools.product(['plain', 'scaled'], [1, 3], [False, True], ['loss', 'gradient']))


@pytest.mark.parametrize('wrapper,accumulate,ema,where', CROSSINGS, ids=lambda value: str(value))
def test_it_stops_or_leaves_it_to_the_scaler(tmp_path, wrapper, accumulate, ema, where):
    """Two epochs of six iterations. The eighth is bad: the step after it is left out, and weights and averages stay."""
    options = dict(epochs=2, accumulate=accumulate, ema=ema, wrapper=SCALED if wrapper == 'scaled' else {},
                   poison=({8}, where))
    at = -(-8 // accumulate) * accumulate
    if wrapper == 'plain' or where == 'loss':
        runner = job_task.build(tmp_path / 'stop', **options)
        with pytest.raises(FloatingPointError, match=f'^iteration {at}: NaN or Inf in the loss'):
            runner.train()
        if where == 'gradient':
            record = json.loads((tmp_path / 'stop' / f'nonfinite_iter{at}_rank0.json').read_text())
            assert record['iteration'] == at and record['epoch'] == 2 and record['parameters'] == ['fc.2.bias']
            assert len(record['losses']) == accumulate and record['buffers'] == []
        options['guard'] = dict(skip=1)
    runner = train(tmp_path / 'skip', **options)
    assert steps(runner) == {12 // accumulate - 1} and finite(runner.model)
    assert not ema or finite(hook_of(runner, 'EMAHook').ema_model)
    assert hook_of(runner).skipped == (wrapper == 'plain' or where == 'loss')
    if wrapper == 'scaled':
        assert runner.optim_wrapper.loss_scaler.get_scale() == 2**(16 if where == 'loss' else 15)


@pytest.mark.parametrize('accumulate,static', [(1, None), (3, None), (1, 512.)])
def test_a_scaler_that_never_lets_a_step_pass(tmp_path, accumulate, static):
    """Without the guard: a whole training without one step, and a scale of 0."""
    runner = job_task.build(tmp_path, epochs=30, accumulate=accumulate, wrapper=dict(SCALED, static=static),
                            poison=(range(1, 1000), 'gradient'))
    runner.model.init_weights()  # which a training leaves as it is
    before = {name: value.clone() for name, value in runner.model.named_parameters()}
    with pytest.raises(FloatingPointError, match=r'gradients of 1 parameters \(fc.2.bias\).*This is overflow 31 in '
                                                 r'a row, and the loss scale is down to') as error:
        runner.train()
    assert runner.iter + 1 == 31 * accumulate and str(error.value).startswith(f'iteration {31 * accumulate}: ')
    assert (tmp_path / f'nonfinite_iter{31 * accumulate}_rank0.json').exists()
    assert all(torch.equal(value, before[name]) for name, value in runner.model.named_parameters())
    assert runner.optim_wrapper.loss_scaler.get_scale() == (static or 2.**-14)


def test_only_steps_in_a_row_count(tmp_path):
    options = dict(wrapper=SCALED, guard=dict(scaler_skips=2))
    runner = train(tmp_path / 'apart', poison=({2, 3, 5, 6, 8, 9, 11}, 'gradient'), **options)
    assert runner.iter == 18 and steps(runner) == {11}
    with pytest.raises(FloatingPointError, match='^iteration 10: .*This is overflow 3 in a row'):
        train(tmp_path / 'row', poison=({2, 3, 8, 9, 10}, 'gradient'), **options)


def test_a_scale_that_is_too_small_stops(tmp_path):
    """float16 has no smaller numbers: nothing would be left of the gradients."""
    with pytest.raises(FloatingPointError, match='^iteration 6: .*the loss scale is down to 2.98023e-08'):
        train(tmp_path / 'a', poison=({2, 4, 6}, 'gradient'), wrapper=dict(SCALED, scaler=dict(init_scale=2.**-23)))
    with pytest.raises(FloatingPointError, match='starts at 1e-30, which skips every step: the last gradients of the '
                                                 'training that .* were all NaN or Inf. Resume from an earlier'):
        train(tmp_path / 'b', wrapper=dict(SCALED, scaler=dict(init_scale=1e-30)))
    train(tmp_path / 'c', epochs=1, wrapper=dict(SCALED, scaler=dict(init_scale=1e-30, enabled=False)))


def test_a_scaler_that_is_switched_off_leaves_it_to_the_guard(tmp_path):
    with pytest.raises(FloatingPointError, match='^iteration 2: .*0 such steps were skipped before'):
        train(tmp_path, wrapper=dict(SCALED, scaler=dict(enabled=False)), poison=({2}, 'gradient'))


def test_it_does_not_go_on_when_statistics_are_spoilt(tmp_path):

    class Broken(Images):

        def __getitem__(self, index):
            item = super().__getitem__(index)
            return dict(item, inputs=item['inputs'] * float('nan')) if index == 5 else item

    with pytest.raises(FloatingPointError, match='Buffers have NaN or Inf, too: fc.0.running_mean'):
        train(tmp_path / 'data', guard=dict(skip=100), data=Broken())
    # A scaler could go on for ever.
    with pytest.raises(FloatingPointError, match='^iteration 3: .*Buffers have NaN or Inf, too: fc.0.running_mean'):
        train(tmp_path / 'scaled', wrapper=SCALED, poison=({3}, 'buffer'))
    record = json.loads((tmp_path / 'scaled' / 'nonfinite_iter3_rank0.json').read_text())
    assert record['buffers'] == ['fc.0.running_mean'] and 'inf' not in record['losses'][0]


def test_it_skips_as_often_as_it_may(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(MMLogger, 'callHandlers', lambda self, record: messages.append(record.getMessage()))
    runner = train(tmp_path / 'skip', epochs=1, guard=dict(skip=2), poison=({2, 4}, 'gradient'))
    assert finite(runner.model) and steps(runner) == {4}
    told = [message for message in messages if 'skipped' in message]
    assert len(told) == 2 and all(message.endswith(f'. The step is skipped, {count} of 2')
                                  for count, message in enumerate(told, 1))
    with pytest.raises(FloatingPointError, match='^iteration 4: .*2 such steps were skipped before'):
        train(tmp_path / 'more', epochs=1, guard=dict(skip=2), poison=({2, 3, 4}, 'gradient'))


def test_it_counts_on_after_resumption(tmp_path):
    with pytest.raises(SystemExit):
        train(tmp_path / 'a', guard=dict(skip=1), poison=({2}, 'gradient'), signal_at=3)
    with pytest.raises(FloatingPointError, match='^iteration 5: .*1 such steps were skipped before'):
        train(tmp_path / 'a', guard=dict(skip=1), poison=({5}, 'gradient'), resume=True)
    options = dict(guard=dict(scaler_skips=4), poison=(range(2, 99), 'gradient'), wrapper=SCALED)
    with pytest.raises(SystemExit):
        train(tmp_path / 'b', signal_at=3, **options)
    with pytest.raises(FloatingPointError, match='^iteration 6: .*This is overflow 5 in a row'):
        train(tmp_path / 'b', resume=True, **options)
    # Weights alone begin anew.
    options['poison'] = (range(1, 99), 'gradient')
    begun = job_task.build(tmp_path / 'c', load_from=str(tmp_path / 'b' / 'preempted.pth'), **options)
    with pytest.raises(FloatingPointError, match='^iteration 5: '):
        begun.train()


@pytest.mark.parametrize('wrapper,where', [({}, 'loss'), (SCALED, 'loss'), (SCALED, 'gradient')],
                         ids=['plain-loss', 'scaled-loss', 'scaled-gradient'])
@pytest.mark.slow
def test_two_processes_stop_alike(tmp_path, wrapper, where):
    """One of two processes has the NaN: in its loss, which the other does not see, or in a gradient, which both get."""
    task = dict(launcher='pytorch', wrapper=wrapper, epochs=1, guard=dict(skip=1, scaler_skips=1),
                poison=([2, 3], where, [1]))
    task['work_dir'] = str(tmp_path)
    run_on_two(*PYTHON, ROOT / 'tests/helpers/job_task.py', json.dumps(task), returncode=1)
    for rank in range(2):
        record = json.loads((tmp_path / f'nonfinite_iter3_rank{rank}.json').read_text())
        assert (record['losses'] == ['nan']) == (rank == 1 and where == 'loss')
        assert record['parameters'] == ['fc.2.bias'] or where == 'loss'
        # Both report the skipped step of a loss; the loss scaler handles infinite gradients.
        assert (tmp_path / f'nonfinite_iter2_rank{rank}.json').exists() == (where == 'loss')


class Own(OptimWrapper):

    def update_params(self, loss, **kwargs):
        super().update_params(loss, **kwargs)


def test_what_it_cannot_guard_is_refused(tmp_path):
    OPTIM_WRAPPERS.register_module(module=Own, force=True)
    with pytest.raises(TypeError, match="needs one OptimWrapper with MMEngine's update_params, got Own"):
        train(tmp_path / 'a', wrapper=dict(type='Own'))
    runner = job_task.build(tmp_path / 'b')
    runner._train_loop = dict(type=EpochBasedTrainLoop, max_epochs=1)
    with pytest.raises(ValueError, match="NumericalGuardHook needs train_cfg.type='mmlocalmamba.EpochBasedTrainLoop'"):
        runner.train()
    for name in ('skip', 'scaler_skips'):
        with pytest.raises(ValueError, match=f'{name} must be at least 0, got -1'):
            NumericalGuardHook(**{name: -1})
        NumericalGuardHook(**{name: 0})


@pytest.mark.parametrize('config', ['localvim-nano_digits', 'localvmamba-nano_digits'])
@pytest.mark.slow
def test_bfloat16_is_not_stopped(tiny_digits, tmp_path, config):
    task = dict(config=config, iterations=4, batch=8)
    plain, low = (losses(tiny_digits, tmp_path / str(bfloat16), bfloat16=bfloat16, **task)
                  for bfloat16 in (False, True))
    plain, low = (torch.tensor([step['loss'] for step in curve]) for curve in (plain, low))
    assert not torch.equal(plain, low) and torch.allclose(plain, low, rtol=0.05)


def test_it_names_the_samples():
    sample = BaseDataElement(metainfo=dict(img_path='a.png', img_id=3, ori_shape=(1, 2)))
    assert guard.sample_names(dict(inputs=[], data_samples=[sample])) == [dict(img_path='a.png', img_id=3)]
    assert guard.sample_names((1, 2)) == [] and guard.sample_names(dict(inputs=0)) == []
    assert guard.first_names(list('abcd')) == 'a, b, c, d' and guard.first_names(list('abcde')) == 'a, b, c, d, ...'


def test_a_record_says_where_numbers_were_lost(tmp_path):
    # A path that JSON does not know, as some datasets have them.
    batches = [dict(data_samples=[BaseDataElement(metainfo=dict(img_path=Path(name), img_id=number))
                                  for number, name in enumerate(names)]) for names in ('ab', 'c')]
    runner = SimpleNamespace(iter=4, epoch=1, work_dir=str(tmp_path))
    losses = [torch.tensor(1.5), torch.tensor(float('nan'))]
    path = guard.write_record(runner, 'nonfinite', losses, batches, buffers=['x'])
    assert path == str(tmp_path / 'nonfinite_iter5_rank0.json')
    assert json.loads(Path(path).read_text()) == dict(
        iteration=5, epoch=2, rank=0, losses=['1.5', 'nan'], buffers=['x'],
        samples=[dict(img_path='a', img_id=0), dict(img_path='b', img_id=1), dict(img_path='c', img_id=0)])


def test_it_keeps_the_batches_until_the_next_step():
    hook = NumericalGuardHook()
    for number in range(2):
        hook.before_train_iter(None, number, dict(inputs=number))
    assert hook.batches == [dict(inputs=0), dict(inputs=1)]
