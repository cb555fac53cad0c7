"""The trainer against a plain loop, on real rows; the three entry points; a command of LLaMA-Factory (2023)."""
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import losses, run

from medllm.core import UserError
from medllm.data.batches import GroupedBatches
from medllm.models.loading import load_model
from medllm.train.arguments import parse
from medllm.train.inputs import prepare_data
from medllm.train.loop import run as run_flags
from medllm.train.loop import train


@pytest.fixture
def real(shared): return str(shared("data/chatdoctor/chatdoctor5k.json"))


def plain_loop(data, steps, batch, learning_rate):
    "Losses of a loop that anybody would write: full logits, an attention mask, PyTorch's loss and optimiser."
    model = load_model("tiny").train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    batches, out = list(GroupedBatches(data.train.lengths, batch, seed=42)), []
    for rows in batches[:steps]:
        width = int(data.train.lengths[rows].max())
        ids, labels, mask = (
            np.zeros((batch, width), np.int64), np.full((batch, width), -100), np.zeros((batch, width), np.int64))
        for i, row in enumerate(rows):
            n = data.train.lengths[row]
            ids[i, :n], labels[i, :n], mask[i, :n] = data.train[row]["input_ids"], data.train[row]["labels"], 1
        logits = model(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits
        loss = F.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]), torch.tensor(labels)[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        out.append(loss.item())
    return out


def test_twenty_steps_equal_a_plain_loop(real, tmp_path):
    args = parse(dict(
        dataset=real, max_samples=512, finetuning_type="full", learning_rate=1e-4, lr_scheduler_type="constant",
        max_steps=20, logging_steps=1, per_device_train_batch_size=4, cutoff_len=256, output_dir=str(tmp_path),
        save_strategy="no", disable_tqdm=True))
    data = prepare_data(args)
    train(args, data)
    ours = [loss for _, loss in sorted(losses(tmp_path).items())]
    plain = plain_loop(data, 20, 4, 1e-4)
    assert len(ours) == 20 and ours[0] - ours[-1] > 0.1
    assert max(abs(a - b) for a, b in zip(ours, plain)) < 1e-5, [a - b for a, b in zip(ours, plain)]


@pytest.mark.slow
def test_real_rows_train(real, tmp_path):
    "512 rows of real questions, one epoch, through the run notebook; none of their text gets into the record."
    done = run(
        "medllm", "run", "sft", "-p", "dataset", real, "-p", "max_samples", 512, "-p", "max_steps", 30,
        "-p", "output_dir", tmp_path/"r")
    assert done.returncode == 0, done.stderr
    state = json.loads((tmp_path/"r/run.json").read_text())
    assert state["status"] == "completed" and state["metrics"]["rows"][0]["read"] == 512
    assert state["metrics"]["loss_last"] < state["metrics"]["loss_first"]
    record = (
        (tmp_path/"r/record.ipynb").read_text() + (tmp_path/"r/run.json").read_text() + done.stdout + done.stderr)
    rows = json.loads(open(real, encoding="utf-8").read())[:512]
    shown = [
        r for r in random.Random(0).sample(rows, 100)
        if len(r["input"]) > 30 and r["input"][:30] in record or r["output"][:30] in record]
    assert not shown, f"{len(shown)} of 100 rows stand in the record"


FLAGS = dict(
    model_name_or_path="tiny", dataset="mm", max_samples=64, finetuning_type="lora", lora_rank=4,
    learning_rate="1e-3", max_steps=6, logging_steps=1, template="llama2", cutoff_len=256, val_size=8,
    per_device_train_batch_size=4, lr_scheduler_type="linear", warmup_steps=0.0, seed=7, save_steps=100)


def test_three_entry_points_one_curve(tmp_path):
    "Command line, YAML file and notebook parameters give the same losses."
    words = [w for k, v in FLAGS.items() for w in (f"--{k}", str(v))]
    done = run("python", "-m", "medllm.train", *words, "--output_dir", tmp_path/"flags")
    assert done.returncode == 0, done.stderr
    (tmp_path/"sft.yaml").write_text("".join(f"{k}: {v}\n" for k, v in FLAGS.items() if k != "learning_rate"))
    done = run("medllm", "train", tmp_path/"sft.yaml", "lr=1e-3", f"output_dir={tmp_path/'yaml'}")
    assert done.returncode == 0, done.stderr
    done = run(
        "medllm", "run", "sft", "-f", tmp_path/"sft.yaml", "-p", "learning_rate", "1e-3",
        "-p", "output_dir", tmp_path/"notebook")
    assert done.returncode == 0, done.stderr
    curves = [losses(tmp_path/entry) for entry in ("flags", "yaml", "notebook")]
    assert curves[0] == curves[1] == curves[2] and len(curves[0]) == 6


SEED = (
    "--stage sft --model_name_or_path ./Llama-2-7b-chat-hf --do_train --dataset mm --finetuning_type lora "
    "--quantization_bit 4 --overwrite_cache --output_dir output --per_device_train_batch_size 8 "
    "--gradient_accumulation_steps 4 --lr_scheduler_type cosine --logging_steps 10 --save_steps 1000 "
    "--learning_rate 5e-5 --num_train_epochs 2.0 --plot_loss --fp16 --template llama2 "
    "--lora_target q_proj,v_proj").split()


def test_a_command_of_llamafactory_2023(tmp_path):
    "Flag by flag, on the tiny model in 4 bit; done again it replaces nothing."
    assert run("medllm", "tiny", "./Llama-2-7b-chat-hf", cwd=tmp_path).returncode == 0
    done = run("accelerate", "launch", "-m", "medllm.train", *SEED, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "training in float32" in done.stderr
    assert {"adapter_model.safetensors", "adapter_config.json", "loss.png", "metrics.json"} <= {
        f.name for f in (tmp_path/"output").iterdir()}
    assert list(losses(tmp_path/"output")) == [1, 10, 18]
    again = run("python", "-m", "medllm.train", *SEED, cwd=tmp_path)
    assert again.returncode != 0 and "already holds a model" in again.stderr


@pytest.mark.slow
def test_the_same_in_two_processes(tmp_path):
    "The same rows a step: the same curve."
    assert run("medllm", "tiny", "./Llama-2-7b-chat-hf", cwd=tmp_path).returncode == 0
    assert run("python", "-m", "medllm.train", *SEED, cwd=tmp_path).returncode == 0
    one = losses(tmp_path/"output")
    half = [w if w != "4" or SEED[i - 1] != "--gradient_accumulation_steps" else "2" for i, w in enumerate(SEED)]
    half[half.index("output")] = "two"
    done = run("accelerate", "launch", "--num_processes", 2, "-m", "medllm.train", *half, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "starting the 2 that were asked for" in done.stderr
    two = losses(tmp_path/"two")
    assert one.keys() == two.keys() and max(abs(one[s] - two[s]) for s in one) < 1e-3
    rows = [json.loads((tmp_path/d/"metrics.json").read_text())["trained_tokens"] for d in ("output", "two")]
    assert rows[0] == rows[1]              # together the two processes trained every token once


def test_a_model_is_not_replaced_from_python_either(tmp_path):
    "`train` refuses what the command refuses: a folder that holds a model, and a checkpoint of elsewhere gone on with there."
    given = FLAGS | dict(max_samples=24, max_steps=1, val_size=0, save_steps=1, disable_tqdm=True)
    def whole(name, **more):
        args = parse(given | dict(output_dir=str(tmp_path/name)) | more)
        return train(args, prepare_data(args))
    whole("a")
    whole("b")
    held = {f.name: f.read_bytes() for f in (tmp_path/"b").iterdir() if f.is_file() and f.name != ".lock"}
    with pytest.raises(UserError, match="already holds a model"): whole("b")
    there = dict(resume_from_checkpoint=str(tmp_path/"a/checkpoint-1"))
    with pytest.raises(UserError, match="already holds a model"): whole("b", **there)
    with pytest.raises(UserError, match="already holds a model"): run_flags(given | dict(output_dir=str(tmp_path/"b")) | there)
    assert held == {f.name: f.read_bytes() for f in (tmp_path/"b").iterdir() if f.is_file() and f.name != ".lock"}
    assert whole("c", **there)["steps"] == whole("b", overwrite_output_dir=True)["steps"] == 1
