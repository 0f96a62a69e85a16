"""`deepseek-jax convert`: there and back byte for byte, resumable, and nothing left after an error."""

import contextlib
import errno
import json
import logging
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import pytest
from folders import EDGES, arrays, assert_same_tensors, edge_model, edit_json, write_arrays
from measured import measured
from test_pretrained import DAMAGE, assert_same_model, rescaled
from tiny import random_model

import deepseek_jax as dsj
from deepseek_jax.cli.main import main
from deepseek_jax.configs.zoo import language_models, zoo
from deepseek_jax.convert import arrays as arrays_module
from deepseek_jax.convert import files as files_module
from deepseek_jax.convert import stream as stream_module
from deepseek_jax.convert.arrays import Array, chunk_shape
from deepseek_jax.convert.checkpoint import Checkpoint
from deepseek_jax.convert.layers import RECORD, read_record
from deepseek_jax.convert.manifest import CONFIRMED, inspect, of_release, releases_of
from deepseek_jax.convert.safetensors import INDEX, CheckpointError
from deepseek_jax.convert.stream import convert
from deepseek_jax.notes import CheckpointWarning


@pytest.fixture(scope="module")
def fp8(tmp_path_factory) -> Path:
    """Three files with an index, a tokenizer, unknown config fields."""
    folder = tmp_path_factory.mktemp("source")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files_module, "SHARD_BYTES", 400_000)
        dsj.save_pretrained(edge_model(), folder / "model", quantize="fp8")
    (folder / "model/tokenizer.json").write_text('{"a": 1}')
    (folder / "model/LICENSE-MODEL").write_text("terms")
    edit_json(folder / "model/config.json", lambda c: c.update(auto_map={"x": "y"}))
    assert len(list((folder / "model").glob("*.safetensors"))) == 3
    return folder / "model"


@pytest.fixture(scope="module")
def converted(fp8, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "orbax"
    assert convert(fp8, folder) == "layers"
    return folder


@pytest.fixture
def scratch(fp8, tmp_path) -> Path:
    return shutil.copytree(fp8, tmp_path / "copy")


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_there_and_back(fp8, converted, tmp_path):
    """Every file comes back, the safetensors files byte for byte, since their layout is the writer's own."""
    done = []
    assert convert(converted, tmp_path / "back", done.append) == "published"
    assert files(tmp_path / "back") == files(fp8)
    assert sum(done) == sum(entry.nbytes for entry in Checkpoint(fp8).entries.values())
    measured("tiny-v3", "load", 0)
    measured("tiny-v3", "export", 0)


def test_the_folder_is_orbax(converted, fp8):
    """A layer is an Orbax checkpoint with the stored bytes in the published orientation."""
    from orbax.checkpoint.experimental import v1 as ocp

    copied = {"config.json", "tokenizer.json", "LICENSE-MODEL"}
    assert {p.name for p in converted.iterdir()} == {*copied, RECORD, "model", "layers"}
    assert {p.name for p in (converted / "layers").iterdir()} == {"0", "1", "2", "3"}
    tree = ocp.load(converted / "layers/2")
    stored = arrays(fp8)
    assert set(tree) == {"attn_norm", "attn", "ffn_norm", "ffn"}
    name = "model.layers.2.self_attn.q_b_proj.weight"
    assert tree["attn"]["q_b"]["values"].dtype == ml_dtypes.float8_e4m3fn
    assert tree["attn"]["q_b"]["values"].tobytes() == stored[name].tobytes()
    assert tree["attn"]["q_b"]["scale"].tobytes() == stored[name + "_scale_inv"].tobytes()
    assert tree["ffn"]["gate_up"]["values"].shape == (8, 2, EDGES.moe.expert_dim, EDGES.dim)
    up = stored["model.layers.2.mlp.experts.5.up_proj.weight"]
    assert tree["ffn"]["gate_up"]["values"][5, 1].tobytes() == up.tobytes()
    record = json.loads((converted / RECORD).read_text())
    assert (record["format_version"], record["deepseek_jax_version"]) == (2, dsj.__version__)


@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_loading_either_is_the_same(fp8, converted, dtype):
    a, b = dsj.load_pretrained(fp8, dtype=dtype), dsj.load_pretrained(converted, dtype=dtype)
    assert_same_model(a, replace_name(b, a.cfg.name))


def replace_name(model, name):
    model.cfg = replace(model.cfg, name=name)
    return model


CASES = {
    "float32": {},
    "no MTP": {"mtp_depth": 0},
    "all dense, two MTP": {"n_dense_layers": 3, "moe": None, "mtp_depth": 2},
    "all MoE, tied": {"n_dense_layers": 0, "tie_embeddings": True},
    "no query compression": {"attention": replace(EDGES.attention, q_rank=None)},
}


@pytest.mark.parametrize("case", CASES)
def test_other_architectures(tmp_path, case):
    model = random_model(replace(EDGES, **CASES[case]), seed=1, dtype=jnp.float32)
    dsj.save_pretrained(model, tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "c")
    assert_same_tensors(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize("scales", ["powers", "e8m0", "fp4"])
def test_scales_keep_their_dtype(fp8, tmp_path, scales):
    single = tmp_path / "single"
    dsj.save_pretrained(dsj.load_pretrained(fp8, dtype=None), single)
    source = rescaled(single, tmp_path / "source", scales)
    convert(source, tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "c")
    assert_same_tensors(source, tmp_path / "c")
    if scales == "fp4":  # in Orbax as in the file, two values a byte
        assert_same_model(*(dsj.load_pretrained(f, None) for f in (tmp_path / "b", tmp_path / "c")))


def test_chunks(fp8, tmp_path, monkeypatch):
    """Chunks of part of a matrix's rows, of some experts, and of all; the last ones short."""
    rows = 7 * EDGES.dim  # so that few rows, or few scales of experts, make a chunk
    monkeypatch.setattr(arrays_module, "CHUNK_BYTES", rows)
    convert(fp8, tmp_path / "b")
    matrix = Array(tmp_path / "b/layers/0", ("attn", "q_a", "values"))
    assert [d[0].stop - d[0].start for d in matrix.chunks()] == [7] * 6 + [6]
    dsj.load_pretrained(tmp_path / "b", dtype=None)
    convert(tmp_path / "b", tmp_path / "c")
    assert_same_tensors(fp8, tmp_path / "c")
    monkeypatch.undo()
    convert(tmp_path / "b", tmp_path / "d")
    assert_same_tensors(fp8, tmp_path / "d")


@pytest.mark.parametrize(
    ("shape", "stacked", "expected"),
    [
        ((256, 2, 2048, 7168), 2, (1, 1, 2048, 7168)),
        ((256, 2, 16, 56), 2, (256, 2, 16, 56)),
        ((129280, 7168), 0, (2309, 7168)),
        ((7168,), 0, (7168,)),
        ((3, 2**25), 0, (1, 2**25)),
        ((10, 3, 1000, 1000), 2, (5, 3, 1000, 1000)),
        ((10, 1000, 1000), 1, (10, 1000, 1000)),
        ((40, 1000, 1000), 1, (14, 1000, 1000)),
    ],
)
def test_chunk_shapes(shape, stacked, expected):
    chunk = chunk_shape(shape, stacked, 1)
    assert chunk == expected
    assert math.prod(chunk) <= 2**24 or chunk[stacked] == 1


def test_relative_paths(fp8, tmp_path, monkeypatch):
    """Orbax and TensorStore take absolute paths only."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(fp8, "a")
    convert("a", "b")
    convert("b", "c")
    assert files(Path("c")) == files(fp8)
    assert main(["convert", "b", "--dry-run"]) == 0


def test_files_without_an_index(fp8, tmp_path, scratch):
    (scratch / INDEX).unlink()
    convert(scratch, tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "c")
    assert files(tmp_path / "c") == files(scratch)


# --- Interruption -----------------------------------------------------------------------------------------------


class Stop(BaseException):
    """As a signal would end it."""


@pytest.mark.parametrize("back", [False, True])
def test_goes_on_after_an_interruption(fp8, converted, tmp_path, monkeypatch, back):
    """Stopped again and again: each run keeps what earlier ones finished, and the end is the same."""
    source, destination = converted if back else fp8, tmp_path / "out"
    finished, whole = {}, "*.safetensors" if back else "layers/?/orbax.checkpoint"
    runs = 0
    while not destination.exists():
        left = [20 + 20 * runs]

        def progress(n, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise Stop

        runs += 1
        with contextlib.suppress(Stop):
            convert(source, destination, progress)
        (folder,) = tmp_path.iterdir()
        found = {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.glob(whole)}
        assert finished.items() <= found.items()
        finished = found
    assert runs > 3
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    if not back:
        convert(destination, tmp_path / "back")
        destination = tmp_path / "back"
    assert files(destination) == files(fp8)


def test_a_changed_source_is_not_mixed_in(scratch, tmp_path):
    def progress(n):
        raise Stop

    with pytest.raises(Stop):
        convert(scratch, tmp_path / "out", progress)
    edit_json(scratch / "config.json", lambda c: c.update(auto_map={}))
    with pytest.raises(FileExistsError, match=r"\.out\.converting-\w+ holds another conversion.*remove it"):
        convert(scratch, tmp_path / "out")


def test_two_at_once(fp8, tmp_path, capsys):
    """The second is refused; the first goes on."""

    def progress(n):
        if not second:
            second.append(main(["convert", str(fp8), str(tmp_path / "out")]))

    second = []
    convert(fp8, tmp_path / "out", progress)
    assert second == [1]
    said = capsys.readouterr().err
    assert (
        said == f"deepseek-jax convert: another process is converting to {tmp_path / 'out'}; wait for it, or end it.\n"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    convert(tmp_path / "out", tmp_path / "back")
    assert files(tmp_path / "back") == files(fp8)


@pytest.mark.slow
@pytest.mark.parametrize("back", [False, True])
def test_killed_at_any_moment(tmp_path, monkeypatch, back):
    """kill -9 at random moments until one run gets through; what it leaves is whole."""
    rng = random.Random(0)
    cfg = replace(EDGES, n_layers=24, dim=512)
    monkeypatch.setattr(files_module, "SHARD_BYTES", 3_000_000)
    dsj.save_pretrained(random_model(cfg, dtype=jnp.bfloat16), tmp_path / "a", quantize="fp8")
    source = tmp_path / "a"
    if back:
        source = tmp_path / "b"
        convert(tmp_path / "a", source)
    destination = tmp_path / "out"
    program = "from deepseek_jax.cli.main import main; raise SystemExit(main())"
    command = [sys.executable, "-c", program, "convert", str(source)]
    # How long a whole run takes here and now; kills come at random parts of that, later and later.
    begin = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], check=True, stdout=subprocess.DEVNULL)
    whole = time.monotonic() - begin
    kills = 0
    while True:
        process = subprocess.Popen([*command, str(destination)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            _, errors = process.communicate(timeout=whole * (0.3 + 0.3 * rng.random() + 0.03 * kills))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            assert kills < 60
            if destination.exists():
                break
            continue
        assert process.returncode == 0, errors.decode()
        break
    print(f"killed {kills} times")
    assert kills > 0
    if back:
        assert_same_tensors(tmp_path / "a", destination)
    else:
        assert_same_model(
            replace_name(dsj.load_pretrained(destination, dtype=None), "x"),
            replace_name(dsj.load_pretrained(tmp_path / "a", dtype=None), "x"),
        )
    assert not list(tmp_path.glob(".*"))


# --- Errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_sources(scratch, tmp_path, case):
    change, message = DAMAGE[case]
    tensors = arrays(scratch)
    change(tensors)
    for file in scratch.glob("*.safetensors*"):
        file.unlink()
    write_arrays(scratch, tensors)
    with pytest.raises(CheckpointError, match=message):
        convert(scratch, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"copy"}


def header(file: Path) -> bytes:
    return file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")]


SECOND = "model-00002-of-00003.safetensors"
REFUSALS = {
    "truncated": (
        lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes()[:-9]),
        rf"{SECOND}: the header describes \d+ bytes, the file has \d+, so that \S+ is truncated",
    ),
    "header": (
        lambda f: (f / SECOND).write_bytes((f / SECOND).read_bytes().replace(b'"F8_E4M3"', b'"F8_E4M9"', 1)),
        rf"{SECOND}: \S+ has the unknown dtype 'F8_E4M9'",
    ),
    "header's length": (
        lambda f: (f / SECOND).write_bytes(b"\xff" * 8 + header(f / SECOND)),
        rf"{SECOND}: the file has \d+ bytes, too few for its header of 18446744073709551615",
    ),
    "no file": (lambda f: (f / SECOND).unlink(), rf"{SECOND} does not exist, but \S+index.json has \S+ in it"),
    "index": (lambda f: (f / INDEX).write_text("{]"), r"index\.json is not valid JSON"),
    "index of another": (
        lambda f: edit_json(f / INDEX, lambda i: i["weight_map"].pop("model.norm.weight")),
        r"\.safetensors holds model\.norm\.weight, which \S+index\.json does not list",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), r"has no config\.json; give a folder"),
    "config": (lambda f: (f / "config.json").write_text("[1]"), r"config\.json must hold a JSON object, not list"),
    "model_type": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(model_type="mixtral")),
        r"config\.json: model_type 'mixtral' is not supported; supported: deepseek_v3",
    ),
    "config against tensors": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(moe_intermediate_size=40)),
        r"safetensors: model\.layers\.1\.mlp\.experts\.0\.gate_proj\S+ has shape \(48, 136\), the config implies \(40,",
    ),
    "config against itself": (
        lambda f: edit_json(f / "config.json", lambda c: c.update(num_key_value_heads=3)),
        r"config\.json contradicts itself: num_key_value_heads is 3, but num_attention_heads is",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_the_command_refuses_in_one_line(scratch, tmp_path, capsys, case):
    change, message = REFUSALS[case]
    change(scratch)
    assert main(["convert", str(scratch), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"copy"}


def test_destinations(fp8, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").touch()
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        convert(fp8, tmp_path / "full")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(OSError, match=r"needs 0\.00 GB, but the disk has 0\.00 GB free"):
        convert(fp8, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"full"}


def test_a_link_to_an_empty_folder_is_written_through(fp8, tmp_path):
    """The work is staged beside the folder that the link names, perhaps on another disk."""
    (tmp_path / "disk/target").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk/target")
    staged = []
    convert(fp8, tmp_path / "link", lambda n: staged.extend(p.name for p in (tmp_path / "disk").glob(".*")))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk/target" / RECORD).is_file()
    assert set(staged) == {next(iter(staged))}
    assert staged[0].startswith(".target.converting-")
    assert {p.name for p in tmp_path.rglob("*") if p.parent in (tmp_path, tmp_path / "disk")} == {
        "disk",
        "link",
        "target",
    }


# As the system says it, and as Orbax's store passes it on.
FULL = {
    "system": OSError(errno.ENOSPC, "No space left on device"),
    "store": ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [os_error_code='28']"),
}


@pytest.mark.parametrize(("back", "error"), [(False, "system"), (False, "store"), (True, "system")])
def test_a_disk_that_fills_up(fp8, converted, tmp_path, monkeypatch, capsys, caplog, back, error):
    """One line that names what is kept; the same command goes on from there."""
    owner, name = (stream_module.Writer, "write_rows") if back else (stream_module.Array, "write")
    whole, calls = getattr(owner, name), []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) == (200 if back else 80):
            logging.getLogger("absl").error("the store's own report")
            with args[0].errors() if error == "store" else contextlib.nullcontext():
                raise FULL[error]
        return whole(*args, **kwargs)

    source = converted if back else fp8
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        assert main(["convert", str(source), str(tmp_path / "out")]) == 1
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith(".out.converting-")
    assert any(kept.iterdir())
    assert caplog.records == []
    said = capsys.readouterr().err
    assert f"No space left on device; what is finished is kept in {kept}, where the same command goes on." in said
    assert said.count("\n") == 1
    assert main(["convert", str(source), str(tmp_path / "out")]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert_same_model(*(replace_name(dsj.load_pretrained(f, dtype=None), "x") for f in (source, tmp_path / "out")))


def test_destinations_that_cannot_be_written(fp8, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    assert main(["convert", str(fp8), str(tmp_path / "file/out")]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path / 'file'} is a file." in error
    assert error.count("\n") == 1

    def refuse(path, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(["convert", str(fp8), str(tmp_path / "none/out")]) == 1
    assert capsys.readouterr().err == f"deepseek-jax convert: {tmp_path / 'none'}: Permission denied\n"
    assert {p.name for p in tmp_path.iterdir()} == {"file"}


RECORDS = {
    "out of the folder": (lambda r: r["files"].update({"../../x.safetensors": []}), "not the plain name"),
    "absolute": (lambda r: r["files"].update({"/tmp/x.safetensors": []}), "not the plain name"),
    "another file": (lambda r: r["files"].update({"config.json": []}), "not the plain name"),
    "no list": (lambda r: r["files"].update({"x.safetensors": 7}), "must have a list of tensors' names"),
    "list of numbers": (lambda r: r["files"].update({"x.safetensors": [7]}), "must have a list of tensors' names"),
    "a name twice": (lambda r: r["files"].update({"x.safetensors": ["a", "a"]}), "a tensor that stood there before"),
    "a name in two files": (
        lambda r: r["files"].update({"x.safetensors": ["lm_head.weight"]}),
        "a tensor that stood there before",
    ),
    "no files": (lambda r: r.pop("files"), "must hold indexed"),
    "no indexed": (lambda r: r.pop("indexed"), "must hold indexed"),
    "indexed": (lambda r: r.update(indexed="no"), "must hold indexed"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_damaged_records(converted, tmp_path, case):
    """What the record names is written to: it is read with suspicion."""
    change, message = RECORDS[case]
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    record = json.loads((converted / RECORD).read_text())
    change(record)
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=message):
        read_record(folder)


def test_a_nan_in_a_converted_folder(converted, tmp_path):
    """Named by tensor and position, also where a chunk holds several experts."""
    folder = shutil.copytree(converted, tmp_path / "a")
    chunk = folder / "layers/2/state/ffn.gate_up.values/0.0.0.0"
    raw = bytearray(chunk.read_bytes())
    rows, columns = EDGES.moe.expert_dim, EDGES.dim
    raw[((5 * 2 + 1) * rows + 7) * columns + 9] = 0xFF
    chunk.write_bytes(raw)
    name = r"model\.layers\.2\.mlp\.experts\.5\.up_proj\.weight is nan at \[7, 9\]; 1 of its values"
    for read in (dsj.load_pretrained, lambda path: convert(path, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=rf"a/layers/2: {name}"):
            read(folder)
    assert {p.name for p in tmp_path.iterdir()} == {"a"}


def test_a_nan_behind_the_first_rows(scratch, tmp_path, monkeypatch):
    """A chunk is some rows of a matrix; the position is the matrix's."""
    monkeypatch.setattr(arrays_module, "CHUNK_BYTES", 5 * EDGES.dim)
    name = "model.layers.0.mlp.gate_proj.weight"
    entry = Checkpoint(scratch).entries[name]
    with entry.file.open("r+b") as file:
        file.seek(entry.start + 123 * EDGES.dim + 4)
        file.write(b"\x7f")
    with pytest.raises(CheckpointError, match=rf"{entry.file}: {name} is nan at \[123, 4\]; 1 of its values"):
        convert(scratch, tmp_path / "out")


def test_damaged_converted_folders(converted, tmp_path):
    def copy(name):
        return shutil.copytree(converted, tmp_path / name)

    folder = copy("a")
    shutil.rmtree(folder / "layers/1")
    with pytest.raises(CheckpointError, match=r"layers/1 is missing"):
        dsj.load_pretrained(folder)
    folder = copy("b")
    edit_json(folder / RECORD, lambda r: r.update(format_version=1))
    with pytest.raises(CheckpointError, match="version 1 is not read here"):
        convert(folder, tmp_path / "out")
    folder = copy("c")
    edit_json(folder / RECORD, lambda r: r["files"].popitem())
    with (
        pytest.warns(CheckpointWarning, match="embed_tokens"),  # the copies' file is the one that is gone
        pytest.raises(CheckpointError, match="the layers disagree on"),
    ):
        convert(folder, tmp_path / "out")
    folder = copy("d")
    chunk = folder / "layers/2/state/ffn.gate_up.values/0.0.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    for read in (dsj.load_pretrained, lambda path: convert(path, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=r"layers/2: ffn/gate_up/values cannot be read"):
            read(folder)
    chunk.unlink()
    with pytest.raises(CheckpointError, match=r"layers/2: ffn/gate_up/values cannot be read.*0\.0.* is missing"):
        convert(folder, tmp_path / "out")
    folder = copy("e")
    (folder / "layers/2/state/attn.o.scale/.zarray").unlink()
    with pytest.raises(CheckpointError, match=r"1 tensors are missing: model\.layers\.2\.\S+o_proj\.\S+_scale_inv"):
        convert(folder, tmp_path / "out")
    folder = copy("f")
    (folder / "layers/2/state/attn.o.scale/.zarray").write_text("{}")
    with pytest.raises(CheckpointError, match=r"layers/2: attn/o/scale cannot be read"):
        convert(folder, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


# --- The command ------------------------------------------------------------------------------------------------


def test_command(fp8, tmp_path, capsys):
    assert main(["convert", str(fp8), str(tmp_path / "b")]) == 0
    assert "Orbax" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "b"), str(tmp_path / "c"), "--json", str(tmp_path / "r.json")]) == 0
    assert files(tmp_path / "c") == files(fp8)
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["deepseek_jax"] == dsj.__version__
    assert record["conversion"]["bytes"] == sum(entry.nbytes for entry in Checkpoint(fp8).entries.values())
    assert record["conversion"]["seconds"] > 0
    assert (record["conversion"]["layout"], record["conversion"]["destination"]) == ("published", str(tmp_path / "c"))
    assert main(["convert", str(fp8), "--dry-run"]) == 0
    assert "tensors" in capsys.readouterr().out
    assert main(["convert", str(fp8)]) == 2
    captured = capsys.readouterr()
    assert "DST is missing" in captured.err
    assert captured.out == ""
    assert main(["convert", str(fp8), str(tmp_path / "d"), "--json", str(tmp_path / "no/r.json")]) == 1
    assert "there is no folder" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()
    assert main(["convert", str(fp8), str(tmp_path / "c")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["convert", str(tmp_path / "absent"), str(tmp_path / "d")]) == 1
    assert "absent is not a folder" in capsys.readouterr().err


def test_manifests():
    """The released DeepSeek-V3: 91,991 tensors, as its files' own headers say."""
    assert of_release("deepseek-v3").tensors == 91_991
    assert of_release("deepseek-v3").dtypes["F8_E4M3"] + 59 == of_release("deepseek-v3").dtypes["F32"]
    # An indexer has five more, of which two have scales; the number is that of the files' headers.
    assert of_release("deepseek-v3.2").tensors == 91_991 + 62 * 7 == 92_425
    assert of_release("moonlight-16b").dtypes.keys() == {"BF16", "F32"}
    # An embedding, a norm and a head; 28 layers of 12 tensors. No router bias, no FP8.
    assert of_release("r1-distill-qwen-1.5b").dtypes == {"BF16": 3 + 28 * 12}
    assert of_release("r1-distill-qwen-1.5b").bytes == 3_554_176_000
    assert releases_of(zoo("deepseek-v2")) == ("deepseek-v2", "deepseek-v2.5", "deepseek-coder-v2")
    same = ("deepseek-v3", "deepseek-r1", "deepseek-v3.1")
    assert releases_of(replace(zoo("deepseek-v3"), init_std=0.02)) == same
    assert releases_of(zoo("moonlight-16b")) == ("moonlight-16b",)
    assert releases_of(zoo("deepseek-v3", n_layers=60)) == ()


def test_the_committed_manifests(root):
    """checkpoints/manifests.json says what `convert --dry-run` compares with."""
    committed = json.loads((root / "checkpoints/manifests.json").read_text())["releases"]
    assert {name for name in language_models() if not name.startswith("tiny")} == set(committed)
    for name, held in committed.items():
        # R1 and V3.1 differ from V3 in name only, V2.5 and Coder-V2 from V2; the layout of one of them is enough.
        manifest = of_release(next(n for n in committed if replace(zoo(name), name=n) == zoo(n)))
        expected = {"tensors": manifest.tensors, "bytes": manifest.bytes, "dtypes": manifest.dtypes}
        assert held == {**expected, "confirmed": name in CONFIRMED}


def test_dry_run_compares_with_the_release(fp8, monkeypatch, capsys):
    from deepseek_jax.convert import manifest

    assert inspect(fp8).expected is None
    cfg = dsj.load_pretrained(fp8).cfg
    monkeypatch.setattr(manifest, "releases_of", lambda cfg: ("edges", "edges-2"))
    monkeypatch.setattr(manifest, "zoo", lambda name: cfg)
    monkeypatch.setattr(manifest, "FP8", ("edges",))
    assert inspect(fp8).agrees
    assert "This is what edges and edges-2 should hold." in inspect(fp8).text()
    assert inspect(fp8).record()["releases"] == ("edges", "edges-2")
    monkeypatch.setattr(manifest, "BLOCK", (64, 64))
    assert not inspect(fp8).agrees
    assert main(["convert", str(fp8), "--dry-run"]) == 1
    assert "edges and edges-2 should, by config, hold" in capsys.readouterr().out
