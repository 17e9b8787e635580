"""Tables of results that tools go on with: CSV files, read whole and written whole. Needs nothing to be installed."""
import csv
import io
import platform
from pathlib import Path


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


def processor():
    """Its name and family, which decides more than the name."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(line.split(':', 1) for line in lines if ':' in line)
    found = {key.strip(): value.strip() for key, value in found.items()}
    return f'{found.get("model name", platform.machine())} family {found.get("cpu family", "?")}'
