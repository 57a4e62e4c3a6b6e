"""Reading texts, writing results, and the download of WikiText-2 from a server on this machine."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from turbokv import data
from turbokv.errors import TurbokvError

TEXT = b"A text of our own, for the download.\n" * 40
SHA256 = hashlib.sha256(TEXT).hexdigest()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# --- write_atomically, check_writable


def test_new_and_old_files_get_the_whole_content(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    for content in (b"first, and longer", b"second"):
        data.write_atomically(path, content)
        assert path.read_bytes() == content
        assert names(tmp_path) == ["result.json"]


def test_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(TurbokvError, match=r"cannot write .*result\.json: No space left on device"):
        data.write_atomically(path, b"new")
    assert names(tmp_path) == ["result.json"]
    assert path.read_bytes() == b"old"


def test_interrupted_write_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(b"old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.write_atomically(path, b"new")
    assert names(tmp_path) == ["result.json"]
    assert path.read_bytes() == b"old"


def test_write_to_a_device_or_pipe_does_not_replace_it(tmp_path: Path) -> None:
    """`--json /dev/stdout` by root must not turn /dev/stdout into a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        try:
            data.check_writable(pipe)
            data.write_atomically(pipe, b"content")
        except TurbokvError:
            pass  # refusing is as good as writing to it
        assert pipe.is_fifo()
    finally:
        os.close(reader)


def test_writable_place_passes_and_nothing_is_left_there(tmp_path: Path) -> None:
    data.check_writable(tmp_path / "result.json")
    assert names(tmp_path) == []
    (tmp_path / "result.json").write_bytes(b"old")
    data.check_writable(tmp_path / "result.json")
    assert (tmp_path / "result.json").read_bytes() == b"old"


def test_relative_file_name_is_checked_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data.check_writable(Path("result.json"))
    data.write_atomically(Path("result.json"), b"content")
    assert (tmp_path / "result.json").read_bytes() == b"content"


def test_unwritable_places_are_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, reason in [
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "result.json", "does not exist"),
        (tmp_path / "file" / "result.json", "cannot write"),
        (Path("/proc/result.json"), "cannot write"),  # root may write to any folder but this kind
    ]:
        with pytest.raises(TurbokvError, match=reason):
            data.check_writable(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a folder without write permission")
def test_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(TurbokvError, match="Permission denied"):
        data.check_writable(tmp_path / "result.json")


# --- read_text


def test_text_of_a_file_is_read_unchanged(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes("zwei\r\nZeilen: äöü\n".encode())
    assert data.read_text(str(tmp_path / "text.txt")) == "zwei\r\nZeilen: äöü\n"


def test_no_name_means_the_built_in_text() -> None:
    assert data.read_text(None).encode() == data.SAMPLE.read_bytes()


def test_unreadable_texts_are_refused_with_path_and_reason(tmp_path: Path) -> None:
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    for path, reason in [
        (tmp_path / "absent.txt", "there is no text at"),
        (tmp_path, "Is a directory"),
        (tmp_path / "latin1.txt", "is not UTF-8 text: .* at byte 3"),
        (tmp_path / "latin1.txt" / "below", "Not a directory"),
    ]:
        with pytest.raises(TurbokvError, match=reason) as error:
            data.read_text(str(path))
        assert str(path) in str(error.value)


# --- wikitext2

Reply = Callable[[BaseHTTPRequestHandler], None]


class Web:
    """A server on the loopback interface that gives every request the same reply, and counts them."""

    def __init__(self) -> None:
        self.reply: Reply = lambda handler: handler.send_error(500)
        self.requests = 0
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.requests += 1
                web.reply(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/wikitext.zip"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def web() -> Iterator[Web]:
    server = Web()
    yield server
    server.stop()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "cache"


def archive(member: str = data.WIKITEXT2_MEMBER, text: bytes = TEXT) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(member, text)
    return content.getvalue()


def sends(content: bytes, promised: int | None = None) -> Reply:
    def reply(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content) if promised is None else promised))
        handler.end_headers()
        handler.wfile.write(content)

    return reply


def damaged() -> bytes:
    """The archive with other bytes at the start of the compressed text."""
    start = 30 + len(data.WIKITEXT2_MEMBER)
    content = archive()
    return content[:start] + b"\xff" * 8 + content[start + 8 :]


def test_text_is_downloaded_once_and_checked(web: Web, cache: Path) -> None:
    web.reply = sends(archive())
    for _ in range(2):
        path = data.wikitext2(web.url, SHA256)
        assert path.read_bytes() == TEXT
    assert web.requests == 1
    assert cache in path.parents
    assert len(names(cache)) == 1


def test_cached_text_that_was_changed_is_downloaded_again(web: Web, cache: Path) -> None:
    web.reply = sends(archive())
    data.wikitext2(web.url, SHA256).write_bytes(b"changed")
    assert data.wikitext2(web.url, SHA256).read_bytes() == TEXT


def test_read_text_wikitext2_is_the_download(web: Web, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web.reply = sends(archive())
    monkeypatch.setattr(data.wikitext2, "__defaults__", (web.url, SHA256))
    assert data.read_text("wikitext2").encode() == TEXT


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (sends(archive(text=b"another text")), "gave a wiki.test.raw with SHA-256"),
        (sends(b"<html>please log in</html>"), "not a zip file"),
        (sends(archive("wikitext-2-raw/wiki.train.raw")), "no item named"),
        (sends(archive()[:-80]), "not a zip file"),
        (sends(archive()[:90], promised=len(archive())), "could not be downloaded"),
        (sends(damaged()), "could not be downloaded"),
        (lambda handler: handler.send_error(404), "404"),
    ],
    ids=["other-text", "not-a-zip", "no-member", "cut-zip", "cut-transfer", "damaged-zip", "http-404"],
)
def test_bad_download_is_refused_and_nothing_is_kept(web: Web, cache: Path, reply: Reply, reason: str) -> None:
    web.reply = reply
    with pytest.raises(TurbokvError, match=reason) as error:
        data.wikitext2(web.url, SHA256)
    assert web.url in str(error.value)
    assert names(cache.parent) == []


def test_server_that_is_gone_is_named_with_what_to_do_instead(web: Web, cache: Path) -> None:
    web.server.server_close()
    with pytest.raises(TurbokvError, match="-f FILE") as error:
        data.wikitext2(web.url, SHA256)
    assert web.url in str(error.value)
    assert names(cache.parent) == []


def test_pinned_checksum_is_that_of_wikitext2(repo: Path) -> None:
    text = repo.parent / "shared" / "eval" / "wiki.test.raw"
    if not text.is_file():
        pytest.skip(f"no {text}")
    assert hashlib.sha256(text.read_bytes()).hexdigest() == data.WIKITEXT2_SHA256
