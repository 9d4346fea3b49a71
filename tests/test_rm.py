"""The reward model's mathematics (identities in float64), and whole runs."""

import json
import math
import shutil

import pytest
import torch
from conftest import EMBEDDED, assert_same_events, run, scalars, short_args, weights
from test_bad_input import refuse
from test_resume import StopAtIterationThree
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification

import common
import plumbing.runs
import train_rm
from data import is_held_out
from plumbing.engine import PaddedRows
from plumbing.files import write_jsonl
from plumbing.flags import parse_args
from plumbing.pairs import (
    Pair,
    PairFlags,
    calibration_error,
    encode_pairs,
    load_preference_pairs,
    pair_micro_batches,
    pair_rollout,
    ranked_right,
)
from train_rm import pair_scores, reward_model_loss


def double(*shape) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# ---- The loss --------------------------------------------------------------------------------------------------------


def test_the_loss_by_hand():
    chosen, rejected = double(2, 5)
    loss, metrics = reward_model_loss(chosen, rejected)
    assert loss.item() == pytest.approx(-logsigmoid(chosen - rejected).mean().item())
    assert reward_model_loss(chosen, chosen)[0].item() == pytest.approx(math.log(2))
    assert metrics["rewards/margin"] == pytest.approx((chosen - rejected).mean().item())
    assert metrics["rewards/accuracy"] == pytest.approx((chosen > rejected).double().mean().item())
    with_margin, _ = reward_model_loss(chosen, rejected, margin=0.5)
    assert with_margin.item() == pytest.approx(-logsigmoid(chosen - rejected - 0.5).mean().item())
    assert with_margin > loss  # a margin asks for more


def test_a_margin_within_rounding_is_a_tie():
    assert ranked_right(torch.tensor([0.5, -0.5, 0.0, 3e-6, -3e-6])).tolist() == [1, 0, 0.5, 0.5, 0.5]


def test_swapped_pairs_negate_the_margin():
    """Catches: chosen and rejected swapped. The gradient is minus and plus sigmoid of minus the margin."""
    chosen, rejected = double(2, 5)
    chosen.requires_grad_(), rejected.requires_grad_()
    loss, metrics = reward_model_loss(chosen, rejected)
    assert metrics["rewards/margin"] == pytest.approx(-reward_model_loss(rejected, chosen)[1]["rewards/margin"])
    loss.backward()
    expected = torch.sigmoid(rejected - chosen) / 5
    assert torch.allclose(chosen.grad, -expected) and torch.allclose(rejected.grad, expected)


def test_a_shift_of_all_scores_changes_nothing():
    """This is why score_mean fixes the level after training."""
    chosen, rejected = double(2, 5)
    assert reward_model_loss(chosen + 7, rejected + 7)[0].item() == pytest.approx(
        reward_model_loss(chosen, rejected)[0].item()
    )


def test_row_weights_replace_the_mean():
    chosen, rejected = double(2, 3)
    w = torch.tensor([0.6, 0.0, 0.4], dtype=torch.float64)
    expected = (w * -logsigmoid(chosen - rejected)).sum().item()
    assert reward_model_loss(chosen, rejected, row_weights=w)[0].item() == pytest.approx(expected)


def test_scores_recover_bradley_terry_rewards():
    """With pairs weighted by how often the first is preferred, the fitted scores are the true ones up to a shift."""
    reward = torch.tensor([1.0, 0.2, -0.5, 0.4], dtype=torch.float64)
    scores = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    i, j = torch.tensor([(i, j) for i in range(4) for j in range(4) if i != j]).T
    pair_weights = torch.sigmoid(reward[i] - reward[j]) / 12
    optimizer = torch.optim.LBFGS([scores], max_iter=500, tolerance_grad=1e-12, tolerance_change=0.0)

    def closure():
        optimizer.zero_grad()
        loss, _ = reward_model_loss(scores[i], scores[j], row_weights=pair_weights)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.allclose(scores - scores.mean(), reward - reward.mean(), atol=1e-6)


def test_calibration_by_hand():
    """Two bins: confidence 0.55, right half of the time, and 0.95, always right. Swapped sides must not matter."""
    logit = torch.tensor([0.55, 0.95], dtype=torch.float64).logit()
    margins = torch.stack([logit[0], -logit[0], logit[1], logit[1]])
    assert calibration_error(margins) == pytest.approx(0.5 * 0.05 + 0.5 * 0.05)
    assert calibration_error(-logit[1:]) == pytest.approx(0.95)  # sure, and wrong
    unsure = torch.tensor([0.52], dtype=torch.float64).logit()
    assert calibration_error(unsure) == pytest.approx(0.48)  # in the first bin, and right
    assert calibration_error(torch.zeros(4)) == 0.0  # ties: confidence 0.5, right half of the time
    torch.manual_seed(0)
    margins = 3 * double(200_000)
    preferred = torch.rand(len(margins)) < margins.sigmoid()
    assert calibration_error(torch.where(preferred, margins, -margins)) < 0.01  # preferences drawn by Bradley-Terry


def test_the_gradient_does_not_depend_on_micro_batches(embedded):
    """Catches: a loss normalised per micro-batch, and a pair split over two of them."""
    model = common.load_reward_model(EMBEDDED, None, new_head=True)
    torch.nn.init.normal_(model.score.weight)
    ids = [  # prompt, chosen, rejected
        ([15, 16, 17], [24, 25, 26, 27, 1], [28, 1]),
        ([18], [29, 1], [20, 21, 22, 23, 24, 1]),
        ([19, 20, 21, 22, 23], [25, 1], [26, 27, 1]),
    ]
    pairs = [Pair("", "", "", prompt_ids=x, chosen_ids=plus, rejected_ids=minus) for x, plus, minus in ids]
    rollout = pair_rollout(pairs, "cpu")
    row_weights = torch.tensor([0.5, 0.2, 0.3])
    gradients = []
    for budget in (1, 32, 1000):
        for micro in pair_micro_batches(rollout, budget):
            scores = common.completion_scores(model, rollout, micro)
            row_weights_here = row_weights[[row // 2 for row in micro[0::2]]]
            reward_model_loss(scores[0::2], scores[1::2], row_weights=row_weights_here)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        model.zero_grad()
    assert gradients[0].abs().max() > 1e-3
    for other in gradients[1:]:
        assert torch.allclose(gradients[0], other, atol=1e-4 * gradients[0].abs().max().item())


# ---- Whole runs ------------------------------------------------------------------------------------------------------


def assert_scores_as_a_classifier(final, seed: int, few: PairFlags) -> None:
    """The result is an ordinary classifier: transformers' own forward pass gives the scores of completion_scores before
    it subtracts their mean over the training pairs, which makes that mean 0."""
    tokenizer = common.load_tokenizer(EMBEDDED)
    pairs = encode_pairs(tokenizer, load_preference_pairs("arithmetic-pairs", seed, few), "", 256)
    model = common.load_reward_model(str(final), None)
    scores = pair_scores(model, [pair for pair in pairs if not is_held_out(pair.question)], 4096)
    assert model.config.score_mean != 0 and abs(scores.mean().item()) < 1e-4 < scores.std().item()
    plain = AutoModelForSequenceClassification.from_pretrained(final).eval()
    rollout = pair_rollout(pairs[:4], "cpu")
    input_ids = PaddedRows(rollout.prompt_ids, rollout.completion_ids, rollout.mask, torch.arange(8) // 2).ids
    sizes = [len(rollout.prompt_ids[row // 2]) + n for row, n in enumerate(rollout.lengths.tolist())]
    inside = torch.arange(input_ids.shape[1]) < torch.tensor(sizes)[:, None]
    with torch.no_grad():
        padded = input_ids.masked_fill(~inside, tokenizer.pad_token_id)
        theirs = plain(padded, attention_mask=inside.long()).logits[:, 0]
        ours = common.completion_scores(model, rollout, list(range(8)))
    assert torch.allclose(theirs - model.config.score_mean, ours, atol=1e-4)


def test_the_result_is_a_classifier_whose_mean_score_is_zero(tmp_path):
    args = short_args(train_rm, tmp_path, pair_problems=40)
    run_dir = run(train_rm.main, args)
    assert_scores_as_a_classifier(run_dir / "final", args.seed, args.selection)
    values = scalars(run_dir)
    for tag in (
        "rewards/chosen rewards/rejected rewards/margin rewards/accuracy eval/calibration rollout/length_chosen".split()
    ):
        assert tag in values
    assert values["loss/pair"][0][1] == pytest.approx(math.log(2), abs=1e-6)
    assert values["eval/pair_accuracy"][0][1] == 0.5


def test_the_held_out_loss_has_the_pairs_weights(tmp_path):
    """Catches: a held-out loss in which all pairs count the same, so that another quantity is trained than measured."""
    sides = ("1", "-"), ("-", "1")  # the second kind contradicts the first and weighs little
    rows = [dict(zip(("prompt", "chosen", "rejected"), (f"{i}+1=", *sides[i % 2]), strict=True)) for i in range(200)]
    rows = [row | {"weight": (5, 0.5)[i % 2]} for i, row in enumerate(rows)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    changes = {"data": str(tmp_path / "pairs.jsonl"), "eval_problems": 300, "warmup_iterations": 1}
    args = short_args(train_rm, tmp_path / "runs", **changes)
    run_dir = run(train_rm.main, args)
    tokenizer = common.load_tokenizer(EMBEDDED)
    pairs = encode_pairs(tokenizer, load_preference_pairs(args.data), "", 256)
    pairs = [pair for pair in pairs if is_held_out(pair.question)]
    chosen, rejected = pair_scores(common.load_reward_model(str(run_dir / "final"), None), pairs, 4096).unbind(1)
    weight = torch.tensor([pair.weight for pair in pairs])
    losses = -logsigmoid(chosen - rejected)
    expected = ((weight * losses).sum() / weight.sum()).item()
    assert abs(expected - losses.mean().item()) > 1e-3
    assert scalars(run_dir)["eval/pair_loss"][-1][1] == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_a_short_run_learns_to_rank(tmp_path, capsys):
    """From ties to held-out pairs ranked right."""
    changes = {"pair_problems": 200, "eval_problems": 60, "minibatch_size": 32, "min_gap": 0.05}
    changes |= {"iterations": 40, "warmup_iterations": 4, "learning_rate": 3e-4}
    args = short_args(train_rm, tmp_path, **changes)
    run_dir = run(train_rm.main, args)
    values = {tag: [value for _, value in points] for tag, points in scalars(run_dir).items()}
    for tag in "chosen rejected margin accuracy".split():
        assert f"rewards/{tag}" in values
    assert values["loss/pair"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert values["eval/pair_accuracy"][0] == 0.5 and values["eval/pair_accuracy"][-1] > 0.65
    assert values["eval/pair_loss"][-1] < values["eval/pair_loss"][0]
    assert 0 <= values["eval/calibration"][-1] < 0.4
    assert "calibration" in capsys.readouterr().out
    assert_scores_as_a_classifier(run_dir / "final", args.seed, args.selection)


@pytest.mark.slow
@pytest.mark.parametrize("lost_work", [False, True])
def test_an_interrupted_run_equals_the_uninterrupted_one(lost_work, tmp_path, monkeypatch):
    """Catches: a resume that loses optimizer or data cursor, or begins with a new head."""
    args = short_args(train_rm, tmp_path, pair_problems=20, iterations=5, eval_every=3, save_every=2)
    whole = run(train_rm.main, args)
    with monkeypatch.context() as patched:
        patched.setattr(plumbing.runs, "StopSignal", StopAtIterationThree)
        with pytest.raises(SystemExit) as stopped:
            train_rm.main(args)
    assert stopped.value.code == 130
    (broken,) = set(tmp_path.iterdir()) - {whole}
    if lost_work:
        shutil.rmtree(broken / "checkpoints" / "step_000003")
    run(train_rm.main, parse_args(train_rm.Args, ["--resume", str(broken)]))
    assert weights(whole / "final") == weights(broken / "final")
    configs = [json.loads((directory / "final" / "config.json").read_text()) for directory in (whole, broken)]
    assert configs[0]["score_mean"] == configs[1]["score_mean"]
    assert_same_events(whole, broken)


def test_a_new_head_begins_at_zero_and_keeps_the_backbone(embedded):
    """Whatever head the directory has, such as a reward model's, is set to zero."""
    model = common.load_reward_model(EMBEDDED, None, new_head=True)
    assert model.score.bias is None and (model.score.weight == 0).all() and model.config.num_labels == 1
    assert torch.equal(model.base_model.embed_tokens.weight, embedded[0].base_model.embed_tokens.weight)


BAD = [
    ({"minibatch_size": 0}, "--minibatch-size 0: must be 1 or more"),
    ({"margin": -1.0}, "--margin -1.0: must be 0 or more"),
    ({}, "p.jsonl: no pair left; dropped: 1 equal or empty completions"),
]


@pytest.mark.parametrize("flags,message", BAD, ids=[message for _, message in BAD])
def test_bad_input(flags, message, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1=", "chosen": "2", "rejected": "2"}\n')
    flags = {"model": EMBEDDED, "data": tmp_path / "p.jsonl", "run_root": tmp_path / "r"} | flags
    assert message in refuse(train_rm, flags, capsys)
    assert not (tmp_path / "r").exists()
