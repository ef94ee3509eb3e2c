"""The terms on which a model may be passed on: its publisher's licence, notice and use policy, and
what its card says of them. And where a model came from, if its directory is the hub's cache."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, hf_api, metadata_load, try_to_load_from_cache

from .faults import first_line

# Names of files that have to go along, in any case, with any suffix.
LEGAL = re.compile(r"(licen[cs]e|notice|use[_-]?policy|acceptable[_-]?use|copying)", re.IGNORECASE)
TERMS = ("license", "license_name", "license_link")  # of a model card
CARD = "README.md"
# What is raised where the hub does not answer or refuses. Its client is httpx in some releases and
# httpx2 in others.
UNREACHED: tuple[type[Exception], ...] = (
    OSError,
    *(
        client.HTTPError
        for name in ("httpx", "httpx2")
        if (client := getattr(hf_api, name, None)) is not None
    ),
)
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})/?$")


class Terms(NamedTuple):
    """The publisher's terms.

    files:   of `LEGAL`
    card:    what the model's own card says, by the names of `TERMS`
    problem: a sentence where the hub could not be asked for them, "" otherwise
    """

    files: list[Path]
    card: dict[str, str]
    problem: str = ""


def place_on_hub(name: str) -> tuple[str, str] | None:
    """(id, commit) where `name` is a snapshot in a cache of the hub; None for any other."""
    found = _SNAPSHOT.search(Path(name).absolute().as_posix())
    return (f"{found[1]}/{found[2]}", found[3]) if found else None


def is_legal(name: str) -> bool:
    """Whether a file of this name has to go along. Code and weights never do."""
    stem, _, suffix = name.rpartition(".")
    return bool(LEGAL.match(name)) and (not stem or suffix.lower() in ("txt", "md", "pdf", "rst"))


def terms_in(directory: Path) -> Terms:
    """The terms in a model's directory."""
    files = sorted(p for p in directory.iterdir() if p.is_file() and is_legal(p.name))
    return Terms(files, _card(directory / CARD))


def terms_in_cache(name: str, revision: str | None) -> dict[str, str]:
    """What a hub model's card says of its licence, as far as it is on this machine; nothing is
    fetched."""
    found = try_to_load_from_cache(name, CARD, revision=revision)
    return _card(Path(found)) if isinstance(found, str) else {}


def terms_of_hub(name: str, revision: str | None) -> Terms:
    """The terms of a hub model: its files of these names and its card, fetched where they are not
    on this machine yet."""
    api = HfApi()
    try:
        listed = api.list_repo_files(name, revision=revision)
        place = lambda file: Path(api.hf_hub_download(name, file, revision=revision))
        files = [place(file) for file in listed if "/" not in file and is_legal(file)]
        return Terms(files, _card(place(CARD)) if CARD in listed else {})
    except UNREACHED as error:
        return Terms(
            [],
            terms_in_cache(name, revision),
            f"The licence of {name} could not be fetched ({first_line(error)}): add it before you "
            "pass the model on.",
        )


def _card(path: Path) -> dict[str, str]:
    """`TERMS` of a model card; none of one that is not there or holds no metadata."""
    if not path.is_file():
        return {}
    try:
        found: Any = metadata_load(path)
    except (OSError, ValueError):
        return {}  # a card that cannot be read says nothing of a licence
    given: Iterable[str] = found if isinstance(found, dict) else ()
    return {key: found[key] for key in TERMS if key in given and isinstance(found[key], str)}
