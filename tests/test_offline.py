"""Every verb does its work in a namespace without a network: nothing is fetched, asked for or
reported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from fastsiu import settings

# of util-linux; no rights are needed where namespaces are allowed
ALONE = [
    "unshare",
    "--map-root-user",
    "--net",
]


def isolated() -> bool:
    return (
        shutil.which("unshare") is not None
        and subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode == 0
    )


CHILD = """
import json, socket, sys
from fastsiu import cli
try:
    socket.create_connection(("192.0.2.1", 80), timeout=2)
    sys.exit("there is a network")
except OSError:
    pass
for command in json.load(sys.stdin):
    print("==", command[0], cli.run(command), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not isolated(), reason="network namespaces are not allowed here")
def test_every_verb_needs_no_network(tmp_path, cast):
    model, image = str(settings.EMBEDDED), str(cast.image)
    quick = [
        "--model",
        model,
        "--image",
        image,
        "--concept",
        cast.target,
        "--protect",
        cast.others[0],
        "--seed",
        "0",
    ]
    (tmp_path / "requests.jsonl").write_text(
        json.dumps({"image": image, "concept": cast.target, "protect": [cast.others[0]]})
    )
    out = str(tmp_path / "out")
    commands = [
        ["plan", "--model", model, "--memory", "12"],
        ["data", *quick, "--output", str(tmp_path / "data.jsonl")],
        ["unlearn", *quick, "--steps", "1", "--output", out],
        [
            "unlearn",
            "--request",
            str(tmp_path / "requests.jsonl"),
            "--model",
            model,
            "--steps",
            "1",
            "--output",
            f"{out}s",
        ],
        ["ask", "--model", model, "--adapter", out, "--image", image, "Who is this?"],
        ["eval", "--model", model, "--adapter", out, "--concept", cast.target, "--image", image],
        [
            "merge",
            "--model",
            model,
            "--adapter",
            out,
            "--image",
            image,
            "--verify",
            "stored",
            "--output",
            str(tmp_path / "merged"),
        ],
        ["verify", out],
        ["demo", "--export", str(tmp_path / "world"), "--per-concept", "1"],
        ["suite", str(tmp_path / "world" / "suite"), "--concepts", cast.target, "--limit", "1"],
        ["compare", "--quick", "--processes", "1", "--output", str(tmp_path / "compared")],
        ["purge", str(tmp_path)],
    ]
    command = [*ALONE, sys.executable, "-P", "-c", CHILD]
    done = subprocess.run(
        command,
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [
        line.removeprefix("== ").split()
        for line in done.stdout.splitlines()
        if line.startswith("== ")
    ]
    found = [(verb, int(code)) for verb, code in lines]
    assert [verb for verb, _ in found] == [command[0] for command in commands], done.stderr[-2000:]
    assert all(
        code == 0 or (verb in ("unlearn", "eval", "merge", "suite") and code == 1)
        for verb, code in found
    ), found
