"""The settings of a run: fields with their limits beside them, and the schedules. run/check.py checks them."""

import math
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le

from buffer import NEAR_DUPLICATES
from loss import OBJECTIVES

MAY_CHANGE = "may change when a run is resumed"  # marks such a field: how long it lasts, what is logged, which devices
OneOf = tuple  # the names that a field may have


class RunError(RuntimeError):
    """Ends the run. Its text is one line that says everything, so no traceback is shown."""


@dataclass(frozen=True)
class Config:
    """Post-train a language model, searching and training at once.

    The defaults shown are those of the task: give --task with --help to see another's.
    """

    task: str = "countdown"
    """What to train on: a task in tasks/ by its name, or the path of a Python file with one of your own."""
    model: str = ""
    """The policy to start from: a Hugging Face folder or hub id."""
    data: str = ""
    """Where the task's problems are: a folder or a data set on the hub."""
    seed_data: str = ""
    """JSONL file of demonstrations (prompt, response, optional reward) that are in the buffer before search starts."""
    out: Annotated[str, MAY_CHANGE] = ""
    """Folder for the files of the run; default runs/<task>-<time>."""
    seed: Annotated[int, Ge(0), Le(2**31 - 1)] = 0
    """Of the order of problems, the sampling, and the embedded model."""
    steps: Annotated[int, Ge(1), MAY_CHANGE] = 1000
    """Updates of the policy."""
    max_seconds: Annotated[float, Ge(0), MAY_CHANGE] = 0.0
    """Seconds of training after which the run ends, its schedules run through, unless steps come first; 0: no limit."""
    prompts_per_step: Annotated[int, Ge(1)] = 8
    """B: distinct prompts in an update."""
    responses_per_prompt: Annotated[int, Ge(2)] = 16
    """K: responses of each prompt in an update."""
    search_responses: Annotated[int, Ge(2)] = 16
    """S: responses that a search generates for a prompt, at least K."""
    loss: str = "tb"
    """The objective: tb, tb_tapered, tb_prime, rloo, grpo, dr_grpo, cispo, or your own, FILE.py:NAME."""
    importance_ratio: bool = True
    """Weigh tokens by pi/mu, in objectives that do; off: all count as on-policy, and search need not compute mu."""
    lr: Annotated[float, Gt(0)] = 1e-5
    """Learning rate."""
    optimizer: Annotated[str, OneOf(("adamw", "adamw_bf16", "adamw_8bit"))] = "adamw"
    """adamw: fp32 weights and moments; adamw_bf16 or adamw_8bit: bf16 weights, moments of 16 or 8 bits (torchao)."""
    lora_rank: Annotated[int, Ge(0)] = 0
    """Rank of a LoRA adapter of all linear layers (peft), which is trained in place of the weights; 0: without one."""
    lora_alpha: Annotated[int, Ge(0)] = 0
    """The adapter counts by lora_alpha / lora_rank; 0: twice the rank."""
    lr_schedule: Annotated[str, OneOf(("constant", "linear", "wsd"))] = "constant"
    """constant, linear (to 0 on the last update), or wsd (warm-up, stable, decay to 0 on the last update)."""
    lr_warmup: Annotated[int, Ge(0)] = 0
    """Updates in which the learning rate rises from 0, with every schedule."""
    lr_decay: Annotated[int, Ge(0)] = 0
    """Updates at the end in which wsd decays."""
    beta: Annotated[float, Ge(0)] = 0.01
    """Weight of the KL to the reference, the model that the run starts from; 0: there is none, which saves memory."""
    beta_schedule: Annotated[str, OneOf(("constant", "linear", "cosine"))] = "constant"
    """How beta goes to beta_final: constant (it stays), linear or cosine."""
    beta_final: Annotated[float, Ge(0)] = 0.0
    """What beta is annealed to."""
    beta_steps: Annotated[int, Ge(0)] = 0
    """Updates until beta is beta_final."""
    gamma: Annotated[float, Gt(0)] = 1.0
    """With a loss of the tb family the optimum is pi_ref^(1/gamma) exp(r/beta): above 1 the reference weighs less."""
    gamma_final: Annotated[float, Gt(0)] = 1.0
    """What gamma is annealed to, linearly."""
    gamma_steps: Annotated[int, Ge(0)] = 0
    """Updates until gamma is gamma_final; 0: it stays."""
    reference_reset: Annotated[int, Ge(0)] = 0
    """rho: updates between two resets of the reference to the policy; 0: it stays."""
    temperature: Annotated[float, Gt(0)] = 1.0
    """Of the sampling; the objective divides logits by it too."""
    search_temperatures: tuple[float, ...] = ()
    """Lowest and highest: each search draws its own temperature between them, whatever the objective's is."""
    max_tokens: Annotated[int, Ge(1)] = 256
    """Longest response, in tokens."""
    min_tokens: Annotated[int, Ge(0)] = 0
    """Tokens of a response before which it cannot end."""
    reward_timeout: Annotated[float, Gt(0), MAY_CHANGE] = 60.0
    """Seconds that the reward of a prompt's responses may take; after that they are dropped, and counted."""
    reward_concurrency: Annotated[int, Ge(1), MAY_CHANGE] = 64
    """Prompts whose responses are scored at a time."""
    sync_every: Annotated[int, Ge(1)] = 2
    """k: updates between two syncs of the engines' weights."""
    check_sync: Annotated[bool, MAY_CHANGE] = False
    """Stop where engines and trainer differ after a sync, by above 0.001 nats a token (bf16: 0.1) on average."""
    strict: bool = False
    """Search and training take turns. k and m are 1 unless given: each update has responses of the very policy."""
    on_policy_prob: Annotated[float, Ge(0), Le(1)] = 0.5
    """m: probability that a prompt of a batch is from the newest data, rather than any in the buffer."""
    prime: Annotated[int, Ge(0)] = 500
    """Responses in the buffer before training starts."""
    search_ahead: Annotated[float, Ge(1), MAY_CHANGE] = 8.0
    """Search pauses where it has generated more than so many times B x K responses for each update."""
    max_num_seqs: Annotated[int, Ge(0), MAY_CHANGE] = 0
    """Sequences that an engine has in flight; 0: two updates' worth over all engines, at most 256 (CPU), 512 (GPU)."""
    capacity: Annotated[int, Ge(1)] = 100
    """Responses of a prompt in the buffer, at most."""
    buffer_gib: Annotated[float, Gt(0), MAY_CHANGE] = 8.0
    """Memory of the whole buffer, at most, in GiB: then the oldest response leaves."""
    evict: str = "oldest"
    """Which response leaves where a prompt has its --capacity: oldest, lowest_reward, or your own, FILE.py:NAME."""
    near_duplicates: Annotated[str, OneOf(NEAR_DUPLICATES)] = "exact"
    """What counts as a duplicate: exact, or what is near by edit distance (edit) or by its embedding (cosine)."""
    near_duplicate_distance: Annotated[float, Ge(0), Le(2)] = 0.25
    """How near: edits over the tokens of both, or cosine distance. Only a better response replaces a near duplicate."""
    replay: str = "uniform"
    """How responses of a prompt not new are chosen: uniform, reward (by its softmax), or your own, FILE.py:NAME."""
    max_grad_norm: Annotated[float, Gt(0)] = 1.0
    """Gradients with a larger norm are scaled down to it."""
    micro_batch_tokens: Annotated[int, Ge(1), MAY_CHANGE] = 16384
    """Tokens in a forward pass: lower it when the trainer runs out of memory."""
    activation_memory_budget: Annotated[float, Ge(0), Le(1), MAY_CHANGE] = 1.0
    """Share of a layer's activations that is stored for its backward pass; the rest is recomputed (CUDA)."""
    train_devices: Annotated[tuple[str, ...], MAY_CHANGE] = ("auto",)
    """Where the policy is trained: auto, cpu, cuda:0, ...; several hold a shard of it each (FSDP2)."""
    search_devices: Annotated[tuple[str, ...], MAY_CHANGE] = ("auto",)
    """Where engines run, one a device: auto, cpu, cuda:1, ...; on a Ray cluster ray:N GPUs, ray:N-M, ray:cpu:N."""
    judge_devices: Annotated[tuple[str, ...], MAY_CHANGE] = ()
    """Where models that score are: cpu, cuda:1, ..., ray:1 or ray:cpu:1; by default beside the last local engine."""
    gpu_memory_utilization: Annotated[float, Ge(0), Le(1), MAY_CHANGE] = 0.0
    """Share of a GPU's memory that an engine takes; 0: 0.9 of a GPU of its own, 0.4 of one shared with the trainer."""
    eval_every: Annotated[int, Ge(0), MAY_CHANGE] = 100
    """Updates between two evaluations; 0: only before and after."""
    eval_prompts: Annotated[int, Ge(0), MAY_CHANGE] = 400
    """Test problems in an evaluation; 0: no evaluation at all."""
    eval_samples: Annotated[int, Ge(1), MAY_CHANGE] = 8
    """Responses sampled for each of them: the k of pass@k."""
    save_every: Annotated[int, Ge(0), MAY_CHANGE] = 100
    """Updates between two checkpoints, which each evaluation has too; 0: only at the end."""
    keep: Annotated[int, Ge(0), MAY_CHANGE] = 2
    """Newest checkpoints that stay, beside the one with the best evaluation; 0: all stay."""
    resume: Annotated[str, MAY_CHANGE] = ""
    """Go on with the run in this folder from its newest checkpoint; auto: in --out (or the task's newest), if any."""
    stall_seconds: Annotated[float, Gt(0), MAY_CHANGE] = 120.0
    """Log what the run waits for where no response came, or no update ended, for so long."""
    tensorboard: Annotated[bool, MAY_CHANGE] = False
    """Metrics for TensorBoard too, in OUT/tensorboard/ (pip install tensorboard)."""
    wandb: Annotated[bool, MAY_CHANGE] = False
    """Metrics for Weights & Biases too (pip install wandb)."""
    dry_run: Annotated[bool, MAY_CHANGE] = False
    """Show the resolved settings and the first prompt as the model sees it, and end."""
    plan: Annotated[bool, MAY_CHANGE] = False
    """Show what memory the run needs on each device, from the model's config alone, whether it fits, and end."""

    @property
    def objective(self) -> Any:
        """The function of --loss, with its flags `needs_beta`, `has_gamma` and `reads_behaviour`."""
        return OBJECTIVES[self.loss]

    @property
    def reads_behaviour(self) -> bool:
        """Whether the objective reads the log-probabilities of the policy that wrote a response."""
        return self.importance_ratio and self.objective.reads_behaviour

    @property
    def has_reference(self) -> bool:
        """Whether there is a reference: not where beta is 0 throughout."""
        return self.beta > 0 or self.beta_final > 0

    def done(self, step: int, seconds: float) -> bool:
        """Whether training ends after so many updates and seconds.

        >>> [Config(steps=100, max_seconds=20.0).done(*at) for at in ((99, 19.9), (100, 5.0), (9, 20.0))]
        [False, True, True]
        >>> Config(steps=100).done(99, 1e9)
        False
        """
        return step >= self.steps or 0 < self.max_seconds <= seconds

    def schedule(self, step: int, seconds: float) -> dict[str, float]:
        """What changes from update to update: arguments of the one that follows so many updates and seconds."""
        at = self.step_at(step, seconds)
        return {"lr": self.lr_at(at), "beta": self.beta_at(at), "gamma": self.gamma_at(at)}

    def step_at(self, step: int, seconds: float) -> int:
        """Where the schedules are after so many updates and seconds: at the step, or further where time runs out first.

        >>> [Config(steps=100, max_seconds=20.0).step_at(30, seconds) for seconds in (1, 10, 25)]
        [30, 50, 99]
        """
        share = seconds / self.max_seconds if self.max_seconds else 0.0
        return min(max(step, int(share * self.steps)), self.steps - 1)

    def lr_at(self, step: int) -> float:
        """Learning rate of the update that follows `step` updates.

        >>> config = Config(lr=1.0, steps=11, lr_schedule="wsd", lr_warmup=2, lr_decay=5)
        >>> [config.lr_at(step) for step in (0, 1, 2, 5, 6, 9, 10)]
        [0.5, 1.0, 1.0, 1.0, 0.8, 0.2, 0.0]
        >>> config = Config(lr=1.0, steps=5, lr_schedule="linear")
        >>> [config.lr_at(step) for step in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
        """
        up = (step + 1) / self.lr_warmup if self.lr_warmup else 1.0
        last = self.steps - 1
        decay = {"linear": last - self.lr_warmup, "wsd": min(self.lr_decay, last)}.get(self.lr_schedule)
        down = 1.0 if decay is None else (last - step) / max(1, decay)
        return self.lr * min(up, down, 1.0)

    def beta_at(self, step: int) -> float:
        """Beta of the update that follows `step` updates.

        >>> config = Config(beta=0.012, beta_schedule="linear", beta_final=0.004, beta_steps=4)
        >>> [config.beta_at(step) for step in (0, 2, 4, 9)]
        [0.012, 0.008, 0.004, 0.004]
        >>> config = Config(beta=1.0, beta_schedule="cosine", beta_final=0.0, beta_steps=3)
        >>> [round(config.beta_at(step), 6) for step in (0, 1, 2, 3, 4)]
        [1.0, 0.75, 0.25, 0.0, 0.0]
        """
        if self.beta_schedule == "constant":
            return self.beta
        done = min(1.0, step / self.beta_steps)
        if self.beta_schedule == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.beta + done * (self.beta_final - self.beta)

    def gamma_at(self, step: int) -> float:
        """Gamma of the update that follows `step` updates.

        >>> [Config(gamma=2.0, gamma_steps=4).gamma_at(step) for step in (0, 2, 4, 9)]
        [2.0, 1.5, 1.0, 1.0]
        """
        done = min(1.0, step / self.gamma_steps) if self.gamma_steps else 0.0
        return self.gamma + done * (self.gamma_final - self.gamma)
