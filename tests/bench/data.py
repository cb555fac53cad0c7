"""The way of the data measured: reading, tokenising, the gate, and a million rows.

    python tests/bench/data.py read                   strict reading of real rows, MB/s of one core
    python tests/bench/data.py tokenise               rendering and tokenising beside the bare tokenizer, in turn
    python tests/bench/data.py check                  `medllm data check` on MedQuAD, 47,441 rows
    python tests/bench/data.py million                1,000,000 made-up rows of about 1 KB: checked, and tokenised
    python tests/bench/data.py all --out data.json    everything, and the figures as JSON

Real rows come from the folder shared/ beside the project. Commands run in a child process; memory is measured twice:
the largest single process by the operating system's own count, and the sum over the command and its workers, sampled.
The script ends with 1 when a limit is broken: 40 MB/s, 85% of the bare tokenizer, 90 s for MedQuAD, 1.5 GB for a
million rows, or when the gate did not count what was planted in the made-up rows.
"""
import argparse
import gzip
import itertools
import json
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
MEDQUAD = SHARED / "medquad" / "medquad_all.jsonl.gz"
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


def read(folder):
    """MB of text read strictly in a second of one core: JSON Lines, an array, and GB18030."""
    source = SHARED / "chatdoctor" / "chatdoctor5k.json"
    if not source.exists():
        print("read: skipped, needs data/chatdoctor in the folder shared/ beside the project")
        return None
    from medllm.data.readers import read_file
    rows = json.loads(source.read_text(encoding="utf-8")) * 12
    chinese = (SHARED / "medicalgpt" / "medical_sft_1K_format.jsonl").read_bytes() * 30
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    (folder / "rows.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    (folder / "chinese.jsonl").write_bytes(chinese)
    (folder / "gb18030.jsonl").write_bytes(chinese.decode().encode("gb18030"))
    speeds, count = {}, 0
    for name in ("rows.jsonl", "rows.json", "chinese.jsonl", "gb18030.jsonl"):
        file, seconds = folder / name, []
        for _ in range(3):
            began = time.process_time()
            count = sum(1 for _ in read_file(file))
            seconds.append(time.process_time() - began)
        speeds[name] = round(file.stat().st_size / 1e6 / statistics.median(seconds), 1)
    return {"rows": count, "mb_per_second": speeds, "met": min(speeds.values()) >= 40,
            "tail": [f"{name:14} {speed:6.1f} MB/s" for name, speed in speeds.items()]}


def tokenise(folder):
    """Examples to ids and labels, against the bare tokenizer on the same texts; medians, in turn."""
    source = SHARED / "chatdoctor" / "chatdoctor5k.json"
    if not source.exists():
        print("tokenise: skipped, needs data/chatdoctor in the folder shared/ beside the project")
        return None
    from medllm.data.accounts import load_examples
    from medllm.data.registry import Source
    from medllm.data.tokens import Renderer
    from medllm.models.tiny import tiny_tokenizer
    tokenizer = tiny_tokenizer()
    renderer = Renderer(tokenizer, "auto")
    examples, _ = load_examples(Source("rows", files=(source,)))
    texts = [tokenizer.apply_chat_template([{"role": t.role, "content": t.text} for t in e.turns], tokenize=False)
             for e in examples]
    ways = {
        "medllm": lambda: [renderer.encode(examples[i:i + 1000]) for i in range(0, len(examples), 1000)],
        "bare": lambda: [[e.ids for e in tokenizer.backend_tokenizer.encode_batch_fast(
            texts[i:i + 1000], add_special_tokens=False)] for i in range(0, len(texts), 1000)],
        "transformers": lambda: [tokenizer(texts[i:i + 1000], add_special_tokens=False)["input_ids"]
                                 for i in range(0, len(texts), 1000)]}
    seconds = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(7):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    middle = {name: round(statistics.median(own), 4) for name, own in seconds.items()}
    share = {name: round(middle[name] / middle["medllm"], 3) for name in ("bare", "transformers")}
    return {"rows": len(examples), "seconds": middle, "all_seconds": seconds, "speed_of": share,
            "met": share["bare"] >= 0.85, "tail": [
                f"medllm {middle['medllm']:.3f} s; {share['bare']:.1%} of the speed of encode_batch_fast, "
                f"{share['transformers']:.1%} of the tokenizer called as transformers does"]}


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
    figures = measured([sys.executable, "-c", "import sys; from medllm.cli.main import main; sys.exit(main())", "data",
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


TOKENISE = """
import sys
from medllm.data.accounts import OnBad
from medllm.data.cache import Recipe, cached_rows
from medllm.audit.gate import watched
from medllm.data.registry import find_sources
from medllm.data.tokens import Renderer
from medllm.models.tiny import tiny_tokenizer
source, = find_sources("million", sys.argv[1])
rows, account = cached_rows(source, Renderer(tiny_tokenizer(), "auto"), Recipe(), sys.argv[1] + "/cache", watch=watched)
print(account, rows, sep="\\n")
assert account.read == len(rows) == int(sys.argv[2])
"""


def million_tokenised(folder, rows):
    """The same rows, tokenised into the cache."""
    figures = measured([sys.executable, "-c", TOKENISE, str(folder), str(rows)])
    if figures["exit_code"]:
        raise SystemExit("\n".join(figures["tail"]))
    return figures | {"rows": rows, "met": figures["all_processes_bytes"] <= 1.5e9}


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
    parser.add_argument("part", choices=("read", "tokenise", "check", "million", "all"))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, part in (("read", read), ("tokenise", tokenise), ("check", medquad)):
            if args.part in (name, "all"):
                figures[name] = part(Path(folder))
        if args.part in ("million", "all"):
            figures["million"] = million(Path(folder), args.rows)
            figures["million_tokenised"] = million_tokenised(Path(folder), args.rows)
    figures = {part: own for part, own in figures.items() if own is not None}
    for part, own in figures.items():
        print("\n".join(own.pop("tail")))
        if "seconds" in own and "largest_process_bytes" in own:
            print(f"{own['rows']:,} rows in {own['seconds']} s, {own['all_processes_bytes'] / 2**20:.0f} MiB in all "
                  f"processes, {own['largest_process_bytes'] / 2**20:.0f} MiB in the largest")
        print(f"{part}: {'met' if own['met'] else 'MISSED'}\n")
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(0 if all(own["met"] for own in figures.values()) else 1)


if __name__ == "__main__":
    main()
