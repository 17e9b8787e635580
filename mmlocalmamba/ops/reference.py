"""The selective scan, line by line: the oracle that every other backend is tested against.

Source: Mamba's S6 (paper section 3.2) as computed by ``mamba_ssm``: with A diagonal and B discretised by Euler's rule,

    dt_t = softplus(delta_t + delta_bias)
    h_t  = exp(dt_t * A) * h_{t-1} + dt_t * u_t * B_t
    y_t  = C_t . h_t + D * u_t

With a complex A, B and C, y_t = 2 Re(C_t . h_t) + D * u_t. Plain autograd, one step at a time: any dtype, derivatives
of any order; clear, slow.
"""

import torch
from torch import Tensor

from mmlocalmamba.ops.dispatch import Backend, ScanInputs
from mmlocalmamba.ops.scan_order import read, real_output, step_size, write


def scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """See :func:`mmlocalmamba.ops.directional_scan`; returns y (B, K, L, D) and the last states (B, K, D, N)."""
    u, delta, A, B, C, D, src, inv, delta_bias, _, delta_softplus, in_scan_order = inputs
    if not in_scan_order:
        u, delta, B, C = (read(x, src, inv) for x in (u, delta, B, C))
    dt = step_size(delta, delta_bias, delta_softplus)
    h = A.new_zeros(*u.shape[:2], u.shape[3], A.shape[-1])
    ys = [u[:, :, :0]]
    for t in range(u.shape[2]):
        h = torch.exp(dt[:, :, t, :, None] * A) * h + (dt[:, :, t] * u[:, :, t])[..., None] * B[:, :, t, None, :]
        ys.append(real_output((h * C[:, :, t, None, :]).sum(-1))[:, :, None])
    y = torch.cat(ys, dim=2)
    if D is not None:
        y = y + D[:, None] * u
    return (y if inv is None else write(y, inv)), h


def unavailable(u: Tensor) -> str | None:
    return None


BACKEND = Backend('reference', scan, unavailable, complex_states=True)
