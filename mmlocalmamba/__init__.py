"""LocalMamba (arXiv 2403.09338) for OpenMMLab: LocalVim, LocalVMamba, SCAttn and the search for scan directions."""
from mmlocalmamba.recipes import config_path, schedule, with_classes

__all__ = ['config_path', 'schedule', 'with_classes']
__version__ = '0.1.0'


try:
    import mmengine as _mmengine  # noqa: F401
except ModuleNotFoundError:
    # mmlocalmamba.ops and mmlocalmamba.scans need torch alone.
    pass
else:
    from mmlocalmamba.compat import allow_checkpoints, load_checkpoints_safely, name_annotation_files, register_scope
    register_scope()
    allow_checkpoints()
    load_checkpoints_safely()
    name_annotation_files()
