"""One training run: named networks that take turns, and the state to continue it bit for bit.

A run knows no method. A recipe adds its networks, and its loop says whose turn it is::

    with run:
        while run.step < steps:
            with run.turn("student"):
                for indices in run.micro_batches("student"):
                    ...
                    run.update("student", loss)

Main network: the one whose updates count as the steps of the run. Everything random is drawn from
(seed, purpose, global sample index), so counters and tensors are the whole state, and several
processes see the samples that one would see.
"""

import json
import os
import sys
import traceback
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from diffdiv.runtime import fsdp, resume
from diffdiv.runtime.checkpoint import CheckpointError, read_tensors, remove_leftovers, save_state
from diffdiv.runtime.config import OptimizerConfig, RunConfig, dump_yaml
from diffdiv.runtime.journal import Journal
from diffdiv.runtime.launch import INTERRUPTED
from diffdiv.runtime.machine import make_accelerator, versions
from diffdiv.runtime.network import Network, is_adapted, learning_rate_factor
from diffdiv.runtime.resume import Stateful
from diffdiv.runtime.signals import StopRequest

SKIPS_IN_A_ROW = 10
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Run:
    """See the module; a context manager around the training loop.

    Args:
        config: the ``run`` section.
        main: name of the main network.
        resolved: the whole configuration, JSON-clean; written to ``config.yaml`` and every state.
        timeout_seconds: how long a process waits for the others before it gives up.

    Raises:
        ValueError: if the batch does not divide among processes and micro-batches, or a tracker,
            the device, the folder or the kind of distribution cannot be had.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        main: str,
        resolved: Mapping[str, object],
        timeout_seconds: float = 600.0,
    ) -> None:
        self.config, self.main, self.folder = config, main, config.folder
        self._accelerator = make_accelerator(config, timeout_seconds=timeout_seconds)
        self.device = self._accelerator.device
        self.rank = self._accelerator.process_index
        self.world_size = self._accelerator.num_processes
        self.is_main = self.rank == 0
        for problem in config.problems(self.world_size):
            raise ValueError(problem)
        is_shared = config.sharding == "fsdp2" and self.world_size > 1
        self._mesh = fsdp.processes_mesh(self.device) if is_shared else None
        torch.manual_seed(config.seed)
        self.networks: dict[str, Network] = {}
        self.phase = "setting up"
        self._resolved = dict(resolved)
        self._attached: dict[str, Stateful] = {}
        self._turn: tuple[str, ...] = ()
        self._micro: tuple[int, int] | None = None  # number of this micro-batch, of how many
        self._boundary = 0  # updates of all networks when the main one last moved
        self._stop = StopRequest()
        self._closing = ExitStack()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(self.folder, rank=self.rank, device=self.device, steps=config.steps)
        self._restored = not any((self.folder / "state").glob("step-*"))
        if self.is_main:
            remove_leftovers(self.folder)

    def add(
        self,
        name: str,
        net: nn.Module,
        *,
        lr: float,
        optimizer: OptimizerConfig,
        ema_half_lives: tuple[int, ...] = (),
    ) -> nn.Module:
        """Add a network to train; what is frozen in it now stays frozen.

        Args:
            name: used in ``turn``, ``update`` and the names of saved files.
            net: moved to the run's device.
            lr: peak learning rate.
            optimizer: AdamW's settings.
            ema_half_lives: in images, one average each.

        Returns:
            The module to call in the network's own turn; elsewhere call ``net``.

        Raises:
            ValueError: if there is nothing to train, or the optimiser cannot be had.
        """
        if name in self.networks or not any(p.requires_grad for p in net.parameters()):
            raise ValueError(f"network {name!r} was already added, or has nothing to train")
        self.add_frozen(net)
        if fsdp.is_sharded(net):
            trained = net
        else:
            # Wrapped while exactly the trained parameters require gradients: DDP never
            # synchronises those that were frozen when it was built.
            trained = self._accelerator.prepare_model(net)
        # One scaler each: an overflow of one network must not change the scale of another.
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.config.precision == "fp16")
        self.networks[name] = Network(
            name,
            net,
            trained=trained,
            lr=lr,
            config=optimizer,
            ema_half_lives=ema_half_lives,
            scaler=scaler,
        )
        return self.networks[name].trained

    def add_frozen(self, net: nn.Module) -> None:
        """Move a network to the device; under ``fsdp2`` it is sharded, unless adapters lie on it.

        Call it on all ranks alike from now on: the forward of a sharded network is a collective.
        """
        net.to(self.device)
        if self._mesh is not None and not is_adapted(net):
            precision = self.config.precision
            dtype = None if precision == "fp32" else DTYPES[precision]
            fsdp.shard(net, self._mesh, dtype=dtype)

    def attach(self, name: str, state: Stateful) -> None:
        """Save and restore ``state`` with the run; it must be the same on all ranks."""
        self._attached[name] = state

    @property
    def updates(self) -> dict[str, int]:
        """Updates made so far, by network."""
        return {name: net.updates for name, net in self.networks.items()}

    @property
    def step(self) -> int:
        """Updates of the main network."""
        return self.networks[self.main].updates

    def every(self, interval: int | None) -> bool:
        """Whether the step is a multiple of ``interval``; never for None."""
        return interval is not None and self.step % interval == 0

    def ema_weights(self, name: str, half_life: int) -> dict[str, Tensor]:
        """Averaged weights by plain name; what is not averaged comes from the live module.

        Of a sharded network on rank 0 alone, and then a collective.
        """
        net = self.networks[name]
        return fsdp.gathered({**net.module.state_dict(), **net.ema[half_life].weights})

    @contextmanager
    def averaged(self, name: str, half_life: int) -> Iterator[nn.Module]:
        """The network to call, on all ranks alike, with averaged weights; between turns."""
        with torch.no_grad(), self.networks[name].averaged(half_life) as net:
            yield net

    def log(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Average scalars over micro-batches, steps and ranks into the next line of metrics."""
        self._journal.add(metrics)

    def event(self, kind: str, message: str) -> None:
        """Append a line to ``events.jsonl``, from rank 0."""
        if self.is_main:
            self._journal.event(kind, message)

    def autocast(self) -> torch.autocast:
        """Autocast in the run's precision; it does nothing in fp32."""
        precision = self.config.precision
        return torch.autocast(self.device.type, DTYPES[precision], enabled=precision != "fp32")

    @contextmanager
    def turn(self, *names: str) -> Iterator[None]:
        """Let exactly these networks require gradients; then drop all gradients and keep house."""
        if self._turn or not names or set(names) - set(self.networks):
            raise ValueError(f"turn{names}: nested, or not among {', '.join(self.networks)}")
        self._turn, step = names, self.step
        for net in self.networks.values():
            net.require_gradients(net.name in names)
        try:
            yield
        finally:
            self._turn = ()
            for net in self.networks.values():
                net.drop_gradients()
        if self.step > step:
            self._after_main_update()
        self._stop_if_asked()

    def micro_batches(self, name: str) -> Generator[list[int], None, None]:
        """This rank's global sample indices for the next update, one list per micro-batch.

        Update ``k`` sees the samples ``k * batch_size + 0 ... batch_size - 1``, however many
        processes and micro-batches share them.
        """
        count, net = self.config.accumulation, self.networks[name]
        size = self.config.batch_size // (count * self.world_size)
        first = net.updates * self.config.batch_size + self.rank * size
        wrappers = [self.networks[other].trained for other in self._turn]
        self.phase = f"{name} update {net.updates}, {self.main}_step {self.step}"
        try:
            for micro in range(count):
                self._micro = (micro, count)
                if self.world_size > 1:
                    self._journal.beat(self.phase)
                with ExitStack() as stack:
                    for wrapper in wrappers if micro + 1 < count else ():
                        stack.enter_context(self._accelerator.no_sync(wrapper))
                    start = first + micro * self.world_size * size
                    yield list(range(start, start + size))
        finally:
            self._micro = None

    def update(self, name: str, loss: Tensor) -> None:
        """Backward; after the last micro-batch also clip, step, average and count.

        Args:
            name: a network of the present turn.
            loss: scalar, a mean over this rank's micro-batch.

        Raises:
            FloatingPointError: on all ranks and before any weight changes, if a loss or the
                gradient is not finite (policy "stop", or too many skips in a row).
        """
        if name not in self._turn or self._micro is None:
            raise ValueError(f"update({name!r}) belongs in its turn and in micro_batches")
        net, (micro, count) = self.networks[name], self._micro
        net.backward(loss, share=count)
        if micro + 1 < count:
            return
        norm = net.gradient_norm()
        reason = net.not_finite(norm, rank=self.rank, world_size=self.world_size)
        if reason is None:
            progress = self.step / self.config.steps
            lr = net.lr * learning_rate_factor(net.config, updates=net.updates, progress=progress)
            net.step(norm, lr=lr, images=self.config.batch_size)
            net.drop_gradients()  # memory for the turn's other networks
            net.skips = 0
            self.log({f"grad_norm/{name}": norm, f"lr/{name}": lr})
        else:
            self._skip(net, reason)
        net.scaler.update()
        net.updates += 1

    def _skip(self, net: Network, reason: str) -> None:
        """Leave the weights alone, or raise, after a loss or gradient that was not finite."""
        net.skips += 1
        message = f"{net.name} update {net.updates}, {self.main}_step {self.step}: {reason}"
        # In fp16 an overflow is how the scaler finds its scale.
        allowed = self.config.non_finite == "skip" or net.scaler.is_enabled()
        if not allowed or net.skips >= SKIPS_IN_A_ROW:
            last = json.dumps(self._journal.last_line)
            raise FloatingPointError(f"{message} ({net.skips} in a row; last metrics: {last})")
        self.event("skip", message)

    def _after_main_update(self) -> None:
        config, self._boundary = self.config, sum(self.updates.values())
        if self.every(config.log_every):
            key = f"{self.main}_step"
            means = self._journal.write_metrics(key, self.step, batch_size=config.batch_size)
            self._accelerator.log(means, step=self.step)
        if self.every(config.save_every):
            self.save()

    def _stop_if_asked(self) -> None:
        """Between two updates: leave with a saved state if any rank was told to stop."""
        if not resume.any_rank(self._stop.is_made, self.device):
            return
        self.save()
        if self.world_size > 1:
            self._closing.pop_all()
            self._stop.ignore()
        self.event("interrupted", f"told to stop, state saved after {self.phase}")
        raise SystemExit(INTERRUPTED)

    def save(self) -> Path:
        """Save a state now, on all ranks together, unless this very state is already saved.

        Returns:
            Its folder.

        Raises:
            CheckpointError: on all ranks, if it could not be written.
        """
        total = sum(self.updates.values())
        name = f"step-{self.step:08d}" + (f"-u{total:08d}" if total > self._boundary else "")
        nets, attached = self.networks.values(), self._attached
        names, pending = self._journal.pending()
        tensors: dict[str, Mapping[str, Tensor]] = {
            "ranks": resume.gather_ranks(pending, self.device),
            **{f"attached.{key}": owner.state_dict() for key, owner in attached.items()},
        }
        for net in nets:
            tensors |= net.tensors()
        values = {
            "config": self._resolved,
            "networks": {net.name: net.values() for net in nets},
            "attached": sorted(attached),
            "boundary": self._boundary,
            "metrics": names,
            "seconds": self._journal.elapsed(),
        }
        facts = {"step": self.step, "world_size": self.world_size, **versions()}
        path, failure = self.folder / "state" / name, None
        if self.is_main and not path.exists():
            keep = self.config.keep_states
            try:
                save_state(path, tensors=tensors, values=values, facts=facts, keep=keep)
            except CheckpointError as error:
                failure = error
        # A barrier that carries the outcome, so that all ranks stop together.
        if resume.any_rank(failure is not None, self.device):
            raise failure or CheckpointError("rank 0 could not save the state")
        return path

    def restore(self) -> bool:
        """Continue from the newest valid state, if there is any; call it after all ``add``.

        Returns:
            Whether a state was restored.

        Raises:
            CheckpointError: if there are states but no valid one, or the newest was made with
                other networks or another configuration.
        """
        state, damaged = resume.choose_state(self.folder, is_main=self.is_main, device=self.device)
        for reason in damaged:
            self.event("damaged", reason)
        if state is not None:
            self._load(state)
            self.event("resume", f"from {state.name}")
        self._restored = True
        return state is not None

    def _load(self, state: Path) -> None:
        saved = json.loads((state / "state.json").read_bytes())
        resume.check_config(saved["config"], self._resolved)
        have = sorted(self.networks), sorted(self._attached)
        if (sorted(saved["networks"]), saved["attached"]) != have:
            raise CheckpointError(f"{state.name} holds other networks or statistics than {have}")
        for net in self.networks.values():
            net.load(state)
        for key, owner in self._attached.items():
            owner.load_state_dict(read_tensors(state, f"attached.{key}"))
        self._boundary, self._journal.seconds = saved["boundary"], saved["seconds"]
        ranks = read_tensors(state, "ranks")
        if (before := len(ranks["cpu"])) == self.world_size:
            resume.restore_rng(ranks, rank=self.rank, device=self.device)
            self._journal.load(saved["metrics"], ranks["metrics"][self.rank])
        else:
            message = f"saved by {before} processes, continued by {self.world_size}"
            self.event("warning", f"{message}: equal only up to rounding")

    def __enter__(self) -> Self:
        if not self._restored:
            raise CheckpointError(f"{self.folder} holds states: call restore(), or choose another")
        if self.is_main:
            self._journal.forget_after(f"{self.main}_step", self.step)
            dump_yaml(self._resolved, self.folder / "config.yaml")
        if self.config.trackers:
            self._accelerator.init_trackers("diffdiv")
            for tracker in self._accelerator.trackers:
                self._closing.callback(tracker.finish)
        self._journal.start(self.step)
        self._closing.callback(self._journal.bar.stop)
        self._stop.listen(self._closing)
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        with self._closing:
            if error is None:
                self.save()
            elif isinstance(error, Exception):
                self._report(error)

    def _report(self, error: Exception) -> None:
        """Say which rank failed where; leave at once if the other ranks cannot know of it."""
        where = f"rank {self.rank} of {self.world_size} in {self.phase}"
        others = self._journal.other_ranks()
        message = "; ".join([f"{where}: {type(error).__name__}: {error}", *others])
        with suppress(OSError):  # a full disk must not hide what went wrong
            self._journal.event("error", message)
        if self.world_size > 1 and not isinstance(error, FloatingPointError | CheckpointError):
            traceback.print_exception(error)
            sys.stderr.write(f"{message}\n")  # flushed line by line
            os._exit(1)  # closing a process group whose other ranks wait elsewhere may hang
