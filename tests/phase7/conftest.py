"""Servers that several tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.serving import Served, in_thread, template


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """stdlib-1m, without drafts, four rows; ChatML's idea of a template."""
    chat = template(tmp_path_factory.mktemp("chat"))
    with in_thread(model="stdlib-1m", chat_template=chat, batch_size=4, max_queue=60) as served:
        yield served


@pytest.fixture(scope="session")
def drafting() -> Iterator[Served]:
    """stdlib-10m with its draft model, eight rows."""
    with in_thread(model="stdlib-10m", batch_size=8) as served:
        yield served
