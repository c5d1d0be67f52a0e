"""Real vLLM engines take the trainer's weights, and give the same tokens the same log-probabilities."""

import asyncio
import os

import numpy as np
import pytest
import torch

import searcher as searcher_module
from buffer import Group, Trajectory
from engine import Engine
from loss import tb
from machine import cores
from packing import pack
from screen import Failure
from searcher import Searcher
from trainer import Trainer
from weights import compare, share

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these engines are the CPU build's")
ARCHITECTURES = [("llama", True), ("gpt_neox", False), ("gpt2", True)]  # the embedded model is a Llama, not tied


def difference(found: list[tuple[Engine, np.ndarray]], expected: np.ndarray) -> float:
    return max(float(np.abs(each - expected).max()) for _, each in found)


def drawn_from(trainer: Trainer, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Log-probability of each token of a response, at the trainer's temperature."""
    batch = pack([Group(0, prompt, [Trajectory(response, True, 0.0, 0)])], trainer.device)
    with torch.no_grad():
        return trainer.logprobs(trainer.policy, batch, trainer.temperature, trainer.min_tokens)[0].numpy()


@pytest.mark.parametrize(("architecture", "tie"), ARCHITECTURES)
def test_engine_and_trainer_agree_after_a_sync(make_model, tokenizer, tmp_path, monkeypatch, architecture, tie):
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.v1.engine.output_processor import OutputProcessor

    folder = str(make_model(architecture, tie))
    trainer = Trainer(folder, tb, "cpu", temperature=0.7)
    prompt = np.array(tokenizer("How many clips did Natalia sell?").input_ids, dtype=np.int32)
    process_outputs, told = OutputProcessor.process_outputs, []

    def listening(self, outputs, *arguments, **settings):
        told.extend(len(output.new_token_ids) for output in outputs)
        return process_outputs(self, outputs, *arguments, **settings)

    monkeypatch.setattr(OutputProcessor, "process_outputs", listening)

    async def check() -> None:
        searcher = Searcher(["cpu"], temperature=0.7, max_tokens=150)  # beyond a block of the engine
        try:
            await searcher.start(folder, 192, 0, {}, cores()[1], tmp_path / "engine.log")
            trainer.staging = await share(trainer.policy, searcher)
            trainer.publish(prompt, 0)
            await searcher.load_staging()
            responses, version = await searcher.generate(prompt, 8, logprobs=True)
            assert version == 0 and len(responses) == 8
            assert len({r.tokens.tobytes() for r in responses}) > 1
            assert sorted(told) == sorted(len(r.tokens) for r in responses)  # each told once, with all of its tokens
            for r in responses:  # what the trainer reads as the behaviour policy: temperature is in it
                assert np.abs(r.logprobs - drawn_from(trainer, prompt, r.tokens)).max() < 1e-4
            tokens = np.concatenate([prompt, responses[0].tokens])
            first = trainer.probe(tokens).numpy()
            assert difference(await searcher.prompt_logprobs(tokens), first) < 1e-4

            with torch.no_grad():
                for weight in trainer.policy.parameters():
                    weight.add_(0.05 * torch.randn_like(weight))
            second = trainer.probe(tokens).numpy()
            assert np.abs(second - first).max() > 0.1  # or nothing is shown
            in_flight = []  # where each of them ends
            running = asyncio.create_task(
                searcher.generate(prompt, 200, ended=lambda: in_flight.append(searcher.engines[0].in_flight))
            )
            await asyncio.sleep(0.01)
            trainer.publish(prompt, 7)
            assert searcher.engines[0].in_flight == 200
            await searcher.load_staging()
            assert not running.done()
            assert difference(await searcher.prompt_logprobs(tokens), second) < 1e-4
            responses, version = await running  # what was in flight went on
            assert len(responses) == 200 and version == 0
            assert len(in_flight) == 200 and in_flight[-1] == searcher.engines[0].in_flight == 0
            assert in_flight[0] > 0  # each is told of when it has ended, not all at the end
            params = SamplingParams(max_tokens=3, ignore_eos=True)
            told.clear()
            async for _ in searcher.engines[0].llm.generate(tokens_input(tokens.tolist()), params, "streamed"):
                pass
            assert told == [1, 1, 1]  # who asks for it is told as it goes
            assert (await searcher.generate(prompt, 1))[1] == 7

            trainer.staging.flat[len(trainer.staging.flat) // 2 :].zero_()  # half of the weights are lost
            await searcher.load_staging()
            with pytest.raises(RuntimeError, match="on cpu and the trainer differ by"):
                await compare(searcher, tokens, second, strict=False)  # an engine's first weights
            searcher.engines[0].agreed = True
            with pytest.raises(RuntimeError, match="on cpu and the trainer differ by"):
                await compare(searcher, tokens, second, strict=True)
            figures = await compare(searcher, tokens, second, strict=False)
            assert 1e-2 < figures["sync_diff_mean"] < figures["sync_diff_max"]
        finally:
            searcher.shutdown()

    asyncio.run(check())


def test_two_engines_share_the_requests_and_one_that_dies_is_noticed(make_model, tokenizer, tmp_path, monkeypatch):
    """And responses end where they should."""
    folder = str(make_model("llama", False))
    prompt, end = tokenizer("How many?").input_ids, tokenizer.eos_token_id
    trainer = Trainer(folder, tb, "cpu", min_tokens=3, end_token=end)
    with torch.no_grad():
        trainer.policy.lm_head.weight.mul_(0.3)
        trainer.policy.lm_head.weight[end] *= 3

    async def check() -> None:
        searcher = Searcher(["cpu", "cpu"], temperature=1.0, max_tokens=8)
        try:
            await searcher.start(folder, 64, 0, {}, os.sched_getaffinity(0), tmp_path / "engine.log")
            trainer.staging = await share(trainer.policy, searcher)
            trainer.publish(prompt, 0)
            await searcher.load_staging()
            requests = [asyncio.create_task(searcher.generate(prompt, 4)) for _ in range(2)]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert [engine.in_flight for engine in searcher.engines] == [4, 4]
            first, second = [responses for responses, _ in await asyncio.gather(*requests)]
            assert {r.tokens.tobytes() for r in first} != {r.tokens.tobytes() for r in second}
            found = await searcher.prompt_logprobs(prompt)
            assert len(found) == 2 and difference(found, trainer.probe(np.array(prompt)).numpy()) < 1e-4
            assert 0 < searcher.busy_seconds < 10
            responses, _ = await searcher.generate(prompt, 200)
            searcher.min_tokens = 3
            later, _ = await searcher.generate(prompt, 100, logprobs=True)
            cold, _ = await searcher.generate(prompt, 100, temperature=0.05)
            monkeypatch.setattr(searcher_module, "DEATHS", 0)  # test_faults.py has one that is replaced
            searcher.engines[1].llm.engine_core.resources.engine_manager.processes[0].kill()
            with pytest.raises(
                Failure, match=r"the engine on cpu is gone \(it died.*\), and 0 were before it within 10"
            ):
                await searcher.load_staging()
        finally:
            searcher.shutdown()
        # What could not end early is what the trainer takes the policy for.
        assert min(len(r.tokens) for r in responses) <= 3 < min(len(r.tokens) for r in later)
        for r in later:
            assert np.abs(r.logprobs - drawn_from(trainer, np.array(prompt), r.tokens)).max() < 1e-4
        assert len({r.tokens.tobytes() for r in cold}) < 0.5 * len({r.tokens.tobytes() for r in later})
        assert {r.finished for r in responses} == {True, False}
        for response in responses:
            assert (response.tokens[-1] == end) == response.finished
            assert end not in response.tokens[:-1]
            assert response.finished or len(response.tokens) == 8
            assert response.logprobs is None  # not asked for, not paid for

    asyncio.run(check())


def test_what_vllm_gives_up_on_is_said_in_a_line(make_model, tmp_path):
    """Here one sequence of the length that is asked for takes 2 GiB of keys and values, where the engine has 1."""
    heads = dict(num_attention_heads=64, num_key_value_heads=64, head_dim=256, max_position_embeddings=8192)
    searcher = Searcher(["cpu"], temperature=1.0, max_tokens=8000)
    try:
        with pytest.raises(Failure, match=r"^vLLM gave up on cpu: ValueError: .*8192.*\(--max-tokens.*engine.log$"):
            asyncio.run(
                searcher.start(str(make_model("llama", **heads)), 8192, 0, {}, cores()[1], tmp_path / "engine.log")
            )
    finally:
        searcher.shutdown()
