"""Several devices train: torch's FSDP2.

A rank has a shard of the weights, gradients and moments, layer by layer, and computes its part of an update's groups.
Every rank is given all groups: none has to ask who takes which, nor how many micro-batches the others have. The loss
stays the mean over groups, wherever they are computed.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from transformers import PreTrainedConfig, PreTrainedModel

from buffer import Group, Response
from config import RunError
from train.model import decoder_layers, load_model
from train.optimizer import out_of_memory, weights_dtype
from train.packing import Packed, micro_batches, pack, packed_length
from train.trainer import Trainer
from train.transfer import HostCopy, Pending


def on_every_rank(method: Callable) -> Callable:
    """A call of rank 0 that the others make too."""

    @functools.wraps(method)
    def call(self, *arguments, **settings):
        if self.rank:
            return method(self, *arguments, **settings)
        self.ranks.send(method.__name__, arguments, settings)
        try:
            return method(self, *arguments, **settings)
        except RuntimeError as error:
            if not isinstance(error, RunError):
                self.ranks.check(seconds=5)
            raise

    return call


class ShardedTrainer(Trainer):
    """A rank's trainer; that of rank 0 stands for all.

    Args:
        devices: of all ranks.
        store: a file through which the ranks find each other.
        ranks: the others' processes (run/ranks.py), for rank 0.
    """

    live = False

    def __init__(
        self,
        model: str,
        config,
        end_token: int | None,
        checkpoint: Path | None,
        *,
        rank: int,
        devices: Sequence[str],
        store: str,
        ranks: Any = None,
    ):
        self.rank, self.size, self.ranks, kind = rank, len(devices), ranks, devices[0].split(":")[0]
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this machine
        backend = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}[kind]
        if kind == "cuda":
            torch.cuda.set_device(devices[rank])
        rendezvous = dist.FileStore(store, self.size)
        rendezvous.set(f"{rank} is there", "")
        while ranks and not rendezvous.check([f"{each} is there" for each in range(self.size)]):
            ranks.check(seconds=0.1)
        dist.init_process_group(backend, store=rendezvous, rank=rank, world_size=self.size)
        self.mesh = init_device_mesh(kind, (self.size,))
        super().__init__(model, config, devices[rank], end_token, checkpoint)

    def load(self, model: str | Path | PreTrainedConfig, frozen: bool = False) -> PreTrainedModel:
        """This rank's shard of the policy; or, frozen, of its reference."""
        cuda = self.device.type == "cuda"
        frozen = frozen or bool(self.lora)
        dtype = self.compute if frozen and cuda else weights_dtype(self.config.optimizer)
        loaded = load_model(model, dtype, self.device.type).requires_grad_(not frozen)
        if self.lora:
            self.lora.add_adapter(loaded, self.config, self.adapter)
        precision = MixedPrecisionPolicy(self.compute, torch.float32) if cuda else MixedPrecisionPolicy()
        if cuda:
            from train.cuda import compile_layers

            compile_layers(loaded, self.config.activation_memory_budget)
        for module in [*decoder_layers(loaded), loaded]:
            fully_shard(module, mesh=self.mesh, mp_policy=precision, reshard_after_forward=True)
            module.set_force_sum_reduction_for_comms(True)  # the loss has its share of all groups already
            module.set_gradient_divide_factor(1.0)
        loaded.logprobs = functools.partial(super().logprobs, loaded)
        register_fsdp_forward_method(loaded, "logprobs")
        return loaded

    def logprobs(self, model: PreTrainedModel, *arguments, **settings) -> tuple[Tensor, Tensor]:
        """As `Trainer.logprobs`, with the weights of all ranks."""
        return model.logprobs(*arguments, **settings)

    def micro_batches(self, groups: list[Group]) -> Iterator[tuple[list[Group], Packed]]:
        """Micro-batches of this rank's groups, and of none where it has fewer than another rank."""
        share = bool(groups) and self.shares_prompts(groups)
        dealt = deal(groups, self.size, share)
        passes = [list(micro_batches(some, self.micro_batch_tokens, share)) for some in dealt]
        for i in range(max(map(len, passes))):
            some = passes[self.rank][i] if i < len(passes[self.rank]) else []
            stub = [Group(0, groups[0].prompt[:1], [Response(groups[0].responses[0].tokens[:1], True)])]
            yield some, pack(some or stub, self.device, self.attention == "flex_attention", share)

    def score_reference(self, groups: list[Group]) -> None:
        """As `Trainer.score_reference`; every rank has then what all have computed."""
        missing = {id(r): r for group in groups for r in group.responses if not self.scored(r)}.values()
        super().score_reference(groups)
        if missing:
            parts: list[dict[int, np.ndarray]] = [{}] * self.size
            dist.all_gather_object(parts, {i: r.ref_logprobs for i, r in enumerate(missing) if self.scored(r)})
            found = functools.reduce(dict.__or__, parts)
            for i, response in enumerate(missing):
                response.ref_logprobs, response.ref_version = found[i], self.ref_version

    @on_every_rank
    def update(self, groups: list[Group], *, lr: float, beta: float, gamma: float = 1.0) -> Pending:
        """As `Trainer.update`, but a RunError where memory runs out on any rank."""
        try:
            return self._update(groups, lr, beta, gamma)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise RunError(f"out of memory on {self.device} in an update: lower --micro-batch-tokens") from None

    def total(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the micro-batches of all ranks."""
        values = torch.stack(list(sums.values()))
        dist.all_reduce(values)
        return dict(zip(sums, values.unbind(), strict=True))

    def clip(self) -> Tensor:
        """Scale the gradient down to --max-grad-norm; returns its norm before that."""
        return super().clip().full_tensor()

    @on_every_rank
    def reset_reference(self) -> None:
        """Make the policy as it is now the reference."""
        super().reset_reference()

    def stage(self, weights, probe: np.ndarray, step: int) -> HostCopy:
        """As `Trainer.stage`: the weights are gathered one by one, straight into the copy."""
        self.staged = weights
        return self._stage(probe, step)

    @on_every_rank
    def _stage(self, probe: np.ndarray, step: int) -> HostCopy:
        whole = ((name, weight.full_tensor()) for name, weight in self.named())
        if self.rank:
            for _ in whole:
                pass
        else:
            self.staged.write(step, whole)
        return self.probe(probe)

    @on_every_rank
    def weights(self, of: str = "policy") -> dict[str, Tensor]:
        """The weights of the policy or the reference, whole, in rank 0's host memory; tied ones are one tensor."""
        found: dict[str, Tensor] = {}
        copies: dict[Tensor, Tensor] = {}
        for name, weight in self.named(of):
            found[name] = copies[weight] if weight in copies else self._to_host(weight)
            if isinstance(weight, nn.Parameter):  # else it is merged, and kept no longer
                copies[weight] = found[name]
        return found

    @on_every_rank
    def optimizer_state(self) -> dict:
        """The optimiser's state, whole, in rank 0's host memory."""
        return tree_map(self._to_host, self.optimizer.state_dict())

    def load_optimizer(self, state: dict) -> None:
        """Go on with this rank's shard of what `optimizer_state` gave."""
        trained = [weight for weight in self.policy.parameters() if weight.requires_grad]
        for weight, moments in zip(trained, state["state"].values(), strict=True):
            for name, value in moments.items():
                if value.ndim:
                    moments[name] = distribute_tensor(value, self.mesh, weight.placements, src_data_rank=None)
        self.optimizer.load_state_dict(state)

    def _to_host(self, value):
        if not isinstance(value, DTensor):
            return value
        whole = value.full_tensor()
        return whole.cpu() if self.rank == 0 else None


def deal(groups: list[Group], ranks: int, share: bool) -> list[list[Group]]:
    """The groups of each rank: about as many tokens, and at least one group where there are enough."""
    dealt: list[list[Group]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for group in sorted(groups, key=lambda group: -packed_length(group, share)):
        least = loads.index(min(loads))
        dealt[least].append(group)
        loads[least] += packed_length(group, share)
    return dealt
