"""What `diffdiv sample` is asked for, checked before torch is imported or a weight is read."""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

PROTEINS = "ProteinInverseFoldingPipeline"  # their code lies in the export; see pipelines/
SEQUENCES = "MaskedSequencesPipeline"
_MADE = {PROTEINS: "protein sequences", SEQUENCES: "DNA sequences"}


def pipeline_folder(path: Path) -> Path:
    """The folder of a pipeline: ``export/`` of a run, any other folder as it is.

    Raises:
        ValueError: if there is no pipeline.
    """
    folder = path / "export" if (path / "config.yaml").is_file() else path
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder}: no model_index.json there, so it is not a diffusers pipeline")
    return folder


def pipeline_class(path: Path) -> str:
    """The name of the pipeline in a run, an export or any diffusers folder; ValueError if none."""
    index = pipeline_folder(path) / "model_index.json"
    name = json.loads(index.read_text("utf-8"))["_class_name"]
    return str(name[-1] if isinstance(name, list) else name)  # a list: code of its own, class


def stability_folders(path: Path) -> dict[str, Path]:
    """The networks in an export of train/stability.py, "finetune" and "evaluation"."""
    found = dict[str, Path]()
    for name in ("finetune", "evaluation"):
        config = path / name / "config.json"
        if config.is_file():
            class_name = json.loads(config.read_text("utf-8")).get("_class_name")
            found |= {name: path / name} if class_name == "StabilityNet" else {}
    return found


def check_options(
    path: Path,
    prompts: Sequence[str],
    reward: str | None,
    structure: Path | None,
    design: str | None,
) -> None:
    """Refuse what does not belong together; the arguments are those of `sample_path`.

    Raises:
        ValueError: in one sentence that begins with the argument at fault.
    """
    name = pipeline_class(path)
    made = _MADE.get(name, "images")
    if design is not None and structure is None:
        raise ValueError(f"design: {design!r} names positions of a structure, and none is given")
    if name != PROTEINS:
        if structure is not None:
            raise ValueError(f"structure: '{structure}' is for proteins; {path} makes {made}")
        if reward is not None and name != SEQUENCES:
            raise ValueError(f"reward: {reward!r} scores sequences, and this pipeline makes images")
        if reward is not None and stability_folders(Path(reward)):
            raise ValueError(f"reward: {reward!r} scores proteins; {path} makes {made}")
        return
    if structure is None:
        raise ValueError(f"structure: none given, and {path} designs proteins for a PDB or mmCIF")
    if prompts:
        raise ValueError(
            f"prompts: {path} takes none; the structure is what it designs for, design says where"
        )
    if reward is not None and not (Path(reward).is_file() or stability_folders(Path(reward))):
        raise ValueError(
            f"reward: {reward!r} is not a CSV of energies or the export of train/stability.py"
        )
    if find_spec("gemmi") is None:
        raise ValueError(f"structure: '{structure}' is read by gemmi: pip install 'diffdiv[bio]'")
