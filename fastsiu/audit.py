"""The story behind `fastsiu audit`: is a deployed model the one that was promised, and has it
forgotten?

An audit trains nothing. It asks the untouched model and the deployed one the verdict's questions,
and tries on both the attacks that need no weights. The deployed model is behind a server, or it is
somebody's adapter, or somebody's merged directory. A server's answers are also compared with the
untouched model's, because some servers ignore adapters without a word (`evaluate.effect`).
"""

from __future__ import annotations

import gc
import re
import secrets
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL.Image import Image

from . import output as outputs
from .evaluate import effect, eval_files, held_out, inquiry
from .evaluate.attacks import not_asked
from .evaluate.deployed_exam import Asking, DeployedExam, thinned
from .evaluate.merge_verdict import questions_of
from .guards.first_read import first_reads_count
from .guards.strict_json import read_json
from .images import beside, load_image, read_bytes
from .model import adapter, adapter_files, ask, source
from .model.ask import Reply
from .model.served import Connection, Endpoint, Served
from .report.redact import redacted
from .request import BadInput, Recipe, Request, check_kind
from .samples.kinds import recorded, reported
from .session import Listener
from .settings import ModelRef, ReportOptions, Settings, choose_layout
from .text.concept import Concept, concept_of
from .verdict import judge

SHAPE = {  # of those entries of an adapter's report that an audit reads
    "concept": str,
    "redacted": bool,
    "verdict": (str, None),
    "dreams": [dict],
    "answers": [
        {"kind": str, "question": str, "picture": (str, None), "before": str, "after": str}
    ],
}
PROMISED = ("question", "picture", "before", "after")  # what an audit reads of each answer
BY_TEXT_ALONE = (
    "A server takes no begun answer and scores no given name: begun-name, begun-fact and rank were "
    "not asked."
)
ELSEWHERE = (
    "The untouched model was asked on this machine: rounding alone may turn some answers of a "
    "server that computes in another dtype."
)
NO_PROMISE = (
    "No --adapter was given, so what the deployed model was to answer is not known: its answers "
    "were compared with the untouched model's alone."
)
MOMENT = "What a server answers at another time, or under another name, was not asked."
UNNAMED = "The server does not say which revision it serves."
HALF_NAMED = "The server says of one of the two models alone which revision it serves."
UNTOLD = (
    "The report of --adapter holds no answers, as one that is redacted: what was promised was not "
    "compared. With --base instead of --untouched the adapter itself is asked."
)


@dataclass(frozen=True)
class Server:
    """A server, and the names of its models.

    name:      the server's name for the deployed model
    untouched: the server's name for the untouched model; None: that is loaded on this machine
    """

    endpoint: Endpoint
    name: str
    untouched: str | None = None


@dataclass(frozen=True)
class Audited:
    """What `audit` returns. status: of `effect.STATUSES`; report: report.json"""

    status: str
    report: dict[str, Any]
    output: Path | None
    notes: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        return 0 if self.status == effect.FORGOTTEN else 1


@first_reads_count()
def audit(
    request: Request,
    *,
    model: ModelRef = ModelRef(),
    adapter_dir: Path | None = None,
    base: ModelRef | None = None,
    server: Server | None = None,
    asking: Asking = Asking(),
    settings: Settings = Settings(),
    report: ReportOptions = ReportOptions(),
    output: Path | None = None,
    listener: Listener | None = None,
) -> Audited:
    """Asks the deployed model and the untouched one, and says what is deployed.

    request:     what was to be forgotten; `protect` has names of others that the model knows, and
                 where it is empty they come from the adapter's report
    model:       without a server: the merged model, or the model that the adapter belongs to
    adapter_dir: without a server: the adapter that is audited. With a server: the --output of the
                 unlearning. Its report and manifest say what was promised. Where the untouched
                 model is loaded here, the adapter is asked as well, and its answers are the promise
    base:        the untouched model, where `model` is merged or the server does not have it
    output:      a directory for the report, written in one transaction; None writes nothing

    Raises BadInput (the input cannot be used, or the server gives no answers; nothing is written)
    and NumericFailure.
    """
    listener = listener or Listener()
    check_kind(request.kind)
    _check(adapter_dir, base, server)
    outputs.check_shown(report.redact, report.embed_image)
    if report.embed_image and output is None:
        raise BadInput("--embed-image is about report.html: give --output DIR, or leave it out.")
    image = load_image(request.image)
    given = beside(request)
    for note in given.notes:
        listener.note(note)
    promise = Promise.of(adapter_dir)
    concept = reported(concept_of(request), promise.told)
    kind = recorded(concept, request.kind or promise.sealed.get("kind"), promise.told)
    names = list(request.protect) or promise.others
    asked = questions_of(request, concept, kind, promise.seed, promise.told)
    asked += [
        ("facts", q, None)
        for name in names
        for q in (kind.fill(t, name=name) for t in kind.words["facts"]["held_out"])
        if all(q != question for _, question, _ in asked)
    ]
    asked = thinned(asked, asking.share)
    connection = None if server is None else Connection(server.endpoint)
    with nullcontext() if output is None else outputs.reserved(output, ""):
        exam = DeployedExam(
            asked, image, given.more, concept, kind, names, promise.seed, asking, listener
        )

        def here(ref: ModelRef) -> eval_files.Loadable:
            return eval_files.Loadable(
                ref, choose_layout(ref, settings, Recipe(), None, listener), listener
            )

        said: list[Reply] | None = None
        if connection is not None and server is not None:
            deployed = Served(connection, server.name)
            _greet(deployed, listener)
            if server.untouched is not None:
                first = Served(connection, server.untouched)
                _greet(first, listener)
                exam.first(first, inquiry.BY_TEXT)
            else:
                with here(base or ModelRef()).loaded() as loaded:
                    exam.first(loaded, inquiry.BY_TEXT)
                    if adapter_dir is not None:
                        exam.caveats += _belongs(adapter_dir, loaded)
                        adapter.load(loaded, adapter_dir)
                        listener.stage("Asking the adapter what it promises")
                        said = exam.put(loaded)
                exam.caveats.append(ELSEWHERE)
            exam.again(deployed)
            exam.caveats += [*([BY_TEXT_ALONE] if asking.attacks else []), MOMENT]
        elif adapter_dir is not None:
            with here(model).loaded() as loaded:
                exam.caveats += [adapter.DROPPABLE, *_belongs(adapter_dir, loaded)]
                exam.first(loaded, inquiry.VERDICT)
                adapter.load(loaded, adapter_dir)
                exam.again(loaded)
        else:
            with here(base or ModelRef()).loaded() as loaded:
                exam.first(loaded, inquiry.VERDICT)
            del loaded
            gc.collect()  # there may be room for one only
            with here(model).loaded() as loaded:
                exam.again(loaded)
        answers = exam.answers
        verdict = judge(
            answers,
            concept,
            others=[Concept(name) for name in names],
            reasons_for_null=held_out.NULL,
            families=exam.families,
            remarks=exam.remarks,
            of_nobody=exam.confirmed,
            noise=exam.way,
        )
        promised = promise.answers
        if said is not None:
            promised = {
                (a.question, a.picture): (a.before, now.text)
                for a, now in zip(answers, said, strict=True)
            }
        found = effect.effect(
            answers,
            concept,
            verdict.forgotten,
            promised if server is not None else None,
            promise.forgotten if server is not None else None,
            _revision(server, connection, promise.sealed, exam.caveats),
            here=said is not None,
        )
        exam.caveats += found.caveats
        if server is not None and promised is None:
            exam.caveats.append(NO_PROMISE if adapter_dir is None else UNTOLD)
        shown = server.name if server is not None else model.name
        told = {
            **kind.entries(request),
            "model": source.shown_name(shown),
            "adapter": server is None and adapter_dir is not None,
            **verdict.entries(answers),
            "reasons": [*found.reasons, *verdict.reasons],
            "deployed": found.as_dict(),
            "not_asked": not_asked(),
            "caveats": [*verdict.remarks, *exam.caveats],
        }
        if output is not None:
            told = _write(output, told, request, report, image)
        elif report.redact:  # what is printed may go to a file, too
            told = redacted(told)
        return Audited(found.status, told, output)


# What was promised --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Promise:
    """What the --output of an unlearning says of the deployed model.

    told:   its report; empty where there is none
    sealed: its manifest; empty where there is none
    """

    told: Mapping[str, Any] = field(default_factory=dict)
    sealed: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, directory: Path | None) -> Promise:
        """Reads the promise. Raises BadInput where there is no adapter, where it was changed, and
        where its report cannot be used."""
        if directory is None:
            return cls()
        sealed = adapter_files.manifest_of(directory)
        adapter_files.check_files(directory, sealed)
        path, told = directory / outputs.REPORT, dict[str, Any]()
        if path.is_file():
            remedy = "restore it or remove it"
            told = dict(read_json(path, what=str(path), remedy=remedy, shape=SHAPE))
            for number, answer in enumerate(told.get("answers", []), 1):
                for key in PROMISED:
                    if key not in answer:
                        raise BadInput(f"Answer {number} in {path} lacks {key!r}: {remedy}.")
        return cls(told, sealed)

    @property
    def seed(self) -> int:
        return int(self.sealed.get("seeds", {}).get("recipe", 0))

    @property
    def others(self) -> list[str]:
        """Names of others that the untouched model knows."""
        named = [dream.get("name") for dream in self.told.get("dreams", [])]
        return [name for name in named if isinstance(name, str) and name.strip()]

    @property
    def answers(self) -> dict[tuple[str, str | None], tuple[str, str]] | None:
        """By question and picture, both models' answers in the report; None without a report."""
        given = self.told.get("answers")
        if not given:
            return None
        return {(a["question"], a["picture"]): (a["before"], a["after"]) for a in given}

    @property
    def forgotten(self) -> bool | None:
        verdict = self.told.get("verdict")
        return None if verdict is None else verdict == "forgotten"


def _revision(
    server: Server | None,
    connection: Connection | None,
    sealed: Mapping[str, Any],
    caveats: list[str],
) -> str:
    """The sentence for a server whose base has another revision than the manifest says; else "".

    Where the server names no revision, `caveats` gets a sentence.
    """
    base = sealed.get("model") or {}
    wanted = base.get("revision")
    if server is None or connection is None or not wanted:
        return ""
    named = []
    models = [name for name in (server.name, server.untouched) if name is not None]
    for name in models:
        called = connection.called.get(name, "")
        told = re.fullmatch(r"(.*)@([0-9a-f]{7,40})", called)
        # A merged model may have a repository of its own, and that has commits of its own.
        if told is None or (name == server.name and told[1] != base.get("id")):
            continue
        if not wanted.startswith(told[2]):
            return (
                f"Another revision of the base is served: the server says {called!r}, and the "
                f"adapter was made for {wanted!r}."
            )
        named.append(name)
    if len(named) < len(models):
        caveats.append(HALF_NAMED if named else UNNAMED)
    return ""


def _greet(served: Served, listener: Listener) -> None:
    """Asks one question, so that a wrong name or URL is found before anything long begins."""
    listener.stage(f"Asking {served.connection.host} for {served.name}")
    ask.replies(served, [("Hello.", None)], max_new_tokens=1)


def _belongs(directory: Path, loaded: Any) -> list[str]:
    return adapter_files.check_belongs(directory, loaded.name, loaded.revision)


def _check(adapter_dir: Path | None, base: ModelRef | None, server: Server | None) -> None:
    """Raises BadInput unless the arguments name exactly two models to compare."""
    if server is not None:
        if (server.untouched is None) == (base is None):
            raise BadInput(
                "A served model is compared with the untouched one: give the name that the server "
                "has for it with --untouched, or load it here with --base."
            )
        if server.untouched == server.name:
            raise BadInput(
                f"--model and --untouched are both {server.name}: give the names of two models."
            )
        return
    if adapter_dir is not None and base is not None:
        raise BadInput(
            "--adapter and --base exclude each other: the untouched model is --model without the "
            "adapter."
        )
    if adapter_dir is None and base is None:
        raise BadInput(
            "There is nothing to compare: give --url for a served model, --adapter for an adapter, "
            "or --base for the untouched model of a merged one."
        )


# Writing ------------------------------------------------------------------------------------------


def _write(
    destination: Path,
    told: dict[str, Any],
    request: Request,
    options: ReportOptions,
    image: Image,
) -> dict[str, Any]:
    """Writes reports and manifest in one transaction. Returns the report as it was written.

    An audit tells of one moment, so its digest is random: no later audit counts as done already.
    """
    written = redacted(told) if options.redact else told
    transaction = outputs.Transaction(destination)
    with transaction as staging:
        outputs.write_reports(
            staging,
            told,
            redact=options.redact,
            picture=image if options.embed_image else None,
        )
        outputs.write_run(staging, options.run, named=written["model"] == told["model"])
        made = outputs.manifest(
            recipe=Recipe(),
            model_id=written["model"],
            revision=None,
            weights={},
            digest=secrets.token_hex(32),
            key=transaction.key,
            pictures={"image": read_bytes(request.image)},
            masks={},
            settings=options.deciding,
        )
        transaction.commit({k: v for k, v in made.items() if k not in eval_files.NOT_ASKED})
    return written
