"""Give these tests the fixtures of tests/conftest.py."""
import importlib.util
from pathlib import Path

# By path, because both files are called conftest.
_spec = importlib.util.spec_from_file_location('shared_fixtures', Path(__file__).parents[2] / 'tests' / 'conftest.py')
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
tiny_digits, configuration, no_scope = _shared.tiny_digits, _shared.configuration, _shared.no_scope
