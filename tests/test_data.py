"""Rows from files and data sets, prompts as the model sees them, and demonstrations."""

import copy
import json
import math

import pytest
from tokenizers.processors import TemplateProcessing

import data
from tasks import Problem
from tests.conftest import CHAT_TEMPLATE

ROWS = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(3)]
COLUMNS = ("question", "answer")


def read(folder, split="train", columns=COLUMNS, name=None):
    return [row for _, row in data.rows(str(folder), split, columns, name)]


def test_rows_come_from_json_lines_and_lists(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n\n".join(map(json.dumps, ROWS)))
    (tmp_path / "test.json").write_text(json.dumps(ROWS))
    assert read(tmp_path) == read(tmp_path, "test") == ROWS


def test_rows_come_from_a_folder_as_the_hub_has_it(tmp_path, monkeypatch):
    """A data set repository: a card that names the files of a configuration, and parquet files."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "repository"
    (repository / "main").mkdir(parents=True)
    datasets.Dataset.from_list(ROWS).to_parquet(repository / "main" / "train-00000-of-00001.parquet")
    (repository / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*\n---\n"
    )
    assert read(repository, name="main") == read(repository, name=None) == ROWS
    (repository / "README.md").unlink()
    assert read(repository, name="main") == ROWS  # without a card there is but one configuration, of another name
    with pytest.raises(ValueError, match=r"it has no test\.jsonl, and is no data set"):
        read(repository, "test", name="main")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"question": "?", "answer": "1"}\n{oops', r"train\.jsonl:2: not JSON"),
        ('{"question": "?"}', r"train\.jsonl:1: a row needs `question` and `answer`, as text"),
        ('{"question": "?", "answer": 1}', r"train\.jsonl:1: a row needs"),
        ('{"question": "?", "answer": " "}', r"train\.jsonl:1: a row needs"),
        ("[1]", r"train\.jsonl:1: a row needs"),
        ("\n", "its train split is empty"),
        ("[" * 100_000, r"train\.jsonl:1: not JSON"),
    ],
)
def test_a_bad_row_is_named(tmp_path, text, complaint):
    (tmp_path / "train.jsonl").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        read(tmp_path)


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b'{"question": "\xff"}')
    with pytest.raises(ValueError, match=r"train\.jsonl:1: not JSON"):
        read(tmp_path)


def test_a_missing_split_and_a_missing_data_set_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"it has no train\.jsonl"):
        read(tmp_path)
    with pytest.raises(ValueError, match="neither a folder nor to be had from the hub"):
        read("no/such")


def test_prompts_that_leave_no_room_are_left_out_and_reported(tokenizer, capsys):
    problems = [Problem("short", 1), Problem("long " * 50, 2), Problem("", 3)]
    (kept,) = data.encode(problems, tokenizer, 20)
    assert kept.problem is problems[0] and kept.text == "short"
    assert kept.tokens.tolist() == tokenizer("short").input_ids
    assert "2 of 3 prompts" in capsys.readouterr().out
    with pytest.raises(ValueError, match="max_tokens leaves 1 of"):
        data.encode(problems, tokenizer, 1)


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def test_a_chat_goes_through_the_template_and_gets_no_special_tokens_twice(chat_tokenizer):
    """The tokenizer puts one before every text, as Llama's does; a chat template writes its own."""
    begin = ("</s>", chat_tokenizer.eos_token_id)
    chat_tokenizer.backend_tokenizer.post_processor = TemplateProcessing("</s> $A", special_tokens=[begin])
    (plain,) = data.encode([Problem("Hi")], chat_tokenizer, 99)
    assert plain.tokens[0] == begin[1]
    chat = [{"role": "user", "content": "Hi"}]
    (prompt,) = data.encode([Problem(chat)], chat_tokenizer, 99)
    assert prompt.text == "<user>\nHi\n<assistant>\n"
    assert prompt.tokens.tolist() == chat_tokenizer(prompt.text, add_special_tokens=False).input_ids


def test_a_chat_needs_a_template(tokenizer):
    with pytest.raises(ValueError, match=r"it has no chat template, .* take a model tuned for chat"):
        data.encode([Problem([{"role": "user", "content": "Hi"}])], tokenizer, 99)


def test_demonstrations_find_their_prompts(chat_tokenizer, tmp_path, capsys):
    prompts = data.encode([Problem("plain"), Problem([{"role": "user", "content": "Hi"}])], chat_tokenizer, 99)
    path = tmp_path / "seed.jsonl"
    rows = [
        {"prompt": "plain", "response": "a"},
        {"prompt": [{"content": "Hi", "role": "user"}], "response": "b", "reward": 2},
        {"prompt": "<user>\nHi\n<assistant>\n", "response": "c", "reward": None},
        {"prompt": "plain", "response": ""},
        {"prompt": "plain", "response": "a" * 100},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = data.demonstrations(str(path), prompts, chat_tokenizer, min_tokens=1, max_tokens=9)
    assert {i: chat_tokenizer.batch_decode([r.tokens for r in each]) for i, each in found.items()} == {
        0: ["a</s>"], 1: ["b</s>", "c</s>"]
    }  # fmt: skip
    assert math.isnan(found[0][0].reward) and found[1][0].reward == 2 and math.isnan(found[1][1].reward)
    assert "2 of 5 demonstrations do not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{", r"seed\.jsonl:1: not JSON"),
        ('{"prompt": "plain"}', r"seed\.jsonl:1: a row needs `prompt` and `response`"),
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
        data.demonstrations(str(path), data.encode([Problem("plain")], tokenizer, 99), tokenizer, 0, 3)
    with pytest.raises(ValueError, match="there is no such file"):
        data.demonstrations(str(tmp_path / "none.jsonl"), [], tokenizer, 0, 9)
