"""`pytest benches/`: every contender computes the same step, and sharing the prefix saves what it says. No bounds on seconds."""

import pytest
import step
import torch


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_rows(request, capsys):
    full = request.config.getoption("--full")
    rows = step.bench(step.FULL if full else step.QUICK, 16 if full else 8, 5 if full else 1, with_memory=full)
    with capsys.disabled():
        print("\n" + step.table(rows))
    found = {r["contender"]: r for r in rows}
    assert list(found) == [step.THEIRS, *step.WAYS]
    assert all(r["grad_error"] < 1e-4 and r["loss_error"] < 1e-4 for r in rows)
    assert found["as chosen"]["chosen"] in ("packed", "key/value")
    assert found["key/value"]["fewer_flops"] > (10 if full else 2.5) and found["packed"]["fewer_flops"] > 1.5
    if full:
        assert found["as chosen"]["faster"] > 7 and found["as chosen"]["of_memory"] < 0.25


def test_a_contender_that_computes_something_else_is_found_out(monkeypatch):
    work = step.Work(step.QUICK, 3)
    theirs = work.theirs
    monkeypatch.setattr(work, "theirs", lambda: theirs() * 1.001)
    with pytest.raises(SystemExit, match="plain computes something else"):
        step.agreement(work)


def test_a_run_ends_where_theirs_does():
    """Same samples, adapter and optimiser: loss curve and final adapter are the straightforward ones, but for rounding."""
    theirs, ours = step.run(step.QUICK, 8, 4, 6)
    assert len(ours["losses"]) == len(theirs["losses"]) == 6 and ours["losses"][-1] < ours["losses"][0]
    assert ours["loss_error"] < 1e-5 and ours["adapter_error"] < 1e-3
