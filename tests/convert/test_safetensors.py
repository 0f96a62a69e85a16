"""The safetensors format: equal to the reference reader and writer, and safe against damage."""

import contextlib
import json

import ml_dtypes
import numpy as np
import pytest
from folders import arrays, write_arrays
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek_jax.convert.checkpoint import Checkpoint
from deepseek_jax.convert.safetensors import DTYPES, INDEX, CheckpointError, Writer, load_json, read_header
from deepseek_jax.notes import CheckpointWarning


def raw_file(path, header, body=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + body)
    return path


def tensor(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_every_dtype_survives(tmp_path):
    rng = np.random.default_rng(0)
    held = {}
    for name, dtype in DTYPES.items():
        raw = rng.integers(0, 2 if name == "BOOL" else 256, 3 * 5 * dtype.itemsize, dtype=np.uint8)
        held[name] = raw.view(dtype).reshape(3, 5)
    held["empty"], held["scalar"] = np.zeros((0, 4), np.float32), np.full((), 2.5, np.float16)
    write_arrays(tmp_path, held)
    read = arrays(tmp_path)
    assert set(read) == set(held)
    for name, array in held.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        assert read[name].tobytes() == array.tobytes()


def test_rows(tmp_path):
    array = np.arange(21, dtype=np.float32).reshape(7, 3)
    write_arrays(tmp_path, {"a": array, "b": array[:2]})
    entry = Checkpoint(tmp_path).entries["a"]
    np.testing.assert_array_equal(entry.read(2, 5), array[2:5])
    np.testing.assert_array_equal(entry.read(4, 100), array[4:])


def test_pytorch_reads_what_we_write(tmp_path):
    """FP8 with an odd number of bytes before wider tensors: PyTorch needs each aligned to its dtype."""
    import torch
    from safetensors.torch import load_file

    held = {
        "a": np.arange(15, dtype=np.float32).reshape(3, 5).astype(ml_dtypes.float8_e4m3fn),
        "b": np.arange(4, dtype=np.float32),
        "c": np.arange(3, dtype=np.float32).astype(ml_dtypes.bfloat16),
        "d": np.arange(3, dtype=np.int64),
    }
    write_arrays(tmp_path, held)
    read = load_file(tmp_path / "model.safetensors")
    assert {k: v.dtype for k, v in read.items()} == {
        "a": torch.float8_e4m3fn,
        "b": torch.float32,
        "c": torch.bfloat16,
        "d": torch.int64,
    }
    for name, array in held.items():
        np.testing.assert_array_equal(read[name].double().numpy(), array.astype(np.float64))


def test_we_read_what_pytorch_writes(tmp_path):
    import torch
    from safetensors.torch import save_file

    held = {
        "a": torch.arange(15).reshape(3, 5).to(torch.float8_e4m3fn),
        "b": torch.ones(3, dtype=torch.bfloat16),
    }
    save_file(held, tmp_path / "x.safetensors", metadata={"k": "v"})
    read = arrays(tmp_path)
    for name, array in held.items():
        np.testing.assert_array_equal(read[name].astype(np.float32), array.float().numpy())
    assert read_header(tmp_path / "x.safetensors")[1] == {"k": "v"}


DAMAGED = {
    "empty": (b"", "too few"),
    "short": (b"\x01\x00", "too few"),
    "long header": ((10**9).to_bytes(8, "little") + b"{}", "header of 1000000000"),
    "not JSON": ((2).to_bytes(8, "little") + b"{x", "not valid JSON"),
    "not UTF-8": ((4).to_bytes(8, "little") + b'{"\xff"', "not valid JSON"),
    "no object": ((2).to_bytes(8, "little") + b"[]", "must be a JSON object"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_bytes(tmp_path, case):
    content, message = DAMAGED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        Checkpoint(tmp_path)
    assert str(path) in str(error.value)


ONE_BYTE = '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
TWICE = f"{{{ONE_BYTE},{ONE_BYTE}}}".encode()
HEADERS = {
    "dtype": ({"a": tensor("F7")}, "a has the unknown dtype 'F7'"),
    "dtype no string": ({"a": tensor(["F32"])}, "a has the unknown dtype"),
    "negative shape": ({"a": tensor(shape=(-2,))}, "a has a bad shape"),
    "bool shape": ({"a": tensor("U8", (True,), (0, 1))}, "a has a bad shape"),
    "offsets": ({"a": tensor(offsets=(8, 0))}, "a has bad offsets"),
    "three offsets": ({"a": tensor(offsets=(0, 4, 8))}, "a has bad offsets"),
    "size": ({"a": tensor(shape=(3,))}, "a has 8 bytes, but F32 \\[3\\] takes 12"),
    "gap": ({"a": tensor("U8", (2,), (0, 2)), "b": tensor("U8", (4,), (4, 8))}, "b starts at byte"),
    "overlap": ({"a": tensor("U8", (6,), (0, 6)), "b": tensor("U8", (4,), (4, 8))}, "b starts at byte"),
    "truncated": (
        {"a": tensor(shape=(2,), offsets=(0, 8)), "b": tensor(shape=(4,), offsets=(8, 24))},
        r"describes \d+ bytes, the file has \d+, so that b is truncated",
    ),
    "rest": ({"a": tensor(shape=(1,), offsets=(0, 4))}, "the file has"),
    "no fields": ({"a": {"dtype": "F32"}}, "a has a header without"),
    "no info": ({"a": 3}, "a has a header without"),
    "metadata": ({"__metadata__": {"a": 1}}, "__metadata__"),
    "twice": (TWICE, "'a' occurs twice"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_damaged_headers(tmp_path, case):
    header, message = HEADERS[case]
    path = raw_file(tmp_path / "model.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=message) as error:
        Checkpoint(tmp_path)
    assert str(path) in str(error.value)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_refused_or_harmless(tmp_path, data):
    """Any change of the bytes gives CheckpointError or a file whose tensors can all be read."""
    write_arrays(tmp_path, {"a": np.ones((2, 3), np.float32), "b": np.zeros(5, np.uint8)})
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(CheckpointError):
        arrays(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 20) | st.text("F32U8", max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "dtype", "shape", "data_offsets", "__metadata__"]), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(JSON)
def test_any_header_is_refused_or_harmless(tmp_path, header):
    raw_file(tmp_path / "model.safetensors", header, bytes(8))
    with contextlib.suppress(CheckpointError):
        arrays(tmp_path)


def test_cut_after_opening(tmp_path):
    """A file that shrinks between header and read is an error, not a crash or zeros."""
    write_arrays(tmp_path, {"a": np.ones(100, np.float32)})
    checkpoint = Checkpoint(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"truncated within a"):
        checkpoint.read("a")


def indexed(folder, **weight_map):
    write_arrays(folder, {"a": np.ones(2, np.float32)}, "one.safetensors")
    write_arrays(folder, {"b": np.ones(2, np.float32)}, "two.safetensors")
    whole = {"a": "one.safetensors", "b": "two.safetensors"} | weight_map
    whole = {name: file for name, file in whole.items() if file}
    (folder / INDEX).write_text(json.dumps({"weight_map": whole}))


def test_index(tmp_path):
    indexed(tmp_path)
    (tmp_path / "other.safetensors").write_bytes(b"not part of the index")
    with pytest.warns(CheckpointWarning, match=r"what model\.\S+index\.json lists is the model; other\.safetensors"):
        assert set(Checkpoint(tmp_path)) == {"a", "b"}


def test_several_files_without_index(tmp_path):
    indexed(tmp_path)
    (tmp_path / INDEX).unlink()
    assert set(Checkpoint(tmp_path)) == {"a", "b"}


WRONG_INDEX = {
    "missing file": ({"c": "three.safetensors"}, "three.safetensors does not exist.*c in it"),
    "missing tensor": ({"c": "one.safetensors"}, "one.safetensors lacks c"),
    "wrong file": ({"a": "two.safetensors", "c": "one.safetensors"}, "lacks c|has a in two"),
    "swapped": (
        {"a": "two.safetensors", "b": "one.safetensors"},
        "has a in two.safetensors, but it stands in",
    ),
    "path": ({"a": "../one.safetensors"}, "no file name"),
    "number": ({"a": 3}, "no file name"),
}


@pytest.mark.parametrize("case", WRONG_INDEX)
def test_wrong_index(tmp_path, case):
    changes, message = WRONG_INDEX[case]
    indexed(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path)


def test_tensor_outside_the_index(tmp_path):
    write_arrays(tmp_path, {"a": np.ones(2, np.float32), "x": np.ones(2, np.float32)}, "one.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(CheckpointError, match="holds x, which"):
        Checkpoint(tmp_path)


def test_json_that_nests_too_deep(tmp_path):
    deep = b"[" * 100_000
    (tmp_path / "a.json").write_bytes(deep)
    with pytest.raises(CheckpointError, match=r"a\.json is not valid JSON"):
        load_json(tmp_path / "a.json")
    (tmp_path / "a.safetensors").write_bytes(len(deep).to_bytes(8, "little") + deep)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: the header is not valid JSON"):
        read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_bad_index(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=INDEX.replace(".", r"\.")):
        Checkpoint(tmp_path)


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors"):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not read by PyTorch \("):
        Checkpoint(tmp_path)


def test_one_name_in_two_files(tmp_path):
    for file in ("one.safetensors", "two.safetensors"):
        write_arrays(tmp_path, {"a": np.ones(2, np.float32)}, file)
    with pytest.raises(CheckpointError, match="a stands in both"):
        Checkpoint(tmp_path)


SPECS = {"a": (np.dtype(np.float32), (2,)), "b": (np.dtype(np.float32), (3,))}


def test_nothing_is_left_of_an_unfinished_file(tmp_path):
    def write(**tensors):
        with Writer(tmp_path / "x.safetensors", SPECS) as writer:
            for name, array in tensors.items():
                writer.write(name, np.asarray(array, np.float32))

    with pytest.raises(ValueError, match="1 tensors were never written: b"):
        write(a=[1, 2])
    with pytest.raises(ValueError, match=r"b was announced as float32 \(3,\), but is float32 \(2,\)"):
        write(a=[1, 2], b=[1, 2])
    with pytest.raises(ZeroDivisionError), Writer(tmp_path / "x.safetensors", SPECS):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []
    write(b=[1, 2, 3], a=[1, 2])
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
