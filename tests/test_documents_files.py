"""Files are replaced whole or not at all, also when killed, without room or without permission."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from one_liners import one_line

from gemopt import documents
from gemopt.documents import check_writable, read_json, replacing, sha256, write_text
from gemopt.exceptions import InputError
from gemopt.profile import Profile


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_an_exception_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as stream:
        stream.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old" and leftovers(tmp_path) == []


def test_a_full_disk_leaves_the_old_file_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(documents.os, "fsync", full)
    with pytest.raises(InputError) as error:
        write_text(path, "new")
    assert "No space left" in one_line(error)
    assert path.read_text() == "old" and leftovers(tmp_path) == []


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")
    code = (
        "import os, sys\nfrom gemopt.documents import replacing\n"
        "with replacing(sys.argv[1]) as stream:\n    stream.write(b'x' * 100000)\n    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == -9
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["a.json"]


def test_the_mode_of_a_new_file_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_links_are_followed_and_devices_and_folders_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
        for write in (lambda path: write_text(path, "x"), check_writable):
            with pytest.raises(InputError) as error:
                write(target)
            assert str(target) in one_line(error)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and Path("/dev/null").is_char_device()


def test_a_missing_folder_is_refused_before_and_while_writing(tmp_path: Path) -> None:
    for write in (lambda path: write_text(path, "x"), check_writable):
        with pytest.raises(InputError) as error:
            write(tmp_path / "none" / "a.json")
        assert "none/a.json" in one_line(error)
    check_writable(tmp_path / "fine.json")
    assert list(tmp_path.iterdir()) == []


def test_the_digest_of_a_folder_leaves_out_what_is_still_being_written(tmp_path: Path) -> None:
    (tmp_path / "000000.safetensors").write_bytes(b"x")
    before = sha256(tmp_path)
    (tmp_path / ".000001.safetensors.tmp").write_bytes(b"y")
    assert sha256(tmp_path) == before
    (tmp_path / "000001.safetensors").write_bytes(b"y")
    assert sha256(tmp_path) != before


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path, tmp_path / "none.json"):
        with pytest.raises(InputError) as error:
            Profile.load(path)
        assert str(path) in one_line(error)
    path = tmp_path / "big.json"
    path.write_bytes(b" " * 100)
    with pytest.raises(InputError, match="at most 99 bytes"):
        documents.read_bytes(path, limit_bytes=99)
    assert len(documents.read_bytes(path, limit_bytes=100)) == 100


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "{}")
    path.chmod(0)
    with pytest.raises(InputError, match="Permission denied"):
        read_json(path)
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="permission"):
        check_writable(path)
    tmp_path.chmod(0o700)
