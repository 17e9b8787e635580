"""Compile launches of the Triton kernels for GPUs that are not here, in a process that does not interpret them.

    python tests/helpers/triton_code.py '{"target": "sm_90", "cases": {"some name": {"N": 1}}}'

It prints a JSON object: for each case, what tools/gpu_code.py counts of each kernel, the widest load of its PTX in
bits, and the hash of its code.
"""
import json
import re
import sys

import gpu_code
import torch

# LocalVMamba-T's stage 1 at 224x224.
STAGE_1 = dict(size=(56, 56), middle_token=False, width=192, rank=6, N=16, batch=64, dtype='bfloat16',
               in_scan_order=False, directions=('h', 'v_flip', 'w2', 'w7_flip'))


def launches(passes=('forward', 'backward'), kernels=None, **case):
    """Return the launches of a case that differs from STAGE_1 in what is given."""
    case = {**STAGE_1, **case}
    case['dtype'] = getattr(torch, case['dtype'])
    found, _ = gpu_code.launches(**case)
    return [launch for name in passes for launch in found[name] if kernels is None or launch[0] in kernels]


def convolutions():
    from mmlocalmamba.ops.backends.triton import host

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device='meta')

    src, inv = (empty(4, 197, dtype=torch.int32) for _ in range(2))
    with gpu_code.recorded() as found:
        x, weight, bias = empty(2, 197, 768, dtype=torch.bfloat16)[..., :384], empty(4, 384, 4), empty(4, 384)
        y = host._conv_forward(x, weight, bias, src, inv)
        host._conv_backward(torch.empty_like(y), x, weight, bias, src, inv, [True] * 3)
        host._conv_backward(torch.empty_like(y), x, weight, None, None, None, [True, False, False])
    return found


def facts(target, launch):
    compiled = gpu_code.compile_for(target, launch)
    widths = re.findall(r'ld\.global\S*?(?:\.v(\d))?\.b(\d+)', compiled.asm['ptx'])
    return {**gpu_code.count(target, launch), 'hash': compiled.hash,
            'widest load': max((int(count or 1) * int(bits) for count, bits in widths), default=0)}


def main(target, cases, convolution=False):
    result = {name: [facts(target, launch) for launch in launches(**case)] for name, case in cases.items()}
    if convolution:
        result['convolution'] = [facts(target, launch) for launch in convolutions()]
    result['toolchain'] = gpu_code.toolchain()
    print(json.dumps(result))


if __name__ == '__main__':
    main(**json.loads(sys.argv[1]))
