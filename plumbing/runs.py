"""A run on disk: directory, arguments, source, checkpoints, event writer, and Ctrl-C that saves a checkpoint."""

import contextlib
import gc
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from inspect import getfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from transformers.utils import cached_file

from common import resolve_model
from plumbing.files import file_digests, lock, model_fingerprints, read_jsonl, replacing, write_jsonl
from plumbing.flags import (
    NO_ROOM,
    RESUME_MAY_CHANGE,
    as_flag,
    catch_signals,
    check_run_directory,
    checkpoint_interval,
    fail,
    named_directory,
    reason,
    to_flat,
)
from plumbing.statistics import format_table, interval

HEADLINES = "eval/accuracy", "eval/accuracy_greedy", "eval/pair_accuracy"  # columns of TensorBoard's HPARAMS tab


class Run:
    """A run's files. Create it after the last input check, because it writes to disk. It does not affect learning.

    dir, writer: the run directory and its TensorBoard writer. start_from: the newest intact checkpoint's directory if
    the run is resumed, else --model. progress: the last `checkpoint`'s values; iteration and global_step 0 at first.
    """

    def __init__(self, args, tokenizer):
        self._args, self._tokenizer, self._stateful = args, tokenizer, {}
        state = load_checkpoint(args.run.resume)
        self.progress = state.get("progress", {"iteration": 0, "global_step": 0})
        self.start_from, self._saved = state.get("model", args.model), state.get("stateful")
        if self.progress["iteration"] > args.iterations:
            fail(f"--iterations {args.iterations}: the run has done {self.progress['iteration']} already")
        self._models = start_models(args)
        for name, files in state.get("models", {}).items():
            now = self._models.get(name, {})
            if differ := [file for file in sorted({*files, *now}) if files.get(file) != now.get(file)]:
                what = f"{as_flag(name)} {to_flat(args)[name]}: {differ[0]} is not the file that the run began with"
                fail(f"--resume {args.run.resume}: {what}; restore it, or start a new run with --model RUN/final")
        try:
            self.dir = run_directory(args)
            self._lock = lock(self.dir)
            self.writer = self._write_beginning(resumed=bool(state))
        except OSError as error:
            fail(f"--run-root {args.run.run_root}: {error.filename or self.dir} can't be written ({error.strerror})")
        self._stop = StopSignal()
        gc.freeze()  # the libraries' million objects stay alive: garbage collection skips them
        print(f"run directory: {self.dir}")

    def _write_beginning(self, resumed: bool) -> "Writer":
        """Writes what a run writes before it learns: flags and source. Returns the open event writer."""
        args, source = self._args, Path(getfile(type(self._args)))
        (self.dir / "checkpoints").mkdir(exist_ok=True)
        with replacing(self.dir / "args.json") as file:
            file.write_text(json.dumps(to_flat(args) | {"resume": None}, indent=2) + "\n")
        keep_source(source, self.dir, self.progress["iteration"])
        put_events_in_order(self.dir)
        # purge events that the interrupted run wrote after its last checkpoint
        purge = self.progress["global_step"] + resumed if args.run.resume else None
        writer = Writer(self.dir, purge, self.progress["iteration"])
        if not resumed:
            rows = "\n".join(f"| {name} | {value} |" for name, value in to_flat(args).items())
            table = f"| flag | value |\n|---|---|\n{rows}\n\ngit commit: {git_commit(source.parent)}"
            writer.add_text("hyperparameters", table, 0)
            # TensorBoard's HPARAMS tab; SummaryWriter.add_hparams would make a second run for it
            values = {"script": source.stem} | {name: plain(value) for name, value in to_flat(args).items()}
            for summary in hparams(values, dict.fromkeys(HEADLINES, 0.0)):
                writer.file_writer.add_summary(summary)
        return writer

    def restore(self, **stateful) -> None:
        """Registers what checkpoints hold besides the model, and restores it if the run is resumed. stateful: named
        objects with state_dict and load_state_dict, such as the optimizer, the sampler or a critic."""
        self._stateful = stateful
        if self._saved is None:
            return
        if self._saved.keys() != stateful.keys():
            held, needed = (", ".join(sorted(names)) for names in (self._saved, stateful))
            fail(f"--resume {self._args.run.resume}: its checkpoint holds {held}; this script needs {needed}")
        for name, value in stateful.items():
            value.load_state_dict(self._saved.pop(name))

    def checkpoint(self, model, iteration: int, global_step: int, **progress) -> None:
        """Saves every --save-every iterations and at the end (0: never), and on Ctrl-C, which then ends the program.
        progress: further plain values or tensors, available in `self.progress` after a resume."""
        check_plain(progress, "run.checkpoint")
        flags, last = self._args.run, iteration == self._args.iterations
        every = checkpoint_interval(flags.save_every, flags.eval_every)
        if self._stop.number or (every and (last or iteration % every == 0)):
            self.writer.flush()
            state = {"progress": {"iteration": iteration, "global_step": global_step} | progress}
            state["models"] = self._models
            state["stateful"] = {name: value.state_dict() for name, value in self._stateful.items()}
            target = self.dir / "checkpoints" / f"step_{iteration:06d}"
            save_model(target, model, self._tokenizer, state, flags.keep_checkpoints)
        if self._stop.number:
            print(f"stopped; go on with --resume {self.dir}", file=sys.stderr)
            raise SystemExit(128 + self._stop.number)

    def finish(self, model, report: str) -> None:
        """Saves the model in final/, and the report with a row for each checkpoint in report.txt. Prints the report."""
        self.writer.close()
        save_model(self.dir / "final", model, self._tokenizer)
        with replacing(self.dir / "report.txt") as file:
            file.write_text(f"{report}\n\n{report_table(self.dir)}\n", encoding="utf-8")
        self._stop.restore()
        print(f"\n{report}\n\nmodel: {self.dir / 'final'}\ncurves: tensorboard --logdir {self.dir}")


class Writer(SummaryWriter):
    """TensorBoard's writer. Scalars also go to metrics.jsonl, held-out samples to samples.jsonl. Each line is written
    at once, so before the checkpoint that counts it; a resumed run drops the lines from purge_step on."""

    def __init__(self, directory: Path, purge_step: int | None, iteration: int):
        super().__init__(str(directory), purge_step=purge_step)
        self.iteration = iteration  # the number of iterations logged
        self.paths = {name: directory / f"{name}.jsonl" for name in ("metrics", "samples")}
        for path in self.paths.values():
            write_jsonl(path, [row for row in read_jsonl(path, cut=True) if row["step"] < (purge_step or 0)])

    def add_scalar(self, tag, scalar_value, global_step=None, *args, **options) -> None:
        super().add_scalar(tag, scalar_value, global_step, *args, **options)
        self.add_row("metrics", {tag: scalar_value}, global_step)

    def add_scalars_as_row(self, scalars: dict[str, float], global_step: int) -> None:
        for tag, value in scalars.items():
            super().add_scalar(tag, value, global_step)
        self.add_row("metrics", scalars, global_step)

    def add_row(self, name: str, values: dict, global_step: int) -> None:
        """Appends a line. Strict JSON has no NaN and no infinity: they become null."""
        values = {key: number(value) if name == "metrics" else value for key, value in values.items()}
        row = {"iteration": self.iteration, "step": global_step or 0} | values
        with self.paths[name].open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def number(value) -> float | None:
    return float(value) if math.isfinite(value) else None


def report_table(directory: Path) -> str:
    """A row for each checkpoint: accuracy on held-out problems (a reward model's: pairs) with its 95% interval."""
    evaluations = {}
    for row in read_jsonl(directory / "metrics.jsonl"):
        for rate, count in (("eval/accuracy", "eval/problems"), ("eval/pair_accuracy", "eval/pairs")):
            if row.get(rate) is not None and row.get(count):
                low, high = interval(row[rate], row[count])
                evaluations[row["iteration"]] = [row[rate], f"{low:.3f} to {high:.3f}"]
    saved = [path.name for path in reversed(checkpoints(directory / "checkpoints"))]
    rows = [[name, *evaluations.get(int(name.removeprefix("step_")), ["not evaluated", ""])] for name in saved]
    return format_table(["checkpoint", "held-out accuracy", "95% interval"], rows) if rows else "no checkpoints"


def check_plain(value, name: str) -> None:
    """Raises TypeError for what torch.load(weights_only=True) would refuse: no checkpoint could be resumed."""
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            check_plain(item, f"{name}: {key}")
    elif not isinstance(value, torch.Tensor | str | bool | int | float | None):
        raise TypeError(
            f"{name}: a checkpoint holds numbers, text, tensors, lists and dicts, no {type(value).__name__}"
        )


def run_directory(args) -> Path:
    """The resumed run's directory, or a new one under --run-root, made here; its name is --run-name, or made of script,
    data, model, flags that differ from the defaults, seed and time. No other run has it, even if it starts at the same
    moment."""
    flags = args.run
    if flags.resume:
        return Path(flags.resume)
    check_run_directory(flags)
    if flags.run_name is not None:
        directory = named_directory(flags.run_root, flags.run_name)
    else:
        model, script = Path(args.model), Path(getfile(type(args))).stem
        if model.name == "final":  # the result of another run: use that run's script name
            model = Path(model.resolve().parent.name.partition("__")[0] + "-final")
        data = getattr(args, "data", None) or args.problems
        data = "+".join(Path(source).stem for source in (data if isinstance(data, tuple) else [data]))
        names = [cut(part, 50) for part in (script, data, model.name)] + changed_flags(args, 60)
        parts = *names, f"s{args.seed}", time.strftime("%Y%m%d-%H%M%S")  # a file's name has at most 255 bytes
        directory = Path(flags.run_root) / re.sub(r"[^\w.-]", "-", "__".join(parts))
    directory.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            directory.mkdir()  # fails if it exists: of two runs only one succeeds
            return directory
        except FileExistsError:
            if flags.run_name is not None:
                fail(f"--run-name {flags.run_name}: {directory} exists; --resume it, or take another name")
            directory = directory.with_name(directory.name + "x")


def cut(text: str, size: int) -> str:
    """The first `size` bytes of the text, in whole characters."""
    return text.encode()[:size].decode(errors="ignore")


IN_THE_NAME = {"model", "data", "problems", "seed", "run_root", "run_name", "resume"}


def changed_flags(args, size: int) -> list[str]:
    """[] or one text of at most `size` bytes: the flags that differ from the script's defaults, such as
    "learning-rate-0.0003_no-normalize-std"; those that --resume may change come last. Where not all fit, the last word
    counts the others."""
    default, words = to_flat(type(args)()), []
    for name, value in sorted(to_flat(args).items(), key=lambda flag: flag[0] in RESUME_MAY_CHANGE):
        if name in IN_THE_NAME or value == default[name]:
            continue
        shown = "+".join(map(str, value)) if isinstance(value, tuple | list) else plain(value)
        flag = name.replace("_", "-")
        words.append(
            ("" if value else "no-") + flag if isinstance(value, bool) else f"{flag}-{Path(str(shown)).name[:20]}"
        )
    kept = len(words)
    while kept and len("_".join(words[:kept]).encode()) > size - (len("_and-99-more") if kept < len(words) else 0):
        kept -= 1
    more = [f"and-{len(words) - kept}-more"] if kept < len(words) else []
    return ["_".join(words[:kept] + more)] if words else []


def plain(value) -> bool | int | float | str:
    return value if isinstance(value, bool | int | float) else str(value)


def start_models(args) -> dict[str, dict[str, str]]:
    """The fingerprints of the models that a run is made from, by flag."""
    found = {}
    for name, path in to_flat(args).items():
        if path and re.search("(^|_)model$", name):
            with contextlib.suppress(OSError):  # no such model: whoever loads it says so
                if config := cached_file(resolve_model(path), "config.json"):
                    found[name] = model_fingerprints(Path(config).parent)
    return found


def put_events_in_order(directory: Path) -> None:
    """TensorBoard reads event files in the order of their names, which begin with the time. Gives files from the
    future, after the clock was set back, names that come first: else a resumed run's values would be purged by older
    ones."""
    files = sorted(directory.glob("events.out.tfevents.*"))
    if files and int(files[-1].name.split(".")[3]) >= int(time.time()):
        for number, file in enumerate(files):
            parts = file.name.split(".")
            file.rename(file.with_name(".".join([*parts[:3], f"{number:010d}", *parts[4:]])))


def keep_source(source: Path, directory: Path, iteration: int) -> None:
    """Copies the script into the run directory; a resumed run whose script has changed keeps both."""
    copy = directory / source.name
    if copy.exists() and copy.read_bytes() != source.read_bytes():
        print(f"note: {source.name} has changed since the run began", file=sys.stderr)
        copy = directory / f"{source.stem}_from_{iteration:06d}.py"
    shutil.copyfile(source, copy)


def git_commit(folder: Path) -> str:
    """The commit's hash, with "-dirty" if the work tree differs from it; untracked files count."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True).stdout.strip()

    try:
        return (git("rev-parse", "HEAD") or "unknown") + ("-dirty" if git("status", "--porcelain") else "")
    except OSError:  # no git here
        return "unknown"


class StopSignal:
    """The first Ctrl-C, SIGTERM or SIGHUP (a lost connection) only sets `number`: the run finishes the iteration, saves
    a checkpoint and exits. The second one stops at once."""

    def __init__(self):
        self.number, self.before = 0, catch_signals(self.handle)

    def handle(self, number, frame) -> None:
        self.number = number
        print("\nstopping after this iteration, with a checkpoint; interrupt again to stop at once", file=sys.stderr)
        self.restore()

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---- Checkpoints ---------------------------------------------------------------------------------------------------


def save_model(target: Path, model, tokenizer, state: dict | None = None, keep: int = 0) -> None:
    """Writes an ordinary Hugging Face directory; with a state also trainer.pt and the digests by which
    `load_checkpoint` detects damaged files.

    It writes to a temporary directory and renames that, so `target` is never incomplete, even if the process is killed.
    keep: once this checkpoint is complete, only this many of the newest are kept; 0: all.
    """
    for name, weight in model.named_parameters():
        # the sum is ten times as fast to test; of huge weights it may overflow, so then each is tested
        if not weight.detach().sum().isfinite() and not weight.isfinite().all():
            what = f"{target}: not saved, {name} holds NaN or infinite weights"
            fail(f"{what}: go on from an older checkpoint, with a lower --learning-rate")
    aside, old = target.with_name(target.name + ".tmp"), target.with_name(target.name + ".old")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        add_older_names(aside)
        if state is not None:
            torch.save(state, aside / "trainer.pt")
            (aside / "digests.json").write_text(json.dumps(file_digests(aside)))
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)  # left by a killed process
            os.rename(target, old)
        os.rename(aside, target)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not re.search("StreamWriter|inline_container|iostream", str(error)):
            raise  # not one of torch's write errors
        shutil.rmtree(aside, ignore_errors=True)
        place = next(folder for folder in target.parents if folder.exists())
        free = f"{shutil.disk_usage(place).free / 1e9:.3f} GB are free there"
        denied = isinstance(error, OSError) and error.errno not in NO_ROOM
        do = "Make it writable" if denied else "Make room"
        fail(f"{target} can't be written ({reason(error)}; {free}). {do}, then go on with --resume")
    except KeyboardInterrupt:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    newest_first = checkpoints(target.parent)
    written = newest_first[newest_first.index(target) :] if target in newest_first else []  # newer ones are damaged
    for outdated in written[keep:] if keep else []:
        shutil.rmtree(outdated)


def add_older_names(directory: Path) -> None:
    """Adds to a saved model what transformers 4 reads, which ignores the names of version 5 in silence: the rope's base
    would be 10,000 whatever the model's. Version 5 reads both."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        rope = part.get("rope_parameters")
        if isinstance(rope, dict) and "rope_theta" in rope:
            scaled = rope.get("rope_type", "default") != "default"
            part |= {"rope_theta": rope["rope_theta"], "rope_scaling": rope if scaled else None}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text()) if path.exists() else {}
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    if settings:
        path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def checkpoints(directory: Path) -> list[Path]:  # the newest first
    return sorted(directory.glob("step_*[0-9]"), key=lambda path: int(path.name.removeprefix("step_")), reverse=True)


def load_checkpoint(run: str | None) -> dict:
    """The state of a run's newest intact checkpoint, with its directory as "model"; {} without a run, or if the run has
    no checkpoint yet and starts over."""
    if not run:
        return {}
    directories = checkpoints(Path(run) / "checkpoints")
    for directory in directories:
        try:
            digests = json.loads((directory / "digests.json").read_text())
            if digests != file_digests(directory, list(digests)):  # other files, such as .DS_Store, don't matter
                raise ValueError("its files don't match their digests")
            # mapped: an offloaded optimizer fills the memory that a copy of its state would take
            state = torch.load(directory / "trainer.pt", weights_only=True, map_location="cpu", mmap=True)
        except Exception as error:  # json, torch and the file system raise anything on damaged files
            print(f"warning: {directory} is damaged ({reason(error)}); trying the one before it", file=sys.stderr)
            continue
        return state | {"model": str(directory)}
    if directories:
        fail(f"--resume {run}: none of its checkpoints is whole; start a new run")
    if (Path(run) / "final").exists():
        fail(f"--resume {run}: the run has finished and kept no checkpoint (--save-every 0); start a new run")
    print(f"note: {run} has no checkpoint yet: starting over in this directory", file=sys.stderr)
    return {}
