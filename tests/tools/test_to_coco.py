"""The converter to COCO, on tiny data in the shape of each program's exports."""
import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dataset_converters import label_images, to_coco
from mmengine.config import Config
from PIL import ExifTags, Image

from mmlocalmamba import config_path

COCO = pytest.importorskip('pycocotools.coco').COCO
masks = pytest.importorskip('pycocotools.mask')

ROOT = Path(__file__).parents[2]


def picture(path, size=(40, 20), orientation=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    form = {'.jpg': 'JPEG', '.jfif': 'JPEG', '.jpe': 'JPEG', '.tif': 'TIFF'}.get(path.suffix.lower())
    Image.new('RGB', size, (90, 120, 30)).save(path, form, **(dict(exif=exif) if orientation > 1 else {}))
    return path


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding='utf-8')
    return path


def dump(path, content):
    return text(path, json.dumps(content))


@pytest.fixture
def convert(tmp_path, capsys):
    """Convert a folder below tmp_path, check what holds for every result, and return (contents by split, output)."""

    def run(source, *options, out='out.json'):
        to_coco.main([str(tmp_path / source), str(tmp_path / out), *map(str, options)])
        said = capsys.readouterr().out
        paths = sorted(tmp_path.glob(f'{out[:-5]}*.json')) if out.endswith('.json') else \
            sorted((tmp_path / out).glob('*.json'))
        contents = {path.stem: json.loads(path.read_text()) for path in paths}
        cfg = {'_base_': Config.fromfile(config_path('faster-rcnn_localvmamba-nano_digits'))}
        exec(said.partition('after the line of _base_:\n')[2], cfg)
        settings = {cfg[f'{part}_dataloader']['dataset']['ann_file']: cfg[f'{part}_dataloader']['dataset']
                    for part in ('train', 'val', 'test') if f'{part}_dataloader' in cfg}
        for path, content in zip(paths, contents.values()):
            check(path, content, settings[str(path)])
            assert cfg['model'].roi_head.bbox_head.num_classes == len(content['categories'])
        return (contents['out'] if [*contents] == ['out'] else contents), said

    return run


def check(path, content, setting):
    """Check a file as its readers do: pycocotools, and MMDetection with the setting that the converter prints."""
    for rows in (content['images'], content['annotations'], content['categories']):
        numbers = [row['id'] for row in rows]
        assert all(type(number) is int and number > 0 for number in numbers) and len(set(numbers)) == len(numbers)
    folder = Path(setting['data_prefix']['img'])
    sizes = {}
    for row in content['images']:
        with Image.open(folder / row['file_name']) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
            assert (row['width'], row['height']) == (image.size[::-1] if turned else image.size)
        sizes[row['id']] = row['width'], row['height']
    for row in content['annotations']:
        (x, y, w, h), (width, height) = row['bbox'], sizes[row['image_id']]
        assert x >= 0 and y >= 0 and x + w <= width + 0.01 and y + h <= height + 0.01 and min(w, h) >= 1
        assert row['area'] > 0 and row['iscrowd'] in (0, 1)
        if 'segmentation' in row:
            COCO(path).annToMask(row)
    assert setting['metainfo']['classes'] == tuple(row['name'] for row in content['categories'])
    datasets = pytest.importorskip('mmdet.datasets')
    dataset = datasets.CocoDataset(
        ann_file=setting['ann_file'], data_prefix=setting['data_prefix'], metainfo=setting['metainfo'],
        test_mode=True, pipeline=[], serialize_data=False)
    kept = [instance for index in range(len(dataset)) for instance in dataset.get_data_info(index)['instances']]
    assert len(dataset) == len(content['images']) and len(kept) == len(content['annotations'])


def objects(content):
    """Return {(file name, class): box}."""
    files = {row['id']: row['file_name'] for row in content['images']}
    names = {row['id']: row['name'] for row in content['categories']}
    return {(files[row['image_id']], names[row['category_id']]): row['bbox'] for row in content['annotations']}


def refused(convert, said, *args, **options):
    with pytest.raises(SystemExit) as error:
        convert(*args, **options)
    assert said in str(error.value), error.value
    return str(error.value)


# ---- a part for the validation ----

@pytest.fixture
def twenty(tmp_path):
    """Twenty pictures with an object each, in one folder."""
    text(tmp_path / 'data/classes.txt', 'cat\nfire engine\n')
    for number in range(20):
        picture(tmp_path / f'data/{number}.png')
        text(tmp_path / f'data/{number}.txt', f'{number % 2} 0.5 0.5 0.5 0.5\n')


def names_of(content):
    return [row['file_name'] for row in content['images']]


def test_a_part_is_held_out(twenty, convert, tmp_path):
    """Each picture is in one of the files, and the next run draws the same."""
    whole, _ = convert('data', out='whole.json')
    contents, said = convert('data', '--hold-out', '0.2', out='out.json')
    train, val = contents['out'], contents['out_val']
    assert len(names_of(val)) == 4 and len(names_of(train)) == 16
    assert sorted(names_of(train) + names_of(val)) == sorted(names_of(whole['whole']))
    assert train['categories'] == val['categories'] and len(val['annotations']) == 4
    assert 'train: 16 pictures, 0 of them' in said and 'val: 4 pictures, 0 of them' in said
    assert f"val_evaluator = dict(ann_file='{tmp_path}/out_val.json')" in said
    assert 'test_evaluator = val_evaluator' in said
    assert convert('data', '--hold-out', '0.2', '--overwrite')[0] == contents
    folder, _ = convert('data', '--hold-out', '0.2', out='folder')
    assert names_of(folder['val']) == names_of(val) and names_of(folder['train']) == names_of(train)


@pytest.mark.parametrize('share, said', [('1', 'must be between 0 and 1, got 1'), ('0', 'got 0'),
                                         ('0.99', 'leaves no picture of 20 for the training')])
def test_shares_that_leave_nothing(share, said, twenty, convert, tmp_path):
    refused(convert, said, 'data', '--hold-out', share)
    assert not (tmp_path / 'out.json').exists()


def test_a_part_of_data_with_splits(tmp_path, convert):
    for split in ('train', 'val'):
        picture(tmp_path / f'data/images/{split}/{split}.jpg')
        text(tmp_path / f'data/labels/{split}/{split}.txt', '0 0.5 0.5 0.5 0.5')
    text(tmp_path / 'data/classes.txt', 'cat')
    refused(convert, "--hold-out divides one split, but there are 'train', 'val'", 'data', '--hold-out', '0.5',
            out='out')
    _, said = convert('data', out='out')
    assert f"val_evaluator = dict(ann_file='{tmp_path}/out/val.json')" in said


def test_the_evaluator_of_a_single_file(twenty, convert, tmp_path):
    _, said = convert('data')
    assert f"val_evaluator = dict(ann_file='{tmp_path}/out.json')" in said and '--hold-out' in said


# ---- YOLO ----

@pytest.fixture
def yolo(tmp_path):
    """A flat folder: two pictures with labels, one without."""
    text(tmp_path / 'data/classes.txt', 'cat\nfire engine\n')
    for name in ('a.JPG', 'b.png', 'c.webp'):
        picture(tmp_path / 'data' / name)
    text(tmp_path / 'data/a.txt', '0 0.5 0.5 0.5 0.5\n1 0.25 0.5 0.1 0.2\n')
    text(tmp_path / 'data/b.txt', '')
    return tmp_path / 'data'


def test_yolo_in_a_flat_folder(yolo, convert):
    content, said = convert('data')
    assert objects(content) == {('a.JPG', 'cat'): [10, 5, 20, 10], ('a.JPG', 'fire engine'): [8, 8, 4, 4]}
    assert [row['file_name'] for row in content['images']] == ['a.JPG', 'b.png', 'c.webp']
    assert 'pictures without a label file, kept' in said and 'c.webp' in said
    assert '3 pictures, 2 of them without objects; 2 objects (cat: 1, fire engine: 1)' in said


@pytest.mark.parametrize('names', [
    'names: [cat, fire engine, "no", "1"]', 'names:\n  0: cat\n  1: fire engine\n  2: no\n  3: 1',
    "names: {'3': 1, '2': no, '1': fire engine, '0': cat}", '\ufeffnc: 4\nnames:\n- cat\n- fire engine\n- no\n- 1'])
def test_names_of_a_data_yaml(names, tmp_path, convert):
    """YAML takes no for False and 1 for a number; a mapping has any order."""
    picture(tmp_path / 'data/images/x y.jpg')
    text(tmp_path / 'data/labels/x y.txt', '1 0.5 0.5 0.5 0.5\n2 0.5 0.5 0.25 0.5')
    text(tmp_path / 'data/data.yaml', names)
    content, _ = convert('data')
    assert [row['name'] for row in content['categories']] == ['cat', 'fire engine', 'no', '1']
    assert set(objects(content)) == {('x y.jpg', 'fire engine'), ('x y.jpg', 'no')}


@pytest.mark.parametrize('place', ['data/labels/train/classes.txt', 'data/labels/classes.txt', 'data/classes.txt',
                                   'data/obj.names', 'data/images/train/classes.txt'])
def test_a_file_of_names_beside_the_labels_or_above(place, tmp_path, convert):
    picture(tmp_path / 'data/images/train/été.jpg')
    text(tmp_path / 'data/labels/train/été.txt', '0 0.5 0.5 0.5 0.5')
    if 'images' in place:
        (tmp_path / 'data/labels/train/été.txt').rename(tmp_path / 'data/images/train/été.txt')
    text(tmp_path / place, '\ufeffcat\r\ndog \r\n\r\n')
    content, said = convert('data', out='out')
    assert objects(content['train']) == {('été.jpg', 'cat'): [10, 5, 20, 10]}
    assert [row['name'] for row in content['train']['categories']] == ['cat', 'dog']
    assert 'left out' not in said


def test_several_sources_of_names(yolo, convert, tmp_path):
    """The nearest counts; two in one place must agree."""
    text(tmp_path / 'data.yaml', 'names: [dog, bird]')
    assert ('a.JPG', 'fire engine') in objects(convert('data')[0])
    text(yolo / 'data.yaml', 'names: [cat, fire engine]')
    convert('data', '--overwrite')
    text(yolo / 'data.yaml', 'names: [fire engine, cat]')
    refused(convert, 'classes.txt name the classes differently', 'data', '--overwrite')
    (yolo / 'classes.txt').unlink()
    (yolo / 'data.yaml').unlink()
    assert ('a.JPG', 'bird') in objects(convert('data', '--overwrite')[0])


@pytest.mark.parametrize('splits', [
    'path: .\ntrain: images/train\nval: images/val', 'train: ../images/train\nval: ../images/val\ntest:',
    'path: /content/datasets/x\ntrain: images/train\nval: [images/val]', 'train: train.txt\nval: ./images/val', ''])
def test_splits_of_a_data_yaml(splits, tmp_path, convert):
    """Folders, lists, Roboflow's ../ and another computer's path; duplicate names in different folders."""
    for split in ('train', 'val'):
        picture(tmp_path / f'data/images/{split}/1.jpg')
        text(tmp_path / f'data/labels/{split}/1.txt', f'{int(split == "val")} 0.5 0.5 0.5 0.5')
    text(tmp_path / 'data/train.txt', './images/train/1.jpg\n')
    text(tmp_path / 'data/data.yaml', f'{splits}\nnames: [cat, dog]\n')
    for source in ('data', 'data/data.yaml'):
        contents, said = convert(source, '--overwrite', out='out')
        assert objects(contents['train']) == {('1.jpg', 'cat'): [10, 5, 20, 10]}
        assert objects(contents['val']) == {('1.jpg', 'dog'): [10, 5, 20, 10]}
        assert "img='" + str(tmp_path / 'data/images/val/') in said
        assert 'left out' not in said
    one, _ = convert('data', '--split', 'val')
    assert one == contents['val']
    assert 'name a folder' in refused(convert, "'train', 'val'", 'data', out='other.json')


def test_roboflows_folders(tmp_path, convert):
    for split in ('train', 'valid', 'test'):
        picture(tmp_path / f'data/{split}/images/a.jpg')
        text(tmp_path / f'data/{split}/labels/a.txt', '0 0.5 0.5 0.5 0.5')
    text(tmp_path / 'data/data.yaml', 'train: ../train/images\nval: ../valid/images\ntest: ../test/images\n'
                                      "nc: 1\nnames: ['cat']\n")
    contents, _ = convert('data', out='out')
    assert set(contents) == {'train', 'val', 'test'}


def test_pictures_of_one_name_in_different_folders(tmp_path, convert):
    for folder, number in (('x', 0), ('y', 1)):
        picture(tmp_path / f'data/images/{folder}/1.jpg')
        text(tmp_path / f'data/labels/{folder}/1.txt', f'{number} 0.5 0.5 0.5 0.5')
    text(tmp_path / 'data/classes.txt', 'cat\ndog\n')
    assert set(objects(convert('data')[0])) == {('x/1.jpg', 'cat'), ('y/1.jpg', 'dog')}


def test_polygons_boxes_keypoints(tmp_path, convert):
    picture(tmp_path / 'data/a.png')
    text(tmp_path / 'data/a.txt', '0 0.25 0.25 0.75 0.25 0.75 0.75\n0 0.5 0.5 0.5 0.5\n')
    text(tmp_path / 'data/classes.txt', 'cat')
    content, _ = convert('data')
    polygon, box = content['annotations']
    assert polygon['segmentation'] == [[10, 5, 30, 5, 30, 15]] and polygon['bbox'] == [10, 5, 20, 10]
    assert polygon['area'] == 100 and box['area'] == 200 and 'segmentation' not in box
    text(tmp_path / 'data/a.txt', '0 0.5 0.5 0.5 0.5 0.4 0.4 2 0.6 0.6 1')
    text(tmp_path / 'data/data.yaml', 'names: [cat]\nkpt_shape: [2, 3]\n')
    content, said = convert('data', '--overwrite')
    assert content['annotations'][0]['bbox'] == [10, 5, 20, 10] and 'sets of keypoints' in said


def test_lines_that_are_no_object_are_named(yolo, convert):
    text(yolo / 'b.txt', '0 0.5 0.5 0.5\n\n5 0.5 0.5 0.1 0.1\nnan 1 1 1 1\n0 20 10 20 10\n0 0.5 0.5 0.2 0.2 0.9\n'
                         '0 0.5 0.5 0.5 0.5\n0 0.5 0.5 0.5 0.5\n0.5 0.5 0.5 0.5 0.5\n0 0.9 0.5 0.4 0.5\n0 2 1 0.1 0.1\n'
                         '0 0.5 0.5 0 0.5\ncat 0.5 0.5 0.1 0.1\n')
    content, said = convert('data', '--examples', '20')
    assert sorted(row['bbox'] for row in content['annotations'] if row['image_id'] == 2) == [
        [10, 5, 20, 10], [28, 5, 12, 10]]
    for number, reason in ((1, '3 numbers'), (3, 'class 5 has no name; there are 0 to 1'), (4, 'not finite'),
                           (5, '--units pixels'), (6, 'confidence'), (9, 'class 0.5'), (13, 'could not convert')):
        assert f'b.txt:{number}: ' in said and reason in said, number
    for line in ('objects that were there twice: 1 (', 'boxes outside of their picture: 1 (',
                 'boxes without an area: 1 (',
                 'boxes cut at the border of the picture: 1 ('):
        assert line in said


def test_units_and_forms_that_are_said(yolo, convert):
    text(yolo / 'a.txt', '0 10 5 30 15')
    refused(convert, 'no object is left', 'data')
    assert objects(convert('data', '--units', 'pixels', '--boxes', 'xyxy')[0]) == {('a.JPG', 'cat'): [10, 5, 20, 10]}


def test_labels_without_a_picture_and_pictures_without_labels(yolo, convert):
    text(yolo / 'lost.txt', '0 0.5 0.5 0.5 0.5')
    text(yolo / 'notes.txt', 'drawn by hand')
    (yolo / 'b.png').write_bytes(b'no picture')
    content, said = convert('data', '--unlabelled', 'leave-out')
    assert [row['file_name'] for row in content['images']] == ['a.JPG']
    assert f'label files without a picture: 1 ({yolo}/lost.txt' in said and 'notes.txt' not in said
    assert f'pictures without a label file: 1 ({yolo}/c.webp' in said
    assert f'pictures that cannot be read: 1 ({yolo}/b.png' in said


def test_strict_writes_nothing_that_is_less(yolo, convert, tmp_path):
    text(yolo / 'lost.txt', '0 0.5 0.5 0.5 0.5')
    refused(convert, 'something is left out', 'data', '--strict')
    assert not (tmp_path / 'out.json').exists()
    (yolo / 'lost.txt').unlink()
    convert('data', '--strict')
    refused(convert, 'exists: choose another name, or pass --overwrite', 'data')


def test_missing_names(yolo, convert):
    (yolo / 'classes.txt').unlink()
    assert '--classes' in refused(convert, 'the class names are missing', 'data')
    assert set(objects(convert('data', '--classes', 'x,y z')[0])) == {('a.JPG', 'x'), ('a.JPG', 'y z')}
    text(yolo / 'classes.txt', 'cat\n\nfire engine\n')
    refused(convert, 'classes.txt:2: the line is empty', 'data', '--overwrite')
    (yolo / 'classes.txt').write_bytes('Katze\nKröte\n'.encode('latin-1'))
    refused(convert, 'classes.txt is not UTF-8', 'data', '--overwrite')


# ---- Pascal VOC ----

def voc(path, boxes, name='a.jpg', size='<size><width>40</width><height>20</height><depth>3</depth></size>'):
    rows = ''.join(f'<object><name>{label}</name>{extra}<bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{right}</xmax>'
                   f'<ymax>{bottom}</ymax></bndbox></object>' for label, (x, y, right, bottom), extra in boxes)
    return text(path, f'<annotation><filename>{name}</filename>{size}{rows}</annotation>')


def test_voc_counts_from_one(tmp_path, convert):
    picture(tmp_path / 'data/JPEGImages/a.JPG')
    picture(tmp_path / 'data/JPEGImages/b.png')
    voc(tmp_path / 'data/Annotations/a.xml', [('fire engine', (1, 1, 40, 20), '<difficult>1</difficult>'),
                                              ('cat', (11, 6, 30, 15), '<difficult>0</difficult>')])
    content, said = convert('data')
    assert objects(content) == {('a.JPG', 'fire engine'): [0, 0, 40, 20], ('a.JPG', 'cat'): [10, 5, 20, 10]}
    assert [row['name'] for row in content['categories']] == ['cat', 'fire engine']
    assert 'coordinates begin with 1' in said and 'difficult objects, kept' in said
    assert 'pictures without an annotation file' in said and 'b.png' in said
    assert {row['iscrowd'] for row in content['annotations']} == {0}
    content, _ = convert('data', '--overwrite', '--difficult', 'ignore', '--unlabelled', 'keep')
    assert [row['iscrowd'] for row in content['annotations']] == [1, 0] and len(content['images']) == 2


@pytest.mark.parametrize('corners, options, expected', [
    ((0, 5, 30, 15), (), [0, 5, 30, 10]), ((10.5, 5, 30, 15), (), [10.5, 5, 19.5, 10]),
    ((10, 5, 30, 15), ('--base', '0'), [10, 5, 20, 10]), ((1, 1, 41, 15), (), [0, 0, 40, 15])])
def test_voc_that_counts_from_zero(corners, options, expected, tmp_path, convert):
    picture(tmp_path / 'data/a.jpg')
    voc(tmp_path / 'data/a.xml', [('cat', corners, '')])
    content, said = convert('data', *options)
    assert objects(content) == {('a.jpg', 'cat'): expected}
    assert ('cut at the border' in said) == (corners[2] == 41)


def test_voc_splits_and_oddities(tmp_path, convert):
    for name in ('a', 'b', 'c'):
        picture(tmp_path / f'data/JPEGImages/{name}.jpg')
        voc(tmp_path / f'data/Annotations/{name}.XML', [(f' {name} ', (2, 2, 20, 10), '')], r'C:\Users\me\old name.jpg')
    text(tmp_path / 'data/ImageSets/Main/train.txt', 'a\n')
    text(tmp_path / 'data/ImageSets/Main/val.txt', 'b\n')
    text(tmp_path / 'data/ImageSets/Main/trainval.txt', 'a\nb\n')
    text(tmp_path / 'data/Annotations/d.xml', '<annotation><object>')
    text(tmp_path / 'data/Annotations/e.xml', '<annotations><image/></annotations>')
    voc(tmp_path / 'data/Annotations/f.xml', [('cat', (1, 1, 5, 5), '')], 'f.jpg')
    text(tmp_path / 'data/Annotations/a.XML', (tmp_path / 'data/Annotations/a.XML').read_text().replace(
        '</annotation>', '<object><name>x</name></object><object><name>y</name><robndbox/></object></annotation>'))
    contents, said = convert('data', out='out')
    assert set(objects(contents['train'])) == {('a.jpg', 'a')} and set(objects(contents['val'])) == {('b.jpg', 'b')}
    for line in ('c.XML', 'files that are not XML: 1 (', 'files of another format (VOC has <annotation>; ',
                 'annotation files without a picture: 1 (', 'a.XML, object 2: <bndbox> is missing', 'a rotated box'):
        assert line in said


def test_voc_polygons_and_sizes(tmp_path, convert):
    picture(tmp_path / 'data/a.jpg')
    voc(tmp_path / 'data/a.xml', [('cat', (10.5, 5, 30, 15), '<polygon><x1>10.5</x1><y1>5</y1><x2>30</x2><y2>5</y2>'
                                                             '<x3>30</x3><y3>15</y3></polygon>')],
        size='<size><width>0</width><height>0</height></size>')
    content, _ = convert('data')
    assert content['annotations'][0]['segmentation'] == [[10.5, 5, 30, 5, 30, 15]]
    voc(tmp_path / 'data/a.xml', [('cat', (20, 10, 60, 30), '')],
        size='<size><width>80</width><height>40</height></size>')
    assert 'no object is left' in refused(convert, 'no object', 'data', '--overwrite')
    content, _ = convert('data', '--overwrite', '--resized', 'scale', '--base', '0')
    assert objects(content) == {('a.jpg', 'cat'): [10, 5, 20, 10]}
    content, _ = convert('data', '--overwrite', '--resized', 'keep', '--base', '0')
    assert objects(content) == {('a.jpg', 'cat'): [20, 10, 20, 10]}


# ---- LabelMe ----

def labelme(path, shapes, name='a.jpg', **fields):
    return dump(path, {'version': '5.4.1', 'flags': {}, 'imagePath': name, 'imageData': None, 'imageHeight': 20,
                       'imageWidth': 40, 'shapes': [dict(dict(group_id=None, flags={}), **shape) for shape in shapes],
                       **fields})


def test_labelme_shapes(tmp_path, convert):
    picture(tmp_path / 'data/images/a b.jpg')
    png = io.BytesIO()
    Image.fromarray(np.full((4, 6), 255, np.uint8)).save(png, 'PNG')
    labelme(tmp_path / 'data/labels/a b.json', [
        dict(label='cat', shape_type='polygon', points=[[10, 5], [30, 5], [30, 15]]),
        dict(label='dog', shape_type='rectangle', points=[[30, 15], [10, 5]]),
        dict(label='ball', shape_type='circle', points=[[20, 10], [25, 10]]),
        dict(label='car', shape_type='polygon', points=[[1, 1], [5, 1], [5, 5]], group_id=3),
        dict(label='car', shape_type='polygon', points=[[11, 1], [15, 1], [15, 5]], group_id=3),
        dict(label='van', shape_type='mask', points=[[2, 3], [7, 6]], mask=base64.b64encode(png.getvalue()).decode()),
        dict(label='way', shape_type='line', points=[[1, 1], [5, 5]]),
        dict(label='bad', shape_type='polygon', points=[[1, 1], [5, 5]])], '..\\images\\a b.jpg')
    content, said = convert('data')
    found = objects(content)
    assert found['a b.jpg', 'cat'] == found['a b.jpg', 'dog'] == [10, 5, 20, 10]
    assert found['a b.jpg', 'ball'] == [15, 5, 10, 10] and found['a b.jpg', 'car'] == [1, 1, 14, 4]
    assert found['a b.jpg', 'van'] == [2, 3, 6, 4] and len(found) == 5
    areas = {row['category_id']: row['area'] for row in content['annotations']}
    ids = {row['name']: row['id'] for row in content['categories']}
    assert abs(areas[ids['ball']] - np.pi * 25) < 4 and areas[ids['car']] == 16 and areas[ids['van']] == 24
    assert 'shape 7: a line has no area' in said and 'shape 8: a polygon of 2 points' in said
    assert 'shapes joined with others of their group_id' in said


def test_labelme_names_and_pictures(tmp_path, convert):
    """A picture of the annotation file's own name is the right one; others are named, missing or inside."""
    box = [dict(label='cat', shape_type='rectangle', points=[[10, 5], [30, 15]])]
    picture(tmp_path / 'data/new.jpg')
    picture(tmp_path / 'data/old.jpg')
    labelme(tmp_path / 'data/new.json', box, 'old.jpg')
    labelme(tmp_path / 'data/old.json', box, r'C:\me\old.jpg')
    text(tmp_path / 'data/broken.json', '{"shapes": [')
    whole = io.BytesIO()
    Image.new('RGB', (40, 20)).save(whole, 'PNG')
    labelme(tmp_path / 'data/inside.json', box, 'inside.png', imageData=base64.b64encode(whole.getvalue()).decode())
    content, said = convert('data')
    assert set(objects(content)) == {('new.jpg', 'cat'), ('old.jpg', 'cat')}
    for line in ('names old.jpg', 'files that are not JSON', 'inside.json', '--extract FOLDER writes it'):
        assert line in said
    (tmp_path / 'data/new.json').unlink()
    (tmp_path / 'data/old.json').unlink()
    content, _ = convert('data', '--extract', tmp_path / 'pictures', '--overwrite')
    assert set(objects(content)) == {('inside.png', 'cat')} and (tmp_path / 'pictures/inside.png').is_file()


# ---- COCO ----

@pytest.fixture
def coco(tmp_path):
    """Write a COCO file of two pictures and three objects, changed by a function."""
    for name in ('a.jpg', 'b.jpg'):
        picture(tmp_path / 'data/images' / name)

    def write(change=lambda content: None, path='data/labels.json'):
        content = dict(
            info=dict(description='mine'), licenses=[],
            images=[dict(id=7, file_name='a.jpg', width=40, height=20, license=2),
                    dict(id=9, file_name='b.jpg', width=40, height=20)],
            annotations=[dict(id=11, image_id=7, category_id=3, bbox=[20, 10, 10, 5], area=50, iscrowd=0,
                              segmentation=[[20, 10, 30, 10, 30, 15, 20, 15]], attributes=dict(occluded=False)),
                         dict(id=12, image_id=9, category_id=1, bbox=[1.25, 2, 3, 4], area=7.5, iscrowd=0),
                         dict(id=13, image_id=9, category_id=3, bbox=[0, 0, 39, 20], area=780, iscrowd=0)],
            categories=[dict(id=3, name='dog', supercategory='animal'), dict(id=1, name='cat', supercategory='animal')])
        change(content)
        dump(tmp_path / path, content)
        return content

    return write


def test_a_right_file_stays_as_it_is(coco, convert):
    source = coco()
    content, said = convert('data')
    assert content['annotations'] == source['annotations'] and content['categories'] == source['categories']
    assert content['images'] == source['images'] and content['info'] == source['info']
    assert not [line for line in said.splitlines() if line.startswith(('changed', 'left out', 'note'))]


def change(path, value):
    """Return a function that sets content[path[0]][path[1]]..., or removes the entry if the value is None."""
    def apply(content):
        for part in path[:-1]:
            content = content[part]
        if value is None:
            del content[path[-1]]
        else:
            content[path[-1]] = value
    return apply


RLE = dict(size=[20, 40], counts=[200, 20, 580])


@pytest.mark.parametrize('path, value, expected', [
    (('annotations', 0, 'iscrowd'), None, 'iscrowd that was missing'),
    (('annotations', 0, 'iscrowd'), '0', 'iscrowd that was missing or no number'),
    (('annotations', 0, 'area'), None, 'areas that were missing or 0'),
    (('annotations', 0, 'area'), 0, 'areas that were missing or 0'),
    (('annotations', 0, 'bbox'), None, 'boxes that were missing, from the segmentation'),
    (('annotations', 0, 'bbox'), [], 'boxes that were missing, from the segmentation'),
    (('images', 0, 'width'), None, 'sizes of pictures that were missing'),
    (('images', 0, 'height'), 0, 'sizes of pictures that were missing'),
    (('annotations', 0, 'segmentation'), [20, 10, 30, 10, 30, 15, 20, 15], 'polygons whose form is'),
    (('annotations', 0, 'segmentation'), [[[20, 10], [30, 10], [30, 15], [20, 15]]], 'polygons whose form is'),
    (('annotations', 0, 'segmentation'), [[20, 10], [30, 10], [30, 15], [20, 15]], 'polygons whose form is'),
    (('annotations', 0, 'id'), 0, 'sets of annotation ids; they are 1 to 3 now: 1 (they began with 0, 12, 13'),
    (('annotations', 0, 'id'), '11', "they began with '11'"),
    (('annotations', 0, 'category_id'), '3', None),
    (('annotations', 0, 'image_id'), '7', None),
    (('categories', 1, 'name'), 'cat ', "'cat ' -> 'cat'"),
    (('images', 0, 'file_name'), 'images\\a.jpg', 'images\\a.jpg -> a.jpg'),
    (('images', 0, 'file_name'), '../upload/1/a.jpg', '../upload/1/a.jpg -> a.jpg')])
def test_what_is_repaired(path, value, expected, coco, convert):
    """Each is said, and the file is that of the right source otherwise."""
    right = coco()
    coco(change(path, value))
    content, said = convert('data')
    assert 'left out' not in said and (expected is None or expected in said)
    assert len([line for line in said.splitlines() if line.startswith('changed')]) == (expected is not None)
    if 'annotation ids' in said or "'11'" in said:
        for number, row in enumerate(right['annotations'], 1):
            row['id'] = number
    for name in ('images', 'categories', 'annotations'):
        assert content[name] == right[name]


def test_ids_from_zero(coco, convert):
    def renumber(content):
        for row in content['images']:
            row['id'] -= 7
        for row in content['annotations']:
            row.update(id=row['id'] - 11, image_id=row['image_id'] - 7, category_id=row['category_id'] - 1)
        for row in content['categories']:
            row['id'] -= 1

    before = coco()
    coco(renumber)
    content, said = convert('data')
    assert objects(content) == objects(before)
    assert said.count('they are 1 to') == 3 and [row['name'] for row in content['categories']] == ['dog', 'cat']
    found, results = COCO(), COCO()
    found.dataset = content
    found.createIndex()
    results = found.loadRes([dict(row, score=1) for row in content['annotations']])
    evaluation = pytest.importorskip('pycocotools.cocoeval').COCOeval(found, results, 'bbox')
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == 1  # 0 is no match to pycocotools


@pytest.mark.parametrize('path, value, expected', [
    (('annotations', 0, 'category_id'), 77, 'annotations of no category: 1 ('),
    (('annotations', 0, 'image_id'), 77, 'annotations of pictures that are not listed: 1 ('),
    (('annotations', 0, 'bbox'), [1, 2, 3], 'boxes that are not four numbers: 1 ('),
    (('annotations', 0, 'bbox'), [1, 2, 3, float('nan')], 'boxes that are not four numbers: 1 ('),
    (('annotations', 0, 'bbox'), [1, 2, 0, 5], 'boxes without an area: 1 ('),
    (('annotations', 0, 'bbox'), [1, 2, -4, 5], 'boxes without an area: 1 ('),
    (('annotations', 0, 'bbox'), [1, 2, 0.5, 5], 'boxes that are narrower than a pixel'),
    (('annotations', 0, 'bbox'), [50, 2, 5, 5], 'boxes outside of their picture: 1 ('),
    (('annotations', 0, 'segmentation'), [[1, 1, 5, 5]], 'polygons that are not three or more points: 1 ('),
    (('annotations', 0, 'segmentation'), [[1, 1, 5, 5, 6, 6, 7]], 'polygons that are not three or more points: 1 ('),
    (('annotations', 0, 'segmentation'), [[]], 'polygons that are not three or more points: 1 ('),
    (('annotations', 0, 'segmentation'), [[1, 1, 5, 1, 9, 1]], 'polygons without an area in the picture: 1 ('),
    (('annotations', 0, 'segmentation'), dict(size=[40, 20], counts=[200, 20, 580]), 'RLE masks that do not fit; '),
    (('annotations', 0, 'segmentation'), dict(size=[20, 40], counts=[200, 20]), 'RLE masks that do not fit; '),
    (('annotations', 0, 'segmentation'), dict(size=[20, 40], counts=[800]), 'RLE masks without a pixel; '),
    (('annotations', 0, 'segmentation'), 'x', 'segmentations that are neither polygons nor RLE; '),
    (('annotations', 0), 5, 'annotations that are no object: 1 ('),
    (('images', 0, 'file_name'), 'lost.jpg', 'images whose picture was not found: 1 ('),
    (('images', 0, 'width'), 80, 'pictures of another size than in the annotations')])
def test_what_is_left_out(path, value, expected, coco, convert):
    coco(change(path, value))
    content, said = convert('data')
    assert expected in said
    kept_box = path[-1] == 'segmentation'
    assert len(content['annotations']) == 3 if kept_box else 2
    if kept_box:
        assert 'segmentation' not in content['annotations'][0]


def test_what_reaches_out_is_cut(coco, convert):
    coco(lambda content: content['annotations'][0].update(bbox=[30, 5, 20, 10], segmentation=[[30, 5, 50, 5, 50, 15]]))
    content, said = convert('data')
    assert content['annotations'][0]['bbox'] == [30, 5, 10, 10]
    polygon = np.reshape(content['annotations'][0]['segmentation'][0], (-1, 2))
    assert sorted(polygon.tolist()) == [[30, 5], [40, 5], [40, 10]]  # on the line from (30, 5) to (50, 15)
    assert 'boxes cut at the border' in said and 'polygons cut at the border' in said


@pytest.mark.parametrize('counts', ['list', 'text'])
def test_rle_stays(counts, coco, convert):
    whole = masks.frPyObjects(RLE, 20, 40)
    rle = RLE if counts == 'list' else dict(size=[20, 40], counts=whole['counts'].decode())
    coco(lambda content: content['annotations'][0].update(segmentation=rle, area=0, bbox=None))
    content, _ = convert('data')
    assert content['annotations'][0]['segmentation'] == rle and content['annotations'][0]['area'] == 20
    assert content['annotations'][0]['bbox'] == [10, 0, 1, 20]


def test_crowds(coco, convert):
    def crowds(content):
        for row in content['annotations']:
            row['iscrowd'] = 1

    coco(crowds)
    refused(convert, '--crowds objects makes them objects', 'data')
    assert {row['iscrowd'] for row in convert('data', '--crowds', 'objects')[0]['annotations']} == {0}
    assert {row['iscrowd'] for row in convert('data', '--crowds', 'keep', '--overwrite')[0]['annotations']} == {1}


def test_boxes_of_another_form(coco, convert):
    before = coco()

    def corners(content):
        for row in content['annotations']:
            x, y, w, h = row['bbox']
            row['bbox'] = [x, y, x + w, y + h]

    def fractions(content):
        for row in content['annotations']:
            row['bbox'] = [value / (20 if index % 2 else 40) for index, value in enumerate(row['bbox'])]

    coco(corners)
    refused(convert, '--boxes xyxy converts them', 'data')
    assert objects(convert('data', '--boxes', 'xyxy')[0]) == objects(before)
    coco(fractions)
    refused(convert, '--units fractions converts them', 'data')
    assert objects(convert('data', '--units', 'fractions', '--overwrite')[0]) == objects(before)


def test_categories_off_by_one(coco, convert):
    def shift(content):
        content['categories'][0]['id'] = 2
        for row in content['annotations']:
            row['category_id'] = {3: 1, 1: 0}[row['category_id']]

    before = coco()
    coco(shift)
    refused(convert, '--category-offset 1 corrects it', 'data')
    assert objects(convert('data', '--category-offset', '1')[0]) == objects(before)
    content, said = convert('data', '--category-offset', '0', '--overwrite')
    assert 'annotations of no category' in said and len(content['annotations']) == 2


def test_root_category(coco, convert):
    """Roboflow's has no objects. One that has some stays, and so does a class without objects."""
    root = dict(id=0, name='animal', supercategory='none')
    coco(lambda content: content['categories'].insert(0, root))
    content, said = convert('data')
    assert [row['name'] for row in content['categories']] == ['dog', 'cat'] and 'root categories' in said
    coco(lambda content: (content['categories'].insert(0, root), content['annotations'][0].update(category_id=0)))
    assert [row['name'] for row in convert('data', '--overwrite')[0]['categories']] == ['animal', 'dog', 'cat']
    coco(lambda content: content['annotations'][1].update(category_id=3))
    assert [row['name'] for row in convert('data', '--overwrite')[0]['categories']] == ['dog', 'cat']


def test_root_category_of_the_name_of_the_only_class(coco, convert):
    def cats(content):
        content['categories'] = [dict(id=0, name='cat', supercategory='none'),
                                 dict(id=1, name='cat', supercategory='cat')]
        for row in content['annotations']:
            row['category_id'] = 1

    coco(cats)
    content, said = convert('data')
    assert [row['name'] for row in content['categories']] == ['cat'] and len(content['annotations']) == 3
    assert 'joined with another of the same name' in said


def test_chosen_classes(coco, convert, tmp_path):
    coco()
    content, said = convert('data', '--classes', text(tmp_path / 'names.txt', 'cow\ncat\n'))
    assert [row['name'] for row in content['categories']] == ['cow', 'cat'] and len(content['annotations']) == 1
    assert "classes that --classes does not name: 1 ('dog', 2 objects)" in said


def test_collisions(coco, convert):
    coco(lambda content: content['images'][1].update(id=7))
    refused(convert, 'the image id 7 is of two pictures, a.jpg and b.jpg', 'data')
    coco(lambda content: content['categories'][1].update(id=3))
    refused(convert, "two categories have the id 3: 'dog' and 'cat'", 'data')
    coco(lambda content: content['images'][1].update(file_name='a.jpg'))
    content, said = convert('data')
    assert len(content['images']) == 1 and len(content['annotations']) == 3
    assert 'images joined with another of the same picture' in said and 'pictures that are not in the file' in said


def test_names_that_fit_several_pictures(coco, convert, tmp_path):
    picture(tmp_path / 'data/x/c.jpg')
    picture(tmp_path / 'data/y/c.jpg')
    coco(lambda content: content['images'][0].update(file_name='c.jpg'))
    _, said = convert('data')
    assert 'images, because several pictures fit' in said and 'x/c.jpg or ' in said
    coco(lambda content: content['images'][0].update(file_name='/mnt/y/c.jpg'))
    assert 'y/c.jpg' in {row['file_name'] for row in convert('data', '--overwrite')[0]['images']}


@pytest.mark.parametrize('paths', [
    ['annotations/instances_train2017.json', 'annotations/instances_val2017.json'],  # COCO, CVAT
    ['train/_annotations.coco.json', 'valid/_annotations.coco.json']])  # Roboflow
def test_several_files(paths, coco, convert, tmp_path):
    """Both files get all classes, in one order, also if one lacks a class."""
    for path in paths:
        coco(lambda content: None, f'data/{path}')
    coco(lambda content: (content['categories'].pop(0), content['annotations'].__delitem__(slice(0, None, 2))),
         f'data/{paths[1]}')
    contents, _ = convert('data', out='out')
    assert set(contents) == {'train', 'val'}
    assert contents['train']['categories'] == contents['val']['categories']
    assert set(objects(contents['val'])) == {('b.jpg', 'cat')}


# ---- pictures that EXIF turns ----

@pytest.mark.parametrize('orientation', range(1, 9))
def test_pictures_that_exif_turns(orientation, coco, convert, tmp_path):
    """Objects that were drawn on the stored pixels turn with them: box, polygon and mask stay on the same pixels."""
    stored = np.zeros((20, 40), np.uint8)
    stored[5:9, 10:30] = 255
    picture(tmp_path / 'data/images/a.png', orientation=1)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(stored).save(tmp_path / 'data/images/a.png', exif=exif)
    code = masks.encode(np.asfortranarray(stored // 255))
    rle = dict(size=[20, 40], counts=code['counts'].decode())
    coco(lambda content: (
        content['images'][0].update(file_name='a.png'),
        content['annotations'][0].update(bbox=[10, 5, 20, 4], area=80, segmentation=[[10, 5, 30, 5, 30, 9, 10, 9]]),
        content['annotations'][2].update(image_id=7, bbox=[10, 5, 20, 4], area=80, segmentation=rle)))
    content, said = convert('data', *(['--exif', 'stored'] if orientation in (2, 3, 4) else []))
    from PIL import ImageOps
    with Image.open(tmp_path / 'data/images/a.png') as image:
        shown = np.asarray(ImageOps.exif_transpose(image)) > 0
    rows = [row for row in content['annotations'] if row['image_id'] == 7]
    ys, xs = np.nonzero(shown)
    for row in rows:
        assert row['bbox'] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1] and row['area'] == 80
    found = COCO(tmp_path / 'out.json')
    assert (found.annToMask(rows[1]) == shown).all()
    # a polygon's raster may differ by its border
    assert (found.annToMask(rows[0]) != shown).sum() <= 24
    assert ('pictures that EXIF turns; their objects are turned with them' in said) == (orientation > 1)


def test_objects_that_were_drawn_on_the_turned_picture(coco, convert, tmp_path):
    picture(tmp_path / 'data/images/a.jpg', orientation=6)
    coco(lambda content: content['images'][0].update(width=20, height=40))
    content, said = convert('data')
    assert content['annotations'][0]['bbox'] == [20, 10, 10, 5] or 'outside' in said
    assert 'turned with them' not in said


# ---- the command ----

def test_formats_that_are_not_plain(yolo, convert, tmp_path):
    voc(yolo / 'a.xml', [('cat', (1, 1, 5, 5), '')])
    assert '--format' in refused(convert, 'annotations of several formats: ', 'data')
    assert len(convert('data', '--format', 'voc')[0]['annotations']) == 1
    (tmp_path / 'empty').mkdir()
    refused(convert, 'has no annotations of yolo, voc, labelme, coco', 'empty')
    refused(convert, 'does not exist', 'absent')


def test_a_second_run_does_not_read_the_first(yolo, convert):
    convert('data', out='data/coco')
    convert('data', '--overwrite', out='data/coco')


def test_the_program(yolo, tmp_path):
    """It exits with an error and writes nothing if nothing is left."""
    program = [sys.executable, ROOT / 'tools/dataset_converters/to_coco.py', yolo, tmp_path / 'out.json']
    text(yolo / 'a.txt', '0 0.5 0.5\n')
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 1 and 'no object is left' in done.stderr and f'{yolo}/a.txt:1: ' in done.stdout
    assert not list(tmp_path.glob('out*'))


# ---- label pictures ----

def test_label_images(tmp_path, capsys):
    colors = np.zeros((4, 6, 3), np.uint8)
    colors[:2] = 250, 0, 7
    (tmp_path / 'masks/train').mkdir(parents=True)
    Image.fromarray(colors).save(tmp_path / 'masks/train/a b.bmp')
    grey = np.where(colors[..., 0] > 0, 255, 0).astype(np.uint8)
    for kind, array in (('grey', grey), ('rgb', np.stack([grey] * 3, 2)), ('rgba', np.stack([grey] * 3 + [grey], 2))):
        (tmp_path / kind).mkdir()
        Image.fromarray(array).save(tmp_path / kind / 'a.png')
    expected = (grey > 0).astype(np.uint8)

    def labels(path):
        with Image.open(tmp_path / path) as image:
            assert image.mode == 'L'
            return np.asarray(image)

    for number, names in enumerate(('# label:color_rgb\nbackground:0,0,0::\nfire engine:250,0,7::\n',
                                    '0 0 0 background\n250, 0, 7, fire engine\n')):
        text(tmp_path / 'colors.txt', names)
        label_images.main([str(tmp_path / 'masks'), str(tmp_path / f'out{number}'), '--colors',
                           str(tmp_path / 'colors.txt')])
        assert (labels(f'out{number}/train/a b.png') == expected).all()
        assert '  1 fire engine: 12 pixels' in capsys.readouterr().out
    for kind in ('grey', 'rgb', 'rgba'):
        label_images.main([str(tmp_path / kind), str(tmp_path / f'out_{kind}'), '--values', '0,255'])
        assert (labels(f'out_{kind}/a.png') == expected).all()
    label_images.main([str(tmp_path / 'grey'), str(tmp_path / 'one'), '--values', '255-255', '--others', 'ignore'])
    assert (labels('one/a.png') == np.where(expected, 0, 255)).all()
    assert 'ignored (255): 0: 12 pixels' in capsys.readouterr().out
    for arguments, said in ((['masks', 'x', '--values', '0,255'], 'has colours: name their classes by --colors'),
                            (['grey', 'x', '--values', '0'], r'not listed \(255: 12\)'),
                            (['grey', 'one', '--values', '0'], 'exists'),
                            (['grey', 'x', '--values', '0,0'], '1 of them different'),
                            (['grey', 'x', '--values', 'a'], 'range')):
        with pytest.raises(SystemExit, match=said):
            label_images.main([str(tmp_path / arguments[0]), str(tmp_path / arguments[1]), *arguments[2:]])
        assert not (tmp_path / 'x').exists()
    label_images.main([str(tmp_path / 'grey'), str(tmp_path / 'one'), '--values', '0,255', '--overwrite'])
    assert (labels('one/a.png') == expected).all()
    with pytest.raises(SystemExit, match='was not written by this tool'):
        label_images.main([str(tmp_path / 'grey'), str(tmp_path / 'rgb'), '--values', '0,255', '--overwrite'])
    with pytest.raises(SystemExit, match=re.escape('not listed ((250, 0, 7): 12)')):
        text(tmp_path / 'colors.txt', '0 0 0 background\n')
        label_images.main([str(tmp_path / 'masks'), str(tmp_path / 'x'), '--colors', str(tmp_path / 'colors.txt')])
    text(tmp_path / 'colors.txt', 'cat 1 2 3\n')
    with pytest.raises(SystemExit, match=r"colors.txt:1: 'cat 1 2 3' is neither"):
        label_images.main([str(tmp_path / 'masks'), str(tmp_path / 'x'), '--colors', str(tmp_path / 'colors.txt')])
