"""The run's object, and what its directory keeps: its name, the script's source, the git commit. And where models are
found."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import EMBEDDED, assert_same_lines, copied, refusal, rl_args, run, scalars, short_args, slow_case, texts
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

import common
import plumbing.runs
import train_dpo
import train_grpo
import train_kimi
import train_pg
import train_ppo
import train_rm
import train_sft
from plumbing import evaluation
from plumbing.flags import checkpoint_interval, parse_args
from plumbing.runs import Run, run_directory
from plumbing.statistics import interval


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
    [train_grpo, *map(slow_case, (train_pg, train_ppo, train_kimi, train_sft, train_dpo, train_rm))],
    ids=lambda module: module.__name__,
)
def test_a_script_learns_the_same_without_the_runs_statements(script, tmp_path, monkeypatch):
    """Catches: mathematics in the run's object. Without it, evaluation scores and weights must stay the same."""
    (tmp_path / "short.py").write_text(without_the_runs_statements(script))
    spec = importlib.util.spec_from_file_location("short", tmp_path / "short.py")
    short = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "short", short)
    spec.loader.exec_module(short)

    results, evaluate = [], evaluation.HeldOut.evaluate
    for module in (script, short):
        scores, optimizers = [], []

        class Remembering(common.MasterAdamW):
            def __init__(self, *args, optimizers=optimizers, **options):
                super().__init__(*args, **options)
                optimizers.append((self, [master.detach().clone() for master in self.masters]))

        with monkeypatch.context() as patched:
            patched.setattr(common, "MasterAdamW", Remembering)
            patched.setattr(evaluation.HeldOut, "evaluate", lambda *a, s=scores: s.append(evaluate(*a)) or s[-1])
            flags = {"iterations": 2, "learning_rate": 1e-3, "warmup_iterations": 0}
            rl = script in (train_grpo, train_pg, train_ppo, train_kimi)
            module.main(
                (rl_args if rl else short_args)(script, tmp_path / "runs" / module.__name__, eval_problems=6, **flags)
            )
        for optimizer, start in optimizers:
            assert not any(map(torch.equal, optimizer.masters, start)), "nothing learned"
        results.append((scores, [master for optimizer, _ in optimizers for master in optimizer.masters]))
    (scores, masters), (short_scores, short_masters) = results
    assert scores == short_scores and all(map(torch.equal, masters, short_masters))
    assert script is train_rm or (len(scores) >= 2 and scores[0] != scores[-1])
    assert not list((tmp_path / "runs" / "short").glob("*/final"))  # the statements were really removed


def test_a_runs_object_is_small(saved_run, tmp_path):
    """Its public names are all that a reader of a script must know of it."""
    args = rl_args(train_grpo, tmp_path, iterations=4, resume=str(copied(saved_run, tmp_path)))
    names = {name for name in dir(Run(args, None)) if not name.startswith("_")}
    assert {"dir", "writer", "start_from", "progress", "restore", "checkpoint", "finish"} <= names
    assert len(names) <= 8


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
    args = rl_args(train_grpo, root, run_name="mine", iterations=1, save_every=1)
    assert run(train_grpo.main, args) == root / "mine"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert f"--run-name mine: {root / 'mine'} exists" in refusal(train_grpo.main, args, capsys)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    train_grpo.main(parse_args(train_grpo.Args, ["--resume", str(root / "mine"), "--iterations", "2"]))
    assert [x for x, _ in scalars(root / "mine")["reward/total"]] == [16, 32]
    assert [path.name for path in root.iterdir()] == ["mine"]


def test_a_run_from_another_runs_result_is_not_called_final(saved_run, tmp_path):
    args = short_args(train_kimi, tmp_path, model=str(saved_run / "final"))
    script, data, model, *changed, seed, _ = run_directory(args).name.split("__")
    assert (script, data, model, seed) == ("train_kimi", "arithmetic", "train_grpo-final", "s1")
    assert changed == ["prompts-per-step-4_group-size-4_eval-problems-6_and-4-more"]


@pytest.mark.parametrize(
    "flags, said",
    [
        ("", None),
        ("--seed 7 --run-root elsewhere --model models/tiny-countdown", None),  # in the name already, or no difference
        ("--learning-rate 3e-4 --no-normalize-std", "learning-rate-0.0003_no-normalize-std"),
        (
            "--iterations 60 --dynamic-sampling --eval-data x/mine.jsonl",
            "eval-data-mine.jsonl_dynamic-sampling_iterations-60",
        ),
        ("--system-prompt " + "w" * 300, "system-prompt-" + "w" * 20),
    ],
)
def test_a_runs_name_tells_the_flags_that_differ(flags, said):
    """Catches: two variants of a script whose runs only args.json tells apart."""
    assert plumbing.runs.changed_flags(parse_args(train_grpo.Args, flags.split()), 60) == ([said] if said else [])


def test_a_flag_of_several_numbers_is_named():
    """Catches: a fork's flag of numbers, such as ratio_bounds, which no file's name could be made of."""

    @dataclass
    class Args:
        ratio_bounds: tuple[float, float] = (0.0, 1.0)
        layers: tuple[int, ...] = ()

    assert plumbing.runs.changed_flags(Args((0.0, 4.0), (1, 2)), 60) == ["ratio-bounds-0.0+4.0_layers-1+2"]


def test_a_run_leaves_plain_files(saved_run):
    """Catches: a scalar that stands in the events only, a table that is printed and lost, a checkpoint without its
    accuracy, samples of other problems than the first eight."""
    assert_same_lines(saved_run, saved_run)
    rows = [json.loads(line) for line in (saved_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1, 2, 2, 3, 4, 4]
    assert [row["iteration"] for row in rows if "eval/accuracy" in row] == [0, 2, 4]
    samples = [json.loads(line) for line in (saved_run / "samples.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in samples] == [0, 0, 2, 2, 4, 4]  # of two problems
    assert all(len(row["completions"]) == 4 and "ids" not in row["completions"][0] for row in samples)
    right = [completion["correct"] for row in samples[-2:] for completion in row["completions"]]
    assert sum(right) / 8 == rows[-1]["eval/accuracy"]
    report = (saved_run / "report.txt").read_text()
    assert report.startswith("held-out accuracy")
    for row in rows:
        if row["iteration"] and "eval/accuracy" in row:
            low, high = interval(row["eval/accuracy"], 2)
            line = rf"step_00000{row['iteration']} +{row['eval/accuracy']:.3f} +{low:.3f} to {high:.3f}\n"
            assert re.search(line, report)
    assert sorted(path.name for path in (saved_run / "checkpoints").iterdir()) == ["step_000002", "step_000004"]


@pytest.mark.parametrize("save, evaluate, every", [(None, 25, 25), (None, 0, 50), (0, 25, 0), (10, 25, 10)])
def test_checkpoints_fall_on_evaluations(save, evaluate, every):
    """By default each evaluation has its checkpoint, so half of the accuracies belong to no saved model otherwise."""
    assert checkpoint_interval(save, evaluate) == every


def test_flags_are_hyperparameters(saved_run):
    """Catches: an HPARAMS tab that is empty, or a second run directory for it."""
    assert len([*saved_run.glob("events.out.tfevents.*")]) == 1 and not [*saved_run.glob("*/events.*")]
    events = EventAccumulator(str(saved_run))
    events.Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    values = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert values["learning_rate"].number_value == 1e-4 and values["loss_norm"].string_value == "sequence"
    assert {*values} == {"script", *json.loads((saved_run / "args.json").read_text())}


def test_a_value_that_is_not_finite_is_null(tmp_path):
    """Strict JSON has no NaN: another program could not read the file."""
    writer = plumbing.runs.Writer(tmp_path, None, 3)
    writer.add_scalar("mine/own", torch.tensor(0.5), 7)
    writer.add_scalars_as_row({"loss/policy": float("nan"), "loss/ratio_max": float("inf")}, 8)
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        '{"iteration": 3, "step": 7, "mine/own": 0.5}',
        '{"iteration": 3, "step": 8, "loss/policy": null, "loss/ratio_max": null}',
    ]


@pytest.mark.parametrize("end", ["", '{"step": 8', '{"step": 16}\n'])
def test_a_resumed_run_drops_what_its_checkpoint_does_not_count(end, tmp_path):
    """A line cut by a kill, and lines past the checkpoint, which the resumed run writes again."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 8}\n' + end)
    plumbing.runs.Writer(tmp_path, 9, 1).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n{"step": 8}\n'


def test_a_damaged_line_is_refused(tmp_path, capsys):
    """A kill cuts the last line only: another damage would silently lose the lines after it."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 8}\n')
    with pytest.raises(SystemExit):
        plumbing.runs.Writer(tmp_path, 9, 1)
    assert "metrics.jsonl: line 2 is damaged" in capsys.readouterr().err


def test_built_in_models_are_found_from_any_directory(tmp_path, monkeypatch):
    """A directory of that name in the working directory comes first."""
    monkeypatch.chdir(tmp_path)
    assert Path(common.resolve_model(EMBEDDED)).samefile(Path(common.__file__).parent / EMBEDDED)
    assert common.resolve_model("models/none") == "models/none"
    policy, tokenizer = common.load_policy(EMBEDDED, None), common.load_tokenizer(EMBEDDED)
    assert policy.config.vocab_size == len(tokenizer) == common.load_config(EMBEDDED).vocab_size
    assert common.load_value_model(EMBEDDED, None).config.num_labels == 1
    (tmp_path / EMBEDDED).mkdir(parents=True)
    assert common.resolve_model(EMBEDDED) == EMBEDDED
