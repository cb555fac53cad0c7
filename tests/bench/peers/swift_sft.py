"""Supervised fine-tuning with ms-swift: `swift_sft.py TASK.json` in its environment; on `smol` only."""
import time

STARTED = time.perf_counter()

import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import swift  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from swift import SftArguments, sft_main  # noqa: E402
from swift.callbacks import callbacks_map  # noqa: E402
from work_counter import WorkCounter  # noqa: E402

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def arguments(task):
    """ms-swift's settings: its ChatML with the system text that the model's own template has."""
    if task["chat"] != "smol":
        raise SystemExit("ms-swift is measured on smol: --model smol")
    return SftArguments(
        model=task["model"], model_type="llama", template="chatml", system=SYSTEM,
        dataset=[str(Path(task["data_dir"]) / "rows.json")], split_dataset_ratio=0.0,
        max_length=task["cutoff"], dataset_num_proc=1, tuner_type="lora", lora_rank=task["rank"],
        lora_alpha=task["alpha"], lora_dropout=0.0, target_modules=task["targets"],
        torch_dtype=task["dtype"], attn_impl="sdpa", use_cpu=True, bf16=False, fp16=False,
        per_device_train_batch_size=task["batch"],
        gradient_accumulation_steps=task["accumulation"], num_train_epochs=task["epochs"],
        learning_rate=task["learning_rate"], lr_scheduler_type="constant", warmup_ratio=0.0,
        gradient_checkpointing=False, eval_strategy="no", save_strategy="no",
        logging_strategy="no", report_to=["none"], disable_tqdm=True, dataloader_num_workers=0,
        output_dir=task["output"], add_version=False, callbacks=["work_counter"],
        group_by_length=task["group_by_length"])


def main():
    """Train once, report."""
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    counter = WorkCounter()
    callbacks_map["work_counter"] = lambda args, trainer: counter
    sft_main(arguments(task))
    counter.report(STARTED, versions={"ms-swift": swift.__version__, "torch": torch.__version__,
                                      "transformers": transformers.__version__})


if __name__ == "__main__":
    main()
