"""Interrupted runs go on as if there had been no interruption. Damaged checkpoints, checkpoints of other names and
other arguments are noticed."""

import shutil
import signal

import pytest
import torch
from conftest import assert_same_events, copied, refusal, rl_args, run, scalars, short_args, slow_case, weights

import plumbing.runs
import train_grpo
import train_kimi
import train_pg
import train_ppo
import train_sft
from plumbing.flags import parse_args
from plumbing.runs import Run, load_checkpoint


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
        slow_case("grpo", True),
        slow_case("grpo-many-updates", False),
        ("grpo-many-updates", True),
        slow_case("kimi", True),
        slow_case("pg", True),
        slow_case("ppo", True),
        slow_case("sft", True),
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
    args = (short_args if script == "sft" else rl_args)(module, tmp_path, **changes)
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


def test_a_checkpoint_of_other_names_is_refused_in_one_line(saved_run, tmp_path, capsys):
    """Catches: a fork with an additional critic that resumes a run and silently starts the critic afresh."""
    args = rl_args(train_grpo, tmp_path, iterations=4, resume=str(copied(saved_run, tmp_path)))
    error = refusal(lambda args: Run(args, None).restore(optimizer=None, sampler=None, critic=None), args, capsys)
    assert "its checkpoint holds optimizer, sampler; this script needs critic, optimizer, sampler" in error
