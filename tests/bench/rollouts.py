"""A GRPO step side by side: medllm and TRL's GRPOTrainer, and drawing answers beside transformers' `generate`.

    python tests/bench/rollouts.py --data ../shared/data/chatdoctor/chatdoctor5k.json

A Llama of 34M random parameters answers the first questions of the file (they are cut to `--prompt` tokens), G answers
each, all of them `--answer` tokens long, since such a model does not stop. Both trainers draw, score by length, compare
with the base through LoRA, and take a step on the same number of answers. One process a measurement, in turn,
`--repeats` times; medians are printed. TRL comes from `make trl`, or from the folder in MEDLLM_TRL.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHAPE = dict(vocab_size=32000, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
    num_key_value_heads=6, max_position_embeddings=2048)
LORA = dict(rank=8, targets=["q_proj", "v_proj"])


def write_model(folder):
    "The model with the tiny tokenizer."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from medllm.models.loading import load_tokenizer
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)


def texts(o, n): return [row["input"] or row["instruction"] for row in json.loads(Path(o["data"]).read_text())[:n]]


def ours(o):
    "Seconds a step."
    import numpy as np
    from transformers import TrainingArguments
    from medllm.data.rows import TokenRows
    from medllm.data.tokens import Renderer
    from medllm.models.adapters import AdaptPlan, adapt
    from medllm.models.loading import load_model, load_tokenizer
    from medllm.models.adapter_roles import active_adapter
    from medllm.models.sampling import Sampling
    from medllm.rl.rollout import Reward
    from medllm.rl.grpo import GrpoLoss, GrpoObjective
    from medllm.rl.rollout import RolloutPlan
    from medllm.rl.sampling_trainer import RolloutTrainer
    from medllm.train.examples import Prompts
    tokenizer = load_tokenizer(o["model"])
    ids = [np.array(tokenizer(t).input_ids[:o["prompt"]], np.int32) for t in texts(o, o["prompts"]*o["steps"])]
    args = TrainingArguments(
        output_dir=o["out"], per_device_train_batch_size=o["prompts"]*o["each"], max_steps=o["steps"], learning_rate=1e-5,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, remove_unused_columns=False)
    class Base:
        head = None
        def answering(self, model): return active_adapter(model, None)
    model = adapt(load_model(o["model"]), AdaptPlan(rank=LORA["rank"], target=",".join(LORA["targets"])))
    length = Reward.of_text("length", lambda answers, golds, prompts: [float(len(a)) for a in answers])
    trainer = RolloutTrainer(model, args, GrpoObjective(GrpoLoss(longest=o["answer"]), [length], o["each"]),
        Prompts(TokenRows([(i, np.zeros(len(i), bool)) for i in ids])),
        RolloutPlan(Renderer(tokenizer, "chatml"), Sampling(o["answer"]), Base(), kl_limit=1e9))
    return timed(trainer)


def trl(o):
    "Seconds a step of TRL's trainer."
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(o["model"])
    rows = [tokenizer.decode(tokenizer(t).input_ids[:o["prompt"]]) for t in texts(o, o["prompts"]*o["steps"])]
    args = GRPOConfig(
        output_dir=o["out"], per_device_train_batch_size=o["prompts"]*o["each"], num_generations=o["each"],
        max_completion_length=o["answer"], beta=0.04, max_steps=o["steps"], learning_rate=1e-5, report_to="none",
        save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True)
    adapter = LoraConfig(r=LORA["rank"], lora_alpha=16, target_modules=LORA["targets"], task_type="CAUSAL_LM")
    return timed(GRPOTrainer(o["model"], lambda completions, **_: [float(len(c)) for c in completions], args,
        Dataset.from_list([{"prompt": r} for r in rows]), processing_class=tokenizer, peft_config=adapter))


def timed(trainer):
    "Mean seconds of the steps after the first."
    from transformers import TrainerCallback
    at = []
    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs): at.append(time.perf_counter())
    trainer.add_callback(Clock())
    trainer.train()
    return {"seconds": (at[-1] - at[0])/(len(at) - 1)}


def drawing(o):
    "Seconds to draw the answers of a step, here and by `generate`."
    import torch
    from medllm.models.loading import load_model, load_tokenizer
    from medllm.models.sampling import Sampling, sample_answers, uniform_table
    tokenizer, model = load_tokenizer(o["model"]), load_model(o["model"]).eval()
    ids = [tokenizer(t).input_ids[:o["prompt"]] for t in texts(o, o["prompts"])]
    width, stop = max(map(len, ids)), [tokenizer.eos_token_id]
    left = torch.tensor([[0]*(width - len(i)) + i for i in ids])
    mask = torch.tensor([[0]*(width - len(i)) + [1]*len(i) for i in ids])
    table = uniform_table(len(ids)*o["each"], o["answer"], 1)
    def plain():
        with torch.no_grad(): model.generate(
            input_ids=left, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, num_return_sequences=o["each"],
            max_new_tokens=o["answer"], eos_token_id=stop, pad_token_id=0)
    def here(): sample_answers(model, ids, table, Sampling(o["answer"]), stop)
    out = {}
    for name, draw in (("generate", plain), ("medllm", here)):
        draw()
        start = time.perf_counter()
        draw()
        out[name] = time.perf_counter() - start
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    for name, value in (("prompts", 4), ("each", 8), ("prompt", 256), ("answer", 32), ("steps", 4), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    o = vars(parser.parse_args())
    if o["measure"]:
        o |= json.loads(o["measure"])
        return print("RESULT", json.dumps(globals()[o["what"]](o)))
    place = os.environ.get("MEDLLM_TRL", str(ROOT/".trl"))
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder)
        found = {what: [] for what in ("drawing", "ours", "trl")}
        for _ in range(o["repeats"]):
            for what in found:
                words = [f"--{name}={o[name]}" for name in ("data", "prompts", "each", "prompt", "answer", "steps")]
                measure = json.dumps({"what": what, "model": folder, "out": f"{folder}/out"})
                done = subprocess.run(
                    [sys.executable, __file__, *words, "--measure", measure], capture_output=True, text=True,
                    env={**os.environ, "PYTHONPATH": f"{place}{os.pathsep}{ROOT}"})
                lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
                if not lines: sys.exit(done.stderr[-2000:])
                found[what].append(json.loads(lines[-1][7:]))
    middle = lambda what, name: statistics.median(r[name] for r in found[what])
    print(json.dumps(found))
    print(f"drawing: generate {middle('drawing', 'generate'):.2f} s, medllm {middle('drawing', 'medllm'):.2f} s")
    print(f"a step:  TRL {middle('trl', 'seconds'):.2f} s, medllm {middle('ours', 'seconds'):.2f} s, "
        f"{middle('trl', 'seconds')/middle('ours', 'seconds'):.1f} times as fast")


if __name__ == "__main__": main()
