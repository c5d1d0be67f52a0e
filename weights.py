"""How weights cross from the trainer to the engines.

One flat staging tensor holds a copy of the policy's weights. The engines open it once: as CUDA IPC memory on the
trainer's GPU, or as shared memory of the host on the CPU. A sync is then one copy by the trainer (`Staging.fill`) and
one call to each engine (worker.py), with no serialisation and no file.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from multiprocessing.reduction import ForkingPickler

import numpy as np
import torch
import torch.multiprocessing  # teaches ForkingPickler CUDA tensors
from torch import Tensor, nn

from searcher import Searcher

AGREE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # nats a token, on average: rounding stays far below


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's weights under their checkpoint names; weights that are tied come under each name."""
    return model.named_parameters(remove_duplicate=False)


class Staging:
    """A copy of a model's weights that other processes can read.

    Args:
        model: whose weights.
        dtype: of the engines.
        share_cuda: keep the copy on the model's GPU; else it is in host memory.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, share_cuda: bool):
        weights = dict(named_weights(model))
        size = sum(weight.numel() for weight in weights.values())
        self.handle: dict = {"dtype": str(dtype).removeprefix("torch."), "size": size}
        if share_cuda:
            self.flat = torch.empty(size, dtype=dtype, device=next(model.parameters()).device)
            self.handle["ipc"] = bytes(ForkingPickler.dumps(self.flat))
        else:  # memory without a name: it goes when the last process that has it open ends, however that ends
            self.memory = os.memfd_create("tba-weights")
            os.truncate(self.memory, size * dtype.itemsize)
            self.handle["path"] = f"/proc/{os.getpid()}/fd/{self.memory}"
            self.flat = torch.from_file(self.handle["path"], shared=True, size=size, dtype=dtype)
        self.handle["layout"] = [(name, list(weight.shape)) for name, weight in weights.items()]
        self.views = list(view(self.flat, self.handle["layout"]))
        self.stream = torch.cuda.Stream(self.flat.device) if share_cuda else None
        self.version = 0  # of the weights in it
        rounded = torch.bfloat16 in {dtype, *(weight.dtype for weight in weights.values())}
        self.agree = AGREE[torch.bfloat16 if rounded else torch.float32]

    def fill(self, model: nn.Module, version: int) -> None:
        """Copy the model's weights in. On CUDA the copy runs on a stream of its own: see `wait`."""
        self.version = version
        pairs = zip(self.views, named_weights(model), strict=True)
        if self.stream is None:
            with torch.no_grad():
                for (_, staged), (_, weight) in pairs:
                    staged.copy_(weight)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.flat.device))
        with torch.no_grad(), torch.cuda.stream(self.stream):
            for (_, staged), (_, weight) in pairs:
                staged.copy_(weight, non_blocking=True)

    def order_before_write(self) -> None:
        """Let what the GPU does next, a change of the weights, come after a copy that is under way."""
        if self.stream is not None:
            torch.cuda.current_stream(self.flat.device).wait_stream(self.stream)

    def wait(self) -> None:
        """Return when the last `fill` is done."""
        if self.stream is not None:
            self.stream.synchronize()


async def share(model: nn.Module, searcher: Searcher) -> Staging:
    """A staging tensor that every engine of the searcher has opened: on the trainer's GPU where they can reach it."""
    on_gpu = all(device.startswith("cuda") for device in searcher.devices)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    if on_gpu and next(model.parameters()).is_cuda:
        try:
            staging = Staging(model, dtype, share_cuda=True)
            await searcher.open_staging(staging)
            return staging
        except Exception as error:  # no peer access between the two GPUs, say
            print(
                f"weights go through host memory, for the engines cannot open the trainer's: {error}", file=sys.stderr
            )
    staging = Staging(model, dtype, share_cuda=False)
    await searcher.open_staging(staging)
    return staging


async def compare(searcher: Searcher, probe: np.ndarray, expected: np.ndarray, strict: bool) -> dict[str, float]:
    """How far the engines are from the trainer, on the log-probabilities of the same tokens.

    Args:
        searcher: has the engines.
        probe: the tokens [T].
        expected: log-probabilities of all but the first [T-1], by `Trainer.probe`.
        strict: refuse what rounding does not explain; an engine's first weights are always held to that.

    Returns:
        `sync_diff_mean` and `sync_diff_max` over the tokens, of the engine that is furthest off, in nats.

    Raises:
        RuntimeError: an engine is further off than `AGREE`; or the policy itself has no finite log-probabilities.
    """
    if not np.isfinite(expected).all():
        raise RuntimeError("the policy's log-probabilities are not finite: it has diverged (a lower --lr may help)")
    limit, mean, largest = searcher.staging.agree, 0.0, 0.0
    for engine, found in await searcher.prompt_logprobs(probe):
        difference = np.abs(found - expected)
        if (strict or not engine.agreed) and not difference.mean() <= limit:
            raise RuntimeError(
                f"the engine on {engine.device} and the trainer differ by {difference.mean():.2g} nats a token on "
                f"average, above {limit}, after a sync: what it samples from is not what is trained"
            )
        engine.agreed = True
        mean, largest = max(mean, float(difference.mean())), max(largest, float(difference.max()))
    return {"sync_diff_mean": mean, "sync_diff_max": largest}


def view(flat: Tensor, layout: Iterable[tuple[str, list[int]]]) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of each weight in a staging tensor."""
    start = 0
    for name, shape in layout:
        end = start + torch.Size(shape).numel()
        yield name, flat[start:end].view(shape)
        start = end
