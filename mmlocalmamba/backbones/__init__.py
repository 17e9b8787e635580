from mmlocalmamba.backbones.local_vim import LocalVim
from mmlocalmamba.backbones.local_vmamba import LocalVMamba

__all__ = ['LocalVMamba', 'LocalVim']
