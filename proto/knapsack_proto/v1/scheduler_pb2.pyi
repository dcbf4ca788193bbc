import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RunConfig(_message.Message):
    __slots__ = ("policy", "objective", "success_threshold", "min_rollouts", "max_rollouts", "visit_discount", "version_discount", "evidence_cap", "reward_levels")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    OBJECTIVE_FIELD_NUMBER: _ClassVar[int]
    SUCCESS_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    MIN_ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    MAX_ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    VISIT_DISCOUNT_FIELD_NUMBER: _ClassVar[int]
    VERSION_DISCOUNT_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_CAP_FIELD_NUMBER: _ClassVar[int]
    REWARD_LEVELS_FIELD_NUMBER: _ClassVar[int]
    policy: str
    objective: str
    success_threshold: float
    min_rollouts: int
    max_rollouts: int
    visit_discount: float
    version_discount: float
    evidence_cap: float
    reward_levels: bool
    def __init__(self, policy: _Optional[str] = ..., objective: _Optional[str] = ..., success_threshold: _Optional[float] = ..., min_rollouts: _Optional[int] = ..., max_rollouts: _Optional[int] = ..., visit_discount: _Optional[float] = ..., version_discount: _Optional[float] = ..., evidence_cap: _Optional[float] = ..., reward_levels: bool = ...) -> None: ...

class Run(_message.Message):
    __slots__ = ("run_id", "config", "create_time", "last_step", "last_policy_version", "known_prompts", "total_rollouts", "total_successes", "rewinds", "ignored_rollouts", "reward_levels", "calibration", "reported_groups", "effective_groups")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    LAST_POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    KNOWN_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_SUCCESSES_FIELD_NUMBER: _ClassVar[int]
    REWINDS_FIELD_NUMBER: _ClassVar[int]
    IGNORED_ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    REWARD_LEVELS_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_FIELD_NUMBER: _ClassVar[int]
    REPORTED_GROUPS_FIELD_NUMBER: _ClassVar[int]
    EFFECTIVE_GROUPS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    config: RunConfig
    create_time: _timestamp_pb2.Timestamp
    last_step: int
    last_policy_version: int
    known_prompts: int
    total_rollouts: int
    total_successes: int
    rewinds: int
    ignored_rollouts: int
    reward_levels: _containers.RepeatedScalarFieldContainer[float]
    calibration: Calibration
    reported_groups: int
    effective_groups: int
    def __init__(self, run_id: _Optional[str] = ..., config: _Optional[_Union[RunConfig, _Mapping]] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., last_step: _Optional[int] = ..., last_policy_version: _Optional[int] = ..., known_prompts: _Optional[int] = ..., total_rollouts: _Optional[int] = ..., total_successes: _Optional[int] = ..., rewinds: _Optional[int] = ..., ignored_rollouts: _Optional[int] = ..., reward_levels: _Optional[_Iterable[float]] = ..., calibration: _Optional[_Union[Calibration, _Mapping]] = ..., reported_groups: _Optional[int] = ..., effective_groups: _Optional[int] = ...) -> None: ...

class Calibration(_message.Message):
    __slots__ = ("groups", "effective_groups", "predicted_effective_groups", "rollouts", "effective_rollouts", "predicted_effective_rollouts")
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    EFFECTIVE_GROUPS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_EFFECTIVE_GROUPS_FIELD_NUMBER: _ClassVar[int]
    ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    EFFECTIVE_ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_EFFECTIVE_ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedScalarFieldContainer[int]
    effective_groups: _containers.RepeatedScalarFieldContainer[int]
    predicted_effective_groups: _containers.RepeatedScalarFieldContainer[float]
    rollouts: _containers.RepeatedScalarFieldContainer[int]
    effective_rollouts: _containers.RepeatedScalarFieldContainer[int]
    predicted_effective_rollouts: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, groups: _Optional[_Iterable[int]] = ..., effective_groups: _Optional[_Iterable[int]] = ..., predicted_effective_groups: _Optional[_Iterable[float]] = ..., rollouts: _Optional[_Iterable[int]] = ..., effective_rollouts: _Optional[_Iterable[int]] = ..., predicted_effective_rollouts: _Optional[_Iterable[float]] = ...) -> None: ...

class CreateRunRequest(_message.Message):
    __slots__ = ("run_id", "config")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    config: RunConfig
    def __init__(self, run_id: _Optional[str] = ..., config: _Optional[_Union[RunConfig, _Mapping]] = ...) -> None: ...

class GetRunRequest(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    def __init__(self, run_id: _Optional[str] = ...) -> None: ...

class ListRunsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListRunsResponse(_message.Message):
    __slots__ = ("runs", "next_page_token")
    RUNS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[Run]
    next_page_token: str
    def __init__(self, runs: _Optional[_Iterable[_Union[Run, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DeleteRunRequest(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    def __init__(self, run_id: _Optional[str] = ...) -> None: ...

class DeleteRunResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AllocateRequest(_message.Message):
    __slots__ = ("run_id", "step", "request_id", "prompt_ids", "total_rollouts", "min_rollouts", "max_rollouts", "wave_fraction", "allow_partial", "total_tokens", "waves")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    MIN_ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    MAX_ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    WAVE_FRACTION_FIELD_NUMBER: _ClassVar[int]
    ALLOW_PARTIAL_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WAVES_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    step: int
    request_id: str
    prompt_ids: _containers.RepeatedScalarFieldContainer[str]
    total_rollouts: int
    min_rollouts: _containers.RepeatedScalarFieldContainer[int]
    max_rollouts: _containers.RepeatedScalarFieldContainer[int]
    wave_fraction: float
    allow_partial: bool
    total_tokens: int
    waves: int
    def __init__(self, run_id: _Optional[str] = ..., step: _Optional[int] = ..., request_id: _Optional[str] = ..., prompt_ids: _Optional[_Iterable[str]] = ..., total_rollouts: _Optional[int] = ..., min_rollouts: _Optional[_Iterable[int]] = ..., max_rollouts: _Optional[_Iterable[int]] = ..., wave_fraction: _Optional[float] = ..., allow_partial: bool = ..., total_tokens: _Optional[int] = ..., waves: _Optional[int] = ...) -> None: ...

class Allocation(_message.Message):
    __slots__ = ("allocation_id", "run_id", "step", "wave", "num_rollouts", "allocated_rollouts", "remaining_rollouts", "unallocated_rollouts", "summary")
    ALLOCATION_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WAVE_FIELD_NUMBER: _ClassVar[int]
    NUM_ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    ALLOCATED_ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    REMAINING_ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    UNALLOCATED_ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    allocation_id: str
    run_id: str
    step: int
    wave: int
    num_rollouts: _containers.RepeatedScalarFieldContainer[int]
    allocated_rollouts: int
    remaining_rollouts: int
    unallocated_rollouts: int
    summary: AllocationSummary
    def __init__(self, allocation_id: _Optional[str] = ..., run_id: _Optional[str] = ..., step: _Optional[int] = ..., wave: _Optional[int] = ..., num_rollouts: _Optional[_Iterable[int]] = ..., allocated_rollouts: _Optional[int] = ..., remaining_rollouts: _Optional[int] = ..., unallocated_rollouts: _Optional[int] = ..., summary: _Optional[_Union[AllocationSummary, _Mapping]] = ...) -> None: ...

class AllocationSummary(_message.Message):
    __slots__ = ("policy", "objective", "effective_group_rate", "effective_rollout_rate", "value", "uniform_value", "value_upper_bound", "price", "unseen_prompts", "largest_group", "prior_alpha", "prior_beta", "expected_tokens")
    POLICY_FIELD_NUMBER: _ClassVar[int]
    OBJECTIVE_FIELD_NUMBER: _ClassVar[int]
    EFFECTIVE_GROUP_RATE_FIELD_NUMBER: _ClassVar[int]
    EFFECTIVE_ROLLOUT_RATE_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    UNIFORM_VALUE_FIELD_NUMBER: _ClassVar[int]
    VALUE_UPPER_BOUND_FIELD_NUMBER: _ClassVar[int]
    PRICE_FIELD_NUMBER: _ClassVar[int]
    UNSEEN_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    LARGEST_GROUP_FIELD_NUMBER: _ClassVar[int]
    PRIOR_ALPHA_FIELD_NUMBER: _ClassVar[int]
    PRIOR_BETA_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    policy: str
    objective: str
    effective_group_rate: float
    effective_rollout_rate: float
    value: float
    uniform_value: float
    value_upper_bound: float
    price: float
    unseen_prompts: int
    largest_group: int
    prior_alpha: float
    prior_beta: float
    expected_tokens: float
    def __init__(self, policy: _Optional[str] = ..., objective: _Optional[str] = ..., effective_group_rate: _Optional[float] = ..., effective_rollout_rate: _Optional[float] = ..., value: _Optional[float] = ..., uniform_value: _Optional[float] = ..., value_upper_bound: _Optional[float] = ..., price: _Optional[float] = ..., unseen_prompts: _Optional[int] = ..., largest_group: _Optional[int] = ..., prior_alpha: _Optional[float] = ..., prior_beta: _Optional[float] = ..., expected_tokens: _Optional[float] = ...) -> None: ...

class ExtendRequest(_message.Message):
    __slots__ = ("run_id", "allocation_id", "request_id", "wave_fraction", "keep_outstanding")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ALLOCATION_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    WAVE_FRACTION_FIELD_NUMBER: _ClassVar[int]
    KEEP_OUTSTANDING_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    allocation_id: str
    request_id: str
    wave_fraction: float
    keep_outstanding: bool
    def __init__(self, run_id: _Optional[str] = ..., allocation_id: _Optional[str] = ..., request_id: _Optional[str] = ..., wave_fraction: _Optional[float] = ..., keep_outstanding: bool = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("run_id", "allocation_id", "report_id", "policy_version", "step", "prompt_ids", "prompt_indices", "num_rewards", "rewards", "completion_tokens")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ALLOCATION_ID_FIELD_NUMBER: _ClassVar[int]
    REPORT_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_INDICES_FIELD_NUMBER: _ClassVar[int]
    NUM_REWARDS_FIELD_NUMBER: _ClassVar[int]
    REWARDS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    allocation_id: str
    report_id: str
    policy_version: int
    step: int
    prompt_ids: _containers.RepeatedScalarFieldContainer[str]
    prompt_indices: _containers.RepeatedScalarFieldContainer[int]
    num_rewards: _containers.RepeatedScalarFieldContainer[int]
    rewards: _containers.RepeatedScalarFieldContainer[float]
    completion_tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, run_id: _Optional[str] = ..., allocation_id: _Optional[str] = ..., report_id: _Optional[str] = ..., policy_version: _Optional[int] = ..., step: _Optional[int] = ..., prompt_ids: _Optional[_Iterable[str]] = ..., prompt_indices: _Optional[_Iterable[int]] = ..., num_rewards: _Optional[_Iterable[int]] = ..., rewards: _Optional[_Iterable[float]] = ..., completion_tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class ReportResponse(_message.Message):
    __slots__ = ("accepted_rollouts", "ignored_rollouts")
    ACCEPTED_ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    IGNORED_ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    accepted_rollouts: int
    ignored_rollouts: int
    def __init__(self, accepted_rollouts: _Optional[int] = ..., ignored_rollouts: _Optional[int] = ...) -> None: ...

class RewindRunRequest(_message.Message):
    __slots__ = ("run_id", "step", "request_id")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    step: int
    request_id: str
    def __init__(self, run_id: _Optional[str] = ..., step: _Optional[int] = ..., request_id: _Optional[str] = ...) -> None: ...

class ListPromptStatsRequest(_message.Message):
    __slots__ = ("run_id", "page_size", "page_token")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    page_size: int
    page_token: str
    def __init__(self, run_id: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListPromptStatsResponse(_message.Message):
    __slots__ = ("prompt_ids", "total_rollouts", "total_successes", "last_step", "last_policy_version", "posterior_alpha", "posterior_beta", "mean_completion_tokens", "next_page_token")
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_SUCCESSES_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    LAST_POLICY_VERSION_FIELD_NUMBER: _ClassVar[int]
    POSTERIOR_ALPHA_FIELD_NUMBER: _ClassVar[int]
    POSTERIOR_BETA_FIELD_NUMBER: _ClassVar[int]
    MEAN_COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    prompt_ids: _containers.RepeatedScalarFieldContainer[str]
    total_rollouts: _containers.RepeatedScalarFieldContainer[int]
    total_successes: _containers.RepeatedScalarFieldContainer[int]
    last_step: _containers.RepeatedScalarFieldContainer[int]
    last_policy_version: _containers.RepeatedScalarFieldContainer[int]
    posterior_alpha: _containers.RepeatedScalarFieldContainer[float]
    posterior_beta: _containers.RepeatedScalarFieldContainer[float]
    mean_completion_tokens: _containers.RepeatedScalarFieldContainer[float]
    next_page_token: str
    def __init__(self, prompt_ids: _Optional[_Iterable[str]] = ..., total_rollouts: _Optional[_Iterable[int]] = ..., total_successes: _Optional[_Iterable[int]] = ..., last_step: _Optional[_Iterable[int]] = ..., last_policy_version: _Optional[_Iterable[int]] = ..., posterior_alpha: _Optional[_Iterable[float]] = ..., posterior_beta: _Optional[_Iterable[float]] = ..., mean_completion_tokens: _Optional[_Iterable[float]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class ImportOutcomesRequest(_message.Message):
    __slots__ = ("run_id", "request_id", "step", "prompt_ids", "num_rewards", "rewards", "completion_tokens")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_REWARDS_FIELD_NUMBER: _ClassVar[int]
    REWARDS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    request_id: str
    step: int
    prompt_ids: _containers.RepeatedScalarFieldContainer[str]
    num_rewards: _containers.RepeatedScalarFieldContainer[int]
    rewards: _containers.RepeatedScalarFieldContainer[float]
    completion_tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, run_id: _Optional[str] = ..., request_id: _Optional[str] = ..., step: _Optional[int] = ..., prompt_ids: _Optional[_Iterable[str]] = ..., num_rewards: _Optional[_Iterable[int]] = ..., rewards: _Optional[_Iterable[float]] = ..., completion_tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class ImportOutcomesResponse(_message.Message):
    __slots__ = ("imported_rollouts", "imported_prompts")
    IMPORTED_ROLLOUTS_FIELD_NUMBER: _ClassVar[int]
    IMPORTED_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    imported_rollouts: int
    imported_prompts: int
    def __init__(self, imported_rollouts: _Optional[int] = ..., imported_prompts: _Optional[int] = ...) -> None: ...
