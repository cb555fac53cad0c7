"""Batches of rows at random, grouped by length, and packed: speed, padding and memory of the same training.

    python tests/bench/packing.py --data ../shared/data/chatdoctor/chatdoctor5k.json --out packing.json

A small Llama with random weights trains one epoch over the same rows three ways on the CPU, one process per
measurement, `--repeats` times in turn. Rows of a batch and packs of a batch are chosen so that an optimiser step
holds about as many tokens in each. Without `--data`, rows of random words with similar lengths are made.
"""
import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6,
         "num_key_value_heads": 6}
WAYS = {"random": {"group_by_length": False}, "grouped": {"group_by_length": True}, "packed": {"packing": True}}


def made_rows(count):
    "Alpaca rows of random words, lengths spread like those of real questions."
    import numpy as np
    rng = np.random.default_rng(0)
    words = "fever cough rest sleep pain since days water please doctor take dose blood test result".split()
    text = lambda n: " ".join(rng.choice(words, max(int(n), 1)))
    return [{"instruction": text(8 + rng.gamma(2, 15)), "input": "", "output": text(10 + rng.gamma(2, 25))}
            for _ in range(count)]


def prepare(folder, data, count):
    "A model folder and a file of rows."
    from transformers import AutoConfig, AutoModelForCausalLM
    from medllm.models.loading import load_tokenizer, model_location
    import torch
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(model_location("tiny"))
    config.update(SHAPE | {"head_dim": SHAPE["hidden_size"]//SHAPE["num_attention_heads"]})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder/"model")
    load_tokenizer("tiny").save_pretrained(folder/"model")
    rows = json.loads(Path(data).read_text(encoding="utf-8"))[:count] if data else made_rows(count)
    (folder/"rows.json").write_text(json.dumps(rows), encoding="utf-8")


def measure(folder, way, cutoff, batch):
    "Train one epoch in this process; figures as JSON on standard output."
    import numpy as np
    from medllm.train.arguments import parse
    from medllm.train.inputs import prepare_data
    from medllm.train.loop import train
    flags = dict(model_name_or_path=str(folder/"model"), dataset=str(folder/"rows.json"), cutoff_len=cutoff,
        finetuning_type="lora", lora_target="q_proj,v_proj", num_train_epochs=1, save_strategy="no",
        logging_steps=1000, per_device_train_batch_size=batch, disable_tqdm=True, use_cpu=True,
        output_dir=tempfile.mkdtemp(dir=folder)) | WAYS[way]
    data = prepare_data(parse(flags))
    if way == "packed": flags["per_device_train_batch_size"] = max(1, round(batch*np.mean(data.train.lengths)/cutoff))
    start = time.process_time()
    metrics = train(parse(flags), data)
    keep = ("steps", "train_rows", "tokens", "trained_tokens", "tokens_per_second", "trained_tokens_per_second",
            "padding_share", "train_runtime", "packs", "padding")
    print(json.dumps({k: metrics[k] for k in keep if k in metrics} | {
        "cpu_seconds": time.process_time() - start, "batch": flags["per_device_train_batch_size"],
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="alpaca rows; made ones without")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--cutoff", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="rows of a batch that is not packed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write everything measured here, as JSON")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker: return measure(Path(a.worker[0]), a.worker[1], a.cutoff, a.batch)
    found = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as d:
        prepare(Path(d), a.data, a.rows)
        for way in list(WAYS)*a.repeats:
            done = subprocess.run([sys.executable, __file__, "--worker", d, way, "--cutoff", str(a.cutoff),
                "--batch", str(a.batch)], capture_output=True, text=True)
            if done.returncode: raise SystemExit(done.stderr)
            found[way].append(json.loads(done.stdout.strip().splitlines()[-1]))
            last = found[way][-1]
            print(f"{way:8} {last['tokens_per_second']:7.0f} tokens/s  padding {last['padding_share']:6.1%}  "
                  f"{last['peak_rss_mib']:5.0f} MiB  load {os.getloadavg()[0]:.1f}", flush=True)
    assert len({run["trained_tokens"] for runs in found.values() for run in runs}) == 1, "unequal work"
    middle = {way: {k: statistics.median(run[k] for run in runs)
        for k in ("tokens_per_second", "padding_share", "cpu_seconds", "peak_rss_mib")} for way, runs in found.items()}
    for way, m in middle.items(): print(way, {k: round(v, 3) for k, v in m.items()})
    result = {"median": middle, "runs": found, "rows": a.rows, "cutoff": a.cutoff, "data": Path(a.data or "made").name,
              "machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if a.out: a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__": main()
