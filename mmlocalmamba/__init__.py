"""LocalMamba (arXiv 2403.09338) for OpenMMLab: LocalVim, LocalVMamba, SCAttn and the search for scan directions."""
from mmlocalmamba.methods import with_backbone
from mmlocalmamba.recipes import config_path, schedule, with_classes, without_masks

__all__ = ['config_path', 'schedule', 'with_backbone', 'with_classes', 'without_masks']
__version__ = '0.1.0'
