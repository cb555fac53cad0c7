"""Which flags of a training run are tried, with which values, and beside which others; `flags.py` tries them."""
from dataclasses import dataclass, field

BASE = dict(model_name_or_path="{place}/model", dataset="talk", dataset_dir="{place}", cutoff_len=96, template="chatml",
    max_steps=3, per_device_train_batch_size=4, logging_steps=1, save_strategy="no", learning_rate=1e-2,
    finetuning_type="full", disable_tqdm=True, output_dir="{out}/run")
STAGES = {
    "sft": {}, "pt": dict(dataset="text"), **{stage: dict(dataset="pairs") for stage in ("rm", "dpo", "kto")},
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
    around:str = ""                           # What the machine is like: a key of CIRCUMSTANCES
    refuses:bool = False                      # Whether to refuse a run is what the flag is for


def tried(stage, around="", /, beside=None, refuses=False, **values):
    "A case for each flag, in one stage and beside the same others; a list tries several values."
    return [Case(flag, value, stage, beside or {}, around, refuses) for flag, several in values.items()
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
    *tried("sft", model_revision="old"), *tried("sft", cache_dir="{place}/hub"),
    *tried("sft", "hub", dict(model_name_or_path="someone/model"), cache_dir="{place}/hub"),
    *tried("sft", flash_attn=["disabled", "fa2"], finetuning_type=["lora", "freeze"]),
    *tried("sft", beside=dict(cutoff_len=1500), rope_scaling=["linear", "yarn"]),
    *tried("sft", beside=dict(dataset="scripted"), trust_remote_code=True),
    *tried("sft", beside=dict(finetuning_type="freeze"), freeze_trainable_layers=1, freeze_trainable_modules="self_attn",
        freeze_extra_modules="lm_head"),
    *tried("sft", beside=LORA, pure_bf16=True)]

ROWS = [
    *tried("sft", dataset="other", dataset_dir="{place}/elsewhere", template="alpaca", default_system="Be brief.", cutoff_len=40,
        max_samples=5, val_size=3, thinking="drop", mask_history=True, train_on_prompt=True, packing=True,
        tokenized_path="{out}/kept", canaries=1, eval_dataset="held"),
    *tried("sft", beside=dict(dataset="talk,other,near"), group_by_length=False),
    *tried("sft", beside=dict(tokenized_path="{place}/kept"), overwrite_cache=True),
    *tried("sft", beside=dict(cutoff_len=40), overlong="reject"),
    *tried("sft", beside=dict(dataset="bad_1_of_200"), on_bad="skip"),
    *tried("sft", refuses=True, beside=dict(dataset="bad", on_bad="skip", max_bad=1), max_bad=.05),
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
    *tried("sft", beside=dict(dataset="pairs"), stage=["rm", "dpo", "kto", "rw"]),
    *tried("sft", beside=dict(dataset="text"), stage="pt"),
    *tried("sft", beside=dict(dataset="other", reward_funcs="walked", max_new_tokens=6, num_generations=2), stage="grpo"),
    *tried("sft", beside=dict(dataset="other", reward_funcs="walked", max_new_tokens=6), stage="ppo"),
    *tried("sft", plot_loss=True, profile=["repeatable", "exact"]), *tried("sft", "exact environment", profile="exact"),
    *tried("sft", "held", overwrite_output_dir=True),
    *tried("sft", "stopped", dict(resume_from_checkpoint="true", learning_rate=2e-2), allow="lr"),
    *tried("dpo", pref_beta=.5, pref_loss=["hinge", "ipo", "orpo", "simpo"], pref_ftx=1.0, dpo_label_smoothing=.2, ld_alpha=.1,
        ref_model="{place}/model_2", ref_policy="model", precompute_ref_log_probs=True),
    *tried("dpo", beside=LORA, ref_model_adapters="{place}/adapter"),
    *tried("dpo", refuses=True, beside=LORA | dict(adapter_name_or_path="{place}/adapter"), ref_policy="base"),
    *tried("dpo", refuses=True, beside=dict(ref_model="{place}/model_2"), ref_policy="start"),
    *tried("dpo", beside=dict(ref_model="{place}/model_2"), ref_model_quantization_bit=4),
    *tried("dpo", beside=dict(pref_loss="simpo"), simpo_gamma=2.0),
    *tried("kto", kto_chosen_weight=2.0, kto_rejected_weight=2.0),
    *tried("rm", rm_margin=2.0, center_rewards_coefficient=.5)]

JUDGED = dict(reward_model="{place}/judge", reward_funcs=None, allow_weak_reward_model=True) | LORA
WEAK = JUDGED | dict(allow_weak_reward_model=None)
DRAWN = [
    *tried("grpo", num_generations=4, num_iterations=1, grpo_loss=["dr_grpo", "rloo"], epsilon=.001, epsilon_high=.001,
        kl_coef=2.0, kl_unbiased=False, kl_limit=1e-9, temperature=.3, top_p=.3, top_k=2, max_new_tokens=3,
        reward_funcs="json_format", log_completions=True),
    *tried("sft", temperature=.3, top_p=.3, top_k=2, max_new_tokens=3),
    *tried("grpo", beside=dict(dataset="open"), log_completions=True),
    *tried("ppo", reward_weights="3"), *tried("ppo", beside=dict(max_steps=8), ppo_target=.01),
    *tried("grpo", refuses=True, beside=WEAK, min_reward_accuracy=.99),
    *tried("grpo", beside=WEAK | dict(min_reward_accuracy=.99), allow_weak_reward_model=True),
    *tried("grpo", beside=JUDGED, reward_model="{place}/judge_whole", reward_model_quantization_bit=4),
    *tried("grpo", beside=JUDGED, refuses=True, reward_model_type="full"),
    *tried("grpo", beside=JUDGED | dict(reward_model="{place}/model"), reward_model_adapters="{place}/judge"),
    *tried("ppo", ppo_epochs=1, ppo_buffer_size=2, ppo_score_norm=True, ppo_whiten_rewards=True, ppo_clip=1e-3,
        ppo_value_clip=1e-4, ppo_value_weight=3.0, ppo_gamma=.5, ppo_lambda=.1, missing_eos_penalty=9.0, kl_coef=3.0)]

LOOP = [
    *tried("sft", output_dir="{out}/elsewhere", per_device_train_batch_size=2, max_steps=2, learning_rate=5e-2,
        lr_scheduler_type=["cosine", "reduce_lr_on_plateau"], warmup_steps=2, weight_decay=.5, adam_beta1=.5, adam_beta2=.5,
        adam_epsilon=.1,
        optim=["sgd", "galore_adamw"], optim_args="rank=2", optim_target_modules="all-linear", gradient_accumulation_steps=2,
        average_tokens_across_devices=False, max_grad_norm=1e-3, label_smoothing_factor=.3, bf16=True, fp16=True,
        bf16_full_eval=True, fp16_full_eval=True, tf32=True, activation_checkpointing=True, gradient_checkpointing=True,
        use_liger_kernel=True,
        liger_kernel_config={"rope": True}, use_cache=True, neftune_noise_alpha=9.0, torch_empty_cache_steps=1),
    *tried("sft", beside=dict(max_steps=-1, num_train_epochs=1), num_train_epochs=2),
    *tried("sft", beside=dict(lr_scheduler_type="cosine_with_restarts"), lr_scheduler_kwargs={"num_cycles": 3}),
    *tried("sft", beside=dict(optim="sgd"), optim_args="momentum=0.9"),
    *tried("sft", beside=dict(activation_checkpointing=True), activation_checkpointing_kwargs={"use_reentrant": True},
        gradient_checkpointing_kwargs={"use_reentrant": True}),
    *tried("sft", "compiler", torch_compile=True, torch_compile_backend="eager", torch_compile_mode="max-autotune"),
    *tried("sft", torch_compile_backend="eager"), *tried("sft", "crowded", auto_find_batch_size=True),
    *tried("sft", logging_strategy="no", logging_steps=3, logging_nan_inf_filter=True,
        include_num_input_tokens_seen="all", log_level="error", disable_tqdm=False),
    *tried("sft", beside=dict(logging_steps=3), logging_first_step=False),
    *tried("sft", "replica", log_level_replica="debug"), *tried("sft", "second machine", log_on_each_node=False),
    *tried("sft", report_to=["tensorboard", "wandb"], run_name="mine", project="mine", trackio_space_id="a/b",
        trackio_bucket_id="a/b", trackio_static_space_id="a/b"),
    *tried("sft", beside=dict(report_to="tensorboard"), run_name="mine"),
    *tried("sft", report_to="mlflow"), *tried("sft", beside=dict(report_to="mlflow"), run_name="mine")]

EVALUATED = [
    *tried("sft", beside=dict(eval_dataset="held"), eval_strategy="epoch", eval_on_start=True, do_eval=[True, False]),
    *tried("sft", beside=LOOKS, eval_steps=2, eval_delay=2, per_device_eval_batch_size=1),
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
        train_sampling_strategy="sequential", length_column_name="n", ddp_find_unused_parameters=True,
        ddp_backend="gloo", ddp_timeout=60, fsdp="full_shard",
        fsdp_config={"version": 2}, deepspeed="{place}/zero.json", debug="underflow_overflow", skip_memory_metrics=False,
        do_train=False, do_predict=True, local_rank=0),
    *tried("sft", beside=dict(dataset="talk,other,near"), train_sampling_strategy="random"),
    *tried("sft", "two processes", ddp_bucket_cap_mb=1, ddp_broadcast_buffers=False,
        ddp_static_graph=True, ddp_backend="gloo"),
    *tried("sft", beside=dict(max_steps=-1, num_train_epochs=1, max_samples=11), dataloader_drop_last=True),
    *tried("sft", beside=WORKERS, dataloader_persistent_workers=True, dataloader_prefetch_factor=4,
        dataloader_multiprocessing_context="fork", dataloader_in_order=False),
    *tried("sft", "gpu", dataloader_pin_memory=False),
    *tried("sft", beside=dict(eval_dataset="held"), do_train=False)]

CASES = MODEL + ROWS + HOW + DRAWN + LOOP + EVALUATED + MACHINE

CIRCUMSTANCES = {
    "crowded": "a device without memory for more than one row, stood in for", "gpu": "a GPU, stood in for",
    "compiler": "a compiler, stood in for", "hub": "a model of the hub, from a cache",
    "hosted": "a dataset of the hub, stood in for", "held": "an output folder that holds a model",
    "stopped": "an output folder that holds checkpoints", "two processes": "two processes",
    "replica": "two processes, the second of them", "second machine": "two launches as of two machines, the second of them",
    "exact environment": "a process that was started as --profile exact wants"}
