"""Compare parameters and FLOPs with the paper's Tables 1, 2, 3, 4 and 6 (arXiv 2403.09338).

    python research/reproduce_tables.py --out research/tables.md

The script builds each model from its configuration and runs it once at the paper's image size, which takes minutes on a
CPU. It fails if a row without a note differs: if neither way of counting is within 3 % of the paper's FLOPs, or if the
parameters round to another number.
"""
import argparse
import sys
from pathlib import Path
from typing import NamedTuple

from mmengine.config import Config
from mmengine.hub import get_config

from mmlocalmamba import config_path
from mmlocalmamba.files import write_whole

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'tools'))
from get_flops import SHAPES, as_in_the_paper, build, count_flops

TOLERANCE = 0.03
SMALL = {'model.backbone.arch': 'small'}


class Row(NamedTuple):
    """The paper's numbers for a model, and the configuration that builds it."""
    model: str
    config: str
    params: int  # millions
    flops: float  # GFLOPs
    accuracy: str
    options: dict = {}
    note: str = ''


MISPRINT = ("VMamba's README says 384. Its numbers of this backbone in UperNet, of the classifier and of the other "
            'Mask R-CNNs are within 0.2 % of ours, so we take it for a misprint.')


class Table(NamedTuple):
    title: str
    accuracy: str
    rows: list
    owner: str = "the paper's"  # of the accuracies


TABLES = [
    Table('Tables 1 and 2: ImageNet-1K, 224x224', 'top-1', [
        Row('LocalVim-T', 'localvim-t_8xb128_in1k', 8, 1.5, '76.2'),
        Row('LocalVim-T, no search', 'localvim-t-nosearch_8xb128_in1k', 8, 1.5, '75.8'),
        Row("LocalVim-T, middle class token (authors' README)", 'localvim-t-midcls_8xb128_in1k', 8, 1.5, '77.8'),
        Row('LocalVim-S', 'localvim-s_8xb128_in1k', 28, 4.8, '81.2'),
        Row('LocalVim-S, no search', 'localvim-s-nosearch_8xb128_in1k', 28, 4.8, '81.0'),
        Row('LocalVMamba-T', 'localvmamba-t_8xb128_in1k', 26, 5.7, '82.7'),
        Row('LocalVMamba-S', 'localvmamba-s_8xb128_in1k', 50, 11.4, '83.7'),
        Row('Vim-Ti', 'vim-t_8xb128_in1k', 7, 1.5, '73.1'),
        Row("Vim-Ti, middle class token (authors' README)", 'vim-t-midcls_8xb128_in1k', 7, 1.5, '76.1'),
        Row('Vim-S', 'vim-s_8xb128_in1k', 26, 5.1, '80.3'),
        Row('VMamba-T', 'vmamba-t_8xb128_in1k', 22, 5.6, '82.2'),
        Row('VMamba-S', 'vmamba-s_8xb128_in1k', 44, 11.2, '83.5'),
        Row('VMamba-B', 'vmamba-b_8xb128_in1k', 75, 18., '83.7'),
    ]),
    Table('Table 3: COCO, Mask R-CNN, 1280x800', 'box AP / mask AP', [
        Row('LocalVMamba-T, 1x', 'mask-rcnn_localvmamba-t_1x_coco', 45, 291, '46.7 / 42.2'),
        Row('LocalVMamba-S, 1x', 'mask-rcnn_localvmamba-s_1x_coco', 69, 414, '48.4 / 43.2'),
        Row('LocalVMamba-T, 3x', 'mask-rcnn_localvmamba-t_ms-3x_coco', 45, 291, '48.7 / 43.4'),
        Row('LocalVMamba-S, 3x', 'mask-rcnn_localvmamba-s_ms-3x_coco', 69, 414, '49.9 / 44.1'),
        Row('VMamba-T, 1x', 'mask-rcnn_vmamba-t_1x_coco', 42, 286, '46.5 / 42.1'),
        Row('VMamba-S, 1x', 'mask-rcnn_vmamba-t_1x_coco', 64, 400, '48.2 / 43.0', SMALL),
        Row("Swin-T, 1x (MMDetection's own file)", 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', 48, 267,
            '42.7 / 39.3'),
    ]),
    Table('Table 4: ADE20K, UperNet, 512x2048', 'mIoU single / multi-scale', [
        Row('LocalVim-T', 'upernet_localvim-t_8xb2-160k_ade20k-512x512', 36, 181, '43.4 / 44.4'),
        Row('LocalVim-S', 'upernet_localvim-s_8xb2-160k_ade20k-512x512', 58, 297, '46.4 / 47.5'),
        Row('LocalVMamba-T', 'upernet_localvmamba-t_8xb2-160k_ade20k-512x512', 57, 970, '47.9 / 49.1'),
        Row('LocalVMamba-S', 'upernet_localvmamba-s_8xb2-160k_ade20k-512x512', 81, 1095, '50.0 / 51.0'),
        Row('VMamba-T', 'upernet_vmamba-t_8xb2-160k_ade20k-512x512', 55, 964, '47.3 / 48.3'),
        Row('VMamba-S', 'upernet_vmamba-t_8xb2-160k_ade20k-512x512', 76, 1081, '49.5 / 50.5', SMALL),
    ]),
    Table('Table 6: COCO, ViTDet, 1280x800', 'box AP / mask AP', [
        Row('LocalVim-T', 'mask-rcnn_localvim-t-vitdet_lsj-100e_coco', 31, 403, '45.3 / 39.9',
            note='The paper names Cascade Mask R-CNN. Its numbers are those of the Mask R-CNN that the '
                 "authors' file of that name builds."),
    ]),
    Table('Version 2 of VMamba: ImageNet-1K, 224x224', 'top-1', [
        Row('VMamba-T, s1l8', 'vmamba-t-v2_8xb128_in1k', 30, 4.9, '82.6'),
        Row('VMamba-T, s2l5', 'vmamba-t-v2-s2l5_8xb128_in1k', 31, 4.9, '82.5'),
        Row('VMamba-S, s2l15', 'vmamba-s-v2_8xb128_in1k', 50, 8.7, '83.6'),
        Row('VMamba-S, s1l20', 'vmamba-s-v2-s1l20_8xb128_in1k', 49, 8.6, '83.3'),
        Row('VMamba-B, s2l15', 'vmamba-b-v2_8xb128_in1k', 89, 15.4, '83.9'),
        Row('VMamba-B, s1l20', 'vmamba-b-v2-s1l20_8xb128_in1k', 87, 15.2, '83.8'),
    ], "VMamba's"),
    Table('Version 2 of VMamba: COCO, Mask R-CNN, 1280x800', 'box AP / mask AP', [
        Row('VMamba-T, s1l8, 1x', 'mask-rcnn_vmamba-t-v2_1x_coco', 50, 271, '47.3 / 42.7'),
        Row('VMamba-T, s2l5, 1x', 'mask-rcnn_vmamba-t-v2-s2l5_1x_coco', 50, 270, '47.4 / 42.7'),
        Row('VMamba-S, s2l15, 1x', 'mask-rcnn_vmamba-s-v2_1x_coco', 70, 384, '48.7 / 43.7', note=MISPRINT),
        Row('VMamba-B, s2l15, 1x', 'mask-rcnn_vmamba-b-v2_1x_coco', 108, 485, '49.2 / 44.1'),
        Row('VMamba-T, s1l8, 3x', 'mask-rcnn_vmamba-t-v2_ms-3x_coco', 50, 271, '48.8 / 43.7'),
        Row('VMamba-T, s2l5, 3x', 'mask-rcnn_vmamba-t-v2-s2l5_ms-3x_coco', 50, 270, '48.9 / 43.7'),
        Row('VMamba-S, s2l15, 3x', 'mask-rcnn_vmamba-s-v2_ms-3x_coco', 70, 384, '49.9 / 44.2', note=MISPRINT),
    ], "VMamba's"),
    Table('Version 2 of VMamba: ADE20K, UperNet, 512x2048', 'mIoU single / multi-scale', [
        Row('VMamba-T, s1l8', 'upernet_vmamba-t-v2_8xb2-160k_ade20k-512x512', 62, 949, '47.9 / 48.8'),
        Row('VMamba-T, s2l5', 'upernet_vmamba-t-v2-s2l5_8xb2-160k_ade20k-512x512', 62, 948, '48.3 / 48.6'),
        Row('VMamba-S, s2l15', 'upernet_vmamba-s-v2_8xb2-160k_ade20k-512x512', 82, 1028, '50.6 / 51.2'),
        Row('VMamba-B, s2l15', 'upernet_vmamba-b-v2_8xb2-160k_ade20k-512x512', 122, 1170, '51.0 / 51.6'),
    ], "VMamba's"),
]
PREFACE = """# The paper's tables

`python research/reproduce_tables.py --out research/tables.md` writes this page. Paper: arXiv 2403.09338. **Parameters
and FLOPs are measured here. Accuracies are the paper's**: nobody has trained these configurations to the end here.

A multiply-add counts once. There are two ways of counting, `tools/get_flops.py --convention`:

- **exact** counts the operations that run: each direction's convolution and projections, 9·L·D·N + L·D for each scan of
  L steps including the pads of windows, and linear layers, convolutions, norms and interpolation by MMEngine's
  analyzer. It does not count element-wise operations outside the scans. The paper's numbers of VMamba and LocalVMamba
  follow it.
- **authors'** follows the counters in the authors' code, as the paper's numbers of LocalVim and Vim do. A scan costs
  5·L·D·N + 2·L·D. In classification, the convolution and the projections of one direction are counted for all. In
  detection and segmentation, everything is counted once for each direction, each time with all four scans: 16 scans
  instead of 4. For other models, both ways are the same.

Deviations are relative to the paper's rounded numbers. "Explained by" is the first way that is within 3 %. The
parameters round to the paper's, except those of VMamba-T and -B, whose numbers leave out the layer of the 1000 classes:
"backbone alone". The configurations are in `configs/`. Of the tables' CNNs and ViTs only Swin-T is built, to check the
method. Vim's own detectors and segmentors are not built, because the paper has no FLOPs for them.
"""
HEADER = ['model', 'configuration', 'params, paper', 'params', 'GFLOPs, paper', 'exact', "authors'", 'explained by']


def load(row):
    if '::' in row.config:
        cfg = get_config(row.config)
    else:
        cfg = Config.fromfile(config_path(row.config))
    cfg.merge_from_dict(row.options)
    return cfg


def measure(row, known):
    """Return parameters by module and {convention: FLOPs}. A model is counted only once."""
    cfg = load(row)
    key = repr(cfg.model)
    if key not in known:
        model, shape = build(cfg), SHAPES[cfg.default_scope]
        exact = count_flops(model, shape)
        known[key] = exact.params, {'exact': exact.flops[''],
                                    'paper': as_in_the_paper(exact, model, shape).flops['']}
    return known[key]


def compare(row, known):
    """Return the cells of a row, and the names of differences that need a note."""
    params, flops = measure(row, known)
    wrong = []
    own = f'{params[""] / 1e6:.2f} M'
    if round(params[''] / 1e6) != row.params:
        # VMamba's numbers leave out the layer of ImageNet's classes.
        own += f', backbone alone {params["backbone"] / 1e6:.2f} M'
        if round(params['backbone'] / 1e6) != row.params:
            wrong.append('parameters')
    deviation = {name: value / 1e9 / row.flops - 1 for name, value in flops.items()}
    digits = 1 if row.flops > 100 else 2
    # Adding 0. turns -0 into 0.
    cells = {name: f'{flops[name] / 1e9:.{digits}f} ({round(deviation[name], 3) + 0.:+.1%})' for name in flops}
    if flops['paper'] == flops['exact']:
        cells['paper'] = 'the same'
    explained = next((name for name in flops if abs(deviation[name]) <= TOLERANCE), None)
    if explained is None:
        wrong.append('FLOPs')
    config = ' '.join([row.config, *(f'{key}={value}' for key, value in row.options.items())])
    label = {'exact': 'exact', 'paper': "authors'", None: 'see below'}[explained]
    return [row.model, f'`{config}`', f'{row.params} M', own, f'{row.flops:g}', cells['exact'], cells['paper'], label,
            row.accuracy], [] if row.note else wrong


def render(tables):
    lines, failures, known = [PREFACE], [], {}
    for table in tables:
        header = [*HEADER, f'{table.accuracy} ({table.owner})']
        lines += [f'## {table.title}\n', f'| {" | ".join(header)} |', '|' + '---|' * len(header)]
        for row in table.rows:
            cells, wrong = compare(row, known)
            print(' | '.join(cells), file=sys.stderr, flush=True)
            lines.append(f'| {" | ".join(cells)} |')
            failures += [f'{table.title}: {row.model}: {what}' for what in wrong]
        lines += ['', *(f'{row.model}: {row.note}\n' for row in table.rows if row.note)]
    return '\n'.join(lines).rstrip() + '\n', failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, help='file to write (default: standard output)')
    parser.add_argument('--tables', nargs='+', default=[''], metavar='TEXT',
                        help='only tables whose title contains TEXT')
    args = parser.parse_args()
    text, failures = render([table for table in TABLES if any(part in table.title for part in args.tables)])
    if args.out:
        write_whole(str(args.out), text)
    else:
        print(text)
    if failures:
        sys.exit('these differences need a note:\n  ' + '\n  '.join(failures))


if __name__ == '__main__':
    main()
