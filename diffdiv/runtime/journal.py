"""What a run tells while it works: metrics, events, heartbeats, a progress bar."""

import datetime
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from diffdiv.core.tensor import sum_over_ranks
from diffdiv.runtime.machine import memory_mib
from diffdiv.runtime.yaml_io import replace_text

HEARTBEAT_SECONDS = 5.0


class Journal:
    """Files of a run folder that grow line by line, and the bar on the terminal.

    Scalars stay on their device until a line of metrics is written: the mean over micro-batches,
    over the steps since the last line and over ranks, which must all log the same names.
    """

    def __init__(self, folder: Path, *, rank: int, device: torch.device, steps: int) -> None:
        self.folder, self.rank, self.device = folder, rank, device
        self.last_line: dict[str, object] = {}
        self.seconds = 0.0  # of training before ``start``
        self._sums: dict[str, Tensor | float] = {}
        self._counts: dict[str, int] = {}
        self._beaten = -math.inf
        self._console = Console(stderr=True, quiet=rank > 0)
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, TextColumn("{task.description}"), console=self._console)
        self._task = self.bar.add_task("", total=steps)
        self._line_step = 0
        self._started = self._line_time = time.monotonic()

    def start(self, step: int) -> None:
        """Start the clock and, on a terminal, the bar."""
        self._started = self._line_time = time.monotonic()
        self._line_step = step
        if self._console.is_terminal:
            self.bar.start()

    def elapsed(self) -> float:
        """Seconds of training so far, interruptions not counted."""
        return self.seconds + time.monotonic() - self._started

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Add one value per name.

        Raises:
            ValueError: if a value is not a single number.
        """
        for name, value in metrics.items():
            if isinstance(value, Tensor):
                if value.ndim:
                    raise ValueError(f"metric {name!r} has shape {list(value.shape)}, wanted []")
                value = value.detach().double()
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def pending(self) -> tuple[list[str], Tensor]:
        """Names that wait for the next line, this rank's sums and counts [n, 2] (float64, CPU)."""
        names = sorted(self._sums)
        rows = [[float(self._sums[name]), self._counts[name]] for name in names]
        return names, torch.tensor(rows, dtype=torch.float64).reshape(-1, 2)

    def load(self, names: Sequence[str], pending: Tensor) -> None:
        """Inverse of :meth:`pending`."""
        self._sums = dict(zip(names, pending[:, 0].tolist(), strict=True))
        self._counts = dict(zip(names, pending[:, 1].int().tolist(), strict=True))

    def write_metrics(self, key: str, step: int, *, batch_size: int) -> dict[str, float]:
        """One line of ``metrics.jsonl``, by all ranks together; returns the finite means."""
        (names, pending), now = self.pending(), time.monotonic()
        totals = sum_over_ranks(pending.to(self.device)).tolist()
        means = {name: total / count for name, (total, count) in zip(names, totals, strict=True)}
        finite = {name: mean for name, mean in means.items() if math.isfinite(mean)}
        rate = (step - self._line_step) * batch_size / max(now - self._line_time, 1e-9)
        self._sums, self._counts, self._line_time, self._line_step = {}, {}, now, step
        memory = memory_mib(self.device)
        self.last_line = {
            key: step,
            "images_seen": step * batch_size,
            "seconds": round(self.elapsed(), 3),
            **{name: finite.get(name) for name in names},  # JSON has neither NaN nor infinities
            "images_per_second": round(rate, 3),
            "memory": round(memory, 1),
        }
        if self.rank == 0:
            self._append("metrics.jsonl", self.last_line)
            text = f"{rate:.1f} images/s, {memory:.0f} MiB"
            self.bar.update(self._task, completed=step, description=text)
            if not self._console.is_terminal:
                self._console.print(f"{key} {step}/{self.bar.tasks[0].total}, {text}")
        return finite

    def event(self, kind: str, message: str) -> None:
        """Append a line to ``events.jsonl``, from whichever rank calls."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._append("events.jsonl", {"time": now, "kind": kind, "message": message})

    def beat(self, phase: str) -> None:
        """Leave a sign of life for the other ranks, now and then.

        It is written by the loop itself: a thread would go on beating while the loop hangs.
        """
        now = time.monotonic()
        if now - self._beaten > HEARTBEAT_SECONDS:
            self._beaten = now
            (self.folder / "heartbeats").mkdir(exist_ok=True)
            sign = json.dumps({"time": time.time(), "phase": phase})
            replace_text(self.folder / "heartbeats" / f"rank-{self.rank}.json", sign)

    def other_ranks(self) -> list[str]:
        """When and where each other rank gave its last sign of life."""
        signs = []
        for path in sorted((self.folder / "heartbeats").glob("rank-*.json")):
            if path.stem != f"rank-{self.rank}":
                sign = json.loads(path.read_bytes())
                ago = f"{time.time() - sign['time']:.0f} s ago"
                signs.append(f"{path.stem} was last seen {ago} in {sign['phase']}")
        return signs

    def forget_after(self, key: str, step: int) -> None:
        """Drop the lines of metrics behind ``step``, and a torn one, before training resumes."""
        path = self.folder / "metrics.jsonl"
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("}\n")]
            replace_text(path, "".join(line for line in whole if json.loads(line)[key] <= step))

    def _append(self, file: str, line: Mapping[str, object]) -> None:
        with (self.folder / file).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line, allow_nan=False) + "\n")
