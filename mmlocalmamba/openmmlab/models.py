"""The backbones, SCAttn and weight loading by name in MMEngine's registries, with MMEngine's initialisers."""
from collections.abc import Sequence
from typing import Any

from mmengine.analysis import complexity_analysis
from mmengine.model import initialize

from mmlocalmamba import backbones, weights
from mmlocalmamba.layers import SCAttn
from mmlocalmamba.openmmlab.compat import register_loader, send_messages_to_mmengine
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


@WEIGHT_INITIALIZERS.register_module()
class Pretrained:
    """Load pre-trained weights into a backbone; see :func:`mmlocalmamba.weights.load_pretrained`.

    Args:
        checkpoint: file or URL; None trains from scratch and says so.
        options: those of load_pretrained.
    """

    def __init__(self, checkpoint: str | None, strict: bool = True, prefix: str | None = None,
                 map_location: Any = 'cpu', key: str | None = None, allow: Sequence[str] = (),
                 partial: str | None = None) -> None:
        self.options = dict(checkpoint=checkpoint, strict=strict, prefix=prefix, map_location=map_location, key=key,
                            allow=allow, partial=partial)

    def __call__(self, backbone: backbones.base.LocalMambaBackbone) -> None:
        weights.load_pretrained(backbone, **self.options)
