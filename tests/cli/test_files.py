"""Files of results: refused before the work where they cannot be written, whole or not there at all."""

import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from deepseek_jax.cli.files import check_destination, check_folder, json_alone, read, write_json
from deepseek_jax.version import __version__


def test_a_record_holds_the_version_first(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    assert list(json.loads((tmp_path / "a.json").read_text()).items()) == [("deepseek_jax", __version__), ("x", 1)]
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_failure_leaves_the_file_that_was_there(tmp_path):
    (tmp_path / "a.json").write_text("before")
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.json", "before")]


def test_a_full_disk_leaves_no_part(tmp_path, monkeypatch):
    def fail(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / "a.json", {})
    assert list(tmp_path.iterdir()) == []


def test_destinations(tmp_path):
    check_destination(None)
    check_destination(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"--json .*b/a\.json: there is no folder .*b\."):
        check_destination(tmp_path / "b" / "a.json")
    with pytest.raises(ValueError, match=r"--picture .*: this is a folder\."):
        check_destination(tmp_path, "--picture")


def test_the_standard_output_is_the_records_alone(capsys):
    check_destination(Path("-"))
    with json_alone(Path("-")):
        print("a table")
        write_json(Path("-"), {"x": 1})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"deepseek_jax": __version__, "x": 1}
    assert err == "a table\n"
    with json_alone(None):
        print("a table")
    assert capsys.readouterr().out == "a table\n"


def test_a_device_or_pipe_is_written_into_and_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_destination(pipe)
    found = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    write_json(pipe, {"x": 1})
    reader.join()
    assert json.loads(found[0])["x"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_what_cannot_be_written_is_noticed_first():
    # /proc takes no files, whoever asks.
    for check, name in ((check_destination, "--json"), (check_folder, "--out")):
        with pytest.raises(ValueError, match=rf"{name} /proc/x: /proc cannot be written \("):
            check(Path("/proc/x"), name)


def test_folders(tmp_path):
    check_folder(tmp_path / "a" / "b", "DST")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"DST .*/file/x: .*/file is a file\."):
        check_folder(tmp_path / "file" / "x", "DST")


def test_text_is_read_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes("é\r\n".encode())
    assert read(tmp_path / "x") == "é\r\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é\r\n".encode())))
    assert read(Path("-")) == "é\r\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    with pytest.raises(ValueError, match="the standard input is not UTF-8"):
        read(Path("-"))


def test_native_code_is_not_heard():
    code = (
        "import os; from pathlib import Path; from deepseek_jax.cli.files import *\n"
        "print('a'); native_output_off(); os.write(1, b'[Gloo]\\n'); print('b')\n"
        "with json_alone(Path('-')): native_output_off(); write_json(Path('-'), {})\n"
        "print('c')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["a", "b", "{", '"deepseek_jax":', f'"{__version__}"', "}", "c"]
    assert found.stderr == ""
