"""The selective state spaces of K scan directions, and the projections that make their inputs (paper section 3.2)."""
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmlocalmamba.directions import ScanTables
from mmlocalmamba.ops import directional_scan, linear


class SSMWeights(NamedTuple):
    """Weights of K directions over D channels with N states; R is the rank of the step sizes.

    Attributes:
        x_proj: (K, R + 2 N, D), projects tokens to the factor of the step sizes, to B and to C.
        dt_proj: (K, D, R).
        dt_bias: (K, D).
        A_log: (K, D, N); A is -exp(A_log).
        skip: (K, D), Mamba's D.
    """
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A_log: Tensor
    skip: Tensor


def project_and_scan(x: Tensor, weights: SSMWeights, tables: ScanTables, in_scan_order: bool = False) -> Tensor:
    """Project tokens to the inputs of K selective scans, and scan.

    The projections act on each token alone, so they commute with any permutation: one product over unpermuted tokens
    serves all directions.

    Args:
        x: (B, L, D); with ``in_scan_order`` (B, K, T, D), the steps of each direction.
        weights: of the K directions.
        tables: of the K directions, on the device of x.
        in_scan_order: x is given step by step.

    Returns:
        (B, K, L, D) at original positions.
    """
    x_proj, dt_proj, dt_bias, A_log, skip = weights
    rank, N = dt_proj.shape[-1], A_log.shape[-1]
    if in_scan_order:
        projected = linear(x, x_proj)
    else:
        projected = linear(x, x_proj.flatten(0, 1)).unflatten(-1, x_proj.shape[:2]).transpose(1, 2)
    dt, B, C = projected.split((rank, N, N), dim=-1)
    A = -A_log.to(torch.promote_types(A_log.dtype, torch.float32)).exp()
    return directional_scan(x, dt, A, B, C, skip, tables, dt_bias, delta_softplus=True, in_scan_order=in_scan_order,
                            dt_weight=dt_proj)


class DirectionalSSM(nn.Module):
    """Projections and state matrices of K selective scans, with Mamba's initialisation.

    Args:
        channels: inner width D.
        directions: their number K.
        d_state: number of states N.
        dt_rank: R, rank of the projection to the step sizes.
        dt_min, dt_max: range of the initial step sizes, softplus(dt_proj_bias).
    """

    def __init__(self, channels: int, directions: int, d_state: int, dt_rank: int, dt_min: float = 1e-3,
                 dt_max: float = 1e-1) -> None:
        super().__init__()
        self.dt_min, self.dt_max = dt_min, dt_max
        self.x_proj_weight = nn.Parameter(torch.empty(directions, dt_rank + 2 * d_state, channels))
        self.dt_proj_weight = nn.Parameter(torch.empty(directions, channels, dt_rank))
        self.dt_proj_bias = nn.Parameter(torch.empty(directions, channels))
        self.A_log = nn.Parameter(torch.empty(directions, channels, d_state))
        self.D = nn.Parameter(torch.empty(directions, channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        _, channels, rank = self.dt_proj_weight.shape
        dt = torch.empty_like(self.dt_proj_bias).uniform_(math.log(self.dt_min), math.log(self.dt_max)).exp()
        self.dt_proj_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        states = torch.arange(1, self.A_log.shape[-1] + 1, dtype=self.A_log.dtype, device=self.A_log.device)
        self.A_log.copy_(states.log())
        nn.init.ones_(self.D)
        nn.init.uniform_(self.x_proj_weight, -channels ** -0.5, channels ** -0.5)
        nn.init.uniform_(self.dt_proj_weight, -rank ** -0.5, rank ** -0.5)

    def weights(self) -> SSMWeights:
        return SSMWeights(self.x_proj_weight, self.dt_proj_weight, self.dt_proj_bias, self.A_log, self.D)

    def forward(self, x: Tensor, tables: ScanTables, in_scan_order: bool = False) -> Tensor:
        """See :func:`project_and_scan`."""
        return project_and_scan(x, self.weights(), tables, in_scan_order)
