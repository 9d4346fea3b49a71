"""The forks of docs/forking.md, as a reader makes them: train_grpo.py copied, the page's blocks applied, the copy run.
A block that no longer fits the script fails here."""

import http.server
import json
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import EMBEDDED, assert_same_events, remember, run, scalars, short_args, weights
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import common
import train_grpo
import train_sft
from data import encode_problems, load_eval_problems, load_problems
from plumbing.evaluation import SAMPLES, HeldOut, evaluate
from plumbing.files import write_jsonl
from plumbing.flags import parse_args
from rewards import Verifier

SCRIPT = Path("train_grpo.py")
BLOCK = re.compile(r"```(diff|python)\n(.*?)```", re.DOTALL)
SECTIONS = {
    title: BLOCK.findall(body)
    for title, body in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", Path("docs/forking.md").read_text(), re.M | re.S)
    if BLOCK.search(body)
}
_, LEAVE_ONE_OUT, OWN_LOSS, ENTROPY, LION, BEST, OWN_REWARD, OWN_TASK, MOVING_REF, LAYERS, ADAPTERS, *RECENT = SECTIONS
HIGH_ENTROPY, TOP_P, DISTILLATION, TOOL, JUDGE = RECENT
FLAGS = {  # that give a section's fork something to resume
    LEAVE_ONE_OUT: {"kl_coef": 0.5},
    OWN_LOSS: {"baseline_shift": -0.1, "ratio_bounds": (0.0, 4.0), "update_epochs": 2},
    ENTROPY: {"entropy_coef": 0.1},
    LION: {"dtype": "bfloat16", "learning_rate": 1e-4},
    BEST: {"eval_every": 1},
    MOVING_REF: {"dtype": "bfloat16", "kl_coef": 0.5},
    HIGH_ENTROPY: {"update_epochs": 2, "minibatch_size": 8},
    TOP_P: {"top_p": 0.9},
    DISTILLATION: {"update_epochs": 2, "minibatch_size": 8},
}


def apply(diff: str, script: list[str]) -> list[str]:
    """Each hunk's old lines must stand in the script exactly once, at the place that the page names. The page may leave
    out a comment at a line's end."""
    for hunk in re.split("^@@ ", diff, flags=re.M)[1:]:
        place, *lines = hunk.splitlines()
        old = [line[1:] for line in lines if line[0] != "+"]
        codes = [line if line in old else line.partition("  # ")[0] for line in script]
        found = [i for i in range(len(script)) if codes[i : i + len(old)] == old]
        assert len(found) == 1, f"{place}: {old} is there {len(found)} times"
        start, end = found[0], found[0] + len(old)
        heads = [re.match(r"(?:def|class) (\w+)|    +# -{20,} (.+)", line) for line in script[:end]]
        names = [head[1] or head[2] for head in heads if head]
        assert names[-1:] == {"imports": [], "above main": ["main"], "end": ["7 evaluate and save"]}.get(place, [place])
        old_lines = iter(script[start:end])
        new = []
        for line in lines:
            kept = None if line[0] == "+" else next(old_lines)
            new += [line[1:]] * (line[0] == "+") + [kept] * (line[0] == " ")
        script = script[:start] + new + script[end:]
    return script


def forked(title: str) -> str:
    lines = SCRIPT.read_text().splitlines()
    for kind, text in SECTIONS[title]:
        if kind == "diff":
            lines = apply(text, lines)
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("title", SECTIONS)
def test_the_blocks_fit_the_script(title):
    """Catches: a page that shows lines which the script no longer has, or names the wrong place for them."""
    source = forked(title)
    assert source != SCRIPT.read_text()
    assert max(map(len, source.splitlines())) <= 120
    compile(source, "train_mine.py", "exec")


@pytest.fixture
def fork(tmp_path, monkeypatch, load_script):
    """A function: section's title -> the module train_mine, from a file in another folder."""

    def load(title: str, change=lambda source: source):
        for kind, text in SECTIONS[title]:
            if kind == "python":  # a module of the user's own, its name in its first line
                name = text.partition("\n")[0].removeprefix("# ")
                (tmp_path / name).write_text(text)
                monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
        return load_script(change(forked(title)))

    return load


def start(module, root: Path, **flags) -> Path:
    flags = {"iterations": 4, "save_every": 1, "learning_rate": 1e-3, "warmup_iterations": 1} | flags
    return run(module.main, short_args(module, root / "runs", **flags))


def resume(module, whole: Path) -> Path:
    """The run as if it had been killed after iteration 2, and then resumed."""
    killed = whole.with_name("resumed")
    shutil.copytree(whole, killed, ignore=shutil.ignore_patterns("final", "step_000003", "step_000004"))
    module.main(parse_args(module.Args, ["--resume", str(killed)]))
    return killed


def checkpoint(run_dir: Path, iteration: int) -> tuple[dict, dict]:
    """(weights by name, contents of trainer.pt)"""
    directory = run_dir / "checkpoints" / f"step_{iteration:06d}"
    return load_file(directory / "model.safetensors"), torch.load(directory / "trainer.pt", weights_only=True)


def values(run_dir: Path, tag: str) -> list[float]:
    return [value for _, value in scalars(run_dir)[tag]]


@pytest.fixture
def judge(monkeypatch):
    """A web server at $JUDGE that says whether the text ends in </answer>, but fails for every fourth length. Returns
    the numbers of requests that were open at the same time."""
    open_now, lock = [0], threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            with lock:
                open_now.append(open_now[-1] + 1)
            text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"]
            time.sleep(0.02)
            self.send_response(500 if len(text) % 4 == 0 else 200)
            self.end_headers()
            self.wfile.write(json.dumps({"right": text.endswith("</answer>")}).encode())
            with lock:
                open_now.append(open_now[-1] - 1)

        def log_message(self, *_):
            pass

    monkeypatch.setattr(http.server.ThreadingHTTPServer, "request_queue_size", 64)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("JUDGE", f"http://127.0.0.1:{server.server_port}")
    yield open_now
    server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("title", SECTIONS)
def test_a_resumed_fork_equals_the_uninterrupted_one(title, fork, tmp_path, judge):
    """Catches: state of a fork's own that a checkpoint misses, and a random draw without a seed."""
    module = fork(title)
    flags = FLAGS.get(title, {})
    if title == DISTILLATION:  # another model of the same vocabulary
        flags |= {"teacher": str(start(train_grpo, tmp_path / "teacher", iterations=1, learning_rate=1e-2) / "final")}
    whole = start(module, tmp_path, save_every=2, **flags)
    resumed = resume(module, whole)
    assert weights(resumed / "final") == weights(whole / "final") != weights(Path(EMBEDDED))
    assert_same_events(resumed, whole)
    assert (whole / "train_mine.py").read_text() == forked(title)  # a run records its fork
    assert "train_mine" in whole.name


@pytest.mark.slow
@pytest.mark.parametrize("title, forgotten", [(MOVING_REF, ", ref=ref"), (ADAPTERS, ", adapters=adapters")])
def test_the_comparison_sees_what_a_checkpoint_misses(title, forgotten, fork, tmp_path):
    module = fork(title, lambda source: source.replace(forgotten, ""))
    whole = start(module, tmp_path, save_every=2, **FLAGS.get(title, {}))
    assert weights(resume(module, whole) / "final") != weights(whole / "final")


@pytest.mark.slow
def test_leave_one_out_with_the_kl_in_the_reward(fork, tmp_path, monkeypatch):
    """Catches: a KL against logprobs that were never computed. It must be 0 before the first step, and only then."""
    module = fork(LEAVE_ONE_OUT)
    rewards = torch.tensor([[1.0, 0.0, 0.5], [0.2, 0.2, 0.2]])
    expected = torch.tensor([[0.75, -0.75, 0.0], [0.0, 0.0, 0.0]])
    assert torch.allclose(module.group_advantages(rewards, False), expected)
    calls = remember(monkeypatch, module, "group_advantages")
    run_dir = start(module, tmp_path, kl_coef=0.5)
    kl, total = values(run_dir, "reward/kl"), values(run_dir, "reward/total")
    assert kl[0] == 0 and all(abs(value) > 1e-5 for value in kl[1:])
    seen = [arguments["rewards"].mean().item() for arguments, _ in calls]
    assert seen == pytest.approx([r - 0.5 * k for r, k in zip(total, kl, strict=True)], abs=1e-5)
    assert "loss/kl" not in scalars(run_dir)  # it is in the reward only


@pytest.mark.slow
def test_a_loss_with_flags_of_its_own(fork, tmp_path, monkeypatch, capsys):
    """Catches: a range that shared code puts on a fork's flag; a list that isn't checked, or that a resume refuses."""
    module = fork(OWN_LOSS)
    logprobs = torch.tensor([[0.5, 2.0, -1.0]], dtype=torch.float64, requires_grad=True)
    old, w = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
    A, mask = torch.full((1, 3), -2.0, dtype=torch.float64), torch.ones(1, 3, dtype=torch.bool)
    clip = {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0, "ratio_bounds": (0.5, 4.0)}
    module.grpo_loss(logprobs, old, None, A, mask, w, **clip)[0].backward()
    ratio = torch.tensor([[0.5, 2.0, -1.0]]).double().exp().clamp(0.5, 4.0)  # the second and third are clipped
    assert torch.allclose(logprobs.grad, -w * ratio * A)

    flags = ["--baseline-shift", "-0.1", "--ratio-bounds", "0", "4"]
    args = parse_args(module.Args, flags)
    assert args.baseline_shift == -0.1 and args.ratio_bounds == (0.0, 4.0)
    for wrong in (["--ratio-bounds", "0", "nan"], ["--baseline-shift", "inf"]):
        with pytest.raises(SystemExit):
            parse_args(module.Args, wrong)
        assert "must be finite" in capsys.readouterr().err

    calls = remember(monkeypatch, module, "grpo_loss")
    whole = start(module, tmp_path, **FLAGS[OWN_LOSS])
    advantages = [arguments["advantages"][:, 0] for arguments, _ in calls]
    advantages = [A.mean().item() for A in advantages if len(A) == 16]
    assert advantages and advantages == pytest.approx([0.1] * len(advantages), abs=1e-5)  # every group's mean is raised
    assert values(whole, "loss/ratio_max")[0] > 1  # the second epoch's
    assert parse_args(module.Args, ["--resume", str(whole), *flags]).ratio_bounds == (0.0, 4.0)
    with pytest.raises(SystemExit):
        parse_args(module.Args, ["--resume", str(whole), "--ratio-bounds", "0", "3"])
    assert "--ratio-bounds [0.0, 3.0]: the run was started with [0.0, 4.0]" in capsys.readouterr().err


@pytest.mark.slow
def test_an_entropy_bonus_moves_the_entropy_without_any_advantage(fork, tmp_path, monkeypatch):
    """Catches: an entropy without a gradient, and rows with advantage 0 that are passed forward only."""
    module = fork(ENTROPY)
    monkeypatch.setattr(module, "group_advantages", lambda rewards, *_: torch.zeros_like(rewards))
    more = start(module, tmp_path, entropy_coef=1.0)
    less = start(module, tmp_path, entropy_coef=-1.0)
    none = start(module, tmp_path, entropy_coef=0.0)
    entropy = [values(run_dir, "loss/entropy") for run_dir in (less, none, more)]
    assert entropy[0][0] == entropy[1][0] == entropy[2][0]
    assert entropy[0][-1] < 0.9 * entropy[1][-1] and entropy[1][-1] < 0.9 * entropy[2][-1]
    assert weights(none / "final") == weights(Path(EMBEDDED))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lion_by_hand(fork, dtype):
    """Catches: a rule that is fed the weights' bf16 rounding instead of the fp32 masters."""
    module, layer = fork(LION), torch.nn.Linear(3, 2, bias=False).to(dtype)
    optimizer = module.Lion(layer, lr=0.01)
    expected, momentum = layer.weight.detach().float().clone(), torch.zeros(2, 3)
    for _ in range(3):
        gradient = torch.randn(2, 3).to(dtype)
        (layer.weight * gradient).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        expected = expected - 0.01 * (0.9 * momentum + 0.1 * gradient.float()).sign()
        momentum = 0.99 * momentum + 0.01 * gradient.float()
        assert torch.allclose(optimizer.masters[0], expected, atol=1e-7)
        assert torch.equal(layer.weight, optimizer.masters[0].to(dtype))


@pytest.mark.slow
def test_the_learning_rate_falls_as_a_cosine(fork, tmp_path):
    run_dir = start(fork(LION), tmp_path, learning_rate=1e-4)
    cosine = torch.tensor([1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5])
    assert values(run_dir, "loss/learning_rate") == pytest.approx((1e-4 * cosine).tolist())
    start_weights, (step_1, _) = load_file(f"{EMBEDDED}/model.safetensors"), checkpoint(run_dir, 1)
    moved = torch.cat([(step_1[name] - start_weights[name]).flatten() for name in step_1])
    assert moved.abs().max().item() == pytest.approx(1e-4, rel=1e-2)  # Lion's step is a sign
    assert ((moved.abs() - 1e-4).abs() < 1e-6).float().mean() > 0.5


@pytest.mark.slow
def test_the_best_checkpoint_outlives_a_resume(fork, tmp_path, monkeypatch):
    """Catches: a resumed run that forgets how good the best was, and writes a worse one over it."""
    module = fork(BEST)
    held_out_scores = HeldOut.evaluate

    def accuracies(*given):
        left = iter(given)
        monkeypatch.setattr(HeldOut, "evaluate", lambda *a: held_out_scores(*a) | {"eval/accuracy": next(left)})

    accuracies(0.2, 0.9, 0.5, 0.6, 0.7)  # the first is from before training
    whole = start(module, tmp_path, eval_every=1)
    assert weights(whole / "best") == weights(whole / "checkpoints" / "step_000001") != weights(whole / "final")
    common.load_policy(str(whole / "best"), None), common.load_tokenizer(str(whole / "best"))
    accuracies(0.6, 0.7)
    resumed = resume(module, whole)
    assert weights(resumed / "best") == weights(whole / "best")
    assert checkpoint(resumed, 4)[1]["progress"]["best"] == 0.9

    best_of_group = values(whole, "reward/best_of_group")
    assert all(best >= mean for best, mean in zip(best_of_group, values(whole, "reward/total"), strict=True))
    for run_dir in (whole, resumed):
        events = EventAccumulator(str(run_dir), size_guidance={"histograms": 0})
        events.Reload()
        histograms = events.Histograms("rollout/lengths")
        assert [h.step for h in histograms] == [16, 32, 48, 64]
        means = [h.histogram_value.sum / h.histogram_value.num for h in histograms]
        assert means == pytest.approx(values(run_dir, "rollout/length_mean"))


@pytest.mark.slow
def test_a_reward_of_ones_own_counts_in_training_and_is_evaluated(fork, tmp_path, embedded):
    """Catches: a reward that is logged but not in the sum, rewards of one completion given to another, and none under
    eval/."""
    module = fork(OWN_REWARD)
    run_dir = start(module, tmp_path)
    total, accuracy, form, mine = (values(run_dir, f"reward/{n}") for n in ("total", "accuracy", "format", "mine"))
    expected = [a + 0.2 * f + 0.5 * m for a, f, m in zip(accuracy, form, mine, strict=True)]
    assert total == pytest.approx(expected, abs=1e-5) and 0 < min(mine)
    assert values(run_dir, "eval/mine")[-1] == pytest.approx(mean_over(run_dir, embedded, module.my_rewards.brevity))


def mean_over(run_dir: Path, embedded, score, problems=None, **options) -> float:
    """The mean score of completions of the final model, sampled as a run's last evaluation samples them."""
    tokenizer = embedded[1]
    if problems is None:
        config = common.load_config(EMBEDDED)
        problems = encode_problems(tokenizer, load_eval_problems("arithmetic", None, 6), "", config, 40)
    policy = common.load_policy(str(run_dir / "final"), tokenizer)
    records = evaluate(policy, tokenizer, problems, SAMPLES, 40, batch_size=16, seed=1, **options)
    scores = [score(c["text"], p) for record, p in zip(records, problems, strict=True) for c in record["completions"]]
    return sum(map(float, scores)) / len(scores)


@pytest.mark.slow
def test_a_tasks_verifier_decides_in_training_and_in_evaluation(fork, tmp_path, monkeypatch, embedded):
    """Catches: an evaluation that still compares with the answer."""
    module = fork(OWN_TASK)
    scored = remember(monkeypatch, module, "score_completions")
    run_dir = start(module, tmp_path, eval_problems=30)
    differ = 0
    for arguments, components in scored:
        texts, batch = arguments["texts"], arguments["problems"]
        problems = [problem for problem in batch for _ in range(4)]
        assert not any(module.is_held_out(problem.question) for problem in batch)
        right = [module.is_right(text, problem) for text, problem in zip(texts, problems, strict=True)]
        assert components["accuracy"].flatten().tolist() == right
        differ += right != [value > 0 for value in Verifier()(texts, problems)]
    assert differ  # the rules would have decided otherwise
    held_out = [problem for problem in module.make_problems(2000) if module.is_held_out(problem.question)][:30]
    held_out = encode_problems(embedded[1], held_out, "", common.load_config(EMBEDDED), 40)
    accuracy = values(run_dir, "eval/accuracy")[-1]
    assert accuracy == pytest.approx(mean_over(run_dir, embedded, module.is_right, held_out)) and 0 < accuracy < 1
    by_answer = mean_over(run_dir, embedded, lambda text, problem: Verifier()([text], [problem])[0], held_out)
    assert by_answer != pytest.approx(accuracy)


@pytest.mark.slow
def test_a_moving_reference_loses_no_step_in_bf16(fork, tmp_path):
    """Catches: a moving average in bf16, which never moves, or of the bf16 weights instead of the masters."""
    module = fork(MOVING_REF)
    run_dir = start(module, tmp_path, learning_rate=1e-5, **FLAGS[MOVING_REF])
    policy = common.load_policy(EMBEDDED, None, dtype=torch.bfloat16)
    names = [name for name, _ in policy.named_parameters()]
    ref = {name: p.detach() for name, p in common.load_policy(EMBEDDED, None).named_parameters()}
    for iteration in range(1, 5):
        _, state = checkpoint(run_dir, iteration)
        masters = dict(zip(names, state["stateful"]["optimizer"]["masters"], strict=True))
        ref = {name: value.lerp(masters[name], 0.01) for name, value in ref.items()}
        for name, value in ref.items():
            assert torch.equal(state["stateful"]["ref"][name], value), (iteration, name)
    began = dict(common.load_policy(EMBEDDED, None).named_parameters())
    moved = [(ref[n] != began[n]).float().mean().item() for n in names]
    seen_in_bf16 = [(ref[n].bfloat16() != began[n].bfloat16()).float().mean().item() for n in names]
    assert sum(moved) > 10 * sum(seen_in_bf16)
    assert values(run_dir, "loss/kl")[-1] > 0


@pytest.mark.slow
def test_only_the_chosen_layers_move(fork, tmp_path):
    before = load_file(f"{EMBEDDED}/model.safetensors")
    after, state = checkpoint(start(fork(LAYERS), tmp_path), 4)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.startswith(("model.layers.2.", "model.layers.3."))}
    assert len(state["stateful"]["optimizer"]["state"]) == len(moved)


@pytest.mark.slow
def test_adapters_are_merged_into_an_ordinary_model(fork, tmp_path, monkeypatch, embedded):
    """Catches: checkpoints with weight names that a plain model lacks, and a merge that forgets a layer or a factor."""
    module, tokenizer = fork(ADAPTERS), embedded[1]
    config, texts = common.load_config(EMBEDDED), []
    problems = encode_problems(tokenizer, load_eval_problems("arithmetic", None, 60), "", config, 40)
    held_out_scores = HeldOut.evaluate

    def greedy(policy) -> list[str]:
        records = evaluate(policy, tokenizer, problems, 1, 40, temperature=0.0)
        return [record["completions"][0]["text"] for record in records]

    def remembering(held_out, policy):
        texts.append(greedy(policy))
        return held_out_scores(held_out, policy)

    monkeypatch.setattr(HeldOut, "evaluate", remembering)
    run_dir = start(module, tmp_path, iterations=10, learning_rate=1e-2, prompts_per_step=8)
    began, (frozen, state) = load_file(f"{EMBEDDED}/model.safetensors"), checkpoint(run_dir, 10)
    assert all(torch.equal(frozen[name], began[name]) for name in began)  # the policy's own weights
    before, after = texts
    merged = common.load_policy(str(run_dir / "final"), tokenizer)
    assert greedy(merged) == after != before
    final = load_file(run_dir / "final" / "model.safetensors")
    assert final.keys() == began.keys()
    linear = {name for name in began if name.endswith("proj.weight")}
    assert {name for name in began if not torch.equal(final[name], began[name])} == linear
    assert len(state["stateful"]["adapters"]) == 2 * len(linear) == 2 * 28


@pytest.mark.slow
def test_the_threshold_is_over_the_minibatch(fork, tmp_path, monkeypatch):
    """Catches: a quantile over a micro-batch (the gradient then depends on a memory flag), or over padding."""
    module = fork(HIGH_ENTROPY)
    calls = remember(monkeypatch, module, "grpo_loss")
    norms = []
    for budget in (8192, 64):
        run_dir = start(module, tmp_path / str(budget), iterations=1, micro_batch_tokens=budget, loss_norm="token")
        norms.append(values(run_dir, "loss/grad_norm")[0])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    kept, written = (sum(arguments[name].gt(0).sum().item() for arguments, _ in calls) for name in ("weights", "mask"))
    assert kept / written == pytest.approx(0.2, abs=0.02)


@pytest.mark.slow
def test_the_correction_is_of_the_filtered_distribution(fork, tmp_path, monkeypatch, capsys):
    """Catches: sampler_logprobs of the full softmax, whose correction is 1 at every token."""
    module = fork(TOP_P)
    logits = torch.tensor([[3.0, 1.0, 2.0, -5.0]])
    kept = module.keep_top_p(logits, 0.9)
    assert kept.isfinite().tolist() == [[True, False, True, False]] and torch.equal(kept[0, 0], logits[0, 0])
    assert module.keep_top_p(logits, 1e-9).isfinite().tolist() == [[True, False, False, False]]
    calls = remember(monkeypatch, common, "sample_groups")
    start(module, tmp_path, iterations=2, top_p=0.5)
    assert "the sampler's `filter`" in capsys.readouterr().err
    filtered = [rollout for _, rollout in calls if rollout.filtered]
    policy = common.load_policy(EMBEDDED, None)
    first = filtered[0]
    correction = (common.rollout_logprobs(policy, first, 8192)[0] - first.sampler_logprobs)[first.trained].exp()
    assert len(filtered) == 2 and correction.max() < 1 + 1e-4 and 0.3 < correction.min() < 0.9


@pytest.mark.slow
def test_a_student_comes_nearer_to_its_teacher(fork, tmp_path):
    """Catches: the advantage with the wrong sign."""
    teacher = start(train_grpo, tmp_path / "teacher", iterations=8, prompts_per_step=16)
    flags = {"teacher": str(teacher / "final"), "iterations": 20, "prompts_per_step": 16, "loss_norm": "token"}
    kl = values(start(fork(DISTILLATION), tmp_path, **flags), "loss/teacher_kl")
    assert sum(kl[-4:]) < 0.75 * sum(kl[:4]) and kl[0] > 0


@pytest.mark.slow
def test_a_tool_is_called_and_its_result_is_not_trained(fork, tmp_path, monkeypatch, embedded):
    """Catches: a call that does not stop, results of other rows, a loss on them, a completion over its limit."""
    module, tokenizer = fork(TOOL), embedded[1]
    shown = load_problems("arithmetic:1-2", "all", 300)
    rows = [
        (p.question, f"<think><calc>{p.question[:-1]}</calc>={p.answer}</think><answer>{p.answer}</answer>")
        for p in shown
    ]
    write_jsonl(str(tmp_path / "calls.jsonl"), [{"prompt": question, "completion": text} for question, text in rows])
    flags = {"data": (str(tmp_path / "calls.jsonl"),), "iterations": 150, "minibatch_size": 64, "learning_rate": 3e-3}
    model = run(train_sft.main, short_args(train_sft, tmp_path / "sft", max_new_tokens=60, **flags)) / "final"
    losses = remember(monkeypatch, module, "grpo_loss")
    turns = remember(monkeypatch, common, "continue_groups")
    options = {"model": str(model), "max_new_tokens": 60, "iterations": 2, "problems": "arithmetic:1-2"}
    start(module, tmp_path, **options)
    called = 0
    for _, rollout in turns:
        assert rollout.mask.sum(1).max() <= 60
        for ids, real, own in zip(rollout.completion_ids, rollout.mask, rollout.trained, strict=True):
            text, given = tokenizer.decode(ids[real]), tokenizer.decode(ids[real & ~own])
            calls = re.findall("<calc>([^<>]*)</calc>=", text)[:2]
            if given:
                called += 1
                assert given == "".join(f"={module.my_tool.calculate(call)}" for call in calls)
    assert called > 20
    for arguments, _ in losses:
        assert (arguments["weights"][~arguments["mask"]] == 0).all()


@pytest.mark.slow
def test_a_judge_is_asked_in_parallel_and_may_fail(fork, tmp_path, judge):
    run_dir = start(fork(JUDGE), tmp_path, iterations=2)
    assert max(judge) > 4
    assert 0 < values(run_dir, "reward/unscored")[0] < 1 and 0 < values(run_dir, "reward/accuracy")[0] <= 1
