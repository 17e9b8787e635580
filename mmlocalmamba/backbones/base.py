"""What both backbones share: variants, direction lists, taps, freezing, loading of pre-trained weights."""
import copy
import json
import os
import reprlib
from collections.abc import Sequence
from typing import Any

from mmengine.analysis import complexity_analysis
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmlocalmamba.ops.flops import HANDLES
from mmlocalmamba.registry import MODELS, WEIGHT_INITIALIZERS
from mmlocalmamba.scans import check_scan

Directions = None | str | dict | Sequence[str] | Sequence[Sequence[str]]
SEARCH = 'search'
WINDOW_PADS = ('zero', 'none')
# What weights may need without showing it.
FACTS = ('directions', 'stride', 'rope', 'cls_token')
# The results of a search with hundreds of blocks are far smaller.
_MAX_DIRECTIONS_FILE = 1 << 20


def resolve_arch(arch: str | dict, variants: dict[str, dict], required: Sequence[str]) -> dict:
    """A variant's name or a dict of the same keys -> a dict of our own.

    Raises:
        ValueError: an unknown name or key, a key that is missing.
        TypeError: neither a name nor a dict.
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
    """Read a directions file: a list per block, or a dict that holds it under ``directions``. Files of others may be
    anything: what is no small JSON file is an error that names it."""
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
    """Directions, class of the mixers and further arguments of theirs: those given, but in a search.

    Args:
        directions: as in :func:`resolve_directions`; a search is 'search' or dict(candidates=[...], **options), the
            arguments of :class:`mmlocalmamba.search.supernet.Supernet`.
        mixer: class of the mixers outside of a search.

    Raises:
        ValueError: unknown options, candidates that are no list of different names, options out of range.
    """
    if directions == SEARCH:
        directions = {}
    if not isinstance(directions, dict):
        return directions, mixer, {}
    supernet = MODELS.get('mmlocalmamba.Supernet')(mixer, **directions)
    return supernet.candidates, supernet.mixer, supernet.options


def resolve_directions(directions: Directions, default: Directions, depth: int) -> list[tuple[str, ...]]:
    """Scan names of every block.

    Args:
        directions: None (``default``), one list for all blocks, a list per block, a path to a JSON file.
        default: the variant's own.
        depth: number of blocks.

    Raises:
        ValueError: an unknown scan, an empty list, or a list per block whose length is not ``depth``.
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
    """Sorted, non-negative indices of the stages or blocks that give outputs."""
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
    """Stochastic depth: from 0 at the first block linearly to ``rate`` at the last."""
    return [rate * index / max(1, depth - 1) for index in range(depth)]


class LocalMambaBackbone(BaseModule):
    """Freezing, and what loading asks of a backbone.

    ``out_channels`` and ``out_strides`` are lists: channels of each output, and its stride in pixels (for a pooled
    output, that of the tokens that are pooled).

    Whatever loads a state dict, MMEngine's and torch's functions too, resizes positions, refuses one that has nothing
    for this backbone, and one whose metadata say that it belongs to other scan directions (see :meth:`facts`).

    ``init_cfg=dict(type='Pretrained', checkpoint=PATH_OR_URL)`` takes checkpoints of this package (of a backbone, or
    of a classifier, detector or segmentor that holds one) and those of the authors, which are converted on the fly.
    See :class:`mmlocalmamba.weights.Pretrained`. ``checkpoint=None`` trains from scratch and says so.
    """

    out_channels: list[int]
    out_strides: list[int]
    init_cfg: Any

    def __init__(self, frozen_stages: int, init_cfg: dict | None) -> None:
        super().__init__(init_cfg)
        self.frozen_stages = frozen_stages
        self.register_state_dict_post_hook(_tell_facts)
        self.register_load_state_dict_pre_hook(_prepare_to_load)
        # Or the packages' own get_flops would leave out our ops without a word.
        complexity_analysis._DEFAULT_SUPPORTED_FLOP_OPS.update(HANDLES)

    def init_weights(self) -> None:
        """Initialise every parameter anew, also of a model that was built on the meta device, then as ``init_cfg``
        says."""
        for module in reversed(list(self.modules())):  # who holds a module may go on from its values
            if module is not self and hasattr(module, 'reset_parameters'):
                module.reset_parameters()
        self.reset_parameters()
        cfgs = self.init_cfg if isinstance(self.init_cfg, (list, tuple)) else [self.init_cfg]
        pretrained = [cfg for cfg in cfgs if cfg and cfg['type'] == 'Pretrained']
        if not pretrained:
            super().init_weights()
            return
        # MMEngine's own Pretrained would load what happens to match and skip the rest.
        own, self.init_cfg = self.init_cfg, [cfg for cfg in cfgs if cfg and cfg['type'] != 'Pretrained'] or None
        super().init_weights()
        self.init_cfg = own
        for cfg in pretrained:
            self.load_pretrained(**{key: value for key, value in cfg.items() if key != 'type'})

    def load_pretrained(self, checkpoint: str | None, **options: Any) -> None:
        """Load weights from a file or URL; options and errors are those of :class:`mmlocalmamba.weights.Pretrained`."""
        WEIGHT_INITIALIZERS.build(dict(type='mmlocalmamba.Pretrained', checkpoint=checkpoint, **options))(self)

    def reset_parameters(self) -> None:
        """Of the parameters that the backbone itself holds, and what depends on its depth."""

    def facts(self) -> dict[str, Any]:
        """What these weights need and their shapes do not show. State dicts carry it as metadata."""
        return dict(directions=[list(block) for block in self.directions])

    def check_facts(self, facts: dict[str, Any], source: str) -> None:
        """Compare with facts that came with weights, as far as they did.

        Raises:
            RuntimeError: they differ; it names both sides.
        """
        own = self.facts()
        differing = [key for key in FACTS if key in facts and facts[key] != own.get(key)]
        if not differing:
            return
        lines = [f'{source} belongs to another {type(self).__name__}:']
        for key in differing:
            theirs: Any = facts[key]
            ours: Any = own.get(key)
            if key == 'directions' and len(theirs) == len(ours):
                block = next(i for i, pair in enumerate(zip(theirs, ours)) if pair[0] != pair[1])
                count = sum(a != b for a, b in zip(theirs, ours))
                theirs, ours = (f'{", ".join(blocks[block])} in block {block}' for blocks in (theirs, ours))
                ours += f' ({count} of {len(self.directions)} blocks differ)'
            elif key == 'directions':
                theirs, ours = (f'{len(blocks)} blocks' for blocks in (theirs, ours))
            lines.append(f'{key}: its weights were trained with {theirs}, here: {ours}')
        report = '\n  '.join(lines)
        raise RuntimeError(f'{report}\nIts features would be meaningless here: set the backbone accordingly. If the '
                           f'difference is meant, say allow={differing} in init_cfg or on the OfficialCheckpointHook, '
                           'or load dict(state_dict), which carries no metadata.')

    def adapt_state_dict(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fit weights to this model where that is exact by meaning (e.g. positions of another grid), and say so."""
        return weights

    def is_new_for_task(self, name: str) -> bool:
        """Parameters that a downstream task adds to the pre-trained model, or has no use for."""
        raise NotImplementedError

    def stages_to_freeze(self) -> list[list[nn.Module | nn.Parameter]]:
        """What ``frozen_stages`` 0, 1, ... each adds: the embedding, then every stage or block with its output norm."""
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


def find_backbone(model: nn.Module) -> tuple[str, LocalMambaBackbone | None]:
    """Name of our backbone in a model, as checkpoints know it, and the backbone."""
    return next(((name, module) for name, module in model.named_modules() if isinstance(module, LocalMambaBackbone)),
                ('', None))


def _tell_facts(backbone: LocalMambaBackbone, state_dict: dict[str, Any], prefix: str, metadata: dict) -> None:
    metadata.update(backbone.facts())


def _prepare_to_load(backbone: LocalMambaBackbone, state_dict: dict[str, Tensor], prefix: str, metadata: dict,
                     *_: Any) -> None:
    """Before any loading: MMEngine's skips what it does not know, so the files of others would leave random weights.
    Whether it is strict, a module is not told, by MMEngine nor by torch."""
    own = {name[len(prefix):]: value for name, value in state_dict.items() if name.startswith(prefix)}
    if not any(name in own for name, _ in backbone.named_parameters()):
        raise RuntimeError(f'{type(backbone).__name__}: the checkpoint has no weight of it under "{prefix}". If the '
                           'file is of another project, convert it first: '
                           'tools/model_converters/official_to_mmlocalmamba.py. If it holds other parts of the model, '
                           'load it into these')
    backbone.check_facts(metadata, 'the checkpoint')
    state_dict.update({prefix + name: value for name, value in backbone.adapt_state_dict(own).items()})


def check_frozen_stages(frozen_stages: int, count: int) -> int:
    if not -1 <= frozen_stages <= count:
        raise ValueError(f'frozen_stages must be -1 (nothing), 0 (patch embedding) up to {count}, got {frozen_stages}')
    return frozen_stages


