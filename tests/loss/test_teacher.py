"""A teacher's cache: the head that it belongs to is known by its numbers, and a damaged file is
told, whatever the damage."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
import struct
import tracemalloc

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastsiu import TeacherCache, fused_dmk_ce
from fastsiu.loss import head as heads
from fastsiu.loss import teacher_file as module
from fastsiu.loss.head import shares, stamp

torch.set_num_threads(1)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
V, D, N = 41, 6, 4


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


class Case:
    """A head, its bias, a student and its teacher; one deepcopy or pickle keeps them together."""

    def __init__(self, V=V, D=D, dtype=torch.float32, bias=True, trains=False):
        self.h, self.y = rand(N, D, dtype=dtype), torch.arange(N)
        self.W = nn.Parameter(rand(V, D, seed=1, dtype=dtype), requires_grad=trains)
        self.b = nn.Parameter(rand(V, seed=2, dtype=dtype), requires_grad=trains) if bias else None
        self.teacher = TeacherCache.from_hidden(
            rand(N, D, seed=3, dtype=dtype), self.W, head_bias=self.b
        )

    def loss(self, teacher=None, **options):
        return fused_dmk_ce(
            self.h, self.W, self.y, self.teacher if teacher is None else teacher, **options
        )


def saved(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "itself": lambda x: x,
    "deepcopy": copy.deepcopy,
    "torch.save": saved,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "copy of a copy": lambda x: pickle.loads(pickle.dumps(copy.deepcopy(x))),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_valid(how, dtype):
    c = Case(dtype=dtype)
    with torch.no_grad():
        c.W.mul_(2.0), c.W.mul_(0.5)  # a counter that a copy does not have
    expected = c.loss()
    again = COPIES[how](c.teacher)
    assert not again.is_stale
    torch.testing.assert_close(c.loss(again), expected, rtol=1e-4, atol=1e-5)
    together = COPIES[how](c)
    for _ in range(3):
        assert torch.equal(together.loss(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_write_of_the_same_numbers_is_none(dtype):
    c = Case(dtype=dtype)
    expected = c.loss()
    with torch.no_grad():
        c.W.copy_(c.W.clone()), c.b.copy_(c.b.clone())
    assert torch.equal(c.loss(), expected) and not c.teacher.is_stale
    c.W.data, c.b.data = c.W.data.clone(), c.b.data.clone()
    assert torch.equal(c.loss(head_bias=c.b), expected)
    for moved in (
        c.teacher.to("cpu"),
        c.teacher.to("cpu", c.W, c.b),
        c.teacher.to("cpu", c.W.data.clone()),
        copy.copy(c.teacher),
    ):
        torch.testing.assert_close(c.loss(moved), expected, rtol=1e-4, atol=1e-5)


def change(f):
    def apply(c):
        with torch.no_grad():
            f(c)

    return apply


def bump(x, *at):
    """The smallest change that there is."""
    bits = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    bits[at] += 1


def swap(x, i, j):
    x[[i, j]] = x[[j, i]]


CHANGES = {
    "all rows": lambda c: c.W.add_(1),
    "one row": lambda c: c.W[7].add_(1),
    "one number": lambda c: c.W[V - 1, D - 1].mul_(1.5),
    "one bit": lambda c: bump(c.W.data, 3, 2),
    "two rows change places": lambda c: swap(c.W.data, 0, 5),
    "two columns change places": lambda c: swap(c.W.data.T, 0, 5),
    "a sign": lambda c: c.W.data[3].neg_(),
    "all signs": lambda c: c.W.data.neg_(),
    "data: all rows": lambda c: c.W.data.copy_(rand(V, D, seed=9)),
    "data: one row": lambda c: c.W.data[V - 1].add_(1),
    "data: another tensor": lambda c: setattr(c.W, "data", c.W.data * 2),
    "data: another tensor, one row": lambda c: setattr(
        c.W, "data", torch.cat([c.W.data[:-1], c.W.data[:1]])
    ),
    "bias": lambda c: c.b.add_(1),
    "bias: one number": lambda c: c.b[0].add_(1),
    "bias, data": lambda c: c.b.data.mul_(2),
    "bias, data: one bit": lambda c: bump(c.b.data, V - 1),
    "bias, data: another tensor": lambda c: setattr(c.b, "data", c.b.data + 1),
    "a row to its bias": lambda c: swap(c.b.data, 1, 2),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_head_is_told_at_the_next_call(what, how, dtype):
    c = COPIES[how](Case(dtype=dtype))
    part = c.teacher[:]
    c.loss(), c.loss(part)
    change(CHANGES[what])(c)
    for teacher in (c.teacher, part, c.teacher[[3, 2, 1, 0]]):
        with pytest.raises(ValueError, match="has changed since"):
            c.loss(teacher)
        assert teacher.is_stale


@pytest.mark.parametrize("how", COPIES)
def test_a_head_that_changes_while_nobody_looks(how):
    """Between the making and the first call; and a copy made of a changed head is no valid copy."""
    c = Case()
    c.W.data[2] += 1
    changed = COPIES[how](c)
    for teacher in (c.teacher, changed.teacher):
        assert teacher.is_stale
        with pytest.raises(ValueError, match="has changed since"):
            c.loss(teacher)


def test_a_change_that_is_taken_back_is_none():
    c = Case()
    expected = c.loss()
    c.W.data.neg_()
    with pytest.raises(ValueError, match="has changed since"):
        c.loss()
    c.W.data.neg_()
    assert torch.equal(c.loss(), expected)


def test_another_head_in_a_move_is_told():
    c = Case()
    other = rand(V, D, seed=8)
    with pytest.raises(ValueError, match="has changed since"):
        c.loss(c.teacher.to("cpu", other))
    with pytest.raises(ValueError, match="has changed since"):
        c.loss(c.teacher.to("cpu", c.W.double()))
    c.loss()  # the cache itself is as it was


def test_numpy_and_inference_tensors_leave_no_other_trace():
    W = rand(V, D, seed=1)
    c = Case()
    teacher = TeacherCache.from_hidden(c.h, W)
    fused_dmk_ce(c.h, W, c.y, teacher)
    W.numpy()[5, 1] = 7.0
    with pytest.raises(ValueError, match="has changed since"):
        fused_dmk_ce(c.h, W, c.y, teacher)
    with torch.inference_mode():
        W = rand(V, D, seed=1)
        teacher = TeacherCache.from_hidden(c.h, W)
        fused_dmk_ce(c.h, W, c.y, teacher)
        W[5, 1] = 7.0
        with pytest.raises(ValueError, match="has changed since"):
            fused_dmk_ce(c.h, W, c.y, teacher)


BIG = dict(V=1024, D=256)  # 4 shares


def calls_until_told(c, most):
    for n in range(1, most + 1):
        try:
            c.loss()
        except ValueError as error:
            assert "has changed since" in str(error)
            return n
    return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_a_large_head_each_call_reads_a_share(dtype):
    """A row that was written to behind torch's back is told when its turn comes, and not later than
    promised."""
    K = shares(**BIG)
    assert K == 4 and shares(32_000, 2048) == 256 and shares(7, 3) == 1 and shares(3, 10**6) == 3
    waited = []
    for row in range(2 * K):
        c = Case(**BIG, dtype=dtype, bias=row % 2 == 0)
        c.loss()
        c.W.data[row, 3] += 1
        waited.append(calls_until_told(c, K))
        assert c.teacher.is_stale
    assert set(waited) == set(range(1, K + 1))
    for rows in (slice(None), slice(500, 500 + K)):
        c = Case(**BIG, dtype=dtype)
        c.loss()
        c.W.data[rows] *= 2
        assert calls_until_told(c, K) == 1
    c = Case(**BIG, dtype=dtype)
    c.loss()
    with torch.no_grad():
        c.W[77] += 1  # torch counts this
    for _ in range(K + 1):
        assert calls_until_told(c, 1) == 1  # and it stays told
    # of the head as it is now
    other = TeacherCache.from_hidden(c.teacher.hidden, c.W, head_bias=c.b)
    for _ in range(K + 1):
        c.loss(other)
        assert calls_until_told(c, 1) == 1
    c = Case(**BIG, dtype=dtype)
    c.loss()
    c.b.data[77] += 1
    assert calls_until_told(c, K) <= K


class Watch(TorchDispatchMode):
    """The numbers that operations make."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func._schema.name.startswith(
            ("aten::view", "aten::slice", "aten::detach")
        ):
            self.sizes.append(out.numel())
        return out


def test_a_call_reads_a_share_and_a_new_memory_is_read_once():
    c, K = Case(**BIG), shares(**BIG)
    size = BIG["V"] * BIG["D"]
    c.loss()
    with Watch() as usual:
        assert not c.teacher.head_stamp.differs(c.W, c.b)
    assert sum(usual.sizes) <= 1.1 * size / K
    c.W.data = c.W.data.clone()
    with Watch() as first:
        assert not c.teacher.head_stamp.differs(c.W, c.b)
    assert sum(first.sizes) >= size and max(first.sizes) <= 2**16  # a piece at a time
    with Watch() as again:
        assert not c.teacher[1:2].head_stamp.differs(c.W, c.b)  # the rows of a cache look together
    assert sum(again.sizes) <= 1.1 * size / K


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_digest_is_of_the_numbers_alone(dtype, monkeypatch):
    """Not of layout, of the size of pieces, or of the number of shares, which may change with a
    release."""
    W, b = rand(300, 31, seed=1, dtype=dtype), rand(300, seed=2, dtype=dtype)
    wide, apart = torch.zeros(301, 64, dtype=dtype), torch.zeros(600, dtype=dtype)
    wide[1:, 1:62:2], apart[::2] = W, b
    expected, before = stamp(W, b).words(), W.clone()
    for layout in (W.T.contiguous().T, wide[1:, 1:62:2], nn.Parameter(W)):
        assert stamp(layout, apart[::2]).words() == expected
    for small, count in ((1, 7), (1, 256), (10**9, 256)):
        monkeypatch.setattr(heads, "SMALL", small)
        monkeypatch.setattr(heads, "SHARES", count)
        assert stamp(W, b).words() == expected
        made = stamp(W, b)
        assert not any(made.differs(W, b) for _ in range(2 * len(made.sums)))
    assert torch.equal(W, before)
    assert stamp(W, None).words() != expected


def test_the_digest_is_written_down():
    """What one release saved the next one reads: the same numbers give the same digest for ever."""
    W = torch.arange(12, dtype=torch.float32).view(4, 3)
    assert stamp(W, None).words() == ("[4, 3]", "torch.float32", "-3290818349566525440")
    assert stamp(W.to(torch.bfloat16), torch.ones(4)).words() == (
        "[4, 3]",
        "torch.bfloat16",
        "8317214792140293568",
    )


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_a_head_that_trains_with_its_teachers_frozen_copy(backend):
    c = Case(trains=True)
    frozen = TeacherCache.from_hidden(
        c.teacher.hidden, c.W.detach().clone(), head_bias=c.b.detach().clone()
    )
    optimiser, losses = torch.optim.SGD([c.W, c.b], 0.1), []
    for _ in range(4):
        loss = c.loss(frozen, head_bias=c.b, backend=backend)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and not frozen.is_stale
    with pytest.raises(ValueError, match="frozen copy"):
        c.loss(backend=backend)


def test_the_teachers_bias_gets_no_gradient_of_its_own():
    """The cache refers to the model's own, so that what is put under its .data is seen."""
    c = Case(trains=True)
    assert c.teacher.head_bias is c.b and c.teacher.head_weight is c.W
    c.h.requires_grad_()
    for backend in ("reference", "tiled"):
        c.loss(backend=backend).backward()
        assert c.b.grad is None and c.h.grad is not None


def test_a_head_with_a_graph_is_kept_without_it():
    A = rand(D, V).requires_grad_()
    teacher = TeacherCache.from_hidden(rand(N, D), A.T, head_bias=A.sum(0))
    assert teacher.head_weight.grad_fn is None and teacher.head_weight.data_ptr() == A.data_ptr()
    assert not copy.deepcopy(teacher).is_stale and teacher.head_bias.grad_fn is None


def test_the_broadcast_of_ddp_changes_nothing(one_process):
    body, head = nn.Linear(D, D), nn.Linear(D, V)
    head.requires_grad_(False)
    x, y = rand(N, D), torch.arange(N)
    with torch.no_grad():
        teacher = TeacherCache.from_hidden(body(x), head.weight, head_bias=head.bias)
    before = head.weight._version
    with one_process():
        wrapped = nn.parallel.DistributedDataParallel(nn.ModuleDict({"body": body, "head": head}))
    assert head.weight._version > before, (
        "this torch broadcasts otherwise: then the test shows nothing"
    )
    assert fused_dmk_ce(wrapped.module["body"](x), head.weight, y, teacher, alpha=0.0) == 0


@pytest.mark.parametrize("how", ["itself", "deepcopy", "pickle"])
def test_a_compiled_call_takes_a_copy(how):
    c = Case()
    teacher = COPIES[how](c.teacher)
    torch._dynamo.reset()
    f = lambda h: fused_dmk_ce(h, c.W, c.y, teacher)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(c.h), f(c.h))


def test_fake_tensors_have_no_numbers_to_compare():
    from torch._subclasses.fake_tensor import FakeTensorMode

    c = Case(bias=False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        made = fused_dmk_ce(
            mode.from_tensor(c.h), c.W, mode.from_tensor(c.y), c.teacher, backend="tiled"
        )
    assert made.shape == ()
    c.loss()


# --------------------------------------------------------------------------------------------------
# damaged files


def cached(path, version="3", **options):
    """A file, its head, and the cache in it."""
    keep = torch.arange(V) % 5 > 0
    W = rand(V, D, seed=1)
    options = dict(vocab_keep=keep, head_bias=rand(V, seed=2), temperature=2.0) | options
    teacher = TeacherCache.from_hidden(rand(N, D, seed=3), W, **options)
    teacher.save(path)
    if version == "2":
        older(path)
    return path, W, teacher


def older(path):
    """The file as the version before wrote it."""
    rewrite(
        path,
        lambda tensors, metadata: [
            metadata.pop(k) for k in ("digest", "head_dtype", "head_digest")
        ],
    )
    rewrite(path, lambda tensors, metadata: metadata.update(version="2"))


def rewrite(path, edit):
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {k: file.get_tensor(k).clone() for k in file.keys()}
    edit(tensors, metadata)
    save_file(tensors, path, metadata={k: v for k, v in metadata.items() if v is not None})


def told(path, W):
    """Loads, or raises ValueError with one sentence; True where it loads."""
    try:
        return TeacherCache.load(path, head_weight=W)
    except ValueError as error:
        text = str(error)
        assert (
            text.startswith(str(path))
            and text.endswith(".")
            and "\n" not in text
            and len(text) < len(str(path)) + 200
        )
        assert text.isprintable()
        return None


def equal(a, b):
    names = (*module.STATISTICS, "vocab_keep", "head_bias")
    same = lambda x, y: x is y is None or torch.equal(x, y)
    return all(same(getattr(a, k), getattr(b, k)) for k in names) and all(
        getattr(a, k) == getattr(b, k) for k in module.OPTIONS
    )


def test_every_flipped_byte_and_every_cut_is_told(tmp_path):
    """Of a file that is damaged something is told, or what is loaded is what was saved."""
    path, W, teacher = cached(tmp_path / "t")
    data, rng, loaded = path.read_bytes(), random.Random(0), 0
    assert equal(told(path, W), teacher)
    damaged = [data[:n] for n in sorted(rng.sample(range(len(data)), 60))] + [
        data + b"\0",
        data + data,
        data[1:],
    ]
    for at in rng.sample(range(len(data)), 300):
        damaged.append(
            data[:at]
            + bytes([data[at] ^ rng.choice([1, 0x80, 0xFF, 1 << rng.randrange(8)])])
            + data[at + 1 :]
        )
    for made in damaged:
        path.write_bytes(made)
        again = told(path, W)
        loaded += again is not None
        assert again is None or equal(again, teacher)
    assert loaded <= 3  # padding of the header


HEAD, OPTIONS = (
    json.dumps([V, D]),
    dict(renormalize=False, logit_scale=1.0, logit_softcap=None, temperature=2.0),
)
WORDS = (
    "",
    "null",
    "7",
    "[]",
    "{}",
    "nan",
    '"x"',
    "[" * 100_000,
    '{"a":' * 50_000,
    "9" * 5000,
    "[1e999, 6]",
    "\0",
    "\ud7ff",
    "[true, 6]",
)
VALUES = (None, "1", True, [1.0], {}, 0, -1.0, float("nan"), float("inf"), 10**400, 1e-400, 1e200)


def texts():
    for key in ("format", "version", "head", "options"):
        yield f"no {key}", {key: None}
        for text in WORDS:
            yield f"{key} {text[:9]!r}", {key: text}
    for name in OPTIONS:
        yield f"no {name}", {"options": json.dumps({k: v for k, v in OPTIONS.items() if k != name})}
        for value in VALUES:
            if (name, value) != ("logit_softcap", None) and (name, value) != ("renormalize", True):
                yield f"{name} {value!r:.9}", {"options": json.dumps(OPTIONS | {name: value})}
    yield "empty digest", {"digest": ""}
    yield "another option", {"options": json.dumps(OPTIONS | {"head_weight": 1})}
    yield "head of another shape", {"head": json.dumps([V + 1, D])}
    yield "version 1", {"version": "1"}
    yield "version 4", {"version": "4"}


@pytest.mark.parametrize("key", ["digest", "head_dtype", "head_digest"])
def test_a_digest_that_is_gone_is_told(key, tmp_path):
    path, W, _ = cached(tmp_path / "t")
    rewrite(path, lambda tensors, metadata: metadata.pop(key))
    assert told(path, W) is None


@pytest.mark.parametrize("version", ["2", "3"])
def test_metadata_that_is_wrong_is_told(version, tmp_path):
    path, W, teacher = cached(tmp_path / "t", version)
    whole, seen = path.read_bytes(), 0
    assert equal(told(path, W), teacher)
    for name, wrong in texts():
        path.write_bytes(whole)
        rewrite(path, lambda tensors, metadata, wrong=wrong: metadata.update(wrong))
        assert told(path, W) is None, name
        seen += 1
    assert seen > 90


def put(name, at, value):
    return lambda t: t[name].__setitem__(at, value)


def become(name, f):
    return lambda t: t.__setitem__(name, f(t[name]))


def tensors():
    for name in module.STATISTICS:
        yield f"no {name}", lambda t, name=name: t.pop(name)
        yield f"{name} with a row more", become(name, lambda x: torch.cat([x, x[:1]]))
        yield f"{name} flat", become(name, lambda x: x.reshape(-1)[:3].clone())
        yield f"{name} of no dimension", become(name, lambda x: x.reshape(-1)[0].clone())
        yield f"{name} as int32", become(name, lambda x: x.to(torch.int32))
        yield f"{name} as bool", become(name, lambda x: x > 0)
        if name != "hidden":  # of any float
            yield f"{name} as another float", become(name, lambda x: x.to(torch.float16))
        yield f"{name} in 8 bits", become(name, lambda x: x.float().to(torch.float8_e4m3fn))
        yield f"{name} complex", become(name, lambda x: x.to(torch.complex64))
        if name != "top":
            for value in (float("nan"), float("inf"), -float("inf")):
                yield f"{name} {value}", put(name, (1,), value)
    for value in (-1, V, 2**62, -(2**63)):
        yield f"top {value}", put("top", (2, 1), value)
    yield "top twice", lambda t: t["top"][0].__setitem__(1, int(t["top"][0, 0]))
    yield "top that is not kept", put("top", (0, 0), 5)
    yield "more mass than there is", put("p_top", (0, 0), 1.5)
    yield "mass below 0", put("p_top", (0, 0), -0.1)
    yield "C above 1", put("C", (0,), 1.5)
    yield "C below 0", put("C", (0,), -0.5)
    yield "another lse", lambda t: t["lse"].add_(1)
    yield "another C", lambda t: t["C"].mul_(0.5)
    yield "another m", lambda t: t["m_rest"].add_(1)
    yield "another hidden", lambda t: t["hidden"].add_(1)
    yield "another tensor", lambda t: t.__setitem__("more", torch.ones(1))
    yield "head_weight", lambda t: t.__setitem__("head_weight", rand(V, D))
    yield "no mask", lambda t: t.pop("vocab_keep")
    yield "nothing kept", lambda t: t["vocab_keep"].zero_()
    yield "mask of another length", become("vocab_keep", lambda x: x[1:].clone())
    yield "mask of two dimensions", become("vocab_keep", lambda x: x[None].clone())
    yield "mask as bytes", become("vocab_keep", lambda x: x.to(torch.uint8))
    yield "no bias", lambda t: t.pop("head_bias")
    yield "bias of another length", become("head_bias", lambda x: x[1:].clone())
    yield "bias as integers", become("head_bias", lambda x: x.long())
    yield "another bias", become("head_bias", lambda x: -x)


@pytest.mark.parametrize("version", ["2", "3"])
def test_tensors_that_are_wrong_are_told(version, tmp_path):
    """Of version 2, which has no digest, too: what is impossible, and what does not come out
    again."""
    path, W, teacher = cached(tmp_path / "t", version)
    whole, seen = path.read_bytes(), 0
    for name, wrong in tensors():
        path.write_bytes(whole)
        rewrite(path, lambda tensors, metadata, wrong=wrong: wrong(tensors))
        assert told(path, W) is None, name
        seen += 1
    assert seen > 80


@pytest.mark.parametrize("size", [2**41, 2**62, 2**63, 2**64 - 1])
def test_an_empty_tensor_of_any_size_is_told(size, tmp_path):
    """No bytes of the file, and no shape to torch."""
    path, W, teacher = cached(tmp_path / "t")
    teacher[:0].save(path)
    older(path)
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    for name in ("hidden", "m_rest", "top", "C"):
        header = json.loads(data[8:end])
        header[name]["shape"][-1:] = [0, size][-1 if len(header[name]["shape"]) > 1 else -2 :]
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[end:])
        assert told(path, W) is None


def test_a_bool_that_is_neither_is_told(tmp_path):
    path, W, _ = cached(tmp_path / "t", "2")
    data = bytearray(path.read_bytes())
    start, _ = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["vocab_keep"][
        "data_offsets"
    ]
    data[8 + struct.unpack("<Q", data[:8])[0] + start + 3] = 2
    path.write_bytes(data)
    assert told(path, W) is None


@pytest.mark.parametrize("version", ["2", "3"])
@pytest.mark.parametrize(
    "options",
    [dict(), dict(renormalize=True), dict(vocab_keep=None), dict(head_bias=None, logit_softcap=9)],
)
def test_both_versions_are_read(version, options, tmp_path):
    path, W, teacher = cached(tmp_path / "t", version, **options)
    assert equal(TeacherCache.load(path, head_weight=W), teacher)
    empty, more = teacher[:0], teacher[[0, 0, 1, 2, 3] * 5]
    for part in (empty, more):
        part.save(path)
        if version == "2":
            older(path)
        assert equal(TeacherCache.load(path, head_weight=W), part)


def test_another_head_is_told(tmp_path):
    path, W, _ = cached(tmp_path / "t")
    bumped = W.clone()
    bump(bumped, 7, 1)
    for other in (
        bumped,
        W.flip(0).double(),
        W.flip(1).double(),
        W.flip(0),
        W.flip(1),
        -W,
        W[1:],
        W[:, 1:],
    ):
        with pytest.raises(ValueError, match="another head"):
            TeacherCache.load(path, head_weight=other)
    for other in (W.long(), W[0], None, W.tolist(), W.to("meta")):
        with pytest.raises(ValueError, match=r"head_weight .*\.$"):
            TeacherCache.load(path, head_weight=other)
    W.data[3] += 1  # what is saved is the head that the cache was built with, whatever became of it
    cached(path)[2].to("cpu", W).save(path)
    with pytest.raises(ValueError, match="another head"):
        TeacherCache.load(path, head_weight=W)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_head_in_another_dtype_is_the_head(dtype, tmp_path):
    """A cache made beside a model in 16 bit serves one that is trained in fp32, and the other way
    round."""
    path, W, teacher = cached(tmp_path / "t")
    loaded = TeacherCache.load(path, head_weight=W.to(dtype))
    assert torch.equal(loaded.lse, teacher.lse) and not loaded.is_stale


def test_rows_that_are_not_finite_come_back(tmp_path):
    """Their weight is 0 in the loss; in a file that is whole they are no damage."""
    hidden, W = rand(N, D), rand(V, D, seed=1)
    hidden[1, 2], hidden[3] = float("nan"), float("inf")
    teacher = TeacherCache.from_hidden(hidden, W)
    teacher.save(tmp_path / "t")
    again = TeacherCache.load(tmp_path / "t", head_weight=W)
    assert torch.equal(again.hidden.nan_to_num(7.0), hidden.nan_to_num(7.0)) and torch.equal(
        again.lse[::2], teacher.lse[::2]
    )


def test_a_cache_does_not_live_in_its_file(tmp_path):
    path, W, teacher = cached(tmp_path / "t")
    again, size = TeacherCache.load(path, head_weight=W), path.stat().st_size
    with open(path, "r+b") as file:
        file.write(bytes(size))
    assert equal(again, teacher)


def test_what_is_no_file(tmp_path):
    W = rand(V, D)
    for missing in (tmp_path / "none", tmp_path / "none" / "t", "", "a\0b"):
        with pytest.raises(FileNotFoundError):
            TeacherCache.load(missing, head_weight=W)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(2**36)
    for size in (0, 1, 10**8, 2**63, 2**64 - 1):
        (tmp_path / f"header of {size}").write_bytes(struct.pack("<Q", size) + b"{}")
    tracemalloc.start()
    for path in (tmp_path, *sorted(tmp_path.iterdir()), "/dev/zero"):
        assert told(path, W) is None
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_numbers_of_8_bits_are_refused_where_the_cache_is_made():
    """And not by an error of torch's in the loss."""
    c, small = Case(), lambda x: x.to(torch.float8_e5m2)
    for name in ("hidden", "head_weight", "head_bias"):
        given = dict(hidden=c.h, head_weight=c.W.detach(), head_bias=c.b.detach())
        with pytest.raises(
            ValueError, match=f"^{name} is torch.float8_e5m2: convert it to .*float\\.$"
        ):
            TeacherCache.from_hidden(**given | {name: small(given[name])})


def test_huge_numbers_are_no_option():
    c = Case()
    large = (10**400, 1e308, 1e101, 1e-101, 5e-324)
    for options in (
        {name: x} for name in ("temperature", "logit_scale", "logit_softcap") for x in large
    ):
        with pytest.raises(
            ValueError, match=r"it must be a finite number above 0, from 1e-100 to 1e\+100\.$"
        ):
            TeacherCache.from_hidden(c.h, c.W, **options)
    for options in (
        dict(alpha=10**400),
        dict(beta=10**400),
        dict(kl_denominator=10**400),
        dict(ce_denominator="1"),
    ):
        with pytest.raises(ValueError, match=r"it must be a finite number of at least 0\.$"):
            c.loss(**options)
    with pytest.raises(ValueError, match="alpha must be one number"):
        c.loss(alpha=torch.ones(2))
