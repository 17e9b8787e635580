"""Scans of an exported file by our own kernel in OpenVINO.

A .onnx file holds a scan as a loop of ONNX's own operators, which any runtime reads and none computes fast. The file
also names the inputs and the output of each scan. :func:`with_kernel` puts one operator in the place of each loop, and
:func:`build` compiles the extension of OpenVINO that has it, from ``deployment/csrc`` and the kernels of ``ops/csrc``.
"""
import json
import os
import shlex
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from mmlocalmamba import ops
from mmlocalmamba.deployment.runtimes import METADATA, SCANS, half_name, import_optional
from mmlocalmamba.ops.backends.onnx import table_of

_OWN = Path(__file__).parent / 'csrc'
_KERNELS = Path(ops.__file__).parent / 'csrc'


def _openvino() -> tuple[Path, list[str]]:
    """Return the folder of OpenVINO and the names of the libraries to link.

    Raises:
        RuntimeError: OpenVINO is not installed, or without its headers.
    """
    folder = Path(import_optional('openvino').__path__[0])
    libraries = sorted(path.name for pattern in ('libopenvino.so*', 'libtbb.so*')
                       for path in (folder / 'libs').glob(pattern))
    if not (folder / 'include/openvino/core/op_extension.hpp').is_file() or len(libraries) < 2:
        raise RuntimeError(f'OpenVINO at {folder} has no headers and libraries to compile with: install the wheel of '
                           'PyPI, pip install openvino')
    return folder, libraries


def _compile(*arguments: str) -> None:
    line = [*shlex.split(os.environ.get('CXX', 'g++')), *arguments]
    try:
        done = subprocess.run(line, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f'the compiler {line[0]} does not start ({error}): install g++, or name another by the '
                           'variable CXX') from None
    if done.returncode:
        raise RuntimeError(f'the extension could not be compiled:\n{shlex.join(line)}\n{done.stderr[-4000:]}')


def build(path: str) -> None:
    """Compile the extension, by the compiler that the variable CXX names, or g++. It belongs to this OpenVINO.

    Args:
        path: path of the library, which is replaced if it exists.

    Raises:
        RuntimeError: There is no compiler, it fails, or OpenVINO has no headers.
    """
    openvino, libraries = _openvino()
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    sources = [_OWN / 'openvino.cpp', *(_KERNELS / f'{name}.cpp' for name in ('avx512', 'avx2', 'portable'))]
    with tempfile.TemporaryDirectory(dir=folder, prefix='.build-') as own, ThreadPoolExecutor() as pool:
        objects = [os.path.join(own, f'{source.stem}.o') for source in sources]
        list(pool.map(lambda source, made: _compile(
            '-std=c++17', '-O3', '-fPIC', '-DOV_THREAD=OV_THREAD_TBB_ADAPTIVE', f'-I{_KERNELS}', '-isystem',
            str(openvino / 'include'), '-c', str(source), '-o', made), sources, objects))
        beside = os.path.join(own, os.path.basename(path))
        _compile('-shared', *objects, '-o', beside, f'-L{openvino / "libs"}', *(f'-l:{name}' for name in libraries),
                 f'-Wl,-rpath,{openvino / "libs"}')
        os.replace(beside, path)


# Names of a scan's values in the graph, and of its constants; see ops.backends.onnx.take_scans.
_TOKENS = ('u', 'delta', 'B', 'C')
_CONSTANTS = ('A', 'weight', 'bias', 'skip', 'rows')


def with_kernel(path: str, library: str) -> Any:
    """Read an .onnx file of this package, and compute its scans by the kernel.

    Args:
        path: path of the file.
        library: path of the library that :func:`build` wrote.

    Returns:
        The ``openvino.Model``. Saved by ``openvino.save_model``, it can be read where the library is loaded by
        ``openvino.Core().add_extension``.

    Raises:
        ValueError: The file names no scans, or the values that it names are not there.
    """
    openvino, onnx = import_optional('openvino'), import_optional('onnx')
    file = onnx.load(path)
    properties = {entry.key: entry.value for entry in file.metadata_props}
    scans = json.loads(properties.get(SCANS, '[]'))
    if not scans:
        raise ValueError(f'{path} names no scans: it was exported by an earlier version, or has none; export it again')
    core = openvino.Core()
    core.add_extension(library)
    factory = import_optional('openvino.utils.node_factory').NodeFactory()
    factory.add_extension(library)
    model = core.read_model(path)
    values = {name: output for node in model.get_ops() for output in node.outputs() for name in output.get_names()}
    constants = {tensor.name: tensor for tensor in file.graph.initializer}
    for scan in scans:
        try:
            y, *tokens = [values[scan[role]] for role in ('y', *_TOKENS)]
            found = {role: _find(constants, scan[role]) for role in _CONSTANTS if role in scan}
        except KeyError as error:
            raise ValueError(f'{path} has no value {error}: it was changed after its export; export it again') from None
        length = y.get_partial_shape()[2].get_length()
        arrays = {role: onnx.numpy_helper.to_array(tensor) for role, tensor in found.items()}
        inputs = _operands(arrays, length, scan['steps'], scan['chunks'])
        node = factory.create(
            'DirectionalScan', [*tokens, *(openvino.op.Constant(x).output(0) for x in inputs.values())],
            dict(given=' '.join(inputs), tokens=length, in_scan_order=scan['in_scan_order'], softplus=scan['softplus']))
        y.replace(node.output(0))
    model.validate_nodes_and_infer_types()
    model.set_rt_info(properties.get(METADATA, '{}'), [METADATA])
    return model


def _find(constants: dict[str, Any], name: str) -> Any:
    # Files with weights in float16 compute the constant from another.
    return constants[half_name(name) if half_name(name) in constants else name]


def _operands(arrays: dict[str, np.ndarray], tokens: int, steps: int, chunks: int) -> dict[str, np.ndarray]:
    """Return the constants of a file's scan in the forms and the order that the operator takes."""
    rows = arrays.pop('rows', None)
    float32 = {role: x.astype(np.float32) for role, x in arrays.items()}
    inputs = {role: np.ascontiguousarray(x[:, 0] if role in ('bias', 'skip') else x.swapaxes(1, 2))
              for role, x in float32.items()}
    return inputs if rows is None else {**inputs, 'table': table_of(rows, len(inputs['A']), tokens, steps, chunks)}
