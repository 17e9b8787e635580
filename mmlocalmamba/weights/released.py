"""What a name of weights stands for: those that come with the package, and those that the authors of LocalMamba, Vim
and VMamba have released.

Addresses and figures are those of the authors' own pages (``source``); Vim's page links folders, and the names of the
files in them are those that programs of others download. No page states a digest or a size of a file: numbers of
tensors and values are derived from the models, and a file with fewer is refused.
"""
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmlocalmamba.files import SCHEME

IMAGENET = 'mmpretrain.ImageNet'
COCO = 'mmdet.CocoDataset'
ADE20K = 'mmseg.ADE20KDataset'
TASKS = {IMAGENET: 'classification', COCO: 'detection', ADE20K: 'segmentation'}


@dataclass(frozen=True)
class Weights:
    """Weights with a name.

    Attributes:
        config: the shipped configuration that they fill.
        file: address of the file, or name of a packaged one.
        tensors: number of tensors of the model.
        values: numbers in all of them.
        source: page that links the file and reports the figures.
        licence: of the authors' repository; None where it states none.
        reported: {metric: value in percent} as ``source`` says, not measured here.
        key: entry of the file that the name stands for, because the figures are its; another one is taken if the file
            does not have it, or is given by its address.
        model: name of the model in :func:`mmlocalmamba.list_models`; '' for detectors and segmentors.
        options: arguments of the backbone beside those of ``model``.
        num_classes: number of classes.
        dataset: type of the data set in OpenMMLab's registries, which knows the class names; None where the file does.
        size: side of the images in pixels.
        resize: length of the short side from which the centre is cut out.
        mean, std: of the pixels (0 to 255), in the order red, green, blue.
    """
    config: str
    file: str
    tensors: int = 0
    values: int = 0
    source: str = ''
    licence: str | None = None
    reported: Mapping[str, float] = field(default_factory=dict)
    model: str = ''
    options: Mapping[str, Any] = field(default_factory=dict)
    num_classes: int = 1000
    dataset: str | None = IMAGENET
    size: int = 224
    resize: int = 256
    key: str | None = None
    mean: tuple[float, ...] = (123.675, 116.28, 103.53)
    std: tuple[float, ...] = (58.395, 57.12, 57.375)

    @property
    def packaged(self) -> bool:
        return '://' not in self.file

    @property
    def task(self) -> str:
        """Return 'classification', 'detection' or 'segmentation'."""
        return TASKS.get(self.dataset or IMAGENET, 'classification')

    @property
    def least_bytes(self) -> int:
        """Return the size that a file of these weights in 32 bits has at least."""
        return 4 * self.values

    def directions(self) -> list[list[str]] | None:
        """Return the scan directions of every block that a variant of this package has, or None."""
        from mmlocalmamba.backbones.archs import LOCAL_VIM, LOCAL_VMAMBA  # data; its package imports this one
        family, _, variant = self.model.partition('_')
        arch: dict[str, Any] = {'localvim': LOCAL_VIM, 'localvmamba': LOCAL_VMAMBA}.get(family, {}).get(variant, {})
        found = arch.get('directions')
        if found and isinstance(found[0], str):  # one list for all blocks
            found = [found] * (arch['num_layers'] if 'num_layers' in arch else sum(arch['depths']))
        return found and [list(block) for block in found]

    def describe(self, name: str) -> str:
        """Return a line that says whose weights they are."""
        figures = ', '.join(f'{metric} {value}' for metric, value in self.reported.items())
        return f'{name}: {self.file}, licence: {self.licence or "none stated"}, reported at {self.source}: {figures}'


_VMAMBA = 'https://github.com/MzeroMiko/VMamba'


def _packaged(config: str, size: int, **options: Any) -> Weights:
    return Weights(config, config, model='localvim_nano', num_classes=10, dataset=None, size=size, resize=size,
                   mean=(127.5, ) * 3, std=(127.5, ) * 3, options=dict(img_size=size, drop_path_rate=0., **options))


def _localmamba(model: str, config: str, file: str, tensors: int, values: int, top_1: float, **options: Any) -> Weights:
    return Weights(config, f'https://github.com/hunto/LocalMamba/releases/download/v1.0.0/{file}', tensors, values,
                   'https://github.com/hunto/LocalMamba', 'Apache-2.0', {'top-1': top_1}, model, options)


def _vim(size: str, config: str, file: str, tensors: int, values: int, top_1: float, **options: Any) -> Weights:
    return Weights(config, f'https://huggingface.co/hustvl/Vim-{size}-midclstok/resolve/main/{file}', tensors, values,
                   'https://github.com/hustvl/Vim', None, {'top-1': top_1}, f'vim_{size}', options)


def _vmamba(config: str, file: str, tensors: int, values: int, reported: Mapping[str, float], model: str = '',
            dataset: str = IMAGENET, num_classes: int = 1000, key: str | None = None) -> Weights:
    return Weights(config, f'{_VMAMBA}/releases/download/%23v{file}', tensors, values,
                   f'{_VMAMBA}/blob/main/assets/performance.md', 'MIT', reported, model, num_classes=num_classes,
                   dataset=dataset, key=key)


# Sizes of VMamba in names of models and of configurations.
_SIZES = {'t': 'tiny', 's': 'small', 'b': 'base'}
# (size in names of configurations, file, tensors, values, top-1)
_IMAGENET = [
    ('t', '0cls/vssmtiny_dp01_ckpt_epoch_292.pth', 212, 22_893_448, 82.2),
    ('s', '0cls/vssmsmall_dp03_ckpt_epoch_238.pth', 446, 44_417_416, 83.5),
    ('b', '0cls/vssmbase_dp06_ckpt_epoch_241.pth', 446, 76_254_056, 83.7),
    ('t-v2', '2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth', 276, 30_249_064, 82.6),
    ('t-v2-s2l5', '2cls/vssm_tiny_0230_ckpt_epoch_262.pth', 222, 30_705_832, 82.5),
    ('s-v2', '2cls/vssm_small_0229_ckpt_epoch_222.pth', 402, 50_147_752, 83.6),
    ('s-v2-s1l20', '2cls/vssm1_small_0229s_ckpt_epoch_240.pth', 492, 49_012_840, 83.3),
    ('b-v2', '2cls/vssm_base_0229_ckpt_epoch_237.pth', 402, 88_557_800, 83.9),
    ('b-v2-s1l20', '2cls/vssm1_base_0229s_ckpt_epoch_225.pth', 492, 86_614_504, 83.8),
]
# (size and schedule in names of configurations, file, tensors, values, box AP, mask AP)
_COCO = [
    ('t_1x', '0det/vssmtiny_mask_rcnn_swin_fpn_coco_epoch_12.pth', 258, 42_399_696, 46.5, 42.1),
    ('t-v2_1x', '2det/mask_rcnn_vssm_fpn_coco_tiny_s_epoch_12.pth', 322, 49_755_312, 47.3, 42.7),
    ('t-v2-s2l5_1x', '2det/mask_rcnn_vssm_fpn_coco_tiny_epoch_12.pth', 268, 50_212_080, 47.4, 42.7),
    ('s-v2_1x', '2det/mask_rcnn_vssm_fpn_coco_small_epoch_11.pth', 448, 69_654_000, 48.7, 43.7),
    ('b-v2_1x', '2det/mask_rcnn_vssm_fpn_coco_base_epoch_11.pth', 448, 107_931_376, 49.2, 44.1),
    ('t-v2_ms-3x', '2det/mask_rcnn_vssm_fpn_coco_tiny_ms_3x_s_epoch_31.pth', 322, 49_755_312, 48.8, 43.7),
    ('t-v2-s2l5_ms-3x', '2det/mask_rcnn_vssm_fpn_coco_tiny_ms_3x_epoch_36.pth', 268, 50_212_080, 48.9, 43.7),
    ('s-v2_ms-3x', '2det/mask_rcnn_vssm_fpn_coco_small_ms_3x_epoch_32.pth', 448, 69_654_000, 49.9, 44.2),
]
# (size in names of configurations, file, tensors, values, mIoU of one scale)
_ADE20K = [
    ('t', '0seg/vssmtiny_upernet_4xb4-160k_ade20k-512x512_iter_160000.pth', 298, 54_559_769, 47.3),
    ('t-v2', '2seg/upernet_vssm_4xb4-160k_ade20k-512x512_tiny_s_iter_160000.pth', 362, 61_915_385, 47.9),
    ('t-v2-s2l5', '2seg/upernet_vssm_4xb4-160k_ade20k-512x512_tiny_iter_160000.pth', 308, 62_372_153, 48.3),
    ('s-v2', '2seg/upernet_vssm_4xb4-160k_ade20k-512x512_small_iter_144000.pth', 488, 81_814_073, 50.6),
    ('b-v2', '2seg/upernet_vssm_4xb4-160k_ade20k-512x512_base_iter_160000.pth', 488, 122_082_105, 51.0),
]

NAMED: dict[str, Weights] = {
    'localvim_nano.digits': _packaged('localvim-nano_digits', 32, patch_size=4, window_pad='none'),
    'localvim_nano.fashion': _packaged('localvim-nano_fashion', 28, patch_size=2),
    'localvim_tiny': _localmamba(
        'localvim_tiny', 'localvim-t_8xb128_in1k', 'local_vim_tiny.ckpt', 326, 7_994_152, 76.2),
    'localvim_tiny.midcls': _localmamba(
        'localvim_tiny', 'localvim-t-midcls_8xb128_in1k', 'local_vim_tiny_middle_cls_token.ckpt', 327, 7_994_536, 77.8,
        cls_token='middle', rope=False, out_type='cls_token'),
    'localvmamba_small': _localmamba(
        'localvmamba_small', 'localvmamba-s_8xb128_in1k', 'local_vssm_small.ckpt', 644, 49_748_536, 83.7),
    'vim_tiny': _vim('tiny', 'vim-t-midcls_8xb128_in1k', 'vim_t_midclstok_76p1acc.pth', 247, 7_148_008, 76.1),
    'vim_tiny.plus': _vim(
        'tiny', 'vim-t-midcls-plus_8xb128-30e_in1k', 'vim_t_midclstok_ft_78p3acc.pth', 247, 7_250_344, 78.3, stride=8),
    'vim_small': _vim('small', 'vim-s-midcls_8xb128_in1k', 'vim_s_midclstok_80p5acc.pth', 247, 25_796_584, 80.5),
    'vim_small.plus': _vim(
        'small', 'vim-s-midcls-plus_8xb128-30e_in1k', 'vim_s_midclstok_ft_81p6acc.pth', 247, 26_001_256, 81.6,
        stride=8),
}
for _size, _file, _tensors, _values, _top_1 in _IMAGENET:
    _name = f'vmamba_{_SIZES[_size[0]]}{_size[1:].replace("-", "_")}'
    # All were trained with an average but the first ("Vanilla-VMamba-T"), as the authors' README says.
    NAMED[_name] = _vmamba(f'vmamba-{_size}_8xb128_in1k', _file, _tensors, _values, {'top-1': _top_1}, _name,
                           key=None if _size == 't' else 'model_ema')
for _size, _file, _tensors, _values, _box, _mask in _COCO:
    _name = f'mask-rcnn_vmamba-{_size}_coco'
    NAMED[_name] = _vmamba(_name, _file, _tensors, _values, {'box AP': _box, 'mask AP': _mask}, '', COCO, 80)
for _size, _file, _tensors, _values, _miou in _ADE20K:
    _name = f'upernet_vmamba-{_size}_8xb2-160k_ade20k-512x512'
    NAMED[_name] = _vmamba(_name, _file, _tensors, _values, {'mIoU': _miou}, '', ADE20K, 150)


def find(checkpoint: str) -> tuple[str, Weights] | None:
    """Return the name and the entry of weights: by ``mmlocalmamba://NAME``, by the name, by the name of their
    configuration, or by the address of their file. None for any other checkpoint.
    """
    name = checkpoint.removeprefix(SCHEME)
    if name not in NAMED:
        name = next((other for other, weights in NAMED.items() if name in (weights.config, weights.file)), '')
    return (name, NAMED[name]) if name else None
