"""`fastsiu.unlearn` with plain keywords, for whoever wants one call."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from . import driver
from .request import BadInput, Request, names_of, path_of
from .session import Listener
from .settings import Options, sort_options


def unlearn(
    image: str | Path,
    concept: str,
    *,
    output: str | Path | None = None,
    aliases: tuple[str, ...] = (),
    protect: tuple[str, ...] = (),
    images: str | Path | None = None,
    retain: str | Path | None = None,
    data: str | Path | None = None,
    as_word: bool | None = None,
    kind: str | None = None,
    listener: Listener | None = None,
    **options: Unpack[Options],
) -> driver.Result:
    """Makes a model forget how one concept looks, from one picture.

    image, concept: the one picture (a file), and the name as a person writes it
    output:  the directory to write, fastsiu-<random>/ when None, in one transaction
    aliases: other names of the concept;  protect: names of neighbours that must survive
    images:  a directory with more pictures of the concept, for the verdict only
    retain:  a directory with unlabelled pictures of anything else, to be answered as before
    data:    a JSONL file with samples of your own
    as_word: how a name counts that is a word like any other, too (`Request.as_word`)
    kind:    what the concept is, of `fastsiu.request.KINDS`; None: the model is asked
    options: model and revision; preset and fields of `Recipe`; fields of `Settings` and of
             `ReportOptions`

    Raises BadInput (the input cannot be used; nothing is written), NumericFailure (training
    diverged) and OutOfMemory.
    """
    picture = path_of(image, "image")
    if picture is None:
        raise BadInput("image is missing: give the path of the one picture.")
    request = Request(
        concept.strip() if isinstance(concept, str) else concept,
        picture,
        names_of(aliases, "aliases"),
        names_of(protect, "protect"),
        images=path_of(images, "images"),
        retain=path_of(retain, "retain"),
        data=path_of(data, "data"),
        as_word=as_word,
        kind=kind,
    )
    chosen = sort_options(options)
    return driver.unlearn(
        request, output=path_of(output, "output"), listener=listener, **vars(chosen)
    )
