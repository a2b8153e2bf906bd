"""`diffdiv demo i2v`: an image-to-video model that leaks, its cure, and the exact answer.

Digits move on a strip; the image says nothing about the motion (diffdiv/data/moving_digits.py). The
embedded model has learned by heart how each of its 64 training images moves; the same network is
trained here with TimeNoise. Everything is measured on images that neither has seen.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from torch import Tensor

from diffdiv import api
from diffdiv.core.leakage import LowPass, TimeNoise, time_map
from diffdiv.core.schedule import Schedule
from diffdiv.data.moving_digits import MovingDigits, strip_world
from diffdiv.demo_i2v_report import write_page
from diffdiv.metrics.card import Evaluation, Row, metric_card, write_evaluation
from diffdiv.metrics.leakage import ImageDenoiser
from diffdiv.metrics.moving_digits import Trial, noised_through, shown_through, told_through
from diffdiv.models.clip_net import Degrade, clip_denoiser, load_clip_net, show_clean
from diffdiv.resources import resource
from diffdiv.runtime.yaml_io import read_yaml

TIMES = (999.0, 950.0, 900.0, 850.0, 800.0, 700.0, 600.0, 500.0)
REAL, IDEAL, LEAKS, CURED = "real clips", "ideal denoiser", "naive: leaks", "TimeNoise: the cure"
CONTROL, EARLY, BLURRED = "ideal, from 0.8 N(0,I)", "naive, from 0.9 A-Init", "naive, low-pass"
NOISED, TOLD_NOTHING = "cure, image noised too", "cure, told level 0"
#: what each figure says, for a table's head
COLUMNS = {
    "frechet_distance": "distance to real clips ↓",
    "image_law_distance": "motion decided by the image ↓",
    "motion": "motion (as real)",
    "static_fraction": "still (as real)",
    "fit_error": "distortion ↓",
    "first_frame_error": "first frame ↓",
}
_STEPS = 25
_BLUR = 0.5  # cells


@dataclass(frozen=True)
class Sampled:
    """Clips of one way to sample, a row for each row of the judge, and their figures."""

    name: str
    clips: Tensor
    figures: dict[str, float]


def cure_leakage(out: Path, say: Callable[[str], None]) -> Evaluation:
    """Train the cure, measure all, write evaluation.json, leakage.json and report.html.

    Args:
        out: run folder; a finished run is only measured again.
        say: told what happens next.
    """
    run = api.train("configs/demo/i2v.yaml", {"run.folder": out}).folder
    say("sampling unseen images: ideal, leaking and cured models, and other ways to show the image")
    embedded = resource("assets/embedded_i2v")
    trial = trial_of(run)
    schedule, cure = trial.schedule, run / "export"
    noise = noise_of(run, schedule)
    models = {LEAKS: model_of(embedded), CURED: model_of(cure, told_through(noise))}
    blur = LowPass(time_map(schedule), _BLUR, axes=1, clean_probability=0.0)
    remedies = {
        NOISED: model_of(cure, noised_through(noise, seed=0)),
        TOLD_NOTHING: model_of(cure),
        BLURRED: model_of(embedded, shown_through(blur)),
    }
    rows = sampled(trial, models, remedies)
    say("the leakage meter: one-step predictions over t, on seen and unseen images")
    leakage = trial.leakage(models, TIMES)
    card = metric_card(
        n=len(trial.judge.image),
        seed=0,
        features="24 principal components of real clips",
        device="cpu",
        command="diffdiv demo i2v",
        weights=embedded / "denoiser/diffusion_pytorch_model.safetensors",
        details={"images": "unseen", "samples_per_image": trial.judge.seeds},
    )
    table: list[Row] = [
        {
            "name": row.name,
            "network_evaluations": 0 if row.name in (REAL, IDEAL, CONTROL) else _STEPS,
            "metrics": row.figures,
        }
        for row in rows
    ]
    write_evaluation(run, table, card)
    (run / "leakage.json").write_text(json.dumps(leakage, indent=1) + "\n", encoding="utf-8")
    write_page(run / "report.html", trial, rows, leakage, columns=COLUMNS, card=card)
    return {"rows": table, "card": card}


def trial_of(run: Path) -> Trial:
    """The trial of a run of train/moving_digits.py: its seen pairs, and unseen images."""
    config = read_yaml(run / "config.yaml")
    world, section = config["world"], config["run"]
    assert isinstance(world, dict) and isinstance(section, dict)
    pairs = world["num_pairs"]
    data = MovingDigits(
        strip_world(still_probability=float(str(world["still_probability"]))),
        num_pairs=None if pairs is None else int(str(pairs)),
        seed=int(str(section["seed"])),
    )
    return Trial.of(data, load_clip_net(run / "export")[1])


def noise_of(run: Path, schedule: Schedule) -> TimeNoise:
    """The noise a TimeNoise run trained with, never left out."""
    found = read_yaml(run / "config.yaml")["condition"]
    assert isinstance(found, dict)
    beta_m, a, mu_max = (float(str(found[name])) for name in ("beta_m", "a", "mu_max"))
    return TimeNoise(time_map(schedule), beta_m, a, mu_max, clean_probability=0.0)


def model_of(folder: Path, degrade: Degrade = show_clean) -> ImageDenoiser:
    """A saved network, and what it is shown of the image."""
    net, schedule = load_clip_net(folder)
    return lambda image: clip_denoiser(net, schedule, image, degrade)


def sampled(
    trial: Trial, models: dict[str, ImageDenoiser], remedies: dict[str, ImageDenoiser]
) -> list[Sampled]:
    """Samples of every model, from the same noise, and of the remedies at inference."""
    clips = {
        REAL: trial.judge.real(seed=0),
        IDEAL: trial.samples(trial.bayes, seed=0),
        **{name: trial.samples(model, seed=0) for name, model in models.items()},
        **{name: trial.samples(model, seed=0) for name, model in remedies.items()},
        EARLY: trial.samples(models[LEAKS], seed=0, start=0.9, init="shrunk"),
        CONTROL: trial.samples(trial.bayes, seed=0, start=0.8),
    }
    return [Sampled(name, part, trial.judge.measure(part)) for name, part in clips.items()]


def leakage_table(evaluation: Evaluation) -> Table:
    """evaluation.json as a table for a terminal of 80 columns, a row a model."""
    table = Table(title="images that no model has seen; ↓ lower is better")
    table.add_column("")
    for name in ("distance", "by image", "motion", "still", "distortion"):
        table.add_column(name, justify="right")
    for row in evaluation["rows"]:
        figures = [row["metrics"][name] for name in list(COLUMNS)[:5]]
        table.add_row(row["name"], *(f"{value:.3f}" for value in figures))
    return table
