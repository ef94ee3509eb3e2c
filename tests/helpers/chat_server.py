"""A small server that speaks OpenAI's chat completions: each of its models is a function."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image


class ChatServer:
    """models: name -> answer(question, picture or None). `called` has what replies call a model,
    `logprobs(model, question, picture)` the likeliest tokens at each place, where it is set.
    `intercept(number of the request)` may give (status, headers, bytes) in place of an answer.
    `bodies` and `headers` hold what came in. `pause`: seconds between two bytes of a reply."""

    def __init__(self, models):
        self.models, self.called, self.logprobs, self.intercept = models, {}, None, None
        self.bodies, self.headers, self.pause = [], [], 0.0
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(outer.bodies)
                    outer.bodies.append(given)
                    outer.headers.append(dict(self.headers))
                self.reply(*((outer.intercept and outer.intercept(number)) or outer.answer(given)))

            def do_GET(self):
                listed = {"data": [{"id": name} for name in outer.models]}
                self.reply(200, {}, json.dumps(listed).encode())

            def reply(self, status, headers, data):
                try:
                    self.send_response(status)
                    for key, value in {**headers, "Content-Length": str(len(data))}.items():
                        self.send_header(key, value)
                    self.end_headers()
                    for at in range(len(data) if outer.pause else 0):
                        self.wfile.write(data[at : at + 1])
                        time.sleep(outer.pause)
                    if not outer.pause:
                        self.wfile.write(data)
                except OSError:
                    pass  # the client has gone

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.host = f"127.0.0.1:{self.server.server_port}"
        self.url = f"http://{self.host}/v1"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def answer(self, given):
        if given["model"] not in self.models:
            error = {"error": {"message": f"The model {given['model']} does not exist."}}
            return 404, {}, json.dumps(error).encode()
        content, picture = given["messages"][0]["content"], None
        if not isinstance(content, str):
            url = content[0]["image_url"]["url"]
            picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
            content = content[1]["text"]
        choice = {
            "message": {
                "role": "assistant",
                "content": self.models[given["model"]](content, picture),
            },
            "finish_reason": "stop",
        }
        if given.get("logprobs") and self.logprobs:
            places = self.logprobs(given["model"], content, picture)
            choice["logprobs"] = {
                "content": [
                    {"top_logprobs": [{"token": t, "logprob": v} for t, v in place.items()]}
                    for place in places
                ]
            }
        reply = {"choices": [choice], "model": self.called.get(given["model"], given["model"])}
        return 200, {}, json.dumps(reply).encode()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
