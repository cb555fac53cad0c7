"""Files as nobody should have written them: seeded mutations of bytes and of JSON, and a process in which to read them.

    for name, data in mutations(good, seed=1, n=500): …        each mutated file, with a name that says what was done
    assert survives(read, pairs) == []                          no exception of another kind, no hang, no flood
"""
import contextlib
import copy
import itertools
import json
import os
import pickle
import random
import resource
import select
import signal
import time
import traceback

# JSON texts that stand where another value stood; some are no JSON
ODD = ["null", "true", "false", "0", "-1", "1e400", "-1e400", "NaN", "Infinity", "-Infinity", "1e308", "5e-324", "0.1",
    str(2**31), str(2**62), str(2**64), "9"*400, "9"*5000, "-0", "1.0", '""', '" "', '"x"', '"64"', '"1e400"', '"None"',
    '"../../etc/passwd"', '"/dev/zero"', '"file:///etc/passwd"', '"a\\u0000b"', '"\\ud800"', '"\\u001b]0;title\\u0007"',
    '"\\u001b[2J\\u001b[31m"', '"\\u202edlo\\u2066"', '"<script>x()</script>"', '"%s%n{0}{x.__class__}"',
    '"' + "long "*20_000 + '"', "[]", "{}", "[null]", '{"a": 1}', "[[]]", '[{"a": 1}]', '{"": {"": []}}', "[1, \"x\", null]",
    "["*500 + "]"*500, "["*100_000 + "]"*100_000, '{"a":'*50_000 + "1" + "}"*50_000, "[" + "0,"*20_000 + "0]", "01", "1_000",
    "'x'", "undefined", "[1,]", "\"\t\"", "", "// x\n1"]


def flip(data, rng):
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)


def garble(data, rng):
    for _ in range(rng.randint(2, 40)): data[rng.randrange(len(data))] = rng.randrange(256)


def cut(data, rng): del data[rng.randrange(len(data)):]
def behead(data, rng): del data[:rng.randrange(1, len(data) + 1)]
def empty(data, rng): data.clear()


def take(data, rng):
    start = rng.randrange(len(data))
    del data[start:start + rng.randint(1, 200)]


def repeat(data, rng):
    start = rng.randrange(len(data))
    piece = bytes(data[start:start + rng.randint(1, 200)])
    data[start:start] = piece*rng.choice((1, 2, 1000))


def put(data, rng):
    noise = bytes(rng.randrange(256) for _ in range(50))
    piece = rng.choice((noise, b"\0", b"\0"*1000, b"\xff\xfe", b"\xef\xbb\xbf", b"\x1b[2J\x1b]0;x\x07", b"\n", b"\r", b"\x1a",
        b"}", b"[", b"\"", b"\xf0\x9f\x98", b"\xed\xa0\x80", "\u2028".encode()))
    start = rng.randrange(len(data) + 1)
    data[start:start] = piece


def blank(data, rng):
    start = rng.randrange(len(data))
    for at in range(start, min(len(data), start + rng.randint(1, 500))): data[at] = 0


def swap(data, rng):
    a, b = sorted(rng.randrange(len(data) + 1) for _ in "ab")
    data[:] = data[b:] + data[a:b] + data[:a]


def number(data, rng):
    "Another number where one stands."
    places = [n for n, byte in enumerate(data) if 48 <= byte <= 57]
    if not places: return flip(data, rng)
    start = end = rng.choice(places)
    while end < len(data) and 48 <= data[end] <= 57: end += 1
    data[start:end] = rng.choice((b"0", b"-1", b"1e400", b"NaN", str(2**63).encode(), b"9"*5000))


def other_encoding(data, rng):
    with contextlib.suppress(UnicodeError):
        text = data.decode("utf-8")
        data[:] = text.encode(rng.choice(("utf-16", "utf-8-sig", "utf-32", "gb18030", "utf-7", "cp037")))


LARGEST = 2**24     # of a mutated JSON file, about [bytes]
BYTES = [flip, garble, cut, behead, take, repeat, put, blank, swap, number, other_encoding, empty]


def mutations(data, seed, n):
    "n mutated copies of some bytes: (name, bytes)."
    for k in range(n):
        rng, out = random.Random(f"{seed} {k}"), bytearray(data)
        change = BYTES[-1] if k == 0 else rng.choice(BYTES[:-1])
        if out: change(out, rng)
        if rng.random() < .3 and out: rng.choice(BYTES[:-1])(out, rng)
        yield f"{seed}-{k}-{change.__name__}", bytes(out)


class Raw(str):
    "A text that is written into JSON as it is."


def dumped(value):
    "JSON, with raw texts where there are some, and with keys that are there twice."
    if isinstance(value, Raw): return str(value)
    if isinstance(value, dict): return "{" + ", ".join(
        f"{json.dumps(k)}: {dumped(v)}" for k, held in value.items() for v in (held if isinstance(held, Twice) else [held])) + "}"
    if isinstance(value, list): return "[" + ", ".join(map(dumped, value)) + "]"
    return json.dumps(value)


class Twice(list):
    "Two values of one key."


def places(value, way=()):
    "Every place in a JSON value: the container and the key."
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(pairs):
        yield value, key, (*way, key)
        yield from places(item, (*way, key))


def weight(value, known):
    "The length of a JSON value as a text, about. What stands in several places is measured once: `known` has it by its id."
    if id(value) not in known: known[id(value)] = 2 + (
        sum(len(k) + weight(v, known) for k, v in value.items()) if isinstance(value, dict) else
        sum(weight(v, known) for v in value) if isinstance(value, list) else len(value) if isinstance(value, str) else 8)
    return known[id(value)]


def restructured(value, rng):
    "Change one place of a JSON value; what was done."
    found = list(places(value))
    if not found: return Raw(rng.choice(ODD)), "whole"
    shallow = [p for p in found if len(p[2]) <= 2]                # else a long list takes nearly all of it
    holder, key, way = rng.choice(shallow if rng.random() < .5 else found)
    kind = rng.choice(("odd", "odd", "odd", "gone", "renamed", "twice", "listed", "tabled", "many", "other"))
    if kind == "odd": holder[key] = Raw(rng.choice(ODD))
    elif kind == "gone": del holder[key]
    elif kind == "renamed" and isinstance(holder, dict):
        holder[rng.choice(("", "x", key.upper(), f"{key}\x1b[31m"))] = holder.pop(key)
    elif kind == "twice" and isinstance(holder, dict): holder[key] = Twice([holder[key], Raw(rng.choice(ODD[:40]))])
    elif kind == "tabled": holder[key] = {"value": holder[key]}
    elif kind == "many": holder[key] = [holder[key]]*rng.choice((2, 1000))
    elif kind == "other": holder[key] = copy.deepcopy(rng.choice([h[k] for h, k, _ in found]))
    else: holder[key] = [holder[key]]
    return value, f"{kind}-{'.'.join(map(str, way))[:60]}"


def json_mutations(data, seed, n):
    "n copies of a JSON file (or of JSON lines) with other structure or values: (name, bytes)."
    text = data.decode("utf-8")
    try: whole, lines = json.loads(text), None
    except ValueError: lines = text.splitlines()
    for k in range(n):
        rng = random.Random(f"json {seed} {k}")
        at = None if lines is None else rng.randrange(len(lines))
        value = json.loads(lines[at]) if lines is not None else json.loads(text)
        done = []
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            try: value, what = restructured(value, rng)
            except (KeyError, IndexError, TypeError, AttributeError): continue    # the place went with an earlier change
            if weight(value, {}) > LARGEST:                       # a thousand times a thousand times
                value, what = Raw(rng.choice(ODD)), "whole"
            done.append(what)
            if isinstance(value, Raw): break
        out = dumped(value)
        if lines is not None: out = "\n".join([*lines[:at], out, *lines[at + 1:]]) + "\n"
        yield f"{seed}-{k}-{ascii('+'.join(done) or 'same')}", out.encode("utf-8", errors="surrogatepass")


def both(data, seed, n):
    "Half of them by bytes, half by structure."
    yield from mutations(data, seed, n//2)
    yield from json_mutations(data, seed, n - n//2)


def survives(read, pairs, allowed=(), seconds=10, memory=2**30, count=200):
    """What goes wrong when `read(name, data)` is called for each pair in processes of their own: texts, one a fault.

    `allowed` are exceptions that may come out; a call may last `seconds` and take `memory` bytes more than there were."""
    faults, pairs, waiting = [], iter(pairs), []
    while some := waiting + list(itertools.islice(pairs, count - len(waiting))):     # never all of them in memory
        done, found = _in_child(read, some, allowed, seconds, memory)
        faults += found
        waiting = some[done + 1:]
        if done < len(some): faults.append(
            f"{some[done][0]}: the process ended in it, or had to be ended: no memory, or a library that hangs")
    return faults


def _in_child(read, pairs, allowed, seconds, memory):
    "How many were read, and what went wrong."
    near, far = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.close(near)
            with os.fdopen(far, "wb", buffering=0) as out: _work(read, pairs, allowed, seconds, memory, out)
            code = 0
        finally: os._exit(code)
    os.close(far)
    done, faults = 0, []
    with os.fdopen(near, "rb", buffering=0) as told, contextlib.suppress(EOFError, pickle.UnpicklingError):
        while select.select([told], [], [], 12*seconds)[0]:           # nothing heard: it hangs where Python is not asked
            fault = pickle.load(told)
            done += 1
            if fault: faults.append(fault)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return done, faults


def _work(read, pairs, allowed, seconds, memory, out):
    "Read each, and say how it went."
    with open("/proc/self/statm") as f: now = int(f.read().split()[0])*resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + memory, now + memory))
    class Slow(BaseException): pass
    def late(*_): raise Slow
    for number in (signal.SIGALRM, signal.SIGPROF): signal.signal(number, late)
    for name, data in pairs:
        fault, begun = None, time.process_time()              # of the processor: others may keep the machine busy
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, 6*seconds)
        try: read(name, data)
        except allowed: pass
        except Slow: fault = f"{name}: still at it after {seconds} s: {''.join(traceback.format_exc().splitlines(True)[-9:-1])}"
        except BaseException as e:
            fault = f"{name}: {type(e).__name__}: {str(e)[:200]}\n{''.join(traceback.format_exc().splitlines(True)[-7:-1])}"
        finally:
            for clock in (signal.ITIMER_PROF, signal.ITIMER_REAL): signal.setitimer(clock, 0)
        if not fault and time.process_time() - begun > seconds: fault = f"{name}: took {time.process_time() - begun:.0f} s"
        out.write(pickle.dumps(fault))
