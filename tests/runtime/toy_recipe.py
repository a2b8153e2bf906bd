"""A toy distillation with the turns of a real one, run by path in the tests of the runtime.

Its fake denoiser and discriminator take `CRITIC` turns per student turn; the student descends
through both. Everything random is drawn from counters. Command lines:

    toy_recipe.py CONFIG key=value ...       through the launcher's entry
    toy_recipe.py --cases FILE               several cases in one (torchrun) process, JSON
"""

import json
import os
import sys
import time
from pathlib import Path

from diffdiv.runtime.config import Config, OptimizerConfig, RunConfig
from diffdiv.runtime.launch import leave_group, run_recipe_file

CRITIC = 3


class RecipeConfig(Config):
    run: RunConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    student_lr: float = 2e-3
    width: int = 16
    double: bool = False
    early: bool = False  # the student's samples are made in a turn before the critics'
    fault: str = ""  # what goes wrong, see _fault
    normaliser: str = "none"  # "global" or "local": mean of weights over all ranks or over one


def make(config: RecipeConfig, *, restore: bool = True, timeout: float = 10.0):
    """The run with its networks; nothing has happened yet."""
    import torch
    from torch import nn

    from diffdiv.runtime.run import Run

    run = Run(
        config.run,
        main="student",
        resolved=config.model_dump(mode="json"),
        timeout_seconds=timeout,
    )
    dtype = torch.float64 if config.double else torch.float32

    def mlp(inputs: int, outputs: int) -> nn.Module:
        w = config.width
        return nn.Sequential(nn.Linear(inputs, w), nn.Tanh(), nn.Linear(w, outputs)).to(dtype)

    shared = {"optimizer": config.optimizer}
    run.add("student", mlp(2, 2), lr=config.student_lr, ema_half_lives=(50, 500), **shared)
    run.add("fake", mlp(2, 2), lr=3e-3, **shared)
    run.add("disc", nn.Sequential(mlp(2, 4), nn.Dropout(0.0), mlp(4, 1)), lr=3e-3, **shared)
    if restore:
        run.restore()
    return run


def train(run, config: RecipeConfig, *, after_turn=None) -> None:
    """The loop; `after_turn(run)` is called after each critic or student turn."""
    import torch

    from diffdiv.core.noise import normal
    from diffdiv.core.tensor import sum_over_ranks

    dtype = torch.float64 if config.double else torch.float32
    nets = run.networks

    def draw(purpose, indices):
        return normal((2,), seed=config.run.seed, purpose=purpose, indices=indices, dtype=dtype)

    with run:
        while run.step < config.run.steps:
            samples = []
            if config.early:
                with run.turn("student"):
                    for indices in run.micro_batches("student"):
                        samples.append(nets["student"].trained(draw("z", indices)))
            while run.updates["fake"] < CRITIC * (run.step + 1):
                with run.turn("fake", "disc"):
                    for indices in run.micro_batches("fake"):
                        with torch.no_grad(), run.autocast():
                            x0 = nets["student"].module(draw("critic_z", indices))
                        real = draw("data", indices) * 0.3 + 1.0
                        with run.autocast():
                            noisy = x0 + draw("eps", indices)
                            fake_loss = (nets["fake"].trained(noisy) - x0).square().mean()
                            both = nets["disc"].trained(torch.cat([real, x0]))
                            a, b = both.float().chunk(2) if not config.double else both.chunk(2)
                        softplus = torch.nn.functional.softplus
                        disc_loss = softplus(-a).mean() + softplus(b).mean()
                        run.update("fake", _fault(config, run, fake_loss))
                        run.update("disc", disc_loss)
                        run.log({"fake_loss": fake_loss, "disc_loss": disc_loss})
                if after_turn is not None:
                    after_turn(run)
            with run.turn("student"):
                for indices in run.micro_batches("student"):
                    with run.autocast():
                        made = samples or [nets["student"].trained(draw("z", indices))]
                        x0 = made.pop()
                        logits = nets["disc"].module(x0)
                        pull = nets["fake"].module(x0 + draw("student_eps", indices)) - x0
                    weight = torch.sigmoid(logits.detach())
                    if config.normaliser != "none":
                        total = torch.stack([weight.sum(), weight.new_tensor(len(weight))])
                        if config.normaliser == "global":
                            total = sum_over_ranks(total)
                        weight = weight / (total[0] / total[1])
                    terms = weight * pull.square().mean(1, keepdim=True) - logits
                    loss = terms.mean()
                    run.update("student", loss)
                    run.log({"student_loss": loss})
            if after_turn is not None:
                after_turn(run)


def _fault(config: RecipeConfig, run, loss):
    """Inject the fault asked for at fake update 4, on the last rank."""
    last = run.rank == run.world_size - 1
    fault = os.environ.get("TOY_FAULT", config.fault)  # the next launch may do without
    if run.updates["fake"] != 4 or not last:
        return loss
    if fault == "nan":
        return loss * float("nan")
    if fault == "term":
        os.kill(os.getpid(), 15)
    if fault == "die":
        os.kill(os.getpid(), 9)
    if fault == "raise":
        raise KeyError("the fault asked for")
    if fault == "hang":
        time.sleep(600)
    return loss


def main(config: RecipeConfig) -> None:
    if processes := os.environ.get("TOY_LOCAL_WORLD_SIZE"):  # a machine as small as one likes
        os.environ["LOCAL_WORLD_SIZE"] = processes
    run = make(config)
    if processes:
        sys.stderr.write(f"{run.networks['student'].module[0].weight.device_mesh}\n")
    train(run, config)


def cases(path: Path) -> None:
    """Run several configurations in this process; what was raised goes to RUN/raised-RANK.json."""
    for values in json.loads(path.read_text()):
        config = RecipeConfig.model_validate(values)
        run = make(config)
        fake, seen = run.networks["fake"].module, {}

        def remember(run, fake=fake, seen=seen):
            seen.update({name: value.clone() for name, value in fake.state_dict().items()})

        try:
            train(run, config, after_turn=remember)
        except FloatingPointError as error:
            changed = any((seen[k] != v).any().item() for k, v in fake.state_dict().items())
            raised = {"message": str(error), "changed": changed, "updates": run.updates}
            (run.folder / f"raised-{run.rank}.json").write_text(json.dumps(raised))


def slow_saving(values: dict[str, object]) -> None:
    """A whole run whose saves take long, so that a kill often hits one."""
    from diffdiv.runtime import checkpoint

    sync = checkpoint._sync

    def slow_sync(path: Path) -> None:
        sync(path)
        time.sleep(0.005)

    checkpoint._sync = slow_sync
    config = RecipeConfig.model_validate(values)
    train(make(config), config)


if __name__ == "__main__":
    if sys.argv[1] == "--cases":
        cases(Path(sys.argv[2]))
        leave_group(0)
    else:
        run_recipe_file(__file__, sys.argv[1:])
