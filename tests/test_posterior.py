"""Trajectory balance is exact off-policy: it reaches pi* ~ pi_ref exp(r/beta) from data of any origin."""

import functools
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench import posterior
from bench.posterior import BETA, PROMPTS, RESPONSES, RUNS, STALENESS, World, make_model, train
from loss import OBJECTIVES, tb

long = pytest.mark.long


@pytest.mark.parametrize(
    ("name", "data", "staleness", "updates"),
    [
        pytest.param("tb", "policy", 0, 600, marks=long),
        pytest.param("tb", "policy", 100, 500, marks=long),
        pytest.param("tb_tapered", "policy", 64, 800, marks=long),
        ("tb", "uniform", 0, 400),
    ],
)
def test_trajectory_balance_reaches_the_posterior(name, data, staleness, updates):
    """From its own samples, from samples that are tens of updates old, and from uniformly random responses."""
    reached = train(name, data, staleness, 0, updates)
    assert reached["kl"] <= 0.01 and reached["modes"] == 12


def test_a_wrong_objective_does_not(monkeypatch):
    """What the proof is worth: where a reward counts twice, it ends elsewhere, by far."""
    wrong = functools.wraps(tb)(lambda batch, beta: tb(batch, beta / 2))
    monkeypatch.setitem(OBJECTIVES, "tb", wrong)
    assert train("tb", "uniform", 0, seed=0, updates=300)["kl"] > 0.1


def test_the_enumeration_is_right(tmp_path):
    make_model(0, str(tmp_path))
    model, world = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), World(0)
    assert len(set(RESPONSES)) == len(RESPONSES) == 121
    for logprobs in (world.logprobs(model), world.uniform()):
        torch.testing.assert_close(logprobs.sum(-1).exp().sum(-1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(world.uniform().sum(-1).exp(), torch.full((2, 121), 1 / 121, dtype=torch.float64))
    for i, j in ((0, 0), (0, 77), (1, 40), (1, 120)):
        y = list(RESPONSES[j])
        with torch.no_grad():
            table = model(torch.tensor([[*PROMPTS[i].tolist(), *y]])).logits[0].double().log_softmax(-1)
        expected = table[range(len(PROMPTS[i]) - 1, len(PROMPTS[i]) + len(y) - 1), y]
        torch.testing.assert_close(world.logprobs(model)[i, j, : len(y)], expected, atol=1e-5, rtol=0)
        assert not world.logprobs(model)[i, j, len(y) :].any()


def test_the_distance_is_zero_at_the_posterior_alone(tmp_path):
    make_model(0, str(tmp_path))
    world = World(0)
    reference = world.logprobs(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    best = (reference.sum(-1) + world.rewards / BETA).log_softmax(-1)
    there = world.distance(best[..., None], reference)
    assert there["kl"] == pytest.approx(0, abs=1e-12) and there["modes"] == 12
    start = world.distance(reference, reference)
    assert start["kl"] > 0.3 and start["tv"] > 0.3 and start["modes"] == 0


def shown(printed: str, picture) -> None:
    rows = json.loads(printed.splitlines()[-1])["rows"]
    cases = {(row["loss"], row["data"], row["staleness"]) for row in rows}
    assert cases == {(loss, *at) for loss in RUNS for at in [*(("policy", s) for s in STALENESS), ("uniform", None)]}
    assert all(row["kl"] > 0 and 0 < row["tv"] < 1 and 0 <= row["modes"] <= 12 for row in rows)
    assert picture.stat().st_size > 10_000


COMMAND = ["bench.posterior", "--quick", "--json", "--updates", "1", "--picture"]


def test_the_bench_prints_every_case_and_draws(tmp_path, monkeypatch, capsys):
    """In this process, which spares two others importing everything."""
    monkeypatch.setattr(posterior, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(1))
    monkeypatch.setattr(sys, "argv", [*COMMAND, str(tmp_path / "posterior.png")])
    posterior.main()
    shown(capsys.readouterr().out, tmp_path / "posterior.png")


@long
def test_the_bench_does_so_as_it_is_typed(tmp_path):
    command = [sys.executable, "-m", *COMMAND, str(tmp_path / "posterior.png")]
    shown(subprocess.run(command, capture_output=True, text=True, check=True).stdout, tmp_path / "posterior.png")
