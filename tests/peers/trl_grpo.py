"""TRL's GRPOTrainer or RLOOTrainer on given batches: advantages, log-probabilities, loss, gradients (`make trl`)."""
import json
import os
import sys
import tempfile

os.environ.update(CUDA_VISIBLE_DEVICES="", TQDM_DISABLE="1", HF_HUB_OFFLINE="1")
import numpy as np
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from medllm.models.loading import load_model, load_tokenizer
from medllm.models.tiny import tiny_folder


def trainer_of(given, case, folder):
    "Their trainer, its model moved away from the reference by the given steps."
    case, rows = dict(case), len(given["rewards"])
    kind, beta, unbiased = case.pop("kind"), case.pop("kl_coef"), case.pop("unbiased", True)
    settings = case | dict(
        output_dir=folder, beta=beta, num_generations=int(given["each"]), per_device_train_batch_size=rows,
        gradient_accumulation_steps=1, max_completion_length=int(given["longest"]), report_to="none", use_cpu=True,
        bf16=False, gradient_checkpointing=False)
    if kind != "rloo": settings |= dict(
        loss_type=kind, scale_rewards="group" if kind == "grpo" else "none", use_bias_correction_kl=unbiased)
    config, trainer = (RLOOConfig, RLOOTrainer) if kind == "rloo" else (GRPOConfig, GRPOTrainer)
    trainer = trainer(
        model=load_model(str(tiny_folder())).float(), args=config(**settings), processing_class=load_tokenizer("tiny"),
        reward_funcs=lambda completions, **_: given["rewards"].tolist(),
        train_dataset=Dataset.from_list([{"prompt": "?"}]*rows))
    with torch.no_grad():
        for name, p in trainer.model.named_parameters(): p.add_(torch.from_numpy(given["step/" + name]))
    trainer.model.requires_grad_(True)
    trainer.model.train()
    return trainer


def outcome(trainer, given, whole):
    "What they make of the batch."
    cut = lambda ids, lengths: [row[:n].tolist() for row, n in zip(given[ids], given[lengths])]
    prompts, answers = cut("prompts", "prompt_lengths"), cut("answers", "lengths")
    trainer._tokenize_prompts = lambda _: (prompts, None, {})
    trainer._generate_single_turn = lambda *_, **__: answers if whole else (answers, None)
    batch = trainer._generate_and_score_completions([{"prompt": "?"} for _ in prompts])
    width, mask = batch["completion_ids"].shape[1], batch["completion_mask"]
    with torch.no_grad():
        logps, entropy, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model, torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            torch.cat([batch["prompt_mask"], mask], 1), width, compute_entropy=True)
    old = logps + torch.from_numpy(given["old_shift"])[:, :width]
    batch |= {"old_logps": (old*mask).sum(1)} if whole else {"old_per_token_logps": old}
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    out = {"advantages": batch["advantages"], "logps": logps*mask, "entropy": entropy*mask, "loss": loss.detach()}
    if batch.get("ref_per_token_logps") is not None: out["reference"] = batch["ref_per_token_logps"]*mask
    return out | {f"grad/{name}": p.grad for name, p in trainer.model.named_parameters()}


def main(source, target):
    given, out = dict(np.load(source)), {}
    for number, case in enumerate(json.loads(str(given["cases"]))):
        with tempfile.TemporaryDirectory() as folder:
            found = outcome(trainer_of(given, case, folder), given, case["kind"] == "rloo")
        out |= {f"{number}/{name}": np.asarray(value) for name, value in found.items()}
    np.savez(target, **out)


main(*sys.argv[1:])
