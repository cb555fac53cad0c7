"""Every flag of a training run, tried in this process: in force, translated, or refused.

    python tests/flags.py                    try them all and compare with flags.md
    python tests/flags.py --write            write flags.md
    python tests/flags.py --show ddp_        the flags with these letters in their name, and all that each one changes
    python tests/flags.py --show '' --stage dpo   all flags of any stage, in that stage

A flag is in force when a small run with it differs from the same run without it, in what it did, wrote or came to. What
differs is the evidence, and stands in the table: nothing here says beforehand what that should be.
"""
import argparse
import contextlib
import functools
import gc
import hashlib
import io
import json
import logging
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
TABLE = HERE/"flags.md"


# what is trained on

ASKED = ("Gout?", "What is scurvy and what is it like?", "Fever?", "Is this cough a cold?", "Burn?", "Is it the heart, doctor?")


def talk():
    "Rows of every kind: long, of two turns, with thinking, in pairs of equal beginnings."
    rows = [{"instruction": f"{q} Case {n}.", "output": f"Rest {'very '*(n % 3)}much, {n} days."} for n, q in enumerate(ASKED*2)]
    rows[1] |= {"history": [["Hello", "Good day to you."]]}
    rows[2] |= {"output": "<think>It may be measles.</think>It is measles."}
    rows[3] |= {"instruction": "Is this cough a cold? " + "It is an old cough. "*6}
    return rows


def write_rows(place):
    "Datasets for every stage, in a registry."
    held = [{"instruction": q, "output": f"Call {'many '*n}doctors."} for n, q in enumerate(ASKED[:3])]
    other = [{"instruction": f"May I eat {n} plums?", "output": "Yes."} for n in range(5)]
    three = lambda q, n: {"instruction": q, "output": [f"Rest {n} days.", f"Walk {n}.", "Go far " + "away "*n]}
    sets = {"talk": talk(), "held": held, "other": other, "again": talk()[4:8] + other[:2],
        "bad": talk()[:9] + [{"instruction": "Nothing?"}],
        "near": [r | {"instruction": f"{r['instruction']} {'Is it bad? '*6}{'Please.'*(n % 2)}"} for n, r in enumerate(talk())],
        "pairs": [three(q, n) for n, q in enumerate(ASKED)], "pairs_held": [three(q, n + 1) for n, q in enumerate(ASKED)]}
    for name, rows in sets.items(): (place/f"{name}.json").write_text(json.dumps(rows))
    (place/"text.txt").write_text("\n".join(f"{q} Rest and drink {n} cups." for n, q in enumerate(ASKED*2)))
    (place/"general.txt").write_text("\n".join(f"The town of {q} lies by the sea." for q in ASKED))
    entries = {name: {"file_name": f"{name}.json"} | ({"ranking": True} if "pairs" in name else {}) for name in sets}
    entries |= {name: {"file_name": f"{name}.txt", "columns": {"prompt": "text"}} for name in ("text", "general")}
    (place/"loader.py").write_text("")
    entries |= {"scripted": {"script_url": "loader.py"}, "hosted": {"hf_hub_url": "someone/rows"}}
    (place/"dataset_info.json").write_text(json.dumps(entries))


def write_models(place):
    "A model of two narrow layers, and others to put in its place."
    import torch
    from transformers import LlamaForCausalLM
    from medllm.models.loading import load_model
    from medllm.models.tiny import write_tiny
    config = load_model("tiny").config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 32, 64, 2
    for seed, name in enumerate(("model", "model_2")):
        write_tiny(place/name)
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(place/name)
    hub = place/"hub/models--someone--model"
    for name, folder in (("main", "model"), ("old", "model_2")):
        (hub/"refs").mkdir(parents=True, exist_ok=True)
        commit = hashlib.sha1(name.encode()).hexdigest()
        (hub/f"refs/{name}").write_text(commit)
        shutil.copytree(place/folder, hub/f"snapshots/{commit}")


BASE = dict(model_name_or_path="{place}/model", dataset="talk", dataset_dir="{place}", cutoff_len=96, template="chatml",
    max_steps=3, per_device_train_batch_size=4, logging_steps=1, save_strategy="no", learning_rate=1e-2,
    finetuning_type="full", disable_tqdm=True, output_dir="{out}/run")
STAGES = {
    "sft": {}, "pt": dict(dataset="text"), "rm": dict(dataset="pairs"), "dpo": dict(dataset="pairs"), "kto": dict(dataset="pairs"),
    "ppo": dict(dataset="other", reward_funcs="walked", max_new_tokens=6, ppo_epochs=2, max_steps=4),
    "grpo": dict(dataset="other", reward_funcs="walked", max_new_tokens=6, num_generations=2, num_iterations=2, max_steps=4)}
LOOKS = dict(eval_dataset="held", eval_strategy="steps", eval_steps=1)
SAVES = dict(save_strategy="steps", save_steps=1)
WORKERS = dict(dataloader_num_workers=2)
LORA = dict(finetuning_type="lora", lora_rank=4)


# which flags, with which values, beside which others

@dataclass
class Case:
    "A flag, a value that is not its default, and what it needs to mean something."
    flag:str
    value:object
    stage:str = "sft"
    given:dict = field(default_factory=dict)  # Other flags, in the run without it too
    around:str = ""                           # What the machine is like: a key of AROUND
    slow:bool = False


def tried(stage, around="", slow=False, beside=None, **values):
    "A case for each flag, in one stage and beside the same others; a list tries several values."
    return [Case(flag, value, stage, beside or {}, around, slow) for flag, several in values.items()
        for value in (several if isinstance(several, list) else [several])]


MODEL = [
    *tried("sft", model_name_or_path="{place}/model_2"),
    *tried("sft", beside=LORA, adapter_name_or_path="{place}/adapter", quantization_bit=[4, 8], dtype="bfloat16",
        lora_target="q_proj", lora_alpha=1, lora_dropout=.5, use_dora=True, use_rslora=True, additional_target="lm_head"),
    *tried("sft", beside=dict(finetuning_type="lora"), lora_rank=2),
    *tried("sft", beside=LORA | dict(quantization_bit=4), quantization_type="fp4", double_quantization=False),
    *tried("sft", beside=LORA | dict(quantization_bit=8), quantization_type="fp4", double_quantization=False),
    *tried("sft", beside=LORA | dict(adapter_name_or_path="{place}/adapter"), create_new_adapter=True),
    *tried("sft", "hub", dict(model_name_or_path="someone/model", cache_dir="{place}/hub"), model_revision="old"),
    *tried("sft", model_revision="old"),
    *tried("sft", "hub", dict(model_name_or_path="someone/model"), cache_dir="{place}/hub"),
    *tried("sft", flash_attn=["disabled", "fa2"], finetuning_type=["lora", "freeze"]),
    *tried("sft", beside=dict(dataset="scripted"), trust_remote_code=True),
    *tried("sft", beside=dict(finetuning_type="freeze"), freeze_trainable_layers=1, freeze_trainable_modules="self_attn",
        freeze_extra_modules="lm_head"),
    *tried("sft", beside=LORA, pure_bf16=True)]

ROWS = [
    *tried("sft", dataset="other", dataset_dir="{place}/elsewhere", template="alpaca", default_system="Be brief.", cutoff_len=40,
        max_samples=5, val_size=3, thinking="drop", mask_history=True, train_on_prompt=True, group_by_length=False,
        packing=True, tokenized_path="{out}/kept", overwrite_cache=True, canaries=1, eval_dataset="held"),
    *tried("sft", beside=dict(cutoff_len=40), overlong="reject"),
    *tried("sft", beside=dict(dataset="bad"), on_bad="skip"),
    *tried("sft", beside=dict(dataset="bad", on_bad="skip", max_bad=1), max_bad=.05),
    *tried("sft", beside=dict(dataset="talk,other"), mix_strategy="interleave_under"),
    *tried("sft", beside=dict(dataset="talk,other", mix_strategy="interleave_under"), interleave_probs="0.9,0.1"),
    *tried("sft", beside=dict(dataset="near", val_size=3), val_near=True),
    *tried("sft", beside=dict(template="qwen3"), enable_thinking=False),
    *tried("sft", "hosted", beside=dict(dataset="hosted"), streaming=True),
    *tried("rm", ranked_pairs="first"),
    *tried("pt", replay_dataset="general", packing=False),
    *tried("pt", beside=dict(replay_dataset="general", max_steps=-1, num_train_epochs=2, cutoff_len=16), replay_share=.5,
        replay_share_end=0.0)]

HOW = [
    *[Case("stage", stage, given=dict(dataset="pairs")) for stage in ("rm", "dpo", "kto")],
    Case("stage", "pt", given=dict(dataset="text")), Case("stage", "rw", given=dict(dataset="pairs")),
    *[Case("stage", stage, given=dict(dataset="other")) for stage in ("ppo", "grpo")],
    *tried("sft", plot_loss=True, profile="exact"), *tried("sft", "held", overwrite_output_dir=True),
    *tried("sft", "stopped", dict(resume_from_checkpoint="true", learning_rate=2e-2), allow="lr"),
    *tried("dpo", pref_beta=.5, pref_loss=["hinge", "ipo", "orpo", "simpo"], pref_ftx=1.0, dpo_label_smoothing=.2, ld_alpha=.1,
        ref_model="{place}/model_2", ref_policy=["start", "model"], precompute_ref_log_probs=True),
    *tried("dpo", beside=LORA, ref_policy="base", ref_model_adapters="{place}/adapter"),
    *tried("dpo", beside=dict(ref_model="{place}/model_2"), ref_model_quantization_bit=4),
    *tried("dpo", beside=dict(pref_loss="simpo"), simpo_gamma=2.0),
    *tried("kto", kto_chosen_weight=2.0, kto_rejected_weight=2.0),
    *tried("rm", rm_margin=2.0, center_rewards_coefficient=.5)]

JUDGED = dict(reward_model="{place}/judge", reward_funcs=None, allow_weak_reward_model=True) | LORA
DRAWN = [
    *tried("grpo", num_generations=4, num_iterations=1, grpo_loss=["dr_grpo", "rloo"], epsilon=.001, epsilon_high=.001,
        kl_coef=2.0, kl_unbiased=False, kl_limit=1e-9, temperature=.3, top_p=.3, top_k=2, max_new_tokens=3,
        log_completions=True, reward_funcs="walked,json", reward_model="{place}/judge_whole"),
    *tried("grpo", beside=dict(reward_funcs="walked,json"), reward_weights="1,3"),
    *tried("grpo", beside=JUDGED | dict(allow_weak_reward_model=None), allow_weak_reward_model=True),
    *tried("grpo", beside=JUDGED | dict(allow_weak_reward_model=None), min_reward_accuracy=0.0),
    *tried("grpo", beside=JUDGED | dict(reward_model="{place}/model"), reward_model_adapters="{place}/judge"),
    *tried("grpo", beside=JUDGED, reward_model_quantization_bit=4, reward_model_type=["full", "lora"]),
    *tried("ppo", ppo_epochs=1, ppo_buffer_size=2, ppo_target=.01, ppo_score_norm=True, ppo_whiten_rewards=True, ppo_clip=1e-3,
        ppo_value_clip=1e-4, ppo_value_weight=3.0, ppo_gamma=.5, ppo_lambda=.1, missing_eos_penalty=9.0, kl_coef=3.0)]

LOOP = [
    *tried("sft", output_dir="{out}/elsewhere", per_device_train_batch_size=2, max_steps=2, learning_rate=5e-2,
        lr_scheduler_type=["cosine", "reduce_lr_on_plateau"], warmup_steps=2, weight_decay=.5, adam_beta1=.5, adam_beta2=.5, adam_epsilon=.1,
        optim=["sgd", "galore_adamw"], optim_args="rank=2", optim_target_modules="all-linear", gradient_accumulation_steps=2,
        average_tokens_across_devices=False, max_grad_norm=1e-3, label_smoothing_factor=.3, bf16=True, fp16=True,
        bf16_full_eval=True, fp16_full_eval=True, tf32=True, activation_checkpointing=True, gradient_checkpointing=True,
        torch_compile=True, torch_compile_backend="eager", torch_compile_mode="max-autotune", use_liger_kernel=True,
        liger_kernel_config={"rope": True}, use_cache=True, neftune_noise_alpha=9.0, torch_empty_cache_steps=1),
    *tried("sft", beside=dict(max_steps=-1, num_train_epochs=1), num_train_epochs=2),
    *tried("sft", beside=dict(lr_scheduler_type="cosine_with_restarts"), lr_scheduler_kwargs={"num_cycles": 3}),
    *tried("sft", beside=dict(optim="sgd"), optim_args="momentum=0.9"),
    *tried("sft", beside=dict(activation_checkpointing=True), activation_checkpointing_kwargs={"use_reentrant": True},
        gradient_checkpointing_kwargs={"use_reentrant": True}),
    *tried("sft", "crowded", auto_find_batch_size=True),
    *tried("sft", logging_strategy="no", logging_steps=2, log_on_each_node=False, logging_nan_inf_filter=True,
        include_num_input_tokens_seen="all", log_level="error", log_level_replica="error", disable_tqdm=False),
    *tried("sft", beside=dict(logging_steps=3), logging_first_step=False),
    *tried("sft", "replica", log_level_replica="debug"), *tried("sft", "second machine", log_on_each_node=False),
    *tried("sft", report_to=["tensorboard", "wandb"], run_name="mine", project="mine", trackio_space_id="a/b",
        trackio_bucket_id="a/b", trackio_static_space_id="a/b"),
    *tried("sft", beside=dict(report_to="tensorboard"), run_name="mine"),
    *tried("sft", slow=True, report_to="mlflow"), *tried("sft", slow=True, beside=dict(report_to="mlflow"), run_name="mine")]

EVALUATED = [
    *tried("sft", beside=dict(eval_dataset="held"), eval_strategy="epoch", eval_on_start=True, do_eval=[True, False]),
    *tried("sft", beside=LOOKS, eval_steps=2, eval_delay=2, per_device_eval_batch_size=1, prediction_loss_only=True),
    *tried("sft", eval_steps=2, eval_delay=2, eval_on_start=True, eval_strategy="steps", do_eval=True, prediction_loss_only=False,
        eval_do_concat_batches=False,
        eval_use_gather_object=True, eval_accumulation_steps=1, include_for_metrics=["inputs"], batch_eval_metrics=True),
    *tried("sft", beside=SAVES, save_only_model=True, save_strategy="epoch", save_steps=2, save_total_limit=1),
    *tried("sft", "second machine", SAVES, save_on_each_node=True),
    *tried("sft", enable_jit_checkpoint=True, push_to_hub=True, hub_token="abc", hub_private_repo=True, hub_model_id="a/b",
        hub_strategy="end", hub_always_push=True, hub_revision="v1"),
    *tried("sft", beside=LOOKS | SAVES, load_best_model_at_end=True),
    *tried("sft", beside=LOOKS | SAVES | dict(load_best_model_at_end=True), metric_for_best_model="perplexity",
        greater_is_better=True)]

MACHINE = [
    *tried("sft", "stopped", dict(resume_from_checkpoint="true"), ignore_data_skip=True),
    *tried("sft", "stopped", resume_from_checkpoint="true"),
    *tried("sft", restore_callback_states_from_checkpoint=False, full_determinism=True, seed=7, data_seed=7, use_cpu=True,
        accelerator_config=[{"gradient_accumulation_kwargs": {"sync_each_batch": True}}, {"even_batches": False}],
        parallelism_config={"cp_size": 2}, dataloader_num_workers=2, remove_unused_columns=True, label_names=["labels"],
        train_sampling_strategy=["sequential", "random", "group_by_length"], length_column_name="n", ddp_find_unused_parameters=True,
        ddp_bucket_cap_mb=1,
        ddp_broadcast_buffers=False, ddp_static_graph=True, ddp_backend="gloo", ddp_timeout=60, fsdp="full_shard",
        fsdp_config={"version": 2}, deepspeed="{place}/zero.json", debug="underflow_overflow", skip_memory_metrics=False,
        do_train=False, do_predict=True, local_rank=0),
    *tried("sft", beside=dict(max_steps=-1, num_train_epochs=1, max_samples=11), dataloader_drop_last=True),
    *tried("sft", beside=WORKERS, dataloader_persistent_workers=True, dataloader_prefetch_factor=4,
        dataloader_multiprocessing_context="fork", dataloader_in_order=False),
    *tried("sft", "gpu", dataloader_pin_memory=False),
    *tried("sft", beside=dict(eval_dataset="held"), do_train=False)]

CASES = MODEL + ROWS + HOW + DRAWN + LOOP + EVALUATED + MACHINE


# what the machine is like

def crowded():
    "No memory for batches of more than one row."
    from medllm.train.trainer import StageTrainer
    step = StageTrainer.training_step
    def training_step(self, model, inputs, *more):
        if len(inputs["input_ids"]) > 1: raise RuntimeError("CUDA out of memory. (as a test has it)")
        return step(self, model, inputs, *more)
    return mock.patch.object(StageTrainer, "training_step", training_step)


def gpu():
    "A GPU, as far as the loader is asked."
    from medllm.train.trainer import StageTrainer
    loader = StageTrainer._loader
    def _loader(*args, **more):
        with mock.patch("torch.cuda.is_available", lambda: True): return loader(*args, **more)
    return mock.patch.object(StageTrainer, "_loader", _loader)


@contextlib.contextmanager
def hub():
    "No network; what was fetched lies in a cache."
    from huggingface_hub import constants
    with mock.patch.object(constants, "HF_HUB_OFFLINE", True): yield


def hosted():
    "A set on the hub, as `datasets` would fetch it."
    from datasets import Dataset
    def load_dataset(*args, streaming=False, **more):
        rows = Dataset.from_list([{k: r[k] for k in ("instruction", "output")} for r in talk()])
        return rows.to_iterable_dataset() if streaming else rows
    return mock.patch("datasets.load_dataset", load_dataset)


def ranked(process, local):
    "This process is another one of several, as far as transformers asks."
    from transformers import TrainingArguments
    stack = contextlib.ExitStack()
    for name, value in (("process_index", process), ("local_process_index", local)):
        stack.enter_context(mock.patch.object(TrainingArguments, name, property(lambda self, value=value: value)))
    return stack


AROUND = {"crowded": crowded, "gpu": gpu, "hub": hub, "hosted": hosted,
    "replica": lambda: ranked(1, 1), "second machine": lambda: ranked(1, 0)}
BEGUN = {"held": "model_2", "stopped": "stopped"}                    # what lies in the output folder


# what a run did

def numbers(values): return [round(float(v), 10) for v in values]


def row_hashes(batch):
    "A short name of each row of a batch, whatever its padding."
    import torch
    ids, key = batch["input_ids"], lambda ids: hashlib.sha1(bytes(str(ids), "ascii")).hexdigest()[:8]
    if not torch.is_tensor(ids): return [key(ids)]
    if "borders" in batch: return [key(ids.flatten().tolist())]
    return [key([i for i in row if i]) for row in ids.tolist()]


class Watch:
    "What a run does, noted while it does it."
    def __init__(self): self.seen, self.trainer, self.calls = {}, None, Counter()

    def note(self, name, value): self.seen.setdefault(name, value)
    def add(self, name, value): self.seen.setdefault(name, []).append(value)

    def trainer_made(self, made):
        def init(trainer, *args, **more):
            made(trainer, *args, **more)
            self.trainer = trainer
            self.describe_model(trainer.model)
        return init

    def describe_model(self, model):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.note("what trains", f"{len(trained)} parameters" if len(trained) > 9 else sorted(trained))
        self.note("names of what trains", sorted(trained))
        self.note("weights", sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))
        self.note("attention", getattr(model.config.get_text_config(), "_attn_implementation", None))
        self.note("layers", sorted({type(m).__name__ for m in model.modules()}))
        for m in model.modules():
            if type(state := getattr(m, "weight", None)).__name__ != "Params4bit": continue
            self.note("4 bit", state.quant_type)
            self.note("scales of 4 bit", "quantised" if state.quant_state.nested else "plain")
        for name, config in sorted(getattr(model, "peft_config", {}).items()):
            for key in ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "target_modules", "modules_to_save"):
                value = getattr(config, key)
                self.note(f"adapter {key}", sorted(value) if isinstance(value, set) else value)
        self.note("weights at the start", {n: numbers((p.double().sum(), p.double().abs().sum())) for n, p in trained.items()
            if p.is_floating_point()})

    def loss_taken(self, taken):
        def compute_loss(trainer, model, inputs, *args, **more):
            self.add("batches", row_hashes(inputs))
            self.add("trained tokens", sorted(inputs["targets"].tolist()) if "targets" in inputs else None)
            again = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
            self.note("computed again", bool(again))
            if again: self.note("computed again with", again[0]._gradient_checkpointing_func.keywords)
            return taken(trainer, model, inputs, *args, **more)
        return compute_loss

    def loader(self):
        from torch.utils.data import DataLoader
        class Loader(DataLoader):
            def __init__(loader, rows, **how):
                batches = how["batch_sampler"]
                for key, value in how.items():
                    if key not in ("batch_sampler", "collate_fn"): self.note(f"loader: {key}", value)
                if isinstance(batches, list): self.add("batches of validation", [len(b) for b in batches])
                if how["num_workers"]: self.calls["workers"] += 1
                for key in ("prefetch_factor", "multiprocessing_context", "persistent_workers", "pin_memory"): how.pop(key)
                super().__init__(rows, **how | dict(num_workers=0))
        return Loader

    def counted(self, name, function=lambda *args, **more: None):
        def count(*args, **more):
            self.calls[name] += 1
            return function(*args, **more)
        return count

    @contextlib.contextmanager
    def watching(self):
        "The hooks."
        import torch
        from accelerate.state import PartialState
        from medllm.data import cache
        from medllm.models import documents
        from medllm.train import contract, trainer
        from medllm.train.trainer import StageTrainer
        begun = PartialState.__init__
        def state(this, cpu=False, **how):
            for key, value in how.items() | {("cpu", cpu)}: self.note(f"processes: {key}", str(value))
            begun(this, cpu, **how)
        def compile(model=None, **how):
            for key, value in how.items(): self.note(f"compiled: {key}", str(value))
            return model
        bar = mock.Mock(side_effect=lambda *a, **k: self.note("progress bar", "drawn") or mock.MagicMock())
        patches = [
            mock.patch.object(StageTrainer, "__init__", self.trainer_made(StageTrainer.__init__)),
            mock.patch.object(StageTrainer, "compute_loss", self.loss_taken(StageTrainer.compute_loss)),
            mock.patch.object(trainer, "DataLoader", self.loader()), mock.patch.object(PartialState, "__init__", state),
            mock.patch("torch.compile", compile), mock.patch("transformers.trainer_callback.tqdm", bar),
            mock.patch("transformers.trainer.clear_device_cache", self.counted("memory given back")),
            mock.patch.object(cache, "_make", self.counted("rows made", cache._make)),
            mock.patch.object(contract, "package_hash", lambda: ""), mock.patch.object(contract, "_version", lambda name: ""),
            mock.patch("gc.collect", lambda *a: 0), mock.patch("os.fsync", lambda *a: None)]
        with contextlib.ExitStack() as stack:
            for patch in patches: stack.enter_context(patch)
            yield


TIMED = re.compile("seconds|runtime|per_second|memory|_time|total_flos|mem_")
HIDDEN = ("params", "lr", "initial_lr", "decoupled_weight_decay", "foreach", "maximize", "capturable", "differentiable", "fused")


def came_to(watch, folder):
    "What a run came to: its optimiser, its log, its files."
    trainer, seen = watch.trainer, watch.seen
    if trainer is None: return
    args, optimizer = trainer.args, getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if optimizer is not None:
        seen["optimiser"] = type(optimizer).__name__
        for name, value in max(optimizer.param_groups, key=lambda g: g.get("weight_decay", 0)).items():
            if name not in HIDDEN: seen[f"optimiser: {name}"] = value
    for name, value in vars(trainer.accelerator.ddp_handler or object()).items() if trainer.accelerator.ddp_handler else ():
        if not callable(value): seen[f"DDP: {name}"] = str(value)
    seen["synchronised"] = trainer.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch")
    seen["log level"] = logging.getLogger("transformers").level
    seen["steps"], seen["epochs"] = trainer.state.global_step, round(trainer.state.epoch or 0, 3)
    seen["writes to disk"], seen["speaks"] = args.should_save, args.should_log
    seen["best"] = trainer.state.best_global_step
    came_by_step(trainer, seen)
    files_of(folder, seen)
    seen["weights at the end"] = {n: numbers((p.double().sum(), p.double().abs().sum()))
        for n, p in trainer.model.named_parameters() if p.requires_grad and p.is_floating_point()}


def came_by_step(trainer, seen):
    "The log of a run, by what was logged."
    lines = [json.loads(line) for line in trainer.history.read_text().splitlines()] if trainer.history.exists() else []
    seen["logged at steps"] = [line["step"] for line in lines if "loss" in line]
    seen["validated at steps"] = [line["step"] for line in lines if "eval_loss" in line]
    seen["what is logged"] = sorted({name for line in lines for name in line if not re.search("runtime|per_second", name)})
    for name in {name for line in lines for name in line}:
        if not TIMED.search(name): seen[f"log: {name}"] = [line[name] for line in lines if name in line]


def files_of(folder, seen):
    "The files of a run, and where they lie."
    found = [f for f in folder.rglob("*") if f.is_file()]
    names = sorted({re.sub(r"checkpoint-\d+|\d{6,}.*", "…", str(f.relative_to(folder))) for f in found})
    seen["folder"] = sorted({n.split("/")[0] for n in names})
    seen["files"] = sorted({n.split("/", 1)[-1] for n in names})
    seen["checkpoints"] = sorted({int(f.parent.name.partition("-")[2]) for f in found if f.name == "COMMIT.json"})


@contextlib.contextmanager
def as_it_was():
    "What a run changes in a process, put back."
    import torch
    from transformers.utils import logging as library
    level, random = library.get_verbosity(), torch.get_rng_state()
    with mock.patch.dict(os.environ):
        try: yield
        finally:
            library.set_verbosity(level)
            torch.use_deterministic_algorithms(False)
            torch.set_rng_state(random)


class Walk:
    "A place with data and models, and the runs that were made there."
    def __init__(self, place):
        self.place, self.count, self.kept = Path(place), 0, {}
        write_rows(self.place)
        write_models(self.place)
        (self.place/"elsewhere").mkdir()
        for file in self.place.glob("*.json"): shutil.copy(file, self.place/"elsewhere")
        (self.place/"elsewhere/talk.json").write_text(json.dumps(talk()[::-1]))
        (self.place/"zero.json").write_text("{}")

    @functools.cached_property
    def prepared(self):
        "Adapters, reward models, and a run that was stopped, for others to go on from."
        looks = LOOKS | dict(eval_dataset="pairs_held")
        for name, stage, more in (("adapter", "sft", LORA), ("judge", "rm", LORA | looks), ("judge_whole", "rm", looks),
                ("stopped", "sft", SAVES)):
            seen = self.observe(stage, more | dict(output_dir=str(self.place/name)))
            assert "refused" not in seen, seen["refused"]
        shutil.rmtree(self.place/"stopped/checkpoint-3")
        return True

    def observe(self, stage, given, around=""):
        "What a run does: name of what can be seen -> what was."
        self.count += 1
        out = self.place/f"out/{self.count}"
        out.mkdir(parents=True)
        if around in BEGUN: shutil.copytree(self.place/BEGUN[around], out/"run")
        put = lambda v: v.format(place=self.place, out=out) if isinstance(v, str) else v
        given = {k: put(v) for k, v in (BASE | STAGES[stage] | dict(stage=stage) | given).items() if v is not None}
        if given.get("max_steps") == -1: del given["max_steps"]
        watch, said = Watch(), io.StringIO()
        machine = AROUND.get(around, contextlib.nullcontext)()
        with as_it_was(), mock.patch.dict(os.environ, MEDLLM_CACHE=str(out/"cache")), machine, watch.watching():
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()): self.run(given, watch)
            watch.note("HF_TOKEN", bool(os.environ.get("HF_TOKEN")))
        watch.seen |= {name: count for name, count in watch.calls.items()}
        came_to(watch, out)
        watch.seen["said"] = sorted({line for line in self.plain(said.getvalue()) if not re.match(r"step \d|\W*$", line)})
        shutil.rmtree(out)
        return watch.seen

    def run(self, given, watch):
        from medllm.core import UserError
        from medllm.train.loop import run
        from medllm.train.medical_rewards import REWARDS, Rule
        rule = lambda option: Rule("walked", "any", lambda gold, prompt: "any", lambda text, gold, prompt: len(text) % 5/5)
        try:
            with mock.patch.dict(REWARDS, walked=rule): run(given)
        except UserError as e: watch.seen["refused"] = self.plain(str(e))[0]
        except Exception as e: watch.seen["refused"] = f"CRASH {type(e).__name__}: {self.plain(str(e))[:1]}"

    def plain(self, text):
        "Lines without what differs from machine to machine."
        text = re.sub(rf"{re.escape(str(self.place))}/(out/\d+/)?", "", text)
        return text.splitlines()

    def apart(self, case):
        "What a run with a flag did otherwise than without it: name -> without, with."
        self.prepared
        key = json.dumps([case.stage, case.given, case.around], sort_keys=True)
        if key not in self.kept: self.kept[key] = self.observe(case.stage, case.given, case.around)
        before, after = self.kept[key], self.observe(case.stage, case.given | {case.flag: case.value}, case.around)
        return {name: (before.get(name), after.get(name)) for name in before | after
            if not alike(before.get(name), after.get(name))}


def alike(a, b):
    "Whether two observations are the same, numbers to rounding."
    if isinstance(a, dict) and isinstance(b, dict): return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list): return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, float) and isinstance(b, float): return abs(a - b) <= 1e-5*max(abs(a), abs(b), 1e-3)
    return a == b


def main():
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--write", action="store_true")
    words.add_argument("--show")
    words.add_argument("--stage")
    words = words.parse_args()
    with tempfile.TemporaryDirectory() as d:
        walk = Walk(d)
        for case in CASES:
            if words.show is None or words.show not in case.flag: continue
            print(f"{case.flag} {case.value!r} [{case.stage} {case.given} {case.around}]")
            for name, (a, b) in walk.apart(case).items(): print(f"    {name}: {str(a)[:150]} -> {str(b)[:150]}")
    return 0


if __name__ == "__main__": sys.exit(main())
