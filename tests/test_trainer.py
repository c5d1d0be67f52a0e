"""Packed log-probabilities are those of plain rows, and an update is the same however it is cut."""

import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import packing
import trainer as trainer_module
from buffer import Group, Trajectory
from loss import tb
from packing import pack
from trainer import Trainer

ARCHITECTURES = [("llama", False), ("llama", True), ("gpt_neox", False), ("gpt2", True)]


def make_groups(vocabulary: int, groups: int = 3, k: int = 4, seed: int = 0) -> list[Group]:
    rng = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> np.ndarray:
        return rng.integers(0, vocabulary, rng.integers(low, high)).astype(np.int32)

    return [
        Group(i, tokens(3, 9), [Trajectory(tokens(1, 8), True, float(rng.random()), 0) for _ in range(k)])
        for i in range(groups)
    ]


def plain_logprob(model, prompt: np.ndarray, response: np.ndarray, temperature: float) -> float:
    """By its definition: one row, no padding, every logit."""
    tokens = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
    with torch.no_grad():
        logprobs = (model(tokens).logits[0].double() / temperature).log_softmax(-1)
    at = torch.arange(len(prompt) - 1, tokens.shape[1] - 1)
    return logprobs[at, tokens[0, 1:][at]].sum().item()


@pytest.mark.parametrize(("architecture", "tie"), ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_is_plain(make_model, tokenizer, architecture, tie, temperature):
    folder = make_model(architecture, tie)
    trainer = Trainer(str(folder), tb, "cpu", temperature)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    groups = make_groups(len(tokenizer))
    batch = pack(groups, trainer.device)
    with torch.no_grad():
        found, _ = trainer.logprobs(trainer.policy, batch)
    expected = [plain_logprob(plain, g.prompt, r.tokens, temperature) for g in groups for r in g.responses]
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-3, rtol=1e-5)
    assert np.ptp(expected) > 1.0  # the model tells responses apart, or this would show nothing
    trainer.score_reference(groups)
    np.testing.assert_allclose([r.ref_logprob for g in groups for r in g.responses], expected, atol=2e-3, rtol=1e-5)


def test_one_row_for_all_groups_is_the_same(make_model, tokenizer, monkeypatch):
    """The layout that CUDA uses, under a dense mask of the same rule."""
    trainer = Trainer(str(make_model("llama", False)), tb, "cpu")
    groups = make_groups(len(tokenizer))
    monkeypatch.setattr(packing, "create_block_mask", packing.create_mask)
    with torch.no_grad():
        expected, _ = trainer.logprobs(trainer.policy, pack(groups, trainer.device))
        one_row = pack(groups, trainer.device, flex=True)
        found, _ = trainer.logprobs(trainer.policy, one_row)
    assert one_row.tokens.shape == (1, 128)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.skipif(not shutil.which("g++"), reason="flex attention on the CPU compiles with g++")
def test_flex_attention_under_the_block_mask_is_the_same(make_model, tokenizer):
    """What CUDA computes, forward, on the CPU: transformers takes the BlockMask as it is."""
    folder, groups = make_model("llama", False), make_groups(len(tokenizer))
    rows, row = pack(groups, torch.device("cpu")), pack(groups, torch.device("cpu"), flex=True)
    assert type(row.mask).__name__ == "BlockMask"
    expected, found = hidden_states(folder, "sdpa", rows), hidden_states(folder, "flex_attention", row)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def hidden_states(folder, attention: str, batch: packing.Packed) -> torch.Tensor:
    """[N, H], where the responses' tokens are predicted."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    with torch.no_grad():
        hidden = model.base_model(
            input_ids=batch.tokens, position_ids=batch.positions, attention_mask=batch.mask, use_cache=False
        ).last_hidden_state
    return hidden.flatten(0, 1)[batch.source]


def test_mask_by_hand():
    """Two prompts of 2 and 1 with responses a, b and c: who may attend to whom."""
    tokens = np.arange(9, dtype=np.int32)
    one, two, three = (Trajectory(tokens[:n], True, 0.0, 0) for n in (1, 2, 1))
    batch = pack([Group(0, tokens[:2], [one, two]), Group(1, tokens[:1], [three])], torch.device("cpu"))
    rows = ["1....", "11...", "111..", "11.1.", "11.11"]  # prompt, prompt, a, b, b
    assert ["".join("1" if x else "." for x in row) for row in batch.mask[0, 0].tolist()] == rows
    assert ["".join("1" if x else "." for x in row[:2]) for row in batch.mask[1, 0, :2].tolist()] == ["1.", "11"]
    assert batch.positions[0].tolist() == [0, 1, 2, 2, 3]
    assert batch.source.tolist() == [1, 1, 3, 5]


def parameters_after(trainer: Trainer, groups: list[Group]) -> torch.Tensor:
    trainer.update(groups, beta=0.1, lr=1e-3)
    return torch.cat([p.detach().flatten() for p in trainer.policy.parameters()])


def test_an_update_is_the_same_however_it_is_cut(make_model, tokenizer, monkeypatch):
    folder = str(make_model("llama", False))
    whole = parameters_after(Trainer(folder, tb, "cpu"), make_groups(len(tokenizer)))
    in_micro_batches = parameters_after(Trainer(folder, tb, "cpu", micro_batch_tokens=1), make_groups(len(tokenizer)))
    torch.testing.assert_close(in_micro_batches, whole, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(trainer_module, "CHUNK", 5 * len(tokenizer))
    in_chunks = parameters_after(Trainer(folder, tb, "cpu"), make_groups(len(tokenizer)))
    torch.testing.assert_close(in_chunks, whole, atol=1e-5, rtol=1e-4)


def test_figures_are_the_same_however_an_update_is_cut(make_model, tokenizer):
    """Adam's first step forgets the gradient's scale; its norm does not."""
    folder, groups = str(make_model("llama", False)), make_groups(len(tokenizer))
    whole = Trainer(folder, tb, "cpu").update(groups, beta=0.1, lr=1e-3)
    cut = Trainer(folder, tb, "cpu", micro_batch_tokens=1).update(groups, beta=0.1, lr=1e-3)
    assert cut == pytest.approx(whole, rel=1e-3)


def test_gradient_is_clipped_and_reported_before_clipping(make_model, tokenizer):
    folder = str(make_model("llama", False))
    trainer, free = Trainer(folder, tb, "cpu", max_grad_norm=1e-3), Trainer(folder, tb, "cpu", max_grad_norm=1e9)
    seen = {}
    for name, each in (("clipped", trainer), ("free", free)):
        step = each.optimizer.step

        def note(step=step, each=each, name=name):
            seen[name] = torch.cat([p.grad.flatten() for p in each.policy.parameters()]).norm().item()
            step()

        each.optimizer.step = note
    reported = trainer.update(make_groups(len(tokenizer)), 0.1, 1e-3)["grad_norm"]
    assert reported == pytest.approx(free.update(make_groups(len(tokenizer)), 0.1, 1e-3)["grad_norm"], rel=1e-3)
    assert seen["clipped"] == pytest.approx(1e-3, rel=1e-3)
    assert seen["free"] == pytest.approx(reported, rel=1e-3)


def test_updates_reach_the_posterior_of_the_responses_at_hand(make_model, tokenizer):
    """On one group TB's optimum is log pi - log pi_ref = r/beta up to a constant: the loss goes to 0."""
    trainer = Trainer(str(make_model("llama", False)), tb, "cpu", max_grad_norm=1e9)
    groups = make_groups(len(tokenizer), groups=1)
    losses = [trainer.update(groups, beta=1.0, lr=1e-4)["loss"] for _ in range(150)]
    assert losses[-1] < 1e-3 * losses[0]
    with torch.no_grad():
        batch = pack(groups, trainer.device)
        log_ratio = trainer.logprobs(trainer.policy, batch)[0] - torch.tensor([r.ref_logprob for r in batch.responses])
    rewards = torch.tensor([r.reward for r in batch.responses])
    torch.testing.assert_close(log_ratio - log_ratio.mean(), rewards - rewards.mean(), atol=0.05, rtol=0)


def test_a_checkpoint_goes_on_where_it_was_made(make_model, tokenizer, tmp_path):
    folder = str(make_model("llama", False))
    trainer, groups = Trainer(folder, tb, "cpu"), make_groups(len(tokenizer))
    trainer.update(groups, 0.1, 1e-3)
    trainer.save(tmp_path / "step-1", tokenizer)
    resumed = Trainer(folder, tb, "cpu", checkpoint_dir=tmp_path / "step-1")
    torch.testing.assert_close(parameters_after(resumed, groups), parameters_after(trainer, groups), atol=1e-7, rtol=0)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]
