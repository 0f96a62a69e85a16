"""Files of results: refused before the work where they cannot be written, whole or not there at all."""

import json

import pytest

from deepseek_jax.cli.files import check_destination, write_json
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
