"""A model that is served elsewhere: our own server, and a stand-in that is busy, broken or wrong."""
import contextlib
import http.server
import json
import threading
import time

import pytest
from commands import run

from medllm.core import UserError
from medllm.data.formats import Turn
from medllm.models.chat import ModelChoice, load_chat_model
from medllm.models.endpoint import Endpoint, EndpointModel
from medllm.models.sampling import Sampling


class StandIn(http.server.BaseHTTPRequestHandler):
    "Answers with what `plan` gives for the number of the request; by default a word each."
    def log_message(self, *words): pass

    def send(self, code, value):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self): self.send(200, {"object": "list", "data": [{"id": "served-7b", "object": "model"}]})

    def do_POST(self):
        server = self.server
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append(asked | {"authorization": self.headers.get("Authorization")})
            number = len(server.asked)
            server.now += 1
            server.most = max(server.most, server.now)
        time.sleep(server.wait)
        with server.lock: server.now -= 1
        self.send(*server.plan(number, asked))


def reply(text, why="stop", **more):
    message = {"role": "assistant", "content": text}
    return 200, {"choices": [{"index": 0, "message": message, "finish_reason": why}], "model": "served-7b",
        "object": "chat.completion", "usage": {"completion_tokens": 3, "prompt_tokens": 5, "total_tokens": 8}} | more


@contextlib.contextmanager
def stand_in(plan=lambda n, asked: reply(f"about {asked['messages'][-1]['content'][:20]}"), wait=0.0):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn) as server:
        server.plan, server.asked, server.wait, server.now, server.most = plan, [], wait, 0, 0
        server.lock = threading.Lock()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        yield server
        server.shutdown()


def ask(server, n=1, **how):
    chat = EndpointModel(Endpoint(server.url, **how))
    return chat.answers([chat.prompt([Turn("user", f"question {i}")]) for i in range(n)], Sampling(8, 0.0), range(n))


def test_many_are_asked_at_once_and_answers_keep_their_order():
    with stand_in(wait=0.05) as server:
        said = ask(server, 40, concurrency=10)
        assert [a.text for a in said] == [f"about question {i}" for i in range(40)]
        assert 4 < server.most <= 10 and all(a.ended and len(a.tokens) == 3 for a in said)


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_busy_server_is_asked_again(code):
    with stand_in(lambda n, asked: (code, {}) if n <= 2 else reply("at last")) as server:
        assert ask(server)[0].text == "at last" and len(server.asked) == 3


@pytest.mark.parametrize("name,plan,says", [
    ("gone wrong", lambda n, asked: (500, {"error": "PATIENT TEXT"}), "HTTP 500, asked 2 times"),
    ("no key", lambda n, asked: (401, {"error": "PATIENT TEXT"}), "--endpoint_api_key env:NAME"),
    ("too long", lambda n, asked: (400, {"error": "PATIENT TEXT"}), "may be too long for the model"),
    ("no choices", lambda n, asked: (200, {"choices": []}), "without an answer in it"),
    ("null", lambda n, asked: reply(None), "without an answer in it"),
    ("a number", lambda n, asked: reply(7), "without an answer in it"),
    ("no JSON", lambda n, asked: (200, b"<html>PATIENT TEXT"), "the endpoint http://127.0.0.1"),
    ("a list", lambda n, asked: (200, [1, 2]), "without an answer in it")])
def test_a_broken_server_is_one_sentence(name, plan, says):
    with stand_in(plan) as server, pytest.raises(UserError) as told: ask(server, attempts=2)
    assert says in str(told.value) and "\n" not in str(told.value) and "PATIENT" not in str(told.value)


@pytest.mark.parametrize("why,message,text,ended", [
    ("length", {"content": "half of"}, "half of", False),
    ("length", {"content": None}, "", False),                                       # it only thought
    ("stop", {"content": None, "reasoning_content": "First …"}, "", False),
    ("stop", {"content": None, "refusal": "I cannot help."}, "I cannot help.", True),   # as OpenAI gives a refusal
    ("stop", {"content": [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]}, "in parts", True),
    ("eos", {"content": "whole"}, "whole", True),
    ("content_filter", {"content": None}, "", False)])
def test_replies_of_many_servers(why, message, text, ended):
    code, whole = reply("")
    whole["choices"][0] |= {"message": {"role": "assistant"} | message, "finish_reason": why}
    with stand_in(lambda n, asked: (code, whole)) as server: said = ask(server)[0]
    assert (said.text, said.ended, said.refused) == (text, ended, "content_filter" if why == "content_filter" else "")


def one_refused(n, asked):
    return (400, {"error": "PATIENT TEXT"}) if asked["messages"][-1]["content"] == "question 5" else reply("yes")


def test_a_question_that_a_server_refuses_takes_no_other_with_it(capsys):
    with stand_in(one_refused) as server: said = ask(server, 40)
    assert [n for n, a in enumerate(said) if a.refused] == [5] and said[5].text == "" and not said[5].ended
    assert sum(a.text == "yes" for a in said) == 39
    told = capsys.readouterr().err
    assert "refused 1 of 40 questions" in told and "PATIENT" not in told


def test_a_server_that_takes_no_system_text_is_a_sentence():
    "Else every question would be refused by itself, and the job would end well without an answer."
    def plan(n, asked): return (400, {}) if asked["messages"][0]["role"] == "system" else reply("yes")
    with stand_in(plan) as server, pytest.raises(UserError, match="refuses the question"):
        chat = EndpointModel(Endpoint(server.url), "You are a doctor.")
        chat.answers([chat.prompt([Turn("user", f"question {i}")]) for i in range(3)], Sampling(8, 0.0))


def test_a_probe_that_fails_for_a_while_is_made_again():
    down = [True]
    def plan(n, asked):
        if asked["messages"][-1]["content"] == "Hello" and down[0]: return 500, {}
        return one_refused(n, asked)
    with stand_in(plan) as server:
        chat = EndpointModel(Endpoint(server.url, attempts=1))
        questions = [chat.prompt([Turn("user", f"question {i}")]) for i in range(8)]
        with pytest.raises(UserError): chat.answers(questions, Sampling(8, 0.0))
        down[0] = False
        assert sum(bool(a.refused) for a in chat.answers(questions, Sampling(8, 0.0))) == 1


def test_the_key_is_named_and_never_written(monkeypatch, tmp_path):
    monkeypatch.setenv("SERVER_KEY", "abcdefgh12345678")
    with stand_in() as server:
        ask(server, key="env:SERVER_KEY")
        assert server.asked[0]["authorization"] == "Bearer abcdefgh12345678"
        with pytest.raises(UserError, match="env:NAME"): Endpoint(server.url, key="abcdefgh12345678")
        with pytest.raises(UserError, match="ABSENT is not set"): EndpointModel(Endpoint(server.url, key="env:ABSENT"))


@pytest.mark.parametrize("flag,value", [("adapter_name_or_path", "out"), ("quantization_bit", 4), ("template", "llama3")])
def test_what_only_a_loaded_model_has_is_refused(flag, value):
    with pytest.raises(UserError, match=f"--{flag}"): ModelChoice(endpoint="http://127.0.0.1:9/v1", **{flag: value}).resolved()


def questions(folder, n=30):
    (folder/"questions.json").write_text(json.dumps([{"instruction": f"question {i}"} for i in range(n)]))
    return folder/"questions.json"


def test_predict_goes_on_where_a_server_broke_off(tmp_path):
    words = ["predict", "--dataset", questions(tmp_path, 80), "--output", tmp_path/"answers.jsonl", "--endpoint"]
    with stand_in(lambda n, asked: reply("yes") if n <= 40 else (400, {})) as server:
        done = run("medllm", *words, server.url)
        assert done.returncode == 2 and "gave no answer" in done.stderr and "Traceback" not in done.stderr
    port = server.server_port
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), StandIn) as again:
        again.plan, again.asked, again.wait, again.now, again.most = lambda n, asked: reply("yes"), [], 0, 0, 0
        again.lock = threading.Lock()
        threading.Thread(target=again.serve_forever, daemon=True).start()
        done = run("medllm", *words, server.url)
        again.shutdown()
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path/"answers.jsonl").read_text().splitlines()]
    assert len(rows) == 80 and {r["answer"] for r in rows} == {"yes"} and {r["answered_by"] for r in rows} == {"served-7b"}
    assert len(again.asked) < 70                                       # answers were written down one after the other
    assert rows[0]["header"]["model"] == "served-7b"


def test_predict_writes_down_why_a_server_gave_no_answer(tmp_path):
    words = ["predict", "--dataset", questions(tmp_path, 40), "--output", tmp_path/"answers.jsonl", "--endpoint"]
    with stand_in(one_refused) as server:
        done = run("medllm", *words, server.url)
        assert done.returncode == 0 and "PATIENT" not in done.stdout + done.stderr, done.stderr
        assert len(server.asked) == 41                                 # each once, and one to see whose fault it is
    rows = [json.loads(line) for line in (tmp_path/"answers.jsonl").read_text().splitlines()]
    assert [r["row"] for r in rows if r["answer"] is None] == [5] and rows[5]["skipped"] == "endpoint_refuses"


def test_evaluate_reads_written_answers_and_refuses_likelihoods(tmp_path):
    with stand_in(lambda n, asked: reply("The answer is A.")) as server:
        done = run("medllm", "evaluate", "mm_mcq", "--endpoint", server.url, "--scorer", "generate", "--limit", "20", "--output",
            tmp_path/"report")
        assert done.returncode == 0, done.stderr
        done = run("medllm", "evaluate", "mm_mcq", "--endpoint", server.url)
        assert done.returncode == 2 and "an endpoint gives no probabilities" in done.stderr
    report = next((tmp_path/"report").rglob("evaluation.json"))
    facts = json.loads(next((tmp_path/"report").rglob("*.facts.json"), report).read_text())
    assert server.url in json.dumps(facts) and "served-7b" in json.dumps(facts)


def test_safety_and_knowledge_are_asked_too(tmp_path):
    with stand_in(lambda n, asked: reply("I'm sorry, I cannot help with that.")) as server:
        done = run("medllm", "run", "evaluate", "-p", "endpoint", server.url, "-p", "dataset", "", "-p", "tasks",
            json.dumps({"safe": {"kind": "safety", "dataset": "mm_safety", "limit": 8}}), "-p", "output_dir", tmp_path/"record")
        assert done.returncode in (0, 1) and (tmp_path/"record/evaluation.json").exists(), done.stderr
        (tmp_path/"notes.txt").write_text("Metformin lowers blood sugar by making the liver release less of it.\n")
        done = run("medllm", "knowledge", "ask", tmp_path/"notes.txt", "-q", "How does metformin lower blood sugar?",
            "--endpoint", server.url)
        assert done.returncode == 0 and "cannot help" in done.stdout, done.stderr
    assert json.loads((tmp_path/"record/run.json").read_text())["status"] == "completed"


@pytest.fixture(scope="module")
def own():
    "Our own server with the tiny model, in a process of its own."
    import re
    import tempfile

    from commands import start, wait
    pytest.importorskip("fastapi")
    with tempfile.TemporaryDirectory() as d:
        from pathlib import Path
        told = Path(d)/"told"
        process = start("medllm", "serve", "--port", "0", err=told)
        wait(lambda: re.search(r"http://127\.0\.0\.1:\d+", told.read_text()), process)
        yield re.search(r"http://127\.0\.0\.1:\d+", told.read_text())[0] + "/v1"
        process.terminate()
        process.wait(60)


def test_our_own_server_gives_the_answers_of_the_model_loaded_here(own):
    "Greedy, the prompt written there by the same template."
    here, there = load_chat_model(), load_chat_model(ModelChoice(endpoint=own))
    talks = [[Turn("user", text)] for text in ("What is asthma?", "高血压患者平时应该注意什么？", "Can I stop my insulin?")]
    expected = here.answers([here.prompt(t) for t in talks], Sampling(16, 0.0))
    said = there.answers([there.prompt(t) for t in talks], Sampling(16, 0.0))
    assert [(a.text, a.ended) for a in said] == [(a.text, a.ended) for a in expected]
    assert there.facts()["answered_by"] == ["tiny"]
