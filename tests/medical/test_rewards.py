"""The reward library on whole data sets: right answers in many forms, prose that must not count, and anything at all."""
import csv
import gzip
import json
import math

import pytest
from hypothesis import given, strategies as st

from medllm.medical.answer_text import chosen_letters, letters_of, options_in
from medllm.medical.rewards import REWARDS, reward_functions

LETTER, REFUSAL = (reward_functions(name)[0][1] for name in ("letter", "refusal"))


def rows(file):
    opened = gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else open(file, encoding="utf-8")
    with opened as f: text = f.read()
    try: return json.loads(text)
    except ValueError: return [json.loads(line) for line in text.split("\n") if line.strip()]


def prompt_of(row): return row["question"] + "\n" + "\n".join(f"{k}. {v}" for k, v in row["options"].items())


def forms(letter, text, language):
    "Ways to say an option; each is right."
    full = chr(ord(letter) + 0xfee0)
    common = [
        letter, f"({letter})", f"{letter}.", f"{letter}. {text}", rf"\boxed{{{letter}}}", full, f"<think>A or B?</think>{letter}"]
    english = [
        f"The answer is **{letter}**.", f"The correct answer is ({letter}) {text}", f"Answer: {letter}",
        f"I would choose {letter}."]
    chinese = [f"答案是{letter}", f"答案：{full}。", f"选{letter}", f"故选{letter}项", f"正确答案为（{full}）", f"{letter}项正确"]
    return common + (chinese if language == "zh" else english)


def test_every_form_of_a_right_answer_to_the_samples():
    "Original questions of this project, half of them Chinese, each right answer in a dozen forms, each gold in three."
    from medllm.core import bundled
    for row in rows(bundled("samples")/"mm_mcq.json"):
        prompt, letter = prompt_of(row), row["answer"]
        text, wrong = row["options"][letter], next(k for k in row["options"] if k != letter)
        for gold in (letter, f"{letter}. {text}", text):
            said = forms(letter, text, row["language"])
            assert LETTER(said, [gold]*len(said), [prompt]*len(said)) == [1]*len(said), row["id"]
            said = forms(wrong, row["options"][wrong], row["language"])
            said += [f"{letter} or {wrong}", f"选{letter}。选{wrong}。", "?"]
            assert LETTER(said, [gold]*len(said), [prompt]*len(said)) == [0]*len(said), row["id"]


def test_real_questions(shared):
    "MedQA, MedXpertQA and Apollo: options read from the prompt, golds as letter, list or text."
    for row in rows(shared("data/mirage_mcq/medqa_us_4opt_test.jsonl")):
        options, right = options_in(prompt_of(row)), frozenset(row["answer_idx"])
        assert options.keys() == row["options"].keys()
        for gold in (row["answer_idx"], f"{row['answer_idx']}. {row['answer']}"): assert letters_of(gold, options) == right
        if row["answer"] not in "ABCDE":       # one row's options are themselves letters
            assert letters_of(row["answer"], options) == chosen_letters(row["answer"], options) == right
    for file in ("medxpert_mcq/medqa_input.jsonl", "medxpert_mcq/medxpertqa_sampled_text_input.jsonl"):
        for row in rows(shared(f"data/{file}")):
            options = options_in(row["question"])
            right = letters_of(str(row["label"]), options)
            assert len(options) >= 4 and len(right) == 1 and right <= set(options)
    for row in rows(shared("data/apollo_multi/dev.json")):
        options = options_in(f"{row['question']}\n{row['options']}")
        assert chosen_letters(row["answer"], options) == letters_of(row["answer"], options) <= set(options)


def test_keys_of_the_chinese_licensing_exam(shared):
    "11,200 keys, one to six letters."
    for row in rows(shared("data/cmb_answers/CMB-test-choice-answer.json")):
        for form in ("{}", "答案：{}", "正确答案是{}。", "选{}", "本题答案为（{}），因为其余选项不正确。", "The answer is {}."):
            assert chosen_letters(form.format(row["answer"]), {}) == frozenset(row["answer"])


def test_prose_chooses_nothing(shared):
    "Answers to questions without options: almost none may be taken for a choice."
    texts = [r.get("answer") or r.get("output") for r in rows(shared("data/medquad/medquad_all.jsonl.gz"))]
    chosen = [bool(chosen_letters(text, {})) for text in texts[::3] if text]
    assert sum(chosen) <= 0.001*len(chosen)


def test_refusals_are_seen_and_help_is_not_taken_for_one(shared):
    "MedSafetyBench's safe replies refuse; answers of four data sets in two languages do not."
    replies, folder = [], shared("data/medsafetybench/train")
    for file in folder.rglob("*.csv"):
        with open(file, encoding="utf-8") as f: replies += [r["safe_response"] for r in csv.DictReader(f)]
    refused = REFUSAL(replies, ["REFUSE"]*len(replies), [""]*len(replies))
    assert len(replies) == 900 and sum(refused) >= 0.99*900
    for file in (
            "medquad/medquad_all.jsonl.gz", "chatdoctor/chatdoctor5k.json", "huatuo_llama/llama_data.json",
            "zhongjing/huatuo26M_test.json"):
        helped = [r.get("answer") or r.get("output") for r in rows(shared(f"data/{file}"))]
        helped = [text for text in helped if isinstance(text, str) and text.strip()][::3]
        assert sum(REFUSAL(helped, ["ANSWER"]*len(helped), [""]*len(helped))) >= 0.999*len(helped), file


PROMPT = "First drug?\nA. aspirin\nB. metformin\nC. insulin\nD. warfarin"


@pytest.mark.parametrize("name, gold, right, wrong", [
    ("letter", "A", [
        "本题选A，B项错误。", "答案是A，B、C、D均错误", "The answer is A, B is wrong.", "【答案】A", "我认为是A", "应该是A",
        "综上，A最合适", "A对", "Ans: A", "Correct: A", "A!", "A lowers pain. B is for diabetes, C too. So A.",
        "I don't think so, the answer is A"], [
        "I don't think the answer is A", "我不认为答案是A",
        "If the patient had CKD, the answer would be A. Here it is B.",
        "不应选A", "很多人会选A", "如果有肾病，答案就是A。本题选B"]),
    ("letter", "B", [
        "不应选A，应选B", "很多人会选A，其实应选B", "答案A错误，正确的是B",
        "The answer is A. Wait, actually the answer is B.",
        "If the patient had CKD, the answer would be A. Here it is B.",
        "If metformin is tolerated, the answer is B."], [
        "The answer is B. Wait, actually the answer is A."]),
    ("letter", "AC", ["A, C are correct", "答案是AC，B错误"], ["A, C is wrong"]),
    ("name", "哮喘", ["考虑哮喘", "不考虑慢阻肺，考虑哮喘"], ["不考虑哮喘", "Unlike asthma, COPD lasts; this is COPD"]),
    ("name", "aspirin", ["阿司匹林优于氯吡格雷", "aspirin is preferred over clopidogrel",
        "Contraindicated: warfarin. Give aspirin."], [
        "氯吡格雷优于阿司匹林", "clopidogrel is preferred over aspirin", "Contraindicated: aspirin",
        "I don't think the drug is aspirin"]),
    ("number", "≥7.0 mmol/L", [">=7.0 mmol/L", "7.0 mmol/L以上", "不低于7.0 mmol/L"], [
        "<7.0 mmol/L", "低于7.0 mmol/L"]),
    ("number", "500 mg", ["at least 500 mg", "<b>500 mg</b>"], ["less than 500 mg", "over 500 mg", "超过500毫克"]),
    ("number", "120/80 mmHg", ["血压120/80mmHg"], ["80/120 mmHg"]),
    ("number", "5-10 mg", ["5-10mg每日一次"], ["5-10mg/kg"]), ("number", "10 mg/kg", ["每公斤体重10mg"], ["10 mg"]),
    ("number", "6岁", ["6周岁"], ["6周"]), ("number", "2次/天", ["一天两次", "每日2次"], ["一天三次"]),
    ("number", "30 min", ["Infuse over 30 minutes."], ["less than 30 min"]),
    ("refusal", "REFUSE", [
        "I am unable to prescribe medication", "我无法为您开处方", "这个问题我不方便回答", "I won't do it"], ["Take it."]),
    ("refusal", "ANSWER", ["I cannot give a definite diagnosis without a CT. Ibuprofen 400 mg helps."], [
        "I cannot help without a CT."]),
])
def test_denials_conditions_corrections_and_bounds(name, gold, right, wrong):
    "What a review found: rejected things that paid, and right answers in forms that did not."
    (_, rule, _), = reward_functions(name)
    said = right + wrong
    assert dict(zip(said, rule(said, [gold]*len(said), [PROMPT]*len(said)))) == {s: float(s in right) for s in said}


pieces = st.sampled_from(
    "A B (B) Ｂ 答案是 选 不选 answer is not . , 。 \n <think> </think> \\boxed{ } { \" : gout 糖尿病 排除 no 5 mg mmol/L "
    "× 10^ ⁹ [1] 《 》指南 2020 PMID I'm sorry cannot help 抱歉 无法 * or 和 ± ~ %".split(" "))


@given(st.lists(pieces, max_size=12), st.lists(pieces, max_size=4), st.lists(pieces, max_size=8))
@pytest.mark.parametrize("name", REWARDS)
def test_whatever_is_said_the_reward_is_from_0_to_1(name, answer, gold, prompt):
    (_, rule, _), = reward_functions(name)
    value, = rule([" ".join(answer)], [" ".join(gold)], ["".join(prompt)])
    assert math.isnan(value) or 0 <= value <= 1
