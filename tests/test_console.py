"""What a person sees while a run goes on."""

import asyncio
import io
import logging
import os
import sys
import time

import pytest
from tqdm import tqdm

from run import console
from run.console import COLUMNS, Progress, Watchdog, log_to_console, table, timed

FIGURES = {
    "reward": 0.25, "kl": 0.5, "age_mean": 2.0, "search_tokens_per_s": 24_100.0, "train_tokens_per_s": 18_200.0,
    "search_idle": 0.03, "train_idle": 0.12, "loss": float("nan"),
}  # fmt: skip

log = logging.getLogger("tba")


@pytest.fixture(autouse=True)
def logged(monkeypatch):
    """Lines go to the console; what else logs, and raises where it cannot, is as it was in the end."""
    for name in ("handlers", "level", "propagate"):
        monkeypatch.setattr(log, name, getattr(log, name))
    monkeypatch.setattr(log, "handlers", [*log.handlers])
    monkeypatch.setattr(logging, "raiseExceptions", logging.raiseExceptions)
    log_to_console()


class Terminal(io.StringIO):
    """Takes what is written, and says that it is one."""

    def isatty(self) -> bool:
        return True


def terminal(monkeypatch) -> Terminal:
    """Where errors go from now on."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(tqdm, "monitor_interval", 0)
    return sys.stderr


def frames(shown: Terminal) -> list[str]:
    return [frame for frame in shown.getvalue().replace("\n", "\r").split("\r") if frame.strip()]


def test_the_bar_is_one_line_that_fits_120_columns(monkeypatch):
    shown = terminal(monkeypatch)
    progress = Progress(2400, 0, 0)
    progress.bar.mininterval = 0
    for step in range(1, 4):
        progress.update(step, step / 10, FIGURES)
    progress.close()
    *_, last = frames(shown)
    assert "| 3/2400 [00:00<" in last
    assert last.endswith("reward 0.250 KL 0.50 age 2.0 | search 24.1k/s 3% idle | train 18.2k/s 12% idle")
    assert all(len(frame) <= COLUMNS for frame in frames(shown)) and shown.getvalue().count("\n") == 1
    without = {name: value for name, value in FIGURES.items() if name != "kl"}
    assert console.status_line(without).startswith("reward 0.250 age 2.0 |")


def test_the_bar_fits_with_the_longest_figures_and_in_a_narrow_terminal(monkeypatch):
    large = FIGURES | {"reward": -12.345, "kl": -123.45, "age_mean": 1234.5, "search_idle": 1.0, "train_idle": 1.0}
    for columns in (200, 80):
        shown = terminal(monkeypatch)
        monkeypatch.setenv("COLUMNS", str(columns))
        progress = Progress(100_000, 99_998, 0)
        progress.bar.mininterval = 0
        progress.update(99_999, 359_999.0, large)
        progress.close()
        assert max(map(len, frames(shown))) <= min(COLUMNS, columns)


@pytest.mark.parametrize(("max_seconds", "left"), [(0, "00:09"), (55, "00:05")])
def test_time_left_is_until_the_last_update_or_the_last_second(monkeypatch, max_seconds, left):
    terminal(monkeypatch)
    now = [100.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    progress = Progress(20, 10, max_seconds)
    now[0] += 1.0
    progress.update(11, 50.0, FIGURES)  # 50 seconds in all, this one in 1
    assert f"11/20 [00:50<{left}] " in progress.bar.desc
    progress.close()


def test_figures_are_smoothed(monkeypatch):
    terminal(monkeypatch)
    progress = Progress(9, 0, 0)
    for step, reward in ((1, 0.0), (2, 1.0), (3, float("nan"))):
        progress.update(step, 1.0, {"reward": reward})
    assert "reward 0.100 " in progress.bar.desc
    progress.close()


def test_without_a_terminal_it_says_plain_lines_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.05)
    progress = Progress(5, 0, 0)
    for step in range(1, 6):
        progress.update(step, 1.0, FIGURES)
        time.sleep(0.03)
    progress.close()
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert 1 <= len(lines) <= 3 and all(line.endswith("12% idle") for line in lines) and not err and "\r" not in out


def test_what_takes_long_is_logged_when_it_begins_and_ends(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    with timed("starting"):
        now[0] += 12.4
    with timed("looking"):
        now[0] += 0.5
    assert capsys.readouterr().out.splitlines() == ["starting ...", "starting took 12 s", "looking ..."]
    with pytest.raises(KeyError), timed("failing"):
        raise KeyError
    assert capsys.readouterr().out.splitlines() == ["failing ..."]


def test_errors_go_to_stderr_and_all_else_to_stdout_once(capsys):
    log_to_console()
    root = logging.StreamHandler()
    logging.getLogger().addHandler(root)
    log.debug("hidden")
    log.info("one\x1b[31m")
    log.warning("two")
    log.error("three")
    logging.getLogger().removeHandler(root)
    assert capsys.readouterr() == ("one\\x1b[31m\ntwo\n", "three\n")


def test_lines_stand_above_the_bar(monkeypatch, capsys):
    shown = terminal(monkeypatch)
    progress = Progress(9, 0, 0)
    progress.update(1, 1.0, FIGURES)
    log.info("a checkpoint")
    progress.close()
    assert capsys.readouterr().out == "a checkpoint\n" and shown.getvalue().count("\n") == 1


def test_a_full_disk_ends_nothing(monkeypatch, capsys):
    full = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", closefd=False)
    monkeypatch.setattr(sys, "stdout", full)
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0)
    progress = Progress(3, 0, 0)
    with timed("training"):
        for step in range(1, 4):
            progress.update(step, 1.0, FIGURES)
    progress.close()
    with pytest.raises(OSError):
        full.flush()  # or nothing is shown
    assert not capsys.readouterr().err


def test_a_stall_is_logged_at_growing_intervals(capsys):
    async def check() -> None:
        watchdog = Watchdog(0.2, lambda: "5 sequences \x1b[31m are in flight")
        watching = asyncio.create_task(watchdog.run())
        for _ in range(30):
            await asyncio.sleep(0.05)
            watchdog.beat("update")
        watching.cancel()

    asyncio.run(check())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # after 0.2, 0.4 and 0.8 seconds, not 1.6
    assert lines[0] == "no response for 0 s: 5 sequences \\x1b[31m are in flight"


def test_the_table_has_the_first_and_the_last_evaluation():
    lines = table({0: {"greedy": 0.25}, 5: {"greedy": 0.3}, 9: {"greedy": 0.5, "pass@1": 1.0}}).splitlines()
    assert [line.split() for line in lines] == [
        ["held", "out", "step", "0", "step", "9"],
        ["greedy", "0.250", "0.500"],
        ["pass@1", "nan", "1.000"],
    ]
