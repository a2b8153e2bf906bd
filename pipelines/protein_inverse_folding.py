"""Designs protein sequences for a backbone with a masked diffusion model.

This file needs torch and diffusers; gemmi where a structure file is given instead of coordinates.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import BaseOutput

ATOMS = ("N", "CA", "C", "O")


@dataclass
class ProteinDesignOutput(BaseOutput):
    """Output of the pipeline.

    Args:
        sequences (`torch.LongTensor` of shape `(num_designs, length)`): token ids.
        texts (`list[str]`): the sequences as letters, chains separated by a slash; None if
            `output_type` is "seq".
        fasta (`str`): the same as FASTA records; None if `output_type` is "seq".
    """

    sequences: torch.LongTensor
    texts: list[str] | None = None
    fasta: str | None = None


@dataclass
class Residues:
    """A backbone with what is known of it.

    Args:
        coordinates (`torch.Tensor` of shape `(length, 4, 3)`): N, CA, C, O in angstrom; a row that
            is not finite is missing.
        chains (`torch.LongTensor` of shape `(length,)`): number of the chain, from 0.
        places (`torch.LongTensor` of shape `(length,)`): place in the chain, gaps counted.
        letters (`str`): what is there now, "X" where unknown.
        labels (`list[str]`): chain and number of each residue, such as "A:52A".
        name (`str`): of the structure.
    """

    coordinates: torch.Tensor
    chains: torch.Tensor
    places: torch.Tensor
    letters: str
    labels: list[str]
    name: str = "design"

    @classmethod
    def of(
        cls,
        coordinates: torch.Tensor,
        chains: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
        letters: str | None = None,
    ) -> "Residues":
        """Of coordinates `(length, 4, 3)`; by default one chain of unknown letters."""
        if coordinates.ndim != 3 or coordinates.shape[1:] != (4, 3):
            raise ValueError(f"backbone: {list(coordinates.shape)} is not [length, 4, 3]")
        length = len(coordinates)
        chains = torch.zeros(length, dtype=torch.long) if chains is None else chains
        places = torch.arange(length) if places is None else places
        letters = "X" * length if letters is None else letters.upper().replace("/", "")
        if not length == len(chains) == len(places) == len(letters):
            raise ValueError(
                f"backbone: {length} residues, {len(chains)} chains, {len(places)} places, "
                f"{len(letters)} letters"
            )
        numbers = [f"{chr(65 + c % 26)}:{i + 1}" for i, c in enumerate(chains.tolist())]
        return cls(coordinates, chains, places, letters, numbers)

    @classmethod
    def read(cls, path: Path) -> "Residues":
        """Of the first model of a PDB or mmCIF file.

        Waters, ligands, nucleic acids and caps are left out; MSE is M, other modified residues are
        X; of alternate locations the fullest is taken.
        """
        try:
            import gemmi
        except ImportError:
            raise ImportError("gemmi is not installed: pip install gemmi") from None
        structure = gemmi.read_structure(str(path))
        structure.setup_entities()
        rows, names, labels, letters, numbers = [], [], [], [], []
        for chain in structure[0]:
            kept: dict[str, tuple[float, object]] = {}
            for residue in chain:
                known = gemmi.find_tabulated_residue(residue.name)
                atoms = {atom.name for atom in residue}
                if residue.entity_type != gemmi.EntityType.Polymer:
                    continue
                if known.is_amino_acid() or {"N", "CA", "C"} <= atoms:
                    full = max(_occupancies(residue).values())
                    label = str(residue.seqid)
                    if label not in kept or full > kept[label][0]:
                        kept[label] = (full, residue)
            for label, (_, residue) in kept.items():
                known = gemmi.find_tabulated_residue(residue.name)
                letter = known.one_letter_code if known.is_standard() else "X"
                letters.append("M" if residue.name == "MSE" else letter)
                rows.append(_coordinates(residue))
                names.append(chain.name)
                labels.append(f"{chain.name}:{label}")
                numbers.append(residue.seqid.num)
        if not rows:
            raise ValueError(f"{path}: there is no protein in this file")
        order = list(dict.fromkeys(names))
        places = [0]
        for i in range(1, len(names)):
            step = max(1, numbers[i] - numbers[i - 1])
            places.append(places[-1] + step if names[i] == names[i - 1] else 0)
        return cls(
            torch.tensor(rows),
            torch.tensor([order.index(name) for name in names]),
            torch.tensor(places),
            "".join(letters),
            labels,
            path.name.removesuffix(".gz").rpartition(".")[0],
        )

    @property
    def valid(self) -> torch.Tensor:
        """Residues with all four atoms, `(length,)`."""
        return torch.isfinite(self.coordinates).all(-1).all(-1)

    def positions(self, design: str | torch.Tensor | None) -> torch.Tensor:
        """Which residues are designed, `(length,)` bool; ValueError if they are not there."""
        if design is None:
            chosen = self.valid
        elif isinstance(design, torch.Tensor):
            if design.dtype != torch.bool or len(design) != len(self.letters):
                raise ValueError(f"design: needs {len(self.letters)} truth values")
            chosen = design
            if (chosen & ~self.valid).any():
                raise ValueError("design: a residue without a complete backbone was named")
        else:
            chosen = torch.zeros(len(self.letters), dtype=torch.bool)
            for item in design.split(","):
                chosen[self._rows(item.strip())] = True
        if not chosen.any():
            raise ValueError(f"design: there is nothing to design by {design!r}")
        return chosen

    def _rows(self, item: str) -> list[int]:
        """Residues of "A", "A:25" or "A:10-25"."""
        chain, colon, span = item.partition(":")
        rows = [i for i, label in enumerate(self.labels) if label.rpartition(":")[0] == chain]
        if not rows:
            there = ", ".join(dict.fromkeys(label.rpartition(":")[0] for label in self.labels))
            raise ValueError(f"design: {item!r}: no chain {chain!r} (there is {there})")
        if not colon:
            return [row for row in rows if self.valid[row]]
        labels = [self.labels[row].rpartition(":")[2] for row in rows]
        cuts = [(span, span), *((span[:i], span[i + 1 :]) for i, c in enumerate(span) if c == "-")]
        for first, last in cuts:  # a dash may be a sign
            if first in labels and last in labels:
                found = rows[labels.index(first) : labels.index(last) + 1]
                if found and all(self.valid[row] for row in found):
                    return found
        raise ValueError(
            f"design: {item!r}: no such residues with a complete backbone; the numbers of chain "
            f"{chain} go from {labels[0]} to {labels[-1]}"
        )


def _occupancies(residue: object) -> dict[str, float]:
    """Of the backbone atoms, by alternate location."""
    total: dict[str, float] = {}
    for atom in residue:
        if atom.name in ATOMS:
            total[atom.altloc] = total.get(atom.altloc, 0.0) + atom.occ
    return {k: v for k, v in total.items() if k != "\0"} or total or {"\0": 0.0}


def _coordinates(residue: object) -> list[list[float]]:
    """N, CA, C, O of the fullest conformer; not a number unless all are there."""
    occupancies, found = _occupancies(residue), {}
    best = max(occupancies, key=lambda altloc: occupancies[altloc])
    for atom in residue:
        if atom.name in ATOMS and atom.altloc in ("\0", best):
            found.setdefault(atom.name, [atom.pos.x, atom.pos.y, atom.pos.z])
    lost = [[float("nan")] * 3] * len(ATOMS)
    return [found[name] for name in ATOMS] if len(found) == len(ATOMS) else lost


class ProteinInverseFoldingPipeline(DiffusionPipeline):
    """Masked diffusion over the residues of a protein, given its backbone.

    ```python
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe("6mrr.pdb", num_designs=4).texts
    print(pipe("complex.cif", design="A:10-25,B", num_designs=8).fasta)
    pipe(coordinates, letters="GWSTELEK").sequences  # coordinates of shape (length, 4, 3)
    ```

    Args:
        denoiser: `.encode(coordinates, chains, places, valid)` is called once, then the network
            itself on token ids `(num_designs, length)` and that encoding; it returns an object with
            `.logits` `(num_designs, length, vocab_size)`.
        scheduler: a MaskedDiffusionScheduler; its `mask_token_id` is the mask.
        alphabet: letter of each token id from 0 on; the last one stands for unknown residues.
        num_inference_steps: default number of steps.
    """

    model_cpu_offload_seq = "denoiser"
    _callback_tensor_inputs = ("sequences",)

    def __init__(
        self,
        denoiser: torch.nn.Module,
        scheduler: SchedulerMixin,
        alphabet: str = "ACDEFGHIKLMNPQRSTVWYX",
        num_inference_steps: int = 50,
    ) -> None:
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler)
        self.register_to_config(alphabet=alphabet, num_inference_steps=num_inference_steps)

    @torch.no_grad()
    def __call__(
        self,
        backbone: str | Path | torch.Tensor | Residues,
        design: str | torch.Tensor | None = None,
        num_designs: int = 1,
        num_inference_steps: int | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "text",
        return_dict: bool = True,
        chains: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
        letters: str | None = None,
        callback_on_step_end: Callable[["ProteinInverseFoldingPipeline", int, int, dict], dict]
        | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("sequences",),
    ) -> ProteinDesignOutput | tuple:
        """Design sequences for one backbone.

        Args:
            backbone: a PDB or mmCIF file, or coordinates `(length, 4, 3)` of N, CA, C, O.
            design: positions, "A:10-25,B" by the file's chains and numbers, or truth values
                `(length,)`; None: all. Other residues keep their letters.
            num_designs: number of sequences.
            num_inference_steps: of the scheduler.
            temperature: of the logits; 0 takes the likeliest residue.
            generator: one for the batch, or one for each design.
            output_type: "text" for ids, letters and FASTA, "seq" for ids only.
            return_dict: a ProteinDesignOutput if true, else the tuple of what it holds.
            chains, places, letters: of coordinates, see Residues; not with a file.
            callback_on_step_end: called with the pipeline, the number of the step, the timestep
                and a mapping of the chosen tensors; may return other values for them.
            callback_on_step_end_tensor_inputs: only "sequences" can be chosen.
        """
        self.check_inputs(output_type, num_designs, callback_on_step_end_tensor_inputs)
        if isinstance(generator, list) and len(generator) != num_designs:
            raise ValueError(f"generator: {len(generator)} given for {num_designs} designs")
        if isinstance(backbone, torch.Tensor):
            backbone = Residues.of(backbone, chains, places, letters)
        elif chains is not None or places is not None or letters is not None:
            raise ValueError("chains, places, letters: belong to coordinates, not to a file")
        elif not isinstance(backbone, Residues):
            backbone = Residues.read(Path(backbone))
        device, steps = self._execution_device, num_inference_steps
        sequences = self._start(backbone, design).to(device).repeat(num_designs, 1)
        facts = (backbone.coordinates.nan_to_num(0, 0, 0), backbone.chains, backbone.places)
        encoding = self.denoiser.encode(*(f[None].to(device) for f in (*facts, backbone.valid)))
        self.scheduler.set_timesteps(steps or self.config.num_inference_steps, device=device)
        for i, timestep in enumerate(self.progress_bar(self.scheduler.timesteps.tolist())):
            logits = self.denoiser(sequences, encoding).logits
            sequences = self.scheduler.step(
                logits, timestep, sequences, temperature=temperature, generator=generator
            ).prev_sample
            if callback_on_step_end is not None:
                chosen = dict.fromkeys(callback_on_step_end_tensor_inputs, sequences)
                changed = callback_on_step_end(self, i, timestep, chosen)
                sequences = changed.get("sequences", sequences)
        self.maybe_free_model_hooks()
        if output_type == "seq":
            return ProteinDesignOutput(sequences) if return_dict else (sequences,)
        texts = [self.decode(row, backbone) for row in sequences.tolist()]
        records = [f">{backbone.name}-{i}\n{text}\n" for i, text in enumerate(texts)]
        found = ProteinDesignOutput(sequences, texts, "".join(records))
        return found if return_dict else found.to_tuple()

    def check_inputs(
        self, output_type: str, num_designs: int, tensor_inputs: tuple[str, ...]
    ) -> None:
        """ValueError for a type of output, a number or callback tensors that there are not."""
        if output_type not in ("text", "seq"):
            raise ValueError(f"output_type: {output_type!r} is not one of text, seq")
        if num_designs < 1:
            raise ValueError(f"num_designs: {num_designs} is not positive")
        if unknown := set(tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: {sorted(unknown)} not among "
                f"{list(self._callback_tensor_inputs)}"
            )

    def decode(self, tokens: list[int], backbone: Residues) -> str:
        """Letters of token ids, chains separated by a slash."""
        chains = backbone.chains.tolist()
        text = self.config.alphabet[tokens[0]]
        for token, before, chain in zip(tokens[1:], chains[:-1], chains[1:], strict=True):
            text += ("" if chain == before else "/") + self.config.alphabet[token]
        return text

    def _start(self, backbone: Residues, design: str | torch.Tensor | None) -> torch.Tensor:
        letters = self.config.alphabet
        unknown = sorted(set(backbone.letters) - set(letters))
        if unknown:
            raise ValueError(f"letters: {unknown} are not among {letters}")
        tokens = torch.tensor([[letters.index(letter) for letter in backbone.letters]])
        mask = self.scheduler.config.mask_token_id
        return torch.where(backbone.positions(design), mask, tokens)
