"""The audit of label images and of picture files."""
import numpy as np
import pytest
from PIL import Image
from small_data import clean, coco_audit, coco_content, label_dataset, picture, stripes, texts, write_coco, write_labels

from mmlocalmamba.openmmlab import checks


def audited(folder, classes, name='training', head=None, skip=0, **options):
    return checks.audit_data({name: label_dataset(folder, classes, **options)}, head=head, skip=skip)


@pytest.mark.parametrize('values, classes, reduces', [
    ([0, 1, 2], 3, False), ([0, 1, 2, 255], 3, False), ([1, 2, 3], 3, True), ([0, 1, 2, 3, 255], 3, True),
    ([1, 7, 60, 150, 0], 150, True),  # most classes are lacking
    ([*range(140)], 150, False), ([0, 1], 2, False)])
@pytest.mark.parametrize('mode', ['L', 'P'])
def test_right_data(values, classes, reduces, mode, tmp_path):
    write_labels(tmp_path, [stripes(*values, width=160)] * 3, mode)
    audit = audited(tmp_path, tuple(map(str, range(classes))), reduce_zero_label=reduces)
    if values == [*range(140)]:
        assert not audit.problems and '10 classes (140' in texts(audit)[1]
        return
    tally, = clean(audit).tallies
    assert sum(counts[1] for counts in tally.classes.values()) + tally.reasons['ignored (255)'] == 3 * 160 * 30


@pytest.mark.parametrize('values, classes, reduces, parts', [
    ([0, 255], 2, False, ["'c0' alone has pixels", '255 is ignored', '1 for the second of 2 classes']),
    ([0, 255], 2, True, ['no class has pixels']),
    ([0, 0, 0], 2, False, ["'c0' alone has pixels"]),
    ([0, 1], 2, True, ["'c0' alone has pixels", 'begin with 0: set reduce_zero_label=False']),
    ([0, 1, 2, 3], 4, True, ['the labels are 0 to 3 for 4 classes', 'set reduce_zero_label=False', 'LoadAnnotations']),
    ([0, 1, 2, 255], 3, True, ['the labels are 0 to 2 for 3 classes']),
    ([1, 2, 3], 3, False, ['has the label 3,', 'begin with 1: set reduce_zero_label=True']),
    ([0, 1, 2, 3], 3, False, ['has the label 3,', "write 'background' first", 'if label 3 is another class, write its',
                              'give the model 4 classes', "'c0', is that of label 0", 'set reduce_zero_label=True']),
    ([0, 1, 2, 3, 4], 3, False, ['has the labels 3, 4,', 'names for the labels 3, 4 at the end']),
    ([0, 1, 2, 3, 4], 3, True, ['has the label 4,', 'a name for the label 4 at the end']),
    ([0, 1, 77], 3, False, ['has the label 77,', 'the 3 classes are the labels 0 to 2', 'each label up to 77']),
    ([0, 38, 75], 3, False, ['has the labels 38, 75']),
])
def test_labels_of_other_classes(values, classes, reduces, parts, tmp_path):
    write_labels(tmp_path, [stripes(*values)] * 3)
    names = tuple(f'c{number}' for number in range(classes))
    for split in ('training', 'validation'):
        problems = texts(audited(tmp_path, names, split, reduce_zero_label=reduces))[0]
        if split == 'training' or 'alone' in parts[0] or 'has the label' in parts[0]:
            assert all(part in problems for part in parts), problems
            assert problems.startswith(f'{split} data: {tmp_path}')


@pytest.mark.parametrize('values, names, asked', [
    ([0, 1, 2, 3], ('background', 'sky', 'field'), False), ([0, 1, 2, 3], ('road', 'sky', 'field'), True),
    ([0, 1, 2, 3, 4], ('road', 'sky', 'field'), False), ([0, 1, 77], ('road', 'sky', 'field'), False)])
def test_label_0_is_doubted_only_if_it_can_be_the_cause(values, names, asked, tmp_path):
    """The name that is missing may be the first one; all others are shifted then."""
    write_labels(tmp_path, [stripes(*values)] * 3)
    problems = texts(audited(tmp_path, names))[0]
    assert ('reduce_zero_label' in problems) == asked == ("write 'background' first" in problems)


def test_a_class_without_a_pixel(tmp_path):
    write_labels(tmp_path, [stripes(0, 1, 3)] * 3)
    problems, notes = texts(audited(tmp_path, tuple('abcd')))
    assert not problems and '1 class (c): no pixel is of this class' in notes
    assert not audited(tmp_path, tuple('abcd'), 'validation').findings


def test_labels_of_16_bits(tmp_path):
    """MMSegmentation keeps 8 bits: 256 is 0."""
    write_labels(tmp_path, [Image.fromarray(np.array([[0, 1], [2, 258]], np.uint16))] * 2)
    assert 'more than 8 bits, up to 258' in texts(audited(tmp_path, ('a', 'b', 'c')))[0]
    write_labels(tmp_path, [Image.fromarray(np.array([[0, 1], [2, 255]], np.uint16))] * 2)
    clean(audited(tmp_path, ('a', 'b', 'c')))


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'LA'])
def test_labels_of_several_channels(mode, tmp_path):
    write_labels(tmp_path, [stripes(0, 1)] * 3, mode)
    problems = texts(audited(tmp_path, ('a', 'b')))[0]
    assert '3 label images' in problems and f'its mode is {mode}, but labels need one channel' in problems
    assert 'mim run mmlocalmamba label_images MASKS LABELS --colors FILE' in problems


def test_labels_of_another_size(tmp_path):
    write_labels(tmp_path, [stripes(0, 1)] * 3)
    picture(tmp_path / 'images/1.png', 80, 60)
    problems = texts(audited(tmp_path, ('a', 'b')))[0]
    assert 'its size is 40x30, but the picture has 80x60' in problems and '1 label image' in problems


def test_labels_of_a_turned_picture(tmp_path):
    write_labels(tmp_path, [stripes(0, 1)])
    exif = Image.Exif()
    exif[274] = 6
    (tmp_path / 'images/0.png').unlink()
    picture(tmp_path / 'images/0.jpg', exif=exif)
    problems = texts(audited(tmp_path, ('a', 'b'), img_suffix='.jpg'))[0]
    assert 'its size is 40x30, but the picture has 30x40 when it is loaded, since EXIF turns it' in problems


def test_a_label_image_is_missing_among_many(tmp_path):
    write_labels(tmp_path, [stripes(0, 1)] * 30)
    (tmp_path / 'labels/17.png').unlink()
    problem, = audited(tmp_path, ('a', 'b')).problems
    assert '17.png): a picture has no label image of this name' in str(problem)


def test_pictures_of_other_endings(tmp_path):
    write_labels(tmp_path, [stripes(0, 1)] * 4)
    for name in ('a.jpg', 'b.JPG', 'c.webp', 'd.tiff'):
        picture(tmp_path / 'images' / name)
    (tmp_path / 'images/notes.txt').write_text('no picture')
    audit = audited(tmp_path, ('a', 'b'))
    note, = audit.notes
    assert not audit.problems and note.count == 4
    assert "img_suffix is '.png'" in str(note) and '1 .webp' in str(note)
    assert audit.tallies[0].pictures == (8, 4) and 'end in .JPG, not in .png' in str(audit.tallies[0])
    clean(audited(tmp_path, ('a', 'b'), indices=2))  # a part is wanted


def test_the_pipeline_disagrees_with_the_data_set(tmp_path):
    write_labels(tmp_path, [stripes(1, 2)] * 2)
    problems = texts(audited(tmp_path, ('a', 'b'), reduce_zero_label=True, loads=False))[0]
    assert 'reduce_zero_label is True in the data set, but False in LoadAnnotations' in problems


@pytest.mark.parametrize('sigmoid', [False, True])
def test_one_class(sigmoid, tmp_path):
    write_labels(tmp_path, [stripes(0, 255)] * 2)
    head = type('Head', (), dict(out_channels=1, loss_decode=type('Loss', (), dict(use_sigmoid=sigmoid))()))()
    assert ('softmax of one' in texts(audited(tmp_path, ('a', ), head=head))[0]) == (not sigmoid)


def test_classes_of_others(tmp_path):
    """A part of the classes of a known data set: the others become 255."""
    write_labels(tmp_path, [stripes(1, 2, 3, 4)] * 2)
    options = dict(type='ADE20KDataset', reduce_zero_label=True, metainfo=dict(classes=('sky', 'wall')))
    tally, = clean(audited(tmp_path, None, **options)).tallies
    assert tally.classes == {'sky': [600, 600], 'wall': [600, 600]}


# ---- pictures ----


def deep(top, dtype=np.uint16):
    return Image.fromarray((np.arange(1200).reshape(30, 40) % 7 / 6 * top).astype(dtype))


def test_12_bits_become_black(tmp_path):
    write_labels(tmp_path, [stripes(0, 1)] * 3)
    deep(4095).save(tmp_path / 'images/1.png')
    problems = texts(audited(tmp_path, ('a', 'b')))[0]
    assert '1 picture' in problems and 'leaves 0 to 15, almost one colour' in problems and '8 bits' in problems


def test_16_bits_lose_some(tmp_path):
    write_labels(tmp_path, [stripes(0, 1)] * 3)
    deep(65535).save(tmp_path / 'images/1.png')
    problems, notes = texts(audited(tmp_path, ('a', 'b')))
    assert not problems and 'is read with 8' in notes


def test_values_of_a_float_tiff(tmp_path):
    write_labels(tmp_path, [stripes(0, 1)] * 2)
    for number in range(2):
        (tmp_path / f'images/{number}.png').unlink()
        deep(1, np.float32).save(tmp_path / f'images/{number}.tif')
    problems = texts(audited(tmp_path, ('a', 'b'), img_suffix='.tif'))[0]
    assert '2 pictures' in problems and 'cv2 does not read its 32 bits in colour' in problems


def test_several_frames(tmp_path):
    file = write_coco(tmp_path, coco_content())
    frames = [Image.fromarray(np.full((30, 40), value, np.uint8)) for value in (0, 99, 200)]
    frames[0].save(tmp_path / 'images/1.jpg', format='GIF', save_all=True, append_images=frames[1:])
    problems, notes = texts(coco_audit(file))
    assert 'several frames' in notes and not problems


def heic(path):
    path.write_bytes(b'\0\0\0\x18ftypheic' + bytes(100))


def text(path):
    path.write_text('no picture at all')


def empty(path):
    path.write_bytes(b'')


@pytest.mark.parametrize('spoil, part', [(heic, 'can read it, but heic'), (text, 'neither Pillow nor cv2'),
                                         (empty, 'it is empty')])
def test_files_that_are_no_pictures(spoil, part, tmp_path):
    write_labels(tmp_path, [stripes(0, 1)] * 20)
    spoil(tmp_path / 'images/11.png')
    problems = texts(audited(tmp_path, ('a', 'b')))[0]
    assert part in problems and '11.png' in problems
    audit = audited(tmp_path, ('a', 'b'), skip=1)  # BrokenFilesHook leaves it out
    assert not audit.problems and part in texts(audit)[1]
    assert audited(tmp_path, ('a', 'b'), 'validation', skip=1).problems  # not in a validation


def test_another_format_than_the_ending(tmp_path):
    """OpenCV looks at the content."""
    write_labels(tmp_path, [stripes(0, 1)])
    picture(tmp_path / 'images/0.png', format='JPEG')
    clean(audited(tmp_path, ('a', 'b')))
