"""Free text, safety, rubrics and forgetting: numbers from paper, real texts, and results that recompute to the bit."""
import csv
import gzip
import json
import math

import pytest
from commands import run

from medllm.core import UserError
from medllm.data.registry import find_sources
from medllm.audit.words import words
from medllm.evaluate.forgetting import document_nats, measure_forgetting
from medllm.evaluate.result import Result, Task, compare_results, read_result, summary, write_result
from medllm.evaluate.rubric import Criterion, grade, judge_answers, measure_rubric, read_rubrics, rubric_score
from medllm.evaluate.safety import measure_safety, urges
from medllm.evaluate.text import counts_of, measure_text, rouge_l, score_of, text_item
from medllm.models.chat import Completion
from medllm.models.sampling import Sampling
from medllm.medical.rewards import refuses
from medllm.predict.predict import predict, read_questions


def rows(file): return [json.loads(line) for line in (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8")]


def items_of(answers, references):
    return [text_item(str(n), Completion(a, [0]*3, True), r) for n, (a, r) in enumerate(zip(answers, references, strict=True))]


# free text

def multilingual(shared):
    "Real medical questions: 40 in each of zh, ar, hi, en."
    source = {"zh": ("cmexam", "medqa-mcmle", "cmb-single"), "ar": ("mmlu-medical-ar",), "hi": ("mmlu-medical-hi",),
        "en": ("medmcqa",)}
    found = json.loads(shared("data/apollo_multi/dev.json").read_text(encoding="utf-8"))
    return {lang: [r["question"] for r in found if r["source"] in names][:40] for lang, names in source.items()}


def test_identical_text_scores_maximal_in_every_language(shared):
    texts = multilingual(shared)
    assert [len(t) for t in texts.values()] == [40]*4
    together = [t for part in texts.values() for t in part]
    found = summary(Result("same", "text", {}, items_of(together, together)))
    assert found["languages"] == {"zh": 39, "ar": 40, "hi": 40, "en": 41}               # one Chinese question is "FDP"
    for name in ("bleu", "chrf"):
        for lang in texts: assert found[f"{name}_{lang}"]["value"] == pytest.approx(100, abs=1e-9)
    assert (found["rouge_l"]["value"], found["length_ratio"]["value"]) == (100, 1)
    assert all(found[k]["value"] == 0 for k in ("empty", "cut_off", "looped", "wrong_language"))


def test_other_text_scores_low(shared):
    "The same texts, each beside another one: a scorer that gives everything 100 would pass the test above."
    for lang, texts in multilingual(shared).items():
        found = summary(Result("other", "text", {}, items_of(texts[1:] + texts[:1], texts)))
        assert found["rouge_l"]["value"] < 40 and found[f"bleu_{lang}"]["value"] < 20, lang


def test_rouge_l_is_that_of_rouge_score(shared):
    "Google's package, given our words: equal for real answers, and it shows what its own tokenizer makes of Chinese."
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="needs rouge-score (dev_requirements)").RougeScorer
    class Ours:
        def tokenize(self, text): return words(text)
    theirs = scorer(["rougeL"], tokenizer=Ours())
    medquad = rows(shared("data/medquad/medquad_all.jsonl.gz"))[:4000]
    english = [r["answer"] for r in medquad if r["answer"] and len(r["answer"]) < 900][:30]
    chinese = [r["output"][0] if isinstance(r["output"], list) else r["output"]
        for r in json.loads(shared("data/zhongjing/huatuo26M_test.json").read_text(encoding="utf-8"))[:30]]
    for texts in (english, chinese):
        for a, b in zip(texts, texts[1:]): assert rouge_l(a, b) == pytest.approx(theirs.score(b, a)["rougeL"].fmeasure, abs=1e-12)
    assert scorer(["rougeL"]).score(chinese[0], chinese[0])["rougeL"].fmeasure == 0.0


def test_scores_of_sums_are_sacrebleus(shared):
    sacrebleu = pytest.importorskip("sacrebleu", reason="needs the extra text")
    for lang, texts in multilingual(shared).items():
        answers = [a[:len(a)//2] + b[len(b)//2:] for a, b in zip(texts, texts[1:] + texts[:1])]
        kinds = {"bleu": sacrebleu.BLEU(tokenize={"zh": "zh", "en": "13a"}.get(lang, "intl")), "chrf": sacrebleu.CHRF()}
        for name, metric in kinds.items():
            import numpy as np
            total = np.sum([counts_of(name, lang, a, r) for a, r in zip(answers, texts)], 0)
            assert score_of(name, lang, total) == pytest.approx(metric.corpus_score(answers, [texts]).score, abs=1e-9)


def test_a_missing_sacrebleu_is_one_sentence(tmp_path):
    (tmp_path/"sacrebleu.py").write_text("raise ImportError")
    done = run("python", "-c", "from medllm.evaluate.text import scorer_of; scorer_of('bleu', 'en')", PYTHONPATH=f"{tmp_path}:.")
    assert done.returncode == 1 and "pip install 'medllm[text]'" in done.stderr.splitlines()[-1]


@pytest.mark.smoke
def test_predictions_are_scored_without_a_model(tmp_path, chat):
    "medllm predict, then evaluate its file: the same items as answering and measuring at once."
    asked = read_questions(chat, find_sources("mm"), max_samples=None)
    predict(asked, tmp_path/"answers.jsonl", Sampling(6, 0.0))
    options = {"max_new_tokens": 6}
    at_once = measure_text(chat, Task("mm", "text", "mm", limit=12, options=options))
    later = measure_text(chat, Task("mm", "text", "mm", limit=12, options={"predictions": str(tmp_path/"answers.jsonl")}))
    assert later.items == at_once.items and later.facts["prompt_sha256"] == at_once.facts["prompt_sha256"]
    lines = (tmp_path/"answers.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path/"some.jsonl").write_text("\n".join(lines[:3]), encoding="utf-8")
    with pytest.raises(UserError, match="has no answer to"):
        measure_text(chat, Task("mm", "text", "mm", limit=12, options={"predictions": str(tmp_path/"some.jsonl")}))
    assert not {"answer", "reference"} & at_once.items[0].keys()


@pytest.mark.parametrize("kind,dataset,options", [("text", "mm", {"max_new_tokens": 4}),
    ("safety", "mm_safety", {"max_new_tokens": 4}), ("forgetting", "mm_pt", {})])
def test_a_result_recomputes_to_the_bit_and_batches_change_nothing(tmp_path, chat, kind, dataset, options):
    measure = {"text": measure_text, "safety": measure_safety, "forgetting": measure_forgetting}[kind]
    limit = 0 if kind == "safety" else 8
    result = measure(chat, Task("x", kind, dataset, limit=limit, options=options))
    written = write_result(result, tmp_path)
    assert summary(read_result(tmp_path, "x")) == written
    lines = (tmp_path/"x.items.jsonl").read_text(encoding="utf-8").splitlines()
    spoilt = json.loads(lines[0])
    spoilt |= {"text": {"rouge_l": 0.9}, "safety": {"margin": 9.0}, "forgetting": {"nats": 1.0}}[kind]
    (tmp_path/"x.items.jsonl").write_text("\n".join([json.dumps(spoilt), *lines[1:]]) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="is not what x.items.jsonl gives"): read_result(tmp_path, "x")
    one = measure(chat, Task("x", kind, dataset, limit=limit, batch=1, options=options))
    for a, b in zip(result.items, one.items):
        for k, v in a.items(): assert b[k] == (pytest.approx(v, rel=1e-4, abs=1e-4) if isinstance(v, float) else v)
    found = compare_results(result, one)
    others = found.get("parts", found.get("more", {}))
    assert others and {c["verdict"] for c in (found, *others.values())} == {"not distinguishable"}


# safety

def test_refusals_of_real_texts(shared):
    "All 900 safe replies are refusals; of 16,407 answers to patients' questions none is."
    replies = [r["safe_response"] for f in sorted(shared("data/medsafetybench/train").glob("*/*.csv"))
        for r in csv.DictReader(open(f, encoding="utf-8"))]
    answers = [r["answer"] for r in rows(shared("data/medquad/medquad_all.jsonl.gz")) if r["answer"]]
    assert (len(replies), len(answers)) == (900, 16407)
    assert sum(map(refuses, replies)) == 900 and sum(map(refuses, answers)) == 0
    assert sum(map(urges, replies)) <= 9                      # refusals do not sound like emergencies


@pytest.mark.parametrize("advice", ["Call 911.", "Go to the emergency room.", "Get emergency care.", "Call an ambulance."])
def test_advice_against_help_is_no_urgent_advice(advice):
    "A model that keeps people from help would else have every emergency right; \"do not wait\" is no such advice."
    said = advice[0].lower() + advice[1:]
    for word in ("Don't", "Do not", "You should not", "You shouldn’t", "Never", "I would not"):
        assert not urges(f"{word} {said} Take an antacid."), word
    for before in ("Do not wait, ", "Don't hesitate: ", "Do not drive yourself; ", "If it does not stop within minutes, "):
        assert urges(before + said), before
    assert urges(f"{advice} It is needed now.")


@pytest.mark.parametrize("against", ["Emergency care is not needed.", "An ambulance? Calling an ambulance is unnecessary.",
    "Urgent care isn't usually required.", "No emergency help is required.", "Avoid the emergency room.", "不要拨打120。",
    "不建议去急诊。", "去急诊是不必要的。", "先观察，不要急着去急诊。"])
def test_help_that_is_taken_back_is_no_urgent_advice(against): assert not urges(against)


def test_medsafetybench_as_a_task(shared, chat, tmp_path):
    "The real sets together: harmful requests with their safe replies, MedQuAD questions as the harmless side."
    with open(tmp_path/"benign.jsonl", "w", encoding="utf-8") as f:
        for r in rows(shared("data/medquad/medquad_all.jsonl.gz"))[:200]: f.write(json.dumps({"question": r["question"]}) + "\n")
    task = Task("safety", "safety", str(shared("data/medsafetybench/train")), limit=10, options={"max_new_tokens": 4,
        "columns": "prompt=harmful_medical_request response=safe_response", "benign": str(tmp_path/"benign.jsonl")})
    with pytest.raises(UserError, match="no row has a question"): measure_safety(chat, task)    # columns of the first set alone
    registry = {"bad": {"file_name": "bad.jsonl", "columns": {"prompt": "q", "response": "a"}},
        "good": {"file_name": "benign.jsonl", "columns": {"prompt": "question", "response": ""}}}
    with open(tmp_path/"bad.jsonl", "w", encoding="utf-8") as f:
        for file in sorted(shared("data/medsafetybench/train").glob("*/*.csv"))[:2]:
            for r in csv.DictReader(open(file, encoding="utf-8")):
                f.write(json.dumps({"q": r["harmful_medical_request"], "a": r["safe_response"]}) + "\n")
    (tmp_path/"dataset_info.json").write_text(json.dumps(registry))
    task = Task("safety", "safety", "bad", str(tmp_path), limit=10, options={"max_new_tokens": 4, "benign": "good"})
    result = measure_safety(chat, task)
    found = summary(result)
    assert found["items_by_kind"] == {"harmful": 10, "benign": 10, "emergency": 0}
    assert found["harmful_answered"]["value"] == 1.0 and found["benign_refused"]["method"] == "rule of three"
    assert found["benign_refused"]["high"] == pytest.approx(0.3) and all(math.isfinite(i["margin"]) for i in result.items)
    assert not [i for i in result.items if "answer" in i]


# rubrics

def test_healthbench_formula_by_hand():
    "Points 7, 5, 10, -6 with met T, F, T, T: 11 of 22."
    criteria = [Criterion("a", 7), Criterion("b", 5), Criterion("c", 10), Criterion("d", -6)]
    assert rubric_score(criteria, [True, False, True, True]) == 11/22
    item = lambda n, score: {"id": str(n), "group": "", "score": score,
        "criteria": [{"points": 1.0, "met": [score > 0], "attempts": [1]}]}
    found = summary(Result("x", "rubric", {}, [item(n, s) for n, s in enumerate([1.0, 0.25, -2.0, -1.0])]))
    assert found["score"]["value"] == found["score"]["low"] == 0.0 and 0 < found["score"]["high"] <= 1     # -0.4375, clipped


def test_a_judge_that_never_gives_a_verdict_does_not_hang():
    asked = []
    def judge(prompts, attempt):
        asked.append((attempt, len(prompts)))
        return ["It depends."]*len(prompts)
    found = grade(judge, ["x"]*5, attempts=4)
    assert asked == [(0, 5), (1, 5), (2, 5), (3, 5)]
    assert [v.met for v in found] == [None]*5 and {v.attempts for v in found} == {4}


def test_repeats_measure_the_judges_agreement_with_itself(chat, tmp_path):
    rubric = {"prompt": "Chest pain since an hour?", "rubrics": [{"criterion": c, "points": 5} for c in ("A", "B", "C")]}
    (tmp_path/"r.jsonl").write_text("\n".join(json.dumps(rubric | {"id": str(n)}) for n in range(4)))
    read, _, _ = read_rubrics(chat, Task("x", "rubric", str(tmp_path/"r.jsonl")))
    def moody(prompts, attempt):                       # changes its mind about B in the second round
        met = lambda p: "# Criterion\nA" in p or "# Criterion\nB" in p and attempt == 0
        return ['{"criteria_met": %s}' % str(met(p)).lower() for p in prompts]
    items = judge_answers(moody, read, ["answer"]*4, attempts=1, repeats=2)
    found = summary(Result("x", "rubric", {}, items))
    assert found["self_agreement"]["value"] == pytest.approx(2/3) and found["score"]["value"] == pytest.approx(2/3)
    assert found["judge_calls"] == 24 and found["unparsable"] == 0


def test_the_judge_of_a_task_is_a_function_by_name(chat, tmp_path, monkeypatch):
    (tmp_path/"my_judge.py").write_text(
        'def strict(prompts, attempt): return [\'{"explanation": "no", "criteria_met": false}\']*len(prompts)\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    rubric = {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Fever?"}],
        "rubrics": [{"criterion": "A", "points": 5}, {"criterion": "B", "points": -5}]}
    (tmp_path/"r.jsonl").write_text(json.dumps(rubric))
    task = Task("x", "rubric", str(tmp_path/"r.jsonl"), options={"judge": "my_judge:strict", "max_new_tokens": 4})
    result = measure_rubric(chat, task)
    assert (result.items[0]["score"], result.facts["judge"]) == (0.0, "my_judge:strict")
    assert "Fever" not in json.dumps(result.items) and len(result.items[0]["criteria"][0]["raw"][0]) == 16
    with pytest.raises(UserError, match="different judges"):
        compare_results(result, Result("x", "rubric", result.facts | {"judge": "b"}, result.items))


# forgetting

def test_bits_per_byte_of_real_text(chat, shared, tmp_path):
    "A random model is told as much as by noise, and a document of several windows is read to its end."
    answers = [r["answer"] for r in rows(shared("data/medquad/medquad_all.jsonl.gz"))[:3000] if r["answer"]]
    texts = [*answers[:6], max(answers, key=len)]
    found = document_nats(chat, texts)
    assert len(chat.renderer.plain([texts[-1]], "after_control")[0]) == found[-1][1] > chat.longest   # each token once
    uniform = math.log(chat.model.config.vocab_size)
    for nats, tokens in found: assert 0.9*uniform < nats/tokens < 1.2*uniform         # random weights know nothing
    result = measure_forgetting(chat, Task("x", "forgetting", "mm_pt", limit=5))
    assert summary(result)["size_medical"]["documents"] == 5


# all kinds in one run

def test_each_part_of_a_comparison_has_a_row(tmp_path):
    "Safety and forgetting are several findings; each is corrected for and told by itself."
    from medllm.evaluate.benchmarks import evaluate_models, evaluation_metrics, verdict_rows
    from medllm.evaluate.compare import comparison_rows
    from medllm.models.chat import ModelChoice
    tasks = [Task("answers", "text", "mm", limit=4, options={"max_new_tokens": 4}),
        Task("safe", "safety", "mm_safety", options={"max_new_tokens": 4}), Task("kept", "forgetting", "mm_pt", limit=4)]
    found = evaluate_models(ModelChoice(), ModelChoice(), tasks, tmp_path)
    assert [r["set"] for r in comparison_rows(found["comparisons"])] == ["answers", "safe: harmful_answered",
        "safe: benign_refused", "safe: emergency_missed", "kept: bits_per_byte_medical", "kept: bits_per_byte_general"]
    assert {c["verdict"] for c in found["comparisons"].values()} == {"not distinguishable"}
    assert {c["said"] for c in found["comparisons"].values()} == {"not asked: both are one model"}
    measures = [r["measure"] for r in comparison_rows(found["comparisons"])]
    assert measures == ["ROUGE-L", "harmful answered", "benign refused", "emergency missed", "bits per byte medical",
        "bits per byte general"]
    limits = [row["what"] for row in verdict_rows(found) if row["target"].startswith("at most")]
    assert len(limits) == 5 + 4 and limits[0] == "safe: harmful requests answered"
    assert evaluation_metrics(found)["safe"]["n"] == 24
