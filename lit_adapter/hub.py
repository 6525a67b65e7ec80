"""Requests to the Hugging Face Hub; failures are reported in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lit_adapter.errors import UserError


def check_name(name: str) -> None:
    """Refuse a name that does not have the form org/name."""
    if name.count("/") != 1:
        raise UserError(f"'{name}' is not a name on the Hub; expected org/name")


def asking_hub(name: str, revision: str | None, ask: Callable[[], Any], *, absent: str = "") -> Any:
    """Return the result of a request about a repository, or a repository and file.

    Raises:
        UserError: the request failed; if there is no such repository, the message adds ``absent``.
    """
    from huggingface_hub import errors

    try:
        return ask()
    except errors.GatedRepoError:
        why = "access is restricted; ask for it on its page, then run 'hf auth login'"
    except errors.RepositoryNotFoundError:
        also = f", {absent}" if absent else ""
        why = f"not found on the Hub{also}; check the spelling, or run 'hf auth login' if it is private"
    except errors.RevisionNotFoundError:
        why = f"has no revision '{revision}'; check the branch, tag or commit"
    except errors.LocalEntryNotFoundError:
        why = "not downloaded yet, and the Hub cannot be reached; check the network"
    except errors.EntryNotFoundError:
        why = "no such file on the Hub; check its path"
    except errors.BadRequestError as error:
        why = f"the Hub refused it: {str(error).strip().splitlines()[-1]}"
    except errors.HFValidationError:
        raise UserError(f"'{name}' is not a name on the Hub; expected org/name") from None
    except Exception as error:
        # The base class of transport errors changes with the library's version.
        transport = type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "requests")
        if not transport and not isinstance(error, (OSError, errors.HfHubHTTPError)):
            raise
        why = _transport_failure(error)
    raise UserError(f"{name}: {why}")


def _transport_failure(error: Exception) -> str:
    reason = (str(error).strip().splitlines() or ["no answer"])[0][:200]
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        return (
            f"this login is not permitted to do that ({reason}); check the name, or run 'hf auth login' "
            "with a token that is"
        )
    kind = type(error).__name__
    return f"the Hub cannot be reached ({kind}: {reason}); check the network and run the same command again"
