"""Models and images that several tests share."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
import timm
import torch
from small_swin import write_images
from torch import nn

# Processes that run tests side by side share the cores, and so do those that they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))

TESTS = Path(__file__).parent
# What starts processes or compilers, or runs whole examples: half of the time for a tenth of the
# tests. -m "not slow" leaves it out.
SLOW = [TESTS / name for name in (
    "examples", "sharding", "command/test_table1.py", "integrations", "masking/test_compile.py",
    "masking/test_distributed.py", "learning/test_learning_transformed.py", "units/test_export.py",
)]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(item.path.is_relative_to(place) for place in SLOW):
            item.add_marker("slow")


# A slow spell of a shared machine is no failure.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


def make_swin(depths: tuple[int, ...] = (2, 2)) -> nn.Module:
    """Return a timm Swin of two stages, small enough for a forward in milliseconds."""
    torch.manual_seed(0)
    return timm.models.swin_transformer.SwinTransformer(
        img_size=16, patch_size=2, in_chans=1, num_classes=10, window_size=4,
        embed_dim=16, depths=depths, num_heads=(2, 4)[: len(depths)],
    )  # fmt: skip


def make_vit() -> nn.Module:
    """Return a timm ViT for the same images."""
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, in_chans=1, num_classes=10,
        embed_dim=32, depth=3, num_heads=4,
    )  # fmt: skip


@pytest.fixture
def swin() -> nn.Module:
    return make_swin()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of images, to be left as it is."""
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def one_thread():
    """Run small tensors on one thread: where cores are shared, more of them only wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
