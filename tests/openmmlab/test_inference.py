"""The inferencers of mmpretrain, mmdet and mmsegmentation with our configurations and a checkpoint, on one image."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from file_server import saved, serving
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS, DefaultScope
from PIL import Image

from mmlocalmamba import __main__, create_model, files
from mmlocalmamba.weights import to_official
from mmlocalmamba.weights.released import NAMED, Weights

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
pytestmark = pytest.mark.usefixtures('no_scope')


@pytest.fixture
def image(tmp_path):
    """A file, not square, of another size than the training images."""
    pixels = np.random.RandomState(0).randint(0, 255, size=(40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'image.png')
    return str(tmp_path / 'image.png')


@torch.no_grad()
def prepare(name, image, folder):
    """A checkpoint of random weights as the training writes it; its model's own result for the image, by the
    configuration's test pipeline. Annotations, which a user's image lacks, are left out."""
    path = CONFIGS / f'{name}.py'
    cfg = Config.fromfile(path)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build({'data_preprocessor': cfg.get('data_preprocessor'), **cfg.model}).eval()
        transforms = [step for step in cfg.test_dataloader.dataset.pipeline if step.type != 'LoadAnnotations']
        sample = Compose(transforms)(dict(img_path=image, img_id=0))
        expected, = model.test_step(pseudo_collate([sample]))
    metainfo = cfg.get('metainfo', dict(classes=tuple('0123456789')))
    checkpoint = folder / 'checkpoint.pth'
    torch.save(dict(meta=dict(dataset_meta=dict(metainfo)), state_dict=model.state_dict()), checkpoint)
    torch.manual_seed(1)  # an inferencer that did not load would have other weights
    return str(path), str(checkpoint), expected


def test_classification(image, tmp_path):
    config, checkpoint, expected = prepare('localvmamba-nano_digits', image, tmp_path)
    from mmpretrain import ImageClassificationInferencer
    infer = ImageClassificationInferencer(config, pretrained=checkpoint, device='cpu')
    result, = infer(image, show_dir=str(tmp_path / 'drawn'))
    np.testing.assert_allclose(result['pred_scores'], expected.pred_score.numpy(), atol=1e-5)
    assert result['pred_class'] == '0123456789'[result['pred_label']]
    assert (tmp_path / 'drawn' / 'image.png').is_file()


def test_weights_of_the_authors(image, tmp_path):
    """An inferencer takes a file by its path as it is, and by mmlocalmamba:// converted."""
    config, checkpoint, expected = prepare('localvmamba-nano_digits', image, tmp_path)
    torch.save(to_official(torch.load(checkpoint)['state_dict'])[0], tmp_path / 'official.pth')
    from mmpretrain import ImageClassificationInferencer
    with pytest.raises(RuntimeError, match='no weight of it under "backbone.".*name it mmlocalmamba://FILE'):
        ImageClassificationInferencer(config, pretrained=str(tmp_path / 'official.pth'), device='cpu')
    infer = ImageClassificationInferencer(config, pretrained=f'{files.SCHEME}{tmp_path}/official.pth', device='cpu')
    np.testing.assert_allclose(infer(image)[0]['pred_scores'], expected.pred_score.numpy(), atol=1e-5)


@pytest.fixture
def released(monkeypatch, tmp_path):
    """Serve weights of a shipped configuration as if the authors had released them, under a name."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.delenv('http_proxy', raising=False)
    served = {}
    with serving(served) as (address, _):

        def serve(config, weights, **fields):
            served[f'{config}.pth'] = saved(dict(state_dict=weights))
            entry = Weights(config, f'{address}/{config}.pth', source='https://example.org', **fields)
            monkeypatch.setitem(NAMED, 'of-others', entry)
            return f'{files.SCHEME}of-others'

        yield serve


@pytest.mark.parametrize('spelling', ['name', 'address'])
def test_released_classifier(spelling, released, image, tmp_path):
    """Class names are those of the data set that the name tells."""
    config, checkpoint, expected = prepare('localvmamba-nano_digits', image, tmp_path)
    name = released('localvmamba-nano_digits', to_official(torch.load(checkpoint)['state_dict'])[0],
                    model='localvmamba_nano', num_classes=10)
    from mmpretrain import ImageClassificationInferencer

    from mmlocalmamba.openmmlab.compat import register_loader
    register_loader()
    infer = ImageClassificationInferencer(config, pretrained=name if spelling == 'name' else NAMED['of-others'].file,
                                          device='cpu')
    np.testing.assert_allclose(infer(image)[0]['pred_scores'], expected.pred_score.numpy(), atol=1e-5)
    assert len(infer.classes) == 1000 and 'tench' in infer.classes[0]


def test_released_detector(released, image, tmp_path):
    name = 'mask-rcnn_localvmamba-nano_digits'
    config, checkpoint, expected = prepare(name, image, tmp_path)
    weights = torch.load(checkpoint)['state_dict']
    official, _ = to_official({key: value for key, value in weights.items() if key.startswith('backbone.')})
    heads = {key: value for key, value in weights.items() if not key.startswith('backbone.')}
    source = released(name, {**{f'backbone.{key}': value for key, value in official.items()}, **heads},
                      dataset='mmdet.CocoDataset')
    from mmdet.apis import DetInferencer
    infer = DetInferencer(config, source, device='cpu')
    result, = infer(image, no_save_pred=True)['predictions']
    np.testing.assert_allclose(result['scores'], expected.pred_instances.scores.numpy(), atol=1e-5)
    assert len(infer.model.dataset_meta['classes']) == 80
    model = create_model('of-others', pretrained=True)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert len(model.dataset_meta['classes']) == 80


def test_released_detectors_class_names_need_no_file():
    from mmlocalmamba.openmmlab.compat import class_names
    assert class_names('mmseg.ADE20KDataset')['classes'][0] == 'wall'
    assert len(class_names('mmseg.ADE20KDataset')['palette']) == 150


def test_detection(image, tmp_path):
    config, checkpoint, expected = prepare('mask-rcnn_localvmamba-nano_digits', image, tmp_path)
    from mmdet.apis import DetInferencer
    infer = DetInferencer(config, checkpoint, device='cpu')
    result, = infer(image, out_dir=str(tmp_path), no_save_pred=True)['predictions']
    assert len(result['scores']) == len(expected.pred_instances) > 0
    np.testing.assert_allclose(result['scores'], expected.pred_instances.scores.numpy(), atol=1e-5)
    np.testing.assert_allclose(result['bboxes'], expected.pred_instances.bboxes.numpy(), atol=1e-2)
    assert result['masks'][0]['size'] == [40, 56]
    assert infer.model.dataset_meta['classes'] == tuple('0123456789')
    assert (tmp_path / 'vis' / 'image.png').is_file()


def test_segmentation(image, tmp_path):
    config, checkpoint, expected = prepare('upernet_localvmamba-nano_digits', image, tmp_path)
    from mmseg.apis import MMSegInferencer
    infer = MMSegInferencer(config, checkpoint, device='cpu')
    labels = infer(image, out_dir=str(tmp_path))['predictions']
    wanted = expected.pred_sem_seg.data[0].numpy()
    assert labels.shape == wanted.shape == (40, 56)
    assert (labels == wanted).mean() > 0.99  # a tie may fall either way
    assert len(np.unique(wanted)) > 1
    assert infer.visualizer.dataset_meta['classes'][0] == 'background'
    assert any((tmp_path / 'vis').iterdir())


def test_by_name_without_weights_is_refused(monkeypatch):
    """MMPretrain would warn and go on with random weights; the metafile has words in the place of a file."""
    from mmpretrain import ImageClassificationInferencer
    from mmpretrain.apis.model import ModelHub
    monkeypatch.setattr(ModelHub, '_models_dict', dict(ModelHub._models_dict))
    ModelHub.register_model_index(CONFIGS.parent / 'model-index.yml', config_prefix=CONFIGS.parent)
    with pytest.raises(FileNotFoundError, match='no weights of it were released'):
        ImageClassificationInferencer('localvim-t-nosearch_8xb128_in1k', device='cpu')


# ---- the command ----

def predict(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['mmlocalmamba', 'predict', *map(str, arguments), '--device', 'cpu'])
    with pytest.raises(SystemExit) as done:
        __main__.main()
    return done.value.code


@pytest.mark.parametrize('name', ['localvim-nano_digits', 'mask-rcnn_localvmamba-nano_digits',
                                  'upernet_localvim-nano_digits'])
def test_predict_by_name(name, tiny_digits, tmp_path, monkeypatch):
    """Packaged weights on pictures of their own kind."""
    folder = dict(localvim='imagenet/val/3', mask='coco/val', upernet='ade/images/validation')[
        name.split('-')[0].split('_')[0]]
    path = sorted((tiny_digits / folder).iterdir())[0]
    assert predict(monkeypatch, CONFIGS / f'{name}.py', path, '--out', tmp_path / 'out') == 0
    content = json.loads((tmp_path / f'out/{path.stem}.json').read_text())
    assert Image.open(tmp_path / f'out/{path.stem}.jpg').width >= 384
    if name.startswith('localvim'):
        assert content['classes'][0]['name'] == '3' and content['classes'][0]['score'] > 0.5
    elif name.startswith('mask'):
        from pycocotools import mask as coder
        assert content['objects'] and all(found['score'] >= 0.3 for found in content['objects'])
        mask = coder.decode(content['objects'][0]['mask'])
        left, top, right, bottom = content['objects'][0]['box']
        assert mask.shape == (content['height'], content['width']) and mask.any()
        assert mask[round(top):round(bottom) + 1, round(left):round(right) + 1].sum() > 0.95 * mask.sum()
    else:
        labels = np.asarray(Image.open(tmp_path / 'out' / content['labels']))
        assert labels.shape == (content['height'], content['width'])
        assert content['classes'][0] == dict(label=0, name='background', share=float((labels == 0).mean()))


def test_predict_wants_weights(image, monkeypatch):
    status = predict(monkeypatch, CONFIGS / 'localvmamba-nano_digits.py', image)
    assert 'no weights come with' in status and 'Name a checkpoint after it' in status and '\n' not in status
    assert 'did you mean' not in status  # the configuration is there


def test_predict_refuses_the_checkpoint_of_another_model(image, tmp_path, monkeypatch, capsys):
    """No wall of keys, no picture with a random head."""
    _, segmentor, _ = prepare('upernet_localvmamba-nano_digits', image, tmp_path)
    status = predict(monkeypatch, CONFIGS / 'localvmamba-nano_digits.py', segmentor, image, '--out', tmp_path / 'out')
    assert 'checkpoint.pth is not of the model of ' in status and 'head.fc' in status and 'Name the config' in status
    assert 'size mismatch' not in ''.join(capsys.readouterr()) and not (tmp_path / 'out').exists()


def test_predict_refuses_another_number_of_classes(image, tmp_path, monkeypatch):
    torch.save(dict(state_dict=create_model('localvmamba_nano', num_classes=3).state_dict()), tmp_path / 'three.pth')
    status = predict(monkeypatch, CONFIGS / 'localvmamba-nano_digits.py', tmp_path / 'three.pth', image)
    assert 'the checkpoint has 3 classes, the configuration 10' in status and '\n' not in status
