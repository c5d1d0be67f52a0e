"""How the command ends: exit codes, signals and what is said, with a run that trains nothing."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from config import RunError
from run import cli

# A program whose run does what its first argument says, until it is stopped.
PROGRAM = """
import asyncio, sys, time, types
from run import cli

setup = types.SimpleNamespace(out=None, outcome=types.SimpleNamespace(step=3, first=0, evaluations={}, failed=""))
setup.open = lambda: None
sys.modules["run.setup"] = types.SimpleNamespace(prepare=lambda config: setup, FinishedRun=KeyError)
cli.summarize = lambda setup, code: print("ended with", code, flush=True)


async def main(setup):
    print("began", flush=True)
    try:
        await asyncio.sleep(60)
    finally:
        print("saving", flush=True)
        if how == "blocks":
            time.sleep(60)
        await asyncio.sleep(60 if how == "hangs" else 0.5)
        print("saved", flush=True)


how = sys.argv.pop(1)
sys.exit(cli.start(main))
"""


def started(how: str) -> subprocess.Popen:
    project = Path(__file__).resolve().parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # shells silence it
    )
    assert process.stdout.readline() == "began\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_ends_the_run_in_order(number, code):
    with started("saves") as process:
        process.send_signal(number)
        process.send_signal(number)  # the same once more, as some send it
        out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert out == f"saving\nsaved\nended with {code}\n"
    assert err == "\nstopping: the update under way ends, and a checkpoint is saved; once more ends at once\n"


@pytest.mark.parametrize("how", ["hangs", "blocks"])
def test_a_second_signal_ends_it_at_once(how):
    with started(how) as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "saving\n"
        time.sleep(0.35)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert process.wait(20) == -signal.SIGTERM and time.monotonic() - began < 2
        assert process.stdout.read() == ""


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """The command with a run that is `main(setup)`; gives its code, output and errors."""

    log = logging.getLogger("tba")
    for name, value in (("handlers", [*log.handlers]), ("propagate", log.propagate), ("level", log.level)):
        monkeypatch.setattr(log, name, value)  # are as they were in the end

    class FinishedRun(Exception):
        pass

    def run(main, *arguments, prepare=None) -> SimpleNamespace:
        outcome = SimpleNamespace(step=0, first=0, evaluations={}, failed="")
        setup = SimpleNamespace(out=tmp_path, outcome=outcome, show=lambda: print("shown"), open=lambda: None)
        fake = SimpleNamespace(FinishedRun=FinishedRun, prepare=prepare or (lambda config: setup))
        monkeypatch.setitem(sys.modules, "run.setup", fake)
        monkeypatch.setattr(sys, "argv", ["tba.py", *arguments])
        code = cli.start(main)
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    run.FinishedRun = FinishedRun
    return run


async def raising(error: BaseException) -> None:
    async def work() -> None:
        raise error

    async with asyncio.TaskGroup() as group, asyncio.TaskGroup() as inner:
        group.create_task(asyncio.sleep(60))
        inner.create_task(work())


def test_a_run_that_ends_says_where_its_files_are(start, tmp_path):
    async def main(setup) -> None:
        setup.outcome.step, setup.outcome.evaluations = 7, {0: {"pass@1": 0.5}, 7: {"pass@1": 0.75}}
        (tmp_path / "model").mkdir()
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 7, "time": 1.0, "loss": 0.5}) + "\n")

    done = start(main)
    assert done.code == 0 and not done.err
    assert "pass@1                 0.500         0.750" in done.out
    assert f"done: step 7; open {tmp_path}/report.html; beside it are metrics, samples, the policy" in done.out
    assert "go on with" not in done.out


def test_an_error_that_says_all_is_one_line_and_any_other_a_traceback(start, tmp_path):
    async def main(setup) -> None:
        setup.outcome.step = 4
        (tmp_path / "checkpoints" / "step-4").mkdir(parents=True, exist_ok=True)
        await raising(RunError("no memory"))

    done = start(main)
    assert done.code == 1 and done.err == "tba: no memory\n"
    assert f"stopped at step 4; open {tmp_path}/report.html" in done.out
    assert f"go on with: python tba.py --resume {tmp_path}\n" in done.out
    done = start(lambda setup: raising(KeyError("this")))
    assert done.code == 1 and "KeyError: 'this'" in done.err and "Traceback" in done.err
    assert done.err.endswith(f"tba: the output of vLLM is in {tmp_path}/engine.log\n")
    assert "go on with" not in done.out  # nothing is new since it began


def test_a_checkpoint_that_could_not_be_written_is_an_error(start):
    async def main(setup) -> None:
        setup.outcome.failed = "step-4 cannot be written"

    done = start(main)
    assert done.code == 1 and done.err == "tba: step-4 cannot be written\n"


def test_what_cannot_begin_has_its_own_code(start):
    def prepare(error):
        def refuse(config):
            raise error

        return refuse

    for error, code, out, err in (
        (ValueError("model is 'x': it must be"), 2, "", "tba: model is 'x': it must be\n"),
        (start.FinishedRun("runs/a is done"), 0, "runs/a is done\n", ""),
        (KeyboardInterrupt(), 130, "", ""),
    ):
        done = start(None, prepare=prepare(error))
        assert (done.code, done.out, done.err) == (code, out, err)
    done = start(None, "--dry-run")
    assert (done.code, done.out) == (0, "shown\n")


def test_handlers_of_signals_are_as_they_were(start):
    async def main(setup) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(60)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert start(main).code == 143
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
