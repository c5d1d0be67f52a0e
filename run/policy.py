"""What can be the policy: found from a model's config, before its weights are read."""

from pathlib import Path
from typing import Any

from rewards.judges import load_config_and_tokenizer


def load_tokenizer(model: str, weights: bool = True) -> tuple[Any, int]:
    """The policy's tokenizer, and the longest sequence that the policy takes, in tokens.

    Args:
        model: a Hugging Face folder or hub id.
        weights: whether a folder must have them.

    Raises:
        ValueError: there is no such model, or it cannot be trained here.
    """
    config, tokenizer = load_config_and_tokenizer(model, "model")
    try:
        check_policy(config)
    except Exception as error:  # whatever a model's code raises
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        raise ValueError(f"model is {model!r}: it cannot be trained here ({reason})") from None
    folder = Path(model)
    if weights and folder.is_dir() and not any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir()):
        raise ValueError(f"model is {model!r}: it must be a folder with weights (*.safetensors)")
    longest = getattr(config, "max_position_embeddings", None) or 2**20
    window = getattr(config, "sliding_window", None)  # packed rows have none: sequences must stay inside it
    return tokenizer, min(longest, window or longest)


def check_policy(config: Any) -> None:
    """Refuse a model that cannot be the policy, from its config alone: it is made, and run, without any weights.

    Raises:
        Exception: says why not.
    """
    import torch
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from train.model import load_model, token_logprobs

    kind = next(iter(config.architectures or []), None)
    if kind and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ValueError(f"it is a {kind}, and no language model that generates text")
    if getattr(config, "quantization_config", None):
        raise ValueError("its weights are quantized")
    text, nowhere = config.get_text_config(), torch.device("meta")
    with nowhere:
        policy = load_model(config, torch.float32, "cpu")
        tokens, visible = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 1, 4, 4, dtype=torch.bool)
    if any(part in name for name, _ in policy.named_parameters() for part in ("experts", "router")):
        raise ValueError("it is a mixture of experts: only dense models can be trained")
    if policy._is_stateful or {*(getattr(text, "layer_types", None) or [])} - {"full_attention", "sliding_attention"}:
        raise ValueError("its layers are not all attention, as prompts that responses share need")
    if any(isinstance(each, WeightConverter) for each in get_model_conversion_mapping(policy, add_legacy=False)):
        raise ValueError("transformers keeps its weights in another layout than its files and vLLM")
    with torch.no_grad():  # as the trainer calls it
        rows = policy.base_model(input_ids=tokens, position_ids=tokens, attention_mask=visible, use_cache=False)
        token_logprobs(policy, rows.last_hidden_state[0], tokens[0], 1.0)
