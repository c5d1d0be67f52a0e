"""The trainer: the policy, its reference and the optimiser. It scores responses, makes updates, and saves itself.

On CUDA the computation is bf16 and each decoder layer is compiled by itself. Weights are fp32, or bf16 with an
optimiser that is made for it (optimizer.py). There an update is enqueued and not waited for, so that the next one is
prepared while the GPU is at work; what an update needs of the host is the reference's, which has a stream of its own.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from buffer import Group, Response
from config import Config, RunError
from loss import Batch
from train.model import dense_attention, load_model, token_logprobs
from train.optimizer import forget_half_made_state, make_optimizer, out_of_memory, take_step, weights_dtype
from train.packing import Packed, loss_batch, micro_batches, pack, packed_length, sharing_is_faster
from train.transfer import HostCopy, Pending

if TYPE_CHECKING:
    from search.weights import StagedWeights

log = logging.getLogger("tba")


class Trainer:
    """Trains a policy on batches of groups.

    Args:
        model: a Hugging Face folder or hub id; or a model's config, for random weights.
        config: the settings.
        device: of policy and reference.
        end_token: the tokenizer's, which ends a response as the model's own do.
        checkpoint: a folder that `run.snapshot` wrote, to go on from.
    """

    live = True  # `weights` and `optimizer_state` give what is trained, not copies of it

    def __init__(
        self,
        model: str | PreTrainedConfig,
        config: Config,
        device: str,
        end_token: int | None = None,
        checkpoint: Path | None = None,
    ):
        self.config, self.device, self.objective = config, torch.device(device), config.objective
        self.micro_batch_tokens = config.micro_batch_tokens  # halved where memory runs out
        on_gpu = self.device.type == "cuda"
        self.compute = torch.bfloat16 if on_gpu else torch.float32
        reset = checkpoint and (checkpoint / "reference").is_dir()
        self.lora = import_module("train.lora") if config.lora_rank else None
        self.adapter = checkpoint  # the folder that has it, where there is one
        self.policy = self.reference = self.load(model if self.lora else checkpoint or model)
        if config.has_reference and not self.lora:
            self.reference = self.load(checkpoint / "reference" if reset else model, frozen=True)
        own = self.policy.generation_config.eos_token_id
        ends = {end_token, *(own if isinstance(own, list) else [own])} - {None}
        self.end_tokens = torch.tensor(sorted(ends), dtype=torch.long, device=self.device)
        self.ref_version = 0  # resets so far
        self.attention = self.policy.config._attn_implementation  # of rows that share prompts
        self.parameters = sum(weight.numel() for weight in self.policy.parameters())
        self.autocast = torch.autocast("cuda", self.compute) if on_gpu else contextlib.nullcontext()
        self.optimizer = make_optimizer(config.optimizer, [w for w in self.policy.parameters() if w.requires_grad])
        self.stepping = False  # the weights are being changed: they are not to be saved
        self.reference_stream = torch.cuda.Stream(self.device) if on_gpu else None
        self.staged: StagedWeights | None = None  # where `stage` last copied the weights to
        if checkpoint:
            saved = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
            self.ref_version = saved["ref_version"]
            self.load_optimizer(saved["optimizer"])
        self._order_reference()

    def load(self, model: str | Path | PreTrainedConfig, frozen: bool = False) -> PreTrainedModel:
        """The policy; or, frozen, its reference."""
        loaded = load_model(model, weights_dtype(self.config.optimizer), self.device.type)
        if loaded.device != self.device:  # fake tensors (tools/plan.py) refuse to stay where they are
            loaded = loaded.to(self.device)
        loaded.requires_grad_(not (frozen or self.lora))
        if self.lora:
            self.lora.add_adapter(loaded, self.config, self.adapter)
        if self.device.type == "cuda":
            from train.cuda import cast_linears, compile_layers

            cast_linears(loaded, self.compute)
            compile_layers(loaded, self.config.activation_memory_budget)
            torch.cuda.empty_cache()  # of what was cast: an engine on this GPU counts what is free
        return loaded

    def load_optimizer(self, state: dict) -> None:
        """Go on with what `optimizer_state` gave."""
        self.optimizer.load_state_dict(state)

    @property
    def layout(self) -> list[tuple[str, list[int]]]:
        """(name, shape) of each of the policy's weights."""
        named = [each for each in self.policy.named_parameters(remove_duplicate=False) if ".lora_" not in each[0]]
        return [(name.replace(".base_layer.", "."), list(weight.shape)) for name, weight in named]

    def weights(self, of: str = "policy") -> dict[str, Tensor]:
        """The weights of the policy, its adapter or the reference, whole; merged ones are copies on the host."""
        return {name: weight if isinstance(weight, nn.Parameter) else weight.cpu() for name, weight in self.named(of)}

    def named(self, of: str = "policy") -> Iterable[tuple[str, Tensor]]:
        """(name, weight) of the policy, its adapter or the reference as in a checkpoint; tied ones by each name."""
        if self.lora:
            lora, policy = self.lora, self.policy
            return lora.adapter_weights(policy).items() if of == "adapter" else lora.merged_weights(policy)
        return getattr(self, of).named_parameters(remove_duplicate=False)

    def optimizer_state(self) -> dict:
        """The optimiser's state, whole."""
        return self.optimizer.state_dict()

    def logprobs(
        self, model: PreTrainedModel, batch: Packed, temperature: float, min_tokens: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each response token and entropy of its distribution [N], in nats, where a response could
        not end before `min_tokens` tokens."""
        attention, mask = self.attention if batch.mask is not None else dense_attention(model), batch.mask
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        if attention == "eager":  # which adds it to the scores
            T = batch.tokens.shape[1]
            mask = torch.ones(1, 1, T, T, dtype=torch.bool, device=self.device).tril() if mask is None else mask
            mask = torch.where(torch.as_tensor(mask), 0.0, torch.finfo(model.dtype).min)
        elif mask is None:  # some models look for padding where there is none
            mask = torch.ones_like(batch.tokens)
        with self.autocast:
            hidden = model.base_model(
                input_ids=batch.tokens, position_ids=batch.positions, attention_mask=mask, use_cache=False
            ).last_hidden_state
            hidden_NH = hidden.flatten(0, 1)[batch.source]
            early_N = batch.position < min_tokens if min_tokens else None
            return token_logprobs(model, hidden_NH, batch.target, temperature, early_N, self.end_tokens)

    def shares_prompts(self, groups: list[Group]) -> bool:
        """Whether the responses to a prompt are to share its tokens."""
        settings = self.policy.config.get_text_config()
        width = settings.hidden_size * settings.num_hidden_layers
        return sharing_is_faster(groups, self.attention == "flex_attention", self.parameters, width)

    def micro_batches(self, groups: list[Group]) -> Iterator[tuple[list[Group], Packed]]:
        """Micro-batches of the groups: (some of them, the same packed)."""
        share = bool(groups) and self.shares_prompts(groups)
        for some in micro_batches(groups, self.micro_batch_tokens, share):
            yield some, pack(some, self.device, self.attention == "flex_attention", share)

    @torch.no_grad()
    def score_reference(self, groups: list[Group]) -> None:
        """Set `ref_logprobs` of the responses that have none of this reference: each is computed once, when it is first
        trained on, and again after a reset. On CUDA beside the update before."""
        new = [Group(g.prompt_id, g.prompt, [r for r in g.responses if not self.scored(r)]) for g in groups]
        alone = self.lora.without_adapter(self.policy) if self.lora else contextlib.nullcontext()
        with torch.cuda.stream(self.reference_stream), alone:
            for _, batch in self.micro_batches([group for group in new if group.responses]):
                logprobs_N, _ = self.logprobs(self.reference, batch, self.config.temperature, self.config.min_tokens)
                ends = np.cumsum([len(response.tokens) for response in batch.responses])
                each = np.split(logprobs_N.cpu().numpy(), ends[:-1])
                for response, logprobs in zip(batch.responses, each, strict=True):
                    response.ref_logprobs, response.ref_version = logprobs, self.ref_version

    def scored(self, response: Response) -> bool:
        """Whether a response has the log-probabilities of this reference."""
        return response.ref_logprobs is not None and response.ref_version == self.ref_version

    def reset_reference(self) -> None:
        """Make the policy as it is now the reference."""
        self.reference.load_state_dict(self.policy.state_dict())
        self._order_reference()
        self.ref_version += 1

    def _order_reference(self) -> None:
        """Order what the reference computes from here on behind the change of its weights."""
        if self.reference_stream:
            self.reference_stream.wait_stream(torch.cuda.current_stream(self.device))

    def update(self, groups: list[Group], *, lr: float, beta: float, gamma: float = 1.0) -> Pending:
        """Take one optimiser step on B groups of K responses; the reference's log-probabilities count by 1/gamma.

        No step is taken where the loss or the gradient is not finite. Where memory runs out, micro-batches are halved
        for good.

        Returns:
            loss; kl, the mean of log pi_theta - log pi_ref in nats a response, where there is a reference; entropy, the
            mean of the next token's in nats; grad_norm, before clipping; tokens, how many the policy read; and the
            objective's own metrics.

        Raises:
            RunError: a single group takes more memory than there is.
        """
        while True:
            try:
                return self._update(groups, lr, beta, gamma)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            # Here the exception is freed, and with it the tensors that its traceback held.
            self.stepping = False
            self.optimizer.zero_grad()
            forget_half_made_state(self.optimizer)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            share = self.shares_prompts(groups)
            largest = max(packed_length(group, share) for group in groups)
            if self.micro_batch_tokens < largest:
                raise RunError(
                    f"out of memory on {self.device} in an update, on a single group of {largest} tokens: lower "
                    "--responses-per-prompt or --max-tokens, or --gpu-memory-utilization where an engine shares it"
                )
            self.micro_batch_tokens //= 2
            log.info("out of memory in an update: trying again with --micro-batch-tokens %d", self.micro_batch_tokens)

    def _update(self, groups: list[Group], lr: float, beta: float, gamma: float) -> Pending:
        config = self.config
        if config.has_reference:
            self.score_reference(groups)
        names = {name for group in groups for response in group.responses for name in response.per_token or ()}
        totals: dict[str, Tensor] = {}
        for some, packed in self.micro_batches(groups):
            share = len(some) / len(groups)
            logprobs_N, entropy_N = self.logprobs(self.policy, packed, config.temperature, config.min_tokens)
            if not some:  # another rank's groups: it needs this one's part of the layers
                (0 * logprobs_N.sum()).backward()
                continue
            batch = loss_batch(some, packed, logprobs_N, config, names)
            loss, metrics = self._loss(replace(batch, ref_BKT=batch.ref_BKT / gamma), beta)
            (loss * share).backward()
            means = metrics | {"loss": loss}
            if config.has_reference:
                means["kl"] = (batch.logprobs_BKT - batch.ref_BKT).sum(-1).mean()
            counts = {"response_tokens": len(entropy_N), "tokens": packed.num_tokens}
            sums = {name: value.detach() * share for name, value in means.items()} | {"entropy": entropy_N.sum()}
            sums |= {name: entropy_N.new_full((), count) for name, count in counts.items()}
            totals |= {name: totals.get(name, 0) + value for name, value in sums.items()}
        totals = self.total(totals)
        grad_norm = self.clip()
        if self.staged:
            self.staged.wait_before_update()
        self.stepping = True
        take_step(self.optimizer, lr, totals["loss"].isfinite() & grad_norm.isfinite())
        self.stepping = False
        self.optimizer.zero_grad()
        entropy = totals["entropy"] / totals.pop("response_tokens")
        return Pending(totals | {"entropy": entropy, "grad_norm": grad_norm})

    def total(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the micro-batches of all ranks."""
        return sums

    def clip(self) -> Tensor:
        """Scale the gradient down to --max-grad-norm; returns its norm before that."""
        return nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)

    def _loss(self, batch: Batch, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective's loss, and its metrics where it returns any."""
        returned = self.objective(batch, beta)
        loss, metrics = returned if isinstance(returned, tuple) else (returned, {})
        metrics = {name: torch.as_tensor(value, device=self.device) for name, value in metrics.items()}
        for value in (loss, *metrics.values()):
            if value.ndim:
                raise RunError(f"loss {self.objective.__name__} gives a {list(value.shape)}: it must give one number")
        return loss, metrics

    @torch.no_grad()
    def probe(self, tokens: np.ndarray) -> HostCopy:
        """Log-probability of each token of a sequence but the first [T-1] under the policy, at temperature 1."""
        group = Group(0, tokens[:1], [Response(tokens[1:], finished=True)])
        batch = pack([group], self.device, flex=self.attention == "flex_attention")
        return HostCopy(self.logprobs(self.policy, batch, temperature=1.0)[0])

    def stage(self, weights: "StagedWeights", probe: np.ndarray, step: int) -> HostCopy:
        """Copy the policy's weights to where the engines load them from; returns what it gives the probe."""
        self.staged = weights
        weights.write(step, self.named())
        return self.probe(probe)
