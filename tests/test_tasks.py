"""Rewards, against real answers and hostile ones."""

import itertools
import json
import random
import time
from fractions import Fraction

import pytest

import tasks
from tasks import countdown, gsm8k
from tests.conftest import REAL


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("$1,234.50.", "1234.5"), ("so 3/4", "3/4"), ("-5 apples", "-5"), ("10-5", "5"), ("x=12.", "12"),
        ("12%", "12"), ("#### 72", "72"), ("1,2,3", "3"), (".5", "1/2"), ("0.50", "1/2"), ("-$5", "-5"), ("$-5", "-5"),
        ("+7", "7"), ("1,000,000", "1000000"), ("1,234, then", "1234"), ("7 and 8", "8"), ("nan", None), ("", None),
        ("infinity", None), ("3/0", None), ("9" * 5000, None),
    ],
)  # fmt: skip
def test_gsm8k_last_number(text, number):
    assert gsm8k.last_number(text) == (None if number is None else Fraction(number))


def test_gsm8k_reward_is_exact():
    answer = "The sum is 24.\n#### 1,024"
    for right in ("1024", "$1,024", "it is 1024.0", "**1024**", "Answer: 1,024."):
        assert gsm8k.reward(right, answer) == 1.0
    for wrong in ("1025", "-1024", "1024.5", "nan", "inf", "", "1024 of 2048"):
        assert gsm8k.reward(wrong, answer) == 0.0


@pytest.mark.skipif(not (REAL / "gsm8k").is_dir(), reason="the real GSM8K rows do not lie beside the project")
def test_gsm8k_every_gold_answer_is_right_for_its_question_and_wrong_for_another_number():
    for split, rows in (("train", 7473), ("test", 1319)):
        problems = gsm8k.problems(split, gsm8k.Settings(data=str(REAL / "gsm8k")))
        assert len(problems) == rows
        for problem in problems:
            gold = Fraction(problem.answer.rpartition("#### ")[2].replace(",", ""))
            assert gsm8k.reward(problem.answer, problem.answer) == 1.0
            assert gsm8k.reward(f"The answer is {gold}.", problem.answer) == 1.0
            assert gsm8k.reward(f"The answer is {gold + 1}.", problem.answer) == 0.0


def test_gsm8k_prompt_is_what_the_sft_model_saw(gsm8k):
    task = tasks.load("gsm8k")
    (first, *_) = task.problems("test", task.Settings(data=str(gsm8k)))
    question = json.loads((gsm8k / "test.jsonl").read_text().splitlines()[0])["question"]
    assert first.prompt == f"[MATH_TASK] Problem:\n{question}\n\nSolution:"


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{oops", "train.jsonl:2: not JSON"),
        ('{"question": "?"}', "train.jsonl:2: a row needs"),
        ('{"question": "?", "answer": "none"}', "train.jsonl:2: its `answer` holds no number"),
    ],
)
def test_gsm8k_names_the_bad_row(tmp_path, row, complaint):
    (tmp_path / "train.jsonl").write_text('{"question": "?", "answer": "#### 1"}\n' + row + "\n")
    with pytest.raises(ValueError, match=complaint):
        gsm8k.problems("train", gsm8k.Settings(data=str(tmp_path)))


ANSWER = {"numbers": [12, 45, 33], "target": 24}


@pytest.mark.parametrize("right", ["45+12-33", "12+45-33", "45-33+12", " 12-33+45 ", "(45-33)+12", "12-(33-45)"])
def test_countdown_right(right):
    assert countdown.reward(right, ANSWER) == 1.0


@pytest.mark.parametrize(
    "wrong",
    ["45+33-12", "24", "12+12", "45+12-33=24", "45+12-33+0", "45 12 33", "", "45+12-", "-33+45+12", "45+12--33",
     "45++12-33", ")45+12-33(", "((45+12-33)", "__import__('os')", "45+12-³3", "(" * 10_000 + "1" + ")" * 10_000,
     "1" * 10**7],
)  # fmt: skip
def test_countdown_wrong_and_cheap(wrong):
    began = time.perf_counter()
    assert countdown.reward(wrong, ANSWER) == 0.0
    assert time.perf_counter() - began < 0.5


def test_countdown_arithmetic_is_exact():
    assert countdown.reward("8/(3-8/3)", {"numbers": [8, 3, 8, 3], "target": 24}) == 1.0
    assert countdown.reward("5/(3-3)", {"numbers": [5, 3, 3], "target": 1}) == 0.0


@pytest.mark.parametrize("count", [3, 4])
def test_countdown_train_and_test_never_overlap_and_all_can_be_solved(monkeypatch, count):
    monkeypatch.setattr(countdown, "PROBLEMS", {"train": 3000, "test": 500})
    keys = {}
    for split in ("train", "test"):
        problems = countdown.problems(split, countdown.Settings(numbers=count))
        keys[split] = {(*sorted(p.answer["numbers"]), p.answer["target"]) for p in problems}
        for problem in problems[:20]:
            orders = itertools.permutations(map(str, problem.answer["numbers"]))
            signs = list(itertools.product("+-", repeat=count - 1))
            tries = [
                first + "".join(map("".join, zip(each, rest, strict=True))) for first, *rest in orders for each in signs
            ]
            assert len(tries[0]) <= countdown.Settings().max_tokens - 1
            assert any(countdown.reward(each, problem.answer) for each in tries)
    assert not keys["train"] & keys["test"]
    rng = random.Random(0)
    for _ in range(1000):
        prompt, _ = countdown.demonstration(rng, count, wrong=0.5)
        numbers, target = prompt.removesuffix(":").split("=")
        assert not countdown.held_out([int(number) for number in numbers.split()], int(target))


def test_countdown_model_is_made_once_and_kept(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(countdown.WARM_UP, "steps", 3)
    folder = countdown.prepare(countdown.Settings(seed=4))
    assert "warming up" in capfd.readouterr().out
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == len(tokenizer)
    assert tokenizer.decode(tokenizer("12 45 33=24:").input_ids) == "12 45 33=24:"
    assert countdown.encode([("1 2=3:", "1+2")])[0][0] == [*tokenizer("1 2=3:1+2").input_ids, tokenizer.eos_token_id]
    assert countdown.prepare(countdown.Settings(seed=4)) == folder and not capfd.readouterr().out
    assert countdown.prepare(countdown.Settings(seed=5)) != folder
    assert len(list((tmp_path / "tba").iterdir())) == 2


def test_accuracy():
    figures = tasks.accuracy([1.0, 0.0], [[1.0, 1.0], [0.0, 0.0]], [["1+2", "2+1"], ["a", "b"]])
    assert figures == {"greedy": 0.5, "pass@1": 0.5, "pass@k": 0.5, "distinct": 1.0}


def test_prompts_that_leave_no_room_are_left_out_and_reported(tokenizer, capsys):
    problems = [tasks.Problem("short", 1), tasks.Problem("long " * 50, 2), tasks.Problem("", 3)]
    ((kept, tokens),) = tasks.encode(problems, tokenizer, 20)
    assert kept is problems[0] and tokens.tolist() == tokenizer("short").input_ids
    assert "2 of 3 prompts" in capsys.readouterr().out
    with pytest.raises(ValueError, match="max_tokens leaves 1 of"):
        tasks.encode(problems, tokenizer, 1)
