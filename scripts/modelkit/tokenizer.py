"""Tokenizers rebuilt from a GGUF's vocabulary, token types, and merges or scores."""

from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from modelkit import ModelError

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6  # token types of the GGUF format
SPACE_MARK = "\u2581"

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


def byte_level(fields: dict[str, Any], kind: str) -> Tokenizer:
    """BPE on bytes, with the merges that the GGUF lists."""
    if kind not in SPLITTING:
        raise ModelError(f"The GGUF's tokenizer is of kind {kind}, which cannot be rebuilt here.")
    types: list[int] = fields["tokenizer.ggml.token_type"]
    ids = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"])}
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
    return tokenizer


def sentence_piece(fields: dict[str, Any]) -> Tokenizer:
    """BPE on text with marks for spaces, its merges ranked by the scores of what they make."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types: list[int] = fields["tokenizer.ggml.token_type"]
    scores: list[float] = fields["tokenizer.ggml.scores"]
    ids = {token: i for i, token in enumerate(tokens)}
    whole = {token: i for token, i in ids.items() if types[i] not in (UNKNOWN, CONTROL, BYTE)}
    ranked = []
    for token, i in whole.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in whole and right in whole:
                ranked.append((-scores[i], i, whole[left], whole[right], left, right))
    ranked.sort()
    unknown = tokens[fields["tokenizer.ggml.unknown_token_id"]]
    model = models.BPE(
        vocab=ids,
        merges=[pair[4:] for pair in ranked],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE_MARK)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    if fields.get("tokenizer.ggml.add_bos_token"):
        first = fields["tokenizer.ggml.bos_token_id"]
        bos = tokens[first]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, first)]
        )
    return tokenizer


def build(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    kind = fields["tokenizer.ggml.pre"]
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    types: list[int] = fields["tokenizer.ggml.token_type"]
    pieces = fields["tokenizer.ggml.model"] == "llama"  # what the format calls SentencePiece
    tokenizer = sentence_piece(fields) if pieces else byte_level(fields, kind)
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
    fast.chat_template = fields.get("tokenizer.chat_template")  # a base model has none
    return fast
