"""The inferencers of mmpretrain, mmdet and mmsegmentation with our configurations and a checkpoint, on one image."""
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS, DefaultScope
from PIL import Image

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


def test_weights_under_other_names_are_refused(image, tmp_path):
    """An inferencer takes a file of the authors unconverted, of which nothing fits."""
    config, checkpoint, _ = prepare('localvmamba-nano_digits', image, tmp_path)
    weights = torch.load(checkpoint)['state_dict']
    torch.save({name.replace('backbone.', ''): value for name, value in weights.items()}, tmp_path / 'official.pth')
    from mmpretrain import ImageClassificationInferencer
    with pytest.raises(RuntimeError, match='no weight of it under "backbone.".*convert it first'):
        ImageClassificationInferencer(config, pretrained=str(tmp_path / 'official.pth'), device='cpu')


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
