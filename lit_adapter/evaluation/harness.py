"""Our model in the form that lm-evaluation-harness and its tasks expect.

Likelihoods are computed in packed rows, where the choices of a question share its text; answers come from the
engine. Texts are tokenized as by the harness's own ``hf`` model: BOS first if the base was trained with it,
unless the text begins with it, and control tokens by their spelling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from lit_adapter.evaluation.conversation import ChatTemplate
from lit_adapter.evaluation.windows import windows
from lit_adapter.generation.adapted import AdaptedLlama
from lit_adapter.generation.choosing import Scored, TextLikelihood, likelihoods
from lit_adapter.generation.settings import Sampling
from lit_adapter.progress import count_progress
from lit_adapter.text.chat import control_pattern

MAX_GEN_TOKS = 256
"""Longest answer of a task that sets no limit, as in ``hf``."""


class HarnessModel(TemplateLM):
    """A base with or without adapter.

    Args:
        model: as `load` returns it; its template is not used, because tasks bring their own prompts.
        title: its name in the progress bar.
        batch_size: answers generated at a time.
    """

    def __init__(self, model: AdaptedLlama, title: str = "", batch_size: int = 16) -> None:
        super().__init__()
        self.adapted, self.title, self._batch_size = model, title, batch_size
        self._chat: ChatTemplate | None = None
        self._pattern = control_pattern(model.tokenizer)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.adapted.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context: BOS, or EOS in a base without BOS."""
        bos = self.adapted.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """The base's context."""
        return self.adapted.model.config.context_length

    @property
    def batch_size(self) -> int:
        """Answers generated at a time."""
        return self._batch_size

    @property
    def tokenizer_name(self) -> str:
        """The name of the chat template in the harness's caches."""
        return repr(self.adapted)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the base's template, which results record."""
        return self.adapted.tokenizer.chat_template or ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as text, in the base's own chat template."""
        self._chat = self._chat or ChatTemplate(self.adapted.tokenizer)
        return self._chat.render(chat_history, asks=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Return a text's ids; by default with BOS if the base was trained with it."""
        tokenizer = self.adapted.tokenizer
        pieces = self._pieces(string)
        bos = tokenizer.bos_id
        wanted = tokenizer.add_bos if add_special_tokens is None else add_special_tokens and tokenizer.add_bos
        ids: list[int] = []
        if wanted and bos is not None and (add_special_tokens or pieces[:1] != [bos]):
            ids.append(bos)
        for place, piece in enumerate(pieces):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                continues = place > 0 and not tokenizer.space_after_control
                ids += tokenizer.encode(piece, continuation=continues)
        return ids

    def _pieces(self, string: str) -> list[str | int]:
        """Return the control tokens of a text, and the texts between them."""
        pieces: list[str | int] = []
        at = 0
        for match in self._pattern.finditer(string) if self._pattern else ():
            pieces += [string[at : match.start()], self.adapted.tokenizer.control_tokens[match[0]]]
            at = match.end()
        return [piece for piece in [*pieces, string[at:]] if piece != ""]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **unused: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations of contexts, both as token ids; a long context loses its start."""
        texts = []
        for _, context, continuation in requests:
            ids = [*context, *continuation][-(self.max_length + 1) :]
            texts.append(Scored(ids, len(ids) - len(continuation)))
        found = self._likelihoods(texts)
        for (given, *_), one in zip(requests, found, strict=True):
            if given is not None:
                self.cache_hook.add_partial("loglikelihood", given, (one.log_likelihood, one.is_greedy))
        return [(one.log_likelihood, one.is_greedy) for one in found]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, in windows of the base's context."""
        parts = [
            windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length)
            for request in requests
        ]
        found = iter(self._likelihoods([window for part in parts for window in part]))
        totals = [sum(next(found).log_likelihood for _ in part) for part in parts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _likelihoods(self, texts: Sequence[Scored]) -> list[TextLikelihood]:
        with count_progress(f"likelihoods, {self.title}", len(texts)) as finished:
            return likelihoods(self.adapted.model, texts, finished)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue texts up to a stop text; requests with the same settings are answered together."""
        answers = [""] * len(requests)
        together: dict[Sampling, list[int]] = {}
        for number, request in enumerate(requests):
            together.setdefault(self._sampling(request.args[1]), []).append(number)
        with count_progress(f"answers, {self.title}", len(requests)) as finished:
            for settings, numbers in together.items():
                room = self.max_length - settings.max_new_tokens
                prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
                found = self.adapted.continue_batch(
                    prompts, batch_size=self._batch_size, finished=finished, **vars(settings)
                )
                for number, text in zip(numbers, found, strict=True):
                    answers[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return answers

    def _sampling(self, given: dict[str, Any]) -> Sampling:
        """Return a task's ``generation_kwargs`` as our settings.

        Raises:
            UserError: there is a setting that we do not have.
        """
        settings = normalize_gen_kwargs(given, MAX_GEN_TOKS)
        sampled = settings.pop("do_sample", False)
        temperature = float(settings.pop("temperature", 1.0 if sampled else 0.0) or 0.0)
        return Sampling.of(
            max_new_tokens=min(settings.pop("max_gen_toks"), self.max_length - 1),
            stop=tuple(text for text in settings.pop("until", ()) if text),
            temperature=temperature if sampled else 0.0,
            **settings,
        )
