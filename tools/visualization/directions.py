"""Draw the scan directions of every block of a configuration's backbone (the paper's Figs. 4 and 5).

    python tools/visualization/directions.py configs/localvim-t_8xb128_in1k.py --out directions.png
"""
import argparse
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, DefaultScope

from mmlocalmamba.visualization import draw_directions


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='configuration file of any task')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, metavar='KEY=VALUE',
                        help='override settings, for example model.backbone.directions=directions.json')
    parser.add_argument('--out', required=True, help='file to write; the ending chooses the format')
    args = parser.parse_args()
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(args.cfg_options)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        backbone = MODELS.build(cfg.model.backbone)
    figure = draw_directions(backbone.directions, stages=getattr(backbone, 'depths', None))
    figure.suptitle(Path(args.config).stem, fontsize=9)
    figure.savefig(args.out, dpi=110)
    print(f'scan directions of {args.config}: {args.out}')


if __name__ == '__main__':
    main()
