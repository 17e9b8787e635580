"""Write a graph to a file: ONNX, a program of torch.export, or a library of AOTInductor."""
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

from mmlocalmamba import table_cache
from mmlocalmamba.deployment.graphs import Graph
from mmlocalmamba.deployment.runtimes import METADATA, SCANS, half_name, import_optional
from mmlocalmamba.ops import BACKEND_VARIABLE
from mmlocalmamba.ops.backends.onnx import expand, take_scans

OPSET = 20  # the first version with Gelu
FORMATS = ('.onnx', '.pt2')
# Largest constant to fold in elements. Scan tables of long sequences have millions.
_FOLD_LIMIT = 1 << 28


@contextmanager
def _backend(name: str | None) -> Iterator[None]:
    """Set the environment variable by which models choose their backend; None unsets it."""
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
        raise NotImplementedError(f'a {graph.task} graph takes one image at a time: set --batch 1')
    dynamic = ({0: torch.export.Dim('batch', min=1, max=1024)}, ) if any_batch else None
    # torch would treat a batch size of 1 as a constant.
    example = torch.zeros(2 if any_batch else 1, graph.channels, *shape)
    with torch.no_grad():
        graph(example)
    with torch.no_grad(), table_cache.constants(), _backend(backend), warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)
        return torch.export.export(graph, (example, ), dynamic_shapes=dynamic)


def _fold(model: Any) -> None:
    """Fold everything that does not depend on the images, mostly scan tables, and merge equal constants."""
    import onnxscript.optimizer
    from onnx_ir.passes import common

    onnxscript.optimizer.optimize(model, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT)
    # The optimizer skips ConstantOfShape, which blocks the folding of later nodes.
    onnxscript.optimizer.fold_constants(
        model, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT,
        should_fold=lambda node: node.op_type == 'ConstantOfShape' and node.inputs[0].const_value is not None or None)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True)(model)
    common.DeduplicateInitializersPass(size_limit=_FOLD_LIMIT)(model)


def _text_metadata(metadata: dict[str, Any]) -> dict[str, str]:
    """Return metadata for formats that store only texts: all of it as JSON, and each entry for readers without JSON."""
    return {METADATA: json.dumps(metadata),
            **{key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}}


def to_onnx(graph: Graph, shape: Sequence[int], path: str, metadata: dict[str, Any], any_batch: bool = False,
            weights: str = 'float32') -> int:
    """Write an ONNX file with only standard ONNX operators, for images of one size, and check it.

    Args:
        graph: result of :func:`mmlocalmamba.deployment.graphs.graph_of`.
        shape: (H, W) of the images.
        path: path of the file.
        metadata: entries for the file: all of them as JSON under the key ``mmlocalmamba``, and each under its own key.
        any_batch: allow any number of images, 1 to 1024. False: one image.
        weights: 'float32'. 'float16' stores weights in float16 and computes in float32. 'int8' computes products with
            weights in 8 bits, with scales found for each image (dynamic quantisation). Scans stay in float32.

    Returns:
        The number of nodes, including those in the bodies of loops.

    Raises:
        NotImplementedError: if an operator has no ONNX counterpart, which the message names, or if ``any_batch`` is set
            for a graph that takes one image.
        RuntimeError: if a package of requirements/deploy.txt is not installed.
    """
    onnx, onnx_ir = import_optional('onnx'), import_optional('onnx_ir')
    import_optional('onnxscript')  # torch.onnx.export needs it
    program = _program(graph, shape, any_batch, 'onnx')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            made = torch.onnx.export(program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False,
                                     input_names=['images'], output_names=list(graph.outputs))
    except torch.onnx.errors.OnnxExporterError as error:
        raise NotImplementedError('an operator of this model has no counterpart in ONNX: '
                                  f'{str(error.__cause__ or error).splitlines()[0]}. Export backbone and neck alone '
                                  'with --features, or export to .pt2, which takes any operator') from error
    model = made.model
    expand(model)
    _fold(model)
    model.metadata_props.update({**_text_metadata(metadata), SCANS: json.dumps(take_scans(model))})
    model.graph.doc_string = None
    for node in model.graph.all_nodes():  # remove references to Python source lines
        node.metadata_props.clear()
        node.doc_string = None
    if weights == 'float16':
        _store_in_float16(model)
    onnx_ir.save(model, path)
    if weights == 'int8':
        _quantize(path)
    onnx.checker.check_model(path, full_check=True)
    return sum(1 for _ in model.graph.all_nodes())


def _store_in_float16(model: Any) -> None:
    """Store large float32 constants as float16, each followed by a Cast, which runtimes compute once."""
    import onnx_ir as ir
    # OpenVINO's loops accept only constants from the outer graph.
    of_loops = {value for node in model.graph if node.op_type == 'Scan' for inner in node.attributes['body'].as_graph()
                for value in inner.inputs}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or value in of_loops or tensor.dtype != ir.DataType.FLOAT or tensor.size < 1024:
            continue
        half = ir.Value(name=half_name(name), shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT16),
                        const_value=ir.tensor(tensor.numpy().astype('float16'), name=half_name(name)))
        del model.graph.initializers[name]
        cast = ir.Node('', 'Cast', [half], [ir.AttrInt64('to', ir.DataType.FLOAT)], num_outputs=1)
        value.replace_all_uses_with(cast.outputs[0])
        model.graph.register_initializer(half)
        cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = name, value.shape, value.type
        model.graph.insert_before(model.graph[0], cast)


def _quantize(path: str) -> None:
    """Quantise the products with weights of an ONNX file to 8 bits, in place."""
    quantization = import_optional('onnxruntime.quantization')
    model = import_optional('onnx').load(path)
    # Weights with a dimension for directions have more scales than ONNX Runtime's product accepts.
    several = {value.name for value in model.graph.initializer if len(value.dims) > 2}
    kept = [node.name for node in model.graph.node if node.op_type == 'MatMul' and several & set(node.input)]
    quantization.quantize_dynamic(path, path, op_types_to_quantize=['MatMul', 'Gemm'], per_channel=True,
                                  weight_type=quantization.QuantType.QInt8, nodes_to_exclude=kept)


def to_pt2(graph: Graph, shape: Sequence[int], path: str, metadata: dict[str, Any], any_batch: bool = False,
           plain: bool = False) -> int:
    """Write a program that ``torch.export.load`` reads after ``import mmlocalmamba.ops``.

    Args:
        graph, shape, path, any_batch: see :func:`to_onnx`.
        metadata: entries for the extra file ``metadata.json``.
        plain: use only PyTorch's own operators, so that the file does not need this package. It is several times
            slower.

    Returns:
        The number of nodes.

    Raises:
        NotImplementedError: if ``any_batch`` is set for a graph that takes one image.
    """
    program = _program(graph, shape, any_batch, 'chunked' if plain else None)
    torch.export.save(program, path, extra_files={'metadata.json': json.dumps(metadata)})
    return len(program.graph.nodes)


def _own_operators(program: torch.export.ExportedProgram) -> list[str]:
    """Return the schemas of the operators of this package that a program calls."""
    targets = {node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    return sorted(str(target._schema) for target in targets if target.namespace == 'mmlocalmamba')


def to_aoti(graph: Graph, shape: Sequence[int], path: str, metadata: dict[str, Any], any_batch: bool = False,
            plain: bool = False) -> int:
    """Compile a library for this kind of processor with AOTInductor.

    ``torch._inductor.aoti_load_package`` reads the file after ``import mmlocalmamba.ops``, whose kernels it calls. C++
    (``AOTIModelPackageLoader``) reads it too; see tools/deployment/classify.cpp.

    Args, returns and raises: see :func:`to_pt2`. The metadata of the package hold the entries as :func:`to_onnx` does,
    and under ``operators`` the schemas of the operators of this package that the file calls, one a line.
    """
    program = _program(graph, shape, any_batch, 'chunked' if plain else None)
    texts = {**_text_metadata(metadata), 'operators': '\n'.join(_own_operators(program))}
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=path,
                                                 inductor_configs={'aot_inductor.metadata': texts})
    return len(program.graph.nodes)


def errors(graph: Graph, expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> Iterator[tuple[str, float]]:
    """Compare the outputs of a file with those of PyTorch.

    Detections are compared with the one of the same label whose box is nearest, because rounding may swap detections
    with almost equal scores.

    Args:
        graph: exported graph.
        expected: outputs of PyTorch.
        found: outputs of the file.

    Yields:
        A line to print, and the largest error relative to the largest value; infinite if over 2 % of the detections
        have no counterpart.
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
    """Run the graph in PyTorch without gradients, and return its outputs as a list."""
    return list(graph(images))


def write_checked(path: str, write: Callable[[str], Any], check: Callable[[str], Any]) -> None:
    """Write a file under another name, check it, and rename it to ``path`` only if the check does not raise.

    Args:
        path: final path; its folder is made if it does not exist.
        write: function of a path that writes the file.
        check: function of a path that raises if the file is wrong.
    """
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix='.export-') as own:
        beside = os.path.join(own, os.path.basename(path))
        write(beside)
        check(beside)
        os.replace(beside, path)
