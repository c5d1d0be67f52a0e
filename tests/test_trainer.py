"""Packed log-probabilities are those of plain rows, and an update is the same however it is cut."""

import dataclasses
import functools
import itertools
import json
import logging
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import train.model
from buffer import Group, Response
from config import Config, OneOf, RunError
from loss import OBJECTIVES, tb
from run.check import limits
from run.snapshot import trainer_writer
from search.weights import StagedWeights
from train.cuda import cast_linears, compile_layers
from train.packing import Packed, pack, packed_length, sharing_is_faster
from train.trainer import Trainer

ARCHITECTURES = [("llama", False), ("llama", True), ("gpt_neox", False), ("gpt2", True)]
SCALED = [("gemma2", True), ("cohere", True), ("granite", False)]  # logits, and Gemma 2's attention scores too


def make(folder, objective=None, end_token=None, checkpoint=None, **settings) -> Trainer:
    """A trainer on the CPU, with an objective that replaces the one of the settings."""
    trainer = Trainer(str(folder), Config(**settings), "cpu", end_token, checkpoint)
    trainer.objective = objective or trainer.objective
    return trainer


def update(trainer: Trainer, groups: list[Group], lr=1e-3, beta=0.1, **settings) -> dict[str, float]:
    return trainer.update(groups, lr=lr, beta=beta, **settings).result()


def weights_of(trainer: Trainer) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for weight in trainer.policy.parameters()])


def make_groups(
    vocabulary: int, groups: int = 3, k: int = 4, seed: int = 0, prompt=(3, 9), response=(1, 8)
) -> list[Group]:
    rng = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> np.ndarray:
        return rng.integers(0, vocabulary, rng.integers(low, high)).astype(np.int32)

    return [
        Group(i, tokens(*prompt), [Response(tokens(*response), True, reward=float(rng.random())) for _ in range(k)])
        for i in range(groups)
    ]


def plain_logprob(model, prompt: np.ndarray, response: np.ndarray, temperature: float) -> float:
    """By its definition: one row, no padding, every logit."""
    tokens = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
    with torch.no_grad():
        logprobs = (model(tokens).logits[0].double() / temperature).log_softmax(-1)
    at = torch.arange(len(prompt) - 1, tokens.shape[1] - 1)
    return logprobs[at, tokens[0, 1:][at]].sum().item()


def response_logprobs(trainer: Trainer, batch: Packed) -> torch.Tensor:
    """log pi(y|x) of each distinct response [U]."""
    logprobs_N, _ = trainer.logprobs(trainer.policy, batch, trainer.config.temperature)
    return batch.to_BKT(logprobs_N, torch.arange(len(batch.responses))).sum(-1)


@pytest.mark.parametrize(("architecture", "tie"), ARCHITECTURES + SCALED)
@pytest.mark.parametrize(("temperature", "share"), [(1.0, True), (1.0, False), (0.7, True)])
def test_packed_is_plain(make_model, tokenizer, architecture, tie, temperature, share):
    folder = make_model(architecture, tie)
    trainer = make(folder, temperature=temperature)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    groups = make_groups(len(tokenizer))
    batch = pack(groups, trainer.device, share=share)
    with torch.no_grad():
        found = response_logprobs(trainer, batch)
    expected = [plain_logprob(plain, g.prompt, r.tokens, temperature) for g in groups for r in g.responses]
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-3, rtol=1e-5)
    assert np.ptp(expected) > 1.0  # the model tells responses apart, or this would show nothing
    trainer.score_reference(groups)
    references = [r.ref_logprobs.sum() for g in groups for r in g.responses]
    np.testing.assert_allclose(references, expected, atol=2e-3, rtol=1e-5)


def test_one_row_for_all_groups_is_the_same(make_model, tokenizer):
    """The layout that CUDA uses, under a dense mask of the same rule."""
    trainer = make(make_model("llama", False))
    groups = make_groups(len(tokenizer))
    one_row = pack(groups, trainer.device, flex=True)
    assert one_row.tokens.shape == (1, 128)
    one_row.mask = create_mask(one_row.mask.mask_mod, 1, 1, 128, 128, "cpu")
    with torch.no_grad():
        expected = response_logprobs(trainer, pack(groups, trainer.device))
        found = response_logprobs(trainer, one_row)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_blocks_of_the_block_mask_are_those_of_every_pair_of_tokens():
    """Its tables for the forward and for the backward pass, with full, partial and empty blocks, and with padding."""
    rng, full, empty = np.random.default_rng(0), 0, 0
    shapes = [((1, 9), (1, 300)), ((100, 400), (1, 60)), ((1, 600), (100, 500)), ((128, 129), (128, 129))]
    for seed, (prompt, response) in enumerate(shapes * 6):
        groups = make_groups(50, *rng.integers(1, 5, 2), seed=seed, prompt=prompt, response=response)
        found = pack(groups, torch.device("cpu"), flex=True).mask
        T = found.shape[-1]
        expected = create_block_mask(found.mask_mod, 1, None, T, T, "cpu")
        assert (found.shape, found.BLOCK_SIZE) == (expected.shape, expected.BLOCK_SIZE)
        for way, what in itertools.product(("", "full_"), ("kv_num_blocks", "kv_indices", "q_num_blocks", "q_indices")):
            torch.testing.assert_close(getattr(found, way + what), getattr(expected, way + what), atol=0, rtol=0)
        full += int(found.full_kv_num_blocks.sum())
        empty += T // 128 * (T // 128 + 1) // 2 - int((found.kv_num_blocks + found.full_kv_num_blocks).sum())
    assert full and empty


@pytest.mark.skipif(not shutil.which("g++"), reason="flex attention on the CPU compiles with g++")
@pytest.mark.parametrize(
    ("architecture", "dense"), [("llama", "sdpa"), pytest.param("gemma2", "eager", marks=pytest.mark.long)]
)
def test_flex_attention_under_the_block_mask_is_the_same(make_model, tokenizer, architecture, dense):
    """What CUDA computes, forward, on the CPU: transformers takes the BlockMask as it is, and soft-caps."""
    folder, groups = make_model(architecture, False), make_groups(len(tokenizer))
    rows, row = pack(groups, torch.device("cpu")), pack(groups, torch.device("cpu"), flex=True)
    assert type(row.mask).__name__ == "BlockMask"
    expected, found = hidden_states(folder, dense, rows), hidden_states(folder, "flex_attention", row)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def hidden_states(folder, attention: str, batch: Packed) -> torch.Tensor:
    """[N, H], where the responses' tokens are predicted."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    mask = torch.where(batch.mask, 0.0, -1e30) if attention == "eager" else batch.mask
    with torch.no_grad():
        hidden = model.base_model(
            input_ids=batch.tokens, position_ids=batch.positions, attention_mask=mask, use_cache=False
        ).last_hidden_state
    return hidden.flatten(0, 1)[batch.source]


def test_layers_are_compiled_for_all_that_a_trainer_computes(make_model, monkeypatch):
    """What is compiled for CUDA, traced on the CPU: many a graph, of which none is refused, and none is made twice."""
    graphs = []
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)  # "no backward on CPU"
    compiled = functools.partialmethod(torch.nn.Module.compile, backend=lambda graph, _: graphs.append(graph) or graph)
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)

    def trained(architecture: str, limit: int | None = None) -> list[int]:
        trainer = make(make_model(architecture, num_hidden_layers=1))
        trainer.attention = "flex_attention"
        for model in (trainer.policy, trainer.reference):
            compile_layers(model, activation_memory_budget=1.0)
        torch._dynamo.config.recompile_limit = limit or torch._dynamo.config.recompile_limit
        counts = []
        for _ in range(2):
            trainer.probe(np.arange(20, 30, dtype=np.int32))
            for share, groups, k in [(True, 3, 4), (True, 1, 1), (False, 2, 4), (False, 1, 1), (False, 1, 4)]:
                trainer.shares_prompts = lambda groups, share=share: share
                trainer.update(make_groups(50, groups, k, response=(20, 99)), lr=1e-3, beta=0.1)
            counts.append(len(graphs))
        return counts

    with ThreadPoolExecutor(1) as thread:
        first, second = thread.submit(trained, "llama").result()
        assert 4 < first == second < 32
        with pytest.raises(FailOnRecompileLimitHit):
            thread.submit(trained, "gpt_neox", limit=2).result()  # whose layers have another code
    assert torch._dynamo.config.recompile_limit == 8  # in another thread nothing has changed


class NothingIsRead(TorchDispatchMode):
    """No number is read from a tensor: the host would wait until the GPU has done all that it was given."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation is not torch.ops.aten._local_scalar_dense.default
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_an_update_and_the_probe_are_enqueued_without_waiting(make_model, tokenizer, architecture, share, monkeypatch):
    """transformers looks for packed sequences, and in GPT-2 for padding, in rows without a mask."""
    trainer, groups = make(make_model(architecture)), make_groups(len(tokenizer))
    monkeypatch.setattr(trainer, "shares_prompts", lambda groups: share)
    with NothingIsRead():
        trainer.update(groups, lr=1e-3, beta=0.1)
        trainer.probe(np.arange(20, 30, dtype=np.int32))
        pack(groups, trainer.device, flex=True)
        with pytest.raises(AssertionError):  # or nothing is shown
            bool(trainer.policy(torch.arange(9)[None]).logits[0, 0, 0])


def test_mask_by_hand():
    """Two prompts of 2 and 1 with responses a, b and c: who may attend to whom."""
    tokens = np.arange(9, dtype=np.int32)
    one, two, three = (Response(tokens[:n], True) for n in (1, 2, 1))
    batch = pack([Group(0, tokens[:2], [one, two]), Group(1, tokens[:1], [three])], torch.device("cpu"))
    rows = ["1....", "11...", "111..", "11.1.", "11.11"]  # prompt, prompt, a, b, b
    assert ["".join("1" if x else "." for x in row) for row in batch.mask[0, 0].tolist()] == rows
    assert ["".join("1" if x else "." for x in row[:2]) for row in batch.mask[1, 0, :2].tolist()] == ["1.", "11"]
    assert batch.positions[0].tolist() == [0, 1, 2, 2, 3]
    assert batch.source.tolist() == [1, 1, 3, 5]


def weights_after(trainer: Trainer, groups: list[Group]) -> torch.Tensor:
    update(trainer, groups)
    return weights_of(trainer)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_an_update_is_the_same_however_it_is_cut(make_model, tokenizer, monkeypatch, architecture):
    folder = make_model(architecture, False)
    whole = weights_after(make(folder), make_groups(len(tokenizer)))
    in_micro_batches = weights_after(make(folder, micro_batch_tokens=1), make_groups(len(tokenizer)))
    torch.testing.assert_close(in_micro_batches, whole, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(train.model, "CHUNK", 5 * len(tokenizer))
    in_chunks = weights_after(make(folder), make_groups(len(tokenizer)))
    torch.testing.assert_close(in_chunks, whole, atol=1e-5, rtol=1e-4)
    for share in (True, False):
        monkeypatch.setattr(Trainer, "shares_prompts", lambda trainer, groups, share=share: share)
        laid_out = weights_after(make(folder), make_groups(len(tokenizer)))
        torch.testing.assert_close(laid_out, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("prompt", "responses", "length", "on_cpu", "on_gpu"),
    [
        (12, 16, 9, True, True),  # a prompt of 12 tokens is worth sharing by short responses
        (12, 16, 60, False, False),  # not by long ones
        (120, 20, 100, False, True),  # on a CPU, where a token attends to all other responses to no end
        (12, 1, 9, False, False),  # nothing to share
    ],
)
def test_prompts_are_shared_where_that_is_faster(prompt, responses, length, on_cpu, on_gpu):
    """The embedded model's size, of which bench.train measures what each layout takes."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 9, (responses, length), dtype=np.int32)
    group = Group(0, np.arange(prompt, dtype=np.int32), [Response(r, True, reward=1.0) for r in tokens])
    assert sharing_is_faster([group], False, 120_000, 128) == on_cpu
    assert sharing_is_faster([group], True, 120_000, 128) == on_gpu
    assert packed_length(group, True) == prompt + responses * length
    assert packed_length(group, False) == responses * (prompt + length)


def test_figures_are_the_same_however_an_update_is_cut(make_model, tokenizer):
    """Adam's first step forgets the gradient's scale; its norm does not. The groups differ much in length."""
    folder, groups = make_model("llama", False), make_groups(len(tokenizer))
    groups[0].responses = [dataclasses.replace(r, tokens=np.resize(r.tokens, 40)) for r in groups[0].responses]
    whole = update(make(folder), groups)
    trainer = make(folder, micro_batch_tokens=1)
    with torch.no_grad():
        _, entropy_N = trainer.logprobs(trainer.policy, pack(groups, trainer.device), 1.0)
    assert whole["entropy"] == pytest.approx(entropy_N.mean().item(), rel=1e-3)
    assert whole.keys() == {"loss", "kl", "entropy", "grad_norm", "tokens"}
    assert update(trainer, groups) == pytest.approx(whole, rel=1e-3, abs=1e-6)


# ---- the whole gradient, in float64, against autograd of the definition on plain rows ----


def in_float64(folder: Path, **settings) -> Trainer:
    """GPT-2 has no part that falls back to fp32, as rotary embeddings do."""
    trainer = make(folder, max_grad_norm=1e9, **settings)
    trainer.policy.double(), trainer.reference.double()
    with torch.no_grad():  # away from the reference
        for weight in trainer.policy.parameters():
            weight += 0.02 * torch.sin(torch.arange(weight.numel())).view_as(weight)
    return trainer


def gradient(trainer: Trainer, groups: list[Group], beta: float = 0.1) -> torch.Tensor:
    """What an update hands to the optimiser."""
    found = []
    trainer.optimizer.step = lambda: found.extend(p.grad.flatten().clone() for p in trainer.policy.parameters())
    update(trainer, groups, lr=0.0, beta=beta)
    return torch.cat(found)


def defined_gradient(trainer: Trainer, groups: list[Group], temperature: float, beta: float = 0.1) -> torch.Tensor:
    def logprob(model, prompt, response):
        tokens = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
        logprobs = (model(tokens).logits[0] / temperature).log_softmax(-1)
        return logprobs[range(len(prompt) - 1, tokens.shape[1] - 1), response.astype(np.int64)].sum()

    trainer.policy.zero_grad()
    for g in groups:
        d = torch.stack([logprob(trainer.policy, g.prompt, r.tokens) for r in g.responses])
        with torch.no_grad():
            ref = torch.stack([logprob(trainer.reference, g.prompt, r.tokens) for r in g.responses])
        d = d - ref - torch.tensor([r.reward for r in g.responses], dtype=torch.float64) / beta
        (beta / 2 * (d - d.detach().mean()).square().mean() / len(groups)).backward()
    found = torch.cat([p.grad.flatten().clone() for p in trainer.policy.parameters()])
    trainer.policy.zero_grad()
    return found


def with_rewards_in_quarters(groups: list[Group]) -> list[Group]:
    """Exact in float32."""
    for i, response in enumerate(r for g in groups for r in g.responses):
        response.reward = (i * 7 % 5) / 4
    return groups


@pytest.mark.parametrize(("temperature", "budget"), [(1.0, 16384), (0.7, 16384), (0.7, 1)])
def test_gradient_is_that_of_the_definition(make_model, tokenizer, temperature, budget):
    trainer = in_float64(make_model("gpt2", True), temperature=temperature, micro_batch_tokens=budget)
    groups = with_rewards_in_quarters(make_groups(len(tokenizer)))
    expected = defined_gradient(trainer, groups, temperature)
    torch.testing.assert_close(gradient(trainer, groups), expected, atol=1e-9, rtol=1e-6)
    assert expected.norm() > 0.1


def test_temperature_enters_the_reference(make_model, tokenizer):
    folder = make_model("gpt2", True)
    warm, cold = in_float64(folder, temperature=1.0), in_float64(folder, temperature=0.7)
    one, other = (make_groups(len(tokenizer)) for _ in range(2))
    warm.score_reference(one), cold.score_reference(other)
    pairs = zip((r for g in one for r in g.responses), (r for g in other for r in g.responses), strict=True)
    assert all(np.abs(a.ref_logprobs - b.ref_logprobs).max() > 1e-3 for a, b in pairs)


def test_the_end_of_a_sequence_counts_though_it_is_the_padding_token(make_model, tokenizer):
    """Responses that end, that end at once, that hold it twice, and that were cut off: every token counts."""
    end, trainer = tokenizer.eos_token_id, in_float64(make_model("gpt2", True))
    assert end == tokenizer.pad_token_id
    texts = [[5, 6, end], [end], [7, end, end], [8, 9, 10, 11], [5, 6]]
    responses = [Response(np.array(t, dtype=np.int32), t[-1] == end, reward=0.25 * i) for i, t in enumerate(texts)]
    groups = [Group(0, np.array([3, end, 4], dtype=np.int32), responses)]
    torch.testing.assert_close(gradient(trainer, groups), defined_gradient(trainer, groups, 1.0), atol=1e-9, rtol=1e-6)
    assert [len(r.ref_logprobs) for r in responses] == [len(t) for t in texts]
    batch = pack(groups, trainer.device)
    assert batch.target.tolist() == [token for text in texts for token in text]


def test_other_groups_and_their_order_change_nothing(make_model, tokenizer):
    trainer = in_float64(make_model("gpt2", True))
    one, two, three = with_rewards_in_quarters(make_groups(len(tokenizer)))
    alone = [gradient(trainer, [g]) for g in (one, two, three)]
    torch.testing.assert_close(gradient(trainer, [three, one, two]), sum(alone) / 3, atol=1e-9, rtol=1e-6)
    backwards = Group(one.prompt_id, one.prompt, one.responses[::-1])
    torch.testing.assert_close(gradient(trainer, [backwards]), alone[0], atol=1e-9, rtol=1e-6)


def test_one_response_or_identical_ones_teach_nothing(make_model, tokenizer):
    trainer = in_float64(make_model("gpt2", True))
    (group,) = make_groups(len(tokenizer), groups=1)
    one = group.responses[0]
    for responses in ([one], [one] * 4, [dataclasses.replace(one) for _ in range(4)]):
        found = gradient(trainer, [Group(0, group.prompt, responses)])
        assert found.isfinite().all() and found.abs().max() < 1e-9
    equal = [dataclasses.replace(r, reward=1.0) for r in group.responses]
    found = gradient(trainer, [Group(0, group.prompt, equal)])
    assert found.isfinite().all() and found.abs().max() > 1e-4  # the KL is still paid for


# ---- the behaviour policy and the reference ----


def test_behaviour_logprobs_reach_the_objective_in_their_places(make_model, tokenizer):
    folder, seen = make_model("llama", False), []

    def note(batch, beta):
        seen.append(batch)
        return batch.logprobs_BKT.sum()

    groups = make_groups(len(tokenizer))
    for i, response in enumerate(r for g in groups for r in g.responses):
        response.logprobs = -(i + np.arange(len(response.tokens), dtype=np.float32) / 100)
    trainer = make(folder, note, loss="grpo")
    update(trainer, groups, lr=0.0)
    (batch,) = seen
    share = trainer.shares_prompts(groups)
    order = sorted(range(3), key=lambda i: -packed_length(groups[i], share))  # micro-batches go by length
    for b, i in enumerate(order):
        for k, response in enumerate(groups[i].responses):
            n = len(response.tokens)
            assert batch.behaviour_BKT[b, k, :n].tolist() == pytest.approx(response.logprobs.tolist())
            assert batch.mask_BKT[b, k].tolist() == [1.0] * n + [0.0] * (batch.mask_BKT.shape[2] - n)
            assert batch.ref_BKT[b, k, :n].tolist() == pytest.approx(batch.logprobs_BKT[b, k, :n].tolist(), abs=1e-4)
            assert not batch.logprobs_BKT[b, k, n:].any()
    update(make(folder, note, loss="grpo", importance_ratio=False), groups, lr=0.0)
    assert torch.equal(seen[1].behaviour_BKT, seen[1].logprobs_BKT) and not seen[1].behaviour_BKT.requires_grad


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains(make_model, tokenizer, name):
    """Rewarded responses become likelier, from log-probabilities that another policy gave them."""
    trainer, groups = make(make_model("llama", False), loss=name), []
    for group in make_groups(len(tokenizer)):
        trainer.score_reference([group])
        for i, response in enumerate(group.responses):
            response.reward, response.logprobs = float(i == 0), response.ref_logprobs - 0.01
        groups.append(group)
    for _ in range(5):
        figures = update(trainer, groups, beta=0.05)
    assert all(np.isfinite(value) for value in figures.values())
    with torch.no_grad():
        after = response_logprobs(trainer, pack(groups, trainer.device))
    gained = after.view(3, 4) - torch.tensor([[float(r.ref_logprobs.sum()) for r in g.responses] for g in groups])
    assert (gained[:, 0] > gained[:, 1:].mean(1)).all()


@pytest.mark.parametrize("tie", [False, True])
def test_a_reference_with_cast_linears_computes_the_same_under_autocast(make_model, tie):
    """What CUDA does, with the CPU's autocast: the reference starts as exactly the policy."""
    folder, tokens = make_model("llama", tie), torch.arange(40)[None]
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2))
    cast_linears(reference.requires_grad_(False), torch.bfloat16)
    half = sum(p.numel() for p in reference.parameters() if p.dtype == torch.bfloat16)
    assert half > 0.45 * sum(p.numel() for p in reference.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(policy(tokens).logits, reference(tokens).logits)
        everything = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        assert not torch.equal(policy(tokens).logits, everything(tokens).logits)  # or nothing is shown


class Casts(TorchDispatchMode):
    """Counts the casts of weights of that shape."""

    def __init__(self, shape: tuple[int, int]):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation is torch.ops.aten._to_copy.default and args[0].shape == self.shape
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("tie", [False, True])
def test_the_head_is_cast_once_for_all_chunks_and_their_backward_pass(make_model, tokenizer, monkeypatch, tie):
    """Under autocast, whose own cache has no frozen weights, and none in a recomputation."""
    trainer, groups = make(make_model("llama", tie)), make_groups(len(tokenizer))
    cast_linears(trainer.reference, torch.bfloat16)
    trainer.autocast = torch.autocast("cpu", torch.bfloat16)
    found = []
    for chunk in (2**26, 5 * len(tokenizer)):
        monkeypatch.setattr(train.model, "CHUNK", chunk)
        with Casts((len(tokenizer), 64)) as reference:
            trainer.score_reference(groups)
        with Casts((len(tokenizer), 64)) as policy:
            found.append(gradient(trainer, groups))
        assert (reference.count, policy.count) == (tie, 2)  # and the gradient's, back
        groups = make_groups(len(tokenizer))
    torch.testing.assert_close(*found, atol=0.02 * found[0].abs().max().item(), rtol=0)


def test_a_reset_reference_is_the_policy_and_each_response_is_scored_once_more(make_model, tokenizer, monkeypatch):
    trainer, groups = make(make_model("llama", True)), make_groups(len(tokenizer))
    scored = []
    logprobs = trainer.logprobs

    def note(model, batch, *arguments):
        if model is trainer.reference:
            scored.append(len(batch.responses))
        return logprobs(model, batch, *arguments)

    monkeypatch.setattr(trainer, "logprobs", note)
    assert update(trainer, groups)["kl"] == pytest.approx(0, abs=1e-4)
    assert abs(update(trainer, groups)["kl"]) > 0.1
    assert scored == [12]
    trainer.reset_reference()
    assert update(trainer, groups)["kl"] == pytest.approx(0, abs=1e-4)
    update(trainer, groups)
    assert scored == [12, 12]


def test_a_checkpoint_has_the_reference_that_was_reset(make_model, tokenizer, tmp_path):
    folder = make_model("llama", True)
    trainer, groups = make(folder), make_groups(len(tokenizer))
    update(trainer, groups)
    trainer.reset_reference()
    update(trainer, groups)
    for name in ("step-2", "step-3"):  # also when it is saved again after it was loaded
        trainer_writer(trainer)(tmp_path / name)
        trainer = make(folder, checkpoint=tmp_path / name)
    fresh = make_groups(len(tokenizer))
    trainer.score_reference(groups), trainer.score_reference(fresh)
    for old, new in zip(groups[0].responses, fresh[0].responses, strict=True):
        np.testing.assert_allclose(old.ref_logprobs, new.ref_logprobs, atol=1e-5)
    unset = make(folder)
    unset.score_reference(other := make_groups(len(tokenizer)))
    assert np.abs(other[0].responses[0].ref_logprobs - fresh[0].responses[0].ref_logprobs).max() > 1e-2


# ---- what an objective of one's own reads and returns ----


@pytest.mark.parametrize("sizes", [[1, 1, 1], [2, 1], [3]])  # of the micro-batches
def test_metrics_of_an_objective_are_means_over_the_groups_however_an_update_is_cut(make_model, tokenizer, sizes):
    seen, groups = [], make_groups(len(tokenizer))

    def with_metrics(batch, beta):
        seen.append(len(batch.rewards_BK))
        first_B, length_BK = batch.rewards_BK[:, 0], batch.mask_BKT.sum(-1)
        return tb(batch, beta), {"first": first_B.mean(), "length": length_BK.mean(), "beta": beta}

    trainer, plain = (make(make_model("llama", False), each) for each in (with_metrics, tb))
    share = trainer.shares_prompts(groups)
    trainer.micro_batch_tokens = plain.micro_batch_tokens = sizes[0] * max(packed_length(g, share) for g in groups)
    figures = update(trainer, groups)
    assert seen == sizes
    assert figures["first"] == pytest.approx(np.mean([g.responses[0].reward for g in groups]))
    assert figures["length"] == pytest.approx(np.mean([len(r.tokens) for g in groups for r in g.responses]))
    assert figures["beta"] == pytest.approx(0.1)
    others = update(plain, groups)
    assert {name: figures[name] for name in others} == others


@pytest.mark.parametrize("tokens", [1, 10_000])
def test_per_token_values_reach_the_objective_in_their_places(make_model, tokenizer, tokens):
    """0 in the padding, and where a response has none, though no other of its micro-batch has."""
    seen, groups = [], make_groups(len(tokenizer))

    def note(batch, beta):
        seen.extend(zip(batch.rewards_BK.flatten(), batch.extra["mine"].flatten(0, 1), strict=True))
        assert batch.extra["mine"].shape == batch.mask_BKT.shape and batch.extra["mine"].dtype == torch.float32
        return batch.logprobs_BKT.sum()

    responses = [r for g in groups for r in g.responses]
    for i, response in enumerate(responses[:7]):  # of the second group one has none, the third has none at all
        response.per_token = {"mine": 1 + i + np.arange(len(response.tokens), dtype=np.float32) / 100}
    update(make(make_model("llama", False), note, micro_batch_tokens=tokens), groups)
    by_reward = {round(float(reward), 6): values.tolist() for reward, values in seen}
    assert len(by_reward) == 12
    for response in responses:
        values, length = by_reward[round(response.reward, 6)], len(response.tokens)
        expected = response.per_token["mine"].tolist() if response.per_token else [0.0] * length
        assert values == expected + [0.0] * (len(values) - length)


# ---- an update ----


def test_gradient_is_clipped_and_reported_before_clipping(make_model, tokenizer):
    folder = make_model("llama", False)
    trainer, free = make(folder, max_grad_norm=1e-3), make(folder, max_grad_norm=1e9)
    seen = {}
    for name, each in (("clipped", trainer), ("free", free)):
        step = each.optimizer.step

        def note(step=step, each=each, name=name):
            seen[name] = torch.cat([p.grad.flatten() for p in each.policy.parameters()]).norm().item()
            step()

        each.optimizer.step = note
    reported = update(trainer, make_groups(len(tokenizer)))["grad_norm"]
    assert reported == pytest.approx(update(free, make_groups(len(tokenizer)))["grad_norm"], rel=1e-3)
    assert seen["clipped"] == pytest.approx(1e-3, rel=1e-3)
    assert seen["free"] == pytest.approx(reported, rel=1e-3)


def test_an_update_that_runs_out_of_memory_is_made_again_in_halves(make_model, tokenizer, caplog, monkeypatch):
    """The process may take 200 MiB more, where the whole update takes more than twice that; then none at all."""
    monkeypatch.setattr(logging.getLogger("tba"), "propagate", True)  # whatever handler the command has given it
    caplog.set_level(logging.INFO, "tba")
    folder, rng = make_model("llama", False), np.random.default_rng(0)

    def response(length: int) -> Response:
        tokens = rng.integers(0, len(tokenizer), length).astype(np.int32)
        return Response(tokens, True, reward=float(rng.random()))

    groups = [Group(i, np.arange(8, dtype=np.int32), [response(150) for _ in range(8)]) for i in range(16)]
    free, short = make(folder, micro_batch_tokens=2500), make(folder, micro_batch_tokens=20_000)
    update(free, groups)
    limits = resource.getrlimit(resource.RLIMIT_AS)

    def with_room(mebibytes: int, groups: list[Group]) -> dict[str, float]:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + mebibytes * 2**20, limits[1]))
        try:
            return update(short, groups)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)

    with_room(200, groups)
    assert short.micro_batch_tokens in (10_000, 5_000, 2_500)
    assert caplog.text.count(f"--micro-batch-tokens {short.micro_batch_tokens}") == 1
    for mine, other in zip(short.policy.parameters(), free.policy.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)
    before = [weight.clone() for weight in short.policy.parameters()]
    long = [Group(0, np.arange(8, dtype=np.int32), [response(900) for _ in range(24)])]
    with pytest.raises(RunError, match=r"on a single group of 21792 tokens: lower --responses-per-prompt"):
        with_room(0, long)
    assert all(torch.equal(a, b) for a, b in zip(before, short.policy.parameters(), strict=True))


def test_a_loss_that_is_no_single_number_is_named(make_model):
    def each(batch, beta):
        return (batch.logprobs_BKT - batch.ref_BKT).sum(-1)

    trainer = make(make_model("llama"), each)
    tokens = np.array([1, 2], np.int32)
    groups = [Group(0, tokens, [Response(tokens, True, reward=0.0), Response(tokens + 1, True, reward=0.0)])]
    with pytest.raises(RunError, match=r"loss each gives a \[1, 2\]: it must give one number"):
        update(trainer, groups)


@pytest.mark.parametrize("where", ["loss", "gradient", "one token"])
def test_an_update_that_is_not_finite_is_not_made(make_model, tokenizer, where):
    trainer, groups = make(make_model("llama", False)), make_groups(len(tokenizer))
    update(trainer, groups)
    before = [weight.clone() for weight in trainer.policy.parameters()]

    def spoiled(batch, beta):
        if where == "gradient":
            batch.logprobs_BKT.register_hook(lambda gradient: gradient * float("inf"))
        return tb(batch, beta) * (float("nan") if where == "loss" else 1)

    trainer.objective = spoiled
    if where == "one token":
        groups[1].responses[2].ref_logprobs[0] = -np.inf
    figures = update(trainer, groups)
    assert not (np.isfinite(figures["loss"]) and np.isfinite(figures["grad_norm"]))
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.parameters(), strict=True))
    trainer.objective = tb
    figures = update(trainer, make_groups(len(tokenizer)))  # nothing of it is left
    assert np.isfinite(figures["grad_norm"]) and not torch.equal(before[0], next(trainer.policy.parameters()))


def test_updates_reach_the_posterior_of_the_responses_at_hand(make_model, tokenizer):
    """On one group TB's optimum is log pi - log pi_ref = r/beta up to a constant: the loss goes to 0."""
    trainer = make(make_model("llama", False), max_grad_norm=1e9)
    groups = make_groups(len(tokenizer), groups=1)
    losses = [update(trainer, groups, beta=1.0, lr=1e-4)["loss"] for _ in range(150)]
    assert losses[-1] < 1e-3 * losses[0]
    with torch.no_grad():
        batch = pack(groups, trainer.device)
        references = torch.tensor([r.ref_logprobs.sum() for r in batch.responses])
        log_ratio = response_logprobs(trainer, batch) - references
    rewards = torch.tensor([r.reward for r in batch.responses])
    torch.testing.assert_close(log_ratio - log_ratio.mean(), rewards - rewards.mean(), atol=0.05, rtol=0)


@pytest.mark.parametrize("bad", [{}, {"temperature": 0.9}, {"top_p": 0.6, "temperature": 0.6}])
def test_a_model_with_a_generation_config_that_contradicts_itself_can_be_saved(make_model, tmp_path, bad):
    """transformers reads it and refuses to write it: a run would end at its first checkpoint."""
    folder = make_model("llama", False)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "eos_token_id": [2, 5]} | bad))
    trainer = make(folder)
    assert trainer.end_tokens.tolist() == [2, 5]
    trainer_writer(trainer)(tmp_path / "checkpoint")
    assert make(folder, checkpoint=tmp_path / "checkpoint").end_tokens.tolist() == [2, 5]


@pytest.mark.parametrize("optimizer", limits(Config)["optimizer"][OneOf])
def test_a_resumed_trainer_makes_the_updates_that_an_unbroken_one_makes(make_model, tokenizer, tmp_path, optimizer):
    folder, groups = make_model("llama", False), make_groups(len(tokenizer))
    trainer, weights = make(folder, optimizer=optimizer), []
    for _ in range(2):
        update(trainer, groups)
    write = trainer_writer(trainer)
    torch.manual_seed(0)  # bf16 weights are rounded stochastically
    weights = [weights_after(trainer, groups) for _ in range(2)]  # training goes on while it is written
    write(tmp_path)
    resumed = make(folder, optimizer=optimizer, checkpoint=tmp_path)
    torch.manual_seed(0)
    torch.testing.assert_close([weights_after(resumed, groups) for _ in range(2)], weights, atol=0, rtol=0)


def test_staged_weights_are_the_policy_and_so_is_what_it_gives_the_probe(make_model, tokenizer):
    folder, probe = make_model("llama", True), np.arange(20, 30, dtype=np.int32)
    trainer = make(folder, temperature=0.7)
    weights = StagedWeights(trainer.layout, ["cpu"])
    staged = trainer.stage(weights, probe, step=3)
    weights.wait()
    update(trainer, make_groups(len(tokenizer)))  # changes neither
    assert weights.version == 3 and staged.ready
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert weights.views.keys() == dict(model.named_parameters(remove_duplicate=False)).keys()
    for name, weight in model.named_parameters(remove_duplicate=False):
        assert torch.equal(weights.views[name], weight)
    expected = [plain_logprob(model, probe[: i + 1], probe[i + 1 : i + 2], 1.0) for i in range(9)]
    np.testing.assert_allclose(staged.numpy(), expected, atol=1e-4)


def test_where_a_response_could_not_end_the_rest_shares_its_probability(make_model, tokenizer, monkeypatch):
    """Policy and reference alike; and the same where the logits are computed in chunks."""
    folder, end = make_model("llama", False), tokenizer.eos_token_id
    trainer = make(folder, temperature=0.7, min_tokens=2, end_token=end)
    plain, seen = AutoModelForCausalLM.from_pretrained(folder).eval(), []
    trainer.objective = lambda batch, beta: seen.append(batch) or batch.logprobs_BKT.sum()
    prompt, response = np.array([5, 6, 7], dtype=np.int32), np.array([8, 9, end], dtype=np.int32)
    with torch.no_grad():
        logits = (
            plain(torch.from_numpy(np.concatenate([prompt, response])[None].astype(np.int64))).logits[0, 2:-1] / 0.7
        )
    logits[:2, end] = -torch.inf
    expected = logits.log_softmax(-1)[torch.arange(3), torch.from_numpy(response).long()]
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
    for chunk in (2**26, len(tokenizer)):
        monkeypatch.setattr(train.model, "CHUNK", chunk)
        group = Group(0, prompt, [Response(response, True, reward=1.0)])
        figures = update(trainer, [group], lr=0.0)
        assert torch.allclose(seen[-1].logprobs_BKT[0, 0], expected, atol=1e-4)
        assert torch.allclose(seen[-1].ref_BKT[0, 0], expected, atol=1e-4)
        assert figures["entropy"] == pytest.approx(entropy, rel=1e-3)
        assert np.isfinite(figures["grad_norm"]) and figures["grad_norm"] > 0


def test_gamma_weighs_the_reference(make_model, tokenizer):
    """The objective reads log pi_ref / gamma; the KL that is reported is to the reference as it is."""
    seen = []
    trainer = make(make_model("llama", False), lambda b, beta: seen.append(b) or b.logprobs_BKT.sum())
    groups = make_groups(len(tokenizer))
    figures = [update(trainer, groups, lr=0.0, gamma=gamma) for gamma in (1.0, 2.0)]
    assert torch.allclose(seen[0].ref_BKT, 2 * seen[1].ref_BKT) and seen[0].ref_BKT.abs().sum() > 1
    assert figures[0]["kl"] == figures[1]["kl"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name", [name for name, function in OBJECTIVES.items() if not function.needs_beta])
def test_with_beta_0_an_update_is_the_same_without_a_reference(make_model, tokenizer, name):
    """And each response is read once less."""
    folder, weights = make_model("llama", False), []
    for has_reference in (True, False):
        trainer = make(folder, loss=name, beta=0.1 * has_reference)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # away from the reference
            for weight in trainer.policy.parameters():
                weight.add_(0.01 * torch.randn(weight.shape, generator=generator))
        groups = make_groups(len(tokenizer))
        responses = [response for group in groups for response in group.responses]
        for i, response in enumerate(responses):
            response.logprobs = np.full(len(response.tokens), -6.0 - i / 10, dtype=np.float32)
        figures = update(trainer, groups, beta=0.0)
        assert ("kl" in figures) == has_reference and figures["grad_norm"] > 0
        assert all((response.ref_logprobs is not None) == has_reference for response in responses)
        weights.append(weights_of(trainer))
    assert torch.equal(*weights)
