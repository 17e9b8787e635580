"""Fashion-MNIST becomes a data set; damaged or missing files are reported and leave nothing half-written."""
import gzip
import hashlib
import struct

import numpy as np
import pytest
from dataset_converters import fashion_mnist
from PIL import Image

pytest.importorskip('skimage')


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f'>{array.ndim}I', *array.shape) + array.tobytes()


@pytest.fixture
def clothes(tmp_path, monkeypatch):
    """Write files with Fashion-MNIST's names and 40 and 20 random images, and accept their checksums."""
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
def test_a_damaged_source_is_reported_and_leaves_nothing(clothes, tmp_path, damage, message):
    damage(clothes[0] / 'train-images-idx3-ubyte.gz')
    with pytest.raises(SystemExit, match=f'{message}.*') as error:
        fashion_mnist.main([str(clothes[0]), str(tmp_path / 'out')])
    assert 'dataset-fashion-mnist' in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['source']


def test_more_than_there_is_of_a_class(clothes, tmp_path, capsys):
    with pytest.raises(SystemExit):
        fashion_mnist.main([str(clothes[0]), str(tmp_path / 'out'), '--per-class', '6001'])
    assert '--per-class 6001: there are 6000' in capsys.readouterr().err


def test_no_source(tmp_path):
    with pytest.raises(SystemExit, match='is not a folder. Debian'):
        fashion_mnist.main([str(tmp_path / 'missing'), str(tmp_path / 'out')])
