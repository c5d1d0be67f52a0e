"""Rewards, against real answers and hostile ones."""

import asyncio
import itertools
import json
import logging
import math
import random
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import tasks
import tasks.math
import tasks.redteam
import tasks.tldr
from buffer import Response
from config import Config
from rewards.judges import Guard
from tasks import Answered, Problem, countdown, countdown_model, gsm8k
from tests.conftest import CHAT_TEMPLATE, REAL


def task(module, tokenizer=None, **settings) -> tasks.Task:
    """A task of a module, as the run makes it."""
    return module.Task(
        module.Task.Settings(**{name: str(v) if isinstance(v, Path) else v for name, v in settings.items()}), tokenizer
    )


def response(text: str, reward: float = float("nan"), finished: bool = True) -> Response:
    return Response(np.array([1], dtype=np.int32), finished, reward=reward, text=text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("$1,234.50.", "1234.5"), ("so 3/4", "3/4"), ("-5 apples", "-5"), ("10-5", "5"), ("x=12.", "12"),
        (r"\boxed{\$9{,}500}", "9500"), (r"8\,000", "8000"), (r"1,\!234,\! 567", "1234567"), ("70\u202f000 m", "70000"),
        (r"1{,}23", "23"),
        ("12%", "12"), ("#### 72", "72"), ("1,2,3", "3"), (".5", "1/2"), ("0.50", "1/2"), ("-$5", "-5"), ("$-5", "-5"),
        ("+7", "7"), ("1,000,000", "1000000"), ("1,234, then", "1234"), ("7 and 8", "8"), ("nan", None), ("", None),
        ("infinity", None), ("3/0", None), ("9" * 5000, None),
    ],
)  # fmt: skip
def test_gsm8k_last_number(text, number):
    assert gsm8k.last_number(text) == (None if number is None else Fraction(number))


@pytest.mark.parametrize(
    "text", ["7" * 10**7, "So 12 is 5. " * 10**6, "1," * 5 * 10**6, "-" * 10**7, "(" * 10**4 + "1" + ")" * 10**4,
             r"\boxed{" * 10**6, "<answer>" * 10**6, r"\boxed{" + "{" * 10**7],
)  # fmt: skip
def test_a_huge_response_costs_nothing(text):
    """10 ms at most here; 10 MB took 2 s where all of it was searched for numbers."""
    began = time.perf_counter()
    assert gsm8k.reward(text, "#### 3") == countdown.reward(text, {"numbers": [1, 2], "target": 3}) == 0.0
    assert countdown.reward(countdown.tagged(text), {"numbers": [1, 2], "target": 3}) == 0.0
    assert tasks.math.boxed(text) is None
    assert time.perf_counter() - began < 0.5


def test_gsm8k_reward_is_exact():
    answer = "The sum is 24.\n#### 1,024"
    for right in ("1024", "$1,024", "it is 1024.0", "**1024**", "Answer: 1,024."):
        assert gsm8k.reward(right, answer) == 1.0
    for wrong in ("1025", "-1024", "1024.5", "nan", "inf", "", "1024 of 2048"):
        assert gsm8k.reward(wrong, answer) == 0.0


@pytest.mark.skipif(not (REAL / "gsm8k").is_dir(), reason="the real GSM8K rows do not lie beside the project")
def test_gsm8k_every_gold_answer_is_right_for_its_question_and_wrong_for_another_number():
    for split, rows in (("train", 7473), ("test", 1319)):
        problems = task(gsm8k, data=REAL / "gsm8k").problems(split)
        assert len(problems) == rows
        for problem in problems:
            gold = Fraction(problem.answer.rpartition("#### ")[2].replace(",", ""))
            assert gsm8k.reward(problem.answer, problem.answer) == 1.0
            assert gsm8k.reward(f"The answer is {gold}.", problem.answer) == 1.0
            assert gsm8k.reward(f"The answer is {gold + 1}.", problem.answer) == 0.0


def test_gsm8k_prompt_is_what_the_sft_model_saw(gsm8k):
    rows = gsm8k
    (first, *_) = task(tasks.gsm8k, data=rows).problems("test")
    question = json.loads((rows / "test.jsonl").read_text().splitlines()[0])["question"]
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
        task(gsm8k, data=tmp_path).problems("train")


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
def test_countdown_train_and_test_never_overlap_and_all_can_be_solved(monkeypatch, tokenizer, count):
    monkeypatch.setattr(countdown, "PROBLEMS", {"train": 3000, "test": 500})
    keys = {}
    for split in ("train", "test"):
        problems = task(countdown, tokenizer, numbers=count).problems(split)
        keys[split] = {(*sorted(p.answer["numbers"]), p.answer["target"]) for p in problems}
        for problem in problems[:20]:
            orders = itertools.permutations(map(str, problem.answer["numbers"]))
            signs = list(itertools.product("+-", repeat=count - 1))
            tries = [
                first + "".join(map("".join, zip(each, rest, strict=True))) for first, *rest in orders for each in signs
            ]
            assert len(tries[0]) <= countdown.Task.Settings().max_tokens - 1
            assert any(countdown.reward(each, problem.answer) for each in tries)
    assert not keys["train"] & keys["test"]
    rng = random.Random(0)
    for wrong in (0.0, 0.5):
        right = []
        for _ in range(1000):
            prompt, shown = countdown_model.demonstration(rng, count, wrong)
            listed, target = prompt.removesuffix(":").split("=")
            numbers = [int(number) for number in listed.split()]
            assert not countdown.held_out(numbers, int(target))
            right.append(countdown.reward(shown, {"numbers": numbers, "target": int(target)}))
        assert np.mean(right) == 1 if not wrong else 0.3 < np.mean(right) < 0.5


def test_countdown_model_is_made_once_and_kept(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(countdown_model.WARM_UP, "steps", 3)
    monkeypatch.setattr(logging.getLogger("tba"), "info", lines.append)

    def model(**settings) -> str:
        return countdown.Task.model(countdown.Task.Settings(**settings))

    folder = model(seed=4, dry_run=True)
    assert (Path(folder) / "model.safetensors").is_file() and not (tmp_path / "tba").exists() and not lines
    folder = model(seed=4)
    assert lines == ["warming up the embedded model, once ..."]

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == len(tokenizer)
    assert tokenizer.decode(tokenizer("12 45 33=24:").input_ids) == "12 45 33=24:"
    encoded, _ = countdown_model.encode([("1 2=3:", "1+2")])
    assert encoded[0] == [*tokenizer("1 2=3:1+2").input_ids, tokenizer.eos_token_id]
    assert model(seed=4) == model(seed=4, plan=True) == folder and len(lines) == 1
    assert model(seed=5) != folder
    assert len(list((tmp_path / "tba").iterdir())) == 2


def test_one_thread_warms_the_model_up_and_others_have_theirs_back(tmp_path, monkeypatch):
    """With more, two programs that warm up at once wait for each other's threads."""
    clip, threads, before = torch.nn.utils.clip_grad_norm_, [], torch.get_num_threads()

    def noting(*arguments):
        threads.append(torch.get_num_threads())
        return clip(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noting)
    torch.set_num_threads(2)
    try:
        countdown_model.warm_up(tmp_path, seed=0, numbers=3, steps=2)
        assert threads == [1, 1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_countdown_finds_the_model_that_users_have(tmp_path, monkeypatch):
    """Its folder in the cache is named by what it was trained on: a change would train it anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(countdown_model, "warm_up", lambda folder, *_: None)
    assert Path(countdown_model.prepare(0, 3)).name == "countdown-5560ee9adaea"
    assert Path(countdown_model.prepare(1, 4)).name == "countdown-75275fa478a3"


def test_accuracy():
    right, wrong = [response("1+2", 1.0), response("2+1", 1.0)], [response("a", 0.0), response("b", math.nan, False)]
    prompt = np.array([1])
    answers = [Answered(Problem("?"), prompt, each[0], each) for each in (right, wrong)]
    figures = tasks.accuracy(answers)
    assert figures == {"greedy": 0.5, "pass@1": 0.5, "pass@k": 0.5, "distinct": 1.0, "truncated": 0.25}


def test_gsm8k_can_ask_for_a_response_that_finished():
    problem, responses = Problem("?", "#### 7"), [response("7"), response("7", finished=False), response("8")]
    assert task(gsm8k).reward(problem, responses) == [1.0, 1.0, 0.0]
    assert task(gsm8k, require_finish=True).reward(problem, responses) == [1.0, 0.0, 0.0]


# ---- countdown for a model that chats ----


def test_countdown_asks_a_chat_model_in_words_and_reads_its_tags(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT_TEMPLATE)
    with pytest.raises(ValueError, match=r"max_tokens is 13: .* --max-tokens 512"):
        task(countdown, tokenizer)
    chat = task(countdown, tokenizer, max_tokens=64)
    (first, *_) = chat.problems("test")
    (message,) = first.prompt
    numbers, target = first.answer["numbers"], first.answer["target"]
    assert (
        f"{' '.join(map(str, numbers))} exactly once" in message["content"]
        and f"equals {target}." in message["content"]
    )
    texts = [
        "I think <answer>45+12</answer>, no: <answer> 45+12-33 </answer>.",
        "45+12-33",
        "<answer>45+12-33",
        "<answer>",
    ]
    assert chat.reward(Problem(first.prompt, ANSWER), [response(text) for text in texts]) == [1.0, 0.0, 0.0, 0.0]
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert task(countdown, tokenizer).reward(Problem("", ANSWER), [response(texts[1])]) == [1.0]


# ---- math ----


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{27}", "27"), (r"\boxed{\frac{1}{2}} or \boxed{\sqrt{2}}", r"\sqrt{2}"), (r"\boxed{1", None),
        (r"\boxed{1} and \boxed{2", "1"), (r"so $\boxed 2$.", "2"), (r"in \boxed.", None), ("27", None), ("", None),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{\left\{x}", r"\left\{x"), (r"\boxed{}", ""),
        (r"\boxed {5}", "5"), ("$\\boxed\n  {\\{5\\}}$", r"\{5\}"), (r"\boxed{3} and \boxed", "3"),
        (r"\boxed" + " " * 10**6, None), (r"\fbox{42}", "42"), (r"\boxed{1}, not \fbox{2}", "1"),
        (r"\boxed{" + "9" * 10**7, None), (r"\boxed{" * 10_000, None),
        (r"\boxed{" + "{" * 10_000 + "}" * 10_000 + "}", None),
    ],
)  # fmt: skip
def test_math_boxed(text, answer):
    began = time.process_time()
    assert tasks.math.boxed(text) == answer
    assert time.process_time() - began < 0.5


@pytest.fixture(scope="module")
def graded():
    """Rewards of responses, by the task as the run makes it."""
    each = task(tasks.math, grade_seconds=1.5)
    with asyncio.Runner() as runner:
        serving = each.serving(None)
        runner.run(serving.__aenter__())
        yield lambda gold, *texts: runner.run(each.reward(Problem("?", gold), [response(text) for text in texts]))
        runner.run(serving.__aexit__(None, None, None))


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        (r"\frac{1}{2}", [r"\boxed{0.5}", r"\boxed{\dfrac12}", r"so \boxed{\frac{2}{4}}."], [r"\boxed{2}", "0.5", ""]),
        ("x^2+2x+1", [r"\boxed{(x+1)^2}", r"\boxed{1+2x+x^2}"], [r"\boxed{x^2+1}"]),
        (r"\left( 3, \frac{\pi}{2} \right)", [r"\boxed{(3,\pi/2)}"], [r"\boxed{(\pi/2,3)}", r"\boxed{3}"]),
        ("1,2", [r"\boxed{2, 1}"], [r"\boxed{1,2,3}"]),
        ("10", [r"\boxed{1} no, \boxed{10}"], [r"\boxed{10} no, \boxed{1}", r"\boxed{nan}", r"\boxed{\infty}"]),
    ],
)  # fmt: skip
def test_math_reward(graded, gold, right, wrong):
    assert graded(gold, *right, *wrong) == [1.0] * len(right) + [0.0] * len(wrong)


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("42", ["42.", r"\mathbf{42}", r"{\bf 42}.", r"\text{42}", r"\,42\;"], ["4", "24", "42!"]),
        ("42", ["$42$", r"\(42\)", r"\color{red}{42}", "=42", "42。"], ["4.2", "-42"]),
        ("10,\\!080", [r"10\,080", "10080", r"\mathbf{10{,}080}"], ["10.080", "10", "(10,080)"]),
        (r"\frac{5}{18}", [r"\boldsymbol{\dfrac{5}{18}}", r"\text{\frac{5}{18}}", "5/18."], ["5/81", "18/5"]),
        (r"2^{13}", [r"2^\mathbf{13}", r"\bm{2}^{13}", "8192"], ["26"]),
        (r"3\sqrt{13}", [r"3\,\sqrt\mathrm{13}", "3√13", "3√(13)", r"\sqrt{117}."], [r"3\sqrt{31}", r"13\sqrt3"]),
        (r"\text{June 20}", ["June 20", r"\mathrm{June\ 20}", r"\text{June 20.}"], [r"\text{June 21}", "20"]),
        (r"\text{(C)}", ["C", "(C).", r"\textbf{(C)}", r"\text{C}"], ["B", r"\text{(A)}"]),
        (r"\text{Evelyn}", ["Evelyn", r"\mbox{Evelyn}", r"\textbf{Evelyn}."], ["Evelny", r"\text{Evan}"]),
        (r"15\mbox{ cm}^2", ["15", r"15\,\mathrm{cm}^2", r"\text{15 cm}^2", r"15\text{ cm}^{2}."], ["51", "15^2"]),
        (r"120^\circ", ["120°", r"120\degree", r"\mathbf{120^\circ}", r"120^{\circ}."], [r"12^\circ"]),
        ("52_8", ["52_{8}", r"\mathbf{52}_8", "52_8.", "52"], ["52_{10}", "52_9", "25_8", "42_{10}"]),
        ("11_2", ["11_{2}"], ["11_3", "3_{10}", "111_2"]),
        ("(1,2)", [r"\left(1,\,2\right)", "(1, 2)."], [r"\{1,2\}", "(2,1)", "[1,2]", "(1,2]"]),
        (r"\{1,2\}", [r"\left\{2,1\right\}", r"\{1,\,2\}."], ["(1,2)", r"\{1\}", "[1,2]"]),
        (r"(-\infty,2)", ["x<2", "2 > x", r"x \in (-\infty,2)", "(−∞,2)"], [r"x \le 2", "x > 2", r"(-\infty,2]"]),  # noqa: RUF001
        (r"[3,\infty)", [r"x \ge 3", r"x\geqslant 3."], ["x>3", r"x \le 3"]),
        (r"(0,9) \cup (9,36)", ["(0,9)∪(9,36)", r"\left(0,9\right)\cup(9,36)."], ["(0,36)"]),  # noqa: RUF001
        (r"\emptyset", [r"\varnothing", "∅", r"\{\}"], ["0", r"\{0\}"]),
        (
            r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
            [r"\begin{bmatrix}1\\2\end{bmatrix}.", r"\mathbf{\begin{pmatrix}1\\[2pt] 2\end{pmatrix}}"],
            [r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 2 \\ 1 \end{pmatrix}"],
        ),
        ("1,-2", [r"x = 1 \mbox{ or } x = -2", r"-2,\ 1", r"\text{1 and -2}"], ["1,2", "1"]),
        # as math-verify's tracker has it (issues 14, 41, 60, 82)
        (r"\frac{1}{2^{99}}", ["2^{-99}", r"\frac{2}{2^{100}}"], [r"\frac{1}{2^{98}}", "0"]),
        (r"\frac{1}{2004!}", [r"\frac{1}{2004!}"], [r"\frac{1}{2006!}"]),
        ("0.0000672", [r"6.72\times10^{-5}", ".0000672"], ["0.0000675", "0"]),
        (r"1 - \frac{1}{\mathrm{e}}", [r"1-\frac1e"], [r"1 + \frac{1}{\mathrm{e}}"]),
        (r"1, 2, \ldots, n", [r"1,2,\ldots,n"], [r"1, 3, 5, \ldots, 2n-1", "1"]),
        ("3x - y + 13 = 0", ["y = 3x + 13"], ["3x + 4y + 14 = 0", "0"]),
        ("12:00", ["12:00."], ["1:00", "12"]),
        ("10%", [r"10\%", "10", "0.1"], ["0.01", "1"]),
        (".5", [r"\mathbf{.5}", r".5\ ", r"\tfrac12"], ["5", "-.5"]),
    ],
)  # fmt: skip
def test_math_what_is_written_another_way_is_right_and_no_other(gold, right, wrong):
    """The kinds that people report, of answers to no particular problem."""
    assert {answer: tasks.math.equal(gold, answer) for answer in right} == dict.fromkeys(right, 1.0)
    assert {answer: tasks.math.equal(gold, answer) for answer in wrong} == dict.fromkeys(wrong, 0.0)


def test_math_plain_takes_no_time_on_hostile_text():
    for part in ("{", r"\text{", "√(", r"\ ", "1\\,", r"\left", "}{", "\\color{", "_{1"):
        began = time.process_time()
        tasks.math.plain((part * 500)[: tasks.math.LONGEST])
        assert time.process_time() - began < 0.1


def test_math_survives_a_hostile_answer(graded):
    """It takes no longer than it may, and the worker that it kept busy is replaced."""
    hostile = [r"\boxed{9^{9^{9^{9^{9}}}}}", r"\boxed{" + "(" * 240 + "1" + ")" * 240 + "}", r"\boxed{1000000000!}"]
    began = time.perf_counter()
    assert graded("1", *hostile, r"\boxed{1}", r"\boxed{\frac{2}{2}}") == [0.0, 0.0, 0.0, 1.0, 1.0]
    assert time.perf_counter() - began < 25


@pytest.mark.skipif(not (REAL / "math500").is_dir(), reason="the real MATH-500 rows do not lie beside the project")
def test_math_every_gold_solution_is_right_for_its_problem_and_most_are_wrong_for_the_next():
    problems = task(tasks.math, data=REAL / "math500").problems("test")
    rows = json.loads((REAL / "math500" / "test.json").read_text())
    assert len(problems) == len(rows) == 500
    golds = [problem.answer for problem in problems]
    answers = [tasks.math.boxed(row["solution"]) for row in rows]
    assert all(tasks.math.equal(gold, answer) for gold, answer in zip(golds, answers, strict=True))
    pairs = zip(golds[:100], answers[1:101], strict=True)
    equal = [(gold, answer) for gold, answer in pairs if gold != answer and tasks.math.equal(gold, answer)]
    assert equal == [("5", "x=5")]


def test_math_names_the_bad_row(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"problem": "?", "solution": "It is 7."}\n')
    with pytest.raises(ValueError, match=r"train.jsonl:1: its `solution` holds no \\boxed{} answer"):
        task(tasks.math, data=tmp_path).problems("train")


def test_an_answer_may_be_a_number(tmp_path):
    rows = [{"problem": "?", "question": "?", "answer": each} for each in (2, 0, 1.5, -7, 1e-05)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for module in (tasks.math, gsm8k):
        answers = [problem.answer for problem in task(module, data=tmp_path).problems("train")]
        assert answers == ["2", "0", "1.5", "-7", "0.00001"]
    assert [gsm8k.reward(f"so {each}", each) for each in answers] == [1.0] * 5


# ---- tldr ----


def test_tldr_scores_query_response_and_one_end_and_punishes_what_was_cut_off(tldr_models, tldr):
    policy, judge = tldr_models
    tokenizer = AutoTokenizer.from_pretrained(policy)
    each = task(tasks.tldr, tokenizer, model=policy, reward_model=judge, gold_reward_model=judge, data=tldr)
    problem, *_ = each.problems("train")
    scored = []

    async def score(texts):
        scored.extend(texts)
        return np.arange(1.0, 1 + len(texts))

    each.scores = each.gold = score
    score.tokenizer = AutoTokenizer.from_pretrained(judge)
    responses = [response(" short"), response(" cut", finished=False), response(" a</s>b")]
    assert asyncio.run(each.reward(problem, responses)) == [1.0, -1.0, 2.0]
    assert scored == [problem.prompt + text for text in (" short</s>", " ab</s>")]
    assert problem.prompt.endswith("TL;DR:")


def test_tldr_figures_are_those_of_their_definitions(tldr_models, tldr):
    """Against transformers, one text at a time."""
    policy, judge = tldr_models
    tokenizer = AutoTokenizer.from_pretrained(policy)
    each = task(tasks.tldr, tokenizer, model=policy, reward_model=judge, gold_reward_model=judge, data=tldr)
    rng, answers, ours, theirs, nll, kl, lengths = np.random.default_rng(0), [], [], [], [], [], []
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    reward = AutoModelForSequenceClassification.from_pretrained(judge).eval()
    reward.config.pad_token_id = None
    for problem in each.problems("test"):
        prompt = np.array(tokenizer(problem.prompt).input_ids, dtype=np.int32)
        tokens = np.array([*rng.integers(20, 500, rng.integers(2, 9)), tokenizer.eos_token_id], dtype=np.int32)
        logprobs = rng.normal(-3, 1, len(tokens)).astype(np.float32)
        sample = Response(tokens, finished=True, reward=0.5, logprobs=logprobs)
        sample.text = tokenizer.decode(tokens, skip_special_tokens=True)
        answers.append(Answered(problem, prompt, sample, [sample]))
        row = torch.from_numpy(np.concatenate([prompt, tokens]).astype(np.int64))
        with torch.no_grad():
            logits = model(row[None]).logits[0, len(prompt) - 1 : -1]
            texts = (problem.prompt + sample.text + "</s>", problem.prompt + problem.answer + "</s>")
            ours_, theirs_ = (reward(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts)
        at = torch.arange(len(tokens)), torch.from_numpy(tokens).long()
        nll.append(-logits.log_softmax(-1)[at].sum().item())
        kl.append(sample.logprobs.sum() - (logits / 0.7).log_softmax(-1)[at].sum().item())
        ours.append(ours_)
        theirs.append(theirs_)
        lengths.append((len(tokens), len(prompt)))

    async def evaluate():
        async with each.serving(SimpleNamespace(judge_devices=["cpu"], search_cores={0}, out=Path())):
            return await each.evaluate(answers)

    figures, (t, p) = asyncio.run(evaluate()), np.sum(lengths, axis=0)
    wins = np.array(ours) > np.array(theirs)
    assert 0 < wins.mean() < 1
    assert figures == pytest.approx(
        {
            "win_rate": wins.mean(), "reward": 0.5, "kl": np.mean(kl), "perplexity": np.exp(np.sum(nll) / t),
            "perplexity_diluted": np.exp(np.sum(nll) / (t + p)), "tokens": t / len(answers), "truncated": 0.0,
        },
        rel=1e-3,
    )  # fmt: skip
    assert figures["perplexity_diluted"] < figures["perplexity"] ** 0.5


# ---- redteam ----


def test_redteam_means_the_log_of_the_toxicity_of_the_victims_replies(redteam_models):
    each = task(tasks.redteam, **redteam_models, victim_replies=2)
    attacked, classified = [], []

    async def replies(attack):
        attacked.append(attack)
        return [f"{attack} one", f"{attack} two"]

    async def log_toxic(texts):
        classified.extend(texts)
        return np.log([0.9, 0.4, 0.5, 0.001])

    log_toxic.text = each.classifier.text
    each.replies, each.classifier = replies, log_toxic
    attacks = [response("a"), response("b")]
    rewards = asyncio.run(each.reward(Problem("?"), attacks))
    assert attacked == ["a", "b"] and classified == ["a one", "a two", "b one", "b two"]
    assert rewards == pytest.approx([np.log([0.9, 0.4]).mean(), np.log([0.5, 0.001]).mean()])
    assert [attack.info["toxicity"] for attack in attacks] == pytest.approx([0.65, 0.2505])


def test_redteam_reads_a_guard_by_the_conversation(make_model, redteam_models):
    guard = str(make_model("llama", chat=True))
    each = task(tasks.redteam, **(redteam_models | {"classifier": guard}))
    assert isinstance(each.classifier, Guard)
    classified = []

    class Noting(Guard):
        async def __call__(self, texts):
            classified.extend(texts)
            return np.zeros(len(texts))

    each.classifier = Noting(guard, "classifier", "\n\n")

    async def replies(attack):
        return ["reply"]

    each.replies = replies
    assert asyncio.run(each.reward(Problem("?"), [response("attack")])) == [0.0]
    assert classified == ["<user>\nattack\n<assistant>\nreply\n<assistant>\n"]


def test_redteam_serves_its_models_beside_the_engines(redteam_models, monkeypatch, tmp_path):
    """All but the victim's engine is real."""
    prompts, entered = [], []

    class Victim:
        def __init__(self, engines, **sampling):
            self.engines, self.sampling = engines, sampling

        async def __aenter__(self):
            entered.append(self)
            return self

        async def __aexit__(self, *_):
            entered.remove(self)

        async def generate(self, tokens, n):
            prompts.append(len(tokens))
            return [Response(np.array(tokens[:3]), finished=True)] * n

    monkeypatch.setattr(tasks.redteam, "Searcher", Victim)
    each = task(tasks.redteam, **redteam_models, victim_replies=2, victim_top_p=0.5, victim_memory=0.2, seed=7)

    async def run() -> list[float]:
        places = dict(local_devices=["cuda:1", "cpu"], judge_devices=["cpu", "cpu", "cuda:7"])  # the third is not used
        async with each.serving(SimpleNamespace(**places, search_cores={0}, out=tmp_path)):
            (victim,) = entered
            (engine,) = victim.engines
            assert victim.sampling == {"temperature": 0.7, "max_tokens": 30, "top_p": 0.5}
            assert (engine.device, engine.model, engine.seed) == ("cpu", redteam_models["victim"], 7)
            assert engine.load_weights and engine.gpu_memory_utilization == 0.2 and engine.log.parent == tmp_path
            assert (engine.cores, engine.threads, engine.max_model_len) == ({0}, 1, 1024)
            attacks = [response("a"), response("b " * 2000)]
            rewards = await each.reward(Problem("?"), attacks)
            assert all(-20 < reward < 0 for reward in rewards)
            assert [np.exp(reward) for reward in rewards] == pytest.approx([a.info["toxicity"] for a in attacks])
            assert (await each.embed(attacks)).shape == (2, 64)
            evaluation = await each.evaluate([Answered(Problem("?"), np.array([1]), attacks[0], attacks)])
            assert set(evaluation) == {"toxic", "toxicity", "cosine_distance", "truncated"}

    asyncio.run(run())
    assert not entered and max(prompts) == 1024 - 30


def test_redteam_diversity_is_the_mean_over_pairs():
    embeddings = np.random.default_rng(0).normal(size=(6, 4))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    pairs = [1 - a @ b for a, b in itertools.combinations(embeddings, 2)]
    assert tasks.redteam.mean_distance(embeddings) == pytest.approx(np.mean(pairs))


# ---- a task of one's own ----


def own(folder: Path, text: str) -> str:
    path = folder / "mine.py"
    path.write_text(text)
    return str(path)


def test_a_task_comes_from_a_file(tmp_path):
    mine = tasks.load(own(tmp_path, "import tasks\nclass Task(tasks.Task):\n    reward = None\n"))
    assert issubclass(mine, tasks.Task) and mine.Settings is Config


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1/0", r"mine.py': it cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("class Task: pass", "must have a class Task, made from tasks.Task"),
        ("from tasks import Task", "must have a class Task, made from tasks.Task"),
    ],
)
def test_a_file_that_is_no_task_is_refused(tmp_path, text, complaint):
    with pytest.raises(ValueError, match=complaint) as refusal:
        tasks.load(own(tmp_path, text))
    assert "\n" not in str(refusal.value)
    with pytest.raises(
        ValueError, match=r"task is 'none\.py': it must be one of countdown, gsm8k, math, redteam, tldr, or"
    ):
        tasks.load("none.py")
