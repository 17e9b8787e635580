"""The site that `make docs` builds: its links, and in a headless Chromium the width and the contrast of its pages,
and its search."""
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
CHECKS = r'''<!doctype html><body><script type="module">
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

// Relative luminance and contrast of the Web Content Accessibility Guidelines 2.2.
function luminance([red, green, blue]) {
  const [r, g, b] = [red, green, blue].map(x => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function numbers(color) {
  return color.match(/[\d.]+/g).map(Number);
}

function contrast(element) {
  let box = element;
  while (box.parentElement && (numbers(getComputedStyle(box).backgroundColor)[3] ?? 1) < 0.5) {
    box = box.parentElement;
  }
  const behind = numbers(getComputedStyle(box).backgroundColor);
  const [low, high] = [numbers(getComputedStyle(element).color), (behind[3] ?? 1) < 0.5 ? [255, 255, 255] : behind]
    .map(luminance).sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
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
      for (const element of root.querySelectorAll('article *')) {
        const text = [...element.childNodes].filter(node => node.nodeType === 3 && node.data.trim());
        if (text.length && element.getClientRects().length && contrast(element) < 4.5) {
          say(`contrast ${contrast(element).toFixed(2)}: ${text[0].data.slice(0, 40)}`);
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

# A page with every fault, to see that the checks find them.
FAULTS = """<!doctype html><article><p style="width: 2000px">wide</p><p style="color: #aaa">pale</p>
<img src="missing.png"></article>"""


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

    (site / 'faults.html').write_text(FAULTS)
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
    wrong = [line for line in found['wrong'] if not line.startswith('faults.html')]
    assert not wrong, '\n'.join(wrong)
    assert len(found['wrong']) == len(WIDTHS) * 4, found['wrong']  # it overflows, at its paragraph; contrast, picture
    assert found['shown'] == len(pages) * len(WIDTHS)
    assert any('index.html' in address for address in found['results']), found['results']
