"""Our training step with its savings added one after the other, to see what each brings.

`PaddedOurs` has none of them; then come the output layer at targets only, packing, the last layer at targets
only, and, in `Packed`, shared preambles.
"""

from __future__ import annotations

from torch import Tensor, nn

from benchmarks.methods import Packed, PaddedOurs, Part
from benchmarks.models import Base
from benchmarks.workload import Workload
from lit_adapter.data.packing import Packer
from lit_adapter.model.attention import SegmentView
from lit_adapter.model.loss import row_loss, target_loss


class TargetHead(PaddedOurs):
    """Padded, with the output layer at targets only."""

    def loss(self, part: Part) -> Tensor:
        """Return a padded batch's loss."""
        hidden, labels = self._hidden(part)[:, :-1].flatten(0, 1), part.data.labels[:, 1:].flatten()
        place = (labels != -100).nonzero().flatten()
        return target_loss(hidden[place], self.base.model.lm_head.weight, labels[place])


class Unshared(Packed):
    """Packed, with a preamble for every record; optionally with the last layer at all positions."""

    def __init__(
        self,
        base: Base,
        work: Workload,
        parameters: list[nn.Parameter],
        row_tokens: int,
        *,
        whole_last_layer: bool,
    ) -> None:
        super().__init__(base, work, parameters, row_tokens)
        self.packer = Packer(work.encoded, {}, mask_prompt=True, row_tokens=row_tokens)
        self.whole_last_layer = whole_last_layer

    def loss(self, part: Part) -> Tensor:
        """Return a packed row's loss."""
        model, row = self.base.model, part.data
        if not self.whole_last_layer:
            return row_loss(model, row)
        ids, position, target_index, target_id = row.inputs(self.base.device)
        view = SegmentView(row, model.rotation(position[None]))
        hidden = model(ids[None], view)[0, target_index]
        return target_loss(hidden, model.lm_head.weight, target_id)
