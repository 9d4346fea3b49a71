"""Policy gradient and PPO: exact enumeration on a tabular language model, and identities, in float64."""

import itertools

import pytest
import torch

import train_pg
import train_ppo
from common import token_weights
from train_grpo import group_advantages, grpo_loss
from train_ppo import ppo_loss, shape_rewards, whiten

V, T, STOP = 3, 3, 0  # vocabulary, length limit, the token that ends a completion


def double(*shape) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def ragged_mask() -> torch.Tensor:
    return torch.arange(6) < torch.tensor([6, 2, 4, 1])[:, None]


class TabularModel:
    """A free softmax at every prefix, and every completion that it can give: up to T tokens, ended by STOP."""

    def __init__(self):
        prefixes = [p for t in range(T) for p in itertools.product(range(1, V), repeat=t)]
        self.logits = {prefix: double(V).requires_grad_() for prefix in prefixes}
        texts = [(*p, STOP) for p in prefixes] + list(itertools.product(range(1, V), repeat=T))
        self.completions = sorted(set(texts), key=lambda c: (len(c), c))
        self.rewards = double(len(self.completions))
        self.mask = torch.arange(T) < torch.tensor([len(c) for c in self.completions])[:, None]

    def parameters(self) -> list[torch.Tensor]:
        return list(self.logits.values())

    def logprobs(self) -> torch.Tensor:
        """(number of completions, T), 0 on padding."""
        rows = []
        for completion in self.completions:
            steps = [self.logits[completion[:t]].log_softmax(-1)[token] for t, token in enumerate(completion)]
            rows.append(torch.stack(steps + [torch.zeros((), dtype=torch.float64)] * (T - len(steps))))
        return torch.stack(rows)

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        gradients = torch.autograd.grad(loss, self.parameters(), allow_unused=True)
        return torch.cat([torch.zeros(V).double() if g is None else g for g in gradients])


def test_expected_gradient_over_all_completions_is_the_gradient_of_the_expected_reward():
    """Enumerated and weighted by probability, it is exact with `constant` weights times max_new_tokens. With `sequence`
    weights it is not: the mean over tokens biases it, which the test also shows."""
    model = TabularModel()
    logprobs = model.logprobs()
    probability = logprobs.sum(1).exp()
    assert probability.sum().item() == pytest.approx(1.0)
    exact = model.gradient((probability * model.rewards).sum())
    for loss_norm in ("constant", "sequence"):
        total = torch.zeros_like(exact)
        for i, p in enumerate(probability.detach()):
            weights = token_weights(model.mask[[i]], loss_norm, T).double() * (T if loss_norm == "constant" else 1)
            loss, _ = train_pg.pg_loss(
                model.logprobs()[[i]], model.rewards[[i]][:, None].expand(1, T), model.mask[[i]], weights
            )
            total += p * model.gradient(-loss)
        cosine = torch.nn.functional.cosine_similarity(total, exact, dim=0).item()
        assert torch.allclose(total, exact) == (loss_norm == "constant")
        assert cosine < 0.9999 or loss_norm == "constant"


def test_the_score_has_mean_zero_so_a_baseline_changes_no_expectation():
    model = TabularModel()
    probability = model.logprobs().sum(1).exp().detach()
    assert model.gradient((probability * model.logprobs().sum(1)).sum()).abs().max() < 1e-12


def test_gae_by_hand():
    """lambda 1: the return minus V; lambda 0: the one-step error; between, the recursion."""
    rewards = torch.tensor([[0.0, 0.0, 2.0]], dtype=torch.float64)
    values = torch.tensor([[0.5, 1.0, -1.0]], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    for module in (train_pg, train_ppo):
        one, _ = module.compute_gae(rewards, values, mask, 1.0, 1.0)
        assert one.tolist() == [[1.5, 1.0, 3.0]]
        zero, _ = module.compute_gae(rewards, values, mask, 0.9, 0.0)
        assert torch.allclose(zero, torch.tensor([[0.4, -1.9, 3.0]]).double())
        half, returns = module.compute_gae(rewards, values, mask, 0.9, 0.5)
        assert torch.allclose(half, torch.tensor([[0.4 + 0.45 * (-1.9 + 0.45 * 3.0), -1.9 + 0.45 * 3.0, 3.0]]).double())
        expected = [[1.62, 1.8, 2.0]] if module is train_pg else (half + values).tolist()
        assert torch.allclose(returns, torch.tensor(expected).double())


@pytest.mark.parametrize("module", [train_pg, train_ppo])
def test_gae_does_not_leak_over_the_eos_or_between_rows(module):
    """Catches: values on padding that reach real tokens. Garbage there changes nothing; a row alone gives the same."""
    mask = ragged_mask()
    rewards, values = double(4, 6) * mask, double(4, 6)
    clean = module.compute_gae(rewards, values * mask, mask, 0.9, 0.8)
    dirty = module.compute_gae(rewards + 1e3 * ~mask, values + 1e6 * ~mask, mask, 0.9, 0.8)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[mask], b[mask])
    for row in range(4):
        n = mask[row].sum()
        alone = module.compute_gae(rewards[[row], :n], values[[row], :n], mask[[row], :n], 0.9, 0.8)
        assert torch.allclose(alone[0], clean[0][[row], :n])


def test_score_and_kl_stand_where_they_belong():
    """Catches: the terminal reward on a padded column; a gradient through the KL in the reward; its wrong sign."""
    mask, scores = ragged_mask(), double(4)
    logprobs, ref = double(4, 6).requires_grad_(), double(4, 6)
    rewards = shape_rewards(scores, logprobs, ref, mask, kl_coef=0.1)
    assert not rewards.requires_grad and (rewards[~mask] == 0).all()
    for row, n in enumerate(mask.sum(1).tolist()):
        expected = -0.1 * (logprobs[row, :n] - ref[row, :n]).detach()
        expected[-1] += scores[row]
        assert torch.allclose(rewards[row, :n], expected)
    assert torch.equal(shape_rewards(scores, logprobs, None, mask, 0.0).sum(1), scores)


def test_whitening_is_over_real_tokens_of_the_whole_batch():
    """Catches: whitening over padding, or row by row."""
    mask = ragged_mask()
    A = whiten(double(4, 6) * 7 + 3 + 1e6 * ~mask, mask)
    assert A[mask].mean().abs() < 1e-9 and A[mask].std().item() == pytest.approx(1.0, abs=1e-6)
    assert (A[~mask] == 0).all() and A[0].mean().abs() > 1e-3


def test_returns_are_not_those_of_whitened_advantages():
    """Catches: returns from whitened advantages. The script takes them before whitening; by hand they are A + V."""
    mask, rewards, values = ragged_mask(), double(4, 6), double(4, 6)
    advantages, returns = train_ppo.compute_gae(rewards, values, mask, 1.0, 0.95)
    assert torch.allclose(returns[mask], (advantages + values)[mask])
    source = open("train_ppo.py").read()
    assert source.index("returns = compute_gae(") < source.index("advantages = whiten(advantages")


def test_ppo_at_ratio_one_is_the_policy_gradient():
    mask = ragged_mask()
    logprobs, A, weights = double(4, 6).requires_grad_(), double(4, 6), token_weights(mask, "token", 6).double()
    losses = [
        ppo_loss(logprobs, logprobs.detach(), A, mask, weights, 0.2, 0.2)[0],
        train_pg.pg_loss(logprobs, A, mask, weights)[0],
    ]
    gradients = [torch.autograd.grad(loss, logprobs)[0] for loss in losses]
    assert torch.allclose(*gradients)


def test_four_quadrants_of_the_clip():
    """Catches: a clip that is wrong for A < 0, or whose bounds are swapped."""
    one = torch.ones(1, 1, dtype=torch.float64)
    for A, ratio in itertools.product((1.0, -1.0), (0.5, 0.75, 0.9, 1.1, 1.25, 1.5)):
        logprobs = torch.tensor([[ratio]], dtype=torch.float64).log().requires_grad_()
        loss, metrics = ppo_loss(logprobs, 0 * one, A * one, one > 0, one, 0.2, 0.3)
        loss.backward()
        clipped = (A > 0 and ratio > 1.3) or (A < 0 and ratio < 0.8)
        assert loss.item() == pytest.approx(-A * (min(max(ratio, 0.8), 1.3) if clipped else ratio))
        assert logprobs.grad.item() == pytest.approx(0.0 if clipped else -A * ratio)
        assert metrics["clip_high"] + metrics["clip_low"] == float(clipped)


def test_ppo_with_the_groups_mean_for_a_critic_is_dr_grpo():
    """V = group mean, beta 0, lambda 1, no whitening, the same weights: the same advantages and the same loss."""
    mask, rewards = ragged_mask(), double(2, 2)
    values = rewards.mean(1).repeat_interleave(2)[:, None].expand(4, 6) * mask
    token_rewards = shape_rewards(rewards.flatten(), torch.zeros(4, 6).double(), None, mask, 0.0)
    A, _ = train_ppo.compute_gae(token_rewards, values, mask, 1.0, 1.0)
    group_A = group_advantages(rewards, normalize_std=False).flatten()
    assert torch.allclose(A, group_A[:, None] * mask)
    logprobs, old, weights = double(4, 6) / 5, double(4, 6) / 5, token_weights(mask, "constant", 6).double()
    ours, _ = ppo_loss(logprobs, old, A, mask, weights, 0.2, 0.2)
    theirs, _ = grpo_loss(logprobs, old, None, group_A[:, None].expand(4, 6), mask, weights, 0.2, 0.2, 0.0)
    assert ours.item() == pytest.approx(theirs.item())


def test_value_loss_by_hand():
    """Catches: a value clip with min, not max: on the clipped side, far from the target, gradients must remain."""
    one = torch.ones(1, 1, dtype=torch.float64)
    for value, target, gradient in ((0.5, 1.0, 0.0), (0.5, 0.0, 0.5), (0.1, 1.0, -0.9), (-0.5, -1.0, 0.0)):
        values = (value * one).requires_grad_()
        loss, _ = train_ppo.value_loss(values, 0 * one, target * one, one > 0, one, value_clip=0.2)
        loss.backward()
        clipped = min(max(value, -0.2), 0.2)
        assert loss.item() == pytest.approx(0.5 * max((value - target) ** 2, (clipped - target) ** 2))
        assert values.grad.item() == pytest.approx(gradient)
    plain, metrics = train_pg.value_loss(3 * one, one, one > 0, one)
    assert plain.item() == metrics["value"] == 2.0


@pytest.mark.parametrize("garbage", [1e30, float("inf"), float("nan")])
def test_garbage_on_padding_does_no_harm(garbage):
    """Catches: a ratio computed on padding: inf * 0 is NaN."""
    mask = ragged_mask()
    weights, A, clean = token_weights(mask, "token", 6), torch.randn(4, 6), torch.randn(4, 6)
    functions = {
        "ppo": lambda x: ppo_loss(x, clean.masked_fill(~mask, -garbage), A, mask, weights, 0.2, 0.2)[0],
        "pg": lambda x: train_pg.pg_loss(x, A, mask, weights)[0],
        "value": lambda x: train_ppo.value_loss(x, clean, A, mask, weights, 0.2)[0],
        "pg value": lambda x: train_pg.value_loss(x, A, mask, weights)[0],
    }
    for name, function in functions.items():
        leaf = clean.masked_fill(~mask, garbage).requires_grad_()
        loss = function(leaf)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(leaf.grad[mask]).all(), name
        assert loss.item() == pytest.approx(function(clean.masked_fill(~mask, 0.0)).item()), name
