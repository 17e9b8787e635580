"""requirements/mmcv_torchvision: what stands in for mmcv's compiled ops equals them, and the rest refuses.

Both modules are loaded by their paths, whatever the installed mmcv has. Where no compiled one is at hand, torchvision's
public functions are the reference, as far as they are the same ops.
"""
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from processes import ROOT

pytest.importorskip('torchvision')
STAND_IN = ROOT / 'requirements/mmcv_torchvision/mmcv/_ext.py'


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled_file():
    """Return the compiled module of the installed mmcv, or of a ready wheel; None if there is none."""
    spec = importlib.util.find_spec('mmcv')
    for folder in spec.submodule_search_locations if spec else ():
        for suffix in EXTENSION_SUFFIXES:
            if (path := Path(folder) / f'_ext{suffix}').is_file():
                return path
    tag = f'cp{sys.version_info[0]}{sys.version_info[1]}'
    for folder in (ROOT.parent / 'shared/wheels', *map(Path, os.environ.get('PIP_FIND_LINKS', '').split())):
        for wheel in folder.glob(f'mmcv-2.1.0-{tag}-*.whl'):
            with zipfile.ZipFile(wheel) as archive:
                name = next(name for name in archive.namelist() if re.fullmatch(r'mmcv/_ext\..*', name))
                return Path(archive.extract(name, tempfile.mkdtemp(prefix='mmcv-compiled-')))
    return None


def load_compiled():
    """Return the module, or None where it does not fit the installed torch."""
    path = compiled_file()
    try:
        return path and load('_ext', path)
    except ImportError:
        return None


ours = load('stand_in_ext', STAND_IN)
compiled = load_compiled()
needs_compiled = pytest.mark.skipif(compiled is None, reason='no compiled mmcv is at hand')


@pytest.fixture
def theirs():
    return compiled or pytest.skip('no compiled mmcv is at hand')


def same(a, b):
    return a.dtype == b.dtype and torch.equal(a, b) or torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num(), b.nan_to_num())


# ---- NMS ----

def random_boxes(count, size=100., seed=0):
    draw = torch.Generator().manual_seed(seed)
    corner, sides = (torch.rand(count, 2, generator=draw) * size for _ in range(2))
    return torch.cat([corner, corner + sides], 1), torch.rand(count, generator=draw)


def boxes_on_a_grid(count, seed=0):
    """Overlaps are small fractions: often equal to a threshold."""
    draw = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 10, (count, 2), generator=draw)
    sides = torch.randint(0, 11, (count, 2), generator=draw)
    scores = torch.randint(0, 5, (count, ), generator=draw) / 5  # many are equal
    return torch.cat([corner, corner + sides], 1).float(), scores


def hostile(values):
    """All boxes with these coordinates."""
    boxes = torch.cartesian_prod(*[torch.tensor(values)] * 4)
    return boxes, torch.linspace(1, 0, len(boxes))


CASES = {
    'none': lambda: (torch.zeros(0, 4), torch.zeros(0)),
    'one': lambda: (torch.tensor([[1., 2., 3., 4.]]), torch.ones(1)),
    'random': lambda: random_boxes(800),
    'far': lambda: (random_boxes(300)[0] + 12345.678, random_boxes(300)[1]),
    'grid': lambda: boxes_on_a_grid(400),
    'equal scores': lambda: (random_boxes(400)[0], torch.full((400, ), 0.5)),
    'empty and inverted': lambda: hostile([0., 1., 3., 7.]),
    'huge': lambda: hostile([0., -3e38, 1e19, 3e38]),
    'infinite and NaN': lambda: hostile([0., 5., float('inf'), float('nan')]),
    'scores of NaN': lambda: (random_boxes(100)[0], torch.where(torch.arange(100) % 7 == 3, torch.nan,
                                                                random_boxes(100)[1])),
}


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [0., 0.1, 0.3, 0.5, 0.7, 1.])
@pytest.mark.parametrize('case', CASES)
def test_nms(theirs, case, threshold, offset):
    boxes, scores = CASES[case]()
    kept = ours.nms(boxes, scores, iou_threshold=threshold, offset=offset)
    assert same(kept, theirs.nms(boxes, scores, iou_threshold=threshold, offset=offset))


def test_nms_is_that_of_torchvision():
    from torchvision.ops import nms
    boxes, scores = random_boxes(500)
    assert same(ours.nms(boxes, scores, 0.5, 0), nms(boxes, scores, 0.5))


@pytest.mark.parametrize('dtype', [torch.float16, torch.float64, torch.bfloat16])
def test_nms_takes_what_the_compiled_takes(theirs, dtype):
    boxes, scores = (part.to(dtype) for part in random_boxes(10))
    for module in (ours, theirs):
        with pytest.raises(RuntimeError, match='expected scalar type Float'):
            module.nms(boxes, scores, 0.5, 0)


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', [0, 1, 2], ids=['naive', 'linear', 'gaussian'])
@pytest.mark.parametrize('case', CASES)
def test_softnms(theirs, case, method, offset):
    boxes, scores = CASES[case]()
    options = dict(iou_threshold=0.3, sigma=0.5, min_score=0.2, method=method, offset=offset)
    found = {}
    for module in (ours, theirs):
        dets = boxes.new_zeros(len(boxes), 5)
        inds = module.softnms(boxes, scores, dets, **options)
        found[module] = inds, dets[:len(inds)]
    assert same(found[ours][0], found[theirs][0])
    if method == 2:  # the exponential rounds differently
        torch.testing.assert_close(found[ours][1], found[theirs][1], equal_nan=True)
    else:
        assert same(found[ours][1], found[theirs][1])


# ---- RoIAlign ----

def rois_of(case, dtype):
    boxes = {
        'random': random_boxes(100)[0],
        'beyond the image': random_boxes(100)[0] * 3 - 100,
        'empty': random_boxes(20)[0][:, [0, 1, 0, 1]],
        'whole pixels': boxes_on_a_grid(100)[0] * 14,
        'huge': random_boxes(5, size=6000.)[0],
        'none': torch.zeros(0, 4),
        'inverted': random_boxes(20)[0][:, [2, 3, 0, 1]],
        'NaN': torch.full((3, 4), torch.nan),
    }[case]
    return torch.cat([torch.arange(len(boxes))[:, None] % 2, boxes], 1).to(dtype)


def roi_align(module, x, rois, scale, sampling_ratio, aligned, pool_mode=1):
    """Return the output and the gradient of `x`, as mmcv.ops.RoIAlign calls the module."""
    output = x.new_zeros(len(rois), x.shape[1], 7, 5)
    unused = x.new_zeros(output.shape if pool_mode == 0 else 0), x.new_zeros(output.shape if pool_mode == 0 else 0)
    options = dict(aligned_height=7, aligned_width=5, spatial_scale=scale, sampling_ratio=sampling_ratio,
                   pool_mode=pool_mode, aligned=aligned)
    module.roi_align_forward(x, rois, output, *unused, **options)
    grad = torch.linspace(-1, 1, output.numel(), dtype=x.dtype).view(output.shape)
    grad_x = torch.zeros_like(x)
    module.roi_align_backward(grad, rois, *unused, grad_x, **options)
    return output, grad_x


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
@pytest.mark.parametrize('case', ['random', 'beyond the image', 'empty', 'whole pixels', 'huge', 'none', 'inverted',
                                  'NaN'])
def test_roi_align(theirs, case, sampling_ratio, aligned, dtype):
    x = torch.randn(2, 6, 20, 25, generator=torch.Generator().manual_seed(0)).to(dtype)
    rois = rois_of(case, dtype)
    if aligned and case in ('inverted', 'NaN'):
        for module in (ours, theirs):
            with pytest.raises(RuntimeError, match='cannot have non-negative size'):
                roi_align(module, x, rois, 0.1, sampling_ratio, aligned)
        return
    # 0.125 is exact in float32. With 0.1, the sides of these boxes in samples are whole numbers only after mmcv has
    # rounded them to float32, which torchvision does not do in float64.
    scale = 0.125 if case == 'whole pixels' else 0.1
    for a, b in zip(roi_align(ours, x, rois, scale, sampling_ratio, aligned),
                    roi_align(theirs, x, rois, scale, sampling_ratio, aligned)):
        assert same(a, b)


def test_roi_align_is_that_of_torchvision():
    from torchvision.ops import roi_align as reference
    x, rois = torch.randn(2, 6, 20, 25, requires_grad=True), rois_of('random', torch.float32)
    output, grad_x = roi_align(ours, x.detach(), rois, 0.25, 0, True)
    expected = reference(x, rois, (7, 5), 0.25, 0, True)
    grad = torch.linspace(-1, 1, output.numel()).view(output.shape)
    assert same(output, expected) and same(grad_x, torch.autograd.grad(expected, x, grad)[0])


@pytest.mark.parametrize('modules', ['stand-in', pytest.param('compiled', marks=needs_compiled)])
def test_roi_align_takes_one_dtype(modules):
    module = ours if modules == 'stand-in' else compiled
    x = torch.randn(2, 6, 20, 25, dtype=torch.float64)
    with pytest.raises(RuntimeError, match='[Ff]loat|type'):
        roi_align(module, x, rois_of('random', torch.float32), 0.25, 0, True)


def test_roi_align_runs_where_deterministic_algorithms_are_asked_for():
    torch.use_deterministic_algorithms(True)
    try:
        roi_align(ours, torch.randn(2, 6, 20, 25), rois_of('random', torch.float32), 0.25, 0, True)
    finally:
        torch.use_deterministic_algorithms(False)


def test_maxima_refuse():
    with pytest.raises(NotImplementedError, match='MMCV=compiled tools/install.sh'):
        roi_align(ours, torch.randn(2, 6, 20, 25), rois_of('random', torch.float32), 0.25, 0, True, pool_mode=0)


# ---- deformable convolutions ----

LIMIT = 1e-5

def close(a, b):
    """Compare relative to the largest value: sums of many terms are in another order."""
    a, b = a.double(), b.double()
    assert a.shape == b.shape
    scale = b.abs().max().clamp(min=1e-30)
    assert (a - b).abs().max() <= LIMIT * scale


SHAPES = {
    'plain': dict(stride=(1, 1), pad=(1, 1), dilation=(1, 1), group=1, deformable_group=1),
    'grouped': dict(stride=(2, 1), pad=(2, 1), dilation=(1, 2), group=2, deformable_group=4),
}


def tensors(shape, offsets, dtype, kernel=(3, 2), channels=8, out=6, batch=3, size=(9, 8)):
    draw = torch.Generator().manual_seed(0)
    height, width = ((s + 2 * p - d * (k - 1) - 1) // t + 1 for s, p, d, k, t in
                     zip(size, shape['pad'], shape['dilation'], kernel, shape['stride']))
    taps = shape['deformable_group'] * kernel[0] * kernel[1]

    def random(*sizes):
        return torch.randn(*sizes, generator=draw).to(dtype)

    offset = random(batch, 2 * taps, height, width)
    offset = {'none': offset * 0, 'whole': (2 * offset).round(), 'any': 2 * offset, 'far': 1e4 * offset}[offsets]
    return dict(input=random(batch, channels, *size), offset=offset,
                mask=random(batch, taps, height, width).sigmoid(), bias=random(out),
                weight=random(out, channels // shape['group'], *kernel),
                grad=random(batch, out, height, width), empty=torch.zeros(0, dtype=dtype))


def deform_conv(module, t, shape):
    options = dict(kH=3, kW=2, **{f'd{a}': shape['stride'][i] for i, a in enumerate('HW')},
                   **{f'pad{a}': shape['pad'][i] for i, a in enumerate('HW')},
                   **{f'dilation{a}': shape['dilation'][i] for i, a in enumerate('HW')},
                   group=shape['group'], deformable_group=shape['deformable_group'], im2col_step=3)
    output = torch.empty_like(t['grad'])
    grads = {name: torch.zeros_like(t[name]) for name in ('input', 'offset', 'weight')}
    module.deform_conv_forward(t['input'], t['weight'], t['offset'], output, t['empty'], t['empty'], **options)
    module.deform_conv_backward_input(t['input'], t['offset'], t['grad'], grads['input'], grads['offset'], t['weight'],
                                      t['empty'], **options)
    module.deform_conv_backward_parameters(t['input'], t['offset'], t['grad'], grads['weight'], t['empty'], t['empty'],
                                           scale=1, **options)
    return dict(output=output, **grads)


def modulated_deform_conv(module, t, shape, with_bias):
    options = dict(kernel_h=3, kernel_w=2, **{f'{name}_{a}': shape[name][i] for i, a in enumerate('hw')
                                              for name in ('stride', 'pad', 'dilation')},
                   group=shape['group'], deformable_group=shape['deformable_group'], with_bias=with_bias)
    bias = t['bias'] if with_bias else t['empty']
    output = torch.empty_like(t['grad'])
    grads = {name: torch.zeros_like(t[name]) for name in ('input', 'weight', 'offset', 'mask')}
    grads['bias'] = torch.zeros_like(bias)
    module.modulated_deform_conv_forward(t['input'], t['weight'], bias, t['empty'], t['offset'], t['mask'], output,
                                         t['empty'], **options)
    module.modulated_deform_conv_backward(t['input'], t['weight'], bias, t['empty'], t['offset'], t['mask'], t['empty'],
                                          grads['input'], grads['weight'], grads['bias'], grads['offset'],
                                          grads['mask'], t['grad'], **options)
    return dict(output=output, **grads)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('offsets', ['none', 'whole', 'any', 'far'])
@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('op', ['deform_conv', 'modulated', 'modulated with bias'])
def test_deformable_convolutions(theirs, op, shape, offsets, dtype):
    shape = SHAPES[shape]
    found = {}
    for module in (ours, theirs):
        t = tensors(shape, offsets, dtype)
        found[module] = (deform_conv(module, t, shape) if op == 'deform_conv' else
                         modulated_deform_conv(module, t, shape, op.endswith('bias')))
    for name, value in found[theirs].items():
        if value.numel():
            close(found[ours][name], value)


# ---- the rest ----

def test_the_others_refuse():
    for name in ('roi_pool_forward', 'nms_rotated', 'ms_deform_attn_forward', 'an_op_of_a_later_mmcv'):
        op = getattr(ours, name)
        with pytest.raises(NotImplementedError, match=f'{name} is an op of mmcv .* MMCV=compiled tools/install.sh'):
            op(torch.zeros(1), a=1)
    with pytest.raises(AttributeError):
        getattr(ours, '__path__')  # noqa: B009  a module's own names are no ops


@needs_compiled
def test_every_name_of_the_compiled_module_is_there(theirs):
    for name in dir(theirs):
        if not name.startswith('_'):
            assert callable(getattr(ours, name)), name


# ---- in mmcv and mmdet ----

# Puts the module of a file (argument 1) in the place of mmcv's.
_WITH_EXT = """
import importlib.util
import sys
import mmcv
import torch
spec = importlib.util.spec_from_file_location('mmcv._ext', sys.argv[1])
mmcv._ext = sys.modules['mmcv._ext'] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mmcv._ext)
"""
_BATCHED_NMS = _WITH_EXT + """
from mmcv.ops import batched_nms
torch.manual_seed(0)
boxes = torch.rand(3000, 4) * 500
boxes[:, 2:] += boxes[:, :2]
print([batched_nms(boxes, torch.rand(3000), torch.randint(0, 5, (3000, )), dict(type='nms', iou_threshold=0.5, **more))
       [1].tolist() for more in ({}, dict(offset=1), dict(split_thr=1000))])
"""
_TRAINING = _WITH_EXT + """
import runpy
sys.path.insert(0, 'tools')
sys.argv = ['tools/train.py', *sys.argv[2:]]
runpy.run_path('tools/train.py', run_name='__main__')
import mmcv._ext
print('ops from', mmcv._ext.__file__)
"""


def run(code, *arguments):
    done = subprocess.run([sys.executable, '-c', code, *map(str, arguments)], text=True, capture_output=True, cwd=ROOT,
                          env=dict(os.environ, OMP_NUM_THREADS='1'), timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_compiled
@pytest.mark.slow
def test_batched_nms():
    assert run(_BATCHED_NMS, STAND_IN) == run(_BATCHED_NMS, compiled.__file__)


@needs_compiled
@pytest.mark.slow
def test_a_training_ends_with_the_same_bits(tmp_path):
    """NMS and RoIAlign, forward and backward, in the demo's Mask R-CNN: an epoch and its validation."""
    subprocess.run([sys.executable, 'tools/dataset_converters/digits.py', tmp_path / 'data', '--scale', 'tiny'],
                   cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    weights = {}
    for name, ext in dict(stand_in=STAND_IN, compiled=compiled.__file__).items():
        work_dir = tmp_path / name
        changes = [f'{loader}.{option}' for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader')
                   for option in (f'dataset.data_root={tmp_path}/data/coco/', 'num_workers=0',
                                  'persistent_workers=False')]
        changes += [f'{part}.ann_file={tmp_path}/data/coco/annotations/instances_val.json'
                    for part in ('val_evaluator', 'test_evaluator')]
        printed = run(_TRAINING, ext, 'configs/mask-rcnn_localvmamba-nano_digits.py', '--work-dir', work_dir,
                      '--cfg-options', 'train_cfg.max_epochs=1', 'randomness.seed=0', *changes)
        assert f'ops from {ext}' in printed and 'coco/segm_mAP' in printed
        weights[name] = torch.load(work_dir / 'epoch_1.pth', weights_only=True)['state_dict']
    assert weights['stand_in'].keys() == weights['compiled'].keys() and len(weights['compiled']) > 100
    for name, value in weights['compiled'].items():
        assert torch.equal(weights['stand_in'][name], value), name
