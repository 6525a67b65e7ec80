"""A user's own metric, named ``module:function``."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_adapter.errors import UserError, shorten
from lit_adapter.evaluation.metrics import Metric


def own_metric(name: str) -> Metric:
    """Return the metric of a function that takes an answer and its reference and returns a number or bool.

    The module is looked for in the working directory first.

    Raises:
        UserError: there is no such module or function, or importing it fails.
    """
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module does
        raise UserError(f"--metrics: {name}: cannot import {module_name}: {_in_words(error)}") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"--metrics: {name}: {module_name} has no function {shorten(function_name)}")
    return Metric(name, function_name.replace("_", " "), _checked(name, function))


def _checked(name: str, function: Callable[[str, str], Any]) -> Callable[[str, str], float]:
    def score(answer: str, reference: str) -> float:
        where = f"--metrics: {name}({shorten(answer)}, {shorten(reference)})"
        try:
            value = function(answer, reference)
        except Exception as error:  # whatever the user's function raises
            raise UserError(f"{where} raised {_in_words(error)}") from None
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{where} returned {shorten(value)}; expected a finite number or a bool")
        return float(value)

    return score


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
