"""What the policy can be, from its config alone."""

import shutil

import pytest
from transformers import AutoConfig

from run.policy import check_policy, load_tokenizer

SMALL = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, bos_token_id=None, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
BIG = dict(vocab_size=128_000, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {}),
        ("qwen3", {}),
        ("mistral", dict(sliding_window=8)),
        ("gemma2", dict(final_logit_softcapping=30.0, attn_logit_softcapping=50.0)),
        ("gemma3_text", dict(layer_types=["sliding_attention", "full_attention"])),
        ("cohere", {}),
        ("granite", dict(logits_scaling=8.0)),
        ("hyperclovax", dict(logits_scaling=0.5)),
        ("opt", dict(word_embed_proj_dim=32, ffn_dim=64)),
        ("llama", BIG | dict(num_attention_heads=64)),  # 70B, 280 GB if they were made
    ],
)
def test_dense_models_with_attention_can_be_trained(architecture, settings):
    check_policy(AutoConfig.for_model(architecture, **SMALL | settings))


@pytest.mark.parametrize(
    ("architecture", "settings", "complaint"),
    [
        ("mixtral", dict(num_local_experts=4), "a mixture of experts"),
        ("qwen3_moe", dict(num_experts=4, moe_intermediate_size=16), "a mixture of experts"),
        ("olmoe", dict(num_experts=4), "a mixture of experts"),
        ("lfm2", dict(layer_types=["conv", "full_attention"]), "not all attention"),
        ("falcon_h1", dict(mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16, mamba_d_state=8), "not all attention"),
        ("mamba", {}, "MambaForCausalLM does not support"),
        ("falcon", dict(alibi=True), "."),  # a mask of its own, which rows that share prompts cannot have
        ("gptj", dict(n_embd=32, n_layer=2, n_head=2, rotary_dim=8), "GPTJForCausalLM does not support"),
        ("t5", dict(d_kv=16), "Unrecognized configuration class"),
        ("bert", dict(architectures=["BertForMaskedLM"]), "it is a BertForMaskedLM"),
        ("llama", dict(architectures=["LlamaForSequenceClassification"]), "it is a LlamaForSequenceClassification"),
        ("llama", dict(quantization_config={"quant_method": "awq"}), "its weights are quantized"),
    ],
)
def test_what_the_policy_cannot_be_is_refused_from_its_config(architecture, settings, complaint):
    with pytest.raises(Exception, match=complaint):
        check_policy(AutoConfig.for_model(architecture, **SMALL | settings))


def test_it_is_refused_in_one_line_before_any_weight_is_read(make_model, main, gsm8k, tmp_path):
    folder = make_model("mixtral", num_local_experts=2)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    done = main("--task", "gsm8k", "--model", folder, "--data", gsm8k, "--out", tmp_path / "out")
    assert done.code == 2 and done.err.count("\n") == 1
    assert "it cannot be trained here (it is a mixture of experts: only dense models can be trained)" in done.err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_kind_is_named(make_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(make_model("llama", kind="ForSequenceClassification", num_labels=1), folder)
    with pytest.raises(ValueError, match=r"model is .*/model'.*LlamaForSequenceClassification, and no language model"):
        load_tokenizer(str(folder))
