"""JSON that lies beside models, answers and records, and that somebody else may have written: read within bounds, or refused."""
import json
from types import SimpleNamespace

import pytest

from medllm.core import UserError

DEEP, TORN = "["*100_000, '{"a": '
WRONG = {"deep": DEEP, "torn": TORN, "list": "[1]", "number": "3", "no UTF-8": "\xff", "twice": '{"name": 1, "name": 1}',
    "infinite": '{"name": "x", "kind": "choice", "facts": {"a": 1e999}, "summary": {}}'}
anything = pytest.mark.parametrize("text", WRONG.values(), ids=WRONG.keys())


def put(file, text):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode("latin1"))
    return file


@anything
def test_a_result_that_no_evaluation_wrote_is_refused(text, tmp_path):
    from medllm.evaluate.result import read_result
    good = json.dumps({"name": "x", "kind": "choice", "facts": {}, "summary": {}})
    for stored, items in ((text, "{}\n"), (good, text + "\n"), (good, '{"id": 1}\n'), (good, '{"id": [1]}\n')):
        put(tmp_path/"x.json", stored)
        put(tmp_path/"x.items.jsonl", items)
        with pytest.raises(UserError, match="evaluate again"): read_result(tmp_path, "x")


@anything
def test_what_an_evaluation_says_of_its_results_is_read_or_refused(text, tmp_path):
    from medllm.export.release import _tables
    for said in (text, '{"verdict": [{"a": 1}]}', '{"base": {"x": 1}}', '{"comparisons": {"x": {}}}', '{"comparisons": [1]}'):
        try: _tables({}, put(tmp_path/"evaluation.json", said))
        except UserError as e: assert "evaluate again" in str(e)


@anything
def test_answers_that_predict_did_not_write_are_refused(text, tmp_path):
    from medllm.evaluate.text import _predicted
    asked = [SimpleNamespace(id="1", example=SimpleNamespace(where="mm.json, line 1"))]
    for line in (text, '{"answer": "a", "where": "x"}', '{"answer": 3}', '{"answer": "a", "where": ["x"], "header": 1}'):
        file = put(tmp_path/"a.jsonl", line + "\n")
        with pytest.raises(UserError, match="predict (the same dataset )?again"): _predicted(str(file), asked)
    with pytest.raises(UserError, match="predict again"): _predicted(str(tmp_path/"none.jsonl"), asked)


@anything
def test_a_report_card_that_was_torn_is_refused(text, tmp_path):
    from medllm.train.report_card import ReportCard
    put(tmp_path/"report_card.json", text)
    with pytest.raises(UserError, match="report_card.json cannot be read"): ReportCard.read(tmp_path)


@anything
def test_a_torn_record_hides_no_finished_stage_of_a_pipeline(text, tmp_path):
    from medllm.models.weights import weights
    from medllm.experiment.pipeline import find_finished
    done = tmp_path/"sft/done"
    put(done/"adapter_model.safetensors", "x")
    put(done/"run.json", json.dumps({"stage": "sft", "status": "completed", "weights": weights(done)}))
    stage = {"name": "sft", "key": "k", "folder": str(done), "status": "completed"}
    put(tmp_path/"pipeline/a/run.json", json.dumps({"stages": [stage]}))
    for n, said in enumerate((text, '{"stages": {"a": 1}}', '{"stages": [1]}', '{"stages": [{"key": "k", "folder": [1]}]}')):
        put(tmp_path/f"pipeline/b{n}/run.json", said)
    assert find_finished("k", tmp_path) == done


@anything
def test_an_output_that_is_there_already_is_of_another_job(text, tmp_path):
    from medllm.predict.predict import _complete
    part = SimpleNamespace(output=put(tmp_path/"a.jsonl", text + "\n"))
    with pytest.raises(UserError, match="is there already"): _complete(part, {"seed": 1})


@anything
def test_unfinished_answers_that_are_none_are_refused(text, tmp_path):
    from medllm.predict.partial_file import PartFile, begun
    first = [json.dumps({"job": job, "rows_at_a_time": rows}) for job, rows in (([1], 1), ({}, "x"), ({}, 0))]
    for line in (text, *first):
        put(tmp_path/"a.jsonl.part", line + "\n")
        with PartFile(tmp_path/"a.jsonl") as part, pytest.raises(UserError, match="begin again with --overwrite"):
            begun(part, {}, 8)


@anything
def test_a_table_of_names_that_is_none_is_refused(text, tmp_path):
    from medllm.medical.names import _read
    with pytest.raises(UserError, match="names.json"): _read(put(tmp_path/"names.json", text))


def test_an_answer_nested_without_end_holds_no_json():
    from medllm.medical.answer_text import json_in
    assert json_in(DEEP) is None and json_in('{"a":'*10**5) is None
    assert json_in('```json\n{"a": 1}\n```') == {"a": 1}
