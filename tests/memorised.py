"""An exam learnt by heart: what an evaluation's record says of it, base against tuned.

    python tests/memorised.py             make the records, print the table
    python tests/memorised.py --write     write memorised_results.json, from which the READMEs' table is made

Sixty of the sample questions are learnt with their letters, by the tiny model; the rest it never sees. A good evaluation
finds the first, does not call chance a gain on the second, and shows that the options were not understood: in another
order nothing of it is left.
"""
import json
import random
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE/"memorised_results.json"


def records(folder, command):
    "The records of the training and of the evaluation; `command` runs words and gives a finished process."
    from medllm.evaluate.items import load_items
    from medllm.evaluate.likelihood import letter_asked
    folder = Path(folder)
    items = json.loads((HERE.parent/"data/mm_mcq.json").read_text(encoding="utf-8"))
    random.Random(0).shuffle(items)
    for name, part in {"learnt": items[:60], "new": items[60:]}.items():
        (folder/f"{name}.json").write_text(json.dumps(part, ensure_ascii=False))
    rows = [{"instruction": letter_asked(i).prompt, "input": "", "output": min(i.gold)}
        for i in load_items(str(folder/"learnt.json")).items]
    (folder/"train.json").write_text(json.dumps(rows, ensure_ascii=False))
    for words in (
            ("sft", "-p", "dataset", folder/"train.json", "-p", "num_train_epochs", 60, "-p", "val_size", 0,
                "-p", "output_dir", folder/"tuned", "-p", "cutoff_len", 1024, "-p", "logging_steps", 50),
            ("evaluate", "-p", "model_name_or_path", folder/"tuned", "-p", "base_model", "tiny",
                "-p", "dataset", f"{folder/'learnt.json'},{folder/'new.json'}", "-p", "output_dir", folder/"report")):
        done = command("medllm", "run", *words)
        assert done.returncode == 0, done.stderr[-2000:]
    return folder/"tuned", folder/"report"


def table(report):
    "Rows of the READMEs' table, from the record's figures."
    found = json.loads((Path(report)/"evaluation.json").read_text())
    interval = lambda f: f"{f['value']:.1%} ({f['low']:.1%} to {f['high']:.1%})"
    rows = []
    for name in ("learnt", "new"):
        base, tuned, both = found["base"][name], found["tuned"][name], found["comparisons"][name]
        rows.append([str(both["n"]), interval(base["accuracy"]), interval(tuned["accuracy"]),
            f"{both['p_corrected']:.2g}", both["verdict"], interval(tuned["order_accuracy"])])
    return rows


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    from commands import run
    with tempfile.TemporaryDirectory() as d: found = table(records(d, run)[1])
    for row in found: print(" | ".join(row))
    if "--write" in sys.argv: RESULTS.write_text(json.dumps(found, indent=1) + "\n")
