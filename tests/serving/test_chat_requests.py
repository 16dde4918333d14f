"""What a chat request may contain."""

import pytest

from mfrsvlm.serving.chat_requests import BadRequest, Limits, check_request


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TEXT = {"type": "text", "text": "Is there a river?"}


def user(content):
    return {"role": "user", "content": content}


def test_accepted_requests():
    checked = check_request(
        {"model": "m", "messages": [user([IMAGE, TEXT])], "stop": ".", "seed": None, "user": "me"}, Limits()
    )
    assert checked == {"model": "m", "messages": [user([IMAGE, TEXT])], "stop": ["."], "max_tokens": Limits.max_tokens}
    history = [
        {"role": "system", "content": "Be short."},
        user("Hello"),
        {"role": "assistant", "content": "Hi"},
        user([TEXT]),
    ]
    assert check_request({"messages": history, "max_completion_tokens": 5}, Limits())["max_tokens"] == 5
    address = {"type": "image_url", "image_url": "https://example.org/a.png"}
    assert check_request({"messages": [user([address])]}, Limits(allow_fetch=True))


@pytest.mark.parametrize("address", ["http://127.0.0.1/a.png", "http://[::1]/a", "http://169.254.169.254/latest", "http://"])
def test_private_addresses_are_never_fetched(address):
    with pytest.raises(BadRequest, match="private network"):
        check_request({"messages": [user([{"type": "image_url", "image_url": address}])]}, Limits(allow_fetch=True))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "JSON object"),
        ({}, "`messages` must be a list of messages, got None"),
        ({"messages": []}, "`messages`"),
        ({"messages": "hello"}, "`messages`"),
        ({"messages": ["hello"]}, "message 1 must be an object"),
        ({"messages": [user("a"), {"role": "tool", "content": "b"}]}, "message 2 .* system, user, assistant"),
        ({"messages": [{"role": ["user"], "content": "b"}]}, "message 1"),
        ({"messages": [{**user("a"), "tool_calls": []}]}, "message 1 has the unsupported fields"),
        ({"messages": [user(None)]}, "content of message 1"),
        ({"messages": [user([])]}, "content of message 1"),
        ({"messages": [user([TEXT, {"type": "text", "text": 3}])]}, "part 2 of message 1"),
        ({"messages": [user([{"type": "input_audio", "input_audio": {}}])]}, "part 1 of message 1 must have the type"),
        ({"messages": [user([{"type": "image_url"}])]}, "has no `image_url`"),
        ({"messages": [user([{"type": "image_url", "image_url": "/etc/passwd"}])]}, "must be a data: URL"),
        ({"messages": [user([{"type": "image_url", "image_url": "file:///etc/passwd"}])]}, "must be a data: URL"),
        ({"messages": [user([{"type": "image_url", "image_url": "http://10.0.0.1/x"}])]}, "fetches none"),
        ({"messages": [{"role": "assistant", "content": [IMAGE]}, user("a")]}, "Only messages of the user"),
        ({"messages": [user("a"), {"role": "assistant", "content": "b"}]}, "last message must be of the user"),
        ({"messages": [user([IMAGE] * 9)]}, "9 images. At most 8"),
        ({"messages": [user("a" * 100_001)]}, "100001 characters. At most 100000"),
        ({"messages": [user("a")], "n": 2}, r"does not support \['n'\]"),
        ({"messages": [user("a")], "model": 3}, "`model`"),
        ({"messages": [user("a")], "stream": "yes"}, "`stream`"),
        ({"messages": [user("a")], "max_tokens": 10**9}, "`max_tokens` must be a whole number from 1 to 1024"),
        ({"messages": [user("a")], "max_tokens": True}, "`max_tokens`"),
        ({"messages": [user("a")], "temperature": float("nan")}, "`temperature`"),
        ({"messages": [user("a")], "top_p": 1.5}, "`top_p`"),
        ({"messages": [user("a")], "seed": -1}, "`seed`"),
        ({"messages": [user("a")], "stop": ["a"] * 5}, "`stop`"),
        ({"messages": [user("a")], "stop": [""]}, "`stop`"),
    ],
)
def test_rejected_requests_name_the_field(body, message):
    with pytest.raises(BadRequest, match=message) as error:
        check_request(body, Limits())
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
