"""GRPO's mathematics, with identities in float64."""

import itertools

import pytest
import torch
from conftest import EOS, make_model

import common
from common import completion_logprobs, make_rollout, micro_batches, token_weights
from train_grpo import group_advantages, grpo_loss, is_uniform

CLIP = {"clip_low": 0.2, "clip_high": 0.2}


def double(*shape) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def ragged_mask() -> torch.Tensor:
    return torch.arange(6) < torch.tensor([6, 2, 4, 1])[:, None]


# ---- Advantages ------------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    """DeepSeekMath 4.1.2 with Bessel's correction; Dr. GRPO without the division."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    normalized = group_advantages(rewards, True)
    assert torch.allclose(normalized[0].abs(), torch.full((4,), 0.5 / (3**-0.5 + 1e-4), dtype=torch.float64))
    assert torch.allclose(normalized[1], torch.tensor([1.5, -0.5, -0.5, -0.5], dtype=torch.float64) / 1.0001)
    assert torch.allclose(group_advantages(rewards, False)[1], torch.tensor([1.5, -0.5, -0.5, -0.5]).double())


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0, 1e8])
def test_a_group_without_variance_teaches_exactly_nothing(reward):
    """Catches: NaN from 0/0, or the rounding noise of fp32 (7e-5 for eight rewards of 0.1) divided by 1e-4."""
    rewards = torch.full((1, 8), reward)
    assert is_uniform(rewards, torch.ones(1, 8, dtype=torch.bool)).all()
    assert (group_advantages(rewards, True) == 0).all() and (group_advantages(rewards, False) == 0).all()


def test_advantages_do_not_change_under_a_scaled_or_shifted_reward():
    rewards = double(5, 8)
    for a, b in ((1.0, 7.0), (3.0, 0.0), (10.0, -2.0)):
        changed = group_advantages(a * rewards + b, True)
        assert torch.allclose(changed, group_advantages(rewards, True), atol=1e-3)


def test_without_std_it_is_leave_one_out():
    """A_i k/(k-1) = r_i - mean of the others (RLOO)."""
    rewards = double(3, 5)
    others = (rewards.sum(1, keepdim=True) - rewards) / 4
    assert torch.allclose(group_advantages(rewards, False) * 5 / 4, rewards - others)


# ---- The loss --------------------------------------------------------------------------------------------------------


def test_four_quadrants_of_the_clip():
    """Catches: a clip that is wrong for A < 0, or whose bounds are swapped. The gradient is 0 only at A > 0,
    ratio > 1+eps_high and at A < 0, ratio < 1-eps_low."""
    for A, ratio in itertools.product((1.0, -1.0), (0.5, 0.75, 0.9, 1.1, 1.25, 1.5)):
        logprobs = torch.tensor([[ratio]], dtype=torch.float64).log().requires_grad_()
        one = torch.ones(1, 1, dtype=torch.float64)
        loss, metrics = grpo_loss(logprobs, 0 * one, None, A * one, one > 0, one, 0.2, 0.3, kl_coef=0.0)
        loss.backward()
        clipped = (A > 0 and ratio > 1.3) or (A < 0 and ratio < 0.8)
        expected_ratio = min(max(ratio, 0.8), 1.3) if clipped else ratio
        assert loss.item() == pytest.approx(-A * expected_ratio)
        assert logprobs.grad.item() == pytest.approx(0.0 if clipped else -A * ratio)
        assert metrics["clip_high"] + metrics["clip_low"] == float(clipped)


@pytest.mark.parametrize("loss_norm", ["sequence", "token", "constant"])
def test_on_policy_gradient_is_the_closed_form(loss_norm):
    """At pi = pi_old: -[A + beta (pi_ref/pi - 1)] grad log pi, weighted."""
    logprobs, ref = double(4, 6).requires_grad_(), double(4, 6)
    advantages, mask = double(4, 6), ragged_mask()
    weights = token_weights(mask, loss_norm, 6).double()
    loss, _ = grpo_loss(logprobs, logprobs.detach(), ref, advantages, mask, weights, **CLIP, kl_coef=0.3)
    loss.backward()
    expected = -weights * (advantages + 0.3 * ((ref - logprobs).exp() - 1))
    assert torch.allclose(logprobs.grad, expected)


def test_unbiased_kl_has_the_gradient_of_the_reverse_kl():
    """By enumeration of one token: E[rho k3] under pi_old = pi has the gradient of KL(pi || ref); plain k3 in the loss
    has that of KL(ref || pi)."""
    logits, ref = double(5).requires_grad_(), double(5).log_softmax(-1)
    logp = logits.log_softmax(-1)
    (reverse,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    (forward,) = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), logits, retain_graph=True)
    weights = logp.detach().exp()[:, None]  # enumeration: every token once, weighted with its probability
    for unbiased, expected in ((True, reverse), (False, forward)):
        arguments = (
            logp[:, None],
            logp.detach()[:, None],
            ref[:, None],
            torch.zeros(5, 1).double(),
            weights > 0,
            weights,
        )
        loss, _ = grpo_loss(*arguments, **CLIP, kl_coef=1.0, unbiased_kl=unbiased)
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert torch.allclose(gradient, expected)


def test_expected_k3_is_the_kl():
    """E_pi[sum_t k3_t] over all sequences of three tokens = KL(pi || ref) between the sequence distributions."""
    V, T = 3, 3
    pi = {prefix: double(V).log_softmax(-1) for t in range(T) for prefix in itertools.product(range(V), repeat=t)}
    ref = {prefix: double(V).log_softmax(-1) for prefix in pi}
    sequences = list(itertools.product(range(V), repeat=T))

    def logprobs(model) -> torch.Tensor:
        return torch.stack([torch.stack([model[s[:t]][s[t]] for t in range(T)]) for s in sequences])

    lp, lr = logprobs(pi), logprobs(ref)
    probability = lp.sum(1).exp()
    assert probability.sum().item() == pytest.approx(1.0)
    weights = probability[:, None].expand(-1, T).contiguous()
    loss, _ = grpo_loss(lp, lp, lr, torch.zeros_like(lp), weights > 0, weights, **CLIP, kl_coef=1.0)
    assert loss.item() == pytest.approx((probability * (lp.sum(1) - lr.sum(1))).sum().item())


def test_k3_varies_less_than_k1():
    """By enumeration of one token, with r = ref/pi: under pi both k1 = -log r and the loss's k3 = (r - 1) - log r have
    the expectation KL(pi || ref), and k3's variance is lower, the more so the closer the two policies are. Catches: an
    estimator as noisy as k1, or a biased one."""
    logits, noise, shares = double(6), double(6), []
    for distance in (0.5, 0.1):
        logp, ref = logits.log_softmax(-1), (logits + distance * noise).log_softmax(-1)
        pi, one = logp.exp(), torch.ones(1, 1, dtype=torch.float64)
        rows = [(lp.view(1, 1), lp.view(1, 1), lr.view(1, 1)) for lp, lr in zip(logp, ref, strict=True)]
        k3 = torch.stack([grpo_loss(*row, 0 * one, one > 0, one, **CLIP, kl_coef=1.0)[0] for row in rows])
        k1, kl = logp - ref, (pi * (logp - ref)).sum()
        assert torch.allclose((pi * k1).sum(), kl) and torch.allclose((pi * k3).sum(), kl)
        shares.append(((pi * (k3 - kl) ** 2).sum() / (pi * (k1 - kl) ** 2).sum()).item())
    assert shares[1] < shares[0] / 10 < 0.1


def test_a_large_kl_coef_moves_the_policy_toward_the_reference():
    """Catches: the sign of the KL."""
    logits, ref = double(1, 5).requires_grad_(), double(1, 5).log_softmax(-1)

    def kl() -> float:
        logp = logits.log_softmax(-1)
        return (logp.exp() * (logp - ref)).sum().item()

    before = kl()
    for _ in range(50):
        logp = logits.log_softmax(-1)
        weights = logp.detach().exp().T.contiguous()
        arguments = logp.T, logp.T.detach(), ref.T, torch.zeros(5, 1).double(), weights > 0, weights
        loss, _ = grpo_loss(*arguments, **CLIP, kl_coef=10.0)
        (gradient,) = torch.autograd.grad(loss, logits)
        logits.data -= 0.02 * gradient
    assert kl() < before / 10


def test_first_loss_is_zero_and_its_gradient_is_not():
    """Answers "loss is 0, is it broken?": on policy it is 0 with `sequence` weights and whole groups, not `token`."""
    logprobs = -double(4, 6).abs()
    advantages, mask = group_advantages(double(2, 2), True).flatten()[:, None].expand(4, 6), ragged_mask()
    for loss_norm in ("sequence", "token"):
        leaf = logprobs.clone().requires_grad_()
        weights = token_weights(mask, loss_norm, 6).double()
        loss, _ = grpo_loss(leaf, leaf.detach(), None, advantages, mask, weights, **CLIP, kl_coef=0.0)
        loss.backward()
        assert (abs(loss.item()) < 1e-7) == (loss_norm == "sequence")
        assert leaf.grad.abs().max() > 0.01


def test_ratio_levels_by_hand():
    """sequence: the product of the token ratios; gspo: their geometric mean; both over real tokens only."""
    mask = torch.tensor([[True, True, True, False]])
    logprobs = torch.tensor([[0.01, 0.02, -0.06, 9.0]], dtype=torch.float64)
    weights, A = token_weights(mask, "sequence", 4).double(), torch.ones(1, 4).double()
    expected = {"token": logprobs[0, :3].exp().mean(), "sequence": logprobs[0, :3].sum().exp()}
    expected["gspo"] = logprobs[0, :3].mean().exp()
    for level, value in expected.items():
        loss, _ = grpo_loss(logprobs, 0 * logprobs, None, A, mask, weights, **CLIP, kl_coef=0.0, ratio_level=level)
        assert loss.item() == pytest.approx(-value.item())


def test_sequence_ratio_of_a_long_completion_does_not_overflow():
    logprobs = torch.full((1, 4000), 5.0).requires_grad_()
    weights = torch.full((1, 4000), 1 / 4000)
    arguments = (torch.zeros(1, 4000), None, -torch.ones(1, 4000), weights > 0, weights)
    loss, _ = grpo_loss(logprobs, *arguments, **CLIP, kl_coef=0.0, ratio_level="sequence")
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logprobs.grad).all()


def test_extreme_logprobs_on_padding_do_no_harm():
    """Catches: a ratio on padding, inf * 0 = NaN."""
    mask = ragged_mask()
    weights, A = token_weights(mask, "sequence", 6), torch.randn(4, 6)
    clean = torch.randn(4, 6)
    losses = []
    for garbage in (0.0, 1e30, -torch.inf, torch.nan):
        leaf = clean.masked_fill(~mask, garbage).requires_grad_()
        old = (clean - 0.1).masked_fill(~mask, -garbage)
        loss, metrics = grpo_loss(leaf, old, old.clone(), A, mask, weights, **CLIP, kl_coef=0.1)
        loss.backward()
        assert torch.isfinite(leaf.grad[mask]).all() and (leaf.grad[~mask] == 0).all()
        losses.append((loss.item(), *metrics.values()))
    assert all(values == losses[0] for values in losses)


def test_a_fully_masked_batch_is_a_finite_zero():
    logprobs = torch.randn(2, 3).requires_grad_()
    for loss_norm in ("sequence", "token", "constant"):
        mask = torch.zeros(2, 3, dtype=torch.bool)
        weights = token_weights(mask, loss_norm, 3)
        loss, metrics = grpo_loss(
            logprobs, logprobs.detach(), None, torch.randn(2, 3), mask, weights, **CLIP, kl_coef=0.0
        )
        assert loss.item() == 0 and all(value == 0 for value in metrics.values())


# ---- Weights and batches ---------------------------------------------------------------------------------------------


def test_token_weights_by_hand():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert token_weights(mask, "sequence", 10).tolist() == [[0.25, 0.25, 0.0], [0.5, 0.0, 0.0]]
    assert torch.allclose(token_weights(mask, "token", 10), mask / 3)
    assert torch.allclose(token_weights(mask, "constant", 10), mask / 20)
    with pytest.raises(ValueError, match="loss_norm"):
        token_weights(mask, "mean", 10)


def random_batch(groups: int, group_size: int):
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(5, 40, (n % 7 + 1,), generator=generator).tolist() for n in range(groups)]
    lengths = torch.randint(1, 9, (groups * group_size,), generator=generator).tolist()
    completions = [torch.randint(5, 40, (n - 1,), generator=generator).tolist() + [EOS] for n in lengths]
    return make_rollout(prompts, completions, group_size)


@pytest.mark.parametrize("max_tokens", [1, 12, 30, 64, 10_000])
def test_micro_batches_cover_every_row_once_within_the_budget(max_tokens):
    rollout, rows = random_batch(5, 4), [*range(0, 8), *range(12, 20)]
    batches = micro_batches(rollout, rows, max_tokens)

    def tokens(batch):
        return sum(len(rollout.prompt_ids[r // 4]) + rollout.lengths[r].item() for r in batch)

    assert sorted(row for batch in batches for row in batch) == rows
    for batch in batches:
        assert len(batch) == 1 or tokens(batch) <= max_tokens
        for group in {r // 4 for r in batch}:  # split only if it is too large
            rows_of_group = [group * 4 + i for i in range(4)]
            assert set(rows_of_group) <= set(batch) or tokens(rows_of_group) > max_tokens


@pytest.mark.parametrize("max_tokens", [1, 30, 10_000])
def test_rows_apart_share_no_micro_batch(max_tokens):
    rollout, rows = random_batch(5, 4), [*range(0, 8), *range(12, 20)]
    apart = [row < 4 or row == 13 for row in range(20)]
    batches = micro_batches(rollout, rows, max_tokens, apart)
    assert sorted(row for batch in batches for row in batch) == rows
    assert all(len({apart[row] for row in batch}) == 1 for batch in batches)
    assert micro_batches(rollout, rows, max_tokens, [True] * 20) == micro_batches(rollout, rows, max_tokens)
    assert micro_batches(rollout, [], max_tokens) == micro_batches(rollout, [], max_tokens, apart) == []


def test_minibatches_are_whole_groups():
    rollout = random_batch(5, 4)
    batches = common.minibatches(rollout, 8, seed=1)
    assert [len(batch) for batch in batches] == [8, 8, 4]
    assert sorted(row for batch in batches for row in batch) == list(range(20))
    assert all(
        sorted(batch[i : i + 4]) == list(range(batch[i], batch[i] + 4))
        for batch in batches
        for i in (0, 4)[: len(batch) // 4]
    )
    assert common.minibatches(rollout, 8, seed=2) != batches == common.minibatches(rollout, 8, seed=1)


@pytest.mark.parametrize("loss_norm", ["sequence", "token", "constant"])
def test_micro_batches_do_not_change_the_gradient(loss_norm):
    """Catches: a loss normalised per micro-batch, and a last, partial micro-batch that is scaled wrongly. Lengths
    differ, and so do the splits."""
    model, rollout, rows = make_model("llama"), random_batch(3, 3), list(range(9))
    old, ref = completion_logprobs(make_model("llama", seed=1), rollout, rows)[0].detach(), torch.randn(9, 8)
    advantages, weights = torch.randn(9, 8), token_weights(rollout.mask, loss_norm, 8)
    gradients = []
    splits = [[rows], [[r] for r in rows], [rows[:2], rows[2:4], rows[4:6], rows[6:8], rows[8:]]]
    for split in splits + [micro_batches(rollout, rows, 40)]:
        model.zero_grad()
        for micro in split:
            logprobs, _ = completion_logprobs(model, rollout, micro)
            arguments = (old[micro], ref[micro], advantages[micro], rollout.mask[micro], weights[micro])
            grpo_loss(logprobs, *arguments, **CLIP, kl_coef=0.1)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[0].norm() > 0
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() < 1e-5 * gradients[0].norm()


@pytest.mark.parametrize("loss_norm", ["sequence", "token", "constant"])
def test_tokens_outside_of_the_loss_mask_carry_no_gradient(loss_norm):
    """Catches: given tokens (a user's next turn, a tool's output) that are trained. The other tokens have the weights
    that they would have alone."""
    model, rollout, rows = make_model("llama"), random_batch(2, 3), list(range(6))
    rollout.loss_mask = torch.rand(rollout.mask.shape) < 0.6
    rollout.loss_mask[4] = False  # a row without any token of the policy's own
    trained = rollout.trained
    assert 0 < trained.sum() < rollout.mask.sum() and torch.equal(rollout.lengths, trained.sum(1))
    weights = token_weights(trained, loss_norm, 8)
    if loss_norm == "sequence":
        assert torch.allclose(weights.sum(1), (torch.arange(6) != 4) / 5)
    if loss_norm == "token":
        assert torch.allclose(weights[trained], 1 / trained.sum())
    logprobs, _ = completion_logprobs(model, rollout, rows)
    logprobs.retain_grad()
    old, ref, advantages = logprobs.detach() + 0.1 * torch.randn(6, 8), torch.randn(6, 8), torch.randn(6, 8)
    for level in ("token", "sequence", "gspo"):
        logprobs.grad = None
        arguments = {"ratio_level": level, "kl_coef": 0.1} | CLIP
        loss, metrics = grpo_loss(logprobs, old, ref, advantages, trained, weights, **arguments)
        loss.backward(retain_graph=True)
        assert (logprobs.grad[~trained] == 0).all() and (logprobs.grad[trained] != 0).any()
        old[~trained] = ref[~trained] = torch.nan  # given tokens don't matter otherwise
        again, again_metrics = grpo_loss(logprobs, old, ref, advantages, trained, weights, **arguments)
        assert again.item() == loss.item() and again_metrics == metrics
