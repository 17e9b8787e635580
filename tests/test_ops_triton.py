"""The Triton kernels against the reference in float64: on a GPU, or without one in Triton's interpreter.

The interpreter proves the arithmetic and the masks, not that threads do not race.
"""
import pytest
import torch
from test_ops import assert_same, directional_inputs, run

from mmlocalmamba.ops import directional_scan, triton

pytest.importorskip('triton')
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


@pytest.fixture(autouse=True)
def numpy_scalars(monkeypatch):
    """numpy 2.4 turns arrays of one element into integers no longer, which Triton 3.6's interpreter relies on."""
    if DEVICE == 'cuda':
        return
    from triton.runtime import interpreter
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, '__index__', lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, '_patch_lang_tensor', patched)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel does not write is NaN."""
    monkeypatch.setattr(triton, '_empty', lambda *shape, **options: torch.full(shape, torch.nan, **options))


def compare(rtol=2e-6, gradient_rtol=1e-5, dtype=torch.float32, omit=(), **kwargs):
    inputs, tables = directional_inputs(dtype=dtype, **kwargs)
    for name in omit:
        inputs.pop(name)
    scan_order = kwargs.get('scan_order', False)
    exact = run({name: x.double() for name, x in inputs.items()}, directional_scan, backend='reference',
                tables=tables, in_scan_order=scan_order)
    tables = type(tables)(*(table.to(DEVICE) for table in tables))
    ours = run({name: x.to(DEVICE) for name, x in inputs.items()}, directional_scan, backend='triton',
               tables=tables, in_scan_order=scan_order)
    ours = {name: x.cpu() for name, x in ours.items()}
    assert ours['y'].dtype == dtype and ours['last'].dtype == torch.float32
    for name, x in inputs.items():
        assert ours[name].dtype == x.dtype, name
    outputs = ('y', 'last')
    assert_same(ours, {name: exact[name] for name in outputs}, rtol)
    assert_same(ours, {name: x for name, x in exact.items() if name not in outputs}, gradient_rtol)
    return ours


@pytest.mark.parametrize('N', [1, 2, 5, 16])
def test_equals_reference(N):
    compare(H=5, W=7, D=5, N=N, batch=1 if N == 16 else 2)


if __name__ == '__main__':
    pytest.main([__file__, '-x', '-q'])
