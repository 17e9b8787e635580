"""LocalMamba (arXiv 2403.09338) for OpenMMLab: LocalVim, LocalVMamba, SCAttn and the search for scan directions."""
import difflib
from pathlib import Path

__version__ = '0.1.0'


def config_path(name: str) -> str:
    """Absolute path of one of our configs, in a clone as in an installed wheel.

    Args:
        name: file name with or without ``.py``, e.g. ``'mask-rcnn_localvmamba-t_1x_coco'``.

    Raises:
        ValueError: there is no such config; similar names are listed.
    """
    stem = name[:-len('.py')] if name.endswith('.py') else name
    package = Path(__file__).resolve().parent
    folders = [folder for folder in (package / '.mim' / 'configs', package.parent / 'configs') if folder.is_dir()]
    for folder in folders:
        if (folder / f'{stem}.py').is_file():
            return str(folder / f'{stem}.py')
    known = sorted(path.stem for folder in folders[:1] for path in folder.glob('*.py'))
    similar = difflib.get_close_matches(stem, known, n=5, cutoff=0.3) or known
    raise ValueError(f'no config {name!r}; similar: {", ".join(similar) or "none, the configs are not installed"}')
