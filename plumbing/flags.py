"""The command line: how a command starts and ends, one-line errors, the ranges of flags, the flag groups that several
scripts share, parsing and `--resume`.

A script's flags are the fields of its dataclass `Args`. A flag's range is part of its type
(`learning_rate: Positive = 1e-4`). A numeric flag without a range may be any finite number.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import tyro

Group = tyro.conf.OmitArgPrefixes  # a flag group: a box in --help; its flags have no prefix


def fail(message: str) -> NoReturn:
    """Bad input: prints one line to stderr and exits with code 2, without a traceback."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def reason(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- How a command starts and ends ---------------------------------------------------------------------------------

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP  # Ctrl-C, kill, a lost connection


def start(main: Callable, Args: type) -> None:
    """Runs a command: main(args), with `args` from the command line. What is no fault of the code ends it in one line
    (see `explain`). Output that can't be written is lost; the command goes on."""
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    threading.excepthook = explain_thread
    catch_signals(interrupt)
    args = None
    try:
        args = parse_args(Args)
        main(args)
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(explain(error, args))


def catch_signals(handler: Callable) -> dict:
    """Sets the handler of SIGNALS, except of those that are ignored (by nohup, or in a shell's background job). Returns
    the handlers before."""
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def interrupt(number: int, frame) -> NoReturn:
    raise KeyboardInterrupt(number)


def explain_thread(failed) -> None:
    """Prints a thread's error, unless it is one of the file system: the event writer raises it in this thread, too."""
    if not issubclass(failed.exc_type, OSError):
        threading.__excepthook__(failed)


def explain(error: BaseException, args=None) -> int:
    """Prints one line for an error whose cause is the machine or the user, and returns the exit code. Raises any other
    error again."""
    flat, go_on = {} if args is None else to_flat(args), "go on from the newest checkpoint with --resume"
    if isinstance(error, KeyboardInterrupt):
        number = error.args[0] if error.args else signal.SIGINT
        print(f"stopped at once; {go_on if 'resume' in flat else 'nothing was written'}", file=sys.stderr)
        return 128 + number
    if cause := out_of_memory(error):
        lower = "micro_batch_tokens", "prompts_per_step", "group_size", "minibatch_size", "batch_size", "max_new_tokens"
        lower = [as_flag(name) for name in lower if flat.get(name)]
        advice = f"; lower {' or '.join(lower)}" if lower else ""
        if "gradient_checkpointing" in flat:
            advice += ", add --gradient-checkpointing or --offload-optimizer"
            torch = sys.modules.get("torch")  # not imported here: that takes seconds
            advice += ", take another GPU (--device cuda:1)" if torch and torch.cuda.device_count() > 1 else ""
            advice += "; python benchmarks/memory.py says which flags fit"
        print(f"error: out of memory ({reason(cause)}){advice}", file=sys.stderr)
    elif isinstance(error, OSError) and (error.filename or error.errno in NO_ROOM):
        room = "; make room on the disk" if error.errno in NO_ROOM else ""
        room += f", then {go_on}" if room and "resume" in flat else ""
        print(f"error: {reason(error)}{room}", file=sys.stderr)
    else:
        raise error
    return 1


NO_ROOM = errno.ENOSPC, errno.EDQUOT, errno.EFBIG


def out_of_memory(error: BaseException | None) -> BaseException | None:
    """The error that says that memory ran out: this one, or one that it hides, as the end of a CUDA graph's capture
    does. None: it did not run out."""
    signs = "out of memory|allocate memory|ALLOC_FAILED"  # torch's own, a CPU's, cuBLAS's
    if error is None or isinstance(error, MemoryError) or re.search(signs, str(error)):
        return error
    return out_of_memory(error.__cause__ or error.__context__)


class Output:
    """A text stream that goes on where the stream behind it can't be written: a pipe whose reader has died, a terminal
    that went away, a full disk. A character that its encoding lacks is written as its escape."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


# ---- Ranges --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """The numbers that a flag allows. In a list, every number is checked; None always passes."""

    low: float = -math.inf
    high: float = math.inf
    open: bool = False  # low itself is not allowed

    def allows(self, number: float) -> bool:
        return (self.low < number if self.open else self.low <= number) and number <= self.high

    def __str__(self) -> str:
        low = f"more than {self.low:g}" if self.open else f"{self.low:g} or more"
        return low if self.high == math.inf else f"{low} and at most {self.high:g}"


Positive = Annotated[float, Range(0, open=True)]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
AtLeast0 = Annotated[int, Range(0)]
AtLeast1 = Annotated[int, Range(1)]
AtLeast2 = Annotated[int, Range(2)]


def ranges(hint) -> list[Range]:
    """All Ranges in a type such as `Positive`, `AtLeast1 | None` or `tuple[Positive, ...]`."""
    found = [part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Range)]
    return found + [limit for part in get_args(hint) if get_args(part) for limit in ranges(part)]


def check_ranges(args) -> None:
    """Fails if a number is not finite or out of its range."""
    hints = get_type_hints(type(args), include_extras=True)
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value)
            continue
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if isinstance(number, float) and not math.isfinite(number):
                fail(f"{as_flag(field.name)} {number}: must be finite")
            for limit in ranges(hints[field.name]):
                if not limit.allows(number):
                    fail(f"{as_flag(field.name)} {number}: must be {limit}")


def as_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def check_minibatch(minibatch_size: int, group_size: int, batch_size: int) -> None:
    """Fails unless a minibatch consists of whole groups and is no larger than the iteration's batch."""
    if minibatch_size % group_size or not group_size <= minibatch_size <= batch_size:
        allowed = f"a multiple of --group-size {group_size}, at most {batch_size} (prompts x group size)"
        fail(f"--minibatch-size {minibatch_size}: must be {allowed}")


def check_folder(flag: str, folder: str) -> None:
    """Fails unless the folder, or its nearest existing parent, is a writable directory."""
    path = Path(folder).resolve()
    nearest = next(place for place in (path, *path.parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        fail(f"{flag} {folder}: can't be written ({nearest} is not a writable directory)")


def check_output(path: str | None, *inputs: str | None) -> None:
    """Fails unless --output is a file that can be written, and none of the inputs."""
    files = {Path(source).resolve() for source in inputs if source and Path(source).is_file()}
    if path and Path(path).resolve() in files:
        fail(f"--output {path}: is an input, which it would replace: take another name")
    if path and Path(path).is_dir():
        fail(f"--output {path}: is a directory, a file's name is expected")
    if path and not os.access(Path(path).resolve().parent, os.W_OK):
        fail(f"--output {path}: its directory is not there or not writable")


def named_directory(run_root: str, run_name: str) -> Path:
    return Path(run_root) / re.sub(r"[^\w.-]", "-", run_name).strip(".")


def check_run_directory(flags) -> None:
    """Fails unless --run-root is writable and --run-name is valid and not taken."""
    check_folder("--run-root", flags.run_root)
    if flags.run_name is None:
        return
    directory = named_directory(flags.run_root, flags.run_name)
    if directory == Path(flags.run_root):
        fail(f"--run-name {flags.run_name}: is not a valid directory name")
    if directory.exists():
        fail(f"--run-name {flags.run_name}: {directory} exists; --resume it, or take another name")


def checkpoint_interval(save_every: int | None, eval_every: int) -> int:
    """Iterations between checkpoints, 0 for none: by default one at every evaluation, so that each has its accuracy."""
    return (eval_every or 50) if save_every is None else save_every


# ---- Groups of flags -----------------------------------------------------------------------------------------------

SYSTEM_PROMPT = (
    "Think about the question first, then answer it. Write your reasoning between <think> and </think>, and after it "
    "only the final answer between <answer> and </answer>, like this: <think>reasoning</think><answer>42</answer>"
)


@dataclass
class SetupFlags:
    """Held-out problems, system prompt, device and dtype."""

    eval_data: str | None = None
    """held-out problems; None: a tenth of --problems, chosen by hash, or a hub dataset's test or validation split"""
    system_prompt: str = SYSTEM_PROMPT
    """system turn of the chat template ('' for none); the embedded model's template ignores it"""
    device: str = "auto"
    """auto | cpu | cuda | cuda:1 ..."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of the weights; auto: bfloat16 on a GPU that has it (with fp32 master weights), else float32"""


@dataclass
class SamplingFlags:
    """Temperature, and the order in which problems are drawn."""

    temperature: Positive = 1.0
    """sampling temperature; also applied to all logprobs"""
    problem_sampling: Literal["uniform", "curriculum", "prioritized"] = "uniform"
    """each problem once per epoch | easy problems first, all by the end of the run | failed problems more often"""
    priority_floor: Share = 0.05
    """prioritized: lowest weight of a problem (the weight is 1 - recent success rate); 0: solved problems come last"""


@dataclass
class OptimizationFlags:
    """Optimizer, and memory use of an update."""

    warmup_iterations: AtLeast0 = 10
    """iterations over which the learning rate rises linearly"""
    micro_batch_tokens: AtLeast1 = 8192
    """tokens (prompt + completion of each row) per forward and backward pass; fewer save memory, same gradient"""
    gradient_checkpointing: bool = False
    """store only each layer's input and recompute the layer in the backward pass: less memory, slower"""
    offload_optimizer: bool = False
    """keep fp32 masters, Adam's state and gradients in host memory: 2 bytes per parameter on the GPU, not 18; slower"""
    max_grad_norm: Positive = 1.0
    """gradients are clipped to this norm"""
    max_bad_updates: AtLeast1 = 10
    """updates with a non-finite loss or gradient are skipped; this many in a row end the run"""


@dataclass
class RunFlags:
    """Evaluation, checkpoints and the run directory."""

    eval_every: AtLeast0 = 25
    """iterations between evaluations; 0: only before and after training"""
    eval_problems: AtLeast1 = 300
    """number of held-out problems per evaluation (SFT, DPO, reward model: also of demonstrations or pairs)"""
    save_every: AtLeast0 | None = None
    """iterations between checkpoints; None: at every evaluation (50 without any); 0: save only the final model"""
    keep_checkpoints: AtLeast0 = 0
    """number of newest checkpoints to keep; 0: all"""
    run_root: str = "runs"
    """parent directory of the run directories"""
    run_name: str | None = None
    """name of the run directory; None: made of script, problems, model, flags that differ, seed and time"""
    resume: str | None = None
    """run directory to continue from its newest checkpoint, with its saved arguments"""


# ---- Parsing -------------------------------------------------------------------------------------------------------

RESUME_MAY_CHANGE = (
    "iterations",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "device",
    "dtype",
    "offload_optimizer",
    "micro_batch_tokens",
    "gradient_checkpointing",
    "run_root",
)


def parse_args(Args, argv: list[str] | None = None):
    """tyro.cli(Args) with every range checked. With `--resume RUN`, the run's saved arguments are the defaults and only
    the flags in RESUME_MAY_CHANGE may differ from them."""
    check_names(Args)
    args = tyro.cli(Args, args=argv)
    if (run := to_flat(args).get("resume")) is not None:
        args = resumed_args(Args, argv, run)
    check_ranges(args)
    if hasattr(args, "run") and args.run.resume is None:
        check_run_directory(args.run)
    return args


def resumed_args(Args, argv: list[str] | None, run: str):
    file = Path(run) / "args.json"
    try:
        default = from_flat(Args(), json.loads(file.read_text()) | {"resume": run})
    except OSError:
        fail(f"--resume {run}: no run directory ({file} can't be read)")
    except (ValueError, TypeError, RecursionError) as error:
        fail(f"--resume {run}: {file} does not hold this script's arguments ({reason(error)})")
    args = tyro.cli(Args, args=argv, default=default)
    before = json.loads(json.dumps(to_flat(default)))  # tuples become lists, as in the file
    for name, value in json.loads(json.dumps(to_flat(args))).items():
        if value != before[name] and name not in RESUME_MAY_CHANGE:
            *allowed, flag = map(as_flag, (*RESUME_MAY_CHANGE, name))
            started = f"the run was started with {before[name]}"
            fail(f"{flag} {value}: {started}; on --resume only {', '.join(allowed)} may differ")
    return args


def check_names(Args) -> None:
    """Fails if two fields have one name: flags of a group have no prefix, so both would be the same flag."""
    owners: dict[str, str] = {}

    def visit(kind: type, group: str) -> None:
        hints = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if dataclasses.is_dataclass(hints[field.name]):
                visit(hints[field.name], f"the group `{field.name}` ({hints[field.name].__name__})")
            elif (first := owners.setdefault(field.name, group)) != group:
                fail(f"{as_flag(field.name)}: both {first} and {group} have a flag of this name; rename one of them")

    visit(Args, "Args")


def to_flat(args) -> dict:
    """All flags by name, including those in groups."""
    flat = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        flat |= to_flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return flat


def from_flat(default, values: dict):
    """`default` with the values of a flat dict. Raises ValueError for a name that is no flag or a value of another
    type."""
    if unknown := values.keys() - to_flat(default).keys():
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
    hints, changes = get_type_hints(type(default)), {}
    for field in dataclasses.fields(default):
        value = getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = from_flat(value, {n: v for n, v in values.items() if n in to_flat(value)})
        elif field.name in values:
            value = values[field.name]
            if get_origin(hints[field.name]) is tuple:
                value = tuple(value) if isinstance(value, list | tuple) else (value,)
            if not fits(value, hints[field.name]):
                raise ValueError(f"{as_flag(field.name)} can't be {value!r}")
            changes[field.name] = value
    return dataclasses.replace(default, **changes)


def fits(value, hint) -> bool:
    """Whether a value is of a flag's type; True for types that no flag here has."""
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return value in parts
    if get_origin(hint) is tuple:
        return all(fits(item, parts[0]) for item in value)
    if get_origin(hint) in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint or hint not in (bool, int, str, NoneType)
