"""The level Stable Video Diffusion is told while sampling: the median of its TimeNoise training."""

import json
from pathlib import Path

import pytest
from scipy.special import expit
from scipy.stats import norm
from test_video_start import call
from tiny_video_pipelines import tiny_svd

from diffdiv.told_level import noise_of_export, told_level

FACTS = {
    "call": {"noise_aug_strength": 0.0}, "kind": "time_noise", "strength": 15.0, "a": 2.0,
    "mu_max": 4.0, "s": 1.0, "time": "rank", "clean_probability": 0.1, "space": "latent",
    "p_mean": 0.7, "p_std": 1.6, "seed": 0, "steps": 5,
}  # fmt: skip


def test_the_median_of_training_is_told_where_an_image_is_shown(tmp_path: Path) -> None:
    (tmp_path / "export.json").write_text(json.dumps(FACTS))
    noise, pipe = noise_of_export(tmp_path), tiny_svd()
    pipe.set_progress_bar_config(disable=True)
    seen: list[tuple[float, list[float]]] = []

    def look(_net: object, given: tuple, named: dict) -> None:
        seen.append((float(given[1]), named["added_time_ids"][:, 2].tolist()))

    options = {"num_frames": 3, "height": 16, "width": 16, "num_inference_steps": 4}
    with told_level(pipe, noise):
        hook = pipe.unet.register_forward_pre_hook(look, with_kwargs=True)  # behind the other
        call(pipe, "svd", noise_aug_strength=0.0, **options)
    call(pipe, "svd", noise_aug_strength=0.0, **options)
    hook.remove()
    within, after = seen[:4], seen[4:]
    for time, (unconditional, level) in within:
        # rank among training times: ln sigma ~ N(0.7, 1.6^2), cut at 0.002 and 700
        low, high, here = (norm.cdf((v - 0.7) / 1.6) for v in (-6.2146, 6.5511, 4 * time))
        tau = min(max((here - low) / (high - low), 0), 1)
        assert unconditional == 0
        assert level == pytest.approx(15 * expit(4 * (2 * tau**2 - 1)), rel=2e-3, abs=2e-3)
    assert within[0][1][1] > 14 > 1 > within[-1][1][1]
    assert all(told == [0, 0] for _, told in after), "nothing is left behind"


def test_other_folders_are_told_in_a_sentence(tmp_path: Path) -> None:
    for facts in ({}, {**FACTS, "kind": "constant"}, {k: FACTS[k] for k in FACTS if k[:2] != "p_"}):
        (tmp_path / "export.json").write_text(json.dumps(facts))
        with pytest.raises(ValueError, match="no export of a Stable Video Diffusion trained with"):
            noise_of_export(tmp_path)
