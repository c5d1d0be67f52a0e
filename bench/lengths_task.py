"""A task of given lengths, for measurements where only speed counts: random words, and a reward that needs no model.

Random weights hardly ever end a response, so that nearly all have `--max-tokens` tokens.

    python tba.py --task bench/lengths_task.py --model 1.1B --prompt-tokens 120 --max-tokens 200
"""

import atexit
import random
import tempfile
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

import tasks
from config import Config

SIZES: dict[str, dict[str, int]] = {  # of Llamas with random weights
    "1.1B": dict(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        vocab_size=32000,
    ),
    "30M": dict(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=8000,
    ),
    "4M": dict(
        hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=1000,
    ),
    "tiny": dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=200,
    ),
}  # fmt: skip


class Task(tasks.Task):
    """Words of one token each; the reward of a response is its share of words with an even number."""

    @dataclass(frozen=True)
    class Settings(Config):
        """Search and train on responses of given lengths."""

        model: str = "tiny"
        prompt_tokens: Annotated[int, Ge(1)] = 120
        """Words in a prompt."""
        prompts_per_step: int = 7
        responses_per_prompt: int = 20
        search_responses: int = 20
        max_tokens: int = 200
        prime: int = 140
        eval_every: int = 0
        eval_prompts: int = 0
        save_every: int = 0

    @classmethod
    def model(cls, config: Settings) -> str:
        return folder(config.model) if config.model in SIZES else config.model

    def problems(self, split: str) -> list[tasks.Problem]:
        rng = random.Random(split)
        words = [f"w{i}" for i in range(1, 200)]
        return [tasks.Problem(" ".join(rng.choices(words, k=self.config.prompt_tokens))) for _ in range(5_000)]

    def reward(self, problem: tasks.Problem, responses: list[tasks.Response]) -> list[float]:
        return [sum(w[-1] in "02468" for w in r.text.split()) / max(1, len(r.text.split())) for r in responses]


def folder(size: str) -> str:
    """A Hugging Face folder with a model of that size, and a tokenizer with a token a word; removed at the end."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    kept = tempfile.TemporaryDirectory()
    atexit.register(kept.cleanup)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(SIZES[size]["vocab_size"])}, unk_token="w0"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0")
    torch.manual_seed(0)
    ends = dict(eos_token_id=0, pad_token_id=0, bos_token_id=None)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES[size], **ends, max_position_embeddings=2048))
    model.save_pretrained(kept.name)
    tokenizer.save_pretrained(kept.name)
    return kept.name
