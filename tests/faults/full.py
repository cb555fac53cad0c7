"""A disk that takes no more; two runs in one folder.

    python tests/faults/full.py        a training of adapters, and two in one folder
    python tests/faults/full.py full   checkpoints of all weights with their optimiser, and `medllm run` on small disks

A limit on the size of files stands in for the full disk: the system refuses the write in the middle of a file (EFBIG for
ENOSPC), without the right to mount one. With a tmpfs in MEDLLM_SMALL_DISK (1 MB) a real one is used beside it. Whoever may
mount gets disks for `full`: one too small for the second checkpoint, one filled to its last byte, one without inodes.
"""
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from forks import SFT, curve, ended, fork, main, train, weights, words

from medllm.cli.main import main as medllm
from medllm.records.record import read_run_json, status_of
from medllm.records.verify import verify
from medllm.checkpoint.commit import checkpoint_fault, checkpoints_in

FLAGS = SFT | dict(max_steps=8, save_steps=2, eval_strategy="no", eval_steps=None, val_size=0)
ALL = {k: v for k, v in FLAGS.items() if not k.startswith(("lora", "eval"))} | dict(finetuning_type="full", save_total_limit=2)


def limited(folder, steps, flags=FLAGS, most=20_000):
    "A run in which no file may grow beyond a size while these steps are saved."
    def work():
        from medllm.checkpoint import resumable
        original = resumable.ResumableTrainer._save_checkpoint
        def changed(self, *args):
            low = most if self.state.global_step in steps else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (low, resource.RLIM_INFINITY))
            try: return original(self, *args)
            finally: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        resumable.ResumableTrainer._save_checkpoint = changed
        return main(words(folder, flags))
    return ended(fork(work, f"{folder}.log"))


def events(folder, name):
    file = Path(folder)/"events.jsonl"
    return [e for e in map(json.loads, file.read_text().splitlines()) if e["event"] == name] if file.exists() else []


def together(d):
    "Two runs of the same command at once: exit codes and what the second says; then one on the lock of a killed run."
    first = fork(lambda: main(words(f"{d}/two", FLAGS | dict(max_steps=10**6, save_strategy="no"))), f"{d}/first.log")
    while not (Path(d)/"two"/".lock").exists() or "pid" not in (Path(d)/"two"/".lock").read_text(): time.sleep(0.05)
    second = ended(fork(lambda: main(words(f"{d}/two", FLAGS)), f"{d}/second.log"))
    os.kill(first, 9)
    ended(first)
    third = train(f"{d}/two", FLAGS, f"{d}/third.log")
    return dict(second=second, said=Path(f"{d}/second.log").read_text().splitlines()[-1], third=third,
        taken="is taken over" in Path(f"{d}/third.log").read_text(), same=weights(f"{d}/two") == weights(f"{d}/whole"))


def refused(d, flags, most):
    "What becomes of runs of which one or all checkpoints behind the first are refused."
    out = {}
    assert train(f"{d}/whole", flags) == 0, Path(f"{d}/whole.log").read_text()[-3000:]
    for name, steps in (("once", (4,)), ("always", (4, 6, 8))):
        code = limited(f"{d}/{name}", steps, flags, most)
        out[name] = dict(code=code, there=sorted(f.name for f in Path(d, name).glob("checkpoint-*")),
            skipped=[e["step"] for e in events(f"{d}/{name}", "save_skipped")],
            said=Path(f"{d}/{name}.log").read_text().splitlines()[-1])
    out["once"]["same"] = [weights(f"{d}/once") == weights(f"{d}/whole"), curve(f"{d}/once") == curve(f"{d}/whole")]
    out["always"]["again"] = train(f"{d}/always", flags)
    out["always"]["same"] = weights(f"{d}/always") == weights(f"{d}/whole")
    return out


@contextlib.contextmanager
def disk(place, options):
    "A small disk."
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)
    try: yield place
    finally: subprocess.run(["umount", place], check=True)


def _fill(place):
    "Fill a disk to its last byte as soon as a checkpoint is there."
    while not (place/"r/checkpoint-2/COMMIT.json").exists(): time.sleep(0.01)
    with contextlib.suppress(OSError), open(place/"filler", "wb", buffering=0) as f:
        for size in (2**20, 1):
            with contextlib.suppress(OSError):
                while f.write(bytes(size)): pass


def run_words(folder):
    "The words of a run with a record."
    shown = ("dataset", "max_samples", "cutoff_len", "per_device_train_batch_size", "max_steps", "save_steps", "logging_steps",
        "val_size", "learning_rate", "finetuning_type")
    given = [w for name in shown for w in ("-p", name, str(ALL[name]))]
    return ["run", "sft", *given, "-p", "extra", '{"save_total_limit": 2}', "-p", "output_dir", str(folder)]


def recorded(d, name, options, larger):
    "`medllm run sft` on a disk without room, then with it: how the run ends, what its record says, and what it comes to."
    with disk(Path(d)/name, options) as place:
        call = lambda *said: ended(fork(lambda: medllm(list(said)), f"{d}/{name}.log"))
        filler = fork(lambda: _fill(place), os.devnull) if name == "filled" else None
        code = call(*run_words(place/"r"))
        said, status = Path(f"{d}/{name}.log").read_text().splitlines(), status_of(place/"r")
        out = dict(code=code, said=[line for line in said if "make room" in line][-1:], status=status,
            reason=read_run_json(place/"r").get("reason", ""), held=[bool(v := verify(place/"r")), *v.defects[:2]],
            there=[(step, checkpoint_fault(folder)) for step, folder in checkpoints_in(place/"r")],
            left=[f.name for f in (place/"r").rglob("*.part")], report="report it" in "\n".join(said))
        if filler: ended(filler)
        (place/"filler").unlink(missing_ok=True)
        subprocess.run(["mount", "-o", f"remount,{larger}", place], check=True)
        out["again"] = call("runs", "resume", f"{place}/r")
        out["then"] = [status_of(place/"r"), bool(verify(place/"r")), weights(place/"r") == weights(f"{d}/run"),
            [f.name for f in place.rglob("*.part")], len(read_run_json(place/"r").get("attempts") or [])]
        return out


def small_disks(d):
    "Three disks, where they may be mounted."
    if os.geteuid() or not shutil.which("mount"): return "only root may mount"
    try:
        with disk(Path(d)/"tried", "size=1m"): pass
    except subprocess.CalledProcessError: return "a tmpfs cannot be mounted"
    assert ended(fork(lambda: medllm(run_words(f"{d}/run")), f"{d}/run.log")) == 0, Path(f"{d}/run.log").read_text()[-3000:]
    return {name: recorded(d, name, options, larger) for name, options, larger in (("bytes", "size=40m", "size=200m"),
        ("filled", "size=90m", "size=200m"), ("inodes", "size=200m,nr_inodes=36", "nr_inodes=200"))}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as d:
        if sys.argv[1:] == ["full"]: out = refused(d, ALL, 10_000_000) | {"disks": small_disks(d)}     # the weights fit
        else:
            out = refused(d, FLAGS, 20_000) | {"together": together(d)}
            if small := os.environ.get("MEDLLM_SMALL_DISK"):
                code = train(f"{small}/run", FLAGS, f"{d}/small.log")
                out["small"] = dict(code=code, said=Path(f"{d}/small.log").read_text().splitlines()[-3:],
                    left=[f.name for f in Path(small, "run").glob("checkpoint-*")])
    json.dump(out, sys.stdout, indent=1)
