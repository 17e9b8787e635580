"""python -m mmlocalmamba predict: what is found, drawn and written, by classifiers of the core."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from processes import ROOT

from mmlocalmamba import __main__, create_model
from mmlocalmamba.predict import (
    Found,
    Predictor,
    Result,
    _font,
    _place,
    draw,
    find_pictures,
    predict_files,
    read_picture,
)

Image = pytest.importorskip('PIL.Image')
DIGITS = 'localvim_nano.digits'


def picture(path, size=(40, 30), mode='RGB', seed=0):
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.RandomState(seed).randint(0, 255, (*size[::-1], bands), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.squeeze(), mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Pictures of several kinds and other files."""
    for name in ('a.png', 'b.jpg', 'deep/er/c.tif', 'deep/a.webp', 'd.JPEG', 'a.bmp'):
        picture(tmp_path / 'in' / name)
    picture(tmp_path / 'in/grey.png', mode='L')
    picture(tmp_path / 'in/clear.png', mode='RGBA')
    (tmp_path / 'in/notes.txt').write_text('x')
    (tmp_path / 'in/data.csv').write_text('x')
    (tmp_path / 'in/broken.png').write_bytes(b'no picture')
    return tmp_path / 'in'


def predict(*arguments):
    """Run the command in this process; return its exit status."""
    sys.argv = ['mmlocalmamba', 'predict', *map(str, arguments)]
    with pytest.raises(SystemExit) as done:
        __main__.main()
    return done.value.code


@pytest.fixture(autouse=True)
def arguments(monkeypatch):
    monkeypatch.setattr(sys, 'argv', [])


def test_letters_besides_ascii():
    """Each has a form of its own; a font without it draws the same box for all."""
    pytest.importorskip('matplotlib')
    font = _font(20)
    drawn = {bytes(font.getmask(letter)) for letter in 'ßäöéłжα'}
    assert len(drawn) == 7 and bytes(font.getmask('\uffff')) not in drawn


def test_a_folder(folder, tmp_path, capsys):
    assert predict(DIGITS, folder, '--out', tmp_path / 'out', '--device', 'cpu') == 1
    printed = capsys.readouterr().out
    assert '8 pictures predicted' in printed
    assert '2 left out' in printed and 'notes.txt: Pillow reads no picture with this ending' in printed
    assert '1 not read' in printed and 'broken.png: cannot identify image file' in printed
    written = (tmp_path / 'out').rglob('*.json')
    names = sorted(str(path.relative_to(tmp_path / 'out').with_suffix('')) for path in written)
    assert names == ['a', 'a_2', 'b', 'clear', 'd', 'deep/a', 'deep/er/c', 'grey']
    for name in names:
        content = json.loads((tmp_path / f'out/{name}.json').read_text())
        assert len(content['classes']) == 5 and (content['width'], content['height']) == (40, 30)
        scores = [found['score'] for found in content['classes']]
        assert scores == sorted(scores, reverse=True) and sum(scores) < 1.001
        assert {found['name'] for found in content['classes']} <= set('0123456789')
        assert Image.open(tmp_path / f'out/{name}.jpg').width == 384


def test_scores_are_those_of_the_model(tmp_path):
    """Without a resize, of a picture of the model's size."""
    path = picture(tmp_path / 'a.png', (32, 32))
    assert predict(DIGITS, path, '--out', tmp_path / 'out', '--device', 'cpu') == 0
    model = create_model(DIGITS, pretrained=True).eval()
    pixels = torch.from_numpy(np.asarray(Image.open(path), dtype=np.float32)).permute(2, 0, 1)
    with torch.no_grad():
        scores, labels = model((pixels[None] - 127.5) / 127.5)[0].softmax(0).topk(5)
    found = json.loads((tmp_path / 'out/a.json').read_text())['classes']
    assert [entry['label'] for entry in found] == labels.tolist()
    np.testing.assert_allclose([entry['score'] for entry in found], scores.numpy(), rtol=1e-5)


def test_a_name_with_a_checkpoint(tmp_path, capsys):
    """Any number of classes; without names, numbers."""
    torch.manual_seed(0)
    torch.save(dict(state_dict=create_model('localvim_nano', num_classes=3).state_dict()), tmp_path / 'mine.pth')
    path = picture(tmp_path / 'a.png')
    assert predict('localvim_nano', tmp_path / 'mine.pth', path, '--out', tmp_path / 'out', '--device', 'cpu') == 0
    found = json.loads((tmp_path / 'out/a.json').read_text())['classes']
    assert {entry['name'] for entry in found} == {'class 0', 'class 1', 'class 2'}


@pytest.mark.parametrize('arguments, message', [
    (('localvim_nano', 'IMAGE'), 'there are no weights and no file of this name'),
    (('localvim_huge', 'IMAGE'), 'no weights come with localvim_huge.*localvim_nano.digits'),
    (('localvin_nano.digits', 'IMAGE'), "localvin_nano.digits: did you mean 'localvim_nano.digits'"),
    (('localvm_nano', 'nowhere.pth', 'IMAGE'), "did you mean 'localvim_nano'"),
    (('localvim_nano', 'mmlocalmamba://localvim_nano.digit', 'IMAGE'), "did you mean 'localvim_nano.digits'"),
    ((DIGITS, 'nowhere.png'), 'there is no such picture or folder.*nowhere.png'),
    ((DIGITS, 'nowhere.pth', 'IMAGE'), 'nowhere.pth'),
    ((DIGITS, 'nowhere.pth'), 'no picture is named'),
])
def test_what_is_wrong_is_one_line(arguments, message, tmp_path):
    image = picture(tmp_path / 'a.png')
    status = predict(*(image if word == 'IMAGE' else word for word in arguments), '--out', tmp_path / 'out')
    assert isinstance(status, str) and '\n' not in status
    import re
    assert re.search(message, status), status


@pytest.mark.slow
def test_without_openmmlab(tmp_path):
    """Also by the command, in a process of its own."""
    from test_models import BLOCK
    path = picture(tmp_path / 'a.png')
    arguments = ['x', 'predict', DIGITS, str(path), '--out', str(tmp_path)]
    code = f"{BLOCK}\nimport runpy\nsys.argv = {arguments}\nrunpy.run_module('mmlocalmamba', run_name='__main__')"
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0 and '1 picture predicted' in done.stdout, done.stderr
    assert json.loads((tmp_path / 'a.json').read_text())['classes']


# ---- pictures ----

def test_results_are_not_searched(tmp_path):
    picture(tmp_path / 'a.png')
    picture(tmp_path / 'out/a.jpg')
    found, _ = find_pictures([str(tmp_path)], tmp_path / 'out')
    assert [entry.name.name for entry in found] == ['a.png']


def test_pictures_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new('RGB', (40, 30)).save(tmp_path / 'a.jpg', exif=exif)
    assert read_picture(tmp_path / 'a.jpg', 3).size == (30, 40)


@pytest.mark.parametrize('channels, mode', [(1, 'L'), (3, 'RGB')])
def test_channels_of_a_model(channels, mode, tmp_path):
    for number, kind in enumerate(('L', 'RGB', 'RGBA')):
        assert read_picture(picture(tmp_path / f'{number}.png', mode=kind), channels).mode == mode
    deep = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
    deep.save(tmp_path / 'deep.png')
    values = np.asarray(read_picture(tmp_path / 'deep.png', channels))
    assert values.min() == 0 and values.max() == 255 and len(np.unique(values)) == 256


def test_other_channels_are_read_as_they_are(tmp_path):
    path = picture(tmp_path / 'a.png', mode='RGBA')
    assert read_picture(path, 4).mode == 'RGBA'
    with pytest.raises(ValueError, match='it has 4 channels, but the model reads 13'):
        read_picture(path, 13)


# ---- drawings ----

def test_boxes_and_masks_are_drawn_where_they_are():
    mask = np.zeros((400, 400), dtype=bool)
    mask[100:200, 100:200] = True
    predictor = Predictor(lambda _: None, ['cat', 'dog'])
    drawn = np.asarray(draw(Image.new('RGB', (400, 400)), Result(objects=[
        Found(0, 0.9, [100, 100, 200, 200], mask), Found(1, 0.5, [250, 250, 390, 390])]), predictor)).astype(int)
    red, blue = predictor.color(0), predictor.color(1)
    np.testing.assert_allclose(drawn[150, 150], np.array(red) * 110 / 255, atol=2)
    assert drawn[150, 100].tolist() == list(red) and drawn[300, 250].tolist() == list(blue)
    assert drawn[300, 300].tolist() == [0, 0, 0] == drawn[150, 230].tolist()
    assert (drawn[76:99, 100:160] == red).all(-1).mean() > 0.3  # the label, above its box


def test_captions_are_wider_than_a_narrow_picture():
    predictor = Predictor(lambda _: None, ['a name that is longer than this picture is wide'])
    drawn = draw(Image.new('RGB', (20, 384)), Result(classes=[(0, 0.5)]), predictor)
    dark = np.asarray(drawn.convert('L'))[388:] < 128
    assert dark[:, 200:].any() and not dark[:, -8:].any()


@pytest.mark.parametrize('count', [0, 1, 2])
def test_objects_are_counted(count, tmp_path, capsys):
    predictor = Predictor(lambda _: Result(objects=[Found(0, 0.9, [1, 1, 9, 9])] * count), ['cat'])
    assert predict_files(predictor, [str(picture(tmp_path / 'a.png'))], tmp_path / 'out')
    printed = capsys.readouterr().out
    assert f'1 picture predicted, {count} object{"s" * (count != 1)} found: ' in printed
    assert ('--score' in printed) == (count == 0)


def test_labels_do_not_cover_each_other():
    box, taken, size = (40, 40, 60, 60), [], (100, 100)
    places = []
    for _ in range(3):
        x, y = _place(box, 20, 10, size, taken)
        places.append((x, y))
        taken.append((x, y, x + 20, y + 10))
    assert places == [(40, 30), (40, 60), (40, 40)]
    assert _place((90, 1, 99, 99.5), 20, 10, size, []) == (80, 0)  # at an edge


def test_background_is_not_painted_over():
    predictor = Predictor(lambda _: None, ['background', 'cat'], palette=[[9, 9, 9], [0, 0, 255]])
    labels = np.zeros((400, 400), dtype=np.int64)
    labels[:200] = 1
    drawn = np.asarray(draw(Image.new('RGB', (400, 400), 'white'), Result(labels=labels), predictor))
    assert drawn[300, 200].tolist() == [255] * 3 and drawn[100, 200].tolist() == [115, 115, 255]


def test_a_segmentation(tmp_path, capsys):
    labels = np.zeros((30, 40), dtype=np.int64)
    labels[:, 20:] = 2
    predictor = Predictor(lambda _: Result(labels=labels), ['sky', 'sea', 'sand'],
                          palette=[[0, 0, 255], [0] * 3, [255] * 3])
    assert predict_files(predictor, [str(picture(tmp_path / 'a.png'))], tmp_path / 'out')
    content = json.loads((tmp_path / 'out/a.json').read_text())
    assert content['classes'] == [dict(label=0, name='sky', share=0.5), dict(label=2, name='sand', share=0.5)]
    assert np.array_equal(np.asarray(Image.open(tmp_path / 'out' / content['labels'])), labels)
    drawn = np.asarray(Image.open(tmp_path / 'out/a.jpg')).astype(int)
    assert (drawn[100:200, 20:150].mean((0, 1)) - drawn[100:200, 220:350].mean((0, 1)))[0] < -100


def test_an_interrupted_run_leaves_whole_files(tmp_path):
    def run(_):
        if list((tmp_path / 'out').glob('*.json')):
            raise KeyboardInterrupt
        return Result(classes=[(0, 1.)])

    for name in 'ab':
        picture(tmp_path / f'in/{name}.png')
    with pytest.raises(KeyboardInterrupt):
        predict_files(Predictor(run, ['x']), [str(tmp_path / 'in')], tmp_path / 'out')
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['a.jpg', 'a.json']
