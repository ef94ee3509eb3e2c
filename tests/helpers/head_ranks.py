"""Ranks that share a head: what each of them computes, and how a test gets them.

    python tests/helpers/head_ranks.py FOLDER SIZE...

starts SIZE processes (gloo) for each size, one size after the other, and leaves what each rank
found in FOLDER/SIZE.RANK. The processes are forks of one that has torch already.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import os
import pickle
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import Replicate

from fastsiu import DMKCELoss, TeacherCache, fused_dmk_ce
from fastsiu.kernels.inputs import same

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


def refusals(rank: int) -> dict[str, str]:
    """What two ranks say of arguments that cannot be used, each by its own words."""
    group, rows, x = dist.group.WORLD, part_of(2, rank), inputs(F32)
    other = rank == 1
    W, said = x.W[rows], {}
    teacher = TeacherCache.from_hidden(x.ht, W, group=group)

    def call(name: str, made: Any, *given: Any, **options: Any) -> None:
        try:
            made(*given, **options)
            said[name] = "nothing"
        except (ValueError, TypeError) as error:
            said[name] = f"{type(error).__name__}: {error}"

    loss = lambda h, W, y, **options: fused_dmk_ce(h, W, y, **dict(group=group) | options)
    cut = slice(D - other)
    call("D", loss, x.h[:, cut], W[:, cut], x.y)
    call("N", loss, x.h[: N - other], W, x.y[: N - other])
    call("labels", loss, x.h, W, x.y.flip(0) if other else x.y)
    call("label", loss, x.h, W, x.y.clamp(min=V))
    call("dtype", loss, x.h, W.to(BF16) if other else W, x.y)
    call("one trains", loss, x.h, W.clone().requires_grad_(other), x.y)
    call("one refuses", loss, x.h, W, x.y, beta=-1.0 if other else 1.0)
    call("no rows", loss, x.h, W[:0], x.y)
    call("backend", loss, x.h, W, x.y, backend="reference")
    call("reduction", loss, x.h, W, x.y, reduction="min" if other else "mean")
    call("whole teacher", loss, x.h, W, x.y, teacher=TeacherCache.from_hidden(x.ht, W))
    call("mask of a part", TeacherCache.from_hidden, x.ht, W, vocab_keep=x.keep[:50], group=group)
    masks = x.keep.flip(0) if other else x.keep
    call("masks", TeacherCache.from_hidden, x.ht, W, vocab_keep=masks, group=group)
    call("pickle", pickle.dumps, teacher)
    alone = dist.new_group([0])
    if other:
        call("outside", loss, x.h, W, x.y, group=alone)
    mine = W.clone()
    changed = TeacherCache.from_hidden(x.ht, mine, group=group)
    if other:
        mine[3] += 1
    call("changed head", loss, x.h, mine, x.y, teacher=changed)
    call("right", loss, x.h, W, x.y, teacher=copy.deepcopy(teacher)[:])
    return said


def files(folder: Path, rank: int) -> dict[str, Any]:
    """A cache through a file: of the ranks, of one process, and of another head."""
    group, rows, x = dist.group.WORLD, part_of(2, rank), inputs(F32)
    made = TeacherCache.from_hidden(
        x.ht, x.W[rows], head_bias=x.b[rows], vocab_keep=x.keep, group=group
    )
    made.save(folder / "parts")
    whole = TeacherCache.load(folder / "parts", head_weight=x.W)
    if rank == 0:
        whole.save(folder / "whole")
    dist.barrier()
    told = [safe_open(folder / name, "pt").metadata() for name in ("parts", "whole")]
    # metadata have a digest of all numbers
    found: dict[str, Any] = {"same file": told[0] == told[1] and "digest" in told[0]}
    again = TeacherCache.load(folder / "whole", head_weight=x.W[rows], group=group)
    loss = lambda teacher, W, b: fused_dmk_ce(x.h, W, x.y, teacher, head_bias=b)
    found["loss"] = loss(again, x.W[rows], x.b[rows]), loss(whole, x.W, x.b)
    found["m"] = again.m, whole.m
    half = TeacherCache.load(folder / "whole", head_weight=x.W[rows].double(), group=group)
    found["another dtype"] = len(half)
    for name, W in {"swapped": x.W.flip(0)[rows], "shorter": x.W[rows][:-1]}.items():
        try:
            TeacherCache.load(folder / "whole", head_weight=W, group=group)
        except ValueError as error:
            found[name] = str(error)
    try:
        gone = folder / ("whole" if rank == 0 else "nothing")
        TeacherCache.load(gone, head_weight=x.W[rows], group=group)
    except (ValueError, OSError) as error:
        found["gone"] = f"{type(error).__name__}: {error}"
    return found


def accumulated(size: int, rank: int) -> dict[str, Tensor]:
    """Gradients of two micro-batches, one after the other, and of one batch; with a frozen head
    and one that trains. The value without a graph, and through `DMKCELoss`."""
    group, rows, x, found = dist.group.WORLD, part_of(size, rank), inputs(F64), {}
    for trains in (False, True):
        W = x.W[rows].clone()
        teacher = TeacherCache.from_hidden(x.ht, W, vocab_keep=x.keep, group=group)
        for name, cuts in {"one": (0, N), "two": (0, 4, N)}.items():
            h = x.h.clone().requires_grad_()
            trained = W.clone().requires_grad_() if trains else W
            for a, b in itertools.pairwise(cuts):
                part = fused_dmk_ce(
                    h[a:b], trained, x.y[a:b], teacher[a:b], ce_denominator=9, kl_denominator=N
                )
                (part * 64).backward()
            found[f"{name} h {trains=}"] = h.grad
            if trains:
                found[f"{name} W {trains=}"] = trained.grad
        given = (x.h, W, x.y, teacher)
        with torch.no_grad():
            found[f"one value {trains=}"] = DMKCELoss()(*given, group=group)
        found[f"two value {trains=}"] = fused_dmk_ce(*given, group=group).detach()
    return found


# --------------------------------------------------------------------------------------------------
# sharded models


def example() -> Any:
    """tests/trainers/head_in_parts.py as a module."""
    path = Path(__file__).resolve().parents[1] / "trainers" / "head_in_parts.py"
    spec = importlib.util.spec_from_file_location("head_in_parts", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def tensor_parallel() -> dict[str, Any]:
    """The example's losses and what it trained, with a frozen head and one that trains."""
    found: dict[str, Any] = {}
    for train_head in (False, True):
        model, history = example().main(train_head=train_head)
        trained = {n: full(p.detach()) for n, p in model.named_parameters() if p.requires_grad}
        found[f"{train_head=}"] = history, trained
    return found


def adapted() -> dict[str, Tensor]:
    """Loss and gradients of LoRA on the head, of which each rank has its rows."""
    from peft import LoraConfig, inject_adapter_in_model

    module = example()
    torch.manual_seed(0)
    model = module.Model().requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=5, target_modules=["lm_head"]), model)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    if dist.is_initialized():
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        plan = {"lm_head.base_layer": module.PLAN["lm_head"]}
        module.parallelize_module(model, mesh, plan)
    ids = torch.randint(module.V, (3, 7), generator=torch.Generator().manual_seed(1))
    with module.no_logits(model) as kept:
        model(ids)
    hidden = kept["hidden"].flatten(0, 1)
    with torch.no_grad():
        weight, bias, group = module.head_of(model, frozen=True, parts=True)
    teacher = TeacherCache.from_hidden(hidden.detach() + 0.1, weight, head_bias=bias, group=group)
    weight, bias, group = module.head_of(model, parts=True)
    loss = fused_dmk_ce(hidden, weight, ids.flatten(), teacher, head_bias=bias, group=group)
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return found | {"loss": loss.detach()}


def tied() -> dict[str, Tensor]:
    """Loss and gradient of a head that is the embedding too, by the rank's rows."""
    module = example()
    torch.manual_seed(0)
    model = module.Model()
    if dist.is_initialized():
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        embedding = module.RowwiseParallel(input_layouts=Replicate())
        module.parallelize_module(model, mesh, module.PLAN | {"embed": embedding})
    model.lm_head.weight = model.embed.weight
    ids = torch.randint(module.V, (3, 7), generator=torch.Generator().manual_seed(1))
    with module.no_logits(model) as kept:
        model(ids)
    weight, bias, group = module.head_of(model, parts=True)
    loss = fused_dmk_ce(
        kept["hidden"].flatten(0, 1), weight, ids.flatten(), head_bias=bias, group=group
    )
    loss.backward()
    found = {n: full(p.grad) for n, p in model.named_parameters()}
    return found | {"loss": loss.detach()}


def fully_sharded(frozen: bool) -> dict[str, Any]:
    """FSDP2 with the head sharded by itself: gradients of one step, each rank with every second
    sample; is the second step's head the teacher's, and what did `head_of` send for it?"""
    module = example()
    torch.manual_seed(0)
    model = module.Model()
    model.requires_grad_(True)
    model.lm_head.requires_grad_(not frozen)
    rank, size = 0, 1
    if dist.is_initialized():
        from torch.distributed.fsdp import fully_shard

        rank, size = dist.get_rank(), dist.get_world_size()
        fully_shard(model.lm_head)
        fully_shard(model)
    ids = torch.randint(module.V, (4, 7), generator=torch.Generator().manual_seed(1))[rank::size]
    found: dict[str, Any] = {}
    with torch.no_grad(), module.no_logits(model) as kept:
        model(ids)
    states = 0.9 * kept["hidden"].flatten(0, 1)
    weight, bias = module.head_of(model, frozen=True)
    teacher = TeacherCache.from_hidden(states, weight, head_bias=bias)
    for _ in range(2):
        model.zero_grad()
        with module.no_logits(model) as kept:
            model(ids)
        with Sent() as sent:
            weight, bias = module.head_of(model)
        found["same"] = same(weight, teacher.head_weight) and same(bias, teacher.head_bias)
        found["sent"] = sent.bytes
        rows = kept["hidden"].flatten(0, 1)
        loss = fused_dmk_ce(
            rows,
            weight,
            ids.flatten(),
            teacher,
            head_bias=bias,
            ce_denominator=28,
            kl_denominator=28,
        )
        (loss * size).backward()
    found["gradients"] = {n: full(p.grad) for n, p in model.named_parameters() if p.requires_grad}
    parts = module.head_of(model, parts=True)
    found["group"] = parts.group is None and len(parts.weight) == module.V
    return found


def rank_main(folder: Path, size: int, rank: int) -> dict[str, Any]:
    """Everything that a rank of this size finds."""
    group, rows = dist.group.WORLD, part_of(size, rank)
    found: dict[str, Any] = {"fp64": {}, "fp32": {}}
    for name, case in CASES.items():
        found["fp64"][name] = compute(case, F64, group, rows)
        if size != 1:
            found["fp32"][name] = compute(case, F32, group, rows)
    found["bytes"] = counted(size, rank)
    found["accumulated"] = accumulated(size, rank)
    found["tensor parallel"] = tensor_parallel()
    if size == 2:
        found["adapted"] = adapted()
        found["tied"] = tied()
        found["refusals"] = refusals(rank)
        found["files"] = files(folder, rank)
        found["fully sharded"] = {frozen: fully_sharded(frozen) for frozen in (True, False)}
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
    found = rank_main(folder, size, rank)
    dist.barrier()
    dist.destroy_process_group()
    torch.save(found, folder / f"{size}.{rank}")


def main(folder: Path, *sizes: int) -> int:
    if 2 in sizes:
        import peft  # noqa: F401  # once, for all ranks

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
