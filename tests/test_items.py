"""Items of an evaluation: one id each, whatever file they come from; and what a model cannot be shown is refused by name."""
import json

import pytest

from medllm.core import UserError
from medllm.data.registry import find_sources
from medllm.evaluate.forgetting import measure_forgetting
from medllm.evaluate.result import Result, Task, compare, read_result
from medllm.evaluate.rubric import judge_answers, read_rubrics
from medllm.evaluate.safety import read_kinds
from medllm.evaluate.text import measure_text, read_asked
from medllm.models.chat import load_chat_model


@pytest.fixture(scope="module")
def chat(): return load_chat_model()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    "Twenty rows as one line, as a line each, as an object keyed by id, and twice in files of one name."
    folder = tmp_path_factory.mktemp("files")
    rows = [{"question": f"What helps against fever number {n}?", "answer": f"Rest and water, {n} litres.", "rubrics": [
        {"criterion": "names rest", "points": 5}]} for n in range(20)]
    (folder/"line.json").write_text(json.dumps(rows))
    (folder/"lines.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder/"keyed.json").write_text(json.dumps({f"k{n}": r for n, r in enumerate(rows)}))
    (folder/"texts.json").write_text(json.dumps([{"text": r["answer"]*3} for r in rows]))
    (folder/"texts.txt").write_text("\n".join(r["answer"]*3 for r in rows))
    (folder/"alike.jsonl").write_text("".join(json.dumps(r | {"id": "same"}) + "\n" for r in rows))
    for part in ("a", "b"):
        (folder/part).mkdir()
        (folder/part/"x.json").write_text(json.dumps(rows))
    return folder


FILES = ("line.json", "lines.jsonl", "keyed.json", "alike.jsonl", "a/x.json,b/x.json")
ASK = {"columns": "prompt=question response=answer"}


@pytest.mark.parametrize("names", FILES)
def test_every_row_is_an_item_of_its_own(chat, written, names):
    dataset, many = ",".join(str(written/n) for n in names.split(",")), 20*len(names.split(","))
    asked, _, _ = read_asked(chat, Task("x", "text", dataset, options=ASK))
    rubrics, _, _ = read_rubrics(chat, Task("x", "rubric", dataset))
    kinds, _, _ = read_kinds(chat, Task("x", "safety", dataset, options=ASK | {"benign": dataset}))
    for ids in ([a.id for a in asked], [a.id for a, _ in rubrics], [a.id for _, _, a in kinds]):
        assert len(ids) == len(set(ids)) >= many, names


def test_documents_of_one_line_are_as_many_as_of_twenty(chat, written):
    "A model that lost something on 20 documents of a one-line file: found, as in the same documents on lines of their own."
    verdicts = []
    for name in ("texts.json", "texts.txt"):
        task = Task("x", "forgetting", str(written/name), options={"general": str(written/"texts.txt")})
        base = measure_forgetting(chat, task)
        assert len({i["id"] for i in base.items}) == len(base.items) == 40
        worse = Result("x", "forgetting", base.facts, [i | {"nats": i["nats"]*1.1} for i in base.items])
        verdicts.append({k: (c["n"], c["verdict"], c["p"]) for k, c in compare(base, worse)["parts"].items()})
    assert verdicts[0] == verdicts[1] and verdicts[0]["bits_per_byte_medical"][:2] == (20, "worse")


def test_rubrics_of_one_line_are_compared_as_twenty(chat, written):
    rows, _, _ = read_rubrics(chat, Task("x", "rubric", str(written/"line.json")))
    met = lambda yes: lambda prompts, attempt: [json.dumps({"criteria_met": yes})]*len(prompts)
    base, tuned = (Result("x", "rubric", {}, judge_answers(met(yes), rows, ["answer"]*20)) for yes in (False, True))
    found = compare(base, tuned)
    assert (found["n"], found["verdict"]) == (20, "better") and found["p"] < 1e-5


def test_answers_of_predict_to_a_one_line_file_are_found_again(chat, written, tmp_path):
    from medllm.models.sampling import Sampling
    from medllm.use.predict import predict, read_questions
    asked = read_questions(chat, find_sources(str(written/"line.json")), max_samples=None, columns=ASK["columns"])
    predict(asked, tmp_path/"answers.jsonl", Sampling(2, 0.0))
    options = ASK | {"predictions": str(tmp_path/"answers.jsonl")}
    assert len(measure_text(chat, Task("x", "text", str(written/"line.json"), options=options)).items) == 20


def test_a_comparison_that_would_lose_items_stops(tmp_path):
    alike = [{"id": "a.json, line 1", "right": True}]*20
    with pytest.raises(UserError, match="20 items have 1 ids"): Result("x", "choice", {}, alike)
    (tmp_path/"x.items.jsonl").write_text("".join(json.dumps(i) + "\n" for i in alike))             # as an older version wrote it
    (tmp_path/"x.json").write_text(json.dumps({"name": "x", "kind": "choice", "facts": {}, "summary": {}}))
    with pytest.raises(UserError, match="evaluate again"): read_result(tmp_path, "x")


def test_items_that_one_model_lacks_are_told():
    from medllm.evaluate.compare import corrected
    from medllm.evaluate.targets import judged, verdict_rows
    items = [{"id": str(n), "right": True, "labels": ["A", "B"], "gold": ["A"], "pick": ["A"]} for n in range(20)]
    found = compare(Result("x", "choice", {}, items), Result("x", "choice", {}, items[:15]))
    c = judged(corrected({"x": found}), {"": {}})
    rows = {r["what"]: r for r in verdict_rows({"tuned": {}, "comparisons": c})}
    assert rows["x: items compared"]["met"] is False and rows["x: items compared"]["measured"] == "15, 5 left out"


def test_ids_that_look_like_a_number_of_another_are_told_apart():
    from medllm.evaluate.result import told_apart
    assert len(set(told_apart(["a", "a", "a#2", "a", "a#2", "a#3"]))) == 6
    assert told_apart(["x"]*20000)[-1] == "x#20000"
