"""The backbones, SCAttn and weight loading by name in MMEngine's registries, with MMEngine's initialisers."""
from collections.abc import Sequence
from typing import Any

from mmengine.analysis import complexity_analysis
from mmengine.config import Config
from mmengine.model import initialize
from torch import nn

from mmlocalmamba import backbones, weights
from mmlocalmamba.layers import SCAttn
from mmlocalmamba.models import build_whole_models_by
from mmlocalmamba.openmmlab.compat import register_loader, send_messages_to_mmengine
from mmlocalmamba.openmmlab.configs import config_path
from mmlocalmamba.openmmlab.deployment import load_model
from mmlocalmamba.ops.flops import HANDLES
from mmlocalmamba.registry import MODELS, WEIGHT_INITIALIZERS

send_messages_to_mmengine()
register_loader()
# MMEngine's analyzer has no public way to learn operators, and leaves out unknown ones without a word.
complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.update(HANDLES)

MODELS.register_module(module=SCAttn)


class _InitCfg:
    """MMEngine's initialisers in ``init_cfg``."""

    def initialize(self, cfgs: list[dict]) -> None:
        initialize(self, cfgs)


@MODELS.register_module()
class LocalVim(_InitCfg, backbones.LocalVim):
    __doc__ = backbones.LocalVim.__doc__


@MODELS.register_module()
class LocalVMamba(_InitCfg, backbones.LocalVMamba):
    __doc__ = backbones.LocalVMamba.__doc__


def build_whole_model(config: str, checkpoint: str | None) -> nn.Module:
    """Build the detector or segmentor of a shipped configuration, in evaluation mode, with ``dataset_meta``.

    Args:
        config: its name.
        checkpoint: file, URL or ``mmlocalmamba://NAME``; None for random weights.

    Raises:
        RuntimeError: the weights do not fill the model.
    """
    model, classes = load_model(Config.fromfile(config_path(config)), checkpoint)
    model.dataset_meta = dict(classes=classes)
    return model


build_whole_models_by(build_whole_model)


@WEIGHT_INITIALIZERS.register_module()
class Pretrained:
    """Load pre-trained weights into a backbone; see :func:`mmlocalmamba.weights.load_pretrained`.

    Args:
        checkpoint: file or URL; None trains from scratch and says so.
        options: those of load_pretrained.
    """

    def __init__(self, checkpoint: str | None, strict: bool = True, prefix: str | None = None,
                 map_location: Any = 'cpu', key: str | None = None, allow: Sequence[str] = (),
                 partial: str | None = None, channels: str | None = None, grid: Sequence[int] | None = None) -> None:
        self.options = dict(checkpoint=checkpoint, strict=strict, prefix=prefix, map_location=map_location, key=key,
                            allow=allow, partial=partial, channels=channels, grid=grid)

    def __call__(self, backbone: backbones.base.LocalMambaBackbone) -> None:
        weights.load_pretrained(backbone, **self.options)
