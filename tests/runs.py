"""Runs of the command, and what they leave behind."""

import contextlib
import gc
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.forkserver import _forkserver
from pathlib import Path
from types import SimpleNamespace

from run.devices import start_fork_server
from search.engine import PRELOAD

PROJECT = Path(__file__).resolve().parents[1]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


FEWER = {"train": 1000, "test": 200}  # Countdown's problems, to make which takes 2 seconds

MARK = f"TBA_TEST={os.getpid()}"  # in the environment of what these tests start, and of what that starts
os.environ.update([MARK.split("="), ("SPT_NOENV", "1")])  # vLLM's process titles would overwrite it otherwise
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # as the command sets it, for what is imported ahead
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for torch: as many tests run side by side as there are cores
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # its workers would outlive a run in this process


def read_of_processes(name: str) -> Iterator[tuple[int, bytes]]:
    """(process, the file of that name in its folder of /proc) of all processes that may be read."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            yield int(folder.name), (folder / name).read_bytes()


def processes() -> set[int]:
    """The processes that these tests started and those started by them, but not Python's trackers of shared memory,
    nor what is forked from in this process."""
    marked = {process for process, environment in read_of_processes("environ") if MARK.encode() in environment}
    trackers = {process for process, command in read_of_processes("cmdline") if b"resource_tracker" in command}
    return marked - trackers - {vars(_forkserver)["_forkserver_pid"]}


def shared_memory() -> set[str]:
    """What lies in shared memory and no process has mapped. Told by inode: who makes a semaphore maps it before it has
    its name, so that one in use by a test beside this one would look like one that was left."""
    inodes = {}
    for path in Path("/dev/shm").iterdir():
        with contextlib.suppress(FileNotFoundError):
            inodes[b"%d" % path.stat().st_ino] = path.name
    for _, maps in read_of_processes("maps"):
        for mapping in maps.splitlines():
            if b"/dev/shm/" in mapping:
                inodes.pop(mapping.split()[4], None)
    return set(inodes.values())


@contextlib.contextmanager
def nothing_is_left() -> Iterator[None]:
    """Nothing survives the program: no engine process, no shared memory. (Python's tracker ends a little later.)"""
    before = processes(), shared_memory()
    yield
    gc.collect()  # what this process, where it was the program, has done with
    ended, empty = time.monotonic(), 0
    while empty < 3:  # looks in a row: a process that was just being started shows a moment later
        time.sleep(0.2)
        left = processes() - before[0] or shared_memory() - before[1]
        empty = 0 if left else empty + 1
        assert not left or time.monotonic() < ended + 10, left


def forked(target: Callable, *arguments) -> multiprocessing.Process:
    """A process that does this, forked from one that has imported everything."""
    start_fork_server()
    process = forkserver.Process(target=target, args=arguments)
    process.start()
    return process


@contextlib.contextmanager
def started(*arguments, **environment: str) -> Iterator[SimpleNamespace]:
    """The command in a process of its own, forked from one that has imported everything, which spares 8 seconds; has
    `process`, and `said()`, what it printed so far. It hears Ctrl-C, which shells silence in the background."""
    with tempfile.TemporaryDirectory() as folder:
        (printed := Path(folder) / "printed").touch()
        process = forked(_run, [*map(str, arguments)], str(printed), environment)
        try:
            yield SimpleNamespace(process=process, said=lambda: printed.read_text(errors="replace"))
        finally:
            process.kill()
            process.join()


forkserver = multiprocessing.get_context("forkserver")
PRELOAD += ["tests.runs", "tba", "train.trainer", "rewards.judges", "tyro"]


def _run(arguments: list[str], printed: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    # Its own tracker and Python's own start method, as any program has: what it leaves when it is killed would else
    # stay until these tests end.
    resource_tracker._resource_tracker._fd = resource_tracker._resource_tracker._pid = None
    multiprocessing.set_start_method("fork", force=True)
    file = os.open(printed, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.path.insert(0, str(PROJECT))  # as Python does; then what lies beside the program is found from any folder
    os.chdir(Path(printed).parent)
    Path("search.py").write_text("raise OSError('this is not what was to be imported')")
    import tba
    from run import cli
    from tasks import countdown

    program = sys.modules["__main__"]  # which its engines import when they start
    program.__spec__, program.__file__ = None, str(PROJECT / "tba.py")

    countdown.PROBLEMS |= FEWER
    sys.argv = ["tba.py", *arguments]
    sys.exit(cli.start(tba.main))


def updates_of(out: Path) -> list[dict]:
    """The rows of a run's updates."""
    return [row for row in read(out / "metrics.jsonl") if "loss" in row]


def wait_for(condition, run: SimpleNamespace | None = None, seconds: float = 120) -> None:
    """Wait until it holds, while a run lives."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert run is None or run.process.is_alive(), run.said()
        assert time.monotonic() < deadline, run and run.said()
        time.sleep(0.05)
