"""Sphinx: pages in Markdown, the API reference from the docstrings of the source, which is read and not imported."""
import re
import shutil
from pathlib import Path

DEMO = Path(__file__).resolve().parent / 'demo'
PACKAGE = Path(__file__).resolve().parents[1] / 'mmlocalmamba'

project = 'mmlocalmamba'
release = re.search(r"^__version__ = '(.+)'$", (PACKAGE / '__init__.py').read_text(), flags=re.M)[1]
extensions = ['myst_parser', 'sphinx.ext.napoleon', 'autoapi.extension', 'sphinx_copybutton', 'sphinx_design']
exclude_patterns = ['_build', 'demo']

myst_enable_extensions = ['colon_fence']  # :::: around tabs, which hold blocks of code
myst_heading_anchors = 3
myst_enable_extensions = ['colon_fence']  # ::: around tabs reads better on GitHub than ```
smartquotes = False

autoapi_dirs = [str(PACKAGE)]
autoapi_ignore = ['*/.mim/*']
autoapi_generate_api_docs = False  # api.md names what is public
autoapi_python_class_content = 'class'
autoapi_options = ['members', 'show-module-summary']

napoleon_numpy_docstring = False
napoleon_use_rtype = False

# Pages offer tables of research/, which may be missing.
suppress_warnings = [] if (PACKAGE.parent / 'research').is_dir() else ['download.not_readable']

html_theme = 'furo'
html_static_path = ['_static']
html_css_files = ['wide.css']
html_title = f'mmlocalmamba {release}'
html_show_copyright = False  # LICENSE names no holder
copybutton_exclude = '.linenos, .gp'


def link_research(app, docname, source):
    """Make plain links to pages of research/, which are no pages of the site, into downloads."""
    source[0] = re.sub(r'\]\((\.\./research/[\w/-]+\.md)(?:#[\w-]+)?\)', r'](path:\1)', source[0])


def copy_demo(app, error):
    """What `make web-demo` has built; without it the bare page, which says so."""
    if error is None and app.builder.format == 'html':
        built, target = DEMO / '_build', Path(app.outdir, 'demo')
        shutil.rmtree(target, ignore_errors=True)
        if built.is_dir():
            shutil.copytree(built, target)
        else:
            target.mkdir()
            for name in ('index.html', 'style.css', 'demo.js'):
                shutil.copy(DEMO / name, target)


def setup(app):
    app.connect('source-read', link_research)
    app.connect('build-finished', copy_demo)
