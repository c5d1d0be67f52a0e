"""An update of the trainer on fake tensors, which have a shape and no contents, to see what memory it would take.

It is the trainer's own code, whatever the architecture, and it takes seconds and no memory: `Live` counts the bytes
that real tensors would hold. For the CPU that is what happens, and the tests hold it to updates that are measured.

For CUDA it is an estimate, which no GPU has confirmed. Fake CUDA tensors have no gradients where there is no GPU, so
that fake CPU tensors stand for them: in bf16 by autocast, with the compiler's choice of what each layer keeps for its
backward pass, and with a stand-in for flex attention (`as_on_cuda`).
"""

import contextlib
import math
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, PreTrainedConfig
from transformers.integrations.flex_attention import repeat_kv

from buffer import Group, Trajectory
from config import Config
from loss import OBJECTIVES
from optimizer import make_optimizer
from packing import tokens_of
from trainer import Trainer, decoder_layers, lighten
from weights import named_weights

EIGHT_BITS = 1 + 4 / 256  # bytes of a moment: one, and its share of an fp32 scale for 256


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that live, and the most at a time; those that share a storage count once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        try:
            result = operation(*args, **(kwargs or {}))
        except DataDependentOutputException:  # a number is read, such as the loss: any finite one will do
            return 1.0
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return result

    def _count(self, change: int) -> None:
        self.now += change
        self.peak = max(self.peak, self.now)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Without this torch compiles nothing under such a mode."""
        return True


@dataclass(frozen=True, slots=True)
class Needs:
    """What a trainer takes, in bytes but where it says otherwise."""

    tokens: int  # in a forward pass, how many
    share: bool  # whether the responses to a prompt share its tokens
    parameters: int  # how many, tied ones once
    policy: int  # and its gradients take as much
    reference: int
    moments: int
    activations: int  # what the peak of an update has beyond all those
    staged: int  # weights in the staging tensor, and in an engine: how many, tied ones twice
    cached: int  # keys and values of a token, how many

    @property
    def peak(self) -> int:
        """Of an update."""
        return 2 * self.policy + self.reference + self.moments + self.activations


def rehearse(
    model: PreTrainedConfig, config: Config, prompt: int, tokens: int, gpu: bool, end_token: int | None = None
) -> Needs:
    """What a trainer takes for an update whose forward passes have about so many tokens.

    Args:
        model: its config.
        config: the run's settings.
        prompt: tokens of the longest prompt.
        tokens: in a forward pass.
        gpu: as on CUDA; else as on the CPU.
        end_token: the tokenizer's.
    """
    budget = torch._functorch.config.patch(activation_memory_budget=config.activation_memory_budget)
    with budget, FakeTensorMode(), Live() as live:
        trainer = Trainer(
            model, OBJECTIVES[config.loss], "cpu", config.temperature, config.on_policy, config.max_grad_norm, tokens,
            config.min_tokens, end_token, optimizer=config.optimizer, has_reference=config.has_reference,
        )  # fmt: skip
        # In the others' place torch's own, which holds the same of bf16 weights but for moments of 8 bits.
        trainer.optimizer = make_optimizer("adamw", list(trainer.policy.parameters()))
        if gpu:
            as_on_cuda(trainer)
        groups, fit = batch(config, prompt, tokens, share=True)
        if not (share := trainer.shares(groups)):
            groups, fit = batch(config, prompt, tokens, share)
        trainer.micro_batch_tokens = fit * tokens_of(groups[0], trainer.shares(groups))
        weights = list(trainer.policy.parameters())
        reference = list(trainer.reference.parameters()) if trainer.has_reference else []
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        trainer.optimizer.step()  # from here on there are moments
        trainer.optimizer.zero_grad()
        live.peak = 0
        trainer.update(groups, beta=1.0, lr=1.0)
        peak = live.peak
        if gpu and trainer.has_reference:  # it has a stream of its own, whose memory the update cannot use
            before = live.peak = live.now
            with torch.no_grad():
                _, first = next(trainer.packed(groups))
                trainer.logprobs(trainer.reference, first, config.temperature, config.min_tokens)
            peak += live.peak - before
        states = trainer.optimizer.state.values()
        moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
        row = torch.zeros(1, 8, dtype=torch.long)
        with torch.no_grad(), trainer.autocast:
            layers = trainer.reference.base_model(input_ids=row, use_cache=True).past_key_values.layers
        held = size(weights), size(reference), size(moments)
        kept = held[2] * EIGHT_BITS // 2 if config.optimizer == "adamw_8bit" else held[2]
        return Needs(
            tokens=trainer.micro_batch_tokens,
            share=share,
            parameters=sum(weight.numel() for weight in weights),
            policy=held[0],
            reference=held[1],
            moments=int(kept),
            activations=peak - held[0] - sum(held),
            staged=sum(weight.numel() for _, weight in named_weights(trainer.policy)),
            cached=sum(layer.keys.numel() + layer.values.numel() for layer in layers) // row.numel(),
        )


def size(tensors: list[Tensor]) -> int:
    """Bytes of tensors that share none."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def largest(config: Config, prompt: int, share: bool) -> int:
    """Tokens of the largest group, sharing the longest prompt's or as padded rows."""
    K = config.responses_per_prompt
    return K * config.max_tokens + (prompt if share else K * prompt)


def batch(config: Config, prompt: int, tokens: int, share: bool) -> tuple[list[Group], int]:
    """Groups of an update with forward passes of about so many tokens, and how many groups fit in a pass.

    As few as can hold the tokens, all of a length, none with more than the longest prompt and K of the longest
    responses. There are two passes, for the second finds the gradients of the first; one where a pass has all B groups.
    """
    K, B = config.responses_per_prompt, config.prompts_per_step
    most = largest(config, prompt, share)
    fit = min(B, math.ceil(tokens / most))
    group = min(most, tokens // fit)
    start = max(1, prompt * group // most)
    length = max(1, (group - start) // K if share else group // K - start)

    def response() -> Trajectory:
        written, reference = np.zeros((2, length), dtype=np.float32)
        return Trajectory(np.zeros(length, np.int32), True, 0.0, 0, None if config.on_policy else written, reference)

    passes = 2 if fit < B else 1
    return [Group(i, np.zeros(start, np.int32), [response() for _ in range(K)]) for i in range(passes * fit)], fit


# ---- CUDA ----


def as_on_cuda(trainer: Trainer) -> None:
    """Let a trainer on fake CPU tensors hold what it would hold on CUDA."""
    if trainer.policy.dtype == torch.float32 and trainer.has_reference:
        lighten(trainer.reference, torch.bfloat16)
    trainer.autocast = torch.autocast("cpu", torch.bfloat16)
    with contextlib.suppress(ValueError):  # GPT-2, for one, does not have flex attention
        for model in {trainer.policy, trainer.reference}:
            model.set_attn_implementation("flex_attention")
            model.set_attn_implementation("rehearsed")
        trainer.attention = "rehearsed"
    torch._dynamo.reset()
    compiler = aot_autograd(
        fw_compiler=boxed_nop,  # no kernels are made: the graphs run as they are
        partition_fn=min_cut_rematerialization_partition,
        decompositions=decompositions,
    )
    for layer in decoder_layers(trainer.policy):
        layer.compile(backend=compiler, dynamic=False)


def decompositions() -> dict:
    """Of operations, as the compiler for CUDA has them; attention has a kernel of its own."""
    from torch._inductor.decomposition import select_decomp_table

    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    return {operation: parts for operation, parts in select_decomp_table().items() if operation is not attention}


def attention(module, query: Tensor, key: Tensor, value: Tensor, mask, **_) -> tuple[Tensor, None]:
    """Flex attention as far as memory goes, in the form that transformers has it."""
    heads = query.shape[1]
    if heads & (heads - 1):  # it shares keys between a power of 2 of heads only
        key, value = (repeat_kv(each, heads // each.shape[1]) for each in (key, value))
    out, _ = flex(*(each.to(torch.bfloat16) for each in (query, key, value)))
    return out.transpose(1, 2), None


AttentionInterface.register("rehearsed", attention)


@torch.library.custom_op("tba::flex", mutates_args=())
def flex(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The output [B, H, T, D] and the logarithm of each softmax's denominator [B, H, T]: no scores [T, T]."""
    raise NotImplementedError


@torch.library.custom_op("tba::flex_backward", mutates_args=())
def flex_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    raise NotImplementedError


@flex.register_fake
def _(q, k, v):
    return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)


@flex_backward.register_fake
def _(grad, q, k, v, out, log_z):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


flex.register_autograd(
    lambda ctx, grad, _: flex_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)
