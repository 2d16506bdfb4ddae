"""Who is refused, and with what headers the page comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from live_client import Client, eventually
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from nasa_video.serve.app import Server


def test_the_page_is_bound_by_a_strict_policy(server: Server) -> None:
    for path in ("", "docs", "page/app.js", "healthz"):
        answer = httpx.get(server.address + path)
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    page = httpx.get(server.address).text
    assert "<script>" not in page
    assert "style=" not in page
    assert "://" not in page, "nothing comes from elsewhere"


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "evil.example:8000", "[", ""])
def test_a_foreign_host_is_refused(server: Server, host: str) -> None:
    assert httpx.get(f"{server.address}healthz", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost:9999", "127.0.0.1", "[::1]:8000"])
def test_a_tunnel_may_have_another_port(server: Server, host: str) -> None:
    assert httpx.get(f"{server.address}healthz", headers={"host": host}).status_code == 200


def test_a_foreign_origin_is_refused(server: Server) -> None:
    address = f"{server.address.replace('http', 'ws')}ws"
    for origin in ("http://evil.example", "null", "http://localhost:1"):
        with pytest.raises(InvalidStatus) as refused:
            connect(address, origin=origin)  # type: ignore[arg-type]
        assert refused.value.response.status_code == 403
        posted = httpx.post(f"{server.address}v1/videos", json={"prompt": "a"}, headers={"origin": origin})
        assert posted.status_code == 403
    connect(address, origin=server.address.rstrip("/")).close()  # type: ignore[arg-type]


def test_a_token_is_needed_where_there_is_one(serve: Callable[..., Server], client_of: Any) -> None:
    server = serve(token="a secret")
    address = f"{server.address.replace('http', 'ws')}ws"
    for headers in ({}, {"authorization": "Bearer wrong"}, {"cookie": "nasa-video-0=a secret"}):
        with pytest.raises(InvalidStatus) as refused:
            connect(address, additional_headers=headers)
        assert refused.value.response.status_code == 403
        assert httpx.get(f"{server.address}models", headers=headers).status_code == 401
    for open_to_all in ("", "healthz", "page/app.js"):
        assert httpx.get(server.address + open_to_all).status_code == 200
    with httpx.Client(base_url=server.address) as http:
        assert http.post("login", json={"token": "wrong"}).status_code == 401
        answer = http.post("login", json={"token": "a secret"})
        assert answer.status_code == 204
        assert "httponly" in answer.headers["set-cookie"].lower()
        assert "samesite=strict" in answer.headers["set-cookie"].lower()
        assert http.get("models").status_code == 200
        assert [http.post("login", json={"token": "x"}).status_code for _ in range(4)][-1] == 429
    client: Client = client_of(server, additional_headers={"authorization": "Bearer a secret"})
    client.start()


def test_nobody_uses_up_the_attempts_of_another_address(serve: Callable[..., Server]) -> None:
    server = serve(token="a secret", posts_per_second=2.0)

    def client(address: str) -> httpx.Client:
        url = server.address.replace("localhost", "127.0.0.1")
        return httpx.Client(base_url=url, transport=httpx.HTTPTransport(local_address=address))

    with client("127.0.0.2") as one, client("127.0.0.3") as other:
        assert 429 in [one.post("login", json={"token": "guess"}).status_code for _ in range(40)]
        assert other.post("login", json={"token": "a secret"}).status_code == 204


def test_beyond_loopback_a_token_is_made_up(serve: Callable[..., Server]) -> None:
    server = serve(host="0.0.0.0")
    assert server.settings.token
    assert "#token=" in server.address_with_token
    assert httpx.get(f"{server.address}models").status_code == 401
    bearer = {"authorization": f"Bearer {server.settings.token}"}
    assert httpx.get(f"{server.address}models", headers=bearer).status_code == 200


def test_bodies_have_a_limit(server: Server) -> None:
    long = b'{"prompt": "' + b"a" * 70_000 + b'"}'
    assert httpx.post(f"{server.address}v1/videos", content=long).status_code == 413

    def in_pieces() -> Any:
        for _ in range(70):
            yield b"a" * 1024

    answer = httpx.post(f"{server.address}v1/videos", content=in_pieces())
    assert answer.status_code in (400, 413, 422)


def test_posts_have_a_rate(serve: Callable[..., Server]) -> None:
    server = serve(posts_per_second=2.0)
    answers = [httpx.post(f"{server.address}v1/videos", json={"prompt": ""}).status_code for _ in range(12)]
    assert 429 in answers


@pytest.mark.parametrize("path", ["../settings.py", "%2e%2e/settings.py", "page/../session.py", "page/%2e%2e/app.py"])
def test_no_path_from_the_network_is_opened(server: Server, path: str) -> None:
    assert httpx.get(f"{server.address}{path}").status_code == 404
    assert httpx.get(f"{server.address}v1/streams/{path}/video.mp4").status_code in (404, 422)


def test_sessions_are_counted(serve: Callable[..., Server], client_of: Any) -> None:
    server = serve(max_sessions=1)
    first = client_of(server)
    first.close()
    eventually(lambda: server.state.sessions == 0)
    client_of(server)
    assert server.state.sessions == 1


def test_a_token_may_be_any_text(serve: Callable[..., Server]) -> None:
    server = serve(token="пароль ☂")
    with httpx.Client(base_url=server.address) as http:
        assert http.post("login", json={"token": "пароль ☂"}).status_code == 204
        assert http.get("models").status_code == 200
    bearer = {"authorization": "Bearer пароль ☂".encode()}
    assert httpx.get(f"{server.address}models", headers=bearer).status_code == 200


@pytest.mark.parametrize(
    "body", [b'{"prompt":"x","scale":NaN}', b'{"prompt":"x","steps":1e999}', b'{"prompt":"\\ud800"}', b"[" * 50_000]
)
def test_a_body_that_json_cannot_hold_is_refused(server: Server, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server.address}v1/videos", content=body, headers=headers)
    assert answer.status_code in (400, 422)
    login = httpx.post(f"{server.address}login", content=body.replace(b"prompt", b"token"), headers=headers)
    assert login.status_code in (204, 400, 401, 422), "no token is needed here"
