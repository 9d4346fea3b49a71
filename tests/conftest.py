"""Shared fixtures and helpers: small random models, the embedded model, short runs. All on a CPU in fp32."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may depend on a network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for models of this size a second thread is slower

import atexit
import contextlib
import functools
import gc
import importlib.util
import inspect
import io
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

import common
import data
import train_grpo
from plumbing.files import write_jsonl
from plumbing.flags import from_flat

EMBEDDED = "models/tiny-arithmetic"
VOCABULARY, EOS = 40, 1
SHAPE = {"vocab_size": VOCABULARY, "eos_token_id": EOS, "pad_token_id": 0, "bos_token_id": None}
DEEP = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, **DEEP, intermediate_size=64, max_position_embeddings=64),
    "qwen2": Qwen2Config(**SHAPE, **DEEP, intermediate_size=64, max_position_embeddings=64),  # biases
    "qwen3": Qwen3Config(**SHAPE, **DEEP, intermediate_size=64, max_position_embeddings=64, head_dim=8),
    "gpt2": GPT2Config(**SHAPE, n_embd=32, n_layer=2, n_head=4, n_positions=64),  # learned positions
    # a sliding window: it can't share prompts within a group, so it takes the slow path
    "mistral": MistralConfig(**SHAPE, **DEEP, intermediate_size=64, max_position_embeddings=64, sliding_window=4),
}


def make_model(name: str, seed: int = 0, **changes):
    """A random model whose logits are far from uniform, so that a wrong position or mask shows."""
    torch.manual_seed(seed)
    config = type(CONFIGS[name]).from_dict(CONFIGS[name].to_dict() | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.generation_config.eos_token_id = EOS
    return model


@pytest.fixture(params=list(CONFIGS))
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="session")
def embedded():
    return common.load_policy(EMBEDDED, None), common.load_tokenizer(EMBEDDED)


@pytest.fixture(autouse=True)
def fixed_settings():
    """Resets the matmul precision, which loading a policy changes, so that the tests' order does not matter."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")


signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C


@pytest.fixture(autouse=True)
def process_as_before():
    """Restores Ctrl-C, the excepthook and the garbage collector, which a run takes over and a failed run keeps."""
    handlers, excepthook = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], sys.excepthook
    yield
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
        signal.signal(number, handler)
    sys.excepthook = excepthook
    gc.unfreeze()


def slow_case(*values):
    """A case of parametrize that only `pytest -m ''` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def ragged_prompts() -> list[list[int]]:
    return [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]


def run(main, args) -> Path:
    """Runs main and returns the run directory that it made or resumed."""
    if args.run.resume:
        main(args)
        return Path(args.run.resume)
    before = set(Path(args.run.run_root).glob("*"))
    main(args)
    (made,) = set(Path(args.run.run_root).glob("*")) - before
    return made


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_same_events(first: Path, second: Path) -> None:
    """Every tag has the same steps, none missing or twice, and the same values to the bit, except times and memory."""
    ours, theirs = scalars(first), scalars(second)
    assert set(ours) == set(theirs)
    for tag in ours:
        assert [x for x, _ in ours[tag]] == [x for x, _ in theirs[tag]], tag
        if not tag.startswith(MEASURED):
            assert ours[tag] == theirs[tag], tag
    assert_same_lines(first, second)


MEASURED = "time/", "memory/", "rollout/tokens_per_second"  # tags whose values no two runs share


def assert_same_lines(first: Path, second: Path) -> None:
    """The plain files are equal to the bit, except times and memory, and metrics.jsonl has what the events have."""
    ours, theirs = ([*map(json.loads, (run / "metrics.jsonl").read_text().splitlines())] for run in (first, second))
    assert [[*row] for row in ours] == [[*row] for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        for tag in row:
            assert tag.startswith(MEASURED) or row[tag] == other[tag], (row["step"], tag)
    assert (first / "samples.jsonl").read_bytes() == (second / "samples.jsonl").read_bytes()
    logged = {tag: [x for x, _ in values] for tag, values in scalars(second).items()}
    written = {tag: [row["step"] for row in theirs if tag in row] for row in theirs for tag in row}
    assert logged == {tag: steps for tag, steps in written.items() if tag not in ("iteration", "step")}


def texts(run_dir: Path, tag: str) -> list[str]:
    events = EventAccumulator(str(run_dir), size_guidance={"tensors": 0})
    events.Reload()
    return [e.tensor_proto.string_val[0].decode() for e in events.Tensors(f"{tag}/text_summary")]


def weights(directory: Path) -> bytes:
    return (directory / "model.safetensors").read_bytes()


def short_args(module, root: Path, **changes):
    """Args for a run of a few seconds, for any train script. changes: flags by name, including those in groups."""
    shared = {"model": EMBEDDED, "device": "cpu", "run_root": str(root), "iterations": 2, "eval_problems": 6}
    shared |= {"eval_every": 0, "save_every": 0}
    if module.__name__ in ("train_sft", "train_dpo", "train_rm"):
        shared |= {"minibatch_size": 8}
        shared |= {"demonstrations": 200} if module.__name__ == "train_sft" else {"pair_problems": 40}
    else:
        shared |= {"prompts_per_step": 4, "group_size": 4}
    return from_flat(module.Args(), shared | changes)


def refusal(main, args, capsys) -> str:
    """The one error line that main prints to stderr (besides progress bars) before it exits with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(args)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("error: ") == 1 and "Traceback" not in error
    line = error[error.index("error: ") :]
    assert line.count("\n") == 1, line
    return line


@functools.cache
def few_problems() -> str:
    """A file of 240 easy problems: drawing and encoding the 6,000 of "arithmetic" takes longer than a short run."""
    file = Path(tempfile.mkdtemp()) / "few.jsonl"
    atexit.register(shutil.rmtree, file.parent)
    write_jsonl(str(file), [problem.to_row() for problem in data.load_problems("arithmetic:1-3", "train", 240)])
    return str(file)


def rl_args(module, root: Path, **changes):
    """`short_args` for an RL script, with few problems, short completions and two problems in an evaluation."""
    few = {"problems": few_problems(), "eval_data": "arithmetic", "eval_problems": 2, "max_new_tokens": 18}
    return short_args(module, root, **few | changes)


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory) -> Path:
    """A GRPO run of four iterations with two checkpoints, to read or to copy."""
    args = rl_args(train_grpo, tmp_path_factory.mktemp("saved"), iterations=4, eval_every=2, save_every=2)
    return run(train_grpo.main, args)


def copied(saved_run: Path, root: Path) -> Path:
    return shutil.copytree(saved_run, root / "runs" / saved_run.name)


@pytest.fixture(scope="session")
def learned(tmp_path_factory) -> tuple[Path, str]:
    """A run of GRPO that is long enough to learn, and its printed output."""
    flags = {"prompts_per_step": 16, "group_size": 8, "iterations": 12, "learning_rate": 4e-4, "warmup_iterations": 2}
    args, printed = short_args(train_grpo, tmp_path_factory.mktemp("learned"), eval_problems=36, **flags), io.StringIO()
    with contextlib.redirect_stdout(printed):
        run_dir = run(train_grpo.main, args)
    return run_dir, printed.getvalue()


@pytest.fixture
def load_script(tmp_path, monkeypatch):
    """A function: source of a script -> the module train_mine, from a file in another folder."""

    def load(source: str):
        script = tmp_path / "train_mine.py"
        script.write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        spec = importlib.util.spec_from_file_location("train_mine", script)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "train_mine", module)
        spec.loader.exec_module(module)
        return module

    return load


def remember(monkeypatch, owner, name: str) -> list[tuple[dict, object]]:
    """(arguments by name, result) of every call of owner.name from now on."""
    calls, function = [], getattr(owner, name)
    names = inspect.signature(function)

    def remembering(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append((names.bind(*args, **kwargs).arguments, result))
        return result

    monkeypatch.setattr(owner, name, remembering)
    return calls


def start(*flags: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def wait_for(condition, process, seconds: float = 120) -> None:
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < end, process.stderr.read()[-2000:]
        time.sleep(0.01)
