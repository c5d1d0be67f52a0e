"""Objectives, as pure functions.

Each takes a `Batch` of B prompts with K responses of at most T tokens and `beta`, the weight of the KL to the
reference, and returns a scalar: the mean over the B groups, so that groups may be split into micro-batches anywhere.
Beside it an objective may return a dict of metrics, scalars that are means over the groups too, for metrics.jsonl.

To add one, write a function in a file of your own, `@objective(...)` above it, and give it by `--loss FILE.py:NAME`.

Symbols: pi the policy, mu the behaviour policy, which wrote a response, y_t its token, A_j the advantage of response j.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

OBJECTIVES: dict[str, Callable] = {}  # by name

CLIP = 0.2  # how far a ratio pi/mu may move from 1 before PPO's clipping stops it
RATIO_MAX = {"tb_prime": 8.0, "cispo": 5.0}  # where ratios are cut off
LOG_RATIO_MAX = 10.0  # tb_prime cuts log pi/pi_ref of a token at +-10 nats
EXP_MAX = 20.0  # no ratio is above e^20, so that none overflows


@dataclass(slots=True)
class Batch:
    """Log-probabilities of the responses' tokens, in nats, end-of-sequence included; 0 in the padding."""

    logprobs_BKT: Tensor  # log pi(y_t), with gradient
    ref_BKT: Tensor  # log pi_ref(y_t)
    behaviour_BKT: Tensor  # log mu(y_t); log pi(y_t) without gradient where the data count as on-policy
    mask_BKT: Tensor  # 1 where a response has a token, 0 in the padding
    rewards_BK: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)  # [B, K, T] of each name in `Response.per_token`


def objective(needs_beta: bool = False, has_gamma: bool = False, reads_behaviour: bool = False) -> Callable:
    """Declare a function of (batch, beta) an objective, by its name.

    Args:
        needs_beta: beta must be above 0.
        has_gamma: the reference may count by 1/gamma (--gamma): the optimum is then pi_ref^(1/gamma) exp(r/beta).
        reads_behaviour: it reads `behaviour_BKT`, for which engines must return log-probabilities.
    """

    def register(function: Any) -> Any:
        function.needs_beta, function.has_gamma, function.reads_behaviour = needs_beta, has_gamma, reads_behaviour
        OBJECTIVES.setdefault(function.__name__, function)
        return function

    return register


@objective(needs_beta=True, has_gamma=True)
def tb(batch: Batch, beta: float) -> Tensor:
    """Trajectory balance with the VarGrad estimate of log Z (https://arxiv.org/abs/2503.18929, section 3).

    KL-regularised RL has the optimum pi*(y|x) = pi_ref(y|x) exp(r(x,y)/beta) / Z(x). With

        d_ij    = log pi(y_ij|x_i) - log pi_ref(y_ij|x_i) - r_ij/beta        (sums over tokens)
        log Z_i = -mean_j d_ij                                               (no gradient)
        L       = beta/2 mean_ij (log Z_i + d_ij)^2

    L is zero exactly where pi = pi* on the responses at hand, whatever policy wrote them.
    Its gradient is the policy gradient -mean_ij A_ij grad log pi(y_ij|x_i) with the advantage

        A_ij = (r_ij - mean_j r_ij) - beta (k_ij - mean_j k_ij),    k_ij = log pi - log pi_ref.

    By the factor beta/2 the gradient does not grow as beta is annealed towards 0. Needs beta > 0.

    >>> import torch
    >>> one = torch.tensor([[[-1.0], [-2.0]]])  # B = 1, K = 2, T = 1
    >>> batch = Batch(one, one, one, torch.ones(1, 2, 1), torch.tensor([[1.0, 0.0]]))
    >>> tb(batch, beta=0.5)  # d = -2, 0; log Z = 1; the squares are 1, 1
    tensor(0.2500)
    """
    return beta / 2 * _imbalance(batch, beta).square().mean()


@objective(needs_beta=True, has_gamma=True, reads_behaviour=True)
def tb_tapered(batch: Batch, beta: float) -> Tensor:
    """`tb`, in which a response that the policy has already moved away from is pushed less.

        L   = beta/2 mean_ij w_ij (log Z_i + d_ij)^2
        w   = min(1, pi(y)/mu(y)) where log Z + d > 0, so that pi is to be lowered; 1 elsewhere     (no gradient)

    The taper of TOPR (https://arxiv.org/abs/2503.14286) on trajectory balance. Lowering what is unlikely already moves
    the policy most and gains least, and is what makes `tb` unsteady at high learning rates: there each response is
    lowered as often as it is replayed, here until the policy would hardly write it. Raising is never tapered, so that
    what was lowered by mistake comes back from data however old. As w > 0, L is zero exactly where that of `tb` is, at
    pi = pi* on the responses at hand, whatever policy wrote them; on-policy w = 1 and the gradients are the same.

    >>> import torch
    >>> mu, ref, mask = torch.tensor([[[-1.0], [-2.0]]]), torch.full((1, 2, 1), -4.0), torch.ones(1, 2, 1)
    >>> batch = Batch(ref, ref, mu, mask, torch.tensor([[1.0, 0.0]]))
    >>> tb_tapered(batch, beta=0.5)  # log Z + d = -1, 1; w = 1, e^-2
    tensor(0.1419)
    """
    imbalance_BK = _imbalance(batch, beta)
    ratio_BK = (batch.logprobs_BKT - batch.behaviour_BKT).detach().sum(-1).clamp(max=0).exp()
    weight_BK = ratio_BK.where(imbalance_BK.detach() > 0, 1.0)
    return beta / 2 * (weight_BK * imbalance_BK.square()).mean()


@objective(has_gamma=True, reads_behaviour=True)
def tb_prime(batch: Batch, beta: float) -> Tensor:
    """TBA': the gradient of `tb` as a policy gradient a token, importance-weighted (https://arxiv.org/abs/2503.18929).

        L    = -mean_j sum_t min(pi/mu, 8) A_j
        A_j  = (r_j - mean r) - beta (k_j - mean k),    k_j = sum_t clip(log pi - log pi_ref, -10, 10)    (no gradient)

    k and its mean are of the same policy, the current one. On-policy, or with the ratio off, its gradient is that of
    `tb` as long as nothing is clipped. The paper resets the reference every 50 updates.

    >>> import torch
    >>> mu, pi, mask = torch.zeros(1, 2, 1), torch.tensor([[[0.5], [0.0]]]).log1p(), torch.ones(1, 2, 1)
    >>> tb_prime(Batch(pi, mu, mu, mask, torch.tensor([[1.0, 0.0]])), beta=0.0)  # ratios 1.5, 1; A = 0.5, -0.5
    tensor(-0.1250)
    """
    k_BK = (batch.logprobs_BKT - batch.ref_BKT).detach().clamp(-LOG_RATIO_MAX, LOG_RATIO_MAX).sum(-1)
    advantage_BK = _centred(batch.rewards_BK) - beta * _centred(k_BK)
    ratio_BKT = _ratio(batch).clamp(max=RATIO_MAX["tb_prime"])
    return -(ratio_BKT * advantage_BK[..., None] * batch.mask_BKT).sum(-1).mean()


@objective(reads_behaviour=True)
def rloo(batch: Batch, beta: float) -> Tensor:
    """REINFORCE leave-one-out (https://arxiv.org/abs/2402.14740) with PPO's clipped ratio ("proximal RLOO",
    https://arxiv.org/abs/2410.18252).

        L   = -mean_j min(w_j A_j, clip(w_j, 0.8, 1.2) A_j),    w_j = pi(y_j)/mu(y_j), of the whole response
        A_j = R_j - mean_{i != j} R_i,                          R_j = r_j - beta (log mu(y_j) - log pi_ref(y_j))

    The KL is part of the reward, under the policy that wrote the response. w_j is of the whole response: in bf16
    the rounding of engine and trainer alone moves it out of the clip's range for a good part of long responses.

    >>> import torch
    >>> mu, pi, mask = torch.zeros(1, 2, 1), torch.tensor([[[0.5], [0.0]]]).log1p(), torch.ones(1, 2, 1)
    >>> rloo(Batch(pi, mu, mu, mask, torch.tensor([[1.0, 0.0]])), beta=0.0)  # A = 1, -1; w = 1.5, clipped to 1.2, and 1
    tensor(-0.1000)
    """
    k_BK = (batch.behaviour_BKT - batch.ref_BKT).sum(-1)
    return_BK, K = batch.rewards_BK - beta * k_BK, batch.rewards_BK.shape[1]
    advantage_BK = _centred(return_BK) * K / max(K - 1, 1)  # r_j minus the mean of the others
    ratio_BK = (batch.logprobs_BKT - batch.behaviour_BKT).sum(-1).clamp(max=EXP_MAX).exp()
    return -_clipped(ratio_BK, advantage_BK).mean()


@objective(reads_behaviour=True)
def grpo(batch: Batch, beta: float) -> Tensor:
    """Group relative policy optimisation (https://arxiv.org/abs/2402.03300, equation 3).

        L   = -mean_j 1/|y_j| sum_t [min(w_t A_j, clip(w_t, 0.8, 1.2) A_j) - beta KL_t],    w_t = pi(y_t)/mu(y_t)
        A_j = (r_j - mean r) / std r,    KL_t = pi_ref/pi - log pi_ref/pi - 1

    >>> import torch
    >>> mu, pi, mask = torch.zeros(1, 2, 1), torch.tensor([[[0.5], [0.0]]]).log1p(), torch.ones(1, 2, 1)
    >>> grpo(Batch(pi, mu, mu, mask, torch.tensor([[1.0, 0.0]])), beta=0.0)  # A = 1, -1; w = 1.5, clipped to 1.2, and 1
    tensor(-0.1000)
    """
    per_token_BKT = _clipped(_ratio(batch), _standardised(batch.rewards_BK)[..., None]) - beta * _kl(batch)
    return -((per_token_BKT * batch.mask_BKT).sum(-1) / batch.mask_BKT.sum(-1)).mean()


@objective(reads_behaviour=True)
def dr_grpo(batch: Batch, beta: float) -> Tensor:
    """GRPO done right: no division by the length nor by the standard deviation (https://arxiv.org/abs/2503.20783).

        L   = -mean_j sum_t [min(w_t A_j, clip(w_t, 0.8, 1.2) A_j) - beta KL_t],    A_j = r_j - mean r

    w_t and KL_t as in `grpo`. The paper trains with beta = 0.

    >>> import torch
    >>> mu, pi, mask = torch.zeros(1, 2, 1), torch.tensor([[[0.5], [0.0]]]).log1p(), torch.ones(1, 2, 1)
    >>> dr_grpo(Batch(pi, mu, mu, mask, torch.tensor([[1.0, 0.0]])), beta=0.0)  # A = 0.5, -0.5
    tensor(-0.0500)
    """
    per_token_BKT = _clipped(_ratio(batch), _centred(batch.rewards_BK)[..., None]) - beta * _kl(batch)
    return -(per_token_BKT * batch.mask_BKT).sum(-1).mean()


@objective(reads_behaviour=True)
def cispo(batch: Batch, beta: float) -> Tensor:
    """Clipped importance-sampling policy optimisation (https://arxiv.org/abs/2506.13585, equation 4).

        L = -1/sum_j |y_j| sum_jt [sg(min(w_t, 5)) A_j log pi(y_t) - beta KL_t],    A_j = (r_j - mean r) / std r

    sg: no gradient, so that a clipped token still teaches. w_t and KL_t as in `grpo`. The paper trains with beta = 0.

    >>> import torch
    >>> mu, pi, mask = torch.zeros(1, 2, 1), torch.tensor([[[0.5], [0.0]]]).log1p(), torch.ones(1, 2, 1)
    >>> cispo(Batch(pi, mu, mu, mask, torch.tensor([[1.0, 0.0]])), beta=0.0)  # -1.5 log 1.5 / 2
    tensor(-0.3040)
    """
    weight_BKT = _ratio(batch).detach().clamp(max=RATIO_MAX["cispo"]) * _standardised(batch.rewards_BK)[..., None]
    per_token_BKT = weight_BKT * batch.logprobs_BKT - beta * _kl(batch)
    return -((per_token_BKT * batch.mask_BKT).sum((1, 2)) / batch.mask_BKT.sum((1, 2))).mean()


def _imbalance(batch: Batch, beta: float) -> Tensor:
    """log Z + d of trajectory balance [B, K], in nats: above 0 where pi is above pi*."""
    d_BK = (batch.logprobs_BKT - batch.ref_BKT).sum(-1) - batch.rewards_BK / beta
    return d_BK - d_BK.detach().mean(dim=1, keepdim=True)


def _centred(x_BK: Tensor) -> Tensor:
    return x_BK - x_BK.mean(dim=1, keepdim=True)


def _standardised(x_BK: Tensor) -> Tensor:
    return _centred(x_BK) / (x_BK.std(dim=1, keepdim=True, correction=0) + 1e-4)


def _ratio(batch: Batch) -> Tensor:
    return (batch.logprobs_BKT - batch.behaviour_BKT).clamp(max=EXP_MAX).exp()  # [B, K, T]


def _clipped(ratio: Tensor, advantage: Tensor) -> Tensor:
    return (ratio * advantage).minimum(ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)


def _kl(batch: Batch) -> Tensor:
    """Schulman's estimate of the KL to the reference from one sample [B, K, T], never negative, 0 in the padding."""
    log_ratio_BKT = (batch.ref_BKT - batch.logprobs_BKT).clamp(max=EXP_MAX)
    return log_ratio_BKT.exp() - log_ratio_BKT - 1
