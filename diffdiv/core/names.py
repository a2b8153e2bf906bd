"""Names that configurations may use, without importing torch (config errors must be instant)."""

import difflib

DIVERGENCE_ALIASES: dict[str, tuple[str, ...]] = {
    "reverse_kl": ("rkl",),
    "softened_reverse_kl": ("sf", "srkl"),
    "jensen_shannon": ("js",),
    "squared_hellinger": ("sh", "hellinger"),
    "forward_kl": ("kl", "fkl"),
    "jeffreys": ("jf",),
    "neyman_chi2": ("neyman",),
    "pearson_chi2": ("pearson",),
}


def divergence_name(name: str) -> str:
    """Full name of a divergence given its name or alias.

    Raises:
        ValueError: naming what is allowed and the nearest name.
    """
    full = {key: n for n, aliases in DIVERGENCE_ALIASES.items() for key in (n, *aliases)}
    if name in full:
        return full[name]
    near = difflib.get_close_matches(name, full, n=1, cutoff=0.4)
    hint = f" (did you mean {full[near[0]]!r}?)" if near else ""
    raise ValueError(f"{name!r} is not one of {', '.join(DIVERGENCE_ALIASES)}{hint}")
