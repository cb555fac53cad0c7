"""The README's blocks, from top to bottom in one folder, as a reader would type them; slow."""
import json
import re
import shlex
import shutil

import pytest
from commands import ROOT, process

# what a line begins with or holds, and why it is not run here
NOT_RUN = {"git clone": "network", "make ": "installs", "conda ": "installs", "pip install": "installs",
    "transformers serve": "another program", "vllm serve": "another program", "ollama create": "another program",
    "llama-server": "another program", "medllm serve": "runs until it is stopped: tests/serve", "curl": "asks that server",
    "runs resume": "wants a run that was cut: tests/test_kills.py",
    "--endpoint": "asks a server: tests/models/test_endpoint.py", "runs sign": "needs a key: tests/records",
    "tests/bench": "minutes, alone", "harness": "lm_eval"}
YAML = ["sft.yaml", "pipeline.yaml", "grid.yaml", "checks.yaml"]   # what the blocks of this kind are saved as, in order
FILES = {
    "questions.jsonl": "".join(json.dumps({"instruction": f"What helps with {x}?"}) + "\n" for x in ("fever", "cough", "asthma")),
    "diseases.csv": "disease,Symptom,Medications\n" + "".join(f"{d},\"{s.split(' and ')}\",{m}\n" for d, s, m in (
        ("Panic disorder", "palpitations and sudden fear", "sertraline"), ("Asthma", "wheezing and tight chest", "salbutamol"),
        ("Gout", "a red and painful toe", "allopurinol"), ("Migraine", "throbbing headache on one side", "sumatriptan"))),
    "guideline.md": "# Panic disorder\n\nSertraline is a first choice for panic disorder.\n",
    "medqa.jsonl": "".join(json.dumps({"question": f"Which is right? {n}", "options": {"A": "this", "B": "that", "C": "none",
        "D": "both"}, "answer_idx": "ABCD"[n % 4]}) + "\n" for n in range(8)),
    "ori_pqal.json": json.dumps({str(n): {"QUESTION": f"Does it help? {n}", "CONTEXTS": ["It did."], "final_decision": "yes"}
        for n in range(8)})}


def blocks():
    "(language, text) of the README's blocks."
    text = (ROOT/"README.md").read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def lines(text):
    "Commands of a block, without what is said about them."
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words: yield line, words


def commands(folder):
    "What the blocks have a reader do, in order: what is typed, and how it is run; files are written on the way."
    files = iter(YAML)
    for language, text in blocks():
        if language == "yaml": (folder/next(files)).write_text(re.sub(r".*kind: harness.*\n", "", text))
        if language == "python": yield text, ("python", "-c", text)
        for line, words in lines(text) if language == "bash" else ():
            if any(begin in line for begin in NOT_RUN): continue
            yield line, ("bash", "-c", line) if {"|", "&&"} & set(words) else words


@pytest.mark.slow
def test_every_block_runs_from_top_to_bottom(tmp_path):
    for name, text in FILES.items(): (tmp_path/name).write_text(text, encoding="utf-8")
    shutil.copytree(ROOT/"data", tmp_path/"data")
    shutil.copytree(ROOT/"nbs/runs", tmp_path/"nbs/runs")
    assert process("medllm", "tiny", tmp_path/"Llama-2-7b-chat-hf").returncode == 0      # "no weights at hand?"
    wrong, ran = [], 0
    for line, words in commands(tmp_path):
        done, ran = process(*words, cwd=tmp_path, timeout=900), ran + 1
        print(done.returncode, line, flush=True)
        if done.returncode: wrong.append(f"{line}: {done.returncode}\n{(done.stdout + done.stderr)[-600:]}")
    assert not wrong, "\n\n".join(wrong)
    assert ran >= 38
