#!/usr/bin/env python
"""Try our backbones in upstream's own configurations of mmdet, mmsegmentation and mmpretrain.

Each folder of the installed packages' configurations gives one configuration: the plainest one with a ResNet-50. It
runs with its own backbone and with each of our backbones at nano size (mmlocalmamba.with_backbone). Each case runs in
its own process: it builds and initialises the model, makes one training step and one prediction on small random images.
If upstream's own backbone fails as well, our backbones are not the cause.

    research/compatibility.py                        # run all cases that the table lacks
    research/compatibility.py mmdet/atss mmseg       # run only these
    research/compatibility.py --again mmdet/atss     # run these again
    research/compatibility.py --report               # print the table as Markdown

The table has a row for each stack, configuration and backbone. An interrupted run continues.
"""
import argparse
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tools'))
from records import read_rows, write_rows

TABLE = Path(__file__).resolve().parent / 'results' / 'compatibility.csv'
COLUMNS = ['stack', 'package', 'method', 'config', 'backbone', 'result', 'step', 'reason', 'without_gradient']
OURS = {
    'LocalVMamba': dict(type='mmlocalmamba.LocalVMamba', arch='nano', drop_path_rate=0.0),
    'LocalVim': dict(type='mmlocalmamba.LocalVim', arch='nano', drop_path_rate=0.0),
}
UPSTREAM = 'upstream'
STACKS = ('openmmlab', 'onedl')
PACKAGES = ('mmdet', 'mmseg', 'mmpretrain')

# Folders without a method of their own: they change the data set, schedule, augmentation or backbone.
NOT_METHODS = {
    'mmdet': ('albu_example cityscapes common dcn dcnv2 deepfashion detectors empirical_attention fp16 gcnet gn gn+ws '
              'instaboost legacy_1.x lvis misc objects365 openimages pascal_voc reid resnet_strikes_back scratch '
              'seesaw_loss selfsup_pretrain simple_copy_paste strong_baselines timm_example v3det wider_face '
              # methods for videos
              'bytetrack deepsort mask2former_vis masktrack_rcnn ocsort qdtrack sort strongsort').split(),
    'mmseg': [],
    'mmpretrain': 'arcface chinese_clip cspnet seresnet wrn'.split(),
}
# Configurations that replace the plainest one, or that stand for a folder without a ResNet-50.
CHOSEN = {
    'mmdet/cascade_rcnn': 'cascade-mask-rcnn_r50_fpn_1x_coco',
    'mmdet/cascade_rpn': 'cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco',
    'mmdet/centernet': 'centernet-update_r50-caffe_fpn_ms-1x_coco',
    'mmdet/detectors': 'detectors_htc-r50_1x_coco',
    'mmdet/faster_rcnn': 'faster-rcnn_r50_fpn_1x_coco',
    'mmdet/faster_rcnn-c4': 'faster-rcnn_r50-caffe-c4_ms-1x_coco',
    'mmdet/guided_anchoring': 'ga-retinanet_r50_fpn_1x_coco',
    'mmdet/libra_rcnn': 'libra-faster-rcnn_r50_fpn_1x_coco',
    'mmdet/nas_fpn': 'retinanet_r50_nasfpn_crop640-50e_coco',
    'mmdet/mask2former-panoptic': 'mask2former_r50_8xb2-lsj-50e_coco-panoptic',
    'mmdet/pisa': 'faster-rcnn_r50_fpn_pisa_1x_coco',
    'mmdet/rtmdet': 'rtmdet_s_8xb32-300e_coco',
    'mmdet/sabl': 'sabl-faster-rcnn_r50_fpn_1x_coco',
    'mmdet/yolo': 'yolov3_d53_8xb8-ms-608-273e_coco',
    'mmdet/yolox': 'yolox_s_8xb8-300e_coco',
    'mmseg/ocrnet': 'ocrnet_r101-d8_8xb2-40k_cityscapes-512x1024',
    'mmseg/segformer': 'segformer_mit-b0_8xb2-160k_ade20k-512x512',
    'mmpretrain/csra': 'resnet101-csra_1xb16_voc07-448px',
    'mmpretrain/resnet': 'resnet50_8xb32_in1k',
}
# A fast sample of all kinds of methods, for research/tests/test_compatibility.py.
SAMPLE = ['mmdet/atss', 'mmdet/yolof', 'mmdet/mask2former', 'mmdet/panoptic_fpn', 'mmdet/rtmdet', 'mmseg/deeplabv3plus',
          'mmseg/segformer', 'mmseg/sem_fpn', 'mmpretrain/resnet', 'mmpretrain/simsiam']
SIDE = {'mmdet': 128, 'mmseg': 128, 'mmpretrain': 64}
_OBJECT = 36
_FEWER = dict(num=32, max_per_img=20, num_points=256, nms_pre=200)


def stack():
    try:
        version('onedl-mmengine')
    except PackageNotFoundError:
        return 'openmmlab'
    return 'onedl'


def config_folder(package):
    return Path(importlib.import_module(package).__file__).parent / '.mim' / 'configs'


def methods(package):
    """Return {method: path of its configuration}."""
    folder, found = config_folder(package), {}
    for path in sorted(folder.iterdir()):
        plain = sorted([*path.glob('*r50*.py'), *path.glob('*resnet50*.py')], key=lambda p: (len(p.name), p.name))
        if plain and path.name not in NOT_METHODS[package]:
            found[path.name] = plain[0]
    for name, stem in CHOSEN.items():
        if name.startswith(f'{package}/'):
            method = name.split('/')[1]
            path, = folder.glob(f'*/{stem}.py')
            found[method] = path
    return dict(sorted(found.items()))


# ---- one configuration ----

def load(path, backbone):
    """Load a configuration as a user writes it: a file that inherits another and replaces its backbone."""
    from mmengine.config import Config
    if backbone == UPSTREAM:
        return Config.fromfile(path)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / 'mine.py'
        file.write_text(f'_base_ = {str(path)!r}\nmodel = __import__("mmlocalmamba").with_backbone(_base_.model, '
                        f'{OURS[backbone]!r})\n')
        return Config.fromfile(file)


def parts(value):
    """Yield all dicts in a configuration."""
    if isinstance(value, dict):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        yield from parts(part)


def prepare(cfg, package):
    """Remove downloads from a configuration, and keep images small."""
    for part in parts(cfg.model):
        if isinstance(part.get('init_cfg'), dict) and part['init_cfg'].get('type') == 'Pretrained':
            part['init_cfg'] = None
    if cfg.model.get('teacher_config'):
        cfg.model.teacher_config = str(config_folder(package).parent / cfg.model.teacher_config)
    for part in parts(cfg.model):
        for key in {'pretrained', 'teacher_ckpt'} & set(part):
            part[key] = None
    if cfg.model.get('num_queries'):
        cfg.model.num_queries = 100  # a small image has few locations
    queries = any('num_proposals' in part for part in parts(cfg.model))  # each proposal is a prediction
    for part in parts(cfg.model):  # thousands of boxes and points would take most of the time
        for key, most in _FEWER.items():
            if isinstance(part.get(key), int) and part[key] > most and not queries:
                part[key] = most
    if 'batch_augments' in cfg.model.get('data_preprocessor', {}):
        cfg.model.data_preprocessor.batch_augments = None  # some enlarge the images to 1024x1024
    if package == 'mmseg':
        if cfg.model.data_preprocessor.get('size'):
            cfg.model.data_preprocessor.size = (SIDE[package], ) * 2
        cfg.model.test_cfg.mode = 'whole'
    elif package == 'mmpretrain':
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)


def classes_of(cfg):
    return min((part['num_classes'] for part in parts(cfg.model) if isinstance(part.get('num_classes'), int)),
               default=10)


def detection_data(cfg):
    """Return two images with three and four objects: boxes, masks and a label image."""
    import numpy as np
    from mmdet.structures.mask import BitmapMasks
    from mmdet.testing import demo_mm_inputs, demo_mm_proposals
    from mmengine.structures import InstanceData
    # A deformable convolution needs levels of at least 3x3, and a mixture model needs many boxes.
    large = {'DDODHead', 'TOODHead', 'LAD'} & {str(part.get('type')) for part in parts(cfg.model)}
    side = SIDE['mmdet'] * (3 if large else 1)
    scales = [part['scale_factor'] for part in parts(cfg.get('train_pipeline', []))
              if part.get('type') == 'SegRescale']
    with_masks = any(part.get('with_mask', part.get('type') == 'LoadPanopticAnnotations')
                     for part in parts(cfg.get('train_pipeline', [])))
    np.random.seed(0)
    data = demo_mm_inputs(2, (3, side, side), num_items=[3, 4], with_semantic=True,
                          sem_seg_output_strides=round(1 / scales[0]) if scales else 1)
    for sample in data['data_samples']:
        count = len(sample.gt_instances)
        corners = torch.randint(0, side - _OBJECT, (count, 2))
        masks = np.zeros((count, side, side), np.uint8)
        for mask, (x, y) in zip(masks, corners.tolist()):
            mask[y:y + _OBJECT, x:x + _OBJECT] = 1
        boxes = torch.cat([corners, corners + _OBJECT], 1).float()
        labels = torch.arange(count) % classes_of(cfg)
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
        if with_masks:  # RTMDet would ask BitmapMasks for centres, which they lack
            sample.gt_instances.masks = BitmapMasks(masks, side, side)
        sample.ignored_instances = InstanceData(bboxes=boxes[:0], labels=labels[:0])
        sample.set_metainfo(dict(scale_factor=(1.0, 1.0), batch_input_shape=(side, side), pad_shape=(side, side)))
    if cfg.model.type == 'FastRCNN':
        for sample, proposals in zip(data['data_samples'], demo_mm_proposals([(3, side, side)] * 2, 20)):
            sample.proposals = proposals
    if 'semi_train_cfg' in cfg.model:
        for sample in data['data_samples']:
            sample.set_metainfo(dict(homography_matrix=np.eye(3, dtype=np.float32)))
        names = ('sup', 'unsup_teacher', 'unsup_student')
        train = {key: dict.fromkeys(names, value) for key, value in data.items()}
        return train, data
    return data, data


def segmentation_data(cfg):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample
    side = SIDE['mmseg']
    shape = dict(img_shape=(side, side), ori_shape=(side, side), pad_shape=(side, side))
    labels = torch.randint(0, classes_of(cfg), (2, 1, side // 16, side // 16))
    labels = labels.repeat_interleave(16, 2).repeat_interleave(16, 3)
    data = dict(inputs=[torch.randint(0, 256, (3, side, side), dtype=torch.uint8) for _ in range(2)],
                data_samples=[SegDataSample(metainfo=shape, gt_sem_seg=PixelData(data=label)) for label in labels])
    return data, data


def classification_data(cfg):
    from mmpretrain.structures import DataSample
    side = SIDE['mmpretrain']

    def images(size):
        return torch.randint(0, 256, (2, 3, size, size)).float()

    samples = [DataSample().set_gt_label(label) for label in (1, 2)]
    if cfg.model.data_preprocessor.get('type') == 'SelfSupDataPreprocessor':
        views = [side, side, *[side // 2] * 6] if cfg.model.type == 'SwAV' else [side, side]
        return dict(inputs=[images(size) for size in views], data_samples=samples), images(side)
    if cfg.model.type == 'SparK':
        return dict(inputs=images(side), data_samples=samples), images(side)
    if cfg.model.head.type == 'CSRAClsHead':
        samples = [DataSample().set_gt_score(torch.rand(cfg.model.head.num_classes).round()) for _ in range(2)]
    data = dict(inputs=images(side), data_samples=samples)
    return data, data


def attempt(path, package, backbone, report):
    """Run a case, calling report(step) before each step. Return the names of the parameters without gradient."""
    from mmengine.logging import MessageHub
    from mmengine.model import revert_sync_batchnorm
    from mmengine.optim import OptimWrapper
    from mmengine.registry import MODELS, init_default_scope
    torch.manual_seed(0)
    for counter in ('iter', 'epoch'):  # some losses read these counters
        MessageHub.get_current_instance().update_info(counter, 0)
    report('configuration')
    cfg = load(path, backbone)
    prepare(cfg, package)
    report('building')
    init_default_scope(cfg.get('default_scope', package))
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    report('initialising')
    model.init_weights()
    report('training')
    data = dict(mmdet=detection_data, mmseg=segmentation_data, mmpretrain=classification_data)[package]
    train, test = data(cfg)
    optimizer = OptimWrapper(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5))
    model.train()
    inputs = model.data_preprocessor(train, True)
    losses = model(**inputs, mode='loss') if isinstance(inputs, dict) else model(*inputs, mode='loss')
    loss, _ = model.parse_losses(losses)
    optimizer.backward(loss)
    if not torch.isfinite(loss):
        raise FloatingPointError(f'the loss is {loss}')
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    optimizer.step()
    report('prediction')
    model.eval()
    with torch.no_grad():
        outputs = model(test, mode='tensor') if torch.is_tensor(test) else model.test_step(test)
    if not len(outputs):
        raise ValueError('the model predicted nothing')
    return unused


def summary(names):
    """Return the first two parts of parameter names, without repetition."""
    return ' '.join(sorted({'.'.join(name.split('.')[:2]) for name in names}))


def worker(channel, *case):
    os.setsid()
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    sys.stdout = sys.stderr = open(os.devnull, 'w')
    step = ''

    def report(name):
        nonlocal step
        step = name
        channel.send(('step', name))

    try:
        channel.send(('ok', summary(attempt(*case, report))))
    except BaseException as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = ' '.join(str(error).split())
        channel.send(('failed', f'{type(error).__name__}: {text[:200]} [{Path(place.filename).name}:{place.lineno}]'))


def from_server():
    """Return the context of processes that a server forks, which has imported the packages and computed nothing.

    A fork of a process whose autograd engine has threads cannot compute gradients.
    """
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([*(f'{package}.models' for package in PACKAGES), 'mmdet.testing',
                                    'mmlocalmamba.openmmlab.models', 'mmlocalmamba.openmmlab.necks'])
    return context


def in_process(path, package, backbone, timeout, context=None):
    """Run a case in a process. Return the result, the failed step, the reason and the parameters without gradient."""
    ours, theirs = multiprocessing.Pipe()
    process = (context or from_server()).Process(target=worker, args=(theirs, path, package, backbone))
    process.start()
    theirs.close()
    step, deadline = '', time.monotonic() + timeout
    try:
        while ours.poll(max(0, deadline - time.monotonic())):
            kind, text = ours.recv()
            if kind != 'step':
                return ('ok', '', '', text) if kind == 'ok' else ('failed', step, text, '')
            step = text
        return 'failed', step, f'not done after {timeout:g} s', ''
    except EOFError:
        process.join()
        return 'failed', step, f'the process ended with {process.exitcode}', ''
    finally:
        if process.is_alive():
            process.join(1)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


# ---- the table ----

def key(row):
    return tuple(row[name] for name in COLUMNS[:5])


def read(path):
    return {key(row): row for row in read_rows(path)}


def write(path, rows):
    write_rows(path, COLUMNS, [rows[key] for key in sorted(rows)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('only', nargs='*', metavar='PACKAGE[/METHOD]', help='run only these')
    parser.add_argument('--table', type=Path, default=TABLE,
                        help='table to extend (default: research/results/compatibility.csv)')
    parser.add_argument('--timeout', type=float, default=300, help='seconds for a case (default: %(default)g)')
    parser.add_argument('--again', action='store_true', help='run cases that are in the table, too')
    parser.add_argument('--report', action='store_true', help='only print the table as Markdown')
    args = parser.parse_args()
    rows = read(args.table)
    if args.report:
        print(markdown(rows.values()))
        return
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    warnings.simplefilter('ignore')
    cases = [(stack(), package, method, path.stem, backbone, path)
             for package in PACKAGES for method, path in methods(package).items() for backbone in (UPSTREAM, *OURS)
             if not args.only or package in args.only or f'{package}/{method}' in args.only]
    for *case, path in cases:
        if tuple(case) in rows and not args.again:
            continue
        start = time.monotonic()
        outcome = in_process(path, case[1], case[4], args.timeout)
        rows.update({tuple(case): dict(zip(COLUMNS, [*case, *outcome]))})
        write(args.table, rows)
        print(f'{"/".join(case[1:3]):32}{case[4]:12}{time.monotonic() - start:5.0f} s  '
              + ' '.join(text for text in outcome if text), flush=True)


def markdown(rows):
    """Return a table for each package, and the reasons. A cell is OpenMMLab's outcome / OneDL's if they differ."""
    lines, reasons = [], []
    found = {}
    for row in rows:
        found.setdefault((row['package'], row['method'], row['config']), {})[row['stack'], row['backbone']] = row

    def outcome(row):
        if row is None or row['result'] == 'ok':
            return '-' if row is None else 'yes'
        reason = f'{row["step"]}: {row["reason"]}'
        if reason not in reasons:
            reasons.append(reason)
        return f'no ({reasons.index(reason) + 1})'

    for package in PACKAGES:
        names = sorted(name for name in found if name[0] == package)
        lines += [f'## {package}', '', f'| Method | Configuration | Its own | {" | ".join(OURS)} | Without gradient |',
                  '|---|---|---|' + '---|' * len(OURS) + '---|']
        for name in names:
            cells = []
            for backbone in (UPSTREAM, *OURS):
                both = [outcome(found[name].get((s, backbone))) for s in STACKS]
                cells.append(both[0] if both[0] == both[1] else ' / '.join(both))
            unused = sorted({part for (_, backbone), row in found[name].items() if backbone in OURS
                             for part in row['without_gradient'].split()})
            cells.append(' '.join(f'`{part}`' for part in unused))
            lines.append(f'| {name[1]} | {name[2]} | {" | ".join(cells)} |')
        counts = [sum(all(found[name].get((stack, backbone), {}).get('result', 'ok') == 'ok'
                          for stack in STACKS) for name in names) for backbone in (UPSTREAM, *OURS)]
        lines += [f'| **{len(names)}** | | {" | ".join(f"**{count}**" for count in counts)} | |', '']
    lines += ['## Reasons', '']
    # Backticks inside a reason would end the code span.
    lines += [f'{number}. `{reason.replace("`", chr(39))}`' for number, reason in enumerate(reasons, 1)]
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    main()
