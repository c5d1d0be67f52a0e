"""A Ray cluster: to connect to it, its actors, and models that score there. Engines there are in remote.py."""

import logging
import os
import socket
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError

from config import RunError
from search.host import JudgeHost

PROJECT = Path(__file__).resolve().parents[1]
TOKEN = Path.home() / ".ray" / "auth_token"  # Ray's own

log = logging.getLogger("tba")


def connect() -> Counter[str]:
    """Connect to the cluster that RAY_ADDRESS names, or that this machine is a node of; returns its resources.

    Raises:
        ValueError: there is none.
    """
    address = os.environ.get("RAY_ADDRESS", "auto")
    runtime = {  # of the actors: this code, as it is here
        "working_dir": str(PROJECT),
        "excludes": ["/docs", "/tests", "/bench", "/runs"],
        "env_vars": {
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
            "RAY_worker_niceness": "0",  # Ray's is 15, with which a process beside busy ones starts after minutes
        },
    }
    try:
        if address.startswith("ray://"):
            raise ConnectionError("this machine must be one of its nodes: RAY_ADDRESS=HOST:PORT without ray://")
        if address != "auto":  # which Ray would try for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        if not ray.is_initialized():
            ray.init(address, runtime_env=runtime, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        reason, start = " ".join(str(error).split()), "`ray start --head` starts one, docs/cluster.md says more"
        if TOKEN.exists() and "RAY_AUTH_MODE" not in os.environ:  # the head asks for it then, and others do not give it
            start += f"; where {TOKEN} exists it needs RAY_AUTH_MODE=token"
        raise ValueError(f"no Ray cluster can be reached at {address!r}: {start} ({reason:.200})") from None
    ray._private.worker.print_to_stdstream = lambda *_, **__: None  # what a raylet printed last, when its node goes
    return Counter(ray.cluster_resources())


def actor(host: type, gpu: bool, *arguments, **options) -> Any:
    """An actor on a GPU or on a CPU core, when the cluster has one for it."""
    return ray.remote(num_cpus=1, num_gpus=int(gpu), **options)(host).remote(*arguments)


def found_there(model: str) -> str:
    """A hub id, or a folder's absolute path: the processes of a cluster have a working folder of their own."""
    return os.path.abspath(model) if os.path.isdir(model) else model


def has() -> str:
    """What the cluster has, in words."""
    every, free = Counter(ray.cluster_resources()), Counter(ray.available_resources())
    gpus, cores = (f"{every[kind]:.0f} {kind}s ({free[kind]:.0f} free)" for kind in ("GPU", "CPU"))
    return f"the cluster has {gpus} and {cores}"


class RemoteJudge:
    """A judge that is loaded on the cluster; where its node goes, Ray starts it on another. `end` it."""

    def __init__(self, judge: Any, device: str):
        self.judge, gpu = judge, "cpu" not in device
        judge.name = found_there(judge.name)
        log.info(f"waiting for a place for {judge.field}: {has()}")
        there = "cuda:0" if gpu else "cpu"
        self.actor = actor(JudgeHost, gpu, judge, there, max_restarts=-1, max_task_retries=-1)

    def load(self) -> None:
        """Wait until the cluster has room for it, and it is loaded. A RunError says why it cannot be."""
        try:
            self._result(self.actor.__ray_ready__.remote())
        except RayActorError as error:
            reason = str(error).strip().splitlines()[-1]
            raise RunError(f"{self.judge.name} cannot be loaded on the cluster: {reason}") from error

    def compute(self, texts: Sequence) -> list[np.ndarray]:
        """As `Judge._compute`; waits while Ray starts it anew."""
        return self._result(self.actor.compute.remote(texts))

    def end(self) -> None:
        """End it, at once."""
        ray.kill(self.actor)

    def _result(self, reference: ray.ObjectRef) -> Any:
        while not ray.wait([reference], timeout=1)[0]:
            if self.judge.ending:
                raise RuntimeError("the run has ended")
        return ray.get(reference)
