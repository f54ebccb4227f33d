"""Checkpoints: all comes back, what is damaged is found, and a full disk costs none that was there."""

import os
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.states import Params, make_state, same
from utils.files import INCOMPLETE
from utils.runs.checkpoints import DAMAGED, Checkpoints, Damaged, begin_writing, find, load
from utils.runs.flags import UsageError


def split(state):
    return {"params": state.params, "rest": state._replace(params=None)}


def saved(folder, *seeds, keep=2):
    checkpoints = Checkpoints(folder, keep)
    for seed in seeds:
        checkpoints.save(seed, split(make_state(seed)), {"seed": seed})
    checkpoints.wait()
    return checkpoints


def test_everything_comes_back_though_it_was_donated_at_once(tmp_path):
    state, expected = make_state(3, size=300_000), make_state(3, size=300_000)
    checkpoints = Checkpoints(tmp_path, 2)
    checkpoints.save(7, split(state), {"note": [1.5, None, "ä"]})
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 + 1, state), donate_argnums=0)
    params = state.params
    for _ in range(20):
        params = overwrite(params)
    checkpoints.wait()
    found, said = checkpoints.newest()
    assert said == {} and found.path.name == "000000000007" and found.progress["note"] == [1.5, None, "ä"]
    loaded = load(found, split(make_state(0, size=300_000)))
    assert same(loaded, split(expected))
    assert all(not x.aval.weak_type for x in jax.tree.leaves(loaded))
    assert same(load(found, {"params": jax.eval_shape(lambda: expected.params)}), {"params": expected.params})
    overwrite(loaded["params"])  # and may be donated


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s._replace(obs=s.obs.astype(jnp.float16)), ["rest/obs", "float32[2, 3]", "float16[2, 3]"]),
        (lambda s: s._replace(obs=s.obs[:1]), ["rest/obs", "float32[1, 3]"]),
        (lambda s: s._replace(replay=s.obs), ["rest/replay", "is missing"]),
        (lambda s: s._replace(env_state={"over": s.env_state["over"]}), ["rest/env_state/frame", "expected nothing"]),
        (lambda s: s._replace(params=Params(s.params.encoder, {})), ["params/actor_critic/params/kernel"]),
        (lambda s: s._replace(key=jnp.zeros(2, jnp.uint32)), ["rest/key", "key<fry>"]),
    ],
)
def test_another_structure_shape_or_type_is_refused_by_name(change, words, tmp_path):
    found, _ = saved(tmp_path, 1).newest()
    with pytest.raises(UsageError) as error:
        load(found, split(change(make_state(1))))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_the_last_ones_are_kept_and_what_was_not_finished_goes(tmp_path):
    checkpoints = saved(tmp_path, 1, 2, 3, 4)
    assert list(checkpoints.steps()) == [3, 4]
    (tmp_path / f"000000000009{INCOMPLETE}").mkdir()
    assert checkpoints.newest()[0].progress["seed"] == 4
    checkpoints.clean([])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000003", "000000000004"]
    assert list(saved(tmp_path / "none", 1, keep=0).steps()) == []


def test_a_model_is_replaced_as_a_whole(tmp_path):
    for seed in (1, 2):
        begin_writing(tmp_path / "model", {"params": make_state(seed).params}, {"seed": seed})()
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and find(tmp_path / "model").progress["seed"] == 2


def damage(folder, rng):
    """Something happens to one of the files under the folder. Says what."""
    file = rng.choice([path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"])
    data, kind = file.read_bytes(), rng.choice(["truncated", "emptied", "removed", "flipped", "appended", "noise", "another"])
    if kind == "removed":
        file.unlink()
        return f"{kind} {file}"
    if kind == "truncated":
        data = data[: rng.integers(max(len(data), 1))]
    elif kind == "emptied":
        data = b""
    elif kind == "flipped" and data:
        at = int(rng.integers(len(data)))
        data = data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
    elif kind == "appended":
        data += bytes(rng.integers(0, 256, 5, dtype=np.uint8))
    elif kind == "noise":
        data = bytes(rng.integers(0, 256, len(data), dtype=np.uint8))
    elif kind == "another":
        data = rng.choice([path for path in sorted(folder.rglob("*")) if path.is_file()]).read_bytes()
    file.write_bytes(data)
    return f"{kind} {file}"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_truncated_at_any_place_the_one_before_is_used_and_that_is_said(tmp_path):
    whole, rng = tmp_path / "whole", np.random.default_rng(0)
    saved(whole, 1, 2)
    files = [path for path in (whole / "000000000002").rglob("*") if path.is_file() and path.stat().st_size]
    places = [(path, int(rng.integers(path.stat().st_size))) for path in [*files, *rng.choice(files, 50 - len(files))]]
    for k, (path, at) in enumerate(places):
        cut = shutil.copytree(whole, tmp_path / str(k))
        os.truncate(cut / path.relative_to(whole), at)
        checkpoints = Checkpoints(cut, 2)
        found, damaged = checkpoints.newest()
        assert found.progress["seed"] == 1 and [path.name for path in damaged] == ["000000000002"]
    for _ in range(2):  # twice the same one
        checkpoints.clean(damaged)
        assert list(checkpoints.steps()) == [1] and (cut / f"000000000002{DAMAGED}").exists()
        shutil.copytree(whole / "000000000002", cut / "000000000002")
    assert same(load(found, split(make_state(0))), split(make_state(1)))


def test_whatever_is_damaged_is_found(tmp_path):
    """Each damage, to the last checkpoint: unless it changed nothing, the one before is used."""
    whole, rng = tmp_path / "whole", np.random.default_rng(1)
    saved(whole, 1, 2)
    for k in range(100):
        cut = shutil.copytree(whole, tmp_path / str(k))
        before = contents(cut / "000000000002")
        what = damage(cut / "000000000002", rng)
        unchanged = contents(cut / "000000000002") == before
        found, said = Checkpoints(cut, 2).newest()
        # that the list of checksums was cut in a way that leaves a list is found, too
        assert (found.progress["seed"], len(said)) == ((2, 0) if unchanged else (1, 1)), what
        shutil.rmtree(cut)


def test_where_none_is_whole_the_run_does_not_start_over(tmp_path):
    checkpoints = saved(tmp_path, 1, 2)
    for path in checkpoints.steps().values():
        (path / "progress.json").unlink()
    with pytest.raises(UsageError, match="all checkpoints are damaged"):
        checkpoints.newest()
    assert list(checkpoints.steps()) == [1, 2]
    with pytest.raises(Damaged, match="progress.json is missing"):
        find(tmp_path / "000000000001")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("nothing can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_costs_no_checkpoint_that_was_there(small_disk, capfd):
    checkpoints = saved(small_disk, 1)
    checkpoints.save(2, split(make_state(2, size=40_000)), {"seed": 2})  # a megabyte
    with pytest.raises(OSError, match="could not be written .No space left on device"):
        checkpoints.wait()
    found, said = checkpoints.newest()
    assert said == {} and same(load(found, split(make_state(0))), split(make_state(1)))
    assert [path.name for path in small_disk.iterdir()] == ["000000000001"]  # and room was made again
    checkpoints.save(3, split(make_state(3)), {"seed": 3})
    checkpoints.wait()
    assert checkpoints.newest()[0].progress["seed"] == 3
    assert capfd.readouterr().err == ""
