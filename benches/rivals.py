"""Everything that computes CE + KL from hidden states and a head, one entry each, under one
signature. Used by loss.py.

A contender is built once per problem: what a training run would keep between steps (a cached
teacher, dense targets, a compiled function) is made there and not timed. The result maps hidden,
which requires grad, to the scalar

    alpha * mean CE + beta * mean KL(teacher || student)

and the harness calls backward() on it. The head is frozen (requires_grad False) for everyone.
Rivals are called, never copied; `pip install -e ".[bench]"` brings those whose requirements agree
with ours. unsloth_zoo pins an older transformers and trl:

    pip install --no-deps unsloth_zoo==2026.10.9

Only its one self-contained file is loaded. Where pip must not touch torch or triton (a CUDA image),
give --no-deps to all.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastsiu

Step = Callable[[Tensor], Tensor]
FLOOR, TWO_CALLS = "two GEMMs (the floor)", "two calls"


@dataclass
class Problem:
    """The same tensors for every contender; nothing here requires grad."""

    hidden: Tensor  # [N, D]
    head: Tensor  # [V, D]
    labels: Tensor  # [N]
    teacher_hidden: Tensor  # [N, D]
    keep: Tensor | None = None  # [V], the vocabulary mask

    @property
    def bf16(self) -> bool:
        return self.head.dtype != torch.float32

    def double(self) -> Problem:
        return Problem(
            self.hidden.double(),
            self.head.double(),
            self.labels,
            self.teacher_hidden.double(),
            self.keep,
        )


@dataclass(frozen=True)
class Contender:
    """name: as in the table. package: distribution whose version is reported. build: (problem,
    alpha, beta) -> Step."""

    name: str
    package: str
    build: Callable[[Problem, Any, Any], Step]
    terms: str = "CE+KL"  # what one call computes: CE+KL, CE, GEMM
    how: str = "one call"  # how CE and KL come together
    # of the teacher between steps: hidden, statistics (ours), one fp32 [N, D], probabilities [N, V]
    keeps: str = "hidden"
    fp32_logits: bool = False  # logits delivered in fp32 whatever the inputs are
    skips_dw: bool = True  # False: differentiates the frozen head all the same
    masks: bool = False
    compiles: bool = False  # its first call compiles
    graphs: bool = False  # a CUDA graph can hold it: it asks the GPU for no number in the middle
    ours: bool = False
    missing: Callable[[Problem], str | None] = lambda problem: None

    def why_missing(self, problem: Problem) -> str | None:
        if problem.keep is not None and not self.masks:
            return "It has no vocabulary mask."
        if not self.ours and self.package != "torch" and self.version() is None:
            return f"{self.package} is not installed."
        return self.missing(problem)

    def version(self) -> str | None:
        if self.package == "torch":
            return torch.__version__
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


def contenders() -> list[Contender]:
    """All of them, present or not, floors first."""
    return [*floors(), *ours(), *plain_torch(), *packages()]


# The floors: two GEMMs and nothing else


def floors() -> list[Contender]:
    """Logits and their product with the head, no softmax between. An exact loss needs logits in
    fp32, and a CPU's bf16 product
    delivers bf16: there FLOOR includes the upcast of the head, tile by tile, and the best of three
    tilings counts."""

    def bare(p: Problem, alpha: Any, beta: Any) -> Step:
        return lambda hidden: (hidden.detach() @ p.head.T) @ p.head

    def exact(p: Problem, alpha: Any, beta: Any) -> Step:
        if p.head.is_cuda:
            return bare(p, alpha, beta)
        (N, D), V = p.hidden.shape, len(p.head)

        def step(hidden: Tensor, tile: int) -> Tensor:
            h, g, z_buffer = hidden.detach().float(), torch.zeros(N, D), torch.empty(N, tile)
            for start in range(0, V, tile):
                W = p.head[start : start + tile].float()
                z = torch.mm(h, W.T, out=z_buffer if len(W) == tile else torch.empty(N, len(W)))
                g.addmm_(z, W)
            return g

        def seconds(tile: int) -> float:
            clock = [time.perf_counter()]
            for _ in range(3):
                step(p.hidden, tile)
                clock.append(time.perf_counter())
            return min(b - a for a, b in zip(clock, clock[1:], strict=False))

        tile = min({min(V, t) for t in (1024, 4096, 16384 if p.bf16 else V)}, key=seconds)
        return lambda hidden: step(hidden, tile)

    def narrow(p: Problem) -> str | None:
        return None if p.bf16 and not p.head.is_cuda else "It is the floor itself here."

    return [
        Contender(FLOOR, "torch", exact, terms="GEMM", keeps="-", fp32_logits=True, graphs=True),
        Contender(
            "two GEMMs delivering bf16", "torch", bare, terms="GEMM", keeps="-", missing=narrow
        ),
    ]


# Ours


def ours() -> list[Contender]:
    found = []
    for backend in ("reference", "tiled", "triton", "cpu"):

        def build(p: Problem, alpha: Any, beta: Any, backend: str = backend) -> Step:
            teacher = fastsiu.TeacherCache.from_hidden(p.teacher_hidden, p.head, vocab_keep=p.keep)
            weights = dict(alpha=float(alpha), beta=float(beta), backend=backend)
            return lambda hidden: fastsiu.fused_dmk_ce(hidden, p.head, p.labels, teacher, **weights)

        def alone(p: Problem, alpha: Any, beta: Any, backend: str = backend) -> Step:
            return lambda hidden: fastsiu.fused_dmk_ce(
                hidden, p.head, p.labels, alpha=float(alpha), backend=backend
            )

        missing = lambda p, backend=backend: fastsiu.why_not(backend, p.hidden, p.head)
        same = dict(package="fastsiu", fp32_logits=True, masks=True, ours=True, missing=missing)
        same["graphs"] = backend in ("tiled", "triton")
        found.append(Contender(f"fastsiu {backend}", build=build, keeps="statistics", **same))
        if backend != "reference":
            found.append(
                Contender(
                    f"fastsiu {backend}, CE alone", build=alone, terms="CE", keeps="-", **same
                )
            )
    return found


# torch alone


def dense(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    teacher: Tensor,
    keep: Tensor | None,
    alpha: Any,
    beta: Any,
    wide: bool,
):
    """The loss as people write it. wide: logits from fp32 copies of hidden states and head."""
    if wide:
        hidden, head, teacher = hidden.float(), head.float(), teacher.float()
    z = (hidden @ head.T).float()
    with torch.no_grad():
        log_p = (teacher @ head.T).float().log_softmax(-1)
    log_q = z.log_softmax(-1)
    kl = F.kl_div(log_q, log_p, reduction="none", log_target=True)
    if keep is not None:
        kl = kl * keep
    return alpha * F.nll_loss(log_q, labels) + beta * kl.sum(-1).mean()


def mixed(p: Problem, alpha: Any, beta: Any) -> tuple[Tensor, Tensor, Tensor]:
    """alpha CE + beta KL = (alpha + beta) CE(mixed) - beta H(P): the mixed target [N, V] in the
    head's dtype, its mean entropy and the teacher's []. All of them are kept between steps."""
    log_p = (p.teacher_hidden.float() @ p.head.float().T).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    target = log_p.exp_().mul_(beta / (alpha + beta))
    del log_p
    target[torch.arange(len(target), device=target.device), p.labels] += alpha / (alpha + beta)
    target = target.to(p.head.dtype)
    own = sum(torch.special.entr(row.float()).sum() for row in target) / len(target)
    return target, own, entropy


def cached(p: Problem, alpha: Any, beta: Any, ce: Step) -> Step:
    """J. Chang's KL cache trick: with lse = CE + <h, W_y>, alpha CE + beta KL needs no more than
    somebody's mean CE."""
    t, W = p.teacher_hidden.float() @ p.head.float().T, p.head.float()
    m = t.softmax(-1) @ W
    # [N, D], []
    toward, negentropy = (
        W[p.labels] - m,
        ((p.teacher_hidden.float() * m).sum(-1) - t.logsumexp(-1)).mean(),
    )
    del t, W
    return lambda h: (
        (alpha + beta) * ce(h).float() + beta * ((h.float() * toward).sum(-1).mean() + negentropy)
    )


def plain_torch() -> list[Contender]:
    def eager(wide: bool) -> Callable[..., Step]:
        return lambda p, alpha, beta: (
            lambda h: dense(h, p.head, p.labels, p.teacher_hidden, p.keep, alpha, beta, wide)
        )

    def compiled(wide: bool) -> Callable[..., Step]:
        def build(p: Problem, alpha: Any, beta: Any) -> Step:
            function = torch.compile(dense, dynamic=False)
            # a float would compile again
            a, b = (torch.tensor(float(x), device=p.head.device) for x in (alpha, beta))
            return lambda h: function(h, p.head, p.labels, p.teacher_hidden, p.keep, a, b, wide)

        return build

    def torch_ce(p: Problem, chunked: bool) -> Step:
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None
        return lambda h: F.linear_cross_entropy(h, p.head, p.labels, options=options)

    def ce(chunked: bool) -> Callable[..., Step]:
        def build(p: Problem, alpha: Any, beta: Any) -> Step:
            run = torch_ce(p, chunked)
            return lambda h: alpha * run(h)

        return build

    def targets(p: Problem, alpha: Any, beta: Any) -> Step:
        target, _, entropy = mixed(p, alpha, beta)
        return lambda h: (
            (alpha + beta) * F.linear_cross_entropy(h, p.head, target).float() - beta * entropy
        )

    def chang(p: Problem, alpha: Any, beta: Any) -> Step:
        # torch's own advice is to chunk where N >= D
        return cached(p, alpha, beta, torch_ce(p, len(p.hidden) >= p.hidden.shape[1]))

    def narrow(p: Problem) -> str | None:
        return None if p.bf16 else "With fp32 inputs its logits are fp32 anyway."

    def linear_ce(p: Problem) -> str | None:
        return (
            None
            if hasattr(F, "linear_cross_entropy")
            else f"torch {torch.__version__} has no linear_cross_entropy."
        )

    return [
        Contender("eager", "torch", eager(False), masks=True, graphs=True),
        Contender(
            "eager, fp32 logits",
            "torch",
            eager(True),
            masks=True,
            fp32_logits=True,
            graphs=True,
            missing=narrow,
        ),
        Contender("torch.compile", "torch", compiled(False), masks=True, compiles=True),
        Contender(
            "torch.compile, fp32 logits",
            "torch",
            compiled(True),
            masks=True,
            fp32_logits=True,
            compiles=True,
            missing=narrow,
        ),
        Contender(
            "torch linear_cross_entropy",
            "torch",
            ce(False),
            terms="CE",
            keeps="-",
            missing=linear_ce,
        ),
        Contender(
            "torch linear_cross_entropy (chunked)",
            "torch",
            ce(True),
            terms="CE",
            keeps="-",
            missing=linear_ce,
        ),
        Contender(
            "torch linear_cross_entropy (soft targets)",
            "torch",
            targets,
            how="one call on the mixed target",
            keeps="probabilities",
            missing=linear_ce,
        ),
        Contender(
            "KL cache trick (torch's CE)",
            "torch",
            chang,
            how="CE and a product",
            keeps="one [N, D]",
            missing=linear_ce,
        ),
    ]


# Packages


def packages() -> list[Contender]:
    def liger_chunked(p: Problem, alpha: Any, beta: Any) -> Step:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(float(alpha), float(beta), beta=0.0)  # compiled, as it comes
        return lambda h: loss(h, p.head, p.teacher_hidden, p.head, p.labels)

    def liger_ce(p: Problem) -> Step:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss()
        return lambda h: loss(p.head, h, p.labels)

    def liger_jsd(p: Problem, alpha: Any, beta: Any) -> Step:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        ce, kl = liger_ce(p), LigerFusedLinearJSD(jsd_beta=0.0)
        return lambda h: alpha * ce(h) + beta * kl(h, p.head, p.teacher_hidden, p.head, p.labels)

    def liger_kldiv(p: Problem, alpha: Any, beta: Any) -> Step:
        from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

        ce, kl = liger_ce(p), LigerFusedLinearKLDivLoss()
        target = (p.teacher_hidden.float() @ p.head.float().T).softmax(-1).to(p.head.dtype)
        return lambda h: alpha * ce(h) + beta * kl(h, p.head, target, p.labels)

    def liger_mixed(p: Problem, alpha: Any, beta: Any) -> Step:
        """CE and KL in one of its calls, which gives KL(mixed || student)."""
        from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

        kl, (target, own, entropy) = LigerFusedLinearKLDivLoss(), mixed(p, alpha, beta)
        rest = (alpha + beta) * own - beta * entropy
        return lambda h: (alpha + beta) * kl(h, p.head, target, p.labels) + rest

    def liger_cached(p: Problem, alpha: Any, beta: Any) -> Step:
        return cached(p, alpha, beta, liger_ce(p))

    def liger_ce_alone(p: Problem, alpha: Any, beta: Any) -> Step:
        ce = liger_ce(p)
        return lambda h: alpha * ce(h)

    def orda(p: Problem, alpha: Any, beta: Any) -> Step:
        from orda_kernel import TiedTeacher, distillation_loss

        weights = dict(student_ce_weight=float(alpha), teacher_ce_weight=0.0, kl_weight=float(beta))
        weights["backend"] = "auto" if p.head.is_cuda else "torch"
        return lambda h: (
            distillation_loss(
                h, p.head, p.labels, TiedTeacher(hidden=p.teacher_hidden), **weights
            ).loss
        )

    def unsloth(p: Problem, alpha: Any, beta: Any) -> Step:
        lib = unsloth_file()

        def step(h: Tensor) -> Tensor:
            ce = lib.fused_linear_cross_entropy(h, p.head, None, p.labels, divisor=len(h))
            return alpha * ce + beta * lib.fused_linear_jsd(
                h, p.head, p.teacher_hidden, p.head, beta=0.0
            )

        return step

    def cut(p: Problem, alpha: Any, beta: Any) -> Step:
        from cut_cross_entropy import linear_cross_entropy

        impl = "cce" if p.head.is_cuda else "torch_compile"
        return lambda h: alpha * linear_cross_entropy(h, p.head, p.labels, impl=impl)

    def fla(p: Problem, alpha: Any, beta: Any) -> Step:
        from fla.modules.fused_kl_div import fused_kl_div_loss
        from fla.modules.fused_linear_cross_entropy import FusedLinearCrossEntropyLoss

        ce = FusedLinearCrossEntropyLoss()
        return lambda h: (
            alpha * ce(h, p.labels, p.head)
            + beta * fused_kl_div_loss(h, p.teacher_hidden, p.head, p.head)
        )

    def gpu(p: Problem) -> str | None:
        return (
            None
            if p.head.is_cuda
            else "Triton kernels need a GPU: the interpreter on a CPU times nothing."
        )

    def kldiv(p: Problem) -> str | None:
        """Its file is looked for: importing Liger would need triton and transformers."""
        found = importlib.util.find_spec("liger_kernel")
        folders = found.submodule_search_locations if found else ()
        if not any((Path(f) / "transformers/fused_linear_kl_div.py").is_file() for f in folders):
            return "This liger-kernel has no LigerFusedLinearKLDivLoss: 0.8.5 has it."
        return gpu(p)

    def needs(*names: str) -> Callable[[Problem], str | None]:
        absent = lambda: [name for name in names if importlib.util.find_spec(name) is None]
        return lambda p: f"It imports {absent()[0]}, which is not installed." if absent() else None

    cuda = torch.cuda.is_available()
    return [
        Contender(
            "Liger chunked JSD", "liger-kernel", liger_chunked, skips_dw=False, compiles=True
        ),
        Contender(
            "Liger JSD + FLCE",
            "liger-kernel",
            liger_jsd,
            how=TWO_CALLS,
            fp32_logits=True,
            missing=gpu,
        ),
        Contender(
            "Liger KLDiv + FLCE",
            "liger-kernel",
            liger_kldiv,
            how=TWO_CALLS,
            keeps="probabilities",
            missing=kldiv,
        ),
        Contender(
            "Liger KLDiv (mixed target)",
            "liger-kernel",
            liger_mixed,
            how="one call on the mixed target",
            keeps="probabilities",
            missing=kldiv,
        ),
        Contender(
            "KL cache trick (Liger's CE)",
            "liger-kernel",
            liger_cached,
            how="CE and a product",
            keeps="one [N, D]",
            missing=gpu,
        ),
        Contender("Liger FLCE", "liger-kernel", liger_ce_alone, terms="CE", keeps="-", missing=gpu),
        Contender("orda", "orda-kernel", orda, compiles=cuda),
        Contender(
            "unsloth_zoo CE + JSD",
            "unsloth_zoo",
            unsloth,
            how=TWO_CALLS,
            fp32_logits=True,
            compiles=cuda,
        ),
        Contender(
            "Cut Cross-Entropy",
            "cut-cross-entropy",
            cut,
            terms="CE",
            keeps="-",
            skips_dw=not cuda,
            compiles=True,
            missing=needs("triton"),
        ),
        Contender("fla KL + CE", "flash-linear-attention", fla, how=TWO_CALLS, missing=gpu),
    ]


def unsloth_file() -> Any:
    """The wheel's one file by path: importing the package would check for a GPU and import its
    whole world."""
    name = "unsloth_zoo_fused_linear"
    if name not in sys.modules:
        package = importlib.util.find_spec("unsloth_zoo").submodule_search_locations[0]
        spec = importlib.util.spec_from_file_location(
            name, Path(package) / "fused_losses" / "fused_linear.py"
        )
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
