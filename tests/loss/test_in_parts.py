"""A head in parts: loss and gradients of 1, 2 and 4 ranks against the fp64 truth of one process,
the bytes that they send, and what they say of wrong arguments."""

from __future__ import annotations

import itertools

import head_ranks as ranks
import pytest
import torch
from head_ranks import CASES, F32, F64, D, N, V

from fastsiu import TeacherCache, fused_dmk_ce, why_not

torch.set_num_threads(1)
pytestmark = pytest.mark.slow  # the ranks take half a minute
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


MEETING = 8 * 7  # what each rank says of its arguments
K = 16  # the teacher's top columns


def message(logits, sums, entropies, gradient, general=False):
    """Bytes of one step on one rank in fp32, as docs/a-head-in-parts.md has them."""
    row = 4 * logits + 12 * sums + 8 * entropies + 4 * D * gradient + 16 * general
    return MEETING + N * row


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_are_those_of_the_formula(size, found):
    expected = {"no teacher": message(1, 1, 0, True)}
    for name, sums in {"frozen": 1, "renormalised": 2, "tau": 2, "softcap": 1}.items():
        expected[f"cache {name}"] = MEETING + N * (12 * K + 4 * K + 12 + 4 * D)
        for trains, graph, parts in itertools.product((False, True), repeat=3):
            general = trains or name == "softcap"
            logits = 1 if general else 2 * (K + 1)
            entropies = parts * (2 if name == "renormalised" else 1)
            expected[f"{name} {trains=} {graph=} {parts=}"] = message(
                logits, sums, entropies, graph, general
            )
    for one in found[size]:
        assert {key: sent for key, (sent, _) in one["bytes"].items()} == expected
        assert max(calls for _, calls in one["bytes"].values()) <= 7


@pytest.mark.parametrize("size", SIZES)
def test_gradients_add_up_over_micro_batches(size, found):
    for one in found[size]:
        sums = one["accumulated"]
        for key in [key for key in sums if key.startswith("one")]:
            torch.testing.assert_close(sums["two" + key[3:]], sums[key], rtol=1e-12, atol=1e-12)


# ---- what is refused

SENTENCES = {
    "D": "D is 12 on rank 0 but 11 on rank 1",
    "N": "N is 11 on rank 0 but 10 on rank 1",
    "labels": "Rank 1 of the group has other labels",
    "label": f"neither in 0..{V - 1} nor",
    "dtype": "Rank 1 of the group has other dtypes or options",
    "one trains": "Rank 1 of the group has other dtypes or options",
    "no rows": "no rows on any rank",
    "backend": "'reference' has no code for a head in parts",
    "whole teacher": "the teacher's cache has a whole head",
    "mask of a part": f"vocab_keep must be bool [{V}]",
    "masks": "or another vocab_keep",
    "pickle": "holds a process group",
}


def test_all_ranks_say_what_is_wrong(found):
    for one in found[2]:
        said = one["refusals"]
        for name, words in SENTENCES.items():
            assert words in said[name], name
        assert said["right"] == "nothing"


def test_where_one_rank_refuses_all_ranks_stop(found):
    others, own = (one["refusals"] for one in found[2])
    words = {
        "one refuses": "beta is -1.0",
        "reduction": "reduction is 'min'",
        "changed head": "The teacher's head has changed",
    }
    for name, text in words.items():
        assert text in own[name]
        assert "Rank 1 of the group refused its arguments" in others[name]


def test_a_process_outside_of_the_group_is_told(found):
    assert "This process is not in the group" in found[2][1]["refusals"]["outside"]


def test_a_group_without_torch_distributed_is_told():
    x = ranks.inputs(F32)
    for call in (
        lambda: fused_dmk_ce(x.h, x.W, x.y, group=object()),
        lambda: TeacherCache.from_hidden(x.h, x.W, group=object()),
    ):
        with pytest.raises(ValueError, match="torch.distributed is not initialised"):
            call()


def test_what_is_no_group_is_told(one_process):
    x = ranks.inputs(F32)
    with one_process(), pytest.raises(ValueError, match="must be a torch.distributed.ProcessGroup"):
        fused_dmk_ce(x.h, x.W, x.y, group="tensor")


def test_only_tiled_serves_it(one_process):
    x = ranks.inputs(F32)
    with one_process():
        group = torch.distributed.group.WORLD
        refused = {b: why_not(b, x.h, x.W, group=group) for b in ("reference", "triton", "cpu")}
        assert all("head in parts" in reason for reason in refused.values())
        assert why_not("auto", x.h, x.W, group=group) is why_not("tiled", x.h, x.W, group=group)
        assert why_not("tiled", x.h, x.W, group=group) is None
        teacher = TeacherCache.from_hidden(x.ht, x.W, group=group)
        assert "head in parts" in why_not("reference", x.h, x.W, teacher)


# ---- files


def test_a_cache_in_parts_is_the_file_of_the_whole_head(found):
    for one in found[2]:
        files = one["files"]
        assert files["same file"] and files["another dtype"] == N
        for key in ("loss", "m"):
            torch.testing.assert_close(*files[key], rtol=1e-6, atol=1e-6)


def test_a_file_of_another_head_is_told_on_all_ranks(found):
    for one in found[2]:
        assert "was built with another head" in one["files"]["swapped"]
        assert f"of shape [{V}, {D}]" in one["files"]["shorter"]
    first, second = (one["files"]["gone"] for one in found[2])
    assert "FileNotFoundError" in second and "Rank 1 of the group refused" in first


# ---- sharded models


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_tensor_parallel_model_trains_as_one_process(size, train_head, found):
    model, history = ranks.example().main(train_head=train_head)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    assert history[-1] < history[0] and ("lm_head.weight" in trained) == train_head
    for one in found[size]:
        losses, parameters = one["tensor parallel"][f"{train_head=}"]
        torch.testing.assert_close(losses, history, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(parameters, trained, rtol=1e-5, atol=1e-6)


def test_lora_on_a_head_in_parts(found):
    expected = ranks.adapted()
    assert len(expected) == 3
    for one in found[2]:
        torch.testing.assert_close(one["adapted"], expected, rtol=1e-5, atol=1e-6)


def test_a_tied_head_in_parts(found):
    expected = ranks.tied()
    assert "embed.weight" in expected and "lm_head.weight" not in expected
    for one in found[2]:
        torch.testing.assert_close(one["tied"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_head_that_fsdp_shards_by_itself(frozen, found):
    """The frozen one is gathered once and stays the teacher's; the one that trains gets the mean
    of the ranks' gradients, as FSDP has it."""
    expected = ranks.fully_sharded(frozen)["gradients"]
    assert ("lm_head.weight" in expected) != frozen
    for one in found[2]:
        step = one["fully sharded"][frozen]
        torch.testing.assert_close(step["gradients"], expected, rtol=1e-5, atol=1e-6)
        assert step["group"]
        if frozen:
            assert step["same"] and step["sent"] == 16  # two agreements of 8 bytes: weight and bias
