"""From a graph to a file: ONNX, a program of torch.export, a library of AOTInductor. A file is checked before it gets
its name."""
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmlocalmamba import sizes
from mmlocalmamba.deployment.graphs import Graph
from mmlocalmamba.deployment.runtimes import METADATA, needed
from mmlocalmamba.ops import BACKEND_VARIABLE
from mmlocalmamba.ops.onnx import expand

OPSET = 20  # the first with Gelu
FORMATS = ('.onnx', '.pt2')
# Of a table of a million steps and more.
_FOLDED = 1 << 28


@contextmanager
def _backend(name: str | None) -> Iterator[None]:
    """Models choose their backend by the environment."""
    before = os.environ.pop(BACKEND_VARIABLE, None)
    if name is not None:
        os.environ[BACKEND_VARIABLE] = name
    try:
        yield
    finally:
        os.environ.pop(BACKEND_VARIABLE, None)
        if before is not None:
            os.environ[BACKEND_VARIABLE] = before


def _program(graph: Graph, shape: Sequence[int], any_batch: bool, backend: str | None) -> torch.export.ExportedProgram:
    if any_batch and not graph.any_batch:
        raise NotImplementedError(f'a {graph.task} graph takes one image at a time: leave --batch at 1')
    dynamic = ({0: torch.export.Dim('batch', min=1, max=1024)}, ) if any_batch else None
    # Of a batch of 1, torch would take the size for a constant.
    example = torch.zeros(2 if any_batch else 1, 3, *shape)
    with torch.no_grad():
        graph(example)
    with torch.no_grad(), sizes.constants(), _backend(backend), warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)
        return torch.export.export(graph, (example, ), dynamic_shapes=dynamic)


def _fold(model: Any) -> None:
    """Compute what no image changes, the tables above all, and keep one copy of equal constants."""
    import onnxscript.optimizer
    from onnx_ir.passes import common

    onnxscript.optimizer.optimize(model, input_size_limit=_FOLDED, output_size_limit=_FOLDED)
    # Left out by the optimizer as a rule, and in the way of all that follow.
    onnxscript.optimizer.fold_constants(
        model, input_size_limit=_FOLDED, output_size_limit=_FOLDED,
        should_fold=lambda node: node.op_type == 'ConstantOfShape' and node.inputs[0].const_value is not None or None)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True)(model)
    common.DeduplicateInitializersPass(size_limit=_FOLDED)(model)


def _texts(metadata: dict[str, Any]) -> dict[str, str]:
    """As formats have it that know texts alone: all as JSON, and each entry for who reads no JSON."""
    return {METADATA: json.dumps(metadata),
            **{key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}}


def to_onnx(graph: Graph, shape: Sequence[int], path: str, metadata: dict[str, Any], any_batch: bool = False,
            weights: str = 'float32') -> int:
    """Write an ONNX file of ONNX's own operators, for images of one size.

    Args:
        graph: see :func:`mmlocalmamba.deployment.graphs.graph_of`.
        shape: (H, W).
        path: of the file.
        metadata: goes into the file as JSON, under the key ``mmlocalmamba``, and each entry under its own.
        any_batch: the number of images is open.
        weights: 'float32'; 'float16' stores them so, to compute in float32; 'int8' has the products with weights
            computed in 8 bits, by scales that are found for each image (dynamic quantisation). Scans stay in float32.

    Returns:
        The number of nodes, those in the bodies of loops included.

    Raises:
        NotImplementedError: the graph holds an operator that ONNX has no counterpart of; it names it.
    """
    onnx, onnx_ir = needed('onnx'), needed('onnx_ir')
    needed('onnxscript')  # by torch
    program = _program(graph, shape, any_batch, 'onnx')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            made = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
                                     input_names=['images'], output_names=list(graph.outputs))
    except torch.onnx.errors.OnnxExporterError as error:
        raise NotImplementedError('an operator of this model has no counterpart in ONNX: '
                                  f'{str(error.__cause__ or error).splitlines()[0]}. Backbone and neck alone are '
                                  'exported with --features, and .pt2 takes any operator') from error
    model = made.model
    expand(model)
    _fold(model)
    model.metadata_props.update(_texts(metadata))
    model.graph.doc_string = None
    for node in model.graph.all_nodes():  # where in Python it came from
        node.metadata_props.clear()
        node.doc_string = None
    if weights == 'float16':
        _store_in_halves(model)
    onnx_ir.save(model, path)
    if weights == 'int8':
        _quantize(path)
    onnx.checker.check_model(path, full_check=True)
    return sum(1 for _ in model.graph.all_nodes())


def _store_in_halves(model: Any) -> None:
    """Large float32 constants as float16, and a Cast behind each, which runtimes compute once."""
    import onnx_ir as ir
    # OpenVINO's loops take constants alone from the graph around them.
    of_loops = {value for node in model.graph if node.op_type == 'Scan' for inner in node.attributes['body'].as_graph()
                for value in inner.inputs}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or value in of_loops or tensor.dtype != ir.DataType.FLOAT or tensor.size < 1024:
            continue
        half = ir.Value(name=f'{name}_half', shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT16),
                        const_value=ir.tensor(tensor.numpy().astype('float16'), name=f'{name}_half'))
        del model.graph.initializers[name]
        cast = ir.Node('', 'Cast', [half], [ir.AttrInt64('to', ir.DataType.FLOAT)], num_outputs=1)
        value.replace_all_uses_with(cast.outputs[0])
        model.graph.register_initializer(half)
        cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = name, value.shape, value.type
        model.graph.insert_before(model.graph[0], cast)


def _quantize(path: str) -> None:
    """Products with weights in 8 bits, in place."""
    quantization = needed('onnxruntime.quantization')
    model = needed('onnx').load(path)
    # A weight for each direction has more scales than ONNX Runtime's product takes.
    several = {value.name for value in model.graph.initializer if len(value.dims) > 2}
    kept = [node.name for node in model.graph.node if node.op_type == 'MatMul' and several & set(node.input)]
    quantization.quantize_dynamic(path, path, op_types_to_quantize=['MatMul', 'Gemm'], per_channel=True,
                                  weight_type=quantization.QuantType.QInt8, nodes_to_exclude=kept)


def to_pt2(graph: Graph, shape: Sequence[int], path: str, metadata: dict[str, Any], any_batch: bool = False,
           plain: bool = False) -> int:
    """Write a program that ``torch.export.load`` reads, after ``import mmlocalmamba.ops``.

    Args:
        plain: of PyTorch's own operators alone, so that the file needs nothing of this package; several times slower.
        others: as in :func:`to_onnx`; metadata are its extra file ``metadata.json``.

    Returns:
        The number of nodes.
    """
    program = _program(graph, shape, any_batch, 'chunked' if plain else None)
    torch.export.save(program, path, extra_files={'metadata.json': json.dumps(metadata)})
    return len(program.graph.nodes)


def to_aoti(graph: Graph, shape: Sequence[int], path: str, metadata: dict[str, Any], any_batch: bool = False,
            plain: bool = False) -> int:
    """Compile a library for this kind of processor with AOTInductor, which ``torch._inductor.aoti_load_package`` reads,
    after ``import mmlocalmamba.ops``, whose kernels are called from it; one that is ``plain``, C++ as well
    (``AOTIModelPackageLoader``).

    Args and returns as in :func:`to_pt2`; metadata are the package's own, with the JSON of each value.
    """
    program = _program(graph, shape, any_batch, 'chunked' if plain else None)
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=path,
                                                 inductor_configs={'aot_inductor.metadata': _texts(metadata)})
    return len(program.graph.nodes)


def errors(graph: Graph, expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> Iterator[tuple[str, float]]:
    """How far a file's outputs are from PyTorch's: a line for the reader, and the error relative to the largest value.

    Detections are paired first, each with the one of its label whose box is nearest: scores that are equal but for
    rounding may change places.
    """
    if graph.task != 'detection':
        for name, a, b in zip(graph.outputs, expected, found, strict=True):
            error = float(np.abs(a - b).max() / np.abs(a).max())
            yield f'{name} {tuple(b.shape)}: largest error {error:.1e} of the largest value', error
        return
    (boxes, labels, *masks), (other, other_labels, *other_masks) = expected, found
    worst, unpaired, size = 0., 0, max(boxes[:, :4].max(), 1.)
    rows = [row for row in range(len(labels)) if labels[row] >= 0]
    for row in rows:
        same = [other_row for other_row in range(len(other_labels)) if other_labels[other_row] == labels[row]]
        scale = np.array([size] * 4 + [1.], dtype=np.float32)
        distances = [float(np.abs((other[other_row] - boxes[row]) / scale).max()) for other_row in same]
        if not distances or min(distances) > 0.01:
            unpaired += 1
            continue
        worst = max(worst, min(distances))
        for mask, other_mask in zip(masks, other_masks):
            worst = max(worst, float(np.abs(mask[row] - other_mask[same[int(np.argmin(distances))]]).max()))
    surplus = abs(int((other_labels >= 0).sum()) - len(rows))
    yield (f'{len(rows)} detections, {unpaired} without a counterpart, {surplus} more or less; largest error of the '
           f'others {worst:.1e} of the largest value', worst if max(unpaired, surplus) <= 0.02 * len(rows) else np.inf)


@torch.no_grad()
def run_eager(graph: nn.Module, images: Tensor) -> list[Tensor]:
    """What the graph computes in PyTorch."""
    return list(graph(images))


def write_checked(path: str, write: Callable[[str], Any], check: Callable[[str], Any]) -> None:
    """``write(beside)`` makes the file under another name; it gets ``path`` if ``check(beside)`` does not raise."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix='.export-') as own:
        beside = os.path.join(own, os.path.basename(path))
        write(beside)
        check(beside)
        os.replace(beside, path)
