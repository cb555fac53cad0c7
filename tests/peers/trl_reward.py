"""TRL's RewardTrainer on given pairs: loss, scores and gradient of one batch, and the losses of a few steps.

Arrays in: folder (of a scorer and its tokenizer), chosen and rejected (N, T) with -1 behind the end, margin (N,),
centre, steps. Arrays out: loss, scores (2N,), gradient of all weights by name, losses (steps,)."""
import sys

import numpy as np
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

given = dict(np.load(sys.argv[1]))
folder, steps, centre = str(given["folder"]), int(given["steps"]), float(given["centre"])
cut = lambda rows: [[int(i) for i in row if i >= 0] for row in rows]
pairs = [{"chosen_ids": c, "rejected_ids": r, "margin": float(m)}
    for c, r, m in zip(cut(given["chosen"]), cut(given["rejected"]), given["margin"])]
if not given["margin"].any():
    for pair in pairs: del pair["margin"]

model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
args = RewardConfig(
    output_dir="out", use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no",
    per_device_train_batch_size=len(pairs), max_steps=steps, logging_steps=1, disable_tqdm=True, learning_rate=1e-3,
    lr_scheduler_type="constant", weight_decay=0.0, max_length=None, center_rewards_coefficient=centre or None, seed=0)
trainer = RewardTrainer(
    model=model, args=args, train_dataset=Dataset.from_list(pairs), processing_class=AutoTokenizer.from_pretrained(folder))

batch = trainer.data_collator(pairs)
model.train()
loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
loss.backward()
gradients = {f"gradient.{name}": p.grad.numpy().copy() for name, p in model.named_parameters()}
model.zero_grad()
scores = outputs.logits[:, 0].detach().numpy()
losses = []
if steps:
    trainer.train()
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
np.savez(sys.argv[2], loss=loss.item(), scores=scores, losses=losses, **gradients)
