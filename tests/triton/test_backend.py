"""`fused_dmk_ce(backend="triton")`, as a user calls it: in the interpreter (TRITON_INTERPRET=1) or
on a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from fastsiu import TeacherCache, fused_dmk_ce, why_not
from fastsiu.loss.backend import chosen

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float32 if DEVICE == "cuda" else torch.float64
h, W, ht = (torch.randn(*s, generator=torch.Generator().manual_seed(i), dtype=DTYPE).to(DEVICE)
            for i, s in enumerate([(5, 8), (61, 8), (5, 8)]))  # fmt: skip
y = torch.tensor([3, 60, -100, 0, 7], device=DEVICE)
pytestmark = pytest.mark.skipif(
    why_not("triton", h, W) is not None, reason=why_not("triton", h, W) or ""
)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.skipif(DEVICE == "cuda", reason="fp64 is the interpreter's")
def test_gradcheck(reduction):
    keep = torch.arange(61) % 5 != 0
    teacher = TeacherCache.from_hidden(ht[:2], W, vocab_keep=keep, renormalize=True)
    f = lambda x: fused_dmk_ce(x, W, y[:2], teacher, reduction=reduction, backend="triton")
    assert torch.autograd.gradcheck(f, h[:2].clone().requires_grad_())


@pytest.mark.parametrize(
    "masked, renormalize, tau, bias",
    [
        (False, False, 1.0, False),
        (True, False, 1.0, True),
        (True, True, 1.0, True),
        (True, True, 2.0, False),
    ],
)
def test_it_computes_the_reference(masked, renormalize, tau, bias):
    keep = (torch.arange(61) % 5 != 0).to(DEVICE) if masked else None
    b = (
        torch.randn(61, generator=torch.Generator().manual_seed(9), dtype=DTYPE).to(DEVICE)
        if bias
        else None
    )
    teacher = TeacherCache.from_hidden(
        ht,
        W,
        vocab_keep=keep,
        renormalize=renormalize,
        temperature=tau,
        head_bias=b,
        logit_scale=0.7,
    )
    made = {}
    for backend in ("reference", "triton"):
        x = h.clone().requires_grad_()
        loss, parts = fused_dmk_ce(
            x, W, y, teacher, head_bias=b, backend=backend, return_parts=True
        )
        loss.backward()
        made[backend] = (loss.detach(), x.grad, *parts)
    for ours, theirs in zip(made["triton"], made["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(DEVICE == "cuda", reason="the choice on a machine without a GPU")
def test_auto_does_not_take_the_interpreter():
    assert chosen(h, W).backend != "triton" and chosen(h, W, "triton").why == "asked for"


@pytest.mark.parametrize("trains", [False, True])
def test_one_graph_under_torch_compile(trains):
    teacher = TeacherCache.from_hidden(ht, W)
    f = lambda x, head: fused_dmk_ce(x, head, y, teacher, backend="triton")
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    made = []
    for g in (f, compiled):
        x, head = h.clone().requires_grad_(), W.clone().requires_grad_() if trains else W
        loss = g(x, head)
        loss.backward()
        made.append((loss.detach(), x.grad, head.grad))
    for ours, theirs in zip(*made, strict=True):
        assert ours is theirs or torch.equal(ours, theirs)
