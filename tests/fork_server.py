"""A process that has imported everything once and forks for each command; `commands.run` asks it.

A child has the words, environment, working directory and streams of a program of its own and ends as one does: what it
saves is the start of Python and the imports. Where the environment differs in something that an interpreter or a library
reads while it starts, another server is asked, or a true process is started.

    python tests/fork_server.py ADDRESS     a socket; the server ends when the pipe `alive` beside it is closed
"""
import atexit
import contextlib
import gc
import hashlib
import importlib
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "MEDLLM_FORK_SERVERS"     # variable that names the folder of the servers; without it all processes are true ones
IMPORTED = "MEDLLM_FORK_IMPORTS"   # variable that names what a server imports instead of `MODULES`, from another path
AT_START = (IMPORTED, "PYTHON", "OMP_", "MKL_", "OPENBLAS_", "HF_", "HUGGINGFACE", "TRANSFORMERS_", "TORCH", "PYTORCH",
    "CUBLAS_", "CUDA", "TQDM_", "MPLCONFIGDIR", "LD_", "LC_", "LANG", "XDG_", "JUPYTER", "HOME")
# set by what is imported, or read when it is used
LATER = ("PYTHONSAFEPATH", "HF_TOKEN", "HF_HUB_DISABLE_TELEMETRY", "TORCHELASTIC_", "TORCH_NCCL")
PROGRAMS = ("medllm", "papermill", "nbdev_clean", "nbdev_export", "nbdev_test")     # of this environment, beside `python …`
MODULES = """torch torch.utils.data torch.distributed transformers transformers.trainer transformers.models.llama.modeling_llama
    transformers.models.auto.modeling_auto transformers.models.auto.tokenization_auto peft accelerate datasets safetensors.torch
    papermill nbclient nbformat ipykernel.kernelapp ipykernel.ipkernel ipykernel.zmqshell IPython jupyter_client.manager
    matplotlib.figure matplotlib.backends.backend_agg numpy pandas nbdev.test""".split()


def read_at_start(environment):
    "The part of an environment that a process has to be started with."
    kept = {k: v for k, v in environment.items() if k.startswith(AT_START) and not k.startswith(LATER)}
    if kept.get("PYTHONPATH") in ("", str(ROOT)): del kept["PYTHONPATH"]            # where a child imports from anyway
    return kept


def program(words):
    "What an interpreter would be given to run these words; None when they are no plain Python program."
    words, place = [str(w) for w in words], Path(words[0])
    if place.name in PROGRAMS and place.parent == Path(sys.executable).parent: return words
    plain = len(words) > 1 and (words[1] in ("-c", "-m") or words[1][:1] != "-")
    return words[1:] if plain and place.name.startswith("python") and place.samefile(sys.executable) else None


def address(environment, words):
    """Where the server for such an environment listens, or None where a true process is cheaper.

    It takes as long to start as two true processes: for a program in an environment of its own it starts when it is asked
    for the third time; for kernels, and where the environment is this process's, at once."""
    folder, kept = Path(environment[FOLDER]), read_at_start(environment)
    if "PYTHONPATH" in kept and IMPORTED not in kept: return None                # other modules than those imported here
    place = folder/f"{hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]}.sock"
    if place.exists(): return place
    if IMPORTED in kept or "ipykernel_launcher" in words or kept == read_at_start(os.environ): return _start(place, environment)
    for turn in ("first", "second"):
        with contextlib.suppress(FileExistsError):
            os.close(os.open(place.with_suffix(f".{turn}"), os.O_CREAT | os.O_EXCL))
            return None
    return _start(place, environment)


def _start(place, environment):
    "Start a server, or wait for it when somebody else has."
    with contextlib.suppress(FileExistsError):
        os.close(os.open(place.with_suffix(".started"), os.O_CREAT | os.O_EXCL))
        with open(place.with_suffix(".log"), "wb") as log:
            subprocess.Popen([sys.executable, __file__, place], cwd=ROOT, env=dict(environment), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    until = time.monotonic() + 120
    while not place.exists() and time.monotonic() < until: time.sleep(0.05)
    return place if place.exists() else None


class Forked:
    "A child of a server, used as a `subprocess.Popen` is."
    stdin = stdout = stderr = returncode = None

    def __init__(self, place, args, stdin, stdout, stderr, cwd, env, session):
        self.args, self._line = args, socket.socket(socket.AF_UNIX)
        self._line.connect(str(place))
        asked = json.dumps({"words": args, "cwd": str(cwd or os.getcwd()), "env": dict(env), "session": session}).encode()
        socket.send_fds(self._line, [len(asked).to_bytes(4, "little")], [stdin, stdout, stderr])
        self._line.sendall(asked)
        self._told = self._line.makefile("r")
        self.pid = json.loads(self._told.readline())["pid"]

    def wait(self, timeout=None):
        "The exit code, negative for a signal."
        if self.returncode is None:
            with selectors.DefaultSelector() as ready:
                ready.register(self._line, selectors.EVENT_READ)
                if not ready.select(timeout): raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = json.loads(self._told.readline() or '{"code": -9}')["code"]
            self._line.close()
        return self.returncode

    def poll(self):
        "The exit code, or None while it runs."
        with contextlib.suppress(subprocess.TimeoutExpired): return self.wait(0)

    def send_signal(self, number):
        "Send a signal, unless it has ended."
        if self.poll() is None: os.kill(self.pid, number)

    def kill(self): self.send_signal(signal.SIGKILL)
    def terminate(self): self.send_signal(signal.SIGTERM)


def fork(args, stdin, stdout, stderr, cwd=None, env=None, session=False):
    "A child that runs these words, given descriptors of its streams; None where it has to be a true process."
    env = os.environ if env is None else env
    words = program(args) if env.get(FOLDER) else None
    place = address(env, words) if words else None
    if place is None: return None
    with contextlib.suppress(ConnectionRefusedError):                            # it has ended
        return Forked(place, [str(a) for a in args], stdin, stdout, stderr, cwd, env, session)


# ---- what is asked for by programs that are themselves children

def popen(args, *, stdout, stderr, stdin=None, env=None, start_new_session=False):
    "`subprocess.Popen` for those of our programs that start another one of ours."
    with open(os.devnull, "rb") as nothing:
        child = fork(args, nothing.fileno(), stdout.fileno(), stdout.fileno(), None, env, start_new_session)
    return child or subprocess.Popen(args, stdout=stdout, stderr=stderr, stdin=stdin, env=env,
        start_new_session=start_new_session)


def launch_kernel(cmd, stdin=None, stdout=None, stderr=None, env=None, cwd=None, independent=False, **more):
    "`jupyter_client.launcher.launch_kernel`, its kernel forked."
    env = dict(os.environ if env is None else env) | {"JPY_PARENT_PID": str(os.getpid())}
    with open(os.devnull, "rb") as nothing:
        child = fork(cmd, nothing.fileno(), 1 if stdout is None else stdout, 2 if stderr is None else stderr, cwd, env, True)
    return child or _true_kernel(cmd, stdin=stdin, stdout=stdout, stderr=stderr, env=env, cwd=cwd,
        independent=independent, **more)


@contextlib.contextmanager
def forked_kernels():
    "Within the block a kernel that this process starts is forked."
    global _true_kernel
    from jupyter_client.provisioning import local_provisioner
    before, local_provisioner.launch_kernel = local_provisioner.launch_kernel, launch_kernel
    _true_kernel = before
    try: yield
    finally: local_provisioner.launch_kernel = before


def prepare():
    "Import what commands and kernels import, and have them ask for children too."
    for name in os.environ.get(IMPORTED, "").split() or MODULES: importlib.import_module(name)
    if IMPORTED in os.environ: return
    import medllm
    for found in pkgutil.walk_packages(medllm.__path__, "medllm."):
        if not found.name.endswith("__main__"):
            with contextlib.suppress(ImportError): importlib.import_module(found.name)        # of an extra that is not here
    from medllm.experiment import pipeline, sweep
    for module in (pipeline, sweep):
        module.subprocess = SimpleNamespace(Popen=popen, STDOUT=subprocess.STDOUT, DEVNULL=subprocess.DEVNULL)
    gc.collect()
    gc.freeze()                                    # nothing of it is looked at again, here or in a child


# ---- a child

def _interpret(words):
    "What `python …` does with its words."
    sys.orig_argv[:] = [sys.executable, *words]
    main = sys.modules["__main__"] = type(sys)("__main__")
    main.__builtins__ = __builtins__
    first = {"-c": "", "-m": os.getcwd()}.get(words[0], str(Path(words[0]).resolve().parent))
    sys.path[:1] = [] if os.environ.get("PYTHONSAFEPATH") else [first]
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")


def _ended(words):
    "The exit code of a program; what an interpreter does at its end is done."
    code = 0
    try: _interpret(words)
    except SystemExit as error: code = error.code
    except BaseException as error:
        code = 1
        try: sys.excepthook(type(error), error, error.__traceback__)
        except SystemExit as other: code = other.code
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError): stream.flush()
    return (code or 0) & 255


def become(asked, streams, line):
    "Be the program that was asked for; never returns. Who asked is told when it has a session of its own: he will signal it."
    try:
        if asked["session"]: os.setsid()
        with contextlib.suppress(OSError): line.sendall(json.dumps({"pid": os.getpid()}).encode() + b"\n")
        line.close()
        for number, stream in enumerate(streams): os.dup2(stream, number)
        for stream in streams: os.close(stream)
        os.chdir(asked["cwd"])
        os.environ.clear()
        os.environ.update(asked["env"])
        for number in (signal.SIGTERM, signal.SIGHUP): signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tempfile.tempdir = None
        sys.modules["numpy"].random.seed()         # Python's own numbers begin anew by themselves
        words = program(asked["words"])
        if words[:2] == ["-m", "ipykernel_launcher"]:
            os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        if os.environ.get("MPLBACKEND"): sys.modules["matplotlib"].rcParams["backend"] = os.environ["MPLBACKEND"]
        code = _ended(words)
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


# ---- the server

class Server:
    "Forks whenever somebody asks, and tells the exit code."
    def __init__(self, place):
        self.ready, self.children = selectors.DefaultSelector(), {}
        self.alive = os.open(place.parent/"alive", os.O_RDONLY | os.O_NONBLOCK)
        self.door = socket.socket(socket.AF_UNIX)
        self.door.bind(f"{place}.new")
        self.door.listen(64)
        self.ready.register(self.door, selectors.EVENT_READ, self.accept)
        self.ready.register(self.alive, selectors.EVENT_READ, self.leave)
        os.rename(f"{place}.new", place)

    def serve(self):
        "Until the tests have ended."
        while True:
            for key, _ in self.ready.select(): key.data(key.fd)

    def leave(self, _):
        "End, and with it what still runs."
        for pid, _ in self.children.values():
            with contextlib.suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
        os._exit(0)

    def accept(self, _):
        "Fork a child for a request."
        line, _ = self.door.accept()
        head, streams, _, _ = socket.recv_fds(line, 4, 3)
        asked = line.makefile("rb").read(int.from_bytes(head, "little"))
        if not asked: return line.close()                                     # who asked has gone
        pid = os.fork()
        if not pid:
            self.ready.close()
            for held in (self.alive, self.door.fileno(), *self.children,
                    *(other.fileno() for _, other in self.children.values())): os.close(held)
            become(json.loads(asked), streams, line)
        for stream in streams: os.close(stream)
        child = os.pidfd_open(pid)
        self.children[child] = pid, line
        self.ready.register(child, selectors.EVENT_READ, self.ended)

    def ended(self, child):
        "Tell how a child ended."
        pid, line = self.children.pop(child)
        self.ready.unregister(child)
        os.close(child)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(OSError): line.sendall(json.dumps({"code": code}).encode() + b"\n")
        line.close()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)       # of a terminal; a child handles it as a program does
    prepare()
    with forked_kernels(): Server(Path(sys.argv[1])).serve()
