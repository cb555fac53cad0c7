"""Both ends of every range in settings.ini: the smoke tests with the lowest versions it allows, and with the newest.

    python tests/ends.py                 both, in .ends/lowest and .ends/newest
    python tests/ends.py lowest          one
    python tests/ends.py newest --beyond torch transformers    the newest there is of these, whatever their range
"""
import argparse
import configparser
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENDS = {"lowest": "lowest-direct", "newest": "highest"}
# a build of torch for a GPU brings its own; one for a CPU wants none
BROUGHT = ("nvidia-", "cuda-", "triton")


def ranges(beyond=()):
    "The ranges that are tested: what everybody gets, and what tests need, which holds the extras."
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT/"settings.ini", encoding="utf-8")
    found = " ".join(settings["DEFAULT"][f"{name}requirements"] for name in ("", "dev_")).split()
    bare = lambda line: line.split(">")[0].split("=")[0].split("<")[0]
    return sorted({bare(line) if bare(line) in beyond else line for line in found})


def uv(*words, given=None):
    "What uv writes; it looks for wheels where pip does."
    own = {"UV_FIND_LINKS": os.environ["PIP_FIND_LINKS"]} if "PIP_FIND_LINKS" in os.environ else {}
    done = subprocess.run(["uv", *map(str, words)], input=given, capture_output=True, text=True, env={**os.environ, **own})
    if done.returncode: sys.exit(done.stderr)
    return done.stdout


def build(end, folder, beyond=()):
    "An environment at an end of the ranges; its python."
    pins = uv("pip", "compile", "--quiet", "--no-annotate", "--no-header", "--resolution", ENDS[end],
        "--python-version", f"{sys.version_info[0]}.{sys.version_info[1]}", "-", given="\n".join(ranges(beyond)))
    (folder.parent/f"{end}.txt").write_text(
        "\n".join(line for line in pins.splitlines() if not line.startswith(BROUGHT)) + "\n")
    python = folder/"bin/python"
    if not python.exists(): uv("venv", "--quiet", "--python", sys.executable, folder)
    install = ("pip", "install", "--quiet", "--python", python)
    uv(*install, "-r", folder.parent/f"{end}.txt", "setuptools>=77", "wheel")
    uv(*install, "--no-build-isolation", "--no-deps", "-e", ROOT)
    return python


def smoke(end, python):
    "The exit status of the smoke tests in an environment."
    print(f"\n{end}: {', '.join(line for line in pinned(end) if line.split('==')[0] in SHOWN)}", flush=True)
    own = {"PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        "MEDLLM_CACHE": str(ROOT/".ends"/f"{end}-cache")}
    return subprocess.run([python, "-m", "pytest", "-m", "smoke", "-p", "no:cacheprovider",
        f"--basetemp={ROOT/'.ends'/f'{end}-tmp'}", ROOT/"tests"], cwd=ROOT, env={**os.environ, **own}).returncode


SHOWN = ("torch", "transformers", "peft", "accelerate", "datasets", "numpy")


def pinned(end): return (ROOT/".ends"/f"{end}.txt").read_text().split()


def main():
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("end", nargs="?", choices=ENDS, help="the one; default both")
    words.add_argument("--beyond", nargs="+", default=[], metavar="PACKAGE", help="whose range is left out")
    given = words.parse_args()
    (ROOT/".ends").mkdir(exist_ok=True)
    ends = [given.end] if given.end else [*ENDS]
    failed = [end for end in ends if smoke(end, build(end, ROOT/".ends"/end, given.beyond))]
    return f"failed at the end: {', '.join(failed)}" if failed else 0


if __name__ == "__main__": sys.exit(main())
