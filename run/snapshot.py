"""Snapshots of the trainer and of the buffer: taken at once, written to a checkpoint's folder later."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from buffer import Buffer, Response

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from train.trainer import Trainer

BUFFER = "buffer.safetensors"
SCALARS = dict(finished=np.bool_, reward=np.float64, version=np.int64, ref_version=np.int64)  # columns of responses
ARRAYS = dict(tokens=np.int32, logprobs=np.float32, ref_logprobs=np.float32, embedding=np.float32)
PER_TOKEN = "per_token."  # prefix of the columns of `Response.per_token`


def trainer_writer(trainer: "Trainer") -> Callable[[Path], None]:
    """Copy policy (or its adapter, if it has one), optimiser and, where it was reset, reference to the host's memory. A
    GPU is not waited for; several give copies that they gathered.

    The returned function writes them: the policy as a Hugging Face folder, the adapter as peft's, the others beside it.
    """
    import torch
    from torch.utils._pytree import tree_map_only

    from train.transfer import HostCopy

    policy = trainer.weights("adapter" if trainer.lora else "policy")
    reference = trainer.weights("reference") if trainer.ref_version else None
    optimizer = {"optimizer": trainer.optimizer_state(), "ref_version": trainer.ref_version}
    if trainer.live:
        policy, reference = copy_to_host(policy), reference and copy_to_host(reference)
        optimizer = tree_map_only(torch.Tensor, to_host, optimizer)
    last = HostCopy(torch.zeros(1, device=trainer.device))

    def write(folder: Path) -> None:
        last.numpy()  # waits for it, and so for all
        if trainer.lora:
            trainer.lora.save_adapter(trainer.policy, folder, policy)
        else:
            save_model(trainer.policy, folder, policy)
        if reference is not None:
            save_model(trainer.reference, folder / "reference", reference)
        torch.save(optimizer, folder / "optimizer.pt")

    return write


def save_model(model: "PreTrainedModel", folder: Path, weights: dict[str, "Tensor"] | None = None) -> None:
    """Write a model, with these weights or its own, as a Hugging Face folder.

    transformers refuses to write a generation_config.json that contradicts itself, and models come with such ones
    (`do_sample` off and a `temperature`): of that the special tokens are kept.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    try:
        own.validate(strict=True)
    except ValueError:
        kept = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**kept)
    model.save_pretrained(folder, state_dict=weights)


def to_host(tensor: "Tensor") -> "Tensor":
    """A copy in the host's memory. From a GPU it goes to pinned memory, behind all that the GPU was given before, and a
    `HostCopy` that is made after it has not arrived before it has."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass, transform_subclass

    if is_traceable_wrapper_subclass(tensor):  # torchao's moments of 8 bits, which know no other copy
        return transform_subclass(tensor, lambda _, inner: to_host(inner))
    return tensor.detach().to("cpu", non_blocking=True, copy=True)


def copy_to_host(tensors: dict[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Copies in the host's memory, as `to_host` makes them; names that share a tensor share its copy."""
    copies: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if tensor.data_ptr() not in copies:
            copies[tensor.data_ptr()] = to_host(tensor)
    return {name: copies[tensor.data_ptr()] for name, tensor in tensors.items()}


def buffer_writer(buffer: Buffer) -> Callable[[Path], None]:
    """Take the state of a buffer; the returned function writes it to a folder."""
    state = buffer.state_dict()

    def write(folder: Path) -> None:
        from safetensors.numpy import save_file

        prompts, reference = state["prompts"], state["reference"]
        place = {r: (n, arrival) for n, (_, _, stored, _) in enumerate(prompts) for arrival, r in stored}
        for n, (*_, last_group) in enumerate(prompts):
            for response in last_group:
                place.setdefault(response, (n, -1))  # it was evicted, or never stored
        index = {response: i for i, response in enumerate(place)}
        values = {name: [getattr(response, name) for response in index] for name in (*SCALARS, *ARRAYS)}
        for i, name in enumerate(("ref_version", "ref_logprobs")):
            values[name] = [reference[response][i] for response in index]
        columns: dict[str, np.ndarray] = {name: np.array(values[name], dtype) for name, dtype in SCALARS.items()}
        for name, dtype in ARRAYS.items():
            columns |= _joined(name, values[name], dtype)
        for name in sorted({name for response in index for name in response.per_token or ()}):
            columns |= _joined(PER_TOKEN + name, [(r.per_token or {}).get(name) for r in index], np.float32)
        columns["prompt"], columns["arrival"] = np.array(list(place.values()), np.int64).reshape(-1, 2).T.copy()
        columns |= _joined("prompt_tokens", [tokens for _, tokens, _, _ in prompts], np.int32)
        columns |= _joined("last_group", [[index[r] for r in last_group] for *_, last_group in prompts], np.int64)
        columns["prompt_id"] = np.array([prompt_id for prompt_id, *_ in prompts], np.int64)
        rest = {name: value for name, value in state.items() if name not in ("prompts", "reference")}
        save_file(columns, folder / BUFFER, metadata={"state": json.dumps(rest)})

    return write


def read_buffer(folder: Path) -> dict:
    """The state of a buffer, for `Buffer.load_state_dict`."""
    from safetensors import safe_open

    with safe_open(folder / BUFFER, "numpy") as file:
        columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = json.loads(file.metadata()["state"])
    fields = {name: columns[name].tolist() for name in SCALARS} | {name: _parts(name, columns) for name in ARRAYS}
    responses = [Response(**dict(zip(fields, row, strict=True))) for row in zip(*fields.values(), strict=True)]
    for name in (name for name in columns if name.startswith(PER_TOKEN) and f"{name}.lengths" in columns):
        for response, values in zip(responses, _parts(name, columns), strict=True):
            if values is not None:
                response.per_token = (response.per_token or {}) | {name.removeprefix(PER_TOKEN): values}
    stored: list[list[tuple[int, Response]]] = [[] for _ in columns["prompt_id"]]
    for response, n, arrival in zip(responses, columns["prompt"].tolist(), columns["arrival"].tolist(), strict=True):
        if arrival >= 0:
            stored[n].append((arrival, response))
    groups = [[responses[i] for i in group] for group in _parts("last_group", columns)]
    tokens = _parts("prompt_tokens", columns)
    prompts = list(zip(columns["prompt_id"].tolist(), tokens, stored, groups, strict=True))
    return state | {"prompts": prompts, "reference": {}}


def _joined(name: str, arrays: list, dtype: type) -> dict[str, np.ndarray]:
    """A column of arrays one after another, and a column of their lengths: -1 where there is none."""
    lengths = np.array([-1 if array is None else len(array) for array in arrays], np.int64)
    present: list[np.ndarray] = [np.asarray(array, dtype) for array in arrays if array is not None]
    return {name: np.concatenate([np.empty(0, dtype), *present]), f"{name}.lengths": lengths}


def _parts(name: str, columns: dict[str, np.ndarray]) -> list:
    """The arrays that `_joined` joined; copies, so that one that leaves the buffer frees its memory."""
    lengths, whole = columns[f"{name}.lengths"], columns[name]
    pairs = zip(lengths.tolist(), np.maximum(lengths, 0).cumsum().tolist(), strict=True)
    return [None if length < 0 else whole[end - length : end].copy() for length, end in pairs]
