"""A checkpoint from the Hugging Face hub, or from its cache: only the files that are needed.

huggingface_hub does the transfer and keeps the cache, and obeys `HF_HUB_OFFLINE`, `HF_ENDPOINT`, `HF_HOME` and
`HF_TOKEN`. It is imported where it is used: it is slow to import, and most runs load a model from a folder.

Which files: the configuration, the tokenizer, and the weights in one format. All come from one commit, so that a push
to the repository during a download cannot mix two versions. A file appears in the cache when it is complete, so a
download that breaks off leaves nothing that could be loaded, and a second call fetches only what is still missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import one_line, read_json
from common.weights import INDEX, WEIGHTS, shard_names

# What a tokenizer is built from where the repository has no tokenizer.json.
TOKENIZER_PARTS = (
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
)


class NotOnHubError(UserError):
    """The hub has no such model; or the cache has none, and the hub cannot be asked."""


@dataclass(frozen=True)
class _Snapshot:
    """One commit of one repository."""

    repo: str
    folder: Path
    unreachable: str  # why only the cache can be used; empty while the hub answers

    def get(self, filename: str) -> Path | None:
        """A file's place in the cache, after a download if need be; None where the repository has no such file."""
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import RemoteEntryNotFoundError

        commit = self.folder.name
        cached = try_to_load_from_cache(self.repo, filename, revision=commit)
        if isinstance(cached, str):
            return Path(cached)
        if cached is not None or self.unreachable:  # known not to exist, or nobody to ask
            return None
        try:
            return Path(hf_hub_download(self.repo, filename, revision=commit))
        except RemoteEntryNotFoundError:
            return None
        except Exception as error:  # the transfer's errors belong to the HTTP library, and that changes
            raise UserError(
                f"hub model {self.repo!r}: the download of {filename} failed ({one_line(error)}); "
                "run it again to go on, what is complete is kept"
            ) from None

    def missing(self, what: str) -> UserError:
        """The error for a file that the checkpoint cannot do without."""
        where = f"not in the cache, and {self.unreachable}" if self.unreachable else "not in the repository"
        return UserError(f"hub model {self.repo!r}: {what}: {where}")


def fetch_checkpoint(repo: str, check: Callable[[dict[str, Any]], object] | None = None) -> Path:
    """The folder with a hub model's files, `owner/name` or a bare legacy name such as `gpt2`.

    `check` sees config.json before anything else is downloaded.

    Raises NotOnHubError where the model is neither on the hub nor in the cache, and UserError where a download fails
    or the repository is not a checkpoint.
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
    """Find the newest commit and fetch its config.json; where the hub does not answer, the last one in the cache."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # Asked first because it fails at once: hf_hub_download would try again for half a minute without a network.
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
    """Why the hub gave no answer for a model."""
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
