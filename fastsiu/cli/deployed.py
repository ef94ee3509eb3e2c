"""The verbs about what is deployed: audit a served or a stranger's model, push a result to the
hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app, out, print_json, read_name, say
from .config import as_toml
from .options import (
    AsWord,
    Attention,
    Concept,
    ConceptFile,
    Device,
    Dtype,
    EmbedImage,
    Image,
    KindMeasured,
    Quantize,
    Redact,
    Revision,
    finite,
    refuse,
)

LONGEST, MOST_AT_ONCE = 1e6, 64  # seconds; questions


@app.command()
def audit(
    context: typer.Context,
    image: Image,
    concept: Concept = None,
    concept_file: ConceptFile = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="With --url: the deployed model's name at the server. Else a merged model's "
            "directory or id, or the model that --adapter belongs to."
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="Base URL of an OpenAI-compatible server, such as http://localhost:8000/v1."
        ),
    ] = None,
    untouched: Annotated[
        str | None, typer.Option(help="With --url: the untouched model's name at the same server.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="The untouched model, loaded here, where --model is merged or served."),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            help="An adapter's directory: what is audited or, with --url, what was promised."
        ),
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option(help="Another name of the concept; repeatable.")
    ] = None,
    as_word: AsWord = None,
    kind: KindMeasured = None,
    images: Annotated[Path | None, typer.Option(help="More pictures of the concept.")] = None,
    retain: Annotated[Path | None, typer.Option(help="Pictures of anything else.")] = None,
    other: Annotated[
        list[str] | None,
        typer.Option(help="Name of someone else whom the model knows; repeatable."),
    ] = None,
    url_key: Annotated[
        Path | None,
        typer.Option(help="With --url: file with the API key; - reads it from standard input."),
    ] = None,
    allow_network: Annotated[
        bool,
        typer.Option("--allow-network", help="With --url: pictures may go to another machine."),
    ] = False,
    plain_http: Annotated[
        bool, typer.Option("--url-plain-http", help="With --url: http:// to elsewhere.")
    ] = False,
    timeout: Annotated[
        float,
        typer.Option(min=0.1, max=LONGEST, callback=finite, help="Seconds for one answer."),
    ] = 120.0,
    within: Annotated[
        float,
        typer.Option(min=1.0, max=LONGEST, callback=finite, help="Seconds for all answers."),
    ] = 3600.0,
    at_once: Annotated[
        int, typer.Option(min=1, max=MOST_AT_ONCE, help="Questions under way at once.")
    ] = 2,
    share: Annotated[
        float,
        typer.Option(
            min=0.05, max=1.0, callback=finite, help="Part of the questions of each kind to ask."
        ),
    ] = 1.0,
    attacks: Annotated[
        bool, typer.Option("--attacks/--no-attacks", help="Try to get the name back as well.")
    ] = True,
    output: Annotated[
        Path | None, typer.Option(help="Directory for the report; only printed when left out.")
    ] = None,
    revision: Revision = None,
    device: Device = None,
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    attention: Attention = None,
    redact: Redact = False,
    embed_image: EmbedImage = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print report.json instead of the summary.")
    ] = False,
) -> None:
    """Ask a deployed model (served, somebody's adapter, or merged) what it still knows, beside the
    untouched one. Exit code 0: forgotten in what was asked; 1: not, or the adapter is not in
    effect, or it is not the model that was promised."""
    from ..request import BadInput, Request

    name = read_name(concept, concept_file)
    if not name:
        raise BadInput("The concept's name is missing: give it with --concept or --concept-file.")
    if url is None and untouched is not None:
        raise BadInput("--untouched names a model of a server: give the server with --url.")
    if url is None:
        said = "{} is about a server: give the server with --url, or leave it out."
        unread = ("url_key", "allow_network", "plain_http", "timeout", "within", "at_once")
        refuse(context, said, unread)
    if url is not None and model is None:
        raise BadInput("--url needs the deployed model's name at the server: give it with --model.")

    from .. import audit as auditing
    from ..model.served import Endpoint
    from ..settings import ModelRef, ReportOptions, Settings
    from ..show.deployed import audited_summary
    from ..show.progress import Progress

    server = None
    if url is not None:
        endpoint = Endpoint(
            url,
            url_key,
            allow_network,
            plain_http,
            timeout=timeout,
            within=within,
            at_once=at_once,
        )
        server = auditing.Server(endpoint, str(model), untouched)
    with Progress(say, hidden=json) as progress:
        result = auditing.audit(
            Request(
                name.strip(),
                image,
                tuple(alias or ()),
                tuple(other or ()),
                images=images,
                retain=retain,
                as_word=as_word,
                kind=kind,
            ),
            model=ModelRef(None if server else model, revision),
            adapter_dir=adapter,
            base=None if base is None else ModelRef(base, revision),
            server=server,
            asking=auditing.Asking(share, attacks),
            settings=Settings(device, dtype, quantize=quantize, attention=attention),
            report=ReportOptions(redact, embed_image, as_toml(context, redact)),
            output=output,
            listener=progress.listener,
        )
    if json:
        print_json(result.report)
    else:
        audited_summary(out, result)
    raise typer.Exit(result.exit_code)


@app.command()
def push(
    directory: Annotated[
        Path, typer.Argument(help="An --output directory of `unlearn` or `merge`.")
    ],
    repo: Annotated[str, typer.Argument(help="OWNER/NAME of the repository on the hub.")],
    public: Annotated[
        bool, typer.Option("--public", help="Everybody may read it; private when left out.")
    ] = False,
    with_names: Annotated[
        bool,
        typer.Option(
            "--with-names",
            help="Card and reports with the name, questions and answers; no picture.",
        ),
    ] = False,
    endpoint: Annotated[
        str | None, typer.Option(help="URL of another hub than huggingface.co.")
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="File with the access token alone; - reads it from standard input; the stored "
            "login when left out."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be sent, and send nothing.")
    ] = False,
) -> None:
    """Send a result to the hub, in one commit: weights, model card, reports and manifest. The key
    and the picture never go."""
    from .. import push as pushing
    from ..show.deployed import pushed_summary
    from ..show.progress import Progress

    with Progress(say, hidden=False) as progress:
        result = pushing.push(
            directory,
            pushing.Hub(repo, public, endpoint, token_file),
            names=with_names,
            dry_run=dry_run,
            listener=progress.listener,
        )
    pushed_summary(out, result)
