"""A runner whose forward is staged before its draft exists, so that both go to the device in one upload.

The draft is a chain whose tokens only the device knows; the host reads them with the step's decisions.

    python generate.py --kernels triton --device cuda --prompt "from pathlib import"
"""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import Inputs, on_device
from .runner import NO_DRAFT, CachedRunner, Owners, Work
from .steps import TargetOutput


class DeviceRunner(CachedRunner):
    """For models whose tokens are drawn by kernels of a GPU backend."""

    @torch.inference_mode()
    def prepare(
        self, owners: Owners, token_ids: list[list[int]], widths: list[int], ahead: bool = False
    ) -> tuple[list[Work], Inputs]:
        """Prefill, make room, and stage the inputs of a forward over these rows and widths[r] draft tokens of each.

        ahead: the draft tokens are not inputs of this forward, but of later ones.
        """
        with self._naming_owner():
            works = list[Work]()
            for owner, text, width in zip(owners, token_ids, widths, strict=True):
                works.append(self._begin(owner, text, NO_DRAFT if ahead else on_device(width), None, ()))
                if ahead:
                    self.manager.cache.make_room(works[-1].row.number, works[-1].count + width - 1)
            return works, self._inputs(works)

    @torch.inference_mode()
    def finish(self, works: list[Work], inputs: Inputs, draft: Tensor) -> TargetOutput:
        """Run the forward that `prepare` staged, with draft tokens int64 [R, K] on the device."""
        return self._done(works, self.model.logits(inputs.read_from(self.run(inputs, draft=draft)[0])), None)
