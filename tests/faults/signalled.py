"""C7, C8: SIGTERM in the middle of everything; the run ends with 75 in time, and goes on to the same weights.

    python tests/faults/signalled.py [place …]
"""
import json
import os
import signal
import sys
import tempfile
import time
from functools import wraps
from pathlib import Path

from forks import GRPO, SFT, curve, ended, fork, main, train, weights, words

SFT = SFT | dict(max_steps=8)


def send(): os.kill(os.getpid(), signal.SIGTERM)


def hit(owner, name, nth, before=True):
    "Have the nth call of a function send a signal, at its beginning or at its end."
    original, calls = getattr(owner, name), [0]
    @wraps(original)
    def changed(*args, **kwargs):
        calls[0] += 1
        if before and calls[0] == nth: send()
        out = original(*args, **kwargs)
        if not before and calls[0] == nth: send()
        return out
    setattr(owner, name, changed)


def forward(): from medllm.train.objectives import TokenLoss; hit(TokenLoss, "__call__", 5)
def backward(): from accelerate import Accelerator; hit(Accelerator, "backward", 5, before=False)
def optimizer(): from torch.optim import AdamW; hit(AdamW, "step", 5)
def evaluation(): from medllm.train.objectives import TokenLoss; hit(TokenLoss, "validate", 1)      # before training
def validation(): from medllm.train.objectives import TokenLoss; hit(TokenLoss, "validate", 2)      # after step 5
def save(): from medllm.checkpoint import resumable; hit(resumable, "commit", 1)
def after_save(): from medllm.checkpoint import resumable; hit(resumable, "commit", 2, before=False)
def mapping(): from medllm.data import cache; hit(cache, "tokenise", 1, before=False)
def final(): from medllm.train import loop; hit(loop, "_save", 1)
def generation():
    from medllm.rl import sampling_trainer as rollouts
    original, calls = rollouts.sample_answers, [0]
    def changed(model, *args):
        calls[0] += 1
        if calls[0] != 2: return original(model, *args)
        inner = model.register_forward_hook(lambda *_: (inner.remove(), send(), None)[2])     # after the first token
        return original(model, *args)
    rollouts.sample_answers = changed


PLACES = {f.__name__: f for f in (
    forward, backward, optimizer, evaluation, validation, save, after_save, mapping, final, generation)}


def interrupted(folder, flags, place):
    "A run that gets a signal at a place: exit code and seconds from the signal to the end."
    def work():
        PLACES[place]()
        more = dict(tokenized_path=f"{folder}-rows") if place == "mapping" else {}
        original = globals()["send"]
        def timed():
            Path(f"{folder}.sent").write_text(str(time.time()))
            original()
        globals()["send"] = timed
        return main(words(folder, flags | more))
    code = ended(fork(work, f"{folder}.log"))
    return code, time.time() - float(Path(f"{folder}.sent").read_text())


def twice(folder, number):
    "A run that gets two signals while it holds a step up: exit code, and whether its checkpoints are whole."
    def work():
        from medllm.train.objectives import TokenLoss
        original, calls = TokenLoss.__call__, [0]
        def slow(*args):
            calls[0] += 1
            if calls[0] == 5:
                for _ in range(2):
                    os.kill(os.getpid(), number)
                    time.sleep(0.5)
            return original(*args)
        TokenLoss.__call__ = slow
        return main(words(folder, SFT))
    return ended(fork(work, f"{folder}.log"))


if __name__ == "__main__":
    out = {}
    with tempfile.TemporaryDirectory() as d:
        whole = {}
        for place in sys.argv[1:] or PLACES:
            flags, name = (GRPO, "grpo") if place == "generation" else (SFT, "sft")
            if name not in whole:
                assert train(f"{d}/{name}", flags) == 0, Path(f"{d}/{name}.log").read_text()[-3000:]
                whole[name] = weights(f"{d}/{name}"), curve(f"{d}/{name}")
            folder = f"{d}/{place}"
            code, seconds = interrupted(folder, flags, place)
            said = Path(f"{folder}.log").read_text().splitlines()[-1]
            finished = (Path(folder)/"metrics.json").exists()
            again = train(folder, flags)
            same = [weights(folder) == whole[name][0], curve(folder) == whole[name][1]] if again == 0 else []
            out[place] = dict(code=code, seconds=round(seconds, 1), finished=finished, again=again, same=same, said=said)
            if again: print(Path(f"{folder}.log").read_text()[-2000:], file=sys.stderr)
        if not sys.argv[1:]:
            out["twice"] = [twice(f"{d}/twice{int(n)}", n) for n in (signal.SIGTERM, signal.SIGINT)]
            from medllm.checkpoint.commit import newest
            out["left"] = [newest(f"{d}/twice{int(n)}", print).name for n in (signal.SIGTERM, signal.SIGINT)]
    print(json.dumps(out, indent=1))
