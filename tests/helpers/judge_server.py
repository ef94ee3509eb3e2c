"""A small judge on this machine: replies are a function of what came in."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Stub:
    """answer(number of the request from 0, its body) -> (status, headers, bytes); `seen` holds the
    bodies and headers."""

    def __init__(self):
        self.seen, self.headers, self.answer = [], [], None
        lock, stub = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(stub.seen)
                    stub.seen.append(given)
                    stub.headers.append({**self.headers, "path": self.path})
                status, headers, data = stub.answer(number, given)
                try:
                    self.send_response(status)
                    for key, value in {**headers, "Content-Length": str(len(data))}.items():
                        self.send_header(key, value)
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    pass  # the client has gone

            do_GET = do_POST

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def said(text, status=200, **headers):
    return (
        status,
        headers,
        json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode(),
    )


def asked(given):
    """The texts that a judge was given in one request."""
    return json.loads(given["messages"][1]["content"])
