"""The trainer: the policy, its reference and the optimiser.

It knows log-probabilities of responses, one update, and how to save itself. On CUDA the computation is bf16 and each
decoder layer is compiled by itself. Weights are fp32, or bf16 with an optimiser that is made for it (optimizer.py).

On CUDA an update is only asked for: it waits for no figure of its own, so that the next one can be made ready while the
GPU is at work. What it needs of the host is the reference's, which has a stream of its own.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from buffer import Group, Trajectory
from loss import Batch
from models import load_settings
from optimizer import make_optimizer, restore, state_tensors, take_step, weights_dtype
from packing import Packed, pack, sharing_pays, tokens_of
from screen import Failure, say
from transfer import Late, to_device
from weights import Staging

CHUNK = 2**26  # logits at a time, 256 MiB of fp32: [tokens, vocabulary] of a whole micro-batch is never built


class Trainer:
    """Trains a policy on batches of groups.

    Args:
        model: a Hugging Face folder or hub id; or a config, for policy and reference with random weights.
        objective: one of `loss.OBJECTIVES`.
        device: where policy and reference live.
        temperature: of the sampling; logits are divided by it, the policy's and the reference's alike.
        on_policy: treat every response as written by the policy that is trained; else responses need `logprobs`.
        max_grad_norm: the gradient is scaled down to this norm where it is larger.
        micro_batch_tokens: a forward pass holds whole groups of at most so many tokens (one group may hold more).
        min_tokens: a response could not end before so many tokens: the policy is the model without that possibility.
        end_token: the tokenizer's, which ends a response as the model's own do.
        checkpoint_dir: go on from this folder, written by what `snapshot` returns.
        optimizer: one of `optimizer.OPTIMIZERS`, which decides on the weights' dtype.
        activation_memory_budget: on CUDA, the share that a layer keeps for its backward pass of what it would keep.
        has_reference: else the policy stands for its own reference: beta must be 0, and no KL is known.

    Raises:
        Failure: the device has too little memory.
    """

    def __init__(
        self,
        model: str | PreTrainedConfig,
        objective: Callable,
        device: str,
        temperature: float = 1.0,
        on_policy: bool = True,
        max_grad_norm: float = 1.0,
        micro_batch_tokens: int = 16384,
        min_tokens: int = 0,
        end_token: int | None = None,
        checkpoint_dir: Path | None = None,
        optimizer: str = "adamw",
        activation_memory_budget: float = 1.0,
        has_reference: bool = True,
    ):
        self.objective, self.device, self.temperature = objective, torch.device(device), temperature
        self.on_policy, self.max_grad_norm, self.micro_batch_tokens = on_policy, max_grad_norm, micro_batch_tokens
        self.min_tokens, self.has_reference = min_tokens, has_reference
        compute = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        dtype = weights_dtype(optimizer)
        reset = checkpoint_dir and (checkpoint_dir / "reference").is_dir()
        try:
            self.policy = self.reference = load_model(checkpoint_dir or model, dtype, self.device)
            if has_reference:
                self.reference = load_model(checkpoint_dir / "reference" if reset else model, dtype, self.device)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise Failure(
                f"out of memory on {device} while loading policy and reference: choose a smaller --model, another "
                "--train-device, or lower --gpu-memory-utilization where an engine shares it"
            ) from None
        own = self.policy.generation_config.eos_token_id
        ends = {end_token, *(own if isinstance(own, list) else [own])} - {None}
        self.end_tokens = torch.tensor(sorted(ends), dtype=torch.long, device=self.device)
        self.ref_version = 0  # resets so far
        self.attention = self.policy.config._attn_implementation  # of rows that share prompts
        if has_reference:
            self.reference.requires_grad_(False)
            if dtype == torch.float32:
                lighten(self.reference, compute)
        for each in {self.policy, self.reference}:  # which may be one
            each.eval()  # no dropout: a response has one log-probability
            if self.device.type == "cuda":
                torch._functorch.config.activation_memory_budget = activation_memory_budget
                for layer in decoder_layers(each):
                    layer.compile()
        self.parameters = sum(weight.numel() for weight in self.policy.parameters())
        self.autocast = torch.autocast("cuda", compute) if self.device.type == "cuda" else contextlib.nullcontext()
        self.optimizer = make_optimizer(optimizer, list(self.policy.parameters()))
        self.stepping = False  # the weights are being changed
        self.aside = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # the reference's
        self._order_reference()
        self.staging: Staging | None = None
        if checkpoint_dir:
            self._load_optimizer(checkpoint_dir)

    def logprobs(
        self, model: PreTrainedModel, batch: Packed, temperature: float, min_tokens: int = 0
    ) -> tuple[Tensor, Tensor]:
        """(log-probability of each token of the batch's responses [N], entropy of what it was drawn from [N]), in nats,
        where a response could not end before `min_tokens` tokens."""
        attention = self.attention if batch.mask is not None else "sdpa"
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        with self.autocast:
            hidden = model.base_model(
                input_ids=batch.tokens, position_ids=batch.positions, attention_mask=batch.mask, use_cache=False
            ).last_hidden_state
            hidden_NH = hidden.flatten(0, 1)[batch.source]
            early_N = batch.place < min_tokens if min_tokens else None
            head = model.get_output_embeddings()
            return token_logprobs(head, hidden_NH, batch.target, temperature, early_N, self.end_tokens)

    def shares(self, groups: list[Group]) -> bool:
        """Whether the responses to a prompt are to share its tokens."""
        settings = self.policy.config.get_text_config()
        width = settings.hidden_size * settings.num_hidden_layers
        return sharing_pays(groups, self.attention != "sdpa", self.parameters, width)

    def packed(self, groups: list[Group]) -> Iterator[tuple[list[Group], Packed]]:
        """Groups in micro-batches, alike in length, each as they are and packed."""
        share = bool(groups) and self.shares(groups)
        for micro in micro_batches(groups, self.micro_batch_tokens, share):
            yield micro, pack(micro, self.device, self.attention != "sdpa", share)

    @torch.no_grad()
    def probe(self, tokens: np.ndarray) -> Late:
        """Log-probability of each token of a sequence but the first [T-1] under the policy, at temperature 1."""
        rest = Trajectory(tokens[1:], finished=True, reward=0.0, version=0)
        batch = pack([Group(0, tokens[:1], [rest])], self.device, share=False)
        return Late(self.logprobs(self.policy, batch, temperature=1.0)[0])

    @torch.no_grad()
    def score_reference(self, groups: list[Group]) -> None:
        """Set `ref_logprobs` of the responses that have none of this reference: each is computed once, when it is first
        trained on, and once more when it is first trained on after a reset. On CUDA beside the update before."""

        def lacks(response: Trajectory) -> bool:
            return response.ref_logprobs is None or response.ref_version != self.ref_version

        new = [Group(g.prompt_id, g.prompt, [r for r in g.responses if lacks(r)]) for g in groups]
        with torch.cuda.stream(self.aside):
            for _, batch in self.packed([group for group in new if group.responses]):
                logprobs_N, _ = self.logprobs(self.reference, batch, self.temperature, self.min_tokens)
                ends = np.cumsum([len(response.tokens) for response in batch.responses])
                each = np.split(logprobs_N.cpu().numpy(), ends[:-1])
                for response, logprobs in zip(batch.responses, each, strict=True):
                    response.ref_logprobs, response.ref_version = logprobs, self.ref_version

    def reset_reference(self) -> None:
        """Let the policy as it is now be the reference."""
        self.reference.load_state_dict(self.policy.state_dict())
        self._order_reference()
        self.ref_version += 1

    def _order_reference(self) -> None:
        """Let what the reference computes from here on come after the change of its weights."""
        if self.aside:
            self.aside.wait_stream(torch.cuda.current_stream(self.device))

    def update(self, groups: list[Group], beta: float, lr: float, gamma: float = 1.0) -> "Figures":
        """One optimiser step on B groups of K responses; the reference's log-probabilities count by 1/gamma.

        There is no step where the loss or the gradient is not finite. Where memory runs out, micro-batches are halved
        for good.

        Returns:
            loss; kl, the mean of log pi_theta - log pi_ref in nats a response, where there is a reference; entropy, the
            mean of the next token's in nats; grad_norm, before clipping; tokens, how many the policy read.

        Raises:
            Failure: a single group takes more memory than there is.
        """
        while True:
            try:
                return self._update(groups, beta, lr, gamma)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            # Here the exception is gone, and with it the tensors that its traceback held.
            self.stepping = False
            self.optimizer.zero_grad()
            for weight in [weight for weight, state in self.optimizer.state.items() if len(state) < 3]:
                del self.optimizer.state[weight]  # half made: the first step came to nothing
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            share = self.shares(groups)
            largest = max(tokens_of(group, share) for group in groups)
            if self.micro_batch_tokens < largest:
                raise Failure(
                    f"out of memory on {self.device} in an update, on a single group of {largest} tokens: lower "
                    "--responses-per-prompt or --max-tokens, or --gpu-memory-utilization where an engine shares it"
                )
            self.micro_batch_tokens //= 2
            say(f"out of memory in an update: it is made again with --micro-batch-tokens {self.micro_batch_tokens}")

    def _update(self, groups: list[Group], beta: float, lr: float, gamma: float) -> "Figures":
        if self.has_reference:
            self.score_reference(groups)
        totals, tokens, read = torch.zeros(3, device=self.device), 0, 0
        for micro, batch in self.packed(groups):
            share = len(micro) / len(groups)
            logprobs_N, entropy_N = self.logprobs(self.policy, batch, self.temperature, self.min_tokens)
            data = self._batch(micro, batch, logprobs_N)
            loss = self.objective(replace(data, ref_BKT=data.ref_BKT / gamma), beta)
            if loss.ndim:
                raise Failure(f"loss {self.objective.__name__} gives a {list(loss.shape)}: it must give one number")
            (loss * share).backward()
            kl = (data.logprobs_BKT.detach() - data.ref_BKT).sum(-1).mean()
            totals += torch.stack([share * loss.detach(), share * kl, entropy_N.detach().sum()])
            tokens += len(entropy_N)
            read += batch.read
        grad_norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        loss, kl, entropy = totals
        if self.staging:
            self.staging.order_before_write()
        self.stepping = True
        take_step(self.optimizer, lr, loss.isfinite() & grad_norm.isfinite())
        self.stepping = False
        self.optimizer.zero_grad()
        late = {"loss": loss, "kl": kl, "entropy": entropy / tokens, "grad_norm": grad_norm}
        if not self.has_reference:
            del late["kl"]
        return Figures({"tokens": read}, late)

    def _batch(self, groups: list[Group], packed: Packed, logprobs_N: Tensor) -> Batch:
        """What the objective reads, each group with its K responses, those that it holds several times included."""
        place = {id(response): u for u, response in enumerate(packed.responses)}
        index_BK = to_device(np.array([[place[id(r)] for r in g.responses] for g in groups]), self.device)

        def stored_N(name: str) -> Tensor:
            values = np.concatenate([getattr(response, name) for response in packed.responses])
            return to_device(values, self.device)

        own_N = logprobs_N.detach()
        ref_N = stored_N("ref_logprobs") if self.has_reference else own_N
        behaviour_N = own_N if self.on_policy else stored_N("logprobs")
        per_token = (logprobs_N, ref_N, behaviour_N, torch.ones_like(logprobs_N))
        rewards = np.array([response.reward for response in packed.responses])
        rewards_U = to_device(rewards, self.device, torch.float32)
        logprobs_BKT, ref_BKT, behaviour_BKT, mask_BKT = (packed.padded(each)[index_BK] for each in per_token)
        return Batch(logprobs_BKT, ref_BKT, behaviour_BKT, mask_BKT, rewards_U[index_BK])

    def publish(self, tokens: np.ndarray, version: int) -> Late:
        """Copy the policy's weights to where the engines take them from.

        Returns:
            What this policy gives the tokens, as `probe` does: the engines are to give the same.
        """
        self.staging.fill(self.policy, version)
        return self.probe(tokens)

    def export(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the policy as a Hugging Face folder."""
        self.policy.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def snapshot(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[Path], None]:
        """A copy of policy, optimiser and, where it was reset, reference, in the host's memory; what is returned writes
        it to a folder: the policy as a Hugging Face folder, the others beside it."""
        policy = copied(self.policy.state_dict())
        reference = copied(self.reference.state_dict()) if self.ref_version else None
        moments = copied(dict(state_tensors(self.optimizer)))
        resets = {"ref_version": str(self.ref_version)}

        def write(folder: Path) -> None:
            self.policy.save_pretrained(folder, state_dict=policy)
            tokenizer.save_pretrained(folder)
            if reference is not None:
                self.reference.save_pretrained(folder / "reference", state_dict=reference)
            save_file(moments, folder / "optimizer.safetensors", metadata=resets)

        return write

    def _load_optimizer(self, folder: Path) -> None:
        with safe_open(folder / "optimizer.safetensors", "pt") as file:
            self.ref_version = int(file.metadata()["ref_version"])
            restore(self.optimizer, {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118


class Figures(Mapping[str, float]):
    """What an update gives, by name. On CUDA the update may be under way: who reads a figure waits for it.

    Args:
        known: figures that the host has.
        late: figures that the device will have.
    """

    def __init__(self, known: dict[str, float], late: dict[str, Tensor]):
        self.known, self.late = known, Late(torch.stack(list(late.values())))
        self.places = {name: i for i, name in enumerate(late)}

    @property
    def ready(self) -> bool:
        """Whether the update is done."""
        return self.late.ready

    def wait(self) -> None:
        """Return when it is."""
        self.late.numpy()

    def __getitem__(self, name: str) -> float:
        return self.known[name] if name in self.known else float(self.late.numpy()[self.places[name]])

    def __iter__(self) -> Iterator[str]:
        return itertools.chain(self.places, self.known)

    def __len__(self) -> int:
        return len(self.places) + len(self.known)


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the host's memory; names that share a tensor share its copy."""
    copies: dict[int, Tensor] = {}
    for tensor in tensors.values():
        if tensor.data_ptr() not in copies:
            copies[tensor.data_ptr()] = tensor.detach().to("cpu", copy=True).contiguous()
    return {name: copies[tensor.data_ptr()] for name, tensor in tensors.items()}


def out_of_memory(error: RuntimeError) -> bool:
    """Whether that is what went wrong, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def load_tokenizer(model: str, weights: bool = True) -> tuple[PreTrainedTokenizerBase, int]:
    """A model's tokenizer, and the longest sequence that the model takes, in tokens.

    Args:
        model: a Hugging Face folder or hub id.
        weights: whether a folder must have them.

    Raises:
        ValueError: there is no such model.
    """
    settings, tokenizer = load_settings(model, "model")
    for scaling in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(settings, scaling, None) not in (None, 1.0):
            raise ValueError(f"model is {model!r}: it must be one whose logits are not scaled ({scaling})")
    found = not Path(model).is_dir() or any(path.suffix in (".safetensors", ".bin") for path in Path(model).iterdir())
    if weights and not found:
        raise ValueError(f"model is {model!r}: it must be a folder with weights (*.safetensors)")
    longest = getattr(settings, "max_position_embeddings", None) or 2**20
    window = getattr(settings, "sliding_window", None)  # packed rows have none: stay inside it
    return tokenizer, min(longest, window or longest)


def load_model(model: str | Path | PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model with flex attention on CUDA where its architecture has it; else with torch's own."""
    from_config = isinstance(model, PreTrainedConfig)
    load = AutoModelForCausalLM.from_config if from_config else AutoModelForCausalLM.from_pretrained
    if device.type == "cuda":
        with contextlib.suppress(ValueError):  # GPT-2, for one, does not have it
            return load(model, dtype=dtype, attn_implementation="flex_attention").to(device)
    loaded = load(model, dtype=dtype, attn_implementation="sdpa")
    return loaded if loaded.device == device else loaded.to(device)  # fake tensors (rehearsal.py) refuse even that


def lighten(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with the weights of its linear layers in `dtype`, in place.

    Under autocast it computes exactly what it did: those weights would be cast anyway, and no others are. (A model all
    in bf16 has its residual stream in bf16 too, and differs from the policy before anything is trained.)
    """
    embedding = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not embedding:  # tied, it is read as an embedding too
            for name, weight in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(weight.to(dtype), weight.requires_grad))
    return model


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """A model's stack of layers, which architectures name differently: its longest list of modules."""
    return max((m for m in model.base_model.modules() if isinstance(m, nn.ModuleList)), key=len)


def token_logprobs(
    head: nn.Module,
    hidden_NH: Tensor,
    target_N: Tensor,
    temperature: float,
    early_N: Tensor | None = None,
    end_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution [N], in fp32 or better, in nats.

    In chunks of `CHUNK` logits. Where there are several, each is computed anew in the backward pass. Where `early_N` is
    true, none of `end_tokens` could be drawn.
    """

    def of_chunk(hidden: Tensor, target: Tensor, early: Tensor | None) -> tuple[Tensor, Tensor]:
        logits = head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
        if early is not None:
            impossible = torch.zeros_like(logits, dtype=torch.bool)
            impossible[:, end_tokens] = early[:, None]
            logits = logits.masked_fill(impossible, torch.finfo(logits.dtype).min)
        log_z = logits.logsumexp(-1)
        with torch.no_grad():
            entropy = log_z - ((logits - log_z[:, None]).exp() * logits).sum(-1)
        return logits.gather(-1, target[:, None])[:, 0] - log_z, entropy

    size = max(1, CHUNK // head.weight.shape[0])
    if len(target_N) <= size:
        return of_chunk(hidden_NH, target_N, early_N)
    early = itertools.repeat(None) if early_N is None else early_N.split(size)
    chunks = zip(hidden_NH.split(size), target_N.split(size), early, strict=False)
    results = [checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in chunks]
    return torch.cat([logprob for logprob, _ in results]), torch.cat([entropy for _, entropy in results])


def micro_batches(groups: list[Group], budget: int, share: bool) -> Iterator[list[Group]]:
    """Whole groups, alike in length, together at most `budget` tokens with the padding to the longest."""
    ordered = sorted(groups, key=lambda group: tokens_of(group, share), reverse=True)
    while ordered:
        fit = max(1, budget // tokens_of(ordered[0], share))
        yield ordered[:fit]
        ordered = ordered[fit:]
