"""The executor that reads prompts and decodes on CUDA, with the kernels of training and a few of its own.

It computes the models that the kernels of training compute; no weight is kept twice.

Letters: B slots, N queries, T tokens, C width, H query heads, G key/value heads, D head size, K prompt
length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lit_adapter.model.affine import join_affine
from lit_adapter.model.attention import moved
from lit_adapter.model.block_weights import block_weights, join_groups
from lit_adapter.model.cache import ModuleDecode
from lit_adapter.model.fused_decode_views import PackedPromptView, QueryAttention, QueryView, StepView
from lit_adapter.model.graphs import capture
from lit_adapter.model.joining import grouped_linears
from lit_adapter.model.kernels import decode_attention, decode_products
from lit_adapter.model.kernels.attention import Prefix
from lit_adapter.model.kernels.decode_attention import ROWS
from lit_adapter.model.kernels.sizes import ceil_div, power_of_two
from lit_adapter.model.layout import block_layout
from lit_adapter.model.llama import Llama
from lit_adapter.model.lora import join_updates
from lit_adapter.model.pieces import SHORT_READ, Piece, PieceRow
from lit_adapter.model.rope import no_rotation
from lit_adapter.model.slot_prefixes import Prefixes

MOST_KEYS = 2**16
"""Most keys that the tiles of a short read see in all: each tile reads them for itself."""
ROW_KEYS = 64
"""Keys of a tile that take as long to read as one query more takes in the products."""


class FusedDecode(ModuleDecode):
    """Reads prompts and takes decode steps with kernels of its own.

    ``model`` is one that `cuda_support.unsupported` accepts; its projections are moved side by side.
    """

    def __init__(self, model: Llama, n_slots: int, length: int) -> None:
        super().__init__(model, n_slots, length)
        if model.layers[0].fused_weights is None:
            with torch.inference_mode(False):  # the model may be trained later
                join_groups(model)
        config, device = model.config, self.device
        H, G, D = config.n_head, config.n_kv_head, config.head_dim
        self.H, self.D = H, D
        self.q_width, self.kv_width = H * D, G * D
        layout = block_layout(config)
        affine = [join_affine(block, layout) for block in model.layers]
        found = zip(model.layers, affine, strict=True)
        self.weights = [block_weights(block, layout).adapted(own) for block, own in found]
        self.updates = join_updates(model)
        rotated = model.rotation(torch.arange(length, device=device))  # of all positions, [S, D/2]
        still = no_rotation(rotated) if config.unrotated_layers else rotated
        self.rotations = [rotated if block.self_attn.is_rotated else still for block in model.layers]
        self.windows = [block.self_attn.window for block in model.layers]
        head = model.lm_head
        biased = {linear.group for linear in layout.linears if linear.bias}
        self.fits_few_texts = (
            type(head) is nn.Linear
            and head.bias is None
            and not any(self.updates)
            and not any(affine)
            and not any(weights.quantised for weights in self.weights)
            and biased <= {"qkv"}  # what is added to the residual takes no bias there
            and not config.head_norms  # a program there has half a head at most
        )
        """Whether the kernels for few texts compute the model."""
        self.steps: dict[int, _Step] = {}
        """What takes steps, by the number of slots."""
        self.tile_size = decode_attention.tile_size((H, G))
        self.short_reads: dict[tuple[int, int], _ShortRead] = {}
        """What reads few tokens of prompts, by the number of queries and the size of their tiles."""

    def read(self, pieces: Sequence[Piece]) -> Tensor:
        """Read pieces of prompts; see `ModuleDecode.read`. A common start would take a pass of its own."""
        self.prefixes.assign({piece.slot: piece.prefixes for piece in pieces})
        kind = self._short_read_of(pieces)
        return self._read_rows(pieces) if kind is None else self._short_read(kind).read(pieces)

    def capture_reads(self) -> None:
        """Capture short reads of every number of queries, in tiles and one by one."""
        longest, n = min(SHORT_READ, self.cache.length - 1), ROWS
        while n <= power_of_two(longest):
            piece = Piece([0] * min(n, longest), 0, self.prefixes.rows[0])
            for size in {1, self.tile_size}:
                for _ in range(2):  # the first time launches one by one
                    self._short_read((n, size)).read([piece])
            n *= 2

    def _short_read(self, kind: tuple[int, int]) -> _ShortRead:
        if kind not in self.short_reads:
            self.short_reads[kind] = _ShortRead(self, *kind)
        return self.short_reads[kind]

    def _short_read_of(self, pieces: Sequence[Piece]) -> tuple[int, int] | None:
        """Return the number of queries of the cheapest short read, and the size of their tiles.

        Large tiles read fewer keys, but a short piece leaves rows of its last tile empty. None if the pieces
        are too long.
        """
        found = {}
        for size in (1, self.tile_size):  # of equals, the second
            n_tiles = [ceil_div(piece.n_new, size) for piece in pieces]
            n = max(ROWS, power_of_two(size * sum(n_tiles)))
            n_keys = sum(tiles * len(piece.prompt) for tiles, piece in zip(n_tiles, pieces, strict=True))
            if n <= SHORT_READ and n_keys <= MOST_KEYS:
                found[n_keys + ROW_KEYS * n] = n, size
        return found[min(found)] if found else None

    def _length_in_row(self, piece: Piece) -> int:
        return len(piece.prompt)  # keys before a piece are gathered into the row

    def _read_row(self, row: PieceRow) -> Tensor:
        view = PackedPromptView(self, row)
        hidden = self.prefixes.reader(row)(row.ids[None], view, row.last)[0]
        return hidden if view.lost is None else hidden + view.lost[row.slot[row.last], None].to(hidden.dtype)

    def kernel_prefixes(self, prefixes: Prefixes) -> dict[int, Prefix]:
        """Return the prefix of each adapted layer in the form that the kernel for prompts takes."""
        states = prefixes.stacked
        if states is None:
            return {}
        kv = torch.cat((states.k, states.v), 1).transpose(1, 2).flatten(2)  # [L, K, 2 G D]
        by_token, unrotated = states.strength.shape[2] > 1, bool(states.unrotated)
        strength = (
            states.strength[..., 0] if by_token else states.strength[:, :, 0].expand(-1, self.H, self.D)
        )
        pairs = zip(kv, strength.contiguous(), strict=True)
        found = [Prefix(*pair, by_token=by_token, unrotated=unrotated) for pair in pairs]
        return dict(zip(prefixes.layers, found, strict=True))

    def prepare(self, n: int) -> None:
        """Allocate what steps of the first ``n`` slots use; this must not happen during a capture."""
        if n not in self.steps:
            self.steps[n] = _Step(self, n)

    def captured_step(self, token: Tensor, position: Tensor, used: int) -> Tensor:
        """Put the newest tokens of the first slots into the cache; see `ModuleDecode.captured_step`."""
        self.prepare(len(token))
        return self.steps[len(token)].take(self.prefixes.stepper, token, position)


class _Step:
    """Takes the steps of the first N slots."""

    def __init__(self, decode: FusedDecode, n: int) -> None:
        self.decode, self.queries = decode, QueryAttention(decode, n)
        self.slot = torch.arange(n, device=decode.device)
        fits = decode.fits_few_texts and decode_products.computes(n, decode.D, decode.device)
        self.few = _FewTexts(self.queries, n) if fits else None

    def take(self, model: Llama, token: Tensor, position: Tensor) -> Tensor:
        """Take a step with the norms of ``model``; see `FusedDecode.captured_step`."""
        if self.few is not None:
            return self.few.step(model, token, position)
        view = StepView(self.decode, self.queries, self.slot, position)
        return model.logits(model(token[:, None], view)[:, 0])


class _ShortRead:
    """Reads up to N tokens of any prompts as the queries of one step, in tiles of a size, by a graph."""

    def __init__(self, decode: FusedDecode, n: int, size: int) -> None:
        self.decode, self.n, self.size = decode, n, size
        self.tokens = torch.zeros(3, n, dtype=torch.long, device=decode.device)
        """Their ids, slots and positions."""
        self.queries = QueryAttention(decode, n, self.tokens[1], size)
        self.hidden: Tensor | None = None
        self.graph: Callable[[], None] | None = None
        self.prefixes: Prefixes | None = None  # those that the graph reads

    def read(self, pieces: Sequence[Piece]) -> Tensor:
        """Return the hidden states of the last tokens ``[B, C]``; see `ModuleDecode.read`."""
        last, joined = self._place(pieces), self.decode.prefixes.joined
        if self.prefixes is not joined:  # a single use is not worth a capture
            self.prefixes, self.graph = joined, None
            self._compute()
        else:
            self.graph = self.graph or capture(self._compute)
            self.graph()
        assert self.hidden is not None
        return self.hidden[last]

    def _place(self, pieces: Sequence[Piece]) -> Tensor:
        """Put the tokens of pieces into tiles, and return where their last ones are ``[B]``.

        Where a tile is not full, its piece's last token is computed again.
        """
        tokens: list[tuple[int, int, int]] = []
        last = []
        for piece in pieces:
            own = [(piece.prompt[at], piece.slot, at) for at in range(piece.done, len(piece.prompt))]
            tokens += own + own[-1:] * (-len(own) % self.size)
            last.append(len(tokens) - 1)
        tokens += tokens[-1:] * (self.n - len(tokens))
        columns = [value for column in zip(*tokens, strict=True) for value in column]
        found = moved(torch.tensor(columns + last), self.decode.device)
        self.tokens.copy_(found[: 3 * self.n].view(3, self.n))
        return found[3 * self.n :]

    def _compute(self) -> None:
        decode, (ids, slot, position) = self.decode, self.tokens
        model, norms = decode.model, decode.prefixes.norms
        if norms is not None:
            norms.reading.set(slot, slot)
            model = norms.reader
        view = QueryView(decode, self.queries, slot, position)
        self.hidden = model(ids[None], view)[0]


class _FewTexts:
    """The steps of few texts: five or seven launches per layer, which read each weight once."""

    def __init__(self, queries: QueryAttention, n: int) -> None:
        self.queries, self.decode, config = queries, queries.decode, queries.decode.model.config
        new = queries.y.new_empty
        self.x = new(n, config.n_embd)
        self.q = new(n, self.decode.q_width)
        self.hidden = new(n, config.n_hidden)
        self.logits = new(n, config.vocab_size, dtype=torch.float32)
        self.products = decode_products.Products(self.x)

    def step(self, model: Llama, token: Tensor, position: Tensor) -> Tensor:
        """Take a step; see `_Step.take`."""
        decode, products, x = self.decode, self.products, self.x
        layout = block_layout(model.config)
        torch.index_select(model.embed_tokens.weight, 0, token, out=x)
        for index, block in enumerate(model.layers):
            qkv, (o,), (gate, up), (down,) = grouped_linears(block, layout).values()
            weights, biases = [linear.weight for linear in qkv], [linear.bias for linear in qkv]
            cache, norm, rotation = decode.cache.layer(index), block.input_layernorm, decode.rotations[index]
            products.project(
                x, norm.weight_of(len(x)), norm.eps, weights, biases, rotation, position, self.q, cache
            )
            products.add_linear(self.queries.attend(index, self.q, position), o.weight, x)
            norm = block.post_attention_layernorm
            products.gate_up(x, norm.weight_of(len(x)), norm.eps, gate.weight, up.weight, self.hidden)
            products.add_linear(self.hidden, down.weight, x)
        norm = model.norm
        products.norm_linear(x, norm.weight_of(len(x)), norm.eps, model.lm_head.weight, self.logits)
        return self.logits
