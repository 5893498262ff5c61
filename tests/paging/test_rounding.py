from vllm_kvcompress.paging.rounding import cdiv


def test_quotients_are_rounded_up() -> None:
    assert [cdiv(a, 4) for a in (-5, -4, 0, 1, 4, 5)] == [-1, -1, 0, 1, 1, 2]
