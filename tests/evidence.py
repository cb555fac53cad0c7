"""Evidence: runs on real weights, whose executed notebooks are kept in nbs/evidence, and the READMEs' table made from them.

    python tests/evidence.py                 what there is, and what is kept
    python tests/evidence.py pubmedqa        make its records and keep them, without weights
    python tests/evidence.py --table         the READMEs' table, from the records that are kept

Each takes at most 45 minutes on two cores without a GPU. The model is `smol`; `--model NAME --bits 4` takes another one,
on a GPU an 8B one for example; of those nothing is kept here. Data are real files of other people's,
which are no part of the project: `--data DIR` names their folder.
"""
import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT/"nbs/evidence"         # a folder with _ before its name for each: nbdev passes over those
DATA = ROOT.parent/"shared/data"
MEDLLM = Path(sys.executable).parent/"medllm"


def run(notebook, output, given):
    "Execute a run notebook into a record, unless that was done; parameters as JSON, by a file."
    from medllm.records.record import read_run_json
    if (output/"run.json").exists() and read_run_json(output).get("status") == "completed": return output
    shutil.rmtree(output, ignore_errors=True)                      # of a run that was stopped
    settings = output.with_suffix(".json")
    settings.write_text(json.dumps(given | {"output_dir": str(output)}))
    subprocess.run([str(MEDLLM), "run", notebook, "-f", str(settings)], check=True, cwd=ROOT)
    return output


def write_rows(file, rows):
    file.write_text(json.dumps(rows, ensure_ascii=False))
    return str(file)


def pubmedqa(data, place, model):
    "SFT on the 500 labelled abstracts outside the official test, measured on the official 500."
    from medllm.evaluate.items import load_items
    from medllm.evaluate.likelihood import letter_asked
    file = data/"pubmedqa/ori_pqal.json"
    abstracts, test = json.loads(file.read_text()), load_items(str(file))
    official = {item.id for item in test.items}
    others = {key: row for key, row in abstracts.items() if key not in official}
    (place/"others").mkdir(exist_ok=True)
    train = load_items(write_rows(place/"others/train.json", others)).items
    rows = [{"instruction": letter_asked(item).prompt, "output": min(item.gold)} for item in train]
    lettered = [{"id": item.id, "question": item.question, "context": item.context,
        "options": {"A": "yes", "B": "no", "C": "maybe"}, "answer": "ABC"["yes no maybe".split().index(min(item.gold))]}
        for item in test.items]
    tuned = run("sft", place/"sft", model | {"dataset": write_rows(place/"rows.json", rows), "val_size": 0.05,
        "cutoff_len": 1024, "lora_rank": 16, "num_train_epochs": 2, "learning_rate": 5e-4, "memorisation": 0,
        "note": "500 labelled abstracts of PubMedQA that are not in its official test"})
    report = run("evaluate", place/"evaluate", {"model_name_or_path": str(tuned), "dataset": "",
        "tasks": {"official": {"kind": "choice", "dataset": str(file)},
            "plain wording": {"kind": "choice", "dataset": str(file), "layout": "plain"},
            "lettered, all orders": {"kind": "choice", "dataset": write_rows(place/"lettered.json", lettered), "orders": "all",
                "limit": 100}},
        "note": "the official 500 of PubMedQA, in the wording of the training and in two others"})
    return [tuned, report]


def sft(data, place, model):
    "SFT on 600 consultations, measured on 200 others, on general text, and on requests that are to be refused."
    rows = json.loads((data/"chatdoctor/chatdoctor5k.json").read_text())
    apart = {(row["input"], row["output"]): row for row in rows if len(row["output"]) > 80}
    asked = {}
    for row in apart.values(): asked.setdefault(row["input"], row)                       # a question is on one side only
    drawn = random.Random(0).sample(sorted(asked.values(), key=lambda row: row["input"]), 800)
    train, others = (write_rows(place/f"{name}.json", part) for name, part in (("trained", drawn[:600]), ("others", drawn[600:])))
    tuned = run("sft", place/"sft", model | {"dataset": train, "val_size": 0.05, "num_train_epochs": 3, "learning_rate": 3e-4,
        "note": "600 consultations of chatdoctor5k"})
    report = run("evaluate", place/"evaluate", {"model_name_or_path": str(tuned), "dataset": "",
        "tasks": {"held-out consultations": {"kind": "forgetting", "dataset": others, "general": "mm_general"},
            "safety": {"kind": "safety", "dataset": "mm_safety", "max_new_tokens": 96},
            "memorised": {"kind": "memorisation", "dataset": train, "held_out": others, "limit": 150}},
        "note": "200 other consultations, general text, safety and memory, against the base"})
    return [tuned, report]


NAMES = {"sft": sft, "pubmedqa": pubmedqa}


def choice_rows(name, what, report):
    "A line of the table for each set of questions that a record compares base and tuned on."
    found = json.loads((report/"evaluation.json").read_text(encoding="utf-8"))
    share = lambda f: f"{f['value']:.1%} ({f['low']:.1%} to {f['high']:.1%})"
    for task, both in found["comparisons"].items():
        base, tuned = found["base"][task], found["tuned"][task]
        key = "order_accuracy" if "order_accuracy" in tuned else "accuracy"
        yield [what, f"{task}, {both['n']} items", share(base[key]), share(tuned[key]), f"{both['p']:.1g}", both["verdict"],
            f"[record](nbs/evidence/_{name}/evaluate)"]


def lines():
    "The READMEs' table: a line for each measured thing, from the records that are kept."
    rows = []
    for name, make in NAMES.items():
        for report in sorted(KEPT.glob(f"_{name}/evaluate/*")):
            rows += choice_rows(name, make.__doc__.split(",")[0], report)
    return [f"| {' | '.join(row)} |" for row in rows]


def keep(name, records):
    "Put records, less their weights, in the place of those that are kept."
    from medllm.records.retention import promote
    goal = KEPT/f"_{name}"
    shutil.rmtree(goal, ignore_errors=True)
    for record in records: promote(record, goal)
    return goal


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", nargs="?", choices=list(NAMES), help="which; without it they are listed")
    p.add_argument("--data", type=Path, default=DATA, help="folder of the real data (default %(default)s)")
    p.add_argument("--model", default="smol", help="model, folder or hub id (default smol)")
    p.add_argument("--bits", type=int, help="4 or 8: load it quantised")
    p.add_argument("--runs", type=Path, default=ROOT/"runs/evidence",
        help="folder that the records are made in, weights and all; what is done there is not done again (default %(default)s)")
    p.add_argument("--table", action="store_true", help="print the table")
    args = p.parse_args(argv)
    if args.table or not args.name:
        print("\n".join(lines() if args.table else
            [f"{name:10} {'kept ' if (KEPT/f'_{name}').exists() else 'not made'} {f.__doc__}" for name, f in NAMES.items()]))
        return 0
    if not args.data.is_dir(): return p.error(f"the folder of the real data, {args.data}, is not there: name one with --data")
    model = {"model_name_or_path": args.model} | ({"quantization_bit": args.bits} if args.bits else {})
    place = args.runs.resolve()/(args.name if args.model == "smol" else f"{args.name}-{Path(args.model).name}")
    place.mkdir(parents=True, exist_ok=True)
    records = NAMES[args.name](args.data.resolve(), place, model)
    if args.model == "smol": print(keep(args.name, records))
    print("\n".join(lines()))
    return 0


if __name__ == "__main__": sys.exit(main())
