"""TL;DR: summaries of Reddit posts, scored by a reward model (https://arxiv.org/abs/2009.01325).

A record, from the hub's data set or from `--data DIR` with train.jsonl and test.jsonl:

    {"query": "SUBREDDIT: r/relationships\\n\\nTITLE: ...\\n\\nPOST: ...\\n\\nTL;DR:",
     "reference_response": " Still have contact with an old ex, ...<|endoftext|>"}

The defaults are the paper's for Pythia 1B on 4 GPUs.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np

import tasks
from config import Config
from rewards.judges import Judge, LanguageModel, RewardModel, special_tokens_behind, strip_special_tokens
from tasks import Answered, Problem, data

NO_END = -1.0  # reward of a response that was cut off


class Task(tasks.Task):
    """The reward model scores query and response; the gold one, which training never sees, evaluates them."""

    @dataclass(frozen=True)
    class Settings(Config):
        """Post-train a language model to summarise, searching and training at once."""

        model: str = "mnoukhov/pythia1b-sft-tldr"
        reward_model: str = "mnoukhov/pythia1b-rm-tldr6.9b"
        """Gives the reward: a Hugging Face folder or hub id of a sequence classifier with one label."""
        gold_reward_model: str = "cleanrl/EleutherAI_pythia-6.9b-deduped__reward__tldr"
        """Compares responses with the reference summaries in evaluations: likewise."""
        data: str = "vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144"
        steps: int = 256
        prompts_per_step: int = 8
        responses_per_prompt: int = 20
        search_responses: int = 20
        lr: float = 3e-6
        lr_schedule: str = "linear"
        beta: float = 1.0
        beta_schedule: str = "linear"
        beta_final: float = 0.05
        beta_steps: int = 256
        temperature: float = 0.7
        max_tokens: int = 128
        sync_every: int = 10
        on_policy_prob: float = 0.5
        replay: str = "reward"
        prime: int = 10_000
        reward_concurrency: int = 8
        gpu_memory_utilization: float = 0.5
        eval_every: int = 64
        eval_prompts: int = 512
        eval_samples: int = 1
        save_every: int = 64

    best = "win_rate"
    evaluation_logprobs = True

    def __init__(self, config: Settings, tokenizer):
        super().__init__(config, tokenizer)
        self.scores = RewardModel(config.reward_model, "reward_model")
        self.judges: list[Judge] = [self.scores]
        if config.eval_prompts:
            self.gold = RewardModel(config.gold_reward_model, "gold_reward_model")
            self.sft = LanguageModel(config.model, "model", (1.0, config.temperature))
            self.judges += [self.gold, self.sft]

    def problems(self, split: str) -> list[Problem]:
        """The "train" or "test" posts; the answer is the reference summary."""
        rows = data.rows(self.config.data, split, ("query", "reference_response"))
        return [Problem(row["query"], row["reference_response"]) for _, row in rows]

    @contextlib.asynccontextmanager
    async def serving(self, setup) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            for judge, device in zip(self.judges, itertools.cycle(setup.judge_devices), strict=False):
                await stack.enter_async_context(judge.loaded(device, setup.search_cores))
            yield

    async def reward(self, problem: Problem, responses: list[tasks.Response]) -> list[float]:
        texts = [scored_text(self.scores, problem, each.text) for each in responses if each.finished]
        scores = iter(await self.scores(texts) if texts else [])
        return [float(next(scores)) if response.finished else NO_END for response in responses]

    async def evaluate(self, answers: list[Answered]) -> dict[str, float]:
        """Figures of the sampled responses.

        Returns:
            `win_rate`, how often the gold reward model prefers one to the reference summary; `reward`; `kl`, the mean
            of log pi - log pi_sft in nats a response, at the training temperature; `perplexity` of the responses under
            the SFT model; `perplexity_diluted`, which divides their negative log-likelihood by the prompts' tokens too
            (the paper's figure); `tokens` of a response; `truncated`.
        """
        pairs = [(each, sample) for each in answers for sample in each.samples]
        texts = [scored_text(self.gold, each.problem, sample.text) for each, sample in pairs]
        references = [scored_text(self.gold, each.problem, each.problem.answer) for each, _ in pairs]
        sequences = [np.concatenate([each.prompt, sample.tokens]) for each, sample in pairs]
        ours, theirs, logprobs = await asyncio.gather(self.gold(texts), self.gold(references), self.sft(sequences))
        sft_N2 = np.array(  # log pi_sft of each response, at both temperatures
            [each[len(a.prompt) - 1 :][: len(s.tokens)].sum(0) for each, (a, s) in zip(logprobs, pairs, strict=True)]
        )
        policy = np.array([sample.logprobs.sum() for _, sample in pairs])
        tokens, prompts = (
            sum(len(x) for x in each) for each in ([s.tokens for _, s in pairs], [a.prompt for a, _ in pairs])
        )
        return {
            "win_rate": float(np.mean(np.array(ours) > np.array(theirs))),
            "reward": float(np.nanmean([sample.reward for _, sample in pairs])),
            "kl": float(np.mean(policy - sft_N2[:, 1])),
            "perplexity": float(np.exp(-sft_N2[:, 0].sum() / tokens)),
            "perplexity_diluted": float(np.exp(-sft_N2[:, 0].sum() / (tokens + prompts))),
            "tokens": tokens / len(pairs),
            "truncated": float(np.mean([not sample.finished for _, sample in pairs])),
        }


def scored_text(judge: RewardModel, problem: Problem, response: str) -> str:
    """The text that a reward model scores: the query, the response, and the end of the sequence, once."""
    end = "" if special_tokens_behind(judge.tokenizer) else judge.tokenizer.eos_token or ""
    return f"{problem.prompt}{strip_special_tokens(response, judge.tokenizer)}{end}"
