"""Serve the demo's export and ask it about unseen pictures: `python data/shapes/ask.py export=DIR raw=DIR`.

Starts `vlm-nemo serve` on a free port of this machine, asks one held-out question of each listed kind with the official
openai client, prints question, answer and truth, and stops the server.
"""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

KINDS = ("colour", "shape", "count", "word")
PATIENCE = 120
"""Seconds that the server may take to be ready."""


def main() -> None:
    given = dict(word.partition("=")[::2] for word in sys.argv[1:])
    if set(given) != {"export", "raw"}:
        sys.exit("give export=DIR (what `vlm-nemo export` wrote) and raw=DIR (what prepare.py wrote)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["serve", f"export={given['export']}", f"serve.port={port}", "serve.access_log=false"]
    server = subprocess.Popen([sys.executable, "-m", "vlm_nemo", *words])
    try:
        wait_until_ready(server, f"http://127.0.0.1:{port}/v1/health/ready")
        ask(f"http://127.0.0.1:{port}/v1", Path(given["raw"]))
    finally:
        server.terminate()
        server.wait(30)


def wait_until_ready(server: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if server.poll() is not None:
            sys.exit("the server ended before it was ready")
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    sys.exit(f"the server was not ready within {PATIENCE} seconds")


def ask(url: str, raw: Path) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="unused")
    model = client.models.list().data[0].id
    rows = json.loads((raw / "eval.json").read_text())
    for kind in KINDS:
        row = next(row for row in rows if row["kind"] == kind)
        asked, truth = (turn["value"] for turn in row["conversations"])
        question = asked.removeprefix("<image>\n")
        picture = base64.b64encode((raw / "eval_images" / row["image"]).read_bytes()).decode()
        content = [
            {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}},
            {"type": "text", "text": question},
        ]
        reply = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": content}], temperature=0, max_tokens=8
        )
        said = (reply.choices[0].message.content or "").strip()
        print(f"  {row['image']:<18} {question:<42} answer: {said:<10} truth: {truth}")


if __name__ == "__main__":
    main()
