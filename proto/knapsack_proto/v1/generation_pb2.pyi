from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
    FINISH_REASON_ABORT: _ClassVar[FinishReason]
    FINISH_REASON_ERROR: _ClassVar[FinishReason]

class ReplicaState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLICA_STATE_UNSPECIFIED: _ClassVar[ReplicaState]
    REPLICA_STATE_STARTING: _ClassVar[ReplicaState]
    REPLICA_STATE_SERVING: _ClassVar[ReplicaState]
    REPLICA_STATE_DRAINING: _ClassVar[ReplicaState]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
FINISH_REASON_ABORT: FinishReason
FINISH_REASON_ERROR: FinishReason
REPLICA_STATE_UNSPECIFIED: ReplicaState
REPLICA_STATE_STARTING: ReplicaState
REPLICA_STATE_SERVING: ReplicaState
REPLICA_STATE_DRAINING: ReplicaState

class Prompt(_message.Message):
    __slots__ = ("prompt_id", "tokens", "text", "chat")
    PROMPT_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    prompt_id: str
    tokens: TokenIds
    text: str
    chat: ChatMessages
    def __init__(self, prompt_id: _Optional[str] = ..., tokens: _Optional[_Union[TokenIds, _Mapping]] = ..., text: _Optional[str] = ..., chat: _Optional[_Union[ChatMessages, _Mapping]] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ChatMessages(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop_token_ids")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "prompts", "num_rollouts", "sampling", "expected_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    NUM_ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompts: _containers.RepeatedCompositeFieldContainer[Prompt]
    num_rollouts: _containers.RepeatedScalarFieldContainer[int]
    sampling: SamplingParams
    expected_tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, request_id: _Optional[str] = ..., prompts: _Optional[_Iterable[_Union[Prompt, _Mapping]]] = ..., num_rollouts: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., expected_tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class GenerateSessionRequest(_message.Message):
    __slots__ = ("open", "add", "stop")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    ADD_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    open: OpenSession
    add: AddRollouts
    stop: StopGroups
    def __init__(self, open: _Optional[_Union[OpenSession, _Mapping]] = ..., add: _Optional[_Union[AddRollouts, _Mapping]] = ..., stop: _Optional[_Union[StopGroups, _Mapping]] = ...) -> None: ...

class OpenSession(_message.Message):
    __slots__ = ("request_id", "sampling")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    sampling: SamplingParams
    def __init__(self, request_id: _Optional[str] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ...) -> None: ...

class AddRollouts(_message.Message):
    __slots__ = ("prompts", "prompt_indices", "num_rollouts", "expected_tokens")
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_INDICES_FIELD_NUMBER: _ClassVar[int]
    NUM_ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompts: _containers.RepeatedCompositeFieldContainer[Prompt]
    prompt_indices: _containers.RepeatedScalarFieldContainer[int]
    num_rollouts: _containers.RepeatedScalarFieldContainer[int]
    expected_tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, prompts: _Optional[_Iterable[_Union[Prompt, _Mapping]]] = ..., prompt_indices: _Optional[_Iterable[int]] = ..., num_rollouts: _Optional[_Iterable[int]] = ..., expected_tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class StopGroups(_message.Message):
    __slots__ = ("prompt_indices",)
    PROMPT_INDICES_FIELD_NUMBER: _ClassVar[int]
    prompt_indices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, prompt_indices: _Optional[_Iterable[int]] = ...) -> None: ...

class GenerateSessionResponse(_message.Message):
    __slots__ = ("rollouts", "answers")
    ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    rollouts: _containers.RepeatedCompositeFieldContainer[Rollout]
    answers: _containers.RepeatedCompositeFieldContainer[SessionAnswer]
    def __init__(self, rollouts: _Optional[_Iterable[_Union[Rollout, _Mapping]]] = ..., answers: _Optional[_Iterable[_Union[SessionAnswer, _Mapping]]] = ...) -> None: ...

class SessionAnswer(_message.Message):
    __slots__ = ("code", "error", "stopped_groups")
    CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    STOPPED_GROUPS_FIELD_NUMBER: _ClassVar[int]
    code: int
    error: str
    stopped_groups: _containers.RepeatedCompositeFieldContainer[StoppedGroup]
    def __init__(self, code: _Optional[int] = ..., error: _Optional[str] = ..., stopped_groups: _Optional[_Iterable[_Union[StoppedGroup, _Mapping]]] = ...) -> None: ...

class StoppedGroup(_message.Message):
    __slots__ = ("prompt_index", "rollout_indices")
    PROMPT_INDEX_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_INDICES_FIELD_NUMBER: _ClassVar[int]
    prompt_index: int
    rollout_indices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, prompt_index: _Optional[int] = ..., rollout_indices: _Optional[_Iterable[int]] = ...) -> None: ...

class WeightSpan(_message.Message):
    __slots__ = ("weight_version", "start", "end")
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    weight_version: int
    start: int
    end: int
    def __init__(self, weight_version: _Optional[int] = ..., start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class Rollout(_message.Message):
    __slots__ = ("prompt_index", "rollout_index", "token_ids", "logprobs", "text", "finish_reason", "weight_versions", "error")
    PROMPT_INDEX_FIELD_NUMBER: _ClassVar[int]
    ROLLOUT_INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    prompt_index: int
    rollout_index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    text: str
    finish_reason: FinishReason
    weight_versions: _containers.RepeatedCompositeFieldContainer[WeightSpan]
    error: str
    def __init__(self, prompt_index: _Optional[int] = ..., rollout_index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., text: _Optional[str] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., weight_versions: _Optional[_Iterable[_Union[WeightSpan, _Mapping]]] = ..., error: _Optional[str] = ...) -> None: ...

class UpdateWeightsRequest(_message.Message):
    __slots__ = ("path", "weight_version")
    PATH_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    path: str
    weight_version: int
    def __init__(self, path: _Optional[str] = ..., weight_version: _Optional[int] = ...) -> None: ...

class WeightStatus(_message.Message):
    __slots__ = ("weight_version", "fingerprint")
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    weight_version: int
    fingerprint: str
    def __init__(self, weight_version: _Optional[int] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GeneratorStatus(_message.Message):
    __slots__ = ("model", "engine", "weight_version", "replicas", "running_rollouts", "waiting_rollouts", "max_model_tokens", "vocabulary_size", "wanted_replicas", "members")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_VERSION_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VOCABULARY_SIZE_FIELD_NUMBER: _ClassVar[int]
    WANTED_REPLICAS_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    model: str
    engine: str
    weight_version: int
    replicas: int
    running_rollouts: int
    waiting_rollouts: int
    max_model_tokens: int
    vocabulary_size: int
    wanted_replicas: int
    members: _containers.RepeatedCompositeFieldContainer[Replica]
    def __init__(self, model: _Optional[str] = ..., engine: _Optional[str] = ..., weight_version: _Optional[int] = ..., replicas: _Optional[int] = ..., running_rollouts: _Optional[int] = ..., waiting_rollouts: _Optional[int] = ..., max_model_tokens: _Optional[int] = ..., vocabulary_size: _Optional[int] = ..., wanted_replicas: _Optional[int] = ..., members: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ...) -> None: ...

class SetReplicasRequest(_message.Message):
    __slots__ = ("replicas",)
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    replicas: int
    def __init__(self, replicas: _Optional[int] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("number", "state", "running_rollouts", "losses", "place", "problem")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RUNNING_ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    number: int
    state: ReplicaState
    running_rollouts: int
    losses: int
    place: str
    problem: str
    def __init__(self, number: _Optional[int] = ..., state: _Optional[_Union[ReplicaState, str]] = ..., running_rollouts: _Optional[int] = ..., losses: _Optional[int] = ..., place: _Optional[str] = ..., problem: _Optional[str] = ...) -> None: ...
