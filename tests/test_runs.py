"""Whole runs of the train scripts: they learn, log what they say, and go on after an interruption as if there had been
none."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import EMBEDDED, assert_same_events, make_model, run, scalars, small, texts, weights

import common
import train_grpo
import train_kimi
import train_pg
import train_ppo
import train_sft
from common import completion_logprobs, sample_groups
from evaluate import Metrics, comparison_table

SMALL = {"model": EMBEDDED, "device": "cpu", "prompts_per_step": 4, "group_size": 4, "eval_problems": 12}


def grpo_args(root: Path, **changes) -> train_grpo.Args:
    return train_grpo.Args(**(SMALL | {"run_root": str(root), "eval_every": 2, "save_every": 2} | changes))


TAGS = """
    reward/total reward/accuracy reward/format reward/std_within_group reward/frac_all_right reward/frac_all_wrong
    rollout/length_mean rollout/length_max rollout/length_right rollout/length_wrong rollout/finished
    rollout/tokens_per_second rollout/logprob_gap_mean rollout/logprob_gap_max
    loss/policy loss/entropy loss/clip_low loss/clip_high loss/ratio_max loss/grad_norm loss/learning_rate
    eval/accuracy eval/accuracy_greedy eval/format eval/length eval/truncated eval/no_answer eval/pass_at_k
    eval/accuracy_difficulty_1 eval/accuracy_difficulty_6 eval/accuracy_greedy_difficulty_6
    time/sample time/reward time/logprobs time/update memory/peak_gb
""".split()


def test_a_short_run_learns(tmp_path):
    """The reward really rises: 25 iterations of 16 x 8 completions, the last five against the first five, by more than
    chance: the standard error of a mean of 640 rewards is under 0.025."""
    changes = {"prompts_per_step": 16, "group_size": 8, "iterations": 25, "eval_every": 0, "save_every": 0}
    changes["learning_rate"] = 3e-4
    run_dir = run(train_grpo.main, grpo_args(tmp_path, **changes, eval_problems=60, warmup_iterations=2))
    values = scalars(run_dir)
    reward = [value for _, value in values["reward/total"]]
    assert sum(reward[-5:]) / 5 > sum(reward[:5]) / 5 + 0.15
    assert values["eval/accuracy"][-1][1] > values["eval/accuracy"][0][1] + 0.1
    assert [x for x, _ in values["reward/total"]] == [128 * (i + 1) for i in range(25)]  # completions sampled
    assert not set(TAGS) - set(values)
    assert max(gap for _, gap in values["rollout/logprob_gap_max"]) < 1e-4
    assert all(abs(loss) < 1e-5 for _, loss in values["loss/policy"])
    rates = [rate for _, rate in values["loss/learning_rate"]]
    assert rates == pytest.approx([1.5e-4, *[3e-4] * 24])  # two iterations of warm-up, then constant
    assert "<think>" in texts(run_dir, "samples")[0]
    assert "learning_rate" in texts(run_dir, "hyperparameters")[0]
    reloaded = common.load_policy(str(run_dir / "final"))
    assert reloaded.generation_config.eos_token_id is not None


LEARNERS = {
    "kimi": (train_kimi, {"learning_rate": 1e-4, "iterations": 20}),
    "kimi-log-z": (train_kimi, {"learning_rate": 1e-4, "iterations": 20, "baseline": "log-z", "tau": 0.5}),
    "pg": (train_pg, {"learning_rate": 3e-4, "iterations": 20, "value_epochs": 1}),
    "pg-batch-mean": (train_pg, {"learning_rate": 3e-4, "iterations": 20, "baseline": "batch-mean"}),
    "ppo": (train_ppo, {"learning_rate": 1e-4, "iterations": 14, "kl_coef": 0.01}),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_every_algorithm_learns(name, tmp_path):
    """The reward really rises, by more than chance: the standard error of a mean of 384 rewards is about 0.03."""
    module, changes = LEARNERS[name]
    shared = {"prompts_per_step": 16, "group_size": 8, "eval_every": 0, "save_every": 0, "eval_problems": 60}
    args = module.Args(model=EMBEDDED, device="cpu", run_root=str(tmp_path), warmup_iterations=2, **shared, **changes)
    values = scalars(run(module.main, args))
    reward = [value for _, value in values["reward/total"]]
    assert sum(reward[-3:]) / 3 > sum(reward[:3]) / 3 + 0.12
    assert values["eval/accuracy"][-1][1] > values["eval/accuracy"][0][1] + 0.08
    assert max(gap for _, gap in values["rollout/logprob_gap_max"]) < 1e-4
    common_tags = {tag for tag in TAGS if tag not in ("loss/clip_low", "loss/clip_high", "loss/ratio_max")}
    assert not common_tags - set(values)
    if "pg" in (name, module.__name__.removeprefix("train_")) or name == "ppo":
        assert ("loss/value" in values) == (name != "pg-batch-mean")


def test_kimi_starts_every_iteration_with_a_fresh_optimizer(tmp_path, monkeypatch):
    """Pins: optimizer state kept from one anchor to the next. Four updates an iteration, the first of each without any
    state; with --keep-optimizer only the very first."""
    fresh, step = [], common.MasterAdamW.step

    def remembering(optimizer, closure=None):
        fresh.append(len(optimizer.state) == 0)
        return step(optimizer, closure)

    monkeypatch.setattr(common.MasterAdamW, "step", remembering)
    run(train_kimi.main, small(train_kimi, tmp_path))
    assert fresh == [True, False, False, False] * 2
    fresh.clear()
    run(train_kimi.main, small(train_kimi, tmp_path, keep_optimizer=True))
    assert fresh == [True] + [False] * 7


def test_kimis_anchor_stays_while_the_policy_moves(tmp_path):
    """Pins: old logprobs recomputed in every minibatch: then the log-ratio, and with it tau's term, would stay 0."""
    values = scalars(run(train_kimi.main, small(train_kimi, tmp_path, learning_rate=1e-3, update_epochs=2)))
    assert all(kl > 1e-4 for _, kl in values["loss/kl"])


def test_the_length_reward_starts_late_and_is_logged_apart(tmp_path):
    args = small(train_kimi, tmp_path, iterations=3, length_weight=0.5, length_reward_start=2, learning_rate=1e-9)
    values = scalars(run(train_kimi.main, args))
    for i, weight in enumerate((0.0, 0.0, 0.5)):
        accuracy, form, length, total = (
            values[f"reward/{name}"][i][1] for name in ("accuracy", "format", "length", "total")
        )
        assert total == pytest.approx(accuracy + 0.2 * form + weight * length, abs=1e-6)
    assert any(length != 0 for _, length in values["reward/length"])


@pytest.mark.parametrize("script", [train_pg, train_ppo, train_grpo, train_kimi], ids=lambda module: module.__name__)
def test_the_other_rewards_are_logged_apart_and_weighted(script, tmp_path):
    """The language reward (1: arithmetic has no words), the overlong penalty, and what was cut is never right."""
    changes = {"language_weight": 0.25, "overlong_weight": 0.5, "overlong_buffer": 6, "truncated": "wrong"}
    args = small(script, tmp_path, iterations=2, max_new_tokens=16, problems="arithmetic:3-4", **changes)
    values = {tag: [value for _, value in points] for tag, points in scalars(run(script.main, args)).items()}
    assert values["reward/language"] == [1.0, 1.0] and min(values["reward/overlong"]) < 0
    assert min(values["rollout/finished"]) < 1
    for i in range(2):
        parts = {name: values[f"reward/{name}"][i] for name in ("accuracy", "format", "language", "overlong")}
        expected = parts["accuracy"] + 0.2 * parts["format"] + 0.25 * parts["language"] + 0.5 * parts["overlong"]
        assert values["reward/total"][i] == pytest.approx(expected, abs=1e-6)
        assert parts["accuracy"] <= values["rollout/finished"][i]
    assert values["eval/reflection_words"] == [0.0, 0.0]


@pytest.mark.parametrize("script", [train_pg, train_ppo, train_grpo, train_kimi], ids=lambda module: module.__name__)
def test_masked_completions_teach_nothing(script, tmp_path):
    """Where all are cut, no update moves the weights (Kimi's and PPO's regularisers are 0 at their anchors)."""
    options = {"truncated": "mask", "max_new_tokens": 4, "iterations": 1, "seed": 3}
    options |= {"kl_coef": 0.0} if script is train_ppo else {}
    run_dir = run(script.main, small(script, tmp_path, **options))
    values = scalars(run_dir)
    assert values["rollout/finished"][0][1] == 0.0
    assert weights(run_dir / "final") == Path(EMBEDDED, "model.safetensors").read_bytes()


def test_ppo_without_a_kl_loads_no_reference(tmp_path, monkeypatch):
    calls = count_steps(monkeypatch)
    run(train_ppo.main, small(train_ppo, tmp_path, iterations=1, kl_coef=0.0, update_epochs=1, minibatch_size=16))
    assert calls["loads"] == 1 and calls["steps"] == 2  # the policy's and the critic's
    run(train_ppo.main, small(train_ppo, tmp_path, iterations=1))
    assert calls["loads"] == 3


def test_ppo_learns_from_a_reward_model_and_logs_the_verifiers_apart(tmp_path):
    """The score of the model is the whole reward; accuracy stays visible, so that overoptimisation can be seen."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(EMBEDDED, num_labels=1)
    model = AutoModelForSequenceClassification.from_config(config)
    common.save_checkpoint(tmp_path / "rm", model, common.load_tokenizer(EMBEDDED))
    args = small(train_ppo, tmp_path / "runs", iterations=1, reward_model=str(tmp_path / "rm"))
    values = scalars(run(train_ppo.main, args))
    assert values["reward/total"][0][1] == pytest.approx(values["reward/model"][0][1])
    assert values["reward/total"][0][1] != pytest.approx(values["reward/accuracy"][0][1])


def test_ppo_scores_a_cut_completion_as_told(tmp_path, monkeypatch):
    seen, shape = [], train_ppo.shape_rewards

    def remembering(scores, logprobs, ref, mask, kl_coef):
        seen.append((scores, mask.sum(1)))
        return shape(scores, logprobs, ref, mask, kl_coef)

    monkeypatch.setattr(train_ppo, "shape_rewards", remembering)
    run(train_ppo.main, small(train_ppo, tmp_path, iterations=1, max_new_tokens=9, missing_eos_score=-2.0))
    scores, lengths = seen[0]
    assert (scores == -2.0).any() and (scores >= 0).any()
    assert (lengths[scores == -2.0] == 9).all()


def test_what_a_user_reads_at_the_end(tmp_path, capsys):
    """The before/after table, where the model is, the TensorBoard command; and that a policy loss near 0 is expected,
    where it is ("loss is 0, is it broken?"), not where it isn't."""
    run_dir = run(train_grpo.main, grpo_args(tmp_path, iterations=1))
    printed = capsys.readouterr().out
    for text in (
        "difficulty 6",
        f"model: {run_dir / 'final'}",
        f"tensorboard --logdir {run_dir}",
        "near 0 is expected",
    ):
        assert text in printed
    run(train_grpo.main, grpo_args(tmp_path, iterations=1, update_epochs=2))
    assert "near 0 is expected" not in capsys.readouterr().out


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
    loss = train_sft.sft_loss(logprobs, common.token_weights(mask, "token", 5).double())
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits[mask], targets[mask]).item())


def test_held_out_loss_is_the_mean_over_tokens(embedded):
    policy, tokenizer = embedded
    prompts = [tokenizer(q).input_ids for q in ("1+1=", "12+30=")]
    completions = [tokenizer(c).input_ids + [1] for c in ("<think>2", "42</think><answer>42</answer>")]
    rollout = common.make_rollout(prompts, completions)
    with torch.no_grad():
        expected = -completion_logprobs(policy, rollout, [0, 1])[0].sum().item() / (3 + 8)
    for budget in (1, 1000):
        assert train_sft.held_out_loss(policy, prompts, completions, budget) == pytest.approx(expected, rel=1e-4)


def test_sft_from_scratch_learns(tmp_path):
    changes = {"iterations": 40, "minibatch_size": 32, "demonstrations": 2000, "learning_rate": 3e-3}
    args = train_sft.Args(
        model=EMBEDDED, from_scratch=True, device="cpu", run_root=str(tmp_path), eval_problems=60, **changes
    )
    run_dir = run(train_sft.main, args)
    values = scalars(run_dir)
    assert values["loss/policy"][0][1] > 4.0  # near log(103): nothing of the shipped weights was read
    assert values["eval/loss"][-1][1] < 2.0 < 4.0 < values["eval/loss"][0][1]


class StopAtIterationThree(common.StopSignal):
    """As if Ctrl-C came during the third iteration: the scripts ask twice an iteration."""

    asked = 0

    @property
    def number(self):
        self.asked += 1
        return signal.SIGINT if self.asked >= 5 else 0

    @number.setter
    def number(self, value):
        pass


@pytest.mark.parametrize("lost_work", [False, True])
@pytest.mark.parametrize("script", ["grpo", "grpo-many-updates", "kimi", "pg", "ppo", "sft"])
def test_an_interrupted_run_equals_the_uninterrupted_one(script, lost_work, tmp_path, monkeypatch):
    """Pins: a resume that misses optimizer, data cursor, sampler ledger or a seed. Weights to the byte, every event but
    times and memory to the bit, no step missing or twice; also where the newest checkpoint is older than the events."""
    if script == "sft":
        module, changes = train_sft, {"minibatch_size": 16, "demonstrations": 200, "max_new_tokens": 24}
    else:
        modules = {"kimi": train_kimi, "pg": train_pg, "ppo": train_ppo}
        module, changes = modules.get(script, train_grpo), {"prompts_per_step": 4, "group_size": 4}
    if script == "kimi":
        changes |= {"problem_sampling": "prioritized", "length_weight": 0.2, "length_reward_start": 2}
    if script == "grpo-many-updates":
        changes |= {"update_epochs": 2, "minibatch_size": 8, "kl_coef": 0.05, "dynamic_sampling": True}
    shared = {"model": EMBEDDED, "device": "cpu", "run_root": str(tmp_path), "eval_problems": 12}
    args = module.Args(**shared, **changes, iterations=5, eval_every=3, save_every=2)
    whole = run(module.main, args)

    with monkeypatch.context() as patched:
        patched.setattr(common, "StopSignal", StopAtIterationThree)
        with pytest.raises(SystemExit) as stopped:
            module.main(args)
    assert stopped.value.code == 130
    (broken,) = set(tmp_path.iterdir()) - {whole}
    if lost_work:
        shutil.rmtree(broken / "checkpoints" / "step_000003")
    run(module.main, common.parse_args(module.Args, ["--resume", str(broken)]))

    assert weights(whole / "final") == weights(broken / "final")
    assert_same_events(whole, broken)
    states = [torch.load(d / "checkpoints/step_000005/trainer.pt", weights_only=True) for d in (whole, broken)]
    assert states[0]["sampler"] == states[1]["sampler"]


def test_a_damaged_checkpoint_is_seen_and_the_one_before_it_taken(tmp_path, capsys):
    run_dir = run(train_grpo.main, grpo_args(tmp_path, iterations=4))
    newest, older = (run_dir / "checkpoints" / f"step_00000{i}" for i in (4, 2))
    for name in ("model.safetensors", "trainer.pt"):
        content = (newest / name).read_bytes()
        middle = len(content) // 2
        for damaged in (content[:middle], content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]):
            (newest / name).write_bytes(damaged)
            assert common.load_checkpoint(str(run_dir))["model"] == str(older)
            assert f"{newest} is damaged" in capsys.readouterr().err
        (newest / name).write_bytes(content)
    assert common.load_checkpoint(str(run_dir))["model"] == str(newest)
    whole = weights(run_dir / "final")
    (newest / "trainer.pt").write_bytes(b"")
    train_grpo.main(common.parse_args(train_grpo.Args, ["--resume", str(run_dir)]))  # steps 3 and 4 are done again
    assert weights(run_dir / "final") == whole
    assert [x for x, _ in scalars(run_dir)["reward/total"]] == [16, 32, 48, 64]
    for directory in (newest, older):
        (directory / "trainer.pt").unlink()
    with pytest.raises(SystemExit):
        common.load_checkpoint(str(run_dir))
    assert "none of its checkpoints is whole" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_starts_over_in_place(tmp_path, capsys):
    run_dir = run(train_grpo.main, grpo_args(tmp_path, iterations=2, save_every=0))
    first = weights(run_dir / "final")
    main_args = common.parse_args(train_grpo.Args, ["--resume", str(run_dir)])
    train_grpo.main(main_args)
    assert "starting over" in capsys.readouterr().err
    assert weights(run_dir / "final") == first
    assert [x for x, _ in scalars(run_dir)["reward/total"]] == [16, 32]


def test_resume_refuses_other_arguments_by_name(tmp_path, capsys):
    run_dir = run(train_grpo.main, grpo_args(tmp_path, iterations=2))
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    for flag, value in (("--learning-rate", "1e-3"), ("--group-size", "8"), ("--seed", "7"), ("--model", "elsewhere")):
        with pytest.raises(SystemExit) as stopped:
            common.parse_args(train_grpo.Args, ["--resume", str(run_dir), flag, value])
        assert stopped.value.code == 2 and f"{flag} {value}" in capsys.readouterr().err.replace("0.001", "1e-3")
    allowed = ["--iterations", "9", "--eval-every", "1", "--save-every", "1", "--run-root", "x", "--device", "auto"]
    args = common.parse_args(train_grpo.Args, [f"--resume={run_dir}", *allowed])
    assert args.iterations == 9 and args.prompts_per_step == 4 and args.resume == str(run_dir)
    with pytest.raises(SystemExit):
        common.parse_args(train_grpo.Args, ["--resume", str(tmp_path / "nowhere")])
    assert "no run directory" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


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
    """Pins: clip or optimizer step inside the accumulation. 2 iterations x 3 epochs x 2 minibatches = 12, whatever the
    number of micro-batches. And kl_coef 0 loads no reference."""
    calls = count_steps(monkeypatch)
    changes = {"update_epochs": 3, "minibatch_size": 8, "micro_batch_tokens": 60}
    run_dir = run(train_grpo.main, grpo_args(tmp_path, iterations=2, **changes))
    assert calls["steps"] == calls["clips"] == 12 and calls["loads"] == 1
    assert calls["passes"] > 24
    ratios = [value for _, value in scalars(run_dir)["loss/ratio_max"]]
    assert all(ratio > 1.0 for ratio in ratios)  # Pins: old logprobs recomputed in every minibatch


def test_one_update_takes_no_extra_pass(tmp_path, monkeypatch):
    """Old logprobs of a single update are the ones it computes anyway; a reference takes one pass of its own."""
    calls = count_steps(monkeypatch)
    run(train_grpo.main, grpo_args(tmp_path, iterations=3))
    passes = calls["passes"]
    assert calls["rows"] == 3 * 16 and calls["steps"] == 3 and passes <= 6  # rows without an advantage go apart
    run(train_grpo.main, grpo_args(tmp_path, iterations=3, kl_coef=0.1))
    assert calls["rows"] == (3 + 6) * 16 and calls["passes"] == passes + 6


def test_rows_without_an_advantage_are_only_passed_forward(tmp_path, monkeypatch):
    """Which changes nothing: gradients and metrics are those of a backward pass through all rows. With a KL every row
    has a gradient."""
    gradients, backward_rows, step, batches = [], [], common.MasterAdamW.step, common.micro_batches
    logprobs = common.completion_logprobs

    def remembering_step(optimizer, closure=None):
        gradients[-1].append([master.grad.clone() for master in optimizer.masters])
        return step(optimizer, closure)

    def remembering_logprobs(model, rollout, rows, *args):
        backward_rows[-1] += len(rows) * torch.is_grad_enabled()
        return logprobs(model, rollout, rows, *args)

    def all_together(rollout, rows, max_tokens, apart=None):
        """One slice, whose first row has a gradient, so that all are computed with one."""
        return [sorted(rows, key=lambda row: apart is None or not apart[row])]

    monkeypatch.setattr(common.MasterAdamW, "step", remembering_step)
    monkeypatch.setattr(common, "completion_logprobs", remembering_logprobs)
    logged = []
    for kl_coef, micro_batches in ((0.0, batches), (0.0, all_together), (0.1, batches)):
        monkeypatch.setattr(common, "micro_batches", micro_batches)
        gradients.append([])
        backward_rows.append(0)
        args = grpo_args(tmp_path, iterations=2, kl_coef=kl_coef, temperature=0.5, prompts_per_step=8)
        logged.append(scalars(run(train_grpo.main, args)))
    assert 0 < backward_rows[0] < backward_rows[1] == backward_rows[2] == 2 * 32
    for ours, theirs in zip(gradients[0], gradients[1], strict=True):
        assert all((a - b).abs().max() < 1e-6 for a, b in zip(ours, theirs, strict=True))
    for tag in logged[0]:
        if tag.startswith(("loss/", "rollout/l")):
            ours, theirs = ([value for _, value in values[tag]] for values in logged[:2])
            assert ours == pytest.approx(theirs, abs=1e-5), tag


def test_a_batch_without_any_advantage_makes_no_step(tmp_path):
    """Nor one of Adam's momentum: here there would be some, of the first two updates. The only reward from then on is
    the language's, which is 1 for a chain, as it has no words."""
    args = grpo_args(tmp_path, iterations=2, save_every=2)
    run_dir = run(train_grpo.main, args)
    changes = vars(args) | {"iterations": 4, "resume": str(run_dir)}
    resumed = train_grpo.Args(**changes | {"accuracy_weight": 0.0, "format_weight": 0.0, "language_weight": 1.0})
    values = scalars(run(train_grpo.main, resumed))
    assert values["loss/grad_norm"][1][1] > 0 and [v for _, v in values["loss/grad_norm"][2:]] == [0.0, 0.0]
    assert weights(run_dir / "final") == weights(run_dir / "checkpoints" / "step_000002")


def test_the_reference_is_another_model_and_never_moves(tmp_path, monkeypatch):
    """Pins: a reference that is trainable, in train mode, or the policy itself."""
    loaded = []
    load = common.load_policy

    def remembering(*args, **kwargs):
        model = load(*args, **kwargs)
        loaded.append((model, [p.detach().clone() for p in model.parameters()]))
        return model

    monkeypatch.setattr(common, "load_policy", remembering)
    run_dir = run(train_grpo.main, grpo_args(tmp_path, iterations=3, kl_coef=0.1))
    (policy, at_first), (ref, ref_at_first) = loaded
    assert all(torch.equal(a, b) for a, b in zip(ref.parameters(), ref_at_first, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(policy.parameters(), at_first, strict=True))
    assert not ref.training and not any(p.requires_grad for p in ref.parameters())
    kl = [value for _, value in scalars(run_dir)["loss/kl"]]
    assert abs(kl[0]) < 1e-6 < kl[2]


def test_temperature_is_in_every_logprob(tmp_path):
    """Pins: a temperature missing from some logprobs: at 0.5 too the sampler and the trainer agree, the ratio of the
    first of several updates is 1, and the KL to the reference, still the same model, is 0."""
    args = grpo_args(tmp_path, iterations=1, temperature=0.5, update_epochs=2, learning_rate=1e-12, kl_coef=0.1)
    values = scalars(run(train_grpo.main, args))
    assert values["rollout/logprob_gap_max"][0][1] < 1e-4
    assert values["loss/ratio_max"][0][1] == pytest.approx(1.0, abs=1e-5)
    assert abs(values["loss/kl"][0][1]) < 1e-6


def test_pad_may_be_eos(tmp_path):
    """Pins: masks from `ids != pad` where pad == eos: then the EOS would never be trained."""
    finals = []
    for name in ("pad", "pad-is-eos"):
        model, tokenizer = common.load_policy(EMBEDDED), common.load_tokenizer(EMBEDDED)
        if name == "pad-is-eos":
            tokenizer.pad_token = tokenizer.eos_token
            model.config.pad_token_id = tokenizer.eos_token_id
        common.save_checkpoint(tmp_path / name, model, tokenizer)
        finals.append(run(train_grpo.main, grpo_args(tmp_path / "runs", model=str(tmp_path / name), iterations=2)))
    assert weights(finals[0] / "final") == weights(finals[1] / "final") != weights(tmp_path / "pad")


def test_a_model_with_dropout_runs_without_it(tmp_path):
    """Pins: dropout on in the first update (p = 0.5 would move every ratio away from 1)."""
    _, tokenizer = common.load_policy(EMBEDDED), common.load_tokenizer(EMBEDDED)
    model = make_model("gpt2", vocab_size=len(tokenizer), resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    common.save_checkpoint(tmp_path / "dropout", model, tokenizer)
    assert not common.load_policy(str(tmp_path / "dropout")).training
    changes = {"model": str(tmp_path / "dropout"), "update_epochs": 2, "learning_rate": 1e-12, "max_new_tokens": 10}
    values = scalars(run(train_grpo.main, grpo_args(tmp_path / "runs", iterations=1, **changes)))
    assert values["loss/ratio_max"][0][1] == pytest.approx(1.0, abs=1e-5)


def test_training_uses_the_sampled_ids(tmp_path, monkeypatch):
    """Pins: decoded and re-encoded text trained on. The batch whose logprobs are taken holds the very tensors that were
    sampled, though the text decodes and encodes to other ids (an unknown token is dropped)."""
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
    run(train_grpo.main, grpo_args(tmp_path, iterations=2, group_size=8, prompts_per_step=2))
    assert len(sampled) == 2 and all(torch.equal(a, b) for a, b in zip(sampled, trained, strict=True))


def test_logged_means_are_token_weighted_over_the_whole_iteration(tmp_path, monkeypatch):
    """Pins: metrics from the last micro-batch only, entropy divided twice, means over padding."""
    seen = {}
    sample = common.sample_groups

    def remembering(model, *args, **kwargs):
        rollout = sample(model, *args, **kwargs)
        if rollout.group_size == 8:  # a training batch, before its update
            rows = list(range(16))
            logprobs, entropy = completion_logprobs(model, rollout, rows)
            seen["entropy"] = (entropy.sum() / rollout.mask.sum()).item()
            seen["length"] = rollout.mask.sum().item() / 16
        return rollout

    monkeypatch.setattr(common, "sample_groups", remembering)
    changes = {"micro_batch_tokens": 70, "eval_every": 0, "prompts_per_step": 2, "group_size": 8}
    values = scalars(run(train_grpo.main, grpo_args(tmp_path, iterations=1, **changes)))
    assert values["loss/entropy"][0][1] == pytest.approx(seen["entropy"], rel=1e-4)
    assert values["rollout/length_mean"][0][1] == pytest.approx(seen["length"], rel=1e-5)


def test_metrics():
    metrics = Metrics()
    metrics.add({"a": 1.0, "b_max": 3.0}, weight=1)
    metrics.add({"a": 4.0, "b_max": 2.0, "c": 5.0}, weight=2)
    metrics.add({"a": 99.0}, weight=0)
    assert metrics.means() == {"a": 3.0, "b_max": 3.0, "c": 5.0}


def test_reward_components_are_logged_apart(tmp_path):
    """Pins: a format term that swamps correctness unseen: accuracy has its own column, whatever the weights."""
    values = scalars(run(train_grpo.main, grpo_args(tmp_path, iterations=1, accuracy_weight=0.5, format_weight=5.0)))
    accuracy, form = values["reward/accuracy"][0][1], values["reward/format"][0][1]
    assert 0 <= accuracy <= 1 and 0 <= form <= 1
    assert values["reward/total"][0][1] == pytest.approx(0.5 * accuracy + 5.0 * form)


def test_dynamic_sampling_replaces_groups_that_teach_nothing(tmp_path, monkeypatch):
    """At most --max-sampling-rounds batches an iteration, all of them counted on the x-axis. No group without variance
    is trained on, and there are as many as asked for unless the cap was reached."""
    trained, loss = [], train_grpo.grpo_loss

    def remembering(logprobs, old, ref, advantages, *args, **kwargs):
        trained.append(advantages)
        return loss(logprobs, old, ref, advantages, *args, **kwargs)

    monkeypatch.setattr(train_grpo, "grpo_loss", remembering)
    changes = {"dynamic_sampling": True, "max_sampling_rounds": 3, "prompts_per_step": 4, "temperature": 0.8}
    values = scalars(run(train_grpo.main, grpo_args(tmp_path, iterations=6, **changes)))
    steps = [x for x, _ in values["loss/policy"]]
    rounds = [(b - a) // 16 for a, b in zip([0, *steps[:-1]], steps, strict=True)]
    assert all(1 <= n <= 3 for n in rounds) and max(rounds) > min(rounds)
    assert len(trained) == 6
    for advantages, n in zip(trained, rounds, strict=True):
        groups = advantages.view(-1, 4)
        assert (groups.amax(1) > groups.amin(1)).all() and groups.mean(1).abs().max() < 1e-5
        assert len(groups) == 4 or n == 3


def test_small_steps_are_not_lost_in_bf16():
    """Pins: updates of 1e-6 lost in bf16 weights. Fifty steps move a bf16 model's masters as they move fp32 weights."""
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
    args = grpo_args(tmp_path, iterations=2, dtype="bfloat16")
    run_dir = run(train_grpo.main, args)
    state = torch.load(run_dir / "checkpoints/step_000002/trainer.pt", weights_only=True)
    policy = common.load_policy(str(run_dir / "final"), dtype=torch.bfloat16)
    optimizer = common.MasterAdamW(policy, lr=1.0)
    assert state["masters"] and all(m.dtype == torch.float32 for m in state["masters"])
    common.restore_optimizer(optimizer, state)
    for weight, master in zip(optimizer.weights, optimizer.masters, strict=True):
        assert torch.equal(weight, master.bfloat16())
