"""DPO with the prompt of a pair computed once or twice: speed and memory of the same training.

    python tests/bench/shared_prompt.py --out tests/bench/shared_prompt_results.json

A small Llama with random weights and LoRA trains on made pairs on the CPU (on a GPU where there is one, then in
bfloat16), one process per measurement, `--repeats` times in turn: rows padded, rows end to end (`packing`), and prompts
shared. Each case has prompts and answers of about one length; `saved` is the share of tokens that need not be computed.
Seconds are those of the processor (on a GPU, of the clock), from the trainer's first step to its last. Figures are
medians; a ratio is one of medians.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = {"1024+64": (1024, 64), "512+128": (512, 128), "256+128": (256, 128), "128+256": (128, 256), "32+256": (32, 256)}
WAYS = ("padded", "packed", "shared")
SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6,
         "num_key_value_heads": 6}


def prepare(folder, prompt, answer, count):
    "A model folder and a file of pairs, about `prompt` and `answer` tokens long, give or take a fifth."
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from medllm.models.loading import load_tokenizer, model_location
    rng = np.random.default_rng(0)
    words = "fever cough rest sleep pain since days water please doctor take dose blood test result".split()
    text = lambda n: " ".join(rng.choice(words, max(int(n*rng.uniform(.8, 1.2)), 1)))
    rows = [{"instruction": text(prompt), "input": "", "output": [text(answer), text(answer)]} for _ in range(count)]
    (folder/"rows.json").write_text(json.dumps(rows), encoding="utf-8")
    info = {"made": {"file_name": "rows.json", "ranking": True}}
    (folder/"dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    if (folder/"model").exists(): return
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(model_location("tiny"))
    config.update(SHAPE | {"head_dim": SHAPE["hidden_size"]//SHAPE["num_attention_heads"], "max_position_embeddings": 4096})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder/"model")
    load_tokenizer("tiny").save_pretrained(folder/"model")


def measure(folder, way, batch, steps):
    "Train in this process; figures as JSON on standard output."
    import torch
    from medllm.train import preference
    from medllm.train.arguments import parse
    from medllm.train.inputs import prepare_data
    from medllm.train.trainer import peak_memory
    preference._PAYS = -1.0 if way == "shared" else 2.0
    args = parse(dict(stage="dpo", model_name_or_path=str(folder/"model"), dataset="made", dataset_dir=str(folder),
        cutoff_len=4096, finetuning_type="lora", lora_target="q_proj,v_proj", max_steps=steps, save_strategy="no",
        logging_steps=1, per_device_train_batch_size=batch, disable_tqdm=True, packing=way == "packed",
        bf16=torch.cuda.is_available(), precompute_ref_log_probs=False, tokenized_path=str(folder/"cache"),
        output_dir=tempfile.mkdtemp(dir=folder)))
    data = prepare_data(args)
    trainer = preference.make_trainer(args, data)
    assert trainer.objective.shared == (way == "shared")
    start = time.perf_counter() if torch.cuda.is_available() else time.process_time()
    trainer.train()
    seconds = (time.perf_counter() if torch.cuda.is_available() else time.process_time()) - start
    print(json.dumps({"steps_per_second": steps/seconds, "saved": preference.saved_share(data.train),
        "tokens": trainer.seen["tokens"], "trained_tokens": trainer.seen["trained"], "positions": trainer.seen["positions"],
        "loss_last": trainer.state.log_history[-2]["loss"], "peak_memory_gib": peak_memory()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4, help="pairs of a batch")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--out", type=Path, help="write everything measured here, as JSON")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker: return measure(Path(a.worker[0]), a.worker[1], a.batch, a.steps)
    import torch
    out = {"machine": f"{platform.machine()}, {os.cpu_count()} cores" + (
        f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "model": SHAPE, "batch": a.batch, "steps": a.steps, "repeats": a.repeats, "cases": {}}
    with tempfile.TemporaryDirectory() as d:
        for case in a.cases.split(","):
            folder = Path(d)/case
            folder.mkdir()
            (folder/"cache").mkdir()
            prepare(folder, *CASES[case], a.batch*a.steps)
            seen = {way: [] for way in WAYS}
            for _ in range(a.repeats):
                for way in WAYS:
                    done = subprocess.run([sys.executable, __file__, "--worker", str(folder), way, "--batch", str(a.batch),
                        "--steps", str(a.steps)], capture_output=True, text=True)
                    if done.returncode: sys.exit(done.stderr[-2000:])
                    seen[way].append(json.loads(done.stdout.splitlines()[-1]))
            median = lambda way, name: statistics.median(run[name] for run in seen[way])
            speed = {way: median(way, "steps_per_second") for way in WAYS}
            out["cases"][case] = {"saved": seen["shared"][0]["saved"], "steps_per_second": speed,
                "times_faster": {way: speed["shared"]/speed[way] for way in WAYS[:2]},
                "memory_gib": {way: median(way, "peak_memory_gib") for way in WAYS}, "runs": seen}
            print(f"{case:10} saves {seen['shared'][0]['saved']:.0%}: {speed['shared']/speed['padded']:.2f} times padded, "
                f"{speed['shared']/speed['packed']:.2f} times packed")
    if a.out: a.out.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__": main()
