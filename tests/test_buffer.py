"""What stays, what leaves, what a batch holds, and what it costs."""

import itertools
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from buffer import Buffer, Group, Response, by_reward, cosine, edit, lowest_reward, uniform

serial = itertools.count()


def response(reward: float = 0.0, tokens: list[int] | None = None, version: int = 0) -> Response:
    return Response(np.array([next(serial)] if tokens is None else tokens, dtype=np.int32), True, version, reward)


def group(prompt_id: int, *responses: Response) -> Group:
    return Group(prompt_id, np.array([1, 2, 3], dtype=np.int32), list(responses))


def stored(buffer: Buffer, prompt_id: int) -> list[Response]:
    return list(buffer.prompts[prompt_id].stored.values())


def test_the_newest_of_exact_duplicates_stays():
    buffer = Buffer()
    old, new, other = response(tokens=[7, 8], version=1), response(tokens=[7, 8], version=5), response(tokens=[7])
    buffer.add(group(0, old, other))
    buffer.add(group(0, new))
    assert len(buffer) == 2
    assert new in stored(buffer, 0) and old not in stored(buffer, 0)


def test_duplicates_within_a_group_count_once():
    buffer = Buffer()
    buffer.add(group(0, response(tokens=[7]), response(tokens=[7]), response(tokens=[8])))
    assert len(buffer) == 2


def test_new_responses_come_as_often_as_the_policy_wrote_them():
    buffer = Buffer()
    buffer.add(group(0, response(tokens=[7]), response(tokens=[7]), response(tokens=[8])))
    (new,) = buffer.sample(1, 3, on_policy_prob=1.0)
    assert sorted(int(r.tokens[0]) for r in new.responses) == [7, 7, 8] and buffer.repeated == 0
    (old,) = buffer.sample(1, 2, on_policy_prob=0.0)
    assert sorted(int(r.tokens[0]) for r in old.responses) == [7, 8]


def test_a_full_prompt_loses_its_oldest():
    buffer = Buffer(capacity=3)
    responses = [response(reward=10 - i) for i in range(5)]
    for each in responses:
        buffer.add(group(0, each))
    assert stored(buffer, 0) == responses[2:] and len(buffer) == 3


def test_a_duplicate_is_as_young_as_its_last_arrival():
    buffer = Buffer(capacity=2)
    buffer.add(group(0, response(tokens=[1]), response(tokens=[2])))
    buffer.add(group(0, response(tokens=[1])))
    buffer.add(group(0, response(tokens=[3])))
    assert sorted(int(r.tokens[0]) for r in stored(buffer, 0)) == [1, 3]


def test_a_full_prompt_loses_its_worst():
    buffer = Buffer(capacity=2, evict=lowest_reward)
    best, worst, middle = response(1.0), response(0.0), response(0.5)
    for each in (best, worst, middle):
        buffer.add(group(0, each))
    assert set(map(id, stored(buffer, 0))) == {id(best), id(middle)}


def test_a_batch_is_distinct_prompts_and_exactly_k_responses_of_each():
    buffer = Buffer(seed=1)
    for prompt_id in range(20):
        buffer.add(group(prompt_id, *(response() for _ in range(6))))
    for on_policy_prob in (0.0, 0.5, 1.0):
        batch = buffer.sample(8, 4, on_policy_prob)
        assert len({g.prompt_id for g in batch}) == 8
        for g in batch:
            assert len(g.responses) == len(set(map(id, g.responses))) == 4
            assert all(r in stored(buffer, g.prompt_id) for r in g.responses)
    assert buffer.repeated == 0


def test_few_responses_are_repeated_evenly_and_counted():
    buffer = Buffer()
    buffer.add(group(0, *(response() for _ in range(3))))
    (only,) = buffer.sample(1, 8, 1.0)
    assert sorted(Counter(map(id, only.responses)).values()) == [2, 3, 3]
    assert buffer.repeated == 5


def test_new_prompts_are_those_since_the_last_sync_and_bring_their_newest_responses():
    buffer = Buffer()
    for prompt_id in range(10):
        buffer.add(group(prompt_id, response(), response()))
    buffer.start_window()
    newest = {prompt_id: [response(), response()] for prompt_id in (3, 5)}
    for prompt_id, responses in newest.items():
        buffer.add(group(prompt_id, *responses))
    for _ in range(20):
        for g in buffer.sample(2, 2, on_policy_prob=1.0):
            assert set(map(id, g.responses)) == set(map(id, newest[g.prompt_id]))


def test_with_probability_m_a_prompt_is_new():
    buffer = Buffer(seed=3)
    for prompt_id in range(1000):
        buffer.add(group(prompt_id, response()))
    buffer.start_window()
    for prompt_id in range(1000, 1010):
        buffer.add(group(prompt_id, response()))
    drawn = [g.prompt_id >= 1000 for _ in range(2000) for g in buffer.sample(2, 1, on_policy_prob=0.7)]
    assert np.mean(drawn) == pytest.approx(0.7 + 0.3 * 0.01, abs=0.03)


def test_a_batch_that_is_too_large_is_refused():
    with pytest.raises(ValueError, match="needs 2 prompts"):
        Buffer().sample(2, 1, 1.0)


def test_by_reward_draws_by_the_softmax():
    rng, rewards = np.random.default_rng(0), np.array([0.0, 1.0, 2.0])
    counts = np.bincount([by_reward(rewards, 1, rng)[0] for _ in range(20_000)]) / 20_000
    np.testing.assert_allclose(counts, np.exp(rewards) / np.exp(rewards).sum(), atol=0.015)
    assert sorted(by_reward(rewards, 3, rng)) == sorted(uniform(rewards, 3, rng)) == [0, 1, 2]


def test_replay_is_what_chooses_among_old_responses():
    best = [response(50.0) for _ in range(3)]
    buffer = Buffer(replay=by_reward)
    buffer.add(group(0, *best, *(response(0.0) for _ in range(50))))
    buffer.start_window()
    (g,) = buffer.sample(1, 3, on_policy_prob=0.0)
    assert set(map(id, g.responses)) == set(map(id, best))


def test_cost_does_not_grow_with_what_is_stored():
    """A ratio on one machine, with room: a copy of what is stored, with 256 times the prompts, is far above it."""

    def filled(prompts: int) -> Buffer:
        buffer = Buffer()
        for prompt_id in range(prompts):
            buffer.add(group(prompt_id, response(), response()))
        return buffer

    def seconds(buffer: Buffer) -> float:
        buffer.start_window()
        times = []
        for _ in range(30):
            began = time.perf_counter()
            buffer.add(group(len(buffer.prompts), response(), response()))
            buffer.sample(8, 2, 0.5)
            times.append(time.perf_counter() - began)
        return float(np.median(times))

    small, large = filled(500), filled(128_000)
    assert min(seconds(large) for _ in range(3)) < 4 * min(seconds(small) for _ in range(3))


def test_edit_distance_is_of_tokens_over_the_length_of_both():
    new = response(tokens=[1, 2, 3, 70_000])
    others = [response(tokens=each) for each in ([1, 2, 3, 70_000], [1, 9, 3, 70_000], [3], [0xD800, 5, 6, 7])]
    assert edit(new, others).tolist() == [0, 1 / 8, 3 / 5, 4 / 8]


def test_of_near_duplicates_the_better_stays_and_of_equals_the_first():
    buffer = Buffer(distance=edit, min_distance=0.25)
    first = response(0.5, [1, 2, 3, 4])
    apart = response(0.1, [9, 9, 9, 9])
    buffer.add(group(0, first, apart))
    buffer.add(group(0, equal := response(0.5, [1, 2, 3, 5]), worse := response(0.4, [1, 2, 3, 6])))
    assert stored(buffer, 0) == [first, apart]
    assert buffer.prompts[0].last_group == [equal, worse]  # they are newest data nevertheless
    buffer.add(group(0, better := response(0.6, [1, 2, 3, 7])))
    assert set(stored(buffer, 0)) == {apart, better} and len(buffer) == 2
    buffer.add(group(0, response(0.2, [1, 2, 3, 7])))  # the same once more, by a bad draw
    assert set(stored(buffer, 0)) == {apart, better}
    buffer.add(group(1, alike := response(0.0, [1, 2, 3, 7])))
    assert stored(buffer, 1) == [alike]  # another prompt's


def test_one_better_response_replaces_all_that_are_near_and_the_heap_follows():
    buffer = Buffer(capacity=3, distance=edit, min_distance=0.25)
    left, right = response(0.1, [1, 2, 3, 4]), response(0.2, [1, 2, 5, 6])
    buffer.add(group(0, left, right))
    buffer.add(group(0, between := response(0.3, [1, 2, 3, 6])))
    assert stored(buffer, 0) == [between]
    buffer.add(group(0, *(last := [response(0.0, [n] * 4) for n in (20, 30, 40)])))
    assert stored(buffer, 0) == last and len(buffer) == 3  # the oldest was evicted


def test_embeddings_keep_apart_what_words_do_not():
    def embedded(reward: float, *embedding: float) -> Response:
        each = response(reward)
        each.embedding = np.array(embedding, dtype=np.float32)
        return each

    buffer = Buffer(distance=cosine, min_distance=0.25)
    buffer.add(group(0, embedded(0.1, 1, 0), apart := embedded(0.1, 0, 1)))
    buffer.add(group(0, better := embedded(0.2, 0.8, 0.6), embedded(0.0, 0.6, 0.8)))
    assert stored(buffer, 0) == [apart, better]  # 0.8 is near the first, 0.6 is not near the second


def test_demonstrations_are_only_replayed():
    buffer = Buffer()
    buffer.add(group(0, demonstration := response(1.0)), on_policy=False)
    buffer.add(group(1, new := response(0.0)))
    assert not buffer.prompts[0].last_group and list(buffer.by_recency) == [1] and buffer.window == {1}
    assert {g.responses[0] for g in buffer.sample(2, 1, on_policy_prob=1.0)} == {demonstration, new}
    assert all(g.responses == [new] for _ in range(20) for g in buffer.sample(1, 1, on_policy_prob=1.0))


def test_what_the_reward_and_the_task_need_is_dropped():
    """All else of a stored response stays."""
    buffer, one = Buffer(), response(0.5, [1, 2], version=3)
    one.text, one.info, one.per_token = "text", {"length": 4.0}, {"entropy": np.zeros(2, np.float32)}
    buffer.add(group(0, one))
    assert (one.text, one.info, one.reward, one.version, *one.per_token) == ("", None, 0.5, 3, "entropy")


# ---- the bound of the whole ----

ONE = response().nbytes  # of a response of one token


def test_beyond_the_bound_the_oldest_of_all_leaves_and_a_prompt_with_its_last():
    buffer = Buffer(max_bytes=4 * ONE)
    groups = [group(i, response(), response()) for i in range(3)]
    for each in groups[:2]:
        buffer.add(each)
    buffer.add(group(0, groups[0].responses[0]))  # again: as young as that
    buffer.add(groups[2])
    assert len(buffer) == 4 and buffer.nbytes == 4 * ONE
    assert stored(buffer, 0) == [groups[0].responses[0]] and stored(buffer, 1) == [groups[1].responses[1]]
    buffer.add(group(3, response()))
    assert sorted(buffer.prompt_ids) == [0, 2, 3] and 1 not in buffer.by_recency and 1 not in buffer.window
    assert sorted(g.prompt_id for g in buffer.sample(3, 2, 0.5)) == [0, 2, 3]


def test_bytes_are_bounded_and_as_many_as_are_taken():
    def long() -> Response:
        tokens = np.random.default_rng(next(serial)).integers(0, 9, 200).astype(np.int32)
        return Response(
            tokens, True, 0, 0.0, logprobs=np.zeros(200, np.float32), ref_logprobs=np.zeros(200, np.float32),
            per_token={"entropy": np.zeros(200, np.float32)},
        )  # fmt: skip

    tracemalloc.start()
    buffer = Buffer()
    for i in range(500):
        buffer.add(group(i, *(long() for _ in range(4))))
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.6 * buffer.nbytes < taken < 1.1 * buffer.nbytes
    bounded = Buffer(max_bytes=100 * long().nbytes)
    for i in range(60):
        bounded.add(group(i, *(long() for _ in range(4))))
    assert len(bounded) == 100 and bounded.nbytes == 100 * long().nbytes and len(bounded.prompt_ids) == 25
    assert bounded.gauges() == {"buffer_size": 100, "buffer_bytes": bounded.nbytes, "repeated": 0}


def test_a_batch_of_prompts_stays_whatever_the_bound():
    buffer = Buffer(max_bytes=3 * ONE, min_prompts=5)
    for _ in range(3):
        for i in range(5):
            buffer.add(group(i, response(), response()))
    assert len(buffer) == 5 and len(buffer.sample(5, 2, 0.0)) == 5
    for i in range(5, 30):
        buffer.add(group(i, response(), response()))
    assert len(buffer) == 5 == len(buffer.prompt_ids)
