"""Every stage with every way of training, fresh and from an adapter: run, saved, and loaded again to the same outputs.

    python tests/stages.py             run them all and compare with stages_results.json
    python tests/stages.py --write     write stages_results.json, from which the README's table is made
"""
import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE/"stages_results.json"

SHORT = dict(model_name_or_path="tiny", per_device_train_batch_size=2, gradient_accumulation_steps=1, max_steps=2, max_samples=12,
    cutoff_len=256, logging_steps=1, learning_rate=1e-3, save_strategy="no", disable_tqdm=True)
DRAWN = dict(dataset="mm_choice", max_new_tokens=4, reward_funcs="letter")
STAGES = {
    "pt": dict(dataset="mm_pt"), "sft": dict(dataset="mm"), "rm": dict(dataset="mm_rm"),
    "dpo": dict(dataset="mm_rm"), "kto": dict(dataset="mm_rm"),
    "ppo": DRAWN | dict(ppo_epochs=1), "grpo": DRAWN | dict(num_generations=2)}
KINDS = {
    "lora": dict(finetuning_type="lora"), "lora, 4 bit": dict(finetuning_type="lora", quantization_bit=4),
    "freeze": dict(finetuning_type="freeze", freeze_trainable_layers=1), "full": dict(finetuning_type="full")}
STARTS = ("fresh", "from an adapter")


def quiet():
    return contextlib.redirect_stderr(io.StringIO())


def first_adapter(folder):
    "An adapter of supervised training, for the others to start from."
    from medllm.train.loop import run
    with quiet(): run(SHORT | STAGES["sft"] | KINDS["lora"] | dict(output_dir=str(folder)))
    return str(folder)


def outputs(model, stage):
    "Scores or logits of fixed tokens."
    import torch
    ids = torch.arange(300, 340).view(2, 20)
    model.eval()
    with torch.no_grad():
        if stage == "rm":
            from medllm.models.reward_model import scores
            return scores(model, ids, torch.tensor([19, 39]))
        return model(input_ids=ids).logits


def loaded(args, stage):
    "The model as it lies on the disk, loaded the way a user would."
    from medllm.models.adapters import load_adapter
    from medllm.models.loading import load_model
    folder = args.training.output_dir
    whole = not (Path(folder)/"adapter_config.json").exists()
    if stage == "rm":
        from medllm.models.reward_model import load_reward_model
        return load_reward_model(folder, None if whole else args.model.model_name_or_path, args.load_plan())
    base = load_model(folder if whole else args.model.model_name_or_path, args.load_plan())
    return base if whole else load_adapter(base, folder)


def cell(stage, kind, start, adapter, folder):
    "Train two steps, save, load again; the largest difference of the outputs, relative to their size."
    import torch
    from medllm.train.arguments import parse
    from medllm.medical.rewards import REWARDS, Rule
    # an untrained model never answers right, and where all rewards are equal nothing is learnt
    REWARDS["length"] = lambda option: Rule(
        "length", "any", lambda gold, prompt: "any", lambda text, gold, prompt: len(text) % 5/5)
    from medllm.train.inputs import prepare_data
    from medllm.train.loop import stage_module
    more = {} if start == "fresh" else {"adapter_name_or_path": adapter}
    if "reward_funcs" in STAGES[stage]: more["reward_funcs"] = "length"
    with quiet():
        args = parse(SHORT | STAGES[stage] | KINDS[kind] | more | dict(stage=stage, output_dir=str(folder)))
        data = prepare_data(args)
        trainer = stage_module(stage).make_trainer(args, data)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
        moved = sum(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters() if name in before)
        assert trainer.state.global_step == 2 and moved, f"{stage}, {kind}, {start}: nothing was trained"
        want = outputs(trainer.model, stage)
        trainer.save_model()
        got = outputs(loaded(args, stage), stage)
    return ((got - want).abs().max()/want.abs().max()).item()


def matrix(say=lambda text: None):
    "Stage -> way of training -> the starts after which outputs are equal."
    out = {}
    with tempfile.TemporaryDirectory() as d:
        adapter = first_adapter(Path(d)/"sft")
        for stage in STAGES:
            for kind in KINDS:
                for n, start in enumerate(STARTS):
                    far = cell(stage, kind, start, adapter, Path(d)/f"{stage}-{kind}-{n}")
                    say(f"{stage:5} {kind:12} {start:16} {far:.1e}")
                    if far < 1e-4: out.setdefault(stage, {}).setdefault(kind, []).append(start)
    return out


def table(results):
    "The README's table."
    cells = lambda stage, kind: "yes" if results[stage][kind] == list(STARTS) else ", ".join(results[stage][kind]) or "no"
    return "\n".join(["| stage | " + " | ".join(KINDS) + " |", "|---|" + "---|"*len(KINDS),
        *(f"| `{stage}` | " + " | ".join(cells(stage, kind) for kind in KINDS) + " |" for stage in STAGES)])


def main():
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--write", action="store_true")
    results = matrix(lambda text: print(text, flush=True))
    if words.parse_args().write:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(table(results))
        return 0
    return 0 if results == json.loads(RESULTS.read_text()) else 1


if __name__ == "__main__": sys.exit(main())
