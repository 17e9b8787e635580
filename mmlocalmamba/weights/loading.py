"""Loading of pre-trained weights into a backbone, with a report of what fitted."""
import logging
from collections.abc import Sequence

from mmengine.logging import print_log
from torch import Tensor, nn

from mmlocalmamba.compat import load_checkpoint
from mmlocalmamba.registry import WEIGHT_INITIALIZERS
from mmlocalmamba.weights.contents import architecture, backbone_state_dict

_LOCALVMAMBA_S = ('LocalVMamba', (2, 2, 27, 2), (96, 192, 384, 768))


@WEIGHT_INITIALIZERS.register_module()
class Pretrained:
    """What ``init_cfg=dict(type='Pretrained', checkpoint=PATH_OR_URL)`` means for our backbones.

    It takes checkpoints of this package (of a backbone, or of a classifier, detector or segmentor that holds one) and
    those of the authors, which are converted on the fly. What does not match is reported, and a backbone that is not
    completely filled is an error unless ``strict=False``; output norms of more stages than the checkpoint's model had
    may stay at their initial values.

    Args:
        checkpoint: file or URL; None trains from scratch and says so.
        strict: False reports what does not match and goes on.
        prefix: where the backbone is in the checkpoint; None finds it at the top or under ``backbone.``.
        map_location: as for torch.load.
    """

    def __init__(self, checkpoint: str | None, strict: bool = True, prefix: str | None = None,
                 map_location: str = 'cpu') -> None:
        self.checkpoint, self.strict, self.prefix, self.map_location = checkpoint, strict, prefix, map_location

    def __call__(self, backbone: nn.Module) -> None:
        """Load into ``backbone``.

        Raises:
            RuntimeError: weights of the other backbone; with ``strict``, weights that are missing or do not fit.
        """
        kind = type(backbone).__name__
        if self.checkpoint is None:
            print_log(f'{kind}: no pre-trained weights were given (init_cfg.checkpoint=None), '
                      'the backbone starts from scratch', logger='current', level=logging.WARNING)
            return
        weights = backbone_state_dict(load_checkpoint(self.checkpoint, self.map_location), prefix=self.prefix)
        check_architecture(weights, backbone, self.checkpoint)
        weights = backbone.adapt_state_dict(weights)
        own = backbone.state_dict()
        unfit = {name: f'{tuple(weights[name].shape)} in the file, {tuple(own[name].shape)} here'
                 for name in weights if name in own and weights[name].shape != own[name].shape}
        missing = [name for name in own if name not in weights and not backbone.is_new_for_task(name)]
        unexpected = [name for name in weights if name not in own and not backbone.is_new_for_task(name)]
        backbone.load_state_dict({name: w for name, w in weights.items() if name in own and name not in unfit},
                                 strict=False)
        report = [f'{len(own) - len(missing) - len(unfit)} of {len(own)} weights of {kind} come from {self.checkpoint}']
        fresh = [name for name in own if name not in weights and backbone.is_new_for_task(name)]
        for title, names in (('new for this task, left as initialised', fresh), ('missing in the file', missing),
                             ('of another shape', [f'{name} ({why})' for name, why in unfit.items()]),
                             ('in the file only', unexpected)):
            if names:
                report.append(f'{title}: {", ".join(names)}')
        report = '\n  '.join(report)
        if (missing or unfit or unexpected) and self.strict:
            raise RuntimeError(f'{report}\nThis checkpoint is not of this backbone. If a partial match is what you '
                               "want, add strict=False to init_cfg.")
        print_log(report, logger='current', level=logging.WARNING if missing or unfit or unexpected else logging.INFO)


def check_architecture(weights: dict[str, Tensor], backbone: nn.Module, source: str) -> None:
    """Refuse weights of the other backbone, of which nothing fits.

    Args:
        weights: of a backbone, under our names.
        source: where they come from, for the message.

    Raises:
        RuntimeError: they are of another class than ``backbone``.
    """

    def describe(name: str, blocks: Sequence[int], channels: Sequence[int]) -> str:
        return f'a {name} of {", ".join(map(str, blocks))} blocks and {", ".join(map(str, channels))} channels'

    found, own = architecture(weights), architecture(backbone.state_dict())
    if found is None or found[0] == own[0]:
        return
    message = f'{source} holds {describe(*found)}: it is not of this backbone, {describe(*own)}.'
    if found == _LOCALVMAMBA_S:
        message += (' It is the file of LocalVMamba-S, which the README of hunto/LocalMamba links for LocalVim-S as '
                    'well: weights of LocalVim-S are not linked there.')
    raise RuntimeError(message)
