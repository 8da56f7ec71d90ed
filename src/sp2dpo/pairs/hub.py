"""A dataset of the Hugging Face hub, pinned to a revision, as a folder on this machine.

The only file of this stage that can reach the network; what goes wrong there is one line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from sp2dpo.errors import DataError

__all__ = ["download", "file_names", "is_hub_id"]


def is_hub_id(source: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) is not None


def download(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder of the snapshot, of which at least the files that `patterns` let through are there.

    Raises:
        DataError: no revision, or the hub does not give the files.
    """
    if not revision:
        raise DataError(_no_revision(repo))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RevisionResolutionError, XetDownloadError

    # The hub's HTTP client is httpx or httpx2, by version: their common error is the hub's own error's first base.
    http_error = cast(type[Exception], HfHubHTTPError.__bases__[0])
    try:
        return Path(snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=list(patterns)))
    except (OSError, ValueError, RevisionResolutionError, XetDownloadError, http_error) as error:
        raise DataError(_unreachable(repo, revision, error)) from error


def file_names(repo: str, revision: str, folder: Path) -> list[str]:
    """All files of the revision, or, if the hub cannot be asked, those that are in `folder`."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return HfApi().list_repo_files(repo, repo_type="dataset", revision=revision)
    except (OSError, cast(type[Exception], HfHubHTTPError.__bases__[0])):
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _no_revision(repo: str) -> str:
    return (
        f"'{repo}' is no file or folder here; as a hub dataset it needs data.revision, a commit: copy one from "
        f"https://huggingface.co/datasets/{repo}/commits/main"
    )


def _unreachable(repo: str, revision: str, error: Exception) -> str:
    said = " ".join(str(error).split())[:300]
    return (
        f"the hub did not give dataset '{repo}' at revision '{revision}' ({type(error).__name__}: {said}); check both "
        "names, the network, HF_HUB_OFFLINE, and HF_TOKEN if it is gated, or download it and give its folder"
    )
