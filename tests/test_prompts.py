"""Prompts as the model sees them, their order, and demonstrations."""

import copy
import json
import math
import random

import pytest
from tokenizers.processors import TemplateProcessing

from run.prompts import PromptSampler, demonstrations, tokenize
from tasks import Problem
from tests.conftest import CHAT_TEMPLATE


def test_prompts_that_are_too_long_are_left_out_and_logged(tokenizer, lines):
    problems = [Problem("short", 1), Problem("long " * 50, 2), Problem("", 3)]
    (prompt,) = tokenize(problems, tokenizer, 20)
    assert prompt.problem is problems[0] and prompt.text == "short"
    assert prompt.tokens.tolist() == tokenizer("short").input_ids
    assert lines == ["2 of 3 prompts are longer than 20 tokens: left out"]
    with pytest.raises(ValueError, match="max_tokens leaves 1 of"):
        tokenize(problems, tokenizer, 1)


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def test_a_chat_goes_through_the_template_and_gets_no_special_tokens_twice(chat_tokenizer):
    """The tokenizer puts one before every text, as Llama's does; a chat template writes its own."""
    begin = ("</s>", chat_tokenizer.eos_token_id)
    chat_tokenizer.backend_tokenizer.post_processor = TemplateProcessing("</s> $A", special_tokens=[begin])
    (plain,) = tokenize([Problem("Hi")], chat_tokenizer, 99)
    assert plain.tokens[0] == begin[1]
    chat = [{"role": "user", "content": "Hi"}]
    (prompt,) = tokenize([Problem(chat)], chat_tokenizer, 99)
    assert prompt.text == "<user>\nHi\n<assistant>\n"
    assert prompt.tokens.tolist() == chat_tokenizer(prompt.text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("template", ["$A </s>", "<b> $A </s>", "<b> $A", "$A"])
def test_no_prompt_ends_in_a_token_that_the_tokenizer_puts_behind_a_text(chat_tokenizer, template):
    """As one saved with `add_eos_token` does. What it puts before plain text stays, whether there are chats or not."""
    begin, end = 7, chat_tokenizer.eos_token_id
    special = [("<b>", begin), ("</s>", end)]
    chat_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(template, special_tokens=special)
    front = [begin] if template.startswith("<b>") else []
    plain, chat = Problem("Hi</s>"), Problem([{"role": "user", "content": "Hi"}])
    inside = chat_tokenizer("Hi</s>", add_special_tokens=False).input_ids
    assert inside[-1] == end  # which is the prompt's own
    first, second, third = tokenize([plain, chat, plain], chat_tokenizer, 99)
    assert first.tokens.tolist() == third.tokens.tolist() == front + inside
    assert second.tokens.tolist() == chat_tokenizer("<user>\nHi\n<assistant>\n", add_special_tokens=False).input_ids
    (alone,) = tokenize([chat], chat_tokenizer, 99)
    assert alone.tokens.tolist() == second.tokens.tolist()


def test_a_template_that_tells_the_date_gives_the_same_prompt_tomorrow(chat_tokenizer):
    """Or a run could not be resumed then, since its prompts would be others."""
    chat_tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHAT_TEMPLATE
    (prompt,) = tokenize([Problem([{"role": "user", "content": "Hi"}])], chat_tokenizer, 99)
    assert prompt.text.startswith("26 Jul 2024<user>")


def test_a_chat_needs_a_template(tokenizer):
    with pytest.raises(ValueError, match=r"it has no chat template, .* take a model tuned for chat"):
        tokenize([Problem([{"role": "user", "content": "Hi"}])], tokenizer, 99)


def test_demonstrations_find_their_prompts(chat_tokenizer, tmp_path, lines):
    prompts = tokenize([Problem("plain"), Problem([{"role": "user", "content": "Hi"}])], chat_tokenizer, 99)
    path = tmp_path / "seed.jsonl"
    rows = [
        {"prompt": "plain", "response": "a"},
        {"prompt": [{"content": "Hi", "role": "user"}], "response": "b", "reward": 2},
        {"prompt": "<user>\nHi\n<assistant>\n", "response": "c", "reward": None},
        {"prompt": "plain", "response": ""},
        {"prompt": "plain", "response": "a" * 100},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    shown = demonstrations(str(path), prompts, chat_tokenizer, min_tokens=1, max_tokens=9)
    assert {i: chat_tokenizer.batch_decode([r.tokens for r in each]) for i, each in shown.items()} == {
        0: ["a</s>"], 1: ["b</s>", "c</s>"]
    }  # fmt: skip
    assert math.isnan(shown[0][0].reward) and shown[1][0].reward == 2 and math.isnan(shown[1][1].reward)
    assert all(each.finished and each.version == 0 for responses in shown.values() for each in responses)
    assert lines == ["2 of 5 demonstrations do not fit min_tokens and max_tokens: left out"]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{", r"seed\.jsonl:1: not JSON"),
        ('{"prompt": "plain"}', r"seed\.jsonl:1: a row needs `prompt` and `response`"),
        ('{"prompt": "plain", "response": "\\ud83d"}', r"seed\.jsonl:1: a row needs `prompt` and `response`"),
        ('{"prompt": "other", "response": "a"}', r"seed\.jsonl:1: its `prompt` is not one of the 1 training problems'"),
        ('{"prompt": "plain", "response": "a", "reward": NaN}', r"seed\.jsonl:1: its `reward` must be a finite number"),
        ('{"prompt": "plain", "response": "a", "reward": "1"}', r"seed\.jsonl:1: its `reward` must be a finite number"),
        ('{"prompt": "plain", "response": "a", "reward": 1' + "0" * 400 + "}", r"its `reward` must be a finite number"),
        ('{"prompt": "plain", "response": "long long"}', "none of its 1 rows fits"),
        ("", "none of its 0 rows fits"),
    ],
)
def test_a_bad_demonstration_is_named(tokenizer, tmp_path, row, complaint):
    path = tmp_path / "seed.jsonl"
    path.write_text(row)
    with pytest.raises(ValueError, match=complaint):
        demonstrations(str(path), tokenize([Problem("plain")], tokenizer, 99), tokenizer, 0, 3)
    with pytest.raises(ValueError, match="there is no such file"):
        demonstrations(str(tmp_path / "none.jsonl"), [], tokenizer, 0, 9)


# ---- the order of prompts ----


def test_prompts_come_in_a_new_order_each_epoch():
    sampler, expected = PromptSampler(10, seed=3), random.Random(3)
    for _ in range(2):
        order = list(range(10))
        expected.shuffle(order)
        assert [next(sampler) for _ in range(10)] == order[::-1]
    assert len(sampler.in_flight) == 20 and sampler.remaining == []
    assert sampler.rng.random() == expected.random()


def test_a_resumed_sampler_first_gives_the_prompts_that_were_in_flight():
    one = PromptSampler(10, seed=3)
    sampled = [next(one) for _ in range(14)]
    for prompt_id in sampled[:11]:
        one.done(prompt_id)
    state = json.loads(json.dumps(one.state_dict()))
    assert set(state) == {"left", "rng"}
    other = PromptSampler(10, seed=0)
    next(other)
    other.load_state_dict(state)
    assert [next(other) for _ in range(3)] == sampled[11:] == other.in_flight
    assert [next(other) for _ in range(40)] == [next(one) for _ in range(40)]
    assert sorted(sampled[:10]) == list(range(10))
