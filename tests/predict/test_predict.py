"""A file of questions answered: killed and gone on with, by both commands, with nothing repeated and nothing lost."""
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from commands import BIN, ROOT, run, start, wait

from medllm.core import UserError
from medllm.data.registry import find_sources
from medllm.models.sampling import Sampling
from medllm.predict.predict import predict, read_questions

LENGTH, ROWS = 24, 40
SETTINGS = ("max_new_tokens", "temperature", "top_p", "top_k")


def words(output, dataset="mm", *more):
    return [str(BIN/"medllm"), "predict", "--dataset", str(dataset), "--max_samples", str(ROWS), "--max_new_tokens", str(LENGTH),
        "--temperature", "0.9", "--batch_size", "4", "--output", str(output), *more]


def lines(file): return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The file of a run that nobody disturbed."
    output = tmp_path_factory.mktemp("whole")/"answers.jsonl"
    done = run(*words(output))
    assert done.returncode == 0, done.stderr
    return output


def test_killed_then_stopped_and_gone_on_with(tmp_path, whole):
    "The file is the one of an undisturbed run, to the byte; no row is answered twice."
    output, part, sizes = tmp_path/"answers.jsonl", tmp_path/"answers.jsonl.part", []
    for how, least in ((signal.SIGKILL, 2), (signal.SIGTERM, 5)):      # whole batches that must be there before the signal
        begun = start(*words(output), err=tmp_path/"said")
        wait(lambda: part.exists() and part.read_bytes().count(b"\n") > 4*least, begun)
        begun.send_signal(how)
        code, said = begun.wait(60), (tmp_path/"said").read_text()
        assert code == (-9 if how == signal.SIGKILL else 75), said
        if how == signal.SIGTERM: assert "the same command goes on there" in said
        (tmp_path/"said").unlink()
        sizes.append([line["row"] for line in lines(part) if "row" in line])
        with open(part, "ab") as f: f.write(b'{"row": 1, "whe')       # as a power cut would leave it
    assert sizes[1][:len(sizes[0])] == sizes[0] and len(set(sizes[1])) == len(sizes[1]) > len(sizes[0])
    assert run(*words(output)).returncode == 0
    assert output.read_bytes() == whole.read_bytes()
    assert not part.exists() and sorted(f.name for f in tmp_path.iterdir()) == ["answers.jsonl"]


def test_a_row_in_is_a_row_out(tmp_path, whole):
    rows = lines(whole)
    assert [r["row"] for r in rows] == list(range(ROWS))
    for r in rows:
        header = r["header"]
        assert {"job", "model", "adapter", "seed", "prompt_tokens", *SETTINGS} == set(header)
        assert (header["max_new_tokens"], header["temperature"], header["model"]) == (LENGTH, 0.9, "tiny")
        assert r["tokens"] <= LENGTH and r["ended"] == (r["tokens"] < LENGTH or r["ended"])
    assert len({r["header"]["seed"] for r in rows}) == ROWS and len({r["header"]["job"] for r in rows}) == 1


def test_neighbours_do_not_matter(tmp_path, whole, chat):
    "Other batches, the same answers; the header of a row is enough to draw it again."
    asked = read_questions(chat, find_sources("mm"), max_samples=ROWS)
    predict(asked, tmp_path/"other.jsonl", Sampling(LENGTH, .9), rows=7)
    assert [r["answer"] for r in lines(tmp_path/"other.jsonl")] == [r["answer"] for r in lines(whole)]
    for r in lines(whole)[::9]:
        how = Sampling(*(r["header"][k] for k in SETTINGS))
        assert chat.answers([asked.questions[r["row"]].prompt], how, [r["header"]["seed"]])[0].text == r["answer"]


def test_a_long_neighbour_does_not_shorten_an_answer(tmp_path, chat):
    "A prompt with little room for its answer is not in a batch with others."
    room = 6
    rows = [{"instruction": "What is asthma?"}, {"instruction": "fever "*((chat.longest - 60)//2)}]
    while len(chat.prompt(read_turns(rows[1]))) < chat.longest - room: rows[1]["instruction"] += "fever "
    (tmp_path/"in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = read_questions(chat, find_sources(str(tmp_path/"in.jsonl")))
    left = chat.longest - len(asked.questions[1].prompt)
    assert 0 < left <= room
    predict(asked, tmp_path/"out.jsonl", Sampling(12, 1.0), rows=8)
    short, long = lines(tmp_path/"out.jsonl")
    assert long["tokens"] <= left and (short["tokens"] == 12 or short["ended"])


def read_turns(row):
    from medllm.data.formats import Turn
    return [Turn("user", row["instruction"].strip())]


def test_what_cannot_be_asked_is_a_row_with_a_reason(tmp_path):
    (tmp_path/"in.jsonl").write_text('{"question": "What is asthma?", "id": 7}\n{"question": ""}\n{oops\n{"question": null}\n')
    done = run(*words(tmp_path/"out.jsonl", tmp_path/"in.jsonl"))
    assert done.returncode == 0, done.stderr
    rows = lines(tmp_path/"out.jsonl")
    assert [r.get("skipped") for r in rows] == [None, "empty_prompt", "broken_json", "empty_prompt"]
    assert rows[0]["id"] == 7 and rows[1]["answer"] is None and "asthma" not in json.dumps(rows)
    assert "1 of 4 rows answered" in done.stderr and "2 not asked (empty_prompt)" in done.stderr
    assert str(tmp_path) not in json.dumps(rows)                          # no folders either
    assert (tmp_path/"out.jsonl").stat().st_mode & 0o77 in (0o44, 0)


def test_one_writer_and_one_job(tmp_path, chat):
    asked, how, file = read_questions(chat, find_sources("mm"), max_samples=8), Sampling(4), tmp_path/"out.jsonl"
    def second(n):
        with pytest.raises(UserError, match="another process is writing"): predict(asked, file, how)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): predict(asked, file, how, rows=4, tell=second)
    with pytest.raises(UserError, match="begun with other things: .*sampling"): predict(asked, file, Sampling(5))
    with pytest.raises(UserError, match=r"seed \(42, now 1\)"): predict(asked, file, how, seed=1)
    other = read_questions(chat, find_sources("mm"), max_samples=9)
    with pytest.raises(UserError, match=r"rows \(8, now 9\)"): predict(other, file, how)
    assert predict(other, file, how, overwrite=True)["rows"] == 9


def test_a_full_disk_leaves_whole_batches(tmp_path, chat, monkeypatch):
    "A write that stops half-way is taken back, and the same command goes on."
    asked, how, file, write = read_questions(chat, find_sources("mm"), max_samples=8), Sampling(4), tmp_path/"out.jsonl", os.write
    sizes = []
    def full(handle, data):
        sizes.append(len(data))
        if len(sizes) < 3: return write(handle, data)
        if len(sizes) == 3: return write(handle, data[:100])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match="No space left.*the same command goes on"): predict(asked, file, how, rows=4)
    monkeypatch.setattr(os, "write", write)
    assert [r["row"] for r in lines(f"{file}.part")[1:]] and len(lines(f"{file}.part")) == 5
    assert predict(asked, file, how)["rows"] == 8


@pytest.mark.slow
def test_the_run_notebook_goes_on_in_its_folder(tmp_path):
    "medllm run predict, killed with its kernel, then medllm runs resume: one complete file, two attempts."
    given = dict(max_samples=60, max_new_tokens=40, batch_size=2, output_dir=tmp_path/"r")
    given = [word for name, value in given.items() for word in ("-p", name, str(value))]
    part = tmp_path/"r/predictions.jsonl.part"
    begun = subprocess.Popen([str(BIN/"medllm"), "run", "predict", *given], cwd=ROOT, stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, start_new_session=True)
    wait(lambda: part.exists() and part.read_bytes().count(b"\n") > 8, begun)
    os.killpg(begun.pid, signal.SIGKILL)
    begun.wait(timeout=60)
    beat = json.loads((tmp_path/"r/heartbeat.json").read_text())
    try: os.kill(beat["pid"], signal.SIGKILL)             # the kernel has a session of its own
    except ProcessLookupError: pass
    (tmp_path/"r/heartbeat.json").write_text(json.dumps(beat | {"time": beat["time"] - 60}))      # instead of waiting
    before = [r["row"] for r in lines_so_far(part)]
    done = run("medllm", "runs", "resume", tmp_path/"r")
    assert done.returncode == 0, done.stderr
    rows = lines(tmp_path/"r/predictions.jsonl")
    assert [r["row"] for r in rows] == list(range(60)) and not part.exists()
    state = json.loads((tmp_path/"r/run.json").read_text())
    assert state["status"] == "completed" and state["attempts"][0]["status"] == "lost"
    assert (state["metrics"]["rows"], state["metrics"]["answered"]) == (60, 60)
    assert state["inputs"]["rows"][0]["read"] == 60 and len(before) >= 8
    history = [json.loads(line)["rows"] for line in (tmp_path/"r/history.jsonl").read_text().splitlines()]
    assert history == sorted(set(history)) and history[-1] == 60           # no batch was counted twice


def lines_so_far(part): return [json.loads(s) for s in part.read_text(encoding="utf-8").split("\n")[1:-1]]


def test_real_questions(tmp_path, shared, chat):
    "Chinese questions of a real file without answers, and ShareGPT conversations with a system message."
    for path, rows in (("data/huatuo_llama/question.json", 200), ("data/medicalgpt/medical_sft_1K_format.jsonl", 300),
            ("data/pubmedqa/ori_pqal.json", 30)):
        columns = "prompt=QUESTION" if "pubmedqa" in path else ""
        asked = read_questions(chat, find_sources(str(shared(path))), columns, max_samples=rows)
        assert len(asked.questions) == rows == sum(q.prompt is not None for q in asked.questions)
    assert predict(asked, tmp_path/"out.jsonl", Sampling(4))["answered"] == 30


def test_line_separators_within_a_text(tmp_path, chat):
    "JSON does not escape U+2028, and Python takes it for the end of a line."
    file, output = tmp_path/"q.jsonl", tmp_path/"a.jsonl"
    row = {"id": "a\u2028b\u0085c", "instruction": "What is asthma?", "input": "", "output": ""}
    file.write_text(json.dumps(row), encoding="utf-8")
    asked = read_questions(chat, find_sources([str(file)], "data"))
    assert predict(asked, output, Sampling(4, 0.0))["rows"] == 1
    assert predict(asked, output, Sampling(4, 0.0))["rows"] == 1       # and again, finished
