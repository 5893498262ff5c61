"""Sliding-window groups beside the arena: what requests need, how vLLM groups layers."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec

from tests.support.refusals import SHAPE
from vllm_kvcompress.engine.model_layers import LayerGroups, layers_of, pool_for_arena
from vllm_kvcompress.engine.scheduler.arena_spec import ArenaSpec
from vllm_kvcompress.engine.scheduler.reservations import Reservation
from vllm_kvcompress.engine.scheduler.sliding_window_groups import SlidingWindowGroups
from vllm_kvcompress.engine.worker.arena_worker import arena_group

SIZE, WINDOW, MAX_LEN = 8, 20, 400
STEP = 64
CAP = -(-(WINDOW - 1 + STEP) // SIZE) + 1
"""vLLM's own bound while a prompt is read, of one step's tokens at a time."""


def make_side(lag: int = 0) -> tuple[SlidingWindowGroups, dict[str, list[KVCacheBlock]]]:
    """Two groups, the second of which holds nothing; and the first one's blocks."""
    managers = {
        group: SimpleNamespace(
            block_size=SIZE,
            sliding_window=WINDOW,
            max_admission_blocks_per_request=CAP,
            req_to_blocks=defaultdict(list),
        )
        for group in (0, 2)
    }
    return SlidingWindowGroups(managers, MAX_LEN, lag), managers[0].req_to_blocks


def blocks(*refs: int) -> list[KVCacheBlock]:
    """Blocks with these reference counts; -1: null."""
    made = []
    for number, count in enumerate(refs):
        block = KVCacheBlock(number)
        block.is_null = count < 0
        block.ref_cnt = max(count, 0)
        made.append(block)
    return made


def reservation(known: int, reserved_until: int, read: bool = False) -> Reservation:
    return Reservation(None, reserved_until, known_tokens=known, prefilled=read)


@pytest.mark.parametrize(("known", "peak"), [(40, 6), (72, 10), (200, CAP)])
def test_a_prompt_needs_all_its_blocks_up_to_what_a_step_holds(known: int, peak: int) -> None:
    side, _ = make_side()
    hits: Any = ([], [], [])
    assert side.needed(reservation(known, known), hits) == {0: peak, 2: peak}
    assert side.missing("r", reservation(known, known)) == 2 * peak


def test_once_it_is_read_a_request_needs_its_window() -> None:
    side, held = make_side()
    # 200 tokens prefilled, 56 more reserved: 33 blocks in all, of which 4 at a time.
    held["r"] = blocks(*[-1] * 22, 1, 1, 1)
    assert side.missing("r", reservation(200, 256, read=True)) == 1 + 4
    lagging, held = make_side(lag=8)
    held["r"] = blocks(*[-1] * 22, 1, 1, 1)
    assert lagging.missing("r", reservation(200, 256, read=True)) == 2 + 5


def test_what_is_shared_does_not_come_back() -> None:
    side, held = make_side()
    held["r"] = blocks(*[-1] * 22, 1, 2, 3)
    assert side.missing("r", reservation(200, 256, read=True)) == 3 + 4
    # But never more than it is still to be given.
    assert side.missing("r", reservation(200, 207, read=True)) == 1 + 4


def test_hits_are_taken_out_of_the_pool_or_shared() -> None:
    side, _ = make_side()
    cached: Any = (blocks(-1, -1, 0, 0, 0), [], blocks(-1, -1, 1, 2, 1))
    # Of 6 blocks of the prompt one is new; what nobody holds leaves the queue of free ones.
    assert side.needed(reservation(40, 40), cached) == {0: 4, 2: 1}
    # Two have one owner, who will not make them free any more.
    assert side.lent(cached) == 2


# --- what the config says ------------------------------------------------------------------------


def config_of(kinds: str | None, window: int | None = 128) -> Any:
    """A configuration; `kinds` as in "ssf": sliding, sliding, full."""
    names = {"s": "sliding_attention", "f": "full_attention"}
    text = SimpleNamespace()
    if kinds is not None:
        text.layer_types = [names[kind] for kind in kinds]
    return SimpleNamespace(
        parallel_config=None,
        model_config=SimpleNamespace(
            hf_text_config=text,
            get_total_num_hidden_layers=lambda: len(kinds) if kinds else 4,
            get_sliding_window=lambda: window,
            max_model_len=2048,
        ),
        max_in_flight_tokens=512,
    )


@pytest.mark.parametrize(
    ("kinds", "layers"),
    [
        (None, LayerGroups(4)),
        ("ffff", LayerGroups(4)),
        ("ssss", LayerGroups(4)),
        ("sssssf" * 3, LayerGroups(3, 1, 5, 128)),
        ("sf" * 12, LayerGroups(12, 1, 1, 128)),
        ("sf" * 12 + "f", LayerGroups(13, 1, 1, 128)),
        ("sf" * 12 + "s", LayerGroups(12, 1, 1, 128)),
        ("sssssf" * 5 + "ssss", LayerGroups(5, 1, 6, 128)),
        ("sff", LayerGroups(2, 2, 1, 128)),
    ],
)
def test_layers_are_grouped_as_vllm_does(kinds: str | None, layers: LayerGroups) -> None:
    from vllm.v1.core.kv_cache_utils import _get_kv_cache_groups_uniform_page_size

    assert layers_of(config_of(kinds)) == layers
    if layers.window_groups:
        assert kinds is not None
        side = SlidingWindowSpec(**SHAPE, sliding_window=128)
        specs: Any = {
            f"l{i}": ArenaSpec(**SHAPE) if k == "f" else side for i, k in enumerate(kinds)
        }
        groups = [g.kv_cache_spec for g in _get_kv_cache_groups_uniform_page_size(specs)]
        assert sum(isinstance(g, ArenaSpec) for g in groups) == layers.full_groups
        assert sum(isinstance(g, SlidingWindowSpec) for g in groups) == layers.window_groups


def test_without_its_window_a_hybrid_is_none() -> None:
    assert layers_of(config_of("sssf", window=None)) == LayerGroups(4)


def test_one_request_leaves_room_for_its_windows() -> None:
    config = config_of("sssssf" * 3)
    # 127 tokens of the window and 512 of a step, wherever the first one lies in its block.
    assert pool_for_arena(config, 300, 32) == 300 - 5 * (20 + 1)
    config.model_config.max_model_len = 320
    assert pool_for_arena(config, 300, 32) == 300 - 5 * 10
    assert pool_for_arena(config_of(None), 300, 32) == 300


def test_other_groups_than_the_config_says_are_refused() -> None:
    side = KVCacheGroupSpec(["a", "b"], SlidingWindowSpec(**SHAPE, sliding_window=128))
    full = KVCacheGroupSpec(["c", "d"], ArenaSpec(**SHAPE))

    def groups(*parts: KVCacheGroupSpec) -> KVCacheConfig:
        return KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=list(parts))

    assert arena_group(groups(side, full), LayerGroups(2, 1, 1, 128)) == 1
    assert arena_group(groups(full), LayerGroups(2)) == 0
    for parts, layers in (
        ((side, full), LayerGroups(4)),
        ((side, full), LayerGroups(2, 1, 2, 128)),
        ((full, full), LayerGroups(4, 2, 0, 0)),
        ((full,), LayerGroups(3)),
    ):
        with pytest.raises(ValueError, match=r"not supported with --kv-compression; drop the flag"):
            arena_group(groups(*parts), layers)
