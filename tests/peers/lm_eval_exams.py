"""lm-evaluation-harness on exams from local files: its own texts, its own model class. Argument: TASK.json.

Four of its tasks, medqa_4options, pubmedqa, mmlu and cmmlu, with rows from a file in the hub's columns. The task names
model, dtype, batch, whether the chat template is put on (chat), exams (name: file of rows) and out, where the result goes:
of each exam the prompts, what may follow, the log-probabilities, the accuracy, and seconds from rows to figures.
"""
import json
import resource
import sys
import time
from pathlib import Path

import torch
from lm_eval import tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.medqa.preprocess_medqa import doc_to_target, doc_to_text
from lm_eval.tasks.pubmedqa.preprocess_pubmedqa import doc_to_text as pubmedqa_text

MMLU = "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"
CMMLU = "{{Question.strip()}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\n答案："
LETTERS = ["A", "B", "C", "D"]
EXAMS = { # what the harness' own files of these tasks say
    "medqa_4options": {"doc_to_text": doc_to_text, "doc_to_target": doc_to_target, "doc_to_choice": LETTERS},
    "pubmedqa": {"doc_to_text": pubmedqa_text, "doc_to_target": "final_decision", "doc_to_choice": ["yes", "no", "maybe"]},
    "mmlu": {"doc_to_text": MMLU, "doc_to_target": "answer", "doc_to_choice": LETTERS,
        "description": "The following are multiple choice questions (with answers) about professional medicine.\n\n"},
    "cmmlu": {"doc_to_text": CMMLU, "doc_to_target": "{{['A', 'B', 'C', 'D'].index(Answer)}}", "doc_to_choice": LETTERS,
        "description": "以下是关于专业医学的单项选择题，请直接给出正确答案的选项。\n\n"}}


def check_texts():
    "Stop where the harness' files say another text than the two written out above."
    for file, text in (("mmlu/default/_default_template_yaml", MMLU), ("cmmlu/_default_template_yaml", CMMLU)):
        told = (Path(tasks.__file__).parent/file).read_text(encoding="utf-8")
        if json.dumps(text, ensure_ascii=False) not in told: raise SystemExit(f"{file} has another text")


def task_of(name, rows):
    return ConfigurableTask(config={"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": rows}},
        "test_split": "test", "output_type": "multiple_choice", **EXAMS[name], "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True}]})


def main():
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    check_texts()
    model = HFLM(pretrained=task["model"], batch_size=task["batch"], device="cpu", dtype=task["dtype"])
    if str(model.model.dtype) != f"torch.{task['dtype']}": raise SystemExit(f"the model is in {model.model.dtype}")
    result = {}
    for name, rows in task["exams"].items():
        exam = task_of(name, rows)
        started = time.perf_counter()
        found = simple_evaluate(model=model, tasks=[exam], log_samples=True, bootstrap_iters=0,
            apply_chat_template=bool(task.get("chat")))
        seconds = time.perf_counter() - started
        samples = sorted(found["samples"][name], key=lambda s: s["doc_id"])
        asked = [s["arguments"] if isinstance(s["arguments"], list) else list(s["arguments"].values()) for s in samples]
        result[name] = {"seconds": seconds, "acc": found["results"][name]["acc,none"],
            "prompts": [list(a[0].values())[0] if isinstance(a[0], dict) else a[0][0] for a in asked],
            "continuations": [[list(x.values())[1] if isinstance(x, dict) else x[1] for x in a] for a in asked],
            "scores": [[float(r[0]) for r in s["filtered_resps"]] for s in samples]}
    Path(task["out"]).write_text(json.dumps({"exams": result, "threads": torch.get_num_threads(),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024}), encoding="utf-8")


if __name__ == "__main__": main()
