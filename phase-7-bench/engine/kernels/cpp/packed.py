"""The part of CppModel that loads: packs the matrices of a Transformer into panels for the C++ engine.

packed = PackedModel(load("stdlib-10m", torch.float32, torch.device("cpu")).model, "int4")
packed.weight_bytes, packed.activations
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from common.errors import UserError

from ...model import Transformer
from ...quantize import QuantLinear
from .library import checked_threads, chosen_isa, library
from .weights import KIND_OF, Plan, Weights, describe, pack, plans, release_matrix, set_vectors, why_not_model


class PackedModel:
    """The matrices of `model` in the format `weights`, its norms and its embedding, in an engine.

    weights: the format of the matrices; matrices that are already quantised keep theirs. int4 has groups of 64, or of
    32 if 64 does not divide a width. head: the format of the output matrix; by default `weights`, and int8 with int4.
    release: take each matrix out of the torch model as soon as it is packed; the torch model then holds only its
    embedding and its head.

    exact_activations: keep activations in float32. By default they are rounded for the products: to bfloat16 with
    bfloat16 weights, if the processor has the dot product of AVX-512, which gives twice as many products per second as
    float32; to int8 in groups of 64 with int8 and int4.

    The bits of a token's logits do not depend on the number of tokens in a step, nor on the threads. UserError names
    what the kernels do not support.
    """

    def __init__(
        self,
        model: Transformer,
        weights: Weights = "float32",
        threads: int | None = None,
        *,
        head: Weights | None = None,
        exact_activations: bool = False,
        release: bool = False,
    ) -> None:
        if (reason := why_not_model(model)) is not None:
            raise UserError(reason)
        self._prepare(model, weights, threads, head, exact_activations, release)

    def _prepare(
        self,
        model: Any,  # a Transformer, or an object with the same parts
        weights: Weights,
        threads: int | None,
        head: Weights | None,
        exact_activations: bool,
        release: bool,
    ) -> None:
        self.config, self.weights = model.config, weights
        self.exact_activations = exact_activations
        self.isa = chosen_isa()
        self._engine = library().Engine(describe(model.config), checked_threads(threads), self.isa)
        self._tables = self._take_tables(model)
        head = head or ("int8" if weights == "int4" else weights)
        every = [*plans(model, weights, head), *self._more(model, weights)]
        self.weight_bytes = sum(plan.shape(exact_activations).bytes for plan in every)
        arena = library().Arena(self.weight_bytes + 64 * len(every))
        for plan in every:
            packed = pack(plan, arena, exact_activations, self.threads)
            if isinstance(plan.module, QuantLinear) and plan.module.order is not None:
                packed.set_order(plan.module.order.tolist())
            self._set(plan, packed)
            if release:
                release_matrix(plan)
        set_vectors(self._engine, model)
        for number in range(model.config.layers):
            self._engine.set_window(number, model.config.window_of(number) or 0)
        self._finish()

    def _finish(self) -> None:
        """Check that all parts are there and allocate the engine's memory."""
        self._engine.finish()

    def _more(self, model: Any, weights: Weights) -> list[Plan]:
        """Return matrices that only this kind of model has."""
        return []

    def _set(self, plan: Plan, packed: Any) -> None:
        """Give the engine a packed matrix."""
        if plan.which == "join":
            self._engine.set_join(packed)
        else:
            self._engine.set_matrix(plan.layer, plan.which, packed)
        if plan.which == "head":
            self._head = packed

    def _take_tables(self, model: Any) -> list[Tensor]:
        """Give the engine the embeddings, which it reads in place; return the tensors, to keep them alive."""
        tables = [model.embedding.weight.detach().contiguous()]
        if model.config.positions == "learned":
            tables.append(model.positions.weight.detach().contiguous())
        for name, table in zip(("embedding", "positions"), tables, strict=False):
            self._engine.set_table(name, table.data_ptr(), KIND_OF[table.dtype], len(table))
        return tables

    @property
    def threads(self) -> int:
        return int(self._engine.threads)

    @property
    def activations(self) -> str:
        """Return the format of the activations in products with the matrices."""
        if self.exact_activations or self.weights in ("float32", "float16"):
            return "float32"
        if self.weights == "bfloat16":
            return "bfloat16" if self._engine.narrow_bf16 else "float32"
        return "int8"

    def logits(self, hidden: Tensor) -> Tensor:
        """Multiply hidden [..., D], as `CppModel.step` gives it, by the output matrix: the same bits as its logits."""
        rows = hidden.detach().float().contiguous().view(-1, self.config.width)
        logits = torch.empty(len(rows), self.config.vocab_size)
        self._engine.product(self._head, rows.data_ptr(), len(rows), logits.data_ptr())
        return logits.view(*hidden.shape[:-1], self.config.vocab_size)
