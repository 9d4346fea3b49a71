"""Whole runs of the train scripts: they learn, log what they say, train on what was sampled, and print what a user
reads at the end."""

import inspect
from pathlib import Path

import pytest
import torch
from conftest import EMBEDDED, make_model, remember, rl_args, run, scalars, short_args, slow_case, texts, weights
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForSequenceClassification

import common
import train_grpo
import train_kimi
import train_pg
import train_ppo
import train_sft
from common import completion_logprobs, make_rollout, token_weights
from data import Demonstration
from plumbing import logs
from plumbing.evaluation import comparison_table
from plumbing.runs import save_model

RL_SCRIPTS = pytest.mark.parametrize(
    "script",
    [train_grpo, slow_case(train_pg), slow_case(train_ppo), slow_case(train_kimi)],
    ids=lambda module: module.__name__,
)

TAGS = """
    reward/total reward/accuracy reward/format reward/std_within_group reward/frac_all_right reward/frac_all_wrong
    rollout/length_mean rollout/length_max rollout/length_right rollout/length_wrong rollout/finished
    rollout/tokens_per_second rollout/logprob_gap_mean rollout/logprob_gap_max
    loss/policy loss/entropy loss/clip_low loss/clip_high loss/ratio_max loss/grad_norm loss/learning_rate
    eval/accuracy eval/accuracy_greedy eval/format eval/length eval/truncated eval/no_answer eval/pass_at_k
    eval/accuracy_difficulty_1 eval/accuracy_difficulty_6 eval/accuracy_greedy_difficulty_6
    time/sample time/reward time/logprobs time/update memory/peak_gb
""".split()


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
    reloaded = common.load_policy(str(run_dir / "final"), None)
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
    args = short_args(module, tmp_path, warmup_iterations=2, **shared, **changes)
    values = scalars(run(module.main, args))
    reward = [value for _, value in values["reward/total"]]
    assert sum(reward[-3:]) / 3 > sum(reward[:3]) / 3 + 0.12
    assert values["eval/accuracy"][-1][1] > values["eval/accuracy"][0][1] + 0.08
    assert max(gap for _, gap in values["rollout/logprob_gap_max"]) < 1e-4
    common_tags = {tag for tag in TAGS if tag not in ("loss/clip_low", "loss/clip_high", "loss/ratio_max")}
    assert not common_tags - set(values)
    assert ("loss/value" in values) == (name != "kimi")


def test_the_length_reward_starts_late_and_is_logged_apart(tmp_path):
    args = rl_args(train_kimi, tmp_path, iterations=3, length_weight=0.5, length_reward_start=2, learning_rate=1e-9)
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
    args = rl_args(script, tmp_path, iterations=2, max_new_tokens=12, **changes)
    values = {tag: [value for _, value in points] for tag, points in scalars(run(script.main, args)).items()}
    assert values["reward/language"] == [1.0, 1.0] and min(values["reward/overlong"]) < 0
    assert min(values["rollout/finished"]) < 1
    for i in range(2):
        parts = {name: values[f"reward/{name}"][i] for name in ("accuracy", "format", "language", "overlong")}
        expected = parts["accuracy"] + 0.2 * parts["format"] + 0.25 * parts["language"] + 0.5 * parts["overlong"]
        assert values["reward/total"][i] == pytest.approx(expected, abs=1e-6)
        assert parts["accuracy"] <= values["rollout/finished"][i]
    assert values["eval/reflection_words"] == [0.0, 0.0]


def test_reward_components_are_logged_apart(tmp_path):
    """Catches: a format reward that hides low accuracy. Accuracy is logged by itself, whatever the weights."""
    args = rl_args(train_grpo, tmp_path, iterations=1, accuracy_weight=0.5, format_weight=5.0)
    values = scalars(run(train_grpo.main, args))
    accuracy, form = values["reward/accuracy"][0][1], values["reward/format"][0][1]
    assert 0 <= accuracy <= 1 and 0 <= form <= 1
    assert values["reward/total"][0][1] == pytest.approx(0.5 * accuracy + 5.0 * form)


@RL_SCRIPTS
def test_masked_completions_teach_nothing(script, tmp_path):
    """If all are cut, no update moves the weights (Kimi's and PPO's regularisers are 0 at their anchors)."""
    options = {"truncated": "mask", "max_new_tokens": 4, "iterations": 1, "seed": 3}
    options |= {"kl_coef": 0.0} if script is train_ppo else {}
    run_dir = run(script.main, rl_args(script, tmp_path, **options))
    values = scalars(run_dir)
    assert values["rollout/finished"][0][1] == 0.0
    if script is train_kimi:  # its log-ratio to the anchor is rounding noise, which Adam scales up to its step of 5e-6
        before, after = (load_file(path / "model.safetensors") for path in (Path(EMBEDDED), run_dir / "final"))
        assert all((after[name] - before[name]).abs().max() < 2.5e-5 for name in before)
    else:
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
    values = scalars(run(script.main, rl_args(script, tmp_path, iterations=1)))
    assert gradients and all((gradient[:, given] == 0).all() for gradient in gradients)
    assert all((gradient[:, [0, 3, 4]] != 0).any() for gradient in gradients)
    lengths = mask[0].sum(1) - mask[0][:, given].sum(1)
    assert values["rollout/length_mean"][0][1] == pytest.approx(lengths.float().mean().item())


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
    values = scalars(run(script.main, rl_args(script, tmp_path, **flags)))
    model, right, form = (values[f"reward/{name}"][0][1] for name in ("model", "accuracy", "format"))
    assert values["reward/total"][0][1] == pytest.approx(2 * model + right + 0.2 * form, abs=1e-5) and model != 0
    assert "adds to the rules' rewards" in capsys.readouterr().out


def test_the_reward_model_alone(scorer, tmp_path):
    flags = {"iterations": 1, "reward_model": scorer, "accuracy_weight": 0.0, "format_weight": 0.0}
    values = scalars(run(train_grpo.main, rl_args(train_grpo, tmp_path, **flags)))
    assert values["reward/total"][0][1] == pytest.approx(values["reward/model"][0][1])
    assert values["reward/accuracy"][0][1] > 0  # logged, so that overoptimisation can be seen


def test_a_group_is_uniform_by_the_rules_alone(scorer, tmp_path, monkeypatch):
    """A model's scores are hardly ever equal within a group, so with them --dynamic-sampling would keep every group."""
    join, kept = common.join_groups, []
    monkeypatch.setattr(common, "join_groups", lambda parts, limit: kept.extend(parts) or join(parts, limit))
    flags = {"iterations": 1, "reward_model": scorer, "dynamic_sampling": True, "max_sampling_rounds": 1}
    args = rl_args(train_grpo, tmp_path, **flags, problems="arithmetic:5-6", prompts_per_step=16)
    run(train_grpo.main, args)
    ((groups, *_, rewards, scored),) = kept
    assert len(rewards) == 16 and 0 < len(groups) < 16
    assert train_grpo.is_uniform(rewards, scored).sum() < 16 - len(groups)  # texts that are equal have equal scores


def test_dynamic_sampling_replaces_groups_that_teach_nothing(tmp_path, monkeypatch):
    """At most --max-sampling-rounds batches an iteration, all of them counted on the x-axis. No group without variance
    is trained on, and there are as many groups as asked for unless the limit was reached."""
    calls = remember(monkeypatch, train_grpo, "grpo_loss")
    changes = {"dynamic_sampling": True, "max_sampling_rounds": 3, "prompts_per_step": 4, "temperature": 0.8}
    values = scalars(run(train_grpo.main, rl_args(train_grpo, tmp_path, iterations=6, **changes)))
    steps = [x for x, _ in values["loss/policy"]]
    rounds = [(b - a) // 16 for a, b in zip([0, *steps[:-1]], steps, strict=True)]
    assert all(1 <= n <= 3 for n in rounds) and max(rounds) > min(rounds)
    assert len(calls) == 6
    for (arguments, _), n in zip(calls, rounds, strict=True):
        groups = arguments["advantages"][:, 0].view(-1, 4)
        assert (groups.amax(1) > groups.amin(1)).all() and groups.mean(1).abs().max() < 1e-5
        assert len(groups) == 4 or n == 3


def test_ppo_scores_a_cut_completion_as_told(tmp_path, monkeypatch):
    calls = remember(monkeypatch, train_ppo, "shape_rewards")
    flags = {"iterations": 1, "update_epochs": 1, "kl_coef": 0.0, "max_new_tokens": 9, "missing_eos_score": -2.0}
    run(train_ppo.main, rl_args(train_ppo, tmp_path, **flags))
    scores, lengths = calls[0][0]["scores"], calls[0][0]["mask"].sum(1)
    assert (scores == -2.0).any() and (scores >= 0).any()
    assert (lengths[scores == -2.0] == 9).all()


def advantages_by_row(script, monkeypatch, args) -> tuple[common.Rollout, torch.Tensor, dict[int, torch.Tensor]]:
    """The one Rollout of a run, its rewards (B,), and each row's advantage as the loss got it, on its real tokens."""
    name, seen, rows, found = LOSSES[script], [], [], {}
    metrics, logprobs, loss = logs.add_rollout_metrics, common.completion_logprobs, getattr(script, name)

    def remember_rewards(m, rollout, rewards, *others):
        seen.append((rollout, rewards.flatten()))
        return metrics(m, rollout, rewards, *others)

    def remember_rows(model, rollout, micro, *others):
        rows[:] = micro
        return logprobs(model, rollout, micro, *others)

    def remember_advantages(*values, **others):
        advantages = inspect.signature(loss).bind(*values, **others).arguments["advantages"]
        found.update(zip(list(rows), advantages.clone(), strict=True))
        return loss(*values, **others)

    monkeypatch.setattr(logs, "add_rollout_metrics", remember_rewards)
    monkeypatch.setattr(common, "completion_logprobs", remember_rows)
    monkeypatch.setattr(script, name, remember_advantages)
    run(script.main, args)
    ((rollout, rewards),) = seen
    width = rollout.mask.shape[1]
    return rollout, rewards, {row: A.expand(width)[rollout.mask[row]] for row, A in sorted(found.items())}


@pytest.mark.parametrize("script", list(LOSSES), ids=lambda script: script.__name__)
def test_with_truncated_mask_cut_completions_have_no_advantage(script, tmp_path, monkeypatch):
    """Catches: completions that ended masked instead, or none masked."""
    args = rl_args(script, tmp_path, iterations=1, truncated="mask", max_new_tokens=12, prompts_per_step=8)
    rollout, _, advantages = advantages_by_row(script, monkeypatch, args)
    assert len(advantages) == 32 and 4 < rollout.finished.sum() < 28
    for row, A in advantages.items():
        assert rollout.finished[row] or not A.any()
    assert sum(A.any().item() for A in advantages.values()) > 4


@pytest.mark.parametrize("baseline", ["none", "batch-mean"])
def test_without_a_critic_the_advantage_is_the_return(baseline, tmp_path, monkeypatch):
    """Catches: a reward before or after the last token, or a baseline subtracted where none is wanted."""
    args = rl_args(train_pg, tmp_path, iterations=1, baseline=baseline)
    _, rewards, advantages = advantages_by_row(train_pg, monkeypatch, args)
    assert len(advantages) == 16 and rewards.std() > 0
    for row, A in advantages.items():
        expected = rewards[row] - (rewards.mean() if baseline == "batch-mean" else 0.0)
        assert torch.allclose(A, expected.expand_as(A), atol=1e-6)


def test_temperature_is_in_every_logprob(tmp_path):
    """Catches: a temperature missing from some logprobs: at 0.5 too the sampler and the trainer agree, the ratio of the
    first of several updates is 1, and the KL to the reference, still the same model, is 0."""
    args = rl_args(
        train_grpo, tmp_path, iterations=1, temperature=0.5, update_epochs=2, learning_rate=1e-12, kl_coef=0.1
    )
    values = scalars(run(train_grpo.main, args))
    assert values["rollout/logprob_gap_max"][0][1] < 1e-4
    assert values["loss/ratio_max"][0][1] == pytest.approx(1.0, abs=1e-5)
    assert abs(values["loss/kl"][0][1]) < 1e-6


def test_pad_may_be_eos(tmp_path):
    """Catches: masks from `ids != pad` where pad == eos: then the EOS would never be trained."""
    finals = []
    for name in ("pad", "pad-is-eos"):
        model, tokenizer = common.load_policy(EMBEDDED, None), common.load_tokenizer(EMBEDDED)
        if name == "pad-is-eos":
            tokenizer.pad_token = tokenizer.eos_token
            model.config.pad_token_id = tokenizer.eos_token_id
        save_model(tmp_path / name, model, tokenizer)
        args = rl_args(train_grpo, tmp_path / "runs", model=str(tmp_path / name), iterations=1)
        finals.append(run(train_grpo.main, args))
    assert weights(finals[0] / "final") == weights(finals[1] / "final") != weights(tmp_path / "pad")


def test_a_model_with_dropout_runs_without_it(tmp_path):
    """Catches: dropout on in the first update (p = 0.5 would move every ratio away from 1)."""
    _, tokenizer = common.load_policy(EMBEDDED, None), common.load_tokenizer(EMBEDDED)
    model = make_model("gpt2", vocab_size=len(tokenizer), resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    save_model(tmp_path / "dropout", model, tokenizer)
    assert not common.load_policy(str(tmp_path / "dropout"), None).training
    changes = {"model": str(tmp_path / "dropout"), "update_epochs": 2, "learning_rate": 1e-12, "max_new_tokens": 10}
    values = scalars(run(train_grpo.main, rl_args(train_grpo, tmp_path / "runs", iterations=1, **changes)))
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
    run(train_grpo.main, rl_args(train_grpo, tmp_path, iterations=2, group_size=8, prompts_per_step=2))
    assert len(sampled) == 2
    order = [[torch.equal(ids, other) for other in sampled].index(True) for ids in trained]
    assert order == sorted(order) and set(order) == {0, 1}


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
    run(train_grpo.main, rl_args(train_grpo, tmp_path, iterations=1, update_epochs=2))
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
    loss, _ = train_sft.sft_loss(logprobs, mask, token_weights(mask, "token", 5).double())
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
    args = short_args(train_sft, tmp_path, from_scratch=True, eval_problems=60, **changes)
    values = scalars(run(train_sft.main, args))
    assert values["loss/policy"][0][1] > 4.0  # near log(103): nothing of the shipped weights was read
    assert values["eval/loss"][-1][1] < 2.0 < 4.0 < values["eval/loss"][0][1]
