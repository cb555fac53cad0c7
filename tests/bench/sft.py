"""Supervised fine-tuning side by side: medllm and a peer, equal work, in turn, in one run.

    python tests/bench/sft.py --peer trl
    python tests/bench/sft.py --peer all --repeats 5 --out sft.json
    python tests/bench/sft.py --peer all --model smol       on real weights: SmolLM2-135M-Instruct

Only the standard library is needed here. Every peer gets a virtual environment of its own under
`--envs` on first use; medllm runs in the interpreter given by `--python`. A small Llama with
random weights, a tokenizer and the rows are made anew (or `smol` is taken, with its own chat
format and LoRA on all linear layers), then every tool trains the same LoRA on the CPU, one process
per measurement, `--repeats` times in turn. The script stops with an error when the tools did not
do the same work. It ends with a table, the ratios of medians, and, of the small Llama, how far the
best possible time on this machine (see `sft_limit.py`) is.
"""
import argparse
import json
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sft_limit import least_operations, seconds_at_limit

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
TORCH = "torch==2.13.0"
PACKAGES = {"trl": ["trl==1.16.0", "transformers==5.23.0", "peft==0.21.2"],
            "llamafactory": ["llamafactory==0.9.5", "transformers==5.6.0", "peft==0.18.1"],
            "swift": ["ms-swift==4.6.0"]}
# peer: its environment and worker, and what its task has besides
PEERS = {"trl": ("trl", {}), "trl-plain": ("trl", {"plain_loss": True}),
         "llamafactory": ("llamafactory", {}), "swift": ("swift", {})}
ON_SMOL = {"swift"}  # measured on real weights only
SHAPE = {"hidden": 384, "intermediate": 1024, "layers": 6, "heads": 6, "vocabulary": 32000,
         "positions": 2048}
TASK = {"chat": "llama2", "batch": 8, "accumulation": 1, "cutoff": 512, "epochs": 1,
        "learning_rate": 1e-4, "rank": 8, "alpha": 16, "targets": ["q_proj", "v_proj"],
        "shape": SHAPE, "dtype": "float32"}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TASKS = {"random": TASK, "smol": {**TASK, "chat": "smol", "targets": LINEAR}}
ROWS = {"random": 512, "smol": 96}
TOLERANCE = 0.005  # of trained tokens; besides, some tools train the line end after <|im_end|>


def read_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", choices=[*PEERS, "all"], default="trl",
                        help="trl-plain: TRL with transformers' loss in place of its own")
    parser.add_argument("--data", type=Path,
                        default=REPOSITORY / "../shared/data/chatdoctor/chatdoctor5k.json",
                        help="alpaca rows: instruction, input, output")
    parser.add_argument("--model", choices=list(TASKS), default="random",
                        help="random: a small Llama made anew; smol: SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=int,
                        help="how many of the first rows that fit (default 512; of smol 96)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--envs", type=Path, default=REPOSITORY / ".bench",
                        help="folder for the peers' environments and everything made here")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has medllm")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="for every tool")
    parser.add_argument("--group-by-length", action="store_true",
                        help="let the peers batch rows of like length (not their default)")
    parser.add_argument("--torch-index", help="package index for torch, e.g. one of CPU builds")
    parser.add_argument("--without-medllm", action="store_true", help="measure the peers only")
    parser.add_argument("--out", type=Path, help="write everything measured here, as JSON")
    return parser.parse_args()


def usable_cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# --- environments ---------------------------------------------------------------------------

def run_quietly(command, **more):
    """Run a command; on failure show what it said and stop."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **more)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise SystemExit(f"{tail}\nfailed ({done.returncode}): {command[0]} {command[1]}")
    return done.stdout


def environment_python(folder):
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_environment(name, arguments):
    """An environment's interpreter; it is built if it is not there in these versions."""
    folder = arguments.envs / name
    python, mark = environment_python(folder), folder / "bench-installed.json"
    wanted = json.dumps([TORCH, *PACKAGES[name]])
    if mark.exists() and mark.read_text() == wanted:
        return python
    print(f"building the environment of {name} ...", flush=True)
    if not python.exists():
        run_quietly([sys.executable, "-m", "venv", folder])
    pip = [python, "-m", "pip", "install", "--quiet"]
    index = ["--index-url", arguments.torch_index] if arguments.torch_index else []
    run_quietly([*pip, *index, TORCH])
    constraint = folder / "constraints.txt"
    constraint.write_text(TORCH + "\n")
    run_quietly([*pip, "-c", constraint, *PACKAGES[name]])
    drop_what_cannot_load(python)
    mark.write_text(wanted)
    return python


def drop_what_cannot_load(python):
    """Remove image and sound packages built for another torch: text training needs neither."""
    for package in ("torchvision", "torchaudio"):
        if subprocess.run([python, "-c", f"import {package}"], capture_output=True).returncode:
            run_quietly([python, "-m", "pip", "uninstall", "--quiet", "-y", package])


# --- the work -------------------------------------------------------------------------------

def prepare(arguments, python):
    """Make model, tokenizer and rows; give the task that every worker reads."""
    folder = (arguments.envs / "task").resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    task = {**TASKS[arguments.model], "model": str(folder / "model"),
            "data_dir": str(folder / "data"), "source": str(arguments.data.resolve()),
            "rows": arguments.rows or ROWS[arguments.model],
            "group_by_length": arguments.group_by_length}
    if arguments.model == "smol":
        begin = "from medllm.cli.main import main; main()"
        run_quietly([arguments.python, "-c", begin, "smol", task["model"]], cwd=REPOSITORY)
    path = write_task(task, folder)
    made = json.loads(run_quietly([python, HERE / "sft_prepare.py", path]).splitlines()[-1])
    lengths = made.pop("lengths")
    print(f"model: {made['parameters'] / 1e6:.1f}M parameters; tokenizer: "
          f"{made['tokenizer_size']} entries; rows: {made['rows']}; "
          f"tokens: {sum(n for n, _ in lengths)}, trained: {sum(n for _, n in lengths)}")
    return {**task, **made, "lengths": lengths}


def write_task(task, folder):
    """Write a worker's task file and give its path."""
    path = Path(folder) / "task.json"
    path.write_text(json.dumps(task), encoding="utf-8")
    return path


def worker_environment(scratch, threads):
    """Variables that are the same for every tool: threads, CPU only, offline, cold caches."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
            "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(scratch), "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "PYTHONWARNINGS": "ignore"}


def busy_seconds():
    """Processor seconds that all programs together have used so far; None where not known."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def measure(tool, python, program, more, task, arguments):
    """One measurement in a process of its own: its last line, and how busy others were."""
    with tempfile.TemporaryDirectory(dir=arguments.envs) as scratch:
        output = str(Path(scratch).resolve() / "output")
        path = write_task({**task, **more, "output": output}, scratch)
        start, busy = time.perf_counter(), busy_seconds()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        said = run_quietly([python, program, path],
                           env=worker_environment(Path(scratch).resolve(), arguments.threads))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall = time.perf_counter() - start
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    result = json.loads(said.strip().splitlines()[-1])
    speed = result["trained_tokens"] / result["train_seconds"]
    others = None if busy is None else max(0.0, (busy_seconds() - busy - cpu) / wall)
    result.update(tool=tool, tokens_per_second=speed, process_cpu_seconds=cpu,
                  cores_used_by_others=others)
    print(f"  {tool:13} {result['train_seconds']:8.2f} s training, "
          f"{result['prepare_seconds']:6.2f} s around it, {speed:7.0f} trained tokens/s, "
          f"{result['peak_rss_bytes'] / 2**20:6.0f} MiB, others used {others or 0:.2f} cores",
          flush=True)
    return result


def measure_in_turn(tools, task, arguments):
    """Every tool once, then every tool again: `--repeats` rounds."""
    results = []
    for turn in range(arguments.repeats):
        print(f"round {turn + 1} of {arguments.repeats}", flush=True)
        for tool, how in tools.items():
            results.append(measure(tool, *how, task, arguments))
        check_equal_work(results, task)
    return results


def expected_work(task):
    """Rows, steps and trained tokens that the task amounts to."""
    rows, epochs = task["rows"], task["epochs"]
    per_step = task["batch"] * task["accumulation"]
    return {"rows": rows * epochs, "steps": -(-rows // per_step) * epochs,
            "trained_tokens": epochs * sum(trained for _, trained in task["lengths"])}


def check_equal_work(results, task):
    """Stop unless every measurement had the same rows and steps, and the same trained tokens."""
    wrong, work = [], expected_work(task)
    for result in results:
        if result.get("base_dtype", task["dtype"]) != task["dtype"]:
            wrong.append(f"{result['tool']}: weights in {result['base_dtype']}")
        for key, value in work.items():
            allowed = 0
            if key == "trained_tokens":
                allowed = TOLERANCE * value + (task["chat"] == "smol") * work["rows"]
            if abs(result[key] - value) > allowed:
                wrong.append(f"{result['tool']}: {key} {result[key]}, expected {value}")
    if wrong:
        raise SystemExit("the work was not equal:\n  " + "\n  ".join(sorted(set(wrong))))


def print_work(results, task):
    """Say what work was expected and what each tool counted; give the expected."""
    work = expected_work(task)
    counts = {result["tool"]: result["trained_tokens"] for result in results}
    print(f"equal work: {work['rows']} rows, {work['steps']} steps; trained tokens expected "
          f"{work['trained_tokens']}, counted "
          + ", ".join(f"{tool} {count}" for tool, count in counts.items()))
    return work


# --- the report -----------------------------------------------------------------------------

FIGURES = {"train_seconds": ("training, s", 1), "tokens_per_second": ("trained tokens/s", 1),
           "prepare_seconds": ("around it, s", 1), "peak_rss_bytes": ("peak memory, MiB", 2**20),
           "padded_tokens": ("tokens run, padding included", 1), "train_loss": ("mean loss", 1)}


def spread(results, tool, key):
    """`[min, median, max]` of a figure, or None where the tool does not give it."""
    values = [result[key] for result in results if result["tool"] == tool]
    if any(value is None for value in values):
        return None
    return [min(values), statistics.median(values), max(values)]


def print_table(tools, results):
    """One line per figure and tool; give the spreads."""
    spreads = {tool: {key: spread(results, tool, key) for key in FIGURES} for tool in tools}
    print(f"\n{'':30}{'':14}{'min':>12}{'median':>12}{'max':>12}")
    for key, (title, unit) in FIGURES.items():
        for tool in tools:
            if spreads[tool][key]:
                cells = "".join(f"{value / unit:12.2f}" for value in spreads[tool][key])
                print(f"{title:30}{tool:14}{cells}")
    return spreads


def print_ratios(spreads):
    """medllm / peer of the medians, where both were measured."""
    ratios = {}
    for peer in spreads.keys() - {"medllm"} if "medllm" in spreads else ():
        pairs = {key: (spreads["medllm"][key], spreads[peer][key]) for key in list(FIGURES)[:4]}
        ratios[peer] = {key: ours[1] / theirs[1] for key, (ours, theirs) in pairs.items()}
        shown = ", ".join(f"{FIGURES[key][0].split(',')[0]} {value:.3f}"
                          for key, value in ratios[peer].items())
        print(f"medllm / {peer} (medians): {shown}")
    return ratios


def print_rounds(results, peers):
    """medllm / peer of training time round by round, which a drifting machine disturbs less."""
    times = {}
    for result in results:
        times.setdefault(result["tool"], []).append(result["train_seconds"])
    rounds = {peer: [ours / theirs for ours, theirs in zip(times["medllm"], times[peer])]
              for peer in peers}
    for peer, values in rounds.items():
        print(f"medllm / {peer} (training, by round): "
              + ", ".join(f"{value:.3f}" for value in values))
    return rounds


def warn_if_busy(results, allowed=0.15):
    """Say so when other programs took a share of the cores: such figures are not to be quoted."""
    most = max(result["cores_used_by_others"] or 0.0 for result in results)
    if most > allowed:
        print(f"\nWARNING: other programs used up to {most:.2f} cores during a measurement; "
              "with every core wanted by the tools, these times mislead. Run again alone.")
    return most


def measure_rates(python, task, arguments):
    """This machine's float32 rates at the model's product sizes, in operations a second."""
    with tempfile.TemporaryDirectory(dir=arguments.envs) as scratch:
        said = run_quietly([python, HERE / "sft_limit.py", write_task(task, scratch)],
                           env=worker_environment(scratch, arguments.threads))
    return {(a, b): rate for a, b, rate in json.loads(said.splitlines()[-1])["rates"]}


def print_limit(task, rates, spreads):
    """The least time that the arithmetic needs here, and each tool's distance from it."""
    operations = least_operations(task["shape"], task["rank"], task["lengths"])
    seconds = task["epochs"] * seconds_at_limit(operations, rates)
    print("\nfloat32 torch.mm here: " + ", ".join(
        f"{a}x{b} {rate / 1e9:.0f}" for (a, b), rate in rates.items()) + " GFLOP/s")
    print(f"least arithmetic: {sum(operations.values()) * task['epochs'] / 1e12:.3f} TFLOP; "
          f"at these rates {seconds:.2f} s")
    distances = {}
    for tool, figures in spreads.items():
        distances[tool] = seconds / figures["train_seconds"][1]
        print(f"  {tool:13} reaches {distances[tool]:.1%} of the limit "
              f"({1 / distances[tool]:.2f} times its time)")
    return {"seconds": seconds, "reached": distances,
            "operations": {str(size): count for size, count in operations.items()},
            "rates": {str(size): rate for size, rate in rates.items()}}


def machine():
    """What the figures were measured on, without the machine's name."""
    return {"system": platform.system(), "processor": platform.machine(),
            "cores": usable_cores(), "python": platform.python_version()}


def ready_folder(folder):
    """Make the cache folder, ignored by git whatever the repository's own rules say."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ".gitignore").exists():
        (folder / ".gitignore").write_text("*\n")


def make_tools(arguments):
    """By tool: its interpreter, its worker program, what its task has besides."""
    tools = {} if arguments.without_medllm else {
        "medllm": (arguments.python, HERE / "medllm_sft.py", {})}
    of_model = [peer for peer in PEERS if peer not in ON_SMOL or arguments.model == "smol"]
    for peer in of_model if arguments.peer == "all" else [arguments.peer]:
        name, more = PEERS[peer]
        python = make_environment(name, arguments)
        tools[peer] = (python, HERE / "peers" / f"{name}_sft.py", more)
    return tools


def main():
    """Build, prepare, measure in turn, check, report."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the worker, tidies up
    arguments = read_arguments()
    if not arguments.data.exists():
        raise SystemExit(f"no rows at {arguments.data}: give their path with --data")
    arguments.envs = arguments.envs.resolve()
    ready_folder(arguments.envs)
    tools = make_tools(arguments)
    helper = list(tools.values())[-1][0]
    started = time.time()
    task = prepare(arguments, helper)
    early = measure_rates(helper, task, arguments) if arguments.model == "random" else {}
    results = measure_in_turn(tools, task, arguments)
    late = measure_rates(helper, task, arguments) if early else {}
    work = print_work(results, task)
    spreads = print_table(tools, results)
    ratios = print_ratios(spreads)
    rounds = print_rounds(results, ratios)
    rates = {size: max(rate, late[size]) for size, rate in early.items()}
    limit = print_limit(task, rates, spreads) if rates else None
    others = warn_if_busy(results)
    if arguments.out:
        del task["lengths"], task["source"], task["model"], task["data_dir"]
        arguments.out.write_text(json.dumps({
            "started": started, "machine": machine(), "threads": arguments.threads, "task": task,
            "work": work, "results": results, "spreads": spreads, "ratios": ratios,
            "ratios_by_round": rounds, "most_cores_used_by_others": others,
            "limit": limit}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
