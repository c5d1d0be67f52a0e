"""Objectives, as pure functions.

Shapes stand in the names: B prompts, K responses of each. Every objective takes log-probabilities of whole responses
(sums over the response's tokens, end-of-sequence included, in nats) under the policy, which carry the gradient, and
under the reference, which do not; and returns a scalar. To add one: write the function and name it in `OBJECTIVES`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def tb(logprobs_BK: Tensor, ref_logprobs_BK: Tensor, rewards_BK: Tensor, beta: float) -> Tensor:
    """Trajectory balance with the VarGrad estimate of log Z (https://arxiv.org/abs/2503.18929, section 3).

    KL-regularised RL has the optimum pi*(y|x) = pi_ref(y|x) exp(r(x,y)/beta) / Z(x). With

        d_ij    = log pi_theta(y_ij|x_i) - log pi_ref(y_ij|x_i) - r_ij/beta
        log Z_i = -mean_j d_ij                          (no gradient)
        L       = beta/2 mean_ij (log Z_i + d_ij)^2

    L is zero exactly where pi_theta = pi* on the responses at hand, whatever policy wrote them: nothing here asks.
    Its gradient is the policy gradient -mean_ij A_ij grad log pi_theta(y_ij|x_i) with the advantage

        A_ij = (r_ij - mean_j r_ij) - beta (k_ij - mean_j k_ij),    k_ij = log pi_theta - log pi_ref.

    The factor beta/2 is what makes it so: the gradient does not grow as beta is annealed towards 0.

    Args:
        logprobs_BK: log pi_theta(y|x), with gradient.
        ref_logprobs_BK: log pi_ref(y|x).
        rewards_BK: r(x, y).
        beta: weight of the KL to the reference, > 0.

    Returns:
        The loss, a scalar.

    >>> import torch
    >>> one = torch.tensor([[-1.0, -2.0]])
    >>> tb(one, one, torch.tensor([[1.0, 0.0]]), beta=0.5)  # d = -2, 0; log Z = 1; the squares are 1, 1
    tensor(0.2500)
    """
    d_BK = logprobs_BK - ref_logprobs_BK - rewards_BK / beta
    log_Z_B1 = -d_BK.detach().mean(dim=1, keepdim=True)
    return beta / 2 * (log_Z_B1 + d_BK).square().mean()


OBJECTIVES = {"tb": tb}
