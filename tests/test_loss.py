"""Every objective against its definition, by autograd in float64, and what each must not depend on."""

import dataclasses

import pytest
import torch

import loss
from loss import OBJECTIVES, Batch, objective, tb, tb_prime

B, K, T, BETA = 3, 5, 4, 0.3
TENSORS = "logprobs_BKT", "ref_BKT", "behaviour_BKT", "mask_BKT", "rewards_BK"


def make_batch(seed: int = 0, spread: float = 1.0) -> Batch:
    """Responses of 1 to T tokens whose policy, reference and behaviour differ by `spread`."""
    torch.manual_seed(seed)
    mask = (torch.arange(T) < torch.randint(1, T + 1, (B, K, 1))).double()
    base = -3 * torch.rand(B, K, T, dtype=torch.float64)
    policy, ref, behaviour = ((base + spread * torch.randn_like(base)) * mask for _ in range(3))
    return Batch(policy.requires_grad_(), ref, behaviour, mask, torch.rand(B, K, dtype=torch.float64))


def gradient(name: str, batch: Batch, beta: float = BETA) -> torch.Tensor:
    """Of the tokens' log-probabilities; the padding's are constants, whatever flows there."""
    return torch.autograd.grad(OBJECTIVES[name](batch, beta), batch.logprobs_BKT)[0] * batch.mask_BKT


def changed(batch: Batch, **fields) -> Batch:
    return dataclasses.replace(batch, **fields)


def each_tensor(batch: Batch, change) -> Batch:
    policy, *rest = (change(getattr(batch, name).detach()) for name in TENSORS)
    return Batch(policy.requires_grad_(), *rest)


# ---- the definitions, response by response and token by token ----


def definition(name: str, batch: Batch, beta: float) -> torch.Tensor:
    total = 0.0
    for i in range(B):
        lengths = [int(n) for n in batch.mask_BKT[i].sum(-1)]
        pi, ref, mu = (
            [values[i, j, : lengths[j]] for j in range(K)]
            for values in (batch.logprobs_BKT, batch.ref_BKT, batch.behaviour_BKT)
        )
        r = [float(reward) for reward in batch.rewards_BK[i]]
        mean = sum(r) / K
        std = (sum((each - mean) ** 2 for each in r) / K) ** 0.5
        total = total + DEFINITIONS[name](pi, ref, mu, r, mean, std, lengths, beta) / B
    return total


def define_tb(pi, ref, mu, r, mean, std, lengths, beta):
    d = [pi[j].sum() - ref[j].sum() - r[j] / beta for j in range(K)]
    log_z = -sum(each.item() for each in d) / K
    return beta / 2 * sum((log_z + each) ** 2 for each in d) / K


def define_tb_tapered(pi, ref, mu, r, mean, std, lengths, beta):
    d = [pi[j].sum() - ref[j].sum() - r[j] / beta for j in range(K)]
    log_z = -sum(each.item() for each in d) / K
    loss = 0.0
    for j in range(K):
        weight = min(1.0, (pi[j].sum() - mu[j].sum()).exp().item()) if log_z + d[j].item() > 0 else 1.0
        loss = loss + beta / 2 * weight * (log_z + d[j]) ** 2 / K
    return loss


def define_tb_prime(pi, ref, mu, r, mean, std, lengths, beta):
    k = [sum(min(max((a - b).item(), -10), 10) for a, b in zip(pi[j], ref[j], strict=True)) for j in range(K)]
    loss = 0.0
    for j in range(K):
        advantage = (r[j] - mean) - beta * (k[j] - sum(k) / K)
        for t in range(lengths[j]):
            ratio = (pi[j][t] - mu[j][t]).exp()
            loss = loss - (ratio if ratio < 8 else 8.0) * advantage / K
    return loss


def define_rloo(pi, ref, mu, r, mean, std, lengths, beta):
    paid = [r[j] - beta * (mu[j].sum() - ref[j].sum()).item() for j in range(K)]
    loss = 0.0
    for j in range(K):
        advantage = paid[j] - sum(paid[i] for i in range(K) if i != j) / (K - 1)
        loss = loss - clipped((pi[j].sum() - mu[j].sum()).exp(), advantage) / K
    return loss


def define_grpo(pi, ref, mu, r, mean, std, lengths, beta):
    return -sum(per_token(pi, ref, mu, j, (r[j] - mean) / (std + 1e-4), beta) / lengths[j] for j in range(K)) / K


def define_dr_grpo(pi, ref, mu, r, mean, std, lengths, beta):
    return -sum(per_token(pi, ref, mu, j, r[j] - mean, beta) for j in range(K)) / K


def define_cispo(pi, ref, mu, r, mean, std, lengths, beta):
    loss = 0.0
    for j in range(K):
        for a, b, c in zip(pi[j], ref[j], mu[j], strict=True):
            weight = min((a - c).exp().item(), 5.0) * (r[j] - mean) / (std + 1e-4)
            loss = loss - weight * a + beta * ((b - a).exp() - (b - a) - 1)
    return loss / sum(lengths)


def clipped(ratio, advantage):
    return torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)


def per_token(pi, ref, mu, j, advantage, beta):
    terms = zip(pi[j], ref[j], mu[j], strict=True)
    return sum(clipped((a - c).exp(), advantage) - beta * ((b - a).exp() - (b - a) - 1) for a, b, c in terms)


DEFINITIONS = {
    "tb": define_tb, "tb_tapered": define_tb_tapered, "tb_prime": define_tb_prime, "rloo": define_rloo,
    "grpo": define_grpo, "dr_grpo": define_dr_grpo, "cispo": define_cispo,
}  # fmt: skip


every_objective = pytest.mark.parametrize("name", DEFINITIONS)


def test_every_objective_has_a_definition_here():
    assert {name for name, function in OBJECTIVES.items() if function.__module__ == "loss"} == DEFINITIONS.keys()


@every_objective
@pytest.mark.parametrize("spread", [0.05, 1.0, 4.0])  # nothing clipped, some of it, most of it
def test_value_and_gradient_are_the_definition(name, spread):
    batch = make_batch(spread=spread)
    expected = definition(name, batch, BETA)
    torch.testing.assert_close(OBJECTIVES[name](batch, BETA), expected)
    torch.testing.assert_close(gradient(name, batch), torch.autograd.grad(expected, batch.logprobs_BKT)[0])


# ---- trajectory balance ----


def test_gradient_of_tb_is_the_policy_gradient():
    batch = make_batch()
    k_BK = (batch.logprobs_BKT - batch.ref_BKT).sum(-1).detach()
    r_BK = batch.rewards_BK
    advantage_BK = r_BK - r_BK.mean(1, keepdim=True) - BETA * (k_BK - k_BK.mean(1, keepdim=True))
    expected = -advantage_BK[..., None] * batch.mask_BKT / (B * K)
    torch.testing.assert_close(gradient("tb", batch), expected)


def test_tb_tapered_has_its_minima_where_tb_has_whoever_wrote_the_responses():
    batch = make_batch()  # its behaviour policy is far from both
    optimum = batch.ref_BKT.clone()
    optimum[..., 0] += batch.rewards_BK / BETA - 7.0
    assert gradient("tb_tapered", changed(batch, logprobs_BKT=optimum.requires_grad_())).abs().max() < 1e-12
    assert gradient("tb_tapered", batch).abs().sum(-1).min() > 0  # elsewhere each response still counts


def test_tb_tapered_lowers_less_what_is_unlikely_already_and_raises_it_as_tb_does():
    batch = make_batch(spread=0.0)
    unlikely = changed(batch, behaviour_BKT=batch.behaviour_BKT + 0.5 * batch.mask_BKT)  # under mu it was more likely
    tapered, full = gradient("tb_tapered", unlikely), gradient("tb", unlikely)
    lowered = full > 0
    assert lowered.any() and (full < 0).any()
    shrunk = (-0.5 * batch.mask_BKT.sum(-1, keepdim=True)).exp().expand_as(full)  # pi / mu of the whole response
    torch.testing.assert_close(tapered[lowered], (shrunk * full)[lowered])
    torch.testing.assert_close(tapered[~lowered], full[~lowered])


@pytest.mark.parametrize("spread", [0.01, 1.0])
def test_tb_prime_on_policy_has_the_gradient_of_tb(spread):
    batch = make_batch(spread=spread)
    batch = changed(batch, behaviour_BKT=batch.logprobs_BKT.detach())
    torch.testing.assert_close(gradient("tb_prime", batch), gradient("tb", batch))


def test_tb_prime_takes_k_and_its_mean_of_the_current_policy():
    """On the optimum the advantages vanish, though the behaviour policy is another."""
    batch = make_batch(spread=0.5)
    gap_BKT = (batch.logprobs_BKT - batch.ref_BKT).detach()
    at_optimum = changed(batch, rewards_BK=BETA * gap_BKT.sum(-1))
    assert gradient("tb_prime", at_optimum).abs().max() < 1e-12


def test_gradient_of_tb_does_not_grow_as_beta_is_annealed():
    batch = make_batch()
    torch.testing.assert_close(gradient("tb", batch, 1e-3), gradient("tb", batch, 1e-6), atol=1e-3, rtol=0)


def test_tb_is_zero_on_the_optimum_whatever_the_responses():
    batch = make_batch()
    last = batch.rewards_BK / BETA - 7.0  # log pi* up to log Z, put on the first token
    optimum = batch.ref_BKT.clone()
    optimum[..., 0] += last
    batch = changed(batch, logprobs_BKT=optimum.requires_grad_())
    assert tb(batch, BETA).item() < 1e-20
    assert gradient("tb", batch).abs().max() < 1e-10


# ---- what nothing may depend on ----


@every_objective
def test_a_shift_of_the_rewards_of_a_group_changes_nothing(name):
    batch, shift = make_batch(), torch.tensor([[10.0], [-3.0], [0.5]], dtype=torch.float64)
    shifted = changed(batch, rewards_BK=batch.rewards_BK + shift)
    torch.testing.assert_close(gradient(name, shifted), gradient(name, batch))


@every_objective
def test_the_order_in_a_group_changes_nothing(name):
    batch, order = make_batch(), torch.randperm(K)
    permuted = each_tensor(batch, lambda x: x[:, order])
    torch.testing.assert_close(gradient(name, permuted), gradient(name, batch)[:, order])


@every_objective
def test_groups_are_kept_apart(name):
    """Others in the micro-batch change nothing in a group's gradient but its share of the mean."""
    batch = make_batch()
    for i in range(B):
        alone = each_tensor(batch, lambda x, i=i: x[i : i + 1])
        torch.testing.assert_close(gradient(name, batch)[i : i + 1], gradient(name, alone) / B)


@every_objective
def test_padding_changes_nothing(name):
    batch = make_batch()
    padded = each_tensor(batch, lambda x: torch.nn.functional.pad(x, (0, 6)) if x.dim() == 3 else x)
    torch.testing.assert_close(gradient(name, padded)[..., :T], gradient(name, batch))
    torch.testing.assert_close(OBJECTIVES[name](padded, BETA), OBJECTIVES[name](batch, BETA))


@every_objective
def test_one_response_or_equal_rewards_are_finite(name):
    batch = make_batch()
    for degenerate in (
        each_tensor(batch, lambda x: x[:, :1]),
        changed(batch, rewards_BK=torch.ones_like(batch.rewards_BK)),
    ):
        assert OBJECTIVES[name](degenerate, BETA).isfinite()
        assert gradient(name, degenerate).isfinite().all()


@every_objective
def test_identical_responses_teach_nothing(name):
    """But what the KL penalty of some objectives says."""
    same = each_tensor(make_batch(), lambda x: x[:, :1].expand_as(x).clone())
    beta = BETA if name in {"tb", "tb_tapered", "tb_prime", "rloo"} else 0.0
    assert gradient(name, same, beta).abs().max() < 1e-12


@every_objective
def test_objectives_that_say_so_read_the_behaviour_policy_and_no_others(name):
    batch = make_batch(spread=0.05)
    other = changed(batch, behaviour_BKT=batch.behaviour_BKT + 0.01 * torch.randn_like(batch.behaviour_BKT))
    same = torch.equal(gradient(name, other), gradient(name, batch))
    assert same == (not OBJECTIVES[name].reads_behaviour)


@every_objective
def test_objectives_that_say_that_they_need_beta_have_no_gradient_without(name):
    found = gradient(name, make_batch(), 0.0)
    assert bool(found.isfinite().all() and found.any()) == (not OBJECTIVES[name].needs_beta)


@every_objective
def test_objectives_that_have_gamma_are_optimal_where_the_reference_counts_by_it(name):
    """At pi ~ pi_ref^(1/gamma) exp(r/beta): the trainer hands them log pi_ref / gamma."""
    batch, gamma = make_batch(spread=0.05), 2.0
    reference = batch.ref_BKT / gamma
    optimum = reference.clone()
    optimum[..., 0] += batch.rewards_BK / BETA - 7.0
    there = changed(batch, logprobs_BKT=optimum.requires_grad_(), ref_BKT=reference)
    assert (gradient(name, there).abs().max() < 1e-10) == OBJECTIVES[name].has_gamma


def test_a_token_beyond_the_clip_stops_ppo_but_not_cispo():
    batch = make_batch(spread=0.0)
    raised = changed(batch, logprobs_BKT=(batch.behaviour_BKT + 0.5 * batch.mask_BKT).requires_grad_())  # ratio 1.65
    best = torch.zeros(B, K, T, dtype=torch.bool)
    best[torch.arange(B), batch.rewards_BK.argmax(1)] = True
    best &= batch.mask_BKT.bool()
    assert not gradient("grpo", raised, 0.0)[best].any() and not gradient("dr_grpo", raised, 0.0)[best].any()
    assert gradient("cispo", raised, 0.0)[best].all() and gradient("tb_prime", raised, 0.0)[best].all()


def test_the_importance_ratio_is_cut_off():
    batch = make_batch(spread=0.0)
    far = changed(batch, logprobs_BKT=(batch.behaviour_BKT + 3.0 * batch.mask_BKT).requires_grad_())  # ratio 20
    assert not gradient("tb_prime", far, 0.0).any()
    advantage_BK = far.rewards_BK - far.rewards_BK.mean(1, keepdim=True)
    expected = -(8.0 * advantage_BK * far.mask_BKT.sum(-1)).mean()
    torch.testing.assert_close(tb_prime(far, 0.0).detach(), expected)


@every_objective
@pytest.mark.parametrize("gap", [-100.0, 100.0])
def test_no_ratio_overflows(name, gap):
    """e^100 is beyond fp32: one response so far from the policy would turn all weights into nan."""
    batch = each_tensor(make_batch(), lambda x: x.float())
    far = batch.logprobs_BKT.detach().clone()
    far[:, 0] += gap * batch.mask_BKT[:, 0]
    batch = changed(batch, logprobs_BKT=far.requires_grad_())
    assert OBJECTIVES[name](batch, BETA).isfinite() and gradient(name, batch).isfinite().all()


# ---- objectives of one's own ----


def test_an_objective_is_declared_in_one_place(monkeypatch):
    monkeypatch.setattr(loss, "OBJECTIVES", objectives := {})

    @objective(needs_beta=True, reads_behaviour=True)
    def mine(batch, beta):
        return batch.logprobs_BKT.mean()

    assert objectives == {"mine": mine}
    assert (mine.needs_beta, mine.has_gamma, mine.reads_behaviour) == (True, False, True)


def test_one_that_has_the_name_of_another_does_not_replace_it(monkeypatch):
    """`--loss tb` stays the paper's; `--loss FILE.py:tb` is the file's."""
    monkeypatch.setattr(loss, "OBJECTIVES", objectives := dict(OBJECTIVES))

    @objective(reads_behaviour=True)
    def tb(batch, beta):
        return batch.logprobs_BKT.mean()

    assert objectives == OBJECTIVES and objectives["tb"] is loss.tb is not tb
    assert tb.reads_behaviour and not loss.tb.reads_behaviour
