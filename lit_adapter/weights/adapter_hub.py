"""Adapters on the Hugging Face Hub: a repository holds one file and its model card."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_adapter.errors import UserError
from lit_adapter.files.read import read_text
from lit_adapter.files.write import write_bytes
from lit_adapter.hub import asking_hub, check_name
from lit_adapter.weights.adapter_search import ADAPTER
from lit_adapter.weights.base_search import base_at_hand, has_fingerprints
from lit_adapter.weights.download import fetch_files, list_files

if TYPE_CHECKING:
    from lit_adapter.weights.model_card import Evaluated

CARD = "README.md"
PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def fetch_adapter(name: str, out: Path, *, revision: str | None = None) -> list[str]:
    """Fetch the adapter ``org/name``, check it, put it at ``out``, and return lines for the user.

    ``revision`` is a branch, tag or commit.

    Raises:
        UserError: no such repository, no adapter or a damaged one in it, or another file at ``out``.
    """
    check_name(name)
    names, commit = list_files(name, revision)
    if ADAPTER not in names:
        theirs = next((file for file in PEFT_WEIGHTS if file in names), None)
        hint = "only adapters pushed by lit_adapter are fetched"
        if theirs:
            hint = f"it has {theirs}: fetch its files and use scripts/convert_adapter.py"
        raise UserError(f"{name}: has no {ADAPTER}; {hint}")
    with tempfile.TemporaryDirectory() as scratch:
        fetch_files(name, commit, [ADAPTER], Path(scratch))
        from lit_adapter.weights.adapter_file import read_adapter

        path = Path(scratch) / ADAPTER
        try:
            info, _ = read_adapter(path)
        except UserError as error:
            raise UserError(str(error).replace(str(path), f"{name}/{ADAPTER}")) from None
        content = path.read_bytes()
    there = out.is_file()
    if out.exists() and not (there and out.read_bytes() == content):
        raise UserError(f"{out}: already there with other content; choose another --out or remove it")
    if not there:
        write_bytes(out, content)
    base, name = base_at_hand(info.base, out), info.base.name
    have = f"checkpoints/{name} is not there: fetch or convert the base"
    if base is not None:
        same = has_fingerprints(base, info.base)
        have = f"{base} is there" if same else f"is not {base}: fetch or convert it"
    first = f"{out} is already there" if there else f"wrote {out}"
    return [first, f"its base {have}"]


def push_adapter(
    adapter: Path,
    name: str,
    *,
    private: bool = False,
    card: Path | None = None,
    evaluated: Evaluated | None = None,
    dry_run: bool = False,
) -> tuple[str, str | None]:
    """Upload an adapter to a repository of the Hub, which is created if necessary.

    A new repository can be ``private``. The file ``card`` is its model card; by default, one is written from
    the adapter's metadata and what was ``evaluated``, unless a card is already there: its author may have
    completed it. With ``dry_run`` everything is checked that needs neither a login nor the network, and
    nothing is sent.

    Returns:
        The commit's address (``dry_run``: empty), and the card that was, or would be, written, or None if the
        repository keeps its own.

    Raises:
        UserError: a file that is not an adapter, no login, or a refusal by the Hub.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.utils import validate_repo_id

    check_name(name)  # for a bare name, the Hub would create a repository under this login
    text = _card(adapter, name, card, evaluated)
    if dry_run:
        asking_hub(name, None, lambda: validate_repo_id(name))
        return "", text
    if get_token() is None:
        raise UserError("not logged in to the Hub; run 'hf auth login', or set HF_TOKEN")
    api: Any = HfApi()
    asking_hub(name, None, lambda: api.create_repo(name, private=private, exist_ok=True))
    names, _ = list_files(name, None)
    keeps = CARD in names and card is None
    operations = [CommitOperationAdd(ADAPTER, str(adapter))]
    if not keeps:
        pictures = evaluated.files if evaluated is not None and card is None else {}
        texts = {CARD: text.encode(), **pictures}
        operations += [CommitOperationAdd(path, content) for path, content in texts.items()]
    commit = asking_hub(
        name, None, lambda: api.create_commit(name, operations, commit_message="Upload adapter")
    )
    return str(commit.commit_url), None if keeps else text


def _card(adapter: Path, name: str, card: Path | None, evaluated: Evaluated | None) -> str:
    """Return the user's model card, or one written for the adapter; a UserError refuses another file."""
    from lit_adapter.weights.adapter_file import read_adapter
    from lit_adapter.weights.model_card import model_card

    info, _ = read_adapter(adapter)
    if card is not None:
        return read_text(card)
    base = base_at_hand(info.base, adapter)
    if base is not None and not has_fingerprints(base, info.base):
        base = None  # another one of that name, whose origin is not this adapter's
    return model_card(info, name, base, evaluated)
