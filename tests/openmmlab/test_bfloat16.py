"""Mixed precision on a CPU: MMEngine's wrapper refuses it, ours trains, and `--amp` takes the one that can."""
import warnings

import pytest
import torch
from mmengine.optim import AmpOptimWrapper, build_optim_wrapper
from mmengine.registry import OPTIM_WRAPPERS, DefaultScope
from test_half import Record
from torch import nn

from mmlocalmamba import ops
from mmlocalmamba.backbones import LocalVim, LocalVMamba
from mmlocalmamba.openmmlab.engine import bfloat16

BACKBONES = {
    LocalVMamba: dict(arch=dict(embed_dims=[8, 12], depths=[1, 1], d_state=4), patch_size=2),
    LocalVim: dict(arch=dict(embed_dims=8, num_layers=2, d_state=4), patch_size=4, img_size=16),
}
CONFIG = dict(type='mmlocalmamba.BFloat16OptimWrapper', optimizer=dict(type='AdamW', lr=2e-2))


@pytest.mark.skipif(torch.cuda.is_available(), reason='of machines without a GPU')
def test_what_mmengine_says():
    """This is why BFloat16OptimWrapper exists. If this fails, check whether it is still needed."""
    model = nn.Linear(1, 1)
    with pytest.raises(AssertionError, match='only available training on gpu'):
        AmpOptimWrapper(optimizer=torch.optim.SGD(model.parameters(), 1.), dtype='bfloat16')


@pytest.mark.parametrize('kind', BACKBONES)
@pytest.mark.parametrize('scope', ['mmpretrain', 'mmdet', 'mmseg'])
def test_it_trains(kind, scope):
    """Products and scans in 16 bits; weights, gradients and the optimizer's state in 32. The loss falls."""
    torch.manual_seed(0)
    model = kind(directions=['h', 'w2_flip'], drop_path_rate=0., **BACKBONES[kind])
    with DefaultScope.overwrite_default_scope(scope):
        wrapper = build_optim_wrapper(model, dict(CONFIG, accumulative_counts=2))
    images, target, losses = torch.randn(4, 3, 16, 16), torch.randn(4, 1), []
    with Record() as record:
        for _ in range(17):
            with wrapper.optim_context(model):
                outs = model(images)
                loss = (outs[-1].flatten(1).float().mean(1, keepdim=True) - target).square().mean()
            wrapper.update_params(loss)
            losses.append(loss.item())
    assert losses[1] == losses[0] and losses[2] != losses[0] and losses[-1] < 0.9 * losses[0]
    assert {x.dtype for group in wrapper.optimizer.state.values() for x in group.values()} == {torch.float32}
    assert {x.grad.dtype for x in model.parameters()} == {torch.float32}
    if ops.available_backends(images)['cpu'] is None:
        scans = [args[0].dtype for func, args in record.calls if 'directional_scan' in func.name()]
        assert scans and set(scans) == {torch.bfloat16}


def test_resumes_what_a_gpu_has_trained():
    """A checkpoint of AmpOptimWrapper holds the state of its scaler, too."""
    model = nn.Linear(2, 2)
    wrapper = OPTIM_WRAPPERS.build(dict(type=CONFIG['type'], optimizer=torch.optim.AdamW(model.parameters())))
    wrapper.update_params(model(torch.ones(1, 2)).sum())
    state = wrapper.state_dict()
    wrapper.load_state_dict(dict(state, loss_scaler=dict(scale=65536.)))
    assert wrapper.state_dict()['state'].keys() == state['state'].keys()


@pytest.mark.parametrize('dtype', ['bfloat16', torch.bfloat16, None])
def test_it_takes_the_dtype_of_the_wrapper_that_it_stands_in_for(dtype):
    options = dict(type=CONFIG['type'], optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), 1.))
    OPTIM_WRAPPERS.build(dict(options, dtype=dtype))
    with pytest.raises(ValueError, match="got dtype='float16': remove dtype"):
        OPTIM_WRAPPERS.build(dict(options, dtype='float16'))


class Runner:
    train = staticmethod(lambda: None)
    register_hook = staticmethod(lambda hook: None)


@pytest.mark.parametrize('device, expected', [('cpu', 'mmlocalmamba.BFloat16OptimWrapper'),
                                              ('cuda', 'AmpOptimWrapper')])
def test_amp_option(device, expected, tmp_path, monkeypatch):
    import train
    path, seen = tmp_path / 'mine.py', []
    path.write_text("optim_wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic', dtype='bfloat16', "
                    "optimizer=dict(type='SGD'))")
    monkeypatch.setattr(train, 'get_device', lambda: device)
    monkeypatch.setattr(train, 'build_runner', lambda cfg: seen.append(cfg) or Runner)
    monkeypatch.setattr('sys.argv', ['train.py', str(path), '--amp', '--work-dir', str(tmp_path)])
    train.main()
    assert seen[0].optim_wrapper.type == expected
    assert {'loss_scale', 'dtype'} & seen[0].optim_wrapper.keys() == (
        {'loss_scale', 'dtype'} if device == 'cuda' else set())


@pytest.mark.parametrize('fast', [True, False])
def test_a_processor_without_bfloat16_is_told_once(fast, monkeypatch):
    monkeypatch.setattr(bfloat16, '_has_bfloat16', lambda: fast)
    model = nn.Linear(2, 1)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        wrapper = build_optim_wrapper(model, CONFIG)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        for _ in range(3):
            with wrapper.optim_context(model):
                assert model(torch.ones(1, 2)).dtype == torch.bfloat16
    assert sum('no fast bfloat16 matrix products' in str(warning.message) for warning in found) == (not fast)


def test_the_question_has_an_answer():
    """The function of torch is private and may disappear."""
    assert bfloat16._has_bfloat16() in (True, False)
