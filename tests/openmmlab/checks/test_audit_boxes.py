"""The audit of annotation files in COCO's format: each wrong shape is named, and right data pass in silence."""
import json

import numpy as np
import pytest
from PIL import Image
from small_data import CLASSES, clean, coco_audit, coco_content, coco_dataset, picture, texts, write_coco

from mmlocalmamba.openmmlab import checks
from mmlocalmamba.openmmlab.engine.data import naming_annotation_files


def each(entries, **values):
    for entry in entries:
        entry.update({key: value(entry) if callable(value) else value for key, value in values.items()})


def test_right_data(tmp_path):
    audit = clean(coco_audit(write_coco(tmp_path, coco_content()), masks=True))
    table = str(audit.tallies[0])
    assert audit.tallies[0].pictures == (6, 6) and audit.tallies[0].classes == {name: [4, 4] for name in CLASSES}
    assert 'width 40, height 30 pixels' in table and 'cow' in table
    clean(coco_audit(write_coco(tmp_path, coco_content(), 'val.json'), 'validation', metric=['bbox', 'segm']))


def coco_shaped():
    """A sample as COCO has them: 80 classes of which most are lacking, crowds, empty pictures, areas of masks."""
    classes = coco_dataset_classes()
    content = coco_content()
    content['categories'] = [dict(id=2 * number, name=name, supercategory='thing')
                             for number, name in enumerate(classes, 1)]
    each(content['annotations'], category_id=lambda entry: 2 * (entry['id'] % 3 + 1))
    for number in range(7, 10):
        content['images'].append(dict(id=number, file_name=f'{number}.jpg', width=40, height=30))
    mask = np.zeros(1200, int)
    mask[100:160] = 1
    content['annotations'].append(dict(id=900, image_id=1, bbox=[3, 1, 3, 29], area=60, iscrowd=1, category_id=2,
                                       segmentation=dict(size=[30, 40], counts=[100, 60, 1040])))
    content['annotations'][0].update(bbox=[30.2, 20.1, 10.5, 10.4])  # rounded beyond the border
    return content


def coco_dataset_classes():
    import mmdet.datasets
    return mmdet.datasets.CocoDataset.METAINFO['classes']


def test_a_sample_of_coco(tmp_path):
    """All that is legal in COCO's own files gives no problem and no note."""
    audit = clean(coco_audit(write_coco(tmp_path, coco_shaped()), classes=None, masks=True))
    assert audit.tallies[0].left_out['without a box of the classes'] == 3
    assert audit.tallies[0].reasons['crowd: ignored'] == 1
    clean(coco_audit(tmp_path / 'train.json', 'validation', classes=None, metric=['bbox', 'segm']))


def test_repeated_and_joined_data(tmp_path):
    """Wrappers are looked into; the parts are named."""
    first, second = coco_content(), coco_content()
    second['annotations'][0]['area'] = 0
    parts = [coco_dataset(write_coco(tmp_path, content, name)) for content, name in (
        (first, 'a.json'), (second, 'b.json'))]
    wrapper = type('Joined', (), dict(datasets=parts))()
    problem, = checks.audit_data(dict(training=wrapper)).problems
    assert str(problem).startswith('training 2 data: ') and 'b.json' in str(problem)


def annotations(**values):
    return lambda content: each(content['annotations'], **values)


def one(key='annotations', place=0, **values):
    return lambda content: content[key][place].update(values)


def without(key, name, place=0):
    return lambda content: content[key][place].pop(name)


def corners(entry):
    x, y, w, h = entry['bbox']
    return [x, y, x + w, y + h]


def fractions(entry):
    x, y, w, h = entry['bbox']
    return [x / 40, y / 30, w / 40, h / 30]


def orphans(content):
    content['images'] = content['images'][:4]


def merged(content):
    """Two files in one, whose ids collide."""
    other = coco_content()
    each(other['images'], file_name=lambda image: f'b{image["id"]}.jpg')
    each(other['annotations'], id=lambda entry: entry['id'] + 100)
    content['images'] += other['images']
    content['annotations'] += other['annotations']


def twice(content):
    content['images'].append(dict(content['images'][0], id=99))


# (what is changed, parts of the message)
PROBLEMS = {
    'area 0': (annotations(area=0), ["'area' is 0", '12 annotations (id 1, 2, ', 'Write the area']),
    'one area 0': (one(place=3, area=0), ['1 annotation (id 4)', "'area' is 0"]),
    'fractions': (annotations(bbox=fractions), ['in fractions of the picture', 'Multiply']),
    'corners': (annotations(bbox=corners), ['[x1, y1, x2, y2]', '[x1, y1, x2 - x1, y2 - y1]']),
    'corners without area': (annotations(bbox=corners, area=1), ['[x1, y1, x2, y2]']),
    'negative': (one(bbox=[20, 20, -5, 6]), ['(id 1)', 'negative width or height']),
    'outside': (annotations(bbox=[100, 100, 9, 9]), ['outside its picture']),
    'half outside': (annotations(bbox=[20, 20, 90, 5]), ['extends beyond its picture']),
    'no size': (annotations(bbox=[10, 10, 0, 0], area=4), ['narrower than a pixel']),
    'width 0': (one('images', width=0), ["'width' is missing, 0 or no number", '1 picture (id 1)', 'exif_transpose']),
    'all crowds': (annotations(iscrowd=1), ["'iscrowd' is 1 everywhere", "'iscrowd': 0"]),
    'crowd as text': (annotations(iscrowd='0'), ["'iscrowd' is not 0 or 1"]),
    'ids of categories from 0': (annotations(category_id=lambda entry: entry['category_id'] - 1),
                                 ["'category_id' 0 is no category's id", "add 1 to each 'category_id'"]),
    'categories as text': (annotations(category_id=lambda entry: str(entry['category_id'])),
                           ["'category_id' is of another type", "Write '1' as 1"]),
    'an unknown category': (one(category_id=77), ["'category_id' 77", '1 annotation (id 1)', 'it has 1, 2, 3']),
    'pictures as text': (lambda content: each(content['images'], id=lambda image: str(image['id'])),
                         ["'image_id' is of another type", "Write 1 as '1'"]),
    'colliding ids': (merged, ['several pictures have this id', '6 ids (1, 2, 3']),
    'one file twice': (twice, ['several pictures have this file name', '1 file name (1.jpg)']),
    'root category': (lambda content: content['categories'].insert(0, dict(id=0, name='cat')),
                      ["'cat' is the name of several categories (id 0, 1)", 'Remove the category of id 0']),
    'two of one name': (one('categories', 2, name='cat'), ["'cat' is the name of several categories"]),
    'trailing space': (one('categories', name='cat '), ["lacks classes of the configuration: 'cat'",
                                                         "'cat ' for 'cat'"]),
    'byte order mark': (one('categories', name='\ufeffcat'), ["'\\ufeffcat' for 'cat'"]),
    'capital letters': (one('categories', name='Cat'), ["'Cat' for 'cat'"]),
    'misspelt': (one('categories', 1, name='doog'), ["'doog' for 'dog'"]),
    'another order': (lambda content: content['categories'].reverse(),
                      ['another order', "metainfo=dict(classes=('cow', 'dog', 'cat'))"]),
}


@pytest.mark.parametrize('name', PROBLEMS)
def test_problems(name, tmp_path):
    change, parts = PROBLEMS[name]
    content = coco_content()
    change(content)
    found = coco_audit_or_error(write_coco(tmp_path, content))
    for part in parts:
        assert part in found
    assert str(tmp_path / 'train.json') in found


def coco_audit_or_error(file, **options):
    """Return the problems, also of a file that MMDetection cannot read at all."""
    try:
        with naming_annotation_files():
            return texts(coco_audit(file, **options))[0]
    except RuntimeError as error:
        return str(error)


UNREADABLE = {
    'area': (without('annotations', 'area'), "it has no 'area'"),
    'box': (without('annotations', 'bbox'), "it has no 'bbox'"),
    'area of none': (one(area=None), "it has no 'area'"),
    'size': (without('images', 'height'), "'height' is missing, 0 or no number"),
    'size of none': (one('images', width=None), "'width' is missing, 0 or no number"),
    'size as text': (one('images', width='40'), "'width' is missing, 0 or no number"),
    'file name': (without('images', 'file_name'), "it has no 'file_name'"),
    'three numbers': (one(bbox=[1, 2, 3]), "'bbox' is not four numbers"),
    'ids twice': (annotations(id=1), 'several annotations have this id'),
    'nothing is large enough': (lambda content: each(content['images'], width=5, height=5), 'has no samples'),
    'a list': (lambda content: content.pop('images'), "no list 'images'"),
}


@pytest.mark.parametrize('name', UNREADABLE)
def test_files_that_cannot_be_read_at_all(name, tmp_path):
    """The error that MMDetection raises is explained by the same audit."""
    change, part = UNREADABLE[name]
    content = coco_content()
    change(content)
    assert part in coco_audit_or_error(write_coco(tmp_path, content))


def beyond(content):
    for place in range(2):
        content['annotations'][place]['bbox'] = [30, 20, 16, 9]


NOTES = {
    'some unlisted': (orphans, ["'image_id' 5, 6 is no picture's id", '4 annotations']),
    'ids as text': (lambda content: (each(content['images'], id=lambda image: f'{image["id"]}'),
                                     annotations(image_id=lambda entry: f'{entry["image_id"]}')(content)),
                    ['ids are strings']),
    'one small': (one(bbox=[3, 3, 0.5, 4]), ['narrower than a pixel', '(id 1)']),
    'one outside': (one(bbox=[50, 3, 5, 4]), ['outside its picture and is left out']),
    'some beyond': (beyond, ['2 annotations (id 1, 2)', 'extends beyond its picture']),
    'other classes': (lambda content: (content['categories'].append(dict(id=9, name='owl')),
                                       one(category_id=9)(content)),
                      ["does not have 'owl', so this is left out: 1 box. "]),
    'a class without boxes': (annotations(category_id=1), ['2 classes (dog, cow)', 'no box of this class']),
    'alike': (lambda content: content['categories'].append(dict(id=9, name='Cat')), ["'cat', 'Cat' look the same"]),
}


@pytest.mark.parametrize('name', NOTES)
def test_notes(name, tmp_path):
    change, parts = NOTES[name]
    content = coco_content()
    write_coco(tmp_path, content)
    change(content)
    problems, notes = texts(coco_audit(write_coco(tmp_path, content)))
    assert not problems
    for part in parts:
        assert part in notes


def test_accents_are_shown(tmp_path):
    """A combining accent and a letter with accent look the same, so one of them is shown by its number."""
    content = coco_content()
    content['categories'][0]['name'] = 'ce\u0301pe'
    found = texts(coco_audit(write_coco(tmp_path, content), classes=('c\u00e9pe', 'dog', 'cow')))[0]
    assert "'ce\\u0301pe' for 'c\u00e9pe'" in found


@pytest.mark.parametrize('right, wrong, shown', [
    ('gr\u00fcner Kreis', 'gruener Kreis', "'gr\u00fcner Kreis' for 'gruener Kreis'"),
    ('\ud55c\uad6d\uc5b4', '\ud55c\uad6d\uc5b4 ', "'\ud55c\uad6d\uc5b4' for '\ud55c\uad6d\uc5b4 '"),
    ('cat\u200b', 'cat', "'cat\\u200b' for 'cat'")])
def test_a_misspelt_name_is_shown_as_it_is_written(right, wrong, shown, tmp_path):
    """Only characters that are not seen are escaped."""
    content = coco_content()
    content['categories'][0]['name'] = right
    assert shown in texts(coco_audit(write_coco(tmp_path, content), classes=(wrong, 'dog', 'cow')))[0]


def test_names_that_the_configuration_forgot(tmp_path):
    """MMDetection then takes COCO's 80 names, of which the file has some."""
    content = coco_content(classes=('cat', 'dog', 'gnu'))
    audit = coco_audit(write_coco(tmp_path, content), classes=None)
    assert "names no classes, so CocoDataset takes its own 80" in texts(audit)[0]
    assert "Set metainfo=dict(classes=('cat', 'dog', 'gnu'))" in texts(audit)[0] and audit.doubts_classes('training')


def test_a_root_category_has_no_boxes(tmp_path):
    """A root category of another name does no harm, and nothing is said."""
    content = coco_content()
    content['categories'].insert(0, dict(id=0, name='animals'))
    clean(coco_audit(write_coco(tmp_path, content)))


def test_a_category_is_missing(tmp_path):
    """The remedy is a list of categories that passes."""
    content = coco_content()
    content['annotations'] = [entry for entry in content['annotations'] if entry['category_id'] != 2]
    del content['categories'][1]
    problem, = coco_audit(write_coco(tmp_path, content), 'validation').problems
    assert "lacks classes of the configuration: 'dog'" in str(problem)
    remedy = problem.write.split("'categories' to ")[1].split('; otherwise')[0]
    content['categories'] = json.loads(remedy.replace("'", '"'))
    assert [category['name'] for category in content['categories']] == list(CLASSES)
    clean(coco_audit(write_coco(tmp_path, content, 'again.json'), 'validation'))


# ---- masks ----

MASKS = {
    'two points': ([[1, 1, 5, 5]], 'three points'),
    'odd': ([[1, 1, 5, 5, 9, 1, 3]], 'three points'),
    'empty': ([[]], 'three points'),
    'pairs': ([[[1, 1], [5, 1], [5, 5], [1, 5], [0, 3], [0, 2]]], 'lists of pairs'),
    'flat': ([1, 1, 5, 1, 5, 5], 'one list of numbers'),
    'none': ([], 'has a box but no polygon'),
    'another size': (dict(size=[40, 30], counts=[0, 1200]), "'size' of the RLE"),
    'no counts': (dict(size=[30, 40]), "without 'size' and 'counts'"),
}


@pytest.mark.parametrize('name', MASKS)
def test_masks(name, tmp_path):
    mask, part = MASKS[name]
    content = coco_content()
    each(content['annotations'], segmentation=mask)
    file = write_coco(tmp_path, content)
    assert part in texts(coco_audit(file, masks=True))[0]
    clean(coco_audit(file))  # boxes alone do not need them
    assert "its 'segmentation' is no mask" in texts(coco_audit(file, 'validation', metric=['bbox', 'segm']))[0]
    clean(coco_audit(file, 'validation'))


def test_a_few_polygons_of_two_points(tmp_path):
    """Their objects are ignored, and the others are learnt."""
    content = coco_content()
    content['annotations'][2]['segmentation'] = [[1, 1, 5, 5]]
    problems, notes = texts(coco_audit(write_coco(tmp_path, content), masks=True))
    assert not problems and '1 annotation (id 3)' in notes and 'object is ignored' in notes


# ---- evaluation ----

@pytest.mark.parametrize('change, part', [
    (one(id=0), 'takes the id 0'), (lambda content: content['annotations'].clear(), 'AP is always -1'),
    (annotations(id=lambda entry: f'a{entry["id"]}'), 'ids are no numbers')])
def test_evaluations(change, part, tmp_path):
    content = coco_content()
    change(content)
    problems = texts(coco_audit(write_coco(tmp_path, content), 'validation'))[0]
    assert part in problems
    assert ('mim run mmlocalmamba to_coco FILE NEW' in problems) == ('id' in part)


def test_iscrowd_is_missing(tmp_path):
    """Training does without; pycocotools does not."""
    content = coco_content()
    for entry in content['annotations']:
        del entry['iscrowd']
    file = write_coco(tmp_path, content)
    clean(coco_audit(file))
    assert "it has no 'iscrowd'" in texts(coco_audit(file, 'validation'))[0]


def test_id_0_in_a_training(tmp_path):
    content = coco_content()
    content['annotations'][0]['id'] = 0
    clean(coco_audit(write_coco(tmp_path, content)))


def renamed(content):
    each(content['images'], file_name=lambda image: f'{7 - image["id"]}.jpg')


TRUTHS = {
    'other pictures of the same ids': (renamed, 'results are scored by the truth of other pictures'),
    'other ids': (lambda content: (each(content['images'], id=lambda image: image['id'] + 50),
                                   annotations(image_id=lambda entry: entry['image_id'] + 50)(content)),
                  'lacks pictures of the data set'),
    'fewer pictures': (lambda content: content['images'].pop(), 'lacks pictures of the data set'),
    'more pictures': (lambda content: content['images'].append(dict(content['images'][0], id=9, file_name='9.jpg')),
                      'lacks it, and its objects count as not found'),
    'fewer categories': (lambda content: content['categories'].pop(), 'class numbers differ'),
    'categories in another order': (lambda content: content['categories'].reverse(), 'class numbers differ'),
}


@pytest.mark.parametrize('name', TRUTHS)
def test_the_evaluator_has_another_file(name, tmp_path):
    change, part = TRUTHS[name]
    content = coco_content()
    change(content)
    truth = write_coco(tmp_path, content, 'truth.json')
    write_coco(tmp_path, coco_content())
    assert part in texts(coco_audit(tmp_path / 'train.json', 'validation', truth=truth))[0]


def test_the_evaluator_has_a_copy(tmp_path):
    truth = write_coco(tmp_path, coco_content(), 'copy.json')
    clean(coco_audit(write_coco(tmp_path, coco_content()), 'validation', truth=truth))


# ---- pictures ----


def exif(orientation):
    data = Image.Exif()
    data[274] = orientation
    return data


def test_pictures_that_exif_turns(tmp_path):
    """The annotation program saw the pixels as they are stored, the training sees them turned."""
    for number in range(1, 7):
        picture(tmp_path / f'images/{number}.jpg', exif=exif(6 if number < 3 else 1))
    file = write_coco(tmp_path, coco_content())
    problem, = coco_audit(file).problems
    assert '2 pictures' in str(problem) and '40x30, but the picture has 30x40' in str(problem)
    assert 'EXIF turns it' in str(problem) and problem.count == 2
    clean(coco_audit(file, color_type='color_ignore_orientation'))


def test_turned_pictures_of_which_the_file_knows(tmp_path):
    content = coco_content()
    picture(tmp_path / 'images/1.jpg', exif=exif(8))
    content['images'][0].update(width=30, height=40)
    clean(coco_audit(write_coco(tmp_path, content)))


def test_pictures_upside_down(tmp_path):
    """The size does not tell whether the boxes were drawn on the turned picture."""
    picture(tmp_path / 'images/1.jpg', exif=exif(3))
    problems, notes = texts(coco_audit(write_coco(tmp_path, coco_content())))
    assert not problems and '180 degrees' in notes


@pytest.mark.parametrize('size, part', [((80, 60), 'resized'), ((30, 40), "Exchange 'width' and 'height'")])
def test_other_sizes(size, part, tmp_path):
    for number in range(1, 7):
        picture(tmp_path / f'images/{number}.jpg', *size)
    problems = texts(coco_audit(write_coco(tmp_path, coco_content())))[0]
    assert part in problems and f'{size[0]}x{size[1]} when it is loaded' in problems and '6 pictures' in problems


def test_sides_of_the_pictures(tmp_path):
    picture(tmp_path / 'images/1.jpg', 41, 30)
    tally, = coco_audit(write_coco(tmp_path, coco_content())).tallies
    assert 'width 40 to 41, height 30 pixels; RGB 8 bit; 6 headers read' in str(tally)


def test_a_size_that_is_off_by_one(tmp_path):
    picture(tmp_path / 'images/1.jpg', 41, 30)
    problems, notes = texts(coco_audit(write_coco(tmp_path, coco_content())))
    assert not problems and "Correct 'width' and 'height'" in notes


def test_one_of_many_is_missing(tmp_path):
    file = write_coco(tmp_path, coco_content(40))
    (tmp_path / 'images/33.jpg').rename(tmp_path / 'images/33.JPG')
    problem, = coco_audit(file).problems
    assert '33.jpg): the file does not exist, but 33.JPG does' in str(problem)


def test_names_in_another_unicode_form(tmp_path):
    """macOS writes an accent as a character of its own; both names look the same."""
    file = write_coco(tmp_path, coco_content(3) | dict(images=[
        dict(image, file_name=f'\u00e9{image["file_name"]}') for image in coco_content(3)['images']]))
    for number in (1, 2, 3):
        (tmp_path / f'images/\u00e9{number}.jpg').rename(tmp_path / f'images/e\u0301{number}.jpg')
    problem, *_ = coco_audit(file).problems
    assert r"but 'e\u03011.jpg' does: its accents have another Unicode form than '\xe91.jpg'" in str(problem)


def test_pictures_that_no_file_lists(tmp_path):
    """Training and validation share a folder."""
    files = []
    for name, numbers in (('train.json', range(3)), ('val.json', range(3, 6))):
        content = coco_content()
        content['images'] = [content['images'][number] for number in numbers]
        kept = {image['id'] for image in content['images']}
        content['annotations'] = [entry for entry in content['annotations'] if entry['image_id'] in kept]
        files.append(write_coco(tmp_path, content, name))
    datasets = dict(training=coco_dataset(files[0]), validation=coco_dataset(files[1], test_mode=True))
    clean(checks.audit_data(datasets))
    picture(tmp_path / 'images/more.webp')
    assert '1 picture' in texts(checks.audit_data(datasets))[1]
    assert not checks.audit_data(datasets).problems


# ---- speed ----


def test_what_was_read_is_kept(tmp_path, monkeypatch):
    """The files are read again only if one of them has changed."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr('mmlocalmamba.openmmlab.checks.audit._WORTH_KEEPING', 0)
    content = coco_content()
    content['annotations'][0]['area'] = 0
    file = write_coco(tmp_path, content)
    first = coco_audit(file)
    read = []
    monkeypatch.setattr('mmlocalmamba.openmmlab.checks.audit._audit', lambda *args: read.append(args) or first)
    again = coco_audit(file)
    assert not read and again.findings == first.findings and str(again.tallies[0]) == str(first.tallies[0])
    monkeypatch.undo()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    picture(tmp_path / 'images/2.jpg', 80, 60)
    assert len(coco_audit(file).problems) == 2
