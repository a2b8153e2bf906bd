"""Generates sequences (DNA, protein, any small alphabet) with a masked diffusion model.

This file needs torch and diffusers only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils import BaseOutput


@dataclass
class MaskedSequencesOutput(BaseOutput):
    """Output of the pipeline.

    Args:
        sequences (`torch.LongTensor` of shape `(batch_size, length)`): token ids.
        texts (`list[str]`): the sequences as letters; None if `output_type` is "seq".
    """

    sequences: torch.LongTensor
    texts: list[str] | None = None


class MaskedSequencesPipeline(DiffusionPipeline):
    """Masked diffusion over sequences of letters.

    ```python
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe(batch_size=4).texts
    pipe("NNNNTTTACNNNN", batch_size=4).texts  # "N": to be designed, the rest is kept
    ```

    Args:
        denoiser: called on token ids `(batch_size, length)`, returns an object with `.logits`
            `(batch_size, length, vocab_size)`.
        scheduler: a MaskedDiffusionScheduler; its `mask_token_id` is the mask.
        alphabet: letter of each token id from 0 on, upper case.
        mask_letter: stands for a masked position in templates.
        length: default length of a sequence.
        num_inference_steps: default number of steps.
    """

    model_cpu_offload_seq = "denoiser"
    _callback_tensor_inputs = ("sequences",)

    def __init__(
        self,
        denoiser: torch.nn.Module,
        scheduler: SchedulerMixin,
        alphabet: str = "ACGT",
        mask_letter: str = "N",
        length: int = 200,
        num_inference_steps: int = 128,
    ) -> None:
        super().__init__()
        if mask_letter in alphabet or len(set(alphabet)) < len(alphabet):
            raise ValueError(f"alphabet, mask_letter: {alphabet!r} and {mask_letter!r} overlap")
        self.register_modules(denoiser=denoiser, scheduler=scheduler)
        self.register_to_config(
            alphabet=alphabet,
            mask_letter=mask_letter,
            length=length,
            num_inference_steps=num_inference_steps,
        )

    @torch.no_grad()
    def __call__(
        self,
        template: str | list[str] | None = None,
        batch_size: int | None = None,
        length: int | None = None,
        num_inference_steps: int | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "text",
        return_dict: bool = True,
        callback_on_step_end: Callable[["MaskedSequencesPipeline", int, int, dict], dict]
        | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("sequences",),
    ) -> MaskedSequencesOutput | tuple:
        """Generate sequences.

        Args:
            template: one for all sequences or one for each, of the same length; letters are kept,
                the mask letter is filled in. None: everything is.
            batch_size: number of sequences; by default that of the templates, else 1.
            length: of a sequence without a template.
            num_inference_steps: of the scheduler.
            temperature: of the logits; 0 takes the likeliest token.
            generator: one for the batch, or one for each sequence, which then does not depend on
                the others.
            output_type: "text" for ids and letters, "seq" for ids only.
            return_dict: a MaskedSequencesOutput if true, else the tuple of what it holds.
            callback_on_step_end: called with the pipeline, the number of the step, the timestep
                and a mapping of the chosen tensors; may return other values for them.
            callback_on_step_end_tensor_inputs: only "sequences" can be chosen.
        """
        self.check_inputs(output_type, callback_on_step_end_tensor_inputs)
        start = self._start(template, batch_size, length or self.config.length)
        if isinstance(generator, list) and len(generator) != len(start):
            raise ValueError(f"generator: {len(generator)} given for {len(start)} sequences")
        sequences = start.to(self._execution_device)
        steps = num_inference_steps or self.config.num_inference_steps
        self.scheduler.set_timesteps(steps, device=sequences.device)
        for i, timestep in enumerate(self.progress_bar(self.scheduler.timesteps.tolist())):
            logits = self.denoiser(sequences).logits
            sequences = self.scheduler.step(
                logits, timestep, sequences, temperature=temperature, generator=generator
            ).prev_sample
            if callback_on_step_end is not None:
                chosen = dict.fromkeys(callback_on_step_end_tensor_inputs, sequences)
                changed = callback_on_step_end(self, i, timestep, chosen)
                sequences = changed.get("sequences", sequences)
        self.maybe_free_model_hooks()
        texts = None if output_type == "seq" else [self.decode(row) for row in sequences.tolist()]
        if not return_dict:
            return (sequences,) if texts is None else (sequences, texts)
        return MaskedSequencesOutput(sequences, texts)

    def check_inputs(self, output_type: str, tensor_inputs: tuple[str, ...]) -> None:
        """ValueError for a type of output or callback tensors that there are not."""
        if output_type not in ("text", "seq"):
            raise ValueError(f"output_type: {output_type!r} is not one of text, seq")
        unknown = set(tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: {sorted(unknown)} not among "
                f"{list(self._callback_tensor_inputs)}"
            )

    def decode(self, tokens: list[int]) -> str:
        """Letters of token ids; the mask letter for the mask."""
        letters = self.config.alphabet
        return "".join(letters[i] if i < len(letters) else self.config.mask_letter for i in tokens)

    def encode(self, text: str) -> list[int]:
        """Token ids of letters, upper or lower case; ValueError for other letters."""
        ids = {letter: i for i, letter in enumerate(self.config.alphabet)}
        ids[self.config.mask_letter] = self.scheduler.config.mask_token_id
        unknown = sorted(set(text.upper()) - set(ids))
        if unknown:
            raise ValueError(f"template: letters {unknown} are not among {''.join(ids)}")
        return [ids[letter] for letter in text.upper()]

    def _start(
        self, template: str | list[str] | None, batch_size: int | None, length: int
    ) -> torch.Tensor:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size: {batch_size} is not positive")
        if template is None:
            mask = self.scheduler.config.mask_token_id
            return torch.full((batch_size or 1, length), mask)
        templates = [template] if isinstance(template, str) else template
        if len({len(text) for text in templates}) != 1:
            raise ValueError(f"template: lengths {[len(text) for text in templates]} differ")
        tokens = torch.tensor([self.encode(text) for text in templates])
        if batch_size in (None, len(tokens)):
            return tokens
        if len(tokens) > 1:
            raise ValueError(f"batch_size: {batch_size} given with {len(tokens)} templates")
        return tokens.expand(batch_size, -1).clone()
