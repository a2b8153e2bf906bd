"""`diffdiv demo drakes`: what several methods gain in reward, and what it costs in KL.

The embedded masked diffusion is fine-tuned for the smooth reward of its world (by gradient) or for
the reward itself (policy gradient), two runs at a time, each the command of a user; meanwhile the
methods without training are sampled. All are judged alike, beside the exact front of the world.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from signal import SIGTERM, getsignal, signal
from threading import current_thread, main_thread
from typing import NamedTuple

from diffdiv import api
from diffdiv.data.sequence_files import read_sequences
from diffdiv.demo_drakes_laws import Law, judge, sampled_laws
from diffdiv.metrics.card import Evaluation
from diffdiv.runtime.launch import INTERRUPTED
from diffdiv.runtime.yaml_io import ConfigError, read_yaml

CONFIG = "configs/demo/drakes.yaml"
Say = Callable[[str], None]


class Trained(NamedTuple):
    """A method that trains: its name, its folder in the demo's, changes of the configuration."""

    name: str
    folder: str
    items: tuple[str, ...] = ()


_QUIET = "run.sample_every=null"
TRAINED = (
    Trained("DRAKES, alpha 0.05", ""),
    Trained("DRAKES, alpha 0.1", "others/drakes-0.1", ("objective.alpha=0.1", _QUIET)),
    Trained("DRAKES without KL", "others/drakes-no-kl", ("objective.alpha=0", _QUIET)),
    Trained(
        "policy gradient, alpha 0.3", "others/policy-gradient",
        ("objective.name=policy_gradient", "reward.kind=dna_world", "objective.alpha=0.3",
         "objective.num_graded=8", "run.steps=60", "lr=1e-3", _QUIET),
    ),
)  # fmt: skip


def fine_tune_dna(out: Path, say: Say) -> Evaluation:
    """Train, sample, judge; what is finished in ``out`` is not done again.

    Writes evaluation.json and sequences.json, for the report.
    """
    steps = _steps(TRAINED[0], out)
    with _training(out, say) as results:
        sampled = sampled_laws(out / "samples" / "without-training", steps)
        say(f"{len(sampled)} laws sampled without training; the runs take a few minutes")
        trained = [_trained_law(method, out, result()) for method, result in results]
    return judge(out, [*sampled, *trained], shown=TRAINED[0].name)


@contextmanager
def _training(out: Path, say: Say) -> Iterator[list[tuple[Trained, Callable[[], float]]]]:
    """Starts all runs, two at a time; each comes with a wait for its CPU seconds."""
    started: list[subprocess.Popen[bytes]] = []

    def leave(*_: object) -> None:
        raise SystemExit(INTERRUPTED)

    before, is_main = getsignal(SIGTERM), current_thread() is main_thread()
    if is_main:  # Python lets no other thread take signals over
        signal(SIGTERM, leave)
    pool = ThreadPoolExecutor(min(2, os.cpu_count() or 1))
    try:
        yield [
            (method, pool.submit(_train, method, out, started, say).result) for method in TRAINED
        ]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in started:
            if process.returncode is None:
                process.terminate()  # it saves its state; the same demo again continues
        pool.shutdown()
        if is_main:
            signal(SIGTERM, before)


def _train(method: Trained, out: Path, started: list[subprocess.Popen[bytes]], say: Say) -> float:
    """Run ``diffdiv train`` to its end, unless that was done; returns its CPU seconds."""
    folder, items = out / method.folder, _items(method, out)
    price = folder / "cpu_seconds.json"
    spent = float(json.loads(price.read_text("utf-8"))) if price.is_file() else 0.0
    if _is_finished(folder, items) and price.is_file():
        return spent
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "diffdiv.cli", "train", CONFIG, *items]
    with (folder / "log.txt").open("ab") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        started.append(process)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    spent += usage.ru_utime + usage.ru_stime
    price.write_text(json.dumps(round(spent, 1)), encoding="utf-8")
    if process.returncode == INTERRUPTED:
        raise SystemExit(INTERRUPTED)
    if process.returncode:
        raise RuntimeError(f"{method.name}: training failed, see {folder / 'log.txt'}")
    say(f"{method.name}: trained in {spent:.0f} CPU s")
    return spent


def _items(method: Trained, out: Path) -> list[str]:
    folder = json.dumps(str(out / method.folder))  # quoted: a name may look like a number
    return [f"run.folder={folder}", *method.items]


def _is_finished(folder: Path, items: Sequence[str]) -> bool:
    """Whether this very run has written its export."""
    try:
        wanted = api.prepare(CONFIG, items)[1].model_dump(mode="json")
        return (
            read_yaml(folder / "config.yaml") == wanted and (folder / "export/README.md").exists()
        )
    except ConfigError:
        return False


def _steps(method: Trained, out: Path) -> int:
    mapping = api.prepare(CONFIG, _items(method, out))[1].model_dump(mode="json")
    return int(mapping["objective"]["num_steps"])


def _trained_law(method: Trained, out: Path, cpu_seconds: float) -> Law:
    """The run's last samples, and the KL it measured on them."""
    folder = out / method.folder
    facts = json.loads((folder / "export/export.json").read_text("utf-8"))
    return Law(
        method.name, read_sequences(folder / "samples/policy.fa").tokens, facts["path_kl"],
        facts["path_kl_error"], facts["call"]["num_inference_steps"], cpu_seconds,
    )  # fmt: skip
