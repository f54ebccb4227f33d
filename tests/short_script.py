"""A script whose updates need no compilation: what a study sees of a run, without waiting for training."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax.numpy as jnp  # noqa: E402

from tests.states import make_state  # noqa: E402
from utils.runs.flags import RunArgs  # noqa: E402
from utils.runs.launch import run_script  # noqa: E402
from utils.runs.run import Run  # noqa: E402


class Saveable:
    saveable = True


@dataclass
class Args(RunArgs):
    """Flags of a run that waits."""

    num_envs: int = 1
    num_steps: int = 10
    pause: float = 0.05
    """seconds of an update"""
    gate: str = ""
    """a file without which it does not begin its second half"""
    level: float = 0.0
    """what is added to its returns, which count its updates"""
    diverging: float = 10.0
    """level from which its loss is infinite in the second half"""
    failing: str = ""
    """a file whose first letter is taken by each process, which fails in its third update, until the file is empty"""


def main(args):
    run = Run(args, "short", 10)
    letters = Path(args.failing).read_text() if args.failing else ""
    if letters:
        Path(args.failing).write_text(letters[1:])
    first = run.iteration
    with run:
        state = run.restore(make_state(run.iteration), Saveable)
        for k in range(run.iteration, run.num_iterations):
            time.sleep(args.pause)
            while args.gate and k == run.num_iterations // 2 and not Path(args.gate).exists():
                time.sleep(0.05)
            if letters and k - first == 2:
                raise OSError("it was to fail")
            value = jnp.asarray(float(k) + args.level)
            names = ("episodic_return", "episodic_length", "episodes", "learning_rate")
            state = state._replace(iteration=jnp.asarray(k + 1))
            infinite = args.level >= args.diverging and k >= run.num_iterations // 2
            loss = jnp.asarray(jnp.inf if infinite else 0.0)
            run.log(state, {f"charts/{name}": value + 1 for name in names} | {"losses/policy_loss": loss})


if __name__ == "__main__":
    run_script(main, Args)
