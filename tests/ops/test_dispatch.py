"""The choice of the backend, the precision it computes in, and the arguments it gets."""
import dataclasses
import subprocess
import sys
import warnings

import pytest
import torch
from test_cpu import built
from test_scan import ALL_BACKENDS, directional_inputs
from torch._subclasses.fake_tensor import FakeTensorMode

from mmlocalmamba import ops
from mmlocalmamba.ops import ScanInputs, directional_scan, dispatch
from mmlocalmamba.ops.backends.triton import host


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('backend', ALL_BACKENDS)
def test_step_sizes_are_never_multiplied_in_16_bits(backend, autocast):
    """Activations have 16 bits and weights 32, as in a model under autocast. The low-rank product has 32 bits as well.

    Last states show it, since outputs are rounded.
    """
    inputs, tables = directional_inputs(rank=24, D=8)
    inputs = {name: x.detach().to(torch.bfloat16 if name in ('u', 'delta', 'B', 'C') else torch.float32)
              for name, x in inputs.items()}
    exact = directional_scan(**{name: x.double() for name, x in inputs.items()}, tables=tables, delta_softplus=True,
                             return_last_state=True, backend='reference')[1]
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
        y, last = directional_scan(**inputs, tables=tables, delta_softplus=True, return_last_state=True,
                                   backend=backend)
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32
    assert (last - exact).norm() / exact.norm() < 1e-5


def fake(dtype=torch.float32, device='cuda', size=1 << 16):
    with FakeTensorMode():
        return torch.empty(size, dtype=dtype, device=device)


@pytest.mark.parametrize('case,reason', [('old', 'compute capability 8.0'), ('none', 'triton is not installed'),
                                         ('float64', 'does not take torch.float64')])
def test_a_slow_scan_on_a_gpu_warns_once(case, reason, monkeypatch):
    dispatch._warn_of_slow_scan.cache_clear()
    monkeypatch.setattr(host, '_INSTALLED', case != 'none')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: (7, 5) if case == 'old' else (9, 0))
    u = fake(torch.float64 if case == 'float64' else torch.float16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        assert dispatch.choose(fake(u.dtype, size=10)).name == 'chunked' and not caught
        assert dispatch.choose(u).name == dispatch.choose(u).name == 'chunked'
        dispatch.choose(u, 'chunked'), dispatch.choose(fake(device='meta'))
    assert len(caught) == 1 and reason in str(caught[0].message) and "'triton'" in str(caught[0].message)
    dispatch._warn_of_slow_scan.cache_clear()


def test_the_argument_names_a_backend_of_every_op():
    x, weight = torch.ones(1, 2, 4), torch.ones(4)
    for op, args in ((ops.linear, (x, x[0])), (ops.add_rms_norm, (x, None, weight, 1e-5)),
                     (ops.scattn_sum, (x[None], None, weight, weight, 1e-5, x[0], weight[:2], x[0].t(), weight))):
        op(*args, backend='reference')
        with pytest.raises(ValueError, match="unknown backend 'fast'"):
            op(*args, backend='fast')
        with pytest.raises(RuntimeError, match="'cuda' cannot run here"):
            op(*args, backend='cuda')


def test_a_device_without_autocast():
    """Shapes of a model are computed on the meta device, also under autocast."""
    inputs, tables = directional_inputs(H=2, W=2)
    inputs = {name: x.to('meta') for name, x in inputs.items()}
    tables = type(tables)(*(table.to('meta') for table in tables))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = directional_scan(**inputs, tables=tables)
        assert ops.linear(y, torch.empty(3, 5, 3, device='meta')[0].to(y.dtype)).shape == (*y.shape[:-1], 5)
    assert y.shape == inputs['delta'].shape and y.device.type == 'meta'


def reason_with_version(code, version):
    """Return the reason why the native kernels are unavailable in a process where torch has this version."""
    code = (f'import torch\ntorch.__version__ = {version!r}\n{code}\n'
            'from mmlocalmamba import ops\nprint(ops.available_backends(torch.empty(0))["cpu"])')
    return subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout.strip()


@built
@pytest.mark.parametrize('suffix', ['.0a0+1234567.nv26.01', '.0.dev20260101+cu130', '.1', '.0'])
@pytest.mark.slow
def test_the_native_kernel_runs_with_every_build_of_its_torch(suffix):
    """NVIDIA's containers and nightly builds have the same interface and longer version names."""
    release = '.'.join(torch.__version__.split('.')[:2])
    assert reason_with_version('', release + suffix) == 'None'


@built
@pytest.mark.slow
def test_the_native_kernel_is_not_used_with_another_torch():
    assert 'this is 1.13.0: install the package again' in reason_with_version('', '1.13.0')


@built
@pytest.mark.slow
def test_a_native_kernel_that_fails_is_not_used():
    """Its first call finds problems that versions do not show."""
    code = '''
import sys
from types import ModuleType
broken = ModuleType('mmlocalmamba.ops._cpu')  # it can be imported, but registers no operators
broken.TORCH_VERSION = torch.__version__
sys.modules['mmlocalmamba.ops._cpu'] = broken
'''
    assert 'the extension does not run: install the package again' in reason_with_version(code, torch.__version__)


def scan_inputs():
    inputs, tables = directional_inputs(H=2, W=2)
    return ScanInputs(**inputs, src=tables.src, inv=tables.inv, delta_softplus=True)


def test_scan_inputs_are_used_by_name_only():
    inputs = scan_inputs()
    with pytest.raises(TypeError, match='positional'):
        ScanInputs(inputs.u, inputs.delta, inputs.A, inputs.B, inputs.C)
    with pytest.raises(TypeError, match='iterable'):
        u, delta, *_ = inputs
    with pytest.raises(TypeError, match='step_size'):
        inputs.replace(step_size=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        inputs.u = inputs.delta
    changed = inputs.replace(u=inputs.delta)
    assert changed.u is inputs.delta and changed.delta is inputs.delta and inputs.u is not inputs.delta


def test_scan_inputs_are_copied_only_if_a_dtype_changes():
    inputs = scan_inputs()
    assert inputs.to(torch.float64) is inputs and inputs.with_full_step_sizes() is inputs
    half = inputs.to(torch.bfloat16)
    assert {x.dtype for x in half.tokens()} == {torch.bfloat16}
    assert {x.dtype for x in half.parameters()} == {torch.float32}
    assert half.src is inputs.src and half.delta_softplus


def test_the_operators_of_the_scan_have_its_arguments():
    """Gradients are found by name: each output of the backward operator is an argument of the forward one."""
    forward = torch.ops.mmlocalmamba.directional_scan.default._schema
    backward = torch.ops.mmlocalmamba.directional_scan_backward.default._schema
    fields = {field.name for field in dataclasses.fields(ScanInputs)}
    arguments = {argument.name for argument in forward.arguments}
    assert arguments - {'tokens', 'save'} == fields - {'inv'}
    assert arguments - {'save'} | {'grad_y', 'grad_last', 'checkpoints', 'wanted'} == {
        argument.name for argument in backward.arguments}
    gradients = {output.name for output in backward.returns}
    assert gradients <= arguments and f'bool[{len(gradients)}] wanted' in str(backward)


def test_a_backend_is_a_class_with_a_scan(monkeypatch):
    """A backend of one's own: float64 only, without fused ops."""

    class Mine(ops.Backend):
        name = 'mine'
        automatic = False
        dtypes = (torch.float64, )

        def scan(self, inputs):
            assert inputs.u.dtype == torch.float64 and inputs.dt_weight is None
            return ops.BACKENDS['reference'].scan(inputs)

    monkeypatch.setitem(ops.BACKENDS, 'mine', Mine())
    inputs, tables = directional_inputs(H=2, W=3, rank=2)
    ours, expected = (directional_scan(**inputs, tables=tables, backend=name) for name in ('mine', 'reference'))
    assert torch.equal(ours, expected) and ops.available_backends(inputs['u'])['mine'] is None
    x = torch.ones(2, 3, dtype=torch.float64)
    assert torch.equal(ops.linear(x, x, backend='mine'), x @ x.t())
    # Without `automatic`, it is not chosen, not even as the first.
    monkeypatch.setattr(dispatch, 'BACKENDS', {'mine': Mine(), 'reference': ops.BACKENDS['reference']})
    assert dispatch.choose(inputs['u']).name == 'reference'
