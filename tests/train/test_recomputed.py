"""Gradient checkpointing in every stage: the gradients are those without, and it is chosen where memory is short."""
import contextlib
import io
import json

import pytest
import torch
from transformers import LlamaForCausalLM, TrainerCallback

from medllm.models.loading import load_model
from medllm.models.tiny import write_tiny
from medllm.train.arguments import parse
from medllm.train.inputs import prepare_data
from medllm.train.loop import stage_module
from medllm.train import reward, start

QUESTIONS = ("Gout?", "Scurvy and what it is?", "Fever?", "Cough?")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A model of two narrow layers, rows for each stage, and a reward model that was trained a little."
    folder = tmp_path_factory.mktemp("recomputed")
    write_tiny(folder/"model")
    config = load_model("tiny").config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 32, 64, 2
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder/"model")
    rows = {
        "talk": [{"instruction": q, "output": f"Rest {'very '*n}much."} for n, q in enumerate(QUESTIONS)],
        "pairs": [{"instruction": q, "output": ["Rest well.", f"Go {'very '*n}far."]} for n, q in enumerate(QUESTIONS)]}
    for name, own in rows.items(): (folder/f"{name}.json").write_text(json.dumps(own))
    (folder/"text.txt").write_text("\n".join(f"{q} Rest and drink." for q in QUESTIONS))
    (folder/"dataset_info.json").write_text(json.dumps({"talk": {"file_name": "talk.json"},
        "text": {"file_name": "text.txt"}, "pairs": {"file_name": "pairs.json", "ranking": True}}))
    return folder


class Gradients(TrainerCallback):
    "What the first optimiser step would use, and how often layers were computed; the run ends there."
    def __init__(self, model):
        self.found, self.forwards = {}, 0
        layer = next(m for name, m in model.named_modules() if name.endswith("layers.1.self_attn"))
        layer.register_forward_pre_hook(self.count)
    def count(self, *_): self.forwards += torch.is_grad_enabled()
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = self.found or {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    def on_step_end(self, args, state, control, **kwargs): control.should_training_stop = True


def first_step(place, folder, stage, **more):
    "Gradients of a run's first optimiser step by name, and how often its second layer was computed for them."
    dataset = {"pt": "text", "sft": "talk", "ppo": "talk", "grpo": "talk"}.get(stage, "pairs")
    flags = dict(model_name_or_path=str(place/"model"), stage=stage, dataset=dataset, dataset_dir=str(place), cutoff_len=64,
        template="chatml", output_dir=str(folder), max_steps=2, per_device_train_batch_size=4, save_strategy="no",
        use_cpu=True, disable_tqdm=True, learning_rate=1e-3, finetuning_type="lora")
    with contextlib.redirect_stderr(io.StringIO()):
        args = parse(flags | more)
        data = prepare_data(args)
        torch.manual_seed(1)
        trainer = stage_module(stage).make_trainer(args, data)
        for name, p in trainer.model.named_parameters():        # adapters and heads begin at 0, where many gradients are 0
            at_zero = any(part in name for part in ("lora_B", "score", "critic.head"))
            if p.requires_grad and at_zero: torch.nn.init.normal_(p, std=.1)
        gradients = Gradients(trainer.model)
        trainer.add_callback(gradients)
        trainer.train()
    return gradients.found, gradients.forwards


DRAWN = dict(reward_funcs="citation:number", max_new_tokens=6)
WAYS = {
    "pt": dict(), "sft": dict(), "sft, full": dict(finetuning_type="full"), "sft, 4 bit": dict(quantization_bit=4),
    "rm": dict(), "dpo": dict(precompute_ref_log_probs=False),
    "dpo, ipo on packs": dict(pref_loss="ipo", packing=True, precompute_ref_log_probs=False),
    "dpo, full": dict(finetuning_type="full", precompute_ref_log_probs=False), "kto": dict(precompute_ref_log_probs=False),
    "grpo": DRAWN | dict(num_generations=2), "ppo": DRAWN | dict(ppo_epochs=1),
    "ppo, full": DRAWN | dict(ppo_epochs=1, finetuning_type="full")}


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_without(place, tmp_path, way):
    stage, more = way.split(",")[0], WAYS[way]
    plain, once = first_step(place, tmp_path/"plain", stage, **more)
    again, twice = first_step(place, tmp_path/"again", stage, gradient_checkpointing=True, **more)
    assert plain.keys() == again.keys() and plain and once < twice <= 2*once, (once, twice)
    moved = [name for name in plain if plain[name].abs().max() > 1e-6]
    assert moved and (stage != "ppo" or any("critic" in name and "head" not in name for name in moved))
    far = {name: (again[name] - plain[name]).abs().max().item() for name in plain}
    assert max(far.values()) <= 1e-5, max(far.items(), key=lambda f: f[1])


@pytest.mark.parametrize("stage, more", [("sft", {}), ("rm", {}), ("ppo", DRAWN | dict(ppo_epochs=1))], ids=["sft", "rm", "ppo"])
def test_it_is_chosen_where_memory_is_short(place, tmp_path, monkeypatch, stage, more):
    "A GPU with a thousand bytes left, as far as the question goes; who says no is heard."
    asked = start.check_memory
    def short(*args):
        with monkeypatch.context() as m:
            m.setattr(torch.cuda, "is_available", lambda: True)
            m.setattr(torch.cuda, "mem_get_info", lambda: (1000, 1000))
            asked(*args)
    for module in (start, reward): monkeypatch.setattr(module, "check_memory", short)
    no, once = first_step(place, tmp_path/"no", stage, use_cpu=False, gradient_checkpointing=False, **more)
    chosen, twice = first_step(place, tmp_path/"chosen", stage, use_cpu=False, **more)
    assert once < twice and all((chosen[name] - no[name]).abs().max() <= 1e-5 for name in no)
