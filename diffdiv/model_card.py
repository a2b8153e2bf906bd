"""README.md of an export: how to call it first, then what it is, measured how, under what licence.

Everything that comes from outside (prompts, names, figures) is put on one line without special
characters, so that it cannot open a tag, a table cell, a code fence or a front matter.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from huggingface_hub import ModelCard, ModelCardData

from diffdiv.metrics.card import Evaluation, versions


class Card(TypedDict, total=False):
    """What a model card says besides what the export itself shows."""

    facts: dict[str, object]
    evaluation: Evaluation
    prompt: str


def write_model_card(
    folder: Path,
    teacher: Path,
    call: Mapping[str, object],
    facts: Mapping[str, object],
    card: Card,
) -> None:
    """Write ``folder``/README.md.

    Args:
        folder: the export, complete but for this file; one with LoRA weights is an adapter.
        teacher: the base model's folder; its name and the licence in its README.md are used.
        call: the pipeline's arguments, besides the prompt.
        facts: what the student is, a table; those of the card follow.
        card: measured figures and an example prompt, if known.
    """
    evaluation = card.get("evaluation", Evaluation(rows=[], card={}))
    lora = (folder / "pytorch_lora_weights.safetensors").is_file()
    text, steps = lora or (folder / "tokenizer").is_dir(), call["num_inference_steps"]
    index = folder / "model_index.json"
    kind = json.loads(index.read_text("utf-8"))["_class_name"] if index.is_file() else ""
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text("utf-8"))
    data = ModelCardData(
        library_name="diffusers",
        license=_licence(teacher),
        pipeline_tag="text-to-image" if text else "unconditional-image-generation",
        tags=[
            "diffdiv",
            "one-step" if steps == 1 else "few-step",
            "distillation",
            *(["lora"] if lora else []),
        ],
    )
    ModelCard.from_template(
        data,
        template_path=str(Path(__file__).parent / "templates/model_card.md.j2"),
        text=text,
        lora=lora,
        code=kind if isinstance(kind, list) else None,  # file and class that travel with it
        scheduler=scheduler["_class_name"],
        call=call,
        steps="one step" if steps == 1 else f"{steps} steps",
        base=teacher.name,
        prompt=card.get("prompt", "a photo of a lighthouse"),
        facts={**facts, **card.get("facts", {}), **versions()},
        metrics=list(dict.fromkeys(name for row in evaluation["rows"] for name in row["metrics"])),
        evaluation=evaluation,
        line=_line,
    ).save(folder / "README.md")


def _licence(teacher: Path) -> str | None:
    """The licence named in the base folder's README.md, if there is one."""
    readme = teacher / "README.md"
    if not readme.is_file():
        return None
    return ModelCard.load(readme, ignore_metadata_errors=True).data.get("license")


def _line(value: object) -> str:
    """One line without what Markdown would take for a tag, a table cell, code or a link."""
    return re.sub(r"[|`\[\]<>]+", " ", " ".join(str(value).split()))
