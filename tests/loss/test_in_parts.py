"""A head in parts: loss and gradients of 1, 2 and 4 ranks against the fp64 truth of one process,
the bytes that they send, and what they say of wrong arguments."""

from __future__ import annotations

import head_ranks as ranks
import pytest
import torch
from head_ranks import CASES, F32, F64, D, N

torch.set_num_threads(1)
SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the ranks of each size found."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks.start(folder, *SIZES)
    return {size: ranks.results(folder, size) for size in SIZES}


@pytest.fixture(scope="module")
def truth():
    return {name: ranks.compute(case, F64, backend="reference") for name, case in CASES.items()}


def whole(everyone, dtype, name):
    """One case of all ranks as one process would have it: the head's gradients in one piece."""
    mine = [one[dtype][name] for one in everyone]
    for key in mine[0].keys() - {"W", "b"}:
        assert all(torch.equal(one[key], mine[0][key]) for one in mine), key
    pieces = {key: torch.cat([one[key] for one in mine]) for key in mine[0].keys() & {"W", "b"}}
    return mine[0] | pieces


@pytest.mark.parametrize("size", SIZES)
def test_fp64_is_the_reference(size, found, truth):
    for name, expected in truth.items():
        got = whole(found[size], "fp64", name)
        assert got.keys() == expected.keys()
        for key, x in expected.items():
            # the parts are delivered in fp32
            tolerance = 2e-6 if key in ("ce", "kl", "entropy") else 1e-10
            torch.testing.assert_close(
                got[key],
                x,
                rtol=tolerance,
                atol=tolerance,
                msg=lambda m, n=name, k=key: f"{n} {k}: {m}",
            )


def error(got, expected):
    return (got.double() - expected).norm() / expected.norm().clamp_min(1e-12)


@pytest.mark.parametrize("size", [2, 4])
def test_fp32_is_as_accurate_as_one_process(size, found, truth):
    """Each number's error is at most twice that of one process, or of the order of fp32."""
    for name, case in CASES.items():
        one = ranks.compute(case, F32, backend="tiled")
        got = whole(found[size], "fp32", name)
        for key, x in truth[name].items():
            bound = 2 * error(one[key], x) + 2**-22
            assert error(got[key], x) <= bound, (name, key, error(got[key], x), bound)


def test_a_row_that_has_not_moved_is_exactly_zero(found):
    for name, case in CASES.items():
        if case["head"] in ("frozen", "same trains") and "keep" not in case:
            assert found[4][0]["fp32"][name]["kl"][2] == 0, name


def message(rows, columns, sums, entropy, product, element=4):
    """Bytes of one step on one rank, as docs/a-head-in-parts.md has them."""
    return rows * (element * columns + sums * (element + 8 * (1 + entropy)) + element * D * product)


MEETING = 8 * 7


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_are_those_of_the_formula(size, found):
    k = 16
    for one in found[size]:
        sent = one["bytes"]
        expected = {"no teacher": MEETING + message(N, 1, 1, False, 1)}
        for name, sums in {"frozen": 1, "renormalised": 2, "tau": 2}.items():
            for graph in (False, True):
                for parts in (False, True):
                    expected[f"{name} trains=False {graph=} {parts=}"] = MEETING + message(
                        N, 2 * (k + 1), sums, parts, graph
                    )
        for name, sums in {"frozen": 1, "renormalised": 2, "tau": 2, "softcap": 1}.items():
            for trains in (False, True):
                for graph in (False, True):
                    for parts in (False, True):
                        if not trains and name != "softcap":
                            continue
                        expected[f"{name} {trains=} {graph=} {parts=}"] = (
                            MEETING + message(N, 1, sums, parts, graph) + N * 16
                        )
        for name, sums in {"frozen": 1, "renormalised": 1, "tau": 1, "softcap": 1}.items():
            # twice the k candidates, their logits, m
            expected[f"cache {name}"] = MEETING + N * (12 * k + 4 * k + 12 * sums + 4 * D)
        assert {key: value for key, (value, _) in sent.items()} == expected
        assert max(calls for _, calls in sent.values()) <= 7
