"""Addresses of images: limits of size, time and redirects, on a server of this machine."""

import io
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2 as httpx
import numpy as np
import pytest
from PIL import Image

from mfrsvlm import image_sources_mfrsvlm
from mfrsvlm.image_sources_mfrsvlm import is_public, open_image


def png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)).save(file, "PNG")
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Serves `/name` by the method `name`, and notes what was asked for."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        name, _, argument = self.path[1:].partition("/")
        try:
            getattr(self, name, self.missing)(argument)
        except OSError:  # the client has had enough
            pass

    def send(self, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def image(self, _: str) -> None:
        assert self.headers["Accept-Encoding"] == "identity"
        self.send(content_type="image/png", content_length=str(len(png())))
        self.wfile.write(png())

    def again(self, times: str) -> None:
        self.send(302, location=f"/again/{int(times) - 1}" if int(times) > 1 else "/image")

    def to(self, address: str) -> None:
        self.send(302, location=address.replace("PORT", str(self.server.server_port)))

    def endless(self, _: str) -> None:
        self.send()
        while True:
            self.wfile.write(bytes(2**16))

    def drip(self, _: str) -> None:
        self.send(content_length="1000000")
        while not self.server.closing.wait(0.02):  # type: ignore[attr-defined]
            self.wfile.write(b"x")

    def header(self, _: str) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        while not self.server.closing.wait(0.02):  # type: ignore[attr-defined]
            self.wfile.write(b"x")

    def silent(self, _: str) -> None:
        self.server.closing.wait(5)  # type: ignore[attr-defined]

    def bomb(self, _: str) -> None:
        self.send(content_encoding="gzip, gzip")

    def missing(self, _: str) -> None:
        self.send(404)

    def short(self, _: str) -> None:
        self.send(content_length=str(len(png())))
        self.wfile.write(png()[:40])

    def log_message(self, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.closing = threading.Event()

    def address(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    # Without the proxies and the offline mode of the environment.
    monkeypatch.setattr(image_sources_mfrsvlm, "get_session", lambda: httpx.Client(trust_env=False))
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


def rejected(address: str) -> str:
    """The message, which is one line and names the address."""
    with pytest.raises(ValueError, match="cannot open image") as error:
        open_image(address)
    assert "\n" not in str(error.value) and address[:100] in str(error.value)
    return str(error.value)


def test_an_address_that_the_user_gives(server: Server) -> None:
    """Also one of this machine. Up to five redirects on the same server are followed."""
    for path in ("image", "again/1", "again/5"):
        np.testing.assert_array_equal(np.asarray(open_image(server.address(path))).ravel(), np.arange(60))


def test_too_many_redirects(server: Server) -> None:
    assert "redirects more than 5 times" in rejected(server.address("again/6"))
    assert "redirects more than 5 times" in rejected(server.address("again/1000"))
    assert len(server.asked) == 12


@pytest.mark.parametrize(
    "target",
    [
        "http://localhost:PORT/image",
        "http://2130706433:PORT/image",
        "http://127.1:PORT/image",
        "http://[::1]:PORT/image",
        "http://[::ffff:127.0.0.1]:PORT/image",
        "http://0.0.0.0:PORT/image",
        "http://169.254.169.254/latest/meta-data",
        "http://10.0.0.1/image",
        "http://192.168.1.1/image",
        "http://[fe80::1]/image",
        "//localhost:PORT/image",
    ],
)
def test_redirects_into_private_networks(server: Server, target: str) -> None:
    path = f"to/{target}"
    assert "address of a private network" in rejected(server.address(path))
    assert server.asked == ["/" + path]


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://example.com/a.png", "gopher://example.com/"])
def test_redirects_to_other_schemes(server: Server, target: str) -> None:
    assert "no http(s) address" in rejected(server.address(f"to/{target}"))


def test_private_and_public_hosts() -> None:
    assert is_public("8.8.8.8") and is_public("2001:4860:4860::8888")
    for host in ("127.0.0.1", "::1", "10.1.2.3", "172.16.0.1", "100.64.0.1", "224.0.0.1", "fd00::1", "0.0.0.0", "localhost"):
        assert not is_public(host), host


def test_an_endless_answer(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_sources_mfrsvlm, "FETCH_BYTES", 2**20)
    assert "larger than 1 MiB" in rejected(server.address("endless"))


@pytest.mark.parametrize("path", ["drip", "header", "silent"])
def test_a_slow_answer(server: Server, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr(image_sources_mfrsvlm, "FETCH_SECONDS", 0.2)
    start = time.monotonic()
    message = rejected(server.address(path))
    assert "not complete after 0.2 s" in message or "timed out" in message
    assert time.monotonic() - start < 2


def test_answers_that_are_no_image(server: Server) -> None:
    assert "compresses it" in rejected(server.address("bomb"))
    rejected(server.address("short"))
    assert "404 Not Found" in rejected(server.address("missing"))


@pytest.mark.parametrize(
    "address", ["http://", "http://[::1", "http://:0/", "https://a b/", "http://exa\nmple/", "HTTP://x" * 9999]
)
def test_addresses_that_are_none(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="cannot open image") as error:
        open_image(address)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


def test_limits() -> None:
    assert image_sources_mfrsvlm.FETCH_BYTES == 256 * 2**20
    assert (image_sources_mfrsvlm.FETCH_SECONDS, image_sources_mfrsvlm.FETCH_REDIRECTS) == (30, 5)
