"""Imported last by the process that runs are forked from: its objects are left out of every collection.

Otherwise the first collection of each fork would visit, and thereby copy, all that was imported.
"""

from __future__ import annotations

import gc

gc.collect()
gc.freeze()
