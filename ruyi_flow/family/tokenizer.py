"""A family's text side: its tokenizer, prompts as token ids, and the tokens that end an answer. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruyi_flow.errors import CheckpointError, ContextLengthError, RequestError, shown
from ruyi_flow.family.files import companions, read_json

if TYPE_CHECKING:
    from ruyi_flow.family.checkpoint import Checkpoint
    from ruyi_flow.family.config import FamilyConfig
    from ruyi_flow.requests import Prompt

__all__ = ["PromptEncoder", "check_context", "end_tokens", "load_tokenizer"]

_ROLES = frozenset({"assistant", "system", "user"})
"""Roles of messages that every chat template may get; others must be named in the template, as `tool` often is."""

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


class PromptEncoder:
    """Turns prompts into token ids. It may be used on several threads.

    Args:
        tokenizer: the family's transformers tokenizer, or None.
        config: the family's configuration.
        family: the family's name, for error messages.
    """

    def __init__(self, tokenizer: Any, config: FamilyConfig, *, family: str) -> None:
        self.tokenizer, self.context = tokenizer, config.max_positions
        self.vocab_size, self._family = config.vocab_size, family
        self._max_chars = 0
        if tokenizer is not None:
            tokenizer("a")  # transformers sets the backend up at its first call; later ones must not, beside a thread
            self._max_chars = self.context * max(map(len, tokenizer.get_vocab()))

    def encode(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """Return a prompt's token ids. It may take seconds: an event loop must not wait for it.

        Args:
            prompt: a text, (role, content) messages, or token ids.
            raw: encode a text as it is, instead of as one user turn of the chat template.

        Raises:
            RequestError: the prompt is empty, or the tokenizer or the chat template refuses it.
            ContextLengthError: the prompt leaves no room for a new token in the family's context.
        """
        if not prompt:
            raise RequestError("the prompt is empty; give it some text")
        if not isinstance(prompt, str) and isinstance(prompt[0], int):
            check_context(len(prompt), self.context)
            ids = [i for i in prompt if isinstance(i, int)]
            if len(ids) != len(prompt) or min(ids) < 0 or max(ids) >= self.vocab_size:
                raise RequestError(f"token ids must be 0 … {self.vocab_size - 1}")
            return ids
        if self.tokenizer is None:
            raise RequestError(f"family {self._family!r} has no tokenizer.json; give token ids as the prompt")
        turns = [("user", prompt)] if isinstance(prompt, str) else [turn for turn in prompt if isinstance(turn, tuple)]
        # What can never fit is refused before any work: a message has one token at least, a token not more characters
        # than the longest one of the vocabulary.
        check_context(len(turns), self.context, "messages")
        chars = sum(len(role) + len(content) for role, content in turns)
        if chars > self._max_chars:
            raise ContextLengthError(
                f"the prompt is too long: it has {chars} characters, more than can fit into the family's context of "
                f"{self.context} tokens; shorten it"
            )
        ids = self._encode(prompt, special=True) if isinstance(prompt, str) and raw else self._encode_turns(turns)
        check_context(len(ids), self.context)
        return ids

    def _encode_turns(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        if not any(content.strip() for _, content in turns):
            raise RequestError("the prompt is empty; give it some text")
        if self.tokenizer.chat_template is None:
            raise RequestError(
                "this family has no chat template, or none named default; send the prompt with raw=True (--raw)"
            )
        for role in sorted({role for role, _ in turns} - _ROLES):
            # Many templates write any role as it is; the model has been trained only on those that its template names.
            if f"'{role}'" not in self.tokenizer.chat_template and f'"{role}"' not in self.tokenizer.chat_template:
                raise RequestError(
                    f"a message has the role {shown(role)}, which the family's chat template does not name; "
                    f"roles are {', '.join(sorted(_ROLES))}"
                )
        messages = [{"role": role, "content": content} for role, content in turns]
        with _refusing("the family's chat template refuses these messages"):
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self._encode(text, special=False)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        with _refusing("the family's tokenizer refuses this text"):
            # The call for a batch lets other threads run meanwhile, the one for a single text does not.
            encoded = self.tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=special)
        ids: list[int] = encoded[0].ids
        if not ids:
            raise RequestError("the prompt is empty; give it some text")
        if max(ids) >= self.vocab_size:
            raise RequestError(
                f"the family's tokenizer gives token {max(ids)}, but its vocabulary has {self.vocab_size}"
            )
        return ids


def check_context(count: int, context: int, what: str = "tokens") -> None:
    """Check that a prompt leaves room for at least one new token.

    Args:
        count: the prompt's length.
        context: the family's context, in positions.
        what: what is counted, for the error message.

    Raises:
        ContextLengthError: it does not.
    """
    if count >= context:
        raise ContextLengthError(
            # Clients of OpenAI's API know a context that is too short by the words "prompt is too long".
            f"the prompt is too long: it has {count} {what}, which leaves no room in the family's context of "
            f"{context}; shorten it"
        )


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Turn any exception of the block into a RequestError that begins with `what`.

    A template is a program that comes with the family and may raise anything.
    """
    try:
        yield
    except BaseException as error:
        if not _is_failure(error):
            raise
        raise RequestError(f"{what}: {error}") from None


def _is_failure(error: BaseException) -> bool:
    """Whether an error comes from the tokenizers library: bare Exceptions, and panics, which are none."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
