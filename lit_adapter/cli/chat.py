from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from lit_adapter.cli.command import add_sampling, command_parser, parse, sampling_of
from lit_adapter.cli.main import COMMANDS
from lit_adapter.errors import UserError
from lit_adapter.streams import say

TEMPLATE = (
    "of a plain base: auto (default: the base's own chat template, or a similar one), chatml, llama3, "
    "mistral, alpaca-chat, or a file NAME.jinja"
)


def main(argv: Sequence[str], program: str | None = None, out: TextIO | None = None) -> int:
    """Parse, load, and answer what is typed or piped, on ``out`` (standard output)."""
    options = _parse(argv, program)
    sampling = sampling_of(options)
    interactive = sys.stdin is not None and sys.stdin.isatty()
    from lit_adapter.generation import terminal
    from lit_adapter.generation.load import load

    template = None if options.adapter else options.template or "auto"
    adapter = terminal.adapter_file(options.adapter) if options.adapter else None
    model = load(
        adapter,
        options.base,
        device=options.device,
        dtype=options.dtype,
        template=template,
        verify=options.verify,
    )
    conversation = terminal.Conversation(
        *(model, sampling, out or sys.stdout, options.system or "", options.adapter), interactive=interactive
    )
    if interactive:
        who = f"{options.adapter} on " if options.adapter else ""
        say(f"{who}{model.base_name}; template {model.template.kind}", sys.stderr)
        say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves", sys.stderr)
    terminal.converse(conversation, terminal.typed_lines() if interactive else _piped_lines())
    return 0


def _parse(argv: Sequence[str], program: str | None) -> Any:
    parser = command_parser(COMMANDS["chat"], program)
    parser.add_argument("--adapter", metavar="FILE", help="adapter.safetensors of a run, or the run's folder")
    parser.add_argument("--base", metavar="FOLDER", help="by default the base the adapter names")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--template", help=TEMPLATE)
    parser.add_argument("--device", help="cpu or cuda; by default CUDA where there is one")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; by default the faster one")
    parser.add_argument("--verify", action="store_true", help="compare all of the base with its checksums")
    add_sampling(parser)
    options = parse(parser, argv)
    if options.adapter is None and options.base is None:
        raise UserError("give --adapter FILE, or --base FOLDER for a plain base")
    if options.adapter is not None and options.template is not None:
        raise UserError("--template together with --adapter, which brings its template, has no meaning")
    return options


def _piped_lines() -> Iterator[str]:
    """Yield the lines of standard input."""
    for number, content in enumerate(sys.stdin.buffer if sys.stdin is not None else (), start=1):
        try:
            yield content.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"standard input:{number}: not UTF-8 text (byte {error.start})") from None
