"""Zero-shot evaluation on captioned images, as COCO is used: one command, any text-to-image model.

One caption of each image of a folder is drawn by the seed, ``num`` of these captions in an order
drawn by the seed are made into images, and these are compared with all images of the folder.
docs/evaluation.md says it step by step, and what must agree before two figures may be compared.
"""

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from diffdiv.core.noise import permuted
from diffdiv.data.cache import fingerprint
from diffdiv.data.captions import CaptionedImages
from diffdiv.evaluate_images import (
    Dtype,
    Maker,
    keep_images,
    pipeline_maker,
    read_images,
    run_maker,
)
from diffdiv.metrics.card import Evaluation, Row, metric_card, write_evaluation
from diffdiv.metrics.clip import ClipEmbedder, mean_clip_score, require_clip
from diffdiv.metrics.diversity import in_batch_similarity
from diffdiv.metrics.images import INCEPTION_FILE, image_metrics, require_inception

GROUP_SIZE, GROUPS = 4, 500  # in-batch similarity: images of one caption, and of how many captions
_NEXT = 10**7  # image i + k * _NEXT is a further one of caption i
_BATCH = 50  # images that are read at once


@dataclass(frozen=True)
class Protocol:
    """What is asked of a model and how it is marked.

    Attributes:
        data: captioned images, see :mod:`diffdiv.data.captions`.
        num: captions; one generated image each.
        seed: of the choice of captions and of the noise.
        size: real and generated images are scaled (Lanczos) to cover a square of so many pixels
            and cut to it at the centre before Inception sees them; CLIP sees them as made.
        batch: images generated at once; changes the rounding alone.
        inception: weights for FID, KID, precision and recall; None = these are left out.
        clip: CLIP model folder for the score and the similarity; None = these are left out.

    Raises:
        ValueError: if nothing would be measured.
        FileNotFoundError: if a feature network is not there; says what to fetch.
    """

    data: Path
    num: int = 1000
    seed: int = 0
    size: int = 256
    batch: int = 16
    inception: Path | None = None
    clip: Path | None = None

    def __post_init__(self) -> None:
        if self.inception is None and self.clip is None:
            raise ValueError(
                "captioned images are marked by FID, KID, precision and recall (--inception "
                f"{INCEPTION_FILE}) and by CLIP score and in-batch similarity (--clip FOLDER): "
                "give at least one of the two"
            )
        if not 4 <= self.num < _NEXT:
            raise ValueError(f"num: {self.num} is not in 4..{_NEXT - 1}")
        if self.inception is not None:
            require_inception(self.inception)
        if self.clip is not None:
            require_clip(self.clip)


class Questions:
    """The captions that are asked, and the images they are compared with.

    Attributes:
        images: the real ones; ``rows``: one row of each.
        captions: numbers of generated images -> prompts; with CLIP also further images of the
            first captions.
    """

    def __init__(self, protocol: Protocol) -> None:
        num, seed = protocol.num, protocol.seed
        self.images = CaptionedImages(protocol.data, protocol.size, seed=seed)
        self.rows = rows = self.images.one_row_an_image()
        if num > len(rows):
            raise ValueError(f"num: {num}, but {protocol.data} has {len(rows)} captioned images")
        order = [permuted(i, len(rows), seed=seed, purpose="evaluation.order") for i in range(num)]
        self.captions = dict(enumerate(self.images.captions_of([rows[i] for i in order])))
        if protocol.clip is not None:
            first = list(self.captions.items())[:GROUPS]
            for k in range(1, GROUP_SIZE):
                self.captions |= {i + k * _NEXT: caption for i, caption in first}

    def batches(self) -> Iterator[Tensor]:
        """All real images, [B, 3, H, W] in [-1, 1]."""
        for i in range(0, len(self.rows), _BATCH):
            yield self.images.read(self.rows[i : i + _BATCH]).images


def evaluate_captions(
    path: Path,
    protocol: Protocol,
    *,
    dtype: Dtype = "fp32",
    steps: int | None = None,
    guidance: float | None = None,
    images: Path | None = None,
    out: Path | None = None,
) -> Evaluation:
    """Mark one model by a protocol.

    Images that are already there are not made again: the same command goes on where one stopped.
    evaluation.json is written beside them, and into a run.

    Args:
        path: a distillation run, an export or another local text-to-image pipeline.
        protocol: what is asked.
        dtype: of generation, see :func:`run_maker` and :func:`pipeline_maker`.
        steps, guidance: of a pipeline that is neither run nor export; None = its own.
        images: folder of generated images; None = evaluation/ in a run, else evaluation/NAME here.
        out: one more JSON file to write.

    Raises:
        ValueError: naming what is wrong with the options, the data or the folder of images.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    questions = Questions(protocol)
    seed, is_run = protocol.seed, (path / "config.yaml").is_file()
    if is_run:
        if steps is not None or guidance is not None:
            raise ValueError(f"{path}: a run's student has its own steps and takes no guidance")
        maker = run_maker(path, seed=seed, device=device, dtype=dtype)
    else:
        maker = pipeline_maker(
            path, seed=seed, device=device, dtype=dtype, steps=steps, guidance=guidance
        )
    home = path / "evaluation" if is_run else Path("evaluation") / path.resolve().name
    folder = images or home
    facts = {"data": questions.images.fingerprint()}
    keep_images(folder, maker, questions.captions, batch=protocol.batch, data=facts)
    metrics = _marks(protocol, questions, folder, device)
    row = Row(name=maker.name, network_evaluations=maker.network_evaluations, metrics=metrics)
    asked = {"dtype": dtype, "steps": steps, "guidance": guidance}
    command = _command(path, protocol, asked)
    card = _card(protocol, questions, maker, device, command)
    written = write_evaluation(folder, [row], card).read_bytes()
    for copy in ([path / "evaluation.json"] if is_run else []) + ([out] if out else []):
        copy.write_bytes(written)
    return {"rows": [row], "card": card}


def _marks(
    protocol: Protocol, questions: Questions, folder: Path, device: torch.device
) -> dict[str, float]:
    metrics: dict[str, float] = {}
    if protocol.inception is not None:
        made = _stacked(read_images(folder, range(protocol.num), protocol.size))
        metrics |= image_metrics(
            questions.batches(), made, inception=protocol.inception, device=device
        )
    if protocol.clip is not None:
        numbers = list(questions.captions)
        prompts = [questions.captions[n] for n in numbers]
        embed = ClipEmbedder(protocol.clip, device)
        shown, said = embed(read_images(folder, numbers), prompts)
        num = protocol.num
        metrics["clip_score"] = mean_clip_score(shown[:num], said[:num])
        captions = torch.tensor([n % _NEXT for n in numbers])
        metrics["in_batch_similarity"] = in_batch_similarity(shown, captions)
    return metrics


def _stacked(images: Iterable[Tensor]) -> Iterator[Tensor]:
    stream = iter(images)
    while batch := list(islice(stream, _BATCH)):
        yield torch.stack(batch)


def _card(
    protocol: Protocol, questions: Questions, maker: Maker, device: torch.device, command: str
) -> dict[str, object]:
    details: dict[str, object] = {
        "real_images": len(questions.rows),
        "real_images_set_aside": len(questions.images.quarantine),
        "data_sha256": questions.images.fingerprint(),
        "captions": "one of each image, drawn by the seed; num of them, in an order drawn by it",
        "model": dict(maker.facts),
        "batch": protocol.batch,
    }
    features = []
    if protocol.inception is not None:
        features.append("FID, KID, precision, recall (k = 3): Inception of FID, 2048 features")
        details |= {"nearest_neighbours": 3}
    if protocol.clip is not None:
        groups = min(protocol.num, GROUPS)
        features.append(f"CLIP score, in-batch similarity: {protocol.clip.resolve().name}")
        details |= {
            "clip_sha256": fingerprint(protocol.clip),
            "in_batch_similarity": f"CLIP cosine of {GROUP_SIZE} images each of {groups} captions",
        }
    return metric_card(
        n=protocol.num,
        seed=protocol.seed,
        features="; ".join(features),
        device=device,
        command=command,
        weights=protocol.inception,
        ema_half_life=maker.half_life,
        resize=f"to cover {protocol.size} pixels (Lanczos), centre cut; for CLIP its own",
        details=details,
    )


def _command(path: Path, protocol: Protocol, asked: Mapping[str, object]) -> str:
    """What repeats the evaluation, without the folders of this machine."""
    words = ["diffdiv", "evaluate", path.resolve().name, "--data", protocol.data.resolve().name]
    options = {name: vars(protocol)[name] for name in ("num", "seed", "size", "batch")}
    for name, value in {**options, **asked}.items():
        if value is not None:
            words += [f"--{name}", str(value)]
    return shlex.join(words)
