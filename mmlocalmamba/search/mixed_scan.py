"""The relaxed choice of scan directions (paper eq. 5), and the two ways to pay for less than all of it."""
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmlocalmamba.layers.mixers import Selection

# The paper's search space, in the authors' order.
CANDIDATES = ('h', 'h_flip', 'v', 'v_flip', 'w2', 'w2_flip', 'w7', 'w7_flip')
SAMPLINGS = ('full', 'single_path', 'partial_channel')


def inclusion_probabilities(probabilities: Tensor, samples: int) -> Tensor:
    """How often each direction is among ``samples`` different ones, drawn as proportionally to ``probabilities`` as
    possible: min(1, c * p), with the c that makes them sum to ``samples``."""
    p, order = probabilities.double().sort(descending=True)
    certain = torch.arange(samples, device=p.device)  # how many of the likeliest are always drawn
    scale = (samples - certain) / p.flip(0).cumsum(0).flip(0)[:samples]
    first = (scale * p[:samples] <= 1 + 1e-9).int().argmax()
    included = (scale[first[None]] * p).clamp(max=1)
    included = included.masked_fill(torch.arange(len(p), device=p.device) < first, 1)
    return torch.empty_like(included).scatter(0, order, included)


def systematic_sample(included: Tensor, samples: int, order: Tensor, start: Tensor) -> Tensor:
    """``samples`` different directions, direction k with probability ``included[k]``.

    Directions lie side by side on a line, in ``order``, each as long as its probability; the points start, start + 1,
    ... fall on those that are drawn.

    Args:
        included: (K,), sums to ``samples``, none above 1.
        order: a permutation of the directions; a random one lets all sets of directions occur.
        start: uniform in [0, 1).
    """
    points = start + torch.arange(samples, device=included.device)
    places = torch.searchsorted(included[order].cumsum(0), points, right=True)
    return order[places.clamp(max=len(order) - 1)]


class MixedScan(nn.Module):
    """Sum of all candidates' features, weighted by the softmax of learnable logits.

    Each branch passes a LayerNorm without affine first, as in the authors' code, so that no branch wins by its scale.

    In training, ``sampling`` says what a step scans; evaluation always scans everything.

    - 'full': all K directions (the authors').
    - 'single_path': ``samples`` of them, drawn without replacement with probabilities pi_k that are proportional to
      the softmax p_k (capped at 1). Features are weighted by p_k / pi_k with pi_k held constant, the Horvitz-Thompson
      estimator: output and its gradient are those of 'full' in expectation over the draws, for each block given its
      input. Memory and time of the scans fall to samples / K.
    - 'partial_channel': all K directions on a random 1 / ``reduction`` of the channels, as PC-DARTS does; the others
      pass the scans by. Memory and time of the scans fall to 1 / reduction. Not the same function as 'full'.

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
        self.alphas = nn.Parameter(1e-3 * torch.randn(candidates))

    def probabilities(self) -> Tensor:
        """Softmax of the logits, in float32 at least."""
        return self.alphas.to(torch.promote_types(self.alphas.dtype, torch.float32)).softmax(0)

    def select(self, channels: int) -> Selection:
        """What this step scans, out of all directions and ``channels`` channels."""
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

    def forward(self, y: Tensor, weights: Tensor | None = None) -> Tensor:
        """y (B, k, L, D) of the scanned directions and their weights (k,), by default the softmax -> (B, L, D)."""
        weights = self.probabilities() if weights is None else weights
        return torch.einsum('bkld,k->bld', F.layer_norm(y, y.shape[-1:]), weights.to(y.dtype))

    def extra_repr(self) -> str:
        option = {'single_path': f', samples={self.samples}', 'partial_channel': f', reduction={self.reduction}'}
        return f'candidates={len(self.alphas)}, sampling={self.sampling}{option.get(self.sampling, "")}'
