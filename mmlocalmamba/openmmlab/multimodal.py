"""Leave mmpretrain's models for images and texts out where the installed transformers stops their import.

mmpretrain 1.2 imports names that transformers has moved since 4.49. With a later one ``import mmpretrain.models``, and
``import mmdet.models``, which imports it, stop with ``TypeError: NoneType takes no arguments``, whatever is built.
mmpretrain has placeholders for these models where transformers is not installed. They take their place here, too.
"""
import logging
import re
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

REMEDY = "pip install 'transformers==4.49.0'"
_IMPORT = re.compile(r'from transformers\.modeling_utils import\s*(\([^)]*\)|[^\n#]*)')
_FLAG = 'WITH_MULTIMODAL'  # of mmpretrain.utils.dependency


def _folder(package: str) -> Path | None:
    spec = find_spec(package)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def _text(path: Path) -> str:
    return path.read_text(encoding='utf-8', errors='replace') if path.is_file() else ''


def missing_names() -> list[str]:
    """Return what mmpretrain imports from transformers.modeling_utils and does not find there, from the files alone.

    To import transformers takes seconds, and most models need nothing of it.
    """
    theirs, mmpretrain = _folder('transformers'), _folder('mmpretrain')
    if theirs is None or mmpretrain is None:
        return []
    there = set(re.findall(r'\w+', _text(theirs / 'modeling_utils.py')))
    wanted: set[str] = set()
    for path in sorted((mmpretrain / 'models').rglob('*.py')):
        for names in _IMPORT.findall(_text(path)):
            wanted.update(re.findall(r'\w+', names))
    return sorted(wanted - there)


def problem() -> str | None:
    """Say in a line why mmpretrain's models for images and texts cannot be imported; None if they can."""
    missing = missing_names()
    if not missing:
        return None
    try:
        name = f'transformers {version("transformers")}'
    except PackageNotFoundError:
        name = 'transformers'
    return (f"mmpretrain's models for images and texts (BLIP, OFA, ...) cannot be imported with {name}, which has no "
            f'{missing[0]} where they look for it. {REMEDY} brings them back')


def leave_out() -> None:
    """Let mmpretrain take its placeholders if :func:`problem` has found one, before mmpretrain.models is imported."""
    if 'mmpretrain.models' in sys.modules:
        return
    reason = problem()
    if reason is None:
        return
    try:
        dependency = import_module('mmpretrain.utils.dependency')
    except Exception:  # whoever imports mmpretrain meets it again
        return
    if getattr(dependency, _FLAG, False):
        setattr(dependency, _FLAG, False)
        logging.getLogger('mmlocalmamba').warning('%s. They are left out.', reason)
