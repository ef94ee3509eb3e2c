"""Calls to a server, a few at once: their order, the first failure, and Ctrl+C."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from fastsiu.guards.endpoint import a_few_at_once

FOREVER = 60.0  # seconds of a call that hangs; a test that waits for it has failed


@pytest.mark.parametrize("most", [0, 1, 3, 100])
def test_results_come_in_the_order_of_the_items(most):
    def work(item, stop):
        time.sleep(0.01 * (5 - item))  # the last one is done first
        return item * item

    assert a_few_at_once(work, range(5), most) == [0, 1, 4, 9, 16]
    assert a_few_at_once(work, [], most) == []


def test_no_more_run_at_once_than_allowed():
    lock, running, seen = threading.Lock(), [0], []

    def work(item, stop):
        with lock:
            running[0] += 1
            seen.append(running[0])
        time.sleep(0.02)
        with lock:
            running[0] -= 1

    a_few_at_once(work, range(8), 2)
    assert max(seen) == 2


def test_the_first_failure_ends_it_at_once_and_nothing_further_begins():
    begun, told = [], []

    def work(item, stop):
        begun.append(item)
        if item == 1:
            raise ValueError("item 1")
        told.append(stop.wait(FOREVER))  # a call that hangs, unless it is told

    start = time.monotonic()
    with pytest.raises(ValueError, match="item 1"):
        a_few_at_once(work, range(50), 2)
    assert time.monotonic() - start < FOREVER / 2
    time.sleep(0.2)
    assert sorted(begun) == [0, 1] and told == [True]


def test_nothing_begins_where_not_all_threads_could(monkeypatch):
    start, started, done = threading.Thread.start, [], []

    def fails(thread):
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    def work(item, stop):
        stop.wait(FOREVER)
        done.append(item)

    monkeypatch.setattr(threading.Thread, "start", fails)
    with pytest.raises(RuntimeError, match="new thread"):
        a_few_at_once(work, range(20), 2)
    started[0].join(FOREVER)
    assert done == [0]


def test_whoever_sets_the_event_still_gets_every_result():
    def work(item, stop):
        if item == 2:
            stop.set()
        return stop.is_set()

    assert a_few_at_once(work, range(5), 1) == [False, False, True, True, True]


def test_ctrl_c_waits_for_no_call():
    text = (
        "import os, signal, sys, time\n"
        "from fastsiu.guards.endpoint import a_few_at_once\n"
        # a job in the background of a shell is started with Ctrl+C ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def work(item, stop):\n"
        "    os.write(1, b'begun\\n')  # in one piece\n"
        f"    time.sleep({FOREVER})\n"
        "try:\n"
        "    a_few_at_once(work, range(4), 2)\n"
        "except KeyboardInterrupt:\n"
        "    sys.exit(130)\n"
    )
    with subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"begun\n"
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(FOREVER) == 130
        assert time.monotonic() - start < FOREVER / 2
