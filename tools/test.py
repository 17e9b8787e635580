"""Test a checkpoint. `mim test mmlocalmamba CONFIG --checkpoint FILE` runs this script.

The configuration may belong to mmpretrain, mmdet or mmsegmentation. Its `default_scope` names the package.
"""
from mmengine.config import ConfigDict
from runner import add_common_arguments, build_runner, load_config, parse_args

from mmlocalmamba.openmmlab.engine.data import naming_annotation_files


def use_tta(cfg):
    """Put the configuration's test-time augmentation around its model."""
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    dataset.pipeline = cfg.tta_pipeline


def main():
    parser = add_common_arguments(__doc__)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--tta', action='store_true',
        help="use the configuration's test-time augmentation (tta_model and tta_pipeline)")
    args = parse_args(parser)
    cfg = load_config(args)

    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.tta:
        if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
            parser.error('--tta: the configuration has no tta_model and tta_pipeline')
        use_tta(cfg)

    with naming_annotation_files():
        build_runner(cfg).test()


if __name__ == '__main__':
    main()
