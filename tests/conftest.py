"""Small models and data in the hub's own folder format, made on the spot."""

import json
from pathlib import Path

import pytest

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"  # real rows, where they lie beside the project


def made_up(n: int) -> str:
    """A row in GSM8K's form."""
    question = f"Ann has {n} boxes of {n + 3} pens and gives {n} pens away. How many has she left?"
    answer = f"She had {n}*{n + 3}=<<{n}*{n + 3}={n * (n + 3)}>>{n * (n + 3)} pens.\n#### {n * (n + 2)}"
    return json.dumps({"question": question, "answer": answer})


@pytest.fixture(scope="session")
def gsm8k(tmp_path_factory) -> Path:
    """A folder with train.jsonl and test.jsonl: real GSM8K rows where there are any, made-up ones of the same form."""
    folder = tmp_path_factory.mktemp("gsm8k")
    for split, rows in (("train", 200), ("test", 12)):
        real = REAL / "gsm8k" / f"{split}.jsonl"
        lines = real.read_text().splitlines()[:rows] if real.is_file() else [made_up(n) for n in range(rows)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def tokenizer(gsm8k):
    """A byte-level BPE tokenizer trained on GSM8K text."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train([str(gsm8k / "train.jsonl")], vocab_size=600, special_tokens=["</s>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="session")
def make_model(tmp_path_factory, tokenizer):
    """Writes a tiny random model of an architecture as a Hugging Face folder, and returns the folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "llama": dict(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=32, max_position_embeddings=1024,
        ),
        "gpt_neox": dict(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=1024,
        ),
        "gpt2": dict(n_embd=64, n_layer=2, n_head=2, n_positions=1024),
    }  # fmt: skip

    def make(architecture: str, tie: bool) -> Path:
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            architecture,
            vocab_size=len(tokenizer),
            tie_word_embeddings=tie,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            **sizes[architecture],
        )
        folder = tmp_path_factory.mktemp(architecture)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # enough spread that two tokens' log-probabilities never agree by chance
            for weight in model.parameters():
                weight.mul_(3.0)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make
