"""Folders and Hub ids: what is downloaded, from where, and the messages of failures. No test uses the network."""

import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from vlpack.checkpoint import hub
from vlpack.checkpoint.checkpoint import Checkpoint
from vlpack.checkpoint.hub import ResolvedSource, resolve
from vlpack.errors import CheckpointError, OptionError, VlpackError

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits-qwen3-vl"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40


class FakeHub:
    """Stands in for `snapshot_download`: records its arguments, then raises or returns what it was set up with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.error: BaseException | None = None
        self.calls: list[dict[str, Any]] = []
        self.files: list[str] = []
        self.listed: list[dict[str, Any]] = []

    def list_files(self, repo_id: str, **options: Any) -> list[str]:
        """Stands in for `list_repo_files`."""
        self.listed.append({"repo_id": repo_id, **options})
        return self.files

    def __call__(self, repo_id: str, **options: Any) -> str:
        self.calls.append({"repo_id": repo_id, **options})
        if self.error is not None:
            raise self.error
        return str(self.folder)


@pytest.fixture(autouse=True)
def _online_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs each test in an empty folder, without environment variables that change how the Hub library works."""
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    folder = tmp_path / "models--org--name" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    fake = FakeHub(folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", fake.list_files)
    return fake


# --- folders ----------------------------------------------------------------------------------------


def test_a_folder_is_used_as_it_is(tmp_path: Path, fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "home" / "org" / "name"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for source in (folder, str(folder), "org/name", "./org/name", "../home/org/name", "~/home/org/name"):
        found = resolve(source)
        assert found.folder.samefile(folder)
        assert (found.repo_id, found.commit) == (None, None)
    assert not fake.calls


def test_a_folder_of_the_cache_has_its_hub_id(fake: FakeHub, tmp_path: Path) -> None:
    assert resolve(fake.folder) == ResolvedSource(fake.folder, "org/name", COMMIT)
    other = tmp_path / "models--org--name" / "snapshots" / "not-a-commit"
    other.mkdir()
    assert resolve(other) == ResolvedSource(other, None, None)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"is a file, not a folder\.\nGive the folder it is in"):
        resolve(tmp_path / "model.safetensors")


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="revision"):
        resolve(tmp_path, revision="main")


@pytest.mark.parametrize(
    "source",
    [
        *("./models/x", "/models/x", "~/models/x", "~nobody-here/x", "../x", "a/b/c", "org/name/", "models\\x"),
        *("C:\\models\\x", Path("org/name"), "a\0b", "x" * 5000, "", "name", "org/name@", "-org/name", "org/", "/name"),
        *(
            "https://huggingface.co/org/name",
            "org/name@../../x",
            "org/name@a/../../x",
            "org/name@-x",
            "org/name@a b",
            "org/name@a\n",
        ),
    ],
    ids=lambda source: ascii(source)[:30],
)
def test_a_source_that_is_neither_folder_nor_id(source: str | Path, fake: FakeHub) -> None:
    with pytest.raises(CheckpointError, match=r"no folder|is not a revision") as caught:
        resolve(source)
    assert caught.value.hint
    assert not fake.calls


@pytest.mark.parametrize(
    ("page", "source"),
    [
        ("https://huggingface.co/org/name", "org/name"),
        ("http://hf.co/org/name/", "org/name"),
        ("https://huggingface.co/org/name/tree/v1.0", "org/name@v1.0"),
        ("https://huggingface.co/org/name/blob/main/config.json?a=b", "org/name@main"),
        ("https://mirror.example:8080/org/name#usage", "org/name"),
    ],
)
def test_a_url_of_the_hub_is_reported_with_its_id(page: str, source: str) -> None:
    with pytest.raises(CheckpointError, match="There is no folder") as caught:
        resolve(page)
    assert caught.value.hint == f"Give the id of that page: {source}."


@pytest.mark.parametrize(
    ("source", "also_id"), [("./models/x", False), ("/models/x", False), (Path("org/name"), False), ("name", True)]
)
def test_a_missing_path_is_not_called_a_bad_id(source: str | Path, also_id: bool) -> None:
    with pytest.raises(CheckpointError) as caught:
        resolve(source)
    assert ("not a Hub id" in caught.value.message) == also_id


# --- requests to the Hub ------------------------------------------------------------------------


def test_download(fake: FakeHub) -> None:
    assert resolve("org/name") == ResolvedSource(fake.folder, "org/name", COMMIT)
    (call,) = fake.calls
    assert call.pop("allow_patterns") == list(hub.PATTERNS)
    assert call.pop("ignore_patterns") == list(hub.IGNORED)
    # None means the library's own defaults: HF_TOKEN or the stored login, HF_HOME, branch main.
    assert call == {
        "repo_id": "org/name",
        "revision": None,
        "cache_dir": None,
        "token": None,
        "local_files_only": False,
    }


def test_a_repository_of_gguf_files(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.files = ["README.md", *(f"name-{kind}.gguf" for kind in ("Q4_0", "Q5_K", "Q8_0")), "mmproj-F16.gguf"]
    match = "org/name has its weights in GGUF files: 'mmproj-F16.gguf', 'name-Q4_0.gguf', 'name-Q5_K.gguf' and 1 more"
    with pytest.raises(CheckpointError, match=match) as caught:
        resolve("org/name", token="secret")
    assert "hf download org/name name-Q4_0.gguf --local-dir FOLDER" in str(caught.value.hint)
    assert fake.listed == [{"repo_id": "org/name", "revision": COMMIT, "token": "secret"}]
    (fake.folder / "config.json").touch()  # some have a config.json, which shows nothing before weights are wanted
    assert resolve("org/name", patterns=hub.SETTINGS).commit == COMMIT
    with pytest.raises(CheckpointError, match=match):
        resolve("org/name")
    assert len(fake.listed) == 2
    resolve("org/name", offline=True)
    assert len(fake.listed) == 2
    for files in ([*fake.files, "model.safetensors"], ["pytorch_model.bin"]):
        monkeypatch.setattr(fake, "files", files)
        resolve("org/name")

    def fails(*arguments: object, **options: object) -> list[str]:
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "list_repo_files", fails)
    resolve("org/name")
    (fake.folder / "model.safetensors").touch()
    monkeypatch.setattr(huggingface_hub, "list_repo_files", fake.list_files)
    resolve("org/name")
    assert len(fake.listed) == 4


@pytest.mark.parametrize(
    "source", ["org/name-GGUF:Q8_0", "hf.co/org/name-GGUF:Q8_0", "https://hf.co/org/name-GGUF:Q8_0"]
)
def test_a_quantization_of_a_repository(source: str, fake: FakeHub) -> None:
    with pytest.raises(CheckpointError, match="names GGUF files of a repository by their quantization") as caught:
        resolve(source)
    assert "hf download org/name-GGUF --include '*Q8_0*.gguf'" in str(caught.value.hint)
    assert not fake.calls


def test_options_reach_the_hub_library(fake: FakeHub, tmp_path: Path) -> None:
    resolve("org/name", revision="v1", cache_dir=tmp_path, token="hf_x", offline=True, patterns=["*.json"])
    call = fake.calls[0]
    assert call["revision"] == "v1"
    assert call["cache_dir"] == str(tmp_path)
    assert call["token"] == "hf_x"
    assert call["local_files_only"] is True
    assert call["allow_patterns"] == ["*.json"]


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/4", COMMIT])
def test_revisions(fake: FakeHub, revision: str) -> None:
    resolve(f"org/name@{revision}")
    resolve("org/name", revision=revision)
    resolve(f"org/name@{revision}", revision=revision)
    assert [call["revision"] for call in fake.calls] == [revision] * 3
    assert {call["repo_id"] for call in fake.calls} == {"org/name"}
    with pytest.raises(OptionError, match="Two revisions"):
        resolve(f"org/name@{revision}", revision="another")


@pytest.mark.parametrize(
    ("variable", "constant", "argument", "expected"),
    [
        ("1", False, None, True),
        ("true", False, None, True),
        ("0", False, None, False),
        ("", False, None, False),
        (None, True, None, True),  # set before the library was imported
        ("1", True, False, False),
        (None, False, True, True),
    ],
)
def test_offline(
    fake: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    *,
    variable: str | None,
    constant: bool,
    argument: bool | None,
    expected: bool,
) -> None:
    if variable is not None:
        monkeypatch.setenv("HF_HUB_OFFLINE", variable)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", constant)
    resolve("org/name", offline=argument)
    assert fake.calls[0]["local_files_only"] is expected


def test_patterns_match_only_files_that_a_build_needs() -> None:
    from huggingface_hub.utils import filter_repo_objects

    wanted = [
        *("modules.json", "1_Pooling/config.json", "1_LogitScore/config.json", "config_sentence_transformers.json"),
        *("config.json", "generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
        *(
            "model.safetensors",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "chat_template.jinja",
        ),
        *(
            "chat_template.json",
            "merges.txt",
            "vocab.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "tokenizer.model",
        ),
    ]
    other = [
        *("README.md", "LICENSE", "pytorch_model.bin", "tokenizer.bin", "model.gguf", "rust_model.ot", "tf_model.h5"),
        *(
            "original/consolidated.safetensors",
            "onnx/config.json",
            "2_Dense/model.safetensors",
            "100/config.json",
            "onnx/model.onnx",
            "assets/a.jinja",
            ".gitattributes",
        ),
        *("modeling_x.py", "notes.txt"),
    ]
    taken = filter_repo_objects(wanted + other, allow_patterns=list(hub.PATTERNS), ignore_patterns=list(hub.IGNORED))
    assert list(taken) == wanted
    assert not any(fnmatch(name, pattern) for name in wanted for pattern in hub.IGNORED)


# --- messages of failures --------------------------------------------------------------------


def http_error(kind: type[Exception], status: int, text: str) -> Exception:
    """An error of the Hub library; its constructor takes a response of the HTTP library that the Hub library uses."""

    class Response:
        status_code, request, url = status, None, "https://huggingface.co/api/models/org/name"
        headers: ClassVar[dict[str, str]] = {}
        text = ""

    try:
        return kind(text, response=Response())  # type: ignore[call-arg]
    except TypeError:
        return kind(text)


FAILURES: list[tuple[Exception, str, str]] = [
    (
        http_error(errors.GatedRepoError, 403, "403"),
        "org/name is gated",
        "Accept the terms on https://huggingface.co/org/name",
    ),
    (
        http_error(errors.RepositoryNotFoundError, 401, "401"),
        "neither a folder org/name nor a model",
        "Check the spelling",
    ),
    (http_error(errors.RevisionNotFoundError, 404, "404"), "org/name has no revision v9", "/org/name/commits/main"),
    (
        http_error(errors.HfHubHTTPError, 503, "503 Server Error\n\n  for a page of reasons"),
        "HfHubHTTPError: 503 Server Error.",
        "Try again",
    ),
    (
        errors.HFValidationError("Cannot have -- in repo_id."),
        "nor a valid Hub id: Cannot have --",
        "Give an existing folder",
    ),
    (
        errors.LocalEntryNotFoundError("ConnectError"),
        "The Hub cannot be reached, and org/name at revision v9 is not",
        "Check",
    ),
    (
        errors.LocalEntryNotFoundError(
            "Got: ConnectError: refused\n An error happened.\nPlease check your connection."
        ),
        "is not in the Hugging Face cache: ConnectError: refused.",
        "Check the network",
    ),
    (errors.OfflineModeIsEnabled("offline"), "The Hub cannot be reached", "Check the network"),
    (OSError(28, "No space left on device"), "could not be downloaded: OSError: [Errno 28] No space left", "HF_HOME"),
    (ConnectionResetError(104, "reset"), "could not be downloaded: ConnectionResetError", "continues where it stopped"),
    (RuntimeError("Data processing error: xet"), "could not be downloaded: RuntimeError: Data processing", "Try again"),
]


@pytest.mark.parametrize(("error", "message", "hint"), FAILURES, ids=[type(error).__name__ for error, *_ in FAILURES])
def test_messages_of_failures(fake: FakeHub, error: Exception, message: str, hint: str) -> None:
    fake.error = error
    with pytest.raises(CheckpointError) as caught:
        resolve("org/name@v9")
    assert message in caught.value.message
    assert hint in str(caught.value.hint)
    assert caught.value.__cause__ is error


def test_offline_and_not_cached(fake: FakeHub) -> None:
    fake.error = errors.LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder")
    with pytest.raises(CheckpointError, match=r"org/name is not.* in the Hugging Face cache, and the network must not"):
        resolve("org/name", offline=True)


def test_long_messages_are_cut(fake: FakeHub) -> None:
    fake.error = OSError("x " * 10_000)
    with pytest.raises(CheckpointError) as caught:
        resolve("org/name")
    assert len(caught.value.message) < 500


def test_interrupts_are_passed_on(fake: FakeHub) -> None:
    fake.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        resolve("org/name")


# --- the real Hub library with a real cache, without network ------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache folder as snapshot_download writes it: blobs, a snapshot of links to them, and a branch."""
    if not EXAMPLE.exists():
        pytest.skip("the example is not here")
    repository = tmp_path / "hub" / "models--org--name"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True)
    for i, path in enumerate(sorted(EXAMPLE.iterdir())):
        (blobs / f"{i:064}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{i:064}")
    (repository / "refs" / "main").write_text(COMMIT)
    return tmp_path / "hub"


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_from_a_real_cache(cache: Path) -> None:
    for source in ("org/name", "org/name@main", f"org/name@{COMMIT}"):
        found = resolve(source, cache_dir=cache, offline=True)
        assert found == ResolvedSource(cache / "models--org--name" / "snapshots" / COMMIT, "org/name", COMMIT)
        with Checkpoint.open(found.folder) as checkpoint:
            assert checkpoint.architecture == "Qwen3VLForConditionalGeneration"
            name = next(iter(checkpoint.tensors))
            assert checkpoint.read(name).shape == checkpoint.tensors[name].shape


@pytest.mark.parametrize("source", ["org/name@v2", f"org/name@{OTHER}", "org/other", "org--x/name", "org/name.git"])
def test_not_in_a_real_cache(cache: Path, source: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"in the Hugging Face cache, and the network must not|nor a valid Hub id"
    ):
        resolve(source, cache_dir=cache, offline=True)


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_an_incomplete_snapshot_is_noticed_when_opened(cache: Path) -> None:
    (cache / "models--org--name" / "snapshots" / COMMIT / "model.safetensors").unlink()
    found = resolve("org/name", cache_dir=cache, offline=True)
    with pytest.raises(CheckpointError, match=r"has no weights.*\nDownload"):
        Checkpoint.open(found.folder)


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_the_environment_variables_alone(cache: Path) -> None:
    """The variables are set in a new process, because the Hub library reads them when it is imported."""
    program = (
        "from vlpack.checkpoint.hub import resolve\n"
        "found = resolve('org/name'); print(found.repo_id, found.commit, found.folder)\n"
        "try: resolve('org/other')\n"
        "except Exception as error: print(type(error).__name__)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    folder = cache / "models--org--name" / "snapshots" / COMMIT
    assert result.stdout.splitlines() == [f"org/name {COMMIT} {folder}", "CheckpointError"]


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In online mode, a server that cannot be reached is reported; the endpoint is a closed port of this machine."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for proxy in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    with pytest.raises(VlpackError, match="The Hub cannot be reached, and org/name is not in the Hugging Face cache"):
        resolve("org/name", cache_dir=tmp_path / "hub")
