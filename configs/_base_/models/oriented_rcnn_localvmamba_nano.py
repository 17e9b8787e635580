"""Upstream's Oriented R-CNN with LocalVMamba-nano; needs onedl-mmrotate."""
model = __import__('mmlocalmamba').with_backbone(
    __import__('mmengine.hub').hub.get_config(
        'mmrotate::oriented_rcnn/oriented-rcnn-le90_r50_fpn_1x_dota.py').model,
    dict(type='mmlocalmamba.LocalVMamba', arch='nano', drop_path_rate=0.0))
del model['_delete_']  # this file inherits nothing, so there is nothing to delete
