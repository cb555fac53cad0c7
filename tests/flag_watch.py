"""What a small training run does, wrote and came to, so that two of them can be compared; `flags.py` asks."""
import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

from flag_cases import BASE, LOOKS, LORA, SAVES, STAGES

# what is trained on

ASKED = ("Gout?", "What is scurvy and what is it like?", "Fever?", "Is this cough a cold?", "Burn?", "Is it the heart, doctor?")


def talk():
    "Rows of every kind: long, of two turns, with thinking, in pairs of equal beginnings."
    rows = [{"instruction": f"{q} Case {n}.", "output": f"Rest {'very '*(n % 3)}much, {n} days."} for n, q in enumerate(ASKED*2)]
    rows[1] |= {"history": [["Hello", "Good day to you."]]}
    rows[2] |= {"output": "<think>It may be measles.</think>It is measles."}
    rows[3] |= {"instruction": "Is this cough a cold? " + "It is an old cough. "*6}
    return rows


PROGRAM = '''
import datasets
class Rows(datasets.GeneratorBasedBuilder):
    def _info(self): return datasets.DatasetInfo()
    def _split_generators(self, manager): return [datasets.SplitGenerator(name="train", gen_kwargs={"number": 9})]
    def _generate_examples(self, number):
        for n in range(number): yield n, {"instruction": f"Is {n} right?", "output": "It is."}
'''


def write_rows(place):
    "Datasets for every stage, in a registry."
    held = [{"instruction": q, "output": f"Call {'many '*n}doctors."} for n, q in enumerate(ASKED[:3])]
    other = [{"instruction": f"May I eat {n} plums?", "output": "Yes."} for n in range(5)]
    three = lambda q, n: {"instruction": q, "output": [f"Rest {n} days.", f"Walk {n}.", "Go far " + "away "*n]}
    sets = {"talk": talk(), "held": held, "other": other, "again": talk()[4:8] + other[:2],
        "bad": talk()[:9] + [{"instruction": "Nothing?"}], "open": other,
        "bad_1_of_200": [*talk()[:9], {"instruction": "Nothing?"}, *talk()*16],
        "near": [r | {"instruction": f"{r['instruction']} {'Is it bad? '*6}{'Please.'*(n % 2)}"} for n, r in enumerate(talk())],
        "pairs": [three(q, n) for n, q in enumerate(ASKED)], 
        "pairs_held": [three(f"And now? {q}", n + 1) for n, q in enumerate(ASKED)]}
    for name, rows in sets.items(): (place/f"{name}.json").write_text(json.dumps(rows))
    (place/"text.txt").write_text("\n".join(f"{q} Rest and drink {n} cups." for n, q in enumerate(ASKED*2)))
    (place/"general.txt").write_text("\n".join(f"The town of {q} lies by the sea." for q in ASKED))
    entries = {name: {"file_name": f"{name}.json"} | ({"ranking": True} if "pairs" in name else {}) for name in sets}
    entries |= {name: {"file_name": f"{name}.txt", "columns": {"prompt": "text"}} for name in ("text", "general")}
    (place/"program").mkdir()
    (place/"program/program.py").write_text(PROGRAM)
    entries["open"]["private"] = False
    entries |= {"scripted": {"script_url": "program"}, "hosted": {"hf_hub_url": "someone/rows"}}
    (place/"dataset_info.json").write_text(json.dumps(entries))


def write_models(place):
    "A model of two narrow layers, and others to put in its place."
    import torch
    from transformers import LlamaForCausalLM
    from medllm.models.loading import load_model
    from medllm.models.tiny import write_tiny
    config = load_model("tiny").config
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 32, 64, 2
    for seed, name in enumerate(("model", "model_2")):
        write_tiny(place/name)
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(place/name)
    hub = place/"hub/models--someone--model"
    for name, folder in (("main", "model"), ("old", "model_2")):
        (hub/"refs").mkdir(parents=True, exist_ok=True)
        commit = hashlib.sha1(name.encode()).hexdigest()
        (hub/f"refs/{name}").write_text(commit)
        shutil.copytree(place/folder, hub/f"snapshots/{commit}")


# what the machine is like

def crowded():
    "No memory for batches of more than one row."
    from medllm.train.trainer import StageTrainer
    step = StageTrainer.training_step
    def training_step(self, model, inputs, *more):
        if len(inputs["input_ids"]) > 1: raise RuntimeError("CUDA out of memory. (as a test has it)")
        return step(self, model, inputs, *more)
    return mock.patch.object(StageTrainer, "training_step", training_step)


def gpu():
    "A GPU, as far as the loader is asked."
    from medllm.train.trainer import StageTrainer
    loader = StageTrainer._loader
    def _loader(*args, **more):
        with mock.patch("torch.cuda.is_available", lambda: True): return loader(*args, **more)
    return mock.patch.object(StageTrainer, "_loader", _loader)


@contextlib.contextmanager
def hub():
    "No network; what was fetched lies in a cache."
    from huggingface_hub import constants
    with mock.patch.object(constants, "HF_HUB_OFFLINE", True): yield


def hosted():
    "A set on the hub, as `datasets` would read it."
    from datasets import Dataset
    from medllm.data import readers
    rows = Dataset.from_list([{k: r[k] for k in ("instruction", "output")} for r in talk()])
    came = lambda how, rows: lambda split: COUNTED.append(how) or rows
    builder = mock.Mock(as_dataset=came("copied first", rows),
        as_streaming_dataset=came("as it comes", rows.to_iterable_dataset()))
    return mock.patch.object(readers, "_hub_builder", lambda source: builder)


def compiler():
    "torch.compile, noting what it is asked for."
    def compile(model=None, **how):
        COUNTED.extend(f"compiled with {key} {value}" for key, value in how.items())
        return model
    return mock.patch("torch.compile", compile)


COUNTED = []                                                         # what a machine that is stood in for was asked
AROUND = {"crowded": crowded, "gpu": gpu, "hub": hub, "hosted": hosted, "compiler": compiler}
BEGUN = {"held": "model_2", "stopped": "stopped"}                    # what lies in the output folder
EXACT = {"PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false", "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "FLASH_ATTENTION_DETERMINISTIC": "1", "OMP_NUM_THREADS": "1"}
ONE = {"OMP_NUM_THREADS": "1"}
PROCESSES = {   # processes, machines, whose view is kept, environment
    "two processes": (2, 1, 0, ONE), "replica": (2, 1, 1, ONE), "second machine": (2, 2, 1, ONE),
    "exact environment": (1, 1, 0, EXACT)}


# what a run did

def numbers(values): return [round(float(v.detach()), 10) for v in values]


def row_hashes(batch):
    "A short name of each row of a batch, whatever its padding."
    import torch
    ids, key = batch["input_ids"], lambda ids: hashlib.sha1(bytes(str(ids), "ascii")).hexdigest()[:8]
    if not torch.is_tensor(ids): return [key(ids)]
    if "cu_seqlens" in batch: return [key(ids.flatten().tolist())]
    return [key([i for i in row if i]) for row in ids.tolist()]


MISSING = ("wandb", "galore_torch", "deepspeed")                      # packages that are not looked for


class Watch:
    "What a run does, noted while it does it."
    def __init__(self): self.seen, self.trainer, self.calls = {}, None, Counter()

    def note(self, name, value): self.seen.setdefault(name, value)
    def add(self, name, value): self.seen.setdefault(name, []).append(value)

    def trainer_made(self, made):
        def init(trainer, *args, **more):
            made(trainer, *args, **more)
            self.trainer = trainer
            self.describe_model(trainer.model)
        return init

    def describe_model(self, model):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.note("what trains", f"{len(trained)} parameters" if len(trained) > 9 else sorted(trained))
        self.note("names of what trains", sorted(trained))
        self.note("weights", sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))
        self.note("attention", getattr(model.config.get_text_config(), "_attn_implementation", None))
        self.note("layers", sorted({type(m).__name__ for m in model.modules()}))
        for m in model.modules():
            if type(state := getattr(m, "weight", None)).__name__ != "Params4bit": continue
            self.note("4 bit", state.quant_type)
            self.note("scales of 4 bit", "quantised" if state.quant_state.nested else "plain")
        for name, config in sorted(getattr(model, "peft_config", {}).items()):
            for key in ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "target_modules", "modules_to_save"):
                value = getattr(config, key)
                self.note(f"adapter {key}", sorted(value) if isinstance(value, set) else value)
        self.note("weights at the start", {n: numbers((p.double().sum(), p.double().abs().sum())) for n, p in trained.items()
            if p.is_floating_point()})

    def loss_taken(self, taken):
        def compute_loss(trainer, model, inputs, *args, **more):
            self.add("batches", row_hashes(inputs))
            self.add("trained tokens", sorted(inputs["targets"].tolist()) if "targets" in inputs else None)
            again = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
            self.note("computed again", bool(again))
            if again: self.note("computed again with", again[0]._gradient_checkpointing_func.keywords)
            return taken(trainer, model, inputs, *args, **more)
        return compute_loss

    def loader(self):
        from torch.utils.data import DataLoader
        class Loader(DataLoader):
            def __init__(loader, rows, **how):
                batches = how["batch_sampler"]
                for key, value in how.items():
                    if key not in ("batch_sampler", "collate_fn"): self.note(f"loader: {key}", value)
                if isinstance(batches, list): self.add("batches of validation", [len(b) for b in batches])
                if how["num_workers"]: self.calls["workers"] += 1
                for key in ("prefetch_factor", "multiprocessing_context", "persistent_workers", "pin_memory"): how.pop(key)
                super().__init__(rows, **how | dict(num_workers=0))
        return Loader

    def counted(self, name, function=lambda *args, **more: None):
        def count(*args, **more):
            self.calls[name] += 1
            return function(*args, **more)
        return count

    @contextlib.contextmanager
    def watching(self):
        "The hooks."
        from accelerate.state import PartialState
        from medllm.data import cache
        from medllm.train import fingerprint, trainer
        from medllm.train.trainer import StageTrainer
        begun = PartialState.__init__
        def state(this, cpu=False, **how):
            for key, value in how.items() | {("cpu", cpu)}:
                if key != "timeout": self.note(f"processes: {key}", str(value))     # which means nothing to one
            begun(this, cpu, **how)
        found = importlib.util.find_spec
        def find_spec(name, package=None): return None if name.split(".")[0] in MISSING else found(name, package)
        bar = mock.Mock(side_effect=lambda *a, **k: self.note("progress bar", "drawn") or mock.MagicMock())
        patches = [
            mock.patch.object(StageTrainer, "__init__", self.trainer_made(StageTrainer.__init__)),
            mock.patch.object(StageTrainer, "compute_loss", self.loss_taken(StageTrainer.compute_loss)),
            mock.patch.object(trainer, "DataLoader", self.loader()), mock.patch.object(PartialState, "__init__", state),
            mock.patch("transformers.trainer_callback.tqdm", bar), mock.patch("importlib.util.find_spec", find_spec),
            mock.patch("transformers.trainer.clear_device_cache", self.counted("memory given back")),
            mock.patch.object(cache, "_make", self.counted("rows made", cache._make)),
            mock.patch.object(fingerprint, "package_hash", lambda: ""), mock.patch.object(fingerprint, "_version", lambda name: ""),
            mock.patch("gc.collect", lambda *a: 0), mock.patch("os.fsync", lambda *a: None)]
        with contextlib.ExitStack() as stack:
            for patch in patches: stack.enter_context(patch)
            yield


TIMED = re.compile("seconds|runtime|per_second|memory|_time|total_flos|mem_|rollout_share")
HIDDEN = ("params", "lr", "initial_lr", "decoupled_weight_decay", "foreach", "maximize", "capturable", "differentiable", "fused")


def came_to(watch, folder):
    "What a run came to: its optimiser, its log, its files."
    trainer, seen = watch.trainer, watch.seen
    if trainer is None: return
    args, optimizer = trainer.args, getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if optimizer is not None:
        seen["optimiser"] = type(optimizer).__name__
        for name, value in max(optimizer.param_groups, key=lambda g: g.get("weight_decay", 0)).items():
            if name not in HIDDEN: seen[f"optimiser: {name}"] = value
    as_one_of_several(trainer, seen)
    seen["synchronised"] = trainer.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch")
    seen["log level"] = logging.getLogger("transformers").level
    seen["steps"], seen["epochs"] = trainer.state.global_step, round(trainer.state.epoch or 0, 3)
    seen["writes to disk"], seen["speaks"] = args.should_save, args.should_log
    if (texts := folder/"run/rollouts.jsonl").exists():
        seen["rollouts hold"] = sorted(json.loads(texts.read_text().splitlines()[0]))
    if (reports := folder/"run/mlflow.db").exists():
        with sqlite3.connect(reports) as base: seen["run in MLflow"] = base.execute("select name from runs").fetchall()[0][0]
    seen["best"], seen["best value"] = trainer.state.best_global_step, trainer.state.best_metric
    came_by_step(trainer, seen)
    files_of(folder, seen)
    seen["weights at the end"] = {n: numbers((p.double().sum(), p.double().abs().sum()))
        for n, p in trainer.model.named_parameters() if p.requires_grad and p.is_floating_point()}


def all_are_here():
    "Wait until every process of a run has written what it writes."
    import torch
    if torch.distributed.is_initialized(): torch.distributed.barrier()


def as_one_of_several(trainer, seen):
    "How the processes of a run work together."
    import torch
    if not torch.distributed.is_initialized(): return
    seen.pop("rows made", None)                 # by whichever of them comes first
    whole, group = trainer.model_wrapped, torch.distributed.distributed_c10d._get_default_group()
    seen["model is wrapped in"] = [type(part).__name__ for part in whole.modules() if type(part).__name__ in
        ("DistributedDataParallel", "FullyShardedDataParallel") or type(part).__name__.startswith("FSDP")][:1]
    seen["processes: backend in use"] = torch.distributed.get_backend()
    seen["processes: waits for"] = str(group._get_backend(torch.device("cpu")).options._timeout)
    for name in ("find_unused_parameters", "bucket_bytes_cap", "broadcast_buffers", "static_graph"):
        if hasattr(whole, name): seen[f"DDP in use: {name}"] = str(getattr(whole, name))


def came_by_step(trainer, seen):
    "The log of a run, by what was logged."
    lines = [json.loads(line) for line in trainer.history.read_text().splitlines()] if trainer.history.exists() else []
    seen["logged at steps"] = [line["step"] for line in lines if "loss" in line]
    seen["validated at steps"] = [line["step"] for line in lines if "eval_loss" in line]
    seen["what is logged"] = sorted({name for line in lines for name in line if not re.search("runtime|per_second", name)})
    for name in {name for line in lines for name in line}:
        if not TIMED.search(name): seen[f"log: {name}"] = [line[name] for line in lines if name in line]


def files_of(folder, seen):
    "The files of a run, and where they lie."
    found = [f for f in folder.rglob("*") if f.is_file() and f.parent != folder]
    names = sorted({re.sub(r"checkpoint-\d+|[0-9a-f]{32}|\d{6,}.*", "…", str(f.relative_to(folder))) for f in found})
    seen["folder"] = sorted({n.split("/")[0] for n in names})
    seen["files"] = sorted({n.split("/", 1)[-1] for n in names})
    seen["checkpoints"] = sorted({int(f.parent.name.partition("-")[2]) for f in found if f.name == "COMMIT.json"})


@contextlib.contextmanager
def as_it_was():
    "What a run changes in a process, put back."
    import torch
    from transformers.utils import logging as library
    import torch._dynamo.utils
    from medllm.train import determinism
    level, random = library.get_verbosity(), torch.get_rng_state()
    with mock.patch.dict(os.environ):
        try: yield
        finally:
            library.set_verbosity(level)
            torch.use_deterministic_algorithms(False)
            determinism._applied["profile"] = "fast"
            torch._dynamo.utils.counters.clear()
            COUNTED.clear()
            torch.set_rng_state(random)


@contextlib.contextmanager
def quiet():
    "Nothing is said."
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()): yield


def end(process):
    "End a process and all that it started."
    with contextlib.suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Walk:
    "A place with data and models, and the runs that were made there."
    def __init__(self, place):
        self.place, self.count, self.kept, self.made = Path(place), 0, {}, set()
        if (self.place/"model").exists(): return
        write_rows(self.place)
        write_models(self.place)
        (self.place/"elsewhere").mkdir()
        for file in self.place.glob("*.json"): shutil.copy(file, self.place/"elsewhere")
        (self.place/"elsewhere/talk.json").write_text(json.dumps(talk()[::-1]))
        (self.place/"zero.json").write_text("{}")

    def prepare(self, case):
        "Adapters, reward models, rows, and a run that was stopped, made when a case names one of them."
        looks = LOOKS | dict(eval_dataset="pairs_held")
        ways = {"adapter": ("sft", LORA), "judge": ("rm", LORA | looks), "judge_whole": ("rm", looks), "stopped": ("sft", SAVES),
            "kept": ("sft", dict(tokenized_path=str(self.place/"kept")))}
        words = f"{case.value} {case.given} {BEGUN.get(case.around)} "
        for name, (stage, more) in ways.items():
            if not re.search(rf"\b{name}\b", words) or name in self.made: continue
            self.made.add(name)
            seen = self.observe(stage, more | dict(output_dir=str(self.place/f"{name}{'_run'*(name == 'kept')}")))
            assert "refused" not in seen, seen["refused"]
            if name == "stopped": shutil.rmtree(self.place/"stopped/checkpoint-3")

    def observe(self, stage, given, around=""):
        "What a run does: name of what can be seen -> what was."
        self.count += 1
        out = self.place/f"out/{self.count}"
        out.mkdir(parents=True)
        if around in BEGUN: shutil.copytree(self.place/BEGUN[around], out/"run")
        put = lambda v: v.format(place=self.place, out=out) if isinstance(v, str) else v
        given = {k: put(v) for k, v in (BASE | STAGES[stage] | dict(stage=stage) | given).items() if v is not None}
        if given.get("max_steps") == -1: del given["max_steps"]
        seen = self.elsewhere(given, around, out) if around in PROCESSES else self.watched(given, around, out)
        shutil.rmtree(out)
        return seen

    def elsewhere(self, given, around, out):
        "The same in processes of their own."
        number, machines, which, environment = PROCESSES[around]
        (out/"given.json").write_text(json.dumps(given))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launch = (f"-m accelerate.commands.launch --multi_gpu --num_processes {number} --num_machines {machines} "
            f"--main_process_ip 127.0.0.1 --main_process_port {port} --mixed_precision no --dynamo_backend no --machine_rank")
        starts = [[*launch.split(), str(n)] for n in range(machines)] if number > 1 else [[]]
        begun = [subprocess.Popen([sys.executable, *start, __file__, str(self.place), str(out)], env=os.environ | environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True) for start in starts]
        try: said = [process.communicate(timeout=300)[0] for process in begun]
        finally: [end(process) for process in begun]
        file = out/f"seen_{which}.json"
        assert file.exists(), "\n".join(said)[-3000:]
        return json.loads(file.read_text())

    def watched(self, given, around, out):
        "What a run in this process does."
        import torch
        from medllm.train import determinism
        watch, said = Watch(), io.StringIO()
        machine = AROUND.get(around, contextlib.nullcontext)()
        with as_it_was(), mock.patch.dict(os.environ, MEDLLM_CACHE=str(out/"cache")), machine, watch.watching():
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()): self.run(given, watch)
            watch.note("HF_TOKEN", bool(os.environ.get("HF_TOKEN")))
            watch.seen |= {name: count for name, count in watch.calls.items()}
            watch.seen["asked of the machine"] = sorted(set(COUNTED))
            watch.seen["profile"] = determinism.in_force()["profile"]
            watch.seen["compiled"] = bool(torch._dynamo.utils.counters["frames"]["ok"])
            watch.seen["algorithms"] = "deterministic" if torch.are_deterministic_algorithms_enabled() else "any"
            if "refused" not in watch.seen: all_are_here()
            came_to(watch, out)
        watch.seen["said"] = sorted({line for line in self.plain(said.getvalue()) if not re.match(r"step \d|\W*$|\d{4}/", line)})
        return watch.seen

    def run(self, given, watch):
        from medllm.core import UserError
        from medllm.train.loop import run
        from medllm.medical.rewards import REWARDS, Rule
        rule = lambda option: Rule("walked", "any", lambda gold, prompt: "any", lambda text, gold, prompt: len(text) % 5/5)
        try:
            with mock.patch.dict(REWARDS, walked=rule): run(given)
        except UserError as e: watch.seen["refused"] = self.plain(str(e))[0]
        except Exception as e: watch.seen["refused"] = f"CRASH {type(e).__name__}: {self.plain(str(e))[:1]}"

    def plain(self, text):
        "Lines without what differs from machine to machine."
        text = re.sub(rf"{re.escape(str(self.place))}/(out/\d+/)?", "", text)
        return text.splitlines()

    def apart(self, case):
        "What a run with a flag did otherwise than without it: name -> without, with."
        self.prepare(case)
        key = json.dumps([case.stage, case.given, case.around], sort_keys=True)
        if key not in self.kept: self.kept[key] = self.observe(case.stage, case.given, case.around)
        before, after = self.kept[key], self.observe(case.stage, case.given | {case.flag: case.value}, case.around)
        return {name: (before.get(name), after.get(name)) for name in before | after
            if not alike(before.get(name), after.get(name)) or name == "refused"}


def alike(a, b):
    "Whether two observations are the same, numbers to rounding."
    if isinstance(a, dict) and isinstance(b, dict): return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list): return len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, float) and isinstance(b, float): return abs(a - b) <= 1e-5*max(abs(a), abs(b), 1e-3)
    return a == b


def main():
    "One of the processes of `Walk.elsewhere`: a place, and the folder of a run in it."
    walk, out = Walk(sys.argv[1]), Path(sys.argv[2])
    seen = walk.watched(json.loads((out/"given.json").read_text()), "", out)
    (out/f"seen_{os.environ.get('RANK', '0')}.json").write_text(json.dumps(seen, default=str))


if __name__ == "__main__": main()
