"""Records at an address: written while the run lives, read from there; S3 through a server on this machine."""
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from commands import run, wait, ROOT

from medllm.core import UserError
from medllm.files import write_json
from medllm.records import remote as places
from medllm.records.remote import fetched, mirrored_folder, open_place

S3 = ROOT/".s3"


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    "Environment of an S3 server on this machine with one bucket; skips where it is not installed."
    if not (S3/"moto").is_dir(): pytest.skip("the S3 server is not here: make s3")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = open(tmp_path_factory.mktemp("s3")/"log", "w")
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log,
        env=os.environ | {"PYTHONPATH": str(S3)})
    url = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try: urllib.request.urlopen(url, timeout=1).read()
        except OSError: time.sleep(0.1)
        else: break
    urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).read()
    yield {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED00", "AWS_SECRET_ACCESS_KEY": "planted/secret",
        "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
    server.terminate()
    server.wait()


@pytest.fixture(params=["memory", "s3"])
def address(request, monkeypatch, tmp_path):
    "An address of each kind, and a working directory of its own."
    monkeypatch.chdir(tmp_path)
    if request.param == "s3":
        for name, value in request.getfixturevalue("s3").items(): monkeypatch.setenv(name, value)
        return f"s3://bucket/{tmp_path.name}"
    return f"memory://{tmp_path.name}"


def test_a_run_is_seen_while_it_lives(address):
    "Status and committed checkpoints arrive with the heartbeat; a rotated checkpoint goes; the seal comes last."
    seen = []
    with mirrored_folder(address, every=0.1) as folder:
        record = os.path.join(folder, "sft/a")
        os.makedirs(f"{record}/checkpoint-1")
        with open(f"{record}/checkpoint-1/model.safetensors", "wb") as f: f.write(b"w"*1000)
        write_json(f"{record}/run.json", {"stage": "sft", "status": "running"})
        place = open_place(address)
        wait(lambda: "sft/a/run.json" in place.files())
        seen.append(sorted(place.files()))
        write_json(f"{record}/checkpoint-1/COMMIT.json", {})
        wait(lambda: "sft/a/checkpoint-1/COMMIT.json" in place.files())
        seen.append(sorted(place.files()))
        os.remove(f"{record}/checkpoint-1/COMMIT.json")
        wait(lambda: len(place.files()) == 1)
        with fetched(address) as (_, local): assert json.loads((local/"sft/a/run.json").read_text())["status"] == "running"
        write_json(f"{record}/run.json", {"stage": "sft", "status": "completed"})
        write_json(f"{record}/seal.json", {})
    assert seen[0] == ["sft/a/run.json"] and "sft/a/checkpoint-1/model.safetensors" in seen[1]
    with fetched(address, ()) as (_, local):
        assert json.loads((local/"sft/a/run.json").read_text())["status"] == "completed" and (local/"sft/a/seal.json").exists()


def test_a_network_that_is_away_does_not_end_a_run(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places.time, "sleep", lambda s: None)
    broken = [True]
    class Broken:
        def find(self, *a, **k): raise OSError("no route")
        def put_file(self, *a):
            if broken[0]: raise OSError("no route to host")
    monkeypatch.setattr(places, "open_place", lambda url: places.RemoteFolder(Broken(), "x", url))
    with pytest.raises(UserError, match="no route to host.*it is whole in"), mirrored_folder("s3://b/x", every=0.01) as folder:
        write_json(f"{folder}/run.json", {})
        time.sleep(0)
    assert capsys.readouterr().err.count("the run goes on") == 1
    broken[0] = False
    with mirrored_folder("s3://b/x"): pass                                                    # the next run copies what is left


@pytest.mark.parametrize("url", ["s3://AKIA:planted@bucket/runs", "sftp://me:planted@host/x",
    "s3://bucket/x?aws_secret_access_key=planted", "gs://bucket/x?token=planted"])
def test_an_address_with_a_key_is_refused_and_not_repeated(url, tmp_path, monkeypatch, capsys):
    from medllm.cli.main import main
    monkeypatch.chdir(tmp_path)
    code = main(["run", "sft", "--runs", url])
    said = capsys.readouterr()
    assert code == 2 and "error: --runs" in said.err and "planted" not in said.err + said.out
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_record_on_s3_from_run_to_export(s3, tmp_path):
    "Run, list, show, verify and export with an address; no key anywhere in the record."
    runs = "s3://bucket/whole/runs"
    call = lambda *words: run("medllm", *words, "--runs", runs, cwd=tmp_path, **s3)
    done = call("run", "sft", "-p", "max_steps", 3, "-p", "max_samples", 24, "--tag", "far")
    assert done.returncode == 0 and f"copied to {runs}" in done.stderr, done.stderr
    done = call("runs", "list", "--json")
    row, = json.loads(done.stdout)
    assert row["status"] == "completed" and row["name"].endswith("-far"), done.stdout
    assert "loss" in call("runs", "show", "last").stdout
    done = call("runs", "verify", "last", "--record-only")
    assert done.returncode == 0, done.stdout + done.stderr
    done = call("runs", "export", "--output", tmp_path/"pages")
    assert done.returncode == 0 and len(list((tmp_path/"pages").iterdir())) == 2, done.stderr
    done = call("runs", "gc")
    assert done.returncode == 2 and "wants a folder" in done.stderr
    texts = [f.read_bytes() for f in (tmp_path/"runs").rglob("*") if f.is_file()]
    assert texts and not any(b"planted/secret" in t or b"AKIAPLANTED" in t for t in texts)


def test_a_file_address_is_a_folder(tmp_path):
    (tmp_path/"runs/sft/a").mkdir(parents=True)
    write_json(tmp_path/"runs/sft/a/run.json", {"stage": "sft", "status": "completed"})
    done = run("medllm", "runs", "list", "--json", "--runs", f"file://{tmp_path}/runs")
    assert [r["name"] for r in json.loads(done.stdout)] == ["a"], done.stderr
