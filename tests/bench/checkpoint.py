"""What a commit costs beside the save that it completes.

    python tests/bench/checkpoint.py [hidden size] [layers] [folder]

A LoRA save (adapter, optimiser, schedule, random numbers, tokenizer) of a random Llama; the least of seven, since other
work on the machine only adds. `written` is the save without anything forced to the disk, `on the disk` with an fsync of
each file, which is what a save must cost if it is to survive a power cut; the commit adds hashes and COMMIT.json to that.
"""
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from medllm.core import sync_folder
from medllm.models.adapters import AdaptPlan, adapt
from medllm.models.loading import load_tokenizer
from medllm.train.checkpoints import check, commit
from medllm.train.trainer import StageTrainer, TokenLoss


def make(hidden, layers, folder):
    "A trainer that has taken a step."
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=3*hidden, num_hidden_layers=layers,
        num_attention_heads=hidden//64, num_key_value_heads=hidden//64))
    args = TrainingArguments(output_dir=str(folder), report_to="none", disable_tqdm=True, use_cpu=True)
    trainer = StageTrainer(adapt(model, AdaptPlan("lora", rank=16)), args, TokenLoss(), None, None, load_tokenizer("tiny"))
    trainer.create_optimizer_and_scheduler(10)
    for p in trainer.model.parameters():
        if p.requires_grad: p.grad = torch.randn_like(p)
    trainer.optimizer.step()
    return trainer


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def forced(folder):
    for file in folder.rglob("*"):
        if not file.is_file(): continue
        with open(file, "rb") as f: os.fsync(f.fileno())
    sync_folder(folder)


def main():
    hidden, layers = (int(w) for w in (sys.argv[1:3] or (1024, 12)))
    with tempfile.TemporaryDirectory(dir=sys.argv[3] if len(sys.argv) > 3 else None) as d:
        trainer = make(hidden, layers, d)
        times = {"written": [], "on the disk": [], "committed": [], "checked": []}
        for n in range(8):
            folder = Path(d)/f"checkpoint-{n}"
            def save():
                folder.mkdir()
                trainer._fill(folder, trainer._notes())
            plain = timed(save)
            disk = plain + timed(lambda: forced(folder))
            shutil.rmtree(folder)
            whole = timed(save) + timed(lambda: commit(folder, n, {}))
            verified = timed(lambda: check(folder))
            size = sum(f.stat().st_size for f in folder.rglob("*"))
            shutil.rmtree(folder)
            if n:
                for name, value in zip(times, (plain, disk, whole, verified)): times[name].append(value)
        seconds = {name: min(values) for name, values in times.items()}
        print(f"checkpoint of {size/2**20:.0f} MiB, least of {len(times['written'])}")
        for name, value in seconds.items(): print(f"  {name:12} {value*1000:7.0f} ms")
        print(f"  the commit adds {seconds['committed']/seconds['on the disk'] - 1:.1%} to a save that is on the disk, "
            f"{seconds['committed']/seconds['written'] - 1:.1%} to one that is not")


if __name__ == "__main__": main()
