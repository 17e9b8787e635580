"""The modules of ``mamba_ssm`` 1.x and 2.x and of its forks (Vim, VideoMamba, SegMamba), with their parameters' names.
Import them from :mod:`mmlocalmamba.ops.stand_ins`.

With the same seed, a layer has the same initial weights as in those packages.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmlocalmamba.ops import linear
from mmlocalmamba.ops.dispatch import compute_dtype
from mmlocalmamba.ops.stand_ins.causal_conv1d import causal_conv1d_update
from mmlocalmamba.ops.stand_ins.layer_norm import RMSNorm, layer_norm_fn
from mmlocalmamba.ops.stand_ins.mamba_ssm import inner_scan, selective_state_update

# bimamba_type -> suffixes of the names of the parameters of each further direction
_DIRECTIONS = {'none': (), 'v1': (), 'v2': ('_b', ), 'v3': ('_b', '_s')}


@dataclass
class InferenceParams:
    """What a model keeps between the steps of a generation: each layer's states by ``layer_idx``."""
    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Start a new sequence. The states stay, since the first step overwrites them."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


class Mamba(nn.Module):
    """A Mamba layer: (B, L, C) -> (B, L, C).

    Args:
        d_model: C.
        d_state: States per channel, N.
        d_conv: Taps of the causal convolution.
        expand: The inner width D is ``expand * d_model``.
        dt_rank: Rank of the step sizes, or 'auto': d_model / 16, rounded up.
        dt_min, dt_max, dt_init, dt_scale, dt_init_floor: Initial step sizes; ``dt_init`` is 'random' or 'constant'.
        conv_bias: The convolution has a bias.
        bias: The first and the last projection have a bias.
        use_fast_path: Accepted and ignored: there is one path.
        layer_idx: The key of this layer's states in ``inference_params``.
        device, dtype: Of the parameters.
        bimamba_type: 'none'; Vim's 'v1' (two directions that share all but A) and 'v2' (two directions with parameters
            of their own); SegMamba's 'v3' (a third direction across slices).
        if_divide_out: Vim's: the outputs of 'v2' are averaged instead of summed.
        init_layer_scale: Vim's: initial value of a factor for each channel of the output, or None.
        nslices: SegMamba's: the third direction reads the first step of each of so many slices, then the second ...
        bimamba: VideoMamba's: True is 'v2'. Its own default is True; here it is None, so that the layers of mamba_ssm
            are as they are there. VideoMamba's networks pass it.

    Raises:
        ValueError: ``bimamba_type`` is unknown.
        NotImplementedError: ``dt_init`` is unknown.
    """

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: float = 2,
                 dt_rank: int | str = 'auto', dt_min: float = 0.001, dt_max: float = 0.1, dt_init: str = 'random',
                 dt_scale: float = 1.0, dt_init_floor: float = 1e-4, conv_bias: bool = True, bias: bool = False,
                 use_fast_path: bool = True, layer_idx: int | None = None, device: Any = None, dtype: Any = None,
                 bimamba_type: str = 'none', if_divide_out: bool = False, init_layer_scale: float | None = None,
                 nslices: int = 5, bimamba: bool | None = None) -> None:
        super().__init__()
        if bimamba:
            bimamba_type = 'v2'
        if bimamba_type not in _DIRECTIONS:
            raise ValueError(f'unknown bimamba_type {bimamba_type!r}: known are {", ".join(_DIRECTIONS)}')
        factory: dict[str, Any] = dict(device=device, dtype=dtype)
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.bimamba_type, self.if_divide_out, self.nslices = bimamba_type, if_divide_out, nslices
        self.init_layer_scale = init_layer_scale
        self.activation, self.act = 'silu', nn.SiLU()
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(init_layer_scale * torch.ones(d_model))

        # Parameters are made in the order of the packages, so that a seed gives the same values.
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        self._add_direction('', conv_bias, factory)
        deviation = self.dt_rank ** -0.5 * dt_scale
        if dt_init == 'random':
            nn.init.uniform_(self.dt_proj.weight, -deviation, deviation)
        elif dt_init == 'constant':
            nn.init.constant_(self.dt_proj.weight, deviation)
        else:
            raise NotImplementedError(f"dt_init must be 'random' or 'constant', got {dt_init!r}")
        low, high = math.log(dt_min), math.log(dt_max)
        dt = torch.exp(torch.rand(self.d_inner, **factory) * (high - low) + low).clamp(min=dt_init_floor)
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        self.dt_proj.bias._no_reinit = True
        if bimamba_type == 'v1':
            self._add_states('_b', device, skip=False)
        for suffix in _DIRECTIONS[bimamba_type]:
            self._add_direction(suffix, conv_bias, factory)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    def _add_states(self, suffix: str, device: Any, skip: bool = True) -> None:
        """Add A and D of a direction, which have 32 bits."""
        A = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=device).repeat(self.d_inner, 1)
        parameters = {f'A{suffix}_log': A.log()}
        if skip:
            parameters[f'D{suffix}'] = torch.ones(self.d_inner, device=device)
        for name, value in parameters.items():
            parameter = nn.Parameter(value)
            parameter._no_weight_decay = True
            self.register_parameter(name, parameter)

    def _add_direction(self, suffix: str, conv_bias: bool, factory: dict[str, Any]) -> None:
        width, rank = self.d_inner, self.dt_rank
        self._add_states(suffix, factory['device'])
        self.add_module(f'conv1d{suffix}', nn.Conv1d(width, width, self.d_conv, groups=width, padding=self.d_conv - 1,
                                                     bias=conv_bias, **factory))
        self.add_module(f'x_proj{suffix}', nn.Linear(width, rank + 2 * self.d_state, bias=False, **factory))
        self.add_module(f'dt_proj{suffix}', nn.Linear(rank, width, **factory))

    def _A(self, suffix: str = '') -> Tensor:
        A_log = getattr(self, f'A{suffix}_log')
        return -torch.exp(A_log.to(compute_dtype(A_log)))

    def _scan(self, xz: Tensor, suffix: str = '', A_b: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the outputs (B, D, L) of a direction and its last states (B, D, N)."""
        conv, x_proj, dt_proj = (getattr(self, f'{name}{suffix}') for name in ('conv1d', 'x_proj', 'dt_proj'))
        return inner_scan(xz, conv.weight, conv.bias, x_proj.weight, dt_proj.weight, self._A(suffix),
                          D=getattr(self, f'D{suffix}'), delta_bias=dt_proj.bias, A_b=A_b)

    def forward(self, hidden_states: Tensor, inference_params: Any = None, T: int = 1) -> Tensor:
        """Run the layer.

        Args:
            hidden_states: (B, L, C).
            inference_params: An object with ``seqlen_offset`` and ``key_value_memory_dict``, or None. With offset 0 the
                layer's states are written there; otherwise L is 1 and :meth:`step` continues from them.
            T: VideoMamba's number of frames. It is not used, as there.

        Raises:
            ValueError: L is no multiple of ``nslices`` ('v3').
            NotImplementedError: ``inference_params`` is given and the layer has several directions.
        """
        if inference_params is not None and self.bimamba_type != 'none':
            raise NotImplementedError(f'a layer with bimamba_type={self.bimamba_type!r} reads the whole sequence and '
                                      'cannot continue it step by step: inference_params must be None')
        length = hidden_states.shape[1]
        states: tuple[Tensor, Tensor] | None = None
        if inference_params is not None:
            states = self._get_states_from_cache(inference_params, hidden_states.shape[0])
            if inference_params.seqlen_offset > 0:
                return self.step(hidden_states, *states)[0]
        xz = linear(hidden_states, self.in_proj.weight, self.in_proj.bias).transpose(1, 2)
        y, last = self._scan(xz, A_b=self._A('_b') if self.bimamba_type == 'v1' else None)
        if states is not None:
            conv_state, ssm_state = states
            conv_state.copy_(F.pad(xz[:, :self.d_inner], (self.d_conv - length, 0)))
            ssm_state.copy_(last)
        if self.bimamba_type in ('v2', 'v3'):
            y = y + self._scan(xz.flip(-1), '_b')[0].flip(-1)
        if self.bimamba_type == 'v3':
            if length % self.nslices:
                raise ValueError(f'{length} tokens cannot be split into {self.nslices} slices')
            across = xz.unflatten(-1, (self.nslices, -1)).mT.flatten(-2)
            y = y + self._scan(across, '_s')[0].unflatten(-1, (-1, self.nslices)).mT.flatten(-2)
        if self.bimamba_type == 'v2' and self.if_divide_out:
            y = y / 2
        out = linear(y.transpose(1, 2), self.out_proj.weight, self.out_proj.bias)
        return out if self.init_layer_scale is None else out * self.gamma

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Continue the sequence by one token.

        Args:
            hidden_states: (B, 1, C).
            conv_state: (B, D, d_conv), the last inputs of the convolution. It is updated in place.
            ssm_state: (B, D, N). It is updated in place.

        Returns:
            The output (B, 1, C) and both states.
        """
        if hidden_states.shape[1] != 1:
            raise ValueError(f'step takes one token at a time, got {hidden_states.shape[1]}')
        x, z = self.in_proj(hidden_states[:, 0]).chunk(2, dim=-1)
        x = causal_conv1d_update(x, conv_state, self.conv1d.weight[:, 0], self.conv1d.bias, self.activation)
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = selective_state_update(ssm_state, x, F.linear(dt, self.dt_proj.weight), self._A(), B, C, self.D, z,
                                   self.dt_proj.bias, dt_softplus=True)
        return self.out_proj(y)[:, None], conv_state, ssm_state

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: Any = None,
                                 **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the states of a batch before its first token: zeros (B, D, d_conv) and (B, D, N)."""
        conv, dt = self.conv1d.weight, self.dt_proj.weight
        return (conv.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype or conv.dtype),
                dt.new_zeros(batch_size, self.d_inner, self.d_state, dtype=dtype or dt.dtype))

    def _get_states_from_cache(self, inference_params: Any, batch_size: int,
                               initialize_states: bool = False) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise ValueError('layer_idx must be given to a layer that is used with inference_params')
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        elif initialize_states:
            for state in cache[self.layer_idx]:
                state.zero_()
        return cache[self.layer_idx]


class Block(nn.Module):
    """A layer with its norm, before which the residual stream is added up, as in mamba_ssm 2.x.

    Args:
        dim: C.
        mixer_cls, mlp_cls, norm_cls: Called with ``dim``. ``mlp_cls`` is ``nn.Identity`` for a block without MLP.
        fused_add_norm: Sum and norm are one operation. The norm must be LayerNorm or RMSNorm then.
        residual_in_fp32: The residual stream has 32 bits at least.
    """

    def __init__(self, dim: int, mixer_cls: Callable[..., nn.Module], mlp_cls: Callable[..., nn.Module],
                 norm_cls: Callable[..., nn.Module] = nn.LayerNorm, fused_add_norm: bool = False,
                 residual_in_fp32: bool = False) -> None:
        super().__init__()
        self.residual_in_fp32, self.fused_add_norm = residual_in_fp32, fused_add_norm
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        self.mlp: nn.Module | None = None
        if mlp_cls is not nn.Identity:
            self.norm2 = norm_cls(dim)
            self.mlp = mlp_cls(dim)
        if fused_add_norm and not isinstance(self.norm, nn.LayerNorm | RMSNorm):
            raise TypeError(f'fused_add_norm needs LayerNorm or RMSNorm, got {type(self.norm).__name__}')

    def _add_norm(self, norm: Any, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.fused_add_norm:
            return layer_norm_fn(hidden_states, norm.weight, norm.bias, residual=residual, prenorm=True, eps=norm.eps,
                                 residual_in_fp32=self.residual_in_fp32, is_rms_norm=isinstance(norm, RMSNorm))
        residual = hidden_states if residual is None else hidden_states + residual
        hidden_states = norm(residual.to(norm.weight.dtype))
        return hidden_states, residual.to(compute_dtype(residual)) if self.residual_in_fp32 else residual

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None, inference_params: Any = None,
                **mixer_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Run the block: hidden_states and residual (B, L, C) -> the mixer's or MLP's output, and the residual stream
        before it is added. The first block has no residual."""
        hidden_states, residual = self._add_norm(self.norm, hidden_states, residual)
        hidden_states = self.mixer(hidden_states, inference_params=inference_params, **mixer_kwargs)
        if self.mlp is not None:
            hidden_states, residual = self._add_norm(self.norm2, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: Any = None, **kwargs: Any) -> Any:
        """Return the mixer's states."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)


class BlockV1(Block):
    """The block of mamba_ssm 1.x (``mamba_ssm.modules.mamba_simple.Block``), which has no MLP."""

    def __init__(self, dim: int, mixer_cls: Callable[..., nn.Module], norm_cls: Callable[..., nn.Module] = nn.LayerNorm,
                 fused_add_norm: bool = False, residual_in_fp32: bool = False) -> None:
        super().__init__(dim, mixer_cls, nn.Identity, norm_cls, fused_add_norm, residual_in_fp32)
        self.norm = self._modules.pop('norm')  # behind the mixer: optimizers number parameters in this order


class GenerationMixin:
    """A name for models that inherit it. Text is not generated here."""

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: Any = None, **kwargs: Any) -> Any:
        raise NotImplementedError

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Raise NotImplementedError."""
        raise NotImplementedError('mmlocalmamba stands in for mamba_ssm and generates no text: install mamba_ssm')


def load_config_hf(model_name: str) -> Any:
    """Raise NotImplementedError."""
    raise NotImplementedError('mmlocalmamba stands in for mamba_ssm and downloads nothing: download config.json of '
                              f'{model_name} and read it with json.load')


def load_state_dict_hf(model_name: str, device: Any = None, dtype: Any = None) -> Any:
    """Raise NotImplementedError."""
    raise NotImplementedError('mmlocalmamba stands in for mamba_ssm and downloads nothing: download the weights of '
                              f'{model_name} and read them with torch.load')
