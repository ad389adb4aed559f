from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Encoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENCODING_UNSPECIFIED: _ClassVar[Encoding]
    ENCODING_F32: _ClassVar[Encoding]
    ENCODING_BF16: _ClassVar[Encoding]
    ENCODING_F16: _ClassVar[Encoding]
    ENCODING_INT8: _ClassVar[Encoding]

class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODE_UNSPECIFIED: _ClassVar[Mode]
    MODE_FIXED: _ClassVar[Mode]
    MODE_TOKEN: _ClassVar[Mode]
    MODE_EXACT: _ClassVar[Mode]
    MODE_CASCADE: _ClassVar[Mode]

class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REASON_UNSPECIFIED: _ClassVar[Reason]
    REASON_CONFIDENT: _ClassVar[Reason]
    REASON_FIXED: _ClassVar[Reason]
    REASON_DEEPEST: _ClassVar[Reason]
    REASON_LIMIT: _ClassVar[Reason]
    REASON_BUDGET: _ClassVar[Reason]
    REASON_UNREACHABLE: _ClassVar[Reason]

class Score(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCORE_UNSPECIFIED: _ClassVar[Score]
    SCORE_MAX_PROBABILITY: _ClassVar[Score]
    SCORE_MARGIN: _ClassVar[Score]
    SCORE_NEGATIVE_ENTROPY: _ClassVar[Score]
    SCORE_PROBE: _ClassVar[Score]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_EOS: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]

class Work(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORK_UNSPECIFIED: _ClassVar[Work]
    WORK_UNKNOWN: _ClassVar[Work]
    WORK_NONE: _ClassVar[Work]
    WORK_UNDER_WAY: _ClassVar[Work]
ENCODING_UNSPECIFIED: Encoding
ENCODING_F32: Encoding
ENCODING_BF16: Encoding
ENCODING_F16: Encoding
ENCODING_INT8: Encoding
MODE_UNSPECIFIED: Mode
MODE_FIXED: Mode
MODE_TOKEN: Mode
MODE_EXACT: Mode
MODE_CASCADE: Mode
REASON_UNSPECIFIED: Reason
REASON_CONFIDENT: Reason
REASON_FIXED: Reason
REASON_DEEPEST: Reason
REASON_LIMIT: Reason
REASON_BUDGET: Reason
REASON_UNREACHABLE: Reason
SCORE_UNSPECIFIED: Score
SCORE_MAX_PROBABILITY: Score
SCORE_MARGIN: Score
SCORE_NEGATIVE_ENTROPY: Score
SCORE_PROBE: Score
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_EOS: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
WORK_UNSPECIFIED: Work
WORK_UNKNOWN: Work
WORK_NONE: Work
WORK_UNDER_WAY: Work

class SessionRequest(_message.Message):
    __slots__ = ("open", "block", "rewind", "checksum")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    REWIND_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    open: Open
    block: Block
    rewind: Rewind
    checksum: int
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., block: _Optional[_Union[Block, _Mapping]] = ..., rewind: _Optional[_Union[Rewind, _Mapping]] = ..., checksum: _Optional[int] = ...) -> None: ...

class SessionReply(_message.Message):
    __slots__ = ("opened", "verdict", "rewound", "failure", "leaving", "checksum")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    REWOUND_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    verdict: Verdict
    rewound: Rewound
    failure: Failure
    leaving: Leaving
    checksum: int
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., verdict: _Optional[_Union[Verdict, _Mapping]] = ..., rewound: _Optional[_Union[Rewound, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., leaving: _Optional[_Union[Leaving, _Mapping]] = ..., checksum: _Optional[int] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("protocol", "family", "first_layer", "hidden_size", "encoding", "max_positions", "prompt_length", "sampling", "policy", "node", "exits", "key", "position")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    MAX_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    EXITS_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    family: str
    first_layer: int
    hidden_size: int
    encoding: Encoding
    max_positions: int
    prompt_length: int
    sampling: SamplingParams
    policy: Policy
    node: str
    exits: _containers.RepeatedScalarFieldContainer[int]
    key: bytes
    position: int
    def __init__(self, protocol: _Optional[int] = ..., family: _Optional[str] = ..., first_layer: _Optional[int] = ..., hidden_size: _Optional[int] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., max_positions: _Optional[int] = ..., prompt_length: _Optional[int] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., policy: _Optional[_Union[Policy, _Mapping]] = ..., node: _Optional[str] = ..., exits: _Optional[_Iterable[int]] = ..., key: _Optional[bytes] = ..., position: _Optional[int] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("node", "session", "load", "instance")
    NODE_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    node: str
    session: int
    load: float
    instance: bytes
    def __init__(self, node: _Optional[str] = ..., session: _Optional[int] = ..., load: _Optional[float] = ..., instance: _Optional[bytes] = ...) -> None: ...

class Leaving(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Batch(_message.Message):
    __slots__ = ("items", "checksum")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[Item]
    checksum: int
    def __init__(self, items: _Optional[_Iterable[_Union[Item, _Mapping]]] = ..., checksum: _Optional[int] = ...) -> None: ...

class Item(_message.Message):
    __slots__ = ("session", "message")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    session: int
    message: bytes
    def __init__(self, session: _Optional[int] = ..., message: _Optional[bytes] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("status", "message", "node", "position")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    status: int
    message: str
    node: str
    position: int
    def __init__(self, status: _Optional[int] = ..., message: _Optional[str] = ..., node: _Optional[str] = ..., position: _Optional[int] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "max_new_tokens", "stop", "eos_token_ids", "seed", "presence_penalty", "frequency_penalty", "logprobs", "prompt_logprobs")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    NO_REPEAT_NGRAM_SIZE_FIELD_NUMBER: _ClassVar[int]
    MIN_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    no_repeat_ngram_size: int
    min_new_tokens: int
    max_new_tokens: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    eos_token_ids: TokenIds
    seed: int
    presence_penalty: float
    frequency_penalty: float
    logprobs: int
    prompt_logprobs: int
    def __init__(self, temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., no_repeat_ngram_size: _Optional[int] = ..., min_new_tokens: _Optional[int] = ..., max_new_tokens: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., eos_token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., seed: _Optional[int] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Policy(_message.Message):
    __slots__ = ("routing", "thresholds", "deepest", "limited")
    class ThresholdsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    ROUTING_FIELD_NUMBER: _ClassVar[int]
    THRESHOLDS_FIELD_NUMBER: _ClassVar[int]
    DEEPEST_FIELD_NUMBER: _ClassVar[int]
    LIMITED_FIELD_NUMBER: _ClassVar[int]
    routing: Routing
    thresholds: _containers.ScalarMap[int, float]
    deepest: int
    limited: bool
    def __init__(self, routing: _Optional[_Union[Routing, _Mapping]] = ..., thresholds: _Optional[_Mapping[int, float]] = ..., deepest: _Optional[int] = ..., limited: _Optional[bool] = ...) -> None: ...

class Routing(_message.Message):
    __slots__ = ("mode", "exit", "threshold", "thresholds", "draft", "scale", "family", "window", "back", "start", "fallback")
    class ThresholdsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    MODE_FIELD_NUMBER: _ClassVar[int]
    EXIT_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    THRESHOLDS_FIELD_NUMBER: _ClassVar[int]
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    BACK_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_FIELD_NUMBER: _ClassVar[int]
    mode: Mode
    exit: int
    threshold: float
    thresholds: _containers.ScalarMap[int, float]
    draft: int
    scale: Scale
    family: str
    window: int
    back: float
    start: Start
    fallback: bool
    def __init__(self, mode: _Optional[_Union[Mode, str]] = ..., exit: _Optional[int] = ..., threshold: _Optional[float] = ..., thresholds: _Optional[_Mapping[int, float]] = ..., draft: _Optional[int] = ..., scale: _Optional[_Union[Scale, _Mapping]] = ..., family: _Optional[str] = ..., window: _Optional[int] = ..., back: _Optional[float] = ..., start: _Optional[_Union[Start, _Mapping]] = ..., fallback: _Optional[bool] = ...) -> None: ...

class Start(_message.Message):
    __slots__ = ("weights", "chance")
    class WeightsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: Weights
        def __init__(self, key: _Optional[int] = ..., value: _Optional[_Union[Weights, _Mapping]] = ...) -> None: ...
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    CHANCE_FIELD_NUMBER: _ClassVar[int]
    weights: _containers.MessageMap[int, Weights]
    chance: float
    def __init__(self, weights: _Optional[_Mapping[int, Weights]] = ..., chance: _Optional[float] = ...) -> None: ...

class Weights(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...

class Scale(_message.Message):
    __slots__ = ("score", "curves")
    class CurvesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: Curve
        def __init__(self, key: _Optional[int] = ..., value: _Optional[_Union[Curve, _Mapping]] = ...) -> None: ...
    SCORE_FIELD_NUMBER: _ClassVar[int]
    CURVES_FIELD_NUMBER: _ClassVar[int]
    score: Score
    curves: _containers.MessageMap[int, Curve]
    def __init__(self, score: _Optional[_Union[Score, str]] = ..., curves: _Optional[_Mapping[int, Curve]] = ...) -> None: ...

class Curve(_message.Message):
    __slots__ = ("temperature", "scores", "chances")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    CHANCES_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    scores: _containers.RepeatedScalarFieldContainer[float]
    chances: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, temperature: _Optional[float] = ..., scores: _Optional[_Iterable[float]] = ..., chances: _Optional[_Iterable[float]] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("encoding", "rows", "data", "scales")
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    encoding: Encoding
    rows: int
    data: bytes
    scales: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, encoding: _Optional[_Union[Encoding, str]] = ..., rows: _Optional[int] = ..., data: _Optional[bytes] = ..., scales: _Optional[_Iterable[float]] = ...) -> None: ...

class Block(_message.Message):
    __slots__ = ("start", "token_ids", "wants", "states", "decided", "decided_exits")
    START_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    WANTS_FIELD_NUMBER: _ClassVar[int]
    STATES_FIELD_NUMBER: _ClassVar[int]
    DECIDED_FIELD_NUMBER: _ClassVar[int]
    DECIDED_EXITS_FIELD_NUMBER: _ClassVar[int]
    start: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    wants: _containers.RepeatedScalarFieldContainer[int]
    states: Tensor
    decided: _containers.RepeatedScalarFieldContainer[int]
    decided_exits: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, start: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., wants: _Optional[_Iterable[int]] = ..., states: _Optional[_Union[Tensor, _Mapping]] = ..., decided: _Optional[_Iterable[int]] = ..., decided_exits: _Optional[_Iterable[int]] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("token", "exit", "confidence", "reason", "likelihood")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    EXIT_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    LIKELIHOOD_FIELD_NUMBER: _ClassVar[int]
    token: int
    exit: int
    confidence: float
    reason: Reason
    likelihood: Likelihoods
    def __init__(self, token: _Optional[int] = ..., exit: _Optional[int] = ..., confidence: _Optional[float] = ..., reason: _Optional[_Union[Reason, str]] = ..., likelihood: _Optional[_Union[Likelihoods, _Mapping]] = ...) -> None: ...

class Likelihoods(_message.Message):
    __slots__ = ("logprobs", "top", "top_ids", "top_logprobs")
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    top: int
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, logprobs: _Optional[_Iterable[float]] = ..., top: _Optional[int] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class Hop(_message.Message):
    __slots__ = ("node", "compute_s", "queue_s", "wire_s", "messages", "positions", "bytes_up", "bytes_down", "recoveries")
    NODE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    WIRE_S_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    RECOVERIES_FIELD_NUMBER: _ClassVar[int]
    node: str
    compute_s: float
    queue_s: float
    wire_s: float
    messages: int
    positions: int
    bytes_up: int
    bytes_down: int
    recoveries: _containers.RepeatedCompositeFieldContainer[Recovery]
    def __init__(self, node: _Optional[str] = ..., compute_s: _Optional[float] = ..., queue_s: _Optional[float] = ..., wire_s: _Optional[float] = ..., messages: _Optional[int] = ..., positions: _Optional[int] = ..., bytes_up: _Optional[int] = ..., bytes_down: _Optional[int] = ..., recoveries: _Optional[_Iterable[_Union[Recovery, _Mapping]]] = ...) -> None: ...

class Recovery(_message.Message):
    __slots__ = ("cause", "seconds", "positions")
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    cause: str
    seconds: float
    positions: int
    def __init__(self, cause: _Optional[str] = ..., seconds: _Optional[float] = ..., positions: _Optional[int] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("decisions", "hops", "elapsed_s", "prompt", "position")
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    HOPS_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_S_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    decisions: _containers.RepeatedCompositeFieldContainer[Decision]
    hops: _containers.RepeatedCompositeFieldContainer[Hop]
    elapsed_s: float
    prompt: Likelihoods
    position: int
    def __init__(self, decisions: _Optional[_Iterable[_Union[Decision, _Mapping]]] = ..., hops: _Optional[_Iterable[_Union[Hop, _Mapping]]] = ..., elapsed_s: _Optional[float] = ..., prompt: _Optional[_Union[Likelihoods, _Mapping]] = ..., position: _Optional[int] = ...) -> None: ...

class Rewind(_message.Message):
    __slots__ = ("position",)
    POSITION_FIELD_NUMBER: _ClassVar[int]
    position: int
    def __init__(self, position: _Optional[int] = ...) -> None: ...

class Rewound(_message.Message):
    __slots__ = ("position",)
    POSITION_FIELD_NUMBER: _ClassVar[int]
    position: int
    def __init__(self, position: _Optional[int] = ...) -> None: ...

class AliveRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Sign(_message.Message):
    __slots__ = ("draining", "load", "checksum")
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    draining: bool
    load: float
    checksum: int
    def __init__(self, draining: _Optional[bool] = ..., load: _Optional[float] = ..., checksum: _Optional[int] = ...) -> None: ...

class OwedRequest(_message.Message):
    __slots__ = ("keys", "checksum")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    checksum: int
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ..., checksum: _Optional[int] = ...) -> None: ...

class OwedReply(_message.Message):
    __slots__ = ("work", "instance", "checksum")
    WORK_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    work: _containers.RepeatedScalarFieldContainer[Work]
    instance: bytes
    checksum: int
    def __init__(self, work: _Optional[_Iterable[_Union[Work, str]]] = ..., instance: _Optional[bytes] = ..., checksum: _Optional[int] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("text", "raw", "messages", "token_ids", "sampling", "routing", "resume", "checksum")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    ROUTING_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    text: str
    raw: str
    messages: Messages
    token_ids: TokenIds
    sampling: SamplingParams
    routing: Routing
    resume: Resume
    checksum: int
    def __init__(self, text: _Optional[str] = ..., raw: _Optional[str] = ..., messages: _Optional[_Union[Messages, _Mapping]] = ..., token_ids: _Optional[_Union[TokenIds, _Mapping]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., routing: _Optional[_Union[Routing, _Mapping]] = ..., resume: _Optional[_Union[Resume, _Mapping]] = ..., checksum: _Optional[int] = ...) -> None: ...

class Resume(_message.Message):
    __slots__ = ("token_ids", "exits")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    EXITS_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    exits: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., exits: _Optional[_Iterable[int]] = ...) -> None: ...

class Messages(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[Message]
    def __init__(self, messages: _Optional[_Iterable[_Union[Message, _Mapping]]] = ...) -> None: ...

class Message(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class GenerateReply(_message.Message):
    __slots__ = ("token", "final", "prompt", "number", "instance", "checksum")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    FINAL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    token: Token
    final: Final
    prompt: PromptTokens
    number: int
    instance: bytes
    checksum: int
    def __init__(self, token: _Optional[_Union[Token, _Mapping]] = ..., final: _Optional[_Union[Final, _Mapping]] = ..., prompt: _Optional[_Union[PromptTokens, _Mapping]] = ..., number: _Optional[int] = ..., instance: _Optional[bytes] = ..., checksum: _Optional[int] = ...) -> None: ...

class Tokenized(_message.Message):
    __slots__ = ("token_ids", "texts", "context")
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    context: int
    def __init__(self, token_ids: _Optional[_Iterable[int]] = ..., texts: _Optional[_Iterable[str]] = ..., context: _Optional[int] = ...) -> None: ...

class PromptTokens(_message.Message):
    __slots__ = ("tokens", "text")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[PromptToken]
    text: str
    def __init__(self, tokens: _Optional[_Iterable[_Union[PromptToken, _Mapping]]] = ..., text: _Optional[str] = ...) -> None: ...

class PromptToken(_message.Message):
    __slots__ = ("id", "text", "logprobs")
    ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    id: int
    text: str
    logprobs: Logprobs
    def __init__(self, id: _Optional[int] = ..., text: _Optional[str] = ..., logprobs: _Optional[_Union[Logprobs, _Mapping]] = ...) -> None: ...

class Logprobs(_message.Message):
    __slots__ = ("text", "logprob", "top")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    text: str
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TopToken]
    def __init__(self, text: _Optional[str] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TopToken, _Mapping]]] = ...) -> None: ...

class TopToken(_message.Message):
    __slots__ = ("id", "text", "logprob")
    ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    id: int
    text: str
    logprob: float
    def __init__(self, id: _Optional[int] = ..., text: _Optional[str] = ..., logprob: _Optional[float] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("id", "text", "exit", "node", "confidence", "reason", "after_s", "bytes_up", "logprobs")
    ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    EXIT_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    AFTER_S_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    id: int
    text: str
    exit: int
    node: str
    confidence: float
    reason: Reason
    after_s: float
    bytes_up: int
    logprobs: Logprobs
    def __init__(self, id: _Optional[int] = ..., text: _Optional[str] = ..., exit: _Optional[int] = ..., node: _Optional[str] = ..., confidence: _Optional[float] = ..., reason: _Optional[_Union[Reason, str]] = ..., after_s: _Optional[float] = ..., bytes_up: _Optional[int] = ..., logprobs: _Optional[_Union[Logprobs, _Mapping]] = ...) -> None: ...

class Final(_message.Message):
    __slots__ = ("finish_reason", "text", "stats")
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    finish_reason: FinishReason
    text: str
    stats: Stats
    def __init__(self, finish_reason: _Optional[_Union[FinishReason, str]] = ..., text: _Optional[str] = ..., stats: _Optional[_Union[Stats, _Mapping]] = ...) -> None: ...

class Stats(_message.Message):
    __slots__ = ("prompt_tokens", "new_tokens", "first_token_s", "total_s", "seed", "drafted", "accepted", "escalations", "hops", "reused", "recoveries")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    DRAFTED_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    ESCALATIONS_FIELD_NUMBER: _ClassVar[int]
    HOPS_FIELD_NUMBER: _ClassVar[int]
    REUSED_FIELD_NUMBER: _ClassVar[int]
    RECOVERIES_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    new_tokens: int
    first_token_s: float
    total_s: float
    seed: int
    drafted: int
    accepted: int
    escalations: int
    hops: _containers.RepeatedCompositeFieldContainer[Hop]
    reused: int
    recoveries: _containers.RepeatedCompositeFieldContainer[Recovery]
    def __init__(self, prompt_tokens: _Optional[int] = ..., new_tokens: _Optional[int] = ..., first_token_s: _Optional[float] = ..., total_s: _Optional[float] = ..., seed: _Optional[int] = ..., drafted: _Optional[int] = ..., accepted: _Optional[int] = ..., escalations: _Optional[int] = ..., hops: _Optional[_Iterable[_Union[Hop, _Mapping]]] = ..., reused: _Optional[int] = ..., recoveries: _Optional[_Iterable[_Union[Recovery, _Mapping]]] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("measure_link",)
    MEASURE_LINK_FIELD_NUMBER: _ClassVar[int]
    measure_link: bool
    def __init__(self, measure_link: _Optional[bool] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("node", "tier", "state", "family", "exits", "first_layer", "last_layer", "parameters", "tensor_bytes", "resident_bytes", "dtype", "device", "sessions", "max_sessions", "used_positions", "max_positions", "uptime_s", "next_node", "next_state", "process_id", "waiting", "version", "next_address", "next_encoding", "link", "link_error", "context", "parked", "cache_bytes", "log_bytes", "insecure")
    NODE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    EXITS_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    LAST_LAYER_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    TENSOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    USED_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_POSITIONS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    NEXT_NODE_FIELD_NUMBER: _ClassVar[int]
    NEXT_STATE_FIELD_NUMBER: _ClassVar[int]
    PROCESS_ID_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NEXT_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NEXT_ENCODING_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    LINK_ERROR_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    PARKED_FIELD_NUMBER: _ClassVar[int]
    CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOG_BYTES_FIELD_NUMBER: _ClassVar[int]
    INSECURE_FIELD_NUMBER: _ClassVar[int]
    node: str
    tier: str
    state: str
    family: str
    exits: _containers.RepeatedScalarFieldContainer[int]
    first_layer: int
    last_layer: int
    parameters: int
    tensor_bytes: int
    resident_bytes: int
    dtype: str
    device: str
    sessions: int
    max_sessions: int
    used_positions: int
    max_positions: int
    uptime_s: float
    next_node: str
    next_state: str
    process_id: int
    waiting: int
    version: str
    next_address: str
    next_encoding: Encoding
    link: Link
    link_error: str
    context: int
    parked: int
    cache_bytes: int
    log_bytes: int
    insecure: bool
    def __init__(self, node: _Optional[str] = ..., tier: _Optional[str] = ..., state: _Optional[str] = ..., family: _Optional[str] = ..., exits: _Optional[_Iterable[int]] = ..., first_layer: _Optional[int] = ..., last_layer: _Optional[int] = ..., parameters: _Optional[int] = ..., tensor_bytes: _Optional[int] = ..., resident_bytes: _Optional[int] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., sessions: _Optional[int] = ..., max_sessions: _Optional[int] = ..., used_positions: _Optional[int] = ..., max_positions: _Optional[int] = ..., uptime_s: _Optional[float] = ..., next_node: _Optional[str] = ..., next_state: _Optional[str] = ..., process_id: _Optional[int] = ..., waiting: _Optional[int] = ..., version: _Optional[str] = ..., next_address: _Optional[str] = ..., next_encoding: _Optional[_Union[Encoding, str]] = ..., link: _Optional[_Union[Link, _Mapping]] = ..., link_error: _Optional[str] = ..., context: _Optional[int] = ..., parked: _Optional[int] = ..., cache_bytes: _Optional[int] = ..., log_bytes: _Optional[int] = ..., insecure: _Optional[bool] = ...) -> None: ...

class Link(_message.Message):
    __slots__ = ("round_trip_ms", "jitter_ms", "up_mbit")
    ROUND_TRIP_MS_FIELD_NUMBER: _ClassVar[int]
    JITTER_MS_FIELD_NUMBER: _ClassVar[int]
    UP_MBIT_FIELD_NUMBER: _ClassVar[int]
    round_trip_ms: float
    jitter_ms: float
    up_mbit: float
    def __init__(self, round_trip_ms: _Optional[float] = ..., jitter_ms: _Optional[float] = ..., up_mbit: _Optional[float] = ...) -> None: ...
