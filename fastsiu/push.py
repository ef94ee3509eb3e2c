"""The story behind `fastsiu push`: a result goes to the hub, in one commit.

It sends only files that the manifest lists, and of those only what a reader needs: the weights with
their configuration, the model card, the reports and the manifest. It never sends the private key or
a picture. It writes reports and card anew, without names, questions and answers, unless
--with-names asks for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from . import manifest
from . import output as outputs
from .guards.endpoint import host_of, read_key
from .guards.small_file import read_text
from .guards.strict_json import read_json
from .guards.terminal import json_safe, visible
from .manifest import KEY, MANIFEST, REPORT, SEAL
from .model import licence
from .model.adapter_files import ADAPTER, CONFIG
from .model.faults import first_line
from .report import card
from .report.redact import MODEL, redacted
from .report.render import render_html, render_markdown
from .request import BadInput
from .session import Listener

MESSAGE = "Add a result of FastSIU"
# Files of an output that are no part of a model: those for the owner alone, and those that are
# written anew.
NO_MODEL = (*outputs.PRIVATE, card.NAME, KEY, MANIFEST)
LOCAL_BASE = (
    "The base is no model of the hub, so nobody else can load this adapter without that base's "
    "files."
)


@dataclass(frozen=True)
class Hub:
    """Where to push.

    repo:       "owner/name"
    public:     everybody may read the repository; else only its owner
    endpoint:   URL of another hub than huggingface.co
    token_file: a file that holds the access token and nothing else, "-" for standard input; None:
                the token that `hf auth login` has stored
    """

    repo: str
    public: bool = False
    endpoint: str | None = None
    token_file: Path | None = None


@dataclass(frozen=True)
class Pushed:
    """What `push` returns.

    public: whether everybody may read the repository
    commit: None where nothing was sent
    files:  bytes of each file, by its name in the repository
    """

    repo: str
    public: bool
    url: str | None
    commit: str | None
    files: dict[str, int]
    notes: list[str] = field(default_factory=list)


def push(
    directory: Path,
    hub: Hub,
    *,
    names: bool = False,
    dry_run: bool = False,
    listener: Listener | None = None,
) -> Pushed:
    """Sends an --output directory of `unlearn` or `merge` to the hub.

    names:   sends reports and card with the name, questions and answers; without the picture
    dry_run: sends nothing and does not ask the hub

    Raises BadInput where the directory holds no such result or was changed, where everybody may
    read an existing repository but `hub.public` is not set, and where the hub refuses.
    """
    listener = listener or Listener()
    files = collect(directory, names=names)
    sizes = {name: _size(content) for name, content in sorted(files.items())}
    written = files[card.NAME]
    if isinstance(written, Path):  # edited by hand
        written = read_text(written, remedy="remove it to have it written anew").encode()
    notes = [] if b"base_model:" in written else [LOCAL_BASE]
    if dry_run:
        return Pushed(hub.repo, hub.public, None, None, sizes, notes)
    listener.stage(f"Sending {len(files)} files to {hub.repo}")
    url, commit, public = _send(hub, files)
    return Pushed(hub.repo, public, url, commit, sizes, notes)


# What goes ----------------------------------------------------------------------------------------


def collect(directory: Path, *, names: bool) -> dict[str, Path | bytes]:
    """The path, or the new content, of each file by its name in the repository. Raises BadInput."""
    sealed = manifest.read(directory)
    listed = sealed["files"]
    merged = "merge" in sealed
    if not merged and not {ADAPTER, CONFIG} <= set(listed):
        raise BadInput(
            f"{directory} holds neither an adapter nor a merged model: give the --output directory "
            "of `unlearn` or `merge`."
        )
    changed = manifest.changed(directory, sealed)
    edited = changed.pop(card.NAME, None) is not None and (directory / card.NAME).is_file()
    for name, what in changed.items():
        raise BadInput(
            f"{directory} is not as it was written ({name!r} {what}): push a result that "
            "`fastsiu verify` takes for whole."
        )
    if edited and not names:
        raise BadInput(
            f"The {card.NAME} in {directory} was edited, and nobody can tell whom it names: add "
            "--with-names to publish it as it is, or remove it to have it written anew."
        )
    weights = [n for n in listed if n in (ADAPTER, CONFIG)] if not merged else _of_model(listed)
    reports = _reports(directory, listed)
    shown = {place: report if names else redacted(report) for place, report in reports.items()}
    base = _base(directory, sealed, merged)
    if not names and any(_tells(report, base.place or base.name) for report in reports.values()):
        if not merged:
            raise BadInput(
                f"{CONFIG} in {directory} names the base, whose name may tell the concept's: "
                "unlearn with --redact, or add --with-names."
            )
        base = card.Base(MODEL)
    files: dict[str, Path | bytes] = {name: directory / name for name in weights}
    for place, report in shown.items():
        files |= {
            f"{place}{REPORT}": _json(report),
            f"{place}report.md": _text(render_markdown(report)),
            f"{place}report.html": _text(render_html(report)),
        }
    if edited:
        files[card.NAME] = directory / card.NAME
    else:
        bare: dict[str, Any] = {} if names else {"redacted": True}
        told = list(shown.values()) or [bare]  # a merge without a verdict has no report
        files[card.NAME] = _text(card.render_card(told, base, merged=merged))
    files[MANIFEST] = _json(_resealed(sealed, files, base))
    return files


def _of_model(listed: Mapping[str, Any]) -> list[str]:
    """The files of a merged model: all that the merge has written, except `NO_MODEL`."""
    return [name for name in listed if not any(map(PurePosixPath(name).match, NO_MODEL))]


def _reports(directory: Path, listed: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each concept's report, by its folder: "", or "001/" and so on."""
    places = sorted(name.removesuffix(REPORT) for name in listed if name.split("/")[-1] == REPORT)
    return {place: manifest.read_report(directory / place) for place in places}


def _base(directory: Path, sealed: Mapping[str, Any], merged: bool) -> card.Base:
    """The untouched model: an adapter's configuration names it, else the manifest."""
    model = sealed.get("model") or {}
    name, revision = str(model.get("id") or MODEL), model.get("revision")
    place = name if "/" in name else None
    if not merged:
        config = _config(directory)
        told = str(config.get("base_model_name_or_path") or "")
        place = told if "/" in told and not told.startswith(("./", "/")) else None
        revision = config.get("revision")
    terms = licence.terms_in(directory).card
    return card.Base(place or name, place, revision if place else None, terms)


def _tells(report: Mapping[str, Any], base: str) -> bool:
    """May the base's name tell the concept's name?

    Where the report was redacted already, its author has decided that.
    """
    if report.get("redacted"):
        return False
    apart = {key: report.get(key) for key in ("concept", "aliases")}
    return bool(redacted({**apart, "model": f"base/{base.replace('/', '-')}"})["model"] == MODEL)


def _config(directory: Path) -> dict[str, Any]:
    shape = {"base_model_name_or_path": (str, None), "revision": (str, None)}
    path = directory / CONFIG
    return dict(read_json(path, what=str(path), remedy="restore it", shape=shape))


def _resealed(
    sealed: Mapping[str, Any], files: Mapping[str, Path | bytes], base: card.Base
) -> dict[str, Any]:
    """The manifest of the files that are sent; `fastsiu verify` accepts them after a download."""
    content = {k: v for k, v in sealed.items() if k not in ("files", SEAL)}
    if base.name == MODEL:
        model = sealed.get("model") or {}
        digests = enumerate((model.get("sha256") or {}).values(), 1)
        content["model"] = {"id": MODEL, "sha256": {f"{n:03d}": sha for n, sha in digests}}
    content["files"] = {
        name: {"bytes": _size(content_of), "sha256": _sha256(content_of)}
        for name, content_of in sorted(files.items())
    }
    return {**content, SEAL: manifest.seal(content)}


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _sha256(content: Path | bytes) -> str:
    return manifest.sha256(content) if isinstance(content, bytes) else manifest.digest_file(content)


def _json(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, allow_nan=False, sort_keys=True, ensure_ascii=False, indent=2)
    return json_safe(text).encode("utf-8") + b"\n"


def _text(text: str) -> bytes:
    return visible(text).encode("utf-8", "replace")


# Sending ------------------------------------------------------------------------------------------


def _send(hub: Hub, files: Mapping[str, Path | bytes]) -> tuple[str, str, bool]:
    """One commit with all files; returns the repository's URL, the commit, and whether everybody
    may read it. Raises BadInput."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    where = "huggingface.co"
    if hub.endpoint is not None:
        where = host_of(hub.endpoint, "--endpoint", "--token-file", "a hub", plain_http=False)
    token = None if hub.token_file is None else read_key(hub.token_file, "--token-file")
    api = HfApi(endpoint=hub.endpoint, token=token)
    try:
        try:
            there = api.model_info(hub.repo)
        except RepositoryNotFoundError:
            there = None
        if there is not None and not hub.public and not there.private:
            raise BadInput(
                f"{hub.repo} at {where} may be read by everybody: add --public to agree, or name "
                "another repository."
            )
        url = f"{api.endpoint}/{hub.repo}"
        if there is None:
            url = str(api.create_repo(hub.repo, private=not hub.public, repo_type="model"))
        done = api.create_commit(
            hub.repo,
            [
                CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
                for name, content in sorted(files.items())
            ],
            commit_message=MESSAGE,
        )
    except BadInput:  # itself a ValueError
        raise
    except HFValidationError as error:
        raise BadInput(
            f"{hub.repo!r} is no name of a repository ({first_line(error)}): give OWNER/NAME."
        ) from error
    except HfHubHTTPError as error:
        code = error.response.status_code if error.response is not None else None
        if code in (401, 403):
            raise BadInput(
                f"The hub at {where} refuses ({code}): log in with `hf auth login`, or give a "
                "token that may write with --token-file."
            ) from error
        raise BadInput(
            f"The hub at {where} refuses the push ({first_line(error)}): nothing was committed; "
            "look at the repository's settings."
        ) from error
    except (ValueError, RuntimeError) as error:
        raise BadInput(
            f"The hub at {where} refuses the push ({first_line(error)}): nothing was committed."
        ) from error
    except licence.UNREACHED as error:
        raise BadInput(
            f"The hub at {where} cannot be reached ({first_line(error)}): nothing was committed; "
            "check the network and --endpoint."
        ) from error
    return url, str(done.oid), hub.public if there is None else not there.private
