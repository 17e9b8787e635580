"""The site that `make docs` builds: its links, and in a headless Chromium the width of its pages and its search."""
import json
import os
import queue
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPHINX = ROOT / '.venv-docs/bin/sphinx-build'
WIDTHS = 1280, 390  # of a laptop and of a telephone, in pixels

# Opens every page at every width in a frame, and sends what is wrong with it to the server.
CHECKS = '''<!doctype html><body><script type="module">
const {pages, widths, word} = GIVEN;

async function open(address, width) {
  const frame = document.createElement('iframe');
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  frame.src = address;
  document.body.append(frame);
  await new Promise(done => frame.onload = done);
  await frame.contentDocument.fonts.ready;
  return frame;
}

// Something beyond the right edge cannot be read, unless a box around it scrolls.
function scrolls(element) {
  for (let box = element.parentElement; box; box = box.parentElement) {
    if (['auto', 'scroll'].includes(getComputedStyle(box).overflowX) && box.scrollWidth > box.clientWidth
        && box.tagName !== 'BODY' && box.tagName !== 'HTML') {
      return true;
    }
  }
  return false;
}

const found = {wrong: [], shown: 0};
try {
  for (const page of pages) {
    for (const width of widths) {
      const frame = await open(page, width);
      const root = frame.contentDocument.documentElement;
      const say = text => found.wrong.push(`${page} at ${width} pixels: ${text}`);
      if (root.scrollWidth > width) {
        say(`it is ${root.scrollWidth} pixels wide`);
      }
      for (const element of root.querySelectorAll('article *')) {
        const {right, width: own} = element.getBoundingClientRect();
        if (own && right > width + 1 && !scrolls(element)) {
          say(`<${element.tagName.toLowerCase()}> ends at ${Math.round(right)}: ${element.textContent.slice(0, 40)}`);
          break;
        }
      }
      for (const image of root.querySelectorAll('article img')) {
        if (image.complete && !image.naturalWidth) {
          say(`no picture: ${image.src}`);
        }
      }
      found.shown += 1;
      frame.remove();
    }
  }
  const frame = await open(`search.html?q=${word}`, widths[0]);
  for (let wait = 0; wait < 100 && !frame.contentDocument.querySelector('ul.search li a'); wait++) {
    await new Promise(done => setTimeout(done, 100));
  }
  await new Promise(done => setTimeout(done, 500));
  found.results = [...frame.contentDocument.querySelectorAll('ul.search li a')].map(link => link.href);
} catch (error) {
  found.wrong.push(String(error));
}
await fetch('/found', {method: 'POST', body: JSON.stringify(found)});
</script>'''


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    if not SPHINX.is_file():
        pytest.skip('Sphinx is not installed: make docs')
    folder = tmp_path_factory.mktemp('site')
    subprocess.run([SPHINX, '--quiet', '--fresh-env', ROOT / 'docs', folder], check=True)
    return folder


class Page(HTMLParser):
    """The targets and the addresses of a page."""

    def __init__(self, path):
        super().__init__()
        self.targets, self.addresses = set(), set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.targets |= {attrs[key] for key in ('id', 'name') if attrs.get(key)}
        self.addresses |= {attrs[key] for key in ('href', 'src') if attrs.get(key)}


@pytest.mark.slow
def test_links(site):
    """Also those of the theme, and those to files and to places in pages."""
    pages = {path: Page(path) for path in site.rglob('*.html')}
    assert len(pages) > 15
    broken = []
    for path, page in pages.items():
        for address in page.addresses:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            place = unquote(parts.fragment)
            if not target.exists() or place and target in pages and place not in pages[target].targets:
                broken.append(f'{path.relative_to(site)}: {address}')
    assert not broken


@pytest.fixture
def chromium():
    found = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if found is None:
        pytest.skip('Chromium is not installed: apt-get install chromium')
    # Chromium's sandbox does not work for root.
    return [found, '--headless', '--disable-gpu', '--hide-scrollbars', *(['--no-sandbox'] if os.getuid() == 0 else [])]


@pytest.mark.slow
def test_every_page_in_a_browser(site, chromium, tmp_path):
    answers = queue.Queue()

    class Server(SimpleHTTPRequestHandler):

        def __init__(self, *args):
            super().__init__(*args, directory=str(site))

        def do_POST(self):
            answers.put(json.loads(self.rfile.read(int(self.headers['Content-Length']))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args):
            pass

    pages = sorted(path.name for path in site.glob('*.html'))
    given = json.dumps(dict(pages=pages, widths=WIDTHS, word='SCAttn'))
    (site / 'checks.html').write_text(CHECKS.replace('GIVEN', given))
    with ThreadingHTTPServer(('127.0.0.1', 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = subprocess.Popen([*chromium, f'--user-data-dir={tmp_path}', '--window-size=1400,1000',
                                    '--remote-debugging-port=0', f'http://127.0.0.1:{server.server_port}/checks.html'],
                                   stderr=subprocess.DEVNULL)
        try:
            found = answers.get(timeout=300)
        finally:
            browser.terminate()
            browser.wait(30)
            server.shutdown()
    assert not found['wrong'], '\n'.join(found['wrong'])
    assert found['shown'] == len(pages) * len(WIDTHS)
    assert any('index.html' in address for address in found['results']), found['results']
