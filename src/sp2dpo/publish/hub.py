"""A published folder to a dataset repository of the Hugging Face hub. Of this room, only this reaches the network.

The token is read by huggingface_hub, from HF_TOKEN or its own login, and appears in no message.
"""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Final, cast

from sp2dpo.errors import InputError, Unfinished
from sp2dpo.pairs.hub import is_hub_id
from sp2dpo.publish.folder import MANIFEST, listed_files

__all__ = ["check_target", "push"]

_OURS: Final = ["data/*", "schedule/*", "manifests/*", "prompts/*", "figures/*"]
"""Files of an earlier push that are deleted if this one does not have them."""


def check_target(repo: str) -> None:
    """Refuse what cannot work, before the folder is made.

    Raises:
        InputError: not OWNER/NAME, or no token.
    """
    from huggingface_hub import constants, get_token

    if not is_hub_id(repo):
        raise InputError(f"--push-to-hub {repo!r} is not OWNER/NAME")
    if constants.HF_HUB_OFFLINE:
        raise InputError("--push-to-hub needs the network, and HF_HUB_OFFLINE is set; unset it, or push another time")
    if get_token() is None:
        raise InputError(
            "--push-to-hub needs a token that may write: put it into HF_TOKEN, or run 'hf auth login'; tokens are made "
            "at https://huggingface.co/settings/tokens"
        )


def push(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Create the repository if there is none and upload the files that the manifest lists; returns its address.

    Raises:
        Unfinished: the hub refused, or could not be reached; the folder is kept.
        InputError: `private`, and the repository is there and public.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    http_error = cast(type[Exception], HfHubHTTPError.__bases__[0])  # of httpx or httpx2, by version of the hub
    api = HfApi()
    try:
        api.create_repo(repo, repo_type="dataset", private=private or None, exist_ok=True)  # None: the owner's default
        if private and not api.dataset_info(repo).private:
            raise InputError(f"{repo} is there and is public; nothing was uploaded. Make it private there first")
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            repo_type="dataset",
            commit_message=message,
            allow_patterns=[glob.escape(name) for name in (*listed_files(folder), MANIFEST)],
            delete_patterns=_OURS,
        )
    except InputError:
        raise
    except HFValidationError as error:
        raise InputError(f"--push-to-hub: {error}") from None
    except (OSError, http_error) as error:
        raise Unfinished(_refused(repo, folder, error)) from None
    return str(commit.repo_url)


def _refused(repo: str, folder: Path, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    why = {
        401: "the token is not valid; make one that may write",
        403: f"the token may not write to {repo}; give it write access to that owner, or name another",
        404: f"there is no owner '{repo.partition('/')[0]}', or the token may not see it",
    }.get(status or 0)
    if why is None:
        why = f"{type(error).__name__}: {_told(error)}"
    return f"{folder} is made, and the hub did not take it: {why}. Then run the same command again"


def _told(error: Exception) -> str:
    """The hub's words on one line, without anything that looks like a token."""
    return re.sub(r"hf_[A-Za-z0-9]+|Bearer \S+", "…", " ".join(str(error).split()))[:300]
