"""A network that a run trains: its parameters, optimiser, averages, and one update of all that."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from diffdiv.core.tensor import sum_over_ranks
from diffdiv.runtime import fsdp
from diffdiv.runtime.checkpoint import read_tensors
from diffdiv.runtime.config import OptimizerConfig
from diffdiv.runtime.ema import EMA
from diffdiv.runtime.optimizer import load_moments, make_optimizer, moments, set_learning_rate


def learning_rate_factor(config: OptimizerConfig, *, updates: int, progress: float) -> float:
    """Share of the peak learning rate for the next update, a pure function of counters.

    Linear warm-up over the network's own ``warmup_steps`` updates; linear decay to 0 over the last
    ``decay_fraction`` of the run (``progress`` in [0, 1) is that of the main network), so that
    networks of every rhythm end together.
    """
    warmup = min(1.0, (updates + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    left = (1 - progress) / config.decay_fraction if config.decay_fraction else 1.0
    return warmup * max(0.0, min(1.0, left))


def is_adapted(net: nn.Module) -> bool:
    """Whether low-rank adapters lie on ``net``, or are all of it."""
    return any("lora_A" in name.split(".") for name, _ in net.named_parameters())


class Network:
    """What belongs to one trained network of a run.

    ``module`` is the network as given: call it outside its own turn, take weights from it.
    ``trained`` is what its own turn calls: the DDP wrapper, or the module itself. Where the module
    is sharded, so are gradients, moments and averages; files always hold whole tensors.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        *,
        trained: nn.Module,
        lr: float,
        config: OptimizerConfig,
        ema_half_lives: Sequence[int],
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self.name, self.module, self.trained = name, module, trained
        self.lr, self.config = lr, config
        self.scaler = scaler or torch.amp.GradScaler(enabled=False)  # one that does nothing
        self.parameters = {k: v for k, v in module.named_parameters() if v.requires_grad}
        self.optimizer = make_optimizer(self.parameters.values(), lr, config)
        self.ema = {half: EMA(self.parameters, half_life=half) for half in ema_half_lives}
        self.updates = 0
        self.skips = 0  # in a row
        self._losses_finite: list[Tensor] = []  # of the present update

    def backward(self, loss: Tensor, *, share: int) -> None:
        """Add the gradient of ``loss / share``."""
        self._losses_finite.append(torch.isfinite(loss.detach()).all())
        self.scaler.scale(loss / share).backward()

    def gradient_norm(self) -> Tensor:
        """Global norm of the gradient, which backward has averaged over ranks."""
        self.scaler.unscale_(self.optimizer)
        grads = [value.grad for value in self.parameters.values() if value.grad is not None]
        if not grads:
            raise ValueError(f"the loss given to update({self.name!r}) reaches none of its weights")
        return fsdp.whole(torch.nn.utils.get_total_norm(grads))

    def not_finite(self, norm: Tensor, *, rank: int, world_size: int) -> str | None:
        """None if the losses of all ranks and the norm are finite, else what was not."""
        flags = torch.zeros(world_size + 1, device=norm.device)
        flags[rank] = ~torch.stack(self._losses_finite).all()
        flags[-1] = ~torch.isfinite(norm)
        self._losses_finite.clear()
        *losses, gradient = sum_over_ranks(flags).tolist()
        if ranks := ", ".join(str(number) for number, bad in enumerate(losses) if bad):
            return f"the loss of rank {ranks} is not finite"
        return "the gradient is not finite" if gradient else None

    def step(self, norm: Tensor, *, lr: float, images: int) -> None:
        """Clip by the norm already known, step, average."""
        if self.config.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.clip, norm)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        for ema in self.ema.values():
            ema.update(self.parameters, images=images, images_seen=(self.updates + 1) * images)

    def require_gradients(self, claim: bool) -> None:
        """Set the flag of every trained parameter."""
        fsdp.reshard(self.module)  # on what is gathered the flag would be lost
        for parameter in self.parameters.values():
            parameter.requires_grad_(claim)

    def drop_gradients(self) -> None:
        """Free the gradients of every trained parameter."""
        for parameter in self.parameters.values():
            parameter.grad = None

    @contextmanager
    def averaged(self, half_life: int) -> Iterator[nn.Module]:
        """The module with averaged weights in place of its own, on all ranks together."""
        parts = {name: fsdp.local(value.detach()) for name, value in self.parameters.items()}
        own = {name: part.to("cpu", copy=True) for name, part in parts.items()}
        fsdp.reshard(self.module)
        try:
            for name, part in parts.items():
                part.copy_(fsdp.local(self.ema[half_life].weights[name]))
            yield self.module
        finally:
            for name, part in parts.items():
                part.copy_(own[name])
            fsdp.reshard(self.module)

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """Everything to save, by file stem, on rank 0; a collective if the module is sharded.

        AdamW's settings are those of the configuration, and its learning rate that of the counters.
        """
        averages = {f"{self.name}.ema-{half}": ema.weights for half, ema in self.ema.items()}
        weights = self.module.state_dict()
        state = moments(self.optimizer, self.parameters)
        files = {self.name: weights, f"{self.name}.optimizer": state, **averages}
        return {stem: fsdp.gathered(tensors) for stem, tensors in files.items()}

    def values(self) -> dict[str, object]:
        """Counters to save as JSON."""
        scaler = self.scaler.state_dict()
        return {"updates": self.updates, "skips": self.skips, "scaler": scaler}

    def load(self, state: Path) -> None:
        """Take over a saved state; its configuration was compared before."""
        saved = json.loads((state / "state.json").read_bytes())["networks"][self.name]
        present = self.module.state_dict()
        weights = read_tensors(state, self.name)
        self.module.load_state_dict({k: fsdp.like(v, present[k]) for k, v in weights.items()})
        for half, ema in self.ema.items():
            ema.load(read_tensors(state, f"{self.name}.ema-{half}"))
        state_dict = read_tensors(state, f"{self.name}.optimizer")
        load_moments(self.optimizer, self.parameters, state_dict)
        self.scaler.load_state_dict(saved["scaler"])
        self.updates, self.skips = saved["updates"], saved["skips"]
