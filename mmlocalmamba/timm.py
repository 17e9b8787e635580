"""The backbones as models of timm. The import registers all names of :func:`mmlocalmamba.list_models`.

Names of weights are those of mmpretrain's classifiers and of :func:`mmlocalmamba.create_model`: ``backbone.*``,
``head.fc.*``. So a state dict moves between timm, this package and OpenMMLab as it is.

Models do everything that timm asks of one except for TorchScript: ``features_only``, layer decay,
``set_grad_checkpointing``, ``forward_intermediates`` and the others.
"""
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, global_pool_nlc
from timm.models import (
    DefaultCfg,
    PretrainedCfg,
    build_model_with_cfg,
    load_pretrained,
    register_model,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from mmlocalmamba import models
from mmlocalmamba.backbones import LocalVim, LocalVMamba
from mmlocalmamba.files import SCHEME
from mmlocalmamba.weights.loading import adapted, fit, load_checkpoint, read, weights_for
from mmlocalmamba.weights.released import NAMED, Weights

__all__: list[str] = []  # timm adds the names of the models
# Parameters that are not decayed, although they have more than one axis: OpenMMLab's configurations name the same.
_NO_DECAY = ('A_log', 'D', 'dt_proj_bias', 'conv_bias', 'pos_embed', 'cls_token')


def _as_map(tokens: Tensor, size: tuple[int, int], output_fmt: str) -> Tensor:
    """Return tokens (B, h*w, C) as a map (B, C, h, w), or (B, h, w, C) for 'NHWC'."""
    x = tokens.unflatten(1, size)
    return x if output_fmt == 'NHWC' else x.permute(0, 3, 1, 2).contiguous()


class _Model(nn.Module):
    """What both families share.

    Args:
        backbone: one of our backbones.
        num_classes: 0 leaves the classifier out.
        global_pool: kind of timm's pooling; '' returns what is pooled otherwise.
        drop_rate: dropout before the classifier.
    """
    output_fmt = 'NCHW'
    num_prefix_tokens = 0

    def __init__(self, backbone: Any, num_classes: int, global_pool: str, drop_rate: float) -> None:
        super().__init__()
        self.num_classes, self.drop_rate = num_classes, drop_rate
        self.backbone = backbone
        self.num_features = self.head_hidden_size = backbone.out_channels[-1]
        self.feature_info = self._describe()
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)

    def _describe(self) -> list[dict[str, Any]]:
        """Return channels, stride and name of every stage or block, for timm's ``feature_info``."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> the last map after its norm (B, C, h, w)."""
        return self.backbone(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Output of :meth:`forward_features` -> logits (B, num_classes); with ``pre_logits`` pooled features (B, C)."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that are not decayed. timm leaves out those of one axis, too."""
        return {name for name, _ in self.named_parameters() if name.rpartition('.')[2] in _NO_DECAY}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any] | Callable[[str], tuple[int]]:
        """Return how timm's layer decay groups parameters: by the depths of OpenMMLab's; ``coarse``: by stages."""
        if coarse:
            return dict(stem=r'^backbone\.(?:patch_embed|pos_embed|cls_token)', blocks=[
                (r'^backbone\.(?:stages|layers)\.(\d+)', None), (r'^backbone\.norm', (99999, ))])
        prefix = 'backbone.'

        def depth(name: str) -> tuple[int]:
            own, count = self.backbone.get_layer_depth(name, prefix)
            return (own if name.startswith(prefix) else count, )

        return depth

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass, or stop to."""
        for module in self.backbone.modules():
            if hasattr(module, 'with_cp'):
                module.with_cp = enable

    def get_classifier(self) -> nn.Module:
        """Return the linear layer, or an nn.Identity if there is none."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one, 0 classes by none; ``global_pool`` changes the pooling as well."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def load_pretrained(self, checkpoint: str) -> None:
        """Load a file, URL or ``mmlocalmamba://NAME``, of this package or of the authors.

        Other input channels and another number of classes are treated as timm treats them.

        Raises:
            RuntimeError: the weights are of another backbone or for other scan directions.
        """
        cfg = {**self.pretrained_cfg, 'url': '', 'file': None, 'hf_hub_id': None, 'custom_load': False,
               'state_dict': _converted(load_checkpoint(checkpoint), self, checkpoint)}
        load_pretrained(self, cfg, self.num_classes, self.backbone.patch_embed.projection.in_channels)

    def _cut(self, indices: int | Sequence[int], name: str, prune_norm: bool, prune_head: bool) -> list[int]:
        """Remove the stages or blocks after the last of ``indices`` from the backbone's list ``name``."""
        backbone = self.backbone
        taken, last = feature_take_indices(len(self.feature_info), indices)
        setattr(backbone, name, getattr(backbone, name)[:last + 1])
        self.num_features = self.head_hidden_size = self.feature_info[last]['num_chs']
        backbone.out_indices, backbone.out_channels = (last, ), [self.num_features]
        backbone.out_strides = [self.feature_info[last]['reduction']]
        self._after_cut(last, prune_norm)
        if prune_head:
            self.head.in_features = self.num_features
            self.reset_classifier(0, '')
        return taken

    def _after_cut(self, last: int, prune_norm: bool) -> None:
        raise NotImplementedError


class TimmLocalVMamba(_Model):
    """LocalVMamba or VMamba.

    Args:
        in_chans: channels of the image.
        output_stride: 32 alone.
        options: arguments of :class:`mmlocalmamba.LocalVMamba`.
        num_classes, global_pool, drop_rate: see timm.

    Raises:
        ValueError: another ``output_stride``, or as LocalVMamba.
    """

    def __init__(self, num_classes: int = 1000, in_chans: int = 3, global_pool: str = 'avg', drop_rate: float = 0.,
                 output_stride: int = 32, **options: Any) -> None:
        if output_stride != 32:
            raise ValueError(f'output_stride={output_stride}: strides of LocalVMamba are 4, 8, 16 and 32 and cannot be '
                             'changed')
        super().__init__(LocalVMamba(in_channels=in_chans, **options), num_classes, global_pool, drop_rate)

    def _describe(self) -> list[dict[str, Any]]:
        stride = self.backbone.patch_size
        return [dict(num_chs=channels, reduction=stride * 2 ** index, module=f'backbone.stages.{index}')
                for index, channels in enumerate(self.backbone.embed_dims)]

    def forward_intermediates(self, x: Tensor, indices: int | Sequence[int] | None = None, norm: bool = False,
                              stop_early: bool = False, output_fmt: str = 'NCHW',
                              intermediates_only: bool = False) -> Any:
        """Return the maps of stages before their norm, and the output of :meth:`forward_features` before them.

        Args:
            x: images (B, in_chans, H, W).
            indices: stages, a number of last stages, or None for all.
            norm: give the last stage its norm.
            stop_early: leave out stages after the last of ``indices``; the first output is then its map.
            output_fmt: 'NCHW' or 'NHWC'.
            intermediates_only: return the maps alone.
        """
        backbone = self.backbone
        taken, last = feature_take_indices(len(backbone.stages), indices)
        final, maps = len(backbone.stages) - 1, []
        for index, (tokens, size) in enumerate(backbone.stage_tokens(x)):
            normed = getattr(backbone, f'norm{index}')(tokens) if index == final else tokens
            if index in taken:
                maps.append(_as_map(normed if norm else tokens, size, output_fmt))
            if index == last and (stop_early or intermediates_only):
                break
        return maps if intermediates_only else (_as_map(normed, size, 'NCHW'), maps)

    def prune_intermediate_layers(self, indices: int | Sequence[int] = 1, prune_norm: bool = False,
                                  prune_head: bool = True) -> list[int]:
        """Remove the stages after the last of ``indices``, and return ``indices`` as a list of stages."""
        return self._cut(indices, 'stages', prune_norm, prune_head)

    def _after_cut(self, last: int, prune_norm: bool) -> None:
        backbone = self.backbone
        backbone.depths, backbone.embed_dims = backbone.depths[:last + 1], backbone.embed_dims[:last + 1]
        backbone.directions = backbone.directions[:sum(backbone.depths)]
        backbone.stages[-1].downsample = None
        if prune_norm or not hasattr(backbone, f'norm{last}'):
            for index in range(len(self.feature_info)):
                backbone._modules.pop(f'norm{index}', None)
            setattr(backbone, f'norm{last}', nn.Identity())


class LocalVimTokens(LocalVim):
    """LocalVim that returns its last tokens after their norm and before they are pooled: a map (B, C, h, w), or with a
    class token tokens (B, 1 + h*w, C), the class token first."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        *_, (x, residual, size) = self.block_tokens(x)
        return (self.finish(x, residual, size), )

    def finish(self, x: Tensor, residual: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the output from the last block's output and residual stream."""
        x = self.norm(residual + self.drop_path(x))
        return torch.cat(self.split(x, size), 1) if self.num_cls_tokens else _as_map(x, size, 'NCHW')

    def split(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return the class token (B, 0 or 1, C) and the other tokens (B, h*w, C)."""
        middle = size[0] * size[1] // 2
        end = middle + self.num_cls_tokens
        return x[:, middle:end], torch.cat([x[:, :middle], x[:, end:]], 1) if self.num_cls_tokens else x


class TimmLocalVim(_Model):
    """LocalVim or Vim.

    Args:
        in_chans: channels of the image.
        global_pool: None for the class token of a Vim and the mean over the tokens of a LocalVim.
        options: arguments of :class:`mmlocalmamba.LocalVim`, such as ``img_size``.
        num_classes, drop_rate: see timm.
    """

    def __init__(self, num_classes: int = 1000, in_chans: int = 3, global_pool: str | None = None,
                 drop_rate: float = 0., out_type: str = 'avg_featmap', **options: Any) -> None:
        pool = ('token' if out_type == 'cls_token' else 'avg') if global_pool is None else global_pool
        # A token is pooled here, not by timm's head for maps.
        super().__init__(LocalVimTokens(in_channels=in_chans, out_type=out_type, **options), num_classes,
                         '' if options.get('cls_token', 'none') != 'none' else pool, drop_rate)
        self.global_pool = pool
        self.num_prefix_tokens = self.backbone.num_cls_tokens
        if self.num_prefix_tokens:
            self.output_fmt = 'NLC'

    def _describe(self) -> list[dict[str, Any]]:
        backbone = self.backbone
        return [dict(num_chs=backbone.embed_dims, reduction=backbone.stride, module=f'backbone.layers.{index}')
                for index in range(len(backbone.layers))]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Output of :meth:`forward_features` -> logits (B, num_classes); with ``pre_logits`` pooled features (B, C)."""
        if self.num_prefix_tokens:
            x = global_pool_nlc(x, self.global_pool, self.num_prefix_tokens)
        return super().forward_head(x, pre_logits)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one, 0 classes by none; ``global_pool`` changes the pooling as well."""
        self.global_pool = self.global_pool if global_pool is None else global_pool
        super().reset_classifier(num_classes, '' if self.num_prefix_tokens else global_pool)

    def forward_intermediates(self, x: Tensor, indices: int | Sequence[int] | None = None, norm: bool = False,
                              stop_early: bool = False, output_fmt: str = 'NCHW', intermediates_only: bool = False,
                              return_prefix_tokens: bool = False) -> Any:
        """Return the residual stream after blocks, and the output of :meth:`forward_features` before them.

        Args:
            x: images (B, in_chans, H, W).
            indices: blocks, a number of last blocks, or None for all.
            norm: give every map the final norm.
            stop_early: leave out blocks after the last of ``indices``; the first output is then of that one.
            output_fmt: 'NCHW' or 'NHWC'.
            intermediates_only: return the maps alone.
            return_prefix_tokens: return a pair of map and class token (B, 1, C) for each block of a Vim.
        """
        backbone = self.backbone
        taken, last = feature_take_indices(len(backbone.layers), indices)
        maps: list[Any] = []
        for index, (tokens, residual, size) in enumerate(backbone.block_tokens(x)):
            if index in taken:
                stream = residual + tokens
                token, rest = backbone.split(backbone.norm(stream) if norm else stream, size)
                found = _as_map(rest, size, output_fmt)
                maps.append((found, token) if return_prefix_tokens and self.num_prefix_tokens else found)
            if index == last and (stop_early or intermediates_only):
                break
        return maps if intermediates_only else (backbone.finish(tokens, residual, size), maps)

    def prune_intermediate_layers(self, indices: int | Sequence[int] = 1, prune_norm: bool = False,
                                  prune_head: bool = True) -> list[int]:
        """Remove the blocks after the last of ``indices``, and return ``indices`` as a list of blocks."""
        return self._cut(indices, 'layers', prune_norm, prune_head)

    def _after_cut(self, last: int, prune_norm: bool) -> None:
        self.backbone.directions = self.backbone.directions[:last + 1]
        if prune_norm:
            self.backbone.norm = nn.Identity()


# torch.fx calls the backbones as a whole: their loops depend on the size of the image.
register_notrace_module(LocalVMamba)
register_notrace_module(LocalVimTokens)

# ---- names ----


def _converted(checkpoint: Any, model: _Model, source: str = 'the checkpoint') -> dict[str, Tensor]:
    """Return the weights of a checkpoint of ours or of the authors under the names of a model."""
    contents = read(checkpoint)
    own, whole = weights_for(contents, model.backbone, source)
    found = fit(model.backbone, own)
    if found.missing or found.new:
        raise RuntimeError(found.report(type(model).__name__, source))
    # The weights of a backbone alone have no prefix.
    whole = whole if contents.prefix else {f'backbone.{name}': value for name, value in own.items()}
    return adapted(whole, model.backbone, contents.prefix or 'backbone.')


def _cfg(name: str, weights: Weights) -> PretrainedCfg:
    kind, arguments = models._MODELS[weights.model]
    patch = {**arguments, **weights.options}.get('patch_size', 4 if kind is LocalVMamba else 16)
    side = weights.size // (8 * patch if kind is LocalVMamba else weights.options.get('stride', patch))
    more = dict(file=f'{SCHEME}{name}', custom_load=True) if name in NAMED else {}
    return PretrainedCfg(num_classes=weights.num_classes, input_size=(3, weights.size, weights.size),
                         pool_size=(side, side), crop_pct=weights.size / weights.resize, interpolation='bicubic',
                         mean=tuple(value / 255 for value in weights.mean),
                         std=tuple(value / 255 for value in weights.std), classifier='head.fc',
                         first_conv='backbone.patch_embed.projection', license=weights.licence, **more)


def _cfgs() -> dict[str, DefaultCfg]:
    cfgs = {name: DefaultCfg(tags=deque(['']), cfgs={'': _cfg(name, NAMED.get(name, Weights('', '', model=name)))})
            for name in models._MODELS}
    for name, weights in NAMED.items():
        architecture, _, tag = name.partition('.')
        if weights.model and tag:  # a name without a tag is the model's own
            cfgs[architecture].tags.append(tag)
            cfgs[architecture].cfgs[tag] = _cfg(name, weights)
    return cfgs


default_cfgs = _cfgs()  # timm reads it when a name is registered


def _register(name: str) -> None:
    kind, arguments = models._MODELS[name]
    cls: type[_Model] = TimmLocalVMamba if kind is LocalVMamba else TimmLocalVim

    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        tag = options.get('pretrained_cfg')
        weights = NAMED.get(f'{name}.{tag}' if isinstance(tag, str) and tag else name)
        options = {**arguments, **(weights.options if weights else {}), **options}
        indices = models._feature_options(kind, options, None)['out_indices']
        feature_cfg = dict(out_indices=options.pop('out_indices', indices), feature_cls='getter')
        return build_model_with_cfg(cls, name, pretrained, pretrained_filter_fn=_converted, feature_cfg=feature_cfg,
                                    **options)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f'Create {name}, for timm.create_model({name!r}).'
    globals()[name] = register_model(create)


for _name in models._MODELS:
    _register(_name)
