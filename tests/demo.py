"""What `make demo` ends with, for the READMEs' first screen.

    python tests/demo.py                       make the demo's record, print the table
    python tests/demo.py --record DIR --write  write demo_results.json from a record, from which the READMEs' table is made

The questions are the record's own, those in English: the model knows no other language. Answers are cut at 170 characters.
"""
import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE/"demo_results.json"
LONGEST = 170
ROW = re.compile(r"^\| (?P<question>[^|]*) \| (?P<before>[^|]*) \| (?P<after>[^|]*) \|$", re.M)


def made(folder):
    "A record made by the Makefile's own command."
    line = next(line for line in (HERE.parent/"Makefile").read_text().splitlines() if "--tag demo" in line)
    words = line.replace("$(BIN)/medllm", f"{Path(sys.executable).parent}/medllm").split()
    subprocess.run([*words, "-p", "output_dir", str(folder)], check=True)
    return folder


def short(answer):
    return answer if len(answer) <= LONGEST else answer[:LONGEST].rsplit(" ", 1)[0] + " …"


def results(record):
    "Answers before and after, the held-out loss, the time and the conclusion."
    state = json.loads((record/"run.json").read_text(encoding="utf-8"))
    cells = json.loads((record/"record.ipynb").read_text(encoding="utf-8"))["cells"]
    shown = next(c for c in cells if c["id"] == "samples")["outputs"]
    text = next("".join(o["data"]["text/markdown"]) for o in shown if "text/markdown" in o.get("data", {}))
    rows = [m.groupdict() for m in ROW.finditer(text) if m["question"].isascii() and m["question"] not in ("question", "---")]
    metrics = state["metrics"]
    return {"rows": [{key: short(value) for key, value in row.items()} for row in rows],
        "eval_loss_before": round(metrics["eval_loss_before"], 3), "eval_loss": round(metrics["eval_loss"], 3),
        "train_rows": metrics["train_rows"], "seconds": round(state["duration_s"]), "conclusion": state["conclusion"]}


def lines(found):
    "The READMEs' lines: the table, and the sentence of figures."
    table = [f"| {row['question']} | {row['before']} | {row['after']} |" for row in found["rows"]]
    return [*table, f"{found['eval_loss_before']:.2f} → {found['eval_loss']:.2f}"]


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--record", type=Path, help="folder of a record; without it one is made, which takes 3 to 5 minutes")
    p.add_argument("--write", action="store_true", help="write demo_results.json")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as d: found = results(args.record or made(Path(d)/"demo"))
    print("\n".join(lines(found)), found["conclusion"], f"{found['seconds']} s", sep="\n")
    if args.write: RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
