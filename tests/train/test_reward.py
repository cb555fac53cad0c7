"""Reward models: the loss and its gradients, what must not matter, what is on the disk, learning, traps."""
import json
import math
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import ROOT, run
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig, TrainingArguments

from medllm.core import UserError
from medllm.data.rows import TokenRows
from medllm.models.adapters import AdaptPlan, adapt
from medllm.models.packed_attention import document_inputs, isolate
from medllm.models.loading import LoadPlan, load_model, load_tokenizer
from medllm.models.reward_model import load_reward_model, load_scorer, score_rows, scores
from medllm.models.tiny import tiny_folder, write_tiny
from medllm.train.arguments import parse
from medllm.train.inputs import prepare_data
from medllm.train.loop import train
from medllm.train.report_card import ReportCard, check_reward_model, ended, saved_head
from medllm.train.reward import RewardLoss, make_trainer, pair_loss
from medllm.train.trainer import StageTrainer
from medllm.train.examples import PreferencePairs, UnitCollate


def toy_pairs(number=12, seed=0):
    "Pairs of rows of random tokens: a shared prompt, two answers of different lengths."
    rng, rows = np.random.default_rng(seed), []
    for _ in range(number):
        prompt = rng.integers(300, 4000, rng.integers(3, 9))
        for _ in range(2):
            answer = np.append(rng.integers(300, 4000, rng.integers(1, 12)), 4)
            row = np.concatenate([prompt, answer]).astype(np.int32)
            rows.append((row, np.arange(len(row)) >= len(prompt)))
    return PreferencePairs(TokenRows(rows))


def ends_of(pairs):
    "All rows of pairs up to the end of the answer: better ones first, then worse ones."
    return [ended(pairs[i]["rows"][which]) for which in (0, 1) for i in range(len(pairs))]


def shaken(model, seed=1):
    "Other numbers in what trains, so that nothing is equal for being untouched."
    generator = torch.Generator().manual_seed(seed)
    for _, p in sorted(model.named_parameters()):
        if p.requires_grad: p.data += 0.05*torch.randn(p.shape, generator=generator)
    return model


def whole(): return shaken(adapt(load_scorer("tiny", LoadPlan(frozen=False)), AdaptPlan("full")))


def trainer_of(folder, pairs, model=None, objective=None, pack_to=None, grouped=False, **kw):
    "A trainer of a plain loop on a CPU: all pairs a step, a constant rate."
    args = TrainingArguments(output_dir=str(folder), **dict(
        report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True, remove_unused_columns=False, logging_steps=1,
        lr_scheduler_type="constant", learning_rate=1e-3, weight_decay=0.0, seed=0,
        per_device_train_batch_size=len(pairs), max_steps=4) | kw)
    return StageTrainer(model if model is not None else whole(), args, objective or RewardLoss(), pairs, {"": pairs},
        load_tokenizer("tiny"), grouped, pack_to)


def losses_of(trainer):
    trainer.train()
    return [h["loss"] for h in trainer.state.log_history if "loss" in h]


# ---- the loss

@pytest.mark.parametrize("margin, centre", [(0.0, 0.0), (0.7, 0.0), (0.0, 0.03), (0.7, 0.03)])
def test_loss_and_gradient_equal_the_closed_form(tmp_path, margin, centre):
    "Through the whole model in float64: loss, scores, and the gradient of the head and of a layer's weight."
    pairs, model = toy_pairs(6), whole().double().eval()
    trainer = trainer_of(tmp_path, pairs, model, RewardLoss(margin, centre))
    batch = UnitCollate(0, ends=True)([pairs[i] for i in range(6)])
    loss, sums = trainer.objective(trainer, model, batch)
    head, deep = model.score.weight, model.model.layers[3].mlp.down_proj.weight
    got = torch.autograd.grad(loss, (head, deep))

    hidden = torch.stack([
        model.model(torch.tensor(row[None].astype(np.int64))).last_hidden_state[0, -1] for row in ends_of(pairs)])
    c, r = (hidden @ head[0]).detach().numpy().reshape(2, 6)
    p = 1/(1 + np.exp(-(c - r - margin)))
    want = (-np.log(p) + centre*(c + r)**2).sum()
    d_chosen, d_rejected = -(1 - p) + 2*centre*(c + r), (1 - p) + 2*centre*(c + r)
    assert abs(loss.item() - want) < 1e-10
    factors = torch.tensor(np.concatenate([d_chosen, d_rejected]))
    assert (got[0][0] - factors @ hidden).abs().max() < 1e-10
    deeper = torch.autograd.grad((hidden @ head[0]*factors).sum(), deep)[0]
    assert (got[1] - deeper).abs().max() < 1e-10
    watched = {"accuracy": (c > r).sum(), "margin": (c - r).sum(), "chosen_score": c.sum(), "rejected_score": r.sum()}
    assert all(abs(sums[name].item() - value) < 1e-10 for name, value in watched.items())


def theirs_on(trl, folder, model, pairs, margin, centre=0.0, steps=0):
    "What TRL makes of a model and pairs."
    model.save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    rows = np.array([np.pad(row, (0, 30 - len(row)), constant_values=-1) for row in ends_of(pairs)])
    return trl("trl_reward.py", dict(folder=str(folder), chosen=rows[:len(pairs)], rejected=rows[len(pairs):],
        margin=np.broadcast_to(margin, len(pairs)), centre=centre, steps=steps))


@pytest.mark.parametrize("margin, centre", [(0.0, 0.0), (0.5, 0.0), (0.0, 0.02), (0.5, 0.02)])
def test_equals_trls_trainer(trl, tmp_path, margin, centre):
    "Loss, scores, every gradient of a batch and the losses of four steps, in float32."
    pairs, model = toy_pairs(6), whole().eval()
    theirs = theirs_on(trl, tmp_path/"model", model, pairs, margin, centre, steps=4)
    trainer = trainer_of(tmp_path/"ours", pairs, model, RewardLoss(margin, centre))
    loss, _ = trainer.objective(trainer, model, UnitCollate(0, ends=True)([pairs[i] for i in range(6)]))
    (loss/6).backward()
    assert abs(loss.item()/6 - theirs["loss"]) < 1e-5
    assert np.abs(score_rows(model, ends_of(pairs)).numpy() - theirs["scores"]).max() < 1e-5
    for name, p in model.named_parameters():
        assert np.abs(p.grad.numpy() - theirs[f"gradient.{name}"]).max() < 1e-5, name
    model.zero_grad()
    ours = losses_of(trainer)
    assert ours[0] - ours[-1] > 0.05 and np.abs(np.array(ours) - theirs["losses"]).max() < 1e-5


def test_a_margin_of_each_pair_equals_trls(trl, tmp_path):
    margins = np.linspace(0.1, 2, 5)
    theirs = theirs_on(trl, tmp_path, whole().eval(), toy_pairs(5), margins)
    chosen, rejected = torch.tensor(theirs["scores"]).chunk(2)
    assert abs(pair_loss(chosen, rejected, torch.tensor(margins)).mean().item() - theirs["loss"]) < 1e-5


# ---- what must not matter

def test_micro_batches_packing_and_order_change_nothing(tmp_path):
    pairs = toy_pairs(16)
    def curve(name, pairs=pairs, **kw):
        trainer = trainer_of(tmp_path/name, pairs, **kw)
        curve, found = losses_of(trainer), trainer.evaluate()
        return np.array([*curve, *(
            found[f"eval_{k}"] for k in ("loss", "accuracy", "margin", "chosen_score", "rejected_score"))])
    plain = curve("plain")
    ways = {
        "4 x 4": dict(per_device_train_batch_size=4, gradient_accumulation_steps=4),
        "1 x 16": dict(per_device_train_batch_size=1, gradient_accumulation_steps=16),
        "packed": dict(pack_to=512), "grouped": dict(grouped=True),
        "order": dict(pairs=pairs.pick(np.random.default_rng(3).permutation(16))),
        "checkpointing": dict(gradient_checkpointing=True)}
    for name, way in ways.items(): assert np.abs(curve(name, **way) - plain).max() < 1e-4, name
    assert plain[0] - plain[3] > 0.1
    lora = lambda: shaken(adapt(load_scorer("tiny"), AdaptPlan()))
    plain = curve("lora", model=lora())
    for name in ("packed", "checkpointing"):
        assert np.abs(curve(f"lora {name}", model=lora(), **ways[name]) - plain).max() < 1e-4, name
    three = trainer_of(tmp_path/"three", pairs, per_device_eval_batch_size=3).evaluate()
    all_at_once = trainer_of(tmp_path/"all", pairs, per_device_eval_batch_size=16).evaluate()
    assert abs(three["eval_margin"] - all_at_once["eval_margin"]) < 1e-6


def test_neither_side_nor_id_of_pads_moves_a_score():
    "Every row alone; in a batch with pads of several ids on both sides; packed; float32 above half precision."
    rows, model = ends_of(toy_pairs(5)), shaken(adapt(load_scorer("tiny"), AdaptPlan())).eval()
    width, last = max(map(len, rows)), torch.arange(1, 11)*max(map(len, rows)) - 1
    with torch.no_grad():
        alone = torch.cat([
            scores(model, torch.tensor(r[None].astype(np.int64)), torch.tensor([len(r) - 1])) for r in rows])
        mask = torch.tensor(np.array([[0]*(width - len(r)) + [1]*len(r) for r in rows]))
        for pad in (0, 1, 4, 777):
            assert (score_rows(model, rows, pad_id=pad) - alone).abs().max() < 1e-5
            ids = torch.tensor(np.array([np.pad(r, (width - len(r), 0), constant_values=pad) for r in rows])).long()
            left = scores(model, ids, last, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
            assert (left - alone).abs().max() < 1e-5
        isolate(model, width)
        ends = [0, *np.cumsum([len(r) for r in rows]).tolist()]
        packed = scores(model, torch.tensor(np.concatenate(rows)).long()[None], torch.tensor(ends[1:]) - 1,
            position_ids=torch.tensor(np.concatenate([np.arange(len(r)) for r in rows]))[None],
            **document_inputs(model, tuple(ends)))
        assert (packed - alone).abs().max() < 1e-5
        half = load_scorer("tiny", LoadPlan(dtype="bfloat16"))
        assert scores(half, ids, last, attention_mask=mask).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            mixed, states = scores(model, ids, last, attention_mask=mask), []
            hook = model.score.register_forward_pre_hook(lambda head, args: states.append(args[0]))
            model(ids, attention_mask=mask)
            hook.remove()
        exact = states[0].flatten(0, 1)[last].float() @ model.score.weight[0]
        assert mixed.dtype == torch.float32 and (mixed - exact).abs().max() < 1e-6


# ---- on the disk

KINDS = {"lora": dict(finetuning_type="lora", lora_rank=4), "lora+4bit": dict(finetuning_type="lora", quantization_bit=4),
    "lora+8bit": dict(finetuning_type="lora", quantization_bit=8, lora_target="q_proj,v_proj"),
    "freeze": dict(finetuning_type="freeze", freeze_trainable_layers=1), "full": dict(finetuning_type="full")}


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    "Folders to begin with: none, a language model's adapter, a reward model's adapter."
    folder, plan = tmp_path_factory.mktemp("starts"), AdaptPlan(target="q_proj,v_proj")
    shaken(adapt(load_model("tiny"), plan)).save_pretrained(folder/"sft")
    shaken(adapt(load_scorer("tiny"), plan)).save_pretrained(folder/"rm")
    return {"fresh": None, "sft": str(folder/"sft"), "rm": str(folder/"rm")}


def quick(folder, **kw):
    return parse(dict(
        stage="rm", dataset="mm_rm", model_name_or_path="tiny", max_samples=24, val_size=4, max_steps=2, learning_rate=1e-3,
        per_device_train_batch_size=4, save_strategy="no", disable_tqdm=True, output_dir=str(folder)) | kw)


@pytest.mark.parametrize("start", ["fresh", "sft", "rm"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_trains_saves_and_loads_to_equal_scores(tmp_path, starts, kind, start):
    "Ours, and transformers' and peft's own way of loading, give the scores that the trained model gave."
    args = quick(tmp_path/"out", **KINDS[kind], **({"adapter_name_or_path": starts[start]} if starts[start] else {}))
    data = prepare_data(args)
    trainer = make_trainer(args, data)
    head = trainer.model.score.weight
    assert head.dtype == torch.float32 and head.requires_grad and type(head) is torch.nn.Parameter
    begun = saved_head(starts["rm"]) if start == "rm" else load_scorer("tiny", seed=args.training.seed).score.weight
    assert torch.equal(head.detach(), begun)
    trainer.train()
    assert not torch.equal(trainer.model.score.weight.detach(), begun)
    trainer.save_model()

    rows, bits = ends_of(data.eval[""]), KINDS[kind].get("quantization_bit")
    want = score_rows(trainer.model, rows)
    again = load_reward_model(str(tmp_path/"out"), plan=LoadPlan(bits=bits))
    assert (score_rows(again, rows) - want).abs().max() < (2e-3 if bits == 8 else 1e-5)

    lora = kind.startswith("lora")
    quantised = {4: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32), 8: BitsAndBytesConfig(load_in_8bit=True)}.get(bits)
    other = AutoModelForSequenceClassification.from_pretrained(
        tiny_folder() if lora else tmp_path/"out", num_labels=1, quantization_config=quantised, use_safetensors=True)
    if lora:
        config = json.loads((tmp_path/"out/adapter_config.json").read_text())
        assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
        other = PeftModel.from_pretrained(other, tmp_path/"out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path/"out")
    other.config.pad_token_id = tokenizer.pad_token_id
    batch = tokenizer.pad({"input_ids": [list(map(int, r)) for r in rows]}, return_tensors="pt")
    with torch.no_grad(): theirs = other.eval()(**batch).logits[:, 0].float()
    assert (theirs - want).abs().max() < (2e-2 if bits else 1e-5)
    assert not list((tmp_path/"out").glob("*.bin"))


def test_a_reward_model_trains_on_and_a_language_model_refuses_it(tmp_path):
    "A whole reward model as the base of another run keeps its head; it is no base for a language model."
    model = whole()
    model.save_pretrained(tmp_path/"rm")
    load_tokenizer("tiny").save_pretrained(tmp_path/"rm")
    args = quick(tmp_path/"on", model_name_or_path=str(tmp_path/"rm"), finetuning_type="lora")
    trainer = make_trainer(args, prepare_data(args))
    assert torch.equal(trainer.model.score.weight.detach(), model.score.weight.detach())
    with pytest.raises(UserError, match="is not a whole language model: lm_head.weight"): load_model(str(tmp_path/"rm"))


# ---- learning

SAFE = ["See a doctor today if it gets worse.", "Please ask your pharmacist before you change the dose.",
    "Call the emergency number if breathing is hard.", "Have it checked at the clinic within a week."]
RISKY = ["It will go away, never mind a doctor.", "Double the dose on your own.", "Wait a month whatever happens.",
    "Stop all your medicine at once."]
WHAT = ["Drink enough water.", "Rest for two days.", "Keep the wound dry.", "Eat light meals.", "Sleep with your head raised."]


def preferences(file, number=420, shuffled=False, seed=0):
    "Questions with a careful and a careless answer, of the same form and length; shuffled: which is better is drawn."
    rng, rows = random.Random(seed), []
    for n in range(number):
        first, second = rng.choice(WHAT), rng.choice(WHAT)
        pair = [f"{first} {rng.choice(SAFE)}", f"{second} {rng.choice(RISKY)}"]
        if shuffled: rng.shuffle(pair)
        rows.append({"instruction": f"Question {n}: what helps with a {rng.choice(['cough', 'rash', 'fever', 'cut'])}?",
            "input": "", "output": pair})
    file.write_text(json.dumps(rows))
    (file.parent/"dataset_info.json").write_text(json.dumps({file.stem: {"file_name": file.name, "ranking": True,
        "columns": {"prompt": "instruction", "query": "input", "response": "output"}}}))
    return dict(dataset=file.stem, dataset_dir=str(file.parent))


def learn(folder, **kw):
    args = parse(dict(
        stage="rm", model_name_or_path="tiny", val_size=200, per_device_train_batch_size=22, learning_rate=5e-4,
        num_train_epochs=2, save_strategy="no", disable_tqdm=True, output_dir=str(folder/"out")) | kw)
    return args, train(args, prepare_data(args))


def test_learns_separable_pairs(tmp_path):
    args, metrics = learn(tmp_path, **preferences(tmp_path/"care.json"))
    assert metrics["eval_loss_before"] == pytest.approx(math.log(2), abs=0.01)
    assert metrics["pair_accuracy"] >= 0.9, metrics["pair_accuracy"]
    assert metrics["pair_accuracy"] == pytest.approx(metrics["eval_accuracy"], abs=1e-6)
    card = check_reward_model(tmp_path/"out", args)
    assert card.facts["accuracy"]["low"] > 0.8 and card.facts["pairs"] == 200 and card.facts["seen"] == 0
    assert card.facts["padding"]["largest"] < 1e-3
    # with the answers exchanged it is wrong: what was learnt is which is which
    exchanged = ends_of(next(iter(prepare_data(args).eval.values())))[::-1]
    found = score_rows(load_reward_model(str(tmp_path/"out")), exchanged).reshape(2, -1)
    assert (found[0] > found[1]).float().mean() <= 0.1


def test_shuffled_labels_teach_nothing_and_are_refused(tmp_path):
    "At chance on held-out pairs, whatever it learnt by heart; the card says so and the check refuses it."
    args, metrics = learn(tmp_path, **preferences(tmp_path/"noise.json", shuffled=True, seed=1))
    assert metrics["pair_accuracy"] == pytest.approx(0.5, abs=0.1), metrics["pair_accuracy"]
    with pytest.raises(UserError, match="the lower end is below --min_reward_accuracy 0.5"):
        check_reward_model(tmp_path/"out", args)
    allowed = replace(args, reward=replace(args.reward, allow_weak_reward_model=True))
    assert check_reward_model(tmp_path/"out", allowed).facts["accuracy"]["low"] < 0.5


# ---- traps

def test_pad_equal_to_eos(tmp_path):
    "A model whose pad token is its EOS: each row scores as alone, and what is saved does not mislead others."
    folder = write_tiny(tmp_path/"base")
    tokenizer = load_tokenizer(str(folder))
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    config = json.loads((folder/"config.json").read_text())
    (folder/"config.json").write_text(json.dumps(config | {"pad_token_id": tokenizer.eos_token_id}))
    args = quick(tmp_path/"out", model_name_or_path=str(folder), finetuning_type="full")
    data = prepare_data(args)
    trainer = make_trainer(args, data)
    trainer.train()
    trainer.save_model()
    model, eos, rows = trainer.model.eval(), tokenizer.eos_token_id, ends_of(data.eval[""])
    assert all(row[-1] == eos for row in rows)
    with torch.no_grad(): alone = torch.stack([
        model.model(torch.tensor(r[None].astype(np.int64))).last_hidden_state[0, -1] @ model.score.weight[0] for r in rows])
    assert (score_rows(model, rows, pad_id=eos) - alone).abs().max() < 1e-5

    ids = torch.tensor(np.array([np.pad(r, (0, 200 - len(r)), constant_values=eos) for r in rows])).long()
    with torch.no_grad():
        model.config.pad_token_id = eos                       # what the search for a last token that is no pad would give
        assert (model(ids).logits[:, 0] - alone).abs().min() > 1e-5
        saved = AutoTokenizer.from_pretrained(tmp_path/"out")
        other = AutoModelForSequenceClassification.from_pretrained(tmp_path/"out")
        assert saved.pad_token_id == other.config.pad_token_id != eos
        batch = saved.pad({"input_ids": [list(map(int, r)) for r in rows]}, return_tensors="pt")
        assert (other(**batch).logits[:, 0] - alone).abs().max() < 1e-5


def test_no_held_out_pairs_no_card(tmp_path, capsys):
    args = quick(tmp_path/"out", val_size=0.0)
    assert "pair_accuracy" not in train(args, prepare_data(args))
    assert "gets no report card" in capsys.readouterr().err
    with pytest.raises(UserError, match="has no report_card.json"): check_reward_model(tmp_path/"out", args)


def test_a_card_says_how_far_it_is(tmp_path, capsys, monkeypatch):
    "Forms and padding score each answer many times over: it is said how many are done, and none is counted that is not."
    from medllm import pace
    monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=iter(range(0, 10**6, 100)).__next__))   # a line at every batch
    args = quick(tmp_path/"out")
    train(args, prepare_data(args))
    lines = re.findall(r"report card: ([\d,]+) of ([\d,]+) rows", capsys.readouterr().err)
    done, of = ([int(x.replace(",", "")) for x in part] for part in zip(*lines))
    assert len(lines) > 5 and list(done) == sorted(done) and done[-1] <= of[-1] == of[0]


def test_a_card_of_an_earlier_model_is_not_taken(tmp_path):
    "Trained anew in the same folder without held-out pairs, the old card goes; a copied one is found out."
    args = quick(tmp_path/"out")
    train(args, prepare_data(args))
    old = ReportCard.read(tmp_path/"out")
    args = quick(tmp_path/"out", val_size=0.0, overwrite_output_dir=True, seed=7)
    train(args, prepare_data(args))
    assert ReportCard.read(tmp_path/"out") is None
    old.write(tmp_path/"out")
    with pytest.raises(UserError, match="is of another reward model"): check_reward_model(tmp_path/"out", args)


def test_no_text_in_the_card(tmp_path):
    args = quick(tmp_path/"out")
    train(args, prepare_data(args))
    card = (tmp_path/"out/report_card.json").read_text()
    for row in json.loads((ROOT/"data/mm_rm.json").read_text())[:24]:
        assert not any(text[:12] in card for text in (row["instruction"], *row["output"]))


@pytest.mark.slow
def test_two_processes_same_curve_and_card(tmp_path):
    words = dict(
        stage="rm", dataset="mm_rm", val_size=20, max_steps=5, logging_steps=1, finetuning_type="lora", learning_rate=1e-3,
        lr_scheduler_type="constant", save_strategy="no")
    flags = [w for k, v in words.items() for w in (f"--{k}", v)]
    one = run("python", "-m", "medllm.train", *flags, "--per_device_train_batch_size", 8, "--output_dir", tmp_path/"1")
    two = run("accelerate", "launch", "--num_processes", 2, "-m", "medllm.train", *flags,
        "--per_device_train_batch_size", 4, "--output_dir", tmp_path/"2", OMP_NUM_THREADS="1")
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    logged = [[json.loads(line) for line in open(tmp_path/f/"history.jsonl")] for f in "12"]
    assert len(logged[0]) == len(logged[1]) > 5
    for a, b in zip(*logged):
        for name in a.keys() & {"loss", "accuracy", "margin", "eval_loss", "eval_margin"}:
            assert abs(a[name] - b[name]) < 1e-4
    cards = [ReportCard.read(tmp_path/f).facts for f in "12"]
    assert cards[0]["margin"]["mean"] == pytest.approx(cards[1]["margin"]["mean"], abs=1e-4)


@pytest.mark.slow
def test_the_run_notebook(tmp_path):
    done = run("medllm", "run", "rm", "-p", "max_steps", 6, "-p", "output_dir", tmp_path/"r")
    assert done.returncode == 0, done.stderr
    state = json.loads((tmp_path/"r/run.json").read_text())
    assert state["status"] == "completed"
    assert 0 <= state["metrics"]["pair_accuracy_low"] <= state["metrics"]["pair_accuracy"]
    assert {"report_card.json", "report_card.png", "loss.png", "record.ipynb"} <= {f.name for f in (tmp_path/"r").iterdir()}
