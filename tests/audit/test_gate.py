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
from commands import run
from written_files import write_lines

from medllm.cli.main import main
from medllm.audit.card import data_card_text
from medllm.audit.check import DataRun, check_datasets
from medllm.audit.contamination import eval_set
from medllm.data.accounts import Account
from medllm.audit.duplicates import duplicate_counts, leak_groups, sketch_examples
from medllm.data.formats import Example, Turn
from medllm.audit.gate import ALONE, BATCH, watched
from medllm.data.mixing import split_groups
from medllm.audit.personal import WEAK, find_personal, recall_by_kind, resident_id_valid
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
    write_lines(folder/f"{name}.jsonl", rows)
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
    card, _ = check_datasets(DataRun("rows", against="bench", dataset_dir=str(tmp_path), near=False, personal=False, processes=1))
    found = card["contamination"][0]
    assert (found["by_question"], found["by_passage"], found["by_both"]) == (question, passage, both)
    assert found["question_untested"] == 1
    assert found["contaminated"] == question + passage + both == len({f["item"] for f in found["flagged"]})
    assert (f"{question} by the question alone, {passage} by the passage alone, {both} by both, "
        "questions not testable alone: 1") in data_card_text(card)


def test_stems_of_one_half_are_not_found_in_the_other(shared, tmp_path):
    "MedQA with its last sentence as the question; six stems stand once in the second half and once in the first."
    lines = shared("data/mirage_mcq/medqa_us_4opt_test.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [json.loads(line)["question"] for line in lines]
    write(tmp_path, [row(q, "x") for q in asked[:636]])
    write(tmp_path, [dict(zip(("context", "", "question"), q.rpartition(". "))) for q in asked[636:]], "bench")
    card, _ = check_datasets(DataRun("rows", against="bench", dataset_dir=str(tmp_path), near=False, personal=False, processes=1))
    found = card["contamination"][0]
    assert (found["contaminated"], found["by_question"], found["by_both"]) == (1, 0, 1)      # one vignette is in both halves


def test_a_form_that_all_items_have_is_no_passage(tmp_path):
    "An instruction in every item and in every training row, in a column that looks like a context; questions are others."
    form = "You are a doctor. Read the question with care and answer with the letter of the right option only, please."
    asked = [r["instruction"] for r in made_up(60)]
    write(tmp_path, [{"context": form, "question": q} for q in asked[:30]], "bench")
    write(tmp_path, [row(f"{form} {q}", "A") for q in asked[30:]])
    card, _ = check_datasets(DataRun("rows", against="bench", dataset_dir=str(tmp_path), near=False, processes=1))
    assert (card["contamination"][0]["with_passage"], card["contamination"][0]["contaminated"]) == (30, 0)


def test_a_stem_behind_a_vignette_is_nobodys_question(tmp_path):
    "Questions that many items share, and one that only one has but that a training row asks too, of other patients."
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(3000)]
    stems = [STEM, "What is the best next step in the management of this patient?", "What is the diagnosis?"]
    asked = [stems[2], *(stems[n % 2] for n in range(39))]
    write(tmp_path, [{"context": " ".join(rng.choices(words, k=60)), "question": stem} for stem in asked], "bench")
    write(tmp_path, [row(stem, "Gout.") for stem in stems] + made_up(20))
    card, _ = check_datasets(DataRun("rows", against="bench", dataset_dir=str(tmp_path), near=False, processes=1))
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
    card, _ = check_datasets(DataRun("rows", against="medqa", dataset_dir=str(tmp_path), near=False, processes=1))
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


SPELT = {
    "card": """
        501812345673|0604 1234 5674|5018-1234-5673|5-0-1-8-1-2-3-4-5-6-7-3|6304123456782|30001234567891|
        3056 930902 5904|213112345678904|1800 123456 78905|180012345678905|3782 822463 10005|4111.1111.1111.1111|
        4111/1111/1111/1111|4111 - 1111 - 1111 - 1111|4111\u00a01111\u202f1111\u20071111|4111–1111–1111–1111|
        4111\u200b1111\u200b1111\u200b1111|４１１１１１１１１１１１１１１１|٤١١١١١١١١١١١١١١١|४१११११११११११११११|6228480402564890018|
        622848 0402564890018|5018123456789012344""",
    "iban": """
        GB82WEST12345698765432|gb82 west 1234 5698 7654 32|Gb82West12345698765432|GB82-WEST-1234-5698-7654-32|
        be68 5390 0754 7034|GB82\u00a0WEST\u00a01234\u00a05698\u00a07654\u00a032|ＧＢ82WEST12345698765432|
        D E 8 9 3 7 0 4 0 0 4 4 0 5 3 2 0 1 3 0 0 0|fr1420041010050500013m02606|mt84malt011000012345mtlcast001s""",
    "resident_id": """
        11010519491231002x|110105 19491231 002X|110105-1949-1231-002x|11010519491231002Ｘ|110105\u200b19491231002X|
        1 1 0 1 0 5 1 9 4 9 1 2 3 1 0 0 2 X|一一零一零五一九四九一二三一零零二X""",
    "mobile_cn": """
        138 1234 5678|138.1234.5678|138\u00a01234\u00a05678|138–1234–5678|１３８１２３４５６７８|1-3-8-1-2-3-4-5-6-7-8|
        一三八一二三四五六七八|
        1\ufe0f\u20e33\ufe0f\u20e38\ufe0f\u20e31\ufe0f\u20e32\ufe0f\u20e33\ufe0f\u20e34\ufe0f\u20e35\ufe0f\u20e36\ufe0f\u20e37\ufe0f\u20e38""",
    "us_ssn": """
        536-90-4399|536.90.4399|536\u00a090\u00a04399|536‑90‑4399|５３６-９０-４３９９""",
    "email": """
        jane.doe (at) clinic.org|jane[at]clinic[dot]org|jane at clinic dot org|jane＠clinic．org|jane%40clinic.org|
        josé@clinic.org|jane.doe @ x.org""",
    "ip": """
        192[.]168[.]1[.]17|１９２．１６８．１．１７|192.168.1.\u200b17""",
    "phone": """
        212\u00a0555\u00a00147|212–555–0147|０１０—１２３４５６７８"""}
CUES = ("MRN {}", "MRN – {}", "MRN—{}", "<mrn>{}</mrn>",
    "her medical record number is spelt {}.", "MRN#{}", "MRN: “{}”", "病历号：{}", "病歷號碼（{}）", "病人编号 {}")
NUMBERS = ("384920", "3-8-4-9-2-0", "3 8 4 9 2 0", "3.8.4.9.2.0", "3/8/4/9/2/0", "3, 8, 4, 9, 2, 0", "384 920", "38-49-20",
    "384\u200b920", "384\u00a0920", "３８４９２０", "٣٨٤٩٢٠", "३८४९२०", "three eight four nine two zero",
    "Three-Eight-Four-Nine-Two-Oh", "三八四九二零", "ZY-384920")


@pytest.mark.parametrize("kind, text", [(kind, text.strip()) for kind, texts in SPELT.items() for text in texts.split("|")])
def test_an_identifier_is_found_in_every_spelling(kind, text):
    "And where it stands, between letters and between Chinese characters."
    for before, after in (("Sent to ", " today."), ("号码是", "，谢谢")):
        found = [(f.kind, f.start, f.end) for f in find_personal(before + text + after)]
        assert found == [(kind, len(before), len(before) + len(text))]


@pytest.mark.parametrize("cue", CUES)
def test_a_record_number_is_found_in_every_spelling(cue):
    for number in NUMBERS:
        text = cue.format(number)
        found = [(f.kind, text[f.start:f.end]) for f in find_personal(text)]
        assert found == [("medical_record", number)]


@pytest.mark.parametrize("text, kind", [("NHS number 943 476 5919", "nhs_number"), ("NHS No. 9-4-3-4-7-6-5-9-1-9", "nhs_number"),
    ("social security no. 536904399", "us_ssn"), ("SSN five three six nine zero four three nine nine", "us_ssn"),
    ("身份证号110105491231002", "resident_id"), ("手机1381234 5678", "mobile_cn"), ("passport no. E 1234 5678", "document"),
    ("passport – X1234567", "document"), ("SSN – 536904399", "us_ssn"), ("DOB – 01/02/1980", "birth_date"),
    ("NHS number — 943 476 5919", "nhs_number"), ("医保卡号 1234 5678 90", "document"), ("Phone: 7035550147", "phone"),
    ("384920 is her MRN", "medical_record"),
    ("DOB (03/05/1961)", "birth_date"), ("born 5th of March 1961", "birth_date"), ("出生日期：一九六一年三月五日", "birth_date")])
def test_a_cue_brings_its_number_with_it(text, kind): assert [f.kind for f in find_personal(text)] == [kind]


MEDICINE = """
    501812345674|601234567894|5012345678900|SCTID 50771000119108|10.1177/5018123456731|
    UUID 550e8400-e29b-41d4-4716-501812345673| is no card|at 888-346-3656 to locate|de 50 ans avec 12345678 9|
    mRNA-1273 vaccine|medical record 2010|medical record: 12/05/2019|medical records of 2061 patients|
    medical record in 30% (95% CI)|NHS 111|病历：体温36.8℃，血压120/80|检查：120/80mmHg，住院 3 天|
    scores 3, 5, 2, 1, 4, 3, 2, 5, 6, 1, 3|1 3 1 0 1 1 0 2 0 1 1|grade 1 2 3 4 5 6 7 8 9 10|one two three four five|
    available at clinicaltrials.gov|more @ cdc.gov|stare at the dot in the middle|Amoxicillin 500 mg 3x1, 250–500 mg|
    Na 140, K 4.2, Cl 102, HCO3 24, BUN 14, Cr 0.9|WBC 5018 6000 7400|ICD-10 S72.001A, E11.65|
    ISBN 9783161484100, 0-306-40615-2|doi:10.1016/S0140-6736(05)67889-0|doi 10.1001/jama.2020.12839|
    PMID 32511222, PMC7265691|NCT04280705, ISRCTN50189673, EudraCT 2020-001936-86|2020-03-05 to 2021-04-06|
    20200305123045|LOINC 2345-7, CPT 99213, NDC 0002-8215-01|1.2.840.113619.2.55.3.604688119|
    rs429358(C;T), chr7:140453136|tel. 4006668800"""


@pytest.mark.parametrize("text", [text.strip() for text in MEDICINE.split("|")])
def test_numbers_of_medicine_are_nobodys(text): assert find_personal(text) == []


def test_real_texts_hold_few_identifiers(shared):
    "All finds were looked at, and are right but for the size of a cyst: a pattern that takes prose for a card shows here."
    kinds = Counter()
    for name in ("pubmedqa/ori_pqal.json", "chatdoctor/chatdoctor5k.json", "aci_bench/train.csv",
            "mts_dialog/MTS-Dialog-TrainingSet.csv", "medicalgpt/medical_sft_1K_format.jsonl"):
        for line in shared(f"data/{name}").open(encoding="utf-8"): kinds.update(f.kind for f in find_personal(line))
    weak = sum(kinds.pop(kind, 0) for kind in WEAK)
    assert kinds == {"medical_record": 2, "ip": 1} and weak <= 1000, weak


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
    "MedQuAD: two thirds of its rows have no answer; duplicates are counted as documented."
    with gzip.open(shared("data/medquad/medquad_all.jsonl.gz"), "rt", encoding="utf-8") as f: rows = [json.loads(r) for r in f]
    found = duplicate_counts(sketch_examples((example(r["question"], r["answer"] or "") for r in rows), near=False))
    assert found == {"duplicate_pairs": 586, "repeated_prompts": 4072}
    write(tmp_path, rows, "medquad", language="en",
        columns={"prompt": "question", "query": "", "response": "answer", "history": "", "system": ""})
    assert main(["data", "check", "medquad", "--dataset_dir", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "47,441 rows read, 16,407 kept, rejected: 31,034 empty answer" in said and "near duplicates" in said
    assert not any(kind in said.partition("rows with personal data")[2] for kind in ("card", "iban", "medical_record", "us_ssn"))


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
        card, report = check_datasets(DataRun(name, against="bench", dataset_dir=str(tmp_path), processes=processes))
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
    code = "import sys, medllm.audit.check, medllm.audit.card; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_a_csv_in_another_shape(tmp_path):
    "A path needs no registry entry; the card then says that licence and language are not stated."
    out = io.StringIO()
    writer = csv.DictWriter(out, ["instruction", "input", "output"])
    writer.writeheader()
    writer.writerows(made_up(30))
    (tmp_path/"rows.csv").write_text(out.getvalue())
    card, _ = check_datasets(DataRun(str(tmp_path/"rows.csv"), processes=1))
    assert card["datasets"][0]["licence"] == "not stated" and card["datasets"][0]["kept"] == 30
    assert str(tmp_path) not in json.dumps(card["checks"])
