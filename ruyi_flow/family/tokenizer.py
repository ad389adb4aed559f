"""A family's text side: its tokenizer, prompts as token ids, and the tokens that end an answer. No torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruyi_flow.errors import CheckpointError, ContextLengthError, RequestError
from ruyi_flow.family.files import companions, read_json

if TYPE_CHECKING:
    from ruyi_flow.family.checkpoint import Checkpoint
    from ruyi_flow.requests import Prompt

__all__ = ["check_context", "end_tokens", "load_tokenizer", "prompt_ids"]

_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
"""Tokens that end a turn in chat templates. The generation_config.json of many checkpoints omits them."""


_MOST_TEMPLATE = 2**20
"""Most characters of a chat template; the longest published ones have about 20,000."""


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Load the family's transformers tokenizer.

    A tokenizer.json is read as it is written: it has all rules that the model was trained with. AutoTokenizer puts
    the rules of the class that tokenizer_config.json names in their place. For some families these are others:
    SmolLM2 splits digits, GPT-2's class does not. Without a tokenizer.json, AutoTokenizer reads the older forms: a
    sentencepiece model, or vocab.json with merges.txt.

    Returns:
        A `PreTrainedTokenizerFast`, or None when the checkpoint has no tokenizer. Its `chat_template` is the default
        template, or None.

    Raises:
        CheckpointError: the tokenizer files cannot be read.
    """
    folder, names = checkpoint.folder, {path.name for path in companions(checkpoint.folder)}
    if not names & {"tokenizer.json", "tokenizer.model", "vocab.json"}:
        return None
    if "tokenizer.json" not in names and "tokenizer.model" in names and find_spec("sentencepiece") is None:
        raise CheckpointError(f"{folder}: its tokenizer.model needs a package: pip install sentencepiece")
    from transformers import PreTrainedTokenizerFast

    try:
        if "tokenizer.json" in names:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        else:
            from transformers import AutoConfig, AutoTokenizer  # 80 MB more

            kind = AutoConfig.for_model(checkpoint.config.base)
            tokenizer = AutoTokenizer.from_pretrained(
                folder, config=kind, local_files_only=True, trust_remote_code=False
            )
            if not isinstance(tokenizer, PreTrainedTokenizerFast):
                raise ValueError(f"{type(tokenizer).__name__} is written in Python, which is not supported")
    except BaseException as error:
        if not _is_failure(error):
            raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{folder}: its tokenizer files cannot be read: {reason[0]}") from None
    tokenizer.chat_template = _default_template(tokenizer.chat_template, folder)
    return tokenizer


def _default_template(template: object, folder: Path) -> str | None:
    """Return the chat template that prompts use, of those that a tokenizer has, or of chat_template.json."""
    if template is None and (folder / "chat_template.json").exists():  # where multimodal models have theirs
        template = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        template = {named.get("name"): named.get("template") for named in template if isinstance(named, dict)}
    if isinstance(template, dict):
        template = template.get("default")
    if template is None or (isinstance(template, str) and len(template) <= _MOST_TEMPLATE):
        return template
    raise CheckpointError(f"{folder}: its chat template is not a text of at most {_MOST_TEMPLATE} characters")


def end_tokens(checkpoint: Checkpoint, tokenizer: Any) -> tuple[int, ...]:
    """Collect the tokens that end an answer: those of the configs, of the tokenizer, and the template's end of turn.

    Args:
        checkpoint: the opened family.
        tokenizer: its tokenizer, or None.
    """
    ids = list(checkpoint.eos_token_ids)
    if tokenizer is not None:
        if tokenizer.eos_token_id is not None:
            ids.append(int(tokenizer.eos_token_id))
        ids += [
            int(tokenizer.convert_tokens_to_ids(end))
            for end in _TURN_ENDS
            if end in (tokenizer.chat_template or "") and end in tokenizer.get_vocab()
        ]
    return tuple(i for i in dict.fromkeys(ids) if i < checkpoint.config.vocab_size)


def prompt_ids(prompt: Prompt, tokenizer: Any, *, raw: bool = False, vocab_size: int, family: str) -> list[int]:
    """Turn a prompt into token ids.

    Args:
        prompt: a text, (role, content) messages, or token ids.
        tokenizer: the family's tokenizer, or None.
        raw: encode a text as it is, instead of as one user turn of the chat template.
        vocab_size: number of tokens of the family.
        family: the family's name, for error messages.

    Raises:
        RequestError: the prompt is empty, or the tokenizer or the chat template refuses it.
    """
    if not prompt:
        raise RequestError("the prompt is empty; give it some text")
    if not isinstance(prompt, str) and isinstance(prompt[0], int):
        ids = [i for i in prompt if isinstance(i, int)]
        if len(ids) != len(prompt) or min(ids) < 0 or max(ids) >= vocab_size:
            raise RequestError(f"token ids must be 0 … {vocab_size - 1}")
        return ids
    if tokenizer is None:
        raise RequestError(f"family {family!r} has no tokenizer.json; give token ids as the prompt")
    if isinstance(prompt, str) and raw:
        return _encode(tokenizer, vocab_size, prompt)
    turns = [("user", prompt)] if isinstance(prompt, str) else [turn for turn in prompt if isinstance(turn, tuple)]
    if not any(content.strip() for _, content in turns):
        raise RequestError("the prompt is empty; give it some text")
    if tokenizer.chat_template is None:
        raise RequestError(
            "this family has no chat template, or none named default; send the prompt with raw=True (--raw)"
        )
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program that comes with the family; it may raise anything
        raise RequestError(f"the family's chat template refuses these messages: {error}") from None
    return _encode(tokenizer, vocab_size, text, add_special_tokens=False)


def check_context(prompt_length: int, context: int) -> None:
    """Check that a prompt leaves room for at least one new token.

    Raises:
        ContextLengthError: it does not.
    """
    if prompt_length >= context:
        raise ContextLengthError(
            f"the prompt has {prompt_length} tokens, which leaves no room in the family's context of {context}; "
            "shorten it"
        )


def _encode(tokenizer: Any, vocab_size: int, text: str, **options: bool) -> list[int]:
    try:
        ids = list(tokenizer(text, **options)["input_ids"])
    except BaseException as error:
        if not _is_failure(error):
            raise
        raise RequestError(f"the family's tokenizer refuses this text: {error}") from None
    if not ids:
        raise RequestError("the prompt is empty; give it some text")
    if max(ids) >= vocab_size:
        raise RequestError(f"the family's tokenizer gives token {max(ids)}, but its vocabulary has {vocab_size}")
    return ids


def _is_failure(error: BaseException) -> bool:
    """Whether an error comes from the tokenizers library: bare Exceptions, and panics, which are none."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
