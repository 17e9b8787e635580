"""Test a checkpoint: what `mim test mmlocalmamba CONFIG --checkpoint FILE` runs.

The configuration may belong to mmpretrain, mmdet or mmsegmentation: its
`default_scope` says which.
"""
from mmengine.config import ConfigDict
from runner import add_common_arguments, build_runner, load_config, parse_args

from mmlocalmamba.engine.data import annotations_named


def use_tta(cfg):
    """Puts the configuration's test-time augmentation around its model."""
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

    with annotations_named():
        build_runner(cfg).test()


if __name__ == '__main__':
    main()
