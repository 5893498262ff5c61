"""What a request is told that asks for something wrong, whatever it holds."""

from types import SimpleNamespace

import pytest
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from vllm_kvcompress.engine import requests
from vllm_kvcompress.planning.config import KVCompressionConfig
from vllm_kvcompress.planning.request_settings import SettingsResolver


@pytest.mark.parametrize(
    ("name", "shown"),
    [("a\nb", r"a\nb"), ("\x1b[2J", r"\x1b[2J"), ("\ud800", r"\ud800"), ("\u2028", r"\u2028")],
)
def test_the_message_is_one_printable_line(
    monkeypatch: pytest.MonkeyPatch, name: str, shown: str
) -> None:
    config = KVCompressionConfig("cake", 256, allow={"params": True})
    resolver = SettingsResolver(config, 16)
    monkeypatch.setattr(requests, "resolver_of", lambda *_: resolver)
    request = SimpleNamespace(
        resumable=False,
        prompt_token_ids=[1] * 300,
        sampling_params=SamplingParams(extra_args={"kv_compression_config": {name: 1}}),
    )
    vllm_config = SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks=100, block_size=16))
    with pytest.raises(VLLMValidationError) as caught:
        requests.check_request(request, vllm_config)
    assert str(caught.value).isprintable()
    assert shown in str(caught.value)
