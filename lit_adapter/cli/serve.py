from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_adapter.cli.command import check_least, command_parser, parse
from lit_adapter.cli.main import COMMANDS
from lit_adapter.errors import UserError
from lit_adapter.serving.limits import Limits
from lit_adapter.serving.names import named_adapters
from lit_adapter.serving.options import ServerOptions

ADAPTER = (
    "an adapter's file or run folder, served under the name of the run folder or file unless NAME is given; "
    "may be repeated"
)


def main(argv: Sequence[str], program: str | None = None) -> int:
    """Parse, and serve until a signal ends it."""
    options = _options(_parse(argv, program))
    options.check()
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"serving needs {error.name}: pip install -e '.[serve]'") from None
    from lit_adapter.serving.run import serve

    serve(options)
    return 0


def _parse(argv: Sequence[str], program: str | None) -> Any:
    default, limits = ServerOptions(), Limits()
    parser = command_parser(COMMANDS["serve"], program)
    add = parser.add_argument
    add("--adapter", metavar="[NAME=]FILE", action="append", help=ADAPTER)
    add(
        "--adapters", metavar="FOLDER", help="a folder of adapters to watch: NAME.safetensors, or run folders"
    )
    add("--base", metavar="FOLDER", help="base folder; by default the one that the first adapter names")
    add("--template", help="template of the plain base; by default its own chat template, else alpaca")
    add("--device", help="cpu or cuda; by default CUDA where there is one")
    add("--dtype", help="float32, bfloat16 or float16; by default the faster one")
    add("--verify", action="store_true", help="compare every byte of the base with its checksums")
    add("--host", default=default.host, help="address to listen on; one that others can reach needs keys")
    add("--port", type=int, default=default.port, help="port to listen on; 0: any free one")
    add("--slots", type=int, default=default.slots, help="answers generated at a time")
    add("--context", type=int, help="longest prompt plus answer, in tokens; by default as memory allows")
    add("--queue", type=int, default=limits.queue, help="answers that may wait for a slot")
    add("--max_tokens", type=int, default=limits.max_tokens, help="longest answer, in tokens")
    add("--per_key", type=int, default=limits.per_key, help="requests in progress for one key or address")
    add("--api-keys", metavar="FILE", help="clients' keys, one per line; 'admin KEY' may change adapters")
    add("--insecure", action="store_true", help="serve other machines without keys")
    add("--cors", nargs="+", metavar="ORIGIN", default=[], help="origins whose web pages may send requests")
    add(
        "--grace",
        type=float,
        default=default.grace,
        help="seconds that answers may take to finish after SIGTERM",
    )
    add("--log-prompts", action="store_true", help="write prompts into the log")
    add("--ready-file", metavar="FILE", help="a file that exists while requests are answered")
    options = parse(parser, argv)
    check_least(options, 1, "slots", "context", "queue", "max_tokens", "per_key")
    check_least(options, 0, "grace")
    return options


def _options(given: Any) -> ServerOptions:
    return ServerOptions(
        adapters=named_adapters(given.adapter or []),
        folder=_path(given.adapters),
        base=_path(given.base),
        template=given.template,
        device=given.device,
        dtype=given.dtype,
        verify=given.verify,
        host=given.host,
        port=given.port,
        slots=given.slots,
        context=given.context,
        api_keys=_path(given.api_keys),
        insecure=given.insecure,
        cors=tuple(given.cors),
        grace=given.grace,
        log_prompts=given.log_prompts,
        ready_file=_path(given.ready_file),
        limits=Limits(queue=given.queue, max_tokens=given.max_tokens, per_key=given.per_key),
    )


def _path(given: str | None) -> Path | None:
    return None if given is None else Path(given)
