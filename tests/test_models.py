"""The front door: models by name, and all of the core in a process without OpenMMLab and timm."""
import subprocess
import sys

import pytest
import torch
from processes import ROOT

import mmlocalmamba
from mmlocalmamba import create_model, list_models
from mmlocalmamba.weights import to_official
from mmlocalmamba.weights.released import NAMED

PACKAGED = sorted(name for name, weights in NAMED.items() if weights.packaged)

BLOCK = '''
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'timm'):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
'''
# Build, train a step, save, load by name, search, derive.
USE = '''
import os, sys, torch, mmlocalmamba
from mmlocalmamba import LocalVim, LocalVMamba, SCAttn, create_model, register_scan
from mmlocalmamba.search.results import find_alphas, top_directions
from mmlocalmamba.weights import load_pretrained
folder = sys.argv[1]

@register_scan('backwards')
def backwards(H, W):
    return torch.arange(H * W - 1, -1, -1)

for kind in (LocalVim, LocalVMamba):
    torch.manual_seed(0)
    model = kind(arch='nano', directions=['h', 'backwards', 'w2'], scattn=dict(reduction=4))
    model.init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    loss = sum(x.square().mean() for x in model(torch.rand(2, 3, 64, 48)))
    loss.backward()
    optimizer.step()
    assert all(p.grad is not None and not torch.equal(p, b) for p, b in zip(model.parameters(), before))
    path = os.path.join(folder, kind.__name__ + '.pth')
    torch.save(dict(state_dict=model.state_dict()), path)
    other = kind(arch='nano', directions=['h', 'backwards', 'w2'], scattn=dict(reduction=4),
                 init_cfg=dict(type='Pretrained', checkpoint=path))
    other.init_weights()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    supernet = kind(arch='nano', directions=dict(candidates=['h', 'v', 'w2'], sampling='single_path'))
    sum(x.square().mean() for x in supernet(torch.rand(2, 3, 64, 64))).backward()
    alphas = torch.stack(list(find_alphas(supernet.state_dict()).values()))
    found = top_directions(alphas.softmax(1), ['h', 'v', 'w2'], 2)
    kind(arch='nano', directions=found)(torch.rand(1, 3, 64, 64))
model = create_model('localvim_nano.digits', pretrained=True).eval()
print(tuple(model(torch.rand(2, 3, 32, 32)).shape), SCAttn(16)(torch.rand(1, 4, 16)).shape[-1])
assert not [name for name in sys.modules if name.split('.')[0] in ('mmengine', 'mmcv', 'timm')]
'''
EXPORT = '''
import sys, numpy, torch
from mmlocalmamba import create_model
from mmlocalmamba.deployment import exporting, graphs, runtimes
model = create_model('localvim_nano.digits', pretrained=True).eval()
backbone = create_model('localvmamba_nano', features_only=True).eval()
for name, one, shape in (('model', model, (32, 32)), ('backbone', backbone, (64, 96))):
    graph = graphs.graph_of(one, shape)
    path = f'{sys.argv[1]}/{name}.onnx'
    exporting.to_onnx(graph, shape, path, graphs.metadata(graph, shape, None))
    images = torch.rand(1, 3, *shape)
    found = runtimes.open_file(path).run(images.numpy())
    for a, b in zip(found, exporting.run_eager(graph, images), strict=True):
        numpy.testing.assert_allclose(a, b.numpy(), atol=1e-4 * float(b.abs().max()))
'''


def run(code, *arguments):
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_importing_the_package_imports_no_torch():
    assert run("import sys, mmlocalmamba; print('torch' in sys.modules, 'LocalVim' in dir(mmlocalmamba))") \
        == 'False True\n'


def test_all_of_the_core_without_openmmlab(tmp_path):
    assert run(BLOCK + USE, tmp_path) == '(2, 10) 16\n'


def test_the_block_blocks():
    done = subprocess.run([sys.executable, '-c', f'{BLOCK}import mmlocalmamba.registry'], cwd=ROOT, capture_output=True)
    assert b'ModuleNotFoundError: mmengine' in done.stderr


@pytest.mark.slow
def test_export_without_openmmlab(tmp_path):
    pytest.importorskip('onnxruntime')
    run(BLOCK + EXPORT, tmp_path)


@pytest.mark.parametrize('name', mmlocalmamba.__all__)
def test_every_name_of_the_front_door_is_there(name):
    if name in ('config_path', 'schedule', 'with_backbone', 'with_classes', 'without_masks') and not (
            ROOT / 'mmlocalmamba/openmmlab').exists():
        pytest.skip('the OpenMMLab door is left out')
    assert getattr(mmlocalmamba, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'mmlocalmamba' has no attribute 'LocalViM'"):
        _ = mmlocalmamba.LocalViM


# ---- models by name ----

PARAMETERS = dict(localvim_tiny=7994152, localvim_small=27783784, localvmamba_tiny=25527160,
                  localvmamba_small=49748536, vmamba_tiny_v2=30249064)


@pytest.mark.parametrize('name', list_models())
def test_models_by_name(name):
    with torch.device('meta'):
        model = create_model(name)
    count = sum(p.numel() for p in model.parameters())
    assert count == PARAMETERS.get(name, count)
    assert model.head.fc.out_features == 1000


def test_names_with_weights():
    """A name is that of a model, with its weights after a dot; detectors and segmentors have configurations' names."""
    for name in list_models(pretrained=True):
        assert name.partition('.')[0] == NAMED[name].model in list_models() or name == NAMED[name].config
    assert list_models('localvim_*') == ['localvim_nano', 'localvim_small', 'localvim_tiny']
    assert {'localvim_tiny', 'localvim_nano.digits', 'vmamba_base'} <= set(list_models(pretrained=True))


@pytest.mark.parametrize('name', PACKAGED)
def test_pretrained(name, caplog):
    torch.manual_seed(0)
    model, again = create_model(name, pretrained=True).eval(), create_model(name, pretrained=True).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(x), again(x))
    features = create_model(name, pretrained=True, num_classes=0).eval()
    torch.testing.assert_close(model.head(features(x)), model(x))
    few = create_model(name, pretrained=True, num_classes=3)
    assert few(x).shape == (2, 3) and 'has no head of 3 classes' in caplog.text
    torch.testing.assert_close(few.backbone.state_dict()['pos_embed'], model.backbone.state_dict()['pos_embed'])


def test_maps():
    maps = create_model('localvmamba_nano', features_only=True)(torch.rand(1, 3, 64, 96))
    assert [tuple(x.shape) for x in maps] == [(1, 32, 16, 24), (1, 64, 8, 12), (1, 128, 4, 6), (1, 256, 2, 3)]
    vim = create_model('localvim_nano', features_only=True, out_indices=(1, 5))
    assert [tuple(x.shape) for x in vim(torch.rand(1, 3, 32, 48))] == [(1, 64, 2, 3)] * 2
    assert len(create_model('localvim_nano', features_only=True)(torch.rand(1, 3, 32, 32))) == 4


@pytest.mark.parametrize('names', ['ours', "the authors'"])
def test_a_checkpoint_by_path(names, tmp_path):
    torch.manual_seed(0)
    model = create_model('localvmamba_nano', num_classes=7, in_channels=4)
    weights = model.state_dict() if names == 'ours' else to_official(model.state_dict())[0]
    torch.save(dict(model=weights), tmp_path / 'x.pth')
    loaded = create_model('localvmamba_nano', pretrained=str(tmp_path / 'x.pth'), num_classes=7, in_channels=4)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))


def test_the_classes_of_an_own_checkpoint(tmp_path):
    model = create_model('localvim_nano', num_classes=3)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'x.pth')
    loaded = create_model('localvim_nano', pretrained=str(tmp_path / 'x.pth'))
    assert torch.equal(model.head.fc.weight, loaded.head.fc.weight)
    torch.save(dict(state_dict=model.backbone.state_dict()), tmp_path / 'x.pth')
    assert create_model('localvim_nano', pretrained=str(tmp_path / 'x.pth')).head.fc.out_features == 1000


@pytest.mark.parametrize('name, options, message', [
    ('localvim_huge', {}, "unknown model 'localvim_huge': .*Known are localvim_nano"),
    ('localvm_tiny', {}, "unknown model 'localvm_tiny': did you mean 'localvim_tiny'\\?"),
    ('localvmamba_tiny', dict(pretrained=True), "no weights come with the name 'localvmamba_tiny': names with weights"),
    ('localvim_nano', dict(channels='mean', pretrained='mmlocalmamba://localvim-nano_digits', num_classes=10,
                           img_size=32, patch_size=4, window_pad='none'), 'channels must be one of'),
    ('mask-rcnn_vmamba-t_1x_coco', dict(num_classes=3), 'import mmlocalmamba.openmmlab.models first|no argument but'),
    ('localvim_nano', dict(out_indices=(1, )), 'out_indices needs features_only=True'),
    ('localvim_nano', dict(directions=['x']), "unknown scan 'x'"),
])
def test_bad_input(name, options, message):
    with pytest.raises(ValueError, match=message):
        create_model(name, **options)


@pytest.mark.parametrize('in_channels, channels', [(1, 'sum'), (4, 'repeat')])
def test_weights_for_images_of_other_channels(in_channels, channels):
    model = create_model('localvim_nano.digits', pretrained=True, in_channels=in_channels, channels=channels).eval()
    digits = create_model('localvim_nano.digits', pretrained=True).eval()
    assert torch.equal(model.head.fc.weight, digits.head.fc.weight)
    grey = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(model(grey.expand(-1, in_channels, -1, -1)), digits(grey.expand(-1, 3, -1, -1))) \
        if channels == 'sum' else model(torch.rand(2, in_channels, 32, 32))
    with pytest.raises(RuntimeError, match="channels='sum' or channels='repeat' adapts it"):
        create_model('localvim_nano.digits', pretrained=True, in_channels=in_channels)


@pytest.mark.slow
def test_torch_hub_loads_a_clone():
    model = torch.hub.load(str(ROOT), 'localvim_nano', source='local', num_classes=5)
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 5)
    digits = torch.hub.load(str(ROOT), 'localvim_nano.digits', source='local', pretrained=True)
    assert digits(torch.rand(1, 3, 32, 32)).shape == (1, 10)


# ---- former names ----

@pytest.mark.parametrize('former, present', [('scans', 'directions'), ('ops.mamba', 'ops.stand_ins'),
                                             ('weights.names', 'weights.official')])
@pytest.mark.slow
def test_former_names_of_modules(former, present):
    code = f'import mmlocalmamba.{former} as a, mmlocalmamba.{present} as b; print(a is b, b.__spec__.name)'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True, capture_output=True)
    assert done.stdout == f'True mmlocalmamba.{present}\n', done.stderr
    assert f'FutureWarning: mmlocalmamba.{former} is called mmlocalmamba.{present} now' in done.stderr
