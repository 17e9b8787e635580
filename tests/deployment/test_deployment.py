"""Exported files compute what the models compute, in the runtimes that read them, and a bad one is not left behind."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from deployment import evaluate, export
from mmengine.config import Config
from PIL import Image
from torch import nn

from mmlocalmamba import __main__, create_model
from mmlocalmamba import directions as scans
from mmlocalmamba.backbones import LocalVim, LocalVMamba
from mmlocalmamba.deployment import exporting, graphs, openvino_kernel, runtimes
from mmlocalmamba.openmmlab import deployment

ROOT = Path(__file__).parents[2]


class OfBackbone(graphs.Graph):
    task = 'features'

    def __init__(self, backbone):
        super().__init__(backbone)
        self.outputs = tuple(f'out_{index}' for index in range(len(backbone.out_indices)))

    def forward(self, images):
        return tuple(self.model(images))


def randomised(model):
    """Untrained models hide what biases, skip weights and norms do."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def vmamba(directions=('h', 'v_flip', 'w3', 'w2_flip'), **options):
    return LocalVMamba(dict(embed_dims=[16, 24], depths=[1, 1]), directions=[list(directions)] * 2,
                       out_indices=(0, 1), drop_path_rate=0., **options)


def vim(**options):
    arch = dict(embed_dims=16, num_layers=2, directions=['h', 'v', 'w2_flip', 'w3'])
    return LocalVim(arch, img_size=40, patch_size=8, drop_path_rate=0., **{
        'out_type': 'featmap', 'out_indices': (0, 1), **options})


@pytest.fixture
def spiral():
    if 'rows_from_below' not in scans._SCANS:

        @scans.register_scan('rows_from_below')
        def _rows_from_below(H, W):
            tokens = torch.arange(H * W, dtype=torch.int32).view(H, W).flip(0)
            return torch.nn.functional.pad(tokens, (0, 1), value=-1).flatten()

    yield
    scans._SCANS.pop('rows_from_below')


CASES = {
    'windows with pads': lambda: vmamba(),
    'without pads': lambda: vmamba(window_pad='none', scattn=False),
    'one state, spatial gate': lambda: LocalVMamba(
        dict(embed_dims=[16], depths=[1], d_state=1), directions=['h', 'w2_flip'], scattn=dict(spatial=True)),
    'version 2 of VMamba': lambda: LocalVMamba(
        dict(embed_dims=[16, 24], depths=[1, 1], d_state=1, expand=1., gate=False, conv_bias=False, mlp_ratio=2.,
             patch_embed='conv', downsample='conv'), directions=['h', 'v_flip', 'w3', 'w2_flip'], out_indices=(0, 1)),
    'vim, one state': lambda: LocalVim(
        dict(embed_dims=16, num_layers=2, d_state=1, directions=['h', 'w3_flip']), img_size=40, patch_size=8,
        out_type='featmap', out_indices=(0, 1)),
    'own scan': lambda: vmamba(('h', 'rows_from_below', 'rows_from_below_flip'), scattn=False),
    'vim': lambda: vim(),
    'vim, class token': lambda: vim(cls_token='middle', rope=False, out_type='cls_token', out_indices=(-1, )),
    'vim, flipped token, overlapping patches': lambda: vim(cls_token='vim', rope=False, stride=4),
}


@pytest.mark.parametrize('case', CASES)
@pytest.mark.slow
def test_onnx_equals_eager(case, spiral, tmp_path):
    """At a size that no patch and no window divides, in ONNX Runtime; stock operators alone."""
    graph = OfBackbone(randomised(CASES[case]())).eval()
    images = np.random.default_rng(1).standard_normal((1, 3, 44, 52), dtype=np.float32)
    path = str(tmp_path / 'model.onnx')
    exporting.to_onnx(graph, images.shape[-2:], path, {})
    loaded = onnx.load(path)
    assert {entry.domain for entry in loaded.opset_import} == {''}
    # All directions in one loop; with one state, a second one goes over the chunks.
    loops = sum(2 if module.ssm.A_log.shape[-1] == 1 else 1 for module in graph.modules() if hasattr(module, 'ssm'))
    assert sum(node.op_type == 'Scan' for node in loaded.graph.node) == loops
    # Every scan is named, without a constant that nothing else reads.
    scans = json.loads({entry.key: entry.value for entry in loaded.metadata_props}[runtimes.SCANS])
    assert len(scans) == sum(hasattr(module, 'ssm') for module in graph.modules())
    bodies = [loaded.graph, *(node.attribute[0].g for node in loaded.graph.node if node.op_type == 'Scan')]
    read = {name for body in bodies for node in body.node for name in node.input}
    assert {constant.name for constant in loaded.graph.initializer} <= read
    expected = exporting.run_eager(graph, torch.from_numpy(images))
    for a, b in zip(expected, runtimes.open_file(path, threads=1).run(images), strict=True):
        np.testing.assert_allclose(b, a.numpy(), atol=1e-5 * float(a.abs().max()))


@pytest.mark.parametrize('chunks', [1, 4])
def test_tables_come_back_from_a_file(chunks):
    """Pads, steps that are no multiple of the chunks, and the formula that is in the graph."""
    from mmlocalmamba.ops.backends.onnx import _rows, table_of
    src = torch.tensor([[3, 0, -1, 1, 2, 4, -1], [4, 3, 2, 1, 0, -1, -1]], dtype=torch.int32)
    inv = torch.stack([torch.stack([(row == token).nonzero()[0, 0] for token in range(5)]) for row in src])
    length = -(-7 // chunks)
    rows = _rows(inv + chunks * length - 7, chunks, length)
    np.testing.assert_array_equal(table_of(rows.flatten().numpy(), 2, 5, 7, chunks), src.numpy())


@pytest.fixture(scope='module')
def library(tmp_path_factory):
    """The extension of OpenVINO."""
    headers = Path(pytest.importorskip('openvino').__path__[0]) / 'include/openvino'
    if not headers.is_dir() or shutil.which('g++') is None:
        pytest.skip(f'there is no g++, or no {headers}')
    path = str(tmp_path_factory.mktemp('extension') / runtimes.LIBRARY)
    openvino_kernel.build(path)
    return path


def by_kernel(path, library, images, scans):
    """Outputs of a file in OpenVINO with the extension."""
    import openvino
    model = openvino_kernel.with_kernel(path, library)
    kinds = [node.get_type_name() for node in model.get_ops()]
    assert kinds.count('DirectionalScan') == scans > 0 and not {'TensorIterator', 'Loop'} & set(kinds)
    compiled = openvino.Core().compile_model(model, 'CPU', dict(INFERENCE_PRECISION_HINT='f32'))
    return [list(compiled([batch]).values()) for batch in images]


@pytest.mark.parametrize('case', CASES)
@pytest.mark.slow
def test_scans_by_the_kernel_in_openvino(case, spiral, library, tmp_path):
    """The file of :func:`test_onnx_equals_eager`: no loop is left, and of one written for any number of images too."""
    graph, path = OfBackbone(randomised(CASES[case]())).eval(), str(tmp_path / 'model.onnx')
    any_batch = case in ('windows with pads', 'version 2 of VMamba', 'vim')
    images = [np.random.default_rng(1).standard_normal((batch, 3, 44, 52), dtype=np.float32)
              for batch in ((1, 3) if any_batch else (1, ))]
    exporting.to_onnx(graph, (44, 52), path, {}, any_batch, 'float16' if case == 'vim' else 'float32')
    found = by_kernel(path, library, images, sum(hasattr(module, 'ssm') for module in graph.modules()))
    for batch, outputs in zip(images, found, strict=True):
        for a, b in zip(exporting.run_eager(graph, torch.from_numpy(batch)), outputs, strict=True):
            np.testing.assert_allclose(b, a.numpy(), atol=(5e-3 if case == 'vim' else 1e-5) * float(a.abs().max()))


@pytest.mark.parametrize(('compiler', 'message'), [
    ('no-such-compiler', 'does not start'), ('false', 'could not be compiled'),
])
def test_without_a_compiler(compiler, message, tmp_path, monkeypatch):
    """Nothing is left behind."""
    pytest.importorskip('openvino')
    monkeypatch.setenv('CXX', compiler)
    with pytest.raises(RuntimeError, match=message):
        openvino_kernel.build(str(tmp_path / 'x.so'))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(('broken', 'message'), [
    (dict(table=[[0, 1, 3]]), 'token 3 of 3'),
    (dict(table=[[0, 1]]), '3 rows for 2 steps'),
    (dict(bias=[[0.] * 3]), r'input 6 of DirectionalScan must be \[1,4\], got \[1,3\]'),
])
@pytest.mark.slow
def test_the_extension_refuses_what_does_not_fit(broken, message, library):
    import openvino
    from openvino.utils.node_factory import NodeFactory
    factory = NodeFactory()
    factory.add_extension(library)
    given = dict(A=np.ones((1, 4, 2)), weight=np.ones((1, 4, 2)), bias=np.zeros((1, 4)), table=[[0, 1, 2]]) | broken
    tokens = openvino.opset13.parameter([1, 1, 3, 4], np.float32)
    constants = [np.ones((1, 1, 3, 2))] * 3 + list(given.values())
    inputs = [openvino.op.Constant(np.asarray(x, dtype=np.int32 if x is given['table'] else np.float32))
              for x in constants]
    node = factory.create('DirectionalScan', [tokens, *inputs],
                          dict(given=' '.join(given), tokens=3, in_scan_order=True, softplus=True))
    with pytest.raises(RuntimeError, match=message):
        openvino.Core().compile_model(openvino.Model([node], [tokens]), 'CPU')(np.ones((1, 1, 3, 4), np.float32))


@pytest.mark.slow
def test_a_file_that_names_no_scans(library, tmp_path):
    graph, path = OfBackbone(randomised(vmamba())).eval(), str(tmp_path / 'model.onnx')
    exporting.to_onnx(graph, (16, 16), path, {})
    loaded = onnx.load(path)
    scans = next(entry for entry in loaded.metadata_props if entry.key == runtimes.SCANS)
    scans.value = scans.value.replace('"rows": "', '"rows": "x')
    onnx.save(loaded, path)
    with pytest.raises(ValueError, match='changed after its export'):
        openvino_kernel.with_kernel(path, library)
    scans.value = '[]'
    onnx.save(loaded, path)
    with pytest.raises(ValueError, match='names no scans'):
        openvino_kernel.with_kernel(path, library)


@pytest.mark.parametrize('case', ['windows with pads', 'version 2 of VMamba'])
@pytest.mark.slow
def test_any_number_of_images(case, tmp_path):
    graph, path = OfBackbone(randomised(CASES[case]())).eval(), str(tmp_path / 'model.onnx')
    exporting.to_onnx(graph, (32, 32), path, {}, any_batch=True)
    run = runtimes.open_file(path, threads=1).run
    for batch in (1, 3):
        images = np.random.default_rng(batch).standard_normal((batch, 3, 32, 32), dtype=np.float32)
        for a, b in zip(exporting.run_eager(graph, torch.from_numpy(images)), run(images), strict=True):
            np.testing.assert_allclose(b, a.numpy(), atol=1e-5 * float(a.abs().max()))


@pytest.mark.slow
def test_long_scans_of_one_state_in_openvino(tmp_path):
    """Several chunks of many steps, in the other runtime."""
    pytest.importorskip('openvino')
    graph, path = OfBackbone(randomised(CASES['version 2 of VMamba']())).eval(), str(tmp_path / 'model.onnx')
    images = np.random.default_rng(1).standard_normal((1, 3, 132, 124), dtype=np.float32)
    exporting.to_onnx(graph, images.shape[-2:], path, {})
    for a, b in zip(exporting.run_eager(graph, torch.from_numpy(images)),
                    runtimes.open_file(path, 'openvino', threads=1).run(images), strict=True):
        np.testing.assert_allclose(b, a.numpy(), atol=1e-5 * float(a.abs().max()))


def test_softplus_is_torchs():
    x = torch.linspace(-30, 30, 100001, dtype=torch.float64)
    from mmlocalmamba.ops.backends.onnx import _softplus
    torch.testing.assert_close(_softplus(x), nn.functional.softplus(x, threshold=100.), rtol=1e-8, atol=0)


@pytest.mark.parametrize('plain', [False, True])
@pytest.mark.slow
def test_programs_of_torch(plain, tmp_path):
    """A plain one names no operator of ours, and metadata come back."""
    graph, path = OfBackbone(randomised(vim())).eval(), str(tmp_path / 'model.pt2')
    images = np.random.default_rng(1).standard_normal((1, 3, 44, 52), dtype=np.float32)
    exporting.to_pt2(graph, (44, 52), path, dict(task='features'), plain=plain)
    opened = runtimes.open_file(path)
    assert opened.metadata == dict(task='features')
    for a, b in zip(exporting.run_eager(graph, torch.from_numpy(images)), opened.run(images), strict=True):
        np.testing.assert_allclose(b, a.numpy(), atol=1e-5 * float(a.abs().max()))
    names = {str(node.target) for node in torch.export.load(path).graph.nodes}
    assert any('mmlocalmamba' in name for name in names) != plain


# The command.

@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    """A configuration of a small classifier of digits, and a checkpoint of it."""
    folder = tmp_path_factory.mktemp('classifier')
    config = folder / 'tiny.py'
    config.write_text(f"""_base_ = '{ROOT}/configs/localvmamba-nano_digits.py'
model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=[16, 24], depths=[1, 1], directions=['h', 'v', 'w2', 'w2_flip'])),
    head=dict(in_channels=24))
""")
    model, _ = deployment.load_model(Config.fromfile(str(config)), None)
    checkpoint = folder / 'tiny.pth'
    torch.save(dict(state_dict=randomised(model).state_dict(),
                    meta=dict(dataset_meta=dict(classes=[f'digit {index}' for index in range(10)]))), checkpoint)
    return str(config), str(checkpoint)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['export.py', *map(str, arguments)])
    export.main()


@pytest.mark.slow
def test_command(classifier, tmp_path, monkeypatch, capsys):
    """A file with what its user must know, checked; smaller numbers; nothing else is left."""
    sizes = {}
    for weights in ('float32', 'float16', 'int8'):
        out = tmp_path / f'{weights}.onnx'
        run(monkeypatch, *classifier, out, '--shape', 32, 32, '--weights', weights)
        assert 'largest error' in capsys.readouterr().out
        sizes[weights] = out.stat().st_size
        opened = runtimes.open_file(str(out))
        assert opened.metadata['classes'][3] == 'digit 3'
        assert opened.metadata['task'] == 'classification'
        assert (opened.metadata['height'], opened.metadata['width']) == (32, 32)
        cfg = Config.fromfile(classifier[0])
        assert opened.metadata['mean'] == list((cfg.model.get('data_preprocessor') or cfg.data_preprocessor)['mean'])
    assert sizes['float16'] < 0.8 * sizes['float32']
    assert sorted(os.listdir(tmp_path)) == ['float16.onnx', 'float32.onnx', 'int8.onnx']


@pytest.mark.slow
def test_command_for_the_kernel_in_openvino(classifier, library, tmp_path, monkeypatch, capsys):
    """It takes the library that is there, and what it writes is opened like any other file."""
    from deployment import openvino_kernel as command
    run(monkeypatch, *classifier, tmp_path / 'model.onnx', '--shape', 32, 32, '--weights', 'float16')
    shutil.copy(library, tmp_path)
    monkeypatch.setattr(sys, 'argv', ['x', str(tmp_path / 'model.onnx'), str(tmp_path / 'model.xml')])
    command.main()
    assert 'compiled' not in capsys.readouterr().out
    stock = runtimes.open_file(str(tmp_path / 'model.onnx'), 'openvino')
    own = runtimes.open_file(str(tmp_path / 'model.xml'))
    assert own.metadata == stock.metadata and own.metadata['classes'][3] == 'digit 3'
    images = np.random.default_rng(0).standard_normal((1, 3, 32, 32), dtype=np.float32)
    a, b = stock.run(images)[0], own.run(images)[0]
    np.testing.assert_allclose(b, a, atol=1e-4 * np.abs(a).max())
    assert {path.name for path in tmp_path.iterdir()} == {'model.onnx', 'model.xml', 'model.bin', runtimes.LIBRARY}


@pytest.fixture(scope='module')
def program(tmp_path_factory):
    """tools/deployment/classify.cpp, compiled as docs/deployment.md says."""
    if shutil.which('g++') is None:
        pytest.skip('there is no g++')
    folder, torch_folder = tmp_path_factory.mktemp('program'), Path(torch.__file__).parent
    page = (ROOT / 'docs/deployment.md').read_text().split('\n## C++\n')[1]
    command = re.search(r'^g\+\+ .*?[^\\]$', page, flags=re.M | re.S)[0]
    subprocess.run(command.replace('tools/', f'{ROOT}/tools/'), shell=True, check=True, cwd=folder,
                   env={**os.environ, 'TORCH': str(torch_folder)})
    return folder / 'classify'


@pytest.mark.parametrize('plain', [False, True])
@pytest.mark.slow
def test_classify_in_cpp(classifier, program, plain, tmp_path, monkeypatch):
    """A program without Python, with our kernels and without them, prints what Python finds."""
    path = tmp_path / 'model.pt2'
    run(monkeypatch, *classifier, path, '--shape', 32, 32, '--aoti', *['--plain'] * plain)
    images = np.random.default_rng(0).standard_normal((1, 3, 32, 32), dtype=np.float32)
    torch.save(torch.from_numpy(images), tmp_path / 'picture.pt')
    native = [] if plain else [next((ROOT / 'mmlocalmamba/ops').glob('_cpu*.so'), None)]
    if None in native:
        pytest.skip('the native kernels are not built')
    done = subprocess.run([program, path, tmp_path / 'picture.pt', *native], capture_output=True, text=True, check=True)
    logits = runtimes.open_file(str(path)).run(images)[0][0]
    name, value = done.stdout.rsplit(maxsplit=1)
    assert name == f'digit {logits.argmax()}' and float(value) == pytest.approx(float(logits.max()), rel=1e-5)
    if native:
        done = subprocess.run([program, path, tmp_path / 'picture.pt'], capture_output=True, text=True)
        assert done.returncode and '_cpu*.so as third argument' in done.stderr


@pytest.mark.slow
def test_what_disagrees_is_not_left(classifier, tmp_path, monkeypatch):
    """Here the file's weights are halved after it was written; an older file stays."""
    out = tmp_path / 'model.onnx'
    out.write_text('older')

    def to_onnx(graph, shape, path, *args):
        with torch.no_grad():
            graph.model.head.fc.weight /= 2
            count = original(graph, shape, path, *args)
            graph.model.head.fc.weight *= 2
        return count

    original = exporting.to_onnx
    monkeypatch.setattr(exporting, 'to_onnx', to_onnx)
    with pytest.raises(SystemExit, match='was not written: it differs from PyTorch'):
        run(monkeypatch, *classifier, out, '--shape', 32, 32)
    assert out.read_text() == 'older' and os.listdir(tmp_path) == ['model.onnx']


class Unknown(nn.Module):

    def forward(self, x):
        return torch.linalg.eigvals(x @ x.mT).real.sum(-1, keepdim=True) + x


@pytest.mark.parametrize(('arguments', 'message'), [
    (('OUT.txt', ), 'the name must end in .onnx or .pt2'),
    (('OUT.onnx', '--aoti'), 'for .pt2 files'),
    (('OUT.onnx', '--shape', '2', '40'), 'smaller than a patch of 4x4'),
    (('OUT.onnx', '--check', 'nowhere.png'), 'the image cannot be read'),
    (('OUT.onnx', '--cfg-options', 'model.head.num_classes=7'), 'not a checkpoint of this ImageClassifier'),
])
def test_bad_input(classifier, arguments, message, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, *classifier, tmp_path / arguments[0], *arguments[1:])
    assert message in f'{error.value} {capsys.readouterr().err}'
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_an_operator_without_counterpart(classifier, tmp_path, monkeypatch):
    """It is named, and the remedy."""
    def load_model(cfg, checkpoint):
        model, classes = original(cfg, checkpoint)
        model.backbone.norm1 = Unknown()
        return model, classes

    original = deployment.load_model
    monkeypatch.setattr(export, 'load_model', load_model)
    with pytest.raises(SystemExit, match=r'linalg_eig.*--features'):
        run(monkeypatch, *classifier, tmp_path / 'model.onnx', '--shape', 32, 32)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize('name, size', [
    ('localvim-nano_digits', (32, 32)), ('localvim-nano_fashion', (28, 28)), ('localvmamba-t_8xb128_in1k', (224, 224)),
    ('mask-rcnn_localvmamba-nano_digits', (128, 128)), ('mask-rcnn_localvmamba-t_1x_coco', (800, 1344)),
    ('upernet_localvim-nano_digits', (128, 128)), ('upernet_localvim-t_8xb2-160k_ade20k-512x512', (512, 512))])
def test_the_size_is_that_of_the_test(name, size):
    assert deployment.tested_size(Config.fromfile(ROOT / f'configs/{name}.py')) == size


def test_height_and_width_of_the_test():
    pipeline = [dict(type='LoadImageFromFile'), dict(type='mmpretrain.Resize', scale=(96, 64)), dict(type='PackInputs')]
    cfg = Config(dict(default_scope='mmpretrain', test_dataloader=dict(dataset=dict(pipeline=pipeline))))
    assert deployment.tested_size(cfg) == (64, 96)
    assert deployment.tested_size(Config(dict(default_scope='mmseg'))) == (512, 512)


def test_open_refuses(tmp_path):
    (tmp_path / 'file.pt2').write_text('no package')
    with pytest.raises(ValueError, match='neither an ONNX file'):
        runtimes.open_file(str(tmp_path / 'file.pt2'))
    with pytest.raises(ValueError, match='aoti cannot read model.onnx'):
        runtimes.open_file('model.onnx', 'aoti')


# Images of one channel, or of many.

@pytest.mark.parametrize('in_channels', [1, 4])
@pytest.mark.parametrize('features', [False, True])
def test_programs_for_other_channels(in_channels, features, tmp_path):
    model = randomised(create_model('localvim_nano.digits', in_channels=in_channels))
    graph = graphs.graph_of(model, (32, 32), features)
    assert graph.channels == graphs.image_channels(model) == in_channels
    metadata = graphs.metadata(graph, (32, 32), None, [127.5] * 3, [64.] * 3)
    assert metadata['channels'] == {1: 'GREY', 4: '4'}[in_channels] and metadata['mean'] == [127.5] * in_channels
    exporting.to_pt2(graph, (32, 32), str(tmp_path / 'model.pt2'), metadata)
    opened = runtimes.open_file(str(tmp_path / 'model.pt2'))
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32) if in_channels == 1 else (32, 32, in_channels))
    images = runtimes.normalised(pixels, opened.metadata)
    assert images.shape == (1, in_channels, 32, 32)
    expected = exporting.run_eager(graph, torch.from_numpy(images))
    for a, b in zip(opened.run(images), expected, strict=True):
        np.testing.assert_allclose(a, b.numpy(), atol=1e-4 * float(b.abs().max()))


@pytest.fixture
def grey(tmp_path):
    """The configuration and a checkpoint of a digits model for grey images."""
    path = tmp_path / 'grey.py'
    path.write_text(f'''_base_ = {str(ROOT / "configs/localvim-nano_digits.py")!r}
model = dict(backbone=dict(in_channels=1))
data_preprocessor = dict(mean=[127.5], std=[127.5], to_rgb=False)
test_pipeline = [dict(type='LoadImageFromFile', color_type='grayscale'), dict(type='PackInputs')]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
''')
    cfg = Config.fromfile(path)
    model, _ = deployment.load_model(cfg, None)
    meta = dict(dataset_meta=dict(classes=tuple('0123456789')))
    torch.save(dict(state_dict=randomised(model).state_dict(), meta=meta), tmp_path / 'grey.pth')
    return str(path), str(tmp_path / 'grey.pth')


@pytest.mark.slow
def test_commands_for_grey_images(grey, tmp_path, monkeypatch, capsys):
    """Export with a picture, features, FLOPs, receptive fields, gates and predictions."""
    import draw
    import get_flops
    picture = tmp_path / 'a.png'
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (32, 32), dtype=np.uint8)).save(picture)
    run(monkeypatch, *grey, tmp_path / 'model.pt2', '--shape', 32, 32, '--check', picture)
    run(monkeypatch, *grey, tmp_path / 'features.pt2', '--shape', 32, 32, '--features')
    metadata = runtimes.open_file(str(tmp_path / 'model.pt2')).metadata
    assert metadata['channels'] == 'GREY' and metadata['mean'] == [127.5] and metadata['classes'] == list('0123456789')
    monkeypatch.setattr(sys, 'argv', ['get_flops.py', grey[0], '--shape', '32', '32'])
    get_flops.main()
    assert '32x32, exact: 0.2' in capsys.readouterr().out
    for command in ('receptive-field', 'gates'):
        draw.main([command, *grey, '--images', str(picture), '--size', '32', '32', '--out', str(tmp_path / 'x.png')])
    monkeypatch.setattr(sys, 'argv', ['x', 'predict', *grey, str(picture), '--out', str(tmp_path / 'out'),
                                      '--device', 'cpu'])
    with pytest.raises(SystemExit) as done:
        __main__.main()
    assert done.value.code == 0
    found = json.loads((tmp_path / 'out/a.json').read_text())['classes'][0]
    model, _ = deployment.load_model(Config.fromfile(grey[0]), grey[1])
    images = torch.from_numpy(runtimes.normalised(np.asarray(Image.open(picture)), metadata))
    with torch.no_grad():
        scores = model(images, mode='tensor').softmax(1)[0]
    assert found['label'] == int(scores.argmax()) and found['score'] == pytest.approx(float(scores.max()), abs=1e-5)


# Detectors and segmentors.

def small(name):
    cfg = Config.fromfile(f'{ROOT}/configs/{name}.py')
    cfg.model.backbone.arch = dict(embed_dims=[8, 16, 24, 32], depths=[1, 1, 1, 1],
                                   directions=['h', 'v', 'w2', 'w2_flip'])
    for part in ('neck', 'decode_head'):
        if part in cfg.model:
            cfg.model[part].in_channels = [8, 16, 24, 32]
    return cfg


@pytest.mark.parametrize('name', ['mask-rcnn_localvmamba-nano_digits', 'faster-rcnn_localvmamba-nano_digits'])
@pytest.mark.slow
def test_detectors(name, tmp_path):
    """The graph finds what MMDetection's own predict finds, and the file what the graph finds."""
    from mmdet.structures import DetDataSample
    torch.manual_seed(0)
    cfg = small(name)
    model = deployment.load_model(cfg, None)[0]
    with torch.no_grad():  # scores that differ
        model.rpn_head.rpn_cls.weight *= 2
        model.rpn_head.rpn_reg.weight *= 5
        model.roi_head.bbox_head.fc_cls.weight *= 8
    graph = graphs.graph_of(model, (96, 64))
    images = torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(3))
    expected = exporting.run_eager(graph, images)
    sample = DetDataSample(metainfo=dict(img_shape=(96, 64), ori_shape=(96, 64), pad_shape=(96, 64),
                                         batch_input_shape=(96, 64), scale_factor=(1., 1.)))
    with torch.no_grad():
        own = model.predict(images, [sample], rescale=False)[0].pred_instances
    count = len(own)
    assert count > 3 and (expected[1] >= 0).sum() == count
    torch.testing.assert_close(expected[0][:count, 4], own.scores, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(expected[0][:count, :4], own.bboxes, atol=1e-3, rtol=1e-4)
    assert expected[1][:count].tolist() == own.labels.tolist() and (expected[1][count:] == -1).all()
    assert len(expected) == (3 if 'masks' in own else 2)
    path = str(tmp_path / 'model.onnx')
    exporting.to_onnx(graph, (96, 64), path, {})
    found = runtimes.open_file(path, threads=1).run(images.numpy())
    (line, error), = exporting.errors(graph, [value.numpy() for value in expected], found)
    assert error < 1e-4, line


def overlap(a, b):
    """Return the intersection over union of two boxes (x1, y1, x2, y2)."""
    width, height = (min(a[2 + i], b[2 + i]) - max(a[i], b[i]) for i in (0, 1))
    both = max(width, 0) * max(height, 0)
    return both / (sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - both)


@pytest.mark.slow
def test_the_detector_of_the_page(tiny_digits, tmp_path, monkeypatch, capsys):
    """The page's few lines of ONNX Runtime find the digits on photographs of any shape, in their pixels."""
    name = 'mask-rcnn_localvmamba-nano_digits'
    run(monkeypatch, f'{ROOT}/configs/{name}.py', f'mmlocalmamba://{name}', tmp_path / 'detector.onnx')
    blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'docs/deployment.md').read_text(), flags=re.S)
    code, = (block for block in blocks if 'detector.onnx' in block)
    assert len([line for line in code.splitlines() if line and 'import' not in line]) <= 12
    monkeypatch.chdir(tmp_path)
    known = json.loads((tiny_digits / 'coco/annotations/instances_val.json').read_text())
    right = wrong = there = 0
    # (left, top, right, bottom) of the part that is cut out, and its enlargement.
    cuts = [((0, 0, 128, 128), 1), ((0, 0, 128, 80), 3), ((40, 0, 128, 128), 2)]
    for entry, (part, scale) in zip(known['images'], cuts):
        picture = Image.open(tiny_digits / 'coco/val' / entry['file_name']).crop(part)
        picture.resize((scale * picture.width, scale * picture.height), Image.BILINEAR).save('photo.png')
        capsys.readouterr()
        exec(re.sub(r"'data/digits/\S+\.png'", "'photo.png'", code), {})
        found = [(line[0], json.loads(line[line.index('['):])) for line in capsys.readouterr().out.splitlines()]
        truths = []
        for truth in known['annotations']:
            x, y, width, height = truth['bbox']
            x, y = x - part[0], y - part[1]
            if truth['image_id'] == entry['id'] and 0 <= x and 0 <= y and x + width <= picture.width \
                    and y + height <= picture.height:
                label = next(kind['name'] for kind in known['categories'] if kind['id'] == truth['category_id'])
                truths.append((label, [scale * value for value in (x, y, x + width, y + height)]))
        there += len(truths)
        good = [any(label == other and overlap(box, place) > 0.5 for label, box in found) for other, place in truths]
        right += sum(good)
        wrong += len(found) - sum(good)
    assert there >= 3 and right >= 0.7 * there and wrong <= 0.5 * there, (there, right, wrong)


def test_errors_of_detections():
    """Those that are equal may change places; what is missing, or of another label, is an error."""
    graph = type('G', (), dict(task='detection', outputs=('boxes', 'labels')))
    boxes = np.array([[0, 0, 10, 10, .9], [5, 5, 20, 20, .8], [0, 0, 0, 0, 0]], dtype=np.float32)
    labels = np.array([1, 2, -1])
    order = [1, 0, 2]
    assert next(exporting.errors(graph, [boxes, labels], [boxes[order], labels[order]]))[1] == 0
    assert next(exporting.errors(graph, [boxes, labels], [boxes, labels[order]]))[1] == np.inf
    assert next(exporting.errors(graph, [boxes, labels], [boxes, np.array([1, 2, 2])]))[1] == np.inf
    shifted = boxes.copy()
    shifted[0, 0] += 0.1
    assert next(exporting.errors(graph, [boxes, labels], [shifted, labels]))[1] == pytest.approx(0.1 / 20)


@pytest.mark.slow
def test_segmentor(tmp_path):
    cfg = small('upernet_localvmamba-nano_digits')
    model = randomised(deployment.load_model(cfg, None)[0])
    graph = graphs.graph_of(model, (64, 96))
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    expected, = exporting.run_eager(graph, images)
    assert expected.shape == (1, cfg.model.decode_head.num_classes, 64, 96)
    path = str(tmp_path / 'model.onnx')
    exporting.to_onnx(graph, (64, 96), path, json.loads(json.dumps(deployment.metadata(cfg, graph, (64, 96), None))))
    found, = runtimes.open_file(path, threads=1).run(images.numpy())
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4 * float(expected.abs().max()))


def test_other_detectors_give_their_features(tmp_path):
    cfg = small('retinanet_localvmamba-nano_digits')
    model = deployment.load_model(cfg, None)[0]
    with pytest.raises(NotImplementedError, match='RetinaNet.*--features'):
        graphs.graph_of(model, (64, 64))
    graph = graphs.graph_of(model, (64, 64), features=True)
    assert len(exporting.run_eager(graph, torch.zeros(1, 3, 64, 64))) == len(graph.outputs) > 3


@pytest.mark.parametrize(('name', 'shape', 'metric'), [
    ('localvmamba-nano_digits', (32, 32), 'accuracy/top1'),
    ('upernet_localvmamba-nano_digits', (128, 128), 'mIoU'),
])
@pytest.mark.slow
def test_metrics_of_a_file(name, shape, metric, configuration, tmp_path, monkeypatch, capsys):
    """They are those that the model itself has on the same data."""
    from mmengine.runner import Runner
    cfg = configuration(name)
    runner = Runner.from_cfg(cfg)
    with torch.no_grad():
        randomised(runner.model)
    checkpoint = tmp_path / 'weights.pth'
    meta = dict(dataset_meta=runner.test_dataloader.dataset.metainfo)
    torch.save(dict(state_dict=runner.model.state_dict(), meta=meta), checkpoint)
    expected = runner.test()[metric]
    assert expected > 0
    model, classes = deployment.load_model(cfg, str(checkpoint))
    graph, path = graphs.graph_of(model, shape), str(tmp_path / 'model.onnx')
    exporting.to_onnx(graph, shape, path, deployment.metadata(cfg, graph, shape, classes))
    cfg.dump(tmp_path / 'whole.py')
    monkeypatch.setattr(sys, 'argv', ['evaluate.py', str(tmp_path / 'whole.py'), path, '--threads', '1'])
    capsys.readouterr()
    evaluate.main()
    found = dict(line.split(': ') for line in capsys.readouterr().out.splitlines() if ': ' in line)
    assert float(found[metric]) == pytest.approx(expected, abs=2e-3 * max(1, abs(expected)))
