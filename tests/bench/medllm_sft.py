"""Supervised fine-tuning with medllm's command: `medllm_sft.py TASK.json`, by medllm's Python."""
import json
import resource
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def command(task):
    """`python -m medllm.train` with LLaMA-Factory's words."""
    settings = {
        "stage": "sft", "model_name_or_path": task["model"],
        "dataset": str(Path(task["data_dir"]) / "rows.json"), "max_samples": task["rows"],
        "template": {"llama2": "llama2", "smol": "auto"}[task["chat"]],
        "finetuning_type": "lora", "dtype": task["dtype"],
        "lora_target": ",".join(task["targets"]), "lora_rank": task["rank"],
        "lora_alpha": task["alpha"], "cutoff_len": task["cutoff"],
        "per_device_train_batch_size": task["batch"],
        "gradient_accumulation_steps": task["accumulation"],
        "num_train_epochs": task["epochs"], "learning_rate": task["learning_rate"],
        "lr_scheduler_type": "constant", "output_dir": task["output"], "report_to": "none"}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [sys.executable, "-m", "medllm.train", "--do_train", "--overwrite_output_dir", *words]


def installed(name):
    """The version of a package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main():
    """Train once, read the metrics that medllm wrote, report."""
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    started = time.perf_counter()
    done = subprocess.run(command(task), cwd=REPOSITORY, stdout=sys.stderr)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"medllm.train ended with status {done.returncode}")
    metrics = json.loads((Path(task["output"]) / "metrics.json").read_text(encoding="utf-8"))
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    names = ("medllm", "torch", "transformers")
    print(json.dumps({
        "rows": metrics["train_rows"], "steps": metrics["steps"],
        "trained_tokens": metrics["trained_tokens"],
        "padded_tokens": metrics.get("padded_tokens"),
        "train_seconds": metrics["train_runtime"],
        "prepare_seconds": seconds - metrics["train_runtime"],
        "peak_rss_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "train_loss": metrics.get("train_loss"),
        "versions": {name: installed(name) for name in names}}), flush=True)


if __name__ == "__main__":
    main()
