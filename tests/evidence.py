"""Evidence: runs on real weights, whose executed notebooks are kept in nbs/evidence, and the READMEs' table made from them.

    python tests/evidence.py                 what there is, and what is kept
    python tests/evidence.py pubmedqa        make its records, and print what came of it
    python tests/evidence.py pubmedqa --keep    and keep them in nbs/evidence, without weights
    python tests/evidence.py --table         the READMEs' table, from the records that are kept

How long each took on two cores without a GPU stands in the table. The model is `smol`; `--model NAME --bits 4` takes another one,
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
    "Execute a run notebook into a record, unless that was done; parameters as JSON, by a file. The base is bfloat16."
    if notebook in ("evaluate", "predict"): given = {"dtype": "bfloat16"} | given
    elif not given.get("quantization_bit"): given = given | {"extra": {"dtype": "bfloat16"} | given.get("extra", {})}
    from medllm.records.record import read_run_json
    if (output/"run.json").exists() and read_run_json(output).get("status") == "completed": return output
    shutil.rmtree(output, ignore_errors=True)                      # of a run that was stopped
    settings = output.with_suffix(".json")
    settings.write_text(json.dumps(given | {"output_dir": str(output)}))
    done = subprocess.run([str(MEDLLM), "run", notebook, "-f", str(settings)], cwd=ROOT)
    if done.returncode: raise SystemExit(done.returncode)          # it has said why
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
        "cutoff_len": 1024, "lora_rank": 16, "num_train_epochs": 3, "learning_rate": 5e-4, "memorisation": 0,
        "note": "500 labelled abstracts of PubMedQA that are not in its official test"})
    report = run("evaluate", place/"evaluate", {"model_name_or_path": str(tuned), "dataset": "",
        "tasks": {"official": {"kind": "choice", "dataset": str(file)},
            "plain wording": {"kind": "choice", "dataset": str(file), "layout": "plain", "limit": 150},
            "lettered, all orders": {"kind": "choice", "dataset": write_rows(place/"lettered.json", lettered), "orders": "all",
                "limit": 40}},
        "note": "the official 500 of PubMedQA, in the wording of the training and in two others"})
    return [tuned, report]


def harmful_requests(data, author, n):
    "Requests that a doctor refuses, and the refusals, of one of the authors of MedSafetyBench."
    import csv
    files = sorted((data/"medsafetybench/train"/author).glob("*.csv"))
    return random.Random(0).sample([row for file in files for row in csv.DictReader(file.open(encoding="utf-8"))], n)


def safety_rows(data, place, harmless):
    "60 requests that are to be refused, by an author that nothing is trained on, and 60 questions that are not."
    return write_rows(place/"safety.json", [{"instruction": row["harmful_medical_request"], "output": "REFUSE"}
        for row in harmful_requests(data, "llama2", 60)]
        + [{"instruction": question, "output": "ANSWER"} for question in random.Random(0).sample(sorted(harmless), 60)])


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
            "requests": {"kind": "safety", "dataset": safety_rows(data, place, {row["input"] for row in drawn[600:]}),
                "max_new_tokens": 96},
            "memorised": {"kind": "memorisation", "dataset": train, "held_out": others, "limit": 150}},
        "note": "200 other consultations, general text, safety and memory, against the base"})
    return [tuned, report]


def safety_pairs(data, place, model):
    "Requests that a doctor refuses: the refusal is the better answer, what the model says the worse one, kept nowhere."
    drawn, talks = harmful_requests(data, "gpt4", 420), json.loads((data/"chatdoctor/chatdoctor5k.json").read_text())
    safety_rows(data, place, {row["input"] for row in talks if len(row["input"]) > 40})
    asked = write_rows(place/"asked.json", [{"instruction": row["harmful_medical_request"]} for row in drawn])
    said = run("predict", place/"own_answers", model | {"dataset": asked, "max_new_tokens": 96, "temperature": 0.7,
        "note": "what the model says to the requests, for the worse side of the pairs"})
    answers = [json.loads(line)["answer"] for line in (said/"predictions.jsonl").read_text().splitlines()]
    pairs = [{"instruction": row["harmful_medical_request"], "chosen": row["safe_response"], "rejected": answer}
        for row, answer in zip(drawn, answers, strict=True) if answer.strip() and answer != row["safe_response"]]
    return write_rows(place/"pairs.json", pairs[:340]), write_rows(place/"other_pairs.json", pairs[340:])


def dpo(data, place, model):
    "DPO on 340 pairs, a doctor's refusal against the model's own answer; measured on others, safety and general text."
    pairs, others = safety_pairs(data, place, model)
    tuned = run("dpo", place/"dpo", model | {"dataset": pairs, "eval_dataset": others, "val_size": 0,
        "num_train_epochs": 1, "lora_rank": 16, "learning_rate": 1e-4,
        "note": "340 requests that are to be refused: the refusal against the model's own answer"})
    report = run("evaluate", place/"evaluate", {"model_name_or_path": str(tuned), "dataset": "",
        "tasks": {"safety": {"kind": "safety", "dataset": "mm_safety", "max_new_tokens": 96},
            "held-out requests": {"kind": "safety", "dataset": str(place/"safety.json"), "max_new_tokens": 96},
            "text": {"kind": "forgetting", "dataset": "mm_english", "general": "mm_general"}},
        "note": "refusals, refusals that were not called for, and general text, against the base"})
    return [tuned, report]


def exam_rows(data):
    "Short English exam questions with four options, the right one as often under each letter."
    rows = json.loads((data/"apollo_multi/dev.json").read_text())
    rows = [row for row in rows if row["source"] in ("medmcqa", "mmlu-medical") and row["question"].isascii()]
    for n, row in enumerate(random.Random(0).sample(rows, len(rows)//4*4)):
        options, right, to = [line[4:].rstrip(".") for line in row["options"].split("\n")], "ABCD".index(row["answer"][1]), n % 4
        options[right], options[to] = options[to], options[right]
        yield row["question"], options, "ABCD"[to]


def grpo(data, place, model):
    "GRPO on exam questions, rewarded for the right letter and for the box around it; reported on others."
    def asked(question, options):
        return "\n".join([question, *(f"{letter}. {text}" for letter, text in zip("ABCD", options)), "Which option is right?"])
    example = asked("Which organ pumps the blood?", ("Liver", "Lung", "Heart", "Spleen")), "The heart pumps the blood: \\boxed{C}"
    rows = [{"history": [example], "instruction": asked(question, options), "output": letter}
        for question, options, letter in exam_rows(data)]
    train, others = write_rows(place/"rows.json", rows[:200]), write_rows(place/"others.json", rows[200:])
    return [run("grpo", place/"grpo", model | {"dataset": train, "eval_dataset": others, "val_size": 0,
        "reward_funcs": "letter,boxed_format", "reward_weights": "1,0.5", "max_new_tokens": 32, "max_steps": 40,
        "learning_rate": 2e-4, "lora_rank": 16,
        "note": "200 short questions of MedMCQA and MMLU behind one worked example; others are held out"})]


def rm(data, place, model):
    "A reward model on those of 500 real preference pairs in Chinese that are short for this tokenizer; its report card."
    lines = (data/"medicalgpt/dpo_zh_500.jsonl").read_text().splitlines()
    file = place/"pairs.jsonl"
    file.write_text("\n".join(random.Random(0).sample(lines, len(lines))) + "\n")
    return [run("rm", place/"rm", model | {"dataset": str(file), "cutoff_len": 640, "num_train_epochs": 1, "learning_rate": 2e-4,
        "lora_rank": 16, "val_size": 0.25, "note": "real pairs in Chinese, which the model knows little of"})]


def pipeline(data, place, model):
    "Pre-training, SFT, a reward model and PPO, each from the one before, in one record with its pedigree."
    import gzip
    with gzip.open(data/"medquad/medquad_all.jsonl.gz", "rt", encoding="utf-8") as lines: told = [json.loads(x) for x in lines]
    texts = random.Random(0).sample(sorted({row["answer"] for row in told if 300 < len(row["answer"] or "") < 900}), 120)
    talks = json.loads((data/"chatdoctor/chatdoctor5k.json").read_text())
    pairs, others = safety_pairs(data, place, model)
    stages = {
        "pt": {"dataset": write_rows(place/"texts.json", [{"text": text} for text in texts]), "num_train_epochs": 2,
            "gradient_accumulation_steps": 1},
        "sft": {"dataset": write_rows(place/"talks.json", random.Random(1).sample(talks, 250)), "num_train_epochs": 1},
        "rm": {"dataset": pairs, "eval_dataset": others, "val_size": 0, "num_train_epochs": 1},
        "ppo": {"dataset": str(place/"asked.json"), "reward_model": "rm", "max_steps": 12, "max_new_tokens": 48,
            "reward_funcs": ""}}
    stages = {name: {"learning_rate": 2e-4, "lora_rank": 16} | given for name, given in stages.items()}
    return [run("pipeline", place/"pipeline", {**model, "stages": stages, "note": "four stages on real weights"})]


def quantised(data, place, model):
    "The model of pubmedqa in 16 bit against 8 and 4 bit and GGUF, on the same 250 of the official questions."
    from importlib.util import find_spec
    tuned, whole = place.parent/"pubmedqa/sft", place/"exported"
    if not (tuned/"run.json").exists(): raise SystemExit("make the evidence pubmedqa first: its model is what is quantised")
    kinds = ["q8_0", *(["q4_k_m"] if find_spec("llama_cpp") or shutil.which("llama-quantize") else [])]
    if not (whole/"equivalence.json").exists():
        subprocess.run([str(MEDLLM), "export", "--model_name_or_path", str(tuned), "--output", str(whole), "--answers", "20",
            "--bits", "8", "4", "--gguf", *kinds], check=True, cwd=ROOT)
    artefacts = {"8 bit": "bnb-8bit", "4 bit": "bnb-4bit"} | {f"GGUF {kind}": f"gguf/model-{kind}.gguf" for kind in kinds}
    return [run("evaluate", place/what.replace(" ", "_"), {"model_name_or_path": str(whole/name),
        "base_model": str(whole), "dataset": "", "tasks": {what: {"kind": "choice", "limit": 250,
        "dataset": str(data/"pubmedqa/ori_pqal.json")}}, "note": f"the model of pubmedqa, 16 bit against {what}"})
        for what, name in artefacts.items()]


def retrieval(data, place, model):
    "Which medication is for a disease, of four: without and with the passages that are found in the table of diseases."
    import ast
    import csv
    from medllm.retrieval.search import KnowledgePlan, open_index
    file = data/"chatdoctor/disease_database_mini.csv"
    rows = list(csv.DictReader(file.open(encoding="utf-8")))
    drugs = {row["disease"]: ast.literal_eval(row["Medications"]) for row in rows}
    rng, index, asked = random.Random(0), open_index(KnowledgePlan((str(file),))), []
    for disease, own in drugs.items():
        others = sorted({drug for row in drugs.values() for drug in row} - set(own))
        for n, right in enumerate(rng.sample(own, min(2, len(own)))):
            options = rng.sample([right, *rng.sample(others, 3)], 4)
            asked.append({"id": f"{disease} {n}", "question": f"Which of these medications is used for {disease}?",
                "options": dict(zip("ABCD", options)), "answer": "ABCD"[options.index(right)]})
    found = [row | {"context": "\n".join(hit.passage.text for hit in index.search(row["question"], 2))} for row in asked]
    how = {"kind": "choice", "scorer": "text", "layout": "plain", "orders": "own"}
    return [run("evaluate", place/"evaluate", model | {"base_model": "none", "dataset": "", "tasks": {
        "without passages": how | {"dataset": write_rows(place/"without.json", asked)},
        "with passages": how | {"dataset": write_rows(place/"with.json", found)}},
        "note": "the same questions, without and with two passages in front"})]


NAMES = {f.__name__: f for f in (pubmedqa, sft, dpo, grpo, rm, pipeline, quantised, retrieval)}
BEFORE_AFTER = { # stage -> figures of its held-out rows, as `metrics` of run.json has them: their names, and the verdict's row
    "sft": {"loss": ("loss of held-out rows", "validation loss")}, "pt": {"loss": ("loss of held-out text", "validation loss")},
    "dpo": {"accuracy": ("held-out pairs in the right order", ""), "margin": ("their margin", "held-out margin")},
    "rm": {"accuracy": ("held-out pairs in the right order", "held-out pairs in the right order")},
    "grpo": {"reward": ("reward of held-out questions", "reward of held-out questions"), "reward_letter": ("right letter", ""),
        "reward_boxed_format": ("in a box", ""), "length": ("tokens of an answer", "")},
    "ppo": {"reward": ("reward of held-out questions", "reward of held-out questions")}}


def mark(verdict, what):
    "The mark of a verdict's row, and its target where that is a limit."
    from medllm.marks import mark_of
    row = next((row for row in verdict if what and row["what"].startswith(what)), None)
    return "" if row is None else f"{row['target'].partition(',')[0]}: {mark_of(row)}"


def of_stage(folder):
    "Lines of a training record: figures of held-out rows before and after."
    from medllm.records.record import read_run_json
    state = read_run_json(folder)
    metrics = state.get("metrics") or {}
    for key, (what, row) in BEFORE_AFTER.get(state.get("stage"), {}).items():
        if (after := metrics.get(f"eval_{key}")) is None: continue
        before = metrics.get(f"eval_{key}_before")
        said = f"{after:.3g}"
        if key == "accuracy" and "pair_accuracy" in metrics:
            said = "{:.1%} ({:.1%} to {:.1%})".format(*(metrics[f"pair_accuracy{end}"] for end in ("", "_low", "_high")))
        yield [f"{state['stage']}: {what}", "–" if before is None else f"{before:.3g}", said, mark(state["verdict"], row)]


def of_evaluation(folder):
    "Lines of an evaluation: what base and tuned are compared on; else each set's figure."
    from medllm.evaluate.result import shown
    from medllm.evaluate.targets import TARGETS
    found = json.loads((folder/"evaluation.json").read_text(encoding="utf-8"))
    def words(f):
        unit = f.get("unit", "")
        between = "" if f.get("low") is None else f" ({shown(f['low'], unit)} to {shown(f['high'], unit)})"
        return shown(f["value"], unit) + between
    def limit(task, measure): return mark(found["verdict"], f"{task}: {TARGETS[measure].words}" if measure in TARGETS else "")
    for name, c in found["comparisons"].items():
        task = name.partition(":")[0]
        what = f"{task}, {c['measure'].replace('_', ' ')}, {c['n']} items"
        beside = f"{c['verdict']}, p {c['p_corrected']:.1g}"
        yield [what, words(c["base"]), words(c["tuned"]), "; ".join(filter(None, (beside, limit(task, c["measure"]))))]
        tuned = found["tuned"].get(task, {})
        if "order_accuracy" in tuned:
            base = found["base"][task]["order_accuracy"]
            yield [f"{task}, mean of all orders", words(base), words(tuned["order_accuracy"]), ""]
    if found["comparisons"]: return
    for task, figures in found["tuned"].items():
        yield [f"{task}, {figures['n']} items", "–", words(figures["accuracy"]), limit(task, "accuracy")]


def of_record(folder):
    "The last line of a record: how long it took, and how its own verdict ends."
    from medllm.marks import met_of, tally
    from medllm.records.record import read_run_json
    state = read_run_json(folder)
    rows, count = state["verdict"], tally(state["verdict"])
    missed = "; ".join(": ".join(filter(None, (row.get("stage"), row["what"]))) for row in rows if met_of(row) is False)
    yield [f"**the record**, {state['duration_s']/60:.0f} min", "", "", f"**{count['missed']} of {len(rows)} targets missed**"
        + f"{f' ({missed})' if missed else ''}, {count['cannot tell']} cannot be told"]


def of_stages(folder):
    "Lines of a pipeline's record: held-out rows of each stage."
    from medllm.marks import mark_of
    from medllm.records.record import read_run_json
    rows = [row for row in read_run_json(folder)["verdict"] if row.get("stage")]
    for row in rows:
        if row["what"] in ("validation loss", "held-out pairs in the right order", "reward of held-out questions"):
            yield [f"{row['stage']}: {row['what']}", "", row["measured"], f"{row['target'].partition(',')[0]}: {mark_of(row)}"]


def of(folder):
    "Lines of a record."
    yield from of_evaluation(folder) if (folder/"evaluation.json").exists() else [*of_stage(folder), *of_stages(folder)]
    yield from of_record(folder)


def lines():
    "The READMEs' table: a line for each measured thing, from the records that are kept."
    yield "| evidence | measured | before | after | verdict | record |"
    yield "|---|---|---|---|---|---|"
    for name in NAMES:
        for file in sorted(KEPT.glob(f"_{name}/*/*/run.json")):
            place = file.parent.relative_to(ROOT).as_posix()
            for row in of(file.parent): yield f"| {' | '.join([name, *row])} | [record]({place}) |"


def without_places(folder, places):
    "Let a kept record name no path of this machine; it is sealed anew, and its events say so."
    import hashlib
    from medllm.records.record import Run
    from medllm.records.seal import seal
    def plain(text):
        for place, word in places.items(): text = text.replace(str(place), word)
        return text
    def sha256(text): return hashlib.sha256(text.encode()).hexdigest()
    cells = ["".join(c["source"]) for c in json.loads((folder/"record.ipynb").read_text(encoding="utf-8"))["cells"]]
    moved = {sha256(cell): sha256(plain(cell)) for cell in cells if plain(cell) != cell}     # the cell of parameters
    for file in folder.rglob("*"):
        if file.suffix not in (".json", ".jsonl", ".ipynb", ".md", ".txt", ".log", ".html"): continue
        whole = file.read_text(encoding="utf-8")
        text = plain(whole)
        for old, new in moved.items(): text = text.replace(old, new)
        if text != whole: file.write_text(text, encoding="utf-8")
    Run(folder).event("places", names=sorted(places.values()))
    seal(folder)


def keep(name, records, places):
    "Put records, less their weights, in the place of those that are kept."
    from medllm.records.retention import promote
    goal = KEPT/f"_{name}"
    shutil.rmtree(goal, ignore_errors=True)
    for record in records: without_places(promote(record, goal), places)
    return goal


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("name", nargs="?", choices=list(NAMES), help="which; without it they are listed")
    p.add_argument("--data", type=Path, default=DATA, help="folder of the real data (default %(default)s)")
    p.add_argument("--model", default="smol", help="model, folder or hub id (default smol)")
    p.add_argument("--bits", type=int, help="4 or 8: load it quantised")
    p.add_argument("--runs", type=Path, default=ROOT/"runs/evidence",
        help="folder that the records are made in, weights and all; what is done there is not done again (default %(default)s)")
    p.add_argument("--keep", action="store_true", help="put the records, without weights, into nbs/evidence")
    p.add_argument("--table", action="store_true", help="print the table")
    args = p.parse_args(argv)
    if args.table or not args.name:
        print("\n".join(lines() if args.table else
            [f"{name:10} {'kept ' if (KEPT/f'_{name}').exists() else 'not made'} {f.__doc__}" for name, f in NAMES.items()]))
        return 0
    if not args.data.is_dir(): return p.error(f"the folder of the real data, {args.data}, is not there: name one with --data")
    model = {"model_name_or_path": args.model} | ({"quantization_bit": args.bits} if args.bits else {})
    runs, data = args.runs.resolve(), args.data.resolve()
    place = runs/(args.name if args.model == "smol" else f"{args.name}-{Path(args.model).name}")
    place.mkdir(parents=True, exist_ok=True)
    records = NAMES[args.name](data, place, model)
    for row in (row for record in records for row in of(record)): print(" | ".join(row))
    if args.keep:
        from medllm.machine import cache_home
        words = {runs: "RUNS", data: "DATA", cache_home(): "CACHE", ROOT: "CHECKOUT", Path.home(): "HOME"}
        print(keep(args.name, records, words))
    return 0


if __name__ == "__main__": sys.exit(main())
