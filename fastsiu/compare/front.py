"""A comparison as Markdown and as a plot: what is forgotten against what is retained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# Table 1 of arXiv 2405.12523 (LLaVA-1.5 7B, Trump, mean of 3 trials): EM, C-Dis, Specificity,
# Fluency, Diversity.
PUBLISHED = (
    ("PO", "58.3", "0.4", "58.3", "75.1", "93.5"),
    ("GA", "36.3", "1.6", "9.0", "373.6", "6.3"),
    ("GA+KL", "33.0", "0.8", "60.0", "198.1", "48.0"),
    ("SIU", "99.0", "1.8", "60.7", "61.2", "97.0"),
)
COLUMNS = (
    "method",
    "lr",
    "steps",
    "name still given",
    "95 %",
    "others' names kept",
    "look-alikes",
    "facts",
    "broken",
    "s",
    "front",
)


def cells(row: Mapping[str, Any]) -> list[str]:
    """One row of the table, as texts."""
    if row["named"]["value"] is None:
        return [row["method"], *["-"] * (len(COLUMNS) - 2), row["named"]["reason"]]
    named, broken = row["named"], row["broken"]
    setting = [f"{row['lr']:.2g}", str(row["steps"])] if "lr" in row else ["-", "-"]
    return [
        row["method"] + (f" (k {row['k']:g})" if "k" in row else ""),
        *setting,
        _percent(named),
        f"{100 * named['low']:.1f}-{100 * named['high']:.1f}",
        *(_percent(row[key]) for key in ("others", "lookalikes", "facts")),
        "-" if broken["value"] is None else str(round(broken["value"] * broken["n"])),
        f"{row['seconds']:.0f}" if "seconds" in row else "-",
        _front(row),
    ]


def table(report: Mapping[str, Any]) -> list[list[str]]:
    """The untouched model's row, then a row for each method."""
    return [
        cells({"method": "untouched model", **report["untouched"]}),
        *(cells(row) for row in report["rows"]),
    ]


def show(console: Console, report: Mapping[str, Any]) -> None:
    """The table in a terminal of 80 columns: shares in %, no seconds."""
    drawn = Table(
        title=f"{', '.join(report['concepts'])}: forgotten and retained, %",
        title_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
    )
    for name in (
        "method",
        "lr",
        "steps",
        "named",
        "95 %",
        "others",
        "alike",
        "facts",
        "broken",
        "front",
    ):
        drawn.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for row in table(report):
        drawn.add_row(*(text.removesuffix(" %") for text in (*row[:9], row[10])))
    console.print(drawn)


def markdown(report: Mapping[str, Any]) -> str:
    """The table, how the settings were chosen, and the paper's own table."""
    search, floor = report["search"], report["floor"]
    seeds, rates, steps = (
        _list(v)
        for v in (report["test"]["seeds"], (f"{lr:.2g}" for lr in search["lr"]), search["steps"])
    )
    lines = [
        "# Methods compared",
        "",
        f"{report['suite']}: {', '.join(report['concepts'])}; model `{report['model']}`; seeds "
        f"{seeds}.",
        "",
        *grid(COLUMNS, table(report)),
        "",
        "*Name still given*: share of the answers to name questions about new pictures of the "
        "concept that hold its name or a part of it, with its Wilson interval (the answers of one "
        "training are not independent, so it is too narrow). *Others' names kept*: of those that "
        "the untouched model gives. *Facts*: answers that are the untouched model's word for word. "
        "*Broken*: answers that became empty, repetition or gibberish.",
        "",
        "Every method has the same picture, questions, retained samples, dreams, LoRA, batch and "
        f"shares, and the same search: learning rates {rates}, looked at after {steps} steps, on "
        "pictures that the test does not see; smfa also with several values of its k. Chosen is "
        "the setting with the lowest share of the name among those that keep at least "
        f"{100 * floor:.0f} % of others' names (look-alikes included) and of facts, of equals the "
        "middle one by steps; \u2020: none does, and this keeps most. The test trains anew with "
        "other seeds and dreams, for exactly so many steps. "
        "*Front*: no other method keeps as much and gives the name as rarely.",
        "",
        "## Published, other model and data, not comparable in level",
        "",
        "arXiv 2405.12523, Table 1: LLaVA-1.5 7B, one concept, 3 trials, learning rates not "
        "searched. EM is the share of answers without the name (higher is better), Specificity the "
        "mean of eight public benchmarks.",
        "",
        *grid(("method", "EM", "C-Dis", "Specificity", "Fluency", "Diversity"), PUBLISHED),
        "",
    ]
    return "\n".join(lines)


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def plot(report: Mapping[str, Any], directory: Path) -> list[str]:
    """Writes compare.png and compare.svg into the directory. Returns [], or a sentence where
    matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return [
            "No plot was drawn, since matplotlib is not installed: pip install 'fastsiu[plot]'."
        ]
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in report["rows"] if row["named"]["value"] is not None]
    with pyplot.style.context("default"):
        figure, axes = pyplot.subplots(figsize=(9.5, 5.6), dpi=160)
        best = sorted((r for r in rows if r["front"]), key=lambda r: r["kept"]["value"])
        axes.plot(
            [100 * r["kept"]["value"] for r in best],
            [100 - 100 * r["named"]["value"] for r in best],
            color="#9bb8d3",
            zorder=1,
            linewidth=2,
            label="front",
        )
        axes.axvline(100 * report["floor"], color="#bbbbbb", linestyle=":", zorder=0)
        for row in rows:
            x, y = 100 * row["kept"]["value"], 100 - 100 * row["named"]["value"]
            colour = "#1f5f9e" if row["method"].startswith(("siu", "ce")) else "#c46a1b"
            spread = [
                [_apart(x, [100 * s["kept"] for s in row["seeds"]], side)] for side in (-1, 1)
            ]
            height = [
                [_apart(y, [100 - 100 * s["named"] for s in row["seeds"]], side)]
                for side in (-1, 1)
            ]
            axes.errorbar(
                x,
                y,
                xerr=spread,
                yerr=height,
                fmt="o" if row["front"] else "x",
                color=colour,
                markersize=7,
                elinewidth=0.8,
                alpha=0.9,
                zorder=2,
            )
        places = labels_at(
            [(100 * row["kept"]["value"], 100 - 100 * row["named"]["value"]) for row in rows]
        )
        for row, place in zip(rows, places, strict=True):
            axes.annotate(
                row["method"] + ("" if row["floor_met"] else " \u2020"),
                (100 * row["kept"]["value"], 100 - 100 * row["named"]["value"]),
                xytext=(1.03, place),
                textcoords="axes fraction",
                fontsize=8,
                va="center",
                fontweight="bold" if row["front"] else "normal",
                arrowprops={"arrowstyle": "-", "color": "#cccccc", "linewidth": 0.6},
            )
        axes.set_xlabel(
            "retained: the smaller of others' names and facts, % of the untouched model's"
        )
        axes.set_ylabel("answers without the name, %")
        axes.set_title(
            "Each method at its best setting, on new pictures (bars: lowest and highest seed)",
            fontsize=10,
        )
        axes.grid(color="#eeeeee")
        figure.tight_layout()
        for kind in ("png", "svg"):
            figure.savefig(
                directory / f"compare.{kind}",
                facecolor="white",
                metadata={"Date": None} if kind == "svg" else None,
            )
        pyplot.close(figure)
    return []


def labels_at(points: Sequence[tuple[float, float]], gap: float = 0.052) -> list[float]:
    """Heights, 0 to 1, of a column of labels beside the plot, at least `gap` apart and in the order
    of the points from above. points: (x, y) in percent."""
    gap = min(gap, 1 / max(1, len(points) - 1))
    order = sorted(range(len(points)), key=lambda i: (-points[i][1], -points[i][0]))
    heights, last = {}, 1.0 + gap
    for i in order:
        heights[i] = last = min(points[i][1] / 100, last - gap)
    floor = 0.0
    for i in reversed(order):  # a label that sank below the plot is pushed up again
        heights[i] = max(heights[i], floor)
        floor = heights[i] + gap
    return [heights[i] for i in range(len(points))]


def _apart(centre: float, values: Sequence[float], side: int) -> float:
    """How far the seeds reach beyond the pooled value on one side."""
    return max(0.0, *(side * (value - centre) for value in values))


def _percent(rate: Mapping[str, Any]) -> str:
    return "-" if rate["value"] is None else f"{100 * rate['value']:.1f} %"


def _front(row: Mapping[str, Any]) -> str:
    if "front" not in row:
        return "-"
    return ("yes" if row["front"] else "no") + ("" if row["floor_met"] else " \u2020")


def _list(values: Any) -> str:
    return ", ".join(map(str, values))
