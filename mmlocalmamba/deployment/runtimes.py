"""Open the files of :mod:`mmlocalmamba.deployment.exporting` as functions. PyTorch is imported only for its own
files."""
import json
import zipfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

# Key of the metadata in a file, which are JSON.
METADATA = 'mmlocalmamba'
# Key of the names of values of each scan, as JSON, in .onnx files; see ops.backends.onnx.take_scans.
SCANS = 'mmlocalmamba_scans'
# Name of the extension of OpenVINO, beside the .xml files that need it.
LIBRARY = 'libmmlocalmamba_openvino.so'
Function = Callable[[np.ndarray], list[np.ndarray]]


class Opened(NamedTuple):
    """An exported file that can be run.

    Attributes:
        run: function of normalised images (B, channels, H, W), float32, that returns a list of arrays.
        metadata: metadata that were given at the export.
    """
    run: Function
    metadata: dict[str, Any]


def kind_of(path: str) -> str:
    """Return the kind of a file: 'onnx', 'openvino' (its own format), 'torch' (a program of torch.export) or 'aoti'
    (compiled by AOTInductor).

    Raises:
        ValueError: if the file is of another kind.
    """
    if path.endswith('.onnx'):
        return 'onnx'
    if path.endswith('.xml'):
        return 'openvino'
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return 'aoti' if any('/aotinductor/' in name for name in archive.namelist()) else 'torch'
    raise ValueError(f'{path} is neither an ONNX file (.onnx), nor of OpenVINO (.xml), nor a package of PyTorch (.pt2)')


def half_name(name: str) -> str:
    """Return the name of the float16 constant from which a file computes the constant ``name``."""
    return f'{name}_half'


def normalised(pixels: np.ndarray, metadata: dict[str, Any]) -> np.ndarray:
    """Normalise an image for an exported file.

    Args:
        pixels: image of the file's size, uint8 or float, 0 to 255: RGB (H, W, 3), grey (H, W), or (H, W, channels) in
            the order that the model was trained with.
        metadata: metadata of the file, with ``channels`` ('RGB', 'BGR', 'GREY' or their number), ``mean`` and ``std``.

    Returns:
        Contiguous float32 array (1, channels, H, W).
    """
    pixels = pixels.astype(np.float32).reshape(*pixels.shape[:2], -1)
    if metadata['channels'] == 'BGR':
        pixels = pixels[..., ::-1]
    pixels = (pixels - np.float32(metadata['mean'])) / np.float32(metadata['std'])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def import_optional(module: str) -> ModuleType:
    """Import an optional package.

    Raises:
        RuntimeError: if it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise RuntimeError(f'{module} is not installed ({error}): pip install -r requirements/deploy.txt') from error


def _onnxruntime(path: str, threads: int | None, precision: str) -> Opened:
    onnxruntime = import_optional('onnxruntime')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads or 0, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    found = session.get_modelmeta().custom_metadata_map
    return Opened(lambda images: session.run(None, {name: images}), json.loads(found.get(METADATA, '{}')))


def _openvino(path: str, threads: int | None, precision: str) -> Opened:
    core = import_optional('openvino').Core()
    config: dict[str, str | int] = {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': precision}
    if threads:
        config['INFERENCE_NUM_THREADS'] = threads
    library = Path(path).resolve().with_name(LIBRARY)
    own_format = path.endswith('.xml')
    if own_format and library.is_file():
        core.add_extension(str(library))
    model = core.read_model(path)
    request = core.compile_model(model, 'CPU', config).create_infer_request()

    def run(images: np.ndarray) -> list[np.ndarray]:
        return [np.array(value) for value in request.infer([images]).values()]

    if own_format:
        text = model.get_rt_info([METADATA]).astype(str) if model.has_rt_info([METADATA]) else '{}'
        return Opened(run, json.loads(text))
    properties = import_optional('onnx').load(path, load_external_data=False).metadata_props
    return Opened(run, json.loads(next((entry.value for entry in properties if entry.key == METADATA), '{}')))


def _torch(path: str, threads: int | None, precision: str) -> Opened:
    import torch

    import mmlocalmamba.ops  # noqa: F401  registers the operators
    extra = {'metadata.json': ''}
    module = torch.export.load(path, extra_files=extra).module()
    return Opened(_module_function(module, threads), json.loads(extra['metadata.json'] or '{}'))


def _aoti(path: str, threads: int | None, precision: str) -> Opened:
    import torch

    import mmlocalmamba.ops  # noqa: F401
    package = torch._inductor.aoti_load_package(path)
    return Opened(_module_function(package, threads), json.loads(package.get_metadata().get(METADATA, '{}')))


def _module_function(module: Callable, threads: int | None) -> Function:
    import torch

    # PyTorch limits threads for the process, not for a module.
    if threads:
        torch.set_num_threads(threads)

    @torch.no_grad()
    def run(images: np.ndarray) -> list[np.ndarray]:
        outputs = module(torch.from_numpy(images))
        return [x.numpy() for x in (outputs if isinstance(outputs, (list, tuple)) else [outputs])]

    return run


_OPEN = {'onnxruntime': _onnxruntime, 'openvino': _openvino, 'torch': _torch, 'aoti': _aoti}


def open_file(path: str, runtime: str | None = None, threads: int | None = None, precision: str = 'f32') -> Opened:
    """Open an exported file.

    Args:
        path: path of a .onnx, .xml or .pt2 file. OpenVINO loads the extension beside a .xml file.
        runtime: 'onnxruntime' or 'openvino' for .onnx, 'openvino' for .xml, 'torch' or 'aoti' for .pt2. None: ONNX
            Runtime for .onnx; for .pt2 the content decides.
        threads: number of threads. None: the runtime's default.
        precision: 'bf16' lets OpenVINO compute in bfloat16 if the processor supports it. Other runtimes use the
            precision of the file.

    Raises:
        ValueError: if the file is of another kind, or the runtime does not read it.
        RuntimeError: if the runtime is not installed.
    """
    kind = kind_of(path)
    able = ('onnxruntime', 'openvino') if kind == 'onnx' else (kind, )
    if runtime is None:
        runtime = able[0]
    if runtime not in able:
        raise ValueError(f'{runtime} cannot read {path}: use {" or ".join(able)}')
    return _OPEN[runtime](path, threads, precision)
