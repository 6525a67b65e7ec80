from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_adapter.cli.command import add_sampling, command_parser, parse, sampling_of
from lit_adapter.cli.main import COMMANDS
from lit_adapter.errors import UserError
from lit_adapter.streams import say

if TYPE_CHECKING:
    from lit_adapter.generation.terminal import Partner

TEMPLATE = (
    "template of a plain base: auto (default: the base's own chat template, or a similar one), chatml, "
    "llama3, mistral, alpaca-chat, or a file NAME.jinja"
)
ADAPTER = "adapter.safetensors of a run, or the run's folder; with --url the name of a model of the server"
HERE = ("base", "template", "device", "dtype", "verify", "stop_ids")
"""Options for models in this process, which a server has chosen for itself or does not offer."""


def main(argv: Sequence[str], program: str | None = None) -> int:
    """Parse, load, and answer what is typed or piped."""
    options = _parse(argv, program)
    sampling = sampling_of(options)
    interactive = sys.stdin is not None and sys.stdin.isatty()
    partner, about = _loaded(options) if options.url is None else _at_server(options)
    from lit_adapter.generation import terminal

    conversation = terminal.Conversation(
        *(partner, sampling, sys.stdout, options.system or ""), interactive=interactive
    )
    if interactive:
        say(about, sys.stderr)
        say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves", sys.stderr)
    terminal.converse(conversation, terminal.typed_lines() if interactive else _piped_lines())
    return 0


def _loaded(options: Any) -> tuple[Partner, str]:
    """Load the models that answer; return them, and what a person is told about them."""
    from lit_adapter.generation.load import load
    from lit_adapter.generation.loaded_models import LoadedModels

    model = load(
        options.adapter,
        options.base,
        device=options.device,
        dtype=options.dtype,
        template=None if options.adapter else options.template or "auto",
        verify=options.verify,
    )
    who = f"{options.adapter} on " if options.adapter else ""
    about = f"{who}{model.base_name}; template {model.template.kind}"
    return LoadedModels(model, options.adapter), about


def _at_server(options: Any) -> tuple[Partner, str]:
    """Return the models of a server, and what a person is told about them."""
    from lit_adapter.serving.client import ServerModels, read_key

    key = read_key(Path(options.api_key_file)) if options.api_key_file else None
    models = ServerModels(options.url, key, options.adapter)
    return models, f"{models.name} at {models.url}; /adapter lists its models"


def _parse(argv: Sequence[str], program: str | None) -> Any:
    parser = command_parser(COMMANDS["chat"], program)
    parser.add_argument("--adapter", metavar="FILE", help=ADAPTER)
    parser.add_argument(
        "--base", metavar="FOLDER", help="base folder; by default the one that the adapter names"
    )
    parser.add_argument("--url", metavar="http://HOST:PORT", help="talk to the models of a server instead")
    parser.add_argument("--api-key-file", metavar="FILE", help="the key that the server of --url asks for")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--template", help=TEMPLATE)
    parser.add_argument("--device", help="cpu or cuda; by default CUDA where there is one")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; by default the faster one")
    parser.add_argument(
        "--verify", action="store_true", help="compare every byte of the base with its checksums"
    )
    add_sampling(parser)
    options = parse(parser, argv)
    _check(options)
    return options


def _check(options: Any) -> None:
    """Refuse options that would have no effect, or that exclude each other."""
    if options.url is not None:
        other = next((name for name in HERE if options[name]), None)
        if other is not None:
            raise UserError(f"--{other} together with --url has no meaning; leave one of them out")
        return
    if options.api_key_file is not None:
        raise UserError("--api-key-file without --url has no meaning; add --url, or leave it out")
    if options.adapter is None and options.base is None:
        raise UserError("give --adapter FILE, --base FOLDER for a plain base, or --url of a server")
    if options.adapter is not None and options.template is not None:
        raise UserError("--template together with --adapter, which brings its template, has no meaning")


def _piped_lines() -> Iterator[str]:
    """Yield the lines of standard input."""
    for number, content in enumerate(sys.stdin.buffer if sys.stdin is not None else (), start=1):
        try:
            yield content.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"standard input:{number}: not UTF-8 text (byte {error.start})") from None
