"""The demo data: the same bytes every time, honest splits, readable labels."""
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from dataset_converters import digits
from PIL import Image

pytest.importorskip('sklearn')
pytest.importorskip('skimage')
COCO = pytest.importorskip('pycocotools.coco').COCO

SCRIPT = Path(__file__).parents[2] / 'tools/dataset_converters/digits.py'


@pytest.fixture
def data(tiny_digits):
    return tiny_digits


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob('*') if path.is_file()
    }


def instances(data, split):
    return json.loads((data / f'coco/annotations/instances_{split}.json').read_text())


def test_another_process_writes_the_same_bytes(data, tmp_path):
    out = tmp_path / 'new' / 'digits'
    done = subprocess.run([sys.executable, SCRIPT, out, '--scale', 'tiny'],
                          check=True, capture_output=True, text=True)
    assert hashes(out) == hashes(data)
    assert 'coco/train: 8 images' in done.stdout


def test_another_seed_gives_other_data(data, tmp_path):
    digits.generate(tmp_path / 'digits', scale='tiny', seed=1)
    assert instances(tmp_path / 'digits', 'train') != instances(data, 'train')


def test_splits_are_disjoint_and_stratified():
    labels = digits.load_digits().target
    rows = digits.split_rows(labels, digits.VAL_DIGITS)
    assert sorted(np.concatenate([rows['train'], rows['val']])) == list(range(len(labels)))
    share = np.bincount(labels[rows['val']]) / np.bincount(labels)
    assert np.allclose(share, digits.VAL_DIGITS, atol=0.01)
    photos = digits.split_photos()
    assert sorted(photos['train'] + photos['val']) == sorted(digits.PHOTOS)


def test_written_splits_share_nothing(data):
    used_digits, used_photos = {}, {}
    for split, folder in (('train', 'training'), ('val', 'validation')):
        coco = instances(data, split)
        used_digits[split] = {a['digit_index'] for a in coco['annotations']}
        used_digits[split] |= {int(p.stem) for p in data.glob(f'imagenet/{split}/*/*.png')}
        names = [image['file_name'] for image in coco['images']]
        names += [p.name for p in data.glob(f'ade/images/{folder}/*.png')]
        used_photos[split] = {Path(name).stem.split('_', 1)[1] for name in names}
    for used in (used_digits, used_photos):
        assert used['train'] and used['val']
        assert not used['train'] & used['val']


def test_imagenet_folders(data):
    labels = digits.load_digits().target
    for path in data.glob('imagenet/*/*/*.png'):
        image = Image.open(path)
        assert (image.size, image.mode) == ((32, 32), 'RGB')
        assert labels[int(path.stem)] == int(path.parent.name)
    assert len(list(data.glob('imagenet/train/*/*.png'))) == 80


@pytest.mark.parametrize('split', digits.SPLITS)
def test_coco_boxes_and_masks_agree(data, split):
    coco = COCO(data / f'coco/annotations/instances_{split}.json')
    labels = digits.load_digits().target
    assert {c['id']: c['name'] for c in coco.cats.values()} == {
        i + 1: str(i) for i in range(10)}
    for image_id, image in coco.imgs.items():
        picture = np.asarray(Image.open(data / 'coco' / split / image['file_name']))
        assert picture.shape == (image['height'], image['width'], 3)
        annotations = coco.imgToAnns[image_id]
        assert 2 <= len(annotations) <= 6
        covered = np.zeros(picture.shape[:2], int)
        for annotation in annotations:
            mask = coco.annToMask(annotation)
            rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert annotation['bbox'] == [
                cols[0], rows[0], cols[-1] - cols[0] + 1, rows[-1] - rows[0] + 1]
            assert annotation['area'] == mask.sum() > 0
            assert annotation['iscrowd'] == 0
            assert annotation['category_id'] == labels[annotation['digit_index']] + 1
            assert picture[mask > 0].mean() > picture[mask == 0].mean()
            covered += mask
        assert covered.max() == 1


@pytest.mark.parametrize('split, number', [('training', 8), ('validation', 4)])
def test_label_images(data, split, number):
    paths = sorted((data / 'ade/annotations' / split).glob('*.png'))
    assert len(paths) == number
    assert [p.name for p in paths] == [
        p.name for p in sorted((data / 'ade/images' / split).glob('*.png'))]
    for path in paths:
        label_map = Image.open(path)
        assert (label_map.size, label_map.mode) == ((128, 128), 'L')
        values = set(np.unique(label_map).tolist())
        assert {0, 1} < values <= set(range(12))


def test_oriented_boxes(tmp_path):
    """Rectangles, tight around bright digits, and smaller than boxes along the axes."""
    digits.generate(tmp_path / 'digits', scale='tiny', rotated=True)
    areas = []
    for split, number in (('train', 8), ('val', 4)):
        folder = tmp_path / 'digits/dota' / split
        labels = sorted((folder / 'annfiles').glob('*.txt'))
        assert len(labels) == number == len(list((folder / 'images').glob('*.png')))
        for path in labels:
            picture = np.asarray(Image.open(folder / 'images' / f'{path.stem}.png')).max(-1)
            lines = [line.split() for line in path.read_text().splitlines()]
            assert 2 <= len(lines) <= 6
            for *corners, label, difficulty in lines:
                assert label in list('0123456789') and difficulty == '0'
                corners = np.array(corners, np.float32).reshape(4, 2)
                sides = np.roll(corners, -1, 0) - corners
                lengths = np.linalg.norm(sides, axis=1)
                cosines = (sides * np.roll(sides, -1, 0)).sum(1) / lengths / np.roll(lengths, -1)
                assert np.abs(cosines).max() < 2e-3  # corners have two decimals
                inside = np.zeros(picture.shape, np.uint8)
                cv2.fillPoly(inside, [corners.round().astype(int)], 1)
                assert picture[inside > 0].max() >= digits.INK[0] - 10
                areas.append((lengths[0] * lengths[1], np.prod(np.ptp(corners, axis=0))))
    oriented, along = np.array(areas).T
    assert (oriented <= along * 1.01).all() and oriented.sum() < 0.8 * along.sum()


def test_refuses_to_overwrite(data, tmp_path):
    with pytest.raises(SystemExit, match='exists'):
        digits.generate(data, scale='tiny')
    foreign = tmp_path / 'photos'
    foreign.mkdir()
    with pytest.raises(SystemExit, match='not written by this tool'):
        digits.generate(foreign, scale='tiny', overwrite=True)


def test_overwrites_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    out = tmp_path / 'digits'
    digits.generate(out, scale='tiny', seed=1)
    first = hashes(out)

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(digits, 'write_ade', interrupt)
        with pytest.raises(KeyboardInterrupt):
            digits.generate(out, scale='tiny', overwrite=True)
    assert hashes(out) == first
    assert list(tmp_path.iterdir()) == [out]

    digits.generate(out, scale='tiny', overwrite=True)
    assert hashes(out) != first
    assert list(tmp_path.iterdir()) == [out]


def test_a_stopped_run_leaves_nothing(tmp_path):
    process = subprocess.Popen([sys.executable, SCRIPT, tmp_path / 'digits'],
                               stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not any(tmp_path.rglob('*.png')) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert list(tmp_path.iterdir()) == []


def test_names_a_photograph_that_is_missing():
    with pytest.raises(SystemExit, match='absent.png'):
        digits.load_photos(['absent.png'])
