"""The least arithmetic that the fine-tuning task needs, and how fast this machine multiplies.

`sft_limit.py TASK.json` measures the float32 rate of `torch.mm` at the shapes of the model and
prints it. `least_operations` counts, in floating-point operations, what no correct program can
leave out when the base weights are frozen: matrix products on real tokens only (no padding; the
last token of a row predicts nothing, so it is not run), the head at trained positions only, in
the last layer everything but keys and values at trained positions only, causal attention without
its masked half, no gradient below the first adapter. Products only: normalisation, softmax,
activations and the optimizer are left out, so the time at the limit is a bound from below.
"""
import json
import sys
import time
from pathlib import Path


def positions(lengths):
    """Sums over rows: tokens run, trained positions, attended pairs of all and of trained."""
    tokens = labels = pairs = trained_pairs = 0
    for total, trained in lengths:
        run = total - 1
        tokens, labels = tokens + run, labels + trained
        pairs += run * (run + 1) // 2
        trained_pairs += trained * (2 * run - trained + 1) // 2
    return tokens, labels, pairs, trained_pairs


def adapter_operations(where, hidden, rank, first):
    """Forward and backward of one rank-`rank` adapter at `where` positions."""
    forward = 2 * where * rank * 2 * hidden
    backward = 2 * where * rank * (3 if first else 4) * hidden
    return forward + backward


def layer_operations(shape, rank, counts, first, last):
    """Operations of one layer, by the (inner, outer) sizes of the product."""
    hidden, inner = shape["hidden"], shape["intermediate"]
    tokens, labels, pairs, trained_pairs = counts
    queries, pairs = (labels, trained_pairs) if last else (tokens, pairs)
    square = 2 * (2 * tokens + 2 * queries)             # forward: k, v; q, o
    square += 2 * queries                               # backward: o
    square += 0 if first else 2 * (2 * tokens + queries)  # backward: q, k, v
    wide = 2 * queries * hidden * inner
    attention = 2 * hidden * pairs * (2 + (3 if first else 4))
    adapters = sum(adapter_operations(n, hidden, rank, first) for n in (queries, tokens))
    return {(hidden, hidden): square * hidden * hidden,
            (hidden, inner): 3 * wide,                  # gate, up; backward of down
            (inner, hidden): 3 * wide,                  # down; backward of gate, up
            None: attention + adapters}


def least_operations(shape, rank, lengths):
    """Operations of one epoch by product size; None: attention and adapters."""
    counts = positions(lengths)
    head = 2 * counts[1] * shape["hidden"] * shape["vocabulary"]
    total = {(shape["hidden"], shape["vocabulary"]): head,
             (shape["vocabulary"], shape["hidden"]): head}
    for layer in range(shape["layers"]):
        one = layer_operations(shape, rank, counts, layer == 0, layer == shape["layers"] - 1)
        for size, operations in one.items():
            total[size] = total.get(size, 0) + operations
    return total


def seconds_at_limit(operations, rates):
    """Seconds when every product runs at its measured rate, the rest at the best of them."""
    best = max(rates.values())
    return sum(count / rates.get(size, best) for size, count in operations.items())


def multiply_rate(rows, inner, outer, blocks=5, block_seconds=0.2):
    """The best of `blocks` rates, in operations a second, of (rows, inner) @ (inner, outer)."""
    import torch
    left, right = torch.randn(rows, inner), torch.randn(inner, outer)
    out = torch.empty(rows, outer)
    for _ in range(3):
        torch.mm(left, right, out=out)
    best = 0.0
    for _ in range(blocks):
        done, start = 0, time.perf_counter()
        while (spent := time.perf_counter() - start) < block_seconds:
            torch.mm(left, right, out=out)
            done += 1
        best = max(best, 2 * rows * inner * outer * done / spent)
    return best


def measure_rates(shape, tokens, labels):
    """`[inner, outer, rate]` of every product size, at the rows of a mean batch."""
    hidden, inner, vocabulary = shape["hidden"], shape["intermediate"], shape["vocabulary"]
    sizes = [(tokens, hidden, hidden), (tokens, hidden, inner), (tokens, inner, hidden),
             (labels, hidden, vocabulary), (labels, vocabulary, hidden)]
    return [[a, b, multiply_rate(rows, a, b)] for rows, a, b in sizes]


def main():
    """Measure and print the rates for the task's mean batch."""
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    lengths = task["lengths"]
    tokens, labels, _, _ = positions(lengths)
    batches = len(lengths) / task["batch"]
    rates = measure_rates(task["shape"], round(tokens / batches), round(labels / batches))
    print(json.dumps({"rates": rates}))


if __name__ == "__main__":
    main()
