"""The cache of packages: what is found in it, what is never taken for a package, and what may be removed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from samples import DIGITS
from vlpack.builder import build
from vlpack.errors import CheckpointError, OptionError
from vlpack.package import manifest
from vlpack.store import changes
from vlpack.store.changes import remove, reserve
from vlpack.store.packages import Key, find, named, packages, sidecar, write_sidecar
from vlpack.store.place import packages_folder

FIRST, SECOND = "0" * 40, "1" * 40
KEY = Key("org/name", FIRST, "int8")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(DIGITS, tmp_path_factory.mktemp("built") / "digits").folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLPACK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packages"


def put(built: Path, key: Key = KEY, revisions: dict[str, float] | None = None) -> Path:
    folder = packages_folder() / key.name
    shutil.copytree(built, folder)
    write_sidecar(folder, key, revisions or {"main": 5.0}, source_bytes=7)
    return folder


def names() -> list[str]:
    return [package.name for package in packages()]


def test_the_place_follows_the_environment(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert packages_folder() == cache
    monkeypatch.setenv("VLPACK_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert packages_folder().parts[-2:] != cache.parts[-2:]
    assert packages_folder().name == "packages"
    (tmp_path / "file").touch()
    monkeypatch.setenv("VLPACK_CACHE", str(tmp_path / "file"))
    with pytest.raises(OptionError, match="is a file"):
        packages_folder()


def test_a_package_is_found_by_what_it_was_made_from(built: Path) -> None:
    folder = put(built)
    found = find("org/name", None, "int8")
    assert found is not None
    assert (found.folder, found.key, found.source_bytes) == (folder, KEY, 7)
    assert found.bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert find("org/name", "main", "int8") == find("org/name", FIRST, "int8") == found
    assert named(found.name) == found
    assert find("org/name", "v1", "int8") is None
    assert find("org/name", None, "int4") is None
    assert find("org/other", None, "int8") is None
    assert find("org/name", None, "int8", {"part": "text"}) is None


def test_the_last_commit_of_a_branch_is_found(built: Path) -> None:
    put(built, KEY, {"main": 5.0, "v1": 5.0})
    put(built, Key("org/name", SECOND, "int8"), {"main": 6.0})
    for revision, commit in ((None, SECOND), ("main", SECOND), ("v1", FIRST), (FIRST, FIRST)):
        found = find("org/name", revision, "int8")
        assert found is not None
        assert found.key.commit == commit


def test_a_package_of_another_format_is_not_found(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(built)
    monkeypatch.setattr(manifest, "FORMAT", manifest.FORMAT + 1)
    assert find("org/name", None, "int8") is None
    assert names() == [KEY.name]  # still listed, so that it can be removed
    assert Key("org/name", FIRST, "int8").name != KEY.name
    assert remove(KEY.name)[0] == KEY.name
    assert names() == []


def test_options_have_names_of_their_own() -> None:
    plain = [Key("a/b", FIRST, "int8", options).name for options in ({}, {"part": "text"}, {"calibrate": "self"})]
    assert plain[0] == "a--b@000000000000-int8"
    assert plain[2].startswith(f"{plain[0]}-calibrated-")
    assert len(set(plain)) == 3


@pytest.mark.parametrize(
    ("repository", "commit", "precision"),
    [
        *(
            (name, FIRST, "int8")
            for name in ("../x", "a/..", "a/b/c", "a", "/a/b", "a\\b/c", "a/b\n", "a/" + "b" * 300)
        ),
        ("a/b", "main", "int8"),
        ("a/b", FIRST, "../x"),
    ],
)
def test_no_name_leads_out_of_the_cache(repository: str, commit: str, precision: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be kept in the cache"):
        Key(repository, commit, precision)


DAMAGE = {
    "no json": "nothing",
    "a list": "[]",
    "empty": "{}",
    "key twice": '{"repository": "org/name", "repository": "org/name"}',
    "another repository": json.dumps({"repository": "org/other"}),
    "another commit": json.dumps({"commit": SECOND}),
    "options": json.dumps({"options": []}),
    "revisions": json.dumps({"revisions": {"main": "yesterday"}}),
    "created": json.dumps({"created": 1e300}),
    "path": json.dumps({"repository": "../../name"}),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_sidecar_is_no_sidecar(case: str, built: Path) -> None:
    folder = put(built)
    assert names() == [KEY.name]
    text = DAMAGE[case]
    if text.startswith('{"') and case != "key twice":
        text = json.dumps({**json.loads(sidecar(folder).read_text()), **json.loads(text)})
    sidecar(folder).write_text(text)
    assert names() == []
    with pytest.raises(OptionError, match="There is no package"):
        remove(KEY.name)
    assert folder.is_dir()


@pytest.mark.parametrize("name", ["..", "../outside", ".", ".locks", "/etc", "org--name@000000000000-int8/..", ""])
def test_remove_refuses_what_is_not_a_name(name: str, built: Path, cache: Path) -> None:
    put(built)
    before = sorted(cache.iterdir())
    with pytest.raises(OptionError, match="There is no package"):
        remove(name)
    assert sorted(cache.iterdir()) == before


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_are_not_followed(built: Path, cache: Path, tmp_path: Path) -> None:
    folder = put(built)
    outside = tmp_path / "outside"
    folder.rename(outside)
    folder.symlink_to(outside)
    assert names() == []
    with pytest.raises(OptionError, match="There is no package"):
        remove(KEY.name)
    with pytest.raises(OptionError, match="is a link"), reserve(KEY, None, print):
        pass
    assert (outside / "vlpack.json").is_file()
    folder.unlink()
    outside.rename(folder)
    moved = tmp_path / "sidecar.json"
    sidecar(folder).rename(moved)
    sidecar(folder).symlink_to(moved)
    assert names() == []


def test_remove_takes_a_hub_id_of_one_package(built: Path, cache: Path) -> None:
    folder = put(built)
    size = sum(path.stat().st_size for path in folder.iterdir())
    other = Key("org/name", FIRST, "int4")
    put(built, other)
    with pytest.raises(OptionError, match="There are 2 packages"):
        remove("org/name")
    assert remove(other.name)[0] == other.name
    assert remove("org/name@main") == (KEY.name, size)
    assert [path.name for path in cache.iterdir()] == [".locks"]


def test_remove_keeps_a_folder_with_foreign_files(built: Path) -> None:
    folder = put(built)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OptionError, match=r"contains 'notes\.txt'"):
        remove(KEY.name)
    assert names() == [KEY.name]


def test_remove_refuses_while_the_package_is_being_built(built: Path) -> None:
    put(built)
    with reserve(KEY, None, print), pytest.raises(OptionError, match="is being built by another process"):
        remove(KEY.name)
    assert remove(KEY.name)[0] == KEY.name


def test_leftovers_are_removed_and_those_of_running_builds_kept(built: Path, cache: Path) -> None:
    put(built)
    other = Key("org/other", FIRST, "int8")
    for name in (f".{other.name}.partial-01234567", f".{other.name}.removed-01234567", "..partial-01234567", ".mine"):
        (cache / name).mkdir()
    write_sidecar(cache / other.name, other, {})
    with reserve(other, None, print), pytest.raises(OptionError):
        remove(other.name)
    write_sidecar(cache / other.name, other, {})
    (cache / f".{other.name}.partial-01234567").mkdir()
    with reserve(other, None, print):
        assert remove(KEY.name)
        assert not (cache / KEY.name).exists()
    with reserve(KEY, None, print):
        pass
    assert sorted(path.name for path in cache.iterdir()) == ["..partial-01234567", ".locks", ".mine"]


def test_leftovers_of_a_locked_package_are_kept(built: Path, cache: Path) -> None:
    other = Key("org/other", FIRST, "int8")
    with reserve(other, None, print):
        partial = cache / f".{other.name}.partial-01234567"
        partial.mkdir()
        with reserve(KEY, None, print):
            pass
        assert partial.is_dir()
    with reserve(KEY, None, print):
        assert not partial.exists()


def test_a_failed_build_leaves_no_sidecar(cache: Path) -> None:
    with reserve(KEY, "v1", print) as place, pytest.raises(ZeroDivisionError), place.building():
        raise ZeroDivisionError(sidecar(place.folder).stat())
    assert [path.name for path in cache.iterdir()] == [".locks"]


def test_a_failed_replacement_keeps_the_package(built: Path) -> None:
    put(built)
    with pytest.raises(ZeroDivisionError), reserve(KEY, "v1", print) as place, place.building():
        raise ZeroDivisionError
    assert names() == [KEY.name]


def test_a_use_is_noted(built: Path) -> None:
    put(built)
    other = Key("org/other", FIRST, "int8")
    put(built, other)
    os.utime(sidecar(packages_folder() / KEY.name), (50, 50))
    os.utime(sidecar(packages_folder() / other.name), (60, 60))
    assert names() == [other.name, KEY.name]
    found = named(KEY.name)
    assert found is not None
    assert found.used == 50
    found.note_use()
    assert names() == [KEY.name, other.name]


@pytest.mark.skipif(os.name == "nt", reason="permissions of Unix")
def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("VLPACK_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(OptionError, match="cannot be written"), reserve(KEY, None, print):
        pass
    assert changes.VARIABLE == "VLPACK_CACHE"
