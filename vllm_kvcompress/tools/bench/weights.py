"""The bytes of a model that a decode step reads."""

from typing import Any

from vllm_kvcompress.tools.plan.model import ModelFacts
from vllm_kvcompress.tools.plan.weights import weight_bytes


def read_bytes(facts: ModelFacts, config: Any) -> int:
    """Return the bytes of the weights without an input embedding of which a step reads some rows.

    All experts of a mixture are counted, although a small batch reads only some of them.

    Args:
        facts: What the model's configuration says.
        config: The configuration itself.

    Raises:
        CommandError: The size of the weights is not known.

    """
    size, _ = weight_bytes(facts, config)
    text = config.get_text_config()
    tied = getattr(text, "tie_word_embeddings", getattr(config, "tie_word_embeddings", True))
    if tied or facts.quantized:
        return size
    return size - int(text.vocab_size) * int(text.hidden_size) * facts.dtype.itemsize
