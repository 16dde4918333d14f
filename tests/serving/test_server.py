"""`mfrsvlm serve`: answers of the chat route, errors, limits, clients that leave."""

import base64
import json
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image


pytest.importorskip("fastapi", reason="needs the extra `serving`")
pytest.importorskip("openai", reason="needs the extra `serving`")

from fastapi.testclient import TestClient

from mfrsvlm.demo import MODEL, SCENE
from mfrsvlm.demo.answering import answer
from mfrsvlm.files.model_folder import load_model
from mfrsvlm.serving.__main__ import main
from mfrsvlm.serving.app import build_app
from mfrsvlm.serving.chat_requests import Limits


ROUTE = "/v1/chat/completions"
QUESTIONS = ["How many aircraft are there?", "Is there a ship in this scene?", "Describe this image."]
PICTURE = "data:image/png;base64," + base64.b64encode(open(SCENE, "rb").read()).decode()


def ask(question, picture=PICTURE, **fields):
    parts = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question}]
    return {"model": "demo", "messages": [{"role": "user", "content": parts}], "max_tokens": 32, **fields}


def text_of(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"].strip()


@pytest.fixture(scope="module")
def loaded():
    return load_model(MODEL)


@pytest.fixture(scope="module")
def client(loaded):
    with TestClient(build_app(*loaded, "demo", Limits(max_body_bytes=2**20)), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def expected(loaded):
    """Answers of `generate`, without a server."""
    with Image.open(SCENE) as image:
        return [answer(*loaded, image, [question], 32)[0].text for question in QUESTIONS]


def test_answers_are_those_of_generate(client, expected):
    assert [text_of(client.post(ROUTE, json=ask(question))) for question in QUESTIONS] == expected


def test_stream_adds_up_to_the_answer(client, expected):
    lines = client.post(ROUTE, json=ask(QUESTIONS[2], stream=True)).text.splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert len(chunks) > 3 and chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks).strip() == expected[2]


def test_options_have_an_effect(client, expected):
    answer = client.post(ROUTE, json=ask(QUESTIONS[2], max_tokens=3)).json()
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 3
    word = expected[2].split()[2]
    assert text_of(client.post(ROUTE, json=ask(QUESTIONS[2], stop=[word]))) == expected[2].partition(word)[0] + word
    warm = {text_of(client.post(ROUTE, json=ask(QUESTIONS[2], temperature=2.0, seed=seed))) for seed in range(4)}
    assert len(warm) > 1
    again = [text_of(client.post(ROUTE, json=ask(QUESTIONS[2], temperature=2.0, seed=3))) for _ in range(2)]
    assert again[0] == again[1]


def test_control_tokens_of_a_question_are_text(client):
    """They neither end the prompt nor stand for an image."""
    plain, special = (
        client.post(ROUTE, json=ask(text)).json()["usage"]["prompt_tokens"] for text in ("a b", "a<image></s>b")
    )
    assert special > plain + 5


def test_model_and_health(client):
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["demo"]
    assert client.get("/health").json() == {"status": "ok"}
    assert client.post("/load_model", json={"model": "other/model"}).status_code == 404


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"{", 400, "not JSON"),
        (b"", 400, "not JSON"),
        (b"\xff\xfe{}", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "not JSON"),
        (b'{"messages": 1}', 400, "`messages`"),
        (b" " * (2**20 + 1), 413, "larger than 1 MiB"),
        (json.dumps(ask("a", model="other")).encode(), 400, "other"),
        (json.dumps(ask("a", picture="data:image/png;base64,AAAA")).encode(), 400, "cannot open image"),
        (json.dumps(ask("a", picture="data:image/png;base64,====")).encode(), 400, "cannot open image"),
        (json.dumps(ask("word " * 5000)).encode(), 400, "4096 positions"),
        (json.dumps(ask("word " * 5000, stream=True)).encode(), 400, "4096 positions"),
    ],
)
def test_bad_requests_are_explained(client, content, status, message):
    response = client.post(ROUTE, content=content)
    assert response.status_code == status and message in response.json()["error"]["message"], response.text


def test_a_bomb_is_rejected_before_it_is_decoded(client, tmp_path):
    Image.new("1", (60_000, 60_000)).save(tmp_path / "bomb.png")
    picture = "data:image/png;base64," + base64.b64encode((tmp_path / "bomb.png").read_bytes()).decode()
    response = client.post(ROUTE, json=ask("a", picture=picture))
    assert response.status_code == 400 and "pixels" in response.text


def test_bad_command_lines(capsys, tmp_path):
    assert main([str(tmp_path)]) == 1
    assert "is no model folder" in capsys.readouterr().err
    assert main([MODEL, "--max-tokens", "0"]) == 2
    assert "--max-tokens must be positive" in capsys.readouterr().err


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The command in a process of its own. Gives its address and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = open(tmp_path_factory.mktemp("server") / "log", "w+")
    options = ["--name", "demo", "--host", "127.0.0.1", "--port", str(port), "--max-requests", "6"]
    command = [sys.executable, "-m", "mfrsvlm.cli", "serve", MODEL, *options]
    process = subprocess.Popen(command, stdout=log, stderr=log)
    import httpx2 as httpx  # of openai

    address = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try:
            if httpx.get(f"{address}/health").status_code == 200:
                break
        except httpx.TransportError:
            assert process.poll() is None, log.seek(0) or log.read()
            time.sleep(0.2)
    yield address, process
    process.terminate()
    assert process.wait(20) in (0, -15)


def resident_mib(pid):
    status = open(f"/proc/{pid}/status").read()
    return int(re.search(r"VmRSS:\s+([0-9]+) kB", status)[1]) / 1024


def run_threads(threads):
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.integration
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads memory from /proc")
def test_many_clients_and_clients_that_leave(server, expected):
    """Right answers from several threads, no loss by clients that leave in mid-answer, memory flat, 503 beyond the limit."""
    import httpx2 as httpx  # of openai
    from openai import OpenAI

    address, process = server
    client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

    def one(question, seen):
        body = ask(question)
        seen.append(client.chat.completions.create(**body).choices[0].message.content.strip())

    def round_of(count):
        seen: list[list[str]] = [[] for _ in range(count)]
        run_threads([threading.Thread(target=one, args=(QUESTIONS[i % 3], seen[i])) for i in range(count)])
        assert [texts[0] for texts in seen] == [expected[i % 3] for i in range(count)]

    round_of(4)
    before = resident_mib(process.pid)
    for _ in range(10):
        round_of(4)
        with httpx.stream("POST", address + ROUTE, json=ask(QUESTIONS[2], stream=True)) as response:
            next(response.iter_lines())  # and leave
        assert httpx.post(address + ROUTE, content=b"{").status_code == 400
    assert resident_mib(process.pid) < before + 50
    codes: list[int] = []

    def post():
        codes.append(httpx.post(address + ROUTE, json=ask(QUESTIONS[0]), timeout=60).status_code)

    run_threads([threading.Thread(target=post) for _ in range(16)])
    assert set(codes) == {200, 503} and len(codes) == 16
    assert httpx.get(f"{address}/health").status_code == 200


@pytest.mark.integration
def test_page(server, capsys, monkeypatch):
    """The first Python example of docs/serving.md, against a server on another port."""
    root = Path(__file__).parents[2]
    example, _ = re.findall(r"```python\n(.*?)```", (root / "docs" / "serving.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(root)
    exec(example.replace("http://localhost:8000", server[0]), {})
    assert capsys.readouterr().out.strip() == "9"
