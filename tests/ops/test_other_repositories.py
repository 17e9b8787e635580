"""Code of other repositories, unchanged, on the stand-ins: $MMLOCALMAMBA_CLONES is a folder with clones of Vim, VMamba,
VideoMamba, SegMamba, U-Mamba, MambaVision, EfficientVMamba, mamba and causal-conv1d by these names."""
import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import ROOT
from test_stand_ins import SIGNATURES

CLONES = os.environ.get('MMLOCALMAMBA_CLONES')
PRELUDE = '''
import os, sys, types, warnings
from pathlib import Path
import torch
from mmlocalmamba.ops import stand_ins
warnings.filterwarnings('ignore')
clones = Path(os.environ['MMLOCALMAMBA_CLONES'])
torch.manual_seed(0)

def values(model, x):
    """Outputs and gradients of a network."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    outputs = model(x)
    outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    total = sum((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in outputs)
    total.backward()
    found = {f'output {i}': y.detach() for i, y in enumerate(outputs)}
    found['input'] = x.grad
    found.update((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    assert len(found) > 3
    return found

def same(ours, theirs, limit):
    assert ours.keys() == theirs.keys()
    floor = 1e-4 * max(y.norm() for y in theirs.values())  # a bias before a norm has a gradient of rounding errors
    for name, y in theirs.items():
        assert ours[name].shape == y.shape and ours[name].dtype == y.dtype, name
        error = ((ours[name] - y).norm() / y.norm().clamp(min=floor)).item()
        assert error <= limit, f'{name}: relative error {error:.1e}'

def shaken(model):
    """A network in evaluation mode (no dropped paths) whose parameters are not zero."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()

def by_reference(model, x, limit=1e-9, backend='reference'):
    """In float64: the fastest backend against another."""
    model, x = shaken(model).double(), x.double()
    ours = values(model, x)
    os.environ['MMLOCALMAMBA_BACKEND'] = backend
    same(ours, values(model, x), limit)
    print('compared', len(ours))
'''


def run(code, *needed, repositories=()):
    if CLONES is None:
        pytest.skip('MMLOCALMAMBA_CLONES names no folder of clones')
    for name in repositories:
        if not (Path(CLONES) / name).is_dir():
            pytest.skip(f'{CLONES} has no {name}')
    for package in needed:
        if find_spec(package) is None:
            pytest.skip(f'{package} is not installed')
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
    result = subprocess.run([sys.executable, '-c', PRELUDE + code], capture_output=True, text=True,
                            env={**os.environ, 'PYTHONPATH': path})
    assert result.returncode == 0, result.stderr[-3000:]
    assert 'compared' in result.stdout


def test_vim():
    run('''
stand_ins.stand_in_for()
sys.path.insert(0, str(clones / 'Vim/vim'))
from models_mamba import VisionMamba
model = VisionMamba(img_size=32, patch_size=8, stride=8, depth=2, embed_dim=32, d_state=4, num_classes=5,
                    final_pool_type='mean', bimamba_type='v2', init_layer_scale=0.5)
assert model.layers[0].mixer.bimamba_type == 'v2' and model.fused_add_norm and model.residual_in_fp32
by_reference(model, torch.randn(2, 3, 32, 32))
''', 'timm', 'einops', repositories=['Vim'])


@pytest.mark.parametrize('kind,options', [('image_sm', ''), ('video_sm', 'num_frames=2, ')])
def test_videomamba(kind, options):
    run(f'''
stand_ins.stand_in_for()
sys.path.insert(0, str(clones / 'VideoMamba/videomamba/{kind}/models'))
from videomamba import VisionMamba
model = VisionMamba(img_size=32, patch_size=8, depth=2, embed_dim=32, num_classes=5, {options})
assert model.layers[0].mixer.bimamba_type == 'v2'
by_reference(model, torch.randn(2, 3, {'2, ' if options else ''}32, 32))
''', 'timm', 'einops', repositories=['VideoMamba'])


def test_segmamba():
    """Its encoder, which has all its layers."""
    run('''
stand_ins.stand_in_for()
sys.path.insert(0, str(clones / 'SegMamba/model_segmamba'))
from segmamba import MambaEncoder
model = MambaEncoder(in_chans=1, depths=[1, 1, 1, 1], dims=[8, 8, 8, 8])
by_reference(model, torch.randn(1, 1, 32, 32, 32), backend='chunked')  # 4096 steps
''', 'monai', repositories=['SegMamba'])


def test_umamba():
    """Without nnU-Net, of which the network's file needs three names for functions that are not called here."""
    run('''
stand_ins.stand_in_for()
for name, contents in (('plans_handling.plans_handler', ['ConfigurationManager', 'PlansManager']),
                       ('network_initialization', ['InitWeights_He'])):
    module = sys.modules[f'nnunetv2.utilities.{name}'] = types.ModuleType(name)
    vars(module).update(dict.fromkeys(contents, object))
sys.path.insert(0, str(clones / 'U-Mamba/umamba/nnunetv2/nets'))
from UMambaBot_2d import UMambaBot
model = UMambaBot(1, 3, [8, 16, 32], torch.nn.Conv2d, [[3, 3]] * 3, [[1, 1], [2, 2], [2, 2]], [1, 1, 1], 2, [1, 1],
                  norm_op=torch.nn.InstanceNorm2d, norm_op_kwargs={}, nonlin=torch.nn.LeakyReLU, nonlin_kwargs={})
by_reference(model, torch.randn(1, 1, 32, 32))
''', 'dynamic_network_architectures', repositories=['U-Mamba'])


def test_mambavision():
    run('''
stand_ins.stand_in_for()
sys.path.insert(0, str(clones / 'MambaVision'))
from mambavision.models.mamba_vision import MambaVision
model = MambaVision(dim=16, in_dim=16, depths=[1, 1, 2, 2], window_size=[8, 8, 4, 4], mlp_ratio=2,
                    num_heads=[1, 2, 4, 4], num_classes=5)
by_reference(model, torch.randn(1, 3, 64, 64), 1e-5)  # it converts A and D to float32
''', 'timm', 'einops', repositories=['MambaVision'])


@pytest.mark.parametrize('place,forward_type,extension', [
    ('classification/models', 'v0', 'selective_scan_cuda'),
    ('classification/models', 'v05', 'selective_scan_cuda_oflex'),
    ('classification', 'v05_noz', 'selective_scan_cuda_oflex'),
    ('classification', 'v01', 'selective_scan_cuda'),
    ('', 'v0', 'selective_scan_cuda'),
    ('', 'v05_noz', 'selective_scan_cuda'),
])
def test_vmamba(place, forward_type, extension):
    """Against its own reference, selective_scan_torch. Its files are imported alone, as a package, or as one."""
    run(f'''
stand_ins.stand_in_for({extension!r}, 'csm_triton')
sys.path.insert(0, str(clones / 'VMamba' / {place!r}))
if {place!r} == 'classification':
    from models import vmamba
else:
    import vmamba
model = shaken(vmamba.VSSM(depths=[1, 1], dims=16, num_classes=5, forward_type={forward_type!r}, ssm_d_state=4))
x = torch.randn(2, 3, 32, 32)
calls = []
for part in ('fwd', 'bwd'):
    function = getattr(sys.modules[{extension!r}], part)
    setattr(sys.modules[{extension!r}], part, lambda *args, part=part, function=function: (
        calls.append(part), function(*args))[1])
ours = values(model, x)
assert sorted(calls) == ['bwd', 'bwd', 'fwd', 'fwd'], calls
scan = vmamba.selective_scan_fn
def own_reference(*args, **kwargs):
    return scan(*args, **{{**kwargs, 'backend': 'torch'}})
vmamba.selective_scan_fn = own_reference
same(ours, values(model, x), 1e-4)
print('compared', len(ours))
''', 'timm', 'fvcore', 'einops', repositories=['VMamba'])


def test_efficientvmamba():
    run('''
stand_ins.stand_in_for('selective_scan_cuda')
sys.path.insert(0, str(clones / 'EfficientVMamba/classification'))
from lib.models.mamba import efficient_mamba
model = shaken(efficient_mamba.EfficientVSSM(depths=[1, 1, 1, 1], dims=16, num_classes=5, d_state=4))
x = torch.randn(2, 3, 64, 64)
ours = values(model, x)
os.environ['MMLOCALMAMBA_BACKEND'] = 'reference'
same(ours, values(model, x), 1e-4)
print('compared', len(ours))
''', 'timm', 'fvcore', 'einops', repositories=['EfficientVMamba'])


FORK = '''
stand_ins.stand_in_for('selective_scan_cuda', 'causal_conv1d_cuda')
sys.path[:0] = [str(clones / {conv!r})]
package = sys.modules['mamba_ssm'] = types.ModuleType('mamba_ssm')  # its __init__ needs transformers
package.__path__ = [str(clones / {mamba!r} / 'mamba_ssm')]
from mamba_ssm.modules import mamba_simple as theirs
assert theirs.__file__.startswith(str(clones))
'''


@pytest.mark.parametrize('mamba,conv,options,length', [
    ('mamba', 'causal-conv1d', '', 12),
    ('Vim/mamba-1p1p1', 'Vim/causal-conv1d', '', 12),
    ('Vim/mamba-1p1p1', 'Vim/causal-conv1d', "bimamba_type='v1'", 12),
    ('Vim/mamba-1p1p1', 'Vim/causal-conv1d', "bimamba_type='v2', if_divide_out=True, init_layer_scale=0.5", 12),
    ('Vim/mamba-1p1p1', 'Vim/causal-conv1d', "bimamba_type='v2', bias=True, conv_bias=False, dt_init='constant'", 12),
    ('VideoMamba/mamba', 'VideoMamba/causal-conv1d', 'bimamba=True', 12),
    ('VideoMamba/mamba', 'VideoMamba/causal-conv1d', 'bimamba=False', 12),
    ('SegMamba/mamba', 'SegMamba/causal-conv1d', "bimamba_type='v3', nslices=4", 12),
])
def test_layers_of_forks(mamba, conv, options, length):
    """Their Python on our extensions, with gradients by their formulas, and our layers: the same initial weights, keys,
    order of parameters, outputs and gradients."""
    run(FORK.format(mamba=mamba, conv=conv) + f'''
layers = []
for Mamba in (theirs.Mamba, stand_ins.Mamba):
    torch.manual_seed(3)
    layers.append(Mamba(24, d_state=5, dt_rank=2, {options}))
other, ours = layers
assert [name for name, _ in other.named_parameters()] == [name for name, _ in ours.named_parameters()]
assert list(other.state_dict()) == list(ours.state_dict())
for name, x in other.state_dict().items():
    assert torch.equal(x, ours.state_dict()[name]), name
for name, p in other.named_parameters():
    mine = ours.get_parameter(name)
    for mark in ('_no_weight_decay', '_no_reinit'):
        assert hasattr(p, mark) == hasattr(mine, mark), (name, mark)
x = torch.randn(2, {length}, 24)
def compare(ours, other):
    both = values(ours, x), values(other, x)
    if 'v1' in {options!r}:  # their BiMambaInnerFn drops the gradient of the second scan's gate (dz_b)
        for found in both:
            for name in [name for name in found if 'input' in name or 'in_proj' in name or 'norm' in name]:
                del found[name]
    same(*both, 2e-5)
compare(ours, other)
if not any(kind in {options!r} for kind in ('v1', 'v2', 'v3', 'True')):  # token by token, by their PyTorch version
    theirs.selective_state_update = theirs.causal_conv1d_update = None
    for layer in layers:
        layer.layer_idx = 0
    results = []
    for layer in layers:
        params = stand_ins.InferenceParams(max_seqlen=20, max_batch_size=2)
        with torch.no_grad():
            steps = [layer(x[:, :7], inference_params=params)]
            params.seqlen_offset = 7
            steps += [layer(x[:, t:t + 1], inference_params=params) for t in range(7, {length})]
        conv_state, ssm_state = params.key_value_memory_dict[0]
        results.append(dict(y=torch.cat(steps, dim=1), conv=conv_state, ssm=ssm_state))
    same(*reversed(results), 2e-5)
    for a, b in zip(other.allocate_inference_cache(2, 9), ours.allocate_inference_cache(2, 9)):
        assert a.shape == b.shape and a.dtype == b.dtype and not b.any()
if hasattr(theirs, 'Block'):
    from functools import partial
    blocks = []
    for Block, Mamba in ((theirs.Block, theirs.Mamba), (stand_ins.mamba_modules.BlockV1, stand_ins.Mamba)):
        torch.manual_seed(3)
        blocks.append(Block(24, partial(Mamba, {options}), residual_in_fp32=True))
else:
    from mamba_ssm.modules.block import Block
    blocks = []
    for Block, Mamba in ((Block, theirs.Mamba), (stand_ins.Block, stand_ins.Mamba)):
        torch.manual_seed(3)
        blocks.append(Block(24, Mamba, lambda dim: torch.nn.Linear(dim, dim), residual_in_fp32=True))
other, ours = blocks
assert [name for name, _ in other.named_parameters()] == [name for name, _ in ours.named_parameters()]
assert all(torch.equal(x, ours.state_dict()[name]) for name, x in other.state_dict().items())
compare(ours, other)
print('compared')
''', 'einops', 'triton', repositories=[mamba, conv])


@pytest.mark.parametrize('mamba,conv', [('mamba', 'causal-conv1d'), ('Vim/mamba-1p1p1', 'Vim/causal-conv1d'),
                                        ('SegMamba/mamba', 'SegMamba/causal-conv1d')])
def test_references_of_forks(mamba, conv):
    """Our functions in float32 and their references in PyTorch, by name: scans, blocks, norms, convolutions."""
    run(FORK.format(mamba=mamba, conv=conv) + '''
import inspect
from mamba_ssm.ops import selective_scan_interface as scans
from causal_conv1d import causal_conv1d_interface as convolutions
scans.selective_scan_fn = scans.selective_scan_ref
scans.causal_conv1d_fn = lambda x, weight, bias, activation: convolutions.causal_conv1d_ref(
    x, weight, bias, activation=activation)
try:
    from mamba_ssm.ops.triton import layer_norm as norms
except ImportError:
    from mamba_ssm.ops.triton import layernorm as norms

def check(name, their_function, *args, **kwargs):
    parameters = list(inspect.signature(their_function).parameters)
    ours = list(inspect.signature(getattr(stand_ins, name)).parameters)
    if 'norm' not in name and 'conv1d' not in name:  # 1.x orders some otherwise: networks pass them by keyword
        assert ours[:len(parameters)] == parameters, (name, parameters, ours)
    results = []
    for function in (getattr(stand_ins, name), their_function):
        leaves = [x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in args]
        keys = {k: x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) else x
                for k, x in kwargs.items()}
        y = function(*leaves, **keys)
        ys = y if isinstance(y, tuple) else (y, )
        sum((t * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in ys).backward()
        results.append({**{f'y{i}': t.detach() for i, t in enumerate(ys)},
                        **{f'x{i}': x.grad for i, x in enumerate([*leaves, *keys.values()])
                           if isinstance(x, torch.Tensor)}})
    same(*results, 5e-5)

B, D, N, L, R, E = 2, 6, 4, 9, 3, 5
u, delta, z = torch.randn(B, D, L), torch.rand(B, D, L), torch.randn(B, D, L)
A, A_b, skip, bias = -torch.rand(D, N), -torch.rand(D, N), torch.randn(D), torch.rand(D)
for b in (torch.randn(B, N, L), torch.randn(B, 2, N, L), torch.randn(D, N)):
    check('selective_scan_fn', scans.selective_scan_ref, u, delta, A, b, b.flip(-1), skip, z, bias, True, True)
    check('selective_scan_fn', scans.selective_scan_ref, u, delta, A, b, b.flip(-1))
inner = [torch.randn(B, 2 * D, L), torch.randn(D, 1, 4), torch.randn(D), torch.randn(R + 2 * N, D) / 3,
         torch.randn(D, R) / 2]
out = [torch.randn(E, D), torch.randn(E)]
check('mamba_inner_fn', scans.mamba_inner_ref, *inner, *out, A, D=skip, delta_bias=bias)
check('mamba_inner_ref', scans.mamba_inner_ref, *inner, *out, A, D=skip, delta_bias=bias,
      B_proj_bias=torch.randn(N), C_proj_bias=torch.randn(N))
if hasattr(scans, 'bimamba_inner_ref'):
    check('bimamba_inner_fn', scans.bimamba_inner_ref, *inner, *out, A, A_b, D=skip, delta_bias=bias)
    # Their fused function, whose Python runs on our extensions.
    check('mamba_inner_fn_no_out_proj', scans.mamba_inner_fn_no_out_proj, *inner, A, D=skip, delta_bias=bias)
x, residual = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
weight, norm_bias = torch.randn(8), torch.randn(8)
for name in ('layer_norm', 'rms_norm'):
    reference = getattr(norms, f'{name}_ref')
    for ours in (f'{name}_fn', f'{name}_ref'):
        check(ours, reference, x, weight, norm_bias, residual=residual, eps=1e-3, prenorm=True)
        check(ours, reference, x, weight, None, eps=1e-3)
        check(ours, reference, x, weight, None, residual=residual)
norm, RMSNorm = norms.RMSNorm(8), stand_ins.RMSNorm(8)
assert list(norm.state_dict()) == list(RMSNorm.state_dict()) and norm.eps == RMSNorm.eps and RMSNorm.bias is None
check('causal_conv1d_fn', convolutions.causal_conv1d_ref, torch.randn(B, 8, L), torch.randn(8, 4), torch.randn(8),
      activation='silu')
print('compared')
''', 'einops', 'triton', repositories=[mamba, conv])


def signatures(path):
    """The functions and the constructors of classes in a file, as in SIGNATURES; nothing is imported."""
    for node in ast.parse(path.read_text()).body:
        inner = [part for part in getattr(node, 'body', []) if getattr(part, 'name', '') == '__init__']
        function = inner[0] if isinstance(node, ast.ClassDef) and inner else node
        if isinstance(function, ast.FunctionDef):
            names = [arg.arg for arg in function.args.args if arg.arg != 'self']
            defaults = [ast.unparse(value).strip("'").rpartition('nn.')[2] for value in function.args.defaults]
            yield node.name, ' '.join([*names[:len(names) - len(defaults)],
                                       *(f'{name}={float(value) if "e-" in value else value}' for name, value in
                                         zip(names[len(names) - len(defaults):], defaults))])


@pytest.mark.parametrize('path,names', [
    ('mamba/mamba_ssm/ops/selective_scan_interface.py', 'selective_scan_fn selective_scan_ref mamba_inner_fn '
     'mamba_inner_ref'),
    ('mamba/mamba_ssm/ops/triton/selective_state_update.py', 'selective_state_update selective_state_update_ref'),
    ('mamba/mamba_ssm/ops/triton/layer_norm.py', 'layer_norm_fn layer_norm_ref rms_norm_fn rms_norm_ref RMSNorm'),
    ('mamba/mamba_ssm/modules/mamba_simple.py', 'Mamba'),
    ('mamba/mamba_ssm/modules/block.py', 'Block'),
    ('Vim/mamba-1p1p1/mamba_ssm/modules/mamba_simple.py', 'Mamba'),
    ('Vim/mamba-1p1p1/mamba_ssm/ops/selective_scan_interface.py', 'mamba_inner_fn_no_out_proj bimamba_inner_fn '
     'bimamba_inner_ref'),
    ('causal-conv1d/causal_conv1d/causal_conv1d_interface.py', 'causal_conv1d_fn causal_conv1d_update '
     'causal_conv1d_update_ref'),
    ('causal-conv1d/causal_conv1d/cpp_functions.py', 'causal_conv1d_fwd_function causal_conv1d_bwd_function '
     'causal_conv1d_update_function'),
])
def test_signatures(path, names):
    """The table that the other tests hold our functions to is theirs."""
    if CLONES is None or not (Path(CLONES) / path).is_file():
        pytest.skip('MMLOCALMAMBA_CLONES names no folder with this clone')
    theirs = dict(signatures(Path(CLONES) / path))
    for name in names.split():
        assert SIGNATURES[name].startswith(theirs[name]), name
        assert name == 'Mamba' or SIGNATURES[name] == theirs[name], name
