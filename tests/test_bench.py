"""Each bench runs, at its smallest size: what it prints can be read, and is made of what was measured."""

import asyncio
import contextlib
import json
import math
from dataclasses import replace

import pytest

from bench import buffer, overlap, search, soak, start, sync, train, vs_trl
from bench.lengths_task import folder
from bench.session import session
from tasks import countdown


def figures(capsys) -> dict:
    """What a bench printed last, as JSON."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_benches_of_a_run(embedded, few_problems, monkeypatch, capsys, nothing_left):
    """With one engine for all of them."""

    async def benches() -> None:
        async with session("--model", str(embedded[1]), "--prime", "16") as run:

            @contextlib.asynccontextmanager
            async def shared(*_, **__):
                yield run

            for bench in (overlap, search, sync, train, vs_trl):
                monkeypatch.setattr(bench, "session", shared)
            await overlap.main(["--repeats", "2", "--updates", "3", "--json"])
            found = figures(capsys)
            for each in found["repeats"]:
                assert each["responses"] > 0 and each["together"] > 0
                alone = max(each["search alone"], each["train alone"])
                assert each["overlap_efficiency"] == pytest.approx(alone / each["together"])
                alternately = each["search alternately"] + each["train alternately"]
                assert each["speedup"] == pytest.approx(alternately / each["together"])
            assert found["speedup"] == pytest.approx(sum(each["speedup"] for each in found["repeats"]) / 2)
            await search.main(["--repeats", "1", "--seconds", "2", "--json"])
            found = figures(capsys)
            assert found["searcher"] == found["search"] / found["bare"] > 0 and 0 < found["loop"] < 1
            monkeypatch.setattr(sync, "SYNCS", 1)
            before = run.searcher.engines[0].version
            await sync.main(["--repeats", "1", "--task", "countdown", "--json"])
            found = figures(capsys)
            assert found["idle_ms"] > 0 and found["over_memcpy"] == found["stall_ms"] / found["memcpy_ms"]
            assert run.searcher.engines[0].version == run.step > before
            (found,) = await train.beside(1, 2, [])
            assert 0 < found["beside_search"] < 100
            monkeypatch.setattr(vs_trl, "EVERY", 0.2)
            run.config = replace(run.config, steps=10**6)
            first, *_, last = policies = await vs_trl.ours(0, 1.0, [])
            assert 0 < first.seconds < last.seconds < 30 and first.step < last.step
            assert await vs_trl.our_speed(str(embedded[1]), 8, 4, 0.1) > 0
            monkeypatch.setitem(countdown.PROBLEMS, "test", countdown.Task.Settings().eval_prompts + 8)
            exam = vs_trl.Exam(str(embedded[1]), 8)
            assert 0 <= exam(first)["pass@1"] <= 1 and exam.first_good(policies).keys() >= {"seconds", "distinct"}

    asyncio.run(benches())


def test_the_bench_of_the_trainer(capsys):
    train.main(["--parts", "lengths", "utilization", "--size", "tiny", "--repeats", "1", "--json"])
    found = figures(capsys)
    for name in train.LENGTHS:
        assert found[f"chosen_{name}"] in (1.0, found[f"packed_{name}"])
    assert 0 < found["utilization_adamw"] < 1
    assert 5 < train.memory(0.4) < 12


def test_the_bench_of_the_buffer(capsys):
    buffer.main(["--sizes", "1", "200", "--repeats", "1", "--json"])
    assert [row["responses"] for row in figures(capsys)["rows"]] == [1, 200]


def test_the_bench_of_the_start(embedded):
    parts = start.start(["--model", str(embedded[1])])
    assert parts.pop("first_update") == pytest.approx(sum(parts.values()))
    assert parts.keys() == {"imports", "policy", "engine", "priming"} and min(parts.values()) > 0


def test_the_bench_of_faults(embedded, capsys):
    soak.main(["--faults", "1", "--pause", "0", "0", "--json", "--model", str(embedded[1]), "--eval-prompts", "8"])
    found = figures(capsys)
    assert found["exit_code"] == 143 and found["each_update_once"] and found["updates"] == found["newest_checkpoint"]
    assert sum(found["recoveries"].values()) == 1


def test_a_policy_is_good_once_it_stays_so(monkeypatch):
    """At 0.5 for three evaluations in a row; one that falls below begins anew."""
    policies = [vs_trl.Policy(float(step), step, {}) for step in range(1, 9)]
    accuracy = dict(zip(range(1, 9), (0.3, 0.6, 0.4, 0.5, 0.7, 0.6, 0.2, 0.9), strict=True))
    monkeypatch.setattr(vs_trl, "SUSTAINED", 3)
    monkeypatch.setattr(vs_trl.Exam, "__init__", lambda self: None)
    monkeypatch.setattr(
        vs_trl.Exam, "__call__", lambda self, policy: {"pass@1": accuracy[policy.step], "distinct": 10.0 * policy.step}
    )
    assert vs_trl.Exam().first_good(policies) == {"seconds": 4.0, "step": 4, "distinct": 40.0, "steps_per_s": 1.0}
    assert math.isnan(vs_trl.Exam().first_good(policies[:5])["seconds"])


@pytest.mark.skipif(not (vs_trl.VENV / "made").is_file(), reason="python -m bench.vs_trl installs TRL")
def test_trl_trains_on_the_same_task(embedded):
    few = {"per_device_train_batch_size": 16, "num_generations": 8}
    first, *_ = vs_trl.trls(0, 1.5, few, str(embedded[1]))
    assert first.step >= 1 and set(first.weights) >= {"model.embed_tokens.weight"}
    assert vs_trl.trl_speed(folder("tiny"), 8, 4, 2.0) > 0
