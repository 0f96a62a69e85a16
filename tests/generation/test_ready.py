"""Programs ready on disk: what finds them, what does not, and what becomes of damage."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.generation import loop, programs
from deepseek_jax.generation.programs import Ready, keep_ready

traced = []


def power(x, times, *, by: int):
    """Traced as often as ``traced`` is long."""
    traced.append(by)
    return {"x": x["x"] ** by * times}


def ready() -> Ready:
    """As a new process has it: nothing of it is traced or compiled in memory."""
    jax.clear_caches()
    return Ready(partial(jax.jit, static_argnames=("by",), donate_argnums=0)(power))


@pytest.fixture
def folder(tmp_path):
    keep_ready(tmp_path / "ready")
    traced.clear()
    yield tmp_path / "ready"
    keep_ready(None)


def argument(dtype=np.float32, n=4):
    return {"x": jnp.asarray(np.arange(n), dtype)}


def test_what_was_compiled_once_is_neither_traced_nor_compiled_again(folder):
    expected = np.arange(4, dtype=np.float32) ** 3 * 2
    for _ in range(4):
        f = ready()
        for _ in range(2):
            x = argument()
            assert np.array_equal(f(x, np.float32(2), by=3)["x"], expected)
            assert x["x"].is_deleted()
    assert len(traced) == 1
    assert len(list(folder.iterdir())) == 1


def test_jaxs_own_cache_gives_no_program_without_its_code(folder):
    """It serves a CPU's programs in a form that cannot be written again: what is kept is compiled past it."""
    for _ in range(3):
        partial(jax.jit, static_argnames=("by",))(power)(argument(), np.float32(2), by=3)
        ready()(argument(), np.float32(2), by=3)
        assert ready()(argument(), np.float32(2), by=3)["x"][2] == 16
        (file,) = folder.iterdir()
        file.unlink()
    assert jax.config.jax_enable_compilation_cache


def test_whatever_a_program_depends_on_finds_another(folder, monkeypatch):
    f = ready()
    calls = [
        lambda: f(argument(), np.float32(2), by=3),
        lambda: f(argument(), np.float32(2), by=2),
        lambda: f(argument(np.float16), np.float32(2), by=3),
        lambda: f(argument(n=5), np.float32(2), by=3),
        lambda: f(argument(), np.int32(2), by=3),
        lambda: f(argument(), 2.0, by=3),
        lambda: f(argument(), jnp.float32(2), by=3),
        lambda: f(argument(), jax.jit(lambda: 2.0)(), by=3),  # of weak type
    ]
    for made, call in enumerate(calls, 1):
        call()
        assert len(list(folder.iterdir())) == made
    found, before = programs._surroundings(), len(traced)
    changed = [(*found[:i], "other", *found[i + 1 :]) for i in range(len(found))]
    for made, surroundings in enumerate(changed, 1 + len(calls)):
        monkeypatch.setattr(programs, "_surroundings", lambda new=surroundings: new)
        ready()(argument(), np.float32(2), by=3)
        assert len(list(folder.iterdir())) == made
    assert len(traced) - before == len(found)


def test_the_source_of_the_whole_package_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "_PACKAGE", tmp_path)
    (tmp_path / "core").mkdir()
    seen = set()
    for text in ("a = 1", "a = 2"):
        (tmp_path / "core/x.py").write_text(text)
        seen.add(programs._surroundings.__wrapped__()[0])
    (tmp_path / "core/x.py").rename(tmp_path / "x.py")
    seen.add(programs._surroundings.__wrapped__()[0])
    assert len(seen) == 3


def test_a_damaged_program_is_made_again(folder):
    ready()(argument(), np.float32(2), by=3)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    for damage in (b"", whole[:-9], whole[:99] + b"x" + whole[100:]):
        file.write_bytes(damage)
        assert np.array_equal(ready()(argument(), np.float32(2), by=3)["x"], np.arange(4) ** 3 * 2.0)
        assert file.stat().st_size > 40
    assert len(traced) == 4


def test_what_cannot_be_kept_runs_all_the_same(folder, tmp_path):
    f = Ready(jax.jit(lambda x, by: x, static_argnames=("by",)))
    assert f(jnp.ones(()), by=lambda: 0) == 1
    assert Ready(jax.jit(lambda: 2))() == 2
    assert not folder.exists()
    (tmp_path / "file").touch()
    keep_ready(tmp_path / "file" / "ready")
    assert ready()(argument(), np.float32(2), by=1)["x"].sum() == 12
    keep_ready(None)
    assert ready()(argument(), np.float32(2), by=1)["x"].sum() == 12


def test_generation_on_one_device_asks_for_them():
    assert all(isinstance(f, Ready) for f in loop.compiled())
