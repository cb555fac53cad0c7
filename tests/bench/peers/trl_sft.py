"""Supervised fine-tuning with TRL's SFTTrainer: `trl_sft.py TASK.json` in TRL's environment."""
import time

STARTED = time.perf_counter()

import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from work_counter import WorkCounter  # noqa: E402


def chat_rows(path):
    """The rows as prompt and completion messages, so that only the answer is trained."""
    def chat(row):
        question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
        return {"prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": row["output"]}]}
    return Dataset.from_list([chat(row) for row in json.loads(path.read_text(encoding="utf-8"))])


def arguments(task):
    """TRL's settings: no checkpointing, packing, logging, evaluation or saving on the way."""
    return trl.SFTConfig(
        output_dir=task["output"], use_cpu=True, bf16=False, fp16=False,
        per_device_train_batch_size=task["batch"],
        gradient_accumulation_steps=task["accumulation"], num_train_epochs=task["epochs"],
        learning_rate=task["learning_rate"], lr_scheduler_type="constant",
        max_length=task["cutoff"], packing=False, completion_only_loss=True,
        gradient_checkpointing=False, eval_strategy="no", save_strategy="no",
        logging_strategy="no", report_to="none", disable_tqdm=True,
        train_sampling_strategy="group_by_length" if task["group_by_length"] else "random",
        model_init_kwargs={"dtype": torch.float32, "attn_implementation": "sdpa"})


class PlainLossTrainer(trl.SFTTrainer):
    """TRL's trainer with transformers' loss, TRL's own being written for a GPU's Triton kernels.

    No setting of TRL turns its fused head off; overriding `compute_loss` is what it documents.
    """

    def compute_loss(self, *args, **kwargs):
        """The loss that the model itself gives."""
        return transformers.Trainer.compute_loss(self, *args, **kwargs)


def main():
    """Train once, save the adapter, report."""
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    counter = WorkCounter()
    adapter = LoraConfig(r=task["rank"], lora_alpha=task["alpha"], lora_dropout=0.0, bias="none",
                         target_modules=task["targets"], task_type="CAUSAL_LM")
    trainer = (PlainLossTrainer if task.get("plain_loss") else trl.SFTTrainer)(
        model=task["model"], args=arguments(task), peft_config=adapter, callbacks=[counter],
        train_dataset=chat_rows(Path(task["data_dir"]) / "rows.json"),
        processing_class=transformers.AutoTokenizer.from_pretrained(task["model"]))
    trainer.train()
    trainer.save_model()
    counter.report(STARTED, versions={"trl": trl.__version__, "torch": torch.__version__,
                                      "transformers": transformers.__version__})


if __name__ == "__main__":
    main()
