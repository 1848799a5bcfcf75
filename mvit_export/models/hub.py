"""Fetch a model's files from the Hugging Face Hub, through huggingface_hub and its cache.

huggingface_hub keeps trying an address that does not answer for minutes. So the hub is first asked once, with a
deadline; if that fails, only the cache is consulted. HF_ENDPOINT, HF_HUB_CACHE, HF_HUB_OFFLINE and tokens work as
huggingface_hub documents them.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from mvit_export.errors import HubError, require
from mvit_export.system.reading import sha256_file

DEADLINE_S = 6.0  # for the hub's first answer, name lookup included
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first one that the repository has
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SETTINGS = ("config.json", "preprocessor_config.json")  # either may be absent


class Incomplete(Exception):
    """A file is not there that another one names; says which."""


@dataclass(frozen=True)
class Snapshot:
    """The folder in huggingface_hub's cache that holds the files of one commit."""

    folder: Path
    commit: str


def locate(source: str) -> tuple[Path, str, str | None]:
    """Where the weights are on this disk, the name to report, and the hub's commit."""
    scheme, colon, rest = source.partition(":")
    if colon and scheme in ("hf", "timm"):
        repo, _, revision = rest.partition("@")
        snapshot = fetch_model(repo if scheme == "hf" else f"timm/{repo}", revision or None)
        return snapshot.folder, source, snapshot.commit
    path = Path(source).expanduser().absolute()
    return path, str(path), None


def fetch_model(repo: str, revision: str | None = None) -> Snapshot:
    """Download config.json, preprocessor_config.json and the weights of `repo` ("owner/name"), those that exist.

    Needs the network only for what the cache lacks. Raises HubError (unreachable within 10 s, no such repository or
    revision, gated, no weights, broken transfer) and MissingDependencyError.
    """
    hub = library()
    revision = revision or "main"
    try:
        hub.utils.validate_repo_id(repo)
    except hub.errors.HFValidationError as error:
        raise HubError(f"{repo!r} is not a repository name, expected OWNER/NAME[@REVISION]") from error
    failure = ask(hub, repo, revision)
    if isinstance(failure, hub.errors.RevisionNotFoundError):
        raise HubError(explain(hub, repo, revision, failure)) from failure
    if failure is None:
        with quiet(hub):
            weights = download(hub, repo, revision)
    else:
        weights = find_cached(hub, repo, revision)
        if not weights:
            raise HubError(explain(hub, repo, revision, failure)) from failure
    for file in weights:
        check_digest(file)
    return Snapshot(weights[0].parent, weights[0].parent.name)


def library() -> ModuleType:
    """huggingface_hub with the submodules used here as its attributes."""
    hub = require("huggingface_hub", extra="hub", purpose="to download weights")
    for name in ("constants", "errors", "utils"):
        importlib.import_module(f"huggingface_hub.{name}")
    return hub


def ask(hub: ModuleType, repo: str, revision: str) -> Exception | None:
    """One HEAD request: None if the hub answers for this repository and revision, else what went wrong.

    It runs in a thread because a name lookup, or a server that sends a byte now and then, ignores timeouts.
    """
    answer: list[Exception | None] = []

    def request() -> None:
        try:
            url = hub.hf_hub_url(repo, SETTINGS[0], revision=revision)
            metadata = hub.get_hf_file_metadata(url, timeout=DEADLINE_S)
            stranger = metadata.commit_hash is None  # a login page of some network, or any other web server
            answer.append(ValueError("what answers there is not a model hub") if stranger else None)
        except hub.errors.RemoteEntryNotFoundError:
            answer.append(None)  # the repository exists, only this file does not
        except Exception as error:  # `explain` turns it into a HubError unless the cache helps
            answer.append(error)

    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(DEADLINE_S)
    return answer[0] if answer else TimeoutError(f"no answer within {DEADLINE_S:g} s")


def collect(get: Callable[[str], Path | None]) -> list[Path]:
    """Have `get` fetch the settings and the weights; the weights' paths, empty if there are none.

    Weights in several files come after the index that names them. Raises WeightsError for an index that is damaged.
    """
    for name in SETTINGS:
        get(name)
    found = next((path for name in (*WEIGHTS, *INDEXES) if (path := get(name))), None)
    if found is None or found.name not in INDEXES:
        return [found] if found else []
    from mvit_export.models.shards import shard_names

    paths = {name: get(name) for name in shard_names(found)}
    lost = next((name for name, path in paths.items() if path is None), None)
    if lost is not None:
        raise Incomplete(f"has no {lost}, which {found.name} names")
    return [found, *(path for path in paths.values() if path)]


def find_cached(hub: ModuleType, repo: str, revision: str) -> list[Path]:
    """The weights in the cache, empty if it lacks any.

    Only looks at the disk: hf_hub_download asks the hub even for local files.
    """

    def get(name: str) -> Path | None:
        found = hub.try_to_load_from_cache(repo, name, revision=revision)
        return Path(found) if isinstance(found, str) else None

    try:
        return collect(get)
    except Incomplete:
        return []


def download(hub: ModuleType, repo: str, revision: str) -> list[Path]:
    """The weights, with all that belongs to them from one commit; fetches what the cache lacks."""
    commit = revision

    def get(name: str) -> Path | None:
        nonlocal commit
        try:
            path = Path(hub.hf_hub_download(repo, name, revision=commit))
        except hub.errors.RemoteEntryNotFoundError:
            return None
        except Exception as error:  # huggingface_hub lets its HTTP library's errors through too
            raise HubError(explain(hub, repo, revision, error, during=name)) from error
        commit = path.parent.name  # the first file pins it, so that a push in between cannot mix two
        return path

    try:
        weights = collect(get)
    except Incomplete as error:
        raise HubError(f"{repo}@{revision} {error}: choose another repository or revision") from error
    if not weights:
        raise HubError(f"{repo}@{revision} has no weights, expected {' or '.join(WEIGHTS)}: choose another repository")
    return weights


def check_digest(path: Path) -> None:
    """The cache names a large file's blob by its sha256: a blob with such a name must have that hash."""
    blob = path.resolve()
    if len(blob.name) != 64:  # a small file (git's hash), or a file system without links
        return
    digest = sha256_file(blob)
    if digest != blob.name:
        raise HubError(f"{blob} is damaged: its sha256 is {digest}, expected its name; delete it and try again")


def explain(hub: ModuleType, repo: str, revision: str, error: BaseException, *, during: str = "") -> str:
    """One line for what huggingface_hub says in many lines."""
    endpoint, errors = hub.constants.ENDPOINT, hub.errors
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated on {endpoint}: accept its terms there, then `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no repository {repo} on {endpoint}, or it is private: check the name, or `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} on {endpoint} has no revision {revision!r}: give a branch, tag or full commit hash"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{repo}@{revision} is not in the cache and HF_HUB_OFFLINE forbids fetching it: unset it, or use a file"
    if during:
        return f"the download of {repo} broke off at {during} ({reason}): try again"
    return (
        f"{endpoint} cannot be reached for {repo} ({reason}) and the cache does not have it:"
        " check the connection or HF_ENDPOINT, or give a local file"
    )


@contextmanager
def quiet(hub: ModuleType) -> Iterator[None]:
    """Suppress huggingface_hub's warnings about retries: what matters comes as one error in the end."""
    before = hub.logging.get_verbosity()
    hub.logging.set_verbosity_error()
    try:
        yield
    finally:
        hub.logging.set_verbosity(before)
