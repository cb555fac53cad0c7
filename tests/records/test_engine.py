"""Records under fault: killed kernels, signals, full disks, bad parameters, planted secrets and rows."""
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path

import nbformat
import pytest
from commands import ROOT, run
from nbformat.v4 import new_code_cell as code_cell, new_notebook
from papermill import execute_notebook

from medllm.core import UserError
from medllm.records.engine import use_engine
from medllm.records.record import Run, read_events, status_of

use_engine()
pytestmark = pytest.mark.usefixtures("forked_kernels")
PARAMETERS = "n:int = 1\nrate:float = 0.5\nname:str = 'a'\nextra:dict = {}"


def book(folder, *cells, parameters=PARAMETERS, tags=()):
    "A notebook file: a parameters cell, and cells of code."
    made = new_notebook(cells=[code_cell(parameters, id="parameters", metadata={"tags": ["parameters"]}),
        *(code_cell(c, id=f"c{i}", metadata={"tags": list(tags)}) for i, c in enumerate(cells, 1))],
        metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    nbformat.write(made, folder/"in.ipynb")
    return folder/"in.ipynb"


def ends(folder, *cells, engine="medllm", given=None, record=False, **options):
    "Execute cells: what was raised, the notebook on the disk, its statuses."
    tags, parameters = options.pop("tags", ()), options.pop("parameters", PARAMETERS)
    file, raised = book(folder, *cells, tags=tags, parameters=parameters), None
    if record:
        Run(folder/"r").folder.mkdir()
        Run(folder/"r").update(stage="bare", status="created", started="2026-01-01T00:00:00+00:00", parameters={}).beat()
        options["record"] = str(folder/"r")
    out = folder/("r/record.ipynb" if record else "out.ipynb")
    try: execute_notebook(str(file), str(out), given, engine_name=engine, kernel_name="python3", progress_bar=False, **options)
    except (Exception, SystemExit) as error: raised = error
    nb = nbformat.read(out, 4) if out.exists() else None
    ours = [c for c in nb.cells if re.fullmatch(r"c\d\d?", c.get("id", "")) and "papermill" in c.metadata] if nb else []
    return raised, nb, [c.metadata.papermill.status for c in ours]


SUICIDE = "print('so far', flush=True)\nimport os, signal, time\ntime.sleep(.6)\nos.kill(os.getpid(), signal.SIGKILL)"


# ---- how a cell ended

@pytest.mark.slow
def test_plain_papermill_claims_success_of_a_killed_kernel(tmp_path):
    _, nb, _ = ends(tmp_path, "1", SUICIDE, "3", engine=None)
    assert {c.metadata.papermill.status for c in nb.cells} == {"completed"} and nb.metadata.papermill.exception is None


def test_a_killed_kernel_is_killed(tmp_path):
    error, nb, cells = ends(tmp_path, "1", SUICIDE, "3", record=True)
    assert type(error).__name__ == "DeadKernelError" and cells == ["completed", "killed", "not_run"]
    assert nb.metadata.papermill.exception is True and nb.metadata.medllm.status == "killed"
    assert nb.cells[2].outputs[0].text == "so far\n"
    state = Run(tmp_path/"r").state
    assert state["status"] == "killed" and "SIGKILL" in state["reason"]
    assert [c["status"] for c in state["cells"]][1:] == ["completed", "killed", "not_run"]


def test_a_cell_that_leaves_python_is_no_success(tmp_path):
    error, nb, _ = ends(tmp_path, "import sys\nsys.exit(0)", "2", engine=None)
    assert error is None                                                # plain papermill returns as if all were well
    for code in ("import sys\nsys.exit(0)", "exit()", "import os\nos._exit(0)"):
        error, nb, cells = ends(tmp_path, code, "2")
        assert error is not None and cells == ["failed", "not_run"], code
        assert nb.metadata.medllm.status == "failed" and "early_exit" in nb.metadata.medllm.reason


def test_an_error_leaves_the_notebook_as_it_was(tmp_path):
    "papermill puts two cells of its own into a notebook that failed."
    error, nb, cells = ends(tmp_path, "1", "1/0", "3", engine=None)
    assert len(nb.cells) == 6
    error, nb, cells = ends(tmp_path, "1", "1/0", "3")
    assert len(nb.cells) == 4 and cells == ["completed", "failed", "not_run"]
    assert type(error).__name__ == "PapermillExecutionError" and "ZeroDivisionError" in nb.cells[2].outputs[0].ename


CHECKPOINT = """import signal, time, pathlib
from medllm.core import Interrupted
def stop(*a):
    pathlib.Path('checkpoint').write_text('whole')
    raise Interrupted('asked to stop at step 3 of 9')
signal.signal(signal.SIGTERM, stop)
print('begun', flush=True)
time.sleep({seconds})"""


@pytest.mark.parametrize("limit", [{"execution_timeout": 1.5}, {"time_limit": 4}], ids=["cell", "run"])
def test_time_that_is_over(tmp_path, limit, monkeypatch):
    "The kernel is asked first, so that a checkpoint is taken."
    monkeypatch.chdir(tmp_path)
    if "execution_timeout" in limit:
        _, nb, cells = ends(tmp_path, "import time\ntime.sleep(60)", "2", engine=None, execution_timeout=1)
        assert set(cells) == {"completed"}                              # says plain papermill
    began = time.monotonic()
    error, nb, cells = ends(tmp_path, CHECKPOINT.format(seconds=60), "2", record=True, **limit)
    assert time.monotonic() - began < 20 and error.code == 124 and cells == ["timed_out", "not_run"]
    assert Path("checkpoint").read_text() == "whole" and Run(tmp_path/"r").state["status"] == "timed_out"


def test_a_kernel_that_will_not_stop_is_killed_after_the_grace_time(tmp_path):
    code = "import signal, time\nsignal.signal(signal.SIGTERM, lambda *a: None)\nfor i in range(600): time.sleep(.1)"
    error, nb, cells = ends(tmp_path, code, "2", execution_timeout=1, grace=1)
    assert error.code == 124 and cells == ["timed_out", "not_run"]


# ---- signals to whoever executes the notebook

RUNNER = """import sys
from medllm.records.engine import use_engine
from medllm.records.record import Run
use_engine()
if sys.argv[1] == "record":
    run = Run("r")
    run.folder.mkdir()
    run.update(stage="bare", status="created", started="2026-01-01T00:00:00+00:00", parameters={}).beating()
    from papermill import execute_notebook
    execute_notebook("in.ipynb", "r/record.ipynb", engine_name="medllm", kernel_name="python3", progress_bar=False, record="r")
else:
    from papermill.cli import papermill
    papermill(sys.argv[1:])
"""


def begun(folder, *words):
    "A process that executes in.ipynb, whose first cell has begun."
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", RUNNER, *words], cwd=folder, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (folder/"begun").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.05)
    time.sleep(0.3)
    return process


def waiting(seconds=60, **change):
    return CHECKPOINT.format(seconds=seconds).replace("print('begun'", "pathlib.Path('begun').write_text('')\nprint('begun'")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_kernel(tmp_path, number):
    book(tmp_path, waiting(), "2")
    process = begun(tmp_path, "record")
    process.send_signal(number)
    assert process.wait(30) == 75, process.stderr.read()
    nb, state = nbformat.read(tmp_path/"r/record.ipynb", 4), Run(tmp_path/"r").state
    assert [c.metadata.papermill.status for c in nb.cells] == ["completed", "interrupted", "not_run"]
    assert (tmp_path/"checkpoint").read_text() == "whole"
    assert state["status"] == "interrupted" and state["reason"] == "asked to stop at step 3 of 9"


def test_plain_papermill_passes_no_signal_on(tmp_path):
    book(tmp_path, waiting(), "2")
    process = begun(tmp_path, "in.ipynb", "out.ipynb", "--no-progress-bar")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == -signal.SIGTERM
    time.sleep(1)
    assert not (tmp_path/"checkpoint").exists()
    assert [c.metadata.papermill.status for c in nbformat.read(tmp_path/"out.ipynb", 4).cells][1] == "running"


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_at_once(tmp_path, number, code):
    book(tmp_path, waiting().replace("    raise Interrupted", "    time.sleep(60)\n    raise Interrupted"), "2")
    process = begun(tmp_path, "record")
    process.send_signal(number)
    time.sleep(1)
    process.send_signal(number)
    assert process.wait(10) == code
    assert Run(tmp_path/"r").state["status"] == "interrupted"
    nbformat.read(tmp_path/"r/record.ipynb", 4)


def test_two_signals_at_once_are_one(tmp_path):
    "Who stops a service or a job signals every process of it, and a parent passes it on: a child hears it twice."
    book(tmp_path, waiting(), "2")
    process = begun(tmp_path, "record")
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert process.wait(30) == 75, process.stderr.read()
    assert (tmp_path/"checkpoint").read_text() == "whole" and Run(tmp_path/"r").state["status"] == "interrupted"


def test_a_signal_before_the_notebook_begins(tmp_path):
    "The record is there, papermill is still being loaded."
    process = subprocess.Popen([sys.executable, "-c", "import sys; from medllm.cli.main import main; sys.exit(main())",
        "run", "data", "-p", "max_samples", "10", "-p", "output_dir", str(tmp_path/"r")], cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (tmp_path/"r/run.json").exists(): time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == 75 and Run(tmp_path/"r").state["status"] == "interrupted"


DISTURBED = """import os, signal, sys
class Signals:
    "A signal that comes while a module is imported."
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1] and self in sys.meta_path:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Signals())
from medllm.cli.main import main
sys.exit(main(sys.argv[2:]))"""


@pytest.mark.parametrize("module", [
    "papermill.engines", *(pytest.param(name, marks=pytest.mark.slow) for name in ("zmq.backend.cython", "nbclient.client"))])
def test_a_signal_while_a_library_is_imported(tmp_path, module):
    "zmq makes an ImportError of whatever is raised meanwhile; others swallow it."
    done = subprocess.run([sys.executable, "-c", DISTURBED, module, "run", "data", "-p", "max_samples", "10", "-p", "output_dir",
        str(tmp_path/"r")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 75 and "Traceback" not in done.stderr, done.stderr
    assert Run(tmp_path/"r").state["status"] == "interrupted" and not (tmp_path/"r/data.md").exists()


def test_a_signal_that_a_library_takes_for_a_broken_file(tmp_path):
    "Training listens by an exception until the loop begins; who reads a file then must not blame the file."
    from medllm.core import foreign
    from medllm.exits import exit_code
    from medllm.interruption import listening
    def read():
        with foreign("tokenizer.json", "fetch it anew"):
            try: os.kill(os.getpid(), signal.SIGTERM)
            except Exception as e: raise ValueError(f"no tokenizer: {e}") from None
    with listening(): assert exit_code(read) == 75


FAMILY = """import subprocess, sys
child = "import subprocess, time; subprocess.Popen(['sleep', '77.{n}'], start_new_session=True); time.sleep(77)"
subprocess.Popen([sys.executable, '-c', child])
time.sleep(1)
"""


def test_a_killed_kernel_leaves_no_process_behind(tmp_path):
    "Workers of a training in several processes: a session of their own, and no reason to end."
    mine = FAMILY.replace("{n}", str(os.getpid()))
    error, nb, cells = ends(tmp_path, "import time\n" + mine + SUICIDE, record=True)
    assert cells == ["killed"]
    time.sleep(0.5)
    import psutil
    assert not [p for p in psutil.process_iter() if f"77.{os.getpid()}" in " ".join(_words(p))]


def _words(process):
    import psutil
    try: return process.cmdline()
    except psutil.Error: return []


def test_a_worker_ends_with_its_notebook():
    "kill -9 of the runner: the kernel goes, and the workers that it had started too."
    owner = subprocess.Popen(["sleep", "60"])
    code = ("import time; from medllm.machine import end_with\n"
        f"end_with({owner.pid}); print('on', flush=True); time.sleep(60)")
    worker = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert worker.stdout.readline() == "on\n"
    owner.kill()
    assert worker.wait(10) == 1
    owner.wait()


def test_a_long_temporary_folder(tmp_path, monkeypatch):
    "The address of a socket has at most 107 bytes."
    place = tmp_path/("x"*90)
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    error, nb, cells = ends(tmp_path, "1")
    assert error is None and cells == ["completed"]


def test_a_runner_that_is_killed_leaves_a_lost_run(tmp_path):
    book(tmp_path, waiting(), "2")
    process = begun(tmp_path, "record")
    process.kill()
    process.wait()
    beat = json.loads((tmp_path/"r/heartbeat.json").read_text())
    assert status_of(tmp_path/"r") == "lost"
    (tmp_path/"r/heartbeat.json").write_text(json.dumps(beat | {"boot": "another container"}))
    assert status_of(tmp_path/"r") == "created"                         # it may only be slow
    (tmp_path/"r/heartbeat.json").write_text(json.dumps(beat | {"boot": "another container", "time": beat["time"] - 31}))
    assert status_of(tmp_path/"r") == "lost"
    nbformat.read(tmp_path/"r/record.ipynb", 4)


def test_the_plain_command_with_the_engine(tmp_path):
    "The record's folder is read back from the kernel, and concluded."
    record = """from types import SimpleNamespace
from pathlib import Path
from medllm.records.record import Run
run = Run(Path('rec')); run.folder.mkdir()
run.update(stage='bare', status='running', started='2026-01-01T00:00:00+00:00', parameters={})"""
    book(tmp_path, record, waiting(), "2")
    process = begun(tmp_path, "--engine", "medllm", "in.ipynb", "out.ipynb", "-p", "n", "3", "--no-progress-bar")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
    state = Run(tmp_path/"rec").state
    assert state["status"] == "interrupted" and state["effective"] == {"n": 3, "rate": 0.5, "name": "a", "extra": {}}


def test_the_engine_is_found_by_its_entry_point(tmp_path):
    "setup.py names it; the plain command needs nothing else."
    (tmp_path/"installed").mkdir()
    made = run(sys.executable, ROOT/"setup.py", "-q", "egg_info", "-e", tmp_path/"installed")
    assert made.returncode == 0, made.stderr
    book(tmp_path, "print(n)", "1/0", "3")
    done = run("papermill", "--engine", "medllm", "in.ipynb", "out.ipynb", "-p", "n", 3, "--no-progress-bar", cwd=tmp_path,
        PYTHONPATH=f"{tmp_path/'installed'}{os.pathsep}{ROOT}")
    nb = nbformat.read(tmp_path/"out.ipynb", 4)
    assert done.returncode == 1 and nb.metadata.medllm.status == "failed", done.stderr
    assert [c.metadata.papermill.status for c in nb.cells] == ["completed"]*3 + ["failed", "not_run"]
    done = run("papermill", "--engine", "medllm", "in.ipynb", "out.ipynb", "-p", "nn", 3, "--no-progress-bar", cwd=tmp_path,
        PYTHONPATH=f"{tmp_path/'installed'}{os.pathsep}{ROOT}")
    assert done.returncode == 2 and "did you mean 'n'" in done.stderr, done.stderr


# ---- crashes and full disks in the middle of a write

WRITERS = """import json, os, random, signal, sys, time
import nbformat
from nbformat.v4 import new_code_cell, new_notebook, new_output
from papermill.iorw import write_ipynb
from medllm.records.cell_status import TrueManager
from medllm.records.redact import Policy
kind, times, random.seed = sys.argv[1], int(sys.argv[2]), None
text = "word " * 60_000
def notebook():
    cells = [new_code_cell("1", outputs=[new_output("stream", text=text)]) for _ in range(4)]
    for c in cells: c.metadata["papermill"] = {"status": "completed"}
    return new_notebook(cells=cells, metadata={"papermill": {}})
nb = notebook()
man = TrueManager(nb, Policy(), output_path="r.ipynb", progress_bar=False)
write = man.save if kind == "ours" else lambda: write_ipynb(nb, "r.ipynb")
write()
torn = 0
for _ in range(times):
    child = os.fork()
    if not child:
        while True:
            man._kept.clear()
            write()
    time.sleep(0.02 + 0.08*__import__("random").random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try: assert len(nbformat.read("r.ipynb", 4).cells) == 4
    except Exception: torn += 1
print(torn)
"""


def test_a_crash_inside_a_write_never_harms_the_record(tmp_path):
    torn = lambda kind: int(run(sys.executable, "-c", WRITERS, kind, 30, cwd=tmp_path, PYTHONPATH=str(ROOT)).stdout)
    assert torn("papermill") > 0
    assert torn("ours") == 0


FULL = """import errno, json, resource, signal, sys
import nbformat
from papermill import execute_notebook
import medllm.records.engine as engine
engine.use_engine()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
if sys.argv[1] == "medllm":
    from medllm.records.record import Run
    run = Run("r"); run.folder.mkdir()
    run.update(stage="bare", status="created", started="2026-01-01T00:00:00+00:00", parameters={})
try: execute_notebook("in.ipynb", "out.ipynb", engine_name=None if sys.argv[1] == "plain" else "medllm",
    kernel_name="python3", progress_bar=False, **({"record": "r"} if sys.argv[1] == "medllm" else {}))
except OSError as e: print("OSError")
"""


def test_a_full_disk_keeps_what_was_saved(tmp_path):
    "No file may grow beyond 300 kB: as on a full disk, the write fails in the middle."
    clear = "from IPython.display import clear_output\nprint('x'*400_000, flush=True)\nimport time; time.sleep(1)"
    book(tmp_path, "print('first result')", clear, "from IPython.display import clear_output\n1")
    plain = run(sys.executable, "-c", FULL, "plain", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert "OSError" in plain.stdout
    with pytest.raises(Exception): nbformat.read(tmp_path/"out.ipynb", 4)
    (tmp_path/"out.ipynb").unlink()
    ours = run(sys.executable, "-c", FULL, "medllm", cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert "OSError" not in ours.stdout + ours.stderr and "could not be saved" in ours.stderr, ours.stderr
    nb = nbformat.read(tmp_path/"out.ipynb", 4)
    assert nb.cells[1].outputs[0].text == "first result\n"
    assert [c["status"] for c in Run(tmp_path/"r").state["cells"]] == ["completed"]*4       # the run went on
    assert "record_not_saved" in [e["event"] for e in read_events(tmp_path/"r")]


def test_no_room_for_the_last_word_is_a_sentence(tmp_path, monkeypatch):
    from medllm.experiment.execute import execute
    def full(manager): raise OSError(28, "No space left on device")
    monkeypatch.setattr("medllm.records.engine.conclude", full)
    with pytest.raises(UserError, match="could not be written .No space left on device"):
        execute("data", {"max_samples": 10, "near": False, "output_dir": str(tmp_path/"r")})
    assert Run(tmp_path/"r").state["status"] == "completed"             # said by the notebook; it is only not sealed


def test_a_notebook_without_a_record_of_its_own(tmp_path, capsys):
    from medllm.cli.main import main
    notebook = nbformat.read(ROOT/"nbs/runs/data.ipynb", 4)
    notebook.cells = [c for c in notebook.cells if c.id in ("imports", "parameters")]
    nbformat.write(notebook, tmp_path/"data.ipynb")
    assert main(["run", str(tmp_path/"data.ipynb"), "-p", "output_dir", str(tmp_path/"r")]) == 0
    assert Run(tmp_path/"r").state["status"] == "completed"


# ---- parameters

def test_parameters_that_plain_papermill_lets_through(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error, nb, cells = ends(tmp_path, "n", engine=None, given={"nn": 3})
    assert error is None and cells == ["completed"]                     # trained on the default
    ends(tmp_path, "n", engine=None, given={"n=1\nopen('pwned','w').close()\nz": 1})
    assert Path("pwned").exists()


@pytest.mark.parametrize("given, says", [
    ({"nn": 3}, "did you mean 'n'"), ({"n": "three"}, "wants int"), ({"n": True}, "wants int"),
    ({"rate": float("nan")}, "no number"),
    ({"rate": float("inf")}, "no number"), ({"name": (1, 2)}, "wants str"), ({"extra": {1: 2}}, "is no text"),
    ({"name": "x"*1_000_000}, "at most 100,000"), ({"extra": {"hub_token": "abc"}}, "not written down"),
    ({"n=1\nopen('pwned','w').close()\nz": 1}, "hold code"), ({"n": 1, "z; open('pwned','w')": 1}, "")], ids=str)
def test_parameters_are_refused_before_a_kernel_starts(tmp_path, monkeypatch, given, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("medllm.records.engine.RecordClient.run", lambda *a, **k: pytest.fail("a kernel was started"))
    error, nb, cells = ends(tmp_path, "n", given=given)
    assert error.code == 2 and cells == ["not_run"] and nb.metadata.medllm.status == "rejected"
    assert says in nb.metadata.medllm.reason and not Path("pwned").exists()


def test_parameters_are_read_back_from_the_kernel(tmp_path):
    given = {"n": 3, "name": "高血压 \"x\"\\ \n"}
    error, nb, cells = ends(tmp_path, "n", given=given, record=True)
    assert error is None and Run(tmp_path/"r").state["effective"] == {"rate": 0.5, "extra": {}} | given


def test_a_parameter_that_the_kernel_changes_fails_the_run(tmp_path):
    "Something in the notebook assigns the name anew: what was given does not hold."
    trap = PARAMETERS + "\nget_ipython().events.register('post_execute', lambda: get_ipython().user_ns.update(n=7))"
    error, nb, cells = ends(tmp_path, "n", given={"n": 3}, parameters=trap)
    assert "n was given, but the kernel has another value" in nb.metadata.medllm.reason and cells == ["not_run"]


@pytest.mark.parametrize("given, says", [
    ({"max_step": 5}, "did you mean"), ({"seed": -1}, "from 0 to"), ({"seed": (1,)}, "unchanged"),
    ({"learning_rate": float("inf")}, "finite"), ({"hub_token": "hf_" + "a1"*15}, "env:NAME")], ids=str)
def test_execute_refuses_and_leaves_no_folder(tmp_path, given, says):
    from medllm.experiment.execute import execute
    with pytest.raises(UserError, match=says): execute("sft", given | {"runs_dir": str(tmp_path)})
    assert not list(tmp_path.iterdir())


# ---- what may not be in a record

TOKEN, PASSWORD = "hf_" + "Zq7"*11, 'c0rrect "h0rse\\'
SECRETS = [f"print('{TOKEN}')", f"token = '{TOKEN}'\n1/0",
    "import os\nt = os.environ['HARMLESS']\nprint(t[:9], end='', flush=True)\nprint(t[9:])",
    f"raise OSError('https://me:{TOKEN[3:]}@host/x failed')", "import os\nprint(os.environ['CLINIC_PASSWORD'])",
    "import json, os\nprint(json.dumps({'p': os.environ['CLINIC_PASSWORD']}))", f"{{'a': ['{TOKEN}']}}",
    "import urllib.parse, os\nurllib.parse.quote(os.environ['CLINIC_PASSWORD'])",
    f"from IPython.display import HTML, JSON, display\ndisplay(HTML('<b>{TOKEN}</b>'), JSON({{'k': '{TOKEN}'}}))",
    f"# password='{PASSWORD[:7]}{TOKEN}'"]


def bytes_of(folder): return b"\n".join(f.read_bytes() for f in Path(folder).rglob("*") if f.is_file())


def test_planted_secrets_are_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("CLINIC_PASSWORD", PASSWORD)
    monkeypatch.setenv("HARMLESS", TOKEN)                               # its shape gives it away
    _, nb, _ = ends(tmp_path, *SECRETS, engine=None, tags=["raises-exception"])
    assert TOKEN.encode() in (tmp_path/"out.ipynb").read_bytes()
    given = {"extra": {"hub_token": "env:HF_TOKEN"}}
    error, nb, cells = ends(tmp_path, *SECRETS, tags=["raises-exception"], record=True, given=given)
    assert set(cells) == {"completed"}, cells
    (tmp_path/"r/train.log").write_text(f"x {TOKEN}\n")
    from medllm.records.redact import scrub_folder
    assert scrub_folder(tmp_path/"r") == {"hugging face token": 1}
    held = bytes_of(tmp_path/"r").decode()
    for form in (TOKEN, TOKEN[3:], TOKEN[9:], PASSWORD, json.dumps(PASSWORD)[1:-1], urllib.parse.quote(PASSWORD), "h0rse"):
        assert form not in held, form
    assert "[secret: hugging face token]" in held and "env:HF_TOKEN" in held
    assert sum(Run(tmp_path/"r").state["privacy"]["scrubbed"].values()) >= 10


ROW = {"instruction": "Jane Zebrafish, born 1970-01-02?", "output": "MRN-4471123 张伟珍"}
MARKS = ("Zebrafish", "4471123", "张伟珍", "1970-01-02", json.dumps("张伟珍")[1:-1])
ROWS = [
    "import json\nrows = json.load(open(dataset))\nrow = rows[0]\nprint(row)", "row",
    "import sys\nprint(repr(row), file=sys.stderr)",
    "import pandas as pd\npd.DataFrame(rows)", "assert row['output'].startswith('x'), row", "raise ValueError(f'bad row {row}')",
    "from IPython.display import display, Markdown, HTML\ndisplay(row, Markdown(row['output']), HTML('<p>' + row['output']))",
    "def f(record):\n    patient = record['output']\n    return 1/0\n%xmode Verbose\nf(row)",
    "import logging\nlogging.warning('row %s', row)", "import pyarrow as pa\npa.array([row['output']]).cast(pa.int64())",
    "import datasets\nd = datasets.Dataset.from_list(rows)\nprint(d[0])\nd[0]", "row['output'] = int(row['output'])",
    "import pydantic\nclass M(pydantic.BaseModel):\n    output: int\nM(**row)", "import warnings\nwarnings.warn(row['output'])",
    "class UserError(Exception): pass\nraise UserError(row['output'])"]


def test_rows_of_a_private_dataset_are_nowhere(tmp_path):
    data = tmp_path/"rows.json"
    data.write_text(json.dumps([ROW]*3))
    given = {"dataset": str(data)}
    parameters = PARAMETERS + "\ndataset:str = 'mm'\nreveal:bool = False"
    _, nb, _ = ends(tmp_path, *ROWS, engine=None, tags=["raises-exception"], given=given, parameters=parameters)
    leaks = [c.id for c in nb.cells if any(m in json.dumps(c.get("outputs"), ensure_ascii=False) for m in MARKS)]
    assert len(leaks) >= 10                                             # of plain papermill
    error, nb, cells = ends(tmp_path, *ROWS, tags=["raises-exception"], given=given, parameters=parameters, record=True)
    assert set(cells) == {"completed"}
    held = bytes_of(tmp_path/"r").decode()
    assert not [m for m in MARKS if m in held]
    assert Run(tmp_path/"r").state["privacy"]["outputs_left_out"] >= 8 and "reveal shows it" in held
    assert "ValueError: text left out" in held
    (tmp_path/"shown").mkdir()
    error, nb, cells = ends(tmp_path/"shown", *ROWS[:2], given=given | {"reveal": True}, parameters=parameters)
    assert "Zebrafish" in json.dumps(nb.cells[2].outputs)


def test_a_failing_run_on_private_rows_says_nothing_of_them(tmp_path):
    data = tmp_path/"rows.json"
    data.write_text(json.dumps([ROW]*3))
    for way, kind in ((5, "ValueError"), (-1, "UserError")):
        (tmp_path/kind).mkdir()
        error, nb, cells = ends(tmp_path/kind, ROWS[0], ROWS[way], given={"dataset": str(data)}, parameters="dataset:str = 'mm'",
            record=True)
        assert cells == ["completed", "failed"]
        assert Run(tmp_path/kind/"r").state["reason"] == f"{kind} (its text is in record.ipynb)"
        assert not [m for m in MARKS if m in str(error) + bytes_of(tmp_path/kind/"r").decode()]


def test_scripts_floods_and_bombs(tmp_path):
    cells = ["from IPython.display import HTML, Javascript, Markdown, SVG, display\n"
        "display(HTML('<script>alert(1)</script><img src=x onerror=alert(2)><a href=\"javascript:alert(3)\">x</a><b>kept</b>'))",
        "display(Javascript('alert(4)'), Markdown('[x](javascript:alert(5)) <script>alert(6)</script>'))\n"
        "display(SVG('<svg xmlns=\"http://www.w3.org/2000/svg\" onload=\"alert(7)\"/>'))",
        "print('\\x1b]0;title\\x07\\x1b[2J\\x1b[31mred\\x1b[0m' + '\\x1b[1m'*20_000)",
        "for _ in range(50): print('x'*2**20)", "import base64, os\nfor _ in range(8): display(HTML('<p>' + 'y'*10**6))"]
    error, nb, states = ends(tmp_path, *cells, record=True)
    assert error is None and set(states) == {"completed"}
    text = (tmp_path/"r/record.ipynb").read_text()
    outputs = json.dumps([c.outputs for c in nb.cells])
    assert not any(bad in outputs for bad in ("<script", "onerror", "javascript:", "onload", "alert(4)", "\\u001b]", "[2J"))
    assert all(part in outputs for part in ("<b>kept</b>", "#unsafe-link", "output cut", "more outputs left out"))
    assert len(text) < 9e6


# ---- medllm run

def test_a_whole_run_on_private_rows_with_planted_secrets(tmp_path):
    "Our own cells keep their outputs; a planted one does not; nothing of the rows or the token is in any file."
    data = tmp_path/"rows.json"
    data.write_text(json.dumps([{k: f"{v} {i}" for k, v in ROW.items()} for i in range(16)]))
    notebook = nbformat.read(ROOT/"nbs/runs/sft.ipynb", 4)
    at = next(i for i, c in enumerate(notebook.cells) if c.id == "look")
    notebook.cells.insert(at, code_cell(f"print(open({str(data)!r}).read())\nprint('{TOKEN}')", id="planted"))
    nbformat.write(notebook, tmp_path/"sft.ipynb")
    done = run("medllm", "run", tmp_path/"sft.ipynb", "-p", "dataset", data, "-p", "max_steps", 2, "-p", "val_size", 2,
        "-p", "output_dir", tmp_path/"r", "-p", "note", "https://me:secret1234@host/", CLINIC_PASSWORD=PASSWORD)
    assert done.returncode == 2 and "looks like a secret" in done.stderr, done.stderr
    done = run("medllm", "run", tmp_path/"sft.ipynb", "-p", "dataset", data, "-p", "max_steps", 2, "-p", "val_size", 2,
        "-p", "output_dir", tmp_path/"r", CLINIC_PASSWORD=PASSWORD)
    assert done.returncode == 0, done.stderr
    held = bytes_of(tmp_path/"r").decode(errors="replace")
    assert not [m for m in (*MARKS, TOKEN) if m in held + done.stdout + done.stderr]
    state = Run(tmp_path/"r").state
    assert state["status"] == "completed" and state["linear"] and state["privacy"]["outputs_left_out"] == 1
    assert {c["id"]: c["status"] for c in state["cells"]}["planted"] == "completed"
    shown = {c.id: c.outputs for c in nbformat.read(tmp_path/"r/record.ipynb", 4).cells if c.cell_type == "code"}
    assert shown["verdict"] and shown["metrics"] and "reveal shows it" in shown["planted"][0].text
    assert TOKEN not in (tmp_path/"r/source.ipynb").read_text()


def test_another_attempt_in_the_same_folder(tmp_path):
    from medllm.experiment.execute import execute
    notebook = nbformat.read(ROOT/"nbs/runs/data.ipynb", 4)
    notebook.cells.insert(3, code_cell("import os\nif not os.environ.get('AGAIN'): os.kill(os.getpid(), 9)", id="killed"))
    nbformat.write(notebook, tmp_path/"data.ipynb")
    given = {"max_samples": 10, "near": False, "output_dir": str(tmp_path/"r")}
    assert execute(str(tmp_path/"data.ipynb"), given).state["status"] == "killed"
    os.environ["AGAIN"] = "1"
    try: again = execute(str(tmp_path/"data.ipynb"), given, resume=tmp_path/"r")
    finally: del os.environ["AGAIN"]
    assert again.state["status"] == "completed" and [a["status"] for a in again.state["attempts"]] == ["killed"]
    assert (tmp_path/"r/record.1.ipynb").exists() and "reason" not in again.state
    with pytest.raises(UserError, match="completed"): execute(str(tmp_path/"data.ipynb"), given, resume=tmp_path/"r")


@pytest.mark.slow
def test_a_training_that_is_asked_to_stop_takes_its_checkpoint(tmp_path):
    "SIGTERM to the command: the loop ends its step, the checkpoint is whole, what comes after does not run."
    words = [str(Path(sys.executable).parent/"medllm"), "run", "sft", "-p", "max_steps", "400", "-p", "max_samples", "40",
        "-p", "logging_steps", "1", "-p", "save_steps", "1000", "-p", "output_dir", str(tmp_path/"r")]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    history, deadline = tmp_path/"r/history.jsonl", time.monotonic() + 120
    while not (history.exists() and history.read_text().count("\n") > 3):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.2)
    process.terminate()
    assert process.wait(60) == 75, process.stderr.read()
    state = Run(tmp_path/"r").state
    cells = {c["id"]: c["status"] for c in state["cells"]}
    assert state["status"] == "interrupted" and "checkpoint-" in state["reason"]
    assert (cells["train"], cells["curves"], cells["verdict"]) == ("interrupted", "not_run", "not_run")
    assert list((tmp_path/"r").glob("checkpoint-*/COMMIT.json")) and not (tmp_path/"r/model.safetensors").exists()
