"""Evaluate an exported file by a configuration's test, to see what the other format or precision costs.

    python tools/deployment/evaluate.py CONFIG FILE.{onnx,pt2} [--runtime onnxruntime|openvino]

The data, their preparation and the metrics are those of the configuration's test. The pipeline must give images of the
file's size. For detectors, only boxes are evaluated, not masks.
"""
import argparse
import sys

import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.evaluator import Evaluator
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData

from mmlocalmamba.deployment.runtimes import open_file


def to_class(sample, logits):
    sample.set_pred_score(torch.from_numpy(logits).softmax(-1))


def to_pixels(sample, logits):
    """Resize logits to the original size of the image, as MMSegmentation does."""
    resized = torch.nn.functional.interpolate(torch.from_numpy(logits)[None], size=sample.ori_shape, mode='bilinear')
    sample.pred_sem_seg = PixelData(data=resized[0].argmax(0, keepdim=True))


def to_boxes(sample, boxes, labels, *masks):
    found = labels >= 0
    scale = np.tile(np.float32(sample.scale_factor), 2)
    sample.pred_instances = InstanceData(
        bboxes=torch.from_numpy(boxes[found, :4] / scale), scores=torch.from_numpy(boxes[found, 4]),
        labels=torch.from_numpy(labels[found]))


TASKS = {'classification': to_class, 'segmentation': to_pixels, 'detection': to_boxes}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='configuration file')
    parser.add_argument('file', help='.onnx or .pt2 file of tools/deployment/export.py')
    parser.add_argument('--runtime', choices=['onnxruntime', 'openvino'], help='runtime of an .onnx file')
    parser.add_argument('--threads', type=int, help="threads of the runtime (default: the runtime's)")
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='override settings')
    args = parser.parse_args()
    cfg = Config.fromfile(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    opened = open_file(args.file, args.runtime, args.threads)
    task, expected = opened.metadata.get('task'), (opened.metadata.get('height'), opened.metadata.get('width'))
    if task not in TASKS:
        sys.exit(f'{args.file} holds {task or "no task"}: only {", ".join(TASKS)} can be evaluated')
    cfg.test_dataloader.update(batch_size=1, num_workers=0, persistent_workers=False)
    metrics = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    for metric in metrics:
        if task == 'detection' and 'metric' in metric:
            metric.metric = 'bbox'
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        loader = Runner.build_dataloader(cfg.test_dataloader)
        preprocessor = cfg.model.get('data_preprocessor') or dict(cfg.data_preprocessor)
        preprocess = MODELS.build({'type': 'ClsDataPreprocessor', **preprocessor})
        evaluator = Evaluator([dict(metric) for metric in metrics])
        evaluator.dataset_meta = loader.dataset.metainfo
        for batch in loader:
            data = preprocess(batch, False)
            images = data['inputs'].numpy()
            if images.shape[-2:] != expected:
                sys.exit(f'{args.file} takes images of {expected[0]}x{expected[1]}, but the test has an image of '
                         f'{images.shape[-2]}x{images.shape[-1]}: export with --shape, or change the test')
            outputs = opened.run(images)
            sample, = data['data_samples']
            TASKS[task](sample, *(outputs if task == 'detection' else [outputs[0][0]]))
            evaluator.process(data_samples=[sample], data_batch=batch)
        results = evaluator.evaluate(len(loader.dataset))
    for name, value in results.items():
        print(f'{name}: {value:.4f}' if isinstance(value, float) else f'{name}: {value}')


if __name__ == '__main__':
    main()
