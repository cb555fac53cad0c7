"""How the tests run a command, and where the files are."""
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fork_server import fork

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent/"shared"
BIN = Path(sys.executable).parent
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def _found(words):
    return [str(BIN/words[0]) if (BIN/words[0]).exists() else words[0], *map(str, words[1:])]


def process(*words, cwd=ROOT, timeout=600, **env):
    "A finished process, with its output as text."
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **env}
    return subprocess.run(_found(words), cwd=cwd, capture_output=True, text=True, timeout=timeout, env=environment,
        stdin=subprocess.DEVNULL)


def run(*words, cwd=ROOT, timeout=600, **env):
    "The same of a program of ours, forked from a process that has imported what it will: for tests of what it does and says."
    environment = {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **{k: str(v) for k, v in env.items()}}
    with open(os.devnull, "rb") as nothing, tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = fork(_found(words), nothing.fileno(), out.fileno(), err.fileno(), cwd, environment)
        if child is None: return process(*words, cwd=cwd, timeout=timeout, **env)
        try: code = child.wait(timeout)
        except BaseException:
            child.kill()
            raise
        for file in (out, err): file.seek(0)
        return subprocess.CompletedProcess(child.args, code, out.read(), err.read())


def start(*words, cwd=ROOT, err=os.devnull, **env):
    "A program of ours that runs, its stderr in a file: to be signalled and waited for. Forked where that will do."
    environment = {**os.environ, **{k: str(v) for k, v in env.items()}}
    with open(os.devnull, "r+b") as nothing, open(err, "wb") as told:
        child = fork(_found(words), nothing.fileno(), nothing.fileno(), told.fileno(), cwd, environment)
        return child or subprocess.Popen(_found(words), cwd=cwd, stdin=nothing, stdout=nothing, stderr=told, env=environment)


def losses(folder):
    "Step -> logged loss of a run."
    from medllm.json_file import read_log
    return {h["step"]: h["loss"] for h in read_log(Path(folder)/"history.jsonl") if "loss" in h}


def fault(script, *words, timeout=900, run=run, **env):
    "What a script of tests/faults found; those that kill kernels need true processes."
    done = run(sys.executable, ROOT/"tests/faults"/script, *words, timeout=timeout, **env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.index("{"):])


def command(*words):
    "Exit code of `medllm …` in this process, and what it printed; a traceback or a character that steers a terminal fails."
    from medllm.cli.main import main
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = main([str(w) for w in words])
    said = out.getvalue() + err.getvalue()
    assert "Traceback" not in said, said[-2000:]
    assert not STEERS.search(said), repr(STEERS.search(said)[0])
    assert code in (0, 1, 2), (code, said)
    return code, out.getvalue(), err.getvalue()


def medllm(*words, **env): return run("medllm", *words, **env)


def named(folder, *words, **env):
    "Exit code and sentences of verify, but for what it says of the seal itself."
    done = medllm("runs", "verify", folder, *words, **env)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, [line for line in done.stdout.splitlines() if not line.startswith("  ")]


def made(*words, runs, **env):
    "Folder of a run that completed."
    done = medllm("run", *words, "--runs", runs, **env)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip().splitlines()[-1].removeprefix("record: "))


def wait(there, process=None, most=240):
    "Until something is there, and its process with it; a machine with other work is slow to start."
    began = time.monotonic()
    while not there():
        assert (process is None or process.poll() is None) and time.monotonic() - began < most
        time.sleep(0.02)
