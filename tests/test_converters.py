"""Fashion-MNIST and stamps become data sets; what is damaged or missing is told, and nothing half-written is left."""
import gzip
import hashlib
import json
import struct

import numpy as np
import pytest
from dataset_converters import fashion_mnist, stamps
from PIL import Image

pytest.importorskip('skimage')


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f'>{array.ndim}I', *array.shape) + array.tobytes()


@pytest.fixture
def clothes(tmp_path, monkeypatch):
    """Files of Fashion-MNIST's names with 40 and 20 random pictures, which are taken for the real ones."""
    rng = np.random.default_rng(0)
    folder = tmp_path / 'source'
    folder.mkdir()
    arrays = {}
    for split, number in (('train', 40), ('t10k', 20)):
        arrays[f'{split}-images-idx3-ubyte'] = rng.integers(0, 256, (number, 28, 28), np.uint8)
        arrays[f'{split}-labels-idx1-ubyte'] = np.arange(number, dtype=np.uint8) % 10
    for index, (name, array) in enumerate(arrays.items()):
        if index % 2:
            (folder / name).write_bytes(idx(array))
        else:
            (folder / f'{name}.gz').write_bytes(gzip.compress(idx(array)))
        monkeypatch.setitem(fashion_mnist.SHA256, name, hashlib.sha256(idx(array)).hexdigest())
    return folder, arrays


def test_every_picture_of_fashion_mnist_has_its_place(clothes, tmp_path, capsys):
    folder, arrays = clothes
    out = tmp_path / 'out'
    fashion_mnist.main([str(folder), str(out)])
    assert 'train: 40 images\nval: 20 images' in capsys.readouterr().out
    for split, source in (('train', 'train'), ('val', 't10k')):
        images, labels = arrays[f'{source}-images-idx3-ubyte'], arrays[f'{source}-labels-idx1-ubyte']
        found = sorted((out / split).rglob('*.png'), key=lambda path: path.stem)
        assert [path.parent.name for path in found] == [fashion_mnist.CLASSES[label] for label in labels]
        for path, image in zip(found, images, strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(path)), image)


def test_a_smaller_choice_is_part_of_a_larger_one(clothes, tmp_path):
    names = []
    for number in (1, 3):
        out = tmp_path / str(number)
        fashion_mnist.main([str(clothes[0]), str(out), '--per-class', str(number)])
        assert len(list((out / 'val').rglob('*.png'))) == 20
        names.append({path.relative_to(out) for path in (out / 'train').rglob('*.png')})
    assert [len(found) for found in names] == [10, 30] and names[0] < names[1]


@pytest.mark.parametrize('damage,message', [
    (lambda file: file.unlink(), 'has neither train-images-idx3-ubyte nor'),
    (lambda file: file.write_bytes(file.read_bytes()[:-9]), 'cannot be read .* damaged'),
    (lambda file: file.write_bytes(gzip.compress(b'\0' * 99)), 'is not that file of Fashion-MNIST'),
])
def test_a_damaged_source_is_told_and_leaves_nothing(clothes, tmp_path, damage, message):
    damage(clothes[0] / 'train-images-idx3-ubyte.gz')
    with pytest.raises(SystemExit, match=f'{message}.*') as error:
        fashion_mnist.main([str(clothes[0]), str(tmp_path / 'out')])
    assert 'dataset-fashion-mnist' in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['source']


def test_more_than_there_is_of_a_class(clothes, tmp_path, capsys):
    with pytest.raises(SystemExit):
        fashion_mnist.main([str(clothes[0]), str(tmp_path / 'out'), '--per-class', '6001'])
    assert '--per-class 6001: there are 6000' in capsys.readouterr().err


@pytest.fixture
def cut_outs(tmp_path):
    """A folder as Debian's package makes it: eight objects of each class, each of a colour of its own; and drawings."""
    source = tmp_path / 'source'
    for index, (name, folders) in enumerate(stamps.CLASSES.items()):
        folder = source / folders[0]
        (folder / 'cartoon').mkdir(parents=True)
        for number in range(8):
            pixels = np.zeros((30, 50, 4), np.uint8)
            pixels[3:27, 3:47] = [20 * index + 40, 30 * number + 20, 0, 120]  # a soft border
            pixels[5:25, 5:45, 3] = 255
            pixels[:3] = [0, 0, 255, 0]  # transparent, and of another colour
            Image.fromarray(pixels).save(folder / f'{name}{number}.png')
        Image.fromarray(pixels).save(folder / 'cartoon' / 'drawing.png')
        Image.fromarray(pixels).save(folder / f'{name}1_mirror.png')
    Image.fromarray(pixels).save(source / 'animals/fish/lobster.png')
    return source


def test_stamps_have_exact_masks_and_splits_share_nothing(cut_outs, tmp_path):
    from pycocotools.coco import COCO
    out = tmp_path / 'out'
    summary = stamps.generate(cut_outs, out, scale='tiny')
    assert summary[0].startswith('64 objects, of each class bird 8, fish 8')
    found = stamps.find_stamps(cut_outs)
    used = {}
    for split in ('train', 'val'):
        coco = COCO(out / f'coco/annotations/instances_{split}.json')
        assert [category['name'] for category in coco.cats.values()] == list(stamps.CLASSES)
        used[split] = {annotation['stamp_index'] for annotation in coco.anns.values()}
        assert used[split]
        for annotation in coco.anns.values():
            name, _ = found[annotation['stamp_index']]
            assert annotation['category_id'] == list(stamps.CLASSES).index(name) + 1
            image = np.asarray(Image.open(out / 'coco' / split / coco.imgs[annotation['image_id']]['file_name']))
            inside = image[coco.annToMask(annotation).astype(bool)].astype(int)
            stamp = stamps.read_stamp(cut_outs / found[annotation['stamp_index']][1])[5, 5, :3]
            # The middle of the object has its colour, its border is mixed with the background.
            assert np.abs(np.median(inside, 0) - stamp).max() <= 2
    sources = (out / 'SOURCES.md').read_text()
    assert sources.count('(train): ') + sources.count('(val): ') == 64 + 12
    assert not used['train'] & used['val']
    for split, rows in used.items():
        assert all(f'- {found[row][1].as_posix()} ({split}): {found[row][0]}\n' in sources for row in rows)


@pytest.mark.slow
def test_label_images_of_stamps_have_all_classes(cut_outs, tmp_path):
    stamps.generate(cut_outs, tmp_path / 'out', scale='default')
    labels = set()
    for path in (tmp_path / 'out/ade/annotations/training').iterdir():
        labels |= set(np.unique(np.asarray(Image.open(path))).tolist())
    assert labels == set(range(10))  # ignored, background, eight classes


def test_transparent_pixels_do_not_bleed_into_the_border():
    pixels = np.zeros((40, 40, 4))
    pixels[..., 2] = 255  # blue where nothing is
    pixels[10:30, 10:30] = [200, 100, 0, 255]
    alpha, colours = stamps.resized(pixels, 17)
    assert np.abs(colours[alpha > 0.1] - [200, 100, 0]).max() < 1
    assert alpha.shape == (17, 17)


def test_the_same_seed_gives_the_same_stamps(cut_outs, tmp_path):
    for name, seed in (('a', 0), ('b', 0), ('c', 1)):
        stamps.generate(cut_outs, tmp_path / name, scale='tiny', seed=seed)
    text = {name: (tmp_path / name / 'coco/annotations/instances_train.json').read_text() for name in 'abc'}
    assert text['a'] == text['b'] != text['c']
    assert len(json.loads(text['a'])['images']) == 8


@pytest.mark.parametrize('damage,message', [
    (lambda source: (source / 'animals/birds/bird3.png').write_bytes(b'no picture'), 'bird3.png cannot be read'),
    (lambda source: Image.new('RGBA', (5, 5)).save(source / 'animals/birds/bird3.png'), 'transparent everywhere'),
    (lambda source: [path.unlink() for path in (source / 'vehicles').glob('*.png')], 'has 0 stamps of the class veh'),
])
def test_damaged_stamps_are_told_and_leave_nothing(cut_outs, tmp_path, damage, message):
    damage(cut_outs)
    with pytest.raises(SystemExit, match=message) as error:
        stamps.main([str(cut_outs), str(tmp_path / 'out')])
    assert 'tuxpaint-stamps-default' in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['source']


@pytest.mark.parametrize('tool', [stamps, fashion_mnist])
def test_no_source(tool, tmp_path):
    with pytest.raises(SystemExit, match='is not a folder. Debian'):
        tool.main([str(tmp_path / 'missing'), str(tmp_path / 'out')])
