"""What the server lets in and out, where it listens, and what it leaves behind."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fastsiu import cli
from fastsiu.app import server
from fastsiu.request import BadInput

needs_gradio = pytest.mark.skipif(
    server.importlib.util.find_spec("gradio") is None, reason="needs the extra [app]"
)
HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})


def answered(hosts=HOSTS, method="GET", **headers):
    """(status, headers) that the guard gives to a request with these headers."""
    sent = []

    async def inner(scope, receive, send):
        start = {"type": "http.response.start", "status": 200}
        await send({**start, "headers": [(b"Cache-Control", b"max-age=9")]})

    async def send(message):
        sent.append(message)

    given = {"host": "127.0.0.1:7860", **headers}
    pairs = [(name.encode(), value.encode()) for name, value in given.items()]
    scope = {"type": "http", "method": method, "headers": pairs}
    asyncio.run(server.Guard(inner, hosts)(scope, None, send))
    found = [(k.decode(), v.decode()) for k, v in sent[0]["headers"]]
    return sent[0]["status"], found


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "[::1]:7860", "localhost"])
def test_its_own_names_are_answered(host):
    assert answered(host=host)[0] == 200


@pytest.mark.parametrize("host", ["evil.example:7860", "127.0.0.1.evil.example", "", "10.0.0.1"])
def test_another_name_of_this_machine_is_refused(host):
    assert answered(host=host)[0] == 403
    assert answered(hosts=None, host=host)[0] == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1"])
def test_what_another_site_sends_is_refused(origin):
    assert answered(origin=origin)[0] == 403
    assert answered(hosts=None, origin=origin)[0] == 403


@pytest.mark.parametrize("headers", [{"host": "[x"}, {"origin": "http://["}])
def test_what_is_no_address_is_refused(headers):
    assert answered(**headers)[0] == 403
    assert answered(hosts=None, **headers)[0] == 403


def test_its_own_page_may_send():
    assert answered(origin="http://127.0.0.1:7860")[0] == 200


def test_browsers_are_told_to_load_nothing_from_elsewhere_and_to_store_nothing():
    headers = dict(answered()[1])
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["cache-control"] == "no-store"
    assert "Cache-Control" not in headers


def test_every_browser_gets_a_key_of_its_own_once():
    first, second = (dict(answered()[1])["set-cookie"] for _ in range(2))
    assert first != second
    assert "HttpOnly" in first
    assert "SameSite=Strict" in first
    key = server.key_of(first)
    assert len(key) >= 32
    assert "set-cookie" not in dict(answered(cookie=f"a=b; {server.COOKIE}={key}")[1])


def test_nobody_acts_without_a_key():
    assert answered(method="POST")[0] == 403
    assert answered(method="POST", cookie=f"{server.COOKIE}=abc")[0] == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_this_machine_alone_needs_no_leave(host):
    assert server.is_loopback(host)


@needs_gradio
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.2", "example.org"])
def test_other_machines_are_let_in_only_when_asked_for(host):
    with pytest.raises(BadInput, match="no password and unencrypted.*--expose"):
        server.check(host, 7860, False)
    server.check(host, 7860, True)


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(server.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"fastsiu\[app\]"):
        server.check("127.0.0.1", 7860, False)


@needs_gradio
def test_a_port_that_is_taken_is_told(capfd):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert cli.run(["app", "--port", str(port)]) == 2
    assert f"Port {port} of 127.0.0.1" in capfd.readouterr().err


@needs_gradio
@pytest.mark.slow
def test_an_end_leaves_nothing_and_a_kill_nothing_after_the_next_start(tmp_path):
    from app_browser import PATIENCE, QUICK, serving

    with serving([*QUICK, "1"], tmp_path) as first:
        assert first.left()
        assert all(file.stat().st_mode & 0o077 == 0 for file in first.files())
        first.process.kill()
        first.process.wait()
    killed = first.left()
    assert killed
    with serving([*QUICK, "1"], tmp_path) as second:
        assert not killed[0].exists()
        second.process.send_signal(signal.SIGTERM)
        assert second.process.wait(PATIENCE) == 0
    assert second.left() == []


def test_neither_gradio_nor_torch_is_imported_before_it_is_needed():
    code = (
        "import sys; import fastsiu.cli, fastsiu.app.server; "
        "print(sorted({'gradio', 'torch', 'uvicorn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "address, key, status, called",
    [
        ("adapter.zip", "own", 200, "fastsiu-adapter.zip"),
        ("report.html", "own", 200, "fastsiu-report.html"),
        ("report.html?view=1", "own", 200, None),
        ("report.json", "own", 404, None),  # it is not there yet
        ("private.key", "own", 404, None),
        ("adapter.zip", "another", 404, None),
    ],
)
def test_results_are_for_their_owner_alone(address, key, status, called, tmp_path, monkeypatch):
    gradio = pytest.importorskip("gradio", reason="needs the extra [app]")
    from starlette.testclient import TestClient

    from fastsiu.app import page

    owner = object()
    (tmp_path / "result").mkdir()
    for name in ("adapter.zip", "result/report.html", "result/private.key"):
        (tmp_path / name).write_text(name)
    desk = SimpleNamespace(
        job=SimpleNamespace(place=tmp_path),
        visit=lambda given: owner if given == "own" else object(),
        owns=lambda visitor: visitor is owner,
    )
    monkeypatch.setattr(page, "build", lambda *given: gradio.Blocks())
    client = TestClient(server.application(desk, []), cookies={server.COOKIE: key})
    reply = client.get(f"/result/{address}")
    assert reply.status_code == status
    told = reply.headers.get("content-disposition")
    assert told is None if called is None else f'filename="{called}"' in told
