"""Data from outside: every real file, every broken one, and what holds for any bytes and any lengths."""
import contextlib
import gzip
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commands import SHARED, run
from medllm.cli.main import main
from medllm.core import UserError
from medllm.data.accounts import OnBad, load_examples, write_rejects
from medllm.data.formats import REASONS, Example, Turn
from medllm.audit.gate import inspect
from medllm.data.json_reader import Bad
from medllm.data.readers import read_file
from medllm.data.registry import find_sources
from medllm.data.rows import tokenise
from medllm.data.tokens import Renderer

# name -> (file, registry entry, stage, rows in the file)
REAL = {
    "medquad": ("medquad/medquad_all.jsonl.gz", {"columns": {"prompt": "question", "response": "answer"}}, "sft", 47441),
    "chatdoctor": ("chatdoctor/chatdoctor5k.json", {}, "sft", 5452),
    "diseases": ("chatdoctor/format_dataset.csv", {"columns": {"prompt": "Symptom", "response": "reason"}}, "sft", 796),
    "disease_mini": ("chatdoctor/disease_database_mini.csv",
        {"columns": {"prompt": "Symptom", "response": "Medications"}}, "sft", 100),
    "disease_symptom": ("chatdoctor/disease_symptom.csv", {"columns": {"prompt": "Symptom", "response": "disease"}}, "sft", 12),
    "medicalgpt": ("medicalgpt/medical_sft_1K_format.jsonl", {"formatting": "sharegpt"}, "sft", 1000),
    "dpo": ("medicalgpt/dpo_zh_500.jsonl", {"formatting": "sharegpt", "ranking": True}, "dpo", 500),
    "corpus": ("medicalgpt/medical_corpus.txt", {"columns": {"prompt": "问", "response": "答"}}, "sft", 87),
    "sample": ("medicalgpt/sample.jsonl", {"columns": {"prompt": "question", "response": "answer"}}, "sft", 32),
    "nurse": ("medicalgpt/seed_nurse_role.jsonl", {"columns": {"text": "system_prompt"}}, "pt", 66),
    "pubmedqa": ("pubmedqa/ori_pqal.json", {"columns": {"prompt": "QUESTION", "response": "LONG_ANSWER"}}, "sft", 1000),
    "pubmedqa_keys": ("pubmedqa/test_ground_truth.json", {"columns": {"prompt": "id", "response": "value"}}, "sft", 500),
    "medqa": ("mirage_mcq/medqa_us_4opt_test.jsonl", {"columns": {"prompt": "question", "response": "answer"}}, "sft", 1273),
    "medqa_input": ("medxpert_mcq/medqa_input.jsonl", {"columns": {"prompt": "question", "response": "label"}}, "sft", 1273),
    "medxpert": ("medxpert_mcq/medxpertqa_sampled_text_input.jsonl",
        {"columns": {"prompt": "question", "answer": "label"}}, "grpo", 244),
    "safety": ("medsafetybench/train",
        {"columns": {"prompt": "harmful_medical_request", "response": "safe_response"}}, "sft", 900),
    "huatuo": ("huatuo_llama/llama_data.json", {}, "sft", 8658),
    "huatuo_infer": ("huatuo_llama/infer.json", {}, "sft", 5),
    "huatuo_questions": ("huatuo_llama/question.json", {"columns": {"prompt": "question"}}, "ppo", 200),
    "huatuo26m": ("zhongjing/huatuo26M_test.json", {}, "sft", 6000),
    "toyhom": ("toyhom_cmd/IM_neike.txt", {}, "pt", 8096),               # 16,192 lines, every second one blank
    "mts": ("mts_dialog/MTS-Dialog-TrainingSet.csv",
        {"columns": {"prompt": "dialogue", "response": "section_text"}}, "sft", 1201),
    "mts_val": ("mts_dialog/MTS-Dialog-ValidationSet.csv",
        {"columns": {"prompt": "dialogue", "response": "section_text"}, "eval_only": True}, "sft", 100),
    "aci": ("aci_bench/train.csv", {"columns": {"prompt": "dialogue", "response": "note"}}, "sft", 67),
    "meqsum": ("meqsum/MeQSum_ACL2019_BenAbacha_Demner-Fushman.xlsx",
        {"columns": {"prompt": "CHQ", "response": "Summary"}}, "sft", 1000),
    "presidio": ("presidio_research/generated_small.json", {"columns": {"text": "full_text"}}, "pt", 100),
    "templates": ("presidio_research/templates.txt", {}, "pt", 210),
    "apollo": ("apollo_multi/dev.json",
        {"columns": {"prompt": "question", "query": "options", "response": "answer"}}, "sft", 1114),
    "cmb": ("cmb_answers/CMB-test-choice-answer.json",
        {"columns": {"prompt": "exam_subject", "response": "answer"}}, "sft", 11200),
    "disc": ("disc_medllm/gpt-4_cmd.json", {"formatting": "sharegpt", "columns": {"messages": "conversation"}, "tags": {
        "role_tag": "role", "content_tag": "content", "user_tag": "patient", "assistant_tag": "doctor"}}, "sft", 121),
    "disc_test": ("disc_medllm/test_examples.jsonl",
        {"formatting": "openai", "columns": {"messages": "conversation"}}, "sft", 163),
    "nhs": ("opengpt_nhs/original_data.csv", {}, "pt", 10),
    "nhs_generated": ("opengpt_nhs/raw_generated_data_for_example_project.csv",
        {"columns": {"prompt": "context", "response": "raw_output"}}, "sft", 70),
}
# rows rejected, by reason; all other rows are kept
REJECTED = {"medquad": {"empty_answer": 31034}, "disc_test": {"wrong_order": 3}}      # these end with a question


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    "A folder with a registry file over copies of nothing: links would leave it, so files are hard-linked or copied."
    folder, there = tmp_path_factory.mktemp("registry"), {}
    shared = SHARED/"data"
    if not shared.is_dir(): pytest.skip("needs data in the folder shared/ beside the project")
    for name, (file, entry, _, _) in REAL.items():
        place = folder/file
        for source in ([shared/file] if (shared/file).is_file() else sorted((shared/file).rglob("*.csv"))):
            copy = folder/source.relative_to(shared)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.exists(): copy.write_bytes(source.read_bytes())
        there[name] = entry | {"file_name": str(place.relative_to(folder))}
    (folder/"dataset_info.json").write_text(json.dumps(there, ensure_ascii=False))
    return folder


@pytest.mark.parametrize("name", REAL)
def test_every_real_file_loads(name, registry):
    _, _, stage, count = REAL[name]
    examples, account = load_examples(find_sources(name, str(registry))[0], stage)
    assert account.read == count == account.kept + account.rejected.total()
    assert len({e.where for e in examples}) == account.kept          # counted where rows come out, not by subtraction
    assert dict(account.rejected) == REJECTED.get(name, {}), account
    assert len(examples) == account.examples and set(account.rejected) <= set(REASONS)


def test_real_rows_are_accounted_for_as_tokens(registry, tiny):
    "Long dialogues at a short cutoff: some kept, some shortened, some rejected, none lost."
    examples, account = load_examples(find_sources("mts", str(registry))[0], "sft")
    rows = tokenise(examples, Renderer(tiny, "chatml"), 300, account)
    assert account.truncated["prompt"] > 100 and account.rejected["longer_than_cutoff"] > 50
    assert account.kept + account.truncated.total() + account.rejected.total() == account.read == 1201
    assert len(rows) == account.used and rows.lengths.max() <= 300


@pytest.fixture(scope="module")
def chatml(tiny): return Renderer(tiny, "chatml")


GOOD = '{"instruction": "Fever?", "output": "Rest."}'
LINES = f"{GOOD}\n{GOOD}\n"
def word(i): return "".join(chr(97 + i//26**k % 26) for k in range(5))

# id -> (file name, bytes, rows read or words of the error)
BROKEN = {
    "byte-order mark": ("r.jsonl", b"\xef\xbb\xbf" + LINES.encode(), 2),
    "CRLF": ("r.jsonl", LINES.replace("\n", "\r\n").encode(), 2),
    "CR": ("r.jsonl", LINES.replace("\n", "\r").encode(), 2),
    "UTF-16": ("r.jsonl", LINES.encode("utf-16"), 2),
    "latin-1": ("r.jsonl", LINES.replace("Rest", "Rét").encode("latin-1"), "line 1, byte 38: the byte is not UTF-8"),
    "GBK": ("r.jsonl", '{"instruction": "高血压患者能吃党参吗", "output": "可以口服"}\n'.encode("gbk"), 1),
    "truncated last line": ("r.jsonl", (LINES + GOOD[:20]).encode(), "line 3, byte"),
    "truncated array": ("r.json", f"[{GOOD},\n{GOOD},\n".encode(), "line 3, byte 93: not valid JSON"),
    "garbage mid-file": ("r.jsonl", f"{GOOD}\n<<<\n{GOOD}\n".encode(), "line 2, byte 45: not valid JSON"),
    "duplicate keys": ("r.jsonl", f'{GOOD}\n{{"output": "a", "output": "b"}}\n'.encode(), "the same key twice"),
    "blank lines": ("r.jsonl", f"\n\n{GOOD}\n\n{GOOD}\n\n".encode(), 2),
    "two objects a line": ("r.jsonl", f"{GOOD} {GOOD}\n{GOOD}\n".encode(), "more than one value on the line"),
    "two objects on the only line": ("r.json", f"{GOOD} {GOOD}\n".encode(), 2),
    "null": ("r.jsonl", (LINES + '{"instruction": "a", "output": null}').encode(), 3),
    "missing": ("r.jsonl", (LINES + '{"instruction": "a"}').encode(), "line 3: no column 'output'"),
    "number": ("r.jsonl", (LINES + '{"instruction": "a", "output": 42}').encode(), "must be text, not int"),
    "list": ("r.jsonl", (LINES + '{"instruction": "a", "output": ["x", 2]}').encode(), "holds pairs|must be"),
    "bool": ("r.jsonl", (LINES + '{"instruction": "a", "output": true}').encode(), "must be text, not bool"),
    "NaN": ("r.jsonl", (LINES + '{"instruction": "a", "output": NaN}').encode(), "NaN is not JSON"),
    "depth": ("r.jsonl", (LINES + '{"a": ' + "["*2000 + "]"*2000 + "}").encode(), "nested too deep"),
    "NUL": ("r.jsonl", (LINES + '{"instruction": "a\\u0000", "output": "b"}').encode(), "NUL"),
    "half a surrogate": ("r.jsonl", (LINES + '{"instruction": "\\ud83d", "output": "b"}').encode(), "surrogate"),
    "a million columns": ("r.jsonl", ("{" + ", ".join(f'"{word(i)}": 0' for i in range(10**6)) + "}").encode(),
        "no column 'instruction' .there are: .* and 999988 other names"),
    "a row of 40 MB": ("r.jsonl", f'{GOOD}\n{{"instruction": "{"x"*40_000_000}", "output": "y"}}\n'.encode(),
        "longer than 16 MiB"),
    "a bomb": ("r.jsonl.gz", gzip.compress(b'{"a": "' + b"x"*200_000_000), "unpacks to more than 100 times"),
    "empty": ("r.jsonl", b"", "is empty"),
    "blank": ("r.json", b" \n ", "is empty"),
}


def memory(what):
    "VmRSS, or VmHWM, the most since `forget`, of this process [KiB]; 0 where the system does not tell."
    status = Path("/proc/self/status")
    return next((int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(what)), 0) if (
        status.exists()) else 0


def forget():
    "Let the most memory be counted from here, whatever earlier tests of this process took; what it has now."
    try: Path("/proc/self/clear_refs").write_text("5")
    except OSError: return memory("VmHWM")                    # then it is what comes on top that counts
    return memory("VmRSS")


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_named_or_whole(what, tmp_path):
    "Accepted with every row, or one sentence with file, line and byte; never a part of it."
    import re
    name, data, expected = BROKEN[what]
    (tmp_path/name).write_bytes(data)
    source, = find_sources(str(tmp_path/name))
    before = forget()
    if isinstance(expected, int):
        _, account = load_examples(source)
        assert account.read == expected == account.kept + account.rejected.total()
    else:
        with pytest.raises(UserError) as raised: load_examples(source, "sft")
        assert re.search(expected, str(raised.value)) and name in str(raised.value), raised.value
        assert len(str(raised.value)) < 500
    assert memory("VmHWM") - before < 2**20*(1.5 if "million" in what else 1)


def test_types_are_kept(tmp_path):
    "What looks like a date stays text, a long number stays exact."
    (tmp_path/"r.jsonl").write_text('{"instruction": "When?", "output": "2021-02-03", "id": 12345678901234567890123}\n')
    row, = read_file(tmp_path/"r.jsonl")
    assert row.data["id"] == 12345678901234567890123
    assert load_examples(find_sources(str(tmp_path/"r.jsonl"))[0])[0][0].turns[1].text == "2021-02-03"


def conversation(*roles):
    return json.dumps({"conversations": [{"from": r, "value": f"{r} {i}"} for i, r in enumerate(roles)]})


def test_wrong_turns_are_counted(tmp_path):
    "Only a system text, two questions, odd roles, nothing asked: each counted by its reason."
    file = tmp_path/"talks.jsonl"
    file.write_text("\n".join([conversation("human", "gpt"), conversation("system"), conversation("human", "human", "gpt"),
        conversation("gpt", "human"), conversation("human"), conversation()]))
    (tmp_path/"dataset_info.json").write_text(json.dumps({"t": {"file_name": "talks.jsonl", "formatting": "sharegpt"}}))
    _, account = load_examples(find_sources("t", str(tmp_path))[0], "sft")
    assert (account.kept, dict(account.rejected)) == (1, {"empty_prompt": 2, "wrong_order": 3})


def test_long_rows_keep_their_label(tmp_path, tiny):
    "A question or an answer as long as the cutoff; no row without a trained token."
    words = "fever and cough "*200
    rows = [(words, "Rest."), ("Fever?", words), (words, words), ("Fever?", "Rest.")]
    examples = [Example((Turn("user", q), Turn("assistant", a)), where=f"f, line {i}") for i, (q, a) in enumerate(rows)]
    for overlong, used in (("truncate_prompt", 2), ("reject", 1), ("truncate_answer", 4)):
        from medllm.data.accounts import Account
        account = Account("x", read=4, kept=4)
        kept = tokenise(examples, Renderer(tiny, "chatml"), 128, account, overlong)
        assert len(kept) == used == account.used
        assert all((kept[i]["labels"][1:] != -100).any() for i in range(len(kept)))


PLACES = {"../r.jsonl": "leaves the folder", "/etc/hostname": "leaves the folder", "link.jsonl": "leaves the folder",
    "pipe.jsonl": "does not exist", "file:///etc/hostname": "use cloud_file_name", "http://x.org/r.jsonl": "use cloud_file_name"}


@pytest.mark.parametrize("place", PLACES)
def test_a_registry_reads_its_own_folder_only(place, tmp_path):
    (tmp_path/"link.jsonl").symlink_to("/etc/hostname")
    os.mkfifo(tmp_path/"pipe.jsonl")
    (tmp_path/"dataset_info.json").write_text(json.dumps({"x": {"file_name": place}}))
    with pytest.raises(UserError, match=PLACES[place]): find_sources("x", str(tmp_path))


def test_a_promised_hash_is_held(tmp_path):
    "A mismatch names both hashes."
    (tmp_path/"r.jsonl").write_text(LINES)
    right = hashlib.sha256(LINES.encode()).hexdigest()
    entry = {"file_name": "r.jsonl", "file_sha256": "0"*64}
    (tmp_path/"dataset_info.json").write_text(json.dumps({"x": entry}))
    with pytest.raises(UserError) as raised: find_sources("x", str(tmp_path))
    assert right in str(raised.value) and "0"*64 in str(raised.value)


@pytest.mark.parametrize("what", ["all rejected", "empty", "mixed"])
def test_nothing_to_train_on_is_one_sentence(what, tmp_path, capfd):
    (tmp_path/"set").mkdir()
    (tmp_path/"set/a.jsonl").write_text({"empty": ""}.get(what, '{"instruction": "a", "output": ""}\n'))
    if what == "mixed": (tmp_path/"set/b.csv").write_text("instruction,output\na,b\n")
    assert main(["train", f"dataset={tmp_path}/set", f"output_dir={tmp_path}/out"]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and {"all rejected": "no row is left", "empty": "is empty", "mixed": "mixes"}[what] in errors[0]


def test_a_shared_question_is_said(tmp_path, capfd):
    from medllm.train.arguments import parse
    from medllm.train.inputs import prepare_data
    (tmp_path/"a.jsonl").write_text(LINES + '{"instruction": "Cough?", "output": "Drink."}\n')
    (tmp_path/"b.jsonl").write_text('{"instruction": "COUGH?", "output": "Wait."}\n{"instruction": "Pain?", "output": "Rest."}\n')
    data = prepare_data(parse({"dataset": f"{tmp_path}/a.jsonl", "eval_dataset": f"{tmp_path}/b.jsonl"}))
    assert list(data.findings.values()) == [1] and "1 of 2 validation rows" in capfd.readouterr().err


def test_skipped_rows_are_listed(tmp_path, capfd):
    "on_bad skip: the run goes on, rejects.jsonl names file, line and reason, and no text."
    rows = [json.dumps({"instruction": f"Question {i}?", "output": f"Answer {i}."}) for i in range(40)]
    (tmp_path/"r.jsonl").write_text("\n".join([*rows, "{", '{"instruction": "SECRET", "output": 7}']))
    words = [f"dataset={tmp_path}/r.jsonl", f"output_dir={tmp_path}/out", "max_steps=1", "on_bad=skip"]
    assert main(["train", *words]) == 2 and "2 of 42 rows are defective" in capfd.readouterr().err
    assert main(["train", *words, "max_bad=0.1"]) == 0
    lines = [json.loads(line) for line in (tmp_path/"out/rejects.jsonl").read_text().splitlines()]
    assert [(r["line"], r["reason"]) for r in lines] == [(41, "broken_json"), (42, "wrong_type")]
    assert "SECRET" not in (tmp_path/"out/rejects.jsonl").read_text()


# The same 7 rows, four of them bad, in every way that puts several rows on one line, and beside it in lines of their own.
ROWS = [{"instruction": "Q1?", "output": "A1."}, {"instruction": "Q2?", "output": ""}, {"instruction": "Q3?", "output": "A3."},
    {"instruction": "Q4?"}, {"instruction": "Q5?", "output": 7}, {"instruction": "Q6? " + "blah "*300, "output": "A6."},
    {"instruction": "Q7?", "output": "A7."}]
ONE_LINE = {
    "array": ("r.json", json.dumps(ROWS), "row {}"),
    "array, gzip": ("r.json.gz", gzip.compress(json.dumps(ROWS).encode()), "row {}"),
    "keyed": ("r.json", json.dumps({f"k{n}": row for n, row in enumerate(ROWS)}), "row {}"),
    "lines": ("r.jsonl", "\n".join(map(json.dumps, ROWS)), "line {}"),
    "array of lines": ("r.json", "[" + ",\n".join(map(json.dumps, ROWS)) + "]", "line {}")}


@pytest.mark.parametrize("what", ONE_LINE)
def test_every_row_has_a_place_of_its_own(what, tmp_path, chatml):
    "Also in a file of one line: what is rejected, cut or wrong is named by the row's number, and counted once."
    name, text, at = ONE_LINE[what]
    (tmp_path/name).write_bytes(text if isinstance(text, bytes) else text.encode())
    source, = find_sources(str(tmp_path/name))
    with pytest.raises(UserError, match=f"{name}, {at.format(4)}: no column 'output'"): load_examples(source)
    examples, account = load_examples(source, on_bad=OnBad("skip", 5))
    kept = tokenise(examples, chatml, 64, account, "reject", batch=2, on_bad=OnBad("skip", 5))
    account.close()
    assert [e.where for e in examples] == [f"{tmp_path}/{name}, {at.format(n)}" for n in (1, 3, 6, 7)]
    assert (len(kept), account.kept) == (3, 3)
    reasons = {2: "empty_answer", 4: "missing_column", 5: "wrong_type", 6: "longer_than_cutoff"}
    assert account.rejects == [(name, at.format(n), reason) for n, reason in reasons.items()]
    unit = at.split()[0]
    write_rejects([account], tmp_path/"rejects.jsonl")
    lines = [json.loads(line) for line in (tmp_path/"rejects.jsonl").read_text().splitlines()]
    assert [(r["file"], r[unit], r["reason"]) for r in lines] == [(name, n, reason) for n, reason in reasons.items()]


@pytest.mark.parametrize("what", ONE_LINE)
def test_the_gate_names_rows_of_one_line_apart(what, tmp_path):
    "Findings, and rows that repeat each other."
    name, _, at = ONE_LINE[what]
    rows = [{"instruction": "What helps against a mild fever at home?", "output": "Rest and fluids."}]*2 + [
        {"instruction": "Whom do I call?", "output": "Ring +44 20 7946 0958, or write to ann.lee@example.org."}]
    text = {"array": json.dumps(rows), "array, gzip": gzip.compress(json.dumps(rows).encode()),
        "keyed": json.dumps(dict(zip("1ab", rows))), "lines": "\n".join(map(json.dumps, rows)),
        "array of lines": "[" + ",\n".join(map(json.dumps, rows)) + "]"}[what]
    (tmp_path/name).write_bytes(text if isinstance(text, bytes) else text.encode())
    report = inspect(find_sources(str(tmp_path/name)))
    assert [p["where"] for p in report.findings["personal_strong"].places] == [f"{name}, {at.format(3)}"]
    assert [(report.place(a), report.place(b)) for a, b in report.repeats["duplicate_pairs"]] == [
        (f"{name}, {at.format(2)}", f"{name}, {at.format(1)}")]


def test_rows_without_lines_are_numbered(tmp_path):
    "Parquet and Arrow files."
    import pyarrow as pa
    import pyarrow.parquet
    pa.parquet.write_table(pa.Table.from_pylist([{"text": "a"}, {"text": "b"}]), tmp_path/"r.parquet")
    assert [row.where for row in read_file(tmp_path/"r.parquet")] == [f"{tmp_path}/r.parquet, row {n}" for n in (1, 2)]


@pytest.mark.parametrize("rows, group", [(2500, 700), (30, 7), (30, 1), (30, 30)])
def test_parquet_of_any_row_groups_is_read(tmp_path, rows, group):
    "Conversations, whose texts each group lists in a dictionary of its own."
    import pyarrow as pa
    import pyarrow.parquet
    said = [[{"role": "user", "content": f"Fever for {k} days?"}, {"role": "assistant", "content": "Rest."}] for k in range(rows)]
    for table in ({"messages": said}, {"messages": said, "tags": [["a", f"b{k}"] for k in range(rows)]}):
        pa.parquet.write_table(pa.table(table), tmp_path/"r.parquet", row_group_size=group)
        read = list(read_file(tmp_path/"r.parquet"))
        assert [row.data["messages"] for row in read] == said and [row.number for row in read] == list(range(1, rows + 1))


@given(st.one_of(st.binary(max_size=400), st.text(max_size=200).map(str.encode), st.lists(st.sampled_from(
    [b'{"instruction": "a", "output": "b"}', b"\n", b"\r", b"[", b"]", b",", b'"', b"{", b"}", b"\xff", b"\x00", b'"a": 1',
     "高".encode(), b"1e999", b"\\ud800", b"\xef\xbb\xbf", b"\xff\xfe"]), max_size=14).map(b"".join)),
    st.sampled_from([".json", ".jsonl", ".csv", ".tsv", ".txt", ".jsonl.gz"]))
def test_any_bytes_give_rows_or_one_error(tmp_path_factory, data, suffix):
    "Rows, `Bad`s, or a UserError; nothing else, and no hang."
    file = tmp_path_factory.getbasetemp()/f"any{suffix}"
    file.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    start = time.perf_counter()
    with contextlib.suppress(UserError):
        for row in read_file(file): assert isinstance(row, Bad) or all(isinstance(k, str) for k in row.data)
    assert time.perf_counter() - start < 2


plain = st.one_of(st.none(), st.text(max_size=20), st.integers(), st.booleans(), st.floats(allow_nan=False, allow_infinity=False))
values = st.recursive(plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=4)
roles = st.sampled_from(["human", "gpt", "system", "observation", "function_call"]) | values
talks = st.lists(st.tuples(roles, st.text(max_size=5) | values), max_size=5)
rows = st.one_of(
    st.fixed_dictionaries({"instruction": values}, optional={"output": values, "input": values, "history": values}),
    talks.map(lambda t: {"conversations": [{"from": r, "value": v} for r, v in t]}))


@given(st.lists(rows, min_size=1, max_size=8))
def test_every_row_has_one_fate(tmp_path_factory, chatml, some):
    "Rows read = kept + truncated + rejected, each reason from the closed list."
    file = tmp_path_factory.getbasetemp()/"fates.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in some))
    examples, account = load_examples(find_sources(str(file))[0], on_bad=OnBad("skip", 100))
    assert len({e.where for e in examples}) == account.kept
    on_bad = OnBad("skip", 100)
    kept = tokenise([e for e in examples if e.turns[-1].role != "user"], chatml, 24, account, on_bad=on_bad)
    assert len(kept) >= account.used and (len(kept) == account.used or any(e.worse for e in examples))
    assert account.read == len(some) == account.kept + account.truncated.total() + account.rejected.total()
    assert account.kept >= 0 and set(account.rejected) <= set(REASONS) and len(account.rejects) == account.rejected.total()


@given(st.lists(st.tuples(st.text("ab 高。", min_size=1, max_size=300), st.text("cd 血?", min_size=1, max_size=40)),
    min_size=1, max_size=4), st.integers(24, 160))
def test_truncation_keeps_the_answer(tiny, chatml, talk, cutoff):
    "What is kept at any cutoff ends with the whole answer and its EOS, both trained."
    from medllm.data.accounts import Account
    account = Account("x", read=1, kept=1)
    turns = [Turn(role, text) for q, a in talk for role, text in (("user", q.strip() or "q"), ("assistant", a.strip() or "a"))]
    kept = tokenise([Example(tuple(turns), where="f, line 1")], chatml, cutoff, account)
    account.close()
    assert len(kept) == account.used
    if len(chatml.encode([Example(tuple(turns))])[0][0]) <= cutoff: assert account.kept == 1     # what fits is not touched
    last = Example((turns[-2]._replace(text="q"), turns[-1]))
    if len(chatml.encode([last])[0][0]) > cutoff: assert account.rejected["longer_than_cutoff"] == 1
    for i in range(len(kept)):
        row = kept[i]
        assert len(row["input_ids"]) <= cutoff
        trained = tiny.decode(row["labels"][row["labels"] != -100])
        assert trained.endswith(turns[-1].text + "<|im_end|>")


def test_a_million_columns_do_not_flood_the_terminal(tmp_path):
    "As a process, the way a user sees it: with the names, which the user must find the right one of."
    (tmp_path/"r.csv").write_text("张三,hypertension," + ",".join(map(str, range(10**6))) + "\nx,y\n")
    done = subprocess.run([sys.executable, "-m", "medllm.train", f"dataset={tmp_path}/r.csv"], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr) < 2000, done.stderr[-2000:]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("row, names", [({"data": ["问：发烧怎么办？"]}, "data"),
    ({"Question": "Gout?", "Complex_CoT": "Hm.", "Response": "No."}, "Question, Complex_CoT, Response"),
    ({"张三": "x", "answer": "y", "z"*99: "z"}, "张三, answer, " + "z"*40 + "…")])
def test_a_missing_column_names_those_that_are_there(row, names, kept, tmp_path, monkeypatch):
    "To the person at the terminal; what is kept in a record has those in common use only, and how many others there are."
    (tmp_path/"r.json").write_text(json.dumps([row]))
    if kept: monkeypatch.setenv("MEDLLM_RECORDED", "1")
    with pytest.raises(UserError) as raised: load_examples(find_sources(str(tmp_path/"r.json"))[0])
    usual = [n for n in row if n.lower() in ("question", "answer", "response")]
    said = ", ".join(usual) if kept else names
    assert f"line 1: no column 'instruction' (there are: {said}" in str(raised.value)
    assert not kept or f"{len(row) - len(usual)} other name" in str(raised.value) and "张三" not in str(raised.value)


def test_what_a_run_notebook_keeps_names_no_column(tmp_path):
    "As processes: the kernel of a record says less than the command that a person calls."
    (tmp_path/"r.json").write_text(json.dumps([{"Complex_CoT": "x"}]))
    done = run("medllm", "run", "sft", "-p", "dataset", tmp_path/"r.json", "--runs", tmp_path/"runs")
    assert done.returncode and "there are: 1 other name, shown by medllm data preview" in done.stderr, done.stderr
    kept = [f for f in (tmp_path/"runs").rglob("*") if f.is_file()]
    assert kept and not any(b"Complex_CoT" in f.read_bytes() for f in kept)
    done = run("medllm", "data", "preview", tmp_path/"r.json", "--model", "tiny")
    assert "missing_column: no column 'instruction' (there are: Complex_CoT)" in done.stdout
