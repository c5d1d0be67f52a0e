"""TBA: trajectory balance with asynchrony. Search and training side by side, in one process.

    python tba.py                                   post-train a small embedded model on Countdown, on any machine
    python tba.py --task gsm8k                      the paper's GSM8K run, on a box of GPUs
    python tba.py --task gsm8k --model DIR --data DIR --steps 100 --out runs/mine
    python tba.py --task gsm8k --help               every setting, with the task's defaults
    python tba.py --task gsm8k --dry-run            what it would do, and the first prompt as the model sees it
    python tba.py --task gsm8k --plan               what memory it would take on each device, and whether it fits
    python tba.py --resume runs/mine                go on from the newest checkpoint

This is the command; run.py has the run.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
import traceback

import report
from checkpoint import by_step
from config import parse
from run import Finished, Run
from screen import Failure, Screen, say, table


def main() -> int:
    """The command line. Returns the exit code: 0, 1 on failure, 2 on bad input, 130 or 143 when interrupted."""
    sys.stdout, sys.stderr = Screen(sys.stdout), Screen(sys.stderr)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        run = Run(parse(sys.argv[1:]))
        if run.config.dry_run:
            run.show()
            return 0
        if run.config.plan:
            from plan import Plan

            Plan(run).show()
            return 0
        run.open()
    except ValueError as error:
        say(f"tba: {error}", complaint=True)
        return 2
    except Finished as done:
        say(str(done))
        return 0
    except KeyboardInterrupt:
        return 130
    code = 0
    try:
        asyncio.run(interruptible(run))
    except BaseException as error:
        code, cause = 1, first_cause(error)
        if run.stopped:
            code = 128 + run.stopped
        elif isinstance(cause, Failure):
            say(f"tba: {cause}", complaint=True)
        else:
            say("".join(traceback.format_exception(cause)), complaint=True)
            say(f"tba: what vLLM printed is in {run.out}/engine.log", complaint=True)
    if run.checkpoints.failed:
        say(f"tba: {run.checkpoints.failed}", complaint=True)
        code = code or 1
    if run.log.evaluations:
        say(f"\n{table(run.log.evaluations)}\n")
    try:
        report.write([run.out], run.out / "report.html")
    except Exception as error:  # which takes nothing from the run
        say(f"report.html cannot be written ({error}): python report.py {run.out} tries again")
    ended = "stopped at" if code else "done:"
    left = {"checkpoints": "checkpoints", "model": "the policy (model/)"}
    beside = ["metrics", "samples", *(what for name, what in left.items() if (run.out / name).is_dir())]
    say(f"{ended} step {run.step}; open {run.out}/report.html; beside it are {', '.join(beside)}")
    if code and run.step > run.first and by_step(run.out):
        program = sys.modules["__main__"].__spec__
        say(f"go on with: python {f'-m {program.name}' if program else sys.argv[0]} --resume {run.out}")
    return code


async def interruptible(run: Run) -> None:
    """The run. The first Ctrl-C or SIGTERM ends it in order, the second at once."""
    loop, task, began = asyncio.get_running_loop(), asyncio.current_task(), 0.0
    stderr = os.dup(2)  # while engines are started it leads to their log

    def stop(number: int, _) -> None:
        nonlocal began
        if run.stopped and time.monotonic() - began > 0.3:  # sooner, it is the same, sent to the whole group too
            os._exit(128 + number)  # the engines end with this process
        if not run.stopped:
            run.stopped, began = number, time.monotonic()
            with contextlib.suppress(OSError):  # not by `say`, which this may have interrupted
                os.write(
                    stderr,
                    b"\nstopping: the update under way ends, and a checkpoint is saved; once more ends at once\n",
                )
            loop.call_soon_threadsafe(task.cancel)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        await run.main()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(stderr)


def first_cause(error: BaseException) -> BaseException:
    """Of the errors that ended the coroutines together, the one that came first."""
    return first_cause(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


if __name__ == "__main__":
    sys.exit(main())
