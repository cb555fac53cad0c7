"""C1: a run that is killed again and again, and started again by the same command, ends with the same weights.

    python tests/faults/kill.py [kills]
"""
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from forks import SFT, curve, ended, fork, main, train, weights, words
from medllm.train.checkpoints import check, checkpoints_in

FLAGS = SFT | dict(max_steps=24, save_steps=1, save_total_limit=2, eval_strategy="no", val_size=0)


def lost(folder):
    "Steps that were logged and are in no checkpoint."
    history = Path(folder)/"history.jsonl"
    lines = history.read_text().split("\n")[:-1] if history.exists() else []
    last = max((json.loads(line)["step"] for line in lines), default=0)
    return last - max((step for step, f in checkpoints_in(folder) if not check(f)), default=0)


def attempts(folder, kills, rng, longest):
    "Kill a run at random moments until it has ended by itself or been killed often enough; (kills, most steps lost)."
    done, most = 0, 0
    while True:
        pid = fork(lambda: main(words(folder, FLAGS)), f"{folder}.log")
        code = ended(pid, rng.uniform(0, longest) if done < kills else None)
        if code is None:
            os.kill(pid, signal.SIGKILL)
            ended(pid)
            done, most = done + 1, max(most, lost(folder))
        elif code: raise SystemExit(Path(f"{folder}.log").read_text()[-3000:])
        else: return done, most


if __name__ == "__main__":
    kills, rng, start = int(sys.argv[1]) if len(sys.argv) > 1 else 20, random.Random(5), time.monotonic()
    with tempfile.TemporaryDirectory() as d:
        begun = time.monotonic()
        if train(f"{d}/whole", FLAGS): raise SystemExit(Path(f"{d}/whole.log").read_text()[-3000:])
        took, done, most, runs = time.monotonic() - begun, 0, 0, 0
        while done < kills:
            more, worst = attempts(f"{d}/{runs}", kills - done, rng, took/2)
            done, most, runs = done + more, max(most, worst), runs + 1
            assert weights(f"{d}/{runs - 1}") == weights(f"{d}/whole"), "other weights"
            assert curve(f"{d}/{runs - 1}") == curve(f"{d}/whole"), "another curve"
        print(json.dumps({"kills": done, "runs": runs, "steps_lost_at_most": most, "one_run_s": round(took, 1),
            "seconds": round(time.monotonic() - start, 1)}))
