"""A file server on the loopback that also does what servers do wrong."""
import http.server
import io
import threading
from contextlib import contextmanager

import torch


def saved(content):
    """Return the bytes that torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@contextmanager
def serving(files):
    """Serve {name: bytes, or (bytes, headers)}; yield the server's address and the list of names asked for.

    A header Content-Length larger than the content is a download that is interrupted.
    """
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):

        def do_GET(self):
            name = self.path.lstrip('/')
            asked.append(name)
            if name not in files:
                self.send_error(404)
                return
            content, headers = files[name] if isinstance(files[name], tuple) else (files[name], {})
            self.send_response(200)
            for key, value in {'Content-Length': str(len(content)), **headers}.items():
                if value is not None:
                    self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f'http://127.0.0.1:{server.server_port}', asked
        finally:
            server.shutdown()
            thread.join()
