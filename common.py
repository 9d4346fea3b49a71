"""What several scripts call identically and no algorithm box contains: models, group sampling (its code is in
sampling.py), logprobs of completions, batches, the optimizer over fp32 master weights, runs and checkpoints.
"""

import dataclasses
import errno
import gc
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from inspect import getfile
from pathlib import Path
from typing import NoReturn

import torch
import tyro
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from sampling import (  # noqa: F401  for the scripts, which call them as common.*
    PackedGroups,
    Rollout,
    micro_batches,
    minibatches,
    sample_groups,
    take,
    takes_groups,
)

transformers_logging.disable_progress_bar()  # "Loading weights", "Writing model shards": ours is the one to watch


def fail(message: str) -> NoReturn:
    """Bad input: one clear line on stderr and exit code 2, no traceback."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def reason(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def derive_seed(*parts) -> int:
    """A seed from (args.seed, step, purpose, ...): every draw has one of its own, so a resumed run draws the same."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


# ---- Models and tokenizers -----------------------------------------------------------------------------------------


def resolve_device(device: str) -> torch.device:
    """auto: the GPU where there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
        if resolved.type == "cuda" and resolved.index is not None:
            torch.cuda.set_device(resolved)  # streams and graphs are the current device's
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {device}: not usable on this machine ({reason(error)}); try --device auto")
    print(f"device: {resolved}")
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 on a GPU (with fp32 master weights, see `MasterAdamW`), float32 on a CPU."""
    auto = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, auto if dtype == "auto" else dtype)


def load_config(path: str, flag: str = "--model"):
    """The model's config, or one line that says what is wrong with the path."""
    local = Path(path).is_dir()
    if local and not (Path(path) / "config.json").exists():
        fail(f"{flag} {path}: the directory has no config.json; a Hugging Face model directory is expected")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, and whatever the hub client raises
        what = "its config can't be read" if local else "neither a local directory nor a hub name that can be reached"
        fail(f"{flag} {path}: {what} ({reason(error)})")


def load_tokenizer(path: str, flag: str = "--model") -> Tokenizer:
    load_config(path, flag)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        fail(f"{flag} {path}: its tokenizer can't be loaded ({reason(error)})")
    if tokenizer.eos_token_id is None:
        fail(f"{flag} {path}: its tokenizer has no EOS token, so no completion could ever end")
    if not tokenizer.chat_template:
        print(f"note: {path} has no chat template: prompts are the bare questions", file=sys.stderr)
    return tokenizer


def load_weights(auto_class, path: str, device, dtype, from_scratch: bool = False, **options) -> PreTrainedModel:
    """A model in eval mode, where all of ours stay: dropout in the rollouts, or between them and the first update,
    would move the importance ratio away from 1 before anything was learned.

    from_scratch: random weights from the config alone.
    """
    # On CPUs with bf16 instructions "medium" makes fp32 products twice as fast, in three bf16 passes (error 4e-6). With
    # AMX it would be one pass, and on a GPU TF32: too coarse for logprobs that sampler and trainer should agree on.
    # With it torch's fused CPU attention is 5 to 9 times slower than the same written as plain products ("eager").
    medium = torch.device(device).type == "cpu" and not torch.cpu._is_amx_tile_supported()
    torch.set_float32_matmul_precision("medium" if medium else "highest")
    attention = "eager" if medium and dtype == torch.float32 else None
    # On a CPU, torch keeps what it compiled for each of the last 1,024 shapes of a product, in two caches, and every
    # batch of ragged rows brings new shapes: gigabytes for nothing.
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "32")
    options |= {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": False}
    try:
        if from_scratch:
            return auto_class.from_config(load_config(path), **options).to(device).eval()
        return auto_class.from_pretrained(path, use_safetensors=True, **options).to(device).eval()
    except Exception as error:
        fail(f"{path}: its weights can't be loaded ({reason(error)})")


def load_policy(
    path: str, device="cpu", dtype=torch.float32, eos_token_id: int | None = None, from_scratch: bool = False
) -> PreTrainedModel:
    """The causal LM. eos_token_id: the tokenizer's; completions end there too, not only where the model's generation
    config says."""
    model = load_weights(AutoModelForCausalLM, path, device, dtype, from_scratch)
    # A new generation config, with nothing in it but where to stop: what is trained is the plain softmax.
    named = model.generation_config.eos_token_id
    stops = sorted({*(named if isinstance(named, list) else [named]), eos_token_id} - {None}) or None
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=model.config.pad_token_id)
    return model


def load_value_model(path: str, device="cpu", dtype=torch.float32, auto_class=AutoModelForTokenClassification):
    """A critic: the path's backbone under a head of its own, which begins at 0, so that V = 0 before it has learned."""
    transformers_logging.set_verbosity_error()  # that the head is new is as it should be
    model = load_weights(auto_class, path, device, dtype, num_labels=1)
    transformers_logging.set_verbosity_warning()
    for parameter in value_head(model).parameters():
        nn.init.zeros_(parameter)
    return model


def value_head(model: PreTrainedModel) -> nn.Module:
    return getattr(model, "score", None) or model.classifier


def load_reward_model(path: str, device="cpu", dtype=torch.float32, new_head=False, flag="--reward-model"):
    """A sequence classifier with one label, such as train_rm.py writes. new_head: any path's backbone, a head of 0."""
    if new_head:
        return load_value_model(path, device, dtype, AutoModelForSequenceClassification)
    if (labels := load_config(path, flag).num_labels) != 1:
        fail(f"{flag} {path}: has {labels} labels, a reward model has one")
    return load_weights(AutoModelForSequenceClassification, path, device, dtype)


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Gradient checkpointing: of each layer only the input is kept for the backward pass, which computes it again. (Not
    transformers' own, which asks for train mode, and so for dropout.)"""
    for layer in max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len):

        def forward(*args, run=layer.forward, **kwargs):
            if not torch.is_grad_enabled():
                return run(*args, **kwargs)
            return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        layer.forward = forward


# ---- Logprobs of completions ---------------------------------------------------------------------------------------


def make_rollout(prompts: list[list[int]], completions: list[list[int]], group_size: int = 1, device="cpu") -> Rollout:
    """A Rollout of given completions (token ids, EOS included), for training on data that nobody sampled here."""
    ids = pad_sequence([torch.tensor(c) for c in completions], batch_first=True).to(device)
    lengths = torch.tensor([len(c) for c in completions], device=device)
    mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    return Rollout(prompts, ids, mask, torch.zeros(ids.shape, device=device), mask.any(1), group_size)


class PaddedRows:
    """What PackedGroups is, for models whose attention is their own: each row after its prompt, right-padded. Under a
    causal mask nothing real can see the padding, so no mask is needed and positions simply count."""

    def __init__(self, prompts: list[list[int]], completions: Tensor, mask: Tensor, group: Tensor):
        heads = [torch.tensor(prompts[p], device=completions.device) for p in group.tolist()]
        rows = [torch.cat([head, ids[m]]) for head, ids, m in zip(heads, completions, mask, strict=True)]
        self.ids = pad_sequence(rows, batch_first=True)
        row, column = mask.nonzero(as_tuple=True)
        starts = torch.tensor([len(head) for head in heads], device=row.device)
        starts += torch.arange(len(rows), device=row.device) * self.ids.shape[1]
        self.predictor, self.ends = starts[row] + column - 1, starts + mask.sum(1) - 1

    def logits(self, model: nn.Module) -> Tensor:
        return self.run(model)[self.predictor]

    def run(self, model: nn.Module) -> Tensor:
        return model(self.ids, use_cache=False)[0].flatten(0, 1)


def pack_rows(model: PreTrainedModel, rollout: Rollout, rows: list[int]) -> PackedGroups | PaddedRows:
    """A rollout's rows as the model takes them. run(model) gives its output at all tokens; `predictor` (N,) says which
    of them predict the N completion tokens, in the order of mask[rows].nonzero(), and `ends` (R,) where rows end."""
    mask, prompts = rollout.mask[rows], {row // rollout.group_size: None for row in rows}
    mask = mask[:, : int(mask.sum(1).max())]
    number = {p: i for i, p in enumerate(prompts)}
    group = torch.tensor([number[row // rollout.group_size] for row in rows], device=mask.device)
    kind = PackedGroups if takes_groups(model) else PaddedRows
    return kind([rollout.prompt_ids[p] for p in prompts], rollout.completion_ids[rows, : mask.shape[1]], mask, group)


LOGITS_AT_ONCE = 2**25  # fp32 elements: 128 MB


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """True where logits = output embedding of the last hidden state, to the bit: no soft-capping, scaling or bias
    in between. Found out by trying, once for a model."""
    if not hasattr(model, "plain_head"):
        ids, head = torch.tensor([[0, 1]], device=model.device), model.get_output_embeddings()
        try:
            hidden = model.base_model(ids, use_cache=False)[0]
            model.plain_head = torch.equal(hidden @ head.weight.T, model(ids, use_cache=False).logits)
        except (RuntimeError, TypeError, AttributeError):  # no head of its own, or none that takes these hidden states
            model.plain_head = False
        if not model.plain_head:
            print("note: this model's head is not a plain linear layer: logprobs take more memory", file=sys.stderr)
    return model.plain_head


def slices(hidden: Tensor, weight: Tensor | None) -> list[slice]:
    """Of the rows, so that LOGITS_AT_ONCE is kept."""
    size = max(1, LOGITS_AT_ONCE // (hidden.shape[1] if weight is None else len(weight)))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


class HeadLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature) at the targets (N,), and its entropy (N,), in fp32, from hidden
    (N, H): logits exist for a chunk of rows at a time, forward and, computed again, backward. weight None: hidden are
    the logits already."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature):
        logprobs, entropy, normalizers = (torch.empty(len(hidden), device=hidden.device) for _ in range(3))
        for rows in slices(hidden, weight):
            logits = (hidden[rows] if weight is None else hidden[rows] @ weight.T).float() / temperature
            normalizers[rows] = logits.logsumexp(-1)
            logprobs[rows] = logits.gather(1, targets[rows, None])[:, 0] - normalizers[rows]
            logits -= normalizers[rows, None]
            entropy[rows] = -(logits.exp() * logits.clamp(min=-1e4)).sum(-1)  # 0 * -inf would be NaN
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, gradient, _):
        hidden, weight, targets, normalizers = ctx.saved_tensors
        hidden_gradient, gradient = torch.empty_like(hidden), gradient / ctx.temperature
        weight_gradient = None if weight is None else torch.zeros_like(weight, dtype=torch.float32)
        for rows in slices(hidden, weight):
            logits = (hidden[rows] if weight is None else hidden[rows] @ weight.T).float() / ctx.temperature
            # d logprob / d logits = (one at the target) - softmax
            error = logits.sub_(normalizers[rows, None]).exp_().mul_(-gradient[rows, None])
            error.scatter_add_(1, targets[rows, None], gradient[rows, None])
            error = error.to(hidden.dtype)
            hidden_gradient[rows] = error if weight is None else error @ weight
            if weight is not None:
                weight_gradient += error.T @ hidden[rows]
        return hidden_gradient, weight if weight is None else weight_gradient.to(weight.dtype), None, None


def completion_logprobs(
    model: PreTrainedModel, rollout: Rollout, rows: list[int], temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """logprobs and entropy (without gradient), both (R, T) and 0 on padding, of the completions in `rows`, in one
    forward pass."""
    batch, mask = pack_rows(model, rollout, rows), rollout.mask[rows]
    targets = rollout.completion_ids[rows][mask]  # (N,)
    if has_plain_head(model):
        hidden = take(batch.run(model.base_model), batch.predictor)
        logprobs, entropy = HeadLogprobs.apply(hidden, model.get_output_embeddings().weight, targets, temperature)
    else:
        logprobs, entropy = HeadLogprobs.apply(batch.logits(model), None, targets, temperature)
    zeros = torch.zeros(mask.shape, device=mask.device)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropy)


def completion_values(value_model: PreTrainedModel, rollout: Rollout, rows: list[int]) -> Tensor:
    """V(s_t), (R, T) and 0 on padding: read where token t is predicted, before it is known."""
    batch, mask = pack_rows(value_model, rollout, rows), rollout.mask[rows]
    values = value_head(value_model)(take(batch.run(value_model.base_model), batch.predictor))[:, 0].float()
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, values)


def completion_scores(reward_model: PreTrainedModel, rollout: Rollout, rows: list[int]) -> Tensor:
    """(R,) scores of whole completions, read at the last real token: by its index, since a search for the pad id (as
    the model's own forward does) stops short where the pad is the EOS. `score_mean` of its config is subtracted."""
    batch = pack_rows(reward_model, rollout, rows)
    scores = reward_model.score(batch.run(reward_model.base_model)[batch.ends])[:, 0].float()
    return scores - getattr(reward_model.config, "score_mean", 0.0)


def token_weights(mask: Tensor, loss_norm: str, max_new_tokens: int) -> Tensor:
    """(B, T) weights with which a per-token loss is summed, exactly 0 where mask is False; of the whole minibatch at
    once, so that its split into micro-batches can't change the gradient.

    "sequence": mean over rows of the mean over each row's tokens (DeepSeekMath, arXiv:2402.03300, eq. 3).
    "token": mean over all tokens (DAPO, arXiv:2503.14476, eq. 8).
    "constant": sum over a row's tokens / max_new_tokens, mean over rows (Dr. GRPO, arXiv:2503.20783).
    """
    m = mask.float()
    if loss_norm == "sequence":
        return m / m.sum(1, keepdim=True).clamp(min=1) / len(m)
    if loss_norm == "token":
        return m / m.sum().clamp(min=1)
    if loss_norm == "constant":
        return m / (len(m) * max_new_tokens)
    raise ValueError(f"loss_norm is 'sequence', 'token' or 'constant', not {loss_norm!r}")


# ---- The optimizer -------------------------------------------------------------------------------------------------


class MasterAdamW(torch.optim.AdamW):
    """AdamW whose parameters are fp32 master copies of the model's weights (the weights themselves if they are fp32).
    At a learning rate of 1e-6 most steps are smaller than bf16 can resolve; here they add up. Gradients are collected
    in fp32 too, over all micro-batches. Use it as any optimizer, but clip `optimizer.masters`.
    """

    def __init__(self, model: nn.Module, lr: float, **options):
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.masters = [w if w.dtype == torch.float32 else w.detach().float() for w in self.weights]
        for weight, master in zip(self.weights, self.masters, strict=True):
            if master is not weight:
                weight.register_post_accumulate_grad_hook(lambda w, master=master: self.collect(w, master))
        super().__init__(self.masters, lr=lr, weight_decay=options.pop("weight_decay", 0.0), fused=True, **options)

    @staticmethod
    def collect(weight: Tensor, master: Tensor) -> None:
        master.grad = weight.grad.float() if master.grad is None else master.grad.add_(weight.grad)
        weight.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for weight, master in zip(self.weights, self.masters, strict=True):
            if master is not weight:
                weight.copy_(master)  # in place: the sampler reads the same tensors


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


# ---- Runs: arguments, directory, checkpoints -----------------------------------------------------------------------

RESUME_MAY_CHANGE = ("iterations", "eval_every", "save_every", "keep_checkpoints", "device", "run_root")


def parse_args(Args, argv: list[str] | None = None):
    """tyro.cli(Args). With `--resume RUN` the run's saved arguments are the defaults, and only those of
    RESUME_MAY_CHANGE may differ from them."""
    argv = sys.argv[1:] if argv is None else argv
    run = next((a.partition("=")[2] for a in argv if a.startswith("--resume=")), None)
    if "--resume" in argv[:-1]:
        run = argv[argv.index("--resume") + 1]
    if run is None:
        return tyro.cli(Args, args=argv)
    file = Path(run) / "args.json"
    try:
        saved = Args(**json.loads(file.read_text()))
    except OSError:
        fail(f"--resume {run}: no run directory ({file} can't be read)")
    except (ValueError, TypeError) as error:
        fail(f"--resume {run}: {file} does not hold this script's arguments ({error})")
    args = tyro.cli(Args, args=argv, default=dataclasses.replace(saved, resume=run))
    for name, value in vars(args).items():
        if value != getattr(saved, name) and name not in (*RESUME_MAY_CHANGE, "resume"):
            *allowed, flag = ("--" + n.replace("_", "-") for n in (*RESUME_MAY_CHANGE, name))
            started = f"the run was started with {getattr(saved, name)}"
            fail(f"{flag} {value}: {started}; on --resume only {', '.join(allowed)} may differ")
    return args


def start_run(args, state: dict) -> tuple[Path, SummaryWriter]:
    """The run directory (of the resumed run, or a new one under --run-root) with args.json, and its event writer.

    state: of the checkpoint that is gone on from, or {}. Events after it, written by the run before it was
    interrupted, are purged.
    """
    if state.get("iteration", 0) > args.iterations:
        fail(f"--iterations {args.iterations}: the run has done {state['iteration']} already")
    script = Path(getfile(type(args))).stem
    if args.resume:
        run_dir = Path(args.resume)
    else:
        data = getattr(args, "data", None) or args.problems
        parts = script, Path(data).stem, Path(args.model).name, f"s{args.seed}", time.strftime("%Y%m%d-%H%M%S")
        run_dir = Path(args.run_root) / re.sub(r"[^\w.-]", "-", "__".join(parts))
        while run_dir.exists():
            run_dir = run_dir.with_name(run_dir.name + "x")
    try:
        (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run_dir / "args.json.tmp").write_text(json.dumps(vars(args) | {"resume": None}, indent=2) + "\n")
        os.replace(run_dir / "args.json.tmp", run_dir / "args.json")
        writer = SummaryWriter(str(run_dir), purge_step=state.get("x", -1) + 1 if args.resume else None)
    except OSError as error:
        fail(f"--run-root {args.run_root}: {run_dir} can't be written ({error.strerror})")
    sys.excepthook = explain
    if not state:
        rows = "\n".join(f"| {name} | {value} |" for name, value in vars(args).items())
        writer.add_text("hyperparameters", f"| flag | value |\n|---|---|\n{rows}\n\ngit commit: {git_commit()}", 0)
    print(f"run directory: {run_dir}")
    gc.freeze()  # the libraries' million objects stay: no garbage collection needs to walk through them again
    return run_dir, writer


def explain(kind, error, trace) -> None:
    """What a run prints when it ends in an error: one line where memory or disk space is what was missing."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        lower = "--micro-batch-tokens (training), or --prompts-per-step, --group-size or --max-new-tokens (sampling)"
        print(f"error: out of memory ({reason(error)}); lower {lower}", file=sys.stderr)
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        print(f"error: {reason(error)}; make room on the disk, then go on with --resume", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        print("stopped at once; go on from the newest checkpoint with --resume", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def git_commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        return "unknown"


class StopSignal:
    """The first Ctrl-C or SIGTERM only sets `number`, and the script ends its iteration, saves and leaves."""

    def __init__(self):
        self.number = 0
        self.before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(self, number, frame) -> None:
        self.number = number
        print("\nstopping after this iteration, with a checkpoint; once more to stop at once", file=sys.stderr)
        self.restore()

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def leave(self, run_dir: Path) -> NoReturn:
        print(f"stopped; go on with --resume {run_dir}", file=sys.stderr)
        raise SystemExit(128 + self.number)


def file_digests(directory: Path) -> dict[str, str]:
    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return {path.name: digest(path) for path in sorted(directory.iterdir()) if path.name != "digests.json"}


def save_checkpoint(
    target: Path, model, tokenizer, optimizer: MasterAdamW | None = None, state: dict | None = None, keep: int = 0
):
    """An ordinary Hugging Face directory. With an optimizer also trainer.pt, all that the run needs to go on exactly,
    and the digests by which `load_checkpoint` knows that everything is whole.

    It is written aside and renamed: `target` is never there in part, whenever the process is killed. state: plain
    values and tensors, "x" among them. keep: all but so many checkpoints are deleted once this one is whole; 0: none.
    """
    aside, old = target.with_name(target.name + ".tmp"), target.with_name(target.name + ".old")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        if optimizer is not None:
            torch.save(state | optimizer_state(optimizer), aside / "trainer.pt")
            (aside / "digests.json").write_text(json.dumps(file_digests(aside)))
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)  # a kill may have left one
            os.rename(target, old)
        os.rename(aside, target)
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not re.search("StreamWriter|inline_container|iostream", str(error)):
            raise  # not torch's way to say that it can't write
        free = f"{shutil.disk_usage(target.parent).free / 1e9:.3f} GB are free there"
        shutil.rmtree(aside, ignore_errors=True)
        fail(f"{target} can't be written ({reason(error)}; {free}). Make room, then go on with --resume")
    shutil.rmtree(old, ignore_errors=True)
    written = [path for path in checkpoints(target.parent) if path.name <= target.name]  # a newer one is damaged
    for outdated in written[keep:] if keep else []:
        shutil.rmtree(outdated)


def checkpoints(directory: Path) -> list[Path]:  # the newest first
    return sorted(directory.glob("step_*[0-9]"), reverse=True)


def load_checkpoint(run: str | None) -> dict:
    """The state of a run's newest whole checkpoint, with its directory as "model"; {} for no run, or for one that
    has no checkpoint yet and so starts over."""
    if not run:
        return {}
    directories = checkpoints(Path(run) / "checkpoints")
    for directory in directories:
        try:
            if json.loads((directory / "digests.json").read_text()) != file_digests(directory):
                raise ValueError("its files are not as they were written")
            state = torch.load(directory / "trainer.pt", weights_only=True, map_location="cpu")
            return state | {"model": str(directory)}
        except Exception as error:  # whatever a damaged file makes json, torch or the file system raise
            print(f"warning: {directory} is damaged ({reason(error)}); trying the one before it", file=sys.stderr)
    if directories:
        fail(f"--resume {run}: none of its checkpoints is whole")
    print(f"note: {run} has no checkpoint yet: starting over in it", file=sys.stderr)
    return {}


def optimizer_state(optimizer: MasterAdamW) -> dict:
    masters = [] if optimizer.masters[0] is optimizer.weights[0] else optimizer.masters
    return {"optimizer": optimizer.state_dict(), "masters": masters}


def restore_optimizer(optimizer: MasterAdamW, state: dict) -> None:
    optimizer.load_state_dict(state.pop("optimizer"))
    with torch.no_grad():
        for master, saved in zip(optimizer.masters, state.pop("masters"), strict=False):  # [] where weights are fp32
            master.copy_(saved)
