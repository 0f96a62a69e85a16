"""Settings every test shares: fast compilation, one compilation cache, exact float32 products."""

import gc
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

# Before JAX starts. Compilation is nearly all of the suite's time; the first two halve it, and the emitters of fusions
# that 0.10 can do without take two thirds of the rest. Subprocesses inherit them.
# A cache that is named by the environment is used and kept.
OWN_CACHE = None if os.environ.get("JAX_COMPILATION_CACHE_DIR") else tempfile.mkdtemp(prefix="deepseek-jax-xla-")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        # Later versions know no such flag, and end the process for it.
        *["--xla_cpu_use_fusion_emitters=false"] * version("jaxlib").startswith("0.10."),
    ]
).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
if OWN_CACHE:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = OWN_CACHE
# What else is kept for the next time, such as a compiled library, is no business of the user's folders either.
os.environ["XDG_CACHE_HOME"] = os.environ["JAX_COMPILATION_CACHE_DIR"]
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Tracing makes objects by the million; looking through them as often as Python does takes 7% of the time.
gc.set_threshold(50_000, *gc.get_threshold()[1:])

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from memory_maps import forget_programs  # noqa: E402

ROOT = Path(__file__).parent.parent
# No test fails for a slow machine, or a busy one.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_sessionfinish():
    if OWN_CACHE:
        shutil.rmtree(OWN_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    yield
    forget_programs()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's folder."""
    return ROOT
