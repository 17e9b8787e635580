"""Evaluate a trained detector or segmentor and draw its predictions. This is the second half of `make demo`.

The script writes metrics.json, scan_orders.png and detections.png into the work directory. For a segmentor, it writes
segmentation.png instead of detections.png:

    python tools/demo.py configs/upernet_localvmamba-nano_digits.py work_dirs/upernet_localvmamba-nano_digits
"""
import argparse
import subprocess
import sys
from pathlib import Path

from mmengine.config import Config
from mmengine.fileio import dump
from mmengine.runner import Runner, find_latest_checkpoint
from PIL import Image, ImageOps

from mmlocalmamba.openmmlab.inference import inferencer
from mmlocalmamba.predict import draw, read_picture

TOOLS = Path(__file__).resolve().parent
PANEL, GAP = 400, 8  # pixels


def draw_found(predictor, paths, out, columns=4):
    """Draw the predictions for pictures beside each other."""
    panels = []
    for path in paths:
        picture = read_picture(Path(path), predictor.channels)
        panels.append(ImageOps.contain(draw(picture, predictor.run(picture), predictor), (PANEL, PANEL)))
    rows = -(-len(panels) // columns)
    sheet = Image.new('RGB', (columns * (PANEL + GAP), rows * (PANEL + GAP)), 'white')
    for index, panel in enumerate(panels):
        sheet.paste(panel, (index % columns * (PANEL + GAP), index // columns * (PANEL + GAP)))
    sheet.save(out)


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
    dataset = runner.test_dataloader.dataset
    paths = [dataset.get_data_info(index)['img_path'] for index in range(min(4 * args.rows, len(dataset)))]
    draw_found(inferencer(args.config, cfg.load_from, score=0.5), paths, args.work_dir / picture)
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
