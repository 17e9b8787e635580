"""CSV tables of results that scripts extend. Reading them needs only the standard library."""
import csv
import io
import platform
import statistics
from pathlib import Path


def read_rows(path):
    """Return rows as dicts of strings, or no rows if there is no file."""
    if not path.exists():
        return []
    with path.open(newline='') as file:
        return list(csv.DictReader(file))


def write_rows(path, fields, rows):
    """Write a whole table. Missing values are empty."""
    from mmlocalmamba.files import write_whole  # imported late, because some tools measure the memory of their imports
    text = io.StringIO()
    table = csv.DictWriter(text, fields, lineterminator='\n')
    table.writeheader()
    table.writerows(rows)
    write_whole(str(path), text.getvalue())


def processor():
    """Return the name and the family of the processor. Its speed depends on the family more than on the name."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = dict(line.split(':', 1) for line in lines if ':' in line)
    found = {key.strip(): value.strip() for key, value in found.items()}
    return f'{found.get("model name", platform.machine())} family {found.get("cpu family", "?")}'


def interval(values):
    """Return half of the 95 % interval of the mean, or None for one value."""
    if len(values) < 2:
        return None
    from scipy.stats import t as student
    return student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5


def plus_minus(values, sign=''):
    half = interval(values)
    return f'{statistics.mean(values):{sign}.2f}' + ('' if half is None else f' ± {half:.2f}')
