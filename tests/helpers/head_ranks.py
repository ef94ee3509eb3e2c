"""Ranks that share a head: what each of them computes, and how a test gets them.

    python tests/helpers/head_ranks.py FOLDER SIZE...

starts SIZE processes (gloo) for each size, one size after the other, and leaves what each rank
found in FOLDER/SIZE.RANK. The processes are forks of one that has torch already.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastsiu import TeacherCache, fused_dmk_ce

N, V, D = 11, 101, 12  # 101 is divided by neither 2 nor 4
# Ranks' first rows. Of four ranks one has no row, and one has a single one.
CUTS = {1: (0, 101), 2: (0, 30, 101), 4: (0, 40, 40, 41, 101)}
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

MASKS = {"all": {}, "mask": dict(keep=True), "renormalised": dict(keep=True, renormalize=True)}
LOGITS = {"": {}, "tau": dict(temperature=2.0), "softcap": dict(logit_softcap=4.0)}
LOGITS |= {"tau softcap scale": dict(temperature=0.5, logit_softcap=4.0, logit_scale=0.7)}
HEADS = ("frozen", "own", "trains", "same trains", "no teacher")
# one reduction for each case, so that each head meets them all
REDUCTIONS = itertools.cycle(("mean", "sum", "none", "given"))
CASES = {
    f"{head}, {mask}, {logits}": dict(head=head, reduction=next(REDUCTIONS))
    | MASKS[mask]
    | LOGITS[logits]
    for head, mask, logits in itertools.product(HEADS, MASKS, LOGITS)
}


def inputs(dtype: torch.dtype) -> SimpleNamespace:
    """The whole call, the same numbers for each dtype as far as it holds them."""
    g = torch.Generator().manual_seed(3)
    some = lambda *shape: torch.randn(shape, generator=g).to(BF16).to(dtype)
    made = SimpleNamespace(ht=some(N, D), W=some(V, D), b=some(V), Wt=some(V, D), bt=some(V))
    made.h = made.ht + (0.3 * some(N, D)).to(BF16).to(dtype)
    made.h[2] = made.ht[2]  # a row that has not moved
    made.y = torch.randint(V, (N,), generator=g)
    made.y[0], made.y[1], made.y[4] = 0, V - 1, -100
    made.keep = torch.rand(V, generator=g) > 0.2
    made.a, made.k = torch.rand(N, generator=g), torch.rand(N, generator=g)
    return made


def compute(
    case: dict[str, Any],
    dtype: torch.dtype,
    group: Any = None,
    rows: slice = slice(None),
    backend: str = "auto",
) -> dict[str, Tensor]:
    """Loss, parts and gradients of one case, by this rank's rows of the head."""
    x, options = inputs(dtype), dict(case)
    head, reduction = options.pop("head"), options.pop("reduction")
    keep = x.keep if options.pop("keep", False) else None
    renormalize = options.pop("renormalize", False)
    trains = head in ("trains", "same trains")
    own = head in ("own", "trains")
    h = x.h.requires_grad_()
    W, b = (p[rows].clone().requires_grad_(trains) for p in (x.W, x.b))
    teacher = None
    if head != "no teacher":
        Wt, bt = (x.Wt[rows], x.bt[rows]) if own else (W, b)
        teacher = TeacherCache.from_hidden(
            x.ht, Wt, head_bias=bt, vocab_keep=keep, renormalize=renormalize, group=group, **options
        )
    given = reduction == "given"
    loss, parts = fused_dmk_ce(
        h,
        W,
        x.y,
        teacher,
        head_bias=b,
        ce_weight=x.a,
        kl_weight=x.k,
        reduction="mean" if given else reduction,
        ce_denominator=7.0 if given else None,
        kl_denominator=torch.tensor(5) if given else None,
        return_parts=True,
        backend=backend,
        group=group,
        **options,
    )
    loss.backward(
        torch.linspace(-1, 3, N).to(loss.dtype) if loss.ndim else torch.tensor(1.7).to(loss)
    )
    found = dict(loss=loss.detach(), **parts._asdict(), h=h.grad)
    if trains:
        found |= dict(W=W.grad, b=b.grad)
    if teacher is not None:
        found |= dict(m=teacher.m, C=teacher.C, lse=teacher.lse)
    return found


def part_of(size: int, rank: int) -> slice:
    return slice(CUTS[size][rank], CUTS[size][rank + 1])


# --------------------------------------------------------------------------------------------------
# what a rank does


class Sent:
    """Counts the bytes that this rank hands to the collectives, and the calls."""

    def __enter__(self) -> Sent:
        self.bytes = self.calls = 0
        self.originals = dist.all_reduce, dist.all_gather
        reduce, gather = self.originals

        def all_reduce(x: Tensor, *rest: Any, **more: Any) -> Any:
            self.bytes, self.calls = self.bytes + x.nbytes, self.calls + 1
            return reduce(x, *rest, **more)

        def all_gather(everyone: list[Tensor], x: Tensor, *rest: Any, **more: Any) -> Any:
            self.bytes, self.calls = self.bytes + x.nbytes, self.calls + 1
            return gather(everyone, x, *rest, **more)

        dist.all_reduce, dist.all_gather = all_reduce, all_gather
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce, dist.all_gather = self.originals


def counted(size: int, rank: int) -> dict[str, tuple[int, int]]:
    """Bytes and calls of each way through the loss, and of making the cache."""
    group, rows, found = dist.group.WORLD, part_of(size, rank), {}
    for name, options in {
        "frozen": {},
        "renormalised": dict(vocab_keep=True, renormalize=True),
        "tau": dict(temperature=2.0),
        "softcap": dict(logit_softcap=4.0),
    }.items():
        x = inputs(F32)
        if "vocab_keep" in options:
            options = options | dict(vocab_keep=x.keep)
        with Sent() as sent:
            teacher = TeacherCache.from_hidden(x.ht, x.W[rows], group=group, **options)
        found["cache " + name] = sent.bytes, sent.calls
        for trains, graph, parts in itertools.product((False, True), (False, True), (False, True)):
            W = teacher.head_weight if not trains else x.W[rows].clone().requires_grad_()
            with Sent() as sent, torch.set_grad_enabled(graph):
                h = x.h.clone().requires_grad_()
                loss = fused_dmk_ce(h, W, x.y, teacher, return_parts=parts)
                if graph:
                    (loss[0] if parts else loss).backward()
            found[f"{name} {trains=} {graph=} {parts=}"] = sent.bytes, sent.calls
    with Sent() as sent:
        fused_dmk_ce(x.h.clone().requires_grad_(), x.W[rows], x.y, group=group).backward()
    found["no teacher"] = sent.bytes, sent.calls
    return found


def rank_main(size: int, rank: int) -> dict[str, Any]:
    """Everything that a rank of this size finds."""
    group, rows = dist.group.WORLD, part_of(size, rank)
    found: dict[str, Any] = {"fp64": {}, "fp32": {}, "bf16": {}}
    for name, case in CASES.items():
        found["fp64"][name] = compute(case, F64, group, rows)
        if size != 1:
            found["fp32"][name] = compute(case, F32, group, rows)
    found["bytes"] = counted(size, rank)
    return found


# --------------------------------------------------------------------------------------------------
# how ranks start


def start(folder: Path, *sizes: int) -> None:
    """Runs this file; raises AssertionError with the ranks' output where one fails."""
    command = [sys.executable, __file__, str(folder), *map(str, sizes)]
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def results(folder: Path, size: int) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{size}.{rank}", weights_only=False) for rank in range(size)]


def run(folder: Path, size: int, rank: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / f'store {size}'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    found = rank_main(size, rank)
    dist.barrier()
    dist.destroy_process_group()
    torch.save(found, folder / f"{size}.{rank}")


def main(folder: Path, *sizes: int) -> int:
    for size in sizes:
        children = []
        for rank in range(size):
            child = os.fork()
            if child == 0:
                try:
                    run(folder, size, rank)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                    sys.stderr.flush()
                    os._exit(1)
            children.append(child)
        if any([os.waitpid(child, 0)[1] for child in children]):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))
