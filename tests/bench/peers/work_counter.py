"""Count what really enters a Hugging Face Trainer, and time its loop, the same for every peer."""
import json
import resource
import sys
import time

from transformers import TrainerCallback


class WorkCounter(TrainerCallback):
    """Times the training loop and counts rows, tokens and steps as the batches are made."""

    def __init__(self):
        self.rows = self.steps = self.trained = self.padded = 0
        self.train_seconds = self.train_loss = self.base_dtype = None

    def _count(self, collate):
        """`collate` with counting added; a few microseconds a batch."""
        def counting(features):
            batch = collate(features)
            self.rows += batch["labels"].shape[0]
            self.trained += int((batch["labels"][:, 1:] != -100).sum())
            self.padded += batch["input_ids"].numel()
            return batch
        return counting

    def on_train_begin(self, args, state, control, train_dataloader=None, model=None, **kwargs):
        """Watch the batches, note the base weights' precision, start the clock."""
        frozen = next(p for p in model.parameters() if not p.requires_grad)
        self.base_dtype = str(frozen.dtype).removeprefix("torch.")
        loader = getattr(train_dataloader, "base_dataloader", train_dataloader)
        loader.collate_fn = self._count(loader.collate_fn)
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Count one optimizer step."""
        self.steps += 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Keep the mean loss that the trainer reports at its end."""
        self.train_loss = (logs or {}).get("train_loss", self.train_loss)

    def on_train_end(self, args, state, control, **kwargs):
        """Stop the clock."""
        self.train_seconds = time.perf_counter() - self._start

    def report(self, started, **more):
        """Print the JSON line that ends a worker; `started` is when the process began."""
        result = {
            "rows": self.rows, "steps": self.steps, "trained_tokens": self.trained,
            "padded_tokens": self.padded, "train_seconds": self.train_seconds,
            "prepare_seconds": time.perf_counter() - started - self.train_seconds,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * rss_unit(),
            "train_loss": self.train_loss, "base_dtype": self.base_dtype, **more}
        print(json.dumps(result), flush=True)


def rss_unit():
    """Bytes in one unit of `ru_maxrss`: macOS counts bytes, Linux kibibytes."""
    return 1 if sys.platform == "darwin" else 1024
