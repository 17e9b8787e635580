"""Sphinx: pages in Markdown, the API reference from the docstrings of the source, which is read and not imported."""
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / 'mmlocalmamba'

project = 'mmlocalmamba'
release = re.search(r"^__version__ = '(.+)'$", (PACKAGE / '__init__.py').read_text(), flags=re.M)[1]
extensions = ['myst_parser', 'sphinx.ext.napoleon', 'autoapi.extension', 'sphinx_copybutton']
exclude_patterns = ['_build']

myst_heading_anchors = 3
smartquotes = False

autoapi_dirs = [str(PACKAGE)]
autoapi_ignore = ['*/.mim/*']
autoapi_generate_api_docs = False  # api.md names what is public
autoapi_python_class_content = 'class'
autoapi_options = ['members', 'show-module-summary']

napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = 'furo'
html_static_path = ['_static']
html_css_files = ['wide.css']
html_title = f'mmlocalmamba {release}'
copybutton_exclude = '.linenos, .gp'
