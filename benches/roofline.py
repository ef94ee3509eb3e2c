"""How fast the loss can be on each GPU, and how fast its kernels are predicted to be, beside what
was measured.

    python benches/roofline.py               all GPUs and shapes: CE + KL with a frozen head,
                                             forward and backward
    python benches/roofline.py --gpu "RTX 4090" H200 --shape 256,151936,2048 64,32000,1024,float32
    python benches/roofline.py --general     a head that trains, a teacher with a head of its own
    python benches/roofline.py --json FILE   the same rows, with the assumptions, as JSON

floor         each product once at the data sheet's peak, or each weight moved once at its
              bandwidth, whichever takes longer:
              max(4 N V D / peak, bytes of W / bandwidth); with a training head 8 N V D, and W, the
              teacher's W and dW.
two products  the products that the vendor's library would compute one after the other, at what it
              reaches: no loss, but what the benches on a GPU call the floor.
predicted     a call from Python: its own time or the GPU's, whichever is longer. The GPU's follows
              from the launch row that triton_launch.py chooses: what a step of each loop multiplies
              and loads, whether the compiled loop loads ahead (PIPELINED), bytes, small kernels.
on the GPU    the same without the host, as a replayed graph.
measured      the newest "fastsiu triton" of results/loss.jsonl on that GPU at that shape, cold L2.
Below the table stands what is predicted to be slower than 80 % of two products, and why.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpus import GPUS
from loss import FULL, PEERS, RESULTS, Shape
from roofline_model import ASSUMED, floor, peak, predict, ridge, two_products

SHAPES: list[Shape] = list(dict.fromkeys(sorted(PEERS, key=lambda s: (*s[1:3], s[0])) + FULL))
DTYPES = ("bfloat16", "float32")


class BadInput(Exception):
    """One sentence: fact and remedy."""


def measured(path: Path) -> dict[tuple, float]:
    """ms of the newest run of the Triton kernels, by device and shape."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        r = json.loads(line)
        if r["kind"] == "shape" and r["contender"] == "fastsiu triton" and not r["missing"]:
            found[r["device"], r["N"], r["V"], r["D"], r["dtype"]] = r["ms"]["median"]
    return found


def rows(
    gpus: Sequence[str], shapes: Sequence[Shape], training: bool, results: Path
) -> list[dict[str, Any]]:
    known, found = {} if training else measured(results), []  # no bench times a head that trains
    for name in gpus:
        for shape in shapes:
            gpu, ms = GPUS[name], known.get((GPUS[name].device, *shape))
            times = floor(shape, gpu, training)
            least, by = 1e3 * max(times.values()), max(times, key=times.__getitem__)
            predicted = predict(shape, gpu, training)
            two = None if training else 1e3 * two_products(shape, gpu)
            found.append(
                dict(
                    gpu=name,
                    **dict(zip("NVD", shape, strict=False)),
                    dtype=shape[3],
                    floor_ms=least,
                    floor_by=by,
                    predicted=predicted,
                    two_products_ms=two,
                    predicted_share=least / predicted["ms"],
                    predicted_of_two=two and two / predicted["ms"],
                    device_of_two=two and two / predicted["device_ms"],
                    measured_ms=ms,
                    measured_share=None if ms is None else least / ms,
                )
            )
    return found


# --------------------------------------------------------------------------------------------------
# output


def short(x: float) -> str:
    return f"{x:.3g}" if x < 100 else f"{x:.0f}"


def percent(x: float) -> str:
    return f"{100 * x:.0f} %" if x >= 0.1 else f"{100 * x:.2g} %"


def markdown(lines: list[list[str]]) -> str:
    head, *body = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])


def ridges(gpus: Sequence[str], training: bool) -> str:
    lines = [
        [
            "GPU",
            "bf16, TFLOP/s",
            "GB/s",
            "L2, MB",
            "ridge of the floor, tokens",
            "ridge where the weights move twice",
        ]
    ]
    for name in gpus:
        gpu = GPUS[name]
        lines.append(
            [
                name,
                f"{gpu.bf16:g}",
                f"{gpu.bandwidth:g}",
                f"{gpu.l2:g}",
                f"{ridge(gpu, training):.0f}",
                f"{ridge(gpu, training, 2):.0f}",
            ]
        )
    return markdown(lines)


def table(found: list[dict[str, Any]]) -> str:
    head = ["GPU", "N, V, D", "dtype", "floor, ms", "by", "two products, ms", "predicted, ms", "by"]
    head += ["share of the floor", "of two products", "on the GPU, ms", "of two products"]
    lines = [[*head, "measured, ms", "share of the floor"]]
    for r in found:
        p, never, share = (
            r["predicted"],
            r["measured_ms"] is None,
            lambda x: x and percent(x) or "-",
        )
        lines.append(
            [
                r["gpu"],
                f"{r['N']}, {r['V']}, {r['D']}",
                r["dtype"],
                short(r["floor_ms"]),
                r["floor_by"],
                short(r["two_products_ms"]) if r["two_products_ms"] else "-",
                short(p["ms"]),
                p["by"],
                percent(r["predicted_share"]),
                share(r["predicted_of_two"]),
                short(p["device_ms"]),
                share(r["device_of_two"]),
                "not measured" if never else short(r["measured_ms"]),
                "-" if never else percent(r["measured_share"]),
            ]
        )
    return markdown(lines)


# Where a user is likely to be, and from how many tokens on: what is slower here is named.
JUDGED, FROM, BAR = ("H100", "RTX 4090", "RTX 3090"), 64, 0.8


def slow(found: list[dict[str, Any]]) -> str:
    """A line for each GPU, dtype and reason: what is predicted below BAR of two products."""
    judged = [r for r in found if r["gpu"] in JUDGED and r["N"] >= FROM and r["two_products_ms"]]
    if not judged:
        return ""
    late = [r for r in judged if r["predicted_of_two"] < BAR]
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for r in late:
        groups.setdefault((r["gpu"], r["dtype"], r["predicted"]["by"]), []).append(r)
    lines = []
    for (gpu, dtype, _), some in groups.items():
        shares = sorted({percent(r["predicted_of_two"]) for r in some}, key=lambda x: float(x[:-2]))
        sizes = ", ".join(map(str, sorted({r["N"] for r in some})))
        lines.append(
            f"- {gpu}, {dtype}, N {sizes}: {' to '.join([shares[0], shares[-1]][: len(shares)])}. "
            f"{reason(some)}."
        )
    head = f"Predicted below {percent(BAR)} of two products, on {', '.join(JUDGED)} from N = {FROM}"
    if not lines:
        return f"{head}: nothing."
    return "\n".join([f"{head}: {len(late)} of {len(judged)} shapes.", "", *lines])


def reason(some: list[dict[str, Any]]) -> str:
    """Why the slowest of some rows, which have the same bound, takes so long."""
    slowest = min(some, key=lambda r: r["predicted_of_two"])
    p, gpu = slowest["predicted"], GPUS[slowest["gpu"]]
    if p["by"] == "host":
        return f"Python takes {p['host_ms']:.2g} ms for {p['device_ms']:.2g} ms of work on the GPU"
    mine = [(kernel, ms) for by, kernel, ms in p["parts"] if by == p["by"]]
    share = percent(sum(ms for _, ms in mine) / p["ms"])
    if p["by"] == "small kernels":
        return f"{p['kernels']} small kernels: {share} of the time"
    where = f"{' and '.join(kernel for kernel, _ in mine)}: {share} of the time"
    if p["by"] == "matmul":
        reached = percent(p["flops"] / (peak(gpu, slowest["dtype"]) * p["ms"] / 1e3))
        return f"Multiplying in {where}, at {reached} of the peak on average"
    return {
        "memory": "Memory",
        "L2": "The L2's bandwidth, for tiles that small,",
        "waiting for loads": "Loads that are waited for",
    }[p["by"]] + f" in {where}"


def gpu_named(text: str) -> str:
    for name in GPUS:
        if text.lower() in (name.lower(), name.lower().removeprefix("rtx ")):
            return name
    raise BadInput(f"There are no peaks for the GPU {text!r}: choose among {', '.join(GPUS)}.")


def shape_named(text: str) -> Shape:
    numbers, dtype = (parts := text.split(","))[:3], (parts[3:] or ["bfloat16"])
    if (
        len(numbers) == 3
        and len(parts) <= 4
        and all(x.isdecimal() and int(x) for x in numbers)
        and dtype[0] in DTYPES
    ):
        return *map(int, numbers), dtype[0]
    raise BadInput(
        f"{text!r} is not a shape: give N,V,D or N,V,D,DTYPE, positive integers and one of "
        f"{', '.join(DTYPES)}."
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--gpu", nargs="+", metavar="NAME", default=list(GPUS), help=", ".join(GPUS)
    )
    parser.add_argument("--shape", nargs="+", metavar="N,V,D[,DTYPE]", help="bfloat16 by default")
    parser.add_argument("--general", action="store_true", help="a head that trains")
    parser.add_argument("--results", type=Path, default=RESULTS, help="what loss.py appended")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    try:
        gpus = [gpu_named(text) for text in options.gpu]
        shapes = [shape_named(text) for text in options.shape] if options.shape else SHAPES
        found = rows(gpus, shapes, options.general, options.results)
        if options.json:
            text = json.dumps(dict(general=options.general, assumed=ASSUMED, rows=found), indent=1)
            options.json.write_text(text + "\n", encoding="utf-8")
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"{error.filename} cannot be used ({error.strerror}): give another file.",
            file=sys.stderr,
        )
        return 2
    parts = [ridges(gpus, options.general), table(found), slow(found)]
    print(*filter(None, parts), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
