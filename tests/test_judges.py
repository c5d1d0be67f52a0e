"""Judges give what transformers gives one text at a time, whatever comes in a batch with what."""

import asyncio
import threading

import numpy as np
import pytest
import torch
import transformers

from rewards import judges
from rewards.judges import Classifier, Embedder, Guard, LanguageModel, RewardModel

TEXTS = ["How many clips?", "Natalia sold 48 clips.</s>", "She sold half as many in May, to all of her friends.", "a"]
CORES = {0}


def results(judge, *requests):
    """The result of each request, all made at once."""

    async def run():
        async with judge.loaded("cpu", CORES):
            return await asyncio.gather(*map(judge, requests))

    return asyncio.run(run())


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(judges, "BATCH_TOKENS", 40)


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "gpt2"])
def test_a_reward_model_sees_the_end_of_the_text_though_it_pads_with_it(
    make_model, tokenizer, small_batches, architecture
):
    folder = make_model(architecture, kind="ForSequenceClassification", num_labels=1)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # the trap
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    plain.config.pad_token_id = None
    with torch.no_grad():
        expected = [plain(**tokenizer(text, return_tensors="pt")).logits.item() for text in TEXTS]
        unended = plain(**tokenizer(TEXTS[1].removesuffix("</s>"), return_tensors="pt")).logits.item()
    assert abs(expected[1] - unended) > 1e-3
    (scores, again) = results(RewardModel(str(folder), "reward_model"), TEXTS, TEXTS[1:2])
    np.testing.assert_allclose(np.array(scores), expected, rtol=1e-4, atol=1e-5)
    assert again[0] == pytest.approx(expected[1], rel=1e-4)


def test_a_classifier_gives_log_probabilities_of_its_label(make_model, tokenizer, small_batches):
    labels = {0: "nothate", 1: "hate"}
    folder = make_model("roberta", kind="ForSequenceClassification", id2label=labels)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = [plain(**tokenizer(t, return_tensors="pt")).logits.log_softmax(-1)[0].numpy() for t in TEXTS]
    for label in (0, 1):
        (scores,) = results(Classifier(str(folder), "classifier", labels[label]), TEXTS)
        np.testing.assert_allclose(np.array(scores), np.array(expected)[:, label], rtol=1e-4, atol=1e-5)
    long, long_too = results(Classifier(str(folder), "classifier", "hate"), ["many " * 2000], ["many " * 1000])
    assert long == pytest.approx(long_too)  # cut to what it can read


def test_a_guard_is_read_by_its_word(make_model, tokenizer):
    folder = make_model("llama", chat=True)
    guard = Guard(str(folder), "classifier", "\n\n")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = [guard.text(text, "No.</s>") for text in TEXTS]
    assert texts[0] == "<user>\nHow many clips?\n<assistant>\nNo.\n<assistant>\n"
    assert "</s>" not in "".join(texts)  # nobody ends the conversation but the template
    opening = tokenizer("\n\n").input_ids
    safe, unsafe = (tokenizer("\n\n" + w).input_ids[len(tokenizer("\n\n").input_ids)] for w in ("safe", "unsafe"))
    with torch.no_grad():
        rows = [torch.tensor([tokenizer(text).input_ids + opening]) for text in texts]
        logits = torch.stack([plain(row).logits[0, -1] for row in rows])
    (scores,) = results(guard, texts)
    expected = logits[:, [safe, unsafe]].log_softmax(-1)[:, 1]
    np.testing.assert_allclose(np.array(scores), expected.numpy(), rtol=1e-4, atol=1e-5)


def test_an_embedding_is_the_mean_over_the_text_and_of_length_1(make_model, tokenizer, small_batches):
    folder = make_model("bert", kind="")
    plain = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        means = [plain(**tokenizer(t, return_tensors="pt")).last_hidden_state[0].mean(0).numpy() for t in TEXTS]
    (scores,) = results(Embedder(str(folder), "embedder"), TEXTS)
    expected = [mean / np.linalg.norm(mean) for mean in means]
    np.testing.assert_allclose(np.array(scores), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("architecture", ["gpt_neox", "gemma2"])  # the latter soft-caps scores and logits
def test_a_language_model_gives_every_token_its_log_probability_at_each_temperature(
    make_model, tokenizer, small_batches, architecture
):
    folder = make_model(architecture)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    sequences = [np.array(tokenizer(text).input_ids, dtype=np.int32) for text in TEXTS[:3]]
    (scores,) = results(LanguageModel(str(folder), "model", (1.0, 0.5)), sequences)
    for tokens, each in zip(sequences, scores, strict=True):
        row = torch.from_numpy(tokens.astype(np.int64))
        with torch.no_grad():
            logits = plain(row[None]).logits[0, :-1]
        for column, temperature in enumerate((1.0, 0.5)):
            expected = (logits / temperature).log_softmax(-1)[torch.arange(len(row) - 1), row[1:]]
            np.testing.assert_allclose(each[: len(row) - 1, column], expected, rtol=1e-4, atol=1e-4)


def test_requests_during_a_batch_are_the_next_batch_and_an_error_is_their_own(make_model, monkeypatch):
    judge = Embedder(str(make_model("bert", kind="")), "embedder")
    batches, compute = [], judge._compute

    def note(texts):
        batches.append(len(texts))
        if "bad" in texts:
            raise RuntimeError("out of memory")
        return compute(texts)

    monkeypatch.setattr(judge, "_compute", note)

    async def run():
        async with judge.loaded("cpu", CORES):
            first = asyncio.create_task(judge(["a"]))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            others = await asyncio.gather(*(judge(["b", "c"]) for _ in range(5)))
            assert all(len(each) == 2 for each in others) and len(await first) == 1
            with pytest.raises(RuntimeError, match="out of memory"):
                await judge(["bad"])
            assert len(await judge(["good"])) == 1
            first = asyncio.create_task(judge(["d"]))
            given_up = asyncio.create_task(judge(["e", "f"]))
            await asyncio.sleep(0)
            given_up.cancel()
            assert len(await first) == len(await judge(["g"])) == 1

    asyncio.run(run())
    assert batches == [1, 10, 1, 1, 1, 1]


def test_at_the_end_a_forward_pass_ends_and_no_other_begins(make_model, small_batches, monkeypatch):
    judge = Embedder(str(make_model("bert", kind="")), "embedder")
    begun, end, forward = threading.Event(), threading.Event(), judge.forward
    passes = []

    def slow(tokens, mask):
        passes.append(len(tokens))
        begun.set()
        end.wait(5)
        return forward(tokens, mask)

    monkeypatch.setattr(judge, "forward", slow)

    async def run():
        async with judge.loaded("cpu", CORES):
            pending = [asyncio.create_task(judge(["many " * 30] * 5)) for _ in range(2)]
            await asyncio.to_thread(begun.wait)
            threading.Timer(0.1, end.set).start()
        assert end.is_set()
        for each in pending:
            each.cancel()

    asyncio.run(run())
    assert len(passes) == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("embedder")]


def test_a_model_whose_weights_are_missing_leaves_no_thread(make_model):
    folder = make_model("bert", kind="")
    judge = Embedder(str(folder), "embedder")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        results(judge, TEXTS)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("embedder")]


def test_a_model_of_another_kind_is_refused(make_model):
    language, labels = str(make_model("llama")), {0: "no", 1: "yes"}
    two = str(make_model("roberta", kind="ForSequenceClassification", id2label=labels))
    for make, complaint in (
        (lambda: RewardModel(language, "reward_model"), "must be a sequence classifier, and is a LlamaForCausalLM"),
        (lambda: RewardModel(two, "reward_model"), "a reward model has one label, and it has 2"),
        (lambda: Classifier(two, "classifier", "hate"), "classifier is .*: it has no label 'hate' but no, yes"),
        (lambda: Guard(language, "classifier", ""), "a guard needs a chat template, and it has none"),
        (lambda: Embedder("tests", "embedder"), "embedder is 'tests': it must be a Hugging Face folder or hub id"),
    ):
        with pytest.raises(ValueError, match=complaint) as refusal:
            make()
        assert "\n" not in str(refusal.value)
