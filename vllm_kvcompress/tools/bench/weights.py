"""The bytes of a model that a decode step reads."""

from typing import Any

from vllm_kvcompress.tools.plan.model import ModelFacts
from vllm_kvcompress.tools.plan.weights import weight_bytes


def read_bytes(facts: ModelFacts, config: Any) -> int:
    """Bytes of all weights but an input embedding of which a step reads only some rows.

    A mixture of experts is counted whole, although a small batch reads only some of its experts.

    Args:
        facts: Of the model.
        config: Its configuration.

    Raises:
        CommandError: The size of the weights cannot be found.

    """
    size, _ = weight_bytes(facts, config)
    text = config.get_text_config()
    tied = getattr(text, "tie_word_embeddings", getattr(config, "tie_word_embeddings", True))
    if tied or facts.quantized:
        return size
    return size - int(text.vocab_size) * int(text.hidden_size) * facts.dtype.itemsize
