"""The server: OpenAI's own client, and the faults that a server in a clinic must stand."""
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from commands import BIN, ROOT

pytest.importorskip("fastapi", reason="fastapi is not here: see dev_requirements")
pytest.importorskip("uvicorn", reason="uvicorn is not here: see dev_requirements")

from medllm.cli.main import main  # noqa: E402
from medllm.data.formats import Turn  # noqa: E402
from medllm.models.chat import ChatModel, load_chat_model  # noqa: E402
from medllm.models.sampling import Sampling  # noqa: E402
from medllm.serve.guard import Keys  # noqa: E402
from medllm.serve.protocol import Limits, read_request  # noqa: E402
from medllm.serve.queue import AnswerQueue  # noqa: E402
from medllm.serve.server import Service  # noqa: E402
from medllm.serve.lifecycle import ServeChoice, build_service, running  # noqa: E402

JSON = {"Content-Type": "application/json"}
KEY = "one-key-for-the-ward"
BEARER = {"Authorization": f"Bearer {KEY}"}
ASTHMA = {"model": "tiny", "messages": [{"role": "user", "content": "What is asthma?"}], "max_tokens": 8, "temperature": 0}
LONG = ASTHMA | {"max_tokens": 900, "stream": True}


@contextlib.contextmanager
def house(chat, rows=4, waiting=8, keys=(), limits=Limits(), **choice):
    "A server in a thread, its service and its log."
    lines = []
    service = Service(chat, AnswerQueue(chat, rows, waiting), "tiny", limits)
    with running(service, ServeChoice(port=0, **choice), Keys(keys), log=lines.append) as url: yield url, service, lines
    service.queue.close()


@contextlib.contextmanager
def process(folder, *flags, **env):
    "A server of its own: process, port, and the file that all it prints goes to."
    log = Path(folder)/"log.txt"
    with open(log, "w") as out: server = subprocess.Popen([BIN/"medllm", "serve", "--port", "0", *map(str, flags)], stdout=out,
        stderr=out, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | env)
    try:
        for _ in range(600):
            if "answers at" in log.read_text() or server.poll() is not None: break
            time.sleep(.1)
        yield server, int(log.read_text().partition("/v1;")[0].rpartition(":")[2]), log
    finally:
        server.kill()
        server.wait()


def request(url, method, path, body=None, **heads):
    "Status, headers and the body of an answer."
    line = http.client.HTTPConnection(str(url).removeprefix("http://"), timeout=60)
    try:
        line.request(method, path, json.dumps(body) if isinstance(body, dict) else body, JSON | heads)
        answer = line.getresponse()
        return answer.status, dict((k.lower(), v) for k, v in answer.getheaders()), answer.read()
    finally: line.close()


def post(url, body, path="/v1/chat/completions", **heads): return request(url, "POST", path, body, **heads)


def opened(url, body, key=""):
    "A socket that has asked for a stream and read its beginning."
    host, port = url.removeprefix("http://").split(":")
    sock, raw = socket.create_connection((host, int(port)), timeout=30), json.dumps(body).encode()
    sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        + f"Authorization: Bearer {key}\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw)
    assert sock.recv(1000).startswith(b"HTTP/1.1 200")
    return sock


def until(true, seconds):
    "Wait for something; whether it came in time."
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end: time.sleep(.005)
    return true()


def text_of(chat, question, tokens=8, temperature=0.0, seed=0):
    return chat.answers([chat.prompt([Turn("user", question)])], Sampling(tokens, temperature), [seed])[0].text


# The official client

@pytest.fixture(scope="module")
def client(chat):
    openai = pytest.importorskip("openai", reason="openai is not here: see dev_requirements")
    with house(chat, keys=[KEY]) as (url, service, lines):
        yield openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


@pytest.mark.smoke
def test_the_client_gets_answers(client, chat):
    question = "高血压患者平时应该注意什么？"
    messages = [{"role": "user", "content": question}]
    said = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0)
    assert said.choices[0].message.content == text_of(chat, question, 12) and said.choices[0].finish_reason == "length"
    assert said.usage.prompt_tokens == len(chat.prompt([Turn("user", question)])) and said.usage.completion_tokens == 12
    assert "Not medical advice" in said.disclaimer
    two = client.chat.completions.create(model="tiny", n=2, seed=7, max_completion_tokens=9, messages=[
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": [{"type": "text", "text": question}]}])
    prompt = chat.prompt([Turn("user", question)], "Be kind.")
    assert [c.message.content for c in two.choices] == [a.text for a in chat.answers([prompt]*2, Sampling(9), [7, 8])]


@pytest.mark.smoke
def test_the_client_gets_a_stream(client, chat):
    stream = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "孩子发烧？"}], max_tokens=30,
        temperature=.8, seed=3, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == text_of(chat, "孩子发烧？", 30, .8, 3) and len(chunks) > 5
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length" and chunks[-1].usage.completion_tokens == 30
    assert chunks[0].choices[0].delta.role == "assistant" and len({c.id for c in chunks}) == 1


def test_the_client_gets_completions_and_models(client, chat):
    said = client.completions.create(model="tiny", prompt=["Asthma is", "哮喘是"], max_tokens=6, temperature=0)
    ids = [chat.tokenizer(t).input_ids for t in ("Asthma is", "哮喘是")]
    assert [c.text for c in said.choices] == [a.text for a in chat.answers(ids, Sampling(6, 0.0))]
    chunks = list(client.completions.create(model="tiny", prompt="Asthma is", max_tokens=6, temperature=0, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == said.choices[0].text
    end = said.choices[0].text[-3:]
    cut = client.completions.create(model="tiny", prompt="Asthma is", max_tokens=6, temperature=0, stop=end)
    assert cut.choices[0].text == said.choices[0].text.partition(end)[0].strip() and cut.choices[0].finish_reason == "stop"
    assert [m.id for m in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").max_model_len == 1024


def test_the_client_gets_its_errors(client):
    import openai
    given = dict(model="tiny", messages=[{"role": "user", "content": "x"}])
    ask = lambda **more: client.chat.completions.create(**(given | more))
    with pytest.raises(openai.NotFoundError): ask(model="gpt-4")
    with pytest.raises(openai.BadRequestError) as e: ask(messages=[{"role": "user", "content": "fever "*3000}])
    assert e.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as e: ask(max_tokens=1020)
    assert e.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError): ask(tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.AuthenticationError): client.with_options(api_key="no-key-of-this-house").models.list()


# who may come in

@pytest.fixture(scope="module")
def keyed(chat):
    with house(chat, keys=[KEY, "another-key-for-the-lab"]) as (url, service, lines): yield url


@pytest.mark.parametrize("path", [
    "/", "/v1/models", "/v1/models/tiny", "/v1/chat/completions", "/docs", "/openapi.json", "/metrics", "/health/",
    "//health", "/v1/models?api_key=" + KEY, f"/?key={KEY}", "/health/../v1/models", "/%68ealth/x"])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "PUT"])
def test_s1_without_a_key(keyed, path, method):
    for heads in ({}, {"Authorization": "Bearer wrong-key-for-the-ward"}, {"Authorization": KEY}, {"X-Api-Key": KEY},
            {"Cookie": f"key={KEY}"}):
        status, told, body = request(keyed, method, path, **heads)
        assert status == 401 and json.loads(body)["error"]["code"] == "invalid_api_key" and KEY not in body.decode()
        assert "access-control-allow-origin" not in told and told["x-content-type-options"] == "nosniff"


def test_s1_with_a_key(keyed):
    assert request(keyed, "GET", "/health")[::2] == (200, b'{"status":"ok"}')
    assert request(keyed, "GET", "/v1/models", **BEARER)[0] == 200
    assert post(keyed, ASTHMA, **{"Authorization": "Bearer another-key-for-the-lab"})[0] == 200
    assert request(keyed, "GET", "/")[1]["www-authenticate"].startswith("Basic")                 # a browser asks its user
    import base64
    basic = {"Authorization": "Basic " + base64.b64encode(f"anna:{KEY}".encode()).decode()}
    status, told, body = request(keyed, "GET", "/", **basic)
    assert status == 200 and "script-src 'sha256-" in told["content-security-policy"] and b"<textarea" in body


@pytest.mark.parametrize("heads", [{"Host": "evil.example"}, {"Host": "127.0.0.1.evil.example:80"}, {"Origin": "http://evil.example"},
    {"Origin": "null"}], ids=str)
def test_a_page_from_elsewhere_gets_nothing(chat, keyed, heads):
    "DNS rebinding, and requests that another site's page makes."
    with house(chat) as (url, service, lines):
        assert post(url, ASTHMA, **heads)[0] == request(url, "GET", "/", **heads)[0] == 403
        assert post(keyed, ASTHMA, **heads)[0] in (401, 403)


# bodies that make no sense

BAD = {
    "n": dict(n=10**9), "n true": dict(n=True), "max_tokens -1": dict(max_tokens=-1), "max_tokens": dict(max_tokens=10**9),
    "max_tokens 1.5": dict(max_tokens=1.5), "temperature -1": dict(temperature=-1), "temperature hot": dict(temperature="hot"),
    "temperature list": dict(temperature=[1]), "top_p 0": dict(top_p=0), "top_p 2": dict(top_p=2), "top_k": dict(top_k=-1),
    "stop number": dict(stop=5), "stops": dict(stop=["x"]*10**5), "stop long": dict(stop="x"*100), "model": dict(model="gpt-4"),
    "model type": dict(model=["tiny"]), "messages text": dict(messages="hi"), "messages empty": dict(messages=[]),
    "messages null": dict(messages=None), "role": dict(messages=[{"role": "nurse", "content": "x"}]),
    "picture": dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}}]}]),
    "many": dict(messages=[{"role": "user", "content": "x"}]*999), "unknown field": dict(chat_template="{{ x }}"),
    "kwargs": dict(chat_template_kwargs={"enable_thinking": True}), "bias": dict(logit_bias={str(i): 1 for i in range(301)}),
    "format": dict(response_format={"type": "json_object"}), "stream": dict(stream="yes"), "seed": dict(seed=-5),
    "penalty": dict(presence_penalty=1), "logprobs": dict(logprobs=True),
    "surrogate": dict(messages=[{"role": "user", "content": "\ud800"}])}
RAW = {"empty": b"", "no JSON": b"{", "list": b"[]", "NaN": b'{"temperature": NaN}', "deep": b'{"a":' + b"["*200_000,
    "bad UTF-8": b'{"model": "\xff"}', "GBK": '{"model": "高血压"}'.encode("gbk"), "twice": b'{"model": "a", "model": "b"}',
    "digits": b'{"n": ' + b"9"*10_000 + b"}", "five megabytes": b" "*5*2**20}


def test_s2_nonsense_is_refused_at_once(chat):
    with house(chat) as (url, service, lines):
        seen = {}
        for name, body in {**{k: json.dumps(ASTHMA | v).encode() for k, v in BAD.items()}, **RAW}.items():
            best = 9
            for _ in range(3):                              # the best of three, so that a busy machine does not decide
                since = time.perf_counter()
                status, _, said = post(url, body)
                best = min(best, time.perf_counter() - since)
            seen[name] = status, best
            assert set(json.loads(said)["error"]) == {"message", "type", "param", "code"}, name
        assert {k: s for k, (s, _) in seen.items() if s not in (400, 404, 413)} == {}
        assert seen["five megabytes"][0] == 413 and seen["model"][0] == 404
        assert {k: t for k, (_, t) in seen.items() if t > .05} == {}
        assert post(url, ASTHMA, **{"Content-Type": "text/plain"})[0] == 415
        assert post(url, ASTHMA)[0] == 200 and service.queue.count == 0
        assert until(lambda: len(lines) == 3*len(seen) + 2, 5)


def test_a_body_without_a_length(chat):
    "Chunked, and longer than allowed: refused as soon as it is too long."
    with house(chat, limits=Limits(body=1000)) as (url, service, lines):
        status, _, said = post(url, iter([b"x"*600, b"x"*600]))
        assert status == 413 and json.loads(said)["error"]["code"] == "body_too_large"
        assert post(url, iter([json.dumps(ASTHMA).encode()]))[0] == 200


# clients that leave, that are slow, that are too many

def disconnects(url, times, count):
    "Open a stream, read its beginning, hang up; the longest that a question stayed behind."
    worst = 0
    for _ in range(times):
        opened(url, LONG).close()
        since = time.monotonic()
        assert until(lambda: count() == 0, 5)
        worst = max(worst, time.monotonic() - since)
    return worst


def test_s4_a_client_that_hangs_up(chat):
    with house(chat) as (url, service, lines):
        assert disconnects(url, 20, lambda: service.queue.count) < 1
        silent = http.client.HTTPConnection(url.removeprefix("http://"))                      # not a stream: the same
        silent.request("POST", "/v1/chat/completions", json.dumps(LONG | {"stream": False}), JSON)
        assert until(lambda: service.queue.count == 1, 5)
        silent.close()
        assert until(lambda: service.queue.count == 0, 1)
        assert post(url, ASTHMA)[0] == 200


def test_s5_slow_clients_hurt_nobody(chat):
    "One sends a byte at a time, one takes nothing of its answer: both are cut off, and others are served meanwhile."
    with house(chat, patience=1) as (url, service, lines):
        port = int(url.rpartition(":")[2])
        writer = socket.create_connection(("127.0.0.1", port))
        body = socket.create_connection(("127.0.0.1", port))
        body.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 999\r\n\r\n{")
        cut = {}
        def trickle(name, sock):
            since = time.monotonic()
            with contextlib.suppress(OSError):
                while time.monotonic() - since < 10:
                    sock.sendall(b"x")
                    time.sleep(.1)
            cut[name] = time.monotonic() - since
        slow = [threading.Thread(target=trickle, args=pair) for pair in (("head", writer), ("body", body))]
        for thread in slow: thread.start()
        for _ in range(10): assert post(url, ASTHMA)[0] == 200
        for thread in slow: thread.join()
        assert all(.5 < seconds < 6 for seconds in cut.values()), cut


def test_s5_a_reader_that_does_not_read():
    "uvicorn's transport stands still; the connection is reset after the server's patience."
    import asyncio

    import h11  # noqa: F401
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from medllm.serve.lifecycle import Patient
    async def meet():
        loop, aborted = asyncio.get_running_loop(), asyncio.Event()
        slow = type("P", (Patient, H11Protocol), {"patience": .1, "__init__": lambda self: None})()
        slow.loop, slow.transport = loop, type("T", (), {"abort": lambda self: aborted.set()})()
        slow.flow = type("F", (), {"pause_writing": lambda self: None, "resume_writing": lambda self: None})()
        slow.pause_writing()
        slow.resume_writing()
        await asyncio.sleep(.2)
        assert not aborted.is_set()                         # it read on in time
        slow.pause_writing()
        await asyncio.wait_for(aborted.wait(), 5)
    asyncio.run(meet())


def test_s6_a_full_queue(chat):
    with house(chat, rows=1, waiting=1) as (url, service, lines):
        busy = [opened(url, LONG)]
        waiting = threading.Thread(target=post, args=(url, LONG | {"max_tokens": 5}))
        waiting.start()
        assert until(lambda: service.queue.count == 2, 5)
        seconds = []
        for _ in range(5):
            since = time.perf_counter()
            status, told, said = post(url, ASTHMA)
            seconds.append(time.perf_counter() - since)
            assert status == 429 and 1 <= int(told["retry-after"]) <= 60 and json.loads(said)["error"]["code"] == "queue_full"
        assert min(seconds) < .1, seconds
        assert request(url, "GET", "/health")[0] == 200
        busy[0].close()
        waiting.join()
        assert post(url, ASTHMA)[0] == 200


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "A server in a process of its own, with a key: process, port and log."
    with process(tmp_path_factory.mktemp("server"), "--rows", 8, "--waiting", 24, MEDLLM_API_KEY=KEY) as parts: yield parts


def test_two_hundred_clients(alone):
    "All at once: each gets an answer or is asked to come back; the whole ones are the same."
    server, port, log = alone
    with ThreadPoolExecutor(200) as pool:
        came = list(pool.map(lambda i: timed(port, ASTHMA | {"stream": bool(i % 2)}), range(200)))
    codes = [status for status, *_ in came]
    assert set(codes) == {200, 429} and codes.count(200) >= 32, codes
    whole = {json.loads(said)["choices"][0]["message"]["content"] for i, (status, _, said, _) in enumerate(came)
        if status == 200 and not i % 2}
    streams = [said for i, (status, _, said, _) in enumerate(came) if status == 200 and i % 2]
    assert len(whole) == 1 and all(said.endswith(b"data: [DONE]\n\n") for said in streams)
    late = sorted(seconds for status, _, _, seconds in came if status == 429)
    print(f"{codes.count(200)} answered, {codes.count(429)} refused; the refusals took {late[len(late)//2]:.3f} s "
        f"(median), {late[-1]:.3f} s at most")
    assert request(f"127.0.0.1:{port}", "GET", "/health")[0] == 200


def timed(port, body):
    since = time.perf_counter()
    return *post(f"127.0.0.1:{port}", body, **BEARER), time.perf_counter() - since


# faults, company, silence

def test_s8_a_fault_in_the_model(chat):
    class Faulty:
        "The model, failing for a while when it is told to."
        def __init__(self, model): self.model, self.fail = model, 0
        def __getattr__(self, name): return getattr(self.model, name)
        def eval(self): return self
        def __call__(self, **inputs):
            if self.fail:
                self.fail -= 1
                raise RuntimeError("CUDA out of memory while reading: Anna Meier, 3 May 1961")
            return self.model(**inputs)
    class Named(Faulty, type(chat.model)): forward = type(chat.model).forward
    faulty = Named.__new__(Named)
    object.__setattr__(faulty, "__dict__", dict(chat.model.__dict__))
    faulty.__dict__["fail"], faulty.__dict__["model"] = 0, chat.model
    with house(ChatModel(faulty, chat.renderer)) as (url, service, lines):
        want = post(url, ASTHMA)[2]
        for stream in (False, True):
            faulty.__dict__["fail"] = 2                            # the first time and the second, alone
            status, _, said = post(url, ASTHMA | {"stream": stream})
            assert status == 500 and json.loads(said)["error"]["code"] == "model_error"
            assert b"Anna" not in said and b"CUDA" not in said and b"Traceback" not in said
            assert request(url, "GET", "/health")[2] == b'{"status":"ok"}'                        # one fault is no illness
            again = post(url, ASTHMA)
            assert again[0] == 200 and json.loads(again[2])["choices"] == json.loads(want)["choices"]
        faulty.__dict__["fail"] = 10**9
        for _ in range(2): assert post(url, ASTHMA)[0] == 500
        assert request(url, "GET", "/health")[::2] == (503, b'{"status":"failing"}')
        faulty.__dict__["fail"] = 0
        assert post(url, ASTHMA)[0] == 200 and request(url, "GET", "/health")[0] == 200
        assert not any("Anna" in line for line in lines) and service.queue.count == 0


def test_s9_company_changes_nothing(chat):
    "One prompt alone, and sixteen of unequal length together: the same answers, greedy and with seeds."
    questions = ["What is asthma? "*(i + 1) for i in range(16)]
    bodies = [ASTHMA | {"messages": [{"role": "user", "content": q}], "max_tokens": 40, "temperature": [0, .9][i % 2], "seed": i}
        for i, q in enumerate(questions)]
    with house(chat, rows=16, waiting=16) as (url, service, lines):
        said = lambda body: json.loads(post(url, body)[2])["choices"][0]["message"]["content"]
        alone = [said(body) for body in bodies]
        with ThreadPoolExecutor(16) as pool: together = list(pool.map(said, bodies))
    assert together == alone
    assert alone[3] == text_of(chat, questions[3].strip(), 40, .9, 3)


def test_s10_nothing_of_a_request_is_logged(alone):
    name = "Anna-Meier-1961"
    server, port, log = alone
    before = log.read_text().count(" POST ")
    url = f"127.0.0.1:{port}"
    body = ASTHMA | {"messages": [{"role": "user", "content": f"{name} has a fever"}], "user": name}
    assert post(url, body, **BEARER)[0] == 200
    assert post(url, body | {"stream": True}, **BEARER)[0] == 200
    for wrong in ({name: 1}, {"model": name}, {"temperature": name}, {"stop": [name]*99}, {"messages": name}):
        assert post(url, body | wrong, **BEARER)[0] in (400, 404)
    assert post(url, f'{{"{name}'.encode(), **BEARER)[0] == 400
    assert request(url, "GET", f"/{name}?q={name}", **BEARER)[0] == 404
    assert request(url, name.replace("-", ""), "/", **BEARER)[0] == 405
    assert request(url, "GET", "/", Authorization=f"Bearer {name}")[0] == 401
    assert request(url, "GET", "/v1/models", Origin=name, **BEARER)[0] == 403
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(f"{name} is no HTTP\r\n\r\n".encode())
        assert b"400" in sock.recv(1000)
    assert until(lambda: log.read_text().count(" POST ") == before + 8, 5)
    said = log.read_text()
    assert not any(word in said for word in ("fever", "Anna", "Meier", KEY)), said     # digits are in the ids of requests
    assert " POST /v1/chat/completions 200 " in said and " GET other 404 " in said and " OTHER / 405 " in said


# Faults that nobody raises: a broken model, control tokens, texts without end

@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    "A model folder of which one weight is no number."
    import torch

    from medllm.models.loading import load_model, load_tokenizer
    folder, model = tmp_path_factory.mktemp("broken")/"model", load_model("tiny")
    with torch.no_grad(): model.lm_head.weight[7] = torch.nan
    model.save_pretrained(folder)
    load_tokenizer("tiny").save_pretrained(folder)
    return folder


def test_a_model_without_numbers_answers_nobody(broken):
    from medllm.models.chat import ModelChoice
    service, lines = build_service(ModelChoice(str(broken)), ServeChoice(served_model_name="tiny")), []
    with running(service, log=lines.append) as url:
        ill = request(url, "GET", "/health")
        assert ill[0] == 503 and json.loads(ill[2])["status"] == "failing" and "no finite numbers" in json.loads(ill[2])["fault"]
        for more in ({}, {"temperature": 1}, {"stream": True}):
            status, _, said = post(url, ASTHMA | more)
            assert status == 500 and "no finite numbers" in json.loads(said)["error"]["message"], said
    service.queue.close()
    assert sum("fault=not_finite" in line for line in lines) == 3


def test_a_model_without_numbers_in_other_commands(broken, tmp_path, monkeypatch, capfd):
    (tmp_path/"rows.jsonl").write_text('{"instruction": "What is asthma?"}\n')
    commands = (["predict", "--dataset", f"{tmp_path}/rows.jsonl", "--output", f"{tmp_path}/answers.jsonl"],
        ["evaluate", "mm_mcq", "--limit", "4"], ["evaluate", "mm_mcq", "--limit", "4", "--scorer", "generate"])
    for words in commands:
        assert main([*words, "--model_name_or_path", str(broken)]) == 2, words
        said = capfd.readouterr().err
        assert "error: the model computes no finite numbers" in said and "Traceback" not in said, said
    assert not (tmp_path/"answers.jsonl").exists()
    monkeypatch.setattr("sys.stdin", io.StringIO("Asthma?\n"))
    assert main(["chat", "--model_name_or_path", str(broken)]) == 0
    assert "error: the model computes no finite numbers" in capfd.readouterr().err


def test_control_tokens_are_no_text(chat, monkeypatch):
    "A model that says PAD and BOS between its words: they are counted, and nobody reads their letters."
    import torch

    from medllm.models import sampling
    from medllm.serve import queue
    word, = chat.tokenizer("a", add_special_tokens=False).input_ids
    said = [chat.tokenizer.pad_token_id, word, chat.tokenizer.bos_token_id, word, word, chat.tokenizer.pad_token_id]
    def draw(logits, uniforms, how): return torch.tensor([said[int(u)] for u in uniforms])
    for module in (sampling, queue): monkeypatch.setattr(module, "draw_tokens", draw)
    table = lambda rows, width, *key: torch.arange(width).double().expand(rows, width)
    for module in ("medllm.models.chat", "medllm.serve.queue"): monkeypatch.setattr(f"{module}.uniform_table", table)
    assert text_of(chat, "?", 6) == "aaa"
    with house(chat) as (url, service, lines):
        whole = json.loads(post(url, ASTHMA | {"max_tokens": 6})[2])
        assert whole["choices"][0]["message"]["content"] == "aaa" and whole["usage"]["completion_tokens"] == 6
        stream = post(url, ASTHMA | {"max_tokens": 6, "stream": True})[2].decode()
        deltas = [json.loads(p[6:])["choices"][0]["delta"] for p in stream.split("\n\n") if p and "[DONE]" not in p]
        assert "".join(d.get("content", "") for d in deltas) == "aaa"


def test_marks_of_a_thought_stay():
    from medllm.data.tokens import Renderer
    from medllm.models.chat import silent_ids
    from medllm.models.tiny import tiny_tokenizer
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<|tool|>"]})
    silent = silent_ids(Renderer(tokenizer, "chatml"))
    ids = lambda *names: set(tokenizer.convert_tokens_to_ids(list(names)))
    assert ids("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|tool|>") <= silent
    assert not silent & ids("<think>", "</think>")


def test_a_kept_connection_waits_for_nothing(chat):
    "The second packet of an answer is not held until the client confirms the first (Nagle's algorithm: 40 ms each time)."
    with house(chat) as (url, service, lines):
        line, seconds = http.client.HTTPConnection(url.removeprefix("http://")), []
        for _ in range(60):
            since = time.perf_counter()
            line.request("GET", "/health")
            line.getresponse().read()
            seconds.append(time.perf_counter() - since)
        line.close()
        assert sorted(seconds)[30] < .03, sorted(seconds)[30]


def test_a_text_without_end_is_refused_before_it_is_read(chat, monkeypatch):
    "A megabyte is not cut into tokens, and a long text does not keep a short one waiting."
    from medllm.data.tokens import PlainText
    seen, real, held = [0], PlainText.arrays, threading.Event()
    def arrays(self, texts, place):
        seen.append(max(map(len, texts), default=0))
        if seen[-1] > 1000: held.wait(20)
        return real(self, texts, place)
    monkeypatch.setattr(PlainText, "arrays", arrays)
    ask = lambda text, **more: ASTHMA | {"messages": [{"role": "user", "content": text}]} | more
    with house(chat) as (url, service, lines), ThreadPoolExecutor(2) as pool:
        status, _, said = post(url, ask("fever "*170_000))
        assert status == 400 and json.loads(said)["error"]["code"] == "context_length_exceeded" and max(seen) < 1000
        status, _, said = post(url, {"model": "tiny", "prompt": "fever "*170_000}, "/v1/completions")
        assert status == 400 and max(seen) < 1000
        long = pool.submit(post, url, ask("fever "*4_000))            # less than any text that is certainly too long
        assert until(lambda: max(seen) > 1000, 5)
        assert post(url, ASTHMA)[0] == 200 and not long.done()
        held.set()
        assert long.result()[0] == 400 and max(seen) <= 8*chat.longest
        thoughts = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<think>" + " "*9000 + "x"},
            {"role": "user", "content": "?"}]
        assert pool.submit(post, url, ASTHMA | {"messages": thoughts}).result(20)[0] in (200, 400)


def test_another_model_is_told_the_right_name(chat):
    with house(chat) as (url, service, lines):
        for status, _, said in (post(url, ASTHMA | {"model": "gpt-4"}), request(url, "GET", "/v1/models/gpt-4")):
            assert status == 404 and json.loads(said)["error"]["message"].endswith("ask for tiny")


# the end

def test_s7_sigterm_under_load(alone):
    "The last test of that process: streams that run are ended, nobody new comes in."
    server, port, log = alone
    streams = [opened(f"http://127.0.0.1:{port}", LONG | {"max_tokens": 300}, KEY) for _ in range(3)]
    server.send_signal(signal.SIGTERM)
    time.sleep(.5)
    with pytest.raises(OSError): socket.create_connection(("127.0.0.1", port), timeout=5)
    for sock in streams:
        rest = b""
        while part := sock.recv(2**16): rest += part
        assert b"data: [DONE]" in rest and b'"finish_reason": "length"' in rest
    assert server.wait(30) == 0
    assert "Traceback" not in log.read_text()


def test_s7_the_grace_is_over(tmp_path):
    "Who waits is told: a stream ends with an error and its last line, an answer in one piece is a 503."
    with process(tmp_path, "--grace", ".3") as (server, port, log), ThreadPoolExecutor(1) as pool:
        url = f"http://127.0.0.1:{port}"
        streams = [opened(url, LONG | {"max_tokens": 950}) for _ in range(4)]
        whole = pool.submit(post, url, LONG | {"max_tokens": 950, "stream": False})
        time.sleep(.3)
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 1 and "were cut off" in log.read_text()
        for sock in streams:
            rest = b""
            while part := sock.recv(2**16): rest += part
            assert 0 < rest.find(b'"code": "stopping"') < rest.find(b"data: [DONE]"), rest[-600:]
        status, _, said = whole.result()
        assert status == 503 and json.loads(said)["error"]["code"] == "stopping"


def test_s7_a_second_signal_ends_the_grace(chat):
    import asyncio

    from medllm.serve.lifecycle import build_server, listen
    service, (door, _) = Service(chat, AnswerQueue(chat), "tiny"), listen("127.0.0.1", 0, Keys())
    server = build_server(service, ServeChoice(), log=lambda line: None)
    thread = threading.Thread(target=lambda: asyncio.run(server._serve(sockets=[door])))     # signals go to the main thread
    thread.start()
    sock = opened(f"http://127.0.0.1:{door.getsockname()[1]}", LONG | {"max_tokens": 950})
    server.handle_exit(signal.SIGINT, None)
    time.sleep(.3)
    assert thread.is_alive() and service.queue.count == 1
    server.handle_exit(signal.SIGINT, None)
    rest = b""
    while part := sock.recv(2**16): rest += part
    thread.join(10)
    assert b"stopping" in rest and b"data: [DONE]" in rest and server.cut == 1 and not thread.is_alive()
    service.queue.close()


# The command

def test_mistakes_are_one_sentence(tmp_path, capfd):
    (tmp_path/"keys").write_text("short\n")
    mistakes = {
        ("--host", "0.0.0.0"): "a key is needed", ("--api_key_file", f"{tmp_path}/none"): "cannot be read",
        ("--api_key_file", f"{tmp_path}/keys"): "at least 16", ("--port", "99999"): "--port 99999", ("--rows", "0"): "--rows 0",
        ("--port", "x"): "invalid int", ("--disclaimer", " "): "--disclaimer", ("--enable_thinking", "maybe"): "true or false"}
    for words, says in mistakes.items():
        assert main(["serve", "--port", "0", *words]) == 2
        said = capfd.readouterr()
        assert says in said.err and said.err.startswith("error: ") and said.err.count("\n") == 1, said.err


def test_an_adapter_is_served_with_its_template(tmp_path, monkeypatch, capfd):
    "The folder that training wrote, by its name alone, to `medllm serve` and `medllm chat`: one answer."
    import torch

    from medllm.core import visible
    from medllm.models.adapters import AdaptPlan, adapt
    from medllm.models.chat import ModelChoice
    from medllm.models.loading import load_model
    tuned = adapt(load_model("tiny"), AdaptPlan("lora"))
    for name, p in tuned.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(p, std=.5)
    tuned.save_pretrained(tmp_path/"ward")
    want = text_of(load_chat_model(ModelChoice(str(tmp_path/"ward"))), "高血压？", 8)
    service = build_service(ModelChoice(str(tmp_path/"ward")), ServeChoice(disclaimer="off"))
    body = ASTHMA | {"model": "ward", "messages": [{"role": "user", "content": "高血压？"}]}
    with running(service, log=lambda line: None) as url: said = json.loads(post(url, body)[2])
    service.queue.close()
    assert said["choices"][0]["message"]["content"] == want and "disclaimer" not in said
    monkeypatch.setattr("sys.stdin", io.StringIO("高血压？\n"))
    assert main(["chat", "--adapter_name_or_path", str(tmp_path/"ward"), "--temperature", "0", "--max_new_tokens", "8"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("Not medical advice") and visible(want) in out, out


def test_answers_lean_on_sources(chat, tmp_path, monkeypatch, capfd):
    "With knowledge the prompt holds passages and the answer cites them; where nothing is found the model is not asked."
    cite = pytest.importorskip("medllm.retrieval.grounding", reason="medllm.retrieval.grounding is not here")
    (tmp_path/"table.csv").write_text("name,symptom,medicine\nGout,Toe pain and joint swelling,Colchicine 0.5 mg\n"
        "Asthma,Wheeze and cough at night,Salbutamol\n")
    grounding = cite.Grounding([str(tmp_path/"table.csv")])
    service = Service(chat, AnswerQueue(chat, 4, 4), "tiny", grounding=grounding)
    ask = lambda text, **more: ASTHMA | {"messages": [{"role": "user", "content": text}]} | more
    with running(service, log=lambda line: None) as url:
        found = ask("Which medicine is given for gout and joint swelling?")
        said = json.loads(post(url, found)[2])
        (wanted,), passages = [service.prompts(read_request(found, "chat", ["tiny"]))[i] for i in (0, 1)]
        assert "Colchicine 0.5 mg" in chat.tokenizer.decode(wanted) and passages and said["usage"]["prompt_tokens"] == len(wanted)
        bare = chat.answers([wanted], Sampling(8, 0.0))[0].text
        assert said["choices"][0]["message"]["content"] == grounding.checked(bare, passages)[0]
        assert said["citations"] == [[]]                                     # a random model says nothing that a source says
        monkeypatch.setattr("medllm.serve.stream.GrowingText.close",
            lambda self: ". Colchicine 0.5 mg is a medicine for gout [2].")
        said = json.loads(post(url, found)[2])
        source, = said["citations"][0]
        assert f"gout [{source['number']}]." in said["choices"][0]["message"]["content"]
        assert source["place"] == "table.csv, line 2"
        stream = post(url, found | {"stream": True})[2]
        pieces = [json.loads(part[6:]) for part in stream.decode().split("\n\n") if part and "[DONE]" not in part]
        assert pieces[0]["choices"][0]["delta"]["content"] == said["choices"][0]["message"]["content"]
        assert pieces[0]["citations"] == said["citations"] and len(pieces) == 1
        none = json.loads(post(url, ask("谁赢了世界杯？"))[2])
        assert none["choices"][0]["message"]["content"] == "所给资料中没有相关内容。" and none["usage"]["completion_tokens"] == 0
    service.queue.close()
    monkeypatch.setattr("sys.stdin", io.StringIO("Which medicine is given for gout and joint swelling?\nWho won the cup?\n"))
    assert main(["chat", "--knowledge", str(tmp_path/"table.csv"), "--temperature", "0", "--max_new_tokens", "8"]) == 0
    out = capfd.readouterr().out
    assert "gout [" in out and "Sources:" in out and "table.csv, line 2" in out and "say nothing about this" in out


# Long

def resident(server):
    "Memory of a process [MiB]."
    import psutil
    return psutil.Process(server.pid).memory_info().rss/2**20


@pytest.mark.slow
def test_ten_thousand_requests(tmp_path):
    "One after another, every tenth a stream: none fails; memory, and the processor's time for an answer, do not grow."
    import psutil
    with process(tmp_path) as (server, port, log):
        line, marks, since = http.client.HTTPConnection("127.0.0.1", port, timeout=60), [], time.monotonic()
        used = lambda: sum(psutil.Process(server.pid).cpu_times()[:2])
        for i in range(10_001):
            if i % 1000 == 0: marks.append((resident(server), used()))
            body = ASTHMA | {"stream": i % 10 == 0, "seed": i, "temperature": i % 2}
            line.request("POST", "/v1/chat/completions", json.dumps(body), JSON)
            answer = line.getresponse()
            said = answer.read()
            assert answer.status == 200 and (said.endswith(b"[DONE]\n\n") if i % 10 == 0 else json.loads(said)["choices"]), i
        sizes, each = [size for size, _ in marks], [b[1] - a[1] for a, b in zip(marks, marks[1:])]
        print(f"RSS after 1,000: {sizes[1]:.1f} MiB, after 10,000: {sizes[-1]:.1f} MiB ({sizes[-1]/sizes[1] - 1:+.2%}); "
            f"processor time of a request {each[0]:.2f} ms in the first thousand, {each[-1]:.2f} ms in the last; "
            f"{time.monotonic() - since:.0f} s in all")
        assert sizes[-1] < 1.02*sizes[1], sizes
        assert each[-1] < 1.2*each[0] and request(f"127.0.0.1:{port}", "GET", "/health")[0] == 200


@pytest.mark.slow
def test_s4_a_thousand_clients_that_hang_up(tmp_path):
    with process(tmp_path, "--rows", 2, "--waiting", 0) as (server, port, log):
        url = f"http://127.0.0.1:{port}"
        def gone(times):
            for _ in range(times):
                opened(url, LONG).close()
                assert until(lambda: post(url, ASTHMA | {"n": 2})[0] == 200, 1)          # both places are free again
        gone(200)
        before = resident(server)
        gone(800)
        print(f"RSS {before:.1f} -> {resident(server):.1f} MiB")
        assert resident(server) < 1.01*before


def test_room_that_comes_between_two_looks_is_not_lost(chat, monkeypatch):
    with house(chat) as (url, service, _):
        looks = []
        real = service.queue.full
        monkeypatch.setattr(service.queue, "full", lambda n=1: not looks and not looks.append(1) or real(n))
        port = int(url.rpartition(":")[2])
        for _ in range(2):
            c = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            c.request("POST", "/v1/chat/completions", json.dumps(ASTHMA), JSON)
            assert c.getresponse().status == 200
            c.close()
        assert looks and service.queue.count == 0


def test_the_smallest_temperature_is_the_most_probable_token():
    import torch

    from medllm.models.sampling import draw_tokens
    logits = torch.randn(3, 50, generator=torch.manual_seed(0))
    for small in (5e-324, 1e-45, 1e-30): assert draw_tokens(logits, torch.full((3,), .5, dtype=torch.float64),
        Sampling(4, small)).tolist() == logits.argmax(-1).tolist()


def test_a_host_that_cannot_be_a_name():
    from medllm.core import UserError
    from medllm.serve.lifecycle import listen
    with pytest.raises(UserError, match="no address"): listen("a..b", 0, Keys())
