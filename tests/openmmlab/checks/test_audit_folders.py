"""The audit of classification data: folders of classes, or a file with class numbers."""
import pytest
from small_data import clean, coco_content, coco_dataset, folder_dataset, picture, texts, write_coco, write_folders

from mmlocalmamba.openmmlab import checks


def audited(folder, name='training', **options):
    return checks.audit_data({name: folder_dataset(folder, **options)})


def test_right_data(tmp_path):
    write_folders(tmp_path, dict(cat=3, dog=4))
    picture(tmp_path / 'cat/deeper/x.JPG')
    (tmp_path / 'cat/notes.txt').write_text('no picture')
    (tmp_path / 'cat/.hidden.png').write_text('of an editor')
    tally, = clean(audited(tmp_path)).tallies
    assert tally.classes == dict(cat=[4, 4], dog=[4, 4]) and tally.pictures == (8, 8)


def test_a_hidden_folder(tmp_path):
    """The remedy is to remove it, and not a head of three classes."""
    write_folders(tmp_path, {'cat': 3, 'dog': 4, '.ipynb_checkpoints': 1})
    audit = audited(tmp_path)
    problem, = audit.problems
    assert '.ipynb_checkpoints): the folder counts as a class. Remove it' in str(problem)
    assert audit.doubts_classes('training')


def test_an_empty_folder(tmp_path):
    write_folders(tmp_path, dict(cat=3, dog=4, rest=0))
    assert '1 folder (rest): it has no pictures' in texts(audited(tmp_path))[0]
    problems, notes = texts(audited(tmp_path, 'validation'))
    assert not problems and 'rest' in notes


def test_pictures_of_other_endings(tmp_path):
    write_folders(tmp_path, dict(cat=3, dog=4))
    for name in ('cat/a.webp', 'cat/b.gif', 'dog/c.jfif', 'dog/d.TIFF'):
        picture(tmp_path / name, format='JPEG')
    picture(tmp_path / 'loose.png')
    audit = audited(tmp_path)
    notes = texts(audit)[1]
    assert not audit.problems and '4 pictures' in notes and "'.gif', '.jfif'" in notes and '1 picture' in notes
    assert audit.tallies[0].pictures == (12, 7) and audit.tallies[0].classes['cat'] == [5, 3]
    clean(audited(tmp_path, indices=[0, 6]))


def test_a_class_of_another_ending(tmp_path):
    write_folders(tmp_path, dict(cat=3, dog=4))
    write_folders(tmp_path, dict(cow=3), '.webp')
    assert 'the classes cow have no other pictures' in texts(audited(tmp_path))[0]


@pytest.mark.parametrize('classes, part', [
    (('dog', 'cat'), 'another order than the folders cat, dog'), (('cat', 'dgo'), 'no folder is called dgo')])
def test_names_that_are_not_the_folders(classes, part, tmp_path):
    write_folders(tmp_path, dict(cat=3, dog=4))
    assert part in texts(audited(tmp_path, metainfo=dict(classes=classes)))[0]


def test_other_names_for_all_folders(tmp_path):
    write_folders(tmp_path, dict(n01=3, n02=4))
    clean(audited(tmp_path, metainfo=dict(classes=('cat', 'dog'))))


def test_one_class(tmp_path):
    write_folders(tmp_path, dict(cat=3))
    assert 'there is one class (cat): any network is right' in texts(audited(tmp_path))[0]


def test_a_file_of_class_numbers(tmp_path):
    write_folders(tmp_path, dict(x=4))
    lines = [f'x/x{number}.png {{}}' for number in range(4)]

    def written(*numbers):
        (tmp_path / 'list.txt').write_text('\n'.join(line.format(number) for line, number in zip(lines, numbers)))
        return audited(tmp_path, ann_file='list.txt', metainfo=dict(classes=('a', 'b', 'c')))

    clean(written(0, 1, 2, 0))
    assert '1 class (c): no picture is of this class' in texts(written(0, 1, 1, 0))[1]
    assert 'has the class number 3, but the 3 classes are 0 to 2' in texts(written(1, 2, 3, 1))[0]
    assert 'all pictures are of one class (b)' in texts(written(1, 1, 1, 1))[0]


def test_a_try_with_a_few_pictures(tmp_path):
    """The first pictures are of one class; it is a part that the user chose."""
    write_folders(tmp_path, dict(cat=3, dog=4))
    audit = audited(tmp_path, indices=2)
    assert not audit.problems and 'all pictures are of one class (cat)' in texts(audit)[1]


def test_one_of_many_is_missing(tmp_path):
    write_folders(tmp_path, dict(cat=30, dog=4))
    dataset = folder_dataset(tmp_path)
    (tmp_path / 'cat/cat17.png').unlink()
    problem, = checks.audit_data(dict(training=dataset)).problems
    assert 'cat17.png): the file does not exist' in str(problem)


def test_no_samples_and_a_string_of_classes():
    class Dataset(list):
        metainfo = dict(classes='cat')

    assert "Set ('cat', )" in texts(checks.audit_data(dict(training=Dataset([1]))))[0]
    assert 'found no samples' in texts(checks.audit_data(dict(training=Dataset())))[0]


# ---- training and validation ----

def of_both(one, other):
    return checks.audit_data(dict(training=one, validation=other))


def test_a_validation_on_the_training_data(tmp_path):
    write_folders(tmp_path / 'train', dict(cat=3, dog=4))
    write_folders(tmp_path / 'val', dict(cat=3, dog=4))
    clean(of_both(folder_dataset(tmp_path / 'train'), folder_dataset(tmp_path / 'val')))
    problem, = of_both(folder_dataset(tmp_path / 'train'), folder_dataset(tmp_path / 'train')).problems
    assert '7 pictures' in str(problem) and 'all 7 pictures are training pictures as well' in str(problem)
    assert str(problem).startswith('validation data: ') and 'data_prefix or ann_file' in str(problem)


def test_a_training_and_a_validation_by_indices(tmp_path):
    write_folders(tmp_path, dict(cat=3, dog=4))
    one, same, other, more = (folder_dataset(tmp_path, indices=indices) for indices in (
        [0, 1, 3, 4], [1, 4], [2, 5, 6], [2, 3, 6]))
    assert 'all 2 pictures' in texts(of_both(one, same))[0]
    clean(of_both(one, other))
    audit = of_both(one, more)
    assert not audit.problems and '1 of 3 pictures' in str(audit.notes[0])


def test_a_link_to_the_training_data(tmp_path):
    write_folders(tmp_path / 'train', dict(cat=3, dog=4))
    (tmp_path / 'val').symlink_to('train')
    assert of_both(folder_dataset(tmp_path / 'train'), folder_dataset(tmp_path / 'val')).problems


def test_one_annotation_file_for_both(tmp_path):
    file = write_coco(tmp_path, coco_content())
    assert 'all 6 pictures' in texts(of_both(coco_dataset(file), coco_dataset(file, test_mode=True)))[0]
    halves = [coco_dataset(file, indices=indices) for indices in ([0, 1, 2], [3, 4, 5])]
    assert not of_both(*halves).problems
