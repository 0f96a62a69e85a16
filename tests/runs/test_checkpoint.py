"""Checkpoints of any pytree: what comes back, which stay, what damage and a full disk leave."""

import asyncio
import errno
import gc
import hashlib
import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_model, tiny_config

import deepseek_jax as dsj
from deepseek_jax.configs.hf import config_to_json
from deepseek_jax.convert.layers import RECORD
from deepseek_jax.convert.safetensors import CheckpointError
from deepseek_jax.convert.training import UNHASHED, leaf_names, read_record
from deepseek_jax.core.params import RouterBias, map_variables, named
from deepseek_jax.runs.checkpoint import Checkpoints


def tree(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "params": [jnp.asarray(rng.normal(size=(300, 7)), jnp.float32), jnp.asarray(rng.normal(size=9), jnp.bfloat16)],
        "quantised": jnp.asarray(rng.normal(size=(5, 3)), jnp.float8_e4m3fn),
        "count": jnp.asarray(seed, jnp.int32),
        "none": None,
    }


def abstract(state):
    return jax.eval_shape(lambda: state)


def equal(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def filled(folder, steps, metrics=None, **options):
    checkpoints = Checkpoints(folder, **options)
    for step in steps:
        extra = {"losses": [0.1, 1e-30 * step], "step": step}
        checkpoints.save(step, tree(step), {"at": step}, extra, (metrics or {}).get(step))
    checkpoints.close()
    return checkpoints


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    filled(folder, (10, 20, 30), keep_last=3)
    return folder


@pytest.fixture
def copy(three, tmp_path):
    shutil.copytree(three, tmp_path / "copy")
    return tmp_path / "copy"


def test_what_was_saved_comes_back_bit_for_bit(three):
    found = Checkpoints(three).restore(abstract(tree()))
    assert (found.step, found.damaged) == (30, ())
    assert equal(found.state, tree(30))
    assert not any(leaf.committed for leaf in jax.tree.leaves(found.state))  # as fresh arrays are
    assert (found.data_state, found.extra) == ({"at": 30}, {"losses": [0.1, 3e-29], "step": 30})
    record = json.loads((three / "30" / RECORD).read_text())
    assert record["deepseek_jax_version"] == dsj.__version__
    assert record["leaves"]["params.1"] == ["bfloat16", [9]]


def test_arrays_come_back_in_the_shardings_asked_for(three):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), tree())
    found = Checkpoints(three).restore(wanted).state
    assert equal(found, tree(30))
    assert all(leaf.committed and leaf.sharding == here for leaf in jax.tree.leaves(found))


def test_the_last_and_the_best_stay(tmp_path):
    metrics = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 2.5}
    checkpoints = filled(tmp_path / "c", range(1, 7), metrics, keep_last=2, keep_best=1)
    assert checkpoints.steps() == [2, 5, 6]
    # The measures of a process that has ended count for the next one.
    assert filled(tmp_path / "c", (7, 8), {7: 0.5}, keep_last=1, keep_best=2).steps() == [2, 7, 8]


def test_files_go_along(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    filled(tmp_path / "c", (1,), files={"config.json": tmp_path / "config.json"})
    assert (tmp_path / "c" / "1" / "config.json").read_text() == "{}"


def test_nothing_saved_is_nothing_restored(tmp_path):
    assert Checkpoints(tmp_path / "c").restore(abstract(tree())) is None
    assert not (tmp_path / "c").exists()


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    else:
        at = random.Random(path.name).randrange(len(data) * 8)
        data[at // 8] ^= 1 << at % 8
        path.write_bytes(data)


WRONG = {
    "step": (None, "30", 29, -1, True),
    "metric": ("low", {}),
    "data_state": (None, [], 3),
    "extra": (None, [], "text"),
    "leaves": (None, [], {"params.0": None}, {"params.0": ["float32"]}, {"params.0": ["no dtype", [2]]}),
    "files": (None, [], {}, {"config.json": 1}),
}


def test_a_record_whose_hash_fits_is_read_with_care(copy):
    """Any field missing or of another kind is damage like any other: the checkpoint before it is taken."""
    whole = read_record(copy / "30")

    def written(values):
        (copy / "30").mkdir(exist_ok=True)
        record = {**values, "sha256": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()}
        (copy / "30" / RECORD).write_text(json.dumps(record))

    cases = [{k: v for k, v in whole.items() if k != name} for name in WRONG]
    cases += [{**whole, name: value} for name, values in WRONG.items() for value in values]
    shutil.copytree(copy / "30", copy / "whole")
    names, leaves = leaf_names(abstract(tree())), jax.tree.leaves(abstract(tree()))
    for values in cases:
        shutil.copytree(copy / "whole", copy / "30", dirs_exist_ok=True)
        written(values)
        found = Checkpoints(copy)._newest_whole(names, leaves, lambda record: None)
        assert found["step"] == 20
        assert "30" in found["damaged"][0]
        shutil.rmtree(copy / "damaged")
    shutil.copytree(copy / "whole", copy / "30", dirs_exist_ok=True)
    found = Checkpoints(copy).restore(abstract(tree()), lambda record: "rows is None" if record["step"] > 20 else None)
    assert (found.step, "30 is damaged: rows is None." in found.damaged[0]) == (20, True)


@pytest.mark.parametrize("how", ["missing", "truncated", "one bit"])
def test_damage_of_any_file_falls_back_and_is_named(copy, three, how, capfd):
    files = [p.relative_to(three / "30") for p in sorted((three / "30").rglob("*")) if p.is_file()]
    assert len(files) > 8
    for file in files:
        if (three / "30" / file).stat().st_size == 0 and how != "missing":
            continue
        damage(copy / "30" / file, how)
        if file.name in UNHASHED:
            checkpoints = Checkpoints(copy)
            assert equal(checkpoints.restore(abstract(tree())).state, tree(30))
            checkpoints.save(40, tree(40), {}, {})
            checkpoints.close()
            shutil.rmtree(copy)
            shutil.copytree(three, copy)
            continue
        found = Checkpoints(copy).restore(abstract(tree()))
        assert found.step == 20, file
        assert equal(found.state, tree(20))
        assert len(found.damaged) == 1
        assert str(file) in found.damaged[0]
        shutil.rmtree(copy / "damaged" / "30")  # set aside, not lost
        shutil.copytree(three / "30", copy / "30")
    assert "Error" not in capfd.readouterr().err


def test_a_run_goes_on_saving_after_a_fallback(copy):
    damage(copy / "30" / RECORD, "truncated")
    checkpoints = Checkpoints(copy)
    assert checkpoints.restore(abstract(tree())).step == 20
    checkpoints.save(30, tree(33), {}, {})
    checkpoints.close()
    assert equal(Checkpoints(copy).restore(abstract(tree())).state, tree(33))
    damage(copy / "30" / RECORD, "truncated")
    assert Checkpoints(copy).restore(abstract(tree())).step == 20
    assert {p.name for p in (copy / "damaged").iterdir()} == {"30", "30-2"}


def test_when_all_are_damaged_the_error_names_them(copy):
    for step in (10, 20, 30):
        damage(copy / str(step) / "state" / "_METADATA", "one bit")
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint that can be read.*30.*20.*10"):
        Checkpoints(copy).restore(abstract(tree()))


def test_another_tree_is_an_error_that_names_the_leaf(copy):
    other = tree() | {"params": [jnp.zeros((300, 8)), tree()["params"][1]]}
    with pytest.raises(CheckpointError, match=r"params\.0 is float32 \(300, 7\) there, float32 \(300, 8\) here"):
        Checkpoints(copy).restore(abstract(other))
    with pytest.raises(CheckpointError, match="more is not held there"):
        Checkpoints(copy).restore(abstract(tree() | {"more": jnp.zeros(3)}))
    assert (copy / "30").is_dir()  # not damaged, so not moved


def test_what_a_killed_save_left_is_removed(copy):
    left = copy / "40.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "part").touch()
    assert Checkpoints(copy).restore(abstract(tree())).step == 30
    assert not left.exists()


def save_whole(checkpoints, step):
    checkpoints.save(step, tree(step), {}, {})
    checkpoints.wait()


@pytest.mark.parametrize("where", ["arrays", "record"])
def test_a_full_disk_is_one_error_and_the_last_good_one_stays(copy, monkeypatch, where, capfd):
    def full(*args, **kwargs):
        if where == "record":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write [os_error_code='28']")

    checkpoints = Checkpoints(copy)
    target = {
        "arrays": "orbax.checkpoint._src.serialization.jax_array_handlers.ArrayHandler.serialize",
        "record": "deepseek_jax.runs.checkpoint.write_record",
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(target, full)
        with pytest.raises(OSError, match=r"step 40 could not be written.*No space.*last good one is .*30") as error:
            save_whole(checkpoints, 40)
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(copy.resolve()))
    assert checkpoints.steps() == [10, 20, 30]
    checkpoints.close()
    assert Checkpoints(copy).restore(abstract(tree())).step == 30
    assert "Traceback" not in capfd.readouterr().err


NO_ROOM = """
import resource, signal, sys
from pathlib import Path
import jax.numpy as jnp
import numpy as np
from deepseek_jax.runs.checkpoint import Checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoints = Checkpoints(Path(sys.argv[1]))
rng = np.random.default_rng(0)
checkpoints.save(1, {"a": jnp.ones(9)}, {}, {})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
try:
    checkpoints.save(2, {f"a{i}": jnp.asarray(rng.normal(size=40_000), jnp.float32) for i in range(40)}, {}, {})
    checkpoints.close()
except OSError as error:
    print(error)
"""


@pytest.mark.slow
def test_no_library_prints_beside_the_error_of_a_disk_without_room(tmp_path):
    """In a process of its own, with a limit on a file's size: the writes of many arrays fail at once, on threads."""
    found = subprocess.run([sys.executable, "-c", NO_ROOM, tmp_path / "c"], capture_output=True, text=True)
    assert "step 2 could not be written (File too large); the last good one is" in found.stdout
    assert "Traceback" not in found.stderr
    assert (found.stdout.count("\n"), found.returncode) == (1, 0)


def test_asyncio_logs_no_late_write_and_everything_else(tmp_path, caplog):
    """Of whatever kind: a task, a gathering of tasks, one under way when its loop closes."""
    save_whole(Checkpoints(tmp_path / "c"), 1)  # quiets what is told later

    async def write(message: str, delay: float):
        await asyncio.sleep(delay)
        raise ValueError(message)

    def forget(folder: str) -> None:
        loop = asyncio.new_event_loop()
        message = f"Error writing {folder}/ocdbt"
        task = loop.create_task(write(message, 0), name=folder)
        late = loop.create_task(write(message, 9), name=folder)

        async def gather():
            return asyncio.gather(write(message, 0), write(message, 0))

        gathering = loop.run_until_complete(gather())
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()
        del task, late, gathering
        gc.collect()

    forget("2.orbax-checkpoint-tmp")
    assert not caplog.records
    forget("elsewhere")
    lines = [record.getMessage().partition("\n")[0] for record in caplog.records]
    assert sorted(lines) == [
        "Task exception was never retrieved",
        "Task was destroyed but it is pending!",
        "_GatheringFuture exception was never retrieved",
    ]


def test_a_folder_that_cannot_be_made_is_one_error(tmp_path):
    (tmp_path / "c").touch()
    with pytest.raises(OSError, match=r"step 1 could not be written.*there is no earlier one") as error:
        save_whole(Checkpoints(tmp_path / "c"), 1)
    assert error.value.filename == str(tmp_path / "c")


@pytest.fixture(scope="module")
def of_a_model(tmp_path_factory):
    """A checkpoint with a model's parts and more, and that model."""
    folder, model = tmp_path_factory.mktemp("model"), random_model(tiny_config())
    (folder / "config.json").write_text(json.dumps(config_to_json(model.cfg)))
    params, rest = dsj.partition(model)
    state = {"params": params, "rest": rest, "opt_state": {"m": jnp.ones(3)}, "step": jnp.asarray(5)}
    checkpoints = Checkpoints(folder / "checkpoints", files={"config.json": folder / "config.json"})
    checkpoints.save(5, state, {}, {})
    checkpoints.close()
    return folder / "checkpoints" / "5", model


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_a_training_checkpoint_loads_as_a_model(of_a_model, dtype):
    folder, model = of_a_model
    found = dsj.load_pretrained(folder, dtype=dtype)

    def wanted(variable):
        value = variable.get_value()
        return value if dtype is None or isinstance(variable, RouterBias) else value.astype(dtype)

    assert replace(found.cfg, name="") == replace(model.cfg, name="")
    assert equal(named(found), {name: wanted(v) for name, v in variables(model).items()})


def variables(model) -> dict:
    found = {}
    map_variables(lambda path, v: found.update({".".join(map(str, path)): v}), model)
    return found


def test_a_damaged_training_checkpoint_is_not_loaded(of_a_model, tmp_path):
    shutil.copytree(of_a_model[0], tmp_path / "5")
    damage(next((tmp_path / "5" / "state" / "d").iterdir()), "one bit")
    with pytest.raises(CheckpointError, match="is damaged"):
        dsj.load_pretrained(tmp_path / "5")
