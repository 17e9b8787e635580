"""The base class of both backbones: variants, direction lists, outputs, freezing, initialisation and loading."""
import copy
import json
import os
import reprlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mmlocalmamba.directions import check_scan
from mmlocalmamba.weights.loading import check_requirements, load_pretrained

Directions = None | str | dict | Sequence[str] | Sequence[Sequence[str]]
SEARCH = 'search'
WINDOW_PADS = ('zero', 'none')
# The results of a search with hundreds of blocks are far smaller.
_MAX_DIRECTIONS_FILE = 1 << 20


def resolve_arch(arch: str | dict, variants: dict[str, dict], required: Sequence[str]) -> dict:
    """Return a copy of the variant of this name, or of a dict with the same keys.

    Raises:
        ValueError: the name is unknown, or a required key is missing.
        TypeError: ``arch`` is neither a name nor a dict.
    """
    if isinstance(arch, str):
        if arch not in variants:
            raise ValueError(f'unknown arch {arch!r}: known are {", ".join(variants)}, or a dict with '
                             f'{", ".join(required)}')
        return copy.deepcopy(variants[arch])
    if not isinstance(arch, dict):
        raise TypeError(f'arch must be a name or a dict, got {arch!r}')
    missing = [key for key in required if key not in arch]
    if missing:
        raise ValueError(f'arch {dict(arch)} lacks {", ".join(missing)}')
    return copy.deepcopy(dict(arch))


def load_directions(path: str) -> list:
    """Read a directions file: a list per block, or a dict that holds it under ``directions``.

    Raises:
        ValueError: the file is not a small JSON file of this form. The message names it.
    """
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError('not a regular file')  # opening a pipe would wait for ever
        with open(path, 'rb') as file:
            text = file.read(_MAX_DIRECTIONS_FILE + 1)
        if len(text) > _MAX_DIRECTIONS_FILE:
            raise OSError(f'larger than {_MAX_DIRECTIONS_FILE} bytes')
        content = json.loads(text)
    except OSError as error:
        raise ValueError(f'directions={path!r} is neither {SEARCH!r} nor a file that can be read: {error}') from error
    except (ValueError, RecursionError) as error:  # nested too deeply
        raise ValueError(f'{path} is not JSON: {error}') from error
    if isinstance(content, dict):
        if 'directions' not in content:
            raise ValueError(f"{path} has no entry 'directions'; it has {', '.join(content)[:200] or 'nothing'}")
        content = content['directions']
    return content


def resolve_search(directions: Directions, mixer: type[nn.Module]) -> tuple[Directions, type[nn.Module], dict]:
    """Return directions, class of the mixers and further arguments of theirs. Only a search changes them.

    Args:
        directions: as in :func:`resolve_directions`; for a search 'search' or dict(candidates=[...], **options), the
            arguments of :func:`mmlocalmamba.search.supernet.relax`.
        mixer: class of the mixers without a search.

    Raises:
        ValueError: as :func:`mmlocalmamba.search.supernet.relax`.
    """
    if directions == SEARCH:
        directions = {}
    if not isinstance(directions, dict):
        return directions, mixer, {}
    from mmlocalmamba.search.supernet import relax  # only a search needs it
    return relax(mixer, **directions)


def resolve_directions(directions: Directions, default: Directions, depth: int) -> list[tuple[str, ...]]:
    """Return the scan names of every block.

    Args:
        directions: None (``default``), one list for all blocks, a list per block, a path to a JSON file.
        default: the variant's own.
        depth: number of blocks.

    Raises:
        ValueError: a scan is unknown, a list is empty, or the number of lists is not ``depth``.
    """
    if directions is None:
        directions = default
    if directions is None:
        raise ValueError('this arch has no scan directions of its own: give directions=[...]')
    source = ''
    if isinstance(directions, str):
        source = f' (from {os.path.abspath(directions)})'
        directions = load_directions(directions)
    if not isinstance(directions, (list, tuple)) or not directions:
        raise ValueError(f'directions must be a list of scan names, or such a list per block, '
                         f'got {reprlib.repr(directions)}{source}')
    if all(isinstance(name, str) for name in directions):
        directions = [directions] * depth
    if len(directions) != depth:
        raise ValueError(f'directions{source} has {len(directions)} entries, but the backbone has {depth} blocks')
    for index, block in enumerate(directions):
        if not isinstance(block, (list, tuple)) or not block:
            raise ValueError(f'directions{source} of block {index} must be a list of scan names, '
                             f'got {reprlib.repr(block)}')
        for name in block:
            try:
                check_scan(name)
            except ValueError as error:
                raise ValueError(f'directions{source} of block {index}: {error}') from None
    return [tuple(block) for block in directions]


def resolve_out_indices(out_indices: int | Sequence[int], count: int) -> tuple[int, ...]:
    """Return sorted, non-negative indices of the stages or blocks that give outputs."""
    indices = [out_indices] if isinstance(out_indices, int) else out_indices
    if not isinstance(indices, (list, tuple)) or not all(isinstance(index, int) for index in indices):
        raise TypeError(f'out_indices must be an int or a list of ints, got {out_indices!r}')
    for index in indices:
        if not -count <= index < count:
            raise ValueError(f'out_indices {out_indices} is out of range: there are {count} stages or blocks')
    resolved = tuple(sorted(index % count for index in indices))
    if not resolved or len(set(resolved)) != len(resolved):
        raise ValueError(f'out_indices {out_indices} must name at least one stage or block, each once')
    return resolved


def check_window_pad(window_pad: str) -> str:
    if window_pad not in WINDOW_PADS:
        raise ValueError(f'window_pad must be one of {WINDOW_PADS}, got {window_pad!r}')
    return window_pad


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Return drop path rates that grow linearly from 0 at the first block to ``rate`` at the last."""
    return [rate * index / max(1, depth - 1) for index in range(depth)]


class LocalMambaBackbone(nn.Module):
    """Base class of the backbones.

    Attributes:
        out_channels: list, channels of each output.
        out_strides: list, stride of each output in pixels (for a pooled output, that of the tokens that are pooled).
        num_extra_tokens: class tokens in the outputs, for tools that draw feature maps.

    Every way to load a state dict, torch's and MMEngine's functions included, resizes learned positions. It refuses a
    state dict without weights for this backbone, and one whose metadata name other scan directions (see
    :meth:`requirements`).

    Args:
        frozen_stages: see the subclasses.
        init_cfg: None, a dict or a list of dicts. ``dict(type='Pretrained', checkpoint=FILE_OR_URL)`` loads weights of
            this package (of a backbone, or of a classifier, detector or segmentor that holds one) or of the authors,
            which are converted on the fly; its options are those of :func:`mmlocalmamba.weights.load_pretrained`.
            ``checkpoint=None`` trains from scratch and says so. MMEngine's other types work in a backbone that its
            registry has built.
    """

    out_channels: list[int]
    out_strides: list[int]
    directions: list[tuple[str, ...]]
    num_extra_tokens = 0

    def __init__(self, frozen_stages: int, init_cfg: dict | Sequence[dict] | None) -> None:
        super().__init__()
        self.frozen_stages = frozen_stages
        self.init_cfg: Any = copy.deepcopy(init_cfg)
        self.register_state_dict_post_hook(_add_requirements)
        self.register_load_state_dict_pre_hook(_prepare_to_load)

    def init_weights(self) -> None:
        """Initialise every parameter anew, also of a model built on the meta device, then apply ``init_cfg``.

        Raises:
            RuntimeError, ValueError: as :meth:`load_pretrained` and :meth:`initialize`.
        """
        for module in reversed(list(self.modules())):  # children first: a parent may change their values
            if module is not self and hasattr(module, 'reset_parameters'):
                module.reset_parameters()
        self.reset_parameters()
        cfgs = self.init_cfgs()
        others = [cfg for cfg in cfgs if not _is_pretrained(cfg)]
        if others:
            self.initialize(others)
        for cfg in filter(_is_pretrained, cfgs):
            self.load_pretrained(**{key: value for key, value in cfg.items() if key != 'type'})

    def init_cfgs(self) -> list[dict]:
        """Return ``init_cfg`` as a list."""
        cfgs = self.init_cfg if isinstance(self.init_cfg, (list, tuple)) else [self.init_cfg]
        return [cfg for cfg in cfgs if cfg]

    def pretrained_checkpoints(self) -> list[str]:
        """Return the files and URLs that :meth:`init_weights` loads."""
        return [cfg['checkpoint'] for cfg in self.init_cfgs() if _is_pretrained(cfg) and cfg.get('checkpoint')]

    def initialize(self, cfgs: list[dict]) -> None:
        """Apply initialisers other than 'Pretrained'.

        Raises:
            ValueError: always here; the backbones that MMEngine's registry builds have MMEngine's initialisers.
        """
        raise ValueError(f'init_cfg type {cfgs[0].get("type")!r} is an initialiser of MMEngine: build the backbone by '
                         f"its registry, type='mmlocalmamba.{type(self).__name__}', or initialise the parameters "
                         'yourself')

    def load_pretrained(self, checkpoint: str | None, **options: Any) -> None:
        """Load weights from a file or URL; see :func:`mmlocalmamba.weights.load_pretrained` for options and errors."""
        load_pretrained(self, checkpoint, **options)

    def reset_parameters(self) -> None:
        """Initialise the backbone's own parameters and depth-dependent scales."""

    def requirements(self) -> dict[str, Any]:
        """Return what these weights need and their shapes do not show. State dicts carry it as metadata."""
        return dict(directions=[list(block) for block in self.directions])

    def adapt_state_dict(self, weights: dict[str, Tensor], grid: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Fit weights to this model where that keeps their meaning, such as positions of another grid, and log it.

        Args:
            weights: of this backbone.
            grid: (rows, columns) of their learned positions; None if it is not known.
        """
        return weights

    def is_new_for_task(self, name: str) -> bool:
        """Return True for parameters that a downstream task adds to the pre-trained model, or does not use."""
        raise NotImplementedError

    def stages_to_freeze(self) -> list[list[nn.Module | nn.Parameter]]:
        """Return the parts that ``frozen_stages`` 0, 1, ... each add: the embedding, then every stage or block with its
        output norm."""
        raise NotImplementedError

    def _freeze(self) -> None:
        for parts in self.stages_to_freeze()[:self.frozen_stages + 1]:
            for part in parts:
                part.requires_grad_(False)
                if isinstance(part, nn.Module):
                    part.eval()

    def train(self, mode: bool = True) -> 'LocalMambaBackbone':
        super().train(mode)
        self._freeze()
        return self


def _is_pretrained(cfg: dict) -> bool:
    kind = cfg.get('type')
    return getattr(kind, '__name__', str(kind)).rpartition('.')[2] in ('Pretrained', 'PretrainedInit')


def find_backbone(model: nn.Module) -> tuple[str, LocalMambaBackbone | None]:
    """Return the name of our backbone in a model, as checkpoints know it, and the backbone; ('', None) without one."""
    return next(((name, module) for name, module in model.named_modules() if isinstance(module, LocalMambaBackbone)),
                ('', None))


def _add_requirements(backbone: LocalMambaBackbone, state_dict: dict[str, Any], prefix: str, metadata: dict) -> None:
    metadata.update(backbone.requirements())


def _prepare_to_load(backbone: LocalMambaBackbone, state_dict: dict[str, Tensor], prefix: str, metadata: dict,
                     *_: Any) -> None:
    """Check and adapt a state dict before it is loaded. Neither MMEngine nor torch tells a module whether loading is
    strict, and MMEngine skips names that it does not know, so that files of others would leave random weights."""
    own = {name[len(prefix):]: value for name, value in state_dict.items() if name.startswith(prefix)}
    if not any(name in own for name, _ in backbone.named_parameters()):
        raise RuntimeError(f'{type(backbone).__name__}: the checkpoint has no weight of it under "{prefix}". If the '
                           'file is of another project, name it mmlocalmamba://FILE, which converts it. If it holds '
                           'other parts of the model, load it into these')
    check_requirements(backbone, metadata, 'the checkpoint')
    adapted = backbone.adapt_state_dict(own, metadata.get('grid'))
    state_dict.update({prefix + name: value for name, value in adapted.items()})


def check_frozen_stages(frozen_stages: int, count: int) -> int:
    if not -1 <= frozen_stages <= count:
        raise ValueError(f'frozen_stages must be -1 (nothing), 0 (patch embedding) up to {count}, got {frozen_stages}')
    return frozen_stages


