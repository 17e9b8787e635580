"""Whose weights they are: of LocalMamba's authors, of Vim (hustvl/Vim) or of VMamba, version 0 (MzeroMiko/VMamba), told
by their names; what each needs and does not show; and the names that LocalMamba's authors would have given to Vim's and
VMamba's.
"""
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmlocalmamba.layers.rope import rotary_tables

BACKBONE = 'backbone.'
VMAMBA_DIRECTIONS = ('h', 'v', 'h_flip', 'v_flip')
_VIM_DIRECTIONS = ('h', 'h_flip')
# Vim's grids at 224 pixels: patches of 16 at this stride.
_VIM_STRIDES = {14: 16, 27: 8}

# Names that only this model's authors have.
_MARKS = {family: re.compile(pattern) for family, pattern in (
    ('LocalVim', r'layers\.\d+\.mixer\.(?:A_log|D|(?:conv1d|x_proj|dt_proj))_\d+(?:\.\w+)?'),
    ('LocalVMamba', r'layers\.\d+\.blocks\.\d+\.op\.(?:A_logs|Ds|x_proj_weight|dt_projs_weight|dt_projs_bias)'),
    ('Vim', r'layers\.\d+\.mixer\.(?:A_b_log|D_b|(?:conv1d|x_proj|dt_proj)_b\.\w+)'),
    ('VMamba', r'layers\.\d+\.blocks\.\d+\.self_attention\.(?:A_logs|Ds|x_proj_weight|dt_projs_weight|dt_projs_bias)'),
)}
_EXAMPLES = ('layers.0.mixer.A_log_0', 'layers.0.blocks.0.op.A_logs', 'layers.0.mixer.A_b_log',
             'layers.0.blocks.0.self_attention.A_logs')
_VIM = re.compile(r'(layers\.\d+\.mixer)\.(A_log|A_b_log|D|D_b|(?:conv1d|x_proj|dt_proj)(?:_b)?)(\.\w+)?')
_VMAMBA = [(r'\.ln_1\.', '.norm.'), (r'\.self_attention\.', '.op.'), (r'^patch_embed\.proj\.', 'patch_embed.0.'),
           (r'^patch_embed\.norm\.', 'patch_embed.2.'), (r'^(norm|head)\.', r'classifier.\1.')]


def family_of(state_dict: Mapping[str, Tensor]) -> tuple[str | None, str]:
    """(LocalVim, LocalVMamba, Vim, VMamba or None; where the backbone is: '' or 'backbone.')."""
    for prefix in ('', BACKBONE):
        for name in state_dict:
            if name.startswith(prefix):
                for family, mark in _MARKS.items():
                    if mark.fullmatch(name, len(prefix)):
                        return family, prefix
    return None, ''


def is_official(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of LocalMamba's, Vim's or VMamba's authors."""
    return family_of(state_dict)[0] is not None


def _backbone_of(state_dict: Mapping[str, Tensor]) -> tuple[str | None, dict[str, Tensor], dict[str, Tensor]]:
    family, prefix = family_of(state_dict)
    own = {name[len(prefix):]: value for name, value in state_dict.items() if name.startswith(prefix)}
    return family, own, {name: value for name, value in state_dict.items() if not name.startswith(prefix)}


def _depth(weights: Mapping[str, Tensor], pattern: str) -> int:
    return len({match.groups() for name in weights if (match := re.match(pattern, name))})


def implied_facts(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """What weights of others need, as far as it is known; see LocalMambaBackbone.facts.

    LocalMamba's say nothing about their scan directions.
    """
    family, weights, _ = _backbone_of(state_dict)
    facts: dict[str, Any] = {}
    if family == 'VMamba':
        facts['directions'] = [list(VMAMBA_DIRECTIONS)] * _depth(weights, r'layers\.(\d+)\.blocks\.(\d+)\.')
    elif family == 'Vim':
        facts['directions'] = [list(_VIM_DIRECTIONS)] * _depth(weights, r'layers\.(\d+)\.')
        if 'pos_embed' in weights and tuple(weights['patch_embed.proj.weight'].shape[2:]) == (16, 16):
            side = round((weights['pos_embed'].shape[1] - 1) ** 0.5)
            if side in _VIM_STRIDES and side * side + 1 == weights['pos_embed'].shape[1]:
                facts['stride'] = _VIM_STRIDES[side]
            if side % 2:  # else a class token in the middle of every scan gives the same
                facts['cls_token'] = 'vim'
    elif family == 'LocalVim' and 'rope.freqs_cos' in weights:
        cos = weights['rope.freqs_cos']
        side = round(len(cos) ** 0.5)
        exact = rotary_tables(side, side, cos.shape[1], 14, cos.device)[0]
        if exact.shape == cos.shape and (exact - cos).abs().max() > 0.01:
            facts['rope'] = 'resized'
    return facts


def remarks(state_dict: Mapping[str, Tensor]) -> list[str]:
    """What a reader of the load report should know of weights of others."""
    family, weights, _ = _backbone_of(state_dict)
    if family not in ('LocalVim', 'LocalVMamba'):
        return []
    lines = ["the authors' files do not say which scan directions they belong to: the configuration's are taken"]
    embedding = weights.get('patch_embed.proj.weight')
    if family == 'LocalVim' and embedding is not None and len(embedding) == 384:
        lines.append("the authors' code has two models called local_vim_small, and the later one, without search, "
                     'hides the other: a file that was trained by that name belongs to localvim-s-nosearch, and '
                     'nothing in it shows that')
    return lines


def _vim_name(name: str) -> str:
    """Vim's name -> LocalVim's: scans h and h_flip are numbers 0 and 1 there, and without or with ``_b`` here."""
    match = _VIM.fullmatch(name)
    if match is None:
        return name
    mixer, part, leaf = match.groups()
    return f'{mixer}.{part.replace("_b", "")}_{int("_b" in part)}{leaf or ""}'


def _vmamba_name(name: str) -> str:
    """VMamba's name -> LocalVMamba's."""
    for pattern, replacement in _VMAMBA:
        name = re.sub(pattern, replacement, name)
    return name


def _vim_tensor(name: str, tensor: Tensor) -> Tensor:
    """Vim's released models (``..._div2``) halve the sum of both directions before the output projection, which is
    linear: half of its weight does the same, exactly, 2 being a power of two."""
    return tensor / 2 if name.endswith('.mixer.out_proj.weight') else tensor


def as_localmamba(state_dict: Mapping[str, Tensor]
                  ) -> tuple[str, dict[str, str], dict[str, Tensor], dict[str, Tensor]]:
    """A state dict of any family under the names of LocalMamba's authors.

    Returns:
        (family, {such a name: name in the file}, {such a name: weight}, weights beside the backbone under their names).

    Raises:
        ValueError: it is of no family, or of a model that has no counterpart here.
    """
    family, prefix = family_of(state_dict)
    if family is None:
        raise ValueError("this is not a state dict of the authors' LocalVim or LocalVMamba, nor of Vim or VMamba: it "
                         f'has neither {" nor ".join(_EXAMPLES)}, but e.g. '
                         f'{", ".join(list(state_dict)[:3]) or "nothing"}')
    _, own, rest = _backbone_of(state_dict)
    if family == 'Vim' and ('rope.freqs_cos' in own or 'cls_token' not in own):
        raise ValueError('this is a Vim with rotary positions or without a class token: only the released models '
                         'with a class token in the middle (midclstok, div2) are converted; others combine their '
                         'directions and tokens differently')
    if any('.mlp.' in name for name in own):
        raise ValueError('this is a VMamba of a later version, with MLPs: only version 0 is a LocalVMamba')
    if family == 'LocalVim' and any(re.fullmatch(r'layers\.\d+\.norm\.bias', name) for name in own):
        raise ValueError("this LocalVim normalises by LayerNorm (it has layers.0.norm.bias), as the authors' detectors "
                         'and segmentors by rms_norm=False; LocalVim is by RMSNorm here, as in their classifiers, and '
                         'cannot give its numbers')
    rename = dict(Vim=_vim_name, VMamba=_vmamba_name).get(family, str)
    names = {rename(name): prefix + name for name in own}
    weights = {rename(name): _vim_tensor(name, value) if family == 'Vim' else value for name, value in own.items()}
    return family, names, weights, rest
