"""What a run asks of the machine: processes and a device, versions, memory."""

import datetime
import platform
import resource
import sys

import accelerate  # type: ignore[import-untyped]  # ships no types
import torch
from accelerate.utils import (  # type: ignore[import-untyped]
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    parse_flag_from_env,
)

from diffdiv.runtime.config import RunConfig

# Each of these ties an Accelerator to one network; asked for on a CPU they are silently ignored.
REFUSED = ("DEEPSPEED", "MEGATRON_LM", "FSDP")


def make_accelerator(config: RunConfig, *, timeout_seconds: float) -> accelerate.Accelerator:
    """Processes, device and trackers through accelerate; precision is left to the run.

    Raises:
        ValueError: if the device is missing or the distribution is not data parallelism.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device: 'cuda' was asked for, but torch finds no CUDA device")
    for name in REFUSED:
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise ValueError(
                f"several networks that take turns cannot train under {name}; "
                "choose plain multi-GPU or multi-CPU in `accelerate config` "
                "(weights spread over processes: run.sharding=fsdp2)"
            )
    timeout = InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=timeout_seconds))
    return accelerate.Accelerator(
        cpu=config.device == "cpu" or not torch.cuda.is_available(),
        mixed_precision="no",  # prepare_model would wrap forward and cast its outputs
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(str(config.folder), f"{config.folder}/trackers"),
        kwargs_handlers=[timeout, DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def versions() -> dict[str, object]:
    """Where bitwise resuming is promised: the same versions and the same number of threads."""
    names = {"python": platform.python_version(), "torch": torch.__version__}
    names["accelerate"] = accelerate.__version__
    return {"versions": names, "threads": torch.get_num_threads()}


def memory_mib(device: torch.device) -> float:
    """Peak memory in MiB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
