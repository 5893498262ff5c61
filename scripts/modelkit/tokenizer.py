"""Tokenizers: byte-level BPE rebuilt from a GGUF's vocabulary, merges and token types."""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from modelkit import ModelError

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # token types of the GGUF format

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def smollm_splitting(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def qwen2_splitting(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


SPLITTING = {"smollm": smollm_splitting, "qwen2": qwen2_splitting}


def build(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    kind = fields["tokenizer.ggml.pre"]
    if kind not in SPLITTING:
        raise ModelError(f"The GGUF's tokenizer is of kind {kind}, which cannot be rebuilt here.")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types: list[int] = fields["tokenizer.ggml.token_type"]
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    # Rows that only pad the embedding to a round size are no tokens. Control and user tokens are
    # added afterwards and must then get the ids that they have here.
    vocabulary = {token: i for token, i in ids.items() if types[i] != UNUSED}
    first_added = len(vocabulary)
    if kind == "qwen2":
        first_added = min(i for i, t in enumerate(types) if t in (CONTROL, USER_DEFINED))
        vocabulary = {token: i for token, i in vocabulary.items() if i < first_added}

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    SPLITTING[kind](tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    for i, (token, token_type) in enumerate(zip(tokens, types, strict=True)):
        if token_type not in (CONTROL, USER_DEFINED):
            continue
        special = token_type == CONTROL
        added = AddedToken(token, special=special, normalized=False)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])
        if tokenizer.token_to_id(token) != i:
            raise ModelError(f"Token {token!r} got id {tokenizer.token_to_id(token)}, not {i}.")

    roles = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    if kind == "qwen2":
        del roles["bos"]  # Qwen2 puts no token before a text, whatever the GGUF names as one
    ids_of_roles = {
        f"{hf}_token": fields.get(f"tokenizer.ggml.{gguf}_token_id") for gguf, hf in roles.items()
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=fields[f"{fields['general.architecture']}.context_length"],
        clean_up_tokenization_spaces=False,
        **{role: tokens[index] for role, index in ids_of_roles.items() if index is not None},
    )
    fast.chat_template = fields["tokenizer.chat_template"]
    return fast
