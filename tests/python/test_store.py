"""Records on disk: nothing that was recorded is lost, and nothing half-written is read."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import stat
from pathlib import Path

import pytest
from sample_records import kld_result, record
from turbokv import store
from turbokv.errors import TurbokvError


def test_what_is_appended_is_read(tmp_path: Path) -> None:
    records = [record(id=f"{i:016x}") for i in range(3)]
    for item in records:
        store.append(tmp_path, item)
    assert store.read(tmp_path) == records
    assert store.read(tmp_path / "runs.jsonl") == records


def test_the_last_record_of_an_id_counts(tmp_path: Path) -> None:
    old, other, new = record(id="a" * 16), record(id="b" * 16), record(id="a" * 16, seconds=9.0)
    assert store.latest([old, other, new]) == [new, other]


@pytest.mark.parametrize("left", [b"{", b'{"schema_version":1,"id":"0123'])
def test_what_a_kill_left_of_a_line_is_passed_over_and_cut_off(tmp_path: Path, left: bytes) -> None:
    store.append(tmp_path, record(id="a" * 16))
    with (tmp_path / "runs.jsonl").open("ab") as file:
        file.write(left)
    assert [item.id for item in store.read(tmp_path)] == ["a" * 16]
    store.append(tmp_path, record(id="b" * 16))
    assert [item.id for item in store.read(tmp_path)] == ["a" * 16, "b" * 16]
    assert left + b"\n" not in (tmp_path / "runs.jsonl").read_bytes()


def test_a_long_rest_of_a_line_is_cut_off_too(tmp_path: Path) -> None:
    store.append(tmp_path, record(id="a" * 16))
    with (tmp_path / "runs.jsonl").open("ab") as file:
        file.write(b"x" * 10_000)
    store.append(tmp_path, record(id="b" * 16))
    assert [item.id for item in store.read(tmp_path)] == ["a" * 16, "b" * 16]


def test_a_damaged_line_is_named_and_not_skipped(tmp_path: Path) -> None:
    store.append(tmp_path, record())
    file = tmp_path / "runs.jsonl"
    file.write_text(file.read_text() + '{"id": 3}\n')
    with pytest.raises(TurbokvError, match=r"runs\.jsonl line 2 is no record"):
        store.read(tmp_path)


def test_a_record_of_a_newer_turbokv_is_named_as_that(tmp_path: Path) -> None:
    line = json.loads(record().model_dump_json()) | {"schema_version": 99}
    (tmp_path / "runs.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(TurbokvError, match="schema version 99"):
        store.read(tmp_path)


def test_numbers_that_json_lacks_are_refused() -> None:
    text = record(result=kld_result(ppl=float("nan"))).model_dump_json()
    assert "NaN" not in text
    assert json.loads(text)["result"]["ppl"] is None


def test_no_results_is_said_with_the_command_that_makes_some(tmp_path: Path) -> None:
    with pytest.raises(TurbokvError, match="turbokv sweep"):
        store.read(tmp_path)


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TurbokvError, match="cannot write"):
        store.append(tmp_path / "file" / "folder", record())


def test_full_disk_leaves_what_was_recorded(tmp_path: Path) -> None:
    """A file size limit stands in for the disk: the write stops in the middle of the line."""
    store.append(tmp_path, record(id="a" * 16))
    before = (tmp_path / "runs.jsonl").read_bytes()
    process = multiprocessing.get_context("fork").Process(target=_append_with_limit, args=(tmp_path, len(before) + 100))
    process.start()
    process.join()
    assert process.exitcode == 7  # TurbokvError with the fix
    assert (tmp_path / "runs.jsonl").read_bytes() == before


def _append_with_limit(folder: Path, size: int) -> None:
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        store.append(folder, record(id="b" * 16))
    except TurbokvError as error:
        os._exit(7 if "Free some space" in str(error) else 8)
    os._exit(0)


def test_many_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(tmp_path, i)) for i in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(item.id for item in store.read(tmp_path)) == sorted(
        f"{i}{k:015x}" for i in range(4) for k in range(10)
    )


def _append_many(folder: Path, writer: int) -> None:
    for k in range(10):
        store.append(folder, record(id=f"{writer}{k:015x}"))


def test_file_mode_lets_others_read(tmp_path: Path) -> None:
    store.append(tmp_path, record())
    assert stat.S_IMODE((tmp_path / "runs.jsonl").stat().st_mode) & 0o400
