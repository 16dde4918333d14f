"""Stands for the network where an image is fetched."""

from typing import Any

import httpx2 as httpx
import pytest

from mfrsvlm import image_sources_mfrsvlm


def fake_network(monkeypatch: pytest.MonkeyPatch, content: bytes, name: str = "") -> None:
    """Every address answers with `content`; those that do not end in `name` with the status 404."""

    def answer(request: httpx.Request) -> httpx.Response:
        found = str(request.url).endswith(name)
        return httpx.Response(200, stream=httpx.ByteStream(content)) if found else httpx.Response(404)

    session: Any = httpx.Client(transport=httpx.MockTransport(answer))
    monkeypatch.setattr(image_sources_mfrsvlm, "get_session", lambda: session)
