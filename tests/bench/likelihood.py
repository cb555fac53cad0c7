"""Likelihood of options side by side: medllm and lm-evaluation-harness, the same prompts, in turn, in one run.

    make lm_eval && python tests/bench/likelihood.py --repeats 3 --out likelihood.json

200 questions each in the harness' own wording of MedQA, PubMedQA, MMLU and CMMLU, on `smol` in float32. Of MMLU's medical
subjects and of CMMLU's there are fewer where this was written: questions of MedMCQA, of CMExam and of CMB fill them up.
Each measurement is a process of its own, and is what lies between rows and figures, without loading. The script
stops when a pick differs.
"""
import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LETTERS = "ABCD"
CLOSE = 1e-3                    # scores that differ by less may be picked either way [nat]


def apollo(data, *sources):
    "(question, four options, number of the right one) of an exam's rows with four options; those of the first source first."
    rows = json.loads((data/"apollo_multi/dev.json").read_text(encoding="utf-8"))
    def parts(row): return row["question"], [line[4:] for line in row["options"].split("\n")], row["answer"].strip("()")
    found = [parts(row) for source in sources for row in rows if row["source"] == source]
    return [(q, options, LETTERS.index(a)) for q, options, a in found if len(options) == 4 and a in LETTERS]


def exams(data, limit):
    "Rows of each exam, in the columns that they have on the hub."
    from medllm.evaluate.items import load_items
    drawn = random.Random(0).sample
    medqa = load_items(str(data/"mirage_mcq/medqa_us_4opt_test.jsonl")).items
    pubmedqa = json.loads((data/"pubmedqa/ori_pqal.json").read_text(encoding="utf-8"))
    official = [item.id for item in load_items(str(data/"pubmedqa/ori_pqal.json")).items]
    return {
        "medqa_4options": [{"sent1": i.question, "label": i.labels.index(min(i.gold))} |
            {f"ending{n}": text for n, (_, text) in enumerate(i.options)} for i in medqa[:limit]],
        "pubmedqa": [{k: pubmedqa[i][k] for k in ("QUESTION", "CONTEXTS", "final_decision")} for i in drawn(official, limit)],
        "mmlu": [{"question": q, "choices": o, "answer": a} for q, o, a in apollo(data, "mmlu-medical", "medmcqa")[:limit]],
        "cmmlu": [{"Question": q, **dict(zip(LETTERS, o)), "Answer": LETTERS[a]}
            for q, o, a in apollo(data, "cmmlu-medical", "cmexam", "cmb-single")[:limit]]}


def prepare(folder, data, limit):
    "Write model and rows; the task that the worker reads."
    from medllm.models.smol import write_smol
    write_smol(folder/"model")
    files = {}
    for name, rows in exams(data, limit).items():
        files[name] = str(folder/f"{name}.jsonl")
        Path(files[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"model": str(folder/"model"), "dtype": "float32", "batch": 8, "exams": files, "out": str(folder/"lm_eval.json")}
    (folder/"task.json").write_text(json.dumps(task))
    return task


def harness(folder, place, threads):
    "lm-evaluation-harness, in a process of its own."
    done = subprocess.run([sys.executable, ROOT/"tests/peers/lm_eval_exams.py", folder/"task.json"], capture_output=True,
        text=True, cwd=folder, env=environment(folder, threads) | {"PYTHONPATH": str(place)})
    if done.returncode: raise SystemExit(done.stderr[-3000:])
    return json.loads((folder/"lm_eval.json").read_text())


def environment(folder, threads):
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "TOKENIZERS_PARALLELISM": "false"}


def ours(folder, threads):
    "medllm, in a process of its own: this file again, with the prompts that the harness asked."
    done = subprocess.run([sys.executable, __file__, "--worker", folder], capture_output=True, text=True,
        env=environment(folder, threads) | {"PYTHONPATH": str(ROOT)})
    if done.returncode: raise SystemExit(done.stderr[-3000:])
    return json.loads((folder/"medllm.json").read_text())


def worker(folder):
    import torch
    from medllm.evaluate.likelihood import LikelihoodRequest, ModelScores
    from medllm.models.chat import ModelChoice, load_chat_model
    task, result = json.loads((folder/"task.json").read_text()), {}
    asked = json.loads((folder/"lm_eval.json").read_text())["exams"]
    chat = load_chat_model(ModelChoice(task["model"], dtype=task["dtype"]))
    for name, their in asked.items():
        requests = [LikelihoodRequest(p, tuple(c.strip() for c in options))
            for p, options in zip(their["prompts"], their["continuations"])]
        started = time.perf_counter()
        scores = [[s.logprob for s in row] for row in ModelScores(chat, "plain")(requests)]
        result[name] = {"seconds": time.perf_counter() - started, "scores": scores}
    (folder/"medllm.json").write_text(json.dumps({"exams": result, "threads": torch.get_num_threads(),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024}))


def compare(theirs, own):
    "By exam: items, picks that differ, those of them that are no matter of rounding, the largest difference of a score."
    result = {}
    for name, their in theirs["exams"].items():
        pairs = list(zip(their["scores"], own["exams"][name]["scores"], strict=True))
        differ = [(a, b) for a, b in pairs if a.index(max(a)) != b.index(max(b))]
        result[name] = {"items": len(pairs), "acc": their["acc"], "picks_that_differ": len(differ),
            "of_these_close": sum(max(a) - a[b.index(max(b))] < CLOSE for a, b in differ),
            "largest_difference": max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True))}
    return result


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, default=ROOT.parent/"shared/data", help="folder of the real data (default %(default)s)")
    p.add_argument("--harness", type=Path, default=Path(os.environ.get("MEDLLM_LM_EVAL", ROOT/".lm_eval")),
        help="where make lm_eval put it (default %(default)s)")
    p.add_argument("--limit", type=int, default=200, help="questions of each exam (default %(default)s)")
    p.add_argument("--repeats", type=int, default=3, help="(default %(default)s)")
    p.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each tool (default %(default)s)")
    p.add_argument("--out", type=Path, help="write everything measured here, as JSON")
    p.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker: return worker(args.worker)
    if not (args.harness/"lm_eval").is_dir(): raise SystemExit("lm-evaluation-harness is not here: make lm_eval")
    with tempfile.TemporaryDirectory() as d:
        task, rounds = prepare(Path(d), args.data.resolve(), args.limit), []
        for turn in range(args.repeats):
            theirs = harness(Path(d), args.harness.resolve(), args.threads)
            own = ours(Path(d), args.threads)
            rounds.append({tool: {name: exam["seconds"] for name, exam in found["exams"].items()} | {
                "peak_rss_bytes": found["peak_rss_bytes"]} for tool, found in (("lm_eval", theirs), ("medllm", own))})
            print(f"round {turn + 1} of {args.repeats}: " + ", ".join(
                f"{name} {rounds[-1]['lm_eval'][name]:.1f} s / {rounds[-1]['medllm'][name]:.1f} s" for name in task["exams"]),
                flush=True)
    found = compare(theirs, own)
    for name, exam in found.items():
        both = {tool: statistics.median(exam["items"]/r[tool][name] for r in rounds) for tool in ("medllm", "lm_eval")}
        exam |= {"items_per_second": both, "ratio": statistics.median(r["lm_eval"][name]/r["medllm"][name] for r in rounds)}
        print(f"{name:15} {exam['items']} items, {exam['picks_that_differ']} picks differ ({exam['of_these_close']} close); "
            f"medllm {both['medllm']:.2f}/s, lm_eval {both['lm_eval']:.2f}/s: {exam['ratio']:.2f} times")
    if args.out: args.out.write_text(json.dumps({"threads": args.threads, "batch": task["batch"], "exams": found,
        "rounds": rounds}, indent=1) + "\n")
    return any(exam["picks_that_differ"] > exam["of_these_close"] for exam in found.values())


if __name__ == "__main__": sys.exit(main())
