"""Evaluate a trained detector or segmentor and draw its predictions. This is the second half of `make demo`.

The script writes metrics.json, scan_orders.png and detections.png into the work directory. For a segmentor, it writes
segmentation.png instead of detections.png:

    python tools/demo.py configs/upernet_localvmamba-nano_digits.py work_dirs/upernet_localvmamba-nano_digits
"""
import argparse
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.patches import Patch, Rectangle
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.fileio import dump
from mmengine.runner import Runner, find_latest_checkpoint
from PIL import Image

matplotlib.use('Agg')
from matplotlib import pyplot as plt

TOOLS = Path(__file__).resolve().parent


def draw_image(axes, image, instances, classes):
    """Draw an image with masks, boxes and labels."""
    colors = plt.get_cmap('tab10').colors
    image = image / 255
    labels = instances.labels.tolist()
    for mask, label in zip(np.asarray(instances.masks, dtype=bool), labels, strict=True):
        image[mask] = 0.5 * image[mask] + 0.5 * np.array(colors[label % len(colors)])
    axes.imshow(image)
    taken = []
    for box, label, score in zip(
            instances.bboxes.tolist(), labels, instances.scores.tolist(), strict=True):
        color = colors[label % len(colors)]
        left, top, right, bottom = box
        axes.add_patch(Rectangle(
            (left, top), right - left, bottom - top, fill=False, edgecolor=color, linewidth=2))
        x, y, alignment = place_label(box, image.shape[:2], taken)
        axes.text(
            x, y, f'{classes[label]}  {score:.2f}', color='white', fontsize=10, verticalalignment=alignment,
            bbox=dict(facecolor=color, edgecolor='none', pad=1))
    axes.axis('off')


def place_label(box, size, taken):
    """Return the first free place for a label: above the box, below it, or inside at an edge. Add it to ``taken``."""
    left, top, _, bottom = box
    height, width = 0.055 * size[0], 0.17 * size[1]  # the approximate size of a label
    x = min(left, size[1] - width)
    places = [(top, 'bottom', top - height), (bottom, 'top', bottom), (top, 'top', top),
              (bottom, 'bottom', bottom - height)]
    free = [place for place in places if 0 <= place[2] <= size[0] - height and not any(
        abs(place[2] - other_y) < height and abs(x - other_x) < width for other_x, other_y in taken)]
    y, alignment, upper = (free or places[2:])[0]
    taken.append((x, upper))
    return x, y, alignment


def draw_labels(axes, image, labels, palette):
    """Draw an image with the colour of its class over each pixel, except over background."""
    image, found = image / 255, labels > 0
    image[found] = 0.25 * image[found] + 0.75 * np.array(palette)[labels[found]] / 255
    axes.imshow(image)


@torch.no_grad()
def draw_found(runner, out, rows=3, columns=4, threshold=0.5):
    """Draw the first validation images with the model's predictions."""
    dataset = runner.test_dataloader.dataset
    figure, grid = plt.subplots(rows, columns, figsize=(3.4 * columns, 3.4 * rows), squeeze=False, layout='constrained')
    for axes in grid.flat:
        axes.axis('off')
    for index, axes in zip(range(len(dataset)), grid.flat, strict=False):
        result, = runner.model.test_step(pseudo_collate([dataset[index]]))
        image = np.array(Image.open(result.img_path).convert('RGB'))
        if 'pred_sem_seg' in result:
            draw_labels(axes, image, result.pred_sem_seg.data[0].cpu().numpy(), dataset.metainfo['palette'])
        else:
            found = result.pred_instances.cpu()
            draw_image(axes, image, found[found.scores >= threshold], dataset.metainfo['classes'])
    if 'pred_sem_seg' in result:
        classes = list(zip(dataset.metainfo['classes'], dataset.metainfo['palette'], strict=True))[1:]
        figure.legend(handles=[Patch(color=np.array(color) / 255, label=name) for name, color in classes],
                      ncols=len(classes), loc='outside lower center', fontsize=12)
        figure.suptitle('Validation images, the predicted class of each pixel')
    else:
        figure.suptitle(f'Validation images, detections with a score of {threshold} or more')
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='configuration of the detector or segmentor')
    parser.add_argument('work_dir', type=Path, help='work directory of its training')
    parser.add_argument('--rows', type=int, default=3, help='rows of four images (default: 3)')
    args = parser.parse_args()

    cfg = Config.fromfile(args.config)
    if cfg.default_scope not in ('mmdet', 'mmseg'):
        parser.error(f'{args.config} is neither a detector nor a segmentor: its scope is {cfg.default_scope}')
    picture = 'detections.png' if cfg.default_scope == 'mmdet' else 'segmentation.png'
    cfg.work_dir = str(args.work_dir)
    # The last checkpoint, because the best one was chosen on these images.
    cfg.load_from = find_latest_checkpoint(args.work_dir)
    if cfg.load_from is None:
        sys.exit(f'{args.work_dir} has no checkpoint: train the model first')
    runner = Runner.from_cfg(cfg)
    metrics = runner.test()
    dump(metrics, args.work_dir / 'metrics.json', indent=2)
    draw_found(runner, args.work_dir / picture, args.rows)
    subprocess.run(
        [sys.executable, TOOLS / 'draw.py', 'scans',
         '--out', args.work_dir / 'scan_orders.png'], check=True)

    print()
    for name, key in (('boxes', 'coco/bbox_mAP'), ('masks', 'coco/segm_mAP')):
        if key in metrics:
            print(f'{name}: AP {metrics[key]:.3f}, AP50 {metrics[key + "_50"]:.3f}')
    if 'mIoU' in metrics:
        print(f'pixels: mIoU {metrics["mIoU"]:.1f} %')
    print(f'checkpoint: {cfg.load_from}')
    for name in ('metrics.json', picture, 'scan_orders.png'):
        print(args.work_dir / name)


if __name__ == '__main__':
    main()
