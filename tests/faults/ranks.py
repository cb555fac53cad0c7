"""Two processes: only one gets the signal, both save in the same step, and the run goes on to the same weights."""
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from forks import SFT, curve, weights, words

FLAGS = SFT | dict(max_steps=8, save_steps=3, per_device_train_batch_size=2)
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def launch(folder, flags=FLAGS):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d",
        "--rdzv_endpoint", "127.0.0.1:0", "-m", "medllm.train", *words(folder, flags)], env=ENV, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def workers(p):
    import psutil
    return [c.pid for c in psutil.Process(p.pid).children(recursive=True) if "medllm.train" in " ".join(c.cmdline())]


if __name__ == "__main__":
    out = {}
    with tempfile.TemporaryDirectory() as d:
        whole = launch(f"{d}/whole")
        said = whole.communicate()[0]
        assert whole.returncode == 0, said[-3000:]
        p, history = launch(f"{d}/half"), Path(f"{d}/half/history.jsonl")
        while not history.exists() or '"step": 2,' not in history.read_text(): time.sleep(0.02)
        os.kill(sorted(workers(p))[1], signal.SIGTERM)
        start = time.monotonic()
        said = p.communicate()[0]
        out = dict(code=p.returncode, seconds=round(time.monotonic() - start, 1), stopped=said.count("asked to stop"),
            said=[line for line in said.splitlines() if line.startswith("error: ")],
            codes=said.count("exitcode  : 75") + said.count("exitcode: 75"),
            left=sorted(f.name for f in Path(f"{d}/half").glob("checkpoint-*")))
        again = launch(f"{d}/half")
        said = again.communicate()[0]
        out |= dict(again=again.returncode, same=[weights(f"{d}/half") == weights(f"{d}/whole"),
            curve(f"{d}/half") == curve(f"{d}/whole")])
        if again.returncode: print(said[-3000:], file=sys.stderr)
        one = subprocess.run([sys.executable, "-m", "medllm.train", *words(f"{d}/half", FLAGS)], env=ENV, capture_output=True,
            text=True)
        out["one"] = [one.returncode, one.stderr.splitlines()[-1]]
    print(json.dumps(out, indent=1))
