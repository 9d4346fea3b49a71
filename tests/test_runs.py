"""Whole runs of the train scripts: they learn, log what they say, and go on after an interruption as if there had been
none."""

import ast
import contextlib
import importlib.util
import inspect
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import EMBEDDED, assert_same_events, make_model, quick, refusal, run, scalars, slow, small, texts, weights
from transformers import AutoConfig, AutoModelForSequenceClassification

import common
import plumbing.runs
import train_dpo
import train_grpo
import train_kimi
import train_pg
import train_ppo
import train_rm
import train_sft
from common import completion_logprobs, make_rollout, sample_groups, token_weights
from curate import Demonstration
from plumbing.evaluation import comparison_table
from plumbing.flags import parse_args
from plumbing.metrics import Metrics
from plumbing.runs import Run, load_checkpoint, run_directory, save_model

RL_SCRIPTS = pytest.mark.parametrize(
    "script", [train_grpo, slow(train_pg), slow(train_ppo), slow(train_kimi)], ids=lambda module: module.__name__
)

# ---- What a run does -------------------------------------------------------------------------------------------------

TAGS = """
    reward/total reward/accuracy reward/format reward/std_within_group reward/frac_all_right reward/frac_all_wrong
    rollout/length_mean rollout/length_max rollout/length_right rollout/length_wrong rollout/finished
    rollout/tokens_per_second rollout/logprob_gap_mean rollout/logprob_gap_max
    loss/policy loss/entropy loss/clip_low loss/clip_high loss/ratio_max loss/grad_norm loss/learning_rate
    eval/accuracy eval/accuracy_greedy eval/format eval/length eval/truncated eval/no_answer eval/pass_at_k
    eval/accuracy_difficulty_1 eval/accuracy_difficulty_6 eval/accuracy_greedy_difficulty_6
    time/sample time/reward time/logprobs time/update memory/peak_gb
""".split()


@pytest.fixture(scope="module")
def learned(tmp_path_factory) -> tuple[Path, str]:
    """A run of GRPO that is long enough to learn, and its printed output."""
    flags = {"prompts_per_step": 16, "group_size": 8, "iterations": 12, "learning_rate": 4e-4, "warmup_iterations": 2}
    args, printed = small(train_grpo, tmp_path_factory.mktemp("learned"), eval_problems=36, **flags), io.StringIO()
    with contextlib.redirect_stdout(printed):
        run_dir = run(train_grpo.main, args)
    return run_dir, printed.getvalue()


def test_a_short_run_learns(learned):
    """The reward rises by more than chance between the first and the last five of 12 iterations of 16 x 8 completions:
    the standard error of a mean of 640 rewards is under 0.025. Advantages of other rows make it fall."""
    values = scalars(learned[0])
    reward = [value for _, value in values["reward/total"]]
    assert sum(reward[-5:]) / 5 > sum(reward[:5]) / 5 + 0.15
    assert values["eval/accuracy"][-1][1] > values["eval/accuracy"][0][1] + 0.1


def test_a_run_logs_what_it_says(learned):
    run_dir, _ = learned
    values = scalars(run_dir)
    assert [x for x, _ in values["reward/total"]] == [128 * (i + 1) for i in range(12)]  # completions sampled
    assert not set(TAGS) - set(values)
    assert max(gap for _, gap in values["rollout/logprob_gap_max"]) < 1e-4
    assert all(abs(loss) < 1e-5 for _, loss in values["loss/policy"])
    rates = [rate for _, rate in values["loss/learning_rate"]]
    assert rates == pytest.approx([2e-4, *[4e-4] * 11])  # two iterations of warm-up, then constant
    assert "<think>" in texts(run_dir, "samples")[0]
    assert "learning_rate" in texts(run_dir, "hyperparameters")[0]
    reloaded = common.load_policy(str(run_dir / "final"))
    assert reloaded.generation_config.eos_token_id is not None


LEARNERS = {
    "kimi": (train_kimi, {"learning_rate": 2e-4, "iterations": 12}),
    "pg": (train_pg, {"learning_rate": 5e-4, "iterations": 14, "value_epochs": 1}),
    "ppo": (train_ppo, {"learning_rate": 2e-4, "iterations": 10, "update_epochs": 2, "kl_coef": 0.01}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_every_algorithm_learns(name, tmp_path):
    """The reward rises by more than chance: the standard error of a mean of 384 rewards is about 0.03."""
    module, changes = LEARNERS[name]
    shared = {"prompts_per_step": 16, "group_size": 8, "eval_every": 0, "save_every": 0, "eval_problems": 60}
    args = small(module, tmp_path, warmup_iterations=2, **shared, **changes)
    values = scalars(run(module.main, args))
    reward = [value for _, value in values["reward/total"]]
    assert sum(reward[-3:]) / 3 > sum(reward[:3]) / 3 + 0.12
    assert values["eval/accuracy"][-1][1] > values["eval/accuracy"][0][1] + 0.08
    assert max(gap for _, gap in values["rollout/logprob_gap_max"]) < 1e-4
    common_tags = {tag for tag in TAGS if tag not in ("loss/clip_low", "loss/clip_high", "loss/ratio_max")}
    assert not common_tags - set(values)
    assert ("loss/value" in values) == (name != "kimi")


@pytest.mark.parametrize("keep_optimizer", [False, slow(True)])
def test_kimi_starts_every_iteration_with_a_fresh_optimizer(keep_optimizer, tmp_path, monkeypatch):
    """Catches: optimizer state kept from one anchor to the next. An iteration makes four updates in each of two epochs;
    its first has no state, with --keep-optimizer only the very first of the run.

    Also catches: old logprobs recomputed in every minibatch, so that the log-ratio, and with it tau's term, stays 0."""
    fresh, step = [], common.MasterAdamW.step

    def remembering(optimizer, closure=None):
        fresh.append(len(optimizer.state) == 0)
        return step(optimizer, closure)

    monkeypatch.setattr(common.MasterAdamW, "step", remembering)
    args = quick(train_kimi, tmp_path, learning_rate=1e-3, update_epochs=2, keep_optimizer=keep_optimizer)
    values = scalars(run(train_kimi.main, args))
    assert fresh == ([True] + [False] * 15 if keep_optimizer else ([True] + [False] * 7) * 2)
    assert all(kl > 1e-4 for _, kl in values["loss/kl"])


def test_the_length_reward_starts_late_and_is_logged_apart(tmp_path):
    args = quick(train_kimi, tmp_path, iterations=3, length_weight=0.5, length_reward_start=2, learning_rate=1e-9)
    values = scalars(run(train_kimi.main, args))
    for i, weight in enumerate((0.0, 0.0, 0.5)):
        accuracy, form, length, total = (
            values[f"reward/{name}"][i][1] for name in ("accuracy", "format", "length", "total")
        )
        assert total == pytest.approx(accuracy + 0.2 * form + weight * length, abs=1e-6)
    assert any(length != 0 for _, length in values["reward/length"])


@RL_SCRIPTS
def test_the_other_rewards_are_logged_apart_and_weighted(script, tmp_path):
    """The language reward (1: arithmetic has no words), the overlong penalty, and --truncated wrong."""
    changes = {"language_weight": 0.25, "overlong_weight": 0.5, "overlong_buffer": 6, "truncated": "wrong"}
    args = quick(script, tmp_path, iterations=2, max_new_tokens=12, **changes)
    values = {tag: [value for _, value in points] for tag, points in scalars(run(script.main, args)).items()}
    assert values["reward/language"] == [1.0, 1.0] and min(values["reward/overlong"]) < 0
    assert min(values["rollout/finished"]) < 1
    for i in range(2):
        parts = {name: values[f"reward/{name}"][i] for name in ("accuracy", "format", "language", "overlong")}
        expected = parts["accuracy"] + 0.2 * parts["format"] + 0.25 * parts["language"] + 0.5 * parts["overlong"]
        assert values["reward/total"][i] == pytest.approx(expected, abs=1e-6)
        assert parts["accuracy"] <= values["rollout/finished"][i]
    assert values["eval/reflection_words"] == [0.0, 0.0]


@RL_SCRIPTS
def test_masked_completions_teach_nothing(script, tmp_path):
    """If all are cut, no update moves the weights (Kimi's and PPO's regularisers are 0 at their anchors)."""
    options = {"truncated": "mask", "max_new_tokens": 4, "iterations": 1, "seed": 3}
    options |= {"kl_coef": 0.0} if script is train_ppo else {}
    run_dir = run(script.main, quick(script, tmp_path, **options))
    values = scalars(run_dir)
    assert values["rollout/finished"][0][1] == 0.0
    assert weights(run_dir / "final") == weights(Path(EMBEDDED))


LOSSES = {train_grpo: "grpo_loss", train_pg: "pg_loss", train_ppo: "ppo_loss", train_kimi: "kimi_loss"}


@RL_SCRIPTS
def test_only_the_policys_own_tokens_are_trained(script, tmp_path, monkeypatch):
    """Catches: weights from `mask` although the rollout has a loss_mask, as after a user's second turn. Here a
    completion's second and third tokens are given. Lengths count the policy's own tokens."""
    gradients, loss, sample = [], getattr(script, LOSSES[script]), common.sample_groups
    mask, given = [], slice(1, 3)

    def sampling(*args, **kwargs):
        rollout = sample(*args, **kwargs)
        rollout.loss_mask = rollout.mask.clone()
        rollout.loss_mask[:, given] = False
        mask.append(rollout.mask)
        return rollout

    def remembering(logprobs, *args, **kwargs):
        if logprobs.requires_grad:
            logprobs.register_hook(gradients.append)
        return loss(logprobs, *args, **kwargs)

    monkeypatch.setattr(common, "sample_groups", sampling)
    monkeypatch.setattr(script, LOSSES[script], remembering)
    values = scalars(run(script.main, quick(script, tmp_path, iterations=1)))
    assert gradients and all((gradient[:, given] == 0).all() for gradient in gradients)
    assert all((gradient[:, [0, 3, 4]] != 0).any() for gradient in gradients)
    lengths = mask[0].sum(1) - mask[0][:, given].sum(1)
    assert values["rollout/length_mean"][0][1] == pytest.approx(lengths.float().mean().item())


@pytest.mark.slow
def test_ppo_without_a_kl_loads_no_reference(tmp_path, monkeypatch):
    calls = count_steps(monkeypatch)
    run(train_ppo.main, quick(train_ppo, tmp_path, iterations=1, kl_coef=0.0, update_epochs=1, minibatch_size=16))
    assert calls["loads"] == 1 and calls["steps"] == 2  # the policy's and the critic's
    run(train_ppo.main, quick(train_ppo, tmp_path, iterations=1))
    assert calls["loads"] == 3


@pytest.fixture(scope="module")
def scorer(tmp_path_factory) -> str:
    """A reward model with random weights."""
    directory = tmp_path_factory.mktemp("rm")
    config = AutoConfig.from_pretrained(EMBEDDED, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config)
    save_model(directory / "rm", model, common.load_tokenizer(EMBEDDED))
    return str(directory / "rm")


@RL_SCRIPTS
def test_a_learned_reward_is_added_to_the_rules(script, scorer, tmp_path, capsys):
    """Catches: a model's score that replaces the rules' rewards, is only logged, or ignores its weight."""
    flags = {"iterations": 1, "reward_model": scorer, "reward_model_weight": 2.0}
    values = scalars(run(script.main, quick(script, tmp_path, **flags)))
    model, right, form = (values[f"reward/{name}"][0][1] for name in ("model", "accuracy", "format"))
    assert values["reward/total"][0][1] == pytest.approx(2 * model + right + 0.2 * form, abs=1e-5) and model != 0
    assert ("adds to the rules' rewards" in capsys.readouterr().out) == (script is train_ppo)


def test_the_reward_model_alone(scorer, tmp_path):
    flags = {"iterations": 1, "reward_model": scorer, "accuracy_weight": 0.0, "format_weight": 0.0}
    values = scalars(run(train_grpo.main, quick(train_grpo, tmp_path, **flags)))
    assert values["reward/total"][0][1] == pytest.approx(values["reward/model"][0][1])
    assert values["reward/accuracy"][0][1] > 0  # logged, so that overoptimisation can be seen


def test_a_group_is_uniform_by_the_rules_alone(scorer, tmp_path, monkeypatch):
    """A model's scores are hardly ever equal within a group, so with them --dynamic-sampling would keep every group."""
    join, kept = common.join_groups, []
    monkeypatch.setattr(common, "join_groups", lambda parts, limit: kept.extend(parts) or join(parts, limit))
    flags = {"iterations": 1, "reward_model": scorer, "dynamic_sampling": True, "max_sampling_rounds": 1}
    args = quick(train_grpo, tmp_path, **flags, problems="arithmetic:5-6", prompts_per_step=16)
    run(train_grpo.main, args)
    ((rollout, rewards, groups),) = kept
    assert len(rewards) == 16 and 0 < len(groups) < 16
    assert train_grpo.is_uniform(rewards).sum() < 16 - len(groups)  # texts that are equal have equal scores


def test_ppo_scores_a_cut_completion_as_told(tmp_path, monkeypatch):
    seen, shape = [], train_ppo.shape_rewards

    def remembering(scores, logprobs, ref, mask, kl_coef):
        seen.append((scores, mask.sum(1)))
        return shape(scores, logprobs, ref, mask, kl_coef)

    monkeypatch.setattr(train_ppo, "shape_rewards", remembering)
    flags = {"iterations": 1, "update_epochs": 1, "kl_coef": 0.0, "max_new_tokens": 9, "missing_eos_score": -2.0}
    run(train_ppo.main, quick(train_ppo, tmp_path, **flags))
    scores, lengths = seen[0]
    assert (scores == -2.0).any() and (scores >= 0).any()
    assert (lengths[scores == -2.0] == 9).all()


ADVANTAGES = {
    train_pg: ("pg_loss", 1),
    train_ppo: ("ppo_loss", 2),
    train_grpo: ("grpo_loss", 3),
    train_kimi: ("kimi_loss", 2),
}


def advantages_by_row(script, monkeypatch, args) -> tuple[common.Rollout, torch.Tensor, dict[int, torch.Tensor]]:
    """The one Rollout of a run, its rewards (B,), and each row's advantage as the loss got it, on its real tokens."""
    (name, place), seen, rows, found = ADVANTAGES[script], [], [], {}
    metrics, logprobs, loss = script.add_rollout_metrics, common.completion_logprobs, getattr(script, name)

    def remember_rewards(m, rollout, rewards, components):
        seen.append((rollout, rewards.flatten()))
        return metrics(m, rollout, rewards, components)

    def remember_rows(model, rollout, micro, *others):
        rows[:] = micro
        return logprobs(model, rollout, micro, *others)

    def remember_advantages(*values, **others):
        found.update(zip(list(rows), values[place].clone(), strict=True))
        return loss(*values, **others)

    monkeypatch.setattr(script, "add_rollout_metrics", remember_rewards)
    monkeypatch.setattr(common, "completion_logprobs", remember_rows)
    monkeypatch.setattr(script, name, remember_advantages)
    run(script.main, args)
    ((rollout, rewards),) = seen
    width = rollout.mask.shape[1]
    return rollout, rewards, {row: A.expand(width)[rollout.mask[row]] for row, A in sorted(found.items())}


@pytest.mark.parametrize("script", list(ADVANTAGES), ids=lambda script: script.__name__)
def test_with_truncated_mask_cut_completions_have_no_advantage(script, tmp_path, monkeypatch):
    """Catches: completions that ended masked instead, or none masked."""
    args = quick(script, tmp_path, iterations=1, truncated="mask", max_new_tokens=12, prompts_per_step=8)
    rollout, _, advantages = advantages_by_row(script, monkeypatch, args)
    assert len(advantages) == 32 and 4 < rollout.finished.sum() < 28
    for row, A in advantages.items():
        assert rollout.finished[row] or not A.any()
    assert sum(A.any().item() for A in advantages.values()) > 4


@pytest.mark.parametrize("baseline", ["none", "batch-mean"])
def test_without_a_critic_the_advantage_is_the_return(baseline, tmp_path, monkeypatch):
    """Catches: a reward before or after the last token, or a baseline subtracted where none is wanted."""
    args = quick(train_pg, tmp_path, iterations=1, baseline=baseline)
    _, rewards, advantages = advantages_by_row(train_pg, monkeypatch, args)
    assert len(advantages) == 16 and rewards.std() > 0
    for row, A in advantages.items():
        expected = rewards[row] - (rewards.mean() if baseline == "batch-mean" else 0.0)
        assert torch.allclose(A, expected.expand_as(A), atol=1e-6)


@pytest.mark.parametrize(
    ("script", "name"),
    [(train_kimi, "kimi_loss"), (train_dpo, "dpo_loss"), (train_rm, "reward_model_loss")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_weights_of_rows_in_a_step(script, name, tmp_path, monkeypatch):
    """Catches: a minibatch weighted by its share of the batch, so that a step is too small; pair weights ignored."""
    loss, step, steps = getattr(script, name), common.MasterAdamW.step, [[]]

    def remember(*values, **others):
        if values[0].requires_grad:
            steps[-1] += inspect.signature(loss).bind(*values, **others).arguments["row_weights"].tolist()
        return loss(*values, **others)

    def end_step(*values, **others):
        steps.append([])
        return step(*values, **others)

    monkeypatch.setattr(script, name, remember)
    monkeypatch.setattr(common.MasterAdamW, "step", end_step)
    if script is train_kimi:
        run(script.main, quick(script, tmp_path, iterations=1, minibatch_size=8))
        assert len(steps) > 2 and all(sum(weights) == pytest.approx(1) for weights in steps[:-1] if weights)
        assert all(max(weights) == pytest.approx(1 / 8) for weights in steps[:-1] if weights)
        return
    rows = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": "0", "weight": 1 + 2 * (i % 2)} for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = small(script, tmp_path / "runs", iterations=1, data=str(tmp_path / "pairs.jsonl"), minibatch_size=40)
    run(script.main, args)
    assert len(steps[0]) == 40 and {round(weight, 6) for weight in steps[0]} == {round(w / 80, 6) for w in (1, 3)}


def test_masters_keep_what_16_bits_round_away():
    """Catches: gradients of all micro-batches but the last lost; steps too small for bf16 lost; a checkpoint without
    masters, so that a resumed run begins at rounded ones."""
    layer = torch.nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    optimizer = common.MasterAdamW(layer, lr=1e-5)
    weight = layer.weight.detach().float().requires_grad_()
    reference = torch.optim.AdamW([weight], lr=1e-5, weight_decay=0.0)
    inputs = torch.randn(6, 2, 4, 8, dtype=torch.bfloat16)
    for step, micro_batches in enumerate(inputs):
        weight.grad = torch.zeros_like(weight)
        for x in micro_batches:
            copy = layer.weight.detach().clone().requires_grad_()
            torch.nn.functional.linear(x, copy).float().square().sum().backward()
            weight.grad += copy.grad.float()
            layer(x).float().square().sum().backward()
        for chosen in (optimizer, reference):
            chosen.step()
            chosen.zero_grad()
        assert torch.allclose(optimizer.masters[0], weight, atol=1e-7)
        assert torch.equal(layer.weight, weight.to(torch.bfloat16)) and layer.weight.grad is None
        if step == 2:
            state = {"weights": layer.state_dict(), "optimizer": optimizer.state_dict()}
            resumed = torch.nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
            resumed.load_state_dict(copy_of(state["weights"]))
            again = common.MasterAdamW(resumed, lr=1e-5)
            again.load_state_dict(copy_of(state["optimizer"]))
            layer, optimizer = resumed, again
    assert not torch.equal(weight, weight.to(torch.bfloat16).float())


def copy_of(state: dict) -> dict:
    """The state as a checkpoint returns it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_what_a_user_reads_at_the_end(learned, tmp_path, capsys):
    """The before/after table, the model's path, the TensorBoard command; and the note that the policy loss is near 0
    ("loss is 0, is it broken?"), only in a run where it is."""
    run_dir, printed = learned
    for text in (
        "difficulty 6",
        f"model: {run_dir / 'final'}",
        f"tensorboard --logdir {run_dir}",
        "a loss near 0 is normal",
    ):
        assert text in printed
    run(train_grpo.main, quick(train_grpo, tmp_path, iterations=1, update_epochs=2))
    assert "a loss near 0 is normal" not in capsys.readouterr().out


def test_the_table_tells_before_from_after():
    tags = ("accuracy", "accuracy_greedy", "format", "length", "truncated", "no_answer", "pass_at_k")
    tags += ("accuracy_difficulty_2", "accuracy_greedy_difficulty_2")
    before, after = ({f"eval/{tag}": base + i / 100 for i, tag in enumerate(tags)} for base in (0.1, 0.5))
    lines = {line.split("  ")[0]: line.split() for line in comparison_table(before, after).splitlines()}
    assert lines["all"][1:] == ["0.100", "0.500", "0.110", "0.510"]
    assert lines["difficulty 2"][2:] == ["0.170", "0.570", "0.180", "0.580"]
    assert lines["format (sampled)"][2:] == ["0.120", "0.520"]


def test_sft_loss_is_the_cross_entropy():
    logits, targets = torch.randn(3, 5, 7, dtype=torch.float64), torch.randint(7, (3, 5))
    mask = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    logprobs = logits.log_softmax(-1).gather(2, targets[..., None])[..., 0].masked_fill(~mask, 0.0)
    loss, _ = train_sft.sft_loss(logprobs, token_weights(mask, "token", 5).double())
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits[mask], targets[mask]).item())


def test_held_out_loss_is_the_mean_over_tokens(embedded):
    policy, tokenizer = embedded
    prompts = [tokenizer(q).input_ids for q in ("1+1=", "12+30=")]
    completions = [tokenizer(c).input_ids + [1] for c in ("<think>2", "42</think><answer>42</answer>")]
    with torch.no_grad():
        logprobs, _ = completion_logprobs(policy, make_rollout(prompts, completions), [0, 1])
    expected = -logprobs.sum().item() / (3 + 8)
    shown = [Demonstration("", "", prompt_ids=p, completion_ids=c) for p, c in zip(prompts, completions, strict=True)]
    for budget in (1, 1000):
        assert train_sft.held_out_loss(policy, shown, budget) == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_sft_from_scratch_learns(tmp_path):
    changes = {"iterations": 40, "minibatch_size": 32, "demonstrations": 2000, "learning_rate": 3e-3}
    args = small(train_sft, tmp_path, from_scratch=True, eval_problems=60, **changes)
    values = scalars(run(train_sft.main, args))
    assert values["loss/policy"][0][1] > 4.0  # near log(103): nothing of the shipped weights was read
    assert values["eval/loss"][-1][1] < 2.0 < 4.0 < values["eval/loss"][0][1]


# ---- Interrupted and resumed -----------------------------------------------------------------------------------------


class StopAtIterationThree(plumbing.runs.StopSignal):
    """As if Ctrl-C came during the third iteration: a run asks twice per iteration."""

    asked = 0

    @property
    def number(self):
        self.asked += 1
        return signal.SIGINT if self.asked >= 5 else 0

    @number.setter
    def number(self, value):
        pass


@pytest.mark.parametrize(
    "script, lost_work",
    [
        slow("grpo", True),
        slow("grpo-many-updates", False),
        ("grpo-many-updates", True),
        slow("kimi", True),
        slow("pg", True),
        slow("ppo", True),
        slow("sft", True),
    ],
)
def test_an_interrupted_run_equals_the_uninterrupted_one(script, lost_work, tmp_path, monkeypatch):
    """Catches: a resume that loses optimizer, data cursor, sampler ledger or a seed. Weights agree to the byte, events
    (not times and memory) to the bit, no step missing or twice, also if the newest checkpoint is older than events."""
    modules = {"kimi": train_kimi, "pg": train_pg, "ppo": train_ppo, "sft": train_sft}
    module, changes = modules.get(script, train_grpo), {"iterations": 4, "eval_every": 3, "save_every": 2}
    if script == "sft":
        changes |= {"minibatch_size": 16, "demonstrations": 200, "max_new_tokens": 24, "eval_problems": 12}
    if script == "kimi":
        changes |= {"problem_sampling": "prioritized", "length_weight": 0.2, "length_reward_start": 2}
    if script == "grpo-many-updates":
        changes |= {"update_epochs": 2, "minibatch_size": 8, "kl_coef": 0.05, "dynamic_sampling": True}
    args = (small if script == "sft" else quick)(module, tmp_path, **changes)
    whole = run(module.main, args)

    with monkeypatch.context() as patched:
        patched.setattr(plumbing.runs, "StopSignal", StopAtIterationThree)
        with pytest.raises(SystemExit) as stopped:
            module.main(args)
    assert stopped.value.code == 130
    (broken,) = set(tmp_path.iterdir()) - {whole}
    if lost_work:
        shutil.rmtree(broken / "checkpoints" / "step_000003")
    run(module.main, parse_args(module.Args, ["--resume", str(broken)]))

    assert weights(whole / "final") == weights(broken / "final")
    assert_same_events(whole, broken)
    states = [torch.load(d / "checkpoints/step_000004/trainer.pt", weights_only=True) for d in (whole, broken)]
    assert states[0]["stateful"]["sampler"] == states[1]["stateful"]["sampler"]
    assert states[0]["progress"] == states[1]["progress"]


def copied(saved_run: Path, root: Path) -> Path:
    return shutil.copytree(saved_run, root / "runs" / saved_run.name)


def test_a_damaged_checkpoint_is_seen_and_the_one_before_it_taken(saved_run, tmp_path, capsys):
    run_dir = copied(saved_run, tmp_path)
    newest, older = (run_dir / "checkpoints" / f"step_00000{i}" for i in (4, 2))
    for name in ("model.safetensors", "trainer.pt"):
        content = (newest / name).read_bytes()
        middle = len(content) // 2
        for damaged in (content[:middle], content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]):
            (newest / name).write_bytes(damaged)
            assert load_checkpoint(str(run_dir))["model"] == str(older)
            assert f"{newest} is damaged" in capsys.readouterr().err
        (newest / name).write_bytes(content)
    assert load_checkpoint(str(run_dir))["model"] == str(newest)
    whole = weights(run_dir / "final")
    (newest / "trainer.pt").write_bytes(b"")
    train_grpo.main(parse_args(train_grpo.Args, ["--resume", str(run_dir)]))  # steps 3 and 4 are done again
    assert weights(run_dir / "final") == whole
    assert [x for x, _ in scalars(run_dir)["reward/total"]] == [16, 32, 48, 64]
    for directory in (newest, older):
        (directory / "trainer.pt").unlink()
    with pytest.raises(SystemExit):
        load_checkpoint(str(run_dir))
    assert "none of its checkpoints is whole" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_starts_over_in_place(saved_run, tmp_path, capsys):
    run_dir = copied(saved_run, tmp_path)
    shutil.rmtree(run_dir / "checkpoints")
    finished = parse_args(train_grpo.Args, ["--resume", str(run_dir), "--iterations", "2"])
    assert "kept no checkpoint (--save-every 0); start a new run" in refusal(train_grpo.main, finished, capsys)
    shutil.rmtree(run_dir / "final")
    train_grpo.main(finished)
    assert "starting over" in capsys.readouterr().err
    assert weights(run_dir / "final") == weights(saved_run / "checkpoints" / "step_000002")
    assert [x for x, _ in scalars(run_dir)["reward/total"]] == [16, 32]


def test_resume_refuses_other_arguments_by_name(saved_run, tmp_path, capsys):
    run_dir = saved_run
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    for flag, value in (("--learning-rate", "1e-3"), ("--group-size", "8"), ("--seed", "7"), ("--model", "elsewhere")):
        with pytest.raises(SystemExit) as stopped:
            parse_args(train_grpo.Args, ["--resume", str(run_dir), flag, value])
        assert stopped.value.code == 2 and f"{flag} {value}" in capsys.readouterr().err.replace("0.001", "1e-3")
    allowed = ["--iterations", "9", "--eval-every", "1", "--save-every", "1", "--run-root", "x", "--device", "auto"]
    allowed += ["--micro-batch-tokens", "64", "--gradient-checkpointing"]  # after running out of memory
    args = parse_args(train_grpo.Args, [f"--resume={run_dir}", *allowed])
    assert args.iterations == 9 and args.prompts_per_step == 4 and args.run.resume == str(run_dir)
    assert args.optimization.micro_batch_tokens == 64
    with pytest.raises(SystemExit):
        parse_args(train_grpo.Args, ["--resume", str(tmp_path / "nowhere")])
    assert "no run directory" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_a_run_of_the_old_version_is_refused_in_one_line(saved_run, tmp_path, capsys):
    """Its checkpoints are whole but hold other names."""
    run_dir = copied(saved_run, tmp_path)
    flags = json.loads((run_dir / "args.json").read_text())
    del flags["run_name"]  # a flag that is new
    (run_dir / "args.json").write_text(json.dumps(flags))
    for checkpoint in (run_dir / "checkpoints").iterdir():
        state = torch.load(checkpoint / "trainer.pt", weights_only=True)
        old = {"iteration": state["progress"]["iteration"], "x": 64, "masters": [], "before": {}, "scores": {}}
        torch.save(old | state["stateful"], checkpoint / "trainer.pt")
        (checkpoint / "digests.json").write_text(json.dumps(plumbing.runs.file_digests(checkpoint)))
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    error = refusal(train_grpo.main, parse_args(train_grpo.Args, ["--resume", str(run_dir)]), capsys)
    assert f"--resume {run_dir}: written by an older version" in error
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


# ---- The run's object ------------------------------------------------------------------------------------------------


def without_the_runs_statements(script) -> str:
    """The script's source without the statements that call a method of `run`."""

    class Remover(ast.NodeTransformer):
        removed = 0

        def visit_Expr(self, node):
            function = getattr(node.value, "func", None)
            if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
                if function.value.id == "run":
                    self.removed += 1
                    return None
            return node

    remover = Remover()
    source = ast.unparse(remover.visit(ast.parse(Path(script.__file__).read_text())))
    assert remover.removed >= 3  # restore, checkpoint, finish
    return source


@pytest.mark.parametrize(
    "script",
    [train_grpo, *map(slow, (train_pg, train_ppo, train_kimi, train_sft, train_dpo, train_rm))],
    ids=lambda module: module.__name__,
)
def test_a_script_learns_the_same_without_the_runs_statements(script, tmp_path, monkeypatch):
    """Catches: mathematics in the run's object. Without it, evaluation scores and weights must stay the same."""
    (tmp_path / "short.py").write_text(without_the_runs_statements(script))
    spec = importlib.util.spec_from_file_location("short", tmp_path / "short.py")
    short = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "short", short)
    spec.loader.exec_module(short)

    results = []
    for module in (script, short):
        scores, optimizers = [], []

        class Remembering(common.MasterAdamW):
            def __init__(self, *args, optimizers=optimizers, **options):
                super().__init__(*args, **options)
                optimizers.append((self, [master.detach().clone() for master in self.masters]))

        evaluation = getattr(module, "evaluate_policy", None)
        with monkeypatch.context() as patched:
            patched.setattr(common, "MasterAdamW", Remembering)
            if evaluation is not None:
                patched.setattr(module, "evaluate_policy", lambda *a, f=evaluation, s=scores: s.append(f(*a)) or s[-1])
            flags = {"iterations": 2, "learning_rate": 1e-3, "warmup_iterations": 0}
            rl = script in (train_grpo, train_pg, train_ppo, train_kimi)
            module.main((quick if rl else small)(script, tmp_path / "runs" / module.__name__, eval_problems=6, **flags))
        for optimizer, start in optimizers:
            assert not any(map(torch.equal, optimizer.masters, start)), "nothing learned"
        results.append((scores, [master for optimizer, _ in optimizers for master in optimizer.masters]))
    (scores, masters), (short_scores, short_masters) = results
    assert scores == short_scores and all(map(torch.equal, masters, short_masters))
    assert script is train_rm or (len(scores) >= 2 and scores[0] != scores[-1])
    assert not list((tmp_path / "runs" / "short").glob("*/final"))  # the statements were really removed


def test_a_runs_object_is_small(saved_run, tmp_path):
    """Its public names are all that a reader of a script must know of it."""
    args = quick(train_grpo, tmp_path, iterations=4, resume=str(copied(saved_run, tmp_path)))
    names = {name for name in dir(Run(args, None)) if not name.startswith("_")}
    assert {"dir", "writer", "start_from", "progress", "restore", "checkpoint", "finish"} <= names
    assert len(names) <= 8


def test_a_checkpoint_of_other_names_is_refused_in_one_line(saved_run, tmp_path, capsys):
    """Catches: a fork with an additional critic that resumes a run and silently starts the critic afresh."""
    args = quick(train_grpo, tmp_path, iterations=4, resume=str(copied(saved_run, tmp_path)))
    error = refusal(lambda args: Run(args, None).restore(optimizer=None, sampler=None, critic=None), args, capsys)
    assert "its checkpoint holds optimizer, sampler; this script needs critic, optimizer, sampler" in error


def test_a_run_keeps_its_scripts_source(saved_run, tmp_path, capsys):
    assert (saved_run / "train_grpo.py").read_bytes() == Path("train_grpo.py").read_bytes()
    script, kept = tmp_path / "train_mine.py", tmp_path / "run"
    kept.mkdir()
    for iteration, text in enumerate(("first", "first", "second")):
        script.write_text(text)
        plumbing.runs.keep_source(script, kept, iteration)
        assert ("train_mine.py has changed" in capsys.readouterr().err) == (text == "second")
    assert {path.name: path.read_text() for path in kept.iterdir()} == {
        "train_mine.py": "first",
        "train_mine_from_000002.py": "second",
    }


def test_an_untracked_file_makes_the_commit_dirty(learned, tmp_path):
    """Catches: a run of a new, untracked script logged under a commit that doesn't have it."""
    logged = texts(learned[0], "hyperparameters")[0]
    assert re.search(r"git commit: ([0-9a-f]{40}(-dirty)?|unknown)$", logged.strip())
    assert plumbing.runs.git_commit(tmp_path) == "unknown"
    (tmp_path / "script.py").touch()
    user = "-c user.name=test -c user.email=test@example.org"
    command = f"git init -q . && git add script.py && git {user} commit -q -m first"
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    clean = plumbing.runs.git_commit(tmp_path)
    assert len(clean) == 40 and int(clean, 16)
    (tmp_path / "train_mine.py").touch()
    assert plumbing.runs.git_commit(tmp_path) == clean + "-dirty"
    (tmp_path / "train_mine.py").unlink()
    (tmp_path / "script.py").write_text("changed")
    assert plumbing.runs.git_commit(tmp_path) == clean + "-dirty"


def test_a_run_may_have_a_name(saved_run, tmp_path, capsys):
    """A name that is taken is refused before anything is written; a resumed run keeps its name."""
    root = tmp_path / "runs"
    assert parse_args(train_grpo.Args, ["--run-name", "mine"]).run.run_name == "mine"
    args = quick(train_grpo, root, run_name="mine", iterations=1, save_every=1)
    assert run(train_grpo.main, args) == root / "mine"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert f"--run-name mine: {root / 'mine'} exists" in refusal(train_grpo.main, args, capsys)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    train_grpo.main(parse_args(train_grpo.Args, ["--resume", str(root / "mine"), "--iterations", "2"]))
    assert [x for x, _ in scalars(root / "mine")["reward/total"]] == [16, 32]
    assert [path.name for path in root.iterdir()] == ["mine"]


def test_a_run_from_another_runs_result_is_not_called_final(saved_run, tmp_path):
    args = small(train_kimi, tmp_path, model=str(saved_run / "final"))
    script, data, model, seed, _ = run_directory(args).name.split("__")
    assert (script, data, model, seed) == ("train_kimi", "arithmetic", "train_grpo-final", "s1")


def test_built_in_models_are_found_from_any_directory(tmp_path, monkeypatch):
    """A directory of that name in the working directory comes first."""
    monkeypatch.chdir(tmp_path)
    assert Path(common.resolve_model(EMBEDDED)).samefile(Path(common.__file__).parent / EMBEDDED)
    assert common.resolve_model("models/none") == "models/none"
    policy, tokenizer = common.load_policy(EMBEDDED), common.load_tokenizer(EMBEDDED)
    assert policy.config.vocab_size == len(tokenizer) == common.load_config(EMBEDDED).vocab_size
    assert common.load_value_model(EMBEDDED).config.num_labels == 1
    (tmp_path / EMBEDDED).mkdir(parents=True)
    assert common.resolve_model(EMBEDDED) == EMBEDDED


# ---- Updates ---------------------------------------------------------------------------------------------------------


def count_steps(monkeypatch) -> dict[str, int]:
    calls = {"steps": 0, "clips": 0, "loads": 0, "passes": 0, "rows": 0}

    def counting(name, function):
        def wrapped(*args, **kwargs):
            calls[name] += 1
            if name == "passes":
                calls["rows"] += len(args[2])
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(common.MasterAdamW, "step", counting("steps", common.MasterAdamW.step))
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", counting("clips", clip))
    monkeypatch.setattr(common, "load_policy", counting("loads", common.load_policy))
    monkeypatch.setattr(common, "completion_logprobs", counting("passes", common.completion_logprobs))
    return calls


def test_one_clip_and_one_step_for_every_minibatch(tmp_path, monkeypatch):
    """Catches: clip or optimizer step inside the accumulation. 3 epochs x 2 minibatches = 6, whatever the number of
    micro-batches. And kl_coef 0 loads no reference."""
    calls = count_steps(monkeypatch)
    changes = {"update_epochs": 3, "minibatch_size": 8, "micro_batch_tokens": 60}
    run_dir = run(train_grpo.main, quick(train_grpo, tmp_path, iterations=1, **changes))
    assert calls["steps"] == calls["clips"] == 6 and calls["loads"] == 1
    assert calls["passes"] > 12
    ratios = [value for _, value in scalars(run_dir)["loss/ratio_max"]]
    assert all(ratio > 1.0 for ratio in ratios)  # Catches: old logprobs recomputed in every minibatch


def test_one_update_takes_no_extra_pass(tmp_path, monkeypatch):
    """A single update computes its old logprobs anyway; a reference takes one pass of its own."""
    calls = count_steps(monkeypatch)
    run(train_grpo.main, quick(train_grpo, tmp_path, iterations=1))
    passes = calls["passes"]
    assert calls["rows"] == 16 and calls["steps"] == 1 and passes <= 2  # rows without an advantage go separately
    run(train_grpo.main, quick(train_grpo, tmp_path, iterations=1, kl_coef=0.1))
    assert calls["rows"] == (1 + 2) * 16 and calls["passes"] == passes + 2


def test_rows_without_an_advantage_are_only_passed_forward(tmp_path, monkeypatch):
    """Skipping their backward pass changes nothing: gradients and metrics are those of a backward pass through all
    rows. With a KL every row has a gradient."""
    gradients, backward_rows, step, batches = [], [], common.MasterAdamW.step, common.micro_batches
    logprobs = common.completion_logprobs

    def remembering_step(optimizer, closure=None):
        gradients[-1].append([master.grad.clone() for master in optimizer.masters])
        return step(optimizer, closure)

    def remembering_logprobs(model, rollout, rows, *args):
        backward_rows[-1] += len(rows) * torch.is_grad_enabled()
        return logprobs(model, rollout, rows, *args)

    def all_together(rollout, rows, max_tokens, trains=None):
        """One slice, whose first row has a gradient, so that all are computed with one."""
        return [sorted(rows, key=lambda row: trains is None or not trains[row])]

    monkeypatch.setattr(common.MasterAdamW, "step", remembering_step)
    monkeypatch.setattr(common, "completion_logprobs", remembering_logprobs)
    logged = []
    for kl_coef, micro_batches in ((0.0, batches), (0.0, all_together), (0.1, batches)):
        monkeypatch.setattr(common, "micro_batches", micro_batches)
        gradients.append([])
        backward_rows.append(0)
        args = quick(train_grpo, tmp_path, iterations=1, kl_coef=kl_coef, temperature=0.7, prompts_per_step=8)
        logged.append(scalars(run(train_grpo.main, args)))
    assert 0 < backward_rows[0] < backward_rows[1] == backward_rows[2] == 32
    for ours, theirs in zip(gradients[0], gradients[1], strict=True):
        assert all((a - b).abs().max() < 1e-6 for a, b in zip(ours, theirs, strict=True))
    for tag in logged[0]:
        if tag.startswith(("loss/", "rollout/l")):
            ours, theirs = ([value for _, value in values[tag]] for values in logged[:2])
            assert ours == pytest.approx(theirs, abs=1e-5), tag


def test_a_batch_without_any_advantage_makes_no_step(saved_run, tmp_path):
    """Not even from Adam's momentum, which the saved run's updates have built up. From then on the only reward is the
    language reward, which is 1 for every chain, because a chain has no words."""
    run_dir = copied(saved_run, tmp_path)
    changes = {"iterations": 6, "resume": str(run_dir), "save_every": 0}
    changes |= {"accuracy_weight": 0.0, "format_weight": 0.0, "language_weight": 1.0}
    values = scalars(run(train_grpo.main, quick(train_grpo, tmp_path, **changes)))
    assert values["loss/grad_norm"][3][1] > 0 and [v for _, v in values["loss/grad_norm"][4:]] == [0.0, 0.0]
    assert weights(run_dir / "final") == weights(run_dir / "checkpoints" / "step_000004")


def test_the_reference_is_another_model_and_never_moves(tmp_path, monkeypatch):
    """Catches: a reference that is trainable, in train mode, or the policy itself."""
    loaded = []
    load = common.load_policy

    def remembering(*args, **kwargs):
        model = load(*args, **kwargs)
        loaded.append((model, [p.detach().clone() for p in model.parameters()]))
        return model

    monkeypatch.setattr(common, "load_policy", remembering)
    run_dir = run(train_grpo.main, quick(train_grpo, tmp_path, iterations=2, kl_coef=0.1, learning_rate=1e-3))
    (policy, at_first), (ref, ref_at_first) = loaded
    assert all(torch.equal(a, b) for a, b in zip(ref.parameters(), ref_at_first, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(policy.parameters(), at_first, strict=True))
    assert not ref.training and not any(p.requires_grad for p in ref.parameters())
    kl = [value for _, value in scalars(run_dir)["loss/kl"]]
    assert abs(kl[0]) < 1e-6 < kl[1]


def test_temperature_is_in_every_logprob(tmp_path):
    """Catches: a temperature missing from some logprobs: at 0.5 too the sampler and the trainer agree, the ratio of the
    first of several updates is 1, and the KL to the reference, still the same model, is 0."""
    args = quick(train_grpo, tmp_path, iterations=1, temperature=0.5, update_epochs=2, learning_rate=1e-12, kl_coef=0.1)
    values = scalars(run(train_grpo.main, args))
    assert values["rollout/logprob_gap_max"][0][1] < 1e-4
    assert values["loss/ratio_max"][0][1] == pytest.approx(1.0, abs=1e-5)
    assert abs(values["loss/kl"][0][1]) < 1e-6


def test_pad_may_be_eos(tmp_path):
    """Catches: masks from `ids != pad` where pad == eos: then the EOS would never be trained."""
    finals = []
    for name in ("pad", "pad-is-eos"):
        model, tokenizer = common.load_policy(EMBEDDED), common.load_tokenizer(EMBEDDED)
        if name == "pad-is-eos":
            tokenizer.pad_token = tokenizer.eos_token
            model.config.pad_token_id = tokenizer.eos_token_id
        save_model(tmp_path / name, model, tokenizer)
        args = quick(train_grpo, tmp_path / "runs", model=str(tmp_path / name), iterations=1)
        finals.append(run(train_grpo.main, args))
    assert weights(finals[0] / "final") == weights(finals[1] / "final") != weights(tmp_path / "pad")


def test_a_model_with_dropout_runs_without_it(tmp_path):
    """Catches: dropout on in the first update (p = 0.5 would move every ratio away from 1)."""
    _, tokenizer = common.load_policy(EMBEDDED), common.load_tokenizer(EMBEDDED)
    model = make_model("gpt2", vocab_size=len(tokenizer), resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    save_model(tmp_path / "dropout", model, tokenizer)
    assert not common.load_policy(str(tmp_path / "dropout")).training
    changes = {"model": str(tmp_path / "dropout"), "update_epochs": 2, "learning_rate": 1e-12, "max_new_tokens": 10}
    values = scalars(run(train_grpo.main, quick(train_grpo, tmp_path / "runs", iterations=1, **changes)))
    assert values["loss/ratio_max"][0][1] == pytest.approx(1.0, abs=1e-5)


def test_training_uses_the_sampled_ids(tmp_path, monkeypatch):
    """Catches: training on decoded and re-encoded text. The batch whose logprobs are computed holds the very tensors
    that were sampled, though the text would encode to other ids (an unknown token is dropped)."""
    sampled, trained = [], []
    sample, logprobs = common.sample_groups, common.completion_logprobs

    def sampling(*args, **kwargs):
        rollout = sample(*args, **kwargs)
        if rollout.group_size == 8:  # a training batch
            rollout.completion_ids[0, 0] = 2  # <unk>
            sampled.append(rollout.completion_ids.clone())
        return rollout

    def training(model, rollout, *args):
        trained.append(rollout.completion_ids.clone())
        return logprobs(model, rollout, *args)

    monkeypatch.setattr(common, "sample_groups", sampling)
    monkeypatch.setattr(common, "completion_logprobs", training)
    run(train_grpo.main, quick(train_grpo, tmp_path, iterations=2, group_size=8, prompts_per_step=2))
    assert len(sampled) == 2
    order = [[torch.equal(ids, other) for other in sampled].index(True) for ids in trained]
    assert order == sorted(order) and set(order) == {0, 1}


@pytest.fixture(scope="module")
def one_update(tmp_path_factory) -> tuple[dict, dict]:
    """The values that a run of one update over several micro-batches logs, and the same values computed separately, in
    one pass before the update. Noise on the sampler's logprobs makes the gap more than rounding."""
    seen, patch = {}, pytest.MonkeyPatch()
    sample, group_advantages = common.sample_groups, train_grpo.group_advantages

    def sampling(model, *args, **kwargs):
        rollout = sample(model, *args, **kwargs)
        rollout.sampler_logprobs += torch.randn(rollout.mask.shape) * rollout.mask
        seen.update(model=model, rollout=rollout)
        return rollout

    def advantages(rewards, normalize_std):
        A, rollout = group_advantages(rewards, normalize_std), seen["rollout"]
        logprobs, entropy = completion_logprobs(seen["model"], rollout, list(range(16)))
        real, gap = rollout.mask.sum(), (rollout.sampler_logprobs - logprobs).abs()[rollout.mask]
        gradients = torch.autograd.grad((-A.view(16, 1) * logprobs).sum() / real, list(seen["model"].parameters()))
        seen["loss/policy"] = (-A.view(16, 1) * rollout.mask).sum() / real  # at ratio 1
        seen["loss/grad_norm"] = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        seen["loss/entropy"] = entropy.sum() / real
        seen["rollout/logprob_gap_mean"], seen["rollout/logprob_gap_max"] = gap.mean(), gap.max()
        seen["rollout/length_mean"] = real / 16
        return A

    patch.setattr(common, "sample_groups", sampling)
    patch.setattr(train_grpo, "group_advantages", advantages)
    flags = {"micro_batch_tokens": 70, "prompts_per_step": 2, "group_size": 8, "loss_norm": "token", "iterations": 1}
    try:
        values = scalars(run(train_grpo.main, quick(train_grpo, tmp_path_factory.mktemp("one"), **flags)))
    finally:
        patch.undo()
    return values, seen


@pytest.mark.parametrize("tag", ["loss/entropy", "rollout/length_mean", "rollout/logprob_gap_mean"])
def test_logged_means_are_token_weighted_over_the_whole_iteration(tag, one_update):
    """Catches: metrics from the last micro-batch only, entropy divided twice, means over padding."""
    values, seen = one_update
    assert values[tag][0][1] == pytest.approx(seen[tag].item(), rel=1e-4)


@pytest.mark.parametrize(
    "tag", ["rollout/logprob_gap_mean", "rollout/logprob_gap_max", "loss/policy", "loss/grad_norm"]
)
def test_one_update_needs_no_old_logprobs(tag, one_update):
    """If old_logprobs is None, the update's own logprobs replace them: gaps, loss and gradient are those of a pass
    before the update."""
    values, seen = one_update
    assert abs(seen[tag]) > 1e-3 and values[tag][0][1] == pytest.approx(seen[tag].item(), rel=1e-4, abs=1e-6)


def test_metrics():
    metrics = Metrics()
    metrics.add({"a": 1.0, "b_max": 3.0}, weight=1)
    metrics.add({"a": 4.0, "b_max": 2.0, "c": 5.0}, weight=2)
    metrics.add({"a": 99.0}, weight=0)
    metrics.add({"d": 1.0})
    metrics.add({"d": 2.0})
    assert metrics.means() == {"a": 3.0, "b_max": 3.0, "c": 5.0, "d": 1.5}


def test_only_names_that_end_in_max_after_an_underscore_are_maxima():
    """Catches: a metric called "climax" or "softmax" that shows its largest value instead of its mean."""
    metrics = Metrics()
    names = "climax", "loss/softmax", "max", "max_x", "b-max", "loss/ratio_max", "_max"
    for value in (1.0, 3.0):
        metrics.add(dict.fromkeys(names, value))
    assert metrics.means() == dict.fromkeys(names, 2.0) | {"loss/ratio_max": 3.0, "_max": 3.0}


@pytest.mark.parametrize("weights", [(3, None), (None, 3), (None, 0)])
def test_a_name_with_and_without_a_weight_is_refused(weights):
    """Catches: a mean in which one token and one iteration weigh the same."""
    metrics = Metrics()
    metrics.add({"a": 1.0, "b_max": 1.0}, weights[0])
    metrics.add({"b_max": 2.0}, weights[1])  # a maximum has no weights
    with pytest.raises(ValueError, match="a was added with a weight and without one"):
        metrics.add({"a": 2.0}, weights[1])


def test_reward_components_are_logged_apart(tmp_path):
    """Catches: a format reward that hides low accuracy. Accuracy is logged by itself, whatever the weights."""
    args = quick(train_grpo, tmp_path, iterations=1, accuracy_weight=0.5, format_weight=5.0)
    values = scalars(run(train_grpo.main, args))
    accuracy, form = values["reward/accuracy"][0][1], values["reward/format"][0][1]
    assert 0 <= accuracy <= 1 and 0 <= form <= 1
    assert values["reward/total"][0][1] == pytest.approx(0.5 * accuracy + 5.0 * form)


def test_dynamic_sampling_replaces_groups_that_teach_nothing(tmp_path, monkeypatch):
    """At most --max-sampling-rounds batches an iteration, all of them counted on the x-axis. No group without variance
    is trained on, and there are as many groups as asked for unless the limit was reached."""
    trained, loss = [], train_grpo.grpo_loss

    def remembering(logprobs, old, ref, advantages, *args, **kwargs):
        trained.append(advantages)
        return loss(logprobs, old, ref, advantages, *args, **kwargs)

    monkeypatch.setattr(train_grpo, "grpo_loss", remembering)
    changes = {"dynamic_sampling": True, "max_sampling_rounds": 3, "prompts_per_step": 4, "temperature": 0.8}
    values = scalars(run(train_grpo.main, quick(train_grpo, tmp_path, iterations=6, **changes)))
    steps = [x for x, _ in values["loss/policy"]]
    rounds = [(b - a) // 16 for a, b in zip([0, *steps[:-1]], steps, strict=True)]
    assert all(1 <= n <= 3 for n in rounds) and max(rounds) > min(rounds)
    assert len(trained) == 6
    for advantages, n in zip(trained, rounds, strict=True):
        groups = advantages[:, 0].view(-1, 4)
        assert (groups.amax(1) > groups.amin(1)).all() and groups.mean(1).abs().max() < 1e-5
        assert len(groups) == 4 or n == 3


def test_small_steps_are_not_lost_in_bf16():
    """Catches: updates of 1e-6 lost in bf16 weights. Fifty steps move a bf16 model's masters like fp32 weights."""
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model("llama").to(torch.bfloat16).to(dtype)  # equal start
        optimizer = common.MasterAdamW(model, lr=1e-6)
        start = [master.detach().clone() for master in optimizer.masters]
        rollout = sample_groups(make_model("llama"), [[5, 6, 7]], 4, 8)
        for _ in range(50):
            logprobs, _ = completion_logprobs(model, rollout, list(range(4)))
            (-logprobs.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        moved[dtype] = torch.cat([(m - s).flatten() for m, s in zip(optimizer.masters, start, strict=True)])
        assert all(torch.equal(w, m.to(dtype)) for w, m in zip(optimizer.weights, optimizer.masters, strict=True))
    expected, got = moved[torch.float32], moved[torch.bfloat16]
    assert (got - expected).norm() < 0.35 * expected.norm()
    assert got.norm() == pytest.approx(expected.norm().item(), rel=0.05)
    assert expected.abs().max() > 4e-5  # nearly 50 steps of 1e-6, far under what bf16 resolves


def test_masters_collect_gradients_over_micro_batches_in_fp32():
    model = make_model("llama").to(torch.bfloat16)
    optimizer = common.MasterAdamW(model, lr=1e-3)
    rollout = sample_groups(make_model("llama"), [[5, 6, 7]], 4, 8)
    for row in range(4):
        completion_logprobs(model, rollout, [row])[0].sum().backward()
    assert all(w.grad is None for w in optimizer.weights)
    assert all(m.grad.dtype == torch.float32 for m in optimizer.masters)
    optimizer.zero_grad()
    assert all(m.grad is None for m in optimizer.masters)


def test_a_bf16_checkpoint_keeps_its_masters(tmp_path):
    run_dir = run(train_grpo.main, quick(train_grpo, tmp_path, iterations=2, dtype="bfloat16", save_every=2))
    state = torch.load(run_dir / "checkpoints/step_000002/trainer.pt", weights_only=True)["stateful"]["optimizer"]
    policy = common.load_policy(str(run_dir / "final"), dtype=torch.bfloat16)
    optimizer = common.MasterAdamW(policy, lr=1.0)
    assert state["masters"] and all(m.dtype == torch.float32 for m in state["masters"])
    optimizer.load_state_dict(state)
    assert all(torch.equal(master, saved) for master, saved in zip(optimizer.masters, state["masters"], strict=True))
    for weight, master in zip(optimizer.weights, optimizer.masters, strict=True):
        assert torch.equal(weight, master.bfloat16())


def test_a_float32_run_does_not_go_on_rounded(capsys):
    """Catches: a run moved from a CPU to a GPU whose masters silently begin at weights rounded to 16 bits."""
    state = common.MasterAdamW(make_model("llama"), lr=1e-3).state_dict()
    rounded = common.MasterAdamW(make_model("llama").to(torch.bfloat16), lr=1e-3)
    with pytest.raises(SystemExit):
        rounded.load_state_dict(state)
    assert "go on with --dtype float32" in capsys.readouterr().err


OFFLOADED = [(train_grpo, "bfloat16"), slow(train_pg, "float32")]  # PG: a critic too


@pytest.mark.parametrize(("script", "dtype"), OFFLOADED, ids=lambda value: getattr(value, "__name__", value))
def test_an_offloaded_optimizer_changes_no_byte(script, dtype, tmp_path):
    """Catches: some micro-batches' gradients lost on the way, masters rounded differently. Resumed with and without it,
    a run reaches the same weights."""
    flags = {"iterations": 3, "micro_batch_tokens": 200, "save_every": 1, "dtype": dtype, "keep_checkpoints": 3}
    runs = [run(script.main, quick(script, tmp_path, offload_optimizer=offload, **flags)) for offload in (False, True)]
    assert weights(runs[0] / "final") == weights(runs[1] / "final")
    assert weights(runs[0] / "final") != weights(runs[0] / "checkpoints/step_000001")
    for run_dir, flag in zip(runs, ("--offload-optimizer", "--no-offload-optimizer"), strict=True):
        expected = weights(run_dir / "final")
        for done in ("checkpoints/step_000002", "checkpoints/step_000003", "final"):
            shutil.rmtree(run_dir / done)
        run(script.main, parse_args(script.Args, ["--resume", str(run_dir), flag]))
        assert weights(run_dir / "final") == expected


def test_offloading_beyond_the_host_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(Path, "read_text", lambda path: "MemTotal: 9 kB\nMemAvailable:  1000 kB\n")
    common.check_host_memory(64_000)
    with pytest.raises(SystemExit) as stopped:
        common.check_host_memory(64_001)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: --offload-optimizer: needs 0.0 GB of host memory")


class SGD(common.Masters, torch.optim.SGD):
    pass


def test_another_optimizer_has_masters_too(tmp_path):
    """SGD with momentum trains a bf16 model in steps that bf16 can't resolve, and resumes from a checkpoint to the same
    bits."""
    model = common.load_policy(EMBEDDED, dtype=torch.bfloat16)
    optimizer = SGD(model, lr=1e-6, momentum=0.5)
    start = [master.detach().clone() for master in optimizer.masters]
    rollout = make_rollout([[5, 6, 7]], [[10, 11, 12], [13, 14]], group_size=2)

    def train(policy, optimizer, steps: int) -> float:
        for _ in range(steps):
            loss = -completion_logprobs(policy, rollout, [0, 1])[0].sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    train(model, optimizer, 3)
    moved = [(master - before).abs().max() for master, before in zip(optimizer.masters, start, strict=True)]
    assert all(0 < change < 1e-3 for change in moved)
    assert any(torch.equal(weight, before.bfloat16()) for weight, before in zip(optimizer.weights, start, strict=True))
    common.set_learning_rate(optimizer, 1e-3)
    assert train(model, optimizer, 5) > train(model, optimizer, 5)
    save_model(tmp_path / "model", model, common.load_tokenizer(EMBEDDED), {"optimizer": optimizer.state_dict()})

    again = common.load_policy(str(tmp_path / "model"), dtype=torch.bfloat16)
    resumed = SGD(again, lr=1.0, momentum=0.5)
    resumed.load_state_dict(torch.load(tmp_path / "model" / "trainer.pt", weights_only=True)["optimizer"])
    assert resumed.param_groups[0]["lr"] == 1e-3
    for policy, its_optimizer in ((model, optimizer), (again, resumed)):
        train(policy, its_optimizer, 2)
    assert all(map(torch.equal, optimizer.masters, resumed.masters))
    assert all(map(torch.equal, optimizer.weights, resumed.weights))
