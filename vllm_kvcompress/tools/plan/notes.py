"""Notes on a plan's figures: when compression gains little or nothing, and why."""

from dataclasses import replace

from vllm_kvcompress.planning.block_planner import BlockPlanner
from vllm_kvcompress.tools.byte_sizes import format_bytes
from vllm_kvcompress.tools.plan.figures import Figures, SlidingWindows, Workload
from vllm_kvcompress.tools.plan.model import ServedModel
from vllm_kvcompress.tools.plan.server import ServerSettings

_LITTLE = 0.75
"""Ratio of compressed to uncompressed blocks above which a request saves little."""


def gain_notes(
    plain: Figures,
    compressed: Figures,
    work: Workload,
    planner: BlockPlanner,
    server: ServerSettings,
) -> list[str]:
    """Sentences on what compression gains with these settings."""
    notes = []
    config, prompt = planner.config, work.prompt
    if config.off:
        notes.append(
            f"Method {config.method} compresses only the requests that ask for it; these figures "
            "are for requests that do not."
        )
    elif planner.keeps_all:
        notes.append(f"Will not pay: {config.method} keeps every token; it is there for debugging.")
    elif planner.schedule(prompt) is None:
        notes.append(
            f"Will not pay: a prompt of {prompt:,} tokens fits the budget of {config.budget}, so "
            "nothing is evicted and requests take vLLM's own path."
        )
    elif compressed.at_end > _LITTLE * plain.at_end:
        notes.append(
            f"Will hardly pay: a finished request holds {compressed.at_end} of {plain.at_end} "
            f"blocks. {_why_little(work, planner)}"
        )
    if plain.requests >= server.max_num_seqs:
        notes.append(
            f"Memory is ample: plain vLLM already holds {plain.requests:,} such requests and runs "
            f"at most {server.max_num_seqs:,} in a step (--max-num-seqs); compression only makes "
            "decode steps read less."
        )
    elif compressed.requests > server.max_num_seqs:
        notes.append(
            f"A step runs at most {server.max_num_seqs:,} requests: raise --max-num-seqs to use "
            f"room for {compressed.requests:,}."
        )
    if 0 < compressed.requests < plain.requests:
        notes.append(
            "Fewer requests fit than without compression: prompt and survivors are held together "
            "while a prompt is compressed, and one step longer under asynchronous scheduling."
        )
    if compressed.longest < plain.longest:
        step = server.max_num_batched_tokens
        which = f" of more than {step:,} tokens (--max-num-batched-tokens)"
        notes.append(
            "The longest --max-model-len is shorter than plain vLLM's: a prompt"
            f"{which if planner.can_cascade else ''} is held whole, with its survivors beside it, "
            "until it is compressed."
        )
    if not compressed.starts:
        notes.append(
            f"vLLM refuses to start with --max-model-len {work.context} even with compression: it "
            f"needs {format_bytes(compressed.least_memory)} of KV cache."
        )
    return [*notes, *_prefill_notes(compressed, work, planner)]


def window_notes(model: ServedModel, work: Workload, windows: SlidingWindows) -> list[str]:
    """What a model's sliding-window layers hold, with and without compression."""
    groups = model.groups
    if not groups.window_groups:
        return []
    many = "groups" if groups.window_groups > 1 else "group"
    note = (
        f"Only the {groups.compressed} full-attention layers of {model.layers} are compressed. The "
        f"others, with windows of {groups.window:,} tokens, hold up to "
        f"{windows.read(work.context):,} blocks of a request in {groups.window_groups} KV-cache "
        f"{many} while its prompt is read and {windows.held(work.context):,} later, which both "
        "columns count."
    )
    return [note]


def _why_little(work: Workload, planner: BlockPlanner) -> str:
    if work.output > work.prompt and planner.config.decode_budget is None:
        return 'Most of it is the answer, which "decode_budget" in --config would cut back.'
    return "Lower the budget, or plan for longer prompts."


def _prefill_notes(compressed: Figures, work: Workload, planner: BlockPlanner) -> list[str]:
    """Note on prompts that run in several steps, if longer steps would save blocks."""
    one_step, config = planner.limits.one_step_tokens, planner.config
    if config.prefill in ("full", "streaming") or planner.prompt_cut(work.prompt) is None:
        return []
    if not planner.can_cascade or work.prompt <= one_step:
        return []
    longer = replace(planner.limits, one_step_tokens=work.context)
    peak = BlockPlanner(config, planner.block_size, longer).peak_blocks(work.prompt, work.context)
    if peak >= compressed.peak:
        return []
    note = (
        f"A prompt of {work.prompt:,} tokens runs in several steps of {one_step:,} and holds all "
        f"its blocks until the last. With --max-num-batched-tokens {work.context} a request would "
        f"hold {peak:,} at its peak instead of {compressed.peak:,}."
    )
    return [note]
