"""Who may ask: API key, host name, address; and what the log and the headers tell."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from vlm_nemo.serve.config import ServeConfig
from vlm_nemo.serve.run import KEY_VARIABLE, bind, hosts, is_local, read_key
from vlm_nemo.serve.run import Server as Running
from vlm_nemo.types import UserError

from .parrot import Parrot, http, served, until, user

KEY = "sk-a-key-that-nobody-knows"
ROUTES = (
    "/v1/models",
    "/v1/models/parrot",
    "/v1/health/live",
    "/v1/health/ready",
    "/v1/metadata",
    "/v1/version",
    "/v1/metrics",
    "/metrics",
    "/v1/nothing",
)


@pytest.fixture
def keyed(parrot: Parrot, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with served(parrot, access_log=True) as server:
        yield server


def test_every_route_but_the_empty_page_asks_for_the_key(keyed: Running) -> None:
    for path in ROUTES:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"}):
            response = http.get(keyed.url + path, headers=headers)
            assert response.status_code == 401, path
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert KEY not in response.text
        status = 404 if path.endswith("nothing") else 200
        assert http.get(keyed.url + path, headers={"authorization": f"Bearer {KEY}"}).status_code == status
    assert http.get(keyed.url + "/").status_code == 200
    assert http.post(f"{keyed.url}/v1/chat/completions", json={"messages": user("x")}).status_code == 401


def test_the_openai_client_with_and_without_the_key(keyed: Running) -> None:
    for key, fits in ((KEY, True), ("wrong", False)):
        with openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=key, max_retries=0) as client:
            if fits:
                assert client.models.list().data[0].id == "parrot"
            else:
                with pytest.raises(openai.AuthenticationError):
                    client.models.list()


def test_the_log_has_neither_keys_nor_bodies(keyed: Running, caplog: pytest.LogCaptureFixture) -> None:
    name = "vlm_nemo.serve.access"
    with caplog.at_level(logging.INFO, logger=name):
        headers = {"authorization": f"Bearer {KEY}"}
        body = {"messages": user("a private question"), "max_tokens": 1}
        http.post(f"{keyed.url}/v1/chat/completions?token=private", json=body, headers=headers)
        http.get(f"{keyed.url}/a%0Aforged%20line", headers=headers)
        until(lambda: "forged" in caplog.text)  # a line is written when its answer is out
    lines = [record.getMessage() for record in caplog.records if record.name == name]
    assert lines[0].startswith("127.0.0.1 POST /v1/chat/completions 200 ")
    assert lines[1].startswith("127.0.0.1 GET /a%0Aforged%20line 404 ")
    assert KEY not in caplog.text and "private" not in caplog.text


def test_keys_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(f"{KEY}\n")
    assert read_key(ServeConfig(api_key_file=str(tmp_path / "key"))) == KEY
    assert read_key(ServeConfig()) is None
    for content in ("", "\n", "two words\n", "ü\n"):
        (tmp_path / "key").write_text(content)
        with pytest.raises(UserError, match="holds no key"):
            read_key(ServeConfig(api_key_file=str(tmp_path / "key")))
    with pytest.raises(UserError, match="cannot be read"):
        read_key(ServeConfig(api_key_file=str(tmp_path / "other")))


def test_an_empty_key_is_no_open_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "")
    with pytest.raises(UserError, match=f"{KEY_VARIABLE} holds no key"):
        read_key(ServeConfig())


# --- host names and addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("my.name", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example:80", 403),
        ("[::1].evil.example", 200),  # no name of DNS: brackets hold addresses only
        ("", 403),
    ],
)
def test_another_sites_name_is_not_served(parrot_server: Running, host: str, status: int) -> None:
    for path in ("/", "/v1/models"):
        assert http.get(parrot_server.url + path, headers={"host": host}).status_code == status


@pytest.fixture(scope="module")
def parrot_server(tokenizer: object) -> object:
    with served(Parrot(tokenizer), allowed_hosts=["My.Name"]) as server:  # type: ignore[arg-type]
        yield server


def test_addresses_that_others_reach_need_a_key() -> None:
    assert all(is_local(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"))
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.com", "localhost.example.com"):
        assert not is_local(host)
        with pytest.raises(
            UserError, match=f"serve.host={host} can be reached from other machines: set {KEY_VARIABLE}"
        ):
            bind(ServeConfig(host=host, port=0), None)
    bind(ServeConfig(host="0.0.0.0", port=0), KEY).close()
    bind(ServeConfig(host="0.0.0.0", port=0, insecure=True), None).close()
    assert hosts(ServeConfig(host="0.0.0.0")) is None
    assert "here.example" in (hosts(ServeConfig(host="0.0.0.0", allowed_hosts=["here.example"])) or ())


def test_a_port_that_is_taken_or_none(parrot_server: Running) -> None:
    port = int(parrot_server.url.rpartition(":")[2])
    with pytest.raises(UserError, match=f"serve.port={port}: Address already in use; choose another"):
        bind(ServeConfig(port=port), None)
    with pytest.raises(UserError, match="serve.port=99999 is no port"):
        bind(ServeConfig(port=99999), None)


def test_no_other_site_is_let_in(parrot_server: Running) -> None:
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    response = http.options(f"{parrot_server.url}/v1/chat/completions", headers=headers)
    assert response.status_code == 405
    assert not [name for name in response.headers if name.startswith("access-control")]
    page = http.get(parrot_server.url + "/")
    assert page.headers["x-content-type-options"] == "nosniff" and "server" not in page.headers
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy


# --- the other routes ---------------------------------------------------------------------------------------------


def test_health_version_and_metadata(parrot_server: Running) -> None:
    def get(path: str) -> object:
        return http.get(parrot_server.url + path).json()

    assert get("/v1/health/ready") == {"object": "health.response", "message": "Service is ready."}
    assert get("/v1/health/live") == {"object": "health.response", "message": "Service is live."}
    assert set(get("/v1/version")) == {"release", "api"}
    metadata = http.get(f"{parrot_server.url}/v1/metadata")
    assert metadata.json()["model"] == {"backend": "parrot", "precision": "fp32", "context_length": 400}
    assert metadata.json()["image"] == {"size": 16, "layout": "square", "aspect": "squash", "tokens": 4}
    assert "secret" not in metadata.text  # where the model lies on this machine


def test_importing_the_server_needs_no_torch() -> None:
    code = (
        "import sys, vlm_nemo.serve.run, vlm_nemo.verbs.serve; sys.exit(bool({'torch', 'megatron'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- a process ----------------------------------------------------------------------------------------------------

PROCESS = """
import sys
from pathlib import Path
from tests.serve.parrot import Parrot, make_model, make_tokenizer
from vlm_nemo.serve.config import ServeConfig
from vlm_nemo.serve.run import serve
from vlm_nemo.types import UserError
def load():
    if sys.argv[2] == "bad":
        raise UserError("the folder is no model")
    return make_model(Parrot(make_tokenizer(Path(sys.argv[1]))))
serve(load, ServeConfig(port=0))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_well(number: signal.Signals, tmp_path: Path) -> None:
    with start(tmp_path, "good") as process:
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        assert line.startswith("serving parrot at http://127.0.0.1:") and line.endswith(" (ctrl-c ends it)\n")
        assert http.get(line.split()[3] + "/v1/health/ready").status_code == 200
        assert http.get(line.split()[3] + "/v1/version").status_code == 200
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out) == (0, b"")
        assert err.decode().count("\n") == 1 and "GET /v1/version 200" in err.decode()  # probes are not logged


def test_a_model_that_cannot_be_opened_ends_the_process(tmp_path: Path) -> None:
    with start(tmp_path, "bad") as process:
        out, err = process.communicate(timeout=20)
        assert process.returncode != 0 and out == b""
        assert err.decode().rstrip().endswith("UserError: the folder is no model")


def start(folder: Path, kind: str) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if k != KEY_VARIABLE}
    command = [sys.executable, "-c", PROCESS, str(folder), kind]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
