"""Random tokens, the same number in every layer: what a method must at least beat."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kvcompress.methods.checks import check_int
from vllm_kvcompress.methods.layer import LayerInput
from vllm_kvcompress.methods.method import MethodSpec
from vllm_kvcompress.methods.parts import Scorer


@dataclass(frozen=True, kw_only=True)
class RandomScorer(Scorer):
    """Random scores, drawn anew for every layer and KV head.

    Attributes:
        seed: The same seed gives the same tokens for a prompt of the same length, on every device
            and whatever else is in the batch.

    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("seed", self.seed, 0)

    def score(self, layer: LayerInput) -> Tensor:
        # Drawn on the CPU: generators of different devices disagree.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + layer.layer) % 2**63)
        return torch.rand((layer.num_kv_heads, layer.history), generator=generator)


Random = MethodSpec(name="random", scorer=RandomScorer)
