"""Models by name, for use without OpenMMLab."""
import fnmatch
import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from mmlocalmamba.backbones import LocalVim, LocalVMamba
from mmlocalmamba.backbones.archs import LOCAL_VIM, LOCAL_VMAMBA
from mmlocalmamba.backbones.base import LocalMambaBackbone
from mmlocalmamba.files import SCHEME, meant
from mmlocalmamba.weights.loading import Contents, load_checkpoint, load_whole_model, read
from mmlocalmamba.weights.released import NAMED, Weights

_LOGGER = logging.getLogger(__name__)
_CLASSES: dict[str, type[LocalMambaBackbone]] = {'localvim': LocalVim, 'localvmamba': LocalVMamba}
# name -> (class, arguments of the backbone)
_MODELS: dict[str, tuple[type[LocalMambaBackbone], dict[str, Any]]] = {
    f'{family}_{arch}': (_CLASSES[family], dict(arch=arch))
    for family, archs in (('localvim', LOCAL_VIM), ('localvmamba', LOCAL_VMAMBA)) for arch in archs}
# Vim and VMamba (versions 0 and 2) are the same classes with other directions and without SCAttn.
_MODELS.update({f'vim_{arch}': (LocalVim, dict(arch=dict(embed_dims=channels, num_layers=24),
                                               directions=['h', 'h_flip'], scattn=False, cls_token='vim',
                                               out_type='cls_token', rope=False))
                for arch, channels in (('tiny', 192), ('small', 384))})
_MODELS.update({f'vmamba_{arch}': (LocalVMamba, dict(arch=arch, directions=['h', 'v', 'h_flip', 'v_flip'],
                                                     scattn=False))
                for arch in LOCAL_VMAMBA if not arch.startswith('nano')})
# Builds detectors and segmentors; mmlocalmamba.openmmlab.models puts it here.
_BUILD_WHOLE: list[Callable[..., nn.Module]] = []


class _Head(nn.Module):
    """A linear layer under the name that mmpretrain's heads have: ``head.fc``."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weight as the authors do."""
        nn.init.trunc_normal_(self.fc.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C) -> logits (B, num_classes)."""
        return self.fc(x)


class Classifier(nn.Module):
    """A backbone, the mean over its last map, and a linear layer.

    Names of weights are those of mmpretrain's classifiers: ``backbone.*``, ``head.fc.*``.

    Args:
        backbone: one of our backbones.
        num_classes: number of classes; 0 leaves the layer out, so that the model returns features (B, C).
    """

    def __init__(self, backbone: LocalMambaBackbone, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_features = backbone.out_channels[-1]
        self.head = _Head(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (B, in_channels, H, W) -> logits (B, num_classes)."""
        x = self.backbone(x)[-1]
        return self.head(x.mean((2, 3)) if x.dim() == 4 else x)


def list_models(pattern: str = '*', pretrained: bool = False) -> list[str]:
    """Return the names that :func:`create_model` takes.

    Args:
        pattern: as in a shell, e.g. ``'localvim*'``.
        pretrained: only names of weights: those that come with the package and those that others have released.
    """
    return sorted(fnmatch.filter(NAMED if pretrained else _MODELS, pattern))


def build_whole_models_by(build: Callable[..., nn.Module]) -> None:
    """Let :func:`create_model` build detectors and segmentors by a function of (configuration's name, checkpoint)."""
    _BUILD_WHOLE[:] = [build]


def create_model(name: str, pretrained: bool | str = False, num_classes: int | None = None, in_channels: int = 3,
                 features_only: bool = False, out_indices: int | Sequence[int] | None = None,
                 channels: str | None = None, **options: Any) -> nn.Module:
    """Create a classifier, or a backbone that returns feature maps.

    Args:
        name: see :func:`list_models`. With a detector's or segmentor's name the model is that of OpenMMLab, once
            :mod:`mmlocalmamba.openmmlab.models` is imported.
        pretrained: False for random weights; True for the weights that the name stands for, which are downloaded once;
            or a checkpoint: a file, URL or ``mmlocalmamba://NAME``, of this package or of the authors.
        num_classes: None for that of the head in the checkpoint that ``pretrained`` names, or else the number that the
            name stands for, or else 1000; 0 returns features (B, C). A checkpoint with another number, or without a
            head, gives the backbone alone its weights, and the log says so.
        in_channels: channels of the image.
        features_only: return the backbone, whose output is a tuple of maps (B, C, H, W).
        out_indices: stages (LocalVMamba) or blocks (LocalVim) whose maps ``features_only`` returns; None for all four
            stages or for four blocks at equal distances.
        channels: 'sum' or 'repeat' adapts weights to ``in_channels``; see :func:`mmlocalmamba.weights.load_pretrained`.
        options: further arguments of the backbone's class.

    Raises:
        ValueError: the name is unknown, or has no weights.
        RuntimeError: the weights do not fit the model, or were not downloaded. The message names what is missing.

    Example:
        >>> model = create_model('localvim_tiny', num_classes=10)
        >>> tuple(model(torch.rand(1, 3, 224, 224)).shape)
        (1, 10)
    """
    weights = NAMED.get(name, Weights('', '', model=name))
    if weights.model not in _MODELS and name not in NAMED:
        known = sorted({*_MODELS, *NAMED})
        raise ValueError(f'unknown model {name!r}: {meant(name, known)}Known are {", ".join(known)}')
    if pretrained is True:
        if name not in NAMED:
            raise ValueError(f'no weights come with the name {name!r}: names with weights are '
                             f'{", ".join(list_models(pretrained=True))}; pretrained=FILE takes a checkpoint')
        pretrained = SCHEME + name
    if not weights.model:
        if not _BUILD_WHOLE:
            raise ValueError(f'{name!r} is a model for {weights.task}, which OpenMMLab builds: import '
                             'mmlocalmamba.openmmlab.models first')
        if (num_classes, in_channels, features_only, out_indices, channels) != (None, 3, False, None, None) or options:
            raise ValueError(f'{name!r} is a model for {weights.task}: it takes no argument but pretrained')
        return _BUILD_WHOLE[0](weights.config, pretrained or None)
    kind, arguments = _MODELS[weights.model]
    arguments = {**arguments, **weights.options, 'in_channels': in_channels, **options}
    if features_only:
        arguments.update(_feature_options(kind, arguments, out_indices))
    elif out_indices is not None:
        raise ValueError('out_indices needs features_only=True')
    backbone = kind(**arguments)
    contents = read(load_checkpoint(pretrained)) if pretrained else None
    if num_classes is None:
        head = contents.weights.get('head.fc.weight') if contents is not None else None
        num_classes = weights.num_classes if head is None else len(head)
    model = backbone if features_only else Classifier(backbone, num_classes)
    if contents is not None:
        _load(model, backbone, contents, str(pretrained), channels)
    return model


def _feature_options(kind: type[LocalMambaBackbone], arguments: dict[str, Any],
                     out_indices: int | Sequence[int] | None) -> dict[str, Any]:
    if kind is LocalVMamba:
        return dict(out_indices=(0, 1, 2, 3) if out_indices is None else out_indices)
    arch: Any = arguments['arch']
    sizes: dict[str, Any] = arch if isinstance(arch, dict) else LOCAL_VIM[arch]
    depth = sizes['num_layers']
    taps = tuple(depth * (place + 1) // 4 - 1 for place in range(4))
    return dict(out_type='featmap', out_indices=taps if out_indices is None else out_indices)


def _load(model: nn.Module, backbone: LocalMambaBackbone, contents: Contents, checkpoint: str, channels: str | None
          ) -> None:
    """Load all weights, or those of the backbone alone if the model has another head than the checkpoint."""
    head = {name: value.shape for name, value in model.state_dict().items() if name.startswith('head.')}
    if head and all(name in contents.weights and contents.weights[name].shape == shape for name, shape in head.items()):
        load_whole_model(model, backbone, contents, checkpoint, channels)
        return
    backbone.load_pretrained(checkpoint, channels=channels)
    if head:
        _LOGGER.warning('%s has no head of %d classes: the head keeps random weights', checkpoint,
                        head['head.fc.weight'][0])
