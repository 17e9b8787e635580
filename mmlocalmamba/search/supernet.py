"""The supernet of the direction search: mixers that scan along all candidates and weigh them (paper eq. 5).

Two samplings scan only a part in each step.
"""
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmlocalmamba.directions import CANDIDATES, ScanTables
from mmlocalmamba.layers import LocalVimMixer, LocalVMambaMixer, SCAttn
from mmlocalmamba.layers.ssm import SSMWeights, project_and_scan
from mmlocalmamba.ops import directional_conv

SAMPLINGS = ('full', 'single_path', 'partial_channel')


def inclusion_probabilities(probabilities: Tensor, samples: int) -> Tensor:
    """Return the probability that each direction is among ``samples`` different ones.

    Directions are drawn as proportionally to ``probabilities`` (K,) as possible: min(1, c * p), with the c that makes
    the result (K,) float64 sum to ``samples``.
    """
    p, order = probabilities.double().sort(descending=True)
    certain = torch.arange(samples, device=p.device)  # how many of the likeliest are always drawn
    scale = (samples - certain) / p.flip(0).cumsum(0).flip(0)[:samples]
    first = (scale * p[:samples] <= 1 + 1e-9).int().argmax()
    included = (scale[first[None]] * p).clamp(max=1)
    included = included.masked_fill(torch.arange(len(p), device=p.device) < first, 1)
    return torch.empty_like(included).scatter(0, order, included)


def systematic_sample(included: Tensor, samples: int, order: Tensor, start: Tensor) -> Tensor:
    """Draw ``samples`` different directions, direction k with probability ``included[k]``.

    Directions lie side by side on a line, in ``order``, each as long as its probability. The points start, start + 1,
    ... fall on the directions that are drawn.

    Args:
        included: (K,), sums to ``samples``, none above 1.
        samples: number of directions.
        order: a permutation of the directions. With a random one all sets of directions can occur.
        start: uniform in [0, 1).
    """
    points = start + torch.arange(samples, device=included.device)
    places = torch.searchsorted(included[order].cumsum(0), points, right=True)
    return order[places.clamp(max=len(order) - 1)]


class Selection(NamedTuple):
    """The part of a mixer that one step of the search scans.

    Attributes:
        weights: (k,) of the scanned directions' features in their sum.
        directions: int64 (k,), indices of the scanned directions; None: all.
        channels: int64 (c,), sorted indices of the scanned inner channels; None: all.
    """
    weights: Tensor
    directions: Tensor | None = None
    channels: Tensor | None = None

    def pick(self, x: Tensor) -> Tensor:
        """Select the scanned part of x (K, D, ...): (k, c, ...)."""
        return _pick(_pick(x, 0, self.directions), 1, self.channels)


def _pick(x: Tensor, dim: int, index: Tensor | None) -> Tensor:
    return x if index is None else x.index_select(dim, index)


class MixedScan(nn.Module):
    """Sum of all candidates' features, weighted by the softmax of learnable logits.

    Each branch passes a LayerNorm without affine first, as in the authors' code, so that no branch wins by its scale.

    In training, ``sampling`` decides which part a step scans. Evaluation always scans everything.

    - 'full': all K directions (the authors').
    - 'single_path': ``samples`` of them, drawn without replacement with probabilities pi_k that are proportional to
      the softmax p_k (capped at 1). Features are weighted by p_k / pi_k with pi_k held constant, the Horvitz-Thompson
      estimator: output and its gradient are those of 'full' in expectation over the draws, for each block given its
      input. Memory and time of the scans fall to samples / K.
    - 'partial_channel': all K directions on a random 1 / ``reduction`` of the channels, as PC-DARTS does. The other
      channels are not scanned. Memory and time of the scans fall to 1 / reduction. It is another function than 'full'.

    All randomness comes from torch's generator of the device.

    Args:
        candidates: number of directions K.
        sampling: one of SAMPLINGS.
        samples: directions a step with 'single_path'.
        reduction: with 'partial_channel'.

    Raises:
        ValueError: an unknown sampling, more samples than candidates, a reduction below 1.
    """

    def __init__(self, candidates: int, sampling: str = 'full', samples: int = 1, reduction: int = 4) -> None:
        super().__init__()
        if sampling not in SAMPLINGS:
            raise ValueError(f'sampling must be one of {SAMPLINGS}, got {sampling!r}')
        if not 1 <= samples <= candidates:
            raise ValueError(f'samples must be 1 to {candidates}, the number of candidates, got {samples}')
        if reduction < 1:
            raise ValueError(f'reduction must be at least 1, got {reduction}')
        self.sampling, self.samples, self.reduction = sampling, samples, reduction
        self.alphas = nn.Parameter(torch.empty(candidates))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.alphas, std=1e-3)

    def probabilities(self) -> Tensor:
        """Return the softmax (K,) of the logits, in float32 at least."""
        return self.alphas.to(torch.promote_types(self.alphas.dtype, torch.float32)).softmax(0)

    def select(self, channels: int) -> Selection:
        """Choose the directions and channels that this step scans.

        Args:
            channels: inner channels of the mixer.

        Raises:
            ValueError: 'partial_channel' leaves no channel.
        """
        p = self.probabilities()
        if not self.training or self.sampling == 'full':
            return Selection(p)
        if self.sampling == 'partial_channel':
            if channels < self.reduction:
                raise ValueError(f'partial_channel: reduction={self.reduction} leaves none of {channels} channels')
            drawn = torch.randperm(channels, device=p.device)[:channels // self.reduction]
            return Selection(p, channels=drawn.sort().values)
        included = inclusion_probabilities(p.detach(), self.samples)
        drawn = systematic_sample(included, self.samples, torch.randperm(len(p), device=p.device),
                                  torch.rand((), dtype=torch.float64, device=p.device))
        return Selection(p[drawn] / included[drawn].to(p.dtype), directions=drawn)

    def forward(self, y: Tensor, weights: Tensor) -> Tensor:
        """Sum features y (B, k, L, D) of the scanned directions, weighted by ``weights`` (k,): (B, L, D)."""
        return torch.einsum('bkld,k->bld', F.layer_norm(y, y.shape[-1:]), weights.to(y.dtype))

    def extra_repr(self) -> str:
        option = {'single_path': f', samples={self.samples}', 'partial_channel': f', reduction={self.reduction}'}
        return f'candidates={len(self.alphas)}, sampling={self.sampling}{option.get(self.sampling, "")}'


def _gate(scattn: SCAttn, x: Tensor, channels: Tensor) -> Tensor:
    """Compute :meth:`SCAttn.gate` for x (..., L, c), which holds ``channels`` (c,) alone.

    Sums over channels are scaled by C / c.
    """
    norm_weight, norm_bias, bias = (x.index_select(0, channels) for x in (
        scattn.norm.weight, scattn.norm.bias, scattn.channel_select.bias))

    def reduce(x: Tensor, linear: nn.Linear) -> Tensor:
        scale = linear.in_features / len(channels)
        return F.gelu(F.linear(x, linear.weight.index_select(1, channels) * scale, linear.bias))

    x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, scattn.norm.eps)
    x_global = reduce(x.mean(-2, keepdim=True), scattn.global_reduce)
    gate = F.linear(x_global, scattn.channel_select.weight.index_select(0, channels), bias).sigmoid()
    if scattn.spatial_select is None:
        return gate
    x_local = reduce(x, scattn.local_reduce)
    return gate * scattn.spatial_select(torch.cat([x_local, x_global.expand_as(x_local)], dim=-1)).sigmoid()


class _RelaxedMixer(nn.Module):
    """Base class of both mixers of a supernet; it comes before LocalVMambaMixer or LocalVimMixer.

    Args:
        mixed_scan: arguments of MixedScan, without ``candidates``.
    """

    def __init__(self, *args: Any, mixed_scan: Mapping, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mixed_scan = MixedScan(len(self.directions), **mixed_scan)

    def _scan_selected(self, x: Tensor, weights: SSMWeights, tables: ScanTables,
                       selection: Selection) -> tuple[Tensor, Tensor]:
        """Return features (B, k, L, c), and (B, L, D) whose channels stand for those that are not scanned."""
        raise NotImplementedError

    def scan_and_sum(self, x: Tensor, tables: ScanTables, z: Tensor | None = None) -> Tensor:
        selection = self.mixed_scan.select(self.out_proj.in_features)
        weights, channels = self.ssm.weights(), selection.channels
        # x_proj's input channels come last. The sum over a part of them is scaled up to stand for all.
        x_proj = _pick(_pick(weights.x_proj, 0, selection.directions), 2, channels)
        if channels is not None:
            x_proj = x_proj * (weights.x_proj.shape[2] / len(channels))
        weights = SSMWeights(x_proj, *map(selection.pick, weights[1:]))
        tables = ScanTables(*(_pick(table, 0, selection.directions) for table in tables))
        y, rest = self._scan_selected(x, weights, tables, selection)
        gate = None if z is None else F.silu(z)
        if gate is not None:
            y = y * _pick(gate, -1, channels)[:, None]
        if self.scattn is not None:
            y = self.scattn(y) if channels is None else y * _gate(self.scattn, y, channels)
        y = self.mixed_scan(y, selection.weights)
        if channels is None:
            return y
        # Channels that were not scanned are normalised like a branch.
        rest = rest if gate is None else rest * gate
        return F.layer_norm(rest, rest.shape[-1:]).to(y.dtype).index_copy(-1, channels, y)


class RelaxedLocalVMambaMixer(_RelaxedMixer, LocalVMambaMixer):
    """LocalVMambaMixer of a supernet."""

    def summands(self, x: Tensor, tables: ScanTables) -> Tensor:
        return self.scan_and_sum(x, tables)[:, None]

    def _scan_selected(self, x: Tensor, weights: SSMWeights, tables: ScanTables,
                       selection: Selection) -> tuple[Tensor, Tensor]:
        return project_and_scan(_pick(x, -1, selection.channels), weights, tables), x


class RelaxedLocalVimMixer(_RelaxedMixer, LocalVimMixer):
    """LocalVimMixer of a supernet."""

    def _scan_selected(self, x: Tensor, weights: SSMWeights, tables: ScanTables,
                       selection: Selection) -> tuple[Tensor, Tensor]:
        weight, bias = map(selection.pick, (self.conv_weight, self.conv_bias))
        scanned = directional_conv(_pick(x, -1, selection.channels), weight, bias, tables)
        return project_and_scan(scanned, weights, tables, in_scan_order=True), F.silu(x)


_RELAXED = {LocalVMambaMixer: RelaxedLocalVMambaMixer, LocalVimMixer: RelaxedLocalVimMixer}


def relax(mixer: type[nn.Module], candidates: Sequence[str] = CANDIDATES,
          **options: Any) -> tuple[list[str], type[nn.Module], dict[str, Any]]:
    """Return what a backbone with ``directions='search'`` builds its blocks of.

    Args:
        mixer: class of the mixers that the backbone has otherwise.
        candidates: scan names to choose from.
        options: ``sampling``, ``samples`` and ``reduction`` of :class:`MixedScan`.

    Returns:
        Scan names of every block, class of the mixers, further arguments of the mixers.

    Raises:
        ValueError: an option is unknown, or ``candidates`` is not a list of different names.
    """
    unknown = sorted(set(options) - {'sampling', 'samples', 'reduction'})
    if unknown:
        raise ValueError(f'a direction search has no options {", ".join(unknown)}: it takes candidates, sampling, '
                         'samples and reduction')
    if not isinstance(candidates, (list, tuple)) or not candidates or len(set(candidates)) != len(candidates):
        raise ValueError(f'candidates of a search must be a list of different scan names, got {candidates!r}')
    return list(candidates), _RELAXED[mixer], dict(mixed_scan=options)
