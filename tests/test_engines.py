"""Real vLLM engines take the trainer's weights, and give the same tokens the same log-probabilities."""

import asyncio
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import search.searcher as searcher_module
from buffer import Group, Response
from config import Config, RunError
from run.devices import cores, start_fork_server
from search.engine import Engine, EngineDied, EngineSettings
from search.searcher import Searcher
from search.weights import StagedWeights
from tests import imported
from train.packing import pack
from train.trainer import Trainer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these engines are the CPU build's")
LONG = [("gpt2", True), ("gemma2", True), ("cohere", True), ("granite", False)]
ARCHITECTURES = [  # the embedded model is a Llama, not tied
    ("llama", True), ("gpt_neox", False), *(pytest.param(*each, marks=pytest.mark.long) for each in LONG)
]  # fmt: skip


def settings(folder: str, tmp_path: Path, max_model_len: int, count: int = 1, **changed) -> list[EngineSettings]:
    """Of so many engines, which share the cores that search."""
    start_fork_server()
    every = dict(cores=cores()[1], log=tmp_path / "engine.log") | changed
    return [EngineSettings("cpu", folder, max_model_len, seed, **every) for seed in range(count)]


def difference(results: list[tuple[Engine, np.ndarray]], expected: np.ndarray) -> float:
    return max(float(np.abs(logprobs - expected).max()) for _, logprobs in results)


def drawn_from(trainer: Trainer, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Log-probability of each token of a response, at the trainer's temperature."""
    config = trainer.config
    batch = pack([Group(0, prompt, [Response(response, True)])], trainer.device)
    with torch.no_grad():
        return trainer.logprobs(trainer.policy, batch, config.temperature, config.min_tokens)[0].numpy()


@pytest.mark.parametrize(("architecture", "tie"), ARCHITECTURES)
def test_engine_and_trainer_agree_after_a_sync(make_model, tokenizer, tmp_path, monkeypatch, architecture, tie):
    folder = str(make_model(architecture, tie))
    trainer = Trainer(folder, Config(temperature=0.7), "cpu")
    prompt = np.array(tokenizer("How many clips did Natalia sell?").input_ids, dtype=np.int32)
    weights = StagedWeights(trainer.layout, ["cpu"])
    monkeypatch.setattr("search.engine._serve", imported.serve)

    async def check() -> None:
        engines = settings(folder, tmp_path, 192, max_num_seqs=64)
        async with Searcher(engines, weights, temperature=0.7, max_tokens=150) as searcher:  # beyond a block
            trainer.stage(weights, prompt, 0)
            await searcher.load_weights()
            responses = await searcher.generate(prompt, 8, logprobs=True)
            assert [r.version for r in responses] == [0] * 8
            assert len({r.tokens.tobytes() for r in responses}) > 1
            for r in responses:  # what the trainer reads as the behaviour policy: temperature is in it
                assert np.abs(r.logprobs - drawn_from(trainer, prompt, r.tokens)).max() < 1e-4
            again = [await searcher.generate(prompt, 2, seed=5) for _ in range(2)]
            assert [r.tokens.tobytes() for r in again[0]] == [r.tokens.tobytes() for r in again[1]]
            tokens = np.concatenate([prompt, responses[0].tokens])
            first = trainer.probe(tokens).numpy()
            assert difference(await searcher._all("prompt_logprobs", tokens.tolist()), first) < 1e-4

            with torch.no_grad():
                for weight in trainer.policy.parameters():
                    weight.add_(0.05 * torch.randn_like(weight))
            second = trainer.probe(tokens).numpy()
            assert np.abs(second - first).max() > 0.1  # or nothing is shown
            running = [asyncio.create_task(searcher.generate(prompt, 32)) for _ in range(6)]
            await asyncio.sleep(0.05)
            assert searcher.engines[0].in_flight == 192
            (_, in_vllm), *_ = await searcher._all("running")
            assert in_vllm == 64  # no more are in flight than --max-num-seqs, however many were requested
            trainer.stage(weights, prompt, 7)
            await searcher.load_weights()
            assert not any(task.done() for task in running)
            assert difference(await searcher._all("prompt_logprobs", tokens.tolist()), second) < 1e-4
            versions = [{r.version for r in await task} for task in running]  # responses in flight went on
            assert versions[0] == {0} and versions[-1] == {7}  # the last had not begun
            assert searcher.in_flight == 0
            assert searcher.engines[0]._calls == {}

            doomed = asyncio.create_task(searcher.generate(prompt, 64))
            await asyncio.sleep(0.05)
            doomed.cancel()
            await asyncio.wait({doomed})
            (_, in_vllm), *_ = await searcher._all("running")
            assert in_vllm == searcher.in_flight == 0  # a cancelled request is aborted

            weights.flat[len(weights.flat) // 2 :].zero_()  # half of the weights are lost
            await searcher.load_weights()
            with pytest.raises(RunError, match="on cpu and the trainer differ by"):
                await searcher.check_agreement(tokens, second, strict=False)  # an engine's first weights
            searcher.engines[0].agreed = True
            with pytest.raises(RunError, match="on cpu and the trainer differ by"):
                await searcher.check_agreement(tokens, second, strict=True)
            figures = await searcher.check_agreement(tokens, second, strict=False)
            assert 1e-2 < figures["sync_diff_mean"] < figures["sync_diff_max"]

            (_, modules), *_ = await searcher._all("modules")
            assert imported.needless(modules) <= {"protobuf"}  # requirements-cpu.txt says why

    asyncio.run(check())


def test_two_engines_share_the_requests_and_one_that_dies_is_noticed(make_model, tokenizer, tmp_path, monkeypatch):
    """And responses end where they should, at whichever end token the model has."""
    folder = str(make_model("llama", False))
    prompt, end, other = tokenizer("How many?").input_ids, tokenizer.eos_token_id, 11
    own = {"eos_token_id": [end, other], "repetition_penalty": 1.5, "top_k": 2}  # of its sampling only the ends count
    (Path(folder) / "generation_config.json").write_text(json.dumps(own))
    trainer = Trainer(folder, Config(min_tokens=3), "cpu", end_token=end)
    with torch.no_grad():
        trainer.policy.lm_head.weight.mul_(0.3)
        trainer.policy.lm_head.weight[[end, other]] *= 3
    weights = StagedWeights(trainer.layout, ["cpu"])

    async def check() -> None:
        engines = settings(folder, tmp_path, 64, count=2, cores=frozenset(os.sched_getaffinity(0)))
        async with Searcher(engines, weights, max_tokens=8) as searcher:
            trainer.stage(weights, np.array(prompt), 0)
            await searcher.load_weights()
            requests = [asyncio.create_task(searcher.generate(prompt, 4)) for _ in range(2)]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert [engine.in_flight for engine in searcher.engines] == [4, 4]
            first, second = await asyncio.gather(*requests)
            assert {r.tokens.tobytes() for r in first} != {r.tokens.tobytes() for r in second}
            results = await searcher._all("prompt_logprobs", prompt)
            assert len(results) == 2 and difference(results, trainer.probe(np.array(prompt)).numpy()) < 1e-4
            responses = await searcher.generate(prompt, 200)
            searcher.sampling["min_tokens"] = 3
            later = await searcher.generate(prompt, 100, logprobs=True)
            cold = await searcher.generate(prompt, 100, temperature=0.05)
            with pytest.raises(RuntimeError, match="temperature"):  # what vLLM refuses costs that request alone
                await searcher.generate(prompt, 1, temperature=-1.0)
            with pytest.raises(RuntimeError, match=r"length|longer|maximum"):
                await searcher.generate(prompt * 100, 1)
            monkeypatch.setattr(searcher_module, "MAX_DEATHS", 0)  # test_faults.py has one that is replaced
            pending = [asyncio.create_task(searcher.engines[1].call("prompt_logprobs", prompt)) for _ in range(3)]
            await asyncio.sleep(0)
            searcher.engines[1].process.kill()
            outcomes = await asyncio.gather(*pending, return_exceptions=True)
            assert all(isinstance(each, (EngineDied, np.ndarray)) for each in outcomes)  # none waits for ever
            with pytest.raises(EngineDied):
                await searcher.engines[1].call("running")
            with pytest.raises(
                RunError, match=r"the engine on cpu is gone \(it died.*\), and 0 were before it within 10"
            ):
                await searcher.load_weights()
        # What could not end early is what the trainer takes the policy for.
        assert min(len(r.tokens) for r in responses) <= 3 < min(len(r.tokens) for r in later)
        for r in later:
            assert np.abs(r.logprobs - drawn_from(trainer, np.array(prompt), r.tokens)).max() < 1e-4
        assert len({r.tokens.tobytes() for r in cold}) < 0.5 * len({r.tokens.tobytes() for r in later})
        assert {r.finished for r in responses} == {True, False}
        assert {r.tokens[-1] for r in responses if r.finished} == {end, other}
        for response in responses:
            assert (response.tokens[-1] in (end, other)) == response.finished
            assert not {end, other} & {*response.tokens[:-1]}
            assert response.finished or len(response.tokens) == 8
            assert response.logprobs is None  # not requested, not paid for

    asyncio.run(check())


@pytest.mark.parametrize(
    ("error", "complaint"),
    [
        (RuntimeError(f"KeyError: 'experts' {'x' * 999}"), r"^vLLM cannot load .* KeyError: 'experts' x{1,200}$"),
        (RunError("the engine on cpu lives, but has not answered"), "^the engine on cpu lives"),
    ],
)
def test_weights_that_vllm_has_by_other_names_end_the_run_in_a_line(monkeypatch, error, complaint):
    async def refuse(*_):
        raise error

    searcher = Searcher([], SimpleNamespace(version=0))
    monkeypatch.setattr(searcher, "_all", refuse)
    with pytest.raises(RunError, match=complaint):
        asyncio.run(searcher.load_weights())


def test_why_vllm_gave_up_is_one_line(make_model, tmp_path):
    """Here one sequence of the requested length takes 2 GiB of keys and values, where the engine has 1."""
    heads = dict(num_attention_heads=64, num_key_value_heads=64, head_dim=256, max_position_embeddings=8192)
    engines = settings(str(make_model("llama", **heads)), tmp_path, 8192)

    async def check() -> None:
        async with Searcher(engines, max_tokens=8000):
            pass

    with pytest.raises(RunError, match=r"^vLLM gave up on cpu: ValueError: .*8192.*\(--max-tokens.*engine.log$"):
        asyncio.run(check())
