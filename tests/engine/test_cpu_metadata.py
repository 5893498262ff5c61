"""CPU attention's metadata per layer is what vLLM's own builder makes of the layer's tables."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
    _get_attn_isa,
)

from vllm_kvcompress.engine.attention.cpu_attn import ArenaCPUMetadataBuilder
from vllm_kvcompress.paging.page_tables import LayerTables

HEADS, KV_HEADS, DIM, SIZE = 4, 2, 64, 32


@pytest.fixture
def builder() -> ArenaCPUMetadataBuilder:
    made = ArenaCPUMetadataBuilder.__new__(ArenaCPUMetadataBuilder)
    dtype = torch.bfloat16
    made.__dict__.update(
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        dtype=dtype,
        window_size=-1,
        block_size=SIZE,
        kv_cache_dtype="auto",
        isa=_get_attn_isa(dtype, SIZE, DIM, "auto"),
        is_cross_attention=False,
        is_encoder_only_attention=False,
    )
    return made


@pytest.mark.parametrize("tokens", [[1, 1, 1], [1, 5, 40]], ids=["decode", "mixed"])
def test_each_layer_gets_what_vllms_builder_would_make(
    builder: ArenaCPUMetadataBuilder, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def schedule(**arguments: Any) -> Tensor:
        """In place of the operator, whose result holds addresses: what it was asked for."""
        words = sorted((name, str(value)) for name, value in arguments.items())
        return torch.frombuffer(bytearray(str(words).encode()), dtype=torch.uint8)

    monkeypatch.setattr(ops, "cpu_attn_get_scheduler_metadata", schedule)
    lengths = torch.tensor([[900, 80, 64], [130, 60, 64], [900, 80, 64]], dtype=torch.int32)
    total = sum(tokens)
    tables = LayerTables(
        block_tables=torch.arange(3 * 3 * 30, dtype=torch.int32).view(3, 3, 30),
        seq_lens=lengths,
        slot_mapping=torch.arange(3 * total).view(3, total),
    )
    start = torch.tensor([0, *torch.tensor(tokens).cumsum(0).tolist()], dtype=torch.int32)

    def common(layer: int | None) -> CommonAttentionMetadata:
        held = (
            torch.tensor([2000, 1800, 64], dtype=torch.int32) if layer is None else lengths[layer]
        )
        return CommonAttentionMetadata(
            query_start_loc=start,
            query_start_loc_cpu=start,
            seq_lens=held,
            num_reqs=3,
            num_actual_tokens=total,
            max_query_len=max(tokens),
            max_seq_len=int(held.max()),
            block_table_tensor=tables.block_tables[layer or 0],
            slot_mapping=tables.slot_mapping[layer or 0],
            causal=True,
        )

    base = CPUAttentionMetadataBuilder.build(builder, 0, common(None))
    layers = builder._build_layers(base, 3, tables)
    for layer, own in enumerate(layers):
        expected = CPUAttentionMetadataBuilder.build(builder, 0, common(layer))
        for field in fields(CPUAttentionMetadata):
            value, wanted = getattr(own, field.name), getattr(expected, field.name)
            if isinstance(wanted, torch.Tensor):
                assert torch.equal(value, wanted), field.name
            else:
                assert value == wanted, field.name
    assert layers[2].scheduler_metadata is layers[0].scheduler_metadata
    assert layers[1].scheduler_metadata is not layers[0].scheduler_metadata
