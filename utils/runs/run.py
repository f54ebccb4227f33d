"""A run: everything a script does around its algorithm. It starts or resumes, logs, saves, and always shuts down cleanly.

    run = Run(args, "ppo", steps_per_iteration)
    env = make_env(args, run.iteration)
    ...
    with run:
        state = run.restore(init_state(...), env, agent)
        for _ in range(run.iteration, run.num_iterations):
            state, metrics = learn(*rollout(state))
            run.log(state, metrics)

The state may be donated to the next iteration as soon as `run.log` returns.
"""

import contextlib
import json
import math
import os
import shlex
import shutil
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from envs.protocol import EpisodeStats
from envs.registry import GRIDWORLD, file_name
from utils.devices import distribute, on_one_device
from utils.evaluation.camera import Camera
from utils.files import write_json
from utils.histograms import statistics
from utils.runs import folder
from utils.runs.checkpoints import Checkpoints, Damaged, Trees, begin_writing, find, load
from utils.runs.flags import RunArgs, UsageError, own_defaults, require
from utils.runs.launch import FolderLost, NotFinite, RunIsFinished, describe_device, one_line
from utils.runs.logs import METRICS, Logger, cut_back, final_return, last_step
from utils.runs.signals import Interrupted, Signals
from utils.runs.stored_flags import changed_flags, check_continued, slug, stretched, to_store
from utils.runs.wandb_run import WandbRun

BEFORE = ".before"  # suffix of the metrics file of an attempt that left no checkpoint
WANDB_LONGEST = 128  # characters of a group
REFILLED = "replay"  # the state field that is saved only with --save-replay


@jax.jit
def _all_finite(trees: list[Any]) -> jax.Array:
    numbers = [[x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)] for tree in trees]
    return jnp.array([jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in tree])) for tree in numbers])


def finite_parts(params: Any, opt_state: Any) -> tuple[list[str], jax.Array]:
    """Return a name for each network's parameters and for the optimizer state, and whether all values of each are finite."""
    names = [f"the parameters of {name}" for name in params._fields] + ["the optimizer state"]
    return names, _all_finite([*params, opt_state])


def restarted(env_state: Any) -> Any:
    """Return the state of environments that start anew in a resumed run: see `EpisodeStats.to_count`."""
    hide = lambda x: x._replace(counts=jnp.zeros_like(x.counts)) if isinstance(x, EpisodeStats) else x  # noqa: E731
    return jax.tree.map(hide, env_state, is_leaf=lambda x: isinstance(x, EpisodeStats))


track_params = jax.jit(lambda params: statistics(params, "params/"))


class Run:
    """One run of a script, new or resumed.

    A context manager. On exit, whether the run ended, failed or was stopped, it writes everything to disk and prints where the
    results are and how to resume. W&B gets the exit code once, after the last step that can fail.

    Args:
        args: flags.
        algorithm: name of the algorithm; part of the default run name.
        steps_per_iteration: environment steps per update.

    Attributes:
        iteration: updates done so far.
        num_iterations: updates of the full run.
        folder: the run's folder.

    Raises:
        UsageError: the run exists but --resume does not ask to resume it; these flags or this code cannot resume it; or another
            process is using it.
        RunIsFinished: the run is already finished.
    """

    def __init__(self, args: RunArgs, algorithm: str, steps_per_iteration: int):
        self.args, self.algorithm, self.steps_per_iteration = args, algorithm, steps_per_iteration
        self.num_iterations = args.total_timesteps // steps_per_iteration
        self.saves_replay = getattr(args, "save_replay", False)  # not every script has a replay buffer
        self.iteration, self.saved, self.damaged, self.said = 0, None, {}, []
        self.lock, self.made, self.complete, self.diverged, self.camera = None, False, False, None, None
        self.folder, named = folder.locate(args, algorithm)
        self.checkpoints = Checkpoints(self.folder / folder.CHECKPOINTS, args.keep_checkpoints)
        self.new = folder.is_new(self.folder) or (args.resume == "never" and args.run_name is None)
        if not self.new:
            require(
                args.resume != "never",
                f"--run-name {args.run_name}: {self.folder} already exists; resume with --resume auto, or choose another name",
            )
            try:
                self._find(named)
            except BaseException:
                if self.lock is not None:
                    self.lock.release()
                raise

    def _find(self, named: Path | None) -> None:
        """Find the checkpoint to resume from, and check that the run may be resumed."""
        is_run = (self.folder / folder.RECORD).exists() or self.checkpoints.folder.exists()
        require(is_run, f"{self.folder}: not empty, and not a run folder; choose another --run-name")
        self.lock = folder.claim(self.folder)
        if named is None:
            self.saved, self.damaged = self.checkpoints.newest()
            self.said += [
                f"*** checkpoint {path} is damaged ({what}); using the one before it ***" for path, what in self.damaged.items()
            ]
        else:
            later = [path.name for path in self.checkpoints.steps().values() if int(path.name) > int(named.name)]
            require(not later, f"--resume {named}: the run has later checkpoints ({', '.join(later)}); move them away first")
            try:
                self.saved = find(named)
            except Damaged as error:
                raise UsageError(f"--resume {named}: damaged ({error}); pass the run folder instead") from None
        self.record = folder.read_record(self.folder)
        if self.record is None:
            what = f"{self.folder / folder.RECORD} is missing or damaged"
            require(self.saved is not None, f"{what}, and there is no checkpoint; choose another --run-name")
            self.record = folder.lasting(self.saved.progress) | {"sittings": []}
            self.said.append(f"*** {what}; rebuilt from the checkpoint ***")
        stored = self.saved.progress if self.saved else self.record
        remedy = "choose another --run-name" if self.args.run_name else "leave out --resume, which starts a new run"
        check_continued(self.args, stored["flags"], f"run {self.record['name']}", remedy)
        before = json.dumps(self.record)
        self.record["flags"]["total_timesteps"] = stored["flags"]["total_timesteps"]
        if (extended := stored.get("extended_from", [])) != self.record.get("extended_from", []):
            self.record["extended_from"] = extended
        done = self.record.get("finished_at", 0)
        if self.saved:
            self.iteration = stored["iteration"]
            done = max(done, stored["step"])
        if done >= self.num_iterations * self.steps_per_iteration:
            self.record["finished_at"] = done
            if json.dumps(self.record) != before:  # the process died after its last checkpoint
                write_json(self.folder / folder.RECORD, self.record)
            raise RunIsFinished(f"{self.folder}: already finished after {done:,} steps")
        if self.saved is None:
            gone = done or self.record["flags"].get("keep_checkpoints") == 0
            require(not gone, f"{self.folder}: no checkpoint to resume from; choose another --run-name")
            self.said.append(f"no checkpoint yet; starting from scratch (the old {METRICS} becomes {METRICS}{BEFORE})")
        else:
            self.said += [line for line in (stretched(self.args, stored["flags"], stored["step"]),) if line]
            now, before = folder.versions(), stored["versions"]
            both = [name for name in now if name in before]  # optional packages may have been added or removed
            changed = [f"{name} {before[name]} -> {now[name]}" for name in both if before[name] != now[name]]
            if (devices := stored["flags"].get("num_devices", 1)) != self.args.num_devices:
                changed.append(f"devices {devices} -> {self.args.num_devices}")
            if changed:
                self.said.append(f"*** changed since the checkpoint: {', '.join(changed)}; results may not be bit-exact ***")

    def __enter__(self) -> "Run":
        self.signals = Signals()
        self.signals.raise_at_once()
        self.wandb, self.logger, self.logged = None, None, False
        self.busy = threading.Lock()  # held while the main thread writes
        try:
            self._begin()
        except BaseException:
            if self.wandb is not None:
                self.wandb.finish(1)
            if self.made:
                shutil.rmtree(self.folder, ignore_errors=True)
            self.signals.restore()
            raise
        return self

    def _begin(self) -> None:
        if self.new:
            self._make_folder()
        name, flags = self.record["name"], to_store(self.args)
        step = self.iteration * self.steps_per_iteration
        known = self.record.get("wandb")
        if known and (original := folder.copied_from(known, self.folder)):
            self.said.append(f"*** copied from {original}: with --track, this copy gets a W&B run of its own ***")
            known, name = None, self.folder.name
            self.record |= {"wandb": None, "name": name}
        if known and self.record["flags"]["track"]:
            known["logged_to"] = max(known["logged_to"], last_step(self.folder))
        # a run that is extended has its old length until its first checkpoint
        before = self.saved.progress["flags"] if self.saved else flags
        self.record["flags"] = flags | {"total_timesteps": before["total_timesteps"]}
        self.record["sittings"].append(folder.describe_sitting(step))
        write_json(self.folder / folder.RECORD, self.record)
        self.checkpoints.clean(self.damaged)
        if self.saved is None and not self.new and (self.folder / METRICS).exists():
            self._set_aside(self.folder / METRICS)
        rows = cut_back(self.folder, step)
        if len(rows) < self.iteration:
            self.said.append(f"*** {self.folder / METRICS}: {self.iteration - len(rows)} earlier rows are missing ***")
        progress = self.saved.progress["log"] if self.saved else None
        self.logger = Logger(self.args, self.folder, self.steps_per_iteration, self.iteration, progress, self.new)
        self.logger.describe(flags)
        if self.args.track:
            config, group = self._wandb_config(flags), "__".join([file_name(self.args.env_id), self.algorithm])
            group = "__".join(filter(None, [group, slug(changed_flags(self.args))]))[:WANDB_LONGEST]
            self.wandb = self.logger.wandb = WandbRun(self.args, name, group, config, known, self.logger.say)
            self._note_wandb()
            write_json(self.folder / folder.RECORD, self.record)
            self.wandb.send_missing(rows)
            if self.wandb.saves_code:
                self.wandb.save_files("code", folder.code_files(self.args))
        own = own_defaults(self.args)
        if own:
            self.said.append(f"defaults for environments like {self.args.env_id}: {', '.join(own)}")
        for line in self.said:
            print(line)
        left = self.num_iterations - self.iteration
        goes_on = f" resumes from step {step:,}" if self.saved else ""
        steps = self.num_iterations * self.steps_per_iteration
        print(f"{name}{goes_on}: {steps - step:,} steps in {left:,} updates\n{describe_device()}\ncompiling ...", flush=True)
        self.logger.start()
        self.next_save = time.monotonic() + self.args.save_every
        self.signals.watch(self._first_signal)

    def _set_aside(self, path: Path) -> None:
        """Rename the metrics of an attempt that left no checkpoint, unless there are none."""
        if path.stat().st_size:
            names = (f"{path.name}{BEFORE}{number}" for number in ("", *range(2, 10_000)))
            os.replace(path, next(path.with_name(name) for name in names if not path.with_name(name).exists()))

    def _wandb_config(self, flags: dict[str, Any]) -> dict[str, Any]:
        """Return what W&B shows of the run: flags, versions, device, and CleanRL's names for what its plotting tools read."""
        sitting = self.record["sittings"][-1]
        about = {name: self.record[name] for name in ("algorithm", "script")}
        about |= {name: sitting[name] for name in ("device", "git_commit", "git_dirty", "versions")}
        sizes = {"batch_size": self.steps_per_iteration, "num_iterations": self.num_iterations}
        if getattr(self.args, "use_replay_buffer", False):
            sizes["minibatch_size"] = self.args.replay_batch_size * self.args.replay_length
        elif hasattr(self.args, "num_minibatches"):
            sizes["minibatch_size"] = self.steps_per_iteration // self.args.num_minibatches
        unread = () if self.args.env_id == GRIDWORLD else [name for name in flags if name.startswith("gridworld_")]
        return {"exp_name": self.record["script"]} | sizes | about | {k: v for k, v in flags.items() if k not in unread}

    def _note_wandb(self) -> None:
        """Put into the record what is needed to resume the W&B run."""
        identity = self.wandb.identity()
        self.record["wandb"] = identity and identity | {"folder": str(self.folder.absolute())}

    def _make_folder(self) -> None:
        named = self.args.run_name is not None or self.args.resume != "never"
        try:
            self.folder.mkdir(parents=True, exist_ok=named)
        except FileExistsError:  # a run with the same flags started in the same second
            require(not named, f"--run-name {self.args.run_name}: {self.folder} is not a folder; choose another name")
            self.folder = self.folder.with_name(f"{self.folder.name}_{os.getpid()}")
            self.folder.mkdir()
            self.checkpoints.folder = self.folder / folder.CHECKPOINTS
        self.lock = folder.claim(self.folder)
        if not folder.is_new(self.folder):
            raise UsageError(f"{self.folder}: another run has just created it; choose another --run-name, or run this again")
        self.made = True
        folder.clear(self.folder)
        self.record = folder.describe_run(self.args, self.algorithm, self.folder.name) | {"sittings": []}

    def _first_signal(self, signum: int) -> None:
        """Handle the first signal, in a thread of its own."""
        if self.busy.acquire(blocking=False):
            if self._nothing_to_lose():  # do not wait for compilation or prefill
                self._leave_at_once(signum)
            self.busy.release()
        self.logger.say("stopping after this update ... (a second signal stops immediately)")

    def _nothing_to_lose(self) -> bool:
        return not self.logger.learned and not self.saves_replay

    def _leave_at_once(self, signum: int) -> NoReturn:
        """Close all files and end the process. The main thread may be doing anything except writing."""
        try:
            self.logger.say("stopped before there was anything to save")
            self.logger.close()
            if self.wandb is not None:
                self.wandb.finish(128 + signum)
            if self.made and not self.logged:
                shutil.rmtree(self.folder, ignore_errors=True)
        finally:
            os._exit(128 + signum)

    def __exit__(self, kind, error, traceback) -> None:
        failure = error

        def attempt(action, *args):  # run every step even if one fails; raise the first failure
            nonlocal failure
            try:
                return action(*args)
            except BaseException as raised:
                if failure is None or isinstance(failure, KeyboardInterrupt):
                    failure = raised

        with self.busy:
            attempt(self.logger.flush)
            attempt(self.logger.check_in_place)
            lost = isinstance(failure, FolderLost)
            # an iteration may still be running: its environments must not be freed before it ends
            attempt(jax.effects_barrier)
            attempt(self.checkpoints.wait)
            attempt(self.logger.close)
            ended = failure is None and self.iteration == self.num_iterations
            if ended and self.complete:
                self.record["finished_at"] = self.logger.step
            if isinstance(failure, FloatingPointError):  # --debug-nans
                self.diverged = self.logger.step + self.steps_per_iteration
            if self.diverged and (ended or isinstance(failure, (NotFinite, FloatingPointError))):
                self.record["diverged_at"] = self.diverged
            elif self.logger.step >= self.record.get("diverged_at", math.inf):  # it got beyond
                del self.record["diverged_at"]
            if self.wandb is not None:
                self.wandb.summarize(diverged_at=self.record.get("diverged_at"))
                self._note_wandb()
            if not lost:
                attempt(write_json, self.folder / folder.RECORD, self.record)
            if self.wandb is not None:
                if ended and self.complete and not lost:
                    self._tell_wandb_the_end()
                code = 128 + failure.signum if isinstance(failure, Interrupted) else int(failure is not None)
                attempt(self.wandb.finish, code)
            if not lost:
                self._say_what_there_is(failure, ended)
            else:  # a checkpoint that was being written may have made the folder anew
                attempt(self.checkpoints.clean, [])
                with contextlib.suppress(OSError):
                    self.checkpoints.folder.rmdir()
                    self.folder.rmdir()
            self.signals.restore()
            if self.lock is not None:
                self.lock.release()
        if failure is not error:
            raise failure

    def _tell_wandb_the_end(self) -> None:
        score = final_return(self.folder, self.num_iterations * self.steps_per_iteration)
        if score is not None:
            self.wandb.summarize(final_return=score)
        if self.args.upload_model:
            model = self.folder / folder.MODEL
            self.wandb.save_files("model", {str(f.relative_to(model)): f for f in model.rglob("*") if f.is_file()})

    def _say_what_there_is(self, failure: BaseException | None, ended: bool) -> None:
        print(f"{'ended' if failure is None else 'stopped'} after {self.logger.step:,} steps")
        logdir = shlex.quote(str(self.folder.parent))
        print(f"logs: {self.folder}   (uv run tensorboard --logdir {logdir})", flush=True)
        if ended and self.complete and self.args.save_model:
            print(f"model: {self.folder / folder.MODEL}", flush=True)
        if not ended and self.args.keep_checkpoints:
            last = max(self.checkpoints.steps(), default=None)
            if last is not None:
                print(f"resume from step {last:,}: {folder.command_to_resume(self.args, self.folder)}", flush=True)

    def restore(self, state: Any, env: Any, agent: Any = None) -> Any:
        """Return the state to train from: `state` itself in a new run, with the checkpoint's values in a resumed run.

        Args:
            state: the script's initial state, with fields `params`, `opt_state`, `env_state`, `obs` and others.
            env: the script's environments; they start from scratch unless they are `saveable`.
            agent: the script's networks, which `--capture-video` uses.

        Raises:
            UsageError: the checkpoint does not match this code, or cannot be read.
        """
        if self.wandb is not None:
            sizes = {"num_parameters": sum(x.size for x in jax.tree.leaves(state.params)), "num_actions": env.num_actions}
            self.wandb.describe(obs_shape=list(env.obs_spec.shape), **sizes)
        if self.args.capture_video:
            self.camera = Camera(self.args, agent, self.folder)
        self.left_out = {} if env.saveable else {"env_state": None, "obs": None}
        if hasattr(state, REFILLED) and not self.saves_replay:
            self.left_out[REFILLED] = None
        state = distribute(state)
        if self.saved is None:
            return state
        targets = self._split(state)
        for x in jax.tree.leaves(targets):
            x.delete()  # to free memory for a replay buffer; shapes, dtypes and devices stay known
        try:
            loaded = load(self.saved, targets)
        except Damaged as error:
            raise UsageError(f"{self.saved.path}: cannot be read ({error}); move it away to use the one before it") from None
        if not env.saveable:
            self.logger.say("the environments restart: the mean return is hidden until each has finished an episode")
        started = {name: getattr(state, name) for name in self.left_out}
        if "env_state" in started:
            started["env_state"] = restarted(started["env_state"])
        return loaded["rest"]._replace(params=loaded["params"], **started)

    def _split(self, state: Any) -> Trees:
        """Return the trees that a checkpoint stores: the parameters, and the rest of the state."""
        return {"params": state.params, "rest": state._replace(params=None, **self.left_out)}

    def log(self, state: Any, metrics: dict[str, jax.Array]) -> None:
        """Take the results of the update just dispatched, and write the metrics of the previous one. Save when a checkpoint is
        due, after the last update, and when a signal asks the run to stop. The state may be donated after this.

        Raises:
            NotFinite: results of the previous update (or of this one, if it was due to be saved) are not finite.
            Interrupted: a signal asked the run to stop.
            FolderLost: the run's folder was moved or deleted.
            OSError: the log or the checkpoint could not be written.
        """
        with self.busy:
            self.logger.check_in_place()
            self.checkpoints.check()
            if self.args.track_params and self.iteration % self.args.track_every == 0:
                metrics = metrics | track_params(state.params)
            self._check(self.logger.log(metrics, *finite_parts(state.params, state.opt_state)))
            self.logged = True
            self.iteration += 1
            last, stop = self.iteration == self.num_iterations, self.signals.received
            if last or stop or time.monotonic() >= self.next_save:
                good = self._check(self.logger.flush())
                if good and not self._nothing_to_lose():
                    self._save(state, last)
                    self.complete = last
                elif not good:
                    self.logger.say(f"*** not finite at step {self.logger.step:,}: this step is not saved ***")
                self.next_save = time.monotonic() + self.args.save_every
            if stop and not last:
                raise Interrupted(stop)
        step = self.iteration * self.steps_per_iteration
        if self.camera is not None and self.camera.is_due(step, self.steps_per_iteration, last):
            self._film(state.params, step)

    def _film(self, params: Any, step: int) -> None:
        try:
            with on_one_device():
                path, episodic_return = self.camera.take(jax.device_put(params, jax.devices()[0]), step)
        except Exception as error:  # of any type: a failed video must not stop the run
            return self.logger.say(f"*** no video at step {step:,}: {one_line(error)} ***")
        self.logger.say(f"video: {path} (return {'-' if episodic_return is None else f'{episodic_return:g}'})")
        if self.wandb is not None:
            self.wandb.log_video(step, path)

    def _check(self, bad: list[str]) -> bool:
        """Return True if `bad` (names of what is not finite) is empty. Otherwise, raise NotFinite if --stop-if-not-finite."""
        self.diverged = self.logger.step if bad else None
        if bad and self.args.stop_if_not_finite:
            self.checkpoints.wait()
            update, last = self.logger.step // self.steps_per_iteration, max(self.checkpoints.steps(), default=None)
            where = "there is no checkpoint" if last is None else f"the last checkpoint is from step {last:,}"
            command = f"JAX_DISABLE_JIT=1 {folder.command_to_resume(self.args, self.folder, '--debug-nans')}"
            raise NotFinite(
                f"not finite in update {update:,} (step {self.logger.step:,}): {', '.join(bad)}; {where}; "
                f"try a lower --learning-rate, or find the first NaN with: {command}"
            )
        return not bad

    def _save(self, state: Any, last: bool) -> None:
        saves_model = last and self.args.save_model
        if not (self.args.keep_checkpoints or saves_model):
            return
        step = self.logger.step
        self.logger.to_disk()
        if (before := self.record["flags"]["total_timesteps"]) < self.args.total_timesteps:
            self.record["flags"] = to_store(self.args)
            self.record["extended_from"] = [*self.record.get("extended_from", []), before]
            self.record.pop("finished_at", None)
            write_json(self.folder / folder.RECORD, self.record)
        sitting = self.record["sittings"][-1]
        progress = folder.lasting(self.record)
        progress |= {name: sitting[name] for name in ("versions", "git_commit", "git_dirty")}
        progress |= {"step": step, "iteration": self.iteration, "log": self.logger.progress()}
        trees = self._split(state)
        if saves_model:  # before the checkpoint that marks the run as finished
            self.checkpoints.wait()
            begin_writing(self.folder / folder.MODEL, {"params": trees["params"]}, progress)()
        self.checkpoints.save(step, trees, progress)
