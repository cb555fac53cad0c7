"""Losses and gradients of TRL's preference trainers on given batches: `python trl_preference.py in.npz out.npz`.

In: `policy` and `reference` (folders of models), `cases` (JSON), answers as rows of ids that end at the first -1:
`prompts`, `chosen`, `rejected`; for KTO `answers`, `mismatched` and `liked` over the same prompts. A case is a name and
what is set on the trainer: {"trainer": "dpo"|"orpo"|"cpo"|"kto", attribute: value, …}; `"rows": [i, …]` takes some rows only.
Out: `<name>/loss`, `<name>/grad` (of the weights named in `weights`, end to end), and for KTO `<name>/kl`.
"""
import json
import sys
import tempfile

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

given = np.load(sys.argv[1], allow_pickle=False)
ids = lambda name: [row[:(row == -1).argmax() if (row == -1).any() else len(row)].tolist() for row in given[name]]
policy, reference = (
    AutoModelForCausalLM.from_pretrained(str(given[name]), dtype=torch.float32) for name in ("policy", "reference"))
flags = dict(output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to="none", max_length=None,
    gradient_checkpointing=False, remove_unused_columns=False, per_device_train_batch_size=2)
common = dict(model=policy, ref_model=reference, processing_class=AutoTokenizer.from_pretrained(str(given["policy"])))


def own_rows(kind):
    "The trainer, given rows that are tokenised already."
    return type(kind.__name__, (kind,), {"_prepare_dataset": lambda self, dataset, *more: dataset})


def padded(rows, value):
    width = max(map(len, rows))
    return torch.tensor([row + [value]*(width - len(row)) for row in rows])


def preference(case):
    "DPO's trainer, as it is constructed."
    rows = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r}
        for p, c, r in zip(*map(ids, ("prompts", "chosen", "rejected")))]
    trainer = own_rows(DPOTrainer)(args=DPOConfig(**flags), train_dataset=Dataset.from_list(rows), **common)
    return trainer, rows, lambda some: trainer.compute_loss(policy, trainer.data_collator(some))


def unpaired(case):
    "KTO's trainer, as it is constructed."
    rows = [{"prompt_ids": p, "completion_ids": a, "KL_completion_ids": m, "label": bool(liked)}
        for p, a, m, liked in zip(*map(ids, ("prompts", "answers", "mismatched")), given["liked"])]
    config = KTOConfig(**flags, train_sampling_strategy="sequential")
    trainer = own_rows(KTOTrainer)(args=config, train_dataset=Dataset.from_list(rows), **common)
    return trainer, rows, lambda some: trainer.compute_loss(policy, trainer.data_collator(some))


def reference_free(case):
    "The trainers of ORPO and of CPO (SimPO among its losses) tokenise for themselves: their own step on a batch made here."
    trainer = object.__new__({"orpo": ORPOTrainer, "cpo": CPOTrainer}[case["trainer"]])
    trainer.accelerator, trainer.is_encoder_decoder, trainer.aux_loss_enabled = Accelerator(cpu=True), False, False
    trainer.padding_value = trainer.pad_token_id = 0
    trainer.alpha, trainer.cpo_alpha, trainer.label_smoothing = 0.0, 0.0, 0.0
    rows = [{"prompt": p, "chosen": p + c, "rejected": p + r} for p, c, r in zip(*map(ids, ("prompts", "chosen", "rejected")))]

    def loss(some):
        batch = {}
        for side in ("chosen", "rejected"):
            batch[f"{side}_input_ids"] = padded([row[side] for row in some], 0)
            batch[f"{side}_attention_mask"] = padded([[1]*len(row[side]) for row in some], 0)
            batch[f"{side}_labels"] = padded([[-100]*len(row["prompt"]) + row[side][len(row["prompt"]):] for row in some], -100)
        return trainer.get_batch_loss_metrics(policy, batch)[0]
    return trainer, rows, loss


build = {"dpo": preference, "kto": unpaired, "orpo": reference_free, "cpo": reference_free}
weights = [name for name in str(given["weights"]).split(",")]
trainers, out = {}, {}
for case in json.loads(str(given["cases"])):
    kind = case["trainer"]
    if kind not in trainers: trainers[kind] = build[kind](case)
    trainer, rows, loss_of = trainers[kind]
    for attribute, value in case.items():
        if attribute not in ("name", "trainer", "rows"): setattr(trainer, attribute, value)
    policy.zero_grad()
    policy.train()
    loss = loss_of([rows[i] for i in case.get("rows", range(len(rows)))])
    loss.backward()
    by_name = dict(policy.named_parameters())
    out[f"{case['name']}/loss"] = loss.detach().numpy()
    out[f"{case['name']}/grad"] = torch.cat([by_name[name].grad.flatten() for name in weights]).numpy()
    if kind == "kto": out[f"{case['name']}/kl"] = np.array(trainer._metrics["train"]["kl"][-1])
np.savez(sys.argv[2], **out)
