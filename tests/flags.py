"""Every flag of a training run, tried in this process: in force, translated, or refused.

    python tests/flags.py                    try them all and compare with flags.md: verdicts must be equal, evidence is shown
    python tests/flags.py --write            write flags.md
    python tests/flags.py --show ddp_        the flags with these letters in their name, and all that each one changes
    python tests/flags.py --show '' --stage dpo   all flags of any stage, in that stage, and what each comes to

A flag is in force when a small run with it differs from the same run without it, in what it did, wrote or came to. What
differs is the evidence, and stands in the table: nothing here says beforehand what that should be. `flag_cases.py` says
what is tried, `flag_watch.py` what is looked at. Where a flag came to nothing, or a case could not be run, the table says so,
the flags are named and the walk ends with 1.
"""
import argparse
import json
import re
import sys
import tempfile
import time
from dataclasses import replace
from difflib import unified_diff
from pathlib import Path

from flag_cases import CASES, CIRCUMSTANCES, STAGES
from flag_watch import Walk

TABLE = Path(__file__).resolve().parent/"flags.md"
IN_FORCE, TRANSLATED, REFUSED, NOT_SHOWN, CRASH = "in force", "translated", "refused", "not shown", "crash"
VERDICTS = (CRASH, NOT_SHOWN, IN_FORCE, TRANSLATED, REFUSED)    # what a flag is, the first that any of its cases came to


# what a case came to

SPOKEN = ("said", "refused", "names of what trains")
PLAIN = ("adapter", "4 bit", "scales of 4 bit", "attention", "what trains", "weights", "layers", "optimiser",
    "model is wrapped in", "DDP in use", "DDP", "processes: backend in use", "processes: waits for", "processes", "loader",
    "computed again", "synchronised", "algorithms", "profile", "compiled", "asked of the machine", "rollouts hold",
    "run in MLflow", "log level", "writes to disk", "speaks", "progress bar", "HF_TOKEN", "memory given back",
    "checkpoints", "validated at steps",
    "batches of validation", "logged at steps", "what is logged", "folder", "files", "rows made", "steps", "best", "epochs")
TOKENS = ("batches", "trained tokens")                          # of sampled answers they follow from the numbers
NUMBERS = ("log: learning_rate", "log: loss", "log: eval_loss", "log:", "weights at the start", "weights at the end")


def order_of(stage):
    "What counts as evidence, the plainest first."
    drawn = stage in ("ppo", "grpo")
    return PLAIN + (NUMBERS + TOKENS if drawn else TOKENS + NUMBERS)


def rank(name, order):
    "Where a difference stands among the evidence."
    at = [n for n, begins in enumerate(order) if name == begins or begins not in ("weights", "log") and name.startswith(begins)]
    return at[0] if at else len(order)


def as_text(value):
    "A value where it is the same on every machine, else nothing."
    if isinstance(value, str | int) and len(str(value)) <= 34: return str(value)
    if isinstance(value, list) and all(isinstance(v, str | int | list) for v in value):
        text = json.dumps(value).replace('"', "")
        if len(text) <= 34 and "." not in text: return text
    return None if value is not None else "none"


def difference(name, before, after):
    "One difference in words."
    listed = isinstance(before, list) and isinstance(after, list) and all(isinstance(v, str) for v in before + after)
    if listed and name not in ("batches", "trained tokens"):
        gone, new = [f"−{v}" for v in before if v not in after], [f"+{v}" for v in after if v not in before]
        return f"{name} {' '.join((new + gone)[:3])}"[:120]
    was, now = as_text(before), as_text(after)
    return f"{name} {was} → {now}" if was and now and (was, now) != ("none", "none") else name


def translation(case):
    "What the flag is called today, or nothing."
    from medllm.train.arguments import translate
    from flag_watch import quiet
    with quiet(): today = translate({case.flag: case.value})
    if today == {case.flag: case.value}: return ""
    return ", ".join(f"`--{name} {value}`" for name, value in today.items()) or "left out"


def differing(case, found):
    "The two plainest differences in words."
    order = order_of(case.stage)
    names = sorted((n for n in found if n not in SPOKEN), key=lambda n: (rank(n, order), n))
    return "; ".join(difference(n, *found[n]) for n in names[:2])


def judged(case, found):
    "A verdict and its evidence."
    (before, after), (quiet, said) = found.get("refused", (None, None)), found.get("said", ([], []))
    told = [line for line in said or [] if line not in (quiet or []) and line.startswith(f"--{case.flag} ")]
    differs, new = differing(case, found), translation(case)
    if after and after.startswith("CRASH"): return CRASH, after
    if after and before: return NOT_SHOWN, f"refused without it too: {before}"
    if after: return (IN_FORCE if case.refuses or "batches" not in found else REFUSED), after
    if new: return TRANSLATED, f"is {new}" + (f": {differs}" if differs else "")
    if told and not differs: return TRANSLATED, told[0]
    if before: return IN_FORCE, f"without it: {before}" if not before.startswith("CRASH") else "the run goes on"
    return (IN_FORCE, differs) if differs else (NOT_SHOWN, "nothing differs")


# the table

def sentence(text, most=160):
    "Text for a cell of the table."
    text = re.sub(r"\d+%|\d\.\d+(?= nat)", "…", re.sub(r"\s+", " ", text)).replace("|", "\\|")
    return text if len(text) <= most else f"{text[:most - 1]}…"


def row_of(case, verdict, evidence):
    "What the table keeps of a case."
    where = [f"--stage {case.stage}"]*(case.stage != "sft") + [f"--{k} {v}" for k, v in case.given.items() if v is not None]
    beside = ", ".join(filter(None, (CIRCUMSTANCES.get(case.around), " ".join(where))))
    value = json.dumps(case.value) if not isinstance(case.value, str) else case.value
    cells = (case.flag, verdict, value, beside, evidence)
    return [sentence(cell.replace("{place}/", "").replace("{out}/", "")) for cell in cells]


def table(rows):
    "The rows of all cases as Markdown, one row a flag: what it is, and all that it came to."
    lines = ["| flag | is | tried | beside | what came of it |", "|---|---|---|---|---|"]
    for flag in sorted({row[0] for row in rows}):
        own = sorted((row for row in rows if row[0] == flag), key=lambda row: VERDICTS.index(row[1]))
        first, verdict = own[0], own[0][1]
        others = {row[1]: row for row in own if row[1] != verdict}
        more = "".join(f"; `{row[2]}`{', ' + row[3] if row[3] else ''}: {row[1]}, {row[4]}" for row in others.values())
        lines.append(f"| `--{flag}` | {verdict} | `{first[2]}` | {first[3]} | {first[4]}{more} |")
    return lines


HEAD = """# What every flag of a training run does

Made by `python tests/flags.py --write`; `tests/train/test_flags.py` makes it again. A small run with each flag is compared with
the same run without it, and what differs is named: files, batches, optimiser, log. *In force*: the run is another one.
*Translated*: the flag goes by another name today, or something else takes its place here, and the run says so. *Refused*: it
would mean nothing here, and one sentence says why. *Not shown*: nothing was seen to differ, or the case could not be tried
on the machine that made the table; the reason stands beside it. Where "beside" says that something was stood in for, that
machine has none of it, and what is shown is that the flag reaches it. It has no GPU, and the packages deepspeed, galore_torch
and wandb are taken for not installed.
"""


def write(rows):
    "The whole file."
    count = {v: sum(f"| {v} |" in line for line in table(rows)) for v in (IN_FORCE, TRANSLATED, REFUSED, NOT_SHOWN, CRASH)}
    said = ", ".join(f"{number} {verdict}" for verdict, number in count.items() if number)
    return f"{HEAD}\n{len(table(rows)) - 2} flags: {said}.\n\n" + "\n".join(table(rows)) + "\n"


ROW = re.compile(rf"\| `--(\w+)` \| ({'|'.join(VERDICTS)}) \| .* \|")


def verdicts(text):
    "Flag -> what it is, as a table in Markdown has it."
    found = [ROW.fullmatch(line) for line in text.splitlines() if line.startswith("| `--")]
    return {match[1]: match[2] for match in found}


def in_stage(cases, stage):
    "The cases of any stage as they would be in one, each once."
    moved = [replace(case, stage=stage) for case in cases if case.stage != stage and not case.around and case.flag != "stage"]
    own = [key for key in ("dataset", "eval_dataset", "reward_funcs", "reward_model") if key in STAGES[stage]]
    return [replace(c, given={k: v for k, v in c.given.items() if k not in own}) for c in moved]


def show(walk, case, all_of_it):
    "Print what a case came to."
    found = walk.apart(case)
    verdict, evidence = judged(case, found)
    print(f"{verdict:15} {case.flag} {case.value!r} [{case.stage} {case.given} {case.around}] {evidence}", flush=True)
    if not all_of_it: return
    for name, (a, b) in found.items(): print(f"    {name}: {str(a)[:150]} -> {str(b)[:150]}")


def came_to(walk, case):
    "The table's row of a case; one that could not be run says why."
    try: return row_of(case, *judged(case, walk.apart(case)))
    except Exception as e:
        said = str(e).strip().splitlines() or [""]
        return row_of(case, CRASH, f"could not be run: {type(e).__name__}: {said[-1]}")


def walked(walk, cases=CASES, say=lambda line: None):
    "The table's rows of some cases."
    rows, begun = [], time.monotonic()
    for n, case in enumerate(cases, 1):
        rows.append(came_to(walk, case))
        say(f"{n}/{len(cases)} {time.monotonic() - begun:.0f} s: --{case.flag} {rows[-1][2]} {rows[-1][1]}")
    return rows


def failing(rows):
    "The flags that some case does not show, or could not be run with."
    return sorted({f"--{row[0]} {row[2]}: {row[1]}, {row[4]}" for row in rows if row[1] in (CRASH, NOT_SHOWN)})


def main():
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--write", action="store_true")
    words.add_argument("--show")
    words.add_argument("--stage", choices=STAGES)
    words = words.parse_args()
    with tempfile.TemporaryDirectory() as d:
        walk = Walk(d)
        if words.show is not None:
            for case in CASES if not words.stage else in_stage(CASES, words.stage):
                if words.show in case.flag: show(walk, case, not words.stage)
            return 0
        rows = walked(walk, say=lambda line: print(line, file=sys.stderr, flush=True))
    text, known = write(rows), TABLE.read_text(encoding="utf-8") if TABLE.exists() else ""
    if words.write: TABLE.write_text(text, encoding="utf-8")
    else: print(*unified_diff(known.splitlines(), text.splitlines(), "flags.md", "now", n=0, lineterm=""), sep="\n")
    print(*failing(rows), sep="\n")
    return 1 if failing(rows) or not words.write and verdicts(text) != verdicts(known) else 0


if __name__ == "__main__": sys.exit(main())
