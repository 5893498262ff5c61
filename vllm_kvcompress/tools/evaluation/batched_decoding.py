"""Decoding from many caches of any lengths in one batch.

Everything but attention is computed for all caches in one batch; attention is run for each on its
own keys, so layers and caches may differ in length and nothing is padded or masked. Needs torch and
transformers, not kvpress.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "kvcompress_rows"
"""Name under which transformers finds :func:`attend`; for a name of its own it makes no masks."""

MEASURED_AT_ONCE = 32
"""Tokens whose logits are held together; over a vocabulary of 150 000 they are large."""


class CacheRows:
    """A batch of caches in the place of a cache of transformers.

    Attributes:
        rows: One a member of the batch.

    """

    is_compileable = False

    def __init__(self, rows: Sequence[DynamicCache]) -> None:
        self.rows = list(rows)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Take a layer's new tokens, [B, N, Q, D]; each row's whole keys and values go to
        :func:`attend`.
        """
        held = [
            row.update(new_keys[None], new_values[None], layer)
            for row, new_keys, new_values in zip(self.rows, keys, values, strict=True)
        ]
        return [row_keys for row_keys, _ in held], [row_values for _, row_values in held]

    def get_seq_length(self, layer: int = 0) -> int:
        """Tokens of the longest row; positions are given, so no result depends on it."""
        return max(row.get_seq_length(layer) for row in self.rows)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | list[torch.Tensor],
    value: torch.Tensor | list[torch.Tensor],
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA of transformers, row by row where the cache is :class:`CacheRows`.

    Args:
        module: The attention layer.
        query: [B, H, Q, D].
        key: [B, N, T, D], or for each row [1, N, T of the row, D].
        value: The same shape as ``key``.
        attention_mask: None; causal for want of one.
        kwargs: Further arguments of :func:`sdpa_attention_forward`.

    Returns:
        [B, Q, H, D] and no weights.

    """
    if isinstance(key, torch.Tensor):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    outputs = []
    new = query.shape[2]
    for index, (row_key, row_value) in enumerate(zip(key, value, strict=True)):
        mask = None
        if new > 1:
            tokens = row_key.shape[2]
            mask = torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new)[None, None]
        row_query = query[index : index + 1]
        output, _ = sdpa_attention_forward(module, row_query, row_key, row_value, mask, **kwargs)
        outputs.append(output)
    return torch.cat(outputs), None


def prepare(model: Any) -> None:
    """Have a model of transformers attend by :func:`attend`.

    To be called after kvpress has been imported, which wraps all attention functions it finds in
    one that knows tensors only.
    """
    ALL_ATTENTION_FUNCTIONS[ATTENTION] = attend
    model.set_attn_implementation(ATTENTION)


class Continuation:
    """Rows of one prompt or of several that are being decoded.

    Args:
        model: A causal language model of transformers that :func:`prepare` has been given.
        rows: Caches; they grow.
        logits: After each row's last token, [B, V].
        positions: Position of each row's next token, int64 [B]; compression changes none.

    """

    def __init__(
        self,
        model: Any,
        rows: Sequence[DynamicCache],
        logits: torch.Tensor,
        positions: torch.Tensor,
    ) -> None:
        self._model = model
        self._rows = CacheRows(rows)
        self._positions = positions
        self.logits = logits

    @classmethod
    def after(
        cls, model: Any, rows: Sequence[DynamicCache], logits: torch.Tensor, tokens: int
    ) -> Continuation:
        """Caches of one prompt, ``logits`` [1, V] after all ``tokens`` of it."""
        count = len(rows)
        return cls(model, rows, logits.expand(count, -1), torch.full((count,), tokens))

    @classmethod
    def join(cls, parts: Sequence[Continuation]) -> Continuation:
        """All rows of several, one after another; the parts are used up."""
        return cls(
            parts[0]._model,
            [row for part in parts for row in part._rows.rows],
            torch.cat([part.logits for part in parts]),
            torch.cat([part._positions for part in parts]),
        )

    def feed(self, token_ids: torch.Tensor) -> None:
        """Give each row tokens, int64 [B or 1, Q]."""
        self.logits = self._forward(token_ids, 1)[:, -1]

    def select(self, indices: Sequence[int]) -> None:
        """Continue with these rows alone."""
        chosen = torch.tensor(indices)
        self._rows = CacheRows([self._rows.rows[index] for index in indices])
        self._positions = self._positions[chosen]
        self.logits = self.logits[chosen]

    def measure(self, token_ids: torch.Tensor) -> list[float]:
        """Mean negative log-likelihood of tokens, int64 [M], that come next, in nats, per row."""
        sums = torch.zeros(len(self._rows.rows), dtype=torch.float64)
        for chunk in torch.split(token_ids, MEASURED_AT_ONCE):
            after = self._forward(chunk[None], 0)
            before = torch.cat([self.logits[:, None], after[:, :-1]], dim=1)
            for row, logits in enumerate(before):
                loss = torch.nn.functional.cross_entropy(logits.float(), chunk, reduction="sum")
                sums[row] += loss
            self.logits = after[:, -1]
        return (sums / len(token_ids)).tolist()

    def _forward(self, token_ids: torch.Tensor, logits_to_keep: int) -> torch.Tensor:
        new = token_ids.shape[1]
        positions = self._positions[:, None] + torch.arange(new)
        self._positions = self._positions + new
        return self._model(
            input_ids=token_ids.expand(len(self._rows.rows), -1),
            position_ids=positions,
            past_key_values=self._rows,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        ).logits
