"""An objective of one's own: trajectory balance in which one response that is far off cannot outweigh the others.

python -m examples.tb_huber --loss tb_huber
"""

import sys

import loss
import tba

DELTA = 5.0  # nats, from which on the loss grows linearly


def tb_huber(batch, beta):
    """`loss.tb` with Huber's loss in place of the square: the same where |log Z + d| is below DELTA.

    >>> import torch
    >>> one, mask = torch.tensor([[[-1.0], [-2.0]]]), torch.ones(1, 2, 1)
    >>> near, far = (loss.Batch(one, one, one, mask, torch.tensor([[r, 0.0]])) for r in (1.0, 100.0))
    >>> tb_huber(near, beta=0.5), loss.tb(near, beta=0.5)
    (tensor(0.2500), tensor(0.2500))
    >>> tb_huber(far, beta=0.5), loss.tb(far, beta=0.5)
    (tensor(243.7500), tensor(2500.))
    """
    d_BK = (batch.logprobs_BKT - batch.ref_BKT).sum(-1) - batch.rewards_BK / beta
    off_BK = (d_BK - d_BK.detach().mean(dim=1, keepdim=True)).abs()
    return beta * (off_BK.clamp(max=DELTA).square() / 2 + DELTA * (off_BK - DELTA).clamp(min=0)).mean()


loss.OBJECTIVES["tb_huber"] = tb_huber
loss.NEED_BETA.add("tb_huber")

if __name__ == "__main__":
    sys.exit(tba.main())
