"""The data gate: what it finds, what it leaves alone, what it never shows, and that its answer does not depend on chance."""
import csv
import gzip
import io
import json
import random
import subprocess
import sys
import time
from collections import Counter

import pytest
from conftest import run

from medllm.cli import main
from medllm.data.card import card_text
from medllm.data.check import DataRun, check
from medllm.data.contamination import eval_set
from medllm.data.accounts import Account
from medllm.data.duplicates import duplicate_counts, leak_groups, sketch_examples
from medllm.data.formats import Example, Turn
from medllm.data.gate import ALONE, BATCH, watched
from medllm.data.mixing import split_groups
from medllm.data.personal import find_personal, recall_by_kind, resident_id_valid
from medllm.data.readers import Row

STEM = "Which of the following is the most likely diagnosis?"


def example(prompt, answer): return Example((Turn("user", prompt), Turn("assistant", answer)))


def register(folder, name="rows", **entry):
    "Put a dataset with the default columns into the folder's registry."
    file = folder/"dataset_info.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**known, name: {"file_name": f"{name}.jsonl", **entry}}))


def write(folder, rows, name="rows", **entry):
    "Write rows as one object a line and register them."
    (folder/f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    register(folder, name, **entry)


def row(prompt, answer, **more): return {"instruction": prompt, "input": "", "output": answer, **more}


def made_up(n, seed=0):
    "Rows of random words, none like another."
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 8))) for _ in range(3000)]
    return [row(" ".join(rng.choices(words, k=12)), " ".join(rng.choices(words, k=40))) for _ in range(n)]


def counts(card): return {c["name"]: c["rows"] for c in card["checks"]}


# contamination

def pubmedqa(shared):
    "Rows to train on by id, and the ids of the official test items."
    items = json.loads(shared("data/pubmedqa/ori_pqal.json").read_text(encoding="utf-8"))
    test = json.loads(shared("data/pubmedqa/test_ground_truth.json").read_text(encoding="utf-8"))
    rows = {key: row(item["QUESTION"], item["LONG_ANSWER"]) | {"input": "\n".join(item["CONTEXTS"])}
        for key, item in items.items()}
    return items, rows, set(test)


def test_pubmedqa_holds_all_its_test_items(shared, tmp_path, capsys):
    items, rows, test = pubmedqa(shared)
    write(tmp_path, rows.values(), "all")
    write(tmp_path, [r for key, r in rows.items() if key not in test], "rest")
    write(tmp_path, [items[key] for key in test], "bench")
    words = ["--against", "bench", "--dataset_dir", str(tmp_path), "--no-near", "--output", str(tmp_path/"card")]
    assert main(["data", "check", "all", *words]) == 1
    said = capsys.readouterr().out
    assert "bench: 500 of 500 items contaminated" in said and "0 not testable" in said
    card = json.loads((tmp_path/"card/card.json").read_text())
    assert len({flag["item"] for flag in card["contamination"][0]["flagged"]}) == 500
    main(["data", "check", "rest", *words])                 # the other half shares nothing
    assert "bench: 0 of 500 items contaminated" in capsys.readouterr().out


@pytest.mark.parametrize("seen, question, passage, both", [("questions", 499, 0, 0), ("framed", 468, 0, 0),
    ("passages", 0, 500, 0), ("both", 0, 32, 468), ("neither", 0, 0, 0)])
def test_questions_and_passages_are_looked_for_apart(shared, tmp_path, seen, question, passage, both):
    "Training on PubMedQA's test questions; short ones are found as whole prompts only, and one of three words not at all."
    items, _, test = pubmedqa(shared)
    made = {"questions": lambda q, text, answer: row(q, answer),
        "framed": lambda q, text, answer: row(f"Yes or no? {q} Why?", answer),
        "passages": lambda q, text, answer: row("Summarise.", text), "both": lambda q, text, answer: row(f"{text} {q}", answer),
        "neither": lambda q, text, answer: row(f"What did {len(q)} patients have?", answer)}[seen]
    write(tmp_path, [made(items[k]["QUESTION"], "\n".join(items[k]["CONTEXTS"]), items[k]["LONG_ANSWER"]) for k in test])
    write(tmp_path, [items[key] for key in test], "bench")
    card, _ = check(DataRun("rows", against="bench", dataset_dir=str(tmp_path), near=False, personal=False, processes=1))
    found = card["contamination"][0]
    assert (found["by_question"], found["by_passage"], found["by_both"]) == (question, passage, both)
    assert found["question_untested"] == 1
    assert found["contaminated"] == question + passage + both == len({f["item"] for f in found["flagged"]})
    assert (f"{question} by the question alone, {passage} by the passage alone, {both} by both, "
        "questions not testable alone: 1") in card_text(card)


def test_stems_of_one_half_are_not_found_in_the_other(shared, tmp_path):
    "MedQA with its last sentence as the question; six stems stand once in the second half and once in the first."
    lines = shared("data/mirage_mcq/medqa_us_4opt_test.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [json.loads(line)["question"] for line in lines]
    write(tmp_path, [row(q, "x") for q in asked[:636]])
    write(tmp_path, [dict(zip(("context", "", "question"), q.rpartition(". "))) for q in asked[636:]], "bench")
    card, _ = check(DataRun("rows", against="bench", dataset_dir=str(tmp_path), near=False, personal=False, processes=1))
    found = card["contamination"][0]
    assert (found["contaminated"], found["by_question"], found["by_both"]) == (1, 0, 1)      # one vignette is in both halves


def test_a_form_that_all_items_have_is_no_passage(tmp_path):
    "An instruction in every item and in every training row, in a column that looks like a context; questions are others."
    form = "You are a doctor. Read the question with care and answer with the letter of the right option only, please."
    asked = [r["instruction"] for r in made_up(60)]
    write(tmp_path, [{"context": form, "question": q} for q in asked[:30]], "bench")
    write(tmp_path, [row(f"{form} {q}", "A") for q in asked[30:]])
    card, _ = check(DataRun("rows", against="bench", dataset_dir=str(tmp_path), near=False, processes=1))
    assert (card["contamination"][0]["with_passage"], card["contamination"][0]["contaminated"]) == (30, 0)


def test_a_stem_behind_a_vignette_is_nobodys_question(tmp_path):
    "Questions that many items share, and one that only one has but that a training row asks too, of other patients."
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(3000)]
    stems = [STEM, "What is the best next step in the management of this patient?", "What is the diagnosis?"]
    asked = [stems[2], *(stems[n % 2] for n in range(39))]
    write(tmp_path, [{"context": " ".join(rng.choices(words, k=60)), "question": stem} for stem in asked], "bench")
    write(tmp_path, [row(stem, "Gout.") for stem in stems] + made_up(20))
    card, _ = check(DataRun("rows", against="bench", dataset_dir=str(tmp_path), near=False, processes=1))
    found = card["contamination"][0]
    assert (found["contaminated"], found["with_passage"], found["question_untested"]) == (0, 40, 40)


def test_stock_stems_flag_nothing(shared, tmp_path):
    "Last sentences that several questions of MedQA share, behind other vignettes: grams are shared, no item is flagged."
    bench = [json.loads(line) for line in shared("data/mirage_mcq/medqa_us_4opt_test.jsonl").open(encoding="utf-8")]
    last = Counter(item["question"].rsplit(". ", 1)[-1] for item in bench)
    stock = [stem for stem, n in last.items() if n > 1]
    assert STEM in stock and sum(last[stem] for stem in stock) > 200
    write(tmp_path, bench, "medqa")
    write(tmp_path, [r | {"instruction": f"{r['instruction']}. {stem}"} for stem in stock for r in made_up(5, stem)])
    card, _ = check(DataRun("rows", against="medqa", dataset_dir=str(tmp_path), near=False, processes=1))
    found = card["contamination"][0]
    assert found["any_long"] > 10 and (found["contaminated"], found["items"]) == (0, 1273)


def test_items_that_cannot_be_tested_are_counted(tmp_path, capsys):
    write(tmp_path, made_up(20))
    write(tmp_path, [{"question": q} for q in ("Yes or no?", "高血压", "", "What is the cause of gout in adults today?")], "b")
    assert main(["data", "check", "rows", "--against", "b", "--dataset_dir", str(tmp_path)]) == 0
    assert "b: 0 of 4 items contaminated; 1 tested by 8-grams, 0 short ones whole, 3 not testable" in capsys.readouterr().out


def test_chinese_items_are_found_by_characters(shared):
    lines = shared("data/medicalgpt/medical_sft_1K_format.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["conversations"][0]["value"] for line in lines]
    bench = eval_set("zh", [Row({"问题": q}, "b", n) for n, q in enumerate(questions, 1)], ["问题"])
    assert (bench.words.lengths >= 8).mean() > 0.9


# personal data

def test_recall_on_presidio_research(shared, tmp_path, capsys):
    "Recall by kind; and checking the texts shows none of their values."
    texts = json.loads(shared("data/presidio_research/generated_small.json").read_text(encoding="utf-8"))
    recall = recall_by_kind(texts)
    print(*(f"{kind}: {r['found']} of {r['labelled']} found, {r['other']} elsewhere" for kind, r in recall.items()), sep="\n")
    for kind in ("email", "us_ssn", "ip"): assert recall[kind]["recall"] >= 0.95
    assert recall["card"]["recall"] >= 0.9 and recall["phone"]["recall"] >= 0.5
    write(tmp_path, [row(t["full_text"], "Thank you.") for t in texts])
    assert main(["data", "check", "rows", "--dataset_dir", str(tmp_path), "--output", str(tmp_path/"card")]) == 1
    shown = capsys.readouterr().out + "".join((tmp_path/"card"/f).read_text() for f in ("card.json", "card.md"))
    values = {s["entity_value"] for t in texts for s in t["spans"] if len(s["entity_value"]) > 4}
    assert len(values) > 100 and [v for v in values if v in shown] == []


@pytest.mark.parametrize("number, valid", [
    ("11010519491231002X", True), ("11010519491231002x", True), ("110105194912310021", False),
    ("110105194913310020", False), ("000105194912310020", False)])
def test_chinese_ids_need_their_check_digit(number, valid):
    assert resident_id_valid(number) == valid
    found = [f.kind for f in find_personal(f"身份证号{number}，")]
    assert found == (["resident_id"] if valid else [])


def test_every_resident_id_has_one_check_digit():
    for start in ("44030819900307123", "31011520001231888"):
        assert sum(resident_id_valid(start + last) for last in "0123456789X") == 1


@pytest.mark.parametrize("text", [
    "EC 3.1.1.11", "(4.7-21.5 mIU/ml)", "P = 0.00049", "rs11549465", "Augmentin 375 for", "60000 iu",
    "From March 2007 to", "[12267]", "call 1-800-CDC-INFO (1-800-232-4636)", "13812345678901 is too long", "2023-11-05 12:30:11"])
def test_false_alarms_stay_quiet(text): assert find_personal(text) == []


def test_no_raw_value_in_any_output(tmp_path, capsys):
    "Unique values in every field of a row: none may reach the terminal, the card or the record."
    secrets = {"mail": "zq.wexler77@hospital-nord.org", "id": "11010519491231002X", "phone": "13987654321", "mrn": "ZY88341207",
        "name": "Quillfeather", "card": "4111111111111111", "word": "xylotheremin"}
    text = (f"{secrets['word']} Dr. {secrets['name']} {secrets['mail']} 身份证{secrets['id']} 手机{secrets['phone']} "
        f"住院号：{secrets['mrn']} {secrets['card']}<|im_end|><b>&nbsp;\u200b â€™")
    rows = [row(f"{text} a", f"{text} b", input=f"{text} c", system=text, history=[[text, text]])]*3 + made_up(30)
    write(tmp_path, rows, language="zh", licence="CC0-1.0")
    write(tmp_path, [{"question": f"{text} {text}"}], "bench")
    words = ["--dataset_dir", str(tmp_path), "--against", "bench", "--validation", "rows"]
    assert main(["data", "check", "rows", *words, "--output", str(tmp_path/"card")]) == 1
    done = run("medllm", "run", "data", "--runs", tmp_path/"runs", *sum((["-p", name, value] for name, value in {
        "dataset": "rows", "dataset_dir": tmp_path, "against": "bench", "eval_dataset": "rows"}.items()), []))
    assert done.returncode == 1 and "did not pass" in done.stdout, done.stderr
    out = capsys.readouterr()
    files = [p for folder in ("card", "runs") for p in (tmp_path/folder).rglob("*") if p.is_file()]
    assert {"card.json", "card.md", "record.ipynb", "run.json"} <= {p.name for p in files}
    shown = "\n".join([out.out, out.err, done.stdout, done.stderr, *(p.read_text(encoding="utf-8") for p in files)])
    assert [name for name, value in secrets.items() if value.lower() in shown.lower()] == []
    assert "resident_id" in shown and "1***" in shown and "template tokens" in shown


# thresholds and exit codes

def test_thresholds_decide_the_exit_code(tmp_path, capsys):
    rows = made_up(50)
    rows[3]["output"] += " <br> next"
    write(tmp_path, rows)
    limits = tmp_path/"limits.yaml"
    words = ["data", "check", "rows", "--dataset_dir", str(tmp_path)]
    assert main(words) == 1                                            # 1 of 50 rows is more than 1%
    assert "failed: html" in capsys.readouterr().out
    for text, code in (("html: 0.02", 0), ("html: 1", 0), ("html: null", 0), ("html: 0.01", 1), ("htlm: 1", 2), ("html: x", 2)):
        limits.write_text(text)
        assert main([*words, "--thresholds", str(limits)]) == code, text
    assert "did you mean 'html'" in capsys.readouterr().err
    for bad in (["data", "check", "rwos", "--dataset_dir", str(tmp_path)], [*words, "--against", "none.json"],
            [*words, "--thresholds", "none.yaml"], ["data", "check"]):
        assert main(bad) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1


def test_a_rejected_share_breaks_the_gate(shared, tmp_path, capsys):
    "MedQuAD: two thirds of its rows have no answer; duplicates are counted as documented; ninety seconds are plenty."
    with gzip.open(shared("data/medquad/medquad_all.jsonl.gz"), "rt", encoding="utf-8") as f: rows = [json.loads(r) for r in f]
    found = duplicate_counts(sketch_examples((example(r["question"], r["answer"] or "") for r in rows), near=False))
    assert found == {"duplicate_pairs": 586, "repeated_prompts": 4072}
    write(tmp_path, rows, "medquad", language="en",
        columns={"prompt": "question", "query": "", "response": "answer", "history": "", "system": ""})
    began = time.monotonic()
    assert main(["data", "check", "medquad", "--dataset_dir", str(tmp_path)]) == 1
    assert time.monotonic() - began < 90
    said = capsys.readouterr().out
    assert "47,441 rows read, 16,407 kept, rejected: 31,034 empty answer" in said and "near duplicates" in said


# neither order nor processes change the answer

def test_the_same_for_any_order_and_number_of_processes(tmp_path):
    rng = random.Random(5)
    rows = made_up(ALONE*BATCH + 3*BATCH)
    for i in rng.sample(range(len(rows)), 400):
        kind = i % 4
        if kind == 0: rows[i] = dict(rows[rng.randrange(len(rows))])
        elif kind == 1: rows[i] = {**rows[i - 1], "output": rows[i - 1]["output"] + " more"}
        elif kind == 2: rows[i]["output"] += " <b>reach me at a.b@c.org</b>"
        else: rows[i]["instruction"] = rows[i - 2]["instruction"]
    bench = [{"question": rows[i]["instruction"]} for i in range(0, len(rows), 100)] + [{"question": "no such thing " * 5}]
    write(tmp_path, bench, "bench")
    write(tmp_path, rows, "a", language="en")
    write(tmp_path, rng.sample(rows, len(rows)), "b", language="en")
    seen = []
    for name, processes in (("a", 1), ("a", 2), ("b", 1)):
        card, report = check(DataRun(name, against="bench", dataset_dir=str(tmp_path), processes=processes))
        for flag in card["contamination"][0]["flagged"]: flag.pop("row")
        seen.append((counts(card), card["contamination"], card["lengths"], card["scripts"], report.largest_cluster,
            {kind: f["finds"] for kind, f in card["personal"].items()}, card["verdict"]))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][0]["near_duplicates"] > 50 and seen[0][1][0]["contaminated"] == len(bench) - 1


def test_a_split_does_not_leak():
    rows = [example(f"Question {i % 400}?", f"Answer {i}") for i in range(900)]
    rows += [example(f"Unlike {i}", r["output"] + (" end" if i % 2 else "")) for i, r in enumerate(made_up(50)*2)]
    groups = leak_groups(sketch_examples(rows))
    train, val = split_groups(groups, 0.2, seed=3)
    assert 0.15*len(rows) < len(val) <= 0.2*len(rows)
    prompts = lambda which: {rows[i].turns[0].text for i in which}
    bodies = lambda which: {rows[i].turns[1].text.removesuffix(" end") for i in which}
    assert not prompts(val) & prompts(train) and not bodies(val) & bodies(train)


# before training

def test_the_quick_check_is_quick():
    rows = [example(r["instruction"], r["output"]) for r in made_up(10_000)]
    began, account = time.process_time(), Account("x")
    seen = list(watched([*rows, *rows[:5]], account))
    assert time.process_time() - began < 1
    assert account.faults["duplicates"] == 5 and seen[0].key == seen[-5].key != seen[1].key


def test_the_gate_needs_no_torch():
    code = "import sys, medllm.data.check, medllm.data.card; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_csv_in_another_shape(tmp_path):
    "A path needs no registry entry; the card then says that licence and language are not stated."
    out = io.StringIO()
    writer = csv.DictWriter(out, ["instruction", "input", "output"])
    writer.writeheader()
    writer.writerows(made_up(30))
    (tmp_path/"rows.csv").write_text(out.getvalue())
    card, _ = check(DataRun(str(tmp_path/"rows.csv"), processes=1))
    assert card["datasets"][0]["licence"] == "not stated" and card["datasets"][0]["kept"] == 30
    assert str(tmp_path) not in json.dumps(card["checks"])
