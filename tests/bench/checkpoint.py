"""What a commit costs a training run, beside the save that it completes.

    python tests/bench/checkpoint.py [hidden size] [layers] [folder]

A random Llama with a LoRA adapter is trained with a save at every second step, three ways in turn: `written` leaves the
files to the system's buffers, as `Trainer` does; `behind` is what a run does, forcing and hashing them behind the next step;
`at once` waits for that before it goes on. A round's time is that of its steps and saves; the median of the rounds, since other
work on the machine comes and goes. Then a save by itself: with nothing forced to the disk; with an fsync of each file, which is
what a save must cost if it is to survive a power cut; with the commit, which adds hashes and COMMIT.json to that.
"""
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from medllm.files import sync_folder
from medllm.models.adapters import AdaptPlan, adapt
from medllm.models.loading import load_tokenizer
from medllm.checkpoint import resumable
from medllm.checkpoint.commit import checkpoint_fault, commit
from medllm.train.objectives import TokenLoss
from medllm.train.trainer import StageTrainer

ROUNDS, SAVES = 7, 6


def make(hidden, layers, folder):
    "A trainer that has taken a step."
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=3*hidden, num_hidden_layers=layers,
        num_attention_heads=hidden//64, num_key_value_heads=hidden//64))
    args = TrainingArguments(output_dir=str(folder), report_to="none", disable_tqdm=True, use_cpu=True, save_total_limit=2)
    trainer = StageTrainer(adapt(model, AdaptPlan("lora", rank=16)), args, TokenLoss(), None, None, load_tokenizer("tiny"))
    trainer.create_optimizer_and_scheduler(10)
    return trainer


def step(trainer):
    "Forwards and backwards over 64 tokens, and the optimiser."
    ids = torch.randint(0, 4096, (1, 64))
    trainer.model(input_ids=ids, labels=ids).loss.backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def forced(folder):
    for file in folder.rglob("*"):
        if not file.is_file(): continue
        with open(file, "rb") as f: os.fsync(f.fileno())
    sync_folder(folder)


def steps_and_saves(trainer, at_once):
    "Some saves, two steps for each."
    for _ in range(SAVES):
        trainer.state.global_step += 2
        trainer._save_checkpoint(trainer.model, None)
        if at_once: trainer.settle()
        step(trainer)
        trainer.settle()
        step(trainer)


def main():
    hidden, layers = (int(w) for w in (sys.argv[1:3] or (1024, 12)))
    buffered = lambda folder, *rest: {"files": {"none": {"bytes": 0}}}
    kinds = {"written": (buffered, False), "behind": (commit, False), "at once": (commit, True)}
    times, alone = {name: [] for name in kinds}, {"save": [], "save, forced to the disk": [], "save and commit": [], "check": []}
    with tempfile.TemporaryDirectory(dir=sys.argv[3] if len(sys.argv) > 3 else None) as d:
        trainer = make(hidden, layers, d)
        step(trainer)
        for n in range(ROUNDS + 1):
            for name, (how, at_once) in kinds.items():
                resumable.commit = how
                took = timed(lambda: steps_and_saves(trainer, at_once))
                if n: times[name].append(took/SAVES)
                for folder in Path(d).glob("checkpoint-*"): shutil.rmtree(folder)
            folder = Path(d)/f"checkpoint-{n}"
            folder.mkdir()
            save = timed(lambda: trainer._fill(folder, trainer._notes()))
            disk = save + timed(lambda: forced(folder))
            shutil.rmtree(folder)
            folder.mkdir()
            whole = timed(lambda: (trainer._fill(folder, trainer._notes()), commit(folder, n, {})))
            verified = timed(lambda: checkpoint_fault(folder))
            size = sum(f.stat().st_size for f in folder.rglob("*"))
            shutil.rmtree(folder)
            if n:
                for name, value in zip(alone, (save, disk, whole, verified)): alone[name].append(value)
    middle = {name: statistics.median(values) for name, values in (alone | times).items()}
    print(f"checkpoint of {size/2**20:.0f} MiB; median of {ROUNDS} rounds, {SAVES} saves in each")
    for name, value in middle.items(): print(f"  {name:26} {value*1000:7.1f} ms{'  with two steps' if name in times else ''}")
    save, disk, whole, written = (middle[name] for name in ("save", "save, forced to the disk", "save and commit", "written"))
    print(f"  the commit adds {whole/disk - 1:.1%} to a save that is on the disk, {whole/save - 1:.1%} to one that is not")
    for name in ("behind", "at once"): print(
        f"  {name}, a run waits {(middle[name] - written)*1000:.1f} ms longer for it and for taking an old checkpoint away")



if __name__ == "__main__": main()
