"""Kimi K1.5's policy mirror descent, in float64."""

import pytest
import torch

from train_kimi import group_advantages, kimi_loss


def double(*shape) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def ragged_mask() -> torch.Tensor:
    return torch.arange(6) < torch.tensor([6, 2, 4, 1])[:, None]


def test_gradient_is_the_reports_closed_form():
    """Autograd's gradient = -1/k sum[(r - rbar) grad log pi - tau/2 grad d^2], token by token."""
    logprobs, anchor, A, mask = double(4, 6).requires_grad_(), double(4, 6), double(4), ragged_mask()
    loss, _ = kimi_loss(logprobs, anchor, A, mask, tau=0.3)
    loss.backward()
    d = ((logprobs - anchor) * mask).sum(1).detach()
    expected = -(A - 0.3 * d)[:, None] * mask / 4
    assert torch.allclose(logprobs.grad, expected)


def test_loss_is_the_squared_surrogate():
    """(r - baseline - tau d)^2 / (2 tau) up to a term without gradient: the learning rate doesn't depend on tau."""
    logprobs, anchor, A, mask = double(4, 6).requires_grad_(), double(4, 6), double(4), ragged_mask()
    d = ((logprobs - anchor) * mask).sum(1)
    squared = ((A - 0.3 * d) ** 2 / 0.6).mean()
    loss, _ = kimi_loss(logprobs, anchor, A, mask, tau=0.3)
    gradients = [torch.autograd.grad(value, logprobs, retain_graph=True)[0] for value in (squared, loss)]
    assert torch.allclose(*gradients)


def test_at_the_anchor_it_is_reinforce_with_a_mean_baseline():
    logprobs, rewards, mask = double(4, 6).requires_grad_(), double(2, 2), ragged_mask()
    A = group_advantages(rewards, tau=0.5, baseline="mean").flatten()
    loss, _ = kimi_loss(logprobs, logprobs.detach(), A, mask, tau=0.5)
    loss.backward()
    reinforce = -((rewards - rewards.mean(1, keepdim=True)).flatten()[:, None] * mask) / 4
    assert torch.allclose(logprobs.grad, reinforce)


def test_the_log_ratio_is_summed_not_averaged():
    """Catches: the mean of the log-ratios instead of their sum. By hand, for completions of two and of four tokens."""
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    logprobs = torch.full((2, 4), 0.1, dtype=torch.float64)
    loss, metrics = kimi_loss(logprobs, 0 * logprobs, torch.tensor([1.0, -2.0]).double(), mask, tau=0.5)
    expected = ((-0.2 + 0.25 * 0.04) + (0.8 + 0.25 * 0.16)) / 2
    assert loss.item() == pytest.approx(expected)
    assert metrics["ratio_max"] == pytest.approx(torch.tensor(0.4).exp().item())


def test_log_z_lies_between_the_mean_and_the_maximum():
    """tau log Z -> mean as tau -> inf, -> max as tau -> 0."""
    rewards = double(5, 8)

    def baseline(tau: float) -> torch.Tensor:
        return rewards[:, 0] - group_advantages(rewards, tau, "log-z")[:, 0]

    assert torch.allclose(baseline(1e6), rewards.mean(1), atol=1e-5)
    assert torch.allclose(baseline(1e-4), rewards.amax(1), atol=1e-3)
    assert (baseline(1.0) > rewards.mean(1)).all() and (baseline(1.0) < rewards.amax(1)).all()


@pytest.mark.parametrize("baseline", ["mean", "log-z"])
def test_a_group_without_variance_teaches_exactly_nothing(baseline):
    assert (group_advantages(torch.full((2, 8), 0.1), 0.05, baseline) == 0).all()


def test_a_bandit_converges_to_the_closed_form():
    """With exact log Z: anchor * exp(r / tau) / Z. Every arm is enumerated, weighted by its probability."""
    tau, rewards, anchor = 0.5, double(1, 5), double(5).log_softmax(-1)
    exact = anchor + rewards[0] / tau
    A = rewards[0] - tau * exact.logsumexp(-1)
    logits = anchor.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    mask = torch.ones(5, 1, dtype=torch.bool)
    for _ in range(2000):
        logp = logits.log_softmax(-1)
        loss, _ = kimi_loss(logp[:, None], anchor[:, None], A, mask, tau, row_weights=anchor.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.allclose(logits.log_softmax(-1), exact.log_softmax(-1), atol=1e-3)


def test_extreme_logprobs_on_padding_do_no_harm():
    mask, A, clean = ragged_mask(), torch.randn(4), torch.randn(4, 6)
    losses = []
    for garbage in (0.0, 1e30, -torch.inf, torch.nan):
        leaf = clean.masked_fill(~mask, garbage).requires_grad_()
        loss, _ = kimi_loss(leaf, (clean - 0.1).masked_fill(~mask, -garbage), A, mask, tau=0.1)
        loss.backward()
        assert torch.isfinite(leaf.grad).all() and (leaf.grad[~mask] == 0).all()
        losses.append(loss.item())
    assert all(loss == losses[0] for loss in losses)


def test_micro_batches_sum_to_the_whole():
    """Catches: a loss normalised per micro-batch."""
    logprobs, anchor, A, mask = double(4, 6), double(4, 6), double(4), ragged_mask()
    whole, _ = kimi_loss(logprobs, anchor, A, mask, tau=0.3)
    weights = torch.full((4,), 0.25).double()
    for split in ([[0], [1], [2], [3]], [[0, 1, 2], [3]]):
        parts = [kimi_loss(logprobs[r], anchor[r], A[r], mask[r], 0.3, weights[r])[0] for r in split]
        assert sum(parts).item() == pytest.approx(whole.item())
