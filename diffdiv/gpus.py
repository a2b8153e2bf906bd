"""Graphics cards by name or memory, and what a plan assumes of them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A card: its name, memory in bytes, and dense bfloat16 matrix rate in FLOP/s if known."""

    name: str
    bytes: int
    rate: float | None = None


#: name -> GiB, vendor's peak of dense bfloat16 with float32 accumulation, TFLOP/s
_CARDS: Mapping[str, tuple[int, float]] = {
    "3090": (24, 71),
    "4080": (16, 97.5),
    "4090": (24, 165),
    "5090": (32, 209.5),
    "A10": (24, 125),
    "L4": (24, 121),
    "L40S": (48, 362),
    "A100-40": (40, 312),
    "A100-80": (80, 312),
    "H100": (80, 989),
    "H200": (141, 989),
}


def parse_gpu(text: str) -> Gpu:
    """A card by name ("4090", "A100-80", "RTX 3090") or by memory ("24GB", "24 GiB": both 2^30).

    Raises:
        ValueError: for anything else.
    """
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)\s*Gi?B", text.strip(), re.IGNORECASE):
        return Gpu(f"a {size[1]} GB card", int(float(size[1]) * GIB))
    name = re.sub(r"nvidia|rtx|\s", "", text, flags=re.IGNORECASE).upper()
    if name not in _CARDS:
        known = ", ".join(_CARDS)
        raise ValueError(f"gpu {text!r} is neither a memory size ('24GB') nor one of {known}")
    gib, tflops = _CARDS[name]
    return Gpu(name, gib * GIB, tflops * 1e12)


@dataclass(frozen=True)
class Assumptions:
    """What is assumed, not computed; measure it once on the card in question.

    Attributes:
        fixed_bytes: context and workspaces.
        fragmentation: share of the peak that the allocator loses.
        utilisation: share of the card's peak rate that is reached.
    """

    fixed_bytes: int = GIB
    fragmentation: float = 0.08
    utilisation: float = 0.4

    def needed(self, peak: int) -> int:
        """Bytes a card must have for this peak."""
        return int(peak * (1 + self.fragmentation)) + self.fixed_bytes
