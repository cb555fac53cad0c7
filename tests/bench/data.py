"""The data gate measured: time and memory of `medllm data check`.

    python tests/bench/data.py check                  MedQuAD, 47,441 rows, from the folder shared/ beside the project
    python tests/bench/data.py million                1,000,000 made-up rows of about 1 KB, in a temporary folder
    python tests/bench/data.py all --out data.json    both, and the figures as JSON

The command runs in a child process. Memory is measured twice: the largest single process by the
operating system's own count, and the sum over the command and its workers, sampled. The script
ends with 1 when a limit is broken: 90 s for MedQuAD, 1.5 GB for a million rows, or when the gate
did not count what was planted in the made-up rows.
"""
import argparse
import gzip
import itertools
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
MEDQUAD = ROOT.parent / "shared" / "data" / "medquad" / "medquad_all.jsonl.gz"
MEDQUAD_COLUMNS = {"prompt": "question", "query": "", "response": "answer", "history": "", "system": ""}


def watch_memory(process, peak):
    """Keep the largest sum of resident memory of a process and its children."""
    while process.poll() is None:
        total = 0
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        except psutil.Error:
            break
        for one in family:
            try:
                total += one.memory_info().rss
            except psutil.Error:
                continue
        peak[0] = max(peak[0], total)
        time.sleep(0.1)


def measured(words):
    """Run a command: exit code, seconds, peak bytes (largest process, all together), its last lines."""
    started, peak = time.perf_counter(), [0]
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)
        watcher = threading.Thread(target=watch_memory, args=(process, peak))
        watcher.start()
        code = process.wait()
        watcher.join()
        out.seek(0)
        tail = out.read().splitlines()[-25:]
    unit = 1 if sys.platform == "darwin" else 1024
    return {"exit_code": code, "seconds": round(time.perf_counter() - started, 1),
            "largest_process_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit,
            "all_processes_bytes": peak[0], "tail": tail}


def check(folder, name, **entry):
    """`medllm data check` on one dataset, its card, and the figures."""
    registry = {name: {"file_name": f"{name}.jsonl", **entry}}
    (folder / "dataset_info.json").write_text(json.dumps(registry))
    figures = measured([sys.executable, "-c", "import sys; from medllm.cli import main; sys.exit(main())", "data",
                        "check", name, "--dataset_dir", str(folder), "--output", str(folder / "card")])
    if figures["exit_code"] not in (0, 1):
        raise SystemExit("\n".join(figures["tail"]))
    card = json.loads((folder / "card" / "card.json").read_text(encoding="utf-8"))
    figures["found"] = {c["name"]: c["rows"] for c in card["checks"] if c["rows"]}
    figures["rows"] = sum(d["read"] for d in card["datasets"])
    return figures


def medquad(folder):
    """The gate on all rows of MedQuAD, near-duplicates included."""
    if not MEDQUAD.exists():
        print("check: skipped, needs data/medquad in the folder shared/ beside the project")
        return None
    with gzip.open(MEDQUAD, "rb") as packed, open(folder / "medquad.jsonl", "wb") as plain:
        shutil.copyfileobj(packed, plain)
    figures = check(folder, "medquad", columns=MEDQUAD_COLUMNS, language="en", licence="CC-BY-4.0")
    figures["met"] = figures["seconds"] <= 90 and figures["rows"] == 47441
    return figures


def write_rows(file, rows, seed=7):
    """Made-up rows of about 1 KB with planted faults; what was planted."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(30000)]
    weights = list(itertools.accumulate(1 / (i + 10) for i in range(len(vocabulary))))
    planted = {"near_duplicates": 0, "duplicate_pairs": 0, "personal_strong": 0, "html": 0}
    last = None
    with open(file, "w", encoding="utf-8") as out:
        for i in range(rows):
            said = rng.choices(vocabulary, cum_weights=weights, k=155)
            row = {"instruction": " ".join(said[:25]) + f" {i}?", "input": "", "output": " ".join(said[25:]) + "."}
            if i % 100 == 99:
                row = {**last, "output": last["output"] + " changed"}
                planted["near_duplicates"] += 1
            elif i % 1000 == 500:
                row = last
                planted["duplicate_pairs"] += 1
            elif i % 5000 == 7:
                row["output"] += f" Write to unit{i}@example.org <br> today."
                planted["personal_strong"] += 1
                planted["html"] += 1
            else:
                last = row
            out.write(json.dumps(row) + "\n")
    return planted


def million(folder, rows):
    """The gate on made-up rows."""
    planted = write_rows(folder / "million.jsonl", rows)
    figures = check(folder, "million", language="en")
    figures["bytes"] = (folder / "million.jsonl").stat().st_size
    figures["planted"] = planted
    figures["met"] = (figures["all_processes_bytes"] <= 1.5e9 and figures["rows"] == rows
                      and all(figures["found"].get(name, 0) == n for name, n in planted.items()))
    return figures


def main():
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("check", "million", "all"))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.part in ("check", "all"):
            figures["check"] = medquad(Path(folder))
        if args.part in ("million", "all"):
            figures["million"] = million(Path(folder), args.rows)
    for part, own in figures.items():
        if own is None:
            continue
        print("\n".join(own.pop("tail")))
        print(f"{part}: {own['rows']:,} rows in {own['seconds']} s, {own['all_processes_bytes'] / 2**20:.0f} MiB in all "
              f"processes, {own['largest_process_bytes'] / 2**20:.0f} MiB in the largest: "
              f"{'met' if own['met'] else 'MISSED'}\n")
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(0 if all(own is None or own["met"] for own in figures.values()) else 1)


if __name__ == "__main__":
    main()
