"""Make of an exported .onnx file one of OpenVINO's own format (.xml and .bin) whose scans are computed by our kernel.

    python tools/deployment/openvino_kernel.py MODEL.onnx OUT.xml

The extension that has the kernel is libmmlocalmamba_openvino.so, beside OUT.xml. If it is not there, it is compiled,
which takes a C++ compiler and the headers in OpenVINO's wheel. It belongs to this version of OpenVINO. OUT.xml is
written only if it computes on noise what the .onnx file computes.
"""
import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mmlocalmamba.deployment import openvino_kernel, runtimes

# Relative to the largest value.
TOLERANCE = 1e-4


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('model', help='file of tools/deployment/export.py: .onnx')
    parser.add_argument('out', help='file to write: .xml')
    args = parser.parse_args()
    if not args.out.endswith('.xml'):
        parser.error(f'{args.out}: the name must end in .xml')
    try:
        write(args.model, args.out)
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f'{type(error).__name__}: {error}')


def write(model, out):
    openvino = runtimes.import_optional('openvino')
    folder = Path(out).resolve().parent
    library = folder / runtimes.LIBRARY
    if not library.is_file():
        start = time.perf_counter()
        openvino_kernel.build(str(library))
        print(f'{library}: compiled in {time.perf_counter() - start:.0f} s')
    fast = openvino_kernel.with_kernel(model, str(library))
    images = np.random.default_rng(0).standard_normal(
        [side.get_length() if side.is_static else 1 for side in fast.input().partial_shape], dtype=np.float32)
    stock = runtimes.open_file(model, 'openvino').run(images)
    compiled = openvino.Core().compile_model(fast, 'CPU', dict(INFERENCE_PRECISION_HINT='f32'))
    for expected, found in zip(stock, compiled([images]).values(), strict=True):
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
        print(f'{tuple(found.shape)}: largest error {error:.1e} of the largest value')
        if not error <= TOLERANCE:
            raise RuntimeError(f'{out} was not written: it differs from {model} by {error:.1e}')
    with tempfile.TemporaryDirectory(dir=folder, prefix='.export-') as own:
        openvino.save_model(fast, os.path.join(own, os.path.basename(out)), compress_to_fp16=False)
        for name in (Path(out).with_suffix('.bin').name, os.path.basename(out)):
            os.replace(os.path.join(own, name), folder / name)
    print(out)


if __name__ == '__main__':
    main()
