"""The replay buffer: trajectories by prompt, a heap a prompt.

What comes in is a group, the responses that one search found for one prompt. What goes out is a batch of groups,
B distinct prompts with exactly K responses each. Which response leaves a full heap, and which responses of a prompt
are trained on, are plain functions (`EVICTION`, `REPLAY`): add yours there. So are the distances by which responses
are kept apart (`NEAR_DUPLICATE`).

Nothing here costs more as more is stored: a prompt holds at most `capacity` responses, and prompts are found by index.
"""

import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np


@dataclass(slots=True, eq=False)
class Trajectory:
    """One response to a prompt."""

    tokens: np.ndarray  # int32 [T], end-of-sequence token included where the response has one
    finished: bool  # False: it ran into the length limit, so that it has no end-of-sequence token
    reward: float
    version: int  # the trainer's step whose weights began it
    logprobs: np.ndarray | None = None  # float32 [T], of its tokens under the policy that wrote it; None: not asked for
    ref_logprobs: np.ndarray | None = None  # float32 [T], of its tokens under the reference; None: not computed yet
    ref_version: int = 0  # how often the reference had been reset
    embedding: np.ndarray | None = None  # float32 [D], of length 1: only where the buffer compares by it


@dataclass(slots=True, eq=False)
class Group:
    """Responses to one prompt."""

    prompt_id: int
    prompt: np.ndarray  # int32 [P]
    responses: list[Trajectory]


def oldest(trajectory: Trajectory) -> float:
    """Evict what came first: all are equal."""
    return 0.0


def lowest_reward(trajectory: Trajectory) -> float:
    """Evict the worst, and among equals what came first."""
    return trajectory.reward


def uniform(rewards: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k distinct indices, each response as likely as another."""
    return rng.permutation(len(rewards))[:k]


def by_reward(rewards: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k distinct indices, drawn one after another by softmax of the reward (the Gumbel top-k trick)."""
    return np.argsort(-(rewards + rng.gumbel(size=len(rewards))), kind="stable")[:k]


def edit(new: Trajectory, stored: list[Trajectory]) -> np.ndarray:
    """Distance of a response to each stored one [N]: edits of tokens, over the tokens of both; from 0 to 1."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    def text(response: Trajectory) -> str:  # a character a token, which is what the library is fast with
        return response.tokens.astype("<i4").tobytes().decode("utf-32-le", "surrogatepass")

    edits = cdist([text(new)], [text(response) for response in stored], scorer=Levenshtein.distance)[0]
    return edits / (len(new.tokens) + np.array([len(response.tokens) for response in stored]))


def cosine(new: Trajectory, stored: list[Trajectory]) -> np.ndarray:
    """Cosine distance of a response's embedding to each stored one's [N]; from 0 to 2."""
    return 1 - np.stack([response.embedding for response in stored]) @ new.embedding


EVICTION = {"oldest": oldest, "lowest_reward": lowest_reward}
REPLAY = {"uniform": uniform, "reward": by_reward}
NEAR_DUPLICATE = {"exact": None, "edit": edit, "cosine": cosine}


@dataclass(slots=True)
class _Prompt:
    tokens: np.ndarray
    heap: list[tuple[float, int, Trajectory]] = field(default_factory=list)  # (eviction key, arrival, it)
    stored: dict[bytes, Trajectory] = field(default_factory=dict)  # by the response's tokens
    newest: list[Trajectory] = field(default_factory=list)  # the group that came last, duplicates included


class Buffer:
    """Trajectories of a run, in memory.

    Args:
        capacity: responses kept of a prompt.
        evict: a key for the heap; the response whose key is smallest leaves a full one first, the oldest among equals.
        replay: chooses k responses of a prompt that does not come from the newest data.
        seed: of the sampling.
        distance: of a response to stored ones; None: only exact duplicates are told.
        near: of two responses of a prompt that are this near, the better is kept, of equals the first.
    """

    def __init__(
        self,
        capacity: int = 100,
        evict: Callable = oldest,
        replay: Callable = uniform,
        seed: int | list[int] = 0,
        distance: Callable | None = None,
        near: float = 0.25,
    ):
        self.capacity, self.evict, self.replay, self.distance, self.near = capacity, evict, replay, distance, near
        self.rng = np.random.default_rng(seed)
        self.prompts: dict[int, _Prompt] = {}
        self.seen: list[int] = []  # prompt ids, to draw one by index
        self.recent: OrderedDict[int, None] = OrderedDict()  # prompt ids by their last arrival, the newest last
        self.arrived: set[int] = set()  # prompt ids that came since the last sync
        self.arrivals = itertools.count()
        self.size = 0  # responses stored
        self.repeated = 0  # responses that filled a batch up where a prompt had fewer than K

    def __len__(self) -> int:
        return self.size

    def add(self, group: Group, newest: bool = True) -> None:
        """Store a group. An exact duplicate replaces the one stored before it; where a distance tells duplicates, only
        a better one does.

        Args:
            group: responses to one prompt.
            newest: whether it is newest data; else it is replayed only.
        """
        if (entry := self.prompts.get(group.prompt_id)) is None:
            entry = self.prompts[group.prompt_id] = _Prompt(group.prompt)
            self.seen.append(group.prompt_id)
        self.size -= len(entry.stored)
        fresh = {t.tokens.tobytes(): t for t in group.responses}  # of duplicates the last stays
        if not self.distance:
            self._remove(entry, fresh.keys() & entry.stored.keys())
        for key, trajectory in fresh.items():
            if self.distance and entry.stored:
                distances = self.distance(trajectory, list(entry.stored.values()))
                near = [k for k, distance in zip(entry.stored, distances, strict=True) if distance <= self.near]
                if any(entry.stored[k].reward >= trajectory.reward for k in near):
                    continue
                self._remove(entry, near)
            entry.stored[key] = trajectory
            heapq.heappush(entry.heap, (self.evict(trajectory), next(self.arrivals), trajectory))
            if len(entry.heap) > self.capacity:
                del entry.stored[heapq.heappop(entry.heap)[-1].tokens.tobytes()]
        self.size += len(entry.stored)
        if newest:
            entry.newest = [fresh[t.tokens.tobytes()] for t in group.responses]  # as often as the policy said it
            self.recent[group.prompt_id] = None
            self.recent.move_to_end(group.prompt_id)
            self.arrived.add(group.prompt_id)

    def _remove(self, entry: _Prompt, keys: Iterable[bytes]) -> None:
        if gone := {id(entry.stored.pop(key)) for key in keys}:
            entry.heap = [item for item in entry.heap if id(item[-1]) not in gone]
            heapq.heapify(entry.heap)

    def start_window(self) -> None:
        """From now on, what comes is the newest data: call it when a sync is done."""
        self.arrived.clear()

    def sample(self, prompts: int, responses: int, on_policy_prob: float) -> list[Group]:
        """A batch of `prompts` distinct prompts with `responses` responses each.

        With probability `on_policy_prob` a prompt comes from what arrived since the last sync (from the last `prompts`
        to arrive, while fewer did) with responses of its last group, duplicates included: a sample of the policy that
        wrote them. Else it is any prompt seen, its distinct responses chosen by `replay`. Where a prompt has fewer than
        `responses`, they are repeated evenly, and counted in `repeated`.

        Raises:
            ValueError: fewer than `prompts` prompts were seen.
        """
        if len(self.seen) < prompts:
            raise ValueError(f"a batch needs {prompts} prompts, the buffer has {len(self.seen)}")
        window = max(len(self.arrived), prompts)
        newest = list(itertools.islice(reversed(self.recent), window))
        self.rng.shuffle(newest)
        chosen: dict[int, bool] = {}  # prompt id -> whether it was drawn as new
        while len(chosen) < prompts:
            new = self.rng.random() < on_policy_prob and bool(newest)
            prompt_id = newest.pop() if new else self.seen[self.rng.integers(len(self.seen))]
            chosen.setdefault(prompt_id, new)
        return [
            Group(prompt_id, self.prompts[prompt_id].tokens, self._responses(self.prompts[prompt_id], responses, new))
            for prompt_id, new in chosen.items()
        ]

    def _responses(self, entry: _Prompt, k: int, new: bool) -> list[Trajectory]:
        pool, choose = (entry.newest, uniform) if new else (list(entry.stored.values()), self.replay)
        whole, rest = divmod(k, len(pool))
        picked = choose(np.array([t.reward for t in pool]), rest, self.rng)
        self.repeated += max(0, k - len(pool))
        return pool * whole + [pool[i] for i in picked]
