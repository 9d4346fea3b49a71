"""What happens to a run when the process is killed, the disk is full or numbers are no longer finite."""

import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import EMBEDDED, assert_same_events, run, scalars, small, start, texts, wait_for, weights
from test_bad_input import refuse

import common
import evaluate
import train_dpo
import train_grpo
import train_kimi
import train_pg
import train_ppo
import train_rm
import train_sft

LOSSES = {
    train_pg: "pg_loss",
    train_ppo: "ppo_loss",
    train_grpo: "grpo_loss",
    train_kimi: "kimi_loss",
    train_dpo: "dpo_loss",
    train_rm: "reward_model_loss",
    train_sft: "sft_loss",
}
SCRIPTS = pytest.mark.parametrize("script", LOSSES, ids=lambda module: module.__name__)

# ---- Killed ----------------------------------------------------------------------------------------------------------

FLAGS = ["train_grpo.py", "--device", "cpu", "--prompts-per-step", "4", "--group-size", "4", "--eval-problems", "12"]
FLAGS += ["--problem-sampling", "prioritized", "--eval-every", "0"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    process = start(*FLAGS, "--iterations", "25", "--save-every", "1", "--run-root", str(root))
    assert process.wait(300) == 0
    return next(root.iterdir())


MOMENTS = {  # a path in the run directory that shows that the moment has come
    "at random": "checkpoints/step_000002",
    "while a checkpoint is written": "checkpoints/*.tmp/model.safetensors",
    "while the final model is written": "final.tmp",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_process_resumes_to_the_same_bytes(moment, uninterrupted, tmp_path):
    """kill -9, and the resumed run equals the uninterrupted one: weights, events, sampler ledger."""
    process = start(*FLAGS, "--iterations", "25", "--save-every", "1", "--run-root", str(tmp_path))
    end = time.time() + 120
    while process.poll() is None and not list(tmp_path.glob(f"*/{MOMENTS[moment]}")):
        assert time.time() < end
        time.sleep(0.002)
    if moment == "at random":
        time.sleep(random.random())
    process.kill()
    process.wait()
    (run_dir,) = tmp_path.iterdir()
    resumed = start("train_grpo.py", "--resume", str(run_dir))
    assert resumed.wait(300) == 0, resumed.stderr.read()[-2000:]
    assert weights(run_dir / "final") == weights(uninterrupted / "final")
    assert_same_events(run_dir, uninterrupted)
    assert [x for x, _ in scalars(run_dir)["reward/total"]] == [16 * (i + 1) for i in range(25)]
    ledgers = [common.load_checkpoint(str(d))["sampler"] for d in (run_dir, uninterrupted)]
    assert ledgers[0] == ledgers[1] and sum(ledgers[0]["attempts"]) == 100
    assert not list(run_dir.rglob("*.tmp"))


STAGES = {  # where saving the third checkpoint may be cut off: the call that never returns, and what it is called with
    "optimizer": (torch, "save", "step_000003.tmp/trainer.pt"),
    "digests": (common, "file_digests", "step_000003.tmp"),
    "rename": (os, "rename", "step_000003.tmp"),
    "delete outdated": (shutil, "rmtree", "checkpoints/step_000001"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_saving_may_end_anywhere(stage, tmp_path, monkeypatch):
    """Pins: a checkpoint that is there in part. As a kill does, Killed leaves the disk as it is."""

    class Killed(BaseException):
        pass

    changes = {"iterations": 4, "save_every": 1, "keep_checkpoints": 2}
    whole = run(train_grpo.main, small(train_grpo, tmp_path, **changes))
    place, name, argument = STAGES[stage]
    function = getattr(place, name)

    def cut_off(*args, **kwargs):
        if not any(str(arg).endswith(argument) for arg in args):
            return function(*args, **kwargs)
        if name == "rmtree":
            (args[0] / "model.safetensors").unlink()
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(place, name, cut_off)
        with pytest.raises(Killed):
            train_grpo.main(small(train_grpo, tmp_path, **changes))
    (broken,) = set(tmp_path.iterdir()) - {whole}
    run(train_grpo.main, common.parse_args(train_grpo.Args, ["--resume", str(broken)]))
    assert weights(broken / "final") == weights(whole / "final")
    assert_same_events(broken, whole)
    for run_dir in (broken, whole):
        kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        assert kept == ["step_000003", "step_000004"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_iteration_and_saves(number, tmp_path):
    process = start(*FLAGS, "--iterations", "5000", "--save-every", "0", "--run-root", str(tmp_path))
    wait_for(lambda: any(os.path.getsize(f) > 20_000 for f in tmp_path.glob("*/events*")), process)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    (run_dir,) = tmp_path.iterdir()
    assert f"--resume {run_dir}" in error and "Traceback" not in error
    assert common.load_checkpoint(str(run_dir))["iteration"] >= 1


def test_a_second_ctrl_c_stops_at_once(capsys):
    """One line, and the exit code of an interrupted process."""
    code = "import sys, common; sys.excepthook = common.explain; raise KeyboardInterrupt"
    process = subprocess.run([os.sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode in (130, -signal.SIGINT)
    assert process.stderr == "stopped at once; go on from the newest checkpoint with --resume\n"


# ---- The disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1_000_000, 4_000_000], ids=["weights", "optimizer"])
def test_a_full_disk_leaves_the_old_checkpoint_whole(limit, tmp_path, capfd):
    """A limit on the size of a file makes the kernel refuse a write in the middle, as a full disk does."""
    whole = run(train_grpo.main, small(train_grpo, tmp_path, iterations=4, save_every=2, eval_every=2))
    run_dir = run(train_grpo.main, small(train_grpo, tmp_path, iterations=2, save_every=2, eval_every=2))
    before = {path: path.read_bytes() for path in (run_dir / "checkpoints").rglob("*") if path.is_file()}
    arguments = ["--resume", str(run_dir), "--iterations", "4"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(SystemExit) as stopped:
            train_grpo.main(common.parse_args(train_grpo.Args, arguments))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capfd.readouterr().err
    assert stopped.value.code == 2 and "step_000004 can't be written" in error and "Make room" in error
    assert before == {path: path.read_bytes() for path in (run_dir / "checkpoints").rglob("*") if path.is_file()}
    run(train_grpo.main, common.parse_args(train_grpo.Args, arguments))
    assert weights(run_dir / "final") == weights(whole / "final")
    assert_same_events(run_dir, whole)


def test_a_disk_that_is_full_for_events_is_one_line(capsys):
    error = OSError(28, "No space left on device")
    common.explain(OSError, error, None)
    assert capsys.readouterr().err == (
        "error: [Errno 28] No space left on device; make room on the disk, then go on with --resume\n"
    )


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run_dir = run(train_grpo.main, small(train_grpo, tmp_path, iterations=5, save_every=1, keep_checkpoints=2))
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_000004", "step_000005"]
    args = common.parse_args(
        train_grpo.Args, ["--resume", str(run_dir), "--iterations", "6", "--keep-checkpoints", "1"]
    )
    train_grpo.main(args)
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_000006"]


def test_a_pickle_in_a_checkpoint_is_refused(tmp_path, capsys):
    """Pins: code that runs when trainer.pt is read. Its digest is right: only the loader can tell."""

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    run_dir = run(train_grpo.main, small(train_grpo, tmp_path / "runs", save_every=2))
    checkpoint = run_dir / "checkpoints" / "step_000002"
    for write in (lambda f: torch.save({"x": Payload()}, f), lambda f: f.write_bytes(pickle.dumps(Payload()))):
        write(checkpoint / "trainer.pt")
        digests = common.file_digests(checkpoint)
        (checkpoint / "digests.json").write_text(json.dumps(digests))
        args = common.parse_args(train_grpo.Args, ["--resume", str(run_dir)])
        assert "none of its checkpoints is whole" in refuse(train_grpo.main, args, capsys)
        assert not (tmp_path / "ran").exists()


def test_weights_are_read_from_safetensors_only(tmp_path, capsys):
    """Pins: a pytorch_model.bin, which is a pickle, beside or in place of the safetensors file."""
    shutil.copytree(EMBEDDED, tmp_path / "model")
    state = dict(common.load_policy(EMBEDDED).state_dict())
    torch.save(state, tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    args = small(train_grpo, tmp_path / "runs", model=str(tmp_path / "model"))
    assert "its weights can't be loaded" in refuse(train_grpo.main, args, capsys)


def test_names_never_become_paths_outside_the_run_root(tmp_path):
    for name in ("../../escaped", "a/../../b", "..", "x\ny", "~"):
        args = train_grpo.Args(model=f"{tmp_path}/{name}", problems=f"{name}.jsonl", run_root=str(tmp_path / "runs"))
        run_dir, writer = common.start_run(args, {})
        writer.close()
        assert run_dir.resolve().parent == (tmp_path / "runs").resolve() and ".." not in run_dir.parts
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


# ---- Numbers gone bad ------------------------------------------------------------------------------------------------


def break_loss(monkeypatch, module, how: str, calls: set[int] | None = None, name: str | None = None) -> None:
    """The script's loss (loss), or only the gradient behind it (gradient), is no longer finite in these calls of it.
    name: of another loss of it."""
    name = name or LOSSES[module]
    function, count = getattr(module, name), [0]

    def broken(values, *args, **kwargs):
        count[0] += 1
        if calls is not None and count[0] not in calls:
            return function(values, *args, **kwargs)
        if how == "gradient" and values.requires_grad:
            values.register_hook(lambda gradient: gradient + float("inf"))
        result = function(values, *args, **kwargs)
        if how == "gradient":
            return result
        return (result[0] * float("nan"), result[1]) if isinstance(result, tuple) else result * float("nan")

    monkeypatch.setattr(module, name, broken)


@pytest.mark.parametrize("how", ["loss", "gradient"])
@SCRIPTS
def test_a_bad_update_is_skipped_and_counted(script, how, tmp_path, monkeypatch, capsys):
    """Pins: one NaN that ends a run of days. The weights stay finite and the run goes on."""
    break_loss(monkeypatch, script, how, {2})
    run_dir = run(script.main, small(script, tmp_path, iterations=4))
    assert "warning: loss" in capsys.readouterr().err
    final = common.load_weights(*loader(script), str(run_dir / "final"), "cpu", torch.float32)
    assert all(parameter.isfinite().all() for parameter in final.parameters())
    skipped = [value for _, value in scalars(run_dir)["loss/skipped"]]
    assert sum(value > 0 for value in skipped) == 1 and len(skipped) == 4
    assert weights(run_dir / "final") != weights(Path(EMBEDDED))


def loader(script):
    if script is train_rm:
        return (common.AutoModelForSequenceClassification,)
    return (common.AutoModelForCausalLM,)


@SCRIPTS
def test_bad_updates_in_a_row_end_the_run(script, tmp_path, monkeypatch, capsys):
    """The weights are those of the last good update, and the rows are there to be read."""
    break_loss(monkeypatch, script, "loss")
    error = refuse(script.main, small(script, tmp_path, iterations=9, save_every=1, max_bad_updates=3), capsys)
    (run_dir,) = tmp_path.iterdir()
    assert (
        "--max-bad-updates 3 updates in a row were not finite" in error and str(run_dir / "bad_update.jsonl") in error
    )
    rows = [json.loads(line) for line in (run_dir / "bad_update.jsonl").read_text().splitlines()]
    assert len(rows) >= 4 and all(row["prompt"] and row["ids"] for row in rows)
    newest = common.checkpoints(run_dir / "checkpoints")
    if newest and script is not train_rm:  # a reward model's head is new
        assert weights(newest[0]) == weights(Path(EMBEDDED))


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_critics_bad_updates_in_a_row_end_the_run(how, tmp_path, monkeypatch, capsys):
    """Also where the policy's own, in between, are good."""
    break_loss(monkeypatch, train_pg, how, name="value_loss")
    args = small(train_pg, tmp_path, iterations=9, baseline="value", max_bad_updates=3)
    assert "--max-bad-updates 3 updates in a row were not finite" in refuse(train_pg.main, args, capsys)


def test_the_rows_to_blame_are_the_ones_written(tmp_path, monkeypatch, capsys):
    """A reward that is NaN for one completion spoils its group, and only that."""
    group_advantages = train_grpo.group_advantages

    def broken(rewards, normalize_std):
        rewards[2, 1] = float("nan")
        return group_advantages(rewards, normalize_std)

    monkeypatch.setattr(train_grpo, "group_advantages", broken)
    refuse(train_grpo.main, small(train_grpo, tmp_path, max_bad_updates=1), capsys)
    (file,) = tmp_path.glob("*/bad_update.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 4 and len({row["prompt"] for row in rows}) == 1
    assert all(row["not_finite"] == ["advantages"] for row in rows)


# ---- Signs of collapse -----------------------------------------------------------------------------------------------


def test_signs_of_collapse_are_told_once(tmp_path, capsys):
    health = evaluate.Health(tmp_path, None, 10)
    good = {"loss/entropy": 0.2, "reward/std_within_group": 0.1, "rollout/finished": 0.9, "loss/kl": 0.01}
    bad = {"loss/entropy": 0.001, "reward/std_within_group": 0.0, "rollout/finished": 0.0, "loss/kl": 7.0}
    for tag in good:
        for value in [bad[tag]] * 4 + [good[tag]] + [bad[tag]] * 4:  # never five in a row
            health.watch(good | {tag: value})
        assert capsys.readouterr().err == ""
        for _ in range(20):
            health.watch(good | {tag: bad[tag]})
        error = capsys.readouterr().err
        assert error.startswith(f"warning: {tag} ") and error.count("\n") == 1 and "--" in error


def test_a_run_that_truncates_everything_says_so(tmp_path, capsys):
    run(train_grpo.main, small(train_grpo, tmp_path, iterations=6, max_new_tokens=2))
    error = capsys.readouterr().err
    assert error.count("warning: rollout/finished 0 for 5 iterations") == 1
    assert error.count("warning: reward/std_within_group 0 for 5 iterations") == 1


def test_groups_of_one_have_no_spread_to_watch(tmp_path, capsys):
    values = scalars(run(train_ppo.main, small(train_ppo, tmp_path, iterations=6, prompts_per_step=4, group_size=1)))
    assert "reward/std_within_group" not in values and "warning" not in capsys.readouterr().err


# ---- Determinism -----------------------------------------------------------------------------------------------------


@SCRIPTS
def test_a_seed_fixes_everything(script, tmp_path):
    """Same seed: identical events, sample texts and weights; another seed: others."""
    first, second, other = (run(script.main, small(script, tmp_path, seed=seed, eval_every=1)) for seed in (1, 1, 2))
    assert weights(first / "final") == weights(second / "final") != weights(other / "final")
    assert_same_events(first, second)
    if script not in (train_sft, train_dpo, train_rm):
        assert texts(first, "samples") == texts(second, "samples") != texts(other, "samples")


@SCRIPTS
def test_micro_batches_change_memory_only(script, tmp_path, monkeypatch):
    """The first update's gradient and metrics are equal within 1e-5, whatever --micro-batch-tokens is."""
    gradients, step = [], common.MasterAdamW.step

    def remembering(optimizer, closure=None):
        gradients[-1].append([master.grad.clone() for master in optimizer.masters if master.grad is not None])
        return step(optimizer, closure)

    monkeypatch.setattr(common.MasterAdamW, "step", remembering)
    logged = []
    for tokens in (100, 16384):
        gradients.append([])
        logged.append(scalars(run(script.main, small(script, tmp_path, iterations=1, micro_batch_tokens=tokens))))
    for ours, theirs in zip(gradients[0][0], gradients[1][0], strict=True):
        assert (ours - theirs).abs().max() < 1e-5
    assert set(logged[0]) == set(logged[1])
    for tag in logged[0]:
        if tag.startswith(("loss/", "reward/", "rewards/", "logps/")) or tag.startswith("rollout/length"):
            assert logged[0][tag][0][1] == pytest.approx(logged[1][tag][0][1], abs=1e-5, rel=1e-5), tag


@pytest.mark.parametrize(
    "script, tag, changes",
    [
        (train_kimi, "loss/kl", {"learning_rate": 1e-3}),
        (train_dpo, "eval/pair_margin", {"learning_rate": 1e-3, "pair_weight": "gap"}),
    ],
    ids=["kimi", "dpo"],
)
def test_means_over_completions_are_weighted_by_completions(script, tag, changes, tmp_path):
    """Pins: a micro-batch's mean over rows weighted by its tokens, or by the pairs' weights in the loss."""
    if script is train_dpo:  # pairs whose weights differ
        rows = []
        for i in range(1, 90):
            right = {"text": f"<answer>{i + 1}</answer>", "reward": 1.0 + i % 3, "finished": True}
            wrong = {"text": "<think>" + "1 " * (i % 9) + "</think>", "reward": 0.0, "finished": True}
            rows.append({"question": f"{i}+1=", "completions": [right, wrong]})
        (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes = changes | {"data": str(tmp_path / "samples.jsonl"), "eval_problems": 20}
    last = []
    for tokens in (60, 16384):
        args = small(script, tmp_path / "runs", iterations=1, warmup_iterations=0, micro_batch_tokens=tokens, **changes)
        last.append(scalars(run(script.main, args))[tag][-1][1])
    assert abs(last[1]) > 1e-2 and last[0] == pytest.approx(last[1], rel=1e-3)
