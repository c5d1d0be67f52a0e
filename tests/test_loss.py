"""The objective against its definition, by autograd in float64."""

import torch

from loss import tb

B, K, BETA = 3, 5, 0.3


def batch(seed: int = 0):
    torch.manual_seed(seed)
    logprobs, ref = -5 * torch.rand(2, B, K, dtype=torch.float64)
    return logprobs.requires_grad_(), ref, torch.rand(B, K, dtype=torch.float64)


def gradient(logprobs, ref, rewards, beta=BETA):
    return torch.autograd.grad(tb(logprobs, ref, rewards, beta), logprobs)[0]


def test_value_is_the_definition():
    logprobs, ref, rewards = batch()
    total = 0.0
    for i in range(B):
        d = [(logprobs[i, j] - ref[i, j] - rewards[i, j] / BETA).item() for j in range(K)]
        log_z = -sum(d) / K
        total += sum((log_z + each) ** 2 for each in d)
    torch.testing.assert_close(tb(logprobs, ref, rewards, BETA).item(), BETA / 2 * total / (B * K))


def test_gradient_is_the_policy_gradient():
    logprobs, ref, rewards = batch()
    k = (logprobs - ref).detach()
    advantage = rewards - rewards.mean(1, keepdim=True) - BETA * (k - k.mean(1, keepdim=True))
    torch.testing.assert_close(gradient(logprobs, ref, rewards), -advantage / (B * K))


def test_gradient_does_not_grow_as_beta_is_annealed():
    logprobs, ref, rewards = batch()
    small, smaller = gradient(logprobs, ref, rewards, 1e-3), gradient(logprobs, ref, rewards, 1e-6)
    torch.testing.assert_close(small, smaller, atol=1e-3, rtol=0)


def test_a_shift_of_the_rewards_of_a_group_changes_nothing():
    logprobs, ref, rewards = batch()
    shift = torch.tensor([[10.0], [-3.0], [0.5]], dtype=torch.float64)
    torch.testing.assert_close(gradient(logprobs, ref, rewards + shift), gradient(logprobs, ref, rewards))


def test_groups_are_kept_apart():
    logprobs, ref, rewards = batch()
    alone = gradient(logprobs[:1].detach().requires_grad_(), ref[:1], rewards[:1])
    torch.testing.assert_close(gradient(logprobs, ref, rewards)[:1], alone / B)


def test_zero_on_the_optimum_whatever_the_responses():
    _, ref, rewards = batch()
    optimum = (ref + rewards / BETA - 7.0).requires_grad_()  # log pi* up to log Z
    assert tb(optimum, ref, rewards, BETA).item() < 1e-20
    assert gradient(optimum, ref, rewards).abs().max() < 1e-10
