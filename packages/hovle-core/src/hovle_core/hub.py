"""From a folder or a hub id to a folder: what is downloaded, and what to do where nothing can be."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# Never code and never pickles: what is not on this list stays on the hub.
TOKENIZER_PATTERNS = ("*.json", "tokenizer.model", "merges.txt", "*.jinja")
WEIGHT_PATTERNS = ("*.safetensors",)
#: Arguments of `from_pretrained` that say which files are meant, and how to get them.
HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download", "subfolder")


def local_folder(name: str | Path, weights: bool, may_be_adapter: bool = False, **hub: Any) -> Path:
    """The folder of a checkpoint: `name` itself, or the snapshot of the hub id that it is.

    Args:
        name: a folder, or a hub id such as "OpenGVLab/HoVLE".
        weights: whether safetensors are needed; otherwise only configs and tokenizer files are downloaded.
        may_be_adapter: whether the folder of a peft adapter, without a model, is an answer as well.
        hub: `HUB_ARGUMENTS`, as in transformers.

    Raises FileNotFoundError saying what to do: no such folder, unknown or gated repository, unknown revision, nothing
    in the cache while offline, no such subfolder.
    """
    from hovle_core.loading import is_adapter  # imports transformers

    subfolder = hub.pop("subfolder", None) or ""
    folder = Path(name) if Path(name).is_dir() else _snapshot(str(name), weights, subfolder, hub)
    folder /= subfolder
    if not folder.is_dir():
        raise FileNotFoundError(f"{name} has no subfolder {subfolder!r}")
    if weights and not (folder / "config.json").is_file() and not (may_be_adapter and is_adapter(folder)):
        raise FileNotFoundError(f"{folder} holds no config.json: it is no checkpoint")
    return folder


def _snapshot(repo: str, weights: bool, subfolder: str, hub: dict[str, Any]) -> Path:
    prefix = f"{subfolder}/" if subfolder else ""
    patterns = [prefix + pattern for pattern in TOKENIZER_PATTERNS + (WEIGHT_PATTERNS if weights else ())]
    revision = hub.get("revision") or "main"
    try:
        # A "*" of the hub's patterns crosses "/": files of folders below are left out by name.
        return Path(snapshot_download(repo, allow_patterns=patterns, ignore_patterns=f"{prefix}*/*", **hub))
    except HFValidationError:
        raise FileNotFoundError(
            f"{repo!r} is neither a folder here nor a hub id (such as OpenGVLab/HoVLE)"
        ) from None
    except GatedRepoError:
        raise FileNotFoundError(
            f"{repo!r} is gated: ask for access on https://huggingface.co/{repo}, then log in with `hf auth login` or "
            "pass token="
        ) from None
    except RevisionNotFoundError:
        raise FileNotFoundError(
            f"{repo!r} has no revision {revision!r}: see its branches and tags on the hub"
        ) from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(
            f"there is no folder and no hub repository {repo!r}; if it is private, log in with `hf auth login` or pass "
            "token="
        ) from None
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo!r} at {revision!r} is not wholly in the cache, and the hub was not asked or did not answer: check "
            "the connection, and that neither HF_HUB_OFFLINE nor local_files_only is set, or give a folder"
        ) from error
