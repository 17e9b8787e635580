"""Grad-CAM as mmpretrain's vis_cam.py draws it: the layer that it takes by itself is right for both backbones."""
import ast
import math
from argparse import Namespace
from pathlib import Path

import mmpretrain
import pytest
import torch
from mmcv.cnn.bricks import is_norm
from mmengine.utils import to_2tuple

from mmlocalmamba import create_model

SCRIPT = Path(mmpretrain.__file__).parent / '.mim' / 'tools' / 'visualization' / 'vis_cam.py'
MODELS = {'localvim_nano': dict(img_size=96, patch_size=8), 'localvmamba_nano': dict(patch_size=2)}


@pytest.fixture(scope='module')
def vis_cam():
    """Return two functions of the script, which wants grad-cam when it is imported."""
    wanted = ('get_default_target_layers', 'reshape_transform')
    functions = [node for node in ast.parse(SCRIPT.read_text()).body if getattr(node, 'name', '') in wanted]
    names = dict(is_norm=is_norm, to_2tuple=to_2tuple, math=math)
    exec(compile(ast.Module(functions, []), str(SCRIPT), 'exec'), names)
    return Namespace(**{name: names[name] for name in wanted})


def pictures(count, generator):
    """Return images (count, 3, 96, 96) of noise, half of them with stripes in one place, and these places."""
    x = torch.randn(count, 3, 96, 96, generator=generator) * .3
    places = torch.randint(0, 3, (count, 2), generator=generator) * 32
    for index in range(count // 2):
        row, column = places[index].tolist()
        x[index, :, row:row + 32, column:column + 32] += 2 * (torch.arange(32) // 4 % 2)
    return x, places


def grad_cam(vis_cam, model, x, args):
    """Return the map (B, h, w) of class 1, as grad-cam computes it, and the name of the layer."""
    layer, = vis_cam.get_default_target_layers(model, args)
    kept = []
    handle = layer.register_forward_hook(lambda *values: kept.append(values[-1]))
    logits = model(x)
    handle.remove()
    gradient, = torch.autograd.grad(logits[:, 1].sum(), kept[0])
    activation, gradient = (vis_cam.reshape_transform(value, model, args) for value in (kept[0].detach(), gradient))
    weights = gradient.mean((2, 3), keepdim=True)
    return (weights * activation).sum(1), logits.detach()[:, 1], layer


@pytest.mark.parametrize('name', MODELS)
def test_the_mass_lies_where_the_class_is(name, vis_cam):
    """A classifier of random features tells stripes from none."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = create_model(name, num_classes=2, **MODELS[name]).eval()
    x, _ = pictures(60, generator)
    with torch.no_grad():
        features = model.backbone(x)[-1]
        features = features.mean((2, 3)) if features.dim() == 4 else features
        mean, std = features.mean(0), features.std(0) + 1e-6
        labels = torch.cat([torch.ones(30), -torch.ones(30)])
        normal = (features - mean) / std
        weight = torch.linalg.solve(normal.T @ normal + 10 * torch.eye(normal.shape[1]), normal.T @ labels) / std
        model.head.fc.weight.copy_(torch.stack([-weight, weight]))
        model.head.fc.bias.copy_(torch.stack([weight @ mean, -weight @ mean]))
    x, places = pictures(16, generator)
    args = Namespace(vit_like=True, num_extra_tokens=None)
    cam, logits, layer = grad_cam(vis_cam, model, x, args)
    assert layer is (model.backbone.norm if name.startswith('localvim') else model.backbone.norm3)
    # The logit is the mean of the map, but for the bias.
    h, w = cam.shape[1:]
    torch.testing.assert_close(cam.sum((1, 2)) + model.head.fc.bias[1].item(), logits, atol=1e-3, rtol=1e-3)
    for picture, (row, column) in zip(cam[:8].relu(), (places[:8] * h // 96).tolist()):
        inside = picture[row:row + h // 3, column:column + w // 3].sum()
        assert inside > .4 * picture.sum()


@pytest.mark.parametrize('name', MODELS)
def test_without_vit_like_there_is_an_error(name, vis_cam):
    model, args = create_model(name, **MODELS[name]), Namespace(vit_like=False, num_extra_tokens=None)
    with pytest.raises(ValueError, match='please specify `--vit-like`'):
        grad_cam(vis_cam, model, torch.rand(1, 3, 96, 96), args)
    assert model.backbone.num_extra_tokens == 0
