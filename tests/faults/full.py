"""C3, C13: a disk that takes no more; two runs in one folder.

A limit on the size of files stands in for the full disk: the system refuses the write in the middle of a file (EFBIG for
ENOSPC), without the right to mount one. With a tmpfs in MEDLLM_SMALL_DISK (1 MB) a real one is used beside it.
"""
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

from forks import SFT, curve, ended, fork, main, train, weights, words

FLAGS = SFT | dict(max_steps=8, save_steps=2, eval_strategy="no", val_size=0)


def limited(folder, steps):
    "A run in which no file may grow beyond 20 kB while these steps are saved."
    def work():
        from medllm.train import resumable
        original = resumable.ResumableTrainer._save_checkpoint
        def changed(self, *args):
            low = 20_000 if self.state.global_step in steps else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (low, resource.RLIM_INFINITY))
            try: return original(self, *args)
            finally: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        resumable.ResumableTrainer._save_checkpoint = changed
        return main(words(folder, FLAGS))
    return ended(fork(work, f"{folder}.log"))


def events(folder, name):
    file = Path(folder)/"events.jsonl"
    return [e for e in map(json.loads, file.read_text().splitlines()) if e["event"] == name] if file.exists() else []


def together(d):
    "Two runs of the same command at once: exit codes and what the second says; then one on the lock of a killed run."
    first = fork(lambda: main(words(f"{d}/two", FLAGS | dict(max_steps=400))), f"{d}/first.log")
    while not (Path(d)/"two"/".lock").exists() or "pid" not in (Path(d)/"two"/".lock").read_text(): time.sleep(0.05)
    second = ended(fork(lambda: main(words(f"{d}/two", FLAGS)), f"{d}/second.log"))
    os.kill(first, 9)
    ended(first)
    third = train(f"{d}/two", FLAGS, f"{d}/third.log")
    return dict(second=second, said=Path(f"{d}/second.log").read_text().splitlines()[-1], third=third,
        taken="is taken over" in Path(f"{d}/third.log").read_text(), same=weights(f"{d}/two") == weights(f"{d}/whole"))


if __name__ == "__main__":
    out = {}
    with tempfile.TemporaryDirectory() as d:
        assert train(f"{d}/whole", FLAGS) == 0, Path(f"{d}/whole.log").read_text()[-3000:]
        for name, steps in (("once", (4,)), ("always", (4, 6, 8))):
            code = limited(f"{d}/{name}", steps)
            out[name] = dict(code=code, there=sorted(f.name for f in Path(d, name).glob("checkpoint-*")),
                skipped=[e["step"] for e in events(f"{d}/{name}", "save_skipped")],
                said=Path(f"{d}/{name}.log").read_text().splitlines()[-1])
        out["once"]["same"] = [weights(f"{d}/once") == weights(f"{d}/whole"), curve(f"{d}/once") == curve(f"{d}/whole")]
        out["always"]["again"] = train(f"{d}/always", FLAGS)
        out["always"]["same"] = weights(f"{d}/always") == weights(f"{d}/whole")
        out["together"] = together(d)
        if small := os.environ.get("MEDLLM_SMALL_DISK"):
            code = train(f"{small}/run", FLAGS, f"{d}/small.log")
            out["small"] = dict(code=code, said=Path(f"{d}/small.log").read_text().splitlines()[-3:],
                left=[f.name for f in Path(small, "run").glob("checkpoint-*")])
    json.dump(out, sys.stdout, indent=1)
