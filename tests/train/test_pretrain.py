"""Continued pre-training: held-out text gets likelier, replay keeps what was known, and the layout changes nothing."""
import json
import math

import pytest
from stages import quiet

from medllm.train.arguments import parse
from medllm.train.inputs import prepare_data
from medllm.json_file import read_log
from medllm.train.loop import run

FLAGS = dict(stage="pt", cutoff_len=128, per_device_train_batch_size=4, learning_rate=2e-3, logging_steps=1, save_strategy="no",
    disable_tqdm=True)


def pretrain(folder, **flags):
    with quiet(): return run(FLAGS | flags | dict(output_dir=str(folder)))


def test_held_out_text_gets_likelier(tmp_path):
    metrics = pretrain(tmp_path, dataset="mm_pt", val_size=30, max_steps=60)
    assert metrics["eval_perplexity"] < 0.5*metrics["eval_perplexity_before"]
    assert math.isclose(metrics["eval_perplexity"], math.exp(metrics["eval_loss"]))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    "Files of two kinds of text, medical and general, and a model that has read the general one."
    folder = tmp_path_factory.mktemp("texts")
    kinds = {"general": "The train to town number {} leaves at {} o'clock and stops at every small station on the way.",
        "medical": "Patient {} takes {} milligrams of metformin twice a day with food and reports no nausea."}
    for name, text in kinds.items():
        lines = [text.format(n*7 % 89, n*5 % 97) for n in range(160)]
        (folder/f"{name}.txt").write_text("\n".join(lines[:120]))
        (folder/f"{name}_held.txt").write_text("\n".join(lines[120:]))
    entries = {f"{name}{held}": {"file_name": f"{name}{held}.txt", "private": False} for name in kinds for held in ("", "_held")}
    (folder/"dataset_info.json").write_text(json.dumps(entries))
    pretrain(folder/"base", dataset="general", dataset_dir=str(folder), max_steps=40)
    return folder


@pytest.mark.slow
def test_replay_keeps_what_was_known(texts, tmp_path):
    "Perplexity is reported for each set; the general one rises less with replay, the medical one falls all the same."
    again = dict(model_name_or_path=str(texts/"base"), finetuning_type="full", dataset="medical", dataset_dir=str(texts),
        eval_dataset="medical_held,general_held", num_train_epochs=8)
    alone = pretrain(tmp_path/"alone", **again)
    mixed = pretrain(tmp_path/"mixed", replay_dataset="general", replay_share=0.3, replay_share_end=0.1, **again)
    assert alone["eval_general_held_perplexity"] > 2*alone["eval_general_held_perplexity_before"]
    assert mixed["eval_general_held_perplexity"] < 0.5*alone["eval_general_held_perplexity"]
    assert mixed["eval_medical_held_perplexity"] < 0.2*mixed["eval_medical_held_perplexity_before"]
    assert 0.9*alone["steps"]/0.8 < mixed["steps"] <= alone["steps"]/0.8        # the medical text has all its passes


def test_packed_or_not_and_in_micro_batches(tmp_path):
    "The same documents in an optimiser step give the same loss."
    one = dict(dataset="mm_pt", max_samples=24, max_steps=1, cutoff_len=2048)
    def first(name, **flags):
        pretrain(tmp_path/name, **one, **flags)
        return next(h["loss"] for h in read_log(tmp_path/name/"history.jsonl") if "loss" in h)
    whole = first("rows", packing=False, per_device_train_batch_size=24)
    assert first("micro", packing=False, per_device_train_batch_size=6, gradient_accumulation_steps=4) == pytest.approx(
        whole, abs=1e-4)
    assert first("packs", packing=True, per_device_train_batch_size=24) == pytest.approx(whole, abs=1e-4)


def test_every_document_ends_and_none_sees_another():
    with quiet(): data = prepare_data(parse(FLAGS | dict(dataset="mm_pt", max_samples=20, cutoff_len=2048)))
    eos = data.renderer.tokenizer.eos_token_id
    rows = [data.train[i] for i in range(len(data.train))]
    assert all(row["input_ids"][-1] == eos and row["labels"][-1] == eos for row in rows) and len(rows) == 20
