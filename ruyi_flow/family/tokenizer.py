"""A family's text side: its tokenizer, prompts as token ids, and the tokens that end an answer. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ruyi_flow.errors import CheckpointError, ContextLengthError, RequestError, shown

if TYPE_CHECKING:
    from ruyi_flow.family.checkpoint import Checkpoint
    from ruyi_flow.requests import Prompt

__all__ = ["check_context", "end_tokens", "load_tokenizer", "prompt_ids"]

_ROLES = frozenset({"assistant", "system", "user"})
"""Roles of messages that every chat template may get; others must be named in the template, as `tool` often is."""

_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
"""Tokens that end a turn in chat templates. The generation_config.json of many checkpoints omits them."""


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Load the family's transformers tokenizer.

    Returns:
        A `PreTrainedTokenizerFast`, or None when the checkpoint has no tokenizer.json.

    Raises:
        CheckpointError: the tokenizer files cannot be read.
    """
    if not (checkpoint.folder / "tokenizer.json").exists():
        return None
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(checkpoint.folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint.folder}: its tokenizer files cannot be read: {error}") from None


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
    return tuple(dict.fromkeys(ids))


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
        raise RequestError("this family has no chat template; send the prompt with raw=True (--raw)")
    for role in sorted({role for role, _ in turns} - _ROLES):
        # Many templates write any role as it is; the model has been trained only on those that its template names.
        if f"'{role}'" not in str(tokenizer.chat_template) and f'"{role}"' not in str(tokenizer.chat_template):
            raise RequestError(
                f"a message has the role {shown(role)}, which the family's chat template does not name; "
                f"roles are {', '.join(sorted(_ROLES))}"
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
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise RequestError(f"the family's tokenizer refuses this text: {error}") from None
    if not ids:
        raise RequestError("the prompt is empty; give it some text")
    if max(ids) >= vocab_size:
        raise RequestError(f"the family's tokenizer gives token {max(ids)}, but its vocabulary has {vocab_size}")
    return ids
