"""Runs under faults: the process is killed, the disk is full, or numbers are no longer finite."""

import json
import os
import pickle
import random
import resource
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import (
    EMBEDDED,
    assert_same_events,
    make_model,
    refusal,
    rl_args,
    run,
    scalars,
    short_args,
    slow_case,
    start,
    texts,
    wait_for,
    weights,
)
from safetensors.torch import load_file, save_file

import common
import plumbing.runs
import train_dpo
import train_grpo
import train_kimi
import train_pg
import train_ppo
import train_rm
import train_sft
from plumbing.flags import parse_args
from plumbing.logs import Health
from plumbing.runs import Run, load_checkpoint, save_model

LOSSES = {
    train_pg: "pg_loss",
    train_ppo: "ppo_loss",
    train_grpo: "grpo_loss",
    train_kimi: "kimi_loss",
    train_dpo: "dpo_loss",
    train_rm: "reward_model_loss",
    train_sft: "sft_loss",
}


SCRIPTS = pytest.mark.parametrize(  # every script in the full suite, GRPO alone in the fast one
    "script",
    [train_grpo, *(slow_case(script) for script in LOSSES if script is not train_grpo)],
    ids=lambda module: module.__name__,
)


def short(script, root: Path, **changes):
    """Args of the shortest run of a script."""
    others = script in (train_dpo, train_rm, train_sft)
    return (short_args if others else rl_args)(script, root, **changes)


# ---- Killed ----------------------------------------------------------------------------------------------------------

RUN = {"iterations": 10, "save_every": 1, "problem_sampling": "prioritized"}


def command(args) -> list[str]:
    """The command line of these arguments of train_grpo.py."""
    defaults, flags = plumbing.flags.to_flat(train_grpo.Args()), ["train_grpo.py"]
    for name, value in plumbing.flags.to_flat(args).items():
        flags += ["--" + name.replace("_", "-"), str(value)] if value != defaults[name] else []
    return flags


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    return run(train_grpo.main, rl_args(train_grpo, tmp_path_factory.mktemp("whole"), **RUN))


MOMENTS = {  # the path in the run directory that appears at that moment
    "while a checkpoint is written": "checkpoints/*.tmp/model.safetensors",
    "at random": "checkpoints/step_000002",
    "while the final model is written": "final.tmp",
}


@pytest.mark.parametrize(
    "moment",
    [moment if "checkpoint" in moment else slow_case(moment) for moment in MOMENTS],
)
def test_a_killed_process_resumes_to_the_same_bytes(moment, uninterrupted, tmp_path):
    """kill -9, and the resumed run equals the uninterrupted one: weights, events, sampler ledger."""
    process = start(*command(rl_args(train_grpo, tmp_path, **RUN)))
    end = time.time() + 120
    while process.poll() is None and not list(tmp_path.glob(f"*/{MOMENTS[moment]}")):
        assert time.time() < end
        time.sleep(0.002)
    if moment == "at random":
        time.sleep(random.random())
    process.kill()
    assert process.wait() == -signal.SIGKILL or "checkpoint" not in moment
    (run_dir,) = tmp_path.iterdir()
    resumed = start("train_grpo.py", "--resume", str(run_dir))
    assert resumed.wait(300) == 0, resumed.stderr.read()[-2000:]
    assert weights(run_dir / "final") == weights(uninterrupted / "final")
    assert_same_events(run_dir, uninterrupted)
    assert [x for x, _ in scalars(run_dir)["reward/total"]] == [16 * (i + 1) for i in range(10)]
    ledgers = [load_checkpoint(str(d))["stateful"]["sampler"] for d in (run_dir, uninterrupted)]
    assert ledgers[0] == ledgers[1] and sum(ledgers[0]["attempts"]) == 40
    assert not list(run_dir.rglob("*.tmp"))


STAGES = {  # where the save of the third checkpoint is cut off: the call that never returns, and how its argument ends
    "optimizer": (torch, "save", "step_000003.tmp/trainer.pt"),
    "digests": (plumbing.runs, "file_digests", "step_000003.tmp"),
    "rename": (os, "rename", "step_000003.tmp"),
    "delete outdated": (shutil, "rmtree", "checkpoints/step_000001"),
}


class Killed(BaseException):
    """Like a kill, it leaves the disk as it is."""


def kill_at(stage: str, patched: pytest.MonkeyPatch) -> None:
    place, name, argument = STAGES[stage]
    function = getattr(place, name)

    def cut_off(*args, **kwargs):
        if not any(str(arg).endswith(argument) for arg in args):
            return function(*args, **kwargs)
        if name == "rmtree":
            (args[0] / "model.safetensors").unlink()
        raise Killed

    patched.setattr(place, name, cut_off)


@pytest.mark.parametrize("stage", STAGES)
def test_a_save_may_end_anywhere(stage, tmp_path, monkeypatch, embedded):
    """Catches: a partial checkpoint that is taken for a whole one. Loading finds the one before it, or the new one if
    it is whole; the next save completes the interrupted one."""
    model, folder = make_model("llama"), tmp_path / "checkpoints"

    def save(number: int) -> None:
        with torch.no_grad():
            model.base_model.norm.weight.fill_(number)
        state = {"progress": {"iteration": number}, "stateful": {}}
        save_model(folder / f"step_{number:06d}", model, embedded[1], state, keep=2)

    save(1)
    save(2)
    with monkeypatch.context() as patched:
        kill_at(stage, patched)
        with pytest.raises(Killed):
            save(3)
    found, expected = load_checkpoint(str(tmp_path)), 3 if stage == "delete outdated" else 2
    assert found["progress"]["iteration"] == expected
    assert (load_file(f"{found['model']}/model.safetensors")["model.norm.weight"] == expected).all()
    save(3)
    assert sorted(path.name for path in folder.iterdir()) == ["step_000002", "step_000003"]
    assert load_checkpoint(str(tmp_path))["progress"]["iteration"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_whose_save_ended_anywhere_goes_on(stage, tmp_path, monkeypatch):
    changes = {"iterations": 4, "save_every": 1, "keep_checkpoints": 2}
    whole = run(train_grpo.main, short_args(train_grpo, tmp_path, **changes))
    with monkeypatch.context() as patched:
        kill_at(stage, patched)
        with pytest.raises(Killed):
            train_grpo.main(short_args(train_grpo, tmp_path, **changes))
    (broken,) = set(tmp_path.iterdir()) - {whole}
    run(train_grpo.main, parse_args(train_grpo.Args, ["--resume", str(broken)]))
    assert weights(broken / "final") == weights(whole / "final")
    assert_same_events(broken, whole)
    for run_dir in (broken, whole):
        kept = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        assert kept == ["step_000003", "step_000004"]


def send(monkeypatch, *numbers: int) -> None:
    """Sends these signals in the middle of the first update."""
    loss, numbers = train_grpo.grpo_loss, list(numbers)

    def interrupted(*args, **kwargs):
        while numbers:
            os.kill(os.getpid(), numbers.pop())
        return loss(*args, **kwargs)

    monkeypatch.setattr(train_grpo, "grpo_loss", interrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_iteration_and_saves(number, tmp_path, monkeypatch, capsys):
    send(monkeypatch, number)
    with pytest.raises(SystemExit) as stopped:
        train_grpo.main(rl_args(train_grpo, tmp_path, iterations=5000))
    assert stopped.value.code == 128 + number
    (run_dir,) = tmp_path.iterdir()
    assert f"--resume {run_dir}" in capsys.readouterr().err
    assert load_checkpoint(str(run_dir))["progress"]["iteration"] == 1


@pytest.mark.slow
def test_a_signal_to_a_process_ends_its_iteration_and_saves(tmp_path):
    number = signal.SIGTERM
    process = start(*command(rl_args(train_grpo, tmp_path, iterations=5000)))
    wait_for(lambda: any(os.path.getsize(f) > 20_000 for f in tmp_path.glob("*/events*")), process)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    (run_dir,) = tmp_path.iterdir()
    assert f"--resume {run_dir}" in error and "Traceback" not in error
    assert load_checkpoint(str(run_dir))["progress"]["iteration"] >= 1


STOPPED = "stopped at once; go on from the newest checkpoint with --resume\n"


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch, capsys):
    """In the middle of an update, without a checkpoint; one line instead of a traceback."""
    send(monkeypatch, signal.SIGINT, signal.SIGINT)
    args = rl_args(train_grpo, tmp_path)
    with pytest.raises(KeyboardInterrupt) as stopped:
        train_grpo.main(args)
    capsys.readouterr()
    assert plumbing.flags.explain(stopped.value, args) == 130
    assert capsys.readouterr().err == STOPPED
    assert not list(tmp_path.glob("*/checkpoints/*"))


# ---- The disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [slow_case(1_000_000), 4_000_000], ids=["weights", "optimizer"])
def test_a_full_disk_leaves_the_old_checkpoint_whole(limit, saved_run, tmp_path, capfd):
    """A limit on the size of a file makes the kernel refuse a write halfway, as a full disk does."""
    run_dir = shutil.copytree(saved_run, tmp_path / "run")
    for done in ("checkpoints/step_000004", "final"):
        shutil.rmtree(run_dir / done)
    before = {path: path.read_bytes() for path in (run_dir / "checkpoints").rglob("*") if path.is_file()}
    arguments = ["--resume", str(run_dir)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(SystemExit) as stopped:
            train_grpo.main(parse_args(train_grpo.Args, arguments))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capfd.readouterr().err
    assert stopped.value.code == 2 and "step_000004 can't be written" in error and "Make room" in error
    assert before == {path: path.read_bytes() for path in (run_dir / "checkpoints").rglob("*") if path.is_file()}
    run(train_grpo.main, parse_args(train_grpo.Args, arguments))
    assert weights(run_dir / "final") == weights(saved_run / "final")
    assert_same_events(run_dir, saved_run)


def test_a_disk_that_is_full_for_events_is_one_line(capsys):
    assert plumbing.flags.explain(OSError(28, "No space left on device"), train_grpo.Args()) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: [Errno 28] No space left on device; make room on the disk, then go on from")


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run_dir = run(train_grpo.main, rl_args(train_grpo, tmp_path, iterations=3, save_every=1, keep_checkpoints=2))
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step_000002", "step_000003"]
    flags = ["--resume", str(run_dir), "--iterations", "4", "--keep-checkpoints", "1"]
    train_grpo.main(parse_args(train_grpo.Args, flags))
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_000004"]


def test_a_pickle_in_a_checkpoint_is_refused(saved_run, tmp_path, capsys):
    """Catches: code that runs when trainer.pt is read. Its digest is right, so only the loader can refuse it."""

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    run_dir = shutil.copytree(saved_run, tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints" / "step_000004")
    checkpoint = run_dir / "checkpoints" / "step_000002"
    for write in (lambda f: torch.save({"x": Payload()}, f), lambda f: f.write_bytes(pickle.dumps(Payload()))):
        write(checkpoint / "trainer.pt")
        digests = plumbing.files.file_digests(checkpoint)
        (checkpoint / "digests.json").write_text(json.dumps(digests))
        args = parse_args(train_grpo.Args, ["--resume", str(run_dir)])
        assert "none of its checkpoints is whole" in refusal(train_grpo.main, args, capsys)
        assert not (tmp_path / "ran").exists()


def test_weights_are_read_from_safetensors_only(tmp_path, capsys):
    """Catches: weights read from a pytorch_model.bin, which is a pickle, for lack of a safetensors file."""
    shutil.copytree(EMBEDDED, tmp_path / "model")
    state = dict(common.load_policy(EMBEDDED, None).state_dict())
    torch.save(state, tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    args = rl_args(train_grpo, tmp_path / "runs", model=str(tmp_path / "model"))
    assert "its weights can't be loaded" in refusal(train_grpo.main, args, capsys)


def without(name: str, folder: Path, source: str = EMBEDDED) -> str:
    """A copy of a model without one of its weights."""
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    del state[name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_missing_weights_are_refused_in_one_line(tmp_path, capsys):
    """Catches: random numbers for a weight that the files lack, with only a warning among many."""
    name = "model.layers.1.mlp.up_proj.weight"
    broken = without(name, tmp_path / "model")
    args = rl_args(train_grpo, tmp_path / "runs", model=broken)
    assert (
        refusal(train_grpo.main, args, capsys)
        == f"error: {broken}: its weights are incomplete: {name} not in its files\n"
    )
    for load in (common.load_value_model, common.load_policy):  # it isn't a critic's new head
        assert name in refusal(partial(load, tokenizer=None), broken, capsys)
    bare = shutil.copytree(EMBEDDED, tmp_path / "bare")
    save_file({}, bare / "model.safetensors", metadata={"format": "pt"})
    names = common.load_policy(EMBEDDED, None).state_dict().keys()
    error = refusal(partial(common.load_policy, tokenizer=None), str(bare), capsys)
    assert sum(f" {name} and " in error for name in names) == 1 and " more not in its files" in error


def test_a_new_head_may_be_missing_but_a_reward_models_own_may_not(tmp_path, capsys, embedded):
    """Catches: a reward model that scores with a random head."""
    for load in (common.load_value_model, partial(common.load_reward_model, new_head=True)):
        model = load(EMBEDDED, None)
        assert (common.value_head(model).weight == 0).all()
        for (name, ours), theirs in zip(
            model.base_model.named_parameters(), embedded[0].base_model.parameters(), strict=True
        ):
            assert torch.equal(ours, theirs), name
    save_model(tmp_path / "rm", common.load_reward_model(EMBEDDED, None, new_head=True), embedded[1])
    assert common.load_reward_model(str(tmp_path / "rm"), None).config.num_labels == 1
    headless = without("score.weight", tmp_path / "headless", str(tmp_path / "rm"))
    assert "score.weight" in refusal(partial(common.load_reward_model, tokenizer=None), headless, capsys)


def test_names_never_become_paths_outside_the_run_root(tmp_path):
    for i, name in enumerate(("../../escaped", "a/../../b", "..", "x\ny", "~")):
        flags = {"model": f"{tmp_path}/{name}", "problems": f"{name}.jsonl", "run_root": str(tmp_path / "runs")}
        args = plumbing.flags.from_flat(train_grpo.Args(), flags)
        for run_name in (None, f"{name}/{i}"):
            args.run.run_name = run_name
            created = Run(args, None)
            created.writer.close()
            assert created.dir.resolve().parent == (tmp_path / "runs").resolve() and ".." not in created.dir.parts
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


# ---- Numbers gone bad ------------------------------------------------------------------------------------------------


def break_loss(monkeypatch, module, how: str, calls: set[int] | None = None, name: str | None = None) -> None:
    """Makes the script's loss (how: "loss") or only its gradient ("gradient") not finite in these calls; only calls
    with a gradient are counted. name: another loss function of the script."""
    name = name or LOSSES[module]
    function, count = getattr(module, name), [0]

    def broken(values, *args, **kwargs):
        count[0] += values.requires_grad
        if calls is not None and (count[0] not in calls or not values.requires_grad):
            return function(values, *args, **kwargs)
        if how == "gradient" and values.requires_grad:
            values.register_hook(lambda gradient: gradient + float("inf"))
        result = function(values, *args, **kwargs)
        if how == "gradient":
            return result
        return (result[0] * float("nan"), result[1]) if isinstance(result, tuple) else result * float("nan")

    monkeypatch.setattr(module, name, broken)


@pytest.mark.parametrize(
    ("script", "how"),
    [(train_grpo, "loss"), (train_grpo, "gradient")]
    + [slow_case(script, "loss") for script in LOSSES if script is not train_grpo],
)
def test_a_bad_update_is_skipped_and_counted(script, how, tmp_path, monkeypatch, capsys):
    """Catches: one NaN that ends a run of days. The weights stay finite and the run continues."""
    break_loss(monkeypatch, script, how, {2})
    run_dir = run(script.main, short(script, tmp_path, iterations=4))
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
    """The weights are those of the last good update, and the rows of the bad one are in a file."""
    break_loss(monkeypatch, script, "loss")
    error = refusal(script.main, short(script, tmp_path, iterations=9, save_every=1, max_bad_updates=3), capsys)
    (run_dir,) = tmp_path.iterdir()
    assert (
        "--max-bad-updates 3 updates in a row were not finite" in error and str(run_dir / "bad_update.jsonl") in error
    )
    rows = [json.loads(line) for line in (run_dir / "bad_update.jsonl").read_text().splitlines()]
    assert len(rows) >= 4 and all(row["prompt"] and row["ids"] for row in rows)
    newest = plumbing.runs.checkpoints(run_dir / "checkpoints")
    if newest and script is not train_rm:  # a reward model's head is new
        assert weights(newest[0]) == weights(Path(EMBEDDED))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_critics_bad_updates_in_a_row_end_the_run(how, tmp_path, monkeypatch, capsys):
    """They count even if the policy's updates in between are good."""
    break_loss(monkeypatch, train_pg, how, name="value_loss")
    args = rl_args(train_pg, tmp_path, iterations=9, baseline="value", max_bad_updates=3)
    assert "--max-bad-updates 3 updates in a row were not finite" in refusal(train_pg.main, args, capsys)


def test_the_rows_to_blame_are_the_ones_written(tmp_path, monkeypatch, capsys):
    """A NaN in one completion's reward spoils its group only, so only that group is written."""
    group_advantages = train_grpo.group_advantages

    def broken(rewards, normalize_std, scored):
        rewards[2, 1] = float("nan")
        return group_advantages(rewards, normalize_std, scored)

    monkeypatch.setattr(train_grpo, "group_advantages", broken)
    refusal(train_grpo.main, rl_args(train_grpo, tmp_path, max_bad_updates=1), capsys)
    (file,) = tmp_path.glob("*/bad_update.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 4 and len({row["prompt"] for row in rows}) == 1
    assert all(row["not_finite"] == ["advantages"] for row in rows)


# ---- Signs of collapse -----------------------------------------------------------------------------------------------


def test_signs_of_collapse_are_told_once(tmp_path, capsys):
    health = Health(tmp_path, None, 10)
    good = {"loss/entropy": 0.2, "reward/std_within_group": 0.1, "rollout/finished": 0.9, "loss/pair_kl": 0.01}
    bad = {"loss/entropy": 0.001, "reward/std_within_group": 0.0, "rollout/finished": 0.0, "loss/pair_kl": 17.0}
    good, bad = good | {"loss/anchor_kl": 0.05}, bad | {"loss/anchor_kl": 7.0}
    for tag in good:
        for value in [bad[tag]] * 4 + [good[tag]] + [bad[tag]] * 4:  # never five in a row
            health.watch(good | {tag: value})
        assert capsys.readouterr().err == ""
        for _ in range(20):
            health.watch(good | {tag: bad[tag]})
        error = capsys.readouterr().err
        assert error.startswith(f"warning: {tag} ") and error.count("\n") == 1 and "--" in error


def test_a_length_that_explodes_is_told(tmp_path, capsys):
    """Completions that grow into the limit are reported; if they were always cut there, it is another sign."""
    for first, told in ((0.95, 1), (0.4, 0)):
        health = Health(tmp_path, None, 10)
        for finished in (first, 0.5, *[0.3] * 9):
            health.watch({"rollout/finished": finished})
        assert capsys.readouterr().err.count("warning: drop of rollout/finished 0.65 for 5 iterations") == told


def test_a_kl_is_judged_in_nats_a_completion(tmp_path, capsys):
    """Catches: one limit for a token's KL and a completion's; a KL of 0.9 a token, at 15 tokens, that is no sign; a
    long completion that is one by its length."""
    for kl, length, told in ((0.9, 15.0, 1), (0.1, 15.0, 0), (0.9, 3.0, 0), (0.04, 500.0, 0)):
        health = Health(tmp_path, None, 10)
        for _ in range(9):
            health.watch({"loss/kl": kl, "rollout/length_mean": length})
        assert capsys.readouterr().err.count(f"{kl * length:.3g} for 5 iterations: the policy is far from its") == told


def test_evaluations_show_signs_at_once(tmp_path, capsys):
    """Catches: a sign of an evaluation that has to last five of them; an evaluation that ends an iteration's streak."""
    health = Health(tmp_path, None, 10)
    health.watch({"eval/kl": 0.0, "eval/truncated": 0.0})
    for _ in range(5):
        health.watch({"loss/pair_kl": 20.0})
        health.watch({"eval/kl": 1.0, "eval/truncated": 0.2})
    assert capsys.readouterr().err.startswith("warning: loss/pair_kl 20 for 5 iterations")
    health.watch({"eval/kl": 9.0, "eval/truncated": 0.6})
    said = capsys.readouterr().err
    assert "warning: eval/kl 9: " in said and "warning: rise of eval/truncated 0.6: " in said


def test_a_template_that_all_completions_copy_is_told(tmp_path, capsys, monkeypatch):
    """Catches: a policy that writes the same opening whatever the question, without a word; a share that counts a
    group's completions, which are alike by right; a model that always began so."""
    sample_groups = common.sample_groups
    for always in (False, True):
        calls = []

        def sample(*args, copied=always, calls=calls, **options):
            rollout = sample_groups(*args, **options)
            calls.append(1)
            if copied or len(calls) > 4:
                rollout.completion_ids[:, :16] = 20
            return rollout

        monkeypatch.setattr(common, "sample_groups", sample)
        run(train_grpo.main, rl_args(train_grpo, tmp_path, iterations=12, prompts_per_step=4, group_size=2))
        said = capsys.readouterr().err
        assert ("warning: rise of rollout/same_opening" in said) != always


def test_a_run_that_truncates_everything_says_so(tmp_path, capsys):
    run(train_grpo.main, rl_args(train_grpo, tmp_path, iterations=6, max_new_tokens=2))
    error = capsys.readouterr().err
    assert error.count("warning: rollout/finished 0 for 5 iterations") == 1
    assert error.count("warning: reward/std_within_group 0 for 5 iterations") == 1


@pytest.mark.slow
def test_groups_of_one_have_no_spread_to_watch(tmp_path, capsys):
    values = scalars(run(train_ppo.main, rl_args(train_ppo, tmp_path, iterations=6, prompts_per_step=4, group_size=1)))
    assert "reward/std_within_group" not in values and "warning" not in capsys.readouterr().err


# ---- Determinism -----------------------------------------------------------------------------------------------------


@SCRIPTS
def test_a_seed_fixes_everything(script, tmp_path):
    """Same seed: identical events, sample texts and weights; another seed: others."""
    first, second, other = (run(script.main, short(script, tmp_path, seed=seed, eval_every=1)) for seed in (1, 1, 2))
    assert weights(first / "final") == weights(second / "final") != weights(other / "final")
    assert_same_events(first, second)
    if script not in (train_sft, train_dpo, train_rm):
        assert texts(first, "samples") == texts(second, "samples") != texts(other, "samples")


@pytest.mark.parametrize(
    "script",
    [train_grpo, train_sft, *(slow_case(script) for script in LOSSES if script not in (train_grpo, train_sft))],
    ids=lambda module: module.__name__,
)
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
        logged.append(scalars(run(script.main, short(script, tmp_path, iterations=1, micro_batch_tokens=tokens))))
    for ours, theirs in zip(gradients[0][0], gradients[1][0], strict=True):
        assert (ours - theirs).abs().max() < 1e-5
    assert set(logged[0]) == set(logged[1])
    for tag in logged[0]:
        if tag.startswith(("loss/", "reward/", "rewards/", "logps/")) or tag.startswith("rollout/length"):
            assert logged[0][tag][0][1] == pytest.approx(logged[1][tag][0][1], abs=1e-5, rel=1e-5), tag


@pytest.mark.parametrize(
    "script, tag, changes",
    [
        (train_kimi, "loss/anchor_kl", {"learning_rate": 1e-3}),
        pytest.param(
            train_dpo, "eval/pair_margin", {"learning_rate": 1e-3, "pair_weight": "gap"}, marks=pytest.mark.slow
        ),
    ],
    ids=["kimi", "dpo"],
)
def test_means_over_completions_are_weighted_by_completions(script, tag, changes, tmp_path):
    """Catches: a micro-batch's mean over rows weighted by its tokens, or by the pairs' weights in the loss."""
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
        args = short(script, tmp_path / "runs", iterations=1, warmup_iterations=0, micro_batch_tokens=tokens, **changes)
        last.append(scalars(run(script.main, args))[tag][-1][1])
    assert abs(last[1]) > 1e-2 and last[0] == pytest.approx(last[1], rel=1e-3)
