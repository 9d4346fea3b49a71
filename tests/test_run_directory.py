"""The run's object, and what its directory keeps: its name, the script's source, the git commit. And where models are
found."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import EMBEDDED, copied, refusal, rl_args, run, scalars, short_args, slow_case, texts

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
from plumbing.flags import parse_args
from plumbing.runs import Run, run_directory


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
    script, data, model, seed, _ = run_directory(args).name.split("__")
    assert (script, data, model, seed) == ("train_kimi", "arithmetic", "train_grpo-final", "s1")


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
