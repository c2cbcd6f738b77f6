"""The card beside what is saved, and uploading it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm

import anypatch
from anypatch import CheckpointError


def _tiny() -> Any:
    return timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)


def test_what_a_card_says(tmp_path: Path) -> None:
    anypatch.save(_tiny(), tmp_path / "a")
    assert not (tmp_path / "a" / "README.md").exists()  # nothing was done
    model = anypatch.load(tmp_path / "a", 32, kernel="pi")
    anypatch.adapt(model, image_size=128, positions="host")
    anypatch.save(model, tmp_path / "b")
    text = (tmp_path / "b" / "README.md").read_text()
    for words in ("| patch size | 16x16 | 32x32 |", "| image size | 64x64 | 128x128 |", "| grid | 4x4 | 4x4 |",
                  "kernel `pi`", "positions `host`", f"timm {timm.__version__}", f"anypatch {anypatch.__version__}",
                  "library_name: timm", "`a`", "VisionTransformer"):  # fmt: skip
        assert words in text
    assert str(tmp_path) not in text
    again = anypatch.load(tmp_path / "b", 16)
    anypatch.save(again, tmp_path / "c")
    text = (tmp_path / "c" / "README.md").read_text()
    assert text.index("| patch size | 32x32 | 16x16 |") < text.index("| patch size | 16x16 | 32x32 |")


def test_the_cards_of_others_are_kept(tmp_path: Path) -> None:
    anypatch.save(_tiny(), tmp_path / "a")
    (tmp_path / "a" / "README.md").write_bytes(b"# Theirs\r\n")
    anypatch.save(anypatch.load(tmp_path / "a", 32), tmp_path / "b")
    anypatch.convert(tmp_path / "a", tmp_path / "c", patch_size=32)
    for place in ("b", "c"):
        assert (tmp_path / place / "README.md").read_bytes() == b"# Theirs\r\n"
        assert "| patch size | 16x16 | 32x32 |" in (tmp_path / place / "README.anypatch.md").read_text()
    assert (tmp_path / "b" / "README.anypatch.md").read_text() == (tmp_path / "c" / "README.anypatch.md").read_text()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "README.md").write_text("mine")
    anypatch.save(anypatch.adapt(_tiny(), 32), tmp_path / "d")
    assert (tmp_path / "d" / "README.md").read_text() == "mine"
    anypatch.save(anypatch.adapt(_tiny(), 8), tmp_path / "d")
    assert "| patch size | 16x16 | 8x8 |" in (tmp_path / "d" / "README.anypatch.md").read_text()


def test_licences_come_along_and_what_is_there_stays(tmp_path: Path) -> None:
    anypatch.save(_tiny(), tmp_path / "a")
    for name in ("README.md", "LICENSE", "NOTICE.txt"):
        (tmp_path / "a" / name).write_text(f"theirs: {name}")
    model = anypatch.load(tmp_path / "a", 32)
    anypatch.save(model, tmp_path / "b")
    anypatch.convert(tmp_path / "a", tmp_path / "c", patch_size=32)
    for place in ("b", "c"):
        for name in ("README.md", "LICENSE", "NOTICE.txt"):
            assert (tmp_path / place / name).read_text() == f"theirs: {name}"
    (tmp_path / "d").mkdir()
    for name in ("README.md", "LICENSE"):
        (tmp_path / "d" / name).write_text("mine")
    anypatch.save(model, tmp_path / "d")
    assert [(tmp_path / "d" / name).read_text() for name in ("README.md", "LICENSE")] == ["mine", "mine"]
    assert "| patch size | 16x16 | 32x32 |" in (tmp_path / "d" / "README.anypatch.md").read_text()


class Hub(BaseHTTPRequestHandler):
    """The few answers of a hub that an upload of small files needs."""

    files: dict[str, bytes]
    made: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        origin = f"http://127.0.0.1:{self.server.server_address[1]}"
        if self.headers.get("Authorization") != "Bearer secret":
            self._answer({"error": "no such token"}, 401)
        elif self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            self._answer({"url": f"{origin}/somebody/model", "id": "somebody/model"})
        elif self.path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\nlibrary_name: timm\n")
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self._answer({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                value = json.loads(line)
                if value["key"] == "file":
                    self.files[value["value"]["path"]] = base64.b64decode(value["value"]["content"])
            self._answer({"commitUrl": f"{origin}/somebody/model/commit/1", "commitOid": "1", "success": True})
        else:
            self._answer({"error": self.path}, 404)

    def do_GET(self) -> None:
        self._answer({"error": "nothing here"}, 404)

    def _answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # on loopback only
    Hub.files, Hub.made = {}, []
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_push_to_hub(hub: str, tmp_path: Path) -> None:
    model = anypatch.adapt(_tiny(), 32)
    address = anypatch.push_to_hub(model, "somebody/model", private=True, token="secret", endpoint=hub)
    assert address.endswith("/somebody/model/commit/1")
    assert Hub.made[0]["name"] == "model"
    anypatch.save(model, tmp_path / "out")
    assert Hub.files == {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert "README.md" in Hub.files


def test_what_the_hub_refuses(hub: str) -> None:
    with pytest.raises(CheckpointError, match="cannot upload to somebody/model"):
        anypatch.push_to_hub(anypatch.adapt(_tiny(), 32), "somebody/model", token="wrong", endpoint=hub)
    with pytest.raises(CheckpointError, match="cannot upload"):
        anypatch.push_to_hub(_tiny(), "somebody/model", token="secret", endpoint="http://127.0.0.1:9")
