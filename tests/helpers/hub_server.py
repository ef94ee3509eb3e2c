"""A stand-in for the hub: what `huggingface_hub` calls to create a repository, to commit to it and
to load from it, with the checks of a model card's metadata that the hub documents."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

ID = re.compile(r"[\w.-]+/[\w.-]+")
TASKS = {"image-text-to-text", "text-generation", "image-classification"}
LICENCES = {"apache-2.0", "mit", "other", "gemma", "llama3.2", "cc-by-4.0", "cc-by-nc-4.0"}


def errors_of(card: str) -> list[str]:
    """What the hub would refuse in a card's metadata."""
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if not found:
        return ["there is no metadata"]
    data = yaml.safe_load(found[1])
    texts = ("library_name", "license_name")
    wrong = [f"{key} is no text" for key in texts if not isinstance(data.get(key, ""), str)]
    bases = data.get("base_model", [])
    for base in [bases] if isinstance(bases, str) else bases:
        wrong += [] if ID.fullmatch(base) else [f"base_model {base!r} is no id"]
    if data.get("pipeline_tag", "text-generation") not in TASKS:
        wrong.append("pipeline_tag is unknown")
    if data.get("license", "mit") not in LICENCES:
        wrong.append("license is unknown")
    if data.get("license") == "other" and not {"license_name", "license_link"} <= set(data):
        wrong.append("license other needs license_name and license_link")
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        wrong.append("a tag is no text")
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str) or not model.get("results"):
            wrong.append("a model-index needs a name and results")
        for result in model.get("results", []):
            whole = "type" in result.get("task", {}) and {"type", "name"} <= set(result["dataset"])
            numbers = [
                {"type", "value"} <= set(m) and isinstance(m["value"], int | float)
                for m in result.get("metrics", [])
            ]
            wrong += [] if whole and numbers and all(numbers) else ["a result is not whole"]
    return wrong


class HubServer:
    """`repos`: id -> {"private", "files": {name: bytes}, "commits": [message]}. `calls` has
    (method, path) of every request, `tokens` what came as authorization. `lfs`: suffixes that go by
    LFS. `refuse`: (path's pattern, status) of what is refused."""

    def __init__(self):
        self.repos, self.calls, self.tokens, self.blobs = {}, [], [], {}
        self.lfs, self.refuse = (".safetensors",), None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self):
                length = int(self.headers.get("Content-Length") or 0)
                data = self.rfile.read(length)
                if self.headers.get("Transfer-Encoding") == "chunked":
                    data = b""
                    while size := int(self.rfile.readline(), 16):
                        data += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                path = unquote(urlsplit(self.path).path)
                outer.calls.append((self.command, path))
                outer.tokens.append(self.headers.get("Authorization"))
                if outer.refuse and re.search(outer.refuse[0], path):
                    status, headers, body = outer.refuse[1], {}, b'{"error": "refused"}'
                else:
                    status, headers, body = outer.answer(self.command, path, data)
                if not isinstance(body, bytes):
                    body = json.dumps(body).encode()
                self.send_response(status)
                headers = {"Content-Length": str(len(body)), **headers}
                for key, value in headers.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_HEAD = handle_any

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def add(self, name, files, private=False):
        self.repos[name] = {"private": private, "files": dict(files), "commits": ["first"]}

    def commit_of(self, repo):
        told = "".join(self.repos[repo]["commits"]) + repo
        return hashlib.sha1(told.encode()).hexdigest()

    def answer(self, method, path, data):
        if path == "/api/validate-yaml":
            wrong = errors_of(json.loads(data)["content"])
            told = {"errors": [{"message": one} for one in wrong], "warnings": []}
            return (400 if wrong else 200), {}, told
        if path == "/api/repos/create":
            given = json.loads(data)
            name = f"{given.get('organization') or 'me'}/{given['name']}"
            private = given.get("visibility") == "private" or bool(given.get("private"))
            self.add(name, {}, private)
            return 200, {}, {"url": f"{self.url}/{name}"}
        if path.startswith("/blobs/"):
            self.blobs[path.removeprefix("/blobs/")] = data
            return 200, {}, {}
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.url}/blobs/{one['oid']}"}}}
                for one in json.loads(data)["objects"]
            ]
            return 200, {}, {"transfer": "basic", "objects": objects}
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(.*))?", path):
            repo, rest = found[1], found[2] or ""
            if repo not in self.repos:
                return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
            return self.of_repo(repo, rest, data)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            files = self.repos.get(found[1], {"files": {}})["files"]
            if found[2] not in files:
                code = "EntryNotFound" if found[1] in self.repos else "RepoNotFound"
                return 404, {"X-Error-Code": code}, b""
            content = files[found[2]]
            headers = {
                "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Repo-Commit": self.commit_of(found[1]),
            }
            return 200, headers, content
        return 404, {}, {"error": f"no {path}"}

    def of_repo(self, repo, rest, data):
        held = self.repos[repo]
        if rest.startswith("preupload/"):
            files = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(self.lfs) else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(data)["files"]
            ]
            return 200, {}, {"files": files}
        if rest.startswith("commit/"):
            for line in data.decode().splitlines():
                one = json.loads(line)
                key, value = one["key"], one["value"]
                if key == "header":
                    held["commits"].append(value["summary"])
                elif key == "file":
                    held["files"][value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    held["files"][value["path"]] = self.blobs[value["oid"]]
            oid = self.commit_of(repo)
            return 200, {}, {"commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid}
        if rest.startswith("tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                for name, content in held["files"].items()
            ]
            return 200, {}, tree
        listed = {
            "id": repo,
            "modelId": repo,
            "private": held["private"],
            "sha": self.commit_of(repo),
            "siblings": [{"rfilename": name} for name in held["files"]],
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }
        return 200, {}, listed

    def close(self):
        self.server.shutdown()
        self.server.server_close()
