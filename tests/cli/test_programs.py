"""Compiled programs on disk: where, how many, and what becomes of what cannot be read or written."""

import os
import re
import warnings

import jax
import pytest

from deepseek_jax.cli import programs


@pytest.fixture
def unset(monkeypatch):
    """JAX without a cache of its own; what is set is set back."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_compilation_cache")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_users_cache_folder(unset, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    programs.keep_programs()
    (folder,) = (tmp_path / "deepseek-jax" / "xla").iterdir()
    assert re.fullmatch(rf"{re.escape(jax.__version__)}-[0-9a-f]{{8}}", folder.name)
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert list(folder.iterdir()) == []
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert programs.folder("1").parent == tmp_path / ".cache" / "deepseek-jax" / "xla"


def test_the_option_and_jaxs_own_settings_come_first(unset, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "elsewhere")
    programs.keep_programs()
    assert jax.config.jax_compilation_cache_dir == "elsewhere"
    jax.config.update("jax_compilation_cache_dir", None)
    programs.keep_programs(False)
    assert not jax.config.jax_enable_compilation_cache
    programs.keep_programs()
    assert jax.config.jax_compilation_cache_dir is None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(unset, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    programs.keep_programs()
    assert jax.config.jax_compilation_cache_dir is None
    said = capsys.readouterr().err
    assert "compiled programs are not kept, /proc/deepseek-jax/xla" in said
    assert said.count("\n") == 1


def test_the_oldest_programs_go(tmp_path):
    for age, name in enumerate("abcdef"):
        (tmp_path / name).write_bytes(bytes(100))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    os.utime(tmp_path / "f", (2e9, 1e9))  # read lately
    programs.trim(tmp_path, 600)
    assert len(list(tmp_path.iterdir())) == 6
    programs.trim(tmp_path, 599)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "f"]


def test_what_cannot_be_read_is_removed_and_what_cannot_be_written_is_said_once(tmp_path, capsys):
    (tmp_path / "jit_f-12-cache").touch()
    (tmp_path / "jit_g-12-cache").touch()
    others = []
    show = programs._Warned(tmp_path, lambda message, *rest: others.append(str(message)))
    about = "persistent compilation cache entry for"
    for text in (f"Error reading {about} 'jit_f': cut", *(2 * [f"Error writing {about} 'jit_g': OSError: full"]), "x"):
        show(UserWarning(text), UserWarning, "file", 1)
    assert [p.name for p in tmp_path.iterdir()] == ["jit_g-12-cache"]
    assert others == ["x"]
    assert capsys.readouterr().err == f"deepseek-jax: compiled programs are not kept in {tmp_path}: OSError: full.\n"
