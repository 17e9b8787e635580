"""The second half of `make demo`: evaluates a trained detector and draws what it
finds. Leaves in the work directory metrics.json, detections.png and
scan_orders.png.
"""
import argparse
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.patches import Rectangle
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.fileio import dump
from mmengine.runner import Runner, find_latest_checkpoint
from PIL import Image

matplotlib.use('Agg')
from matplotlib import pyplot as plt

TOOLS = Path(__file__).resolve().parent


def draw_image(axes, image, instances, classes):
    """Draws an image with masks, boxes and labels."""
    colors = plt.get_cmap('tab10').colors
    image = image / 255
    labels = instances.labels.tolist()
    for mask, label in zip(np.asarray(instances.masks, dtype=bool), labels, strict=True):
        image[mask] = 0.5 * image[mask] + 0.5 * np.array(colors[label % len(colors)])
    axes.imshow(image)
    for box, label, score in zip(
            instances.bboxes.tolist(), labels, instances.scores.tolist(), strict=True):
        color = colors[label % len(colors)]
        left, top, right, bottom = box
        axes.add_patch(Rectangle(
            (left, top), right - left, bottom - top, fill=False, edgecolor=color, linewidth=2))
        # Above the box, or inside it at the upper edge of the image.
        above = top > 0.07 * len(image)
        axes.text(
            left, top, f'{classes[label]}  {score:.2f}', color='white', fontsize=10,
            verticalalignment='bottom' if above else 'top',
            bbox=dict(facecolor=color, edgecolor='none', pad=1))
    axes.axis('off')


@torch.no_grad()
def draw_detections(runner, out, rows=3, columns=4, threshold=0.5):
    """Draws the first validation images with what the model finds in them."""
    dataset = runner.test_dataloader.dataset
    figure, grid = plt.subplots(rows, columns, figsize=(3.4 * columns, 3.4 * rows), squeeze=False)
    for axes in grid.flat:
        axes.axis('off')
    for index, axes in zip(range(len(dataset)), grid.flat, strict=False):
        result, = runner.model.test_step(pseudo_collate([dataset[index]]))
        found = result.pred_instances.cpu()
        image = np.array(Image.open(result.img_path).convert('RGB'))
        draw_image(axes, image, found[found.scores >= threshold], dataset.metainfo['classes'])
    figure.suptitle(f'Validation images, detections with a score of {threshold} or more')
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='configuration of the detector')
    parser.add_argument('work_dir', type=Path, help='where it was trained')
    args = parser.parse_args()

    cfg = Config.fromfile(args.config)
    cfg.work_dir = str(args.work_dir)
    # The last one, not the best on these very images.
    cfg.load_from = find_latest_checkpoint(args.work_dir)
    if cfg.load_from is None:
        sys.exit(f'{args.work_dir} has no checkpoint: train first')
    runner = Runner.from_cfg(cfg)
    metrics = runner.test()
    dump(metrics, args.work_dir / 'metrics.json', indent=2)
    draw_detections(runner, args.work_dir / 'detections.png')
    subprocess.run(
        [sys.executable, TOOLS / 'visualization/scan_orders.py',
         '--out', args.work_dir / 'scan_orders.png'], check=True)

    print()
    for name, key in (('boxes', 'coco/bbox_mAP'), ('masks', 'coco/segm_mAP')):
        print(f'{name}: AP {metrics[key]:.3f}, AP50 {metrics[key + "_50"]:.3f}')
    print(f'checkpoint: {cfg.load_from}')
    for name in ('metrics.json', 'detections.png', 'scan_orders.png'):
        print(args.work_dir / name)


if __name__ == '__main__':
    main()
