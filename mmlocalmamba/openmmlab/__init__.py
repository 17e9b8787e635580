"""The door to OpenMMLab: everything that imports mmengine or mmcv, beside :mod:`mmlocalmamba.registry`.

Configurations name what is registered here as ``mmlocalmamba.NAME``.
"""
from mmlocalmamba.openmmlab import multimodal

multimodal.leave_out()
