"""lm-evaluation-harness on local MedQA rows: its own text and model class. Arguments: model folder, rows, result."""
import json
import sys

from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks.medqa.preprocess_medqa import doc_to_target, doc_to_text

model, rows, out, *template = sys.argv[1:]

# the configuration of medqa_4options, with the rows from a file instead of the hub
task = ConfigurableTask(config={
    "task": "medqa_4options", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": rows}}, "test_split": "test",
    "output_type": "multiple_choice", "doc_to_text": doc_to_text, "doc_to_target": doc_to_target,
    "doc_to_choice": ["A", "B", "C", "D"],
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]})

found = simple_evaluate(
    model=HFLM(pretrained=model, batch_size=4, device="cpu", dtype="float32"), tasks=[task], log_samples=True, bootstrap_iters=0,
    apply_chat_template=bool(template))
samples = sorted(found["samples"]["medqa_4options"], key=lambda s: s["doc_id"])
with open(out, "w", encoding="utf-8") as f:
    json.dump({"prompts": [s["arguments"][0][0] for s in samples],
        "scores": [[float(r[0]) for r in s["filtered_resps"]] for s in samples],
        "acc": found["results"]["medqa_4options"]["acc,none"]}, f)
