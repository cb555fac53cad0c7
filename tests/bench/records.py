"""What records cost: the writing of a notebook of 5 MB, and the share of a run that goes into saving: tests/bench/records.py."""
import json
import sys
import tempfile
import time
from pathlib import Path

from nbformat.v4 import new_code_cell, new_notebook, new_output

from medllm.records.cell_status import RecordManager, TrueManager
from medllm.experiment.execute import execute
from medllm.records.redact import Policy


def a_save(megabytes=5, cells=10, times=20):
    "Milliseconds of one save of a notebook of this size: of the cell that ended, of every cell anew, and of the bytes alone."
    text = "".join(f"step {i:6}, loss {7 - i/1e5:.5f}, sha256 {i:064x}\n" for i in range(megabytes*10**6//cells//100))
    nb = new_notebook(cells=[new_code_cell(str(i), outputs=[new_output("stream", text=text)]) for i in range(cells)],
        metadata={"papermill": {}})
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as d:
        man = TrueManager(nb, Policy(), output_path=f"{d}/r.ipynb", progress_bar=False)
        man.notebook_start()
        for i, c in enumerate(nb.cells):
            c.outputs = [new_output("stream", text=text)]
            man.cell_end(c, i, "completed")
        clock = lambda f: min(_timed(f) for _ in range(times))
        kept = clock(man.save)
        one = clock(lambda: (man._kept.pop(0), man.keep(0), man.save()))
        anew = clock(lambda: (man._kept.clear(), man.save()))
        size = Path(f"{d}/r.ipynb").stat().st_size
        plain = clock(lambda: Path(f"{d}/p.ipynb").write_bytes(Path(f"{d}/r.ipynb").read_bytes()))
    return {"bytes": size, "save_ms": kept, "save_after_a_cell_of_a_tenth_ms": one,
        "all_cells_anew_ms": anew, "plain_write_ms": plain}


def _timed(f):
    begun = time.perf_counter()
    f()
    return round(1000*(time.perf_counter() - begun), 2)


def a_run(**given):
    "Seconds of a run, and of it what scrubbing, encoding and saving its record took."
    spent = {"n": 0, "seconds": 0.0}
    for owner, name in ((RecordManager, "save"), (RecordManager, "keep")):
        plain = getattr(owner, name)
        def timed(self, *a, plain=plain, **k):
            if spent.get("inside"): return plain(self, *a, **k)
            spent["inside"], begun = True, time.perf_counter()
            try: return plain(self, *a, **k)
            finally:
                spent["inside"], spent["n"] = False, spent["n"] + 1
                spent["seconds"] += time.perf_counter() - begun
        setattr(owner, name, timed)
    with tempfile.TemporaryDirectory() as d:
        begun = time.perf_counter()
        run = execute("sft", given | {"runs_dir": d})
        whole = time.perf_counter() - begun
    return {"status": run.state["status"], "seconds": round(whole, 1), "saves": spent["n"],
        "saving_seconds": round(spent["seconds"], 3), "share": f"{spent['seconds']/whole:.3%}"}


if __name__ == "__main__":
    print(json.dumps({"a save": a_save(), "a run": a_run(num_train_epochs=20)}, indent=1))
