"""The GPU's code on a pretended GPU (pretended_gpu.py), in processes of their own; and what a CPU can check of it by
itself."""

import ast
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import make_model, remember

import common
import data
import train_grpo
from plumbing import engine, evaluation, flags, logs, runs

needs_none = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU, or a pretended one already")


def pytest_on_it(*options: str, lines: Path | None = None) -> str:
    """Runs pytest on the pretended GPU; returns what it printed."""
    environment = os.environ | {"PYTHONPATH": "tests"} | ({"EXECUTED_LINES": str(lines)} if lines else {})
    command = [sys.executable, "-m", "pytest", "-p", "pretended_gpu", "-p", "no:cacheprovider", "--tb=short", *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-1000:]
    return result.stdout


# ---- On the pretended GPU ----


@needs_none
def test_sampling_training_and_cards():
    """Catches: what would end or spoil a run on a GPU; see test_gpu_runs.py."""
    pytest_on_it("tests/test_gpu_runs.py")


@needs_none
@pytest.mark.slow
def test_all_of_it_and_no_line_is_left_out(tmp_path):
    """Catches: a line for GPUs that nothing has ever executed; scripts, resumes, families and the GPU check, too."""
    pytest_on_it("tests/test_gpu_runs.py", "tests/test_gpu.py", "-m", "", lines=tmp_path / "lines.json")
    executed = json.loads((tmp_path / "lines.json").read_text())
    needed, missing = gpu_statements(), []
    for file, statements in needed.items():
        lines = {*executed.get(file, [])}
        missing += [f"{file}:{first}" for first, last in statements if not lines & {*range(first, last + 1)}]
    assert sum(map(len, needed.values())) > 60 and not missing


def gpu_statements() -> dict[str, list[tuple[int, int]]]:
    """First and last lines, by file, of the statements in a branch on `cuda` or `is_cuda` and in class GraphDecoder."""
    found: dict[str, list[tuple[int, int]]] = {}
    for path in (path for folder in (".", "plumbing", "benchmarks") for path in sorted(Path(folder).glob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            test = ast.unparse(node.test) if isinstance(node, ast.If) else ""
            branch = re.search(r"\bcuda\b|is_cuda", test) and not re.search(r"not [\w.]*is_cuda|!= 'cuda'", test)
            if branch or (isinstance(node, ast.ClassDef) and node.name == "GraphDecoder"):
                found.setdefault(str(path), []).extend(span for part in node.body for span in spans(part))
    return found


def spans(statement: ast.stmt) -> list[tuple[int, int]]:
    """Lines of the simple statements in this one; of a docstring, an annotation or a class's attribute none."""
    if isinstance(statement, ast.FunctionDef):
        return [span for part in statement.body for span in spans(part)]
    inner = [part for name in ("body", "orelse", "finalbody") for part in getattr(statement, name, [])]
    if isinstance(statement, ast.Try):
        return [span for part in inner for span in spans(part)]
    if inner:
        return [(statement.lineno, statement.lineno), *(span for part in inner for span in spans(part))]
    constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    attribute = isinstance(statement, ast.Assign | ast.AnnAssign) and statement.col_offset == 4
    return [] if constant or attribute else [(statement.lineno, statement.end_lineno)]


# ---- On the CPU ----


@pytest.mark.parametrize(
    ("cuda", "warning", "why"),
    [
        (None, "", "is built without CUDA"),
        (
            "13.0",
            "The NVIDIA driver on your system is too old (found version 12040).",
            "driver on your system is too old",
        ),
        ("13.0", "", "CUDA_VISIBLE_DEVICES or the container hides it"),
    ],
)
def test_a_driver_without_a_gpu_is_noticed(cuda, warning, why, monkeypatch, tmp_path, capfd):
    """Catches: a run on the CPU of a GPU machine, a hundred times slower, in silence."""

    def is_available():
        if warning:
            warnings.warn(warning, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert common.resolve_device("auto").type == "cpu" and "note" not in capfd.readouterr().err
    monkeypatch.setattr(common, "NVIDIA", tmp_path)
    assert common.resolve_device("auto").type == "cpu"
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("note: an NVIDIA driver is here") and why in line and "whl/cu126" in line
    common.resolve_device("cpu")
    assert capfd.readouterr().err == ""


def test_an_evaluation_begins_with_whole_batches_of_long_prompts(embedded, monkeypatch):
    """Catches: buffers and graphs that fit the first batch only. The results don't depend on the order."""
    calls = remember(monkeypatch, evaluation, "decode")
    policy, tokenizer = embedded
    problems = data.load_problems("arithmetic", "eval", 19)
    problems = data.encode_problems(tokenizer, problems, "", policy.config, 12)
    records = evaluation.evaluate(policy, tokenizer, problems, 1, 12, batch_size=5)
    assert [record["question"] for record in records] == [problem.question for problem in problems]
    batches = [[len(prompt) for prompt in arguments["rollout"].prompt_ids] for arguments, _ in calls]
    assert [len(lengths) for lengths in batches] == [5, 5, 5, 4]
    longest = [max(lengths) for lengths in batches]
    assert longest[0] > longest[2] and longest[:3] == sorted(longest[:3], reverse=True)


def hidden(error: Exception, behind: Exception) -> Exception:
    """`behind`, raised while `error` was handled."""
    try:
        try:
            raise error
        except Exception:
            raise behind  # noqa: B904
    except Exception as raised:
        return raised


def test_out_of_memory_is_found_behind_other_errors(monkeypatch, capsys):
    """Catches: a traceback of a capture's end, or of a library, where memory ran out; one GPU that is full of two."""
    full = torch.OutOfMemoryError("CUDA out of memory")
    for error in (full, hidden(hidden(full, RuntimeError("capture")), ValueError("end")), MemoryError()):
        assert flags.out_of_memory(error)
    for error in (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"), RuntimeError("MPS backend out of memory")):
        assert flags.out_of_memory(error)
    assert not flags.out_of_memory(hidden(ValueError("a"), KeyError("b")))
    for count in (1, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        flags.explain(hidden(full, RuntimeError("capture")), train_grpo.Args())
        said = capsys.readouterr().err
        assert said.startswith("error: out of memory") and ("--device cuda:1" in said) == (count == 2)


def test_a_full_memory_is_no_property_of_a_head(monkeypatch):
    """Catches: logprobs that take more memory from then on, because there was none."""
    model = make_model("llama")
    engine.batch_class(model)

    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.model, "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        common.has_plain_head(model)
    monkeypatch.undo()
    assert common.has_plain_head(model)


def test_the_bias_is_made_once_for_all_layers(monkeypatch):
    """Catches: a mask per layer, converted and kept for the backward pass in each."""
    calls = remember(monkeypatch, engine, "rows_bias")
    model = make_model("llama", num_hidden_layers=5)
    rollout = common.make_rollout([[5, 6, 7], [8]], [[9, 10, 11], [12], [13, 14], [15]], 2)
    engine.batch_class(model)
    calls.clear()
    common.completion_logprobs(model, rollout, [0, 1, 2, 3])[0].sum().backward()
    assert len(calls) == 2  # the shorter and the longer rows


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory from /proc")
def test_a_checkpoint_takes_no_memory_until_it_is_read(tmp_path):
    """Catches: an offloaded run that fitted and can't be resumed, because its state is in memory twice."""

    def anonymous() -> int:
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    target = tmp_path / "checkpoints" / "step_000001"
    target.mkdir(parents=True)
    torch.save({"progress": {}, "stateful": {"optimizer": {"masters": [torch.ones(2**25)]}}}, target / "trainer.pt")
    (target / "digests.json").write_text(json.dumps(runs.file_digests(target)))
    before = anonymous()
    state = runs.load_checkpoint(str(tmp_path))
    assert anonymous() - before < 2**25 and state["stateful"]["optimizer"]["masters"][0][7] == 1  # not its 2**27


def test_a_resumed_optimizer_needs_its_checkpoint_no_more(tmp_path):
    """Catches: moments that are still mapped to a file which --keep-checkpoints removes."""
    model = make_model("llama")
    optimizer = common.MasterAdamW(model, 1e-3, offload=True)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    for weight, master in zip(optimizer.weights, optimizer.masters, strict=True):
        master.grad = weight.detach().clone()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    mapped = torch.load(tmp_path / "state.pt", weights_only=True, mmap=True)
    again = common.MasterAdamW(model, 1e-3, offload=True)
    again.load_state_dict(mapped)
    ours = {t.data_ptr() for state in again.state.values() for t in state.values()} | {
        master.data_ptr() for master in again.masters
    }
    theirs = {t.data_ptr() for state in mapped["state"].values() for t in state.values()}
    assert len(ours) > len(again.masters) and not ours & (theirs | {t.data_ptr() for t in mapped["masters"]})


def test_the_clock_waits_for_every_accelerator(monkeypatch):
    """Catches: times on a Mac's GPU that end before its work does."""
    calls = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda *_: calls.append(1))
    logs.Clock(torch.device("cpu")).lap("sample")
    assert not calls
    logs.Clock(torch.device("mps")).lap("sample")
    assert calls
