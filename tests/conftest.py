"""Small models and data in the hub's own folder format, made on the spot."""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.runs import FEWER, nothing_is_left

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"  # real rows, where they lie beside the project


def made_up(n: int) -> str:
    """A row in GSM8K's form."""
    question = f"Ann has {n} boxes of {n + 3} pens and gives {n} pens away. How many has she left?"
    answer = f"She had {n}*{n + 3}=<<{n}*{n + 3}={n * (n + 3)}>>{n * (n + 3)} pens.\n#### {n * (n + 2)}"
    return json.dumps({"question": question, "answer": answer})


@pytest.fixture
def few_problems(monkeypatch):
    """Countdown has few, which are made at once."""
    from tasks import countdown

    for split, count in FEWER.items():
        monkeypatch.setitem(countdown.PROBLEMS, split, count)


@pytest.fixture
def main(monkeypatch, capfd, few_problems):
    """The command, run in this process, which spares it importing everything: gives its code, output and errors."""
    import tba
    from run import cli

    log = logging.getLogger("tba")
    before = log.handlers[:], log.level, log.propagate

    def run(*arguments) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["tba.py", *map(str, arguments)])
        capfd.readouterr()
        code = cli.start(tba.main)
        return SimpleNamespace(code=code, **capfd.readouterr()._asdict())

    yield run
    log.handlers[:], log.level, log.propagate = before


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


CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>\n{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory, tokenizer):
    """Writes a tiny random model of an architecture as a Hugging Face folder, and returns the folder."""
    import torch
    import transformers
    from transformers import AutoConfig

    encoder = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=514
    )
    llama = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, max_position_embeddings=1024,
    )  # fmt: skip
    sizes = {
        "llama": llama,
        "gemma2": llama | dict(query_pre_attn_scalar=32, attn_logit_softcapping=0.5, final_logit_softcapping=2.0),
        "cohere": llama | dict(logit_scale=0.25),
        "granite": llama | dict(logits_scaling=4.0, embedding_multiplier=2.0),
        "mixtral": llama,
        "gpt_neox": dict(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=1024,
        ),
        "gpt2": dict(n_embd=64, n_layer=2, n_head=2, n_positions=1024),
        "roberta": encoder,
        "bert": encoder,
    }  # fmt: skip

    def make(architecture: str, tie: bool = False, kind: str = "ForCausalLM", chat: bool = False, **settings) -> Path:
        torch.manual_seed(0)
        end = tokenizer.eos_token_id
        pad = 1 if architecture == "roberta" else end
        config = AutoConfig.for_model(
            architecture, vocab_size=len(tokenizer), tie_word_embeddings=tie, bos_token_id=None, eos_token_id=end,
            pad_token_id=pad, **sizes[architecture] | settings,
        )  # fmt: skip
        folder = tmp_path_factory.mktemp(architecture)
        model = getattr(transformers, f"AutoModel{kind}").from_config(config)
        with torch.no_grad():  # enough spread that two tokens' log-probabilities never agree by chance
            for weight in model.parameters():
                weight.mul_(3.0)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if chat:
            (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        return folder

    return make


@pytest.fixture(scope="session")
def tldr(tmp_path_factory) -> Path:
    """A folder with train.jsonl and test.jsonl in the form of the TL;DR data set."""
    folder = tmp_path_factory.mktemp("tldr")
    for split, count in (("train", 40), ("test", 12)):
        posts = [
            {
                "query": f"SUBREDDIT: r/pens\n\nTITLE: {n} pens\n\nPOST: Ann had {n} pens and lost {n % 5}.\n\nTL;DR:",
                "reference_response": f" {n % 5} of {n} lost.",
            }
            for n in range(1, 1 + count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, posts)))
    return folder


@pytest.fixture(scope="session")
def tldr_models(make_model) -> tuple[str, str]:
    """Folders of a Pythia and of a reward model made from one."""
    return str(make_model("gpt_neox")), str(make_model("gpt_neox", kind="ForSequenceClassification", num_labels=1))


@pytest.fixture(scope="session")
def redteam_models(make_model) -> dict[str, str]:
    """Folders of an attacker, a victim, a classifier and an embedder, by the settings that name them."""
    labels = {0: "nothate", 1: "hate"}
    return {
        "model": str(make_model("gpt2", True)),
        "victim": str(make_model("gpt2", True)),
        "classifier": str(make_model("roberta", kind="ForSequenceClassification", id2label=labels)),
        "embedder": str(make_model("bert", kind="")),
    }


@pytest.fixture
def nothing_left():
    with nothing_is_left():
        yield


@pytest.fixture(scope="session")
def embedded(tmp_path_factory):
    """A user's cache folder that holds an embedded model, warmed up for a few seconds only."""
    from tasks import countdown_model

    cache = tmp_path_factory.mktemp("cache")
    folder = tmp_path_factory.mktemp("embedded")
    countdown_model.warm_up(folder, seed=0, numbers=3, steps=60)
    return {"XDG_CACHE_HOME": str(cache)}, folder


@pytest.fixture
def lines(monkeypatch):
    """The lines that are logged."""
    lines = []
    monkeypatch.setattr(logging.getLogger("tba"), "info", lines.append)
    return lines
