"""The selective scan, line by line: every other backend is tested against it.

Source: Mamba's S6 (paper section 3.2) as computed by ``mamba_ssm``. With A diagonal and B discretised by Euler's rule,

    dt_t = softplus(delta_t + delta_bias)
    h_t  = exp(dt_t * A) * h_{t-1} + dt_t * u_t * B_t
    y_t  = C_t . h_t + D * u_t

With complex A, B and C, y_t = 2 Re(C_t . h_t) + D * u_t. It runs one step at a time under plain autograd: clear, slow,
with any dtype and derivatives of any order.
"""

import torch
from torch import Tensor

from mmlocalmamba.ops.dispatch import Backend, ScanInputs
from mmlocalmamba.ops.scan_order import read, real_output, step_size, write


class ReferenceBackend(Backend):
    name = 'reference'
    complex_states = True

    def scan(self, inputs: ScanInputs) -> tuple[Tensor, Tensor]:
        u, delta, A, B, C, D = inputs.u, inputs.delta, inputs.A, inputs.B, inputs.C, inputs.D
        if not inputs.in_scan_order:
            u, delta, B, C = (read(x, inputs.src, inputs.inv) for x in (u, delta, B, C))
        dt = step_size(delta, inputs.delta_bias, inputs.delta_softplus)
        h = A.new_zeros(*u.shape[:2], u.shape[3], A.shape[-1])
        ys = [u[:, :, :0]]
        for t in range(u.shape[2]):
            h = torch.exp(dt[:, :, t, :, None] * A) * h + (dt[:, :, t] * u[:, :, t])[..., None] * B[:, :, t, None, :]
            ys.append(real_output((h * C[:, :, t, None, :]).sum(-1))[:, :, None])
        y = torch.cat(ys, dim=2)
        if D is not None:
            y = y + D[:, None] * u
        return (y if inputs.inv is None else write(y, inputs.inv)), h


BACKEND = ReferenceBackend()
