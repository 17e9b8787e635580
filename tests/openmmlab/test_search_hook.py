"""ScanSearchHook: both modes, bad input, interruption, two processes, files."""
import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import search_task
import torch
from loss_task import configure, losses
from mmengine.dataset import InfiniteSampler
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper
from mmengine.runner import FlexibleRunner
from processes import PYTHON, ROOT, finish, run_on_two, start

from mmlocalmamba import visualization
from mmlocalmamba.backbones import LocalVMamba
from mmlocalmamba.openmmlab import search_hook
from mmlocalmamba.weights import to_official

FILES = {'directions.json', 'alphas.csv', 'directions.png', 'alphas.png'}


class Stop(Exception):
    pass


def stop():
    raise Stop


def train(*args, **kwargs):
    runner = search_task.build(*args, **kwargs)
    runner.train()
    return runner


@pytest.mark.parametrize('mode', ['joint', 'bilevel'])
def test_search_writes_what_a_backbone_takes(tmp_path, mode):
    runner = train(tmp_path, mode)
    assert FILES <= {path.name for path in tmp_path.iterdir()}
    assert not list(tmp_path.glob('*.tmp'))
    result = json.loads((tmp_path / 'directions.json').read_text())
    probabilities = search_task.alphas(runner).double().softmax(1)
    torch.testing.assert_close(torch.tensor(result['probabilities']).double(), probabilities, atol=1e-7, rtol=0)
    assert result['candidates'] == search_task.CANDIDATES
    assert result['provenance'].items() >= dict(seed=7, epoch=3, mode=mode, world_size=1).items()
    model = LocalVMamba(search_task.ARCH, directions=str(tmp_path / 'directions.json'))
    assert model.directions == [tuple(block) for block in result['directions']]
    assert all(len(block) == 2 and list(block) == [c for c in search_task.CANDIDATES if c in block]
               for block in model.directions)
    lines = (tmp_path / 'alphas.csv').read_text().splitlines()
    assert len(lines) == 1 + 3 * 2 * 5 and lines[-1].startswith('3,backbone.stages.1.blocks.0,diag,')
    with pytest.raises(ValueError, match='has 2 entries, but the backbone has 5 blocks'):
        LocalVMamba('nano', directions=str(tmp_path / 'directions.json'))


@pytest.mark.slow
@pytest.mark.parametrize('config', ['mask-rcnn_localvmamba-nano_digits', 'upernet_localvmamba-nano_digits'])
def test_detection_and_segmentation_search_by_their_own_losses(tiny_digits, tmp_path, config):
    """From the configuration alone, with held-out data that mmdet and mmseg load, collate and preprocess."""
    task = dict(config=config, iterations=2, batch=2)
    held_out = dict(configure(tiny_digits, work_dir=tmp_path, **task).train_dataloader, batch_size=2)
    found = {}
    for name, hook in dict(joint={}, bilevel=dict(held_out=held_out, optimizer=dict(type='Adam', lr=1e-2))).items():
        losses(tiny_digits, tmp_path / name, **task, options={
            'model.backbone.directions': 'search',
            'custom_hooks': [dict(type='mmlocalmamba.ScanSearchHook', mode=name, interval=2, **hook)],
            'optim_wrapper.paramwise_cfg': dict(custom_keys=dict(alphas=dict(decay_mult=0.)))})
        found[name] = json.loads((tmp_path / name / 'directions.json').read_text())
        assert found[name]['provenance'].items() >= dict(mode=name, iteration=2).items()
        LocalVMamba('nano', directions=str(tmp_path / name / 'directions.json'))
    for result in found.values():  # every block's logits moved: gradients of this loss came to all
        assert len(result['probabilities']) == 5
        assert all(max(block) > min(block) for block in result['probabilities'])


def groups_of(runner):
    model = getattr(runner.model, 'module', runner.model)
    mine = {id(parameter) for name, parameter in model.named_parameters() if name.endswith('alphas')}
    return [group for group in runner.optim_wrapper.param_groups
            if any(id(parameter) in mine for parameter in group['params'])]


def test_joint_does_not_decay_logits(tmp_path):
    groups = groups_of(train(tmp_path, 'joint', epochs=1))
    assert len(groups) == 2 and all(group['weight_decay'] == 0 for group in groups)


class AtStart(Hook):
    """After the model was initialised."""

    def __init__(self, action):
        self.action = action

    def before_train(self, runner):
        self.action(runner.model)


@pytest.mark.parametrize('paramwise', [True, False])
def test_bilevel_logits_are_not_in_the_weights_optimizer(tmp_path, paramwise):
    before = []
    for name, rate in dict(still=0., moved=0.05).items():
        runner = search_task.build(tmp_path / name, 'bilevel', epochs=1, paramwise=paramwise,
                                   hook=dict(optimizer=dict(type='Adam', lr=rate)))
        runner.register_hook(AtStart(lambda model: before.append(search_task.alphas(SimpleNamespace(model=model)))))
        runner.train()
        assert groups_of(runner) == []
        change = (search_task.alphas(runner) - before[-1]).abs()
        assert change.max() == 0 if name == 'still' else change.min() > 0


@pytest.mark.parametrize('wrapper,tolerance', [('OptimWrapper', 1e-5), ('ScaledOptimWrapper', 0.3)])
def test_bilevel_gradient_is_that_of_the_held_out_loss(tmp_path, wrapper, tolerance):
    """One step of plain gradient descent on the logits, the weights at rest."""
    data = [search_task.Images()[index] for index in range(4)]
    held_out = dict(search_task.loader(), dataset=data)
    runner = search_task.build(
        tmp_path, 'bilevel', epochs=1, interrupt=(1, stop), paramwise=False,
        hook=dict(held_out=held_out, optimizer=dict(type='SGD', lr=1.)),
        optim_wrapper=dict(type=wrapper, optimizer=dict(type='SGD', lr=0.), clip_grad=None))
    model = search_task.build(tmp_path / 'other', 'bilevel').model
    for module in (*runner.model.modules(), *model.modules()):
        if type(module).__name__ == 'DropPath':
            module.drop_prob = 0.
    for parameter in runner.model.parameters():
        if parameter.dim() > 1:
            parameter.data *= 5  # at the start, gradients of the logits are close to the limits of float32
    weights = {name: value.clone() for name, value in runner.model.state_dict().items()}
    model.load_state_dict(weights)
    runner.register_hook(AtStart(lambda model: model.load_state_dict(weights)))
    before = search_task.alphas(runner).clone()
    loss = model(torch.stack([item['inputs'] for item in data]), torch.tensor([item['labels'] for item in data]))
    loss['loss'].backward()
    with pytest.raises(Stop):
        runner.train()
    expected = torch.stack([-p.grad for name, p in model.named_parameters() if name.endswith('alphas')])
    step = search_task.alphas(runner) - before
    assert (step - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize('kwargs,message', [
    (dict(mode='both'), "mode must be one of .*, got 'both'"),
    (dict(mode='bilevel', hook=dict(held_out=None)), "mode='bilevel' needs held_out"),
    (dict(mode='joint', hook=dict(held_out={})), "mode='joint' does not use held_out"),
    (dict(mode='joint', hook=dict(optimizer=dict(type='SGD'))), "mode='joint' does not use optimizer: .*mode='bilev"),
    (dict(hook=dict(interval=0)), 'interval must be at least 1'),
    (dict(hook=dict(stop_after=0)), 'stop_after must be at least 1 or None, got 0'),
    (dict(directions=['h']), "no direction search in here.*give the backbone directions='search'"),
    (dict(directions=dict(candidates=['h'])), 'k=2 directions cannot be chosen from 1 candidates: h'),
    (dict(paramwise=False), "add 'alphas': dict\\(decay_mult=0.\\)"),
    (dict(mode='bilevel', hook=dict(held_out=dict(search_task.loader(), batch_size=50, drop_last=True))),
     'the held_out data have no batches'),
])
def test_bad_input_is_an_error_before_training(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, interrupt=(1, stop), **kwargs)


def test_frozen_blocks_cannot_be_searched(tmp_path):
    runner = search_task.build(tmp_path)
    runner.model.backbone.frozen_stages = 1
    runner.model.backbone.train()
    with pytest.raises(ValueError, match='these blocks are frozen.*stages.0.blocks.0'):
        runner.train()


def same(first, second):
    return {name: (first / name).read_bytes() == (second / name).read_bytes() for name in FILES}


SCALED = dict(type='ScaledOptimWrapper', accumulative_counts=3)
SAMPLED = [dict(candidates=search_task.CANDIDATES, sampling=name) for name in ('single_path', 'partial_channel')]
INTERRUPTED = {
    **{f'{mode}-{"ema" if ema else "plain"}-{"scaled-accumulated" if wrapper else "plain"}': dict(
        mode=mode, ema=ema, iterations=7, optim_wrapper=wrapper)
       for mode, ema, wrapper in itertools.product(['joint', 'bilevel'], [False, True], [None, SCALED])},
    'joint-single_path': dict(mode='joint', directions=SAMPLED[0]),
    'bilevel-partial_channel-workers': dict(mode='bilevel', directions=SAMPLED[1], workers=1)}


@pytest.mark.parametrize('case', INTERRUPTED)
def test_interrupted_search_equals_the_uninterrupted_one(tmp_path, case):
    kwargs = INTERRUPTED[case]
    whole = train(tmp_path / 'whole', **kwargs)
    with pytest.raises(Stop):
        train(tmp_path / 'parts', interrupt=(5 if 'iterations' in kwargs else 7, stop), **kwargs)
    assert whole.iter == kwargs.get('iterations', 9)
    resumed = train(tmp_path / 'parts', resume=True, **kwargs)
    torch.testing.assert_close(search_task.alphas(resumed), search_task.alphas(whole), atol=0, rtol=0)
    models = [(whole.model, resumed.model)]
    if kwargs.get('ema'):
        models.append([hook.ema_model for runner in (whole, resumed) for hook in runner.hooks
                       if type(hook).__name__ == 'EMAHook'])
    for first, second in models:
        for name, value in first.state_dict().items():
            assert torch.equal(second.state_dict()[name], value), name
    assert all(same(tmp_path / 'whole', tmp_path / 'parts').values())


def hook_of(runner):
    hook, = [hook for hook in runner.hooks if type(hook).__name__ == 'ScanSearchHook']
    return hook


def logit_steps(runner):
    return {int(state['step']) for state in hook_of(runner).optimizer.state.values()}


@pytest.mark.parametrize('accumulate,steps', [(1, 7), (3, 3)])
def test_a_step_of_the_logits_for_each_of_the_weights(tmp_path, accumulate, steps):
    """Seven iterations; the last accumulation has one of them."""
    runner = train(tmp_path, 'bilevel', iterations=7, optim_wrapper=dict(accumulative_counts=accumulate))
    weights = {int(state['step']) for state in runner.optim_wrapper.optimizer.state.values()}
    assert logit_steps(runner) == weights == {steps}
    position = runner.train_loop.loaders.streams['held_out'].state_dict()
    assert 3 * position['epoch'] + position['batches'] == steps


class Seen(search_task.Images):

    def __init__(self):
        super().__init__()
        self.indices = []

    def __getitem__(self, index):
        self.indices.append(index)
        return super().__getitem__(index)


def test_an_endless_sampler_does_not_begin_again(tmp_path):
    """Nine batches out of twelve images, three times as many as there are."""
    held_out = dict(search_task.loader(), dataset=Seen(), sampler=dict(type='InfiniteSampler', shuffle=True))
    runner = train(tmp_path, 'bilevel', hook=dict(held_out=held_out))
    data = runner.train_loop.loaders.streams['held_out'].dataset
    assert data.indices == list(itertools.islice(InfiniteSampler(data, seed=7), 36))
    assert data.indices[:12] != data.indices[12:24]


def test_another_batch_of_held_out_data_is_refused(tmp_path):
    with pytest.raises(Stop):
        train(tmp_path, 'bilevel', interrupt=(4, stop))
    with pytest.raises(ValueError, match='4 samples in an iteration of the held_out data, this training has 6'):
        train(tmp_path, 'bilevel', resume=True, hook=dict(held_out=dict(search_task.loader(), batch_size=6)))


class Spoilt(search_task.Images):
    """One image is NaN."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return dict(item, inputs=item['inputs'] * float('nan')) if index == 5 else item


@pytest.mark.parametrize('wrapper', [{}, dict(type='ScaledOptimWrapper')], ids=['plain', 'scaled'])
def test_nan_in_held_out_data_is_told(tmp_path, wrapper):
    held_out = dict(search_task.loader(), dataset=Spoilt())
    with pytest.raises(FloatingPointError, match=r'^iteration [123]: NaN or Inf in the loss of held-out data \(nan\)'):
        train(tmp_path, 'bilevel', hook=dict(held_out=held_out), optim_wrapper=wrapper)
    path, = tmp_path.glob('nonfinite_held_out_iter*_rank0.json')
    assert json.loads(path.read_text())['losses'] == ['nan']


class Overflow(Hook):
    """Gradients of the logits are infinite in these iterations."""

    priority = 'VERY_HIGH'

    def __init__(self, iterations):
        self.iterations, self.handles = iterations, []

    def before_train_iter(self, runner, **kwargs):
        for handle in self.handles:
            handle.remove()
        self.handles = [value.register_hook(lambda gradient: gradient * float('inf'))
                        for name, value in runner.model.named_parameters()
                        if name.endswith('alphas') and runner.iter + 1 in self.iterations]


def overflowing(work_dir, iterations, wrapper=None, **kwargs):
    runner = search_task.build(work_dir, 'bilevel', optim_wrapper=wrapper or dict(type='ScaledOptimWrapper'), **kwargs)
    runner.register_hook(Overflow(iterations), priority='VERY_HIGH')
    return runner


def test_a_loss_scaler_may_overflow_on_held_out_data(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(MMLogger, 'callHandlers', lambda self, record: messages.append(record.getMessage()))
    runner = overflowing(tmp_path / 'a', {2, 3, 7})
    runner.logger.setLevel('INFO')
    runner.train()
    assert logit_steps(runner) == {6} and search_task.alphas(runner).isfinite().all()
    told = [message for message in messages if 'gradients of the logits overflow' in message]
    assert [message.split(':')[0] for message in told] == ['iteration 2', 'iteration 3', 'iteration 7']
    assert 'at a loss scale of' in told[0]
    with pytest.raises(FloatingPointError, match='^iteration 2: .*gradients of the logits, 1 times in a row'):
        overflowing(tmp_path / 'b', {2}, wrapper=dict(type='OptimWrapper')).train()


def test_a_loss_scaler_that_overflows_for_ever_stops_the_search(tmp_path, monkeypatch):
    monkeypatch.setattr(search_hook, 'SCALER_SKIPS', 3)
    with pytest.raises(FloatingPointError, match='^iteration 8: .*gradients of the logits, 4 times in a row'):
        overflowing(tmp_path / 'a', {1, 2, 3, 5, 6, 7, 8}).train()
    with pytest.raises(Stop):  # the count is in the checkpoint
        overflowing(tmp_path / 'b', {2, 3, 4, 5}, interrupt=(3, stop)).train()
    with pytest.raises(FloatingPointError, match='^iteration 5: .* 4 times in a row'):
        overflowing(tmp_path / 'b', {2, 3, 4, 5}, resume=True).train()


def test_what_a_search_cannot_run_on_is_refused(tmp_path):
    own = search_task.build(tmp_path / 'a', 'bilevel')
    for mode in ('joint', 'bilevel'):
        runner = search_task.build(tmp_path / mode, mode, epochs=1)
        runner._train_loop = dict(by_epoch=True, max_epochs=1)  # MMEngine's
        if mode == 'joint':
            runner.train()
            assert FILES <= {path.name for path in (tmp_path / mode).iterdir()}
        else:
            with pytest.raises(ValueError, match="ScanSearchHook needs train_cfg.type='mmlocalmamba.EpochBasedTrain"):
                runner.train()
    flexible = FlexibleRunner(
        model=own.model, work_dir=str(tmp_path / 'flexible'), experiment_name='flexible', default_scope='mmengine',
        train_dataloader=search_task.loader(), optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        train_cfg=dict(type='mmlocalmamba.EpochBasedTrainLoop', max_epochs=1), log_level='WARNING',
        custom_hooks=[dict(type='mmlocalmamba.ScanSearchHook', k=2)])
    with pytest.raises(TypeError, match='the direction search does not support FlexibleRunner.*remove runner_type'):
        flexible.train()


def test_checkpoints_hold_the_logits_and_not_their_average(tmp_path):
    runner = train(tmp_path, ema=True)
    checkpoint = torch.load(tmp_path / 'epoch_3.pth', weights_only=True)
    assert torch.equal(torch.stack(checkpoint['scan_search']['alphas']), search_task.alphas(runner))
    averaged = torch.stack([v for name, v in checkpoint['state_dict'].items() if name.endswith('alphas')])
    assert not torch.equal(averaged, search_task.alphas(runner))


def test_resuming_something_else_is_refused(tmp_path):
    train(tmp_path, 'joint', epochs=1)
    with pytest.raises(RuntimeError, match='cannot resume .* mode is bilevel here, joint in the checkpoint'):
        train(tmp_path, 'bilevel', resume=True)
    path = tmp_path / 'epoch_1.pth'
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint['scan_search']
    torch.save(checkpoint, path)
    with pytest.raises(RuntimeError, match='was not written by a direction search'):
        train(tmp_path, 'joint', resume=True)


def command(*searches):
    """Run (work_dir, options) one after the other in a process of their own."""
    arguments = [str(part) if isinstance(part, Path) else json.dumps(part) for search in searches for part in search]
    return [*PYTHON, ROOT / 'tests/helpers/search_task.py', *arguments]


@pytest.mark.slow
def test_sigkill_at_a_random_iteration(tmp_path):
    """Killed for real, with workers, in the middle of an epoch or between two."""
    kill_at = random.SystemRandom().randint(1, 8)
    options = dict(mode='bilevel', workers=1)
    finish(start(*command((tmp_path / 'parts', dict(options, kill_at=kill_at)))), returncode=-9)
    assert not (tmp_path / 'parts' / 'alphas0.pt').exists()
    finish(start(*command((tmp_path / 'whole', options))),
           start(*command((tmp_path / 'parts', dict(options, resume=True)))))
    assert all(same(tmp_path / 'whole', tmp_path / 'parts').values()), f'killed at iteration {kill_at}'


@pytest.mark.slow
def test_two_processes_have_the_same_logits(tmp_path):
    """In the middle of training, too: the hook compares ranks at every report."""
    directions = dict(candidates=search_task.CANDIDATES, sampling='single_path', samples=2)
    searches = [(tmp_path / mode, dict(mode=mode, epochs=2, launcher='pytorch', directions=directions))
                for mode in ('joint', 'bilevel')]
    run_on_two(*command(*searches))
    for work_dir, _ in searches:
        first, second = (torch.load(work_dir / f'alphas{rank}.pt') for rank in range(2))
        assert torch.equal(first, second)
        assert first.abs().max() > 0.01  # they moved
        assert json.loads((work_dir / 'directions.json').read_text())['provenance']['world_size'] == 2


def test_warnings_and_early_stop(tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(MMLogger, 'callHandlers', lambda self, record: messages.append(record.getMessage()))
    still = dict(held_out=search_task.loader(), optimizer=dict(type='SGD', lr=0.))
    runner = train(tmp_path / 'still', 'bilevel', epochs=10, hook=dict(still, stop_after=2))
    assert runner.epoch == 3
    assert any('2 of 2 blocks end nearly uniform' in message for message in messages)
    assert any('the directions have not changed in 2 more reports' in message for message in messages)
    messages.clear()
    runner = search_task.build(tmp_path / 'collapsed', 'bilevel', epochs=2, hook=still)

    def decide(model):
        for name, parameter in model.named_parameters():
            if name.endswith('alphas'):
                parameter.data[0] = 20.

    runner.register_hook(AtStart(decide))
    runner.train()
    assert sum('blocks have decided within the first' in message for message in messages) == 1


def test_defaults(tmp_path):
    """DARTS's own optimizer of the logits; a report an epoch or 1,000 iterations."""
    runner = search_task.build(tmp_path / 'a', 'bilevel', epochs=1)
    hook_of(runner).optimizer_cfg = search_hook.ScanSearchHook(mode='bilevel', held_out={}).optimizer_cfg
    runner.train()
    hook = hook_of(runner)
    assert type(hook.optimizer) is torch.optim.Adam and hook.every == 1
    group, = hook.optimizer.param_groups
    assert (group['lr'], group['betas'], group['weight_decay']) == (3e-4, (0.5, 0.999), 0)
    assert hook_of(train(tmp_path / 'b', iterations=1)).every == 1000


def test_an_optimizer_without_the_logits_is_refused(tmp_path):
    runner = search_task.build(tmp_path)
    runner.optim_wrapper = OptimWrapper(torch.optim.SGD(runner.model.fc.parameters(), lr=0.1))
    runner.param_schedulers = None
    with pytest.raises(ValueError, match="mode='joint', but the optimizer trains 0 of 2 logits"):
        runner.train()


def test_reports_are_logged(tmp_path, monkeypatch):
    messages, drawn = [], []
    monkeypatch.setattr(MMLogger, 'callHandlers', lambda self, record: messages.append(record.getMessage()))
    runner = search_task.build(tmp_path, epochs=2)
    runner.logger.setLevel('INFO')
    monkeypatch.setattr(runner.visualizer, 'add_scalars',
                        lambda scalars, step, **kwargs: drawn.append((step, scalars)))
    runner.train()
    result = json.loads((tmp_path / 'directions.json').read_text())
    rows = [[float(line.split(',')[-1]) for line in (tmp_path / 'alphas.csv').read_text().splitlines()
             if line.startswith(f'{epoch},')] for epoch in (1, 2)]
    drawn = [(step, scalars) for step, scalars in drawn if 'scan_search/entropy' in scalars]
    assert [step for step, _ in drawn] == [1, 2] and len(rows[0]) == 10
    entropy = torch.tensor(result['entropy'])
    assert [drawn[1][1][f'scan_search/entropy/{name}'] for name in result['blocks']] == pytest.approx(entropy.tolist())
    assert drawn[1][1]['scan_search/entropy'] == pytest.approx(entropy.mean().item())
    assert 'scan_search/unchanged' not in drawn[0][1] and 0 <= drawn[1][1]['scan_search/unchanged'] <= 1
    told = [message for message in messages if message.startswith('scan search')]
    parts = ' '.join(f'{value:.3f}' for value in result['entropy'])
    assert told[0].startswith('scan search, epoch 1: entropy ') and told[0].endswith('), top 2: first report')
    assert told[1] == (f'scan search, epoch 2: entropy {entropy.mean():.4f} of the maximum ({parts}), top 2: '
                       f'{drawn[1][1]["scan_search/unchanged"]:.0%} as before')
    assert told[-1] == (f'scan search: the directions are in {tmp_path}/directions.json; retrain with --cfg-options '
                        f'model.backbone.directions={tmp_path}/directions.json')


def test_logits_that_differ_between_processes_stop_the_search(tmp_path, monkeypatch):
    hook = hook_of(train(tmp_path, epochs=1))
    hook._check_ranks()
    monkeypatch.setattr(search_hook, 'dist', SimpleNamespace(
        all_reduce=lambda value, op: value.add_(dict(min=-1e-6, max=1e-6)[op])))
    with pytest.raises(RuntimeError, match='^the logits of the direction search differ between processes$'):
        hook._check_ranks()


def derive(*args):
    return subprocess.run([sys.executable, str(ROOT / 'tools' / 'derive_directions.py'), *map(str, args)],
                          env=dict(os.environ, PYTHONPATH=str(ROOT)), capture_output=True, text=True)


@pytest.mark.slow
def test_derive_from_a_checkpoint(tmp_path):
    train(tmp_path / 'search', ema=True)
    result = derive(tmp_path / 'search' / 'epoch_3.pth', '-k', 2, '--out', tmp_path / 'out')
    assert result.returncode == 0, result.stderr
    ours, derived = (json.loads((folder / 'directions.json').read_text())
                     for folder in (tmp_path / 'search', tmp_path / 'out'))
    for key in ('directions', 'probabilities', 'candidates', 'blocks'):
        assert ours[key] == derived[key]
    assert (tmp_path / 'out' / 'alphas.csv').read_bytes() == (tmp_path / 'search' / 'alphas.csv').read_bytes()


@pytest.mark.slow
def test_derive_from_the_authors_supernet(tmp_path):
    model = LocalVMamba(search_task.ARCH, directions='search')
    for name, parameter in model.named_parameters():
        if name.endswith('alphas'):
            parameter.data = torch.tensor([0., 5, 0, 4, 0, 3, 0, 2])
    torch.save(dict(model=to_official(model.state_dict())[0]), tmp_path / 'official.ckpt')
    result = derive(tmp_path / 'official.ckpt')
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / 'directions.json').read_text())
    assert found['directions'] == [['h_flip', 'v_flip', 'w2_flip', 'w7_flip']] * 2
    result = derive(tmp_path / 'official.ckpt', '--candidates', 'h', 'v')
    assert result.returncode == 1 and 'has 8 candidates a block' in result.stderr


@pytest.mark.parametrize('blocks, stages', [
    ([f'backbone.stages.{stage}.blocks.{block}' for stage, block in ((0, 0), (1, 0), (1, 1))], [1, 2]),
    ([f'backbone.layers.{block}' for block in range(3)], []),
])
def test_the_picture_knows_the_stages(blocks, stages, tmp_path, monkeypatch):
    seen = []
    draw = visualization.draw_directions
    monkeypatch.setattr(visualization, 'draw_directions', lambda *args: seen.append(args[3]) or draw(*args))
    search_hook.write_search(str(tmp_path), ['h', 'v', 'w2'], blocks, 2, [(1, torch.rand(3, 3))], {})
    assert seen == [stages]
