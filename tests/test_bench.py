"""Each bench runs, at its smallest size: what it prints can be read, and is made of what was measured."""

import asyncio
import contextlib
import importlib
import json
import math
import subprocess

import numpy as np
import pytest

from bench import buffer, overlap, scale, search, soak, staleness, start, sweep, sync, train, vs_trl
from bench.lengths_task import folder
from bench.session import session
from bench.simulation import Costs, Run
from buffer import Response
from tasks import Answered, Problem, countdown
from train.trainer import Trainer


def figures(capsys) -> dict:
    """What a bench printed last, as JSON."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.long
def test_benches_of_a_run(embedded, few_problems, monkeypatch, capsys, nothing_left):
    """With one engine for all of them."""

    async def benches() -> None:
        async with session("--model", str(embedded[1]), "--prime", "16", "--max-num-seqs", "32") as run:

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
            await search.main(["--repeats", "1", "--seconds", "0.5", "--json"])
            found = figures(capsys)
            assert found["searcher"] == found["search"] / found["bare"] > 0
            assert 0 < found["loop"] < 1 and 0 < found["filled"] <= 1 and found["vllm_defaults"] > 0
            monkeypatch.setattr(sync, "SYNCS", 1)
            await sync.main(["--repeats", "1", "--task", "countdown", "--json"])
            found = figures(capsys)
            assert found["idle_ms"] > 0 and found["step_ms"] > 0 and found["syncing"] > 0
            assert found["over_memcpy"] == found["stall_ms"] / found["memcpy_ms"]
            assert run.searcher.weights.version == run.progress.step > 0
            (found,) = await train.beside(1, 2, [])
            assert 0 < found["beside_search"] < 100
            monkeypatch.setattr(vs_trl, "EVERY", 0.1)
            first, *_, last = policies = await vs_trl.ours(0, 2.0, [])
            assert 0 < first.seconds < last.seconds < 30 and first.step < last.step
            assert await vs_trl.our_speed(str(embedded[1]), 8, 4, 0.1) > 0
            monkeypatch.setitem(countdown.PROBLEMS, "test", countdown.Task.Settings().eval_prompts + 8)
            exam = vs_trl.Exam(str(embedded[1]), 8)
            assert 0 <= exam(first)["pass@1"] <= 1 and exam.milestones(policies).keys() >= {
                "s to 0.5",
                "distinct at 0.65",
            }

    asyncio.run(benches())


def test_the_bench_of_the_trainer(monkeypatch, capsys):
    shapes = {name: (B, 4, prompt // 8, mean // 8, 4) for name, (B, _, prompt, mean, _) in train.LENGTHS.items()}
    monkeypatch.setattr(train, "LENGTHS", shapes)
    train.main(["--parts", "lengths", "utilization", "memory", "--size", "tiny", "--repeats", "1", "--json"])
    found = figures(capsys)
    for name in shapes:
        assert found[f"chosen_{name}"] in (1.0, found[f"packed_{name}"])
    assert 0 < found["utilization_adamw"] < 1 and 4 < found["peak_gib_at_most"] < 40


def test_the_bench_of_the_buffer(capsys):
    buffer.main(["--sizes", "1", "200", "--repeats", "1", "--json"])
    assert [row["responses"] for row in figures(capsys)["rows"]] == [1, 200]


@pytest.mark.long
def test_the_bench_of_the_start(embedded):
    parts = start.start(["--model", str(embedded[1])])
    assert parts.pop("first_update") == pytest.approx(sum(parts.values()))
    assert parts.keys() == {"imports", "policy", "engine", "priming"} and min(parts.values()) > 0


@pytest.mark.long
def test_the_bench_of_faults(embedded, capsys):
    soak.main(["--faults", "1", "--pause", "0", "0", "--json", "--model", str(embedded[1]), "--eval-prompts", "8"])
    found = figures(capsys)
    assert found["exit_code"] == 143 and found["each_update_once"] and found["updates"] == found["newest_checkpoint"]
    assert sum(found["recoveries"].values()) == 1


def test_sweeps_tabulate_finished_runs(tmp_path, monkeypatch, capsys):
    """tba.py is not started here: a file of metrics stands for what it leaves."""
    importlib.import_module("matplotlib.pyplot")  # the first time it runs fc-list, by what is replaced below
    evaluation = {"eval/pass@1": 0.5, "eval/greedy": 0.625, "eval/pass@k": 0.75, "eval/distinct": 1.25}
    updates = [{"step": step, "time": 0.5 * step, "loss": 0.1, "kl": step} for step in (1, 2)]
    last = {"step": 2, "time": 9.0} | evaluation | {"eval/pass@1": 0.875}
    rows = [{"step": 0, "time": 0.0} | evaluation, *updates, last]
    commands = []

    def finished(command, **_):
        commands.append(command)
        out = tmp_path / command[command.index("--out") + 1]
        out.mkdir(parents=True)
        (out / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(sweep.subprocess, "run", finished)
    for settings, count in (
        (["objectives", "--losses", "tb", "grpo"], 2),
        (["search", "--steps", "60", "--ratios", "1", "2"], 6),
    ):
        for again in (False, True):  # a run that is there is not made again
            commands.clear()
            sweep.main([*settings, "--seeds", "1", "--out", str(tmp_path), "--json"])
            assert len(commands) == (0 if again else count)
            printed = capsys.readouterr().out
            for row in json.loads(printed.splitlines()[-1])["rows"]:
                assert row["pass@1 before"] == 0.5 and row["pass@1"] == 0.875
                assert (row["steps"], row["seconds"], row["kl"]) == (2, 1.0, 1.5)
            assert "| 0.875 | 0.625 | 0.750 | 1.250 | 1.500 |" in printed
    next(tmp_path.glob("grpo-2x*/bench.json")).unlink()  # an interrupted one is
    sweep.main([*settings, "--seeds", "1", "--out", str(tmp_path)])
    assert len(commands) == 1 and commands[0][commands[0].index("--steps") + 1] == "120"  # as many responses
    capsys.readouterr()
    run, picture = commands[0][commands[0].index("--out") + 1], tmp_path / "curves.png"
    sweep.main(["curves", run, "--picture", str(picture)])
    assert capsys.readouterr().out.splitlines()[-1].endswith(" | 0.500 | 0.875 | 1 |")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_policy_is_good_once_it_stays_so(monkeypatch):
    """At 0.5 for three evaluations in a row; one that falls below begins anew."""
    policies = [vs_trl.Policy(float(step), step, {}) for step in range(1, 9)]
    accuracy = dict(zip(range(1, 9), (0.3, 0.6, 0.4, 0.5, 0.7, 0.6, 0.2, 0.9), strict=True))
    monkeypatch.setattr(vs_trl, "SUSTAINED", 3)
    monkeypatch.setattr(vs_trl.Exam, "__init__", lambda self: None)
    monkeypatch.setattr(
        vs_trl.Exam, "__call__", lambda self, policy: {"pass@1": accuracy[policy.step], "distinct": 10.0 * policy.step}
    )
    found = vs_trl.Exam().milestones(policies)
    assert (found["s to 0.5"], found["distinct at 0.5"], found["updates/s"]) == (4.0, 40.0, 1.0)
    assert math.isnan(found["s to 0.65"]) and math.isnan(found["distinct at 0.65"])
    assert math.isnan(vs_trl.Exam().milestones(policies[:5])["s to 0.5"])


def scaled(*settings: str):
    return scale.parse(["--task", "gsm8k", *settings])


def test_an_engine_generates_what_its_tokens_per_second_make():
    costs = Costs(0.004, 1 / 34_300 - 0.004 / 512, update=0.84, stage=0, pull=0, tokens=(200, 80))
    found = Run(costs, scaled("--steps", "40"), engines=1, slots=512).figures()
    assert found["responses/s"] == pytest.approx(34_300 / 200, rel=0.05)
    assert found["trainer idle"] == pytest.approx(0, abs=1e-9) and found["search paused"] < 0.02


def test_the_simulated_age_is_what_one_computes_by_hand():
    """An update a second, and one prompt at a time whose responses take D seconds: the update after n of them begins
    at D + n and has the last group that ended by then, which began with as many updates as were made until then."""
    D, settings = (
        2.3,
        ("--prompts-per-step", "1", "--responses-per-prompt", "4", "--search-responses", "4", "--prime", "4"),
    )
    costs = Costs(0, D / 40, update=1, stage=0, pull=0, tokens=(10, 0))
    run = Run(costs, scaled(*settings, "--on-policy-prob", "1", "--sync-every", "1", "--steps", "20"), 1, slots=4)
    began = [D * math.floor((D + n) / D - 1) for n in range(20)]
    assert run.ages == [[n - max(0, math.floor(at - D))] * 4 for n, at in enumerate(began)]


def test_a_node_that_pulls_slowly_skips_to_the_newest_weights():
    """Two nodes share a link, over which the weights of both take as long as 4.8 updates: pulls end after 5.8, 10.6,
    15.4 and 20.2 updates, and are of the newest weights when they began."""
    costs = Costs(0.05, 0, update=1, stage=0, pull=2.4, tokens=(20, 8))
    run = Run(costs, scaled("--steps", "24", "--sync-every", "1", "--on-policy-prob", "1"), 16, slots=24)
    assert {response.version for _, response in run.stored} == {0, 1, 5, 10, 15}


def test_search_saturates_where_the_trainer_does():
    """An engine generates 320 responses a second; --search-ahead 8 times 140 an update are as many as 4 engines'."""
    costs = Costs(0.01, 0, update=8 * 140 / (4 * 320), stage=0, pull=0, tokens=(20, 8))
    rows = [Run(costs, scaled("--steps", "16"), engines, slots=64).figures() for engines in (1, 2, 4, 8)]
    assert rows[scale.saturated(rows)]["searchers"] == 4
    assert rows[-1]["responses/s"] == pytest.approx(4 * 320, rel=0.05) and rows[-1]["search paused"] > 0.3


def test_the_plan_of_a_cluster_says_what_to_add(tmp_path, capsys):
    few = ["--searchers", "1", "64", "--models", "7B", "--gigabits", "10", "--steps", "8", "--std-tokens", "0"]
    scale.main([*few, "--json", "--picture", str(tmp_path / "scale.png")])
    *_, line, found = capsys.readouterr().out.splitlines()
    assert line.startswith("7B, 10 Gb/s: does not saturate by 64; ") and "Add next: " in line
    (rows,) = json.loads(found).values()
    assert [row["searchers"] for row in rows] == [1, 64] and (tmp_path / "scale.png").stat().st_size > 5000


def test_pass_at_k_is_unbiased_and_answers_are_counted_once():
    def answered(right: int) -> Answered:
        texts = [str(i % 3) for i in range(staleness.SAMPLES)]
        samples = [Response(np.array([1]), True, text=text, reward=float(i < right)) for i, text in enumerate(texts)]
        return Answered(Problem(""), np.array([1]), samples[0], samples)

    found = staleness.figures([answered(0), answered(1)])
    assert found["pass@1"] == pytest.approx(1 / 128) and found["pass@64"] == 0.5
    assert found["pass@4"] == pytest.approx(4 / 128)  # one of 64 is among 4 of them
    assert staleness.figures([answered(64)])["distinct"] == 3.0


def test_diversity_is_compared_where_pass_at_1_first_reached_a_level():
    rows = [{"pass@1": x, "distinct": y} for x, y in ((0.3, 1.0), (0.5, 3.0), (0.4, 9.0), (0.6, 9.0))]
    assert staleness.at_level(rows, 0.4, "distinct") == pytest.approx(2.0)
    assert math.isnan(staleness.at_level(rows, 0.7, "distinct"))


@pytest.mark.long
def test_batches_are_as_old_as_the_bench_of_staleness_says(embedded, monkeypatch):
    versions, update = [], Trainer.update

    def noting(trainer, groups, **settings):
        versions.append({response.version for group in groups for response in group.responses})
        return update(trainer, groups, **settings)

    monkeypatch.setattr(Trainer, "update", noting)
    asyncio.run(staleness.run("tb_tapered", 2, 0, 6, ["--model", str(embedded[1]), "--eval-prompts", "1"]))
    assert versions == [{0}, {0}, {0}, {1}, {2}, {3}]  # the sixth update, of version 5, has responses of version 3


@pytest.mark.long
def test_the_bench_of_staleness(embedded, tmp_path, capsys):
    cases = ["--seeds", "1", "--ages", "2", "--losses", "tb_tapered", "--updates", "4"]
    staleness.main([*cases, "--json", "--pictures", str(tmp_path), "--model", str(embedded[1]), "--eval-prompts", "4"])
    rows = figures(capsys)["rows"]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and {row["age"] for row in rows} == {2}
    assert all(0 <= row["pass@1"] <= row["pass@64"] <= 1 for row in rows)
    assert (tmp_path / "staleness.png").stat().st_size > 5000 and (tmp_path / "diversity.png").stat().st_size > 5000


@pytest.mark.long
@pytest.mark.skipif(not (vs_trl.VENV / "made").is_file(), reason="python -m bench.vs_trl installs TRL")
def test_trl_trains_on_the_same_task(embedded):
    few = {"per_device_train_batch_size": 16, "num_generations": 8}
    first, *_ = vs_trl.trls(0, 1.5, few, str(embedded[1]))
    assert first.step >= 1 and set(first.weights) >= {"model.embed_tokens.weight"}
    assert vs_trl.trl_speed(folder("tiny"), 8, 4, 2.0) > 0
