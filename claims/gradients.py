"""The policy gradient at fixed weights, estimated from many batches: how noisy it is under each baseline, and which
problems it comes from.

    python claims/gradients.py --seed 1

Variance: the trace of the gradient's covariance over batches, divided by the squared norm of the expected gradient.
Every baseline sees the same completions. The critic of "value" is fitted first, on completions of the same policy.

Share by difficulty: the norm of the summed gradient of a problem's completions, over the sum of these norms, for groups
with one right or one wrong completion (success of at most 1/8 or at least 7/8), with and without the division by the
group's standard deviation.

Squared score: the mean squared norm of grad log p of a right and of a wrong completion. A constant baseline above twice
E[r score^2] / E[score^2] makes the estimate noisier than none does (the variance is a parabola in the baseline).
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # noqa: E402
from common import Rollout, derive_seed  # noqa: E402
from data import ProblemSampler, decode, encode_problems, load_train_problems  # noqa: E402
from rewards import Verifier  # noqa: E402
from train_grpo import group_advantages  # noqa: E402
from train_pg import compute_gae, pg_loss, value_loss  # noqa: E402

P, G, TOKENS = 16, 8, 40  # prompts and completions of a batch, and the length limit
CRITIC_BATCHES = 60
SCORED_BATCHES = 2  # for the squared scores, which take a backward pass a completion


@dataclass
class Args:
    model: str = "models/tiny-arithmetic"
    batches: int = 40
    output: Path | None = None
    """write the figures to this JSON file"""
    seed: int = 1


def gradient(policy, rollout: Rollout, rows: list[int], advantages: Tensor) -> Tensor:
    """Of the loss of these rows, all weights in one vector. Each completion's tokens count the same, as in a sum."""
    policy.zero_grad()
    logprobs, _ = common.completion_logprobs(policy, rollout, rows)
    mask = rollout.mask[rows]
    pg_loss(logprobs, advantages[rows], mask, mask / len(rollout.mask))[0].backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()]).clone()


def fit_critic(sample, model: str, tokenizer):
    """A value model of the policy's expected accuracy at every token."""
    critic = common.load_value_model(model, tokenizer)
    optimizer = common.MasterAdamW(critic, lr=3e-4)
    for step in range(CRITIC_BATCHES):
        rollout, rewards = sample("critic", step)
        returns = rewards.flatten()[:, None].expand(rollout.mask.shape)
        values = common.completion_values(critic, rollout, list(range(P * G)))
        optimizer.zero_grad()
        value_loss(values, returns, rollout.mask, rollout.mask / rollout.mask.sum())[0].backward()
        optimizer.step()
    return critic


def main(args: Args) -> None:
    common.resolve_device("cpu")
    tokenizer = common.load_tokenizer(args.model)
    policy = common.load_policy(args.model, tokenizer)
    problems = encode_problems(tokenizer, load_train_problems("arithmetic", None), "", policy.config, TOKENS)
    sampler, verify = ProblemSampler(problems, seed=args.seed), Verifier()

    def sample(*purpose) -> tuple[Rollout, Tensor]:
        batch = sampler.draw(P)
        seed = derive_seed(args.seed, *purpose)
        rollout = common.sample_groups(policy, [p.prompt_ids for p in batch], G, TOKENS, seed=seed)
        right = verify(decode(tokenizer, rollout), [problem for problem in batch for _ in range(G)])
        return rollout, torch.tensor(right, dtype=torch.float32).view(P, G)

    critic = fit_critic(sample, args.model, tokenizer)
    sums: dict[str, list] = {}  # of each baseline: sum of the gradients, sum of their squared norms
    shares: dict[str, list[float]] = {"with std": [], "without": []}
    scores: dict[bool, list[float]] = {True: [], False: []}  # squared, of right and of wrong completions
    for step in range(args.batches):
        rollout, rewards = sample("batch", step)
        rows, last = list(range(P * G)), rollout.mask.sum(1) - 1
        at_end = torch.zeros(rollout.mask.shape).scatter_(1, last[:, None], rewards.flatten()[:, None])
        with torch.no_grad():
            values = common.completion_values(critic, rollout, rows)
        advantages = {
            "none": rewards.flatten(),
            "batch mean": (rewards - rewards.mean()).flatten(),
            "group": (rewards - rewards.mean(1, keepdim=True)).flatten(),
        }
        advantages = {name: a[:, None].expand(rollout.mask.shape) for name, a in advantages.items()}
        advantages["value"] = compute_gae(at_end, values, rollout.mask, 1.0, 1.0)[0]
        for name, values in advantages.items():
            g = gradient(policy, rollout, rows, values).double()
            total, squares = sums.get(name, (0.0, 0.0))
            sums[name] = [total + g, squares + g.square().sum()]
        if step < SCORED_BATCHES:
            ones = torch.ones(rollout.mask.shape) * len(rollout.mask)  # undoes gradient()'s mean
            for row, right in enumerate(rewards.flatten().bool().tolist()):
                scores[right].append(gradient(policy, rollout, [row], ones).square().sum().item())
        if step % 4 == 0:  # a backward pass for each group: the dear part
            extreme = (rewards.mean(1) <= 1 / G) | (rewards.mean(1) >= 1 - 1 / G)
            for name, normalize_std in (("with std", True), ("without", False)):
                wide = group_advantages(rewards, normalize_std).flatten()[:, None].expand(rollout.mask.shape)
                norms = torch.stack(
                    [gradient(policy, rollout, list(range(p * G, p * G + G)), wide).norm() for p in range(P)]
                )
                shares[name].append((norms[extreme].sum() / norms.sum()).item())
    n, found = args.batches, {}
    for name, (total, squares) in sums.items():
        mean = (total / n).square().sum()
        trace = (squares - n * mean) / (n - 1)
        found[name] = (trace / (mean - trace / n)).item()  # the mean of n batches is noisy too: its noise is taken off
    found |= {f"extreme, {name}": sum(values) / len(values) for name, values in shares.items()}
    for right, values in scores.items():
        found[f"squared score, {'right' if right else 'wrong'}"] = sum(values) / max(1, len(values))
    for name, value in found.items():
        print(f"{name}: {value:.3f}")
    if args.output:
        args.output.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
