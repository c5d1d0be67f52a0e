"""A reward may raise, hang or return nonsense: that costs those responses, is counted, and as the rule ends the run."""

import asyncio
import logging
import math
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from buffer import Response
from config import Config, RunError
from rewards.guard import WINDOW, RewardError, Rewards


def responses(count: int = 4) -> list[Response]:
    return [Response(np.array([i], dtype=np.int32), finished=True) for i in range(count)]


class Tokenizer:
    """The text of a response is its first token."""

    @staticmethod
    def batch_decode(rows, skip_special_tokens):
        assert skip_special_tokens
        return [str(row[0]) for row in rows]


def guard(reward, timeout=5.0, embed=None, **settings) -> Rewards:
    config = Config(reward_timeout=timeout, near_duplicates="cosine" if embed else "exact", **settings)
    return Rewards(SimpleNamespace(reward=reward, embed=embed), Tokenizer, config)


def score(reward, given=None, **settings):
    """(the guard, the responses that it returned) after one call."""
    rewards = guard(reward, **settings)
    return rewards, asyncio.run(rewards(None, given or responses()))


def plain(problem, given):
    return [float(each.text) for each in given]


async def waiting(problem, given):
    await asyncio.sleep(0.01)
    return np.array([float(each.text) for each in given])


@pytest.mark.parametrize("reward", [plain, waiting])
def test_texts_and_rewards_are_set(reward):
    rewards, scored = score(reward)
    assert [each.reward for each in scored] == [0.0, 1.0, 2.0, 3.0] and rewards.gauges() == {"reward_failures": 0}
    assert [each.text for each in scored] == ["0", "1", "2", "3"]


def test_a_reward_that_is_given_stays():
    given = responses()
    given[2].reward = 7.0
    rewards, scored = score(lambda problem, new: [5.0] * len(new), given)
    assert [each.reward for each in scored] == [5.0, 5.0, 7.0, 5.0] and list(rewards.recent) == [(3, 0)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None, "much", [1.0, 2.0], 10**400])
def test_nonsense_costs_that_response_alone(bad, lines):
    rewards, scored = score(lambda problem, given: [1.0, bad, 0.5, True])
    assert [each.reward for each in scored] == [1.0, 0.5, 1.0] and rewards.failures == 1
    assert "is no finite number" in lines[0]


def raising(problem, given):
    raise KeyError("oops")


def nothing_to_find(problem, given):
    return [next(each for each in given if each.text == "none")]


def cancelled(problem, given):
    raise asyncio.CancelledError  # by a loop of the reward's own


def exiting(problem, given):
    raise SystemExit(3)


def too_few(problem, given):
    return [1.0]


def hanging(problem, given):
    threading.Event().wait(60)


async def hanging_too(problem, given):
    await asyncio.sleep(60)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (raising, "KeyError: 'oops' (" + __file__),
        (nothing_to_find, "RuntimeError: StopIteration:  (" + __file__),
        (cancelled, "RuntimeError: CancelledError:  (" + __file__),
        (exiting, "RuntimeError: SystemExit: 3 (" + __file__),
        (too_few, "ValueError: 1 rewards for 4 responses"),
        (hanging, "none within 0.2 s (--reward-timeout)"),
        (hanging_too, "none within 0.2 s (--reward-timeout)"),
    ],
)
def test_what_raises_or_hangs_costs_its_responses_and_is_logged_once(reward, said, lines):
    rewards = guard(reward, 0.2)

    async def twice():
        return [await rewards(None, responses()) for _ in range(2)]

    began = time.monotonic()
    assert asyncio.run(twice()) == [[], []] and rewards.failures == 8
    assert time.monotonic() - began < 5
    assert len(lines) == 1 and lines[0].startswith("a reward failed") and said in lines[0]


def test_an_error_that_ends_the_run_is_not_the_responses(lines):
    async def reward(problem, given):
        raise RunError("the victim's engine is gone")

    with pytest.raises(RunError, match="the victim's engine is gone"):
        score(reward)
    assert not lines


def test_a_thread_whose_reward_came_too_late_leaves_no_error(monkeypatch, caplog):
    late, errors = threading.Event(), []
    monkeypatch.setattr(threading, "excepthook", errors.append)

    def reward(problem, given):
        late.wait()
        return plain(problem, given)

    rewards, scored = score(reward, timeout=0.05)
    thread = [each for each in threading.enumerate() if each.name == "reward"][-1]
    assert thread.daemon  # or it would keep the program from ending
    late.set()  # the event loop has ended meanwhile
    thread.join(5)
    assert scored == [] and rewards.failures == 4 and not errors
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("reward", [lambda problem, given: time.sleep(0.2) or plain(problem, given), waiting])
def test_slow_rewards_run_side_by_side(reward):
    async def many():
        rewards = guard(reward)
        return await asyncio.gather(*(rewards(None, responses()) for _ in range(20)))

    began = time.monotonic()
    assert all(len(scored) == 4 for scored in asyncio.run(many()))
    assert time.monotonic() - began < 2  # one after the other: 4 s


def test_so_many_calls_are_scored_at_a_time_and_the_rest_wait():
    running, most = 0, 0

    async def reward(problem, given):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return [1.0] * len(given)

    async def many():
        rewards = guard(reward, reward_concurrency=3)
        calls = [asyncio.create_task(rewards(None, responses())) for _ in range(10)]
        await asyncio.sleep(0)
        waiting = rewards.waiting
        await asyncio.gather(*calls)
        return waiting, rewards.waiting

    assert asyncio.run(many()) == (10, 0) and most == 3


def test_a_slow_plain_reward_leaves_the_loop_free():
    turns = []

    async def count():
        while True:
            turns.append(1)
            await asyncio.sleep(0.01)

    async def both():
        counting = asyncio.create_task(count())
        await guard(lambda problem, given: time.sleep(0.3) or plain(problem, given))(None, responses())
        counting.cancel()

    asyncio.run(both())
    assert len(turns) > 10


def test_a_reward_that_fails_for_more_than_half_of_a_window_stops_the_run():
    async def run(bad: int) -> int:
        """How many responses were scored until the run was stopped; `bad` of 20 fail."""
        rewards, scored = guard(lambda problem, given: [math.nan] * bad + [1.0] * (20 - bad)), 0
        try:
            for _ in range(3 * WINDOW // 20):
                await rewards(None, responses(20))
                scored += 20
        except RewardError as error:
            assert "of the last 200 responses; the first time: nan is no finite number" in str(error)
        return scored

    assert asyncio.run(run(bad=10)) == 3 * WINDOW
    assert asyncio.run(run(bad=11)) == WINDOW - 20


def test_one_call_that_fails_for_many_responses_does_not():
    """What went wrong once may be over; what goes wrong three times of a few is not."""
    outcomes = iter([True, False, False, True, False])

    def sometimes(problem, given):
        if not next(outcomes):
            raise OSError("no answer")
        return [1.0] * len(given)

    async def run():
        rewards = guard(sometimes)
        for _ in range(4):
            await rewards(None, responses(150))
        assert rewards.failures == 300
        return rewards

    rewards = asyncio.run(run())
    assert sum(n for n, _ in rewards.recent) == 300  # the last calls that make up a window


# ---- embeddings ----


async def embed(given):
    return np.array([[float(each.text), 1.0] for each in given])


def test_embeddings_are_set_where_the_buffer_compares_by_them():
    given = responses()
    given[0].reward = 1.0
    rewards, scored = score(lambda problem, new: [1.0, math.nan, 1.0], given, embed=embed)
    assert [each.embedding.tolist() for each in scored] == [[0.0, 1.0], [1.0, 1.0], [3.0, 1.0]]
    assert rewards.failures == 1 and list(rewards.recent) == [(4, 1)]
    assert score(plain)[1][0].embedding is None


async def broken(given):
    raise KeyError("no embedding")


async def embed_too_few(given):
    return [np.zeros(2)]


async def embed_for_ever(given):
    await asyncio.sleep(60)


@pytest.mark.parametrize(
    ("embed", "said"),
    [
        (broken, "KeyError: 'no embedding' (" + __file__),
        (embed_too_few, "ValueError: 1 embeddings for 4 responses"),
        (embed_for_ever, "none within 0.2 s (--reward-timeout)"),
    ],
)
def test_an_embedding_that_fails_costs_its_responses_and_ends_the_run_in_time(embed, said, lines):
    rewards, scored = score(plain, timeout=0.2, embed=embed)
    assert scored == [] and rewards.failures == 4 and said in lines[0]

    async def on():
        rewards.timeout = 0.05
        for _ in range(3):
            await rewards(None, responses(90))

    with pytest.raises(RewardError, match="the reward failed for 270 of the last 270 responses; the first time: "):
        asyncio.run(on())
