"""Files of :mod:`mmlocalmamba.deployment.exporting` as functions, one for each program that runs them. PyTorch is
imported for its own files alone."""
import json
import zipfile
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

# Key of what a file says about itself, as JSON.
METADATA = 'mmlocalmamba'
Function = Callable[[np.ndarray], list[np.ndarray]]


class Opened(NamedTuple):
    """A file that can be run.

    Attributes:
        run: images (B, 3, H, W), float32 -> outputs.
        metadata: as they were given at the export.
    """
    run: Function
    metadata: dict[str, Any]


def kind_of(path: str) -> str:
    """'onnx', 'torch' (a program of torch.export) or 'aoti' (compiled).

    Raises:
        ValueError: another file.
    """
    if path.endswith('.onnx'):
        return 'onnx'
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return 'aoti' if any('/aotinductor/' in name for name in archive.namelist()) else 'torch'
    raise ValueError(f'{path} is neither an ONNX file (.onnx) nor a package of PyTorch (.pt2)')


def normalised(pixels: np.ndarray, metadata: dict[str, Any]) -> np.ndarray:
    """A picture as a file takes it.

    Args:
        pixels: RGB (H, W, 3), of the file's size.
        metadata: with ``channels``, ``mean`` and ``std``.

    Returns:
        float32 (1, 3, H, W).
    """
    pixels = pixels.astype(np.float32)
    if metadata['channels'] == 'BGR':
        pixels = pixels[..., ::-1]
    pixels = (pixels - np.float32(metadata['mean'])) / np.float32(metadata['std'])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def needed(module: str) -> ModuleType:
    """An optional package.

    Raises:
        RuntimeError: it is not installed; it says how.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise RuntimeError(f'{module} is not installed ({error}): pip install -r requirements/deploy.txt') from error


def _onnxruntime(path: str, threads: int | None, precision: str) -> Opened:
    onnxruntime = needed('onnxruntime')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads or 0, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    found = session.get_modelmeta().custom_metadata_map
    return Opened(lambda images: session.run(None, {name: images}), json.loads(found.get(METADATA, '{}')))


def _openvino(path: str, threads: int | None, precision: str) -> Opened:
    core = needed('openvino').Core()
    config: dict[str, str | int] = {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': precision}
    if threads:
        config['INFERENCE_NUM_THREADS'] = threads
    request = core.compile_model(path, 'CPU', config).create_infer_request()

    def run(images: np.ndarray) -> list[np.ndarray]:
        return [np.array(value) for value in request.infer([images]).values()]

    properties = needed('onnx').load(path, load_external_data=False).metadata_props
    return Opened(run, json.loads(next((entry.value for entry in properties if entry.key == METADATA), '{}')))


def _torch(path: str, threads: int | None, precision: str) -> Opened:
    import torch

    import mmlocalmamba.ops  # noqa: F401  declares the operators
    extra = {'metadata.json': ''}
    module = torch.export.load(path, extra_files=extra).module()
    return Opened(_of_module(module, threads), json.loads(extra['metadata.json'] or '{}'))


def _aoti(path: str, threads: int | None, precision: str) -> Opened:
    import torch

    import mmlocalmamba.ops  # noqa: F401
    package = torch._inductor.aoti_load_package(path)
    return Opened(_of_module(package, threads), json.loads(package.get_metadata().get(METADATA, '{}')))


def _of_module(module: Callable, threads: int | None) -> Function:
    import torch

    # A limit of the process: PyTorch knows none of a module.
    if threads:
        torch.set_num_threads(threads)

    @torch.no_grad()
    def run(images: np.ndarray) -> list[np.ndarray]:
        outputs = module(torch.from_numpy(images))
        return [x.numpy() for x in (outputs if isinstance(outputs, (list, tuple)) else [outputs])]

    return run


_OPEN = {'onnxruntime': _onnxruntime, 'openvino': _openvino, 'torch': _torch, 'aoti': _aoti}


def open_file(path: str, runtime: str | None = None, threads: int | None = None, precision: str = 'f32') -> Opened:
    """Prepare a file to run.

    Args:
        path: .onnx or .pt2.
        runtime: 'onnxruntime', 'openvino' for .onnx; of a .pt2, its content says; None chooses.
        threads: None leaves it to the runtime.
        precision: 'bf16' lets OpenVINO compute in bfloat16 where the processor can; others take the file's.

    Raises:
        ValueError: not such a file, or a runtime that does not read it.
        RuntimeError: the runtime is not installed.
    """
    kind = kind_of(path)
    able = ('onnxruntime', 'openvino') if kind == 'onnx' else (kind, )
    if runtime is None:
        runtime = able[0]
    if runtime not in able:
        raise ValueError(f'{path} is not read by {runtime}: {" or ".join(able)}')
    return _OPEN[runtime](path, threads, precision)
