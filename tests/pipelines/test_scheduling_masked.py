"""The scheduler against core/masking.py, and the pipeline folder in a process without diffdiv."""

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from diffdiv.core import masking
from diffdiv.models import token_networks
from diffdiv.models.tokens import token_denoiser

PIPELINES = Path(__file__).parents[2] / "pipelines"
MASK, LENGTH = 4, 12


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, PIPELINES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


SCHEDULING, SEQUENCES = load("scheduling_masked"), load("masked_sequences")
Scheduler, Pipeline = SCHEDULING.MaskedDiffusionScheduler, SEQUENCES.MaskedSequencesPipeline

CORE = {
    "log_linear": masking.log_linear(),
    "cosine": masking.cosine(),
    "polynomial": masking.polynomial(2.0),
}
ALL = pytest.mark.parametrize("name", CORE)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_net() -> token_networks.DilatedTokenNet:
    torch.manual_seed(0)
    return token_networks.DilatedTokenNet(width=8, kernel=3, dilations=(1, 2)).eval()


def pipeline(**settings: object):
    pipe = Pipeline(tiny_net(), Scheduler(), length=LENGTH, num_inference_steps=5, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -- scheduler ---------------------------------------------------------------------------------


@ALL
def test_a_step_is_the_cores_step_with_the_same_noise(name):
    scheduler = Scheduler(mask_schedule=name, power=2.0)
    scheduler.set_timesteps(7)
    chain = CORE[name].chain(7)
    sample = torch.randint(0, MASK + 1, (64, LENGTH), generator=seeded(0))
    for step, timestep in enumerate(scheduler.timesteps):
        logits = torch.randn(64, LENGTH, 4, generator=seeded(step))
        out = scheduler.step(logits, timestep, sample, generator=seeded(100 + step))
        z = torch.randn(64, LENGTH, 5, generator=seeded(100 + step), dtype=torch.float64)
        gumbel = masking.gumbel_from_normal(z).float()
        log_p = masking.subs_log_probs(logits, sample, 4)
        expected = masking.ancestral_step(sample, log_p, chain.rho(step), gumbel)
        assert torch.equal(out.prev_sample, expected)
        assert out.pred_logits is logits
        probs = torch.softmax(logits, -1).gather(-1, out.sampled_tokens[..., None])[..., 0]
        torch.testing.assert_close(out.sampled_probs, probs)
        sample = out.prev_sample
    assert bool((sample < MASK).all())


def test_timesteps_count_down_and_steps_keep_no_state():
    scheduler = Scheduler()
    scheduler.set_timesteps(6)
    assert scheduler.timesteps.tolist() == [5, 4, 3, 2, 1, 0]
    assert scheduler.timesteps.dtype == torch.long
    logits = torch.randn(3, LENGTH, 4, generator=seeded(0))
    sample = torch.full((3, LENGTH), MASK)
    first = scheduler.step(logits, 2, sample, generator=seeded(1)).prev_sample
    scheduler.step(logits, 5, sample, generator=seeded(2))
    again = scheduler.step(logits, torch.tensor(2), sample, generator=seeded(1), return_dict=False)
    assert torch.equal(first, again[0]) and len(again) == 4


@pytest.mark.parametrize("mask", [0, 2, 4])
def test_the_mask_is_never_drawn_wherever_its_column_is(mask):
    scheduler = Scheduler(mask_token_id=mask)
    scheduler.set_timesteps(1)
    logits = torch.zeros(256, LENGTH, 5)
    logits[..., mask] = 50.0
    out = scheduler.step(logits, 0, torch.full((256, LENGTH), mask), generator=seeded(0))
    assert bool((out.prev_sample != mask).all())
    assert sorted(out.prev_sample.unique().tolist()) == [i for i in range(5) if i != mask]
    torch.testing.assert_close(out.sampled_probs, torch.full((256, LENGTH), 0.25))


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_law_of_a_step(temperature):
    """20,000 positions: share revealed and share of each token, within five standard errors."""
    scheduler = Scheduler()
    scheduler.set_timesteps(4)
    probs = torch.tensor([0.1, 0.2, 0.3, 0.4])
    logits = probs.log().expand(2000, 10, 4)
    sample = torch.full((2000, 10), MASK)
    out = scheduler.step(logits, 3, sample, temperature=temperature, generator=seeded(0))
    shown = out.prev_sample[out.prev_sample != MASK]
    error = 5 * (0.25 * 0.75 / 20_000) ** 0.5
    assert len(shown) / 20_000 == pytest.approx(0.25, abs=error)
    counts = torch.bincount(shown, minlength=4) / len(shown)
    if temperature == 0:
        assert counts.tolist() == [0, 0, 0, 1]
    else:
        law = probs ** (1 / temperature) / (probs ** (1 / temperature)).sum()
        assert float((counts - law).abs().max()) < 5 * 0.5 / len(shown) ** 0.5


@ALL
def test_add_noise_masks_at_the_rate(name):
    scheduler = Scheduler(mask_schedule=name, power=2.0)
    tokens = torch.randint(0, 4, (10, 50), generator=seeded(0))
    u = torch.rand(10, 50, generator=seeded(1), dtype=torch.float64)
    timesteps = torch.arange(10) * 100
    t = (timesteps.double() + 1) / 1000
    expected = CORE[name].mask(tokens, t, u, MASK)
    assert torch.equal(scheduler.add_noise(tokens, u, timesteps), expected)


def test_settings_survive_a_folder(tmp_path):
    Scheduler(mask_token_id=20, mask_schedule="cosine").save_pretrained(tmp_path)
    again = Scheduler.from_pretrained(tmp_path)
    assert (again.config.mask_token_id, again.config.mask_schedule) == (20, "cosine")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"mask_schedule": "linear"}, "`mask_schedule`"),
        ({"power": 0.0}, "`power`"),
        ({"eps": 1.0}, "`eps`"),
    ],
)
def test_schedulers_that_cannot_be_are_refused(settings, word):
    with pytest.raises(ValueError, match=word):
        Scheduler(**settings)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        ({"timestep": 5}, "`timestep`"),
        ({"timestep": -1}, "`timestep`"),
        ({"temperature": -0.1}, "`temperature`"),
        ({"sample": torch.zeros(2, LENGTH)}, "`sample`"),
        ({"sample": torch.zeros(2, LENGTH + 1, dtype=torch.long)}, "`sample`"),
    ],
)
def test_steps_that_cannot_be_are_refused(call, word):
    scheduler = Scheduler()
    scheduler.set_timesteps(5)
    right = {"timestep": 0, "sample": torch.zeros(2, LENGTH, dtype=torch.long)}
    with pytest.raises(ValueError, match=word):
        scheduler.step(torch.zeros(2, LENGTH, 4), **(right | call))
    with pytest.raises(ValueError, match="`num_inference_steps`"):
        scheduler.set_timesteps(0)


# -- pipeline ----------------------------------------------------------------------------------


def test_pipeline_is_the_cores_sampler():
    pipe = pipeline()
    out = pipe(batch_size=16, generator=seeded(3))
    generator = seeded(3)
    draws = [
        masking.gumbel_from_normal(
            torch.randn(16, LENGTH, 5, generator=generator, dtype=torch.float64)
        ).float()
        for _ in range(5)
    ]
    denoiser = token_denoiser(pipe.denoiser)
    with torch.no_grad():
        tokens = masking.sample_ancestral(
            denoiser.log_probs,
            masking.log_linear().chain(5),
            draws.__getitem__,
            denoiser.all_masked(16, LENGTH),
        )
    assert torch.equal(out.sequences, tokens)
    assert out.texts == ["".join("ACGT"[i] for i in row) for row in tokens.tolist()]


def test_each_sequence_depends_on_its_own_seed_only():
    pipe = pipeline()
    pair = pipe(batch_size=2, generator=[seeded(5), seeded(6)]).texts
    assert pipe(generator=seeded(6)).texts == pair[1:]
    assert pair[0] != pair[1]


def test_templates_are_filled_in():
    texts = pipeline()("acNNNNNNNNGT", batch_size=3, generator=seeded(0)).texts
    assert all(t.startswith("AC") and t.endswith("GT") and "N" not in t for t in texts)
    two = pipeline()(["NNNA", "CNNN"], generator=seeded(0), output_type="seq")
    assert two.texts is None and two.sequences.shape == (2, 4)
    assert (int(two.sequences[0, 3]), int(two.sequences[1, 0])) == (0, 1)


def test_callback_sees_every_step_and_may_change_it():
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, timestep, int((tensors["sequences"] == MASK).sum())))
        return {"sequences": tensors["sequences"].index_fill(1, torch.tensor([0]), 2)}

    out = pipeline()(batch_size=4, generator=seeded(0), callback_on_step_end=callback)
    assert [s[:2] for s in seen] == [(0, 4), (1, 3), (2, 2), (3, 1), (4, 0)]
    assert seen[-1][2] == 0 and all(t.startswith("G") for t in out.texts)
    tokens = pipeline()(batch_size=4, output_type="seq", return_dict=False)
    assert len(tokens) == 1 and tokens[0].shape == (4, LENGTH)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        ({"template": "ACXT"}, "X"),
        ({"template": ["AC", "A"]}, "differ"),
        ({"template": ["AC", "AG"], "batch_size": 3}, "batch_size"),
        ({"batch_size": 0}, "not positive"),
        ({"batch_size": 2, "generator": [torch.Generator()]}, "generator"),
        ({"output_type": "fasta"}, "fasta"),
        ({"callback_on_step_end_tensor_inputs": ("logits",)}, "logits"),
    ],
)
def test_calls_that_cannot_be_right_are_refused(call, word):
    with pytest.raises(ValueError, match=word):
        pipeline()(**call)
    with pytest.raises(ValueError, match="alphabet"):
        pipeline(alphabet="ACGN")


def test_the_files_import_nothing_of_this_project():
    files = [
        PIPELINES / "scheduling_masked.py",
        PIPELINES / "masked_sequences.py",
        Path(token_networks.__file__),  # travels beside the weights
    ]
    imported = set()
    for node in (n for f in files for n in ast.walk(ast.parse(f.read_text(encoding="utf-8")))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    assert imported <= {"math", "collections", "dataclasses", "torch", "diffusers"}


READER = """
import json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffdiv":
            raise ImportError("blocked")

sys.meta_path.insert(0, Blocker())
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
print(json.dumps(pipe(batch_size=4, generator=torch.Generator().manual_seed(3)).texts))
"""


@pytest.mark.slow  # a process that imports torch and diffusers
def test_a_folder_loads_where_diffdiv_does_not_exist(tmp_path):
    pipe, folder = pipeline(), tmp_path / "export"
    pipe.denoiser.save_pretrained(folder / "denoiser")
    pipe.scheduler.save_pretrained(folder / "scheduler")
    shutil.copy(PIPELINES / "masked_sequences.py", folder)
    shutil.copy(PIPELINES / "scheduling_masked.py", folder / "scheduler")
    shutil.copy(token_networks.__file__, folder / "denoiser")
    index = {
        "_class_name": ["masked_sequences", "MaskedSequencesPipeline"],
        "denoiser": ["token_networks", "DilatedTokenNet"],
        "scheduler": ["scheduling_masked", "MaskedDiffusionScheduler"],
        "length": LENGTH,
        "num_inference_steps": 5,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    out = subprocess.run(
        [sys.executable, "-c", READER, str(folder)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
    )
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout.splitlines()[-1]) == pipe(batch_size=4, generator=seeded(3)).texts
