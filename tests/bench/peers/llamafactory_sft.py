"""Supervised fine-tuning with LLaMA-Factory: `llamafactory_sft.py TASK.json` in its environment."""
import time

STARTED = time.perf_counter()

import importlib.machinery  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
import types  # noqa: E402
from pathlib import Path  # noqa: E402


def allow_missing_torchaudio():
    """LLaMA-Factory imports torchaudio always, though text needs none of it: allow its absence.

    The newest torchaudio wheel may not load with the torch that is used here.
    """
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        stub = types.ModuleType("torchaudio")
        stub.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
        sys.modules["torchaudio"] = stub


allow_missing_torchaudio()

import torch  # noqa: E402
import transformers  # noqa: E402
from llamafactory.extras.env import VERSION  # noqa: E402
from llamafactory.train.tuner import run_exp  # noqa: E402
from work_counter import WorkCounter  # noqa: E402


def arguments(task):
    """LLaMA-Factory's settings, as its YAML would hold them."""
    return {
        "stage": "sft", "do_train": True, "model_name_or_path": task["model"],
        "dataset": "bench", "dataset_dir": task["data_dir"],
        "template": {"llama2": "llama2", "smol": "smollm2"}[task["chat"]],
        "cutoff_len": task["cutoff"], "max_samples": task["rows"],
        "preprocessing_num_workers": 1, "overwrite_cache": True,
        "finetuning_type": "lora", "lora_rank": task["rank"], "lora_alpha": task["alpha"],
        "lora_dropout": 0.0, "lora_target": ",".join(task["targets"]),
        "per_device_train_batch_size": task["batch"],
        "gradient_accumulation_steps": task["accumulation"],
        "num_train_epochs": task["epochs"], "learning_rate": task["learning_rate"],
        "lr_scheduler_type": "constant", "use_cpu": True, "bf16": False, "fp16": False,
        "flash_attn": "sdpa", "disable_gradient_checkpointing": True,
        "output_dir": task["output"], "overwrite_output_dir": True, "save_strategy": "no",
        "eval_strategy": "no", "logging_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "plot_loss": False,
        "train_sampling_strategy": "group_by_length" if task["group_by_length"] else "random"}


def main():
    """Train once (LLaMA-Factory saves the adapter itself), report."""
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    counter = WorkCounter()
    run_exp(arguments(task), callbacks=[counter])
    counter.report(STARTED, versions={"llamafactory": VERSION, "torch": torch.__version__,
                                      "transformers": transformers.__version__})


if __name__ == "__main__":
    main()
