"""Time a training step of Vim-tiny and VMamba-T, as their repositories have them, on a CPU.

    python tools/benchmark_stand_ins.py CLONES [--models vim-tiny vmamba-t] [--batch 2] [--rounds 3] [--cpu-time]

CLONES is a folder with clones of Vim and VMamba by these names; timm, einops and fvcore must be installed. A step is
forward, backward and AdamW on images of 224 x 224 with random weights. It is timed on the stand-ins and on the loop in
PyTorch that is in the repositories: mamba_ssm's selective_scan_ref, which Vim includes, and VMamba's
selective_scan_torch, which it runs without its extension. --cpu-time measures the processor time of one thread and
takes the minimum; other jobs on the machine disturb it less.
"""
import argparse
import importlib.util
import sys
from pathlib import Path
from unittest import mock

import torch
from benchmark_scan import describe_machine, measure, print_table

from mmlocalmamba.ops import stand_ins

VIM = 'vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2'


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def vim_tiny(clones):
    """Return the model and what to patch for the loop."""
    sys.path.insert(0, str(clones / 'Vim/vim'))
    import models_mamba
    scans = load('vims_scans', clones / 'Vim/mamba-1p1p1/mamba_ssm/ops/selective_scan_interface.py')

    def loop(x, delta, A, B, C, D, delta_bias, delta_softplus, dt_weight):
        delta = torch.nn.functional.linear(delta, dt_weight)
        y, last = scans.selective_scan_ref(x.mT, delta.mT, A, B, C, D, None, delta_bias, delta_softplus, True)
        return y.mT, last

    return getattr(models_mamba, VIM)(), (stand_ins.mamba_ssm, '_scan_tokens', loop)


def vmamba_t(clones):
    sys.path.insert(0, str(clones / 'VMamba/classification/models'))
    import vmamba
    fastest = vmamba.selective_scan_fn

    def loop(*args, backend=None):
        return fastest(*args[:9], backend='torch')

    return vmamba.vmamba_tiny_s1l8(), (vmamba, 'selective_scan_fn', loop)


MODELS = {'vim-tiny': vim_tiny, 'vmamba-t': vmamba_t}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('clones', type=Path)
    parser.add_argument('--models', nargs='+', choices=MODELS, default=list(MODELS))
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--cpu-time', action='store_true')
    args = parser.parse_args()
    stand_ins.stand_in_for()
    print(describe_machine('cpu'))
    rows = []
    for name in args.models:
        torch.manual_seed(0)
        model, patched = MODELS[name](args.clones)
        optimizer = torch.optim.AdamW(model.train().parameters())
        images, labels = torch.randn(args.batch, 3, 224, 224), torch.arange(args.batch)

        def step(model=model, optimizer=optimizer, images=images, labels=labels):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

        def loop(step=step, patched=patched):
            with mock.patch.object(*patched):
                step()

        medians, spreads = measure({'stand-ins': step, 'loop': loop}, 'cpu', args.rounds, 0, args.cpu_time)
        rows += [(name, args.batch, case, ms, spreads.get(case, '')) for case, ms in medians.items()]
    print_table(('model', 'batch', 'scan', 'ms a step', 'spread %'), rows)


if __name__ == '__main__':
    main()
