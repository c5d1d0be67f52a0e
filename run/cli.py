"""The command: signals and exit codes, and the command line."""

import argparse
import asyncio
import contextlib
import io
import itertools
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import tasks
from config import MAY_CHANGE, Config, RunError
from run.check import check, give_way, is_run_folder, limits
from run.console import log_to_console, table

STRICT: dict[str, Any] = dict(strict=True, sync_every=1, on_policy_prob=1.0, prime=0)  # defaults with --strict

log = logging.getLogger("tba")


def start(main: Callable[[Any], Coroutine]) -> int:
    """Run `main(setup)`, with a Setup of what the command line asks for.

    Returns:
        The exit code: 0, 1 after an error, 2 for settings that cannot be, 130 after Ctrl-C, 143 after SIGTERM.
    """
    log_to_console()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        config = parse(sys.argv[1:])
        from run.setup import FinishedRun, prepare  # not before: --help and bad input are answered at once

        try:
            setup = prepare(config)
        except FinishedRun as finished:
            log.info(str(finished))
            return 0
        if config.dry_run:
            setup.show()
            return 0
        if config.plan:
            from tools.plan import Plan

            (setup.plan or Plan(setup)).show()
            return 0
        setup.open()
    except ValueError as error:
        log.error(f"tba: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    code = 0
    stopped: list[int] = []
    try:
        asyncio.run(interruptible(main(setup), stopped))
    except BaseException as error:
        code, cause = 1, first_cause(error)
        if stopped:
            code = 128 + stopped[0]
        elif isinstance(cause, RunError):
            log.error(f"tba: {cause}")
        else:
            log.error("".join(traceback.format_exception(cause)))
            log.error(f"tba: the output of vLLM is in {setup.out}/engine.log")
    if setup.outcome.failed:
        log.error(f"tba: {setup.outcome.failed}")
        code = code or 1
    summarize(setup, code)
    return code


async def interruptible(coroutine: Coroutine, stopped: list[int]) -> None:
    """Await the coroutine. The first Ctrl-C or SIGTERM cancels it, a second ends the process at once.

    Args:
        coroutine: ends in order when it is cancelled.
        stopped: gets the number of the signal.
    """
    loop, task, first = asyncio.get_running_loop(), asyncio.current_task(), 0.0

    def stop(number: int, _) -> None:  # not the loop's handler: whatever keeps the loop busy, a second signal counts
        nonlocal first
        if not stopped:
            stopped.append(number)
            first = time.monotonic()
            line = b"\nstopping: the update under way ends, and a checkpoint is saved; once more ends at once\n"
            with contextlib.suppress(OSError):  # not by `log`, in the middle of whose work this may be
                os.write(2, line)
            loop.call_soon_threadsafe(task.cancel)
        elif time.monotonic() - first > 0.3:  # sooner, it is the same, sent to the whole group too
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        await coroutine
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def uninterrupted(work: Coroutine) -> None:
    """Await a coroutine that must not be cut short: where this is cancelled, it is finished first."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    finally:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        task.exception()  # marked as seen, where the cancellation is raised in its stead


def first_cause(error: BaseException) -> BaseException:
    """Of the errors that ended the coroutines together, the one that came first."""
    return first_cause(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def summarize(setup: Any, code: int) -> None:
    """Show the evaluations of a run that has ended, write its report, and say where its files are."""
    out, outcome = setup.out, setup.outcome
    if outcome.evaluations:
        log.info(f"\n{table(outcome.evaluations)}\n")
    try:
        from tools import report

        report.write([out], out / "report.html")
    except Exception as error:  # the run's files are there all the same
        log.info(f"report.html cannot be written ({error}): python -m tools.report {out} tries again")
    written = {"checkpoints": "checkpoints", "model": "the policy (model/)"}
    beside = ["metrics", "samples", *(what for name, what in written.items() if (out / name).is_dir())]
    ended = "stopped at" if code else "done:"
    log.info(f"{ended} step {outcome.step}; open {out}/report.html; beside it are {', '.join(beside)}")
    if code and outcome.step > outcome.first and any(out.glob("checkpoints/step-*[0-9]")):
        log.info(f"go on with: python {sys.argv[0]} --resume {out}")


# ---- the command line ----


def parse(arguments: list[str]) -> Config:
    """Settings from a command line: a flag beats the resumed run, which beats the task's defaults.

    Defaults that hang on what a flag changed give way to it.

    Raises:
        ValueError: what is wrong with them, in one line.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("--task", "--resume", "--out"):
        first.add_argument(name, default="")
    first.add_argument("--strict", action=argparse.BooleanOptionalAction, default=False)
    try:
        known, _ = first.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    name = known.task or Config.task
    out = known.out if known.resume == "auto" else known.resume
    if known.resume == "auto" and not out:  # names end with the time
        runs = sorted(path.parent for path in Path("runs").glob(f"{Path(name).stem}-*-*/config.json"))
        out = str(runs[-1]) if runs else ""
    if known.resume and is_run_folder(out):
        saved = saved_settings(out, known)
        config = from_flags(saved, arguments)
        for field, marks in limits(type(config)).items():
            was, now = getattr(saved, field), getattr(config, field)
            if was != now and MAY_CHANGE not in marks.values():
                raise ValueError(
                    f"{field} was {was!r} in {out}, and is {now!r} now: it cannot change when a run is resumed "
                    f"(a new run can start from what that one learned: --model {out}/model)"
                )
    elif known.resume not in ("", "auto"):
        raise ValueError(f"resume is {out!r}: it must be the folder of a run, and {out}/config.json does not exist")
    else:
        config = from_flags(tasks.load(name).Settings(task=name, **STRICT if known.strict else {}), arguments)
        flags = {flag.partition("=")[0].lstrip("-").replace("-", "_") for flag in arguments if flag.startswith("--")}
        config = give_way(config, flags)
    check(config)
    return config


def saved_settings(out: str, known: argparse.Namespace) -> Config:
    """The settings of a run that is resumed.

    Raises:
        ValueError: they cannot be read, or are another version's.
    """
    try:
        settings = json.loads((Path(out) / "config.json").read_text()) | {"out": out, "resume": known.resume}
        if known.task and known.task != settings["task"]:
            raise ValueError(f"task was {settings['task']!r}, and is {known.task!r} now")
        settings |= {name: tuple(value) for name, value in settings.items() if isinstance(value, list)}
        return tasks.load(settings["task"]).Settings(**settings)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"resume is {known.resume!r}: {out}/config.json does not fit ({error})") from None


def from_flags(defaults: Config, arguments: list[str]) -> Config:
    """The defaults, changed by the flags of a command line.

    Raises:
        ValueError: what is wrong with it, in one line.
    """
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(type(defaults), args=arguments, default=defaults, prog="tba.py")
    except SystemExit as stop:
        if stop.code:  # tyro draws a box around what is wrong: its first lines say it
            lines = (line.strip("│ ") for line in complaint.getvalue().splitlines())
            said = itertools.dropwhile(lambda line: line[:1] in "╭", lines)
            wrong = " ".join(itertools.takewhile(lambda line: line[:1] not in "─╰", said))
            raise ValueError(f"{wrong} (--help lists what there is)" if "nrecognized" in wrong else wrong) from None
        raise
