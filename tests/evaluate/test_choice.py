"""Multiple choice: real exam files, hand-computed figures, order and batch, lm-evaluation-harness, base against tuned."""
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from memorised import records, table
from commands import ROOT, run

from medllm.cli.main import main
from medllm.core import UserError
from medllm.evaluate.choice import Asking, choice_summary, measure_choice, read_choice_items, score_lines
from medllm.evaluate.generated import read_answer
from medllm.evaluate.items import MCQItem, load_items, read_items, stratified
from medllm.evaluate.order import order_figures
from medllm.evaluate.result import Task, compare_results, read_result, summary, write_result
from medllm.evaluate.runs import EvaluateRun
from medllm.evaluate.likelihood import (
    LikelihoodRequest, ModelScores, TokenisedRequest, Scored, letter_asked, option_scores, picked, text_asked)
from medllm.evaluate.statistics import holm, mean, share
from medllm.models.chat import Completion, load_chat_model
from medllm.parameters import parameters_cell

MEDQA, MEDQA2 = "data/mirage_mcq/medqa_us_4opt_test.jsonl", "data/medxpert_mcq/medqa_input.jsonl"
MEDXPERT, PUBMEDQA = "data/medxpert_mcq/medxpertqa_sampled_text_input.jsonl", "data/pubmedqa/ori_pqal.json"


def majority(items): return Counter("".join(sorted(i.gold)) for i in items).most_common(1)[0][1]/len(items)


# --- items of real files ---------------------------------------------------------------------------------------------


def test_medqa(shared):
    "1,273 questions, A right in 27.7%; two files of the same questions, written in two ways, give the same items."
    first, second = load_items(str(shared(MEDQA))), load_items(str(shared(MEDQA2)))
    assert (len(first.items), first.skipped) == (1273, {}) and round(majority(first.items), 3) == 0.277
    for a, b in zip(first.items, second.items, strict=True):
        assert a.gold == b.gold and [t.strip() for _, t in a.options] == [t.strip() for _, t in b.options]


def test_pubmedqa_is_its_official_test(shared):
    "The official ids, yes in 55.2%; a sample of 100 keeps the proportions where the first hundred are all yes."
    loaded = load_items(str(shared(PUBMEDQA)))
    truth = json.loads(shared("data/pubmedqa/test_ground_truth.json").read_text())
    assert {i.id: next(iter(i.gold)) for i in loaded.items} == truth
    assert loaded.skipped == {"not in the official test": 500} and round(majority(loaded.items), 3) == 0.552
    assert list(truth.values())[:100] == ["yes"]*100
    assert Counter(next(iter(i.gold)) for i in stratified(loaded.items, 100)) == {"yes": 55, "no": 34, "maybe": 11}
    assert all(i.context and not i.lettered for i in loaded.items)


def test_medxpertqa(shared):
    "244 questions with ten options, which are taken out of the question's own text."
    loaded = load_items(str(shared(MEDXPERT)))
    assert len(loaded.items) == 244 and {len(i.options) for i in loaded.items} == {10}
    assert not any("Answer Choices" in i.question for i in loaded.items)


def test_apollo(shared):
    "1,114 questions in six languages, options in one text."
    loaded = load_items(str(shared("data/apollo_multi/dev.json")))
    assert (len(loaded.items), loaded.skipped) == (1114, {})
    assert not [i.id for i in loaded.items if not i.lettered and "yes" not in i.labels]


def test_cmb_keys_alone_are_no_items(shared):
    with pytest.raises(UserError, match="no multiple-choice format"):
        load_items(str(shared("data/cmb_answers/CMB-test-choice-answer.json")))


# --- formats ---------------------------------------------------------------------------------------------------------


def test_medmcqa_counts_from_one_in_the_raw_file_and_from_zero_on_the_hub():
    row = dict(question="?", opa="w", opb="x", opc="y", opd="z", subject_name="Anatomy")
    raw, hub = [row | {"cop": n} for n in (1, 2, 3, 4)], [row | {"cop": n} for n in (0, 1, 2, 3)]
    golds = lambda rows, **how: ["".join(i.gold) for i in read_items(rows, **how)[0]]
    assert golds(raw) == golds(hub) == ["A", "B", "C", "D"]
    assert golds(raw[:3], first_answer=1) == ["A", "B", "C"]
    assert read_items(hub + [row | {"cop": -1}])[1] == {"no answer": 1}
    with pytest.raises(UserError, match="first_answer"): golds(raw[:3])


@pytest.mark.parametrize("row, gold", [
    ({"question": "?", "options": [{"key": "A", "value": "x"}, {"key": "B", "value": "y"}], "answer_idx": "B"}, "B"),
    ({"id": "1", "sent1": "?", "sent2": "", "ending0": "x", "ending1": "y", "ending2": "z", "ending3": "w", "label": 0}, "A"),
    ({"question": "?", "subject": "anatomy", "choices": ["x", "y", "z", "w"], "answer": 3}, "D"),
    ({"Question": "？", "A": "甲", "B": "乙", "C": "丙", "D": "丁", "Answer": "C"}, "C"),
    ({"id": 0, "question": "？", "A": "甲", "B": "乙", "C": "丙", "D": "丁", "answer": "A", "explanation": ""}, "A"),
    ({"question": "？", "option": {"A": "甲", "B": "乙", "C": "丙", "D": "", "E": None}, "answer": "AC"}, "AC"),
    ({"Question": "？", "Options": "A 甲\nB 乙\nC 丙", "Answer": "B", "Explanation": ""}, "B"),
    ({"question": "?", "op1": "x", "op2": "y", "op3": "z", "op4": "w", "cop": 4}, "D"),
    ({"question": "?", "options": {"A": "x", "B": "y"}, "label": "B", "id": "Text-1"}, "B"),
    ({"question": "?", "options": ["x", "y"], "answer": "y"}, "B"),
], ids="MedQA_of_bigbio MedQA_on_the_hub MMLU CMMLU C-Eval CMB CMExam CareQA MedXpertQA_on_the_hub plain".split())
def test_formats(row, gold):
    (item,), skipped = read_items([row])
    assert ("".join(sorted(item.gold)), skipped) == (gold, {})
    assert all(item.texts[label] for label in gold)


# --- figures against arithmetic on paper -----------------------------------------------------------------------------


def fake(table):
    "A model that is a table: question -> probabilities of its options."
    return lambda asked: [[Scored(math.log(p), 1) for p in next(v for k, v in table.items() if k in a.prompt)] for a in asked]


def exam(*golds, options=4):
    letters = "ABCDEFGHIJ"[:options]
    return [MCQItem(str(n), f"Item {n}.", tuple((x, f"text {x}") for x in letters), frozenset(g)) for n, g in enumerate(golds)]


def test_every_figure_by_hand():
    table = {"Item 0.": (.7, .1, .1, .1), "Item 1.": (.4, .3, .2, .1), "Item 2.": (.25, .25, .25, .25),
        "Item 3.": (.1, .1, .2, .6), "Item 4.": (.4, .4, .1, .1), "Item 5.": (.4, .35, .2, .05)}
    s = choice_summary(score_lines(exam("A", "B", "A", "D", "AB", "AC"), fake(table)), {})
    assert (s["n"], s["picks"]) == (6, {"A": 3, "D": 1})
    assert s["accuracy"]["value"] == 3/4                                     # items 0, 2 (a tie goes to the first) and 3
    low, high = (0.75 + 1.9208/4 + sign*1.96*math.sqrt(0.75*0.25/4 + 3.8416/64) for sign in (-1, 1))
    assert np.allclose([s["accuracy"]["low"], s["accuracy"]["high"]], [low/(1 + 3.8416/4), high/(1 + 3.8416/4)], atol=1e-4)
    assert (s["majority_baseline"]["value"], s["majority_baseline"]["method"], s["chance"]["value"]) == (0.5, "always A", 0.25)
    assert np.isclose(s["brier"]["value"], ((.09 + .03) + (.16 + .49 + .04 + .01) + (.5625 + .1875) + (.16 + .01 + .01 + .04))/4)
    assert np.isclose(s["log_loss"]["value"], -(math.log(.7) + math.log(.3) + math.log(.25) + math.log(.6))/4)
    assert np.isclose(s["ece"]["value"], (.3 + .4 + .75 + .4)/4)              # each confidence has a bin of its own
    assert s["several_answers_exact"]["value"] == 1/2                         # AB is read, AC is taken for AB
    assert s["several_answers_f1"]["value"] == (1 + 1/2)/2


def test_words_have_a_macro_f1():
    items = [MCQItem(str(n), f"Item {n}.", tuple((w, w) for w in ("yes", "no", "maybe")), frozenset([g]))
        for n, g in enumerate(("yes", "yes", "no", "maybe"))]
    table = {"Item 0.": (.8, .1, .1), "Item 1.": (.2, .7, .1), "Item 2.": (.1, .8, .1), "Item 3.": (.5, .3, .2)}
    s = choice_summary(score_lines(items, fake(table)), {})
    # yes: 1 right of 2 picked and 2 there, F1 1/2; no: 1 of 2 picked and 1 there, F1 2/3; maybe: never, 0
    assert np.isclose(s["macro_f1"]["value"], (1/2 + 2/3 + 0)/3) and s["accuracy"]["value"] == 1/2


def test_option_text_by_sum_character_byte_and_token():
    item = MCQItem("1", "？", (("A", "胰岛素"), ("B", "insulin")), frozenset("A"))   # 3 characters in 9 bytes, 7 in 7
    found = [Scored(-6.0, 6), Scored(-6.6, 2)]
    scores = {norm: option_scores(text_asked(item), found, norm) for norm in ("sum", "char", "byte", "token")}
    assert scores == {"sum": [-6, -6.6], "char": [-2, -6.6/7], "byte": [-6/9, -6.6/7], "token": [-1, -3.3]}
    line, = score_lines([item], lambda asked: [found], Asking("text", norm="char"))
    assert line["norms"] == {"sum": "A", "char": "B", "byte": "A", "token": "A"} and not line["right"]


def test_written_answers_are_never_guessed():
    answers = ["The answer is A.", "I cannot say.", "A or B", "**B**", ""]
    lines = read_choice_items(exam(*"AAAAA"), [Completion(text, [1], True) for text in answers])
    s = choice_summary(lines, {})
    assert (s["accuracy"]["value"], s["unread"]["value"]) == (0.2, 0.6) and s["picks"] == {"(unread)": 3, "A": 1, "B": 1}
    assert not any("answer" in line for line in lines)


def test_orders_tell_a_reader_from_a_place():
    place = lambda picks: [{"place": p, "pick": o, "gold_place": g} for p, o, g in picks]
    s = order_figures([("A", place([("A", "A", "A"), ("A", "B", "B")])), ("B", place([("B", "B", "B"), ("A", "B", "A")]))])
    assert [s[k]["value"] for k in ("order_accuracy", "all_orders_right", "flipped", "vote_accuracy")] == [3/4, 1/2, 1/2, 1]
    assert s["by_letter"]["A"]["recall"]["value"] == 1 and s["by_letter"]["B"]["recall"]["value"] == 1/2
    assert s["recall_deviation"]["value"] == 0.25 and [f["value"] for f in s["by_order"]] == [1, 1/2]


def test_intervals_hold_what_they_promise():
    "Of 400 samples of a known share, about 95% of the intervals hold it; grouped data needs the grouped bootstrap."
    rng = np.random.default_rng(1)
    wilson = np.mean([(f := share(rng.random(60) < 0.3))["low"] <= 0.3 <= f["high"] for _ in range(400)])
    assert 0.92 <= wilson <= 0.98
    groups = [str(i//10) for i in range(300)]
    held = {True: 0, False: 0}
    for _ in range(60):
        right = np.repeat(rng.random(30) < 0.5, 10)                            # ten items of a group are right or wrong together
        for grouped in held:
            f = mean(right, groups if grouped else None)
            held[grouped] += f["low"] <= 0.5 <= f["high"]
    assert held[True] >= 52 and held[False] <= 36


def test_holm():
    assert np.allclose(holm([0.01, 0.02, 0.03, 0.005]), [0.03, 0.04, 0.04, 0.02])
    assert np.allclose(holm([0.2, 0.9]), [0.4, 0.9])


# --- a real model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout, ask", [("chat", letter_asked), ("plain", text_asked)])
def test_batch_padding_and_order_cannot_change_a_pick(chat, layout, ask):
    items = load_items("mm_mcq").items
    asked = [ask(i) for i in items] + [LikelihoodRequest("Which?", ("one", "one", "two"))]
    picks = lambda found: [[picked(option_scores(a, f, norm)) for norm in ("sum", "char", "byte", "token")] for a, f in found]
    once = picks(zip(asked, ModelScores(chat, layout, 1)(asked)))
    for batch in (3, 16):
        assert picks(zip(asked, ModelScores(chat, layout, batch)(asked))) == once
    order = random.Random(0).sample(range(len(asked)), len(asked))
    again = picks((asked[i], f) for i, f in zip(order, ModelScores(chat, layout, 8)([asked[i] for i in order])))
    assert [again[order.index(i)] for i in range(len(asked))] == once


def test_close_calls_are_what_keeps_picks_still(chat, monkeypatch):
    "Without asking close calls again, noise of the size of rounding changes picks; with it, none."
    import medllm.evaluate.likelihood as scoring
    rng, plain = np.random.default_rng(0), scoring.batch_logprobs
    def noisy(model, rows):
        found = plain(model, rows)
        return [[x + rng.normal(0, 1e-4) if len(rows) > 1 else x for x in row] for row in found]
    asked = [LikelihoodRequest(f"Which, {n}?", ("one", "one")) for n in range(40)]            # both the same: any noise decides
    monkeypatch.setattr(scoring, "batch_logprobs", noisy)
    picks = lambda model: [picked([s.logprob for s in f]) for f in model(asked)]
    careful, careless = ModelScores(chat, batch=8), ModelScores(chat, batch=8)
    monkeypatch.setattr(careless, "_close", lambda *row: False)
    assert picks(careful) == [0]*40 and careful.again == 40
    assert 0 < sum(picks(careless)) < 40


def test_the_summary_follows_from_the_lines(chat, tmp_path):
    result = measure_choice(chat, Task("exam", dataset="mm_mcq", limit=20, options={"orders": "cyclic"}))
    stored = write_result(result, tmp_path)
    assert summary(read_result(tmp_path, "exam")) == stored
    assert "question" not in (tmp_path/"exam.items.jsonl").read_text()
    file = tmp_path/"exam.json"
    file.write_text(file.read_text().replace('"n": 20', '"n": 21'))
    with pytest.raises(UserError, match="n is not what exam.items.jsonl gives"): read_result(tmp_path, "exam")


@pytest.mark.slow
def test_real_sets_on_the_tiny_model(shared, tmp_path):
    "Acceptance: n, baselines and intervals of MedQA, PubMedQA and MedXpertQA, through the command."
    done = run("medllm", "evaluate", shared(MEDQA), shared(PUBMEDQA), shared(MEDXPERT), "-p", "orders", "own",
        "--output", tmp_path/"out")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path/"out/evaluation.json").read_text())["tuned"]
    told = {name: (s["n"], round(100*s["majority_baseline"]["value"], 1)) for name, s in found.items()}
    assert told == {"medqa_us_4opt_test": (1273, 27.7), "ori_pqal": (500, 55.2), "medxpertqa_sampled_text_input": (244, 12.7)}
    assert all(s["accuracy"]["low"] < s["accuracy"]["value"] < s["accuracy"]["high"] for s in found.values())


# --- lm-evaluation-harness -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    "Runs exams of the harness in a process of its own, or skips with the reason."
    place = Path(os.environ.get("MEDLLM_LM_EVAL", ROOT/".lm_eval"))
    if not (place/"lm_eval").is_dir(): pytest.skip("lm-evaluation-harness is not here: make lm_eval")
    def call(exams, model="tiny", template=False):
        folder = tmp_path_factory.mktemp("harness")
        assert run("medllm", model, folder/"model").returncode == 0
        for name, rows in exams.items():
            (folder/f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder/"task.json").write_text(json.dumps({"model": str(folder/"model"), "dtype": "float32", "batch": 4,
            "chat": template, "exams": {name: str(folder/f"{name}.jsonl") for name in exams}, "out": str(folder/"out.json")}))
        done = subprocess.run([sys.executable, ROOT/"tests/peers/lm_eval_exams.py", folder/"task.json"], capture_output=True,
            text=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(place), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)})
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads((folder/"out.json").read_text())["exams"]
    return call


def medqa_rows(items):
    return [{"sent1": i.question, "label": i.labels.index(min(i.gold))} | {f"ending{n}": text for n, (_, text) in
        enumerate(i.options)} for i in items]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "chat"])
def test_the_harness_picks_the_same(shared, harness, chat, layout):
    "200 MedQA items: the same prompts, log-probabilities to rounding, identical picks, the same accuracy."
    items = load_items(str(shared(MEDQA)), limit=200).items
    theirs = harness({"medqa_4options": medqa_rows(items)}, template=layout == "chat")["medqa_4options"]
    asked = [letter_asked(i) for i in items]
    ours = [[s.logprob for s in found] for found in ModelScores(chat, layout)(asked)]
    if layout == "plain": assert theirs["prompts"] == [a.prompt for a in asked]
    else: assert all(a.prompt in p for a, p in zip(asked, theirs["prompts"]))
    assert [picked(x) for x in ours] == [picked(x) for x in theirs["scores"]]
    ours, scores = np.array(ours), np.array(theirs["scores"])
    if layout == "chat": ours, scores = ours - ours[:, :1], scores - scores[:, :1]   # it scores a line break too
    assert np.abs(ours - scores).max() < 1e-3
    right = np.mean([i.labels[picked(x)] in i.gold for i, x in zip(items, ours)])
    assert np.isclose(right, theirs["acc"])


HARNESS_TASK = """
task: own_exam
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\n{{% for k, v in options.items() %}}{{{{k}}}}. {{{{v}}}}\\n{{% endfor %}}Answer:"
doc_to_choice: [A, B, C, D]
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.slow
def test_a_task_of_the_harness_beside_our_own(tmp_path):
    "The same twenty questions as our task in the layout plain, and as a task file of the harness: as many right."
    place = Path(os.environ.get("MEDLLM_LM_EVAL", ROOT/".lm_eval"))
    if not (place/"lm_eval").is_dir(): pytest.skip("lm-evaluation-harness is not here: make lm_eval")
    rows = [r for r in json.loads((ROOT/"data/mm_mcq.json").read_text(encoding="utf-8"))
        if len(r["options"]) == 4 and r["language"] == "en"][:20]
    (tmp_path/"own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path/"tasks").mkdir()
    (tmp_path/"tasks/own_exam.yaml").write_text(HARNESS_TASK.format(file=tmp_path/"own.jsonl"))
    (tmp_path/"run.yaml").write_text(json.dumps({"dataset": str(tmp_path/"own.jsonl"), "layout": "plain", "orders": "own",
        "base_model": "tiny", "tasks": {"own_exam": {"kind": "harness", "include_path": str(tmp_path/"tasks")}}}))
    done = run("medllm", "evaluate", "-f", tmp_path/"run.yaml", "--output", tmp_path/"out", HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path/"hub"), PYTHONPATH=os.pathsep.join([str(ROOT), str(place)]))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path/"out/evaluation.json").read_text())
    ours, theirs = found["tuned"]["own"]["accuracy"], found["tuned"]["own_exam"]["accuracy_by_harness"]
    assert ours == theirs and found["tuned"]["own_exam"]["n"] == 20
    assert [c["verdict"] for c in found["comparisons"].values()] == ["not distinguishable"]*2


def test_a_share_that_rounding_could_move_is_asked_again():
    "Where several options may be right, the pick turns at an even share, not between the first two."
    scores = ModelScores(load_chat_model())
    row, totals = TokenisedRequest(np.arange(3), ((1,), (2,), (3,)), 0), [math.log(p) for p in (1/2, 1/3 + 1e-6, 1/6 - 1e-6)]
    assert scores._close(LikelihoodRequest("?", ("A", "B", "C"), several=True), row, totals)
    assert not scores._close(LikelihoodRequest("?", ("A", "B", "C")), row, totals)


# --- base against tuned ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_memorised_exam_is_better_and_a_new_one_not_distinguishable(tmp_path):
    "Acceptance: 60 items learnt by heart; the report says better on those, and not distinguishable on the rest."
    _, report = records(tmp_path, run)
    items = json.loads((tmp_path/"learnt.json").read_text())
    state = json.loads((tmp_path/"report/run.json").read_text())
    verdicts = [state["metrics"][name]["verdict"] for name in ("learnt", "new")]
    assert verdicts == ["better", "not distinguishable"]
    assert state["metrics"]["learnt"]["p_corrected"] < 1e-6
    said = (tmp_path/"report/record.ipynb").read_text(encoding="utf-8")
    assert "not distinguishable" in said and "better" in said and items[0]["question"] not in said
    base, tuned = (read_result(tmp_path/"report"/who, "learnt") for who in ("base", "tuned"))
    assert compare_results(base, tuned)["only_tuned"] > 20
    assert table(report)[0][4] == "better" and len(table(report)) == 2


# --- entry points ---------------------------------------------------------------------------------------------------


def test_the_cell_is_the_dataclass():
    cells = json.loads((ROOT/"nbs/runs/evaluate.ipynb").read_text(encoding="utf-8"))["cells"]
    tagged = ["".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assert tagged == [parameters_cell(EvaluateRun)]


def test_the_record_is_read_without_code(tmp_path):
    "The run notebook's tables and pictures: intervals, baselines, verdicts; and no row text of a private set."
    questions = json.loads((ROOT/"data/mm_mcq.json").read_text(encoding="utf-8"))[:12]
    (tmp_path/"own.json").write_text(json.dumps(questions, ensure_ascii=False))
    done = run("medllm", "run", "evaluate", "-p", "dataset", tmp_path/"own.json", "-p", "base_model", "tiny",
        "-p", "output_dir", tmp_path/"record")
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path/"record/record.ipynb").read_text(encoding="utf-8"))
    outputs = {c["id"]: c.get("outputs", []) for c in record["cells"] if c["cell_type"] == "code"}
    text = {id: json.dumps(found, ensure_ascii=False) for id, found in outputs.items()}
    assert "most frequent" in json.dumps(record) and "not distinguishable" in text["compare"] and "always" in text["figures"]
    for id in ("accuracy", "compare-plot", "calibration"): assert "image/png" in text[id], id
    assert "picked / found when right" in text["order"] and "| mark |" in text["verdict"]
    whole = "".join(text.values())
    assert not [q["id"] for q in questions if q["question"] in whole]
    assert {"accuracy.png", "comparison.png", "own.png", "evaluation.json"} <= {f.name for f in (tmp_path/"record").iterdir()}


def test_mistakes_cost_one_sentence(tmp_path, capsys):
    for words, said in ((["nothing.json"], "nothing.json does not exist"),
            (["mm_mcq", "--scorer", "leter"], "did you mean 'letter'?"),
            (["mm_mcq", "-p", "ordrs", "all"], "did you mean 'orders'?"), (["mm"], "no multiple-choice format"),
            (["mm_mcq", "--base_model", str(tmp_path/"no")], "no")):
        assert main(["evaluate", *words]) == 2
        told = capsys.readouterr().err.strip()
        assert said in told and len(told.splitlines()) == 1 and told.startswith("error: "), told


def test_a_blank_option_moves_no_answer():
    row = {"question": "q", "opa": "x", "opb": "", "opc": "y", "opd": "z", "cop": 2}
    whole = row | {"opb": "w", "cop": 0}
    (one, two), _ = read_items([row, whole])
    assert (one.gold, two.gold) == ({"C"}, {"A"})
    assert read_items([row | {"cop": 1}, row | {"cop": 2.7}, whole])[1] == {"the answer is no option": 2}
    assert read_items([{"question": "q", "choices": ["x", None, "y", "z"], "answer": 2}])[0][0].gold == {"C"}
    assert [read_answer(one, said) for said in ("The answer is C.", "B", "D")] == [{"C"}, set(), {"D"}]
    letters, = read_items([{"question": "q", "options": {"a": "x", "b": "y", "c": "z"}, "answer": "AB"}])[0]
    assert letters.gold == {"a", "b"}
    assert len(read_items([{"Question": "q", "A": 0, "B": 1, "C": 2, "Answer": "B"}])[0][0].options) == 3


@pytest.mark.parametrize("said", ["No doubt, yes.", "No one knows", "Yes/no", "Yes, or maybe", "The answer is no longer known"])
def test_a_word_that_is_no_answer_yet(said):
    words = MCQItem("1", "q", tuple((w, w) for w in ("yes", "no", "maybe")), frozenset(["yes"]))
    assert not read_answer(words, said)
