"""A reward may raise, hang or give nonsense: it costs those responses, is counted, and as the rule ends the run."""

import asyncio
import math
import threading
import time

import numpy as np
import pytest

from scoring import WINDOW, RewardError, Scorer
from searcher import Response


def responses(count: int = 4) -> list[Response]:
    return [Response(np.array([i], dtype=np.int32), True, None, str(i)) for i in range(count)]


def score(reward, given=None, seconds=5.0):
    """(the scorer, the responses that it returned) after one call."""
    scorer = Scorer(reward, seconds)
    return scorer, asyncio.run(scorer(None, given or responses()))


def plain(problem, given):
    return [float(each.text) for each in given]


async def waiting(problem, given):
    await asyncio.sleep(0.01)
    return np.array([float(each.text) for each in given])


@pytest.mark.parametrize("reward", [plain, waiting])
def test_rewards_are_set(reward):
    scorer, scored = score(reward)
    assert [each.reward for each in scored] == [0.0, 1.0, 2.0, 3.0] and scorer.failures == 0


def test_a_reward_that_is_given_stays():
    given = responses()
    given[2].reward = 7.0
    scorer, scored = score(lambda problem, new: [5.0] * len(new), given)
    assert [each.reward for each in scored] == [5.0, 5.0, 7.0, 5.0] and list(scorer.recent) == [(3, 0)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None, "much", [1.0, 2.0], 10**400])
def test_nonsense_costs_that_response_alone(bad, capsys):
    scorer, scored = score(lambda problem, given: [1.0, bad, 0.5, True])
    assert [each.reward for each in scored] == [1.0, 0.5, 1.0] and scorer.failures == 1
    assert "is no finite number" in capsys.readouterr().out


def raising(problem, given):
    raise KeyError("oops")


def nothing_to_find(problem, given):
    return [next(each for each in given if each.text == "none")]


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
        (too_few, "ValueError: 1 rewards for 4 responses"),
        (hanging, "none within 0.2 s (--reward-timeout)"),
        (hanging_too, "none within 0.2 s (--reward-timeout)"),
    ],
)
def test_what_raises_or_hangs_costs_its_responses_and_is_said_once(reward, said, capsys):
    scorer = Scorer(reward, 0.2)

    async def twice():
        return [await scorer(None, responses()) for _ in range(2)]

    began = time.monotonic()
    assert asyncio.run(twice()) == [[], []] and scorer.failures == 8
    assert time.monotonic() - began < 5
    printed = capsys.readouterr().out
    assert printed.count("a reward failed") == 1 and said in printed


@pytest.mark.parametrize("reward", [lambda problem, given: time.sleep(0.2) or plain(problem, given), waiting])
def test_slow_rewards_run_side_by_side(reward):
    async def many():
        scorer = Scorer(reward, 5.0)
        return await asyncio.gather(*(scorer(None, responses()) for _ in range(20)))

    began = time.monotonic()
    assert all(len(scored) == 4 for scored in asyncio.run(many()))
    assert time.monotonic() - began < 2  # one after the other: 4 s


def test_a_slow_plain_reward_leaves_the_loop_free():
    turns = []

    async def count():
        while True:
            turns.append(1)
            await asyncio.sleep(0.01)

    async def both():
        counting = asyncio.create_task(count())
        await Scorer(lambda problem, given: time.sleep(0.3) or plain(problem, given), 5.0)(None, responses())
        counting.cancel()

    asyncio.run(both())
    assert len(turns) > 10


def test_a_reward_that_fails_for_more_than_half_of_a_window_stops_the_run():
    async def run(bad: int) -> int:
        """How many responses were scored until the run was stopped; `bad` of 20 fail."""
        scorer, scored = Scorer(lambda problem, given: [math.nan] * bad + [1.0] * (20 - bad), 5.0), 0
        try:
            for _ in range(3 * WINDOW // 20):
                await scorer(None, responses(20))
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
        scorer = Scorer(sometimes, 5.0)
        for _ in range(4):
            await scorer(None, responses(150))
        assert scorer.failures == 300
        return scorer

    scorer = asyncio.run(run())
    assert sum(n for n, _ in scorer.recent) == 300  # the last calls that make up a window
