"""What an audit of data finds: problems, notes, and a table of what is in the files and what is kept."""
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

# Number of classes that a table lists.
_ROWS = 40
# With up to this many classes, each that has no objects is worth a note.
_FEW_CLASSES = 20
# Number of entries that a message lists.
LISTED = 8


def listed(names: Iterable[Any], limit: int = LISTED) -> str:
    """Join names for a message, up to a limit."""
    names = list(map(str, names))
    return ', '.join(names[:limit]) + (', ...' if len(names) > limit else '')


def counted(count: int, noun: str) -> str:
    """Return a number with its noun, which is given in the singular."""
    many = f'{noun[:-1]}ies' if noun.endswith('y') else f'{noun}es' if noun.endswith(('s', 'x')) else f'{noun}s'
    return f'{count:,} {noun if count == 1 else many}'


@dataclass(frozen=True)
class Finding:
    """A fact about the data that the user should know.

    Attributes:
        file: path of the file or folder.
        text: what is wrong.
        write: what to write instead.
        noun: what the entries are, in the singular: 'annotation', 'picture'.
        key: what names an entry: 'id'.
        entries: names of the entries that it is about; the first are kept.
        split: 'training', 'validation' or 'test'.
        about: 'classes' if the class names or numbers of the data set are in doubt.
        count: number of entries.
    """
    file: str
    text: str
    write: str = ''
    noun: str = ''
    entries: Sequence[Any] = ()
    key: str = ''
    split: str = ''
    about: str = ''
    count: int = -1

    stops = False

    def __post_init__(self) -> None:
        if self.count < 0:
            object.__setattr__(self, 'count', len(self.entries))
        folder = f'{self.file.rstrip("/")}/'  # stands before the entries
        object.__setattr__(self, 'entries', tuple(
            entry.removeprefix(folder) if isinstance(entry, str) else entry for entry in self.entries[:LISTED]))

    def __str__(self) -> str:
        parts = [f'{self.split} data' if self.split else '', self.file]
        if self.entries:
            shown = ', '.join(map(str, self.entries)) + ', ...' * (self.count > len(self.entries))
            parts.append(f'{counted(self.count, self.noun)} ({self.key}{" " * bool(self.key)}{shown})')
        return ': '.join([part for part in parts if part] + [self.text]) + (f'. {self.write}' if self.write else '')


class Problem(Finding):
    """A finding that stops a training."""
    stops = True


class Note(Finding):
    """A finding that does not stop a training."""


@dataclass
class Tally:
    """What the files of a split hold, and what is kept of it.

    Attributes:
        title: the split, its data set and file.
        unit: what is counted by class: 'boxes', 'pixels', 'pictures'.
        pictures: number in the files, and number kept.
        left_out: {reason: number} of pictures.
        classes: {name: [in the files, kept]}, in ``unit``.
        reasons: {reason: number} of ``unit`` that are left out or ignored.
        remarks: further lines: sizes, what was read.
    """
    title: str
    unit: str
    pictures: tuple[int, int] = (0, 0)
    left_out: dict[str, int] = field(default_factory=dict)
    classes: dict[str, list[int]] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        def reasons(counts: dict[str, int]) -> str:
            return ', '.join(f'{count:,} {reason}' for reason, count in counts.items() if count)

        table = Table('', 'in the files', 'kept', 'left out')
        table.add_row('pictures', *(f'{number:,}' for number in self.pictures), reasons(self.left_out))
        if self.classes:
            table.add_row(f'{self.unit}, {len(self.classes)} classes', *(
                f'{sum(counts):,}' for counts in zip(*self.classes.values())), reasons(self.reasons))
        rows = list(self.classes.items())
        if len(rows) > _ROWS:
            rows.sort(key=lambda row: row[1][1])
            half = _ROWS // 2
            rows = [*rows[:half], (f'... {len(rows) - _ROWS} more classes', []), *rows[-half:]]
        for name, counts in rows:
            table.add_row(f'  {name}', *(f'{count:,}' for count in counts))
        output = io.StringIO()
        Console(file=output, width=110, color_system=None, markup=False, highlight=False).print(table)
        return '\n'.join([self.title, *(line.rstrip() for line in output.getvalue().splitlines()), *self.remarks])


def absent_classes(tally: Tally, classes: Iterable[str]) -> list[str]:
    """Return the classes of which nothing is kept, or [] if a sample of that many classes may well lack them."""
    classes = list(classes)
    absent = [name for name in classes if not tally.classes.get(name, (0, 0))[1]]
    return absent if len(classes) <= _FEW_CLASSES or len(absent) <= len(classes) / 4 else []
