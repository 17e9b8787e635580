"""Tables of results that tools go on with: CSV files, read whole and written whole."""
import csv
import io


def read_rows(path):
    """Rows as dicts of texts; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def write_rows(path, fields, rows):
    """What a row lacks is empty."""
    from mmlocalmamba.files import write_whole  # not before: some tools measure the memory of what they import
    text = io.StringIO()
    table = csv.DictWriter(text, fields, lineterminator='\n')
    table.writeheader()
    table.writerows(rows)
    write_whole(str(path), text.getvalue())
