"""What every test shares: fresh random numbers, poisoned memory, golden files, and tests that need a GPU."""

from __future__ import annotations

import difflib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test downloads anything
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # matrix products on a GPU repeat bit for bit

GOLDEN = Path(__file__).parent / "golden"
KERNELS = Path(__file__).parents[1] / ".pytest_cache" / "kernels"
os.environ.setdefault("ATTN_ENGINE_CACHE", str(KERNELS))  # the user's own cache stays as it is

import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write the golden files instead of comparing with them"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Workers that run side by side share the cores instead of fighting for them."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU, and this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill whatever torch allocates without initialising it with NaN: an element that a kernel forgets shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # the switch that torch ties the filling to
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A new seed on every run; ATTN_ENGINE_TEST_SEED repeats one that a failure printed."""
    value = int(os.environ.get("ATTN_ENGINE_TEST_SEED") or random.SystemRandom().randrange(2**31))
    request.node.add_report_section("setup", "seed", f"ATTN_ENGINE_TEST_SEED={value}")
    return value


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def poison() -> Callable[..., torch.Tensor]:
    """poison(shape, dtype=...): a tensor of NaN (integers: the largest number) to pass to a kernel as its output."""

    def filled(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        value = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max
        return torch.full(shape, value, dtype=dtype)

    return filled


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """golden(name, text) compares text with tests/golden/<name>, or writes it under --update-golden."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            return
        if not path.exists():
            pytest.fail(f"tests/golden/{name} does not exist; pytest --update-golden writes it, then read it")
        expected = path.read_text()
        if text != expected:
            lines = difflib.unified_diff(
                expected.splitlines(), text.splitlines(), f"golden/{name}", "now", lineterm=""
            )
            pytest.fail("\n".join(["generated text changed (--update-golden accepts it):", *lines]))

    return check
