"""Training commands in forked children: torch is imported once, and a child can be killed at any moment."""
import hashlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from medllm.rl import ppo, grpo; from medllm.train import loop, sft  # noqa: E402, F401  (what a child would import)
from medllm.train.__main__ import main  # noqa: E402

SFT = dict(
    model_name_or_path="tiny", dataset="mm", max_samples=48, cutoff_len=256, per_device_train_batch_size=4, max_steps=10,
    logging_steps=1, save_steps=3, learning_rate=1e-3, save_total_limit=3, resume_from_checkpoint="auto", disable_tqdm=True,
    finetuning_type="lora", lora_rank=4, lora_dropout=0.1, val_size=8, eval_strategy="steps", eval_steps=5)
GRPO = dict(
    model_name_or_path="tiny", stage="grpo", dataset="mm_choice", reward_funcs="letter", max_new_tokens=12, max_samples=24,
    per_device_train_batch_size=8, num_generations=2, num_iterations=2, max_steps=6, logging_steps=1, save_steps=2,
    learning_rate=1e-3, resume_from_checkpoint="auto", disable_tqdm=True, finetuning_type="full")


def words(folder, flags):
    "A command line."
    return [f"--{name}={value}" for name, value in (flags | {"output_dir": folder}).items() if value is not None]


def fork(work, log):
    "Number of a child that does some work, its output in a file, and ends with what the work returns as exit code."
    sys.stdout.flush()
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        with open(log, "ab", buffering=0) as f:
            os.dup2(f.fileno(), 1)
            os.dup2(f.fileno(), 2)
        code = work() or 0
    except SystemExit as e: code = e.code or 0
    except BaseException: traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(pid, within=None):
    "Exit code of a child, negative for a signal; None when it is still there after some seconds."
    start = time.monotonic()
    while within is None or time.monotonic() - start < within:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)


def train(folder, flags, log=None):
    "Exit code of a training command in a child."
    return ended(fork(lambda: main(words(folder, flags)), log or f"{folder}.log"))


def weights(folder):
    "A hash of the weights that a run saved."
    files = sorted(Path(folder).glob("*.safetensors"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16] if files else ""


def curve(folder):
    "What a run logged that depends on nothing but its arithmetic."
    lines = [json.loads(line) for line in (Path(folder)/"history.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "grad_norm", "learning_rate", "eval_loss", "padding_share")
    return [{k: line[k] for k in kept if k in line} for line in lines if "train_runtime" not in line]
