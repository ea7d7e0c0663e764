"""Eight virtual CPU devices for every test, strict array rules, and the real models where they are."""

import os
from pathlib import Path

# Read by XLA when its first backend starts: a hang of a collective fails in seconds instead of hours.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_collective_call_terminate_timeout_seconds=60"
).strip()

from jaxtyping import install_import_hook

for _package in ("ops", "nn", "sampling", "runtime", "models"):
    install_import_hook(f"albireo_jax.{_package}", "beartype.beartype")

import jax
import pytest

# What folders of tests share; registered once, before any of them imports it.
pytest.register_assert_rewrite("engine_lab", "http_lab", "sampling_lab", "sched_lab", "sched_laws")

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_rank_promotion", "raise")

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real models, traces and prompts beside the checkout; skips where it is missing."""
    if not DATA.is_dir():
        pytest.skip(f"no real models and traces at {DATA}")
    return DATA
