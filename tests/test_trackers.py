"""Metrics in the tools that a user has: what they hold is what metrics.jsonl has."""

import contextlib
import json
import struct
from collections.abc import Iterator

import numpy as np
import pytest

import config as config_module
from buffer import Group, Trajectory
from config import Config
from log import Log
from tests.runs import read
from trackers import wanted

FIGURES = {"reward": 0.25, "search_tokens_per_s": 24_100.0, "grad_norm": float("nan")}


def logged(out, step: int, **trackers) -> None:
    """What a run writes that has made `step` updates before: two more, and an evaluation."""
    config = Config(model="m", steps=9, **trackers)
    log = Log(out, config, step, 0.0, wanted(out, config, step))
    log.start_clock()
    group = Group(0, np.array([1]), [Trajectory(np.array([1], np.int32), True, 0.5, 0)])
    for done in (step, step + 1):
        log.update(done, FIGURES | {"kl": done + step / 10}, [group], "prompt", lambda responses: ["text"])
    log.evaluation(step + 2, {"pass@1": 0.75 + step / 10, "broken": float("nan")})
    log.close()


def test_tensorboard_has_every_figure_and_what_is_made_anew_once(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged(tmp_path, 0, tensorboard=True)
    assert "step 2: pass@1 0.750, broken nan" in capsys.readouterr().out.splitlines()
    logged(tmp_path, 1, tensorboard=True)  # resumed from the checkpoint of update 1
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    names = {"reward", "kl", "batch_reward", "age_mean", "age_max", "search_tokens_per_s", "time"}
    assert set(events.Tags()["scalars"]) == {f"train/{name}" for name in names} | {"eval/pass@1"}  # nan is in neither
    found = {name: [(e.step, round(e.value, 3)) for e in events.Scalars(name)] for name in ("train/kl", "eval/pass@1")}
    assert found == {"train/kl": [(1, 0.0), (2, 1.1), (3, 2.1)], "eval/pass@1": [(3, 0.85)]}
    assert [row["kl"] for row in read(tmp_path / "metrics.jsonl") if "kl" in row] == [0.0, 1.1, 2.1]


@contextlib.contextmanager
def weights_and_biases(monkeypatch, mode: str) -> Iterator[None]:
    """Its process, which it keeps as long as this one lives, lives so long."""
    import wandb

    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", mode)
    yield
    wandb.teardown()


def records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format: blocks of 32 KiB, in which a record may be cut into pieces."""
    block, header, at, record = 2**15, 7, 7, b""  # the file's own header is as long
    while at < len(data):
        if at % block > block - header:  # no room for another
            at += block - at % block
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + header])
        record += data[at + header : at + header + length]
        at += header + length
        if kind in (1, 4):  # whole, or its last piece
            yield record
            record = b""


def test_weights_and_biases_gets_every_figure_and_a_resumed_run_goes_on_with_it(tmp_path, monkeypatch, nothing_left):
    """Offline, read from the file that it would send."""
    from wandb.proto import wandb_internal_pb2

    with weights_and_biases(monkeypatch, "offline"):
        for step in (0, 1):
            logged(tmp_path, step, wandb=True)
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1  # one run
    found, settings = [], {}
    for file in files:
        for record in map(wandb_internal_pb2.Record.FromString, records(file.read_bytes())):
            items = {item.nested_key[0] if item.nested_key else item.key: item for item in record.history.item}
            found.append({name: json.loads(item.value_json) for name, item in items.items() if name[0] != "_"})
            settings |= {update.key: json.loads(update.value_json) for update in record.run.config.update}
    kl = [(row["step"], row["train/kl"]) for row in found if "train/kl" in row]
    assert kl == [(1, 0.0), (2, 1.0), (2, 1.1), (3, 2.1)]
    assert [(row["step"], row["eval/pass@1"]) for row in found if "eval/pass@1" in row] == [(2, 0.75), (3, 0.85)]
    assert settings["steps"] == 9 and settings["model"] == "m"


def test_a_tracker_that_breaks_is_left_out_and_said_once(tmp_path, capsys):
    class Broken:
        def log(self, figures, step):
            raise ConnectionError("gone")

        def close(self):
            raise AssertionError

    log = Log(tmp_path, Config(steps=3), trackers=[Broken()])
    for step in (1, 2):
        log.evaluation(step, {"pass@1": 0.5})
    log.close()
    assert capsys.readouterr().out.count("Broken gets no more metrics (gone): metrics.jsonl has them all") == 1
    assert len(read(tmp_path / "metrics.jsonl")) == 2


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_one_that_is_not_installed_is_named_before_anything_is_loaded(name, main, monkeypatch, tmp_path):
    monkeypatch.setattr(config_module.importlib.util, "find_spec", lambda package: None)
    done = main(f"--{name}", "--out", tmp_path / "run")
    assert done.code == 2 and not (tmp_path / "run").exists()
    assert done.err == f"tba: {name} is not installed: pip install {name}, or leave --{name} out\n"


def test_what_weights_and_biases_refuses_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with (
        weights_and_biases(monkeypatch, "online"),
        pytest.raises(ValueError, match=r"^wandb cannot begin: .*WANDB_MODE=offline, helps\)$"),
    ):
        wanted(tmp_path, Config(model="m", wandb=True), 0)
