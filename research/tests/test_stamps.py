"""Stamps become data sets with exact masks; damaged or missing sources are reported and leave nothing half-written."""
import json

import numpy as np
import pytest
import stamps
from PIL import Image

pytest.importorskip('skimage')


@pytest.fixture
def cut_outs(tmp_path):
    """Write a folder as Debian's package does: eight objects of each class, each with its own colour, and drawings."""
    source = tmp_path / 'source'
    for index, (name, folders) in enumerate(stamps.CLASSES.items()):
        folder = source / folders[0]
        (folder / 'cartoon').mkdir(parents=True)
        for number in range(8):
            pixels = np.zeros((30, 50, 4), np.uint8)
            pixels[3:27, 3:47] = [20 * index + 40, 30 * number + 20, 0, 120]  # a soft border
            pixels[5:25, 5:45, 3] = 255
            pixels[:3] = [0, 0, 255, 0]  # transparent, with another colour
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
            # The object's border is mixed with the background, so its median colour counts.
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
    pixels[..., 2] = 255  # transparent pixels are blue
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
def test_damaged_stamps_are_reported_and_leave_nothing(cut_outs, tmp_path, damage, message):
    damage(cut_outs)
    with pytest.raises(SystemExit, match=message) as error:
        stamps.main([str(cut_outs), str(tmp_path / 'out')])
    assert 'tuxpaint-stamps-default' in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['source']


def test_no_source(tmp_path):
    with pytest.raises(SystemExit, match='is not a folder. Debian'):
        stamps.main([str(tmp_path / 'missing'), str(tmp_path / 'out')])
