"""A checkpoint from the Hugging Face hub, or from its cache: only the needed files.

huggingface_hub does the transfer, keeps the cache, and obeys `HF_HUB_OFFLINE`, `HF_ENDPOINT`, `HF_HOME` and `HF_TOKEN`.
It is imported only when needed: the import is slow, and most runs load a model from a folder.

The files are the configuration, the tokenizer, and the weights in one format. All come from one commit, so that a push
to the repository during a download cannot mix two versions. A file appears in the cache only when complete. So an
aborted download leaves nothing that could be loaded, and a second call fetches only the missing files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import one_line, read_json
from common.weights import INDEX, WEIGHTS, shard_names

# The files that a tokenizer is built from if the repository has no tokenizer.json.
TOKENIZER_PARTS = (
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
)


class NotOnHubError(UserError):
    """The hub has no such model; or the cache has none, and the hub is unreachable."""


@dataclass(frozen=True)
class _Snapshot:
    """One commit of one repository."""

    repo: str
    folder: Path
    unreachable: str  # the reason for using only the cache; empty while the hub answers

    def get(self, filename: str) -> Path | None:
        """Return a file's path in the cache, downloading it if needed; None if the repository has no such file."""
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import RemoteEntryNotFoundError

        commit = self.folder.name
        cached = try_to_load_from_cache(self.repo, filename, revision=commit)
        if isinstance(cached, str):
            return Path(cached)
        if cached is not None or self.unreachable:  # known not to exist, or no hub to ask
            return None
        try:
            return Path(hf_hub_download(self.repo, filename, revision=commit))
        except RemoteEntryNotFoundError:
            return None
        except Exception as error:  # the error types belong to the HTTP library, which changes
            raise UserError(
                f"hub model {self.repo!r}: the download of {filename} failed ({one_line(error)}); "
                "run it again to go on, what is complete is kept"
            ) from None

    def missing(self, what: str) -> UserError:
        """Return the error for a missing file that the checkpoint requires."""
        where = f"not in the cache, and {self.unreachable}" if self.unreachable else "not in the repository"
        return UserError(f"hub model {self.repo!r}: {what}: {where}")


def fetch_checkpoint(repo: str, check: Callable[[dict[str, Any]], object] | None = None) -> Path:
    """Return the folder with a hub model's files; `repo` is `owner/name` or a bare legacy name such as `gpt2`.

    `check` receives config.json before anything else is downloaded.

    Raises NotOnHubError if the model is neither on the hub nor in the cache, and UserError if a download fails or the
    repository is not a checkpoint.
    """
    snapshot = _locate(repo)
    if check is not None:
        check(read_json(snapshot.folder / "config.json"))
    for filename in ("generation_config.json", "tokenizer_config.json"):
        snapshot.get(filename)
    if snapshot.get("tokenizer.json") is None:
        for filename in TOKENIZER_PARTS:
            snapshot.get(filename)
    for filename in WEIGHTS:
        path = snapshot.get(filename)
        if path is None:
            continue
        for shard in shard_names(path) if filename.endswith(INDEX) else []:
            if snapshot.get(shard) is None:
                raise snapshot.missing(f"the shard {shard}, which {filename} names")
        return snapshot.folder
    raise snapshot.missing(f"weights (one of {', '.join(WEIGHTS)})")


def _locate(repo: str) -> _Snapshot:
    """Find the newest commit and fetch its config.json; if the hub does not answer, use the last cached one."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # Asked first because it fails at once; without a network hf_hub_download retries for half a minute.
        get_hf_file_metadata(hf_hub_url(repo, "config.json"))
    except Exception as error:  # as above
        reason = _explain(error)
        try:
            cached = Path(hf_hub_download(repo, "config.json", local_files_only=True))
        except (LocalEntryNotFoundError, ValueError):  # a ValueError: the name cannot be a repository's
            raise NotOnHubError(reason) from None
        return _Snapshot(repo, cached.parent, unreachable=reason)
    try:
        return _Snapshot(repo, Path(hf_hub_download(repo, "config.json")).parent, unreachable="")
    except Exception as error:
        raise UserError(f"hub model {repo!r}: the download of config.json failed ({one_line(error)})") from None


def _explain(error: Exception) -> str:
    """Explain why the hub gave no answer for a model."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set and the hub cannot be asked"
    if isinstance(error, GatedRepoError):
        return (
            "the hub wants you to accept the model's terms on its page, then to log in (`hf auth login`, or HF_TOKEN)"
        )
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such model (a private one needs `hf auth login`, or HF_TOKEN)"
    if isinstance(error, RemoteEntryNotFoundError):
        return "the hub's repository holds no config.json"
    if isinstance(error, HFValidationError):
        return "not a name that the hub allows"
    if isinstance(error, HfHubHTTPError):
        return f"the hub answers with an error ({one_line(error)})"
    return f"the hub cannot be reached ({one_line(error)})"
