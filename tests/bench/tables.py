"""The READMEs' tables of speed, from what was measured: `python tests/bench/tables.py` prints them."""
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = {"medllm": "medllm", "trl": "TRL", "trl-plain": "TRL (plain)", "llamafactory": "LLaMA-Factory",
         "swift": "ms-swift"}
EXAMS = {"medqa_4options": "MedQA", "pubmedqa": "PubMedQA", "mmlu": "MMLU, MedMCQA", "cmmlu": "CMMLU, CMExam, CMB"}


def measured(name):
    """What a benchmark wrote with `--out`."""
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def training(name):
    """Rows of a table of trainings: medians of speed and of peak memory."""
    for tool, spread in measured(name)["spreads"].items():
        memory = spread["peak_rss_bytes"][1] / 2**20
        yield f"| {NAMES[tool]} | {spread['tokens_per_second'][1]:.0f} | {memory:.0f} |"


def likelihood(name="likelihood_results.json"):
    """Rows of the table beside lm-evaluation-harness: same picks, questions a second, their ratio and that of each round."""
    whole = measured(name)
    for exam, found in whole["exams"].items():
        speed, same = found["items_per_second"], found["items"] - found["picks_that_differ"]
        each = sorted(one["lm_eval"][exam] / one["medllm"][exam] for one in whole["rounds"])
        yield (f"| {EXAMS[exam]} | {same} of {found['items']} | {speed['medllm']:.1f} | {speed['lm_eval']:.1f} | "
               f"{found['ratio']:.1f} ({each[0]:.1f} to {each[-1]:.1f}) |")


TABLES = {"sft_results.json": training, "sft_smol_results.json": training, "likelihood_results.json": likelihood}


def rows():
    """Rows of every table, in the order of `TABLES`."""
    for name, table in TABLES.items():
        yield from table(name)


if __name__ == "__main__":
    print("\n".join(rows()))
