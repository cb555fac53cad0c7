"""DPO's family and KTO: against closed forms, against TRL, against themselves; that they learn; and the traps."""
import contextlib
import io
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import losses, run

from medllm.core import UserError
from medllm.data.rows import RowInfo, RowWriter, TokenRows
from medllm.models.adapters import AdaptPlan, adapt
from medllm.models.packed_attention import branched, isolate
from medllm.models.loading import load_model
from medllm.train import kto, preference
from medllm.train.arguments import parse
from medllm.train.flags import PreferenceArguments
from medllm.train.inputs import prepare_data
from medllm.train.kto import Kto, kto_loss
from medllm.train.loop import train
from medllm.train.preference import (
    LOSSES, Preference, answer_weights, dpo_loss, hinge_loss, ipo_loss, log_odds, orpo_loss, saved_share, simpo_loss)
from medllm.train.reference import Reference, ReferencePlan
from medllm.train.trainer import StageTrainer
from medllm.train.examples import KTORows, PreferencePairs

VARIANTS = {
    "sigmoid": dict(pref_beta=0.3), "hinge": dict(pref_beta=0.05), "ipo": dict(pref_beta=0.2), "orpo": dict(pref_beta=0.4),
    "simpo": dict(pref_beta=2.0, simpo_gamma=0.7)}
LAYOUTS = ("padded", "packed", "shared")


# ------------------------------------------------------------------------------------------------ closed forms

@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    return rng.normal(-3, 2, 200), rng.normal(-4, 2, 200)


def sigma(x): return 1/(1 + np.exp(-x))


CLOSED = {   # loss, its slope in the better answer's score and in the worse one's, in numpy
    "sigmoid": (lambda c, r, p: dpo_loss(c, r, 0.3), lambda c, r: (
        np.log1p(np.exp(-.3*(c - r))), -.3*sigma(-.3*(c - r)), .3*sigma(-.3*(c - r)))),
    "smoothed": (lambda c, r, p: dpo_loss(c, r, 0.3, 0.2), lambda c, r: (
        .8*np.log1p(np.exp(-.3*(c - r))) + .2*np.log1p(np.exp(.3*(c - r))),
        .3*(sigma(.3*(c - r)) - .8), -.3*(sigma(.3*(c - r)) - .8))),
    "hinge": (lambda c, r, p: hinge_loss(c, r, 0.5), lambda c, r: (
        np.maximum(0, 1 - .5*(c - r)), np.where(.5*(c - r) < 1, -.5, 0), np.where(.5*(c - r) < 1, .5, 0))),
    "ipo": (lambda c, r, p: ipo_loss(c, r, 0.2), lambda c, r: (
        (c - r - 2.5)**2, 2*(c - r - 2.5), -2*(c - r - 2.5))),
    "simpo": (lambda c, r, p: simpo_loss(c, r, 2.0, 0.7), lambda c, r: (
        np.log1p(np.exp(.7 - 2*(c - r))), -2*sigma(.7 - 2*(c - r)), 2*sigma(.7 - 2*(c - r))))}


@pytest.mark.parametrize("name", CLOSED)
def test_a_loss_equals_its_closed_form(name, scores):
    ours, closed = CLOSED[name]
    c, r = (torch.tensor(s, requires_grad=True) for s in scores)
    loss = ours(c, r, None)
    slopes = torch.autograd.grad(loss.sum(), (c, r))
    for got, want in zip((loss, *slopes), closed(*scores)):
        np.testing.assert_allclose(got.detach().numpy(), want, atol=1e-10, rtol=1e-10)


def test_orpo_equals_its_closed_form():
    "Mean log-probabilities from certain to hopeless; probabilities by exp and log as the paper writes them."
    c, r = -np.geomspace(1e-3, 12, 60), -np.geomspace(9, 1e-2, 60)
    pc, pr, weight = np.exp(c), np.exp(r), 0.4
    ratio = np.log(pc/(1 - pc)) - np.log(pr/(1 - pr))
    slope = weight*sigma(-ratio)
    want = (-c + weight*np.log1p(np.exp(-ratio)), -1 - slope/(1 - pc), slope/(1 - pr))
    tc, tr = (torch.tensor(x, requires_grad=True) for x in (c, r))
    loss = orpo_loss(tc, tr, weight)
    for got, closed in zip((loss, *torch.autograd.grad(loss.sum(), (tc, tr))), want):
        np.testing.assert_allclose(got.detach().numpy(), closed, atol=1e-10, rtol=1e-10)
    sure = torch.zeros(3, requires_grad=True)
    assert torch.autograd.grad(log_odds(sure).sum(), sure)[0].isfinite().all()


def test_kto_equals_its_closed_form(scores):
    ratios, liked = scores[0] + 3, np.arange(200) % 3 > 0
    v = np.where(liked, 1.5*sigma(.3*(ratios - .8)), .7*sigma(.3*(.8 - ratios)))
    slope = np.where(liked, -1.5, .7)*.3*sigma(.3*(ratios - .8))*sigma(.3*(.8 - ratios))
    r = torch.tensor(ratios, requires_grad=True)
    loss = kto_loss(r, torch.tensor(liked), 0.8, 0.3, 1.5, 0.7)
    np.testing.assert_allclose(loss.detach().numpy(), np.where(liked, 1.5, .7) - v, atol=1e-10, rtol=1e-10)
    np.testing.assert_allclose(torch.autograd.grad(loss.sum(), r)[0].numpy(), slope, atol=1e-10, rtol=1e-10)


# ------------------------------------------------------------------------------------------------ batches of a model

def some_ids(rng, n): return rng.integers(300, 4000, n).astype(np.int32)


def row_of(prompt, answer): return np.concatenate([prompt, answer]), np.repeat([False, True], [len(prompt), len(answer)])


def pairs_of(rng, sizes):
    "Pairs by the lengths of prompt, better and worse answer; half of the answers begin alike."
    rows = []
    for i, (prompt, better, worse) in enumerate(sizes):
        asked, first, second = some_ids(rng, prompt), some_ids(rng, better), some_ids(rng, worse)
        if i % 2: second[:min(2, worse - 1)] = first[:min(2, worse - 1)]
        rows += [row_of(asked, first), row_of(asked, second)]
    return PreferencePairs(TokenRows(rows))


SIZES = [(9, 6, 4), (3, 2, 8), (7, 9, 1), (14, 3, 5)]


def two_models(dtype=torch.float32):
    "A policy and a reference that differs from it."
    models = [load_model("tiny").to(dtype), load_model("tiny").to(dtype)]
    torch.manual_seed(3)
    with torch.no_grad():
        for p in models[1].parameters(): p.add_(torch.randn_like(p)*0.02)
        for p in models[0].parameters(): p.add_(torch.randn_like(p)*0.01)
    if dtype == torch.float64: exact_norms(models)
    return models[0].requires_grad_(True), models[1].requires_grad_(False)


def exact_norms(models):
    "transformers' norms go through float32 whatever the model's dtype is; these do not."
    norm = lambda self, x: x*torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)*self.weight
    for model in models:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"): module.forward = norm.__get__(module)


def trainer_of(objective, units, folder, layout="padded", **flags):
    "A trainer of an objective whose reference is a model of its own."
    policy, other = objective.models
    args = parse(dict(dataset="mm_rm", finetuning_type="full", output_dir=str(folder), use_cpu=True, disable_tqdm=True,
        save_strategy="no", logging_steps=1) | flags)
    for model in (policy, other):
        if layout == "shared": assert branched(model, 30)
        if layout == "packed": isolate(model, 30)
    return StageTrainer(policy, args.training, objective, units, None, None, pack_to=64 if layout == "packed" else None)


def pair_objective(models, layout="padded", **flags):
    policy, other = models
    objective = Preference(PreferenceArguments(**flags), Reference(ReferencePlan("model", "model", "other"), policy, other),
        layout == "shared")
    objective.models = models
    return objective


def step_of(trainer, units):
    "Mean loss over all units as one batch, and the gradient of every weight."
    batch = trainer.data_collator([units[i] for i in range(len(units))])
    trainer.model.zero_grad()
    trainer.objective.begin(trainer, [batch])
    loss, sums = trainer.objective(trainer, trainer.model, batch)
    (loss/len(units)).backward()
    return loss.item()/len(units), torch.cat([p.grad.flatten() for p in trainer.model.parameters()]), sums


def answer_logps(model, row):
    "Log-probability of each answer token of one row, from full logits."
    ids, trained = torch.tensor(row["input_ids"][None].astype(np.int64)), torch.tensor(row["labels"] != -100)
    logps = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(1, ids[0, 1:, None])[:, 0]
    return logps[trained[1:]]


def written_out(models, units, name, beta=0.1, gamma=0.5, smoothing=0.0, ld_alpha=1.0, ftx=0.0):
    "The mean loss over pairs, row by row, as the papers write it."
    policy, other = models
    losses = []
    for i in range(len(units)):
        better, worse = units[i]["rows"]
        n = min((better["labels"] != -100).sum(), (worse["labels"] != -100).sum())
        ours, theirs = [[answer_logps(m, row) for row in (better, worse)] for m in (policy, other)]
        weigh = lambda logps: logps[:n].sum() + ld_alpha*logps[n:].sum()
        ratio = [weigh(a) - weigh(b) for a, b in zip(ours, theirs)]
        mean = [a.mean() for a in ours]
        odds = [m - torch.log(1 - torch.exp(m)) for m in mean]
        loss = {
            "sigmoid": lambda: -(1 - smoothing)*torch.log(torch.sigmoid(beta*(ratio[0] - ratio[1])))
                - smoothing*torch.log(torch.sigmoid(beta*(ratio[1] - ratio[0]))),
            "hinge": lambda: torch.clamp(1 - beta*(ratio[0] - ratio[1]), min=0),
            "ipo": lambda: (ratio[0]/len(ours[0]) - ratio[1]/len(ours[1]) - 1/(2*beta))**2,
            "orpo": lambda: -mean[0] - beta*torch.log(torch.sigmoid(odds[0] - odds[1])),
            "simpo": lambda: -torch.log(torch.sigmoid(beta*(mean[0] - mean[1]) - gamma))}[name]()
        losses.append(loss - ftx*mean[0])
    return sum(losses)/len(losses)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name, flags", [
    *((name, flags) for name, flags in VARIANTS.items()), ("sigmoid", dict(pref_beta=0.3, dpo_label_smoothing=0.2)),
    ("sigmoid", dict(pref_beta=0.3, ld_alpha=0.4)), ("ipo", dict(pref_beta=0.2, ld_alpha=0.0, pref_ftx=0.5))], ids=str)
def test_loss_and_gradient_in_float64(name, flags, layout, tmp_path):
    "The whole way from ids to gradients against the papers' formulas over full logits, row by row; the three layouts too."
    models, units = two_models(torch.float64), pairs_of(np.random.default_rng(1), SIZES)
    policy = models[0]
    p = PreferenceArguments(pref_loss=name, **flags)
    want = written_out(models, units, name, p.pref_beta, p.simpo_gamma, p.dpo_label_smoothing,
        1.0 if p.ld_alpha is None else p.ld_alpha, p.pref_ftx)
    slopes = torch.autograd.grad(want, list(policy.parameters()))
    trainer = trainer_of(pair_objective(models, layout, pref_loss=name, **flags), units, tmp_path, layout)
    loss, gradient, _ = step_of(trainer, units)
    assert abs(loss - want.item()) < 1e-10
    assert (gradient - torch.cat([s.flatten() for s in slopes])).abs().max() < 1e-10


def test_log_probabilities_with_padding_on_the_left(tmp_path):
    "Sums of a batch equal those of a forward over rows padded on the other side, with an attention mask."
    models, units = two_models(), pairs_of(np.random.default_rng(1), SIZES)
    trainer = trainer_of(pair_objective(models), units, tmp_path)
    batch = trainer.data_collator([units[i] for i in range(4)])
    ours = torch.zeros(8).index_add(0, batch["row_of"], trainer.logps(models[0], batch).detach())
    rows = [units[i]["rows"][k] for k in (0, 1) for i in range(4)]
    width = max(len(r["input_ids"]) for r in rows)
    ids, mask = torch.zeros(8, width, dtype=torch.long), torch.zeros(8, width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row["input_ids"]):], mask[i, width - len(row["input_ids"]):] = torch.tensor(row["input_ids"]), 1
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(): logits = models[0](ids, attention_mask=mask, position_ids=places).logits
    logps = torch.log_softmax(logits[:, :-1], -1).gather(2, ids[:, 1:, None])[..., 0]
    for i, row in enumerate(rows):
        trained = (row["labels"] != -100).sum()
        assert abs(logps[i, -trained:].sum() - ours[i]) < 1e-3*abs(ours[i])*1e-2


def test_shared_prompts_in_a_model_with_windows(tmp_path):
    "Grouped heads and a sliding window shorter than the rows: the layouts agree, through gradient checkpointing too."
    from transformers import MistralConfig, MistralForCausalLM
    torch.manual_seed(0)
    config = MistralConfig(vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=6)
    models = MistralForCausalLM(config).double(), MistralForCausalLM(config).double().requires_grad_(False)
    exact_norms(models)
    units = pairs_of(np.random.default_rng(1), SIZES)
    plain = step_of(trainer_of(pair_objective(models), units, tmp_path), units)[:2]
    for checkpointing in (False, True):
        trainer = trainer_of(pair_objective(models, "shared"), units, tmp_path, "shared")
        if checkpointing:
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
            trainer.model.train()
        loss, gradient, _ = step_of(trainer, units)
        assert abs(loss - plain[0]) < 1e-10 and (gradient - plain[1]).abs().max() < 1e-10


def test_order_and_company_of_pairs_change_nothing(tmp_path):
    models, units = two_models(), pairs_of(np.random.default_rng(1), SIZES)
    trainer = trainer_of(pair_objective(models, pref_beta=0.3), units, tmp_path)
    loss, gradient, _ = step_of(trainer, units)
    turned, other, _ = step_of(trainer, units.pick(np.array([2, 0, 3, 1])))
    assert abs(turned - loss) < 1e-6 and (other - gradient).abs().max() < 1e-6
    alone = [step_of(trainer, units.pick(np.array([i]))) for i in range(4)]
    assert abs(np.mean([a[0] for a in alone]) - loss) < 1e-6
    assert (sum(a[1] for a in alone)/4 - gradient).abs().max() < 1e-6
    swapped = PreferencePairs(units.rows.pick(np.array([1, 0, 3, 2, 5, 4, 7, 6])))
    _, _, sums = step_of(trainer, swapped)
    _, _, before = step_of(trainer, units)
    assert abs(sums["margin"] + before["margin"]) < 1e-5 and sums["accuracy"] + before["accuracy"] == 4


# ------------------------------------------------------------------------------------------------ TRL

WEIGHTS = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.3.mlp.down_proj.weight",
    "model.norm.weight", "lm_head.weight")
EQUAL = [(1, 6, 4), (1, 6, 8)]        # prompts of one token and better answers of one length: see the cases


def as_arrays(units):
    "Prompts, better and worse answers as arrays for TRL, filled up with -1."
    out = {"prompts": [], "chosen": [], "rejected": []}
    for i in range(len(units)):
        better, worse = units[i]["rows"]
        cut = int(np.flatnonzero(better["labels"] != -100)[0])
        for name, part in (("prompts", better["input_ids"][:cut]), ("chosen", better["input_ids"][cut:]),
                ("rejected", worse["input_ids"][cut:])): out[name].append(part)
    return {name: filled(parts) for name, parts in out.items()}


def filled(parts):
    whole = np.full((len(parts), max(map(len, parts))), -1, np.int64)
    for line, part in zip(whole, parts): line[:len(part)] = part
    return whole


def saved(models, folder, tiny):
    for name, model in zip(("policy", "reference"), models):
        model.save_pretrained(folder/name)
        tiny.save_pretrained(folder/name)
    return {name: np.array(str(folder/name)) for name in ("policy", "reference")} | {"weights": np.array(",".join(WEIGHTS))}


def agree(trainer, units, theirs, name):
    loss, _, _ = step_of(trainer, units)
    gradient = torch.cat([dict(trainer.model.named_parameters())[w].grad.flatten() for w in WEIGHTS]).numpy()
    assert abs(loss - theirs[f"{name}/loss"]) < 1e-5*max(1, abs(loss)), name
    assert np.abs(gradient - theirs[f"{name}/grad"]).max() < 1e-5, name
    assert np.abs(gradient).max() > 1e-4, name


def test_pairs_equal_trl(trl, tiny, tmp_path):
    """Losses and gradients of one batch equal those of TRL's trainers.

    `sigmoid` has no label smoothing there any more; on a batch of one its `aot` is that loss. Its supervised loss (of
    `sft` and in ORPO) is a mean over the tokens of a batch, in ORPO over the prompt's too; prompts of one token and
    better answers of one length make that the mean over rows of means over answers.
    """
    models, rng = two_models(), np.random.default_rng(1)
    units, equal = pairs_of(rng, SIZES), pairs_of(rng, EQUAL)
    dpo = lambda name, kind, weights=(1.0,), **more: dict(
        name=name, trainer="dpo", loss_types=list(kind), loss_weights=list(weights), beta=0.3, ld_alpha=None) | more
    cases = [
        dpo("sigmoid", ["sigmoid"]), dpo("hinge", ["hinge"], beta=0.05), dpo("ipo", ["ipo"], beta=0.2),
        dpo("ld", ["sigmoid"], ld_alpha=0.4), dpo("ld ipo", ["ipo"], beta=0.2, ld_alpha=0.0),
        *(dpo(f"smoothed {i}", ["aot"], rows=[i], label_smoothing=0.2) for i in range(len(SIZES))),
        dict(name="simpo", trainer="cpo", loss_type="simpo", beta=2.0, simpo_gamma=0.7)]
    folders = saved(models, tmp_path, tiny)
    theirs = trl("trl_preference.py", as_arrays(units) | folders | {"cases": np.array(json.dumps(cases))})
    trainer = lambda layout="padded", **flags: trainer_of(pair_objective(models, layout, **flags), units, tmp_path, layout)
    for layout in LAYOUTS:
        for name in ("sigmoid", "hinge", "ipo", "simpo"):
            agree(trainer(layout, pref_loss=name, **VARIANTS[name]), units, theirs, name)
        agree(trainer(layout, pref_beta=0.3, ld_alpha=0.4), units, theirs, "ld")
        agree(trainer(layout, pref_loss="ipo", pref_beta=0.2, ld_alpha=0.0), units, theirs, "ld ipo")
    smoothed = trainer(pref_beta=0.3, dpo_label_smoothing=0.2)
    for i in range(len(SIZES)): agree(smoothed, units.pick(np.array([i])), theirs, f"smoothed {i}")

    cases = [dpo("mixed", ["sigmoid", "sft"], (1.0, 0.5)), dict(name="orpo", trainer="orpo", beta=0.4)]
    theirs = trl("trl_preference.py", as_arrays(equal) | folders | {"cases": np.array(json.dumps(cases))})
    agree(trainer(pref_beta=0.3, pref_ftx=0.5), equal, theirs, "mixed")
    agree(trainer(pref_loss="orpo", pref_beta=0.4), equal, theirs, "orpo")


def judged_of(rng, count=6):
    writer = RowWriter()
    for i in range(count):
        ids, trained = row_of(some_ids(rng, 3 + i), some_ids(rng, 2 + 3*i % 7))
        writer.add([ids], [trained], [RowInfo(i, i, i % 2)])
    return KTORows(writer.close(), seed=0)


def kto_objective(models, **flags):
    objective = Kto(PreferenceArguments(**flags), Reference(ReferencePlan("model", "model", "other"), *models))
    objective.models = models
    return objective


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_kto_in_float64(layout, tmp_path):
    "From ids to gradients against the formulas over full logits, row by row; the estimate over both micro-batches."
    models, units = two_models(torch.float64)[::-1], judged_of(np.random.default_rng(2))
    models[0].requires_grad_(True)
    models[1].requires_grad_(False)
    sums = [[answer_logps(m, row).sum() for m in models] for i in range(len(units)) for row in units[i]["rows"]]
    ratio = [ours - theirs for ours, theirs in sums]
    z0 = max(sum(r.item() for r in ratio[1::2])/len(units), 0)
    sign = [1 if units[i]["liked"] else -1 for i in range(len(units))]
    want = sum((1.5 if s > 0 else 0.7)*(1 - torch.sigmoid(0.3*s*(r - z0))) for s, r in zip(sign, ratio[::2]))/len(units)
    slopes = torch.autograd.grad(want, list(models[0].parameters()))
    objective = kto_objective(models, pref_beta=0.3, kto_chosen_weight=1.5, kto_rejected_weight=0.7)
    trainer = trainer_of(objective, units, tmp_path, layout)
    batches = [trainer.data_collator([units[i] for i in part]) for part in ((0, 1, 2, 3), (4, 5))]
    objective.begin(trainer, batches)
    loss = sum(objective(trainer, models[0], batch)[0] for batch in batches)/len(units)
    gradient = torch.autograd.grad(loss, list(models[0].parameters()))
    assert z0 > 0 and abs(objective.z0 - z0) < 1e-10 and abs(loss - want) < 1e-10
    assert max((a - b).abs().max() for a, b in zip(gradient, slopes)) < 1e-10


def test_kto_equals_trl(trl, tiny, tmp_path):
    "Loss, gradient and estimate of one batch with our mismatched answers; once where the estimate is cut off at zero."
    models, units = two_models(), judged_of(np.random.default_rng(2))
    rows, mismatched = zip(*(units[i]["rows"] for i in range(len(units))))
    cut = [int(np.flatnonzero(r["labels"] != -100)[0]) for r in rows]
    arrays = {name: filled([r["input_ids"][part(c)] for r, c in zip(which, cut)]) for name, which, part in (
        ("prompts", rows, lambda c: slice(None, c)), ("answers", rows, lambda c: slice(c, None)),
        ("mismatched", mismatched, lambda c: slice(c, None)))}
    case, estimates = dict(name="kto", trainer="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.7), []
    for turn, pair in enumerate((models, models[::-1])):
        folder = tmp_path/str(turn)
        theirs = trl("trl_preference.py", arrays | saved(pair, folder, tiny) | {
            "cases": np.array(json.dumps([case])), "liked": np.array([units[i]["liked"] for i in range(len(units))])})
        pair[0].requires_grad_(True)
        for layout in ("padded", "packed"):
            objective = kto_objective(pair, pref_beta=0.3, kto_chosen_weight=1.5, kto_rejected_weight=0.7)
            agree(trainer_of(objective, units, folder, layout), units, theirs, "kto")
            assert abs(objective.z0 - theirs["kto/kl"]) < 1e-5
        estimates.append(theirs["kto/kl"])
    assert min(estimates) == 0 and max(estimates) > 0.01


# ------------------------------------------------------------------------------------------------ whole runs

def write_pairs(file, count, shuffled=False, judged=False):
    "Questions whose better answer says when, and whose worse answer does not."
    rng, rows = np.random.default_rng(5), []
    things = "fever cough rash pain fatigue nausea dizziness swelling cramps thirst".split()
    for i in range(count):
        asked = f"I have {rng.choice(things)} and {rng.choice(things)} since {rng.integers(2, 30)} days. What now?"
        answers = [f"See a doctor within {rng.integers(2, 9)} days.", f"It will pass, {rng.choice(things)} often does."]
        if shuffled and rng.random() < 0.5: answers = answers[::-1]
        if not judged: rows.append({"instruction": asked, "input": "", "output": answers})
        else: rows += [{"instruction": asked, "input": "", "output": answers[k], "good": not k} for k in (0, 1)]
    file.write_text(json.dumps(rows))
    (file.parent/"dataset_info.json").write_text(json.dumps({"made": {"file_name": file.name} | (
        {"columns": {"prompt": "instruction", "query": "input", "response": "output", "kto_tag": "good"}} if judged else
        {"ranking": True})}))
    return dict(dataset="made", dataset_dir=str(file.parent))


RUN = dict(stage="dpo", model_name_or_path="tiny", cutoff_len=128, per_device_train_batch_size=16, learning_rate=5e-4,
    max_steps=12, logging_steps=1, save_strategy="no", val_size=32, disable_tqdm=True)


def whole_run(folder, **flags):
    args = parse(RUN | dict(output_dir=str(folder), tokenized_path=str(folder.parent/"cache")) | flags)
    (folder.parent/"cache").mkdir(exist_ok=True)
    with contextlib.redirect_stderr(io.StringIO()): return train(args, prepare_data(args))


@pytest.mark.parametrize("name", VARIANTS)
def test_it_learns_a_preference(name, tmp_path):
    "The held-out margin grows, and nearly every held-out pair is on the right side."
    flags = write_pairs(tmp_path/"rows.json", 160) | dict(pref_loss=name) | (dict(pref_beta=2.0) if name == "simpo" else {})
    metrics = whole_run(tmp_path/"run", **flags)
    assert metrics["eval_margin"] > metrics["eval_margin_before"] + 0.05*(name != "orpo"), metrics
    assert metrics["eval_accuracy"] >= 0.9, metrics
    assert metrics["eval_loss"] < metrics["eval_loss_before"]


def test_kto_learns_a_preference(tmp_path):
    flags = write_pairs(tmp_path/"rows.json", 96, judged=True) | dict(stage="kto")
    metrics = whole_run(tmp_path/"run", **flags)
    assert metrics["eval_margin"] > metrics["eval_margin_before"] + 0.5 and metrics["eval_accuracy"] >= 0.9, metrics


def test_swapped_labels_teach_nothing(tmp_path):
    "What the tests above measure can fail: with random labels, held-out pairs stay at chance."
    metrics = whole_run(tmp_path/"run", **write_pairs(tmp_path/"rows.json", 160, shuffled=True))
    assert 0.25 <= metrics["eval_accuracy"] <= 0.75 and metrics["eval_margin"] < 0.3, metrics


@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_how_a_step_is_split_changes_nothing(stage, tmp_path):
    "Micro-batch × accumulation, packing, and the reference's log-probabilities at hand or computed before."
    flags = write_pairs(tmp_path/"rows.json", 40, judged=stage == "kto") | dict(
        stage=stage, max_steps=4, val_size=8, precompute_ref_log_probs=False, learning_rate=1e-3)
    if stage == "kto": flags["kto_rejected_weight"] = 0.2
    def curve(name, **more):
        metrics = whole_run(tmp_path/name, **flags | more)
        return [loss for _, loss in sorted(losses(tmp_path/name).items())] + [metrics["eval_loss"], metrics["eval_margin"]]
    whole = curve("whole")
    split = dict(per_device_train_batch_size=4, gradient_accumulation_steps=4, per_device_eval_batch_size=3)
    for name, more in (("split", split), ("packed", dict(packing=True)), ("once", dict(precompute_ref_log_probs=True))):
        other = curve(name, **more)
        assert max(abs(a - b) for a, b in zip(whole, other)) < 2e-3, (name, whole, other)


def test_prompts_computed_once_or_twice_train_the_same(tmp_path, monkeypatch):
    flags = write_pairs(tmp_path/"rows.json", 40) | dict(max_steps=5, val_size=8)
    once = whole_run(tmp_path/"once", **flags)
    monkeypatch.setattr(preference, "_PAYS", 2.0)
    twice = whole_run(tmp_path/"twice", **flags)
    assert (once["prompt_computed_once"], twice["prompt_computed_once"]) == (True, False)
    assert max(abs(losses(tmp_path/"once")[s] - losses(tmp_path/"twice")[s]) for s in range(1, 6)) < 1e-4
    assert abs(once["eval_margin"] - twice["eval_margin"]) < 1e-3 and once["tokens"] < 0.9*twice["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_two_processes_train_as_one_does(stage, tmp_path):
    "The same steps on two processes, with the reference live and computed before training."
    flags = write_pairs(tmp_path/"rows.json", 40, judged=stage == "kto") | dict(
        stage=stage, max_steps=4, val_size=7, learning_rate=1e-3, use_cpu=True)
    if stage == "kto": flags["kto_rejected_weight"] = 0.2
    for once in (False, True):
        one = tmp_path/f"one{once}"
        metrics = whole_run(one, **flags | dict(precompute_ref_log_probs=once))
        two = tmp_path/f"two{once}"
        given = RUN | flags | dict(
            per_device_train_batch_size=8, output_dir=two, precompute_ref_log_probs=once, tokenized_path=tmp_path/"both")
        done = run("accelerate", "launch", "--num_processes", 2, "-m", "medllm.train", *(
            word for name, value in given.items() for word in (f"--{name}", value)))
        assert done.returncode == 0, done.stderr[-2000:]
        both = json.loads((two/"metrics.json").read_text())
        for a, b in ((losses(one)[s], losses(two)[s]) for s in range(1, 5)): assert abs(a - b) < 2e-3
        for name in ("eval_loss", "eval_margin", "eval_accuracy"): assert abs(metrics[name] - both[name]) < 2e-3, name


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dpo", "kto"])
def test_the_run_notebook(stage, tmp_path):
    "The record says which policy was the reference, and what became of the held-out margin."
    done = run("medllm", "run", stage, "--runs", tmp_path, "-p", "max_steps", 14, MEDLLM_CACHE=tmp_path/"cache")
    assert done.returncode == 0, done.stderr[-2000:]
    state = json.loads(next(tmp_path.glob(f"{stage}/*/run.json")).read_text())
    assert state["status"] == "completed" and state["metrics"]["reference"]["policy"] == "start"
    assert {row["what"]: row["met"] for row in state["verdict"]}["held-out margin"], state["verdict"]


# ------------------------------------------------------------------------------------------------ traps

@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    "An adapter that supervised fine-tuning moved away from its base, and pairs."
    folder = tmp_path_factory.mktemp("tuned")
    flags = write_pairs(folder/"rows.json", 48) | dict(finetuning_type="lora", lora_target="q_proj,v_proj")
    whole_run(folder/"sft", **flags | dict(
        stage="sft", dataset="mm", dataset_dir="data", max_samples=64, learning_rate=2e-2))
    return folder, flags | dict(adapter_name_or_path=str(folder/"sft"), learning_rate=5e-3, max_steps=4, val_size=8)


@pytest.mark.parametrize("stage, once, bits", [
    ("dpo", False, None), ("dpo", True, None), ("kto", False, None), ("kto", True, None), ("dpo", False, 4)])
def test_the_reference_of_a_tuned_adapter_is_that_adapter(stage, once, bits, tuned, tmp_path):
    "At the start policy and reference are one: log 2 for DPO, one half for KTO. The raw base gives another loss."
    folder, flags = tuned
    at_start = {"dpo": math.log(2), "kto": 0.5}[stage]
    if stage == "kto": flags = flags | dict(dataset="mm_rm", dataset_dir="data", max_samples=24)
    flags = flags | dict(stage=stage, precompute_ref_log_probs=once, quantization_bit=bits)
    metrics = whole_run(tmp_path/"right", **flags)
    assert abs(metrics["eval_loss_before"] - at_start) < 1e-5 and abs(losses(tmp_path/"right")[1] - at_start) < 1e-5
    assert metrics["reference"]["policy"] == "start" and str(folder/"sft") in metrics["reference"]["is"]
    # the trap, on purpose
    raw = whole_run(tmp_path/"raw", **flags | dict(ref_model="tiny", ref_model_quantization_bit=bits))
    assert abs(raw["eval_loss_before"] - at_start) > 1e-3, raw["eval_loss_before"]
    assert raw["reference"] | {"weights": 0} == {"policy": "model", "is": "tiny: adapters off", "weights": 0,
        "computed": "before training" if once else "while training"}


def test_the_reference_stays_where_training_started_when_it_is_resumed(tuned, tmp_path):
    "A resumed run compares with the starting adapter, not with the checkpoint; and the reference is not saved."
    _, flags = tuned
    flags = flags | dict(save_strategy="steps", save_steps=2, precompute_ref_log_probs=False)
    whole_run(tmp_path/"whole", **flags)
    assert not list((tmp_path/"whole").rglob("reference*"))
    whole_run(tmp_path/"half", **flags | dict(max_steps=4))
    for file in (tmp_path/"half"/"checkpoint-4").iterdir(): file.unlink()
    (tmp_path/"half"/"checkpoint-4").rmdir()
    metrics = whole_run(tmp_path/"half", **flags | dict(resume_from_checkpoint="true", overwrite_output_dir=True))
    assert abs(metrics["eval_loss_before"] - math.log(2)) < 1e-5
    for step in (3, 4): assert abs(losses(tmp_path/"half")[step] - losses(tmp_path/"whole")[step]) < 1e-5


def test_references_that_cannot_be_meant_are_refused(tuned, tmp_path):
    _, flags = tuned
    for more, says in (
            (dict(ref_policy="base"), "not from the base model"),
            (dict(ref_policy="start", ref_model="tiny"), "exclude each other"),
            (dict(ref_model_quantization_bit=4), "needs --ref_model"),
            (dict(pref_loss="simpo", ref_model="tiny"), "no reference")):
        with pytest.raises(UserError, match=says): whole_run(tmp_path/"run", **flags | more)


def test_dropout_is_the_policys_own(tmp_path):
    "The reference answers without dropout: twice the same, whatever the policy's layers do."
    models = (adapt(load_model("tiny"), AdaptPlan(dropout=0.5)), load_model("tiny"))
    units = pairs_of(np.random.default_rng(1), SIZES)
    policy = models[0].train()
    objective = Preference(PreferenceArguments(), Reference(ReferencePlan("start", "off", "base"), policy))
    objective.models = models
    trainer = trainer_of(objective, units, tmp_path)
    policy.train()
    batch = trainer.data_collator([units[0]])
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name: p.normal_(std=0.1)
        assert not torch.equal(trainer.logps(policy, batch), trainer.logps(policy, batch))
    assert torch.equal(objective.reference.logps(trainer, policy, batch), objective.reference.logps(trainer, policy, batch))
    assert policy.training


def test_the_estimate_of_kto_belongs_to_the_step(tmp_path):
    "One estimate over all micro-batches, also of one answer each; never below zero; from answers to other questions."
    models, units = two_models(), judged_of(np.random.default_rng(2), 8)
    trainer = trainer_of(kto_objective(models), units, tmp_path)
    batches = lambda size: [trainer.data_collator([units[i] for i in range(at, at + size)]) for at in range(0, 8, size)]
    estimates = []
    for size in (1, 2, 8):
        trainer.objective.begin(trainer, batches(size))
        estimates.append(trainer.objective.z0.item())
    assert max(estimates) - min(estimates) < 1e-5
    trainer = trainer_of(kto_objective(models[::-1]), units, tmp_path)
    trainer.objective.begin(trainer, batches(4))
    other = trainer.objective.z0.item()
    assert min(*estimates, other) >= 0 and max(*estimates, other) > 0
    assert (units.questions != units.questions[units.others]).all()


def test_weights_of_length_desensitisation():
    "Alpha counts from the length of the pair's shorter answer on, also where the rows of a batch are not in order."
    row = torch.tensor([1, 1, 1, 0, 0, 0, 0, 3, 3, 2])
    assert answer_weights(row, 4, 0.5).tolist() == [1, 1, .5, 1, .5, .5, .5, 1, 1, 1]
    assert answer_weights(torch.tensor([2, 2, 0, 1, 1, 1, 3, 0, 0]), 4, 0.5).tolist() == [1, 1, 1, 1, .5, .5, 1, 1, .5]


def test_every_loss_says_what_it_compares():
    assert {name: (loss.relative, loss.per_token) for name, loss in LOSSES.items()} == {
        "sigmoid": (True, False), "hinge": (True, False), "ipo": (True, True), "orpo": (False, True), "simpo": (False, True)}
    rng = np.random.default_rng(0)
    assert saved_share(pairs_of(rng, [(40, 4, 4)])) > 0.45 > 0.1 > saved_share(pairs_of(rng, [(1, 20, 20)]))
    assert F.logsigmoid(torch.tensor(0.)).item() == pytest.approx(-math.log(2))
    assert kto.weight_advice(10, 10, 1, 1) == ""
