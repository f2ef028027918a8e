"""The site secret: who creates it, who may read it, and which files are rejected."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from django_promports import secret
from tests.commands import BECOME_NOBODY, run_python

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "ledgers"
    folder.mkdir(0o700)
    return folder


def test_a_secret_is_made_once_and_is_for_its_user_only(folder: Path) -> None:
    before = os.umask(0o777)
    try:
        made = secret.make_secret(folder)
    finally:
        os.umask(before)

    assert made is not None
    assert secret.make_secret(folder) is None
    assert secret.read_secret(folder) == made
    assert len(made) == secret.LENGTH
    assert stat.S_IMODE((folder / secret.NAME).stat().st_mode) == 0o600
    assert os.listdir(folder) == [secret.NAME]


RACE = """
import os, sys
from pathlib import Path
from django_promports import secret

folder = Path(sys.argv[1])
(gate, open_gate), (results, report) = os.pipe(), os.pipe()
for _ in range(32):
    if os.fork() == 0:
        os.close(open_gate)
        os.read(gate, 1)
        try:
            secret.make_secret(folder)
            found = secret.read_secret(folder)
            os.write(report, f"{found.hex()}\\n".encode())
        except BaseException as error:
            os.write(report, f"{error!r}\\n".encode())
        os._exit(0)
os.close(open_gate)
os.close(report)
for _ in range(32):
    os.wait()
print(open(results).read())
"""


def test_32_processes_that_start_at_once_have_the_same_secret(folder: Path) -> None:
    done = run_python(RACE, str(folder))

    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 32
    assert len(set(done.stdout.split())) == 1, done.stdout
    assert os.listdir(folder) == [secret.NAME]


def _write(content: bytes, mode: int = 0o600) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        path.write_bytes(content)
        path.chmod(mode)

    return make


def _link(path: Path) -> None:
    elsewhere = path.with_name("elsewhere")
    elsewhere.write_bytes(b"x" * secret.LENGTH)
    elsewhere.chmod(0o600)
    path.symlink_to(elsewhere)


def _write_huge(path: Path) -> None:
    path.write_bytes(b"x" * secret.LENGTH)
    path.chmod(0o600)
    os.truncate(path, 1 << 40)


BAD: dict[str, Callable[[Path], object]] = {
    "empty": _write(b""),
    "torn": _write(b"x" * (secret.LENGTH - 1)),
    "long": _write(b"x" * (secret.LENGTH + 1)),
    "zeros": _write(bytes(secret.LENGTH)),
    "group": _write(b"x" * secret.LENGTH, 0o640),
    "others": _write(b"x" * secret.LENGTH, 0o604),
    "unreadable": _write(b"x" * secret.LENGTH, 0o000),
    "huge": _write_huge,
    "link": _link,
    "fifo": os.mkfifo,
}


@pytest.mark.parametrize("kind", [kind for kind in BAD if kind != "unreadable" or os.geteuid() != 0])
def test_a_bad_secret_is_not_believed_and_replaced(kind: str, folder: Path) -> None:
    BAD[kind](folder / secret.NAME)

    assert secret.read_secret(folder) is None
    made = secret.make_secret(folder)

    assert made not in (None, b"x" * secret.LENGTH)
    assert secret.read_secret(folder) == made
    assert stat.S_ISREG((folder / secret.NAME).lstat().st_mode)
    if kind == "link":
        assert (folder / "elsewhere").read_bytes() == b"x" * secret.LENGTH


def test_what_cannot_be_replaced_is_an_error(folder: Path) -> None:
    (folder / secret.NAME).mkdir()

    assert secret.read_secret(folder) is None
    with pytest.raises(OSError, match="Is a directory"):
        secret.make_secret(folder)
    assert os.listdir(folder) == [secret.NAME]


@needs_root
def test_the_file_of_another_user_is_refused_and_left_alone(folder: Path) -> None:
    path = folder / secret.NAME
    _write(b"x" * secret.LENGTH)(path)
    os.chown(path, 65534, 65534)

    assert secret.read_secret(folder) is None
    with pytest.raises(PermissionError, match=r"belongs to another user .*; remove it"):
        secret.make_secret(folder)
    assert path.read_bytes() == b"x" * secret.LENGTH


def test_a_folder_in_which_others_may_write_has_no_secret(folder: Path) -> None:
    secret.make_secret(folder)
    folder.chmod(0o770)

    assert secret.read_secret(folder) is None


@needs_root
def test_root_believes_the_folder_of_another_user_only_where_it_asks_and_nobody_could_have_made_it() -> None:
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "ledgers")
        folder.mkdir(0o700)
        made = secret.make_secret(folder)
        os.chown(folder / secret.NAME, 65534, 65534)
        os.chown(folder, 65534, 65534)

        assert secret.read_secret(folder) is None
        assert secret.read_secret(folder, foreign=True) == made
        os.chmod(parent, 0o1777)
        assert secret.read_secret(folder, foreign=True) is None
        code = f"{BECOME_NOBODY}from django_promports.secret import *\nprint(read_secret(Path({str(folder)!r})).hex())"
        assert (
            run_python(f"from pathlib import Path\nimport django_promports.secret\n{code}").stdout.strip()
            == (made or b"").hex()
        )


def test_a_secret_is_taken_back_only_by_who_made_it(folder: Path) -> None:
    made = secret.make_secret(folder)
    assert made is not None

    secret.remove_secret(folder, b"another")
    assert secret.read_secret(folder) == made
    secret.remove_secret(folder, made)
    assert os.listdir(folder) == []
    secret.remove_secret(folder, made)


def test_a_key_follows_from_its_text_and_purpose() -> None:
    keys = {secret.derive_key(text, purpose) for text in (b"a", b"b") for purpose in ("token", "SECRET_KEY")}

    assert len(keys) == 4
    assert secret.derive_key(b"a", "token") in keys
    assert all(len(key) == secret.LENGTH for key in keys)
