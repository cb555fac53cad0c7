"""What a resumed run does otherwise than before: in force at its first step and told, or refused before it begins."""
import contextlib
import io
import json
import shutil

import pytest
import torch
from transformers import TrainerCallback

from medllm.core import UserError
from medllm.train.arguments import parse
from medllm.checkpoint.commit import commit, drop
from medllm.checkpoint.compatibility import allowed
from medllm.train.fingerprint import fingerprint_of
from medllm.train.inputs import prepare_data
from medllm.json_file import read_log
from medllm.train.loop import stage_module, train

RUN = dict(model_name_or_path="tiny", cutoff_len=64, per_device_train_batch_size=4, max_steps=6, logging_steps=1,
    save_steps=2, learning_rate=1e-3, disable_tqdm=True, finetuning_type="lora", lora_rank=4, dtype="float32")


BLIND = dict(eval_strategy="no", eval_dataset=None, eval_steps=None)     # without validation


def questions(file, *asked):
    "A file of rows."
    file.write_text(json.dumps([{"instruction": one, "output": "Rest."} for one in asked]))
    return str(file)


def whole(folder, **more):
    "Metrics of a run, and what it said."
    with contextlib.redirect_stderr(io.StringIO()) as said:
        args = parse(RUN | more | dict(output_dir=str(folder)))
        metrics = train(args, prepare_data(args))
    return metrics, said.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A run with checkpoints at steps 2, 4 and 6; copy it before you break it."
    folder = tmp_path_factory.mktemp("finished")
    RUN.update(dataset=questions(folder/"rows.json", *(f"What is {'very '*(n % 5)}number {n}?" for n in range(20))),
        eval_dataset=questions(folder/"asked.json", "Gout?", "Scurvy?"), eval_strategy="steps", eval_steps=1)
    whole(folder/"run")
    return folder/"run"


@pytest.fixture
def at_2(finished, tmp_path):
    "The run as it was when it had its first checkpoint."
    shutil.copytree(finished, tmp_path/"run")
    for step in (4, 6): drop(tmp_path/"run"/f"checkpoint-{step}")
    return tmp_path/"run"


class FirstStep(TrainerCallback):
    "What is in force when the optimiser steps for the first time; the run ends there."
    def __init__(self): self.seen = None
    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        group = kwargs["optimizer"].param_groups[0]
        self.seen = self.seen or {name: group[name] for name in ("lr", "betas", "eps", "weight_decay") if name in group}
    def on_step_end(self, args, state, control, **kwargs): control.should_training_stop = True


def resumed(folder, allow, **more):
    "Trainer and options at the first step of a run that goes on from its newest checkpoint, and what was said."
    with contextlib.redirect_stderr(io.StringIO()) as said:
        going_on = dict(output_dir=str(folder), resume_from_checkpoint="true", allow=allow, save_steps=100)
        args = parse(RUN | more | going_on)
        data = prepare_data(args)
        trainer = stage_module("sft").make_trainer(args, data)
        trainer.fingerprint, first = fingerprint_of(args, data), FirstStep()
        trainer.add_callback(first)
        trainer.batches, forward = [], trainer.compute_loss
        def noted(model, inputs, **rest):
            trainer.batches.append({"rows": len(inputs["input_ids"]), "seed": torch.initial_seed(),
                "noise": getattr(model.get_input_embeddings(), "neftune_noise_alpha", None),
                "checkpointed": any(getattr(m, "gradient_checkpointing", False) for m in model.modules())})
            return forward(model, inputs, **rest)
        trainer.compute_loss = noted
        trainer.train(str(sorted(folder.glob("checkpoint-*"))[-1]))
    return trainer, first.seen, said.getvalue()


def rate(step, steps, top): return top*(1 - step/steps)


# Word of --allow -> other flags, and what shows at the first step that they are in force
IN_FORCE = {
    "lr": (dict(learning_rate=5e-3), lambda t, seen: seen["lr"] == pytest.approx(rate(2, 6, 5e-3))),
    "optimiser": (dict(weight_decay=.3, adam_beta1=.5, adam_beta2=.9, adam_epsilon=1e-5, max_grad_norm=1e-3), lambda t, seen:
        ((seen["weight_decay"], seen["betas"], seen["eps"], t.args.max_grad_norm) == (.3, (.5, .9), 1e-5, 1e-3)
        and t.optimizer.state_dict()["state"][0]["step"] == 3)),
    "batch": (dict(per_device_train_batch_size=2, gradient_accumulation_steps=2), lambda t, seen:
        [b["rows"] for b in t.batches] == [2, 2]),
    "order": (dict(group_by_length=False), lambda t, seen: t.order == "random"),
    "seed": (dict(seed=7), lambda t, seen: t.batches[0]["seed"] == 7),
    "data_seed": (dict(data_seed=8), lambda t, seen: t.callback_handler.train_dataloader.batch_sampler.seed == 8),
    "noise": (dict(neftune_noise_alpha=5.0), lambda t, seen: t.batches[0]["noise"] == 5.0),
    "smoothing": (dict(label_smoothing_factor=.2), lambda t, seen: t.objective.smoothing == .2),
    "checkpointing": (dict(gradient_checkpointing=True), lambda t, seen: t.batches[0]["checkpointed"]),
    "attention": (dict(flash_attn="disabled"), lambda t, seen: t.model.config._attn_implementation == "eager"),
    "schedule": (dict(lr_scheduler_type="constant"), lambda t, seen: seen["lr"] == pytest.approx(1e-3)),
    "steps": (dict(max_steps=10), lambda t, seen:
        seen["lr"] == pytest.approx(rate(2, 10, 1e-3)) and t.state.max_steps == 10),
    "selection": ({}, None), "validation": ({}, None), "precision": ({}, None)}           # have tests of their own
TOGETHER = [word for word, (_, check) in IN_FORCE.items() if check and word not in ("schedule", "steps")]


def test_every_word_of_allow_has_a_case():
    with pytest.raises(UserError) as e: allowed("x")
    assert set(str(e.value).split("known are ")[1].split(", ")) == IN_FORCE.keys()


@pytest.mark.parametrize("words", [TOGETHER, ["schedule"], ["steps"]], ids=["together", "schedule", "steps"])
def test_what_is_allowed_is_in_force_at_the_first_step(at_2, words):
    flags = {name: value for word in words for name, value in IN_FORCE[word][0].items()}
    with pytest.raises(UserError) as e: whole(at_2, resume_from_checkpoint="true", **flags)
    assert sorted(str(e.value).split("--allow ")[1].split(" goes on")[0].split(",")) == sorted(words)
    trainer, seen, _ = resumed(at_2, ",".join(words), **flags)
    assert trainer.resumed.name == "checkpoint-2" and trainer.state.global_step == 3
    for word in words: assert IN_FORCE[word][1](trainer, seen), (word, seen, trainer.batches)


def test_nothing_else_moves(at_2, finished):
    "Without another flag the options of the first step are those of a run that was not interrupted."
    trainer, seen, said = resumed(at_2, None)
    assert seen == {"lr": pytest.approx(rate(2, 6, 1e-3)), "betas": (.9, .999), "eps": 1e-8, "weight_decay": 0.0}
    assert (trainer.ahead, trainer.changes) == (0, {}) and "->" not in said


def test_the_case_of_the_learning_rate(at_2):
    "The whole way: the log of the resumed run has the new rate from its first step on, and tells old and new."
    _, said = whole(at_2, resume_from_checkpoint="true", learning_rate=5e-3, allow="lr")
    assert "going on from checkpoint-2; not as it was: lr 0.001 -> 0.005" in said
    assert "learning rate of the next step: 6.67e-04 -> 3.33e-03" in said
    rates = {h["step"]: h["learning_rate"] for h in read_log(at_2/"history.jsonl") if "loss" in h}
    assert rates == {step: pytest.approx(rate(step - 1, 6, 1e-3 if step < 3 else 5e-3)) for step in range(1, 7)}
    # and again without a word: the checkpoint of the resumed run is of the new rate
    drop(at_2/"checkpoint-6")
    _, said = whole(at_2, resume_from_checkpoint="true", learning_rate=5e-3)
    assert "going on from checkpoint-4" in said and "->" not in said
    again = {h["step"]: h["learning_rate"] for h in read_log(at_2/"history.jsonl") if "loss" in h}
    assert again == rates


@pytest.mark.parametrize("flags, allow, why", [
    (dict(optim="sgd"), "optimiser", "the checkpoint holds the moments of adamw_torch_fused, not those of sgd"),
    (dict(optim="adafactor"), "optimiser", "moments"),
    (dict(lr_scheduler_type="reduce_lr_on_plateau"), "schedule,selection", "goes by what validation came to"),
    (dict(lr_scheduler_type="greedy"), "schedule,selection", "goes by what validation came to"),
    (dict(max_steps=1), "steps", "is past the last step \\(1\\), so nothing is left to train")])
def test_what_cannot_be_put_in_force_is_refused(at_2, flags, allow, why):
    before = (at_2/"history.jsonl").read_bytes()
    with pytest.raises(UserError, match=why): whole(at_2, resume_from_checkpoint="true", allow=allow, **flags)
    assert (at_2/"history.jsonl").read_bytes() == before and (at_2/"checkpoint-2").exists()      # nothing was touched


def test_a_complete_run_says_so(at_2):
    "With the checkpoint as the end of the run: nothing is trained, and the model that it comes to is there."
    (at_2/"adapter_model.safetensors").unlink()
    metrics, said = whole(at_2, resume_from_checkpoint="true", max_steps=2, allow="steps")
    assert "nothing is left to train: checkpoint-2 is the last step of the run" in said and metrics["steps"] == 2
    assert len({(folder/"adapter_model.safetensors").read_bytes() for folder in (at_2, at_2/"checkpoint-2")}) == 1


def rows_trained(folder, monkeypatch, **more):
    "The rows that a run hands out, step by step; its metrics, and what it said."
    from medllm.data.batches import Collate
    seen, collate = [], Collate.__call__
    def noted(self, rows):
        seen.extend(hash(r["input_ids"].tobytes()) for r in rows)
        return collate(self, rows)
    with monkeypatch.context() as m:
        m.setattr(Collate, "__call__", noted)
        metrics, said = whole(folder, **BLIND, num_train_epochs=2, **more)
    return seen, metrics, said


@pytest.mark.parametrize("then, now, at, steps, again", [
    ((4, 1), (2, 2), 2, 10, 0), ((4, 1), (8, 1), 3, 3 + 2 + 3, 4), ((8, 1), (2, 1), 1, 1 + 6 + 10, 0),
    ((4, 1), (8, 1), 7, 7 + 2, 0)], ids=str)
def test_another_batch_leaves_no_row_out(finished, tmp_path, monkeypatch, then, now, at, steps, again):
    "Two epochs of 20 rows, the batch changed at a step: what is left of the epoch are the rows that were not seen."
    batch = lambda b: dict(per_device_train_batch_size=b[0], gradient_accumulation_steps=b[1], save_steps=at)
    first, _, _ = rows_trained(tmp_path/"r", monkeypatch, **batch(then), max_steps=at)
    first = first[:at*then[0]*then[1]]                                     # a loader is one batch ahead
    rest, metrics, said = rows_trained(tmp_path/"r", monkeypatch, **batch(now), max_steps=-1,
        resume_from_checkpoint="true", allow="batch,steps")
    assert metrics["steps"] == steps and (f"{again} rows of this epoch come again" in said) == bool(again), said
    assert sorted(first + rest[again:]) == sorted(2*list(set(first + rest))) and set(rest[:again]) <= set(first)


def test_the_best_checkpoint_is_chosen_again(finished, tmp_path):
    "What was best by one metric is not compared with another; of the checkpoints that are there, the best by today's counts."
    shutil.copytree(finished, tmp_path/"run")
    folder = tmp_path/"run"
    drop(folder/"checkpoint-6")
    state = json.loads((folder/"checkpoint-4/trainer_state.json").read_text())
    for line in state["log_history"]:
        if "eval_loss" in line: line["eval_perplexity"] = 9e3 if line["step"] == 2 else 1e4
    state |= {"best_metric": -1.0, "best_global_step": 4}
    (folder/"checkpoint-4/trainer_state.json").write_text(json.dumps(state))
    commit(folder/"checkpoint-4", 4, json.loads((folder/"checkpoint-4/fingerprint.json").read_text()))
    trainer, _, said = resumed(folder, "selection", metric_for_best_model="perplexity", greater_is_better=False)
    assert "the best checkpoint so far is checkpoint-2: eval_perplexity 9000" in said
    assert trainer.state.best_metric < 9e3 and trainer.state.best_global_step == 5      # the next step bettered it


def test_other_validation_rows_begin_anew(finished, tmp_path):
    shutil.copytree(finished, tmp_path/"run")
    assert json.loads((tmp_path/"run/checkpoint-6/trainer_state.json").read_text())["best_metric"] is None
    whole(tmp_path/"run", metric_for_best_model="loss", overwrite_output_dir=True, max_steps=2)
    best = json.loads((tmp_path/"run/checkpoint-2/trainer_state.json").read_text())["best_metric"]
    others = questions(tmp_path/"others.json", "What is the price of a ticket to the moon, and who buys it?")
    trainer, _, said = resumed(tmp_path/"run", "validation,steps", metric_for_best_model="loss", eval_dataset=others)
    assert {"steps.max_steps", "validation.asked.json"} < trainer.changes.keys()
    assert best is not None and trainer.state.best_global_step == 3 and trainer.state.best_metric != best


def test_another_precision(finished, tmp_path):
    "Adapters of bfloat16 stay so when a checkpoint is loaded into them (peft makes them float32)."
    whole(tmp_path/"run", dtype="bfloat16", max_steps=1, save_steps=1, **BLIND)
    for pure in (True, False):
        trainer, _, _ = resumed(tmp_path/"run", "precision,steps", dtype="bfloat16", pure_bf16=pure, **BLIND)
        kinds = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
        assert kinds == {torch.bfloat16 if pure else torch.float32} and trainer.state.global_step == 2


def without(*parts): return lambda note: {name: value for name, value in note.items() if name not in parts}
def with_(**parts): return lambda note: note | parts
def placed(**parts): return lambda note: note | {"progress": [note["progress"][0] | parts]}


NOT_OURS = {
    "a fingerprint of nothing": ("fingerprint.json", lambda note: {"a": 1}, "what run it is.*without stage, dataset_rows"),
    "no rows": ("fingerprint.json", without("dataset_rows"), "is without dataset_rows; begin a new run"),
    "a batch that is a list": ("fingerprint.json", with_(batch=[1]),
        "fingerprint.json is not one that medllm wrote: batch is a list"),
    "a batch of text": ("fingerprint.json", with_(batch={"per_device_train_batch_size": "x"}), "train_batch_size is text"),
    "an optimiser that is a table": ("fingerprint.json", with_(optimiser={"optim": {}}), "optimiser.optim is a table"),
    "no process": ("progress.json", with_(progress=[]), "progress.json is of no process"),
    "no progress": ("progress.json", lambda note: {"a": 1}, "progress.json is not one that medllm wrote"),
    "an epoch of no step": ("progress.json", placed(each=0), "progress.0.each"),
    "a cell that is text": ("progress.json", placed(cell="x"), "progress.0.cell is text"),
    "steps that were never done": ("trainer_state.json", with_(global_step=5), "trainer_state.json is of step 5"),
    "no step": ("trainer_state.json", without("global_step"), "global_step is missing"),
    "a log that is a number": ("trainer_state.json", with_(log_history=3), "log_history is a number"),
    "a state of another library": ("trainer_state.json", with_(a=1), "trainer_state.json does not fit this run"),
    "a control of another library": ("trainer_state.json", with_(stateful_callbacks={"TrainerControl": {"args": {"a": 1},
        "attributes": {}}}), "trainer_state.json does not fit this run")}


@pytest.mark.parametrize("case", NOT_OURS)
def test_a_checkpoint_that_somebody_committed_anew_is_refused(at_2, case):
    "Its bytes are those that were committed, and yet it cannot be compared with the run asked for, or not gone on from."
    name, change, why = NOT_OURS[case]
    folder = at_2/"checkpoint-2"
    (folder/name).write_text(json.dumps(change(json.loads((folder/name).read_text()))))
    commit(folder, 2, json.loads((folder/"fingerprint.json").read_text()))
    history = (at_2/"history.jsonl").read_bytes()
    with pytest.raises(UserError, match=why): whole(at_2, resume_from_checkpoint="true", allow="batch,optimiser")
    assert folder.exists() and (at_2/"history.jsonl").read_bytes() == history
