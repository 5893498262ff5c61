"""The KV pool of vLLM's engines in a state in which nobody can read what nobody has written.

All of the pool is NaN when an engine starts. From then on a block is filled with NaN whenever it is
handed out, and once it is free and not in the prefix cache. The scheduler's side notes the blocks
and sends them with the step's message; the worker fills them before the step runs.

Importing this module poisons the pools of all engines that this process then makes, as well as what
our own modules allocate. In the tests' process the harness does so. Servers are not poisoned: there
the scheduler, which knows the blocks, runs in another process than the worker.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from tests.support.poison import poison, poison_allocations

_DIRTY = "_blocks_to_poison"
_LARGEST_FP8 = 0x7B
"""A byte that is a large number in both FP8 types: 352 and 57344."""


def _around(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    original = vars(owner)[name]
    setattr(owner, name, functools.wraps(original)(make(original)))


def _note_blocks(get_new_blocks: Any) -> Any:
    def noting(pool: BlockPool, num_blocks: int) -> Any:
        blocks = get_new_blocks(pool, num_blocks)
        new, _ = vars(pool).setdefault(_DIRTY, (set(), set()))
        new.update(block.block_id for block in blocks)
        return blocks

    return noting


def _note_freed(free_blocks: Any) -> Any:
    def noting(pool: BlockPool, ordered_blocks: Any) -> None:
        blocks = list(ordered_blocks)
        free_blocks(pool, blocks)
        _, freed = vars(pool).setdefault(_DIRTY, (set(), set()))
        freed.update(block.block_id for block in blocks if not block.is_null)

    return noting


def _send(schedule: Any) -> Any:
    def sending(scheduler: Scheduler, *args: Any, **kwargs: Any) -> Any:
        output = schedule(scheduler, *args, **kwargs)
        pool = scheduler.kv_cache_manager.block_pool
        new, freed = vars(pool).pop(_DIRTY, (set(), set()))
        setattr(output, _DIRTY, (new, {i for i in freed - new if _is_empty(pool, i)}))
        return output

    return sending


def _is_empty(pool: BlockPool, block_id: int) -> bool:
    block = pool.blocks[block_id]
    return block.ref_cnt == 0 and block.block_hash is None


def _fill_all(initialize_from_config: Any) -> Any:
    def filling(worker: Any, kv_cache_config: Any) -> None:
        initialize_from_config(worker, kv_cache_config)
        for layer in _layers(worker):
            poison(layer.kv_cache)

    return filling


def _fill(execute_model: Any) -> Any:
    def filling(worker: Any, scheduler_output: Any) -> Any:
        new, empty = getattr(scheduler_output, _DIRTY, ((), ()))
        for layer in _layers(worker) if new or empty else ():
            for block in empty:
                poison(layer.kv_cache[block])
            for block in new:
                poison(layer.kv_cache[block])
                if isinstance(layer.impl, CPUAttentionBackendImpl):
                    _make_finite(layer.kv_cache[block])
        return execute_model(worker, scheduler_output)

    return filling


def _make_finite(page: Tensor) -> None:
    """Let the values of one page be numbers, though enormous ones. Mutates it.

    CPU attention multiplies the values of the free slots behind a row's last token by weights of
    zero, in plain vLLM too, and 0 * NaN is NaN. What it masks are products of keys, which stay NaN.
    """
    heads, size, _ = page.shape
    _, values = page.view(heads, 2 * size, -1).chunk(2, dim=1)  # as the backend does
    if page.itemsize == 1:
        values.view(torch.uint8).fill_(_LARGEST_FP8)
    else:
        values.fill_(min(torch.finfo(page.dtype).max, 1e30))


def _layers(worker: Any) -> list[Any]:
    """Return the attention layers, each with its pages [num_blocks, ...] of the pool."""
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    found = [layer for layer in layers if hasattr(layer, "kv_cache")]
    total = worker.model_runner.kv_cache_config.num_blocks
    assert all(len(layer.kv_cache) == total for layer in found)
    return found


poison_allocations()
_around(BlockPool, "get_new_blocks", _note_blocks)
_around(BlockPool, "free_blocks", _note_freed)
_around(Scheduler, "schedule", _send)
_around(Worker, "execute_model", _fill)
for _owner in (Worker, CPUWorker):
    if "initialize_from_config" in vars(_owner):
        _around(_owner, "initialize_from_config", _fill_all)
