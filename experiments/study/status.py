"""What a study says of itself on the terminal."""

import shutil
import sys
import time
from pathlib import Path

from tqdm import tqdm

from experiments.study.grid import PlannedRun, Progress, rates, seconds_left, state_of

REDRAWN_SECONDS = 2.0  # between two tables on a terminal
PLAIN_SECONDS = 60.0  # between two where the output is not one
KINDS = ("finished", "running", "stopped", "failed", "left")


class Progresses:
    """The states of all runs, read again only where they may have changed."""

    def __init__(self, logdir: Path, runs: list[PlannedRun]):
        self.logdir, self.runs, self.states = logdir, runs, {}
        self.read()

    def read(self) -> dict[str, Progress]:
        """The states by the names of the runs."""
        for run in self.runs:
            if run.name not in self.states or self.states[run.name].kind != "finished":
                self.states[run.name] = state_of(self.logdir, run)
        return self.states


def summary(runs: list[PlannedRun], states: dict[str, Progress], together: int | None = None) -> str:
    """How many runs are where, in a line; and the time left, with so many runs at a time (if not given, those now running)."""
    count = {kind: sum(states[run.name].kind == kind for run in runs) for kind in KINDS}
    line = f"{count['finished']} of {len(runs)} runs finished, " + ", ".join(f"{count[k]} {k}" for k in KINDS[1:])
    together = together or count["running"]
    left = seconds_left(runs, states, rates(runs, states))
    if left and together:
        line += f"; about {tqdm.format_interval(int(left / min(together, len(runs) - count['finished'])))} left"
    return line


def running(runs: list[PlannedRun], states: dict[str, Progress]) -> list[str]:
    """A line for each run at which a process is at work."""
    lines = []
    for run in runs:
        state = states[run.name]
        if state.kind == "running":
            rate = f"{state.step / state.elapsed:,.0f} steps/s" if state.elapsed else "compiling"
            reached = "" if state.episodic_return is None else f", return {state.episodic_return:.1f}"
            lines.append(f"  {state.step / run.steps:4.0%}  {run.name}  {rate}{reached}")
    return lines


def table(runs: list[PlannedRun], states: dict[str, Progress]) -> list[str]:
    """Finished of all seeds for each environment and script, with a mark where a run has failed."""
    scripts, env_ids = list(dict.fromkeys(run.script for run in runs)), list(dict.fromkeys(run.env_id for run in runs))

    def cell(env_id, script):
        of = [states[run.name] for run in runs if (run.env_id, run.script) == (env_id, script)]
        done = sum(state.kind == "finished" for state in of)
        at_work, failed = (sum(state.kind == kind for state in of) for kind in ("running", "failed"))
        return f"{done}/{len(of)}" + f" +{at_work}" * (at_work > 0) + f" {failed} FAILED" * (failed > 0) if of else "-"

    rows = [["", *scripts], *([env_id, *(cell(env_id, script) for script in scripts)] for env_id in env_ids)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def failures(runs: list[PlannedRun], states: dict[str, Progress]) -> list[str]:
    """A line for each run that has failed, with what it said."""
    return [f"failed: {run.name}: {states[run.name].error}" for run in runs if states[run.name].kind == "failed"]


class Live:
    """Lines that stay at the end of what is printed, on a terminal; elsewhere a line now and then."""

    def __init__(self):
        self.interactive, self.drawn, self.last = sys.stdout.isatty(), 0, -PLAIN_SECONDS

    def due(self) -> bool:
        """Whether it is time to show what has changed."""
        return time.monotonic() - self.last >= (REDRAWN_SECONDS if self.interactive else PLAIN_SECONDS)

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        self._erase()
        print(line, flush=True)

    def show(self, lines: list[str]) -> None:
        """Shows the lines, in the place of those before."""
        self.last = time.monotonic()
        self._erase()
        if self.interactive:
            width, height = shutil.get_terminal_size()
            lines = [line[: width - 1] for line in lines[: height - 2]]
            self.drawn = len(lines)
        print("\n".join(lines), flush=True)

    def _erase(self) -> None:
        if self.drawn:
            print(f"\x1b[{self.drawn}F\x1b[J", end="")
            self.drawn = 0
