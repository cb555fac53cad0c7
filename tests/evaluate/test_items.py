"""Items of an evaluation: one id each, whatever file they come from; and what a model cannot be shown is refused by name."""
import copy
import json

import pytest

from medllm.core import UserError
from medllm.data.registry import find_sources
from medllm.evaluate.forgetting import measure_forgetting
from medllm.evaluate.result import Result, Task, compare_results, read_result
from medllm.evaluate.rubric import judge_answers, read_rubrics
from medllm.evaluate.safety import read_kinds
from medllm.evaluate.text import measure_text, read_text_questions


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
    asked, _, _ = read_text_questions(chat, Task("x", "text", dataset, options=ASK))
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
        verdicts.append({k: (c["n"], c["verdict"], c["p"]) for k, c in compare_results(base, worse)["parts"].items()})
    assert verdicts[0] == verdicts[1] and verdicts[0]["bits_per_byte_medical"][:2] == (20, "worse")


def test_rubrics_of_one_line_are_compared_as_twenty(chat, written):
    rows, _, _ = read_rubrics(chat, Task("x", "rubric", str(written/"line.json")))
    met = lambda yes: lambda prompts, attempt: [json.dumps({"criteria_met": yes})]*len(prompts)
    base, tuned = (Result("x", "rubric", {}, judge_answers(met(yes), rows, ["answer"]*20)) for yes in (False, True))
    found = compare_results(base, tuned)
    assert (found["n"], found["verdict"]) == (20, "better") and found["p"] < 1e-5


def test_answers_of_predict_to_a_one_line_file_are_found_again(chat, written, tmp_path):
    from medllm.models.sampling import Sampling
    from medllm.predict.predict import predict, read_questions
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
    from medllm.evaluate.targets import judge_comparisons, verdict_rows
    items = [{"id": str(n), "right": True, "labels": ["A", "B"], "gold": ["A"], "pick": ["A"]} for n in range(20)]
    found = compare_results(Result("x", "choice", {}, items), Result("x", "choice", {}, items[:15]))
    c = judge_comparisons(corrected({"x": found}), {"": {}})
    rows = {r["what"]: r for r in verdict_rows({"tuned": {}, "comparisons": c})}
    assert rows["x: items compared"]["met"] is False and rows["x: items compared"]["measured"] == "15, 5 left out"


def test_ids_that_look_like_a_number_of_another_are_told_apart():
    from medllm.evaluate.result import told_apart
    assert len(set(told_apart(["a", "a", "a#2", "a", "a#2", "a#3"]))) == 6
    assert told_apart(["x"]*20000)[-1] == "x#20000"


# pictures


PICTURES = {
    "MedXpertQA-MM": {"id": "MM-26", "images": ["MM-26-a.jpeg"]}, "a path": {"image": "x/1.png"},
    "bytes and path": {"image_1": {"bytes": "iVBOR", "path": "1.png"}}, "VQA-RAD": {"image_name": "synpic1.jpg"},
    "PMC-VQA": {"Figure_path": "PMC1.jpg"}, "a flag": {"has_image": True}, "Chinese": {"图片": "1.jpg"},
    "pixels": {"pixel_values": [[0, 1], [1, 0]]}, "a film": {"video": "a.mp4"},
    "parts": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/y"}}]}]},
    "a mark": {"question": "<image>\nWhat does this show?"}, "MMMU": {"question": "What does <image 1> show?"},
    "HTML": {"question": "See <img src='a.png'> here: what is it?"}, "Markdown": {"question": "![](a.png) What is it?"},
    "its bytes": {"question": "What is data:image/png;base64,iVBORw0KGgo= ?"},
    "options": {"options": {"A": "a.png", "B": "b.png"}}}
PLAIN = {"question": "What does this show?", "options": {"A": "a nodule", "B": "a cyst"}, "answer": "A"}


@pytest.mark.parametrize("name", PICTURES)
def test_an_item_that_needs_a_picture_is_left_out_by_name_and_counted(name, tmp_path, chat):
    from medllm.evaluate.items import load_items
    rows = [PLAIN | {"id": f"p{n}", "rubrics": [{"criterion": "names it", "points": 1}]} | PICTURES[name] for n in range(3)]
    (tmp_path/"x.json").write_text(json.dumps(rows + [PLAIN]))
    loaded = load_items(str(tmp_path/"x.json"))
    (reason, n), = loaded.skipped.items()
    assert n == 3 and reason.startswith("need a picture (") and [i.question for i in loaded.items] == [PLAIN["question"]]
    (tmp_path/"all.json").write_text(json.dumps(rows))
    file = str(tmp_path/"all.json")
    for read in (lambda: load_items(file), lambda: read_rubrics(chat, Task("x", "rubric", file)),
            lambda: read_text_questions(chat, Task("x", "text", file, options=ASK))):
        with pytest.raises(UserError, match="3 need a picture"): read()


def test_words_about_pictures_are_words(tmp_path):
    from medllm.evaluate.items import load_items
    words = [{"images": []}, {"image": None}, {"image": ""}, {"has_image": False}, {"影像": "CT示右肺下叶结节"},
        {"picture": "The clinical picture is that of sepsis."}, {"question": "Is <img> a tag?"},
        {"question": "In our forms, what does the mark <image> stand for?"},
        {"url": "https://a/b.png"}, {"imaging": "chest x-ray.jpg not done"}]
    (tmp_path/"x.json").write_text(json.dumps([PLAIN | row for row in words]))
    assert len(load_items(str(tmp_path/"x.json")).items) == len(words)


def test_no_text_set_is_taken_for_pictures(shared):
    from medllm.data.media import media_in
    from medllm.data.readers import read_file
    for name in ("apollo_multi/dev.json", "medxpert_mcq/medxpertqa_sampled_text_input.jsonl", "medxpert_mcq/medqa_input.jsonl"):
        found = [media_in(row.data) for row in read_file(shared(f"data/{name}"))]
        assert len(found) > 100 and not any(found), name


# spellings of exams


def loaded(tmp_path, rows, **how):
    "The items of rows in a file."
    from medllm.evaluate.items import load_items
    (tmp_path/"exam.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return load_items(str(tmp_path/"exam.jsonl"), **how)


def test_cmexam_as_it_is_published(tmp_path):
    r"Options parted by the two characters \ and n, in a table; a formula's \nu is no line break."
    from medllm.evaluate.items import load_items
    lines = [f'下列属于{n}的是,"A 发热\\nB 咳嗽\\nC 呼吸困难\\nD 胸痛\\nE 咯血",{"AE"[n % 2]},解析\n' for n in range(6)]
    (tmp_path/"cmexam.csv").write_text("Question,Options,Answer,Explanation\n" + "".join(lines), encoding="utf-8")
    found = load_items(str(tmp_path/"cmexam.csv"))
    assert len(found.items) == 6 and found.skipped == {} and found.items[0].lang == "zh"
    assert found.items[1].options == (("A", "发热"), ("B", "咳嗽"), ("C", "呼吸困难"), ("D", "胸痛"), ("E", "咯血"))
    item, = loaded(tmp_path, [{"question": "?", "options": r"A. \nu = 1\r\nB. \nu = 2", "answer": "B"}]).items
    assert item.options == (("A", r"\nu = 1"), ("B", r"\nu = 2")) and item.gold == {"B"}


LABELS = [*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "AA", "AB"]
SPELT = {"brackets": (" ", "({}) "), "lines": ("\n", "{}. "), "inline": (" ", "{}. "), "backslash and n": (r"\n", "{} ")}
MANY = {name: lambda n, part=part, mark=mark: part.join(mark.format(LABELS[k]) + f"text {k}" for k in range(n))
    for name, (part, mark) in SPELT.items()} | {"a list": lambda n: [f"text {k}" for k in range(n)]}


@pytest.mark.parametrize("name", MANY)
def test_no_option_is_cut_off(name, tmp_path):
    whole = loaded(tmp_path, [{"question": "?", "options": MANY[name](26), "answer": "text 25"}])
    assert whole.items[0].gold == {"Z"} and len(whole.items[0].options) == 26
    for n in (27, 28):
        found = loaded(tmp_path, [{"question": "?", "options": MANY[name](n), "answer": "text 25"}, PLAIN])
        assert found.skipped == {"more than 26 options": 1}


def test_a_written_answer_is_asked_for_only_where_it_can_be_read(tmp_path, chat):
    from medllm.evaluate.choice import measure_choice
    rows = [{"question": f"q{n}", "options": [f"text {k}" for k in range(n)], "answer": "A"} for n in (9, 10, 11, 20)]
    loaded(tmp_path, rows)
    how = {"scorer": "generate", "max_new_tokens": 2}
    result = measure_choice(chat, Task("x", "choice", str(tmp_path/"exam.jsonl"), options=how))
    assert len(result.items) == 2 and result.facts["skipped"] == {"more than 10 options to read an answer for": 2}


@pytest.mark.parametrize("options", [["a", "b", "c"], {"A": "a", "B": "b", "C": "c"}, "A. a\nB. b\nC. c", "['a', 'b', 'c']"])
def test_a_number_beside_options_is_counted_from_where_the_user_says(tmp_path, options):
    rows = lambda *answers: [{"question": f"q{n}", "options": options, "answer": a} for n, a in enumerate(answers)]
    golds = lambda *answers, **how: [min(i.gold) for i in loaded(tmp_path, rows(*answers), **how).items]
    assert golds(1, 2, first_answer=1) == ["A", "B"] and golds(1, 2, first_answer=0) == ["B", "C"]
    assert golds("1", "2.0", first_answer=0) == ["B", "C"]                        # as tables have them
    assert golds(0, 2) == ["A", "C"] and golds(1, 3) == ["A", "C"]                # the file tells
    assert golds([0, 1], first_answer=0) == ["A"] and golds("A", "c") == ["A", "C"]
    with pytest.raises(UserError, match="say it with first_answer"): golds(1, 2)


def test_numbers_in_other_shapes(tmp_path):
    columns = [{"Question": f"q{n}", "A": "a", "B": "b", "C": "c", "Answer": n} for n in (0, 1)]
    assert [i.gold for i in loaded(tmp_path, columns).items] == [{"A"}, {"B"}]
    choices = [{"question": "q", "choices": ["a", "b", "c"], "answer": 1}]
    assert loaded(tmp_path, choices).items[0].gold == {"B"} and loaded(tmp_path, choices, first_answer=1).items[0].gold == {"A"}
    both = {"question": "q", "options": ["a", "b", "c"], "answer_idx": 1, "answer": "a"}
    assert loaded(tmp_path, [both]).items[0].gold == {"A"}, "the text says which one"
    doses = {"question": "q", "options": [5, 10, 15], "answer": 10}
    assert loaded(tmp_path, [doses]).items[0].gold == {"B"}
    assert loaded(tmp_path, [{"question": None, "options": ["a", "b"], "answer": "A"}, PLAIN]).skipped == {"no question": 1}
    pair = {"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answer": "2"}
    assert loaded(tmp_path, [pair]).items[0].options == (("1", "a"), ("2", "b"))


def raw_mmlu(folder, subjects, questions=6):
    "Files as MMLU's archive has them: no names, question, four options, letter."
    for subject in subjects:
        lines = [f'"Which of these, no. {n}?",one,two,"three, or so",four,{"ABCD"[n % 4]}\n' for n in range(questions)]
        (folder/f"{subject}_test.csv").write_text("".join(lines))


def test_mmlu_without_a_line_of_names(tmp_path, monkeypatch):
    from medllm.evaluate.items import load_items
    raw_mmlu(tmp_path, ["anatomy"])
    found = load_items(str(tmp_path/"anatomy_test.csv"))
    assert len(found.items) == found.facts["rows"] == 6 and [min(i.gold) for i in found.items] == list("ABCDAB")
    assert found.items[0].question == "Which of these, no. 0?" and found.items[0].texts["C"] == "three, or so"
    (tmp_path/"same.csv").write_text("Is it?,yes,yes,no,A\nWas it?,yes,no,maybe,B\n")        # two equal cells in the first line
    assert len(load_items(str(tmp_path/"same.csv")).items) == 2
    (tmp_path/"named.csv").write_text("question,A,B,answer\nIs it?,yes,no,A\n")
    assert len(load_items(str(tmp_path/"named.csv")).items) == 1
    (tmp_path/"cmmlu.csv").write_text(",Question,A,B,C,D,Answer\n0,钙的功能,一,二,三,四,C\n", encoding="utf-8-sig")
    assert load_items(str(tmp_path/"cmmlu.csv")).items[0].gold == {"C"}
    (tmp_path/"x.csv").write_text("a private question,of somebody\n1,2\n")
    with pytest.raises(UserError, match="the columns a private question, of somebody are no multiple-choice format"):
        load_items(str(tmp_path/"x.csv"))
    monkeypatch.setenv("MEDLLM_RECORDED", "1")                # not in what is kept
    with pytest.raises(UserError, match="no multiple-choice format") as e: load_items(str(tmp_path/"x.csv"))
    assert "private" not in str(e.value)


def test_a_folder_of_subjects_keeps_them_as_clusters(tmp_path):
    from medllm.evaluate.compare import groups_of
    from medllm.evaluate.items import load_items
    subjects = [f"subject_{n}" for n in range(12)]
    (tmp_path/"cmmlu").mkdir()
    for subject in subjects: (tmp_path/"cmmlu"/f"{subject}.csv").write_text(
        ",Question,A,B,C,D,Answer\n" + "".join(f"{n},问题{n},一,二,三,四,C\n" for n in range(3)), encoding="utf-8")
    (tmp_path/"mmlu").mkdir()
    raw_mmlu(tmp_path/"mmlu", subjects, 3)
    for folder in ("cmmlu", "mmlu"):
        items = load_items(str(tmp_path/folder)).items
        assert {i.group for i in items} == set(subjects) and len({i.id for i in items}) == len(items) == 36
        assert groups_of([{"group": i.group} for i in items]) is not None
    assert load_items(str(tmp_path/"mmlu/subject_1_test.csv")).items[0].group == ""


def test_folders_of_subjects_and_parts_of_one_file(tmp_path):
    "As the hub has them: anatomy/test-00000-of-00002.jsonl; the parts of a file are no subjects."
    from medllm.evaluate.items import load_items

    for subject in ("anatomy", "virology"):
        (tmp_path/"hub"/subject).mkdir(parents=True)
        for part in range(2): (tmp_path/"hub"/subject/f"test-0000{part}-of-00002.jsonl").write_text(
            json.dumps({"question": f"{subject} {part}?", "options": ["x", "y"], "answer": "A"}))
    assert [i.group for i in load_items(str(tmp_path/"hub")).items] == ["anatomy", "anatomy", "virology", "virology"]
    assert {i.group for i in load_items(str(tmp_path/"hub/anatomy")).items} == {"anatomy"}


def test_languages_of_real_exams(shared):
    from collections import Counter
    from medllm.evaluate.items import load_items
    truth = {"headqa": "es", "mmlu-medical-ar": "ar", "mmlu-medical-hi": "hi", "frenchmedmcqa": "fr"} | dict.fromkeys(
        ("cmexam", "cmb-single", "cmmlu-medical", "medqa-mcmle"), "zh")
    items = load_items(str(shared("data/apollo_multi/dev.json"))).items
    right = Counter((truth.get(i.source, "en"), truth.get(i.source, "en") == i.lang) for i in items)
    for lang in ("es", "ar", "hi", "fr", "zh", "en"):
        assert right[lang, True] >= 0.97*(right[lang, True] + right[lang, False]), lang


def test_a_question_that_one_model_cannot_be_asked_moves_no_other_id(chat, written, tmp_path):
    "Rows of one id, of which the second is too long for the shorter model: the others are compared with themselves."
    rows = [{"id": "same", "question": f"{'Fever? '*(60 if n == 1 else 1)}{n}", "answer": f"Rest {n}.", "rubrics": [
        {"criterion": "names rest", "points": 5}]} for n in range(4)]
    (tmp_path/"alike.json").write_text(json.dumps(rows))
    class Shorter(type(chat)):
        longest = 100
    shorter = copy.copy(chat)
    shorter.__class__ = Shorter
    for read in (lambda c: read_text_questions(c, Task("x", "text", str(tmp_path/"alike.json"), options=ASK))[0],
            lambda c: [a for a, _ in read_rubrics(c, Task("x", "rubric", str(tmp_path/"alike.json")))[0]]):
        everyone, fewer = ({a.id: a.example.turns[0].text for a in read(c)} for c in (chat, shorter))
        assert len(everyone) == 4 and len(fewer) == 3 and fewer.items() < everyone.items(), fewer
