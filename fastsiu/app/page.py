"""The page: Gradio's blocks, and what a key press does.

An action changes the job and returns nothing. A timer calls one function, `_Page.show`, which
compares the job with what the browser shows and sends what differs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..request import KINDS, BadInput
from . import html
from .desk import COOKIE, Desk, Example, Visitor
from .job import Asked, Phase, View

EVERY = 1.0  # seconds between two looks at the job
EMBEDDED, OTHER = "embedded", "other"
ANY_KIND = "any"
HERE = Path(__file__).parent
QUIET: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
# To the step that begins. Its heading takes the focus only where nobody uses it: what had it is
# gone or cannot be used any more, or is an earlier step's heading.
FOLLOW = """() => {
  const now = document.querySelector('.stepper [aria-current="step"]');
  const head = now && document.getElementById('head-' + now.dataset.step);
  if (!head || !head.offsetParent) return;
  const one = document.activeElement;
  const free = !one || one === document.body || one.disabled || !one.checkVisibility();
  if (free || one.id.startsWith('head-')) head.focus({preventScroll: true});
  const calm = matchMedia('(prefers-reduced-motion: reduce)').matches;
  head.scrollIntoView({behavior: calm ? 'auto' : 'smooth', block: 'start'});
}"""
HEADINGS = {
    1: "1. What is to be forgotten?",
    2: "2. Does the model know it?",
    3: "3. What will be trained",
    4: "4. Training",
    5: "5. The verdict",
}


def looks() -> dict[str, Any]:
    """Theme and style, as keywords of `gradio.mount_gradio_app`. Fonts are the machine's own."""
    theme = gr.themes.Base(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="md",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(  # the theme's own is too pale on white, and its links too dark on black
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        **{
            f"link_text_color{state}{mode}": colour
            for state in ("", "_active", "_hover", "_visited")
            for mode, colour in (("", "*primary_700"), ("_dark", "*primary_300"))
        },
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )
    return {"theme": theme, "css": (HERE / "page.css").read_text(encoding="utf-8")}


def build(desk: Desk, examples: Sequence[Example] = ()) -> gr.Blocks:
    """The page for all visitors of a desk."""
    return _Page(desk, examples).blocks


class _Page:
    def __init__(self, desk: Desk, examples: Sequence[Example]) -> None:
        self.desk, self.examples = desk, examples
        self.parts: dict[str, Any] = {}  # what `show` fills, by name
        with gr.Blocks(analytics_enabled=False, title="FastSIU") as self.blocks:
            self.shown = gr.State(dict)
            self._head()
            self._choose()
            self._check_and_train()
            self._result()
            self._bar()
            timer = gr.Timer(EVERY)
            outputs = [self.shown, *self.parts.values()]
            timer.tick(self.show, [self.shown], outputs, **QUIET)
            self.blocks.load(self.restore, None, self.fields, **QUIET)
            self.parts["stepper"].change(None, None, None, js=FOLLOW)

    # The blocks ------------------------------------------------------------------------------

    def _part(self, name: str, component: Any) -> Any:
        self.parts[name] = component
        return component

    def _step(self, number: int) -> gr.Column:
        return gr.Column(
            visible=number == 1, elem_id=f"step-{number}", elem_classes="step", min_width=0
        )

    def _heading(self, number: int) -> None:
        gr.HTML(f'<h2 id="head-{number}" tabindex="-1">{HEADINGS[number]}</h2>')

    def _head(self) -> None:
        gr.HTML(
            "<h1>FastSIU</h1><p>Make a model that sees forget how one person, character or thing "
            "looks: from one picture, on this machine. Nothing leaves it.</p>"
        )
        self._part("stepper", gr.HTML(html.stepper(View())))
        with gr.Column(elem_id="messages", min_width=0):
            self._part("message", gr.HTML("", elem_id="message"))

    def _choose(self) -> None:
        with self._step(1):
            self._heading(1)
            with gr.Row():
                with gr.Column(min_width=280):
                    upload = gr.File(
                        label="One picture of it",
                        file_types=["image"],
                        type="filepath",
                        height=130,
                        elem_id="picture",
                    )
                    self._part("preview", gr.HTML(html.preview(None, ""), elem_id="preview"))
                with gr.Column(min_width=280):
                    name = gr.Textbox(
                        label="Its name, as a person writes it",
                        max_lines=1,
                        elem_id="name",
                    )
                    model = gr.Radio(
                        [("The demo model inside FastSIU", EMBEDDED), ("Another model", OTHER)],
                        value=EMBEDDED,
                        label="Which model?",
                        interactive=True,
                        elem_id="model",
                    )
                    place = gr.Textbox(
                        label="The other model",
                        info="A directory of this machine, or the id of a model on Hugging Face",
                        max_lines=1,
                        visible=False,
                        elem_id="place",
                    )
                    with gr.Accordion("More options", open=False):
                        aliases = gr.Textbox(
                            label="Its other names",
                            info="Separated by commas",
                            max_lines=1,
                        )
                        kind = gr.Radio(
                            [("let the model say", ANY_KIND), *((k, k) for k in KINDS)],
                            value=ANY_KIND,
                            label="What is it?",
                            interactive=True,
                        )
                        redact = gr.Checkbox(
                            label="Leave names and answers out of the report",
                        )
            if self.examples:
                gr.HTML(
                    "<p>No picture at hand? The demo model knows some drawn creatures. Take one:"
                    "</p>"
                )
                with gr.Row(elem_classes="examples"):
                    for example in self.examples:
                        button = gr.Button(example.name, size="sm", min_width=120)
                        self._on(button.click, self._takes(example), outputs=[name, model])
            self.fields = [name, model, place, aliases, kind, redact]
            ask = self._part(
                "look", gr.Button("Does the model know it?", variant="primary", elem_id="look")
            )
            model.change(
                lambda chosen: gr.update(visible=chosen == OTHER), [model], [place], **QUIET
            )
            self._on(upload.upload, self.take_picture, [upload], [upload])
            for begins in (ask.click, name.submit, place.submit, aliases.submit):
                self._on(begins, self.look, self.fields)

    def _check_and_train(self) -> None:
        with self._part("step-2", self._step(2)):
            self._heading(2)
            self._part("said", gr.HTML(""))
            button = gr.Button("Show what would be trained", variant="primary", elem_id="gather")
            self._on(self._part("gather", button).click, self.gather)
        with self._part("step-3", self._step(3)):
            self._heading(3)
            self._part("samples", gr.HTML(""))
            button = gr.Button("Start the training", variant="primary", elem_id="train")
            self._on(self._part("train", button).click, self.train)
        with self._part("step-4", self._step(4)):
            self._heading(4)
            self._part("training", gr.HTML(""))

    def _result(self) -> None:
        with self._part("step-5", self._step(5)):
            self._heading(5)
            self._part("verdict", gr.HTML("", elem_id="verdict"))
            gr.HTML(
                "<h2>Ask both models</h2><p>Each question stands for itself. Both answer about the "
                "same picture.</p>"
            )
            with gr.Row():
                with gr.Column(min_width=280):
                    self._part("asked-about", gr.HTML("", elem_id="asked-about"))
                    upload = gr.File(
                        label="Another picture",
                        file_types=["image"],
                        type="filepath",
                        height=110,
                        elem_id="other-picture",
                    )
                    self._on(upload.upload, self.take_other, [upload], [upload])
                    if self.examples:
                        with gr.Row(elem_classes="examples"):
                            for example in self.examples:
                                button = gr.Button(
                                    f"New picture of {example.name}", size="sm", min_width=120
                                )
                                self._on(button.click, self._takes_other(example))
                with gr.Column(min_width=280):
                    question = gr.Textbox(
                        label="Question",
                        value="Who is this?",
                        max_lines=3,
                        submit_btn=False,
                        elem_id="question",
                    )
                    pictured = gr.Checkbox(label="Show the picture to the models", value=True)
                    button = gr.Button("Ask both", variant="primary", elem_id="ask")
                    for asks in (self._part("ask", button).click, question.submit):
                        self._on(asks, self.ask, [question, pictured])
            self._part("chat", gr.HTML("", elem_id="chat"))

    def _bar(self) -> None:
        over = gr.Button("Remove all of this and start over", visible=False, elem_id="over")
        self._on(self._part("over", over).click, self.start_over)
        with self._part("bar", gr.Row(visible=False, elem_id="bar")):
            self._part("status", gr.HTML("", elem_id="status"))
            button = gr.Button("Stop", variant="stop", elem_id="stop", min_width=90, scale=0)
            self._on(button.click, self.stop)

    # Actions ---------------------------------------------------------------------------------

    def _on(
        self,
        event: Callable[..., Any],
        action: Callable[..., Any],
        inputs: Sequence[Any] = (),
        outputs: Sequence[Any] = (),
    ) -> None:
        """Does the action for the visitor when the event comes.

        Where it raises BadInput, the page shows the sentence and the outputs are emptied.
        """

        def act(request: gr.Request, *values: Any) -> Any:
            visitor = self._visitor(request)
            try:
                return action(visitor, *values)
            except BadInput as error:
                visitor.message = str(error)
                return [None for _ in outputs] or None

        event(act, list(inputs), list(outputs), **QUIET)

    def _visitor(self, request: gr.Request) -> Visitor:
        return self.desk.visit(request.cookies.get(COOKIE, ""))

    def take_picture(self, visitor: Visitor, file: str | None) -> None:
        """Takes over an uploaded picture and empties the field."""
        if file is not None:
            visitor.picture = self.desk.keep(visitor, Path(file))
            visitor.message = ""

    def take_other(self, visitor: Visitor, file: str | None) -> None:
        if file is not None:
            visitor.other = self.desk.keep(visitor, Path(file))
            visitor.message = ""

    def _takes(self, example: Example) -> Callable[[Visitor], list[str]]:
        def take(visitor: Visitor) -> list[str]:
            visitor.picture = self.desk.keep_copy(visitor, example.picture)
            visitor.message = ""
            return [example.name, EMBEDDED]

        return take

    def _takes_other(self, example: Example) -> Callable[[Visitor], None]:
        def take(visitor: Visitor) -> None:
            visitor.other = self.desk.keep_copy(visitor, example.other)

        return take

    def look(
        self,
        visitor: Visitor,
        name: str,
        model: str,
        place: str,
        aliases: str,
        kind: str,
        redact: bool,
    ) -> None:
        if visitor.picture is None:
            raise BadInput("There is no picture yet: drop one, or take one of those offered.")
        if not (name or "").strip():
            raise BadInput("There is no name yet: write the name of whom the picture shows.")
        if model == OTHER and not (place or "").strip():
            raise BadInput("Which other model? Write its directory or its id.")
        names = tuple(alias.strip() for alias in (aliases or "").split(",") if alias.strip())
        visitor.other = None
        self.desk.begin(
            visitor,
            Asked(
                name.strip(),
                visitor.picture.path,
                place.strip() if model == OTHER else "",
                names,
                None if kind in (None, ANY_KIND) else kind,
                bool(redact),
            ),
        )

    def gather(self, visitor: Visitor) -> None:
        self.desk.act(visitor).gather()

    def train(self, visitor: Visitor) -> None:
        self.desk.act(visitor).train()

    def ask(self, visitor: Visitor, question: str, pictured: bool) -> None:
        shown = visitor.other or visitor.picture
        picture = shown.path if shown is not None and pictured else None
        self.desk.act(visitor).ask(question or "", picture)

    def stop(self, visitor: Visitor) -> None:
        self.desk.act(visitor).stop()

    def start_over(self, visitor: Visitor) -> None:
        self.desk.leave(visitor)

    # What is shown ---------------------------------------------------------------------------

    def restore(self, request: gr.Request) -> list[Any]:
        """The fields of the first step, on a page that was loaded again."""
        asked = self.desk.view(self._visitor(request)).asked
        if asked is None:
            return [gr.skip() for _ in self.fields]
        other = OTHER if asked.model else EMBEDDED
        place = gr.update(value=asked.model, visible=bool(asked.model))
        return [
            asked.concept,
            other,
            place,
            ", ".join(asked.aliases),
            asked.kind or ANY_KIND,
            asked.redact,
        ]

    def show(self, shown: dict[str, Any], request: gr.Request) -> list[Any]:
        """What the browser shows now, and an update for each part that is out of date."""
        visitor = self._visitor(request)
        wanted = self._wanted(visitor, self.desk.view(visitor))
        updates = []
        for name in self.parts:
            same = name in shown and shown[name] == wanted[name]
            updates.append(gr.skip() if same else gr.update(**wanted[name]))
        if wanted == shown:
            return [gr.skip(), *updates]
        return [wanted, *updates]

    def _wanted(self, visitor: Visitor, view: View) -> dict[str, dict[str, Any]]:
        phase, ahead = view.phase, self.desk.ahead(visitor)
        step, free = html.step_of(phase), not view.busy
        other = visitor.other or visitor.picture
        seen = {
            "stepper": html.stepper(view),
            "message": html.message(view, visitor.message, ahead),
            "preview": html.preview(
                visitor.picture.preview if visitor.picture else None, "The picture you chose"
            ),
            "said": html.said(view),
            "samples": html.samples(view),
            "training": html.training(view),
            "verdict": html.verdict(view),
            "asked-about": html.preview(
                other.preview if other else None, "The picture asked about"
            ),
            "chat": html.chat(view.chat),
            "status": html.status(view, time.monotonic()),
        }
        wanted: dict[str, dict[str, Any]] = {name: {"value": value} for name, value in seen.items()}
        wanted["look"] = {"interactive": free and ahead is None}
        wanted["step-2"] = {"visible": bool(view.said)}
        wanted["gather"] = {"visible": phase is Phase.KNOWN}
        wanted["step-3"] = {"visible": view.samples is not None}
        wanted["train"] = {"visible": phase is Phase.READY}
        wanted["step-4"] = {"visible": step >= 4}
        wanted["step-5"] = {"visible": phase is Phase.DONE}
        wanted["ask"] = {"interactive": free}
        wanted["bar"] = {"visible": view.busy}
        begun = phase is not Phase.EMPTY or ahead is not None
        wanted["over"] = {"visible": free and begun}
        return wanted
