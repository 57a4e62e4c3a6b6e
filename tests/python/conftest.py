"""Fixtures and settings that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings
from turbokv.spec import TYPES, KVType

# Threads that wait without spinning, here and in the tools: several times faster when the cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# No deadline: shared CI machines stall. Derandomized: a red run is red again on the next machine.
settings.register_profile("turbokv", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("turbokv")


@pytest.fixture(scope="session")
def repo() -> Path:
    return Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session", params=TYPES, ids=[t.name for t in TYPES])
def kv_type(request: pytest.FixtureRequest) -> KVType:
    assert isinstance(request.param, KVType)
    return request.param
