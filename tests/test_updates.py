"""Optimizer steps: how often, over which rows, with which metrics, and what fp32 masters and offloading change."""

import inspect
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import EMBEDDED, copied, make_model, rl_args, run, scalars, short_args, slow_case, weights

import common
import train_dpo
import train_grpo
import train_kimi
import train_pg
import train_ppo
import train_rm
from common import completion_logprobs, make_rollout, sample_groups
from plumbing.flags import parse_args
from plumbing.logs import Metrics
from plumbing.runs import save_model


def count_steps(monkeypatch) -> dict[str, int]:
    calls = {"steps": 0, "clips": 0, "loads": 0, "passes": 0, "rows": 0}

    def counting(name, function):
        names = inspect.signature(function)

        def wrapped(*args, **kwargs):
            calls[name] += 1
            if name == "passes":
                calls["rows"] += len(names.bind(*args, **kwargs).arguments["rows"])
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
    run_dir = run(train_grpo.main, rl_args(train_grpo, tmp_path, iterations=1, **changes))
    assert calls["steps"] == calls["clips"] == 6 and calls["loads"] == 1
    assert calls["passes"] > 12
    ratios = [value for _, value in scalars(run_dir)["loss/ratio_max"]]
    assert all(ratio > 1.0 for ratio in ratios)  # Catches: old logprobs recomputed in every minibatch


def test_one_update_takes_no_extra_pass(tmp_path, monkeypatch):
    """A single update computes its old logprobs anyway; a reference takes one pass of its own."""
    calls = count_steps(monkeypatch)
    run(train_grpo.main, rl_args(train_grpo, tmp_path, iterations=1))
    passes = calls["passes"]
    assert calls["rows"] == 16 and calls["steps"] == 1 and passes <= 2  # rows without an advantage go separately
    run(train_grpo.main, rl_args(train_grpo, tmp_path, iterations=1, kl_coef=0.1))
    assert calls["rows"] == (1 + 2) * 16 and calls["passes"] == passes + 2


@pytest.mark.slow
def test_ppo_without_a_kl_loads_no_reference(tmp_path, monkeypatch):
    calls = count_steps(monkeypatch)
    run(train_ppo.main, rl_args(train_ppo, tmp_path, iterations=1, kl_coef=0.0, update_epochs=1, minibatch_size=16))
    assert calls["loads"] == 1 and calls["steps"] == 2  # the policy's and the critic's
    run(train_ppo.main, rl_args(train_ppo, tmp_path, iterations=1))
    assert calls["loads"] == 3


def test_kimi_starts_every_iteration_with_a_fresh_optimizer(tmp_path, monkeypatch):
    """Catches: optimizer state kept from one anchor to the next. An iteration makes four updates in each of two epochs;
    its first has no state. Also catches: old logprobs recomputed in every minibatch, so that the log-ratio, and with it
    tau's term, stays 0."""
    fresh, step = [], common.MasterAdamW.step

    def remembering(optimizer, closure=None):
        fresh.append(len(optimizer.state) == 0)
        return step(optimizer, closure)

    monkeypatch.setattr(common.MasterAdamW, "step", remembering)
    args = rl_args(train_kimi, tmp_path, learning_rate=1e-3, update_epochs=2)
    values = scalars(run(train_kimi.main, args))
    assert fresh == ([True] + [False] * 7) * 2
    assert all(kl > 1e-4 for _, kl in values["loss/anchor_kl"])


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
        run(script.main, rl_args(script, tmp_path, iterations=1, minibatch_size=8))
        assert len(steps) > 2 and all(sum(weights) == pytest.approx(1) for weights in steps[:-1] if weights)
        assert all(max(weights) == pytest.approx(1 / 8) for weights in steps[:-1] if weights)
        return
    rows = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": "0", "weight": 1 + 2 * (i % 2)} for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = short_args(script, tmp_path / "runs", iterations=1, data=str(tmp_path / "pairs.jsonl"), minibatch_size=40)
    run(script.main, args)
    assert len(steps[0]) == 40 and {round(weight, 6) for weight in steps[0]} == {round(w / 80, 6) for w in (1, 3)}


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
        args = rl_args(train_grpo, tmp_path, iterations=1, kl_coef=kl_coef, temperature=0.7, prompts_per_step=8)
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
    values = scalars(run(train_grpo.main, rl_args(train_grpo, tmp_path, **changes)))
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
    run_dir = run(train_grpo.main, rl_args(train_grpo, tmp_path, iterations=2, kl_coef=0.1, learning_rate=1e-3))
    (policy, at_first), (ref, ref_at_first) = loaded
    assert all(torch.equal(a, b) for a, b in zip(ref.parameters(), ref_at_first, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(policy.parameters(), at_first, strict=True))
    assert not ref.training and not any(p.requires_grad for p in ref.parameters())
    kl = [value for _, value in scalars(run_dir)["loss/kl"]]
    assert abs(kl[0]) < 1e-6 < kl[1]


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

    def advantages(rewards, normalize_std, scored):
        A, rollout = group_advantages(rewards, normalize_std, scored), seen["rollout"]
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
        values = scalars(run(train_grpo.main, rl_args(train_grpo, tmp_path_factory.mktemp("one"), **flags)))
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
    run_dir = run(train_grpo.main, rl_args(train_grpo, tmp_path, iterations=2, dtype="bfloat16", save_every=2))
    state = torch.load(run_dir / "checkpoints/step_000002/trainer.pt", weights_only=True)["stateful"]["optimizer"]
    policy = common.load_policy(str(run_dir / "final"), None, dtype=torch.bfloat16)
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


OFFLOADED = [(train_grpo, "bfloat16"), slow_case(train_pg, "float32")]  # PG: a critic too


@pytest.mark.parametrize(("script", "dtype"), OFFLOADED, ids=lambda value: getattr(value, "__name__", value))
def test_an_offloaded_optimizer_changes_no_byte(script, dtype, tmp_path):
    """Catches: some micro-batches' gradients lost on the way, masters rounded differently. Resumed with and without it,
    a run reaches the same weights."""
    flags = {"iterations": 3, "micro_batch_tokens": 200, "save_every": 1, "dtype": dtype, "keep_checkpoints": 3}
    runs = [
        run(script.main, rl_args(script, tmp_path, offload_optimizer=offload, **flags)) for offload in (False, True)
    ]
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
    model = common.load_policy(EMBEDDED, None, dtype=torch.bfloat16)
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

    again = common.load_policy(str(tmp_path / "model"), None, dtype=torch.bfloat16)
    resumed = SGD(again, lr=1.0, momentum=0.5)
    resumed.load_state_dict(torch.load(tmp_path / "model" / "trainer.pt", weights_only=True)["optimizer"])
    assert resumed.param_groups[0]["lr"] == 1e-3
    for policy, its_optimizer in ((model, optimizer), (again, resumed)):
        train(policy, its_optimizer, 2)
    assert all(map(torch.equal, optimizer.masters, resumed.masters))
    assert all(map(torch.equal, optimizer.weights, resumed.weights))
