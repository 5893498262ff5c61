"""Names that were meant for this package, and those of others, which are left alone."""

import re

import pytest

from vllm_kvcompress.planning.setting_names import check_names, is_near_miss

MISSES = [
    *("kv-compression", "kvcompression", "kv compression", "KV_COMPRESSION", "kvCompression"),
    *("kv_compresion", "kv_comprression", "kv_compressoin", "kv_compress", "kvcompress"),
    *("vllm_kvcompress", "kv_compression_budget", "--kv-compression", "kv_compression_config"),
]
OTHERS = [
    *("kv_compression", "compression", "kv_transfer", "kv_cache", "kv_cache_dtype", "quantization"),
    *("ascend_scheduler_config", "kv_compaction", "kv_connector", "compilation", "kv", ""),
    *("my_kv_compression", "compression_config", "weight_compression", "torchair_graph_config"),
]


@pytest.mark.parametrize("name", MISSES)
def test_a_near_miss_is_refused_with_the_right_name(name: str) -> None:
    sentence = f'additional_config has "{name}", which nobody reads; compression is set as '
    with pytest.raises(ValueError, match=re.escape(sentence + '{"kv_compression": {')):
        check_names(["mine", name])


@pytest.mark.parametrize("name", OTHERS)
def test_other_names_are_left_alone(name: str) -> None:
    assert not is_near_miss(name)
    check_names([name, 3, None])
