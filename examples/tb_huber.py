"""Trajectory balance with Huber's loss: one response that is far off cannot outweigh the others.

python tba.py --loss examples/tb_huber.py:tb_huber
"""

from torch.nn.functional import huber_loss

from loss import objective

DELTA = 5.0  # nats


@objective(needs_beta=True, has_gamma=True)
def tb_huber(batch, beta):
    """`loss.tb` where d is within DELTA of -log Z, linear beyond. Logs `far_off`, the share of responses beyond."""
    d_BK = (batch.logprobs_BKT - batch.ref_BKT).sum(-1) - batch.rewards_BK / beta
    minus_log_Z_BK = d_BK.detach().mean(dim=1, keepdim=True).expand_as(d_BK)
    far_off = (d_BK - minus_log_Z_BK).abs() > DELTA
    return beta * huber_loss(d_BK, minus_log_Z_BK, delta=DELTA), {"far_off": far_off.float().mean()}
